"""The clean plate of a view: what each pixel shows while nobody is in front of it, and where that is known.

A pixel's samples are clustered: the fullest window of the width of the noise in each channel is the background
(a mode, which holds where people stand for a while, and where a mean or a median would be drawn to them), and its
inliers' mean is the estimate. It is known where the inliers are many, agree, and where the surroundings come to rest:
leaves and water never do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import cv2
import numpy as np

from dataset_tools.clips.alignment import View
from dataset_tools.clips.reading import FrameStore

_BAND_BYTES = 24_000_000
"""Of the samples of one band of rows."""
_LEAST_NOISE = 1.0
"""Grey levels: rounding alone makes such a difference."""
_MAJORITY, _LEAST_SUPPORT, _LEAST_VISITS = 0.5, 0.35, 3
"""A pixel's background is shown by most samples, or by fewer where it comes back time and again."""
_RIVAL = 0.2
"""Share of the samples from which on something else may be the background."""
_LEAST_EXTENT = 0.6
"""Least share of the view's time over which a background is seen: who stands is seen in one stretch."""
_AS_LONG = 0.1
"""Two things that are seen over times whose shares differ by less cannot be told apart by that."""
_ENDS = 0.05
"""Share of the samples that show something which the time over which it is seen leaves out, at either end."""
_LEAST_REST = 0.12
"""Least share of samples in which nothing differs around a pixel."""
_SURROUNDINGS = 1 / 40
"""Half the width of what is around a pixel, as a share of the picture's longer side."""


@dataclass(eq=False)
class Plate:
    """What stood behind the people of a view. Arrays have the view's size (H, W)."""

    background: np.ndarray
    """(H, W, 3) uint8 RGB; plausible where it is not known."""
    known: np.ndarray
    """(H, W) bool."""
    noise: np.ndarray
    """(H, W) float32, grey levels: standard deviation of a channel while nobody is there."""

    def within(self, seen: np.ndarray) -> Plate:
        """The plate, known only where a sample shows what was in front of it (`seen_area`): (H, W) bool."""
        return replace(self, known=self.known & seen)


def estimate_plate(frames: FrameStore, view: View) -> Plate:
    """The clean plate of a view whose samples are aligned in the store; it has two or more."""
    samples = view.samples
    sharp = np.array([warp is None for warp in view.warps])
    height, width = frames.shape[:2]
    level = noise_level(frames, samples)
    background = np.empty(frames.shape, np.uint8)
    known, noise = np.empty((height, width), bool), np.empty((height, width), np.float32)
    rows = max(1, _BAND_BYTES // (len(samples) * width * 3))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        band = frames.band(samples, top, bottom).reshape(len(samples), -1, 3)
        band = np.ascontiguousarray(band.transpose(2, 0, 1))  # numpy is slow along an axis of three
        colour, trusted, spread = _background(band, level, sharp)
        background[top:bottom] = colour.reshape(bottom - top, width, 3)
        known[top:bottom] = trusted.reshape(bottom - top, width)
        noise[top:bottom] = spread.reshape(bottom - top, width)
    plate = Plate(background, known, noise)
    plate.known &= _rest(frames, samples, plate) >= _LEAST_REST
    # What is known in specks is so by chance, and what is unknown in specks is noise.
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    smooth = cv2.medianBlur(plate.known.view(np.uint8) * 255, 5)
    plate.known &= cv2.morphologyEx(smooth, cv2.MORPH_OPEN, disc) > 0
    return plate


def noise_level(frames: FrameStore, samples: list[int]) -> float:
    """Standard deviation of a channel between samples, in grey levels, by the median over the picture; 1 or more."""
    pairs = list(pairwise(samples))
    chosen = pairs[:: max(1, len(pairs) // 8)]
    levels = []
    for first, second in chosen:
        difference = np.abs(frames[first].astype(np.int16) - frames[second]).ravel()
        # Between whole numbers, so that quiet clips have a median other than 0 or 1.
        below, at = np.mean(difference < np.median(difference)), np.mean(difference <= np.median(difference))
        middle = np.median(difference) - 0.5 + (0.5 - below) / max(at - below, 1e-9)
        levels.append(max(0.0, middle) / 0.6745 / np.sqrt(2))
    return max(_LEAST_NOISE, float(np.median(levels)))


def differs(frame: np.ndarray, plate: Plate, deviations: float) -> np.ndarray:
    """Where a frame (H, W, 3) differs from the plate by so many standard deviations of the noise, (H, W) bool."""
    away = largest(cv2.absdiff(frame, plate.background))
    return cv2.medianBlur((away > deviations * plate.noise).view(np.uint8), 3).view(bool)


def largest(channels: np.ndarray) -> np.ndarray:
    """The largest of three channels (H, W, 3), (H, W): quicker than numpy's ``max``."""
    first, second, third = cv2.split(channels)
    return cv2.max(cv2.max(first, second), third)


def _background(samples: np.ndarray, level: float, sharp: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Background (P, 3) uint8, whether it is known (P,) and its noise (P,) of the samples (3, n, P) of P pixels.

    ``sharp`` (n,) bool: samples that were not warped, which blurs.
    """
    reach = int(np.ceil(max(4.0, 3.5 * level)))
    first = _fullest_cluster(samples, reach)
    colour, spread, share, visits = first.colour, first.spread, first.share, first.visits
    # Where somebody stood for long there are two clusters: the background was seen before them and after.
    extent = _extent(first.inliers)
    doubtful = np.flatnonzero(share <= 1 - _RIVAL)
    if len(doubtful):
        rival = _fullest_cluster(samples[:, :, doubtful], reach, first.inliers[:, doubtful])
        strong = rival.share >= _RIVAL
        other = _extent(rival.inliers)
        longer = other - extent[doubtful]
        back, equal = strong & (longer >= _AS_LONG), strong & (np.abs(longer) < _AS_LONG)
        swapped = doubtful[back]
        colour[:, swapped], spread[swapped] = rival.colour[:, back], rival.spread[back]
        share[swapped], extent[swapped] = rival.share[back], other[back]
        visits[swapped], share[doubtful[equal]] = _LEAST_VISITS, 0
    known = (share >= _MAJORITY) | ((share >= _LEAST_SUPPORT) & (visits >= _LEAST_VISITS))
    known &= extent >= _LEAST_EXTENT
    if not sharp.all():
        clear = samples[:, sharp]
        near = _near(clear, colour, 2 * reach)
        count = near.sum(0)
        mean = (clear * near).sum(1, dtype=np.float32) / np.maximum(count, 1)
        colour = np.where(count >= _LEAST_VISITS, mean, colour)
    return np.rint(colour.T).astype(np.uint8), known, np.maximum(spread, level).astype(np.float32)


@dataclass(eq=False)
class _Cluster:
    """Samples of each of P pixels that show the same."""

    inliers: np.ndarray
    """(n, P) bool."""
    colour: np.ndarray
    """(3, P) float32: their mean."""
    spread: np.ndarray
    """(P,) float32: their standard deviation, of the channel in which it is largest."""
    share: np.ndarray
    """(P,) float: of all samples."""
    visits: np.ndarray
    """(P,) int: how many times they begin."""


def _fullest_cluster(samples: np.ndarray, reach: int, without: np.ndarray | None = None) -> _Cluster:
    """The cluster with most samples (3, n, P) of each pixel, of those that are not ``without`` (n, P) bool.

    The fullest window of one channel, within it that of the next, and of the last.
    """
    allowed = np.ones(samples.shape[1:], bool) if without is None else ~without
    left, middles = allowed, np.empty((3, samples.shape[2]), np.float32)
    # Far from all grey levels, and from one another.
    far = np.int16(1000) + (2 * reach + 1) * np.arange(samples.shape[1], dtype=np.int16)[:, None]
    for channel in (1, 0, 2):
        values = samples[channel].astype(np.int16)
        middle = _fullest_window(np.where(left, values, far), 2 * reach)
        left = left & (np.abs(values - middle) <= reach)
        middles[channel] = middle
    for _ in range(2):
        inliers = _near(samples, middles, reach) & allowed
        count = np.maximum(inliers.sum(0), 1)
        counted = samples * inliers
        mean = counted.sum(1, dtype=np.float32) / count
        middles = np.where(inliers.any(0), np.rint(mean), middles)
    square = np.einsum("cnp,cnp->cp", counted, counted, dtype=np.float32, casting="unsafe") / count
    spread = np.sqrt(np.maximum(square - mean**2, 0)).max(0)
    return _Cluster(inliers, mean, spread, inliers.mean(0), _begins(inliers))


def _extent(inliers: np.ndarray) -> np.ndarray:
    """Over which share of the time, (P,) float, inliers (n, P) bool are seen, but for a few at its ends."""
    seen = np.cumsum(inliers, axis=0, dtype=np.int16)
    total = seen[-1]
    few = np.floor(_ENDS * total).astype(np.int16)
    # Samples before the first that counts, and after the last.
    outside = (seen <= few).sum(0) + (seen >= np.maximum(total - few, 1)).sum(0) - 1
    extent: np.ndarray = np.maximum(1 - outside / len(inliers), 0)
    return extent


def _begins(inliers: np.ndarray) -> np.ndarray:
    """How many runs of True there are along the first axis of (n, P) bool: (P,) int."""
    begins: np.ndarray = inliers[0] + (inliers[1:] & ~inliers[:-1]).sum(0)
    return begins


def _near(samples: np.ndarray, colour: np.ndarray, reach: int) -> np.ndarray:
    """Which samples (3, n, P) uint8 are within ``reach`` of a colour (3, P) in every channel, (n, P) bool."""
    lowest = np.clip(np.ceil(colour - reach), 0, 255).astype(np.uint8)
    highest = np.clip(np.floor(colour + reach), 0, 255).astype(np.uint8)
    near = (samples[0] >= lowest[0]) & (samples[0] <= highest[0])
    for channel in (1, 2):
        near &= (samples[channel] >= lowest[channel]) & (samples[channel] <= highest[channel])
    return near


def _fullest_window(values: np.ndarray, width: int) -> np.ndarray:
    """Middle (P,) int16 of the window of ``width`` that holds most of the values (n, P) int16 of each pixel.

    In sorted values a window that begins at one of them holds k + 1 where the k-th after it is within its width. The
    longest such k is looked for from the longest on, among the pixels that have none yet.
    """
    ordered = np.sort(values, axis=0)
    count = len(ordered)
    best = ordered[0].copy()
    left = np.arange(ordered.shape[1])
    for longest in range(count - 1, 0, -1):
        fits = ordered[longest:] - ordered[:-longest] <= width
        new = fits.any(0)
        if not new.any():
            continue
        fits = fits[:, new]
        # Among equally full windows the one in the middle; its samples lie around their median.
        first, last = fits.argmax(0), len(fits) - 1 - fits[::-1].argmax(0)
        best[left[new]] = ordered[(first + last + longest) // 2, np.flatnonzero(new)]
        left, ordered = left[~new], ordered[:, ~new]
        if not len(left):
            break
    return best


def _rest(frames: FrameStore, samples: list[int], plate: Plate) -> np.ndarray:
    """Share of the samples in which nothing around a pixel differs from the plate, (H, W) float32."""
    height, width = plate.known.shape
    radius = max(1, round(max(height, width) * _SURROUNDINGS))
    around = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
    restless = np.zeros((height, width), np.float32)
    for number in samples:
        restless += cv2.dilate(differs(frames[number], plate, 6).view(np.uint8), around)
    return 1 - restless / len(samples)
