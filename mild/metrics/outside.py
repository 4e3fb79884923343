"""What changed where no method may change anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from mild.metrics.metric import Judged, NotComputed, PictureMetric, Region


class ChangeOutside(PictureMetric):
    """Outside the mask that the method was given: 0 for methods that keep all pixels there."""

    kind: Literal["change_outside"] = "change_outside"
    digits: ClassVar[int] = 3
    larger_is_better: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """See `MetricSettings.title`."""
        return "Change outside, levels"

    @property
    def region(self) -> Region:
        """See `MetricSettings.region`."""
        return "outside"

    @property
    def reference(self) -> str:
        """See `MetricSettings.reference`."""
        return "none"

    def score(self, judged: Sequence[Judged]) -> list[float | NotComputed]:
        """See `PictureMetric.score`."""
        return [
            NotComputed("the mask given covers the whole picture")
            if one.given.all()
            else change_outside(one.result, one.image, one.given)
            for one in judged
        ]


def change_outside(result: np.ndarray, image: np.ndarray, given: np.ndarray) -> float:
    """Mean absolute difference outside a mask, over pixels and channels, in levels of 8 bits, 0..255.

    Args:
        result, image: (H, W, 3) uint8.
        given: (H, W) bool, somewhere False.
    """
    return float(np.abs(result[~given].astype(np.int16) - image[~given]).mean())
