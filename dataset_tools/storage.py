"""Writing files whole or not at all, on any fsspec filesystem."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dataset_tools.errors import UserError

PARTIAL_SUFFIX = ".mild-partial"
"""Ending of files and folders under construction; a killed run may leave some, `remove_partials` clears them."""


def open_root(root: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem and path of an fsspec URL or local path."""
    try:
        filesystem, path = fsspec.core.url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise UserError(f"{root}: {error}") from None
    return filesystem, path


@contextlib.contextmanager
def written_whole(filesystem: fsspec.AbstractFileSystem, path: str) -> Iterator[Path]:
    """Give a local file to write; when the block ends well, it appears at ``path``, whole.

    Local: the file is built beside ``path``, flushed to the disk and renamed. Elsewhere: it is built in a
    temporary folder and uploaded in one piece (object stores show an upload only when it is complete).
    A block that deletes the file it was given makes nothing appear.
    """
    if not isinstance(filesystem, LocalFileSystem):
        descriptor, temporary = tempfile.mkstemp(suffix=PARTIAL_SUFFIX)
        os.close(descriptor)
        partial = Path(temporary)
        try:
            yield partial
            if partial.exists():
                filesystem.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
                filesystem.put_file(str(partial), path)
        finally:
            partial.unlink(missing_ok=True)
        return
    filesystem.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
    partial = partial_of(Path(path))
    try:
        partial.touch()
        with held(partial):
            yield partial
            if partial.exists():
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(target: Path) -> Path:
    """A name beside ``target`` that nobody has, under which it may be built; hold it (`held`) while building."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")


@contextlib.contextmanager
def held(partial: Path) -> Iterator[None]:
    """Hold a file or folder that is being built, so that `remove_partials` of another process leaves it alone.

    The hold ends with this process, however that ends.
    """
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def remove_partials(folder: str | Path, names: str = "*") -> None:
    """Delete what killed processes left under construction in a local folder: files and folders of `partial_of`.

    Nothing else: not what has another name, not what a living process holds, nothing in folders below. Where a
    folder's earlier content had just been put aside (``.old``) for its new one, it is put back.

    Args:
        names: of the targets, as a pattern of `fnmatch`; those of other targets stay.
    """
    wanted = re.compile(rf"\.(?P<target>.+)\.[0-9a-f]{{8}}(?P<old>\.old)?{re.escape(PARTIAL_SUFFIX)}", re.DOTALL)
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if not entry.is_symlink())
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in found:
        match = wanted.fullmatch(name)
        if match is None or not fnmatchcase(match["target"], names):
            continue
        leftover, target = Path(folder, name), Path(folder, match["target"])
        try:
            descriptor = os.open(leftover, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            _lock(descriptor, fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # somebody is at work on it
        finally:
            os.close(descriptor)
        if match["old"] and not target.exists():
            os.replace(leftover, target)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _lock(descriptor: int, how: int = 0) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | how)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # some network disks know no locks
            raise


def write_bytes(filesystem: fsspec.AbstractFileSystem, path: str, data: bytes) -> str:
    """Write ``data`` whole at ``path``; gives its sha256 (hex)."""
    with written_whole(filesystem, path) as partial:
        partial.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(filesystem: fsspec.AbstractFileSystem, path: str) -> str:
    """sha256 (hex) of a file, read in blocks. Raises `FileNotFoundError`."""
    with filesystem.open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tag_of(filesystem: fsspec.AbstractFileSystem, path: str) -> str | None:
    """What a store says of a file's content without its being read, size and ETag; None where it says nothing."""
    if isinstance(filesystem, LocalFileSystem):
        return None
    filesystem.invalidate_cache(str(PurePosixPath(path).parent))
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        return None
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    return f"{info['size']}:{tag}" if tag else None


def is_unaltered(filesystem: fsspec.AbstractFileSystem, path: str, sha256: str, tag: str | None) -> bool:
    """Whether a file is there and has the content it had: by its tag where it still has that one, else by reading it.

    A store gives a copy of a file another tag.
    """
    if tag is not None and tag_of(filesystem, path) == tag:
        return True
    try:
        return sha256_of_file(filesystem, path) == sha256
    except FileNotFoundError:
        return False
