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
    added: np.ndarray
    """(H, W, 3) float32 in grey levels of 255: what reflections add."""
    on_people: list[np.ndarray | None]
    """(H, W, 3) float32 for each person: what shadows of others leave of their colours. None: all of it."""
    masks: list[np.ndarray]
    """(H, W) bool for each person: where the picture shows their shadow or reflection."""
    kinds: list[tuple[EffectKind, ...]]
    """Which of the two, for each person."""


def blend(plate: np.ndarray, people: Sequence[Figure], effects: Effects) -> np.ndarray:
    """(H, W, 3) uint8: the plate times factor plus reflections, and people in their shade over it, rearmost first."""
    picture = plate * effects.factor + effects.added
    for person, shade in zip(people, effects.on_people, strict=True):
        colours = person.layer[person.box][..., :3].astype(np.float32)
        if shade is not None:
            colours *= shade[person.box]
        under = picture[person.box]
        under += person.opacity[..., None] * (colours - under)
    return np.rint(picture).clip(0, 255).astype(np.uint8)


def no_effects(plate: np.ndarray, people: int) -> Effects:
    """Of a picture in which nobody changes the light."""
    nothing = np.zeros(plate.shape[:2], bool)
    return Effects(
        np.ones(plate.shape, np.float32), np.zeros(plate.shape, np.float32), [None] * people, [nothing] * people,
        [()] * people,
    )  # fmt: skip


def cast(plate: np.ndarray, people: Sequence[Figure], ground: Ground, light: Light | None) -> Effects:
    """Shadows and reflections of people.

    Args:
        plate: (H, W, 3) uint8 RGB, the scene without people.
        people: from the rearmost to the nearest.
        ground: where they stand.
        light: None casts no shadow.
    """
    effects = no_effects(plate, len(people))
    if not people:
        return effects
    shows = _Visibility(plate, people, ground)
    shadow = [np.zeros_like(mask) for mask in effects.masks]
    if light is not None:
        shadow = _cast_shadows(effects, people, ground, light, shows)
    mirrored = [np.zeros_like(mask) for mask in effects.masks]
    if np.any(ground.gloss):
        mirrored = [_mirror(effects, person, ground, shows) for person in people]
    effects.masks = [a | b for a, b in zip(shadow, mirrored, strict=True)]
    effects.kinds = [_kinds(a, b) for a, b in zip(shadow, mirrored, strict=True)]
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


def _cast_shadows(
    effects: Effects, people: Sequence[Figure], ground: Ground, light: Light, shows: _Visibility
) -> list[np.ndarray]:
    """Set factors; where each person's shadow is seen."""
    fill = np.array(light.fill, np.float32)
    lost_sun, lost_sky = shows.bare * (shows.plate * (1 - fill)).max(axis=2), shows.bare * (shows.plate * fill).max(2)
    sun, sky = np.zeros_like(shows.bare), np.zeros_like(shows.bare)
    on_people = [np.zeros_like(weight) for weight in shows.weights]
    masks = []
    for index, person in enumerate(people):
        caster = _Caster(person, ground, light)
        dark, close = caster.on_ground(), caster.contact()
        change = lost_sun * dark + lost_sky * close
        behind = {}
        for other in range(index):
            receiver = people[other]
            fallen = caster.on_figure(receiver)
            if fallen is not None:
                behind[other] = fallen
                colours = receiver.layer[receiver.box][..., :3]
                change[receiver.box] += fallen * shows.weights[other] * (colours * (1 - fill)).max(axis=2)
        mask = change >= VISIBLE
        masks.append(mask)
        np.maximum(sun, dark * mask, out=sun)
        np.maximum(sky, close * mask, out=sky)
        for other, fallen in behind.items():
            np.maximum(on_people[other], fallen * mask[people[other].box], out=on_people[other])
    # Things hide the ground: what they leave of its darkness is all that the picture shows.
    if ground.bare is not None:
        sun *= ground.bare
        sky *= ground.bare
    effects.factor = (1 - fill) * (1 - sun[..., None]) + fill * (1 - sky[..., None])
    for index, (person, dark) in enumerate(zip(people, on_people, strict=True)):
        if dark.any():
            shade = np.ones_like(effects.factor)
            shade[person.box] -= dark[..., None] * (1 - fill)
            effects.on_people[index] = shade
    return masks


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
        self.stands_in_picture = row < self.size[0]
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
        """The silhouette, blurred by a radius in pixels for each of its rows, and the corner of the larger array."""
        most = max(1.0, float(radii.max(initial=0)))
        pad = int(np.ceil(most)) + 1
        wide = cv2.copyMakeBorder(self.alpha, pad, pad, pad, pad, cv2.BORDER_CONSTANT)
        levels = np.unique(np.rint(np.linspace(1, most, _LEVELS)).astype(int))
        blurred = [cv2.stackBlur(wide, (2 * int(level) + 1,) * 2).astype(np.float32) for level in levels]
        wanted = np.interp(np.arange(-pad, len(self.alpha) + pad), np.arange(len(self.alpha)), radii)
        soft = np.zeros(wide.shape, np.float32)
        for index, copy in enumerate(blurred):
            share = np.interp(wanted, levels, np.eye(len(levels))[index])
            soft += copy * share[:, None].astype(np.float32)
        return soft / 255, np.array([self.left - pad, self.top - pad])

    def on_ground(self) -> np.ndarray:
        """(H, W) float32: share of the light that the person keeps from the ground at each pixel."""
        if self.alpha.size == 0 or self.light.height >= np.pi / 2:
            return np.zeros(self.size, np.float32)
        heights = np.maximum(self.person.foot[1] - self.top - 0.5 - np.arange(len(self.alpha)), 0)
        soft, corner = self._softened(1 + self.light.softness * heights / np.sin(self.light.height))
        # From homogeneous pixels to the ground, there to height and side of the figure, and to its pixels.
        ground, length = self.ground, 1 / np.tan(self.light.height)
        to_ground = np.array([[1, 0, -ground.centre], [0, 0, ground.focal], [0, 1, -ground.horizon]])
        to_foot = np.array([[1, 0, -self.x], [0, 1, -self.z], [0, 0, 1]])
        to_figure = np.eye(3)
        to_figure[:2, :2] = np.linalg.inv(np.stack([self.across, length * self.away], 1))
        column, row = self.person.foot
        to_pixels = np.array([[self.scale, 0, column - corner[0]], [0, -self.scale, row - corner[1]], [0, 0, 1]])
        dark = self._warped(soft, to_pixels @ to_figure @ to_foot @ to_ground)
        dark[: ground.first_row] = 0
        return dark

    def on_figure(self, receiver: Figure) -> np.ndarray | None:
        """Share of the light, within the receiver's box, that the person keeps from somebody behind; None: of none."""
        gap = self.ground.distance(receiver.foot[1]) - self.z
        if self.away[1] < 0.05 or gap <= 0 or self.alpha.size == 0:
            return None
        slope, rise = self.away[0] / self.away[1], np.tan(self.light.height) / self.away[1]
        # A ray that leaves the figure at (side, height) has gone `way / away[1]` along the ground when it arrives.
        scale = receiver.foot[1] - self.ground.horizon
        across = self.across[0] - self.across[1] * slope
        side = np.array([1 / scale, 0, -self.ground.centre / scale - self.x - gap * slope]) / across
        way = np.array([0, 0, gap]) - self.across[1] * side
        height = np.array([0, -1 / scale, receiver.foot[1] / scale]) + way * rise
        radius = self.light.softness * gap / self.away[1] / np.cos(self.light.height) * self.scale
        soft, corner = self._softened(np.full(len(self.alpha), 1 + radius))
        column, row = self.person.foot
        matrix = np.stack([side * self.scale, -height * self.scale, np.zeros(3)])
        matrix[:, 2] += column - corner[0], row - corner[1], 1
        fallen = self._warped(soft, matrix)[receiver.box]
        return fallen if fallen.any() else None

    def _warped(self, soft: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """The silhouette in the picture; ``matrix`` leads from centres of its pixels to those of the silhouette's."""
        centres = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        matrix = np.linalg.inv(centres) @ matrix @ centres
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpPerspective(soft, matrix, self.size[::-1], flags=flags, borderMode=cv2.BORDER_CONSTANT)

    def contact(self) -> np.ndarray:
        """(H, W) float32: share of the sky's light that the feet keep from the ground around them."""
        close = np.zeros(self.size, np.float32)
        if not self.stands_in_picture or self.alpha.size == 0 or self.light.contact == 0:
            return close
        tall = len(self.alpha)
        reach = max(2, round(0.07 * tall))
        feet: np.ndarray = self.alpha[-reach:] * np.linspace(0, 1, reach, dtype=np.float32)[:, None]
        pad = max(3, round(0.09 * tall))
        feet = cv2.copyMakeBorder(feet, pad, pad, pad, pad, cv2.BORDER_CONSTANT)
        feet = cv2.GaussianBlur(feet, (0, 0), max(1.0, 0.03 * tall), sigmaY=max(0.7, 0.014 * tall))
        feet = feet * np.float32(self.light.contact / max(1e-6, feet.max()))
        y, x = self.top + tall - reach - pad, self.left - pad
        top, left = max(0, y), max(0, x)
        shown = feet[top - y : self.size[0] - y, left - x : self.size[1] - x]
        close[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
        return close


def _mirror(effects: Effects, person: Figure, ground: Ground, shows: _Visibility) -> np.ndarray:
    """Lay a person's mirror image over the ground; where it is seen."""
    seen = np.zeros(shows.bare.shape, bool)
    rows, columns = person.box
    height = shows.bare.shape[0]
    start = round(person.foot[1])
    end = min(height, 2 * start - rows.start)
    if start >= height or end <= start or columns.start == columns.stop:
        return seen
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
    effects.added[window] *= left_over
    effects.added[window] += share * shown[..., :3]
    return seen
