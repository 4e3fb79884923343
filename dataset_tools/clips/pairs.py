"""Pairs from a clip: its views, their clean plates, and pictures of people with a mask each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydantic import Field

from dataset_tools.clips.alignment import View, align, find_views, seen_area
from dataset_tools.clips.frames import choose_frames
from dataset_tools.clips.people import PeopleInFront, foreground, parts, told_apart
from dataset_tools.clips.plate import Plate, estimate_plate
from dataset_tools.clips.reading import Samples, read_samples
from dataset_tools.errors import Rejected
from dataset_tools.estimators import InstanceEstimator
from dataset_tools.pair_list import PairRow
from dataset_tools.schema import MadeBy, encode_png
from dataset_tools.settings import Settings

_MARGIN = 1 / 100
"""What is wrong in a picture makes its surroundings unknown, so far as a share of the picture's longer side."""


class ClipSettings(Settings):
    """How clips become pairs."""

    samples: int = Field(96, ge=16, le=1024)
    """Largest number of frames of a clip that its plates are made of, and that pictures are chosen from."""
    max_side: int = Field(1280, ge=64, le=8192)
    """Pixels; frames whose longer side is longer are shrunk to it."""
    max_shake: float = Field(0.03, ge=0, le=0.2)
    """Largest displacement of a corner that is put right, as a share of the picture's diagonal. What moved farther is
    another view, and gets a plate of its own."""
    min_samples: int = Field(12, ge=6)
    """Views of fewer samples are set aside."""
    min_known: float = Field(0.6, ge=0, le=1)
    """Views whose plate is known on a smaller share of the picture are set aside: rain, moving trees, crowds."""
    frames_per_clip: int = Field(8, ge=1, le=256)
    """Largest number of pictures, shared by the views of a clip."""
    min_person: float = Field(0.001, gt=0, lt=1)
    """Smallest person, as a share of the picture's area; what is smaller is noise."""
    min_change: float = Field(0.3, gt=0, le=1)
    """By how much two pictures of a view differ at least: 1 - IoU of everybody in them."""


@dataclass
class ClipPairs:
    """What came of a clip."""

    group: str
    """Digest of the clip's bytes: copies are one scene."""
    rows: list[PairRow] = field(default_factory=list)
    refused: list[Rejected] = field(default_factory=list)
    """Why the clip, or a view of it, cannot be used."""
    mended: list[tuple[str, str]] = field(default_factory=list)
    """Reason and message."""
    views: list[dict[str, Any]] = field(default_factory=list)
    """What was measured of each view that was used."""


def pairs_of_clip(
    path: Path, name: str, settings: ClipSettings, instances: InstanceEstimator | None, put: Callable[[str, bytes], Any]
) -> ClipPairs:
    """Find plates and pictures of one clip.

    Args:
        path: of the clip, a local file.
        name: letters, digits, ``-`` and ``_``; the start of all ids, and the folder of all files in the rows.
        settings: how.
        instances: tells people apart, and from other things that move; None: each connected part is a person.
        put: takes each file, its name within the folder and its bytes.
    """
    with path.open("rb") as file:
        clip = ClipPairs(hashlib.file_digest(file, "sha256").hexdigest())
    try:
        with read_samples(path, settings.samples, settings.max_side) as samples:
            clip.mended = samples.mended
            _Clip(samples, name, settings, instances, put, clip).run()
    except Rejected as error:
        clip.refused.append(error)
    return clip


@dataclass
class _Clip:
    samples: Samples
    name: str
    settings: ClipSettings
    instances: InstanceEstimator | None
    put: Callable[[str, bytes], Any]
    result: ClipPairs

    def run(self) -> None:
        settings, total = self.settings, len(self.samples.times)
        if total < settings.min_samples:
            raise Rejected("too-short", f"the clip has {total} frames, and a plate needs {settings.min_samples}")
        views = find_views(self.samples.frames, settings.max_shake)
        usable = [view for view in views if len(view.samples) >= settings.min_samples]
        lost = sum(len(view.samples) for view in views if view not in usable)
        if lost:
            message = (
                f"{lost} of {total} samples fit no view of {settings.min_samples} samples or more: the camera moves, "
                "or the scene changes"
            )
            self.result.refused.append(Rejected("camera-moves", message))
        most = max(1, settings.frames_per_clip // max(1, len(usable)))
        for number, view in enumerate(usable):
            try:
                self._use(number, view, most)
            except Rejected as error:
                self.result.refused.append(error)

    def _use(self, number: int, view: View, most: int) -> None:
        frames, settings = self.samples.frames, self.settings
        align(frames, view)
        plate = estimate_plate(frames, view)
        if self.instances is not None:
            # Who is in the plate stood there all the time.
            for mask in self.instances.find([plate.background])[0].masks:
                plate.known &= ~_grown(mask)
        share = float(plate.known.mean())
        where = f"view {number + 1}, from second {self.samples.times[view.samples[0]]:.1f} on"
        if share < settings.min_known:
            raise Rejected("restless-view", f"{where}: its plate is known on {share:.0%} of the picture only")
        chosen = choose_frames(
            frames,
            view,
            plate,
            most=most,
            min_person=settings.min_person,
            min_change=settings.min_change,
        )
        rows = [row for each in chosen if (row := self._row(each, number, view, plate))]
        if not rows:
            raise Rejected("nobody-moves", f"{where}: nobody is seen in front of what is known of the plate")
        self.put(f"plate-{number}.png", encode_png(plate.background))
        self.put(f"known-{number}.png", _grey(plate.known))
        self.result.rows += rows
        self.result.views.append(
            {
                "samples": len(view.samples),
                "shaken": view.shaken,
                "known": round(share, 4),
                "noise": round(float(np.median(plate.noise)), 2),
                "gains": [round(float(gain), 3) for gain in (view.gains.min(), view.gains.max())],
                "pictures": len(rows),
            }
        )

    def _row(self, number: int, view_number: int, view: View, plate: Plate) -> PairRow | None:
        """Write a picture and its masks; None where a network finds nobody in it."""
        frame, size = self.samples.frames[number], plate.known.shape
        seen = seen_area(view.warps[view.samples.index(number)], size)
        somebody = foreground(frame, plate.within(seen), self.settings.min_person)
        found = self.instances.find([frame])[0] if self.instances else None
        people = PeopleInFront(parts(somebody)) if found is None else told_apart(somebody, found)
        if not people.masks:
            return None
        if people.others is not None:
            seen &= ~_grown(people.others)
        stem = f"{round(self.samples.times[number] * 1000):08d}"
        known = f"known-{view_number}.png"
        if (plate.known & ~seen).any():
            known = f"{stem}-known.png"
            self.put(known, _grey(plate.known & seen))
        self.put(f"{stem}.png", encode_png(frame))
        masks = [f"{stem}-{person}.png" for person in range(1, len(people.masks) + 1)]
        for mask_name, mask in zip(masks, people.masks, strict=True):
            self.put(mask_name, _grey(mask))
        return PairRow(
            id=f"{self.name}-{stem}",
            group=self.result.group,
            image=f"{self.name}/{stem}.png",
            background=f"{self.name}/plate-{view_number}.png",
            known=f"{self.name}/{known}",
            masks=[f"{self.name}/{mask_name}" for mask_name in masks],
            mask_scores=[round(score, 6) for score in people.scores],
            masks_by=self.instances.name if self.instances else "difference",
            plate_by=MadeBy("video", version=f"av {version('av')}"),
        )


def _grown(mask: np.ndarray) -> np.ndarray:
    side = 2 * max(1, round(max(mask.shape) * _MARGIN)) + 1
    return cv2.dilate(mask.view(np.uint8), np.ones((side, side), np.uint8)).view(bool)


def _grey(mask: np.ndarray) -> bytes:
    return encode_png(mask.astype(np.uint8) * 255)
