"""How close a result is to the truth: one function a metric, by scikit-image and `mild.metrics.perceptual`.

All take two (H, W, 3) uint8 pictures. A metric that cannot be computed raises `NotComputed` with the reason,
and never gives a number instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

SSIM_WINDOW = 11
"""Side of the Gaussian window (sigma 1.5) that SSIM is defined with."""


class NotComputed(Exception):
    """A metric has no value here; the message is the reason, for a person to read."""


@dataclass(frozen=True)
class Metric:
    """A metric as tables show it. Infinite values are possible (PSNR of identical pictures)."""

    name: str
    title: str
    """For headings."""
    larger_is_better: bool
    digits: int
    """Decimals that mean something."""
    score: Callable[[np.ndarray, np.ndarray, np.ndarray], float]
    """result, truth, hole (H, W) bool to value; raises `NotComputed`."""


def psnr(result: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over the whole picture, peak 255; ``inf`` where both are identical."""
    _check(result, truth)
    if np.array_equal(result, truth):
        return float("inf")
    return float(peak_signal_noise_ratio(truth, result, data_range=255))


def psnr_hole(result: np.ndarray, truth: np.ndarray, hole: np.ndarray) -> float:
    """`psnr` over the pixels of ``hole``, (H, W) bool; ``inf`` where both are identical there."""
    _check(result, truth)
    _check_hole(hole, truth)
    return psnr(result[hole][None], truth[hole][None])


def ssim(result: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004), -1..1, mean over the whole picture and the three channels.

    Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, as in the paper.
    """
    _check(result, truth)
    if min(truth.shape[:2]) < SSIM_WINDOW:
        raise NotComputed(f"the picture is smaller than SSIM's window of {SSIM_WINDOW} pixels")
    return float(
        structural_similarity(
            truth, result, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def perceptual_hole(result: np.ndarray, truth: np.ndarray, hole: np.ndarray) -> float:
    """`mild.metrics.perceptual.distance` in ``hole``, (H, W) bool: 0 for equal pictures. It is not LPIPS."""
    _check(result, truth)
    _check_hole(hole, truth)
    # Loads torch, which those who want the other metrics do without.
    from mild.metrics.perceptual import SMALLEST, distance

    if min(truth.shape[:2]) < SMALLEST:
        raise NotComputed(f"the picture is smaller than {SMALLEST} pixels, of which the coarsest features are made")
    return distance(result, truth, hole)


METRICS = (
    Metric("psnr_hole", "PSNR hole, dB", True, 2, psnr_hole),
    Metric("perceptual_hole", "Perceptual distance hole", False, 4, perceptual_hole),
    Metric("psnr", "PSNR, dB", True, 2, lambda result, truth, _: psnr(result, truth)),
    Metric("ssim", "SSIM", True, 4, lambda result, truth, _: ssim(result, truth)),
)


def _check(result: np.ndarray, truth: np.ndarray) -> None:
    if result.shape != truth.shape:
        raise NotComputed(
            f"the result is {result.shape[1]}x{result.shape[0]}, the truth {truth.shape[1]}x{truth.shape[0]}"
        )


def _check_hole(hole: np.ndarray, truth: np.ndarray) -> None:
    if hole.shape != truth.shape[:2]:
        raise NotComputed(f"the hole is {hole.shape[1]}x{hole.shape[0]}, the picture {truth.shape[1]}x{truth.shape[0]}")
    if not hole.any():
        raise NotComputed("the hole is empty")
