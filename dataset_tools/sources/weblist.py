"""Source ``weblist``: pictures that a CSV or Parquet file names by URL, with the licence and author of each.

`WebList` reads the file, `dataset_tools.downloads` fetches what its rows name, and `DownloadedSource` reads that.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field

from dataset_tools.downloads import Download, picture_path
from dataset_tools.errors import Rejected, UserError
from dataset_tools.perceptual_hash import AlikeHashes
from dataset_tools.records import SPLITS, Curation, ImageRecord, Rejection, Role, Split, cell_to_text, csv_rows
from dataset_tools.settings import Settings, digest_of
from dataset_tools.splits import SplitShares, split_of
from dataset_tools.storage import open_root, sha256_of_file, tag_of
from dataset_tools.storage_options import Location, scrub
from dataset_tools.web import WebSettings, host_of

_BATCH = 10_000
"""Rows that are held at once."""


class WeblistColumns(Settings):
    """Names of the list's columns. Of those that are not named here, only ``url`` must be there."""

    url: str = "url"
    licence: str = "licence"
    """A row without is rejected, unless ``licence`` of the source names one for all."""
    author: str = "author"
    author_url: str = "author_url"
    title: str = "title"
    landing_url: str = "landing_url"
    """Page that shows the picture."""
    split: str = "split"
    """train, validation or test; where it is empty, the split follows from the picture's bytes."""
    role: str = "role"
    """people, or background for pictures without any person; empty: people."""


class WeblistSettings(Settings):
    """Pictures that a list names by URL."""

    kind: Literal["weblist"] = "weblist"
    urls: Location
    """The list, a row a picture: a path or fsspec URL of a ``.csv`` (UTF-8) or ``.parquet`` file."""
    columns: WeblistColumns = WeblistColumns()
    licence: str = ""
    """Licence of all pictures whose row names none."""
    author: str = ""
    """Author of all pictures whose row names none."""
    splits: SplitShares = Field({"train": 0.8, "validation": 0.1, "test": 0.1})
    """Share of each split among pictures whose row names none."""
    alike_bits: int = Field(4, ge=0, le=16)
    """Pictures whose perceptual hashes (64 bits) differ in so many bits at most are one, whichever splits they are to
    come into: the first row's is kept."""
    web: WebSettings = WebSettings()
    """How the pictures are fetched."""

    def open(self, tables: dict[str, list[str]] | None = None) -> WebList:
        """The list; it has no ``tables``."""
        return WebList(self)


@dataclass(frozen=True)
class WebRow:
    """One row of a web list that can be used."""

    number: int
    """Of the row: 1 is the first after the header."""
    url: str
    licence: str
    author: str
    author_url: str
    title: str
    landing_url: str
    split: str
    """Empty: it follows from the picture."""
    role: str


ROW_SCHEMA = pa.schema([(f.name, pa.int64() if f.name == "number" else pa.string()) for f in fields(WebRow)])


class WebList:
    """The file of `WeblistSettings`."""

    def __init__(self, settings: WeblistSettings) -> None:
        self.settings = settings

    def check(self) -> None:
        """Raise `UserError` where the list cannot be read, or lacks a column."""
        next(self.rows(), None)

    def fingerprint(self) -> str:
        """Digest of what `rows` gives. Raises `UserError` where there is no list."""
        settings = self.settings
        filesystem, path = open_root(settings.urls)
        try:
            on_disk = isinstance(filesystem, LocalFileSystem)
            content = (None if on_disk else tag_of(filesystem, path)) or sha256_of_file(filesystem, path)
        except OSError as error:
            raise self._unreadable(error) from None
        told = settings.model_dump(mode="json", include={"columns", "licence", "author"})
        return digest_of([self._is_parquet(), content, told])

    def rows(self) -> Iterator[WebRow | Rejection]:
        """Each row in turn, or why it is left out. Raises `UserError` where the list cannot be read."""
        filesystem, path = open_root(self.settings.urls)
        try:
            with filesystem.open(path, "rb") as file:
                read = self._parquet_rows(file) if self._is_parquet() else self._csv_rows(file)
                for number, cells in enumerate(read, start=1):
                    yield self._row(number, cells)
        except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
            raise self._unreadable(error) from None

    def _is_parquet(self) -> bool:
        suffix = PurePosixPath(self.settings.urls).suffix.lower()
        if suffix not in (".csv", ".parquet"):
            raise UserError(f"urls: {self.settings.urls} is neither a .csv nor a .parquet file")
        return suffix == ".parquet"

    def _unreadable(self, error: Exception) -> UserError:
        if isinstance(error, FileNotFoundError):
            return UserError(f"urls: {self.settings.urls} does not exist")
        return UserError(f"urls: {self.settings.urls} cannot be read: {' '.join(str(error).split())}")

    def _columns(self, there: Iterable[str]) -> dict[str, str]:
        """The columns that are there, by what they are for. Raises `UserError` where one is missing."""
        columns, there = self.settings.columns, list(there)
        named = columns.model_dump()
        if twice := [name for name, count in Counter(there).items() if count > 1 and name in named.values()]:
            raise UserError(f"urls: {self.settings.urls} has two columns {twice[0]!r}: leave one of them out")
        needed = {"url", *columns.model_fields_set} | (set() if self.settings.licence else {"licence"})
        for use in sorted(needed):
            if named[use] not in there:
                instead = ", or one licence for all as source.licence" if use == "licence" else ""
                raise UserError(
                    f"urls: {self.settings.urls} has no column {named[use]!r}; name the right one as "
                    f"source.columns.{use}{instead}"
                )
        return {use: name for use, name in named.items() if name in there}

    def _csv_rows(self, file: Any) -> Iterator[dict[str, str] | None]:
        """Cells by what they are for; None for a row of another length than the header."""
        table = csv_rows(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
        _, header = next(table, (1, []))
        columns = {use: header.index(name) for use, name in self._columns(header).items()}
        for _, row in table:
            yield {use: cell_to_text(row[at]) for use, at in columns.items()} if len(row) == len(header) else None

    def _parquet_rows(self, file: Any) -> Iterator[dict[str, str]]:
        table = pq.ParquetFile(file)
        columns = self._columns(table.schema_arrow.names)
        for batch in table.iter_batches(_BATCH, columns=list(columns.values())):
            for row in batch.to_pylist():
                yield {use: "" if row[name] is None else str(row[name]) for use, name in columns.items()}

    def _row(self, number: int, cells: dict[str, str] | None) -> WebRow | Rejection:
        told = {use: (cells or {}).get(use, "").strip() for use in WeblistColumns.model_fields}
        url, split, role = told["url"], told["split"], told["role"] or "people"
        told |= {
            "licence": told["licence"] or self.settings.licence,
            "author": told["author"] or self.settings.author,
            "role": role,
        }
        try:
            if cells is None:
                raise Rejected("bad-row", "it has another number of cells than the header")
            if not url:
                raise Rejected("no-url", "the URL is empty")
            host_of(url)
            for name in ("url", "landing_url", "author_url"):
                if scrub(told[name]) != told[name]:
                    what = f"the {'URL' if name == 'url' else name} holds a password or a signature"
                    raise Rejected("secret-in-url", f"{what}, and would be published")
            if not told["licence"]:
                raise Rejected("no-licence", "the licence is empty, and source.licence names none for all")
            if split not in ("", *SPLITS):
                raise Rejected("bad-split", f"the split is none of {', '.join(SPLITS)}")
            if role not in get_args(Role):
                raise Rejected("bad-role", f"the role is none of {', '.join(get_args(Role))}")
        except Rejected as error:
            known = split if split in SPLITS else ""
            where = f"row {number} of {PurePosixPath(self.settings.urls).name}"
            why = (error.reason, f"{where}: {error.message}")
            return Rejection(known, scrub(url)[:500], "", "curate", "row-rejected", *why)
        return WebRow(number, **told)


def rows_to_table(rows: Iterable[WebRow]) -> pa.Table:
    """Rows as an Arrow table of `ROW_SCHEMA`, in batches."""
    batches, held = [], list[dict[str, Any]]()
    for row in rows:
        held.append(asdict(row))
        if len(held) == _BATCH:
            batches.append(pa.RecordBatch.from_pylist(held, schema=ROW_SCHEMA))
            held = []
    batches.append(pa.RecordBatch.from_pylist(held, schema=ROW_SCHEMA))
    return pa.Table.from_batches(batches)


class DownloadedSettings(Settings):
    """A web list whose pictures lie here."""

    kind: Literal["downloaded"] = "downloaded"
    weblist: WeblistSettings
    folder: Location
    """Where tables and pictures lie."""
    rows: str
    """Table of `ROW_SCHEMA` below the folder; its name holds the digest of its content, as those that follow."""
    rejected: str
    """Table of `dataset_tools.records.REJECTION_SCHEMA`: rows that are left out."""
    downloads: tuple[str, ...]
    """Tables of `dataset_tools.downloads.DOWNLOAD_SCHEMA`: what each URL gave."""
    pictures: str
    """Folder below the folder, of `dataset_tools.downloads`."""

    def open(self, tables: dict[str, list[str]] | None = None) -> DownloadedSource:
        """The source that these settings describe; it has no ``tables``."""
        return DownloadedSource(self)


class DownloadedSource:
    """Pictures of `DownloadedSettings`. Implements `dataset_tools.sources.Source`."""

    name = "weblist"
    applies_exif = True

    def __init__(self, settings: DownloadedSettings) -> None:
        self.settings = settings

    @property
    def places(self) -> tuple[str, ...]:
        """The folder."""
        return (self.settings.folder,)

    def check(self) -> None:
        """Nothing: the steps that write the folder did."""

    def tables(self) -> dict[str, list[str]]:
        """None: their names say what is in them."""
        return {}

    def fingerprint(self) -> str:
        """Digest of the tables' names, which hold those of their content, and of the settings."""
        weblist = self.settings.weblist
        told = weblist.model_dump(mode="json", include={"splits", "alike_bits"})
        limit = weblist.web.max_redirects
        return digest_of([told, limit, self.settings.rows, self.settings.rejected, self.settings.downloads])

    def curate(self) -> Curation:
        """The pictures of all rows, in the order of the list, but for those that an earlier row gave already.

        What could not be fetched for good is a rejected row; what another run may fetch a rejected picture.
        """
        rejected = [Rejection(**row) for row in self._table(self.settings.rejected).to_pylist()]
        given = {
            row["url"]: Download(**row) for name in self.settings.downloads for row in self._table(name).to_pylist()
        }
        chosen = _Chosen(self.settings)
        for batch in self._table(self.settings.rows).to_batches(_BATCH):
            for row in batch.to_pylist():
                chosen.add(WebRow(**row), given)
        return Curation(chosen.records, rejected + chosen.rejected)

    def state(self, record: ImageRecord) -> list[str]:
        """Nothing: a record's id follows from the picture's bytes."""
        return []

    def read_image(self, record: ImageRecord) -> bytes:
        """The picture's bytes. Raises `Rejected`, transient, ``not-found`` or ``altered-file``."""
        place = f"{self.settings.folder.rstrip('/')}/{record.image}"
        filesystem, path = open_root(place)
        try:
            data: bytes = filesystem.cat_file(path)
        except FileNotFoundError:
            raise Rejected("not-found", f"{place} was downloaded and is gone", transient=True) from None
        if not hashlib.sha256(data).hexdigest().startswith(record.id):
            raise Rejected("altered-file", f"{place} is not what was downloaded; delete it", transient=True)
        return data

    def read_mask(self, record: ImageRecord, index: int) -> np.ndarray:
        """There is none: raises `Rejected` ``missing-mask``."""
        raise Rejected("missing-mask", "a web list has no masks")

    def _table(self, name: str) -> pa.Table:
        filesystem, base = open_root(self.settings.folder)
        with filesystem.open(f"{base}/{name}", "rb") as file:
            return pq.read_table(file)


class _Chosen:
    """Makes records of rows whose picture was fetched, and sets aside the others."""

    def __init__(self, settings: DownloadedSettings) -> None:
        self._settings = settings
        self.records: list[ImageRecord] = []
        self.rejected: list[Rejection] = []
        self._kept: dict[str, str] = {}
        """sha256 to the row that gave it."""
        self._alike = AlikeHashes(settings.weblist.alike_bits)

    def add(self, row: WebRow, given: dict[str, Download]) -> None:
        """Take a row; those before it in the list came before."""
        split = row.split
        try:
            found = self._fetched(row.url, given)
            split = row.split or split_of(found.sha256, self._settings.weblist.splits)
            if (first := self._kept.get(found.sha256)) is not None:
                raise Rejected("duplicate-image", f"row {row.number} gave the same bytes as {first}")
            value = int(found.perceptual_hash, 16)
            if (alike := self._alike.find(value)) is not None:
                raise Rejected("near-duplicate", f"row {row.number} gave a picture that looks like that of {alike}")
        except Rejected as error:
            outcome: Literal["image-rejected", "row-rejected"] = "image-rejected" if error.transient else "row-rejected"
            why = (outcome, error.reason, error.message, error.transient)
            self.rejected.append(Rejection(split, row.url, "", "fetch", *why))
            return
        identity = found.sha256[:32]
        self._kept[found.sha256] = here = f"row {row.number}, which is kept as {identity}"
        self._alike.add(value, here)
        self.records.append(
            ImageRecord(
                id=identity,
                source=DownloadedSource.name,
                split=_as_split(split),
                role="background" if row.role == "background" else "people",
                stratum="",
                image=f"{self._settings.pictures}/{picture_path(found.sha256)}",
                licence=row.licence,
                author=row.author,
                author_url=row.author_url,
                title=row.title,
                url=row.url,
                landing_url=row.landing_url,
            )
        )

    def _fetched(self, url: str, given: dict[str, Download]) -> Download:
        """What a URL gave in the end, over redirects from host to host. Raises `Rejected` where that is nothing."""
        most = self._settings.weblist.web.max_redirects
        for _ in range(most + 1):
            found = given.get(url)
            if found is None:
                break
            if found.status == "failed":
                raise Rejected(found.reason, found.message, transient=found.transient)
            if found.status == "fetched":
                return found
            url = found.final_url
        raise Rejected("too-many-redirects", f"more than {most} redirects")


def _as_split(text: str) -> Split:
    return next(split for split in SPLITS if split == text)
