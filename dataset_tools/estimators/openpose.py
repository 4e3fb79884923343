"""OpenPose, bottom-up: heat maps of all joints of a picture, and part affinity fields that say which belong together.

Z. Cao et al., Realtime Multi-Person 2D Pose Estimation using Part Affinity Fields (CVPR 2017), as controlnet-aux has
it (``controlnet_aux.open_pose``): its network, scaling and grouping are called, and none of that code is copied, since
CMU licenses it for non-commercial use only. Its ``Body`` as a whole sees one picture at a time, at one scale.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from dataset_tools.errors import Rejected
from dataset_tools.estimators import PeopleInPicture
from dataset_tools.estimators.network import NetworkEstimator, NetworkSettings, alike
from dataset_tools.estimators.skeletons import match_skeletons

if TYPE_CHECKING:
    import torch

_BOX = 368
"""Height in pixels of the pictures that the network was trained on."""
_STRIDE = 8
"""Pixels of the network's input a cell of its maps."""
_GREY = 128
"""What pictures are padded with to whole cells; 0 to the network."""
_FIELDS = 38
"""Channels of the part affinity fields: x and y of 19 limbs. The heat maps of 18 joints and the background follow."""
_CANVAS = 512 * 512
"""Pixels of the maps in which joints are looked for at most, however large the picture: some 0.3 GB of memory."""


class OpenPoseSettings(NetworkSettings):
    """OpenPose's body network (COCO model)."""

    kind: Literal["openpose"] = "openpose"
    weights: str = "openpose"
    """Name of `dataset_tools.networks`, or ``body_pose_model.pth``, or the folder that holds it."""
    scales: tuple[Annotated[float, Field(gt=0, le=4)], ...] = Field((0.5,), min_length=1)
    """Heights at which the network sees each picture, in units of 368 pixels; the maps of several are averaged.
    OpenPose's own are 0.5, 1, 1.5 and 2: they find smaller people too, and take 30 times as long as 0.5 alone."""

    def open(self) -> OpenPose:
        """The estimator."""
        return OpenPose(self)


class OpenPose(NetworkEstimator):
    """Finds the skeletons of a picture, and gives each mask its own. Scores are the heights of the heat maps' peaks."""

    package = "controlnet-aux"
    files = ("body_pose_model.pth",)
    settings: OpenPoseSettings

    def load(self) -> Any:
        """The network, with all that the file holds."""
        import torch

        network = _body().bodypose_model()
        (file,) = self.weights.files.values()
        stored = torch.load(file, map_location="cpu", weights_only=True)
        # Names in the file lack the block that the layer is in.
        blocks = {name.partition(".")[2]: name for name in network.state_dict()}
        network.load_state_dict({blocks.get(name, name): tensor for name, tensor in stored.items()})
        return network.eval().to(self.device, self.dtype)

    def estimate_pose(self, pictures: Sequence[PeopleInPicture]) -> list[np.ndarray | Rejected]:
        """See `dataset_tools.estimators.PoseEstimator.estimate_pose`."""
        images = [picture.image for picture in pictures if picture.masks]
        maps = iter(self._maps(images) if images else [])
        return [
            match_skeletons(self._skeletons(next(maps), picture.image.shape[:2]), picture.masks)
            if picture.masks
            else np.zeros((0, 18, 3), np.float32)
            for picture in pictures
        ]

    def _maps(self, images: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """What the network says of each picture at each scale: (57, h, w) float32, cells of padding included.

        Pictures that the network sees at the same size share a batch.
        """
        import torch

        found: list[list[np.ndarray]] = [[] for _ in images]
        with self.model() as network:
            for scale in self.settings.scales:
                inputs = [_network_input(image, scale) for image in images]
                for group in alike([seen.shape for seen in inputs]):
                    for start in range(0, len(group), self.batch_size):
                        batch = group[start : start + self.batch_size]
                        pixels = torch.from_numpy(np.stack([inputs[index] for index in batch]))
                        maps = torch.cat(network(pixels.to(self.device, self.dtype)), 1).float().cpu().numpy()
                        for index, own in zip(batch, maps, strict=True):
                            found[index].append(own)
        return found

    def _skeletons(self, maps: Sequence[np.ndarray], size: tuple[int, ...]) -> np.ndarray:
        """(M, 18, 3), as `match_skeletons` takes them, of a picture of a size (height, width); a map a scale."""
        util = _body().util
        shrink = min(1.0, (_CANVAS / (size[0] * size[1])) ** 0.5)
        canvas = round(size[0] * shrink), round(size[1] * shrink)
        averaged = np.zeros((len(maps[0]), *canvas), np.float32)
        for cells, scale in zip(maps, self.settings.scales, strict=True):
            height, width = _seen_size(size, scale)
            for channel, total in zip(cells, averaged, strict=True):
                fine = util.smart_resize_k(channel, _STRIDE, _STRIDE)[:height, :width]
                total += util.smart_resize(fine, canvas) / len(maps)
        candidates, people = _group(averaged)
        joints = people[:, :18].astype(int)
        skeletons = np.zeros((len(joints), 18, 3))
        found = joints >= 0
        if found.any():
            seen = candidates[joints[found]]
            skeletons[found, :2] = (seen[:, :2] + 0.5) * np.divide(size, canvas)[::-1] - 0.5
            skeletons[found, 2] = seen[:, 2].clip(0, 1)
        return skeletons


@cache
def _body() -> Any:
    """``controlnet_aux.open_pose.body``: takes seconds, for the package imports all its detectors at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what those others lack
        from controlnet_aux.open_pose import body
    return body


def _seen_size(size: tuple[int, ...], scale: float) -> tuple[int, int]:
    """Height and width at which the network sees a picture of a size (height, width), as ``Body`` rounds them."""
    factor = scale * _BOX / size[0]
    return int(size[0] * factor), int(size[1] * factor)


def _network_input(image: np.ndarray, scale: float) -> np.ndarray:
    """(3, h, w) float32 BGR, -0.5..0.5, padded to whole cells: the picture as the network takes it."""
    util = _body().util
    seen = util.smart_resize(np.ascontiguousarray(image[..., ::-1]), _seen_size(image.shape, scale))
    padded, _ = util.padRightDownCorner(seen, _STRIDE, _GREY)
    return padded.astype(np.float32).transpose(2, 0, 1) / 256 - 0.5


class _KnownMaps:
    """Stands for the network where its maps (57, H, W) are known."""

    def __init__(self, maps: np.ndarray) -> None:
        import torch

        self._maps = torch.from_numpy(maps)[None]

    def parameters(self) -> list[torch.Tensor]:
        """Tells where it runs."""
        return [self._maps]

    def __call__(self, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Part affinity fields and heat maps, whatever the picture."""
        return self._maps[:, :_FIELDS], self._maps[:, _FIELDS:]


def _group(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joints and people in maps (57, H, W): the second half of controlnet-aux's ``Body.__call__``, which is one piece.

    Its first half asks a network about a scaled picture and scales the answer. Called with the network's answer, and
    with `util` (the module that scales; the function alone sees ours) leaving everything as it is, it changes nothing.

    Returns:
        Joints found, (K, 4): x, y, score, index; and people, (M, 20): the index of each joint or -1, and two totals.
    """
    body = _body()
    untouched = SimpleNamespace(
        smart_resize=lambda array, size: array,
        smart_resize_k=lambda array, fx, fy: array,
        padRightDownCorner=lambda array, stride, value: (array, (0, 0, 0, 0)),
    )
    group = FunctionType(body.Body.__call__.__code__, {**vars(body), "util": untouched})
    picture = np.zeros((*maps.shape[1:], 1), np.uint8)
    return group(SimpleNamespace(model=_KnownMaps(maps)), picture)
