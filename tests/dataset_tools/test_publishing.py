"""Publishing to a server that speaks the hub's protocol: what goes up, what does not go up again, what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from huggingface_hub import constants

from dataset_tools import publishing
from dataset_tools.errors import UserError
from dataset_tools.opt_out import OptOut
from dataset_tools.perceptual_hash import perceptual_hash
from dataset_tools.publishing import Published, check_publishable, publish
from dataset_tools.schema import EncodingSettings, Origin, Sample, encode_png
from dataset_tools.shards import Manifest, Shard, ShardDataset, write_shard

TOKEN = "hf_of_this_test"
CREDIT = Origin(
    *("background", "place", "0a1b", "https://creativecommons.org/licenses/by/2.0/", "Ann", "", "Hills"),
    *("https://example.org/0a1b.jpg", "https://example.org/0a1b", "a" * 64, ""),
)


class Hub(ThreadingHTTPServer):
    """A hub of one dataset, ``owner/people``, with branches; contents of large files are kept apart from commits."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private: bool | None = None
        """None: there is no such dataset yet."""
        self.branches: dict[str, str] = {}
        self.commits: dict[str, dict[str, bytes | str]] = {}
        """Files of each commit: content, or sha256 of a large file."""
        self.contents: dict[str, bytes] = {}
        """Of large files, by sha256."""
        self.sent: list[str] = []
        """sha256 of every large file that came."""
        self.refuses = 0
        """So many contents are taken before one is refused; 0: all."""
        self.spoils = ""
        """File whose content another has in the next commit."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may hang up early."""

    def files(self, branch: str = "main") -> dict[str, bytes]:
        held = self.commits[self.branches[branch]].items()
        return {path: self.contents[data] if isinstance(data, str) else data for path, data in held}

    def commit(self, branch: str, files: dict[str, bytes | str]) -> str:
        name = hashlib.sha1(f"{len(self.commits)} {branch}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer in one packet

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        found = re.fullmatch("/api/datasets/owner/people(?:/(revision|tree)/(.+))?", path)
        if hub.private is None or not found:
            self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            return
        commit = hub.branches.get(found[2] or "main", found[2])
        if found[1] == "tree":
            self._answer(200, [self._entry(path, data) for path, data in hub.commits[commit].items()])
        else:
            self._answer(200, {"id": "owner/people", "sha": commit, "private": hub.private})

    def do_POST(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {})
        elif path == "/api/repos/create":
            told = json.loads(body)
            assert (told["name"], told["organization"], told["type"]) == ("people", "owner", "dataset")
            if hub.private is not None:
                self._answer(409, {"url": f"{hub.url}/datasets/owner/people"})
                return
            hub.private = told.get("private", told.get("visibility") == "private")
            hub.commit("main", {".gitattributes": b"*.tar filter=lfs\n"})
            self._answer(200, {"url": f"{hub.url}/datasets/owner/people"})
        elif path == "/api/validate-yaml":
            self._answer(200, {})
        elif path.endswith("/info/lfs/objects/batch"):
            self._answer(200, {"transfer": "basic", "objects": list(map(self._action, json.loads(body)["objects"]))})
        elif found := re.fullmatch("/api/datasets/owner/people/(branch|preupload|commit|super-squash)/(.+)", path):
            getattr(self, f"_{found[1].replace('-', '_')}")(found[2], body)
        else:
            self._answer(404, {})

    def do_PUT(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if hub.refuses and len(hub.sent) == hub.refuses:
            self._answer(400, {"error": "no more"})
            return
        name = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == name
        hub.contents[name] = body
        hub.sent.append(name)
        self._answer(200, {})

    def _branch(self, name: str, _body: bytes) -> None:
        new = name not in self.server.branches
        self.server.branches.setdefault(name, self.server.branches["main"])
        self._answer(200 if new else 409, {})

    def _preupload(self, branch: str, body: bytes) -> None:
        large = [
            (file["path"], file["path"].endswith((".tar", ".png", ".parquet"))) for file in json.loads(body)["files"]
        ]
        told = [{"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False} for path, lfs in large]
        self._answer(200, {"files": told})

    def _commit(self, branch: str, body: bytes) -> None:
        hub, head = self.server, self.server.branches[branch]
        files = dict(hub.commits[head])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    assert value["parentCommit"] == head
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    assert value["oid"] in hub.contents
                    files[value["path"]] = value["oid"]
                case "deletedFile":
                    del files[value["path"]]
        if hub.spoils:
            files[hub.spoils] = next(name for name in hub.contents if name != files[hub.spoils])
        self._answer(
            200, {"commitUrl": f"{hub.url}/datasets/owner/people/commit/1", "commitOid": hub.commit(branch, files)}
        )

    def _super_squash(self, branch: str, _body: bytes) -> None:
        hub, files = self.server, self.server.commits[self.server.branches[branch]]
        hub.commits = {name: held for name, held in hub.commits.items() if name in hub.branches.values()}
        del hub.commits[hub.branches[branch]]
        hub.commit(branch, files)
        self._answer(200, {})

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.contents:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}}

    def _entry(self, path: str, data: bytes | str) -> dict[str, Any]:
        if isinstance(data, bytes):
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            return {"type": "file", "path": path, "size": len(data), "oid": blob}
        size = len(self.server.contents[data])
        large = {"oid": data, "size": size, "pointerSize": 134}
        return {"type": "file", "path": path, "size": size, "oid": "0" * 40, "lfs": large}

    def _answer(self, status: int, told: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The only hub that there is. Large files go up one by one, by the protocol without Xet."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    monkeypatch.setattr(publishing, "GROUP_BYTES", 1)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    with server:
        thread.start()
        yield server
        server.shutdown()
        thread.join()


Writer = Callable[..., Path]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, make_sample: Callable[..., Sample]) -> tuple[Path, list[Shard]]:
    """Four shards of a small picture each."""
    root, held = tmp_path_factory.mktemp("shards"), []
    for number in range(4):
        sample = make_sample("composite", f"sample-{number}")
        held.append(write_shard([sample], str(root), f"composite/train-{number:06d}.tar", EncodingSettings(), []))
    return root, held


@pytest.fixture
def write(tmp_path: Path, shards: tuple[Path, list[Shard]]) -> Writer:
    """Write a dataset of the first so many shards, which credits one picture."""
    drawn, known = shards

    def written(count: int, credit: Origin = CREDIT) -> Path:
        root = tmp_path / "dataset"
        shutil.rmtree(root, ignore_errors=True)
        (root / "card").mkdir(parents=True)
        for path in (path for path in drawn.rglob("*.*") if int(path.name[6:12]) < count):
            place = root / path.relative_to(drawn)
            place.parent.mkdir(exist_ok=True)
            shutil.copy(path, place)
        (root / "README.md").write_text("---\nlicense: other\n---\n# People\n")
        (root / "card/composite-train.png").write_bytes(encode_png(np.zeros((8, 8), np.uint8)))
        columns = [name for name in vars(credit) if name not in ("role", "transform")]
        rows = (columns, [vars(credit)[name] for name in columns])
        (root / "attribution.csv").write_text("".join(",".join(row) + "\n" for row in rows))
        beside = {name: data for name, data in files_below(root).items() if not name.startswith("composite/")}
        files = {name: hashlib.sha256(data).hexdigest() for name, data in beside.items()}
        listed = {"composite": {"train": known[:count]}}
        manifest = Manifest(name="people", shards=listed, files=files, source="", settings={}, software={})
        (root / "manifest.json").write_text(manifest.model_dump_json())
        return root

    return written


def files_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def silent(done: int, total: int) -> None:
    """Progress that nobody looks at."""


def published(root: Path | str, **options: Any) -> Published:
    return publish(str(root), "owner/people", **{"progress": silent, **options})


def test_credits_are_read_as_they_are_written_and_what_cannot_be_is_told_in_one_line(write: Writer) -> None:
    assert check_publishable(str(write(1, replace(CREDIT, author='"Ann\rof X"')))) == []
    with pytest.raises(UserError, match=r"attribution.csv cannot be read \(field larger than"):
        check_publishable(str(write(1, replace(CREDIT, author="a" * 200_000))))


def test_everything_arrives_in_one_commit_of_a_private_dataset(hub: Hub, write: Writer) -> None:
    root = write(2)
    assert check_publishable(str(root)) == []
    told: list[tuple[int, int]] = []
    done = published(root, progress=lambda *news: told.append(news))
    assert hub.private is True and len(hub.commits) == 2
    assert hub.files() == {**files_below(root), ".gitattributes": b"*.tar filter=lfs\n"}
    assert sorted(done.uploaded) == sorted(files_below(root)) and not done.replaced
    size = sum(map(len, files_below(root).values()))
    assert told[0] == (0, size) and told[-1] == (size, size) and told == sorted(told)
    assert done.commit == hub.branches["main"]


def test_from_a_store_the_same_arrives(hub: Hub, write: Writer) -> None:
    root = write(1)
    store = fsspec.filesystem("memory")
    store.put(str(root), "/published/dataset", recursive=True)
    published("memory://published/dataset")
    assert hub.files().items() >= files_below(root).items()
    store.rm("/published", recursive=True)


def test_stopped_in_the_middle_and_started_again_it_uploads_the_rest_alone(hub: Hub, write: Writer) -> None:
    root = write(4)
    total = sum(map(len, files_below(root).values()))

    def stop(done: int, _total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        published(root, progress=stop)
    before = list(hub.sent)
    assert before and set(hub.files()) == {".gitattributes"}  # nothing half-done is to be seen
    published(root)
    assert len(hub.sent) == len(set(hub.sent)) > len(before)
    assert hub.files().items() >= files_below(root).items()
    hub.sent.clear()
    assert published(root).uploaded == [] and hub.sent == [] and len(hub.commits) == 2


@pytest.mark.process
@pytest.mark.parametrize(("step", "sent", "rest"), [("do_PUT", 2, 7), ("_commit", 9, 0)])
def test_killed_and_started_again_it_uploads_the_rest_alone_and_finds_all_in_place(
    hub: Hub, write: Writer, monkeypatch: pytest.MonkeyPatch, step: str, sent: int, rest: int
) -> None:
    """SIGKILL while the third content goes up, or when the hub has made the commit and not told of it."""
    root = write(4)
    program = "import sys; from dataset_tools import publishing; publishing.GROUP_BYTES = 1;"
    program += "publishing.publish(sys.argv[1], 'owner/people', progress=lambda done, total: None)"
    place = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    answer = getattr(_Handler, step)

    def strike(handler: _Handler, *given: Any) -> None:
        if len(hub.sent) < sent:
            answer(handler, *given)
            return
        if step == "_commit":
            answer(handler, *given)  # which is kept in a buffer as yet
        else:
            handler.rfile.read(int(handler.headers["Content-Length"]) // 2)
        process.kill()
        process.wait()
        handler.close_connection = True

    with monkeypatch.context() as patch:
        patch.setattr(_Handler, step, strike)
        with subprocess.Popen([sys.executable, "-c", program, str(root)], env={**os.environ, **place}) as process:
            pass
    assert process.returncode == -signal.SIGKILL
    assert len(hub.sent) == sent
    assert ("manifest.json" in hub.files()) == (step == "_commit")
    published(root)
    assert len(hub.sent) == len(set(hub.sent)) == sent + rest
    assert hub.files().items() >= files_below(root).items() and len(hub.commits) == 2


def test_an_upload_that_fails_is_told_in_one_line_without_the_token_and_goes_on(hub: Hub, write: Writer) -> None:
    root, hub.refuses = write(3), 2
    with pytest.raises(UserError, match=r"^owner/people could not be published: .*start again") as caught:
        published(root)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    hub.refuses = 0
    published(root)
    assert len(hub.sent) == len(set(hub.sent)) and hub.files().items() >= files_below(root).items()


def test_a_later_version_replaces_the_earlier_and_its_shards_that_are_no_more(hub: Hub, write: Writer) -> None:
    published(write(3))
    hub.commit("main", {**hub.commits[hub.branches["main"]], "LICENSE": b"mine"})
    root = write(1)
    hub.sent.clear()
    before = len(hub.commits)
    done = published(root)
    assert len(hub.commits) == before + 1 and done.replaced
    assert done.removed == [
        f"composite/train-{number:06d}{suffix}" for number in (1, 2) for suffix in (".index.json", ".parquet", ".tar")
    ]
    assert set(hub.files()) == {*files_below(root), ".gitattributes", "LICENSE"}
    assert "composite/train-000000.tar" not in done.uploaded


def test_squashing_forgets_what_earlier_commits_hold(hub: Hub, write: Writer) -> None:
    published(write(2))
    done = published(write(1), squash=True)
    assert list(hub.commits) == [hub.branches["main"]] == [done.commit] and not done.replaced


def test_where_one_commit_does_not_take_all_the_manifest_goes_first_and_comes_last(
    hub: Hub, write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(write(1))
    monkeypatch.setattr(publishing, "COMMIT_FILES", 3)
    before = len(hub.commits)
    root = write(4)
    published(root)
    held = ["manifest.json" in files for files in list(hub.commits.values())[before:]]
    assert len(held) > 2 and held == [False] * (len(held) - 1) + [True]
    assert hub.files().items() >= files_below(root).items()


def test_a_branch_is_made_and_the_others_stay(hub: Hub, write: Writer) -> None:
    root = write(1)
    published(root, revision="v2")
    assert hub.files("v2").items() >= files_below(root).items()
    assert set(hub.files("main")) == {".gitattributes"}


def test_something_else_on_the_hub_than_here_is_noticed(hub: Hub, write: Writer) -> None:
    hub.spoils = "composite/train-000001.tar"
    with pytest.raises(UserError, match=r"composite/train-000001\.tar is not on the hub as it is here"):
        published(write(2))


def test_a_public_dataset_is_not_filled_unasked(hub: Hub, write: Writer) -> None:
    root = write(1)
    published(root, public=True)
    assert hub.private is False
    with pytest.raises(UserError, match="--public"):
        published(root)


def test_a_private_dataset_does_not_stay_private_in_silence_where_all_are_to_see_it(hub: Hub, write: Writer) -> None:
    root = write(1)
    published(root)
    with pytest.raises(UserError, match="is private: make it public in its settings"):
        published(root, public=True)
    assert hub.private is True


def test_without_a_token_one_is_asked_for(hub: Hub, write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(UserError, match="HF_TOKEN") as caught:
        published(write(1))
    assert "hf_of_somebody_else" not in str(caught.value)
    with pytest.raises(UserError, match="owner/name"):
        publish("anywhere", "people", progress=silent)


def test_a_dataset_that_is_not_sound_is_refused(write: Writer) -> None:
    root = write(2)
    with (root / "composite/train-000001.tar").open("r+b") as file:
        file.seek(2000)
        file.write(b"x")
    with pytest.raises(UserError, match=r"not sound and is not published: composite/train-000001\.tar: differs"):
        check_publishable(str(root))


def test_a_dataset_with_a_picture_of_the_opt_out_list_is_refused(write: Writer) -> None:
    root = str(write(1))
    background = ShardDataset(root, "composite", "train")[0].background
    assert background is not None
    for listed in (
        OptOut(id=("place/0a1b",)),
        OptOut(url=("http://example.org/0a1b",)),
        OptOut(sha256=("a" * 64,)),
        OptOut(phash=(f"{perceptual_hash(background) ^ 0b101:016x}",)),
    ):
        with pytest.raises(UserError, match="opt-out list names") as caught:
            check_publishable(root, listed)
        assert "0a1b" not in str(caught.value)
    assert check_publishable(root, OptOut(id=("0a1c",), sha256=("b" * 64,))) == []


def test_pairs_are_held_against_the_list_by_picture_and_clean_plate(
    tmp_path: Path, make_sample: Callable[..., Sample]
) -> None:
    sample = make_sample("paired", "sample-0")
    rng = np.random.default_rng(1)
    sample.background = np.repeat(np.repeat(rng.integers(0, 256, (9, 9, 3), np.uint8), 16, 0), 16, 1)[
        : sample.image.shape[0], : sample.image.shape[1]
    ].copy()
    shard = write_shard([sample], str(tmp_path), "paired/train-000000.tar", EncodingSettings(image_format="png"), [])
    (tmp_path / "attribution.csv").write_text("id,source,url,landing_url,sha256,licence\n")
    files = {"attribution.csv": hashlib.sha256((tmp_path / "attribution.csv").read_bytes()).hexdigest()}
    shards = {"paired": {"train": [shard]}}
    manifest = Manifest(name="pairs", shards=shards, files=files, source="", settings={}, software={})
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json())
    hashes = [perceptual_hash(picture) for picture in (sample.image, sample.background)]
    assert (hashes[0] ^ hashes[1]).bit_count() > 8
    for phash in hashes:
        with pytest.raises(UserError, match="holds 1 pictures that the opt-out list names"):
            check_publishable(str(tmp_path), OptOut(phash=(f"{phash:016x}",)))


@pytest.mark.parametrize(
    ("licence", "warned"),
    [
        ("https://creativecommons.org/licenses/by-nc-sa/4.0/", ""),
        ("https://creativecommons.org/licenses/by-nd/4.0/", "forbids to pass on altered"),
        ("http://creativecommons.org/licenses/by-nc-nd/2.0/", "forbids to pass on altered"),
        ("Attribution-NonCommercial-NoDerivs License", "forbids to pass on altered"),
        ("cc_by_nd_4.0", "forbids to pass on altered"),
        ("", "1 source pictures have the licence 'not stated'"),
        ("all rights reserved", "1 source pictures have the licence 'all rights reserved'"),
    ],
)
def test_licences_that_may_not_allow_it_are_told_with_counts(write: Writer, licence: str, warned: str) -> None:
    credit = Origin(**{**vars(CREDIT), "licence": licence})
    warnings = check_publishable(str(write(1, credit)))
    assert [warned in warning for warning in warnings] == ([True] if warned else [])
