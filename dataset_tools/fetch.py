"""Reading many small files from anywhere: bounded in time, size, concurrency and memory.

What goes wrong is told apart by whose fault it is. A picture that is not there or too large is set aside for good.
Whatever may be a fault of the run (a wrong folder, a missing permission, a network that is down) is set aside as
transient: a later run tries again. And what is a fault of this program or machine (`OURS`, a full disk), or of
credentials that open nothing, is no rejection at all.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import ipaddress
import os
import random
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

import aiohttp
import fsspec
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field

from dataset_tools.errors import Rejected, UserError, credentials_to_mend
from dataset_tools.ranges import NoRanges, is_http, read_range
from dataset_tools.settings import Settings
from dataset_tools.storage import is_url, open_root
from dataset_tools.storage_options import resolved, scrub

T = TypeVar("T")
R = TypeVar("R")

TRANSIENT_ERRNO = {errno.EBUSY, errno.EREMOTEIO, errno.ECONNRESET, errno.EPIPE, errno.EAGAIN}
"""Among them what s3fs makes of S3's SlowDown, ServiceUnavailable (EBUSY) and InternalError (EREMOTEIO)."""
OURS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, NotImplementedError,
    RecursionError, TypeError,
)  # fmt: skip
"""What no file system raises unless a program is wrong, or the machine has no memory left."""
OUR_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
PRIVATE = "is a private address"
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""RFC 6052: how networks without IPv4 of their own write addresses of IPv4."""
LONGEST_WAIT = 300.0
"""Seconds between two tries, at most."""


class FetchSettings(Settings):
    """How files are fetched."""

    attempts: int = Field(4, ge=1, le=20)
    """Tries for each file; only time-outs, lost connections, HTTP 429 and 5xx and their like are tried again."""
    timeout_seconds: float = Field(30.0, gt=0, le=86_400)
    """Limit for one try: the whole of it over HTTP, a wait for data on S3."""
    backoff_seconds: float = Field(1.0, ge=0, le=LONGEST_WAIT)
    """Upper bound of the random wait before the second try; doubled for each further one, to five minutes at most."""
    max_bytes: int = Field(100_000_000, ge=1, le=1 << 40)
    """Larger files are rejected, unread beyond that point."""
    allow_private_addresses: bool = False
    """Follow http and https URLs to private, loopback and link-local addresses too."""


def read_bytes(
    url: str,
    settings: FetchSettings,
    options: dict[str, Any] | None = None,
    *,
    span: tuple[int, int] | None = None,
) -> bytes:
    """The content of a file at any fsspec URL or local path; of ``span`` (first byte, byte after the last) only.

    Args:
        options: as `dataset_tools.storage_options.StorageOptions`: values may be named.

    Raises:
        Rejected: ``not-found`` or ``too-large``; and, with ``transient`` set, since the fault may be the run's:
            ``forbidden``, ``private-address``, ``no-such-bucket``, ``no-such-folder``, ``no-ranges`` (the server
            knows none, and a span lies too far behind), ``time-out``, ``http-error`` (any other HTTP status, or no
            connection) or ``unreadable`` (any other failure of another file system).
        UserError: an option names a variable or block that is not there, or the credentials do not hold.
    """
    start, end = span or (0, settings.max_bytes + 1)
    end = min(end, start + settings.max_bytes + 1)

    def read() -> bytes:
        filesystem, path = _guarded_filesystem(url, settings, options or {})
        return read_range(filesystem, path, start, end, discard=settings.max_bytes + 1)

    data = with_retries(read, url, settings)
    if len(data) > settings.max_bytes:
        raise Rejected("too-large", scrub(f"{url} has more than {settings.max_bytes} bytes"))
    return data


def open_filesystem(
    url: str, settings: FetchSettings, options: dict[str, Any] | None = None
) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path of a URL that the user chose, for large files: the time-out holds for each wait for data.

    Raises `UserError` for an option that names a variable or block that is not there, and whatever fsspec raises: see
    `with_retries`.
    """
    wait = settings.timeout_seconds
    # aiohttp's own default ends every answer after five minutes.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=wait, sock_read=wait)
    return _opened(url, settings, options or {}, {"timeout": timeout}, {})


def with_retries(operation: Callable[[], R], url: str, settings: FetchSettings) -> R:
    """Run an operation of a file system on ``url``, again where a failure may be gone the next time.

    Raises:
        Rejected: as `read_bytes`.
        UserError: the credentials do not hold, or hold no longer: no file is to blame.
        Exception: the operation's own fault (`OURS`), or this machine's: a full disk, too many open files.
    """
    for attempt in range(settings.attempts):
        try:
            return operation()
        except (Rejected, UserError):
            raise
        except OURS as error:
            _raise_scrubbed(error)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in OUR_MACHINE:
                _raise_scrubbed(error)
            if refusal := credentials_to_mend(error):
                raise UserError(scrub(f"{url}: {refusal}")) from None
            rejected, again = _meaning(url, error, settings)
            if not again or attempt == settings.attempts - 1:
                # Not "from error": that may repeat what opens the store.
                raise rejected from None
        # Full jitter: workers that were refused together do not come back together.
        time.sleep(random.Random().uniform(0, min(settings.backoff_seconds * 2**attempt, LONGEST_WAIT)))
    raise AssertionError("unreachable: the last attempt returns or raises")


def look_up(url: str, settings: FetchSettings, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a store says of a file, as fsspec's ``info``; over HTTP one HEAD request, and no more where there is none.

    ``size`` is None where the server does not say it. Raises `Rejected` as `read_bytes`.
    """

    def ask() -> dict[str, Any]:
        filesystem, path = open_filesystem(url, settings, options)
        if is_http(filesystem):
            return dict(sync(filesystem.loop, _http_head, filesystem, path))
        return dict(filesystem.info(path))

    return with_retries(ask, url, settings)


def list_folder(
    url: str, settings: FetchSettings, options: dict[str, Any] | None = None
) -> dict[str, dict[str, Any]] | None:
    """Names in a folder, each with what the store says of it, by one listing; None where nothing can be listed.

    Raises `Rejected` as `read_bytes` but for ``not-found``: a folder that is not there is empty.
    """

    def ask() -> dict[str, dict[str, Any]] | None:
        filesystem, path = open_filesystem(url, settings, options)
        if is_http(filesystem):
            return None
        filesystem.invalidate_cache()
        try:
            infos = filesystem.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        names = {info["name"].rstrip("/").rpartition("/")[2]: info for info in infos}
        if isinstance(filesystem, LocalFileSystem):
            # Of a link a listing tells the link's own time and kind; what counts is where it leads, if anywhere.
            for name, info in names.items():
                if info["islink"]:
                    with contextlib.suppress(FileNotFoundError):
                        names[name] = filesystem.info(info["name"])
        return names

    try:
        return with_retries(ask, url, settings)
    except Rejected as rejected:
        if rejected.reason == "forbidden":  # buckets may be read and not listed
            return None
        raise


def copy_file(
    url: str, target: str, size: int | None, settings: FetchSettings, options: dict[str, Any] | None = None
) -> None:
    """Copy a file of any size to the local path ``target``, whole.

    Args:
        size: bytes that it has, where that is known; a copy of another size counts as a lost connection.

    Raises:
        Rejected: as `read_bytes`.
        OSError: ``target`` cannot be written.
    """

    def copy() -> None:
        filesystem, path = open_filesystem(url, settings, options)
        if is_http(filesystem):
            expected = sync(filesystem.loop, _http_copy, filesystem, path, target)
        else:
            filesystem.get_file(path, target)
            expected = None
        for said in (size, expected):
            if said is not None and os.path.getsize(target) != said:
                raise ConnectionError(f"{os.path.getsize(target)} bytes came, of {said}")

    with_retries(copy, url, settings)


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
                # In the caller's context: what it knows, such as where Prefect's server is, holds in threads too.
                pending.append(pool.submit(contextvars.copy_context().run, attempt, item))
                if len(pending) >= ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


async def _http_head(filesystem: HTTPFileSystem, url: str) -> dict[str, Any]:
    session = await filesystem.set_session()
    options = dict(filesystem.kwargs)
    headers = {"Accept-Encoding": "identity", **options.pop("headers", {})}
    async with session.head(filesystem.encode_url(url), headers=headers, allow_redirects=True, **options) as response:
        if response.status not in (400, 403, 405, 501):
            response.raise_for_status()
            return _described(response)
    # Some servers, and URLs signed for GET alone, know no HEAD.
    headers["Range"] = "bytes=0-0"
    async with session.get(filesystem.encode_url(url), headers=headers, **options) as response:
        if response.status != 416:  # an empty file has no first byte
            response.raise_for_status()
        return _described(response)


def _described(response: aiohttp.ClientResponse) -> dict[str, Any]:
    headers = response.headers
    whole = re.search(r"/(\d+)$", headers.get("Content-Range", ""))
    length = whole[1] if whole else headers.get("Content-Length") if response.status == 200 else None
    encoded = headers.get("Content-Encoding", "identity") not in ("", "identity")
    # Servers spell the names of headers as they like.
    tags = {name: headers[name] for name in ("ETag", "Content-MD5", "Last-Modified") if name in headers}
    return {**tags, "size": int(length) if length is not None and not encoded else None}


async def _http_copy(filesystem: HTTPFileSystem, url: str, target: str) -> int | None:
    """Stream a file to the disk; gives how long the server said it is."""
    session = await filesystem.set_session()
    options = dict(filesystem.kwargs)
    headers = {"Accept-Encoding": "identity", **options.pop("headers", {})}
    with open(target, "wb") as file:
        async with session.get(filesystem.encode_url(url), headers=headers, **options) as response:
            response.raise_for_status()
            async for chunk in response.content.iter_chunked(1 << 20):
                file.write(chunk)
            size: int | None = _described(response)["size"]
    return size


def _guarded_filesystem(
    url: str, settings: FetchSettings, options: dict[str, Any]
) -> tuple[fsspec.AbstractFileSystem, str]:
    """As `open_filesystem`, with a limit on the whole of an answer and, unless allowed, no private addresses."""
    client = {"timeout": aiohttp.ClientTimeout(total=settings.timeout_seconds)}
    guard = {"get_client": _client if settings.allow_private_addresses else _guarded_client}
    return _opened(url, settings, options, client, guard)


def _opened(
    url: str, settings: FetchSettings, options: dict[str, Any], client: dict[str, Any], more: dict[str, Any]
) -> tuple[fsspec.AbstractFileSystem, str]:
    """Open with the user's options, which ours stand beside: ``client`` in ``client_kwargs`` of HTTP, and ``more``."""
    if not is_url(url):
        return open_root(url)
    options = resolved(options, "storage options")

    def with_ours(given: dict[str, Any]) -> dict[str, Any]:
        own = dict(given.get("client_kwargs") or {})
        if isinstance(own.get("timeout"), int | float):
            own["timeout"] = aiohttp.ClientTimeout(total=own["timeout"])
        return {**given, "client_kwargs": {**client, **own}, **more}

    if url.startswith("s3://"):
        wait = settings.timeout_seconds
        options["config_kwargs"] = {"connect_timeout": wait, "read_timeout": wait, **options.get("config_kwargs", {})}
    elif url.startswith(("http://", "https://")):
        options = with_ours(options)
    # http behind another file system, as in simplecache::https://..., is guarded as well.
    for protocol in re.findall(r"::(https?)://", url):
        options[protocol] = with_ours(options.get(protocol, {}))
    filesystem, path = fsspec.url_to_fs(url, **options)
    return filesystem, path


async def _client(loop: Any, **kwargs: Any) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(**kwargs)


async def _guarded_client(loop: Any, **kwargs: Any) -> aiohttp.ClientSession:
    """A session that looks at every address it is about to connect to, also after redirects and whatever DNS says."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=public_socket), **kwargs)


def public_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket for an address of ``getaddrinfo``, about to be connected: what DNS says later changes nothing.

    Raises `OSError` that says `PRIVATE` for an address that no stranger can have.
    """
    family, kind, protocol, _, (host, *_) = address
    if not _is_public(ipaddress.ip_address(host)):
        raise OSError(errno.EACCES, f"{host} {PRIVATE}")
    return socket.socket(family, kind, protocol)


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address can be a stranger's; one that carries an IPv4 address leads where that leads."""
    if isinstance(ip, ipaddress.IPv6Address):
        carried = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped or ip.sixtofour
        if carried is not None:
            return _is_public(carried)
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _raise_scrubbed(error: BaseException) -> NoReturn:
    """Raise the exception on; in its place a `RuntimeError`, where it or what led to it repeats a secret."""
    text, link = "", error  # type: str, BaseException | None
    while link is not None:
        text, link = f"{text}{link} ", link.__cause__ or link.__context__
    if scrub(text) == text:
        raise error
    raise RuntimeError(f"{type(error).__name__}: {scrub(str(error))}") from None


def _meaning(url: str, error: Exception, settings: FetchSettings) -> tuple[Rejected, bool]:
    """What an exception of a file system means, and whether it may be gone in a moment."""
    said = " ".join(str(error).split()) or type(error).__name__
    names = {cls.__name__ for cls in type(error).__mro__}

    def rejected(reason: str, message: str, transient: bool = True) -> Rejected:
        return Rejected(reason, scrub(message), transient=transient)

    if isinstance(error, NoRanges):
        return rejected("no-ranges", said), False
    if PRIVATE in said:
        return rejected("private-address", f"{url}: {said}; the setting allow_private_addresses permits it"), False
    # asyncio, fsspec, aiohttp and botocore each have their own.
    if isinstance(error, TimeoutError) or names & {"FSTimeoutError", "ConnectTimeoutError", "ReadTimeoutError"}:
        return rejected("time-out", f"{url} took longer than {settings.timeout_seconds} s"), True
    if isinstance(error, aiohttp.ClientResponseError):
        status, gone = error.status, error.status in (404, 410)
        reason = "not-found" if gone else "forbidden" if status in (401, 403) else "http-error"
        return rejected(reason, f"{url}: HTTP {status}", not gone), status in (408, 425, 429) or status >= 500
    if isinstance(error, aiohttp.ClientError):
        lost = isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError)
        return rejected("http-error", f"{url}: {said}"), lost
    if isinstance(error, FileNotFoundError):
        if _is_bucket_missing(error):
            return rejected("no-such-bucket", f"{url}: {said}"), False
        folder = _missing_folder(url)
        if folder is not None:
            return rejected("no-such-folder", f"{url}: the folder {folder} does not exist"), False
        return rejected("not-found", f"{url}: {said}", False), False
    if isinstance(error, PermissionError):
        return rejected("forbidden", f"{url}: {said}"), False
    lost = isinstance(error, ConnectionError) or getattr(error, "errno", None) in TRANSIENT_ERRNO
    return rejected("unreadable", f"{url}: {said}"), lost or bool(names & {"HTTPClientError", "ConnectionError"})


def _is_bucket_missing(error: Exception) -> bool:
    """Whether S3 or GCS says that there is no such bucket: s3fs makes the same of it as of a missing object."""
    response = getattr(error.__cause__, "response", None) or {}
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code == "NoSuchBucket" or bool(re.search(r"\bbucket\b.*(not exist|not found)", str(error), re.IGNORECASE))


def _missing_folder(url: str) -> str | None:
    """The folder of a local file, where it is missing as a whole: mistyped, or of a disk that is not mounted."""
    filesystem, path = fsspec.url_to_fs(url)
    folder = os.path.dirname(path)
    return folder if isinstance(filesystem, LocalFileSystem) and not os.path.isdir(folder) else None
