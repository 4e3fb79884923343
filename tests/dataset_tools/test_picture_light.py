"""The light of composites: from which side, how often, and in which ranges."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from dataset_tools.lighting import Light
from dataset_tools.picture_light import LightSettings, draw_gloss, draw_light, light_side

GREY = np.full((64, 64, 3), 120, np.uint8)


def lights(count: int, plate: np.ndarray = GREY, **changes: object) -> list[Light | None]:
    settings = LightSettings.model_validate(changes)
    return [draw_light(plate, 20, settings, np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_as_many_pictures_as_set_have_shadows_and_mirrors(share: float) -> None:
    lit = np.mean([light is not None for light in lights(800, shadows=share)])
    assert lit == pytest.approx(share, abs=0.05 if 0 < share < 1 else 0)
    drawn = glosses(np.ones((1, 1), np.float32), 800, reflections=share)
    assert np.mean([np.all(gloss) for gloss in drawn]) == pytest.approx(share, abs=0.05 if 0 < share < 1 else 0)


def glosses(glossy: np.ndarray | None, count: int, **changes: object) -> list[np.ndarray | float]:
    settings = LightSettings.model_validate(changes)
    return [draw_gloss(glossy, settings, np.random.default_rng(seed)) for seed in range(count)]


def test_the_ground_mirrors_as_much_as_it_is_marked_within_the_range() -> None:
    shares = np.float32([[0, 0.25, 1]])
    drawn = np.array(glosses(shares, 50, reflections=1, gloss=(0.4, 0.6)))[:, 0]
    assert not drawn[:, 0].any() and np.allclose(drawn[:, 1], drawn[:, 2] / 4)
    assert 0.4 <= drawn[:, 2].min() < 0.42 and 0.58 < drawn[:, 2].max() <= 0.6
    assert glosses(None, 5, reflections=1) == [0.0] * 5


def test_lights_keep_to_their_ranges_and_come_from_both_sides() -> None:
    drawn = [
        light for light in lights(200, shadows=1, height=(20, 40), softness=(0.1, 0.2), darkness=(0.5, 0.6)) if light
    ]
    assert np.degrees([min(light.height for light in drawn), max(light.height for light in drawn)]) == pytest.approx(
        [20, 40], abs=2
    )
    assert all(0.1 <= light.softness <= 0.2 for light in drawn)
    assert all(0.3 < fill < 0.6 for light in drawn for fill in light.fill)
    assert 0.3 < np.mean([np.cos(light.azimuth) > 0 for light in drawn]) < 0.7


def test_shadows_point_away_from_the_brighter_side_of_the_sky() -> None:
    sky = np.full((120, 160, 3), 90, np.uint8)
    sky[:50] = np.linspace(150, 220, 160)[None, :, None] * [0.8, 0.9, 1.0]
    assert light_side(sky, 50) == 1 and light_side(sky[:, ::-1], 50) == -1
    for plate, sign in ((sky, -1), (sky[:, ::-1], 1)):
        assert all(light and np.sign(np.cos(light.azimuth)) == sign for light in lights(20, plate, shadows=1))


def test_pictures_without_a_sky_that_tells_are_left_to_the_draw() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    warm = np.full((120, 160, 3), 90, np.uint8)
    warm[:50] = np.linspace(150, 220, 160)[None, :, None] * [1.0, 0.8, 0.6]  # a wall beside a lamp
    even = np.full((120, 160, 3), 200, np.uint8)
    assert [light_side(plate, 50) for plate in (noise, warm, even)] == [0, 0, 0]


def test_the_shadow_takes_the_colour_of_what_lies_above_the_horizon() -> None:
    blue = np.full((64, 64, 3), (120, 160, 230), np.uint8)
    for light in lights(10, blue, shadows=1):
        assert light is not None and light.fill[0] < light.fill[1] < light.fill[2]


@pytest.mark.parametrize(
    "wrong", [{"shadows": 2}, {"height": (0, 40)}, {"height": (30, 90)}, {"softness": (0.3, 0.1)}, {"gloss": (0, 2)}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LightSettings.model_validate(wrong)
