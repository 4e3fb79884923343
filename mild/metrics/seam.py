"""How much the border of the mask shows in a result.

The measure is ours: no publication was found that defines one without a reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from mild.metrics.metric import Judged, NotComputed, PictureMetric, Region

REACH = 4
"""Steps between pixels, on either side of the border, that the step across it is compared with."""
ROUNDING = 1.0
"""Levels added to both sides of the ratio: a difference of one level is the rounding of 8 bits, and shows nowhere."""


class Seam(PictureMetric):
    """At the border of the mask that the method was given; 1: none to be told."""

    kind: Literal["seam"] = "seam"
    packages: ClassVar[tuple[str, ...]] = ("numpy", "opencv-python-headless")
    digits: ClassVar[int] = 3
    larger_is_better: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """See `MetricSettings.title`."""
        return "Seam (none: 1)"

    @property
    def region(self) -> Region:
        """See `MetricSettings.region`."""
        return "border"

    @property
    def reference(self) -> str:
        """See `MetricSettings.reference`."""
        return "none"

    def score(self, judged: Sequence[Judged]) -> list[float | NotComputed]:
        """See `PictureMetric.score`."""
        found: list[float | NotComputed] = []
        for one in judged:
            value = seam(one.result, one.given)
            found.append(NotComputed("the mask given has no border to look at") if value is None else value)
        return found


def seam(result: np.ndarray, given: np.ndarray) -> float | None:
    """Mean step across a border, relative to the mean step beside it; 1 where the border is like what lies beside it.

    A step is the absolute difference of two neighbouring pixels, the mean of their channels, in levels of 8 bits. Each
    step across the border is compared with those that go on from it in its own direction, up to `REACH` to the inside
    and to the outside, as far as they stay there. So whatever runs on over the border, such as a slope of brightness,
    gives 1 for masks of any shape; more than 1 is a seam, and less a border that is smoother than its sides.

        (mean over the border of the step + `ROUNDING`) / (mean over it of the mean step beside it + `ROUNDING`)

    Args:
        result: (H, W, 3) uint8.
        given: (H, W) bool.

    Returns:
        None where no step across the border has another beside it.
    """
    across, beside = [], []
    for picture, mask in ((result, given), (result.swapaxes(0, 1), given.T)):
        steps = np.abs(np.diff(picture.astype(np.int16), axis=1)).mean(2)
        crossing = np.diff(mask, axis=1)
        rows, columns = np.nonzero(crossing)
        total, count = np.zeros(len(rows)), np.zeros(len(rows))
        for direction in (-1, 1):
            free = np.ones(len(rows), bool)
            for distance in range(1, REACH + 1):
                there = columns + direction * distance
                free &= (there >= 0) & (there < steps.shape[1])
                there = there.clip(0, steps.shape[1] - 1)
                free &= ~crossing[rows, there]
                total += np.where(free, steps[rows, there], 0)
                count += free
        compared = count > 0
        across.append(steps[crossing][compared])
        beside.append(total[compared] / count[compared])
    if not sum(len(values) for values in across):
        return None
    return float((np.concatenate(across).mean() + ROUNDING) / (np.concatenate(beside).mean() + ROUNDING))
