"""Writing files whole or not at all, on any fsspec filesystem."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dataset_tools.errors import UserError

PARTIAL_SUFFIX = ".partial"
"""Ending of files under construction; a killed run may leave some, `remove_partial_files` clears them."""


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
    local = isinstance(filesystem, LocalFileSystem)
    if local:
        filesystem.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
        name = PurePosixPath(path).name
        partial = Path(path).with_name(f".{name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")
    else:
        descriptor, temporary = tempfile.mkstemp(suffix=PARTIAL_SUFFIX)
        os.close(descriptor)
        partial = Path(temporary)
    try:
        yield partial
        if not partial.exists():
            return
        if local:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        else:
            filesystem.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
            filesystem.put_file(str(partial), path)
    finally:
        partial.unlink(missing_ok=True)


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


def content_token(filesystem: fsspec.AbstractFileSystem, path: str) -> str | None:
    """What tells whether a file still has the bytes it had: sha256 where reading is cheap, else the store's ETag.

    None where the file is gone.
    """
    try:
        if isinstance(filesystem, LocalFileSystem):
            return f"sha256:{sha256_of_file(filesystem, path)}"
        filesystem.invalidate_cache(str(PurePosixPath(path).parent))
        info = filesystem.info(path)
    except FileNotFoundError:
        return None
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    return f"tag:{info['size']}:{tag}" if tag else f"sha256:{sha256_of_file(filesystem, path)}"


def remove_partial_files(filesystem: fsspec.AbstractFileSystem, root: str) -> None:
    """Delete files and folders that killed runs left under construction below a local ``root``."""
    if isinstance(filesystem, LocalFileSystem):
        for leftover in Path(root).rglob(f".*{PARTIAL_SUFFIX}"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)
