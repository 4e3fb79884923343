"""What tests of commands on photographs share: the command line in this process, and stand-ins for networks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from dataset_tools.errors import Rejected, UserError
from dataset_tools.estimators import FoundPeople, PeopleInPicture
from dataset_tools.networks import SUGGESTED
from dataset_tools.schema import MadeBy
from flows import cli
from flows.commands import erase_photos, mask_photos

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mild_anew(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command as the shell starts it; gives exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mild", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(autouse=True)
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no network are weights at hand, whatever this machine has."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("MILD_WEIGHTS", raising=False)


class StandIn:
    """What the commands ask of every network."""

    batch_size, places = 8, ()

    def __init__(self, name: str) -> None:
        self.name = name
        self.made_by = MadeBy(name, f"drawn/{name}", "by hand", "0" * 64)
        self.broken = ""
        self.seen: list[np.ndarray] = []

    def fingerprint(self) -> str:
        return self.name

    def check(self) -> None:
        if self.broken:
            raise UserError(self.broken)


class Spots(StandIn):
    """Takes bright spots for people, and their brightness for the score."""

    def find(self, images: Sequence[np.ndarray]) -> list[FoundPeople]:
        self.seen += images
        return [self._people(image) for image in images]

    def _people(self, image: np.ndarray) -> FoundPeople:
        count, labels = cv2.connectedComponents((image.min(axis=2) > 128).view(np.uint8))
        masks = [labels == label for label in range(1, count)]
        masks.sort(key=lambda mask: np.nonzero(mask)[1].mean())
        return FoundPeople(masks, [float(image[mask].mean() / 255) for mask in masks])


class Centres(StandIn):
    """Finds every joint in the middle of its person, and none in pictures that begin with black."""

    def estimate_pose(self, pictures: Sequence[PeopleInPicture]) -> list[np.ndarray | Rejected]:
        self.seen += [picture.image for picture in pictures]
        return [self._joints(picture) for picture in pictures]

    def _joints(self, picture: PeopleInPicture) -> np.ndarray | Rejected:
        if not picture.image[0, 0].any():
            return Rejected("no-pose", "it is too dark")
        middles = [np.argwhere(mask).mean(axis=0)[::-1] for mask in picture.masks]
        joints = np.array([np.tile([*middle, 0.5], (18, 1)) for middle in middles], np.float32)
        joints[:, 1] = 0  # nobody has a neck
        return joints


class Torsos(StandIn):
    """Labels everybody as a torso, and nobody's surroundings."""

    label_set = "pascal"

    def estimate_parsing(self, pictures: Sequence[PeopleInPicture]) -> list[np.ndarray | Rejected]:
        self.seen += [picture.image for picture in pictures]
        return [np.logical_or.reduce(picture.masks) * np.uint8(2) for picture in pictures]


@dataclass
class Networks:
    """The networks that are at hand; None for those that are not."""

    instances: Spots | None = field(default_factory=lambda: Spots("spots"))
    pose: Centres | None = None
    parsing: Torsos | None = None
    asked: dict[str, str | None] = field(default_factory=dict)
    """The names by which they were asked for."""

    def add_cues(self) -> None:
        """Those that look at people whose masks are known are at hand as well."""
        self.pose, self.parsing = Centres("centres"), Torsos("torsos")

    def not_at_hand(self, cues: Sequence[str]) -> list[str]:
        return [SUGGESTED[cue] for cue in cues if getattr(self, cue) is None]

    def choose(self, cue: str, name: str | None) -> Any:
        self.asked[cue] = name
        network = getattr(self, cue)
        if network is None:
            raise UserError(f"weights are missing: mild weights pull {cue}")
        return SimpleNamespace(open=lambda: network)


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> Networks:
    """Stand-ins instead of all networks."""
    networks = Networks()
    for module in (erase_photos, mask_photos):
        monkeypatch.setattr(module, "choose", networks.choose)
    monkeypatch.setattr(erase_photos, "not_at_hand", networks.not_at_hand)
    return networks
