"""A folder of downloads: what lies there is not fetched again, and what is no picture is told by its bytes."""

from __future__ import annotations

import hashlib
import io
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import imagehash
import pytest
from PIL import Image

from dataset_tools.downloads import are_there, download, picture_path
from dataset_tools.drawn_world import draw_scene
from dataset_tools.web import WebSettings

FAST = WebSettings(attempts=1, backoff_seconds=0, allow_private_addresses=True)


def picture(key: str, kind: str = "JPEG", size: tuple[int, int] = (96, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw_scene(key, 0, size, False).image).save(buffer, kind)
    return buffer.getvalue()


def declared_png(width: int, height: int) -> bytes:
    """A sound header of any size over no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def test_pictures_lie_under_the_digest_of_their_bytes(strangers: Any, tmp_path: Path) -> None:
    data = picture("one")
    strangers.answers["/a"] = (200, {"Content-Type": "text/html"}, data)
    (found,) = download([strangers.url("/a")], str(tmp_path), FAST)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert (tmp_path / picture_path(found.sha256)).read_bytes() == data
    assert found.perceptual_hash == str(imagehash.phash(Image.open(io.BytesIO(data))))
    assert (found.status, found.size, found.requests, found.http) == ("fetched", len(data), 1, 200)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"<!DOCTYPE html><title>Gone</title>", "not-an-image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not-an-image"),
        (b"", "empty-file"),
        (picture("one")[:900], "truncated-image"),
        (declared_png(50_000, 50_000), "decompression-bomb"),
    ],
)
def test_what_is_no_picture_is_told_by_its_bytes_whatever_the_server_calls_it(
    strangers: Any, tmp_path: Path, data: bytes, why: str
) -> None:
    strangers.answers["/a"] = (200, {"Content-Type": "image/jpeg"}, data)
    for _ in range(2):
        (found,) = download([strangers.url("/a")], str(tmp_path), FAST)
        assert (found.status, found.reason, found.transient) == ("failed", why, False)
    assert len(strangers.asked) == 1
    assert not (tmp_path / "pictures").exists()


def test_a_redirect_to_bytes_that_are_no_text_fails_alone(strangers: Any, tmp_path: Path) -> None:
    strangers.answers |= {"/a": (302, {"Location": "/\xff"}, b""), "/b": picture("one")}
    found = download([strangers.url("/a"), strangers.url("/b")], str(tmp_path), FAST)
    assert [(each.status, each.reason, each.transient) for each in found] == [
        ("failed", "bad-url", False),
        ("fetched", "", False),
    ]


def test_only_what_failed_for_a_while_is_asked_for_again(strangers: Any, tmp_path: Path) -> None:
    strangers.answers |= {"/a": picture("one"), "/b": [503, picture("two")], "/c": 404}
    urls = [strangers.url(path) for path in ("/a", "/b", "/c", "/d")]
    strangers.answers["/d"] = (302, {"Location": strangers.url("/a", "b.example")}, b"")
    first = download(urls, str(tmp_path), FAST)
    assert [each.status for each in first] == ["fetched", "failed", "failed", "moved"]
    assert [each.transient for each in first] == [False, True, False, False]
    second = download(urls, str(tmp_path), FAST)
    assert [second[0], *second[2:]] == [first[0], *first[2:]]
    assert second[1].status == "fetched"
    assert sorted(strangers.asked) == [f"a.example/{name}" for name in "abbcd"]
    assert download(urls, str(tmp_path), FAST) == second and len(strangers.asked) == 5


def test_a_picture_that_is_gone_is_fetched_again(strangers: Any, tmp_path: Path) -> None:
    strangers.answers["/a"] = picture("one")
    (found,) = download([strangers.url("/a")], str(tmp_path), FAST)
    assert are_there([found], str(tmp_path))
    (tmp_path / picture_path(found.sha256)).unlink()
    assert not are_there([found], str(tmp_path))
    assert download([strangers.url("/a")], str(tmp_path), FAST) == [found]
    assert are_there([found], str(tmp_path)) and len(strangers.asked) == 2


def test_other_rules_are_followed_by_what_they_decide_alone(strangers: Any, tmp_path: Path) -> None:
    """A file stays under looser rules, and under stricter ones is judged anew; what failed is tried again."""
    data = picture("one")
    strangers.answers |= {"/a": (200, {"X-Robots-Tag": "noai"}, data), "/b": data}
    urls = [strangers.url("/a"), strangers.url("/b")]

    def reasons(**changes: Any) -> list[str]:
        return [each.reason for each in download(urls, str(tmp_path), FAST.model_copy(update=changes))]

    assert reasons() == ["header-disallowed", ""]
    assert reasons(connections=1, attempts=2, user_agent="mild/2") == ["header-disallowed", ""]
    assert len(strangers.asked) == 2
    assert reasons(disallowed_directives=()) == ["", ""]
    assert strangers.asked.count("a.example/b") == 1
    assert reasons() == ["header-disallowed", ""]
    assert reasons(max_bytes=len(data) - 1) == ["header-disallowed", "too-large"]
    assert reasons(max_bytes=len(data)) == ["header-disallowed", ""]
    assert reasons(allow_private_addresses=False) == ["private-address", "private-address"]


@pytest.mark.process
def test_what_a_killed_process_fetched_is_not_fetched_again(strangers: Any, tmp_path: Path) -> None:
    """Killed while the last of eight is under way; every other is asked for once, and all is as if undisturbed."""
    strangers.answers |= {f"/{number}": picture(str(number)) for number in range(8)}
    urls = [strangers.url(f"/{number}", "127.0.0.1") for number in range(7)]
    urls.append(strangers.url("/silent/7", "127.0.0.1"))
    program = "import sys; from dataset_tools.downloads import *; from dataset_tools.web import WebSettings as W;"
    program += "download(sys.argv[2:], sys.argv[1], W(connections_per_host=1, allow_private_addresses=True))"
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "killed"), *urls]) as process:
        with strangers.changed:
            assert strangers.changed.wait_for(lambda: any("silent" in path for path in strangers.asked), 60)
        process.send_signal(signal.SIGKILL)
    for number in range(7):
        assert strangers.asked.count(f"127.0.0.1/{number}") == 1
    found = download(urls[:7], str(tmp_path / "killed"), FAST)
    assert len(strangers.asked) == 8
    assert found == download(urls[:7], str(tmp_path / "undisturbed"), FAST)
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def contents(folder: Path) -> dict[str, bytes]:
    """Files by name, those under construction left out."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_note_that_cannot_be_read_counts_for_none(strangers: Any, tmp_path: Path) -> None:
    strangers.answers["/a"] = 404
    first = download([strangers.url("/a")], str(tmp_path), FAST)
    (note,) = (tmp_path / "urls").rglob("*.json")
    note.write_text(note.read_text()[:-9])
    assert download([strangers.url("/a")], str(tmp_path), FAST) == first
    assert len(strangers.asked) == 2
