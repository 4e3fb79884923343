"""Source ``folder``: own photographs, with masks of the people in them or without, on any fsspec root.

How masks may be stored is said in `dataset_tools.photo_masks`. An optional ``attribution.csv`` beside the
photographs (columns ``file``, ``licence``, ``author``, ``title``, ``url``) says whose they are.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import PurePosixPath
from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from dataset_tools.errors import Rejected, UserError
from dataset_tools.file_names import is_unicode, printable
from dataset_tools.images import orient, read_orientation, undo_orientation
from dataset_tools.mask_files import decode_mask_file
from dataset_tools.masks import bounds, stratum
from dataset_tools.photo_masks import (
    MAX_PIXELS,
    PHOTO_SUFFIXES,
    PhotoMasks,
    Place,
    open_masks,
    plain_name,
    spellings,
    upright_turn,
)
from dataset_tools.records import Curation, ImageRecord, InstanceRecord, Rejection, Role, cell_to_text, csv_rows
from dataset_tools.schema import decode_rle
from dataset_tools.settings import Settings, digest_of
from dataset_tools.splits import SplitShares, split_of
from dataset_tools.storage_options import Location

ATTRIBUTION_FILE = "attribution.csv"
ATTRIBUTION_COLUMNS = ("file", "licence", "author", "title", "url")
_READERS = 8


class FolderSettings(Settings):
    """Own photographs, and masks."""

    kind: Literal["folder"] = "folder"
    photos: Location
    """Folder of photographs, searched with its subfolders: a path or fsspec URL."""
    masks: Location | None = None
    """Folder of mask files with the photographs' names and subfolders, or the path of one COCO json; null: there are
    none, and an instance network finds the people."""
    backgrounds: Location | None = None
    """Folder of photographs without any person, for composites."""
    splits: SplitShares = Field({"train": 0.8, "validation": 0.1, "test": 0.1})
    """Share of each split. A photograph's split follows from its bytes: copies never come into two splits."""
    licence: str = ""
    """Licence of all photographs that attribution.csv does not name."""
    author: str = ""
    """Author of all photographs that attribution.csv does not name."""

    def open(self, tables: dict[str, list[str]] | None = None) -> FolderSource:
        """The source that these settings describe; it has no ``tables``."""
        return FolderSource(self)


class FolderSource:
    """Photographs and masks of `FolderSettings`. Implements `dataset_tools.sources.Source`."""

    name = "folder"
    applies_exif = True

    def __init__(self, settings: FolderSettings) -> None:
        self.settings = settings

    @property
    def places(self) -> tuple[str, ...]:
        """The folders of photographs, masks and backgrounds."""
        settings = self.settings
        return tuple(place for place in (settings.photos, settings.masks, settings.backgrounds) if place)

    def check(self) -> None:
        """See `dataset_tools.sources.Source.check`."""
        self.fingerprint()

    def tables(self) -> dict[str, list[str]]:
        """None: files are listed by `curate`."""
        return {}

    def fingerprint(self) -> str:
        """Digest of the settings and of names, sizes and times (or ETags) of all files, without reading them."""
        places = [self.settings.photos, self.settings.masks, self.settings.backgrounds]
        files = [Place(place).tokens() for place in places if place is not None]
        return digest_of({"settings": self.settings.model_dump(mode="json"), "files": files})

    def curate(self) -> Curation:
        """All photographs of which everybody has a usable mask, in the order of their names, then the backgrounds.

        Without masks: all photographs.

        Raises:
            UserError: a folder is missing or holds no photograph; the COCO json or attribution.csv is unusable.
        """
        photos = Place(self.settings.photos)
        rejected: list[Rejection] = []
        names = _photographs(photos, rejected)
        finder = None
        if self.settings.masks is not None:
            masks = Place(self.settings.masks)
            if masks.path == photos.path:
                raise UserError(f"masks: {self.settings.masks} is the folder of the photographs; masks need their own")
            finder = open_masks(masks, names, rejected)
        chosen = _Chosen(self.settings, rejected)
        places: list[tuple[Role, Place, PhotoMasks | None]] = [("people", photos, finder)]
        if self.settings.backgrounds is not None:
            places.append(("background", Place(self.settings.backgrounds), None))
        with ThreadPoolExecutor(_READERS) as pool:
            for role, place, masks_of_place in places:
                if role == "background":
                    names = _photographs(place, rejected)
                credit = _credits(place, names, rejected)
                read_one = partial(_read, place, masks=masks_of_place)
                for read in pool.map(read_one, names):
                    chosen.add(read, role, place, credit.get(read.name, {}))
        return Curation(chosen.records, rejected)

    def state(self, record: ImageRecord) -> list[str]:
        """Nothing: a record's id follows from the photograph's bytes, and it holds a digest of each mask."""
        return []

    def read_image(self, record: ImageRecord) -> bytes:
        """The file's bytes. Raises `Rejected` with ``not-found`` or, transient, ``read-failed``."""
        place = Place(self.settings.photos if record.role == "people" else self.settings.backgrounds or "")
        return place.read(record.image.removeprefix(place.prefix))

    def read_mask(self, record: ImageRecord, index: int) -> np.ndarray:
        """Mask of one person, (h, w) bool in the orientation of the photograph's stored pixels.

        Raises:
            Rejected: as `read_image` and `dataset_tools.mask_files.decode_mask_file`.
        """
        found = _Reference.parse(record.instances[index].mask)
        if found.kind == "rle":
            height, width, counts = found.where.split(":", 2)
            mask = decode_rle({"size": [int(height), int(width)], "counts": counts})
        else:
            file = decode_mask_file(Place(self.settings.masks or "").read(found.where), MAX_PIXELS)
            try:
                mask = file.person(found.value)
            except Rejected as error:
                raise Rejected(error.reason, f"mask {found.where}: {error.message}") from None
        return undo_orientation(orient(mask, found.turn), found.orientation)


@dataclass(frozen=True)
class _Reference:
    """Where a mask lies, as the text that `InstanceRecord.mask` holds."""

    kind: Literal["png", "rle"]
    turn: int
    """EXIF orientation code that turns the mask upright."""
    orientation: int
    """EXIF orientation of the photograph."""
    value: int | None
    """The person's value in a file of several people; None where the whole file is one person."""
    where: str
    """png: the file's name below the folder of masks. rle: ``HEIGHT:WIDTH:COUNTS``."""

    def text(self) -> str:
        value = "" if self.value is None else self.value
        return f"{self.kind}:{self.turn}:{self.orientation}:{value}:{self.where}"

    @classmethod
    def parse(cls, text: str) -> _Reference:
        kind, turn, orientation, value, where = text.split(":", 4)
        known = int(value) if value else None
        return cls("rle" if kind == "rle" else "png", int(turn), int(orientation), known, where)


@dataclass
class _Read:
    """What was found out about one photograph."""

    name: str
    sha256: str = ""
    stratum: str = ""
    instances: list[InstanceRecord] = field(default_factory=list)
    unusable: list[tuple[str, Rejected]] = field(default_factory=list)
    """Id of the person and reason."""
    told: bool = False
    """Whether the reasons are among the rejections already: those of rows of a json are."""
    notes: list[tuple[str, str]] = field(default_factory=list)
    """Id of the person and how the mask was read."""
    failure: Rejected | None = None


class _Chosen:
    """Turns photographs that were read into records, and sets aside those that cannot be used."""

    def __init__(self, settings: FolderSettings, rejected: list[Rejection]) -> None:
        self.settings, self.rejected = settings, rejected
        self.records: list[ImageRecord] = []
        self.first: dict[str, str] = {}
        """sha256 of a file to the name of the first that had these bytes."""
        self.ids: set[str] = set()

    def add(self, read: _Read, role: Role, place: Place, credit: dict[str, str]) -> None:
        split = split_of(read.sha256, self.settings.splits) if read.sha256 else ""
        identity = self._id(read)
        for person, why in read.unusable:
            if not read.told:
                self._reject(split, identity, person, "mask", why)
        for person, note in read.notes:
            self.rejected.append(Rejection(split, identity, person, "mask", "mended", "several-values", note))
        error = read.failure
        if error is None and read.sha256 in self.first:
            error = Rejected("duplicate-image", f"{read.name} has the same bytes as {self.first[read.sha256]}")
        if error is None and role == "people" and self.settings.masks is not None and not read.instances:
            error = Rejected("no-mask", f"there is no usable mask for {read.name}")
        if error is None and read.unusable:
            whom = ", ".join(person for person, _ in read.unusable)
            crowd = all(why.reason == "crowd" for _, why in read.unusable)
            what = "a crowd stands in it" if crowd else "people in it have no usable mask"
            error = Rejected("crowd" if crowd else "person-without-mask", f"{what}: {whom}")
        if error is not None:
            self._reject(split, identity, "", "curate", error)
            return
        self.first[read.sha256] = read.name
        self.ids.add(identity)
        self.records.append(
            ImageRecord(
                id=identity,
                source=FolderSource.name,
                split=split_of(read.sha256, self.settings.splits),
                role=role,
                stratum=read.stratum,
                image=f"{place.prefix}{read.name}",
                licence=credit.get("licence") or self.settings.licence,
                author=credit.get("author") or self.settings.author,
                title=credit.get("title") or PurePosixPath(read.name).stem,
                url=credit.get("url", ""),
                instances=tuple(read.instances),
            )
        )

    def _id(self, read: _Read) -> str:
        if not read.sha256:
            return read.name
        candidates = (f"{_slug(read.name)}-{read.sha256[:digits]}" for digits in (8, 64))
        return next(candidate for candidate in candidates if candidate not in self.ids or read.sha256 in self.first)

    def _reject(self, split: str, image: str, person: str, stage: str, error: Rejected) -> None:
        outcome: Literal["person-rejected", "image-rejected"] = "person-rejected" if person else "image-rejected"
        row = Rejection(split, image, person, stage, outcome, error.reason, error.message, error.transient)
        self.rejected.append(row)


def _photographs(place: Place, rejected: list[Rejection]) -> list[str]:
    """Names of the photographs that can be used; every other file below the folder is set aside with its reason."""
    names = []
    for name in place.files:
        if not name.lower().endswith(PHOTO_SUFFIXES):
            if name == ATTRIBUTION_FILE:
                continue
            reason, what = "unknown-suffix", f"is not one of {', '.join(PHOTO_SUFFIXES)}"
        elif not is_unicode(name):
            reason, what = "name-not-unicode", "has a name that is not UTF-8: rename it"
        else:
            names.append(name)
            continue
        shown = printable(name)
        rejected.append(Rejection("", shown, "", "curate", "row-rejected", reason, f"{shown} {what}"))
    if not names:
        place.photographs()  # says so where there is none at all
    return names


def _credits(place: Place, photographs: list[str], rejected: list[Rejection]) -> dict[str, dict[str, str]]:
    """Rows of attribution.csv by file; rows of files that are not there go to ``rejected``.

    Raises:
        UserError: it cannot be read, or is no CSV file with these columns, each once, or a row has more cells, or two
            are of one file, or one differs from a photograph's name by case alone: rather than that a photograph gets
            the licence of another.
    """
    if ATTRIBUTION_FILE not in place.files:
        return {}
    where = f"{place.prefix}{ATTRIBUTION_FILE}"
    try:
        text = io.StringIO(place.read(ATTRIBUTION_FILE).decode("utf-8-sig"), newline="")
        table = csv_rows(text)
        _, columns = next(table, (1, []))
        rows = list(table)
    except Rejected as error:
        raise UserError(f"{where} cannot be read: {error.message}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where} is not a CSV file in UTF-8: {error}") from None
    if twice := [column for column, count in Counter(columns).items() if count > 1]:
        raise UserError(f"{where} has two columns {twice[0]!r}: leave one of them out")
    unknown = [column for column in columns if column not in ATTRIBUTION_COLUMNS]
    if unknown or "file" not in columns:
        problem = f"has an unknown column {unknown[0]!r}" if unknown else "has no column 'file'"
        raise UserError(f"{where} {problem}; the columns are {', '.join(ATTRIBUTION_COLUMNS)}")
    names = {plain_name(name): name for name in photographs}
    in_one_case = {name.casefold(): name for name in names}
    credit = {}
    for line, cells in rows:
        if len(cells) > len(columns):
            raise UserError(
                f"line {line} of {where} has more cells than there are columns: one with a comma needs quotes"
            )
        row = dict(zip_longest(columns, cells, fillvalue=""))
        spelt = (*spellings(row["file"]), *spellings(cell_to_text(row["file"]).strip()))
        name = next((names[each] for each in spelt if each in names), None)
        if name is None and (near := next((n for each in spelt if (n := in_one_case.get(each.casefold()))), None)):
            raise UserError(
                f"line {line} of {where} is of {row['file']!r}, and the photograph is {near!r}: mend the case"
            )
        if name is None:
            message = f"line {line} of {ATTRIBUTION_FILE}: there is no photograph {row['file']!r}"
            rejected.append(Rejection("", row["file"], "", "curate", "row-rejected", "missing-image", message))
        elif name in credit:
            raise UserError(f"line {line} of {where} is the second of {row['file']}: leave one of them out")
        else:
            credit[name] = {column: cell_to_text(row[column]).strip() for column in columns}
    return credit


def _read(place: Place, name: str, masks: PhotoMasks | None) -> _Read:
    """Read one photograph, and its masks where there are to be some."""
    try:
        data = place.read(name)
    except Rejected as error:
        return _Read(name, failure=error)
    read = _Read(name, hashlib.sha256(data).hexdigest())
    if masks is None:
        return read
    try:
        stored_size, orientation = read_orientation(data, MAX_PIXELS)
    except Rejected:
        stored_size, orientation = (1, 1), 1  # the stage that decodes it will say what is wrong
    try:
        people = list(masks.of(name))
    except Rejected as error:
        read.failure = error
        return read
    upright = []
    for found in people:
        if found.doubtful:  # told once, not of every photograph
            continue
        mask = found.mask
        if isinstance(mask, np.ndarray) and not mask.any():
            mask = Rejected("empty-mask", "no pixel belongs to the person")
        if isinstance(mask, Rejected):
            read.unusable.append((found.id, mask))
            read.told = found.kind == "rle"
            continue
        if found.note and found.number is None:
            read.notes.append((found.id, f"mask {found.where}: {found.note}"))
        turn = upright_turn(mask.shape, found.orientation, stored_size, orientation)
        stored = undo_orientation(orient(mask, turn), orientation)
        top, bottom, left, right = bounds(stored)
        height, width = stored.shape
        box = (left / width, top / height, right / width, bottom / height)
        reference = _Reference(found.kind, turn, orientation, found.number, found.where).text()
        pixels = hashlib.sha256(np.packbits(stored).tobytes()).hexdigest()
        read.instances.append(InstanceRecord(found.id, found.category, box, reference, digest=pixels))
        upright.append(orient(stored, orientation).astype(np.uint8))
    if upright:
        size = upright[0].shape[::-1]
        same = [cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT).view(bool) for mask in upright]
        read.stratum = stratum(same)
    return read


def _slug(name: str) -> str:
    letters = unicodedata.normalize("NFKD", PurePosixPath(name).stem).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", letters).strip("-")[:60] or "photo"
