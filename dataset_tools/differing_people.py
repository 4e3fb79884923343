"""People as the difference of a picture and its clean plate tells them, where nobody has drawn masks.

What darkens the plate smoothly and changes its colours as the sky's light does is taken for their shadow; a mirror
image cannot be told from a person. Two people who touch are one, and one who is seen in two parts is two: whoever needs
better sets an instance network.
"""

from __future__ import annotations

import cv2
import numpy as np

from dataset_tools.differences import Differences, DifferenceSettings, differences
from dataset_tools.errors import Rejected
from dataset_tools.masks import MaskSettings, clean_mask

_LEAST_AREA = 0.003
"""Share of the picture: what is smaller is a leaf or a piece of somebody."""
_SMOOTH = 0.2
"""A shadow's log-luminance changes by less than this from pixel to pixel, in the mean of five by five."""
_DARKEST_SHADOW = -1.2
"""Log-luminance."""
_TINTS = np.outer([0.0, 0.04, 0.08, 0.12, 0.16], [0.5, -1.0]).astype(np.float32)
"""Log red / green and blue / green that a shadow may gain per log-luminance: the sky, which fills it, is bluer than the
sun. All shadows of a picture have the same light, and so one of these tints."""
_SHADOW_CHROMA = 0.7
"""The colours of a shadow differ from those of the plate in its tint by less than so much of what is a difference."""
_EVEN = 0.1
"""By how much in log-luminance a shadow may be darker than the darkest fifth of all that looks like one."""
_ROUNDING = 0.006
"""Share of the picture's longer side: gaps of about this width are closed."""
_LARGEST_HOLE = 0.03
"""Share of the person's area: what looks like the plate within them is filled up to this."""


def people_by_difference(
    image: np.ndarray, background: np.ndarray, known: np.ndarray, settings: DifferenceSettings, masks: MaskSettings
) -> list[np.ndarray]:
    """The people in a picture, (H, W) bool each, from left to right; there may be none.

    Args:
        image: (H, W, 3) uint8 RGB.
        background: (H, W, 3) uint8 RGB, the clean plate.
        known: (H, W) bool: where it is known.
        settings: what counts as a difference.
        masks: which masks are usable, and how they are cleaned.

    Raises:
        Rejected: as `dataset_tools.differences.differences`.
    """
    found = differences(image, background, known, settings)
    differs = ((found.luminance_excess > 1) | (found.chroma_excess > 1)) & known
    shaded = background * np.exp(np.minimum(found.luminance, 0))[..., None]
    bodies = differs & ~_shadow(found, differences(image, shaded, known, settings), differs)
    radius = max(1, round(_ROUNDING * max(bodies.shape)))
    parts = cv2.morphologyEx(bodies.view(np.uint8), cv2.MORPH_OPEN, _disc(1))
    parts = cv2.morphologyEx(parts, cv2.MORPH_CLOSE, _disc(radius))
    parts = cv2.erode(parts, _disc(1))  # what is compared is blurred
    _, labels, stats, _ = cv2.connectedComponentsWithStats(parts, connectivity=8)
    large = 1 + np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= _LEAST_AREA * bodies.size)
    cleaning = masks.model_copy(update={"max_hole": max(masks.max_hole, _LARGEST_HOLE)})
    people = []
    for label in sorted(large, key=lambda label: int(stats[label, cv2.CC_STAT_LEFT])):
        try:
            people.append(clean_mask(labels == label, cleaning))
        except Rejected:
            continue
    return people


def _shadow(found: Differences, shaded: Differences, differs: np.ndarray) -> np.ndarray:
    """What of ``differs`` (H, W) bool looks like a shadow; ``shaded``: the differences from the plate made as dark."""
    change, texture = (cv2.blur(values, (5, 5)) for values in (found.change, found.texture))
    dark = (found.luminance < 0) & (found.luminance > _DARKEST_SHADOW) & differs
    dark &= change < np.maximum(_SMOOTH**2, 0.3 * texture)
    darkened = np.minimum(found.luminance, 0)[..., None]
    colours = [np.linalg.norm(shaded.chroma - tint * darkened, axis=2) / found.least_chroma for tint in _TINTS]
    shadow: np.ndarray = dark & (max(colours, key=lambda excess: np.count_nonzero(excess[dark] < 0.5)) < _SHADOW_CHROMA)
    if shadow.any():
        shadow &= found.luminance > np.quantile(found.luminance[shadow], 0.2) - _EVEN
    return shadow


def _disc(radius: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
