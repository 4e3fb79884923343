"""What ``summary.json`` of an evaluation holds, as models: reports, comparisons and Prefect's pages read it alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FORMAT = 2
"""Version of ``summary.json``."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Estimate(_Part):
    """A mean over pictures (of an arm, over seeds of training as well) and its 95 % bootstrap interval; None where
    there are too few values."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def told_apart(self) -> bool:
        """Whether the interval of a difference leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


class Cell(Estimate):
    """What a method reached by a metric."""

    count: int = 0
    """Pictures with a finite value, or that a distribution is made of."""
    identical: int = 0
    """Pictures with an infinite value (PSNR of a perfect result), which are not in the mean."""
    ranked: float | None = None
    """What it is ranked by: the mean, in which infinite values count like the best finite one of all methods. None
    where another method has values of more pictures: whoever fails at the hard ones must not lead."""
    not_computed: dict[str, int] = {}
    """Reason to number of pictures."""
    warning: str = ""
    """What to bear in mind of the value, such as too few pictures for FID."""


class MetricRow(_Part):
    """A metric, as the heads of tables name it."""

    name: str
    title: str
    larger_is_better: bool
    digits: int
    region: str
    network: str
    reference: str
    not_run: str = ""
    """Why it was not computed at all, and what to pull; empty where it was."""


class MethodRow(_Part):
    """A method."""

    name: str
    title: str
    kind: str
    arm: str = ""
    below: str = ""
    """Method, or arm, that differs from it in one part alone."""
    seed: int | None = None
    """Of the training of MILD's adapters; None for other methods, and where nobody knows."""
    weights: dict[str, str] = {}
    """sha256 by what they are."""
    parts: dict[str, bool] | None = None
    """Of MILD: which of ``hmg``, ``pose``, ``parsing``, ``sma`` and ``extents`` work; None for other methods."""
    seconds: float | None = None
    """Mean time a picture, without warm-up."""
    peak_megabytes: float | None = None
    """Most GPU memory that it took; None without a GPU."""
    device: str = ""
    settings: dict[str, Any] = {}
    not_run: str = ""
    """Why it was not run, and what to pull; empty where it was."""


def with_every_part(methods: Sequence[MethodRow]) -> list[MethodRow]:
    """Those of which every part works that works in any of them; none where no part does."""
    working = {part for method in methods for part, works in (method.parts or {}).items() if works}
    return [method for method in methods if working and all((method.parts or {}).get(part) for part in working)]


def told_apart(methods: Sequence[MethodRow]) -> list[MethodRow]:
    """The methods, with their names in the titles that several of them have."""
    counts = Counter(method.title for method in methods)
    return [
        method.model_copy(update={"title": f"{method.title} ({method.name})"}) if counts[method.title] > 1 else method
        for method in methods
    ]


class Group(_Part):
    """Cases that are summed up together."""

    name: str
    """Empty for all cases of a dataset; else what they have in common, such as ``people overlap, exact masks``."""
    dataset: str
    cases: int
    """Pictures, each counted once a kind of masks."""
    cells: dict[str, dict[str, Cell]]
    """Method (or arm) to metric to value; methods that were not run are left out."""
    differences: dict[str, dict[str, Estimate]]
    """Method (or arm) to metric to the mean of its value minus the baseline's on the same case; per-picture metrics."""
    to_full: dict[str, dict[str, Estimate]] = {}
    """The same to the full MILD model, as tables 2 and 6 have them; empty where none was run."""
    to_below: dict[str, dict[str, Estimate]] = {}
    """The same of each that names a method, or arm, below it, to that."""


class DatasetRow(_Part):
    """Pictures that were judged on."""

    name: str
    place: str
    digest: str
    """Of the shards that they come from."""
    configuration: str
    split: str
    masks: list[str]
    samples: int
    available: int


class Headline(_Part):
    """Who leads, in the most important metric, over all cases of the first dataset."""

    leader: str
    """Method, or arm, with the best mean."""
    method: str
    """Whose difference this is: MILD where it was run, else the leader."""
    baseline: str
    metric: str
    dataset: str
    difference: Estimate
    """The method's mean minus the baseline's."""
    sentence: str
    """Who leads by how much, and whether it is told apart."""


class Change(_Part):
    """A value that differs from the run before's."""

    dataset: str
    method: str
    metric: str
    before: float
    now: float
    difference: Estimate
    """Now minus before, picture by picture."""
    verdict: Literal["better", "worse", "same"]
    """``same``: the interval holds zero."""


class Comparison(_Part):
    """Against the run before."""

    place: str
    changes: list[Change]
    left_out: list[str] = []
    """What could not be compared, and why."""
    lost: list[str] = []
    """What had values in that run and has none in this one."""

    @property
    def regressions(self) -> list[str]:
        """What got worse beyond its interval, or is lost."""
        worse = [change for change in self.changes if change.verdict == "worse"]
        return [*(f"{change.method} on {change.dataset}: {change.metric}" for change in worse), *self.lost]


class Leakage(_Part):
    """Semantic leakage of one MILD method (section 3.1): a block and step, medians over heads and pictures."""

    method: str
    pictures: int
    blocks: list[str]
    steps: list[int]
    """Time steps of the scheduler, in order."""
    gamma: list[list[float | None]]
    """[block][step]: gamma (eq. 1), with SMA where it is on."""
    gamma_vanilla: list[list[float | None]]
    """The same queries and keys without SMA's bias."""
    cross_mass: list[list[float | None]]
    """[block][step]: cross-domain attention mass (eq. 6), with SMA where it is on."""
    cross_mass_vanilla: list[list[float | None]]


class Spectrum(_Part):
    """Spectrum of the residual in the hole (figure 2), mean over pictures."""

    method: str
    pictures: int
    frequencies: list[float]
    amplitude: list[float]
    """log(1 + amplitude) a ring."""


class Summary(_Part):
    """``summary.json``."""

    format: int = FORMAT
    headline: Headline | None
    baseline: str
    datasets: list[DatasetRow]
    methods: list[MethodRow]
    metrics: list[MetricRow]
    groups: list[Group]
    """Of each dataset all cases first, then parts of them."""
    leakage: list[Leakage] = []
    spectra: list[Spectrum] = []
    against: Comparison | None = None
    base: str
    base_card: str = ""
    adapters: str
    settings: dict[str, Any]
    software: dict[str, str]
