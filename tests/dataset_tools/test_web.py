"""Visits against a server on loopback that does everything a stranger's may."""

from __future__ import annotations

import asyncio
import errno
import gzip
import socket
import threading
from datetime import UTC, datetime
from typing import Any

import pytest

from dataset_tools import web
from dataset_tools.web import Visit, WebSettings, host_of, seconds_asked_for, visit_all

FAST = WebSettings(attempts=3, backoff_seconds=0, allow_private_addresses=True)
NEVER = FAST.model_copy(update={"attempts": 1, "allow_private_addresses": False})


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between tries, which take no time: those in the test's thread, as others wait for something else."""
    waited: list[float] = []
    sleep, here = asyncio.sleep, threading.get_ident()

    async def noted(seconds: float, result: Any = None) -> Any:
        if threading.get_ident() != here:
            return await sleep(seconds, result)
        if seconds:
            waited.append(seconds)
        return await sleep(0, result)

    monkeypatch.setattr(asyncio, "sleep", noted)
    return waited


def visit(*urls: str, settings: WebSettings = FAST) -> list[Visit]:
    """Each visit with a copy of its data, in the order of the URLs."""
    data: dict[str, bytes] = {}
    visits = [Visit(url) for url in urls]
    visit_all(visits, settings, lambda each: data.update({each.url: each.data}))
    assert set(data) == set(urls)
    for each in visits:
        each.data = data[each.url]
    return visits


def reason(visited: Visit) -> tuple[str, bool]:
    assert visited.error is not None and not visited.data
    return visited.error.reason, visited.error.transient


def test_a_file_comes_whole_and_the_server_is_told_who_asks(strangers: Any) -> None:
    strangers.answers["/a"] = b"x" * 300_000
    settings = FAST.model_copy(update={"user_agent": "mild/1.0 (+https://example.org/bot)"})
    (found,) = visit(strangers.url("/a"), settings=settings)
    assert (found.data, found.error, found.http, found.requests) == (b"x" * 300_000, None, 200, 1)
    assert strangers.agents == {"mild/1.0 (+https://example.org/bot)"}


BOMB = gzip.compress(bytes(1_000_000), mtime=0)
"""A kilobyte that becomes a megabyte."""


@pytest.mark.parametrize(
    ("path", "limit", "why", "asked"),
    [
        ("/silent", {"read_seconds": 0.1}, ("time-out", True), 3),
        ("/slow", {"read_seconds": 0.1}, ("time-out", True), 3),
        ("/drip", {"total_seconds": 0.2}, ("time-out", True), 3),
        ("/cut", {}, ("truncated-answer", True), 3),
        ("/endless", {"max_bytes": 100_000}, ("too-large", False), 1),
    ],
)
def test_a_server_that_gives_no_end_is_left(
    strangers: Any, path: str, limit: dict[str, float], why: tuple[str, bool], asked: int
) -> None:
    settings = FAST.model_copy(update={"robots": False, **limit})
    (found,) = visit(strangers.url(path), settings=settings)
    assert reason(found) == why
    assert len(strangers.asked) == found.requests == asked


@pytest.mark.parametrize(
    ("answer", "why", "asked"),
    [
        (404, ("not-found", False), 1),
        (410, ("not-found", False), 1),
        (401, ("forbidden", False), 1),
        (403, ("forbidden", False), 1),
        (451, ("forbidden", False), 1),
        (418, ("http-error", False), 1),
        (204, ("http-error", False), 1),
        (429, ("http-error", True), 3),
        (503, ("http-error", True), 3),
        ((302, {}, b""), ("http-error", False), 1),
        ((206, {"Content-Range": "bytes 0-2/9"}, b"abc"), ("partial-answer", False), 1),
        ((200, {"Content-Encoding": "gzip"}, BOMB), ("encoded-answer", False), 1),
        ((200, {"X-Robots-Tag": "noindex, NoAI"}, b"x"), ("header-disallowed", False), 1),
        ((200, {"X-Robots-Tag": "mild: noimageai"}, b"x"), ("header-disallowed", False), 1),
        (b"x" * 1001, ("too-large", False), 1),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_answer_that_is_not_taken_has_its_reason(
    strangers: Any, answer: Any, why: tuple[str, bool], asked: int
) -> None:
    strangers.answers["/a"] = answer
    settings = FAST.model_copy(update={"max_bytes": 1000})
    (found,) = visit(strangers.url("/a"), settings=settings)
    assert reason(found) == why
    assert len(strangers.asked) == asked
    assert found.http == (answer if isinstance(answer, int) else 200 if isinstance(answer, bytes) else answer[0])


def test_files_of_just_the_limit_and_directives_for_others_are_no_hindrance(strangers: Any) -> None:
    strangers.answers["/a"] = (200, {"X-Robots-Tag": "otherbot: noai", "Content-Encoding": "identity"}, b"x" * 1000)
    strangers.answers["/b"] = (200, {"X-Robots-Tag": "noai"}, b"y")
    (first,) = visit(strangers.url("/a"), settings=FAST.model_copy(update={"max_bytes": 1000}))
    (second,) = visit(strangers.url("/b"), settings=FAST.model_copy(update={"disallowed_directives": ()}))
    assert (first.data, second.data) == (b"x" * 1000, b"y")


def test_a_busy_server_is_asked_again_when_it_says(strangers: Any, waits: list[float]) -> None:
    busy = (429, {"Retry-After": "7"}, b"")
    strangers.answers["/a"] = [busy, (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b""), b"x"]
    (found,) = visit(strangers.url("/a"))
    assert (found.data, found.requests, waits) == (b"x", 3, [7.0])


def test_a_server_that_asks_for_too_long_a_wait_is_left_to_the_next_run(strangers: Any, waits: list[float]) -> None:
    strangers.answers["/a"] = (503, {"Retry-After": "301"}, b"")
    (found,) = visit(strangers.url("/a"))
    assert (reason(found), found.requests, waits) == (("http-error", True), 1, [])


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120),
        ("Wed, 21 Oct 2015 07:30:00 GMT", 120),
        ("Wed, 21 Oct 2015 07:00:00 GMT", 0),
        ("soon", 0),
        ("-5", 0),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", 0),
        ("Mon, 01 Jan 2024 00:00:00 +99999999999999999999", 0),
        ("9" * 5000, 999_999_999),
        ("", 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float) -> None:
    assert seconds_asked_for({"Retry-After": value}, datetime(2015, 10, 21, 7, 28, tzinfo=UTC)) == seconds


def test_no_host_has_more_visitors_than_its_bound_and_all_hosts_no_more_than_theirs(strangers: Any) -> None:
    """The path lets requests through in pairs only: with fewer than two at once it would stay."""
    urls = [strangers.url(f"/together/{number}", "a.example") for number in range(6)]
    others = [strangers.url(f"/{number}", host) for host in ("b.example", "c.example") for number in range(6)]
    settings = FAST.model_copy(update={"connections_per_host": 2})
    assert all(found.data == b"x" for found in visit(*urls, settings=settings))
    assert (strangers.most["a.example"], strangers.most[""]) == (2, 2)
    visit(*others, settings=settings.model_copy(update={"connections": 3}))
    assert max(strangers.most["b.example"], strangers.most["c.example"]) <= 2
    assert strangers.most[""] <= 3


def test_the_bound_holds_for_robots_txt_that_lies_on_another_host(strangers: Any) -> None:
    """Eight hosts all have theirs on z.example, which lets requests through in pairs."""
    hosts = [f"h{number}.example" for number in range(8)]
    for host in hosts:
        strangers.robots[host] = (302, {"Location": strangers.url("/together", "z.example")}, b"")
        strangers.answers["/a"] = b"x"
    assert all(found.data == b"x" for found in visit(*(strangers.url("/a", host) for host in hosts)))
    assert (strangers.most["z.example"], strangers.asked.count("z.example/together")) == (2, 8)


def test_who_waits_for_one_host_keeps_nobody_from_another(strangers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection in all: while a.example asks for patience, b.example is visited."""
    strangers.answers |= {"/a": [(503, {"Retry-After": "9"}, b""), b"x"], "/b": b"y"}
    there = asyncio.sleep

    async def until_the_other_was_asked(seconds: float, result: Any = None) -> Any:
        while seconds and "b.example/b" not in strangers.asked:
            await there(0.001)
        return await there(0, result)

    monkeypatch.setattr(asyncio, "sleep", until_the_other_was_asked)
    settings = FAST.model_copy(update={"connections": 1})
    found = visit(strangers.url("/a"), strangers.url("/b", "b.example"), settings=settings)
    assert [each.data for each in found] == [b"x", b"y"]


def test_redirects_are_followed_on_their_host_and_end_a_visit_elsewhere(strangers: Any) -> None:
    strangers.answers |= {
        "/a": (302, {"Location": "/b#part"}, b"a"),
        "/b": b"b",
        "/c": (301, {"Location": strangers.url("/b", "b.example")}, b""),
        "/loop": (307, {"Location": "/loop"}, b""),
        "/file": (302, {"Location": "file:///etc/passwd"}, b""),
        "/bad": (302, {"Location": "http://[/"}, b""),
        "/user": (302, {"Location": "http://me:word@b.example/"}, b""),
    }
    names = ("/a", "/c", "/loop", "/file", "/bad", "/user")
    here, elsewhere, *others = visit(*(strangers.url(name) for name in names))
    assert (here.data, here.redirects, here.final_url) == (b"b", 1, strangers.url("/b"))
    assert (elsewhere.moved, elsewhere.final_url) == (True, strangers.url("/b", "b.example"))
    reasons = [reason(each)[0] for each in others]
    assert reasons == ["too-many-redirects", "bad-scheme", "bad-url", "bad-url"]
    assert strangers.asked.count("a.example/loop") == 6
    assert not any(asked.startswith("b.example") for asked in strangers.asked)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f000001", "[::ffff:127.0.0.1]", "pr.example"])
def test_private_addresses_are_refused_however_they_are_written_or_named(strangers: Any, host: str) -> None:
    """``pr.example`` is a name of which DNS says that it is at 127.0.0.1."""
    for robots in (True, False):
        settings = NEVER.model_copy(update={"robots": robots})
        (found,) = visit(f"http://{host}:{strangers.server_port}/a", settings=settings)
        assert reason(found) == ("private-address", False)
    assert strangers.asked == strangers.robots_asked == []


def test_every_connection_is_looked_at_whatever_dns_said_before(
    strangers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the name is public when it is looked up first, and private from then on."""
    addresses, connected = iter(["8.8.8.8"]), list[str]()
    check = web.public_socket

    def rebound(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(addresses, "127.0.0.1"), port))]

    def seen(address: Any) -> Any:
        connected.append(address[4][0])
        check(address).close()
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(socket, "getaddrinfo", rebound)
    monkeypatch.setattr(web, "public_socket", seen)
    settings = NEVER.model_copy(update={"robots": False})
    first, second = (visit(strangers.url("/a", "re.example"), settings=settings)[0] for _ in range(2))
    assert (reason(first), reason(second)) == (("http-error", True), ("private-address", False))
    assert (connected, strangers.asked) == (["8.8.8.8", "127.0.0.1"], [])


def test_redirects_to_private_addresses_are_refused(strangers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first connection is let through, as to a public address; the server closes it, and the second is not."""
    check, seen = web.public_socket, list[str]()

    def first_is_public(address: Any) -> Any:
        seen.append(address[4][0])
        return check(address) if len(seen) > 1 else socket.socket(*address[:3])

    strangers.answers["/a"] = (302, {"Location": strangers.url("/b"), "Connection": "close"}, b"")
    strangers.answers["/b"] = b"secret"
    monkeypatch.setattr(web, "public_socket", first_is_public)
    (found,) = visit(strangers.url("/a"), settings=NEVER.model_copy(update={"robots": False}))
    assert reason(found) == ("private-address", False)
    assert strangers.asked == ["a.example/a"]


def test_a_host_that_is_not_there_is_settled_and_a_server_that_is_not_may_come_back(strangers: Any) -> None:
    gone, empty = visit(strangers.url("/a", "gone.example"), "http://127.0.0.1:9/a")
    assert reason(gone) == ("no-such-host", False)
    assert reason(empty) == ("robots-unreachable", True)


def test_robots_txt_is_asked_for_once_a_host_and_heeded(strangers: Any) -> None:
    strangers.answers |= {"/open/a": b"x", "/closed/a": b"y", "/closed/b": b"z"}
    strangers.robots["a.example"] = b"User-agent: Mild\nDisallow: /closed\n\nUser-agent: *\nDisallow: /"
    urls = [strangers.url(path) for path in ("/open/a", "/closed/a", "/closed/b")]
    settings = FAST.model_copy(update={"user_agent": "mild/2 (by us)"})
    opened, *closed = visit(*urls, settings=settings)
    assert opened.data == b"x"
    assert [reason(each) for each in closed] == [("robots-disallowed", False)] * 2
    assert (strangers.robots_asked, strangers.asked) == (["a.example"], ["a.example/open/a"])
    assert visit(urls[1], settings=FAST.model_copy(update={"robots": False}))[0].data == b"y"


@pytest.mark.parametrize(
    ("answer", "allowed"),
    [
        (404, True),
        (403, True),
        ((200, {"X-Robots-Tag": "noai"}, b"user-agent: *\ndisallow: /b"), True),
        ((200, {"X-Robots-Tag": "noai"}, b"user-agent: *\ndisallow: /a"), False),
        ((302, {"Location": "/open/rules"}, b""), False),
        ((302, {"Location": "/robots.txt"}, b""), True),
        ((200, {"Content-Encoding": "gzip"}, gzip.compress(b"", mtime=0)), False),
        (b"<html>", True),
    ],
    ids=str,
)
def test_a_robots_txt_that_is_not_there_allows_all_and_one_elsewhere_is_read(
    strangers: Any, answer: Any, allowed: bool
) -> None:
    strangers.answers |= {"/a": b"x", "/open/rules": b"user-agent: *\ndisallow: /a"}
    strangers.robots["a.example"] = answer
    (found,) = visit(strangers.url("/a"))
    assert (found.data == b"x") is allowed
    assert allowed or reason(found) == ("robots-disallowed", False)


@pytest.mark.parametrize("answer", [500, 503, 429])
def test_a_robots_txt_that_cannot_be_had_allows_nothing_until_the_next_run(strangers: Any, answer: int) -> None:
    strangers.answers |= {"/a": b"x", "/b": b"y"}
    strangers.robots["a.example"] = answer
    found = visit(strangers.url("/a"), strangers.url("/b"))
    assert [reason(each) for each in found] == [("robots-unreachable", True)] * 2
    assert (len(strangers.robots_asked), strangers.asked) == (3, [])


def test_a_fault_of_this_machine_is_raised_and_no_visit_goes_on(strangers: Any) -> None:
    strangers.answers["/a"] = b"x"

    def full(each: Visit) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        visit_all([Visit(strangers.url("/a")), Visit(strangers.url("/silent"))], FAST, full)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://a.example/x", "bad-scheme"),
        ("/x", "bad-scheme"),
        ("http:///x", "bad-url"),
        ("http://me@a.example/", "bad-url"),
        ("http://a.example:port/", "bad-url"),
        ("http://a.example:99999/", "bad-url"),
        ("http://[::1/", "bad-url"),
        ("http://a.example/\x00", "bad-url"),
        ("http://a.example/\udcff", "bad-url"),
    ],
)
def test_urls_that_cannot_be_asked_for_have_their_reason(url: str, why: str) -> None:
    with pytest.raises(web.Rejected) as caught:
        host_of(url)
    assert caught.value.reason == why


def test_a_host_is_one_however_it_is_written() -> None:
    assert host_of("HTTPS://A.Example:8080/B") == host_of("http://a.example/") == "a.example"
