"""The flow ``evaluate``: methods compared on datasets by metrics, each computed once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from prefect import flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact

from dataset_tools.errors import UserError
from dataset_tools.estimators.network import unload_networks
from dataset_tools.folders import check_replaceable
from dataset_tools.settings import digest_of
from dataset_tools.shards import ShardDataset, read_manifest
from dataset_tools.storage import check_writable, local_place
from dataset_tools.storage_options import public_place
from dataset_tools.weights import file_digest
from flows.caching import Files, Job, Outcome, result_storage, run_steps
from flows.evaluation_report import (
    BEFORE,
    OWN,
    SUMMARY,
    TABLE,
    Plan,
    ReportJob,
    SetMetric,
    read_samples,
    read_summary,
    write_report,
)
from flows.evaluation_steps import (
    CasesJob,
    EraseJob,
    FeaturesJob,
    InsightJob,
    ScoreJob,
    SpectrumJob,
    cases_jobs,
    erase,
    forget_methods,
    look_inside,
    prepare_cases,
    score,
    setup_of,
    take_features,
    take_spectrum,
)
from flows.events import announce
from flows.names import artifact_key, flow_run_name
from flows.output_lock import sole_run
from flows.progress import Display, Progress
from flows.settings import Threads
from mild.bases import normal_name, place_of
from mild.evaluation.cases import CaseRow, read_rows
from mild.evaluation.methods.mild import MILDMethod
from mild.evaluation.settings import DatasetSettings, EvaluateSettings
from mild.evaluation.summary import DatasetRow, MethodRow, MetricRow, told_apart
from mild.metrics.metric import DistributionMetric, PictureMetric
from mild.model.saved import fetched, read_config

WORKERS = 2
"""Metrics and the like that are computed at once, each holding a few pictures; methods run one after another."""


@flow(name="evaluate", flow_run_name=flow_run_name, persist_result=False, task_runner=Threads(max_workers=WORKERS))  # type: ignore[arg-type]
def evaluate(
    settings: EvaluateSettings | str,
    dataset: str,
    adapters: str,
    output: str,
    changes: dict[str, Any] | None = None,
    against: str = "",
) -> dict[str, Any]:
    """Compare methods; what was done before, and lies there unaltered, is not done again.

    Args:
        settings: `EvaluateSettings`, or the place of a YAML file of them.
        dataset: folder or URL of a built dataset, for those that the settings do not name; may be empty.
        adapters: folder that the flow ``train`` wrote, or hub id; empty: none.
        output: local folder of tables, pictures and ``report.html``.
        changes: settings to change, dotted name to value.
        against: folder of another evaluation, to say what got better or worse since; ``before``: the one that this run
            replaces; empty: none.

    Returns:
        ``report`` (path), ``summary`` (the content of ``summary.json``), ``steps`` and ``cached`` (how many of them
        were not done again).

    Raises:
        UserError: settings, dataset, adapters or results to compare cannot be used, no method can be run, or the output
            cannot be written.
    """
    recipe = check_evaluate(settings, dataset, adapters, output, changes, against)
    root = local_place(output, "a report")
    if against and against != BEFORE:
        against = local_place(against, "an evaluation to compare with")
    dataset = public_place(dataset, "dataset") if dataset else ""
    run = _Evaluation(recipe, dataset, normal_name(adapters) if adapters else "", root)
    with sole_run(root):
        try:
            digest = run.run(against)
        finally:
            forget_methods()
            unload_networks()
        summary = read_summary(Path(root))
        names = {read_manifest(row.place).name for row in summary.datasets}
        announce("evaluation", root, digest, dataset=", ".join(sorted(names)), payload={"evaluation": root})
    report = f"{root}/report.html"
    Display().show(create_link_artifact, report, link_text="report", key=artifact_key("evaluation-report", root))
    tables = Path(root, "tables.md").read_text(encoding="utf-8")
    Display().show(create_markdown_artifact, tables, key=artifact_key("evaluation-tables", root))
    return {"report": report, "summary": summary.model_dump(mode="json"), "steps": run.steps, "cached": run.cached}


def check_evaluate(
    settings: EvaluateSettings | str,
    dataset: str,
    adapters: str,
    output: str,
    changes: dict[str, Any] | None = None,
    against: str = "",
) -> EvaluateSettings:
    """The settings, where they, dataset, adapters and output of `evaluate` can be used; leaves nothing behind.

    Raises:
        UserError: they cannot.
    """
    recipe = EvaluateSettings.load(settings, changes)
    root = local_place(output, "a report")
    for name, held in recipe.datasets.items():
        if not held.place and not dataset:
            raise UserError(f"datasets.{name} names no place, and no dataset is given: name one of both")
        read_manifest(held.place or public_place(dataset, "dataset"))
    if adapters:
        read_config(fetched(adapters))
    if against and against != BEFORE:
        former = Path(local_place(against, "an evaluation to compare with"))
        read_summary(former)
        read_samples(former)
    if (free := recipe.person_free) is not None:
        place = free.place or dataset
        shards = read_manifest(place).shards.get(free.configuration, {}).get(free.split, [])
        if not any(shard.samples for shard in shards):
            raise UserError(f"person_free: {place} holds no samples of {free.configuration}/{free.split}")
    check_writable(root)
    check_replaceable(root, SUMMARY, OWN)
    if against == BEFORE and Path(root, TABLE).exists():
        read_samples(Path(root))
    return recipe


@dataclass(frozen=True)
class _Done:
    """A step's job and the files that it wrote."""

    job: Any
    files: Files


class _Evaluation:
    """One run: what there is to do, and what came of it."""

    def __init__(self, recipe: EvaluateSettings, dataset: str, adapters: str, root: str) -> None:
        self.recipe, self.dataset, self.root = recipe, dataset, root
        self.setup = setup_of(recipe, adapters)
        self.place = {"root": root, "work": f"{root}.work"}
        self.storage = result_storage(self.place["work"])
        self.steps = self.cached = 0

    def run(self, against: str) -> str:
        """All of it; gives the digest of what stands at the output."""
        datasets, chosen = [], list[CasesJob]()
        for name, settings in self.recipe.datasets.items():
            row, jobs = self._choose(name, settings)
            datasets.append(row)
            chosen += jobs
        cases = self._do(prepare_cases, chosen, "prepare cases")
        rows = {job.key(): read_rows(job.kept_at) for job in chosen}
        if not any(rows.values()):
            raise UserError("there is nothing to erase in the chosen samples: name others, or other categories")
        methods, fingerprints = self._methods([row for own in rows.values() for row in own])
        metrics = self._metrics()
        able = [method for method in self.recipe.methods if method.name in fingerprints]
        erased = [
            done
            for method in able
            for done in self._do_here(
                erase, [self._erase_job(method, fingerprints[method.name], job, chosen) for job in chosen]
            )
        ]
        forget_methods()
        scores, spectra = self._scores(metrics, cases, erased)
        sets, features = self._sets(metrics, cases, erased)
        layers, leakage = (
            self._insights(what, able, fingerprints, chosen[0], rows[chosen[0].key()]) for what in ("layers", "leakage")
        )
        curve = Path(place_of(self.setup.adapters), "loss.csv") if self.setup.adapters else None
        plan = Plan(
            recipe=self.recipe,
            setup=self.setup,
            datasets=datasets,
            methods=methods,
            metrics=metrics,
            cases=chosen,
            erased=[done.job for done in erased],
            scores=[done.job for done in scores],
            sets=sets,
            layers=[done.job for done in layers],
            leakage=[done.job for done in leakage],
            spectra=[done.job for done in spectra],
            curve=str(curve) if curve is not None and curve.is_file() else "",
            against=against,
            digests=[
                *(done.files.digest for done in (*cases, *erased, *scores, *spectra, *features, *layers, *leakage)),
                *(file_digest(Path(path)) for path in (str(curve), f"{against}/{TABLE}") if Path(path).is_file()),
            ],
        )
        (report,) = self._do(write_report, [self._report_job(plan)], "report")
        return report.files.digest

    def _do(self, step: Any, jobs: Sequence[Job], what: str) -> list[_Done]:
        """Run jobs of one step side by side; those that were done before are not done again."""
        if not jobs:
            return []
        with Progress(artifact_key("evaluate-progress", self.root)) as progress:
            progress.stage(what)
            done = run_steps(step, jobs, self.storage, progress, time_limit=self.recipe.time_limit)
        return self._done(jobs, done)

    def _do_here(self, step: Any, jobs: Sequence[Job]) -> list[_Done]:
        """The same one after another in this thread, as what fills a GPU must be; machines may set a limit on it."""
        tagged, limit = step.with_options(tags=["gpu"]), self.recipe.time_limit
        return self._done(jobs, run_steps(tagged, jobs, self.storage, in_this_thread=True, time_limit=limit))

    def _done(self, jobs: Sequence[Job], outcomes: Sequence[Outcome[Any]]) -> list[_Done]:
        self.steps += len(jobs)
        self.cached += sum(outcome.cached for outcome in outcomes)
        return [_Done(job, outcome.result) for job, outcome in zip(jobs, outcomes, strict=True)]

    def _choose(self, name: str, settings: DatasetSettings) -> tuple[DatasetRow, list[CasesJob]]:
        """The samples that are drawn from a dataset, shard by shard."""
        place = settings.place or self.dataset
        held = ShardDataset(place, settings.configuration, settings.split)
        if len(held) == 0:
            raise UserError(f"datasets.{name}: {place} holds no sample of {settings.configuration}/{settings.split}")
        drawn = np.sort(held.order(self.recipe.seed, 0)[: settings.samples])
        jobs = cases_jobs(self.place, name, settings, held, drawn)
        row = DatasetRow(
            name=name,
            place=place,
            digest=digest_of([shard.sha256 for shard in held.shards]),
            configuration=settings.configuration,
            split=settings.split,
            masks=list(settings.masks),
            samples=len(drawn),
            available=len(held),
        )
        return row, jobs

    def _methods(self, rows: list[CaseRow]) -> tuple[list[MethodRow], dict[str, str]]:
        """What there is to say of each method, and the fingerprints of those that can be run.

        Raises:
            UserError: none can, or one can be seen to fail.
        """
        known, fingerprints = [], {}
        for method in self.recipe.methods:
            row: dict[str, Any] = {"settings": method.model_dump(mode="json")}
            reason = method.missing(self.setup)
            if reason is None:
                method.check_cases(self.setup, [(case.key, case.masks, (case.height, case.width)) for case in rows])
                fingerprints[method.name] = method.fingerprint(self.setup)
                row["weights"] = method.weights(self.setup)
                if isinstance(method, MILDMethod):
                    row["parts"], row["seed"] = method.parts(self.setup), method.trained(self.setup).seed
            known.append(
                MethodRow(
                    name=method.name,
                    title=method.title,
                    kind=method.kind,
                    arm=method.arm,
                    below=method.below,
                    not_run=reason or "",
                    **row,
                )
            )
        if not fingerprints:
            raise UserError("no method can be run: " + "; ".join(f"{row.name}: {row.not_run}" for row in known))
        return told_apart(known), fingerprints

    def _metrics(self) -> list[MetricRow]:
        return [
            MetricRow(
                name=metric.name,
                title=metric.title,
                larger_is_better=metric.larger_is_better,
                digits=metric.digits,
                region=metric.region,
                network=metric.network,
                reference=metric.reference,
                not_run=metric.missing() or "",
            )
            for metric in self.recipe.metrics
        ]

    def _erase_job(self, method: Any, fingerprint: str, cases: CasesJob, chosen: Sequence[CasesJob] = ()) -> EraseJob:
        shuffled = isinstance(method, MILDMethod) and method.shuffled_cues
        return EraseJob(
            **self.place,
            method=method,
            fingerprint=fingerprint,
            setup=self.setup,
            cases=cases,
            seed=self.recipe.seed,
            donors=tuple(job for job in chosen if shuffled and job.name == cases.name),
        )

    def _able(self, metrics: list[MetricRow]) -> list[Any]:
        """The metrics of the recipe that can be computed."""
        able = {row.name for row in metrics if not row.not_run}
        return [metric for metric in self.recipe.metrics if metric.name in able]

    def _scores(
        self, metrics: list[MetricRow], cases: list[_Done], erased: list[_Done]
    ) -> tuple[list[_Done], list[_Done]]:
        """Every metric of single pictures, and the residual's spectrum, of every method's results.

        Spectra are of the first shard alone.
        """
        seen = _seen(cases, erased)
        jobs = [
            ScoreJob(**self.place, metric=metric, fingerprint=metric.fingerprint(), erased=done.job, results=results)
            for metric in self._able(metrics)
            if isinstance(metric, PictureMetric)
            for done, results in zip(erased, seen, strict=True)
        ]
        spectra = [
            SpectrumJob(**self.place, erased=done.job, results=results)
            for done, results in zip(erased, seen, strict=True)
            if done.job.cases == cases[0].job
        ]
        return self._do(score, jobs, "metrics"), self._do(take_spectrum, spectra, "spectra")

    def _sets(
        self, metrics: list[MetricRow], cases: list[_Done], erased: list[_Done]
    ) -> tuple[list[SetMetric], list[_Done]]:
        """Features for the metrics that compare sets of pictures."""
        sets, features = [], list[_Done]()
        for metric in (one for one in self._able(metrics) if isinstance(one, DistributionMetric)):
            free = metric.reference_pictures == "person-free"
            plates = [(job, job.shard.sha256) for job in self._plates()] if free else []
            truths = [] if free else [(done.job, done.files.digest) for done in cases]
            fixed: dict[str, Any] = {**self.place, "metric": metric, "fingerprint": metric.features_fingerprint()}
            seen = [_pictures(done) for done in erased] if free else _seen(cases, erased)
            results = [
                FeaturesJob(**fixed, of=done.job, digest=digest, which="results" if free else "known")
                for done, digest in zip(erased, seen, strict=True)
            ]
            reference = [
                FeaturesJob(**fixed, of=job, digest=digest, which="plates" if free else "truths")
                for job, digest in (*plates, *truths)
            ]
            features += self._do(take_features, [*results, *reference], metric.title)
            sets.append(SetMetric(metric=metric, results=results, reference=reference))
        return sets, features

    def _plates(self) -> list[CasesJob]:
        """The shards of pictures whose clean backgrounds show nobody."""
        chosen = self.recipe.person_free
        assert chosen is not None
        place = chosen.place or self.dataset
        held = ShardDataset(place, chosen.configuration, chosen.split)
        settings = DatasetSettings(**chosen.model_dump())
        return cases_jobs(self.place, "person-free", settings, held, np.arange(len(held)))

    def _insights(
        self, what: Any, able: list[Any], fingerprints: dict[str, str], cases: CasesJob, rows: list[CaseRow]
    ) -> list[_Done]:
        """Layers of the first MILD method, or leakage of all but an arm's repeats, on the first pictures of a shard.

        Not of those that are given others' cues, which are no models of their own.
        """
        ours: dict[Any, MILDMethod] = {}
        for method in able:
            if isinstance(method, MILDMethod) and not method.shuffled_cues:
                # How colours are matched changes nothing inside.
                parts = tuple(method.parts(self.setup).items())
                ours.setdefault(method.arm or (method.place(self.setup), parts), method)
        chosen = list(ours.values())[: 1 if what == "layers" else None]
        # Layers of one alone tell nothing.
        fitting = {row.key for row in rows if (row.people > 1 or what == "leakage") and row.hole_share < 1}
        keys = ShardDataset.of_shards(cases.place, [cases.shard]).keys
        count = self.recipe.layers if what == "layers" else self.recipe.leakage
        indices = tuple(index for index in cases.indices if keys[index] in fitting)[:count]
        few = cases.model_copy(update={"indices": indices})
        jobs = [
            InsightJob(**self.place, erased=self._erase_job(method, fingerprints[method.name], few), what=what)
            for method in chosen
            if indices
        ]
        return self._do_here(look_inside, jobs)

    def _report_job(self, plan: Plan) -> ReportJob:
        """The last step."""
        # Where files lie and how long steps may take makes no other report; jobs are told by their files' digests.
        said = plan.model_dump(
            mode="json",
            include={"recipe", "datasets", "methods", "metrics", "against", "digests"},
            exclude={"datasets": {"__all__": {"place"}}, "recipe": {"time_limit"}},
        )
        return ReportJob.of(self.place, plan, said)


def _seen(cases: list[_Done], erased: list[_Done]) -> list[str]:
    """Digest of each method's results, of why there is none, and of the cases that they are compared with."""
    digests = {done.job.key(): done.files.digest for done in cases}
    return [digest_of([_pictures(done), _failures(done), digests[done.job.cases.key()]]) for done in erased]


def _failures(erased: _Done) -> list[dict[str, str]]:
    table = pq.read_table(erased.job.kept_at / "results.parquet", columns=["key", "masks", "failure"])
    return [row for row in table.to_pylist() if row["failure"]]


def _pictures(erased: _Done) -> str:
    """Digest of a method's results without the table of how long they took."""
    files = {path: file.sha256 for path, file in erased.files.files.items() if path.endswith(".png")}
    return digest_of(files)
