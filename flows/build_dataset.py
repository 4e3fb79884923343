"""The flow ``build-dataset``: curate, plan shards, build each, check, describe.

The unit of work is the shard. A step's result is a small manifest; pictures go straight to storage.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from prefect import Task, flow
from prefect.artifacts import create_image_artifact, create_table_artifact
from prefect.concurrency.sync import concurrency
from prefect.events import emit_event
from pydantic import BaseModel

from dataset_tools.card import write_card
from dataset_tools.compositing import CompositorSettings, Cutout, CutoutRow, compose, cut_out, cutout_rows
from dataset_tools.curated import CuratedSettings, Estimators, curated_samples, photographs, rejection_rows
from dataset_tools.curation import CurationSettings
from dataset_tools.errors import Rejected, UserError
from dataset_tools.estimators.annotated import AnnotatedSettings
from dataset_tools.records import (
    REJECTION_SCHEMA,
    SPLITS,
    ImageRecord,
    Rejection,
    Split,
    record_from_row,
    records_to_table,
    rejections_to_table,
)
from dataset_tools.schema import CONFIGURATIONS, EncodingSettings, Sample
from dataset_tools.settings import digest_of
from dataset_tools.shards import (
    Manifest,
    Shard,
    ShardDataset,
    index_path,
    is_intact,
    read_index,
    read_manifest,
    write_shard,
)
from dataset_tools.sources.folder import FolderSettings
from dataset_tools.sources.openimages import OpenImagesSettings
from dataset_tools.sources.sample import SampleSettings, write_mirror
from dataset_tools.storage import (
    open_root,
    remove_partial_files,
    sha256_of_file,
    write_bytes,
    written_whole,
)
from flows.caching import Files, Job, JobT, ResultT, cached_step, result_storage, run_steps
from flows.progress import Progress
from flows.settings import BuildSettings, PictureSource

DATASET_READY = "mild.dataset.ready"
"""Name of the event that a finished build emits."""
DOWNLOADS = "mild-downloads"
"""Global concurrency limit that shard tasks respect while they download, where the server has one by this name."""

CURATED, CURATED_REJECTED = "curated.parquet", "curated-rejected.parquet"


class BuiltShard(BaseModel):
    """Result of a step that writes a shard."""

    shard: Shard

    def is_sound(self, root: str, work: str) -> bool:
        """Whether the shard is as it was written, and none of its rejections may pass when tried again."""
        return self.shard.transient == 0 and is_intact(root, self.shard)


class MirrorJob(Job):
    """Draw the sample world as a mirror in OpenImages' format."""

    step: ClassVar[str] = "draw-sample-mirror"
    version: ClassVar[int] = 1
    source: SampleSettings


@cached_step
def draw_sample_mirror(job: MirrorJob) -> Files:
    """Write the mirror below ``work/mirror``."""
    write_mirror(job.source, f"{job.work}/mirror")
    return Files.of(job, "work", ["mirror"])


class CurateJob(Job):
    """Choose the images of a source."""

    step: ClassVar[str] = "curate"
    version: ClassVar[int] = 1
    source: PictureSource
    fingerprint: str

    def determines(self) -> Any:
        """The fingerprint covers the source's tables and its settings, wherever they lie."""
        return self.fingerprint


@cached_step
def curate(job: CurateJob) -> Files:
    """Write the chosen images, in the order of the shards, and what was set aside, below ``work``."""
    curation = job.source.open().curate()
    # By split and role, so that the images of one shard are neighbours; within, in the order of the source.
    records = sorted(curation.records, key=lambda r: (SPLITS.index(r.split), r.role))
    filesystem, base = open_root(job.work)
    tables = {CURATED: records_to_table(records), CURATED_REJECTED: rejections_to_table(curation.rejected)}
    for name, table in tables.items():
        with written_whole(filesystem, f"{base}/{name}") as partial:
            pq.write_table(table, partial)
    files = Files.of(job, "work", tables, rows=len(records))
    said = [_digest_of_rows(tables[CURATED], 0, len(records)), files.tokens[CURATED_REJECTED]]
    return files.model_copy(update={"digest": digest_of(said)})


class CuratedShardJob(Job):
    """Photographs ``start`` to ``stop`` of a split."""

    step: ClassVar[str] = "build-curated-shard"
    version: ClassVar[int] = 1
    path: str
    source: PictureSource
    mirror: str
    """Digest of the drawn sample world; empty for other sources."""
    settings: CuratedSettings
    pose: AnnotatedSettings | None
    parsing: AnnotatedSettings | None
    plate: AnnotatedSettings | None
    side_cars: list[str | None]
    """Fingerprints of what the three read; empty where ``mirror`` covers it."""
    encoding: EncodingSettings
    split: Split
    start: int
    stop: int
    records: str
    """sha256 of the records of this shard."""

    def determines(self) -> Any:
        """Rows of the curated table, not their numbers; cues by settings, not by place."""
        return [
            self.path,
            self.mirror,
            self.settings.model_dump(mode="json", exclude={"fetch_workers"}),
            [cue and cue.kind for cue in (self.pose, self.parsing, self.plate)],
            self.side_cars,
            self.encoding.model_dump(mode="json"),
            self.records,
        ]

    def label(self) -> str:
        """The shard's name."""
        return self.path.removesuffix(".tar")


@cached_step
def build_curated_shard(job: CuratedShardJob) -> BuiltShard:
    """fetch and decode -> clean masks -> pose, parsing, plate -> write."""
    rejected: list[Rejection] = []
    rows: list[dict[str, Any]] = []
    estimators = Estimators(
        pose=job.pose.open() if job.pose else None,
        parsing=job.parsing.open() if job.parsing else None,
        plate=job.plate.open() if job.plate else None,
    )
    records = _records(job.work, job.split, "people", job.start, job.stop)

    def samples() -> Iterable[Sample]:
        yield from curated_samples(records, job.source.open(), job.settings, estimators, rejected)
        rows.extend(rejection_rows(rejected))

    with _download_slot(records):
        return BuiltShard(shard=write_shard(samples(), job.root, job.path, job.encoding, rows))


class CutoutsJob(Job):
    """List the people of a split that can be cut out."""

    step: ClassVar[str] = "list-cutouts"
    version: ClassVar[int] = 1
    split: Split
    shards: list[Shard]
    settings: CompositorSettings

    def label(self) -> str:
        """The step and split."""
        return f"{self.step}-{self.split}"


@cached_step
def list_cutouts(job: CutoutsJob) -> Files:
    """Write ``cutouts-{split}.json`` below ``work``: the curated shards and the usable people in them."""
    dataset = ShardDataset.of_shards(job.root, job.shards)
    rows = [
        row.model_dump()
        for index in range(len(dataset))
        for row in cutout_rows(index, dataset.annotations(index), job.settings)
    ]
    filesystem, base = open_root(job.work)
    name = f"cutouts-{job.split}.json"
    document = {"shards": [shard.model_dump() for shard in job.shards], "rows": rows}
    write_bytes(filesystem, f"{base}/{name}", json.dumps(document).encode())
    return Files.of(job, "work", [name], rows=len(rows))


class CompositeShardJob(Job):
    """Composites ``start`` to ``stop`` of a split."""

    step: ClassVar[str] = "build-composite-shard"
    version: ClassVar[int] = 1
    path: str
    source: PictureSource
    mirror: str
    """Digest of the drawn sample world; empty for other sources."""
    curated: CuratedSettings
    settings: CompositorSettings
    encoding: EncodingSettings
    split: Split
    start: int
    stop: int
    first_background: int
    last_background: int
    """Backgrounds ``first`` to ``last`` (exclusive) of the split are this shard's own."""
    records: str
    """sha256 of the records of these backgrounds."""
    cutouts: str
    """Digest of the list of cut-outs, which covers the shards that hold them."""

    def determines(self) -> Any:
        """Settings and digests; the background's numbers do not matter, their rows do."""
        return [
            self.path,
            self.mirror,
            self.curated.decode.model_dump(mode="json"),
            self.settings.model_dump(mode="json", exclude={"samples"}),
            self.encoding.model_dump(mode="json"),
            [self.start, self.stop],
            self.records,
            self.cutouts,
        ]

    def label(self) -> str:
        """The shard's name."""
        return self.path.removesuffix(".tar")


@cached_step
def build_composite_shard(job: CompositeShardJob) -> BuiltShard:
    """Fetch backgrounds -> place people of the same split on them -> write."""
    filesystem, base = open_root(job.work)
    listing = json.loads(filesystem.cat_file(f"{base}/cutouts-{job.split}.json"))
    donors = ShardDataset.of_shards(job.root, [Shard(**shard) for shard in listing["shards"]])
    people = [CutoutRow(**row) for row in listing["rows"]]
    rejected: list[Rejection] = []
    rows: list[dict[str, Any]] = []

    # Neighbouring composites often draw from the same pictures; decoding is what costs.
    decoded = lru_cache(maxsize=32)(donors.__getitem__)

    def load(row: CutoutRow) -> Cutout:
        return cut_out(decoded(row.sample), row.person, job.settings)

    records = _records(job.work, job.split, "background", job.first_background, job.last_background)

    def samples() -> Iterable[Sample]:
        backgrounds = list(photographs(records, job.source.open(), job.curated, rejected))
        count = job.stop - job.start
        for number in range(job.start, job.stop):
            key = f"composite-{job.split}-{number:08d}"
            try:
                if not backgrounds:
                    raise Rejected("no-background", f"none of the {len(records)} backgrounds of {job.path} can be used")
                background = backgrounds[(number - job.start) * len(backgrounds) // count]
                yield compose(
                    key,
                    job.split,
                    background.decoded.image,
                    background.origin("background"),
                    people,
                    load,
                    job.settings,
                )
            except Rejected as error:
                rejected.append(
                    Rejection(job.split, key, "", "composite", "image-rejected", error.reason, error.message)
                )
        rows.extend(rejection_rows(rejected))

    with _download_slot(records):
        return BuiltShard(shard=write_shard(samples(), job.root, job.path, job.encoding, rows))


class DescribeJob(Job):
    """Write what stands beside the shards."""

    step: ClassVar[str] = "describe"
    version: ClassVar[int] = 1
    name: str
    description: str
    shards: dict[str, dict[str, list[Shard]]]
    curated_rejected: str
    """Digest of what curation set aside."""
    settings: dict[str, Any]


class Description(BaseModel):
    """The files beside the shards, as the manifest lists them."""

    files: dict[str, str]

    def is_sound(self, root: str, work: str) -> bool:
        """Whether every file is as it was written."""
        filesystem, base = open_root(root)
        return all(
            filesystem.exists(f"{base}/{name}") and sha256_of_file(filesystem, f"{base}/{name}") == sha256
            for name, sha256 in self.files.items()
        )


@cached_step
def describe(job: DescribeJob) -> Description:
    """Write card, Croissant metadata, attribution and ``rejected.parquet``."""
    filesystem, base = open_root(job.work)
    with filesystem.open(f"{base}/{CURATED_REJECTED}", "rb") as file:
        rejected = pq.read_table(file)
    for splits in job.shards.values():
        for shards in splits.values():
            for shard in shards:
                rows = read_index(job.root, shard.path)["rejected"]
                rejected = pa.concat_tables([rejected, pa.Table.from_pylist(rows, schema=REJECTION_SCHEMA)])
    return Description(
        files=write_card(
            job.root,
            name=job.name,
            description=job.description,
            shards=job.shards,
            settings=job.settings,
            rejected=rejected,
        )
    )


@flow(name="build-dataset", persist_result=False)
def build_dataset(settings: str, output: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Build a dataset, or bring one up to date: only what is missing, altered or set otherwise is redone.

    Args:
        settings: path of a YAML file of `BuildSettings`.
        output: folder or fsspec URL of the dataset; intermediate files go to ``{output}.work``.
        changes: settings to change, dotted name to value, such as ``{"composite.seed": 3}``.

    Returns:
        ``dataset`` (path), ``digest``, ``samples``, ``shards``, ``cached`` (shards not redone) and ``rejected``.

    Raises:
        UserError: a setting, table or path cannot be used.
    """
    checked = check_build(settings, output, changes)
    return build_shards.with_options(task_runner=checked.runner.open())(checked, output.rstrip("/"))


def check_build(settings: str, output: str, changes: dict[str, Any] | None = None) -> BuildSettings:
    """The settings, where they, the output and the source's files can be used; leaves nothing behind.

    Raises:
        UserError: they cannot.
    """
    checked = BuildSettings.load(settings, changes)
    _check_writable(output.rstrip("/"))
    if not isinstance(checked.source, SampleSettings):
        checked.source.open().fingerprint()
    return checked


@flow(name="build-shards", persist_result=False)
def build_shards(settings: BuildSettings, root: str) -> dict[str, Any]:
    """The steps of `build_dataset`, on the task runner that the settings name."""
    with Progress("build-progress") as progress:
        return _Build(settings, root, progress).run()


class _Build:
    """One run of the steps in order; each method is one stage."""

    def __init__(self, settings: BuildSettings, root: str, progress: Progress) -> None:
        self.settings, self.root, self.work, self.progress = settings, root, f"{root}.work", progress
        self.place = {"root": root, "work": self.work}
        self.storage = result_storage(self.work)
        self.cached = 0
        for place in (root, self.work):
            remove_partial_files(*open_root(place))

    def run(self) -> dict[str, Any]:
        self.progress.stage("source")
        self.source, self.mirror = self._source()
        self.progress.stage("curate")
        job = CurateJob(**self.place, source=self.source, fingerprint=self.source.open().fingerprint())
        self.curated = self._steps(curate, [job])[0]
        self._withdraw_outdated_manifest()
        self.progress.stage("curated shards")
        chosen = self._curated_shards()
        shards: dict[str, dict[str, list[Shard]]] = {self.settings.curated.configuration: chosen}
        if self.settings.composite is not None:
            self.progress.stage("cut-outs")
            cutouts = self._cutouts(self.settings.composite, chosen)
            self.progress.stage("composite shards")
            shards["composite"] = self._composite_shards(self.settings.composite, cutouts)
        if not any(shard.samples for splits in shards.values() for held in splits.values() for shard in held):
            raise UserError(
                f"{self.settings.source.kind}: no picture could be used; see {self.work}/{CURATED_REJECTED}"
            )
        self.progress.stage("describe")
        return self._finish(shards)

    def _steps(self, step: Task[[JobT], ResultT], jobs: Sequence[JobT]) -> list[ResultT]:
        outcomes = run_steps(step, jobs, self.storage, self.progress)
        self.cached += sum(o.cached for o in outcomes if isinstance(o.result, BuiltShard))
        return [outcome.result for outcome in outcomes]

    def _source(self) -> tuple[OpenImagesSettings | FolderSettings, str]:
        source = self.settings.source
        if not isinstance(source, SampleSettings):
            return source, ""
        mirror = self._steps(draw_sample_mirror, [MirrorJob(**self.place, source=source)])[0]
        root = f"{self.work}/mirror"
        everything = CurationSettings(images_per_stratum=None, backgrounds=None)
        return OpenImagesSettings(root=root, images=f"{root}/images", curation=everything), mirror.digest

    def _cue(self, cue: AnnotatedSettings | None) -> AnnotatedSettings | None:
        """Side-cars that lie beside the source's own files are found there."""
        if cue is None or cue.root:
            return cue
        if isinstance(self.source, FolderSettings):
            raise UserError("folder: side-cars are read from a root that the settings must name")
        return cue.model_copy(update={"root": self.source.root})

    def _curated_shards(self) -> dict[str, list[Shard]]:
        settings, jobs = self.settings, []
        cues = [self._cue(cue) for cue in (settings.pose, settings.parsing, settings.plate)]
        pose, parsing, plate = cues
        # Often one folder holds all three; a drawn world's are covered by its mirror.
        places = {} if self.mirror else {cue.root: cue for cue in cues if cue is not None}
        fingerprints = {root: cue.open().fingerprint() for root, cue in places.items()}
        side_cars = [cue and fingerprints.get(cue.root, "") for cue in cues]
        for split in SPLITS:
            table, size = _table(self.work, split, "people"), settings.samples_per_shard
            count = len(table)
            for number, start in enumerate(range(0, count, size)):
                stop = min(start + size, count)
                jobs.append(
                    CuratedShardJob(
                        **self.place,
                        path=f"{settings.curated.configuration}/{split}-{number:06d}.tar",
                        source=self.source,
                        mirror=self.mirror,
                        settings=settings.curated,
                        pose=pose,
                        parsing=parsing,
                        plate=plate,
                        side_cars=side_cars,
                        encoding=settings.curated_encoding,
                        split=split,
                        start=start,
                        stop=stop,
                        records=_digest_of_rows(table, start, stop),
                    )
                )
        return _by_split(jobs, self._steps(build_curated_shard, jobs))

    def _cutouts(self, settings: CompositorSettings, chosen: dict[str, list[Shard]]) -> dict[str, Files]:
        jobs = [
            CutoutsJob(**self.place, split=split, shards=chosen[split], settings=settings)
            for split in SPLITS
            if settings.samples[split] and split in chosen
        ]
        return {job.split: files for job, files in zip(jobs, self._steps(list_cutouts, jobs), strict=True)}

    def _composite_shards(self, settings: CompositorSettings, cutouts: dict[str, Files]) -> dict[str, list[Shard]]:
        jobs = []
        for split in SPLITS:
            samples, size = settings.samples[split], self.settings.samples_per_shard
            if not samples:
                continue
            table = _table(self.work, split, "background")
            backgrounds = len(table)
            if not backgrounds or split not in cutouts or not cutouts[split].rows:
                missing = "person-free background" if not backgrounds else "person that can be cut out"
                raise UserError(
                    f"composite: split {split} has no {missing}; give some, or set composite.samples.{split} to 0"
                )
            for number, start in enumerate(range(0, samples, size)):
                stop = min(start + size, samples)
                # Each background belongs to one shard (or few neighbours), so that it is fetched about once.
                first = start * backgrounds // samples
                last = max(first + 1, stop * backgrounds // samples)
                jobs.append(
                    CompositeShardJob(
                        **self.place,
                        path=f"composite/{split}-{number:06d}.tar",
                        source=self.source,
                        mirror=self.mirror,
                        curated=self.settings.curated,
                        settings=settings,
                        encoding=self.settings.composite_encoding,
                        split=split,
                        start=start,
                        stop=stop,
                        first_background=first,
                        last_background=last,
                        records=_digest_of_rows(table, first, last),
                        cutouts=cutouts[split].digest,
                    )
                )
        return _by_split(jobs, self._steps(build_composite_shard, jobs))

    def _withdraw_outdated_manifest(self) -> None:
        """What a manifest describes must stand; it goes before the first shard that will differ is written."""
        filesystem, base = open_root(self.root)
        if filesystem.exists(f"{base}/manifest.json"):
            try:
                manifest = read_manifest(self.root)
            except UserError:
                manifest = None
            if manifest is None or (manifest.settings, manifest.source) != (
                self._recorded_settings(),
                self.curated.digest,
            ):
                filesystem.rm_file(f"{base}/manifest.json")

    def _recorded_settings(self) -> dict[str, Any]:
        """What decides about the data; not where files lie, nor what opens storage (it may be secret)."""
        cue = {"root"}
        places = {"root", "root_options", "images", "images_options", "cache", "photos", "masks", "backgrounds"}
        left_out: dict[str, Any] = {"runner": True, "source": places, "pose": cue, "parsing": cue, "plate": cue}
        return self.settings.model_dump(mode="json", exclude=left_out)

    def _finish(self, shards: dict[str, dict[str, list[Shard]]]) -> dict[str, Any]:
        settings = self.settings
        job = DescribeJob(
            **self.place,
            name=settings.name,
            description=settings.description,
            shards=shards,
            curated_rejected=self.curated.tokens[CURATED_REJECTED],
            settings=self._recorded_settings(),
        )
        description = self._steps(describe, [job])[0]
        filesystem, base = open_root(self.root)
        listed = [shard for splits in shards.values() for held in splits.values() for shard in held]
        _remove_unlisted(self.root, listed)
        manifest = Manifest(
            name=settings.name,
            shards=shards,
            files=description.files,
            source=self.curated.digest,
            settings=self._recorded_settings(),
            software={
                name: version(name) for name in ("mild", "numpy", "opencv-python-headless", "pillow", "webdataset")
            },
        )
        write_bytes(filesystem, f"{base}/manifest.json", f"{manifest.model_dump_json(indent=1)}\n".encode())
        with filesystem.open(f"{base}/rejected.parquet", "rb") as file:
            rejected = Counter(pq.read_table(file)["reason"].to_pylist())
        summary = {
            "dataset": self.root,
            "digest": manifest.digest(),
            "samples": sum(shard.samples for shard in listed),
            "shards": len(listed),
            "cached": self.cached,
            "rejected": dict(sorted(rejected.items())),
        }
        _show(summary, shards, filesystem, base)
        emit_event(
            DATASET_READY,
            resource={"prefect.resource.id": f"mild.dataset.{settings.name}", "prefect.resource.name": settings.name},
            payload={"dataset": self.root, "digest": summary["digest"]},
        )
        return summary


def _check_writable(root: str) -> None:
    filesystem, path = open_root(root)
    if isinstance(filesystem, LocalFileSystem):
        standing = next(place for place in (Path(path), *Path(path).parents) if place.exists())
        if not standing.is_dir():
            raise UserError(f"output {root} cannot be written: {standing} is a file")
        if not os.access(standing, os.W_OK | os.X_OK):
            raise UserError(f"output {root} cannot be written: no permission in {standing}")
        return
    try:
        filesystem.pipe_file(f"{path}/.writable", b"")
        filesystem.rm_file(f"{path}/.writable")
    except Exception as error:  # every store has its own kinds of refusal
        raise UserError(f"output {root} cannot be written: {error}") from None


def _table(work: str, split: str, role: str) -> pa.Table:
    filesystem, base = open_root(work)
    with filesystem.open(f"{base}/{CURATED}", "rb") as file:
        return pq.read_table(file, filters=[("split", "=", split), ("role", "=", role)])


def _records(work: str, split: str, role: str, start: int, stop: int) -> list[ImageRecord]:
    return [record_from_row(row) for row in _table(work, split, role).slice(start, stop - start).to_pylist()]


def _download_slot(records: Sequence[ImageRecord]) -> contextlib.AbstractContextManager[None]:
    """A slot of the limit `DOWNLOADS`, for pictures that come over a network.

    Local files need none, and asking is dear: the server's SQLite lets it wait for seconds behind its event log.
    """
    if all(isinstance(open_root(record.image)[0], LocalFileSystem) for record in records):
        return contextlib.nullcontext()
    return concurrency(DOWNLOADS, occupy=1)


def _digest_of_rows(table: pa.Table, start: int, stop: int) -> str:
    """Digest of what records say but where files lie: ids name pictures and masks, paths may move."""
    rows = table.slice(start, stop - start).to_pylist()
    for row in rows:
        del row["image"]
        for instance in row["instances"]:
            del instance["mask"]
    return digest_of(rows)


def _by_split(
    jobs: Sequence[CuratedShardJob | CompositeShardJob], built: Sequence[BuiltShard]
) -> dict[str, list[Shard]]:
    shards: dict[str, list[Shard]] = {}
    for job, result in zip(jobs, built, strict=True):
        shards.setdefault(job.split, []).append(result.shard)
    return shards


def _remove_unlisted(root: str, listed: list[Shard]) -> None:
    """Delete shards of an earlier plan, which no manifest names any more."""
    filesystem, base = open_root(root)
    keep = {place for shard in listed for place in (shard.path, index_path(shard.path))}
    for configuration in CONFIGURATIONS:
        for path in filesystem.glob(f"{base}/{configuration}/*-[0-9][0-9][0-9][0-9][0-9][0-9].*"):
            if f"{configuration}/{path.rsplit('/', 1)[-1]}" not in keep:
                filesystem.rm_file(path)


def _show(
    summary: dict[str, Any], shards: dict[str, dict[str, list[Shard]]], filesystem: AbstractFileSystem, base: str
) -> None:
    """Tables and a picture in Prefect's pages."""
    create_table_artifact(
        [
            {
                "configuration": configuration,
                "split": split,
                "samples": sum(shard.samples for shard in held),
                "people": sum(shard.people for shard in held),
                "shards": len(held),
                "MB": round(sum(shard.size for shard in held) / 1e6, 1),
            }
            for configuration, splits in shards.items()
            for split, held in splits.items()
        ],
        key="dataset-shards",
        description=f"{summary['dataset']}: {summary['cached']} of {summary['shards']} shards were cached",
    )
    create_table_artifact(
        [{"reason": reason, "rows": count} for reason, count in summary["rejected"].items()],
        key="dataset-rejected",
        description="What was set aside or mended, by reason; rejected.parquet has every row",
    )
    sheets = sorted(filesystem.glob(f"{base}/card/*.png"))
    if sheets:
        create_image_artifact(_data_uri(filesystem.cat_file(sheets[0])), "dataset-contact-sheet", "First samples")


def _data_uri(png: bytes) -> str:
    """A small JPEG of the picture: Prefect takes a URL only, and refuses events beyond 1.5 MB."""
    with Image.open(io.BytesIO(png)) as picture:
        small = picture.convert("RGB")
    small.thumbnail((1000, 1000))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
