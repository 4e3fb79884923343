"""What changed where no method may change anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from mild.metrics.metric import Judged, NotComputed, PictureMetric, Region


class ChangeOutside(PictureMetric):
    """Outside the mask that the method was given: 0 for methods that keep all pixels there.

    Where the picture is known to show shadows and reflections of those who go, it is no fault to change them.
    """

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
        free = [one.given if one.effects is None else one.given | one.effects for one in judged]
        return [
            NotComputed("the mask given, with the effects of those who go, covers the whole picture")
            if free_here.all()
            else change_outside(one.result, one.image, free_here)
            for one, free_here in zip(judged, free, strict=True)
        ]


def change_outside(result: np.ndarray, image: np.ndarray, free: np.ndarray) -> float:
    """Mean absolute difference outside a mask, over pixels and channels, in levels of 8 bits, 0..255.

    Args:
        result, image: (H, W, 3) uint8.
        free: (H, W) bool, what may change; somewhere False.
    """
    return float(np.abs(result[~free].astype(np.int16) - image[~free]).mean())
