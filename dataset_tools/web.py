"""Fetching many files from strangers' servers: politely, and believing nothing that they say.

No host has more than a few visitors at once, none is visited against its robots.txt, and what it does not give for
machine learning (``X-Robots-Tag: noai``) is not taken. A redirect to another host ends a visit (`Visit.moved`): whoever
visits that host goes on, so that its bound holds, too. Parts of files are never asked for, and never taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self
from urllib.parse import urldefrag, urljoin, urlsplit

import aiohttp
from pydantic import Field

from dataset_tools.errors import Rejected
from dataset_tools.fetch import LONGEST_WAIT, OUR_MACHINE, PRIVATE, public_socket
from dataset_tools.robots import MOST_BYTES, Robots, directives
from dataset_tools.settings import Settings

_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429)
"""Besides all from 500 on."""
_ROBOTS_REDIRECTS = 5
"""RFC 9309, 2.3.1.2."""
_NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


class WebSettings(Settings):
    """How strangers' servers are visited, and what is taken from them."""

    user_agent: str = Field("mild", pattern=r"^[A-Za-z_-]+(/[!-~]+)?( [ -~]+)?$")
    """What we say that we are: a name, by which robots.txt knows us, and what may follow it, such as a version and
    where you can be reached: ``mild/1.0 (+https://example.org/bot)``."""
    connections: int = Field(32, ge=1, le=1024)
    """Files that one step fetches at once, from all hosts together, each held in memory; steps run side by side as
    ``runner.workers`` says."""
    connections_per_host: int = Field(2, ge=1, le=64)
    """Requests to one host at once, over all steps."""
    connect_seconds: float = Field(10.0, gt=0, le=3600)
    """Limit for finding a host and connecting to it."""
    read_seconds: float = Field(30.0, gt=0, le=3600)
    """Limit for a wait for data."""
    total_seconds: float = Field(300.0, gt=0, le=86_400)
    """Limit for one try as a whole."""
    attempts: int = Field(4, ge=1, le=20)
    """Tries for each request; only time-outs, lost connections, HTTP 408, 425, 429 and 5xx are tried again."""
    backoff_seconds: float = Field(1.0, ge=0, le=LONGEST_WAIT)
    """Upper bound of the random wait before the second try; doubled for each further one, to five minutes at most."""
    longest_retry_after: float = Field(LONGEST_WAIT, ge=0, le=86_400)
    """Seconds that a server may make us wait by ``Retry-After``; where it asks for more, the next run tries again."""
    max_bytes: int = Field(20_000_000, ge=1, le=1 << 32)
    """Larger files are refused, unread beyond that point."""
    max_redirects: int = Field(5, ge=0, le=20)
    """Redirects that are followed for one URL."""
    robots: bool = True
    """Leave alone what a host's robots.txt disallows; where that cannot be had, everything of that host (RFC 9309)."""
    disallowed_directives: tuple[str, ...] = ("noai", "noimageai")
    """Directives of ``X-Robots-Tag`` by which a server keeps a file from us; ``[]`` heeds none."""
    allow_private_addresses: bool = False
    """Connect to private, loopback and link-local addresses too."""

    @property
    def token(self) -> str:
        """Our name in robots.txt."""
        return self.user_agent.partition(" ")[0].partition("/")[0]

    def rules(self) -> dict[str, Any]:
        """What decides which URLs give a file; not how fast they are asked."""
        decide = {"max_bytes", "max_redirects", "robots", "disallowed_directives", "allow_private_addresses"}
        return {"token": self.token, **self.model_dump(mode="json", include=decide)}


@dataclass
class Visit:
    """One URL, and what came of asking for it: ``data``, ``moved`` or an ``error``."""

    url: str
    final_url: str = ""
    """Where redirects led."""
    redirects: int = 0
    requests: int = 0
    """For this URL, redirects and further tries among them."""
    http: int = 0
    """Status of the last answer; 0 where there was none."""
    data: bytes = b""
    moved: bool = False
    """``final_url`` is of another host, and was not asked for."""
    error: Rejected | None = None


def visit_all(visits: Iterable[Visit], settings: WebSettings, take: Callable[[Visit], None]) -> None:
    """Make visits, and hand each to ``take`` when it has ended, in a thread; its data is forgotten after that.

    Reasons of ``error``: ``bad-url``, ``bad-scheme``, ``private-address``, ``no-such-host``, ``robots-disallowed``,
    ``header-disallowed``, ``too-many-redirects``, ``not-found``, ``forbidden``, ``partial-answer``,
    ``encoded-answer``, ``too-large``, ``http-error``; and, with ``transient`` set: ``time-out``, ``truncated-answer``,
    ``robots-unreachable``, ``http-error`` (no connection, or HTTP 408, 425, 429, 5xx).

    Args:
        visits: hosts of which others are visited elsewhere at the same time have more visitors than is allowed.
            `host_of` each must be known.

    Raises:
        Exception: whatever ``take`` raises, and faults of this machine.
    """
    try:
        asyncio.run(_visit_all(visits, settings, take))
    except BaseExceptionGroup as group:
        # Of several that failed together, one tells enough, and says plainly what the user must mend.
        raise group.exceptions[0] from None


def host_of(url: str) -> str:
    """The host that a URL names, in small letters. Raises `Rejected` ``bad-url`` or ``bad-scheme``."""
    try:
        url.encode()
        parts = urlsplit(url)
        _ = parts.port
        host = parts.hostname
    except ValueError as error:
        raise Rejected("bad-url", f"the URL cannot be read: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise Rejected("bad-scheme", f"{parts.scheme or 'no scheme'}: only http and https are fetched")
    if not host or parts.username is not None or parts.password is not None or not url.isprintable():
        raise Rejected("bad-url", "the URL has no host, or a user, or characters that no URL has")
    return host


def seconds_asked_for(headers: Mapping[str, str], now: datetime) -> float:
    """What ``Retry-After`` says, as seconds or as a date (RFC 9110, 10.2.3); 0 where it says nothing."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        date = parsedate_to_datetime(value)
        date = date.replace(tzinfo=date.tzinfo or UTC)
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, (date - now).total_seconds())


async def _visit_all(visits: Iterable[Visit], settings: WebSettings, take: Callable[[Visit], None]) -> None:
    hosts: dict[str, deque[Visit]] = {}
    for visit in visits:
        hosts.setdefault(host_of(visit.url), deque()).append(visit)

    async def stay(web: _Web, host: deque[Visit], robots: asyncio.Lock) -> None:
        while host:
            visit = host.popleft()
            async with web.gate:
                await web.make(visit, robots)
                await asyncio.to_thread(take, visit)
                visit.data = b""

    async with _Web(settings) as web, asyncio.TaskGroup() as tasks:
        for host in hosts.values():
            robots = asyncio.Lock()
            for _ in range(min(settings.connections_per_host, len(host))):
                tasks.create_task(stay(web, host, robots))


@dataclass
class _Answer:
    status: int
    headers: Mapping[str, str]
    directives: set[str]
    """Of `WebSettings.disallowed_directives` those that it has."""
    body: bytes
    """Of status 200 alone; one byte too much where there is more than was allowed."""


class _Web:
    """One client of all hosts. ``gate`` bounds what is under way; what only waits lets others through."""

    def __init__(self, settings: WebSettings) -> None:
        self.settings = settings
        self.gate = asyncio.Semaphore(settings.connections)
        self._robots: dict[str, Robots | Rejected] = {}
        self._hosts: dict[str, asyncio.Semaphore] = {}
        """A robots.txt may lie on another host, which has visitors of its own."""

    async def __aenter__(self) -> Self:
        settings = self.settings
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # the gate's
                resolver=aiohttp.ThreadedResolver(),
                socket_factory=None if settings.allow_private_addresses else public_socket,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Nothing is decompressed: what is small here would be of any size there.
            auto_decompress=False,
            headers={"User-Agent": settings.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(
                total=settings.total_seconds, connect=settings.connect_seconds, sock_read=settings.read_seconds
            ),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def make(self, visit: Visit, robots: asyncio.Lock) -> None:
        """Fill in what comes of a visit. ``robots`` is its host's: one visitor asks for robots.txt."""
        visit.final_url = visit.url
        try:
            while not visit.moved:
                await self._ask_robots(visit.final_url, robots)
                answer = await self._ask(visit.final_url, self.settings.max_bytes, visit)
                if answer.directives:
                    said = ", ".join(sorted(answer.directives))
                    raise Rejected("header-disallowed", f"the server says X-Robots-Tag: {said}")
                if answer.status not in _REDIRECTS:
                    visit.data = self._content(answer)
                    return
                visit.redirects += 1
                if visit.redirects > self.settings.max_redirects:
                    raise Rejected("too-many-redirects", f"more than {self.settings.max_redirects} redirects")
                before, visit.final_url = host_of(visit.final_url), _target(visit.final_url, answer)
                visit.moved = host_of(visit.final_url) != before
        except Rejected as error:
            visit.error = error

    def _content(self, answer: _Answer) -> bytes:
        status = answer.status
        if status in (404, 410):
            raise Rejected("not-found", f"HTTP {status}")
        if status in (401, 403, 451):
            raise Rejected("forbidden", f"HTTP {status}")
        if status == 206:
            raise Rejected("partial-answer", "HTTP 206: the server sends a part of a file of which all was asked for")
        if status != 200:
            raise Rejected("http-error", f"HTTP {status}")
        if (encoding := _encoding(answer.headers)) != "identity":
            raise Rejected("encoded-answer", f"the answer has Content-Encoding {encoding[:20]}, which nobody asked for")
        if len(answer.body) > self.settings.max_bytes:
            raise Rejected("too-large", f"more than {self.settings.max_bytes} bytes")
        return answer.body

    async def _ask_robots(self, url: str, lock: asyncio.Lock) -> None:
        """Raise `Rejected` where robots.txt disallows a URL, or cannot be had."""
        if not self.settings.robots:
            return
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        if origin not in self._robots:
            async with self._waiting():
                await lock.acquire()
            try:
                if origin not in self._robots:
                    self._robots[origin] = await self._fetch_robots(f"{origin}/robots.txt")
            finally:
                lock.release()
        found = self._robots[origin]
        if isinstance(found, Rejected):
            raise found
        if not found.allow(url):
            raise Rejected("robots-disallowed", f"robots.txt of {parts.netloc} disallows it")

    async def _fetch_robots(self, url: str) -> Robots | Rejected:
        """RFC 9309, 2.3.1: what is not there allows everything, and what cannot be reached nothing."""
        for _ in range(_ROBOTS_REDIRECTS + 1):
            try:
                answer = await self._ask(url, MOST_BYTES)
                if answer.status not in _REDIRECTS:
                    # Compressed rules cannot be read; they are not taken for none.
                    unread = answer.status == 200 and _encoding(answer.headers) != "identity"
                    return Robots(b"User-agent: *\nDisallow: /" if unread else answer.body, self.settings.token)
                url = _target(url, answer)
                host_of(url)
            except Rejected as error:
                if error.transient:
                    what = f"{url} cannot be had, so that nothing may be fetched: {error.message}"
                    return Rejected("robots-unreachable", what, transient=True)
                if error.reason in ("private-address", "no-such-host"):
                    return error
                break
        return Robots(b"", self.settings.token)

    async def _ask(self, url: str, limit: int, visit: Visit | None = None) -> _Answer:
        """The answer, whatever its status, where that will be the same next time. Raises `Rejected`."""
        settings = self.settings
        for attempt in range(settings.attempts):
            asked_for = 0.0
            if visit is not None:
                visit.requests += 1
            try:
                answer = await self._request(url, limit, heeding=visit is not None)
                if visit is not None:
                    visit.http = answer.status
                if answer.status < 500 and answer.status not in _PASSING:
                    return answer
                rejected, again = Rejected("http-error", f"HTTP {answer.status}", transient=True), True
                asked_for = seconds_asked_for(answer.headers, datetime.now(UTC))
            except (aiohttp.ClientError, TimeoutError, UnicodeError, OSError) as error:
                rejected, again = _meaning(error)
            if not again or attempt == settings.attempts - 1 or asked_for > settings.longest_retry_after:
                raise rejected
            backoff = random.Random().uniform(0, min(settings.backoff_seconds * 2**attempt, LONGEST_WAIT))
            async with self._waiting():
                await asyncio.sleep(max(asked_for, backoff))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _request(self, url: str, limit: int, heeding: bool) -> _Answer:
        heeded = self.settings.disallowed_directives if heeding else ()
        host = self._hosts.setdefault(host_of(url), asyncio.Semaphore(self.settings.connections_per_host))
        async with host, self._session.get(url, allow_redirects=False) as response:
            found = directives(response.headers.getall("X-Robots-Tag", []), self.settings.token)
            disallowed = found.intersection(heeded)
            answer = _Answer(response.status, response.headers, disallowed, b"")
            if response.status == 200 and not disallowed and _encoding(response.headers) == "identity":
                body = bytearray()
                async for chunk in response.content.iter_any():
                    body += chunk[: limit + 1 - len(body)]
                    if len(body) > limit:
                        break
                answer.body = bytes(body)
            # Whatever else it would send is not waited for.
            if not response.content.at_eof():
                response.close()
            return answer

    @contextlib.asynccontextmanager
    async def _waiting(self) -> AsyncIterator[None]:
        self.gate.release()
        try:
            yield
        finally:
            await self.gate.acquire()


def _encoding(headers: Mapping[str, str]) -> str:
    return headers.get("Content-Encoding", "").strip().lower() or "identity"


def _target(url: str, answer: _Answer) -> str:
    location = answer.headers.get("Location")
    if not location:
        raise Rejected("http-error", f"HTTP {answer.status} without a Location")
    try:
        location.encode()  # bytes that are no text would end up in a note and in tables
        return urldefrag(urljoin(url, location)).url
    except ValueError as error:
        raise Rejected("bad-url", f"a redirect leads nowhere: {error}") from None


def _meaning(error: Exception) -> tuple[Rejected, bool]:
    """What an exception of a request means, and whether it may be gone in a moment. Raises a fault of this machine."""
    said = " ".join(str(error).split()) or type(error).__name__
    code = getattr(getattr(error, "os_error", error), "errno", None)
    if code in OUR_MACHINE:
        raise error
    if isinstance(error, TimeoutError):
        return Rejected("time-out", f"it took too long ({said})", transient=True), True
    if PRIVATE in said:
        return Rejected("private-address", f"{said}; the setting allow_private_addresses permits it"), False
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        gone = code in _NO_SUCH_NAME
        return Rejected("no-such-host" if gone else "http-error", said, transient=not gone), not gone
    if isinstance(error, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError | UnicodeError):
        return Rejected("bad-url", f"no host can be asked: {said}"), False
    if isinstance(error, aiohttp.ClientPayloadError):
        return Rejected("truncated-answer", f"the answer ends early: {said}", transient=True), True
    certificate = isinstance(error, aiohttp.ClientSSLError | aiohttp.ClientConnectorCertificateError)
    lost = isinstance(error, aiohttp.ClientConnectionError | OSError)
    return Rejected("http-error", said, transient=True), lost and not certificate
