"""Methods without any network: OpenCV's, and plain fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mild.evaluation.methods import Case, Setup
from mild.evaluation.methods.fills import FillMethod
from mild.evaluation.methods.opencv import OpenCVMethod

METHODS = {
    "telea": OpenCVMethod(kind="telea"),
    "navier-stokes": OpenCVMethod(kind="navier-stokes"),
    "mean-fill": FillMethod(kind="mean-fill"),
    "smooth-fill": FillMethod(kind="smooth-fill"),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@every_method
def test_pixels_outside_the_mask_are_untouched_and_inside_are_filled(method: Any, case: Case, setup: Setup) -> None:
    hole, before = case.hole, case.image.copy()
    (result,) = method.open(setup).erase([case], [0])
    assert (result.shape, result.dtype) == (before.shape, np.uint8)
    assert np.array_equal(result[~hole], before[~hole])
    assert (result[hole] != before[hole]).any(axis=1).mean() > 0.9
    assert np.array_equal(case.image, before)


@every_method
def test_several_cases_of_any_sizes_give_what_each_gives_alone(
    method: Any, make_case: Callable[..., Case], setup: Setup
) -> None:
    cases = [make_case(1, height=45, width=51), make_case(2), make_case(3, people=1)]
    eraser = method.open(setup)
    for together, case in zip(eraser.erase(cases, [0, 1, 2]), cases, strict=True):
        assert np.array_equal(together, eraser.erase([case], [5])[0])


@every_method
def test_a_plain_colour_is_continued(method: Any, setup: Setup) -> None:
    truth = np.full((30, 30, 3), (10, 120, 230), np.uint8)
    image, mask = truth.copy(), np.zeros((30, 30), bool)
    mask[10:20, 12:18] = True
    image[mask] = 255
    # Telea rounds.
    (result,) = method.open(setup).erase([Case(image, mask[None])], [0])
    assert np.abs(result.astype(int) - truth).max() <= 2


def test_the_mean_fill_is_the_mean_of_all_known_pixels(setup: Setup) -> None:
    image = np.zeros((3, 4, 3), np.uint8)
    image[..., 0] = 250
    image[0, :, 1], image[1, :, 1] = 10, 40
    image[0, 0, 2] = 90
    mask = np.zeros((1, 3, 4), bool)
    mask[0, 2] = True
    (result,) = FillMethod(kind="mean-fill").erase([Case(image, mask)], [0])
    # Of 8 known pixels: 250 each; four times 10 and 40; once 90 (11.25).
    assert (result[2] == (250, 25, 11)).all()


def test_the_smooth_fill_of_one_pixel_is_the_mean_of_the_other_three_of_its_square(setup: Setup) -> None:
    """Pull-push: the next level of a picture of 2 x 2 is one pixel, the mean of those that are known."""
    image = np.array([[[30, 0, 255], [60, 100, 255]], [[90, 0, 255], [7, 7, 7]]], np.uint8)
    mask = np.array([[[False, False], [False, True]]])
    (result,) = FillMethod(kind="smooth-fill").erase([Case(image, mask)], [0])
    assert result[1, 1].tolist() == [60, 33, 255]


def test_methods_of_one_class_differ_in_fingerprint_and_not_by_name_or_arm(setup: Setup) -> None:
    fingerprints = {method.fingerprint(setup) for method in METHODS.values()}
    assert len(fingerprints) == len(METHODS)
    for method in METHODS.values():
        renamed = method.model_copy(update={"name": "another", "arm": "arms"})
        assert renamed.fingerprint(setup) in fingerprints
        assert method.weights(setup) == {}
        assert method.missing(setup) is None


def test_titles_and_names_tell_methods_apart() -> None:
    assert [method.name for method in METHODS.values()] == list(METHODS)
    assert len({method.title for method in METHODS.values()}) == len(METHODS)
