"""FID and KID: distances between two sets of pictures in the features of the Inception that publications use."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from mild.metrics.metric import DistributionMetric, NotComputed, Region
from mild.metrics.network_metric import MetricNetwork, NetworkMetric

FEATURES = 2048
"""Dimensions of the features, after the last pooling."""
SUBSETS = 100
SUBSET_SIZE = 1000
"""KID is the mean over that many random subsets of that size, or of all pictures where there are fewer."""


class InceptionNetwork(MetricNetwork):
    """Inception v3 as torch-fidelity brought it from TensorFlow (``FeatureExtractorInceptionV3``)."""

    package = "torchmetrics"
    beside = ("torch-fidelity",)
    files = ("*.pth",)

    def __init__(self, settings: InceptionMetric) -> None:
        super().__init__(settings)
        self.name = "Inception of FID"  # loaded once, whichever metric asks

    def load(self) -> Any:
        """See `dataset_tools.estimators.network.NetworkEstimator.load`."""
        import torch
        from torchmetrics.image.fid import NoTrainInceptionV3

        # The constructor runs whatever its file holds, so it is given one that was written of tensors alone.
        file = io.BytesIO()
        torch.save(self.tensors(), file)
        file.seek(0)
        network = NoTrainInceptionV3("inception-v3-compat", [str(FEATURES)], file, antialias=False)  # type: ignore[arg-type]
        return network.to(self.device)

    def features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """See `DistributionMetric.features`."""
        found = np.empty((len(pictures), FEATURES), np.float32)
        with self.model() as network:
            for same, (batch,) in self.batches(pictures):
                found[same] = network(batch).cpu().numpy()
        return found


class InceptionMetric(NetworkMetric, DistributionMetric):
    """What FID and KID have in common."""

    larger_is_better: ClassVar[bool] = False

    reference_pictures: Literal["clean-backgrounds", "person-free"] = "clean-backgrounds"
    """What results are compared with: the clean backgrounds of the same pictures, whose colours results are given where
    it is not known; or other pictures without anybody, which needs none (FID* of arXiv 2404.11104). References that
    show people misjudge who removes them."""

    @property
    def usual_weights(self) -> str:
        """See `NetworkMetric.usual_weights`."""
        return "inception-fid"

    def open(self) -> InceptionNetwork:
        """See `NetworkMetric.open`."""
        return InceptionNetwork(self)

    @property
    def variant(self) -> str:
        """See `NetworkMetric.variant`."""
        return "person-free" if self.reference_pictures == "person-free" else ""

    @property
    def title(self) -> str:
        """See `MetricSettings.title`."""
        return self.kind.upper() + ("*" if self.reference_pictures == "person-free" else "")

    @property
    def region(self) -> Region:
        """See `MetricSettings.region`."""
        return "picture"

    @property
    def network(self) -> str:
        """See `MetricSettings.network`."""
        return f"Inception v3 ({self.checkpoint}), {FEATURES} features, 299×299 as TensorFlow 1, not antialiased"

    @property
    def reference(self) -> str:
        """See `MetricSettings.reference`."""
        return {"clean-backgrounds": "clean backgrounds", "person-free": "person-free pictures"}[
            self.reference_pictures
        ]

    def features_fingerprint(self) -> str:
        """See `DistributionMetric.features_fingerprint`."""
        return self.open().fingerprint()

    def features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """See `DistributionMetric.features`."""
        return self.open().features(pictures)


class FID(InceptionMetric):
    """Fréchet Inception Distance (Heusel et al. 2017)."""

    kind: Literal["fid"] = "fid"
    digits: ClassVar[int] = 2
    enough_pictures: ClassVar[int] = FEATURES
    """With fewer the covariance is singular, and the bias towards larger values great."""

    def distance(self, results: Iterable[np.ndarray], reference: Iterable[np.ndarray], seed: int) -> float:
        """See `DistributionMetric.distance`. Nothing is drawn; memory does not grow with the number of pictures."""
        return frechet_distance(moments(results), moments(reference))


class KID(InceptionMetric):
    """Kernel Inception Distance (Bińkowski et al. 2018): without bias, whatever the number of pictures."""

    kind: Literal["kid"] = "kid"
    digits: ClassVar[int] = 5

    def distance(self, results: Iterable[np.ndarray], reference: Iterable[np.ndarray], seed: int) -> float:
        """See `DistributionMetric.distance`. Features of both sets are held, of a picture 8 KB."""
        return kernel_distance(results, reference, seed)


def moments(parts: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D), divided by n - 1, in float64, of rows that are gone through once.

    Raises:
        NotComputed: there are fewer than two.
    """
    count, origin, total, products = 0, np.zeros(()), np.zeros(()), np.zeros(())
    for part in parts:
        if count == 0 and len(part):
            origin = part.mean(0, dtype=np.float64)  # near the mean, so that little is lost to rounding below
        rows = part - origin
        count, total, products = count + len(rows), total + rows.sum(0), products + rows.T @ rows
    if count < 2:
        raise _too_few(count)
    offset = total / count
    return origin + offset, (products - count * np.outer(offset, offset)) / (count - 1)


def frechet_distance(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` of means and covariances (Heusel et al. 2017, eq. 6).

    With ``C = R R^T`` the trace of the root is the sum of the singular values of ``R_a^T R_b``: no root is taken of
    eigenvalues that are nothing but rounding, of which singular covariances have many.
    """
    (mean_a, covariance_a), (mean_b, covariance_b) = a, b
    overlap = np.linalg.svd(_root(covariance_a).T @ _root(covariance_b), compute_uv=False).sum()
    spread = np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap
    return max(float(np.square(mean_a - mean_b).sum() + spread), 0.0)


def _root(covariance: np.ndarray) -> np.ndarray:
    """R (D, rank) with ``R R^T`` the covariance."""
    values, vectors = np.linalg.eigh(covariance)
    real = values > max(values[-1], 0) * len(values) * np.finfo(float).eps
    return vectors[:, real] * np.sqrt(values[real])


def kernel_distance(results: Iterable[np.ndarray], reference: Iterable[np.ndarray], seed: int) -> float:
    """Mean over random subsets of the unbiased squared MMD with the kernel ``(x y / D + 1)^3``; it can be negative.

    Raises:
        NotComputed: a set has fewer than two.
    """
    import torch
    from torchmetrics.image.kid import poly_mmd

    sets = [_together(results), _together(reference)]
    size = min(*map(len, sets), SUBSET_SIZE)
    # There is but one subset of all.
    subsets = 1 if all(len(features) == size for features in sets) else SUBSETS
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        a, b = (features[generator.permutation(len(features))[:size]].astype(np.float64) for features in sets)
        values.append(float(poly_mmd(torch.from_numpy(a), torch.from_numpy(b))))
    return float(np.mean(values))


def _together(parts: Iterable[np.ndarray]) -> np.ndarray:
    held = list(parts)
    count = sum(map(len, held))
    if count < 2:
        raise _too_few(count)
    return np.concatenate(held)


def _too_few(count: int) -> NotComputed:
    return NotComputed(f"two pictures a set are the fewest, and one set has {count}")
