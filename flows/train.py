"""The flow ``train``: adapters from a dataset, cached by settings, data and base."""

from __future__ import annotations

from typing import Any, ClassVar

from prefect import flow
from prefect.artifacts import create_link_artifact, create_table_artifact
from pydantic import Field

from dataset_tools.settings import Settings
from dataset_tools.shards import ShardDataset, read_manifest
from flows.caching import Files, Job, cached_step, result_storage, run_steps
from flows.progress import Progress
from mild.settings import TrainSettings


class TrainRecipe(Settings):
    """Everything that the flow ``train`` needs to know but where things lie."""

    base: str | None = None
    """Hub id or folder of an SDXL inpainting pipeline; null writes a tiny one with random weights, which runs
    anywhere and erases nothing: for trying the road."""
    base_seed: int = Field(default=0, ge=0)
    """Seed of the tiny base's weights."""
    configuration: str = "composite"
    """Configuration of the dataset to train on; the clean background must be known."""
    split: str = "train"
    """Split to train on."""
    train: TrainSettings = TrainSettings()
    """Steps, rates and schedule."""


class TinyBaseJob(Job):
    """Write the tiny base."""

    step: ClassVar[str] = "write-tiny-base"
    version: ClassVar[int] = 1
    seed: int


@cached_step
def write_tiny_base(job: TinyBaseJob) -> Files:
    """Write an SDXL inpainting pipeline of tiny size below ``work/base``."""
    from mild.nano import write_nano_base

    write_nano_base(f"{job.work}/base", job.seed)
    return Files.of(job, "work", ["base"])


class TrainJob(Job):
    """Train adapters."""

    step: ClassVar[str] = "train-adapters"
    version: ClassVar[int] = 2
    dataset: str
    dataset_digest: str
    base: str
    base_digest: str
    recipe: TrainRecipe

    def determines(self) -> Any:
        """Settings and digests; not where dataset and base lie."""
        return [self.dataset_digest, self.base_digest, self.recipe.model_dump(mode="json")]


@cached_step
def train_adapters(job: TrainJob) -> Files:
    """Run the training loop; writes the adapter directory ``root``."""
    from mild.training import train as train_model

    samples = ShardDataset(job.dataset, job.recipe.configuration, job.recipe.split)
    settings = job.recipe.train
    curve: list[dict[str, float]] = []
    with Progress("train-progress") as progress:
        progress.stage("train")
        progress.expect(settings.steps)

        def log(step: int, values: dict[str, float]) -> None:
            progress.advance(step - (int(curve[-1]["step"]) if curve else 0))
            curve.append({"step": step, **values})

        train_model(settings, samples, job.base, job.root, log, dataset_digest=job.dataset_digest)
    create_table_artifact(curve, key="train-loss", description=f"Loss while training {job.root}")
    return Files.of(job, "root", [""])


@flow(name="train", persist_result=False)
def train(settings: str, dataset: str, output: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train adapters, unless the same were trained before and lie there unaltered.

    Args:
        settings: path of a YAML file of `TrainRecipe`.
        dataset: folder or URL of a built dataset.
        output: folder of the adapters.
        changes: settings to change, dotted name to value.

    Returns:
        ``adapters`` and ``base`` (paths) and ``cached``.

    Raises:
        UserError: settings, dataset or base cannot be used.
    """
    recipe = TrainRecipe.load(settings, changes)
    root = output.rstrip("/")
    place = {"root": root, "work": f"{root}.work"}
    storage = result_storage(place["work"])
    digest = read_manifest(dataset).digest()
    base, base_digest = recipe.base or f"{place['work']}/base", recipe.base or ""
    if recipe.base is None:
        base_digest = run_steps(write_tiny_base, [TinyBaseJob(**place, seed=recipe.base_seed)], storage)[
            0
        ].result.digest
    job = TrainJob(**place, dataset=dataset, dataset_digest=digest, base=base, base_digest=base_digest, recipe=recipe)
    outcome = run_steps(train_adapters, [job], storage)[0]
    create_link_artifact(root, link_text="adapters", key="train-adapters")
    return {"adapters": root, "base": base, "cached": outcome.cached}
