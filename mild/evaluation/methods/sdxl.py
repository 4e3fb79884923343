"""Erasing with a stock SDXL inpainting pipeline: the base as it is."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from diffusers import StableDiffusionXLInpaintPipeline
from PIL import Image

from mild.evaluation.methods import Case, check_background, keep_outside


class SDXLEraser:
    """A stock `StableDiffusionXLInpaintPipeline`, which sees the whole picture."""

    name = "sdxl-inpaint"

    def __init__(
        self,
        pipeline: StableDiffusionXLInpaintPipeline,
        *,
        steps: int = 25,
        guidance_scale: float = 1.0,
        strength: float = 0.9999,
        prompt: str = "",
        resolution: int = 512,
    ) -> None:
        self.pipeline = pipeline
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.strength = strength
        self.prompt = prompt
        self.resolution = resolution

    def erase(self, case: Case, seed: int) -> np.ndarray:
        """Fill the hole, the shorter side being worked on at ``resolution``: `mild.evaluation.methods.Eraser.erase`."""
        check_background(case)
        if not case.hole.any():
            return case.image.copy()
        height, width = case.hole.shape
        work_height, work_width = self._working_size(height, width)
        size = (work_width, work_height)
        scaled = cv2.resize(case.image, size, interpolation=_interpolation(height, work_height))
        # Every pixel that the mask touches: nothing of a person may shine through into what the UNet sees.
        hole = cv2.resize(case.hole.astype(np.float32), size, interpolation=_interpolation(height, work_height)) > 0
        result = self.pipeline(
            prompt=self.prompt,
            image=Image.fromarray(scaled),
            mask_image=Image.fromarray(hole.astype(np.uint8) * 255),
            height=work_height,
            width=work_width,
            strength=self.strength,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        filled = np.asarray(result.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
        return keep_outside(filled, case)

    def _working_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width with the shorter side at ``resolution``, in multiples of 8 as the pipeline wants them."""
        scale = self.resolution / min(height, width)
        return max(8, round(height * scale / 8) * 8), max(8, round(width * scale / 8) * 8)


def _interpolation(size: int, target: int) -> int:
    """OpenCV's advice: areas for shrinking, linear for growing."""
    return cv2.INTER_AREA if target < size else cv2.INTER_LINEAR
