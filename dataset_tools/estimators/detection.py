"""Faces, licence plates and the like by any network of transformers that detects objects: RT-DETR, YOLOS, DETR, ..."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dataset_tools.errors import UserError
from dataset_tools.estimators import FoundRegion
from dataset_tools.estimators.network import NetworkEstimator, NetworkSettings, alike, load_pretrained, quietly


class DetectionSettings(NetworkSettings):
    """Which network, and what it is to find."""

    kind: Literal["detection"] = "detection"
    weights: str
    """Hub id, or folder with ``config.json``, ``preprocessor_config.json`` and safetensors."""
    labels: tuple[str, ...] = Field(("face", "license plate"), min_length=1)
    """What is looked for, of the labels in ``config.json``; case, ``-`` and ``_`` make no difference."""
    min_score: float = Field(0.3, ge=0, le=1)
    """What the network scores lower is not there. What is overlooked stays to be seen: rather low."""

    def open(self) -> Detection:
        """The estimator; nothing is loaded yet."""
        return Detection(self)


@dataclass(frozen=True)
class _Network:
    model: Any
    processor: Any


class Detection(NetworkEstimator):
    """Boxes of what is looked for: see `dataset_tools.estimators.RegionDetector`."""

    package = "transformers"
    settings: DetectionSettings

    @quietly()
    def load(self) -> _Network:
        """See `NetworkEstimator.load`."""
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as KNOWN

        name, place = self.settings.weights, {"local_files_only": True, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(self.weights.folder, **place)
        if config.model_type not in KNOWN:
            usable = ", ".join(sorted(KNOWN))
            raise UserError(f"{name} is of the kind {config.model_type}, which detects no objects: use one of {usable}")
        processor = transformers.AutoImageProcessor.from_pretrained(self.weights.folder, **place)
        processor.pad_size = None  # boxes are shares of what the network sees, which is to be the picture
        return _Network(load_pretrained(self, getattr(transformers, KNOWN[config.model_type])), processor)

    def check(self) -> None:
        """See `dataset_tools.estimators.Estimator.check`."""
        with self.model() as network:
            self._labels(network)

    def find_regions(self, images: Sequence[np.ndarray]) -> list[list[FoundRegion]]:
        """See `dataset_tools.estimators.RegionDetector.find_regions`."""
        found: list[list[FoundRegion]] = []
        for start in range(0, len(images), self.batch_size):
            with self.model() as network:
                found += self._find(network, images[start : start + self.batch_size])
        return found

    def _find(self, network: _Network, images: Sequence[np.ndarray]) -> list[list[FoundRegion]]:
        import torch

        labels = self._labels(network)
        # Of copies, as torch complains of pictures that may not be written to.
        inputs = [
            network.processor(image.copy(), return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
            for image in images
        ]
        found: list[list[FoundRegion]] = [[]] * len(images)
        # None is padded for another's sake.
        for batch in alike([values.shape for values in inputs]):
            pixels = torch.stack([inputs[k] for k in batch]).to(self.device, self.dtype)
            answers = network.model(pixel_values=pixels)
            answers.logits, answers.pred_boxes = answers.logits.float().cpu(), answers.pred_boxes.float().cpu()
            results = network.processor.post_process_object_detection(
                answers, threshold=self.settings.min_score, target_sizes=[images[k].shape[:2] for k in batch]
            )
            for k, result in zip(batch, results, strict=True):
                found[k] = [
                    FoundRegion(labels[label], tuple(box))
                    for label, box in zip(result["labels"].tolist(), result["boxes"].tolist(), strict=True)
                    if label in labels
                ]
        return found

    def _labels(self, network: _Network) -> dict[int, str]:
        """Numbers of the labels that are looked for, and how the settings call them: networks are shared.

        Raises:
            UserError: the network does not know one of them.
        """
        known = {number: _plain(label) for number, label in network.model.config.id2label.items()}
        numbers: dict[int, str] = {}
        for label in self.settings.labels:
            found = [number for number, plain in known.items() if plain == _plain(label)]
            if not found:
                near = ", ".join(difflib.get_close_matches(_plain(label), known.values(), n=3, cutoff=0))
                raise UserError(
                    f"{self.settings.weights} finds no {label!r}; the nearest of its {len(known)} labels are {near}"
                )
            numbers |= dict.fromkeys(found, label)
        return numbers


def _plain(label: str) -> str:
    return re.sub("[-_ ]+", " ", label).strip().casefold()
