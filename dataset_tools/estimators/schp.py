"""Parsing by SCHP, Self-Correction for Human Parsing (Li et al. 2019), with the official checkpoints.

Input, warp and what is made of the output follow ``simple_extractor.py`` and ``utils/transforms.py`` of
PeikeLi/Self-Correction-Human-Parsing (MIT); a crop stands for their whole picture, as in their extension to several
people.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np

from dataset_tools.errors import UserError
from dataset_tools.estimators.crops import CropParsing
from dataset_tools.estimators.network import NetworkSettings

if TYPE_CHECKING:
    import torch

    from dataset_tools.estimators.schp_network import AugmentCE2P

CHECKPOINTS = {20: ("lip", 473), 18: ("atr", 512), 7: ("pascal", 512)}
"""Label set and input size in pixels, by the number of classes."""
MEAN = np.array([0.406, 0.456, 0.485], np.float32)
"""Of the values 0..1 of blue, green, red."""
STD = np.array([0.225, 0.224, 0.229], np.float32)


class SCHPSettings(NetworkSettings):
    """Which of the three checkpoints."""

    kind: Literal["schp"] = "schp"
    weights: str = "schp-lip"
    """``schp-lip``, ``schp-atr``, ``schp-pascal``, or a file of one of them; a file's classes say which."""

    def open(self) -> SCHP:
        """The estimator; nothing is loaded."""
        return SCHP(self)


class SCHP(CropParsing):
    """Labels of LIP, ATR or Pascal-Person-Part by SCHP."""

    package = "torch"
    files = ("*.pth",)

    @cached_property
    def label_set(self) -> str:
        """See `dataset_tools.estimators.ParsingEstimator.label_set`."""
        with self.model() as network:
            return CHECKPOINTS[network.classes][0]

    def load(self) -> AugmentCE2P:
        """See `dataset_tools.estimators.network.NetworkEstimator.load`."""
        import torch

        from dataset_tools.estimators.schp_network import AugmentCE2P

        if len(self.weights.files) != 1:
            raise UserError(f"{self.settings.weights} holds {len(self.weights.files)} .pth files: name one of them")
        (file,) = self.weights.files.values()
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        state = {key.removeprefix("module."): tensor for key, tensor in checkpoint.get("state_dict", {}).items()}
        classes = len(state.get("fushion.3.bias", ()))
        if classes not in CHECKPOINTS:
            raise UserError(
                f"{self.settings.weights} is no checkpoint of SCHP: module.fushion.3.bias in its state_dict must have "
                f"20, 18 or 7 values, and has {classes}"
            )
        with torch.device("meta"):  # the file fills all of it
            network = AugmentCE2P(classes)
        network.load_state_dict(state, assign=True)
        network.eval().to(self.device, torch.float32)
        for module in network.modules():  # norms stay in single precision, which holds all variances
            if isinstance(module, torch.nn.Conv2d):
                module.to(self.dtype)
        return network

    def logits(self, model: Any, crops: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """See `CropParsing.logits`."""
        import torch
        import torch.nn.functional as F

        size = CHECKPOINTS[model.classes][1]
        inputs = np.stack([(_square(crop, size)[..., ::-1] / np.float32(255) - MEAN) / STD for crop in crops])
        answers = model(torch.from_numpy(inputs).permute(0, 3, 1, 2).to(self.device, self.dtype)).float()
        for answer, crop in zip(answers, crops, strict=True):
            answer = F.interpolate(answer[None], (size, size), mode="bilinear", align_corners=True)
            yield _back(answer, *crop.shape[:2])[0]


def _square(picture: np.ndarray, size: int) -> np.ndarray:
    """The picture (h, w, 3) in the middle of a square of ``size`` pixels that it fills along its longer side.

    Pixels of the longer side's ends come to the square's ends (``get_affine_transform`` for the box 0, 0, w - 1,
    h - 1); the rest is black.
    """
    height, width = picture.shape[:2]
    scale = (size - 1) / _side(height, width)
    middle = (size - 1) / 2
    warp = np.array([[scale, 0, middle - scale * (width - 1) / 2], [0, scale, middle - scale * (height - 1) / 2]])
    return cv2.warpAffine(picture, warp, (size, size), flags=cv2.INTER_LINEAR)


def _back(square: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What `_square` did undone: (1, n, size, size) -> (1, n, height, width), as ``transform_logits``."""
    import torch
    import torch.nn.functional as F

    # Ends of the square are at -1 and 1.
    x = (2 * torch.arange(width, device=square.device) - (width - 1)) / _side(height, width)
    y = (2 * torch.arange(height, device=square.device) - (height - 1)) / _side(height, width)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    return F.grid_sample(square, grid[None], align_corners=True)


def _side(height: int, width: int) -> int:
    return max(height, width, 2) - 1
