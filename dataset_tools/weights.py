"""Weights on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset_tools.errors import UserError
from dataset_tools.networks import Network
from dataset_tools.settings import digest_of


@dataclass(frozen=True)
class Weights:
    """Files of one network."""

    folder: Path
    files: dict[str, Path]
    sha256: str
    network: Network | None
    name: str


def find_weights(name: str, *, files: Sequence[str] = (), sha256: str | None = None, download: bool = True) -> Weights:
    """Local folder or file."""
    place = Path(name)
    if not place.exists():
        raise UserError(f"weights {name} do not exist")
    found = sorted(place.iterdir()) if place.is_dir() else [place]
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in found}
    whole = digest_of(digests) if place.is_dir() else digests[place.name]
    folder = place if place.is_dir() else place.parent
    return Weights(folder, {file.name: file for file in found}, whole, None, name)
