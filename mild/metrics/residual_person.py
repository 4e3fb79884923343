"""Whether somebody is still, or again, to be seen in the hole, by a network that finds people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from dataset_tools.errors import UserError
from dataset_tools.estimators.choose import choose
from dataset_tools.estimators.found_people import InstancesSettings, PeopleFinder
from dataset_tools.networks import SUGGESTED
from dataset_tools.settings import digest_of
from mild.metrics.metric import Judged, NotComputed, PictureMetric, Region
from mild.metrics.network_metric import checkpoint_of

SEEN_BEFORE = 0.5
"""Share of somebody, as they were seen before, that must be part of somebody found now for both to be the same."""
_INSTANCES: str = SUGGESTED["instances"]
_SHARE = 0.5


class ResidualPerson(PictureMetric):
    """1 where the network finds somebody in the hole who does not stay, else 0; its mean is a rate.

    Found is whom the network gives its usual least score. People who stay do not count: neither the pixels of those who
    are marked as staying, nor anybody whom the network sees in the picture before, mostly outside the hole. So a method
    may complete whom the hole hid in part.
    """

    kind: Literal["residual_person"] = "residual_person"
    digits: ClassVar[int] = 3
    larger_is_better: ClassVar[bool] = False
    instances: str = _INSTANCES
    """Network that finds people: name of `dataset_tools.networks`, hub id, folder or file. ``drawn-people`` is for
    drawn scenes alone."""
    min_share: float = Field(_SHARE, gt=0, le=1)
    """Share of somebody's mask that must lie in the hole."""

    @property
    def name(self) -> str:
        """See `MetricSettings.name`."""
        network = re.sub(r"[^a-z0-9.-]+", "-", Path(self.instances).name.lower()).strip("-")
        parts = [network] if self.instances != _INSTANCES else []
        parts += [f"{self.min_share:g}"] if self.min_share != _SHARE else []
        return "-".join([self.kind, *parts])

    @property
    def title(self) -> str:
        """See `MetricSettings.title`."""
        return "Residual person, rate"

    @property
    def region(self) -> Region:
        """See `MetricSettings.region`."""
        return "hole"

    @property
    def network(self) -> str:
        """See `MetricSettings.network`."""
        score = InstancesSettings.model_fields["min_score"].default
        return f"{checkpoint_of(self.instances)}, score from {score}, {self.min_share:.0%} of the mask in the hole"

    @property
    def reference(self) -> str:
        """See `MetricSettings.reference`."""
        return "none"

    def missing(self) -> str | None:
        """See `MetricSettings.missing`."""
        try:
            _ = self.estimator().weights
        except UserError as error:
            return str(error)
        return None

    def fingerprint(self) -> str:
        """See `MetricSettings.fingerprint`."""
        return digest_of([SEEN_BEFORE, self.min_share, self.estimator().fingerprint()])

    def estimator(self) -> PeopleFinder:
        """The network; nothing is loaded yet.

        Raises:
            UserError: there is none of that name, or it finds something else.
        """
        return choose("instances", self.instances).open()

    def score(self, judged: Sequence[Judged]) -> list[float | NotComputed]:
        """See `PictureMetric.score`."""
        estimator = self.estimator()
        estimator.batch_size = self.batch_size
        suspects = [
            [mask for mask in people.masks if _share(mask, one.hole & ~one.staying) >= self.min_share]
            for one, people in zip(judged, estimator.find([one.result for one in judged]), strict=True)
        ]
        asked = [index for index, masks in enumerate(suspects) if masks]
        before = estimator.find([judged[index].image for index in asked])
        for index, people in zip(asked, before, strict=True):
            staying = [mask for mask in people.masks if _share(mask, judged[index].hole) < self.min_share]
            suspects[index] = [
                mask for mask in suspects[index] if all(_share(other, mask) < SEEN_BEFORE for other in staying)
            ]
        return [float(bool(masks)) for masks in suspects]


def _share(mask: np.ndarray, where: np.ndarray) -> float:
    """Of a mask (H, W) bool, not empty, what lies in another."""
    return float(np.count_nonzero(mask & where) / np.count_nonzero(mask))
