"""Where a picture differs from its clean plate beyond what noise, another exposure or a shift by a part of a pixel do.

Log-luminance and chroma are looked at apart, as in published effect masks (0.6 of log-luminance, 0.3 of chroma, 0.1 of
gradient, cut at 0.07). Here the cut follows from each pair: what static parts show, by their brightness and texture, is
noise, and gradients of the plate, along which small shifts make differences, raise it.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from pydantic import Field

from dataset_tools.errors import Rejected
from dataset_tools.settings import Settings

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_SMOOTH = 1.0
"""Standard deviation, pixels, of the blur before all else; a median of five pixels follows."""
_DARK, _DARK_CHROMA = 8.0, 32.0
"""Grey levels added before logarithms: where it is dark, noise would be all that they show."""
_PER_GRADIENT = 0.15
"""Pixels by which the two may be shifted."""
_LEAST_STATIC = 0.1
"""Share of the picture that must be static: less tells no noise."""
_CLIPPED = 245


class DifferenceSettings(Settings):
    """What counts as a difference of a picture and its clean plate. Changes are of natural logarithms."""

    noise: float = Field(5.0, gt=0)
    """So many standard deviations of the noise that static parts of the pair show are a difference."""
    least_luminance: float = Field(0.03, gt=0)
    """Least change of luminance that is one, however little noise there is."""
    least_chroma: float = Field(0.08, gt=0)
    """Least change of the colours' ratios that is one."""
    max_exposure: float = Field(0.25, gt=0)
    """Largest difference of exposure or white balance that is compensated; of more, nothing can be told."""
    max_noise: float = Field(0.2, gt=0)
    """Largest change of luminance, as its median over the picture, that may still be noise: of pairs that show less
    alike, nothing can be told."""


@dataclass(eq=False)
class Differences:
    """How image and plate differ at each pixel, exposure compensated. Arrays are (H, W) float32."""

    luminance: np.ndarray
    """Log-luminance of the image minus that of the plate."""
    luminance_excess: np.ndarray
    """Its size over what counts as a difference; 1 and more is one."""
    chroma_excess: np.ndarray
    """As `luminance_excess`, of the colours' ratios."""
    chroma: np.ndarray
    """(H, W, 2): log red / green and blue / green of the image minus those of the plate."""
    least_chroma: np.ndarray
    """The size of `chroma` that is a difference."""
    texture: np.ndarray
    """Squared gradient of the plate's log-luminance."""
    change: np.ndarray
    """Squared gradient of `luminance`, before the median."""
    noise: float
    """What `change` is where nothing differs."""


def differences(
    image: np.ndarray, background: np.ndarray, static: np.ndarray, settings: DifferenceSettings
) -> Differences:
    """Compare a picture with its clean plate.

    Args:
        image: (H, W, 3) uint8 RGB.
        background: (H, W, 3) RGB, 0..255, the plate.
        static: (H, W) bool, at most half of which differs: what is known of the plate, and no person.
        settings: what counts as a difference.

    Raises:
        Rejected: ``nothing-static``; ``exposure-differs``: more than may be compensated; ``not-alike``: static parts
            differ too much.
    """
    if np.count_nonzero(static) < _LEAST_STATIC * static.size:
        raise Rejected("nothing-static", f"{static.mean():.0%} of the picture are static: too little to tell noise by")
    seen, plate = (cv2.GaussianBlur(pixels.astype(np.float32), (0, 0), _SMOOTH) for pixels in (image, background))
    gain = _exposure(seen, plate, static)
    if np.abs(np.log(gain)).max() > settings.max_exposure:
        told = ", ".join(f"{value:.2f}" for value in gain)
        raise Rejected("exposure-differs", f"the picture is {told} times as bright (R, G, B) as its plate")
    # Both as the darker exposure would clip them.
    plate, seen = np.minimum(plate * gain, 255), np.minimum(seen, 255 * np.minimum(gain, 1))
    brightness = plate @ _LUMA
    log_plate = np.log(brightness + _DARK)
    raw = np.log(seen @ _LUMA + _DARK) - log_plate
    luminance = cv2.medianBlur(raw, 5)
    ratios = [_chroma(pixels) for pixels in (seen, plate)]
    chroma = cv2.merge([cv2.medianBlur(one - other, 5) for one, other in zip(*ratios, strict=True)])
    colourful = np.hypot(chroma[..., 0], chroma[..., 1])
    texture, change = _squared_gradient(log_plate), _squared_gradient(raw)
    steepest = np.sqrt(cv2.dilate(texture, np.ones((5, 5), np.uint8)))
    alike = _alike(brightness, steepest, static)

    # Medians of a normal distribution's size, and of a Rayleigh distribution, as standard deviations.
    luminance_noise = settings.noise / 0.6745 * _median_of_alike(np.abs(luminance), alike, static)
    chroma_noise = settings.noise / 1.1774 * _median_of_alike(colourful, alike, static)
    if (typical := float(np.median(luminance_noise[static]))) > settings.max_noise:
        message = f"static parts of picture and plate differ so much that only changes above {typical:.0%} would tell"
        raise Rejected("not-alike", message)
    shifted = _PER_GRADIENT * steepest
    least_chroma = np.maximum(chroma_noise, settings.least_chroma) + shifted
    return Differences(
        luminance=luminance,
        luminance_excess=np.abs(luminance) / (np.maximum(luminance_noise, settings.least_luminance) + shifted),
        chroma_excess=colourful / least_chroma,
        chroma=chroma,
        least_chroma=least_chroma,
        texture=texture,
        change=change,
        noise=float(np.median(change[static])),
    )


def _exposure(seen: np.ndarray, plate: np.ndarray, static: np.ndarray) -> np.ndarray:
    """How many times as bright the picture is as its plate, (3,) float32: where most of the static pixels agree."""
    gain = np.ones(3, np.float32)
    for channel in range(3):
        one, other = seen[..., channel], plate[..., channel]
        usable = static & (other > 24) & (other < _CLIPPED) & (one > 8) & (one < _CLIPPED)
        ratio = np.log(one[usable]) - np.log(other[usable])
        if len(ratio) < 100:
            continue
        middle = float(np.median(ratio))
        for _ in range(3):
            away = np.abs(ratio - middle)
            middle = float(np.median(ratio[away <= max(0.01, 3.7 * float(np.median(away)))]))
        gain[channel] = np.exp(middle)
    return gain


def _chroma(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    red, green, blue = cv2.split(np.log(pixels + _DARK_CHROMA))
    return red - green, blue - green


def _squared_gradient(values: np.ndarray) -> np.ndarray:
    along_x, along_y = (cv2.Sobel(values, cv2.CV_32F, *axis, scale=1 / 8) for axis in ((1, 0), (0, 1)))
    return along_x**2 + along_y**2


def _alike(brightness: np.ndarray, steepest: np.ndarray, static: np.ndarray) -> np.ndarray:
    """Numbers (H, W) of classes of pixels of like brightness and texture, in which noise is alike."""
    bright = np.quantile(brightness[static], np.arange(1, 6) / 6)
    steep = np.quantile(steepest[static], (0.5, 0.75, 0.9))
    return np.searchsorted(bright, brightness) * 4 + np.searchsorted(steep, steepest)


def _median_of_alike(sizes: np.ndarray, alike: np.ndarray, static: np.ndarray) -> np.ndarray:
    """The median of static pixels (H, W) in each class; of all where a class has few."""
    values, classes = sizes[static], alike[static]
    table = np.full(24, np.median(values), np.float32)
    for number in range(24):
        found = values[classes == number]
        if len(found) >= 50:
            table[number] = np.median(found)
    return table[alike]
