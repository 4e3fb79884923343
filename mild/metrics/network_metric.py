"""What metrics have in common that run a network: which weights, and that it works in single precision."""

from __future__ import annotations

import contextlib
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dataset_tools.errors import UserError
from dataset_tools.estimators.network import NetworkEstimator, NetworkSettings, alike
from dataset_tools.networks import NETWORKS
from dataset_tools.settings import digest_of
from mild.metrics.metric import MetricSettings

if TYPE_CHECKING:
    import torch


class MetricNetwork(NetworkEstimator):
    """A network of a metric: weights found and loaded as those of networks that see people, but never rounded.

    Published values are computed in single precision.
    """

    beside: ClassVar[tuple[str, ...]] = ()
    """Packages, beside torch and `package`, that decide about its answers."""

    @property
    def dtype(self) -> torch.dtype:
        """Single precision, on a GPU as well."""
        import torch

        return torch.float32

    def fingerprint(self) -> str:
        """Digest of what decides about its answers, whatever is made of them: weights and versions of packages.

        Raises:
            UserError: the weights are not here, or damaged.
        """
        software = {name: version(name) for name in sorted({"torch", self.package, *self.beside})}
        return digest_of([type(self).__name__, self.version, self.weights.sha256, software])

    @contextlib.contextmanager
    def model(self) -> Iterator[Any]:
        """See `NetworkEstimator.model`. Convolutions keep all bits meanwhile, which a GPU drops of its own accord."""
        import torch

        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with super().model() as loaded, exact:
            yield loaded

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the only file of the weights, a checked pickle, holds. Raises `UserError` where there are several."""
        import torch

        files = list(self.weights.files.values())
        if len(files) != 1:
            raise UserError(f"{self.settings.weights} holds {len(files)} files of weights: name one of them")
        loaded: dict[str, torch.Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
        return loaded

    def batches(self, *pictures: Sequence[np.ndarray]) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
        """Pictures of equal size together, on `device`.

        Args:
            pictures: sequences of the same length, whose n-th pictures (H, W, 3) uint8 are of one size.

        Yields:
            Indices, and for each sequence its pictures there, (B, 3, H, W) uint8.
        """
        import torch

        for same in alike([picture.shape for picture in pictures[0]]):
            stacked = [torch.from_numpy(np.stack([sequence[index] for index in same])) for sequence in pictures]
            yield same, [batch.to(self.device).permute(0, 3, 1, 2) for batch in stacked]


class NetworkMetric(MetricSettings, NetworkSettings):
    """A metric that runs a network."""

    weights: str = ""
    """Name of `dataset_tools.networks`, hub id, folder or file; empty: the network that publications use."""

    def model_post_init(self, _: object) -> None:
        """The weights are the usual ones unless there are others."""
        if not self.weights:
            object.__setattr__(self, "weights", self.usual_weights)

    @property
    @abstractmethod
    def usual_weights(self) -> str:
        """Name of `dataset_tools.networks` of what publications use."""
        ...

    @abstractmethod
    def open(self) -> MetricNetwork:
        """The network; nothing is loaded."""
        ...

    @property
    def variant(self) -> str:
        """What of its settings, beside the weights, makes it another metric; a part of a name, or empty."""
        return ""

    @property
    def name(self) -> str:
        """See `MetricSettings.name`. It is a part of file names as well."""
        own = "" if self.weights == self.usual_weights else re.sub("[^a-z0-9]+", "-", self.checkpoint.lower())
        return "-".join(part for part in (self.kind, self.variant, own.strip("-")) if part)

    @property
    def checkpoint(self) -> str:
        """The weights as tables name them."""
        return checkpoint_of(self.weights)

    def missing(self) -> str | None:
        """See `MetricSettings.missing`."""
        try:
            _ = self.open().weights
        except UserError as error:
            return str(error)
        return None

    def fingerprint(self) -> str:
        """See `MetricSettings.fingerprint`."""
        settings = self.model_dump(mode="json", exclude={"batch_size", "weights", "sha256"})
        return digest_of([settings, self.open().fingerprint()])


def checkpoint_of(weights: str) -> str:
    """Weights as tables name them: hub id or name of the file; a folder or file of one's own by its name."""
    row, own = NETWORKS.get(weights), Path(weights)
    if row is not None:
        return row.hub or row.files[0].path
    return own.name if own.exists() else weights
