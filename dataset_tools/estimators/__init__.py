"""Cues about people: pose, parsing and clean plates, each behind a small protocol.

All estimators see the upright image at its final size, and the people's clean masks at that size.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dataset_tools.records import ImageRecord


class PoseEstimator(Protocol):
    """Finds 18 OpenPose keypoints a person."""

    name: str
    places: tuple[str, ...]
    """Folders and URLs that messages may name."""

    def estimate_pose(
        self,
        image: np.ndarray,
        masks: list[np.ndarray],
        record: ImageRecord,
        ids: list[str],
    ) -> np.ndarray:
        """Keypoints for each mask.

        Args:
            image: (H, W, 3) uint8 RGB.
            masks: one (H, W) bool a person.
            record: the image's row of the curation table.
            ids: ``InstanceRecord.id`` of each mask, in the same order.

        Returns:
            (len(masks), 18, 3) float32: x and y in pixels of ``image``, score in 0..1; a joint that was not
            found is 0, 0, 0. Order of joints: `dataset_tools.schema.KEYPOINTS`.

        Raises:
            Rejected: no estimate is possible for this image.
        """
        ...


class ParsingEstimator(Protocol):
    """Labels body parts and clothes."""

    name: str
    places: tuple[str, ...]
    """Folders and URLs that messages may name."""
    label_set: str
    """``lip``, ``atr`` or ``pascal``: see `dataset_tools.schema.PARSING_LABELS`."""

    def estimate_parsing(
        self,
        image: np.ndarray,
        masks: list[np.ndarray],
        record: ImageRecord,
        ids: list[str],
    ) -> np.ndarray:
        """(H, W) uint8 label map; 0 outside people. Arguments and errors as `PoseEstimator.estimate_pose`."""
        ...


class PlateProvider(Protocol):
    """Knows the scene without its people."""

    name: str
    places: tuple[str, ...]
    """Folders and URLs that messages may name."""

    def clean_plate(self, image: np.ndarray, record: ImageRecord) -> np.ndarray:
        """(H, W, 3) uint8 RGB of the same scene without people. Raises `Rejected` where none is known."""
        ...
