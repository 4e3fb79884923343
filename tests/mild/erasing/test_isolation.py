from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_tools.schema import KEYPOINTS, NO_PARSING, PARSING_LABELS
from mild.erasing.isolation import FACE_LABELS, face_region, isolate

FACES = {"lip": (4, 13), "atr": (3, 11), "pascal": (1,)}
"""The numbers of the face labels in SCHP's three sets, written out."""


def _scene(seed: int, people: int, label_set: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = rng.random((people, 7, 9)) < 0.5
    return rng.random((7, 9)) < 0.6, masks, rng.integers(0, len(PARSING_LABELS[label_set]), (7, 9)).astype(np.uint8)


def _head(points: dict[str, tuple[float, float]]) -> np.ndarray:
    keypoints = np.zeros((18, 3), np.float32)
    for name, (x, y) in points.items():
        keypoints[KEYPOINTS.index(name)] = (x, y, 0.8)
    return keypoints


@given(st.integers(0, 10**6), st.integers(0, 4))
@settings(max_examples=40)
def test_without_people_is_the_target_minus_the_union_of_the_others(seed: int, people: int) -> None:
    target, others, _ = _scene(seed, people, "lip")
    before = target.copy()
    refined = isolate(target, others, "people")
    pixels = {tuple(p) for p in np.argwhere(target)} - {tuple(p[1:]) for p in np.argwhere(others)}
    assert {tuple(p) for p in np.argwhere(refined)} == pixels
    assert np.array_equal(target, before), "the mask given is left alone"


@given(st.integers(0, 10**6), st.integers(0, 4), st.sampled_from(sorted(FACES)))
@settings(max_examples=60)
def test_without_faces_is_the_target_minus_face_labels_in_the_others_masks(
    seed: int, people: int, label_set: str
) -> None:
    target, others, parsing = _scene(seed, people, label_set)
    refined = isolate(target, others, "faces", parsing=parsing, label_set=label_set)
    for y, x in np.ndindex(target.shape):
        protected = any(mask[y, x] for mask in others) and parsing[y, x] in FACES[label_set]
        assert refined[y, x] == (target[y, x] and not protected)
    assert (isolate(target, others, "people") <= refined).all() and (refined <= target).all()


def test_face_labels_are_those_of_the_schema() -> None:
    assert set(FACE_LABELS) == set(PARSING_LABELS)
    for label_set, numbers in FACES.items():
        assert tuple(sorted(PARSING_LABELS[label_set].index(name) for name in FACE_LABELS[label_set])) == numbers


def test_without_a_parsed_face_a_disc_around_the_joints_of_the_head_is_taken() -> None:
    mask = np.zeros((40, 60), bool)
    mask[5:38, 10:35] = True
    keypoints = _head({"nose": (20, 12), "right_eye": (18, 10), "left_eye": (22, 10), "left_wrist": (50, 30)})
    rows, columns = np.mgrid[:40, :60]
    expected = mask & ((columns - 20) ** 2 + (rows - 32 / 3) ** 2 <= 4**2)
    for parsing, label_set in [
        (None, "none"),
        (np.full(mask.shape, NO_PARSING, np.uint8), "none"),
        (np.full(mask.shape, 5, np.uint8), "lip"),
        (np.where(mask, 5, 13).astype(np.uint8), "lip"),
    ]:
        found = face_region(mask, parsing=parsing, label_set=label_set, keypoints=keypoints)
        assert np.array_equal(found, expected)
    assert 30 < expected.sum() < 60


def test_a_parsed_face_goes_before_the_joints() -> None:
    mask = np.ones((40, 60), bool)
    parsing = np.zeros(mask.shape, np.uint8)
    parsing[2:4, 50:55] = 13
    keypoints = _head({"nose": (20, 12), "left_ear": (26, 12)})
    assert np.array_equal(face_region(mask, parsing=parsing, label_set="lip", keypoints=keypoints), parsing == 13)


@pytest.mark.parametrize("points", [{}, {"nose": (5.0, 5.0)}, {"neck": (5.0, 9.0), "left_wrist": (1.0, 1.0)}])
def test_nobody_is_protected_where_no_head_is_known(points: dict[str, tuple[float, float]]) -> None:
    mask = np.ones((12, 12), bool)
    assert not face_region(mask, keypoints=_head(points)).any()
    assert not face_region(mask).any()
    assert np.array_equal(isolate(mask, mask[None], "faces", keypoints=_head(points)[None]), mask)


def test_joints_belong_to_the_person_whose_mask_stands_at_the_same_place() -> None:
    masks = np.zeros((2, 30, 60), bool)
    masks[0, :, :30], masks[1, :, 30:] = True, True
    heads = np.stack([_head({"nose": (10, 15), "left_ear": (14, 15)}), _head({"nose": (50, 15), "left_ear": (46, 15)})])
    refined = isolate(np.ones((30, 60), bool), masks, "faces", keypoints=heads)
    assert not refined[15, 12] and not refined[15, 48]
    assert isolate(np.ones((30, 60), bool), masks, "faces", keypoints=heads[::-1]).all()


def test_what_does_not_belong_together_is_refused() -> None:
    target, others = np.ones((4, 6), bool), np.ones((2, 4, 6), bool)
    with pytest.raises(ValueError, match=r"\(2, 6, 4\), expected \(people, 4, 6\)"):
        isolate(target, others.transpose(0, 2, 1), "people")
    with pytest.raises(ValueError, match=r"keypoints are \(1, 18, 3\), expected \(2, 18, 3\)"):
        isolate(target, others, "faces", keypoints=np.zeros((1, 18, 3)))
    with pytest.raises(ValueError, match="label map"):
        isolate(target, others, "faces", parsing=np.zeros((6, 4), np.uint8), label_set="lip")
    with pytest.raises(ValueError, match="unknown label set 'mhp'"):
        isolate(target, others, "faces", parsing=np.zeros((4, 6), np.uint8), label_set="mhp")
