"""Which samples of a view become pictures: people in many places and numbers, and never two pictures alike."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from dataset_tools.clips.alignment import View, seen_area
from dataset_tools.clips.people import foreground, parts
from dataset_tools.clips.plate import Plate
from dataset_tools.clips.reading import FrameStore

_SMALL = 96
"""Longer side of the masks that are compared."""
_MOST_FOREGROUND = 0.6
"""A sample of which more is foreground is not people in front of the plate, but a change of light or of the scene."""
_MOST_UNKNOWN = 0.2
"""People who border on what is not known for more than this share of their outline may go on there: not for masks."""
_NEW_NUMBER = 0.3
"""A number of people that no chosen picture has counts like so much of a change of their mask."""


@dataclass(eq=False)
class _Candidate:
    number: int
    small: np.ndarray
    """(h, w) bool: the foreground, shrunk."""
    people: int
    """How many separate parts it has."""


def choose_frames(
    frames: FrameStore, view: View, plate: Plate, *, most: int, min_person: float, min_change: float
) -> list[int]:
    """Numbers of the samples that show people well and differently, ascending; there may be none.

    Farthest-point selection: each next picture is the one whose people differ most, by 1 - IoU of all masks together,
    from those of the chosen picture that is most like it.

    Args:
        frames: with aligned samples.
        view: the plate's.
        plate: what is behind its people.
        most: largest number of pictures.
        min_person: smallest person, as a share of the picture.
        min_change: least 1 - IoU between the people of two pictures.
    """
    candidates = []
    for number, warp in zip(view.samples, view.warps, strict=True):
        # Beyond its edge a shaken sample shows its rim again, which is nobody.
        behind = plate.within(seen_area(warp, plate.known.shape))
        if candidate := _candidate(frames[number], number, behind, min_person):
            candidates.append(candidate)
    if not candidates:
        return []
    chosen = [max(candidates, key=lambda candidate: (candidate.people, -candidate.number))]
    nearest = {candidate.number: _change(candidate, chosen[0]) for candidate in candidates}
    while len(chosen) < most:
        counts = {candidate.people for candidate in chosen}
        open_ = [candidate for candidate in candidates if nearest[candidate.number] >= max(min_change, 1e-6)]
        if not open_:
            break

        def worth(candidate: _Candidate, counts: set[int] = counts) -> tuple[float, int]:
            return nearest[candidate.number] + _NEW_NUMBER * (candidate.people not in counts), -candidate.number

        chosen.append(max(open_, key=worth))
        for candidate in candidates:
            nearest[candidate.number] = min(nearest[candidate.number], _change(candidate, chosen[-1]))
    return sorted(candidate.number for candidate in chosen)


def _candidate(frame: np.ndarray, number: int, plate: Plate, min_person: float) -> _Candidate | None:
    mask = foreground(frame, plate, min_person)
    area = np.count_nonzero(mask)
    if not area or area > _MOST_FOREGROUND * mask.size:
        return None
    rim = cv2.dilate(mask.view(np.uint8), np.ones((3, 3), np.uint8)).view(bool) & ~mask
    if np.count_nonzero(rim & ~plate.known) > _MOST_UNKNOWN * np.count_nonzero(rim):
        return None
    scale = _SMALL / max(mask.shape)
    small = cv2.resize(mask.view(np.uint8) * 255, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) >= 128
    return _Candidate(number, small, len(parts(mask)))


def _change(first: _Candidate, second: _Candidate) -> float:
    """1 - IoU, 0..1."""
    either = np.count_nonzero(first.small | second.small)
    return 1 - np.count_nonzero(first.small & second.small) / either if either else 0.0
