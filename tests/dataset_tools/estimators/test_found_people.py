"""What networks see becomes people: against non-maximum suppression written out, and by properties."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as run
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from dataset_tools.estimators.found_people import InstancesSettings, found_people
from dataset_tools.masks import MaskSettings

AS_SEEN = MaskSettings(min_area=0, max_area=1, min_island=0, max_hole=0)
"""Leaves masks as they are."""
Seen = tuple[np.ndarray, list[float]]


def settings(masks: MaskSettings = AS_SEEN, min_score: float = 0.25, same_person_iou: float = 0.5) -> InstancesSettings:
    return InstancesSettings(
        kind="any", weights="any", masks=masks, min_score=min_score, same_person_iou=same_person_iou
    )


def box(top: int, bottom: int, left: int, right: int, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


@st.composite
def seen(draw: st.DrawFn) -> Seen:
    """Up to six overlapping masks, some of them equal, and scores, some of them equal."""
    height, width = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    masks = draw(hnp.arrays(bool, st.tuples(st.integers(0, 6), st.just(height), st.just(width))))
    scores = draw(st.lists(st.sampled_from((0.1, 0.3, 0.5, 0.7, 0.9)), min_size=len(masks), max_size=len(masks)))
    return masks, scores


@run(max_examples=50)
@given(seen())
def test_no_pixel_belongs_to_two_people_and_nobody_is_empty(given: Seen) -> None:
    masks, scores = given
    found = found_people(masks, scores, settings())
    assert all(mask.dtype == bool and mask.any() for mask in found.masks)
    assert (np.sum(found.masks, axis=0) <= 1).all()
    assert len(found.scores) == len(found.masks)
    assert all(score >= 0.25 for score in found.scores)


@run(max_examples=50)
@given(seen())
def test_people_stand_from_left_to_right(given: Seen) -> None:
    found = found_people(*given, settings())
    centres = [tuple(reversed(ndimage.center_of_mass(mask))) for mask in found.masks]
    for first, second in pairwise(centres):
        assert first <= second or first == pytest.approx(second)


@run(max_examples=50)
@given(seen(), st.randoms(use_true_random=False))
def test_the_order_in_which_a_network_sees_people_changes_nothing(given: Seen, random: Random) -> None:
    masks, scores = given
    order = list(range(len(scores)))
    random.shuffle(order)
    found = found_people(masks, scores, settings())
    again = found_people([masks[k] for k in order], [scores[k] for k in order], settings())
    assert again.scores == found.scores
    assert np.array_equal(again.masks, found.masks)


@run(max_examples=50)
@given(seen())
def test_suppression_and_claims_are_as_written_out(given: Seen) -> None:
    masks, scores = given
    # Scores that differ, so that the written-out order is the only one.
    scores = [score + k / 100 for k, score in enumerate(scores)]
    kept: list[int] = []
    owner = np.full(masks.shape[1:], -1)
    for k in sorted(range(len(scores)), key=lambda k: scores[k], reverse=True):
        whole = masks[k]
        if scores[k] < 0.25 or any((whole & masks[j]).sum() > 0.5 * (whole | masks[j]).sum() for j in kept):
            continue
        if whole.any() and (whole & (owner < 0)).sum() >= 0.5 * whole.sum():
            kept.append(k)
            owner[whole & (owner < 0)] = k
    found = found_people(masks, scores, settings())
    expected = {(owner == k).tobytes(): scores[k] for k in kept}
    assert {mask.tobytes(): score for mask, score in zip(found.masks, found.scores, strict=True)} == expected


def test_two_masks_of_one_person_become_that_of_the_higher_score() -> None:
    person, again = box(5, 35, 10, 30), box(6, 35, 10, 31)
    found = found_people([again, person], [0.8, 0.9], settings())
    assert found.scores == [0.9]
    assert np.array_equal(found.masks, [person])


def test_pixels_that_two_people_claim_go_to_the_higher_score() -> None:
    behind, front = box(5, 35, 10, 30), box(5, 35, 22, 50)
    found = found_people([behind, front], [0.7, 0.8], settings())
    assert np.array_equal(found.masks, [box(5, 35, 10, 22), front])
    assert found.scores == [0.7, 0.8]


def test_masks_are_cleaned_and_what_is_no_person_is_left_out() -> None:
    person = box(5, 35, 10, 30)
    specked = person | box(0, 1, 0, 1)
    specked[20, 20] = False
    nobody = [box(0, 0, 0, 0), box(0, 2, 50, 52), ~box(19, 21, 29, 31), box(0, 40, 0, 59)]
    cleaning = MaskSettings(min_area=0.01, max_area=0.9, min_island=0.02, max_hole=0.01)
    found = found_people([*nobody, specked], [0.9, 0.9, 0.9, 0.9, 0.8], settings(cleaning))
    assert np.array_equal(found.masks, [person])


@pytest.mark.parametrize(("left", "people"), [(9, 1), (10, 2)])
def test_a_second_view_of_somebody_is_left_out_where_less_than_half_is_left_of_it(left: int, people: int) -> None:
    """It is much smaller than the first one, so that suppression by IoU leaves it."""
    first, second = box(0, 40, 0, 40), box(0, 20, 40 - (20 - left), 40 + left)
    found = found_people([first, second], [0.9, 0.8], settings())
    assert found.scores == [0.9, 0.8][:people] and np.array_equal(found.masks[0], first)


def test_a_hole_in_which_somebody_stands_is_not_filled() -> None:
    inner = box(18, 20, 18, 20)
    outer = box(2, 38, 2, 58) & ~inner
    found = found_people([outer, inner], [0.8, 0.9], settings(MaskSettings(min_area=0, max_area=1, max_hole=0.1)))
    assert {mask.tobytes() for mask in found.masks} == {outer.tobytes(), inner.tobytes()}


def test_of_no_mask_there_are_no_people() -> None:
    found = found_people([], [], settings())
    assert (found.masks, found.scores) == ([], [])
