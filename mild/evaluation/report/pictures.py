"""What the report shows of single pictures: made smaller, and embedded as data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mild.evaluation.gallery import ShownCase, ShownLayers
from mild.evaluation.report.tables import number
from mild.evaluation.summary import MetricRow

LONGEST_SIDE = 512
"""Pictures are embedded at most so large, in pixels; the exact ones lie beside the report."""
WEBP_QUALITY = 85
OVERLAY_COLOUR = (228, 60, 60)
OVERLAY_STRENGTH = 0.55


@dataclass(frozen=True)
class Tile:
    """A picture of a case."""

    name: str
    """``before``, ``mask``, ``truth``, or a method's, which begins with ``method:``."""
    title: str
    alt: str
    source: str
    """Data URI; empty where there is no result."""
    difference: str = ""
    """Data URI of a method's `difference`."""


@dataclass(frozen=True)
class Score:
    """A method's value on a case by a metric."""

    metric: str
    text: str
    sortable: str
    """A number as JavaScript reads it; empty where there is no value."""


@dataclass(frozen=True)
class Scores:
    """A method's values on a case."""

    name: str
    """As its tile's."""
    title: str
    scores: list[Score]
    not_computed: list[str]


@dataclass(frozen=True)
class GalleryCase:
    """A case as the page shows it."""

    case: ShownCase
    crowd: str
    width: int
    height: int
    tiles: list[Tile]
    table: list[Scores]
    compared_with: str
    """What differences are taken to."""


@dataclass(frozen=True)
class LayeredCase:
    """A picture in layers as the page shows it; without loss, so that it is put together exactly."""

    shown: ShownLayers
    width: int
    height: int
    before: str
    background: str
    layers: list[str]


def gallery_case(case: ShownCase, titles: Mapping[str, str], metrics: Sequence[MetricRow]) -> GalleryCase:
    """Read a case's pictures and embed them.

    Args:
        titles: of the methods by name, in the order of tables.
        metrics: whose values are told.
    """
    before, truth = _rgb(case.before), _rgb(case.truth) if case.truth else None
    with Image.open(case.mask) as mask:
        overlay = _overlay(before, np.asarray(mask.convert("L")) > 0)
    overlap = ", overlapping" if case.overlap else ""
    crowd = f"{case.people} {'person' if case.people == 1 else 'people'}{overlap}, {case.masks} masks"
    tiles = [
        Tile("before", "Before", f"{case.key} before: {crowd}", _embedded(before)),
        Tile("mask", "Mask", f"{case.key}: what is to be erased, in red", _embedded(overlay)),
    ]
    if truth is not None:
        tiles.append(Tile("truth", "Clean background", f"{case.key}: the clean background", _embedded(truth)))
    table = []
    for method, title in titles.items():
        if method not in case.results and not case.not_computed.get(method):
            continue
        source = changed = ""
        if method in case.results:
            result = _rgb(case.results[method])
            source, changed = _embedded(result), _embedded(difference(result, before if truth is None else truth))
        tiles.append(Tile(f"method:{method}", title, f"{case.key} erased by {title}", source, changed))
        values = case.values.get(method, {})
        scores = [_score(metric, values.get(metric.name)) for metric in metrics]
        table.append(Scores(f"method:{method}", title, scores, case.not_computed.get(method, [])))
    height, width = before.shape[:2]
    return GalleryCase(
        case, crowd, width, height, tiles, table, "the picture before" if truth is None else "the clean background"
    )


def layered_case(shown: ShownLayers) -> LayeredCase:
    """Read a picture's layers and embed them."""
    background = _rgb(shown.background)
    layers = []
    for path in shown.layers:
        with Image.open(path) as layer:
            layers.append(_embedded(np.asarray(layer.convert("RGBA")), lossless=True))
    height, width = background.shape[:2]
    before, behind = _embedded(_rgb(shown.before)), _embedded(background, lossless=True)
    return LayeredCase(shown, width, height, before, behind, layers)


def difference(result: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(H, W) uint8: the largest difference of a pixel's channels; of two pictures (H, W, 3) uint8 RGB."""
    largest: np.ndarray = cv2.absdiff(result, reference).max(axis=2)
    return largest


def _score(metric: MetricRow, value: float | None) -> Score:
    if value is None:
        return Score(metric.name, "–", "")
    if not math.isfinite(value):
        return Score(metric.name, "identical", "Infinity" if value > 0 else "-Infinity")
    return Score(metric.name, number(value, metric.digits), repr(float(value)))


def _rgb(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with the mask in red and its outline in white, which shows on red things, too."""
    tinted = (1 - OVERLAY_STRENGTH) * image + OVERLAY_STRENGTH * np.array(OVERLAY_COLOUR)
    width = max(1, min(mask.shape) // 150)
    outline = cv2.dilate(mask.astype(np.uint8), np.ones((2 * width + 1, 2 * width + 1), np.uint8)).astype(bool) & ~mask
    shown = np.where(mask[..., None], tinted, image)
    shown[outline] = 255
    return shown.astype(np.uint8)


def _embedded(picture: np.ndarray, *, lossless: bool = False) -> str:
    """The picture, (H, W), (H, W, 3) or (H, W, 4) uint8, as a data URI."""
    image = Image.fromarray(picture)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY, lossless=lossless)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
