"""Source ``openimages``: OpenImages V5 masks, V6/V7 boxes and labels, from the public bucket or any mirror of it."""

from __future__ import annotations

import functools
import json
import os
import re
import struct
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field

from dataset_tools.curation import CurationSettings, SplitTables, curate
from dataset_tools.errors import Rejected, UserError
from dataset_tools.fetch import (
    FetchSettings,
    copy_file,
    list_folder,
    look_up,
    open_filesystem,
    read_bytes,
    with_retries,
)
from dataset_tools.images import DecodeSettings
from dataset_tools.mask_files import decode_mask
from dataset_tools.ranges import NoRanges, is_http, read_range
from dataset_tools.records import SPLITS, Curation, ImageRecord, Split
from dataset_tools.settings import Settings, digest_of
from dataset_tools.storage import PlaceSetting, changed_on_disk, is_url, state_on_disk, version_of, written_whole
from dataset_tools.storage_options import Location, StorageOptions
from dataset_tools.tables import CLASSES, MASK_PATH, TABLES, Table

_MAX_PIXELS = DecodeSettings().max_pixels
_MASK_NAME = re.compile(MASK_PATH.pattern.encode())
_INDEX_BLOCK = 1 << 20


Tables = dict[str, list[str]]
"""Tables as they are called below the root, with their size (empty where unknown) and what changes when they do."""


class OpenImagesSettings(Settings):
    """OpenImages: where it lies, and what is taken from it."""

    kind: Literal["openimages"] = "openimages"
    root: Location = "https://storage.googleapis.com/openimages"
    """Folder of the annotation tables and mask archives: a path or fsspec URL."""
    root_options: StorageOptions = Field({})
    """fsspec storage options of the root; secrets in them are named, as ``{env: NAME}`` or ``{block: secret/NAME}``."""
    images: Location = "s3://open-images-dataset"
    """Folder of the pictures, ``{split}/{ImageID}.jpg`` in it: a path or fsspec URL."""
    images_options: StorageOptions | None = None
    """fsspec storage options of the pictures, likewise; null: anonymous access on S3, nothing elsewhere."""
    splits: tuple[Split, ...] = Field(SPLITS, min_length=1)
    """Splits that are used."""
    cache: PlaceSetting | None = None
    """Local folder that keeps the tables of a remote root (some 5 GB); null: they are read again at each curation."""
    curation: CurationSettings = CurationSettings()
    fetch: FetchSettings = FetchSettings()

    def open(self, tables: Tables | None = None) -> OpenImagesSource:
        """The source that these settings describe; with what `OpenImagesSource.tables` found, where that is known."""
        return OpenImagesSource(self, tables)


@dataclass(frozen=True)
class OpenImagesSource:
    """Implements `dataset_tools.sources.Source`."""

    settings: OpenImagesSettings
    known: Tables | None = None
    """What `tables` found before, perhaps in another process: nothing is looked up again."""
    archives: dict[Split, dict[str, Any]] = field(default_factory=dict, compare=False, repr=False)
    """What a store that lists said of the archives of masks, by split and name."""
    name = "openimages"
    applies_exif = False

    @property
    def places(self) -> tuple[str, ...]:
        """Root and pictures."""
        return (self.settings.root, self.settings.images)

    def check(self) -> None:
        """See `dataset_tools.sources.Source.check`: all tables where a listing tells, the smallest one over HTTP."""
        if is_url(self.settings.root) and self.settings.root.startswith("http"):
            self._look_up(CLASSES, None)
        else:
            self.tables()

    def tables(self) -> Tables:
        """The tables that are read, looked up by one listing a folder or, over HTTP, by one request a table.

        Raises:
            UserError: a table is missing, or the root cannot be read.
        """
        if self.known is not None:
            return self.known
        names = [CLASSES, *(name for split in self.settings.splits for name in self._names(split).values())]
        listings = {folder: self._listing(folder) for folder in dict.fromkeys(map(_folder, names))}
        return dict(self._look_up(name, listings[_folder(name)]) for name in names)

    def fingerprint(self) -> str:
        """Digest of size and time (or ETag) of each table, and of the settings that decide what is chosen."""
        chosen = self.settings.model_dump(mode="json", include={"root", "images", "splits", "curation"})
        return digest_of({"settings": chosen, "tables": self.tables()})

    def curate(self) -> Curation:
        """Choose images: see `dataset_tools.curation.curate`."""
        with tempfile.TemporaryDirectory(prefix="openimages-") as folder:
            found = self.tables()
            local = {self._plain(name): self._local(name, token, folder) for name, token in found.items()}
            tables = {
                split: SplitTables(**{kind: local[name] for kind, name in self._names(split).items()})
                for split in self.settings.splits
            }
            try:
                return curate(local[CLASSES], tables, self.settings.curation, self._image, source=self.name)
            except UserError as error:
                raise UserError(f"{self.settings.root}: {error}") from None

    def state(self, record: ImageRecord) -> list[str]:
        """Of the picture where it lies on a disk, and of the archive of its masks wherever a listing tells."""
        return [state_on_disk(record.image), self._state_of_archive(record) if record.instances else ""]

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
            data = read_bytes(archive, fetch, options, span=entry.span(fetch.max_bytes))
            return decode_mask(entry.content(data), _MAX_PIXELS)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise Rejected("unreadable-mask", f"{member} in {archive}: {error}") from None
        except Rejected as rejected:
            if rejected.reason == "not-found":  # the whole archive: one mask alone is not to blame
                raise Rejected("missing-mask", rejected.message, transient=True) from None
            if rejected.reason == "unreadable":
                raise Rejected("unreadable-mask", rejected.message, transient=rejected.transient) from None
            raise

    def _archive(self, record: ImageRecord) -> str:
        return f"{self.settings.root}/v5/{record.split}-masks/{record.split}-masks-{record.id[0]}.zip"

    def _state_of_archive(self, record: ImageRecord) -> str:
        archive = self._archive(record)
        if not is_url(archive):
            return state_on_disk(archive)
        folder, _, name = archive.rpartition("/")
        if record.split not in self.archives:
            self.archives[record.split] = self._listing(folder.removeprefix(f"{self.settings.root}/")) or {}
        return " ".join(version_of(self.archives[record.split].get(name, {})))

    def _image(self, split: Split, image: str) -> str:
        return f"{self.settings.images}/{split}/{image}.jpg"

    def _names(self, split: Split) -> dict[str, str]:
        unused = {"labels"} if self.settings.curation.backgrounds == 0 else set()
        return {kind: name for kind, name in TABLES[split].items() if kind not in unused}

    def _plain(self, name: str) -> str:
        return str(PurePosixPath(name).with_suffix(".csv"))

    def _listing(self, folder: str) -> dict[str, dict[str, Any]] | None:
        settings = self.settings
        try:
            return list_folder(f"{settings.root}/{folder}", settings.fetch, settings.root_options)
        except Rejected as rejected:
            raise UserError(rejected.message) from None

    def _look_up(self, name: str, listing: dict[str, dict[str, Any]] | None) -> tuple[str, list[str]]:
        """A table below the root, and what tells that it changed.

        Where both stand, Parquet is read; but where nothing can be listed, CSV, which mirrors have: a request each
        for what is rarely there would double them all.
        """
        parquet = str(PurePosixPath(name).with_suffix(".parquet"))
        both = [name] if name == CLASSES else [name, parquet] if listing is None else [parquet, name]
        for candidate in both:
            if listing is None:
                try:
                    info = look_up(f"{self.settings.root}/{candidate}", self.settings.fetch, self.settings.root_options)
                except Rejected as rejected:
                    if rejected.reason in ("not-found", "no-such-folder"):
                        continue
                    raise UserError(rejected.message) from None
            elif (info := listing.get(PurePosixPath(candidate).name, {})).get("type") == "directory" or not info:
                continue
            return candidate, version_of(info)
        raise UserError(f"table {self.settings.root}/{name} does not exist")

    def _local(self, name: str, token: list[str], folder: str) -> Table:
        """The table on the local disk.

        DuckDB could read any fsspec file through ``register_filesystem``; but one lost connection in two gigabytes
        fails the whole query, and every new curation reads everything again. A copy is retried alone and can be kept.
        """
        url, fetch, options = f"{self.settings.root}/{name}", self.settings.fetch, self.settings.root_options
        filesystem, path = open_filesystem(url, fetch, options)
        if isinstance(filesystem, LocalFileSystem):
            return Table(path, name)
        copies = Path(self.settings.cache or folder)
        copy = copies / f"{digest_of([url, *token])[:16]}-{PurePosixPath(name).name}"
        size = int(token[0]) if token[0] else None
        if not copy.exists() or (size is not None and copy.stat().st_size != size):
            try:
                with written_whole(LocalFileSystem(), str(copy)) as partial:
                    copy_file(url, str(partial), size, fetch, options)
            except Rejected as rejected:
                raise UserError(f"table {rejected.message}") from None
            except OSError as error:
                raise UserError(f"{copies} cannot take the table {name}: {error.strerror or error}") from None
        return Table(str(copy), name)


def _folder(name: str) -> str:
    return str(PurePosixPath(name).parent)


@dataclass(frozen=True)
class _Entry:
    """One member of a zip archive."""

    name: str
    offset: int
    compressed: int
    size: int
    crc: int
    method: int

    def span(self, limit: int) -> tuple[int, int]:
        """Where the member lies in the archive. Raises `Rejected` ``too-large`` for more than ``limit`` bytes."""
        if max(self.size, self.compressed) > limit:
            raise Rejected("too-large", f"{self.name} has {self.size} bytes; at most {limit} are read")
        # The local header's extra field may differ from the directory's: room for what zip writers put there.
        return self.offset, self.offset + 30 + len(self.name) + self.compressed + 512

    def content(self, data: bytes) -> bytes:
        """Decompress what was read of `span`. Raises `zipfile.BadZipFile` and `zlib.error`."""
        start = 30 + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
        packed = data[start : start + self.compressed]
        if data[:4] != b"PK\3\4" or len(packed) != self.compressed:
            raise zipfile.BadZipFile("the archive's directory does not fit its content")
        if self.method == zipfile.ZIP_DEFLATED:
            packed = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, self.size + 1)
        elif self.method != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"compression method {self.method} is not supported")
        if len(packed) != self.size or zlib.crc32(packed) != self.crc:
            raise zipfile.BadZipFile("the checksum does not fit")
        return packed


class _BadArchive(Exception):
    """A file is no zip archive, or its directory cannot be read."""


class _Index:
    """The masks in a zip archive in little memory: OpenImages' hold 2.7 million members, 2 GB as `ZipInfo`.

    Members of other names are left out, whatever their encoding (``zipfile`` refuses the archive for one of them).
    """

    def __init__(self, url: str, found: Iterable[tuple[bytes, tuple[int, ...]]]) -> None:
        self.url = url
        members = list(found)
        names = np.array([name for name, _ in members], np.bytes_)
        order = np.argsort(names, kind="stable")
        self.names = names[order]
        self.rows = np.array([row for _, row in members], np.int64).reshape(-1, 5)[order]

    def find(self, name: str) -> _Entry:
        """The member called ``name``. Raises `Rejected` ``missing-mask``."""
        at = int(np.searchsorted(self.names, name.encode(), side="right")) - 1
        if at < 0 or self.names[at] != name.encode():
            raise Rejected("missing-mask", f"{self.url} has no member {name}")
        return _Entry(name, *self.rows[at].tolist())


def _members(directory: bytes, shift: int) -> Iterator[tuple[bytes, tuple[int, ...]]]:
    """Name, and offset, compressed size, size, CRC and method of every mask in an archive's central directory.

    Section 4.3.12 of PKWARE's APPNOTE.TXT. Raises `_BadArchive`.
    """
    at = 0
    while at < len(directory):
        if directory[at : at + 4] != b"PK\1\2" or at + 46 > len(directory):
            raise _BadArchive("its directory is damaged")
        method, crc, compressed, size, name_length, extra_length, comment_length, offset = struct.unpack_from(
            "<10xH4x3I3H8xI", directory, at
        )
        name = directory[at + 46 : at + 46 + name_length]
        end = at + 46 + name_length + extra_length
        if _MASK_NAME.fullmatch(name):
            large = _zip64_field(directory[at + 46 + name_length : end])
            size, compressed, offset = (
                large.pop(0) if value == 0xFFFFFFFF and large else value for value in (size, compressed, offset)
            )
            yield name, (offset + shift, compressed, size, crc, method)
        at = end + comment_length


def _zip64_field(extra: bytes) -> list[int]:
    """The numbers that do not fit in 32 bits (APPNOTE.TXT, 4.5.3): size, compressed size, offset, as far as needed."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            return list(struct.unpack_from(f"<{len(field) // 8}Q", field))
        at += 4 + length
    return []


def _directory(read: Callable[[int, int], bytes], size: int) -> tuple[bytes, int]:
    """The central directory of an archive, and by how much its offsets are too small: something stands before it.

    Sections 4.3.14 to 4.3.16 of APPNOTE.TXT. Raises `_BadArchive`.
    """
    first = max(size - 22 - 0xFFFF - 20, 0)
    tail = read(first, size)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + 22 > len(tail):
        raise _BadArchive("it is no zip archive, or its end is missing")
    length, offset = struct.unpack_from("<12x2I", tail, at)
    end = first + at
    if tail[max(at - 20, 0) : at][:4] == b"PK\6\7":
        (end,) = struct.unpack_from("<8xQ", tail, at - 20)
        record = read(end, end + 56)
        if record[:4] != b"PK\6\6" or len(record) != 56:
            raise _BadArchive("its end is damaged")
        length, offset = struct.unpack_from("<40x2Q", record)
    start = end - length
    if start < 0 or start < offset:
        raise _BadArchive("its end is damaged")
    directory = read(start, end)
    if len(directory) != length:
        raise _BadArchive("it ends early")
    return directory, start - offset


_lock = threading.Lock()
"""Threads that need the same archive read its directory once."""


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _archive_index(url: str, options: dict[str, Any], fetch: FetchSettings) -> _Index:
    filesystem, path = open_filesystem(url, fetch, options)
    with _lock:
        return _read_index(url, json.dumps(options, sort_keys=True), fetch, changed_on_disk(filesystem, path))


@functools.lru_cache(maxsize=64)
def _read_index(url: str, options: str, fetch: FetchSettings, changed: int) -> _Index:
    def read() -> _Index:
        filesystem, path = open_filesystem(url, fetch, json.loads(options))
        if is_http(filesystem):
            size = look_up(url, fetch, json.loads(options))["size"]
            if size is None:
                raise NoRanges(url)
            return _Index(url, _members(*_directory(functools.partial(read_range, filesystem, path), size)))
        with filesystem.open(path, "rb", block_size=_INDEX_BLOCK) as file:

            def part(start: int, end: int) -> bytes:
                file.seek(start)
                return bytes(file.read(end - start))

            return _Index(url, _members(*_directory(part, file.seek(0, os.SEEK_END))))

    return with_retries(read, url, fetch)
