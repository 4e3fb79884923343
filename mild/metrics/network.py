"""What metrics on features of a network have in common: its weights, in single precision, and what tables say of it."""

from __future__ import annotations

from abc import abstractmethod
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from dataset_tools.errors import UserError
from dataset_tools.estimators.network import NetworkEstimator, NetworkSettings
from dataset_tools.networks import NETWORKS
from dataset_tools.settings import digest_of
from dataset_tools.weights import at_hand, missing_message
from mild.metrics.metric import PictureMetric

if TYPE_CHECKING:
    import torch


class FeatureNetwork(NetworkEstimator):
    """A network of transformers whose features are compared."""

    package = "transformers"
    files = ("config.json", "*.safetensors", "*.safetensors.index.json")

    @property
    def dtype(self) -> torch.dtype:
        """Single precision everywhere: values must not hang on the machine that computes them."""
        import torch

        return torch.float32


class FeatureMetric(PictureMetric):
    """A metric without a reference on features of a network."""

    weights: str
    """Name of `dataset_tools.networks`, hub id or folder."""
    sha256: str | None = Field(None, pattern="[0-9a-f]{64}")
    """Digest (hex) that weights of one's own must have."""

    @property
    def larger_is_better(self) -> bool:
        """See `MetricSettings.larger_is_better`."""
        return True

    @property
    def digits(self) -> int:
        """See `MetricSettings.digits`."""
        return 4

    @property
    def reference(self) -> str:
        """See `MetricSettings.reference`."""
        return "none"

    @abstractmethod
    def estimator(self) -> FeatureNetwork:
        """The network; nothing is loaded yet."""
        ...

    def network_settings(self) -> NetworkSettings:
        """Of `estimator`. Its batch size, which is part of its fingerprint, is no matter here."""
        return NetworkSettings(kind=self.kind, weights=self.weights, sha256=self.sha256)

    def missing(self) -> str | None:
        """See `MetricSettings.missing`."""
        return missing_weights(self.estimator())

    def fingerprint(self) -> str:
        """See `MetricSettings.fingerprint`."""
        software = [version(package) for package in ("numpy", "pillow", "opencv-python-headless")]
        return digest_of([self.estimator().fingerprint(), software])


def missing_weights(estimator: NetworkEstimator) -> str | None:
    """Why a network's weights cannot be had on this machine, and what to pull; None where they can."""
    row = NETWORKS.get(estimator.settings.weights)
    if row is not None:
        return None if at_hand(row) else missing_message([row.name])
    try:
        _ = estimator.weights
    except UserError as error:
        return str(error)
    return None


def checkpoint_of(weights: str) -> str:
    """What tables call a network by: its hub id or name, and of a folder or file the name alone."""
    row = NETWORKS.get(weights)
    if row is not None:
        return row.hub or row.name
    return Path(weights).name if Path(weights).exists() else weights
