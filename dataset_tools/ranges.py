"""Reading a part of a file from any fsspec file system; over HTTP only where the server can do so.

fsspec asks an HTTP server for a range and takes whatever comes: where the server knows no ranges, that is the whole
file, however large.
"""

from __future__ import annotations

import errno
from typing import Any

import fsspec
from fsspec.asyn import sync

_LARGEST = 1 << 40
"""Bytes: beyond the end of any file."""


class NoRanges(OSError):
    """The server sends whole files only: it ignores ``Range`` (RFC 9110, section 14.2)."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path}: the server ignores range requests and sends whole files only, and this reads a small part of a "
            "large one; use a server that answers them (nginx, Caddy, S3), or copy the files to this machine"
        )


def is_http(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Whether files are asked for over HTTP directly; needs no aiohttp to tell."""
    protocol = filesystem.protocol
    return "http" in ((protocol,) if isinstance(protocol, str) else protocol)


def read_range(filesystem: fsspec.AbstractFileSystem, path: str, start: int, end: int, *, discard: int = 0) -> bytes:
    """Bytes ``start`` to ``end`` (exclusive) of a file; fewer where it ends before.

    Args:
        discard: where a server ignores ranges, read a file from its beginning all the same if no more than so many
            bytes are read.

    Raises:
        NoRanges: the server ignores ranges and more would have to be read; nothing was.
        Exception: whatever the file system raises.
    """
    if is_http(filesystem):
        return bytes(sync(filesystem.loop, _http_bytes, filesystem, path, start, end, discard))
    try:
        return bytes(filesystem.cat_file(path, start=start, end=end))
    except OSError as error:
        # S3 answers "range not satisfiable" for any range of an empty object.
        if error.errno == errno.EINVAL and "range" in str(error).lower():
            return b""
        raise


def read_whole(filesystem: fsspec.AbstractFileSystem, path: str) -> bytes:
    """All bytes of a file that is no larger than memory, with one request: file systems of stores ask for sizes first.

    Raises:
        Exception: whatever the file system raises.
    """
    if is_http(filesystem) or not filesystem.async_impl:
        return bytes(filesystem.cat_file(path))
    return read_range(filesystem, path, 0, _LARGEST)


async def _http_bytes(filesystem: Any, url: str, start: int, end: int, discard: int) -> bytes:
    """As `read_range`, on the loop of fsspec's ``HTTPFileSystem``: never more than is asked for is kept or read.

    Without a ``start`` no range is asked for, as no server needs to know any for that.
    """
    session = await filesystem.set_session()
    options = dict(filesystem.kwargs)
    headers = {"Accept-Encoding": "identity", **options.get("headers", {})}
    if start or not discard:
        headers["Range"] = f"bytes={start}-{end - 1}"
    data = bytearray()
    async with session.get(filesystem.encode_url(url), **{**options, "headers": headers}) as response:
        if response.status == 416:  # the file ends before
            return b""
        response.raise_for_status()
        if response.status == 206 and response.headers.get("Content-Range", f"bytes {start}-").startswith(
            f"bytes {start}-"
        ):
            start, end = 0, end - start
        elif response.status == 206 or ("Range" in headers and end > discard):
            raise NoRanges(url)
        async for chunk in response.content.iter_any():
            data += chunk
            if len(data) >= end:
                break
    return bytes(data[start:end])
