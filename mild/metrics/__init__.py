"""How close a result is to the truth: one file a metric, and here the table of all of them.

All take two (H, W, 3) uint8 pictures. A metric that cannot be computed raises `mild.metrics.metric.NotComputed` with
the reason, and never gives a number instead.
"""

from __future__ import annotations

from mild.metrics.metric import Metric, NotComputed
from mild.metrics.perceptual import perceptual_hole
from mild.metrics.psnr import psnr, psnr_hole
from mild.metrics.ssim import ssim

__all__ = ["METRICS", "Metric", "NotComputed", "perceptual_hole", "psnr", "psnr_hole", "ssim"]

METRICS = (
    Metric("psnr_hole", "PSNR hole, dB", True, 2, psnr_hole),
    Metric("perceptual_hole", "Perceptual distance hole", False, 4, perceptual_hole),
    Metric("psnr", "PSNR, dB", True, 2, lambda result, truth, _: psnr(result, truth)),
    Metric("ssim", "SSIM", True, 4, lambda result, truth, _: ssim(result, truth)),
)
