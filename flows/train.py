"""The flow ``train``: adapters from a dataset, cached by settings, data and base."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from prefect import flow
from prefect.artifacts import create_link_artifact, create_table_artifact
from pydantic import AfterValidator, Field, model_validator

from dataset_tools.folders import check_replaceable
from dataset_tools.schema import Configuration
from dataset_tools.settings import Settings
from dataset_tools.shards import ShardDataset, read_manifest
from dataset_tools.storage import check_writable, local_place
from dataset_tools.storage_options import public_place
from flows.caching import Files, Job, cached_step, result_storage, run_steps
from flows.events import announce
from flows.names import artifact_key, flow_run_name
from flows.output_lock import sole_run
from flows.pages import show_picture
from flows.progress import Display, Progress, run_logger
from mild.bases import NANO, check_apart, digest_of_place, normal_name, place_of
from mild.model.saved import CONFIG, OWN, erasing_as_before
from mild.settings import LATENTS_FORMAT, TrainSettings
from mild.training.launch import TrainRequest, check_shards, launch
from mild.training.mixture import Mixture, usable


class TrainRecipe(Settings):
    """Everything that the flow ``train`` needs to know but where things lie."""

    base: Annotated[str, AfterValidator(normal_name)] = NANO
    """Hub id or folder of an SDXL inpainting pipeline; ``mild-nano`` is the very small one that comes with the package,
    which runs anywhere and knows drawn pictures only."""
    configurations: dict[Configuration, float] = Field(default={"composite": 1.0}, min_length=1)
    """Configurations of the dataset to train on, and how often samples come from each relative to the others."""
    split: str = "train"
    """Split to train on."""
    train: TrainSettings = TrainSettings()
    """Steps, rates and schedule."""
    launcher: tuple[str, ...] = ()
    """What starts several processes, a module and its arguments, such as ``["torch.distributed.run",
    "--nproc_per_node", "4"]`` or ``["accelerate.commands.launch", "--config_file", "fsdp.yaml"]``
    (`mild.training.sharding`); empty: one process. The result is the same up to rounding, and so is remembered whatever
    this is."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds without a word of training after which it hangs: it is killed, and tried again from its last checkpoint,
    twice. It says something every ``train.log_every`` steps, and loads the base before the first. Null: any time."""

    @model_validator(mode="after")
    def _composites_to_replace(self) -> Self:
        if self.train.fresh_composites is not None and "composite" not in self.configurations:
            raise ValueError(
                "train.fresh_composites stand in the place of composites: name composite in configurations"
            )
        return self


class LatentsJob(Job):
    """Encode what training sees."""

    step: ClassVar[str] = "encode-latents"
    version: ClassVar[int] = 1
    dataset: str
    dataset_digest: str
    base: str
    vae_digest: str
    recipe: TrainRecipe

    def determines(self) -> Any:
        """What the views and their latents depend on: not how they are trained on."""
        data = [self.dataset_digest, sorted(self.recipe.configurations), self.recipe.split]
        return [LATENTS_FORMAT, self.vae_digest, *data, self.recipe.train.determines_views()]


@cached_step
def encode_latents(job: LatentsJob) -> Files:
    """Write the latents of fixed views below ``work/latents``; whole shards that are there already are kept."""
    from mild.training import latents
    from mild.training.loop import check_machine

    check_machine(job.recipe.train)
    held: dict[str, ShardDataset] = {}
    weights: dict[str, float] = {}
    for name, weight in job.recipe.configurations.items():
        held[name], weights[name] = ShardDataset(job.dataset, name, job.recipe.split), weight
        check_shards(held[name])
    usable(Mixture(held, weights), job.recipe.train.resolution, job.recipe.train.batch_size)
    datasets = list(held.values())
    with Progress(artifact_key("latents-progress", job.root)) as progress:
        progress.stage("encode latents")
        progress.expect(sum(map(len, datasets)))
        latents.encode_latents(
            job.recipe.train, datasets, job.base, job.vae_digest, f"{job.work}/latents", progress.advance
        )
    return Files.of(job, "work", ["latents"], sum(map(len, datasets)))


class TrainJob(Job):
    """Train adapters."""

    step: ClassVar[str] = "train-adapters"
    version: ClassVar[int] = 9
    dataset: str
    dataset_digest: str
    base: str
    base_digest: str
    start_from_digest: str | None
    """Of the adapters that are trained further, or on which a prefix is; None where all is trained from the start."""
    recipe: TrainRecipe

    def determines(self) -> Any:
        """Settings and digests; not where dataset, base and adapters lie, nor how the result is come by."""
        # Their order decides about that of the samples.
        data = [list(self.recipe.configurations.items()), self.recipe.split]
        digests = [self.dataset_digest, self.base_digest, self.start_from_digest]
        return [*digests, data, self.recipe.train.determines()]


@cached_step
def train_adapters(job: TrainJob) -> Files:
    """Train in processes of their own; writes the adapter directory ``root``.

    Tried again after a crash, it goes on from the last checkpoint below ``work``.
    """
    recipe, done, shown = job.recipe, 0, -1
    newest: Path | None = None
    request = TrainRequest(
        settings=recipe.train,
        dataset=job.dataset,
        configurations=dict(recipe.configurations),
        split=recipe.split,
        dataset_digest=job.dataset_digest,
        base=job.base,
        base_digest=job.base_digest,
        output=job.root,
        latents=None if recipe.train.cached_views is None else f"{job.work}/latents",
    )
    with Progress(artifact_key("train-progress", job.root)) as progress:
        progress.stage("train")
        progress.expect(recipe.train.steps)

        def log(step: int, values: dict[str, float]) -> None:
            nonlocal done, shown, newest
            progress.advance(step - done)
            done = step
            progress.describe(f"train, loss {values['loss/total']:.4g}")
            newest = _show_samples(progress.pages, job, newest)
            # Each artifact is a request to the server, and a version of the one before.
            if (tenth := 10 * step // recipe.train.steps) > shown:
                shown = tenth
                rows = [{"name": name, "value": f"{value:.4g}"} for name, value in values.items()]
                description = f"Step {step} of {recipe.train.steps}"
                run_logger().info("step %d of %d: loss %.4g", step, recipe.train.steps, values["loss/total"])
                key = artifact_key("train-values", job.root)
                progress.pages.show(create_table_artifact, rows, key=key, description=description)

        launch(request, log, recipe.launcher, recipe.time_limit)
    _show_samples(progress.pages, job, newest)
    with Path(job.root, "loss.csv").open(newline="", encoding="utf-8") as file:
        losses = list(csv.DictReader(file))
    curve = losses[:: recipe.train.log_every] + losses[-1:]
    description = f"Loss while training {job.root}"
    progress.pages.show(create_table_artifact, curve, key=artifact_key("train-loss", job.root), description=description)
    return Files.of(job, "root", [""])


def _show_samples(pages: Display, job: TrainJob, shown: Path | None) -> Path | None:
    """Show the newest sample pictures, unless those are shown already; gives their file."""
    newest = max(Path(job.work, "samples").glob("step-*.png"), default=None)
    if newest is not None and newest != shown:
        pages.show(_show_sheet, newest, artifact_key("train-samples", job.root))
    return newest


def _show_sheet(path: Path, key: str) -> None:
    description = f"{path.stem}: picture, hole, result and, where it is known, truth"
    show_picture(path.read_bytes(), key=key, description=description)


@flow(name="train", flow_run_name=flow_run_name, persist_result=False)
def train(
    settings: TrainRecipe | str, dataset: str, output: str, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train adapters, unless the same were trained before and lie there unaltered.

    Args:
        settings: `TrainRecipe`, or the place of a YAML file of it.
        dataset: folder or URL of a built dataset.
        output: local folder of the adapters.
        changes: settings to change, dotted name to value.

    Returns:
        ``adapters`` (path), ``base`` (as the recipe names it), ``cached`` and ``set_aside``: a line on the samples that
        could not be trained on, empty where there were none.

    Raises:
        UserError: settings, dataset or base cannot be used, or the output cannot be written.
    """
    recipe = check_train(settings, dataset, output, changes)
    root, dataset = local_place(output, "adapters"), public_place(dataset, "dataset")
    digest = read_manifest(dataset).digest()
    place = {"root": root, "work": f"{root}.work"}
    storage = result_storage(place["work"])
    # Machines with one GPU for each that may train at a time set a limit on this tag.
    gpu = ["gpu"]
    with sole_run(root):
        if recipe.train.cached_views is not None:
            vae_digest = digest_of_place(f"{place_of(recipe.base)}/vae")
            encoding = LatentsJob(
                **place, dataset=dataset, dataset_digest=digest, base=recipe.base, vae_digest=vae_digest, recipe=recipe
            )
            run_steps(encode_latents.with_options(tags=gpu), [encoding], storage, in_this_thread=True)
        job = TrainJob(
            **place,
            dataset=dataset,
            dataset_digest=digest,
            base=recipe.base,
            base_digest=digest_of_place(recipe.base),
            start_from_digest=recipe.train.start_from and digest_of_place(recipe.train.start_from),
            recipe=recipe,
        )
        step = train_adapters.with_options(tags=gpu)
        outcome = run_steps(step, [job], storage, in_this_thread=True)[0]
        payload = {"adapters": root, "dataset": dataset}
        announce("adapters", root, outcome.result.digest, dataset=read_manifest(dataset).name, payload=payload)
    Display().show(create_link_artifact, root, link_text="adapters", key=artifact_key("train-adapters", root))
    aside = json.loads(Path(root, CONFIG).read_bytes())["set_aside"]
    if aside:
        run_logger().warning(aside)
    return {"adapters": root, "base": recipe.base, "cached": outcome.cached, "set_aside": aside}


def check_train(
    settings: TrainRecipe | str, dataset: str, output: str, changes: dict[str, Any] | None = None
) -> TrainRecipe:
    """The recipe, where it, the dataset and the output of `train` can be used; leaves nothing behind.

    Raises:
        UserError: they cannot.
    """
    recipe = TrainRecipe.load(settings, changes)
    root = local_place(output, "adapters")
    read_manifest(public_place(dataset, "dataset"))
    check_apart(root, recipe.train.start_from)
    check_writable(root)
    check_replaceable(root, CONFIG, OWN)
    return recipe.model_copy(update={"train": erasing_as_before(recipe.train)})
