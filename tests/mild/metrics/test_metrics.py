from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from mild.metrics import METRICS, NotComputed, psnr, psnr_hole, ssim


def _picture(seed: int, height: int = 40, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _flat(value: int) -> np.ndarray:
    return np.full((20, 20, 3), value, np.uint8)


def test_psnr_of_a_constant_difference_is_known() -> None:
    """A difference of 5 everywhere: 20 log10(255 / 5) dB."""
    assert psnr(_flat(105), _flat(100)) == pytest.approx(20 * math.log10(51))


def test_psnr_agrees_with_opencv() -> None:
    assert psnr(_picture(1), _picture(2)) == pytest.approx(cv2.PSNR(_picture(1), _picture(2)))


def test_psnr_in_the_hole_looks_at_the_hole_alone() -> None:
    truth, hole = _picture(1), np.zeros((40, 30), bool)
    hole[5:15, 5:25] = True
    result = _picture(2)
    result[hole] = truth[hole] // 2
    error = truth[hole].astype(float) - result[hole]
    assert psnr_hole(result, truth, hole) == pytest.approx(10 * math.log10(255**2 / np.mean(error**2)))


def test_identical_pictures_have_an_infinite_psnr_and_a_similarity_of_one() -> None:
    assert psnr(_picture(1), _picture(1)) == math.inf
    hole = np.zeros((40, 30), bool)
    hole[3, 4] = True
    changed = _picture(1)
    changed[0, 0] ^= 1
    assert psnr_hole(changed, _picture(1), hole) == math.inf
    assert ssim(_picture(1), _picture(1)) == pytest.approx(1)


def test_ssim_of_two_flat_pictures_is_known() -> None:
    """Without variance only the luminance term is left: (2 a b + C1) / (a^2 + b^2 + C1)."""
    c1 = (0.01 * 255) ** 2
    assert ssim(_flat(100), _flat(50)) == pytest.approx((2 * 5000 + c1) / (100**2 + 50**2 + c1))


def test_ssim_is_the_formula_of_the_paper() -> None:
    """Written out with SciPy's Gaussian filter (window 11, sigma 1.5), without the 5 pixels at each border."""
    a, b = _picture(1).astype(float), (0.6 * _picture(1) + 0.4 * _picture(2)).astype(np.uint8).astype(float)

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, sigma=(1.5, 1.5, 0), truncate=3.5)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    value = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    assert ssim(a.astype(np.uint8), b.astype(np.uint8)) == pytest.approx(value[5:-5, 5:-5].mean())


def test_what_cannot_be_computed_gives_a_reason_and_no_number() -> None:
    with pytest.raises(NotComputed, match="hole is empty"):
        psnr_hole(_flat(1), _flat(2), np.zeros((20, 20), bool))
    with pytest.raises(NotComputed, match="smaller than SSIM's window"):
        ssim(_picture(1, 10, 30), _picture(2, 10, 30))
    for metric in METRICS:
        with pytest.raises(NotComputed, match="the result is 30x40, the truth 20x20"):
            metric.score(_picture(1), _flat(1), np.ones((20, 20), bool))
