from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dataset_tools.errors import UserError
from dataset_tools.folders import folder_written_whole


def test_a_folder_appears_only_when_its_block_has_ended(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "result"
    with folder_written_whole(target, "mark") as folder:
        (folder / "a").write_text("new")
        assert not target.exists()
    assert (target / "a").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["result"]


def test_an_older_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "result"
    for name in ("old", "new"):
        with folder_written_whole(target, "mark") as folder:
            (folder / "mark").touch()
            (folder / name).touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mark", "new", "result"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    """Somebody named the folder of their pictures for a result: it is refused before the block is begun."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_text("mine")
    with (
        pytest.raises(UserError, match="photos holds something else"),
        folder_written_whole(tmp_path / "photos", "mark"),
    ):
        raise AssertionError("begun")
    assert (tmp_path / "photos/a.jpg").read_text() == "mine"


def test_a_result_among_which_somebody_keeps_a_file_is_not_replaced(tmp_path: Path) -> None:
    """But for what file managers and network disks leave behind."""
    target, own = tmp_path / "result", r"mark|part-\d"

    def write(*names: str) -> None:
        with folder_written_whole(target, "mark", own) as folder:
            for name in ("mark", *names):
                (folder / name).touch()

    target.mkdir()
    (target / ".DS_Store").touch()
    write("part-1")
    for name in (".DS_Store", "._mark", ".nfs0000a1", "@eaDir", "Thumbs.db"):
        (target / name).touch()
    write()
    assert os.listdir(target) == ["mark"]
    (target / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"something else than such a result \(notes\.txt\)"):
        write()
    assert (target / "notes.txt").read_text() == "mine"


def test_a_failing_block_leaves_the_older_folder_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "result"
    with folder_written_whole(target, "mark") as folder:
        (folder / "mark").touch()

    def fail() -> None:
        with folder_written_whole(target, "mark") as folder:
            (folder / "new").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in tmp_path.rglob("*")] == ["result", "mark"]


def test_files_are_as_readable_as_the_folder(tmp_path: Path) -> None:
    with folder_written_whole(tmp_path / "result", "mark") as folder:
        (folder / "secret").touch(0o600)
    folder = tmp_path / "result"
    assert (folder / "secret").stat().st_mode & 0o777 == folder.stat().st_mode & 0o666


@pytest.mark.parametrize("name", ["file", "file/result"])
def test_a_place_that_cannot_be_a_folder_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"), folder_written_whole(tmp_path / name, "mark"):
        pass


def test_a_link_stays_and_the_folder_that_it_leads_to_is_replaced(tmp_path: Path) -> None:
    for leads_to in ("disk/result", "disk/not yet there"):
        link = tmp_path / f"link to {Path(leads_to).name}"
        (tmp_path / "disk/result").mkdir(parents=True, exist_ok=True)
        link.symlink_to(tmp_path / leads_to)
        with folder_written_whole(link, "mark") as folder:
            assert folder.parent == tmp_path / "disk", "renaming is possible on one disk only"
            (folder / "new").touch()
        assert link.is_symlink() and [path.name for path in (tmp_path / leads_to).iterdir()] == ["new"]


def test_a_name_as_long_as_the_disk_holds_is_written(tmp_path: Path) -> None:
    target = tmp_path / ("é" * 127)
    with folder_written_whole(target, "mark") as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_where_the_new_folder_cannot_take_its_place_the_older_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real = tmp_path / "result", os.replace
    with folder_written_whole(target, "mark") as folder:
        (folder / "mark").touch()

    def replace(source: Path, destination: Path) -> None:
        if destination == target and ".old" not in source.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    with (
        pytest.raises(UserError, match="result cannot be written: Input/output error"),
        folder_written_whole(target, "mark"),
    ):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["result", "mark"]
