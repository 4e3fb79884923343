"""Which network is meant: by the name that a user gives, or by what is at hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

from dataset_tools.errors import UserError
from dataset_tools.estimators.maskrcnn import MaskRCNNSettings
from dataset_tools.estimators.openpose import OpenPoseSettings
from dataset_tools.estimators.schp import SCHPSettings
from dataset_tools.estimators.segformer import SegformerSettings
from dataset_tools.estimators.segmentation import SegmentationSettings
from dataset_tools.estimators.vitpose import ViTPoseSettings
from dataset_tools.networks import NETWORKS, SUGGESTED, Network
from dataset_tools.storage import local_place
from dataset_tools.weights import at_hand, find_weights, missing_message

Cue = Literal["instances", "pose", "parsing"]

_SETTINGS: dict[str, type[Any]] = {
    "maskrcnn": MaskRCNNSettings,
    "transformers": SegmentationSettings,
    "openpose": OpenPoseSettings,
    "vitpose": ViTPoseSettings,
    "schp": SCHPSettings,
    "segformer": SegformerSettings,
}
"""By kind."""
_KIND_OF_FILES: dict[Cue, str] = {"instances": "maskrcnn", "pose": "openpose", "parsing": "schp"}
"""Of files of weights, and of folders that hold nothing else."""
_MODEL_TYPES: dict[Cue, str] = {"pose": "vitpose", "parsing": "segformer"}
"""``model_type`` in the transformers library, which is the kind as well. Of segmentation models there are many."""


@overload
def choose(cue: Literal["instances"], name: str | None) -> MaskRCNNSettings | SegmentationSettings: ...
@overload
def choose(cue: Literal["pose"], name: str | None) -> OpenPoseSettings | ViTPoseSettings: ...
@overload
def choose(cue: Literal["parsing"], name: str | None) -> SCHPSettings | SegformerSettings: ...
def choose(cue: Cue, name: str | None) -> Any:
    """Settings of the network that is to find a cue.

    Args:
        cue: what it is to find.
        name: of the table (`dataset_tools.networks`), hub id, folder or file; None for the network of the table whose
            weights are on this machine, the suggested one first. Networks of the table are never fetched, and what
            comes with this package, which knows drawn pictures only, is taken by its name alone.

    Raises:
        UserError: there is no such network, it finds something else or, with what to pull, its weights are not here.
    """
    if name is None:
        name = _at_hand(cue)
        if name is None:
            raise UserError(missing_message([SUGGESTED[cue]]))
    row = NETWORKS.get(name) or _of_hub(cue, name)
    if row is not None and row.purpose != cue:
        known = ", ".join(other.name for other in _rows(cue))
        raise UserError(f"{name} is a network for {row.purpose}; for {cue} there are {known}")
    if row is not None:
        return _SETTINGS[row.kind](weights=row.name)
    model_type = _model_type(name)
    if model_type is None:
        return _SETTINGS[_KIND_OF_FILES[cue]](weights=name)
    wanted = _MODEL_TYPES.get(cue, model_type)
    if model_type != wanted:
        raise UserError(f"{name} is a {model_type}; for {cue}, a model of the transformers library is a {wanted}")
    return _SETTINGS[_MODEL_TYPES.get(cue, "transformers")](weights=name)


def not_at_hand(cues: Sequence[Cue]) -> list[str]:
    """The suggested networks of those cues for which none of the table is on this machine."""
    return [SUGGESTED[cue] for cue in cues if _at_hand(cue) is None]


def _rows(cue: Cue) -> list[Network]:
    return [row for row in NETWORKS.values() if row.purpose == cue]


def _at_hand(cue: Cue) -> str | None:
    rows = sorted(_rows(cue), key=lambda row: row.name != SUGGESTED[cue])
    return next((row.name for row in rows if (row.hub or row.url) and at_hand(row)), None)


def _of_hub(cue: Cue, name: str) -> Network | None:
    """The network of the table that a hub id, and no other one, is of."""
    rows = [row for row in _rows(cue) if row.hub == name and not Path(name).exists()]
    return rows[0] if len(rows) == 1 else None


def _model_type(name: str) -> str | None:
    """What ``config.json`` of a folder or hub id says; None where there is none, as for files."""
    place = Path(local_place(name, "weights"))
    if place.is_file():
        return None
    config = (place if place.is_dir() else find_weights(name).folder) / "config.json"
    try:
        return str(json.loads(config.read_text(encoding="utf-8"))["model_type"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config} is no configuration of the transformers library: {error!r}") from None
