from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from mild.metrics.metric import Judged, NotComputed
from mild.metrics.ssim import SSIM, ssim


def _picture(seed: int, height: int = 40, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _flat(value: int) -> np.ndarray:
    return np.full((20, 20, 3), value, np.uint8)


def test_identical_pictures_have_a_similarity_of_one() -> None:
    assert ssim(_picture(1), _picture(1), np.ones((40, 30), bool)) == pytest.approx(1)


def test_ssim_of_two_flat_pictures_is_known() -> None:
    """Without variance only the luminance term is left: (2 a b + C1) / (a^2 + b^2 + C1)."""
    c1 = (0.01 * 255) ** 2
    assert ssim(_flat(100), _flat(50), np.ones((20, 20), bool)) == pytest.approx(
        (2 * 5000 + c1) / (100**2 + 50**2 + c1)
    )


def test_ssim_is_the_formula_of_the_paper() -> None:
    """Written out with SciPy's Gaussian filter (window 11, sigma 1.5), without the 5 pixels at each border."""
    a, b = _picture(1).astype(float), (0.6 * _picture(1) + 0.4 * _picture(2)).astype(np.uint8).astype(float)

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, sigma=(1.5, 1.5, 0), truncate=3.5)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    value = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    pictures = a.astype(np.uint8), b.astype(np.uint8)
    assert ssim(*pictures, np.ones((40, 30), bool)) == pytest.approx(value[5:-5, 5:-5].mean())
    known = np.random.default_rng(0).random((40, 30)) < 0.5
    assert ssim(*pictures, known) == pytest.approx(value[5:-5, 5:-5][known[5:-5, 5:-5]].mean())


def test_a_picture_smaller_than_the_window_gets_a_reason_and_no_number(make_judged: Callable[..., Judged]) -> None:
    small, large = (_picture(1, height) for height in (10, 11))
    judged = [make_judged(p, np.ones(p.shape[:2], bool), truth=p) for p in (small, large)]
    why, value = SSIM().score(judged)
    assert isinstance(why, NotComputed) and "smaller than SSIM's window of 11 pixels" in str(why)
    assert value == pytest.approx(1)


def test_where_nothing_is_known_in_the_middle_of_a_window_there_is_no_value(make_judged: Callable[..., Judged]) -> None:
    known = np.ones((40, 30), bool)
    known[5:-5, 5:-5] = False
    (why,) = SSIM().score([make_judged(_picture(1), known, truth=_picture(1), known=known)])
    assert isinstance(why, NotComputed)
