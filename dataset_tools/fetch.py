"""Reading many small files from anywhere: bounded in time, size, concurrency and memory."""

from __future__ import annotations

import errno
import ipaddress
import random
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import aiohttp
import fsspec
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem
from pydantic import Field

from dataset_tools.errors import Rejected
from dataset_tools.settings import Settings
from dataset_tools.storage import open_root

T = TypeVar("T")
R = TypeVar("R")

TRANSIENT_ERRNO = {errno.EBUSY, errno.EREMOTEIO, errno.ECONNRESET, errno.EPIPE, errno.EAGAIN}
"""Among them what s3fs makes of S3's SlowDown, ServiceUnavailable (EBUSY) and InternalError (EREMOTEIO)."""
PRIVATE = "is a private address"


class FetchSettings(Settings):
    """How files are fetched."""

    attempts: int = Field(4, ge=1)
    """Tries for each file; only time-outs, lost connections, HTTP 429 and 5xx and their like are tried again."""
    timeout_seconds: float = Field(30.0, gt=0)
    """Limit for one try: the whole of it over HTTP, a wait for data on S3."""
    backoff_seconds: float = Field(1.0, ge=0)
    """Upper bound of the random wait before the second try; doubled for each further one."""
    max_bytes: int = Field(100_000_000, ge=1)
    """Larger files are rejected, unread beyond that point."""
    allow_private_addresses: bool = False
    """Follow http and https URLs to private, loopback and link-local addresses too."""


def read_bytes(
    url: str,
    settings: FetchSettings,
    storage_options: dict[str, Any] | None = None,
    *,
    span: tuple[int, int] | None = None,
) -> bytes:
    """The content of a file at any fsspec URL or local path; of ``span`` (first byte, byte after the last) only.

    Raises:
        Rejected: ``not-found``, ``forbidden``, ``too-large``, ``private-address``, ``time-out``, ``http-error`` (any
            other HTTP status, or no connection) or ``unreadable`` (any other failure of another file system).
            ``transient`` is set where a later run may succeed.
    """
    start, end = span or (0, settings.max_bytes + 1)

    def read() -> bytes:
        filesystem, path = _guarded_filesystem(url, settings, storage_options or {})
        if isinstance(filesystem, HTTPFileSystem):
            return bytes(sync(filesystem.loop, _download, filesystem, path, start, end, span is not None))
        return _read_range(filesystem, path, start, end)

    data = with_retries(read, url, settings)
    if len(data) > settings.max_bytes:
        raise Rejected("too-large", f"{url} has more than {settings.max_bytes} bytes")
    return data


def open_filesystem(
    url: str, settings: FetchSettings, storage_options: dict[str, Any] | None = None
) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path of a URL that the user chose, for large files: the time-out holds for each wait for data.

    Raises whatever fsspec raises: see `with_retries`.
    """
    options = dict(storage_options or {})
    wait = settings.timeout_seconds
    if url.startswith("s3://"):
        options["config_kwargs"] = {"connect_timeout": wait, "read_timeout": wait, **options.get("config_kwargs", {})}
    elif url.startswith(("http://", "https://")):
        # aiohttp's own default ends every answer after five minutes.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=wait, sock_read=wait)
        options["client_kwargs"] = {"timeout": timeout, **options.get("client_kwargs", {})}
    if url.startswith("/"):
        return open_root(url)
    filesystem, path = fsspec.url_to_fs(url, **options)
    return filesystem, path


def with_retries(operation: Callable[[], R], url: str, settings: FetchSettings) -> R:
    """Run an operation of a file system on ``url``, again where a failure may be gone the next time.

    Raises:
        Rejected: as `read_bytes`.
    """
    for attempt in range(settings.attempts):
        try:
            return operation()
        except Exception as error:
            rejected = _rejected(url, error, settings)
            if not rejected.transient or attempt == settings.attempts - 1:
                raise rejected from error
        # Full jitter: workers that were refused together do not come back together.
        time.sleep(random.Random().uniform(0, settings.backoff_seconds * 2**attempt))
    raise AssertionError("unreachable: the last attempt returns or raises")


def map_in_order(function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int) -> Iterator[R | Rejected]:
    """Apply ``function`` in threads and yield the results in the order of ``items``.

    At most ``ahead`` items are taken from ``items`` before the result of the first of them is yielded, so that
    memory stays bounded however slow the consumer is. A `Rejected` is yielded in place of its result; any other
    exception is raised.
    """

    def attempt(item: T) -> R | Rejected:
        try:
            return function(item)
        except Rejected as rejected:
            return rejected

    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[R | Rejected]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(attempt, item))
                if len(pending) >= ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


async def _download(filesystem: HTTPFileSystem, url: str, start: int, end: int, ranged: bool) -> bytes:
    """Bytes ``start`` to ``end``: fsspec's own ``cat_file`` reads the whole answer, however long it is."""
    session = await filesystem.set_session()
    options = dict(filesystem.kwargs)
    if ranged:
        options["headers"] = {**options.get("headers", {}), "Range": f"bytes={start}-{end - 1}"}
    data = bytearray()
    async with session.get(filesystem.encode_url(url), **options) as response:
        response.raise_for_status()
        if response.status == 206:
            start, end = 0, end - start
        async for chunk in response.content.iter_any():
            data += chunk
            if len(data) >= end:
                break
    return bytes(data[start:end])


def _read_range(filesystem: fsspec.AbstractFileSystem, path: str, start: int, end: int) -> bytes:
    try:
        return bytes(filesystem.cat_file(path, start=start, end=end))
    except OSError as error:
        # S3 answers "range not satisfiable" for any range of an empty object.
        if error.errno == errno.EINVAL and "range" in str(error).lower():
            return b""
        raise


def _guarded_filesystem(
    url: str, settings: FetchSettings, options: dict[str, Any]
) -> tuple[fsspec.AbstractFileSystem, str]:
    """As `open_filesystem`, with a limit on the whole of an answer and, unless allowed, no private addresses."""
    guarded = {
        "client_kwargs": {"timeout": aiohttp.ClientTimeout(total=settings.timeout_seconds)},
        "get_client": _client if settings.allow_private_addresses else _guarded_client,
    }
    if url.startswith(("http://", "https://")):
        return open_filesystem(url, settings, {**options, **guarded})
    # http behind another file system, as in simplecache::https://..., is guarded as well.
    return open_filesystem(url, settings, {**options, **dict.fromkeys(re.findall(r"::(https?)://", url), guarded)})


async def _client(loop: Any, **kwargs: Any) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(**kwargs)


async def _guarded_client(loop: Any, **kwargs: Any) -> aiohttp.ClientSession:
    """A session that looks at every address it is about to connect to, also after redirects and whatever DNS says."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=_public_socket), **kwargs)


def _public_socket(address: tuple[Any, ...]) -> socket.socket:
    family, kind, protocol, _, (host, *_) = address
    ip = ipaddress.ip_address(host)
    if not (getattr(ip, "ipv4_mapped", None) or ip).is_global:
        raise OSError(errno.EACCES, f"{host} {PRIVATE}")
    return socket.socket(family, kind, protocol)


def _rejected(url: str, error: Exception, settings: FetchSettings) -> Rejected:
    """What an exception of a file system means."""
    found = f"{url}: {' '.join(str(error).split()) or type(error).__name__}"
    names = {cls.__name__ for cls in type(error).__mro__}
    if PRIVATE in str(error):
        return Rejected("private-address", f"{found}; the setting allow_private_addresses permits it")
    # asyncio, fsspec, aiohttp and botocore each have their own.
    if isinstance(error, TimeoutError) or names & {"FSTimeoutError", "ConnectTimeoutError", "ReadTimeoutError"}:
        return Rejected("time-out", f"{url} took longer than {settings.timeout_seconds} s", transient=True)
    if isinstance(error, aiohttp.ClientResponseError):
        status = error.status
        reason = {401: "forbidden", 403: "forbidden", 404: "not-found", 410: "not-found"}.get(status, "http-error")
        return Rejected(reason, f"{url}: HTTP {status}", transient=status in (408, 425, 429) or status >= 500)
    if isinstance(error, aiohttp.ClientError):
        lost = isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError)
        return Rejected("http-error", found, transient=lost)
    if isinstance(error, FileNotFoundError):
        return Rejected("not-found", found)
    if isinstance(error, PermissionError):
        return Rejected("forbidden", found)
    lost = isinstance(error, ConnectionError) or getattr(error, "errno", None) in TRANSIENT_ERRNO
    return Rejected("unreadable", found, transient=lost or bool(names & {"HTTPClientError", "ConnectionError"}))
