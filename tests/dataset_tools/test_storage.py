"""Files appear whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from dataset_tools.errors import UserError
from dataset_tools.storage import (
    PARTIAL_SUFFIX,
    content_token,
    open_root,
    remove_partial_files,
    sha256_of_file,
    write_bytes,
    written_whole,
)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder on the disk, and one in memory."""
    if request.param == "local":
        yield str(tmp_path / "root")
        return
    yield "memory://storage-test"
    if fsspec.filesystem("memory").exists("/storage-test"):
        fsspec.filesystem("memory").rm("/storage-test", recursive=True)


def _fail_halfway(filesystem: fsspec.AbstractFileSystem, path: str, error: type[BaseException]) -> None:
    with written_whole(filesystem, path) as partial:
        partial.write_bytes(b"half")
        raise error


def everything(root: str) -> list[str]:
    filesystem, base = open_root(root)
    return sorted(filesystem.find(base)) if filesystem.exists(base) else []


def test_nothing_stands_under_the_final_name_before_the_end(root: str) -> None:
    filesystem, base = open_root(root)
    with written_whole(filesystem, f"{base}/a/b.txt") as partial:
        partial.write_bytes(b"half")
        assert not filesystem.exists(f"{base}/a/b.txt")
        partial.write_bytes(b"whole")
    assert filesystem.cat_file(f"{base}/a/b.txt") == b"whole"
    assert len(everything(root)) == 1
    assert not partial.exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_new_and_the_old_file_as_it_was(
    root: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    filesystem, base = open_root(root)
    write_bytes(filesystem, f"{base}/old.txt", b"old")
    for name in ("old.txt", "new.txt"):
        with pytest.raises(error):
            _fail_halfway(filesystem, f"{base}/{name}", error)
    assert [path.rsplit("/", 1)[-1] for path in everything(root)] == ["old.txt"]
    assert filesystem.cat_file(f"{base}/old.txt") == b"old"
    assert not list(temporary.iterdir())


def test_a_block_that_deletes_its_file_makes_nothing_appear(root: str) -> None:
    filesystem, base = open_root(root)
    with written_whole(filesystem, f"{base}/none.txt") as partial:
        partial.write_bytes(b"x")
        partial.unlink()
    assert everything(root) == []


def test_writing_gives_the_digest_of_what_stands_there(root: str) -> None:
    filesystem, base = open_root(root)
    data = bytes(range(256)) * 9000
    assert write_bytes(filesystem, f"{base}/x", data) == hashlib.sha256(data).hexdigest()
    assert sha256_of_file(filesystem, f"{base}/x") == hashlib.sha256(data).hexdigest()


def test_on_a_disk_the_finished_file_is_renamed_not_copied(tmp_path: Path) -> None:
    filesystem, base = open_root(str(tmp_path))
    with written_whole(filesystem, f"{base}/a/b.txt") as partial:
        partial.write_bytes(b"whole")
        number = partial.stat().st_ino
        assert partial.name.startswith(".") and partial.name.endswith(PARTIAL_SUFFIX)
    assert (tmp_path / "a/b.txt").stat().st_ino == number


def test_a_token_changes_with_the_bytes_and_is_none_without_the_file(root: str) -> None:
    filesystem, base = open_root(root)
    path = f"{base}/x"
    assert content_token(filesystem, path) is None
    write_bytes(filesystem, path, b"one")
    token = content_token(filesystem, path)
    assert token == f"sha256:{hashlib.sha256(b'one').hexdigest()}"
    write_bytes(filesystem, path, b"two")
    assert content_token(filesystem, path) != token
    write_bytes(filesystem, path, b"one")
    assert content_token(filesystem, path) == token


def test_a_store_with_etags_is_asked_for_its_etag_not_for_the_bytes() -> None:
    class Tagged(fsspec.AbstractFileSystem):
        def info(self, path: str, **_: object) -> dict[str, object]:
            return {"name": path, "size": 3, "type": "file", "ETag": '"abc"'}

    assert content_token(Tagged(), "bucket/x") == 'tag:3:"abc"'


def test_what_killed_runs_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    leftover = tmp_path / "a" / f".x.tar.0a1b2c3d{PARTIAL_SUFFIX}"
    keep = [tmp_path / "a" / "x.tar", tmp_path / f"mine{PARTIAL_SUFFIX}"]
    for path in [leftover, *keep]:
        path.write_bytes(b"")
    remove_partial_files(open_root(str(tmp_path))[0], str(tmp_path))
    assert not leftover.exists()
    assert all(path.exists() for path in keep)


def test_an_unknown_protocol_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match="nowhere://x"):
        open_root("nowhere://x")
