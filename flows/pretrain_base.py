"""The flow ``pretrain-base``: the nano base, from nothing or from one that is there, to a folder with its card."""

from __future__ import annotations

import json
import os
import shlex
from typing import Annotated, Any, ClassVar

from prefect import flow
from prefect.artifacts import create_link_artifact, create_table_artifact
from pydantic import AfterValidator, Field

from dataset_tools.folders import check_replaceable
from dataset_tools.settings import Settings
from dataset_tools.storage import check_writable, local_place
from flows.caching import Files, Job, cached_step, result_storage, run_steps
from flows.names import artifact_key, flow_run_name
from flows.output_lock import sole_run
from flows.progress import Display, Progress
from flows.settings import Threads
from mild.bases import check_apart, digest_of_place, normal_name
from mild.nano.pictures import DrawingSettings, draw_pictures
from mild.nano.settings import MARK, OWN, PretrainSettings


class PretrainRecipe(Settings):
    """Everything that the flow ``pretrain-base`` needs to know but where things lie."""

    base: Annotated[str, AfterValidator(normal_name)] | None = None
    """Nano base that is trained further, a folder, a hub id, or ``mild-nano``: UNet and text encoders start from its
    weights, its VAE is taken as it is, and the settings of ``pretrain.vae`` count for nothing. Null: from nothing."""
    pretrain: PretrainSettings = PretrainSettings()
    """Pictures, networks, steps."""
    scenes: int = Field(24, ge=1)
    """Scenes of the sample world's test split on which the base is measured."""
    inference_steps: int = Field(25, ge=1, le=1000)
    """DDIM steps of each fill that is measured."""
    judgement: str = ""
    """For the card: what a person says who has looked at the pictures."""


class DrawJob(Job):
    """Draw the pictures, ``work/pictures``."""

    step: ClassVar[str] = "draw-pictures"
    version: ClassVar[int] = 2
    settings: DrawingSettings


class VaeJob(Job):
    """Train the VAE, ``work/vae``."""

    step: ClassVar[str] = "train-vae"
    version: ClassVar[int] = 2
    settings: PretrainSettings
    pictures: str
    """Digest."""

    def determines(self) -> Any:
        """All but how the UNet is trained."""
        return [self.pictures, self.settings.determines("vae")]


class TakeVaeJob(Job):
    """Take the VAE of the base that is trained further, ``work/vae``."""

    step: ClassVar[str] = "take-vae"
    version: ClassVar[int] = 1
    base: str
    base_digest: str

    def determines(self) -> Any:
        """The base, wherever it lies."""
        return self.base_digest


class UnetJob(Job):
    """Train the UNet, ``work/trained``."""

    step: ClassVar[str] = "train-unet"
    version: ClassVar[int] = 3
    base: str | None
    base_digest: str | None
    settings: PretrainSettings
    pictures: str
    """Digest."""
    vae: str
    """Digest."""

    def determines(self) -> Any:
        """All but where the base lies, and how the VAE was come by."""
        settings = self.settings.determines("unet", own_vae=False)
        return [self.base_digest, self.pictures, self.vae, settings]


class EncodeJob(Job):
    """Encode the examples, ``work/examples``."""

    step: ClassVar[str] = "encode-examples"
    version: ClassVar[int] = 2
    settings: PretrainSettings
    pictures: str
    """Digest."""
    vae: str
    """Digest."""

    def determines(self) -> Any:
        """What the latents depend on: not how long the UNet is trained on them."""
        return [self.pictures, self.vae, self.settings.seed, self.settings.unet.holes, self.settings.mixed_precision]


class ExportJob(Job):
    """Write the base with its card, ``root``."""

    step: ClassVar[str] = "export-base"
    version: ClassVar[int] = 3
    recipe: PretrainRecipe
    base_digest: str | None
    pictures: str
    """Digest."""
    trained: str
    """Digest."""
    command: str

    def determines(self) -> Any:
        """All but where the base lies."""
        decisive = super().determines()
        decisive["recipe"]["base"] = _without_place(self.recipe.base)
        return decisive


@cached_step
def draw(job: DrawJob) -> Files:
    """See `draw_pictures`."""
    draw_pictures(job.settings, f"{job.work}/pictures", os.cpu_count() or 1)
    return Files.of(job, "work", ["pictures"], job.settings.scenes * job.settings.crops)


@cached_step
def pretrain_vae(job: VaeJob) -> Files:
    """See `mild.nano.pretraining.train_vae`."""
    from mild.nano.pretraining import train_vae

    with _Curve(job, "vae", job.settings.vae.steps) as curve:
        train_vae(job.settings, f"{job.work}/pictures", f"{job.work}/vae", curve.log)
    return Files.of(job, "work", ["vae"])


@cached_step
def take_base_vae(job: TakeVaeJob) -> Files:
    """See `mild.nano.pretraining.take_vae`."""
    from mild.nano.pretraining import take_vae

    take_vae(job.base, f"{job.work}/vae")
    return Files.of(job, "work", ["vae"])


@cached_step
def encode(job: EncodeJob) -> Files:
    """See `mild.nano.pretraining.encode_examples`."""
    from mild.nano.pretraining import encode_examples

    count = job.settings.drawing.scenes * job.settings.drawing.crops
    with _Curve(job, "latents", count) as curve:
        places = [f"{job.work}/{name}" for name in ("pictures", "vae", "examples")]
        encode_examples(job.settings, places[0], places[1], places[2], curve.log, os.cpu_count() or 1)
    return Files.of(job, "work", ["examples"], count)


@cached_step
def pretrain_unet(job: UnetJob) -> Files:
    """See `mild.nano.pretraining.train_unet`."""
    from mild.nano.pretraining import train_unet

    places = [f"{job.work}/{name}" for name in ("pictures", "vae", "examples", "trained")]
    with _Curve(job, "unet", job.settings.unet.steps) as curve:
        train_unet(job.settings, places[0], places[1], places[2], places[3], curve.log, job.base)
    return Files.of(job, "work", ["trained"])


@cached_step
def export(job: ExportJob) -> Files:
    """See `mild.nano.export.export_base`."""
    from mild.nano.export import export_base

    base = _without_place(job.recipe.base)
    numbers = export_base(
        job.recipe.pretrain,
        f"{job.work}/pictures",
        f"{job.work}/vae",
        f"{job.work}/trained",
        job.root,
        data_digest=job.pictures,
        command=job.command,
        base=None if base is None else (base, job.base_digest or ""),
        judgement=job.recipe.judgement,
        scenes=job.recipe.scenes,
        steps=job.recipe.inference_steps,
    )
    Display().show(
        create_table_artifact,
        [{"what": name, "value": round(value, 2)} for name, value in numbers.items()],
        key=artifact_key("pretrain-base-quality", job.root),
        description=f"{job.root}: PSNR in dB, and perceptual distances",
    )
    return Files.of(job, "root", [""])


@flow(name="pretrain-base", flow_run_name=flow_run_name, persist_result=False, task_runner=Threads())  # type: ignore[arg-type]
def pretrain_base(settings: PretrainRecipe | str, output: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train the nano base, unless the same was trained before and lies there unaltered.

    Pictures, latents and checkpoints lie in ``output.work``; an interrupted run goes on from there.

    Args:
        settings: `PretrainRecipe`, or the place of a YAML file of it.
        output: local folder of the base.
        changes: settings to change, dotted name to value.

    Returns:
        ``base`` (path), and ``cached``: the names of the steps that were not run again.

    Raises:
        UserError: settings or the base to start from cannot be used, or ``output`` cannot be written.
    """
    recipe = check_pretrain(settings, output, changes)
    root = local_place(output, "a base")
    place = {"root": root, "work": f"{root}.work"}
    storage = result_storage(place["work"])
    cached = []

    def run(step: Any, job: Job) -> str:
        # What fills a GPU; machines may set a limit on it.
        outcome = run_steps(step if step is draw else step.with_options(tags=["gpu"]), [job], storage)[0]
        if outcome.cached:
            cached.append(job.step)
        digest: str = outcome.result.digest
        return digest

    chosen = recipe.pretrain
    with sole_run(root):
        base_digest = None if recipe.base is None else digest_of_place(recipe.base)
        began = {"base": recipe.base, "base_digest": base_digest}
        # First of all: a base that cannot be used is said before hundreds of scenes are drawn.
        vae = "" if recipe.base is None else run(take_base_vae, TakeVaeJob(**place, **began))
        pictures = run(draw, DrawJob(**place, settings=chosen.drawing))
        vae = vae or run(pretrain_vae, VaeJob(**place, settings=chosen, pictures=pictures))
        run(encode, EncodeJob(**place, settings=chosen, pictures=pictures, vae=vae))
        trained = run(pretrain_unet, UnetJob(**place, **began, settings=chosen, pictures=pictures, vae=vae))
        given = os.path.basename(settings) if isinstance(settings, str) else "RECIPE"
        shown = {n: _without_place(recipe.base) if n == "base" else value for n, value in (changes or {}).items()}
        said = (f"--set {shlex.quote(f'{name}={json.dumps(value)}')}" for name, value in shown.items())
        command = " ".join(["mild pretrain", given, *said])
        exported = {"recipe": recipe, "base_digest": base_digest, "trained": trained}
        run(export, ExportJob(**place, **exported, pictures=pictures, command=command))
    Display().show(create_link_artifact, root, link_text="base", key=artifact_key("pretrain-base", root))
    return {"base": root, "cached": cached}


def _without_place(base: str | None) -> str | None:
    """What a base is called on a card: where it lies here is nobody else's business."""
    return os.path.basename(base) if base is not None and os.path.isabs(base) else base


def check_pretrain(
    settings: PretrainRecipe | str, output: str, changes: dict[str, Any] | None = None
) -> PretrainRecipe:
    """The recipe, where it and the output of `pretrain_base` can be used; leaves nothing behind.

    Raises:
        UserError: they cannot.
    """
    recipe = PretrainRecipe.load(settings, changes)
    root = local_place(output, "a base")
    check_apart(root, recipe.base)
    check_writable(root)
    check_replaceable(root, MARK, OWN)
    return recipe


class _Curve(Progress):
    """Progress of one stage of training, and some points of its loss as an artifact."""

    def __init__(self, job: Job, stage: str, steps: int) -> None:
        super().__init__(artifact_key(f"pretrain-{stage}", job.root))
        self._key_of_loss = artifact_key(f"pretrain-{stage}-loss", job.root)
        self._stage, self._steps, self._last = stage, steps, 0
        self._rows: list[dict[str, float]] = []

    def __enter__(self) -> _Curve:
        super().__enter__()
        self.stage(self._stage)
        self.expect(self._steps)
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.pages.show(create_table_artifact, self._rows, key=self._key_of_loss)

    def log(self, stage: str, step: int, loss: float) -> None:
        """To be called after every step."""
        self.advance(step - self._last)
        self._last = step
        if step % max(1, self._steps // 50) == 0 or step == self._steps:
            self._rows.append({"step": step, "loss": loss})
