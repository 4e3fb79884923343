from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mild.evaluation.cases import CaseRow, write_mask, write_picture
from mild.evaluation.leakage import spectrum_of

SIDE, LEVELS = 128, 20.0


@pytest.mark.parametrize("known_rows", [128, 64, 40], ids=["all", "half", "an eighth"])
def test_the_residual_is_that_of_what_is_known(tmp_path: Path, known_rows: int) -> None:
    """White noise of 20 levels in the hole has that amplitude in all rings, however much of the truth is known."""
    spectrum = spectrum_of("mild", *_case(tmp_path, known_rows))
    assert spectrum.pictures == 1
    assert np.expm1(spectrum.amplitude).mean() == pytest.approx(LEVELS, rel=0.1)


def test_a_hole_of_which_nothing_is_known_is_left_out(tmp_path: Path) -> None:
    assert spectrum_of("mild", *_case(tmp_path, 32)).pictures == 0


def _case(folder: Path, known_rows: int) -> tuple[Path, Path, list[CaseRow]]:
    """One case: a hole in rows and columns 32 to 96, of whose truth the first rows of the picture are known."""
    hole = np.zeros((SIDE, SIDE), bool)
    hole[32:96, 32:96] = True
    noise = np.random.default_rng(0).normal(0, LEVELS, (SIDE, SIDE, 1))
    truth = np.full((SIDE, SIDE, 3), 128, np.uint8)
    result = np.where(hole[..., None], np.rint(128 + noise).clip(0, 255), truth).astype(np.uint8)
    own = folder / "cases" / "k"
    (own / "exact").mkdir(parents=True)
    (folder / "results" / "k").mkdir(parents=True)
    write_picture(own / "before.png", truth)
    write_picture(own / "truth.png", truth)
    write_mask(own / "known.png", (np.arange(SIDE)[:, None] < known_rows) | ~hole)
    for name, mask in (("mask", hole), ("hole", hole), ("staying", np.zeros_like(hole))):
        write_mask(own / "exact" / f"{name}.png", mask)
    write_picture(folder / "results" / "k" / "exact.png", result)
    row = CaseRow("k", "exact", SIDE, SIDE, 1, False, float(hole.mean()), True, False, "")
    return folder / "cases", folder / "results", [row]
