"""Which pictures are good enough: sharp, well exposed, of faces that are large enough, and no two alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from pydantic import Field

from dataset_tools.errors import Rejected
from dataset_tools.faces import face_height
from dataset_tools.perceptual_hash import AlikeHashes
from dataset_tools.records import Role
from dataset_tools.schema import SPLITS, Person, Split
from dataset_tools.settings import Settings

WORKING_SIDE = 512
"""Pixels; pictures whose longer side is longer are reduced to it before they are measured: what is sharp at the size of
a screen may be soft at that of a camera."""
BLACK, WHITE = 2, 253
"""Grey values up to and from which nothing can be told apart any more."""


class QualitySettings(Settings):
    """What is asked of pictures, be they of people or backgrounds. The defaults ask nothing."""

    min_sharpness: float = Field(0.0, ge=0)
    """Least variance of the Laplacian, grey values at a longer side of 512 pixels at most (Pech-Pacheco et al. 2000).
    Photographs in focus have some hundreds and more, blurred ones less than about 50; so have sharp ones of fog."""
    max_black: float = Field(1.0, ge=0, le=1)
    """Largest share of pixels that are black."""
    max_white: float = Field(1.0, ge=0, le=1)
    """Largest share of pixels that are white."""
    min_face: int = Field(0, ge=0)
    """Pixels; pictures in which somebody's face is lower are left out. Faces are known from pose or parsing (the region
    that is `dataset_tools.faces.face_of` a person); nothing is asked of those that are not."""
    near_duplicates: int | None = Field(None, ge=0, le=16)
    """Of pictures of the whole dataset whose perceptual hashes differ in so many of 64 bits at most, one is kept: that
    of test before validation before train. 4 finds copies, 10 also pictures of one scene; a scene that is there with
    people and without in one split is no duplicate. Every picture is then fetched once more, before all others, to
    know its hash. null looks for none."""


def check_picture(image: np.ndarray, settings: QualitySettings) -> None:
    """Raise `Rejected` where an (H, W, 3) uint8 RGB picture is not good enough.

    Raises:
        Rejected: ``blurred``, ``underexposed``, ``overexposed``.
    """
    if (settings.min_sharpness, settings.max_black, settings.max_white) == (0, 1, 1):
        return
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = WORKING_SIDE / max(grey.shape)
    if scale < 1:
        size = max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale))
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    if (sharpness := float(cv2.Laplacian(grey, cv2.CV_64F).var())) < settings.min_sharpness:
        what = f"the variance of its Laplacian is {sharpness:.1f}, {settings.min_sharpness:g} is asked for"
        raise Rejected("blurred", what)
    if (black := float((grey <= BLACK).mean())) > settings.max_black:
        raise Rejected("underexposed", f"{black:.0%} of it is black, {settings.max_black:.0%} is allowed")
    if (white := float((grey >= WHITE).mean())) > settings.max_white:
        raise Rejected("overexposed", f"{white:.0%} of it is white, {settings.max_white:.0%} is allowed")


def check_faces(people: Iterable[Person], parsing: np.ndarray, label_set: str, settings: QualitySettings) -> None:
    """Raise `Rejected` ``small-face`` where somebody's face is known and lower than it must be."""
    if not settings.min_face:
        return
    for person in people:
        height = face_height(person, parsing, label_set)
        if height is not None and height < settings.min_face:
            what = f"the face of person {person.id} is {height} pixels high, {settings.min_face} are asked for"
            raise Rejected("small-face", what)


@dataclass(frozen=True)
class HashedPicture:
    """A picture, and what it looks like."""

    id: str
    split: Split
    role: Role
    phash: str
    """16 hex digits."""


def near_duplicates(pictures: Iterable[HashedPicture], bits: int) -> Iterator[tuple[HashedPicture, str]]:
    """The pictures that are like one before them, with what that one is, such as ``test picture 0a1b``.

    Test goes before validation before train, pictures of people before backgrounds; then the order counts.

    Args:
        bits: in which hashes may differ.
    """
    held = {(split, role): AlikeHashes(bits) for split in SPLITS for role in ("people", "background")}
    order = {
        place: number for number, place in enumerate((s, r) for s in reversed(SPLITS) for r in ("people", "background"))
    }
    for picture in sorted(pictures, key=lambda each: order[each.split, each.role]):
        value = int(picture.phash, 16)
        like = next(
            (
                name
                for (split, role), hashes in held.items()
                if (split != picture.split or role == picture.role) and (name := hashes.find(value)) is not None
            ),
            None,
        )
        if like is None:
            held[picture.split, picture.role].add(value, f"{picture.split} picture {picture.id}")
        else:
            yield picture, like
