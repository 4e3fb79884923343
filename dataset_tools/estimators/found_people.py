"""What networks that find people have in common: whom to believe, one mask a person, and an order of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from pydantic import Field

from dataset_tools.errors import Rejected
from dataset_tools.estimators import FoundPeople
from dataset_tools.estimators.network import NetworkEstimator, NetworkSettings
from dataset_tools.masks import MaskSettings, bounds, clean_mask

Seen: TypeAlias = tuple[list[np.ndarray], list[float]]
"""Masks (H, W) bool, as a network gives them, and scores 0..1."""


LEAST_LEFT = 0.5
"""What must be left of a mask that gave pixels to better ones, as in the merging of Kirillov et al., Panoptic
Segmentation (2019): less is a second view of the same people."""


class InstancesSettings(NetworkSettings):
    """Whom to believe, and how masks are cleaned."""

    min_score: float = Field(0.5, ge=0, le=1)
    """Whom the network scores lower is nobody."""
    same_person_iou: float = Field(0.5, gt=0, le=1)
    """Masks whose intersection over union is larger are one person's; the one of the higher score stays."""
    masks: MaskSettings = MaskSettings()


class PeopleFinder(NetworkEstimator):
    """A network that finds people: see `dataset_tools.estimators.InstanceEstimator`."""

    settings: InstancesSettings

    def find(self, images: Sequence[np.ndarray]) -> list[FoundPeople]:
        """The people in each of several pictures, (H, W, 3) uint8 RGB of any sizes.

        Pictures are seen together only where the network needs to pad none of them, so that what is found in one does
        not hang on its neighbours: at most their rounding differs.
        """
        found = []
        for start in range(0, len(images), self.batch_size):
            with self.model() as model:
                seen = self._see(model, images[start : start + self.batch_size])
            found += [found_people(masks, scores, self.settings) for masks, scores in seen]
        return found

    @abstractmethod
    def _see(self, model: Any, images: Sequence[np.ndarray]) -> list[Seen]:
        """What the network makes of at most `batch_size` pictures."""
        ...


def found_people(masks: Sequence[np.ndarray], scores: Sequence[float], settings: InstancesSettings) -> FoundPeople:
    """Make people of what a network saw in one picture, whatever the order it saw them in.

    The higher score goes first: it suppresses masks of the same person (non-maximum suppression by mask IoU) and keeps
    the pixels that others claim too. Who then has no usable mask, by `dataset_tools.masks.clean_mask`, or less than
    `LEAST_LEFT` of their own, is left out.

    Args:
        masks: (H, W) bool each, all of one size; they may overlap, and be empty.
        scores: 0..1, one a mask.
        settings: what to leave out.

    Returns:
        Disjoint masks, from left to right by their centroids, and from top to bottom where two stand above each other.
    """
    # Equal scores are told apart by the masks themselves.
    by_score = sorted(range(len(masks)), key=lambda k: (-scores[k], np.packbits(masks[k]).tobytes()))
    whole: list[np.ndarray] = []
    people: list[tuple[np.ndarray, float]] = []
    taken = np.zeros(masks[0].shape, bool) if len(masks) else np.zeros((0, 0), bool)
    for k in by_score:
        if scores[k] < settings.min_score:
            break
        try:
            mask = clean_mask(masks[k], settings.masks)
            if any(_iou(mask, other) > settings.same_person_iou for other in whole):
                continue
            # Cleaning fills holes, and in a hole there may be somebody.
            own = clean_mask(mask & ~taken, settings.masks) & ~taken
        except Rejected:
            continue
        if np.count_nonzero(own) < LEAST_LEFT * np.count_nonzero(mask):
            continue
        whole.append(mask)
        people.append((own, float(scores[k])))
        taken |= own
    people.sort(key=lambda person: _centroid(person[0]))
    return FoundPeople([mask for mask, _ in people], [score for _, score in people])


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks (H, W) that are not empty."""
    top, bottom, left, right = bounds(b)
    window = np.s_[top:bottom, left:right]
    shared = np.count_nonzero(a[window] & b[window])
    return shared / (np.count_nonzero(a) + np.count_nonzero(b) - shared)


def _centroid(mask: np.ndarray) -> tuple[float, float]:
    """Column and row of a mask's centre."""
    rows, columns = np.nonzero(mask)
    return float(columns.mean()), float(rows.mean())
