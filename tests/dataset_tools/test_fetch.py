"""Fetching against a real server on loopback, and the bounds of the ordered map."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from fsspec.implementations.memory import MemoryFileSystem
from s3fs.errors import translate_boto_error

from dataset_tools import fetch
from dataset_tools.errors import Rejected, UserError
from dataset_tools.fetch import FetchSettings, copy_file, list_folder, look_up, map_in_order, read_bytes, with_retries

BODY = bytes(range(256)) * 40
LOCAL = FetchSettings(attempts=3, backoff_seconds=0, timeout_seconds=5, allow_private_addresses=True)


class Server(ThreadingHTTPServer):
    """Answers by path and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.sent = 0
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up early are the point of some tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        name = self.path.strip("/")
        times = self.server.asked.count(self.path)
        if name == "good" and (wanted := self.headers.get("Range")):
            start, end = map(int, wanted.removeprefix("bytes=").split("-"))
            self._answer(206, BODY[start : end + 1])
        elif name in ("good", "deaf"):
            self._answer(200, BODY)
        elif name == "busy":
            self._answer(200 if times == 3 else 429 if times == 1 else 503, BODY)
        elif name == "hangs":
            self.server.closing.wait(30)
        elif name == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(2 * len(BODY)))
            self.end_headers()
            self.wfile.write(BODY)
        elif name == "endless":
            self.send_response(200)
            self.end_headers()
            while not self.server.closing.is_set():
                self.server.sent += self.wfile.write(BODY)
        elif name.startswith("to="):
            self.send_response(302)
            self.send_header("Location", name.removeprefix("to="))
            self.end_headers()
        else:
            self._answer(int(name), b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def refusal(url: str, settings: FetchSettings) -> Rejected:
    with pytest.raises(Rejected) as caught:
        read_bytes(url, settings)
    return caught.value


def test_a_file_is_the_same_from_everywhere(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(BODY)
    fsspec.filesystem("memory").pipe_file("/fetch/file", BODY)
    for url in (f"{server.url}/good", str(tmp_path / "file"), f"file://{tmp_path}/file", "memory://fetch/file"):
        assert read_bytes(url, LOCAL) == BODY
        assert read_bytes(url, LOCAL, span=(100, 300)) == BODY[100:300]


def test_a_span_is_cut_out_where_the_server_knows_no_ranges(server: Server) -> None:
    assert read_bytes(f"{server.url}/deaf", LOCAL, span=(100, 300)) == BODY[100:300]


def test_a_busy_server_is_asked_again(server: Server) -> None:
    """429, then 503, then the file."""
    assert read_bytes(f"{server.url}/busy", LOCAL) == BODY
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("status", "reason", "asked", "transient"),
    [
        (404, "not-found", 1, False),
        (410, "not-found", 1, False),
        (401, "forbidden", 1, True),
        (403, "forbidden", 1, True),
        (418, "http-error", 1, True),
        (429, "http-error", 3, True),
        (500, "http-error", 3, True),
    ],
)
def test_a_status_has_its_reason_and_only_some_are_tried_again(
    server: Server, status: int, reason: str, asked: int, transient: bool
) -> None:
    rejected = refusal(f"{server.url}/{status}", LOCAL)
    assert (rejected.reason, rejected.transient) == (reason, transient)
    assert f"HTTP {status}" in rejected.message
    assert len(server.asked) == asked


def test_a_server_that_hangs_is_left(server: Server) -> None:
    rejected = refusal(f"{server.url}/hangs", LOCAL.model_copy(update={"timeout_seconds": 0.05}))
    assert (rejected.reason, rejected.transient) == ("time-out", True)
    assert len(server.asked) == 3


def test_a_lost_connection_is_transient(server: Server) -> None:
    """Half a body is never taken for the file."""
    rejected = refusal(f"{server.url}/cut", LOCAL)
    assert (rejected.reason, rejected.transient) == ("http-error", True)
    assert len(server.asked) == 3


def test_nobody_there_is_transient() -> None:
    with Server() as gone:
        url = gone.url
    rejected = refusal(f"{url}/good", LOCAL)
    assert (rejected.reason, rejected.transient) == ("http-error", True)


def test_files_beyond_the_limit_are_refused_and_not_read_to_the_end(server: Server, tmp_path: Path) -> None:
    """An endless answer ends; a file of just the limit is taken."""
    (tmp_path / "file").write_bytes(BODY)
    tight = LOCAL.model_copy(update={"max_bytes": len(BODY) - 1})
    for url in (f"{server.url}/good", f"{server.url}/endless", str(tmp_path / "file")):
        assert refusal(url, tight).reason == "too-large"
    exact = LOCAL.model_copy(update={"max_bytes": len(BODY)})
    assert read_bytes(f"{server.url}/good", exact) == BODY
    assert read_bytes(str(tmp_path / "file"), exact) == BODY


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f000001"])
def test_private_addresses_are_refused_unless_allowed(server: Server, host: str) -> None:
    """However the address is written, and also behind another file system; no request reaches the server."""
    url = f"http://{host}:{server.server_port}/good"
    rejected = refusal(url, FetchSettings(backoff_seconds=0))
    assert (rejected.reason, rejected.transient) == ("private-address", True)
    assert "allow_private_addresses" in rejected.message
    refusal(f"simplecache::{url}", FetchSettings(backoff_seconds=0))
    assert server.asked == []
    assert read_bytes(url, LOCAL) == BODY


@pytest.mark.parametrize("address", ["10.0.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"])
def test_addresses_of_private_networks_and_of_cloud_metadata_are_refused(address: str) -> None:
    """Nothing is sent: the answer does not depend on the network."""
    assert refusal(f"http://{address}/x", FetchSettings(attempts=1)).reason == "private-address"


def socket_for(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return fetch.public_socket((family, socket.SOCK_STREAM, 0, "", (address, 80)))


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "224.0.0.1", "240.0.0.1", "::1", "fd00::1", "fe80::1", "fec0::1", "ff02::1"),
        # IPv4 addresses in IPv6: mapped, compatible, 6to4, NAT64.
        *("::ffff:10.0.0.1", "::7f00:1", "2002:7f00:1::", "64:ff9b::a9fe:a9fe"),
    ],
)
def test_no_address_that_leads_to_a_private_network_is_connected_to(address: str) -> None:
    with pytest.raises(OSError, match=fetch.PRIVATE):
        socket_for(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "64:ff9b::808:808", "2002:808:808::1"])
def test_public_addresses_may_be_connected_to(address: str) -> None:
    socket_for(address).close()


def test_redirects_to_private_addresses_are_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection is checked: here the first is let through, as to a public address, and the second is not."""
    check = fetch.public_socket
    seen: list[str] = []

    def first_is_public(address: tuple[Any, ...]) -> socket.socket:
        seen.append(address[4][0])
        return check(address) if len(seen) > 1 else socket.socket(*address[:3])

    monkeypatch.setattr(fetch, "public_socket", first_is_public)
    # A time-out that no other test has: fsspec keeps sessions by their settings.
    strict = FetchSettings(attempts=1, timeout_seconds=4.75)
    rejected = refusal(f"{server.url}/to=http://localhost:{server.server_port}/good", strict)
    assert rejected.reason == "private-address"
    assert len(seen) > 1
    assert len(server.asked) == 1


def test_local_failures_have_reasons(tmp_path: Path) -> None:
    assert refusal(str(tmp_path / "none"), LOCAL).reason == "not-found"
    assert refusal("memory://fetch/none", LOCAL).reason == "not-found"
    assert refusal(str(tmp_path), LOCAL).reason == "unreadable"
    assert refusal("no-such-protocol://x", LOCAL).reason == "unreadable"


class Faulty(MemoryFileSystem):
    """Raises what s3fs makes of S3's answers (s3fs.errors.ERROR_CODE_TO_EXCEPTION)."""

    protocol = "faulty"
    faults: tuple[Exception, ...] = ()
    asked = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        Faulty.asked += 1
        if Faulty.asked <= len(self.faults):
            raise self.faults[Faulty.asked - 1]
        return BODY


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ((OSError(errno.EBUSY, "Please reduce your request rate."),), None),
        ((ConnectionResetError(), TimeoutError()), None),
        ((ConnectionResetError(),) * 3, "unreadable"),
        ((TimeoutError(),) * 3, "time-out"),
        ((PermissionError("Access Denied"),), "forbidden"),
        ((FileNotFoundError("The specified key does not exist."),), "not-found"),
    ],
)
def test_s3_is_asked_again_when_it_throttles(
    monkeypatch: pytest.MonkeyPatch, faults: tuple[Exception, ...], reason: str | None
) -> None:
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    monkeypatch.setattr(Faulty, "faults", faults)
    monkeypatch.setattr(Faulty, "asked", 0)
    if reason is None:
        assert read_bytes("faulty://x", LOCAL) == BODY
        assert Faulty.asked == len(faults) + 1
    else:
        assert refusal("faulty://x", LOCAL).reason == reason
        assert Faulty.asked == len(faults)


def test_an_empty_object_on_s3_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 refuses every range of it."""
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    unsatisfiable = OSError(errno.EINVAL, "The requested range is not satisfiable")
    monkeypatch.setattr(Faulty, "faults", (unsatisfiable,))
    monkeypatch.setattr(Faulty, "asked", 0)
    assert read_bytes("faulty://x", LOCAL) == b""


@pytest.mark.parametrize(
    "fault",
    [
        TypeError("cat_file() takes 1 argument"),
        KeyError("ETag"),
        MemoryError(),
        AssertionError("never"),
        AttributeError("'NoneType' object has no attribute 'get'"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EMFILE, "Too many open files"),
    ],
    ids=repr,
)
def test_a_fault_of_ours_is_raised_and_never_a_rejection(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    """A defect, no memory, a full disk: no picture is to blame, and trying again at once changes nothing."""
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    monkeypatch.setattr(Faulty, "faults", (fault,) * 3)
    monkeypatch.setattr(Faulty, "asked", 0)
    with pytest.raises(type(fault)) as caught:
        read_bytes("faulty://x", LOCAL)
    assert not isinstance(caught.value, Rejected)
    assert Faulty.asked == 1


def s3_error(code: str) -> Exception:
    """What s3fs raises for an answer of S3."""
    answer: Any = {"Error": {"Code": code, "Message": f"The specified thing: {code}"}}
    error: Exception = translate_boto_error(ClientError(answer, "GetObject"))
    return error


@pytest.mark.parametrize(
    ("fault", "reason", "transient"),
    [
        (s3_error("NoSuchKey"), "not-found", False),
        (s3_error("NoSuchBucket"), "no-such-bucket", True),
        (s3_error("AccessDenied"), "forbidden", True),
        (s3_error("SomethingNew"), "unreadable", True),
        (EndpointConnectionError(endpoint_url="http://nowhere"), "unreadable", True),
        (socket.gaierror(-2, "Name or service not known"), "unreadable", True),
        (ConnectionRefusedError(), "unreadable", True),
        (RuntimeError("Session is closed"), "unreadable", True),
        (ValueError("whatever"), "unreadable", True),
        (IsADirectoryError("x"), "unreadable", True),
    ],
    ids=repr,
)
def test_only_a_file_that_is_not_there_is_settled(
    monkeypatch: pytest.MonkeyPatch, fault: Exception, reason: str, transient: bool
) -> None:
    """All else may be the fault of the run, and a later one tries again."""
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    monkeypatch.setattr(Faulty, "faults", (fault,) * 3)
    monkeypatch.setattr(Faulty, "asked", 0)
    rejected = refusal("faulty://x", LOCAL)
    assert (rejected.reason, rejected.transient) == (reason, transient)


@pytest.mark.parametrize("fault", [s3_error("InvalidAccessKeyId"), s3_error("400"), NoCredentialsError()], ids=repr)
def test_credentials_that_open_nothing_are_told_once_and_no_file_is_to_blame(
    monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    monkeypatch.setattr(Faulty, "faults", (fault,) * 3)
    monkeypatch.setattr(Faulty, "asked", 0)
    with pytest.raises(UserError, match=r"faulty://x: .*(AWS_ACCESS_KEY_ID|renew the credentials)"):
        read_bytes("faulty://x", LOCAL)
    assert Faulty.asked == 1


def test_a_folder_that_is_missing_as_a_whole_settles_no_picture(tmp_path: Path) -> None:
    """Mistyped, or not mounted."""
    for url in (f"{tmp_path}/typo/1.jpg", f"file://{tmp_path}/typo/1.jpg"):
        rejected = refusal(url, LOCAL)
        assert (rejected.reason, rejected.transient) == ("no-such-folder", True)
    assert not refusal(f"{tmp_path}/1.jpg", LOCAL).transient


def test_a_server_without_ranges_is_not_read_up_to_a_far_span(server: Server) -> None:
    """The span lies behind what may be read at most; the answer has no end."""
    tight = LOCAL.model_copy(update={"max_bytes": 3 * len(BODY)})
    for name in ("endless", "deaf"):
        with pytest.raises(Rejected, match="ignores range requests") as caught:
            read_bytes(f"{server.url}/{name}", tight, span=(600_000_000, 600_000_100))
        assert (caught.value.reason, caught.value.transient) == ("no-ranges", True)
    assert server.sent < 50_000_000


@pytest.mark.parametrize("scheme", ["", "simplecache::"])
def test_options_of_the_user_reach_the_pictures(serve_files: Callable[..., Any], tmp_path: Path, scheme: str) -> None:
    """Those of the client beside our own, also behind another file system, and a number as time-out."""
    (tmp_path / "picture").write_bytes(BODY)
    server = serve_files(tmp_path, demands={"X-Mirror": "open"})
    options: dict[str, Any] = {"client_kwargs": {"headers": {"X-Mirror": "open"}, "timeout": 9}}
    wanted = {"http": options} if scheme else options
    assert read_bytes(f"{scheme}{server.url}/picture", LOCAL, wanted) == BODY
    assert refusal(f"{server.url}/picture", LOCAL).reason == "forbidden"
    guarded = LOCAL.model_copy(update={"allow_private_addresses": False})
    with pytest.raises(Rejected, match="private-address"):
        read_bytes(f"{server.url}/picture", guarded, options)


def test_a_copy_that_its_server_cut_is_none(serve_files: Callable[..., Any], tmp_path: Path) -> None:
    """The answer is sound in itself, and shorter than the file is said to be."""
    (tmp_path / "table.csv").write_bytes(BODY)
    server = serve_files(tmp_path)
    size = look_up(f"{server.url}/table.csv", LOCAL)["size"]
    assert size == len(BODY)
    copy_file(f"{server.url}/table.csv", str(tmp_path / "copy"), size, LOCAL)
    assert (tmp_path / "copy").read_bytes() == BODY
    server.cut = 100
    with pytest.raises(Rejected, match=rf"{len(BODY) - 100} bytes came, of {len(BODY)}") as caught:
        copy_file(f"{server.url}/table.csv", str(tmp_path / "copy"), size, LOCAL)
    assert caught.value.transient
    assert server.asked.count(("GET", "/table.csv")) == 1 + LOCAL.attempts


def test_the_wait_doubles_and_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full jitter: uniform between nothing and the doubled bound."""
    waits: list[float] = []
    monkeypatch.setattr("dataset_tools.fetch.time.sleep", waits.append)

    def fail() -> None:
        raise TimeoutError

    for _ in range(200):
        with pytest.raises(Rejected):
            with_retries(fail, "x", FetchSettings(attempts=3, backoff_seconds=1))
    first, second = waits[::2], waits[1::2]
    assert 0 <= min(first) < 0.2 and 0.8 < max(first) <= 1
    assert 0 <= min(second) < 0.4 and 1.6 < max(second) <= 2


def test_map_keeps_the_order_whatever_finishes_first() -> None:
    """The first item is held back until the last of its batch is done."""
    last = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert last.wait(10)
        if item == 3:
            last.set()
        return item * item

    assert list(map_in_order(work, range(20), workers=4, ahead=4)) == [i * i for i in range(20)]


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (4, 2), (2, 7), (3, 3)])
def test_map_looks_no_further_ahead_than_it_may(workers: int, ahead: int) -> None:
    """Counted at the source: items taken and not yet handed on never exceed the bound, and reach it."""
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(30):
            taken += 1
            yield item

    outstanding = []
    for done, result in enumerate(map_in_order(lambda item: item, items(), workers, ahead)):
        assert result == done
        outstanding.append(taken - done)
    assert max(outstanding) == ahead


def test_map_runs_no_more_than_its_workers_at_once() -> None:
    running, most, lock = 0, 0, threading.Lock()
    both = threading.Barrier(2)

    def work(item: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait(10)
        with lock:
            running -= 1

    list(map_in_order(work, range(10), workers=2, ahead=8))
    assert most == 2


def test_map_hands_on_rejections_and_raises_the_rest() -> None:
    """A rejected item is a value in its place; a defect stops the run and leaves the rest undone."""

    def work(item: int) -> int:
        if item == 1:
            raise Rejected("not-found", "none")
        if item == 3:
            raise ZeroDivisionError
        return item

    results = map_in_order(work, range(100), workers=2, ahead=2)
    assert next(results) == 0
    rejected = next(results)
    assert isinstance(rejected, Rejected) and rejected.reason == "not-found"
    assert next(results) == 2
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_stops_when_its_consumer_does() -> None:
    """Closing the iterator leaves no thread behind and starts no further item."""
    started: list[int] = []
    results = map_in_order(started.append, range(1000), workers=2, ahead=4)
    next(results)
    before = threading.active_count()
    results.close()  # type: ignore[attr-defined]
    assert len(started) <= 8
    assert threading.active_count() <= before


def test_of_a_link_a_listing_tells_what_it_leads_to(tmp_path: Path) -> None:
    """A table behind a link that was edited in place is another, and a linked folder is a folder."""
    (tmp_path / "real").mkdir()
    table = tmp_path / "real/table.csv"
    table.write_text("a,b")
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror/table.csv").symlink_to(table)
    (tmp_path / "mirror/folder").symlink_to(tmp_path / "real")
    (tmp_path / "mirror/gone").symlink_to(tmp_path / "nowhere")
    before = list_folder(str(tmp_path / "mirror"), FetchSettings())
    os.utime(table, (1, 1))
    after = list_folder(str(tmp_path / "mirror"), FetchSettings())
    assert before is not None and after is not None
    assert set(before) == {"table.csv", "folder", "gone"} and before["folder"]["type"] == "directory"
    assert before["table.csv"]["size"] == 3 and before["table.csv"]["mtime"] != after["table.csv"]["mtime"] == 1
