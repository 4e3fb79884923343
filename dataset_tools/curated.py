"""Curated samples: one chosen photograph becomes one sample of ``real`` or ``paired``.

fetch and decode -> clean masks, and people who have none -> pose, parsing and clean plate -> blurred faces -> sample.

Networks see several photographs at once. What one of them cannot do with one photograph sets that one aside.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field

from dataset_tools.anonymise import Region, blurred, face_regions, found_regions, of_pair, transform_of
from dataset_tools.compositing import Background
from dataset_tools.differing_people import people_by_difference
from dataset_tools.effects import EffectsSettings, effects_by_difference, effects_of_people
from dataset_tools.errors import Rejected, UserError
from dataset_tools.estimators import (
    CleanPlate,
    Estimator,
    FoundPeople,
    FoundRegion,
    InstanceEstimator,
    ParsingEstimator,
    PeopleInPicture,
    PlateProvider,
    PoseEstimator,
    RegionDetector,
)
from dataset_tools.fetch import map_in_order
from dataset_tools.images import Decoded, DecodeSettings, decode_image, orient_points, undo_orientation
from dataset_tools.masks import MaskSettings, bounds, clean_mask, fit_mask, stratum
from dataset_tools.opt_out import OptedOut, OptOutCheck
from dataset_tools.perceptual_hash import perceptual_hash
from dataset_tools.quality import QualitySettings, check_faces, check_picture
from dataset_tools.records import ImageRecord, InstanceRecord, Rejection
from dataset_tools.schema import NO_PARSING, MadeBy, Makers, Origin, Person, Sample, effect_bits
from dataset_tools.settings import Settings
from dataset_tools.shards import keypoints_in_box
from dataset_tools.sources import GroundReader, Source

Item = TypeVar("Item")
Result = TypeVar("Result")

KNOWN_SHARE = 0.5
"""A person whom a network found is known already where masks of the source cover more than this share."""
SAME_BOX = 0.5
"""Least intersection over union of two boxes of one person, of the source's and of a network's."""

FOLDERS = re.compile(r"(?:\w+://|(?<![^\s'\"(=:,])/)\S*/")
"""The folders of an absolute path or URL; a slash within a relative path begins none."""


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
    effects: EffectsSettings | None = EffectsSettings()
    """How shadows and reflections are told from picture and clean plate, in ``paired``, where whoever provides plates
    does not know them; null: they are not known then."""
    quality: QualitySettings = QualitySettings()
    fetch_workers: int = Field(8, ge=1, le=256)
    """Images fetched and decoded at once within one shard."""


@dataclass(frozen=True)
class Estimators:
    """What looks at photographs; None where that is not wanted."""

    instances: InstanceEstimator | None = None
    pose: PoseEstimator | None = None
    parsing: ParsingEstimator | None = None
    plate: PlateProvider | None = None
    blur_faces: bool = False
    """Whether the faces of people, as pose and parsing tell where they are, are blurred."""
    regions: RegionDetector | None = None
    """Finds what else is blurred."""

    @property
    def places(self) -> list[str]:
        """Folders and URLs that messages may name."""
        used = (self.instances, self.pose, self.parsing, self.plate, self.regions)
        return [place for each in used if each is not None for place in each.places]

    @property
    def batch_size(self) -> int:
        """How many photographs are looked at together."""
        return max(
            (each.batch_size for each in (self.instances, self.pose, self.parsing, self.regions) if each is not None),
            default=1,
        )

    @property
    def made_by(self) -> Makers:
        """What samples say of them."""
        used: dict[str, Estimator | None] = {"masks": self.instances, "pose": self.pose, "parsing": self.parsing}
        return Makers(**{cue: each.made_by for cue, each in used.items() if each is not None})


@dataclass
class FetchedPhotograph:
    """A fetched and decoded image with its masks as stored."""

    record: ImageRecord
    decoded: Decoded
    sha256: str
    masks: list[np.ndarray | Rejected | None]
    """One (h, w) bool an instance of the record, why it could not be read, or None where the source has none."""
    glossy: np.ndarray | None = None
    """(H, W) bool, upright and of the image's size: where the source marked ground that mirrors. None: nowhere."""

    def background(self, regions: Sequence[Region] = ()) -> Background:
        """The picture as one that people are pasted on, with these regions of it blurred."""
        image = self.decoded.image
        nobody = np.zeros(image.shape[:2], bool)
        return Background(blurred(image, regions, nobody), self.origin("background", regions), self.glossy)

    def origin(self, role: Literal["image", "background"], regions: Sequence[Region] = ()) -> Origin:
        """Where the picture comes from and what was done to it, the blurring of regions included."""
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
            transform=transform_of(self.decoded.transform, regions),
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
    records: Iterable[ImageRecord],
    source: Source,
    settings: CuratedSettings,
    rejected: list[Rejection],
    opt_out: OptOutCheck | None = None,
    duplicates: Mapping[str, str] | None = None,
) -> Iterator[FetchedPhotograph]:
    """Fetch and decode, several at once, in the order of the records; failures go to ``rejected``.

    Args:
        opt_out: holds pictures against the opt-out list. One that it names leaves no other trace than that there
            was one.
        duplicates: ids of pictures that are left out, and what each of them is like.
    """
    check = opt_out or OptOutCheck()

    def fetch(record: ImageRecord) -> FetchedPhotograph:
        check.before_reading(record)
        if like := (duplicates or {}).get(record.id):
            raise StageFailed("quality", Rejected("near-duplicate", f"it looks like {like}"))
        data = _stage("fetch", partial(source.read_image, record))
        sha256 = hashlib.sha256(data).hexdigest()
        check.of_file(record, sha256)
        rotation = None if source.applies_exif else record.rotation
        decoded = _stage("decode", partial(decode_image, data, settings.decode, rotation=rotation))
        check.of_picture(record, sha256, f"{perceptual_hash(decoded.image):016x}")
        _stage("quality", partial(check_picture, decoded.image, settings.quality))
        masks = [_mask_or_why(source, record, index) for index in range(len(record.instances))]
        glossy = _stage("mask", partial(_glossy_ground, source, record, decoded, settings.masks))
        return FetchedPhotograph(record, decoded, sha256, masks, glossy)

    records = list(records)
    fetched = map_in_order(fetch, records, settings.fetch_workers, 2 * settings.fetch_workers)
    for record, outcome in zip(records, fetched, strict=True):
        notes = Notes(record, rejected, source.places)
        if isinstance(outcome, OptedOut):
            rejected.append(outcome.row(record.split))
        elif isinstance(outcome, Rejected):
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
    opt_out: OptOutCheck | None = None,
    duplicates: Mapping[str, str] | None = None,
) -> Iterator[Sample]:
    """Samples of the records that can be used, in order; the others go to ``rejected`` with their reason.

    ``opt_out`` and ``duplicates`` are those of `photographs`.
    """
    places = [*source.places, *estimators.places]
    check = opt_out or OptOutCheck()
    stream = photographs(records, source, settings, rejected, check, duplicates)
    for batch in _batches(stream, estimators.batch_size):
        drafts = [_Draft(photograph, Notes(photograph.record, rejected, places)) for photograph in batch]
        for draft in drafts:
            _read_masks(draft, settings, estimators.instances is not None)
        if estimators.instances is not None:
            _find_people([draft for draft in drafts if not draft.lost], estimators.instances, settings)
        if settings.configuration == "paired":
            for draft in drafts:
                _look_behind(draft, estimators, settings, check)
        for draft in drafts:
            _check_people(draft)
        if estimators.pose is not None:
            _estimate("pose", estimators.pose.estimate_pose, drafts, _set_keypoints)
        if estimators.parsing is not None:
            _estimate("parsing", estimators.parsing.estimate_parsing, drafts, _set_parsing)
        if estimators.regions is not None:
            _find_regions([draft for draft in drafts if draft.failure is None], estimators.regions)
        for draft in drafts:
            try:
                yield _sample_of(draft, settings, estimators)
            except OptedOut as failure:
                rejected.append(failure.row(draft.photograph.record.split))
            except StageFailed as failure:
                draft.notes.reject(failure)


def person_free(
    stream: Iterable[FetchedPhotograph],
    instances: InstanceEstimator,
    source: Source,
    rejected: list[Rejection],
) -> Iterator[FetchedPhotograph]:
    """Those photographs in which a network finds nobody, in order; the others go to ``rejected``."""
    places = [*source.places, *instances.places]
    for batch in _batches(stream, instances.batch_size):
        outcomes = _together(instances.find, [photograph.decoded.image for photograph in batch])
        for photograph, found in zip(batch, outcomes, strict=True):
            if not isinstance(found, Rejected) and not found.masks:
                yield photograph
                continue
            stage, why = "instances", found
            if isinstance(why, FoundPeople):
                best = max(why.scores)
                message = f"{instances.name} finds {len(why.masks)} people in it, with scores up to {best:.2f}"
                stage, why = "mask", Rejected("person-in-background", message)
            Notes(photograph.record, rejected, places).reject(StageFailed(stage, why))


def anonymised(
    stream: Iterable[FetchedPhotograph], regions: RegionDetector, source: Source, rejected: list[Rejection]
) -> Iterator[Background]:
    """Backgrounds with what a network finds in them blurred; failures go to ``rejected``."""
    places = [*source.places, *regions.places]
    for batch in _batches(stream, regions.batch_size):
        outcomes = _together(regions.find_regions, [photograph.decoded.image for photograph in batch])
        for photograph, found in zip(batch, outcomes, strict=True):
            if isinstance(found, Rejected):
                Notes(photograph.record, rejected, places).reject(StageFailed("anonymise", found))
                continue
            yield photograph.background(found_regions(found, photograph.decoded.image.shape[:2], regions.made_by))


@dataclass(eq=False)
class _Draft:
    """A photograph on its way to become a sample."""

    photograph: FetchedPhotograph
    notes: Notes
    people: list[Person] = field(default_factory=list)
    lost: list[Rejected] = field(default_factory=list)
    """Why people have no mask."""
    wanted: list[InstanceRecord] = field(default_factory=list)
    """People who have a box and no mask, to be found by a network."""
    crowds: list[np.ndarray] = field(default_factory=list)
    """(H, W) bool of each crowd that stays part of the scene."""
    plate: CleanPlate | None = None
    parsing: np.ndarray | None = None
    regions: list[Region] = field(default_factory=list)
    """What is blurred; beside faces, which are found last."""
    behind: list[Region] = field(default_factory=list)
    """What is to be blurred of what the clean plate shows."""
    failure: StageFailed | OptedOut | None = None

    @property
    def image(self) -> np.ndarray:
        return self.photograph.decoded.image

    def fail(self, stage: str, why: Rejected) -> None:
        self.failure = StageFailed(stage, why)


def _read_masks(draft: _Draft, settings: CuratedSettings, network: bool) -> None:
    """The people with a usable mask of the source, and why the others have none."""
    height, width = draft.image.shape[:2]
    photograph = draft.photograph
    for instance, stored in zip(photograph.record.instances, photograph.masks, strict=True):
        if stored is None and network:
            draft.wanted.append(instance)
            continue
        try:
            if stored is None:
                raise Rejected("missing-mask", "annotators drew a box around this person, and no mask")
            if isinstance(stored, Rejected):
                raise stored
            mask = fit_mask(photograph.decoded.apply_orientation(stored), (height, width), settings.masks)
            if instance.crowd:
                draft.crowds.append(mask)
                continue
            mask = clean_mask(mask, settings.masks)
        except Rejected as error:
            draft.notes.reject(error, instance.id)
            draft.lost.append(error)
            continue
        draft.people.append(_person(instance, mask, instance.mask_by, instance.mask_score))
        draft.people[-1].keypoints = _keypoints_of(instance, photograph.decoded, mask)


def _find_people(drafts: list[_Draft], instances: InstanceEstimator, settings: CuratedSettings) -> None:
    """Add the people whom a network finds beside those whom the source has masks of."""
    outcomes = _together(instances.find, [draft.image for draft in drafts])
    for draft, found in zip(drafts, outcomes, strict=True):
        if isinstance(found, Rejected):
            draft.fail("instances", found)
            continue
        masks = [*(person.mask for person in draft.people), *draft.crowds]
        by_source = np.logical_or.reduce([np.zeros(draft.image.shape[:2], bool), *masks])
        new: list[tuple[np.ndarray, float]] = []
        known: list[np.ndarray] = []
        for mask, score in zip(found.masks, found.scores, strict=True):
            if np.count_nonzero(mask & by_source) > KNOWN_SHARE * np.count_nonzero(mask):
                known.append(mask)
                continue
            try:
                new.append((clean_mask(mask & ~by_source, settings.masks), score))
            except Rejected:
                known.append(mask)  # what is left of it is nobody
        decoded = draft.photograph.decoded
        for instance in draft.wanted:
            overlaps = [_overlap(instance, mask, decoded) for mask, _ in new]
            if overlaps and max(overlaps) >= SAME_BOX:
                mask, score = new.pop(int(np.argmax(overlaps)))
                draft.people.append(_person(instance, mask, instances.name, score))
            elif all(_overlap(instance, mask, decoded) < SAME_BOX for mask in known):
                why = Rejected("missing-mask", f"annotators drew a box, and {instances.name} finds nobody in it")
                draft.notes.reject(why, instance.id)
                draft.lost.append(why)
        for number, (mask, score) in enumerate(new, start=1):
            draft.people.append(_found_person(f"found-{number}", mask, instances.name, score))


def _look_behind(draft: _Draft, estimators: Estimators, settings: CuratedSettings, check: OptOutCheck) -> None:
    """Get the clean plate, which tells who is there where nobody has masks of them and no network looks."""
    record = draft.photograph.record
    if draft.failure is not None or draft.lost:
        return
    try:
        if estimators.plate is None:
            raise Rejected("no-plate", "nothing provides clean plates")
        plate = draft.plate = estimators.plate.clean_plate(draft.image, record)
        check.of_plate(record, plate.sha256, f"{perceptual_hash(plate.background):016x}")
    except OptedOut as error:
        draft.failure = error
        return
    except Rejected as error:
        draft.fail("plate", error)
        return
    if record.instances or estimators.instances is not None:
        return
    try:
        how = settings.effects or EffectsSettings()
        found = people_by_difference(draft.image, plate.background, plate.known, how, settings.masks)
    except Rejected as error:
        draft.fail("mask", error)
        return
    draft.people = [_found_person(f"found-{k}", mask, "difference", 1.0) for k, mask in enumerate(found, start=1)]


def _check_people(draft: _Draft) -> None:
    """Set aside a photograph in which somebody has no mask, or in which nobody is."""
    if draft.failure is not None:
        return
    if draft.lost:
        transient, count = any(error.transient for error in draft.lost), len(draft.photograph.record.instances)
        reason = "person-without-mask" if draft.people else "no-usable-mask"
        some = f"{len(draft.lost)} of {count} masks cannot be used"
        message = some if draft.people else f"none of {count} masks can be used"
        draft.fail("mask", Rejected(reason, message, transient=transient))
    elif not draft.people:
        draft.fail("mask", Rejected("nobody-found", "nobody is found in it"))


def _estimate(
    stage: str,
    estimate: Callable[[Sequence[PeopleInPicture]], Sequence[np.ndarray | Rejected]],
    drafts: Sequence[_Draft],
    use: Callable[[_Draft, np.ndarray], None],
) -> None:
    """Compute one cue of all drafts that have not failed."""
    sound = [draft for draft in drafts if draft.failure is None]
    pictures = [
        PeopleInPicture(
            image=draft.image,
            masks=[person.mask for person in draft.people],
            ids=[person.id for person in draft.people],
            record=draft.photograph.record,
        )
        for draft in sound
    ]
    for draft, outcome in zip(sound, _together(estimate, pictures), strict=True):
        if isinstance(outcome, Rejected):
            draft.fail(stage, outcome)
        else:
            use(draft, outcome)


def _set_keypoints(draft: _Draft, poses: np.ndarray) -> None:
    for person, keypoints in zip(draft.people, poses, strict=True):
        keypoints[~keypoints_in_box(keypoints, person.mask)] = 0
        person.keypoints = keypoints


def _set_parsing(draft: _Draft, parsing: np.ndarray) -> None:
    draft.parsing = parsing


def _find_regions(drafts: Sequence[_Draft], detector: RegionDetector) -> None:
    """Add what else is to be blurred, in pictures and in clean plates, which also show what people hide."""
    seen = [(draft, draft.regions, draft.image) for draft in drafts]
    seen += [(draft, draft.behind, draft.plate.background) for draft in drafts if draft.plate is not None]
    outcomes: list[list[FoundRegion] | Rejected] = _together(detector.find_regions, [image for _, _, image in seen])
    for (draft, regions, image), found in zip(seen, outcomes, strict=True):
        if isinstance(found, Rejected):
            draft.fail("anonymise", found)
        else:
            regions += found_regions(found, image.shape[:2], detector.made_by)


def _sample_of(draft: _Draft, settings: CuratedSettings, estimators: Estimators) -> Sample:
    if draft.failure is not None:
        raise draft.failure
    photograph, record, plate, made_by = draft.photograph, draft.photograph.record, draft.plate, estimators.made_by
    if estimators.pose is None and any(instance.keypoints for instance in record.instances):
        made_by = replace(made_by, pose=MadeBy("annotated"))
    known = effects = None
    if plate is not None:
        effects, by, strange = _effects_of(draft, plate, settings.effects)
        known, made_by = plate.known & ~strange, replace(made_by, plate=plate.made_by, effects=by)
    own_stratum = bool(record.instances) and estimators.instances is None
    no_parsing = np.full(draft.image.shape[:2], NO_PARSING, np.uint8)
    parsing, label_set = no_parsing, "none"
    if draft.parsing is not None and estimators.parsing is not None:
        parsing, label_set = draft.parsing, estimators.parsing.label_set
    _stage("quality", partial(check_faces, draft.people, parsing, label_set, settings.quality))
    regions = draft.regions + (face_regions(draft.people, parsing, label_set) if estimators.blur_faces else [])
    people = np.logical_or.reduce([person.mask for person in draft.people])
    background, in_plate = None, list[Region]()
    if plate is not None:
        regions, in_plate = of_pair(regions, draft.behind, draft.image, plate.background)
        background = blurred(plate.background, in_plate, people)
    return Sample(
        key=record.key(),
        split=record.split,
        configuration=settings.configuration,
        image=blurred(draft.image, regions, people),
        people=draft.people,
        parsing=parsing,
        label_set=label_set,
        origins=[photograph.origin("image", list(dict.fromkeys([*regions, *in_plate])))],
        stratum=record.stratum if own_stratum else stratum([p.mask for p in draft.people]),
        background=background,
        known=known,
        effects=effects,
        caption=record.caption,
        made_by=made_by,
    )


def _effects_of(
    draft: _Draft, plate: CleanPlate, settings: EffectsSettings | None
) -> tuple[np.ndarray | None, MadeBy, np.ndarray]:
    """For `Sample.effects`; who made them; and where effects show that are nobody's of the sample, (H, W) bool.

    The plate lacks those too, and no mask says why: what it shows there belongs to no erased person.
    """
    nowhere = np.zeros(draft.image.shape[:2], bool)
    told = effects_of_people(plate, draft.people, settings or EffectsSettings())
    if told is not None:
        effects, strange = told
        return effect_bits(effects), MadeBy("annotated"), strange
    if settings is None or not plate.tells_effects:
        return None, MadeBy(), nowhere
    try:
        found = effects_by_difference(draft.image, plate, draft.people, settings)
    except Rejected as error:
        draft.notes.mend("effects", error.reason, f"effects are not known: {error.message}")
        return None, MadeBy(), nowhere
    return effect_bits(found), MadeBy("difference"), nowhere


def _person(instance: InstanceRecord, mask: np.ndarray, by: str, score: float) -> Person:
    return Person(
        id=instance.id,
        mask=mask,
        mask_by=by,
        mask_score=score,
        category=instance.category,
        occluded=instance.occluded,
        truncated=instance.truncated,
    )


def _keypoints_of(instance: InstanceRecord, decoded: Decoded, mask: np.ndarray) -> np.ndarray:
    """The pose that the source ships, (18, 3), in pixels of the upright picture; all 0 where it ships none."""
    if not instance.keypoints:
        return np.zeros((18, 3), np.float32)
    stored = np.array(instance.keypoints, np.float64).reshape(18, 3)
    upright = orient_points(stored[:, :2], decoded.orientation) * mask.shape[::-1]
    keypoints = np.column_stack([upright, stored[:, 2]]).astype(np.float32)
    keypoints[(keypoints[:, 2] <= 0) | ~keypoints_in_box(keypoints, mask)] = 0
    return keypoints


def _found_person(name: str, mask: np.ndarray, by: str, score: float) -> Person:
    """Nobody says whether something hides a part of them; the picture's edge cuts off whom it touches."""
    (top, bottom, left, right), (height, width) = bounds(mask), mask.shape
    cut_off = top == 0 or left == 0 or bottom == height or right == width
    return Person(id=name, mask=mask, mask_by=by, mask_score=score, truncated=cut_off)


def _overlap(instance: InstanceRecord, mask: np.ndarray, decoded: Decoded) -> float:
    """Intersection over union of the box that annotators drew and that of an upright mask (H, W)."""
    stored = undo_orientation(mask, decoded.orientation)
    (top, bottom, left, right), (height, width) = bounds(stored), stored.shape
    x0, y0, x1, y1 = left / width, top / height, right / width, bottom / height
    u0, v0, u1, v1 = instance.box
    shared = max(0.0, min(x1, u1) - max(x0, u0)) * max(0.0, min(y1, v1) - max(y0, v0))
    return shared / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - shared)


def _batches(stream: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(stream)
    return iter(lambda: list(islice(iterator, size)), [])


def _together(
    estimate: Callable[[Sequence[Item]], Sequence[Result | Rejected]], items: Sequence[Item]
) -> list[Result | Rejected]:
    """What an estimator makes of several pictures; where it fails, one by one, so that one's fault stays its own."""
    if not items:
        return []
    try:
        return list(estimate(items))
    except (Rejected, UserError):
        raise
    except Exception as error:  # whatever a network's library says to a picture
        if len(items) > 1:
            return [outcome for item in items for outcome in _together(estimate, [item])]
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        return [Rejected("out-of-memory" if memory else "estimator-failed", what, transient=memory)]


def _stage(stage: str, compute: Callable[[], Result]) -> Result:
    try:
        return compute()
    except Rejected as error:
        raise StageFailed(stage, error) from None


def _mask_or_why(source: Source, record: ImageRecord, index: int) -> np.ndarray | Rejected | None:
    if not record.instances[index].mask:
        return None
    try:
        return source.read_mask(record, index)
    except Rejected as error:
        return error


def _glossy_ground(source: Source, record: ImageRecord, decoded: Decoded, settings: MaskSettings) -> np.ndarray | None:
    """For `FetchedPhotograph.glossy`. Raises `Rejected` where a map that there is cannot be used."""
    if not (record.glossy_ground and isinstance(source, GroundReader)):
        return None
    glossy = decoded.apply_orientation(source.read_glossy_ground(record))
    return fit_mask(glossy, decoded.image.shape[:2], settings)


def rejection_rows(rejected: Iterable[Rejection]) -> list[dict[str, Any]]:
    """Rejections as JSON-compatible rows for a shard's index."""
    return [asdict(rejection) for rejection in rejected]
