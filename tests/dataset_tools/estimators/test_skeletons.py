"""Skeletons go to masks one to one, the best for the picture as a whole; COCO's joints become OpenPose's."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dataset_tools.estimators.skeletons import COCO_KEYPOINTS, from_coco, match_skeletons
from dataset_tools.schema import KEYPOINTS

HEIGHT, WIDTH = 100, 140
Box = tuple[int, int, int, int]


def mask_of(box: Box) -> np.ndarray:
    left, top, right, bottom = box
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


def skeleton_over(box: Box, score: float = 0.8) -> np.ndarray:
    """18 joints, evenly in three columns, from corner to corner of a box."""
    left, top, right, bottom = box
    x, y = np.meshgrid(np.linspace(left, right - 1, 3).round(), np.linspace(top, bottom - 1, 6).round())
    return np.stack([x.ravel(), y.ravel(), np.full(18, score)], -1)


def worth(skeleton: np.ndarray, box: Box) -> float:
    """Share of the joints in or near the box, plus the IoU of box and joints' box; 0 where most are elsewhere."""
    left, top, right, bottom = box
    reach = 0.03 * max(right - left, bottom - top)
    joints = skeleton[skeleton[:, 2] > 0]
    inside = 0
    for x, y, _ in joints:
        inside += np.hypot(max(left - x, 0, x - right + 1), max(top - y, 0, y - bottom + 1)) <= reach
    if inside < len(joints) / 2:
        return 0
    a, b, c, d = joints[:, 0].min(), joints[:, 1].min(), joints[:, 0].max() + 1, joints[:, 1].max() + 1
    both = max(min(c, right) - max(a, left), 0) * max(min(d, bottom) - max(b, top), 0)
    return inside / len(joints) + both / ((c - a) * (d - b) + (right - left) * (bottom - top) - both)


def greedy(worths: np.ndarray) -> dict[int, int]:
    """Mask to skeleton, the best pair first."""
    pairs: dict[int, int] = {}
    for place in np.argsort(-worths, axis=None):
        mask, skeleton = (int(index) for index in np.unravel_index(place, worths.shape))
        if worths[mask, skeleton] > 0 and mask not in pairs and skeleton not in pairs.values():
            pairs[mask] = skeleton
    return pairs


def matches(skeletons: list[np.ndarray], boxes: list[Box]) -> list[int | None]:
    """Which of the skeletons each mask got."""
    matched = match_skeletons(np.array(skeletons).reshape(-1, 18, 3), [mask_of(box) for box in boxes])
    assert matched.shape == (len(boxes), 18, 3) and matched.dtype == np.float32
    return [
        next((index for index, own in enumerate(skeletons) if np.array_equal(own.astype(np.float32), skeleton)), None)
        if skeleton.any()
        else None
        for skeleton in matched
    ]


def test_each_of_two_overlapping_people_gets_a_skeleton_where_greedy_leaves_one_without() -> None:
    left, right = (10, 10, 60, 90), (30, 10, 80, 90)
    both, only_right = skeleton_over((31, 12, 62, 88)), skeleton_over((52, 12, 79, 88))
    worths = np.array([[worth(skeleton, box) for skeleton in (both, only_right)] for box in (left, right)])
    assert greedy(worths) == {1: 0}  # the best pair of all, and what is left does not belong together
    assert matches([both, only_right], [left, right]) == [0, 1]


def boxes_of(count: int) -> st.SearchStrategy[list[Box]]:
    corner = st.tuples(st.integers(0, 60), st.integers(0, 40), st.integers(20, 70), st.integers(20, 55))
    box = corner.map(lambda c: (c[0], c[1], c[0] + c[2], c[1] + c[3]))
    return st.lists(box, min_size=count, max_size=count, unique=True)


@settings(max_examples=40)
@given(boxes_of(4), boxes_of(4))
def test_no_assignment_is_worth_more(people: list[Box], others: list[Box]) -> None:
    skeletons = [skeleton_over(box) for box in others]
    worths = np.array([[worth(skeleton, box) for skeleton in skeletons] for box in people])
    best = max(sum(worths[mask, order[mask]] for mask in range(4)) for order in permutations(range(4)))
    found = matches(skeletons, people)
    pairs = [(mask, skeleton) for mask, skeleton in enumerate(found) if skeleton is not None]
    assert all(worths[pair] > 0 for pair in pairs)
    assert len({skeleton for _, skeleton in pairs}) == len(pairs)
    assert sum(worths[pair] for pair in pairs) == pytest.approx(best)


def test_a_skeleton_most_of_which_lies_elsewhere_belongs_to_no_mask() -> None:
    box = (40, 10, 60, 90)
    assert matches([skeleton_over((58, 10, 80, 90))], [box]) == [None]
    assert matches([skeleton_over((48, 10, 70, 90))], [box]) == [0]


def test_joints_that_were_not_found_lie_nowhere() -> None:
    skeleton = skeleton_over((40, 10, 60, 90))
    skeleton[4:] = 0
    assert matches([skeleton], [(0, 0, 20, 30), (40, 10, 60, 90)]) == [None, 0]
    assert matches([np.zeros((18, 3))], [(0, 0, 20, 30)]) == [None]


def test_there_may_be_more_skeletons_than_masks_and_fewer_and_none() -> None:
    left, right = (10, 10, 40, 90), (80, 10, 110, 90)
    assert matches([skeleton_over(left), skeleton_over(right)], [right]) == [1]
    assert matches([skeleton_over(right)], [left, right]) == [None, 0]
    assert matches([], [left, right]) == [None, None]
    assert matches([skeleton_over(left)], []) == []


@given(arrays.arrays(np.float32, (2, 17, 3), elements=st.floats(0, 1000, width=32)))
def test_cocos_joints_are_openposes_but_for_the_neck(coco: np.ndarray) -> None:
    skeletons = from_coco(coco)
    assert skeletons.shape == (2, 18, 3) and skeletons.dtype == np.float32
    for person, skeleton in zip(coco, skeletons, strict=True):
        expected = dict(zip(COCO_KEYPOINTS, person, strict=True))
        for name, joint in zip(KEYPOINTS, skeleton, strict=True):
            if name != "neck":
                assert np.array_equal(joint, expected.pop(name))
                continue
            right, left = person[6], person[5]
            assert joint[:2] == pytest.approx((right[:2] + left[:2]) / 2, rel=1e-6)
            assert joint[2] == min(right[2], left[2])
        assert not expected


def test_cocos_joints_are_in_the_order_of_its_annotations() -> None:
    # categories[0].keypoints of person_keypoints_val2017.json
    listed = (
        "nose,left_eye,right_eye,left_ear,right_ear,left_shoulder,right_shoulder,left_elbow,right_elbow,left_wrist,"
        "right_wrist,left_hip,right_hip,left_knee,right_knee,left_ankle,right_ankle"
    )
    assert ",".join(COCO_KEYPOINTS) == listed
