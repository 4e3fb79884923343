"""The opt-out list: pictures that must be in no dataset, as somebody asked for it.

A text in UTF-8, one entry a line, as ``KIND VALUE`` or, in a CSV file, ``KIND,VALUE``:

==========  =========================================================================================================
``id``      Id of the picture in its source, as ``attribution.csv`` has it, alone or as ``SOURCE/ID``; or the key of its
            sample, unless that is a composite of several
``url``     Address of the picture or of its page; ``http`` or ``https``, ``www.``, a slash at the end and what follows
            a ``#`` make no difference
``sha256``  Of the picture's file, hex
``phash``   Perceptual hash (`dataset_tools.perceptual_hash`), 16 hex digits; names all pictures that differ in
            `ALIKE_BITS` bits at most, so also reduced and re-encoded ones
==========  =========================================================================================================

Empty lines, lines that begin with ``#`` and the heading ``kind,value`` are passed over. Whatever else is not
understood is an error: who asked must not be ignored without a word.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Literal
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from dataset_tools.errors import Rejected, UserError
from dataset_tools.perceptual_hash import AlikeHashes
from dataset_tools.records import SPLITS, ImageRecord, Rejection, Split, cell_to_text
from dataset_tools.storage import open_root

Kind = Literal["id", "url", "sha256", "phash"]

STAGE, REASON = "opt-out", "opted-out"
"""Of rows of ``rejected.parquet``."""
SOURCES = ("openimages", "coco", "ade20k", "folder", "pairs", "weblist")
"""Names of sources, with which keys of samples begin."""
ALIKE_BITS = 8
"""Of 64. Copies of one photograph, reduced or re-encoded, seldom differ in more, and different ones hardly ever in
less."""


class OptOut(BaseModel):
    """What a list names. All values are as `read_opt_out` writes them, sorted: equal lists are equal."""

    model_config = ConfigDict(frozen=True)

    id: tuple[str, ...] = ()
    url: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()
    phash: tuple[str, ...] = ()

    def named(self, record: ImageRecord) -> Kind | None:
        """By what the list names a picture that was not read yet: ``id``, ``url`` or not at all."""
        if self._ids and self._ids & {record.id, f"{record.source}-{record.id}", record.key()}:
            return "id"
        found = any(map(self._is_url, (record.url, record.landing_url, record.image)))
        return "url" if found else None

    def holds(self, sha256: str, phash: str) -> Kind | None:
        """By what the list names a picture that was read: ``sha256``, ``phash`` or not at all.

        Args:
            sha256: hex.
            phash: 16 hex digits; empty where it is not known.
        """
        if sha256 in self._digests:
            return "sha256"
        return "phash" if phash and self.phash and self._alike.find(int(phash, 16)) is not None else None

    def without_named(self, rejected: pa.Table, pictures: Iterable[ImageRecord] = ()) -> pa.Table:
        """Rows of `dataset_tools.records.REJECTION_SCHEMA` without what names a picture of the list.

        Rows of such a picture go; those of others that tell of one, such as a copy of it, keep neither id nor message.

        Args:
            pictures: chosen ones that the list names, by whatever: their ids and files' names count as the list's ids.
        """
        # Rows do not tell the source, which ids may begin with, as they do in keys of samples.
        prefix = re.compile(rf"^({'|'.join(SOURCES)})-")
        ids = {name for id in self.id for name in (id, id.rpartition("/")[2], prefix.sub("", id, count=1))}
        ids.discard("")  # of rows that tell only that there was one
        files = set()
        for picture in pictures:
            ids |= {picture.id, picture.key()}
            files.add(picture.image.rpartition("/")[2])
        if not (ids or files or self._urls):
            return rejected
        of_files = re.compile("|".join(rf"(?<![\w-]){re.escape(name)}(?![\w-])" for name in files) or "(?!)")
        rows = [row for row in rejected.to_pylist() if row["image_id"] not in ids and not self._is_url(row["image_id"])]
        for row in rows:
            words = re.findall(r"[\w/.-]*\w", row["message"])
            if not ids.isdisjoint(words) or of_files.search(row["message"]):
                row["image_id"] = row["message"] = ""
        return pa.Table.from_pylist(rows, schema=rejected.schema)

    def _is_url(self, text: str) -> bool:
        try:
            return bool(self._urls) and _plain_url(text) in self._urls
        except ValueError:
            return False

    @cached_property
    def _ids(self) -> frozenset[str]:
        """``SOURCE/ID`` as the key of the sample: a picture for which people chose a plate has that key for its id."""
        return frozenset(id.replace("/", "-") for id in self.id)

    @cached_property
    def _urls(self) -> frozenset[str]:
        return frozenset(self.url)

    @cached_property
    def _digests(self) -> frozenset[str]:
        return frozenset(self.sha256)

    @cached_property
    def _alike(self) -> AlikeHashes:
        alike = AlikeHashes(ALIKE_BITS)
        for value in self.phash:
            alike.add(int(value, 16), value)
        return alike


class OptedOut(Rejected):
    """A picture that a list names. Neither reason nor message says which one it is."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(REASON, f"somebody asked for it to be left out, by its {kind}")

    def row(self, split: Split) -> Rejection:
        """What ``rejected.parquet`` says, which is published: that there was one."""
        return Rejection(split, "", "", STAGE, "image-rejected", self.reason, self.message)


class OptOutCheck:
    """Holds the pictures of one shard against a list, and remembers them, so that they can be held against another."""

    def __init__(self, opt_out: OptOut | None = None) -> None:
        self._opt_out = opt_out or OptOut()
        self._seen: dict[tuple[str, str], tuple[str, str, str]] = {}

    @property
    def seen(self) -> list[tuple[str, str, str, str]]:
        """Of each picture and plate that was read: id, sha256, perceptual hash (or nothing), by what the list names
        it."""
        return sorted((id, *told) for (id, _), told in self._seen.items())

    def before_reading(self, record: ImageRecord) -> None:
        """Raise `OptedOut` where the list names a picture by id or address."""
        if kind := self._opt_out.named(record):
            raise OptedOut(kind)

    def of_file(self, record: ImageRecord, sha256: str) -> None:
        """Raise `OptedOut` where the list names a picture by the sha256 of its file."""
        self._hold((record.id, "picture"), sha256, "")

    def of_picture(self, record: ImageRecord, sha256: str, phash: str) -> None:
        """Raise `OptedOut` where the list names a picture by its perceptual hash."""
        self._hold((record.id, "picture"), sha256, phash)

    def of_plate(self, record: ImageRecord, sha256: str, phash: str) -> None:
        """Raise `OptedOut` where the list names a picture's clean plate by the sha256 of its file or its hash."""
        self._hold((record.id, "plate"), sha256, phash)

    def _hold(self, what: tuple[str, str], sha256: str, phash: str) -> None:
        kind = self._opt_out.holds(sha256, phash)
        self._seen[what] = (sha256, phash, kind or "")
        if kind:
            raise OptedOut(kind)


def read_opt_out(place: str) -> OptOut:
    """The list at any place (`dataset_tools.storage`).

    Raises:
        UserError: it cannot be read, or a line is not understood; the message names the line.
    """
    filesystem, path = open_root(place)
    try:
        text = filesystem.cat_file(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"opt-out list {place} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"opt-out list {place} is not in UTF-8: {error}") from None
    except Exception as error:  # every store has its own kinds of refusal
        raise UserError(f"opt-out list {place} cannot be read: {' '.join(str(error).split())}") from None
    values: dict[str, set[str]] = {kind: set() for kind in _CHECKS}
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            kind, value = _cells(line.strip())
            if (kind, value) == ("kind", "value"):
                continue
            if kind not in _CHECKS:
                raise ValueError(f"{kind!r} is none of the kinds {', '.join(_CHECKS)}")
            values[kind].add(_CHECKS[kind](value))
        except ValueError as error:
            raise UserError(f"line {number} of the opt-out list {place}: {error}") from None
    return OptOut(**{kind: tuple(sorted(found)) for kind, found in values.items()})


def _cells(line: str) -> tuple[str, str]:
    """Kind and value of a line. Raises `ValueError`."""
    found = re.fullmatch(r"\w+[ \t]+([^\s,\"]|,(?=\S))*", line)
    try:
        cells = line.split() if found else next(csv.reader([line], strict=True))
    except csv.Error as error:
        raise ValueError(f"is not CSV: {error}") from None
    if len(cells) != 2:
        raise ValueError(f"has {len(cells)} cells and not 2: a kind and its value; one with a comma needs quotes")
    return cells[0].strip().lower(), cell_to_text(cells[1].strip())


def _plain_url(text: str) -> str:
    """What two addresses of the same thing have in common. Raises `ValueError` for what is no address."""
    parts = urlsplit(text)
    if not parts.scheme or not parts.netloc:
        raise ValueError(f"{text!r} is no address such as https://example.org/picture.jpg")
    scheme = parts.scheme.lower().replace("https", "http")
    host = parts.netloc.rpartition("@")[2].lower().removeprefix("www.")
    query = f"?{parts.query}" if parts.query else ""
    return f"{scheme}://{host}{unquote(parts.path).rstrip('/')}{query}"


def _hex(digits: int) -> Callable[[str], str]:
    def check(text: str) -> str:
        if re.fullmatch(f"[0-9a-f]{{{digits}}}", text.lower()) is None:
            raise ValueError(f"{text!r} does not have {digits} hex digits")
        return text.lower()

    return check


def _id(text: str) -> str:
    if not text:
        raise ValueError("the id is empty")
    if re.fullmatch(rf"composite-({'|'.join(SPLITS)})-\d{{8}}", text):
        raise ValueError(
            f"{text} is a composite, which is made of several pictures: name those of its origins that are meant by "
            "their ids, which its json and the table of its shard hold"
        )
    return text


_CHECKS: dict[str, Callable[[str], str]] = {"id": _id, "url": _plain_url, "sha256": _hex(64), "phash": _hex(16)}


def count_opted_out(reasons: Iterable[str]) -> int:
    """How many pictures were left out, of the reasons in ``rejected.parquet``."""
    return sum(reason == REASON for reason in reasons)
