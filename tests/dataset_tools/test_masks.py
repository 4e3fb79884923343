"""Masks: fitted like Pillow does, cleaned like SciPy does, augmented without ever losing a person."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage

from dataset_tools import masks
from dataset_tools.errors import Rejected
from dataset_tools.masks import AugmentSettings, MaskSettings, augment_mask, clean_mask, fit_mask, touching
from dataset_tools.schema import KEYPOINTS

SETTINGS = MaskSettings(min_area=0, max_area=1)
NOTHING = AugmentSettings(
    dilate_probability=0, erode_probability=0, shift_probability=0, drop_probability=0, polygon_probability=0
)
bitmaps = hnp.arrays(bool, st.tuples(st.integers(1, 24), st.integers(1, 24)))
bitmaps_with_person = bitmaps.filter(np.any)
NO_JOINTS = np.zeros((18, 3), np.float32)


def disc(height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def stick_person() -> tuple[np.ndarray, np.ndarray]:
    """A person of thick lines, 200 pixels tall, and its 18 joints."""
    at = {
        "nose": (75, 30), "neck": (75, 60), "right_shoulder": (55, 62), "right_elbow": (35, 85),
        "right_wrist": (20, 110), "left_shoulder": (95, 62), "left_elbow": (115, 85),
        "left_wrist": (130, 110), "right_hip": (62, 120),
        "right_knee": (58, 165), "right_ankle": (55, 210), "left_hip": (88, 120), "left_knee": (92, 165),
        "left_ankle": (95, 210), "right_eye": (70, 25), "left_eye": (80, 25), "right_ear": (64, 28),
        "left_ear": (86, 28),
    }  # fmt: skip
    joints = np.array([(*at[name], 1) for name in KEYPOINTS], np.float32)
    rows, columns = np.mgrid[:240, :150]
    mask = disc(240, 150, 30, 75, 18)
    mask[60:125, 58:93] = True
    for a, b in masks.BONES[:12]:
        (x0, y0), (x1, y1) = at[a], at[b]
        t = np.clip(((columns - x0) * (x1 - x0) + (rows - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2), 0, 1)
        mask |= (columns - x0 - t * (x1 - x0)) ** 2 + (rows - y0 - t * (y1 - y0)) ** 2 <= 49
    return mask, joints


def test_the_bones_join_all_18_joints_into_one_tree() -> None:
    reached = {"neck"}
    for _ in masks.BONES:
        reached |= {joint for bone in masks.BONES if reached & set(bone) for joint in bone}
    assert reached == set(KEYPOINTS)
    assert len(masks.BONES) == len(KEYPOINTS) - 1


@settings(max_examples=50)
@given(bitmaps_with_person)
def test_bounds_are_those_of_the_true_pixels(mask: np.ndarray) -> None:
    rows, columns = np.nonzero(mask)
    assert masks.bounds(mask) == (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)


@settings(max_examples=50)
@given(bitmaps, st.integers(1, 40), st.integers(1, 40))
def test_fitting_takes_the_nearest_pixel_as_pillow_does(mask: np.ndarray, height: int, width: int) -> None:
    fitted = fit_mask(mask, (height, width), MaskSettings(aspect_tolerance=1e9))
    truth = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    assert np.array_equal(fitted, truth)


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0.01, 4))
def test_sizes_that_differ_by_rounding_alone_always_fit(height: int, width: int, scale: float) -> None:
    shape = (max(1, int(height * scale)), max(1, int(np.ceil(width * scale))))
    assert fit_mask(np.zeros(shape, bool), (height, width), MaskSettings(aspect_tolerance=0)).shape == (height, width)


def test_masks_of_another_aspect_are_refused() -> None:
    with pytest.raises(Rejected, match="mask-size-mismatch"):
        fit_mask(np.ones((100, 160), bool), (100, 150), MaskSettings())
    assert fit_mask(np.ones((100, 152), bool), (100, 150), MaskSettings()).all()


def test_specks_go_and_second_parts_stay() -> None:
    mask = disc(100, 100, 50, 40, 25)
    with_parts = mask | disc(100, 100, 50, 85, 8)  # 10 % of the largest part
    with_specks = with_parts.copy()
    with_specks[2:4, 2:4] = True
    assert np.array_equal(clean_mask(with_specks, SETTINGS), with_parts)


def test_pinholes_are_filled_and_real_holes_stay_open() -> None:
    mask = disc(120, 120, 60, 60, 50)
    mask[30:50, 55:75] = False
    pierced = mask.copy()
    pierced[80, 60:63] = False
    assert np.array_equal(clean_mask(pierced, SETTINGS), mask)


@settings(max_examples=50)
@given(bitmaps_with_person)
def test_filling_everything_equals_scipys_fill_holes_and_the_largest_part(mask: np.ndarray) -> None:
    everything = MaskSettings(min_area=0, max_area=1, min_island=0, max_hole=1)
    truth = ndimage.binary_fill_holes(mask)
    inside = ndimage.label(~mask)[0]
    largest_hole = max((np.sum(inside[truth & ~mask] == i) for i in np.unique(inside[truth & ~mask])), default=0)
    if largest_hole <= mask.sum():
        assert np.array_equal(clean_mask(mask, everything), truth)
    largest_only = clean_mask(mask, MaskSettings(min_area=0, max_area=1, min_island=1, max_hole=0))
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    sizes = ndimage.sum_labels(mask, labels, range(1, count + 1))
    assert np.array_equal(largest_only, np.isin(labels, 1 + np.flatnonzero(sizes == sizes.max())))


@settings(max_examples=50)
@given(bitmaps_with_person)
def test_cleaning_twice_changes_nothing_more(mask: np.ndarray) -> None:
    once = clean_mask(mask, MaskSettings(min_area=0, max_area=1, min_island=0.2, max_hole=0.0))
    assert np.array_equal(clean_mask(once, MaskSettings(min_area=0, max_area=1, min_island=0.2, max_hole=0.0)), once)


def test_unusable_masks_are_named() -> None:
    for mask, reason in [
        (np.zeros((50, 50), bool), "empty-mask"),
        (np.ones((50, 50), bool), "mask-covers-everything"),
        (np.arange(250_000).reshape(500, 500) == 77, "mask-too-small"),
    ]:
        with pytest.raises(Rejected) as caught:
            clean_mask(mask, MaskSettings())
        assert caught.value.reason == reason


@given(st.integers(1, 5).flatmap(lambda n: hnp.arrays(bool, (n, 6, 7))), st.data())
def test_the_others_are_the_clamped_sum_of_the_paper(people: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(people) - 1))
    truth = np.clip(people.astype(int).sum(axis=0) - people[k], 0, 1)
    assert np.array_equal(masks.others(list(people), k), truth.astype(bool))


def test_occlusion_is_the_hidden_share() -> None:
    complete = np.zeros((10, 10), bool)
    complete[:, :8] = True
    visible = complete.copy()
    visible[:, 6:] = False
    assert masks.occlusion(visible, complete) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="empty"):
        masks.occlusion(visible, np.zeros((10, 10), bool))


@settings(max_examples=50)
@given(hnp.arrays(bool, (9, 11)), hnp.arrays(bool, (9, 11)))
def test_touching_means_a_distance_of_one_pixel_at_most(a: np.ndarray, b: np.ndarray) -> None:
    truth = bool(a.any() and b.any() and (ndimage.binary_dilation(a, np.ones((3, 3))) & b).any())
    assert touching(a, b) == truth


def test_strata_follow_count_and_contact() -> None:
    apart = [disc(40, 200, 20, 20 + 40 * i, 15) for i in range(5)]
    assert [masks.stratum(apart[:n]) for n in (1, 2, 3, 4, 5)] == ["one"] + ["two_or_three"] * 2 + ["four_or_more"] * 2
    assert masks.stratum([*apart, disc(40, 200, 20, 70, 16)]) == "overlapping"


@settings(max_examples=50)
@given(bitmaps, st.integers(0, 10**6))
def test_augmented_masks_are_never_empty_and_depend_on_the_seed_alone(mask: np.ndarray, seed: int) -> None:
    wild = AugmentSettings(
        dilate_probability=0.5, erode_probability=1, shift_probability=1, drop_probability=1, polygon_probability=1,
        max_width_error=0.5, max_shift=0.5, max_polygon_error=0.5,
    )  # fmt: skip
    before = mask.copy()
    first = augment_mask(mask, NO_JOINTS, np.random.default_rng(seed), wild)
    assert first.any() == mask.any() and first.shape == mask.shape and first.dtype == bool
    assert np.array_equal(first, augment_mask(mask, NO_JOINTS, np.random.default_rng(seed), wild))
    assert np.array_equal(mask, before)


def test_without_faults_the_mask_is_unchanged() -> None:
    mask, joints = stick_person()
    assert np.array_equal(augment_mask(mask, joints, np.random.default_rng(0), NOTHING), mask)


def only(**changes: float) -> AugmentSettings:
    return NOTHING.model_copy(update=changes)


@pytest.mark.parametrize("seed", range(8))
def test_each_fault_does_what_it_is_named_for(seed: int) -> None:
    mask, joints = stick_person()

    def augmented(**changes: float) -> np.ndarray:
        return augment_mask(mask, joints, np.random.default_rng(seed), only(**changes))

    wide, narrow = augmented(dilate_probability=1), augmented(erode_probability=1)
    assert (wide | mask).sum() == wide.sum() > mask.sum()
    assert (narrow & mask).sum() == narrow.sum() < mask.sum()
    reach = ndimage.distance_transform_edt(~mask)
    assert reach[wide].max() <= NOTHING.max_width_error * 200 + 2

    shifted = augmented(shift_probability=1)
    assert shifted.sum() == mask.sum()
    moved = np.array(masks.bounds(shifted)) - masks.bounds(mask)
    assert moved[0] == moved[1] and moved[2] == moved[3] and np.abs(moved).max() <= NOTHING.max_shift * 200 + 1
    assert np.array_equal(np.roll(mask, (moved[0], moved[2]), (0, 1)), shifted)

    polygon = augmented(polygon_probability=1)
    assert 0.8 < (polygon & mask).sum() / (polygon | mask).sum() < 1
    outline = mask & ~ndimage.binary_erosion(mask)
    error = ndimage.distance_transform_edt(~outline)[polygon & ~ndimage.binary_erosion(polygon)]
    assert error.max() <= NOTHING.max_polygon_error * 200 + 1.5


@pytest.mark.parametrize("seed", range(12))
def test_a_dropped_limb_takes_its_joint_and_leaves_head_and_trunk(seed: int) -> None:
    mask, joints = stick_person()
    dropped = augment_mask(mask, joints, np.random.default_rng(seed), only(drop_probability=1))
    assert not (dropped & ~mask).any()
    place = {name: (int(y), int(x)) for name, (x, y, _) in zip(KEYPOINTS, joints, strict=True)}
    ends = [name for name in ("right_wrist", "left_wrist", "right_ankle", "left_ankle") if not dropped[place[name]]]
    assert len(ends) == 1
    assert dropped[place["nose"]] and dropped[place["neck"]] and dropped[90, 75]


def test_without_keypoints_a_protruding_part_is_dropped() -> None:
    mask = disc(200, 200, 100, 80, 50)
    trunk = mask.copy()
    mask[95:105, 100:190] = True
    dropped = augment_mask(mask, NO_JOINTS, np.random.default_rng(3), only(drop_probability=1))
    assert not dropped[100, 150:190].any()
    assert (dropped & trunk).sum() > 0.97 * trunk.sum()
