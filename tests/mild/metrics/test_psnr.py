from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from mild.metrics.metric import Judged
from mild.metrics.psnr import PSNR, psnr


def _picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)


HOLE = np.zeros((40, 30), bool)
HOLE[5:15, 5:25] = True


def test_psnr_of_a_constant_difference_is_known() -> None:
    """A difference of 5 everywhere: 20 log10(255 / 5) dB."""
    flat = np.full((20, 20, 3), 100, np.uint8)
    assert psnr(flat + np.uint8(5), flat) == pytest.approx(20 * math.log10(51))


def test_over_the_whole_picture_it_agrees_with_opencv_and_scikit_image(make_judged: Callable[..., Judged]) -> None:
    (value,) = PSNR(kind="psnr").score([make_judged(_picture(1), HOLE, truth=_picture(2))])
    assert value == pytest.approx(cv2.PSNR(_picture(1), _picture(2)))
    assert value == pytest.approx(peak_signal_noise_ratio(_picture(2), _picture(1)))


def test_in_the_hole_it_looks_at_the_hole_alone(make_judged: Callable[..., Judged]) -> None:
    truth, result = _picture(1), _picture(2)
    result[HOLE] = truth[HOLE] // 2
    error = truth[HOLE].astype(float) - result[HOLE]
    (value,) = PSNR(kind="psnr_hole").score([make_judged(result, HOLE, truth=truth)])
    assert value == pytest.approx(10 * math.log10(255**2 / np.mean(error**2)))


def test_where_both_are_identical_it_is_infinite(make_judged: Callable[..., Judged]) -> None:
    changed = _picture(1)
    changed[0, 0] ^= 1
    judged = make_judged(changed, HOLE, truth=_picture(1))
    assert PSNR(kind="psnr_hole").score([judged]) == [math.inf]
    assert PSNR(kind="psnr").score([judged]) != [math.inf]
    assert psnr(_picture(1), _picture(1)) == math.inf
