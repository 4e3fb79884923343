"""OpenPose: drawn maps give the drawn skeletons, and those of controlnet-aux itself; its file is loaded whole."""

from __future__ import annotations

import hashlib
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from dataset_tools.errors import UserError
from dataset_tools.estimators import PeopleInPicture
from dataset_tools.estimators.openpose import OpenPose, OpenPoseSettings
from dataset_tools.masks import BONES
from dataset_tools.schema import KEYPOINTS

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow  # to import controlnet-aux takes seconds

# src/openpose/pose/poseParameters.cpp of OpenPose: POSE_COCO_PAIRS, and POSE_COCO_MAP_IDX less its 19 heat maps.
PAIRS = [
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17), (2, 16), (5, 17),
]  # fmt: skip
FIELDS = [12, 20, 14, 16, 22, 24, 0, 2, 4, 6, 8, 10, 28, 30, 34, 32, 36, 18, 26]

HEIGHT, WIDTH = 184, 248
# x and y of a standing person's joints, in tenths of its height from the middle of the hips.
STANDING = [
    (0, -5), (0, -3.6), (-1, -3.6), (-1.4, -2), (-1.6, -0.6), (1, -3.6), (1.4, -2), (1.6, -0.6),
    (-0.6, 0), (-0.7, 2), (-0.7, 4), (0.6, 0), (0.7, 2), (0.7, 4), (-0.3, -5.3), (0.3, -5.3), (-0.6, -5.1), (0.6, -5.1),
]  # fmt: skip


def person(x: float, y: float, height: float, lean: float) -> np.ndarray:
    """(18, 2) joints of a person who leans to the right by an angle in degrees."""
    turn = np.deg2rad(lean)
    joints = np.array(STANDING) * height / 10
    return joints @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) + (x, y)


def three_people() -> np.ndarray:
    """(3, 18, 3): two who lean across each other, one beside them; every joint of another score."""
    joints = np.stack([person(75, 95, 145, 35), person(95, 95, 145, -35), person(205, 100, 120, 5)])
    scores = np.random.default_rng(0).permutation(np.linspace(0.4, 0.95, 54)).reshape(3, 18, 1)
    return np.concatenate([joints, scores], -1)


def masks_of(people: np.ndarray) -> list[np.ndarray]:
    """Limbs as thick lines; whoever comes later is in front."""
    masks: list[np.ndarray] = []
    for joints in people:
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        points = dict(zip(KEYPOINTS, joints[:, :2].round().astype(int).tolist(), strict=True))
        for one, other in BONES:
            cv2.line(mask, points[one], points[other], 1, 12)
        masks = [before & (mask == 0) for before in masks] + [mask > 0]
    return masks


class DrawnMaps:
    """Stands for the network: draws the heat maps and part affinity fields that a perfect one would answer with."""

    def __init__(self, people: np.ndarray, dim: dict[int, float] | None = None) -> None:
        self.people = people
        self.dim = dim or {}
        """By which factor heat maps are lower at a height of the picture."""
        self.inputs: list[Any] = []

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def __call__(self, pixels: Any) -> tuple[Any, Any]:
        self.inputs.append(pixels.clone())
        height, width = (size // 8 for size in pixels.shape[2:])
        heat, fields = np.zeros((19, height, width), np.float32), np.zeros((38, height, width), np.float32)
        rows, columns = np.mgrid[:height, :width]
        cells = (self.people[..., :2] + 0.5) * height / HEIGHT - 0.5
        for points, scores in zip(cells, self.people[..., 2], strict=True):
            for (x, y), score, heat_map in zip(points, scores, heat, strict=False):
                drawn = score * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 2)
                np.maximum(heat_map, drawn * self.dim.get(height * 8, 1), out=heat_map)
        for (one, other), channel in zip(PAIRS, FIELDS, strict=True):
            drawn_by = np.zeros((height, width))
            for points in cells:
                start, along = points[one], points[other] - points[one]
                length = np.hypot(*along)
                x, y = columns - start[0], rows - start[1]
                ahead, aside = (x * along[0] + y * along[1]) / length, (x * along[1] - y * along[0]) / length
                limb = (ahead >= -0.5) & (ahead <= length + 0.5) & (np.abs(aside) <= 1)
                fields[channel][limb] += along[0] / length
                fields[channel + 1][limb] += along[1] / length
                drawn_by += limb
            fields[channel : channel + 2] /= np.maximum(drawn_by, 1)
        return tuple(torch.from_numpy(maps)[None].expand(len(pixels), -1, -1, -1) for maps in (fields, heat))


class RandomMaps(DrawnMaps):
    """Stands for the network: smooth noise, in which many joints and people are found."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.zeros((0, 18, 3)))
        self.seed = seed

    def __call__(self, pixels: Any) -> tuple[Any, Any]:
        self.inputs.append(pixels.clone())
        rng = np.random.default_rng(self.seed)
        size = [side // 8 for side in pixels.shape[2:]]
        heat = np.where(rng.random((1, 19, *size)) < 0.03, rng.random((1, 19, *size)), 0)
        fields = rng.normal(size=(1, 38, *size)) + 2 * rng.normal(size=(1, 38, 1, 1))
        return torch.from_numpy(fields).float(), torch.from_numpy(heat).float()


def openpose(weights: Path, file: Path, **settings: Any) -> OpenPose:
    """OpenPose with weights of one's own, which are in a file that is trusted."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return OpenPoseSettings(weights=str(weights), sha256=digest, **settings).open()


@pytest.fixture
def with_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OpenPose]:
    """OpenPose with something else for its network."""

    def make(network: Any, **settings: Any) -> OpenPose:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.pth"
        file.write_bytes(repr(network).encode())
        estimator = openpose(file, file, **settings)
        monkeypatch.setattr(estimator, "load", lambda: network)
        return estimator

    return make


def by_controlnet_aux(network: Any, image: np.ndarray) -> np.ndarray:
    """(M, 18, 3): what controlnet-aux finds."""
    from controlnet_aux.open_pose.body import Body

    body = Body.__new__(Body)
    body.model = network
    found = body.format_body_result(*body(image[..., ::-1].copy()))
    return np.array(
        [[(k.x, k.y, min(k.score, 1)) if k else (0, 0, 0) for k in body.keypoints] for body in found], np.float32
    ).reshape(-1, 18, 3)


@pytest.mark.parametrize(("scales", "cell"), [((0.5,), 8), ((1.0,), 4), ((0.5, 1.0), 8)])
def test_three_people_of_whom_two_cross_come_back_as_drawn(
    with_network: Callable[..., OpenPose], scales: tuple[float, ...], cell: int
) -> None:
    people = three_people()
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    (found,) = with_network(DrawnMaps(people), scales=scales).estimate_pose([PeopleInPicture(image, masks_of(people))])
    assert isinstance(found, np.ndarray) and found.shape == (3, 18, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found[..., :2], people[..., :2], atol=cell / 6)
    np.testing.assert_allclose(found[..., 2], people[..., 2], atol=0.03)


def sorted_by_joints(skeletons: np.ndarray) -> np.ndarray:
    return skeletons[np.lexsort(skeletons.reshape(len(skeletons), -1).T)]


@pytest.mark.parametrize(
    ("network", "size"),
    [
        (lambda: DrawnMaps(three_people()), (201, 150)),
        (lambda: RandomMaps(0), (90, 80)),
        (lambda: RandomMaps(1), (60, 67)),
        (lambda: RandomMaps(2), (200, 61)),
    ],
    ids=["drawn", "random 0", "random 1", "random 2"],
)
def test_at_one_scale_controlnet_aux_asks_the_network_the_same_and_finds_the_same(
    with_network: Callable[..., OpenPose], network: Callable[[], DrawnMaps], size: tuple[int, int]
) -> None:
    answers = network()
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    expected = by_controlnet_aux(answers, image)
    assert len(expected) > 1
    everywhere = PeopleInPicture(image, [np.ones(size, bool)] * len(expected))
    (found,) = with_network(answers).estimate_pose([everywhere])
    assert isinstance(found, np.ndarray)
    assert np.array_equal(sorted_by_joints(found), sorted_by_joints(expected))
    theirs, ours = answers.inputs
    assert torch.equal(theirs, ours)


def test_maps_of_several_scales_are_averaged(with_network: Callable[..., OpenPose]) -> None:
    people = three_people()
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    network = DrawnMaps(people, dim={184: 1, 368: 0.8, 552: 0.6})
    estimator = with_network(network, scales=(0.5, 1.0, 1.5))
    (found,) = estimator.estimate_pose([PeopleInPicture(image, masks_of(people))])
    assert isinstance(found, np.ndarray)
    assert [tuple(pixels.shape) for pixels in network.inputs] == [(1, 3, 184, 248), (1, 3, 368, 496), (1, 3, 552, 744)]
    np.testing.assert_allclose(found[..., 2], 0.8 * people[..., 2], atol=0.03)


def test_joints_of_a_large_picture_are_found_in_as_much_memory_as_those_of_a_small_one(
    with_network: Callable[..., OpenPose],
) -> None:
    people = three_people()
    image = np.zeros((HEIGHT * 8, WIDTH * 8, 3), np.uint8)
    masks = [np.kron(mask, np.ones((8, 8), bool)) for mask in masks_of(people)]
    estimator = with_network(DrawnMaps(people))
    tracemalloc.start()
    (found,) = estimator.estimate_pose([PeopleInPicture(image, masks)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 57 * 8 * image[..., 0].size / 2  # its maps alone, in double precision as they are averaged
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose((found[..., :2] + 0.5) / 8 - 0.5, people[..., :2], atol=1)
    np.testing.assert_allclose(found[..., 2], people[..., 2], atol=0.03)


class AsBright(DrawnMaps):
    """A network whose peaks are as high as its picture is bright."""

    def __call__(self, pixels: Any) -> tuple[Any, Any]:
        fields, heat = super().__call__(pixels)
        return fields, heat * (pixels.mean((1, 2, 3), keepdim=True) + 0.5)


def test_pictures_of_one_size_share_a_batch_and_nothing_else(with_network: Callable[..., OpenPose]) -> None:
    people = three_people()[:1]
    (mask,) = masks_of(people)
    pictures = [PeopleInPicture(np.full((HEIGHT, WIDTH, 3), grey, np.uint8), [mask]) for grey in (255, 200, 150, 225)]
    pictures[1] = PeopleInPicture(pictures[1].image[:, :200], [mask[:, :200]])
    pictures.insert(2, PeopleInPicture(pictures[0].image, []))
    network = AsBright(people)
    estimator = with_network(network, batch_size=2)
    found = estimator.estimate_pose(pictures)
    assert [len(pixels) for pixels in network.inputs] == [2, 1, 1]
    assert [len(skeletons) for skeletons in found if isinstance(skeletons, np.ndarray)] == [1, 1, 0, 1, 1]
    for picture, together in zip(pictures, found, strict=True):
        (alone,) = estimator.estimate_pose([picture])
        assert isinstance(together, np.ndarray) and isinstance(alone, np.ndarray)
        assert np.array_equal(together, alone)
    heights = [skeletons[0, :, 2].max() for skeletons in found if isinstance(skeletons, np.ndarray) and len(skeletons)]
    np.testing.assert_allclose(heights, np.array([255, 200, 150, 225]) / 256 * people[0, :, 2].max(), atol=0.03)


def test_the_network_is_not_asked_about_pictures_without_people(with_network: Callable[..., OpenPose]) -> None:
    network = DrawnMaps(three_people())
    (found,) = with_network(network).estimate_pose([PeopleInPicture(np.zeros((40, 50, 3), np.uint8), [])])
    assert isinstance(found, np.ndarray) and found.shape == (0, 18, 3) and found.dtype == np.float32
    assert network.inputs == []


def test_where_nothing_is_found_masks_have_no_skeleton_and_scores_are_not_above_one(
    with_network: Callable[..., OpenPose],
) -> None:
    people = three_people()
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    masks = masks_of(people)
    nobody = np.zeros((0, 18, 3))
    (found,) = with_network(DrawnMaps(nobody)).estimate_pose([PeopleInPicture(image, masks)])
    assert isinstance(found, np.ndarray) and found.shape == (3, 18, 3) and not found.any()
    (found,) = with_network(DrawnMaps(people, dim={184: 2.0})).estimate_pose([PeopleInPicture(image, masks)])
    assert isinstance(found, np.ndarray) and found[..., 2].max() == 1


def openpose_layers() -> list[str]:
    """Names of the convolutions in OpenPose's ``pose_deploy_linevec.prototxt`` (COCO)."""
    trunk = ["1_1", "1_2", "2_1", "2_2", "3_1", "3_2", "3_3", "3_4", "4_1", "4_2", "4_3_CPM", "4_4_CPM"]
    first = [f"conv5_{layer}_CPM_L{branch}" for layer in range(1, 6) for branch in (1, 2)]
    later = [
        f"Mconv{layer}_stage{stage}_L{branch}" for stage in range(2, 7) for layer in range(1, 8) for branch in (1, 2)
    ]
    return [f"conv{name}" for name in trunk] + first + later


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Makes OpenPose's network, here and when it is loaded, have all its layers but a sixteenth of the channels."""
    from controlnet_aux.open_pose import model

    kept = {3: 3, 19: 19, 38: 38, 185: 38 + 19 + 128 // 16}
    whole = model.make_layers

    def make_layers(block: dict[str, list[int]], without_relu: list[str]) -> Any:
        thinner = {
            name: sizes if "pool" in name else [*(kept.get(size, size // 16) for size in sizes[:2]), *sizes[2:]]
            for name, sizes in block.items()
        }
        return whole(thinner, without_relu)

    monkeypatch.setattr(model, "make_layers", make_layers)
    return model.bodypose_model


def in_the_true_layout(network: Any) -> dict[str, Any]:
    """The network's weights as ``body_pose_model.pth`` names them."""
    return {name.split(".", 1)[1]: tensor for name, tensor in network.state_dict().items()}


def test_every_weight_of_openpose_has_its_place_and_every_place_its_weight() -> None:
    from controlnet_aux.open_pose.model import bodypose_model

    with torch.device("meta"):
        network = bodypose_model()
    names = in_the_true_layout(network)
    assert len(names) == len(network.state_dict()) == 184
    assert sorted(names) == sorted(f"{layer}.{kind}" for layer in openpose_layers() for kind in ("bias", "weight"))
    assert sum(tensor.numel() for tensor in names.values()) == 52_311_446  # 209 MB, as the file is


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_the_network_is_loaded_with_the_weights_of_the_file(
    thin: Callable[[], Any], tmp_path: Path, zipped: bool
) -> None:
    network = thin()
    file = tmp_path / "body_pose_model.pth"
    torch.save(in_the_true_layout(network), file, _use_new_zipfile_serialization=zipped)
    pixels = torch.rand(1, 3, 32, 40)
    for weights in (file, tmp_path):
        estimator = openpose(weights, file)
        estimator.check()
        with estimator.model() as loaded, torch.inference_mode():
            assert not loaded.training
            where = next(loaded.parameters())
            for own, expected in zip(loaded(pixels.to(where)), network(pixels), strict=True):
                torch.testing.assert_close(own.float().cpu(), expected, atol=1e-2, rtol=1e-2)


class Unwelcome:
    """Whoever unpickles it writes a file."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("__import__('pathlib').Path('unpickled').touch()",)


def broken(what: str, weights: dict[str, Any], file: Path) -> None:
    first = next(iter(weights))
    if what == "lacks a layer":
        del weights[first]
    elif what == "has a layer more":
        weights["conv6_1.weight"] = weights[first]
    elif what == "another size":
        weights[first] = weights[first][:-1]
    elif what == "prefixed":
        weights = {f"module.{name}": tensor for name, tensor in weights.items()}
    elif what == "not a dictionary":
        torch.save(weights[first], file)
        return
    elif what == "runs code":
        weights["code"] = Unwelcome()
    torch.save(weights, file)
    if what == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif what == "not a checkpoint":
        file.write_bytes(b"<html>not found</html>")


@pytest.mark.parametrize(
    "what",
    ["lacks a layer", "has a layer more", "another size", "prefixed", "not a dictionary", "runs code", "truncated",
     "not a checkpoint"],
)  # fmt: skip
def test_a_file_of_something_else_is_refused_in_one_line(
    thin: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "body_pose_model.pth"
    broken(what, in_the_true_layout(thin()), file)
    with pytest.raises(UserError) as refused:
        openpose(file, file).check()
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)
    assert "weights_only" not in str(refused.value)
    assert not Path("unpickled").exists()


def test_settings_and_estimator_import_no_network_package(tmp_path: Path) -> None:
    file = tmp_path / "body_pose_model.pth"
    file.write_bytes(b"weights")
    before = set(sys.modules)
    estimator = openpose(file, file)
    assert estimator.made_by.name == "openpose" and estimator.fingerprint()
    assert not {name for name in set(sys.modules) - before if name.startswith(("controlnet_aux", "scipy"))}
