"""Mask R-CNN through torchvision's own steps: detections that are drawn come back, and no picture hangs on another."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from dataset_tools.errors import UserError
from dataset_tools.estimators import network
from dataset_tools.estimators.maskrcnn import MaskRCNN, MaskRCNNSettings
from dataset_tools.masks import MaskSettings

PERSON, DOG, CLASSES = 1, 18, 91
"""Of COCO, by its own numbers."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""
Open = Callable[..., MaskRCNN]


class Features(nn.Module):
    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 7, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 7, 2, 3))

    def forward(self, pictures: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        return OrderedDict([("0", self.layers(pictures))])


def small_network(**_: Any) -> detection.MaskRCNN:
    """Mask R-CNN in all its parts, with few channels, boxes and pixels, that takes most things for people."""
    torch.manual_seed(3)
    boxes = FastRCNNPredictor(16, CLASSES)
    nn.init.constant_(boxes.cls_score.bias[PERSON], 5)
    return detection.MaskRCNN(
        Features(),
        min_size=96,
        max_size=160,
        rpn_anchor_generator=AnchorGenerator(((24, 48),), ((0.5, 1.0, 2.0),)),
        rpn_post_nms_top_n_test=12,
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        box_head=TwoMLPHead(8 * 7 * 7, 16),
        box_predictor=boxes,
        mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        mask_head=MaskRCNNHeads(8, (8,), 1),
        mask_predictor=MaskRCNNPredictor(8, 8, CLASSES),
    )


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_LOADED", {})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Open:
    """Open the small network, whose weights lie in a file."""
    monkeypatch.setattr(detection, "maskrcnn_resnet50_fpn_v2", small_network)
    file = tmp_path / "small.pth"
    torch.save(small_network().state_dict(), file)

    def open_(**changes: Any) -> MaskRCNN:
        masks = MaskSettings(min_area=0, max_area=1, min_island=0, max_hole=0)
        return settings_of(file, masks=masks, **changes).open()

    return open_


def settings_of(file: Path, **changes: Any) -> MaskRCNNSettings:
    return MaskRCNNSettings(weights=str(file), sha256=hashlib.sha256(file.read_bytes()).hexdigest(), **changes)


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


class DrawnBoxes(nn.Module):
    """In place of the region proposals: known boxes, where the resized picture has them."""

    def __init__(self, boxes: list[Box], size: tuple[int, int]) -> None:
        super().__init__()
        self.boxes, self.size = torch.tensor(boxes), size

    def forward(self, images: ImageList, _features: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
        [(height, width)] = images.image_sizes
        scale = torch.tensor([width / self.size[1], height / self.size[0]]).repeat(2)
        return [self.boxes * scale], {}


class DrawnClasses(nn.Module):
    """In place of the box predictor: known classes and scores, and boxes that stay as they were proposed."""

    def __init__(self, classes: list[tuple[int, float]]) -> None:
        super().__init__()
        self.logits = torch.full((len(classes), CLASSES), -20.0)
        for row, (label, score) in zip(self.logits, classes, strict=True):
            row[0], row[label] = 0, np.log(score / (1 - score))

    def forward(self, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.logits, torch.zeros(len(boxes), 4 * CLASSES)


class DrawnMasks(nn.Module):
    """In place of the mask predictor: people are ellipses within their boxes, all else fills its box."""

    def forward(self, boxes: torch.Tensor) -> torch.Tensor:
        across = (torch.arange(28) + 0.5) / 14 - 1
        logits = torch.full((len(boxes), CLASSES, 28, 28), 9.0)
        logits[:, PERSON] = 9 * (1 - across[:, None] ** 2 - across**2)
        return logits


def ellipse(box: Box, size: tuple[int, int]) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    left, top, right, bottom = box
    across = (2 * columns - left - right) / (right - left)
    down = (2 * rows - top - bottom) / (bottom - top)
    return across**2 + down**2 <= 1


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return np.count_nonzero(a & b) / np.count_nonzero(a | b)


@pytest.mark.parametrize("size", [(300, 480), (480, 300)])
def test_people_whom_the_network_detects_come_back_where_they_are(small: Open, size: tuple[int, int]) -> None:
    height, width = size
    right: Box = (0.7 * width, 0.1 * height, 0.95 * width, 0.8 * height)
    left: Box = (0.05 * width, 0.2 * height, 0.35 * width, 0.95 * height)
    dog: Box = (0.4 * width, 0.6 * height, 0.65 * width, 0.9 * height)
    unlikely: Box = (0.4 * width, 0.1 * height, 0.65 * width, 0.5 * height)
    estimator = small()
    with estimator.model() as model:
        model.rpn = DrawnBoxes([right, dog, unlikely, left], size)
        model.roi_heads.box_predictor = DrawnClasses([(PERSON, 0.9), (DOG, 0.95), (PERSON, 0.4), (PERSON, 0.7)])
        model.roi_heads.mask_predictor = DrawnMasks()
    [found] = estimator.find(pictures(size))
    assert found.scores == pytest.approx([0.7, 0.9], abs=1e-4)
    assert [mask.shape for mask in found.masks] == [size, size]
    assert min(iou(mask, ellipse(box, size)) for mask, box in zip(found.masks, (left, right), strict=True)) > 0.95


def test_a_picture_gives_the_same_people_alone_and_among_others_of_other_sizes(small: Open) -> None:
    images = pictures((90, 120), (120, 90), (90, 120), (64, 200))
    estimator = small(min_score=0, batch_size=3)
    together = estimator.find(images)
    assert min(len(found.masks) for found in together) >= 2
    for image, found in zip(images, together, strict=True):
        [alone] = estimator.find([image])
        assert np.array_equal(alone.masks, found.masks)
        # Convolutions of more pictures at once may add in another order.
        assert alone.scores == pytest.approx(found.scores, abs=1e-5)


def test_in_half_precision_boxes_keep_theirs(small: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures((90, 120), (120, 90))
    # Masks of a random network are noise, of which rounding decides what is left.
    monkeypatch.setattr("dataset_tools.estimators.found_people.LEAST_LEFT", 0)
    full = small(min_score=0).find(images)
    monkeypatch.setattr(network, "_LOADED", {})
    monkeypatch.setattr(MaskRCNN, "dtype", torch.float16)
    estimator = small(min_score=0)
    types = {}
    with estimator.model() as model:
        model.roi_heads.register_forward_hook(lambda _m, _g, out: types.update(boxes=out[0][0]["boxes"].dtype))
        model.backbone.layers.register_forward_hook(lambda _m, _g, out: types.update(features=out.dtype))
    half = estimator.find(images)
    assert types == {"features": torch.float16, "boxes": torch.float32}
    for a, b in zip(full, half, strict=True):
        assert sorted(a.scores) == pytest.approx(sorted(b.scores), abs=0.01)


@pytest.mark.slow
def test_torchvisions_own_network_is_loaded_whole(tmp_path: Path) -> None:
    file = tmp_path / "maskrcnn.pth"
    torch.manual_seed(0)
    state = detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict()
    torch.save(state, file)
    estimator = settings_of(file).open()
    estimator.check()
    assert estimator.made_by.network == "maskrcnn.pth"
    with estimator.model() as model:
        loaded = model.state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
        model.transform.min_size = (64,)
        model.rpn._post_nms_top_n["testing"] = 4
    [found] = estimator.find(pictures((60, 80)))
    assert found.masks == []  # of 91 classes that a random network tells apart by chance none is likely


def test_a_file_that_is_not_mask_rcnns_is_refused_in_one_line(small: Open, tmp_path: Path) -> None:
    whole = (tmp_path / "small.pth").read_bytes()
    faults = {"cut-off.pth": whole[: len(whole) // 2], "text.pth": b"<html>not found</html>"}
    for name, content in faults.items():
        (tmp_path / name).write_bytes(content)
    state = torch.load(tmp_path / "small.pth")
    torch.save({name: value for name, value in state.items() if "mask_predictor" not in name}, tmp_path / "boxes.pth")
    torch.save({**state, "more": torch.zeros(1)}, tmp_path / "more.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "program.pth")
    for name in (*faults, "boxes.pth", "more.pth", "program.pth"):
        with pytest.raises(UserError, match=rf"{name}") as refused:
            settings_of(tmp_path / name).open().check()
        assert "\n" not in str(refused.value)


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        MaskRCNNSettings(weights=str(tmp_path / "nowhere.pth")).open().check()
