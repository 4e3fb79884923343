"""Masks continued by what the model says (`mild.model.extents`): what people left behind, and their hidden parts.

Only what hangs together with a person counts, and only so far from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

REACH = 2.0
"""How far from a person's mask they are followed at most, as a share of the square root of its area: shadows are about
as long as people are tall."""
LEFT_BEHIND = 0.7
"""Probability from which a pixel beside the masks is repainted. On drawn scenes 0.5 to 0.7 are alike; on photographs,
of which the nano base knows little, 0.7 repaints two thirds of what 0.5 does where nobody left anything."""
HIDDEN = 0.5
"""Probability from which a pixel of a hole is somebody's who stays. On drawn scenes 0.7 completes people less well."""


def followed(
    likely: np.ndarray, least: float, people: np.ndarray, passable: np.ndarray, limits: Sequence[float]
) -> np.ndarray:
    """Whose each pixel is, of those where the model sees somebody: followed from people outwards, the nearest first.

    Args:
        likely: (h, w) float32, probabilities.
        least: probability from which a pixel counts.
        people: (h, w) uint16, 0 nobody, k + 1 the person of index k.
        passable: (h, w) bool, where people are followed whatever the model says.
        limits: how far each person is followed, in pixels.

    Returns:
        (h, w) uint16 as ``people``, which it continues.
    """
    open_to = passable | (likely > least)
    owners, reach = people.copy(), np.array([0.0, *limits])
    for way in range(1, math.ceil(min(reach.max(), math.hypot(*people.shape))) + 1):
        # Square and cross in turn: together nearly a circle.
        shape = cv2.MORPH_RECT if way % 2 else cv2.MORPH_CROSS
        near = cv2.dilate(owners, cv2.getStructuringElement(shape, (3, 3)))
        reached = open_to & (owners == 0) & (reach[near] >= way)
        if not reached.any():
            break
        owners[reached] = near[reached]
    return owners


def enlarged(owners: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Owners (h, w) uint16, as `followed` gives them, at another ``size`` (height, width), with smooth outlines."""
    if owners.shape == tuple(size):
        return owners.astype(np.uint16)
    share = cv2.resize((owners > 0).astype(np.float32), (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    near = np.where(owners > 0, owners, cv2.dilate(owners, np.ones((3, 3), np.uint8)))
    labels: np.ndarray = cv2.resize(near, (size[1], size[0]), interpolation=cv2.INTER_NEAREST)
    return np.where(share >= 0.5, labels, 0).astype(np.uint16)
