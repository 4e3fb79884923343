from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from mild.metrics.metric import Judged, NotComputed
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


def test_only_what_is_known_of_the_truth_counts(make_judged: Callable[..., Judged]) -> None:
    """Off by 20 in the known half of the hole, by 5 in what else is known."""
    truth = np.full((40, 30, 3), 100, np.uint8)
    known = np.arange(30) + np.zeros((40, 1)) < 15
    result = truth + np.where((HOLE & known)[..., None], 20, 5).astype(np.uint8)
    judged = make_judged(result, HOLE, truth=np.where(known[..., None], truth, result), known=known)
    assert PSNR(kind="psnr_hole").score([judged]) == [pytest.approx(20 * math.log10(255 / 20))]
    share = (HOLE & known).sum() / known.sum()
    error = share * 20**2 + (1 - share) * 5**2
    assert PSNR(kind="psnr").score([judged]) == [pytest.approx(10 * math.log10(255**2 / error))]
    (why,) = PSNR(kind="psnr_hole").score([make_judged(result, HOLE, truth=truth, known=~HOLE)])
    assert isinstance(why, NotComputed) and "in the hole" in str(why)


def test_effects_are_judged_outside_the_hole_where_the_truth_is_known(make_judged: Callable[..., Judged]) -> None:
    """A shadow that reaches into the hole and to where nothing is known, left as it was: 40 levels too dark."""
    truth = np.full((40, 30, 3), 100, np.uint8)
    shadow = np.zeros((40, 30), bool)
    shadow[10:30, 5:25] = True
    known = np.arange(30) + np.zeros((40, 1)) < 20
    result = np.where(shadow[..., None], np.uint8(60), truth)
    result[HOLE], result[~known] = 0, 255
    metric = PSNR(kind="psnr_effects")
    (value,) = metric.score([make_judged(result, HOLE, truth=truth, known=known, effects=shadow)])
    assert value == pytest.approx(20 * math.log10(255 / 40))
    why = metric.score([make_judged(result, HOLE, truth=truth, effects=one) for one in (None, shadow & HOLE)])
    assert ["not known" in str(why[0]), "outside the hole" in str(why[1])] == [True, True]


def test_hole_and_effects_are_judged_together(make_judged: Callable[..., Judged]) -> None:
    """200 pixels of a hole off by 10, 200 of a shadow beside it off by 40, all else off by 100."""
    truth = np.full((40, 30, 3), 100, np.uint8)
    shadow = np.zeros((40, 30), bool)
    shadow[10:25, 5:25] = True
    result = np.full_like(truth, 200)
    result[shadow], result[HOLE] = 140, 110
    metric = PSNR(kind="psnr_hole_effects")
    (value,) = metric.score([make_judged(result, HOLE, truth=truth, effects=shadow)])
    assert value == pytest.approx(10 * math.log10(255**2 / ((10**2 + 40**2) / 2)))
    (why,) = metric.score([make_judged(result, HOLE, truth=truth)])
    assert isinstance(why, NotComputed) and "not known" in str(why)
