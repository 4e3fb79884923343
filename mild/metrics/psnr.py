"""Peak signal-to-noise ratio, by scikit-image."""

from __future__ import annotations

import numpy as np
from skimage.metrics import peak_signal_noise_ratio

from mild.metrics.metric import check_hole, check_sizes


def psnr(result: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over the whole picture, peak 255; ``inf`` where both are identical.

    Args:
        result, truth: (H, W, 3) uint8.

    Raises:
        NotComputed: their sizes differ.
    """
    check_sizes(result, truth)
    if np.array_equal(result, truth):
        return float("inf")
    return float(peak_signal_noise_ratio(truth, result, data_range=255))


def psnr_hole(result: np.ndarray, truth: np.ndarray, hole: np.ndarray) -> float:
    """`psnr` over the pixels of ``hole``, (H, W) bool; ``inf`` where both are identical there."""
    check_sizes(result, truth)
    check_hole(hole, truth)
    return psnr(result[hole][None], truth[hole][None])
