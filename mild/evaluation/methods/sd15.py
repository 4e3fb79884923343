"""Stable Diffusion 1.5's inpainting pipeline, on which PowerPaint and CLIPAway are built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_tools.errors import UserError
from dataset_tools.estimators.network import alike, quietly
from dataset_tools.networks import NETWORKS
from dataset_tools.storage import local_place
from dataset_tools.weights import find_weights
from mild.bases import digest_of_place
from mild.evaluation.methods import Case
from mild.evaluation.methods.sdxl import brought_back, scaled_case, working_size

if TYPE_CHECKING:
    from PIL import Image


def find_pipeline(name: str) -> tuple[Path, str]:
    """Folder of a pipeline, and sha256 (hex) over its files. Nothing is fetched.

    Args:
        name: of `dataset_tools.networks`, or a folder as diffusers saves it.

    Raises:
        UserError: it is not here, or damaged.
    """
    if name in NETWORKS:
        found = find_weights(name)
        return found.folder, found.sha256
    folder = Path(local_place(name, "weights"))
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"base {name} is no network of the table (mild weights list), and no folder of a diffusers pipeline, which "
            "has a model_index.json"
        )
    return folder, digest_of_place(str(folder))


@quietly()
def load_pipeline(name: str) -> Any:
    """The ``StableDiffusionInpaintPipeline`` of that name (`find_pipeline`), in float32, on a GPU where there is one.

    Without the checker that blackens pictures.

    Raises:
        UserError: it is not here, damaged, or none of Stable Diffusion 1.5 with 9 input channels.
    """
    import torch
    from diffusers import StableDiffusionInpaintPipeline
    from safetensors import SafetensorError

    folder, _ = find_pipeline(name)
    # What mild weights pull fetches is in half precision alone.
    whole = (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    try:
        pipeline = StableDiffusionInpaintPipeline.from_pretrained(
            folder,
            variant=None if whole else "fp16",
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"base {name} cannot be loaded: {' '.join(str(error).split())}") from None
    unet, text = pipeline.unet.config, pipeline.text_encoder.config
    if (unet.in_channels, unet.cross_attention_dim) != (2 * pipeline.vae.config.latent_channels + 1, text.hidden_size):
        raise UserError(f"base {name} is no inpainting pipeline of Stable Diffusion 1.5: its UNet takes other inputs")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


class SD15Eraser(ABC):
    """The pipeline, in memory; it sees the whole picture."""

    def __init__(self, pipeline: Any, resolution: int, steps: int, guidance_scale: float) -> None:
        self.pipeline = pipeline
        self._resolution, self._steps, self._guidance_scale = resolution, steps, guidance_scale

    @abstractmethod
    def conditions(self, pictures: Sequence[Image.Image], holes: Sequence[Image.Image]) -> dict[str, Any]:
        """The arguments of the pipeline that say what to paint; pictures and holes (0 or 255) are of one size."""
        ...

    def shown(self, case: Case) -> Case:
        """What the pipeline is shown of a case."""
        return case

    def erase(self, cases: Sequence[Case], seeds: Sequence[int]) -> list[np.ndarray]:
        """Fill the holes. See `mild.evaluation.methods.Eraser.erase`."""
        import torch

        results: list[np.ndarray] = [case.image for case in cases]
        sizes = [working_size(case.hole.shape, self._resolution) for case in cases]
        for same in alike(sizes):
            height, width = sizes[same[0]]
            scaled = [scaled_case(self.shown(cases[index]), (height, width)) for index in same]
            pictures, holes = ([pair[part] for pair in scaled] for part in (0, 1))
            filled = self.pipeline(
                image=pictures,
                mask_image=holes,
                height=height,
                width=width,
                num_inference_steps=self._steps,
                guidance_scale=self._guidance_scale,
                generator=[torch.Generator("cpu").manual_seed(seeds[index]) for index in same],
                **self.conditions(pictures, holes),
            ).images
            for index, picture in zip(same, filled, strict=True):
                results[index] = brought_back(picture, cases[index])
        return results
