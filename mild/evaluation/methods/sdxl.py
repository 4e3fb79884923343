"""Erasing with a stock SDXL inpainting pipeline: the base as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from PIL import Image
from pydantic import Field

from dataset_tools.errors import UserError
from dataset_tools.estimators.network import alike
from dataset_tools.networks import NETWORKS
from dataset_tools.settings import digest_of
from dataset_tools.weights import HUB_ID, at_hand, missing_message
from mild.bases import digest_of_place, place_of
from mild.evaluation.methods import Case, MethodSettings, Setup, keep_outside

if TYPE_CHECKING:
    import torch


class SDXLMethod(MethodSettings):
    """A stock `StableDiffusionXLInpaintPipeline`, which sees the whole picture."""

    kind: Literal["sdxl-inpaint"] = "sdxl-inpaint"
    base: str = ""
    """Folder or hub id of the pipeline; empty: the base of the evaluation."""
    inference_steps: int | None = Field(None, ge=1, le=1000)
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
        steps = self.inference_steps or setup.inference_steps
        return missing_base(self.place(setup)) or no_steps_left(steps, self.strength)

    def weights(self, setup: Setup) -> dict[str, str]:
        """See `MethodSettings.weights`."""
        return {"base": digest_of_place(self.place(setup))}

    def fingerprint(self, setup: Setup) -> str:
        """See `MethodSettings.fingerprint`."""
        settings = self.decisive("base", "inference_steps")
        steps = self.inference_steps or setup.inference_steps
        software = [version(package) for package in ("torch", "diffusers", "transformers")]
        return digest_of([1, settings, steps, setup.prompt, self.weights(setup), software])

    def open(self, setup: Setup) -> SDXLEraser:
        """See `MethodSettings.open`."""
        import torch

        from mild.model.backbone import load_base

        pipeline = load_base(self.place(setup)).to("cuda" if torch.cuda.is_available() else "cpu")
        return SDXLEraser(
            pipeline,
            self.resolution,
            setup.prompt,
            num_inference_steps=self.inference_steps or setup.inference_steps,
            strength=self.strength,
            guidance_scale=self.guidance_scale,
        )


class PipelineEraser(ABC):
    """What has an SDXL pipeline in memory and sees whole pictures, at a working size."""

    multiple = 8
    """What the sides of the working size are divisible by."""

    def __init__(self, pipeline: Any, resolution: int) -> None:
        self.pipeline = pipeline
        self._resolution = resolution

    @abstractmethod
    def paint(
        self, images: list[Image.Image], holes: list[Image.Image], generators: list[torch.Generator]
    ) -> list[Image.Image]:
        """Fill pictures of one working size, each with the noise of its generator.

        Args:
            images: RGB.
            holes: 255 where they are to be filled, 0 elsewhere.
            generators: one a picture, on the CPU.
        """
        ...

    def erase(self, cases: Sequence[Case], seeds: Sequence[int]) -> list[np.ndarray]:
        """Fill the holes. See `mild.evaluation.methods.Eraser.erase`."""
        import torch

        results: list[np.ndarray] = [case.image for case in cases]
        sizes = [working_size(case.hole.shape, self._resolution, self.multiple) for case in cases]
        for same in alike(sizes):
            scaled = [scaled_case(cases[index], sizes[index]) for index in same]
            filled = self.paint(
                [image for image, _ in scaled],
                [hole for _, hole in scaled],
                [torch.Generator("cpu").manual_seed(seeds[index]) for index in same],
            )
            for index, picture in zip(same, filled, strict=True):
                results[index] = brought_back(picture, cases[index])
        return results


class SDXLEraser(PipelineEraser):
    """The stock pipeline as it is.

    Args:
        pipeline: a `StableDiffusionXLInpaintPipeline`.
        resolution: shorter side at which it works.
        prompt: what the holes show.
        options: of the pipeline's call.
    """

    def __init__(self, pipeline: Any, resolution: int, prompt: str, **options: Any) -> None:
        super().__init__(pipeline, resolution)
        self._prompt, self._options = prompt, options

    def paint(
        self, images: list[Image.Image], holes: list[Image.Image], generators: list[torch.Generator]
    ) -> list[Image.Image]:
        """See `PipelineEraser.paint`."""
        width, height = images[0].size
        filled: list[Image.Image] = self.pipeline(
            prompt=[self._prompt] * len(images),
            image=images,
            mask_image=holes,
            height=height,
            width=width,
            generator=generators,
            **self._options,
        ).images
        return filled


def missing_base(name: str) -> str | None:
    """Why a base cannot be loaded, as far as can be told here: hub ids are fetched when they are needed."""
    if not name:
        return "no base is named: set base, or give adapters, whose base it then is"
    place = place_of(name)
    return None if HUB_ID.fullmatch(place) or Path(place).is_dir() else f"base {name} is no folder here"


def no_steps_left(steps: int, strength: float) -> str | None:
    """Why stock pipelines cannot run, which take the whole part of ``steps * strength`` steps."""
    if int(steps * strength) >= 1:
        return None
    return f"a strength of {strength:g} leaves none of {steps} steps: set inference_steps or strength"


def pipeline_folder(name: str) -> Path:
    """The folder on this machine of a pipeline: one of your own, bundled, pulled, or in the hub's cache.

    Raises:
        UserError: nobody named one, or it is not here; says what to do.
    """
    if not name:
        raise UserError("no base is named: set base, or give adapters, whose base it then is")
    place = place_of(name)
    row = next((row for row in NETWORKS.values() if row.hub == place), None)
    if Path(place).is_dir():
        return Path(place)
    if row:
        if folder := at_hand(row):
            return folder
        raise UserError(missing_message([row.name]))
    if HUB_ID.fullmatch(place):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(place, "model_index.json")
        if isinstance(found, str):
            return Path(found).parent
    raise UserError(f"{name} is no folder here and not in the hub's cache; fetch it first, or name another")


def precision(folder: Path) -> dict[str, Any]:
    """The option with which diffusers loads a pipeline's folder that holds the weights in half precision alone."""
    files = [path.name for path in folder.glob("unet/*.safetensors")]
    return {"variant": "fp16"} if files and all(".fp16." in name for name in files) else {}


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
