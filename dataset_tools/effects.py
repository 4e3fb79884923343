"""Effects of people: what a picture shows of them outside of themselves, their shadows and reflections.

A source may know them. Of a true pair the difference of picture and clean plate tells them: what differs outside of the
people. To whom it belongs follows from where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from pydantic import Field

from dataset_tools.differences import Differences, DifferenceSettings, differences
from dataset_tools.errors import Rejected
from dataset_tools.estimators import CleanPlate
from dataset_tools.masks import bounds
from dataset_tools.schema import EffectKind, Person

_WEAK = 0.5
"""An effect reaches out to where differences are half of what counts as one: penumbras are soft."""
_BLURRED = 0.2
"""What differs by less than this share of the strongest difference within two pixels is the blur of that."""
_SURE_CHROMA = 2.0
"""By colour alone an effect begins where that differs so many times as much as counts: it bleeds in JPEG files."""
_SQUARE = np.ones((3, 3), np.uint8)


class EffectsSettings(DifferenceSettings):
    """How effects are told from the difference of a picture and its clean plate."""

    min_area: float = Field(0.0003, ge=0, lt=1)
    """Smallest effect, as a share of the picture's area."""
    max_area: float = Field(0.5, gt=0, le=1)
    """Where more of the picture outside its people differs, it was another light: nothing is told."""
    margin: float = Field(0.006, ge=0, le=0.1)
    """Width around people, as a share of the picture's longer side, in which a difference may be theirs."""
    reach: float = Field(0.5, ge=0)
    """What differs and touches nobody is an effect of the nearest person up to so many times their height away; what
    lies farther away is no effect of anybody."""


def effects_of_people(
    plate: CleanPlate, people: Sequence[Person], settings: EffectsSettings
) -> tuple[list[np.ndarray], np.ndarray] | None:
    """Where the picture shows the effects of each person, (H, W) bool, and where those of others; as a provider knows.

    Effects of somebody (`CleanPlate.effects`) go to whom they lie nearest to. Sets `Person.effects` to the kinds that
    the provider knows. None where it knows nothing of effects.
    """
    if plate.effects is None:
        return None
    masks = [person.mask for person in people]
    nobodys = plate.effects.get("", np.zeros(plate.background.shape[:2], bool)) & ~np.logical_or.reduce(masks)
    shared = _assigned(nobodys, masks, settings)
    nothing = np.zeros_like(nobodys)
    effects = [plate.effects.get(person.id, nothing) | own for person, own in zip(people, shared, strict=True)]
    for person, own in zip(people, effects, strict=True):
        person.effects = plate.kinds.get(person.id, ()) if own.any() else ()
    ids = {"", *(person.id for person in people)}
    others = [mask for name, mask in plate.effects.items() if name not in ids]
    return effects, np.logical_or.reduce([nothing, *others]) & ~np.logical_or.reduce(effects)


def effects_by_difference(
    image: np.ndarray, plate: CleanPlate, people: Sequence[Person], settings: EffectsSettings
) -> list[np.ndarray]:
    """Where a picture (H, W, 3) uint8 RGB shows effects of each person, (H, W) bool, as its clean plate tells.

    Sets `Person.effects` to ``shadow`` where all that is found of a person darkens and keeps the ground's texture;
    other kinds cannot be told so, nor those on plain ground.

    Raises:
        Rejected: as `dataset_tools.differences.differences`, or ``light-differs``: nothing can be told.
    """
    masks = [person.mask for person in people]
    body = np.logical_or.reduce(masks)
    beside = cv2.dilate(body.view(np.uint8), _disc(_margin(body.shape, settings))).view(bool)
    found = differences(image, plate.background, plate.known & ~beside, settings)
    effect = _differing(found, body, beside, settings) & plate.known
    share = float(effect.sum() / max(1, int((~body).sum())))
    if share > settings.max_area:
        raise Rejected("light-differs", f"{share:.0%} of the picture outside its people differ from the plate")
    effects = _assigned(effect, masks, settings)
    for person, own in zip(people, effects, strict=True):
        person.effects = _kinds(found, own & ~beside)
    return effects


def _margin(shape: tuple[int, ...], settings: EffectsSettings) -> int:
    return max(2, round(settings.margin * max(shape)))


def _differing(found: Differences, body: np.ndarray, beside: np.ndarray, settings: EffectsSettings) -> np.ndarray:
    """What differs outside of people, (H, W) bool: regions of weak differences around strong ones.

    Beside people only what goes on from farther away: there, the difference may be the person's own edge.
    """
    strong = ((found.luminance_excess > 1) | (found.chroma_excess > _SURE_CHROMA)) & ~beside
    weak = (found.luminance_excess > _WEAK) | (found.chroma_excess > 1)
    strongest = cv2.dilate(np.where(beside, np.float32(0), found.luminance_excess), np.ones((5, 5), np.uint8))
    weak &= found.luminance_excess >= _BLURRED * strongest
    weak = cv2.morphologyEx(weak.view(np.uint8), cv2.MORPH_CLOSE, _SQUARE).view(bool) & ~body
    number, labels, stats, _ = cv2.connectedComponentsWithStats((weak & ~beside).view(np.uint8), connectivity=8)
    least = max(12, settings.min_area * body.size)
    kept = (stats[:, cv2.CC_STAT_AREA] >= least) & (np.bincount(labels[strong], minlength=number) >= least / 2)
    kept[0] = False
    away = kept[labels]
    near = cv2.dilate(away.view(np.uint8), _disc(_margin(body.shape, settings) + 1)).view(bool)
    return away | (weak & beside & near)


def _assigned(effect: np.ndarray, masks: Sequence[np.ndarray], settings: EffectsSettings) -> list[np.ndarray]:
    """What of an effect (H, W) bool belongs to each person: each region to those it touches, else to the nearest.

    Where a region touches several people each of its pixels goes to the nearest of them.
    """
    owned = [np.zeros_like(effect) for _ in masks]
    if not effect.any() or not masks:
        return owned
    margin = _margin(effect.shape, settings) + 1
    heights = [bounds(mask)[1] - bounds(mask)[0] for mask in masks]
    distances = np.stack([cv2.distanceTransform((~mask).view(np.uint8), cv2.DIST_L2, 5) for mask in masks])
    _, labels = cv2.connectedComponents(effect.view(np.uint8), connectivity=8)
    for label in range(1, int(labels.max()) + 1):
        region = labels == label
        away = distances[:, region].min(axis=1)
        touched = np.flatnonzero(away <= margin)
        if len(touched) == 0:
            nearest = int(away.argmin())
            touched = np.array([nearest] if away[nearest] <= settings.reach * heights[nearest] else [], int)
        if len(touched):
            whose = touched[distances[touched][:, region].argmin(axis=0)]
            for person in touched:
                owned[person][region] = whose == person
    return owned


def _kinds(found: Differences, effect: np.ndarray) -> tuple[EffectKind, ...]:
    """``shadow`` where an effect darkens nearly everywhere, and its ground has texture, which it leaves as it is."""
    inside = cv2.erode(effect.view(np.uint8), _SQUARE, iterations=2).view(bool)
    if np.count_nonzero(inside) < 20 or (found.luminance[inside] < 0).mean() < 0.95:
        return ()
    texture, change = float(found.texture[inside].mean()), float(found.change[inside].mean())
    return ("shadow",) if texture > 20 * found.noise and change < 0.2 * texture else ()


def _disc(radius: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
