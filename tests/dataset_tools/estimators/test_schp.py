"""SCHP: the official layout, its formulas written out, and its warp there and back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dataset_tools.errors import UserError
from dataset_tools.estimators import PeopleInPicture
from dataset_tools.estimators.schp import SCHP, SCHPSettings
from dataset_tools.estimators.schp_network import ActivatedBatchNorm, AugmentCE2P, Bottleneck
from dataset_tools.weights import Weights

State = dict[str, torch.Tensor]


def layout(classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official checkpoints' tensors, without ``module.``."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, inputs: int, outputs: int, kernel: int = 1, *, bias: bool = False) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str, channels: int) -> None:
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{tensor}"] = (channels,)

    def pair(name: str, inputs: int, outputs: int, kernel: int = 1, first: int = 0) -> None:
        convolution(f"{name}.{first}", inputs, outputs, kernel)
        norm(f"{name}.{first + 1}", outputs)

    for index, (inputs, outputs) in enumerate([(3, 64), (64, 64), (64, 128)], 1):
        convolution(f"conv{index}", inputs, outputs, 3)
        norm(f"bn{index}", outputs)
    inputs = 128
    for layer, (blocks, planes) in enumerate([(3, 64), (4, 128), (23, 256), (3, 512)], 1):
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            for index, (a, b, kernel) in enumerate([(inputs, planes, 1), (planes, planes, 3), (planes, 4 * planes, 1)]):
                convolution(f"{name}.conv{index + 1}", a, b, kernel)
                norm(f"{name}.bn{index + 1}", b)
            if block == 0:
                pair(f"{name}.downsample", inputs, 4 * planes)
            inputs = 4 * planes
    for stage in range(4):
        pair(f"context_encoding.stages.{stage}", 2048, 512, first=1)
    pair("context_encoding.bottleneck", 2048 + 4 * 512, 512, 3)
    for index, inputs in enumerate([256, 512, 1024], 1):
        pair(f"edge.conv{index}", inputs, 256)
    convolution("edge.conv4", 256, 2, 3, bias=True)
    convolution("edge.conv5", 6, 2, bias=True)
    pair("decoder.conv1", 512, 256)
    pair("decoder.conv2", 256, 48)
    pair("decoder.conv3", 304, 256)
    pair("decoder.conv3", 256, 256, first=2)
    convolution("decoder.conv4", 256, classes, bias=True)
    pair("fushion", 1024, 256)
    convolution("fushion.3", 256, classes, bias=True)
    return shapes


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name.endswith("running_var"):
        return torch.empty(shape).uniform_(0.5, 1.5)
    if len(shape) == 1:  # scales of both signs
        return torch.empty(shape).uniform_(-1, 1)
    return torch.empty(shape).normal_(0, math.sqrt(2 / math.prod(shape[1:])))


def normalised(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    """InPlaceABN without activation, by its formula."""
    weight, bias, mean, var = (
        state[f"{name}.{key}"][:, None, None] for key in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * (weight.abs() + 1e-5) + bias


def leaky(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    """InPlaceABN."""
    y = normalised(state, name, x)
    return torch.where(y < 0, 0.01 * y, y)


def block_reference(state: State, name: str, x: torch.Tensor, stride: int, dilation: int) -> torch.Tensor:
    y = F.conv2d(x, state[f"{name}conv1.weight"])
    y = normalised(state, f"{name}bn1", y).clamp(min=0)
    y = F.conv2d(y, state[f"{name}conv2.weight"], stride=stride, padding=dilation, dilation=dilation)
    y = normalised(state, f"{name}bn2", y).clamp(min=0)
    y = normalised(state, f"{name}bn3", F.conv2d(y, state[f"{name}conv3.weight"]))
    if f"{name}downsample.0.weight" in state:
        x = F.conv2d(x, state[f"{name}downsample.0.weight"], stride=stride)
        x = normalised(state, f"{name}downsample.1", x)
    return (x + y).clamp(min=0)


def network_reference(state: State, x: torch.Tensor) -> torch.Tensor:
    """The fused logits, step by step."""

    def pair(name: str, x: torch.Tensor, first: int = 0, padding: int = 0) -> torch.Tensor:
        y = F.conv2d(x, state[f"{name}.{first}.weight"], padding=padding)
        return leaky(state, f"{name}.{first + 1}", y)

    def resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)

    for index, stride in [(1, 2), (2, 1), (3, 1)]:
        x = F.conv2d(x, state[f"conv{index}.weight"], stride=stride, padding=1)
        x = normalised(state, f"bn{index}", x).clamp(min=0)
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    levels = []
    for layer, (blocks, stride, dilation) in enumerate([(3, 1, 1), (4, 2, 1), (23, 2, 1), (3, 1, 2)], 1):
        for block in range(blocks):
            x = block_reference(state, f"layer{layer}.{block}.", x, stride if block == 0 else 1, dilation)
        levels.append(x)
    pooled = [F.adaptive_avg_pool2d(x, size) for size in (1, 2, 3, 6)]
    pyramid = [resized(pair(f"context_encoding.stages.{i}", p, first=1), x) for i, p in enumerate(pooled)]
    context = pair("context_encoding.bottleneck", torch.cat([*pyramid, x], 1), padding=1)
    parts = torch.cat([resized(pair("decoder.conv1", context), levels[0]), pair("decoder.conv2", levels[0])], 1)
    parts = pair("decoder.conv3", pair("decoder.conv3", parts), first=2)
    edges = [resized(pair(f"edge.conv{i + 1}", levels[i]), levels[0]) for i in range(3)]
    fused = pair("fushion", torch.cat([parts, *edges], 1))
    return F.conv2d(fused, state["fushion.3.weight"], state["fushion.3.bias"])


def opened(file: Path, **settings: Any) -> SCHP:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return SCHPSettings(weights=str(file), sha256=digest, **settings).open()


@pytest.fixture(scope="module")
def lip(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, AugmentCE2P]:
    """Random tensors of LIP's checkpoint, and the network that a file of them, as torch wrote files in 2019, gives."""
    torch.manual_seed(0)
    state = {name: random_tensor(name, shape) for name, shape in layout(20).items()}
    file = tmp_path_factory.mktemp("schp") / "exp-schp-201908261155-lip.pth"
    checkpoint = {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "cycle_n": 5}
    torch.save(checkpoint, file, _use_new_zipfile_serialization=False)
    estimator = SCHPSettings(weights=str(file)).open()
    estimator.weights = Weights(file.parent, {file.name: file}, "", None, str(file))  # a digest of all takes a second
    network = estimator.load()
    file.unlink()
    return state, network


def test_all_603_tensors_of_the_checkpoint_find_their_place(lip: tuple[State, AugmentCE2P]) -> None:
    state, network = lip
    loaded = network.state_dict()
    assert len(state) == 603
    assert sum(parameter.numel() for parameter in network.parameters()) == 66_723_928
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_the_network_gives_the_fused_logits_of_a_plain_reference(lip: tuple[State, AugmentCE2P]) -> None:
    state, network = lip
    x = torch.randn(2, 3, 49, 65)
    with torch.inference_mode():
        expected, found = network_reference(state, x), network(x)
    assert found.shape == (2, 20, 13, 17)
    torch.testing.assert_close(found / expected.std(), expected / expected.std(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("stride", "dilation", "project"), [(1, 1, False), (2, 1, True), (1, 2, True)])
def test_a_block_of_the_backbone_equals_a_plain_reference(stride: int, dilation: int, project: bool) -> None:
    torch.manual_seed(1)
    block = Bottleneck(32, 8, stride=stride, dilation=dilation, project=project)
    state = {name: random_tensor(name, tuple(tensor.shape)) for name, tensor in block.state_dict().items()}
    block.load_state_dict(state)
    x = torch.randn(2, 32, 9, 12)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), block_reference(state, "", x, stride, dilation), rtol=1e-5, atol=1e-5)


def test_a_convolution_with_its_norm_and_activation_equals_a_plain_reference() -> None:
    torch.manual_seed(2)
    pair = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, bias=False), ActivatedBatchNorm(24))
    state = {name: random_tensor(name, tuple(tensor.shape)) for name, tensor in pair.state_dict().items()}
    pair.load_state_dict(state)
    x = torch.randn(2, 16, 9, 12)
    with torch.inference_mode():
        expected = leaky(state, "1", F.conv2d(x, state["0.weight"], padding=1))
        assert (expected < 0).any()
        torch.testing.assert_close(pair(x), expected, rtol=1e-5, atol=1e-5)


def blank(file: Path, classes: int, change: Callable[[State], Any] = lambda state: None) -> Path:
    """A checkpoint of zeros, which takes no room."""
    zero = torch.zeros(())
    state = {f"module.{name}": zero.expand(shape) for name, shape in layout(classes).items()}
    change(state)
    torch.save({"state_dict": state}, file)
    return file


@pytest.mark.parametrize(("classes", "label_set"), [(20, "lip"), (18, "atr"), (7, "pascal")])
def test_the_number_of_classes_says_which_labels_they_are(tmp_path: Path, classes: int, label_set: str) -> None:
    estimator = opened(blank(tmp_path / "own.pth", classes))
    estimator.check()
    assert estimator.label_set == label_set


def test_in_half_precision_norms_alone_stay_in_single(tmp_path: Path) -> None:
    class HalfSCHP(SCHP):
        dtype = torch.float16

    network = HalfSCHP(opened(blank(tmp_path / "own.pth", 7)).settings).load()
    kinds = {(type(module), p.dtype) for module in network.modules() for p in module.parameters(recurse=False)}
    assert kinds == {(nn.Conv2d, torch.float16), (ActivatedBatchNorm, torch.float32)}
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 33, 33, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("module.layer3.22.bn3.running_var"), "Missing.*layer3.22.bn3.running_var"),
        (lambda state: state.update({"module.layer5.weight": torch.zeros(1)}), "Unexpected.*layer5.weight"),
        (lambda state: state.update({"module.conv1.weight": torch.zeros(64, 3, 7, 7)}), "size mismatch.*conv1.weight"),
        (lambda state: state.update({"module.fushion.3.bias": torch.zeros(5)}), "20, 18 or 7 values, and has 5"),
        (lambda state: state.clear(), "20, 18 or 7 values, and has 0"),
    ],
    ids=["missing", "superfluous", "shape", "classes", "empty"],
)
def test_weights_of_another_network_are_refused_in_one_line(
    tmp_path: Path, change: Callable[[State], Any], said: str
) -> None:
    file = blank(tmp_path / "other.pth", 20, change)
    with pytest.raises(UserError, match=said) as refused:
        opened(file).check()
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_was_cut_off_is_refused_in_one_line(tmp_path: Path) -> None:
    file = blank(tmp_path / "cut.pth", 20)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"cut\.pth") as refused:
        opened(file).check()
    assert "\n" not in str(refused.value)


def test_of_several_checkpoints_in_a_folder_one_must_be_named(tmp_path: Path) -> None:
    estimator = SCHPSettings(weights=str(tmp_path)).open()
    files = {name: tmp_path / name for name in ("lip.pth", "atr.pth")}
    estimator.weights = Weights(tmp_path, files, "0" * 64, None, str(tmp_path))
    with pytest.raises(UserError, match=r"holds 2 \.pth files: name one of them"):
        estimator.check()


class StandIn:
    """In the network's place: gives what a test wants, and keeps what it was given."""

    def __init__(self, classes: int, answer: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.classes = classes
        self.answer = answer
        self.given: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.given.append(x)
        return self.answer(x)


def with_stand_in(folder: Path, network: StandIn, batch_size: int = 8) -> SCHP:
    class SCHPWithStandIn(SCHP):
        def load(self) -> Any:
            return network

    file = folder / "stand-in"
    file.write_text(str(folder))  # a file of its own, or it would share what another test has loaded
    return SCHPWithStandIn(opened(file, batch_size=batch_size).settings)


def ellipse(size: tuple[int, int], top: int, bottom: int, left: int, right: int) -> np.ndarray:
    """(H, W) bool that fills a box."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    y, x = (2 * rows - top - bottom) / (bottom - top), (2 * columns - left - right) / (right - left)
    return x**2 + y**2 <= 1


def official_warp(height: int, width: int, size: int) -> np.ndarray:
    """(2, 3): from a crop's pixels to the input's, as ``get_affine_transform`` has it, by three points."""
    x, y = (width - 1) / 2, (height - 1) / 2
    half, end = max(x, y), (size - 1) / 2
    source = np.array([(x, y), (x, y - half), (x - half, y - half)], np.float32)
    return cv2.getAffineTransform(source, np.array([(end, end), (end, 0), (0, 0)], np.float32))


PEOPLE = [
    ((200, 120), (20, 180, 30, 90), (4, 196, 24, 96)),
    ((140, 300), (60, 140, 180, 300), (52, 140, 168, 300)),
    ((140, 300), (0, 140, 0, 40), (0, 140, 0, 44)),
]
"""Size of a picture, box of a person, and its crop: a fifth larger, within the picture. Two reach beyond its edge."""


@pytest.mark.parametrize(("classes", "input_size"), [(20, 473), (18, 512), (7, 512)])
def test_the_input_is_the_official_one(tmp_path: Path, classes: int, input_size: int) -> None:
    size, box, (top, bottom, left, right) = PEOPLE[1]
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    network = StandIn(classes, lambda x: torch.zeros(len(x), classes, 119, 119))
    with_stand_in(tmp_path, network).estimate_parsing([PeopleInPicture(image, [ellipse(size, *box)])])
    blue_first = cv2.cvtColor(image[top:bottom, left:right], cv2.COLOR_RGB2BGR)
    warp = official_warp(bottom - top, right - left, input_size)
    expected = cv2.warpAffine(blue_first, warp, (input_size, input_size), flags=cv2.INTER_LINEAR) / 255
    expected = (expected - [0.406, 0.456, 0.485]) / [0.225, 0.224, 0.229]
    (given,) = network.given
    assert given.shape == (1, 3, input_size, input_size) and given.dtype == torch.float32
    np.testing.assert_allclose(given[0].permute(1, 2, 0), expected, atol=2 / 255 / 0.224)


@pytest.mark.parametrize(("size", "box", "crop"), PEOPLE)
def test_a_label_map_drawn_in_the_crop_comes_back_to_the_right_pixels(
    tmp_path: Path, size: tuple[int, int], box: tuple[int, int, int, int], crop: tuple[int, int, int, int]
) -> None:
    def drawing(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Labels 1 to 19 in squares of 20 pixels that stand at an angle in the picture."""
        u, v = (np.floor((x * c + y * s) / 20).astype(int) for c, s in [(0.8, 0.6), (-0.6, 0.8)])
        return 1 + (u + 7 * v) % 19

    def drawn(x: torch.Tensor) -> torch.Tensor:
        top, bottom, left, right = crop
        warp = official_warp(bottom - top, right - left, 473)
        v, u = np.mgrid[0:473:4, 0:473:4]
        back = np.linalg.inv(warp[:, :2])
        x_in_crop, y_in_crop = np.einsum("ij,jhw->ihw", back, np.stack([u, v]) - warp[:, 2, None, None])
        labels = torch.from_numpy(drawing(x_in_crop + left, y_in_crop + top))
        return 9 * F.one_hot(labels, 20).permute(2, 0, 1)[None].float()

    mask = ellipse(size, *box)
    picture = PeopleInPicture(np.zeros((*size, 3), np.uint8), [mask])
    (found,) = with_stand_in(tmp_path, StandIn(20, drawn)).estimate_parsing([picture])
    assert isinstance(found, np.ndarray) and found.shape == size and found.dtype == np.uint8
    y, x = np.mgrid[: size[0], : size[1]]
    truth = drawing(x, y)
    inner = mask & (
        cv2.erode(truth.astype(np.uint8), np.ones((5, 5))) == cv2.dilate(truth.astype(np.uint8), np.ones((5, 5)))
    )
    assert inner.sum() > mask.sum() / 2
    assert (found == truth)[inner].mean() > 0.98
    assert not found[~mask].any()


def test_several_people_at_once_give_what_each_gives_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    weight = torch.randn(20, 3, 8, 8)
    network = StandIn(20, lambda x: F.conv2d(x, weight, stride=4))
    rng = np.random.default_rng(4)
    pictures = [
        PeopleInPicture(
            rng.integers(0, 256, (*size, 3), np.uint8), [ellipse(size, *box), ellipse(size, 50, 90, 60, 100)]
        )
        for size, box, _ in PEOPLE[:2]
    ]
    several = with_stand_in(tmp_path, network, batch_size=3).estimate_parsing(pictures)
    assert [len(x) for x in network.given] == [3, 1]
    alone = with_stand_in(tmp_path, network, batch_size=1).estimate_parsing(pictures)
    for one, other in zip(several, alone, strict=True):
        assert isinstance(one, np.ndarray) and len(np.unique(one)) > 5
        assert (one == other).mean() > 0.999
