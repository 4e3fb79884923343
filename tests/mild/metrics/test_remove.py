"""ReMOVE is its definition; SAM's published layout loads, and sees what SAM's own preprocessing makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dataset_tools.errors import UserError
from mild.metrics.metric import Judged, NotComputed
from mild.metrics.remove import SAM, Remove, remove, square

RESULT = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
Box = tuple[int, int, int, int]
"""Top, bottom, left, right."""


def hole_of(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """An ellipse in a box."""
    rows, columns = np.indices(RESULT.shape[:2])
    y, x = (2 * (rows - top) + 1) / (bottom - top) - 1, (2 * (columns - left) + 1) / (right - left) - 1
    return np.logical_and.reduce([x**2 + y**2 <= 1.1, abs(x) < 1, abs(y) < 1])


def known_map(picture: np.ndarray) -> np.ndarray:
    """(4, 64, 64) features of a picture: the mean colours of its tokens, and a constant, padded with -9."""
    longer = max(picture.shape[:2])
    grid = np.full((longer, longer, 4), -9, np.float32)
    grid[: picture.shape[0], : picture.shape[1], :3] = picture
    grid[: picture.shape[0], : picture.shape[1], 3] = 100
    return cv2.resize(grid, (64, 64), interpolation=cv2.INTER_AREA).transpose(2, 0, 1)


def defined(result: np.ndarray, hole: np.ndarray) -> float:
    """The released code's crop mode in its own order of steps, for a square that fits into the picture."""
    at = np.argwhere(hole)
    (top, left), (bottom, right) = at.min(0), at.max(0)
    room = (top, left, hole.shape[0] - bottom, hole.shape[1] - right)
    margin = 16 if all(side >= 16 for side in room) else max(min(room), 0)
    side = max(bottom - top + 1, right - left + 1) + 2 * margin
    window = np.s_[top - margin : top - margin + side, left - margin : left - margin + side]
    assert hole[window].shape == (side, side)
    foreground = np.array(Image.fromarray(hole[window].astype(np.uint8) * 255).resize((64, 64))) // 255
    features = torch.from_numpy(known_map(result[window]))[None]
    masks = [torch.from_numpy(mask).bool().expand(1, 4, 64, 64) for mask in (foreground, 1 - foreground)]
    inside, outside = (features[mask].reshape(1, 4, -1).mean(2) for mask in masks)
    return float(torch.nn.functional.cosine_similarity(inside, outside))


@pytest.fixture
def known_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def features(self: SAM, pictures: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([known_map(picture) for picture in pictures])

    monkeypatch.setattr(SAM, "features", features)


@pytest.mark.usefixtures("known_features")
@pytest.mark.parametrize(
    "box", [(30, 60, 40, 60), (20, 40, 30, 80), (3, 50, 40, 75), (24, 74, 12, 62), (30, 60, 0, 20)]
)
def test_it_is_its_definition_on_known_features(box: Box, make_judged: Callable[..., Judged]) -> None:
    """In the middle; wide; at the upper border, where the margin is less; at the left one; without a margin."""
    hole = hole_of(*box)
    result = RESULT.copy()
    result[hole] //= 3
    (value,) = Remove().score([make_judged(result, hole)])
    assert value == pytest.approx(defined(result, hole), abs=1e-6)
    assert isinstance(value, float) and value < 0.999


def test_the_square_is_as_the_released_code_counts_and_ends_with_the_picture() -> None:
    """It counts from the last row and column within the hole, so that its margin is 16 where 15 pixels are below."""
    hole = np.zeros((90, 120), bool)
    hole[50:75, 40:60] = True
    assert square(hole) == np.s_[34:90, 24:81]
    hole[75:80] = hole[74]
    assert square(hole) == np.s_[39:90, 29:81]


@pytest.mark.usefixtures("known_features")
def test_where_the_square_sticks_out_padding_belongs_to_neither_side(make_judged: Callable[..., Judged]) -> None:
    """A wide hole near the lower border: with features that tell nothing but padding from the picture it is 1."""
    hole = hole_of(70, 85, 10, 100)
    result = np.full_like(RESULT, 50)
    (value,) = Remove().score([make_judged(result, hole)])
    assert value == pytest.approx(1, abs=1e-6)


@pytest.mark.usefixtures("known_features")
def test_it_has_no_value_where_no_token_lies_wholly_in_the_hole_or_none_beside_it(
    make_judged: Callable[..., Judged],
) -> None:
    checked = np.indices(RESULT.shape[:2]).sum(0) % 2 == 0
    for hole in (checked, np.ones_like(checked)):
        (why,) = Remove().score([make_judged(RESULT, hole)])
        assert isinstance(why, NotComputed) and "no token of SAM" in str(why)


def test_similarity_is_that_of_mean_features() -> None:
    """Means (2, 0) and (1, 1): cosine of 45 degrees."""
    features = np.array([[[1, 3], [1, 1], [7, 7]], [[0, 0], [0, 2], [-7, -7]]], np.float32)
    hole, picture = np.zeros((2, 3, 2), bool)
    hole[0], picture[:2] = True, True
    assert remove(features, hole, picture) == pytest.approx(np.sqrt(0.5))


def save_sam(folder: Path, **vision: Any) -> Any:
    """A SAM with random weights, as the hub has them but narrow."""
    from transformers import SamConfig, SamModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "global_attn_indexes": [1]}
    torch.manual_seed(0)
    model = SamModel(
        SamConfig(
            vision_config={**sizes, "mlp_dim": 16, "output_channels": 8, "num_pos_feats": 4, **vision},
            prompt_encoder_config={"hidden_size": 8, "mask_input_channels": 4},
            mask_decoder_config={"hidden_size": 8, "mlp_dim": 8, "num_attention_heads": 1, "iou_head_hidden_dim": 8},
        )
    )
    for parameter in model.vision_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def test_a_sam_of_the_published_layout_is_loaded_and_sees_what_sams_own_preprocessing_makes(
    tmp_path: Path, make_judged: Callable[..., Judged]
) -> None:
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    model = save_sam(tmp_path)
    crop = RESULT[14:76, 24:76]  # not square, of a hole that is not
    processor = SamImageProcessorPil()
    pixels = processor(Image.fromarray(crop), return_tensors="pt")["pixel_values"]
    features = Remove(weights=str(tmp_path)).open().features([crop])
    np.testing.assert_allclose(features, model.get_image_embeddings(pixels).numpy(), rtol=1e-3, atol=1e-3)
    metric = Remove(weights=str(tmp_path))
    assert metric.missing() is None
    (value,) = metric.score([make_judged(RESULT, hole_of(30, 60, 40, 60))])
    assert isinstance(value, float) and -1 <= value < 1


def test_weights_may_hold_the_tied_embedding_twice_and_others_are_refused(tmp_path: Path) -> None:
    save_sam(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    twice = state["shared_image_embedding.positional_embedding"].clone()
    save_file(state | {"prompt_encoder.shared_embedding.positional_embedding": twice}, file, {"format": "pt"})
    Remove(weights=str(tmp_path)).open().check()
    del state["vision_encoder.neck.conv1.weight"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"not those of SamModel: 1 missing keys, such as vision_encoder\.neck\.conv1"):
        Remove(weights=str(tmp_path)).open().check()


def test_a_sam_that_sees_another_size_is_refused(tmp_path: Path) -> None:
    save_sam(tmp_path, image_size=64)
    with pytest.raises(UserError, match="sees 64 pixels a side: take a SAM that sees 1024"):
        Remove(weights=str(tmp_path)).open().check()


def test_it_computes_in_single_precision_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert Remove().open().dtype == torch.float32


def test_the_fingerprint_hangs_on_the_weights_and_not_on_where_they_are_or_the_batch(tmp_path: Path) -> None:
    for name in ("here", "there"):
        save_sam(tmp_path / name, image_size=64)
    save_sam(tmp_path / "others", image_size=64, mlp_dim=8)
    here, there, others = (Remove(weights=str(tmp_path / name)) for name in ("here", "there", "others"))
    again = here.model_copy(update={"batch_size": 5})
    assert here.fingerprint() == there.fingerprint() == again.fingerprint() != others.fingerprint()
    assert "here" in here.network and str(tmp_path) not in here.network


def test_without_weights_it_says_what_to_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILD_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "mild weights pull sam-vit-huge" in str(Remove().missing())
    assert "facebook/sam-vit-huge" in Remove().network
    assert "no network of the table, no folder" in str(Remove(weights="nothing").missing())
