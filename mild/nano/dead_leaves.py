"""Dead leaves: pictures of flat shapes that hide one another, drawn from a seed, which show no thing in particular.

Shapes of all sizes (density of the radius proportional to r^-3), dropped anywhere one over the other, have edges,
junctions and spectra much like those of photographs (Lee, Mumford and Huang 2001, "Occlusion models for natural
images"), and networks learn to see by them (Baradad et al. 2021, "Learning to see by looking at noise"). The shapes are
textured and the whole is lit unevenly.
"""

from __future__ import annotations

import cv2
import numpy as np

LARGEST = 0.5
"""Radius of the largest shape, as a share of the picture's side."""
FIELDS = 4
"""Textures of one picture, from which each shape takes one."""


def draw_leaves(rng: np.random.Generator, side: int) -> np.ndarray:
    """A picture (side, side, 3) uint8 RGB."""
    fine = 2 * side
    labels = np.zeros((fine, fine), np.int32)
    # From a few large shapes to foliage.
    smallest, count = 0.015 * 8 ** rng.random(), int(40 * 12 ** rng.random())
    for number in range(1, count):
        cv2.fillPoly(labels, [_outline(rng, fine, smallest)], number)
    # Few colours, mostly pale, in a picture; each shape is a little off one of them.
    palette = rng.uniform(0.1, 0.9, (int(rng.integers(3, 9)), 1)) + rng.normal(0, rng.uniform(0, 0.06), (1, 3))
    palette = palette + rng.normal(0, rng.uniform(0.01, 0.1), palette.shape)
    colours = palette[rng.integers(len(palette), size=count)] + rng.normal(0, 0.04, (count, 3))
    # A third of the shapes are plain; a texture makes a shape lighter and darker, or shades it from side to side.
    textures = np.stack([_field(rng, fine) for _ in range(FIELDS)])
    strengths = (rng.uniform(0, 0.12, count) * (rng.random(count) < 2 / 3)).astype(np.float32)
    rows, columns = np.indices(labels.shape, sparse=True)
    brightness = strengths[labels] * textures[rng.integers(FIELDS, size=count)[labels], rows, columns]
    light = np.exp(rng.uniform(0, 0.15) * _noise(rng, fine, 2.5, 1.0))
    picture = (colours.astype(np.float32)[labels] + brightness[..., None]) * light[..., None]
    shrunk = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
    levels: np.ndarray = np.rint(shrunk.clip(0, 1) * 255).astype(np.uint8)
    return levels


def _outline(rng: np.random.Generator, side: int, smallest: float) -> np.ndarray:
    """A polygon (n, 2) int32 of x and y: an ellipse, or one of a few corners; upright, or turned at random."""
    low, high = smallest**-2, LARGEST**-2
    radius = side * (low - rng.random() * (low - high)) ** -0.5
    corners = 32 if rng.random() < 0.4 else int(rng.integers(3, 8))
    angles = 2 * np.pi * (np.arange(corners) + (0.5 if corners == 4 else rng.uniform(-0.3, 0.3, corners))) / corners
    stretch = np.exp(rng.normal(0, 0.5))
    turn = 0.0 if rng.random() < 0.5 else rng.uniform(0, np.pi)
    points = radius * np.stack([np.cos(angles) * stretch, np.sin(angles) / stretch], -1)
    turned = points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return np.rint(turned + rng.uniform(0, side, 2)).astype(np.int32)


def _field(rng: np.random.Generator, side: int) -> np.ndarray:
    """A texture (side, side) float32, mean 0 and deviation 1: grain, clouds, wood, or a smooth change."""
    return _noise(rng, side, rng.uniform(0.5, 2.5), float(np.exp(rng.normal(0, 0.8))))


def _noise(rng: np.random.Generator, side: int, slope: float, stretch: float) -> np.ndarray:
    """Random Gaussian field (side, side) float32 whose amplitudes fall as frequency^-slope, mean 0 and deviation 1.

    Args:
        stretch: how much longer its grains are along x than along y.
    """
    vertical = np.fft.fftfreq(side)[:, None].astype(np.float32) / stretch
    horizontal = np.fft.rfftfreq(side)[None].astype(np.float32) * stretch
    frequency = np.hypot(vertical, horizontal)
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((side, side), np.float32)) * frequency**-slope
    field = np.fft.irfft2(spectrum, s=(side, side))
    normal: np.ndarray = ((field - field.mean()) / field.std()).astype(np.float32)
    return normal
