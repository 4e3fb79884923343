"""Networks of transformers that detect objects, small and in their true layout, with answers that are known."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from dataset_tools.errors import UserError
from dataset_tools.estimators.detection import Detection, DetectionSettings

LABELS = {0: "Face", 1: "license-plate", 2: "dog"}
BOX = (0.5, 0.25, 0.4, 0.2)
"""Centre and size, as shares of the picture."""


def yolos() -> tuple[Any, Any]:
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 48],
        patch_size=8, num_detection_tokens=2, id2label=LABELS,
    )  # fmt: skip
    model = transformers.YolosForObjectDetection(config)
    return model, transformers.YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 48})


def rt_detr() -> tuple[Any, Any]:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[8, 8, 8], d_model=16, encoder_hidden_dim=16, num_queries=2,
        decoder_layers=1, encoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, decoder_in_channels=[16, 16, 16], decoder_n_points=2, num_denoising=0, id2label=LABELS,
    )  # fmt: skip
    model = transformers.RTDetrForObjectDetection(config)
    return model, transformers.RTDetrImageProcessor(size={"height": 64, "width": 64})


def set_answer(model: Any) -> None:
    """Make every query a licence plate at `BOX`, whatever the picture."""
    scores = torch.tensor([-9.0, 9.0, -9.0])
    if isinstance(model, transformers.YolosForObjectDetection):
        classes, boxes = model.class_labels_classifier.layers[-1], model.bbox_predictor.layers[-1]
        scores = torch.cat([scores, torch.tensor([-9.0])])  # the last is "nothing"
        boxes.bias.data[:] = torch.logit(torch.tensor(BOX))
        nn.init.zeros_(boxes.weight)
    else:
        classes = model.model.decoder.class_embed[-1]
    classes.bias.data[:] = scores
    nn.init.zeros_(classes.weight)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a network, and of its processor."""

    def made(kind: str) -> Path:
        torch.manual_seed(0)
        place = tmp_path_factory.mktemp(kind)
        model, processor = {"yolos": yolos, "rt_detr": rt_detr}[kind]()
        set_answer(model)
        model.save_pretrained(place)
        processor.save_pretrained(place)
        return place

    return made


def opened(place: Path, *labels: str, **changes: Any) -> Detection:
    return DetectionSettings(weights=str(place), labels=labels, **changes).open()


def test_boxes_are_those_of_pictures_of_any_size_and_labels_as_the_settings_call_them(
    folder: Callable[[str], Path],
) -> None:
    sizes = [(40, 60), (120, 60), (40, 60), (33, 97)]
    network = opened(folder("yolos"), "License Plate", batch_size=3)
    found = network.find_regions([np.zeros((*size, 3), np.uint8) for size in sizes])
    x, y, w, h = BOX
    for (height, width), regions in zip(sizes, found, strict=True):
        assert {region.label for region in regions} == {"License Plate"} and len(regions) == 2
        expected = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
        assert regions[0].box == pytest.approx(expected, abs=1e-3)
    assert network.made_by.name == "detection" and len(network.made_by.weights) == 64


def test_what_is_not_looked_for_is_not_told(folder: Callable[[str], Path]) -> None:
    place = folder("rt_detr")
    image = [np.zeros((50, 70, 3), np.uint8)]
    assert opened(place, "face", "dog").find_regions(image) == [[]]
    (found,) = opened(place, "face", "license_plate").find_regions(image)
    assert found and {region.label for region in found} == {"license_plate"}


def test_a_label_that_the_network_does_not_know_is_told_with_the_nearest(folder: Callable[[str], Path]) -> None:
    place = folder("yolos")
    with pytest.raises(UserError, match=r"finds no 'licence plate'; the nearest of its 3 labels are license plate"):
        opened(place, "face", "licence plate").check()


def test_a_network_of_another_kind_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    place = shutil.copytree(folder("yolos"), tmp_path / "vit")
    text = (place / "config.json").read_text()
    (place / "config.json").write_text(text.replace('"yolos"', '"vit"'))
    with pytest.raises(UserError, match="of the kind vit, which detects no objects"):
        opened(place, "face").check()


def test_settings_decide_about_the_fingerprint_and_the_place_does_not(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    place = folder("yolos")
    other = shutil.copytree(place, tmp_path / "elsewhere")
    assert opened(place, "face").fingerprint() == opened(other, "face").fingerprint()
    assert opened(place, "face").fingerprint() != opened(place, "dog").fingerprint()
    assert opened(place, "face").fingerprint() != opened(place, "face", min_score=0.9).fingerprint()
