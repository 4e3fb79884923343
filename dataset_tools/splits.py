"""Splits by share: which split something comes into follows from its digest alone."""

from __future__ import annotations

from math import isclose
from typing import Annotated

from pydantic import AfterValidator

from dataset_tools.records import SPLITS, Split


def _whole(shares: dict[Split, float]) -> dict[Split, float]:
    if any(share < 0 for share in shares.values()) or not isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise ValueError("shares must be 0 or more and sum to 1")
    return {split: shares.get(split, 0.0) for split in SPLITS}


SplitShares = Annotated[dict[Split, float], AfterValidator(_whole)]
"""Share of each split, 0 where none is named; they sum to 1."""


def split_of(sha256: str, shares: dict[Split, float]) -> Split:
    """The split of what has this digest (64 hex digits), by `SplitShares`."""
    place, upper = int(sha256[8:24], 16) / 16**16, 0.0
    for split in SPLITS:
        upper += shares[split]
        if place < upper:
            return split
    return next(split for split in reversed(SPLITS) if shares[split] > 0)
