"""Classical inpainting by OpenCV: the baselines that need no model."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import ClassVar, Literal

import cv2
import numpy as np

from dataset_tools.settings import digest_of
from mild.evaluation.methods import Case, MethodSettings, Setup, keep_outside

RADIUS = 3.0
"""Neighbourhood that OpenCV looks at around each pixel to be filled."""
_ALGORITHMS = {"telea": cv2.INPAINT_TELEA, "navier-stokes": cv2.INPAINT_NS}


class OpenCVMethod(MethodSettings):
    """``telea``: fast marching (Telea 2004); ``navier-stokes``: fluid dynamics (Bertalmio et al. 2001)."""

    kind: Literal["telea", "navier-stokes"] = "telea"
    warms_up: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """See `MethodSettings.title`."""
        return {"telea": "OpenCV Telea", "navier-stokes": "OpenCV Navier-Stokes"}[self.kind]

    def weights(self, setup: Setup) -> dict[str, str]:
        """There are none."""
        return {}

    def fingerprint(self, setup: Setup) -> str:
        """See `MethodSettings.fingerprint`."""
        return digest_of([1, self.kind, RADIUS, version("opencv-python-headless")])

    def open(self, setup: Setup) -> OpenCVMethod:
        """Itself: nothing has to be loaded."""
        return self

    def erase(self, cases: Sequence[Case], seeds: Sequence[int]) -> list[np.ndarray]:
        """Nothing is random, so ``seeds`` do nothing. See `mild.evaluation.methods.Eraser.erase`."""
        return [
            keep_outside(
                cv2.inpaint(case.image, case.hole.astype(np.uint8) * 255, RADIUS, _ALGORITHMS[self.kind]), case
            )
            for case in cases
        ]
