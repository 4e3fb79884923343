"""Folders of results that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from dataset_tools.errors import UserError
from dataset_tools.storage import PARTIAL_SUFFIX, held, local_place, partial_of

LEFT_BEHIND = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.directory|@eaDir|\.nfs[0-9a-f]+")
"""What file managers and network disks leave in folders, of which nobody knows."""


@contextlib.contextmanager
def folder_written_whole(path: str | Path, mark: str, own: str = ".*") -> Iterator[Path]:
    """Give an empty sibling folder to fill; when the block ends well it becomes ``path``, replacing what was there.

    Where the block fails, ``path`` stays as it was and nothing is left behind. Where ``path`` is a link, the link stays
    and the folder that it leads to is replaced, on whatever disk that is.

    Args:
        mark: a file that every result of this kind has, by its path in it. A folder without it, unless it is empty, is
            somebody's, and is not replaced.
        own: what files and folders in a result of this kind are called, a regular expression. A folder with any other,
            but for what nobody knows of (`LEFT_BEHIND`), is not replaced.

    Raises:
        UserError: ``path`` is a file, a URL or a folder of something else, or it cannot be written.
    """
    target = check_replaceable(path, mark, own)
    partial = partial_of(target)
    old = partial.with_suffix(f".old{PARTIAL_SUFFIX}")
    with _written(target):
        partial.mkdir(parents=True)
    try:
        with held(partial):
            yield partial
            with _written(target):
                # Some libraries write files that only their owner can read, whatever the umask says.
                readable = partial.stat().st_mode & 0o666
                for file in partial.rglob("*"):
                    if file.is_file():
                        file.chmod(readable)
                if target.exists():
                    os.replace(target, old)
                try:
                    os.replace(partial, target)
                except BaseException:
                    if old.exists():
                        os.replace(old, target)
                    raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(path: str | Path, mark: str, own: str = ".*") -> Path:
    """The folder that `folder_written_whole` replaces, where it may; for a look before long work begins.

    Raises:
        UserError: ``path`` is a file, a URL or a folder of something else.
    """
    target = Path(os.path.realpath(local_place(path, "a folder of results")))
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a folder for the result")
    if foreign := why_foreign(target, mark, own):
        raise UserError(
            f"{target} holds something else than such a result ({foreign}), and would be replaced as a whole; "
            "name a new folder"
        )
    return target


def why_foreign(folder: Path, mark: str, own: str) -> str | None:
    """Why a folder is somebody's, and not replaced by `folder_written_whole`; None where it may be, or is not there."""
    found = sorted(os.listdir(folder)) if folder.is_dir() else []
    names = [name for name in found if not LEFT_BEHIND.fullmatch(name)]
    if strange := [name for name in names if not re.fullmatch(own, name)]:
        return strange[0]
    return f"{mark} is missing" if names and not (folder / mark).exists() else None


@contextlib.contextmanager
def _written(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error
