"""Where the faces of people lie in a picture, by what is known of them: joints of the head, labels of body parts."""

from __future__ import annotations

import cv2
import numpy as np

from dataset_tools.masks import bounds
from dataset_tools.schema import KEYPOINTS, PARSING_LABELS, Person

FACE_LABELS = ("Face", "Sunglasses", "Head")
"""Of `PARSING_LABELS`: what belongs to a face, or holds it."""
HALF_WIDTH, HALF_HEIGHT = 10.0, 14.0
"""Centimetres; a head is 15 wide and 23 high, and joints are found to within one or two."""
LENGTHS = {
    ("right_ear", "left_ear"): 15.0,
    ("right_eye", "left_eye"): 6.3,
    ("nose", "right_eye"): 4.0,
    ("nose", "left_eye"): 4.0,
    ("nose", "right_ear"): 14.0,
    ("nose", "left_ear"): 14.0,
    ("right_eye", "right_ear"): 9.0,
    ("left_eye", "left_ear"): 9.0,
    ("nose", "neck"): 22.0,
    ("right_shoulder", "left_shoulder"): 36.0,
}
"""Centimetres between two joints of an adult (means of anthropometric surveys such as ANSUR, rounded down). Seen at an
angle they are shorter: the largest scale that any of them gives is nearest."""
FRONTAL = 8.0
"""Centimetres from the nose to an ear as a face shows them from the front; where no eye was found that tells of the
angle, too large a region is the lesser harm."""
HEAD, BODY = 16.0, 60.0
"""Centimetres: root of the area that a head and a whole person cover at least, where nothing else tells their scale. Of
whom no joint below the head was found, no more than a head may be seen."""

_SIDES = ("right", "left")
_EYES = [KEYPOINTS.index(f"{side}_eye") for side in _SIDES]
_HEAD = [KEYPOINTS.index(name) for name in ("nose", "right_eye", "left_eye", "right_ear", "left_ear")]
_NECK = KEYPOINTS.index("neck")


def face_of(person: Person, parsing: np.ndarray, label_set: str) -> np.ndarray | None:
    """Where a person's face is, (H, W) bool; None where it is not seen, or nothing is known about it.

    An ellipse around the joints of the head, together with what the parsing calls face. People who are seen from
    behind have a "face" as well, where their ears were found.

    Args:
        person: mask and keypoints at the picture's size.
        parsing: (H, W) uint8, labels of ``label_set``.
    """
    region = _ellipse(person)
    labels = [label for label, name in enumerate(PARSING_LABELS[label_set]) if name in FACE_LABELS]
    region |= np.isin(parsing, labels) & person.mask
    return region if region.any() else None


def _ellipse(person: Person) -> np.ndarray:
    canvas = np.zeros(person.mask.shape, np.uint8)
    found, points = person.keypoints[:, 2] > 0, person.keypoints[:, :2].astype(np.float64)
    lengths = LENGTHS if found[_EYES].any() else LENGTHS | {("nose", f"{side}_ear"): FRONTAL for side in _SIDES}
    head = [joint for joint in _HEAD if found[joint]]
    if not head:
        return canvas.view(bool)
    centre = points[head].mean(axis=0)
    scales = [
        float(np.linalg.norm(points[one] - points[other])) / length
        for one, other, length in (
            (KEYPOINTS.index(a), KEYPOINTS.index(b), length) for (a, b), length in lengths.items()
        )
        if found[one] and found[other]
    ]
    seen = BODY if np.delete(found, _HEAD).any() else HEAD
    scale = max(scales, default=0.0) or float(np.sqrt(np.count_nonzero(person.mask))) / seen
    down = points[_NECK] - centre if found[_NECK] else np.array([0.0, 1.0])
    angle = float(np.degrees(np.arctan2(down[1], down[0]))) - 90
    axes = (round(16 * HALF_WIDTH * scale), round(16 * HALF_HEIGHT * scale))
    x, y = (round(16 * value) for value in centre)
    cv2.ellipse(canvas, (x, y), axes, angle, 0, 360, 1, cv2.FILLED, shift=4)
    return canvas.view(bool)


def face_height(person: Person, parsing: np.ndarray, label_set: str) -> int | None:
    """Height in pixels of `face_of` a person; None where there is none."""
    region = face_of(person, parsing, label_set)
    if region is None:
        return None
    top, bottom, _, _ = bounds(region)
    return bottom - top
