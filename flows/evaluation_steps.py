"""The cached steps of an evaluation. What is done, and kept, once is a method on a shard, and a metric on that.

One more method, metric or dataset computes nothing again. All of it lies below the work folder, by key; the last step
(`flows.evaluation_report`) puts together what stands at the output.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel

from dataset_tools.schema import Sample
from dataset_tools.settings import digest_of
from dataset_tools.shards import Shard, ShardDataset
from flows.caching import Files, Job, Listings, cached_step, write_named
from flows.names import artifact_key
from flows.progress import Progress
from mild.evaluation.methods import Setup
from mild.evaluation.review import ReviewSettings
from mild.evaluation.settings import AnyMethod, AnyMetric, DatasetSettings, EvaluateSettings
from mild.metrics.metric import DistributionMetric, PictureMetric
from mild.model.saved import fetched, read_config

PICTURES = ("numpy", "opencv-python-headless")


class PlannedJob(Job):
    """A last step, which writes what stands at the output from a plan that names every file of every step."""

    plan: str
    """Name of the plan below ``work``."""
    digest: str
    """Of what it says, but for where things lie."""

    @classmethod
    def of(cls, place: Mapping[str, str], plan: BaseModel, said: Any) -> Self:
        """The job of a plan, which is written down.

        Args:
            place: ``root`` and ``work``.
            plan: all of it.
            said: what it says, JSON-compatible, but for where things lie.
        """
        job = cls(**place, plan="", digest=digest_of(said))
        return job.model_copy(update={"plan": write_named(job, "plan.json", plan.model_dump_json().encode())})

    def determines(self) -> Any:
        """The plan's digest."""
        return self.digest


class KeptJob(Job):
    """A job that keeps what it makes in one place of its own below the work folder, named by its key."""

    suffix: ClassVar[str] = ""
    """Of its name, such as ``.json``; empty for folders."""

    @property
    def kept_at(self) -> Path:
        """The file or folder."""
        return Path(self.work, f"{self.key()}{self.suffix}")

    def kept(self, rows: int = 0) -> Files:
        """What was just written there."""
        return Files.of(self, "work", [self.kept_at.name], rows)


class CasesJob(KeptJob):
    """Pictures and masks of some samples of a shard."""

    step: ClassVar[str] = "prepare-cases"
    version: ClassVar[int] = 3
    packages: ClassVar[tuple[str, ...]] = PICTURES
    name: str
    """Of the dataset in the recipe."""
    place: str
    """Of the dataset."""
    shard: Shard
    indices: tuple[int, ...]
    """Of the samples in the shard."""
    settings: DatasetSettings

    def determines(self) -> Any:
        """The shard's content, not where it lies."""
        return [self.shard.sha256, self.indices, self.settings.masks, self.settings.categories]

    def label(self) -> str:
        """Dataset and shard."""
        return f"{self.name}-{Path(self.shard.path).stem}"

    def samples(self) -> Any:
        """The samples, one at a time."""
        held = ShardDataset.of_shards(self.place, [self.shard])
        return (held[index] for index in self.indices)


def cases_jobs(
    place: Mapping[str, str], name: str, settings: DatasetSettings, held: ShardDataset, drawn: np.ndarray
) -> list[CasesJob]:
    """A job for each shard of which anything was drawn.

    Args:
        place: ``root`` and ``work`` of the jobs.
        name: of the dataset in the recipe.
        drawn: indices in ``held``, sorted.
    """
    starts = np.cumsum([0, *(shard.samples for shard in held.shards)])
    jobs = []
    for shard, start, stop in zip(held.shards, starts, starts[1:], strict=False):
        own = drawn[(drawn >= start) & (drawn < stop)] - start
        if len(own):
            indices = tuple(map(int, own))
            jobs.append(CasesJob(**place, name=name, place=held.root, shard=shard, indices=indices, settings=settings))
    return jobs


@cached_step
def prepare_cases(job: CasesJob) -> Files:
    """Write the cases of a shard."""
    from mild.evaluation import cases

    shutil.rmtree(job.kept_at, ignore_errors=True)
    rows = cases.prepare_cases(job.samples(), job.settings, job.kept_at)
    return job.kept(len(rows))


class EraseJob(KeptJob):
    """One method on the cases of one shard."""

    step: ClassVar[str] = "erase"
    version: ClassVar[int] = 2
    packages: ClassVar[tuple[str, ...]] = PICTURES
    method: AnyMethod
    fingerprint: str
    setup: Setup
    cases: CasesJob
    seed: int
    donors: tuple[CasesJob, ...] = ()
    """All cases of the dataset, among which cues are shuffled; none where everybody keeps theirs."""

    def determines(self) -> Any:
        """What the method makes of what it is given; not its name."""
        return [self.fingerprint, self.cases.determines(), self.seed, *(donor.determines() for donor in self.donors)]

    def label(self) -> str:
        """Method, dataset and shard."""
        return f"{self.method.name}-{self.cases.name}-{Path(self.cases.shard.path).stem}"

    def others(self) -> Iterator[Sample]:
        """For each sample of the cases that whose cues it is given; none where there are no donors."""
        from mild.evaluation.cases import others_of, read_rows

        if not self.donors:
            return
        given = others_of([row for donor in self.donors for row in read_rows(donor.kept_at)], self.seed)
        held = ShardDataset.of_shards(self.cases.place, [donor.shard for donor in self.donors])
        at = {key: index for index, key in enumerate(held.keys)}
        own = ShardDataset.of_shards(self.cases.place, [self.cases.shard]).keys
        for index in self.cases.indices:
            # What shows nobody is no case, and is given no cues.
            yield held[at[given.get(own[index], own[index])]]


class Erased(Files):
    """Result of erasing."""

    transient: int
    """How many cases another run may do."""

    def is_sound(self, job: Job, listings: Listings) -> bool:
        """Whether the files are as they were written, and nothing is worth another try."""
        return self.transient == 0 and super().is_sound(job, listings)

    def told(self) -> str:
        """What was written, and what is left to do."""
        return super().told() + (f", to be tried again: {self.transient}" if self.transient else "")


_BENCH: Any = None
"""The method that is in memory: steps run one after another in one process."""


@cached_step
def erase(job: EraseJob) -> Erased:
    """Run the method; writes its results and how long each took."""
    from mild.evaluation.compare import Bench

    global _BENCH
    _BENCH = _BENCH or Bench()
    shutil.rmtree(job.kept_at, ignore_errors=True)
    with Progress(artifact_key("evaluate-progress", job.root)) as progress:
        progress.stage(job.label())
        progress.expect(len(job.cases.indices) * len(job.cases.settings.masks))
        transient = _BENCH.erase_cases(
            job.method,
            job.fingerprint,
            job.setup,
            job.cases.samples(),
            job.cases.settings,
            job.seed,
            job.kept_at,
            progress.advance,
            job.others(),
        )
    return Erased(**job.kept().model_dump(), transient=transient)


def setup_of(recipe: EvaluateSettings | ReviewSettings, adapters: str) -> Setup:
    """What methods are opened with; ``adapters`` are a folder or hub id, or empty."""
    base = recipe.base or (read_config(fetched(adapters)).base if adapters else "")
    return Setup(base, adapters, recipe.inference_steps, recipe.prompt, own_bases=not recipe.base)


def forget_methods() -> None:
    """Give back the memory of the method that ran last."""
    if _BENCH is not None:
        _BENCH.clear()


class ScoreJob(KeptJob):
    """One metric of one picture each, on one method's results of one shard."""

    step: ClassVar[str] = "score"
    version: ClassVar[int] = 2
    packages: ClassVar[tuple[str, ...]] = PICTURES
    suffix: ClassVar[str] = ".parquet"
    metric: AnyMetric
    fingerprint: str
    erased: EraseJob
    results: str
    """Digest of the results."""

    def determines(self) -> Any:
        """The metric, what it looks at, and what with."""
        return [self.fingerprint, self.results, self.erased.cases.determines()]

    def label(self) -> str:
        """Metric, method, dataset and shard."""
        return f"{self.metric.name}-{self.erased.label()}"


@cached_step
def score(job: ScoreJob) -> Files:
    """Compute the metric."""
    from mild.evaluation.cases import read_rows
    from mild.evaluation.compare import score_cases

    assert isinstance(job.metric, PictureMetric)
    cases = job.erased.cases.kept_at
    score_cases(job.metric, cases, job.erased.kept_at, read_rows(cases), job.kept_at)
    return job.kept()


class FeaturesJob(KeptJob):
    """Features of the pictures of one shard, for metrics that compare sets of pictures."""

    step: ClassVar[str] = "features"
    version: ClassVar[int] = 2
    packages: ClassVar[tuple[str, ...]] = PICTURES
    suffix: ClassVar[str] = ".npy"
    metric: AnyMetric
    fingerprint: str
    """Of the features, which several metrics may share."""
    of: EraseJob | CasesJob
    """Whose results; or of which cases the clean backgrounds."""
    digest: str
    """Of these, and of what else is looked at."""
    which: Literal["results", "known", "truths", "plates"]
    """``known``: results, where the clean background is known; ``plates``: that of every sample, case or not."""

    def determines(self) -> Any:
        """The network and the pictures."""
        return [self.fingerprint, self.digest, self.which]

    def label(self) -> str:
        """What of what."""
        return f"{self.which}-{self.of.label()}"

    @property
    def of_cases(self) -> CasesJob:
        """The cases that are shown."""
        return self.of.cases if isinstance(self.of, EraseJob) else self.of

    @property
    def method(self) -> str:
        """Whose results; empty for reference pictures."""
        return self.of.method.name if isinstance(self.of, EraseJob) else ""


@cached_step
def take_features(job: FeaturesJob) -> Files:
    """Compute them."""
    from mild.evaluation.cases import read_rows
    from mild.evaluation.compare import features_of_known, features_of_plates, features_of_results, features_of_truths

    metric = job.metric
    assert isinstance(metric, DistributionMetric)
    if isinstance(job.of, EraseJob):
        cases = job.of.cases.kept_at
        if job.which == "known":
            count = features_of_known(metric, cases, job.of.kept_at, read_rows(cases), job.kept_at)
        else:
            count = features_of_results(metric, job.of.kept_at, read_rows(cases), job.kept_at)
    elif job.which == "plates":
        count = features_of_plates(metric, job.of.samples(), job.kept_at)
    else:
        count = features_of_truths(metric, job.of.kept_at, read_rows(job.of.kept_at), job.kept_at)
    return job.kept(count)


class InsightJob(KeptJob):
    """What one MILD method shows of itself on a few samples of a shard: its layers, or its leakage."""

    step: ClassVar[str] = "insight"
    version: ClassVar[int] = 2
    packages: ClassVar[tuple[str, ...]] = PICTURES
    erased: EraseJob
    """The method, and the samples."""
    what: Literal["layers", "leakage"]

    def determines(self) -> Any:
        """As erasing; and of leakage the method's name, which it holds."""
        return [self.what, self.erased.method.name if self.what == "leakage" else "", self.erased.determines()]

    def label(self) -> str:
        """What of what."""
        return f"{self.what}-{self.erased.label()}"


@cached_step
def look_inside(job: InsightJob) -> Files:
    """Paint the layers, or measure the leakage."""
    from mild.evaluation.cases import case_of
    from mild.evaluation.layers import paint_layers
    from mild.evaluation.leakage import leakage_of
    from mild.evaluation.methods.mild import MILDMethod

    method, settings = job.erased.method, job.erased.cases.settings
    assert isinstance(method, MILDMethod)
    cases = [case_of(sample, settings, "exact") for sample in job.erased.cases.samples()]
    usable = [case for case in cases if case.hole.any() and not case.hole.all()]
    if job.what == "layers":
        shutil.rmtree(job.kept_at, ignore_errors=True)
        paint_layers(method, job.erased.setup, usable, job.erased.seed, job.kept_at)
    else:
        found = leakage_of(method, job.erased.setup, usable, job.erased.seed)
        job.kept_at.write_text(found.model_dump_json(), encoding="utf-8")
    return job.kept()


class SpectrumJob(KeptJob):
    """The residual's spectrum of one method's results of one shard."""

    step: ClassVar[str] = "spectrum"
    version: ClassVar[int] = 2
    packages: ClassVar[tuple[str, ...]] = PICTURES
    suffix: ClassVar[str] = ".json"
    erased: EraseJob
    results: str
    """Digest of the results and of what they are compared with."""

    def determines(self) -> Any:
        """What is compared; and the method's name, which it holds."""
        return [self.erased.method.name, self.results]

    def label(self) -> str:
        """Of what."""
        return self.erased.label()


@cached_step
def take_spectrum(job: SpectrumJob) -> Files:
    """Compute it."""
    from mild.evaluation.cases import read_rows
    from mild.evaluation.leakage import spectrum_of

    cases = job.erased.cases.kept_at
    found = spectrum_of(job.erased.method.name, cases, job.erased.kept_at, read_rows(cases))
    job.kept_at.write_text(found.model_dump_json(), encoding="utf-8")
    return job.kept(found.pictures)
