"""What people do to the light of a picture: shadows on the ground and on people behind, and reflections in the ground.

A person is a flat upright figure that stands on level ground before a level camera; one light, far away, shines on all
of them. Their silhouettes are cast along its rays, and the penumbra grows with the way from who casts it. Around the
feet they keep the sky's light from the ground too. Glossy ground mirrors the figure, the more the flatter one looks at
it (Schlick, An inexpensive BRDF model for physically-based rendering, 1994, equation 15).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import cv2
import numpy as np

from dataset_tools.schema import EffectKind

VISIBLE = 2.0
"""Grey levels of 255. What changes a pixel by less in every channel is left out of the picture and of the masks, so
that both agree."""
_MIRROR = 0.04
"""Reflectance at right angles of water, varnish and polished stone, about."""
_SIDE = 224
"""Pixels of a silhouette's longer side at most, where it is blurred."""
_SHARP = 4.0
"""Pixels of the sharpest part of a penumbra at most, where it is blurred."""
_LEVELS = 4
"""Blurred copies of a silhouette between which its penumbra is interpolated."""


@dataclass(frozen=True, eq=False)
class Ground:
    """Level ground as a level camera sees it. Lengths are in heights of the camera above the ground."""

    horizon: float
    """Row; ground lies below it."""
    centre: float
    """Column of the optical axis."""
    focal: float
    """Focal length in pixels."""
    top: float = 0.0
    """Row above which there is no ground, such as that of the foot of a wall."""
    bare: np.ndarray | None = None
    """(H, W) float32 in 0..1: how much of each pixel is ground that no thing of the scene hides. None: all of it."""
    gloss: np.ndarray | float = 0.0
    """How much of a mirror the ground is, 0..1; (H, W) float32, or the same everywhere."""

    @property
    def first_row(self) -> int:
        """The uppermost row that shows ground."""
        return max(0, int(np.ceil(max(self.horizon + 0.5, self.top))))

    def distance(self, row: float) -> float:
        """Of the ground seen at a row."""
        return self.focal / (row - self.horizon)


@dataclass(frozen=True)
class Light:
    """The light of a picture."""

    azimuth: float
    """Where shadows point, radians: 0 is the picture's right, pi / 2 away from the viewer."""
    height: float
    """Of the light above the horizon, radians: more than 0, at most pi / 2."""
    softness: float
    """How fast the penumbra grows: its half width as a share of the way from who casts the shadow. The sun's is 0.005;
    haze, clouds and windows have more."""
    fill: tuple[float, float, float]
    """What the rest of the light, such as the sky's, leaves of red, green and blue in full shadow, 0..1."""
    contact: float
    """Share of the sky's light that people keep from the ground right at their feet, 0..1."""


@dataclass(eq=False)
class Figure:
    """A person as an upright flat figure."""

    layer: np.ndarray
    """(H, W, 4) uint8 straight RGBA of the complete person."""
    foot: tuple[float, float]
    """Column and row where they stand; the row may lie below the picture."""
    bare: np.ndarray | None = None
    """(H, W) float32 in 0..1: what things in front leave of each pixel. None: all of it."""

    @cached_property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns of the picture outside of which they are not."""
        left, top, width, height = cv2.boundingRect(np.ascontiguousarray(self.layer[..., 3]))
        return np.s_[top : top + height, left : left + width]

    @cached_property
    def opacity(self) -> np.ndarray:
        """Float32 in 0..1 within ``box``."""
        opacity = self.layer[self.box][..., 3].astype(np.float32) / 255
        return opacity if self.bare is None else opacity * self.bare[self.box]


@dataclass(eq=False)
class Effects:
    """How people change the light of a picture: `blend` applies it."""

    factor: np.ndarray
    """(H, W, 3) float32: what of the plate's colours is left."""
    added: np.ndarray | None
    """(H, W, 3) float32 in grey levels of 255: what reflections add. None: there are none."""
    on_people: list[np.ndarray | None]
    """(h, w, 3) float32 within the box of each person: what shadows of others leave of their colours. None: all."""
    masks: list[np.ndarray]
    """(H, W) bool for each person: where the picture shows their shadow or reflection."""
    kinds: list[tuple[EffectKind, ...]]
    """Which of the two, for each person."""


def blend(plate: np.ndarray, people: Sequence[Figure], effects: Effects) -> np.ndarray:
    """(H, W, 3) uint8: the plate times factor plus reflections, and people in their shade over it, rearmost first."""
    picture = plate * effects.factor
    if effects.added is not None:
        picture += effects.added
    for person, shade in zip(people, effects.on_people, strict=True):
        colours = person.layer[person.box][..., :3].astype(np.float32)
        if shade is not None:
            colours *= shade
        under = picture[person.box]
        under += person.opacity[..., None] * (colours - under)
    return cv2.convertScaleAbs(picture)


def cast(plate: np.ndarray, people: Sequence[Figure], ground: Ground, light: Light | None) -> Effects:
    """Shadows and reflections of people.

    Args:
        plate: (H, W, 3) uint8 RGB, the scene without people.
        people: from the rearmost to the nearest.
        ground: where they stand.
        light: None casts no shadow.
    """
    size = plate.shape[:2]
    effects = Effects(np.ones(plate.shape, np.float32), None, [None] * len(people), [], [])
    shows = _Visibility(plate, people, ground)
    shadows, mirrored = ([np.zeros(size, bool) for _ in people] for _ in range(2))
    if light is not None:
        _cast_shadows(effects, people, ground, light, shows, shadows)
    if np.any(ground.gloss):
        effects.added = np.zeros(plate.shape, np.float32)
        for person, seen in zip(people, mirrored, strict=True):
            _mirror(effects, person, ground, shows, seen)
    for shadow, mirror in zip(shadows, mirrored, strict=True):
        effects.masks.append(shadow | mirror)
        effects.kinds.append(_kinds(shadow, mirror))
    return effects


def _kinds(shadow: np.ndarray, mirrored: np.ndarray) -> tuple[EffectKind, ...]:
    kinds: list[EffectKind] = ["shadow"] if shadow.any() else []
    return (*kinds, "reflection") if mirrored.any() else tuple(kinds)


@dataclass(eq=False)
class _Visibility:
    """How much of what is seen at each pixel is ground, and how much each person."""

    plate: np.ndarray
    people: Sequence[Figure]
    ground: Ground
    bare: np.ndarray = field(init=False)
    """(H, W) float32: share of ground that nobody and nothing hides."""
    weights: list[np.ndarray] = field(init=False)
    """Share of each person, within their box."""

    def __post_init__(self) -> None:
        self.bare = np.ones(self.plate.shape[:2], np.float32)
        self.weights = []
        for person in reversed(self.people):
            left = self.bare[person.box]
            self.weights.insert(0, left * person.opacity)
            left *= 1 - person.opacity
        if self.ground.bare is not None:
            self.bare *= self.ground.bare
        self.bare[: self.ground.first_row] = 0


def _brightest(colours: np.ndarray) -> np.ndarray:
    """The greatest of red, green and blue, float32."""
    if not colours.size:  # of who is not in the picture; OpenCV knows no empty ones
        return np.zeros(colours.shape[:2], np.float32)
    red, green, blue, *_ = cv2.split(colours)
    return cv2.max(cv2.max(red, green), blue).astype(np.float32)


def _cast_shadows(
    effects: Effects,
    people: Sequence[Figure],
    ground: Ground,
    light: Light,
    shows: _Visibility,
    masks: Sequence[np.ndarray],
) -> None:
    """Set what is left of colours, and ``masks`` where each person's shadow is seen."""
    fill = np.array(light.fill, np.float32)
    bright = shows.bare * _brightest(shows.plate)
    shades = [
        weight * _brightest(person.layer[person.box]) for weight, person in zip(shows.weights, people, strict=True)
    ]
    sun, sky = np.zeros_like(bright), np.zeros_like(bright)
    on_people = [np.zeros_like(weight) for weight in shows.weights]
    for person, mask in zip(people, masks, strict=True):
        if person.opacity.size == 0:
            continue
        caster = _Caster(person, ground, light)
        for dark, (place, box), lost in (
            (sun, caster.on_ground(), 1 - fill.min()),
            (sky, caster.contact(), fill.max()),
        ):
            seen = bright[box] * place >= VISIBLE / max(lost, 1e-6)
            mask[box] |= seen
            np.maximum(dark[box], place * seen, out=dark[box])
        for receiver, shade, dark in zip(people, shades, on_people, strict=True):
            fallen = caster.on_figure(receiver)
            if fallen is not None:
                seen = shade * fallen >= VISIBLE / max(1 - fill.min(), 1e-6)
                mask[receiver.box] |= seen
                np.maximum(dark, fallen * seen, out=dark)
    # Things hide the ground: what they leave of its darkness is all that the picture shows.
    if ground.bare is not None:
        sun *= ground.bare
        sky *= ground.bare
    rows = np.s_[ground.first_row :]
    if bright[rows].size:  # the ground may lie below the picture
        effects.factor[rows] = cv2.merge([1 - (1 - f) * sun[rows] - f * sky[rows] for f in fill])
    for index, dark in enumerate(on_people):
        if dark.any():
            effects.on_people[index] = 1 - dark[..., None] * (1 - fill)


class _Caster:
    """A silhouette with the light on it.

    It is turned half way from facing the viewer to facing the light, as a body is no sheet of paper: light from the
    side throws no mere line, and the shadow still begins at both feet.
    """

    def __init__(self, person: Figure, ground: Ground, light: Light) -> None:
        self.person, self.ground, self.light = person, ground, light
        self.size = person.layer.shape[:2]
        column, row = person.foot
        self.scale = row - ground.horizon
        """Pixels a camera height where the person stands."""
        self.x, self.z = (column - ground.centre) / self.scale, ground.distance(row)
        self.away = np.array([np.cos(light.azimuth), np.sin(light.azimuth)])
        across = np.array([-self.away[1], self.away[0]])
        across = (across if across[0] >= 0 else -across) + [1, 0]
        self.across = across / np.hypot(*across)
        self.alpha, self.left, self.top = self._silhouette()

    def _silhouette(self) -> tuple[np.ndarray, int, int]:
        """Opacity (h, w) uint8 down to the foot line, and its corner in the picture."""
        rows, columns = self.person.box
        alpha = self.person.layer[rows, columns, 3]
        foot = int(np.ceil(self.person.foot[1]))
        if foot > self.size[0] and alpha.size:  # legs that the picture cuts off: as wide as what it shows last
            below = np.repeat(alpha[-1:], min(foot - rows.stop, self.size[0]), axis=0)
            alpha = np.concatenate([alpha, below])
        return alpha, columns.start, rows.start

    def _softened(self, radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The silhouette, smaller, blurred by a radius in the picture's pixels for each of its rows.

        Also the matrix that leads from pixels of the picture, homogeneous, to those of the array.
        """
        # A broad penumbra has no detail; its blur would cost the more the broader it is.
        shrink = min(1.0, _SIDE / max(self.alpha.shape), _SHARP / float(radii.min()))
        size = max(1, round(self.alpha.shape[1] * shrink)), max(1, round(self.alpha.shape[0] * shrink))
        alpha = cv2.resize(self.alpha, size, interpolation=cv2.INTER_AREA)
        scale_x, scale_y = size[0] / self.alpha.shape[1], size[1] / self.alpha.shape[0]
        radii = np.interp(np.arange(size[1]), np.arange(len(radii)) * scale_y, radii * scale_x)
        most = max(1.0, float(radii.max()))
        pad = int(np.ceil(most)) + 2
        alpha = cv2.copyMakeBorder(alpha, pad, pad, pad, pad, cv2.BORDER_CONSTANT)
        radii = np.pad(radii, pad, "edge")
        levels = np.unique(np.rint(np.geomspace(1, most, _LEVELS)).astype(int))
        soft = np.zeros(alpha.shape, np.float32)
        for index, level in enumerate(levels):
            share = np.interp(radii, levels, np.eye(len(levels))[index]).astype(np.float32)[:, None] / 255
            part = np.flatnonzero(share)
            # Only where there is a share of it, and as far as it reaches.
            first = max(part[0], pad - level) if part.size else 0
            end = min(part[-1] + 1, len(alpha) - pad + level) if part.size else 0
            if end > first:
                rows, columns = np.s_[first:end], np.s_[pad - level : alpha.shape[1] - pad + level]
                above = max(0, first - level)
                blurred = _blurred(alpha[above : end + level, columns], int(level))
                soft[rows, columns] += share[rows] * blurred[first - above : end - above]
        to_array = np.array(
            [[scale_x, 0, pad - self.left * scale_x], [0, scale_y, pad - self.top * scale_y], [0, 0, 1]]
        )
        return soft, to_array

    def on_ground(self) -> tuple[np.ndarray, tuple[slice, slice]]:
        """Share of the light that the person keeps from the ground, float32 within a box of the picture; the box."""
        heights = np.maximum(self.person.foot[1] - self.top - 0.5 - np.arange(len(self.alpha)), 0)
        soft, to_array = self._softened(1 + self.light.softness * heights / np.sin(self.light.height))
        # From homogeneous pixels to the ground, there to side and height of the figure, and to its pixels.
        ground, length = self.ground, 1 / np.tan(self.light.height)
        to_ground = np.array([[1, 0, -ground.centre], [0, 0, ground.focal], [0, 1, -ground.horizon]])
        to_foot = np.array([[1, 0, -self.x], [0, 1, -self.z], [0, 0, 1]])
        to_figure = np.eye(3)
        to_figure[:2, :2] = np.linalg.inv(np.stack([self.across, length * self.away], 1))
        column, row = self.person.foot
        to_pixels = np.array([[self.scale, 0, column], [0, -self.scale, row], [0, 0, 1]])
        matrix = to_array @ to_pixels @ to_figure @ to_foot @ to_ground
        box = self._reach(np.linalg.inv(matrix), soft.shape)
        return _warped(soft, matrix, box), box

    def _reach(self, to_picture: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, slice]:
        """Rows and columns of ground that an array (h, w) may darken."""
        height, width = shape
        corners = to_picture @ np.array([[0, width, width, 0], [0, 0, height, height], [1, 1, 1, 1]])
        (high, wide), first = self.size, self.ground.first_row
        # Behind the viewer, where the sign changes, lines of the ground go on to the picture's edges.
        if not (np.all(corners[2] > 1e-9) or np.all(corners[2] < -1e-9)):
            return np.s_[first:high, 0:wide]
        x, y = corners[:2] / corners[2]
        left, right = (int(v) for v in np.clip([np.floor(x.min()), np.ceil(x.max())], 0, wide))
        top, bottom = (int(v) for v in np.clip([np.floor(y.min()), np.ceil(y.max())], min(first, high), high))
        return np.s_[top:bottom, left:right]

    def on_figure(self, receiver: Figure) -> np.ndarray | None:
        """Share of the light, within the receiver's box, that the person keeps from somebody behind; None: of none."""
        gap = self.ground.distance(receiver.foot[1]) - self.z
        if self.away[1] < 0.05 or gap <= 0 or receiver.opacity.size == 0:
            return None
        slope, rise = self.away[0] / self.away[1], np.tan(self.light.height) / self.away[1]
        # A ray that leaves the figure at (side, height) has gone `way / away[1]` along the ground when it arrives.
        scale = receiver.foot[1] - self.ground.horizon
        across = self.across[0] - self.across[1] * slope
        side = np.array([1 / scale, 0, -self.ground.centre / scale - self.x - gap * slope]) / across
        way = np.array([0, 0, gap]) - self.across[1] * side
        height = np.array([0, -1 / scale, receiver.foot[1] / scale]) + way * rise
        column, row = self.person.foot
        to_pixels = np.stack([side * self.scale, -height * self.scale, np.zeros(3)])
        to_pixels[:, 2] += column, row, 1
        # Where the receiver's box is on the figure: mostly nowhere.
        (rows, columns), (tall, wide) = receiver.box, self.alpha.shape
        corners = [[x, y, 1] for x in (columns.start, columns.stop) for y in (rows.start, rows.stop)]
        x, y, _ = to_pixels @ np.array(corners).T
        radius = self.light.softness * gap / self.away[1] / np.cos(self.light.height) * self.scale
        reach = 2 * radius + 8
        if x.max() < self.left - reach or x.min() > self.left + wide + reach:
            return None
        if y.max() < self.top - reach or y.min() > self.top + tall + reach:
            return None
        soft, to_array = self._softened(np.full(len(self.alpha), 1 + radius))
        fallen = _warped(soft, to_array @ to_pixels, receiver.box)
        return fallen if fallen.any() else None

    def contact(self) -> tuple[np.ndarray, tuple[slice, slice]]:
        """Share of the sky's light that the feet keep from the ground around them, float32 within a box; the box."""
        if self.person.foot[1] >= self.size[0]:
            return np.zeros((0, 0), np.float32), np.s_[0:0, 0:0]
        tall = len(self.alpha)
        reach, pad = max(2, round(0.07 * tall)), max(3, round(0.09 * tall))
        feet: np.ndarray = self.alpha[-reach:] * np.linspace(0, 1 / 255, reach, dtype=np.float32)[:, None]
        feet = cv2.copyMakeBorder(feet, pad, pad, pad, pad, cv2.BORDER_CONSTANT)
        feet = cv2.GaussianBlur(feet, (0, 0), max(1.0, 0.03 * tall), sigmaY=max(0.7, 0.014 * tall))
        feet = feet * np.float32(self.light.contact / max(1e-6, feet.max()))
        y, x = self.top + tall - reach - pad, self.left - pad
        top, left = max(0, y, self.ground.first_row), max(0, x)
        shown = feet[top - y : self.size[0] - y, left - x : self.size[1] - x]
        return shown, np.s_[top : top + shown.shape[0], left : left + shown.shape[1]]


def _blurred(alpha: np.ndarray, radius: int) -> np.ndarray:
    """Two box blurs that reach ``radius`` pixels together: nearly a Gaussian, and nothing beyond."""
    for reach in (radius // 2, radius - radius // 2):
        alpha = cv2.blur(alpha, (2 * reach + 1,) * 2, borderType=cv2.BORDER_CONSTANT)
    return alpha


def _warped(soft: np.ndarray, matrix: np.ndarray, box: tuple[slice, slice]) -> np.ndarray:
    """An array in a box of the picture, float32; ``matrix`` leads from places in the picture to such in the array."""
    rows, columns = box
    size = columns.stop - columns.start, rows.stop - rows.start
    if min(size) <= 0:
        return np.zeros(size[::-1], np.float32)
    # Pixels are at the middle of their squares.
    from_pixels = np.array([[1, 0, columns.start + 0.5], [0, 1, rows.start + 0.5], [0, 0, 1]])
    to_pixels = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpPerspective(soft, to_pixels @ matrix @ from_pixels, size, flags=flags)


def _mirror(effects: Effects, person: Figure, ground: Ground, shows: _Visibility, seen: np.ndarray) -> None:
    """Lay a person's mirror image over the ground, and set ``seen`` where it shows."""
    rows, columns = person.box
    height, start = seen.shape[0], round(person.foot[1])
    end = min(height, 2 * start - rows.start)
    if start >= height or end <= start or columns.start == columns.stop:
        return
    # Premultiplied, from the foot line down; the farther from it, the more the ground blurs what it mirrors.
    figure: np.ndarray = person.layer[2 * start - end : start, columns][::-1].astype(np.float32)
    figure[..., :3] *= figure[..., 3:] / 255
    pad = 2 + round(0.02 * len(figure))
    figure = cv2.copyMakeBorder(figure, 0, pad, pad, pad, cv2.BORDER_CONSTANT)
    blurred = cv2.stackBlur(figure, (2 * pad + 1, 2 * pad + 1))
    figure += np.linspace(0, 1, len(figure), dtype=np.float32)[:, None, None] * (blurred - figure)
    top, left = start, columns.start - pad
    window = np.s_[top : min(height, top + len(figure)), max(0, left) : columns.stop + pad]
    shown = figure[: window[0].stop - top, max(0, left) - left :][:, : shows.bare[window].shape[1]]
    # Schlick's reflectance for the angle at which the ground is seen at each row.
    steep = (np.arange(window[0].start, window[0].stop) + 0.5 - ground.horizon) / ground.focal
    cosine = steep / np.hypot(1, steep)
    share = (_MIRROR + (1 - _MIRROR) * (1 - cosine) ** 5).astype(np.float32)[:, None]
    share = share * (ground.gloss[window] if isinstance(ground.gloss, np.ndarray) else ground.gloss)
    change = np.abs(shown[..., :3] - shown[..., 3:] / 255 * shows.plate[window]).max(axis=2)
    seen[window] = change * share * shows.bare[window] >= VISIBLE
    share = share * seen[window]
    if ground.bare is not None:
        share *= ground.bare[window]
    share = share[..., None]
    left_over = 1 - share * shown[..., 3:] / 255
    effects.factor[window] *= left_over
    assert effects.added is not None
    effects.added[window] *= left_over
    effects.added[window] += share * shown[..., :3]
