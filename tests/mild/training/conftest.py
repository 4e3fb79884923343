"""What the tests of training share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from dataset_tools.schema import Sample
from mild.model.backbone import Branch
from mild.training.latents import Latents
from mild.training.loop import BranchLoss, Examples, training_data


@pytest.fixture(autouse=True)
def _losses_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a chart takes as long as all steps of a quick run: here it is the numbers that would be drawn."""

    def chart(losses: Sequence[Mapping[str, float]], names: Sequence[str]) -> str:
        return "".join(f"{name} {row[name]!r}\n" for row in losses for name in names)

    monkeypatch.setattr("mild.training.loop.loss_chart", chart)


@pytest.fixture
def examples_of(in_memory: Callable[..., Any]) -> Callable[..., list[Examples]]:
    """Examples of branches, as a run has them of samples in a step."""

    def made(
        loss: BranchLoss,
        branches: Sequence[Branch],
        samples: list[Sample],
        step: int = 0,
        latents: Latents | None = None,
    ) -> list[Examples]:
        data = training_data(loss.pipeline, loss.layered, loss.settings, in_memory(samples), latents)
        return loss.examples(branches, data.drawn(step, branches, samples), step)

    return made
