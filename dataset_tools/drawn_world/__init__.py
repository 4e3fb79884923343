"""A drawn world of streets, parks and rooms with people, in which everything about every pixel is known.

`draw_scene` gives a picture together with what no photograph can give: the same scene without its people, each
person complete also where others hide them, body joints and labels of clothes. The ``sample`` source writes
such scenes as a mirror in OpenImages' file format.

The world is measured in metres. A pinhole camera at eye height projects it, people are 18-joint skeletons posed
in three dimensions and dressed in tapered limbs; shading follows the side from which the light comes.
"""

# ruff: noqa: RUF005 (arrays are added here, not lists)
from __future__ import annotations

import hashlib
from dataclasses import dataclass

import cv2
import numpy as np

from dataset_tools.drawn_world.casting import cast
from dataset_tools.drawn_world.people import THING, Figure, Puppet
from dataset_tools.drawn_world.places import KINDS, Kind, Prop, Stage, set_stage
from dataset_tools.drawn_world.sheet import Array
from dataset_tools.schema import KEYPOINTS


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
    occluded: bool
    truncated: bool


@dataclass(eq=False)
class Scene:
    """A picture and all that is known about it."""

    kind: Kind
    image: Array
    """(H, W, 3) uint8 RGB."""
    background: Array
    """(H, W, 3) uint8 RGB: the scene without people and their shadows."""
    shadow: Array
    """(H, W) bool: where people's shadows change the background."""
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
    return _compose(stage, sprites)


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


def _cast_shadow(stage: Stage, sprite: _Sprite, darkness: Array) -> None:
    """Add the shadow that a person throws on the ground to ``darkness`` (H, W) float32."""
    camera, foot, scale = stage.camera, sprite.foot, stage.camera.scale(sprite.z)
    outdoors = stage.kind != "room"
    flat, slant, blur, strength = (0.16, 0.75, 0.025, 1.0) if outdoors else (0.08, 0.3, 0.06, 0.6)
    shear = -stage.sun[0] * slant
    # A point u above the foot falls beside it, and a little farther away.
    matrix = np.array([[1, -shear, shear * foot[1]], [0, flat, foot[1] * (1 - flat)]], np.float64)
    matrix[:, 2] += matrix[:, 0] * sprite.left + matrix[:, 1] * sprite.top
    alpha = np.ascontiguousarray(sprite.rgba[..., 3])
    thrown = cv2.warpAffine(alpha, matrix, (camera.width, camera.height), flags=cv2.INTER_LINEAR)
    size = 2 * max(1, round(scale * blur)) + 1
    soft = cv2.blur(thrown, (size, size)).astype(np.float32) * (stage.shade * strength / 255)
    x = (np.arange(camera.width, dtype=np.float32)[None] + 0.5 - np.float32(foot[0])) / np.float32(0.34 * scale)
    y = (np.arange(camera.height, dtype=np.float32)[:, None] + 0.5 - np.float32(foot[1])) / np.float32(0.1 * scale)
    soft = np.maximum(soft, np.clip(1 - x * x - y * y, 0, 1) * min(0.5, stage.shade * 1.2))
    soft[: int(camera.ground(stage.farthest + (4 if outdoors else 0.5)))] = 0
    np.maximum(darkness, soft, out=darkness)


def _over(image: Array, thing: Prop) -> None:
    """Lay a drawing over an (H, W, 3) uint8 image, in place."""
    region = image[thing.box]
    alpha = thing.rgba[..., 3:].astype(np.float32) / 255
    region[:] = np.rint(region + (thing.rgba[..., :3].astype(np.float32) - region) * alpha)


def _compose(stage: Stage, sprites: list[_Sprite]) -> Scene:
    shape = stage.camera.height, stage.camera.width
    background, image = stage.base, stage.base.copy()
    darkness = np.zeros(shape, np.float32)
    for sprite in sprites:
        _cast_shadow(stage, sprite, darkness)
    darkness[darkness < 0.01] = 0
    if sprites:
        image[:] = np.rint(image * (1 - darkness[..., None]))
    sprites = sorted(sprites, key=lambda sprite: -sprite.z)
    people: list[DrawnPerson] = []
    for thing in sorted([*stage.props, *sprites], key=lambda thing: -thing.z):
        _over(image, thing)
        if isinstance(thing, _Sprite):
            person = _as_person(thing, shape)
            for other in people:
                other.mask &= ~person.complete_mask
            people.append(person)
        else:
            _over(background, thing)
            for person in people:
                person.mask[thing.box] &= thing.rgba[..., 3] < 128
    # The shadow lies on the ground: things that stand there hide it from view.
    shadow = (image != background).any(2)
    for sprite, person in zip(sprites, people, strict=True):
        person.occluded = bool(person.mask.sum() < 0.98 * person.complete_mask.sum())
        person.keypoints = _seen_keypoints(sprite, person.mask)
        shadow &= person.layer[..., 3] == 0
    return Scene(stage.kind, image, background, shadow, people, _object_boxes(stage))


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
