"""Fills without any network: what whoever claims to see must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from dataset_tools.settings import digest_of
from mild.evaluation.methods import Case, MethodSettings, Setup, keep_outside


class FillMethod(MethodSettings):
    """``mean-fill``: the mean colour of all that is known; ``smooth-fill``: that which MILD's diffusion starts from.

    The latter is pull-push interpolation, see `mild.erasing.regions.prefilled`.
    """

    kind: Literal["mean-fill", "smooth-fill"] = "mean-fill"
    warms_up: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """See `MethodSettings.title`."""
        return {"mean-fill": "Mean colour", "smooth-fill": "Smooth fill (start of diffusion)"}[self.kind]

    def weights(self, setup: Setup) -> dict[str, str]:
        """There are none."""
        return {}

    def fingerprint(self, setup: Setup) -> str:
        """See `MethodSettings.fingerprint`."""
        return digest_of([1, self.kind])

    def open(self, setup: Setup) -> FillMethod:
        """Itself: nothing has to be loaded."""
        return self

    def erase(self, cases: Sequence[Case], seeds: Sequence[int]) -> list[np.ndarray]:
        """Nothing is random, so ``seeds`` do nothing. See `mild.evaluation.methods.Eraser.erase`."""
        from mild.erasing.regions import prefilled

        if self.kind == "smooth-fill":
            return [keep_outside(prefilled(case.image, case.hole), case) for case in cases]
        means = [np.rint(case.image[~case.hole].mean(0)).astype(np.uint8) for case in cases]
        return [
            keep_outside(np.broadcast_to(mean, case.image.shape), case) for mean, case in zip(means, cases, strict=True)
        ]
