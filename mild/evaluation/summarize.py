"""From the tables of all methods and metrics to `mild.evaluation.summary.Summary`: means, intervals, differences.

Intervals are 95 % percentile bootstrap intervals of a mean over pictures. Pictures are drawn, each with all of its
values: those of one picture with other masks are no news of their own. Of an arm, seeds of training are drawn as well,
beside the pictures (Owen 2007, The pigeonhole bootstrap); of few seeds, such intervals are rather too narrow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from mild.evaluation.cases import CaseRow
from mild.evaluation.settings import EvaluateSettings
from mild.evaluation.summary import (
    Cell,
    Change,
    Comparison,
    Estimate,
    Group,
    Headline,
    MethodRow,
    MetricRow,
    with_every_part,
)
from mild.seeds import derived_seed

CONFIDENCE = 0.95
_DRAWN = 4_000_000
"""Values that the bootstrap draws at a time, which bounds its memory."""


@dataclass
class Values:
    """What all methods reached on the cases of one dataset."""

    dataset: str
    cases: list[CaseRow] = field(default_factory=list)
    scores: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Method to metric to one float64 a case: infinite for identical pictures, nan where there is none."""
    reasons: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)
    """Method to metric to case to why there is no value."""
    seconds: dict[str, np.ndarray] = field(default_factory=dict)
    """Method to one float64 a case; nan where there is no result."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Method to the most GPU memory that it took; nothing without a GPU."""
    device: dict[str, str] = field(default_factory=dict)
    """Method to what it ran on."""
    whole: dict[str, dict[str, Cell]] = field(default_factory=dict)
    """Method to distribution metric to what it is over all cases."""

    def __post_init__(self) -> None:
        self._at: dict[tuple[str, str], int] = {}

    def add_cases(self, rows: Sequence[CaseRow]) -> None:
        """Cases of one more shard; before any result."""
        for row in rows:
            self._at[row.key, row.masks] = len(self.cases)
            self.cases.append(row)

    def add_results(self, method: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """How long a method took: rows of `mild.evaluation.cases.RESULTS`."""
        self.scores.setdefault(method, {})
        self.reasons.setdefault(method, {})
        seconds = self.seconds.setdefault(method, np.full(len(self.cases), np.nan))
        for row in rows:
            # What shows nobody is no case.
            if (index := self._at.get((row["key"], row["masks"]))) is not None and row["seconds"] is not None:
                seconds[index] = row["seconds"]
            self.device[method] = row["device"]
            if row["peak_bytes"] is not None:
                self.peak_bytes[method] = max(self.peak_bytes.get(method, 0), row["peak_bytes"])

    def add_scores(self, method: str, metric: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Values of a metric: rows of `mild.evaluation.compare.SCORES`."""
        values = self.scores[method].setdefault(metric, np.full(len(self.cases), np.nan))
        reasons = self.reasons[method].setdefault(metric, {})
        for row in rows:
            index = self._at[row["key"], row["masks"]]
            if row["value"] is None:
                reasons[index] = row["not_computed"]
            else:
                values[index] = row["value"]

    def values_of(self, method: str, case: int) -> dict[str, float | None]:
        """Metric to value of one result."""
        return {metric: _or_none(values[case]) for metric, values in self.scores[method].items()}

    def reasons_of(self, method: str, case: int) -> list[str]:
        """What has no value, and why."""
        return [f"{metric}: {reasons[case]}" for metric, reasons in self.reasons[method].items() if case in reasons]


@dataclass(frozen=True)
class How:
    """What decides about estimates."""

    baseline: str
    """Method, or arm, that differences are taken to."""
    own: str
    """Method, or arm, whose difference to the baseline is the headline's: the full one, or else the first of MILD's;
    empty: that of whoever leads."""
    full: str
    """MILD method, or arm, of which every part works that works in any; empty where there is none, or one alone."""
    below: dict[str, str]
    """Method, or arm, to that which is a part less; of an arm's methods the arm speaks."""
    arms: dict[str, list[str]]
    """Arm to its methods, by the seeds of their trainings where these are known."""
    seeds: dict[str, int | None]
    """Method to the seed of its training."""
    titles: dict[str, str]
    """Of methods and arms."""
    metrics: Sequence[MetricRow]
    seed: int
    resamples: int

    @classmethod
    def of(cls, methods: Sequence[MethodRow], metrics: Sequence[MetricRow], recipe: EvaluateSettings) -> How:
        """For what was run."""
        arms: dict[str, list[str]] = {}
        for method in methods:
            if method.arm and not method.not_run:
                arms.setdefault(method.arm, []).append(method.name)
        seeds = {row.name: row.seed for row in methods}
        for members in arms.values():
            members.sort(key=lambda name: -1 if (seed := seeds[name]) is None else seed)
        run = [row for row in methods if not row.not_run]
        ours = [row for row in run if row.kind == "mild"]
        whole = [row.arm or row.name for row in with_every_part(ours)]
        full = whole[0] if whole and len({row.arm or row.name for row in ours}) > 1 else ""
        return cls(
            baseline=recipe.compared_with(),
            full=full,
            own=full or next((row.arm or row.name for row in ours), ""),
            below={row.arm if len(arms.get(row.arm, [])) > 1 else row.name: row.below for row in run if row.below},
            arms=arms,
            seeds=seeds,
            titles={**{row.name: row.title for row in methods}, **{arm: arm for arm in arms}},
            metrics=metrics,
            seed=recipe.seed,
            resamples=recipe.resamples,
        )


def groups_of(values: Values, how: How) -> list[Group]:
    """All cases of a dataset, and where there is more than one kind of them, each kind."""
    scores = _with_arms(values, how)
    return [
        Group(
            name=name,
            dataset=values.dataset,
            cases=int(members.sum()),
            cells=_ranked(
                {
                    method: {
                        **{metric: _cell(values, method, metric, found, members, how) for metric, found in own.items()},
                        **(_whole(values, method, how) if not name else {}),
                    }
                    for method, own in scores.items()
                },
                scores,
                members,
            ),
            differences=_differences(values, scores, members, how, how.baseline),
            to_full=_differences(values, scores, members, how, how.full),
            to_below={
                method: _difference(values, scores, members, how, method, below)
                for method, below in how.below.items()
                if method in scores and below in scores
            },
        )
        for name, members in _members(values.cases)
    ]


def headline_of(groups: Sequence[Group], how: How) -> Headline | None:
    """Who leads, by the first metric that anybody has a rank by, over all cases of the first dataset; None where nobody
    has.

    Of an arm's methods the arm speaks.
    """
    if not groups:
        return None
    group, in_arms = groups[0], {method for methods in how.arms.values() for method in methods}
    for metric in how.metrics:
        reached = {
            name: cells[metric.name].ranked
            for name, cells in group.cells.items()
            if name not in in_arms and metric.name in cells and cells[metric.name].ranked is not None
        }
        if reached:
            ranked = sorted(reached, key=lambda name: reached[name] or 0.0, reverse=metric.larger_is_better)
            return _headline(group, metric, ranked[0], how)
    return None


def estimate(keys: Sequence[str], values: np.ndarray, seed: int, resamples: int) -> Estimate:
    """Mean of the finite values, and the interval of that mean; None where unknown.

    Args:
        keys: of the pictures that the values are of.
        values: float64, one a case; or (S, cases), of which a case counts where it has a value of each of S trainings.
        seed: decides what is drawn.
    """
    from scipy.stats import bootstrap

    values = np.atleast_2d(values)
    known = np.isfinite(values).all(0)
    if not known.any():
        return Estimate()
    _, picture = np.unique(np.asarray(keys)[known], return_inverse=True)
    sums, counts = np.array([np.bincount(picture, row[known]) for row in values]), np.bincount(picture)
    trainings, pictures = map(np.arange, sums.shape)

    def drawn(*indices: np.ndarray, axis: int) -> np.ndarray:
        """Mean of all values of what is drawn: (..., pictures), or (..., trainings) and (..., pictures)."""
        columns = indices[-1].astype(int)
        rows = indices[0].astype(int) if len(indices) > 1 else np.zeros((1,) * columns.ndim, int)
        drawn_sums = sums[rows[..., :, None], columns[..., None, :]].mean(-2).sum(-1)
        mean: np.ndarray = drawn_sums / counts[columns].sum(-1)
        return mean

    low = high = None
    if len(pictures) > 1:
        interval = bootstrap(
            (trainings, pictures) if len(trainings) > 1 else (pictures,),
            drawn,
            n_resamples=resamples,
            batch=max(1, _DRAWN // sums.size),
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Estimate(mean=float(values[:, known].mean()), low=low, high=high)


def rows_of(values: Values) -> pa.Table:
    """A row a case and method: what it is, its values, seconds, and what was not computed and why."""
    metrics = sorted({metric for scores in values.scores.values() for metric in scores})
    schema = pa.schema(
        [
            ("dataset", pa.string()),
            ("key", pa.string()),
            ("masks", pa.string()),
            ("method", pa.string()),
            ("pictures", pa.string()),
            ("people", pa.int64()),
            ("overlap", pa.bool_()),
            ("hole_share", pa.float64()),
            *((metric, pa.float64()) for metric in metrics),
            ("seconds", pa.float64()),
            ("not_computed", pa.list_(pa.string())),
        ]
    )
    rows: list[dict[str, Any]] = [
        {
            "dataset": values.dataset,
            "key": case.key,
            "masks": case.masks,
            "method": method,
            "pictures": case.pictures,
            "people": case.people,
            "overlap": case.overlap,
            "hole_share": case.hole_share,
            **values.values_of(method, index),
            "seconds": _or_none(values.seconds[method][index]),
            "not_computed": values.reasons_of(method, index),
        }
        for index, case in enumerate(values.cases)
        for method in values.scores
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def compare_with(place: str, before: pa.Table, now: pa.Table, how: How) -> Comparison:
    """What got better or worse since another run: the same methods by the same metrics on the same pictures.

    Args:
        place: of the other run.
        before, now: as `rows_of` gives them.
    """
    former = {_identity(row): row for row in before.to_pylist()}
    of_today = now.to_pylist()
    namesakes = [(row, former[_identity(row)]) for row in of_today if _identity(row) in former]
    current = [(row, other) for row, other in namesakes if row["pictures"] == other["pictures"]]
    changes, left_out, lost = [], list[str](), list[str]()
    todays = list(dict.fromkeys((row["dataset"], row["method"]) for row in of_today))
    datasets = {dataset for dataset, _ in todays}
    same = {_case(row) for row, _ in current}
    changed = {_case(row) for row, _ in namesakes} - same
    missing = {_case(row) for row in former.values()} - {_case(row) for row in of_today}
    for dataset in sorted(datasets):
        # Where nothing can be held against that run, nobody knows that nothing got worse.
        told = left_out if _of(same, dataset) else lost
        if others := _of(changed, dataset):
            told.append(f"{dataset}: {len(others)} cases show other pictures than that run's of the same name")
        if none_now := _of(missing, dataset):
            told.append(f"{dataset}: {len(none_now)} cases of that run are not among these")
    for dataset, method in dict.fromkeys((row["dataset"], row["method"]) for row in former.values()):
        if dataset in datasets and (dataset, method) not in todays:
            # One that a recipe no longer names is no loss.
            gone_by = lost if method in how.titles else left_out
            gone_by.append(f"{method} on {dataset}: that run has results of it, this one has none")
    for dataset, method in todays:
        pairs = [pair for pair in current if (pair[0]["dataset"], pair[0]["method"]) == (dataset, method)]
        if not pairs:
            left_out.append(f"{method} on {dataset}: that run has none of these cases")
            continue
        for metric in how.metrics:
            if metric.name not in before.column_names:
                if metric.name in now.column_names:
                    left_out.append(f"{metric.title}: that run did not compute it")
                elif not metric.not_run:
                    left_out.append(f"{metric.title}: it is of all pictures together, and is not compared")
                continue
            values = [_both(pair, metric.name) for pair in pairs]
            both = np.array([list(map(_number, pair)) for pair in values if None not in pair]).reshape(-1, 2)
            keys = [pair[0]["key"] for pair, known in zip(pairs, values, strict=True) if None not in known]
            where = f"{method} on {dataset}: {metric.title} of"
            if gone := sum(now_value is None and old_value is not None for now_value, old_value in values):
                lost.append(f"{where} {gone} pictures was computed in that run, not in this")
            if parted := int((np.isinf(both[:, 1]) & np.isfinite(both[:, 0])).sum()):
                lost.append(f"{where} {parted} pictures was that of identical ones in that run, and is not in this")
            finite = np.isfinite(both).all(1)
            if not finite.any():
                continue
            seed = derived_seed(how.seed, "against", dataset, method, metric.name)
            kept = [key for key, known in zip(keys, finite, strict=True) if known]
            difference = estimate(kept, both[finite, 0] - both[finite, 1], seed, how.resamples)
            better = (difference.mean or 0.0) > 0 if metric.larger_is_better else (difference.mean or 0.0) < 0
            changes.append(
                Change(
                    dataset=dataset,
                    method=method,
                    metric=metric.name,
                    before=float(both[finite, 1].mean()),
                    now=float(both[finite, 0].mean()),
                    difference=difference,
                    verdict="same" if not difference.told_apart else "better" if better else "worse",
                )
            )
    return Comparison(place=place, changes=changes, left_out=list(dict.fromkeys(left_out)), lost=lost)


def with_times(method: MethodRow, values: Sequence[Values]) -> MethodRow:
    """The method with its mean time a picture, and the most memory that it took, over all datasets."""
    seconds = np.concatenate([np.zeros(0), *(own.seconds[method.name] for own in values if method.name in own.seconds)])
    peaks = [own.peak_bytes[method.name] for own in values if method.name in own.peak_bytes]
    known = seconds[np.isfinite(seconds)]
    return method.model_copy(
        update={
            "seconds": float(known.mean()) if len(known) else None,
            "device": next((own.device[method.name] for own in values if method.name in own.device), ""),
            "peak_megabytes": max(peaks) / 1e6 if peaks else None,
        }
    )


def worth_showing(values: Sequence[Values], how: How, count: int) -> list[tuple[Values, int]]:
    """Cases for the gallery: half of them the worst of our own method by the first metric, the others as they come."""
    every = [(own, index) for own in values for index in range(len(own.cases))]
    ours = how.arms.get(how.own, [how.own])[0]
    metric = next((one for one in how.metrics if any(one.name in own.scores.get(ours, {}) for own in values)), None)
    worst: list[tuple[Values, int]] = []
    if metric is not None:
        ranked = [
            (float(own.scores[ours][metric.name][index]), number)
            for number, (own, index) in enumerate(every)
            if metric.name in own.scores.get(ours, {}) and np.isfinite(own.scores[ours][metric.name][index])
        ]
        ranked.sort(reverse=not metric.larger_is_better)
        worst = [every[number] for _, number in ranked[: count // 2]]
    others = [one for one in every if not any(one[0] is own and one[1] == index for own, index in worst)]
    return [*worst, *others][:count]


def _members(cases: Sequence[CaseRow]) -> Iterator[tuple[str, np.ndarray]]:
    """Name of each group and which cases are in it; the first has all of them."""
    yield "", np.ones(len(cases), bool)
    kinds = dict.fromkeys(case.masks for case in cases)
    overlap = np.array([case.overlap for case in cases])
    for masks in kinds:
        given = np.array([case.masks == masks for case in cases])
        if len(kinds) > 1:
            yield f"{masks} masks", given
        if overlap[given].any() and not overlap[given].all():
            yield f"people apart, {masks} masks", given & ~overlap
            yield f"people overlap, {masks} masks", given & overlap


def _with_arms(values: Values, how: How) -> dict[str, dict[str, np.ndarray]]:
    """The scores (S, cases) of every method, S = 1, and of every arm, those of its S methods."""
    together = {**{method: [method] for method in values.scores}, **how.arms}
    return {
        name: {metric: np.array([values.scores[method][metric] for method in methods]) for metric in metrics}
        for name, methods in together.items()
        for metrics in [values.scores[methods[0]]]
    }


def _cell(values: Values, method: str, metric: str, scores: np.ndarray, members: np.ndarray, how: How) -> Cell:
    keys = [case.key for case in values.cases]
    chosen = np.where(members, scores, np.nan)
    found = estimate(keys, chosen, derived_seed(how.seed, values.dataset, method, metric), how.resamples)
    # Of an arm's methods each picture counts once.
    lacking = {
        (case, reason)
        for one in how.arms.get(method, [method])
        for case, reason in values.reasons[one][metric].items()
        if members[case]
    }
    reasons = Counter(reason for _, reason in sorted(lacking))
    return Cell(
        **found.model_dump(),
        count=int(np.isfinite(chosen).all(0).sum()),
        identical=int(np.isposinf(chosen.mean(0)).sum()),
        not_computed=dict(reasons),
    )


def _ranked(
    cells: dict[str, dict[str, Cell]], scores: dict[str, dict[str, np.ndarray]], members: np.ndarray
) -> dict[str, dict[str, Cell]]:
    """The cells with what they are ranked by: `Cell.ranked`."""
    with_ranks: dict[str, dict[str, Cell]] = {method: {} for method in cells}
    for metric in dict.fromkeys(metric for own in cells.values() for metric in own):
        having = {method: own[metric] for method, own in cells.items() if metric in own}
        most = max(cell.count + cell.identical for cell in having.values())
        # Distribution metrics have no values of single cases.
        found = {method: own[metric][:, members] for method, own in scores.items() if metric in own}
        finite = np.concatenate([np.zeros(0), *(values[np.isfinite(values)] for values in found.values())])
        best = float(finite.max()) if finite.size else 0.0
        for method, cell in having.items():
            by = cell.mean
            if cell.identical:
                capped = np.where(np.isposinf(found[method]), best, found[method])
                by = float(capped[:, ~np.isnan(capped).any(0)].mean())
            whole = cell.count + cell.identical == most
            with_ranks[method][metric] = cell.model_copy(update={"ranked": by if whole else None})
    return with_ranks


def _whole(values: Values, method: str, how: How) -> dict[str, Cell]:
    """Distribution metrics over all cases; of an arm the mean over its methods."""
    found = [values.whole.get(one, {}) for one in how.arms.get(method, [method])]
    cells: dict[str, Cell] = {}
    for metric in found[0]:
        own = [cells[metric] for cells in found]
        means = [cell.mean for cell in own if cell.mean is not None]
        mean = float(np.mean(means)) if len(means) == len(own) else None
        cells[metric] = own[0].model_copy(update={"mean": mean, "count": min(cell.count for cell in own)})
    return cells


def _differences(
    values: Values, scores: dict[str, dict[str, np.ndarray]], members: np.ndarray, how: How, to: str
) -> dict[str, dict[str, Estimate]]:
    """Each other method's mean difference to one of them."""
    others = [method for method in scores if method not in (to, *how.arms.get(to, []))]
    return {method: _difference(values, scores, members, how, method, to) for method in others} if to in scores else {}


def _difference(
    values: Values, scores: dict[str, dict[str, np.ndarray]], members: np.ndarray, how: How, method: str, to: str
) -> dict[str, Estimate]:
    """One method's mean difference to another, by each metric.

    Values are compared case by case, which tells far more of a lead than two intervals beside one another: most of what
    values vary by is how hard the pictures are. Two arms of the same seeds are compared seed by seed as well.
    """
    keys, found = [case.key for case in values.cases], {}
    one, another = ([how.seeds.get(name) for name in how.arms.get(side, [side])] for side in (method, to))
    paired = one == another or 1 in (len(one), len(another))
    for metric, own in scores[method].items():
        other = scores[to][metric]
        with np.errstate(invalid="ignore"):
            differences = np.where(members, own - (other if paired else other.mean(0)), np.nan)
        seed = derived_seed(how.seed, values.dataset, "minus", to, method, metric)
        found[metric] = estimate(keys, differences, seed, how.resamples)
    return found


def _headline(group: Group, metric: MetricRow, leader: str, how: How) -> Headline:
    reached = group.cells.get(how.own, {}).get(metric.name, Cell())
    own = how.own if reached.mean is not None or reached.identical else leader
    found = group.differences.get(own, {}).get(metric.name, Estimate())
    mean = group.cells[leader][metric.name].mean
    value = "identical to the truth" if mean is None else f"{mean:.{metric.digits}f}"
    told = [f"{how.titles[leader]} leads by {metric.title}: {value}"]
    if own != how.baseline and how.baseline in group.cells:
        who = "" if own == leader else f"{how.titles[own]}: "
        told.append(f"{who}{_told(found, metric)} {how.titles[how.baseline]}")
    return Headline(
        leader=leader,
        method=own,
        baseline=how.baseline,
        metric=metric.name,
        dataset=group.dataset,
        difference=found,
        sentence="; ".join(told) + ".",
    )


def _told(difference: Estimate, metric: MetricRow) -> str:
    """A difference as text, such as ``+0.05 (-0.10 to 0.20), not told apart from``."""
    if difference.mean is None:
        return "not compared with"
    mean = f"{difference.mean:+.{metric.digits}f}"
    if difference.low is None or difference.high is None:
        return f"{mean} (one picture: no interval) against"
    between = f"{difference.low:+.{metric.digits}f} to {difference.high:+.{metric.digits}f}"
    return f"{mean} ({between}) against" if difference.told_apart else f"{mean} ({between}), not told apart from"


def _case(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["dataset"], row["key"], row["masks"]


def _of(cases: set[tuple[str, str, str]], dataset: str) -> set[tuple[str, str, str]]:
    return {case for case in cases if case[0] == dataset}


def _identity(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["dataset"], row["key"], row["masks"], row["method"]


def _both(pair: tuple[dict[str, Any], dict[str, Any]], metric: str) -> list[float | None]:
    return [row.get(metric) for row in pair]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
