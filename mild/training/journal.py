"""What a training run shows of itself while it goes on: numbers to trackers, and what it erases by now as pictures.

In the run's work folder:

=========================== ======================================================================================
place                       content
=========================== ======================================================================================
``logs/mild/``              TensorBoard's event files: ``tensorboard --logdir logs`` shows them, while they grow too
``logs/wandb/``             what Weights & Biases keeps
``samples/step-000500.png`` sample pictures after 500 steps
=========================== ======================================================================================

Nothing here takes part in training: its weights are the same to the bit whatever is shown.
"""

from __future__ import annotations

import importlib.util
import itertools
import resource
import shutil
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLInpaintPipeline
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from dataset_tools.errors import UserError
from dataset_tools.schema import Person, Sample, encode_png
from dataset_tools.shards import Samples
from dataset_tools.storage import write_bytes
from mild.erasing.pipeline import Erased, MILDPipeline
from mild.erasing.regions import editable
from mild.metrics.psnr import psnr_hole
from mild.model.attention import SpatialModulation
from mild.model.layered import LayeredUNet
from mild.model.morphology import HumanMorphologyGuidance
from mild.seeds import derived_seed
from mild.settings import TrainSettings

PROJECT = "mild"
"""Folder of the event files, and project of Weights & Biases."""
TILE = 256
"""Pixels of the longer side of a picture on a sheet, at most."""
GAP = 4
"""Pixels between two pictures on a sheet."""
HOLE = 127
"""Grey of the hole on a sheet, as the model sees it."""


def check_trackers(settings: TrainSettings) -> None:
    """Raise `UserError` if the package of a tracker is missing."""
    for name in settings.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed: pip install {name}, or leave it out")


class Journal:
    """The logs of a run. Its files appear with the first entry; those of a run before it are then removed.

    A run that goes on from a checkpoint adds to its logs, and each step is there once: TensorBoard hides what an
    interrupted run had written beyond the checkpoint, Weights & Biases keeps that and takes no second value.

    Args:
        accelerator: made to log with the trackers of the settings, `logs_of` the work folder being its project.
        work: the run's work folder.
        done: steps that were done before, of which the journal tells already.
    """

    def __init__(self, accelerator: Accelerator, settings: TrainSettings, work: Path, done: int) -> None:
        self._accelerator, self._settings, self._work, self._done = accelerator, settings, work, done
        self._open = False

    def numbers(self, step: int, values: Mapping[str, float], layered: LayeredUNet) -> None:
        """Write values by name and, to TensorBoard, how the alphas of SMA and the gates of HMG are spread."""
        self._begin()
        self._accelerator.log(dict(values), step=step)
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                for name, spread in spreads_of(layered).items():
                    tracker.writer.add_histogram(name, spread, step)

    def picture(self, step: int, sheet: Sheet) -> None:
        """Write a sheet of sample pictures to trackers and as a file, and its PSNR as ``validation/psnr``."""
        self._begin()
        write_bytes(LocalFileSystem(), f"{self._work}/samples/step-{step:06d}.png", encode_png(sheet.picture))
        if sheet.psnr is not None:
            self._accelerator.log({"validation/psnr": sheet.psnr}, step=step)
        for tracker in self._accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": sheet.picture[None]}, step=step, **options)

    def close(self) -> None:
        """Write what is left and end the trackers."""
        if self._open:
            for tracker in self._accelerator.trackers:
                tracker.finish()

    def _begin(self) -> None:
        if self._open:
            return
        logs = logs_of(self._work)
        if self._done == 0:
            for old in (logs, self._work / "samples"):
                shutil.rmtree(old, ignore_errors=True)
        try:
            logs.mkdir(parents=True, exist_ok=True)
            options = {"tensorboard": {"purge_step": self._done + 1}, "wandb": self._of_wandb(logs)}
            self._accelerator.init_trackers(PROJECT, init_kwargs=options)
        # The packages have errors of their own, such as that of Weights & Biases where nobody has logged in.
        except Exception as error:
            raise UserError(f"trackers: {' '.join(str(error).split())}; mend that, or leave the tracker out") from error
        self._open = True

    def _of_wandb(self, logs: Path) -> dict[str, Any]:
        """Arguments of ``wandb.init``: a run that goes on has its id in a file."""
        if "wandb" not in self._settings.trackers:
            return {}
        run = logs / "wandb-run"
        if not run.exists():
            run.write_text(uuid.uuid4().hex)
        settings = self._settings.model_dump(mode="json")
        return {"dir": str(logs), "id": run.read_text(), "resume": "allow", "config": settings}


def logs_of(work: Path) -> Path:
    """Folder of the logs in a run's work folder."""
    return work / "logs"


def numbers_of(layered: LayeredUNet) -> dict[str, float]:
    """What the parts have learned so far, in few numbers; of those that are switched on.

    ``sma/alpha_00`` to ``sma/alpha_11`` are means over all self-attentions; the hard constraints, where they hold,
    leave each of the four one sign, so that nothing cancels out. ``hmg/gate`` is the mean magnitude of the gates of
    all cross-attentions and heads.
    """
    numbers: dict[str, float] = {}
    if layered.sma is not None:
        means = _alphas(layered.sma).mean(0).tolist()
        numbers = {f"sma/alpha_{s}{t}": means[s][t] for s in (0, 1) for t in (0, 1)}
    if layered.hmg is not None:
        numbers["hmg/gate"] = _gates(layered.hmg).abs().mean().item()
    return numbers


def spreads_of(layered: LayeredUNet) -> dict[str, torch.Tensor]:
    """What those are means of, for histograms: the gates with their signs, a head and block, and of the alphas of each
    block what counts (`mild.model.attention`), beta_0 = alpha_01 - alpha_00 and beta_1 = alpha_11 - alpha_10."""
    spreads: dict[str, torch.Tensor] = {}
    if layered.sma is not None:
        alphas = _alphas(layered.sma)
        spreads["sma/beta_0_by_block"] = alphas[:, 0, 1] - alphas[:, 0, 0]
        spreads["sma/beta_1_by_block"] = alphas[:, 1, 1] - alphas[:, 1, 0]
    if layered.hmg is not None:
        spreads["hmg/gate_by_head"] = _gates(layered.hmg)
    return spreads


def _alphas(sma: SpatialModulation) -> torch.Tensor:
    """(blocks, 2, 2)."""
    return torch.stack([alpha.detach() for alpha in sma.blocks().values()]).cpu()


def _gates(hmg: HumanMorphologyGuidance) -> torch.Tensor:
    return torch.cat([gate.detach() for gate in hmg.gates.values()]).cpu()


def peak_memory(device: torch.device) -> float:
    """The most memory that this process ever had, in GiB: tensors on a GPU, or else what lay in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Bytes on macOS, KiB elsewhere (getrusage(2)).
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@dataclass(frozen=True, eq=False)
class Sheet:
    """Sample pictures beside each other."""

    picture: np.ndarray
    """(H, W, 3) uint8: a row a sample, of picture, hole, result and, where it is known, truth."""
    psnr: float | None
    """In the hole, in dB, the mean over those whose truth is known; None without any."""


class SamplePictures:
    """People of a few fixed samples erased with the weights so far, by the UNet that is being trained.

    The same samples (the first by key), masks, cues and noise each time, so that sheets differ by the weights alone.

    Args:
        pipeline, layered: what is trained; nothing of it is copied. Text encoders are not needed.
        text: the prompt's embeddings, (1, L, D), and pooled (1, D').
        samples: of a split that is not trained on.

    Attributes:
        samples: those that are shown; empty where none has people to erase and background to go by.
    """

    def __init__(
        self,
        pipeline: StableDiffusionXLInpaintPipeline,
        layered: LayeredUNet,
        text: tuple[torch.Tensor, torch.Tensor],
        samples: Samples,
        settings: TrainSettings,
    ) -> None:
        self._pipeline, self._text = MILDPipeline.around(pipeline, layered), text
        self._settings = settings
        by_key = sorted(range(len(samples.keys)), key=lambda index: samples.keys[index])
        fit = (sample for index in by_key if _can_be_erased(sample := samples[index]))
        self.samples = list(itertools.islice(fit, settings.sample_pictures))

    def due(self, done: int) -> bool:
        """Whether a sheet is drawn after so many steps; that of the last step belongs to the finished adapters."""
        every = self._settings.samples_every
        return every is not None and done % every == 0 and done < self._settings.steps

    def draw(self) -> Sheet:
        """Erase everybody from all of them."""
        unet = self._pipeline.unet
        unet.eval()
        try:
            erased = [self._erased(sample) for sample in self.samples]
        finally:
            unet.train()
        rows, values = [], []
        for sample, result in zip(self.samples, erased, strict=True):
            hole = np.where(result.removed[..., None], np.uint8(HOLE), sample.image)
            rows.append([sample.image, hole, result.image])
            if sample.background is not None:
                rows[-1].append(sample.background)
                judged = result.removed if sample.known is None else result.removed & sample.known
                if judged.any():
                    values.append(psnr_hole(result.image, sample.background, judged))
        return Sheet(_sheet(rows), float(np.mean(values)) if values else None)

    def _erased(self, sample: Sample) -> Erased:
        people = _people(sample)
        pose = np.stack([person.keypoints for person in people])
        known: dict[str, Any] = {"pose": pose} if pose[..., 2].any() else {}
        if sample.label_set != "none":
            known |= {"parsing": sample.parsing, "label_set": sample.label_set}
        erased: Erased = self._pipeline(
            sample.image,
            [person.mask for person in people],
            prompt=None,
            prompt_embeds=self._text[0],
            pooled_prompt_embeds=self._text[1],
            generator=torch.Generator().manual_seed(derived_seed(self._settings.seed, "sample", sample.key)),
            output_type="np",
            **known,
        )
        return erased


def _people(sample: Sample) -> list[Person]:
    """Those of whom something is seen."""
    return [person for person in sample.people if person.mask.any()]


def _can_be_erased(sample: Sample) -> bool:
    masks = [person.mask for person in _people(sample)]
    return bool(masks) and not editable(np.stack(masks), range(len(masks))).all()


def _sheet(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Pictures (h, w, 3) uint8 in rows on white, each reduced to `TILE` if need be."""
    tiles = [[_reduced(picture) for picture in row] for row in rows]
    width = max(tile.width for row in tiles for tile in row) + GAP
    heights = [max(tile.height for tile in row) + GAP for row in tiles]
    size = (max(map(len, tiles)) * width - GAP, sum(heights) - GAP)
    sheet = Image.new("RGB", size, "white")
    for row, bottom, height in zip(tiles, itertools.accumulate(heights), heights, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (column * width, bottom - height))
    return np.asarray(sheet)


def _reduced(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    return image
