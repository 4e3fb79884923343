from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mild.metrics.metric import Judged, NotComputed
from mild.metrics.outside import ChangeOutside

IMAGE = np.random.default_rng(0).integers(0, 256, (10, 8, 3), dtype=np.uint8)
GIVEN = np.zeros((10, 8), bool)
GIVEN[2:6, 2:6] = True


def test_what_changed_within_the_mask_given_does_not_count(make_judged: Callable[..., Judged]) -> None:
    result = np.where(GIVEN[..., None], 255 - IMAGE, IMAGE)
    assert ChangeOutside().score([make_judged(result, GIVEN, image=IMAGE)]) == [0]


def test_it_is_the_mean_of_what_changed_outside_in_both_directions(make_judged: Callable[..., Judged]) -> None:
    """One value up by 145, one down by 100: 245 levels over three channels of 80 - 16 pixels."""
    image, result = np.full_like(IMAGE, 110), np.full_like(IMAGE, 110)
    result[0, 0, 1], result[9, 7, 2] = 255, 10
    hole = GIVEN.copy()
    hole[0, 0] = True  # what those who go really cover, and nobody gave: the method may not change that
    (value,) = ChangeOutside().score([make_judged(result, hole, image=image, given=GIVEN)])
    assert value == pytest.approx((145 + 100) / (64 * 3))


def test_where_everything_may_change_there_is_no_value(make_judged: Callable[..., Judged]) -> None:
    (why,) = ChangeOutside().score([make_judged(IMAGE, np.ones_like(GIVEN))])
    assert isinstance(why, NotComputed) and "covers the whole picture" in str(why)


def test_shadows_of_those_who_go_may_change(make_judged: Callable[..., Judged]) -> None:
    shadow = np.zeros_like(GIVEN)
    shadow[6:8, 1:7] = True
    result = np.where((GIVEN | shadow)[..., None], 255 - IMAGE, IMAGE)
    of = [make_judged(result, GIVEN, image=IMAGE, effects=effects) for effects in (shadow, shadow & False, None)]
    right, wrong, unknown = ChangeOutside().score(of)
    assert right == 0 and wrong == unknown and float(str(wrong)) > 0
