"""Faces and plates: where they are, what is left of them, and what is touched beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from dataset_tools.anonymise import (
    CELLS,
    AnonymiseSettings,
    Region,
    blurred,
    face_regions,
    found_regions,
    of_pair,
    of_plate,
    regions_blurred,
    transform_of,
)
from dataset_tools.credits import Credits
from dataset_tools.estimators import FoundRegion
from dataset_tools.inspection import survey
from dataset_tools.schema import KEYPOINTS, EncodingSettings, MadeBy, Person, Sample
from dataset_tools.shards import write_shard

NOBODY = np.zeros((96, 128), bool)
FACE = np.s_[20:60, 40:72]


def region(where: tuple[slice, slice] = FACE, what: str = "face") -> Region:
    mask = NOBODY.copy()
    mask[where] = True
    return Region(what, mask)


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (96, 128, 3), dtype=np.uint8)


def fine(image: np.ndarray) -> float:
    """Energy of what changes from pixel to pixel."""
    return float(np.abs(np.diff(image.astype(float), axis=1)).mean())


def test_a_region_loses_all_that_is_fine_and_everything_else_stays_to_the_bit() -> None:
    image = noise()
    before = image.copy()
    result = blurred(image, [region()], NOBODY)
    assert np.array_equal(image, before)
    assert fine(result[FACE]) < 0.02 * fine(image[FACE])
    away = np.ones_like(NOBODY)
    away[16:64, 36:76] = False  # a tenth of 32 pixels, and rounding
    assert np.array_equal(result[away], image[away]) and not np.array_equal(result[FACE], image[FACE])


def test_detail_has_no_influence_on_the_result_so_that_none_can_be_brought_back() -> None:
    """Whatever the pixels of a cell are, it is their mean that counts: shuffled they give the same picture."""
    exact, shuffled = region(np.s_[20:60, 40:80]), noise(1)
    for top, left in ((26, 46), (36, 56), (45, 65)):  # inside of three cells of 9.6 pixels, from (16, 36) on
        pixels = shuffled[top : top + 9, left : left + 9].reshape(-1, 3)
        shuffled[top : top + 9, left : left + 9] = np.random.default_rng(2).permutation(pixels).reshape(9, 9, 3)
    assert np.count_nonzero((shuffled != noise(1)).any(axis=2)) > 200
    one, other = (blurred(image, [exact], NOBODY).astype(int) for image in (noise(1), shuffled))
    assert np.abs(one - other).max() <= 1  # of rounding
    brighter = noise(1)
    brighter[26:35, 46:55] = 255
    assert np.abs(blurred(brighter, [exact], NOBODY).astype(int) - one).max() > 30


def test_of_a_licence_plate_fewer_colours_are_left_than_it_has_letters() -> None:
    image = noise()
    result = blurred(image, [region(np.s_[40:50, 20:100], "license plate")], NOBODY)[44:46, 20:100]
    slope = np.diff(result[0].astype(int), axis=0)
    bends = np.count_nonzero(np.abs(np.diff(slope, axis=0)).max(axis=1) > 2)
    assert bends <= 2 * CELLS


def test_people_and_what_is_around_them_do_not_run_into_each_other() -> None:
    people = NOBODY.copy()
    people[20:96, 40:60] = True
    image = np.where(people[..., None], np.uint8((250, 0, 0)), np.uint8((0, 0, 250))).astype(np.uint8)
    assert np.array_equal(blurred(image, [region()], people), image)


def test_regions_at_the_edge_and_small_ones_do_not_fail() -> None:
    image = noise()
    for where in (np.s_[0:5, 0:3], np.s_[95:96, 127:128], np.s_[0:96, 0:128], np.s_[0:2, 0:128]):
        assert blurred(image, [region(where)], NOBODY).shape == image.shape


def person(points: dict[str, tuple[float, float]]) -> Person:
    keypoints = np.zeros((18, 3), np.float32)
    for name, place in points.items():
        keypoints[KEYPOINTS.index(name)] = (*place, 1)
    mask = NOBODY.copy()
    mask[20:90, 44:84] = True
    return Person("a", mask, keypoints=keypoints)


FRONT = {
    **{"nose": (64.0, 34.0), "right_eye": (60.0, 31.0), "left_eye": (68.0, 31.0)},
    **{"right_ear": (54.5, 33.0), "left_ear": (73.5, 33.0), "neck": (64.0, 60.0)},
    "right_hip": (56.0, 78.0),
}


@pytest.mark.parametrize(
    "known",
    [
        tuple(FRONT),
        ("nose", "right_eye", "left_eye"),
        ("right_ear", "left_ear"),
        ("nose", "neck"),
        ("nose", "right_eye", "right_ear", "neck"),
        ("nose", "right_hip"),
    ],
)
def test_a_face_is_covered_by_whatever_joints_of_it_were_found(known: tuple[str, ...]) -> None:
    """The true one: an ellipse from chin to brow and from temple to temple, of a head 19 pixels wide."""
    (found,) = face_regions([person({name: FRONT[name] for name in known})], np.full(NOBODY.shape, 255), "none")
    rows, columns = np.mgrid[:96, :128]
    face = ((columns - 64) / 8) ** 2 + ((rows - 34) / 11) ** 2 < 1
    assert np.count_nonzero(found.mask & face) > 0.97 * np.count_nonzero(face)
    assert np.count_nonzero(found.mask) < 5 * np.count_nonzero(face)


@pytest.mark.parametrize("known", [("nose",), ("right_ear",), ("nose", "right_eye"), ("nose", "right_ear")])
def test_of_a_head_that_is_all_there_is_of_somebody_the_face_is_covered(known: tuple[str, ...]) -> None:
    """Of 38 by 58 pixels, as it looks over somebody's shoulder."""
    rows, columns = np.mgrid[:96, :128]
    head = ((columns - 64) / 19) ** 2 + ((rows - 44) / 29) ** 2 < 1
    places = {"nose": (64, 48), "right_eye": (57, 39), "left_eye": (71, 39), "right_ear": (46, 43)}
    somebody = person({name: places[name] for name in known})
    somebody.mask = head
    (found,) = face_regions([somebody], np.full(NOBODY.shape, 255), "none")
    assert all(found.mask[y, x] for x, y in (places["nose"], places["right_eye"], places["left_eye"]))
    face = ((columns - 64) / 16) ** 2 + ((rows - 46) / 22) ** 2 < 1
    assert np.count_nonzero(found.mask & face) > (0.97 if "nose" in known else 0.7) * np.count_nonzero(face)


def test_a_lying_head_is_covered_along_its_own_axis() -> None:
    turned = {name: (y + 20, 90 - x + 10) for name, (x, y) in FRONT.items()}
    (found,) = face_regions([person(turned)], np.full(NOBODY.shape, 255), "none")
    rows, columns = np.nonzero(found.mask)
    assert np.ptp(columns) > 1.2 * np.ptp(rows)


def test_the_face_of_the_parsing_counts_as_well_and_nobody_else_s() -> None:
    parsing = np.zeros(NOBODY.shape, np.uint8)
    parsing[25:40, 50:70] = 13  # "Face" of LIP
    parsing[25:40, 100:110] = 13  # of somebody else
    (found,) = face_regions([person({})], parsing, "lip")
    assert np.array_equal(np.argwhere(found.mask).min(0), (25, 50)) and found.mask.sum() == 15 * 20
    assert face_regions([person({"neck": (64, 60)})], np.zeros_like(parsing), "lip") == []


def test_a_network_s_boxes_are_widened_and_clipped() -> None:
    made_by = MadeBy("detection", "owner/plates", "transformers 5", "c" * 64)
    found = [FoundRegion("license plate", (-20, 80, 20, 120)), FoundRegion("face", (200, 10, 220, 30))]
    (only,) = found_regions(found, NOBODY.shape, made_by)
    assert only.what == f"license plate (owner/plates, sha256 {'c' * 16})"
    assert np.array_equal(np.argwhere(only.mask).min(0), (76, 0)) and np.argwhere(only.mask).max(0).tolist() == [95, 23]


def test_a_clean_plate_is_blurred_where_it_shows_the_same_and_not_where_it_shows_what_is_behind() -> None:
    image, plate = noise(3), noise(3)
    plate[FACE] = noise(4)[FACE]  # what is behind the face
    poster = region(np.s_[60:90, 90:120])
    plate[60:90, 90:120] = (image[60:90, 90:120] * 0.8 + 20).astype(np.uint8)  # in another light
    assert of_plate([region(), poster], image, plate) == [poster]
    flat = np.full_like(image, 90)
    assert of_plate([poster], flat, flat) == [poster] and of_plate([poster], image, flat) == []


def test_what_is_found_in_the_clean_plate_alone_is_blurred_there_and_where_the_picture_shows_it_too() -> None:
    image, plate = noise(3), noise(3)
    image[FACE] = noise(4)[FACE]  # somebody hides a face on a poster
    hidden, poster, again = region(), region(np.s_[60:90, 90:120]), region(np.s_[62:92, 90:120])
    assert of_pair([], [hidden, poster], image, plate) == ([poster], [hidden, poster])
    in_picture, in_plate = of_pair([poster], [again], image, plate)
    assert in_picture == in_plate == [poster] and poster.mask[60:92, 90:120].all()
    front = region()
    assert of_pair([front], [hidden], image, plate) == ([front], [hidden])


def test_what_was_blurred_is_said_and_counted() -> None:
    regions = [region(), region(), region(what="license plate (owner/blur 9x net, sha256 0123)")]
    told = transform_of("resize 512x384", regions)
    assert told == "resize 512x384; blur 2x face; blur 1x license plate (owner/blur 9x net, sha256 0123)"
    assert regions_blurred(told) == 3
    assert transform_of("", []) == "" and regions_blurred("rotate 90") == 0


def test_settings_that_blur_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="nothing is to be blurred"):
        AnonymiseSettings(faces=False)


def test_the_card_counts_what_was_blurred(tmp_path: Path, make_sample: Callable[..., Sample]) -> None:
    """Once a picture, and not again for those who were cut out of it."""
    sample = make_sample("composite", "sample-0")
    sample.origins = [replace(origin, transform="resize 64x48; blur 2x face") for origin in sample.origins]
    shard = write_shard([sample], str(tmp_path), "composite/train-000000.tar", EncodingSettings(), [])
    with Credits() as credits:
        (part,) = survey(str(tmp_path), {"composite": {"train": [shard]}}, credits)
    assert [origin.role for origin in sample.origins] == ["background", "person", "person"] and part.blurred == 2
