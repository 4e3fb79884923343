"""Peak signal-to-noise ratio, by scikit-image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from mild.metrics.metric import Judged, NotComputed, PictureMetric, Region


class PSNR(PictureMetric):
    """In dB: in the hole, or over the whole picture. Publications use both, and seldom say which."""

    kind: Literal["psnr", "psnr_hole"] = "psnr_hole"
    packages: ClassVar[tuple[str, ...]] = ("scikit-image",)
    digits: ClassVar[int] = 2
    larger_is_better: ClassVar[bool] = True

    @property
    def title(self) -> str:
        """See `MetricSettings.title`."""
        return "PSNR, dB" if self.kind == "psnr" else "PSNR hole, dB"

    @property
    def region(self) -> Region:
        """See `MetricSettings.region`."""
        return "picture" if self.kind == "psnr" else "hole"

    def score(self, judged: Sequence[Judged]) -> list[float | NotComputed]:
        """See `PictureMetric.score`."""
        found: list[float | NotComputed] = []
        for one in judged:
            assert one.truth is not None
            in_hole = self.kind == "psnr_hole"
            found.append(psnr_hole(one.result, one.truth, one.hole) if in_hole else psnr(one.result, one.truth))
        return found


def psnr(result: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 values of one shape, peak 255; ``inf`` where both are identical."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(result, truth):
        return float("inf")
    return float(peak_signal_noise_ratio(truth, result, data_range=255))


def psnr_hole(result: np.ndarray, truth: np.ndarray, hole: np.ndarray) -> float:
    """`psnr` over the pixels of ``hole``, (H, W) bool, not empty."""
    return psnr(result[hole], truth[hole])
