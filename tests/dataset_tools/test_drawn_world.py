"""The drawn world keeps its own books: pictures, plates, masks, labels and joints agree with one another."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from dataset_tools.drawn_world import KINDS, Scene, draw_scene
from dataset_tools.schema import PARSING_LABELS


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    sizes = [(384, 288), (256, 320), (300, 300), (352, 264)]
    return [draw_scene(f"scene-{i}", 11, sizes[i % 4], 1 + i % 5) for i in range(16)]


def eroded(mask: np.ndarray) -> np.ndarray:
    return cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)


def test_the_same_seed_and_key_draw_the_same_scene() -> None:
    first, second = draw_scene("key", 3, (200, 160), 3), draw_scene("key", 3, (200, 160), 3)
    assert np.array_equal(first.image, second.image)
    assert all(np.array_equal(a.layer, b.layer) for a, b in zip(first.people, second.people, strict=True))


@pytest.mark.parametrize(("key", "seed"), [("key", 4), ("other", 3)])
def test_another_seed_or_key_draws_another_scene(key: str, seed: int) -> None:
    first, second = draw_scene("key", 3, (200, 160), 3), draw_scene(key, seed, (200, 160), 3)
    assert np.mean(first.image != second.image) > 0.5


def test_all_kinds_of_places_and_the_asked_number_of_people_appear(scenes: list[Scene]) -> None:
    assert {scene.kind for scene in scenes} == set(KINDS)
    assert [len(scene.people) for scene in scenes] == [1 + i % 5 for i in range(16)]


def test_arrays_have_the_size_of_the_picture(scenes: list[Scene]) -> None:
    assert scenes[1].image.shape == (320, 256, 3)
    for scene in scenes:
        shape = scene.image.shape[:2]
        assert scene.background.shape == scene.image.shape
        for person in scene.people:
            assert person.effects.shape == person.bare.shape == shape
            assert person.layer.shape == (*shape, 4)
            assert person.mask.shape == person.complete_mask.shape == person.parsing.shape == shape


def test_visible_masks_are_complete_masks_minus_nearer_people_and_things(scenes: list[Scene]) -> None:
    hidden_by_things = 0
    for scene in scenes:
        nearer = np.zeros(scene.image.shape[:2], bool)
        for person in reversed(scene.people):
            expected = person.complete_mask & ~nearer
            assert not (person.mask & ~expected).any()
            lost = expected & ~person.mask  # only a thing in front can hide what no person hides
            lost = eroded(lost)  # away from the thing's soft edge
            assert np.array_equal(scene.image[lost], scene.background[lost])
            hidden_by_things += int(lost.sum())
            nearer |= person.complete_mask
    assert hidden_by_things > 0


def test_visible_masks_are_disjoint_and_most_people_are_well_seen(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert np.sum([person.mask for person in scene.people], axis=0).max() <= 1
    shares = [person.mask.sum() / person.complete_mask.sum() for scene in scenes for person in scene.people]
    assert np.mean(np.array(shares) > 0.5) > 0.85
    assert min(int(person.complete_mask.sum()) for scene in scenes for person in scene.people) > 200


def test_the_background_equals_the_picture_away_from_people_and_their_effects(scenes: list[Scene]) -> None:
    for scene in scenes:
        effects = np.any([person.effects for person in scene.people], axis=0)
        people = np.any([person.layer[..., 3] > 0 for person in scene.people], axis=0)
        touched = effects | people
        assert np.array_equal(scene.image[~touched], scene.background[~touched])
        assert (scene.image[effects & ~people] != scene.background[effects & ~people]).any(1).all()
        changed = [(scene.image[person.mask] != scene.background[person.mask]).any(1).mean() for person in scene.people]
        assert min(changed) > 0.9


def recomposed(scene: Scene, *, effects: bool) -> np.ndarray:
    """(H, W, 3) float64: background x effects + layers."""
    picture = scene.background.astype(np.float64)
    if effects:
        picture = picture * scene.light.factor + (0 if scene.light.added is None else scene.light.added)
    for person, shade in zip(scene.people, scene.light.on_people, strict=True):
        colours = person.layer[..., :3].astype(np.float64)
        if shade is not None and effects:
            rows, columns = (np.flatnonzero(person.layer[..., 3].any(axis)) for axis in (1, 0))
            colours[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] *= shade
        opacity = (person.layer[..., 3] / 255 * person.bare)[..., None]
        picture = (1 - opacity) * picture + opacity * colours
    return picture


def test_background_times_effects_plus_layers_is_the_picture(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert np.abs(recomposed(scene, effects=True) - scene.image).max() < 0.51


def test_effects_are_where_the_picture_differs_from_one_without_them(scenes: list[Scene]) -> None:
    for scene in scenes:
        change = np.abs(recomposed(scene, effects=False) - scene.image).max(2)
        shown = np.any([person.effects for person in scene.people], axis=0)
        assert change[~shown].max() < 0.51
        assert (change[shown] > 1).sum() >= 0.95 * shown.sum()
        assert [bool(person.effect_kinds) for person in scene.people] == [p.effects.any() for p in scene.people]


def test_shadows_fall_on_people_behind_and_never_on_those_in_front(scenes: list[Scene]) -> None:
    fallen = 0
    for scene in scenes:
        for index, person in enumerate(scene.people):
            assert not any((person.effects & eroded(other.mask)).any() for other in scene.people[index:])
            fallen += sum(int((person.effects & other.mask).sum()) for other in scene.people[:index])
    assert fallen > 500


def test_most_people_cast_shadows(scenes: list[Scene]) -> None:
    assert np.mean(["shadow" in person.effect_kinds for scene in scenes for person in scene.people]) > 0.75


def test_wet_streets_and_polished_floors_mirror_and_meadows_do_not() -> None:
    scenes = [draw_scene(f"share-{i}", 11, (160, 120), 1) for i in (7, 8, 12)]
    kinds = {scene.kind: scene.people[0].effect_kinds for scene in scenes}
    assert set(kinds) == set(KINDS)
    assert {kind for kind, shown in kinds.items() if "reflection" in shown} == {"street", "room"}


def test_where_a_layer_is_opaque_and_in_front_the_picture_shows_it(scenes: list[Scene]) -> None:
    for scene in scenes:
        person = scene.people[-1]
        solid = eroded(person.mask) & (person.layer[..., 3] == 255)  # away from soft edges of things in front
        assert solid.any()
        assert np.array_equal(scene.image[solid], person.layer[solid][:, :3])


def test_layers_are_empty_where_they_are_transparent(scenes: list[Scene]) -> None:
    for scene in scenes:
        for person in scene.people:
            assert not person.layer[person.layer[..., 3] == 0].any()
            assert (person.layer[person.complete_mask][:, 3] > 60).all()


def test_parsing_covers_exactly_the_visible_people_without_what_they_hold(scenes: list[Scene]) -> None:
    for scene in scenes:
        visible = np.any([person.mask & ~person.held for person in scene.people], axis=0)
        assert np.array_equal(scene.parsing > 0, visible)
        assert scene.parsing.max() < len(PARSING_LABELS["lip"])


def test_people_have_faces_arms_clothes_and_legs(scenes: list[Scene]) -> None:
    names = PARSING_LABELS["lip"]
    seen = {names[label] for scene in scenes for label in np.unique(scene.parsing)}
    assert {"Hair", "Face", "Upper-clothes", "Pants", "Left-arm", "Right-arm", "Left-shoe", "Right-shoe"} <= seen


def test_scored_keypoints_lie_on_their_person_and_others_are_zero(scenes: list[Scene]) -> None:
    scored = 0
    for scene in scenes:
        height, width = scene.image.shape[:2]
        for person in scene.people:
            assert person.keypoints.shape == (18, 3)
            found = person.keypoints[person.keypoints[:, 2] > 0]
            scored += len(found)
            assert not person.keypoints[person.keypoints[:, 2] == 0].any()
            columns, rows = (found[:, 0] * width).astype(int), (found[:, 1] * height).astype(int)
            assert person.mask[rows, columns].all()
    assert scored > 12 * sum(len(scene.people) for scene in scenes) * 0.8


def test_left_and_right_follow_the_body() -> None:
    """Whoever shows nose and both eyes faces the viewer, and has the right shoulder at the picture's left."""
    facing = 0
    for i in range(12):
        for person in draw_scene(f"lr-{i}", 2, (320, 240), 3).people:
            joints = person.keypoints
            if (joints[[0, 2, 5, 14, 15, 16, 17], 2] == 1).all() and joints[14, 0] < joints[15, 0]:
                facing += 1
                assert joints[2, 0] < joints[5, 0] + 0.02
    assert facing > 5


def test_flags_say_who_is_occluded(scenes: list[Scene]) -> None:
    for scene in scenes:
        for person in scene.people:
            hidden = person.mask.sum() < 0.98 * person.complete_mask.sum()
            assert person.occluded == hidden


def test_a_scene_without_people_is_its_own_background() -> None:
    scene = draw_scene("empty", 1, (256, 192), 0)
    assert scene.people == [] and np.array_equal(scene.image, scene.background)
    assert not scene.parsing.any()


def test_things_have_boxes_within_the_picture(scenes: list[Scene]) -> None:
    boxes = np.array([box for scene in scenes for _, box in scene.objects])
    assert len(boxes) > 16
    assert boxes.min() >= 0 and boxes.max() <= 1
    assert (boxes[:, 0] < boxes[:, 2]).all() and (boxes[:, 1] < boxes[:, 3]).all()
