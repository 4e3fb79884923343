"""What a metric is, and what it asks of the pictures that it compares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from dataset_tools.settings import Settings, digest_of

Region = Literal["hole", "picture", "effects", "hole and effects", "outside", "border"]
"""Where a metric looks: at what was to be filled and what those who go really cover; everywhere; at their shadows and
reflections beside that; at both; at what no method may change; or at the line between mask and rest."""


UNKNOWN = "no clean background is known"
UNKNOWN_HOLE = "nothing of the clean background is known in the hole"
"""Why a metric has no value, where several say the same."""


class NotComputed(Exception):
    """A metric has no value here; the message is the reason, for a person to read."""


@dataclass(frozen=True, eq=False)
class Judged:
    """A result, and all that a metric may look at. All of one size."""

    key: str
    image: np.ndarray
    """(H, W, 3) uint8 RGB: the picture before."""
    result: np.ndarray
    """(H, W, 3) uint8 RGB."""
    truth: np.ndarray | None
    """(H, W, 3) uint8 RGB: the clean background; None where none is known. Where it is not ``known`` it is the result
    itself, so that nothing there speaks for or against it; what is averaged over pixels is averaged over known ones."""
    known: np.ndarray
    """(H, W) bool: where the clean background is known."""
    given: np.ndarray
    """(H, W) bool: the mask that the method was given, all that it may change."""
    hole: np.ndarray
    """(H, W) bool: that, and all that those who go really cover; not empty."""
    staying: np.ndarray
    """(H, W) bool: people who stay."""
    effects: np.ndarray | None
    """(H, W) bool: where the picture before shows shadows and reflections of those who go; None where nobody knows."""


class MetricSettings(Settings, ABC):
    """One metric. Subclasses add ``kind``, a literal, and whatever can be set."""

    kind: str
    packages: ClassVar[tuple[str, ...]] = ("numpy",)
    """Those whose versions decide about its values."""
    larger_is_better: ClassVar[bool]
    digits: ClassVar[int]
    """Decimals that mean something."""
    batch_size: int = Field(8, ge=1, le=1024)
    """Pictures that its network sees at once."""

    @property
    def name(self) -> str:
        """Column of tables: the kind, and what of its settings makes it another metric."""
        return self.kind

    @property
    @abstractmethod
    def title(self) -> str:
        """For headings, short, with its unit."""
        ...

    @property
    @abstractmethod
    def region(self) -> Region: ...

    @property
    def network(self) -> str:
        """Network with its checkpoint, preprocessing and size, as tables name it; empty where it needs none."""
        return ""

    @property
    def reference(self) -> str:
        """What results are compared with, as tables name it; ``none`` for metrics without a reference."""
        return "clean background"

    def missing(self) -> str | None:
        """Why it cannot be computed on this machine, and what to pull; None where it can. Loads nothing."""
        return None

    def fingerprint(self) -> str:
        """Digest of everything that decides about its values: settings, weights, versions of packages.

        Raises:
            UserError: weights are not here, or damaged.
        """
        software = {package: version(package) for package in self.packages}
        return digest_of([self.model_dump(mode="json", exclude={"batch_size"}), software])


class PictureMetric(MetricSettings):
    """A metric that gives each result a value of its own."""

    @abstractmethod
    def score(self, judged: Sequence[Judged]) -> list[float | NotComputed]:
        """The value of each result; infinite ones are possible (PSNR of identical pictures). Where it has none, why.

        Args:
            judged: `batch_size` at most, of any sizes; ``truth`` is there unless `reference` is ``none``.
        """
        ...


class DistributionMetric(MetricSettings):
    """A metric that compares all results of a method with a set of reference pictures."""

    reference_pictures: Literal["clean-backgrounds", "person-free"] = "clean-backgrounds"
    """Of the very places that are judged, or `EvaluateSettings.person_free`: any pictures that show nobody."""
    enough_pictures: ClassVar[int] = 0
    """Below so many its value depends on their number."""

    @abstractmethod
    def features_fingerprint(self) -> str:
        """Digest of what decides about `features`, so that metrics on the same features share them."""
        ...

    @abstractmethod
    def features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """(N, D) float32 of pictures (H, W, 3) uint8, `batch_size` at most, of any sizes."""
        ...

    @abstractmethod
    def distance(self, results: Iterable[np.ndarray], reference: Iterable[np.ndarray], seed: int) -> float:
        """Compare two sets, each given as parts (n, D) float32 that are gone through once.

        Args:
            seed: decides what is drawn, if anything.

        Raises:
            NotComputed: a set is too small.
        """
        ...
