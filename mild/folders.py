"""Folders of results that appear whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from dataset_tools.errors import UserError
from dataset_tools.storage import PARTIAL_SUFFIX


@contextlib.contextmanager
def folder_written_whole(path: str | Path) -> Iterator[Path]:
    """Give an empty sibling folder to fill; when the block ends well it becomes ``path``, replacing what was there.

    Where the block fails, ``path`` stays as it was and nothing is left behind.

    Raises:
        UserError: ``path`` is a file, or the folder cannot be written.
    """
    target = Path(os.path.abspath(path))
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a folder for the result")
    mark = uuid.uuid4().hex[:8]
    partial, old = (
        target.with_name(f".{target.name}.{mark}{end}") for end in (PARTIAL_SUFFIX, f".old{PARTIAL_SUFFIX}")
    )
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    try:
        yield partial
        # Some libraries write files that only their owner can read, whatever the umask says.
        readable = partial.stat().st_mode & 0o666
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(readable)
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(path: str | Path) -> None:
    """Delete what killed processes left of `folder_written_whole` for ``path``. Nobody may be writing it."""
    target = Path(os.path.abspath(path))
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*{PARTIAL_SUFFIX}"):
        shutil.rmtree(leftover, ignore_errors=True)
