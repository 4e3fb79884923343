"""People in front of a plate, told apart, and the pictures that are chosen of them; on rectangles of known places."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from dataset_tools.clips.alignment import View
from dataset_tools.clips.frames import choose_frames
from dataset_tools.clips.people import foreground, parts, told_apart
from dataset_tools.clips.plate import Plate
from dataset_tools.clips.reading import FrameStore
from dataset_tools.estimators import FoundPeople

HEIGHT, WIDTH = 48, 80
BACKGROUND = np.linspace(90, 160, WIDTH)[None, :, None] * np.array([1.0, 0.9, 0.8]) + np.zeros((HEIGHT, 1, 1))


def plate(known: np.ndarray | None = None) -> Plate:
    everywhere = np.ones((HEIGHT, WIDTH), bool)
    noise = np.full((HEIGHT, WIDTH), 2, np.float32)
    return Plate(np.rint(BACKGROUND).astype(np.uint8), everywhere if known is None else known, noise)


def box(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


def frame(*people: np.ndarray, light: np.ndarray | float = 1.0, seed: int = 0) -> np.ndarray:
    """The plate under a light, with noise of 2 grey levels and people in blue."""
    picture = BACKGROUND * (light if isinstance(light, float) else light[..., None])
    for person in people:
        picture[person] = 30, 60, 180
    picture = picture + np.random.default_rng(seed).normal(0, 2, picture.shape)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_a_person_is_foreground_and_their_shadow_is_not() -> None:
    person = box(8, 40, 20, 32)
    shadow = np.where(box(36, 44, 30, 60), 0.65, 1.0)
    assert iou(foreground(frame(person, light=shadow), plate(), 0.005), person) > 0.9


def test_noise_and_an_empty_scene_have_no_foreground() -> None:
    assert not foreground(frame(), plate(), 0.001).any()


def test_what_is_smaller_than_a_person_is_noise() -> None:
    assert not foreground(frame(box(10, 14, 10, 14)), plate(), 0.01).any()


def test_nobody_is_found_where_the_plate_is_not_known() -> None:
    known = ~box(0, HEIGHT, 26, WIDTH)
    person = box(8, 40, 20, 32)
    found = foreground(frame(person), plate(known), 0.005)
    assert iou(found, person & known) > 0.9


def test_clothes_that_look_like_a_shadow_belong_to_who_encloses_them() -> None:
    person, belt = box(8, 40, 20, 34), box(20, 26, 24, 30)
    picture = frame(person)
    picture[belt] = (0.7 * BACKGROUND[belt]).astype(np.uint8)
    assert iou(foreground(picture, plate(), 0.005), person) > 0.9


def test_a_network_tells_apart_who_touches() -> None:
    """Pixels that differ go to the nearest; what the network adds is theirs, too."""
    first, second = box(8, 40, 20, 30), box(8, 40, 30, 40)
    narrow = FoundPeople([box(10, 38, 21, 28), box(10, 44, 32, 39)], [0.9, 0.8])
    people = told_apart(first | second, narrow)
    assert people.scores == [0.9, 0.8]
    assert iou(people.masks[0], first) > 0.95
    assert np.array_equal(people.masks[1] & ~box(8, 40, 0, WIDTH), box(40, 44, 32, 39))
    assert not (people.masks[0] & people.masks[1]).any()
    assert people.others is not None and not people.others.any()


def test_who_is_found_within_somebody_larger_keeps_their_pixels_and_nobody_has_none() -> None:
    """A child in front of a grown-up, who was found twice."""
    child, adult = box(20, 40, 26, 32), box(4, 44, 20, 40)
    people = told_apart(adult, FoundPeople([child, adult, adult.copy()], [0.9, 0.8, 0.7]))
    assert [int(mask.sum()) for mask in people.masks] == [int(child.sum()), int((adult & ~child).sum())]
    assert len(people.scores) == 2


def test_what_is_no_person_and_who_is_in_the_plate_are_told_as_others() -> None:
    dog, person, sitter = box(30, 40, 5, 20), box(8, 40, 30, 40), box(10, 40, 60, 70)
    people = told_apart(dog | person, FoundPeople([person, sitter], [0.9, 0.7]))
    assert [np.array_equal(mask, person) for mask in people.masks] == [True]
    assert people.others is not None and np.array_equal(people.others, dog | sitter)


def test_parts_are_ordered_from_left_to_right() -> None:
    a, b = box(0, 10, 50, 60), box(20, 30, 5, 12)
    assert [np.array_equal(found, truth) for found, truth in zip(parts(a | b), (b, a), strict=True)] == [True, True]


@pytest.fixture
def store() -> Iterator[FrameStore]:
    frames = FrameStore()
    yield frames
    frames.close()


def chosen(store: FrameStore, frames: list[np.ndarray], most: int = 8, known: np.ndarray | None = None) -> list[int]:
    for each in frames:
        store.append(each)
    view = View(list(range(len(frames))), [None] * len(frames), np.ones((len(frames), 3)))
    return choose_frames(store, view, plate(known), most=most, min_person=0.005, min_change=0.3)


def test_no_two_pictures_are_alike(store: FrameStore) -> None:
    """Somebody who stands is in one picture; one who walks, in several."""
    stands = [frame(box(8, 40, 60, 70), seed=n) for n in range(5)]
    walks = [frame(box(8, 40, 2 * n, 2 * n + 10), seed=n) for n in range(10)]
    found = chosen(store, stands + walks)
    assert sum(number < 5 for number in found) == 1
    lefts = sorted(2 * (number - 5) for number in found if number >= 5)
    assert len(lefts) >= 4 and min(np.diff(lefts)) >= 2 * 10 * 0.17


def test_pictures_of_many_people_come_first(store: FrameStore) -> None:
    one, two = box(8, 40, 5, 15), box(8, 40, 50, 60)
    assert chosen(store, [frame(one), frame(), frame(one, two), frame(two)], most=1) == [2]


def test_an_empty_scene_and_a_change_of_everything_are_not_chosen(store: FrameStore) -> None:
    assert chosen(store, [frame(), frame(light=1.5), frame(box(0, HEIGHT, 0, WIDTH))]) == []


def test_who_goes_on_where_the_plate_is_not_known_is_not_chosen(store: FrameStore) -> None:
    known = ~box(0, HEIGHT, 40, WIDTH)
    assert chosen(store, [frame(box(8, 40, 30, 50)), frame(box(8, 40, 5, 15))], known=known) == [1]


def test_what_a_shaken_sample_repeats_beyond_its_edge_is_nobody(store: FrameStore) -> None:
    store.append(frame(box(8, 40, 74, WIDTH)))
    shaken = np.array([[1, 0, 6.0], [0, 1, 0], [0, 0, 1]])
    view = View([0], [shaken], np.ones((1, 3)))
    assert choose_frames(store, view, plate(), most=8, min_person=0.005, min_change=0.3) == []
