"""What the tests of metrics share: results to judge."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mild.metrics.metric import Judged


@pytest.fixture
def make_judged() -> Callable[..., Judged]:
    """Makes a result (H, W, 3) uint8 to judge; picture before and mask given are result and hole, if not told,
    all of the truth is known, and nothing of effects."""

    def make(
        result: np.ndarray,
        hole: np.ndarray,
        *,
        image: np.ndarray | None = None,
        truth: np.ndarray | None = None,
        given: np.ndarray | None = None,
        staying: np.ndarray | None = None,
        known: np.ndarray | None = None,
        effects: np.ndarray | None = None,
    ) -> Judged:
        return Judged(
            key="",
            image=result if image is None else image,
            result=result,
            truth=truth,
            given=hole if given is None else given,
            hole=hole,
            staying=np.zeros_like(hole) if staying is None else staying,
            known=np.ones_like(hole) if known is None else known,
            effects=effects,
        )

    return make
