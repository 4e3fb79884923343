"""Masks of the people in given photographs, in every way in which their owners store them.

Masks of a photograph ``NAME.jpg`` are either

- files of the same name: ``NAME.png`` or ``NAME-mask.png`` with everybody in it, or ``NAME_0.png``, ``NAME_1.png``, ...
  or all files in a folder ``NAME`` with one person each; of any of `PHOTO_SUFFIXES`,
- or in one COCO json for all photographs: polygons or RLE, of category person where categories exist.

For a single photograph the mask files may also be named one by one (`NamedMasks`). What a file says is told by
`dataset_tools.mask_files`. A mask may be stored like the photograph's pixels or upright as EXIF shows them; where both
are possible, it is taken to be upright, unless it has an EXIF orientation of its own.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import log
from pathlib import PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np
from pycocotools import mask as coco_mask

from dataset_tools.errors import Rejected, UserError, credentials_to_mend
from dataset_tools.file_names import infos_below, is_unicode, printable
from dataset_tools.images import MOST_PIXELS
from dataset_tools.mask_files import MaskFile, decode_mask_file, people_of
from dataset_tools.records import PEOPLE, PEOPLE_ANYWHERE, Rejection
from dataset_tools.schema import check_rle, decode_rle
from dataset_tools.storage import open_root, version_of

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
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
        """Names below the folder, sorted, with what the filesystem knows of each; hidden files are left out.

        Raises:
            UserError: there is no such folder, or a folder in it cannot be read.
        """
        if self.is_file:
            return {"": self.filesystem.info(self.path)}
        if not self.filesystem.isdir(self.path):
            kind = "file" if self.path.lower().endswith(".json") else "folder"
            raise UserError(f"{kind} {self.root} does not exist")
        return infos_below(self.filesystem, self.path)

    def photographs(self) -> list[str]:
        """Names of the pictures below the folder, sorted. Raises `UserError` where there is none."""
        names = [name for name in self.files if name.lower().endswith(PHOTO_SUFFIXES)]
        if not names:
            raise UserError(f"folder {self.root} holds no photographs ({', '.join(PHOTO_SUFFIXES)})")
        return names

    def tokens(self) -> list[list[str]]:
        """Name, size and version of every file."""
        return [[name, *version_of(info)] for name, info in self.files.items()]

    def read(self, name: str) -> bytes:
        """A file's bytes.

        Raises:
            Rejected: ``not-found`` or, transient, ``read-failed``.
            UserError: the store's credentials do not hold.
        """
        path, shown = (f"{self.path}/{name}", f"{self.prefix}{name}") if name else (self.path, self.root)
        try:
            data: bytes = self.filesystem.cat_file(path)
        except FileNotFoundError:
            raise Rejected("not-found", f"{shown} does not exist") from None
        except OSError as error:
            if refusal := credentials_to_mend(error):
                raise UserError(f"{shown}: {refusal}") from None
            raise Rejected("read-failed", f"{shown} cannot be read: {error}", transient=True) from None
        return data


@dataclass(frozen=True)
class FoundMask:
    """One person's mask as stored, or why it cannot be used."""

    id: str
    """Of the person within the photograph, as the masks' owner calls it."""
    category: str
    kind: Literal["png", "rle"]
    number: int | None
    """The person's value in a file of several people; None where the whole file is one person."""
    where: str
    """png: the file's name below the folder of masks. rle: ``HEIGHT:WIDTH:COUNTS``, or the row of the json that cannot
    be used."""
    mask: np.ndarray | Rejected
    """(h, w) bool, as stored."""
    orientation: int = 1
    """EXIF orientation (1 to 8) that the mask's file names of itself."""
    note: str = ""
    """What its owner should know about how the file was read."""
    doubtful: bool = False
    """Whether this is a row of a json that may be of this photograph or of another, and so takes no number."""


class PhotoMasks(Protocol):
    """Masks of some photographs."""

    def of(self, photograph: str) -> Iterator[FoundMask]:
        """The people of one photograph in a fixed order; none where it has no masks.

        Args:
            photograph: its name below the folder of photographs.

        Raises:
            Rejected: ``ambiguous-masks``: files may be its masks or not.
        """
        ...


def open_masks(masks: Place, photographs: Iterable[str], rejected: list[Rejection]) -> PhotoMasks:
    """The masks that lie in a folder or in one COCO json.

    Args:
        masks: the folder or the json.
        photographs: names below the folder of photographs.
        rejected: rows of the json that cannot be used, and files that are nobody's masks, are added here.

    Raises:
        UserError: there is no such folder or file, or the json is not in COCO's format or has no people in it.
    """
    if masks.is_file:
        return CocoMasks(masks, photographs, rejected)
    return MaskFiles(masks, photographs, rejected)


class MaskFiles:
    """Mask files by the names of their photographs."""

    def __init__(self, place: Place, photographs: Iterable[str], rejected: list[Rejection]) -> None:
        self.place = place
        photos: dict[str, list[str]] = {}
        for name in photographs:
            photos.setdefault(_stem(name), []).append(name)
        self.claims: dict[str, dict[str, list[tuple[str, str]]]] = {}
        """Stem of a photograph -> way of naming -> (person, file)."""
        self.unclear = {
            stem: f"{' and '.join(map(printable, names))} would have the same masks: rename one of them"
            for stem, names in photos.items()
            if len(names) > 1
        }
        """Why it is not clear which masks a photograph has, by its stem."""
        claimed_twice = []
        for name in place.files:
            claims = [claim for claim in _claims(name) if claim[0] in photos]
            usable = name.lower().endswith(PHOTO_SUFFIXES)
            if not claims or not usable:
                what = "there is no photograph for it" if usable else f"not one of {', '.join(PHOTO_SUFFIXES)}"
                reason = "unknown-suffix" if claims else "missing-image"
                shown = printable(name)
                rejected.append(Rejection("", shown, "", "curate", "row-rejected", reason, f"mask {shown}: {what}"))
            elif len(claims) > 1:
                claimed_twice.append((name, claims))
            else:
                self._claim(name, *claims[0])
        for name, claims in claimed_twice:
            # Nobody stores the masks of one photograph in two ways: what else it has may tell.
            fitting = [c for c in claims if c[1] != "all" and self.claims.get(c[0], {c[1]: []}).keys() == {c[1]}]
            fitting += [c for c in claims if c[1] == "all" and c[0] not in self.claims]
            if len(fitting) == 1:
                self._claim(name, *fitting[0])
                continue
            owners = " or ".join(printable(photos[stem][0]) for stem, _, _ in claims)
            for stem, _, _ in claims:
                self.unclear.setdefault(
                    stem, f"mask {printable(name)} may belong to {owners}: give each a folder of masks, STEM/*.png"
                )

    def _claim(self, name: str, stem: str, way: str, person: str) -> None:
        self.claims.setdefault(stem, {}).setdefault(way, []).append((person, name))

    def of(self, photograph: str) -> Iterator[FoundMask]:
        stem = _stem(photograph)
        claims = self.claims.get(stem, {})
        found = sorted((claim for way in claims.values() for claim in way), key=_as_listed)
        people = [person for person, _ in found]
        if (found and stem in self.unclear) or len(claims) > 1 or len(set(people)) < len(people):
            files = ", ".join(printable(name) for _, name in found)
            raise Rejected(
                "ambiguous-masks",
                self.unclear.get(stem) or f"its masks are stored twice, as {files}: leave one of each person",
            )
        if not found and stem in self.unclear:
            raise Rejected("ambiguous-masks", self.unclear[stem])
        names = [name for _, name in found]
        return _people_in(names, people, [self._read(name) for name in names])

    def _read(self, name: str) -> MaskFile | Rejected:
        try:
            if not is_unicode(name):
                raise Rejected("name-not-unicode", "its name is not UTF-8: rename it")
            return decode_mask_file(self.place.read(name), MAX_PIXELS)
        except Rejected as error:
            return error


def _as_listed(claim: tuple[str, str]) -> tuple[list[tuple[bool, int, str]], str]:
    """Sorts persons' names as file managers do: numbers in them by their value and before letters, these as in a
    dictionary, without regard to case or accents."""
    parts = re.findall(r"\d+|\D+", claim[0])
    return [(False, int(part), "") if part.isdecimal() else (True, 0, _letters(part)) for part in parts], claim[0]


def _letters(text: str) -> str:
    """In one case, and without accents."""
    letters = unicodedata.normalize("NFKD", text)
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).casefold()


def _claims(name: str) -> Iterator[tuple[str, str, str]]:
    """Stems of the photographs that a mask file may belong to, the way of naming, and the person."""
    stem = _stem(name)
    yield stem, "all", ""
    if stem.endswith("-mask"):
        yield stem.removesuffix("-mask"), "all", ""
    if numbered := re.fullmatch(r"(.+)_(\d+)", stem):
        yield numbered[1], "numbered", numbered[2]
    folder, _, file = stem.rpartition("/")
    if folder:
        yield folder, "folder", file


class NamedMasks:
    """Mask files named one by one, all for the same photograph.

    Raises:
        UserError: one of the files does not exist.
    """

    def __init__(self, files: Sequence[str]) -> None:
        for file in files:
            place = Place(file)
            if not place.filesystem.exists(place.path):
                raise UserError(f"mask {file} does not exist")
        self.files = files

    def of(self, photograph: str) -> Iterator[FoundMask]:
        """The people in the files, whatever the photograph is called."""
        numbers = [str(number) for number in range(1, len(self.files) + 1)]
        return _people_in(self.files, numbers, [self._read(file) for file in self.files])

    def _read(self, file: str) -> MaskFile | Rejected:
        try:
            return decode_mask_file(Place(file).read(""), MAX_PIXELS)
        except Rejected as error:
            return error


def _people_in(
    names: Sequence[str], people: Sequence[str], files: Sequence[MaskFile | Rejected]
) -> Iterator[FoundMask]:
    for one in people_of(files):
        identity = printable(people[one.file]) or "1" if one.value is None else str(one.value)
        yield FoundMask(identity, "Person", "png", one.value, names[one.file], one.mask, one.orientation, one.note)


LONGEST_ID = 100
"""Digits; Python refuses to read numbers of some thousands."""
_Sizes = dict[object, tuple[str | None, int, int] | Rejected]


class CocoMasks:
    """Masks of one COCO json (https://cocodataset.org/#format-data).

    Ids may be numbers or text. People are numbered by their rows: one whose row cannot be used keeps its number, and
    one whose mask is there twice is one. A row that does not say of which image it is is one of an only image's people;
    of several images it may be any's.
    """

    def __init__(self, place: Place, photographs: Iterable[str], rejected: list[Rejection]) -> None:
        data = place.read("")
        try:
            document = json.loads(data)
            images, annotations = list(document["images"]), list(document["annotations"])
            categories = {_id(entry["id"]): str(entry["name"]) for entry in document.get("categories", [])}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{place.root} is not a COCO json with images and annotations: {error!r}") from None
        self.categories = categories
        self.persons = {number for number, name in categories.items() if _is_person(name)}
        if categories and not self.persons:
            raise UserError(f"{place.root} has no category 'person'; it has {', '.join(sorted(categories.values()))}")
        self.rejected = rejected
        self.people: dict[str, list[FoundMask]] = {}
        self.doubtful: list[FoundMask] = []
        """Rows of which nobody knows which photograph's they are."""
        sizes = self._images(images, list(photographs))
        only = next(iter(sizes.values())) if len(images) == len(sizes) == 1 else None
        for row, annotation in enumerate(annotations):
            try:
                if not isinstance(annotation, dict):
                    raise _OfAnyImage("malformed-row", f"not a mapping but a {type(annotation).__name__}")
                self._annotation(row, annotation, sizes)
            except Rejected as error:
                message = f"annotations[{row}]: {error.message}"
                name = only[0] if isinstance(error, _OfAnyImage) and isinstance(only, tuple) else None
                self._reject(name or "", error.reason, message)
                if isinstance(error, _OfAnyImage):
                    lost = Rejected(error.reason, message)
                    people = self.doubtful if name is None else self.people.setdefault(name, [])
                    people.append(FoundMask(f"row-{row}", "Person", "rle", None, f"annotations[{row}]", lost))

    def of(self, photograph: str) -> Iterator[FoundMask]:
        people = self.people.get(photograph, [])
        yield from (replace(row, doubtful=True) for row in self.doubtful if people)
        for found in people:
            if isinstance(found.mask, np.ndarray):
                height, width, counts = found.where.split(":", 2)
                found = replace(found, mask=decode_rle({"size": [int(height), int(width)], "counts": counts}))
            yield found

    def _images(
        self, images: list[Any], photographs: list[str]
    ) -> dict[object, tuple[str | None, int, int] | Rejected]:
        """Photograph (None: it is not among them), height and width by the id of the image."""
        exact = {plain_name(name): name for name in photographs}
        by_base: dict[str, list[str]] = {}
        for name in photographs:
            by_base.setdefault(PurePosixPath(plain_name(name)).name, []).append(name)
        rows: list[tuple[int, object, str, int, int]] = []
        for row, image in enumerate(images):
            try:
                rows.append((row, _id(_field(image, "id")), str(_field(image, "file_name")), *_size_of(image)))
            except Rejected as error:
                self._reject("", error.reason, f"images[{row}]: {error.message}")
        # Names that are photographs' own, and of the others the base names: those found once may be matched by them.
        names = {text: next((n for n in spellings(text) if n in exact), None) for _, _, text, _, _ in rows}
        taken = {exact[name] for name in names.values() if name is not None}
        wanted = Counter(PurePosixPath(spellings(text)[-1]).name for text, name in names.items() if name is None)
        sizes: _Sizes = {}
        for row, identity, text, height, width in rows:
            own = names[text]
            photograph = exact[own] if own is not None else None
            base = PurePosixPath(spellings(text)[-1]).name
            candidates = [] if photograph else [found for found in by_base.get(base, []) if found not in taken]
            if len(candidates) == 1 and wanted[base] == 1:
                photograph = candidates[0]
                if not _is_tail(spellings(text)[-1], plain_name(photograph)):
                    self._note(photograph, "matched-by-name", f"images[{row}]: {text} is taken to be {photograph}")
            elif candidates:
                message = f"images[{row}]: file_name {text} may be {' or '.join(candidates)}"
                if len(candidates) == 1:
                    message = f"images[{row}]: file_name {text} and others may be {candidates[0]}"
                self._reject(text, "ambiguous-image", f"{message}: write the path below the folder of photographs")
            elif photograph is None:
                self._reject(text, "missing-image", f"images[{row}]: there is no such photograph")
            if identity in sizes:
                self._reject(text, "malformed-row", f"images[{row}]: id {identity} is that of another image too")
                sizes[identity] = Rejected("malformed-row", f"image_id {identity} is the id of several images")
            else:
                sizes[identity] = (photograph, height, width)
        return sizes

    def _annotation(self, row: int, annotation: dict[str, Any], sizes: _Sizes) -> None:
        """Add the person of a row, usable or not. Raises `Rejected` where it is not clear of which photograph."""
        category = _id(annotation.get("category_id")) if self.categories else None
        if category in self.categories and category not in self.persons:
            return
        if annotation.get("image_id") is None:
            raise _OfAnyImage("malformed-row", "it has no image_id")
        image = _id(annotation["image_id"])
        if image not in sizes:
            raise Rejected("malformed-row", f"image_id {image!r} is the id of no image")
        known = sizes[image]
        if isinstance(known, Rejected):
            raise _OfAnyImage(known.reason, known.message)
        name, height, width = known
        if name is None:
            return
        people = self.people.setdefault(name, [])
        identity = annotation.get("id")
        if identity is None or not is_unicode(str(identity)) or str(identity) in {person.id for person in people}:
            identity = f"row-{row}"
        named = self.categories.get(category, "").strip().capitalize()
        shown = named if named in PEOPLE else "Person"
        try:
            if self.categories and category not in self.categories:
                raise Rejected("malformed-row", f"category_id {category!r} is the id of no category")
            if str(annotation.get("iscrowd") or 0) not in ("0", "False", "false"):
                raise Rejected("crowd", "a crowd, not one person")
            try:
                rle = coco_rle(_field(annotation, "segmentation"), height, width)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise Rejected("malformed-row", f"segmentation: {error}") from None
            where, mask = f"{height}:{width}:{rle['counts']}", np.zeros((0, 0), bool)
            if any(person.where == where for person in people):
                self._note(name, "repeated-row", f"annotations[{row}] is there twice, and counts once")
                return
        except Rejected as error:
            message = f"annotations[{row}]: {error.message}"
            self._reject(name, error.reason, message, str(identity))
            people.append(
                FoundMask(str(identity), shown, "rle", None, f"annotations[{row}]", Rejected(error.reason, message))
            )
            return
        people.append(FoundMask(str(identity), shown, "rle", None, where, mask))

    def _reject(self, image: str, reason: str, message: str, instance: str = "") -> None:
        self.rejected.append(
            Rejection("", printable(image), printable(instance), "curate", "row-rejected", reason, printable(message))
        )

    def _note(self, image: str, reason: str, message: str) -> None:
        self.rejected.append(Rejection("", image, "", "curate", "mended", reason, printable(message)))


def _is_person(category: str) -> bool:
    return category.strip().casefold() in PEOPLE_ANYWHERE


class _OfAnyImage(Rejected):
    """A row that does not say of which image it is."""


def _field(row: Any, name: str) -> Any:
    if not isinstance(row, dict):
        raise Rejected("malformed-row", f"not a mapping but a {type(row).__name__}")
    if name not in row:
        raise Rejected("malformed-row", f"it has no field {name}")
    return row[name]


def _id(value: Any) -> object:
    """An id in one form: 7, 7.0, "7" and "007" are the same."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.isdecimal() and len(text) <= LONGEST_ID else text
    return value if isinstance(value, int | None) else repr(value)


def _size_of(image: Any) -> tuple[int, int]:
    sides = []
    for name in ("height", "width"):
        try:
            sides.append(int(_field(image, name)))
        except (TypeError, ValueError, OverflowError):
            raise Rejected("malformed-row", f"{name} {image[name]!r} is no number of pixels") from None
    return sides[0], sides[1]


def spellings(file_name: str) -> tuple[str, ...]:
    """A file name as it is, and with what is no part of it taken out: ``./``, doubled and Windows' slashes."""
    name = plain_name(file_name)
    return name, str(PurePosixPath(name)), str(PurePosixPath(name.replace("\\", "/")))


def _is_tail(one: str, other: str) -> bool:
    """Whether one path is the other's end."""
    parts, others = PurePosixPath(one).parts, PurePosixPath(other).parts
    shared = min(len(parts), len(others))
    return parts[-shared:] == others[-shared:]


def upright_turn(shape: tuple[int, ...], own: int, stored_size: tuple[int, int], orientation: int) -> int:
    """The EXIF orientation code by which `orient` turns a mask upright, as its photograph is seen.

    An orientation of the mask's own is applied unless that makes its shape less like the photograph's. Without one, a
    mask is taken to be upright where its shape allows it, and else to be stored as the photograph's pixels are.

    Args:
        shape: height and width of the mask, of any size.
        own: EXIF orientation (1 to 8) that the mask's file names; 1 for none.
        stored_size: width and height of the photograph as stored.
        orientation: EXIF orientation (1 to 8) of the photograph.
    """
    wanted = log(stored_size[0] / stored_size[1]) * (1 if orientation < 5 else -1)
    as_it_is = log(shape[1] / shape[0])

    def unlike(turn: int) -> float:
        return abs((as_it_is if turn < 5 else -as_it_is) - wanted)

    if own != 1 and unlike(own) <= unlike(1):
        return own
    return orientation if unlike(orientation) < unlike(1) else 1


def coco_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """COCO compressed RLE of a segmentation: polygons, or RLE of either kind (https://cocodataset.org/#format-data).

    Raises:
        KeyError, TypeError, ValueError: it is malformed.
        Rejected: ``empty-mask``.
    """
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
        if any(p.ndim != 1 or (p.size >= 6 and p.size % 2) for p in polygons):
            raise ValueError("a polygon is x, y, x, y, ...")
        reach = 2 * max(height, width)
        if any(not (np.abs(polygon) <= reach).all() for polygon in polygons):
            raise ValueError("a polygon lies outside of its image")
        areas = [p.tolist() for p in polygons if p.size >= 6 and _is_area(p)]  # slivers beside them take nothing away
        if not areas:
            raise ValueError("no polygon has three points and an area")
        rle = coco_mask.merge(coco_mask.frPyObjects(areas, height, width))
    counts = rle["counts"]
    result = {"size": [height, width], "counts": counts.decode("ascii") if isinstance(counts, bytes) else str(counts)}
    if isinstance(segmentation, dict):
        check_rle(result)
    if not coco_mask.area(result):
        raise Rejected("empty-mask", "no pixel belongs to the person")
    return result


def _is_area(polygon: np.ndarray) -> bool:
    """Whether a polygon x, y, x, y, ... is more than a line. One that crosses itself may have a signed area of 0."""
    x, y = polygon[::2], polygon[1::2]
    signed = float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    return signed != 0 or np.linalg.matrix_rank(np.stack([x - x[0], y - y[0]])) == 2


def plain_name(name: str) -> str:
    """A file name in one Unicode form: file systems differ in theirs."""
    return unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    return plain_name(str(PurePosixPath(name).with_suffix("")))
