"""Streets, parks and rooms: a camera, a ground in perspective, houses, and things that stand about."""

# ruff: noqa: RUF005 (arrays are added here, not lists)
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from dataset_tools.drawn_world.sheet import (
    CLOTH,
    Array,
    Pattern,
    Sheet,
    dots,
    ellipse,
    hexes,
    mix,
    mottle,
    noise,
    pick,
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


@dataclass(eq=False)
class Prop:
    """A thing that stands in the scene."""

    name: str
    z: float
    left: int
    top: int
    rgba: Array


@dataclass(eq=False)
class Stage:
    kind: Kind
    camera: Camera
    sun: Array
    tint: Array
    shade: float
    """Strength of cast shadows, 0..1."""
    base: Array = field(default_factory=lambda: np.zeros(0))
    """(H, W, 3) uint8: sky, walls, ground."""
    props: list[Prop] = field(default_factory=list)
    seats: list[tuple[float, float]] = field(default_factory=list)
    """x (metres) and z of places to sit."""
    objects: list[tuple[str, Array]] = field(default_factory=list)
    """Class and outline (picture pixels) of named things painted on the base."""
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


def set_stage(rng: np.random.Generator, kind: Kind, size: tuple[int, int]) -> Stage:
    width, height = size
    horizon = height * rng.uniform(0.36, 0.47)
    camera = Camera(
        width=width,
        height=height,
        horizon=horizon,
        centre=width * rng.uniform(0.36, 0.64),
        focal=max(width, height) * rng.uniform(0.85, 1.1),
        eye=rng.uniform(1.3, 1.7),
    )
    side = 1.0 if rng.random() < 0.5 else -1.0
    sun = xy((side * rng.uniform(0.6, 0.85), -0.6))[0]
    mood = str(rng.choice(list(_MOODS), p=[0.34, 0.22, 0.16, 0.18, 0.10])) if kind != "room" else "morning"
    sky, tint, shade = _MOODS[mood]
    if kind == "room":
        shade = 0.26
        tint = (
            np.array([1.0, 0.985, 0.95], np.float32) if rng.random() < 0.6 else np.array([0.97, 0.99, 1.0], np.float32)
        )
    stage = Stage(kind, camera, sun / np.hypot(*sun), tint, shade)
    {"street": _street, "park": _park, "room": _room}[kind](stage, rng, sky)
    stage.props.sort(key=lambda prop: -prop.z)
    return stage


def _paint_sky(sheet: Sheet, camera: Camera, rng: np.random.Generator, sky: list[Array]) -> None:
    rows = max(2, int(camera.horizon) + 3)
    share = np.linspace(0, 1, rows, dtype=np.float32)[:, None] ** 1.3
    wide = noise(
        rng, rows, camera.width, (camera.width * rng.uniform(0.35, 0.8), camera.horizon * rng.uniform(0.3, 0.5))
    )
    cloud = np.clip((wide - rng.uniform(-0.2, 0.9)) * 0.8, 0, 0.85) * (1 - 0.5 * share)
    for channel in range(3):
        plane = sky[0][channel] + (sky[1][channel] - sky[0][channel]) * share
        plane = plane + (sky[2][channel] - plane) * cloud
        sheet.planes[channel, :rows] = plane[: sheet.shape[0]]


class _Ground:
    """World coordinates of every ground pixel, and textures on them that fade before they alias."""

    def __init__(self, camera: Camera, from_row: float) -> None:
        self.first = int(np.clip(np.floor(from_row), 0, camera.height - 1))
        rows = np.maximum(np.arange(self.first, camera.height, dtype=np.float32) + 0.5 - camera.horizon, 0.6)[:, None]
        self.scale = rows / np.float32(camera.eye)
        self.z = np.float32(camera.eye * camera.focal) / rows
        self.x = (np.arange(camera.width, dtype=np.float32)[None, :] + 0.5 - np.float32(camera.centre)) / self.scale
        self.z_scale = rows * rows / np.float32(camera.eye * camera.focal)
        """Pixels a metre of distance."""

    def lines(self, coordinate: Array, scale: Array, period: float, width: float) -> Array:
        """1 on lines of ``width`` metres that repeat every ``period`` metres of ``coordinate``."""
        distance = (0.5 - np.abs(coordinate / period % 1 - 0.5)) * period * scale
        inked = np.clip(width * scale / 2 - distance + 0.5, 0, 1) * np.minimum(1, width * scale * 1.4)
        return inked * np.clip(period * scale / 3 - 0.4, 0, 1)

    def cells(self, i: Array, j: Array) -> Array:
        """A value in -1..1 that is constant within each cell of floor(i), floor(j)."""
        return (
            np.float32(2) * ((np.sin(np.floor(i) * 12.9898 + np.floor(j) * 78.233) * 437.5453) % 1).astype(np.float32)
            - 1
        )

    def band(self, low: float, high: float) -> Array:
        """1 between the distances ``low`` and ``high``."""
        return np.clip((self.z - low) * self.z_scale + 0.5, 0, 1) * np.clip((high - self.z) * self.z_scale + 0.5, 0, 1)

    def fade(self, period: float) -> Array:
        """1 where ``period`` metres of distance span many pixels, 0 where they would alias."""
        return np.clip(period * self.z_scale / 3 - 0.3, 0, 1)


def _lay(sheet: Sheet, ground: _Ground, colours: Array) -> None:
    """Put (3, rows, W) ground colours into the sheet."""
    for channel in range(3):
        sheet.planes[channel, ground.first :] = colours[channel]


def _flat(colour: Array, ground: _Ground) -> Array:
    return np.broadcast_to(colour[:, None, None], (3, ground.x.shape[0], ground.x.shape[1])).copy()


def _blend(colours: Array, colour: Array, weight: Array) -> None:
    for channel in range(3):
        colours[channel] += (colour[channel] - colours[channel]) * weight


def _pavement(rng: np.random.Generator, ground: _Ground) -> Array:
    stone = pick(rng, hexes("b9b3aa", "a6a29c", "c4b6a2", "b7a493", "9fa3a8"))
    colours = _flat(stone, ground)
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
        joints = np.maximum(
            ground.lines(shift, ground.scale, size, 0.03),
            ground.lines(ground.z + 0 * shift, ground.z_scale, deep, 0.04),
        )
    colours *= 1 + np.float32(0.045) * tone.astype(np.float32)
    _blend(colours, stone * np.float32(0.68), joints * np.float32(0.8))
    return colours


def _worn(rng: np.random.Generator, ground: _Ground, colours: Array, amount: float) -> None:
    """Large soft stains, and darker ground towards the viewer's corners."""
    rows, columns = ground.x.shape
    colours *= 1 + np.float32(amount) * noise(rng, rows, columns, (columns * 0.5, rows * 0.4))
    colours *= np.linspace(1.04, 0.95, rows, dtype=np.float32)[:, None]


def _facade(
    stage: Stage, sheet: Sheet, rng: np.random.Generator, start: Array, end: Array, height: float, light: float
) -> None:
    """A house front from ``start`` to ``end`` (x, z in metres), ``height`` metres tall."""
    camera = stage.camera
    length = float(np.hypot(*(end - start)))
    wall = pick(
        rng,
        hexes(
            "d9b38c", "c98f6b", "e6d3b1", "b5695a", "cfc6ba", "9fb0b8", "e3c878", "a98a77", "c7a3a0", "8c6a5a", "dfe0da"
        ),
    ) * np.float32(light)

    def quad(s0: float, t0: float, s1: float, t1: float) -> Array:
        places = start + (end - start) * (xy((s0,), (s1,), (s1,), (s0,)) / length)
        return camera.project(np.stack([places[:, 0], xy((t1,), (t1,), (t0,), (t0,))[:, 0], places[:, 1]], 1))

    outline = quad(0, 0, length, height)
    sheet.paint([outline], wall, pattern=mottle(wall * np.float32(0.9), rng, camera.width * 0.2, 0.35))
    stage.objects.append(("Building", outline))
    if rng.random() < 0.35:  # bricks, as faint courses
        courses = [quad(0, t, length, t + 0.06) for t in np.arange(0.5, height, 0.42)]
        sheet.paint(courses, wall * np.float32(0.86), opacity=0.5)
    trim = mix(wall, np.ones(3, np.float32), 0.55)
    dark = wall * np.float32(0.45)
    glass = pick(rng, hexes("5b7487", "46586a", "7f99ab", "3d4650")) * np.float32(0.5 + 0.5 * light)
    storey = rng.uniform(2.9, 3.4)
    pitch = rng.uniform(1.9, 2.7)
    wide, tall = pitch * rng.uniform(0.4, 0.55), storey * rng.uniform(0.48, 0.6)
    count = max(1, int(length / pitch))
    margin = (length - count * pitch) / 2
    frames: list[Array] = []
    panes: list[Array] = []
    sills: list[Array] = []
    lit: list[Array] = []
    bars: list[Array] = []
    shutters: list[Array] = []
    with_shutters = rng.random() < 0.3
    for floor in range(1, int(height / storey)):
        for column in range(count):
            s = margin + (column + 0.5) * pitch
            t = floor * storey + storey * 0.22
            frames.append(quad(s - wide / 2 - 0.09, t - 0.09, s + wide / 2 + 0.09, t + tall + 0.09))
            (lit if rng.random() < 0.12 else panes).append(quad(s - wide / 2, t, s + wide / 2, t + tall))
            sills.append(quad(s - wide / 2 - 0.2, t - 0.2, s + wide / 2 + 0.2, t - 0.06))
            bars.append(quad(s - 0.03, t, s + 0.03, t + tall))
            bars.append(quad(s - wide / 2, t + tall * 0.6, s + wide / 2, t + tall * 0.6 + 0.06))
            if with_shutters:
                shutters += [quad(s + d - 0.18, t, s + d + 0.18, t + tall) for d in (-wide / 2 - 0.26, wide / 2 + 0.26)]
    if frames:
        sheet.paint(frames, trim)
        if panes:
            sheet.paint(
                panes, glass, pattern=mottle(mix(glass, np.ones(3, np.float32), 0.5), rng, camera.width * 0.15, 0.5)
            )
        if lit:
            sheet.paint(lit, hexes("f6d98a")[0])
        sheet.paint(bars, trim)
        sheet.paint(sills, dark, opacity=0.55)
        if shutters:
            sheet.paint(shutters, pick(rng, hexes("4f6b52", "5a4a78", "3f6580", "7a3f38")))
    shop = rng.random() < 0.75
    ground_floor = pick(rng, hexes("3b4650", "6a4432", "2f5a4c", "7a3038", "59606a", "c9c0b0")) * np.float32(light)
    if shop:
        sheet.paint([quad(0, 0, length, storey)], ground_floor)
        width = length / max(1, round(length / 3.4))
        shown = [quad(s + 0.25, 0.5, s + width - 0.25, storey - 0.75) for s in np.arange(0, length - width / 2, width)]
        sheet.paint(shown, mix(glass, hexes("ffe6b0")[0], 0.35), pattern=mottle(dark, rng, camera.width * 0.1, 0.5))
        sheet.paint([quad(0.2, storey - 0.6, length - 0.2, storey - 0.15)], pick(rng, CLOTH))
        if rng.random() < 0.6:
            awning, second = pick(rng, CLOTH), hexes("f3efe6")[0]
            flap = quad(0.2, storey - 1.15, length - 0.2, storey - 0.55)
            step = max(3.0, float(np.ptp(flap[:, 0])) / 12)
            sheet.paint([flap], awning, pattern=stripes(second, step, 0.0), relief=2, strength=0.2)
    else:
        doors = [quad(s, 0, s + 1.1, 2.3) for s in (length * rng.uniform(0.15, 0.75),)]
        sheet.paint(doors, pick(rng, hexes("6a3f2a", "2f5a4c", "7a3038", "25325e")))
        low = [quad(margin + c * pitch + 0.5, 0.9, margin + c * pitch + 0.5 + wide, 0.9 + tall) for c in range(count)]
        sheet.paint(low, glass)
    sheet.paint([quad(0, height - 0.35, length, height), quad(0, storey - 0.1, length, storey + 0.08)], trim)
    sheet.paint([quad(0, 0, length, 0.3)], dark, opacity=0.6)


def _street(stage: Stage, rng: np.random.Generator, sky: list[Array]) -> None:
    camera = stage.camera
    sheet = stage.sheet(0, 0, camera.width, camera.height)
    sheet.planes[3] = 1
    _paint_sky(sheet, camera, rng, sky)
    ground = _Ground(camera, camera.horizon)
    colours = _pavement(rng, ground)
    asphalt = pick(rng, hexes("6b6c6f", "5c5e63", "77736e"))
    white = hexes("e8e6e0")[0]
    sunny = stage.sun[0]
    if rng.random() < 0.55:  # a row of houses behind a road
        wall_z = rng.uniform(11, 15)
        near, far = rng.uniform(6.0, 7.2), wall_z - 2.0
        road = ground.band(near, far)
        _blend(colours, asphalt, road)
        dashes = ground.band((near + far) / 2 - 0.08, (near + far) / 2 + 0.08) * ((ground.x / 3 % 1) < 0.5)
        _blend(colours, white, dashes * np.float32(0.8))
        _blend(colours, hexes("d2cdc4")[0], np.maximum(ground.band(near - 0.18, near), ground.band(far, far + 0.15)))
        if rng.random() < 0.4:
            left = rng.uniform(-4, 1)
            inside = np.clip((ground.x - left) * ground.scale, 0, 1) * np.clip(
                (left + 3 - ground.x) * ground.scale, 0, 1
            )
            _blend(colours, white, inside * road * ((ground.x - left) / 0.75 % 1 < 0.55) * np.float32(0.85))
        _worn(rng, ground, colours, 0.025)
        _lay(sheet, ground, colours)
        reach = camera.width / camera.scale(wall_z)
        x = -camera.centre / camera.scale(wall_z) - rng.uniform(0, 5)
        while x < reach:
            length = rng.uniform(5, 9)
            _facade(
                stage,
                sheet,
                rng,
                xy((x, wall_z))[0],
                xy((x + length, wall_z))[0],
                rng.uniform(5.5, 13),
                rng.uniform(0.9, 1.0),
            )
            x += length
        stage.farthest = near - 0.3
        far_z = (near + far) / 2 + 0.8
        if rng.random() < 0.6:
            _place(stage, rng, "Car", rng.uniform(-3, 3), far_z)
    else:  # a street that runs away from the viewer
        half = rng.uniform(3.6, 5.2)
        lane = half - rng.uniform(1.2, 1.9)
        edge = np.clip((lane - np.abs(ground.x)) * ground.scale + 0.5, 0, 1)
        if rng.random() < 0.65:
            _blend(colours, asphalt, edge)
            kerb = np.clip((0.1 - np.abs(np.abs(ground.x) - lane)) * ground.scale + 0.5, 0, 1)
            _blend(colours, hexes("d2cdc4")[0], kerb)
            middle = np.clip((0.07 - np.abs(ground.x)) * ground.scale + 0.5, 0, 1) * ((ground.z / 3 % 1) < 0.5)
            _blend(colours, white, middle * np.minimum(1, 0.14 * ground.scale) * np.float32(0.8))
            if rng.random() < 0.4:
                start = rng.uniform(4, 8)
                _blend(
                    colours,
                    white,
                    ground.band(start, start + 2.6) * edge * (ground.x / 0.9 % 1 < 0.55) * np.float32(0.85),
                )
        _worn(rng, ground, colours, 0.025)
        _lay(sheet, ground, colours)
        end = rng.uniform(26, 45)
        x = -half - 6.0
        while x < half + 6:
            length = rng.uniform(4, 7)
            _facade(stage, sheet, rng, xy((x, end))[0], xy((x + length, end))[0], rng.uniform(7, 13), 0.92)
            x += length
        for side in (-1.0, 1.0):
            light = 1.0 if side * sunny < 0 else 0.72
            z, fronts = end, []
            while z > 1.2:
                length = rng.uniform(5, 8)
                fronts.append((max(z - length, 0.5), z))
                z -= length
            for low, high in fronts:
                _facade(
                    stage,
                    sheet,
                    rng,
                    xy((side * half, high))[0],
                    xy((side * half, low))[0],
                    rng.uniform(6, 12),
                    light,
                )
        stage.farthest = 8.5
    stage.base = sheet.finish(stage.tint)[0][..., :3].copy()
    for _ in range(int(rng.integers(1, 4))):
        name = str(
            rng.choice(["Street light", "Tree", "Bench", "Flowerpot", "Waste container", "Street light", "Bollard"])
        )
        _place(stage, rng, name, None, rng.uniform(3.2, stage.farthest))
    if rng.random() < 0.3:
        _place(stage, rng, "Dog", None, rng.uniform(3.0, 5.5))


def _park(stage: Stage, rng: np.random.Generator, sky: list[Array]) -> None:
    camera = stage.camera
    sheet = stage.sheet(0, 0, camera.width, camera.height)
    sheet.planes[3] = 1
    _paint_sky(sheet, camera, rng, sky)
    autumn = rng.random() < 0.22
    grass = pick(rng, hexes("7fa650", "6c9a48", "93ad55", "5f8f4f"))
    leaves = hexes("c9772e", "d99a37", "a8552c") if autumn else hexes("4f8a45", "3f7a4a", "6a9c48", "2f6a4a")
    # Hills, then a line of trees, paler the farther away.
    steps = np.linspace(0, camera.width, 40)
    for index, haze in enumerate((0.62, 0.4)):
        crest = (
            camera.horizon - camera.height * (0.13 - 0.06 * index) - np.cumsum(rng.normal(0, camera.height * 0.008, 40))
        )
        outline = np.concatenate(
            [np.stack([steps, crest], 1), xy((camera.width, camera.horizon + 3), (0, camera.horizon + 3))]
        )
        sheet.paint([smooth(outline)], mix(pick(rng, leaves), sky[1], haze))
    crowns = []
    for x in np.arange(-10, camera.width + 10, camera.width / rng.uniform(22, 34)):
        radius = camera.height * rng.uniform(0.025, 0.065)
        crowns.append(ellipse(xy((x, camera.horizon - radius * 0.6))[0], radius * 1.1, radius))
    green = mix(pick(rng, leaves), sky[1], 0.22)
    sheet.paint(
        crowns,
        green,
        relief=camera.height * 0.02,
        strength=0.35,
        pattern=mottle(green * np.float32(0.8), rng, 30, 0.6),
    )
    ground = _Ground(camera, camera.horizon)
    colours = _flat(grass, ground)
    rows, columns = ground.x.shape
    colours *= (
        1 + np.float32(0.05) * noise(rng, rows, columns, (60, 9)) * np.linspace(0.3, 1, rows, dtype=np.float32)[:, None]
    )
    if rng.random() < 0.35:  # mown in stripes
        stripe = np.sign(np.sin((ground.x + ground.z * rng.uniform(-0.3, 0.3)) * 2.2)) * np.clip(
            ground.scale / 12, 0, 1
        )
        colours *= 1 + np.float32(0.025) * stripe
    if rng.random() < 0.3:  # a pond
        z, x = rng.uniform(9, 14), rng.uniform(-4, 4)
        wet = np.clip((1 - ((ground.x - x) / 5) ** 2 - ((ground.z - z) / 2.4) ** 2) * 6, 0, 1)
        _blend(colours, mix(sky[0], sky[1], 0.5), wet)
    if rng.random() < 0.75:
        sand = pick(rng, hexes("d8c49a", "c9b08a", "bfb6a6", "d1b9a0"))
        bend, offset, width = rng.uniform(-1.2, 1.2), rng.uniform(-2, 2), rng.uniform(0.9, 1.9)
        course = offset + bend * np.sin(np.minimum(ground.z, 12) * rng.uniform(0.15, 0.3) + rng.uniform(0, 6))
        inside = np.clip((width - np.abs(ground.x - course)) * ground.scale / 2 + 0.5, 0, 1)
        _blend(colours, sand * np.float32(0.85), inside)
        inside = np.clip((width - 0.12 - np.abs(ground.x - course)) * ground.scale / 2 + 0.5, 0, 1)
        _blend(colours, sand, inside)
    _worn(rng, ground, colours, 0.03)
    _lay(sheet, ground, colours)
    tufts, petals = [], []
    for _ in range(int(rng.integers(10, 40))):
        z = rng.uniform(2.4, 9)
        foot = camera.project(xy((rng.uniform(-0.5, 0.5) * camera.width / camera.scale(z), 0, z)))[0]
        size = camera.scale(z) * 0.07
        tufts += [
            xy(foot + (d, 0), foot + (d + size * 0.3, 0), foot + (d * 2.2, -size * 1.6))
            for d in (-size * 0.5, 0, size * 0.5)
        ]
        if rng.random() < 0.5:
            petals.append(ellipse(foot - (0, size * 1.7), size * 0.45, size * 0.45))
    sheet.paint(tufts, grass * np.float32(0.72))
    if petals:
        sheet.paint(petals, pick(rng, hexes("f4f0e6", "f0c94e", "e58fa8", "b35fa6")))
    stage.base = sheet.finish(stage.tint)[0][..., :3].copy()
    stage.farthest = 8.0
    for _ in range(int(rng.integers(2, 5))):
        _place(stage, rng, "Tree", None, rng.uniform(6.5, 16), leaves=leaves)
    for _ in range(int(rng.integers(1, 4))):
        name = str(rng.choice(["Bench", "Bush", "Street light", "Bush", "Bench", "Waste container"]))
        _place(stage, rng, name, None, rng.uniform(3.6, 8), leaves=leaves)
    if rng.random() < 0.35:
        _place(stage, rng, "Dog", None, rng.uniform(2.8, 5.5))
    if rng.random() < 0.15:
        _place(stage, rng, "Bush", None, rng.uniform(2.3, 2.8), leaves=leaves)


def _room(stage: Stage, rng: np.random.Generator, sky: list[Array]) -> None:
    camera = stage.camera
    sheet = stage.sheet(0, 0, camera.width, camera.height)
    sheet.planes[3] = 1
    depth = rng.uniform(4.8, 6.6)
    half = max(1.9, camera.width / camera.scale(depth) * rng.uniform(0.38, 0.62))
    tall = rng.uniform(2.6, 3.1)
    white = np.ones(3, np.float32)

    def wall(x0: float, z0: float, x1: float, z1: float, y0: float, y1: float) -> Array:
        return camera.project(xy((x0, y1, z0), (x1, y1, z1), (x1, y0, z1), (x0, y0, z0)))

    ground = _Ground(camera, camera.ground(depth))
    style = rng.integers(4)
    wood = pick(rng, hexes("b98a5a", "9a6b42", "c9a273", "7a5236", "d5b68c"))
    colours = _flat(wood, ground)
    if style <= 1:  # boards, away from the viewer or across
        along, across, a_scale, c_scale = (
            (ground.z + 0 * ground.x, ground.x, ground.z_scale, ground.scale)
            if style == 0
            else (ground.x, ground.z + 0 * ground.x, ground.scale, ground.z_scale)
        )
        board = rng.uniform(0.13, 0.24)
        row = np.floor(across / board)
        tone = ground.cells(across / board, along / 1.4 + 0.37 * row)
        colours *= 1 + np.float32(0.07) * tone * np.clip(board * c_scale / 2.5 - 0.3, 0, 1)
        _blend(colours, wood * np.float32(0.6), ground.lines(across, c_scale, board, 0.012) * np.float32(0.8))
        _blend(
            colours, wood * np.float32(0.6), ground.lines(along + 0.518 * row, a_scale, 1.4, 0.012) * np.float32(0.5)
        )
    elif style == 2:  # tiles
        tile = rng.uniform(0.35, 0.6)
        light, dark = (
            pick(rng, hexes("e6e0d4", "d9dcdc", "e9d8c4")),
            pick(rng, hexes("8a9299", "b58a6a", "6a7a70", "bfb6a8")),
        )
        odd = (np.floor(ground.x / tile) + np.floor(ground.z / tile)) % 2
        colours = _flat(light, ground)
        _blend(colours, dark, odd * ground.fade(tile) + 0.5 * (1 - ground.fade(tile)))
    else:  # carpet
        carpet = pick(rng, hexes("9c8f80", "7f8c94", "a8968a", "8a7f98", "93a08a"))
        colours = _flat(carpet, ground)
        rows, columns = ground.x.shape
        colours *= 1 + np.float32(0.02) * noise(rng, rows, columns, (14, 8))
    if rng.random() < 0.6:  # a rug
        z, x, long, deep = rng.uniform(3.0, 4.2), rng.uniform(-0.7, 0.7), rng.uniform(1.0, 1.6), rng.uniform(0.6, 0.9)
        main, second = pick(rng, CLOTH), pick(rng, CLOTH)
        round_rug = rng.random() < 0.4
        for shrink, colour in ((1.0, main), (0.86, second), (0.78, main)):
            if round_rug:
                edge = (
                    (1 - np.sqrt(((ground.x - x) / (long * shrink)) ** 2 + ((ground.z - z) / (deep * shrink)) ** 2))
                    * deep
                    * ground.z_scale
                )
            else:
                edge = np.minimum(
                    (long - (1 - shrink) * 0.8 - np.abs(ground.x - x)) * ground.scale,
                    (deep - (1 - shrink) * 0.8 - np.abs(ground.z - z)) * ground.z_scale,
                )
            _blend(colours, colour, np.clip(edge + 0.5, 0, 1) * np.float32(0.92))
    _worn(rng, ground, colours, 0.015)
    _lay(sheet, ground, colours)
    paper = pick(
        rng, hexes("e8dfd0", "cfdcd8", "d8c9c0", "b9c9d6", "e3d2a8", "c7b8c9", "a9bba0", "d9a98c", "8fa3ad", "efe9e2")
    )
    decor: Pattern | None = None
    style = rng.integers(4)
    if style == 0:
        decor = stripes(paper * np.float32(0.93), camera.scale(depth) * rng.uniform(0.15, 0.35), 0.0)
    elif style == 1:
        decor = dots(mix(paper, white, 0.5), camera.scale(depth) * rng.uniform(0.14, 0.25))
    elif style == 2:
        decor = mottle(paper * np.float32(0.93), rng, camera.width * 0.5, 0.5)
    back = wall(-half, depth, half, depth, 0, tall)
    sheet.paint([back], paper, pattern=decor)
    lights = (1.03, 0.86) if stage.sun[0] > 0 else (0.86, 1.03)
    for side, brightness in zip((-1.0, 1.0), lights, strict=True):
        sheet.paint(
            [wall(side * half, depth, side * half, 0.4, 0, tall)], np.clip(paper * np.float32(brightness), 0, 1)
        )
    ceiling = camera.project(xy((-half, tall, depth), (half, tall, depth), (half, tall, 0.4), (-half, tall, 0.4)))
    sheet.paint([ceiling], mix(paper, white, 0.75))
    boards = [wall(-half, depth, half, depth, 0, 0.13)] + [
        wall(s * half, depth, s * half, 0.4, 0, 0.13) for s in (-1, 1)
    ]
    sheet.paint(boards, mix(paper, white, 0.7))
    if rng.random() < 0.3:
        panel = mix(paper, pick(rng, hexes("f2eee6", "6a7a70", "8a6a50")), 0.8)
        sheet.paint([wall(-half, depth, half, depth, 0.13, 1.0)], panel)
        slits = [wall(x, depth, x + 0.03, depth, 0.2, 0.95) for x in np.arange(-half, half, 0.45)]
        sheet.paint([*slits, wall(-half, depth, half, depth, 0.97, 1.03)], panel * np.float32(0.82))
    # Corners are darker than the middle of a wall.
    for grow, opacity in ((0.25, 0.07), (0.1, 0.08)):
        sheet.paint(
            [wall(s * half, depth, s * (half - grow), depth, 0, tall) for s in (-1, 1)],
            paper * np.float32(0.3),
            opacity=opacity,
        )
    x = -half + rng.uniform(0.2, 0.6)
    while x < half - 0.7:
        thing = str(rng.choice(["window", "picture", "picture", "door", "nothing", "picture"]))
        if thing == "window" and x + 1.3 < half:
            wide = rng.uniform(0.9, 1.3)
            outline = wall(x, depth, x + wide, depth, 0.95, 2.25)
            sheet.paint([wall(x - 0.07, depth, x + wide + 0.07, depth, 0.88, 2.32)], white * np.float32(0.97), relief=2)
            sheet.paint([outline], sky[1], pattern=mottle(sky[0], rng, camera.width * 0.4, 0.7))
            crown = [
                ellipse(
                    camera.project(xy((x + wide * u, 1.1, depth)))[0],
                    camera.scale(depth) * 0.2,
                    camera.scale(depth) * 0.16,
                )
                for u in (0.15, 0.4, 0.65, 0.88)
            ]
            low, high = outline.min(0), outline.max(0)
            clipped = [np.clip(c, low, high) for c in crown]
            sheet.paint(clipped, hexes("7fa06a")[0])
            sheet.paint(
                [
                    wall(x + wide / 2 - 0.025, depth, x + wide / 2 + 0.025, depth, 0.95, 2.25),
                    wall(x, depth, x + wide, depth, 1.58, 1.63),
                ],
                white * np.float32(0.95),
            )
            cloth = pick(rng, CLOTH)
            drapes = [
                wall(x - 0.28, depth, x + 0.1, depth, 0.3, 2.42),
                wall(x + wide - 0.1, depth, x + wide + 0.28, depth, 0.3, 2.42),
            ]
            sheet.paint(drapes, cloth, pattern=stripes(cloth * np.float32(0.82), camera.scale(depth) * 0.09, 0.0))
            sheet.paint([wall(x - 0.35, depth, x + wide + 0.35, depth, 2.41, 2.45)], hexes("6a4a34")[0])
            stage.objects.append(("Window", outline))
            x += wide + 0.6
        elif thing == "door":
            outline = wall(x, depth, x + 0.85, depth, 0, 2.05)
            colour = pick(rng, hexes("f2eee6", "9a6b42", "d9d2c4", "6a7a70"))
            sheet.paint([wall(x - 0.08, depth, x + 0.93, depth, 0, 2.13)], mix(colour, white, 0.4))
            sheet.paint([outline], colour)
            sheet.paint(
                [wall(x + 0.14, depth, x + 0.71, depth, y0, y1) for y0, y1 in ((0.2, 0.85), (1.05, 1.85))],
                colour * np.float32(0.88),
                relief=1.5,
                strength=-0.3,
            )
            sheet.paint([ellipse(camera.project(xy((x + 0.75, 0.98, depth)))[0], 1.6, 1.6)], hexes("c9a24a")[0])
            stage.objects.append(("Door", outline))
            x += 1.2
        elif thing == "picture":
            wide, high = rng.uniform(0.35, 0.8), rng.uniform(0.35, 0.75)
            y = rng.uniform(1.35, 1.55)
            outline = wall(x, depth, x + wide, depth, y, y + high)
            sheet.paint([outline + [1.2, 1.8]], paper * np.float32(0.55), opacity=0.5)
            sheet.paint([outline], pick(rng, hexes("3a2a1f", "f2eee6", "b08a4a", "24272d")), relief=1.5)
            inner = wall(x + 0.05, depth, x + wide - 0.05, depth, y + 0.05, y + high - 0.05)
            sheet.paint([inner], pick(rng, CLOTH), pattern=mottle(pick(rng, CLOTH), rng, 26, 1.0))
            low, high_corner = inner.min(0), inner.max(0)
            for _ in range(2):
                blob = ellipse(rng.uniform(low, high_corner), float(rng.uniform(2, 6)), float(rng.uniform(2, 6)))
                sheet.paint([np.clip(blob, low, high_corner)], pick(rng, CLOTH))
            stage.objects.append(("Picture frame", outline))
            x += wide + rng.uniform(0.25, 0.8)
        else:
            x += rng.uniform(0.4, 1.0)
    if rng.random() < 0.5:  # sunlight from a window beside the viewer
        side = float(np.sign(stage.sun[0]))
        z, x = rng.uniform(2.8, 4.0), -side * rng.uniform(-0.4, 0.6)
        for step in (0.0, 0.62):
            patch = xy(
                (x + step, 0, z),
                (x + step + 0.5, 0, z),
                (x + step + 0.5 - side * 0.5, 0, z - 0.8),
                (x + step - side * 0.5, 0, z - 0.8),
            )
            sheet.paint([camera.project(patch)], hexes("fff2d0")[0], opacity=0.28)
    stage.base = sheet.finish(stage.tint)[0][..., :3].copy()
    stage.farthest, stage.nearest = depth - 0.5, 2.3
    taken: list[float] = []
    for name in rng.permutation(["Couch", "Bookcase", "Houseplant", "Lamp", "Table", "Chair", "Houseplant"])[
        : int(rng.integers(2, 5))
    ]:
        for _ in range(8):
            x = rng.uniform(-half + 0.5, half - 0.5)
            if all(abs(x - other) > 0.9 for other in taken):
                taken.append(x)
                _place(stage, rng, str(name), x, depth - rng.uniform(0.35, 0.6))
                break
    if rng.random() < 0.4:
        _place(stage, rng, str(rng.choice(["Chair", "Table", "Houseplant"])), None, rng.uniform(2.6, 3.6))


def _place(
    stage: Stage, rng: np.random.Generator, name: str, x: float | None, z: float, leaves: Sequence[Array] = ()
) -> None:
    """Draw a thing that stands on the ground at (x, z) and darken the base under it."""
    camera = stage.camera
    scale = camera.scale(z)
    if x is None:
        x = (rng.uniform(0.04, 0.96) * camera.width - camera.centre) / scale
    foot = camera.project(xy((x, 0, z)))[0]
    half, tall = {
        "Tree": (2.6, 6.5), "Bush": (1.2, 1.3), "Bench": (0.95, 1.0), "Street light": (0.6, 4.6), "Car": (2.3, 1.7),
        "Flowerpot": (0.5, 1.2), "Waste container": (0.4, 1.1), "Bollard": (0.2, 1.0), "Dog": (0.75, 0.9),
        "Couch": (1.2, 1.1), "Bookcase": (0.65, 2.1), "Houseplant": (0.6, 1.8), "Lamp": (0.4, 1.8),
        "Table": (0.8, 1.2), "Chair": (0.4, 1.1),
    }[name]  # fmt: skip
    sheet = stage.sheet(foot[0] - half * scale, foot[1] - tall * scale, foot[0] + half * scale, foot[1] + 0.15 * scale)

    def at(*points: Sequence[float]) -> Array:
        return foot + xy(*points) * [scale, -scale]

    def ball(x: float, y: float, radius_x: float, radius_y: float | None = None) -> Array:
        return ellipse(at((x, y))[0], radius_x * scale, (radius_x if radius_y is None else radius_y) * scale)

    def bar(x0: float, y0: float, x1: float, y1: float) -> Array:
        return at((x0, y0), (x1, y0), (x1, y1), (x0, y1))

    _DRAWERS[name](_Pen(sheet, at, ball, bar, scale, rng, leaves or hexes("4f8a45", "3f7a4a", "6a9c48", "2f6a4a")))
    rgba, _ = sheet.finish(stage.tint)
    spread = min(half, 1.4) * (0.35 if name in ("Tree", "Street light", "Lamp") else 0.85)
    _darken(stage.base, foot, spread * scale, spread * scale * 0.22, stage.shade)
    stage.props.append(Prop(name, z, sheet.left, sheet.top, rgba))
    if name == "Bench" or (name == "Couch"):
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
    """What the drawer of a thing needs: outlines in metres from the foot of the thing, y upwards."""

    sheet: Sheet
    at: Callable[..., Array]
    ball: Callable[..., Array]
    bar: Callable[[float, float, float, float], Array]
    scale: float
    rng: np.random.Generator
    leaves: Sequence[Array]


def _tree(pen: _Pen) -> None:
    rng = pen.rng
    bark = pick(rng, hexes("6a4a34", "574436", "7d6a58", "4a3a30"))
    lean, fork = rng.normal(0, 0.15), rng.uniform(1.5, 2.2)
    top = rng.uniform(3.6, 5.0)
    radius = rng.uniform(0.1, 0.17)
    trunk = [pen.at((-radius * 1.7, 0), (radius * 1.7, 0), (radius + lean, fork), (-radius + lean, fork))]
    trunk += tube(pen.at((lean, fork), (lean - 0.6, top - 0.8)), [radius * pen.scale * 0.8, 2])
    trunk += tube(pen.at((lean, fork), (lean + 0.5, top - 0.6)), [radius * pen.scale * 0.8, 2])
    pen.sheet.paint(
        trunk, bark, relief=radius * pen.scale, strength=0.4, pattern=mottle(bark * np.float32(0.7), rng, 12, 0.6)
    )
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
        colour = np.clip(green * np.float32(tone), 0, 1)
        pen.sheet.paint(
            blobs,
            colour,
            relief=0.3 * pen.scale,
            strength=0.45,
            contact=0.15,
            pattern=mottle(colour * np.float32(0.75), rng, max(6, 0.5 * pen.scale), 0.7),
        )


def _bush(pen: _Pen) -> None:
    rng = pen.rng
    green = pick(rng, pen.leaves)
    wide = rng.uniform(0.6, 1.0)
    for tone, low, high in ((0.75, 0.2, 0.45), (1.0, 0.35, 0.75)):
        blobs = [
            pen.ball(
                rng.uniform(-wide, wide) * 0.8, rng.uniform(low, high), rng.uniform(0.2, 0.34), rng.uniform(0.18, 0.3)
            )
            for _ in range(9)
        ]
        colour = np.clip(green * np.float32(tone), 0, 1)
        pen.sheet.paint(
            blobs,
            colour,
            relief=0.16 * pen.scale,
            strength=0.4,
            contact=0.15,
            pattern=mottle(colour * np.float32(0.75), rng, max(6, 0.3 * pen.scale), 0.7),
        )
    if rng.random() < 0.4:
        pen.sheet.paint(
            [pen.ball(rng.uniform(-wide, wide) * 0.8, rng.uniform(0.3, 0.8), 0.045) for _ in range(10)],
            pick(rng, hexes("f4f0e6", "e58fa8", "c0392b", "f0c94e")),
        )


def _bench(pen: _Pen) -> None:
    wood = pick(pen.rng, hexes("9a6b42", "7a5236", "b98a5a", "5a6b52"))
    iron = hexes("2c2f33")[0]
    pen.sheet.paint([pen.bar(x, 0, x + 0.07, 0.92) for x in (-0.76, 0.69)], iron * np.float32(0.8))
    for y in (0.56, 0.68, 0.8):
        pen.sheet.paint([pen.bar(-0.84, y, 0.84, y + 0.085)], wood * np.float32(0.9), relief=0.04 * pen.scale)
    for y, grow in ((0.47, 0.0), (0.425, 0.03), (0.375, 0.06)):
        pen.sheet.paint(
            [pen.at((-0.84 - grow, y), (0.84 + grow, y), (0.85 + grow, y + 0.05), (-0.85 - grow, y + 0.05))],
            wood * np.float32(1.12),
        )
    pen.sheet.paint([pen.bar(-0.9, 0.33, 0.9, 0.38)], wood * np.float32(0.75))
    pen.sheet.paint([pen.bar(x, -0.06, x + 0.08, 0.34) for x in (-0.82, 0.74)], iron, relief=0.03 * pen.scale)


def _street_light(pen: _Pen) -> None:
    iron = pick(pen.rng, hexes("2c2f33", "3b4a44", "4a4d52"))
    glow = hexes("fff3cf")[0]
    pole = tube(pen.at((0, 0), (0, 3.6)), [0.06 * pen.scale, 0.04 * pen.scale])
    pen.sheet.paint(
        [*pole, pen.at((-0.12, 0), (0.12, 0), (0.07, 0.5), (-0.07, 0.5))], iron, relief=0.05 * pen.scale, strength=0.6
    )
    if pen.rng.random() < 0.5:
        pen.sheet.paint([pen.at((-0.14, 3.6), (0.14, 3.6), (0.22, 4.1), (-0.22, 4.1))], glow, relief=0.08 * pen.scale)
        pen.sheet.paint([pen.at((-0.27, 4.1), (0.27, 4.1), (0.0, 4.38)), pen.bar(-0.17, 3.55, 0.17, 3.62)], iron)
    else:
        pen.sheet.paint([pen.ball(x, 3.85, 0.17) for x in (-0.3, 0.3)], glow, relief=0.1 * pen.scale, strength=0.25)
        pen.sheet.paint([pen.bar(-0.32, 3.6, 0.32, 3.68)], iron)


def _car(pen: _Pen) -> None:
    rng = pen.rng
    body = pick(rng, hexes("b03a34", "2d5aa0", "d9d9d6", "3a3d44", "e0b040", "5f8f7f", "8fa3ad"))
    flip = 1 if rng.random() < 0.5 else -1
    outline = smooth(
        xy(
            (-2.1, 0.32),
            (-2.1, 0.72),
            (-1.35, 0.86),
            (-0.75, 1.38),
            (0.75, 1.42),
            (1.45, 0.92),
            (2.05, 0.82),
            (2.12, 0.32),
        )
        * [flip, 1]
    )
    pen.sheet.paint([pen.bar(-2.0, 0.14, 2.0, 0.4)], hexes("1c1d20")[0])
    pen.sheet.paint([pen.at(*outline)], body, relief=0.2 * pen.scale, strength=0.35)
    glass = smooth(xy((-1.15, 0.9), (-0.68, 1.28), (0.68, 1.32), (1.2, 0.93)) * [flip, 1])
    pen.sheet.paint([pen.at(*glass)], hexes("39474f")[0])
    pen.sheet.paint([pen.bar(-0.05, 0.88, 0.05, 1.33)], body * np.float32(0.9))
    pen.sheet.paint([pen.ball(x, 0.32, 0.33) for x in (-1.3, 1.3)], hexes("1c1d20")[0])
    pen.sheet.paint([pen.ball(x, 0.32, 0.18) for x in (-1.3, 1.3)], hexes("a9adb2")[0], relief=0.06 * pen.scale)
    pen.sheet.paint([pen.ball(-1.98 * flip, 0.62, 0.09)], hexes("f6e3a8")[0])


def _flowerpot(pen: _Pen) -> None:
    rng = pen.rng
    pot = pick(rng, hexes("b5654a", "8a8f94", "d9d2c4", "5a4a42"))
    green = pick(rng, pen.leaves)
    pen.sheet.paint(
        [pen.ball(rng.uniform(-0.28, 0.28), rng.uniform(0.55, 0.85), 0.16) for _ in range(8)],
        green,
        relief=0.1 * pen.scale,
        strength=0.4,
    )
    pen.sheet.paint(
        [pen.ball(rng.uniform(-0.33, 0.33), rng.uniform(0.6, 0.98), 0.06) for _ in range(9)],
        pick(rng, hexes("e58fa8", "f0c94e", "c0392b", "f4f0e6", "b35fa6")),
    )
    pen.sheet.paint(
        [pen.at((-0.26, 0), (0.26, 0), (0.36, 0.5), (-0.36, 0.5)), pen.bar(-0.39, 0.44, 0.39, 0.54)],
        pot,
        relief=0.15 * pen.scale,
        strength=0.4,
    )


def _waste_container(pen: _Pen) -> None:
    metal = pick(pen.rng, hexes("3f5a48", "4a4d52", "5a6a78", "7a4a34"))
    pen.sheet.paint(
        [pen.at((-0.24, 0), (0.24, 0), (0.29, 0.8), (-0.29, 0.8))],
        metal,
        relief=0.14 * pen.scale,
        strength=0.4,
        pattern=stripes(metal * np.float32(0.8), 0.1 * pen.scale, 0.0, 0.3),
    )
    pen.sheet.paint([pen.ball(0, 0.82, 0.31, 0.1)], metal * np.float32(1.2), relief=0.05 * pen.scale)
    pen.sheet.paint([pen.ball(0, 0.82, 0.17, 0.045)], metal * np.float32(0.3))


def _bollard(pen: _Pen) -> None:
    iron = pick(pen.rng, hexes("2c2f33", "7a3038", "d9d2c4"))
    pen.sheet.paint(
        [*tube(pen.at((0, 0.02), (0, 0.8)), [0.09 * pen.scale, 0.07 * pen.scale]), pen.ball(0, 0.86, 0.1)],
        iron,
        relief=0.07 * pen.scale,
        strength=0.5,
    )


def _dog(pen: _Pen) -> None:
    rng = pen.rng
    coat = pick(rng, hexes("8a5a3c", "2b2622", "c99a5f", "e9dfcf", "6d6a68"))
    flip = 1 if rng.random() < 0.5 else -1
    size = rng.uniform(0.75, 1.05)

    def part(points: Sequence[Sequence[float]], radii: Sequence[float]) -> list[Array]:
        return tube(pen.at(*(xy(*points) * [flip * size, size])), [r * size * pen.scale for r in radii])

    far = part([(-0.2, 0.4), (-0.26, 0.2), (-0.2, 0.03)], [0.07, 0.04, 0.035]) + part(
        [(0.26, 0.38), (0.3, 0.03)], [0.05, 0.03]
    )
    pen.sheet.paint(far, coat * np.float32(0.7))
    body = part([(-0.26, 0.44), (0.0, 0.45), (0.26, 0.45)], [0.12, 0.12, 0.14])
    body += part([(-0.28, 0.4), (-0.34, 0.2), (-0.28, 0.03)], [0.09, 0.045, 0.035]) + part(
        [(0.24, 0.4), (0.22, 0.03)], [0.06, 0.033]
    )
    body += part([(0.28, 0.5), (0.42, 0.68)], [0.1, 0.08]) + part(
        [(-0.34, 0.5), (-0.46, 0.62), (-0.5, 0.74)], [0.04, 0.03, 0.015]
    )
    pen.sheet.paint(body, coat, relief=0.08 * pen.scale * size, strength=0.35)
    pen.sheet.paint(
        part([(0.42, 0.7), (0.58, 0.65)], [0.095, 0.045]),
        coat * np.float32(1.05),
        relief=0.05 * pen.scale,
        strength=0.3,
    )
    pen.sheet.paint(part([(0.36, 0.76), (0.33, 0.62)], [0.045, 0.03]), coat * np.float32(0.65))
    dark = hexes("1d1714")[0]
    pen.sheet.paint(
        part([(0.62, 0.665), (0.625, 0.66)], [0.022, 0.022]) + part([(0.47, 0.73), (0.475, 0.73)], [0.016, 0.016]), dark
    )
    pen.sheet.paint(part([(0.31, 0.6), (0.37, 0.53)], [0.025, 0.025]), pick(rng, CLOTH))


def _couch(pen: _Pen) -> None:
    cloth = pick(pen.rng, CLOTH)
    relief = 0.09 * pen.scale
    pen.sheet.paint([pen.bar(x, -0.05, x + 0.07, 0.15) for x in (-0.95, 0.88)], hexes("4a3426")[0])
    pen.sheet.paint([smooth(pen.bar(-1.0, 0.2, 1.0, 0.95))], cloth * np.float32(0.85), relief=relief)
    pen.sheet.paint(
        [smooth(pen.bar(-0.95, 0.3, 0.0, 0.9)), smooth(pen.bar(0.0, 0.3, 0.95, 0.9))],
        cloth * np.float32(0.95),
        relief=relief,
    )
    pen.sheet.paint([pen.bar(-1.0, 0.08, 1.0, 0.3)], cloth * np.float32(0.75), relief=relief / 2)
    for x0, x1 in ((-0.92, 0.0), (0.0, 0.92)):
        pen.sheet.paint(
            [smooth(pen.bar(x0, 0.27, x1, 0.5))], cloth * np.float32(1.05), relief=relief / 2, strength=0.35
        )
    pen.sheet.paint(
        [smooth(pen.bar(x, 0.04, x + 0.26, 0.68)) for x in (-1.15, 0.89)], cloth, relief=relief, contact=0.2
    )
    pillow = pick(pen.rng, CLOTH)
    x = float(pen.rng.choice([-0.7, 0.62]))
    pen.sheet.paint(
        [smooth(pen.at((x - 0.2, 0.45), (x + 0.18, 0.48), (x + 0.2, 0.82), (x - 0.17, 0.8)))],
        pillow,
        relief=relief,
        contact=0.2,
    )


def _bookcase(pen: _Pen) -> None:
    rng = pen.rng
    wood = pick(rng, hexes("7a5236", "9a6b42", "e9e3d8", "4a3a30"))
    pen.sheet.paint([pen.bar(-0.55, 0, 0.55, 2.0)], wood, relief=0.03 * pen.scale)
    books: dict[int, list[Array]] = {}
    colours = [pick(rng, CLOTH) for _ in range(5)]
    for shelf in range(5):
        low = 0.08 + shelf * 0.385
        pen.sheet.paint([pen.bar(-0.5, low, 0.5, low + 0.345)], wood * np.float32(0.45))
        x = -0.48
        while x < 0.4:
            wide = rng.uniform(0.035, 0.08)
            if rng.random() < 0.85:
                books.setdefault(int(rng.integers(5)), []).append(
                    pen.bar(x, low, x + wide, low + rng.uniform(0.2, 0.31))
                )
            x += wide + 0.006
    for index, spines in books.items():
        pen.sheet.paint(spines, colours[index])


def _houseplant(pen: _Pen) -> None:
    rng = pen.rng
    pot = pick(rng, hexes("b5654a", "e9e3d8", "5a6a78", "c9a24a", "3a3d44"))
    green = pick(rng, hexes("3f7a4a", "5a8f4a", "2f6a4a", "7a9a55"))
    tall = rng.uniform(0.75, 1.3)
    for tone in (0.7, 0.9, 1.1):
        leaves = []
        for _ in range(7):
            angle = rng.uniform(-1.2, 1.2)
            reach = tall * rng.uniform(0.55, 1.0)
            tip = xy((np.sin(angle) * reach * 0.55, 0.4 + np.cos(angle) * reach))[0]
            middle = tip * [0.55, 1] * [1, 0.62] + [0, 0.12]
            leaves += tube(pen.at((0, 0.38), middle, tip), [0.012 * pen.scale, 0.065 * pen.scale, 0.01 * pen.scale])
        pen.sheet.paint(leaves, np.clip(green * np.float32(tone), 0, 1), relief=0.04 * pen.scale, strength=0.4)
    pen.sheet.paint(
        [pen.at((-0.16, 0), (0.16, 0), (0.22, 0.42), (-0.22, 0.42))], pot, relief=0.12 * pen.scale, strength=0.4
    )


def _lamp(pen: _Pen) -> None:
    metal = pick(pen.rng, hexes("2c2f33", "b08a4a", "d9d9d6"))
    shade = mix(pick(pen.rng, hexes("f6e7c3", "e8c9a0", "f3e0d0")), np.ones(3, np.float32), 0.2)
    pen.sheet.paint(
        [*tube(pen.at((0, 0.03), (0, 1.35)), [0.02 * pen.scale] * 2), pen.ball(0, 0.03, 0.17, 0.04)],
        metal,
        relief=0.02 * pen.scale,
    )
    pen.sheet.paint(
        [pen.at((-0.26, 1.25), (0.26, 1.25), (0.15, 1.68), (-0.15, 1.68))], shade, relief=0.12 * pen.scale, strength=0.2
    )


def _table(pen: _Pen) -> None:
    rng = pen.rng
    wood = pick(rng, hexes("9a6b42", "7a5236", "c9a273", "e9e3d8", "4a3a30"))
    pen.sheet.paint(
        [pen.bar(x, y, x + 0.06, 0.7) for x, y in ((-0.6, -0.06), (0.54, -0.06), (-0.5, 0.06), (0.44, 0.06))],
        wood * np.float32(0.7),
        relief=0.03 * pen.scale,
    )
    pen.sheet.paint(
        [pen.at((-0.7, 0.68), (0.7, 0.68), (0.6, 0.8), (-0.6, 0.8))], np.clip(wood * np.float32(1.12), 0, 1)
    )
    pen.sheet.paint([pen.bar(-0.7, 0.63, 0.7, 0.685)], wood * np.float32(0.85))
    x = rng.uniform(-0.35, 0.35)
    pen.sheet.paint(
        [pen.ball(x + rng.uniform(-0.1, 0.1), rng.uniform(0.98, 1.12), 0.055) for _ in range(7)],
        pick(rng, hexes("e58fa8", "f0c94e", "c0392b", "6fae5a")),
        relief=0.03 * pen.scale,
    )
    pen.sheet.paint(
        [
            smooth(
                pen.at(
                    (x - 0.06, 0.73),
                    (x + 0.06, 0.73),
                    (x + 0.08, 0.86),
                    (x + 0.04, 0.96),
                    (x - 0.04, 0.96),
                    (x - 0.08, 0.86),
                )
            )
        ],
        pick(rng, CLOTH),
        relief=0.05 * pen.scale,
        strength=0.5,
    )


def _chair(pen: _Pen) -> None:
    wood = pick(pen.rng, hexes("9a6b42", "7a5236", "c9a273", "e9e3d8", "24272d", "b03a34"))
    pen.sheet.paint([pen.bar(x, 0.04, x + 0.04, 0.95) for x in (-0.2, 0.16)], wood * np.float32(0.8))
    pen.sheet.paint([smooth(pen.bar(-0.22, y, 0.22, y + 0.1)) for y in (0.84, 0.68)], wood, relief=0.03 * pen.scale)
    pen.sheet.paint([pen.at((-0.24, 0.4), (0.24, 0.4), (0.21, 0.49), (-0.21, 0.49))], wood * np.float32(1.1))
    pen.sheet.paint(
        [pen.bar(-0.24, 0.36, 0.24, 0.41), *(pen.bar(x, -0.06, x + 0.045, 0.38) for x in (-0.235, 0.19))],
        wood * np.float32(0.9),
        relief=0.03 * pen.scale,
    )


_DRAWERS: dict[str, Callable[[_Pen], None]] = {
    "Tree": _tree, "Bush": _bush, "Bench": _bench, "Street light": _street_light, "Car": _car, "Flowerpot": _flowerpot,
    "Waste container": _waste_container, "Bollard": _bollard, "Dog": _dog, "Couch": _couch, "Bookcase": _bookcase,
    "Houseplant": _houseplant, "Lamp": _lamp, "Table": _table, "Chair": _chair,
}  # fmt: skip
