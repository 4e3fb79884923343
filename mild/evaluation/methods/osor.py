"""Erasing with OSOR (Zhou et al., ECCV 2026) on SDXL inpainting: one step, and an alpha of what it may change.

Source: https://github.com/Zhouqm-Git/osor (MIT), ``osor-sdxlinpainting``: ``scripts/inference_enhance.py`` (phase 2)
and ``scripts/inference.py`` (phase 1).
"""

from __future__ import annotations

import pickle
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from dataset_tools.errors import UserError
from dataset_tools.settings import digest_of
from dataset_tools.weights import Weights, find_weights
from mild.bases import digest_of_place
from mild.evaluation.methods import MethodSettings, Setup
from mild.evaluation.methods.sdxl import PipelineEraser, pipeline_folder, precision

if TYPE_CHECKING:
    import torch

PROMPT = "Remove the instance of object"
"""Of all of its training."""
LAYERS = (
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "conv",
    "conv1",
    "conv2",
    "conv_shortcut",
    "proj_in",
    "proj_out",
    "ff.net.2",
    "ff.net.0.proj",
)
"""Names of the UNet's layers that have LoRA; the last one, ``conv_out``, is trained as a whole."""
TIMESTEPS = {False: 600, True: 400}
"""Noise level that each phase was trained at (``model_t``), the second with alpha."""


class OSORMethod(MethodSettings):
    """OSOR's LoRA in an SDXL inpainting base. What it changes outside the hole, such as shadows, is not kept here."""

    kind: Literal["osor"] = "osor"
    base: str = ""
    """Folder or hub id of the SDXL inpainting base; empty: the base of the evaluation."""
    checkpoint: str = "osor-sdxl-phase2"
    """Name of `dataset_tools.networks` (``osor-sdxl-phase1``, ``osor-sdxl-phase2``) or a file. A file whose
    ``conv_out`` has a channel more than the base predicts alpha, as phase 2; without, the hole is blended hard."""
    sha256: str | None = Field(None, pattern="[0-9a-f]{64}")
    """Digest (hex) of a file of one's own."""
    timestep: int | None = Field(None, ge=0, lt=1000)
    """Noise level of the one step; null: that of its training, 600 without alpha and 400 with it."""
    resolution: int = Field(512, ge=16)
    """Shorter side at which it works, in pixels."""

    @property
    def title(self) -> str:
        """See `MethodSettings.title`."""
        return "OSOR (SDXL)" + (f" ({self.name})" if self.name != self.kind else "")

    def missing(self, setup: Setup) -> str | None:
        """See `MethodSettings.missing`."""
        try:
            pipeline_folder(self.base or setup.base)
            self._checkpoint()
        except UserError as error:
            return str(error)
        return None

    def weights(self, setup: Setup) -> dict[str, str]:
        """See `MethodSettings.weights`."""
        base = digest_of_place(str(pipeline_folder(self.base or setup.base)))
        return {"base": base, "checkpoint": self._checkpoint().sha256}

    def fingerprint(self, setup: Setup) -> str:
        """See `MethodSettings.fingerprint`."""
        settings = self.decisive("base", "checkpoint", "sha256")
        software = [version(package) for package in ("torch", "diffusers", "peft", "transformers")]
        return digest_of([1, settings, self.weights(setup), software])

    def open(self, setup: Setup) -> OSOREraser:
        """See `MethodSettings.open`."""
        import torch

        from mild.model.backbone import load_base

        folder, checkpoint = pipeline_folder(self.base or setup.base), self._checkpoint()
        pipeline = load_base(str(folder), **precision(folder))
        (path,) = checkpoint.files.values()
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            raise UserError(f"checkpoint {self.checkpoint} is damaged, or holds more than tensors") from None
        install(pipeline.unet, tensors, self.checkpoint)
        return OSOREraser(self, pipeline.to("cuda" if torch.cuda.is_available() else "cpu"))

    def _checkpoint(self) -> Weights:
        """The file. Raises `UserError` where it is not here, or is a pickle that nobody trusts."""
        return find_weights(self.checkpoint, files=("*.pth",), sha256=self.sha256, download=False)


class OSOREraser(PipelineEraser):
    """The pipeline's parts, in memory."""

    multiple = 16

    def __init__(self, settings: OSORMethod, pipeline: Any) -> None:
        import torch
        from diffusers import DDPMScheduler

        super().__init__(pipeline, settings.resolution)
        self._scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, thresholding=False)
        self._alpha = pipeline.unet.conv_out.out_channels > pipeline.vae.config.latent_channels
        self._timestep = TIMESTEPS[self._alpha] if settings.timestep is None else settings.timestep
        with torch.inference_mode():
            self._prompt, _, self._pooled, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)

    def paint(
        self, images: list[Image.Image], holes: list[Image.Image], generators: list[torch.Generator]
    ) -> list[Image.Image]:
        """See `mild.evaluation.methods.sdxl.PipelineEraser.paint`."""
        import torch
        import torch.nn.functional as F
        from diffusers.utils.torch_utils import randn_tensor

        pipeline, count, (width, height) = self.pipeline, len(images), images[0].size
        vae, device = pipeline.vae, pipeline.device
        with torch.inference_mode():
            pictures = pipeline.image_processor.preprocess(images).to(device)
            masks = torch.from_numpy(np.stack([np.asarray(hole) > 0 for hole in holes])[:, None]).float().to(device)
            masks = F.max_pool2d(masks, pipeline.vae_scale_factor)
            posterior = vae.encode(pictures).latent_dist
            drawn = randn_tensor(posterior.mean.shape, generator=generators, device=device)
            latents = (posterior.mean + posterior.std * drawn) * vae.config.scaling_factor
            noise = randn_tensor(latents.shape, generator=generators, device=device)
            timesteps = torch.full((count,), self._timestep, device=device)
            noisy = self._scheduler.add_noise(latents, noise, timesteps)
            # Unlike the base it is shown the whole picture, and not with the hole cut out.
            predicted = pipeline.unet(
                torch.cat([noisy, masks, latents], dim=1),
                timesteps,
                encoder_hidden_states=self._prompt.expand(count, -1, -1),
                added_cond_kwargs={
                    "text_embeds": self._pooled.expand(count, -1),
                    "time_ids": latents.new_tensor([[height, width, 0, 0, height, width]]).expand(count, -1),
                },
            ).sample
            channels = latents.shape[1]
            alpha = predicted[:, channels:].sigmoid() if self._alpha else masks
            step = self._scheduler.step(predicted[:, :channels], self._timestep, noisy, generator=generators)
            blended = step.pred_original_sample * alpha + latents * (1 - alpha)
            decoded = vae.decode(blended / vae.config.scaling_factor).sample
            filled: list[Image.Image] = pipeline.image_processor.postprocess(decoded, output_type="pil")
        return filled


def install(unet: Any, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Give a UNet OSOR's LoRA and its last layer; the LoRA's rank, and whether there is alpha, are seen from the file.

    Args:
        unet: of the base, changed in place.
        tensors: of a checkpoint, by their names in the generator: ``unet.conv_out.weight``,
            ``unet.mid_block.resnets.0.conv1.lora_A.default.weight`` and so on.
        name: of the checkpoint, for errors.

    Raises:
        UserError: it does not fit the UNet; names the first key that does not.
    """
    import torch
    from peft import LoraConfig

    # What wrappers of its training put before names.
    tensors = {key.replace("module.", "").replace("_orig_mod.", ""): tensor for key, tensor in tensors.items()}
    rank = next((tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key), None)
    last = tensors.get("unet.conv_out.weight")
    if rank is None or last is None:
        raise UserError(f"checkpoint {name} is none of OSOR's: it has no LoRA, or no unet.conv_out.weight")
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS)))
    if last.shape[0] == unet.conv_out.out_channels + 1:
        old = unet.conv_out
        unet.conv_out = torch.nn.Conv2d(
            old.in_channels, old.out_channels + 1, old.kernel_size, old.stride, old.padding, dtype=old.weight.dtype
        )
    wanted = {
        f"unet.{key}": parameter
        for key, parameter in unet.named_parameters()
        if ".lora_" in key or key.startswith("conv_out.")
    }
    for key, tensor in tensors.items():
        if key not in wanted:
            raise UserError(f"checkpoint {name} does not fit the base: its UNet has no {key}")
        if tensor.shape != wanted[key].shape:
            shapes = f"{tuple(tensor.shape)}, and not {tuple(wanted[key].shape)}"
            raise UserError(f"checkpoint {name} does not fit the base: {key} is of shape {shapes}")
    for key, parameter in wanted.items():
        if key not in tensors:
            raise UserError(f"checkpoint {name} does not fit the base: it has no {key}")
        parameter.data.copy_(tensors[key])
    unet.requires_grad_(False)
