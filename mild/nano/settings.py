"""Settings of training the nano base, in a module that imports no torch, so that its flow reads them at once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from dataset_tools.settings import Settings
from mild.nano.pictures import DrawingSettings

MARK = "loss-unet.csv"
"""A file that every base has that was trained here, and no other pipeline's folder."""
OWN = (
    r"README\.md|model_index\.json|scheduler|text_encoder(_2)?|tokenizer(_2)?|unet|vae"
    r"|fills\.png|loss-(unet|vae)\.(csv|svg)"
)
"""What is in the folder of a base."""


class LoopSettings(Settings):
    """How long and how fast one network is trained."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int = Field(16, ge=1)
    """Examples a step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of AdamW, at its highest."""
    warm_up: int = Field(200, ge=0)
    """Steps over which the learning rate rises from zero."""
    decay: float = Field(0.3, ge=0, le=1)
    """Share of the steps, the last ones, over which the learning rate falls to zero."""
    average: float = Field(0.998, ge=0, lt=1)
    """Decay of the moving average of the weights; the average is what is kept."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between two checkpoints."""

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warm_up) if self.warm_up else 1.0
        falling = self.decay * self.steps
        fall = min(1.0, (self.steps - step) / falling) if falling else 1.0
        return self.learning_rate * rise * fall


class VaeSettings(LoopSettings):
    """How the VAE is trained: mean squared error, and a little of the Kullback-Leibler divergence."""

    steps: int = Field(4000, ge=1)
    """Optimizer steps."""
    crop: int = Field(64, ge=16, multiple_of=8)
    """Side of the squares of pictures that the VAE sees, in pixels."""
    divergence: float = Field(1e-6, ge=0)
    """Weight of the divergence (mean of the latents, in nats); it keeps the latents' noise small but not zero."""


class UnetSettings(LoopSettings):
    """How the UNet and the text encoders are trained: mean squared error of the predicted latents."""

    steps: int = Field(5000, ge=1)
    """Optimizer steps."""
    holes: int = Field(2, ge=1)
    """Random holes that each picture is encoded with."""
    starts: float = Field(0.0, ge=0, le=1)
    """Share of the examples that are what erasing starts from: the picture with its hole filled smoothly
    (`mild.erasing.regions.prefilled`), noised at the noisiest time step, with which any number of steps begins. In the
    others it is the picture itself that is noised, at a time step drawn from all."""
    outside: float = Field(0.2, gt=0, le=1)
    """Weight of the error outside the hole, where the answer is given; 1 inside."""
    empty_prompt: float = Field(0.4, ge=0, le=1)
    """Share of the examples whose caption is replaced by the empty prompt."""
    no_text: float = Field(0.1, ge=0, le=1)
    """Share of the examples whose text is all zeros, which is what stock pipelines guide away from."""
    compile: bool = True
    """Whether the UNet is compiled, which takes minutes at the beginning: meant for a GPU; two cores gained nothing."""


class PretrainSettings(Settings):
    """All that determines the weights of the nano base, beside the base that it may start from."""

    seed: int = Field(0, ge=0)
    """Of the first weights, the holes, the noise and the order of the pictures."""
    drawing: DrawingSettings = DrawingSettings()
    """The pictures."""
    vae: VaeSettings = VaeSettings()
    """First stage."""
    unet: UnetSettings = UnetSettings()
    """Second stage."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision of the forward passes; weights and optimizer stay in float32. bf16 is for GPUs and for processors with
    AMX (``grep amx_bf16 /proc/cpuinfo``); on others it takes five times as long."""

    def determines(self, stage: Literal["vae", "unet"], *, own_vae: bool = True) -> dict[str, Any]:
        """The settings that decide about the weights of a stage; the others may change within a run.

        Args:
            own_vae: whether the UNet's VAE is trained by these settings too.
        """
        how = {"vae": {"checkpoint_every"}, "unet": {"checkpoint_every", "compile"}}
        left_out: dict[str, Any] = {"vae": how["vae"] if own_vae else True}
        left_out["unet"] = how["unet"] if stage == "unet" else True
        return self.model_dump(mode="json", exclude=left_out)
