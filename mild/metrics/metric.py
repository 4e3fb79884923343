"""What a metric is, and what it asks of the pictures that it compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


class NotComputed(Exception):
    """A metric has no value here; the message is the reason, for a person to read."""


@dataclass(frozen=True)
class Metric:
    """A metric as tables show it. Infinite values are possible (PSNR of identical pictures)."""

    name: str
    title: str
    """For headings."""
    larger_is_better: bool
    digits: int
    """Decimals that mean something."""
    score: Callable[[np.ndarray, np.ndarray, np.ndarray], float]
    """result, truth, hole (H, W) bool to value; raises `NotComputed`."""


def check_sizes(result: np.ndarray, truth: np.ndarray) -> None:
    """Raise `NotComputed` unless both pictures, (H, W, 3) uint8, are of one size."""
    if result.shape != truth.shape:
        raise NotComputed(
            f"the result is {result.shape[1]}x{result.shape[0]}, the truth {truth.shape[1]}x{truth.shape[0]}"
        )


def check_hole(hole: np.ndarray, truth: np.ndarray) -> None:
    """Raise `NotComputed` unless the hole, (H, W) bool, is of the picture's size and holds something."""
    if hole.shape != truth.shape[:2]:
        raise NotComputed(f"the hole is {hole.shape[1]}x{hole.shape[0]}, the picture {truth.shape[1]}x{truth.shape[0]}")
    if not hole.any():
        raise NotComputed("the hole is empty")
