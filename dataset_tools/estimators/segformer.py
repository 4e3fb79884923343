"""Parsing by a SegFormer (Xie et al. 2021) of transformers whose classes are called as the labels of a label set."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dataset_tools.errors import UserError
from dataset_tools.estimators.crops import CropParsing
from dataset_tools.estimators.network import NetworkSettings, load_pretrained
from dataset_tools.schema import PARSING_LABELS

if TYPE_CHECKING:
    import torch


class SegformerSettings(NetworkSettings):
    """Which model."""

    kind: Literal["segformer"] = "segformer"
    weights: str = "segformer-clothes"
    """Name of `dataset_tools.networks`, hub id or folder (``config.json``, ``model.safetensors``,
    ``preprocessor_config.json``) of a model whose ``id2label`` names the labels of one label set."""

    def open(self) -> Segformer:
        """The estimator; nothing is loaded."""
        return Segformer(self)


@dataclass
class _Loaded:
    model: Any
    processor: Any
    label_set: str
    classes: list[int]
    """The model's class of each label."""


class Segformer(CropParsing):
    """Labels by a SegFormer: its own processor makes its input from a crop and brings its output back."""

    package = "transformers"
    files = ("config.json", "model.safetensors", "preprocessor_config.json")

    @cached_property
    def label_set(self) -> str:
        """See `dataset_tools.estimators.ParsingEstimator.label_set`."""
        with self.model() as loaded:
            return loaded.label_set

    def load(self) -> _Loaded:
        """See `dataset_tools.estimators.network.NetworkEstimator.load`."""
        from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

        model = load_pretrained(self, SegformerForSemanticSegmentation)
        processor = SegformerImageProcessor.from_pretrained(self.weights.folder, local_files_only=True)
        try:
            return _Loaded(model, processor, *labels_by_name(model.config.id2label))
        except ValueError as error:
            raise UserError(f"{self.settings.weights}: {error}") from None

    def logits(self, model: _Loaded, crops: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """See `CropParsing.logits`."""
        inputs = model.processor(list(crops), input_data_format="channels_last", return_tensors="pt")
        answers = model.model(inputs["pixel_values"].to(self.device, self.dtype))
        answers.logits = answers.logits[:, model.classes].float()
        sizes = [crop.shape[:2] for crop in crops]
        for found in model.processor.post_process_semantic_segmentation(
            answers, sizes, return_segmentation_scores=True
        ):
            yield found["segmentation_scores"]


def labels_by_name(id2label: Mapping[int, str]) -> tuple[str, list[int]]:
    """Which label set a model's classes are, and which class each of its labels is.

    Upper and lower case, ``-``, ``_`` and spaces make no difference.

    Args:
        id2label: name of each class, in any order.

    Raises:
        ValueError: the names are not those of one set; the message names one that is too many or missing.
    """
    classes = {_plain(name): index for index, name in id2label.items()}
    known = {name: [_plain(label) for label in labels] for name, labels in PARSING_LABELS.items() if labels}
    nearest = min(known, key=lambda name: len(classes.keys() ^ set(known[name])))
    for index, name in id2label.items():
        if _plain(name) not in known[nearest]:
            raise ValueError(f"class {index} of its config.json, {name!r}, is no label of {', '.join(known)}")
    for label, plain in zip(PARSING_LABELS[nearest], known[nearest], strict=True):
        if plain not in classes:
            raise ValueError(f"no class of its config.json is called {label!r}, a label of {nearest}")
    return nearest, [classes[plain] for plain in known[nearest]]


def _plain(name: str) -> str:
    return re.sub("[-_ ]", "", name).casefold()
