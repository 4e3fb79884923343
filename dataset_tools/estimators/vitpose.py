"""ViTPose, top-down: the joints of one person at a time, in the box of its mask.

Y. Xu et al., ViTPose: Simple Vision Transformer Baselines for Human Pose Estimation (NeurIPS 2022), and ViTPose++
(TPAMI 2023), through transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dataset_tools.errors import Rejected, UserError
from dataset_tools.estimators import PeopleInPicture
from dataset_tools.estimators.network import NetworkEstimator, NetworkSettings, load_pretrained
from dataset_tools.estimators.skeletons import COCO_KEYPOINTS, from_coco
from dataset_tools.masks import bounds

_COCO = 0
"""Which of the data sets that ViTPose++ has experts for: the one whose joints we take."""


class ViTPoseSettings(NetworkSettings):
    """Any ViTPose or ViTPose++ that knows COCO's 17 joints."""

    kind: Literal["vitpose"] = "vitpose"
    weights: str = "vitpose-base"
    """Name of `dataset_tools.networks`, hub id or folder."""
    min_score: float = Field(0.3, gt=0, le=1)
    """Joints whose score is lower were not found."""

    def open(self) -> ViTPose:
        """The estimator."""
        return ViTPose(self)


class ViTPose(NetworkEstimator):
    """Finds the joints of each person in the box of its mask. Scores are the heights of the heat maps' peaks."""

    package = "transformers"
    settings: ViTPoseSettings

    def load(self) -> Any:
        """The image processor and the network."""
        from transformers import VitPoseForPoseEstimation, VitPoseImageProcessor

        processor = VitPoseImageProcessor.from_pretrained(self.weights.folder, local_files_only=True)
        network = load_pretrained(self, VitPoseForPoseEstimation)
        if network.config.num_labels != len(COCO_KEYPOINTS):
            raise UserError(
                f"{self.settings.weights} knows {network.config.num_labels} joints: take one that knows COCO's 17"
            )
        return processor, network

    def estimate_pose(self, pictures: Sequence[PeopleInPicture]) -> list[np.ndarray | Rejected]:
        """See `dataset_tools.estimators.PoseEstimator.estimate_pose`."""
        people = [(picture.image, _box(mask)) for picture in pictures for mask in picture.masks]
        joints = np.zeros((len(people), len(COCO_KEYPOINTS), 3), np.float32)
        if people:
            with self.model() as (processor, network):
                for start in range(0, len(people), self.batch_size):
                    chunk = slice(start, start + self.batch_size)
                    joints[chunk] = self._joints(processor, network, people[chunk])
        skeletons = from_coco(joints)
        skeletons[~(skeletons[..., 2] >= self.settings.min_score)] = 0
        skeletons[..., 2] = skeletons[..., 2].clip(0, 1)
        counts = [len(picture.masks) for picture in pictures]
        return [skeletons[end - count : end] for count, end in zip(counts, np.cumsum(counts), strict=True)]

    def _joints(self, processor: Any, network: Any, people: Sequence[tuple[np.ndarray, list[float]]]) -> np.ndarray:
        """COCO's joints (n, 17, 3): x, y in pixels of the picture, score, of n pictures' (H, W, 3) people in a box."""
        import torch

        # Of copies, as torch complains of pictures that may not be written to.
        images, boxes = [image.copy() for image, _ in people], [[box] for _, box in people]
        pixels = processor(images, boxes=boxes, return_tensors="pt", input_data_format="channels_last").pixel_values
        told = network(
            pixels.to(self.device, self.dtype),
            dataset_index=torch.full((len(people),), _COCO, device=self.device),
        )
        told.heatmaps = told.heatmaps.float()  # scipy knows no half precision
        found = [person for (person,) in processor.post_process_pose_estimation(told, boxes=boxes)]
        return np.stack([np.column_stack([person["keypoints"], person["scores"]]) for person in found])


def _box(mask: np.ndarray) -> list[float]:
    """Left, top, width and height of a mask."""
    top, bottom, left, right = bounds(mask)
    return [float(left), float(top), float(right - left), float(bottom - top)]
