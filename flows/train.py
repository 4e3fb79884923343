"""The flow ``train``: adapters from a dataset, cached by settings, data and base."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, ClassVar

from prefect import flow
from prefect.artifacts import create_link_artifact, create_table_artifact
from pydantic import Field

from dataset_tools.schema import Configuration
from dataset_tools.settings import Settings
from dataset_tools.shards import read_manifest
from flows.caching import Files, Job, cached_step, folder_digest, result_storage, run_steps
from flows.progress import Progress
from mild.launch import TrainRequest, launch
from mild.settings import TrainSettings


class TrainRecipe(Settings):
    """Everything that the flow ``train`` needs to know but where things lie."""

    base: str | None = None
    """Hub id or folder of an SDXL inpainting pipeline; null writes a tiny one with random weights, which runs
    anywhere and erases nothing: for trying the road."""
    base_seed: int = Field(default=0, ge=0)
    """Seed of the tiny base's weights."""
    configurations: dict[Configuration, float] = Field(default={"composite": 1.0}, min_length=1)
    """Configurations of the dataset to train on, and how often samples come from each relative to the others."""
    split: str = "train"
    """Split to train on."""
    train: TrainSettings = TrainSettings()
    """Steps, rates and schedule."""
    launcher: tuple[str, ...] = ()
    """What starts several processes, a module and its arguments, such as ``["torch.distributed.run",
    "--nproc_per_node", "4"]`` or ``["accelerate.commands.launch", "--multi_gpu", "--num_processes", "4"]``; empty: one
    process. The result is the same up to rounding, and so is remembered whatever this is."""


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
    version: ClassVar[int] = 3
    dataset: str
    dataset_digest: str
    base: str
    base_digest: str
    recipe: TrainRecipe

    def determines(self) -> Any:
        """Settings and digests; not where dataset and base lie."""
        return [self.dataset_digest, self.base_digest, self.recipe.model_dump(mode="json", exclude={"launcher"})]


@cached_step
def train_adapters(job: TrainJob) -> Files:
    """Train in processes of their own; writes the adapter directory ``root``.

    Tried again after a crash, it goes on from the last checkpoint below ``work``.
    """
    recipe, done = job.recipe, 0
    request = TrainRequest(
        settings=recipe.train,
        dataset=job.dataset,
        configurations=dict(recipe.configurations),
        split=recipe.split,
        dataset_digest=job.dataset_digest,
        base=job.base,
        base_digest=job.base_digest,
        output=job.root,
    )
    with Progress("train-progress") as progress:
        progress.stage("train")
        progress.expect(recipe.train.steps)

        def log(step: int, values: dict[str, float]) -> None:
            nonlocal done
            progress.advance(step - done)
            done = step

        launch(request, log, recipe.launcher)
    with Path(job.root, "loss.csv").open(newline="", encoding="utf-8") as file:
        losses = list(csv.DictReader(file))
    curve = losses[:: recipe.train.log_every] + losses[-1:]
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
    if recipe.base is None:
        base = f"{place['work']}/base"
        tiny = TinyBaseJob(**place, seed=recipe.base_seed)
        base_digest = run_steps(write_tiny_base, [tiny], storage)[0].result.digest
    else:
        base = recipe.base
        base_digest = folder_digest(base) if Path(base).is_dir() else base
    job = TrainJob(**place, dataset=dataset, dataset_digest=digest, base=base, base_digest=base_digest, recipe=recipe)
    # Machines with one GPU for each that may train at a time set a limit on this tag.
    step = train_adapters.with_options(tags=["gpu"])
    outcome = run_steps(step, [job], storage, in_this_thread=True)[0]
    create_link_artifact(root, link_text="adapters", key="train-adapters")
    return {"adapters": root, "base": base, "cached": outcome.cached}
