"""Source ``ade20k``: ADE20K in either of its releases, from a folder or any fsspec URL that lists its files.

The full release (``ADE20K_2021_17_01``) has ``{root}/images/ADE/{training,validation}/.../NAME.jpg`` with
``NAME_seg.png`` beside it, whose channels R and G are the class and whose B is the instance, and ``NAME.json``, which
says what the classes are called and who is occluded (https://github.com/CSAILVision/ADE20K, ``utils/utils_ade20k.py``).
Its ``index_ade20k.pkl`` is not read.

The challenge release (``ADEChallengeData2016``) has ``{root}/images/{training,validation}/NAME.jpg`` and, from an
archive of their own, ``{root}/annotations_instance/{training,validation}/NAME.png``, whose R is one of
`INSTANCE_CLASSES`, counted from 1, and whose G is the instance (``instancesegmentation`` of
https://github.com/CSAILVision/placeschallenge). ``{root}/annotations/``, where it is there, says of every pixel which
of the 150 classes of ``objectInfo150.txt`` it shows (https://github.com/CSAILVision/sceneparsing): pictures in which it
knows people whom the instances lack are left out.

Both releases say of every pixel what it shows. Where backgrounds show floors, water or ice (`GLOSSY`), people on it are
mirrored (`dataset_tools.picture_light.LightSettings.reflections`); of the challenge release ``annotations/`` tells.

What is published for validation is the split ``test``. Pictures are used as they are stored, as masks are: EXIF is not
followed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal

import cv2
import numpy as np
from pydantic import Field

from dataset_tools.choice import ChoiceSettings, choose, published_split, stratum_of_boxes
from dataset_tools.errors import Rejected, UserError
from dataset_tools.fetch import FetchSettings, list_folder, map_in_order, read_bytes
from dataset_tools.file_names import printable
from dataset_tools.images import MOST_PIXELS, opened
from dataset_tools.masks import MaskSettings, bounds
from dataset_tools.records import SPLITS, Curation, ImageRecord, InstanceRecord, Rejection, Split
from dataset_tools.settings import Settings, digest_of
from dataset_tools.storage import state_on_disk, version_of
from dataset_tools.storage_options import Location, StorageOptions

TERMS = "https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/"
PERSON = "person"
CROWDS = {"crowd", "people"}
NO_BACKGROUND = {PERSON, "body part", *CROWDS}
"""What of an object's names, or of those of what WordNet says it is, keeps its picture from being a background."""
GLOSSY = {
    "floor", "water", "sea", "river", "stream", "canal", "lake", "pond", "pool", "swimming pool", "puddle",
    "ice", "ice rink", "ice hockey rink",
}  # fmt: skip
"""First names of the classes of level ground that can mirror who stands on it. Roads, earth, grass, sand and rugs are
matt, waterfalls and fountains not level."""
INSTANCE_CLASSES = (
    "bed", "windowpane", "cabinet", "person", "door", "table", "curtain", "chair", "car", "painting", "sofa", "shelf",
    "mirror", "armchair", "seat", "fence", "desk", "wardrobe", "lamp", "bathtub", "railing", "cushion", "box", "column",
    "signboard", "chest of drawers", "counter", "sink", "fireplace", "refrigerator", "stairs", "case", "pool table",
    "pillow", "screen door", "bookcase", "coffee table", "toilet", "flower", "book", "bench", "countertop", "stove",
    "palm", "kitchen island", "computer", "swivel chair", "boat", "arcade machine", "bus", "towel", "light", "truck",
    "chandelier", "awning", "streetlight", "booth", "television receiver", "airplane", "apparel", "pole", "bannister",
    "ottoman", "bottle", "van", "ship", "fountain", "washer", "plaything", "stool", "barrel", "basket", "bag",
    "minibike", "oven", "ball", "food", "step", "trade name", "microwave", "pot", "animal", "bicycle", "dishwasher",
    "screen", "sculpture", "hood", "sconce", "vase", "traffic light", "tray", "ashcan", "fan", "plate", "monitor",
    "bulletin board", "radiator", "glass", "clock", "flag",
)  # fmt: skip
"""Of ``annotations_instance``, in the order of ``instanceInfo100_train.txt``; these are not the 150 of
``annotations``."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,70}")
"""Names of pictures become keys."""
_READERS = 8
_PARTS = ("training", "validation")

Files = dict[str, list[str]]
"""Files below the root by name, with what changes when they do."""


class Ade20kSettings(Settings):
    """ADE20K: where it lies, and what is taken from it."""

    kind: Literal["ade20k"] = "ade20k"
    root: Location
    """Folder of either release, ``ADE20K_2021_17_01`` or ``ADEChallengeData2016``: a path or fsspec URL."""
    root_options: StorageOptions = Field({})
    """fsspec storage options of the root; secrets in them are named, as ``{env: NAME}`` or ``{block: secret/NAME}``."""
    splits: tuple[Split, ...] = Field(SPLITS, min_length=1)
    """Splits that are used: train and validation come from what is published for training, test from what is published
    for validation."""
    validation_share: float = Field(0.05, ge=0, lt=1)
    """Share of the training pictures that is the split ``validation``; which those are follows from their names."""
    categories: tuple[str, ...] = Field((PERSON,), min_length=1)
    """Names of the classes whose instances are the sample's people; all else is scene. In the full release one of a
    class's names, or of those of what WordNet says it is (``animal``), in the other one of 100 classes. Backgrounds
    show neither them nor a person."""
    licence: str = TERMS
    """Licence of all pictures: the terms of use restrict them to research and education that are not commercial."""
    choice: ChoiceSettings = ChoiceSettings()
    fetch: FetchSettings = FetchSettings()

    def open(self, tables: dict[str, list[str]] | None = None) -> Ade20kSource:
        """The source that these settings describe; it has no ``tables``."""
        return Ade20kSource(self)


@dataclass(frozen=True)
class Ade20kSource:
    """Implements `dataset_tools.sources.Source` and `dataset_tools.sources.GroundReader`."""

    settings: Ade20kSettings
    name = "ade20k"
    applies_exif = False

    @property
    def places(self) -> tuple[str, ...]:
        """The root."""
        return (self.settings.root,)

    def check(self) -> None:
        """See `dataset_tools.sources.Source.check`."""
        self._is_full()

    def tables(self) -> dict[str, list[str]]:
        """None: files are listed by `curate`."""
        return {}

    def fingerprint(self) -> str:
        """Digest of names, sizes and times (or ETags) of all files, and of the settings that decide what is chosen."""
        chosen = self.settings.model_dump(mode="json", exclude={"root_options", "fetch"})
        chosen["max_bytes"] = self.settings.fetch.max_bytes  # larger masks are set aside for good
        return digest_of({"settings": chosen, "files": self._files(self._is_full())})

    def curate(self) -> Curation:
        """Choose pictures of which everybody has a usable mask, and backgrounds.

        Every mask of somebody and every map of glossy ground is read, as is every json of the full release; in memory
        are only the boxes.

        Raises:
            UserError: there is neither release, or the challenge release has no such class.
        """
        settings, full, rejected = self.settings, self._is_full(), list[Rejection]()
        files = self._files(full)
        read = _Full(settings, files) if full else _Challenge(settings, files, self._read)
        found: dict[str, str] = {}
        records = []
        stems = sorted({_stem(name) for name in files} - {""})
        read_one = partial(_read_picture, read, self._read)
        for stem, picture in zip(stems, map_in_order(read_one, stems, _READERS, 2 * _READERS), strict=True):
            name = PurePosixPath(stem).name
            split = published_split(name, f"/{_PARTS[0]}/" in stem, settings.validation_share)
            if split not in settings.splits:
                continue
            if isinstance(picture, Rejected):
                picture = _Picture(why=picture)
            for person, why in picture.bad:
                rejected.append(Rejection(split, name, person, "curate", "row-rejected", why.reason, why.message))
            if picture.why is None and name in found:
                picture.why = Rejected("repeated-photo", f"{stem}.jpg has the name of {found[name]}.jpg")
            if picture.why is not None:
                error = picture.why
                row = Rejection(
                    split, name, "", "curate", "image-rejected", error.reason, error.message, error.transient
                )
                rejected.append(row)
                continue
            found[name] = stem
            if not picture.people and not picture.is_background:
                continue
            records.append(
                ImageRecord(
                    id=name,
                    source=self.name,
                    split=split,
                    role="people" if picture.people else "background",
                    stratum=stratum_of_boxes([person.box for person in picture.people]) if picture.people else "",
                    image=f"{settings.root}/{stem}.jpg",
                    licence=settings.licence,
                    title=picture.scene,
                    glossy_ground=picture.glossy_ground,
                    digest=picture.digest,
                    instances=tuple(picture.people),
                )
            )
        return Curation(choose(records, settings.choice), rejected)

    def state(self, record: ImageRecord) -> list[str]:
        """Of the picture, where it lies on a disk; the record holds a digest of each mask and of the map of ground."""
        return [state_on_disk(record.image)]

    def read_image(self, record: ImageRecord) -> bytes:
        """The encoded image file. Raises `Rejected` as `dataset_tools.fetch.read_bytes`."""
        return read_bytes(record.image, self.settings.fetch, self.settings.root_options)

    def read_mask(self, record: ImageRecord, index: int) -> np.ndarray:
        """Mask of one instance, (h, w) bool.

        Raises:
            Rejected: as `read_bytes`, or as `dataset_tools.images.decode_image`.
        """
        kind, instance, name = record.instances[index].mask.split(":", 2)
        classes, instances = _decode(self._read(name), full=name.startswith("images/"))
        mask: np.ndarray = (classes == int(kind)) & (instances == int(instance))
        return mask

    def read_glossy_ground(self, record: ImageRecord) -> np.ndarray:
        """Where a background shows one of `GLOSSY`, (h, w) bool.

        Raises:
            Rejected: as `read_mask`.
        """
        numbers, name = record.glossy_ground.split(":", 1)
        full, data = name.startswith("images/"), self._read(name)
        classes = _decode(data, full=True)[0] if full else _labels(data, name)
        return np.isin(classes, [int(number) for number in numbers.split(",")])

    def _read(self, name: str) -> bytes:
        return read_bytes(f"{self.settings.root}/{name}", self.settings.fetch, self.settings.root_options)

    def _is_full(self) -> bool:
        listed = self._list("images")
        if "ADE" in listed:
            return True
        if "annotations_instance" in self._list(""):
            return False
        if any(part in listed for part in _PARTS):
            raise UserError(
                f"{self.settings.root} has no annotations_instance: put that archive's folder there; annotations alone "
                "do not tell one person from another"
            )
        raise UserError(
            f"{self.settings.root} is no ADE20K: it has neither images/ADE (ADE20K_2021_17_01) nor images/training "
            "(ADEChallengeData2016)"
        )

    def _files(self, full: bool) -> Files:
        """All files that may be read, sorted."""
        found: Files = {}

        def walk(folder: str) -> None:
            listed = self._list(folder)
            # The full release has a folder of each picture's instances beside it: they are not looked into.
            pictures = {name.rpartition(".")[0] for name in listed if name.endswith(".json")}
            for name, info in listed.items():
                if info["type"] != "directory":
                    found[f"{folder}/{name}"] = version_of(info)
                elif name not in pictures:
                    walk(f"{folder}/{name}")

        for part in _PARTS:
            if full:
                walk(f"images/ADE/{part}")
            else:
                for kind in ("images", "annotations", "annotations_instance"):
                    walk(f"{kind}/{part}")
        if not full:
            texts = ("objectInfo150.txt", "sceneCategories.txt")
            found |= {name: version_of(info) for name, info in self._list("").items() if name in texts}
        return dict(sorted(found.items()))

    def _list(self, folder: str) -> dict[str, dict[str, Any]]:
        settings = self.settings
        place = f"{settings.root}/{folder}" if folder else settings.root
        try:
            listed = list_folder(place, settings.fetch, settings.root_options)
        except Rejected as rejected:
            raise UserError(rejected.message) from None
        if listed is None:
            raise UserError(f"{place} cannot be listed: name a folder, or a store that lists its files")
        return {name: info for name, info in listed.items() if not name.startswith(".")}


@dataclass
class _Picture:
    """What was found out about one picture."""

    people: list[InstanceRecord] = field(default_factory=list)
    bad: list[tuple[str, Rejected]] = field(default_factory=list)
    """Instance, or nothing where there is none, and why it cannot be used."""
    is_background: bool = False
    glossy_ground: str = ""
    digest: str = ""
    """For the record."""
    scene: str = ""
    why: Rejected | None = None
    """Why the picture is set aside."""

    def mark_glossy_ground(self, classes: np.ndarray, numbers: Iterable[int], name: str) -> None:
        """Say where there is ground of glossy classes, if anywhere: in the map (h, w) of classes of that name."""
        numbers = sorted(numbers)
        glossy = np.isin(classes, numbers)
        if glossy.any():
            self.glossy_ground, self.digest = f"{','.join(map(str, numbers))}:{name}", _digest(glossy)


_Reader = Callable[[str], bytes]


def _stem(file: str) -> str:
    """Name below the root, without its ending, of the picture that a file is or belongs to; empty for masks of it."""
    if file.startswith("annotations_instance/"):
        return file.replace("annotations_instance/", "images/", 1).removesuffix(".png")
    stem, _, suffix = file.rpartition(".")
    return stem if file.startswith("images/") and suffix in ("jpg", "json") else ""


def _read_picture(release: _Full | _Challenge, read: _Reader, stem: str) -> _Picture:
    if not _NAME.fullmatch(PurePosixPath(stem).name):
        raise Rejected("bad-file-name", f"{stem}.jpg: a picture's name is of letters, digits, - and _")
    if f"{stem}.jpg" not in release.files:
        raise Rejected("missing-image", f"{stem}.jpg does not exist")
    return release.picture(stem, read)


class _Full:
    """Pictures of the full release."""

    def __init__(self, settings: Ade20kSettings, files: Files) -> None:
        self.files = files
        self.wanted = {name.casefold() for name in settings.categories}

    def picture(self, stem: str, read: _Reader) -> _Picture:
        """What json and masks of one picture say. Raises `Rejected` where the picture cannot be used."""
        document = _json(read, f"{stem}.json", self.files)
        try:
            annotation = document["annotation"]
            size = tuple(int(side) for side in annotation["imsize"][:2])
            objects = list(annotation["object"])
            scene = [printable(str(part)) for part in annotation.get("scene") or ()]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise Rejected("malformed-json", f"{stem}.json is not as the release's are: {error!r}") from None
        picture = _Picture(scene=" ".join(scene[-1:]), is_background=True)
        wanted: list[tuple[_Object, np.ndarray]] = []
        glossy: set[int] = set()
        for row, entry in enumerate(objects):
            try:
                thing = _Object.parse(entry)
                is_wanted = bool(thing.names & self.wanted) and not thing.is_part
                if is_wanted:
                    wanted.append((thing, _polygon(entry)))
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                why = Rejected("malformed-row", f"{PurePosixPath(stem).name}.json: object[{row}]: {error!r:.120}")
                picture.bad.append(("", why))
                picture.why = Rejected("person-without-mask", f"a row of {stem}.json cannot be used")
                continue
            if thing.names & CROWDS and PERSON in self.wanted and not thing.is_part:
                picture.why = Rejected("crowd", f"{stem}.json: object {thing.id} is a crowd, not one person")
            picture.is_background &= not thing.names & (self.wanted | NO_BACKGROUND)
            if thing.category.casefold() in GLOSSY and not thing.is_part:
                glossy.add(thing.number)
        if picture.why is None and wanted:
            self._add_people(picture, stem, read, size, wanted)
        elif picture.why is None and picture.is_background and glossy:
            picture.mark_glossy_ground(self._decoded(stem, read, size)[0], glossy, f"{stem}_seg.png")
        return picture

    def _decoded(self, stem: str, read: _Reader, size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """As `_decode`."""
        name = f"{stem}_seg.png"
        if name not in self.files:
            raise Rejected("missing-mask", f"{name} does not exist")
        classes, instances = _decode(read(name), full=True)
        if classes.shape != size:
            raise Rejected("mask-size-mismatch", f"{name} is {classes.shape}, the json says {size} (height, width)")
        return classes, instances

    def _add_people(
        self,
        picture: _Picture,
        stem: str,
        read: _Reader,
        size: tuple[int, ...],
        wanted: list[tuple[_Object, np.ndarray]],
    ) -> None:
        name, (classes, instances) = f"{stem}_seg.png", self._decoded(stem, read, size)
        for number in dict.fromkeys(thing.number for thing, _ in wanted):
            things = [thing for thing, _ in wanted if thing.number == number]
            own = classes == number
            masks = {int(value): own & (instances == value) for value in np.unique(instances[own])}
            told = _matched([polygon for thing, polygon in wanted if thing.number == number], masks)
            for index, thing in enumerate(things):
                if index not in told.values():
                    why = Rejected(
                        "missing-mask", f"object {thing.id} of {stem}.json has no pixels of its own in {name}"
                    )
                    picture.bad.append((str(thing.id), why))
                    picture.why = Rejected("person-without-mask", f"somebody in {stem}.jpg has no mask")
            for value, mask in masks.items():
                one = things[told[value]] if value in told else None
                picture.people.append(
                    _instance(
                        str(one.id) if one else f"region-{value}",
                        things[0].category,
                        mask,
                        f"{number}:{value}:{name}",
                        occluded=one is not None and one.occluded,
                        truncated=one.truncated if one else None,
                    )
                )


@dataclass(frozen=True)
class _Object:
    """One object, or part of one, of a json of the full release."""

    id: int
    number: int
    """Of its class, as channels R and G of the masks say it."""
    category: str
    names: set[str]
    """Of its class, and of what WordNet says that is."""
    is_part: bool
    occluded: bool
    truncated: bool

    @classmethod
    def parse(cls, entry: dict[str, Any]) -> _Object:
        """An entry of ``annotation.object``. Raises `KeyError`, `TypeError` and `ValueError`."""
        names = [printable(str(name)) for name in (entry["name"], *(entry.get("hypernym") or ()))]
        return cls(
            id=int(entry["id"]),
            number=int(entry["name_ndx"]),
            category=_first(names[0]).capitalize(),
            names={name.strip().casefold() for names in names for name in names.split(",")},
            is_part=int(entry["parts"]["part_level"]) > 0,
            occluded=entry.get("occluded") == "yes",
            truncated=str(entry.get("crop")) == "1",
        )


def _polygon(entry: dict[str, Any]) -> np.ndarray:
    """Polygon of an object, (n, 2) int32 pixels. Raises as `_Object.parse`."""
    x, y = entry["polygon"]["x"], entry["polygon"]["y"]
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"a polygon of {len(x)} x and {len(y)} y")
    points = np.array([x, y], np.float64)
    if not (np.abs(points) < 1e6).all():
        raise ValueError("a polygon is not of numbers of pixels")
    return np.rint(points).astype(np.int32).T


def _matched(polygons: Sequence[np.ndarray], masks: dict[int, np.ndarray]) -> dict[int, int]:
    """Which of the polygons of a class, by index, each of its masks is of, by value: the one that covers most of it.

    A mask's value does not tell: values are spread over 0..255 in an order of their own. A mask is what of its polygon
    no nearer object hides.
    """
    shared: list[tuple[int, int, int]] = []
    for index, polygon in enumerate(polygons):
        inside = np.zeros(next(iter(masks.values())).shape if masks else (1, 1), np.uint8)
        cv2.fillPoly(inside, [polygon], 1)
        shared += [(-int(np.count_nonzero(inside[mask])), index, value) for value, mask in masks.items()]
    told: dict[int, int] = {}
    for pixels, index, value in sorted(shared):
        if pixels and value not in told and index not in told.values():
            told[value] = index
    return told


class _Challenge:
    """Pictures of the challenge release."""

    def __init__(self, settings: Ade20kSettings, files: Files, read: _Reader) -> None:
        self.files = files
        self.wanted = {_class(category): category.casefold() for category in settings.categories}
        nobody = {PERSON, *self.wanted.values()}
        self.kept_from_background = {INSTANCE_CLASSES.index(name) + 1 for name in nobody}
        self.scenes = dict(_scenes(read("sceneCategories.txt"))) if "sceneCategories.txt" in files else {}
        self.semantic: dict[str, int] = {}
        """Classes of ``annotations`` by each of their names."""
        if any(name.startswith("annotations/") for name in files):
            if "objectInfo150.txt" not in files:
                raise UserError(f"{settings.root} has annotations and no objectInfo150.txt, which says what they are")
            self.semantic = _object_info(read("objectInfo150.txt"))

    def picture(self, stem: str, read: _Reader) -> _Picture:
        """What the masks of one picture say. Raises `Rejected` where the picture cannot be used."""
        below = stem.removeprefix("images/")
        name = f"annotations_instance/{below}.png"
        if name not in self.files:
            raise Rejected("missing-mask", f"{name} does not exist")
        classes, instances = _decode(read(name), full=False)
        picture = _Picture(scene=self.scenes.get(PurePosixPath(stem).name, "").replace("_", " "))
        present = np.unique(classes[instances > 0])
        for value in map(int, present):
            if not 0 < value <= len(INSTANCE_CLASSES):
                why = Rejected("unknown-category", f"{name}: class {value}; there are {len(INSTANCE_CLASSES)}")
                picture.bad.append(("", why))
                picture.why = Rejected("person-without-mask", f"a class in {name} is not known")
        covered = np.zeros(classes.shape, bool)
        for number, category in self.wanted.items():
            own = classes == number
            for value in map(int, np.unique(instances[own])):
                if value == 0:
                    continue  # of the class, and nobody's
                if (classes[instances == value] != number).any():
                    why = Rejected("mixed-instance", f"{name}: instance {value} is of several classes")
                    picture.bad.append((str(value), why))
                    picture.why = Rejected("person-without-mask", f"an instance in {name} cannot be used")
                    continue
                mask = own & (instances == value)
                covered |= mask
                picture.people.append(_instance(str(value), category.capitalize(), mask, f"{number}:{value}:{name}"))
        picture.is_background = not self.kept_from_background & set(present.tolist())
        name = f"annotations/{below}.png"
        if name in self.files:
            self._compare(picture, covered, _labels(read(name), name), name)
        return picture

    def _compare(self, picture: _Picture, covered: np.ndarray, labels: np.ndarray, name: str) -> None:
        """Hold what the instances say, and the pixels that they cover, against the ``annotations`` of that name."""
        if labels.shape != covered.shape:
            raise Rejected(
                "mask-size-mismatch", f"{name} is {labels.shape}, the instances are {covered.shape} (height, width)"
            )
        wanted = self._numbers(self.wanted.values())
        unmasked = np.isin(labels, wanted) & ~covered
        if picture.why is None and np.count_nonzero(unmasked) > MaskSettings().min_area * labels.size:
            picture.why = Rejected("person-without-mask", f"{name} shows more than the instances do")
        picture.is_background &= not np.isin(labels, [*wanted, *self._numbers([PERSON])]).any()
        if picture.is_background:
            picture.mark_glossy_ground(labels, self._numbers(GLOSSY), name)

    def _numbers(self, names: Iterable[str]) -> list[int]:
        """Those of the classes of ``annotations`` with one of these names."""
        return [self.semantic[name] for name in names if name in self.semantic]


def _class(category: str) -> int:
    names = {name.casefold(): number for number, name in enumerate(INSTANCE_CLASSES, start=1)}
    if category.casefold() not in names:
        near = difflib.get_close_matches(category.casefold(), names, n=1, cutoff=0.0)
        raise UserError(f"categories: ADE20K's instances have no class {category!r}, did you mean {near[0]!r}?")
    return names[category.casefold()]


def _scenes(data: bytes) -> Iterator[tuple[str, str]]:
    """Name of the picture and of its scene, from ``sceneCategories.txt``."""
    for line in data.decode("utf-8", "replace").splitlines():
        name, _, scene = line.strip().partition(" ")
        yield name, scene


def _object_info(data: bytes) -> dict[str, int]:
    """Class by each of its names, from ``objectInfo150.txt``: a head, then Idx, Ratio, Train, Val, Name by tabs."""
    found: dict[str, int] = {}
    for row, line in enumerate(data.decode("utf-8", "replace").splitlines()[1:], start=2):
        cells = line.split("\t")
        if len(cells) != 5 or not cells[0].strip().isdecimal():
            raise UserError(f"objectInfo150.txt, line {row} is not Idx, Ratio, Train, Val, Name: fetch it again")
        for name in cells[4].split(","):
            found.setdefault(name.strip().casefold(), int(cells[0]))
    return found


def _json(read: _Reader, name: str, files: Files) -> Any:
    if name not in files:
        raise Rejected("missing-json", f"{name} does not exist")
    data = read(name)
    try:
        # Some of the release are not in UTF-8.
        return json.loads(data.decode("utf-8") if _is_utf8(data) else data.decode("latin-1"))
    except (ValueError, RecursionError) as error:
        raise Rejected("malformed-json", f"{name} is not JSON: {error}") from None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _decode(data: bytes, full: bool) -> tuple[np.ndarray, np.ndarray]:
    """Class and instance of each pixel, (h, w) int32 and uint8, of a mask of the full or the challenge release.

    Raises:
        Rejected: ``not-a-mask``, or as `dataset_tools.images.decode_image`.
    """
    with opened(data, ("PNG",), MOST_PIXELS) as picture:
        if picture.mode != "RGB":
            raise Rejected("not-a-mask", f"a mask of mode {picture.mode}, not RGB")
        channels = np.array(picture)
    if full:
        return channels[..., 0].astype(np.int32) // 10 * 256 + channels[..., 1], channels[..., 2]
    return channels[..., 0].astype(np.int32), channels[..., 1]


def _labels(data: bytes, name: str) -> np.ndarray:
    """Class of each pixel, (h, w) uint8, of ``annotations`` of the challenge release. Raises as `_decode`."""
    with opened(data, ("PNG",), MOST_PIXELS) as picture:
        if picture.mode != "L":
            raise Rejected("not-a-mask", f"{name} is of mode {picture.mode}, not of one channel")
        return np.asarray(picture)


def _digest(mask: np.ndarray) -> str:
    """For `InstanceRecord.digest` and `ImageRecord.digest`."""
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()


def _instance(
    name: str, category: str, mask: np.ndarray, where: str, occluded: bool = False, truncated: bool | None = None
) -> InstanceRecord:
    """Who is truncated where nobody says so touches the picture's edge."""
    (top, bottom, left, right), (height, width) = bounds(mask), mask.shape
    if truncated is None:
        truncated = top == 0 or left == 0 or bottom == height or right == width
    return InstanceRecord(
        id=name,
        category=category,
        box=(left / width, top / height, right / width, bottom / height),
        mask=where,
        occluded=occluded,
        truncated=truncated,
        digest=_digest(mask),
    )


def _first(name: str) -> str:
    return name.split(",")[0].strip()
