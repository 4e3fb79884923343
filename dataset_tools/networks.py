"""The table of networks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """One row."""

    name: str
    hub: str
