"""Structural similarity, by scikit-image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from mild.metrics.metric import UNKNOWN, Judged, NotComputed, PictureMetric, Region

WINDOW = 11
"""Side of the Gaussian window (sigma 1.5) that SSIM is defined with."""
_WHOLE_WINDOWS = np.s_[WINDOW // 2 : -(WINDOW // 2), WINDOW // 2 : -(WINDOW // 2)]
"""Pixels around which the picture holds all of the window."""


class SSIM(PictureMetric):
    """Over the whole picture (tables 3 and 4); windows are averaged around the pixels that are known."""

    kind: Literal["ssim"] = "ssim"
    packages: ClassVar[tuple[str, ...]] = ("scikit-image",)
    digits: ClassVar[int] = 4
    larger_is_better: ClassVar[bool] = True

    @property
    def title(self) -> str:
        """See `MetricSettings.title`."""
        return "SSIM"

    @property
    def region(self) -> Region:
        """See `MetricSettings.region`."""
        return "picture"

    def score(self, judged: Sequence[Judged]) -> list[float | NotComputed]:
        """See `PictureMetric.score`."""
        found: list[float | NotComputed] = []
        for one in judged:
            assert one.truth is not None
            if min(one.truth.shape[:2]) < WINDOW:
                found.append(NotComputed(f"the picture is smaller than SSIM's window of {WINDOW} pixels"))
            elif not one.known[_WHOLE_WINDOWS].any():
                found.append(NotComputed(UNKNOWN))
            else:
                found.append(ssim(one.result, one.truth, one.known))
        return found


def ssim(result: np.ndarray, truth: np.ndarray, known: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004), -1..1, mean over all windows around known pixels and three channels.

    Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, as in the paper.

    Args:
        result, truth: (H, W, 3) uint8, no smaller than the window.
        known: (H, W) bool, somewhere True where a window is whole.
    """
    from skimage.metrics import structural_similarity

    _, similarity = structural_similarity(
        truth,
        result,
        data_range=255,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return float(similarity[_WHOLE_WINDOWS][known[_WHOLE_WINDOWS]].mean(dtype=np.float64))
