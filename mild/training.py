"""The training loop: adapters and the other parts of MILD on a frozen base, on accelerate."""

from __future__ import annotations

import contextlib
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
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from dataset_tools.settings import digest_of
from mild.backbone import BRANCHES, Branch, adapter_parameters, load_base
from mild.batches import draw_view, make_batch, make_cues
from mild.checkpoints import Checkpoint, Checkpoints
from mild.folders import clear_leftovers, folder_written_whole
from mild.layered import LayeredUNet
from mild.objective import background_loss, foreground_loss, freeze, known_cells, prediction_target, stage_at
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


class Preempted(Exception):
    """The run was asked to end; a checkpoint holds what was done, and starting again goes on from there."""

    def __init__(self, step: int) -> None:
        super().__init__(f"asked to end after step {step}: start again to go on from there")
        self.step = step


@dataclass(frozen=True)
class TrainResult:
    """What a training run left behind."""

    output: str
    """The adapter directory."""
    steps: int
    resumed_at: int
    """Steps that an earlier, interrupted run had done; 0 where there was none."""
    first_loss: float
    """Mean of ``loss`` over the first tenth of the steps."""
    last_loss: float
    """Mean of ``loss`` over the last tenth of the steps."""
    seconds: float
    """Without those of the interrupted run."""


def train(
    settings: TrainSettings,
    samples: Samples,
    base: str,
    output: str,
    log: Log,
    *,
    dataset_digest: str = "unknown",
    base_digest: str = "",
    checkpoints: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train the adapters ``bg`` and ``fg`` with SMA, HMG and the other parts, and write a MILD directory.

    A step takes ``batch_size`` samples. The background branch sees the image with all people masked (by their
    augmented, faulty masks) and denoises the clean background's latent; the foreground branch denoises the
    image's latent for one person a sample, sees the image with the *other* people masked and is judged inside
    the person's mask. Both share t and noise, SMA and HMG; the model is given faulty masks only.
    One person stands for the sum over all N (eq. 5) and so counts
    N-fold. All randomness comes from ``settings.seed``, the step and the sample's key; on a CPU, equal runs with as
    many threads give equal bytes.

    The directory, which appears whole or not at all, is that of `mild.layered` with ``loss.csv`` and ``loss.svg``
    beside it.

    **Resuming.** Every ``checkpoint_every`` steps the run is saved (`mild.checkpoints`). A run that was cut short,
    in whatever way, and is started again goes on from the newest checkpoint, and on a CPU ends with the bytes of one
    that was not. It refuses checkpoints of a run with other settings, data or base; those of
    `mild.settings.HOW_NOT_WHAT`, the number of processes and where things lie may change. When the run is complete
    its checkpoints are removed.

    **Several processes** (``torchrun``, ``accelerate launch``) share each step's samples; each calls this function with
    equal arguments and sees the same folders. They average gradients by themselves, in one piece, not by wrapping the
    UNet for that: SMA, HMG, offsets and prefix are no part of it, and which parameters get a gradient changes with
    branch and step.

    Args:
        samples: people on known backgrounds (configuration ``composite``).
        base: folder or hub id of an SDXL inpainting pipeline.
        output: the directory to write; an older one is replaced.
        log: called every ``log_every`` steps and after the last with what was measured: the columns of ``loss.csv``,
            and of this step alone the norm of all gradients, the adapters' learning rate and samples a second. Called
            by the first process only.
        dataset_digest: named in the card and in ``mild.json``.
        base_digest: of the base's files, where known: the run may then be resumed with the base in another place.
        checkpoints: folder for them; by default ``{output}.work/checkpoints``.
        stop: asked after every step; once it says yes the run is saved and ends with `Preempted`.

    Raises:
        UserError: the base or dataset cannot be used, the checkpoints are of another run or cannot be written, or loss
            or gradients are no longer finite (the last good checkpoint stays).
        Preempted: ``stop`` said so.
    """
    _check_count(samples, settings.batch_size)
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    _check_processes(accelerator, settings)
    pipeline = load_base(base)
    _check_resolution(pipeline, settings.resolution)
    started = time.monotonic()
    identity = {
        "settings": settings.determines(),
        "dataset": dataset_digest,
        "keys of samples": digest_of(list(samples.keys)),
        "base": base_digest or base,
    }
    kept = Checkpoints(checkpoints or f"{output.rstrip('/')}.work/checkpoints", identity, settings.checkpoints_kept)
    with contextlib.ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(kept.held())
            clear_leftovers(output)
            folder = held.enter_context(folder_written_whole(output))
        accelerator.wait_for_everyone()
        layered = LayeredUNet.create(pipeline.unet, settings.mild, settings.seed)
        run = _Run(settings, samples, pipeline, layered, accelerator)
        saved = kept.latest()
        if saved is not None:
            run.restore(saved)
        _optimize(run, kept, log, stop)
        losses = run.losses
        if accelerator.is_main_process:
            with run.averaged():
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
    if accelerator.is_main_process:
        kept.remove()
    accelerator.wait_for_everyone()
    tenth = max(1, len(losses) // 10)
    total = [row["loss"] for row in losses]
    return TrainResult(
        output=output,
        steps=len(losses),
        resumed_at=saved.step if saved else 0,
        first_loss=float(np.mean(total[:tenth])),
        last_loss=float(np.mean(total[-tenth:])),
        seconds=time.monotonic() - started,
    )


def _optimize(run: _Run, kept: Checkpoints, log: Log, stop: Callable[[], bool]) -> None:
    """Take the steps that are left, saving and logging."""
    settings, is_main = run.settings, run.accelerator.is_main_process
    while (step := len(run.losses)) < settings.steps:
        began = time.monotonic()
        asked_to_end = run.step(step, stop())
        done = step + 1
        if is_main and (done % settings.log_every == 0 or done == settings.steps):
            rate = settings.batch_size / max(time.monotonic() - began, 1e-9)
            log(done, {**run.losses[-1], **run.measured, "samples_per_second": rate})
        asked_to_end = asked_to_end and done < settings.steps
        if is_main and (done % settings.checkpoint_every == 0 or asked_to_end):
            kept.save(done, *run.state())
        if asked_to_end:
            run.accelerator.wait_for_everyone()
            raise Preempted(done)


class _Run:
    """What a run changes from step to step, and how."""

    def __init__(
        self,
        settings: TrainSettings,
        samples: Samples,
        pipeline: StableDiffusionXLInpaintPipeline,
        layered: LayeredUNet,
        accelerator: Accelerator,
    ) -> None:
        self.settings, self.samples, self.layered, self.accelerator = settings, samples, layered, accelerator
        pipeline.to(accelerator.device)
        layered.to(accelerator.device)
        self.unet = pipeline.unet
        self.unet.train()
        if settings.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.branch_loss = BranchLoss(pipeline, layered, settings)
        groups = _parameter_groups(layered, settings)
        self.trained: dict[str, torch.nn.Parameter] = {
            name: parameter for group in groups for name, parameter in zip(group["names"], group["params"], strict=True)
        }
        self.rates = [group["lr"] for group in groups]
        adamw = torch.optim.AdamW([{"params": group["params"], "lr": group["lr"]} for group in groups])
        # The schedule is asked as a function of the step, so that it has no state of its own.
        self.schedule = get_scheduler(
            settings.lr_scheduler,
            adamw,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.steps,
        ).lr_lambdas[0]
        self.optimizer = accelerator.prepare(adamw)
        self.average = None if settings.ema_decay is None else EMAModel(self.trained.values(), decay=settings.ema_decay)
        self.losses: list[dict[str, float]] = []
        self.measured: dict[str, float] = {}

    def step(self, step: int, stop: bool) -> bool:
        """Take one optimizer step, counted from 0; gives whether any process wants to stop."""
        settings, accelerator = self.settings, self.accelerator
        stage = stage_at(settings, step)
        weight = stage.weight
        branches: list[tuple[Branch, str, float]] = [("bg", "background", 1.0)]
        if weight > 0:
            branches.append(("fg", "foreground", weight))
        values = {"background": 0.0, "foreground": 0.0}
        indices = _indices(self.samples, settings, step)
        shares = accelerator.num_processes * settings.gradient_accumulation
        size = len(indices) // shares
        first = accelerator.process_index * settings.gradient_accumulation
        with _seeded(derived_seed(settings.seed, "layers", step, accelerator.process_index), accelerator.device):
            for share in range(first, first + settings.gradient_accumulation):
                chosen = [self.samples[index] for index in indices[share * size : (share + 1) * size]]
                for branch, name, factor in branches:
                    # Each branch is differentiated before the next is run (see `LayeredUNet.branch`).
                    with accelerator.autocast():
                        loss = self.branch_loss(self.unet, branch, chosen, step) / settings.gradient_accumulation
                    values[name] += loss.item()
                    accelerator.backward(factor * loss)
        freeze(self.unet, stage)
        if accelerator.num_processes > 1:
            _average_gradients(list(self.trained.values()), accelerator)
            told = torch.tensor([*values.values(), float(stop)], dtype=torch.float64, device=accelerator.device)
            *means, stopping = accelerator.reduce(told, "mean").tolist()
            values, stop = dict(zip(values, means, strict=True)), stopping > 0
        norm = accelerator.clip_grad_norm_(list(self.trained.values()), settings.max_grad_norm or math.inf).item()
        total = values["background"] + weight * values["foreground"]
        # With fp16 the scaler meets gradients that are too large now and then, and skips the step.
        if not math.isfinite(total) or not (math.isfinite(norm) or accelerator.scaler):
            keys = ", ".join(self.samples.keys[index] for index in indices)
            what = "the loss is" if not math.isfinite(total) else "the norm of the gradients is"
            value = total if not math.isfinite(total) else norm
            raise UserError(f"{what} {value} at step {step + 1} (samples {keys}): lower learning_rate, or mend them")
        factor = self.schedule(step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        self.layered.project_()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.step(self.trained.values())
        self.losses.append({"loss": total, **values, "lambda": weight})
        self.measured = {"gradient_norm": norm, "learning_rate": self.rates[0] * factor}
        return stop

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and numbers that `restore` takes; the step alone is the position in data, noise and schedule."""
        tensors: dict[str, torch.Tensor] = {f"weights/{name}": weight for name, weight in self.trained.items()}
        for name, state in zip(self.trained, self._optimizer_states(), strict=True):
            tensors |= {f"optimizer/{name}/{key}": value for key, value in state.items()}
        rows = [[row[column] for column in LOSS_COLUMNS[1:]] for row in self.losses]
        tensors["losses"] = torch.tensor(rows, dtype=torch.float64)
        numbers: dict[str, Any] = {}
        if self.average is not None:
            shadows = zip(self.trained, self.average.shadow_params, strict=True)
            tensors |= {f"average/{name}": shadow for name, shadow in shadows}
            numbers["average"] = self.average.optimization_step
        if self.accelerator.scaler is not None:
            numbers["scaler"] = self.accelerator.scaler.state_dict()
        return tensors, numbers

    @torch.no_grad()
    def restore(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint of this run."""
        tensors = saved.tensors
        for name, parameter in self.trained.items():
            parameter.copy_(tensors[f"weights/{name}"])
        states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.trained}
        for path in tensors:
            kind, _, rest = path.partition("/")
            if kind == "optimizer":
                name, _, key = rest.rpartition("/")
                states[name][key] = tensors[path]
        numbered = {number: state for number, state in enumerate(states.values()) if state}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})
        if self.average is not None:
            for name, shadow in zip(self.trained, self.average.shadow_params, strict=True):
                shadow.copy_(tensors[f"average/{name}"])
            self.average.optimization_step = saved.numbers["average"]
        if self.accelerator.scaler is not None and "scaler" in saved.numbers:
            self.accelerator.scaler.load_state_dict(saved.numbers["scaler"])
        self.losses = [dict(zip(LOSS_COLUMNS[1:], row, strict=True)) for row in tensors["losses"].tolist()]

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the moving average, if there is one, stand in for the weights."""
        if self.average is None:
            yield
            return
        self.average.store(self.trained.values())
        self.average.copy_to(self.trained.values())
        try:
            yield
        finally:
            self.average.restore(self.trained.values())

    def _optimizer_states(self) -> list[dict[str, torch.Tensor]]:
        """What AdamW keeps of each trained parameter; empty for those that had no gradient yet."""
        states = self.optimizer.state_dict()["state"]
        return [states.get(number, {}) for number in range(len(self.trained))]


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout in a base draws from torch's generators: let it depend on the step, and leave the caller's alone."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _average_gradients(parameters: list[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Replace each gradient by its mean over all processes, which counts as zero where one process has none.

    One that no process has stays None: AdamW must not touch a parameter that is not trained yet.
    """
    device = accelerator.device
    present = torch.tensor([parameter.grad is not None for parameter in parameters], device=device).float()
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = accelerator.reduce(torch.cat([present, *(piece.float().flatten() for piece in pieces)]), "mean")
    present, *means = flat.split([len(parameters), *(parameter.numel() for parameter in parameters)])
    for parameter, mean, share in zip(parameters, means, present.tolist(), strict=True):
        parameter.grad = mean.view_as(parameter).to(parameter.dtype) if share else None


def _parameter_groups(layered: LayeredUNet, settings: TrainSettings) -> list[dict[str, Any]]:
    """What the optimizer trains: names, parameters and learning rate of each group."""
    rates = {"sma": settings.sma_learning_rate}
    adapters = {
        f"adapters.{name}": parameter
        for branch in BRANCHES
        for name, parameter in adapter_parameters(layered.unet, branch).items()
    }
    groups = [(adapters, settings.learning_rate)]
    for part, module in layered.parts().items():
        named = {f"{part}.{name}": parameter for name, parameter in module.named_parameters()}
        groups.append((named, rates.get(part, settings.guidance_learning_rate)))
    return [{"names": list(named), "params": list(named.values()), "lr": rate} for named, rate in groups]


class BranchLoss:
    """The mean loss of a batch under one branch: encodes the pictures, adds noise, asks the UNet."""

    def __init__(
        self, pipeline: StableDiffusionXLInpaintPipeline, layered: LayeredUNet, settings: TrainSettings
    ) -> None:
        self.layered = layered
        self.vae = pipeline.vae
        self.device = pipeline.device
        self.settings = settings
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
        seed, resolution = self.settings.seed, self.settings.resolution
        draws = [np.random.default_rng(derived_seed(seed, step, sample.key)) for sample in samples]
        chosen = [int(draw.integers(len(sample.people))) for draw, sample in zip(draws, samples, strict=True)]
        # Another one for the view, as many numbers as that takes.
        views = [
            draw_view(sample, index, self.settings, np.random.default_rng(derived_seed(seed, step, sample.key, "view")))
            for sample, index in zip(samples, chosen, strict=True)
        ]
        batch = make_batch(branch, views, chosen, resolution)
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
        cues: dict[str, Any] = {} if hmg is None else make_cues(branch, views, chosen, withheld, hmg)
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
            losses = background_loss(prediction, target, known_cells(batch.target_mask, grid).to(latents))
        else:
            mask = torch.nn.functional.interpolate(batch.target_mask, size=grid, mode="area")
            losses = foreground_loss(prediction, target, mask.to(latents), self.settings.region_loss)
        return (batch.weight.to(losses) * losses).mean()

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) of pictures (B, 3, H, W) in -1..1: the mode of the VAE's posterior, scaled."""
        with torch.no_grad():
            posterior = self.vae.encode(pictures.to(self.device, self.vae.dtype)).latent_dist
        latents: torch.Tensor = posterior.mode().float() * self.vae.config.scaling_factor
        return latents


def _indices(samples: Samples, settings: TrainSettings, step: int) -> list[int]:
    """Indices of the samples of a step, counted from 0: whole batches of one epoch's order, then the next epoch's."""
    epoch, place = divmod(step, len(samples) // settings.batch_size)
    start = place * settings.batch_size
    return [int(index) for index in samples.order(settings.seed, epoch)[start : start + settings.batch_size]]


def _check_count(samples: Samples, batch_size: int) -> None:
    if len(samples) == 0:
        raise UserError("the training split holds no sample: build the dataset with composite samples")
    if len(samples) < batch_size:
        raise UserError(f"the training split holds {len(samples)} samples, fewer than batch_size ({batch_size})")


def _check_processes(accelerator: Accelerator, settings: TrainSettings) -> None:
    shares = accelerator.num_processes * settings.gradient_accumulation
    if settings.batch_size % shares:
        raise UserError(
            f"batch_size: {settings.batch_size} must be a multiple of processes ({accelerator.num_processes}) times "
            f"gradient_accumulation ({settings.gradient_accumulation})"
        )
    if accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise UserError(
            f"training shares samples, not weights: {accelerator.distributed_type.value} of the accelerate "
            "configuration is not supported, use MULTI_GPU or one process"
        )


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
