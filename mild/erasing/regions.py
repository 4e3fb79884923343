"""Where a picture is worked on, and how results are put back: windows around people, cut out and pasted seamlessly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from dataset_tools.errors import UserError

MARGIN = 0.015
"""How far the editable area reaches beyond a mask unless told otherwise, as a share of the square root of the mask's
area."""
LEAST_MARGIN = 2
"""Pixels. Linear resampling reaches one pixel and an antialiased outline about one, so this holds both."""
CONTEXT = 2.0
"""Surroundings on each side of a hole, as a share of the square root of its area: a hole fills at most
1 / (1 + 2 * 2)^2 = 0.04 of its window, where the picture has that much. Half of it fills the drawn world's holes 0.3 dB
worse."""
FILL = (1 + 2 * CONTEXT) ** -2
JUMP = 80.0
"""Difference in colour at a hole's border, of 255, of which `colours_matched` takes away 1 / e."""
ELONGATION = 2
"""Longer over shorter side that a window is held to."""

_Box = tuple[tuple[int, int], tuple[int, int]]
"""First and past-the-last row, first and past-the-last column."""


def editable(masks: Sequence[np.ndarray] | np.ndarray, targets: Iterable[int], margin: float = MARGIN) -> np.ndarray:
    """Where pixels may change when people are erased: their masks, each widened by a margin that grows with it.

    Masks end inside soft edges; what is left of a person there tells the network, and the eye, that somebody stood
    there. A person's margin is by default 1.5 % of the square root of the mask's area, rounded up, and at least 2
    pixels (Euclidean distance): 2 pixels for a person of 60 x 200, 18 for one of 700 x 2000.

    Args:
        masks: one (H, W) bool a person, at least one.
        targets: indices of the people who are erased; none gives an empty area.
        margin: share of the square root of a mask's area; 0 takes the masks as they are.

    Returns:
        (H, W) bool.

    Raises:
        UserError: ``margin`` is negative or no number.
    """
    if not 0 <= margin < math.inf:
        raise UserError(f"margin is {margin}: give 0, or a share such as {MARGIN}")
    area = np.zeros(masks[0].shape, bool)
    for index in targets:
        box = box_of(masks[index])
        if box is None:
            continue
        reach = math.ceil(min(margin * math.sqrt(np.count_nonzero(masks[index])), math.hypot(*area.shape)))
        reach = max(LEAST_MARGIN, reach) if margin else 0
        window = tuple(slice(max(0, low - reach), high + reach) for low, high in box)
        area[window] |= _distance_to(masks[index][window]) <= reach
    return area


LARGEST_RESOLUTION = 8192
"""Pixels of the side of a square that is worked on at most; no UNet goes through more."""


@dataclass(frozen=True)
class Region:
    """A window of a picture, and the size at which it is worked on."""

    rows: slice
    columns: slice
    size: tuple[int, int]
    """Working height and width, in pixels."""


def plan_regions(holes: Iterable[np.ndarray], resolution: int, multiple: int, most: int | None = None) -> list[Region]:
    """Windows that hold all holes: one a group of holes near each other, pairwise disjoint, top-left first.

    A window has surroundings on all sides, so that its holes fill at most 0.04 of it; it measures at least
    ``resolution`` on both sides, so that nothing is enlarged needlessly; and it is at most twice as long as wide:
    each as far as the picture allows. At the border of the picture it is shifted inwards. Where windows overlap,
    their holes get one window together.

    Args:
        holes: (H, W) bool each, the editable area of one target; an empty one needs no window.
        resolution: square root of the pixels that are worked on in each window.
        multiple: what the sides of the working size must be divisible by.
        most: of windows that are more than twice as large, which are halved as far as this allows; None: the same.

    Returns:
        Regions whose working size has the shape of the window and an area of about a resolution squared; sides are
        rounded to multiples, and the shorter one is at least ``multiple`` (of a window longer than that allows, the
        shape gives way, not the area).
    """
    groups, size = [], (0, 0)
    for hole in holes:
        size = hole.shape
        if (box := box_of(hole)) is not None:
            groups.append((box, int(np.count_nonzero(hole))))
    windows = [_window(box, area, size, resolution) for box, area in groups]
    while pair := _overlapping(windows):
        (a, area), (b, other_area) = (groups[i] for i in pair)
        box = (
            (min(a[0][0], b[0][0]), max(a[0][1], b[0][1])),
            (min(a[1][0], b[1][0]), max(a[1][1], b[1][1])),
        )
        for i in reversed(pair):
            del groups[i], windows[i]
        groups.append((box, area + other_area))
        windows.append(_window(*groups[-1], size, resolution))
    found = []
    for rows, columns in sorted(windows, key=lambda window: (window[0][0], window[1][0])):
        side = min(max(round(math.sqrt(_area(rows, columns)) / 2), resolution), most or resolution)
        found.append(Region(slice(*rows), slice(*columns), _working_size(rows, columns, side, multiple)))
    return found


def resized(region: Region, resolution: int, multiple: int) -> Region:
    """The same window at another working size: see `plan_regions`."""
    rows, columns = (region.rows.start, region.rows.stop), (region.columns.start, region.columns.stop)
    return replace(region, size=_working_size(rows, columns, resolution, multiple))


def square_side(hole: np.ndarray, resolution: int) -> int:
    """Side in pixels of a square about as large as the window that `plan_regions` has for a hole (H, W) bool.

    At most the picture's shorter side.
    """
    box = box_of(hole)
    if box is None:
        return min(resolution, *hole.shape)
    rows, columns = _window(box, int(np.count_nonzero(hole)), hole.shape, resolution)
    return min(round(math.sqrt(_area(rows, columns))), *hole.shape)


def cut_picture(image: np.ndarray, region: Region) -> np.ndarray:
    """The window of ``image`` (H, W, 3) uint8 at working size, (h, w, 3) uint8.

    Area averages where it shrinks (no aliasing); linear where it grows: unlike a cubic it overshoots nowhere, and a
    person's colours reach no further than one pixel, which the margin of `editable` holds.
    """
    return _resized(image[region.rows, region.columns], region.size, cv2.INTER_LINEAR)


def cut_mask(mask: np.ndarray, region: Region) -> np.ndarray:
    """The window of ``mask`` (H, W) bool at working size, (h, w) bool: every pixel that the mask touches.

    That is every pixel to which `cut_picture` brings any colour from inside the mask, so that nothing of a person
    shines through.
    """
    return cut_soft(mask, region) > 0


def cut_soft(mask: np.ndarray, region: Region) -> np.ndarray:
    """The window of ``mask`` (H, W) bool at working size, (h, w) float32: the share of each pixel that it covers."""
    # OpenCV's averages of ones may end a rounding error above one.
    return _resized(mask[region.rows, region.columns].astype(np.float32), region.size, cv2.INTER_LINEAR).clip(0, 1)


def prefilled(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """``picture`` with the hole filled by smooth colours from around it, as a start for diffusion.

    SDXL's schedule never reaches pure noise: about 7 % of the start's amplitude is picture, and that must not be the
    person. Averages of known pixels are taken over ever larger areas, and each unknown pixel gets that of the
    smallest area that knows any (pull-push interpolation, Gortler et al. 1996, "The Lumigraph", section 3.4); none
    comes from inside the hole.

    Args:
        picture: (h, w, 3) uint8.
        hole: (h, w) bool.

    Returns:
        (h, w, 3) uint8, outside the hole bit-identical; mid-grey (128) where the hole covers everything.
    """
    if hole.all():
        return np.full_like(picture, 128)
    filled = _spread(picture, ~hole)
    return np.where(hole[..., None], np.rint(np.clip(filled, 0, 255)).astype(np.uint8), picture)


def colours_matched(painted: np.ndarray, picture: np.ndarray, hole: np.ndarray, width: float) -> np.ndarray:
    """What was painted into a hole, its colours brought nearer to those around it, so that no outline stays to be seen.

    A network that paints lawn too pale leaves a pale person on it. Just inside the hole's border the difference to the
    colours just outside is taken, spread smoothly over the hole and added, as Poisson blending does (Pérez et al. 2003,
    "Poisson Image Editing", membrane). Unlike there, a difference that is large (against `JUMP`) counts for little: it
    is an edge that was there, or part of a person that the mask missed. No part of the paper.

    Args:
        painted: (h, w, 3) uint8.
        picture: (h, w, 3) uint8, of which nothing inside the hole is looked at.
        hole: (h, w) bool.
        width: of the strips on both sides of the border whose mean colours are compared, in pixels.

    Returns:
        (h, w, 3) uint8, outside the hole ``painted`` unchanged.
    """
    to_outside, to_hole = _distance_to(~hole), _distance_to(hole)
    inner, outer = hole & (to_outside <= width), ~hole & (to_hole <= width)
    if not inner.any() or not outer.any():
        return painted
    difference = _near_mean(picture, outer, width) - _near_mean(painted, inner, width)
    size = np.abs(difference).max(-1, keepdims=True)
    added = _spread(np.exp(-np.square(size / JUMP)) * difference, inner)
    matched = np.rint(np.clip(painted + added, 0, 255)).astype(np.uint8)
    return np.where(hole[..., None], matched, painted)


def paste(
    canvas: np.ndarray, painted: np.ndarray, region: Region, core: np.ndarray, editable: np.ndarray
) -> np.ndarray:
    """``canvas`` with what was painted put back into its window, without a seam.

    Args:
        canvas: (H, W, 3) uint8.
        painted: (h, w, 3) uint8, at the region's working size.
        region: the window.
        core: (H, W) bool, where painted pixels count fully: the masks as given. Without any, nothing is pasted.
        editable: (H, W) bool, where pixels may change at all. Between core and border the weight falls smoothly.

    Returns:
        (H, W, 3) uint8, a new array, outside the window and outside ``editable`` bit-identical to ``canvas``.
    """
    result = canvas.copy()
    window = region.rows, region.columns
    within, old = editable[window], canvas[window]
    core = core[window] & within
    if not core.any():
        return result
    # Lanczos where it grows: sharpest, and its faint ringing ends in the painted area like everything else.
    new = _resized(painted, old.shape[:2], cv2.INTER_LANCZOS4)
    # A window of a large photograph has hundreds of megapixels, the hole a few: floats for those around it only.
    box = box_of(within)
    assert box is not None
    around = tuple(slice(max(0, low - 1), high + 1) for low, high in box)
    within, core, old, new = within[around], core[around], old[around], new[around].astype(np.float32)
    to_border = _distance_to(~within)
    ramp = to_border / (to_border + _distance_to(core))
    weight = ramp * ramp * (3 - 2 * ramp)
    blended = np.rint(old + weight[..., None] * (new - old)).astype(np.uint8)
    result[window][around] = np.where(within[..., None], blended, old)
    return result


def _spread(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Values (h, w, C) where they are known, and elsewhere averages of them, by pull-push interpolation; float32."""
    share = known.astype(np.float32)
    levels = [(values.astype(np.float32) * share[..., None], share)]
    while max(share.shape) > 1:
        size = ((share.shape[0] + 1) // 2, (share.shape[1] + 1) // 2)
        sums, share = (_resized(part, size, cv2.INTER_LINEAR) for part in levels[-1])
        levels.append((sums, share))
    sums, share = levels.pop()
    spread = sums / share[..., None]
    for sums, share in reversed(levels):
        # Sums are averages times the known share: what is missing to a share of one comes from the coarser level.
        spread = sums + (1 - share[..., None]) * _resized(spread, share.shape, cv2.INTER_LINEAR)
    return spread


def _near_mean(picture: np.ndarray, where: np.ndarray, sigma: float) -> np.ndarray:
    """Means (h, w, 3) float32 of the picture's pixels in ``where``, the nearer ones counting more (Gaussian)."""
    share = where.astype(np.float32)
    sums = cv2.GaussianBlur(picture * share[..., None], (0, 0), sigma)
    return sums / np.maximum(cv2.GaussianBlur(share, (0, 0), sigma), 1e-6)[..., None]


def box_of(mask: np.ndarray) -> _Box | None:
    """The box around what is True; None where nothing is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)


def _distance_to(mask: np.ndarray) -> np.ndarray:
    """Euclidean distance of each pixel to the nearest True one, float32; huge where there is none."""
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def _window(box: _Box, area: int, picture: tuple[int, ...], resolution: int) -> _Box:
    """The window for a box in which ``area`` pixels are holes."""
    (top, bottom), (left, right) = box
    area = min(area, (bottom - top) * (right - left))
    context = math.ceil(2 * CONTEXT * math.sqrt(area))
    height, width = max(bottom - top + context, resolution), max(right - left + context, resolution)
    height, width = max(height, math.ceil(width / ELONGATION)), max(width, math.ceil(height / ELONGATION))
    height, width = min(height, picture[0]), min(width, picture[1])
    # What the picture cuts off on one axis, the other makes up for.
    height = min(max(height, math.ceil(area / FILL / width)), picture[0])
    width = min(max(width, math.ceil(area / FILL / height)), picture[1])
    y = min(max((top + bottom - height) // 2, 0), picture[0] - height)
    x = min(max((left + right - width) // 2, 0), picture[1] - width)
    return (y, y + height), (x, x + width)


def _overlapping(windows: list[_Box]) -> tuple[int, int] | None:
    """Indices of the first two windows that share a pixel."""
    for j, second in enumerate(windows):
        for i, first in enumerate(windows[:j]):
            if all(a[0] < b[1] and b[0] < a[1] for a, b in zip(first, second, strict=True)):
                return i, j
    return None


def _area(rows: tuple[int, int], columns: tuple[int, int]) -> int:
    return (rows[1] - rows[0]) * (columns[1] - columns[0])


def _working_size(rows: tuple[int, int], columns: tuple[int, int], resolution: int, multiple: int) -> tuple[int, int]:
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    shorter = max(multiple, resolution * math.sqrt(min(height, width) / max(height, width)))
    short, long = (max(1, round(side / multiple)) * multiple for side in (shorter, resolution**2 / shorter))
    return (short, long) if height <= width else (long, short)


def _resized(picture: np.ndarray, size: tuple[int, ...], growing: int) -> np.ndarray:
    """At ``size`` (height, width): area averages on axes that shrink, then ``growing`` (OpenCV's) on those that grow.

    OpenCV's own area averages do not average as soon as one axis grows.
    """
    height, width = picture.shape[:2]
    smaller = min(height, size[0]), min(width, size[1])
    if smaller != (height, width):
        picture = cv2.resize(picture, smaller[::-1], interpolation=cv2.INTER_AREA)
    if smaller != tuple(size):
        picture = cv2.resize(picture, (size[1], size[0]), interpolation=growing)
    return picture
