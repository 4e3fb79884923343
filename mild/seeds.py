"""Seeds derived from what they are for, never from global state."""

from __future__ import annotations

import hashlib


def derived_seed(*parts: object) -> int:
    """A seed in 0..2^63-1 from the sha256 of the parts' texts: the same on every machine and in every process."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
