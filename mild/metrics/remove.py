"""ReMOVE: whether what was painted looks, to SAM, like what is around it.

Chandrasekar et al. 2024, "ReMOVE: A Reference-free Metric for Object Erasure" (CVPR workshops), in the crop mode of its
code, https://github.com/chandrasekaraditya/ReMOVE (MIT). Without the crop that pads a picture which is not square, but
not its mask, so that both are shifted against each other; so it does where the crop's square sticks out of the picture.
Here a mask is padded as its picture is, and padding belongs to neither side.

RC-S (`mild.metrics.rcs`) was made because this favours blurred results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dataset_tools.errors import UserError
from dataset_tools.estimators.network import load_pretrained
from dataset_tools.masks import bounds
from mild.metrics.metric import Judged, NotComputed, PictureMetric, Region
from mild.metrics.network_metric import MetricNetwork, NetworkMetric

SIDE = 1024
"""Of what SAM sees, in pixels."""
TOKENS = 64
"""SAM's features are a grid of so many a side."""
MARGIN = 16
"""Pixels of the picture around the hole, where there are so many."""
_MEAN, _DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of ImageNet's colours, as SAM takes them."""


class Remove(NetworkMetric, PictureMetric):
    """Cosine similarity of SAM's mean features in the hole and around it, -1..1."""

    kind: Literal["remove"] = "remove"
    digits: ClassVar[int] = 4
    larger_is_better: ClassVar[bool] = True
    batch_size: int = Field(1, ge=1, le=1024)
    """Pictures that its network sees at once; each takes gigabytes with ViT-H."""

    @property
    def title(self) -> str:
        """See `MetricSettings.title`."""
        return "ReMOVE"

    @property
    def region(self) -> Region:
        """See `MetricSettings.region`."""
        return "hole"

    @property
    def network(self) -> str:
        """See `MetricSettings.network`."""
        return f"SAM, {self.checkpoint}, square crop at the hole, long side {SIDE}"

    @property
    def usual_weights(self) -> str:
        """See `NetworkMetric.usual_weights`."""
        return "sam-vit-huge"

    @property
    def reference(self) -> str:
        """See `MetricSettings.reference`."""
        return "none"

    def open(self) -> SAM:
        """See `NetworkMetric.open`."""
        return SAM(self)

    def score(self, judged: Sequence[Judged]) -> list[float | NotComputed]:
        """See `PictureMetric.score`."""
        crops = [square(one.hole) for one in judged]
        features = self.open().features([one.result[crop] for one, crop in zip(judged, crops, strict=True)])
        found: list[float | NotComputed] = []
        for one, crop, grid in zip(judged, crops, features, strict=True):
            hole = one.hole[crop]
            value = remove(grid, tokens_within(hole), tokens_within(np.ones_like(hole)))
            why = "no token of SAM lies wholly in the hole, or none beside it"
            found.append(NotComputed(why) if value is None else value)
        return found


class SAM(MetricNetwork):
    """The image encoder of Segment Anything (Kirillov et al. 2023)."""

    package = "transformers"
    beside = ("numpy", "opencv-python-headless", "pillow")
    files = ("config.json", "*.safetensors", "*.safetensors.index.json")

    def load(self) -> Any:
        """See `NetworkEstimator.load`."""
        from transformers import SamModel

        model = load_pretrained(self, SamModel)
        side = model.config.vision_config.image_size
        if side != SIDE:
            raise UserError(f"{self.settings.weights} sees {side} pixels a side: take a SAM that sees {SIDE}")
        return model

    def features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """(N, C, `TOKENS`, `TOKENS`) float32 of pictures (H, W, 3) uint8, padded below and to the right."""
        import torch

        seen = np.zeros((len(pictures), SIDE, SIDE, 3), np.float32)
        for index, picture in enumerate(pictures):
            scaled = (_enlarged(picture).astype(np.float32) - _MEAN) / _DEVIATION
            seen[index, : scaled.shape[0], : scaled.shape[1]] = scaled
        with self.model() as model:
            pixels = torch.from_numpy(seen).permute(0, 3, 1, 2).to(self.device)
            features: np.ndarray = model.get_image_embeddings(pixels).cpu().numpy()
        return features


def square(hole: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the square from a hole's upper left corner, with a margin, cut where the picture ends.

    Args:
        hole: (H, W) bool, not empty.
    """
    top, bottom, left, right = bounds(hole)
    # The released code counts to the last row and column within the hole.
    margin = min(MARGIN, top, left, hole.shape[0] - (bottom - 1), hole.shape[1] - (right - 1))
    side = max(bottom - top, right - left) + 2 * margin
    top, left = top - margin, left - margin
    return slice(top, min(top + side, hole.shape[0])), slice(left, min(left + side, hole.shape[1]))


def tokens_within(mask: np.ndarray) -> np.ndarray:
    """(`TOKENS`, `TOKENS`) bool: which of SAM's features, of a picture padded to a square, lie in a mask (H, W) bool.

    As the released code has it, those where the mask, resized by Pillow's default (bicubic), is still 255.
    """
    from PIL import Image

    padded = np.zeros((max(mask.shape),) * 2, np.uint8)
    padded[: mask.shape[0], : mask.shape[1]] = mask * np.uint8(255)
    return np.asarray(Image.fromarray(padded).resize((TOKENS, TOKENS))) == 255


def remove(features: np.ndarray, hole: np.ndarray, picture: np.ndarray) -> float | None:
    """Cosine similarity of the mean features in the hole and in the rest of the picture.

    Args:
        features: (C, H, W).
        hole, picture: (H, W) bool, where each lies.

    Returns:
        None where one of both is empty.
    """
    around = picture & ~hole
    if not hole.any() or not around.any():
        return None
    inside, outside = (features[:, where].mean(1, dtype=np.float64) for where in (hole, around))
    return float(inside @ outside / (np.linalg.norm(inside) * np.linalg.norm(outside)))


def _enlarged(picture: np.ndarray) -> np.ndarray:
    """At the size that SAM sees, its longer side `SIDE`, by Pillow's bilinear resizing as SAM's own code does it."""
    from PIL import Image

    height, width = (int(side * SIDE / max(picture.shape[:2]) + 0.5) for side in picture.shape[:2])
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
