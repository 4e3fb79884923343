"""Who of the people in a photograph is meant: by number, by a click, by size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dataset_tools.errors import Rejected, UserError
from dataset_tools.photographs import Photograph


@dataclass(frozen=True)
class Chosen:
    """Who vanishes: everybody, or whom one of these names.

    Raises:
        UserError: two of them are asked for.
    """

    remove: tuple[int, ...] | None = None
    """Numbers of people, from 1."""
    clicks: tuple[tuple[int, int], ...] = ()
    """Pixels, x and y, of the upright photograph: whoever is seen there."""
    largest: bool = False
    """The person of the most pixels."""
    keep_largest: bool = False
    """Everybody else."""

    def __post_init__(self) -> None:
        options = {
            "--remove": self.remove is not None,
            "--click": bool(self.clicks),
            "--largest": self.largest,
            "--keep-largest": self.keep_largest,
        }
        asked = [option for option, is_asked in options.items() if is_asked]
        if len(asked) > 1:
            raise UserError(f"{' and '.join(asked)}: each says who vanishes; give one of them")

    def among(self, photograph: Photograph) -> list[int]:
        """Indices of the people of a photograph.

        Raises:
            Rejected: ``no-such-person`` or ``unusable-person``; ``nobody-chosen`` where nobody would vanish.
        """
        everybody = list(range(len(photograph.people)))
        if self.remove is not None:
            return [_numbered(number, photograph) for number in self.remove]
        if self.clicks:
            return list(dict.fromkeys(_clicked(click, photograph) for click in self.clicks))
        if not (self.largest or self.keep_largest):
            return everybody
        largest = max(everybody, key=lambda k: np.count_nonzero(photograph.people[k]))
        if self.largest:
            return [largest]
        if len(everybody) == 1:
            raise Rejected("nobody-chosen", "--keep-largest: there is 1 person, who would stay")
        return [k for k in everybody if k != largest]


def _numbered(number: int, photograph: Photograph) -> int:
    try:
        check_numbers([number], len(photograph.people) + len(photograph.unusable), "--remove")
    except UserError as error:
        raise Rejected("no-such-person", str(error)) from None
    if photograph.doubt:
        raise Rejected(
            "unusable-person",
            f"--remove {number}: who that is is not certain: {photograph.doubt}; mend it, or use --click",
        )
    if why := photograph.unusable.get(number):
        raise Rejected("unusable-person", f"--remove {number}: person {number} cannot be used: {why}")
    return photograph.numbers.index(number)


def _clicked(click: tuple[int, int], photograph: Photograph) -> int:
    x, y = click
    height, width = photograph.image.shape[:2]
    if x >= width or y >= height:
        raise Rejected("no-such-person", f"--click {x},{y}: the photograph is {width}x{height} pixels")
    for k in reversed(range(len(photograph.people))):  # later ones are in front
        if photograph.people[k][y, x]:
            return k
    distances = [_distance(mask, click) for mask in photograph.people]
    nearest = int(np.argmin(distances))
    raise Rejected(
        "no-such-person",
        f"--click {x},{y}: nobody is there; the nearest is person {photograph.numbers[nearest]}, "
        f"{distances[nearest]:.0f} pixels away",
    )


def _distance(mask: np.ndarray, point: tuple[int, int]) -> float:
    """Pixels from a point (x, y) outside of a mask (H, W) to its nearest pixel."""
    outlines, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return float(np.linalg.norm(np.concatenate(outlines)[:, 0] - np.array(point), axis=1).min())


def _is_number(text: str) -> bool:
    """Whether it is a whole number, and one that pictures have."""
    return text.isascii() and text.isdigit() and len(text) <= 18


def parse_clicks(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Pixels that are written as ``x,y``. Raises `UserError`."""
    clicks = []
    for text in texts:
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != 2 or not all(map(_is_number, parts)):
            raise UserError(f"--click {text!r}: give a pixel of the photograph, x and y from its top left, as 640,360")
        clicks.append((int(parts[0]), int(parts[1])))
    return tuple(clicks)


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """People by number, from 1, each once. Raises `UserError`, which names the option."""
    parts = [part.strip() for part in text.split(",")]
    if not all(map(_is_number, parts)):
        none = ", or none" if option == "--keep" else ""
        raise UserError(f"{option} {text!r}: give people by number, counted from 1, such as 1,3{none}")
    return tuple(dict.fromkeys(int(part) for part in parts))


def check_numbers(numbers: Sequence[int], people: int, option: str) -> None:
    """Raise `UserError` where one of the numbers is nobody's."""
    for number in numbers:
        if not 1 <= number <= people:
            there = "there is 1 person" if people == 1 else f"there are {people} people"
            raise UserError(f"{option} {number}: {there}, counted from 1")
