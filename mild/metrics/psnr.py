"""Peak signal-to-noise ratio, by scikit-image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from mild.metrics.metric import UNKNOWN, UNKNOWN_HOLE, Judged, NotComputed, PictureMetric, Region


class PSNR(PictureMetric):
    """In dB: in the hole, or over the whole picture; publications use both, and seldom say which. Or where, outside the
    hole, the picture before shows shadows and reflections of those who go, which methods without an idea of them leave;
    or in both.
    """

    kind: Literal["psnr", "psnr_hole", "psnr_effects", "psnr_hole_effects"] = "psnr_hole"
    packages: ClassVar[tuple[str, ...]] = ("scikit-image",)
    digits: ClassVar[int] = 2
    larger_is_better: ClassVar[bool] = True

    @property
    def title(self) -> str:
        """See `MetricSettings.title`."""
        return f"PSNR {'' if self.region == 'picture' else self.region}".strip() + ", dB"

    @property
    def region(self) -> Region:
        """See `MetricSettings.region`."""
        regions: dict[str, Region] = {
            "psnr": "picture",
            "psnr_hole": "hole",
            "psnr_effects": "effects",
            "psnr_hole_effects": "hole and effects",
        }
        return regions[self.kind]

    def score(self, judged: Sequence[Judged]) -> list[float | NotComputed]:
        """See `PictureMetric.score`."""
        found: list[float | NotComputed] = []
        for one in judged:
            assert one.truth is not None
            where, why = self._where(one)
            found.append(psnr_hole(one.result, one.truth, where) if where.any() else NotComputed(why))
        return found

    def _where(self, one: Judged) -> tuple[np.ndarray, str]:
        """(H, W) bool: what is looked at, and what to say where that is nothing."""
        if self.kind == "psnr":
            return one.known, UNKNOWN
        if self.kind == "psnr_hole":
            return one.known & one.hole, UNKNOWN_HOLE
        if one.effects is None:
            return np.zeros_like(one.known), "whether those who go leave shadows and reflections is not known"
        if self.kind == "psnr_hole_effects":
            return one.known & (one.hole | one.effects), UNKNOWN_HOLE
        return one.known & one.effects & ~one.hole, "no shadow or reflection of those who go lies outside the hole"


def psnr(result: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 values of one shape, peak 255; ``inf`` where both are identical."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(result, truth):
        return float("inf")
    return float(peak_signal_noise_ratio(truth, result, data_range=255))


def psnr_hole(result: np.ndarray, truth: np.ndarray, hole: np.ndarray) -> float:
    """`psnr` over the pixels of ``hole``, (H, W) bool, not empty."""
    return psnr(result[hole], truth[hole])
