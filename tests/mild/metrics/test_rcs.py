"""RC-S is its definition; DINOv2's published layout loads, and sees what its own preprocessing makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from skimage.measure import label, regionprops

from dataset_tools.errors import UserError
from mild.metrics.metric import Judged, NotComputed
from mild.metrics.rcs import RCS, DINOv2, rc_s, squares

RNG = np.random.default_rng(0)
RESULT = RNG.integers(0, 256, (150, 200, 3), dtype=np.uint8)
ROWS, COLUMNS = np.indices(RESULT.shape[:2])
DISC = (ROWS - 80) ** 2 + (COLUMNS - 110) ** 2 < 30**2
CORNER = (ROWS < 25) & (COLUMNS < 45) & (ROWS + COLUMNS < 60)
SPECK = (ROWS > 120) & (ROWS < 130) & (COLUMNS > 170) & (COLUMNS < 185)


def known_map(picture: np.ndarray) -> np.ndarray:
    """(32, 32, 8) features of a picture: the centred colours of its tokens, and mixtures of them."""
    tokens = cv2.resize(picture, (32, 32), interpolation=cv2.INTER_LINEAR).astype(np.float32) / 255 - 0.5
    return tokens @ np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32) + 0.1


@pytest.fixture
def known_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def features(self: DINOv2, pictures: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([known_map(picture) for picture in pictures])

    monkeypatch.setattr(DINOv2, "features", features)


def defined_crop(features: np.ndarray, mask: np.ndarray) -> float:
    """Of one crop, in the released code's order of steps: windows of int(16 * 32 / 64), int(8 * 32 / 64) apart."""
    seen = cv2.resize(mask.astype(np.float32), (448, 448), interpolation=cv2.INTER_NEAREST)
    small = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(seen)[None, None], (32, 32))
    grid = torch.from_numpy(features).double().permute(2, 0, 1)[None]
    everywhere = grid.flatten(2)[0].T[small.flatten() == 0]
    tokens = torch.nn.functional.unfold(grid, 8, stride=4)[0].unflatten(0, (-1, 64))
    marks = torch.nn.functional.unfold(small, 8, stride=4)[0]
    values = []
    for window in range(tokens.shape[-1]):
        inside, outside = (tokens[:, marks[:, window] == side, window].T for side in (1, 0))
        if len(inside) > 5 and len(outside) > 5:
            values.append(discrepancy(inside, outside))
        elif len(inside) > 5 and len(outside) == 0 and len(everywhere) > 0:
            values.append(discrepancy(inside, everywhere))
    return math.exp(-max(0, sum(values) / len(values)) / 3)


def discrepancy(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = (torch.nn.functional.normalize(part, dim=1) for part in (a, b))
    aa, bb, ab = (torch.exp(-(torch.cdist(*pair) ** 2) / (2 * 10**2)).mean() for pair in ((a, a), (b, b), (a, b)))
    return float(aa + bb - 2 * ab) * 1000


def defined_squares(hole: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Top, bottom, left, right of the crops, in the released code's order of steps."""
    parts = regionprops(label(hole, connectivity=1))
    least = min(200, max(part.area for part in parts))
    crops = []
    for part in parts:
        if part.area < least:
            continue
        top, left, bottom, right = part.bbox
        size = max(bottom - top, right - left)
        y, x = (round((low + high) / 2 - size / 2) for low, high in ((top, bottom), (left, right)))
        ends = (hole.shape[0] - (y + size), hole.shape[1] - (x + size))
        more = max(min(round(size / 3), x, y, *ends, size // 2), 0)
        whole = min(size + 2 * more, *hole.shape)
        y, x = (max(min(max(at - more, 0), end - whole), 0) for at, end in ((y, hole.shape[0]), (x, hole.shape[1])))
        crops.append((y, y + whole, x, x + whole))
    return crops


HOLES = {
    "middle": DISC,
    "corner": CORNER,
    "several": DISC | CORNER | SPECK,
    "specks alone": SPECK | ((ROWS == 3) & (COLUMNS == 3)),
    "wider than high": (ROWS > 60) & (ROWS < 85) & (COLUMNS > 4),
    "odd": (ROWS > 31) & (ROWS < 52) & (COLUMNS > 40) & (COLUMNS < 78),
    "touching at a corner": ((ROWS > 30) & (ROWS < 60) & (COLUMNS > 30) & (COLUMNS < 60))
    | ((ROWS > 59) & (ROWS < 80) & (COLUMNS > 59) & (COLUMNS < 90)),
}


@pytest.mark.parametrize("name", HOLES)
def test_crops_are_those_of_the_definition(name: str) -> None:
    found = [(rows.start, rows.stop, columns.start, columns.stop) for rows, columns in squares(HOLES[name])]
    assert sorted(found) == sorted(defined_squares(HOLES[name]))


def test_a_part_gets_a_third_of_its_side_on_each_side_and_parts_of_under_200_pixels_do_not_count() -> None:
    hole = np.zeros((200, 200), bool)
    hole[80:110, 90:110] = True  # 30 high, 20 wide
    hole[10:24, 10:24] = True  # 196 pixels
    assert squares(hole) == [np.s_[70:120, 75:125]]


@pytest.mark.usefixtures("known_features")
@pytest.mark.parametrize("name", HOLES)
def test_it_is_its_definition_on_known_features(name: str, make_judged: Callable[..., Judged]) -> None:
    hole = HOLES[name]
    result = RESULT.copy()
    result[hole] = result[hole] // 2 + 60
    crops = [np.s_[top:bottom, left:right] for top, bottom, left, right in defined_squares(hole)]
    expected = np.mean([defined_crop(known_map(result[crop]), hole[crop]) for crop in crops])
    for batch_size in (1, 8):
        (value,) = RCS(batch_size=batch_size).score([make_judged(result, hole)])
        assert value == pytest.approx(expected, abs=1e-6)
    assert 0.001 < expected < 0.999


@pytest.mark.usefixtures("known_features")
def test_pictures_get_the_values_of_their_own_parts(make_judged: Callable[..., Judged]) -> None:
    judged = [make_judged(RESULT, hole) for hole in (DISC | CORNER, CORNER, DISC)]
    both, corner, disc = RCS(batch_size=3).score(judged)
    assert isinstance(corner, float) and isinstance(disc, float) and corner != disc
    assert both == pytest.approx((corner + disc) / 2)


def test_features_of_two_kinds_give_the_value_of_a_closed_form() -> None:
    """Tokens inside and outside at right angles, sqrt(2) apart: 2 (1 - exp(-2 / 200)) times 1000 in every window."""
    hole = np.zeros((32, 32), bool)
    hole[4:28, 8:24] = True
    features = np.where(hole[..., None], [3.0, 0.0], [0.0, 0.5])
    assert rc_s(features, hole) == pytest.approx(math.exp(-2000 * (1 - math.exp(-0.01)) / 3))
    assert rc_s(np.ones((32, 32, 4)), hole) == pytest.approx(1)


@pytest.mark.parametrize("tokens", [5, 6])
def test_windows_with_five_or_six_tokens_of_a_kind_count_as_in_the_definition(tokens: int) -> None:
    """In the hole, and outside it."""
    features = np.random.default_rng(0).normal(size=(32, 32, 4))
    few = np.zeros((32, 32), bool)
    few[0, :tokens] = True
    some = few.copy()
    some[20:30, 20:30] = True
    for hole in (some, ~few):
        assert rc_s(features, hole) == pytest.approx(defined_crop(features, np.kron(hole, np.ones((14, 14)))))
    assert (rc_s(features, few) is None) == (tokens == 5)


def test_tokens_within_the_hole_alone_are_compared_with_all_that_are_outside() -> None:
    """Of a hole of one window only in its inside are the features others: those next to it are not looked at."""
    hole = np.zeros((32, 32), bool)
    hole[8:24, 8:24] = True
    features = np.ones((32, 32, 2))
    features[8:24, 8:24] = [1, -1]
    mixed = features.copy()
    mixed[:4] = [1, -1]  # outside, in no window of both kinds with tokens that differ
    whole, less = rc_s(features, hole), rc_s(mixed, hole)
    assert whole is not None and less is not None and less > whole


@pytest.mark.usefixtures("known_features")
def test_where_nothing_is_left_beside_the_hole_it_has_no_value(make_judged: Callable[..., Judged]) -> None:
    hole = DISC | ((ROWS < 40) & (COLUMNS < 40))  # the square is all hole, and at the picture's corner has no margin
    (why,) = RCS().score([make_judged(RESULT, hole)])
    assert isinstance(why, NotComputed) and "nothing to compare it with" in str(why)


def save_dinov2(folder: Path, patch_size: int = 14) -> torch.nn.Module:
    """A DINOv2 with random weights, as the hub has ViT-g but narrow."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=518,
            patch_size=patch_size,
            use_swiglu_ffn=True,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def test_a_dinov2_of_the_published_layout_is_loaded_and_sees_what_its_own_preprocessing_makes(
    tmp_path: Path, make_judged: Callable[..., Judged]
) -> None:
    from transformers import BitImageProcessor

    model = save_dinov2(tmp_path)
    crop = RESULT[10:110, 30:130]
    processor = BitImageProcessor(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    scaled = cv2.resize(crop, (448, 448), interpolation=cv2.INTER_LINEAR)
    pixels = processor(scaled, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        tokens = model(pixels).last_hidden_state[0, 1:].numpy()
    metric = RCS(weights=str(tmp_path))
    features = metric.open().features([crop])
    np.testing.assert_allclose(features.reshape(32 * 32, 16), tokens, rtol=1e-4, atol=1e-4)
    assert metric.missing() is None
    (value,) = metric.score([make_judged(RESULT, DISC)])
    assert isinstance(value, float) and 0 < value < 1


def test_a_dinov2_of_other_tokens_is_refused(tmp_path: Path) -> None:
    save_dinov2(tmp_path, patch_size=16)
    with pytest.raises(UserError, match="tokens of 16 pixels, and not 14"):
        RCS(weights=str(tmp_path)).open().check()


def test_without_weights_it_says_what_to_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILD_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "mild weights pull dinov2-giant" in str(RCS().missing())
    assert "facebook/dinov2-giant" in RCS().network
    with pytest.raises(UserError, match="mild weights pull dinov2-giant"):
        RCS().fingerprint()
