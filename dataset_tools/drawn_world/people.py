"""People: how they look, how they stand and move, and how they are drawn.

Lengths are in units of the person's height unless a name says metres or pixels.
"""

# ruff: noqa: RUF005 (arrays are added here, not lists)
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from dataset_tools.drawn_world.places import Kind, Stage
from dataset_tools.drawn_world.sheet import (
    CLOTH,
    DENIM,
    HAIR,
    SHOES,
    SKIN,
    WHITE,
    Array,
    Pattern,
    Sheet,
    capsule,
    checks,
    dots,
    draw_lot,
    ellipse,
    hexes,
    loft,
    mix,
    on_circle,
    pick,
    rectangle,
    rgb,
    smooth,
    stripes,
    tube,
    xy,
)
from dataset_tools.schema import KEYPOINTS, PARSING_LABELS

THING = 255
"""Sheet label of what a person holds: part of the person's mask; the LIP label set has no name for it."""
_TOP_LABELS = {
    "tee": "Upper-clothes", "long": "Upper-clothes", "tank": "Upper-clothes", "jacket": "Coat", "coat": "Coat",
    "dress": "Dress",
}  # fmt: skip
_LABEL = {name: index for index, name in enumerate(PARSING_LABELS["lip"])} | {"thing": THING}


@dataclass(frozen=True)
class Look:
    category: str
    tall: float
    """Height in metres."""
    head: float
    """Height of the head."""
    build: float
    skin: Array
    hair: str
    hair_colour: Array
    beard: bool
    hat: str
    glasses: str
    top: str
    """``tee``, ``long``, ``tank``, ``jacket``, ``coat`` or ``dress``."""
    top_colour: Array
    inner_colour: Array
    top_pattern: int
    second_colour: Array
    bottom: str
    """``trousers``, ``shorts``, ``skirt`` or ``none`` (under a dress)."""
    bottom_colour: Array
    leggings: bool
    shoes: Array
    socks: Array | None
    scarf: Array | None

    @property
    def female(self) -> bool:
        return self.category in ("Woman", "Girl")

    @property
    def child(self) -> bool:
        return self.category in ("Boy", "Girl")

    @property
    def sleeves(self) -> bool:
        """Down to the wrists."""
        return self.top in ("long", "jacket", "coat")


_HER_TOPS = {"tee": 0.26, "long": 0.22, "tank": 0.1, "jacket": 0.12, "coat": 0.06, "dress": 0.24}
_HIS_TOPS = {"tee": 0.38, "long": 0.32, "jacket": 0.18, "coat": 0.08, "tank": 0.04}
_HER_BOTTOMS = {"trousers": 0.5, "shorts": 0.15, "skirt": 0.35}
_HIS_BOTTOMS = {"trousers": 0.76, "shorts": 0.24}
_HER_HAIR = ("long", "bob", "bun", "ponytail", "short", "afro")
_HIS_HAIR = ("short", "short", "buzz", "curly", "bald", "afro")
_GLASSES_OUTDOORS = {"": 0.78, "sun": 0.14, "clear": 0.08}
_GLASSES_INDOORS = {"": 0.78, "sun": 0.02, "clear": 0.2}


def dress_up(rng: np.random.Generator, category: str, kind: Kind) -> Look:
    female, child = category in ("Woman", "Girl"), category in ("Boy", "Girl")
    outdoors = kind != "room"
    top = draw_lot(rng, _HER_TOPS if female else _HIS_TOPS)
    if not outdoors and top == "coat":
        top = "long"
    bottom = draw_lot(rng, _HER_BOTTOMS if female else _HIS_BOTTOMS)
    if top == "dress":
        bottom = "none"
    top_colour = pick(rng, CLOTH)
    second = pick(rng, CLOTH)
    if np.abs(second - top_colour).sum() < 0.5:
        second = rgb("f3f0e8" if top_colour.mean() < 0.6 else "25325e")
    bottom_colour = pick(rng, CLOTH if bottom == "skirt" else DENIM)
    if np.abs(bottom_colour - top_colour).sum() < 0.35:
        bottom_colour = rgb("24272d" if top_colour.mean() > 0.4 else "b8a888")
    hair = str(rng.choice(_HER_HAIR if female else _HIS_HAIR))
    if child and hair == "bald":
        hair = "short"
    hats = ["cap", "beanie", "sunhat"] if outdoors else ["cap"]
    hat = str(rng.choice(hats)) if rng.random() < (0.26 if outdoors else 0.05) and hair != "afro" else ""
    skin = pick(rng, SKIN, 0.012)
    hair_colour = pick(rng, HAIR if not child else HAIR[:8], 0.015)
    if skin.mean() < 0.45:
        hair_colour = pick(rng, HAIR[:3], 0.01)
    return Look(
        category=category,
        tall=rng.uniform(1.0, 1.38) if child else rng.normal(1.67 if female else 1.78, 0.055),
        head=rng.uniform(0.178, 0.2) if child else rng.uniform(0.142, 0.152),
        build=float(np.clip(rng.normal(1.0, 0.09), 0.84, 1.25)),
        skin=skin,
        hair=hair,
        hair_colour=hair_colour,
        beard=category == "Man" and rng.random() < 0.3,
        hat=hat,
        glasses=draw_lot(rng, _GLASSES_OUTDOORS if outdoors else _GLASSES_INDOORS),
        top=top,
        top_colour=top_colour,
        inner_colour=pick(rng, hexes("f3f0e8", "d9d2c4", "24272d", "9aa3ab", "e79b3c", "3d8fd1")),
        top_pattern=0 if top in ("jacket", "coat") else int(rng.choice(5, p=[0.46, 0.22, 0.12, 0.1, 0.1])),
        second_colour=second,
        bottom=bottom,
        bottom_colour=bottom_colour,
        leggings=bool(bottom in ("skirt", "none") and rng.random() < 0.3),
        shoes=pick(rng, SHOES),
        socks=pick(rng, hexes("f2efe9", "24272d", "b03a34", "33507a")) if rng.random() < 0.5 else None,
        scarf=pick(rng, CLOTH) if outdoors and rng.random() < 0.1 else None,
    )


@dataclass(frozen=True)
class Figure:
    """One person to be drawn: who, where, how turned, doing what."""

    look: Look
    x: float
    """Metres to the right of the camera."""
    z: float
    """Metres from the camera."""
    yaw: float
    """Turn in radians: 0 faces the viewer, pi / 2 faces the picture's right."""
    head_yaw: float
    act: str
    reach: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """Hand (``left``, ``right``) to a place in metres: to the right, up and towards the viewer of the person's foot."""


def _bend(start: Array, target: Array, first: float, second: float, pole: Array) -> tuple[Array, Array]:
    """Two-bone inverse kinematics: the middle joint, bent towards ``pole``, and the end within reach."""
    delta = target - start
    distance = float(np.linalg.norm(delta))
    length = float(np.clip(distance, abs(first - second) + 1e-3, (first + second) * 0.998))
    along = delta / max(distance, 1e-6)
    side = pole - np.dot(pole, along) * along
    side = side / max(float(np.linalg.norm(side)), 1e-6)
    share = (first * first - second * second + length * length) / (2 * length)
    return start + along * share + side * np.sqrt(max(0.0, first * first - share * share)), start + along * length


_Point = tuple[float, float, float]
_Arm = Callable[[], tuple[_Point, _Point]]


def _arm(act: str, *, s: int, busy: bool, swing: float, torso: float, half: float, rng: np.random.Generator) -> Array:
    """Where the wrist goes from the shoulder, and where the elbow points, as (2, 3): outwards, up and forwards.

    Args:
        s: 1 is the left arm, -1 the right.
        busy: whether this is the arm that does what only one does.
        half: from the neck to the shoulder.
    """
    upper, lower = torso * 0.56, torso * 0.5
    hang = (rng.uniform(0.02, 0.06), -(upper + lower) * 0.985, rng.uniform(0.0, 0.04)), (0.35, 0.0, -1.0)
    both: dict[str, _Arm] = {
        "walk": lambda: ((0.035, -upper - lower * 0.88, swing), (0.35, 0.0, -1.0)),
        "run": lambda: ((0.0, -0.13 - 0.04 * (swing > 0), swing * 1.6), (0.4, -0.6, -1.0)),
        "hips": lambda: ((0.005, -torso * 0.86, 0.05), (1.0, 0.0, -0.45)),
        "crossed": lambda: ((-0.13, -0.15 + 0.02 * s, 0.1), (1.0, -1.0, 0.1)),
        "cheer": lambda: ((rng.uniform(0.06, 0.16), 0.26, 0.02), (1.0, -0.3, 0.0)),
        "ball": lambda: ((-0.02, -0.17, 0.17), (1.0, -0.6, -0.4)),
        "pocket": lambda: ((0.035, -torso * 0.98, 0.045), (1.0, 0.0, -0.6)),
        "sit": lambda: ((0.0, -torso * 0.78, 0.16), (0.8, -0.4, -0.8)),
    }
    one: dict[str, _Arm] = {
        "wave": lambda: ((rng.uniform(0.08, 0.16), rng.uniform(0.14, 0.22), 0.06), (1.0, -0.7, 0.0)),
        "look": lambda: ((-0.05, -0.1, 0.17), (0.7, -1.0, 0.0)),
        "cup": lambda: ((-0.05, -0.1, 0.17), (0.7, -1.0, 0.0)),
        "call": lambda: ((-(half - 0.084), 0.085, -0.005), (1.0, -0.9, 0.2)),
        "umbrella": lambda: ((-0.01, -0.1, 0.15), (0.6, -1.0, -0.2)),
        "balloon": lambda: ((-0.01, -0.1, 0.15), (0.6, -1.0, -0.2)),
        "point": lambda: ((0.26, rng.uniform(-0.03, 0.08), 0.1), (0.0, -1.0, -0.3)),
    }
    relaxed: _Point = (0.03, -upper - lower * 0.9, 0.03)
    other: dict[str, _Arm] = dict.fromkeys(("bag", "backpack", "balloon", "cup"), lambda: (relaxed, (0.35, 0.0, -1.0)))
    chosen = both.get(act) or (one if busy else other).get(act)
    return np.array(chosen() if chosen else hang)


def _pose(figure: Figure, rng: np.random.Generator) -> dict[str, Array]:
    """Joints in the person's own axes: x to their left, y up from the ground, z forwards."""
    look, act = figure.look, figure.act
    neck_y = 1 - look.head - 0.025
    torso = 0.295 if look.child else 0.302
    hip_y = neck_y - torso
    leg = hip_y - 0.045
    pelvis = np.array([rng.normal(0, 0.008), hip_y, 0.0])
    lean = rng.normal(0.0, 0.012)
    stance = rng.uniform(0.045, 0.07)
    ankles = {s: np.array([s * stance, 0.045, rng.normal(0, 0.015)]) for s in (-1, 1)}
    ahead = 1 if rng.random() < 0.5 else -1
    if act == "walk":
        stride = rng.uniform(0.11, 0.16)
        ankles = {ahead: np.array([ahead * 0.035, 0.05, stride]), -ahead: np.array([-ahead * 0.035, 0.085, -stride])}
        pelvis[1] -= 0.018
        lean += 0.015
    elif act == "run":
        ankles = {ahead: np.array([ahead * 0.035, 0.13, 0.17]), -ahead: np.array([-ahead * 0.03, 0.2, -0.2])}
        pelvis[1] += 0.005
        lean += 0.06
    elif act == "sit":
        pelvis[1] = 0.46 / look.tall + 0.04
        ankles = {s: np.array([s * rng.uniform(0.05, 0.09), 0.045, rng.uniform(0.22, 0.3)]) for s in (-1, 1)}
        lean -= 0.02
    else:
        pelvis[0] += ahead * rng.uniform(0, 0.02)
    neck = pelvis + [rng.normal(0, 0.008), torso, lean]
    joints = {"pelvis": pelvis, "neck": neck, "head": neck + [0, 0.025 + look.head / 2, 0.012 + lean * 0.4]}
    half = (0.09 if not look.female else 0.08) * (0.93 if look.child else 1) * (0.4 + 0.6 * look.build)
    for s, name in ((1, "left"), (-1, "right")):
        hip = pelvis + [s * 0.05 * look.build, 0, 0]
        knee, ankle = _bend(hip, ankles[s], leg * 0.51, leg * 0.505, np.array([s * 0.25, 0.0, 1.0]))
        shoulder = neck + [s * half, -0.036, 0]
        busy = s == (1 if figure.head_yaw - figure.yaw > 0 else -1)
        swing = -0.11 if ahead == s else 0.11
        target, pole = _arm(act, s=s, busy=busy, swing=swing, torso=torso, half=half, rng=rng) * [s, 1, 1]
        wrist_goal = shoulder + target
        if name in figure.reach:
            right, up, near = (v / look.tall for v in figure.reach[name])
            sine, cosine = np.sin(figure.yaw), np.cos(figure.yaw)
            wrist_goal = np.array([right * cosine - near * sine, up, right * sine + near * cosine])
            pole = np.array([s * 0.6, -1.0, -0.2])
        elbow, wrist = _bend(shoulder, wrist_goal, torso * 0.56, torso * 0.5, pole)
        hand = wrist + (wrist - elbow) / max(float(np.linalg.norm(wrist - elbow)), 1e-6) * 0.035
        parts = {"hip": hip, "knee": knee, "ankle": ankle, "shoulder": shoulder}
        parts |= {"elbow": elbow, "wrist": wrist, "hand": hand}
        joints |= {f"{name}_{part}": point for part, point in parts.items()}
    if act not in ("sit", "run"):  # whoever bends a knee still stands on the ground
        lowest = min(joints["left_ankle"][1], joints["right_ankle"][1]) - 0.045
        joints = {name: point - [0, lowest, 0] for name, point in joints.items()}
    return joints


_TRUNKS: dict[str, list[_Point]] = {
    # t along the spine, half width and half depth, from top to bottom
    "child": [
        (1.06, 0.035, 0.035), (0.98, 0.08, 0.05), (0.9, 0.1, 0.062), (0.65, 0.095, 0.07), (0.3, 0.092, 0.072),
        (0.0, 0.094, 0.07),
    ],
    "woman": [
        (1.05, 0.03, 0.03), (0.98, 0.075, 0.045), (0.9, 0.093, 0.055), (0.68, 0.088, 0.078), (0.36, 0.07, 0.056),
        (0.08, 0.092, 0.068), (-0.08, 0.096, 0.07),
    ],
    "man": [
        (1.05, 0.035, 0.032), (0.98, 0.088, 0.05), (0.9, 0.11, 0.06), (0.68, 0.106, 0.07), (0.3, 0.086, 0.062),
        (0.0, 0.088, 0.064),
    ],
}  # fmt: skip
_HAIR_CAPS = {"buzz": (1.0, 0.1), "short": (1.09, 0.28), "curly": (1.1, 0.2), "afro": (1.12, 0.1)}
"""How much wider than the skull, and how far below its middle they reach."""
_BACK_HAIR: dict[str, list[_Point]] = {
    # how far it swings out when the head turns, height from the middle of the head and half width in half heads
    "long": [(0.6, -0.9, 0.55), (0.8, -0.2, 0.98), (1, 0.7, 1.0), (1.1, 2.0, 0.8)],
    "bob": [(0.6, -0.9, 0.6), (0.8, -0.2, 1.0), (1, 0.9, 0.98)],
}


class Puppet:
    """Draws one figure: projects its joints, sorts its parts by depth and paints them from back to front."""

    def __init__(self, stage: Stage, figure: Figure, rng: np.random.Generator) -> None:
        self.figure, self.look, self.rng = figure, figure.look, rng
        camera = stage.camera
        self.h = camera.scale(figure.z) * figure.look.tall
        """Pixels of the person's height."""
        self.half_head = figure.look.head / 2 * self.h
        """Pixels of half the head's height."""
        self.foot = camera.at(figure.x, 0, figure.z)
        self.joints = _pose(figure, rng)
        self.front, self.turn = float(np.cos(figure.yaw)), float(np.sin(figure.yaw))
        """How far the body faces the viewer and the picture's right, -1..1."""
        self.head_front, self.head_turn = float(np.cos(figure.head_yaw)), float(np.sin(figure.head_yaw))
        self.head = self.at(self.joints["head"])
        """Pixels of the head's middle."""
        wide, deep = figure.look.head / 2 * 0.8, figure.look.head / 2 * 0.88
        self.head_wide = float(np.hypot(wide * self.head_front, deep * self.head_turn)) * self.h
        """Pixels of half the head's width as seen."""
        self.sheet = stage.sheet(*self._bounds(), fineness=2)
        self.parts: list[tuple[float, Callable[[], None]]] = []
        self.spin = rng.uniform(-0.12, 0.12)
        look = self.look
        unit = self.h * (1.3 if look.child else 1)
        self.pattern: Pattern | None = {
            1: stripes(look.second_colour, 0.05 * unit, np.pi / 2 + self.spin),
            2: checks(look.second_colour, 0.045 * unit),
            3: dots(look.second_colour, 0.045 * unit),
            4: stripes(look.second_colour, 0.034 * unit, self.spin, 0.35),
        }.get(look.top_pattern)

    def _bounds(self) -> tuple[float, float, float, float]:
        points = np.array([self.at(p) for p in self.joints.values()])
        low, high = points.min(0) - 0.16 * self.h, points.max(0) + 0.13 * self.h
        beside, above = {"umbrella": (0.22, 0.3), "balloon": (0.12, 0.45)}.get(self.figure.act, (0.0, 0.0))
        low, high = low - [beside * self.h, above * self.h], high + [beside * self.h, 0]
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])

    def at(self, point: Array) -> Array:
        """A point in the person's axes to picture pixels; what is nearer stands a little lower."""
        x = point[0] * self.front + point[2] * self.turn
        return self.foot + np.array([x, -point[1] + 0.13 * self.depth(point)]) * self.h

    def depth(self, point: Array) -> float:
        """How far towards the viewer."""
        return float(-point[0] * self.turn + point[2] * self.front)

    def wide(self, front: float, side: float) -> float:
        """Half width in pixels of an upright ellipse that is ``front`` wide and ``side`` deep."""
        return float(np.hypot(front * self.front, side * self.turn)) * self.h

    def paint(self, shapes: list[Array], colour: Array, label: str, thick: float, **more: Any) -> None:
        """``thick``: relief in units of height."""
        options = {"relief": max(1.0, thick * self.h), "strength": 0.34, "contact": 0.28}
        self.flat(shapes, colour, label, **options | more)

    def flat(self, shapes: list[Array], colour: Array, label: str, **more: Any) -> None:
        self.sheet.paint(shapes, colour, label=_LABEL[label], **more)

    def draw(self) -> Sheet:
        """Paint everything."""
        for name in ("left", "right"):
            self._leg(name)
            self._arm(name)
        self.parts.append((0.0, self._body))
        self._head()
        self._things()
        for _, part in sorted(self.parts, key=lambda p: p[0]):
            part()
        return self.sheet

    def keypoints(self) -> dict[str, tuple[Array, float]]:
        """OpenPose joints: picture pixels and how surely they are seen of themselves (0 when turned away)."""
        joints, turned = self.joints, abs(self.turn) > 0.55
        found: dict[str, tuple[Array, float]] = {}
        middle = (joints["left_shoulder"] + joints["right_shoulder"]) / 2
        found["neck"] = self.at(middle), 1.0
        for name, point in joints.items():
            if name in KEYPOINTS and name != "neck":
                found[name] = self.at(point), 0.6 if turned and self.depth(point) < -0.02 else 1.0
        for name, place in {
            "nose": (0, -0.14, 1.0), "left_eye": (0.36, 0.06, 0.9), "right_eye": (-0.36, 0.06, 0.9),
            "left_ear": (0.97, -0.05, -0.1), "right_ear": (-0.97, -0.05, -0.1),
        }.items():  # fmt: skip
            point, near = self._on_head(*place)
            found[name] = point, 1.0 if near > (0.12 if "ear" not in name else -0.35) else 0.0
        return found

    # Legs

    def _leg(self, side: str) -> None:
        joints, look = self.joints, self.look
        hip, knee, ankle = (joints[f"{side}_{part}"] for part in ("hip", "knee", "ankle"))
        depth = (self.depth(hip) + self.depth(knee) + self.depth(ankle)) / 3
        shin = knee + (ankle - knee) * 0.3
        places = [self.at(p) for p in (hip, knee, shin, ankle)]
        build = look.build * self.h * (1.08 if look.child else 1.0)
        shade = 0.9 if depth < -0.03 else 1.0

        def part() -> None:
            if look.bottom != "trousers":
                colour = look.bottom_colour * 0.5 if look.leggings else look.skin
                bare = tube(places, (0.051, 0.034, 0.036, 0.021), build)
                self.paint(bare, colour * shade, "Pants" if look.leggings else f"{side.capitalize()}-leg", 0.03)
                if look.socks is not None:
                    low = places[3] + (places[2] - places[3]) * 0.3
                    self.paint(
                        tube((low, places[3]), (0.026, 0.023), build), look.socks * shade, "Socks", 0.02, contact=0
                    )
            self._shoe(side, shade)
            cloth = look.bottom_colour * shade
            if look.bottom == "trousers":
                self.paint(tube(places, (0.056, 0.043, 0.042, 0.036), build), cloth, "Pants", 0.038, contact=0.2)
            elif look.bottom == "shorts":
                hem = places[0] + (places[1] - places[0]) * 0.82
                self.paint(tube((places[0], hem), (0.06, 0.056), build), cloth, "Pants", 0.038)
            elif self.figure.act == "sit":
                lap, dress = tube(places[:2], (0.07, 0.06), build), look.top == "dress"
                self.paint(lap, look.top_colour * shade if dress else cloth, "Dress" if dress else "Skirt", 0.04)

        upfront = 0.0 if self.figure.act == "sit" else -0.3
        self.parts.append((depth + upfront, part))

    def _shoe(self, side: str, shade: float) -> None:
        ankle = self.joints[f"{side}_ankle"]
        outward = 0.012 * (1 if side == "left" else -1)
        lift = max(0.0, float(ankle[1]) - 0.05)
        heel = ankle + [0, -0.026, -0.018]
        toe = ankle + [outward, -0.03 - 0.5 * lift, 0.066]
        size = self.h * (1.15 if self.look.child else 1.0)
        shapes = tube((self.at(heel), self.at(toe)), (0.024, 0.021), size)
        shapes += tube((self.at(ankle), self.at(heel)), (0.024, 0.024), size)
        self.paint(shapes, self.look.shoes * shade, f"{side.capitalize()}-shoe", 0.018, contact=0.1)

    # Trunk

    def _spine(self, t: float) -> Array:
        """A point of the trunk: 0 at the pelvis, 1 at the neck."""
        return self.at(self.joints["pelvis"] + (self.joints["neck"] - self.joints["pelvis"]) * t)

    def _outline(self, levels: Sequence[_Point], grow: float = 1.0) -> Array:
        """Silhouette from (t along the spine, half width, half depth) from top to bottom."""
        build = self.look.build * grow
        centres = np.array([self._spine(t) for t, _, _ in levels])
        return loft(centres, np.array([self.wide(a * build, b * build) for _, a, b in levels]))

    def _trunk(self, low: float) -> list[_Point]:
        """Levels of the trunk for `_outline`, down to ``low``."""
        levels = _TRUNKS["child" if self.look.child else "woman" if self.look.female else "man"]
        kept = [level for level in levels if level[0] > low]
        return [*kept, (low, levels[-1][1], levels[-1][2])]

    def _body(self) -> None:
        look = self.look
        self._hips()
        if look.top == "dress":
            self._dress()
        elif look.top in ("jacket", "coat"):
            self._jacket()
        else:
            hem = 0.12 if look.bottom == "skirt" else 0.03 if look.tall * 29 % 1 < 0.4 else -0.14
            shirt = self._outline(self._trunk(hem), 1.02)
            self.paint([shirt], look.top_colour, "Upper-clothes", 0.06, pattern=self.pattern)
            if look.top == "tank":
                collar = [self._outline([(1.06, 0.034, 0.034), (0.94, 0.05, 0.045), (0.86, 0.03, 0.03)])]
                self.flat(collar, look.skin, "Face")
        if self.figure.act == "backpack" and self.front > 0.25:
            for s in (-1, 1):
                x = np.array([s * 0.062, 0, 0])
                high = self.at(self.joints["neck"] + x * 0.8 + [0, -0.015, 0.03])
                low = self.at(self.joints["neck"] + x * 1.15 + [0, -0.17, 0.04])
                self.flat(tube((high, low), (0.011, 0.011), self.h), look.second_colour * 0.8, "thing")

    def _hips(self) -> None:
        look = self.look
        if look.bottom in ("trousers", "shorts"):
            outline = self._outline([(0.16, 0.084, 0.062), (0.0, 0.092, 0.068), (-0.16, 0.085, 0.066)])
            self.paint([outline], look.bottom_colour, "Pants", 0.05, contact=0.0)
        elif look.bottom == "skirt" and self.figure.act == "sit":
            outline = self._outline([(0.24, 0.072, 0.058), (0.0, 0.1, 0.075), (-0.1, 0.1, 0.075)])
            self.paint([outline], look.bottom_colour, "Skirt", 0.05)
        elif look.bottom == "skirt":
            hem = -0.42 - 0.5 * (look.tall * 7 % 1)
            flare = 0.13 + 0.05 * (look.tall * 13 % 1)
            half_way = (hem * 0.5, (0.098 + flare) / 2, 0.095)
            skirt = [(0.24, 0.072, 0.058), (0.05, 0.098, 0.075), half_way, (hem, flare, flare * 0.85)]
            pleats = stripes(look.bottom_colour * 0.86, 0.035 * self.h, self.spin * 0.5, 0.4)
            pattern = pleats if look.tall * 17 % 1 < 0.5 else None
            self.paint([self._outline(skirt)], look.bottom_colour, "Skirt", 0.06, pattern=pattern)

    def _dress(self) -> None:
        look = self.look
        shape = [*self._trunk(0.3)[:-1], (0.04, 0.094, 0.072)]
        if self.figure.act == "sit":
            shape += [(-0.1, 0.1, 0.075)]
        else:
            hem = -0.5 - 0.55 * (look.tall * 7 % 1)
            shape += [(hem * 0.5, 0.125, 0.105), (hem, 0.165, 0.14)]
        self.paint([self._outline(shape)], look.top_colour, "Dress", 0.06, pattern=self.pattern)
        belt = self._outline([(0.36, 0.073, 0.058), (0.3, 0.075, 0.06)], 1.02)
        self.flat([belt], look.second_colour, "Dress", opacity=0.8)

    def _jacket(self) -> None:
        look = self.look
        self.paint([self._outline(self._trunk(0.02))], look.inner_colour, "Upper-clothes", 0.06)
        long = look.top == "coat" and self.figure.act != "sit"
        hem, wide = (-0.72, 0.125) if long else (-0.14, 0.112)
        shape = [(1.06, 0.05, 0.05), *self._trunk(0.3)[1:-1], (0.05, 0.102, 0.08), (hem, wide, 0.09)]
        opening: list[Array] = []
        if self.front > 0.15:
            shift = self.turn * 0.055 * self.h
            gap = 0.03 * self.h * self.front * look.build
            edges = ((1.08, 1.5), (0.35, 0.55), (hem - 0.1, 1.1))
            left = [self._spine(t) + [shift - gap * share, 0] for t, share in edges]
            right = [self._spine(t) + [shift + gap * share, 0] for t, share in edges]
            opening = [np.stack([left[0], *right, left[2], left[1]])]
        self.paint([self._outline(shape, 1.04)], look.top_colour, "Coat", 0.06, erase=opening)

    def _arm(self, side: str) -> None:
        joints, look = self.joints, self.look
        shoulder, elbow, wrist, hand = (joints[f"{side}_{part}"] for part in ("shoulder", "elbow", "wrist", "hand"))
        depth = (self.depth(shoulder) + self.depth(elbow) + 2 * self.depth(wrist)) / 4
        places = [self.at(p) for p in (shoulder, elbow, wrist)]
        build = self.h * (0.5 + 0.5 * look.build) * (1.08 if look.child else 1.0)
        limb = f"{side.capitalize()}-arm"
        shade = 0.88 if depth < -0.05 else 1.0
        facing_away = self.front < 0

        def part() -> None:
            self.paint(tube((places[2], self.at(hand)), (0.019, 0.022), build), look.skin * shade, limb, 0.018)
            sleeve, label = look.top_colour * shade, _TOP_LABELS[look.top]
            if look.sleeves:
                long = tube(places, (0.036, 0.034, 0.028), build)
                self.paint(long, sleeve, label, 0.028, pattern=self.pattern, contact=0.18)
                return
            self.paint(tube(places, (0.032, 0.027, 0.019), build), look.skin * shade, limb, 0.025)
            if look.top != "tank":
                cuff = places[0] + (places[1] - places[0]) * (0.62 if look.top == "tee" else 0.4)
                short = tube((places[0], cuff), (0.036, 0.037), build)
                self.paint(short, sleeve, label, 0.028, pattern=self.pattern, contact=0.12)

        # Hanging arms lie beside the trunk: seen from the front over it, unless the body is turned.
        self.parts.append((depth + (0.03 if not facing_away else 0.02), part))

    # Head

    def _on_head(self, x: float, y: float, z: float) -> tuple[Array, float]:
        """A place on the head in units of its half height: picture pixels, and how much it faces the viewer."""
        front, turn = self.head_front, self.head_turn
        across = x * 0.8 * front + z * 0.88 * turn
        near = -x * 0.8 * turn + z * 0.88 * front
        return self.head + np.array([across, -y + 0.1 * near]) * (self.look.head / 2) * self.h, near

    def _skull(self, grow: float, bottom: float = 1.0, rise: float = 0.0) -> Array:
        """Outline of the head, ``grow`` times as large, cut off ``bottom`` half heights below its middle."""
        angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        down = np.sin(angle)
        half = self.half_head
        chin = 1 - 0.2 * np.clip(down, 0, 1) ** 1.5
        if 0 < bottom < 1:  # a rounded nape
            down = np.where(down > 0, bottom * np.tanh(1.4 * down / bottom), down)
        shape = np.stack([np.cos(angle) * self.head_wide * chin, np.minimum(down, bottom) * half], 1) * grow
        return self.head + shape - [0, rise * half]

    def _head(self) -> None:
        front = self.head_front
        self.parts.append((-0.5 if front > -0.2 else 0.06, self._back_hair))
        self.parts += [(0.012, self._neck), (0.03, self._face)]
        self.parts.append((-0.4 if front > 0.3 else (0.07 if front < -0.3 else 0.025), self._tail))

    def _back_hair(self) -> None:
        look, half, centre = self.look, self.half_head, self.head
        colour = look.hair_colour * (0.82 if self.head_front > -0.2 else 1.0)
        if look.hair == "afro":
            ring = [np.array([np.cos(a) * 0.75, np.sin(a) * 0.7 - 0.35]) for a in np.arange(0, 6.2, 0.7)]
            self.paint([ellipse(centre + p * half, 0.62 * half, 0.6 * half) for p in ring], colour, "Hair", 0.04)
        elif look.hair in _BACK_HAIR:
            shift = np.array([-self.head_turn * 0.3 * half, 0])
            levels = np.array([centre + shift * k + [0, y * half] for k, y, _ in _BACK_HAIR[look.hair]])
            wide = np.array([wide for _, _, wide in _BACK_HAIR[look.hair]]) * half
            self.paint([loft(levels, wide)], colour, "Hair", 0.03)

    def _tail(self) -> None:
        look, half = self.look, self.half_head
        if look.hair == "ponytail":
            ends = [self._on_head(0, y, z)[0] for y, z in ((0.25, -0.95), (-0.2, -1.35), (-1.1, -1.3))]
            self.paint(tube(ends, (0.3, 0.3, 0.12), half), look.hair_colour, "Hair", 0.02)
        elif look.hair == "bun":
            bun = ellipse(self._on_head(0, 0.85, -0.6)[0], 0.42 * half, 0.4 * half)
            self.paint([bun], look.hair_colour, "Hair", 0.02)

    def _neck(self) -> None:
        look, h = self.look, self.h
        base = self._spine(0.99)
        top = self.head + [-self.head_turn * 0.1 * self.half_head, 0.55 * self.half_head]
        wide = (0.028 if look.female or look.child else 0.034) * h * look.build
        if look.sleeves:
            collar = ellipse(self._spine(1.03), self.wide(0.044, 0.042), 0.016 * h)
            self.paint([collar], look.top_colour * 0.9, _TOP_LABELS[look.top], 0.01, contact=0.0)
        self.paint([capsule(base, top, wide, wide)], look.skin * 0.9, "Face", 0.03, contact=0.15)
        if look.scarf is not None:
            self.paint([ellipse(self._spine(1.05), self.wide(0.062, 0.06), 0.03 * h)], look.scarf, "Scarf", 0.02)
            if self.head_front > 0:
                high, low = self._spine(1.03) + [0.02 * h, 0], self._spine(0.72) + [0.025 * h, 0]
                self.paint(tube((high, low), (0.02, 0.024), h), look.scarf, "Scarf", 0.02)

    def _face(self) -> None:
        look, half = self.look, self.half_head
        for s in (-1, 1):
            ear, near = self._on_head(s * 0.98, -0.05, -0.1)
            if near > -0.35:
                self.paint([ellipse(ear, 0.16 * half, 0.24 * half)], look.skin * 0.95, "Face", 0.01, contact=0)
        self.paint([self._skull(0.97)], look.skin, "Face", 0.05, strength=0.26, contact=0.3)
        for s in (-1, 1):
            self._eye(s)
        self._nose_and_mouth()
        self._hair_cap()
        self._hat()

    def _eye(self, s: int) -> None:
        """The eye of one side, with brow, cheek and glasses; nothing where the face is turned away."""
        look, half = self.look, self.half_head
        eye, near = self._on_head(s * 0.36, 0.06, 0.9)
        if near < 0.12:
            return
        squeeze = 0.45 + 0.55 * min(1.0, near)

        def oval(centre: Array, x: float, y: float) -> Array:
            return ellipse(centre, x * half * squeeze, y * half)

        if half > 9:
            self.flat([oval(eye, 0.13, 0.085)], rgb("f7f4ee"), "Face")
        iris = ellipse(eye, max(0.75, 0.08 * half) * squeeze, max(0.85, 0.1 * half))
        self.flat([iris], rgb("1f1a17"), "Face")
        brow = self._on_head(s * 0.36, 0.32, 0.88)[0]
        reach = np.array([0.16 * half * squeeze, 0.03 * half * s])
        line = tube((brow - reach, brow + reach), (0.045, 0.045), half)
        self.flat(line, look.hair_colour * 0.8, "Face", opacity=0.85)
        cheek = self._on_head(s * 0.5, -0.3, 0.75)[0]
        self.sheet.paint([oval(cheek, 0.17, 0.13)], mix(look.skin, rgb("d8604f"), 0.5), opacity=0.35)
        if look.glasses == "sun":
            self.flat([oval(eye, 0.27, 0.2)], rgb("1c1f24"), "Sunglasses")
        elif look.glasses:
            self.flat([oval(eye, 0.27, 0.2)], rgb("24211f"), "Sunglasses", erase=[oval(eye, 0.2, 0.14)])

    def _nose_and_mouth(self) -> None:
        look, half = self.look, self.half_head
        nose, near = self._on_head(0, -0.14, 1.02)
        if near > 0.0 or (abs(self.head_turn) > 0.75 and near > -0.3):
            bridge = self._on_head(0, 0.05, 0.92)[0]
            self.paint(tube((bridge, nose), (0.04, 0.095), half), look.skin * 0.93, "Face", 0.008, contact=0.15)
        mouth, near = self._on_head(0, -0.5, 0.9)
        if near > 0.15:
            if look.beard:
                jaw = self._skull(0.99)
                low = self._on_head(0, -0.3, 0.5)[0][1]
                beard = np.stack([jaw[:, 0], np.maximum(jaw[:, 1], low)], 1)
                self.paint([beard], look.hair_colour, "Face", 0.03, contact=0)
            corner, lift = np.array([0.2 * half * min(1.0, near + 0.2), 0]), [0, 0.03 * half]
            places = [mouth - corner - lift, mouth + [0, 0.04 * half], mouth + corner - lift]
            smile = tube(places, (0.035, 0.055, 0.035), half)
            self.flat(smile, mix(look.skin * 0.42, rgb("b0473f"), 0.65), "Face")

    def _hair_cap(self) -> None:
        look, half, centre = self.look, self.half_head, self.head
        front, turn = self.head_front, self.head_turn
        if look.hair == "bald":
            return
        grow, bottom = _HAIR_CAPS.get(look.hair, (1.09, 0.42))
        if front < 0:
            bottom = max(bottom, 0.62)
        shapes = [self._skull(grow, bottom, 0.05)]
        if look.hair in ("curly", "afro"):
            size = (0.3 if look.hair == "curly" else 0.42) * half
            ring = [np.array([np.cos(a) * 0.82, np.sin(a) * 0.88 - 0.12]) for a in np.arange(3.3, 6.2, 0.45)]
            shapes += [ellipse(centre + place * half, size, size) for place in ring]
        open_face: list[Array] = []
        if front > -0.45:
            wide = self.head_wide
            share = 0.86 - 0.2 * abs(turn) if front > 0 else 0.66 * (1 + front / 0.45)
            offset = turn * (0.42 if front > 0 else 0.42 + 0.5 * -front / 0.45)
            hairline = 0.36 if look.hair == "buzz" else 0.3
            middle = centre + np.array([offset * wide, hairline * half])
            open_face = [ellipse(middle, wide * share, half * 0.88)]
            if look.female and look.hair in ("long", "bob") and front > 0.4:  # a parting
                side = 1 if look.tall * 31 % 1 < 0.5 else -1
                open_face = [ellipse(middle + [side * 0.1 * half, 0.06 * half], wide * share, half * 0.9)]
        self.paint(shapes, look.hair_colour, "Hair", 0.03, contact=0.18, erase=open_face)

    def _hat(self) -> None:
        look, half, centre = self.look, self.half_head, self.head
        if not look.hat:
            return
        colour = look.second_colour
        dome = self._skull(1.16, -0.22, 0.06)
        wide = np.ptp(dome[:, 0]) / 2
        rim = np.array([centre[0], dome[:, 1].max()])
        if look.hat == "beanie":
            self.paint([dome], colour, "Hat", 0.03)
            band = smooth(rim + rectangle(-wide, -0.18 * half, wide, 0.14 * half))
            self.paint([band], colour * 0.8, "Hat", 0.015)
            bobble = ellipse(centre - [0, 1.24 * half], 0.24 * half, 0.22 * half)
            self.paint([bobble], mix(colour, WHITE, 0.5), "Hat", 0.015)
        elif look.hat == "cap":
            self.paint([dome], colour, "Hat", 0.03)
            brim, near = self._on_head(0, 0.3, 1.35)
            if near > -0.3:
                tip = np.array([brim[0], rim[1] + 0.1 * half * near])
                peak = capsule(rim - [0, 0.02 * half], tip, 0.5 * wide * (0.5 + 0.5 * near), 0.16 * half)
                self.paint([peak], colour * 0.75, "Hat", 0.012)
        else:
            self.paint([ellipse(rim, wide * 1.75, 0.26 * half)], colour, "Hat", 0.015)
            self.paint([dome], colour, "Hat", 0.03, contact=0.1)
            ribbon = rim + rectangle(-wide * 0.97, -0.26 * half, wide * 0.97, -0.04 * half)
            self.flat([ribbon], look.inner_colour, "Hat", opacity=0.85)

    # What people carry

    def _things(self) -> None:
        act = self.figure.act
        side = "left" if self.figure.head_yaw - self.figure.yaw > 0 else "right"
        hand = self.joints[f"{side}_hand"]
        drawers: dict[str, Callable[[Array, Array, Array], None]] = {
            "umbrella": self._umbrella, "balloon": self._balloon, "ball": self._ball, "bag": self._bag,
            "look": self._phone, "call": self._phone, "cup": self._cup, "backpack": self._backpack,
        }  # fmt: skip
        colour, second = pick(self.rng, CLOTH), pick(self.rng, CLOTH)
        depth = self.depth(hand) + 0.04
        if act == "backpack":
            depth = -0.12 if self.front > 0 else 0.055
        if act in drawers:
            self.parts.append((depth, partial(drawers[act], self.at(hand), colour, second)))

    def _umbrella(self, hand: Array, colour: Array, second: Array) -> None:
        h, head = self.h, self.head
        tilt = np.array([self.rng.uniform(-0.06, 0.06) * h, 0.0])
        top = np.array([head[0] * 0.6 + hand[0] * 0.4, head[1] - 0.22 * h]) + tilt
        radius, rise = 0.3 * h, 0.17 * h
        stick = tube((hand + [0, 0.03 * h], top - [0, rise * 0.9]), (0.006, 0.005), h)
        self.flat(stick, rgb("2b2622"), "thing")
        dome = on_circle(np.linspace(np.pi, 2 * np.pi, 25)) * [radius, rise] + top
        steps = np.linspace(radius, -radius, 17)
        rim = np.stack([steps, -np.abs(np.sin(np.linspace(0, np.pi * 4, 17))) * rise * 0.16], 1) + top
        self.paint([np.concatenate([dome, rim])], colour, "thing", 0.09, strength=0.45)
        for low, high in ((-1.0, -0.52), (0.0, 0.52)):
            up = [(low * radius * np.cos(a), -np.sin(a) * rise) for a in np.linspace(0.15, 1.57, 8)]
            down = [(high * radius * np.cos(a), -np.sin(a) * rise) for a in np.linspace(1.57, 0.15, 8)]
            self.flat([xy((low * radius, 0), *up, *down, (high * radius, 0)) + top], second, "thing", opacity=0.85)

    def _balloon(self, hand: Array, colour: Array, _: Array) -> None:
        h = self.h
        middle = hand + np.array([self.rng.uniform(-0.1, 0.1), -self.rng.uniform(0.5, 0.62)]) * h
        self.flat(tube((hand, middle + [0, 0.11 * h]), (0.0035, 0.0035), h), rgb("5a5a5a"), "thing")
        self.paint([ellipse(middle, 0.085 * h, 0.105 * h)], colour, "thing", 0.06, strength=0.5)
        glint = ellipse(middle - [0.03 * h * -np.sign(self.sheet.sun[0]), 0.045 * h], 0.016 * h, 0.022 * h)
        self.flat([glint], WHITE, "thing", opacity=0.75)

    def _ball(self, _: Array, colour: Array, second: Array) -> None:
        middle = (self.at(self.joints["left_hand"]) + self.at(self.joints["right_hand"])) / 2
        radius = 0.115 / self.look.tall * self.h
        ball, pattern = ellipse(middle, radius, radius), stripes(second, radius * 1.1, 0.6)
        self.paint([ball], colour, "thing", radius / self.h * 0.8, strength=0.45, pattern=pattern)

    def _bag(self, hand: Array, colour: Array, second: Array) -> None:
        h = self.h
        wide, high = 0.15 / self.look.tall * h, 0.32 / self.look.tall * h
        top = hand + [0, 0.07 * h]
        handle = tube([top + [-wide * 0.6, 0], hand, top + [wide * 0.6, 0]], (0.007, 0.007, 0.007), h)
        self.flat(handle, colour * 0.6, "thing")
        bag = smooth(top + xy((-wide, 0), (wide, 0), (wide * 1.1, high), (-wide * 1.1, high)))
        self.paint([bag], colour, "thing", 0.035, pattern=stripes(second, high * 1.2, np.pi / 2, 0.3))

    def _phone(self, hand: Array, *_: Array) -> None:
        h = self.h
        tip = hand - [0, 0.015 * h]
        self.flat([smooth(tip + rectangle(-0.017, -0.034, 0.017, 0.03) * h)], rgb("15171b"), "thing")
        if self.front < 0 or self.figure.act == "look":
            self.flat([tip + rectangle(-0.01, -0.024, 0.01, 0.014) * h], rgb("9cc4e0"), "thing")

    def _cup(self, hand: Array, colour: Array, _: Array) -> None:
        cup = hand + xy((-0.018, -0.05), (0.018, -0.05), (0.014, 0.02), (-0.014, 0.02)) * self.h
        self.paint([cup], rgb("f2ede2"), "thing", 0.012)
        self.flat([hand + rectangle(-0.02, -0.06, 0.02, -0.048) * self.h], colour * 0.7, "thing")

    def _backpack(self, _: Array, __: Array, colour: Array) -> None:
        h = self.h
        middle = self.at(self.joints["neck"] + [0, -0.15, -0.09])
        wide = self.wide(0.085, 0.055)
        levels = np.array([middle + [0, y * h] for y in (-0.125, -0.09, 0.05, 0.11)])
        self.paint([loft(levels, np.array([0.6, 0.95, 1.0, 0.85]) * wide)], colour, "thing", 0.045)
        if self.front < -0.2:
            pocket = smooth(middle + rectangle(-wide * 0.7, 0.005 * h, wide * 0.7, 0.09 * h))
            self.paint([pocket], colour * 0.85, "thing", 0.02)
