"""Effects of true pairs by difference: against the drawn world, which knows where shadows fall."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import pytest
from PIL import Image

from dataset_tools.differing_people import people_by_difference
from dataset_tools.drawn_world import Scene, draw_scene
from dataset_tools.effects import EffectsSettings, effects_by_difference, effects_of_people
from dataset_tools.errors import Rejected
from dataset_tools.estimators import CleanPlate
from dataset_tools.masks import MaskSettings
from dataset_tools.schema import MadeBy, Person

SIDE = 256
SETTINGS = EffectsSettings()


@cache
def scene(number: int) -> Scene:
    return draw_scene(f"pair-{number}", 11, (SIDE, SIDE), 1 + number % 3)


def photographed(picture: np.ndarray, seed: int, gain: np.ndarray | float = 1.0, quality: int = 90) -> np.ndarray:
    """A picture as a camera gives it: another exposure, noise of two grey levels, JPEG."""
    rng = np.random.default_rng(seed)
    noisy = np.clip(np.rint(picture * gain + rng.normal(0, 2, picture.shape)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as read:
        return np.asarray(read.convert("RGB"))


def exposure(seed: int) -> np.ndarray:
    """Up to a tenth brighter or darker, with a cast of up to three in a hundred."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.uniform(-0.1, 0.1) + rng.uniform(-0.03, 0.03, 3))


def plate_of(background: np.ndarray, **more: object) -> CleanPlate:
    return CleanPlate(background, np.ones(background.shape[:2], bool), MadeBy("annotated"), **more)  # type: ignore


def people_of(drawn: Scene) -> list[Person]:
    return [Person(str(number), person.mask) for number, person in enumerate(drawn.people)]


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum())) if (one | other).any() else 1.0


def shown_on_the_ground(drawn: Scene) -> np.ndarray:
    """(H, W) bool: shadows and reflections outside of people."""
    effects, people = (np.logical_or.reduce([getattr(p, name) for p in drawn.people]) for name in ("effects", "mask"))
    return effects & ~people


def test_the_difference_tells_the_shadows_of_drawn_pairs() -> None:
    found = []
    for number in range(12):
        drawn, people = scene(number), people_of(scene(number))
        image = photographed(drawn.image, 2 * number, exposure(number))
        plate = plate_of(photographed(drawn.background, 2 * number + 1))
        effects = effects_by_difference(image, plate, people, SETTINGS)
        body = np.logical_or.reduce([person.mask for person in people])
        assert not any((effect & body).any() for effect in effects)
        found.append(iou(np.logical_or.reduce(effects), shown_on_the_ground(drawn)))
    assert np.mean(found) > 0.78 and min(found) > 0.5, found


def test_a_picture_without_effects_has_none() -> None:
    """The same people, exposure and noise, and no shadow."""
    for number in range(0, 12, 3):
        drawn, people = scene(number), people_of(scene(number))
        picture = drawn.background.copy()
        for person in drawn.people:
            picture[person.mask] = person.layer[person.mask][:, :3]
        plate = plate_of(photographed(drawn.background, 2 * number + 1))
        image = photographed(picture, 2 * number, exposure(number))
        effects = effects_by_difference(image, plate, people, SETTINGS)
        assert not np.logical_or.reduce(effects).any()
        assert all(person.effects == () for person in people)


GROUND = np.full((SIDE, SIDE, 3), 150, np.uint8) + np.random.default_rng(0).integers(-3, 4, (SIDE, SIDE, 3))
GROUND = GROUND.astype(np.uint8)
LEFT, RIGHT, BAR = np.zeros((3, SIDE, SIDE), bool)
LEFT[60:160, 40:70] = True
RIGHT[60:160, 180:210] = True


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top:bottom, left:right] = True
    return mask


def with_shadow(ground: np.ndarray, where: np.ndarray, factor: float = 0.7) -> np.ndarray:
    image = ground.astype(np.float32)
    image[where] *= factor
    image[LEFT], image[RIGHT] = (200, 60, 50), (40, 60, 160)
    return np.rint(image).astype(np.uint8)


def pair_of_people() -> list[Person]:
    return [Person("left", LEFT), Person("right", RIGHT)]


@pytest.mark.parametrize(
    ("where", "owner"),
    [
        (box(150, 70, 165, 110), 0),  # touches the left one
        (box(150, 140, 165, 180), 1),
        (box(180, 40, 195, 70), 0),  # below somebody who jumps
        (box(225, 100, 245, 150), None),  # far from both: a cloud's, or that of somebody outside
    ],
)
def test_a_shadow_belongs_to_whom_it_touches_or_to_the_nearest(where: np.ndarray, owner: int | None) -> None:
    people = pair_of_people()
    effects = effects_by_difference(with_shadow(GROUND, where), plate_of(GROUND), people, SETTINGS)
    assert [effect.any() for effect in effects] == [owner == 0, owner == 1]
    if owner is not None:
        assert iou(effects[owner], where) > 0.7


def test_a_shadow_between_two_people_is_shared_between_them() -> None:
    where = box(150, 70, 165, 180)
    effects = effects_by_difference(with_shadow(GROUND, where), plate_of(GROUND), pair_of_people(), SETTINGS)
    assert effects[0][157, 80] and effects[1][157, 170] and not (effects[0] & effects[1]).any()
    assert iou(effects[0] | effects[1], where) > 0.7


def test_where_the_plate_is_not_known_no_effect_is() -> None:
    where = box(150, 70, 165, 110)
    plate = plate_of(GROUND)
    plate.known[:, 90:] = False
    effects = effects_by_difference(with_shadow(GROUND, where), plate, pair_of_people(), SETTINGS)
    assert effects[0][157, 75] and not effects[0][:, 90:].any()


TEXTURED = np.clip(GROUND + 50 * np.sin(np.arange(SIDE) / 2)[None, :, None], 0, 255).astype(np.uint8)


def test_a_shadow_is_called_so_where_the_ground_shows_through_and_nothing_else_is() -> None:
    where = box(150, 70, 185, 150)

    def kinds(ground: np.ndarray, image: np.ndarray) -> tuple[str, ...]:
        people = pair_of_people()
        assert effects_by_difference(image, plate_of(ground), people, SETTINGS)[0].any()
        return people[0].effects

    assert kinds(TEXTURED, with_shadow(TEXTURED, where)) == ("shadow",)
    mirrored = with_shadow(TEXTURED, where)
    mirrored[where] = np.rint(0.3 * TEXTURED[where] + 40)  # about as dark, and the ground is veiled
    assert kinds(TEXTURED, mirrored) == ()
    assert kinds(TEXTURED, with_shadow(TEXTURED, where, 1.4)) == ()
    assert kinds(GROUND, with_shadow(GROUND, where)) == ()  # nothing shows through plain ground


@pytest.mark.parametrize(
    ("image", "plate", "reason"),
    [
        (with_shadow(GROUND, BAR) // 2, GROUND, "exposure-differs"),
        (with_shadow(GROUND, box(0, 0, SIDE, 100), 0.8), GROUND, "light-differs"),
        (with_shadow(TEXTURED, BAR), np.random.default_rng(1).permutation(TEXTURED, axis=1), "not-alike"),
    ],
)
def test_of_another_light_or_place_nothing_is_told(image: np.ndarray, plate: np.ndarray, reason: str) -> None:
    with pytest.raises(Rejected) as why:
        effects_by_difference(image, plate_of(plate), pair_of_people(), EffectsSettings(max_area=0.3))
    assert why.value.reason == reason


def test_of_a_picture_full_of_people_nothing_is_told() -> None:
    everywhere = [Person("all", box(0, 0, SIDE, SIDE - 10))]
    with pytest.raises(Rejected, match="nothing-static"):
        effects_by_difference(GROUND, plate_of(GROUND), everywhere, SETTINGS)


def test_effects_of_somebody_go_to_the_nearest_and_known_ones_stay() -> None:
    somebodys = box(140, 60, 165, 110)
    known = box(170, 170, 180, 200)
    plate = plate_of(GROUND, effects={"": somebodys, "right": known}, kinds={"right": ("reflection",)})
    people = pair_of_people()
    told = effects_of_people(plate, people, SETTINGS)
    assert told is not None
    effects, strangers = told
    assert not strangers.any()
    assert np.array_equal(effects[0], somebodys & ~LEFT) and np.array_equal(effects[1], known)
    assert [person.effects for person in people] == [(), ("reflection",)]
    assert effects_of_people(plate_of(GROUND), people, SETTINGS) is None


def test_the_difference_tells_who_is_there() -> None:
    """People of drawn pairs, most of their shadow left out."""
    overlaps, shaded = [], []
    for number in range(0, 12, 2):
        drawn = scene(number)
        image = photographed(drawn.image, 2 * number, exposure(number))
        plate = photographed(drawn.background, 2 * number + 1)
        known = np.ones((SIDE, SIDE), bool)
        found = np.logical_or.reduce(people_by_difference(image, plate, known, SETTINGS, MaskSettings()))
        overlaps.append(iou(found, np.logical_or.reduce([person.mask for person in drawn.people])))
        shaded.append(float((found & shown_on_the_ground(drawn)).sum() / max(1, shown_on_the_ground(drawn).sum())))
    assert np.mean(overlaps) > 0.82 and np.mean(shaded) < 0.15, (overlaps, shaded)


def test_nobody_is_found_where_nothing_differs() -> None:
    drawn = scene(3)
    image = photographed(drawn.background, 1, exposure(3))
    known = np.ones((SIDE, SIDE), bool)
    assert people_by_difference(image, photographed(drawn.background, 2), known, SETTINGS, MaskSettings()) == []
