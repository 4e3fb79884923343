from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mild.metrics.metric import Judged, NotComputed
from mild.metrics.seam import Seam, seam

SIZE = (60, 80)
ROWS, COLUMNS = np.indices(SIZE)
DISC = (ROWS - 30) ** 2 + (COLUMNS - 40) ** 2 < 15**2
ODD = DISC | ((abs(ROWS - 30) < 2) & (COLUMNS > 20)) | ((COLUMNS > 76) & (ROWS < 5)) | (COLUMNS == 3)
"""With a thin bar that leaves the picture, a part in a corner, and a line."""


def _picture(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.clip(values, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("mask", [DISC, ODD, ~ODD])
def test_a_slope_that_runs_on_over_the_border_is_no_seam(mask: np.ndarray) -> None:
    assert seam(_picture(2 * ROWS + COLUMNS), mask) == pytest.approx(1)
    assert seam(_picture(3 * COLUMNS), mask) == pytest.approx(1)
    assert seam(_picture(np.full(SIZE, 90)), mask) == 1


@pytest.mark.parametrize("mask", [DISC, ODD, ~ODD])
def test_a_step_at_the_border_of_something_flat_is_the_step_and_the_rounding(mask: np.ndarray) -> None:
    assert seam(_picture(100 + 40 * mask), mask) == pytest.approx(41)


def test_a_step_on_a_slope_is_told_relative_to_it() -> None:
    """3 levels a column, and 6 more where the hole begins: (9 + 1) / (3 + 1)."""
    mask = COLUMNS >= 40
    assert seam(_picture(3 * COLUMNS + 6 * mask), mask) == pytest.approx(10 / 4)


def test_a_seam_in_a_texture_shows_less_than_in_something_flat() -> None:
    noise = np.random.default_rng(0).integers(-30, 31, SIZE)
    texture, flat = (seam(_picture(100 + part + 20 * DISC), DISC) for part in (noise, 0 * noise))
    assert seam(_picture(100 + noise), DISC) == pytest.approx(1, abs=0.15)
    assert flat == pytest.approx(21)
    assert texture is not None and 1.15 < texture < 2


def test_what_crosses_the_border_within_the_picture_is_no_seam() -> None:
    assert seam(_picture(200 * (ROWS > 30)), DISC & (COLUMNS > 30)) == pytest.approx(1, abs=0.05)


def test_rows_and_columns_count_alike() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    assert seam(picture, ODD) == pytest.approx(seam(picture.swapaxes(0, 1), ODD.T))


def test_it_looks_at_the_mask_given_and_has_no_value_without_a_border(make_judged: Callable[..., Judged]) -> None:
    result = _picture(100 + 40 * DISC)
    value, why = Seam().score([make_judged(result, DISC | ODD, given=DISC), make_judged(result, np.ones(SIZE, bool))])
    assert value == pytest.approx(41)
    assert isinstance(why, NotComputed) and "no border" in str(why)
