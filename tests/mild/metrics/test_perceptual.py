from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage import data
from skimage.transform import resize

from mild.metrics.metric import Judged, NotComputed
from mild.metrics.perceptual import PerceptualDistance, network, perceptual_hole

CATS = {281, 282, 285}
"""ImageNet's tabby, tiger cat and Egyptian cat."""
ESPRESSO = 967
WHOLE = np.ones((64, 64), bool)


def _photograph() -> np.ndarray:
    return np.ascontiguousarray(data.chelsea()[90:154, 150:214])


@pytest.mark.parametrize(
    ("photograph", "classes"), [(data.chelsea()[:, 75:375], CATS), (data.coffee()[:400, 100:500], {ESPRESSO})]
)
def test_the_network_is_the_one_that_was_trained_on_imagenet(photograph: np.ndarray, classes: set[int]) -> None:
    """With the weights, layers and colour range that belong together it knows a cat and a cup of coffee."""
    picture = torch.from_numpy(resize(photograph, (224, 224), preserve_range=True).astype(np.float32))
    with torch.inference_mode():
        found = network()((picture.permute(2, 0, 1)[None] - 127) / 128).softmax(1).topk(1)
    assert found.indices.item() in classes
    assert found.values.item() > 0.3


def test_equal_pictures_are_at_distance_zero_and_order_does_not_matter() -> None:
    a, b = _photograph(), 255 - _photograph()
    assert perceptual_hole(a, a, WHOLE) == 0
    assert perceptual_hole(a, b, WHOLE) == pytest.approx(perceptual_hole(b, a, WHOLE))
    assert 0 < perceptual_hole(a, b, WHOLE) <= 4


def test_the_more_a_picture_is_blurred_the_further_away_it_is() -> None:
    truth = _photograph()
    distances = [perceptual_hole(gaussian_filter(truth, (s, s, 0)), truth, WHOLE) for s in (0.5, 1, 2, 4)]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_blur_is_further_from_a_texture_than_the_same_texture_moved_although_it_has_the_better_psnr() -> None:
    """What a perceptual distance is for."""
    grass = np.repeat(data.grass()[:96, :96, None], 3, axis=2)
    truth, moved = grass[:64, :64], grass[24:88, 24:88]
    blurred = gaussian_filter(truth, (4, 4, 0))
    assert np.square(blurred - truth.astype(float)).mean() < np.square(moved - truth.astype(float)).mean()
    assert perceptual_hole(moved, truth, WHOLE) < perceptual_hole(blurred, truth, WHOLE)


def test_the_same_damage_counts_more_within_the_hole_than_elsewhere() -> None:
    truth = np.ascontiguousarray(data.chelsea()[50:178, 100:228])
    damaged = truth.copy()
    damaged[16:48, 16:48] = 128
    here, there = np.zeros((2, 128, 128), bool)
    here[16:48, 16:48] = there[80:112, 80:112] = True
    assert perceptual_hole(damaged, truth, here) > 10 * perceptual_hole(damaged, truth, there)


def test_the_metric_is_the_distance_in_the_hole_or_the_reason_why_there_is_none(
    make_judged: Callable[..., Judged],
) -> None:
    truth, result = _photograph(), 255 - _photograph()
    hole = np.zeros((64, 64), bool)
    hole[10:30, 10:40] = True
    value, why = PerceptualDistance().score(
        [make_judged(result, hole, truth=truth), make_judged(result[:31], hole[:31], truth=truth[:31])]
    )
    assert value == perceptual_hole(result, truth, hole) != perceptual_hole(result, truth, WHOLE)
    assert isinstance(why, NotComputed) and "smaller than 32 pixels" in str(why)
    known = np.arange(64) + np.zeros((64, 1)) < 20
    partly, nothing = PerceptualDistance().score(
        [make_judged(result, hole, truth=truth, known=one) for one in (known, ~hole)]
    )
    assert partly == perceptual_hole(result, truth, hole & known) != value
    assert isinstance(nothing, NotComputed) and "in the hole" in str(nothing)
