"""What is looked at on each worker of a cluster before the first picture."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataset_tools.errors import UserError
from flows import preflight
from flows.preflight import Needs, _ask_dask, _complaint, _software, lacks_of
from flows.settings import BuildSettings, RunnerSettings


@pytest.fixture
def needs(tmp_path: Path) -> Callable[..., Needs]:
    """What a flow on this machine asks for; settings may be changed, and fields of `Needs` itself."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_bytes(b"")
    (tmp_path / "dataset.work").mkdir()
    (tmp_path / "dataset.work/token").write_text("token")

    def make(settings: dict[str, Any] | None = None, **changed: Any) -> Needs:
        source = {"kind": "folder", "photos": str(tmp_path / "photos")}
        network = {"kind": "transformers", "weights": "drawn-people"}
        values = {"name": "test", "source": source, "instances": network, **(settings or {})}
        checked = BuildSettings.check(values, origin="test")
        fingerprints = {name: each.open().fingerprint() for name, each in checked.networks().items()}
        fields = {"settings": checked, "root": str(tmp_path / "dataset"), "token": "token", "software": _software()}
        return Needs(**{**fields, "fingerprints": fingerprints, **changed})

    return make


def test_a_worker_that_has_all_lacks_nothing_and_leaves_nothing(needs: Callable[..., Needs], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert lacks_of(needs()) == []
    assert sorted(tmp_path.rglob("*")) == before


def test_each_thing_that_a_worker_lacks_is_named(needs: Callable[..., Needs], tmp_path: Path) -> None:
    asked = needs(
        root=str(tmp_path / "elsewhere"), software=_software() | {"numpy": "9"}, fingerprints={"instances": "x"}
    )
    (tmp_path / "photos/one.jpg").unlink()
    (tmp_path / "photos").rmdir()
    version, disk, source, weights = lacks_of(asked)
    assert version.startswith("numpy is ") and version.endswith(", not 9 as where the flow runs")
    assert f"does not see what the flow wrote into {tmp_path}/elsewhere.work" in disk and "s3://" in disk
    assert f"{tmp_path}/photos" in source
    assert weights.startswith("instances: its weights, or the packages that run them, are others")


def test_what_workers_lack_is_one_message_that_says_who_lacks_it() -> None:
    answers = {f"tcp://{number}": ["pillow is old"] for number in range(5)} | {
        "tcp://9": [],
        "tcp://8": OSError("gone"),
    }
    assert _complaint(answers) == (
        "runner: 6 of 7 workers cannot be used: pillow is old (tcp://0, tcp://1, tcp://2 and 2 more); "
        "OSError: gone (tcp://8)"
    )
    assert _complaint({"tcp://9": []}) == ""


def _die(needs: Needs) -> list[str]:
    """End the worker that is looked at, until two have ended."""
    dead = Path(needs.root, str(len(os.listdir(needs.root))))
    if dead.name == "2":
        return []
    dead.touch()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.process
def test_workers_that_die_as_they_are_looked_at_are_not_waited_for_but_those_in_their_place(
    needs: Callable[..., Needs], tmp_path: Path, forked_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import Client, LocalCluster

    asked = needs({"runner": {"kind": "dask", "workers": 1}}, root=str(tmp_path / "dead"))
    (tmp_path / "dead").mkdir()
    monkeypatch.setattr(preflight, "lacks_of", _die)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,  # as Prefect's
    ):
        runner = SimpleNamespace(client=client)
        monkeypatch.setattr(preflight, "DEATHS", 0)
        with pytest.raises(UserError, match=r"the workers at tcp://.* die as"):
            _ask_dask(runner, asked.settings, asked)
        monkeypatch.undo()
        monkeypatch.setattr(preflight, "lacks_of", _die)
        assert list(_ask_dask(runner, asked.settings, asked).values()) == [[]]
    assert sorted(os.listdir(tmp_path / "dead")) == ["0", "1"]


@pytest.mark.parametrize("address", ["tcp://scheduler:8786", "tls://10.0.0.1:8786", "ray://head.cluster:10001"])
def test_the_address_of_a_cluster_stays_as_it_is(address: str) -> None:
    assert RunnerSettings.check({"kind": "dask", "address": address}, origin="test").address == address


@pytest.mark.parametrize(
    ("kind", "address", "complaint"),
    [
        ("ray", "auto", "this is no address of a cluster: write it as"),  # Ray's runner would start one of its own
        ("dask", "tcp://me:secret@scheduler:8786", "this is no address of a cluster: write it as"),
        ("threads", "tcp://scheduler:8786", "set kind to dask or ray"),
    ],
)
def test_what_is_no_address_of_a_cluster_is_refused(kind: str, address: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as told:
        RunnerSettings.check({"kind": kind, "address": address}, origin="test")
    assert "secret" not in str(told.value)
