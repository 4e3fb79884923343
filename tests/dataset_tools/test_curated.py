"""Photographs become samples: whose masks, whose cues, and what is set aside."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
import pytest

from dataset_tools.curated import (
    CuratedSettings,
    Estimators,
    anonymised,
    curated_samples,
    person_free,
    photographs,
    without_folders,
)
from dataset_tools.errors import Rejected
from dataset_tools.estimators import CleanPlate, FoundPeople, FoundRegion, PeopleInPicture
from dataset_tools.images import DecodeSettings, undo_orientation
from dataset_tools.opt_out import OptOut, OptOutCheck
from dataset_tools.perceptual_hash import perceptual_hash
from dataset_tools.quality import QualitySettings
from dataset_tools.records import Curation, ImageRecord, InstanceRecord, Rejection
from dataset_tools.schema import EffectKind, MadeBy, Sample, encode_png

SIZE = (96, 128)
SETTINGS = CuratedSettings(decode=DecodeSettings(min_side=16), fetch_workers=2)


def block(top: int, left: int, height: int = 30, width: int = 14) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top : top + height, left : left + width] = True
    return mask


ANN, BOB, CARL = block(20, 10), block(30, 50), block(40, 90)


def picture(*people: np.ndarray) -> np.ndarray:
    """People are white on grey."""
    image = np.full((*SIZE, 3), 90, np.uint8)
    for mask in people:
        image[mask] = 255
    return image


def instance(name: str, mask: np.ndarray, *, masked: bool = True, orientation: int = 1) -> InstanceRecord:
    stored = undo_orientation(mask, orientation)
    rows, columns = np.nonzero(stored)
    height, width = stored.shape
    box = (columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height)
    return InstanceRecord(name, "Woman", box, name if masked else "", occluded=True)


@dataclass
class Pictures:
    """A source in memory."""

    images: dict[str, np.ndarray]
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    name = "memory"
    applies_exif = False
    places = ()

    def read_image(self, record: ImageRecord) -> bytes:
        return encode_png(self.images[record.image])

    def read_mask(self, record: ImageRecord, index: int) -> np.ndarray:
        return self.masks[record.instances[index].mask]

    def check(self) -> None: ...
    def tables(self) -> dict[str, list[str]]:
        return {}

    def fingerprint(self) -> str:
        return ""

    def curate(self) -> Curation:
        return Curation([])

    def state(self, record: ImageRecord) -> list[str]:
        return []


@dataclass
class Blobs:
    """Finds white blobs. Fails where one pixel is pure red, as networks fail on some pictures."""

    batch_size: int = 4
    name = "blobs"
    places = ()
    made_by = MadeBy("blobs", "threshold", "numpy 2", "f" * 64)
    failure: Exception = field(default_factory=lambda: RuntimeError("no memory for\nthis one"))
    seen: list[int] = field(default_factory=list)

    def fingerprint(self) -> str:
        return "blobs"

    def check(self) -> None: ...

    def find(self, images: Sequence[np.ndarray]) -> list[FoundPeople]:
        self.seen.append(len(images))
        if any((image == (255, 0, 0)).all(axis=2).any() for image in images):
            raise self.failure
        found = []
        for image in images:
            number, labels = cv2.connectedComponents((image.min(axis=2) == 255).astype(np.uint8))
            masks = [labels == label for label in range(1, number)]
            masks.sort(key=lambda mask: np.nonzero(mask)[1].mean())
            found.append(FoundPeople(masks, [0.9 - 0.1 * k for k in range(len(masks))]))
        return found


@dataclass
class Everywhere:
    """Pose and parsing that tell which picture they saw."""

    batch_size: int = 4
    name = "everywhere"
    places = ()
    label_set = "pascal"
    made_by = MadeBy("everywhere")
    seen: list[int] = field(default_factory=list)

    def fingerprint(self) -> str:
        return ""

    def check(self) -> None: ...

    def estimate_pose(self, pictures: Sequence[PeopleInPicture]) -> list[np.ndarray | Rejected]:
        self.seen.append(len(pictures))
        if any(each.image[0, 0, 0] == 7 for each in pictures):
            raise ValueError("an odd picture")
        return [np.stack([self._inside(mask) for mask in each.masks]) for each in pictures]

    def _inside(self, mask: np.ndarray) -> np.ndarray:
        rows, columns = np.nonzero(mask)
        return np.tile(np.float32([columns.mean(), rows.mean(), 0.5]), (18, 1))

    def estimate_parsing(self, pictures: Sequence[PeopleInPicture]) -> list[np.ndarray | Rejected]:
        if len(pictures) == 1 and pictures[0].image[0, 0, 0] == 8:
            return [Rejected("no-crop", "nothing to see")]
        return [np.logical_or.reduce(each.masks).astype(np.uint8) for each in pictures]


def record(name: str, *instances: InstanceRecord, rotation: int = 0) -> ImageRecord:
    return ImageRecord(name, "memory", "train", "people", "one", name, rotation, instances=instances)


def curated(source: Pictures, *records: ImageRecord, **estimators: Any) -> tuple[dict[str, Sample], list[Rejection]]:
    rejected: list[Rejection] = []
    samples = curated_samples(records, source, SETTINGS, Estimators(**estimators), rejected)
    return {sample.key.removeprefix("memory-"): sample for sample in samples}, rejected


def told(rejected: list[Rejection]) -> set[tuple[str, str, str, str]]:
    return {(row.image_id, row.instance_id, row.stage, row.reason) for row in rejected}


def test_people_without_a_mask_of_the_source_are_added_and_marked_by_who_found_them() -> None:
    source = Pictures({"a": picture(ANN, BOB, CARL)}, {"bob": BOB})
    samples, rejected = curated(source, record("a", instance("bob", BOB)), instances=Blobs())
    people = samples["a"].people
    assert [person.id for person in people] == ["bob", "found-1", "found-2"]
    assert [person.mask_by for person in people] == ["annotated", "blobs", "blobs"]
    assert [person.mask_score for person in people] == [1.0, 0.9, pytest.approx(0.7)]
    for person, mask in zip(people, (BOB, ANN, CARL), strict=True):
        assert np.array_equal(person.mask, mask)
    assert samples["a"].made_by.masks == Blobs.made_by and samples["a"].stratum == "two_or_three"
    assert not rejected


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_a_person_with_a_box_alone_gets_the_mask_that_is_found_there_however_the_picture_is_turned(
    rotation: int,
) -> None:
    """Boxes are those of the stored pixels, masks of the upright ones."""
    orientation = {0: 1, 90: 8, 180: 3, 270: 6}[rotation]
    stored = np.ascontiguousarray(undo_orientation(picture(ANN, CARL), orientation))
    carl = instance("carl", CARL, masked=False, orientation=orientation)
    samples, _ = curated(Pictures({"a": stored}), record("a", carl, rotation=rotation), instances=Blobs())
    first, second = samples["a"].people
    assert (first.id, first.category, first.occluded, first.mask_by) == ("carl", "Woman", True, "blobs")
    assert np.array_equal(first.mask, CARL)
    assert (second.id, second.category) == ("found-1", "Person") and np.array_equal(second.mask, ANN)


def test_a_picture_in_which_somebody_has_a_box_and_no_mask_is_set_aside() -> None:
    """Without a network, and with one that finds nobody there."""
    source = Pictures({"a": picture(ANN)}, {"ann": ANN})
    only = record("a", instance("ann", ANN), instance("box-2", CARL, masked=False))
    for estimators in ({}, {"instances": Blobs()}):
        samples, rejected = curated(source, only, **estimators)
        assert not samples
        assert told(rejected) == {
            ("a", "box-2", "mask", "missing-mask"),
            ("a", "", "mask", "person-without-mask"),
        }


def test_a_box_of_somebody_whose_mask_the_source_has_asks_for_nobody_else() -> None:
    source = Pictures({"a": picture(ANN)}, {"ann": ANN})
    wider = block(18, 8, 36, 18)
    samples, rejected = curated(
        source, record("a", instance("ann", ANN), instance("box-2", wider, masked=False)), instances=Blobs()
    )
    assert [person.id for person in samples["a"].people] == ["ann"] and not rejected


def test_a_picture_without_masks_becomes_a_sample_of_whom_the_network_finds_or_is_set_aside() -> None:
    source = Pictures({"a": picture(CARL, ANN), "b": picture()})
    samples, rejected = curated(source, record("a"), record("b"), instances=Blobs())
    assert [person.id for person in samples["a"].people] == ["found-1", "found-2"]
    assert np.array_equal(samples["a"].people[0].mask, ANN)
    assert told(rejected) == {("b", "", "mask", "nobody-found")}


def test_somebody_whom_the_edge_cuts_off_is_found_as_truncated() -> None:
    at_the_edge = block(66, 30)
    samples, _ = curated(Pictures({"a": picture(ANN, at_the_edge)}), record("a"), instances=Blobs())
    assert [person.truncated for person in samples["a"].people] == [False, True]


def test_pictures_go_through_networks_in_batches() -> None:
    names = [f"p{number}" for number in range(10)]
    blobs, pose = Blobs(batch_size=4), Everywhere(batch_size=4)
    samples, _ = curated(Pictures(dict.fromkeys(names, picture(ANN))), *map(record, names), instances=blobs, pose=pose)
    assert list(samples) == names
    assert blobs.seen == pose.seen == [4, 4, 2]


@pytest.mark.parametrize(
    ("mark", "stage", "reason"),
    [((255, 0, 0), "instances", "estimator-failed"), ((7, 7, 7), "pose", "estimator-failed")],
)
def test_an_estimator_that_fails_on_one_picture_sets_that_picture_aside_alone(
    mark: tuple[int, int, int], stage: str, reason: str
) -> None:
    images = {f"p{number}": picture(ANN) for number in range(4)}
    images["p2"] = picture(ANN)
    images["p2"][0, 0] = mark
    samples, rejected = curated(Pictures(images), *map(record, images), instances=Blobs(), pose=Everywhere())
    assert list(samples) == ["p0", "p1", "p3"]
    assert told(rejected) == {("p2", "", stage, reason)}
    assert "\n" not in rejected[0].message and not rejected[0].transient


def test_a_lack_of_memory_may_pass() -> None:
    image = picture(ANN)
    image[0, 0] = (255, 0, 0)
    for error in (MemoryError(), type("OutOfMemoryError", (RuntimeError,), {})("GPU")):
        _, rejected = curated(Pictures({"a": image}), record("a"), instances=Blobs(failure=error))
        assert (rejected[0].reason, rejected[0].transient) == ("out-of-memory", True)


def test_a_picture_that_an_estimator_refuses_is_set_aside_with_its_reason() -> None:
    image = picture(ANN)
    image[0, 0] = 8
    _, rejected = curated(Pictures({"a": image}), record("a"), instances=Blobs(), parsing=Everywhere())
    assert told(rejected) == {("a", "", "parsing", "no-crop")}


def test_samples_say_who_made_each_cue() -> None:
    samples, _ = curated(
        Pictures({"a": picture(ANN)}), record("a"), instances=Blobs(), pose=Everywhere(), parsing=Everywhere()
    )
    made_by = samples["a"].made_by
    assert (made_by.masks, made_by.pose, made_by.parsing) == (Blobs.made_by, *[Everywhere.made_by] * 2)
    assert samples["a"].label_set == "pascal" and samples["a"].people[0].keypoints[:, 2].all()


def test_joints_off_the_picture_are_not_known_however_near_to_a_person_they_lie() -> None:
    at_the_edge = block(20, 0)
    source = Pictures({"a": picture(at_the_edge)}, {"ann": at_the_edge})
    pose = [0.05, 0.3, 1.0] + [-0.01, 0.3, 1.0] + 16 * [0.0, 0.0, 0.0]
    shipped, _ = curated(source, record("a", replace(instance("ann", at_the_edge), keypoints=tuple(pose))))

    class OneOff(Everywhere):
        def estimate_pose(self, pictures: Sequence[PeopleInPicture]) -> list[np.ndarray | Rejected]:
            return [np.float32([[[6, 30, 1], [-1, 30, 1], *16 * [[0, 0, 0]]]]) for _ in pictures]

    estimated, _ = curated(source, record("a", instance("ann", at_the_edge)), pose=OneOff())
    for samples in (shipped, estimated):
        assert np.flatnonzero(samples["a"].people[0].keypoints[:, 2]).tolist() == [0]


class Plates:
    """Ann and Bob have a shadow below their feet, and Zoe, of whom nobody has a mask, elsewhere and on Ann's."""

    name, places, made_by = "plates", (), MadeBy("annotated")

    def clean_plate(self, image: np.ndarray, record: ImageRecord) -> CleanPlate:
        known = np.ones(SIZE, bool)
        known[0] = False
        effects = {"ann": block(50, 10, 5), "bob": block(60, 50, 5), "zoe": block(54, 10, 5)}
        kinds: dict[str, tuple[EffectKind, ...]] = {"bob": ("shadow",), "carl": ("reflection",)}
        return CleanPlate(image, known, self.made_by, effects, kinds)


def test_effects_become_bits_in_the_order_of_the_people_and_nobodys_are_not_known() -> None:
    source = Pictures({"a": picture(ANN, BOB, CARL)}, {"ann": ANN, "bob": BOB, "carl": CARL})
    people = instance("carl", CARL), instance("bob", BOB), instance("ann", ANN)
    paired = SETTINGS.model_copy(update={"configuration": "paired"})
    (sample,) = curated_samples([record("a", *people)], source, paired, Estimators(plate=Plates()), [])
    assert sample.effects is not None and sample.known is not None and sample.made_by.effects == Plates.made_by
    assert np.array_equal(sample.effects, 2 * block(60, 50, 5) + 4 * block(50, 10, 5))
    assert [person.effects for person in sample.people] == [(), ("shadow",), ()]
    unknown = block(55, 10, 4)
    unknown[0] = True
    assert np.array_equal(sample.known, ~unknown)
    sample.check()


def test_a_background_in_which_a_network_finds_somebody_is_set_aside() -> None:
    source = Pictures({"a": picture(), "b": picture(ANN), "c": picture()})
    rejected: list[Rejection] = []
    blobs = Blobs(batch_size=2)
    stream = photographs(map(record, source.images), source, SETTINGS, rejected)
    kept = [photograph.record.id for photograph in person_free(stream, blobs, source, rejected)]
    assert kept == ["a", "c"] and blobs.seen == [2, 1]
    assert told(rejected) == {("b", "", "mask", "person-in-background")}


def test_a_thousand_pictures_are_held_a_few_at_a_time() -> None:
    """Counted, not weighed: what is alive at once does not grow with their number."""
    found: weakref.WeakSet[FoundPeople] = weakref.WeakSet()
    made: weakref.WeakSet[Sample] = weakref.WeakSet()
    total = most_found = most_made = 0

    class Counting(Blobs):
        def find(self, images: Sequence[np.ndarray]) -> list[FoundPeople]:
            nonlocal most_found
            answer = super().find(images)
            found.update(answer)
            most_found = max(most_found, len(found))
            return answer

    names = [f"p{number}" for number in range(1000)]
    rejected: list[Rejection] = []
    for sample in curated_samples(
        map(record, names),
        Pictures(dict.fromkeys(names, picture(ANN))),
        SETTINGS,
        Estimators(instances=Counting()),
        rejected,
    ):
        total += 1
        made.add(sample)
        most_made = max(most_made, len(made))
    assert total == 1000 and not rejected
    assert most_found <= 2 * Counting.batch_size and most_made <= 2 * Counting.batch_size


def listed(kind: str, name: str, image: np.ndarray) -> OptOut:
    """A list that names a picture by one of the four."""
    values = {
        "id": name,
        "url": f"http://example.org/{name}.png",
        "sha256": hashlib.sha256(encode_png(image)).hexdigest(),
        "phash": f"{perceptual_hash(image):016x}",
    }
    return OptOut(**{kind: (values[kind],)})


@pytest.mark.parametrize("role", ["people", "background"])
@pytest.mark.parametrize("kind", ["id", "url", "sha256", "phash"])
def test_a_picture_of_the_opt_out_list_is_left_out_without_a_trace(kind: str, role: Any) -> None:
    images = {"a": picture(ANN), "b": np.rot90(picture(BOB, CARL)).copy()}
    records = [replace(record(name), role=role, url=f"https://example.org/{name}.png") for name in images]
    rejected: list[Rejection] = []
    check = OptOutCheck(listed(kind, "b", images["b"]))
    stream = photographs(records, Pictures(images), SETTINGS, rejected, check)
    assert [photograph.record.id for photograph in stream] == ["a"]
    (row,) = rejected
    assert (row.image_id, row.instance_id, row.reason) == ("", "", "opted-out")
    assert row.message == f"somebody asked for it to be left out, by its {kind}"


def test_not_even_a_damaged_picture_of_the_list_is_named() -> None:
    @dataclass
    class Damaged(Pictures):
        def read_image(self, record: ImageRecord) -> bytes:
            return b"damaged"

    rejected: list[Rejection] = []
    check = OptOutCheck(OptOut(sha256=(hashlib.sha256(b"damaged").hexdigest(),)))
    assert list(photographs([record("a")], Damaged({}), SETTINGS, rejected, check)) == []
    assert [(row.image_id, row.reason) for row in rejected] == [("", "opted-out")]


@pytest.mark.parametrize("kind", ["sha256", "phash"])
def test_a_clean_plate_of_the_opt_out_list_takes_its_picture_with_it_and_is_remembered(kind: str) -> None:
    image = striped()
    plate = Behind().clean_plate(image, record("a")).background
    plate = np.rot90(plate, 2).copy()  # that neither list names the picture itself
    digest, phash = hashlib.sha256(b"plate").hexdigest(), f"{perceptual_hash(plate):016x}"

    class Turned(Behind):
        def clean_plate(self, image: np.ndarray, record: ImageRecord) -> CleanPlate:
            return CleanPlate(plate, np.ones(SIZE, bool), MadeBy("annotated"), sha256=digest)

    rejected: list[Rejection] = []
    check = OptOutCheck(OptOut(**{kind: ({"sha256": digest, "phash": phash}[kind],)}))
    source, paired = Pictures({"a": image}, {"ann": ANN}), SETTINGS.model_copy(update={"configuration": "paired"})
    estimators = Estimators(plate=Turned())
    assert list(curated_samples([record("a", instance("ann", ANN))], source, paired, estimators, rejected, check)) == []
    assert [(row.image_id, row.stage, row.reason) for row in rejected] == [("", "opt-out", "opted-out")]
    assert ("a", digest, phash, kind) in check.seen and len(check.seen) == 2


def test_pictures_that_are_not_good_enough_are_set_aside_before_a_network_sees_them() -> None:
    images = {"sharp": picture(ANN), "soft": cv2.GaussianBlur(picture(ANN), (0, 0), 9), "again": picture(ANN)}
    quality = QualitySettings(min_sharpness=20)
    rejected: list[Rejection] = []
    settings, blobs = SETTINGS.model_copy(update={"quality": quality}), Blobs()
    samples = curated_samples(
        [record(name) for name in images],
        Pictures(images),
        settings,
        Estimators(instances=blobs),
        rejected,
        duplicates={"again": "train picture sharp"},
    )
    assert [sample.key for sample in samples] == ["memory-sharp"] and blobs.seen == [1]
    assert told(rejected) == {("soft", "", "quality", "blurred"), ("again", "", "quality", "near-duplicate")}


@dataclass
class Corner:
    """Finds a licence plate in the lower left corner of every picture; fails on pictures with a red pixel."""

    batch_size: int = 4
    name = "corner"
    places = ()
    made_by = MadeBy("corner", "owner/corner", "numpy 2", "f" * 64)

    def fingerprint(self) -> str:
        return "corner"

    def check(self) -> None: ...

    def find_regions(self, images: Sequence[np.ndarray]) -> list[list[FoundRegion]]:
        if any((image == (255, 0, 0)).all(axis=2).any() for image in images):
            raise RuntimeError("no memory")
        return [[FoundRegion("license plate", (0, 80, 30, 96))] for _ in images]


class Behind:
    """A clean plate: the picture without its white people."""

    name = "behind"
    places = ()

    def clean_plate(self, image: np.ndarray, record: ImageRecord) -> CleanPlate:
        plate = np.where(image == 255, 90, image).astype(np.uint8)
        return CleanPlate(plate, np.ones(image.shape[:2], bool), MadeBy("annotated"))


PLATE, HEAD = np.s_[82:94, 2:28], np.s_[20:50, 10:24]


def striped() -> np.ndarray:
    image = picture(ANN)
    image[60:] = np.where(np.arange(128) % 4 < 2, 40, 200)[:, None]
    return image


@pytest.mark.parametrize("blur", [False, True])
def test_faces_and_plates_are_blurred_in_picture_and_clean_plate_and_the_sample_says_so(blur: bool) -> None:
    """Everywhere puts all joints at one place, so that the head is around the middle of the mask."""
    image = striped()
    image[33:37, 12:22:2] = 200  # a face
    source, settings = Pictures({"a": image}, {"ann": ANN}), SETTINGS.model_copy(update={"configuration": "paired"})
    (sample,) = curated_samples(
        [record("a", instance("ann", ANN))],
        source,
        settings,
        Estimators(pose=Everywhere(), plate=Behind(), blur_faces=blur, regions=Corner() if blur else None),
        [],
    )
    assert sample.background is not None
    same = [np.array_equal(sample.image[where], image[where]) for where in (PLATE, HEAD)]
    behind = Behind().clean_plate(image, record("a")).background
    assert same == [not blur, not blur]
    assert np.array_equal(sample.background[PLATE], behind[PLATE]) is not blur
    assert np.array_equal(sample.background[HEAD], behind[HEAD])  # what is behind the face
    assert np.array_equal(sample.image[:, 64:], image[:, 64:])
    said = f"blur 1x face; blur 1x license plate (owner/corner, sha256 {'f' * 16})" if blur else ""
    assert sample.origins[0].transform == said


def test_what_a_person_hides_is_found_and_blurred_in_the_clean_plate_that_shows_it() -> None:
    """A car's licence plate behind Bob, whose white hides it."""
    image, hidden = striped(), block(64, 50)
    image[hidden] = 255
    street = np.s_[66:90, 52:62]

    class Street(Behind):
        def clean_plate(self, image: np.ndarray, record: ImageRecord) -> CleanPlate:
            plate = striped()
            plate[ANN] = 90
            return CleanPlate(plate, np.ones(SIZE, bool), MadeBy("annotated"))

    class Cars(Corner):
        def find_regions(self, images: Sequence[np.ndarray]) -> list[list[FoundRegion]]:
            seen = super().find_regions(images)
            box = FoundRegion("license plate", (52, 66, 62, 90))
            return [[*found, box] if np.ptp(one[street]) else found for one, found in zip(images, seen, strict=True)]

    source, paired = Pictures({"a": image}, {"bob": hidden}), SETTINGS.model_copy(update={"configuration": "paired"})
    people, estimators = instance("bob", hidden), Estimators(plate=Street(), regions=Cars())
    (sample,) = curated_samples([record("a", people)], source, paired, estimators, [])
    assert sample.background is not None
    assert np.array_equal(sample.image[street], image[street])
    assert np.ptp(sample.background[street][..., 0], axis=1).max() < np.ptp(striped()[street][..., 0], axis=1).min() / 2
    assert sample.origins[0].transform == f"blur 2x license plate (owner/corner, sha256 {'f' * 16})"


def test_backgrounds_are_blurred_as_well_and_one_that_cannot_be_looked_at_is_not_used() -> None:
    images = {"a": striped(), "b": striped()}
    images["b"][0, 0] = (255, 0, 0)
    rejected: list[Rejection] = []
    source = Pictures(images)
    stream = photographs(map(record, images), source, SETTINGS, rejected)
    (place,) = anonymised(stream, Corner(), source, rejected)
    assert not np.array_equal(place.image[PLATE], images["a"][PLATE])
    assert np.array_equal(place.image[:70], images["a"][:70])
    assert place.origin.id == "a" and place.origin.transform.startswith("blur 1x license plate")
    assert told(rejected) == {("b", "", "anonymise", "estimator-failed")}


@dataclass
class Floors(Pictures):
    """A source that marked the ground of its pictures."""

    floors: dict[str, np.ndarray] = field(default_factory=dict)

    def read_glossy_ground(self, record: ImageRecord) -> np.ndarray:
        if record.glossy_ground not in self.floors:
            raise Rejected("not-found", f"{record.glossy_ground} does not exist")
        return self.floors[record.glossy_ground]


@pytest.mark.parametrize(("rotation", "orientation"), [(0, 1), (90, 8), (270, 6)])
def test_marks_of_the_ground_are_turned_and_sized_as_their_picture(rotation: int, orientation: int) -> None:
    """A background without marks has none, and one whose marks cannot be read is set aside."""
    upright = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 7 < 3
    stored = undo_orientation(np.repeat(np.repeat(upright, 3, axis=0), 3, axis=1), orientation)
    source = Floors({"a": undo_orientation(striped(), orientation), "b": striped()}, floors={"floor": stored})
    records = [
        replace(record("a", rotation=rotation), glossy_ground="floor"),
        record("b"),
        replace(record("b"), id="c", glossy_ground="lost"),
    ]
    rejected: list[Rejection] = []
    marked, unmarked = (each.background() for each in photographs(records, source, SETTINGS, rejected))
    assert marked.glossy is not None and np.array_equal(marked.glossy, upright)
    assert np.array_equal(marked.image, striped()) and unmarked.glossy is None
    assert told(rejected) == {("c", "", "mask", "not-found")}


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("2024/05/a.png has the same bytes as 2024/06/b.png", "2024/05/a.png has the same bytes as 2024/06/b.png"),
        ("/home/ann/photos/2024/a.png is gone", "a.png is gone"),
        ("cannot read '/mnt/a b/c.png' (/mnt/d.png)", "cannot read 'a b/c.png' (d.png)"),
        ("s3://bucket/photos/a.png: no access", "a.png: no access"),
    ],
)
def test_messages_keep_relative_names_and_lose_the_folders_of_this_machine(message: str, kept: str) -> None:
    assert without_folders(message, []) == kept
