"""Curated samples: one chosen photograph becomes one sample of ``real`` or ``paired``.

fetch and decode -> clean masks -> pose, parsing and clean plate -> sample.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field

from dataset_tools.errors import Rejected
from dataset_tools.estimators import ParsingEstimator, PlateProvider, PoseEstimator
from dataset_tools.fetch import map_in_order
from dataset_tools.images import Decoded, DecodeSettings, decode_image
from dataset_tools.masks import MaskSettings, clean_mask, fit_mask
from dataset_tools.records import ImageRecord, Rejection
from dataset_tools.schema import NO_PARSING, Origin, Person, Sample
from dataset_tools.settings import Settings
from dataset_tools.shards import keypoints_in_box
from dataset_tools.sources import Source

Result = TypeVar("Result")

FOLDERS = re.compile(r"(?:\w+://|/)\S*/")
"""The folders of an absolute path or URL."""


def without_folders(message: str, places: Iterable[str]) -> str:
    """A message without the folders of this machine that it names, so that it is the same wherever it arose.

    Args:
        places: folders and URLs that may stand in it, also relative ones and such with spaces.
    """
    for place in sorted(places, key=len, reverse=True):
        message = message.replace(f"{place.rstrip('/')}/", "")
    return FOLDERS.sub("", message)


class CuratedSettings(Settings):
    """How chosen photographs become samples."""

    configuration: Literal["real", "paired"] = "real"
    """``paired`` needs clean plates: an image without one is set aside. In both, an image is set aside whose people do
    not all have a usable mask: who has none could be neither erased nor left in place."""
    decode: DecodeSettings = DecodeSettings()
    masks: MaskSettings = MaskSettings()
    fetch_workers: int = Field(8, ge=1, le=256)
    """Images fetched and decoded at once within one shard."""


@dataclass(frozen=True)
class Estimators:
    """The cues to compute; None where one is not wanted."""

    pose: PoseEstimator | None = None
    parsing: ParsingEstimator | None = None
    plate: PlateProvider | None = None


@dataclass
class FetchedPhotograph:
    """A fetched and decoded image with its masks as stored."""

    record: ImageRecord
    decoded: Decoded
    sha256: str
    masks: list[np.ndarray | Rejected]
    """One (h, w) bool an instance of the record, or why it could not be read."""

    def origin(self, role: Literal["image", "background"]) -> Origin:
        """Where the picture comes from and what was done to it."""
        record = self.record
        return Origin(
            role=role,
            source=record.source,
            id=record.id,
            licence=record.licence,
            author=record.author,
            author_url=record.author_url,
            title=record.title,
            url=record.url,
            landing_url=record.landing_url,
            sha256=self.sha256,
            transform=self.decoded.transform,
        )


class StageFailed(Rejected):
    """A `Rejected` that knows at which stage it happened."""

    def __init__(self, stage: str, error: Rejected) -> None:
        super().__init__(error.reason, error.message, transient=error.transient)
        self.stage = stage


@dataclass
class Notes:
    """Collects what was set aside or mended while one image goes through the stages."""

    record: ImageRecord
    rows: list[Rejection]
    places: Sequence[str]
    """Folders and URLs of this machine, which stay out of messages: datasets are published."""

    def reject(self, error: Rejected, instance: str = "") -> None:
        """The image, or the mask of one person of it, cannot be used."""
        stage = error.stage if isinstance(error, StageFailed) else "mask"
        outcome: Literal["person-rejected", "image-rejected"] = "person-rejected" if instance else "image-rejected"
        self._add(instance, stage, outcome, error.reason, error.message, error.transient)

    def mend(self, stage: str, reason: str, message: str, instance: str = "") -> None:
        """Something unusual was put right."""
        self._add(instance, stage, "mended", reason, message, False)

    def _add(self, instance: str, stage: str, outcome: Any, reason: str, message: str, transient: bool) -> None:
        message = without_folders(message, self.places)
        self.rows.append(
            Rejection(self.record.split, self.record.id, instance, stage, outcome, reason, message, transient)
        )


def photographs(
    records: Iterable[ImageRecord], source: Source, settings: CuratedSettings, rejected: list[Rejection]
) -> Iterator[FetchedPhotograph]:
    """Fetch and decode, several at once, in the order of the records; failures go to ``rejected``."""

    def fetch(record: ImageRecord) -> FetchedPhotograph:
        data = _stage("fetch", partial(source.read_image, record))
        rotation = None if source.applies_exif else record.rotation
        decoded = _stage("decode", partial(decode_image, data, settings.decode, rotation=rotation))
        masks = [_mask_or_why(source, record, index) for index in range(len(record.instances))]
        return FetchedPhotograph(record, decoded, hashlib.sha256(data).hexdigest(), masks)

    records = list(records)
    fetched = map_in_order(fetch, records, settings.fetch_workers, 2 * settings.fetch_workers)
    for record, outcome in zip(records, fetched, strict=True):
        notes = Notes(record, rejected, source.places)
        if isinstance(outcome, Rejected):
            notes.reject(outcome)
        else:
            for reason, message in outcome.decoded.mended:
                notes.mend("decode", reason, message)
            yield outcome


def curated_samples(
    records: Iterable[ImageRecord],
    source: Source,
    settings: CuratedSettings,
    estimators: Estimators,
    rejected: list[Rejection],
) -> Iterator[Sample]:
    """Samples of the records that can be used, in order; the others go to ``rejected`` with their reason."""
    cues = (estimators.pose, estimators.parsing, estimators.plate)
    places = [*source.places, *(place for cue in cues if cue is not None for place in cue.places)]
    for photograph in photographs(records, source, settings, rejected):
        notes = Notes(photograph.record, rejected, places)
        try:
            yield _sample_of(photograph, settings, estimators, notes)
        except StageFailed as failure:
            notes.reject(failure)


def _sample_of(
    photograph: FetchedPhotograph, settings: CuratedSettings, estimators: Estimators, notes: Notes
) -> Sample:
    record, image = photograph.record, photograph.decoded.image
    people, lost = _people_of(photograph, settings, notes)
    if lost:
        transient, count = any(error.transient for error in lost), len(record.instances)
        reason = "person-without-mask" if people else "no-usable-mask"
        message = f"{len(lost)} of {count} masks cannot be used" if people else f"none of {count} masks can be used"
        raise StageFailed("mask", Rejected(reason, message, transient=transient))
    masks, ids = [person.mask for person in people], [person.id for person in people]
    parsing, label_set, pose_by = np.full(image.shape[:2], NO_PARSING, np.uint8), "none", "none"
    background = None
    if estimators.pose is not None:
        pose_by = estimators.pose.name
        poses = _stage("pose", partial(estimators.pose.estimate_pose, image, masks, record, ids))
        for person, keypoints in zip(people, poses, strict=True):
            keypoints[~keypoints_in_box(keypoints, person.mask)] = 0
            person.keypoints = keypoints
    if estimators.parsing is not None:
        label_set = estimators.parsing.label_set
        parsing = _stage("parsing", partial(estimators.parsing.estimate_parsing, image, masks, record, ids))
    if settings.configuration == "paired":
        if estimators.plate is None:
            raise StageFailed("plate", Rejected("no-plate", "nothing provides clean plates"))
        background = _stage("plate", partial(estimators.plate.clean_plate, image, record))
    return Sample(
        key=f"{record.source}-{record.id}",
        split=record.split,
        configuration=settings.configuration,
        image=image,
        people=people,
        parsing=parsing,
        label_set=label_set,
        origins=[photograph.origin("image")],
        stratum=record.stratum,
        background=background,
        pose_by=pose_by,
    )


def _people_of(
    photograph: FetchedPhotograph, settings: CuratedSettings, notes: Notes
) -> tuple[list[Person], list[Rejected]]:
    """The people with a usable mask, and why the others have none."""
    people, lost = [], []
    height, width = photograph.decoded.image.shape[:2]
    for instance, stored in zip(photograph.record.instances, photograph.masks, strict=True):
        try:
            if isinstance(stored, Rejected):
                raise stored
            mask = fit_mask(photograph.decoded.apply_orientation(stored), (height, width), settings.masks)
            mask = clean_mask(mask, settings.masks)
        except Rejected as error:
            notes.reject(error, instance.id)
            lost.append(error)
            continue
        people.append(
            Person(
                id=instance.id,
                mask=mask,
                category=instance.category,
                occluded=instance.occluded,
                truncated=instance.truncated,
            )
        )
    return people, lost


def _stage(stage: str, compute: Callable[[], Result]) -> Result:
    try:
        return compute()
    except Rejected as error:
        raise StageFailed(stage, error) from None


def _mask_or_why(source: Source, record: ImageRecord, index: int) -> np.ndarray | Rejected:
    try:
        return source.read_mask(record, index)
    except Rejected as error:
        return error


def rejection_rows(rejected: Iterable[Rejection]) -> list[dict[str, Any]]:
    """Rejections as JSON-compatible rows for a shard's index."""
    return [asdict(rejection) for rejection in rejected]
