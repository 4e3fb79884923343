"""Erasing with a stock SDXL inpainting pipeline: the base as it is."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image
from pydantic import Field

from dataset_tools.estimators.network import alike
from dataset_tools.settings import digest_of
from mild.bases import digest_of_place
from mild.evaluation.methods import Case, MethodSettings, Setup, keep_outside


class SDXLMethod(MethodSettings):
    """A stock `StableDiffusionXLInpaintPipeline`, which sees the whole picture."""

    kind: Literal["sdxl-inpaint"] = "sdxl-inpaint"
    base: str = ""
    """Folder or hub id of the pipeline; empty: the base of the evaluation."""
    inference_steps: int | None = Field(None, ge=1)
    """Steps of the base's own scheduler; null: as all methods."""
    guidance_scale: float = Field(7.5, ge=1)
    """Classifier-free guidance."""
    strength: float = Field(0.9999, gt=0, le=1)
    """Below 1 it leaves out the noisiest step and begins from the noised picture, people included, of which more shines
    through the fewer steps there are. SDXL's own UNet paints worse at exactly 1, says its card."""
    resolution: int = Field(512, ge=8)
    """Shorter side at which it works, in pixels; its result is brought back to the picture's size."""

    @property
    def title(self) -> str:
        """See `MethodSettings.title`."""
        return "SDXL Inpaint" + (f" ({self.name})" if self.name != self.kind else "")

    def place(self, setup: Setup) -> str:
        """Where the pipeline is."""
        return self.base or setup.base

    def missing(self, setup: Setup) -> str | None:
        """See `MethodSettings.missing`."""
        return None if self.place(setup) else "no base is named: set base, or give adapters, whose base it then is"

    def weights(self, setup: Setup) -> dict[str, str]:
        """See `MethodSettings.weights`."""
        return {"base": digest_of_place(self.place(setup))}

    def fingerprint(self, setup: Setup) -> str:
        """See `MethodSettings.fingerprint`."""
        settings = self.model_dump(mode="json", exclude={"name", "arm", "base", "inference_steps"})
        steps = self.inference_steps or setup.inference_steps
        software = [version(package) for package in ("torch", "diffusers", "transformers")]
        return digest_of([1, settings, steps, setup.prompt, self.weights(setup), software])

    def open(self, setup: Setup) -> SDXLEraser:
        """See `MethodSettings.open`."""
        import torch

        from mild.model.backbone import load_base

        pipeline = load_base(self.place(setup)).to("cuda" if torch.cuda.is_available() else "cpu")
        return SDXLEraser(self, pipeline, self.inference_steps or setup.inference_steps, setup.prompt)


class SDXLEraser:
    """The pipeline, in memory."""

    def __init__(self, settings: SDXLMethod, pipeline: Any, steps: int, prompt: str) -> None:
        self.pipeline = pipeline
        self._settings, self._steps, self._prompt = settings, steps, prompt

    def erase(self, cases: Sequence[Case], seeds: Sequence[int]) -> list[np.ndarray]:
        """Fill the holes. See `mild.evaluation.methods.Eraser.erase`."""
        import torch

        results: list[np.ndarray] = [case.image for case in cases]
        sizes = [working_size(case.hole.shape, self._settings.resolution) for case in cases]
        for same in alike(sizes):
            chosen, (height, width) = [cases[index] for index in same], sizes[same[0]]
            scaled = [scaled_case(case, (height, width)) for case in chosen]
            filled = self.pipeline(
                prompt=[self._prompt] * len(same),
                image=[image for image, _ in scaled],
                mask_image=[hole for _, hole in scaled],
                height=height,
                width=width,
                strength=self._settings.strength,
                num_inference_steps=self._steps,
                guidance_scale=self._settings.guidance_scale,
                generator=[torch.Generator("cpu").manual_seed(seeds[index]) for index in same],
            ).images
            for index, case, picture in zip(same, chosen, filled, strict=True):
                results[index] = brought_back(picture, case)
        return results


def working_size(size: tuple[int, ...], resolution: int, multiple: int = 8) -> tuple[int, int]:
    """Height and width with the shorter side at ``resolution``, in multiples as pipelines want them."""
    scale = resolution / min(size)
    height, width = (max(multiple, round(side * scale / multiple) * multiple) for side in size)
    return height, width


def scaled_case(case: Case, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """Picture and hole (0 or 255) at a working size (height, width).

    The hole holds every pixel that the mask touches: nothing of a person may shine through into what a network sees.
    """
    # OpenCV's advice: areas for shrinking, linear for growing.
    how = cv2.INTER_AREA if size[0] < case.hole.shape[0] else cv2.INTER_LINEAR
    image = cv2.resize(case.image, size[::-1], interpolation=how)
    hole = cv2.resize(case.hole.astype(np.float32), size[::-1], interpolation=how) > 0
    return Image.fromarray(image), Image.fromarray(hole.astype(np.uint8) * 255)


def brought_back(picture: Image.Image, case: Case) -> np.ndarray:
    """A result of any size at the picture's own, (H, W, 3) uint8, with the picture's pixels outside the hole."""
    height, width = case.hole.shape
    filled = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
    return keep_outside(filled, case)
