"""What ``mild.json`` of a saved MILD directory says (see `mild.model.layered`), in a module that imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from dataset_tools.errors import UserError, one_line
from dataset_tools.networks import NETWORKS
from dataset_tools.settings import Settings
from dataset_tools.weights import HUB_ID
from mild.bases import place_of
from mild.settings import MildSettings, TrainSettings

FORMAT = 3
"""Version of the directory's layout."""
CONFIG = "mild.json"
OWN = (
    r"mild\.json|README\.md|fg|(pytorch_lora_weights|sma|hmg|offsets|extents|prefix)\.safetensors"
    r"|samples\.png|loss\.(csv|svg)"
)
"""What is in the directory; the last three by training."""


class SavedConfig(Settings):
    """What ``mild.json`` says about the parts beside it; it holds more, which loading does not need."""

    model_config = ConfigDict(extra="ignore")

    base: str
    """Hub id or folder of the base that the parts were trained on."""
    base_weights: dict[str, float] = Field(default={})
    """A few weights of that base's UNet by name (`mild.model.backbone.sample_of_weights`)."""
    resolution: int = Field(ge=1)
    """Pixels of the training crops' side."""
    inference_resolution: int = Field(ge=1)
    """Pixels of the side of the square that the background is meant to be painted at, at most."""
    inference_steps: int = Field(ge=1)
    """DDIM steps in which the parts are meant to erase."""
    prompt: str = ""
    """Text that both branches were trained on, and are meant to erase with."""
    mild: MildSettings
    """Which parts there are, and their sizes."""
    settings: dict[str, Any] = Field(default={})
    """Of the training; empty where they were not trained, but made."""

    @property
    def seed(self) -> int | None:
        """Of the training; None where there was none."""
        return self.settings.get("seed")


def is_mild(folder_or_hub_id: str) -> bool:
    """Whether it is a MILD directory rather than a base; of a hub id, only its ``mild.json`` is fetched."""
    place = place_of(folder_or_hub_id)
    if Path(place).is_dir() or HUB_ID.fullmatch(place) is None:
        return Path(place, CONFIG).is_file()
    if any(network.hub == place for network in NETWORKS.values()):
        return False
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(place, CONFIG)
    except Exception:  # The hub's errors have no common base class; whoever loads from there says what is wrong.
        return False
    return True


def fetched(folder_or_hub_id: str | Path) -> Path:
    """A local folder of a MILD directory: itself, or fetched from the hub into its cache.

    Raises:
        UserError: there is no such folder or hub id, or the hub cannot be reached.
    """
    name = str(folder_or_hub_id)
    folder = Path(place_of(name))
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file; name the MILD directory that it lies in")
    if HUB_ID.fullmatch(name) is None:
        raise UserError(f"MILD directory {name} does not exist; give a folder that training wrote, or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, "*.safetensors", "fg/*.safetensors"]))
    except Exception as error:  # The hub's errors have no common base class.
        raise UserError(
            f"{name} is no folder here and cannot be fetched from the hub: {one_line(error)}; check the name and the "
            "network, or download it and give the folder"
        ) from error


def read_config(folder: Path) -> SavedConfig:
    """What the ``mild.json`` of a directory says about it.

    Raises:
        UserError: it is missing or broken, or of another format.
    """
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no MILD directory: {CONFIG} is missing; name the folder that training wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}; copy or download the directory again") from None
    version = values.get("format") if isinstance(values, dict) else None
    if version != FORMAT:
        raise UserError(
            f"{path} is of format {version!r}, and this version of mild reads format {FORMAT}: train again, or use the "
            "version of mild that wrote it"
        )
    return SavedConfig.check(values, origin=str(path))


def erasing_as_before(settings: TrainSettings) -> TrainSettings:
    """The settings; how to erase, where they do not say it, as the directory of ``start_from`` does.

    Raises:
        UserError: as `fetched` and `read_config`.
    """
    if settings.start_from is None:
        return settings
    begun = read_config(fetched(settings.start_from))
    names = {"inference_steps", "inference_resolution", "prompt"} - settings.model_fields_set
    return settings.model_copy(update={name: getattr(begun, name) for name in names})
