"""Mask-based isolation (section G.8): faces or all of the people who stay are taken out of the editable region."""

from __future__ import annotations

from typing import Literal

import numpy as np

from dataset_tools.schema import KEYPOINTS, PARSING_LABELS

Protect = Literal["faces", "people"]

FACE_LABELS: dict[str, tuple[str, ...]] = {
    "lip": ("Face", "Sunglasses"),
    "atr": ("Face", "Sunglasses"),
    "pascal": ("Head",),
    "none": (),
}
"""Labels of a face; Pascal knows whole heads only."""
HEAD_JOINTS = tuple(KEYPOINTS.index(name) for name in ("nose", "right_eye", "left_eye", "right_ear", "left_ear"))


def isolate(
    target: np.ndarray,
    others: np.ndarray,
    protect: Protect,
    *,
    parsing: np.ndarray | None = None,
    label_set: str = "none",
    keypoints: np.ndarray | None = None,
) -> np.ndarray:
    """The refined mask: ``target`` without the faces, or without all, of the others; pixels outside it are kept.

    Give masks as they were found, not widened ones: where a mask of somebody who stays reaches over the target's own
    face, that face counts as theirs.

    Args:
        target: (H, W) bool, who is edited.
        others: (N, H, W) bool, the people who stay; N may be 0.
        protect: ``faces`` as `face_region` finds them, or ``people``, the others' whole masks.
        parsing: (H, W) uint8 label map of ``label_set``, where known.
        keypoints: (N, 18, 3), the others' joints in pixels with scores, where known.

    Raises:
        ValueError: sizes or numbers of people differ, or the label set is unknown.
    """
    if others.ndim != 3 or others.shape[1:] != target.shape:
        raise ValueError(f"masks of others are {others.shape}, expected (people, {target.shape[0]}, {target.shape[1]})")
    if keypoints is not None and keypoints.shape != (len(others), len(KEYPOINTS), 3):
        raise ValueError(f"keypoints are {keypoints.shape}, expected ({len(others)}, {len(KEYPOINTS)}, 3)")
    refined = target.copy()
    for index, mask in enumerate(others):
        if protect == "faces":
            joints = None if keypoints is None else keypoints[index]
            mask = face_region(mask, parsing=parsing, label_set=label_set, keypoints=joints)
        refined &= ~mask
    return refined


def face_region(
    mask: np.ndarray,
    *,
    parsing: np.ndarray | None = None,
    label_set: str = "none",
    keypoints: np.ndarray | None = None,
) -> np.ndarray:
    """Where the face of one person is, (H, W) bool, within the person's own ``mask``.

    The face labels of the parsing where it has any in the mask; else, with two or more joints of the head found, a
    disc around their mean whose radius is the largest distance between two of them (generous, since the mask bounds
    it); else nothing.

    Raises:
        ValueError: the parsing differs in size from the mask, or its label set is unknown.
    """
    if label_set not in FACE_LABELS:
        raise ValueError(f"unknown label set {label_set!r}: use one of {', '.join(FACE_LABELS)}")
    if parsing is not None:
        if parsing.shape != mask.shape:
            raise ValueError(f"the label map is {parsing.shape}, the mask {mask.shape}")
        labels = [PARSING_LABELS[label_set].index(name) for name in FACE_LABELS[label_set]]
        face: np.ndarray = mask & np.isin(parsing, labels)
        if face.any():
            return face
    if keypoints is None:
        return np.zeros_like(mask)
    head = keypoints[list(HEAD_JOINTS)]
    points = head[head[:, 2] > 0, :2].astype(np.float64)
    if len(points) < 2:
        return np.zeros_like(mask)
    radius = np.linalg.norm(points[:, None] - points[None], axis=-1).max()
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]]
    x, y = points.mean(0)
    disc: np.ndarray = mask & ((columns - x) ** 2 + (rows - y) ** 2 <= radius**2)
    return disc
