"""RC-S: whether what was painted has the texture, to DINOv2, of what is around it.

Removal Coherence, spatial; Li et al. 2026, "PROVE: A Perceptual RemOVal cohErence Benchmark for Visual Media" (ACM MM),
by its code, https://github.com/xiaomi-research/prove (Apache-2.0), ``utils/metrics.py`` and ``utils/predictors.py``.

Its windows of 16 tokens, each 8 from the last, are told for a grid of 64; the code sees crops at 448 pixels, whose grid
has 32, and halves both, so that in truth they have 8 tokens and lie 4 apart. Where that code rounds a crop's size to
447, and pads it, ours stays at 448.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import cv2
import numpy as np

from dataset_tools.errors import UserError
from dataset_tools.estimators.network import load_pretrained
from mild.metrics.metric import Judged, NotComputed, PictureMetric, Region
from mild.metrics.network_metric import MetricNetwork, NetworkMetric

SIDE = 448
"""Of what DINOv2 sees, in pixels."""
PATCH = 14
"""Side of a token, in pixels."""
GRID = SIDE // PATCH
WINDOW, STRIDE = 16 * GRID // 64, 8 * GRID // 64
"""Tokens."""
FEWEST = 5
"""More tokens than that must a side of a window have."""
SMALLEST = 200
"""Pixels of a part of the hole; smaller ones count only where there is none that is larger."""
SIGMA, SCALE, TAU = 10.0, 1000.0, 3.0
"""Of the Gaussian kernel, what the discrepancy is multiplied with, and what its exponential divides it by."""
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's colours."""


class RCS(NetworkMetric, PictureMetric):
    """exp(-discrepancy / 3) of tokens in the hole and around it, window by window, 0..1; mean over the hole's parts."""

    kind: Literal["rc_s"] = "rc_s"
    digits: ClassVar[int] = 4
    larger_is_better: ClassVar[bool] = True

    @property
    def title(self) -> str:
        """See `MetricSettings.title`."""
        return "RC-S"

    @property
    def region(self) -> Region:
        """See `MetricSettings.region`."""
        return "hole"

    @property
    def network(self) -> str:
        """See `MetricSettings.network`."""
        return f"DINOv2, {self.checkpoint}, square crops around the hole's parts at {SIDE}"

    @property
    def usual_weights(self) -> str:
        """See `NetworkMetric.usual_weights`."""
        return "dinov2-giant"

    @property
    def reference(self) -> str:
        """See `MetricSettings.reference`."""
        return "none"

    def open(self) -> DINOv2:
        """See `NetworkMetric.open`."""
        return DINOv2(self)

    def score(self, judged: Sequence[Judged]) -> list[float | NotComputed]:
        """See `PictureMetric.score`."""
        crops = [(index, crop) for index, one in enumerate(judged) for crop in squares(one.hole)]
        values: list[list[float | None]] = [[] for _ in judged]
        network = self.open()
        for start in range(0, len(crops), self.batch_size):
            chunk = crops[start : start + self.batch_size]
            features = network.features([judged[index].result[crop] for index, crop in chunk])
            for (index, crop), grid in zip(chunk, features, strict=True):
                values[index].append(rc_s(grid, tokens_touching(judged[index].hole[crop])))
        found: list[float | NotComputed] = []
        for parts in values:
            there = [part for part in parts if part is not None]
            if len(there) < len(parts):  # as in the released code, whose mean is then not a number
                found.append(NotComputed("beside a part of the hole there is nothing to compare it with"))
            else:
                found.append(float(np.mean(there)))
        return found


class DINOv2(MetricNetwork):
    """DINOv2 (Oquab et al. 2023)."""

    package = "transformers"
    beside = ("numpy", "opencv-python-headless", "pillow")
    files = ("config.json", "*.safetensors", "*.safetensors.index.json")

    def load(self) -> Any:
        """See `NetworkEstimator.load`."""
        from transformers import Dinov2Model

        model = load_pretrained(self, Dinov2Model)
        if model.config.patch_size != PATCH:
            raise UserError(f"{self.settings.weights} has tokens of {model.config.patch_size} pixels, and not {PATCH}")
        return model

    def features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """(N, `GRID`, `GRID`, C) float32, the last layer's normalised tokens, of square pictures (H, H, 3) uint8."""
        import torch

        scaled = [cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR) for picture in pictures]
        seen = (np.stack(scaled) / 255 - np.array(_MEAN)) / np.array(_DEVIATION)
        with self.model() as model:
            tokens = model(
                torch.from_numpy(seen.astype(np.float32)).permute(0, 3, 1, 2).to(self.device)
            ).last_hidden_state
            features: np.ndarray = tokens[:, 1:].unflatten(1, (GRID, GRID)).cpu().numpy()
        return features


def squares(hole: np.ndarray) -> list[tuple[slice, slice]]:
    """Rows and columns of a square around each part of a hole, a third of its side larger on each of its four sides.

    As much less as the nearest border of the picture asks for; moved into the picture where it would stick out, and no
    larger than the picture's shorter side.

    Args:
        hole: (H, W) bool, not empty; its parts are 4-connected.
    """
    _, _, boxes, _ = cv2.connectedComponentsWithStats(hole.astype(np.uint8), connectivity=4)
    parts = boxes[1:].tolist()
    smallest = min(SMALLEST, max(area for *_, area in parts))
    height, width = hole.shape
    found = []
    for left, top, across, down, area in parts:
        if area < smallest:
            continue
        side = max(across, down)
        x, y = round(left + across / 2 - side / 2), round(top + down / 2 - side / 2)
        margin = max(0, min(round(side / 3), x, y, width - (x + side), height - (y + side)))
        side = min(side + 2 * margin, width, height)
        x, y = (max(0, min(at - margin, end - side)) for at, end in ((x, width), (y, height)))
        found.append((slice(y, y + side), slice(x, x + side)))
    return found


def tokens_touching(mask: np.ndarray) -> np.ndarray:
    """(`GRID`, `GRID`) bool of a square mask (H, H) bool: tokens that it touches, at the size that the network sees."""
    seen = cv2.resize(mask.astype(np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_NEAREST) > 0
    return np.logical_or.reduce(seen.reshape(GRID, PATCH, GRID, PATCH), axis=(1, 3))


def rc_s(features: np.ndarray, hole: np.ndarray) -> float | None:
    """Removal coherence of one crop, 0..1: exp(-d / `TAU`), d the mean discrepancy of its windows.

    Of windows with more than `FEWEST` tokens in the hole: those with as many outside compare both; those without any
    outside compare theirs with all tokens of the crop outside; others do not count. The discrepancy is the squared
    maximum mean discrepancy (Gretton et al. 2012, eq. 5) of tokens of length 1 under a Gaussian kernel, times `SCALE`.

    Args:
        features: (`GRID`, `GRID`, C).
        hole: (`GRID`, `GRID`) bool.

    Returns:
        None where no window counts.
    """
    tokens = features.reshape(GRID * GRID, -1).astype(np.float64)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    kernel = np.exp((tokens @ tokens.T - 1) / SIGMA**2)  # |a - b|^2 = 2 - 2 a b
    numbers, found = np.arange(GRID * GRID).reshape(GRID, GRID), []
    for top in range(0, GRID - WINDOW + 1, STRIDE):
        for left in range(0, GRID - WINDOW + 1, STRIDE):
            window = np.s_[top : top + WINDOW, left : left + WINDOW]
            inside, outside, fewest = numbers[window][hole[window]], numbers[window][~hole[window]], FEWEST
            if not len(outside):
                outside, fewest = numbers[~hole], 0
            if len(inside) > FEWEST and len(outside) > fewest:
                found.append(_discrepancy(kernel, inside, outside))
    return math.exp(-max(0.0, float(np.mean(found))) / TAU) if found else None


def _discrepancy(kernel: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Of two sets of tokens, by their numbers in the kernel (N, N)."""
    within_a, within_b, between = (kernel[np.ix_(*pair)].mean() for pair in ((a, a), (b, b), (a, b)))
    return float(within_a + within_b - 2 * between) * SCALE
