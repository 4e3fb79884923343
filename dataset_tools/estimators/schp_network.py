"""The network of Self-Correction for Human Parsing (Li et al. 2019) in plain torch, for inference.

CE2P (Ruan et al. 2018) on a ResNet-101: ``networks/AugmentCE2P.py`` of PeikeLi/Self-Correction-Human-Parsing (MIT),
module for module under the same names, so that the official checkpoints fit key by key. Theirs needs the compiled
extension InPlaceABN, which saves memory in training only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

EPSILON = 1e-5
SLOPE = 0.01
"""Of the leaky ReLU below zero."""


class ActivatedBatchNorm(nn.Module):
    """Batch normalisation by stored statistics and what follows it, in one module as in ``InPlaceABNSync``.

    Two things differ from `torch.nn.BatchNorm2d`: the scale is |weight| + epsilon (``inplace_abn_cuda.cu``), and
    there is no ``num_batches_tracked``.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, channels: int, *, leaky: bool = True) -> None:
        """
        Args:
            channels: of the input.
            leaky: whether a leaky ReLU follows; the backbone has its own.
        """
        super().__init__()
        self.leaky = leaky
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight.abs() + EPSILON
        x = F.batch_norm(x, self.running_mean, self.running_var, scale, self.bias, eps=EPSILON)
        return F.leaky_relu(x, SLOPE, inplace=True) if self.leaky else x


class Bottleneck(nn.Module):
    """A block of the ResNet."""

    def __init__(self, inputs: int, planes: int, *, stride: int = 1, dilation: int = 1, project: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = ActivatedBatchNorm(planes, leaky=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn2 = ActivatedBatchNorm(planes, leaky=False)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = ActivatedBatchNorm(4 * planes, leaky=False)
        self.downsample = None
        if project:
            convolution = nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, ActivatedBatchNorm(4 * planes, leaky=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class PyramidPooling(nn.Module):
    """``PSPModule``: what the whole picture, and its halves, thirds and sixths, hold."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), *_activated(inputs, outputs)) for size in (1, 2, 3, 6)
        )
        self.bottleneck = nn.Sequential(*_activated(inputs + 4 * outputs, outputs, kernel=3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bottleneck(torch.cat([*(_resize(stage(x), x) for stage in self.stages), x], 1))


class EdgeBranch(nn.Module):
    """``Edge_Module``: features of the borders between parts, at the size of the first input.

    ``conv4`` and ``conv5`` draw the borders themselves, which training alone looks at.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*_activated(256, 256))
        self.conv2 = nn.Sequential(*_activated(512, 256))
        self.conv3 = nn.Sequential(*_activated(1024, 256))
        self.conv4 = nn.Conv2d(256, 2, 3, padding=1)
        self.conv5 = nn.Conv2d(6, 2, 1)

    def forward(self, x2: torch.Tensor, x3: torch.Tensor, x4: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv1(x2), _resize(self.conv2(x3), x2), _resize(self.conv3(x4), x2)], 1)


class Decoder(nn.Module):
    """``Decoder_Module``: features of the parts. ``conv4`` labels by them alone, which training alone looks at."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*_activated(512, 256))
        self.conv2 = nn.Sequential(*_activated(256, 48))
        self.conv3 = nn.Sequential(*_activated(304, 256), *_activated(256, 256))
        self.conv4 = nn.Conv2d(256, classes, 1)

    def forward(self, context: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        return self.conv3(torch.cat([_resize(self.conv1(context), x2), self.conv2(x2)], 1))


class AugmentCE2P(nn.Module):
    """The whole network: 603 tensors, 66.7 M parameters with the 20 classes of LIP."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
        self.bn1 = ActivatedBatchNorm(64, leaky=False)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn2 = ActivatedBatchNorm(64, leaky=False)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1, bias=False)
        self.bn3 = ActivatedBatchNorm(128, leaky=False)
        self.layer1 = _layer(128, 64, blocks=3)
        self.layer2 = _layer(256, 128, blocks=4, stride=2)
        self.layer3 = _layer(512, 256, blocks=23, stride=2)
        self.layer4 = _layer(1024, 512, blocks=3, dilation=2)
        self.context_encoding = PyramidPooling(2048, 512)
        self.edge = EdgeBranch()
        self.decoder = Decoder(classes)
        # Dropout does nothing here but to keep the place of the last convolution.
        self.fushion = nn.Sequential(*_activated(1024, 256), nn.Dropout2d(0.1), nn.Conv2d(256, classes, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the fused branch, ``output[0][-1]`` of theirs.

        Args:
            x: (N, 3, H, W), normalised, blue first.

        Returns:
            (N, classes, ceil(H / 4), ceil(W / 4)): 119 x 119 for 473 x 473. The corners' pixels are those of ``x``.
        """
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x2 = self.layer1(F.max_pool2d(x, 3, 2, 1))
        x3 = self.layer2(x2)
        x4 = self.layer3(x3)
        context = self.context_encoding(self.layer4(x4))
        return self.fushion(torch.cat([self.decoder(context, x2), self.edge(x2, x3, x4)], 1))


def _layer(inputs: int, planes: int, *, blocks: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    first = Bottleneck(inputs, planes, stride=stride, dilation=dilation, project=True)
    return nn.Sequential(first, *(Bottleneck(4 * planes, planes, dilation=dilation) for _ in range(blocks - 1)))


def _activated(inputs: int, outputs: int, *, kernel: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), ActivatedBatchNorm(outputs)


def _resize(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)
