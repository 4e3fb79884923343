"""Structural similarity, by scikit-image."""

from __future__ import annotations

import numpy as np
from skimage.metrics import structural_similarity

from mild.metrics.metric import NotComputed, check_sizes

WINDOW = 11
"""Side of the Gaussian window (sigma 1.5) that SSIM is defined with."""


def ssim(result: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004), -1..1, mean over the whole picture and the three channels.

    Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, as in the paper.

    Args:
        result, truth: (H, W, 3) uint8.

    Raises:
        NotComputed: their sizes differ, or they are smaller than the window.
    """
    check_sizes(result, truth)
    if min(truth.shape[:2]) < WINDOW:
        raise NotComputed(f"the picture is smaller than SSIM's window of {WINDOW} pixels")
    return float(
        structural_similarity(
            truth, result, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )
