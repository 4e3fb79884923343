"""Whether a result means what the clean background means: cosine similarity of embeddings by DINO and by CLIP."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from dataset_tools.estimators.network import load_pretrained
from mild.metrics.metric import Judged, NotComputed, PictureMetric, Region
from mild.metrics.network_metric import MetricNetwork, NetworkMetric

if TYPE_CHECKING:
    import torch


class EmbeddingNetwork(MetricNetwork):
    """A network of transformers that makes one vector of a picture, behind its own processor."""

    package = "transformers"
    beside = ("torchvision",)
    files = ("config.json", "model.safetensors", "preprocessor_config.json")

    @abstractmethod
    def vectors(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """(B, D) of what the processor made of pictures."""
        ...

    def embeddings(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """(N, D) float64, on the CPU, of pictures (H, W, 3) uint8 of any sizes."""
        with self.model() as (model, processor):
            inputs = processor(list(pictures), input_data_format="channels_last", return_tensors="pt")
            return self.vectors(model, inputs["pixel_values"].to(self.device)).cpu().double()


class DINONetwork(EmbeddingNetwork):
    """A ViT (``ViTModel``) trained by DINO: the class token, after the last norm."""

    def load(self) -> Any:
        """See `dataset_tools.estimators.network.NetworkEstimator.load`."""
        from transformers import ViTImageProcessor, ViTModel

        # DINO trained no pooling layer, and its checkpoints have none.
        model = load_pretrained(self, ViTModel, add_pooling_layer=False)
        return model, ViTImageProcessor.from_pretrained(self.weights.folder, local_files_only=True)

    def vectors(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """See `EmbeddingNetwork.vectors`."""
        found: torch.Tensor = model(pixels).last_hidden_state[:, 0]
        return found


class CLIPNetwork(EmbeddingNetwork):
    """A CLIP (``CLIPModel``): the embedding of a picture in the space that it shares with text."""

    def load(self) -> Any:
        """See `dataset_tools.estimators.network.NetworkEstimator.load`."""
        from transformers import CLIPImageProcessor, CLIPModel

        model = load_pretrained(self, CLIPModel)
        return model, CLIPImageProcessor.from_pretrained(self.weights.folder, local_files_only=True)

    def vectors(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """See `EmbeddingNetwork.vectors`."""
        found: torch.Tensor = model.get_image_features(pixels).pooler_output
        return found


class SimilarityMetric(NetworkMetric, PictureMetric):
    """Cosine similarity, -1..1, of result and clean background, whole pictures as the network's processor has them.

    What is not known of the clean background counts as equal.
    """

    digits: ClassVar[int] = 4
    larger_is_better: ClassVar[bool] = True

    usual_preprocessing: ClassVar[str]
    """What the processor of `usual_weights` does to a picture's size."""

    @property
    def title(self) -> str:
        """See `MetricSettings.title`."""
        return f"{self.kind.upper()} similarity"

    @property
    def region(self) -> Region:
        """See `MetricSettings.region`."""
        return "picture"

    @property
    def network(self) -> str:
        """See `MetricSettings.network`."""
        usual = self.weights == self.usual_weights
        return f"{self.checkpoint}, {self.usual_preprocessing if usual else 'preprocessed as its folder says'}"

    @abstractmethod
    def open(self) -> EmbeddingNetwork:
        """See `NetworkMetric.open`."""
        ...

    def score(self, judged: Sequence[Judged]) -> list[float | NotComputed]:
        """See `PictureMetric.score`."""
        import torch

        network, truths = self.open(), []
        for one in judged:
            assert one.truth is not None
            truths.append(one.truth)
        results = network.embeddings([one.result for one in judged])
        similarities: list[float] = torch.cosine_similarity(results, network.embeddings(truths)).tolist()
        return [*similarities]


class DINO(SimilarityMetric):
    """By DINO v1 (Caron et al. 2021), which knows shapes and places."""

    kind: Literal["dino"] = "dino"
    usual_preprocessing = "squeezed to 224×224, bilinear"

    @property
    def usual_weights(self) -> str:
        """See `NetworkMetric.usual_weights`."""
        return "dino-vits16"

    def open(self) -> DINONetwork:
        """See `NetworkMetric.open`."""
        return DINONetwork(self)


class CLIP(SimilarityMetric):
    """By CLIP (Radford et al. 2021), which knows what things are called."""

    kind: Literal["clip"] = "clip"
    usual_preprocessing = "shorter side to 224, bicubic, centre crop 224×224"

    @property
    def usual_weights(self) -> str:
        """See `NetworkMetric.usual_weights`."""
        return "clip-vit-base-patch32"

    def open(self) -> CLIPNetwork:
        """See `NetworkMetric.open`."""
        return CLIPNetwork(self)
