"""LPIPS (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"), version 0.1.

The network and its learned heads are torchmetrics'; what it stands on, trained on ImageNet, is torchvision's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from mild.metrics.metric import Judged, NotComputed, PictureMetric, Region
from mild.metrics.network_metric import MetricNetwork, NetworkMetric

Backbone = Literal["alex", "vgg", "squeeze"]
TITLES: dict[Backbone, str] = {"alex": "AlexNet", "vgg": "VGG-16", "squeeze": "SqueezeNet 1.1"}
SMALLEST: dict[Backbone, int] = {"alex": 31, "vgg": 16, "squeeze": 17}
"""Shortest side, in pixels, of which the coarsest features can be made."""

_ARCHITECTURES: dict[Backbone, str] = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
"""In ``torchvision.models``."""
_SLICE = re.compile(r"^slices?\.?\d+\.")
"""What torchmetrics puts before torchvision's names of layers."""


class LPIPS(NetworkMetric, PictureMetric):
    """Over the whole picture, at its own size. Values of different backbones cannot be compared.

    What is not known of the clean background counts as equal.
    """

    kind: Literal["lpips"] = "lpips"
    digits: ClassVar[int] = 4
    larger_is_better: ClassVar[bool] = False
    backbone: Backbone = "alex"
    """Whose features are compared: AlexNet's in most publications, VGG's in those that descend from LaMa."""

    @property
    def usual_weights(self) -> str:
        """See `NetworkMetric.usual_weights`."""
        return f"lpips-{self.backbone}"

    def open(self) -> LPIPSNetwork:
        """See `NetworkMetric.open`."""
        return LPIPSNetwork(self)

    @property
    def variant(self) -> str:
        """See `NetworkMetric.variant`."""
        return "" if self.backbone == "alex" else self.backbone

    @property
    def title(self) -> str:
        """See `MetricSettings.title`."""
        return f"LPIPS ({TITLES[self.backbone]})"

    @property
    def region(self) -> Region:
        """See `MetricSettings.region`."""
        return "picture"

    @property
    def network(self) -> str:
        """See `MetricSettings.network`."""
        return f"{TITLES[self.backbone]} ({self.checkpoint}), heads of LPIPS 0.1, picture's own size"

    def score(self, judged: Sequence[Judged]) -> list[float | NotComputed]:
        """See `PictureMetric.score`."""
        smallest = SMALLEST[self.backbone]
        why = f"the picture is smaller than {smallest} pixels, of which the coarsest features are made"
        found: list[float | NotComputed] = [NotComputed(why)] * len(judged)
        large = [index for index, one in enumerate(judged) if min(one.hole.shape) >= smallest]
        results, truths = [judged[index].result for index in large], []
        for index in large:
            truth = judged[index].truth
            assert truth is not None
            truths.append(truth)
        for index, value in zip(large, self.open().distances(results, truths), strict=True):
            found[index] = value
        return found


class LPIPSNetwork(MetricNetwork):
    """Backbone and heads."""

    settings: LPIPS
    package = "torchmetrics"
    beside = ("torchvision",)
    files = ("*.pth",)

    def __init__(self, settings: LPIPS) -> None:
        super().__init__(settings)
        self.name = f"{TITLES[settings.backbone]} of LPIPS"

    def load(self) -> Any:
        """See `dataset_tools.estimators.network.NetworkEstimator.load`."""
        import torch
        import torchvision
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        with torch.device("meta"):  # the file fills all of it
            backbone = getattr(torchvision.models, _ARCHITECTURES[self.settings.backbone])(weights=None)
        backbone.load_state_dict(self.tensors(), assign=True)
        layers = backbone.features.state_dict()
        network = _NoTrainLpips(net=self.settings.backbone, pnet_rand=True)  # heads are the learned ones all the same
        network.net.load_state_dict({name: layers[_SLICE.sub("", name)] for name in network.net.state_dict()})
        return network.to(self.device)

    def distances(self, results: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> list[float]:
        """LPIPS of pairs of pictures (H, W, 3) uint8, each pair of one size, no side shorter than `SMALLEST`."""
        found = [0.0] * len(results)
        if not results:
            return found
        with self.model() as network:
            for same, (result, truth) in self.batches(results, truths):
                values = network(result / 127.5 - 1, truth / 127.5 - 1).flatten().tolist()
                for index, value in zip(same, values, strict=True):
                    found[index] = value
        return found
