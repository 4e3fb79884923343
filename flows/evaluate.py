"""The flow ``evaluate``: methods compared on a dataset, cached by settings, data and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from prefect import flow
from prefect.artifacts import create_link_artifact
from pydantic import Field

from dataset_tools.settings import Settings
from dataset_tools.shards import ShardDataset, read_manifest
from dataset_tools.storage import check_writable, local_place, normal_place
from flows.caching import Files, Job, cached_step, folder_digest, result_storage, run_steps
from flows.output_lock import sole_run
from flows.progress import Display, Progress
from flows.settings import Threads
from mild.bases import normal_name, place_of
from mild.model.saved import read_config
from mild.settings import EvaluateSettings


class EvaluateRecipe(Settings):
    """Everything that the flow ``evaluate`` needs to know but where things lie."""

    configuration: str = "composite"
    """Configuration of the dataset to judge on; metrics need the clean background."""
    split: str = "test"
    """Split to judge on."""
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    """Methods, metrics and sampling."""


class EvaluateJob(Job):
    """Compare methods."""

    step: ClassVar[str] = "compare-methods"
    version: ClassVar[int] = 4
    dataset: str
    dataset_digest: str
    adapters: str
    adapters_digest: str
    base: str
    recipe: EvaluateRecipe

    def determines(self) -> Any:
        """Settings and digests; not where dataset, adapters and base lie (the adapters' digest covers the base)."""
        return [self.dataset_digest, self.adapters_digest, self.recipe.model_dump(mode="json")]


@cached_step
def compare_methods(job: EvaluateJob) -> Files:
    """Run every method on the same samples; writes the folder ``root`` with its report."""
    from mild.evaluation.compare import evaluate as evaluate_methods

    samples = ShardDataset(job.dataset, job.recipe.configuration, job.recipe.split)
    settings = job.recipe.evaluate
    with Progress("evaluate-progress") as progress:
        progress.stage("evaluate")
        progress.expect(min(settings.samples, len(samples)))

        evaluate_methods(
            settings,
            samples,
            job.base,
            job.adapters,
            job.root,
            lambda done: progress.advance(),
            dataset_digest=job.dataset_digest,
            command="mild evaluate",
        )
    return Files.of(job, "root", [""])


@flow(name="evaluate", persist_result=False, task_runner=Threads())  # type: ignore[arg-type]
def evaluate(
    settings: str, dataset: str, adapters: str, output: str, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Judge adapters beside other methods, unless the same was done before and lies there unaltered.

    Args:
        settings: place of a YAML file of `EvaluateRecipe`.
        dataset: folder or URL of a built dataset.
        adapters: folder that the flow ``train`` wrote.
        output: local folder of tables, pictures and ``report.html``.
        changes: settings to change, dotted name to value.

    Returns:
        ``report`` (path), ``summary`` (means with intervals) and ``cached``.

    Raises:
        UserError: settings, dataset or adapters cannot be used, or the output cannot be written.
    """
    recipe = check_evaluate(settings, dataset, adapters, output, changes)
    root, dataset, adapters = local_place(output, "a report"), normal_place(dataset), normal_name(adapters)
    digest = read_manifest(dataset).digest()
    folder = place_of(adapters)
    place = {"root": root, "work": f"{root}.work"}
    job = EvaluateJob(
        **place,
        dataset=dataset,
        dataset_digest=digest,
        adapters=adapters,
        adapters_digest=folder_digest(folder),
        base=read_config(Path(folder)).base,
        recipe=recipe,
    )
    with sole_run(root):
        outcome = run_steps(compare_methods, [job], result_storage(place["work"]))[0]
    summary = json.loads(Path(root, "summary.json").read_text(encoding="utf-8"))
    Display().show(create_link_artifact, f"{root}/report.html", link_text="report", key="evaluation-report")
    return {"report": f"{root}/report.html", "summary": summary, "cached": outcome.cached}


def check_evaluate(
    settings: str, dataset: str, adapters: str, output: str, changes: dict[str, Any] | None = None
) -> EvaluateRecipe:
    """The recipe, where it, dataset, adapters and output of `evaluate` can be used; leaves nothing behind.

    Raises:
        UserError: they cannot.
    """
    recipe = EvaluateRecipe.load(settings, changes)
    root = local_place(output, "a report")
    read_manifest(dataset)
    read_config(Path(local_place(place_of(adapters), "adapters that are evaluated")))
    check_writable(root)
    return recipe
