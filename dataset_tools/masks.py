"""Masks of people, (H, W) bool: fitting to the image, cleaning, the others' mask, and realistic faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from pydantic import Field

from dataset_tools.errors import Rejected
from dataset_tools.schema import KEYPOINTS
from dataset_tools.settings import Settings

BONES: tuple[tuple[str, str], ...] = (
    ("neck", "right_shoulder"), ("right_shoulder", "right_elbow"), ("right_elbow", "right_wrist"),
    ("neck", "left_shoulder"), ("left_shoulder", "left_elbow"), ("left_elbow", "left_wrist"),
    ("neck", "right_hip"), ("right_hip", "right_knee"), ("right_knee", "right_ankle"),
    ("neck", "left_hip"), ("left_hip", "left_knee"), ("left_knee", "left_ankle"),
    ("neck", "nose"), ("nose", "right_eye"), ("right_eye", "right_ear"), ("nose", "left_eye"), ("left_eye", "left_ear"),
)  # fmt: skip
"""The 17 bones of the OpenPose skeleton that joins `dataset_tools.schema.KEYPOINTS`."""
_LIMBS = ((1, 2), (2,), (4, 5), (5,), (7, 8), (8,), (10, 11), (11,))
"""What may be dropped, as indices of `BONES`: whole arms, forearms, whole legs, lower legs."""


class MaskSettings(Settings):
    """Which masks are usable, and how they are cleaned."""

    min_area: float = Field(0.0005, ge=0, lt=1)
    """Smallest usable person, as a share of the image's area."""
    max_area: float = Field(0.9, gt=0, le=1)
    """Masks that cover more than this share of the image are rejected, and those that cover more than half of it with
    nearly all of its border: they are inverted, as a rule. 1 accepts any."""
    min_island: float = Field(0.02, ge=0, le=1)
    """Connected parts smaller than this share of the largest part are removed as specks."""
    max_hole: float = Field(0.005, ge=0, le=1)
    """Holes up to this share of the mask's area are filled; larger ones (an arm on a hip) stay."""
    aspect_tolerance: float = Field(0.02, ge=0)
    """By how much, relatively, the aspect ratio of a mask may differ from that of its image."""


class AugmentSettings(Settings):
    """Faults of annotators and networks, put into masks. Lengths are shares of the person's height."""

    dilate_probability: float = Field(0.4, ge=0, le=1)
    """Probability that a mask is too wide."""
    erode_probability: float = Field(0.25, ge=0, le=1)
    """Probability that a mask is too narrow, among those that are not too wide."""
    max_width_error: float = Field(0.04, ge=0, le=0.5)
    """Largest dilation; the largest erosion is half of it, or thin limbs would vanish."""
    shift_probability: float = Field(0.3, ge=0, le=1)
    """Probability that a mask is displaced."""
    max_shift: float = Field(0.03, ge=0, le=0.5)
    """Largest displacement along each axis."""
    drop_probability: float = Field(0.3, ge=0, le=1)
    """Probability that an arm or leg, or without keypoints some protruding part, is missing."""
    polygon_probability: float = Field(0.3, ge=0, le=1)
    """Probability that the outline is a coarse polygon, as annotators click it."""
    max_polygon_error: float = Field(0.02, ge=0, le=0.5)
    """Largest distance between the polygon and the true outline."""


def fit_mask(mask: np.ndarray, size: tuple[int, int], settings: MaskSettings) -> np.ndarray:
    """Resize a mask (h, w) to its image's ``size`` (height, width), taking the nearest pixel.

    Sizes that differ by rounding alone (off by one) always fit.

    Raises:
        Rejected: ``mask-size-mismatch`` where the aspect ratios differ by more than the tolerance.
    """
    if mask.shape == size:
        return mask
    (mask_height, mask_width), (height, width) = mask.shape, size
    stretch = (mask_width / width) / (mask_height / height)
    # Rounded sizes of one scale s: |mask_width - s width| <= 1 and |mask_height - s height| <= 1 for some s.
    lowest = max((mask_width - 1) / width, (mask_height - 1) / height)
    highest = min((mask_width + 1) / width, (mask_height + 1) / height)
    if max(stretch, 1 / stretch) > 1 + settings.aspect_tolerance and lowest > highest:
        raise Rejected(
            "mask-size-mismatch",
            f"the mask is {mask_width}x{mask_height} pixels, its image {width}x{height}: another aspect ratio",
        )
    return cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT) > 0


def border_share(mask: np.ndarray) -> float:
    """Share of the picture's outermost pixels that are in a mask (h, w) bool, 0..1."""
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return np.count_nonzero(border) / len(border)


def why_inverted(mask: np.ndarray, max_area: float = MaskSettings().max_area) -> str | None:
    """What is wrong with a mask (H, W) that covers too much of its picture to be one person; None where it does not.

    Args:
        mask: bool.
        max_area: see `MaskSettings.max_area`.
    """
    area = np.count_nonzero(mask) / mask.size
    if area > max_area or (max_area < 1 and area > 0.5 and border_share(mask) > 0.8):
        return f"{area:.0%} of the picture would go; is the mask inverted?"
    return None


def why_much(masks: Sequence[np.ndarray]) -> str | None:
    """What to tell somebody whose masks (H, W), each of a sensible size, cover most of the picture together."""
    area = np.logical_or.reduce(list(masks)).mean() if len(masks) else 0.0
    return f"{area:.0%} of the picture will go" if area > MaskSettings().max_area else None


def clean_mask(mask: np.ndarray, settings: MaskSettings) -> np.ndarray:
    """Remove specks and fill pinholes of a mask (H, W).

    Raises:
        Rejected: ``empty-mask``, ``mask-covers-everything`` or ``mask-too-small``.
    """
    if not mask.any():
        raise Rejected("empty-mask", "no pixel belongs to the person")
    top, bottom, left, right = bounds(mask)
    # One pixel around the person, so that what touches the frame of this crop is outside, not a hole.
    crop = np.pad(mask[top:bottom, left:right], 1).view(np.uint8)

    _, labels, stats, _ = cv2.connectedComponentsWithStats(crop, connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    kept = areas >= settings.min_island * areas[1:].max()
    kept[0] = False
    clean = kept[labels]

    _, labels, stats, _ = cv2.connectedComponentsWithStats((~clean).view(np.uint8), connectivity=4)
    filled = stats[:, cv2.CC_STAT_AREA] <= settings.max_hole * np.count_nonzero(clean)
    filled[[0, labels[0, 0]]] = False  # label 0 is the person, the corner's label the outside
    clean |= filled[labels]

    area = np.count_nonzero(clean) / mask.size
    if area < settings.min_area:
        raise Rejected("mask-too-small", f"the mask covers {area:.4%} of the image")
    result = np.zeros_like(mask)
    result[top:bottom, left:right] = clean[1:-1, 1:-1]
    if inverted := why_inverted(result, settings.max_area):
        raise Rejected("mask-covers-everything", inverted)
    return result


def others(masks: Sequence[np.ndarray], k: int) -> np.ndarray:
    """M_others of person ``k`` (paper, section 3.3): clamp(sum of the other people's masks, 0, 1), as bool (H, W)."""
    total = np.zeros(masks[k].shape, bool)
    for index, mask in enumerate(masks):
        if index != k:
            total |= mask
    return total


def occlusion(visible: np.ndarray, complete: np.ndarray) -> float:
    """Share of ``complete`` (H, W) that is not ``visible``, 0..1. Raises `ValueError` for an empty complete mask."""
    area = np.count_nonzero(complete)
    if area == 0:
        raise ValueError("the complete mask is empty")
    return float(1 - np.count_nonzero(visible & complete) / area)


def touching(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two masks (H, W) overlap or have neighbouring pixels (8-neighbourhood)."""
    if not (a.any() and b.any()):
        return False
    tops, bottoms, lefts, rights = np.array([bounds(a), bounds(b)]).T
    top, bottom, left, right = tops.max(), bottoms.min(), lefts.max(), rights.min()
    if top > bottom or left > right:
        return False
    window = np.s_[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1]
    grown = cv2.dilate(a[window].astype(np.uint8), np.ones((3, 3), np.uint8))
    return bool((grown.view(bool) & b[window]).any())


def stratum(masks: Sequence[np.ndarray]) -> str:
    """Stratum of an image by its people's masks, all of one size (H, W).

    ``overlapping`` where any two people touch or overlap, otherwise ``one``, ``two_or_three`` or ``four_or_more``.
    """
    if any(touching(a, b) for index, a in enumerate(masks) for b in masks[:index]):
        return "overlapping"
    return "one" if len(masks) == 1 else "two_or_three" if len(masks) <= 3 else "four_or_more"


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a mask that is not empty: ``mask[top:bottom, left:right]`` holds all of it."""
    left, top, width, height = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
    return top, top + height, left, left + width


def augment_mask(
    mask: np.ndarray, keypoints: np.ndarray, rng: np.random.Generator, settings: AugmentSettings
) -> np.ndarray:
    """A mask (H, W) with the faults that annotators and networks make.

    Args:
        mask: (H, W) bool.
        keypoints: (18, 3): x, y in pixels and score, 0 where unknown; limbs are dropped along them.
        rng: source of all randomness.
        settings: which faults, how often and how large.

    Returns:
        (H, W) bool; never empty unless ``mask`` is.
    """
    if not mask.any():
        return mask.copy()
    top, bottom, left, right = bounds(mask)
    height = bottom - top
    # All work is done in a crop with room for the largest dilation, shift and polygon error.
    room = 2 + int(np.ceil(height * (settings.max_width_error + settings.max_shift + settings.max_polygon_error)))
    y0, x0 = max(0, top - room), max(0, left - room)
    window = np.s_[y0 : bottom + room, x0 : right + room]
    crop = mask[window]
    joints = keypoints - np.array([x0, y0, 0], keypoints.dtype)

    faults: list[Callable[[np.ndarray], np.ndarray]] = []
    if rng.random() < settings.drop_probability:
        faults.append(lambda m: _drop_limb(m, joints, rng))
    if rng.random() < settings.polygon_probability:
        error = rng.uniform(0.25, 1) * settings.max_polygon_error * height
        faults.append(lambda m: _coarse_polygon(m, error))
    wide, narrow = rng.random() < settings.dilate_probability, rng.random() < settings.erode_probability
    radius = round(rng.uniform(0.1, 1) * settings.max_width_error * height * (1 if wide else 0.5))
    if (wide or narrow) and radius > 0:
        operation = cv2.MORPH_DILATE if wide else cv2.MORPH_ERODE
        faults.append(lambda m: _morph(m, operation, radius))
    if rng.random() < settings.shift_probability:
        right_by, down_by = np.round(rng.uniform(-1, 1, 2) * settings.max_shift * height).astype(int)
        faults.append(lambda m: _shift(m, int(right_by), int(down_by)))

    for fault in faults:
        faulty = fault(crop)
        crop = faulty if faulty.any() else crop
    result = np.zeros_like(mask)
    result[window] = crop
    return result


def _morph(mask: np.ndarray, operation: int, radius: int) -> np.ndarray:
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    return cv2.morphologyEx(mask.astype(np.uint8), operation, disc).view(bool)


def _shift(mask: np.ndarray, right_by: int, down_by: int) -> np.ndarray:
    height, width = mask.shape
    right_by, down_by = min(max(right_by, -width), width), min(max(down_by, -height), height)
    result = np.zeros_like(mask)
    result[max(0, down_by) : height + min(0, down_by), max(0, right_by) : width + min(0, right_by)] = mask[
        max(0, -down_by) : height - max(0, down_by), max(0, -right_by) : width - max(0, right_by)
    ]
    return result


def _coarse_polygon(mask: np.ndarray, error: float) -> np.ndarray:
    result = np.zeros(mask.shape, np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.fillPoly(result, [cv2.approxPolyDP(contour, error, True) for contour in contours], 1)
    return result.view(bool)


def _drop_limb(mask: np.ndarray, keypoints: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Remove the pixels that are nearest to the bones of one arm or leg; a protruding part where none is known."""
    ends = np.array([[KEYPOINTS.index(a), KEYPOINTS.index(b)] for a, b in BONES])
    known = (keypoints[ends, 2] > 0).all(axis=1)
    limbs = [limb for limb in _LIMBS if known[list(limb)].all()]
    if not limbs or known.sum() == len(limbs[0]):
        return _drop_protrusion(mask, rng)
    dropped = limbs[rng.integers(len(limbs))]
    rows, columns = np.nonzero(mask)
    nearest = np.full(len(rows), np.inf, np.float32)
    gone = np.zeros(len(rows), bool)
    for bone in np.flatnonzero(known):
        (x0, y0), (x1, y1) = keypoints[ends[bone], :2].astype(np.float32)
        along_x, along_y = x1 - x0, y1 - y0
        x, y = columns.astype(np.float32) - x0, rows.astype(np.float32) - y0
        t = np.clip((x * along_x + y * along_y) / max(along_x**2 + along_y**2, np.float32(1e-6)), 0, 1)
        distance = (x - t * along_x) ** 2 + (y - t * along_y) ** 2
        closer = distance < nearest
        nearest[closer] = distance[closer]
        gone[closer] = bone in dropped
    result = mask.copy()
    result[rows[gone], columns[gone]] = False
    return result


def _drop_protrusion(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Remove one part that an opening by about half the body's width takes away."""
    padded = np.pad(mask, 1).view(np.uint8)
    radius = max(1, round(0.5 * float(cv2.distanceTransform(padded, cv2.DIST_L2, 3).max())))
    body = _morph(padded.view(bool), cv2.MORPH_OPEN, radius)
    parts, labels, stats, _ = cv2.connectedComponentsWithStats(
        (padded.view(bool) & ~body).view(np.uint8), connectivity=8
    )
    sizes = stats[1:, cv2.CC_STAT_AREA]
    large = 1 + np.flatnonzero(sizes >= 0.02 * np.count_nonzero(mask))
    if parts == 1 or len(large) == 0:
        return mask
    return mask & (labels[1:-1, 1:-1] != large[rng.integers(len(large))])
