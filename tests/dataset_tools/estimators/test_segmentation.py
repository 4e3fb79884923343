"""Segmentation networks of transformers, small and random in their true layout, and what their own library makes of
answers that are drawn: people where they were drawn, and nobody else."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save, save_file
from torch import nn
from transformers.models.eomt.modeling_eomt import EomtForUniversalSegmentationOutput
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput
from transformers.models.maskformer.modeling_maskformer import MaskFormerForInstanceSegmentationOutput
from transformers.models.rf_detr.modeling_rf_detr import RfDetrInstanceSegmentationOutput

from dataset_tools.errors import UserError
from dataset_tools.estimators.segmentation import Segmentation, SegmentationSettings
from dataset_tools.masks import MaskSettings

LABELS = {0: "N/A", 1: "Person", 2: "dog"}
PERSON, DOG = 1, 2
Size = tuple[int, int]
Folders = Callable[[str], Path]


def rf_detr() -> tuple[Any, Any]:
    backbone = transformers.RfDetrDinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, out_features=["stage1", "stage2"], patch_size=12,
        num_windows=2, image_size=48,
    )  # fmt: skip
    config = transformers.RfDetrConfig(
        backbone_config=backbone, d_model=32, decoder_ffn_dim=32, decoder_layers=2, decoder_self_attention_heads=2,
        decoder_cross_attention_heads=4, decoder_n_points=2, num_queries=10, group_detr=2, id2label=LABELS,
    )  # fmt: skip
    processor = transformers.RfDetrImageProcessor(size={"height": 48, "width": 48})
    return transformers.RfDetrForInstanceSegmentation(config), processor


def eomt() -> tuple[Any, Any]:
    config = transformers.EomtConfig(
        image_size=48, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_register_tokens=2, num_queries=8, num_blocks=1, id2label=LABELS,
    )  # fmt: skip
    processor = transformers.EomtImageProcessor(size={"shortest_edge": 48, "longest_edge": 48}, do_pad=True)
    return transformers.EomtForUniversalSegmentation(config), processor


def eomt_dinov3() -> tuple[Any, Any]:
    config = transformers.EomtDinov3Config(
        image_size=48, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        num_register_tokens=2, num_queries=8, num_blocks=1, id2label=LABELS,
    )  # fmt: skip
    return transformers.EomtDinov3ForUniversalSegmentation(config), eomt()[1]


def swin() -> transformers.SwinConfig:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return transformers.SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2, image_size=64, out_features=stages
    )


def mask2former() -> tuple[Any, Any]:
    config = transformers.Mask2FormerConfig(
        backbone_config=swin(), feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=8, id2label=LABELS,
    )  # fmt: skip
    processor = transformers.Mask2FormerImageProcessor(size={"shortest_edge": 48, "longest_edge": 96}, size_divisor=32)
    return transformers.Mask2FormerForUniversalSegmentation(config), processor


def maskformer() -> tuple[Any, Any]:
    decoder = transformers.DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=8,
    )  # fmt: skip
    config = transformers.MaskFormerConfig(
        backbone_config=swin(), decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, id2label=LABELS
    )
    processor = transformers.MaskFormerImageProcessor(size={"shortest_edge": 48, "longest_edge": 96}, size_divisor=32)
    return transformers.MaskFormerForInstanceSegmentation(config), processor


BUILDERS = {build.__name__: build for build in (rf_detr, eomt, eomt_dinov3, mask2former, maskformer)}
every_kind = pytest.mark.parametrize("kind", BUILDERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a small random network of a kind, which takes most things for people, and its processor."""
    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            model, processor = BUILDERS[kind]()
            for parameter in model.parameters():
                nn.init.normal_(parameter, parameter.mean().item(), 0.2)
            classes = model.model.class_embed if kind == "rf_detr" else model.class_predictor
            nn.init.constant_(classes.bias[PERSON], 5)
            made[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind])
            processor.save_pretrained(made[kind])
        return made[kind]

    return folder_of


def opened(folder: Path, **changes: Any) -> Segmentation:
    masks = MaskSettings(min_area=0, max_area=1, min_island=0, max_hole=0)
    return SegmentationSettings(weights=str(folder), **({"masks": masks} | changes)).open()


def pictures(*sizes: Size) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


@every_kind
def test_a_network_of_its_own_files_sees_pictures_of_any_size_and_each_as_if_alone(folder: Folders, kind: str) -> None:
    sizes = [(40, 60), (60, 40), (3, 50), (50, 50), (80, 120), (40, 60)]
    images = pictures(*sizes)
    estimator = opened(folder(kind), min_score=0, same_person_iou=1, batch_size=5)
    together = estimator.find(images)
    assert sum(len(found.masks) for found in together) >= 3
    for image, found in zip(images, together, strict=True):
        [alone] = estimator.find([image])
        assert {mask.shape for mask in found.masks} <= {image.shape[:2]}
        assert np.array_equal(alone.masks, found.masks)
        # Products of more rows at once may add in another order.
        assert alone.scores == pytest.approx(found.scores, abs=1e-5)


def test_pictures_that_may_not_be_written_to_are_seen_without_a_word(
    folder: Folders, request: pytest.FixtureRequest
) -> None:
    (image,) = pictures((40, 60))
    image.setflags(write=False)
    request.addfinalizer(lambda: torch.set_warn_always(False))
    torch.set_warn_always(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(folder("mask2former")).find([image])


@every_kind
def test_every_weight_comes_from_the_files(folder: Folders, kind: str) -> None:
    torch.manual_seed(0)
    model, _ = BUILDERS[kind]()
    saved = type(model).from_pretrained(folder(kind)).state_dict()
    with opened(folder(kind)).model() as network:
        loaded = network.model.state_dict()
        assert not network.model.training
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


@dataclass
class Query:
    """What a network says of one thing: the ellipse in a box (left, top, right, bottom) in pixels, class and score."""

    box: tuple[float, float, float, float]
    label: int
    score: float

    def inside(self, rows: Any, columns: Any) -> Any:
        """1 in the centre, 0 on the outline, negative outside."""
        left, top, right, bottom = self.box
        across, down = (2 * columns - left - right) / (right - left), (2 * rows - top - bottom) / (bottom - top)
        return 1 - across**2 - down**2

    def mask(self, size: Size) -> np.ndarray:
        rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
        return self.inside(rows, columns) >= 0


class Drawn:
    """In place of a network: says what is drawn, in the form and at the resolution of the true one."""

    def __init__(self, kind: str, config: Any, queries: list[Query], size: Size) -> None:
        self.kind, self.config, self.queries, self.size = kind, config, queries, size

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        height, width = (side // 4 for side in pixel_values.shape[2:])
        # EoMT's processor pads below or on the right to a square, the others stretch.
        high, wide = (max(self.size),) * 2 if self.kind.startswith("eomt") else self.size
        rows = (torch.arange(height)[:, None] + 0.5) * high / height
        columns = (torch.arange(width) + 0.5) * wide / width
        masks = torch.stack([60 * query.inside(rows, columns) for query in self.queries])[None]
        scores = torch.full((1, len(self.queries), len(LABELS) + 1), 1e-9)
        for row, query in zip(scores[0], self.queries, strict=True):
            row[query.label], row[-1] = query.score, 1 - query.score
        if self.kind == "rf_detr":
            return OUTPUTS[self.kind](logits=scores[..., :-1].logit(), pred_masks=masks)
        return OUTPUTS[self.kind](class_queries_logits=scores.log(), masks_queries_logits=masks)


OUTPUTS = {
    "rf_detr": RfDetrInstanceSegmentationOutput,
    "eomt": EomtForUniversalSegmentationOutput,
    "mask2former": Mask2FormerForUniversalSegmentationOutput,
    "maskformer": MaskFormerForInstanceSegmentationOutput,
}
PROCESSORS = {
    "rf_detr": transformers.RfDetrImageProcessor(size={"height": 432, "width": 432}),
    "eomt": transformers.EomtImageProcessor(size={"shortest_edge": 640, "longest_edge": 640}, do_pad=True),
    "mask2former": transformers.Mask2FormerImageProcessor(size={"height": 384, "width": 384}),
    "maskformer": transformers.MaskFormerImageProcessor(size={"shortest_edge": 384, "longest_edge": 640}),
}
"""As those networks are published."""


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return np.count_nonzero(a & b) / np.count_nonzero(a | b)


@pytest.mark.parametrize("size", [(300, 480), (480, 300)])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_librarys_post_processing_gives_people_back_as_drawn(
    folder: Folders, kind: str, size: Size, monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = size
    left = Query((0.05 * width, 0.2 * height, 0.35 * width, 0.95 * height), PERSON, 0.8)
    right = Query((0.7 * width, 0.1 * height, 0.95 * width, 0.8 * height), PERSON, 0.95)
    others = [
        Query((0.72 * width, 0.12 * height, 0.97 * width, 0.82 * height), PERSON, 0.6),  # the right one again
        Query((0.25 * width, 0.6 * height, 0.6 * width, 0.9 * height), DOG, 0.9),  # before the left one
        Query((0.4 * width, 0.1 * height, 0.65 * width, 0.5 * height), PERSON, 0.3),
    ]
    estimator = opened(folder(kind))
    with estimator.model() as network:
        drawn = Drawn(kind, network.model.config, [right, left, *others], size)
        stand_in = replace(network, model=drawn, processor=PROCESSORS[kind])
    monkeypatch.setattr(estimator, "model", lambda: contextlib.nullcontext(stand_in))
    [found] = estimator.find(pictures(size))
    assert found.scores == pytest.approx([0.8, 0.95], abs=0.03)
    assert [mask.shape for mask in found.masks] == [size, size]
    assert min(iou(mask, query.mask(size)) for mask, query in zip(found.masks, (left, right), strict=True)) > 0.95


def copied(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of a network whose config says something else."""
    shutil.copytree(folder, to)
    said = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(said | config))
    return to


def test_pictures_are_not_padded_whatever_the_files_say(folder: Folders, tmp_path: Path) -> None:
    padding = copied(folder("mask2former"), tmp_path / "padding")
    side = {"height": 128, "width": 128}
    transformers.Mask2FormerImageProcessor.from_pretrained(padding, pad_size=side).save_pretrained(padding)
    assert transformers.AutoImageProcessor.from_pretrained(padding).pad_size == side
    [image] = pictures((40, 60))
    [found], [again] = (opened(place, min_score=0).find([image]) for place in (folder("mask2former"), padding))
    assert np.array_equal(found.masks, again.masks)
    assert len(found.masks) >= 1


def test_rf_detr_is_also_loaded_as_its_authors_publish_it(folder: Folders, tmp_path: Path) -> None:
    model = transformers.RfDetrForInstanceSegmentation.from_pretrained(folder("rf_detr"))
    renamed = copied(folder("rf_detr"), tmp_path / "renamed")
    model.save_pretrained(renamed, save_original_format=False)
    assert (renamed / "model.safetensors").read_bytes() != (folder("rf_detr") / "model.safetensors").read_bytes()
    [image] = pictures((40, 60))
    [found], [again] = (opened(place, min_score=0).find([image]) for place in (folder("rf_detr"), renamed))
    assert found.scores == again.scores
    assert len(found.masks) >= 1


@pytest.mark.parametrize(
    ("labels", "people"),
    [
        ({"0": "PERSON", "1": "cat"}, [0]),
        ({"0": "sky", "1": "person", "2": "rider"}, [1, 2]),
        ({"0": "Man", "1": "Woman", "2": "Human face"}, [0, 1]),
    ],
)
def test_people_are_known_by_name(folder: Folders, tmp_path: Path, labels: dict[str, str], people: list[int]) -> None:
    torch.manual_seed(0)
    config = transformers.EomtConfig.from_pretrained(folder("eomt"), id2label=labels, label2id=None)
    transformers.EomtForUniversalSegmentation(config).save_pretrained(tmp_path)
    PROCESSORS["eomt"].save_pretrained(tmp_path)
    with opened(tmp_path).model() as network:
        assert network.people == people


def refusal(place: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What is said to a folder that cannot be used, which is one line and names the folder."""
    capfd.readouterr()
    with pytest.raises(UserError, match=place.name) as refused:
        opened(place).check()
    assert capfd.readouterr().err == ""
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_network_without_people_is_refused_with_the_nearest_labels(
    folder: Folders, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    animals = copied(folder("eomt"), tmp_path / "animals", id2label={"0": "dog", "1": "parson", "2": "cat"})
    assert "nearest are parson" in refusal(animals, capfd)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (transformers.ViTConfig(), "vit, which does not segment instances"),
        (transformers.DetrConfig(), "detr, which gives each pixel to the likeliest"),
        (transformers.OneFormerConfig(), "oneformer, which wants a text"),
    ],
)
def test_what_cannot_find_people_by_a_picture_is_refused_with_what_can(
    tmp_path: Path, config: Any, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(save({"weight": torch.zeros(1)}))
    said = refusal(tmp_path / "other", capfd)
    assert why in said
    assert "choose one of eomt, eomt_dinov3, mask2former, maskformer, rf_detr" in said


def test_a_detector_without_masks_is_refused(
    folder: Folders, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = copied(folder("rf_detr"), tmp_path / "detector")
    config = transformers.RfDetrConfig.from_pretrained(folder("rf_detr"))
    transformers.RfDetrForObjectDetection(config).save_pretrained(place)
    assert "missing keys" in refusal(place, capfd)


def test_semantic_segmentation_is_refused(folder: Folders, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place = copied(folder("eomt"), tmp_path / "semantic")
    transformers.EomtImageProcessor(do_split_image=True).save_pretrained(place)
    assert "does not tell people apart" in refusal(place, capfd)


def test_files_that_are_cut_off_or_not_there_are_refused(
    folder: Folders, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = copied(folder("eomt"), tmp_path / "damaged")
    weights = place / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4]):
        weights.write_bytes(content)
        refusal(place, capfd)
    weights.unlink()
    refusal(place, capfd)
    refusal(tmp_path / "nowhere", capfd)


def test_a_swin_checkpoint_as_published_is_loaded(folder: Folders, tmp_path: Path) -> None:
    """They lack a norm that nothing uses, and hold a table that is computed; the people found are the same."""
    published = shutil.copytree(folder("mask2former"), tmp_path / "published")
    weights = load_file(published / "model.safetensors")
    unused = [key for key in weights if ".swin.layernorm." in key]
    assert len(unused) == 2
    for key in unused:
        weights[key] += 1  # were it used, this would be seen
    whole = shutil.copytree(published, tmp_path / "whole")
    save_file(weights, whole / "model.safetensors", {"format": "pt"})
    stray = f"{unused[0].partition('layernorm')[0]}encoder.layers.0.blocks.0.attention.self.relative_position_index"
    kept = {key: value for key, value in weights.items() if key not in unused} | {stray: torch.zeros(4, 4)}
    save_file(kept, published / "model.safetensors", {"format": "pt"})
    images = pictures((48, 64))
    answers = [opened(place, min_score=0.01).find(images)[0] for place in (whole, published, folder("mask2former"))]
    for answer in answers[1:]:
        assert len(answer.masks) > 0 and answer.scores == answers[0].scores
        assert all(map(np.array_equal, answer.masks, answers[0].masks))
