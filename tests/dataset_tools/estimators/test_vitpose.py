"""ViTPose: joints come back to the right pixels of the picture, one person or many at once; its folder loads whole."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataset_tools.errors import UserError
from dataset_tools.estimators import PeopleInPicture
from dataset_tools.estimators.skeletons import from_coco
from dataset_tools.estimators.vitpose import ViTPose, ViTPoseSettings

torch = pytest.importorskip("torch")

HEIGHT, WIDTH = 240, 320
BOXES = [(30, 20, 70, 200), (150, 60, 120, 90)]  # left, top, width, height: one narrow, one wide


def save_network(folder: Path, joints: int = 17, **backbone: Any) -> Any:
    """A ViTPose with random weights, as the hub has them but narrow."""
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation, VitPoseImageProcessor

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "out_indices": [2], **backbone}
    network = VitPoseForPoseEstimation(
        VitPoseConfig(backbone_config=VitPoseBackboneConfig(**sizes), num_labels=joints, initializer_range=1.0)
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    VitPoseImageProcessor().save_pretrained(folder)
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vitpose")
    save_network(folder)
    return folder


def mask_of(left: int, top: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top : top + height, left : left + width] = True
    return mask


def joints_in(left: int, top: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """(17, 3): somewhere in a box, scores from 0.35 to 0.95."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(0.05, 0.95, (17, 2)) * (width, height) + (left, top)
    return np.column_stack([places, rng.permutation(np.linspace(0.35, 0.95, 17))])


def in_the_crop(points: np.ndarray, left: int, top: int, width: int, height: int) -> np.ndarray:
    """Points of the picture in cells of a 48x64 heat map of its crop.

    mmpose: the box is widened to 3:4, enlarged by a quarter about its middle, and its first and last pixels are the
    first and last cells (unbiased data processing, Huang et al., 2020).
    """
    side = np.maximum([width, height], [height * 3 / 4, width * 4 / 3]) * 1.25
    return (points - (left + width / 2, top + height / 2) + side / 2) / side * (47, 63)


def drawn_heat(joints: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """(17, 64, 48): a bell of two cells' width at each joint, as ViTPose is trained to answer."""
    rows, columns = np.mgrid[:64, :48]
    cells = in_the_crop(joints[:, :2], *box)
    bells = [np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8) for x, y in cells]
    return np.stack(bells) * joints[:, 2, None, None]


@pytest.fixture
def with_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ViTPose]:
    """ViTPose with its true processor and a function of the pixels (n, 3, 256, 192) for its network."""
    from transformers import VitPoseImageProcessor

    def make(answer: Callable[[Any], np.ndarray], **settings: Any) -> ViTPose:
        def network(pixels: Any, dataset_index: Any) -> Any:
            return SimpleNamespace(heatmaps=torch.from_numpy(answer(pixels.float().cpu())))

        estimator = ViTPoseSettings(weights=str(folder), **settings).open()
        loaded = VitPoseImageProcessor.from_pretrained(folder), network
        monkeypatch.setattr("dataset_tools.estimators.network._LOADED", {})
        monkeypatch.setattr(estimator, "load", lambda: loaded)
        return estimator

    return make


def test_drawn_joints_come_back_to_their_pixels_with_their_scores(with_answers: Callable[..., ViTPose]) -> None:
    joints = np.stack([joints_in(*box, seed=seed) for seed, box in enumerate(BOXES)])
    heat = np.stack([drawn_heat(own, box) for own, box in zip(joints, BOXES, strict=True)]).astype(np.float32)
    picture = PeopleInPicture(np.zeros((HEIGHT, WIDTH, 3), np.uint8), [mask_of(*box) for box in BOXES])
    (found,) = with_answers(lambda pixels: heat).estimate_pose([picture])
    assert isinstance(found, np.ndarray) and found.shape == (2, 18, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found[..., :2], from_coco(joints)[..., :2], atol=0.5)
    np.testing.assert_allclose(found[..., 2], from_coco(joints)[..., 2], atol=0.06)


COLOURS = np.array([(r, g, b) for r in (60, 255) for g in (0, 120, 255) for b in (60, 150, 255)][:17])


def by_colour(pixels: Any) -> np.ndarray:
    """Heat maps of where the picture has the colour of each joint; first and last cells at first and last pixels."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    picture = (pixels.permute(0, 2, 3, 1) * std + mean) * 255
    differs = (picture[:, None] - torch.tensor(COLOURS)[:, None, None]).square().sum(-1)
    likeness = torch.exp(-differs / 600).float()
    smooth = torch.nn.functional.avg_pool2d(likeness, 9, 1, 4)
    return torch.nn.functional.interpolate(smooth, (64, 48), mode="bilinear", align_corners=True).numpy()


def test_what_the_network_sees_at_a_pixel_comes_back_to_that_pixel(with_answers: Callable[..., ViTPose]) -> None:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    grids = []
    for left, top, width, height in BOXES:
        x, y = np.meshgrid(left + width * (np.arange(3) + 0.5) / 3, top + height * (np.arange(6) + 0.5) / 6)
        grids.append(np.stack([x.ravel(), y.ravel()], -1)[:17])
        for (x_, y_), colour in zip(grids[-1], COLOURS, strict=True):
            image[(columns - x_) ** 2 + (rows - y_) ** 2 < 30] = colour
    picture = PeopleInPicture(image, [mask_of(*box) for box in BOXES])
    (found,) = with_answers(by_colour, min_score=0.01).estimate_pose([picture])
    expected = from_coco(np.concatenate([grids, np.ones((2, 17, 1))], -1))
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found[..., :2], expected[..., :2], atol=0.75)


def pictures_of(counts: list[int]) -> list[PeopleInPicture]:
    """Pictures of noise, each of another size, with so many people."""
    rng = np.random.default_rng(0)
    pictures = []
    for index, count in enumerate(counts):
        image = rng.integers(0, 256, (HEIGHT - 20 * index, WIDTH, 3), np.uint8)
        boxes = [(20 + 90 * k, 10 + 15 * k, 60 + 10 * k, 120 - 30 * k) for k in range(count)]
        pictures.append(PeopleInPicture(image, [mask_of(*box)[: len(image)] for box in boxes]))
    return pictures


def test_people_of_several_pictures_share_batches_and_nothing_else(folder: Path) -> None:
    pictures = pictures_of([2, 0, 3, 1])
    estimator = ViTPoseSettings(weights=str(folder), batch_size=4, min_score=1e-6).open()
    sizes = []
    with estimator.model() as (_, network):
        handle = network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    together = estimator.estimate_pose(pictures)
    handle.remove()
    assert sizes == [4, 2]
    for picture, found in zip(pictures, together, strict=True):
        assert isinstance(found, np.ndarray)
        assert found.shape == (len(picture.masks), 18, 3) and found.dtype == np.float32
        assert found.any((1, 2)).all()
        for mask, skeleton in zip(picture.masks, found, strict=True):
            (alone,) = estimator.estimate_pose([PeopleInPicture(picture.image, [mask])])
            np.testing.assert_allclose(skeleton, alone[0], rtol=1e-3, atol=1e-3)
    assert estimator.estimate_pose([]) == []


def test_pictures_that_may_not_be_written_to_are_seen_without_a_word(
    with_answers: Callable[..., ViTPose], request: pytest.FixtureRequest
) -> None:
    picture = PeopleInPicture(np.zeros((HEIGHT, WIDTH, 3), np.uint8), [mask_of(*BOXES[0])])
    picture.image.setflags(write=False)
    request.addfinalizer(lambda: torch.set_warn_always(False))
    torch.set_warn_always(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_answers(by_colour).estimate_pose([picture])


def test_the_answer_is_that_of_the_network_and_its_processor_as_transformers_documents_them(folder: Path) -> None:
    from transformers import AutoImageProcessor, VitPoseForPoseEstimation

    (picture,) = pictures_of([2])
    boxes = [[[20.0, 10.0, 60.0, 120.0], [110.0, 25.0, 70.0, 90.0]]]
    processor, network = AutoImageProcessor.from_pretrained(folder), VitPoseForPoseEstimation.from_pretrained(folder)
    with torch.inference_mode():
        told = network(**processor(picture.image, boxes=boxes, return_tensors="pt"))
    (people,) = processor.post_process_pose_estimation(told, boxes=boxes)
    coco = np.stack([np.column_stack([person["keypoints"], person["scores"]]) for person in people])
    expected = from_coco(coco)
    expected[expected[..., 2] < 0.2] = 0
    expected[..., 2] = np.minimum(expected[..., 2], 1)
    (found,) = ViTPoseSettings(weights=str(folder), min_score=0.2).open().estimate_pose([picture])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_in_half_precision_the_answers_are_nearly_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = ViTPoseSettings(weights=str(folder), min_score=1e-6).open()
    (single,) = estimator.estimate_pose(pictures_of([2]))
    monkeypatch.setattr("dataset_tools.estimators.network._LOADED", {})
    monkeypatch.setattr(ViTPose, "dtype", torch.float16)
    (half,) = estimator.estimate_pose(pictures_of([2]))
    assert isinstance(single, np.ndarray) and isinstance(half, np.ndarray)
    np.testing.assert_allclose(half[..., 2], single[..., 2], atol=0.02)
    assert not np.array_equal(half, single)


def test_joints_below_the_least_score_are_not_found_nor_is_the_neck_of_a_shoulder_that_is_not(
    with_answers: Callable[..., ViTPose],
) -> None:
    joints = joints_in(*BOXES[0])
    joints[:, 2] = 0.8
    joints[[0, 5, 9], 2] = 0.3, 0.3, -0.5  # nose, left shoulder, left wrist
    joints[1, 2] = 1.7  # left eye
    heat = drawn_heat(joints, BOXES[0])[None].astype(np.float32)
    heat[0, 16] = np.nan  # right ankle
    picture = PeopleInPicture(np.zeros((HEIGHT, WIDTH, 3), np.uint8), [mask_of(*BOXES[0])])
    (found,) = with_answers(lambda pixels: heat, min_score=0.5).estimate_pose([picture])
    assert isinstance(found, np.ndarray)
    assert np.flatnonzero(~found[0].any(-1)).tolist() == [0, 1, 5, 7, 10]
    assert found[0, :, 2].max() == 1 and np.isfinite(found).all()


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ViTPose++: six experts, of which the first knows COCO."""
    folder = tmp_path_factory.mktemp("vitpose-plus")
    save_network(folder, num_experts=6, part_features=4)
    return folder


def test_vitpose_plus_asks_the_expert_for_coco_alone(experts: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def without(expert: int) -> Path:
        weights = load_file(experts / "model.safetensors")
        for name in [name for name in weights if f".experts.{expert}." in name]:
            weights[name] = torch.zeros_like(weights[name])
        folder = tmp_path / str(expert)
        folder.mkdir()
        for file in ("config.json", "preprocessor_config.json"):
            (folder / file).write_bytes((experts / file).read_bytes())
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    def answer(folder: Path) -> np.ndarray:
        (found,) = ViTPoseSettings(weights=str(folder), min_score=1e-6).open().estimate_pose(pictures_of([1]))
        assert isinstance(found, np.ndarray) and found.any()
        return found

    whole = answer(experts)
    assert np.array_equal(answer(without(3)), whole)
    assert not np.allclose(answer(without(0)), whole)


def copy_of(folder: Path, place: Path) -> Path:
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("what", ["truncated", "lacks a layer", "another decoder", "no processor", "another width"])
def test_a_folder_of_something_else_is_refused_in_one_line(folder: Path, tmp_path: Path, what: str) -> None:
    from safetensors.torch import load_file, save_file

    place = copy_of(folder, tmp_path / "weights")
    weights = place / "model.safetensors"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif what == "lacks a layer":
        kept = load_file(weights)
        del kept["head.conv.weight"]
        save_file(kept, weights, {"format": "pt"})
    elif what == "another decoder":
        edit_config(place, use_simple_decoder=False)
    elif what == "no processor":
        (place / "preprocessor_config.json").unlink()
    else:
        narrow = json.loads((place / "config.json").read_text())["backbone_config"]
        edit_config(place, backbone_config=narrow | {"hidden_size": 32})
    with pytest.raises(UserError) as refused:
        ViTPoseSettings(weights=str(place)).open().check()
    assert str(place) in str(refused.value) and "\n" not in str(refused.value)


def test_a_network_of_other_joints_is_refused(tmp_path: Path) -> None:
    save_network(tmp_path, joints=14)
    with pytest.raises(UserError, match="14 joints"):
        ViTPoseSettings(weights=str(tmp_path)).open().check()
