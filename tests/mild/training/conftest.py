"""What the tests of training share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest


@pytest.fixture(autouse=True)
def _losses_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a chart takes as long as all steps of a quick run: here it is the numbers that would be drawn."""

    def chart(losses: Sequence[Mapping[str, float]], names: Sequence[str]) -> str:
        return "".join(f"{name} {row[name]!r}\n" for row in losses for name in names)

    monkeypatch.setattr("mild.training.loop.loss_chart", chart)
