"""The data path: what training steps see is made ready beside them, by workers of torch's ``DataLoader``.

A worker reads samples, draws their views, faulty masks, cues, time steps and noise, and makes the examples; networks,
and the device, are left to the training process. All randomness comes from the seed, the step and the sample's key, so
that the number of workers changes no bit, nor does where a run goes on.

Workers are spawned: what is forked from a process with threads (of CUDA, OpenCV, or what reads a network) may wait for
ever for one that it does not have. So samples and latents are pickled once, and open their files anew; what a worker
imports is kept small: neither diffusers nor transformers.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset_tools.errors import UserError, what_to_mend
from dataset_tools.schema import Sample
from dataset_tools.shards import Samples
from mild.model.cues import Cue
from mild.seeds import derived_seed
from mild.settings import HmgSettings, TrainSettings
from mild.training.batches import Batch, View, draw_fixed_view, draw_person, draw_view, make_batch, make_cues

if TYPE_CHECKING:
    from mild.model.backbone import Branch
    from mild.training.fresh import FreshComposites
    from mild.training.latents import Latents


@dataclass(frozen=True)
class Work:
    """What one pass of a training step is made of."""

    step: int
    """Counted from 0."""
    branches: tuple[Branch, ...]
    """Those that it trains."""
    indices: tuple[int, ...]
    """Of its B samples."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """B samples as one step sees them, as far as no network is needed; on the processor."""

    batches: dict[Branch, Batch]
    """Examples of each branch that is trained, of the same views; of fixed views that are not stored, of both."""
    latents: dict[str, torch.Tensor]
    """Those of fixed views that are stored, (B, C, h, w) float32 by the names of `mild.training.latents`, or none."""
    timesteps: torch.Tensor | None
    """(B,) int64; None where the states that are trained on say which (`mild.settings.TrainSettings.states`)."""
    noise: torch.Tensor
    """(B, C, h, w) float32."""
    cues: dict[str, Cue | None]
    """`mild.training.batches.make_cues`; empty without HMG."""


@dataclass(frozen=True, eq=False)
class TrainingData(Dataset[Drawn | UserError]):
    """Passes of training steps, by their `Work`.

    What the user must mend comes as a `UserError` that is given, not raised: ``DataLoader`` would hand on the
    traceback in its place. Any other error is raised.
    """

    samples: Samples
    settings: TrainSettings
    hmg: HmgSettings | None
    """Of the model; None where it has none."""
    shape: tuple[int, int, int]
    """Of a latent, (C, h, w)."""
    timesteps: int
    """How many the base was trained on."""
    latents: Latents | None
    """Of the samples' fixed views, where they are stored."""
    fresh: FreshComposites | None = None
    """Makes what is seen in the place of composites."""

    def __getitem__(self, work: Work) -> Drawn | UserError:
        try:
            return self.drawn(work.step, work.branches, [self._sample(work.step, index) for index in work.indices])
        except Exception as error:
            if (complaint := what_to_mend(error)) is None:
                raise
            return UserError(complaint)

    def _sample(self, step: int, index: int) -> Sample:
        sample = self.samples[index]
        if self.fresh is None or sample.configuration != "composite":
            return sample
        return self.fresh.instead_of(sample, step)

    def drawn(self, step: int, branches: Sequence[Branch], samples: Sequence[Sample]) -> Drawn:
        """What a step sees of samples. Raises `UserError` where one cannot be used."""
        settings, hmg = self.settings, self.hmg
        # One generator a sample and step: view, time step, noise and which cues are withheld, in this order.
        draws = [np.random.default_rng(derived_seed(settings.seed, step, sample.key)) for sample in samples]
        latents: dict[str, torch.Tensor] = {}
        if settings.cached_views is None:
            views = self._new_views(samples, step, draws)
        else:
            numbers = [int(draw.integers(settings.cached_views)) for draw in draws]
            chosen = list(zip(samples, numbers, strict=True))
            views = [draw_fixed_view(sample, number, settings) for sample, number in chosen]
            if self.latents is not None:
                rows = [self.latents.read(sample, number) for sample, number in chosen]
                latents = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        timesteps = None
        if settings.states == "noised":
            timesteps = torch.tensor([int(draw.integers(self.timesteps)) for draw in draws])
        noise = [torch.from_numpy(draw.standard_normal(self.shape, np.float32)) for draw in draws]
        withheld = [] if hmg is None else [draw.random(3) < hmg.dropout for draw in draws]
        if settings.cached_views is not None and not latents:
            branches = ("bg", "fg")  # which are encoded together (`mild.training.latents.encode_fixed`)
        start = settings.states == "visited"
        return Drawn(
            {branch: make_batch(branch, views, settings.resolution, start=start) for branch in branches},
            latents,
            timesteps,
            torch.stack(noise),
            {} if hmg is None else make_cues(views, withheld, hmg),
        )

    def _new_views(self, samples: Sequence[Sample], step: int, draws: Sequence[np.random.Generator]) -> list[View]:
        """A view of each sample that no other step has; its person is drawn first."""
        chosen = [draw_person(sample, draw) for draw, sample in zip(draws, samples, strict=True)]
        # A generator of their own, for as many numbers as views take.
        seeds = [derived_seed(self.settings.seed, step, sample.key, "view") for sample in samples]
        return [
            draw_view(sample, index, self.settings, np.random.default_rng(seed))
            for sample, index, seed in zip(samples, chosen, seeds, strict=True)
        ]


def fed(data: TrainingData, works: Iterable[Work]) -> Generator[Drawn, None, None]:
    """Passes in the order of ``works``, by the workers of the settings; close it, and they end.

    Raises:
        UserError: a sample cannot be read or used; when its turn has come, however early a worker met it.
    """
    workers = data.settings.workers
    loader: Any = iter(
        DataLoader(
            data,
            batch_size=None,
            sampler=works,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=_begin,
            # It draws a number, which would otherwise be one of the caller's.
            generator=torch.Generator(),
        )
    )
    try:
        for found in loader:
            if isinstance(found, UserError):
                raise found
            yield found
    finally:
        if workers:
            # Not left to the garbage collector: whoever handles an error may hold the loader until Python ends, which
            # would then wait for workers that nobody has told.
            loader._shutdown_workers()


def _begin(worker: int) -> None:
    """In a worker, first of all."""
    # Schedulers signal every process of a job. Training takes its step, saves and ends then, and its workers after it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # A thread that hands over an example is in C++ for a while, which aborts when Python ends under it. Processes that
    # are forked end so too.
    atexit.register(os._exit, 0)
    # There are as many workers as are to compute at once.
    cv2.setNumThreads(1)
