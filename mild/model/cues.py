"""The cues of HMG as maps: pose, parsing and masks, drawn from what is known of a picture's people.

Networks are no part of this: processes that draw training examples need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from dataset_tools.masks import BONES
from dataset_tools.schema import KEYPOINTS, NO_PARSING, PARSING_LABELS
from mild.settings import HmgSettings

COMMON_LABELS = (
    "background", "hat", "hair", "face", "head", "upper_body", "lower_body", "whole_body", "accessory",
    "left_arm", "right_arm", "arm", "left_leg", "right_leg", "leg", "left_shoe", "right_shoe",
)  # fmt: skip
"""What the label sets are mapped to. ``head``, ``arm`` and ``leg`` are Pascal's, which tells neither faces from hair
nor left from right."""

TO_COMMON: dict[str, tuple[str, ...]] = {
    "lip": (
        "background", "hat", "hair", "accessory", "face", "upper_body", "whole_body", "upper_body", "lower_body",
        "lower_body", "whole_body", "accessory", "lower_body", "face", "left_arm", "right_arm", "left_leg",
        "right_leg", "left_shoe", "right_shoe",
    ),
    "atr": (
        "background", "hat", "hair", "face", "upper_body", "lower_body", "lower_body", "whole_body", "accessory",
        "left_shoe", "right_shoe", "face", "left_leg", "right_leg", "left_arm", "right_arm", "accessory", "accessory",
    ),
    "pascal": ("background", "head", "upper_body", "arm", "arm", "leg", "leg"),
}  # fmt: skip
"""The common label of each label of `PARSING_LABELS`. Clothes go by the part of the body that they cover; sunglasses
are part of the face; gloves, scarves, belts and bags are accessories."""

CHANNELS = {"pose": len(KEYPOINTS) + len(BONES), "parsing": len(COMMON_LABELS), "masks": 2}
"""Maps a cue."""

_JOINT = {name: index for index, name in enumerate(KEYPOINTS)}
_REACH = 6.0
"""A profile is drawn as far as this many standard deviations, where it is below 2e-8."""


@dataclass(frozen=True)
class Cue:
    """One cue of a batch."""

    maps: torch.Tensor
    """(B, C, h, w) float, with the C of `CHANNELS`; what they hold where ``present`` is False has no influence."""
    present: torch.Tensor
    """(B,) bool: which samples have this cue; the others get the learned "absent" tokens."""


def map_size(size: tuple[int, int], settings: HmgSettings) -> tuple[int, int]:
    """Height and width of the maps of a picture of ``size`` (height, width)."""
    longer = max(size)
    height, width = (max(1, round(side * settings.map_side / longer)) for side in size)
    return height, width


def draw_pose(keypoints: np.ndarray, size: tuple[int, int], settings: HmgSettings) -> torch.Tensor:
    """Heat maps of the 18 joints and maps of the 17 limbs of everybody in a picture, (35, h, w) float32 in 0..1.

    A map is the largest over all people of ``score * exp(-distance^2 / (2 sigma^2))``, the distance being that to
    the joint or to the limb's segment, whose score is the smaller of its ends'. Joints with score 0 are not found
    and not drawn, nor are their limbs.

    Args:
        keypoints: (P, 18, 3): x and y in pixels of the picture (whole numbers are centres of pixels) and score
            0..1, in the order of `KEYPOINTS`; P may be 0.
        size: the picture's (height, width).

    Raises:
        ValueError: the keypoints have another shape.
    """
    if keypoints.ndim != 3 or keypoints.shape[1:] != (len(KEYPOINTS), 3):
        raise ValueError(f"keypoints are {keypoints.shape}, not (people, {len(KEYPOINTS)}, 3)")
    height, width = map_size(size, settings)
    scale = np.array([width / size[1], height / size[0]])
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns, rows], axis=-1).astype(np.float64)
    sigma = settings.joint_width * settings.map_side
    maps = np.zeros((CHANNELS["pose"], height, width), np.float32)
    starts = [_JOINT[start] for start, _ in BONES]
    ends = [_JOINT[end] for _, end in BONES]
    for person in np.asarray(keypoints, np.float64):
        points, score = (person[:, :2] + 0.5) * scale - 0.5, person[:, 2].clip(0, 1)
        from_, to = np.concatenate([points, points[starts]]), np.concatenate([points, points[ends]])
        scores = np.concatenate([score, np.minimum(score[starts], score[ends])])
        first = np.minimum(from_, to) - _REACH * sigma
        last = np.maximum(from_, to) + _REACH * sigma
        starts_at, ends_at = (
            np.clip(corner, 0, [width, height]).astype(int) for corner in (np.floor(first), np.ceil(last) + 1)
        )
        for channel in np.flatnonzero(scores > 0):
            (left, top), (right, bottom) = starts_at[channel], ends_at[channel]
            near = maps[channel, top:bottom, left:right]
            distance = _squared_distance(pixels[top:bottom, left:right], from_[channel], to[channel])
            profile = scores[channel] * np.exp(-distance / (2 * sigma**2))
            np.maximum(near, profile, out=near, casting="same_kind")
    return torch.from_numpy(maps)


def _squared_distance(pixels: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Of each pixel, (h, w, 2) as x and y, to the segment between two points, which may coincide."""
    along = end - start
    length = float(along @ along)
    share = ((pixels - start) @ along / length).clip(0, 1) if length > 0 else np.zeros(pixels.shape[:2])
    return np.square(pixels - start - share[..., None] * along).sum(-1)


def draw_parsing(labels: np.ndarray, label_set: str, settings: HmgSettings) -> torch.Tensor:
    """One map a common label, (17, h, w) float32: the share of each map pixel that has the label.

    Args:
        labels: (H, W) uint8 of the set ``lip``, ``atr`` or ``pascal``; `NO_PARSING` counts for no label.

    Raises:
        ValueError: the label set is unknown, or has no such label.
    """
    if label_set not in TO_COMMON:
        raise ValueError(f"unknown label set {label_set!r}: use one of {', '.join(TO_COMMON)}")
    # One entry more, for pixels without a label: it becomes a map that is not returned.
    unlabelled = len(COMMON_LABELS)
    table = np.full(256, unlabelled + 1, np.uint8)
    table[: len(TO_COMMON[label_set])] = [COMMON_LABELS.index(name) for name in TO_COMMON[label_set]]
    table[NO_PARSING] = unlabelled
    common = table[labels]
    if (common > unlabelled).any():
        raise ValueError(
            f"the label map holds {labels[common > unlabelled].max()}; "
            f"{label_set!r} has labels 0 to {len(PARSING_LABELS[label_set]) - 1}"
        )
    size = map_size((labels.shape[0], labels.shape[1]), settings)
    return torch.cat([_averaged(common == label, size) for label in range(len(COMMON_LABELS))])


def draw_masks(masks: np.ndarray, target: int, settings: HmgSettings) -> torch.Tensor:
    """M_k and M_others = clamp(sum of the others, 0, 1) of person k = ``target``, (2, h, w) float32 in 0..1.

    Args:
        masks: (N, H, W), bool or in 0..1.

    Raises:
        ValueError: the array has another shape.
        IndexError: there is no such person.
    """
    if masks.ndim != 3:
        raise ValueError(f"masks are {masks.shape}, not (people, height, width)")
    if not 0 <= target < len(masks):
        raise IndexError(f"there are {len(masks)} masks, and none has the index {target}")
    others = np.delete(masks, target, axis=0).sum(axis=0, dtype=np.float32).clip(0, 1)
    size = map_size((masks.shape[1], masks.shape[2]), settings)
    return torch.cat([_averaged(masks[target], size), _averaged(others, size)])


def _averaged(plane: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Area averages of (H, W) on a grid of ``size``, (1, h, w)."""
    return F.adaptive_avg_pool2d(torch.from_numpy(plane.astype(np.float32))[None], size)


def stack_cue(maps: Sequence[torch.Tensor | None]) -> Cue | None:
    """One cue of a batch from that of each sample, None where a sample lacks it; None where all do.

    Raises:
        ValueError: the maps differ in size.
    """
    sizes = {tuple(one.shape) for one in maps if one is not None}
    if not sizes:
        return None
    if len(sizes) > 1:
        raise ValueError(f"the maps of a batch must have one size, not {sorted(sizes)}")
    empty = torch.zeros(sizes.pop())
    present = torch.tensor([one is not None for one in maps])
    return Cue(torch.stack([empty if one is None else one for one in maps]), present)
