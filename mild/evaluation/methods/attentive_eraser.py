"""Erasing with Attentive Eraser (Sun et al., AAAI 2025): an SDXL base whose attention is turned away from the hole.

It has no weights of its own. Every self-attention of the UNet's decoder is redirected (Attention Activation and
Suppression, AAS): no query attends to a key in the hole, and for the first steps the similarities of queries in the
hole are made smaller, so that they look at all of the background rather than at what resembles the object
(similarity suppression). What is predicted so is taken further away from what is predicted without (Self-Attention
Redirection Guidance, SARG), in the place of classifier-free guidance.

Follows, in code of its own, ``pipeline_stable_diffusion_xl_attentive_eraser.py`` of
https://github.com/huggingface/diffusers/tree/main/examples/community (Apache-2.0), which its authors wrote; also
https://github.com/Anonym0u3/AttentiveEraser (Apache-2.0).
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from PIL import Image
from pydantic import Field

from dataset_tools.errors import UserError
from dataset_tools.settings import digest_of
from mild.bases import digest_of_place
from mild.evaluation.methods import MethodSettings, Setup
from mild.evaluation.methods.sdxl import SDXLEraser, no_steps_left, pipeline_folder, precision

if TYPE_CHECKING:
    import torch

BLUR = 77 / 1024
"""Width of the Gaussian that the mask is widened with, as a share of the picture's shorter side."""
LEAST = 0.1
"""Of the blurred mask, where the widened one ends."""


class AttentiveEraserMethod(MethodSettings):
    """Attentive Eraser on an inpainting base (9 channels), or as published on SDXL's text-to-image base (4 channels).

    Which it is, is seen from the base: an inpainting base is shown mask and masked picture as always; with one that
    knows no mask, what is outside is put back noised after each step.
    """

    kind: Literal["attentive-eraser"] = "attentive-eraser"
    base: str = ""
    """Folder or hub id, as published ``stabilityai/stable-diffusion-xl-base-1.0``; empty: the base of the
    evaluation."""
    inference_steps: int = Field(50, ge=1, le=1000)
    """DDIM steps, of which ``strength`` are made."""
    strength: float = Field(0.8, gt=0, le=1)
    """How much of the schedule is run: below 1 it begins from the noised picture."""
    guidance_scale: float = Field(9, gt=1)
    """Of SARG."""
    suppression_steps: int = Field(9, ge=0)
    """The last step, counted from 0, in which similarities are suppressed."""
    suppression_scale: float = Field(0.3, ge=0, le=1)
    """What similarities of queries in the hole are multiplied with."""
    prompt: str = ""
    """Empty as published, whatever the holes show for other methods."""
    resolution: int = Field(1024, ge=8)
    """Shorter side at which it works, in pixels."""

    @property
    def title(self) -> str:
        """See `MethodSettings.title`."""
        return "Attentive Eraser" + (f" ({self.name})" if self.name != self.kind else "")

    def folder(self, setup: Setup) -> Path:
        """Where the base is. Raises `UserError` where it is not here."""
        return pipeline_folder(self.base or setup.base)

    def missing(self, setup: Setup) -> str | None:
        """See `MethodSettings.missing`."""
        try:
            self.folder(setup)
        except UserError as error:
            return str(error)
        return no_steps_left(self.inference_steps, self.strength)

    def weights(self, setup: Setup) -> dict[str, str]:
        """See `MethodSettings.weights`; says which kind of base it is."""
        folder = self.folder(setup)
        try:
            channels = json.loads((folder / "unet" / "config.json").read_text())["in_channels"]
        except (OSError, ValueError, KeyError):
            raise UserError(
                f"base {folder} is no diffusers pipeline folder: no unet/config.json says in_channels"
            ) from None
        return {"text-to-image base" if channels == 4 else "inpainting base": digest_of_place(str(folder))}

    def fingerprint(self, setup: Setup) -> str:
        """See `MethodSettings.fingerprint`."""
        settings = self.decisive("base")
        software = [version(package) for package in ("torch", "diffusers", "transformers", "opencv-python-headless")]
        return digest_of([1, settings, self.weights(setup), software])

    def open(self, setup: Setup) -> AttentiveEraser:
        """See `MethodSettings.open`."""
        import torch

        from mild.model.backbone import check_channels, load_sdxl

        folder = self.folder(setup)
        pipeline = load_sdxl(str(folder), **precision(folder))
        channels, latent = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
        if channels != latent:
            check_channels(channels, latent, self.base or setup.base)
        return AttentiveEraser(self, pipeline.to("cuda" if torch.cuda.is_available() else "cpu"))


class AttentiveEraser(SDXLEraser):
    """The pipeline, in memory, its decoder's self-attention redirected.

    SARG is the stock pipeline's classifier-free guidance between two equal prompts, of which the UNet sees the second
    with redirected attention: ``without + scale * (redirected - without)``.
    """

    def __init__(self, settings: AttentiveEraserMethod, pipeline: Any) -> None:
        from diffusers import DDIMScheduler

        # The published DDIM, with the noise levels and kind of prediction that the base was trained for.
        own = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 0, "timestep_spacing": "leading"}
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **own)
        self.redirection = Redirection(settings.suppression_steps, settings.suppression_scale)
        redirect(pipeline.unet, self.redirection)
        super().__init__(
            pipeline,
            settings.resolution,
            settings.prompt,
            num_inference_steps=settings.inference_steps,
            strength=settings.strength,
            guidance_scale=settings.guidance_scale,
            callback_on_step_end=self.redirection.count,
        )

    def paint(
        self, images: list[Image.Image], holes: list[Image.Image], generators: list[torch.Generator]
    ) -> list[Image.Image]:
        """See `mild.evaluation.methods.sdxl.PipelineEraser.paint`; the mask is widened first."""
        import torch

        cell = self.pipeline.vae_scale_factor
        masks = np.stack([widened(np.asarray(hole) > 0, cell) for hole in holes])
        levels = len(self.pipeline.unet.config.block_out_channels)
        self.redirection.begin(torch.from_numpy(masks[:, None, ::cell, ::cell]).to(self.pipeline.device), levels)
        # Given, and not left out: the pipeline takes zeros for a negative prompt that nobody gives.
        self._options["negative_prompt"] = [self._prompt] * len(images)
        return super().paint(images, [Image.fromarray(mask.astype(np.uint8) * 255) for mask in masks], generators)


def widened(hole: np.ndarray, cell: int) -> np.ndarray:
    """A hole (H, W) bool grown by a Gaussian as published, and then to whole cells of the latent.

    The published pipeline takes the largest value of each cell; the stock one, which gets this mask, one of them.
    """
    width = 2 * int(BLUR * min(hole.shape) / 2) + 1
    grown = cv2.GaussianBlur(hole.astype(np.float32), (width, width), 0) >= LEAST
    height, width = grown.shape
    cells = grown.reshape(height // cell, cell, width // cell, cell).any((1, 3))
    return cells.repeat(cell, 0).repeat(cell, 1)


class Redirection:
    """What the redirected layers share: the holes of the pictures in work, and the step.

    Args:
        steps: the last one, counted from 0, with similarity suppression.
        scale: what similarities of queries in the hole are multiplied with until then.
    """

    def __init__(self, steps: int, scale: float) -> None:
        self._steps, self._scale = steps, scale
        self._step = 0
        self._tokens: dict[int, torch.Tensor] = {}

    def begin(self, masks: torch.Tensor, levels: int) -> None:
        """Before the first step: masks (B, 1, h, w) bool at the latent's size, for a UNet of so many resolutions."""
        import torch.nn.functional as F

        self._step, self._tokens = 0, {}
        level = masks.float()
        for _ in range(levels):
            self._tokens[level[0].numel()] = level.flatten(1)
            level = F.max_pool2d(level, 2, ceil_mode=True)

    def count(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """After each step; the pipeline's ``callback_on_step_end``."""
        self._step = step + 1
        return tensors

    def holes(self, tokens: int) -> torch.Tensor:
        """(B, tokens) float32: 1 for tokens of the hole, where a layer has so many."""
        return self._tokens[tokens]

    @property
    def scale(self) -> float:
        """What similarities of queries in the hole are multiplied with in this step."""
        return self._scale if self._step <= self._steps else 1.0


class RedirectedAttention:
    """Processor of one self-attention: the batch's first half as ever, the second redirected.

    With similarities s = q k / sqrt(d), softmax runs over keys outside the hole alone, on ``scale * s`` for queries
    in the hole and on ``s`` for the others. Where everything is hole, all keys count alike, as published.
    """

    def __init__(self, redirection: Redirection) -> None:
        self._redirection = redirection

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within ``hidden_states`` (2 B, N, C)."""
        import torch
        import torch.nn.functional as F

        query, key, value = (
            layer(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        holes = self._redirection.holes(hidden_states.shape[1]).to(query.dtype)
        holes = torch.cat([torch.zeros_like(holes), holes])
        factor = 1 + (self._redirection.scale - 1) * holes
        # No infinity: softmax over nothing but infinities would be no number.
        forbidden = holes * torch.finfo(query.dtype).min
        output = F.scaled_dot_product_attention(
            query * factor[:, None, :, None], key, value, attn_mask=forbidden[:, None, None, :]
        )
        attended: torch.Tensor = attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2)))
        return attended


def redirect(unet: Any, redirection: Redirection) -> None:
    """Redirect every self-attention of a UNet's decoder: of SDXL's 70 the published ones, 34 to 69."""
    for name, module in unet.up_blocks.named_modules():
        if name.endswith(".attn1"):
            module.set_processor(RedirectedAttention(redirection))
