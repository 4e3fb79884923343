"""The cached steps of the flow `flows.build_dataset`: each job says what decides about a result, each step makes it.

The unit of work is the shard. A step's result is a small manifest; pictures go straight to storage.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from prefect.concurrency.sync import concurrency
from pydantic import BaseModel

from dataset_tools.anonymise import AnonymiseSettings
from dataset_tools.card import write_card
from dataset_tools.compositing import Background, CompositorSettings, compose
from dataset_tools.curated import (
    CuratedSettings,
    Estimators,
    anonymised,
    curated_samples,
    person_free,
    photographs,
    rejection_rows,
    without_folders,
)
from dataset_tools.donor_windows import DonorWindows, donors_of
from dataset_tools.errors import Rejected
from dataset_tools.estimators import PlateProvider
from dataset_tools.estimators.annotated import AnnotatedSettings
from dataset_tools.fetch import map_in_order
from dataset_tools.opt_out import OptOut, OptOutCheck
from dataset_tools.perceptual_hash import perceptual_hash
from dataset_tools.quality import HashedPicture
from dataset_tools.record_file import RecordFile
from dataset_tools.records import (
    REJECTION_SCHEMA,
    ImageRecord,
    Rejection,
    Role,
    Split,
    rejections_to_table,
)
from dataset_tools.schema import EncodingSettings, Sample, check_encodable
from dataset_tools.settings import digest_of
from dataset_tools.shards import Shard, ShardDataset, is_intact, read_index, tags_of, write_shard
from dataset_tools.sources.sample import SampleSettings, write_mirror
from dataset_tools.sources.video import ClipFile, VideoSettings, write_list, write_pairs
from dataset_tools.storage import Listings, open_root, tag_of
from flows.caching import LOOKERS, File, Files, Job, are_unaltered, cached_step, keep_named, write_named
from flows.progress import run_logger
from flows.record_table import RecordTable, digest_of_records, parquet_bytes, write_record_table
from flows.settings import InstancesSettings, Network, ParsingSettings, PictureSource, PoseSettings

DOWNLOADS = "mild-downloads"
"""Global concurrency limit that shard tasks respect while they download, where the server has one by this name."""
PICTURES = ("numpy", "opencv-python-headless", "pillow", "pycocotools")
"""Packages whose versions decide about the bytes of pictures and masks."""

NOT_OF_READING: dict[str, Any] = {"quality": {"min_face", "near_duplicates"}}
"""Settings of `CuratedSettings` that do not matter to whoever only reads pictures."""

BATCH = 256
"""Rows of the table of chosen images that are tried at once where none of those that were picked will do."""

MIRROR = "mirror"
"""Folder of the drawn sample world below the work folder. Its files have OpenImages' names, not their digests: another
world takes its place as a whole, and only a run that holds the output (`flows.output_lock`) may draw it."""


class MirrorJob(Job):
    """Draw the sample world as a mirror in OpenImages' format."""

    step: ClassVar[str] = "draw-sample-mirror"
    version: ClassVar[int] = 2
    packages: ClassVar[tuple[str, ...]] = PICTURES
    source: SampleSettings


@cached_step
def draw_sample_mirror(job: MirrorJob) -> Files:
    """Write the mirror."""
    write_mirror(job.source, f"{job.work}/{MIRROR}")
    return Files.of(job, "work", [MIRROR])


CLIPS = "clips"
"""Folder of the pairs of clips below the work folder; as for `MIRROR`, only a run that holds the output writes it."""


class ClipJob(Job):
    """Make the pairs of one clip."""

    step: ClassVar[str] = "read-clip"
    version: ClassVar[int] = 2
    packages: ClassVar[tuple[str, ...]] = ("av", *PICTURES)
    source: VideoSettings
    clip: ClipFile
    instances: InstancesSettings | None
    instances_fingerprint: str | None

    def label(self) -> str:
        """The clip."""
        return self.clip.folder

    def determines(self) -> Any:
        """The clip by name, size and time, wherever it lies; of the settings what decides about its pairs."""
        how = self.source.how().model_dump(mode="json")
        return [self.clip.name, self.clip.state, how, self.instances_fingerprint]


class ReadClip(BaseModel):
    """Result of reading a clip."""

    files: Files
    fetched: bool
    """Whether the clip could be read from where it lies."""

    def is_sound(self, job: Job, listings: Listings) -> bool:
        """Whether the files are as they were written, and another try would bring nothing."""
        return self.fetched and self.files.is_sound(job, listings)

    def told(self) -> str:
        """How many files, or why none."""
        return self.files.told() if self.fetched else "could not be fetched"


@cached_step
def read_clip(job: ClipJob) -> ReadClip:
    """Write the clip's folder: plates, pictures, masks, or why there are none."""
    instances = job.instances.open() if job.instances else None
    fetched = write_pairs(job.clip, job.source.how(), instances, f"{job.work}/{CLIPS}", job.source)
    return ReadClip(files=Files.of(job, "work", [f"{CLIPS}/{job.clip.folder}"]), fetched=fetched)


class ListPairsJob(Job):
    """Make one list of the pairs of all clips."""

    step: ClassVar[str] = "list-pairs"
    version: ClassVar[int] = 1
    clips: dict[str, str]
    """Folder of each clip to the digest of its files."""
    rejected: list[Rejection]
    """What is no clip."""


@cached_step
def list_pairs(job: ListPairsJob) -> Files:
    """Write the list."""
    names = write_list(job.clips, job.rejected, f"{job.work}/{CLIPS}")
    return Files.of(job, "work", [f"{CLIPS}/{name}" for name in names])


class CurateJob(Job):
    """Choose the images of a source."""

    step: ClassVar[str] = "curate"
    version: ClassVar[int] = 9
    source: PictureSource
    tables: dict[str, list[str]]
    """Of `dataset_tools.sources.Source.tables`."""
    fingerprint: str

    def determines(self) -> Any:
        """The fingerprint covers the source's tables and its settings, wherever they lie."""
        return self.fingerprint


class Curated(BaseModel):
    """Result of curation: two tables below ``work``."""

    files: Files
    records: str
    """Name of the table of chosen images (`flows.record_table`), in the order of the shards."""
    counts: dict[str, int]
    """How many rows of it are of each split and role, such as ``train/people``, in its order."""
    rejected: str
    """Name of the table of what was set aside (`dataset_tools.records.REJECTION_SCHEMA`)."""
    digest: str
    """Of what was chosen and set aside, but not of where pictures lie."""
    transient: int
    """How many of what was set aside may do when tried again."""

    def rows(self, split: Split, role: Role) -> range:
        """Numbers of the rows of a split and role."""
        names = list(self.counts)
        if (name := f"{split}/{role}") not in names:
            return range(0)
        first = sum(self.counts[before] for before in names[: names.index(name)])
        return range(first, first + self.counts[name])

    def is_sound(self, job: Job, listings: Listings) -> bool:
        """Whether the tables are as they were written, and nothing is worth another try."""
        return self.transient == 0 and self.files.is_sound(job, listings)

    def told(self) -> str:
        """How many images were chosen."""
        return f"chosen: {self.files.rows}, to be tried again: {self.transient}"


@cached_step
def curate(job: CurateJob) -> Curated:
    """Write the chosen images and what was set aside."""
    source = job.source.open(job.tables)
    curation = source.curate()
    set_aside = [replace(row, message=without_folders(row.message, source.places)) for row in curation.rejected]
    records = curation.records if isinstance(curation.records, RecordFile) else RecordFile(curation.records)
    with tempfile.TemporaryDirectory(prefix="curated-") as folder:
        table = Path(folder, "curated.parquet")
        counts = write_record_table(records, table)
        with RecordTable(folder, table.name) as written:  # while it is on this machine: ``work`` may be a store
            told = digest_of_records(written.rows(0, len(records)))
        chosen = keep_named(job, table)
    for kind, count in counts.items():
        split, role = kind.split("/")
        run_logger().info("chosen for %s: %d with the role %s", split, count, role)
    rejected = write_named(job, "curated-rejected.parquet", parquet_bytes(rejections_to_table(set_aside)))
    return Curated(
        files=Files.of(job, "work", [chosen, rejected], len(records)),
        records=chosen,
        counts=counts,
        rejected=rejected,
        digest=digest_of([told, rejected]),
        transient=sum(row.transient for row in curation.rejected),
    )


class PicturesJob(Job):
    """A job that reads the pictures of some rows of the table of chosen images."""

    source: PictureSource
    mirror: str
    """Digest of the drawn sample world; empty for other sources."""
    table: str
    """Name below ``work`` of the table of chosen images."""
    rows: tuple[int, int]
    """The first of its rows that are this job's, and the first behind them: no more of it is read."""
    records: str
    """Digest of these rows."""
    files: str
    """Digest of size and time of the files that these rows name, where looking costs next to nothing."""
    split: Split
    opt_out: str
    """Name below ``work`` of the opt-out list; empty where there is none."""
    opted_out: tuple[int, ...]
    """Numbers among these rows of those that the list names by id or address."""


class HashPicturesJob(PicturesJob):
    """Learn what pictures look like, before any of them is used."""

    step: ClassVar[str] = "hash-pictures"
    version: ClassVar[int] = 1
    packages: ClassVar[tuple[str, ...]] = (*PICTURES, "imagehash")
    role: Role
    settings: CuratedSettings

    def label(self) -> str:
        """Split and role."""
        return f"{self.split}-{self.role}-{self.rows[0]}"

    def determines(self) -> Any:
        """Rows of the curated table and how they are read, not their numbers."""
        read = self.settings.model_dump(mode="json", include={"decode", "quality"}, exclude=NOT_OF_READING)
        return [self.mirror, self.records, self.files, read, self.opted_out]


class HashedPictures(BaseModel):
    """What pictures look like."""

    pictures: list[tuple[str, str, str]]
    """Id, sha256 and perceptual hash of each that could be read."""
    transient: int
    """How many more may be read when tried again."""

    def is_sound(self, job: Job, listings: Listings) -> bool:
        """Whether nothing is worth another try."""
        return self.transient == 0

    def told(self) -> str:
        """How many could be read."""
        return f"pictures: {len(self.pictures)}, to be tried again: {self.transient}"

    def of(self, job: HashPicturesJob) -> list[HashedPicture]:
        """The pictures that the opt-out list does not name."""
        listed = opt_out_list(job.work, job.opt_out)
        return [
            HashedPicture(name, job.split, job.role, phash)
            for name, sha256, phash in self.pictures
            if listed.holds(sha256, phash) is None
        ]


@cached_step
def hash_pictures(job: HashPicturesJob) -> HashedPictures:
    """Fetch, decode and hash; what cannot be read is told when shards are built."""
    records = [record for number, record in enumerate(_records(job)) if number not in job.opted_out]
    # Masks are not looked at.
    plain = [replace(record, instances=(), glossy_ground="") for record in records]
    rejected: list[Rejection] = []
    pictures = []
    with download_slot(records):
        for photograph in photographs(plain, job.source.open(), job.settings, rejected):
            phash = f"{perceptual_hash(photograph.decoded.image):016x}"
            pictures.append((photograph.record.id, photograph.sha256, phash))
    return HashedPictures(pictures=pictures, transient=sum(row.transient for row in rejected))


class CheckNetworksJob(Job):
    """Load the networks, before the first picture is fetched for them."""

    step: ClassVar[str] = "check-networks"
    version: ClassVar[int] = 1
    networks: dict[str, Network]
    """By what they are for."""
    fingerprints: dict[str, str]
    """Of `dataset_tools.estimators.Estimator.fingerprint`."""

    def determines(self) -> Any:
        """The weights' digests among them, not where they lie."""
        return self.fingerprints


class CheckedNetworks(BaseModel):
    """All of them can be used."""

    def is_sound(self, job: Job, listings: Listings) -> bool:
        """Whether they could be loaded, which is remembered."""
        return True

    def told(self) -> str:
        """That they can."""
        return "all networks can be used"


@cached_step
def check_networks(job: CheckNetworksJob) -> CheckedNetworks:
    """Load each. Raises `UserError` where one cannot be used."""
    for settings in job.networks.values():
        settings.open().check()
    return CheckedNetworks()


class BuiltShard(BaseModel):
    """Result of a step that writes a shard."""

    shard: Shard
    tags: dict[str, str | None]
    """Of `dataset_tools.shards.tags_of`."""
    place: str
    """Digest of where the pictures came from."""
    unread: int
    """How many pictures could not be fetched from there."""
    lost: int
    """How much of what was chosen had to be set aside: see `lost_rows`."""
    opt_out: str
    """Name below ``work`` of the opt-out list that its pictures were held against."""
    seen: str
    """Name below ``work`` of the table of its pictures: see `dataset_tools.opt_out.OptOutCheck.seen`."""

    def is_sound(self, job: ShardJob, listings: Listings) -> bool:
        """Whether the shard is as it was written, and nothing set aside may do when tried again, or elsewhere.

        Nor may the opt-out list name other pictures now: so a new entry costs those shards alone that hold what it
        names.
        """
        if self.shard.transient or (self.unread and self.place != job.place()):
            return False
        if self.opt_out != job.opt_out and not self._is_named_alike(job):
            return False
        return is_intact(job.root, self.shard, self.tags, listings)

    def _is_named_alike(self, job: ShardJob) -> bool:
        listed = opt_out_list(job.work, job.opt_out)
        try:
            pictures = read_table(job.work, self.seen).to_pylist()
        except FileNotFoundError:
            return False
        return all((listed.holds(each["sha256"], each["phash"]) or "") == each["kind"] for each in pictures)

    def told(self) -> str:
        """What is in the shard, and how much was set aside."""
        shard = self.shard
        size = f"{shard.size / 1e6:.1f} MB"
        return f"samples: {shard.samples}, people: {shard.people}, {size}, set aside or mended: {shard.rejected}"


SEEN = "seen"
"""Folder below the work folder of what each shard has read, by digest, for the opt-out lists to come."""
_SEEN = pa.schema([(name, pa.string()) for name in ("id", "sha256", "phash", "kind")])


class ShardJob(PicturesJob):
    """What all shards have in common."""

    version: ClassVar[int] = 13
    packages: ClassVar[tuple[str, ...]] = PICTURES
    path: str
    duplicates: dict[str, str]
    """Ids of pictures of this shard that are left out, and what each of them is like."""

    def label(self) -> str:
        """The shard's name."""
        return self.path.removesuffix(".tar")

    def decided_by(self) -> str:
        """The key, and the opt-out list: see `BuiltShard.is_sound`."""
        return f"{self.key()} {self.opt_out}".rstrip()

    def place(self) -> str:
        """Digest of where pictures are looked for; empty for the drawn world, which lies beside the dataset."""
        return "" if self.mirror else digest_of(self.source.model_dump(mode="json"))

    def opt_out_check(self) -> OptOutCheck:
        """Holds this shard's pictures against the opt-out list."""
        return OptOutCheck(opt_out_list(self.work, self.opt_out))

    def build(
        self, samples: Iterable[Sample], encoding: EncodingSettings, rejected: list[Rejection], check: OptOutCheck
    ) -> BuiltShard:
        """Write the shard; ``rejected`` and ``check`` are filled while ``samples`` are consumed."""
        rows: list[dict[str, Any]] = []

        def consumed() -> Iterator[Sample]:
            for sample in samples:
                try:
                    check_encodable(sample.image, encoding)
                except Rejected as error:
                    why = (error.reason, error.message)
                    rejected.append(Rejection(sample.split, sample.origins[0].id, "", "decode", "image-rejected", *why))
                else:
                    yield sample
            rows.extend(rejection_rows(rejected))

        shard = write_shard(consumed(), self.root, self.path, encoding, rows)
        unread = sum(row.stage == "fetch" and row.outcome == "image-rejected" for row in rejected)
        seen = pa.Table.from_pylist([dict(zip(_SEEN.names, row, strict=True)) for row in check.seen], schema=_SEEN)
        return BuiltShard(
            shard=shard,
            tags=tags_of(self.root, shard),
            place=self.place(),
            unread=unread,
            lost=lost_rows(rejections_to_table(rejected)).num_rows,
            opt_out=self.opt_out,
            seen=write_named(self, f"{SEEN}/{self.label().replace('/', '-')}.parquet", parquet_bytes(seen)),
        )


class CuratedShardJob(ShardJob):
    """Some photographs of a split."""

    step: ClassVar[str] = "build-curated-shard"
    settings: CuratedSettings
    instances: InstancesSettings | None
    pose: PoseSettings | None
    parsing: ParsingSettings | None
    plate: AnnotatedSettings | None
    anonymise: AnonymiseSettings | None
    fingerprints: dict[str, str]
    """Of each network and side-car that there is; empty for side-cars that ``mirror`` covers."""
    encoding: EncodingSettings

    def determines(self) -> Any:
        """Rows of the curated table, not their numbers; cues by settings, not by place."""
        return [
            self.path,
            self.mirror,
            self.settings.model_dump(mode="json", exclude={"fetch_workers": True, "quality": {"near_duplicates"}}),
            [cue and cue.kind for cue in (self.instances, self.pose, self.parsing, self.plate)],
            bool(self.anonymise and self.anonymise.faces),
            self.fingerprints,
            self.encoding.model_dump(mode="json"),
            self.records,
            self.files,
            self.opted_out,
            self.duplicates,
        ]


@cached_step
def build_curated_shard(job: CuratedShardJob) -> BuiltShard:
    """fetch and decode -> clean masks, people without -> pose, parsing, plate -> write."""
    rejected: list[Rejection] = []
    source = job.source.open()
    own_plates = source if isinstance(source, PlateProvider) else None
    estimators = Estimators(
        instances=job.instances.open() if job.instances else None,
        pose=job.pose.open() if job.pose else None,
        parsing=job.parsing.open() if job.parsing else None,
        plate=job.plate.open() if job.plate else own_plates,
        blur_faces=bool(job.anonymise and job.anonymise.faces),
        regions=job.anonymise.network.open() if job.anonymise and job.anonymise.network else None,
    )
    records, check = _records(job), job.opt_out_check()
    with download_slot(records):
        samples = curated_samples(records, source, job.settings, estimators, rejected, check, job.duplicates)
        return job.build(samples, job.encoding, rejected, check)


class CutoutsJob(Job):
    """See how many people of a split can be cut out."""

    step: ClassVar[str] = "list-cutouts"
    version: ClassVar[int] = 5
    split: Split
    shards: list[Shard]
    settings: CompositorSettings

    def label(self) -> str:
        """The split."""
        return self.split

    def determines(self) -> Any:
        """The shards' content."""
        shards = [[shard.path, shard.sha256] for shard in self.shards]
        return [self.split, shards, self.settings.model_dump(mode="json", exclude={"samples"})]


class Cutouts(BaseModel):
    """Result of listing cut-outs; who they are the shards' tables say."""

    pictures: list[int]
    """Of each shard, how many pictures hold somebody who can be cut out."""
    people: int
    """How many there are in all."""

    def is_sound(self, job: Job, listings: Listings) -> bool:
        """Whether the shards hold what they held, which the key says."""
        return True

    def told(self) -> str:
        """How many people can be cut out."""
        return f"people: {self.people}"


@cached_step
def list_cutouts(job: CutoutsJob) -> Cutouts:
    """Count them."""
    pictures, people = [], 0
    for samples in donors_of(job.root, job.shards, job.settings):
        found = [rows for rows in samples if rows]
        pictures.append(len(found))
        people += sum(map(len, found))
    return Cutouts(pictures=pictures, people=people)


class CompositeShardJob(ShardJob):
    """Composites ``start`` to ``stop`` of a split, on the backgrounds of its rows."""

    step: ClassVar[str] = "build-composite-shard"
    curated: CuratedSettings
    settings: CompositorSettings
    encoding: EncodingSettings
    start: int
    stop: int
    own: tuple[int, int]
    """The first of its rows that composites are spread over, and the first behind them, counted from its first row; the
    others are read where none of these can be used."""
    donors: list[Shard]
    """The shards whose people may be pasted: see `dataset_tools.donor_windows.neighbourhoods`."""
    instances: InstancesSettings | None
    """Keeps pictures with people from being backgrounds."""
    instances_fingerprint: str | None
    anonymise: AnonymiseSettings | None
    regions_fingerprint: str | None
    """Of what finds regions to be blurred."""

    def determines(self) -> Any:
        """Settings and digests; the background's numbers do not matter, their rows do."""
        return [
            self.path,
            self.mirror,
            self.curated.model_dump(mode="json", include={"decode", "quality"}, exclude=NOT_OF_READING),
            # Of maps of the ground that mirrors.
            self.curated.masks.aspect_tolerance,
            self.settings.model_dump(mode="json", exclude={"samples"}),
            self.encoding.model_dump(mode="json"),
            [self.start, self.stop],
            self.own,
            self.records,
            self.files,
            [[shard.path, shard.sha256] for shard in self.donors],
            self.instances_fingerprint,
            self.regions_fingerprint,
            self.opted_out,
            self.duplicates,
        ]


@cached_step
def build_composite_shard(job: CompositeShardJob) -> BuiltShard:
    """Fetch backgrounds -> place people of the same split on them -> write."""
    donors = DonorWindows(
        chain.from_iterable(donors_of(job.root, job.donors, job.settings)),
        ShardDataset.of_shards(job.root, job.donors).__getitem__,
        job.settings.donors,
        f"{job.settings.seed}/{job.path}",
    )
    rejected: list[Rejection] = []
    check, (first, behind) = job.opt_out_check(), (job.rows[0] + row for row in job.own)

    def samples(table: RecordTable, places: Sequence[int], chosen: Sequence[ImageRecord]) -> Iterator[Sample]:
        backgrounds = _backgrounds(job, table, places, chosen, rejected, check)
        for number, background in zip(range(job.start, job.stop), backgrounds, strict=True):
            key = f"composite-{job.split}-{number:08d}"
            try:
                if background is None:
                    tried = job.rows[1] - job.rows[0]
                    raise Rejected("no-background", f"none of the {tried} backgrounds of {job.path} can be used")
                people = donors.rows(number - job.start)
                yield compose(key, job.split, background, people, donors.load, job.settings)
            except Rejected as error:
                why = (error.reason, error.message, error.transient)
                rejected.append(Rejection(job.split, key, "", "composite", "image-rejected", *why))

    # Composites are spread evenly over the backgrounds, and only those that this gives are read.
    count = job.stop - job.start
    places = [first + number * (behind - first) // count for number in range(count)]
    with RecordTable(job.work, job.table) as table:
        chosen = [next(table.records(place, place + 1)) for place in dict.fromkeys(places)]
        with download_slot(chosen):
            return job.build(samples(table, places, chosen), job.encoding, rejected, check)


def _backgrounds(
    job: CompositeShardJob,
    table: RecordTable,
    places: Sequence[int],
    chosen: Sequence[ImageRecord],
    rejected: list[Rejection],
    check: OptOutCheck,
) -> Iterator[Background | None]:
    """The background of each composite in turn, fetched a few ahead; None where not one can be used.

    One that cannot be used gives its place to the next that can, or else to the last before it. Where none of the
    ``chosen`` can, the others of the job's rows are tried in turn, those of its own first.

    Args:
        places: rows of the table, one a composite.
        chosen: the records there, each once.
    """
    at = dict(zip((record.id for record in chosen), dict.fromkeys(places), strict=True))
    source = job.source.open()
    instances = job.instances.open() if job.instances else None
    regions = job.anonymise.network.open() if job.anonymise and job.anonymise.network else None

    def usable(some: Sequence[ImageRecord]) -> Iterator[Background]:
        if not job.settings.light.reflections:
            some = [replace(record, glossy_ground="") for record in some]  # nobody asks where the ground mirrors
        fetched = photographs(some, source, job.curated, rejected, check, job.duplicates)
        if instances is not None:
            fetched = person_free(fetched, instances, source, rejected)
        if regions is not None:
            return anonymised(fetched, regions, source, rejected)
        return (photograph.background() for photograph in fetched)

    def others() -> Iterator[Background]:
        taken = set(places)
        own = (job.rows[0] + row for row in range(*job.own))
        left = (row for row in dict.fromkeys((*own, *range(*job.rows))) if row not in taken)
        while some := list(islice(left, BATCH)):
            batch = [next(table.records(row, row + 1)) for row in some]
            at.update(zip((record.id for record in batch), some, strict=True))
            yield from usable(batch)

    stream = usable(chosen)
    following = next(stream, None)
    if following is None:
        stream = others()
        following = next(stream, None)
    current: Background | None = None
    for place in places:
        while following is not None and (current is None or at[current.origin.id] < place):
            current, following = following, next(stream, None)
        yield current


class DescribeJob(Job):
    """Write what stands beside the shards."""

    step: ClassVar[str] = "describe"
    version: ClassVar[int] = 5
    packages: ClassVar[tuple[str, ...]] = ("pillow", "pyarrow")
    name: str
    description: str
    shards: dict[str, dict[str, list[Shard]]]
    curated_rejected: str
    """Name below ``work`` of the table of what curation set aside."""
    opt_out: str
    """Name below ``work`` of the opt-out list; empty where there is none."""
    records: str
    """Name below ``work`` of the table of chosen images; empty without such a list."""
    seen: list[str]
    """Those of what each shard has read (`BuiltShard.seen`); none without such a list."""
    settings: dict[str, Any]


class Description(BaseModel):
    """The files beside the shards."""

    files: dict[str, File]

    def is_sound(self, job: Job, listings: Listings) -> bool:
        """Whether every file is as it was written."""
        return are_unaltered(job.root, self.files, listings)

    def told(self) -> str:
        """How many files."""
        return f"files: {len(self.files)}"


@cached_step
def describe(job: DescribeJob) -> Description:
    """Write card, Croissant metadata, attribution and ``rejected.parquet``."""
    listed = [shard for splits in job.shards.values() for shards in splits.values() for shard in shards]
    rejected = all_rejected(job.root, job.work, job.curated_rejected, listed)
    files = write_card(
        job.root,
        name=job.name,
        description=job.description,
        shards=job.shards,
        settings=job.settings,
        rejected=opt_out_list(job.work, job.opt_out).without_named(rejected, _opted_out(job)),
    )
    filesystem, base = open_root(job.root)
    return Description(
        files={name: File(sha256=sha256, tag=tag_of(filesystem, f"{base}/{name}")) for name, sha256 in files.items()}
    )


def _opted_out(job: DescribeJob) -> Iterator[ImageRecord]:
    """The chosen images that the opt-out list names."""
    if not job.opt_out:
        return
    listed = opt_out_list(job.work, job.opt_out)
    tables = (read_table(job.work, name, filters=pc.field("kind") != "") for name in job.seen)
    found = {id for table in tables for id in table["id"].to_pylist()}
    with RecordTable(job.work, job.records) as table:
        for record in table.records(0, table.count):
            if record.id in found or listed.named(record):
                yield record


def all_rejected(root: str, work: str, curated: str, shards: Iterable[Shard]) -> pa.Table:
    """What was set aside or mended by curation (the table of that name below ``work``) and in shards."""

    def read(shard: Shard) -> pa.Table:
        return pa.Table.from_pylist(read_index(root, shard.path)["rejected"], schema=REJECTION_SCHEMA)

    telling = (shard for shard in shards if shard.rejected)  # each look may cost a request
    return pa.concat_tables([read_table(work, curated), *map_in_order(read, telling, LOOKERS, 2 * LOOKERS)])


def lost_rows(rejected: pa.Table) -> pa.Table:
    """Those rows of a table of `dataset_tools.records.REJECTION_SCHEMA` that count for ``max_rejected_share``.

    A picture or composite that was chosen and is not there. Not so what curation did not choose, nor what somebody
    wants left out, nor whose quality or masks do not do, which is as good as not chosen; of these that counts which
    could not be read.
    """
    chosen = ~pc.field("stage").isin(["curate", "opt-out", "quality", "mask"])
    return rejected.filter((pc.field("outcome") == "image-rejected") & (pc.field("transient") | chosen))


@lru_cache(maxsize=2)
def opt_out_list(work: str, name: str) -> OptOut:
    """The opt-out list of a name, which holds its digest, below the work folder; an empty one without a name."""
    if not name:
        return OptOut()
    filesystem, base = open_root(work)
    return OptOut.model_validate_json(filesystem.cat_file(f"{base}/{name}"))


def read_table(work: str, name: str, **options: Any) -> pa.Table:
    """A Parquet table below the work folder."""
    filesystem, base = open_root(work)
    with filesystem.open(f"{base}/{name}", "rb") as file:
        return pq.read_table(file, **options)


def download_slot(records: Sequence[ImageRecord]) -> contextlib.AbstractContextManager[None]:
    """A slot of the limit `DOWNLOADS`, for pictures that come over a network.

    Local files need none, and asking is dear: the server's SQLite lets it wait for seconds behind its event log.
    """
    if all(isinstance(open_root(record.image)[0], LocalFileSystem) for record in records):
        return contextlib.nullcontext()
    return concurrency(DOWNLOADS, occupy=1)


def _records(job: PicturesJob) -> list[ImageRecord]:
    with RecordTable(job.work, job.table) as table:
        return list(table.records(*job.rows))
