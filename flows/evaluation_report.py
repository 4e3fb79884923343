"""The last step of an evaluation: the summary, the report and the pictures at the output, from what all others kept."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict

from dataset_tools.errors import UserError, one_line
from dataset_tools.folders import folder_written_whole
from dataset_tools.storage import write_bytes
from flows.caching import Files, cached_step
from flows.evaluation_steps import CasesJob, EraseJob, FeaturesJob, InsightJob, PlannedJob, ScoreJob, SpectrumJob
from flows.progress import run_logger
from flows.record_table import parquet_bytes
from mild.bases import place_of
from mild.charts import branch_loss_chart
from mild.evaluation.cases import CaseRow, read_rows
from mild.evaluation.gallery import ShownCase, ShownLayers
from mild.evaluation.methods import Setup
from mild.evaluation.settings import AnyMetric, EvaluateSettings
from mild.evaluation.summarize import (
    How,
    Values,
    compare_with,
    groups_of,
    headline_of,
    rows_of,
    with_times,
    worth_showing,
)
from mild.evaluation.summary import Cell, Comparison, DatasetRow, Leakage, MethodRow, MetricRow, Spectrum, Summary
from mild.metrics.metric import UNKNOWN, DistributionMetric, NotComputed
from mild.seeds import derived_seed
from mild.versions import software_versions

SUMMARY = "summary.json"
TABLE = "samples.parquet"
OWN = r"summary\.json|samples\.parquet|tables\.(md|tex)|report\.html|pictures|layers"
"""What is in the output."""
BEFORE = "before"
"""Compare with what stands at the output before this run makes it another."""


class SetMetric(BaseModel):
    """A metric that compares sets, and where the features are."""

    model_config = ConfigDict(frozen=True)
    metric: AnyMetric
    results: list[FeaturesJob]
    reference: list[FeaturesJob]
    """Of every dataset's own clean backgrounds; or of the pictures that show nobody, for all datasets."""


class Plan(BaseModel):
    """What the report is made from."""

    model_config = ConfigDict(frozen=True)
    recipe: EvaluateSettings
    setup: Setup
    datasets: list[DatasetRow]
    methods: list[MethodRow]
    metrics: list[MetricRow]
    cases: list[CasesJob]
    erased: list[EraseJob]
    scores: list[ScoreJob]
    sets: list[SetMetric]
    layers: list[InsightJob]
    leakage: list[InsightJob]
    spectra: list[SpectrumJob]
    curve: str
    """Table of the adapters' losses; empty where there is none."""
    against: str
    """Folder of another evaluation, or `BEFORE`; empty: none."""
    digests: list[str]
    """Of the files of all jobs named here, of the curve and of the other evaluation."""


class ReportJob(PlannedJob):
    """Everything that stands at the output, on a `Plan`."""

    step: ClassVar[str] = "write-report"
    version: ClassVar[int] = 2
    packages: ClassVar[tuple[str, ...]] = ("jinja2", "matplotlib", "numpy", "pillow", "scipy")


@cached_step
def write_report(job: ReportJob) -> Files:
    """Write the output, whole: summary, tables, report, and the pictures of all cases."""
    from mild.evaluation.report import render_report
    from mild.evaluation.report.tables import latex_tables, markdown_tables

    plan = Plan.model_validate_json(Path(job.work, job.plan).read_text(encoding="utf-8"))
    values = [_values(plan, dataset.name) for dataset in plan.datasets]
    methods = [with_times(method, values) for method in plan.methods]
    how = How.of(methods, plan.metrics, plan.recipe)
    table = pa.concat_tables([rows_of(own) for own in values], promote_options="default")
    groups = [group for own in values for group in groups_of(own, how)]
    summary = Summary(
        headline=headline_of(groups, how),
        baseline=how.baseline,
        datasets=plan.datasets,
        methods=methods,
        metrics=plan.metrics,
        groups=groups,
        leakage=[Leakage.model_validate_json(of.kept_at.read_text(encoding="utf-8")) for of in plan.leakage],
        spectra=[Spectrum.model_validate_json(of.kept_at.read_text(encoding="utf-8")) for of in plan.spectra],
        against=_compared(plan, job, table, how),
        base=plan.setup.base,
        base_card=_card_title(plan.setup.base),
        adapters=plan.setup.adapters,
        settings=plan.recipe.model_dump(mode="json"),
        software=software_versions(),
    )
    with folder_written_whole(job.root, SUMMARY, OWN) as folder:
        for erased in plan.erased:
            _link_pictures(erased, folder / "pictures" / erased.cases.name)
        (folder / SUMMARY).write_text(summary.model_dump_json(indent=2) + "\n", encoding="utf-8")
        pq.write_table(table, folder / TABLE)
        (folder / "tables.md").write_text(markdown_tables(summary), encoding="utf-8")
        (folder / "tables.tex").write_text(latex_tables(summary), encoding="utf-8")
        chart = _loss_chart(Path(plan.curve)) if plan.curve else None
        page = render_report(
            summary, _shown_cases(values, how, plan.recipe.shown, folder), _shown_layers(plan, folder), chart
        )
        (folder / "report.html").write_text(page, encoding="utf-8")
    return Files.of(job, "root", [""])


def read_summary(folder: Path) -> Summary:
    """Of an evaluation. Raises `UserError` where there is none of this version."""
    path = folder / SUMMARY
    try:
        return Summary.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no evaluation: {SUMMARY} is missing; name the output of one") from None
    except ValueError:
        raise UserError(f"{path} was written by another version of mild: evaluate again") from None


def read_samples(folder: Path) -> pa.Table:
    """The table of an evaluation that has a row a case and method. Raises `UserError` where there is none."""
    path = folder / TABLE
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}): evaluate anew, or name another") from None
    if missing := {"dataset", "key", "masks", "method", "pictures"} - set(table.column_names):
        raise UserError(f"{path} lacks the columns {', '.join(sorted(missing))}: evaluate anew, or name another")
    return table


def _loss_chart(path: Path) -> str | None:
    """Drawn anew: what stands in a folder of others is no markup of this page. None where it is no table of losses."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return branch_loss_chart([{name: float(row[name]) for name in row} for row in csv.DictReader(file)])
    except (ValueError, TypeError, KeyError, csv.Error):
        run_logger().warning("%s is no table of losses, and the report shows none", path)
        return None


def _values(plan: Plan, dataset: str) -> Values:
    """What all methods reached on a dataset."""
    values = Values(dataset)
    for cases in plan.cases:
        if cases.name == dataset:
            values.add_cases(read_rows(cases.kept_at))
    for erased in plan.erased:
        if erased.cases.name == dataset:
            values.add_results(erased.method.name, pq.read_table(erased.kept_at / "results.parquet").to_pylist())
    for score in plan.scores:
        if score.erased.cases.name == dataset:
            values.add_scores(score.erased.method.name, score.metric.name, pq.read_table(score.kept_at).to_pylist())
    for one in plan.sets:
        assert isinstance(one.metric, DistributionMetric)
        reference = {job.of_cases.key(): job.kept_at for job in one.reference}
        for method in dict.fromkeys(job.method for job in one.results):
            own = [job for job in one.results if (job.method, job.of_cases.name) == (method, dataset)]
            reason = "no result"
            if one.metric.reference_pictures == "person-free":
                compared = [_Features(path) for path in reference.values()]
            else:
                # The truths of what there is a result of, and of nothing else.
                there = [_there(job.of) for job in own]
                truths = [reference[job.of_cases.key()] for job in own]
                compared = [_Features(path, some) for path, some in zip(truths, there, strict=True)]
                if not any(map(len, there)):
                    reason = UNKNOWN
            seed = derived_seed(plan.recipe.seed, one.metric.name)
            found = _distance(one.metric, [_Features(job.kept_at) for job in own], compared, seed, reason)
            values.whole.setdefault(method, {})[one.metric.name] = found
    return values


def _there(erased: EraseJob | CasesJob) -> np.ndarray:
    """(N,) bool: of which of the cases with a clean background a method has a result."""
    assert isinstance(erased, EraseJob)
    rows = [row for row in read_rows(erased.cases.kept_at) if row.truth]
    return np.array([(erased.kept_at / row.key / f"{row.masks}.png").is_file() for row in rows], bool)


@dataclass(frozen=True, eq=False)
class _Features:
    """Features of a shard's pictures, in a file."""

    path: Path
    chosen: np.ndarray | None = None
    """(N,) bool: which of them; None: all."""

    def read(self) -> np.ndarray:
        """(n, D) float32; (0, 0) where there are none."""
        features: np.ndarray = np.load(self.path)
        return features if self.chosen is None else features[self.chosen]

    def __len__(self) -> int:
        return len(np.load(self.path, mmap_mode="r")) if self.chosen is None else int(self.chosen.sum())


def _distance(
    metric: DistributionMetric, results: list[_Features], reference: list[_Features], seed: int, reason: str
) -> Cell:
    """Of ``results``; of none for the ``reason``."""
    counts = [sum(map(len, side)) for side in (results, reference)]
    if counts[0] == 0:
        return Cell(not_computed={reason: 1})
    if counts[1] == 0:
        return Cell(not_computed={UNKNOWN: counts[0]})
    try:
        value = metric.distance(_read(results), _read(reference), seed)
    except NotComputed as reason:
        return Cell(not_computed={str(reason): counts[0]})
    enough = metric.enough_pictures
    few = f"{counts[0]} results and {counts[1]} reference pictures: below {enough} it depends on their number"
    return Cell(mean=value, count=counts[0], warning=few if min(counts) < enough else "")


def _read(parts: list[_Features]) -> Iterator[np.ndarray]:
    return (part.read() for part in parts if len(part))


def _compared(plan: Plan, job: ReportJob, table: pa.Table, how: How) -> Comparison | None:
    """With another run, or with what stands at the output and is about to be replaced."""
    standing = Path(job.root, TABLE)
    # A run that was killed here, or is repeated, compares with what the same table was about to replace.
    kept = Path(job.work, f"before-{hashlib.sha256(parquet_bytes(table)).hexdigest()[:16]}.parquet")
    if standing.is_file():
        try:
            same = pq.read_table(standing).equals(table)
        except (OSError, pa.ArrowException):
            same = False
        if not same:
            for older in Path(job.work).glob("before-*.parquet"):
                older.unlink()
            if plan.against == BEFORE:
                write_bytes(LocalFileSystem(), str(kept), standing.read_bytes())
    if plan.against == BEFORE and kept.is_file():
        return compare_with("the run before", pq.read_table(kept), table, how)
    if plan.against and plan.against != BEFORE:
        return compare_with(plan.against, read_samples(Path(plan.against)), table, how)
    return None


def _card_title(base: str) -> str:
    """The first heading of the base's model card, where the base is a folder that has one."""
    card = Path(place_of(base), "README.md") if base else None
    text = card.read_text(encoding="utf-8", errors="replace") if card is not None and card.is_file() else ""
    return next((line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")), "")


def _link_pictures(erased: EraseJob, folder: Path) -> None:
    """All pictures of a method on a shard; as links to what the work folder holds, where the disk knows links."""
    for row in read_rows(erased.cases.kept_at):
        (folder / row.key / row.masks).mkdir(parents=True, exist_ok=True)
        own = erased.cases.kept_at / row.key
        for source, target in (
            (own / "before.png", folder / row.key / "before.png"),
            (own / "truth.png", folder / row.key / "truth.png"),
            (own / row.masks / "mask.png", folder / row.key / row.masks / "mask.png"),
            (erased.kept_at / row.key / f"{row.masks}.png", _result(folder, row, erased.method.name)),
        ):
            if source.is_file() and not target.exists():
                try:
                    os.link(source, target)
                except OSError:  # another disk, or one without links
                    shutil.copyfile(source, target)


def _result(folder: Path, row: CaseRow, method: str) -> Path:
    return folder / row.key / row.masks / f"{method}.png"


def _shown_cases(values: list[Values], how: How, count: int, folder: Path) -> list[ShownCase]:
    shown = []
    for own, index in worth_showing(values, how, count):
        case = own.cases[index]
        place = folder / "pictures" / own.dataset
        results = {method: _result(place, case, method) for method in own.scores}
        shown.append(
            ShownCase(
                dataset=own.dataset,
                key=case.key,
                masks=case.masks,
                people=case.people,
                overlap=case.overlap,
                hole_share=case.hole_share,
                before=place / case.key / "before.png",
                mask=place / case.key / case.masks / "mask.png",
                truth=place / case.key / "truth.png" if case.truth else None,
                results={method: path for method, path in results.items() if path.is_file()},
                values={method: own.values_of(method, index) for method in own.scores},
                not_computed={method: own.reasons_of(method, index) for method in own.scores},
            )
        )
    return shown


def _shown_layers(plan: Plan, folder: Path) -> list[ShownLayers]:
    shown = []
    for job in plan.layers:
        for place in sorted(job.kept_at.iterdir()):
            target = folder / "layers" / job.erased.cases.name / place.name
            shutil.copytree(place, target)
            layers = sorted(target.glob("layer-*.png"), key=lambda path: int(path.stem.rpartition("-")[2]))
            shown.append(
                ShownLayers(
                    dataset=job.erased.cases.name,
                    key=place.name,
                    method=job.erased.method.name,
                    before=target / "before.png",
                    background=target / "background.png",
                    layers=layers,
                    order=list(range(len(layers))),
                )
            )
    return shown
