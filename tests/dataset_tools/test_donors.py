"""Donors: who may be cut out, and that masks of a network must come up to more than those of annotators."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage, special

from dataset_tools.donors import CutoutRow, DonorSettings, border_width, cut_out, cutout_rows, is_whole
from dataset_tools.errors import Rejected
from dataset_tools.schema import KEYPOINTS, EncodingSettings, MadeBy, Makers, Person, Sample
from dataset_tools.shard_table import row_of

MakeSample = Callable[..., Sample]
HEAD = ("nose", "right_eye", "left_eye", "right_ear", "left_ear")
SETTINGS = DonorSettings(min_height=90)


def rows_of(sample: Sample, **changes: object) -> list[CutoutRow]:
    document = json.loads(sample.to_parts(EncodingSettings())["annotations.json"])
    told = row_of(document, [person.mask for person in sample.people])
    return cutout_rows(7, told, SETTINGS.model_copy(update=changes))


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Top, bottom, left, right."""
    rows, columns = np.nonzero(mask)
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


@pytest.fixture
def one(make_sample: MakeSample) -> Sample:
    """A whole standing person of the source's own mask, inside the picture."""
    return make_sample("real", key="one", people=1, size=(160, 140))


@pytest.fixture
def found(one: Sample) -> Sample:
    """The same person, found by a network."""
    one.people[0].mask_by, one.people[0].mask_score = "maskrcnn", 0.9
    return one


def lose(sample: Sample, *names: str) -> None:
    """Forget these joints."""
    sample.people[0].keypoints[[KEYPOINTS.index(name) for name in names]] = 0


def two_people(sample: Sample, gap: int) -> Sample:
    """The person twice; their boxes are ``gap`` pixels apart."""
    person = sample.people[0]
    _, _, left, right = box(person.mask)
    wide = np.pad(person.mask, ((0, 0), (0, 200)))
    masks = wide, np.roll(wide, right - left + gap, axis=1)
    sample.image, sample.parsing = np.zeros((*wide.shape, 3), np.uint8), np.zeros(wide.shape, np.uint8)
    sample.people = [Person(name, mask) for name, mask in zip("ab", masks, strict=True)]
    return sample


def test_a_row_says_where_the_person_is_and_how_large(one: Sample) -> None:
    top, bottom, left, right = box(one.people[0].mask)
    row = CutoutRow(
        sample=7,
        person=0,
        key="one",
        height=bottom - top,
        width=right - left,
        category=one.people[0].category,
        truncated=False,
    )
    assert rows_of(one) == [row]


def test_small_people_are_no_donors(one: Sample) -> None:
    top, bottom, _, _ = box(one.people[0].mask)
    assert rows_of(one, min_height=bottom - top)
    assert not rows_of(one, min_height=bottom - top + 1)


def test_people_behind_something_are_no_donors_unless_wanted(one: Sample) -> None:
    one.people[0].occluded = True
    assert not rows_of(one)
    assert rows_of(one, allow_occluded=True)


@pytest.mark.parametrize("edge", ["left", "right", "top"])
def test_people_whom_an_edge_but_the_lower_cuts_off_are_no_donors(one: Sample, edge: str) -> None:
    person = one.people[0]
    top, _, left, right = box(person.mask)
    by, axis = {"left": (-left, 1), "right": (140 - right, 1), "top": (-top, 0)}[edge]
    person.mask = np.roll(person.mask, by, axis)
    assert not rows_of(one)
    person.mask = np.roll(person.mask, -np.sign(by), axis)
    assert rows_of(one)


def test_people_whom_the_lower_edge_cuts_off_are_donors_unless_unwanted(one: Sample) -> None:
    person = one.people[0]
    person.mask = np.roll(person.mask, 160 - box(person.mask)[1], axis=0)
    (row,) = rows_of(one)
    assert row.truncated
    assert not rows_of(one, allow_truncated=False)


@pytest.mark.parametrize(("gap", "donors"), [(2, 2), (0, 0), (-8, 0)])
def test_people_who_touch_others_are_no_donors(one: Sample, gap: int, donors: int) -> None:
    top, bottom, left, right = box(one.people[0].mask)
    one.people[0].mask[(top + bottom) // 2, left:right] = True  # both reach their box's sides in the same row
    assert len(rows_of(two_people(one, gap))) == donors


def test_people_who_sit_are_no_donors(one: Sample) -> None:
    joints = one.people[0].keypoints
    hip, knee, ankle = (joints[KEYPOINTS.index(f"right_{name}")] for name in ("hip", "knee", "ankle"))
    for share, donors in ((0.25, 0), (0.5, 1)):
        knee[1] = hip[1] + share * (ankle[1] - hip[1])
        assert len(rows_of(one)) == donors


def test_a_network_must_be_sure_of_a_person_and_annotators_need_not(found: Sample) -> None:
    assert rows_of(found, min_score=0.9)
    assert not rows_of(found, min_score=0.91)
    found.people[0].mask_by = "annotated"
    assert rows_of(found, min_score=0.91)


PARTS = [
    HEAD,
    ("neck", "right_shoulder", "left_shoulder"),
    ("right_hip", "left_hip"),
    ("right_ankle", "left_ankle"),
    KEYPOINTS,
]


@pytest.mark.parametrize("missing", PARTS, ids=lambda names: names[-1])
def test_a_person_found_by_a_network_needs_a_whole_skeleton(found: Sample, missing: tuple[str, ...]) -> None:
    lose(found, *missing[1:])
    assert bool(rows_of(found)) == (missing is not KEYPOINTS), "one of each part is enough"
    lose(found, missing[0])
    assert not rows_of(found)
    assert rows_of(found, whole_body=False)
    found.people[0].mask_by = "annotated"
    assert rows_of(found)


def test_nothing_is_asked_of_the_skeleton_where_pose_was_not_computed(found: Sample) -> None:
    lose(found, *KEYPOINTS)
    found.made_by = Makers(masks=MadeBy("maskrcnn"))
    assert rows_of(found)


def test_an_upper_half_is_a_donor_only_where_the_lower_edge_of_the_picture_cuts_it_off(found: Sample) -> None:
    person = found.people[0]
    knees = round(person.keypoints[KEYPOINTS.index("right_knee"), 1]) - 4
    person.mask[knees:] = False
    person.keypoints[person.keypoints[:, 1] >= knees] = 0
    assert not rows_of(found, min_height=60)
    found.image, found.parsing, person.mask = found.image[:knees], found.parsing[:knees], person.mask[:knees]
    assert rows_of(found, min_height=60)


@pytest.mark.parametrize("above", [True, False])
def test_a_mask_that_goes_on_far_beyond_the_skeleton_is_no_donor(found: Sample, above: bool) -> None:
    """As where two people, or a person and a thing, became one."""
    person = found.people[0]
    top, bottom, left, right = box(person.mask)
    more = round(0.6 * (bottom - top))
    room = ((more + 2, 0), (0, 0)) if above else ((0, more + 2), (0, 0))
    found.image = np.pad(found.image, (*room, (0, 0)))
    found.parsing, person.mask = np.pad(found.parsing, room), np.pad(person.mask, room)
    if above:
        person.keypoints[:, 1] += more + 2
    assert rows_of(found)
    person.mask[slice(top + 2, top + more + 4) if above else slice(bottom - 2, bottom + more), left:right] = True
    assert not rows_of(found)


def test_a_mask_without_a_limb_that_the_pose_knows_is_no_donor(found: Sample) -> None:
    person = found.people[0]
    (x, y), height = person.keypoints[KEYPOINTS.index("right_wrist"), :2], np.ptp(box(person.mask)[:2])
    rows, columns = np.ogrid[:160, :140]
    away = np.hypot(rows - y, columns - x)
    person.mask &= away > 0.02 * height
    assert rows_of(found), "joints are known to within some pixels"
    person.mask &= away > 0.05 * height
    assert not rows_of(found)


def test_a_joint_above_or_left_of_the_picture_is_off_the_mask(found: Sample) -> None:
    mask, joints = found.people[0].mask, found.people[0].keypoints
    assert is_whole(joints, mask)
    for place in ((-30, 80), (70, -30)):
        away = joints.copy()
        away[KEYPOINTS.index("right_wrist"), :2] = place
        assert not is_whole(away, mask)


def soft_disc(radius: float, sigma: float, size: int) -> np.ndarray:
    """A disc on another colour whose edge is the normal distribution's, exactly (but for its slight curvature)."""
    away = np.hypot(*(np.indices((size, size)) - (size - 1) / 2))
    share = special.ndtr((radius - away) / sigma)[..., None]
    return np.rint((210, 120, 60) * share + (40, 90, 160) * (1 - share)).astype(np.uint8)


def disc(radius: float, size: int) -> np.ndarray:
    return np.hypot(*(np.indices((size, size)) - (size - 1) / 2)) <= radius


@pytest.mark.parametrize(("radius", "sigma"), [(140, 2.5), (140, 3), (140, 3.5), (420, 7.5), (420, 10)])
def test_a_blurred_border_is_as_wide_as_the_normal_distribution_says(radius: int, sigma: float) -> None:
    """The difference of the two sides over the steepest slope: sigma * sqrt(2 pi)."""
    size = 2 * radius + 80
    width = border_width(soft_disc(radius, sigma, size), disc(radius, size))
    assert width == pytest.approx(sigma * np.sqrt(2 * np.pi), rel=0.05)


@pytest.mark.parametrize("by", [-5, -3, 3, 5])
def test_a_mask_that_is_too_large_or_too_small_by_some_pixels_has_a_border_twice_as_much_wider(by: int) -> None:
    picture = soft_disc(140, 0.5, 360)
    sharp = border_width(picture, disc(140, 360))
    assert sharp < 3
    assert border_width(picture, disc(140 + by, 360)) - sharp == pytest.approx(2 * abs(by), abs=1)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_displaced_mask_is_noticed_though_it_is_right_on_two_sides(axis: int) -> None:
    """Displaced by 6 pixels, the outline of a disc is off by 6 |cos|: the median is 6 cos 45 degrees."""
    mask = np.roll(disc(140, 360), 6, axis)
    assert border_width(soft_disc(140, 0.5, 360), mask) == pytest.approx(2 + 12 * np.cos(np.pi / 4), abs=1)


def test_texture_and_noise_do_not_hide_a_sharp_border_nor_make_one() -> None:
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.normal(0, 1, (360, 360, 3)), (2, 2, 0)) * 100 + rng.normal(0, 6, (360, 360, 3))
    sharp, soft = (np.clip(soft_disc(140, s, 360) + noise, 0, 255).astype(np.uint8) for s in (0.5, 4))
    assert border_width(sharp, disc(140, 360)) < 4
    assert border_width(soft, disc(140, 360)) > 7


def test_the_edge_of_the_picture_is_no_border() -> None:
    picture, mask = soft_disc(140, 0.5, 360)[:180], disc(140, 360)[:180]
    assert border_width(picture, mask) < 3


@pytest.mark.parametrize("narrow", ["limbs", "gaps"])
def test_narrow_limbs_and_gaps_do_not_count(narrow: str) -> None:
    """Five columns, 4 pixels wide or apart; what is beyond each is darker or lighter than they, in turn."""
    picture, mask = np.full((340, 360, 3), 128, np.uint8), np.zeros((340, 360), bool)
    wide, apart = (4, 40) if narrow == "limbs" else (40, 4)
    for number in range(5):
        left = 20 + number * (wide + apart)
        mask[20:320, left : left + wide] = True
        shaded = slice(left + wide, left + wide + apart) if narrow == "limbs" else slice(left, left + wide)
        picture[20:320, shaded] = 255 * (number % 2)
    if narrow == "limbs":
        mask[20:320, 300:340] = True
        picture[20:320, 300:340] = 200
    assert border_width(picture, mask) < 3


@pytest.mark.parametrize("width", [1, 200])
def test_where_nothing_changes_at_the_outline_the_border_is_as_wide_as_the_person_is_tall(width: int) -> None:
    mask = np.zeros((720, 300), bool)
    mask[10:710, 50 : 50 + width] = True
    assert border_width(np.full((720, 300, 3), 90, np.uint8), mask) == 700


def test_people_of_a_network_with_soft_borders_are_not_cut_out(make_sample: MakeSample) -> None:
    sample = make_sample("real", key="border", people=1, size=(320, 260))
    person, sharp = sample.people[0], sample.image
    soft = ndimage.gaussian_filter(sharp, (4, 4, 0))
    person.mask_by, person.mask_score = "maskrcnn", 0.9
    assert cut_out(sample, 0, SETTINGS).mask_by == "maskrcnn"
    sample.image = soft
    with pytest.raises(Rejected) as caught:
        cut_out(sample, 0, SETTINGS)
    assert caught.value.reason == "soft-border" and person.id in caught.value.message
    assert cut_out(sample, 0, DonorSettings(max_border_width=1)).rgba.any()
    person.mask_by = "annotated"
    assert cut_out(sample, 0, SETTINGS).rgba.any()


def test_the_two_pixels_of_a_sharp_border_are_not_held_against_small_people(found: Sample) -> None:
    assert 0.01 * np.ptp(box(found.people[0].mask)[:2]) < border_width(found.image, found.people[0].mask) < 4
    assert cut_out(found, 0, DonorSettings(max_border_width=0.01)).rgba.any()
