"""Who stands where: single people, couples, parents with children, friends arm in arm, people on benches."""

from __future__ import annotations

import numpy as np

from dataset_tools.drawn_world.people import Figure, Look, dress_up
from dataset_tools.drawn_world.places import Kind, Stage

_ACTS = (
    "stand", "stand", "walk", "walk", "walk", "wave", "look", "call", "umbrella", "bag", "ball", "hips", "crossed",
    "cheer", "point", "run", "balloon", "backpack", "cup", "pocket",
)  # fmt: skip
"""What people on their own do; what stands here twice is done twice as often."""


def cast(stage: Stage, people: int, rng: np.random.Generator) -> list[Figure]:
    """Choose ``people`` figures, singly and in groups, so that each stays partly visible."""
    best: list[Figure] = []
    for _ in range(30):
        figures: list[Figure] = []
        while len(figures) < people:
            figures += _group(stage, people - len(figures), rng, [figure.z for figure in figures])
        if _all_visible(stage, figures):
            return figures
        best = best or figures
    return best


def _all_visible(stage: Stage, figures: list[Figure]) -> bool:
    """True where, judged by plain boxes, everybody is within the picture and not hidden by what is in front."""
    camera = stage.camera
    boxes: list[tuple[float, float, float, float]] = []
    for figure in sorted(figures, key=lambda f: f.z):
        scale = camera.scale(figure.z)
        x, y = camera.at(figure.x, 0, figure.z)
        tall = figure.look.tall * scale
        box = (x - 0.13 * tall, y - (0.75 if figure.act == "sit" else 1) * tall, x + 0.13 * tall, y)
        wide = min(box[2], camera.width) - max(box[0], 0)
        high = min(box[3], camera.height) - max(box[1], 0)
        if wide < 0.45 * (box[2] - box[0]) or high < 0.5 * (box[3] - box[1]):
            return False
        for other in boxes:
            over_x = min(box[2], other[2]) - max(box[0], other[0])
            over_y = min(box[3], other[3]) - max(box[1], other[1])
            if over_x > 0 and over_y > 0 and over_x * over_y > 0.5 * (box[2] - box[0]) * (box[3] - box[1]):
                return False
        boxes.append(box)
        if _hidden_share(stage, box, figure.z) > 0.4:
            return False
    return True


def _hidden_share(stage: Stage, box: tuple[float, float, float, float], z: float) -> float:
    """How much of a box at distance ``z`` things in front of it hide."""
    x0, y0, x1, y1 = (max(0, round(v)) for v in box)
    covered = np.zeros((max(1, y1 - y0), max(1, x1 - x0)), bool)
    for prop in stage.props:
        if prop.z < z:
            height, width = prop.rgba.shape[:2]
            left, right = max(x0, prop.left), min(x1, prop.left + width)
            top, bottom = max(y0, prop.top), min(y1, prop.top + height)
            if left < right and top < bottom:
                part = prop.rgba[top - prop.top : bottom - prop.top, left - prop.left : right - prop.left, 3]
                covered[top - y0 : bottom - y0, left - x0 : right - x0] |= part >= 128
    return float(covered.mean())


def _anyone(rng: np.random.Generator, kind: Kind, *, child: bool | None = None) -> Look:
    child = bool(rng.random() < 0.17) if child is None else child
    return dress_up(rng, str(rng.choice(["Boy", "Girl"] if child else ["Man", "Woman"])), kind)


def _group(stage: Stage, most: int, rng: np.random.Generator, taken: list[float]) -> list[Figure]:
    """One person, a couple, a parent with a child, friends arm in arm, or people on a bench."""
    camera = stage.camera
    kind = stage.kind
    low, high = camera.ground(stage.farthest), camera.ground(stage.nearest)
    # A shallow room may end before the part of the picture where people would best stand.
    row = rng.uniform(*np.clip([0.72 * camera.height, 0.99 * camera.height], low, high))
    if rng.random() < 0.16:
        row = rng.uniform(1.02, 1.3) * camera.height
    z = max(camera.distance(row), 1.7)
    while any(abs(z - other) < 0.04 for other in taken):
        z += 0.05
    span = camera.width / camera.scale(z)
    x = rng.uniform(0.08, 0.92) * span - camera.centre / camera.scale(z)
    draw = rng.random()
    if stage.seats and draw < 0.3:
        seat_x, seat_z = stage.seats[int(rng.integers(len(stage.seats)))]
        if all(abs(seat_z - other) > 0.01 for other in taken):
            yaw = rng.normal(0, 0.25)
            look, x = _anyone(rng, kind), seat_x + rng.normal(0, 0.06)
            return [Figure(look, x, seat_z, yaw, yaw + rng.normal(0, 0.4), "sit")]
    yaw = _heading(rng)
    if most >= 2 and draw < 0.62:
        return _couple(kind, x, z, rng)
    act = str(rng.choice(_ACTS))
    if kind == "room" and act in ("umbrella", "run", "bag", "backpack"):
        act = str(rng.choice(["stand", "cup", "hips", "balloon", "look"]))
    if act == "run":
        yaw = float(rng.choice([-1, 1])) * rng.uniform(0.9, 1.7)
    return [Figure(_anyone(rng, kind), x, z, yaw, yaw + rng.normal(0, 0.3), act)]


def _heading(rng: np.random.Generator) -> float:
    draw = rng.random()
    if draw < 0.5:
        return float(rng.normal(0, 0.4))
    if draw < 0.82:
        return float(rng.choice([-1, 1]) * rng.uniform(0.7, 1.75))
    return float(np.pi + rng.normal(0, 0.4))


def _couple(kind: Kind, x: float, z: float, rng: np.random.Generator) -> list[Figure]:
    """Two who belong together, the first at the picture's left."""
    heading = rng.normal(0, 0.25) + (np.pi if rng.random() < 0.2 else 0)
    style = rng.choice(["hands", "child", "arm", "hug", "talk"])
    first, second = _anyone(rng, kind, child=False), _anyone(rng, kind, child=bool(style == "child"))
    if style in ("hands", "child"):
        gap, height = (0.56, 0.78) if style == "hands" else (0.52, 0.70 * second.tall)
        return _hand_in_hand(first, second, x, z, heading, gap, height, rng)
    if style == "arm":  # the one behind has an arm round the other's shoulders
        gap = rng.uniform(0.34, 0.4)
        turn = rng.normal(0, 0.2)
        # They face the viewer, so a left hand is at the picture's right.
        over = {"left": (gap + 0.16, 0.80 * second.tall, -0.05)}
        round_waist = {"right": (-gap * 0.5, 0.6 * first.tall, -0.12)}
        left = Figure(first, x, z + 0.12, turn, turn + rng.normal(0.2, 0.2), "stand", over)
        gaze, act = turn + rng.normal(-0.2, 0.2), str(rng.choice(["stand", "pocket"]))
        return [left, Figure(second, x + gap, z, turn, gaze, act, round_waist if rng.random() < 0.5 else {})]
    if style == "hug":
        gap = 0.27
        tilt = rng.normal(0, 0.15)
        right = np.pi / 2
        of_first = {"right": (gap + 0.06, 0.66 * second.tall, 0.14), "left": (gap + 0.05, 0.7 * second.tall, -0.12)}
        of_second = {"left": (-gap - 0.06, 0.74 * first.tall, 0.16), "right": (-gap - 0.05, 0.7 * first.tall, -0.12)}
        gaze = -right + rng.uniform(-0.3, 0.4)
        return [
            Figure(first, x, z + 0.06, right - 0.15 + tilt, right - 0.5, "stand", of_first),
            Figure(second, x + gap, z, -right + 0.15 + tilt, gaze, "stand", of_second),
        ]
    gap = rng.uniform(0.65, 0.9)
    acts = ("stand", "hips", "crossed", "pocket", "cup", "point", "look")
    left = Figure(first, x, z, rng.uniform(0.5, 1.3), rng.uniform(0.8, 1.5), str(rng.choice(acts)))
    z += rng.uniform(0.05, 0.3)
    return [left, Figure(second, x + gap, z, -rng.uniform(0.5, 1.3), -rng.uniform(0.8, 1.5), str(rng.choice(acts)))]


def _hand_in_hand(
    first: Look, second: Look, x: float, z: float, yaw: float, gap: float, height: float, rng: np.random.Generator
) -> list[Figure]:
    """Two who hold hands ``height`` metres above the ground, ``first`` at the picture's left."""
    inner, outer = ("left", "right") if np.cos(yaw) > 0 else ("right", "left")
    act = str(rng.choice(["walk", "stand"]))
    middle = gap * 0.5
    back = float(rng.uniform(0.02, 0.1))
    return [
        Figure(first, x, z + back, yaw, yaw + rng.normal(0, 0.3), act, {inner: (middle, height, -back / 2)}),
        Figure(second, x + gap, z, yaw, yaw + rng.normal(0, 0.3), act, {outer: (middle - gap, height, back / 2)}),
    ]
