"""Masks of the people in given photographs, in every way in which their owners store them.

Masks of a photograph ``NAME.jpg`` are either

- one PNG a person: ``NAME_0.png``, ``NAME_1.png``, ... or all PNGs in a folder ``NAME``,
- an index PNG ``NAME.png``: 0 is background, every other palette index or grey value one person (255 is void, as
  in Pascal VOC, where there are other values),
- or in one COCO json for all photographs: polygons or RLE, of category person where categories exist.

For a single photograph the mask files may also be named one by one (`NamedMasks`). A mask may be stored like the
photograph's pixels or upright as EXIF shows them; where both are possible, it is taken to be upright.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np
from pycocotools import mask as coco_mask

from dataset_tools.errors import Rejected, UserError
from dataset_tools.images import MOST_PIXELS, decode_index_mask, decode_mask
from dataset_tools.records import PEOPLE, Rejection
from dataset_tools.schema import decode_rle
from dataset_tools.storage import open_root

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
MOST_PEOPLE = 100
"""An index PNG with more values than this is a picture or a soft mask, not an index."""
MAX_PIXELS = MOST_PIXELS
"""Larger photographs and masks are refused."""


class Place:
    """A folder, or one json file, on an fsspec filesystem."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.prefix = root.rstrip("/") + "/"
        self.filesystem, path = open_root(root)
        self.path = path.rstrip("/")

    @cached_property
    def is_file(self) -> bool:
        """Whether this is a json file."""
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
        """Names of the pictures below the folder, sorted. Raises `UserError` where there is none."""
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
        """A file's bytes. Raises `Rejected` with ``not-found`` or, transient, ``read-failed``."""
        path = f"{self.path}/{name}" if name else self.path
        try:
            data: bytes = self.filesystem.cat_file(path)
        except FileNotFoundError:
            raise Rejected("not-found", f"{self.prefix}{name} does not exist") from None
        except OSError as error:
            raise Rejected("read-failed", f"{self.prefix}{name} cannot be read: {error}", transient=True) from None
        return data


@dataclass(frozen=True)
class FoundMask:
    """One person's mask as stored, or why it cannot be used."""

    id: str
    """Of the person within the photograph, as the masks' owner calls it."""
    category: str
    kind: Literal["png", "rle"]
    number: int
    """Value in an index PNG; 0 for files of one person."""
    where: str
    """png: the file's name below the folder of masks. rle: ``HEIGHT:WIDTH:COUNTS``."""
    mask: np.ndarray | Rejected
    """(h, w) bool."""


class PhotoMasks(Protocol):
    """Masks of some photographs."""

    def of(self, photograph: str) -> Iterator[FoundMask]:
        """The people of one photograph in a fixed order; none where it has no masks.

        Args:
            photograph: its name below the folder of photographs.
        """
        ...


def open_masks(masks: Place, photographs: Iterable[str], rejected: list[Rejection]) -> PhotoMasks:
    """The masks that lie in a folder or in one COCO json.

    Args:
        masks: the folder or the json.
        photographs: names below the folder of photographs.
        rejected: rows of the json that cannot be used are added here.

    Raises:
        UserError: there is no such folder or file, or the json is not in COCO's format or has no people in it.
    """
    if masks.is_file:
        return CocoMasks(masks, {plain_name(name): name for name in photographs}, rejected)
    return MaskFiles(masks, photographs)


class MaskFiles:
    """Mask PNGs by the names of their photographs."""

    def __init__(self, place: Place, photographs: Iterable[str]) -> None:
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

    def of(self, photograph: str) -> Iterator[FoundMask]:
        stem = _stem(photograph)
        people = sorted(self.people.get(stem, []), key=lambda found: (len(found[0]), found))
        for id_, name in people:
            yield FoundMask(id_, "Person", "png", 0, name, self._decoded(name))
        if people or stem not in self.index:
            return
        name = self.index[stem]
        try:
            ids = decode_index_mask(self.place.read(name), MAX_PIXELS)
        except Rejected as unreadable:
            yield FoundMask("index", "Person", "png", 0, name, unreadable)
            return
        yield from _people_of_index(name, ids)

    def _decoded(self, name: str) -> np.ndarray | Rejected:
        try:
            return decode_mask(self.place.read(name), MAX_PIXELS)
        except Rejected as error:
            return error


class NamedMasks:
    """Mask files named one by one, all for the same photograph: one file a person, or a single index file.

    A single file is an index file if it is grey or of palette colours, unless most of what is not black in it is
    white: then it is one person with soft edges.

    Raises:
        UserError: one of the files does not exist.
    """

    def __init__(self, files: Sequence[str]) -> None:
        for file in files:
            if not Path(file).exists():
                raise UserError(f"mask {file} does not exist")
        self.files = files

    def of(self, photograph: str) -> Iterator[FoundMask]:
        """The people in the files, whatever the photograph is called."""
        for number, file in enumerate(self.files, start=1):
            mask: np.ndarray | Rejected
            try:
                data = Path(file).read_bytes()
                ids = _index(data) if len(self.files) == 1 else None
                if ids is not None:
                    yield from _people_of_index(file, ids)
                    return
                mask = decode_mask(data, MAX_PIXELS)
            except OSError as error:
                mask = Rejected("read-failed", f"it cannot be read: {error.strerror}")
            except Rejected as error:
                mask = error
            yield FoundMask(str(number), "Person", "png", 0, file, mask)


def _index(data: bytes) -> np.ndarray | None:
    """(h, w) int32 ids of an index file, None where the file is a mask of one person."""
    try:
        ids = decode_index_mask(data, MAX_PIXELS)
    except Rejected:
        return None  # a colour file, or a broken one, of which `decode_mask` says what is wrong
    values, counts = np.unique(ids[ids != 0], return_counts=True)
    if len(values) == 0 or (len(values) > 1 and values[counts.argmax()] in (255, 65535)):
        return None
    return ids


def _people_of_index(name: str, ids: np.ndarray) -> Iterator[FoundMask]:
    values = [int(value) for value in np.unique(ids) if value != 0]
    if len(values) > 1:
        values = [value for value in values if value != 255]
    if len(values) > MOST_PEOPLE:
        error = Rejected("not-an-index-mask", f"{name} has {len(values)} values: a picture, or a mask with soft edges")
        yield FoundMask("index", "Person", "png", 0, name, error)
        return
    for value in values:
        yield FoundMask(str(value), "Person", "png", value, name, ids == value)


class CocoMasks:
    """Masks of one COCO json."""

    def __init__(self, place: Place, photographs: dict[str, str], rejected: list[Rejection]) -> None:
        try:
            document = json.loads(place.read(""))
            images, annotations = list(document["images"]), list(document["annotations"])
            categories = {entry["id"]: str(entry["name"]) for entry in document.get("categories", [])}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{place.root} is not a COCO json with images and annotations: {error!r}") from None
        people = {number for number, name in categories.items() if name.capitalize() in PEOPLE}
        if categories and not people:
            raise UserError(f"{place.root} has no category 'person'; it has {', '.join(sorted(categories.values()))}")

        def reject(image: object, instance: object, reason: str, message: str) -> None:
            rejected.append(Rejection("", str(image), str(instance), "curate", "row-rejected", reason, message))

        sizes: dict[Any, tuple[str | None, int, int]] = {}
        for row, image in enumerate(images):
            try:
                name = photographs.get(plain_name(image["file_name"]))
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

    def of(self, photograph: str) -> Iterator[FoundMask]:
        for id_, category, rle in self.people.get(photograph, []):
            height, width = rle["size"]
            yield FoundMask(id_, category, "rle", 0, f"{height}:{width}:{rle['counts']}", decode_rle(rle))


def is_upright(mask: np.ndarray, stored_size: tuple[int, int], orientation: int) -> bool:
    """Whether a mask (h, w) has the shape of the upright picture rather than of the stored one; True where both fit.

    Args:
        mask: of any size.
        stored_size: width and height of the photograph as stored.
        orientation: EXIF orientation (1 to 8) of the photograph.
    """
    if orientation < 5:
        return True
    aspect = log(mask.shape[1] / mask.shape[0])
    stored = log(stored_size[0] / stored_size[1])
    return abs(aspect + stored) <= abs(aspect - stored)


def _rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """COCO compressed RLE of a segmentation; ValueError where it is malformed."""
    if not 0 < height * width <= MAX_PIXELS:
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


def plain_name(name: str) -> str:
    """A file name in one Unicode form: file systems differ in theirs."""
    return unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    return plain_name(str(PurePosixPath(name).with_suffix("")))
