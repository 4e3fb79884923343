"""Erasing with MILD."""

from __future__ import annotations

import numpy as np
import torch

from mild.erasing.pipeline import MILDPipeline
from mild.evaluation.methods import Case, check_background, keep_outside


class MILDEraser:
    """`mild.erasing.pipeline.MILDPipeline`: its background branch, in windows of the resolution it was trained at."""

    name = "mild"

    def __init__(
        self, pipeline: MILDPipeline, *, steps: int = 25, prompt: str = "", match_colours: bool = True
    ) -> None:
        self.pipeline = pipeline
        self.steps = steps
        self.prompt = prompt
        self.match_colours = match_colours

    def erase(self, case: Case, seed: int) -> np.ndarray:
        """Fill the hole, person by person known, with pose and parsing. See `mild.evaluation.methods.Eraser.erase`.

        Without the margin by which the pipeline widens masks: all methods are to fill, and are shown, the same.
        """
        check_background(case)
        if not case.hole.any():
            return case.image.copy()
        result = self.pipeline(
            case.image,
            list(case.masks),
            prompt=self.prompt,
            pose=case.pose,
            parsing=case.parsing,
            label_set=case.label_set,
            margin=0,
            match_colours=self.match_colours,
            num_inference_steps=self.steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
        )
        return keep_outside(result.image, case)
