"""``mild weights``, with a network of the table that lies on a web server here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dataset_tools.networks import NETWORKS, WeightsFile
from flows.commands import weights as command

BODY = bytes(range(256)) * 300

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mild(mild_anew: Command) -> Command:
    """``mild weights``; gives exit code, stdout and stderr."""
    return partial(mild_anew, "weights")


@pytest.fixture
def file(tmp_path: Path, serve_files: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the only file of the network ``small`` belongs; it is on the server, and caches are empty."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "small.pth").write_bytes(BODY)
    url = f"{serve_files(served).url}/small.pth"
    files = (WeightsFile("small.pth", hashlib.sha256(BODY).hexdigest(), len(BODY)),)
    row = replace(NETWORKS["maskrcnn"], name="small", url=url, files=files, about="a small one")
    monkeypatch.setitem(NETWORKS, "small", row)
    return tmp_path / "torch" / "hub" / "checkpoints" / "small.pth"


def row_of(name: str, out: str) -> str:
    (row,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
    return row


def test_the_list_says_who_may_use_what_and_whether_it_is_here(
    mild: Command, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without reading a single file of weights."""
    monkeypatch.setattr(hashlib, "file_digest", None)
    code, out, _ = mild("list")
    assert code == 0
    for name, network in NETWORKS.items():
        row = row_of(name, out)
        assert network.weights_licence in row and network.code_licence in row
        assert row.split()[-1] == ("no" if network.hub or network.url else "yes")
        assert f" {'yes' if network.commercial else 'no'} " in row
    file.parent.mkdir(parents=True)
    file.write_bytes(BODY)
    assert row_of("small", mild("list")[1]).split()[-1] == "yes"


def test_pull_fetches_and_says_under_which_licence(mild: Command, file: Path) -> None:
    for _ in range(2):
        code, out, _ = mild("pull", "small")
        assert code == 0 and file.read_bytes() == BODY
        assert "small is here: a small one; licence: BSD-3-Clause" in out


def test_pull_puts_networks_into_a_folder_of_choice(mild: Command, file: Path, tmp_path: Path) -> None:
    assert mild("pull", "small", "--to", tmp_path / "own")[0] == 0
    assert (tmp_path / "own" / "small" / "small.pth").read_bytes() == BODY
    assert not file.exists()


def test_the_folder_of_choice_may_be_below_home_but_not_on_a_store(
    mild: Command, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mild("pull", "small", "--to", "~/weights")[0] == 0
    assert (tmp_path / "weights/small/small.pth").read_bytes() == BODY
    code, _, error = mild("pull", "small", "--to", "s3://bucket/weights")
    assert code == 2 and "weights can only be on a local disk" in error


def test_what_comes_with_the_package_is_here_and_sound(mild: Command) -> None:
    assert mild("pull", "drawn-people")[0] == 0
    code, out, _ = mild("check")
    assert code == 0 and "drawn-people: sound" in out


def test_pull_fetches_nothing_where_one_of_the_names_is_wrong(mild: Command, file: Path) -> None:
    code, _, err = mild("pull", "small", "vitpose-bas")
    assert code == 2 and "did you mean vitpose-base?" in err
    assert not file.exists()


def test_pull_refuses_what_is_not_as_the_table_says(mild: Command, file: Path, tmp_path: Path) -> None:
    (tmp_path / "served" / "small.pth").write_bytes(BODY[:-1] + b"x")
    code, _, err = mild("pull", "small")
    (said,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and "sent something else than it should, which was removed" in said
    assert list(file.parent.iterdir()) == []


def test_a_pull_that_is_stopped_says_that_it_can_go_on(
    mild: Command, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "pull", stopped)
    code, _, err = mild("pull", "small")
    assert code == 130 and "the next pull goes on from there" in err


def test_check_finds_what_is_damaged_and_says_how_to_mend_it(
    mild: Command, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(NETWORKS, "drawn-people")  # which is always here
    mild("pull", "small")
    code, out, _ = mild("check")
    assert code == 0 and out == f"small: sound, in {file.parent}\n"
    file.write_bytes(BODY[:-1])
    code, out, _ = mild("check")
    assert code == 1 and f"{file} has {len(BODY) - 1} bytes" in out and "mild weights pull small" in out
    mild("pull", "small")
    assert mild("check")[0] == 0
