"""The training loop: adapters and the other parts of MILD on a frozen base, on accelerate."""

from __future__ import annotations

import contextlib
import csv
import glob
import logging
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, is_bf16_available, parse_flag_from_env
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionXLInpaintPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

from dataset_tools.errors import UserError
from dataset_tools.folders import folder_written_whole
from dataset_tools.schema import encode_png
from dataset_tools.settings import digest_of
from dataset_tools.shards import Samples
from dataset_tools.storage import local_place, remove_partials
from mild.bases import digest_of_place
from mild.charts import branch_loss_chart
from mild.erasing.pipeline import as_ddim, most_steps
from mild.model.backbone import (
    BRANCHES,
    Branch,
    adapter_parameters,
    check_resolution,
    load_base,
    time_ids_of,
)
from mild.model.cues import Cue
from mild.model.layered import LayeredUNet
from mild.model.saved import CONFIG, OWN, erasing_as_before
from mild.seeds import derived_seed
from mild.settings import TrainSettings
from mild.training.batches import Batch
from mild.training.checkpoints import Checkpoint, Checkpoints
from mild.training.data import Drawn, TrainingData, Work, fed
from mild.training.fresh import FreshComposites
from mild.training.journal import Journal, SamplePictures, check_trackers, logs_of, numbers_of, peak_memory
from mild.training.latents import Latents, encode_batches, encode_fixed
from mild.training.mixture import Mixture, usable
from mild.training.objective import (
    background_loss,
    cell_weights,
    extents_loss,
    foreground_loss,
    freeze,
    implied_noise,
    known_cells,
    prediction_target,
    region_terms,
    stage_at,
)
from mild.training.sharding import shard_frozen, sharding_asked_for
from mild.versions import software_versions

LOSS_COLUMNS = ("step", "loss", "background", "foreground", "extents", "lambda")
REGION_TERMS = ("core", "boundary", "gradient")
DECAY = 0.01
"""AdamW's weight decay, of torch."""

_log = logging.getLogger(__name__)

Log = Callable[[int, dict[str, float]], None]
"""Called with a step, counted from 1, and values by name."""


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
    set_aside: str
    """A line on the samples that cannot be trained on; empty where there are none."""


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
    latents: Latents | None = None,
    fresh: FreshComposites | None = None,
    validation: Samples | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train the adapters ``bg`` and ``fg`` with SMA, HMG and the other parts, and write a MILD directory.

    A step takes ``batch_size`` samples. The background branch sees the image with all people masked (by their
    augmented, faulty masks) and denoises the clean background's latent; the foreground branch denoises the
    image's latent for one person a sample, sees the image with the *other* people masked and is judged inside
    the person's mask; `mild.training.batches` says what they learn from which configuration. Both share t and noise,
    SMA and HMG; the model is given faulty masks only. One person stands for the sum over all N (eq. 5) and so counts
    N-fold; those who touch others or are hidden in part are drawn more often than eq. 5 has it
    (`mild.training.batches.draw_person`), but for fixed views, which show everybody in turn. All randomness comes from
    ``settings.seed``, the step and the sample's key; on a CPU, equal runs with as many threads give equal bytes.

    The directory, which appears whole or not at all, is that of `mild.model.layered` with ``loss.csv`` and ``loss.svg``
    beside it, and ``samples.png`` where sample pictures are drawn. What the run shows of itself before lies in
    ``{output}.work`` (`mild.training.journal`) and stays there.

    **Resuming.** Every ``checkpoint_every`` steps the run is saved (`mild.training.checkpoints`). A run that was cut
    short, in whatever way, and is started again goes on from the newest checkpoint, and on a CPU ends with the bytes of
    one that was not. It refuses checkpoints of a run with other settings, data or base; those of
    `mild.settings.HOW_NOT_WHAT`, the number of processes and where things lie may change. When the run is complete
    its checkpoints are removed.

    **Several processes** (``torchrun``, ``accelerate launch``) share each step's samples; each calls this function with
    equal arguments and sees the same folders. They average gradients by themselves, in one piece, not by wrapping the
    UNet for that: SMA, HMG, offsets and prefix are no part of it, and which parameters get a gradient changes with
    branch and step. The frozen weights are shared out too where accelerate's configuration says so
    (`mild.training.sharding`).

    Args:
        samples: of any configuration; `mild.training.batches` says what each teaches. Those that cannot be trained on
            (nobody is seen, smaller than ``resolution``) are set aside before the first step
            (`mild.training.mixture.usable`): a warning, the card and ``mild.json`` say how many. With ``workers`` they
            are pickled for each, as ``latents`` are, and a script that calls this needs its ``if __name__ ==
            "__main__"``.
        base: folder or hub id of an SDXL inpainting pipeline.
        output: the directory to write; an older one is replaced.
        log: called every ``log_every`` steps and after the last with what the trackers get: of this step alone
            ``loss/total``, ``loss/background``, ``loss/foreground``, ``loss/extents`` (and, where the region-aware
            loss is on, its weighted terms ``loss/core``, ``loss/boundary`` and ``loss/gradient``), ``lambda``,
            ``gradient_norm`` (of all, before they are clipped) and ``learning_rate/`` ``adapters``, ``sma`` and
            ``guidance``; the weights as `mild.training.journal.numbers_of` has them; ``samples_per_second`` since the
            last call, without the time that pictures and checkpoints take; ``waiting_for_data``, the share of that time
            in which it waited for samples to be read and drawn (more ``workers`` lower it); and ``memory/peak_gib``.
            Called by the first process only.
        dataset_digest: named in the card and in ``mild.json``.
        base_digest: of the base's files, where known: the run may then be resumed with the base in another place.
        checkpoints: folder for them; by default ``{output}.work/checkpoints``.
        latents: of the samples' fixed views (``cached_views``); None: the VAE encodes what each step sees, which gives
            the same bytes.
        fresh: makes what is seen in the place of composites; goes with ``fresh_composites``.
        validation: whom sample pictures show (``samples_every``); None: nobody, and a warning says so.
        stop: asked after every step; once it says yes the run is saved and ends with `Preempted`.

    Raises:
        UserError: the base or dataset cannot be used, the checkpoints are of another run or cannot be written, or loss
            or gradients are no longer finite (the last good checkpoint stays).
        ValueError: ``fresh`` or ``settings.fresh_composites`` is there without the other.
        Preempted: ``stop`` said so.
    """
    if (fresh is None) != (settings.fresh_composites is None):
        raise ValueError("fresh and settings.fresh_composites go together: give both or neither")
    check_machine(settings)
    settings = erasing_as_before(settings)
    output = local_place(output, "adapters")
    samples, aside = usable(samples, settings.resolution, settings.batch_size)
    if latents is not None:
        latents.check(samples.keys)
    untrained = _untrained(settings)
    work = Path(f"{output}.work")
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision, log_with=list(settings.trackers) or None, project_dir=logs_of(work)
    )
    if aside and accelerator.is_main_process:
        _log.warning(aside)
    if untrained and accelerator.is_main_process:
        _log.warning(untrained)
    _check_processes(accelerator, settings)
    sharding = sharding_asked_for(accelerator, settings)
    identity = {
        "settings": settings.determines(),
        "dataset": dataset_digest,
        "keys of samples": digest_of(list(samples.keys)),
        "weights of configurations": samples.weights if isinstance(samples, Mixture) else {},
        "base": base_digest or base,
        "start from": settings.start_from and digest_of_place(settings.start_from),
    }
    kept = Checkpoints(checkpoints or work / "checkpoints", identity, settings.checkpoints_kept)
    with contextlib.ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(kept.held())
            target = Path(os.path.realpath(output))
            remove_partials(target.parent, glob.escape(target.name))
            folder = held.enter_context(folder_written_whole(target, CONFIG, OWN))
        accelerator.wait_for_everyone()
        saved = kept.latest()
        pipeline = load_base(base)
        erases_at = settings.inference_resolution or settings.resolution
        check_resolution(pipeline, settings.resolution)
        check_resolution(pipeline, erases_at, "inference_resolution")
        started = time.monotonic()
        layered = _layered(pipeline, settings)
        layered.resolution, layered.inference_resolution = settings.resolution, erases_at
        layered.inference_steps, layered.prompt = settings.inference_steps, settings.prompt
        run = _Run(settings, samples, pipeline, layered, accelerator, latents, fresh, sharding)
        if saved is not None:
            run.restore(saved)
        journal = None
        if accelerator.is_main_process:
            journal = held.enter_context(contextlib.closing(Journal(accelerator, settings, work, len(run.losses))))
        pictures = _sample_pictures(run, validation)
        _optimize(run, kept, journal, pictures, log, stop)
        losses = run.losses
        with run.averaged():
            sheet = None if pictures is None else pictures.draw()
            if journal is not None:
                about = ABOUT.format(
                    steps=settings.steps,
                    batch_size=settings.batch_size,
                    count=len(samples),
                    aside=f" ({aside})" if aside else "",
                    untrained=f"\n- {untrained}" if untrained else "",
                    dataset=dataset_digest,
                    first=losses[0]["loss"],
                    last=losses[-1]["loss"],
                )
                if sheet is not None:
                    journal.picture(settings.steps, sheet)
                    (folder / "samples.png").write_bytes(encode_png(sheet.picture))
                    reached = "" if sheet.psnr is None else f"; PSNR in the hole {sheet.psnr:.1f} dB"
                    about += ABOUT_PICTURES.format(reached=reached)
                layered.save(
                    folder,
                    base=base,
                    resolution=settings.resolution,
                    inference_resolution=erases_at,
                    inference_steps=settings.inference_steps,
                    prompt=settings.prompt,
                    record={
                        "dataset": dataset_digest,
                        "samples": len(samples),
                        "set_aside": aside,
                        "settings": settings.model_dump(mode="json"),
                        "software": software_versions(),
                    },
                    about=about,
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
        set_aside=aside,
    )


def _untrained(settings: TrainSettings) -> str:
    """A line on the adapters that no step trains; empty where both are, or were before."""
    trained = {adapter for step in range(settings.steps) for adapter in stage_at(settings, step).adapters}
    if settings.start_from is not None or not (missing := [f"`{name}`" for name in BRANCHES if name not in trained]):
        return ""
    return f"Not trained in {settings.steps} steps: {', '.join(missing)} (see warm_up and protect_background)"


def check_machine(settings: TrainSettings) -> None:
    """Look whether this machine can do what the settings ask for, before anything is loaded.

    Raises:
        UserError: it has no GPU for ``mixed_precision``, no compiler for ``compile``, or lacks a tracker's package.
    """
    check_trackers(settings)
    # As `Accelerator` will begin: whoever is first decides for the whole process.
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    if settings.mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("mixed_precision: fp16 needs a GPU, and this machine has none: use bf16 or no")
    # By accelerate's table, which knows processors too.
    if settings.mixed_precision == "bf16" and device.type != "cpu" and not is_bf16_available(ignore_tpu=True):
        raise UserError(f"mixed_precision: this {device.type} device does not know bf16: use fp16 or no")
    if settings.compile:
        _check_compiler(device)


def _check_compiler(device: torch.device) -> None:
    """By what the compiler itself looks for, when the first step needs it."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type != "cpu":
        if not has_triton():
            raise UserError("compile: triton, which compiles for this GPU, is not there: install it, or leave it out")
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "compile: there is no C++ compiler: install g++, name one in the environment variable CXX, or leave it out"
        ) from None


def _optimize(
    run: _Run,
    kept: Checkpoints,
    journal: Journal | None,
    pictures: SamplePictures | None,
    log: Log,
    stop: Callable[[], bool],
) -> None:
    """Take the steps that are left, saving and, in the process that has the journal, showing how it goes."""
    settings = run.settings
    seen, seconds = 0, 0.0
    with contextlib.closing(run.feed()) as feed:
        while (step := len(run.losses)) < settings.steps:
            began = time.monotonic()
            asked_to_end = run.step(step, stop(), feed)
            seen, seconds = seen + settings.batch_size, seconds + time.monotonic() - began
            done = step + 1
            if journal is not None and (done % settings.log_every == 0 or done == settings.steps):
                speed = {
                    "samples_per_second": seen / max(seconds, 1e-9),
                    "waiting_for_data": run.waited / max(seconds, 1e-9),
                }
                memory = {"memory/peak_gib": peak_memory(run.accelerator.device)}
                values = run.measured | numbers_of(run.layered) | speed | memory
                journal.numbers(done, values, run.layered)
                log(done, values)
                seen, seconds, run.waited = 0, 0.0, 0.0
            if pictures is not None and pictures.due(done):
                # By every process: a UNet that is sharded computes in all of them or not at all.
                with run.averaged():
                    sheet = pictures.draw()
                if journal is not None:
                    journal.picture(done, sheet)
            asked_to_end = asked_to_end and done < settings.steps
            if journal is not None and (done % settings.checkpoint_every == 0 or asked_to_end):
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
        latents: Latents | None,
        fresh: FreshComposites | None,
        sharding: FullyShardedDataParallelPlugin | None,
    ) -> None:
        self.settings, self.samples, self.layered, self.accelerator = settings, samples, layered, accelerator
        layered.to(accelerator.device)
        if settings.mixed_precision != "no":
            # What is frozen needs no more precision than it is multiplied in; what is trained stays in float32.
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[settings.mixed_precision]
            for name, parameter in pipeline.unet.named_parameters():
                if ".lora_" not in name:  # adapters, also those that are not trained here, are saved as they are
                    parameter.data = parameter.data.to(dtype)
        if sharding is None:
            pipeline.unet.to(accelerator.device)
        else:
            shard_frozen(pipeline.unet, accelerator, sharding)
        self.pipeline, self.unet = pipeline, pipeline.unet
        self.unet.train()
        if settings.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        # One graph a branch: anything that would break it, or compile it anew, is an error and no silent slowness.
        self.compute = torch.compile(self.unet, fullgraph=True, dynamic=False) if settings.compile else self.unet
        self.branch_loss = BranchLoss(pipeline, layered, settings)
        self.data = training_data(pipeline, layered, settings, samples, latents, fresh)
        # Nobody needs the text encoders any more; the VAE, only sample pictures and training without latents do.
        pipeline.text_encoder = pipeline.text_encoder_2 = None
        if settings.samples_every is None and latents is not None:
            pipeline.vae = None
        pipeline.to(accelerator.device)
        # Not in every step: looking for them goes through the whole UNet.
        self.adapters: dict[Branch, list[torch.nn.Parameter]] = {
            branch: list(adapter_parameters(self.unet, branch).values()) for branch in BRANCHES
        }
        groups = _parameter_groups(layered, settings)
        self.trained: dict[str, torch.nn.Parameter] = {
            name: parameter for group in groups for name, parameter in zip(group["names"], group["params"], strict=True)
        }
        self.rates: list[float] = [group["lr"] for group in groups]
        adamw = torch.optim.AdamW(
            [{key: group[key] for key in ("name", "params", "lr", "weight_decay")} for group in groups]
        )
        # The schedule is asked as a function of the step, so that it has no state of its own.
        self.schedule = get_scheduler(
            settings.lr_scheduler,
            adamw,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.steps,
        ).lr_lambdas[0]
        # Not `prepare`, which under FSDP wants to shard what is trained.
        self.optimizer = accelerator.prepare_optimizer(adamw)
        self.average = None if settings.ema_decay is None else EMAModel(self.trained.values(), decay=settings.ema_decay)
        self.losses: list[dict[str, float]] = []
        self.measured: dict[str, float] = {}
        self.waited = 0.0
        """Seconds in which steps waited for their samples, since this was last set."""

    def feed(self) -> Generator[Drawn, None, None]:
        """What this process's passes see, from the next step to the last."""
        return fed(self.data, self._works())

    def _works(self) -> Iterator[Work]:
        settings, accelerator = self.settings, self.accelerator
        shares = accelerator.num_processes * settings.gradient_accumulation
        first = accelerator.process_index * settings.gradient_accumulation
        for step in range(len(self.losses), settings.steps):
            branches, indices = stage_at(settings, step).branches, _indices(self.samples, settings, step)
            size = len(indices) // shares
            for share in range(first, first + settings.gradient_accumulation):
                yield Work(step, branches, tuple(indices[share * size : (share + 1) * size]))

    def step(self, step: int, stop: bool, feed: Iterator[Drawn]) -> bool:
        """Take one optimizer step, counted from 0; gives whether any process wants to stop."""
        settings, accelerator = self.settings, self.accelerator
        stage = stage_at(settings, step)
        weight = stage.weight
        named: dict[Branch, tuple[str, float]] = {"bg": ("background", 1.0), "fg": ("foreground", weight)}
        values = {"background": 0.0, "foreground": 0.0, "extents": 0.0}
        if settings.region_loss is not None:
            values |= dict.fromkeys(REGION_TERMS, 0.0)
        with _seeded(derived_seed(settings.seed, "layers", step, accelerator.process_index), accelerator.device):
            for _ in range(settings.gradient_accumulation):
                began = time.monotonic()
                drawn = next(feed)
                self.waited += time.monotonic() - began
                for of_branch in self.branch_loss.examples(stage.branches, drawn, step):
                    name, factor = named[of_branch.branch]
                    # Each branch is differentiated before the next is run (see `LayeredUNet.branch`).
                    with accelerator.autocast():
                        loss = self.branch_loss(self.compute, of_branch) / settings.gradient_accumulation
                    terms = {
                        term: part.item() / settings.gradient_accumulation
                        for term, part in self.branch_loss.terms.items()
                    }
                    of_extents = terms.pop("extents", 0.0)
                    values[name] += loss.item() - of_extents
                    values["extents"] += factor * of_extents
                    for term, part in terms.items():
                        values[term] += part
                    accelerator.backward(factor * loss)
        freeze(self.adapters, stage)
        if accelerator.num_processes > 1:
            _average_gradients(list(self.trained.values()), accelerator)
            told = torch.tensor([*values.values(), float(stop)], dtype=torch.float64, device=accelerator.device)
            *means, stopping = accelerator.reduce(told, "mean").tolist()
            values, stop = dict(zip(values, means, strict=True)), stopping > 0
        # Not by `Accelerator.clip_grad_norm_`: of a UNet that is sharded it unscales fp16's gradients twice.
        accelerator.unscale_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), settings.max_grad_norm or math.inf).item()
        total = values["background"] + weight * values["foreground"] + values["extents"]
        # With fp16 the scaler meets gradients that are too large now and then, and skips the step.
        if not math.isfinite(total) or not (math.isfinite(norm) or accelerator.scaler):
            keys = ", ".join(self.samples.keys[index] for index in _indices(self.samples, settings, step))
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
        self.losses.append({"loss": total} | {name: values[name] for name in LOSS_COLUMNS[2:5]} | {"lambda": weight})
        self.measured = {"loss/total": total, **{f"loss/{name}": value for name, value in values.items()}}
        self.measured |= {"lambda": weight, "gradient_norm": norm}
        self.measured |= {f"learning_rate/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
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


def _layered(pipeline: StableDiffusionXLInpaintPipeline, settings: TrainSettings) -> LayeredUNet:
    """What is trained: fresh parts, those of ``start_from``, or a prefix on these."""
    if settings.start_from is None:
        return LayeredUNet.create(pipeline.unet, settings.mild, settings.seed)
    layered = LayeredUNet.load(pipeline.unet, settings.start_from)
    if settings.mild.prefix is not None:
        layered.train_prefix_alone(settings.mild.prefix)
    return layered


def _parameter_groups(layered: LayeredUNet, settings: TrainSettings) -> list[dict[str, Any]]:
    """What the optimizer trains: names, parameters, learning rate and weight decay of the groups that are not empty.

    Decay is for matrices. A gate of HMG or a scalar of SMA that has no gradient for a while would fade away: an alpha
    of 1 to 0.135 in 20,000 steps.
    """
    adapters = {
        f"adapters.{name}": parameter
        for branch in BRANCHES
        for name, parameter in adapter_parameters(layered.unet, branch).items()
    }
    parts: dict[str, dict[str, torch.nn.Parameter]] = {"sma": {}, "guidance": {}}
    for part, module in layered.parts().items():
        named = {f"{part}.{name}": parameter for name, parameter in module.named_parameters()}
        parts["sma" if part == "sma" else "guidance"] |= named
    matrices = {name: p for name, p in parts["guidance"].items() if p.ndim > 1}
    numbers = {name: p for name, p in parts["guidance"].items() if p.ndim <= 1}
    groups = [
        ("adapters", adapters, settings.learning_rate, DECAY),
        ("sma", parts["sma"], settings.sma_learning_rate, 0.0),
        ("guidance", matrices, settings.guidance_learning_rate, DECAY),
        ("guidance", numbers, settings.guidance_learning_rate, 0.0),
    ]
    found = []
    for name, named, rate, decay in groups:
        trained = {key: parameter for key, parameter in named.items() if parameter.requires_grad}
        if trained:
            values = {"names": list(trained), "params": list(trained.values()), "lr": rate, "weight_decay": decay}
            found.append({"name": name, **values})
    return found


def _sample_pictures(run: _Run, validation: Samples | None) -> SamplePictures | None:
    """What draws sample pictures, where they are asked for and there is somebody to show."""
    if run.settings.samples_every is None:
        return None
    if validation is not None:
        text = run.branch_loss.text, run.branch_loss.pooled_text
        pictures = SamplePictures(run.pipeline, run.layered, text, validation, run.settings)
        if pictures.samples:
            return pictures
    if run.accelerator.is_main_process:
        _log.warning(
            "samples_every: the dataset has no split validation with people to erase, so no pictures are drawn"
        )
    return None


@dataclass(frozen=True)
class Examples:
    """What one branch is trained on in one step, up to the UNet: B samples. Tensors are float32, without gradients, and
    lie where the UNet does."""

    branch: Branch
    noisy: torch.Tensor
    """Latents (B, C, h, w): noised truth or, where `path` leads further, the start that erasing has."""
    path: list[int]
    """Time steps over which the model's own answers take ``noisy`` to where it is trained; empty: it is there."""
    timesteps: torch.Tensor
    """(B,) int64, where it is trained."""
    shown: torch.Tensor
    """What the UNet sees beside, [hole; latents of the image shown], (B, C + 1, h, w)."""
    clean: torch.Tensor
    """Latents x_0 of what the branch learns to paint, (B, C, h, w)."""
    judged: torch.Tensor
    """(B, 1, h, w) in 0..1, for the loss: where the background is known; the person's mask M_k."""
    repainted: torch.Tensor
    """(B, 1, h, w), 1 in cells that are to be painted anew, else 0; see `mild.settings.TrainSettings.outside`."""
    extent: torch.Tensor
    """(B, 1, H, W) in 0..1: see `mild.training.batches.Batch`; so is the next."""
    extent_judged: torch.Tensor
    weight: torch.Tensor
    """(B,): see `mild.training.batches.Batch`."""
    given_mask: torch.Tensor
    """(B, 1, H, W) in 0..1: see `mild.training.batches.Batch`."""
    cues: dict[str, Any]
    """Those of HMG: arguments of `LayeredUNet.branch`."""


class BranchLoss:
    """The mean loss of a batch under one branch, in two stages: `examples` for all branches, then the UNet for each.

    Args:
        pipeline: the base. The prompt is encoded at once; later the VAE alone is used, where the UNet is, and not even
            that where latents are stored.
    """

    def __init__(
        self,
        pipeline: StableDiffusionXLInpaintPipeline,
        layered: LayeredUNet,
        settings: TrainSettings,
    ) -> None:
        self.pipeline = pipeline
        self.layered = layered
        self.device = pipeline.unet.device
        self.settings = settings
        # Samplers such as Euler's noise otherwise; their configuration says what the UNet was trained with.
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        # Its own: sample pictures set the steps of the pipeline's.
        self.ddim = DDIMScheduler.from_config(as_ddim(pipeline.scheduler).config)
        if settings.inference_steps > (most := most_steps(self.ddim)):
            raise UserError(
                f"inference_steps is {settings.inference_steps}: give 1 to {most}, which the base's DDIM has"
            )
        self.ddim.set_timesteps(settings.inference_steps, device=pipeline.unet.device)
        with torch.no_grad():
            text, _, pooled_text, _ = pipeline.encode_prompt(
                settings.prompt, device=pipeline.text_encoder_2.device, do_classifier_free_guidance=False
            )
        self.text, self.pooled_text = text.to(self.device), pooled_text.to(self.device)
        self.terms: dict[str, torch.Tensor] = {}
        """Of the latest loss: what the extents add, and the terms of the region-aware loss, where there are such."""
        side = settings.resolution
        self.time_ids = time_ids_of(pipeline, (side, side), self.pooled_text)[0].to(self.device)

    @torch.no_grad()
    def examples(self, branches: Sequence[Branch], drawn: Drawn, step: int) -> list[Examples]:
        """The examples of each branch: of the same views, with the same time steps and noise.

        Args:
            drawn: of these branches at least; of fixed views without `Drawn.latents`, of both.
        """
        # All goes to the device here, once.
        batches = {branch: batch.to(self.device) for branch, batch in drawn.batches.items()}
        if drawn.latents:
            latents = {name: latent.to(self.device) for name, latent in drawn.latents.items()}
        else:
            encode = encode_batches if self.settings.cached_views is None else encode_fixed
            latents = encode(self.pipeline.vae, batches, self.settings)
        noise = drawn.noise.to(self.device)
        path, timesteps = self._states(step, drawn)
        cues = {
            name: cue and Cue(cue.maps.to(self.device), cue.present.to(self.device)) for name, cue in drawn.cues.items()
        }
        return [
            self._examples_of(branch, batches[branch], latents, path, timesteps, noise, cues) for branch in branches
        ]

    def _states(self, step: int, drawn: Drawn) -> tuple[list[int], torch.Tensor]:
        """`Examples.path` and `Examples.timesteps` of a step."""
        if drawn.timesteps is not None:
            return [], drawn.timesteps.to(self.device)
        visited = [int(t) for t in self.ddim.timesteps]
        # One for all samples of a step, on all processes: they go the way together.
        reached = derived_seed(self.settings.seed, "state", step) % len(visited)
        return visited[:reached], torch.full((len(drawn.noise),), visited[reached], device=self.device)

    def _examples_of(
        self,
        branch: Branch,
        batch: Batch,
        latents: dict[str, torch.Tensor],
        path: list[int],
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        cues: dict[str, Any],
    ) -> Examples:
        clean = latents[f"{branch}.picture"]
        grid = clean.shape[-2:]
        pixels = batch.hole.to(clean)
        # As the pipeline does it: the mask channel is taken at the nearest pixel.
        hole = F.interpolate(pixels, size=grid)
        first = torch.full_like(timesteps, path[0]) if path else timesteps
        noisy = self.scheduler.add_noise(latents.get(f"{branch}.start", clean), noise, first)
        judged = batch.target_mask.to(clean)
        if branch == "bg":
            judged = known_cells(judged, grid)
            cues = {name: cue for name, cue in cues.items() if name != "others"}
            repainted = torch.maximum(pixels, batch.extent.ceil())
        else:
            judged = F.interpolate(judged, size=grid, mode="area")
            repainted = pixels
        return Examples(
            branch=branch,
            noisy=noisy,
            path=path,
            timesteps=timesteps,
            shown=torch.cat([hole, latents[f"{branch}.shown"]], dim=1),
            clean=clean,
            judged=judged,
            repainted=F.adaptive_max_pool2d(repainted, grid),
            extent=batch.extent,
            extent_judged=batch.extent_judged.to(clean),
            weight=batch.weight,
            given_mask=batch.given_mask,
            cues=cues,
        )

    def __call__(self, unet: Callable[..., Any], examples: Examples) -> torch.Tensor:
        """The mean of ``weight * loss`` over the batch, a scalar that carries gradients of adapters and parts."""
        settings, noisy = self.settings, examples.noisy
        with self.layered.branch(examples.branch, examples.given_mask, **examples.cues):
            for t in examples.path:
                with torch.no_grad():
                    answer = self._predicted(unet, noisy, torch.full_like(examples.timesteps, t), examples)
                    noisy = self.ddim.step(answer.float(), t, noisy, return_dict=False)[0]
            prediction = self._predicted(unet, noisy, examples.timesteps, examples)
            extents = self.layered.extents
            logits = None if extents is None else extents.logits(examples.branch, examples.extent.shape[-2:])
        noise = implied_noise(self.scheduler, examples.clean, noisy, examples.timesteps)
        target = prediction_target(self.scheduler, examples.clean, noise, examples.timesteps)
        weights = None if settings.outside == 1 else cell_weights(examples.repainted, settings.outside)
        if examples.branch == "bg":
            losses = background_loss(prediction, target, examples.judged, weights)
        else:
            losses = foreground_loss(prediction, target, examples.judged, settings.region_loss, weights)
        self.terms = self._terms(prediction.detach(), target, examples)
        if logits is not None:
            of_extents = settings.extents_loss * extents_loss(logits, examples.extent, examples.extent_judged)
            self.terms["extents"] = (examples.weight * of_extents).mean().detach()
            losses = losses + of_extents
        return (examples.weight * losses).mean()

    def _predicted(
        self, unet: Callable[..., Any], noisy: torch.Tensor, timesteps: torch.Tensor, examples: Examples
    ) -> torch.Tensor:
        count = len(noisy)
        prediction: torch.Tensor = unet(
            torch.cat([noisy, examples.shown], dim=1),
            timesteps,
            # A copy a sample: multiplying one text expanded over the batch, torch copies all weights instead.
            encoder_hidden_states=self.layered.text(self.text.repeat(count, 1, 1)),
            added_cond_kwargs={
                "text_embeds": self.pooled_text.expand(count, -1),
                "time_ids": self.time_ids.expand(count, -1),
            },
        ).sample
        return prediction

    def _terms(self, prediction: torch.Tensor, target: torch.Tensor, examples: Examples) -> dict[str, torch.Tensor]:
        if examples.branch == "bg" or self.settings.region_loss is None:
            return {}
        terms = region_terms(prediction, target, examples.judged, self.settings.region_loss)
        return {name: (examples.weight * values).mean() for name, values in terms.items()}


def training_data(
    pipeline: StableDiffusionXLInpaintPipeline,
    layered: LayeredUNet,
    settings: TrainSettings,
    samples: Samples,
    latents: Latents | None = None,
    fresh: FreshComposites | None = None,
) -> TrainingData:
    """What `BranchLoss` is fed with."""
    side = settings.resolution // pipeline.vae_scale_factor
    return TrainingData(
        samples,
        settings,
        layered.settings.hmg,
        (int(pipeline.vae.config.latent_channels), side, side),
        int(pipeline.scheduler.config.num_train_timesteps),
        latents,
        fresh,
    )


def _indices(samples: Samples, settings: TrainSettings, step: int) -> list[int]:
    """Indices of the samples of a step, counted from 0: whole batches of one epoch's order, then the next epoch's."""
    epoch, place = divmod(step, len(samples) // settings.batch_size)
    start = place * settings.batch_size
    return [int(index) for index in samples.order(settings.seed, epoch)[start : start + settings.batch_size]]


def _check_processes(accelerator: Accelerator, settings: TrainSettings) -> None:
    shares = accelerator.num_processes * settings.gradient_accumulation
    if settings.batch_size % shares:
        raise UserError(
            f"batch_size: {settings.batch_size} must be a multiple of processes ({accelerator.num_processes}) times "
            f"gradient_accumulation ({settings.gradient_accumulation})"
        )
    if accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP"):
        raise UserError(
            f"distributed_type: {accelerator.distributed_type.value} of the accelerate configuration is not supported, "
            "use MULTI_GPU, or FSDP where the frozen UNet is too large for one GPU"
        )


def _write_losses(folder: Path, losses: list[dict[str, float]]) -> None:
    with (folder / "loss.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, LOSS_COLUMNS, lineterminator="\n")
        rows.writeheader()
        rows.writerows({"step": step, **values} for step, values in enumerate(losses, start=1))
    (folder / "loss.svg").write_text(branch_loss_chart(losses), encoding="utf-8")


ABOUT = """\
- Training: {steps} steps of {batch_size} samples; loss {first:.4g} at the first step, {last:.4g} at the last
  (`loss.csv`, `loss.svg`){untrained}
- Data: {count} samples an epoch{aside}, digest `{dataset}`
- Licence: these weights come from the base and from the data; whoever passes them on is bound by both
"""
ABOUT_PICTURES = """\
- People of the validation split, erased with these weights: picture, hole, result and, where it is known,
  truth{reached}

  ![Sample pictures](samples.png)
"""
