"""Source ``folder``: own photographs with masks of the people in them, on any fsspec root.

Masks of a photograph ``NAME.jpg`` are either

- one PNG a person: ``NAME_0.png``, ``NAME_1.png``, ... or all PNGs in a folder ``NAME``,
- an index PNG ``NAME.png``: 0 is background, every other palette index or grey value one person (255 is void, as
  in Pascal VOC, where there are other values),
- or in one COCO json for all photographs: polygons or RLE, of category person where categories exist.

A mask may be stored like the photograph's pixels or upright as EXIF shows them; where both are possible, it is
taken to be upright. An optional ``attribution.csv`` beside the photographs (columns ``file``, ``licence``,
``author``, ``title``, ``url``) says whose they are.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import isclose, log
from pathlib import PurePosixPath
from typing import Any, Literal

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from pydantic import Field, field_validator

from dataset_tools.errors import Rejected, UserError
from dataset_tools.images import (
    DecodeSettings,
    decode_index_mask,
    decode_mask,
    orient,
    read_orientation,
    undo_orientation,
)
from dataset_tools.masks import bounds, stratum
from dataset_tools.records import SPLITS, ImageRecord, InstanceRecord, Rejection, Role, Split
from dataset_tools.schema import decode_rle
from dataset_tools.settings import Settings, digest_of
from dataset_tools.sources import Curation
from dataset_tools.storage import open_root

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
ATTRIBUTION_FILE = "attribution.csv"
ATTRIBUTION_COLUMNS = ("file", "licence", "author", "title", "url")
PEOPLE = ("person", "man", "woman", "boy", "girl")
"""COCO categories, in lower case, that are people."""
MOST_PEOPLE = 100
"""An index PNG with more values than this is a picture or a soft mask, not an index."""
_MAX_PIXELS = DecodeSettings().max_pixels
_READERS = 8


class FolderSettings(Settings):
    """Own photographs and masks."""

    kind: Literal["folder"] = "folder"
    photos: str
    """Folder of photographs, searched with its subfolders: a path or fsspec URL."""
    masks: str
    """Folder of mask PNGs with the photographs' names and subfolders, or the path of one COCO json."""
    backgrounds: str | None = None
    """Folder of photographs without any person, for composites."""
    splits: dict[Split, float] = Field({"train": 0.8, "validation": 0.1, "test": 0.1})
    """Share of each split. A photograph's split follows from its bytes: copies never come into two splits."""
    licence: str = ""
    """Licence of all photographs that attribution.csv does not name."""
    author: str = ""
    """Author of all photographs that attribution.csv does not name."""

    @field_validator("splits")
    @classmethod
    def _whole(cls, splits: dict[Split, float]) -> dict[Split, float]:
        if any(share < 0 for share in splits.values()) or not isclose(sum(splits.values()), 1, abs_tol=1e-6):
            raise ValueError("shares must be 0 or more and sum to 1")
        return {split: splits.get(split, 0.0) for split in SPLITS}

    def open(self) -> FolderSource:
        """The source that these settings describe."""
        return FolderSource(self)


class FolderSource:
    """Photographs and masks of `FolderSettings`. Implements `dataset_tools.sources.Source`."""

    name = "folder"
    applies_exif = True

    def __init__(self, settings: FolderSettings) -> None:
        self.settings = settings

    def fingerprint(self) -> str:
        """Digest of the settings and of names, sizes and times (or ETags) of all files, without reading them."""
        places = [self.settings.photos, self.settings.masks, self.settings.backgrounds]
        files = [_Place(place).tokens() for place in places if place is not None]
        return digest_of({"settings": self.settings.model_dump(mode="json"), "files": files})

    def curate(self) -> Curation:
        """All photographs with masks, in the order of their names, then the backgrounds.

        Raises:
            UserError: a folder is missing or holds no photograph; the COCO json or attribution.csv is unusable.
        """
        photos, masks = _Place(self.settings.photos), _Place(self.settings.masks)
        rejected: list[Rejection] = []
        names = photos.photographs()
        finder: _MaskFiles | _CocoMasks
        if masks.is_file:
            finder = _CocoMasks(masks, {_plain(name): name for name in names}, rejected)
        elif masks.path == photos.path:
            raise UserError(f"masks: {self.settings.masks} is the folder of the photographs; masks need their own")
        else:
            finder = _MaskFiles(masks, names)
        chosen = _Chosen(self.settings, rejected)
        places: list[tuple[Role, _Place, _MaskFiles | _CocoMasks | None]] = [("people", photos, finder)]
        if self.settings.backgrounds is not None:
            places.append(("background", _Place(self.settings.backgrounds), None))
        with ThreadPoolExecutor(_READERS) as pool:
            for role, place, masks_of_place in places:
                credit = _credits(place, rejected)
                read_one = partial(_read, place, masks=masks_of_place)
                for read in pool.map(read_one, place.photographs()):
                    chosen.add(read, role, place, credit.get(read.name, {}))
        return Curation(chosen.records, rejected)

    def read_image(self, record: ImageRecord) -> bytes:
        """The file's bytes. Raises `Rejected` with ``not-found`` or, transient, ``read-failed``."""
        place = _Place(self.settings.photos if record.role == "people" else self.settings.backgrounds or "")
        return place.read(record.image.removeprefix(place.prefix))

    def read_mask(self, record: ImageRecord, index: int) -> np.ndarray:
        """Mask of one person, (h, w) bool in the orientation of the photograph's stored pixels.

        Raises:
            Rejected: as `read_image` and `dataset_tools.images.decode_mask`.
        """
        found = _Reference.parse(record.instances[index].mask)
        if found.kind == "rle":
            height, width, counts = found.where.split(":", 2)
            mask = decode_rle({"size": [int(height), int(width)], "counts": counts})
        else:
            data = _Place(self.settings.masks).read(found.where)
            mask = decode_mask(data, _MAX_PIXELS) if found.id == 0 else decode_index_mask(data, _MAX_PIXELS) == found.id
        return undo_orientation(mask, found.turned)


class _Place:
    """A folder, or one file, on an fsspec filesystem."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.prefix = root.rstrip("/") + "/"
        self.filesystem, path = open_root(root)
        self.path = path.rstrip("/")

    @cached_property
    def is_file(self) -> bool:
        return self.path.lower().endswith(".json") and self.filesystem.isfile(self.path)

    @cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        """Names below the folder, sorted, with what the filesystem knows of each; hidden files are left out."""
        if self.is_file:
            return {"": self.filesystem.info(self.path)}
        if not self.filesystem.isdir(self.path):
            kind = "file" if self.path.lower().endswith(".json") else "folder"
            raise UserError(f"{kind} {self.root} does not exist")
        found = self.filesystem.find(self.path, detail=True)
        names = {path[len(self.path) + 1 :]: info for path, info in found.items()}
        return {name: names[name] for name in sorted(names) if not any(p.startswith(".") for p in name.split("/"))}

    def photographs(self) -> list[str]:
        names = [name for name in self.files if name.lower().endswith(PHOTO_SUFFIXES)]
        if not names:
            raise UserError(f"folder {self.root} holds no photographs ({', '.join(PHOTO_SUFFIXES)})")
        return names

    def tokens(self) -> list[list[str]]:
        """Name, size and version of every file."""
        versions = ("ETag", "etag", "mtime", "LastModified", "updated", "created")
        return [
            [name, str(info.get("size")), str(next((info[key] for key in versions if info.get(key)), ""))]
            for name, info in self.files.items()
        ]

    def read(self, name: str) -> bytes:
        path = f"{self.path}/{name}" if name else self.path
        try:
            data: bytes = self.filesystem.cat_file(path)
        except FileNotFoundError:
            raise Rejected("not-found", f"{self.prefix}{name} does not exist") from None
        except OSError as error:
            raise Rejected("read-failed", f"{self.prefix}{name} cannot be read: {error}", transient=True) from None
        return data


@dataclass(frozen=True)
class _Reference:
    """Where a mask lies, as the text that `InstanceRecord.mask` holds."""

    kind: Literal["png", "rle"]
    turned: int
    """EXIF orientation that the mask, unlike the photograph's stored pixels, already has."""
    id: int
    """Value in an index PNG; 0 for files of one person."""
    where: str
    """png: the file's name below the folder of masks. rle: ``HEIGHT:WIDTH:COUNTS``."""

    def text(self) -> str:
        return f"{self.kind}:{self.turned}:{self.id}:{self.where}"

    @classmethod
    def parse(cls, text: str) -> _Reference:
        kind, turned, number, where = text.split(":", 3)
        return cls("rle" if kind == "rle" else "png", int(turned), int(number), where)


@dataclass(frozen=True)
class _FoundMask:
    """One person's mask as stored, or why it cannot be used."""

    id: str
    category: str
    kind: Literal["png", "rle"]
    number: int
    where: str
    mask: np.ndarray | Rejected


@dataclass
class _Read:
    """What was found out about one photograph."""

    name: str
    sha256: str = ""
    stratum: str = ""
    instances: list[InstanceRecord] = field(default_factory=list)
    unusable: list[tuple[str, Rejected]] = field(default_factory=list)
    """Id of the person and reason."""
    failure: Rejected | None = None


class _MaskFiles:
    """Mask PNGs by the names of their photographs."""

    def __init__(self, place: _Place, photographs: Iterable[str]) -> None:
        self.place = place
        stems = {_stem(name) for name in photographs}
        self.people: dict[str, list[tuple[str, str]]] = {}
        self.index: dict[str, str] = {}
        for name in place.files:
            if not name.lower().endswith(".png"):
                continue
            stem = _stem(name)
            numbered = re.fullmatch(r"(.+)_(\d+)", stem)
            folder, _, file = stem.rpartition("/")
            if stem in stems:
                self.index[stem] = name
            elif numbered and numbered[1] in stems:
                self.people.setdefault(numbered[1], []).append((numbered[2], name))
            elif folder in stems:
                self.people.setdefault(folder, []).append((file, name))

    def of(self, photograph: str) -> Iterator[_FoundMask]:
        stem = _stem(photograph)
        people = sorted(self.people.get(stem, []), key=lambda found: (len(found[0]), found))
        for id_, name in people:
            yield _FoundMask(id_, "Person", "png", 0, name, self._decoded(name))
        if people or stem not in self.index:
            return
        name = self.index[stem]
        try:
            ids = decode_index_mask(self.place.read(name), _MAX_PIXELS)
        except Rejected as unreadable:
            yield _FoundMask("index", "Person", "png", 0, name, unreadable)
            return
        values = [int(value) for value in np.unique(ids) if value != 0]
        if len(values) > 1:
            values = [value for value in values if value != 255]
        if len(values) > MOST_PEOPLE:
            error = Rejected(
                "not-an-index-mask", f"{name} has {len(values)} values: a picture, or a mask with soft edges"
            )
            yield _FoundMask("index", "Person", "png", 0, name, error)
            return
        for value in values:
            yield _FoundMask(str(value), "Person", "png", value, name, ids == value)

    def _decoded(self, name: str) -> np.ndarray | Rejected:
        try:
            return decode_mask(self.place.read(name), _MAX_PIXELS)
        except Rejected as error:
            return error


class _CocoMasks:
    """Masks of one COCO json."""

    def __init__(self, place: _Place, photographs: dict[str, str], rejected: list[Rejection]) -> None:
        try:
            document = json.loads(place.read(""))
            images, annotations = list(document["images"]), list(document["annotations"])
            categories = {entry["id"]: str(entry["name"]) for entry in document.get("categories", [])}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{place.root} is not a COCO json with images and annotations: {error!r}") from None
        people = {number for number, name in categories.items() if name.lower() in PEOPLE}
        if categories and not people:
            raise UserError(f"{place.root} has no category 'person'; it has {', '.join(sorted(categories.values()))}")

        def reject(image: object, instance: object, reason: str, message: str) -> None:
            rejected.append(Rejection("", str(image), str(instance), "curate", "row-rejected", reason, message))

        sizes: dict[Any, tuple[str | None, int, int]] = {}
        for row, image in enumerate(images):
            try:
                name = photographs.get(_plain(image["file_name"]))
                sizes[image["id"]] = name, int(image["height"]), int(image["width"])
                if name is None:
                    reject(image["file_name"], "", "missing-image", f"images[{row}]: there is no such photograph")
            except (KeyError, TypeError, ValueError) as error:
                reject("", "", "malformed-row", f"images[{row}]: {error!r}")
        self.people: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
        for row, annotation in enumerate(annotations):
            try:
                if categories and annotation["category_id"] not in people:
                    continue
                name, height, width = sizes[annotation["image_id"]]
                if name is None:
                    continue
                if annotation.get("iscrowd"):
                    reject(name, annotation["id"], "crowd", f"annotations[{row}]: a crowd, not one person")
                    continue
                category = categories.get(annotation.get("category_id"), "Person").capitalize()
                rle = _rle(annotation["segmentation"], height, width)
                self.people.setdefault(name, []).append((str(annotation["id"]), category, rle))
            except (KeyError, TypeError, ValueError) as error:
                reject("", "", "malformed-row", f"annotations[{row}]: {error!r}")

    def of(self, photograph: str) -> Iterator[_FoundMask]:
        for id_, category, rle in self.people.get(photograph, []):
            height, width = rle["size"]
            yield _FoundMask(id_, category, "rle", 0, f"{height}:{width}:{rle['counts']}", decode_rle(rle))


class _Chosen:
    """Turns photographs that were read into records, and sets aside those that cannot be used."""

    def __init__(self, settings: FolderSettings, rejected: list[Rejection]) -> None:
        self.settings, self.rejected = settings, rejected
        self.records: list[ImageRecord] = []
        self.first: dict[str, str] = {}
        """sha256 of a file to the name of the first that had these bytes."""
        self.ids: set[str] = set()

    def add(self, read: _Read, role: Role, place: _Place, credit: dict[str, str]) -> None:
        split = _split_of(read.sha256, self.settings.splits) if read.sha256 else ""
        identity = self._id(read)
        for person, why in read.unusable:
            self._reject(split, identity, person, "mask", why)
        error = read.failure
        if error is None and read.sha256 in self.first:
            error = Rejected("duplicate-image", f"{read.name} has the same bytes as {self.first[read.sha256]}")
        if error is None and role == "people" and not read.instances:
            error = Rejected("no-mask", f"there is no usable mask for {read.name}")
        if error is not None:
            self._reject(split, identity, "", "curate", error)
            return
        self.first[read.sha256] = read.name
        self.ids.add(identity)
        self.records.append(
            ImageRecord(
                id=identity,
                source=FolderSource.name,
                split=_split_of(read.sha256, self.settings.splits),
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


def _credits(place: _Place, rejected: list[Rejection]) -> dict[str, dict[str, str]]:
    """Rows of attribution.csv by file; rows of files that are not there go to ``rejected``."""
    if ATTRIBUTION_FILE not in place.files:
        return {}
    where = f"{place.prefix}{ATTRIBUTION_FILE}"
    try:
        table = csv.DictReader(io.StringIO(place.read(ATTRIBUTION_FILE).decode("utf-8-sig"), newline=""), restval="")
        columns, rows = list(table.fieldnames or []), list(table)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where} is not a CSV file in UTF-8: {error}") from None
    unknown = [column for column in columns if column not in ATTRIBUTION_COLUMNS]
    if unknown or "file" not in columns:
        problem = f"has an unknown column {unknown[0]!r}" if unknown else "has no column 'file'"
        raise UserError(f"{where} {problem}; the columns are {', '.join(ATTRIBUTION_COLUMNS)}")
    names = {_plain(name): name for name in place.photographs()}
    credit = {}
    for number, row in enumerate(rows, start=2):
        name = names.get(_plain(row["file"]))
        if name is None:
            message = f"row {number} of {ATTRIBUTION_FILE}: there is no photograph {row['file']!r}"
            rejected.append(Rejection("", row["file"], "", "curate", "row-rejected", "missing-image", message))
        else:
            credit[name] = {column: row[column].strip() for column in columns}
    return credit


def _read(place: _Place, name: str, masks: _MaskFiles | _CocoMasks | None) -> _Read:
    """Read one photograph, and its masks where there are to be some."""
    try:
        data = place.read(name)
    except Rejected as error:
        return _Read(name, failure=error)
    read = _Read(name, hashlib.sha256(data).hexdigest())
    if masks is None:
        return read
    try:
        stored_size, orientation = read_orientation(data, _MAX_PIXELS)
    except Rejected:
        stored_size, orientation = (1, 1), 1  # the stage that decodes it will say what is wrong
    upright = []
    for found in masks.of(name):
        mask = found.mask
        if isinstance(mask, np.ndarray) and not mask.any():
            mask = Rejected("empty-mask", "no pixel belongs to the person")
        if isinstance(mask, Rejected):
            read.unusable.append((found.id, mask))
            continue
        turned = orientation if _is_upright(mask, stored_size, orientation) else 1
        stored = undo_orientation(mask, turned)
        top, bottom, left, right = bounds(stored)
        height, width = stored.shape
        box = (left / width, top / height, right / width, bottom / height)
        reference = _Reference(found.kind, turned, found.number, found.where).text()
        pixels = hashlib.sha256(np.packbits(stored).tobytes()).hexdigest()
        read.instances.append(InstanceRecord(found.id, found.category, box, reference, digest=pixels))
        upright.append(orient(stored, orientation).astype(np.uint8))
    if upright:
        size = upright[0].shape[::-1]
        same = [cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT).view(bool) for mask in upright]
        read.stratum = stratum(same)
    return read


def _is_upright(mask: np.ndarray, stored_size: tuple[int, int], orientation: int) -> bool:
    """Whether a mask has the shape of the upright picture rather than of the stored one; True where both fit."""
    if orientation < 5:
        return True
    aspect = log(mask.shape[1] / mask.shape[0])
    stored = log(stored_size[0] / stored_size[1])
    return abs(aspect + stored) <= abs(aspect - stored)


def _rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """COCO compressed RLE of a segmentation; ValueError where it is malformed."""
    if not 0 < height * width <= _MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels")
    if isinstance(segmentation, dict):
        rle = segmentation
        if list(rle["size"]) != [height, width]:
            raise ValueError(f"RLE of size {rle['size']} in an image of {[height, width]}")
        if isinstance(rle["counts"], list):
            if min(rle["counts"], default=0) < 0 or sum(rle["counts"]) != height * width:
                raise ValueError("RLE counts do not add up to the image's size")
            rle = coco_mask.frPyObjects(rle, height, width)
    else:
        polygons = [np.asarray(polygon, np.float64) for polygon in segmentation]
        if not polygons or any(p.ndim != 1 or p.size < 6 or p.size % 2 for p in polygons):
            raise ValueError("a polygon needs three points at least, as x, y, x, y, ...")
        reach = 2 * max(height, width)
        if any(not (np.abs(polygon) <= reach).all() for polygon in polygons):
            raise ValueError("a polygon lies outside of its image")
        rle = coco_mask.merge(coco_mask.frPyObjects([p.tolist() for p in polygons], height, width))
    counts = rle["counts"]
    result = {"size": [height, width], "counts": counts.decode("ascii") if isinstance(counts, bytes) else str(counts)}
    decode_rle(result)
    return result


def _plain(name: str) -> str:
    """A file name in one Unicode form: file systems differ in theirs."""
    return unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    return _plain(str(PurePosixPath(name).with_suffix("")))


def _slug(name: str) -> str:
    letters = unicodedata.normalize("NFKD", PurePosixPath(name).stem).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", letters).strip("-")[:60] or "photo"


def _split_of(sha256: str, shares: dict[Split, float]) -> Split:
    place, upper = int(sha256[8:24], 16) / 16**16, 0.0
    for split in SPLITS:
        upper += shares[split]
        if place < upper:
            return split
    return next(split for split in reversed(SPLITS) if shares[split] > 0)
