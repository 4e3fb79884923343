"""Source ``openimages``: OpenImages V5 masks, V6/V7 boxes and labels, from the public bucket or any mirror of it."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import threading
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field

from dataset_tools.curation import CurationSettings, SplitTables, curate
from dataset_tools.errors import Rejected, UserError
from dataset_tools.fetch import FetchSettings, open_filesystem, read_bytes, with_retries
from dataset_tools.images import DecodeSettings, decode_mask
from dataset_tools.records import SPLITS, ImageRecord, Split
from dataset_tools.settings import Settings, digest_of
from dataset_tools.sources import Curation
from dataset_tools.storage import PlaceSetting, open_root, written_whole
from dataset_tools.tables import MASK_PATH, Table

CLASSES = "v5/class-descriptions-boxable.csv"
TABLES: dict[Split, dict[str, str]] = {
    "train": {
        "boxes": "v6/oidv6-train-annotations-bbox.csv",
        "masks": "v5/train-annotations-object-segmentation.csv",
        "metadata": "2018_04/train/train-images-boxable-with-rotation.csv",
        "labels": "v7/oidv7-train-annotations-human-imagelabels.csv",
    },
    "validation": {
        "boxes": "v5/validation-annotations-bbox.csv",
        "masks": "v5/validation-annotations-object-segmentation.csv",
        "metadata": "2018_04/validation/validation-images-with-rotation.csv",
        "labels": "v7/oidv7-val-annotations-human-imagelabels.csv",
    },
    "test": {
        "boxes": "v5/test-annotations-bbox.csv",
        "masks": "v5/test-annotations-object-segmentation.csv",
        "metadata": "2018_04/test/test-images-with-rotation.csv",
        "labels": "v7/oidv7-test-annotations-human-imagelabels.csv",
    },
}
"""Tables below the root; each may be a ``.parquet`` file of the same name instead."""

_MAX_PIXELS = DecodeSettings().max_pixels
_INDEX_BLOCK = 1 << 20


class OpenImagesSettings(Settings):
    """OpenImages: where it lies, and what is taken from it."""

    kind: Literal["openimages"] = "openimages"
    root: PlaceSetting = "https://storage.googleapis.com/openimages"
    """Folder of the annotation tables and mask archives: a path or fsspec URL."""
    root_options: dict[str, Any] = Field({})
    """fsspec storage options of the root."""
    images: PlaceSetting = "s3://open-images-dataset"
    """Folder of the pictures, ``{split}/{ImageID}.jpg`` in it: a path or fsspec URL."""
    images_options: dict[str, Any] | None = None
    """fsspec storage options of the pictures; null: anonymous access on S3, nothing elsewhere."""
    splits: tuple[Split, ...] = Field(SPLITS, min_length=1)
    """Splits that are used."""
    cache: PlaceSetting | None = None
    """Local folder that keeps the tables of a remote root (some 5 GB); null: they are read again at each curation."""
    curation: CurationSettings = CurationSettings()
    fetch: FetchSettings = FetchSettings()

    def open(self) -> OpenImagesSource:
        """The source that these settings describe."""
        return OpenImagesSource(self)


@dataclass(frozen=True)
class OpenImagesSource:
    """Implements `dataset_tools.sources.Source`."""

    settings: OpenImagesSettings
    name = "openimages"
    applies_exif = False

    @property
    def places(self) -> tuple[str, ...]:
        """Root and pictures."""
        return (self.settings.root, self.settings.images)

    def fingerprint(self) -> str:
        """Digest of size and time (or ETag) of each table, and of the settings that decide what is chosen."""
        chosen = self.settings.model_dump(mode="json", include={"root", "images", "splits", "curation"})
        return digest_of({"settings": chosen, "tables": {name: list(token) for name, token in self._found().items()}})

    def curate(self) -> Curation:
        """Choose images: see `dataset_tools.curation.curate`."""
        with tempfile.TemporaryDirectory(prefix="openimages-") as folder:
            local = {self._plain(found): self._local(found, token, folder) for found, token in self._found().items()}
            tables = {
                split: SplitTables(**{kind: local[name] for kind, name in self._names(split).items()})
                for split in self.settings.splits
            }
            try:
                return curate(local[CLASSES], tables, self.settings.curation, self._image, source=self.name)
            except UserError as error:
                raise UserError(f"{self.settings.root}: {error}") from None

    def state(self, record: ImageRecord) -> list[str]:
        """Size and time of the picture and of the archive of its masks, of each that lies on a disk."""
        files = [record.image, *([self._archive(record)] if record.instances else [])]
        return [_state_on_disk(file) for file in files]

    def read_image(self, record: ImageRecord) -> bytes:
        """The encoded image file. Raises `Rejected` as `dataset_tools.fetch.read_bytes`."""
        options = self.settings.images_options
        if options is None:
            options = {"anon": True} if self.settings.images.startswith("s3://") else {}
        return read_bytes(record.image, self.settings.fetch, options)

    def read_mask(self, record: ImageRecord, index: int) -> np.ndarray:
        """Mask of one person, (h, w) bool at its own size: one range request, whatever the size of its archive.

        Raises:
            Rejected: ``missing-mask``, ``unreadable-mask``, as `read_bytes`, or as `decode_mask`.
        """
        member = record.instances[index].mask
        if not MASK_PATH.fullmatch(member) or not member.startswith(record.id):
            raise Rejected("unreadable-mask", f"{member!r} is not the name of a mask of image {record.id}")
        archive = self._archive(record)
        options, fetch = self.settings.root_options, self.settings.fetch
        try:
            entry = _archive_index(archive, options, fetch).find(member)
            data = entry.content(read_bytes(archive, fetch, options, span=entry.span), fetch.max_bytes)
        except Rejected as rejected:
            reason = {"not-found": "missing-mask", "unreadable": "unreadable-mask"}.get(
                rejected.reason, rejected.reason
            )
            raise Rejected(reason, rejected.message, transient=rejected.transient) from None
        except (zipfile.BadZipFile, zlib.error) as error:
            raise Rejected("unreadable-mask", f"{member} in {archive}: {error}") from None
        return decode_mask(data, _MAX_PIXELS)

    def _archive(self, record: ImageRecord) -> str:
        return f"{self.settings.root}/v5/{record.split}-masks/{record.split}-masks-{record.id[0]}.zip"

    def _image(self, split: Split, image: str) -> str:
        return f"{self.settings.images}/{split}/{image}.jpg"

    def _names(self, split: Split) -> dict[str, str]:
        unused = {"labels"} if self.settings.curation.backgrounds == 0 else set()
        return {kind: name for kind, name in TABLES[split].items() if kind not in unused}

    def _plain(self, name: str) -> str:
        return str(PurePosixPath(name).with_suffix(".csv"))

    def _found(self) -> dict[str, tuple[str, str]]:
        """Tables that are read, as they are called below the root, and what changes when their content does."""
        names = [CLASSES, *(name for split in self.settings.splits for name in self._names(split).values())]
        return dict(self._look_up(name) for name in names)

    def _look_up(self, name: str) -> tuple[str, tuple[str, str]]:
        parquet = str(PurePosixPath(name).with_suffix(".parquet"))
        for candidate in [name] if name == CLASSES else [parquet, name]:
            url = f"{self.settings.root}/{candidate}"
            try:
                info = with_retries(functools.partial(self._info, url), url, self.settings.fetch)
            except Rejected as rejected:
                if rejected.reason != "not-found":
                    raise UserError(rejected.message) from None
            else:
                tags = ("ETag", "etag", "md5Hash", "Content-MD5", "mtime", "LastModified", "Last-Modified", "created")
                return candidate, (str(info["size"]), next((str(info[tag]) for tag in tags if info.get(tag)), ""))
        raise UserError(f"table {self.settings.root}/{name} does not exist")

    def _info(self, url: str) -> dict[str, Any]:
        filesystem, path = open_filesystem(url, self.settings.fetch, self.settings.root_options)
        info: dict[str, Any] = filesystem.info(path)
        return info

    def _local(self, name: str, token: tuple[str, str], folder: str) -> Table:
        """The table on the local disk.

        DuckDB could read any fsspec file through ``register_filesystem``; but one lost connection in two gigabytes
        fails the whole query, and every new curation reads everything again. A copy is retried alone and can be kept.
        """
        url = f"{self.settings.root}/{name}"
        filesystem, path = open_filesystem(url, self.settings.fetch, self.settings.root_options)
        if isinstance(filesystem, LocalFileSystem):
            return Table(path, name)
        copies = Path(self.settings.cache or folder)
        copy = copies / f"{digest_of([url, *token])[:16]}-{PurePosixPath(name).name}"
        if not copy.exists():
            try:
                with_retries(functools.partial(_copy, filesystem, path, copy), url, self.settings.fetch)
            except Rejected as rejected:
                raise UserError(rejected.message) from None
        return Table(str(copy), name)


def _state_on_disk(file: str) -> str:
    filesystem, path = open_root(file)
    if not isinstance(filesystem, LocalFileSystem):
        return ""
    try:
        found = os.stat(path)
    except OSError:
        return "absent"
    return f"{found.st_size} {found.st_mtime_ns}"


def _copy(filesystem: fsspec.AbstractFileSystem, path: str, copy: Path) -> None:
    with written_whole(LocalFileSystem(), str(copy)) as partial:
        filesystem.get_file(path, str(partial))


@dataclass(frozen=True)
class _Entry:
    """One member of a zip archive."""

    name: str
    offset: int
    compressed: int
    size: int
    crc: int
    method: int

    @property
    def span(self) -> tuple[int, int]:
        # The local header's extra field may differ from the directory's: room for what zip writers put there.
        return self.offset, self.offset + 30 + len(self.name) + self.compressed + 512

    def content(self, data: bytes, limit: int) -> bytes:
        """Decompress what was read of ``span``. Raises `zipfile.BadZipFile` and `zlib.error`."""
        start = 30 + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
        packed = data[start : start + self.compressed]
        if data[:4] != b"PK\3\4" or len(packed) != self.compressed:
            raise zipfile.BadZipFile("the archive's directory does not fit its content")
        if self.size > limit:
            raise Rejected("too-large", f"{self.name} has {self.size} bytes; at most {limit} are read")
        if self.method == zipfile.ZIP_DEFLATED:
            packed = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, self.size)
        elif self.method != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"compression method {self.method} is not supported")
        if len(packed) != self.size or zlib.crc32(packed) != self.crc:
            raise zipfile.BadZipFile("the checksum does not fit")
        return packed


class _Index:
    """The directory of a zip archive in little memory: OpenImages' hold 2.7 million members, 2 GB as `ZipInfo`."""

    def __init__(self, url: str, members: list[zipfile.ZipInfo]) -> None:
        self.url = url
        names = np.array([member.filename for member in members], np.bytes_)
        order = np.argsort(names)
        self.names = names[order]
        rows = [(m.header_offset, m.compress_size, m.file_size, m.CRC, m.compress_type) for m in members]
        self.rows = np.array(rows, np.int64).reshape(-1, 5)[order]

    def find(self, name: str) -> _Entry:
        """The member called ``name``. Raises `Rejected` ``missing-mask``."""
        at = int(np.searchsorted(self.names, name.encode()))
        if at == len(self.names) or self.names[at] != name.encode():
            raise Rejected("missing-mask", f"{self.url} has no member {name}")
        return _Entry(name, *self.rows[at].tolist())


_lock = threading.Lock()
"""Threads that need the same archive read its directory once."""


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _archive_index(url: str, options: dict[str, Any], fetch: FetchSettings) -> _Index:
    filesystem, path = open_filesystem(url, fetch, options)
    # A mirror on this machine may be written anew while this process lives; asking a bucket each time costs too much.
    changed = os.stat(path).st_mtime_ns if isinstance(filesystem, LocalFileSystem) and os.path.exists(path) else 0
    with _lock:
        return _read_index(url, json.dumps(options, sort_keys=True), fetch, changed)


@functools.lru_cache(maxsize=64)
def _read_index(url: str, options: str, fetch: FetchSettings, changed: int) -> _Index:
    def read() -> list[zipfile.ZipInfo]:
        filesystem, path = open_filesystem(url, fetch, json.loads(options))
        with filesystem.open(path, "rb", block_size=_INDEX_BLOCK) as file, zipfile.ZipFile(file) as archive:
            return archive.infolist()

    return _Index(url, with_retries(read, url, fetch))
