"""Erasing with RORem (Li et al., CVPR 2025): the stock SDXL inpainting pipeline with a UNet trained to remove.

Source: https://github.com/leeruibin/RORem, ``inference_RORem.py`` and ``inference_RORem_4S.py``.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from PIL import Image
from pydantic import Field

from dataset_tools.errors import UserError
from dataset_tools.settings import digest_of
from dataset_tools.weights import Weights, find_weights
from mild.bases import digest_of_place
from mild.evaluation.methods import MethodSettings, Setup
from mild.evaluation.methods.sdxl import SDXLEraser, no_steps_left, pipeline_folder, precision

if TYPE_CHECKING:
    import torch

PIPELINE = "LetsThink/RORem"
"""Hub id of the whole pipeline."""
STRENGTH = 0.99
"""As its authors run it: the noisiest step is left out, of 50 as of 4."""
STEPS = 50
LCM_STEPS = 4
_UNET = ("config.json", "*.safetensors")
_LORA = ("pytorch_lora_weights.safetensors",)


class RORemMethod(MethodSettings):
    """RORem without classifier-free guidance, and with its LCM LoRA in 4 steps.

    Its authors work on squares; here the sides keep their proportion, as with all methods.
    """

    kind: Literal["rorem"] = "rorem"
    base: str = ""
    """Folder or hub id of a whole pipeline; empty: RORem's own, or with ``unet`` the base of the evaluation."""
    unet: str = ""
    """Folder of the UNet alone, as its authors publish it too (RORem, RORem-mixed); empty: the pipeline's."""
    lcm_lora: str = ""
    """Folder or file (``pytorch_lora_weights.safetensors``) of RORem-LCM, published on its authors' page alone; with it
    the steps are those of `LCMScheduler`."""
    inference_steps: int | None = Field(None, ge=1, le=1000)
    """null: as its authors, 50, or 4 with ``lcm_lora``. The strength of 0.99 leaves out the first one."""
    prompt: str = ""
    """Empty as in the paper, whatever the holes show for other methods."""
    dilation: int = Field(20, ge=0)
    """Side of the square that the mask is dilated by before the network sees it, in pixels at the working size; 0:
    not. What it paints beyond the mask is not kept."""
    resolution: int = Field(512, ge=8)
    """Shorter side at which it works, in pixels."""

    @property
    def title(self) -> str:
        """See `MethodSettings.title`."""
        title = f"RORem, {self.steps} LCM steps" if self.lcm_lora else "RORem"
        return title + (f" ({self.name})" if self.name != self.kind else "")

    @property
    def steps(self) -> int:
        """Steps of the scheduler."""
        return self.inference_steps or (LCM_STEPS if self.lcm_lora else STEPS)

    def folder(self, setup: Setup) -> Path:
        """Where the pipeline is. Raises `UserError` where it is not here."""
        return pipeline_folder(self.base or (setup.base if self.unet else PIPELINE))

    def missing(self, setup: Setup) -> str | None:
        """See `MethodSettings.missing`."""
        try:
            self.folder(setup)
            self._parts()
        except UserError as error:
            return str(error)
        return no_steps_left(self.steps, STRENGTH)

    def weights(self, setup: Setup) -> dict[str, str]:
        """See `MethodSettings.weights`."""
        parts = {name: weights.sha256 for name, weights in self._parts().items()}
        return {"base": digest_of_place(str(self.folder(setup)))} | parts

    def fingerprint(self, setup: Setup) -> str:
        """See `MethodSettings.fingerprint`."""
        places = {"base", "unet", "lcm_lora", "inference_steps"}
        settings = self.decisive(*places)
        software = [version(package) for package in ("torch", "diffusers", "peft", "transformers")]
        return digest_of([1, settings, self.steps, self.weights(setup), software])

    def open(self, setup: Setup) -> RORemEraser:
        """See `MethodSettings.open`."""
        import torch

        from mild.model.backbone import check_channels, load_base

        folder, parts = self.folder(setup), self._parts()
        pipeline = load_base(str(folder), **precision(folder))
        if "unet" in parts:
            pipeline.unet = _load_unet(parts["unet"])
            check_channels(pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels, self.unet)
        if "lcm_lora" in parts:
            _fuse_lora(pipeline, parts["lcm_lora"])
        return RORemEraser(self, pipeline.to("cuda" if torch.cuda.is_available() else "cpu"))

    def _parts(self) -> dict[str, Weights]:
        """What stands beside the pipeline. Raises `UserError` where it is named and not here."""
        patterns = {"unet": _UNET, "lcm_lora": _LORA}
        return {
            part: find_weights(named, files=patterns[part], download=False)
            for part, named in (("unet", self.unet), ("lcm_lora", self.lcm_lora))
            if named
        }


class RORemEraser(SDXLEraser):
    """The pipeline, in memory."""

    def __init__(self, settings: RORemMethod, pipeline: Any) -> None:
        options = {"num_inference_steps": settings.steps, "strength": STRENGTH, "guidance_scale": 1.0}
        super().__init__(pipeline, settings.resolution, settings.prompt, **options)
        self._dilation = settings.dilation

    def paint(
        self, images: list[Image.Image], holes: list[Image.Image], generators: list[torch.Generator]
    ) -> list[Image.Image]:
        """See `mild.evaluation.methods.sdxl.PipelineEraser.paint`; the mask is dilated first."""
        if self._dilation:
            square = np.ones((self._dilation, self._dilation), np.uint8)
            holes = [Image.fromarray(cv2.dilate(np.asarray(hole), square)) for hole in holes]
        return super().paint(images, holes, generators)


def _load_unet(weights: Weights) -> Any:
    """A UNet with every weight of its folder: ``from_pretrained`` only logs what a file lacks or has too much."""
    from diffusers import UNet2DConditionModel

    try:
        unet, told = UNet2DConditionModel.from_pretrained(
            weights.folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"unet {weights.name} cannot be loaded: {' '.join(str(error).split())}") from None
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if keys := sorted(str(key) for key in told[kind]):
            raise UserError(f"unet {weights.name}: {len(keys)} {kind.replace('_', ' ')}, such as {keys[0]}")
    return unet


def _fuse_lora(pipeline: Any, weights: Weights) -> None:
    """Put the scheduler and the LoRA of the few steps in.

    ``pipeline.load_lora_weights`` only logs what fits nowhere. Of a file as RORem's training writes it that would be
    all of the attention: its names are of two kinds, and diffusers looks at the first one to see which they are of.
    """
    from diffusers import LCMScheduler
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft.utils import get_peft_model_state_dict

    path, unet = next(iter(weights.files.values())), pipeline.unet
    try:
        given, alphas, metadata = pipeline.lora_state_dict(
            str(path.parent),
            weight_name=path.name,
            unet_config=unet.config,
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
        )
        given = convert_unet_state_dict_to_peft(given)
        unet.load_lora_adapter(given, prefix="unet", network_alphas=alphas, metadata=metadata, adapter_name="lcm")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"lcm_lora {weights.name} cannot be loaded: {' '.join(str(error).split())}") from None
    loaded = hasattr(unet, "peft_config")
    taken = get_peft_model_state_dict(unet, adapter_name="lcm") if loaded else {}
    if len(taken) != len(given):
        raise UserError(f"lcm_lora {weights.name}: {len(taken)} of its {len(given)} weights fit the UNet of the base")
    unet.fuse_lora(adapter_names=["lcm"])
    unet.unload_lora()
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
