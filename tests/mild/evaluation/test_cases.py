from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from mild.evaluation.cases import (
    CaseRow,
    case_of,
    others_of,
    prepare_cases,
    read_judged,
    read_mask,
    read_picture,
    read_rows,
    with_cues_of,
    write_picture,
)
from mild.evaluation.settings import DatasetSettings
from mild.metrics.metric import Judged

MakeSample = Callable[..., Sample]
BOTH = DatasetSettings(masks=("exact", "augmented"))


def test_pictures_and_masks_are_what_the_sample_holds(tmp_path: Path, make_sample: MakeSample) -> None:
    sample = make_sample(0)
    (row,) = prepare_cases([sample], DatasetSettings(), tmp_path)
    union = np.logical_or.reduce([person.mask for person in sample.people])
    own = tmp_path / sample.key
    assert np.array_equal(read_picture(own / "before.png"), sample.image)
    assert np.array_equal(read_picture(own / "truth.png"), sample.background)
    assert np.array_equal(read_mask(own / "exact" / "mask.png"), union)
    assert not read_mask(own / "exact" / "staying.png").any()
    assert (row.height, row.width, row.people, row.truth) == (48, 64, 2, True)
    assert row.hole_share == pytest.approx(union.mean())
    assert read_rows(tmp_path) == [row]


def test_with_faulty_masks_the_hole_holds_what_they_miss_too(tmp_path: Path, make_sample: MakeSample) -> None:
    """The augmented masks lie 2 pixels too low: what they leave is in the hole, and not in what methods are given."""
    sample = make_sample(0, people=1)
    prepare_cases([sample], BOTH, tmp_path)
    person, own = sample.people[0], tmp_path / sample.key / "augmented"
    assert person.augmented_mask is not None
    assert np.array_equal(read_mask(own / "mask.png"), person.augmented_mask)
    assert np.array_equal(read_mask(own / "hole.png"), person.mask | person.augmented_mask)
    assert np.array_equal(case_of(sample, BOTH, "augmented").hole, person.augmented_mask)


def test_people_overlap_where_their_visible_masks_touch(tmp_path: Path, make_sample: MakeSample) -> None:
    """A person alone overlaps nobody; two whose visible masks share an edge do, two pixels apart they do not."""
    alone, touching, near = make_sample(0, people=1), make_sample(1, people=2), make_sample(2, people=2)
    for sample, gap in ((touching, 0), (near, 2)):
        for number, person in enumerate(sample.people):
            person.mask = np.zeros_like(person.mask)
            person.mask[8:24, slice(4, 12) if number == 0 else slice(12 + gap, 24)] = True
    rows = prepare_cases([alone, touching, near], DatasetSettings(), tmp_path)
    assert {row.key for row in rows if row.overlap} == {touching.key}


def test_things_other_than_people_vanish_by_their_category_and_all_else_stays(
    tmp_path: Path, make_sample: MakeSample
) -> None:
    sample, without = make_sample(0), make_sample(1)
    person, dog = sample.people
    dog.category = "Dog"
    settings = DatasetSettings(categories=("Dog",))
    (row,) = prepare_cases([sample, without], settings, tmp_path)
    own = tmp_path / sample.key / "exact"
    assert (row.key, row.people) == (sample.key, 1), "a picture without a dog is no case"
    assert np.array_equal(read_mask(own / "hole.png"), dog.mask)
    assert np.array_equal(read_mask(own / "staying.png"), person.mask)
    assert case_of(sample, settings, "exact").categories == ("Dog",)


def test_a_picture_without_a_clean_background_is_a_case_without_a_truth(
    tmp_path: Path, make_sample: MakeSample
) -> None:
    sample = make_sample(0)
    sample.background, sample.configuration = None, "real"
    (row,) = prepare_cases([sample], DatasetSettings(), tmp_path)
    assert not row.truth and not (tmp_path / sample.key / "truth.png").exists()
    (tmp_path / "results" / sample.key).mkdir(parents=True)
    write_picture(tmp_path / "results" / sample.key / "exact.png", sample.image)
    (judged,) = read_judged(tmp_path, tmp_path / "results", [row])
    assert judged is not None and judged.truth is None


def test_what_is_not_known_of_the_truth_is_the_result_itself(tmp_path: Path, make_sample: MakeSample) -> None:
    sample = make_sample(0)
    sample.known = np.arange(64) + np.zeros((48, 1)) < 40
    (row,) = prepare_cases([sample], DatasetSettings(), tmp_path)
    judged = _judged(tmp_path, row, 255 - sample.image)
    assert row.truth and judged.truth is not None and sample.background is not None
    assert np.array_equal(judged.known, sample.known)
    assert np.array_equal(judged.truth[:, :40], sample.background[:, :40])
    assert np.array_equal(judged.truth[:, 40:], judged.result[:, 40:])
    sample.known[:] = False
    (row,) = prepare_cases([sample], DatasetSettings(), tmp_path / "nowhere")
    assert not row.truth and _judged(tmp_path / "nowhere", row, sample.image).truth is None


def test_effects_are_those_of_who_goes_and_are_told_from_none(tmp_path: Path, make_sample: MakeSample) -> None:
    sample = make_sample(0)
    sample.people[1].category = "Dog"
    settings = DatasetSettings(categories=("Dog",))
    (row,) = prepare_cases([sample], settings, tmp_path)
    assert not row.effects and _judged(tmp_path, row, sample.image).effects is None, "nobody knows them"
    sample.effects = np.random.default_rng(0).integers(0, 4, (48, 64), np.uint8)
    (row,) = prepare_cases([sample], settings, tmp_path)
    judged = _judged(tmp_path, row, sample.image)
    assert row.effects and judged.effects is not None
    assert np.array_equal(judged.effects, sample.effects >= 2), "the dog's is bit 1"
    assert np.array_equal(judged.hole, sample.people[1].mask), "they are no part of the hole"


def _judged(cases: Path, row: CaseRow, result: np.ndarray) -> Judged:
    (cases / "results" / row.key).mkdir(parents=True, exist_ok=True)
    write_picture(cases / "results" / row.key / "exact.png", result)
    (judged,) = read_judged(cases, cases / "results", [row])
    assert judged is not None
    return judged


def test_what_cannot_be_judged_is_named(tmp_path: Path, make_sample: MakeSample) -> None:
    evil, faultless = make_sample(0), make_sample(0)
    evil.key = "../escape"
    faultless.people[0].augmented_mask = None
    with pytest.raises(UserError, match="cannot be a file name"):
        prepare_cases([evil], DatasetSettings(), tmp_path / "a")
    with pytest.raises(UserError, match="sample-0 has no augmented masks"):
        prepare_cases([faultless], BOTH, tmp_path / "b")


@pytest.mark.parametrize("count", [2, 3, 16, 45])
def test_cues_go_from_each_to_another_of_about_its_size_and_by_the_seed_alone(count: int) -> None:
    def row(number: int, masks: str) -> CaseRow:
        return CaseRow(f"s{number}", masks, 8, 8, 1 + number % 3, False, number / count, True, False, "")

    rows = [row(number, masks) for number in range(count) for masks in ("exact", "augmented")]
    given = others_of(rows, 0)
    assert set(given) == set(given.values()) == {row.key for row in rows}
    assert all(key != other for key, other in given.items())
    assert others_of(rows[::-1], 0) == given
    if count == 45:
        assert others_of(rows, 1) != given
        people = {row.key: row.people for row in rows}
        assert np.mean([people[key] == people[other] for key, other in given.items()]) > 0.7


def test_nobody_can_be_given_the_cues_of_others_where_there_are_none() -> None:
    with pytest.raises(UserError, match="sample s0 is alone"):
        others_of([CaseRow("s0", "exact", 8, 8, 1, False, 0.1, True, False, "")], 0)


def test_cues_of_a_picture_of_another_size_are_stretched_and_fitted_to_as_many_people(make_sample: MakeSample) -> None:
    """Those of the same picture, twice as large, are its own."""
    case = case_of(make_sample(0), DatasetSettings(), "exact")
    assert case.pose is not None and case.parsing is not None
    pose = np.concatenate([case.pose, case.pose[:1]])
    pose[..., :2] = 2 * pose[..., :2] + 0.5
    image, parsing = (plane.repeat(2, 0).repeat(2, 1) for plane in (case.image, case.parsing))
    masks = np.zeros((len(pose), *parsing.shape), bool)
    large = replace(case, image=image, masks=masks, pose=pose, parsing=parsing, label_set="atr")
    given = with_cues_of(case, large)
    assert given.pose is not None and np.allclose(given.pose, case.pose)
    assert np.array_equal(given.parsing, case.parsing) and given.label_set == "atr"
    fewer = with_cues_of(case, replace(large, pose=pose[:1]))
    assert fewer.pose is not None and np.allclose(fewer.pose[0], case.pose[0]) and not fewer.pose[1:].any()
    assert with_cues_of(case, replace(large, pose=None)).pose is None
    assert with_cues_of(replace(case, parsing=None), large).parsing is None


def test_pictures_are_written_without_loss_and_read_by_others(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (31, 17, 3), dtype=np.uint8)
    write_picture(tmp_path / "a.png", picture)
    assert np.array_equal(read_picture(tmp_path / "a.png"), picture)
    assert np.array_equal(cv2.imread(str(tmp_path / "a.png"))[..., ::-1], picture)


def test_no_more_than_two_samples_are_held_however_many_there_are(tmp_path: Path, make_sample: MakeSample) -> None:
    alive: weakref.WeakSet[Sample] = weakref.WeakSet()
    most = 0

    def samples() -> Iterator[Sample]:
        nonlocal most
        for index in range(60):
            sample = make_sample(index, height=16, width=16)
            alive.add(sample)
            most = max(most, len(alive))
            yield sample

    assert len(prepare_cases(samples(), DatasetSettings(), tmp_path)) == 60
    assert most <= 2
