"""Shards: deterministic and atomic writing, the index, reading by range requests, and verification.

A shard ``{configuration}/{split}-{000000}.tar`` is a plain WebDataset tar. Beside it stand
``{split}-{000000}.index.json`` with the offset of every part, so that one sample can be fetched with one
range request, with the size of every sample (`Outline`), and with what was set aside while the shard was built; and
``{split}-{000000}.parquet`` with what is known of every sample besides its pictures (`dataset_tools.shard_table`).
``manifest.json`` at the root names all shards with their digests and is written last: a dataset without a manifest is
not complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import fsspec
import numpy as np
from pycocotools import mask as coco_mask
from pydantic import BaseModel

from dataset_tools.errors import UserError, what_to_mend
from dataset_tools.ranges import NoRanges, read_range, read_whole
from dataset_tools.schema import (
    CONFIGURATIONS,
    NO_PARSING,
    PARSING_LABELS,
    SEVERAL,
    EncodingSettings,
    Sample,
    annotations_of,
)
from dataset_tools.storage import (
    Listings,
    files_in,
    is_unaltered,
    normal_place,
    open_root,
    sha256_of_file,
    tag_of,
    write_bytes,
    written_whole,
)

DATASET_VERSION = "2.1"
"""Of manifest, indices and tables; what each sample has is `dataset_tools.schema.SCHEMA_VERSION`."""
KEYPOINT_MARGIN = 0.1
"""Found keypoints must lie in their person's mask box grown by this share of its longer side (and 2 px)."""


class Shard(BaseModel):
    """One shard as the manifest lists it."""

    path: str
    """Relative to the dataset's root, such as ``composite/train-000000.tar``."""
    samples: int
    people: int
    size: int
    """Bytes."""
    sha256: str
    index_sha256: str
    table_sha256: str
    rejected: int
    transient: int
    """How many of the rejected may succeed when tried again."""


class Manifest(BaseModel):
    """``manifest.json``: the complete list of what a dataset holds."""

    schema_version: str = DATASET_VERSION
    name: str
    shards: dict[str, dict[str, list[Shard]]]
    """Configuration to split to shards, in order."""
    files: dict[str, str]
    """Other files of the dataset (card, Croissant, attribution, rejected) to their sha256."""
    source: str
    """Digest of what curation chose: the images, and what was set aside."""
    settings: dict[str, Any]
    """The settings that built it."""
    software: dict[str, str]
    """Versions of the packages that decide about bytes."""

    def digest(self) -> str:
        """sha256 (hex) over the shards' digests: equal data, equal digest."""
        lines = [
            f"{shard.path} {shard.sha256}\n"
            for splits in self.shards.values()
            for shards in splits.values()
            for shard in shards
        ]
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


@dataclass(frozen=True)
class Outline:
    """What the index tells of a sample, so that nobody has to fetch it to know whether it is of use."""

    width: int
    """Of the image, in pixels."""
    height: int
    people: int
    """How many are seen: have a mask that is not empty."""

    @classmethod
    def of(cls, sample: Sample) -> Outline:
        """The outline of a sample in memory."""
        height, width = sample.image.shape[:2]
        return cls(width, height, sum(bool(person.mask.any()) for person in sample.people))


def write_shard(
    samples: Iterable[Sample],
    root: str,
    path: str,
    encoding: EncodingSettings,
    rejected: list[dict[str, Any]],
) -> Shard:
    """Write samples as one tar, its table and its index; each appears whole or not at all, the index last.

    The bytes depend on the samples and the encoding alone: times, owners and modes are fixed. (Those of the table
    depend on the version of pyarrow too.) No tar is written where there is no sample; the index then records why.

    Args:
        samples: consumed one at a time; only the sample in hand is kept in memory.
        path: relative to ``root``, ends in ``.tar``.
        rejected: rows (`dataset_tools.records.Rejection` as dicts) kept in the index; read after the samples
            have been consumed, so the producer may fill it on the way.

    Raises:
        ValueError: a sample breaks the schema or its key was there before; the message names the key.
    """
    from dataset_tools.shard_table import row_of, table_bytes  # readers need no pyarrow

    people = 0
    outlines: list[tuple[int, ...]] = []
    rows: list[dict[str, Any]] = []

    def parts() -> Iterator[tuple[str, dict[str, bytes]]]:
        nonlocal people
        for sample in samples:
            people += len(sample.people)
            outlines.append(astuple(Outline.of(sample)))
            encoded = sample.to_parts(encoding)
            rows.append(row_of(annotations_of(sample.key, encoded), [person.mask for person in sample.people]))
            yield sample.key, encoded

    tar = write_tar(root, path, parts())
    filesystem, base = open_root(root)
    table_sha256 = write_bytes(filesystem, f"{base}/{table_path(path)}", table_bytes(rows))
    index_sha256 = write_index(root, path, tar, {"outlines": outlines, "rejected": rejected})
    return Shard(
        path=path,
        samples=len(tar.samples),
        people=people,
        size=tar.size,
        sha256=tar.sha256,
        index_sha256=index_sha256,
        table_sha256=table_sha256,
        rejected=len(rejected),
        transient=sum(bool(row["transient"]) for row in rejected),
    )


@dataclass(frozen=True)
class Tar:
    """What `write_tar` wrote."""

    size: int
    """Bytes."""
    sha256: str
    samples: list[dict[str, Any]]
    """An entry a sample for the index: its key, and where it and its parts lie."""


def write_tar(root: str, path: str, samples: Iterable[tuple[str, dict[str, bytes]]]) -> Tar:
    """Write samples, key and parts (suffix to bytes), as one WebDataset tar that appears whole or not at all.

    The bytes depend on keys and parts alone. Where there is no sample, no tar is written, and an older one removed.

    Args:
        samples: consumed one at a time.
        path: relative to ``root``, ends in ``.tar``.

    Raises:
        ValueError: a key was there before.
    """
    filesystem, base = open_root(root)
    keys: set[str] = set()
    index: list[dict[str, Any]] = []
    size, sha256 = 0, hashlib.sha256(b"").hexdigest()
    with written_whole(filesystem, f"{base}/{path}") as partial:
        with tarfile.open(partial, "w") as archive:
            for key, parts in samples:
                if key in keys:
                    raise ValueError(f"{path}: two samples have the key {key!r}")
                keys.add(key)
                for suffix, data in sorted(parts.items()):
                    archive.addfile(_member(f"{key}.{suffix}", len(data)), io.BytesIO(data))
        if keys:
            with partial.open("rb") as written:
                sha256 = hashlib.file_digest(written, "sha256").hexdigest()
            size = partial.stat().st_size
            with partial.open("rb") as written:
                index = [entry for entry, _ in _samples_of_tar(written)]
        else:
            partial.unlink()
    if not index and filesystem.exists(f"{base}/{path}"):
        filesystem.rm_file(f"{base}/{path}")
    return Tar(size, sha256, index)


def _member(name: str, size: int) -> tarfile.TarInfo:
    """As webdataset's own writer makes it; importing that imports torch, which takes seconds."""
    member = tarfile.TarInfo(name)
    member.size, member.uname, member.gname = size, "bigdata", "bigdata"
    return member


def write_index(root: str, path: str, tar: Tar, more: dict[str, Any]) -> str:
    """Write the index of the tar at ``path`` below ``root``, which holds ``more`` too; gives its sha256 (hex)."""
    filesystem, base = open_root(root)
    name = path.rsplit("/", 1)[-1]
    document = {
        "schema_version": DATASET_VERSION,
        "shard": name,
        "size": tar.size,
        "sha256": tar.sha256,
        "samples": tar.samples,
        **more,
    }
    data = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    return write_bytes(filesystem, f"{base}/{index_path(path)}", data)


def index_path(shard_path: str) -> str:
    """``a/train-000000.tar`` to ``a/train-000000.index.json``."""
    return shard_path.removesuffix(".tar") + ".index.json"


def table_path(shard_path: str) -> str:
    """``a/train-000000.tar`` to ``a/train-000000.parquet``."""
    return shard_path.removesuffix(".tar") + ".parquet"


def digests_of(shard: Shard) -> dict[str, str]:
    """The files of a shard, relative to the dataset's root, to their sha256 (hex)."""
    tar = {shard.path: shard.sha256} if shard.samples else {}
    return tar | {table_path(shard.path): shard.table_sha256, index_path(shard.path): shard.index_sha256}


def tags_of(root: str, shard: Shard) -> dict[str, str | None]:
    """`dataset_tools.storage.tag_of` each file of a shard; to be asked for right after it was written."""
    filesystem, base = open_root(root)
    return {path: tag_of(filesystem, f"{base}/{path}") for path in digests_of(shard)}


def is_intact(
    root: str, shard: Shard, tags: Mapping[str, str | None] | None = None, listings: Listings | None = None
) -> bool:
    """Whether the files of a shard still have the bytes they had when they were written.

    Args:
        tags: of `tags_of`; None: every byte is read.
        listings: see `dataset_tools.storage.is_unaltered`.
    """
    filesystem, base = open_root(root)
    return all(
        is_unaltered(filesystem, f"{base}/{path}", sha256, (tags or {}).get(path), listings)
        for path, sha256 in digests_of(shard).items()
    ) and (shard.samples > 0 or not filesystem.exists(f"{base}/{shard.path}"))


def read_index(root: str, path: str) -> dict[str, Any]:
    """The index of the shard at ``path`` below ``root``. Raises `UserError` where it is missing, broken or old."""
    filesystem, base = _open(root)
    place = f"{base}/{index_path(path)}"
    try:
        document: dict[str, Any] = json.loads(read_whole(filesystem, place))
    except FileNotFoundError:
        raise UserError(f"{place} is missing: build the dataset again, only what is missing is redone") from None
    except ValueError:
        raise UserError(f"{place} is not JSON: build the dataset again, only what is broken is redone") from None
    if not isinstance(document, dict) or not isinstance(document.get("samples"), list):
        raise UserError(f"{place} is not an index: build the dataset again, only what is broken is redone")
    _check_version(place, document)
    return document


def read_manifest(root: str) -> Manifest:
    """The manifest of the dataset at ``root``.

    Raises:
        UserError: there is none, it cannot be read, or it is of another version of the schema.
    """
    filesystem, base = _open(root)
    place = f"{base}/manifest.json"
    try:
        document = json.loads(filesystem.cat_file(place))
        if isinstance(document, dict) and "schema_version" in document:
            _check_version(place, document)
        return Manifest.model_validate(document)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{place} is not a manifest: {str(error).splitlines()[0]}") from None
    except Exception as error:  # every store has its own kinds of refusal
        why = what_to_mend(error)
        if isinstance(error, NotADirectoryError) or (isinstance(error, FileNotFoundError) and why is None):
            raise UserError(
                f"{root} holds no dataset: {place} is missing (it is written last; was the build ended?)"
            ) from None
        reason = why or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{root} cannot be read: {reason}") from error


def _check_version(place: str, document: dict[str, Any]) -> None:
    if (version := document.get("schema_version")) != DATASET_VERSION:
        raise UserError(
            f"{place} has schema version {version}, this program reads {DATASET_VERSION}: build the dataset again"
        )


def _open(root: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """As `open_root`; a slash at the end of a URL would be doubled by what follows, and servers then find nothing."""
    filesystem, base = open_root(root)
    return filesystem, base.rstrip("/")


class Samples(Protocol):
    """Samples by index, of one configuration, as `ShardDataset` has them, or put together from several."""

    keys: list[str]
    """Of all samples, by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...
    def order(self, seed: int, epoch: int) -> np.ndarray: ...


class ShardDataset(Sequence[Sample]):
    """Samples of one configuration and split, by index or in order, over any fsspec root.

    One sample costs one range request; the index files are read once, when the dataset is opened. May be used in
    processes that are forked or spawned, such as the workers of torch's ``DataLoader``.

    Args:
        root: folder or URL of the dataset (``s3://...``, ``https://...``, a path).
        configuration: ``real``, ``paired`` or ``composite``.
        split: ``train``, ``validation`` or ``test``.

    Raises:
        UserError: no dataset there, or it lacks the configuration or split (those it has are named). Also when a
            sample is read from a server that sends whole files only; `stream` needs no more than that.
    """

    def __init__(self, root: str, configuration: str, split: str) -> None:
        self.root = normal_place(root)
        self.configuration = configuration
        self.split = split
        self.manifest = read_manifest(root)
        splits = self.manifest.shards.get(configuration, {})
        if split not in splits:
            held = ", ".join(f"{c}/{s}" for c, have in self.manifest.shards.items() for s in have) or "nothing"
            raise UserError(f"{root} has no {configuration}/{split}; it holds {held}")
        self._setup(splits[split])

    @classmethod
    def of_shards(cls, root: str, shards: Sequence[Shard]) -> ShardDataset:
        """Read shards of a dataset that has no manifest yet."""
        dataset = cls.__new__(cls)
        dataset.root = normal_place(root)
        dataset._setup(shards)
        return dataset

    def _setup(self, shards: Sequence[Shard]) -> None:
        self.shards = [shard for shard in shards if shard.samples]
        self._filesystems: dict[int, tuple[fsspec.AbstractFileSystem, str]] = {}
        self.keys: list[str] = []
        """Key of every sample, in the order of the shards."""
        self._places: list[tuple[str, dict[str, Any]]] = []
        self._outlines: dict[str, list[Any]] = {}
        for shard in self.shards:
            document = read_index(self.root, shard.path)
            for entry in document["samples"]:
                self.keys.append(entry["key"])
                self._places.append((shard.path, entry))
            self._outlines[shard.path] = document.get("outlines", [])

    def _opened(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """File system and path of the root, opened once a process: what reads a network has a thread and sockets,
        and neither goes with a fork. Those of the parent stay in memory, since closing them would disturb it."""
        process = os.getpid()
        if process not in self._filesystems:
            self._filesystems[process] = _open(self.root)
        return self._filesystems[process]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_filesystems": {}}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        return Sample.from_parts(self.keys[index], self.parts(index))

    def parts(self, index: int) -> dict[str, bytes]:
        """Undecoded parts of one sample (suffix to bytes), with one range request."""
        path, entry = self._places[index]
        start, end = entry["offset"], entry["offset"] + entry["size"]
        data = self._part(path, entry["key"], start, end)
        return {name: data[offset - start : offset - start + size] for name, (offset, size) in entry["parts"].items()}

    def annotations(self, index: int) -> dict[str, Any]:
        """The ``annotations.json`` of one sample, without fetching its pictures."""
        path, entry = self._places[index]
        offset, size = entry["parts"]["annotations.json"]
        data = self._part(path, entry["key"], offset, offset + size)
        return annotations_of(entry["key"], {"annotations.json": data})

    def _part(self, path: str, key: str, start: int, end: int) -> bytes:
        filesystem, base = self._opened()
        try:
            data = read_range(filesystem, f"{base}/{path}", start, end)
        except NoRanges as error:
            raise UserError(str(error)) from None
        if len(data) != end - start:
            raise ValueError(f"{base}/{path} ends before sample {key!r}: the shard is cut short")
        return data

    @property
    def outlines(self) -> list[Outline]:
        """Of all samples, by index. Raises `UserError` where an index, by an older version, does not tell."""
        for shard in self.shards:
            if len(self._outlines[shard.path]) != shard.samples:
                raise UserError(
                    f"{self.root}/{index_path(shard.path)} does not say how large its samples are, as older versions "
                    "did not: build the dataset again"
                )
        return [Outline(*outline) for outlines in self._outlines.values() for outline in outlines]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of all indices, (len,) int64, the same for a seed and epoch on every machine."""
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def share(
        self,
        seed: int,
        epoch: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        worker: int = 0,
        workers: int = 1,
        start: int = 0,
    ) -> Iterator[Sample]:
        """Samples of `order` that belong to one worker of one rank.

        All shares together give every sample exactly once, whatever the numbers of ranks and workers; read
        in turn (rank by rank, worker by worker) they give the very sequence of `order`.

        Args:
            start: position in `order` to resume from, the same for all ranks.
        """
        for index in self.order(seed, epoch)[start:][rank + world_size * worker :: world_size * workers]:
            yield self[int(index)]

    def stream(self) -> Iterator[Sample]:
        """All samples in shard order, each shard read once from front to back."""
        filesystem, base = self._opened()
        for shard in self.shards:
            with filesystem.open(f"{base}/{shard.path}", "rb") as file:
                yield from (Sample.from_parts(entry["key"], parts) for entry, parts in _samples_of_tar(file))


@dataclass(frozen=True)
class Problem:
    """Something that `verify` found wrong."""

    where: str
    """File, and key where one sample is meant."""
    what: str


def verify(root: str, workers: int = 2) -> Iterator[Problem]:
    """Check a dataset: digests, tar against index and table, schema, masks, keypoints, effects, sources by split.

    Reads every byte of the shards once. Yields what is wrong; nothing where all is well.
    """
    from dataset_tools.credits import Credits  # readers need no pyarrow
    from dataset_tools.shard_table import read_shard_table

    filesystem, base = _open(root)
    manifest = read_manifest(root)
    for name, sha256 in manifest.files.items():
        if not filesystem.exists(f"{base}/{name}"):
            yield Problem(name, "is missing")
        elif sha256_of_file(filesystem, f"{base}/{name}") != sha256:
            yield Problem(name, "differs from the manifest's sha256")
    listed = [s for splits in manifest.shards.values() for shards in splits.values() for s in shards]
    for configuration in CONFIGURATIONS:
        names = (f"{configuration}/{name}" for name in files_in(filesystem, f"{base}/{configuration}"))
        for name in names:
            if name.endswith(".tar") and name not in {shard.path for shard in listed if shard.samples}:
                yield Problem(name, "is not in the manifest")
    with Credits() as credits, ThreadPoolExecutor(workers) as pool:
        for shard, problems in zip(listed, pool.map(lambda shard: _verify_shard(root, shard), listed), strict=True):
            yield from problems
            with contextlib.suppress(UserError):  # told of already
                table = read_shard_table(root, table_path(shard.path), ["key", "origins"])
                part, name = shard.path.split("/")
                credits.add(part, name.split("-")[0], shard.path, table)
        for key, paths in credits.keys_twice():
            yield Problem(f"{paths[-1]}, sample {key}", f"another sample has the key, in {paths[0]}")
        for source, (elsewhere, seen), (where, split) in credits.in_two_splits():
            yield Problem(where, f"source {source} is in split {split} and, in {elsewhere}, in {seen}")


def _verify_shard(root: str, shard: Shard) -> list[Problem]:
    from dataset_tools.shard_table import read_shard_table, row_of

    filesystem, base = _open(root)
    problems: list[Problem] = []

    def checked(name: str, sha256: str, read: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]] | None:
        try:
            found = read()
        except UserError as error:
            problems.append(Problem(name, str(error)))
            return None
        if sha256_of_file(filesystem, f"{base}/{name}") != sha256:
            problems.append(Problem(name, "differs from the manifest's sha256"))
        return found

    table = table_path(shard.path)
    rows = checked(table, shard.table_sha256, lambda: read_shard_table(root, table).to_pylist())
    entries = checked(index_path(shard.path), shard.index_sha256, lambda: list(read_index(root, shard.path)["samples"]))
    if rows is not None and len(rows) != shard.samples:
        problems.append(Problem(table, f"has {len(rows)} rows, the manifest says {shard.samples} samples"))
    if entries is None or not shard.samples:
        return problems
    configuration, name = shard.path.split("/")
    split = name.split("-")[0]
    expected = None
    count, before = 0, len(problems)
    try:
        file = _Hashed(filesystem.open(f"{base}/{shard.path}", "rb"))
    except FileNotFoundError:
        return [*problems, Problem(shard.path, "is missing")]
    with file:
        try:
            for count, (entry, parts) in enumerate(_samples_of_tar(file), start=1):
                key = entry["key"]
                where = f"{shard.path}, sample {key}"
                expected = expected or set(parts)
                if set(parts) != expected:
                    problems.append(Problem(where, f"parts {sorted(parts)} differ from the first sample's"))
                if count > len(entries) or entries[count - 1] != entry:
                    problems.append(Problem(where, "is not what the index says"))
                try:
                    sample, document = Sample.from_parts(key, parts), annotations_of(key, parts)
                    found = list(_faults(sample, document))
                except (ValueError, KeyError) as error:
                    problems.append(Problem(where, f"cannot be decoded: {error}"))
                    continue
                if (sample.configuration, sample.split) != (configuration, split):
                    found.append(f"says it belongs to {sample.configuration}/{sample.split}")
                if not found and rows is not None:
                    row = row_of(document, [person.mask for person in sample.people])
                    found += [] if rows[count - 1 : count] == [row] else ["is not what the table says"]
                problems += [Problem(where, what) for what in found]
        except (tarfile.TarError, EOFError, OSError) as error:
            problems.append(Problem(shard.path, f"cannot be read as a tar: {error}"))
        if file.sha256() != shard.sha256:
            problems.insert(before, Problem(shard.path, "differs from the manifest's sha256"))
    if count != shard.samples:
        problems.append(Problem(shard.path, f"holds {count} samples, the manifest says {shard.samples}"))
    return problems


class _Hashed:
    """A file whose digest is taken while it is read from front to back."""

    def __init__(self, file: Any) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def __enter__(self) -> _Hashed:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """The next bytes, ``size`` at most."""
        data: bytes = self._file.read(size)
        self._digest.update(data)
        return data

    def sha256(self) -> str:
        """sha256 (hex) of the whole file, of which the rest is read."""
        while self.read(1 << 20):
            pass
        return self._digest.hexdigest()


def _faults(sample: Sample, document: dict[str, Any]) -> Iterator[str]:
    height, width = sample.image.shape[:2]
    if (document["width"], document["height"]) != (width, height):
        yield f"annotations.json says {document['width']}x{document['height']}, the image is {width}x{height}"
    try:
        sample.check()
    except ValueError as error:
        yield str(error)
        return
    if (sample.made_by.plate.name == "none") != (sample.background is None):
        yield "a clean plate goes with the name of who made it"
    for name in ("known_share", "effects_share"):
        if document[name] != getattr(sample, name):
            yield f"annotations.json says {name} {document[name]}, the parts say {getattr(sample, name)}"
    labels = len(PARSING_LABELS[sample.label_set])
    if labels and (highest := int(sample.parsing.max())) >= labels:
        yield f"parsing.png has the label {highest}, which {sample.label_set} has not"
    if not labels and (sample.parsing != NO_PARSING).any():
        yield f"parsing.png is not {NO_PARSING} everywhere, but nobody made it"
    if sample.configuration == "composite":
        if sorted(person.order or 0 for person in sample.people) != list(range(len(sample.people))):
            yield f"order is not 0 to {len(sample.people) - 1}, each once"
        if (np.sum([person.mask for person in sample.people], axis=0) > 1).any():
            yield "visible masks of two people overlap"
    if sample.effects is not None and len(sample.people) <= SEVERAL and (sample.effects >> len(sample.people)).any():
        yield f"effects.png shows effects of more people than the {len(sample.people)} there are"
    for index, (person, entry) in enumerate(zip(sample.people, document["annotations"], strict=True)):
        name = f"person {entry['id']}"
        shown = sample.effects_of([index])
        if person.effects and (shown is None or not shown.any()):
            yield f"{name}: has a {person.effects[0]}, of which effects.png shows nothing"
        if not person.mask.any():
            yield f"{name}: mask is empty"
            continue
        rle = entry["segmentation"]
        if int(coco_mask.area(rle)) != entry["area"] or [float(v) for v in coco_mask.toBbox(rle)] != entry["bbox"]:
            yield f"{name}: area or bbox is not the mask's"
        if person.complete_mask is not None and (person.mask & ~person.complete_mask).any():
            yield f"{name}: visible mask goes beyond the complete mask"
        outside = person.keypoints[:, 2] > 0
        outside &= ~keypoints_in_box(
            person.keypoints,
            person.mask if person.complete_mask is None else person.complete_mask,
        )
        if outside.any():
            yield f"{name}: {int(outside.sum())} keypoints lie outside the picture or the mask's box"


def keypoints_in_box(keypoints: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(18,) bool: which of the (18, 3) keypoints lie in the picture and near the person of it.

    That is in the box of the (H, W) mask, grown by `KEYPOINT_MARGIN`, and between the picture's edges. These are at
    -0.5 where pixels' centres have whole numbers, and at W or H where a source measures from 0 to the edge.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if rows.size == 0:
        return np.zeros(len(keypoints), bool)
    low = np.array([columns[0], rows[0]])
    high = np.array([columns[-1] + 1, rows[-1] + 1])
    margin = max(high - low) * KEYPOINT_MARGIN + 2
    low, high = np.maximum(low - margin, -0.5), np.minimum(high + margin, mask.shape[::-1])
    return ((keypoints[:, :2] >= low) & (keypoints[:, :2] <= high)).all(1)


def _samples_of_tar(file: Any) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """Each sample's entry for the index (key, and where it and its parts lie) and its parts, in one pass."""
    entry: dict[str, Any] = {}
    parts: dict[str, bytes] = {}
    with tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            if entry and key != entry["key"]:
                yield entry, parts
                entry, parts = {}, {}
            if suffix in parts:
                raise tarfile.TarError(f"member {member.name!r} is there twice")
            content = tar.extractfile(member) if member.isfile() else None
            if content is None:
                raise tarfile.TarError(f"member {member.name!r} is not a file")
            entry = entry or {"key": key, "offset": member.offset, "size": 0, "parts": {}}
            entry["parts"][suffix] = [member.offset_data, member.size]
            entry["size"] = member.offset_data + -(-member.size // 512) * 512 - entry["offset"]
            parts[suffix] = content.read()
    if entry:
        yield entry, parts
