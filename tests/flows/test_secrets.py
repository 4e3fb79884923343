"""Secrets of storage: a flow reads a mirror that demands them, and nothing that it leaves behind holds them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dask
import pytest
import yaml
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client

from dataset_tools.errors import UserError
from dataset_tools.shards import read_manifest
from dataset_tools.sources.sample import SampleSettings, write_mirror
from flows.build_dataset import build_dataset
from flows.evaluate import check_evaluate
from flows.select_plates import check_select_plates
from flows.train import check_train

pytestmark = pytest.mark.usefixtures("prefect_server")

TOKEN, PASSWORD = "Bearer 7f3c-not-to-be-seen-91ab", "pass-word-not-to-be-seen-4410"


@pytest.fixture
def recorded() -> Callable[[], str]:
    """Gives all that the server says about flows, logs, artifacts and events, tasks' too, since the test began."""
    begun = datetime.now(UTC)
    return lambda: _recorded(begun.isoformat())


def _recorded(begun: str) -> str:
    said = []
    since = {"logs": {"logs": {"timestamp": {"after_": begun}}}}
    with get_client(sync_client=True) as client:
        for kind in ("flow_runs", "logs", "artifacts"):
            offset, found = 0, [None]
            while found:
                answer = client._client.post(
                    f"/{kind}/filter", json={"limit": 200, "offset": offset, **since.get(kind, {})}
                )
                answer.raise_for_status()
                found = answer.json()
                offset += len(found)
                said.append(answer.text)
        answer = client._client.post("/events/filter", json={"filter": {"occurred": {"since": begun}}, "limit": 50})
        while True:
            answer.raise_for_status()
            said.append(answer.text)
            if not answer.json()["next_page"]:
                return "".join(said)
            answer = client._client.get(answer.json()["next_page"])


def test_a_build_from_a_mirror_that_demands_secrets_leaves_them_nowhere(
    tmp_path: Path,
    serve_files: Callable[..., Any],
    recorded: Callable[[], str],
    forked_workers: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One from a block, one from the environment, looked up in the Dask worker; one picture fails, and says so."""
    sample = SampleSettings(
        train=2, validation=1, test=1, train_backgrounds=1, validation_backgrounds=1, test_backgrounds=1,
        smallest=128, largest=160, broken=False,
    )  # fmt: skip
    write_mirror(sample, str(tmp_path / "mirror"))
    next((tmp_path / "mirror/images/train").iterdir()).unlink()
    server = serve_files(tmp_path / "mirror", demands={"Authorization": TOKEN, "X-Password": PASSWORD})
    Secret(value=TOKEN).save("mirror-token", overwrite=True)
    opened = {"headers": {"Authorization": {"block": "secret/mirror-token"}, "X-Password": {"env": "MIRROR_PASSWORD"}}}
    source = {
        "kind": "openimages",
        "root": f"{server.url}/",
        "root_options": {"client_kwargs": opened},
        "images": f"{server.url}/images/",
        "images_options": {"client_kwargs": opened},
        "fetch": {"attempts": 1, "allow_private_addresses": True},
        "curation": {"images_per_stratum": None, "backgrounds": 0},
    }
    recipe = tmp_path / "build.yaml"
    recipe.write_text(yaml.safe_dump({"name": "secrets", "source": source, "runner": {"kind": "dask", "workers": 1}}))
    monkeypatch.setenv("MIRROR_PASSWORD", PASSWORD)
    with dask.config.set({"distributed.nanny.environ.MIRROR_PASSWORD": PASSWORD}):
        summary = build_dataset(str(recipe), str(tmp_path / "dataset"))
    assert summary["samples"] > 0
    assert read_manifest(str(tmp_path / "dataset")).shards["real"]
    said = recorded()
    assert "MIRROR_PASSWORD" in said and "mirror-token" in said
    files = [path for name in ("dataset", "dataset.work") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert len(files) > 6
    for secret in (TOKEN, TOKEN.split()[1], PASSWORD):
        assert secret not in said
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_a_wrong_secret_ends_the_build_with_a_line_that_does_not_repeat_it(
    tmp_path: Path, serve_files: Callable[..., Any], recorded: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve_files(tmp_path, demands={"Authorization": TOKEN})
    monkeypatch.setenv("MIRROR_PASSWORD", PASSWORD)
    options = {"headers": {"Authorization": {"env": "MIRROR_PASSWORD"}}}
    source = {"kind": "openimages", "root": server.url, "root_options": options}
    recipe = tmp_path / "build.yaml"
    recipe.write_text(json.dumps({"name": "secrets", "source": source}))
    with pytest.raises(UserError, match="HTTP 403") as caught:
        build_dataset(str(recipe), str(tmp_path / "dataset"))
    assert PASSWORD not in str(caught.value)
    assert PASSWORD not in recorded()


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ({"block": "secret/no-such-block"}, "no block secret/no-such-block"),
        ({"env": "NOT_SET_AT_ALL"}, "NOT_SET_AT_ALL"),
    ],
)
def test_what_is_not_there_is_named_before_anything_is_built(
    tmp_path: Path, reference: dict[str, str], complaint: str
) -> None:
    source = {"kind": "openimages", "root": "http://127.0.0.1:1", "root_options": {"headers": {"X-Key": reference}}}
    recipe = tmp_path / "build.yaml"
    recipe.write_text(json.dumps({"name": "secrets", "source": source}))
    with pytest.raises(UserError, match=complaint):
        build_dataset(str(recipe), str(tmp_path / "dataset"))
    assert [path.name for path in tmp_path.iterdir()] == ["build.yaml"]


@pytest.mark.parametrize("place", [f"ftp://me:{PASSWORD}@a.example/data", f"https://a.example/data?sig={PASSWORD}"])
def test_an_output_or_dataset_with_a_secret_in_its_url_is_refused_before_prefect_hears_of_it(
    tmp_path: Path, recorded: Callable[[], str], place: str
) -> None:
    output = str(tmp_path / "out")
    for refused in (
        lambda: build_dataset("flows/recipes/build-sample.yaml", place),
        lambda: check_train("flows/recipes/train-sample.yaml", place, output),
        lambda: check_evaluate("flows/recipes/evaluate-sample.yaml", place, "", output),
        lambda: check_select_plates("flows/recipes/review-sample.yaml", place, "", output),
    ):
        with pytest.raises(UserError, match=r"(output|dataset): .* carries a password, token or signature") as caught:
            refused()
        assert PASSWORD not in str(caught.value)
    assert PASSWORD not in recorded()


def test_a_plain_secret_is_refused_before_prefect_hears_of_it(tmp_path: Path, recorded: Callable[[], str]) -> None:
    """Given to the flow in Python as a change of settings, which Prefect would store with the run."""
    recipe = tmp_path / "build.yaml"
    recipe.write_text(json.dumps({"name": "secrets", "source": {"kind": "openimages", "root": str(tmp_path)}}))
    with pytest.raises(UserError, match="'secret' would hold a secret in plain text") as caught:
        build_dataset(str(recipe), str(tmp_path / "dataset"), {"source.root_options.secret": PASSWORD})
    assert PASSWORD not in str(caught.value)
    assert PASSWORD not in recorded()
