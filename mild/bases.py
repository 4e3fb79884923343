"""Where bases and adapters lie: folders, ids of the Hugging Face hub, and what comes with the package."""

from __future__ import annotations

import os
from pathlib import Path

from dataset_tools.errors import UserError
from dataset_tools.file_names import files_below
from dataset_tools.settings import digest_of
from dataset_tools.storage import normal_place
from dataset_tools.weights import HUB_ID, file_digest

NANO = "mild-nano"
"""What the trained nano base is called, on every machine."""
NANO_ADAPTERS = "mild-nano-adapters"
"""What its trained adapters are called."""
_BUNDLED = {name: Path(__file__).parent / "nano" / "bundled" / name for name in (NANO, NANO_ADAPTERS)}
SUGGESTED_BASE = "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"


def place_of(name: str) -> str:
    """The folder of what comes with the package by that name; a hub id as it is; of all else `normal_place`.

    A folder that is here goes before a hub id of the same name. Raises `UserError` as `normal_place`.
    """
    if name in _BUNDLED:
        return str(_BUNDLED[name])
    return name if HUB_ID.fullmatch(name) and not Path(name).is_dir() else normal_place(name)


def normal_name(name: str) -> str:
    """What a base or MILD directory is called, wherever one stands: `place_of` of all that has no name of its own."""
    return name if name in _BUNDLED else place_of(name)


def check_apart(output: str, begun: str | None) -> None:
    """Raise `UserError` where a base or MILD directory, ``begun``, would be changed by what is trained from it: where
    one of it and the output, or the output's ``.work``, lies in the other."""
    if begun is None or not os.path.isdir(place_of(begun)):
        return
    start = Path(os.path.realpath(place_of(begun)))
    for place in (output, f"{output}.work"):
        written = Path(os.path.realpath(place))
        if written.is_relative_to(start) or start.is_relative_to(written):
            raise UserError(f"{start} would be changed by what is trained from it to {place}: name another output")


def digest_of_place(name: str) -> str:
    """sha256 (hex) over the names and contents of a base's or MILD directory's files, but hidden ones; a hub id as it
    is."""
    folder = Path(place_of(name))
    if not folder.is_dir():
        return name
    return digest_of({name: file_digest(folder / name) for name in files_below(folder)})
