"""The steps of an evaluation, each on the cases of one shard: run a method, compute a metric, take features.

They know nothing of caching: flows call them, and keep what they write.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from mild.evaluation.cases import (
    RESULTS,
    CaseRow,
    case_of,
    read_judged,
    read_picture,
    read_truth,
    with_cues_of,
    write_picture,
)
from mild.evaluation.methods import Case, Eraser, MethodSettings, PassingFault, Setup
from mild.evaluation.settings import DatasetSettings
from mild.metrics.metric import UNKNOWN, DistributionMetric, Judged, NotComputed, PictureMetric
from mild.seeds import derived_seed

SCORES = pa.schema(
    [("key", pa.string()), ("masks", pa.string()), ("value", pa.float64()), ("not_computed", pa.string())]
)
"""Of one metric: a value, or why there is none."""

T = TypeVar("T")


class Bench:
    """Keeps one method in memory, so that its networks are loaded once, and forgotten before the next one's are."""

    def __init__(self) -> None:
        self._fingerprint = ""
        self._eraser: Eraser | None = None
        self._warm = False

    def erase_cases(
        self,
        method: MethodSettings,
        fingerprint: str,
        setup: Setup,
        samples: Iterable[Sample],
        settings: DatasetSettings,
        seed: int,
        folder: Path,
        done: Callable[[int], None],
        others: Iterable[Sample] = (),
    ) -> int:
        """Run a method on samples; writes a folder of results, see `mild.evaluation.cases`.

        What a method cannot do, alone or at all, is a row with its reason, and the others go on. The first call of a
        method that warms up is made twice, and timed the second time: what it loads and compiles at first is no time of
        a picture.

        Args:
            fingerprint: of the method.
            done: called with the number of cases that are done.
            others: for each sample that whose cues it is given in place of its own; none: its own.

        Returns:
            How many cases the method could not do this time (`PassingFault`), and may do the next.

        Raises:
            UserError: the method cannot be opened.
        """
        if fingerprint != self._fingerprint:
            self.clear()
            self._eraser, self._fingerprint, self._warm = method.open(setup), fingerprint, not method.warms_up
        folder.mkdir(parents=True, exist_ok=True)
        every = (
            case if other is None else with_cues_of(case, case_of(other, settings, kind))
            for sample, other in zip_longest(samples, others)
            for kind in settings.masks
            for case in [case_of(sample, settings, kind)]
        )
        # As `prepare_cases` has it: what shows nobody is no case.
        cases = (case for case in every if case.hole.any())
        rows, transient = [], 0
        for batch in _batches(cases, method.batch_size if _gpu() else 1):
            found, passing = self._erase(batch, [derived_seed(seed, case.key) for case in batch], folder)
            rows += found
            transient += passing
            done(len(batch))
        pq.write_table(pa.Table.from_pylist(rows, schema=RESULTS), folder / "results.parquet")
        return transient

    def clear(self) -> None:
        """Forget the method, and give its memory back."""
        self._eraser, self._fingerprint = None, ""
        if _gpu():
            import torch

            torch.cuda.empty_cache()

    def _erase(self, cases: Sequence[Case], seeds: Sequence[int], folder: Path) -> tuple[list[dict[str, Any]], int]:
        """Rows of results, and how many faults may pass."""
        failures = [_impossible(case) for case in cases]
        able = [index for index, failure in enumerate(failures) if not failure]
        given, chosen = [cases[index] for index in able], [seeds[index] for index in able]
        assert self._eraser is not None
        if given and not self._warm:
            _tried(self._eraser, given, chosen)
            self._warm = True
        _start_clock()
        started = time.perf_counter()
        results = _tried(self._eraser, given, chosen)
        _synchronize()
        seconds = (time.perf_counter() - started) / max(len(given), 1)
        peak = _peak_bytes()
        found = dict(zip(able, results, strict=True))
        rows = []
        for index, case in enumerate(cases):
            result = found.get(index, failures[index])
            if isinstance(result, np.ndarray):
                place = folder / case.key
                place.mkdir(exist_ok=True)
                write_picture(place / f"{case.kind}.png", result)
            rows.append(
                {
                    "key": case.key,
                    "masks": case.kind,
                    "seconds": seconds if isinstance(result, np.ndarray) else None,
                    "peak_bytes": peak,
                    "device": _device(),
                    "failure": "" if isinstance(result, np.ndarray) else str(result),
                }
            )
        return rows, sum(isinstance(result, PassingFault) for result in results)


def score_cases(metric: PictureMetric, cases: Path, results: Path, rows: Sequence[CaseRow], target: Path) -> None:
    """Compute a metric on the results of one method; writes a table `SCORES`.

    Args:
        cases, results: folders, see `mild.evaluation.cases`.
        rows: of the cases.
    """
    failures = {(row["key"], row["masks"]): row["failure"] for row in _read_results(results)}
    values: list[float | NotComputed] = [NotComputed("")] * len(rows)
    waiting: list[tuple[int, Judged]] = []

    def compute() -> None:
        for (index, _), value in zip(waiting, metric.score([judged for _, judged in waiting]), strict=True):
            values[index] = value
        waiting.clear()

    for index, (row, judged) in enumerate(zip(rows, read_judged(cases, results, rows), strict=True)):
        if judged is None:
            values[index] = NotComputed(f"no result: {failures.get((row.key, row.masks), 'it is missing')}")
        elif judged.truth is None and metric.reference != "none":
            values[index] = NotComputed(UNKNOWN)
        else:
            waiting.append((index, judged))
        if len(waiting) == metric.batch_size:
            compute()
    if waiting:
        compute()
    table = [
        {
            "key": row.key,
            "masks": row.masks,
            "value": None if isinstance(value, NotComputed) else value,
            "not_computed": str(value) if isinstance(value, NotComputed) else "",
        }
        for row, value in zip(rows, values, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(table, schema=SCORES), target)


def features_of_results(metric: DistributionMetric, results: Path, rows: Sequence[CaseRow], target: Path) -> int:
    """Features of all results of one method; writes (N, D) float32, gives N."""
    paths = (results / row.key / f"{row.masks}.png" for row in rows)
    return _write_features(metric, (read_picture(path) for path in paths if path.is_file()), target)


def features_of_known(
    metric: DistributionMetric, cases: Path, results: Path, rows: Sequence[CaseRow], target: Path
) -> int:
    """The same to compare with `features_of_truths`: both show the same places, and the same where nothing is known."""

    def pictures() -> Iterator[np.ndarray]:
        for row in rows:
            path = results / row.key / f"{row.masks}.png"
            if row.truth and path.is_file():
                truth, known = read_truth(cases / row.key)
                yield np.where(known[..., None], read_picture(path), truth)

    return _write_features(metric, pictures(), target)


def features_of_truths(metric: DistributionMetric, cases: Path, rows: Sequence[CaseRow], target: Path) -> int:
    """Features of the clean background of each case that has one, as `features_of_results`: once a kind of masks."""
    return _write_features(metric, (read_picture(cases / row.key / "truth.png") for row in rows if row.truth), target)


def features_of_plates(metric: DistributionMetric, samples: Iterable[Sample], target: Path) -> int:
    """Features of pictures that show nobody: the clean backgrounds of samples."""
    plates = (sample.background for sample in samples)
    return _write_features(metric, (plate for plate in plates if plate is not None), target)


def _write_features(metric: DistributionMetric, pictures: Iterable[np.ndarray], target: Path) -> int:
    parts = [metric.features(batch) for batch in _batches(pictures, metric.batch_size)]
    features = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
    with target.open("wb") as file:
        np.save(file, features)
    return len(features)


def _read_results(results: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = pq.read_table(results / "results.parquet").to_pylist()
    return found


def _tried(eraser: Eraser, cases: Sequence[Case], seeds: Sequence[int]) -> list[np.ndarray | UserError]:
    """Each case's result, or why there is none: together, and where that fails each alone."""
    if not cases:
        return []
    try:
        return list(eraser.erase(cases, seeds))
    except UserError as error:
        if len(cases) == 1:
            return [error]
    return [result for case, seed in zip(cases, seeds, strict=True) for result in _tried(eraser, [case], [seed])]


def _impossible(case: Case) -> str:
    """Why no method can do a case; empty where one may."""
    return "the masks cover the whole picture: leave some background to go by" if case.hole.all() else ""


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _device() -> str:
    """What the results were computed on, for people."""
    if _gpu():
        import torch

        return torch.cuda.get_device_name()
    return f"{platform.machine()} processor, {os.cpu_count()} cores"


def _synchronize() -> None:
    if _gpu():
        import torch

        torch.cuda.synchronize()


def _start_clock() -> None:
    _synchronize()
    if _gpu():
        import torch

        torch.cuda.reset_peak_memory_stats()


def _peak_bytes() -> int | None:
    if not _gpu():
        return None
    import torch

    return torch.cuda.max_memory_allocated()
