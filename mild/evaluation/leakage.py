"""How much leaks in MILD (section 3.1), and what every method leaves in the hole (figure 2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mild.evaluation.cases import CaseRow, read_judged
from mild.evaluation.methods import Case, Setup
from mild.evaluation.methods.mild import WindowsMethod
from mild.evaluation.summary import Leakage, Spectrum
from mild.seeds import derived_seed

if TYPE_CHECKING:
    import torch

    from mild.model.leakage import BlockLeakage


def leakage_of(method: WindowsMethod, setup: Setup, cases: Iterable[Case], seed: int) -> Leakage:
    """Gamma (eq. 1) and cross-domain mass of each self-attention block and step of the background branch.

    Each with SMA as it is and without its bias, medians over heads and windows; foreground is what is to be erased.
    Blocks in which no token is foreground have no gamma, and are nan there.
    """
    from mild.model.leakage import measure_leakage

    eraser = method.open(setup)
    pipeline = eraser.pipeline
    recorded: list[list[BlockLeakage]] = []

    @contextlib.contextmanager
    def watch(masks: torch.Tensor) -> Iterator[None]:
        with measure_leakage(pipeline.unet, masks) as records:
            yield
        recorded.append(records)

    pipeline.watch = watch
    count = 0
    try:
        for case in cases:
            eraser.erase([case], [derived_seed(seed, case.key)])
            count += 1
    finally:
        # It knows the pipeline, whose memory would not be given back.
        pipeline.watch = None
    records = [record for window in recorded for record in window]
    blocks = list(dict.fromkeys(record.block for record in records))
    steps = sorted({record.step for record in records})
    times = {record.step: round(record.timestep) for record in records}

    def table(which: str, what: str) -> list[list[float | None]]:
        found: dict[tuple[str, int], list[np.ndarray]] = {}
        for record in records:
            found.setdefault((record.block, record.step), []).append(_values(getattr(getattr(record, which), what)))
        return [[_median(found.get((block, step), [])) for step in steps] for block in blocks]

    return Leakage(
        method=method.name,
        pictures=count,
        blocks=blocks,
        steps=[times[step] for step in steps],
        gamma=table("modulated", "gamma"),
        gamma_vanilla=table("vanilla", "gamma"),
        cross_mass=table("modulated", "cross_mass"),
        cross_mass_vanilla=table("vanilla", "cross_mass"),
    )


def spectrum_of(method: str, cases: Path, results: Path, rows: Sequence[CaseRow]) -> Spectrum:
    """Mean residual spectrum of a method's results, in all holes as far as the clean background is known there.

    There may be none.
    """
    from mild.model.leakage import residual_spectrum

    found, frequencies = [], np.zeros(0)
    for judged in read_judged(cases, results, [row for row in rows if row.truth]):
        if judged is not None and judged.truth is not None and (judged.hole & judged.known).any():
            frequencies, amplitude = residual_spectrum(judged.result, judged.truth, judged.hole & judged.known)
            found.append(amplitude)
    # Small pictures have no frequency in some rings.
    known = np.isfinite(found).any(0) if found else np.zeros(0, bool)
    mean = np.nanmean(np.array(found)[:, known], axis=0) if found else np.zeros(0)
    return Spectrum(
        method=method, pictures=len(found), frequencies=frequencies[known].tolist(), amplitude=mean.tolist()
    )


def _values(tensor: Any) -> np.ndarray:
    values: np.ndarray = tensor.flatten().numpy()
    return values[np.isfinite(values)]


def _median(parts: Sequence[np.ndarray]) -> float | None:
    values = np.concatenate(parts) if parts else np.zeros(0)
    return float(np.median(values)) if len(values) else None
