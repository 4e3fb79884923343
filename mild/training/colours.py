"""Pictures in other colours: a network that knows few pictures fills the holes of others in the colours of those."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np


def other_colours(draw: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """A change of colours, pixel by pixel, for pictures (H, W, 3) uint8 RGB.

    Red, green and blue change places, all become more or less grey (from no colour at all to a third more), and each
    gets a gamma of its own, from 0.6 to 1.7.
    """
    order, strength = draw.permutation(3), draw.uniform(0, 4 / 3)
    curves = (np.linspace(0, 1, 256) ** np.exp(draw.uniform(-0.5, 0.5, (3, 1))) * 255).round().astype(np.uint8)
    curves = np.ascontiguousarray(curves.T[:, None])
    mixing = strength * np.eye(3) + (1 - strength) / 3

    def changed(picture: np.ndarray) -> np.ndarray:
        colours: np.ndarray = cv2.LUT(cv2.transform(np.ascontiguousarray(picture[..., order]), mixing), curves)
        return colours

    return changed
