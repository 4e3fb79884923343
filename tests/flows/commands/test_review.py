from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Command = Callable[..., tuple[int, str, str]]


def test_where_nothing_was_proposed_it_says_what_to_name(mild_anew: Command, tmp_path: Path) -> None:
    code, _, err = mild_anew("review", tmp_path / "out")
    assert code == 2 and f"{tmp_path}/out.work holds no review.json" in err and "--output of mild select" in err
    assert not list(tmp_path.iterdir())
