"""Source ``coco``: COCO 2017, or any set in its layout, from a folder or any fsspec URL.

``{root}/annotations/instances_{train2017,val2017}.json``, beside them ``person_keypoints_*.json`` and
``captions_*.json``, and the pictures in ``{images}/{train2017,val2017}/`` (https://cocodataset.org/#format-data). What
is published for validation is the split ``test``, since the answers to COCO's own test are withheld.

Pictures are used as they are stored: masks and keypoints are in those pixels, whatever EXIF says.

COCO does not say who is occluded or cut off: who has several polygons counts as the one, since something in front
divides them, and whose mask touches the picture's edge as the other.

How far nobody is in a background: annotators of COCO were to mark everybody, up to ten or fifteen a picture one by one
and the others as one crowd (https://arxiv.org/abs/1405.0312, section 4.3). Pictures with either are no backgrounds;
people whom they overlooked, small ones as a rule, an instance network can find (``instances``).
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from pycocotools import mask as coco_mask
from pydantic import Field

from dataset_tools.choice import ChoiceSettings, choose, published_split, stratum_of_boxes
from dataset_tools.errors import Rejected, UserError
from dataset_tools.fetch import (
    FetchSettings,
    copy_file,
    list_folder,
    look_up,
    open_filesystem,
    read_bytes,
)
from dataset_tools.file_names import printable
from dataset_tools.json_rows import read_rows
from dataset_tools.photo_masks import coco_rle
from dataset_tools.records import SPLITS, Curation, ImageRecord, InstanceRecord, Rejection, Split
from dataset_tools.schema import KEYPOINTS, decode_rle
from dataset_tools.settings import Settings, digest_of
from dataset_tools.storage import state_on_disk, version_of
from dataset_tools.storage_options import Location, StorageOptions

PERSON = "person"
COCO_KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip
"""Order of the 17 keypoints in ``person_keypoints_*.json``, as its category names them."""
SCORES = (0.0, 0.5, 1.0)
"""Of a keypoint that is not labelled, labelled and hidden, labelled and visible: the values of COCO's ``v``."""
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""What passes is safe below a folder."""

_MOST_ID = 10**12

Tables = dict[str, list[str]]


class CocoSettings(Settings):
    """COCO: where it lies, and what is taken from it."""

    kind: Literal["coco"] = "coco"
    root: Location
    """Folder with ``annotations/`` in it: a path or fsspec URL."""
    root_options: StorageOptions = Field({})
    """fsspec storage options of the root; secrets in them are named, as ``{env: NAME}`` or ``{block: secret/NAME}``."""
    images: Location | None = None
    """Folder with ``train2017/`` and ``val2017/`` in it, such as ``http://images.cocodataset.org``; null: the root."""
    images_options: StorageOptions | None = None
    """fsspec storage options of the pictures, likewise; null: those of the root where they lie there, else none."""
    splits: tuple[Split, ...] = Field(SPLITS, min_length=1)
    """Splits that are used: train and validation come from train2017, test is val2017."""
    validation_share: float = Field(0.02, ge=0, lt=1)
    """Share of train2017 that is the split ``validation``; which pictures those are follows from their ids."""
    categories: tuple[str, ...] = Field((PERSON,), min_length=1)
    """Names of the classes whose instances are the sample's people; all else is scene. Backgrounds show neither them
    nor a person."""
    crowds: Literal["leave-out", "mask"] = "leave-out"
    """Pictures with a region of several people, whom nobody told apart: leave the picture out, or mask the region: it
    stays part of the scene, nobody in it is erased, and a network's people there are passed over."""
    keypoints: bool = True
    """Take poses from ``person_keypoints_*.json``, where that lies beside the instances; used unless the build has a
    pose estimator."""
    captions: bool = False
    """Take the caption of the lowest id from ``captions_*.json``."""
    licences: tuple[str, ...] = ()
    """Prefixes of the licence URLs that are allowed, such as ``http://creativecommons.org/licenses/by/``; empty: all
    that the json lists."""
    choice: ChoiceSettings = ChoiceSettings()
    fetch: FetchSettings = FetchSettings()

    def open(self, tables: Tables | None = None) -> CocoSource:
        """The source that these settings describe; with what `CocoSource.tables` found, where that is known."""
        return CocoSource(self, tables)


@dataclass(frozen=True)
class CocoSource:
    """Implements `dataset_tools.sources.Source`."""

    settings: CocoSettings
    known: Tables | None = None
    """What `tables` found before, perhaps in another process: nothing is looked up again."""
    name = "coco"
    applies_exif = False

    @property
    def places(self) -> tuple[str, ...]:
        """Root and pictures."""
        return (self.settings.root, self._images)

    def check(self) -> None:
        """See `dataset_tools.sources.Source.check`."""
        self.tables()

    def tables(self) -> Tables:
        """The json files that are read. Raises `UserError` where one that is needed is missing."""
        if self.known is not None:
            return self.known
        settings, found = self.settings, {}
        folder = f"{settings.root}/annotations"
        wanted = {"instances": True, "captions": settings.captions, "person_keypoints": settings.keypoints}
        try:
            listing = list_folder(folder, settings.fetch, settings.root_options)
            for kind, is_wanted in wanted.items():
                for part in self._parts() if is_wanted else ():
                    name = f"{kind}_{part}.json"
                    info = _look_up(f"{folder}/{name}", settings) if listing is None else listing.get(name)
                    if info is not None:
                        found[f"annotations/{name}"] = version_of(info)
                    elif kind != "person_keypoints":
                        raise UserError(f"{folder}/{name} does not exist")
        except Rejected as rejected:
            raise UserError(rejected.message) from None
        return found

    def fingerprint(self) -> str:
        """Digest of size and time (or ETag) of each json, and of the settings that decide what is chosen."""
        chosen = self.settings.model_dump(mode="json", exclude={"root_options", "images_options", "fetch"})
        return digest_of({"settings": chosen, "tables": self.tables()})

    def curate(self) -> Curation:
        """Choose pictures of which everybody has a usable mask, and backgrounds.

        The files are read row by row, the instances twice: memory is that of the pictures' rows and of the wanted
        instances' masks as RLE, not that of the files.

        Raises:
            UserError: a file is missing or no such json, or has no such category.
        """
        settings, rejected = self.settings, list[Rejection]()
        with tempfile.TemporaryDirectory(prefix="coco-") as folder:
            local = {name: self._local(name, folder) for name in self.tables()}
            # test first: a picture that stands in both is no training picture.
            parts = [_Part(settings, part, self._images, rejected) for part in self._parts()]
            taken: set[int] = set()
            for part in parts:
                part.read_pictures(*local[f"annotations/instances_{part.name}.json"], taken)
                part.read_instances(*local[f"annotations/instances_{part.name}.json"])
                taken |= part.pictures.keys()
            chosen = choose((record for part in parts for record in part.records()), settings.choice)
            captions: dict[str, str] = {}
            poses: dict[tuple[str, str], tuple[float, ...]] = {}
            for part in parts:
                wanted = {record.id: record for record in chosen if (record.split == "test") == part.is_test}
                if settings.captions:
                    captions |= part.read_captions(*local[f"annotations/captions_{part.name}.json"], wanted)
                if keypoints := local.get(f"annotations/person_keypoints_{part.name}.json"):
                    poses |= part.read_poses(*keypoints, wanted)
        records = [
            replace(
                record,
                caption=captions.get(record.id, ""),
                instances=tuple(
                    replace(person, keypoints=poses.get((record.id, person.id), ())) for person in record.instances
                ),
            )
            for record in chosen
        ]
        return Curation(records, rejected)

    def state(self, record: ImageRecord) -> list[str]:
        """Of the picture, where it lies on a disk; the record itself holds the masks."""
        return [state_on_disk(record.image)]

    def read_image(self, record: ImageRecord) -> bytes:
        """The encoded image file. Raises `Rejected` as `dataset_tools.fetch.read_bytes`."""
        settings = self.settings
        options = settings.images_options
        if options is None:
            options = settings.root_options if settings.images is None else {}
        return read_bytes(record.image, settings.fetch, options)

    def read_mask(self, record: ImageRecord, index: int) -> np.ndarray:
        """Mask of one instance, (h, w) bool at the size that the json says the picture has."""
        height, width, counts = record.instances[index].mask.split(":", 2)
        return decode_rle({"size": [int(height), int(width)], "counts": counts})

    @property
    def _images(self) -> str:
        return self.settings.images or self.settings.root

    def _parts(self) -> list[str]:
        splits = self.settings.splits
        return [*(["val2017"] if "test" in splits else []), *(["train2017"] if set(splits) - {"test"} else [])]

    def _local(self, name: str, folder: str) -> tuple[str, str]:
        """Where a json lies on the local disk, fetched whole if need be, and its name."""
        settings = self.settings
        url = f"{settings.root}/{name}"
        filesystem, path = open_filesystem(url, settings.fetch, settings.root_options)
        if not isinstance(filesystem, LocalFileSystem):
            path = f"{folder}/{PurePosixPath(name).name}"
            try:
                copy_file(url, path, None, settings.fetch, settings.root_options)
            except Rejected as rejected:
                raise UserError(rejected.message) from None
        return path, name


def _look_up(url: str, settings: CocoSettings) -> dict[str, Any] | None:
    try:
        return look_up(url, settings.fetch, settings.root_options)
    except Rejected as rejected:
        if rejected.reason in ("not-found", "no-such-folder"):
            return None
        raise


@dataclass(frozen=True, slots=True)
class _Picture:
    """A usable row of ``images``."""

    file_name: str
    width: int
    height: int
    licence: int
    """Its id."""
    url: str
    flickr_url: str


@dataclass
class _Part:
    """What is published as one: train2017 or val2017."""

    settings: CocoSettings
    name: str
    images: str
    """Folder of the pictures of all parts."""
    rejected: list[Rejection]
    pictures: dict[int, _Picture] = field(default_factory=dict)
    lost: dict[int, Rejected] = field(default_factory=dict)
    """Pictures that are set aside, and why."""
    inhabited: set[int] = field(default_factory=set)
    """Pictures that are no backgrounds."""
    people: dict[int, list[InstanceRecord]] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)
    licences: dict[int, str] = field(default_factory=dict)

    @property
    def is_test(self) -> bool:
        return self.name == "val2017"

    def read_pictures(self, path: str, file: str, taken: set[int]) -> None:
        """Read pictures and categories.

        Args:
            path: of the json on this machine.
            file: its name below the root.
            taken: pictures of another part, which are set aside.
        """
        by_name: dict[str, int] = {}
        for array, row, value in read_rows(path, file, ("licenses", "images", "categories")):
            with self._row(f"{file}: {array}[{row}]", value):
                if array == "images":
                    self._add_picture(value, taken, by_name)
                elif array == "licenses":
                    self.licences[_whole(value, "id")] = _text(value, "url")
                else:
                    self.categories[_whole(value, "id")] = _text(value, "name")
        self._check_categories(file)

    def read_instances(self, path: str, file: str) -> None:
        """Read masks. A row that may be somebody and cannot be used sets its picture aside."""
        wanted = {name.casefold() for name in self.settings.categories}
        seen: set[int] = set()
        for array, row, value in read_rows(path, file, ("annotations",)):
            with self._row(f"{file}: {array}[{row}]", value):
                image = self._image_of(value)
                try:
                    category = self.categories.get(_whole(value, "category_id"))
                    if category is None:
                        raise Rejected("unknown-category", f"category_id {value['category_id']} is that of none")
                    if category.casefold() in wanted:
                        self.people.setdefault(image, []).append(self._instance(image, value, category, seen))
                except Rejected:
                    self.lost.setdefault(image, Rejected("person-without-mask", "a row of it cannot be used"))
                    raise
                if category.casefold() in wanted | {PERSON}:
                    self.inhabited.add(image)

    def records(self) -> Iterator[ImageRecord]:
        """Pictures that can be used, people's and backgrounds; the others are reported."""
        for number, picture in self.pictures.items():
            split = self._split(number)
            if split not in self.settings.splits:
                continue
            people, licence = tuple(self.people.pop(number, ())), self.licences.get(picture.licence, "")
            why = self.lost.get(number) or self._why_not(picture, people)
            if why is not None:
                row = Rejection(split, _name(number), "", "curate", "image-rejected", why.reason, why.message)
                self.rejected.append(row)
                continue
            if not licence.startswith(self.settings.licences or ""):
                continue
            boxes = [person.box for person in people if not person.crowd]
            if not boxes and number in self.inhabited:
                continue
            yield ImageRecord(
                id=_name(number),
                source=CocoSource.name,
                split=split,
                role="people" if boxes else "background",
                stratum=stratum_of_boxes(boxes) if boxes else "",
                image=f"{self.images}/{self.name}/{picture.file_name}",
                licence=licence,
                url=picture.url,
                landing_url=picture.flickr_url,
                instances=people,
            )

    def _why_not(self, picture: _Picture, people: Sequence[InstanceRecord]) -> Rejected | None:
        if picture.licence not in self.licences:
            return Rejected("unknown-licence", f"license {picture.licence} is that of none")
        if self.settings.crowds == "leave-out" and any(person.crowd for person in people):
            return Rejected("crowd", "several people in it share one mask")
        return None

    def read_captions(self, path: str, file: str, wanted: Mapping[str, ImageRecord]) -> dict[str, str]:
        """The caption of the lowest id of each of these pictures, by the name of the picture."""
        first: dict[str, tuple[int, str]] = {}
        for array, row, value in read_rows(path, file, ("annotations",)):
            with self._row(f"{file}: {array}[{row}]", value):
                image, number = _name(self._image_of(value)), _whole(value, "id")
                caption = " ".join(_text(value, "caption").split())
                if not caption:
                    raise Rejected("malformed-row", "the caption is empty")
                if image in wanted and number < first.get(image, (math.inf, ""))[0]:
                    first[image] = number, caption
        return {image: caption for image, (_, caption) in first.items()}

    def read_poses(
        self, path: str, file: str, wanted: Mapping[str, ImageRecord]
    ) -> dict[tuple[str, str], tuple[float, ...]]:
        """Poses of the people of these pictures, by the names of picture and person, as `InstanceRecord.keypoints`."""
        poses = {}
        for array, row, value in read_rows(path, file, ("annotations",)):
            with self._row(f"{file}: {array}[{row}]", value):
                image, person = self._image_of(value), str(_whole(value, "id"))
                picture = self.pictures[image]
                pose = _openpose(value.get("keypoints"), picture.width, picture.height)
                record = wanted.get(_name(image))
                if record is not None and pose and any(each.id == person for each in record.instances):
                    poses[record.id, person] = pose
        return poses

    def _add_picture(self, value: Any, taken: set[int], by_name: dict[str, int]) -> None:
        number, name = _whole(value, "id"), _text(value, "file_name")
        width, height = _whole(value, "width"), _whole(value, "height")
        if not 0 <= number < _MOST_ID:
            raise Rejected("malformed-row", f"id {number} is below 0 or not below {_MOST_ID}")
        if not _FILE_NAME.fullmatch(name):
            raise Rejected("bad-file-name", f"file_name {name!r:.80} is no name of a file in a folder")
        if width < 1 or height < 1:
            raise Rejected("malformed-row", f"a picture of {width}x{height} pixels")
        urls = (printable(str(value.get(key) or "")) for key in ("coco_url", "flickr_url"))
        picture = _Picture(name, width, height, _whole(value, "license"), *urls)
        if number in taken:
            raise Rejected("repeated-photo", f"picture {number} is in val2017 too")
        same = self.pictures.keys() & {number, by_name.get(name, number)}
        if same == {number} and self.pictures[number] == picture:
            raise Rejected("repeated-row", f"picture {number} is listed twice")
        if same:
            why = Rejected("repeated-row", f"picture {number}, {name}, is listed in two ways")
            self.lost |= dict.fromkeys(same | {number}, why)
        self.pictures.setdefault(number, picture)
        by_name.setdefault(name, number)

    def _image_of(self, value: dict[str, Any]) -> int:
        image = _whole(value, "image_id")
        if image not in self.pictures:
            raise Rejected("missing-image", f"image_id {image} is that of no usable picture")
        return image

    def _instance(self, image: int, value: dict[str, Any], category: str, seen: set[int]) -> InstanceRecord:
        picture, number = self.pictures[image], _whole(value, "id")
        width, height = picture.width, picture.height
        if number in seen:
            raise Rejected("repeated-row", f"another annotation has the id {number} too")
        seen.add(number)
        if (crowd := value.get("iscrowd", 0)) not in (0, 1):
            raise Rejected("malformed-row", f"iscrowd is {crowd!r:.40}, not 0 or 1")
        _check_box(value.get("bbox"), width, height)
        segmentation = value.get("segmentation")
        if isinstance(segmentation, list):
            _check_polygons(segmentation)
        try:
            rle = coco_rle(segmentation, height, width)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise Rejected("bad-segmentation", f"segmentation: {error}") from None
        x, y, w, h = coco_mask.toBbox(rle).tolist()
        mask = f"{height}:{width}:{rle['counts']}"
        return InstanceRecord(
            id=str(number),
            category=category.capitalize(),
            box=(x / width, y / height, (x + w) / width, (y + h) / height),
            mask=mask,
            digest=hashlib.sha256(mask.encode()).hexdigest(),
            occluded=isinstance(segmentation, list) and len(segmentation) > 1,
            truncated=min(x, y) == 0 or x + w == width or y + h == height,
            crowd=bool(crowd),
        )

    @contextmanager
    def _row(self, where: str, value: Any) -> Iterator[None]:
        """What is wrong with a row, inside, is reported, and the reading goes on."""
        try:
            yield
        except Rejected as error:
            fields = value if isinstance(value, dict) else {}
            own, image = fields.get("id"), fields.get("image_id", fields.get("id"))
            split, name = "", ""
            if isinstance(image, int) and 0 <= image < _MOST_ID:
                split, name = self._split(image), _name(image)
            person = str(own) if "image_id" in fields and isinstance(own, int) else ""
            row = Rejection(split, name, person, "curate", "row-rejected", error.reason, f"{where}: {error.message}")
            self.rejected.append(row)

    def _check_categories(self, file: str) -> None:
        names = {name.casefold(): name for name in self.categories.values()}
        for category in self.settings.categories:
            if category.casefold() not in names:
                near = difflib.get_close_matches(category.casefold(), names, n=1, cutoff=0.0)
                hint = f", did you mean {names[near[0]]!r}?" if near else ""
                raise UserError(f"categories: {file} has no category {category!r}{hint}")

    def _split(self, number: int) -> Split:
        return published_split(_name(number), not self.is_test, self.settings.validation_share)


def _name(number: int) -> str:
    return f"{number:012d}"


def _whole(value: Any, key: str) -> int:
    number = _field(value, key)
    if isinstance(number, bool) or not isinstance(number, int):
        raise Rejected("malformed-row", f"{key} is {number!r:.80}, no whole number")
    return number


def _text(value: Any, key: str) -> str:
    text = _field(value, key)
    if not isinstance(text, str):
        raise Rejected("malformed-row", f"{key} is {text!r:.80}, no text")
    return printable(text)


def _field(value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise Rejected("malformed-row", f"not an object but a {type(value).__name__}")
    if key not in value:
        raise Rejected("malformed-row", f"it has no {key}")
    return value[key]


def _check_box(box: Any, width: int, height: int) -> None:
    """A box x, y, width, height in pixels; annotators' boxes may reach one pixel beyond the picture."""
    numbers = _numbers(box, 4)
    if numbers is None:
        raise Rejected("bad-box", f"bbox is {box!r:.80}, not four numbers")
    x, y, w, h = numbers
    if w <= 0 or h <= 0 or min(x, y) < -1 or x + w > width + 1 or y + h > height + 1:
        raise Rejected("bad-box", f"bbox {box} has no area, or is not within a picture of {width}x{height}")


def _check_polygons(polygons: list[Any]) -> None:
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) % 2:
            what = f"{len(polygon)} numbers" if isinstance(polygon, list) else f"a {type(polygon).__name__}"
            raise Rejected("bad-segmentation", f"segmentation: a polygon of {what}, not x, y, x, y, ...")
        if len(polygon) < 6:
            raise Rejected("bad-segmentation", f"segmentation: a polygon of {len(polygon) // 2} points")


def _numbers(value: Any, count: int) -> list[float] | None:
    if not isinstance(value, list) or len(value) != count:
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value):
        return None
    return value


def _openpose(keypoints: Any, width: int, height: int) -> tuple[float, ...]:
    """COCO's 17 keypoints x, y, v as `InstanceRecord.keypoints`; empty where none is labelled.

    The neck, which COCO has not, is in the middle between the shoulders where both are labelled, as in OpenPose's own
    training data (https://arxiv.org/abs/1611.08050).
    """
    numbers = _numbers(keypoints, 3 * len(COCO_KEYPOINTS))
    if numbers is None:
        raise Rejected("bad-keypoints", f"keypoints are not {len(COCO_KEYPOINTS)} times x, y, v")
    found: dict[str, tuple[float, float, float]] = {}
    for name, x, y, v in zip(COCO_KEYPOINTS, numbers[::3], numbers[1::3], numbers[2::3], strict=True):
        if v not in (0, 1, 2) or (v and not (0 <= x <= width and 0 <= y <= height)):
            raise Rejected("bad-keypoints", f"{name} is {x}, {y}, {v} in a picture of {width}x{height}")
        if v:
            found[name] = (x / width, y / height, SCORES[int(v)])
    if "left_shoulder" in found and "right_shoulder" in found:
        (x, y, score), (u, w, other) = found["left_shoulder"], found["right_shoulder"]
        found["neck"] = ((x + u) / 2, (y + w) / 2, min(score, other))
    return tuple(v for name in KEYPOINTS for v in found.get(name, (0.0, 0.0, 0.0))) if found else ()
