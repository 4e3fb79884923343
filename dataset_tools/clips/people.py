"""Who stands in front of a clean plate: what differs from it beyond its noise and is no shadow on it.

A shadow darkens the plate and keeps its colour: brightness distortion alpha = argmin |I - alpha B|^2, chromaticity
distortion |I - alpha B| (Horprasert, Harwood, Davis 1999, "A statistical approach for real-time robust background
subtraction and shadow detection").
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

from dataset_tools.clips.plate import Plate, largest
from dataset_tools.estimators import FoundPeople

_DIFFERENT = 5.0
"""Standard deviations of the noise, in one channel at least, from which on a pixel differs."""
_DARKEST_SHADOW, _LIGHTEST = 0.5, 1.08
"""Range of alpha in which a change of brightness alone is one of light."""
_IN_FRONT = 0.5
"""Least share of a person whom a network finds that must differ from the plate."""
_LARGEST_GAP = 0.2
"""Gaps in people of less than this share of the smallest person are filled whatever they show."""
_CHROMA = 3.5
"""Standard deviations that the colour of what lies in shadow may differ by."""


def foreground(frame: np.ndarray, plate: Plate, min_area: float) -> np.ndarray:
    """Where somebody or something stands in front of what is known of the plate, (H, W) bool; no shadows.

    Args:
        frame: (H, W, 3) uint8 RGB, aligned with the plate and in its light.
        plate: of the frame's view.
        min_area: smaller connected parts, as a share of the picture, are noise.
    """
    picture, behind = frame.astype(np.float32), plate.background.astype(np.float32)
    change = largest(cv2.absdiff(picture, behind)) / plate.noise
    alpha = _sum(picture * behind) / np.maximum(_sum(behind * behind), 1)
    colour = largest(cv2.absdiff(picture, behind * alpha[..., None])) / plate.noise
    light = (alpha >= _DARKEST_SHADOW) & (alpha <= _LIGHTEST) & (colour < _CHROMA)
    differs = cv2.medianBlur(((change > _DIFFERENT) & plate.known).view(np.uint8), 3)
    somebody = cv2.medianBlur((differs.view(bool) & ~light).view(np.uint8), 3)
    size = max(3, 2 * round(max(frame.shape[:2]) / 320) + 1)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    closed = cv2.morphologyEx(somebody, cv2.MORPH_CLOSE, disc)
    closed = _without_parts(closed, min_area * closed.size)
    # Clothes of the colour of what is behind them leave gaps; what people enclose and differs, too, is theirs.
    outside = _without_parts(1 - closed, _LARGEST_GAP * min_area * closed.size)
    enclosed = outside.astype(bool) & ~_reaches_border(outside)
    return ((outside == 0) | (enclosed & differs.view(bool))) & plate.known


@dataclass(eq=False)
class PeopleInFront:
    """The people of a frame. Masks are (H, W) bool, none empty, no pixel in two of them."""

    masks: list[np.ndarray]
    scores: list[float] = field(default_factory=list)
    """Of the network that told them apart, 0..1; empty without one."""
    others: np.ndarray | None = None
    """(H, W) bool: what is no person and differs from the plate, or is one and does not, so that the plate is no
    picture of the scene without people there."""


def told_apart(somebody: np.ndarray, found: FoundPeople) -> PeopleInFront:
    """The people of a frame by what differs from the plate and by what a network finds.

    Each connected part of the difference is shared among those whom the network finds in it, every pixel to the
    nearest; a person has it and what the network adds. A part without anybody (a dog, a car), and people who are part
    of the plate, are ``others``.

    Args:
        somebody: (H, W) bool, as `foreground` gives it.
        found: by a network in the same frame.
    """
    in_front = [np.count_nonzero(mask & somebody) >= _IN_FRONT * np.count_nonzero(mask) for mask in found.masks]
    owners = np.zeros(somebody.shape, np.int32)
    # The largest first: who stands before somebody larger, or was found twice, takes their own pixels from them.
    for person in sorted(range(len(found.masks)), key=lambda person: -np.count_nonzero(found.masks[person])):
        owners[found.masks[person]] = person + 1
    others = np.zeros_like(somebody)
    for part in parts(somebody):
        within = sorted(set(owners[part]) - {0})
        within = [person for person in within if in_front[person - 1]]
        if not within:
            others |= part
            continue
        distances = [cv2.distanceTransform((owners != person).view(np.uint8), cv2.DIST_L2, 3) for person in within]
        nearest = np.array(within)[np.argmin(distances, axis=0)]
        owners[part] = nearest[part]
    for person, front in enumerate(in_front, start=1):
        if not front:
            others |= owners == person
    people = [person for person, front in enumerate(in_front, start=1) if front and (owners == person).any()]
    masks = [owners == person for person in people]
    return PeopleInFront(masks, [found.scores[person - 1] for person in people], others)


def parts(mask: np.ndarray) -> list[np.ndarray]:
    """Connected parts (8-neighbourhood) of a mask (H, W) bool, from left to right; each (H, W) bool."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    order = sorted(range(1, count), key=lambda part: (stats[part, cv2.CC_STAT_LEFT], stats[part, cv2.CC_STAT_TOP]))
    return [labels == part for part in order]


def _sum(channels: np.ndarray) -> np.ndarray:
    first, second, third = cv2.split(channels)
    return first + second + third


def _without_parts(mask: np.ndarray, least: float) -> np.ndarray:
    """A mask (H, W) uint8 0 or 1 without connected parts of fewer than ``least`` pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    kept = stats[:, cv2.CC_STAT_AREA] >= least
    kept[0] = False
    return kept[labels].view(np.uint8)


def _reaches_border(mask: np.ndarray) -> np.ndarray:
    """The connected parts (4-neighbourhood) of a mask (H, W) uint8 that touch the picture's border, (H, W) bool."""
    count, labels = cv2.connectedComponents(mask, connectivity=4)
    touching = np.zeros(count, bool)
    touching[np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = True
    touching[0] = False
    return touching[labels]
