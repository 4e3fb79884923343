"""Weights: the table's own consistency, what is refused, and fetching from a server that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants, file_download, hf_hub_download
from safetensors.numpy import save

from dataset_tools import weights
from dataset_tools.errors import UserError
from dataset_tools.networks import NETWORKS, SUGGESTED, Network, WeightsFile
from dataset_tools.weights import PICKLES, at_hand, damage, find_weights, licence_of, missing_message, pull, size_of

README = Path(__file__).parents[2] / "README.md"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIGURATION = b'{"model_type": "small"}'
TENSORS = save({"weight": np.arange(20_000, dtype=np.float32)})
PICKLE = b"\x80\x02}q\x00." + bytes(range(256)) * 40
CHUNK = 4096
"""Bytes that are written to the disk at once here; the hub's own library waits for ten million."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Hub(ThreadingHTTPServer):
    """A hub of one model, ``owner/small``, whose large files lie on another host; and plain files under ``/plain/``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {"config.json": CONFIGURATION, "model.safetensors": TENSORS, "body.pth": PICKLE}
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, str, str]] = []
        """Method, path and range of every request."""
        self.promised: dict[str, str] = {}
        """Digests that are told in place of the true ones."""
        self.breaks: list[int] = []
        """Of so many bytes each, answers are cut off, until none is left."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that break are the point of some tests."""

    def ranges(self) -> list[str]:
        """What of files was asked for, but for the hub's own descriptions."""
        return [span for method, path, span in self.asked if method == "GET" and re.match("/(cdn|plain)/", path)]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, span = self.server, self.headers.get("Range", "")
        path = self.path.partition("?")[0]
        hub.asked.append((self.command, path, span))
        file = path.rpartition("/")[2]
        if path == "/api/models/owner/small/revision/main":
            self._answer(200, json.dumps({"id": "owner/small", "sha": COMMIT}).encode())
        elif path == f"/api/models/owner/small/tree/{COMMIT}":
            self._answer(200, json.dumps([self._entry(name) for name in hub.files]).encode())
        elif not re.match("/(owner/small/resolve|cdn|plain)/", path) or file not in hub.files:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/owner/") and file.endswith(".json"):
            tag = hashlib.sha1(b"blob %d\0" % len(hub.files[file]) + hub.files[file]).hexdigest()
            self._answer(200, hub.files[file], {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
        elif path.startswith("/owner/"):
            told = {
                "Location": f"http://localhost:{hub.server_port}/cdn/{file}",
                "X-Linked-Etag": f'"{self._digest(file)}"',
                "X-Linked-Size": str(len(hub.files[file])),
                "X-Repo-Commit": COMMIT,
            }
            self._answer(302, b"", told)
        elif found := re.fullmatch(r"bytes=(\d+)-", span):
            data, start = hub.files[file], int(found[1])
            self._answer(206, data[start:], {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})
        else:
            self._answer(200, hub.files[file])

    def _digest(self, file: str) -> str:
        return self.server.promised.get(file) or sha256(self.server.files[file])

    def _entry(self, file: str) -> dict[str, Any]:
        data = self.server.files[file]
        entry = {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        large = {"lfs": {"oid": self._digest(file), "size": len(data), "pointerSize": 134}}
        return entry if file.endswith(".json") else entry | large

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.breaks and re.match("/(cdn|plain)/", self.path):
            self.wfile.write(body[: self.server.breaks.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The only hub that there is, with caches that are empty."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("MILD_WEIGHTS", raising=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    with server:
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Network]:
    """Add a row ``small`` to the table."""

    def row(*files: WeightsFile, hub: str = "owner/small", url: str = "", revision: str = COMMIT) -> Network:
        like = NETWORKS["rf-detr-seg-nano"]
        network = replace(like, name="small", hub=hub, url=url, revision=revision, files=files)
        monkeypatch.setitem(NETWORKS, "small", network)
        return network

    return row


@pytest.fixture
def small(hub: Hub, add: Callable[..., Network]) -> Network:
    """A network on the hub, whose weights have a digest and a size in the table."""
    return add(WeightsFile("config.json"), WeightsFile("model.safetensors", sha256(TENSORS), len(TENSORS)))


@pytest.fixture(params=["hub", "plain"])
def either(request: pytest.FixtureRequest, hub: Hub, add: Callable[..., Network]) -> Network:
    """A network of one file, on the hub or at an address of its own."""
    file = WeightsFile("body.pth", sha256(PICKLE), len(PICKLE))
    return add(file) if request.param == "hub" else add(file, hub="", url=f"{hub.url}/plain/body.pth")


def silent(file: str, done: int, total: int | None) -> None:
    """Progress that nobody looks at."""


def stop_after(count: int) -> Callable[[str, int, int | None], None]:
    """Ends the program once a large file is there up to so many bytes."""

    def stop(file: str, done: int, total: int | None) -> None:
        if not file.endswith(".json") and done >= count:
            raise KeyboardInterrupt

    return stop


def left(folder: Path) -> list[str]:
    """Names of all files below a folder that are no bookkeeping of the hub's library."""
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    return sorted(name for name in names if not re.search(r"\.lock$|^CACHEDIR|^\.gitignore$|^main$", name))


def test_the_table_is_sound() -> None:
    """Each row says where its files are and what runs it, and has no pickle that nobody could check."""
    kinds = {"instances": {"maskrcnn", "transformers"}, "pose": {"openpose", "vitpose"}}
    kinds |= {"parsing": {"schp", "segformer"}, "base": {""}}
    kinds |= {"eraser": {"lama", "powerpaint", "clipaway", "rorem", "osor", "attentive-eraser"}}
    kinds |= {"metric": {"remove", "rc_s", "fid", "lpips", "dino", "clip"}}
    for name, row in NETWORKS.items():
        assert row.name == name and re.fullmatch("[a-z0-9-]+", name)
        assert row.kind in kinds[row.purpose]
        assert not (row.hub and row.url) and bool(row.revision) == bool(row.hub)
        assert row.url == "" or (row.url.endswith(f"/{row.files[0].path}") and len(row.files) == 1)
        assert row.code_licence and row.weights_licence and row.about and "\n" not in row.about
        assert len({file.path for file in row.files}) == len(row.files)
        for file in row.files:
            assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
            assert file.sha256 or Path(file.path).suffix not in PICKLES
        sizes = [file.size for file in row.files]
        if None not in sizes:
            assert row.megabytes == pytest.approx(sum(size or 0 for size in sizes) / 1e6, abs=1)
    assert len({file.sha256 for row in NETWORKS.values() for file in row.files if file.path.endswith(".pth")}) == 12
    assert {NETWORKS[name].purpose for name in SUGGESTED.values()} == set(SUGGESTED)


def test_the_readme_says_of_networks_what_the_table_says() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\w+) \| (.+) \| (yes|no) \| (.+) \|$", README.read_text(), re.MULTILINE)
    assert {NETWORKS[name].kind for name, *_ in rows} == {row.kind for row in NETWORKS.values()} - {""}
    for name, *told in rows:
        row = NETWORKS[name]
        assert told == [row.purpose, licence_of(row), "yes" if row.commercial else "no", size_of(row)]


@pytest.mark.process
def test_torchvision_means_the_same_file_and_looks_in_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address is torchvision's own, its name ends in the digest's start, and torch.hub would find it there."""
    import torch  # which starts a process
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights

    row = NETWORKS["maskrcnn"]
    assert MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.url == row.url
    assert str(row.files[0].sha256).startswith(row.url.rpartition("-")[2].removesuffix(".pth"))
    for variable, place in (("TORCH_HOME", "a"), ("XDG_CACHE_HOME", "b"), ("HOME", "c")):
        for name in ("MILD_WEIGHTS", "TORCH_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(variable, str(tmp_path / place))
        file = Path(torch.hub.get_dir(), "checkpoints", row.files[0].path)
        file.parent.mkdir(parents=True)
        assert at_hand(row) is None
        file.touch()
        assert at_hand(row) == file.parent


def test_pull_puts_whole_files_where_the_hub_s_own_library_finds_them(hub: Hub, small: Network) -> None:
    told: list[tuple[str, int, int | None]] = []
    pull("small", None, lambda *news: told.append(news))
    for name, data in (("config.json", CONFIGURATION), ("model.safetensors", TENSORS)):
        path = hf_hub_download("owner/small", name, revision=COMMIT, local_files_only=True)
        assert Path(path).read_bytes() == data
    assert [news for news in told if news[0] == "model.safetensors"][-1][1:] == (len(TENSORS), len(TENSORS))
    found = find_weights("small")
    assert found.network is small and found.folder == at_hand(small)
    assert {name: path.read_bytes() for name, path in found.files.items()} == {
        "config.json": CONFIGURATION,
        "model.safetensors": TENSORS,
    }


def test_a_second_pull_asks_nobody(hub: Hub, either: Network) -> None:
    pull("small", None, silent)
    hub.asked.clear()
    pull("small", None, silent)
    assert hub.asked == []


def test_only_what_is_missing_is_fetched(hub: Hub, small: Network) -> None:
    pull("small", None, silent)
    folder = at_hand(small)
    assert folder is not None and hub.ranges() == [""]
    (folder / "config.json").unlink()
    assert at_hand(small) is None
    pull("small", None, silent)
    assert at_hand(small) == folder and hub.ranges() == [""]


def test_a_folder_of_choice_is_found_where_it_is_set(
    hub: Hub, either: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull("small", tmp_path / "chosen", silent)
    file = tmp_path / "chosen" / "small" / "body.pth"
    assert file.read_bytes() == PICKLE and left(tmp_path) == ["body.pth"]
    assert at_hand(either) is None
    monkeypatch.setenv("MILD_WEIGHTS", str(tmp_path / "chosen"))
    assert find_weights("small").files == {"body.pth": file}
    assert find_weights("small").sha256 == sha256(PICKLE)
    file.unlink()
    pull("small", None, silent)
    assert file.read_bytes() == PICKLE


def test_what_is_killed_in_the_middle_goes_on_there(hub: Hub, either: Network, tmp_path: Path) -> None:
    """Nothing has the file's name before it is whole."""
    with pytest.raises(KeyboardInterrupt):
        pull("small", None, stop_after(2 * CHUNK))
    assert at_hand(either) is None
    (part,) = tmp_path.rglob("*.part")
    kept = part.read_bytes()
    assert 0 < len(kept) < len(PICKLE) and PICKLE.startswith(kept)
    assert left(tmp_path) == [part.name]
    pull("small", None, silent)
    assert hub.ranges() == ["", f"bytes={len(kept)}-"]
    assert find_weights("small").files["body.pth"].read_bytes() == PICKLE
    assert list(tmp_path.rglob("*.part")) == []


def test_a_part_of_something_else_never_becomes_the_file(hub: Hub, either: Network, tmp_path: Path) -> None:
    """One that is too long is begun anew; one of the right length is found out by its digest, and removed."""
    with pytest.raises(KeyboardInterrupt):
        pull("small", None, stop_after(2 * CHUNK))
    (part,) = tmp_path.rglob("*.part")
    part.write_bytes(b"x" * len(PICKLE))
    with pytest.raises(UserError, match="removed"):
        pull("small", None, silent)
    assert left(tmp_path) == []
    part.write_bytes(b"x" * (len(PICKLE) + 1))
    pull("small", None, silent)
    assert hub.ranges() == ["", ""]
    assert find_weights("small").sha256 == sha256(PICKLE)


def test_a_connection_that_breaks_is_taken_up_again(hub: Hub, either: Network) -> None:
    hub.breaks = [CHUNK]
    pull("small", None, silent)
    assert hub.ranges() == ["", f"bytes={CHUNK}-"]
    assert find_weights("small").sha256 == sha256(PICKLE)


def test_a_server_that_is_gone_for_good_is_told_in_one_line_and_what_came_is_kept(hub: Hub, either: Network) -> None:
    hub.breaks = [CHUNK] + [0] * 50
    with pytest.raises(UserError, match=r"^small: body\.pth could not be fetched whole: .*start again") as caught:
        pull("small", None, silent)
    assert "\n" not in str(caught.value)
    hub.breaks.clear()
    pull("small", None, silent)
    assert hub.ranges()[-1] == f"bytes={CHUNK}-"
    assert find_weights("small").sha256 == sha256(PICKLE)


def test_other_content_than_promised_is_refused_and_removed(hub: Hub, either: Network, tmp_path: Path) -> None:
    hub.promised["body.pth"] = sha256(PICKLE)
    hub.files["body.pth"] = PICKLE[:-1] + b"x"
    with pytest.raises(UserError, match=f"sha256 {sha256(hub.files['body.pth'])}, and not {sha256(PICKLE)}"):
        pull("small", None, silent)
    assert left(tmp_path) == []
    assert at_hand(either) is None


def test_what_the_hub_has_under_another_digest_is_not_even_fetched(
    hub: Hub, add: Callable[..., Network], tmp_path: Path
) -> None:
    add(WeightsFile("body.pth", sha256(PICKLE)))
    hub.files["body.pth"] = b"changed"
    with pytest.raises(UserError, match="refused"):
        pull("small", None, silent)
    assert hub.ranges() == [] and left(tmp_path) == []


def test_without_a_digest_in_the_table_the_hub_s_own_holds(
    hub: Hub, add: Callable[..., Network], tmp_path: Path
) -> None:
    network = add(WeightsFile("model.safetensors"), revision="main")
    hub.promised["model.safetensors"] = sha256(b"something else")
    with pytest.raises(UserError, match="removed"):
        pull("small", None, silent)
    assert at_hand(network) is None
    hub.promised.clear()
    pull("small", None, silent)
    path = find_weights("small").files["model.safetensors"]
    assert path.read_bytes() == TENSORS
    path.resolve().write_bytes(TENSORS[:-1] + b"x")
    with pytest.raises(UserError, match=f"and not {sha256(TENSORS)}"):
        find_weights("small")


@pytest.mark.parametrize("bad", [PICKLE[:-1], PICKLE[:-1] + b"x"], ids=["cut off", "altered"])
def test_a_damaged_file_is_named_and_pulled_anew(hub: Hub, either: Network, bad: bytes) -> None:
    pull("small", None, silent)
    folder = at_hand(either)
    assert folder is not None and damage(either, folder) is None
    (folder / "body.pth").resolve().write_bytes(bad)
    assert str(folder / "body.pth") in str(damage(either, folder))
    with pytest.raises(UserError, match="fetch it again: mild weights pull small"):
        find_weights("small")
    pull("small", None, silent)
    assert damage(either, folder) is None
    assert find_weights("small").files["body.pth"].read_bytes() == PICKLE


def test_a_network_that_is_not_here_is_asked_for_and_not_fetched(hub: Hub, small: Network) -> None:
    with pytest.raises(UserError) as caught:
        find_weights("small")
    assert str(caught.value) == missing_message(["small"])
    assert hub.asked == []


def test_the_message_of_what_is_missing_has_all_that_one_needs_to_decide() -> None:
    message = missing_message(["rf-detr-seg-medium", "openpose"])
    assert "\n" not in message
    for part in (
        "rf-detr-seg-medium (for instances, 143 MB, Apache-2.0; commercial use: yes)",
        "openpose (for pose, 209 MB, CMU OpenPose (academic, non-commercial); commercial use: no)",
        "mild weights pull rf-detr-seg-medium openpose",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("name", "said"), [("vitpose-bas", "did you mean vitpose-base"), ("nowhere/at/all", "no network of the table")]
)
def test_an_unknown_name_is_told_with_the_nearest(hub: Hub, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_weights(name)
    with pytest.raises(UserError, match="is not in the table"):
        pull(name, None, silent)
    assert hub.asked == []


def test_a_hub_id_is_fetched_once(hub: Hub) -> None:
    first = find_weights("owner/small")
    assert first.network is None
    assert {name: path.read_bytes() for name, path in first.files.items()} == {
        "config.json": CONFIGURATION,
        "model.safetensors": TENSORS,
    }
    assert not any(path.endswith("body.pth") for _, path, _ in hub.asked)
    hub.asked.clear()
    assert find_weights("owner/small") == first == find_weights("owner/small", download=False)
    assert hub.asked == []


def test_a_hub_id_that_cannot_be_had_is_told_in_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="not in the hub's cache"):
        find_weights("owner/small", download=False)
    for name, offline in (("owner/other", False), ("owner/small", True)):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(UserError, match=f"^weights {name} .*cannot be fetched from the hub") as caught:
            find_weights(name)
        assert "\n" not in str(caught.value)


def folder_of(place: Path, **files: bytes) -> Path:
    place.mkdir()
    for name, data in files.items():
        (place / name.replace("_", ".")).write_bytes(data)
    return place


def test_a_digest_tells_contents_and_names_and_not_the_place(tmp_path: Path) -> None:
    """Of a file alone it is the file's."""
    one = folder_of(tmp_path / "one", config_json=CONFIGURATION, model_safetensors=TENSORS, notes_md=b"hello")
    two = folder_of(tmp_path / "two", config_json=CONFIGURATION, model_safetensors=TENSORS)
    digests = {
        find_weights(str(place)).sha256
        for place in (
            one,
            folder_of(tmp_path / "three", config_json=b"{}", model_safetensors=TENSORS),
            folder_of(tmp_path / "four", config_json=CONFIGURATION, other_safetensors=TENSORS),
        )
    }
    assert len(digests) == 3
    assert find_weights(str(two)).sha256 == find_weights(str(one)).sha256
    assert set(find_weights(str(one)).files) == {"config.json", "model.safetensors"}
    assert set(find_weights(str(one), files=["*.md", "*.safetensors"]).files) == {"notes.md", "model.safetensors"}
    alone = find_weights(str(one / "model.safetensors"))
    assert (alone.sha256, alone.folder) == (sha256(TENSORS), one)


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        read.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(weights.hashlib, "file_digest", counted)
    folder = folder_of(tmp_path / "own", model_safetensors=TENSORS)
    before = find_weights(str(folder)).sha256
    assert find_weights(str(folder)).sha256 == before and len(read) == 1
    (folder / "model.safetensors").write_bytes(save({"weight": np.zeros(3)}))
    assert find_weights(str(folder)).sha256 != before and len(read) == 2


@pytest.mark.parametrize("size", [0, 7, 40, len(TENSORS) - 1, len(TENSORS) + 1])
def test_safetensors_of_another_length_than_their_header_says_are_refused(tmp_path: Path, size: int) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes((TENSORS + b"x")[:size])
    for place in (file, folder_of(tmp_path / "own", model_safetensors=file.read_bytes())):
        with pytest.raises(UserError, match=r"model\.safetensors (is cut off|has \d+ bytes)"):
            find_weights(str(place))


def test_a_pickle_of_one_s_own_needs_its_digest(tmp_path: Path, add: Callable[..., Network]) -> None:
    file = tmp_path / "own.pth"
    file.write_bytes(PICKLE)
    with pytest.raises(UserError, match=f"can hold programs.* set sha256 to {sha256(PICKLE)}"):
        find_weights(str(file))
    with pytest.raises(UserError, match=f"have the sha256 {sha256(PICKLE)}, and not {'0' * 64}"):
        find_weights(str(file), sha256="0" * 64)
    assert find_weights(str(file), sha256=sha256(PICKLE)).files == {"own.pth": file}
    add(WeightsFile("body.pth", sha256(PICKLE)))
    assert find_weights(str(file)).sha256 == sha256(PICKLE)


def test_a_digest_that_is_asked_for_holds_for_everything(hub: Hub, small: Network) -> None:
    pull("small", None, silent)
    whole = find_weights("small").sha256
    assert find_weights("small", sha256=whole).sha256 == whole
    with pytest.raises(UserError, match="as the settings say"):
        find_weights("small", sha256=sha256(TENSORS))
    assert find_weights("small", files=["*.safetensors"], sha256=sha256(TENSORS)).folder == at_hand(small)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with weights in it"):
        find_weights(str(folder_of(tmp_path / "own", config_json=CONFIGURATION, body_pth=PICKLE)))


@pytest.mark.process
def test_looking_for_weights_loads_neither_torch_nor_the_hub_s_library() -> None:
    program = "import sys, dataset_tools.weights; print(sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "huggingface_hub", "transformers"} & set(json.loads(done.stdout.replace("'", '"')))
