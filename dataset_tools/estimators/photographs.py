"""What networks see in single photographs of any size: who is there, and the cues of those who are.

A network is shown a photograph at no more than `LONGEST_SIDE` pixels a side, and what it answers is brought back to the
photograph's own size: networks shrink pictures to about a thousand pixels anyway.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image

from dataset_tools.colours import Profile
from dataset_tools.errors import Rejected
from dataset_tools.estimators import (
    Estimator,
    FoundPeople,
    InstanceEstimator,
    ParsingEstimator,
    PeopleInPicture,
    PoseEstimator,
)
from dataset_tools.images import MOST_PIXELS, DecodeSettings, decode_image
from dataset_tools.photo_masks import FoundMask
from dataset_tools.photographs import Photograph, read_file

T = TypeVar("T")

LONGEST_SIDE = 2048
"""Pixels."""


@dataclass(eq=False)
class PeopleInPhotograph:
    """Whom a network found in a photograph."""

    picture: np.ndarray
    """(h, w, 3) uint8 sRGB, upright: what the network saw."""
    people: FoundPeople
    """In ``picture``."""
    size: tuple[int, int]
    """Height and width of the upright photograph."""

    def masks(self) -> Iterator[np.ndarray]:
        """(H, W) bool of each person in the photograph; no pixel is in two of them."""
        height, width = self.size
        for mask in self.people.masks:
            if mask.shape != self.size:
                soft = cv2.resize(mask * np.uint8(255), (width, height), interpolation=cv2.INTER_LINEAR)
                mask = soft > 128  # more than half: of no two people
            yield mask


class NetworkMasks:
    """Masks of the people in photographs, found by a network: a `dataset_tools.photo_masks.PhotoMasks`.

    Args:
        network: finds them.
        photographs: their files, by the names that `of` is given.
    """

    def __init__(self, network: InstanceEstimator, photographs: Mapping[str, Path]) -> None:
        self.network = network
        self._photographs = photographs

    def look(self, photograph: str) -> PeopleInPhotograph:
        """Whom the network finds in a photograph.

        Raises:
            Rejected: as `read_file`; as `decode_image`; ``network-failed``; ``nobody-found``.
        """
        data = read_file(self._photographs[photograph])
        settings = DecodeSettings(min_side=1, max_pixels=MOST_PIXELS, max_side=LONGEST_SIDE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about damaged EXIF
            decoded = decode_image(data, settings)
        people = _answer(self.network, lambda: self.network.find([decoded.image]))
        if not people.masks:
            raise Rejected("nobody-found", f"{self.network.made_by.network} finds nobody in it")
        width, height = decoded.stored_size if decoded.orientation < 5 else decoded.stored_size[::-1]
        return PeopleInPhotograph(decoded.image, people, (height, width))

    def of(self, photograph: str) -> Iterator[FoundMask]:
        """The people of one photograph, from left to right. Raises `Rejected` as `look`."""
        for number, mask in enumerate(self.look(photograph).masks(), start=1):
            yield FoundMask(str(number), "Person", "png", number, self.network.made_by.network, mask)


@dataclass(eq=False)
class Cues:
    """What is known of the people in a photograph beside their masks."""

    pose: np.ndarray | None = None
    """(N, 18, 3) float32: x and y in pixels of the photograph, score 0..1; see `PoseEstimator`."""
    parsing: np.ndarray | None = None
    """(H, W) uint8, labels of ``label_set``; 0 outside of the people."""
    label_set: str = "none"
    notes: list[str] = field(default_factory=list)
    """Why a cue is missing that was looked for."""


@dataclass(frozen=True)
class CueNetworks:
    """Networks that look at people whose masks are known; None for a cue that is not looked for."""

    pose: PoseEstimator | None = None
    parsing: ParsingEstimator | None = None

    def look(self, photograph: Photograph) -> Cues:
        """The cues of a photograph's people, as far as there are networks, and these can tell."""
        cues = Cues()
        if self.pose is None and self.parsing is None:
            return cues
        seen = _shown(photograph)
        if self.pose is not None:
            try:
                cues.pose = self._pose(self.pose, seen, photograph)
            except Rejected as error:
                cues.notes.append(f"no pose: {error.message}")
        if self.parsing is not None:
            try:
                cues.parsing = self._parsing(self.parsing, seen, photograph)
                cues.label_set = self.parsing.label_set
            except Rejected as error:
                cues.notes.append(f"no parsing: {error.message}")
        return cues

    @staticmethod
    def _pose(network: PoseEstimator, seen: PeopleInPicture, photograph: Photograph) -> np.ndarray:
        pose = _answer(network, lambda: network.estimate_pose([seen])).copy()
        scale = np.array(photograph.image.shape[1::-1], np.float32) / seen.image.shape[1::-1]
        there = pose[..., 2] > 0
        pose[there, :2] = (pose[there, :2] + 0.5) * scale - 0.5
        return pose

    @staticmethod
    def _parsing(network: ParsingEstimator, seen: PeopleInPicture, photograph: Photograph) -> np.ndarray:
        labels = _answer(network, lambda: network.estimate_parsing([seen]))
        size = photograph.image.shape[1::-1]
        labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT)
        labels[~np.logical_or.reduce(photograph.people)] = 0
        return labels


def _shown(photograph: Photograph) -> PeopleInPicture:
    """A photograph and its people as networks are shown them: reduced, in sRGB."""
    image, masks = photograph.image, photograph.people
    height, width = image.shape[:2]
    scale = LONGEST_SIDE / max(height, width)
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        # Of a person, however small, something is left.
        masks = [cv2.resize(mask * np.uint8(255), size, interpolation=cv2.INTER_AREA) > 0 for mask in masks]
    if photograph.icc_profile is not None:
        image = np.asarray(Profile(photograph.icc_profile, "RGB").to_srgb(Image.fromarray(image)))
    return PeopleInPicture(image, masks)


def _answer(network: Estimator, answers: Callable[[], Sequence[T | Rejected]]) -> T:
    """A network's answer to one picture. Raises `Rejected` where it has none, or fails."""
    try:
        (answer,) = answers()
    except RuntimeError as error:  # torch's, such as that the GPU's memory does not suffice
        why = " ".join(str(error).split())[:200]
        raise Rejected("network-failed", f"{network.made_by.network} failed on it: {why}") from None
    if isinstance(answer, Rejected):
        raise answer
    return answer
