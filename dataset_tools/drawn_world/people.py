"""People: how they look, how they stand and move, and how they are drawn.

Lengths are in units of the person's height unless a name says metres or pixels.
"""

# ruff: noqa: RUF005 (arrays are added here, not lists)
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dataset_tools.drawn_world.places import Kind, Stage
from dataset_tools.drawn_world.sheet import (
    CLOTH,
    DENIM,
    HAIR,
    SHOES,
    SKIN,
    Array,
    Pattern,
    Sheet,
    capsule,
    checks,
    dots,
    ellipse,
    hexes,
    loft,
    mix,
    pick,
    rectangle,
    smooth,
    stripes,
    tube,
    xy,
)
from dataset_tools.schema import KEYPOINTS, PARSING_LABELS

_LABEL = {name: index for index, name in enumerate(PARSING_LABELS["lip"])}
THING = 255
"""Sheet label of what a person holds: part of the person's mask; the LIP label set has no name for it."""


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


def dress_up(rng: np.random.Generator, category: str, kind: Kind) -> Look:
    female, child = category in ("Woman", "Girl"), category in ("Boy", "Girl")
    outdoors = kind != "room"
    top = str(
        rng.choice(["tee", "long", "tank", "jacket", "coat", "dress"], p=[0.26, 0.22, 0.1, 0.12, 0.06, 0.24])
        if female
        else rng.choice(["tee", "long", "jacket", "coat", "tank"], p=[0.38, 0.32, 0.18, 0.08, 0.04])
    )
    if not outdoors and top == "coat":
        top = "long"
    bottom = str(rng.choice(["trousers", "shorts", "skirt"], p=[0.5, 0.15, 0.35] if female else [0.76, 0.24, 0.0]))
    if top == "dress":
        bottom = "none"
    top_colour = pick(rng, CLOTH)
    second = pick(rng, CLOTH)
    if np.abs(second - top_colour).sum() < 0.5:
        second = hexes("f3f0e8")[0] if top_colour.mean() < 0.6 else hexes("25325e")[0]
    bottom_colour = pick(rng, CLOTH if bottom == "skirt" else DENIM)
    if np.abs(bottom_colour - top_colour).sum() < 0.35:
        bottom_colour = hexes("24272d")[0] if top_colour.mean() > 0.4 else hexes("b8a888")[0]
    hairs = (
        ["long", "bob", "bun", "ponytail", "short", "afro"]
        if female
        else ["short", "short", "buzz", "curly", "bald", "afro"]
    )
    hair = str(rng.choice(hairs))
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
        glasses=str(rng.choice(["", "sun", "clear"], p=[0.78, 0.14 if outdoors else 0.02, 0.08 if outdoors else 0.2])),
        top=top,
        top_colour=top_colour,
        inner_colour=pick(rng, hexes("f3f0e8", "d9d2c4", "24272d", "9aa3ab", "e79b3c", "3d8fd1")),
        top_pattern=int(rng.choice([0, 1, 2, 3, 4], p=[0.46, 0.22, 0.12, 0.1, 0.1]))
        if top not in ("jacket", "coat")
        else 0,
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


def _pose(figure: Figure, rng: np.random.Generator) -> dict[str, Array]:
    """Joints in the person's own axes: x to their left, y up from the ground, z forwards."""
    look, act = figure.look, figure.act
    neck_y = 1 - look.head - 0.025
    torso = 0.295 if look.child else 0.302
    hip_y = neck_y - torso
    leg = hip_y - 0.045
    sitting = act == "sit"
    pelvis = np.array([rng.normal(0, 0.008), hip_y, 0.0])
    lean = rng.normal(0.0, 0.012)
    stance = rng.uniform(0.045, 0.07)
    ankles = {s: np.array([s * stance, 0.045, rng.normal(0, 0.015)]) for s in (-1, 1)}
    knee_pole = {s: np.array([s * 0.25, 0.0, 1.0]) for s in (-1, 1)}
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
    elif sitting:
        pelvis[1] = 0.46 / look.tall + 0.04
        ankles = {s: np.array([s * rng.uniform(0.05, 0.09), 0.045, rng.uniform(0.22, 0.3)]) for s in (-1, 1)}
        lean -= 0.02
    else:
        pelvis[0] += ahead * rng.uniform(0, 0.02)
    neck = pelvis + [rng.normal(0, 0.008), torso, lean]
    joints = {"pelvis": pelvis, "neck": neck}
    half = (0.09 if not look.female else 0.08) * (0.93 if look.child else 1) * (0.4 + 0.6 * look.build)
    arm = torso * 0.56, torso * 0.5
    for s, name in ((1, "left"), (-1, "right")):
        hip = pelvis + [s * 0.05 * look.build, 0, 0]
        knee, ankle = _bend(hip, ankles[s], leg * 0.51, leg * 0.505, knee_pole[s])
        shoulder = neck + [s * half, -0.036, 0]
        joints |= {f"{name}_hip": hip, f"{name}_knee": knee, f"{name}_ankle": ankle, f"{name}_shoulder": shoulder}
        swing = -0.11 if ahead == s else 0.11
        hang = np.array([s * rng.uniform(0.02, 0.06), -(arm[0] + arm[1]) * 0.985, rng.uniform(0.0, 0.04)])
        target, pole = hang, np.array([s * 0.35, 0.0, -1.0])
        busy = s == (1 if figure.head_yaw - figure.yaw > 0 else -1)
        if act in ("walk", "bag", "backpack", "balloon", "cup") and not busy:
            target = np.array([s * 0.03, -arm[0] - arm[1] * 0.9, swing if act == "walk" else 0.03])
        if act == "walk":
            target = np.array([s * 0.035, -arm[0] - arm[1] * 0.88, swing])
        elif act == "run":
            target, pole = np.array([s * 0.0, -0.13 - 0.04 * (swing > 0), swing * 1.6]), np.array([s * 0.4, -0.6, -1.0])
        elif act == "hips":
            target, pole = np.array([s * 0.005, -torso * 0.86, 0.05]), np.array([s * 1.0, 0.0, -0.45])
        elif act == "crossed":
            target, pole = np.array([-s * 0.13, -0.15 + 0.02 * s, 0.1]), np.array([s * 1.0, -1.0, 0.1])
        elif act == "cheer":
            target, pole = np.array([s * rng.uniform(0.06, 0.16), 0.26, 0.02]), np.array([s * 1.0, -0.3, 0.0])
        elif act == "ball":
            target, pole = np.array([-s * 0.02, -0.17, 0.17]), np.array([s * 1.0, -0.6, -0.4])
        elif act == "pocket":
            target, pole = np.array([s * 0.035, -torso * 0.98, 0.045]), np.array([s * 1.0, 0.0, -0.6])
        elif sitting:
            target, pole = np.array([s * 0.0, -torso * 0.78, 0.16]), np.array([s * 0.8, -0.4, -0.8])
        elif busy and act == "wave":
            target, pole = (
                np.array([s * rng.uniform(0.08, 0.16), rng.uniform(0.14, 0.22), 0.06]),
                np.array([s * 1.0, -0.7, 0.0]),
            )
        elif busy and act in ("look", "cup"):
            target, pole = np.array([-s * 0.05, -0.1, 0.17]), np.array([s * 0.7, -1.0, 0.0])
        elif busy and act == "call":
            target, pole = np.array([-s * (half - 0.084), 0.085, -0.005]), np.array([s * 1.0, -0.9, 0.2])
        elif busy and act in ("umbrella", "balloon"):
            target, pole = np.array([-s * 0.01, -0.1, 0.15]), np.array([s * 0.6, -1.0, -0.2])
        elif busy and act == "point":
            target, pole = np.array([s * 0.26, rng.uniform(-0.03, 0.08), 0.1]), np.array([0.0, -1.0, -0.3])
        wrist_goal = shoulder + target
        if name in figure.reach:
            right, up, near = (v / look.tall for v in figure.reach[name])
            sine, cosine = np.sin(figure.yaw), np.cos(figure.yaw)
            wrist_goal = np.array([right * cosine - near * sine, up, right * sine + near * cosine])
            pole = np.array([s * 0.6, -1.0, -0.2])
        elbow, wrist = _bend(shoulder, wrist_goal, *arm, pole)
        joints |= {f"{name}_elbow": elbow, f"{name}_wrist": wrist}
        joints[f"{name}_hand"] = wrist + (wrist - elbow) / max(float(np.linalg.norm(wrist - elbow)), 1e-6) * 0.035
    joints["head"] = neck + [0, 0.025 + look.head / 2, 0.012 + lean * 0.4]
    if not sitting:  # whoever bends a knee still stands on the ground
        lowest = min(joints["left_ankle"][1], joints["right_ankle"][1]) - 0.045
        if act != "run":
            joints = {name: point - [0, lowest, 0] for name, point in joints.items()}
    return joints


class Puppet:
    """Draws one figure: projects its joints, sorts its parts by depth and paints them from back to front."""

    def __init__(self, stage: Stage, figure: Figure, rng: np.random.Generator) -> None:
        self.figure, self.look, self.rng = figure, figure.look, rng
        camera = stage.camera
        self.h = camera.scale(figure.z) * figure.look.tall
        """Pixels of the person's height."""
        self.foot = camera.project(xy((figure.x, 0, figure.z)))[0]
        self.joints = _pose(figure, rng)
        left, top, right, bottom = self.bounds()
        self.sheet = stage.sheet(left, top, right, bottom, fineness=2)
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

    def bounds(self) -> tuple[float, float, float, float]:
        points = np.array([self.at(p) for p in self.joints.values()])
        low, high = points.min(0) - 0.16 * self.h, points.max(0) + 0.13 * self.h
        if self.figure.act == "umbrella":
            low, high = low - [0.22 * self.h, 0.3 * self.h], high + [0.22 * self.h, 0]
        if self.figure.act == "balloon":
            low, high = low - [0.12 * self.h, 0.45 * self.h], high + [0.12 * self.h, 0]
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])

    def at(self, point: Array, yaw: float | None = None) -> Array:
        """A point in the person's axes to picture pixels; what is nearer stands a little lower."""
        yaw = self.figure.yaw if yaw is None else yaw
        x = point[0] * np.cos(yaw) + point[2] * np.sin(yaw)
        return self.foot + np.array([x, -point[1] + 0.13 * self.depth(point, yaw)]) * self.h

    def depth(self, point: Array, yaw: float | None = None) -> float:
        """How far towards the viewer."""
        yaw = self.figure.yaw if yaw is None else yaw
        return float(-point[0] * np.sin(yaw) + point[2] * np.cos(yaw))

    def wide(self, front: float, side: float, yaw: float | None = None) -> float:
        """Half width in pixels of an upright ellipse that is ``front`` wide and ``side`` deep."""
        yaw = self.figure.yaw if yaw is None else yaw
        return float(np.hypot(front * np.cos(yaw), side * np.sin(yaw))) * self.h

    def paint(self, shapes: list[Array], colour: Array, label: str, thick: float, **more: object) -> None:
        """``thick``: relief in units of height."""
        options: dict[str, object] = {"strength": 0.34, "contact": 0.28, **more}
        number = THING if label == "thing" else _LABEL[label]
        self.sheet.paint(shapes, colour, label=number, relief=max(1.0, thick * self.h), **options)  # type: ignore[arg-type]

    def flat(self, shapes: list[Array], colour: Array, label: str, **more: object) -> None:
        number = THING if label == "thing" else _LABEL[label]
        self.sheet.paint(shapes, colour, label=number, **more)  # type: ignore[arg-type]

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
        joints, turned = self.joints, abs(np.sin(self.figure.yaw)) > 0.55
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
        limb = f"{side.capitalize()}-leg"
        shade = np.float32(0.9 if depth < -0.03 else 1.0)

        def part() -> None:
            skin = [0.051 * build, 0.034 * build, 0.036 * build, 0.021 * build]
            bare = look.bottom != "trousers"
            if bare:
                colour = look.bottom_colour * np.float32(0.5) if look.leggings else look.skin
                self.paint(tube(places, skin), colour * shade, "Pants" if look.leggings else limb, 0.03)
                if look.socks is not None:
                    low = places[3] + (places[2] - places[3]) * 0.3
                    self.paint(
                        [capsule(low, places[3], 0.026 * build, 0.023 * build)],
                        look.socks * shade,
                        "Socks",
                        0.02,
                        contact=0,
                    )
            self._shoe(side, shade)
            if look.bottom == "trousers":
                wide = [0.056 * build, 0.043 * build, 0.042 * build, 0.036 * build]
                self.paint(tube(places, wide), look.bottom_colour * shade, "Pants", 0.038, contact=0.2)
            elif look.bottom == "shorts":
                hem = places[0] + (places[1] - places[0]) * 0.82
                self.paint(
                    [capsule(places[0], hem, 0.06 * build, 0.056 * build)], look.bottom_colour * shade, "Pants", 0.038
                )
            elif self.figure.act == "sit":
                cloth, label = (look.top_colour, "Dress") if look.top == "dress" else (look.bottom_colour, "Skirt")
                self.paint([capsule(places[0], places[1], 0.07 * build, 0.06 * build)], cloth * shade, label, 0.04)

        upfront = 0.0 if self.figure.act == "sit" else -0.3
        self.parts.append((depth + upfront, part))

    def _shoe(self, side: str, shade: np.float32) -> None:
        ankle = self.joints[f"{side}_ankle"]
        outward = 0.012 * (1 if side == "left" else -1)
        lift = max(0.0, float(ankle[1]) - 0.05)
        heel = ankle + [0, -0.026, -0.018]
        toe = ankle + [outward, -0.03 - 0.5 * lift, 0.066]
        size = self.h * (1.15 if self.look.child else 1.0)
        shapes = [capsule(self.at(heel), self.at(toe), 0.024 * size, 0.021 * size)]
        shapes.append(capsule(self.at(ankle), self.at(heel), 0.024 * size, 0.024 * size))
        self.paint(shapes, self.look.shoes * shade, f"{side.capitalize()}-shoe", 0.018, contact=0.1)

    # Trunk

    def _spine(self, t: float) -> Array:
        """A point of the trunk: 0 at the pelvis, 1 at the neck."""
        return self.at(self.joints["pelvis"] + (self.joints["neck"] - self.joints["pelvis"]) * t)

    def _outline(self, levels: Sequence[tuple[float, float, float]], grow: float = 1.0) -> Array:
        """Silhouette from (t along the spine, half width, half depth) from top to bottom."""
        build = self.look.build * grow
        centres = np.array([self._spine(t) for t, _, _ in levels])
        return loft(centres, np.array([self.wide(a * build, b * build) for _, a, b in levels]))

    def _trunk(self, low: float) -> list[tuple[float, float, float]]:
        if self.look.child:
            levels = [
                (1.06, 0.035, 0.035),
                (0.98, 0.08, 0.05),
                (0.9, 0.1, 0.062),
                (0.65, 0.095, 0.07),
                (0.3, 0.092, 0.072),
                (0.0, 0.094, 0.07),
            ]
        elif self.look.female:
            levels = [
                (1.05, 0.03, 0.03),
                (0.98, 0.075, 0.045),
                (0.9, 0.093, 0.055),
                (0.68, 0.088, 0.078),
                (0.36, 0.07, 0.056),
                (0.08, 0.092, 0.068),
                (-0.08, 0.096, 0.07),
            ]
        else:
            levels = [
                (1.05, 0.035, 0.032),
                (0.98, 0.088, 0.05),
                (0.9, 0.11, 0.06),
                (0.68, 0.106, 0.07),
                (0.3, 0.086, 0.062),
                (0.0, 0.088, 0.064),
            ]
        kept = [level for level in levels if level[0] > low]
        return [*kept, (low, levels[-1][1], levels[-1][2])]

    def _body(self) -> None:
        look, figure = self.look, self.figure
        front = np.cos(figure.yaw)
        sitting = figure.act == "sit"
        if look.bottom in ("trousers", "shorts"):
            self.paint(
                [self._outline([(0.16, 0.084, 0.062), (0.0, 0.092, 0.068), (-0.16, 0.085, 0.066)])],
                look.bottom_colour,
                "Pants",
                0.05,
                contact=0.0,
            )
        elif look.bottom == "skirt" and not sitting:
            hem = -0.42 - 0.5 * (look.tall * 7 % 1)
            flare = 0.13 + 0.05 * (look.tall * 13 % 1)
            skirt = [
                (0.24, 0.072, 0.058),
                (0.05, 0.098, 0.075),
                (hem * 0.5, (0.098 + flare) / 2, 0.095),
                (hem, flare, flare * 0.85),
            ]
            pleats = (
                stripes(look.bottom_colour * np.float32(0.86), 0.035 * self.h, self.spin * 0.5, 0.4)
                if look.tall * 17 % 1 < 0.5
                else None
            )
            self.paint([self._outline(skirt)], look.bottom_colour, "Skirt", 0.06, pattern=pleats)
        elif look.bottom == "skirt":
            self.paint(
                [self._outline([(0.24, 0.072, 0.058), (0.0, 0.1, 0.075), (-0.1, 0.1, 0.075)])],
                look.bottom_colour,
                "Skirt",
                0.05,
            )
        if look.top == "dress":
            hem = -0.1 if sitting else -0.5 - 0.55 * (look.tall * 7 % 1)
            shape = self._trunk(0.3)[:-1] + [(0.04, 0.094, 0.072)]
            shape += [(-0.1, 0.1, 0.075)] if sitting else [(hem * 0.5, 0.125, 0.105), (hem, 0.165, 0.14)]
            self.paint([self._outline(shape)], look.top_colour, "Dress", 0.06, pattern=self.pattern)
            belt = self._outline([(0.36, 0.073, 0.058), (0.3, 0.075, 0.06)], 1.02)
            self.flat([belt], look.second_colour, "Dress", opacity=0.8)
        elif look.top in ("jacket", "coat"):
            inner = self._outline(self._trunk(0.02))
            self.paint([inner], look.inner_colour, "Upper-clothes", 0.06)
            hem = -0.14 if look.top == "jacket" or sitting else -0.72
            shape = (
                [(1.06, 0.05, 0.05)]
                + self._trunk(0.3)[1:-1]
                + [(0.05, 0.102, 0.08), (hem, 0.112 if hem > -0.5 else 0.125, 0.09)]
            )
            opening: list[Array] = []
            if front > 0.15:
                shift = np.sin(figure.yaw) * 0.055 * self.h
                top, waist, low = self._spine(1.08), self._spine(0.35), self._spine(hem - 0.1)
                wide = 0.03 * self.h * front * look.build
                opening = [
                    np.stack(
                        [
                            top + [shift - wide * 1.5, 0],
                            top + [shift + wide * 1.5, 0],
                            waist + [shift + wide * 0.55, 0],
                            low + [shift + wide * 1.1, 0],
                            low + [shift - wide * 1.1, 0],
                            waist + [shift - wide * 0.55, 0],
                        ]
                    )
                ]
            self.paint([self._outline(shape, 1.04)], look.top_colour, "Coat", 0.06, erase=opening)
        else:
            hem = {0: -0.14, 1: 0.03}[int(look.tall * 29 % 1 < 0.4)]
            if look.bottom == "skirt":
                hem = 0.12
            self.paint(
                [self._outline(self._trunk(hem), 1.02)], look.top_colour, "Upper-clothes", 0.06, pattern=self.pattern
            )
            if look.top == "tank":
                collar = [self._outline([(1.06, 0.034, 0.034), (0.94, 0.05, 0.045), (0.86, 0.03, 0.03)])]
                self.flat(collar, look.skin, "Face")
        if figure.act == "backpack":
            strap = look.second_colour * np.float32(0.8)
            if front > 0.25:
                for s in (-1, 1):
                    x = np.array([s * 0.062, 0, 0])
                    ends = [
                        self.at(self.joints["neck"] + x * 0.8 + [0, -0.015, 0.03]),
                        self.at(self.joints["neck"] + x * 1.15 + [0, -0.17, 0.04]),
                    ]
                    self.flat([capsule(ends[0], ends[1], 0.011 * self.h, 0.011 * self.h)], strap, "thing")

    def _arm(self, side: str) -> None:
        joints, look = self.joints, self.look
        shoulder, elbow, wrist, hand = (joints[f"{side}_{part}"] for part in ("shoulder", "elbow", "wrist", "hand"))
        depth = (self.depth(shoulder) + self.depth(elbow) + 2 * self.depth(wrist)) / 4
        places = [self.at(p) for p in (shoulder, elbow, wrist)]
        build = self.h * (0.5 + 0.5 * look.build) * (1.08 if look.child else 1.0)
        limb = f"{side.capitalize()}-arm"
        shade = np.float32(0.88 if depth < -0.05 else 1.0)
        facing_away = np.cos(self.figure.yaw) < 0

        def part() -> None:
            palm = self.at(hand)
            self.paint([capsule(places[2], palm, 0.019 * build, 0.022 * build)], look.skin * shade, limb, 0.018)
            if look.top in ("long", "jacket", "coat"):
                label = "Upper-clothes" if look.top == "long" else "Coat"
                wide = [0.036 * build, 0.034 * build, 0.028 * build]
                self.paint(
                    tube(places, wide), look.top_colour * shade, label, 0.028, pattern=self.pattern, contact=0.18
                )
            else:
                self.paint(tube(places, [0.032 * build, 0.027 * build, 0.019 * build]), look.skin * shade, limb, 0.025)
                if look.top != "tank":
                    cuff = places[0] + (places[1] - places[0]) * (0.62 if look.top == "tee" else 0.4)
                    label = "Upper-clothes" if look.top == "tee" else "Dress"
                    self.paint(
                        [capsule(places[0], cuff, 0.036 * build, 0.037 * build)],
                        look.top_colour * shade,
                        label,
                        0.028,
                        pattern=self.pattern,
                        contact=0.12,
                    )

        # Hanging arms lie beside the trunk: seen from the front over it, unless the body is turned.
        self.parts.append((depth + (0.03 if not facing_away else 0.02), part))

    # Head

    def _on_head(self, x: float, y: float, z: float) -> tuple[Array, float]:
        """A place on the head in units of its half height: picture pixels, and how much it faces the viewer."""
        yaw, half = self.figure.head_yaw, self.look.head / 2
        across = x * 0.8 * np.cos(yaw) + z * 0.88 * np.sin(yaw)
        near = -x * 0.8 * np.sin(yaw) + z * 0.88 * np.cos(yaw)
        return self.at(self.joints["head"]) + np.array([across, -y + 0.1 * near]) * half * self.h, float(near)

    def _skull(self, grow: float, bottom: float = 1.0, rise: float = 0.0) -> Array:
        """Outline of the head, ``grow`` times as large, cut off ``bottom`` half heights below its middle."""
        angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        down = np.sin(angle)
        half = self.look.head / 2 * self.h
        width = self.wide(self.look.head / 2 * 0.8, self.look.head / 2 * 0.88, self.figure.head_yaw)
        chin = 1 - 0.2 * np.clip(down, 0, 1) ** 1.5
        if 0 < bottom < 1:  # a rounded nape
            down = np.where(down > 0, bottom * np.tanh(1.4 * down / bottom), down)
        shape = np.stack([np.cos(angle) * width * chin, np.minimum(down, bottom) * half], 1) * grow
        return self.at(self.joints["head"]) + shape - [0, rise * half]

    def _head(self) -> None:
        look, yaw = self.look, self.figure.head_yaw
        half = look.head / 2 * self.h
        centre = self.at(self.joints["head"])
        front, turn = float(np.cos(yaw)), float(np.sin(yaw))
        behind = (front > -0.2, -0.5 if front > -0.2 else 0.06)

        def back_hair() -> None:
            colour = look.hair_colour * np.float32(0.82 if behind[0] else 1.0)
            shift = np.array([-turn * 0.3 * half, 0])
            if look.hair == "long":
                low = 2.0
                levels = np.array(
                    [centre + shift * k + [0, y * half] for k, y in ((0.6, -0.9), (0.8, -0.2), (1, 0.7), (1.1, low))]
                )
                self.paint([loft(levels, np.array([0.55, 0.98, 1.0, 0.8]) * half)], colour, "Hair", 0.03)
            elif look.hair == "bob":
                levels = np.array([centre + shift * k + [0, y * half] for k, y in ((0.6, -0.9), (0.8, -0.2), (1, 0.9))])
                self.paint([loft(levels, np.array([0.6, 1.0, 0.98]) * half)], colour, "Hair", 0.03)
            elif look.hair == "afro":
                ring = [
                    ellipse(
                        centre + np.array([np.cos(a) * 0.75, np.sin(a) * 0.7 - 0.35]) * half, 0.62 * half, 0.6 * half
                    )
                    for a in np.arange(0, 6.2, 0.7)
                ]
                self.paint(ring, colour, "Hair", 0.04)

        def tail() -> None:
            if look.hair == "ponytail":
                ends = [self._on_head(0, y, z)[0] for y, z in ((0.25, -0.95), (-0.2, -1.35), (-1.1, -1.3))]
                self.paint(tube(ends, [0.3 * half, 0.3 * half, 0.12 * half]), look.hair_colour, "Hair", 0.02)
            elif look.hair == "bun":
                self.paint(
                    [ellipse(self._on_head(0, 0.85, -0.6)[0], 0.42 * half, 0.4 * half)], look.hair_colour, "Hair", 0.02
                )

        def neck() -> None:
            base, top = self._spine(0.99), centre + [-turn * 0.1 * half, 0.55 * half]
            wide = (0.028 if look.female or look.child else 0.034) * self.h * look.build
            if look.top in ("long", "jacket", "coat"):
                label = "Upper-clothes" if look.top == "long" else "Coat"
                collar = ellipse(self._spine(1.03), self.wide(0.044, 0.042), 0.016 * self.h)
                self.paint([collar], look.top_colour * np.float32(0.9), label, 0.01, contact=0.0)
            self.paint([capsule(base, top, wide, wide)], look.skin * np.float32(0.9), "Face", 0.03, contact=0.15)
            if look.scarf is not None:
                self.paint(
                    [ellipse(self._spine(1.05), self.wide(0.062, 0.06), 0.03 * self.h)], look.scarf, "Scarf", 0.02
                )
                if front > 0:
                    end = self._spine(0.72) + [0.025 * self.h, 0]
                    self.paint(
                        [capsule(self._spine(1.03) + [0.02 * self.h, 0], end, 0.02 * self.h, 0.024 * self.h)],
                        look.scarf,
                        "Scarf",
                        0.02,
                    )

        def face() -> None:
            for s in (-1, 1):
                ear, near = self._on_head(s * 0.98, -0.05, -0.1)
                if near > -0.35:
                    self.paint(
                        [ellipse(ear, 0.16 * half, 0.24 * half)], look.skin * np.float32(0.95), "Face", 0.01, contact=0
                    )
            self.paint([self._skull(0.97)], look.skin, "Face", 0.05, strength=0.26, contact=0.3)
            self._features(half)
            self._hair_cap(half, centre, front, turn)
            self._hat(half, centre)

        self.parts += [(behind[1], back_hair), (0.012, neck), (0.03, face)]
        self.parts.append((-0.4 if front > 0.3 else (0.07 if front < -0.3 else 0.025), tail))

    def _features(self, half: float) -> None:
        look = self.look
        ink = look.skin * np.float32(0.42)
        for s in (-1, 1):
            eye, near = self._on_head(s * 0.36, 0.06, 0.9)
            if near < 0.12:
                continue
            squeeze = 0.45 + 0.55 * min(1.0, near)
            if half > 9:
                self.flat([ellipse(eye, 0.13 * half * squeeze, 0.085 * half)], hexes("f7f4ee")[0], "Face")
            self.flat(
                [ellipse(eye, max(0.75, 0.08 * half) * squeeze, max(0.85, 0.1 * half))], hexes("1f1a17")[0], "Face"
            )
            brow = self._on_head(s * 0.36, 0.32, 0.88)[0]
            reach = np.array([0.16 * half * squeeze, 0.03 * half * s])
            self.flat(
                [capsule(brow - reach, brow + reach, 0.045 * half, 0.045 * half)],
                look.hair_colour * np.float32(0.8),
                "Face",
                opacity=0.85,
            )
            cheek = self._on_head(s * 0.5, -0.3, 0.75)[0]
            self.sheet.paint(
                [ellipse(cheek, 0.17 * half * squeeze, 0.13 * half)],
                mix(look.skin, hexes("d8604f")[0], 0.5),
                opacity=0.35,
            )
            if look.glasses:
                lens = ellipse(eye, 0.27 * half * squeeze, 0.2 * half)
                if look.glasses == "sun":
                    self.flat([lens], hexes("1c1f24")[0], "Sunglasses")
                else:
                    self.flat(
                        [lens],
                        hexes("24211f")[0],
                        "Sunglasses",
                        erase=[ellipse(eye, 0.2 * half * squeeze, 0.14 * half)],
                    )
        nose, near = self._on_head(0, -0.14, 1.02)
        if near > 0.0 or (abs(np.sin(self.figure.head_yaw)) > 0.75 and near > -0.3):
            bridge = self._on_head(0, 0.05, 0.92)[0]
            self.paint(
                [capsule(bridge, nose, 0.04 * half, 0.095 * half)],
                look.skin * np.float32(0.93),
                "Face",
                0.008,
                contact=0.15,
            )
        mouth, near = self._on_head(0, -0.5, 0.9)
        if near > 0.15:
            if look.beard:
                jaw = self._skull(0.99)
                low = self._on_head(0, -0.3, 0.5)[0][1]
                beard = np.stack([jaw[:, 0], np.maximum(jaw[:, 1], low)], 1)
                self.paint([beard], look.hair_colour, "Face", 0.03, contact=0)
            corner = np.array([0.2 * half * min(1.0, near + 0.2), 0])
            smile = tube(
                [mouth - corner - [0, 0.03 * half], mouth + [0, 0.04 * half], mouth + corner - [0, 0.03 * half]],
                [0.035 * half, 0.055 * half, 0.035 * half],
            )
            self.flat(smile, mix(ink, hexes("b0473f")[0], 0.65), "Face")

    def _hair_cap(self, half: float, centre: Array, front: float, turn: float) -> None:
        look = self.look
        if look.hair == "bald":
            return
        grow, bottom = {"buzz": (1.0, 0.1), "short": (1.09, 0.28), "curly": (1.1, 0.2), "afro": (1.12, 0.1)}.get(
            look.hair, (1.09, 0.42)
        )
        if front < 0:
            bottom = max(bottom, 0.62)
        shapes = [self._skull(grow, bottom, 0.05)]
        if look.hair in ("curly", "afro"):
            size = 0.3 if look.hair == "curly" else 0.42
            shapes += [
                ellipse(centre + np.array([np.cos(a) * 0.82, np.sin(a) * 0.88 - 0.12]) * half, size * half, size * half)
                for a in np.arange(3.3, 6.2, 0.45)
            ]
        open_face: list[Array] = []
        if front > -0.45:
            wide = self.wide(look.head / 2 * 0.8, look.head / 2 * 0.88, self.figure.head_yaw)
            share = 0.86 - 0.2 * abs(turn) if front > 0 else 0.66 * (1 + front / 0.45)
            offset = turn * (0.42 if front > 0 else 0.42 + 0.5 * -front / 0.45)
            hairline = 0.36 if look.hair == "buzz" else 0.3
            middle = centre + np.array([offset * wide, hairline * half])
            open_face = [ellipse(middle, wide * share, half * 0.88)]
            if look.female and look.hair in ("long", "bob") and front > 0.4:  # a parting
                side = 1 if look.tall * 31 % 1 < 0.5 else -1
                open_face = [ellipse(middle + [side * 0.1 * half, 0.06 * half], wide * share, half * 0.9)]
        self.paint(shapes, look.hair_colour, "Hair", 0.03, contact=0.18, erase=open_face)

    def _hat(self, half: float, centre: Array) -> None:
        look = self.look
        if not look.hat:
            return
        colour = look.second_colour
        dome = self._skull(1.16, -0.22, 0.06)
        if look.hat == "beanie":
            self.paint([dome], colour, "Hat", 0.03)
            low = dome[:, 1].max()
            wide = np.ptp(dome[:, 0]) / 2
            band = smooth(rectangle(centre[0] - wide, low - 0.18 * half, centre[0] + wide, low + 0.14 * half))
            self.paint([band], colour * np.float32(0.8), "Hat", 0.015)
            self.paint(
                [ellipse(centre - [0, 1.24 * half], 0.24 * half, 0.22 * half)],
                mix(colour, np.ones(3, np.float32), 0.5),
                "Hat",
                0.015,
            )
            return
        wide = np.ptp(dome[:, 0]) / 2
        low = dome[:, 1].max()
        if look.hat == "cap":
            self.paint([dome], colour, "Hat", 0.03)
            brim, near = self._on_head(0, 0.3, 1.35)
            if near > -0.3:
                middle = np.array([centre[0], low - 0.02 * half])
                self.paint(
                    [
                        capsule(
                            middle,
                            np.array([brim[0], low + 0.1 * half * near]),
                            0.5 * wide * (0.5 + 0.5 * near),
                            0.16 * half,
                        )
                    ],
                    colour * np.float32(0.75),
                    "Hat",
                    0.012,
                )
        else:
            self.paint([ellipse(np.array([centre[0], low]), wide * 1.75, 0.26 * half)], colour, "Hat", 0.015)
            self.paint([dome], colour, "Hat", 0.03, contact=0.1)
            self.flat(
                [rectangle(centre[0] - wide * 0.97, low - 0.26 * half, centre[0] + wide * 0.97, low - 0.04 * half)],
                look.inner_colour,
                "Hat",
                opacity=0.85,
            )

    # What people carry

    def _things(self) -> None:
        act, look, joints, rng = self.figure.act, self.look, self.joints, self.rng
        side = "left" if self.figure.head_yaw - self.figure.yaw > 0 else "right"
        hand3 = joints[f"{side}_hand"]
        hand = self.at(hand3)
        depth = self.depth(hand3) + 0.04
        colour, second = pick(rng, CLOTH), pick(rng, CLOTH)
        h, tall = self.h, look.tall

        def umbrella() -> None:
            tilt = np.array([rng.uniform(-0.06, 0.06) * h, 0.0])
            top = (
                np.array([self.at(joints["head"])[0] * 0.6 + hand[0] * 0.4, self.at(joints["head"])[1] - 0.22 * h])
                + tilt
            )
            radius, rise = 0.3 * h, 0.17 * h
            self.flat(
                [capsule(hand + [0, 0.03 * h], top - [0, rise * 0.9], 0.006 * h, 0.005 * h)],
                hexes("2b2622")[0],
                "thing",
            )
            angle = np.linspace(np.pi, 2 * np.pi, 25)
            dome = np.stack([np.cos(angle) * radius, np.sin(angle) * rise], 1) + top
            steps = np.linspace(radius, -radius, 17)
            rim = np.stack([steps, -np.abs(np.sin(np.linspace(0, np.pi * 4, 17))) * rise * 0.16], 1) + top
            self.paint([np.concatenate([dome, rim])], colour, "thing", 0.09, strength=0.45)
            for low, high in ((-1.0, -0.52), (0.0, 0.52)):
                wedge = np.concatenate(
                    [
                        xy((low * radius, 0)),
                        np.array([[low * radius * np.cos(a), -np.sin(a) * rise] for a in np.linspace(0.15, 1.57, 8)]),
                        np.array([[high * radius * np.cos(a), -np.sin(a) * rise] for a in np.linspace(1.57, 0.15, 8)]),
                        xy((high * radius, 0)),
                    ]
                )
                self.flat([wedge + top], second, "thing", opacity=0.85)

        def balloon() -> None:
            middle = hand + np.array([rng.uniform(-0.1, 0.1), -rng.uniform(0.5, 0.62)]) * h
            self.flat([capsule(hand, middle + [0, 0.11 * h], 0.0035 * h, 0.0035 * h)], hexes("5a5a5a")[0], "thing")
            self.paint([ellipse(middle, 0.085 * h, 0.105 * h)], colour, "thing", 0.06, strength=0.5)
            self.flat(
                [ellipse(middle - [0.03 * h * -np.sign(self.sheet.sun[0]), 0.045 * h], 0.016 * h, 0.022 * h)],
                np.ones(3, np.float32),
                "thing",
                opacity=0.75,
            )

        def ball() -> None:
            middle = (self.at(joints["left_hand"]) + self.at(joints["right_hand"])) / 2
            radius = 0.115 / tall * h
            self.paint(
                [ellipse(middle, radius, radius)],
                colour,
                "thing",
                radius / h * 0.8,
                strength=0.45,
                pattern=stripes(second, radius * 1.1, 0.6),
            )

        def bag() -> None:
            wide, high = 0.15 / tall * h, 0.32 / tall * h
            top = hand + [0, 0.07 * h]
            self.flat(
                tube([top + [-wide * 0.6, 0], hand, top + [wide * 0.6, 0]], [0.007 * h] * 3),
                colour * np.float32(0.6),
                "thing",
            )
            self.paint(
                [smooth(xy(top + (-wide, 0), top + (wide, 0), top + (wide * 1.1, high), top + (-wide * 1.1, high)))],
                colour,
                "thing",
                0.035,
                pattern=stripes(second, high * 1.2, np.pi / 2, 0.3),
            )

        def phone() -> None:
            tip = hand - [0, 0.015 * h]
            self.flat(
                [smooth(rectangle(tip[0] - 0.017 * h, tip[1] - 0.034 * h, tip[0] + 0.017 * h, tip[1] + 0.03 * h))],
                hexes("15171b")[0],
                "thing",
            )
            if np.cos(self.figure.yaw) < 0 or act == "look":
                self.flat(
                    [rectangle(tip[0] - 0.01 * h, tip[1] - 0.024 * h, tip[0] + 0.01 * h, tip[1] + 0.014 * h)],
                    hexes("9cc4e0")[0],
                    "thing",
                )

        def cup() -> None:
            self.paint(
                [
                    xy(
                        hand + (-0.018 * h, -0.05 * h),
                        hand + (0.018 * h, -0.05 * h),
                        hand + (0.014 * h, 0.02 * h),
                        hand + (-0.014 * h, 0.02 * h),
                    )
                ],
                hexes("f2ede2")[0],
                "thing",
                0.012,
            )
            self.flat(
                [rectangle(hand[0] - 0.02 * h, hand[1] - 0.06 * h, hand[0] + 0.02 * h, hand[1] - 0.048 * h)],
                colour * np.float32(0.7),
                "thing",
            )

        def backpack() -> None:
            middle = self.at(joints["neck"] + [0, -0.15, -0.09])
            wide = self.wide(0.085, 0.055)
            shape = loft(
                np.array([middle + [0, y * h] for y in (-0.125, -0.09, 0.05, 0.11)]),
                np.array([0.6, 0.95, 1.0, 0.85]) * wide,
            )
            self.paint([shape], second, "thing", 0.045)
            if np.cos(self.figure.yaw) < -0.2:
                self.paint(
                    [
                        smooth(
                            rectangle(
                                middle[0] - wide * 0.7,
                                middle[1] + 0.005 * h,
                                middle[0] + wide * 0.7,
                                middle[1] + 0.09 * h,
                            )
                        )
                    ],
                    second * np.float32(0.85),
                    "thing",
                    0.02,
                )

        drawer = {
            "umbrella": umbrella,
            "balloon": balloon,
            "ball": ball,
            "bag": bag,
            "look": phone,
            "call": phone,
            "cup": cup,
        }.get(act)
        if drawer:
            self.parts.append((depth, drawer))
        if act == "backpack":
            self.parts.append((-0.12 if np.cos(self.figure.yaw) > 0 else 0.055, backpack))
