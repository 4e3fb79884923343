"""What sees people in pictures: instances, pose, parsing and clean plates, each behind a small protocol.

All see upright pictures at their final size. Networks and what they need are imported when one is first run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from dataset_tools.errors import Rejected
from dataset_tools.records import ImageRecord
from dataset_tools.schema import EffectKind, MadeBy


@dataclass(eq=False)
class FoundPeople:
    """The people that a network found in one picture; there may be none."""

    masks: list[np.ndarray]
    """(H, W) bool each: clean, none empty, no pixel in two of them; from left to right."""
    scores: list[float]
    """The network's score of each, 0..1."""


@dataclass(eq=False)
class PeopleInPicture:
    """A picture and the people in it, as pose and parsing estimators take it."""

    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    masks: list[np.ndarray]
    """(H, W) bool, clean, one a person."""
    ids: list[str] = field(default_factory=list)
    """``InstanceRecord.id`` of each person, in the same order; for side-cars."""
    record: ImageRecord | None = None
    """The image's row of the curation table; for side-cars."""


class Estimator(Protocol):
    """What all estimators have in common."""

    name: str
    """The ``kind`` of its settings."""
    batch_size: int
    """How many pictures (or people) it works on at once; 1 where that gains nothing."""

    @property
    def places(self) -> tuple[str, ...]:
        """Folders and URLs that messages may name."""
        ...

    @property
    def made_by(self) -> MadeBy:
        """What samples say of it. Raises `UserError` as `fingerprint`."""
        ...

    def fingerprint(self) -> str:
        """Digest of all that decides about its answers: settings, weights, versions; no paths.

        Raises:
            UserError: its files cannot be read, or are not what they must be.
        """
        ...

    def check(self) -> None:
        """Load all that it needs. Raises `UserError` where that cannot be used."""
        ...


class InstanceEstimator(Estimator, Protocol):
    """Finds people and their masks."""

    def find(self, images: Sequence[np.ndarray]) -> list[FoundPeople]:
        """The people in each of several pictures, (H, W, 3) uint8 RGB of any sizes."""
        ...


class PoseEstimator(Estimator, Protocol):
    """Finds 18 OpenPose keypoints a person."""

    def estimate_pose(self, pictures: Sequence[PeopleInPicture]) -> list[np.ndarray | Rejected]:
        """Keypoints of the people of each picture, or why there can be none.

        Returns:
            One (len(masks), 18, 3) float32 a picture: x and y in pixels, score in 0..1; a joint that was not found is
            0, 0, 0, and so is every joint of a mask that no skeleton belongs to. Order of joints:
            `dataset_tools.schema.KEYPOINTS`.
        """
        ...


class ParsingEstimator(Estimator, Protocol):
    """Labels body parts and clothes."""

    @property
    def label_set(self) -> str:
        """``lip``, ``atr`` or ``pascal``: see `dataset_tools.schema.PARSING_LABELS`. Raises `UserError` as `check`."""
        ...

    def estimate_parsing(self, pictures: Sequence[PeopleInPicture]) -> list[np.ndarray | Rejected]:
        """One (H, W) uint8 label map a picture, 0 outside its people; or why there can be none."""
        ...


@dataclass(frozen=True)
class FoundRegion:
    """Something that a network found in a picture."""

    label: str
    """What it is, as the settings call it."""
    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels; it may go beyond the picture."""


class RegionDetector(Estimator, Protocol):
    """Finds faces, licence plates or whatever else it knows, by their boxes."""

    def find_regions(self, images: Sequence[np.ndarray]) -> list[list[FoundRegion]]:
        """What is in each of several pictures, (H, W, 3) uint8 RGB of any sizes."""
        ...


@dataclass(eq=False)
class CleanPlate:
    """The scene of a picture without its people, and what else its provider knows. Arrays have the picture's size."""

    background: np.ndarray
    """(H, W, 3) uint8 RGB."""
    known: np.ndarray
    """(H, W) bool: where ``background`` is what was there. Elsewhere it holds plausible colours."""
    made_by: MadeBy
    """For `dataset_tools.schema.Makers.plate`."""
    effects: dict[str, np.ndarray] | None = None
    """Id of a person to where the picture shows their shadow or reflection, (H, W) bool; the id ``""``: somebody's, the
    provider does not know whose. None: it knows nothing of effects, which is not the same as none in the picture."""
    kinds: dict[str, tuple[EffectKind, ...]] = field(default_factory=dict)
    """Of what kinds they are, by the same ids."""
    tells_effects: bool = field(default=True, kw_only=True)
    """Whether the picture differs from it where effects show. Not so where it was painted into the picture itself: what
    it shows outside of the masks, shadows included, is the picture's."""
    sha256: str = field(default="", kw_only=True)
    """Of the file that ``background`` was read from, hex; empty where there is none."""


@runtime_checkable
class PlateProvider(Protocol):
    """Knows the scene without its people. A source that ships clean plates is one itself."""

    name: str

    @property
    def places(self) -> tuple[str, ...]:
        """Folders and URLs that messages may name."""
        ...

    def clean_plate(self, image: np.ndarray, record: ImageRecord) -> CleanPlate:
        """The scene of ``image``, (H, W, 3) uint8 RGB, upright and at its final size.

        Raises:
            Rejected: none is known.
        """
        ...
