"""Shadows and reflections against projections in three dimensions, worked out here point by point."""

from __future__ import annotations

import numpy as np
import pytest

from dataset_tools.lighting import Effects, Figure, Ground, Light, blend, cast

SIZE = (200, 240)
GROUND = Ground(horizon=40, centre=120, focal=200)
PLATE = np.full((*SIZE, 3), 200, np.uint8)
SUN = Light(azimuth=0.0, height=np.radians(50), softness=0.0, fill=(0.4, 0.45, 0.5), contact=0.0)


def light(**changes: object) -> Light:
    return Light(**{**SUN.__dict__, **changes})


def figure(foot: float, column: float = 120, tall: float = 0.8, wide: int = 6, colour: int = 60) -> Figure:
    """A board: ``foot`` is its row, ``tall`` in heights of the camera, ``wide`` in pixels."""
    layer = np.zeros((*SIZE, 4), np.uint8)
    top = foot - tall * (foot - GROUND.horizon)
    left = round(column - wide / 2)
    layer[round(top) : round(foot), left : left + wide] = (colour, colour, colour, 255)
    return Figure(layer, (column, foot))


def seen(x: float, y: float, z: float) -> np.ndarray:
    """Column and row of a point: to the right, up and away from the camera's foot."""
    return np.array([GROUND.centre + GROUND.focal * x / z, GROUND.horizon + GROUND.focal * (1 - y) / z])


def place(person: Figure) -> tuple[float, float]:
    """Where a figure stands: to the right and away."""
    z = GROUND.focal / (person.foot[1] - GROUND.horizon)
    return (person.foot[0] - GROUND.centre) * z / GROUND.focal, z


def shine(azimuth: float, height: float) -> np.ndarray:
    """Way of the light that falls one camera height: right, up, away."""
    reach = 1 / np.tan(height)
    return np.array([reach * np.cos(azimuth), -1.0, reach * np.sin(azimuth)])


@pytest.mark.parametrize("azimuth", [0.2, 0.8, 1.3, 1.9, 2.8, -0.3, -2.9])
@pytest.mark.parametrize("degrees", [40, 60])
def test_the_tip_of_a_shadow_is_where_the_light_that_passes_the_head_meets_the_ground(
    azimuth: float, degrees: int
) -> None:
    person = figure(140)
    (mask,) = cast(PLATE, [person], GROUND, light(azimuth=azimuth, height=np.radians(degrees))).masks
    x, z = place(person)
    tip = np.array([x, 0.8, z]) + 0.8 * shine(azimuth, np.radians(degrees))
    assert abs(tip[1]) < 1e-9
    rows, columns = np.nonzero(mask)
    way = seen(*tip) - person.foot
    along = ((np.stack([columns, rows], 1) + 0.5 - person.foot) @ way) / (way @ way)
    assert along.max() == pytest.approx(1, abs=6 / np.hypot(*way))
    across = np.abs((np.stack([columns, rows], 1) + 0.5 - person.foot) @ [-way[1], way[0]]) / np.hypot(*way)
    assert across.max() < 9  # half the board, and what softens its edge


@pytest.mark.parametrize("azimuth", [np.pi / 2 - 0.5, np.pi / 2 + 0.6])
def test_a_shadow_falls_on_who_stands_behind_where_the_light_meets_them(azimuth: float) -> None:
    caster, receiver = figure(160, 120, 0.8), figure(130, 120, 1.0, wide=160, colour=180)
    effects = cast(PLATE, [receiver, caster], GROUND, light(azimuth=azimuth, height=np.radians(35)))
    (x, z), (_, behind) = place(caster), place(receiver)
    ray = shine(azimuth, np.radians(35))
    head = np.array([x, 0.8, z]) + ray * (behind - z) / ray[2]
    shade = effects.on_people[0]
    assert shade is not None and effects.on_people[1] is None
    dark = np.zeros(SIZE)
    dark[receiver.box] = 1 - shade[..., 0]
    rows, columns = np.nonzero(dark > 0.3)
    column, row = seen(*head)
    assert rows.min() == pytest.approx(row, abs=2.5)
    assert columns[rows < row + 5].mean() + 0.5 == pytest.approx(column, abs=2.5)
    assert not effects.masks[1][: round(row) - 6].any()
    on_receiver = effects.masks[1][receiver.box] & (receiver.layer[receiver.box][..., 3] > 0)
    assert on_receiver.any() and not (effects.masks[1] & (caster.layer[..., 3] == 255)).any()


def test_light_from_behind_throws_shadows_on_nobody_who_stands_behind() -> None:
    effects = cast(PLATE, [figure(130, wide=160), figure(160)], GROUND, light(azimuth=-1.0))
    assert effects.on_people == [None, None]


def test_the_penumbra_grows_with_the_way_from_who_casts_the_shadow() -> None:
    effects = cast(PLATE, [figure(140, wide=30)], GROUND, light(azimuth=0.9, softness=0.15))
    soft = []
    for row in (134, 122):
        dark = (1 - effects.factor[row, :, 0]) / 0.6
        dark = dark[140:] if row == 134 else dark
        soft.append(int(((dark > 0.05) & (dark < 0.9 * dark.max())).sum()))
    assert soft[1] > 1.5 * soft[0] > 0


def test_full_shadow_leaves_what_the_sky_sends_and_its_colour() -> None:
    effects = cast(PLATE, [figure(150, wide=60)], GROUND, light(azimuth=0.7))
    darkest = effects.factor.reshape(-1, 3).min(axis=0)
    np.testing.assert_allclose(darkest, SUN.fill, atol=0.01)


@pytest.mark.parametrize("seed", range(8))
def test_nothing_changes_above_the_horizon_nor_where_no_ground_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ground = Ground(GROUND.horizon, GROUND.centre, GROUND.focal, top=rng.uniform(0, 90), gloss=1.0)
    people = [figure(foot, rng.uniform(20, 220)) for foot in (100, 130, 170, 260)]
    sun = light(azimuth=rng.uniform(-3, 3), height=rng.uniform(0.2, 1.4), softness=rng.uniform(0, 0.4), contact=0.5)
    effects = cast(PLATE, people, ground, sun)
    none = np.ones(SIZE, bool)
    none[max(40, int(ground.top)) :] = False
    changed = (blend(PLATE, people, effects) != PLATE).any(axis=2)
    bodies = np.any([person.layer[..., 3] > 0 for person in people], axis=0)
    assert not (changed & none & ~bodies).any()
    assert not (changed & ~np.any(effects.masks, axis=0) & ~bodies).any()


def test_who_is_cut_off_by_the_lower_edge_casts_into_the_picture_only_when_lit_from_the_front() -> None:
    person = figure(300, tall=1.0)
    towards, away = (cast(PLATE, [person], GROUND, light(azimuth=azimuth)).masks[0] for azimuth in (-0.8, 1.2))
    assert not towards.any()
    assert away.any()


def test_contact_darkens_the_ground_at_the_feet_alone() -> None:
    person = figure(140, wide=20)
    effects = cast(PLATE, [person], GROUND, light(height=np.radians(89), contact=0.5))
    rows, columns = np.nonzero(effects.masks[0])
    assert rows.size > 20 and effects.factor.min() < 0.9
    assert rows.min() > 140 - 20 and rows.max() < 140 + 12 and abs(columns - 120).max() < 30


def test_people_on_ground_that_lies_below_the_picture_cast_shadows_on_each_other_alone() -> None:
    people = [figure(260, column=100, tall=1.1, wide=60), figure(280, column=160, tall=1.1, wide=60)]
    ground = Ground(GROUND.horizon, GROUND.centre, GROUND.focal, top=SIZE[0], gloss=0.5)
    effects = cast(PLATE, people, ground, light(azimuth=2.8, height=np.radians(30)))
    assert (effects.factor == 1).all() and not effects.added.any()
    assert any(shade is not None for shade in effects.on_people)


def test_somebody_of_whom_the_picture_shows_nothing_changes_nothing() -> None:
    nobody = Figure(np.zeros((*SIZE, 4), np.uint8), (120, 140))
    alone, beside = (cast(PLATE, people, GROUND, light()) for people in ([figure(140)], [nobody, figure(140)]))
    assert np.array_equal(alone.factor, beside.factor) and not beside.masks[0].any()


def test_ground_that_a_thing_hides_shows_no_effect() -> None:
    bare = np.ones(SIZE, np.float32)
    bare[:, 130:] = 0
    ground = Ground(GROUND.horizon, GROUND.centre, GROUND.focal, bare=bare, gloss=0.5)
    effects = cast(PLATE, [figure(140)], ground, light(azimuth=0.4))
    assert not effects.masks[0][:, 130:].any() and (effects.factor[:, 130:] == 1).all()


def test_still_ground_mirrors_upside_down_as_much_as_schlick_says() -> None:
    person = figure(120, tall=0.5, wide=40)
    person.layer[:100, :, :3] = np.where(person.layer[:100, :, 3:] > 0, 250, 0)
    ground = Ground(GROUND.horizon, GROUND.centre, GROUND.focal, gloss=1.0)
    effects = cast(PLATE, [person], ground, None)
    assert effects.kinds == [("reflection",)]
    picture = blend(PLATE, [person], effects)
    for row, colour in ((128, 60), (152, 250)):  # the dark legs, the bright chest
        below = row + 0.5 - GROUND.horizon
        cosine = below / np.hypot(below, GROUND.focal)
        reflectance = 0.04 + 0.96 * (1 - cosine) ** 5
        assert picture[row, 120, 0] == pytest.approx(200 + reflectance * (colour - 200), abs=1)
    assert not effects.masks[0][162:].any() and not effects.masks[0][:120].any()


def test_what_nobody_would_see_is_in_neither_picture_nor_mask() -> None:
    night = np.full((*SIZE, 3), 3, np.uint8)
    person = figure(140)
    effects = cast(night, [person], GROUND, light(azimuth=0.5, contact=0.5))
    assert not effects.masks[0].any() and effects.kinds == [()] and (effects.factor == 1).all()
    assert np.array_equal(blend(night, [person], effects)[:, :100], night[:, :100])


def test_without_people_or_light_nothing_changes() -> None:
    for people in ([], [figure(140)]):
        effects: Effects = cast(PLATE, people, GROUND, None)
        assert (effects.factor == 1).all() and effects.added is None and len(effects.masks) == len(people)
