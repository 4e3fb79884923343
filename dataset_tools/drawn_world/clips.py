"""The drawn world as a clip: its people walk and stand before a camera that, but for what is asked for, keeps still."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation

from dataset_tools.drawn_world import draw_scene, generator
from dataset_tools.drawn_world.sheet import Array

_SHADOW, _SLANT, _FLAT = 0.38, 0.6, 0.18
"""Darkness of people's shadows, and where a point above the feet throws its own."""
_STANDS_FROM = 0.25
"""Share of the clip after which the first person stops."""


@dataclass(frozen=True)
class ClipFaults:
    """What cameras and the world do to a clip. Numbers of frames count from 0."""

    noise: float = 2.0
    """Standard deviation of a channel, in grey levels."""
    flicker: float = 0.05
    """Amplitude of the light's changes, as a share of its strength; a fifth of it in each channel on its own."""
    stands: float = 1 / 3
    """Share of the clip for which the first person stands still."""
    jump: tuple[int, float, float] | None = None
    """Frame from which on the picture is displaced, and pixels to the right and down."""
    shaking: tuple[int, int, float] | None = None
    """First frame and frame after the last that are displaced at random, by up to so many pixels."""
    leaves: tuple[int, int, int, int] | None = None
    """Top, bottom, left, right of where leaves sway."""


class DrawnClip:
    """A clip, drawn frame by frame; the same arguments give the same frames.

    Args:
        key: any text; another key, another scene.
        seed: any integer.
        size: width and height in pixels.
        people: how many, each of whom crosses the picture at least once.
        count: of frames.
        faults: see there.
    """

    def __init__(
        self,
        key: str,
        seed: int,
        size: tuple[int, int],
        people: int,
        count: int,
        faults: ClipFaults = ClipFaults(),
    ) -> None:
        self.count, self.faults = count, faults
        self._size, self._key, self._seed = size, key, seed
        scene = draw_scene(key, seed, size, people)
        self.background = scene.background
        """(H, W, 3) uint8 RGB: what the clean plate is, without leaves."""
        self._layers = [person.layer for person in scene.people]
        rng = generator(seed, f"{key}/clip")
        self._paths = [self._path(layer, rng, stands=number == 0) for number, layer in enumerate(self._layers)]
        self._leaves = rng.integers(0, 2, (size[1], size[0])).astype(bool)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Array, Array]:
        """Frame ``number``: (H, W, 3) uint8 RGB, and who is visible, (people, H, W) bool."""
        if not 0 <= number < self.count:
            raise IndexError(number)
        faults, rng = self.faults, generator(self._seed, f"{self._key}/frame/{number}")
        image = self.background.astype(np.float32)
        if faults.leaves is not None:
            area = np.s_[faults.leaves[0] : faults.leaves[1], faults.leaves[2] : faults.leaves[3]]
            here = np.roll(self._leaves, rng.integers(-3, 4, 2), (0, 1))[area]
            image[area] = np.where(here[..., None], (40, 90, 30), (150, 190, 110))
        people = [_moved(layer, int(path[number])) for layer, path in zip(self._layers, self._paths, strict=True)]
        image *= 1 - _shadow([layer[..., 3] for layer in people])[..., None]
        masks = np.zeros((len(people), *image.shape[:2]), bool)
        for person, layer in enumerate(people):
            alpha = layer[..., 3:].astype(np.float32) / 255
            image += (layer[..., :3] - image) * alpha
            masks[person] = layer[..., 3] >= 128
            masks[:person] &= ~masks[person]
        dx, dy = self._displacement(number, rng)
        if dx or dy:
            image = _displaced(image, dx, dy, cv2.INTER_CUBIC)
            masks = np.array([_displaced(mask.view(np.uint8), dx, dy, cv2.INTER_NEAREST) for mask in masks]) > 0
        light = 1 + faults.flicker * (np.sin(0.9 * number) + rng.normal(0, 0.2, 3))
        image = image * light + faults.noise * rng.standard_normal(image.shape, np.float32)
        return np.clip(np.rint(image), 0, 255).astype(np.uint8), masks

    def _path(self, layer: Array, rng: np.random.Generator, stands: bool) -> Array:
        """How far the person is from their place in the scene, to the right, in each frame."""
        columns = np.flatnonzero(layer[..., 3].any(0))
        left, right = int(columns.min()), int(columns.max())
        span = self._size[0] + right - left + 4
        speed = float(rng.choice([-1, 1]) * span * rng.uniform(1.0, 1.8) / self.count)
        steps = np.full(self.count, speed)
        start = float(rng.uniform(0, span))
        if stands:
            first = round(_STANDS_FROM * self.count)
            steps[first : first + round(self.faults.stands * self.count)] = 0
            start = 0.55 * span - speed * first
        x = (start + np.cumsum(steps)) % span
        return np.round(x - (right - left) - 2 - left).astype(int)

    def _displacement(self, number: int, rng: np.random.Generator) -> tuple[float, float]:
        jump, shaking = self.faults.jump, self.faults.shaking
        if shaking is not None and shaking[0] <= number < shaking[1]:
            dx, dy = rng.uniform(-shaking[2], shaking[2], 2)
            return float(dx), float(dy)
        return jump[1:] if jump is not None and number >= jump[0] else (0.0, 0.0)


def write_clip(
    path: Path,
    frames: Iterable[Array],
    codec: str = "libx264",
    pixels: str = "yuv444p",
    *,
    milliseconds: Sequence[int] | None = None,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> None:
    """Encode frames, (H, W, 3) uint8 RGB each, as a clip; the suffix of its name says which container it has.

    Args:
        codec: FFmpeg's name of the encoder, such as ``libx264`` or ``mjpeg``.
        pixels: FFmpeg's name of the pixel format, such as ``yuv420p``.
        milliseconds: when each frame is shown; None: 25 a second.
        rotation: degrees, counter-clockwise, by which a display matrix says that the frames are to be turned.
        options: of the encoder.
        container: options of the container.
    """
    av.logging.set_level(av.logging.FATAL)
    exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
    with av.open(str(path), "w", options=container or {}) as file:
        stream: Any = file.add_stream(codec, rate=25, options=options or {})
        stream.pix_fmt = pixels
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, pixels_of_frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_of_frame), "rgb24")
            if number == 0:
                stream.width, stream.height = frame.width, frame.height
            frame = frame.reformat(format=pixels, interpolation=exact)
            frame.pts = 40 * number if milliseconds is None else milliseconds[number]
            frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def _moved(layer: Array, right: int) -> Array:
    width, moved = layer.shape[1], np.zeros_like(layer)
    if abs(right) < width:
        moved[:, max(0, right) : width + min(0, right)] = layer[:, max(0, -right) : width - max(0, right)]
    return moved


def _shadow(alphas: list[Array]) -> Array:
    """Share of the light that people take from each pixel, (H, W) float32."""
    height, width = alphas[0].shape
    darkness = np.zeros((height, width), np.float32)
    for alpha in alphas:
        rows = np.flatnonzero(alpha.any(1))
        if len(rows):
            foot = int(rows.max())
            matrix = np.array([[1, -_SLANT, _SLANT * foot], [0, _FLAT, foot * (1 - _FLAT)]], np.float32)
            thrown = cv2.GaussianBlur(cv2.warpAffine(alpha, matrix, (width, height)), (0, 0), 1.2)
            np.maximum(darkness, thrown * np.float32(_SHADOW / 255), out=darkness)
    return darkness


def _displaced(image: Array, dx: float, dy: float, how: int) -> Array:
    matrix = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
    size = image.shape[1], image.shape[0]
    return cv2.warpAffine(image, matrix, size, flags=how, borderMode=cv2.BORDER_REFLECT_101)
