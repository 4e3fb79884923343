"""The network of the package finds the people of drawn scenes that it never saw."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from dataset_tools.drawn_world import draw_scene
from dataset_tools.estimators.segmentation import Segmentation, SegmentationSettings
from dataset_tools.networks import NETWORKS

pytestmark = pytest.mark.slow

SEED = 4711
"""It was trained, and is measured, on worlds of other seeds."""


@pytest.fixture(scope="module")
def network() -> Segmentation:
    return SegmentationSettings(weights="drawn-people").open()


def test_its_masks_are_much_like_those_of_the_people(network: Segmentation) -> None:
    """Of who fills 0.5 % of the picture or more; masks and people are paired so that IoU is greatest."""
    shared: list[float] = []
    for index in range(12):
        scene = draw_scene(f"unseen/{index}", SEED, ((320, 240), (240, 320), (288, 288))[index % 3], 1 + index % 4)
        true = [person.mask for person in scene.people if person.mask.mean() >= 0.005]
        (found,) = network.find([scene.image])
        iou = np.array([[(a & b).sum() / (a | b).sum() for b in true] for a in found.masks]).reshape(-1, len(true))
        best = np.zeros(len(true))
        rows, columns = linear_sum_assignment(-iou)
        best[columns] = iou[rows, columns]
        shared += best.tolist()
    assert np.mean(shared) > 0.6
    assert np.mean(np.array(shared) >= 0.5) > 0.75


def test_it_finds_nobody_where_nobody_is(network: Segmentation) -> None:
    empty = [draw_scene(f"empty/{index}", SEED, (320, 240), 0).image for index in range(8)]
    assert sum(len(found.masks) for found in network.find(empty)) <= 1


def test_it_is_small_and_what_the_table_says() -> None:
    row = NETWORKS["drawn-people"]
    assert sum(file.size or 0 for file in row.files) < 5_000_000
    assert SegmentationSettings(weights="drawn-people").open().weights.network == row
