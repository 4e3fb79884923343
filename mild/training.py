"""The training loop: adapters and the other parts of MILD on a frozen base, on accelerate."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionXLInpaintPipeline

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from mild.backbone import BRANCHES, Branch, adapter_parameters, load_base
from mild.batches import make_batch, make_cues
from mild.folders import folder_written_whole
from mild.layered import LayeredUNet
from mild.objective import background_loss, foreground_loss, foreground_weight, prediction_target
from mild.report.chart import loss_chart
from mild.seeds import derived_seed
from mild.settings import TrainSettings
from mild.versions import software_versions

LOSS_COLUMNS = ("step", "loss", "background", "foreground", "lambda")

Log = Callable[[int, dict[str, float]], None]
"""Called with a step, counted from 1, and values by name."""


class Samples(Protocol):
    """Samples of the ``composite`` configuration; `dataset_tools.shards.ShardDataset` is one."""

    keys: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...
    def order(self, seed: int, epoch: int) -> np.ndarray: ...


@dataclass(frozen=True)
class TrainResult:
    """What a training run left behind."""

    output: str
    """The adapter directory."""
    steps: int
    first_loss: float
    """Mean of ``loss`` over the first tenth of the steps."""
    last_loss: float
    """Mean of ``loss`` over the last tenth of the steps."""
    seconds: float


def train(
    settings: TrainSettings,
    samples: Samples,
    base: str,
    output: str,
    log: Log,
    *,
    dataset_digest: str = "unknown",
) -> TrainResult:
    """Train the adapters ``bg`` and ``fg`` with SMA, HMG and the other parts, and write a MILD directory.

    A step takes ``batch_size`` samples. The background branch sees the image with all people masked (by their
    augmented, faulty masks) and denoises the clean background's latent; the foreground branch denoises the
    image's latent for one person a sample, sees the image with the *other* people masked and is judged inside
    the person's mask. Both share t and noise, SMA and HMG; the model is given faulty masks only.
    One person stands for the sum over all N (eq. 5) and so counts
    N-fold. All randomness comes from ``settings.seed`` and the sample's key; on a CPU, equal runs with as many
    threads give equal bytes.

    The directory, which appears whole or not at all, is that of `mild.layered` with ``loss.csv`` and ``loss.svg``
    beside it.

    Args:
        samples: people on known backgrounds (configuration ``composite``).
        base: folder or hub id of an SDXL inpainting pipeline.
        output: the directory to write; an older one is replaced.
        log: called every ``log_every`` steps and after the last with loss, background, foreground and lambda.
        dataset_digest: named in the card and in ``mild.json``.

    Raises:
        UserError: the base or dataset cannot be used, or the loss is no longer finite.
    """
    _check_count(samples, settings.batch_size)
    pipeline = load_base(base)
    _check_resolution(pipeline, settings.resolution)
    started = time.monotonic()
    with folder_written_whole(output) as folder:
        layered = LayeredUNet.create(pipeline.unet, settings.mild, settings.seed)
        losses = _optimize(settings, samples, pipeline, layered, log)
        layered.save(
            folder,
            base=base,
            resolution=settings.resolution,
            record={
                "dataset": dataset_digest,
                "samples": len(samples),
                "settings": settings.model_dump(mode="json"),
                "software": software_versions(),
            },
            about=ABOUT.format(
                steps=settings.steps,
                batch_size=settings.batch_size,
                count=len(samples),
                dataset=dataset_digest,
                first=losses[0]["loss"],
                last=losses[-1]["loss"],
            ),
        )
        _write_losses(folder, losses)
    tenth = max(1, len(losses) // 10)
    total = [row["loss"] for row in losses]
    return TrainResult(
        output=output,
        steps=len(losses),
        first_loss=float(np.mean(total[:tenth])),
        last_loss=float(np.mean(total[-tenth:])),
        seconds=time.monotonic() - started,
    )


def _optimize(
    settings: TrainSettings,
    samples: Samples,
    pipeline: StableDiffusionXLInpaintPipeline,
    layered: LayeredUNet,
    log: Log,
) -> list[dict[str, float]]:
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    pipeline.to(accelerator.device)
    layered.to(accelerator.device)
    branch_loss = BranchLoss(pipeline, layered, settings)
    unet, optimizer = accelerator.prepare(pipeline.unet, torch.optim.AdamW(_parameter_groups(layered, settings)))
    unet.train()
    losses: list[dict[str, float]] = []
    for step, indices in zip(range(settings.steps), _batches(samples, settings), strict=False):
        chosen = [samples[index] for index in indices]
        weight = foreground_weight(settings.warm_up, step)
        values = {"background": 0.0, "foreground": 0.0}
        branches: list[tuple[Branch, str, float]] = [("bg", "background", 1.0)]
        if weight > 0:
            branches.append(("fg", "foreground", weight))
        for branch, name, factor in branches:
            # Each branch is differentiated before the next is run (see `LayeredUNet.branch`).
            with accelerator.autocast():
                loss = branch_loss(unet, branch, chosen, step)
            values[name] = loss.item()
            accelerator.backward(factor * loss)
        total = values["background"] + weight * values["foreground"]
        if not math.isfinite(total):
            keys = ", ".join(sample.key for sample in chosen)
            raise UserError(
                f"the loss is {total} at step {step + 1} (samples {keys}): lower learning_rate, or mend them"
            )
        optimizer.step()
        layered.project_()
        optimizer.zero_grad()
        losses.append({"loss": total, **values, "lambda": weight})
        if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
            log(step + 1, losses[-1])
    return losses


def _parameter_groups(layered: LayeredUNet, settings: TrainSettings) -> list[dict[str, Any]]:
    """What the optimizer trains, each with its learning rate."""
    rates = {"sma": settings.sma_learning_rate}
    adapters = [p for branch in BRANCHES for p in adapter_parameters(layered.unet, branch).values()]
    return [
        {"params": adapters, "lr": settings.learning_rate},
        *(
            {"params": list(part.parameters()), "lr": rates.get(name, settings.guidance_learning_rate)}
            for name, part in layered.parts().items()
        ),
    ]


class BranchLoss:
    """The mean loss of a batch under one branch: encodes the pictures, adds noise, asks the UNet."""

    def __init__(
        self, pipeline: StableDiffusionXLInpaintPipeline, layered: LayeredUNet, settings: TrainSettings
    ) -> None:
        self.layered = layered
        self.vae = pipeline.vae
        self.device = pipeline.device
        self.seed = settings.seed
        self.resolution = settings.resolution
        # Samplers such as Euler's noise otherwise; their configuration says what the UNet was trained with.
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        with torch.no_grad():
            self.text, _, self.pooled_text, _ = pipeline.encode_prompt(
                settings.prompt, device=self.device, do_classifier_free_guidance=False
            )
        side = settings.resolution
        self.size_and_crop = torch.tensor([[side, side, 0, 0, side, side]], dtype=self.text.dtype, device=self.device)

    def __call__(self, unet: torch.nn.Module, branch: Branch, samples: list[Sample], step: int) -> torch.Tensor:
        """The mean of ``weight * loss`` over the batch, a scalar that carries gradients of adapters and parts."""
        # One generator a sample and step, the same for both branches: person, time step, noise and which cues are
        # withheld, in this order.
        draws = [np.random.default_rng(derived_seed(self.seed, step, sample.key)) for sample in samples]
        chosen = [int(draw.integers(len(sample.people))) for draw, sample in zip(draws, samples, strict=True)]
        batch = make_batch(branch, samples, chosen, self.resolution)
        latents = self.encode(batch.picture)
        hole = batch.hole.to(self.device)
        seen = self.encode(batch.image.to(self.device) * (hole < 0.5))
        last = self.scheduler.config.num_train_timesteps
        timesteps = torch.tensor([int(draw.integers(last)) for draw in draws], device=self.device)
        noise = torch.stack(
            [torch.from_numpy(draw.standard_normal(tuple(latents.shape[1:]), np.float32)) for draw in draws]
        ).to(latents)
        grid = latents.shape[-2:]
        # As the pipeline does it: the mask channel is taken at the nearest pixel.
        hole = torch.nn.functional.interpolate(hole, size=grid).to(latents)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        count = len(samples)
        hmg = self.layered.settings.hmg
        withheld = [] if hmg is None else [draw.random(3) < hmg.dropout for draw in draws]
        cues: dict[str, Any] = {} if hmg is None else make_cues(branch, samples, chosen, withheld, hmg)
        with self.layered.branch(branch, batch.given_mask, **cues):
            prediction = unet(
                torch.cat([noisy, hole, seen], dim=1),
                timesteps,
                encoder_hidden_states=self.layered.text(self.text.expand(count, -1, -1)),
                added_cond_kwargs={
                    "text_embeds": self.pooled_text.expand(count, -1),
                    "time_ids": self.size_and_crop.expand(count, -1),
                },
            ).sample
        target = prediction_target(self.scheduler, latents, noise, timesteps)
        if branch == "bg":
            losses = background_loss(prediction, target)
        else:
            mask = torch.nn.functional.interpolate(batch.target_mask, size=grid, mode="area")
            losses = foreground_loss(prediction, target, mask.to(latents))
        return (batch.weight.to(losses) * losses).mean()

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) of pictures (B, 3, H, W) in -1..1: the mode of the VAE's posterior, scaled."""
        with torch.no_grad():
            posterior = self.vae.encode(pictures.to(self.device, self.vae.dtype)).latent_dist
        latents: torch.Tensor = posterior.mode().float() * self.vae.config.scaling_factor
        return latents


def _batches(samples: Samples, settings: TrainSettings) -> Iterator[list[int]]:
    """Indices of each step's samples, for ever: whole batches of one epoch's order, then the next epoch's."""
    epoch = 0
    while True:
        order = [int(index) for index in samples.order(settings.seed, epoch)]
        for start in range(0, len(order) - settings.batch_size + 1, settings.batch_size):
            yield order[start : start + settings.batch_size]
        epoch += 1


def _check_count(samples: Samples, batch_size: int) -> None:
    if len(samples) == 0:
        raise UserError("the training split holds no sample: build the dataset with composite samples")
    if len(samples) < batch_size:
        raise UserError(f"the training split holds {len(samples)} samples, fewer than batch_size ({batch_size})")


def _check_resolution(pipeline: StableDiffusionXLInpaintPipeline, resolution: int) -> None:
    step = pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    if resolution % step:
        raise UserError(f"resolution: {resolution} must be a multiple of {step} for this base")


def _write_losses(folder: Path, losses: list[dict[str, float]]) -> None:
    with (folder / "loss.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, LOSS_COLUMNS, lineterminator="\n")
        rows.writeheader()
        rows.writerows({"step": step, **values} for step, values in enumerate(losses, start=1))
    (folder / "loss.svg").write_text(loss_chart(losses), encoding="utf-8")


ABOUT = """\
- Training: {steps} steps of {batch_size} samples; loss {first:.4g} at the first step, {last:.4g} at the last
  (`loss.csv`, `loss.svg`)
- Data: {count} composite samples, digest `{dataset}`
"""
