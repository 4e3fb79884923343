"""Donors: who of a curated dataset may be cut out to be pasted elsewhere, and cutting them out.

What the annotators of a source masked is believed. Masks of a network must come up to more (`DonorSettings`), so that
no half people are pasted, and none with a rim of their old surroundings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from dataset_tools.errors import Rejected
from dataset_tools.masks import bounds
from dataset_tools.schema import KEYPOINTS, NO_PARSING, MadeBy, Makers, Origin, Sample
from dataset_tools.settings import Settings

_HEAD, _SHOULDERS, _HIPS, _ANKLES = (
    [KEYPOINTS.index(name) for name in names]
    for names in (
        ("nose", "right_eye", "left_eye", "right_ear", "left_ear"),
        ("neck", "right_shoulder", "left_shoulder"),
        ("right_hip", "left_hip"),
        ("right_ankle", "left_ankle"),
    )
)
_JOINT_ERROR = 0.03
"""How far from the mask a joint may lie, as a share of the person's height."""
_BORDER_PLACES = 300
"""Places of the outline at which a border is looked for, about; fewer where it is short."""
_FEWEST_PLACES = 16
"""Of these places, so many must show a border."""
_BORDER_SCALE = 320
"""Taller people are reduced to so many pixels before their border is measured: it costs the same for all."""
_CONTRAST = 30.0
"""Least distance in RGB (0..255) between person and background for a border to be measured there."""
_ANY_BORDER = 4.0
"""Pixels; borders of this width are always accepted. The sharpest lenses and JPEG make them 2 to 3 wide."""


class DonorSettings(Settings):
    """Who may be cut out."""

    min_height: int = Field(96, ge=8)
    """Pixels; smaller people are not cut out."""
    allow_occluded: bool = False
    """Cut out people whose source says that something hides a part of them."""
    allow_truncated: bool = True
    """Cut out people whom the lower edge of their picture cuts off; they stand at the lower edge again."""
    min_score: float = Field(0.8, ge=0, le=1)
    """Masks of a network: people of a lower score are not cut out."""
    whole_body: bool = True
    """Masks of a network: cut out only those whose skeleton is whole and their own: a head joint in the upper third
    of the mask, neck or a shoulder, a hip, an ankle in the lower third (but for those whom the lower edge of the
    picture cuts off), and no joint off the mask, which would lack a limb. Where pose was not computed, nothing is
    asked."""
    max_border_width: float = Field(0.02, gt=0, le=1)
    """Masks of a network: the colours must change from person to background within a band of this width around the
    mask's outline, as a share of the person's height; see `border_width`. Blur makes it wide, and so does a mask that
    is too large, too small or displaced. 4 pixels are always accepted; 1 accepts all."""


class CutoutRow(BaseModel):
    """One person of a curated dataset who can be cut out."""

    model_config = ConfigDict(frozen=True)

    sample: int
    """Index of the sample in the dataset that it is read from."""
    person: int
    """Index within the sample's people."""
    key: str
    """Key of the sample."""
    height: int
    """Of the person's box, in pixels."""
    width: int
    category: str
    truncated: bool
    """The lower edge of the picture cuts this person off."""


@dataclass(eq=False)
class Cutout:
    """One person, cut out of their picture. Read-only: one cut-out may be pasted many times."""

    rgba: np.ndarray
    """(h, w, 4) uint8, straight alpha. The person's colours go on below alpha 0, so that resampling draws in
    nothing of the old background."""
    parsing: np.ndarray
    """(h, w) uint8 labels of ``label_set``; 0 outside the person, `NO_PARSING` throughout where it is ``none``."""
    label_set: str
    keypoints: np.ndarray
    """(18, 3) float32 in pixels of the crop, score 0..1; 0, 0, 0 where not found."""
    made_by: Makers
    """Of the sample's masks, pose and parsing."""
    mask_by: str
    mask_score: float
    category: str
    id: str
    """``SAMPLE_KEY/PERSON_ID``: unique within the dataset."""
    truncated: bool
    """The lower edge of the old picture cuts this person off."""
    origin: Origin


DONOR_COLUMNS = ("key", "width", "height", "people")
"""Columns of `dataset_tools.shard_table.TABLE_SCHEMA` that tell who can be cut out."""


def cutout_rows(index: int, told: dict[str, Any], settings: DonorSettings) -> list[CutoutRow]:
    """The people of a curated sample who can be cut out: large enough, standing, whole, and apart from all others.

    Where the pose is known, people who sit are left out: nothing would be under them.

    Args:
        index: of the sample in the dataset that it will be read from.
        told: a row of `dataset_tools.shard_table.TABLE_SCHEMA`, `DONOR_COLUMNS` of it.
        settings: what is demanded of donors.
    """
    width, height = told["width"], told["height"]
    rows = []
    for number, person in enumerate(told["people"]):
        x, y, w, h = (round(v) for v in person["box"])
        truncated = y + h >= height
        flagged = (person["occluded"] and not settings.allow_occluded) or (
            person["truncated"] and not settings.allow_truncated
        )
        cut_off = x <= 0 or y <= 0 or x + w >= width or (truncated and not settings.allow_truncated)
        if flagged or cut_off or h < settings.min_height or person["sits"] or person["touches"]:
            continue
        if person["mask_by"] != "annotated" and (
            person["mask_score"] < settings.min_score or (settings.whole_body and not person["whole"])
        ):
            continue
        rows.append(
            CutoutRow(
                sample=index,
                person=number,
                key=told["key"],
                height=h,
                width=w,
                category=person["category"],
                truncated=truncated,
            )
        )
    return rows


def sits(keypoints: np.ndarray) -> bool:
    """Whether, by a skeleton (18, 3), somebody sits.

    A thigh reaches down less than half as far as the lower leg, on a side where both are known.
    """
    sides = [[KEYPOINTS.index(f"{side}_{joint}") for joint in ("hip", "knee", "ankle")] for side in ("left", "right")]
    return any(
        (keypoints[side, 2] > 0).all() and np.diff(keypoints[side, 1])[0] < 0.5 * np.diff(keypoints[side, 1])[1]
        for side in sides
    )


def is_whole(keypoints: np.ndarray, mask: np.ndarray) -> bool:
    """Whether a skeleton (18, 3) is whole and that of a mask (H, W), as `DonorSettings.whole_body` says."""
    top, bottom, _, _ = bounds(mask)
    third, room = (bottom - top) / 3, round(_JOINT_ERROR * (bottom - top))
    found, y = keypoints[:, 2] > 0, keypoints[:, 1]
    needed = [
        (found & (y < top + third))[_HEAD],
        found[_SHOULDERS],
        found[_HIPS],
        bottom >= len(mask) or (found & (y >= bottom - third))[_ANKLES],
    ]
    return all(np.any(one) for one in needed) and all(
        mask[max(0, row - room) : max(0, row + room + 1), max(0, column - room) : max(0, column + room + 1)].any()
        for column, row in np.rint(keypoints[found, :2]).astype(int)
    )


def cut_out(sample: Sample, person: int, settings: DonorSettings) -> Cutout:
    """Cut ``sample.people[person]`` out, with a soft edge that keeps nothing of the old background.

    The edge follows the smoothed mask, slightly inside; colours near it are carried outward from further inside
    (normalised convolution), so no halo of the old background is left.

    Raises:
        Rejected: ``soft-border``, where a network's mask does not follow a sharp border in the picture.
    """
    donor = sample.people[person]
    height, width = donor.mask.shape
    top, bottom, left, right = bounds(donor.mask)
    if donor.mask_by != "annotated":
        border = border_width(sample.image, donor.mask)
        allowed = max(_ANY_BORDER, settings.max_border_width * (bottom - top))
        if border > allowed:
            raise Rejected(
                "soft-border",
                f"{donor.id}: colours change within {border:.0f} pixels around the outline, {allowed:.0f} are allowed",
            )
    sigma = max(0.6, 0.002 * (bottom - top))
    room = int(np.ceil(4 * sigma))
    y0, y1, x0, x1 = max(0, top - room), min(height, bottom + room), max(0, left - room), min(width, right + room)
    window = np.s_[y0:y1, x0:x1]
    mask, rgb = donor.mask[window], sample.image[window]

    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    alpha = np.clip((soft - 0.25) / 0.6, 0, 1)
    core = (soft > 0.9).astype(np.float32)[..., None]
    inside = mask.astype(np.float32)[..., None]

    def carry(weight: np.ndarray, blur: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        reached = blur(weight)[..., None]
        return blur(rgb * weight) / np.maximum(reached, 1e-6), reached

    replicate = cv2.BORDER_REPLICATE
    near, reached = carry(core, lambda array: cv2.GaussianBlur(array, (0, 0), 1.5 * sigma, borderType=replicate))
    far, _ = carry(inside, lambda array: cv2.blur(array, (4 * room + 1, 4 * room + 1), borderType=replicate))
    # Fingers and the like have no core to carry colours from: within the mask they keep their own.
    np.copyto(far, rgb, where=inside > 0)
    far += np.minimum(50 * reached, 1) * (near - far)
    np.copyto(far, rgb, where=core > 0)
    rgb = np.rint(far, out=far).clip(0, 255, out=far).astype(np.uint8)

    labels = np.full(mask.shape, NO_PARSING, np.uint8)
    if sample.label_set != "none":
        labels = np.where(mask, sample.parsing[window], 0).astype(np.uint8)
    keypoints = donor.keypoints - np.array([x0, y0, 0], np.float32)
    keypoints[donor.keypoints[:, 2] <= 0] = 0
    source, cut = sample.origins[0], f"cut out {donor.id} {x1 - x0}x{y1 - y0}+{x0}+{y0}"
    return Cutout(
        rgba=np.dstack([rgb, np.rint(255 * alpha).astype(np.uint8)]),
        parsing=labels,
        label_set=sample.label_set,
        keypoints=keypoints.astype(np.float32),
        made_by=replace(sample.made_by, plate=MadeBy(), effects=MadeBy()),
        mask_by=donor.mask_by,
        mask_score=donor.mask_score,
        category=donor.category,
        id=f"{sample.key}/{donor.id}",
        truncated=bottom >= height,
        origin=replace(source, role="person", transform="; ".join(filter(None, (source.transform, cut)))),
    )


def border_width(image: np.ndarray, mask: np.ndarray) -> float:
    """Width in pixels of the band around a mask's outline in which the colours change from person to background.

    Colours are followed across the outline, from the person to the background. Where the two differ clearly, the edge
    is as wide as their difference over the steepest slope between them (a step that a Gaussian of ``sigma`` has
    blurred: ``sigma * sqrt(2 * pi)``), and lies where that slope is. The band reaches over all of it on both sides of
    the outline: the edge's width and twice its distance. The median of all such places is given.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) bool, not empty.

    Returns:
        The person's height where person and background differ at too few places to tell.
    """
    top, bottom, left, right = bounds(mask)
    height = bottom - top
    scale = min(1.0, _BORDER_SCALE / height)
    reach = max(4, round(0.03 * scale * height))
    room = int(np.ceil((reach + 2) / scale))
    window = np.s_[max(0, top - room) : bottom + room, max(0, left - room) : right + room]
    rgb, person = (
        cv2.resize(np.ascontiguousarray(array[window]), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        for array in (image, mask.view(np.uint8))
    )

    contours, _ = cv2.findContours(person, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return float(height)
    outline = np.concatenate(contours)[:, 0]
    columns, rows = outline[:: max(1, len(outline) // _BORDER_PLACES)].T
    soft = cv2.GaussianBlur(person.astype(np.float32), (0, 0), 2)
    right_by, down_by = -cv2.Sobel(soft, -1, 1, 0)[rows, columns], -cv2.Sobel(soft, -1, 0, 1)[rows, columns]
    length = np.maximum(np.hypot(right_by, down_by), 1e-6)
    steps = np.arange(-reach, reach + 1)
    # The outline runs half a pixel outside of the outermost pixels' centres.
    x = (columns[:, None] + (right_by / length)[:, None] * (steps + 0.5)).astype(np.float32)
    y = (rows[:, None] + (down_by / length)[:, None] * (steps + 0.5)).astype(np.float32)
    colours = cv2.remap(rgb.astype(np.float32), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    sides = cv2.remap(person, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)

    across = colours[:, -3:].mean(axis=1) - colours[:, :3].mean(axis=1)
    difference = np.linalg.norm(across, axis=1)
    # Where a limb or a gap is narrow, the far side of it is not what the colours at the outline change to.
    clear = (difference >= _CONTRAST) & (sides[:, 0] > 0) & (sides[:, -1] == 0)
    if np.count_nonzero(clear) < _FEWEST_PLACES:
        return float(height)
    profiles = np.einsum("psc,pc->ps", colours[clear], across[clear] / difference[clear, None])
    slopes = (profiles[:, 2:] - profiles[:, :-2]) / 2
    widths = difference[clear] / slopes.max(axis=1)
    distances = np.abs(steps[1:-1][slopes.argmax(axis=1)])
    return float(np.median(widths + 2 * distances)) / scale
