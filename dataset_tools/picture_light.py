"""The light of a composite: what its background tells about it, and the rest by lot."""

from __future__ import annotations

import cv2
import numpy as np
from pydantic import Field, field_validator

from dataset_tools.lighting import Light
from dataset_tools.settings import Settings

_TURN = (-0.7, 0.9)
"""Radians by which shadows point away from the viewer, from pure sidewards; below 0: towards the viewer."""
_SKY = 0.06
"""Share of the picture that must be sky for its brightness to tell something."""
_BRIGHTER = 8.0
"""Grey levels of 255 by which the sky must differ from one side to the other."""


class LightSettings(Settings):
    """The light of composites, and what people do to it: shadows, the dark at their feet, reflections.

    One light shines on all people of a picture; each picture draws its own from the ranges. Where the sky tells from
    which side it comes, that is its side.
    """

    shadows: float = Field(0.9, ge=0, le=1)
    """Share of pictures in which people cast shadows."""
    reflections: float = Field(0, ge=0, le=1)
    """Share in which the ground mirrors people, of those pictures whose background comes with a map of ground that can:
    floors, water (source ``ade20k``). It mirrors them there and nowhere else; of other backgrounds nobody knows where
    they are polished or wet, and nothing in them mirrors."""
    height: tuple[float, float] = (30, 70)
    """Range of the light's height above the horizon in degrees, more than 0 and less than 90."""
    softness: tuple[float, float] = (0.02, 0.25)
    """Range of half the penumbra's width, as a share of the way from who casts the shadow. 0.005 is the sun's."""
    darkness: tuple[float, float] = (0.25, 0.6)
    """Range of the share of light that full shadow lacks."""
    contact: tuple[float, float] = (0.2, 0.6)
    """Range of the share of the sky's light that people keep from the ground right at their feet."""
    gloss: tuple[float, float] = (0.4, 1.0)
    """Range of how much of a mirror such ground is; 1 is still water."""

    @field_validator("height", "softness", "darkness", "contact", "gloss")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] <= value[1]:
            raise ValueError("must be a range low, high with 0 <= low <= high")
        return value

    @field_validator("softness", "darkness", "contact", "gloss")
    @classmethod
    def _share(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] > 1:
            raise ValueError("is a share: 1 at most")
        return value

    @field_validator("height")
    @classmethod
    def _above_the_horizon(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not (value[0] > 0 and value[1] < 90):
            raise ValueError("must be more than 0 and less than 90 degrees")
        return value


def draw_light(plate: np.ndarray, horizon: float, settings: LightSettings, rng: np.random.Generator) -> Light | None:
    """The light in which all people of a picture stand; None: they cast no shadow.

    Args:
        plate: (H, W, 3) uint8 RGB, the background.
        horizon: its row.
        settings: shares and ranges.
        rng: decides about what the background does not tell.
    """
    lit, side, turn = rng.random() < settings.shadows, 1 if rng.random() < 0.5 else -1, rng.uniform(*_TURN)
    height, softness, darkness, contact = (
        rng.uniform(*bounds) for bounds in (settings.height, settings.softness, settings.darkness, settings.contact)
    )
    if not lit:
        return None
    side = light_side(plate, horizon) or side
    left = (1 - darkness) * sky_tint(plate, horizon)
    return Light(
        azimuth=np.pi - turn if side > 0 else turn,
        height=float(np.radians(height)),
        softness=softness,
        fill=(float(left[0]), float(left[1]), float(left[2])),
        contact=contact,
    )


def draw_gloss(glossy: np.ndarray | None, settings: LightSettings, rng: np.random.Generator) -> np.ndarray | float:
    """How much of a mirror the ground of a picture is, 0..1: for `dataset_tools.lighting.Ground.gloss`.

    Args:
        glossy: (H, W) float32 in 0..1: how much of each pixel is ground that can mirror. None: nobody marked any.
        settings: share and range.
        rng: decides.
    """
    mirrors, gloss = rng.random() < settings.reflections, np.float32(rng.uniform(*settings.gloss))
    return glossy * gloss if mirrors and glossy is not None else 0.0


def light_side(plate: np.ndarray, horizon: float) -> int:
    """Side from which the sun shines on an outdoor picture: -1 left, 1 right, 0 where the picture does not tell.

    The sky is brighter towards the sun. A plane is fitted to the brightness of what is smooth, bright, not warm in
    colour and joined to the upper edge; it tells nothing where there is too little of it, or where its slope is small.
    Clouds can mislead it. Indoors there is no sky, and no answer.
    """
    small = cv2.resize(plate, (96, 96), interpolation=cv2.INTER_AREA).astype(np.float32)
    grey = small @ np.array([0.299, 0.587, 0.114], np.float32)
    slope = np.abs(cv2.Sobel(grey, cv2.CV_32F, 1, 0)) + np.abs(cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    sky = (grey > 110) & (slope < 40) & (small[..., 2] > small[..., 0] - 12)
    sky[max(0, round(horizon / plate.shape[0] * 96)) :] = False
    _, parts = cv2.connectedComponents(sky.view(np.uint8), connectivity=4)
    sky = np.isin(parts, parts[0][sky[0]])
    rows, columns = np.nonzero(sky)
    if sky.mean() < _SKY or columns.size == 0 or np.ptp(columns) < 48:
        return 0
    terms = np.stack([columns / 96, rows / 96, np.ones(rows.size)], 1)
    (across, _, _), *_ = np.linalg.lstsq(terms, grey[sky].astype(np.float64), rcond=None)
    return int(np.sign(across)) if abs(across) >= _BRIGHTER else 0


def sky_tint(plate: np.ndarray, horizon: float) -> np.ndarray:
    """(3,) colour of the light from above: that of the picture above its horizon, half way from grey, green at 1."""
    above = plate[: max(1, round(horizon))].reshape(-1, 3).mean(axis=0) + 1
    return np.clip(0.5 + 0.5 * above / above[1], 0.85, 1.15)
