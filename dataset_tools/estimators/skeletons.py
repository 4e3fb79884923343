"""Skeletons: whose they are, and COCO's 17 joints as OpenPose's 18."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from dataset_tools.masks import bounds
from dataset_tools.schema import KEYPOINTS

COCO_KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear",
    "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist",
    "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle",
)  # fmt: skip
"""The 17 joints of COCO's person keypoints, in the order of its annotations."""
MIN_SHARE = 0.5
"""Share of a skeleton's joints that must lie in a mask, or it is not that person's."""
_REACH = 0.03
"""How far beyond a mask a joint still counts as inside, as a share of the longer side of the mask's box: networks
place joints, and masks their outlines, no more exactly."""


def match_skeletons(skeletons: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Give each mask the skeleton that is its person's: one to one, the best for the picture as a whole.

    A pair is worth the share of the skeleton's joints that lie in the mask, plus how well their box fits the mask's
    (IoU); pairs below `MIN_SHARE` do not belong together. The assignment has the largest sum there is.

    Args:
        skeletons: (M, 18, 3) x, y in pixels, score; joints whose score is 0 were not found.
        masks: N times (H, W) bool, none empty.

    Returns:
        (N, 18, 3) float32: the skeleton of each mask, all zeros where none is.
    """
    from scipy.optimize import linear_sum_assignment

    matched = np.zeros((len(masks), 18, 3), np.float32)
    worth = np.zeros((len(masks), len(skeletons)))
    for row, mask in enumerate(masks):
        top, bottom, left, right = bounds(mask)
        distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        near = distance <= _REACH * max(bottom - top, right - left)
        for column, skeleton in enumerate(skeletons):
            joints = skeleton[skeleton[:, 2] > 0, :2]
            if not len(joints):
                continue
            x, y = np.clip(np.rint(joints).astype(int), 0, np.array(mask.shape)[::-1] - 1).T
            share = near[y, x].mean()
            if share >= MIN_SHARE:
                worth[row, column] = share + _iou(
                    (left, top, right, bottom), (x.min(), y.min(), x.max() + 1, y.max() + 1)
                )
    for row, column in zip(*linear_sum_assignment(worth, maximize=True), strict=True):
        if worth[row, column] > 0:
            matched[row] = skeletons[column]
    return matched


def from_coco(keypoints: np.ndarray) -> np.ndarray:
    """COCO's 17 joints (..., 17, 3), each x, y, score, as OpenPose's 18 in the order of `KEYPOINTS` (..., 18, 3).

    COCO has no neck: it is midway between the shoulders, and no more certain than the less certain of them.
    """
    joints = {name: keypoints[..., index, :] for index, name in enumerate(COCO_KEYPOINTS)}
    right, left = joints["right_shoulder"], joints["left_shoulder"]
    joints["neck"] = np.concatenate([(right + left)[..., :2] / 2, np.minimum(right, left)[..., 2:]], -1)
    return np.stack([joints[name] for name in KEYPOINTS], -2)


def _iou(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Intersection over union of two boxes: left, top, right, bottom."""
    sizes = [(right - left) * (bottom - top) for left, top, right, bottom in (one, other)]
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    return both / (sum(sizes) - both)
