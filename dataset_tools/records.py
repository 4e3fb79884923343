"""Rows that travel between curation and building: images chosen, people in them, and what was set aside."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import pyarrow as pa

from dataset_tools.schema import LONGEST_KEY
from dataset_tools.schema import SPLITS as SPLITS
from dataset_tools.schema import Split as Split

Role = Literal["people", "background"]
PEOPLE_ANYWHERE = ("person", "people", "pedestrian", "rider", "man", "woman", "boy", "girl")
"""What COCO, ADE20K, Cityscapes, VisDrone and OpenImages call people; in any case."""
PEOPLE = ("Person", "Man", "Woman", "Boy", "Girl")
"""OpenImages' classes for whole people; those after the first are its subclasses."""


@dataclass(frozen=True)
class InstanceRecord:
    """One annotated person of an image, before their mask was read."""

    id: str
    """Stable id within the image (OpenImages: BoxID)."""
    category: str
    """Class name, such as ``Person`` or ``Woman``."""
    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in 0..1 of the image as stored (before ``rotation``)."""
    mask: str
    """Where the mask lies, in the terms of the source that wrote the record; empty: the source has none."""
    occluded: bool = False
    truncated: bool = False
    digest: str = ""
    """sha256 of the mask, where curation read it: one that changed under its name is noticed."""
    crowd: bool = False
    """Several people in one mask, who stay part of the scene: nobody in it is erased, found or cut out."""
    keypoints: tuple[float, ...] = ()
    """Where the source ships a pose: 54 numbers, x and y in 0..1 of the image as stored and a score for each of
    `dataset_tools.schema.KEYPOINTS`; 0, 0, 0 for what it does not know."""
    mask_by: str = "annotated"
    """For `dataset_tools.schema.Person.mask_by`: a source may hold masks that a network made."""
    mask_score: float = 1.0
    """For `dataset_tools.schema.Person.mask_score`."""


@dataclass(frozen=True)
class ImageRecord:
    """One image that curation chose."""

    id: str
    """Stable id within the source: letters, digits, ``-`` and ``_`` only."""
    source: str
    """Name of the source, such as ``openimages``."""
    split: Split
    role: Role
    """``people``: has masks and becomes a curated sample; ``background``: verified to hold no person."""
    stratum: str
    """``one``, ``two_or_three``, ``four_or_more``, ``overlapping``; empty for backgrounds."""
    image: str
    """URL or path of the image file, readable with fsspec."""
    rotation: int = 0
    """Degrees counter-clockwise (0, 90, 180, 270) that bring the stored pixels upright."""
    licence: str = ""
    author: str = ""
    author_url: str = ""
    title: str = ""
    url: str = ""
    landing_url: str = ""
    caption: str = ""
    """What the source says of the picture, where it says something."""
    plate: str = ""
    """Where the clean plate lies, in the terms of the source, which is a plate provider itself then."""
    glossy_ground: str = ""
    """Where the map of ground that mirrors lies, such as of floors and water, in the terms of the source, which is a
    `dataset_tools.sources.GroundReader` then; empty: nobody marked any. Of backgrounds only."""
    digest: str = ""
    """sha256 of what belongs to the record, where curation read it and the id does not follow from it: of the files, or
    of the pixels of ``glossy_ground``."""
    instances: tuple[InstanceRecord, ...] = ()

    def key(self) -> str:
        """Of its sample: the source's name and the id; of one that is too long a part and its digest."""
        key = f"{self.source}-{self.id}"
        if len(key) <= LONGEST_KEY:
            return key
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        return f"{key[: LONGEST_KEY - 17]}-{digest}"


@dataclass(frozen=True)
class Rejection:
    """One row of ``rejected.parquet``: what was set aside or mended, and why."""

    split: str
    image_id: str
    """Id as found in the input, possibly malformed; empty where a table row had none."""
    instance_id: str
    """The person within the image; empty where the whole image is meant."""
    stage: str
    """``curate``, ``opt-out``, ``fetch``, ``decode``, ``quality``, ``mask``, ``instances``, ``pose``, ``parsing``,
    ``plate``, ``effects``, ``anonymise`` or ``composite``."""
    outcome: Literal["image-rejected", "person-rejected", "row-rejected", "mended"]
    """``mended``: the input was unusual (CMYK, EXIF rotation, other mask size) and could be used."""
    reason: str
    message: str
    transient: bool = False
    """The fault may be the run's (time-out, no permission): a later run tries again."""


@dataclass
class Curation:
    """What a source offers: the chosen images, in a deterministic order, and what it set aside."""

    records: Sequence[ImageRecord]
    """A `dataset_tools.record_file.RecordFile` where they can be many more than files in a folder."""
    rejected: list[Rejection] = field(default_factory=list)


_INSTANCE = pa.struct(
    [
        ("id", pa.string()),
        ("category", pa.string()),
        ("box", pa.list_(pa.float64(), 4)),
        ("mask", pa.string()),
        ("occluded", pa.bool_()),
        ("truncated", pa.bool_()),
        ("digest", pa.string()),
        ("crowd", pa.bool_()),
        ("keypoints", pa.list_(pa.float64())),
        ("mask_by", pa.string()),
        ("mask_score", pa.float64()),
    ]
)
IMAGE_SCHEMA = pa.schema(
    [
        (f.name, pa.int64() if f.name == "rotation" else pa.string())
        for f in fields(ImageRecord)
        if f.name != "instances"
    ]
    + [("instances", pa.list_(_INSTANCE))]
)
REJECTION_SCHEMA = pa.schema(
    [(f.name, pa.bool_() if f.name == "transient" else pa.string()) for f in fields(Rejection)]
)


_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
"""What a spreadsheet may run, and what `text_to_cell` made of it
(https://owasp.org/www-community/attacks/CSV_Injection)."""


def text_to_cell(text: str) -> str:
    """A text as a cell of a CSV file, with an apostrophe before it where a spreadsheet would run it as a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def cell_to_text(cell: str) -> str:
    """The inverse of `text_to_cell`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def csv_rows(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file that are not empty, each with the number of the line that it begins in.

    Raises:
        csv.Error: no more rows can be read, with the line from which on: a quote that nobody closed is far from the
            end of what it opened.
    """
    table = csv.reader(file, strict=True)
    begins = 1
    try:
        for row in table:
            if row:
                yield begins, row
            begins = table.line_num + 1
    except csv.Error as error:
        raise csv.Error(f"from line {begins} on: {error}") from None


def records_to_table(records: Iterable[ImageRecord]) -> pa.Table:
    """Records as an Arrow table of `IMAGE_SCHEMA`, one row an image."""
    return pa.Table.from_pylist([asdict(record) for record in records], schema=IMAGE_SCHEMA)


def record_from_row(row: dict[str, Any]) -> ImageRecord:
    """The inverse of one row of `records_to_table`."""
    instances = tuple(
        InstanceRecord(**{**item, "box": tuple(item["box"]), "keypoints": tuple(item["keypoints"])})
        for item in row["instances"]
    )
    return ImageRecord(**{**row, "instances": instances})


def rejections_to_table(rejections: Iterable[Rejection]) -> pa.Table:
    """Rejections as an Arrow table of `REJECTION_SCHEMA`, sorted, so that equal runs write equal files."""
    rows = sorted({tuple(asdict(r).items()) for r in rejections})
    return pa.Table.from_pylist([dict(row) for row in rows], schema=REJECTION_SCHEMA)
