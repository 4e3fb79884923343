"""Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st

from dataset_tools.errors import UserError
from dataset_tools.storage import (
    PARTIAL_SUFFIX,
    check_writable,
    held,
    is_unaltered,
    local_path,
    local_place,
    normal_place,
    open_root,
    partial_of,
    remove_partials,
    sha256_of_file,
    tag_of,
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


def test_a_file_is_unaltered_by_its_bytes_whatever_became_of_it_between(root: str) -> None:
    filesystem, base = open_root(root)
    path, one = f"{base}/x", hashlib.sha256(b"one").hexdigest()
    assert not is_unaltered(filesystem, path, one, None)
    write_bytes(filesystem, path, b"one")
    tag = tag_of(filesystem, path)
    assert is_unaltered(filesystem, path, one, tag)
    write_bytes(filesystem, path, b"two")
    assert not is_unaltered(filesystem, path, one, tag)
    write_bytes(filesystem, path, b"one")
    assert is_unaltered(filesystem, path, one, None)


class Tagged(fsspec.AbstractFileSystem):
    """A store that gives every upload another ETag, and can be read only where it is asked to be."""

    read = True

    def info(self, path: str, **_: object) -> dict[str, object]:
        return {"name": path, "size": 3, "type": "file", "ETag": '"abc"'}

    def _open(self, path: str, *_: object, **__: object) -> io.BytesIO:
        assert self.read, "read although the tag says enough"
        return io.BytesIO(b"one")


def test_a_store_with_etags_is_asked_for_its_etag_and_read_only_where_that_differs() -> None:
    store = Tagged()
    assert tag_of(store, "bucket/x") == '3:"abc"'
    assert is_unaltered(store, "bucket/x", hashlib.sha256(b"one").hexdigest(), '3:"of the place it was copied from"')
    assert not is_unaltered(store, "bucket/x", hashlib.sha256(b"two").hexdigest(), '3:"older"')
    store.read = False
    assert is_unaltered(store, "bucket/x", hashlib.sha256(b"one").hexdigest(), '3:"abc"')


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    left = [partial_of(tmp_path / "x.tar"), partial_of(tmp_path / "folder")]
    keep = [
        tmp_path / "x.tar",
        tmp_path / f"mine{PARTIAL_SUFFIX}",
        tmp_path / f".mine{PARTIAL_SUFFIX}",
        tmp_path / ".download.0a1b2c3d.partial",
        partial_of(tmp_path / "below/x.tar"),
        partial_of(tmp_path / "y.tar"),
        partial_of(tmp_path / "x.zip"),
    ]
    for path in [left[0], *keep]:
        path.write_bytes(b"")
    left[1].mkdir()
    (left[1] / "file").write_bytes(b"")
    with held(keep[-2]):
        remove_partials(tmp_path, "[!x]*")
        assert left[0].exists() and not left[1].exists()
        keep[-1].unlink()
        remove_partials(tmp_path)
    assert not left[0].exists()
    assert all(path.exists() for path in keep[:-1])


def test_a_folder_that_a_killed_process_had_put_aside_is_put_back(tmp_path: Path) -> None:
    """It was killed after the old folder had gone aside, and before the new one came."""
    partial = partial_of(tmp_path / "result")
    old = partial.with_suffix(f".old{PARTIAL_SUFFIX}")
    for folder in (partial, old):
        folder.mkdir()
        (folder / "content").write_text(folder.name)
    remove_partials(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result/content").read_text() == old.name


def test_an_unknown_protocol_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match="nowhere://x"):
        open_root("nowhere://x")


NAMES = st.text(
    st.one_of(
        st.sampled_from("ab #%[]{}~+:*?!'$&()=@;,.-^`|<>\"\\"),
        st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cc", "Cs"]),
    ),
    min_size=1,
    max_size=12,
).filter(lambda name: name not in (".", ".."))
"""Names that a folder can have."""


@pytest.mark.slow
@given(st.lists(NAMES, min_size=1, max_size=3))
def test_every_local_path_means_itself_however_it_is_written(names: list[str]) -> None:
    """Absolute, with slashes too many, relative, as a file URL by the standard library, and once more."""
    path = "/" + "/".join(names)
    assert normal_place(path) == path
    for text in (f"{path}///", f"//{'//'.join(names)}", f"/{names[0]}/../{'/'.join(names)}"):
        assert normal_place(text) == path
    for url in (PurePosixPath(path).as_uri(), f"file://localhost{PurePosixPath(path).as_uri()[7:]}/"):
        assert normal_place(url) == path
    assert normal_place(f"./{'/'.join(names)}") == os.path.join(os.getcwd(), *names)
    filesystem, place = open_root(path)
    assert isinstance(filesystem, LocalFileSystem) and place == path


def test_a_home_folder_is_meant_only_by_a_tilde_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert normal_place("~/a/") == str(tmp_path / "a")
    assert normal_place("~") == str(tmp_path)
    assert normal_place("~root/a").endswith("/a") and not normal_place("~root/a").startswith(os.getcwd())
    assert normal_place("/x/~/y") == "/x/~/y"
    assert normal_place("./~") == os.path.join(os.getcwd(), "~")


def test_what_stands_before_two_dots_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "there/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "there/inner")
    assert normal_place(f"{tmp_path}/link/../x") == str(tmp_path / "there/x")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("s3://bucket/a b/c/", "s3://bucket/a b/c"),
        ("s3://bucket//", "s3://bucket"),
        ("S3://Bucket/A", "s3://Bucket/A"),
        ("memory://", "memory://"),
        ("memory://x[1]/%20/", "memory://x[1]/%20"),
        ("https://host/a%20b/?x=1", "https://host/a%20b/?x=1"),
        ("simplecache::s3://bucket/x/", "simplecache::s3://bucket/x"),
        ("zip://inner/::file:///x.zip", "zip://inner/::file:///x.zip"),
    ],
)
def test_a_url_stays_as_it_is_but_for_slashes_at_its_end(text: str, place: str) -> None:
    assert normal_place(text) == normal_place(place) == place


@pytest.mark.parametrize(
    "text",
    ["", "a\0b", "~nobody-of-this-name/x", "file://elsewhere/x", "file:x", "s3:/bucket/x", "s3://", "nowhere://x"],
)
def test_what_is_not_known_is_refused_in_one_line(text: str) -> None:
    """None of them becomes a folder of that name in the working directory."""
    with pytest.raises(UserError) as refusal:
        open_root(text)
    assert "\n" not in str(refusal.value)


def test_what_can_only_be_local_is_refused_elsewhere_and_told_as_it_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_path("a/b.png", "results") == "a/b.png"
    assert local_path("file:///a%20b", "results") == local_place("/a b/", "results") == "/a b"
    for url in ("s3://bucket/x", "memory://x"):
        with pytest.raises(UserError, match="results can only be on a local disk"):
            local_path(url, "results")


@pytest.mark.parametrize("kind", ["a file", "below a file", "a broken link", "no such disk"])
def test_an_output_that_cannot_be_is_refused_before_anything_is_done(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    output = {"a file": "file", "below a file": "file/x", "a broken link": "link", "no such disk": "/proc/x"}[kind]
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(str(tmp_path / output))
    check_writable(str(tmp_path / "new/folder"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_link_stays_and_the_file_that_it_leads_to_is_written_where_it_lies(tmp_path: Path) -> None:
    """Built beside it: renaming is possible on one disk only."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk/file")
    filesystem, path = open_root(str(tmp_path / "link"))
    for content in (b"new", b"newer"):
        with written_whole(filesystem, path) as partial:
            assert partial.parent == tmp_path / "disk"
            partial.write_bytes(content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/file").read_bytes() == content


def test_a_name_as_long_as_the_disk_holds_is_written(tmp_path: Path) -> None:
    filesystem, path = open_root(str(tmp_path / ("é" * 127)))
    write_bytes(filesystem, path, b"whole")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"whole"]
