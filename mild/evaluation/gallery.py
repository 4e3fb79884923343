"""What the report shows of single pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ShownCase:
    """A picture with one kind of masks, and what all methods made of it. Files are PNG of one size."""

    dataset: str
    key: str
    masks: str
    """Kind of masks."""
    people: int
    overlap: bool
    hole_share: float
    """Share of the picture in the hole, 0..1."""
    before: Path
    mask: Path
    """What methods were given: 0 or 255."""
    truth: Path | None
    results: dict[str, Path]
    """By method; those without a result are left out."""
    values: dict[str, dict[str, float | None]]
    """Method to metric to value; infinite for identical pictures, None where there is none."""
    not_computed: dict[str, list[str]]
    """Method to reasons."""


@dataclass(frozen=True)
class ShownLayers:
    """Layers of a picture, to be put together by eq. 2 in the browser. Files are PNG of one size."""

    dataset: str
    key: str
    method: str
    before: Path
    background: Path
    """RGB, with nobody."""
    layers: list[Path]
    """RGBA, one a person."""
    order: list[int]
    """Indices of the layers from back to front."""
