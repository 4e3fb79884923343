"""One run at a time on an output: whoever comes second is told who is at work on it.

Steps of one run write files that later steps of the same run read. Two runs at once on one output would mix them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import psutil
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem
from prefect.runtime import flow_run

from dataset_tools.errors import UserError
from dataset_tools.storage import is_url, open_root, write_bytes

HOLDER = "held-by.json"
"""Says who is at work; below the work folder."""
RENEWED_EVERY = 30.0
"""Seconds. On a store without locks the holder says so often that it lives."""
STALE_AFTER = 300.0
"""Seconds without a word after which a holder on such a store is taken for dead."""


@contextlib.contextmanager
def sole_run(output: str) -> Iterator[None]:
    """Keep other runs from an output and its work folder, ``{output}.work``, for as long as the block runs.

    On a disk the lock is the kernel's, and ends with the process that holds it, however that ends; whoever names the
    output by a link is kept out as well. On an object store it is the file `HOLDER`, which its holder renews; one that
    is no longer renewed, or whose process on this machine is gone, is taken over.

    Raises:
        UserError: another run is at work on the output; the message names it. Or the work folder cannot be written. Or,
            at the end, another run took a store's output over, as this one had said nothing for so long.
    """
    filesystem, work = open_root(f"{output if is_url(output) else os.path.realpath(output)}.work")
    me = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "flow run": flow_run.name or "none",
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "id": uuid.uuid4().hex,
    }
    hold = _on_disk if isinstance(filesystem, LocalFileSystem) else _on_store
    with hold(filesystem, work, output, me):
        yield


@contextlib.contextmanager
def _on_disk(filesystem: fsspec.AbstractFileSystem, work: str, output: str, me: dict[str, Any]) -> Iterator[None]:
    lock = FileLock(Path(work, "lock"))
    try:
        Path(work).mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise _occupied(output, _read(filesystem, work)) from None
    except OSError as error:
        raise UserError(f"{work} cannot be written: {error.strerror}") from None
    try:
        write_bytes(filesystem, f"{work}/{HOLDER}", json.dumps(me).encode())
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm_file(f"{work}/{HOLDER}")
        lock.release()


@contextlib.contextmanager
def _on_store(filesystem: fsspec.AbstractFileSystem, work: str, output: str, me: dict[str, Any]) -> Iterator[None]:
    place = f"{work}/{HOLDER}"

    def say() -> None:
        filesystem.pipe_file(place, json.dumps(me | {"renewed": time.time()}).encode())

    try:
        # Stores that know conditional writes refuse the second of two at once.
        filesystem.pipe_file(place, json.dumps(me | {"renewed": time.time()}).encode(), mode="create")
    except FileExistsError:
        holder = _read(filesystem, work)
        if not _is_dead(holder):
            raise _occupied(output, holder) from None
        say()
    if _read(filesystem, work).get("id") != me["id"]:
        raise _occupied(output, _read(filesystem, work))
    ended = threading.Event()

    def is_mine() -> bool:
        return bool(_read(filesystem, work).get("id") == me["id"])

    def renew() -> None:
        while not ended.wait(RENEWED_EVERY):
            with contextlib.suppress(Exception):  # every store has its own kinds of refusal
                if not is_mine():
                    return
                say()

    renewal = threading.Thread(target=renew, name="renewal", daemon=True)
    renewal.start()
    mine = True
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        with contextlib.suppress(Exception):  # what the block raises says more, such as of expired credentials
            if mine := is_mine():
                filesystem.rm_file(place)
    if not mine:
        raise UserError(
            f"{output}: another run took it over, as this one was silent for {STALE_AFTER / 60:g} minutes: what both "
            "wrote may be mixed; when the other has ended, start again"
        )


def _read(filesystem: fsspec.AbstractFileSystem, work: str) -> dict[str, Any]:
    filesystem.invalidate_cache(work)
    try:
        holder = json.loads(filesystem.cat_file(f"{work}/{HOLDER}"))
    except (FileNotFoundError, ValueError):
        holder = None
    return holder if isinstance(holder, dict) else {}


def _is_dead(holder: dict[str, Any]) -> bool:
    if time.time() - float(holder.get("renewed", 0)) > STALE_AFTER:
        return True
    return holder.get("host") == socket.gethostname() and not psutil.pid_exists(int(holder.get("process", 0)))


def _occupied(output: str, holder: dict[str, Any]) -> UserError:
    who = ", ".join(f"{name} {holder[name]}" for name in ("host", "process", "flow run", "since") if name in holder)
    return UserError(f"{output}: another run is at work on it ({who or 'unknown'}); wait for it or end it")
