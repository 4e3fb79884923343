"""The embedded sample: a drawn world, written as a small mirror in OpenImages' own file format.

The mirror has the names, columns and oddities of the real release, so that the ``openimages`` source reads it as
it reads the public bucket. Beside the tables and pictures lie side-cars with what only a drawn world can know:
``sidecar/{split}/{ImageID}.json`` (18 keypoints a person, in 0..1 of the upright picture), ``.parsing.png`` (LIP
labels), ``.plate.png`` (the scene without its people) and ``.effects.png`` (whose shadow or reflection a pixel shows);
the ``annotated`` estimators read them.

Oddities, as in the real release: Rotation that is not applied to the pixels; masks of another resolution than
their picture, or off by one pixel; one person with a ``Person`` box and a ``Man`` box; group-of and depiction
boxes; boxes without mask; pictures that people verified to show a person but that have no box; pictures whose
labels say nothing about people; licences that do not allow changes or commercial use; titles with commas,
quotes and letters of many languages.

With ``broken``, the train split also holds, one picture each: a truncated JPEG, a text file and an empty file
named ``.jpg``, a PNG that declares 50,000 x 50,000 pixels, a listed picture that is absent, an empty mask, a
mask that covers everything, a mask of quite another aspect ratio, a mask that its zip lacks, table rows with too
few columns, an image id with ``../`` in it, and the readable but unusual: a CMYK JPEG, a 16-bit PNG and a
palette PNG named ``.jpg``, a JPEG whose EXIF asks for a rotation (OpenImages' Rotation column rules). The
validation and test splits hold the truncated, the absent and the empty mask.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import cv2
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from pydantic import Field, model_validator

from dataset_tools.drawn_world import DrawnPerson, draw_scene, generator
from dataset_tools.errors import UserError
from dataset_tools.folders import folder_written_whole
from dataset_tools.records import PEOPLE, SPLITS, Split
from dataset_tools.schema import effect_bits, encode_png
from dataset_tools.settings import Settings
from dataset_tools.storage import open_root
from dataset_tools.tables import CLASSES as CLASS_TABLE
from dataset_tools.tables import TABLES

CLASSES = {
    "Person": "/m/01g317", "Man": "/m/04yx4", "Woman": "/m/03bt1vf", "Boy": "/m/01bl7v", "Girl": "/m/05r655",
    "Tree": "/m/07j7r", "Bench": "/m/0cvnqh", "Dog": "/m/0bt9lr", "Car": "/m/0k4j", "Street light": "/m/033rq4",
    "Building": "/m/0cgh4", "Window": "/m/0d4v4", "Door": "/m/02dgv", "Picture frame": "/m/06z37_",
    "Couch": "/m/02crq1", "Chair": "/m/01mzpv", "Table": "/m/04bcr3", "Lamp": "/m/0dtln", "Bookcase": "/m/03__z0",
    "Houseplant": "/m/03fp41", "Flowerpot": "/m/0fm3zh", "Waste container": "/m/0bjyj5", "Clothing": "/m/09j2d",
    "Human face": "/m/0dzct", "Umbrella": "/m/0hnnb", "Bicycle": "/m/0199g",
}  # fmt: skip
"""OpenImages' class names and MIDs: people first, then things that scenes show."""
SEGMENTED = (*PEOPLE, "Bench", "Dog", "Car", "Door", "Window", "Picture frame", "Couch", "Chair", "Table", "Houseplant")

MASK_COLUMNS = (
    "MaskPath", "ImageID", "LabelName", "BoxID", "BoxXMin", "BoxXMax", "BoxYMin", "BoxYMax", "PredictedIoU", "Clicks",
)  # fmt: skip
BOX_COLUMNS = (
    "ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax", "IsOccluded", "IsTruncated",
    "IsGroupOf", "IsDepiction", "IsInside",
)  # fmt: skip
CLICK_COLUMNS = (
    "XClick1X", "XClick2X", "XClick3X", "XClick4X", "XClick1Y", "XClick2Y", "XClick3Y", "XClick4Y",
)  # fmt: skip
LABEL_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence")
IMAGE_COLUMNS = (
    "ImageID", "Subset", "OriginalURL", "OriginalLandingURL", "License", "AuthorProfileURL", "Author", "Title",
    "OriginalSize", "OriginalMD5", "Thumbnail300KURL", "Rotation",
)  # fmt: skip

UNREADABLE = ("truncated", "text", "empty-file", "bomb", "absent")
UNUSUAL = ("cmyk", "sixteen-bit", "palette", "exif")
FAULTY_MASKS = ("empty-mask", "full-mask", "other-aspect", "missing-member")
BROKEN: dict[Split, tuple[str, ...]] = {
    "train": (*UNREADABLE, *UNUSUAL, *FAULTY_MASKS),
    "validation": ("truncated", "absent", "empty-mask"),
    "test": ("truncated", "absent", "empty-mask"),
}
"""Kinds of broken pictures a split; malformed table rows come on top, in train."""

_BY = "https://creativecommons.org/licenses/by/2.0/"
_OTHER_LICENCES = (
    "https://creativecommons.org/licenses/by-nc/2.0/",
    "https://creativecommons.org/licenses/by-nd/2.0/",
    "https://creativecommons.org/licenses/by-nc-sa/2.0/",
)
_AUTHORS = (
    "Ada Lindqvist", "Tomás Ferreira", "Mei-Ling Zhao", "Okoro & Daughters", "Jürgen Weiß", "Noor Haddad",
    "Anya Petrova", "Siobhán Walsh", "Kenji Mori", 'Lou "Lens" Martin', "Priya Raman", "Ewa Wójcik",
)  # fmt: skip
_TITLES = {
    "street": ("On the way home", "Corner shop, 5 pm", 'The "long" street', "Marktplatz", "Waiting, again"),
    "park": ("Sunday in the park", "Grass, trees, us", "Après-midi", "Dog days", "公園"),
    "room": ("Housewarming", 'Living room, "before"', "Rainy day", "À la maison", "The new rug"),
}


class SampleSettings(Settings):
    """How many pictures the drawn mirror holds, and of what size."""

    kind: Literal["sample"] = "sample"
    seed: int = Field(default=0, ge=0)
    """Another seed, another world; 0 or more."""
    train: int = Field(default=48, ge=1)
    """Pictures with annotated people in the train split."""
    validation: int = Field(default=8, ge=1)
    """Pictures with annotated people in the validation split."""
    test: int = Field(default=16, ge=1)
    """Pictures with annotated people in the test split."""
    train_backgrounds: int = Field(default=24, ge=1)
    """Pictures verified to hold no person in the train split."""
    validation_backgrounds: int = Field(default=6, ge=1)
    """The same in the validation split."""
    test_backgrounds: int = Field(default=8, ge=1)
    """The same in the test split."""
    smallest: int = Field(default=256, ge=128, le=2048)
    """Least length of a picture's longer side, in pixels."""
    largest: int = Field(default=384, ge=128, le=2048)
    """Greatest length of a picture's longer side, in pixels."""
    broken: bool = True
    """Include the pictures and table rows that are broken on purpose."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.smallest > self.largest:
            raise ValueError(f"smallest ({self.smallest}) exceeds largest ({self.largest})")
        return self


def write_mirror(settings: SampleSettings, root: str) -> None:
    """Draw the world and write it below ``root``; the same settings give the same bytes.

    On a local filesystem it appears whole or not at all, in the place of a mirror that stood there before
    (`dataset_tools.folders.folder_written_whole`).

    Args:
        root: fsspec URL or local path of the folder that becomes the mirror.

    Raises:
        UserError: ``root`` cannot be written, or is a folder of something else.
    """
    filesystem, path = open_root(root)
    if not isinstance(filesystem, LocalFileSystem):
        _write_all(settings, lambda name, data: filesystem.pipe_file(f"{path}/{name}", data))
        return
    try:
        with folder_written_whole(path, CLASS_TABLE) as partial:

            def put(name: str, data: bytes) -> None:
                file = partial / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)

            _write_all(settings, put)
    except OSError as error:
        raise UserError(f"{root}: the sample cannot be written here: {error.strerror or error}") from None


Put = Callable[[str, bytes], Any]


@dataclass
class _Tables:
    """Rows of one split, and the members of its mask zips by first hex digit."""

    masks: list[Sequence[Any]] = field(default_factory=list)
    boxes: list[Sequence[Any]] = field(default_factory=list)
    labels: list[Sequence[Any]] = field(default_factory=list)
    images: list[Sequence[Any]] = field(default_factory=list)
    members: dict[str, dict[str, bytes]] = field(default_factory=lambda: {digit: {} for digit in "0123456789abcdef"})


def _write_all(settings: SampleSettings, put: Put) -> None:
    for split in SPLITS:
        tables = _Tables()
        count: int = getattr(settings, split)
        backgrounds: int = getattr(settings, f"{split}_backgrounds")
        for index in range(count):
            people = (1, 2, 3, 4, 2, 1, 3, 5)[index % 8]
            _Picture(settings, split, f"people/{index}", people, tables, put).write(_oddity(index))
        for index in range(backgrounds):
            _Picture(settings, split, f"background/{index}", 0, tables, put).write()
        _Picture(settings, split, "unboxed/0", 2, tables, put).write(oddity="unboxed")
        _Picture(settings, split, "unverified/0", 0, tables, put).write(oddity="unverified")
        if settings.broken:
            for name in BROKEN[split]:
                _Picture(settings, split, f"broken/{name}", 2, tables, put).write(oddity=name)
            if split == "train":
                _malformed_rows(tables)
        _put_tables(split, tables, put)
    put(CLASS_TABLE, _csv([(mid, name) for name, mid in CLASSES.items()]))
    put("v5/classes-segmentation.txt", "".join(f"{CLASSES[name]}\n" for name in SEGMENTED).encode())


def _oddity(index: int) -> str:
    return {2: "group", 3: "boxes-only", 5: "rotated", 7: "licence", 9: "rotated", 11: "depiction", 14: "rotated"}.get(
        index % 16, ""
    )


class _Picture:
    """One picture of the mirror: draws it, writes its files, adds its rows."""

    def __init__(
        self, settings: SampleSettings, split: Split, key: str, people: int, tables: _Tables, put: Put
    ) -> None:
        self.split, self.tables, self.put = split, tables, put
        key = f"{split}/{key}"
        self.rng = generator(settings.seed, f"{key}/file")
        self.id = _digest(settings.seed, key)[:16]
        long = int(self.rng.integers(settings.smallest, settings.largest + 1))
        short = round(long / float(self.rng.choice([1.0, 1.25, 4 / 3, 4 / 3, 1.5, 16 / 9])))
        size = (short, long) if people and self.rng.random() < 0.3 else (long, short)
        self.scene = draw_scene(key, settings.seed, size, people)
        self.people = people
        self.rotation = 0

    def write(self, oddity: str = "") -> None:
        """Write everything about the picture; ``oddity`` names what is special about it."""
        if oddity == "rotated":
            self.rotation = int(self.rng.choice([90, 180, 270]))
        data = self._encode(oddity)
        if oddity != "absent":
            self.put(f"images/{self.split}/{self.id}.jpg", data)
        self._image_row(data, oddity)
        self._label_rows(oddity)
        people: list[dict[str, Any]] = []
        if self.people and oddity != "unboxed":
            people = self._person_rows(oddity)
            self._thing_rows(oddity)
        self._side_cars(people)

    def _stored(self, upright: np.ndarray) -> np.ndarray:
        """Pixels as they lie in the file: turned so that `rotation` degrees counter-clockwise bring them upright."""
        return np.ascontiguousarray(np.rot90(upright, -self.rotation // 90))

    def _encode(self, oddity: str) -> bytes:
        stored = self._stored(self.scene.image)
        picture = Image.fromarray(stored)
        if oddity == "text":
            return b"This file is named like a picture, but it is text.\n"
        if oddity == "empty-file":
            return b""
        if oddity == "bomb":
            return _declared_png(50_000, 50_000)
        if oddity == "cmyk":
            return _saved(picture.convert("CMYK"), "JPEG", quality=92)
        if oddity == "sixteen-bit":
            grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
            return _saved(Image.fromarray(grey), "PNG")
        if oddity == "palette":
            return _saved(picture.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE), "PNG")
        if oddity == "exif":
            exif = Image.Exif()
            exif[0x0112] = 6  # Orientation: turn a quarter clockwise
            return _saved(picture, "JPEG", quality=92, exif=exif)
        data = _saved(picture, "JPEG", quality=92)
        return data[: len(data) * 55 // 100] if oddity == "truncated" else data

    def _image_row(self, data: bytes, oddity: str) -> None:
        rng = self.rng
        licence = str(rng.choice(_OTHER_LICENCES)) if oddity == "licence" else _BY
        author = _AUTHORS[int(rng.integers(len(_AUTHORS)))]
        handle = "".join(letter for letter in author.lower() if "a" <= letter <= "z")
        titles = _TITLES[self.scene.kind]
        rotation = "" if self.rotation == 0 and rng.random() < 0.1 else f"{self.rotation:.1f}"
        self.tables.images.append(
            (
                self.id,
                self.split,
                f"https://example.org/photos/{self.id}_o.jpg",
                f"https://example.org/people/{handle}/{int(self.id[:8], 16)}",
                licence,
                f"https://example.org/people/{handle}/",
                author,
                titles[int(rng.integers(len(titles)))],
                len(data),
                base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode(),
                f"https://example.org/photos/{self.id}_z.jpg" if rng.random() < 0.9 else "",
                rotation,
            )
        )

    def _label_rows(self, oddity: str) -> None:
        def add(name: str, confidence: int) -> None:
            self.tables.labels.append((self.id, "verification", CLASSES[name], confidence))

        if self.people:
            add("Person", 1)
            for name in sorted({person.category for person in self.scene.people} - {"Person"}):
                add(name, 1)
            add("Clothing", 1)
        elif oddity != "unverified":
            for name in PEOPLE:
                add(name, 0)
        for name in sorted({name for name, _ in self.scene.objects if name in CLASSES}):
            add(name, 1)
        add("Bicycle", 0)

    def _person_rows(self, oddity: str) -> list[dict[str, Any]]:
        rng = self.rng
        entries: list[dict[str, Any]] = []
        for index, person in enumerate(self.scene.people):
            if person.mask.sum() < 24:
                continue
            mask = self._stored(person.mask)
            box = _box_of(mask)
            flags = (int(person.occluded), int(person.truncated), 0, 0, 0)
            self._box_row(person.category, box, flags, mask)
            names = [person.category]
            if person.category != "Person" and rng.random() < 0.25:  # the same person again, as Person
                names.append("Person")
                # The same person, drawn by another hand: off by a hundredth of the box.
                sides = (box[2] - box[0], box[3] - box[1]) * 2
                off = 0.01 * np.clip(rng.normal(size=4), -1.5, 1.5) * sides
                jittered = [float(v) for v in np.clip(np.array(box) + off, 0, 1)]
                self._box_row("Person", (jittered[0], jittered[1], jittered[2], jittered[3]), flags, None)
            if oddity == "boxes-only" and index == len(self.scene.people) - 1:
                continue
            if len(names) > 1 and rng.random() < 0.5:
                names.pop()
            for name in names:
                box_id = _digest(self.id, index, name)[:8]
                self._mask_row(box_id, name, box, mask, oddity if index == 0 else "")
                kinds = list(person.effect_kinds)
                entries.append(
                    {"box_id": box_id, "keypoints": _rounded(person), "effects_bit": index, "effects": kinds}
                )
        if oddity == "group":
            self._box_row("Person", (0.02, 0.3, 0.3, 0.45), (1, 0, 1, 0, 0), None)
        if oddity == "depiction":
            self._box_row("Person", (0.7, 0.1, 0.78, 0.22), (0, 0, 0, 1, 0), None)
        return entries

    def _box_row(self, name: str, box: tuple[float, ...], flags: tuple[int, ...], mask: np.ndarray | None) -> None:
        x0, y0, x1, y1 = box
        row: list[Any] = [
            self.id,
            "xclick" if mask is not None or self.split != "train" else "activemil",
            CLASSES[name],
            1,
        ]
        row += [f"{v:.6f}" for v in (x0, x1, y0, y1)] + list(flags)
        if self.split == "train":
            row += ["-1"] * 8 if mask is None else [f"{v:.6f}" for v in _extreme_points(mask)]
        self.tables.boxes.append(row)

    def _mask_row(self, box_id: str, name: str, box: tuple[float, ...], mask: np.ndarray, oddity: str) -> None:
        rng = self.rng
        member = f"{self.id}_{CLASSES[name].replace('/', '')}_{box_id}.png"
        height, width = mask.shape
        draw = rng.random()
        if oddity == "other-aspect":
            width, height = width * 2, height // 2
        elif draw < 0.55:
            scale = float(rng.choice([0.75, 1.25, 1.5, 2.0]))
            width, height = round(width * scale), round(height * scale)
        elif draw < 0.7:
            width, height = width + int(rng.choice([-1, 1])), height + int(rng.choice([-1, 0, 1]))
        drawn = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT).astype(bool)
        if oddity in ("empty-mask", "full-mask"):
            drawn[:] = oddity == "full-mask"
        if oddity != "missing-member":
            self.tables.members[self.id[0]][member] = _saved(Image.fromarray(drawn), "PNG")
        score = clicks = ""
        if self.split == "train":
            score = f"{rng.uniform(0.7, 0.96):.5f}"
            places = np.argwhere(mask)[rng.integers(int(mask.sum()), size=4)] / mask.shape
            clicks = ";".join(f"{x:.6f} {y:.6f} {rng.uniform(0.5, 20):.6f}" for y, x in places)
        x0, y0, x1, y1 = box
        row = [member, self.id, CLASSES[name], box_id, *(f"{v:.6f}" for v in (x0, x1, y0, y1)), score, clicks]
        self.tables.masks.append(row)

    def _thing_rows(self, oddity: str) -> None:
        for index, (name, upright) in enumerate(self.scene.objects):
            if name not in CLASSES or index > 5:
                continue
            height, width = self.scene.image.shape[:2]
            inside = np.zeros((height, width), bool)
            x0, y0, x1, y1 = (round(v * s) for v, s in zip(upright, (width, height, width, height), strict=True))
            inside[y0:y1, x0:x1] = True
            if not inside.any():
                continue
            mask = self._stored(inside)
            box = _box_of(mask)
            self._box_row(name, box, (1, 0, 0, 0, 0), mask)
            if name in SEGMENTED:
                self._mask_row(_digest(self.id, index, "thing")[:8], name, box, mask, "")

    def _side_cars(self, people: list[dict[str, Any]]) -> None:
        stem = f"sidecar/{self.split}/{self.id}"
        self.put(f"{stem}.json", json.dumps({"people": people}, separators=(",", ":")).encode())
        self.put(f"{stem}.parsing.png", encode_png(self.scene.parsing))
        self.put(f"{stem}.plate.png", encode_png(self.scene.background))
        if self.people:
            self.put(f"{stem}.effects.png", encode_png(effect_bits([person.effects for person in self.scene.people])))


def _malformed_rows(tables: _Tables) -> None:
    """Rows with too few columns, and an image id that tries to leave the folder."""
    good_mask, good_box, good_image = (list(rows[0]) for rows in (tables.masks, tables.boxes, tables.images))
    tables.masks.append(good_mask[:3])
    tables.boxes.append(good_box[:5])
    escape = "../../0123456789"
    tables.masks.append([f"{escape}_m04yx4_00000000.png", escape, CLASSES["Man"], "00000000", *good_mask[4:]])
    tables.boxes.append([escape, good_box[1], CLASSES["Man"], *good_box[3:]])
    tables.images.append([escape, *good_image[1:]])
    tables.labels.append((escape, "verification", CLASSES["Person"], 1))


def _put_tables(split: Split, tables: _Tables, put: Put) -> None:
    names = TABLES[split]
    put(names["masks"], _csv([MASK_COLUMNS, *tables.masks]))
    put(names["boxes"], _csv([BOX_COLUMNS + (CLICK_COLUMNS if split == "train" else ()), *tables.boxes]))
    put(names["labels"], _csv([LABEL_COLUMNS, *tables.labels]))
    put(names["metadata"], _csv([IMAGE_COLUMNS, *tables.images]))
    for digit, members in tables.members.items():
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in sorted(members.items()):
                archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
        put(f"v5/{split}-masks/{split}-masks-{digit}.zip", buffer.getvalue())


def _csv(rows: Sequence[Sequence[Any]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()


def _digest(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


def _saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 in 0..1 of the pixels that are set."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height


def _extreme_points(mask: np.ndarray) -> list[float]:
    """The four clicked points (top, left, bottom, right): first their x, then their y, in 0..1."""
    places = np.argwhere(mask) + 0.5
    chosen = [places[0], places[places[:, 1].argmin()], places[-1], places[places[:, 1].argmax()]]
    return [p[1] / mask.shape[1] for p in chosen] + [p[0] / mask.shape[0] for p in chosen]


def _rounded(person: DrawnPerson) -> list[list[float]]:
    return [[round(float(v), 6) for v in joint] for joint in person.keypoints]


def _declared_png(width: int, height: int) -> bytes:
    """A well-formed PNG header of any size over almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
