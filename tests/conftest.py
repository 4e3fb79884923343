"""What tests of several packages share: what tests may start, and samples that are quickly drawn."""

from __future__ import annotations

import atexit
import csv
import gc
import json
import logging
import multiprocessing.process
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from dataset_tools.schema import EncodingSettings, MadeBy, Makers, Person, Sample
from dataset_tools.shards import Manifest, write_shard
from mild.evaluation.summary import DatasetRow, MethodRow, Summary

# For torch, here and in child processes: the models are too small for more threads, rounding depends on their number,
# and other tests run beside.
os.environ["OMP_NUM_THREADS"] = "1"
# Where a test takes more threads, those that wait leave the processor to others.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# Whoever needs a server of Prefect asks for the fixture `prefect_server`: one that starts unasked takes half a minute.
os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "false"
# A busy machine is no defect.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# Shells ignore Ctrl-C for what they start in the background, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Garbage is not looked for while everything is imported, nor in what was imported, which stays; later seldom."""
    # Python processes that tests start import `sitecustomize` from there.
    places = (str(Path(__file__).with_name("started")), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000)
        gc.enable()
        # What was imported may go at the very end, as some extension modules look then whether it did; before that
        # pytest looks for garbage five times.
        atexit.register(gc.unfreeze)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what uses Prefect's server, so that `make test-fast` can leave it out.

    Files that use it, or start processes, take longest, and go first, then those with slow tests: else one worker would
    still be at work on one while the others have nothing left. The very first is one that uses it: the server is ready
    when other workers come to the next, where they would wait for it.
    """
    for item in items:
        if "prefect_server" in getattr(item, "fixturenames", ()):
            item.add_marker("server")

    def files_of(*names: str) -> set[Path]:
        return {item.path for item in items if any(mark.name in names for mark in item.iter_markers())}

    longest, slow = files_of("process", "server"), files_of("slow")
    first = next((item.path for item in items if item.get_closest_marker("server")), None)
    items.sort(key=lambda item: (item.path != first, item.path not in longest, item.path not in slow))


@pytest.fixture(autouse=True)
def no_unmarked_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test-fast` starts no process, for which it leaves out what says that it does."""
    if not {"process", "server"} & {mark.name for mark in request.node.iter_markers()}:

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("this test starts a process: mark it with pytest.mark.process")

        monkeypatch.setattr(subprocess.Popen, "_execute_child", refuse)
        monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder of all processes that run these tests."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def prefect_database(shared_folder: Path) -> Path:
    """An empty database of Prefect's, to be copied: making one takes longer than starting a server on it."""
    database = shared_folder / "prefect.db"
    program = (
        "import asyncio; from prefect.server.database import provide_database_interface as interface;"
        "asyncio.run(interface().create_db())"
    )
    with FileLock(shared_folder / "prefect.db.lock"):
        if not database.exists():
            made = shared_folder / "prefect-made.db"
            place = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{made}"}
            subprocess.run([sys.executable, "-c", program], env={**os.environ, **place}, check=True)
            made.rename(database)
    return database


def draw_sample(index: int, height: int = 48, width: int = 64, people: int = 2) -> Sample:
    """A smooth background with rectangles for people, left to right; augmented masks are shifted down by 2.

    Joints lie anywhere in their rectangle; label 2 of Pascal is the rectangle.
    """
    rng = np.random.default_rng(index)
    rows, columns = np.mgrid[:height, :width]
    slope = rng.integers(20, 100, 3)
    background = (60 + rows[..., None] / height * slope + columns[..., None] / width * slope[::-1]).astype(np.uint8)
    image, persons = background.copy(), []
    parsing = np.zeros((height, width), np.uint8)
    for k in range(people):
        mask = np.zeros((height, width), bool)
        left = 4 + k * (width - 8) // people
        mask[height // 4 : height // 4 + height // 2, left : left + width // 8] = True
        image[mask] = rng.integers(0, 256, 3)
        augmented = np.roll(mask, 2, axis=0)
        parsing[mask] = 2
        inside = np.argwhere(mask)[rng.integers(mask.sum(), size=18)]
        keypoints = np.column_stack([inside[:, ::-1], np.ones(18)]).astype(np.float32)
        layer = np.dstack([image * mask[..., None], mask * np.uint8(255)])
        persons.append(
            Person(
                id=str(k),
                mask=mask,
                keypoints=keypoints,
                complete_mask=mask,
                augmented_mask=augmented,
                layer=layer,
                order=k,
                occlusion=0.0,
            )
        )
    return Sample(
        key=f"sample-{index}",
        split="train",
        configuration="composite",
        image=image,
        people=persons,
        parsing=parsing,
        label_set="pascal",
        origins=[],
        made_by=Makers(pose=MadeBy("drawn"), plate=MadeBy("photograph")),
        background=background,
    )


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    """See `draw_sample`."""
    return draw_sample


@pytest.fixture(scope="session")
def drawn_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of two shards of three composite samples."""
    root: Path = tmp_path_factory.mktemp("data") / "dataset"
    shards = [
        write_shard(
            [draw_sample(3 * number + index) for index in range(3)],
            str(root),
            f"composite/train-{number:06d}.tar",
            EncodingSettings(),
            [],
        )
        for number in range(2)
    ]
    manifest = Manifest(
        name="drawn", shards={"composite": {"train": shards}}, files={}, source="", settings={}, software={}
    )
    (root / "manifest.json").write_text(manifest.model_dump_json())
    return str(root)


class FileServer(ThreadingHTTPServer):
    """Serves a folder over HTTP as a plain web server does, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self, folder: Path, *, ranges: bool = True, demands: dict[str, str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _FileHandler)
        self.folder, self.ranges, self.demands = folder, ranges, demands or {}
        self.cut = 0
        """Bytes that answers to GET lack at their end, silently."""
        self.asked: list[tuple[str, str]] = []
        """Method and path of every request."""
        self.sent = 0
        """Bytes of all answers."""
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may hang up early."""


class _FileHandler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        server = self.server
        server.asked.append((self.command, self.path))
        path = server.folder / self.path.partition("?")[0].lstrip("/")
        if any(self.headers.get(name) != value for name, value in server.demands.items()):
            self._send(403, b"")
        elif self.path.startswith("//") or "//" in self.path or not path.is_file():
            self._send(404, b"")
        else:
            data, tag = path.read_bytes(), {"ETag": f'"{path.stat().st_mtime_ns}"'}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted and server.ranges:
                start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
                if start >= len(data):
                    self._send(416, b"")
                    return
                tag["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
                self._send(206, data[start:end], tag)
            else:
                whole = self.command == "HEAD" or not server.cut
                self._send(200, data if whole else data[: -server.cut], tag)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for start in range(0, len(body), 1 << 16):
                self.server.sent += self.wfile.write(body[start : start + (1 << 16)])

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@contextmanager
def _served(server: FileServer) -> Iterator[FileServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    with server:
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def serve_files() -> Iterator[Callable[..., FileServer]]:
    """Serve a folder until the test ends: ``serve_files(folder, ranges=..., demands=...)``, see `FileServer`."""
    with ExitStack() as servers:

        def serve(folder: Path, **settings: Any) -> FileServer:
            return servers.enter_context(_served(FileServer(folder, **settings)))

        yield serve


class ObjectStore:
    """An S3 server (moto's) on loopback: it demands credentials, fails as it is told, and remembers what it was asked.

    A bucket is that of one test.
    """

    def __init__(self) -> None:
        # Here, as it takes a second to import.
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._store = DomainDispatcherApplication(create_backend_app)
        handler = MotoRequestHandler
        self.server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.clear()

    def clear(self) -> None:
        """Forget what it was asked and told."""
        self.asked: list[str] = []
        """Method, path and query of every request."""
        self.refuse: Callable[[str], tuple[int, str] | None] = lambda asked: None
        """Status and code of S3's answer in place of its own, by what it is asked; None: its own."""
        self.lists_nothing = False
        """Listings lag: they know of nothing yet."""
        self.tag_of: Callable[[str], str] | None = None
        """Gives other ETags for its own, as stores do that encrypt with keys of their customers."""
        self.own_tags: dict[str, str] = {}

    def make(self, bucket: str) -> None:
        """Make a bucket."""
        from werkzeug.test import Client

        assert Client(self._store).put(f"/{bucket}", base_url=self.url).status_code == 200

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        query = environ["QUERY_STRING"]
        asked = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{'?' if query else ''}{query}"
        self.asked.append(asked)
        # Moto asks nobody who he is.
        refusal = self.refuse(asked) or (None if "HTTP_AUTHORIZATION" in environ else (403, "AccessDenied"))
        if refusal or (self.lists_nothing and "list-type=2" in query):
            status, code = refusal or (200, "")
            error = f"<Error><Code>{code}</Code><Message>Told to say {code}.</Message></Error>"
            body = (error if refusal else "<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>").encode()
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{status} X", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
        if (wanted := environ.get("HTTP_IF_MATCH")) in self.own_tags:
            environ["HTTP_IF_MATCH"] = self.own_tags[wanted]

        def begin(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            if self.tag_of is not None:
                for number, (name, value) in enumerate(headers):
                    if name.lower() == "etag":
                        headers[number] = name, self.tag_of(value)
                        self.own_tags[self.tag_of(value)] = value
            return start(status, headers, *more)

        return self._store(environ, begin)


@pytest.fixture(scope="session")
def _object_store() -> Iterator[ObjectStore]:
    from s3fs import S3FileSystem

    store = ObjectStore()
    # File systems keep the environment that they were opened in, and take half a second to open.
    S3FileSystem.clear_instance_cache()
    thread = threading.Thread(target=store.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield store
    store.server.shutdown()
    thread.join()
    store.server.server_close()
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def object_store(_object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """A running `ObjectStore`, named by the environment as users name theirs."""
    for name, value in {
        "AWS_ENDPOINT_URL": _object_store.url,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    _object_store.clear()
    return _object_store


@pytest.fixture
def bucket(object_store: ObjectStore) -> str:
    """URL of a new bucket."""
    name = f"bucket-{uuid.uuid4().hex}"
    object_store.make(name)
    return f"s3://{name}"


class Strangers(ThreadingHTTPServer):
    """All hosts ``*.example`` on loopback, each as hostile as a path says, and what they were asked.

    ``answers`` holds answers by path; of a list each request takes the next, and the last stays.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Stranger)
        self.answers: dict[str, Any] = {}
        self.robots: dict[str, Any] = {}
        """By host; a host without has no robots.txt."""
        self.asked: list[str] = []
        """``host/path`` of all requests but those for robots.txt."""
        self.robots_asked: list[str] = []
        """Hosts."""
        self.agents: set[str] = set()
        self.closing = threading.Event()
        self.changed = threading.Condition()
        """Told of each request."""
        self.here: Counter[str] = Counter()
        """Requests under way, by host."""
        self.most: Counter[str] = Counter()
        """The most at once, by host; all hosts together are ``""``."""
        self.met = 0
        """Requests that are let through together by the path ``/together``."""

    def url(self, path: str, host: str = "a.example") -> str:
        return f"http://{host}:{self.server_port}{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up early are the point of some tests."""


class _Stranger(BaseHTTPRequestHandler):
    server: Strangers
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, host = self.server, self.headers["Host"].partition(":")[0]
        server.agents.add(self.headers["User-Agent"])
        assert self.headers["Accept-Encoding"] == "identity" and "Range" not in self.headers
        for_robots = self.path == "/robots.txt"
        with server.changed:
            for name in (host, ""):
                server.here[name] += 1
                server.most[name] = max(server.most[name], server.here[name])
            if for_robots:
                server.robots_asked.append(host)
            else:
                server.asked.append(f"{host}{self.path}")
            server.changed.notify_all()
        try:
            if for_robots:
                self._send(server.robots.get(host, 404))
            else:
                self._answer()
        finally:
            with server.changed:
                for name in (host, ""):
                    server.here[name] -= 1

    def _answer(self) -> None:
        server, name = self.server, self.path.strip("/").partition("/")[0]
        match name:
            case "silent":
                server.closing.wait(30)
            case "slow":
                self._send((200, {"Content-Length": "1000"}, b"\xff\xd8\xff"))
                server.closing.wait(30)
            case "drip":
                self._send((200, {"Content-Length": "100000"}, b""))
                while not server.closing.wait(0.01):
                    self.wfile.write(b"x")
            case "endless":
                self._send((200, {"Connection": "close", "Content-Length": None}, b""))
                while not server.closing.is_set():
                    self.wfile.write(b"\xff\xd8\xff" * 10_000)
            case "cut":
                self._send((200, {"Content-Length": "1000"}, b"\xff\xd8\xff"))
                self.close_connection = True
            case "together":
                with server.changed:  # until as many are here as are to be
                    server.met += 1
                    server.changed.notify_all()
                    server.changed.wait_for(lambda: server.met % 2 == 0 or server.met > 5, 5)
                self._send((200, {}, b"x"))
            case _:
                answer = server.answers.get(self.path, 404)
                if isinstance(answer, list):
                    answer = answer.pop(0) if len(answer) > 1 else answer[0]
                self._send(answer)

    def _send(self, answer: Any) -> None:
        """An answer is a status, a body of status 200, or both with headers between."""
        if isinstance(answer, int):
            answer = (answer, {}, b"")
        elif isinstance(answer, bytes):
            answer = (200, {}, answer)
        status, headers, body = answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Strangers]:
    """See `Strangers`. Names ``*.example`` lead to it, but for ``gone.example``; others are not looked up."""
    look_up = socket.getaddrinfo

    def found(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        name = str(host)
        if name == "gone.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up("127.0.0.1" if name.endswith(".example") else name, port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", found)
    with Strangers() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def assert_trained_alike() -> Callable[[Path, Path], None]:
    """Fails unless two folders of adapters have the same losses and weights, to rounding."""

    def check(folder: Path, expected: Path) -> None:
        # Here, as tests of the dataset's tools do without torch.
        from safetensors.torch import load_file

        with (folder / "loss.csv").open() as one, (expected / "loss.csv").open() as other:
            for found, row in zip(list(csv.reader(one))[1:], list(csv.reader(other))[1:], strict=True):
                assert [float(value) for value in found] == pytest.approx([float(value) for value in row], rel=1e-3)
        for path in expected.rglob("*.safetensors"):
            weights = load_file(folder / path.relative_to(expected))
            for name, tensor in load_file(path).items():
                assert (weights[name] - tensor).norm() < 0.01 * tensor.norm() + 1e-6, name

    return check


def _icc_profile(kind: bytes, space: bytes, connected: bytes, name: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2.4, by the specification's section 7 (header, table of tags, tags)."""
    white = struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" * 79,
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + white,
    } | tags
    table, body = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), b"lcms", 0x02400000, kind, space, connected)
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + white
    return header.ljust(128, b"\0") + table + body


def _primaries(*columns: tuple[float, float, float]) -> dict[bytes, bytes]:
    """XYZ (D50) of red, green and blue."""
    return {
        tag: b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in column))
        for tag, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
    }


def _curves(gamma: float, *tags: bytes) -> dict[bytes, bytes]:
    return dict.fromkeys(tags, b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0")


def _inks() -> dict[bytes, bytes]:
    """Inks that let through a tenth to a third of a light, as a table (lut8Type) of their 16 mixtures at full cover."""
    cover = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(-1, 4)
    rgb = (1 - cover[:, :3] * [0.7, 0.8, 0.9]) * (1 - 0.9 * cover[:, 3:])
    picture = Image.fromarray((rgb * 255).round().astype(np.uint8)[None])
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = np.asarray(ImageCms.applyTransform(picture, to_lab))[0] ^ np.uint8([0, 128, 128])  # Pillow's a and b: signed
    unit, curve = struct.pack(">9i", *(np.eye(3, dtype=int) * 65536).ravel()), bytes(range(256))
    return {b"A2B0": b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + curve * 4 + lab.tobytes() + curve * 3}


@pytest.fixture(scope="session")
def icc_profiles() -> dict[str, bytes]:
    """ICC profiles made by hand: p3, adobe, linear (sRGB's primaries), grey (linear too), cmyk; and Pillow's srgb."""
    rgb, curves = (b"mntr", b"RGB ", b"XYZ "), (b"rTRC", b"gTRC", b"bTRC")
    adobe = _primaries((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
    p3 = _primaries((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
    srgb = _primaries((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
    return {
        "p3": _icc_profile(*rgb, b"Display P3 by hand", p3 | _curves(2.2, *curves)),
        "adobe": _icc_profile(*rgb, b"Adobe RGB by hand", adobe | _curves(563 / 256, *curves)),
        "linear": _icc_profile(*rgb, b"Linear by hand", srgb | _curves(1, *curves)),
        "grey": _icc_profile(b"mntr", b"GRAY", b"XYZ ", b"Linear grey", _curves(1, b"kTRC")),
        "cmyk": _icc_profile(b"prtr", b"CMYK", b"Lab ", b"Inks by hand", _inks()),
        "srgb": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    }


@pytest.fixture
def make_evaluation(tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of an evaluation, as far as those who judge its pairs look at it.

    Results differ from method to method and from picture to picture, unless the methods named ``twins`` are among them,
    whose results are equal. Files carry the method's name as text, as image editors do.
    """

    def make(methods: Sequence[str] = ("telea", "mild"), keys: int = 3, name: str = "evaluation") -> Path:
        folder, dataset = tmp_path / name, "composite"
        for index in range(keys):
            sample = draw_sample(index)
            place = folder / "pictures" / dataset / sample.key
            (place / "exact").mkdir(parents=True, exist_ok=True)
            Image.fromarray(sample.image).save(place / "before.png")
            Image.fromarray(np.uint8(255) * sample.people[0].mask).save(place / "exact" / "mask.png")
            for number, method in enumerate(methods):
                result = np.maximum(sample.image, 40 * (0 if method.startswith("twin") else 1 + number)).astype(
                    np.uint8
                )
                text = PngInfo()
                text.add_text("Software", method)
                Image.fromarray(result).save(place / "exact" / f"{method}.png", pnginfo=text)
        rows = [MethodRow(name=method, title=method.upper(), kind=method) for method in methods]
        pictures = DatasetRow(
            name=dataset,
            place="here",
            digest="0" * 64,
            configuration=dataset,
            split="test",
            masks=["exact"],
            samples=keys,
            available=keys,
        )
        summary = Summary(
            headline=None,
            baseline=methods[0],
            datasets=[pictures],
            methods=rows,
            metrics=[],
            groups=[],
            base="nano",
            adapters="",
            settings={},
            software={},
        )
        (folder / "summary.json").write_text(summary.model_dump_json(), encoding="utf-8")
        return folder

    return make


class Endpoint(ThreadingHTTPServer):
    """Speaks OpenAI's chat completions, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _EndpointHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.asked: list[dict[str, Any]] = []
        """The bodies of all requests."""
        self.headers: list[dict[str, str]] = []
        """Of all requests; names in small letters."""
        self.first: list[tuple[int, dict[str, str], Any]] = []
        """Status, headers and body of the answers to the first requests."""
        self.answer: Callable[[dict[str, Any]], Any] = lambda body: self.completion(self.verdict(7))
        """The body of all other answers."""

    @staticmethod
    def verdict(score: int, **changed: Any) -> str:
        """An answer as it is asked for, with one score for all that is scored."""
        names = ("naturalness", "semantic_consistency", "visual_harmony", "artifact_suppression")
        return json.dumps({**dict.fromkeys(names, score), "success": score > 5, **changed})

    @staticmethod
    def completion(content: str | None, **message: Any) -> dict[str, Any]:
        """A chat completion of 1000 tokens of a request and 100 of its answer."""
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "fake",
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content, **message}}
            ],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100},
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may hang up early."""


class _EndpointHandler(BaseHTTPRequestHandler):
    server: Endpoint
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        if self.server.first:
            status, headers, answer = self.server.first.pop(0)
        else:
            status, headers, answer = 200, {}, self.server.answer(body)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A running `Endpoint`; no key is set."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Endpoint() as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        yield server
        server.shutdown()
        serving.join()
