"""Classical inpainting by OpenCV: the baselines that need no model."""

from __future__ import annotations

import cv2
import numpy as np

from mild.evaluation.methods import Case, check_background, keep_outside

RADIUS = 3.0
"""Neighbourhood that OpenCV looks at around each pixel to be filled."""


class OpenCVEraser:
    """``telea``: fast marching (Telea 2004); ``navier-stokes``: fluid dynamics (Bertalmio et al. 2001)."""

    algorithms = {"telea": cv2.INPAINT_TELEA, "navier-stokes": cv2.INPAINT_NS}  # noqa: RUF012

    def __init__(self, name: str) -> None:
        self.name = name
        self._algorithm = self.algorithms[name]

    def erase(self, case: Case, seed: int) -> np.ndarray:
        """Fill the hole; nothing is random, so ``seed`` does nothing. See `mild.evaluation.methods.Eraser.erase`."""
        check_background(case)
        if not case.hole.any():
            return case.image.copy()
        filled = cv2.inpaint(case.image, case.hole.astype(np.uint8) * 255, RADIUS, self._algorithm)
        return keep_outside(filled, case)
