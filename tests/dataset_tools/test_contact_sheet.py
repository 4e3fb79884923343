"""Contact sheets show every person, skeleton and clean plate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from dataset_tools.contact_sheet import PALETTE, contact_sheet
from dataset_tools.schema import Sample

WHITE = 255


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.abs(picture.astype(int) - colour).max(-1) <= 12


def without_pose(sample: Sample) -> Sample:
    people = [replace(person, keypoints=np.zeros((18, 3), np.float32)) for person in sample.people]
    return replace(sample, people=people)


def test_the_clean_plate_stands_beside_the_image(make_sample: Callable[..., Sample]) -> None:
    sample = make_sample("composite", size=(128, 96))
    sheet = contact_sheet([sample], columns=3, tile=128)
    margin, gap = 128 // 12, 2
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] == 2 * margin + 2 * 96 + gap
    left = margin + 96 + gap
    np.testing.assert_array_equal(sheet[margin : margin + 128, left : left + 96], sample.background)
    assert contact_sheet([make_sample("real", size=(128, 96))], 3, 128).shape[1] == 2 * margin + 96


@pytest.mark.parametrize(("count", "columns", "rows", "across"), [(5, 2, 3, 2), (1, 4, 1, 1), (4, 4, 1, 4)])
def test_tiles_stand_in_rows(
    make_sample: Callable[..., Sample], count: int, columns: int, rows: int, across: int
) -> None:
    samples = (make_sample("real", f"k{i}", size=(48, 64)) for i in range(count))
    sheet = contact_sheet(samples, columns, tile=64)
    one = contact_sheet([make_sample("real", size=(48, 64))], 1, tile=64)
    margin = 64 // 12
    assert sheet.shape[0] - margin == rows * (one.shape[0] - margin)
    assert sheet.shape[1] - margin == across * (one.shape[1] - margin)
    assert (sheet[:margin] == WHITE).all()
    assert (sheet[:, -margin:] == WHITE).all()


def test_each_person_is_outlined_in_a_colour_of_their_own_and_the_scene_is_left_alone(
    make_sample: Callable[..., Sample],
) -> None:
    sample = without_pose(make_sample("real", people=3, size=(256, 256)))
    margin = 256 // 12
    drawn = contact_sheet([sample], 1, 256)[margin : margin + 256, margin : margin + 256]
    for person, colour in zip(sample.people, PALETTE, strict=False):
        outline = near(drawn, colour)
        assert outline.sum() > 100
        rows, columns = np.nonzero(person.mask)
        inside = drawn[person.mask].astype(int) - sample.image[person.mask]
        assert (np.abs(inside).max(-1) > 3).mean() > 0.9, "tinted"
        assert outline[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].sum() > 0.9 * outline.sum()
    around = np.ones((256, 256), bool)
    for person in sample.people:
        rows, columns = np.nonzero(person.mask)
        around[max(rows.min() - 3, 0) : rows.max() + 4, max(columns.min() - 3, 0) : columns.max() + 4] = False
    # reduced from twice the size: the noise of the scene is smoothed by a few grey values
    assert np.abs(drawn[around].astype(int) - sample.image[around]).mean() < 4


def test_effects_are_hatched_in_the_colour_of_whose_they_are(make_sample: Callable[..., Sample]) -> None:
    """The left half is in the second person's shadow; the right half in nobody's."""
    sample = without_pose(make_sample("composite", people=2, size=(256, 256)))
    for person in sample.people:
        person.mask = np.eye(256, dtype=bool)
    bits = np.zeros((256, 256), np.uint8)
    bits[:, :128] = 2
    margin = 256 // 12
    plain, drawn = (
        contact_sheet([replace(sample, image=np.full_like(sample.image, 255), effects=effects)], 1, 256)[margin:][:256]
        for effects in (None, bits)
    )
    shaded, beside = slice(margin, margin + 128), slice(margin + 128, None)
    np.testing.assert_array_equal(drawn[:, beside], plain[:, beside])
    changed = (drawn != plain).any(-1)[:, shaded]
    assert 0.1 < changed.mean() < 0.6, "what lies under the hatches is seen"
    tinted = drawn[:, shaded][changed]
    assert (tinted[:, 2] >= tinted[:, 1]).mean() > 0.9 and (tinted[:, 1] >= tinted[:, 0]).mean() > 0.9  # a sky blue


def test_what_is_not_known_of_a_plate_is_hatched_and_nothing_else_of_it(make_sample: Callable[..., Sample]) -> None:
    sample = make_sample("paired", size=(128, 96))
    sample.known = np.arange(128)[:, None] + np.zeros(96) < 64
    margin = 128 // 12
    left = margin + 96 + 2
    plate = contact_sheet([sample], 1, 128)[margin : margin + 128, left : left + 96]
    assert sample.background is not None
    changed = (plate != sample.background).any(-1)
    assert not changed[:64].any() and 0.1 < changed[64:].mean() < 0.6


def test_every_found_joint_is_drawn_where_it_is_and_others_are_not(make_sample: Callable[..., Sample]) -> None:
    sample = make_sample("real", people=1, size=(256, 256))
    person = sample.people[0]
    blank = np.full((256, 256, 3), 200, np.uint8)
    keypoints = np.zeros((18, 3), np.float32)
    keypoints[3], keypoints[12] = (60, 40, 0.9), (180, 200, 0.4)  # an elbow and a knee: no limb joins them
    lone = replace(sample, image=blank, people=[replace(person, mask=np.eye(256, dtype=bool), keypoints=keypoints)])
    margin = 256 // 12
    drawn = contact_sheet([lone], 1, 256)[margin : margin + 256, margin : margin + 256]
    far = drawn.copy()
    for x, y in [(60, 40), (180, 200)]:
        assert near(drawn[y, x][None], PALETTE[0]).all()
        far[y - 8 : y + 9, x - 8 : x + 9] = 200
    off_diagonal = np.abs(np.subtract.outer(np.arange(256), np.arange(256))) > 6
    assert (np.abs(far[off_diagonal].astype(int) - 200) <= 1).all()


def test_captions_differ_with_key_and_count_and_long_keys_stay_inside(make_sample: Callable[..., Sample]) -> None:
    sample = make_sample("real", "a", people=2)

    def caption(key: str) -> np.ndarray:
        return contact_sheet([replace(sample, key=key)], 1, 96)[8 + 72 :]

    assert (caption("a") < 128).any(), "dark on white"
    assert not np.array_equal(caption("a"), caption("b"))
    long = caption("x" * 80)
    assert long.shape == caption("a").shape
    assert (long[:, :8] == WHITE).all()
    assert (long[:, -8:] == WHITE).all()


def test_the_same_samples_give_the_same_picture(make_sample: Callable[..., Sample]) -> None:
    sheets = [contact_sheet([make_sample("composite", f"k{i}") for i in range(3)], 2, 64) for _ in range(2)]
    np.testing.assert_array_equal(*sheets)


def test_no_samples_make_no_sheet() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        contact_sheet([], 2, 64)
