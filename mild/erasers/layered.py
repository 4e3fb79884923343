"""Erasing with MILD."""

from __future__ import annotations

import numpy as np
import torch

from mild.erasers import check_input, keep_outside
from mild.pipeline import MILDPipeline


class MILDEraser:
    """`mild.pipeline.MILDPipeline`: its background branch, in windows at the resolution that it was trained at."""

    name = "mild"

    def __init__(self, pipeline: MILDPipeline, *, steps: int = 25, prompt: str = "") -> None:
        self.pipeline = pipeline
        self.steps = steps
        self.prompt = prompt

    def erase(self, image: np.ndarray, mask: np.ndarray, seed: int) -> np.ndarray:
        """Fill the hole, taken as one person. See `mild.erasers.Eraser.erase`.

        The pipeline also smooths a margin around the mask; it is left out here, so that all methods are judged alike.
        """
        check_input(image, mask)
        if not mask.any():
            return image.copy()
        generator = torch.Generator("cpu").manual_seed(seed)
        result = self.pipeline(
            image,
            [mask],
            prompt=self.prompt,
            num_inference_steps=self.steps,
            generator=generator,
            output_type="np",
        )
        return keep_outside(result.image, image, mask)
