"""The shape of the code: which package may import which."""

from __future__ import annotations

from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]


def test_arrows_point_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """flows -> mild -> dataset_tools; neither of the lower two knows Prefect; dataset_tools needs no torch."""
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0
