"""Checkpoints of a run: each whole or not at all, and never of another run.

A run's checkpoints lie in one folder, each a folder ``step-00000500`` of its own:

====================== ==================================================================================
file                   content
====================== ==================================================================================
``tensors.safetensors``  weights, the optimizer's and whatever else is a tensor, by name
``state.json``         format, step, what the run is (`Checkpoints`), numbers, sha256 of the other file
====================== ==================================================================================

Nothing is pickled, so that a checkpoint from elsewhere can be read without danger.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from dataset_tools.errors import UserError
from dataset_tools.folders import folder_written_whole
from dataset_tools.storage import remove_partials

FORMAT = 1
"""Version of a checkpoint's layout."""
TENSORS, STATE, LOCK = "tensors.safetensors", "state.json", ".lock"
PATIENCE = 60.0
"""Seconds to wait for another process that holds the folder: one that was told to end finishes its step first."""


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after some steps."""

    step: int
    """Steps done."""
    tensors: dict[str, torch.Tensor]
    """On the CPU."""
    numbers: dict[str, Any]
    """JSON-compatible."""


class Checkpoints:
    """The checkpoints of one run, in a folder of their own.

    Args:
        folder: made when it is needed.
        identity: what decides about the run's result, JSON-compatible; a checkpoint of another run is refused.
        keep: how many of the newest checkpoints to keep.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], keep: int) -> None:
        self.folder = Path(os.path.abspath(folder))
        self._identity = json.loads(json.dumps(identity))
        self._keep = keep

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from the folder, and clear what killed ones left half-written.

        Afterwards the folder is removed if there is nothing in it.

        Raises:
            UserError: another process holds it for longer than `PATIENCE`, or it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCK)
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise UserError(f"another run is at work on {self.folder}: wait for it, or end it") from None
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror}") from None
        try:
            remove_partials(self.folder, "step-*")
            yield
        finally:
            if not self._paths():
                self.remove()
            lock.release()

    def save(self, step: int, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """Write a checkpoint to the disk, then remove the oldest ones.

        Raises:
            UserError: it cannot be written, as where the disk is full; earlier ones stay as they were.
        """
        try:
            with folder_written_whole(self.folder / f"step-{step:08d}", STATE) as folder:
                save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TENSORS)
                state = {
                    "format": FORMAT,
                    "step": step,
                    "run": self._identity,
                    "numbers": numbers,
                    "sha256": hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest(),
                }
                (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
                for path in (folder / TENSORS, folder / STATE, folder):
                    _flush(path)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            good = [path.name for path in self._paths()]
            stays = f"{good[-1]} stays, and the run will go on from there" if good else "there is none before it"
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self.folder}: {reason}; {stays}: make room and "
                "start again"
            ) from error
        for path in self._paths()[: -self._keep]:
            shutil.rmtree(path, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is sound; None where there is none at all. Those after it are deleted.

        Raises:
            UserError: it belongs to another run (what differs is named), or no checkpoint is sound.
        """
        paths = self._paths()
        for number, path in reversed(list(enumerate(paths))):
            try:
                state = json.loads((path / STATE).read_bytes())
                version, run = state["format"], state["run"]
                data = (path / TENSORS).read_bytes() if version == FORMAT else b""
                sound = version != FORMAT or hashlib.sha256(data).hexdigest() == state["sha256"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if not sound:
                continue
            differences = _differences(run, self._identity, "")
            if version != FORMAT:
                differences = [f"format: {version} there, {FORMAT} now"]
            if differences:
                raise UserError(
                    f"{path} is of a run that differs ({'; '.join(differences)}): restore that to go on with it, or "
                    f"delete {self.folder} to start afresh"
                )
            # The run comes by their steps once more, and they would count among the newest that are kept.
            for damaged in paths[number + 1 :]:
                shutil.rmtree(damaged, ignore_errors=True)
            return Checkpoint(state["step"], load(data), state["numbers"])
        if paths:
            raise UserError(f"no checkpoint in {self.folder} is sound: delete that folder to start afresh")
        return None

    def remove(self) -> None:
        """Delete the checkpoints; then the folder, and the one that it lies in, if nothing else is in them."""
        for path in self._paths():
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.folder / LOCK).unlink(missing_ok=True)
            self.folder.rmdir()
            self.folder.parent.rmdir()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-" + 8 * "[0-9]"))


def _differences(there: Any, now: Any, name: str) -> list[str]:
    """Lines that name, by dotted path, what two JSON values do not share."""
    if isinstance(there, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted({*there, *now})
            for line in _differences(there.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if there == now else [f"{name}: {json.dumps(there)} there, {json.dumps(now)} now"]


def _flush(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
