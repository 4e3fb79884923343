"""Streets, parks and rooms: a camera, a ground in perspective, houses, and things that stand about."""

# ruff: noqa: RUF005 (arrays are added here, not lists)
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from dataset_tools.drawn_world.sheet import (
    CLOTH,
    WHITE,
    Array,
    Pattern,
    Sheet,
    dots,
    draw_lot,
    ellipse,
    hexes,
    mix,
    mottle,
    noise,
    pick,
    rectangle,
    rgb,
    smooth,
    stripes,
    tube,
    xy,
)

Kind = Literal["street", "park", "room"]
KINDS: tuple[Kind, ...] = ("street", "park", "room")


@dataclass(frozen=True)
class Camera:
    """A pinhole at height ``eye`` metres that looks along the ground; z is the distance in metres."""

    width: int
    height: int
    horizon: float
    centre: float
    focal: float
    eye: float

    def scale(self, z: float) -> float:
        """Pixels a metre at distance ``z``."""
        return self.focal / z

    def ground(self, z: float) -> float:
        """Picture row of the ground at distance ``z``."""
        return self.horizon + self.eye * self.focal / z

    def distance(self, y: float) -> float:
        """Distance of the ground seen at row ``y`` below the horizon."""
        return self.eye * self.focal / (y - self.horizon)

    def project(self, points: Array) -> Array:
        """(n, 3) x (right), y (up), z in metres to (n, 2) pixels."""
        z = np.maximum(points[:, 2], 0.3)
        x = self.centre + points[:, 0] * self.focal / z
        return np.stack([x, self.horizon + (self.eye - points[:, 1]) * self.focal / z], 1)

    def at(self, x: float, y: float, z: float) -> Array:
        """(2,) pixels of one place in metres."""
        return self.project(xy((x, y, z)))[0]


@dataclass(eq=False)
class Prop:
    """A thing that stands in the scene."""

    name: str
    z: float
    left: int
    top: int
    rgba: Array
    """(h, w, 4) uint8."""

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns of the picture that ``rgba`` covers."""
        height, width = self.rgba.shape[:2]
        return np.s_[self.top : self.top + height, self.left : self.left + width]


@dataclass(eq=False)
class Stage:
    kind: Kind
    camera: Camera
    sun: Array
    tint: Array
    shade: float
    """Strength of cast shadows, 0..1."""
    gloss: Array = field(default_factory=lambda: np.zeros(0))
    """(H, W) float32 in 0..1: ground that mirrors when it is wet or polished."""
    base: Array = field(default_factory=lambda: np.zeros(0))
    """(H, W, 3) uint8: sky, walls, ground."""
    props: list[Prop] = field(default_factory=list)
    seats: list[tuple[float, float]] = field(default_factory=list)
    """x (metres) and z of places to sit."""
    objects: list[tuple[str, Array]] = field(default_factory=list)
    """Class and outline (picture pixels) of named things painted on the base."""
    leaves: list[Array] = field(default_factory=lambda: hexes("4f8a45", "3f7a4a", "6a9c48", "2f6a4a"))
    nearest: float = 2.5
    farthest: float = 9.0

    def sheet(self, left: float, top: float, right: float, bottom: float, fineness: int = 1) -> Sheet:
        return Sheet((left, top, right, bottom), (self.camera.width, self.camera.height), self.sun, fineness)


_MOODS: dict[str, tuple[list[Array], Array, float]] = {
    # sky from the zenith to the horizon, clouds; tint of the light; strength of shadows
    "noon": (hexes("4f95d8", "cfe6f5", "ffffff"), np.array([1.0, 1.0, 0.99], np.float32), 0.42),
    "morning": (hexes("7fb0dc", "fbe3c4", "fff3df"), np.array([1.03, 0.99, 0.93], np.float32), 0.36),
    "evening": (hexes("5a6fb0", "f7b583", "f7cfae"), np.array([1.05, 0.94, 0.85], np.float32), 0.40),
    "grey": (hexes("a9b4bf", "dfe3e6", "eef0f1"), np.array([0.95, 0.97, 1.0], np.float32), 0.20),
    "dusk": (hexes("3c4a86", "d69ab0", "b28bb0"), np.array([0.90, 0.88, 1.0], np.float32), 0.22),
}
_HOW_OFTEN = {"noon": 0.34, "morning": 0.22, "evening": 0.16, "grey": 0.18, "dusk": 0.10}
_LINES, _KERB = rgb("e8e6e0"), rgb("d2cdc4")
_PAPERS = hexes(
    "e8dfd0", "cfdcd8", "d8c9c0", "b9c9d6", "e3d2a8", "c7b8c9", "a9bba0", "d9a98c", "8fa3ad", "efe9e2",
)  # fmt: skip
_WALLS = hexes(
    "d9b38c", "c98f6b", "e6d3b1", "b5695a", "cfc6ba", "9fb0b8", "e3c878", "a98a77", "c7a3a0", "8c6a5a", "dfe0da",
)  # fmt: skip


def set_stage(rng: np.random.Generator, kind: Kind, size: tuple[int, int]) -> Stage:
    width, height = size
    camera = Camera(
        width=width,
        height=height,
        horizon=height * rng.uniform(0.36, 0.47),
        centre=width * rng.uniform(0.36, 0.64),
        focal=max(width, height) * rng.uniform(0.85, 1.1),
        eye=rng.uniform(1.3, 1.7),
    )
    side = 1.0 if rng.random() < 0.5 else -1.0
    sun = np.array([side * rng.uniform(0.6, 0.85), -0.6])
    mood = draw_lot(rng, _HOW_OFTEN) if kind != "room" else "morning"
    sky, tint, shade = _MOODS[mood]
    if kind == "room":
        shade = 0.26
        tint = np.array([1.0, 0.985, 0.95] if rng.random() < 0.6 else [0.97, 0.99, 1.0], np.float32)
    stage = Stage(kind, camera, sun / np.hypot(*sun), tint, shade)
    sheet = stage.sheet(0, 0, width, height)
    sheet.planes[3] = 1
    {"street": _street, "park": _park, "room": _room}[kind](stage, sheet, rng, sky)
    stage.props.sort(key=lambda prop: -prop.z)
    return stage


def _paint_sky(sheet: Sheet, camera: Camera, rng: np.random.Generator, sky: list[Array]) -> None:
    rows = max(2, int(camera.horizon) + 3)
    share = np.linspace(0, 1, rows, dtype=np.float32)[:, None] ** 1.3
    cell = (camera.width * rng.uniform(0.35, 0.8), camera.horizon * rng.uniform(0.3, 0.5))
    wide = noise(rng, rows, camera.width, cell)
    cloud = np.clip((wide - rng.uniform(-0.2, 0.9)) * 0.8, 0, 0.85) * (1 - 0.5 * share)
    for channel in range(3):
        plane = sky[0][channel] + (sky[1][channel] - sky[0][channel]) * share
        plane = plane + (sky[2][channel] - plane) * cloud
        sheet.planes[channel, :rows] = plane[: sheet.shape[0]]


class _Ground:
    """Colours and world coordinates of every ground pixel, and textures on them that fade before they alias."""

    def __init__(self, camera: Camera, from_row: float, colour: Array) -> None:
        self.first = int(np.clip(np.floor(from_row), 0, camera.height - 1))
        rows = np.maximum(np.arange(self.first, camera.height, dtype=np.float32) + 0.5 - camera.horizon, 0.6)[:, None]
        self.scale = rows / np.float32(camera.eye)
        self.z = np.float32(camera.eye * camera.focal) / rows
        self.x = (np.arange(camera.width, dtype=np.float32)[None, :] + 0.5 - np.float32(camera.centre)) / self.scale
        self.z_scale = rows * rows / np.float32(camera.eye * camera.focal)
        """Pixels a metre of distance."""
        self.shape = len(rows), camera.width
        self.colours = np.empty((3, *self.shape), np.float32)
        self.gloss = np.ones(self.shape, np.float32)
        """1 where the ground mirrors when it is wet or polished."""
        self.fill(colour)

    def fill(self, colour: Array) -> None:
        self.colours[:] = colour[:, None, None]

    def blend(self, colour: Array, weight: Array) -> None:
        for channel in range(3):
            self.colours[channel] += (colour[channel] - self.colours[channel]) * weight

    def stain(self, rng: np.random.Generator, amount: float, cell: tuple[float, float]) -> None:
        """Lighten and darken by noise; see `noise` for ``cell``."""
        rows, columns = self.shape
        self.colours *= 1 + amount * noise(rng, rows, columns, cell)

    def wear(self, rng: np.random.Generator, amount: float) -> None:
        """Large soft stains, and darker ground towards the viewer's corners."""
        rows, columns = self.shape
        self.stain(rng, amount, (columns * 0.5, rows * 0.4))
        self.colours *= np.linspace(1.04, 0.95, rows, dtype=np.float32)[:, None]

    def lay(self, sheet: Sheet, stage: Stage) -> None:
        sheet.planes[:3, self.first :] = self.colours
        stage.gloss = np.zeros((stage.camera.height, stage.camera.width), np.float32)
        stage.gloss[self.first :] = self.gloss

    def lines(self, coordinate: Array, scale: Array, period: float, width: float) -> Array:
        """1 on lines of ``width`` metres that repeat every ``period`` metres of ``coordinate``."""
        distance = (0.5 - np.abs(coordinate / period % 1 - 0.5)) * period * scale
        inked = np.clip(width * scale / 2 - distance + 0.5, 0, 1) * np.minimum(1, width * scale * 1.4)
        return inked * np.clip(period * scale / 3 - 0.4, 0, 1)

    def cells(self, i: Array, j: Array) -> Array:
        """A value in -1..1 that is constant within each cell of floor(i), floor(j)."""
        return 2 * ((np.sin(np.floor(i) * 12.9898 + np.floor(j) * 78.233) * 437.5453) % 1).astype(np.float32) - 1

    def band(self, low: float, high: float) -> Array:
        """1 between the distances ``low`` and ``high``."""
        return np.clip((self.z - low) * self.z_scale + 0.5, 0, 1) * np.clip((high - self.z) * self.z_scale + 0.5, 0, 1)

    def within(self, reach: float, across: Array) -> Array:
        """1 where ``across``, in metres to the side, is less than ``reach``."""
        return np.clip((reach - across) * self.scale + 0.5, 0, 1)

    def fade(self, period: float) -> Array:
        """1 where ``period`` metres of distance span many pixels, 0 where they would alias."""
        return np.clip(period * self.z_scale / 3 - 0.3, 0, 1)


def _pavement(rng: np.random.Generator, camera: Camera) -> _Ground:
    stone = pick(rng, hexes("b9b3aa", "a6a29c", "c4b6a2", "b7a493", "9fa3a8"))
    ground = _Ground(camera, camera.horizon, stone)
    style = rng.integers(4)
    size = rng.uniform(0.5, 0.95)
    shift = ground.x + rng.uniform(0, 3)
    if style == 0:  # slabs in courses
        shift = shift + 0.5 * size * (np.floor(ground.z / size) % 2)
    if style == 1:  # diagonal slabs
        u, v = shift + ground.z, shift - ground.z
        tone = ground.cells(u / size, v / size) * ground.fade(size)
        joints = np.maximum(ground.lines(u, ground.z_scale, size, 0.025), ground.lines(v, ground.z_scale, size, 0.025))
    elif style == 2:  # chequered
        tone = np.where((np.floor(shift / size) + np.floor(ground.z / size)) % 2 == 0, 1.6, -1.6) * ground.fade(size)
        joints = np.zeros_like(tone)
    else:
        deep = size * (1.0 if style == 0 else rng.uniform(0.5, 1.6))
        tone = ground.cells(shift / size, ground.z / deep) * ground.fade(deep)
        across = ground.lines(ground.z + 0 * shift, ground.z_scale, deep, 0.04)
        joints = np.maximum(ground.lines(shift, ground.scale, size, 0.03), across)
    ground.colours *= 1 + 0.045 * tone.astype(np.float32)
    ground.blend(stone * 0.68, joints * 0.8)
    return ground


def _facade(
    stage: Stage,
    sheet: Sheet,
    rng: np.random.Generator,
    start: tuple[float, float],
    end: tuple[float, float],
    height: float,
    light: float,
) -> None:
    """A house front from ``start`` to ``end`` (x, z in metres), ``height`` metres tall."""
    camera = stage.camera
    along = np.subtract(end, start)
    length = float(np.hypot(*along))
    wall = pick(rng, _WALLS) * light

    def quad(s0: float, t0: float, s1: float, t1: float) -> Array:
        places = start + along * (xy((s0,), (s1,), (s1,), (s0,)) / length)
        return camera.project(np.stack([places[:, 0], [t1, t1, t0, t0], places[:, 1]], 1))

    outline = quad(0, 0, length, height)
    sheet.paint([outline], wall, pattern=mottle(wall * 0.9, rng, camera.width * 0.2, 0.35))
    stage.objects.append(("Building", outline))
    if rng.random() < 0.35:  # bricks, as faint courses
        courses = [quad(0, t, length, t + 0.06) for t in np.arange(0.5, height, 0.42)]
        sheet.paint(courses, wall * 0.86, opacity=0.5)
    trim = mix(wall, WHITE, 0.55)
    dark = wall * 0.45
    glass = pick(rng, hexes("5b7487", "46586a", "7f99ab", "3d4650")) * (0.5 + 0.5 * light)
    storey = rng.uniform(2.9, 3.4)
    pitch = rng.uniform(1.9, 2.7)
    wide, tall = pitch * rng.uniform(0.4, 0.55), storey * rng.uniform(0.48, 0.6)
    count = max(1, int(length / pitch))
    margin = (length - count * pitch) / 2
    with_shutters = rng.random() < 0.3
    windows = [
        (margin + (column + 0.5) * pitch, floor * storey + storey * 0.22)
        for floor in range(1, int(height / storey))
        for column in range(count)
    ]
    if windows:
        panes: list[Array] = []
        lit: list[Array] = []
        for s, t in windows:
            (lit if rng.random() < 0.12 else panes).append(quad(s - wide / 2, t, s + wide / 2, t + tall))
        frames = [quad(s - wide / 2 - 0.09, t - 0.09, s + wide / 2 + 0.09, t + tall + 0.09) for s, t in windows]
        sheet.paint(frames, trim)
        if panes:
            sheet.paint(panes, glass, pattern=mottle(mix(glass, WHITE, 0.5), rng, camera.width * 0.15, 0.5))
        if lit:
            sheet.paint(lit, rgb("f6d98a"))
        bars = []
        for s, t in windows:
            bars.append(quad(s - 0.03, t, s + 0.03, t + tall))
            bars.append(quad(s - wide / 2, t + tall * 0.6, s + wide / 2, t + tall * 0.6 + 0.06))
        sheet.paint(bars, trim)
        sills = [quad(s - wide / 2 - 0.2, t - 0.2, s + wide / 2 + 0.2, t - 0.06) for s, t in windows]
        sheet.paint(sills, dark, opacity=0.55)
        if with_shutters:
            hinges = [(s + d, t) for s, t in windows for d in (-wide / 2 - 0.26, wide / 2 + 0.26)]
            shutters = [quad(s - 0.18, t, s + 0.18, t + tall) for s, t in hinges]
            sheet.paint(shutters, pick(rng, hexes("4f6b52", "5a4a78", "3f6580", "7a3f38")))
    shop = rng.random() < 0.75
    ground_floor = pick(rng, hexes("3b4650", "6a4432", "2f5a4c", "7a3038", "59606a", "c9c0b0")) * light
    if shop:
        sheet.paint([quad(0, 0, length, storey)], ground_floor)
        width = length / max(1, round(length / 3.4))
        shown = [quad(s + 0.25, 0.5, s + width - 0.25, storey - 0.75) for s in np.arange(0, length - width / 2, width)]
        sheet.paint(shown, mix(glass, rgb("ffe6b0"), 0.35), pattern=mottle(dark, rng, camera.width * 0.1, 0.5))
        sheet.paint([quad(0.2, storey - 0.6, length - 0.2, storey - 0.15)], pick(rng, CLOTH))
        if rng.random() < 0.6:
            awning = pick(rng, CLOTH)
            flap = quad(0.2, storey - 1.15, length - 0.2, storey - 0.55)
            step = max(3.0, float(np.ptp(flap[:, 0])) / 12)
            sheet.paint([flap], awning, pattern=stripes(rgb("f3efe6"), step, 0.0), relief=2, strength=0.2)
    else:
        door = length * rng.uniform(0.15, 0.75)
        sheet.paint([quad(door, 0, door + 1.1, 2.3)], pick(rng, hexes("6a3f2a", "2f5a4c", "7a3038", "25325e")))
        low = [quad(margin + c * pitch + 0.5, 0.9, margin + c * pitch + 0.5 + wide, 0.9 + tall) for c in range(count)]
        sheet.paint(low, glass)
    sheet.paint([quad(0, height - 0.35, length, height), quad(0, storey - 0.1, length, storey + 0.08)], trim)
    sheet.paint([quad(0, 0, length, 0.3)], dark, opacity=0.6)


def _spans(rng: np.random.Generator, x: float, end: float, low: float, high: float) -> Iterator[tuple[float, float]]:
    """Pieces of random length, from ``x`` to at least ``end``; each is drawn when it is asked for."""
    while x < end:
        length = rng.uniform(low, high)
        yield x, x + length
        x += length


def _street(stage: Stage, sheet: Sheet, rng: np.random.Generator, sky: list[Array]) -> None:
    _paint_sky(sheet, stage.camera, rng, sky)
    ground = _pavement(rng, stage.camera)
    asphalt = pick(rng, hexes("6b6c6f", "5c5e63", "77736e"))
    (_along if rng.random() < 0.55 else _away)(stage, sheet, rng, ground, asphalt)
    stage.base = sheet.opaque(stage.tint)
    names = ["Street light", "Tree", "Bench", "Flowerpot", "Waste container", "Street light", "Bollard"]
    for _ in range(int(rng.integers(1, 4))):
        _place(stage, rng, str(rng.choice(names)), rng.uniform(3.2, stage.farthest))
    if rng.random() < 0.3:
        _place(stage, rng, "Dog", rng.uniform(3.0, 5.5))


def _along(stage: Stage, sheet: Sheet, rng: np.random.Generator, ground: _Ground, asphalt: Array) -> None:
    """A row of houses behind a road."""
    camera = stage.camera
    wall_z = rng.uniform(11, 15)
    near, far = rng.uniform(6.0, 7.2), wall_z - 2.0
    middle = (near + far) / 2
    road = ground.band(near, far)
    ground.blend(asphalt, road)
    dashes = ground.band(middle - 0.08, middle + 0.08) * ((ground.x / 3 % 1) < 0.5)
    ground.blend(_LINES, dashes * 0.8)
    ground.blend(_KERB, np.maximum(ground.band(near - 0.18, near), ground.band(far, far + 0.15)))
    if rng.random() < 0.4:  # a crossing
        left = rng.uniform(-4, 1)
        from_left = np.clip((ground.x - left) * ground.scale, 0, 1)
        inside = from_left * np.clip((left + 3 - ground.x) * ground.scale, 0, 1)
        ground.blend(_LINES, inside * road * ((ground.x - left) / 0.75 % 1 < 0.55) * 0.85)
    ground.wear(rng, 0.025)
    ground.lay(sheet, stage)
    reach = camera.width / camera.scale(wall_z)
    start = -camera.centre / camera.scale(wall_z) - rng.uniform(0, 5)
    for x0, x1 in _spans(rng, start, reach, 5, 9):
        _facade(stage, sheet, rng, (x0, wall_z), (x1, wall_z), rng.uniform(5.5, 13), rng.uniform(0.9, 1.0))
    stage.farthest = near - 0.3
    if rng.random() < 0.6:
        _place(stage, rng, "Car", middle + 0.8, rng.uniform(-3, 3))


def _away(stage: Stage, sheet: Sheet, rng: np.random.Generator, ground: _Ground, asphalt: Array) -> None:
    """A street between houses that runs away from the viewer."""
    half = rng.uniform(3.6, 5.2)
    lane = half - rng.uniform(1.2, 1.9)
    aside = np.abs(ground.x)
    if rng.random() < 0.65:
        road = ground.within(lane, aside)
        ground.blend(asphalt, road)
        ground.blend(_KERB, ground.within(0.1, np.abs(aside - lane)))
        dashes = ground.within(0.07, aside) * ((ground.z / 3 % 1) < 0.5)
        ground.blend(_LINES, dashes * np.minimum(1, 0.14 * ground.scale) * 0.8)
        if rng.random() < 0.4:  # a crossing
            start = rng.uniform(4, 8)
            ground.blend(_LINES, ground.band(start, start + 2.6) * road * (ground.x / 0.9 % 1 < 0.55) * 0.85)
    ground.wear(rng, 0.025)
    ground.lay(sheet, stage)
    end = rng.uniform(26, 45)
    for x0, x1 in _spans(rng, -half - 6.0, half + 6, 4, 7):
        _facade(stage, sheet, rng, (x0, end), (x1, end), rng.uniform(7, 13), 0.92)
    for side in (-1.0, 1.0):
        light = 1.0 if side * stage.sun[0] < 0 else 0.72
        z, fronts = end, []
        while z > 1.2:
            length = rng.uniform(5, 8)
            fronts.append((max(z - length, 0.5), z))
            z -= length
        for low, high in fronts:
            _facade(stage, sheet, rng, (side * half, high), (side * half, low), rng.uniform(6, 12), light)
    stage.farthest = 8.5


def _park(stage: Stage, sheet: Sheet, rng: np.random.Generator, sky: list[Array]) -> None:
    camera = stage.camera
    _paint_sky(sheet, camera, rng, sky)
    if rng.random() < 0.22:
        stage.leaves = hexes("c9772e", "d99a37", "a8552c")
    grass = pick(rng, hexes("7fa650", "6c9a48", "93ad55", "5f8f4f"))
    # Hills, then a line of trees, paler the farther away.
    steps = np.linspace(0, camera.width, 40)
    for index, haze in enumerate((0.62, 0.4)):
        rise = np.cumsum(rng.normal(0, camera.height * 0.008, 40))
        crest = camera.horizon - camera.height * (0.13 - 0.06 * index) - rise
        feet = xy((camera.width, camera.horizon + 3), (0, camera.horizon + 3))
        outline = np.concatenate([np.stack([steps, crest], 1), feet])
        sheet.paint([smooth(outline)], mix(pick(rng, stage.leaves), sky[1], haze))
    crowns = []
    for x in np.arange(-10, camera.width + 10, camera.width / rng.uniform(22, 34)):
        radius = camera.height * rng.uniform(0.025, 0.065)
        crowns.append(ellipse(np.array([x, camera.horizon - radius * 0.6]), radius * 1.1, radius))
    green = mix(pick(rng, stage.leaves), sky[1], 0.22)
    patches = mottle(green * 0.8, rng, 30, 0.6)
    sheet.paint(crowns, green, relief=camera.height * 0.02, strength=0.35, pattern=patches)
    ground = _Ground(camera, camera.horizon, grass)
    rows, columns = ground.shape
    near = np.linspace(0.3, 1, rows, dtype=np.float32)[:, None]
    ground.colours *= 1 + 0.05 * noise(rng, rows, columns, (60, 9)) * near
    if rng.random() < 0.35:  # mown in stripes
        wave = np.sign(np.sin((ground.x + ground.z * rng.uniform(-0.3, 0.3)) * 2.2))
        ground.colours *= 1 + 0.025 * (wave * np.clip(ground.scale / 12, 0, 1))
    if rng.random() < 0.3:  # a pond
        z, x = rng.uniform(9, 14), rng.uniform(-4, 4)
        wet = np.clip((1 - ((ground.x - x) / 5) ** 2 - ((ground.z - z) / 2.4) ** 2) * 6, 0, 1)
        ground.blend(mix(sky[0], sky[1], 0.5), wet)
    if rng.random() < 0.75:  # a path
        sand = pick(rng, hexes("d8c49a", "c9b08a", "bfb6a6", "d1b9a0"))
        bend, offset, width = rng.uniform(-1.2, 1.2), rng.uniform(-2, 2), rng.uniform(0.9, 1.9)
        course = offset + bend * np.sin(np.minimum(ground.z, 12) * rng.uniform(0.15, 0.3) + rng.uniform(0, 6))
        for reach, colour in ((width, sand * 0.85), (width - 0.12, sand)):
            inside = np.clip((reach - np.abs(ground.x - course)) * ground.scale / 2 + 0.5, 0, 1)
            ground.blend(colour, inside)
    ground.wear(rng, 0.03)
    ground.lay(sheet, stage)
    tufts, petals = [], []
    for _ in range(int(rng.integers(10, 40))):
        z = rng.uniform(2.4, 9)
        foot = camera.at(rng.uniform(-0.5, 0.5) * camera.width / camera.scale(z), 0, z)
        size = camera.scale(z) * 0.07
        for d in (-size * 0.5, 0, size * 0.5):
            tufts.append(foot + xy((d, 0), (d + size * 0.3, 0), (d * 2.2, -size * 1.6)))
        if rng.random() < 0.5:
            petals.append(ellipse(foot - (0, size * 1.7), size * 0.45, size * 0.45))
    sheet.paint(tufts, grass * 0.72)
    if petals:
        sheet.paint(petals, pick(rng, hexes("f4f0e6", "f0c94e", "e58fa8", "b35fa6")))
    stage.base = sheet.opaque(stage.tint)
    stage.farthest = 8.0
    for _ in range(int(rng.integers(2, 5))):
        _place(stage, rng, "Tree", rng.uniform(6.5, 16))
    names = ["Bench", "Bush", "Street light", "Bush", "Bench", "Waste container"]
    for _ in range(int(rng.integers(1, 4))):
        _place(stage, rng, str(rng.choice(names)), rng.uniform(3.6, 8))
    if rng.random() < 0.35:
        _place(stage, rng, "Dog", rng.uniform(2.8, 5.5))
    if rng.random() < 0.15:
        _place(stage, rng, "Bush", rng.uniform(2.3, 2.8))


def _room(stage: Stage, sheet: Sheet, rng: np.random.Generator, sky: list[Array]) -> None:
    room = _Room(stage, sheet, rng, sky)
    _floor(rng, stage.camera, room.depth).lay(sheet, stage)
    paper = pick(rng, _PAPERS)
    room.draw_walls(paper)
    room.hang_things(paper)
    room.let_sun_in()
    stage.base = sheet.opaque(stage.tint)
    stage.farthest, stage.nearest = room.depth - 0.5, 2.3
    taken: list[float] = []
    names = rng.permutation(["Couch", "Bookcase", "Houseplant", "Lamp", "Table", "Chair", "Houseplant"])
    for name in names[: int(rng.integers(2, 5))]:
        for _ in range(8):
            x = rng.uniform(-room.half + 0.5, room.half - 0.5)
            if all(abs(x - other) > 0.9 for other in taken):
                taken.append(x)
                _place(stage, rng, str(name), room.depth - rng.uniform(0.35, 0.6), x)
                break
    if rng.random() < 0.4:
        _place(stage, rng, str(rng.choice(["Chair", "Table", "Houseplant"])), rng.uniform(2.6, 3.6))


def _floor(rng: np.random.Generator, camera: Camera, depth: float) -> _Ground:
    style = rng.integers(4)
    wood = pick(rng, hexes("b98a5a", "9a6b42", "c9a273", "7a5236", "d5b68c"))
    ground = _Ground(camera, camera.ground(depth), wood)
    if style <= 1:  # boards, away from the viewer or across
        along, a_scale = ground.z + 0 * ground.x, ground.z_scale
        across, c_scale = ground.x, ground.scale
        if style == 1:
            along, a_scale, across, c_scale = across, c_scale, along, a_scale
        board = rng.uniform(0.13, 0.24)
        row = np.floor(across / board)
        tone = ground.cells(across / board, along / 1.4 + 0.37 * row)
        ground.colours *= 1 + 0.07 * tone * np.clip(board * c_scale / 2.5 - 0.3, 0, 1)
        ground.blend(wood * 0.6, ground.lines(across, c_scale, board, 0.012) * 0.8)
        ground.blend(wood * 0.6, ground.lines(along + 0.518 * row, a_scale, 1.4, 0.012) * 0.5)
    elif style == 2:  # tiles
        tile = rng.uniform(0.35, 0.6)
        ground.fill(pick(rng, hexes("e6e0d4", "d9dcdc", "e9d8c4")))
        dark = pick(rng, hexes("8a9299", "b58a6a", "6a7a70", "bfb6a8"))
        odd = (np.floor(ground.x / tile) + np.floor(ground.z / tile)) % 2
        ground.blend(dark, odd * ground.fade(tile) + 0.5 * (1 - ground.fade(tile)))
    else:  # carpet
        ground.fill(pick(rng, hexes("9c8f80", "7f8c94", "a8968a", "8a7f98", "93a08a")))
        ground.stain(rng, 0.02, (14, 8))
        ground.gloss[:] = 0
    if rng.random() < 0.6:
        _rug(rng, ground)
    ground.wear(rng, 0.015)
    return ground


def _rug(rng: np.random.Generator, ground: _Ground) -> None:
    z, x, long, deep = rng.uniform(3.0, 4.2), rng.uniform(-0.7, 0.7), rng.uniform(1.0, 1.6), rng.uniform(0.6, 0.9)
    main, second = pick(rng, CLOTH), pick(rng, CLOTH)
    round_rug = rng.random() < 0.4
    for shrink, colour in ((1.0, main), (0.86, second), (0.78, main)):
        if round_rug:
            radius = np.sqrt(((ground.x - x) / (long * shrink)) ** 2 + ((ground.z - z) / (deep * shrink)) ** 2)
            edge = (1 - radius) * deep * ground.z_scale
        else:
            edge = np.minimum(
                (long - (1 - shrink) * 0.8 - np.abs(ground.x - x)) * ground.scale,
                (deep - (1 - shrink) * 0.8 - np.abs(ground.z - z)) * ground.z_scale,
            )
        inside = np.clip(edge + 0.5, 0, 1)
        ground.blend(colour, inside * 0.92)
        ground.gloss *= 1 - inside


class _Room:
    """Walls and ceiling of a room in metres, and what hangs on its back wall."""

    def __init__(self, stage: Stage, sheet: Sheet, rng: np.random.Generator, sky: list[Array]) -> None:
        self.stage, self.camera, self.sheet, self.rng, self.sky = stage, stage.camera, sheet, rng, sky
        self.depth = rng.uniform(4.8, 6.6)
        self.unit = self.camera.scale(self.depth)
        """Pixels a metre on the back wall."""
        self.half = max(1.9, self.camera.width / self.unit * rng.uniform(0.38, 0.62))
        self.tall = rng.uniform(2.6, 3.1)

    def back(self, x0: float, y0: float, x1: float, y1: float) -> Array:
        """A rectangle on the back wall."""
        z = self.depth
        return self.camera.project(xy((x0, y1, z), (x1, y1, z), (x1, y0, z), (x0, y0, z)))

    def aside(self, side: float, height: float) -> Array:
        """The lowest ``height`` metres of the wall at the left (-1) or right (1)."""
        x, far, near = side * self.half, self.depth, 0.4
        return self.camera.project(xy((x, height, far), (x, height, near), (x, 0, near), (x, 0, far)))

    def draw_walls(self, paper: Array) -> None:
        sheet, rng, half, depth, tall = self.sheet, self.rng, self.half, self.depth, self.tall
        decor: Pattern | None = None
        style = rng.integers(4)
        if style == 0:
            decor = stripes(paper * 0.93, self.unit * rng.uniform(0.15, 0.35), 0.0)
        elif style == 1:
            decor = dots(mix(paper, WHITE, 0.5), self.unit * rng.uniform(0.14, 0.25))
        elif style == 2:
            decor = mottle(paper * 0.93, rng, self.camera.width * 0.5, 0.5)
        sheet.paint([self.back(-half, 0, half, tall)], paper, pattern=decor)
        lights = (1.03, 0.86) if self.stage.sun[0] > 0 else (0.86, 1.03)
        for side, brightness in zip((-1, 1), lights, strict=True):
            sheet.paint([self.aside(side, tall)], np.clip(paper * brightness, 0, 1))
        ceiling = xy((-half, tall, depth), (half, tall, depth), (half, tall, 0.4), (-half, tall, 0.4))
        sheet.paint([self.camera.project(ceiling)], mix(paper, WHITE, 0.75))
        boards = [self.back(-half, 0, half, 0.13), self.aside(-1, 0.13), self.aside(1, 0.13)]
        sheet.paint(boards, mix(paper, WHITE, 0.7))
        if rng.random() < 0.3:
            panel = mix(paper, pick(rng, hexes("f2eee6", "6a7a70", "8a6a50")), 0.8)
            sheet.paint([self.back(-half, 0.13, half, 1.0)], panel)
            slits = [self.back(x, 0.2, x + 0.03, 0.95) for x in np.arange(-half, half, 0.45)]
            sheet.paint([*slits, self.back(-half, 0.97, half, 1.03)], panel * 0.82)
        # Corners are darker than the middle of a wall.
        for grow, opacity in ((0.25, 0.07), (0.1, 0.08)):
            corners = [self.back(s * half, 0, s * (half - grow), tall) for s in (-1, 1)]
            sheet.paint(corners, paper * 0.3, opacity=opacity)

    def hang_things(self, paper: Array) -> None:
        rng = self.rng
        x = -self.half + rng.uniform(0.2, 0.6)
        while x < self.half - 0.7:
            thing = str(rng.choice(["window", "picture", "picture", "door", "nothing", "picture"]))
            if thing == "window" and x + 1.3 < self.half:
                x += self.window(x)
            elif thing == "door":
                x += self.door(x)
            elif thing == "picture":
                x += self.picture(x, paper)
            else:
                x += rng.uniform(0.4, 1.0)

    def let_sun_in(self) -> None:
        """Sometimes, sunlight on the floor from a window beside the viewer."""
        rng = self.rng
        if rng.random() < 0.5:
            side = float(np.sign(self.stage.sun[0]))
            z, left = rng.uniform(2.8, 4.0), -side * rng.uniform(-0.4, 0.6)
            slant = side * 0.5
            for x in (left, left + 0.62):
                patch = xy((x, 0, z), (x + 0.5, 0, z), (x + 0.5 - slant, 0, z - 0.8), (x - slant, 0, z - 0.8))
                self.sheet.paint([self.camera.project(patch)], rgb("fff2d0"), opacity=0.28)

    def window(self, x: float) -> float:
        """Draw a window from ``x`` on, and return how much of the wall it takes."""
        sheet, sky, rng = self.sheet, self.sky, self.rng
        wide = rng.uniform(0.9, 1.3)
        outline = self.back(x, 0.95, x + wide, 2.25)
        sheet.paint([self.back(x - 0.07, 0.88, x + wide + 0.07, 2.32)], WHITE * 0.97, relief=2)
        sheet.paint([outline], sky[1], pattern=mottle(sky[0], rng, self.camera.width * 0.4, 0.7))
        places = [self.camera.at(x + wide * u, 1.1, self.depth) for u in (0.15, 0.4, 0.65, 0.88)]
        trees = [ellipse(place, self.unit * 0.2, self.unit * 0.16) for place in places]
        sheet.paint([np.clip(tree, outline.min(0), outline.max(0)) for tree in trees], rgb("7fa06a"))
        upright = self.back(x + wide / 2 - 0.025, 0.95, x + wide / 2 + 0.025, 2.25)
        sheet.paint([upright, self.back(x, 1.58, x + wide, 1.63)], WHITE * 0.95)
        cloth = pick(rng, CLOTH)
        drapes = [self.back(x - 0.28, 0.3, x + 0.1, 2.42), self.back(x + wide - 0.1, 0.3, x + wide + 0.28, 2.42)]
        sheet.paint(drapes, cloth, pattern=stripes(cloth * 0.82, self.unit * 0.09, 0.0))
        sheet.paint([self.back(x - 0.35, 2.41, x + wide + 0.35, 2.45)], rgb("6a4a34"))
        self.stage.objects.append(("Window", outline))
        return wide + 0.6

    def door(self, x: float) -> float:
        sheet = self.sheet
        outline = self.back(x, 0, x + 0.85, 2.05)
        colour = pick(self.rng, hexes("f2eee6", "9a6b42", "d9d2c4", "6a7a70"))
        sheet.paint([self.back(x - 0.08, 0, x + 0.93, 2.13)], mix(colour, WHITE, 0.4))
        sheet.paint([outline], colour)
        panels = [self.back(x + 0.14, y0, x + 0.71, y1) for y0, y1 in ((0.2, 0.85), (1.05, 1.85))]
        sheet.paint(panels, colour * 0.88, relief=1.5, strength=-0.3)
        sheet.paint([ellipse(self.camera.at(x + 0.75, 0.98, self.depth), 1.6, 1.6)], rgb("c9a24a"))
        self.stage.objects.append(("Door", outline))
        return 1.2

    def picture(self, x: float, paper: Array) -> float:
        sheet, rng = self.sheet, self.rng
        wide, high = rng.uniform(0.35, 0.8), rng.uniform(0.35, 0.75)
        y = rng.uniform(1.35, 1.55)
        outline = self.back(x, y, x + wide, y + high)
        sheet.paint([outline + [1.2, 1.8]], paper * 0.55, opacity=0.5)
        sheet.paint([outline], pick(rng, hexes("3a2a1f", "f2eee6", "b08a4a", "24272d")), relief=1.5)
        inner = self.back(x + 0.05, y + 0.05, x + wide - 0.05, y + high - 0.05)
        sheet.paint([inner], pick(rng, CLOTH), pattern=mottle(pick(rng, CLOTH), rng, 26, 1.0))
        low, high_corner = inner.min(0), inner.max(0)
        for _ in range(2):
            blob = ellipse(rng.uniform(low, high_corner), float(rng.uniform(2, 6)), float(rng.uniform(2, 6)))
            sheet.paint([np.clip(blob, low, high_corner)], pick(rng, CLOTH))
        self.stage.objects.append(("Picture frame", outline))
        return wide + rng.uniform(0.25, 0.8)


def _place(stage: Stage, rng: np.random.Generator, name: str, z: float, x: float | None = None) -> None:
    """Draw a thing that stands on the ground at (x, z), ``x`` anywhere if not given, and darken the base under it."""
    camera = stage.camera
    scale = camera.scale(z)
    if x is None:
        x = (rng.uniform(0.04, 0.96) * camera.width - camera.centre) / scale
    foot = camera.at(x, 0, z)
    half, tall, colours, draw = _THINGS[name]
    sheet = stage.sheet(foot[0] - half * scale, foot[1] - tall * scale, foot[0] + half * scale, foot[1] + 0.15 * scale)
    draw(_Pen(sheet, foot, scale, rng, stage.leaves), pick(rng, colours or stage.leaves))
    rgba, _ = sheet.finish(stage.tint)
    spread = min(half, 1.4) * (0.35 if name in ("Tree", "Street light", "Lamp") else 0.85)
    _darken(stage.base, foot, spread * scale, spread * scale * 0.22, stage.shade)
    stage.props.append(Prop(name, z, sheet.left, sheet.top, rgba))
    if name in ("Bench", "Couch"):
        stage.seats += [(x - 0.4, z - 0.22), (x + 0.4, z - 0.22)]


def _darken(base: Array, foot: Array, radius_x: float, radius_y: float, strength: float) -> None:
    x0, y0 = np.maximum(np.floor(foot - (radius_x, radius_y)).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(foot + (radius_x, radius_y)).astype(int), base.shape[1::-1])
    if x0 >= x1 or y0 >= y1:
        return
    x = (np.arange(x0, x1, dtype=np.float32)[None] + 0.5 - foot[0]) / radius_x
    y = (np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5 - foot[1]) / radius_y
    weight = np.clip(1 - x * x - y * y, 0, 1) ** 0.7 * np.float32(min(0.7, strength * 1.3))
    region = base[y0:y1, x0:x1]
    region[:] = np.rint(region * (1 - weight[..., None]))


@dataclass(eq=False)
class _Pen:
    """Draws a thing. Lengths are metres: x to the right of the thing's foot, y upwards, radii, relief."""

    sheet: Sheet
    foot: Array
    scale: float
    rng: np.random.Generator
    leaves: Sequence[Array]

    def at(self, *points: Sequence[float] | Array) -> Array:
        return self.foot + xy(*points) * [self.scale, -self.scale]

    def ball(self, x: float, y: float, radius_x: float, radius_y: float | None = None) -> Array:
        return ellipse(self.at((x, y))[0], radius_x * self.scale, (radius_y or radius_x) * self.scale)

    def bar(self, x0: float, y0: float, x1: float, y1: float) -> Array:
        return self.at(*rectangle(x0, y0, x1, y1))

    def taper(self, y0: float, half0: float, y1: float, half1: float) -> Array:
        """An upright shape: half widths at two heights."""
        return self.at((-half0, y0), (half0, y0), (half1, y1), (-half1, y1))

    def tube(self, points: Sequence[Sequence[float]] | Array, radii: Sequence[float] | Array) -> list[Array]:
        return tube(self.at(*points), radii, self.scale)

    def pick(self, *texts: str) -> Array:
        return pick(self.rng, hexes(*texts))

    def side(self) -> int:
        """1 or -1: which way the thing looks."""
        return 1 if self.rng.random() < 0.5 else -1

    def paint(self, shapes: Sequence[Array], colour: Array, *, relief: float = 0.0, **options: Any) -> None:
        self.sheet.paint(shapes, colour, relief=relief * self.scale, **options)

    def foliage(self, blobs: list[Array], green: Array, *, relief: float, strength: float, patch: float) -> None:
        pattern = mottle(green * 0.75, self.rng, max(6, patch * self.scale), 0.7)
        self.paint(blobs, green, relief=relief, strength=strength, contact=0.15, pattern=pattern)


def _tree(pen: _Pen, bark: Array) -> None:
    rng = pen.rng
    lean, fork = rng.normal(0, 0.15), rng.uniform(1.5, 2.2)
    top = rng.uniform(3.6, 5.0)
    radius = rng.uniform(0.1, 0.17)
    trunk = [pen.at((-radius * 1.7, 0), (radius * 1.7, 0), (radius + lean, fork), (-radius + lean, fork))]
    for x, y in ((-0.6, -0.8), (0.5, -0.6)):
        trunk += tube(pen.at((lean, fork), (lean + x, top + y)), [radius * pen.scale * 0.8, 2])
    pen.paint(trunk, bark, relief=radius, strength=0.4, pattern=mottle(bark * 0.7, rng, 12, 0.6))
    green = pick(rng, pen.leaves)
    spread = rng.uniform(1.0, 1.5)
    pointed = rng.random() < 0.2
    centres = []
    for _ in range(20):
        height = rng.uniform(-1, 1)
        reach = spread * ((1.05 - height) * 0.55 if pointed else np.sqrt(max(0.05, 1.05 - height * height)))
        centres.append((lean + rng.uniform(-1, 1) * reach, top + height * 1.15 - 0.2, height))
    centres.sort(key=lambda c: c[2])
    for tone, group in ((0.72, centres[:8]), (0.9, centres[5:15]), (1.08, centres[12:])):
        blobs = [pen.ball(x, y, rng.uniform(0.4, 0.62), rng.uniform(0.34, 0.5)) for x, y, _ in group]
        pen.foliage(blobs, np.clip(green * tone, 0, 1), relief=0.3, strength=0.45, patch=0.5)


def _bush(pen: _Pen, green: Array) -> None:
    uniform = pen.rng.uniform
    wide = uniform(0.6, 1.0)
    for tone, low, high in ((0.75, 0.2, 0.45), (1.0, 0.35, 0.75)):
        blobs = [
            pen.ball(uniform(-wide, wide) * 0.8, uniform(low, high), uniform(0.2, 0.34), uniform(0.18, 0.3))
            for _ in range(9)
        ]
        pen.foliage(blobs, np.clip(green * tone, 0, 1), relief=0.16, strength=0.4, patch=0.3)
    if pen.rng.random() < 0.4:
        flowers = [pen.ball(uniform(-wide, wide) * 0.8, uniform(0.3, 0.8), 0.045) for _ in range(10)]
        pen.paint(flowers, pen.pick("f4f0e6", "e58fa8", "c0392b", "f0c94e"))


def _bench(pen: _Pen, wood: Array) -> None:
    iron = rgb("2c2f33")
    pen.paint([pen.bar(x, 0, x + 0.07, 0.92) for x in (-0.76, 0.69)], iron * 0.8)
    for y in (0.56, 0.68, 0.8):
        pen.paint([pen.bar(-0.84, y, 0.84, y + 0.085)], wood * 0.9, relief=0.04)
    for y, grow in ((0.47, 0.0), (0.425, 0.03), (0.375, 0.06)):
        pen.paint([pen.taper(y, 0.84 + grow, y + 0.05, 0.85 + grow)], wood * 1.12)
    pen.paint([pen.bar(-0.9, 0.33, 0.9, 0.38)], wood * 0.75)
    pen.paint([pen.bar(x, -0.06, x + 0.08, 0.34) for x in (-0.82, 0.74)], iron, relief=0.03)


def _street_light(pen: _Pen, iron: Array) -> None:
    glow = rgb("fff3cf")
    pole = pen.tube([(0, 0), (0, 3.6)], [0.06, 0.04])
    pen.paint([*pole, pen.taper(0, 0.12, 0.5, 0.07)], iron, relief=0.05, strength=0.6)
    if pen.rng.random() < 0.5:
        pen.paint([pen.taper(3.6, 0.14, 4.1, 0.22)], glow, relief=0.08)
        pen.paint([pen.at((-0.27, 4.1), (0.27, 4.1), (0.0, 4.38)), pen.bar(-0.17, 3.55, 0.17, 3.62)], iron)
    else:
        pen.paint([pen.ball(x, 3.85, 0.17) for x in (-0.3, 0.3)], glow, relief=0.1, strength=0.25)
        pen.paint([pen.bar(-0.32, 3.6, 0.32, 3.68)], iron)


def _car(pen: _Pen, body: Array) -> None:
    flip = pen.side()
    left = xy((-2.1, 0.32), (-2.1, 0.72), (-1.35, 0.86), (-0.75, 1.38))
    right = xy((0.75, 1.42), (1.45, 0.92), (2.05, 0.82), (2.12, 0.32))
    glass = xy((-1.15, 0.9), (-0.68, 1.28), (0.68, 1.32), (1.2, 0.93))
    black = rgb("1c1d20")
    pen.paint([pen.bar(-2.0, 0.14, 2.0, 0.4)], black)
    pen.paint([pen.at(*smooth(np.concatenate([left, right])) * [flip, 1])], body, relief=0.2, strength=0.35)
    pen.paint([pen.at(*smooth(glass) * [flip, 1])], rgb("39474f"))
    pen.paint([pen.bar(-0.05, 0.88, 0.05, 1.33)], body * 0.9)
    pen.paint([pen.ball(x, 0.32, 0.33) for x in (-1.3, 1.3)], black)
    pen.paint([pen.ball(x, 0.32, 0.18) for x in (-1.3, 1.3)], rgb("a9adb2"), relief=0.06)
    pen.paint([pen.ball(-1.98 * flip, 0.62, 0.09)], rgb("f6e3a8"))


def _flowerpot(pen: _Pen, pot: Array) -> None:
    uniform = pen.rng.uniform
    green = pick(pen.rng, pen.leaves)
    pen.paint(
        [pen.ball(uniform(-0.28, 0.28), uniform(0.55, 0.85), 0.16) for _ in range(8)], green, relief=0.1, strength=0.4
    )
    flowers = [pen.ball(uniform(-0.33, 0.33), uniform(0.6, 0.98), 0.06) for _ in range(9)]
    pen.paint(flowers, pen.pick("e58fa8", "f0c94e", "c0392b", "f4f0e6", "b35fa6"))
    rim = pen.bar(-0.39, 0.44, 0.39, 0.54)
    pen.paint([pen.taper(0, 0.26, 0.5, 0.36), rim], pot, relief=0.15, strength=0.4)


def _waste_container(pen: _Pen, metal: Array) -> None:
    ribs = stripes(metal * 0.8, 0.1 * pen.scale, 0.0, 0.3)
    pen.paint([pen.taper(0, 0.24, 0.8, 0.29)], metal, relief=0.14, strength=0.4, pattern=ribs)
    pen.paint([pen.ball(0, 0.82, 0.31, 0.1)], metal * 1.2, relief=0.05)
    pen.paint([pen.ball(0, 0.82, 0.17, 0.045)], metal * 0.3)


def _bollard(pen: _Pen, iron: Array) -> None:
    pen.paint([*pen.tube([(0, 0.02), (0, 0.8)], [0.09, 0.07]), pen.ball(0, 0.86, 0.1)], iron, relief=0.07, strength=0.5)


def _dog(pen: _Pen, coat: Array) -> None:
    flip = pen.side()
    size = pen.rng.uniform(0.75, 1.05)

    def part(*joints: tuple[float, float, float]) -> list[Array]:
        """A limb through (x, y, radius)."""
        places = xy(*joints)
        return pen.tube(places[:, :2] * [flip * size, size], places[:, 2] * size)

    far_legs = part((-0.2, 0.4, 0.07), (-0.26, 0.2, 0.04), (-0.2, 0.03, 0.035))
    far_legs += part((0.26, 0.38, 0.05), (0.3, 0.03, 0.03))
    pen.paint(far_legs, coat * 0.7)
    body = part((-0.26, 0.44, 0.12), (0.0, 0.45, 0.12), (0.26, 0.45, 0.14))
    body += part((-0.28, 0.4, 0.09), (-0.34, 0.2, 0.045), (-0.28, 0.03, 0.035))
    body += part((0.24, 0.4, 0.06), (0.22, 0.03, 0.033))
    body += part((0.28, 0.5, 0.1), (0.42, 0.68, 0.08))
    body += part((-0.34, 0.5, 0.04), (-0.46, 0.62, 0.03), (-0.5, 0.74, 0.015))
    pen.sheet.paint(body, coat, relief=0.08 * pen.scale * size, strength=0.35)
    pen.paint(part((0.42, 0.7, 0.095), (0.58, 0.65, 0.045)), coat * 1.05, relief=0.05)
    pen.paint(part((0.36, 0.76, 0.045), (0.33, 0.62, 0.03)), coat * 0.65)
    nose_and_eye = part((0.62, 0.665, 0.022), (0.625, 0.66, 0.022)) + part((0.47, 0.73, 0.016), (0.475, 0.73, 0.016))
    pen.paint(nose_and_eye, rgb("1d1714"))
    pen.paint(part((0.31, 0.6, 0.025), (0.37, 0.53, 0.025)), pick(pen.rng, CLOTH))


def _couch(pen: _Pen, cloth: Array) -> None:
    pen.paint([pen.bar(x, -0.05, x + 0.07, 0.15) for x in (-0.95, 0.88)], rgb("4a3426"))
    pen.paint([smooth(pen.bar(-1.0, 0.2, 1.0, 0.95))], cloth * 0.85, relief=0.09)
    pen.paint([smooth(pen.bar(x, 0.3, x + 0.95, 0.9)) for x in (-0.95, 0.0)], cloth * 0.95, relief=0.09)
    pen.paint([pen.bar(-1.0, 0.08, 1.0, 0.3)], cloth * 0.75, relief=0.045)
    for x in (-0.92, 0.0):
        pen.paint([smooth(pen.bar(x, 0.27, x + 0.92, 0.5))], cloth * 1.05, relief=0.045, strength=0.35)
    pen.paint([smooth(pen.bar(x, 0.04, x + 0.26, 0.68)) for x in (-1.15, 0.89)], cloth, relief=0.09, contact=0.2)
    pillow = pick(pen.rng, CLOTH)
    x = float(pen.rng.choice([-0.7, 0.62]))
    outline = smooth(pen.at((x - 0.2, 0.45), (x + 0.18, 0.48), (x + 0.2, 0.82), (x - 0.17, 0.8)))
    pen.paint([outline], pillow, relief=0.09, contact=0.2)


def _bookcase(pen: _Pen, wood: Array) -> None:
    rng = pen.rng
    pen.paint([pen.bar(-0.55, 0, 0.55, 2.0)], wood, relief=0.03)
    books: dict[int, list[Array]] = {}
    colours = [pick(rng, CLOTH) for _ in range(5)]
    for shelf in range(5):
        low = 0.08 + shelf * 0.385
        pen.paint([pen.bar(-0.5, low, 0.5, low + 0.345)], wood * 0.45)
        x = -0.48
        while x < 0.4:
            wide = rng.uniform(0.035, 0.08)
            if rng.random() < 0.85:
                spines = books.setdefault(int(rng.integers(5)), [])
                spines.append(pen.bar(x, low, x + wide, low + rng.uniform(0.2, 0.31)))
            x += wide + 0.006
    for index, spines in books.items():
        pen.paint(spines, colours[index])


def _houseplant(pen: _Pen, pot: Array) -> None:
    rng = pen.rng
    green = pen.pick("3f7a4a", "5a8f4a", "2f6a4a", "7a9a55")
    tall = rng.uniform(0.75, 1.3)
    for tone in (0.7, 0.9, 1.1):
        leaves = []
        for _ in range(7):
            angle = rng.uniform(-1.2, 1.2)
            reach = tall * rng.uniform(0.55, 1.0)
            tip = np.array([np.sin(angle) * reach * 0.55, 0.4 + np.cos(angle) * reach])
            middle = tip * [0.55, 1] * [1, 0.62] + [0, 0.12]
            leaves += pen.tube(xy((0, 0.38), middle, tip), [0.012, 0.065, 0.01])
        pen.paint(leaves, np.clip(green * tone, 0, 1), relief=0.04, strength=0.4)
    pen.paint([pen.taper(0, 0.16, 0.42, 0.22)], pot, relief=0.12, strength=0.4)


def _lamp(pen: _Pen, metal: Array) -> None:
    shade = mix(pen.pick("f6e7c3", "e8c9a0", "f3e0d0"), WHITE, 0.2)
    pen.paint([*pen.tube([(0, 0.03), (0, 1.35)], [0.02, 0.02]), pen.ball(0, 0.03, 0.17, 0.04)], metal, relief=0.02)
    pen.paint([pen.taper(1.25, 0.26, 1.68, 0.15)], shade, relief=0.12, strength=0.2)


def _table(pen: _Pen, wood: Array) -> None:
    uniform = pen.rng.uniform
    legs = ((-0.6, -0.06), (0.54, -0.06), (-0.5, 0.06), (0.44, 0.06))
    pen.paint([pen.bar(x, y, x + 0.06, 0.7) for x, y in legs], wood * 0.7, relief=0.03)
    pen.paint([pen.taper(0.68, 0.7, 0.8, 0.6)], np.clip(wood * 1.12, 0, 1))
    pen.paint([pen.bar(-0.7, 0.63, 0.7, 0.685)], wood * 0.85)
    x = uniform(-0.35, 0.35)
    flowers = [pen.ball(x + uniform(-0.1, 0.1), uniform(0.98, 1.12), 0.055) for _ in range(7)]
    pen.paint(flowers, pen.pick("e58fa8", "f0c94e", "c0392b", "6fae5a"), relief=0.03)
    vase = xy((-0.06, 0.73), (0.06, 0.73), (0.08, 0.86), (0.04, 0.96), (-0.04, 0.96), (-0.08, 0.86)) + [x, 0]
    pen.paint([smooth(pen.at(*vase))], pick(pen.rng, CLOTH), relief=0.05, strength=0.5)


def _chair(pen: _Pen, wood: Array) -> None:
    pen.paint([pen.bar(x, 0.04, x + 0.04, 0.95) for x in (-0.2, 0.16)], wood * 0.8)
    pen.paint([smooth(pen.bar(-0.22, y, 0.22, y + 0.1)) for y in (0.84, 0.68)], wood, relief=0.03)
    pen.paint([pen.taper(0.4, 0.24, 0.49, 0.21)], wood * 1.1)
    legs = [pen.bar(x, -0.06, x + 0.045, 0.38) for x in (-0.235, 0.19)]
    pen.paint([pen.bar(-0.24, 0.36, 0.24, 0.41), *legs], wood * 0.9, relief=0.03)


_THINGS: dict[str, tuple[float, float, list[Array], Callable[[_Pen, Array], None]]] = {
    # half width and height in metres, colours (none: those of leaves), and who draws it
    "Tree": (2.6, 6.5, hexes("6a4a34", "574436", "7d6a58", "4a3a30"), _tree),
    "Bush": (1.2, 1.3, [], _bush),
    "Bench": (0.95, 1.0, hexes("9a6b42", "7a5236", "b98a5a", "5a6b52"), _bench),
    "Street light": (0.6, 4.6, hexes("2c2f33", "3b4a44", "4a4d52"), _street_light),
    "Car": (2.3, 1.7, hexes("b03a34", "2d5aa0", "d9d9d6", "3a3d44", "e0b040", "5f8f7f", "8fa3ad"), _car),
    "Flowerpot": (0.5, 1.2, hexes("b5654a", "8a8f94", "d9d2c4", "5a4a42"), _flowerpot),
    "Waste container": (0.4, 1.1, hexes("3f5a48", "4a4d52", "5a6a78", "7a4a34"), _waste_container),
    "Bollard": (0.2, 1.0, hexes("2c2f33", "7a3038", "d9d2c4"), _bollard),
    "Dog": (0.75, 0.9, hexes("8a5a3c", "2b2622", "c99a5f", "e9dfcf", "6d6a68"), _dog),
    "Couch": (1.2, 1.1, CLOTH, _couch),
    "Bookcase": (0.65, 2.1, hexes("7a5236", "9a6b42", "e9e3d8", "4a3a30"), _bookcase),
    "Houseplant": (0.6, 1.8, hexes("b5654a", "e9e3d8", "5a6a78", "c9a24a", "3a3d44"), _houseplant),
    "Lamp": (0.4, 1.8, hexes("2c2f33", "b08a4a", "d9d9d6"), _lamp),
    "Table": (0.8, 1.2, hexes("9a6b42", "7a5236", "c9a273", "e9e3d8", "4a3a30"), _table),
    "Chair": (0.4, 1.1, hexes("9a6b42", "7a5236", "c9a273", "e9e3d8", "24272d", "b03a34"), _chair),
}
