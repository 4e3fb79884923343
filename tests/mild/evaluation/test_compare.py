from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from mild.evaluation import compare
from mild.evaluation.cases import CaseRow, prepare_cases, read_picture
from mild.evaluation.compare import (
    Bench,
    features_of_known,
    features_of_plates,
    features_of_results,
    features_of_truths,
    score_cases,
)
from mild.evaluation.methods import Case, MethodSettings, Setup
from mild.evaluation.settings import DatasetSettings
from mild.metrics.metric import DistributionMetric, Judged, NotComputed, PictureMetric, Region

MakeSample = Callable[..., Sample]
NOWHERE = Setup("", "", 1, "")


class Inverting(MethodSettings):
    """Inverts what is in the hole; one key it cannot do."""

    kind: str = "inverting"
    fails: str = ""
    calls: list[Any]

    @property
    def title(self) -> str:
        return self.kind

    def weights(self, setup: Setup) -> dict[str, str]:
        return {}

    def fingerprint(self, setup: Setup) -> str:
        return f"{self.kind} {self.fails}"

    def open(self, setup: Setup) -> Inverting:
        self.calls.append("open")
        return self

    def erase(self, cases: Sequence[Case], seeds: Sequence[int]) -> list[np.ndarray]:
        self.calls.append([(case.key, case.kind, seed) for case, seed in zip(cases, seeds, strict=True)])
        if self.fails in {case.key for case in cases}:
            raise UserError("this one is too hard")
        return [np.where(case.hole[..., None], 255 - case.image, case.image) for case in cases]


class Mean(PictureMetric):
    """Mean of the result; needs a truth."""

    kind: str = "mean"

    title: ClassVar[str] = "Mean"  # type: ignore[misc]
    larger_is_better: ClassVar[bool] = True  # type: ignore[misc]
    digits: ClassVar[int] = 1  # type: ignore[misc]
    region: ClassVar[Region] = "picture"  # type: ignore[misc]

    def score(self, judged: Sequence[Judged]) -> list[float | NotComputed]:
        return [float(one.result.mean()) for one in judged]


class MeanColours(DistributionMetric):
    """Features are mean colours."""

    kind: str = "colours"

    title: ClassVar[str] = "Colours"  # type: ignore[misc]
    larger_is_better: ClassVar[bool] = False  # type: ignore[misc]
    digits: ClassVar[int] = 1  # type: ignore[misc]
    region: ClassVar[Region] = "picture"  # type: ignore[misc]

    def features_fingerprint(self) -> str:
        return "colours"

    def features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([picture.mean((0, 1)) for picture in pictures]).astype(np.float32)

    def distance(self, results: Any, reference: Any, seed: int) -> float:
        raise NotImplementedError


def _run(
    samples: Sequence[Sample] | Iterator[Sample], folder: Path, method: MethodSettings, **settings: Any
) -> list[dict[str, Any]]:
    bench = Bench()
    bench.erase_cases(
        method, method.fingerprint(NOWHERE), NOWHERE, samples, DatasetSettings(**settings), 7, folder, lambda done: None
    )
    rows: list[dict[str, Any]] = pq.read_table(folder / "results.parquet").to_pylist()
    return rows


def test_every_case_has_a_result_and_a_time(tmp_path: Path, make_sample: MakeSample) -> None:
    samples = [make_sample(index) for index in range(2)]
    rows = _run(samples, tmp_path, Inverting(calls=[]), masks=("exact", "augmented"))
    assert [(row["key"], row["masks"]) for row in rows] == [
        (sample.key, masks) for sample in samples for masks in ("exact", "augmented")
    ]
    hole = np.logical_or.reduce([person.mask for person in samples[1].people])
    expected = np.where(hole[..., None], 255 - samples[1].image, samples[1].image)
    assert np.array_equal(read_picture(tmp_path / samples[1].key / "exact.png"), expected)
    assert all(row["seconds"] > 0 and row["failure"] == "" for row in rows)


def test_the_first_call_is_not_timed_and_the_method_is_opened_once(tmp_path: Path, make_sample: MakeSample) -> None:
    """Over two shards: opened, one call that warms up, then one a case."""
    method, bench = Inverting(calls=[]), Bench()
    for number in range(2):
        samples = [make_sample(2 * number + index) for index in range(2)]
        bench.erase_cases(
            method,
            method.fingerprint(NOWHERE),
            NOWHERE,
            samples,
            DatasetSettings(),
            0,
            tmp_path / str(number),
            lambda done: None,
        )
    assert [call if call == "open" else call[0][0] for call in method.calls] == [
        "open",
        "sample-0",
        "sample-0",
        "sample-1",
        "sample-2",
        "sample-3",
    ]


def test_seeds_are_of_the_sample_and_the_run(tmp_path: Path, make_sample: MakeSample) -> None:
    """The same for each kind of masks, so that these differ by their masks alone."""
    method = Inverting(calls=[])
    _run([make_sample(0), make_sample(1)], tmp_path, method, masks=("exact", "augmented"))
    seeds = {(key, masks): seed for call in method.calls if call != "open" for key, masks, seed in call}
    assert seeds["sample-0", "exact"] == seeds["sample-0", "augmented"] != seeds["sample-1", "exact"]


def test_what_a_method_cannot_do_is_told_and_the_others_are_done(
    tmp_path: Path, make_sample: MakeSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a batch, whose other cases are then done alone."""
    full = make_sample(3, people=1)
    full.people[0].mask = np.ones_like(full.people[0].mask)
    samples = [make_sample(0), make_sample(1), make_sample(2), full]
    monkeypatch.setattr(compare, "_batches", lambda items, size: iter([list(items)]))
    rows = _run(samples, tmp_path, Inverting(fails="sample-1", calls=[]))
    assert [row["failure"].split(":")[0] for row in rows] == [
        "",
        "this one is too hard",
        "",
        "the masks cover the whole picture",
    ]
    assert [row["seconds"] is None for row in rows] == [False, True, False, True]
    assert sorted(path.parent.name for path in tmp_path.glob("*/exact.png")) == ["sample-0", "sample-2"]


def test_few_samples_are_held_however_many_there_are(tmp_path: Path, make_sample: MakeSample) -> None:
    alive: weakref.WeakSet[Sample] = weakref.WeakSet()
    most = 0

    def samples() -> Iterator[Sample]:
        nonlocal most
        for index in range(60):
            sample = make_sample(index, height=16, width=16)
            alive.add(sample)
            most = max(most, len(alive))
            yield sample

    assert len(_run(samples(), tmp_path, Inverting(calls=[]))) == 60
    assert most <= 3


@pytest.fixture
def erased(tmp_path: Path, make_sample: MakeSample) -> tuple[Path, Path, list[CaseRow], list[Sample]]:
    """Folders of cases and results, of four samples: one failed, one has no clean background."""
    samples = [make_sample(index) for index in range(4)]
    samples[3].background, samples[3].configuration = None, "real"
    rows = prepare_cases(samples, DatasetSettings(), tmp_path / "cases")
    _run(samples, tmp_path / "results", Inverting(fails="sample-1", calls=[]))
    return tmp_path / "cases", tmp_path / "results", rows, samples


def test_a_metric_gives_each_case_a_value_or_a_reason(
    erased: tuple[Path, Path, list[CaseRow], list[Sample]], tmp_path: Path
) -> None:
    cases, results, rows, _ = erased
    score_cases(Mean(batch_size=2), cases, results, rows, tmp_path / "scores.parquet")
    table = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert [row["key"] for row in table] == [f"sample-{index}" for index in range(4)]
    for row in (table[0], table[2]):
        assert row["value"] == pytest.approx(read_picture(results / row["key"] / "exact.png").mean())
    assert [row["not_computed"] for row in table] == [
        "",
        "no result: this one is too hard",
        "",
        "no clean background is known",
    ]
    assert table[1]["value"] is table[3]["value"] is None


def test_a_metric_without_a_reference_needs_no_clean_background(
    erased: tuple[Path, Path, list[CaseRow], list[Sample]], tmp_path: Path
) -> None:
    class Alone(Mean):
        reference: ClassVar[str] = "none"  # type: ignore[misc]

    cases, results, rows, _ = erased
    score_cases(Alone(), cases, results, rows, tmp_path / "scores.parquet")
    table = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert [row["value"] is None for row in table] == [False, True, False, False]


def test_features_of_results_and_their_reference_are_of_the_same_places(
    erased: tuple[Path, Path, list[CaseRow], list[Sample]], tmp_path: Path
) -> None:
    cases, results, rows, samples = erased
    metric, target = MeanColours(batch_size=2), tmp_path / "features.npy"
    assert features_of_results(metric, results, rows, target) == 3
    assert features_of_known(metric, cases, results, rows, target) == 2
    assert features_of_truths(metric, cases, rows, target) == 3
    assert features_of_plates(metric, samples, target) == 3
    plates = [sample.background.mean((0, 1)) for sample in samples if sample.background is not None]
    assert np.load(target) == pytest.approx(np.array(plates, np.float32))


def test_results_are_given_the_colours_of_their_reference_where_that_is_not_known(
    tmp_path: Path, make_sample: MakeSample
) -> None:
    """Half of the picture is not known: results are inverted pictures in the other half alone."""
    sample = make_sample(0)
    assert sample.background is not None
    sample.known = np.arange(64) + np.zeros((48, 1)) < 32
    rows = prepare_cases([sample], DatasetSettings(), tmp_path / "cases")
    _run([sample], tmp_path / "results", Inverting(calls=[]))
    target = tmp_path / "features.npy"
    features_of_known(MeanColours(), tmp_path / "cases", tmp_path / "results", rows, target)
    result = read_picture(tmp_path / "results" / sample.key / "exact.png")
    shown = np.concatenate([result[:, :32], sample.background[:, 32:]], axis=1)
    assert np.load(target)[0] == pytest.approx(shown.mean((0, 1)), rel=1e-5)
