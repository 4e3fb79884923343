"""Colours, noise, outlines, and a sheet on which shapes are painted with light, shade and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import cv2
import numpy as np

Array = np.ndarray


def rgb(text: str) -> Array:
    """(3,) float32 in 0..1 from six hexadecimal digits."""
    return np.array([int(text[i : i + 2], 16) for i in (0, 2, 4)], np.float32) / 255


def hexes(*texts: str) -> list[Array]:
    return [rgb(text) for text in texts]


def mix(first: Array, second: Array, share: float) -> Array:
    return first + (second - first) * np.float32(share)


def draw_lot(rng: np.random.Generator, shares: dict[str, float]) -> str:
    """One of the names; how often each is drawn, all together 1."""
    return str(rng.choice(list(shares), p=list(shares.values())))


def pick(rng: np.random.Generator, colours: Sequence[Array], jitter: float = 0.035) -> Array:
    colour = colours[int(rng.integers(len(colours)))]
    return np.clip(
        colour + rng.normal(0, jitter, 3).astype(np.float32) * 0.6 + np.float32(rng.normal(0, jitter)), 0.02, 1
    )


WHITE = rgb("ffffff")
SKIN = hexes("f6d7c3", "f0c4a5", "e3ac86", "cf9468", "b47848", "8f5a35", "6d4428", "4f3120")
HAIR = hexes("1d1714", "2b1d14", "4a2f1d", "6d4526", "96683a", "c79a55", "e0c48a", "8e3f22", "9c9a98", "d8d5d0")
CLOTH = hexes(
    "c0392b", "e0603f", "e79b3c", "f0c94e", "6fae5a", "2f7d5b", "2aa198", "3d8fd1", "2d5aa0", "25325e", "6b4ba0",
    "b35fa6", "e58fa8", "f3f0e8", "d9d2c4", "9aa3ab", "4d555e", "24272d", "8a5a3c", "b9d3e6", "7a2038", "bcd8b0",
)  # fmt: skip
DENIM = hexes("25325e", "34507f", "5b7fae", "1f2430", "3a3d44", "8a7a60", "6a6f76", "b8a888", "4a3a30", "566044")
SHOES = hexes("24211f", "f2efe9", "7a4a2b", "b03a34", "33507a", "8d9299", "c99a6a")


@lru_cache(maxsize=1)
def _noise_bank() -> Array:
    """(512, 512) float32 fractal noise that tiles, mean 0, standard deviation 1."""
    rng = np.random.default_rng(5)
    total = np.zeros((512, 512), np.float32)
    for octave in range(6):
        cells = 8 << octave
        grid = rng.standard_normal((cells, cells)).astype(np.float32)
        wide = cv2.copyMakeBorder(grid, 2, 2, 2, 2, cv2.BORDER_WRAP)
        step = 512 // cells
        big = cv2.resize(wide, None, fx=step, fy=step, interpolation=cv2.INTER_CUBIC)
        total += big[2 * step : 2 * step + 512, 2 * step : 2 * step + 512] * 0.62**octave
    return (total - total.mean()) / total.std()


@lru_cache(maxsize=1)
def _noise_shares() -> Array:
    """The same noise as weights in 0..1."""
    return np.clip(_noise_bank() * np.float32(0.5) + np.float32(0.5), 0, 1)


def noise(rng: np.random.Generator, height: int, width: int, cell: tuple[float, float]) -> Array:
    """(height, width) float32 noise; one cell of the coarsest octave spans ``cell`` = (x, y) pixels."""
    bank = _noise_bank()
    columns = (np.arange(width) * (64 / cell[0]) + rng.integers(512)) % 512
    rows = (np.arange(height) * (64 / cell[1]) + rng.integers(512)) % 512
    x, y = np.meshgrid(columns.astype(np.float32), rows.astype(np.float32))
    return cv2.remap(bank, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def xy(*points: Sequence[float] | Array) -> Array:
    return np.array(points, np.float64)


def on_circle(angles: Array) -> Array:
    """(n, 2) points of the unit circle."""
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def capsule(start: Array, end: Array, start_radius: float, end_radius: float) -> Array:
    """Outline of the convex hull of two circles: a limb that tapers."""
    delta = end - start
    length = float(np.hypot(*delta))
    if length <= abs(start_radius - end_radius) + 1e-6:
        return ellipse(start if start_radius >= end_radius else end, *(max(start_radius, end_radius),) * 2)
    heading = np.arctan2(delta[1], delta[0])
    spread = np.arccos((start_radius - end_radius) / length)
    back = start + start_radius * on_circle(heading + np.linspace(spread, 2 * np.pi - spread, 9))
    front = end + end_radius * on_circle(heading + np.linspace(-spread, spread, 9))
    return np.concatenate([back, front])


def tube(points: Sequence[Array] | Array, radii: Sequence[float] | Array, unit: float = 1.0) -> list[Array]:
    """Tapering limbs through points, with a radius at each in ``unit`` pixels."""
    wide = [radius * unit for radius in radii]
    return [capsule(points[i], points[i + 1], wide[i], wide[i + 1]) for i in range(len(points) - 1)]


_CIRCLE = on_circle(np.linspace(0, 2 * np.pi, 28, endpoint=False))


def ellipse(centre: Array, radius_x: float, radius_y: float) -> Array:
    return centre + _CIRCLE * [radius_x, radius_y]


def loft(centres: Array, half_widths: Array) -> Array:
    """Outline around a spine of points from top to bottom, with a half width at each."""
    offset = np.stack([half_widths, np.zeros_like(half_widths)], 1)
    return smooth(np.concatenate([centres - offset, (centres + offset)[::-1]]))


def smooth(polygon: Array) -> Array:
    """One round of Chaikin's corner cutting, twice."""
    for _ in range(2):
        following = np.roll(polygon, -1, 0)
        polygon = np.stack([polygon * 0.75 + following * 0.25, polygon * 0.25 + following * 0.75], 1).reshape(-1, 2)
    return polygon


def rectangle(x0: float, y0: float, x1: float, y1: float) -> Array:
    return xy((x0, y0), (x1, y0), (x1, y1), (x0, y1))


Pattern = Callable[[Array, Array], tuple[Array, Array]]
"""From x (1, w) and y (h, 1) in picture pixels to weights (h, w) in 0..1 and the colour that they mix in."""


class Sheet:
    """A transparent drawing of a part of the picture, kept at ``fineness`` times its resolution."""

    def __init__(self, bounds: Sequence[float], size: tuple[int, int], sun: Array, fineness: int) -> None:
        """``bounds``: left, top, right, bottom in picture pixels, clipped to ``size`` (width, height).

        ``sun``: unit vector to the light. Labels are asked of people only, who are drawn with ``fineness`` 2.
        """
        left, top, right, bottom = bounds
        self.fineness = fineness
        self.left, self.top = int(np.clip(np.floor(left), 0, size[0] - 1)), int(np.clip(np.floor(top), 0, size[1] - 1))
        self.right = int(np.clip(np.ceil(right), self.left + 1, size[0]))
        self.bottom = int(np.clip(np.ceil(bottom), self.top + 1, size[1]))
        self.shape = ((self.bottom - self.top) * self.fineness, (self.right - self.left) * self.fineness)
        self.planes = np.zeros((4, *self.shape), np.float32)
        """Premultiplied red, green, blue and alpha in 0..1."""
        self.labels = np.zeros(self.shape, np.uint8)
        self.sun = sun

    def paint(
        self,
        shapes: Sequence[Array],
        colour: Array,
        *,
        label: int = 0,
        relief: float = 0.0,
        strength: float = 0.3,
        contact: float = 0.0,
        opacity: float = 1.0,
        pattern: Pattern | None = None,
        erase: Sequence[Array] = (),
    ) -> None:
        """Fill the union of polygons (picture pixels).

        Args:
            relief: thickness in pixels of the rounded rim that light and shade model; 0 is flat.
            strength: how strongly.
            contact: how much the shape darkens what lies under and right beside it.
            erase: polygons cut out of the union.
        """
        points = self._own(np.concatenate(shapes))
        margin = 2 + (relief * self.fineness if contact else 0)
        x0, y0 = np.maximum(np.floor(points.min(0) - margin).astype(int), 0)
        x1, y1 = np.minimum(np.ceil(points.max(0) + margin).astype(int), self.shape[::-1])
        if x0 >= x1 or y0 >= y1:
            return
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        for polygon in np.split(_fixed(points - [x0, y0]), np.cumsum([len(shape) for shape in shapes])[:-1]):
            cv2.fillPoly(mask, [polygon], 255, cv2.LINE_AA, 4)
        for polygon in erase:
            cv2.fillPoly(mask, [_fixed(self._own(polygon) - [x0, y0])], 0, cv2.LINE_AA, 4)
        alpha = mask.astype(np.float32)
        alpha *= np.float32(opacity / 255)
        region = self.planes[:, y0:y1, x0:x1]
        shade: Array | None = None
        if relief > 0:
            size = 2 * max(1, round(relief * self.fineness)) + 1
            reach = size // 2
            offset = np.round(self.sun * reach * 0.9).astype(int)
            shade = _box_blur(mask, size, reach + offset) - _box_blur(mask, size, reach - offset)
            shade *= np.float32(strength / 255)
            shade += 1
            if contact:
                region[:3] *= 1 - _box_blur(mask, size, np.array([reach, reach])) * np.float32(contact / 255)
        region *= 1 - alpha
        lighted = alpha if shade is None else alpha * shade
        if pattern is None:
            for channel in range(3):
                region[channel] += lighted * colour[channel]
        else:
            x = (np.arange(x0, x1, dtype=np.float32)[None, :] + 0.5) / self.fineness + self.left
            y = (np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5) / self.fineness + self.top
            weight, second = pattern(x, y)
            for channel in range(3):
                region[channel] += lighted * (colour[channel] + (second[channel] - colour[channel]) * weight)
        region[3] += alpha
        if label:
            self.labels[y0:y1, x0:x1][mask >= 128] = label

    def _own(self, points: Array) -> Array:
        """From pixels of the picture to pixels of the sheet."""
        return (points - [self.left, self.top]) * self.fineness - 0.5

    def finish(self, tint: Array) -> tuple[Array, Array]:
        """(h, w, 4) uint8 RGBA with straight alpha, and (h, w) uint8 labels, at the picture's resolution."""
        height, width = self.shape[0] // self.fineness, self.shape[1] // self.fineness
        small = [cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA) for plane in self.planes]
        scale = 255 / np.maximum(small[3], np.float32(1e-4))
        rgba = cv2.merge([*(small[c] * (scale * tint[c]) for c in range(3)), small[3] * np.float32(255)])
        rgba = cv2.convertScaleAbs(rgba)
        rgba[rgba[..., 3] == 0] = 0
        count = np.zeros((height, width), np.uint8)
        label = np.zeros((height, width), np.uint8)
        for i, j in np.ndindex(self.fineness, self.fineness):
            corner = self.labels[i :: self.fineness, j :: self.fineness]
            count += corner > 0
            np.maximum(label, corner, out=label)
        label[(count * 2 < self.fineness**2) | (rgba[..., 3] == 0)] = 0
        return rgba, label

    def opaque(self, tint: Array) -> Array:
        """(h, w, 3) uint8 RGB of a sheet that is painted all over."""
        return self.finish(tint)[0][..., :3].copy()


def _box_blur(mask: Array, size: int, anchor: Array) -> Array:
    blurred = cv2.blur(mask, (size, size), anchor=(int(anchor[0]), int(anchor[1])), borderType=cv2.BORDER_CONSTANT)
    return blurred.astype(np.float32)


def _fixed(polygon: Array) -> Array:
    return np.round(np.clip(polygon, -3e4, 3e4) * 16).astype(np.int32)


def stripes(colour: Array, period: float, angle: float, share: float = 0.5) -> Pattern:
    def pattern(x: Array, y: Array) -> tuple[Array, Array]:
        wave = np.abs((x * np.cos(angle) + y * np.sin(angle)) / period % 1 - 0.5) * 2
        return np.clip((wave - (1 - share)) * period * 1.5 + 0.5, 0, 1), colour

    return pattern


def checks(colour: Array, period: float) -> Pattern:
    across, down = stripes(colour, period, 0.05), stripes(colour, period, np.pi / 2 + 0.05)

    def pattern(x: Array, y: Array) -> tuple[Array, Array]:
        return (across(x, np.float32(0) * y)[0] + down(x, y)[0]) * np.float32(0.5), colour

    return pattern


def dots(colour: Array, period: float) -> Pattern:
    def pattern(x: Array, y: Array) -> tuple[Array, Array]:
        v = y / period
        u = x / period + 0.5 * (np.floor(v) % 2)
        distance = np.hypot(u % 1 - 0.5, v % 1 - 0.5)
        return np.clip((0.27 - distance) * period * 1.5 + 0.5, 0, 1), colour

    return pattern


def mottle(colour: Array, rng: np.random.Generator, cell: float, amount: float) -> Pattern:
    """Patches of a second colour, as on bark, plaster and leaves."""
    bank = _noise_shares()
    shift = rng.integers(512, size=2)

    def pattern(x: Array, y: Array) -> tuple[Array, Array]:
        columns = ((x[0] * (64 / cell)).astype(int) + shift[0]) % 512
        rows = ((y[:, 0] * (64 / cell)).astype(int) + shift[1]) % 512
        return bank.take(rows, 0).take(columns, 1) * np.float32(amount), colour

    return pattern
