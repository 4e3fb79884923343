"""The flow ``build-dataset``: curate, build shards, place people on backgrounds, describe, publish.

`flows.dataset_steps` has the steps. Each hands the next what it wrote by name and digest.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from copy import copy
from functools import partial
from importlib.metadata import version
from typing import Any, ParamSpec, TypeVar

from prefect import Flow, Task, flow
from prefect.context import FlowRunContext
from prefect.utilities.callables import get_call_parameters

from dataset_tools.compositing import CompositorSettings
from dataset_tools.curation import CurationSettings
from dataset_tools.donor_windows import neighbourhoods
from dataset_tools.errors import UserError
from dataset_tools.estimators.annotated import AnnotatedSettings
from dataset_tools.estimators.network import unload_networks
from dataset_tools.opt_out import OptOut, read_opt_out
from dataset_tools.quality import HashedPicture, near_duplicates
from dataset_tools.records import SPLITS, Role, Split
from dataset_tools.schema import CONFIGURATIONS
from dataset_tools.settings import digest_of
from dataset_tools.shards import Manifest, Shard
from dataset_tools.sources import Source
from dataset_tools.sources.folder import FolderSettings
from dataset_tools.sources.openimages import OpenImagesSettings
from dataset_tools.sources.pairs import PairsSettings
from dataset_tools.sources.sample import SampleSettings
from dataset_tools.sources.video import VideoSettings, list_clips
from dataset_tools.sources.weblist import DownloadedSettings, WeblistSettings
from dataset_tools.storage import (
    check_writable,
    is_url,
    normal_place,
    open_root,
    remove_partials,
    write_bytes,
)
from dataset_tools.storage_options import public_place
from dataset_tools.weights import check_at_hand
from flows.caching import Job, JobT, ResultT, result_storage, run_steps
from flows.dataset_steps import (
    CLIPS,
    MIRROR,
    PICTURES,
    SEEN,
    BuiltShard,
    CheckNetworksJob,
    ClipJob,
    CompositeShardJob,
    Curated,
    CuratedShardJob,
    CurateJob,
    Cutouts,
    CutoutsJob,
    DescribeJob,
    HashPicturesJob,
    ListPairsJob,
    MirrorJob,
    ShardJob,
    build_composite_shard,
    build_curated_shard,
    check_networks,
    curate,
    describe,
    draw_sample_mirror,
    hash_pictures,
    list_cutouts,
    list_pairs,
    read_clip,
    read_table,
)
from flows.events import announce
from flows.names import artifact_key, flow_run_name
from flows.output_files import OutputFiles
from flows.output_lock import sole_run
from flows.pages import show_dataset
from flows.preflight import check_workers
from flows.progress import Progress
from flows.record_table import RecordTable, digest_of_records
from flows.rejected import What, check_rejected
from flows.settings import BuildSettings, ParsingSettings, PictureSource, PoseSettings
from flows.weblist_steps import fetch_weblist

BESIDE_SHARDS = ("README.md", "croissant.json", "attribution.csv", "rejected.parquet", "card")
"""What `flows.dataset_steps.describe` writes."""
WRITTEN = (*CONFIGURATIONS, "card"), (SEEN,)
"""Folders that a build writes to, below the dataset and below the work folder."""

SPARE = 4
"""Backgrounds that each composite shard may read at least, where there are so many."""

P = ParamSpec("P")
R = TypeVar("R")
CueSettings = PoseSettings | ParsingSettings | AnnotatedSettings | None
Shards = dict[str, dict[str, list[Shard]]]
"""Configuration to split to shards."""


class _CheckedFlow(Flow[P, R]):
    """Looks at its parameters before Prefect hears of them: Prefect stores them, and a secret must not be among them.

    What a deployment is given its server has stored before.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        check_build(**get_call_parameters(self.fn, args, kwargs))
        return super().__call__(*args, **kwargs)


@partial(_CheckedFlow, name="build-dataset", flow_run_name=flow_run_name, persist_result=False)  # type: ignore[arg-type]
def build_dataset(settings: BuildSettings | str, output: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Build a dataset, or bring one up to date: only what is missing, altered or set otherwise is redone.

    Args:
        settings: `BuildSettings`, or the place of a YAML file of them.
        output: folder or fsspec URL of the dataset; intermediate files go to ``{output}.work``.
        changes: settings to change, dotted name to value, such as ``{"composite.seed": 3}``.

    Returns:
        ``dataset`` (path), ``digest``, ``samples``, ``shards``, ``cached`` (shards not redone) and ``rejected``.

    Raises:
        UserError: a setting, table or path cannot be used; too many pictures had to be set aside; or another run is
            at work on the output.
    """
    checked = check_build(settings, output, changes)
    root = public_place(output, "output")
    with sole_run(root):
        try:
            shards = copy(build_shards)  # `with_options` would draw up the schema of all settings anew
            shards.task_runner = checked.runner.open()
            summary = shards(checked, root)
        finally:
            unload_networks()
        # Here, not in the subflow: the event of a deployment's own run is to name the deployment.
        announce("dataset", root, summary["digest"], dataset=checked.name, payload={"dataset": root})
    return summary


def check_build(settings: BuildSettings | str, output: str, changes: dict[str, Any] | None = None) -> BuildSettings:
    """The settings, where they, the output, weights and the source's files can be used; leaves nothing behind.

    Raises:
        UserError: they cannot.
    """
    checked = BuildSettings.load(settings, changes)
    root = public_place(output, "output")
    _check_apart(root, checked.source)
    check_writable(root)
    networks = checked.networks().values()
    check_at_hand(network.weights for network in networks)
    for network in networks:
        network.open().fingerprint()
    if checked.opt_out is not None:
        read_opt_out(checked.opt_out)
    if isinstance(checked.source, VideoSettings):
        list_clips(checked.source)
    elif not isinstance(checked.source, SampleSettings):
        checked.source.open().check()
    return checked


def _check_apart(root: str, source: object) -> None:
    """Raise `UserError` where the next build would find this one's pictures among those of the source."""
    if isinstance(source, PairsSettings) and not source.layout:
        return  # a list names its files
    if isinstance(source, VideoSettings):
        places = source.clips
    elif isinstance(source, FolderSettings | PairsSettings):
        places = source.open().places
    else:
        return
    for place in map(normal_place, places):
        paths = (root, place) if is_url(root) or is_url(place) else (os.path.realpath(root), os.path.realpath(place))
        if f"{paths[0]}/".startswith(f"{paths[1]}/"):
            raise UserError(f"output {root} lies in {place}, in which pictures are searched: name one beside it")


@flow(name="build-shards", flow_run_name=flow_run_name, persist_result=False)
def build_shards(settings: BuildSettings, root: str) -> dict[str, Any]:
    """The stages of `build_dataset`, on the task runner that the settings name."""
    with Progress(artifact_key("build-progress", root)) as progress:
        build = _Build(settings, root, progress)
        build.output.check(BESIDE_SHARDS)
        build.output.remove_unfinished(*WRITTEN)
        build.read_opt_out()
        build.workers()
        build.networks()
        source, mirror = build.source()
        curated = build.curate(source)
        build.find_duplicates(source, mirror, curated)
        shards: Shards = {settings.curated.configuration: build.curated_shards(source, mirror, curated)}
        if settings.composite is not None:
            chosen = shards[settings.curated.configuration]
            cutouts = build.cutouts(settings.composite, chosen)
            shards["composite"] = build.composite_shards(settings.composite, source, mirror, curated, chosen, cutouts)
        files = build.description(curated, shards)
        return build.publish(curated, shards, files)


class _Build:
    """One run: each method is a stage, which takes what earlier stages gave."""

    def __init__(self, settings: BuildSettings, root: str, progress: Progress) -> None:
        self.settings, self.root, self.work, self.progress = settings, root, f"{root}.work", progress
        self.place = {"root": root, "work": self.work}
        self.storage = result_storage(self.work)
        self.cached = 0
        self.fingerprints = {name: network.open().fingerprint() for name, network in settings.networks().items()}
        """Of the networks."""
        self.output = OutputFiles(root, self.work)
        self.opt_out = OptOut()
        self.opt_out_name = ""
        """Of the list below the work folder."""
        self.duplicates: dict[str, str] = {}
        """Ids of pictures that are left out, and what each of them is like."""
        self.seen: list[str] = []
        """`BuiltShard.seen` of all shards."""

    def read_opt_out(self) -> None:
        """Keep the opt-out list as it is now for all that follows. Raises `UserError` where it cannot be used."""
        if self.settings.opt_out is None:
            return
        self.opt_out = read_opt_out(self.settings.opt_out)
        filesystem, base = open_root(self.work)
        self.opt_out_name = f"opt-out-{digest_of(self.opt_out.model_dump())[:16]}.json"
        write_bytes(filesystem, f"{base}/{self.opt_out_name}", self.opt_out.model_dump_json().encode())

    def source(self) -> tuple[PictureSource, str]:
        """Where pictures come from, and the digest of the drawn sample world; empty for other sources."""
        self.progress.stage("source")
        source = self.settings.source
        if isinstance(source, WeblistSettings):
            return fetch_weblist(source, self.place, self._run), ""
        if isinstance(source, VideoSettings):
            return self._pairs_of_clips(source), ""
        if not isinstance(source, SampleSettings):
            return source, ""
        mirror = self._run(draw_sample_mirror, [MirrorJob(**self.place, source=source)])[0]
        root = f"{self.work}/{MIRROR}"
        everything = CurationSettings(images_per_stratum=None, backgrounds=None)
        # Without the public bucket's options: whoever writes to a store reads there as the same.
        images = {"images": f"{root}/images", "images_options": {}}
        return OpenImagesSettings(root=root, curation=everything, **images), mirror.digest

    def _pairs_of_clips(self, source: VideoSettings) -> PictureSource:
        if not is_url(self.work):
            remove_partials(f"{self.work}/{CLIPS}")
        clips, rejected = list_clips(source)
        cue = {"instances": self.settings.instances, "instances_fingerprint": self.fingerprints.get("instances")}
        read = self._run(read_clip, [ClipJob(**self.place, source=source, clip=clip, **cue) for clip in clips])
        digests = {clip.folder: made.files.digest for clip, made in zip(clips, read, strict=True)}
        self._run(list_pairs, [ListPairsJob(**self.place, clips=digests, rejected=rejected)])
        return source.pairs(f"{self.work}/{CLIPS}")

    def workers(self) -> None:
        """See that the workers of a cluster can do their part. Raises `UserError` where one cannot."""
        if self.settings.runner.kind == "threads":
            return
        self.progress.stage("workers")
        context = FlowRunContext.get()
        assert context is not None
        count = check_workers(context.task_runner, self.settings, self.root, self.fingerprints)
        self.progress.expect(count)
        self.progress.advance(count)

    def networks(self) -> None:
        """See that the networks can be used, unless they were used before. Raises `UserError` where one cannot."""
        networks = self.settings.networks()
        if networks:
            self.progress.stage("networks")
            self._run(
                check_networks, [CheckNetworksJob(**self.place, networks=networks, fingerprints=self.fingerprints)]
            )

    def curate(self, source: PictureSource) -> Curated:
        """Choose images.

        Raises:
            UserError: there is none for a split that is to have composites.
        """
        self.progress.stage("curate")
        tables = source.open().tables()
        fingerprint = source.open(tables).fingerprint()
        job = CurateJob(**self.place, source=source, tables=tables, fingerprint=fingerprint)
        curated = self._run(curate, [job])[0]
        for split, count in self._composites().items():
            if count and not curated.rows(split, "background"):
                raise _too_few(split, "person-free background")
        return curated

    def find_duplicates(self, source: PictureSource, mirror: str, curated: Curated) -> None:
        """See which pictures look like others, where the settings ask for it."""
        bits = self.settings.curated.quality.near_duplicates
        if bits is None:
            return
        self.progress.stage("near duplicates")
        opened = source.open()
        roles: tuple[Role, ...] = ("people", "background")
        with RecordTable(self.work, curated.records) as table:
            jobs = [
                HashPicturesJob(
                    **self.place,
                    **self._told_of(rows, table, opened, mirror),
                    source=source,
                    split=split,
                    role=role,
                    settings=self.settings.curated,
                )
                for split in SPLITS
                for role in roles
                for rows in self._slices(curated.rows(split, role))
            ]
        pictures: list[HashedPicture] = []
        for job, hashed in zip(jobs, self._run(hash_pictures, jobs), strict=True):
            pictures += hashed.of(job)
        self.duplicates = {picture.id: like for picture, like in near_duplicates(pictures, bits)}

    def curated_shards(self, source: PictureSource, mirror: str, curated: Curated) -> dict[str, list[Shard]]:
        """Build the shards of ``real`` or ``paired``."""
        self.progress.stage("curated shards")
        settings, opened, jobs = self.settings, source.open(), []
        cues = {name: _cue(getattr(settings, name), source) for name in ("pose", "parsing", "plate")}
        side_cars = {name: cue for name, cue in cues.items() if isinstance(cue, AnnotatedSettings)}
        # Often one folder holds all three; a drawn world's are covered by its mirror.
        places = {} if mirror else {cue.root: cue for cue in side_cars.values()}
        read = {root: cue.open().fingerprint() for root, cue in places.items()}
        fingerprints = self.fingerprints | {name: read.get(cue.root, "") for name, cue in side_cars.items()}
        with RecordTable(self.work, curated.records) as table:
            for split in SPLITS:
                for number, rows in enumerate(self._slices(curated.rows(split, "people"))):
                    jobs.append(
                        CuratedShardJob(
                            **self.place,
                            **self._told_of(rows, table, opened, mirror),
                            source=source,
                            duplicates=self._duplicates(rows, table),
                            path=f"{settings.curated.configuration}/{split}-{number:06d}.tar",
                            settings=settings.curated,
                            instances=settings.instances,
                            **cues,
                            anonymise=settings.anonymise,
                            fingerprints=fingerprints,
                            encoding=settings.curated_encoding,
                            split=split,
                        )
                    )
        return self._shards(build_curated_shard, jobs, curated, "pictures")

    def cutouts(self, settings: CompositorSettings, chosen: dict[str, list[Shard]]) -> dict[Split, Cutouts]:
        """See how many can be cut out, by split.

        Raises:
            UserError: nobody can be in a split that is to have composites.
        """
        self.progress.stage("cut-outs")
        splits = [split for split, count in self._composites().items() if count]
        for split in splits:
            if split not in chosen:
                raise _too_few(split, "person that can be cut out")
        jobs = [CutoutsJob(**self.place, split=split, shards=chosen[split], settings=settings) for split in splits]
        cutouts = dict(zip(splits, self._run(list_cutouts, jobs), strict=True))
        for split, listed in cutouts.items():
            if not listed.people:
                raise _too_few(split, "person that can be cut out")
        return cutouts

    def composite_shards(
        self,
        settings: CompositorSettings,
        source: PictureSource,
        mirror: str,
        curated: Curated,
        chosen: dict[str, list[Shard]],
        cutouts: dict[Split, Cutouts],
    ) -> dict[str, list[Shard]]:
        """Build the shards of ``composite``."""
        self.progress.stage("composite shards")
        opened, jobs = source.open(), []
        with RecordTable(self.work, curated.records) as table:
            for split, listed in cutouts.items():
                samples, backgrounds = settings.samples[split], curated.rows(split, "background")
                slices = self._slices(range(samples))
                near = neighbourhoods(listed.pictures, list(map(len, slices)), f"{settings.seed}/{split}")
                for number, numbers in enumerate(slices):
                    # Each background belongs to one shard (or few neighbours), so that it is fetched about once.
                    first = numbers.start * len(backgrounds) // samples
                    last = max(first + 1, numbers.stop * len(backgrounds) // samples)
                    # Where it has few, others stand by: one bad background must not cost a shard.
                    start = max(min(first, len(backgrounds) - SPARE), 0)
                    rows = backgrounds[start : max(last, start + SPARE)]
                    jobs.append(
                        CompositeShardJob(
                            own=(first - start, last - start),
                            **self.place,
                            **self._told_of(rows, table, opened, mirror),
                            source=source,
                            duplicates=self._duplicates(rows, table),
                            path=f"composite/{split}-{number:06d}.tar",
                            curated=self.settings.curated,
                            settings=settings,
                            encoding=self.settings.composite_encoding,
                            split=split,
                            start=numbers.start,
                            stop=numbers.stop,
                            donors=[chosen[split][shard] for shard in near[number]],
                            instances=self.settings.instances,
                            instances_fingerprint=self.fingerprints.get("instances"),
                            anonymise=self.settings.anonymise,
                            regions_fingerprint=self.fingerprints.get("regions"),
                        )
                    )
        return self._shards(build_composite_shard, jobs, curated, "composites")

    def description(self, curated: Curated, shards: Shards) -> dict[str, str]:
        """Write what stands beside the shards; gives its files with their sha256."""
        self.progress.stage("describe")
        settings = self.settings
        job = DescribeJob(
            **self.place,
            name=settings.name,
            description=settings.description,
            shards=shards,
            curated_rejected=curated.rejected,
            opt_out=self.opt_out_name,
            records=curated.records if self.opt_out_name else "",
            seen=self.seen if self.opt_out_name else [],
            settings=self.settings.recorded(),
        )
        self.output.plan({BESIDE_SHARDS[0]: job})
        return {name: file.sha256 for name, file in self._run(describe, [job])[0].files.items()}

    def publish(self, curated: Curated, shards: Shards, files: dict[str, str]) -> dict[str, Any]:
        """Write the manifest, by which the dataset is complete, and remove shards of earlier plans."""
        settings, (filesystem, base) = self.settings, open_root(self.root)
        listed = [shard for splits in shards.values() for held in splits.values() for shard in held]
        manifest = Manifest(
            name=settings.name,
            shards=shards,
            files=files,
            source=curated.digest,
            settings=self.settings.recorded(),
            software={name: version(name) for name in ("mild", *PICTURES)},
        )
        write_bytes(filesystem, f"{base}/manifest.json", f"{manifest.model_dump_json(indent=1)}\n".encode())
        self.output.remove_others((shard.path for shard in listed), files)
        if settings.runner.kind != "threads":
            self.output.remove_unfinished(*WRITTEN)  # of workers that were killed
        rejected = Counter(read_table(self.root, "rejected.parquet", columns=["reason"])["reason"].to_pylist())
        summary = {
            "dataset": self.root,
            "digest": manifest.digest(),
            "samples": sum(shard.samples for shard in listed),
            "shards": len(listed),
            "cached": self.cached,
            "rejected": dict(sorted(rejected.items())),
        }
        self.progress.pages.show(show_dataset, summary, shards)
        return summary

    def _run(self, step: Task[[JobT], ResultT], jobs: Sequence[JobT]) -> list[ResultT]:
        limit = self.settings.runner.time_limit
        outcomes = run_steps(step, jobs, self.storage, self.progress, time_limit=limit, begin=self._begin)
        self.cached += sum(o.cached for o in outcomes if isinstance(o.result, BuiltShard))
        return [outcome.result for outcome in outcomes]

    def _begin(self, jobs: Sequence[Job]) -> None:
        """Before jobs are done: also those whose result was remembered, and is no longer sound or worth another try."""
        if any(isinstance(job, ShardJob | DescribeJob) for job in jobs):
            self.output.withdraw()

    def _shards(
        self, step: Task[[Any], BuiltShard], jobs: Sequence[ShardJob], curated: Curated, what: What
    ) -> dict[str, list[Shard]]:
        """Build shards and look at how much had to be set aside.

        Raises:
            UserError: too much.
        """
        self.output.plan({job.path: job for job in jobs})
        built = self._run(step, jobs)
        self.seen += [result.seen for result in built]
        shards: dict[str, list[Shard]] = {}
        for job, result in zip(jobs, built, strict=True):
            shards.setdefault(job.split, []).append(result.shard)
        check_rejected(self.settings, self.root, jobs, built, curated.rejected, what)
        return shards

    def _slices(self, numbers: range) -> list[range]:
        """Those of one shard after another."""
        size = self.settings.samples_per_shard
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def _told_of(self, rows: range, table: RecordTable, source: Source, mirror: str) -> dict[str, Any]:
        """What a job is told of the pictures that are its own. None of them is kept in memory."""
        files, opted_out = hashlib.sha256(), []
        if not mirror or self.opt_out.id or self.opt_out.url:
            for number, record in enumerate(table.records(rows.start, rows.stop)):
                # So that a file that was replaced in place is noticed; a drawn world's are covered by its mirror.
                files.update(b"" if mirror else digest_of(source.state(record)).encode())
                if self.opt_out.named(record):
                    opted_out.append(number)
        return {
            "mirror": mirror,
            "table": table.name,
            "rows": (rows.start, rows.stop),
            "records": digest_of_records(table.rows(rows.start, rows.stop)),
            "files": "" if mirror else files.hexdigest(),
            "opt_out": self.opt_out_name,
            "opted_out": tuple(opted_out),
        }

    def _duplicates(self, rows: range, table: RecordTable) -> dict[str, str]:
        """Those of some pictures that are left out, and what each of them is like."""
        if not self.duplicates:
            return {}
        ids = (row["id"] for row in table.rows(rows.start, rows.stop))
        return {name: self.duplicates[name] for name in ids if name in self.duplicates}

    def _composites(self) -> dict[Split, int]:
        composite = self.settings.composite
        return {} if composite is None else composite.samples


def _too_few(split: str, missing: str) -> UserError:
    return UserError(f"composite: split {split} has no {missing}; give some, or set composite.samples.{split} to 0")


def _cue(cue: CueSettings, source: PictureSource) -> CueSettings:
    """Side-cars that lie beside the source's own files are found there."""
    if not isinstance(cue, AnnotatedSettings) or cue.root:
        return cue
    if isinstance(source, FolderSettings | DownloadedSettings):
        raise UserError(f"{source.kind}: side-cars are read from a root that the settings must name")
    beside = {"root": source.root, "root_options": source.root_options, "fetch": source.fetch}
    return cue.model_copy(update=beside)
