"""People by any network of transformers that segments instances: RF-DETR-Seg, EoMT, Mask2Former, MaskFormer, ..."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dataset_tools.errors import UserError
from dataset_tools.estimators.found_people import InstancesSettings, PeopleFinder, Seen
from dataset_tools.estimators.network import alike, load_pretrained, quietly
from dataset_tools.records import PEOPLE_ANYWHERE

if TYPE_CHECKING:
    import torch

UNUSABLE = {
    "detr": "gives each pixel to the likeliest thing, and has no masks of people by themselves",
    "oneformer": "wants a text beside each picture",
    "videomt": "sees videos",
}
"""Segmentation networks of transformers that cannot be used, and why."""
_DETR = ("logits", "pred_masks")
_MASKFORMER = ("class_queries_logits", "masks_queries_logits")
"""How networks name what they say of each query; their post-processing asks by these names."""


class SegmentationSettings(InstancesSettings):
    """Which network, and whom to believe."""

    kind: Literal["transformers"] = "transformers"
    weights: str = "rf-detr-seg-medium"
    """Name of `dataset_tools.networks`, hub id, or folder with ``config.json``, ``preprocessor_config.json`` and
    safetensors; one of the labels in ``config.json`` is "person", or another of `PEOPLE_ANYWHERE`."""

    def open(self) -> Segmentation:
        """The estimator; nothing is loaded yet."""
        return Segmentation(self)


@dataclass(frozen=True)
class _Network:
    model: Any
    processor: Any
    people: list[int]
    """Numbers of the labels that are people."""


class Segmentation(PeopleFinder):
    """Finds people by a network whose queries have a class and a mask each, post-processed by its own library."""

    package = "transformers"

    @quietly()
    def load(self) -> Any:
        """See `NetworkEstimator.load`."""
        import transformers
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES,
            MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
        )

        name, place = self.settings.weights, {"local_files_only": True, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(self.weights.folder, **place)
        known = MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES | MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
        if config.model_type not in known or config.model_type in UNUSABLE:
            why = UNUSABLE.get(config.model_type, "does not segment instances")
            usable = ", ".join(sorted(known.keys() - UNUSABLE))
            raise UserError(f"{name} is of the kind {config.model_type}, which {why}: choose one of {usable}")
        people = _people_among(config.id2label, name)
        processor = transformers.AutoImageProcessor.from_pretrained(self.weights.folder, **place)
        if getattr(processor, "do_split_image", False):
            raise UserError(f"{name} is for semantic segmentation, which does not tell people apart")
        processor.pad_size = None  # masks are stretched to their pictures' sizes, and padding would be with them
        return _Network(load_pretrained(self, getattr(transformers, known[config.model_type])), processor, people)

    def _see(self, network: _Network, images: Sequence[np.ndarray]) -> list[Seen]:
        import torch

        # Of copies, as torch complains of pictures that may not be written to.
        inputs = [
            network.processor(image.copy(), return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
            for image in images
        ]
        seen: list[Seen] = [([], [])] * len(images)
        # Most networks see pictures at one size; for the others none is padded for another's sake.
        for batch in alike([values.shape for values in inputs]):
            pixels = torch.stack([inputs[k] for k in batch]).to(self.device, self.dtype)
            outputs = network.model(pixel_values=pixels)
            names = _DETR if "logits" in outputs else _MASKFORMER
            for k, classes, masks in zip(batch, *(outputs[name] for name in names), strict=True):
                seen[k] = self._people(network, {names[0]: classes, names[1]: masks}, images[k].shape[:2])
        return seen

    def _people(self, network: _Network, queries: dict[str, torch.Tensor], size: tuple[int, int]) -> Seen:
        """Masks and scores of the queries that are people, in one picture of a size (height, width).

        The library post-processes each query alone. Together their masks would cut each other, in some networks
        whatever their scores; and all would be enlarged to the picture's size, people or not.
        """
        logits = next(iter(queries.values())).float()
        # One class more than there are labels is "nothing", and classes exclude each other.
        excluding = logits.shape[-1] > network.model.config.num_labels
        probabilities = logits.softmax(-1) if excluding else logits.sigmoid()
        likely = probabilities[:, network.people].amax(-1) >= self.settings.min_score
        masks, scores = [], []
        for values in zip(*(value[likely].float().cpu() for value in queries.values()), strict=True):
            one = SimpleNamespace(**{name: value[None, None] for name, value in zip(queries, values, strict=True)})
            [result] = network.processor.post_process_instance_segmentation(
                one, threshold=self.settings.min_score, target_sizes=[size]
            )
            for segment in result["segments_info"]:
                if segment["label_id"] in network.people:
                    masks.append((result["segmentation"] == segment["id"]).numpy())
                    scores.append(segment["score"])
        return masks, scores


def _people_among(labels: dict[int, str], name: str) -> list[int]:
    """Numbers of the labels that are people. Raises `UserError` where none is."""
    people = [number for number, label in labels.items() if label.strip().casefold() in PEOPLE_ANYWHERE]
    if not people:
        near = difflib.get_close_matches("person", [label.casefold() for label in labels.values()], n=3, cutoff=0)
        *most, last = PEOPLE_ANYWHERE
        raise UserError(
            f"{name} finds no people: none of its {len(labels)} labels is {', '.join(most)} or {last}; "
            f"the nearest are {', '.join(near)}"
        )
    return people
