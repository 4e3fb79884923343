"""Which of the pictures that a source could give are taken, and into which split they come."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import Field, model_validator

from dataset_tools.records import SPLITS, ImageRecord, Split
from dataset_tools.settings import Settings

MOST = 1 << 31
"""Beyond any number of people or pictures; what DuckDB counts with holds it."""

Fraction = Annotated[float, Field(ge=0, le=1)]
Box = tuple[float, float, float, float]


class ChoiceSettings(Settings):
    """Which pictures are chosen.

    The conditions on people hold for everyone with a mask in a picture: a picture of which one person is too
    small is not chosen, since that person could be neither erased nor left in place.
    """

    min_people: int = Field(1, ge=1, le=MOST)
    """Fewest people with a mask in a picture."""
    max_people: int | None = Field(None, ge=1, le=MOST)
    """Most people with a mask in a picture; null: any number."""
    min_box_area: Fraction = 0.005
    """Least area of a person's box, as a fraction of the picture's area."""
    max_box_area: Fraction = 0.9
    """Greatest area of a person's box, as a fraction of the picture's area."""
    images_per_stratum: int | None = Field(10_000, ge=0, le=MOST)
    """Most images of each stratum (one person, two or three, four or more, overlapping) in each split; null: all."""
    backgrounds: int | None = Field(10_000, ge=0, le=MOST)
    """Most images in each split in which nobody is, as far as the source tells; null: all."""
    seed: int = Field(0, ge=0)
    """Decides which images are chosen where there are more than enough."""

    @model_validator(mode="after")
    def _ranges(self) -> ChoiceSettings:
        if self.max_people is not None and self.max_people < self.min_people:
            raise ValueError("max_people is less than min_people")
        if self.max_box_area < self.min_box_area:
            raise ValueError("max_box_area is less than min_box_area")
        return self


def choose(records: Iterable[ImageRecord], settings: ChoiceSettings) -> list[ImageRecord]:
    """The records that are wanted, in the order of split, people before backgrounds, md5(seed || id).

    Crowds count as nobody.
    """

    def place(record: ImageRecord) -> tuple[int, bool, str]:
        random = hashlib.md5(f"{settings.seed}{record.id}".encode(), usedforsecurity=False).hexdigest()
        return SPLITS.index(record.split), record.role == "background", random

    taken: Counter[tuple[str, str, str]] = Counter()
    chosen = []
    for record in sorted((record for record in records if _is_wanted(record, settings)), key=place):
        most = settings.images_per_stratum if record.role == "people" else settings.backgrounds
        kind = (record.split, record.role, record.stratum)
        if most is None or taken[kind] < most:
            taken[kind] += 1
            chosen.append(record)
    return chosen


def _is_wanted(record: ImageRecord, settings: ChoiceSettings) -> bool:
    if record.role == "background":
        return True
    boxes = [person.box for person in record.instances if not person.crowd]
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes]
    return (
        settings.min_people <= len(boxes) <= (settings.max_people or MOST)
        and min(areas) >= settings.min_box_area
        and max(areas) <= settings.max_box_area
    )


def stratum_of_boxes(boxes: Sequence[Box]) -> str:
    """As `dataset_tools.masks.stratum`, by boxes x0, y0, x1, y1, which is cheap and says "overlapping" more often."""
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        if any(x0 <= u1 and u0 <= x1 and y0 <= v1 and v0 <= y1 for u0, v0, u1, v1 in boxes[:index]):
            return "overlapping"
    return "one" if len(boxes) == 1 else "two_or_three" if len(boxes) <= 3 else "four_or_more"


def published_split(image_id: str, is_training: bool, validation_share: float) -> Split:
    """Split of an image of a set that is published as training and validation, with the answers to its test withheld.

    What is published for validation is the test; a share of the training images, which follows from their ids alone,
    is for validation.
    """
    if not is_training:
        return "test"
    place = int(hashlib.md5(image_id.encode(), usedforsecurity=False).hexdigest()[:16], 16) / 16**16
    return "validation" if place < validation_share else "train"
