"""Settings of training and evaluation, in a module that imports no torch, so that flows read them at once."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dataset_tools.settings import Settings

Method = Literal["telea", "navier-stokes", "sdxl-inpaint", "mild"]


class LoraSettings(Settings):
    """The two low-rank adapters ``fg`` and ``bg`` on the UNet's attention (section 3.2)."""

    rank: int = Field(16, ge=1)
    """Rank of both adapters."""
    alpha: int = Field(16, ge=1)
    """Scaling numerator: an adapter adds ``alpha / rank * B A`` to a weight."""
    target_modules: tuple[str, ...] = Field(("to_q", "to_k", "to_v"), min_length=1)
    """Linear layers of self- and cross-attention (``attn1``, ``attn2``) that get an adapter."""


class WarmUpSettings(Settings):
    """The schedule lambda_s of the foreground losses (eq. 5), over the training step s counted from 0."""

    start: int = Field(8000, ge=0)
    """s_0: before this step the foreground weighs nothing and its adapter is not trained."""
    end: int = Field(12000, ge=0)
    """s_1: from this step on the weight is ``weight``; the paper leaves it open."""
    weight: float = Field(1.0, ge=0)
    """lambda: final weight of the foreground losses."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.end < self.start:
            raise ValueError(f"end ({self.end}) must not lie before start ({self.start})")
        return self


class TrainSettings(Settings):
    """How layered LoRA is trained."""

    steps: int = Field(20000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(4, ge=1)
    """Samples a step; each gives one background and, once lambda_s > 0, one foreground example."""
    learning_rate: float = Field(1e-6, gt=0)
    """AdamW's, constant, for both adapters."""
    seed: int = Field(0, ge=0)
    """Decides the initial adapters, the order of samples, and noise, time step and person of each example."""
    resolution: int = Field(512, ge=8)
    """Side of the square crop that is trained on, in pixels."""
    prompt: str = ""
    """Text for both branches."""
    lora: LoraSettings = LoraSettings()
    warm_up: WarmUpSettings = WarmUpSettings()
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the forward pass; adapters and optimizer stay in float32."""
    log_every: int = Field(10, ge=1)
    """Steps between two calls of the progress callback; the loss of every step is in ``loss.csv`` anyway."""


class EvaluateSettings(Settings):
    """What is compared, on how many samples, and how the diffusion methods are run."""

    methods: tuple[Method, ...] = Field(("telea", "navier-stokes", "sdxl-inpaint", "mild"), min_length=1)
    """``telea`` and ``navier-stokes``: OpenCV; ``sdxl-inpaint``: the base as it is; ``mild``: with the bg adapter."""
    samples: int = Field(100, ge=1)
    """How many samples are drawn from the split; all of them where it holds fewer."""
    masks: Literal["exact", "augmented"] = "exact"
    """``augmented``: faulty masks (too narrow, shifted, limbs missing), as annotators and networks make them."""
    inference_steps: int = Field(25, ge=2)
    """DDIM (or the base's scheduler) steps."""
    guidance_scale: float = Field(7.5, ge=1)
    """Classifier-free guidance of ``sdxl-inpaint``. MILD is trained on one prompt and runs without guidance."""
    prompt: str = ""
    """Text for the diffusion methods."""
    resolution: int = Field(512, ge=8)
    """Shorter side at which the diffusion methods work, in pixels; their result is brought back to the image's size."""
    seed: int = Field(0, ge=0)
    """Decides which samples are drawn, the noise of each, and the bootstrap."""
    resamples: int = Field(2000, ge=100)
    """Bootstrap resamples behind each 95 % interval."""

    @model_validator(mode="after")
    def _no_method_twice(self) -> Self:
        if len(set(self.methods)) != len(self.methods):
            raise ValueError("methods names one method twice")
        return self
