"""A drawn world of streets, parks and rooms with people, in which everything about every pixel is known.

`draw_scene` gives a picture together with what no photograph can give: the same scene without its people, each
person complete also where others hide them, body joints and labels of clothes. The ``sample`` source writes
such scenes as a mirror in OpenImages' file format.

The world is measured in metres. A pinhole camera at eye height projects it, people are 18-joint skeletons posed
in three dimensions and dressed in tapered limbs; shading and shadows follow the side from which the light comes.
"""

# ruff: noqa: RUF005 (arrays are added here, not lists)
from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from dataset_tools import lighting
from dataset_tools.drawn_world.casting import cast
from dataset_tools.drawn_world.people import THING, Figure, Puppet
from dataset_tools.drawn_world.places import KINDS, Kind, Prop, Stage, set_stage
from dataset_tools.drawn_world.sheet import Array
from dataset_tools.lighting import Effects, Ground, Light
from dataset_tools.lighting import Figure as Silhouette
from dataset_tools.schema import KEYPOINTS, EffectKind

_MIRRORING = {"street": 0.2, "park": 0.0, "room": 0.5}
"""How often streets are wet and floors are polished."""


@dataclass(eq=False)
class DrawnPerson:
    """One person of a `Scene`. Arrays have the size (H, W) of the picture."""

    category: str
    """``Man``, ``Woman``, ``Boy``, ``Girl``, or ``Person`` where one could not tell."""
    layer: Array
    """(H, W, 4) uint8 RGBA: the complete person with what they hold, without shadow; RGB is 0 where alpha is 0."""
    complete_mask: Array
    """(H, W) bool: the person as if nobody and nothing stood in front."""
    mask: Array
    """(H, W) bool: what is visible."""
    held: Array
    """(H, W) bool, within ``complete_mask``: bags, balls, umbrellas; LIP counts them as background."""
    parsing: Array
    """(H, W) uint8 LIP labels of the complete person; 0 outside and on ``held``."""
    keypoints: Array
    """(18, 3) float32: x, y in 0..1 of the picture, score; 0, 0, 0 where outside the picture or hidden."""
    bare: Array
    """(H, W) float32 in 0..1: what things (not people) in front leave of each pixel of ``layer``."""
    effects: Array
    """(H, W) bool: where the picture shows the person's shadow or reflection, on the ground or on people behind."""
    effect_kinds: tuple[EffectKind, ...]
    """Which of the two; empty where ``effects`` is."""
    occluded: bool
    truncated: bool


@dataclass(eq=False)
class Scene:
    """A picture and all that is known about it."""

    kind: Kind
    image: Array
    """(H, W, 3) uint8 RGB."""
    background: Array
    """(H, W, 3) uint8 RGB: the scene without people and without their shadows and reflections."""
    light: Effects
    """How people change the light: ``image`` is ``background`` and the people's layers, as far as they are ``bare``,
    joined by `dataset_tools.lighting.blend`."""
    people: list[DrawnPerson]
    """From back to front."""
    objects: list[tuple[str, tuple[float, float, float, float]]]
    """OpenImages class and box (x0, y0, x1, y1 in 0..1) of other things."""

    @property
    def parsing(self) -> Array:
        """(H, W) uint8 LIP labels of the visible people."""
        labels = np.zeros(self.image.shape[:2], np.uint8)
        for person in self.people:
            labels[person.mask] = person.parsing[person.mask]
        return labels


def draw_scene(key: str, seed: int, size: tuple[int, int], people: int) -> Scene:
    """Draw the scene that belongs to ``key``: kind, weather, things and people all follow from (seed, key).

    Args:
        key: any text; another key, another scene.
        seed: any integer.
        size: width and height in pixels.
        people: how many, 0 or more.
    """
    rng = generator(seed, f"{key}/place")
    stage = set_stage(rng, KINDS[int(rng.integers(len(KINDS)))], size)
    rng = generator(seed, f"{key}/people")
    sprites = [_draw_person(stage, figure, rng) for figure in cast(stage, people, rng)]
    return _compose(stage, sprites, generator(seed, f"{key}/light"))


def generator(seed: int, key: str) -> np.random.Generator:
    """A random generator that depends on (seed, key) alone."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:16], "big"))


@dataclass(eq=False)
class _Sprite(Prop):
    """A person who stands in the scene."""

    figure: Figure
    labels: Array
    joints: dict[str, tuple[Array, float]]
    foot: Array
    truncated: bool


def _draw_person(stage: Stage, figure: Figure, rng: np.random.Generator) -> _Sprite:
    puppet = Puppet(stage, figure, rng)
    sheet = puppet.draw()
    rgba, labels = sheet.finish(stage.tint)
    camera = stage.camera
    points = np.array([puppet.at(point) for point in puppet.joints.values()])
    low, high = points.min(0) - 0.03 * puppet.h, points.max(0) + 0.03 * puppet.h
    return _Sprite(
        name=figure.look.category,
        z=figure.z,
        left=sheet.left,
        top=sheet.top,
        rgba=rgba,
        figure=figure,
        labels=labels,
        joints=puppet.keypoints(),
        foot=puppet.foot,
        truncated=bool(low.min() < 0 or high[0] > camera.width or high[1] > camera.height),
    )


def _over(image: Array, thing: Prop) -> None:
    """Lay a drawing over an (H, W, 3) uint8 image, in place."""
    region = image[thing.box]
    alpha = thing.rgba[..., 3:].astype(np.float32) / 255
    region[:] = np.rint(region + (thing.rgba[..., :3].astype(np.float32) - region) * alpha)


def _compose(stage: Stage, sprites: list[_Sprite], rng: np.random.Generator) -> Scene:
    shape = stage.camera.height, stage.camera.width
    background = stage.base
    ground = np.ones(shape, np.float32)
    sprites = sorted(sprites, key=lambda sprite: -sprite.z)
    people: list[DrawnPerson] = []
    for thing in sorted([*stage.props, *sprites], key=lambda thing: -thing.z):
        if isinstance(thing, _Sprite):
            person = _as_person(thing, shape)
            for other in people:
                other.mask &= ~person.complete_mask
            people.append(person)
        else:
            _over(background, thing)
            left = 1 - thing.rgba[..., 3].astype(np.float32) / 255
            ground[thing.box] *= left
            for person in people:
                person.bare[thing.box] *= left
                person.mask[thing.box] &= thing.rgba[..., 3] < 128
    silhouettes = [
        Silhouette(person.layer, (float(sprite.foot[0]), float(sprite.foot[1])), person.bare)
        for person, sprite in zip(people, sprites, strict=True)
    ]
    light = lighting.cast(background, silhouettes, _ground(stage, ground, rng), _light(stage, rng))
    for sprite, person, effects, kinds in zip(sprites, people, light.masks, light.kinds, strict=True):
        person.occluded = bool(person.mask.sum() < 0.98 * person.complete_mask.sum())
        person.keypoints = _seen_keypoints(sprite, person.mask)
        person.effects, person.effect_kinds = effects, kinds
    image = lighting.blend(background, silhouettes, light)
    return Scene(stage.kind, image, background, light, people, _object_boxes(stage))


def _light(stage: Stage, rng: np.random.Generator) -> Light:
    """The stage's sun, which also models people and things, with the depth that a flat drawing does not ask for."""
    turn = rng.uniform(-0.7, 0.9)  # radians that shadows point away from the viewer; below 0: towards the viewer
    softness = rng.uniform(0.12, 0.25) if stage.shade < 0.3 else rng.uniform(0.01, 0.06)
    slope = -stage.sun[1] / abs(stage.sun[0]) * np.cos(turn)
    if stage.kind == "room":  # lamps and windows are high up, and wide
        slope *= rng.uniform(1.8, 3)
    return Light(
        azimuth=turn if stage.sun[0] < 0 else np.pi - turn,
        height=float(np.arctan(slope)),
        softness=softness,
        fill=(1 - stage.shade * 1.4, 1 - stage.shade * 1.3, 1 - stage.shade * 1.1),
        contact=min(0.5, stage.shade * 1.5),
    )


def _ground(stage: Stage, bare: Array, rng: np.random.Generator) -> Ground:
    camera = stage.camera
    mirrors = rng.random() < _MIRRORING[stage.kind]
    return Ground(
        horizon=camera.horizon,
        centre=camera.centre,
        focal=camera.focal,
        top=camera.ground(stage.farthest + (0.5 if stage.kind == "room" else 4)),
        bare=bare,
        gloss=stage.gloss * rng.uniform(0.5, 1) if mirrors else 0.0,
    )


def _as_person(sprite: _Sprite, shape: tuple[int, int]) -> DrawnPerson:
    layer, labels = np.zeros((*shape, 4), np.uint8), np.zeros(shape, np.uint8)
    layer[sprite.box], labels[sprite.box] = sprite.rgba, sprite.labels
    complete, held = labels > 0, labels == THING
    turned_away = np.cos(sprite.figure.head_yaw) < -0.2
    return DrawnPerson(
        category="Person" if turned_away else sprite.name,
        layer=layer,
        complete_mask=complete,
        mask=complete.copy(),
        held=held,
        parsing=np.where(held, 0, labels).astype(np.uint8),
        keypoints=np.zeros((18, 3), np.float32),
        bare=np.ones(shape, np.float32),
        effects=np.zeros(shape, bool),
        effect_kinds=(),
        occluded=False,
        truncated=sprite.truncated,
    )


def _seen_keypoints(sprite: _Sprite, visible: Array) -> Array:
    """Joints of `KEYPOINTS` in 0..1; those outside the picture, turned away or behind something are zero."""
    height, width = visible.shape
    found = np.zeros((18, 3), np.float32)
    for index, name in enumerate(KEYPOINTS):
        (x, y), score = sprite.joints[name]
        inside = 0 <= x < width and 0 <= y < height and visible[int(y), int(x)]
        if inside and score > 0:
            found[index] = x / width, y / height, score
    return found


def _object_boxes(stage: Stage) -> list[tuple[str, tuple[float, float, float, float]]]:
    width, height = stage.camera.width, stage.camera.height
    boxes = []
    outlines = [(name, points.min(0), points.max(0)) for name, points in stage.objects]
    for prop in stage.props:
        rows, columns = np.nonzero(prop.rgba[..., 3] >= 128)
        if len(rows) > 30:
            corner = np.array([prop.left, prop.top])
            low = corner + [columns.min(), rows.min()]
            outlines.append((prop.name, low, corner + [columns.max() + 1, rows.max() + 1]))
    for name, low, high in outlines:
        x0, y0 = np.clip(low / [width, height], 0, 1)
        x1, y1 = np.clip(high / [width, height], 0, 1)
        if (x1 - x0) * (y1 - y0) > 0.002:
            boxes.append((name, (float(x0), float(y0), float(x1), float(y1))))
    return boxes
