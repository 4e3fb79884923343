"""The flow ``select-plates``: methods propose, people decide while it waits, what they chose is a list of pairs."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
import yaml
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import FlowPauseTimeout, Pause
from prefect.flow_engine import run_flow
from prefect.states import Paused

from dataset_tools.errors import UserError
from dataset_tools.pair_list import PairRow, read_pair_list
from dataset_tools.schema import EncodingSettings, Origin, Person, Sample
from dataset_tools.shards import Manifest, ShardDataset, write_shard
from flows import waiting
from flows.pipeline import recipe_path
from flows.select_plates import select_plates
from flows.waiting import resume_waiting
from mild.evaluation.pairs import folder_beside
from mild.evaluation.review import NONE, Decisions, Review, ReviewSettings

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.slow]

METHODS = ["telea", "navier-stokes"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory, make_sample: Callable[..., Sample]) -> str:
    """A dataset of real pictures: a shard of two in train, one of one in test."""
    root = tmp_path_factory.mktemp("photographs") / "dataset"

    def real(index: int, split: str) -> Sample:
        drawn = make_sample(index)
        people = [
            Person(id=person.id, mask=person.mask, keypoints=person.keypoints, mask_score=0.5)
            for person in drawn.people
        ]
        credit = {name: f"{name} {index}" for name in ("licence", "author", "author_url", "title", "url")}
        origin = Origin("image", "drawn", str(index), **credit, landing_url="", sha256="0" * 64, transform="")
        changes: dict[str, Any] = {"split": split, "configuration": "real", "background": None, "people": people}
        return replace(drawn, **changes, origins=[origin], caption=f"picture {index}")

    def shard(split: str, number: int, *indices: int) -> Any:
        path = f"real/{split}-{number:06d}.tar"
        return write_shard([real(index, split) for index in indices], str(root), path, EncodingSettings(), [])

    shards = {"real": {"train": [shard("train", 0, 0, 1)], "test": [shard("test", 0, 2)]}}
    manifest = Manifest(name="drawn", shards=shards, files={}, source="", settings={}, software={})
    (root / "manifest.json").write_text(manifest.model_dump_json())
    return str(root)


def parameters(folder: Path, dataset: str, **changes: Any) -> dict[str, Any]:
    """Of the flow, into ``folder/out``."""
    recipe = folder / "review.yaml"
    recipe.write_text(yaml.safe_dump({"methods": METHODS, "wait_hours": 0, **changes}))
    return {"settings": str(recipe), "dataset": dataset, "adapters": "", "output": str(folder / "out")}


def decide(folder: Path, *, reviewer: str = "a secret name", leave: int = 0) -> None:
    """Of every picture the second method's plate, of the first picture none; ``leave`` are left undecided."""
    review, decisions = Review.read(folder / "out.work"), Decisions(folder_beside(folder / "out"))
    for number, item in enumerate(review.items[: len(review.items) - leave]):
        decisions.decide(reviewer, item.id, item.proposals[1].sha256 if number else NONE)


def content(folder: Path) -> dict[str, bytes]:
    """All files below, by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(photographs: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Proposed, refused since nobody has decided, decided, done."""
    folder = tmp_path_factory.mktemp("selected")
    with pytest.raises(UserError, match=r"3 of 3 pictures wait for a reviewer: mild review .*/out; then give"):
        select_plates(**parameters(folder, photographs))
    assert not (folder / "out").exists()
    decide(folder)
    return folder, select_plates(**parameters(folder, photographs))


def rows(folder: Path) -> list[PairRow]:
    found = [row for _, row in read_pair_list((folder / "out/pairs.jsonl").read_bytes())]
    assert all(isinstance(row, PairRow) for row in found)
    return found  # type: ignore[return-value]


def test_the_chosen_plates_are_pairs_with_all_that_the_pictures_had(
    finished: tuple[Path, dict[str, Any]], photographs: str
) -> None:
    folder, result = finished
    assert (result["chosen"], result["none"], result["undecided"]) == (2, 1, 0)
    assert result["methods"] == {"navier-stokes": 2}
    samples = [sample for split in ("train", "test") for sample in ShardDataset(photographs, "real", split)]
    found = rows(folder)
    assert [row.id for row in found] == [sample.key for sample in samples[1:]]
    for row, sample in zip(found, samples[1:], strict=True):
        read = {name: np.asarray(Image.open(folder / "out" / getattr(row, name))) for name in ("image", "background")}
        masks = [np.asarray(Image.open(folder / "out" / mask)) >= 128 for mask in row.masks]
        assert np.array_equal(read["image"], sample.image)
        hole = np.logical_or.reduce([person.mask for person in sample.people])
        expected = cv2.inpaint(sample.image, hole.astype(np.uint8), 3, cv2.INPAINT_NS)
        assert np.array_equal(read["background"], np.where(hole[..., None], expected, sample.image))
        assert np.array_equal(masks, [person.mask for person in sample.people])
        assert (row.split, row.caption, row.mask_scores) == (sample.split, sample.caption, [0.5] * len(masks))
        (origin,) = sample.origins
        names = ("licence", "author", "author_url", "title", "url", "landing_url")
        assert [getattr(row, name) for name in names] == [getattr(origin, name) for name in names]
        assert (row.plate_by.name, row.plate_by.network) == ("chosen", "navier-stokes")
        assert not row.tells_effects  # outside of the masks the plate is the picture


def test_who_decided_is_nowhere_but_in_the_database(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    assert "secret name" not in str(result)
    holding = [path for path, data in content(folder).items() if b"secret name" in data]
    assert holding == ["out-judged/decisions.sqlite"]


def test_a_second_run_does_nothing_again(finished: tuple[Path, dict[str, Any]], photographs: str) -> None:
    folder, result = finished
    before = content(folder / "out")
    again = select_plates(**parameters(folder, photographs))
    assert (again["cached"], content(folder / "out")) == (again["steps"], before)
    assert result["cached"] == result["steps"] - 1, "all but the list was there from the run before the decisions"


def test_killed_and_started_again_the_bytes_are_the_same(
    finished: tuple[Path, dict[str, Any]], photographs: str, tmp_path: Path, run_killed: Callable[..., None]
) -> None:
    """SIGKILL while the second method works on its second shard, and again while the pairs are written."""
    shutil.copytree(finished[0] / "out-judged", tmp_path / "out-judged")
    for function, call in (("mild.evaluation.compare.Bench.erase_cases", 4), ("flows.select_plates._row", 2)):
        run_killed(function, call, select_plates, **parameters(tmp_path, photographs))
        assert not (tmp_path / "out").exists()
    result = select_plates(**parameters(tmp_path, photographs))
    assert result["cached"] == result["steps"] - 1
    assert content(tmp_path / "out") == content(finished[0] / "out")


def test_a_run_of_the_command_line_pauses_and_goes_on_when_all_is_decided(
    finished: tuple[Path, dict[str, Any]], photographs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused, results = threading.Event(), list[Any]()
    monkeypatch.setattr(waiting, "LOOKED_EVERY", 0.2)
    pause, sleep = waiting.pause_flow_run, time.sleep

    def asleep(seconds: float) -> None:
        paused.set()
        sleep(seconds)

    def told(**options: Any) -> None:
        # Prefect sleeps as soon as its server knows that the run is paused.
        monkeypatch.setattr("time.sleep", asleep)
        pause(**options)

    monkeypatch.setattr(waiting, "pause_flow_run", told)
    given = parameters(tmp_path, photographs, wait_hours=1)
    running = threading.Thread(target=lambda: results.append(select_plates(**given)))
    running.start()
    assert paused.wait(60)
    assert not (tmp_path / "out").exists()
    decide(tmp_path)
    assert resume_waiting(str(tmp_path / "out.work")).endswith(" goes on.")
    running.join(60)
    assert results[0]["chosen"] == 2
    assert content(tmp_path / "out") == content(finished[0] / "out")
    assert resume_waiting(str(tmp_path / "out.work")).startswith("No flow run waits")


def test_a_server_that_is_busy_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its database is locked while others write: it says 503 three times, and once more where others do write here."""
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(select_plates, parameters={}, name="slow one", state=Paused(timeout_seconds=3600))
    given = {"flow_run": str(run.id), "name": run.name, "api": ""}
    (tmp_path / waiting.WAITING).write_text(json.dumps(given))
    send, busy = httpx.HTTPTransport.handle_request, [httpx.Response(503)] * 3

    def answer(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        return busy.pop() if request.url.path.endswith("/resume") and busy else send(transport, request)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", answer)
    monkeypatch.setattr("prefect.client.base.time", SimpleNamespace(sleep=lambda seconds: None))
    assert resume_waiting(str(tmp_path)) == "Flow run slow one goes on."
    assert not busy


def test_a_deployments_run_is_suspended_and_begins_anew_without_proposing_again(
    finished: tuple[Path, dict[str, Any]], photographs: str, tmp_path: Path
) -> None:
    """Resumed when not everything is decided, it goes on with what is."""
    given = parameters(tmp_path, photographs)
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow(select_plates), "reviewed")

        def state_of(run: FlowRun) -> Any:
            state = client.read_flow_run(run.id).state
            assert state is not None
            return state

        run = client.create_flow_run_from_deployment(deployment, parameters=given)
        with pytest.raises(Pause):
            run_flow(select_plates, flow_run=run, parameters=given)
        assert (state_of(run).type, state_of(run).name) == (StateType.PAUSED, "Suspended")
        decide(tmp_path, leave=1)
        assert resume_waiting(str(tmp_path / "out.work")).endswith(" goes on.")
        assert state_of(run).type == StateType.SCHEDULED
        result: Any = run_flow(select_plates, flow_run=client.read_flow_run(run.id), parameters=given)
        assert state_of(run).type == StateType.COMPLETED
    assert (result["chosen"], result["none"], result["undecided"]) == (1, 1, 1)
    assert result["cached"] == result["steps"] - 1
    assert rows(tmp_path) == rows(finished[0])[:1]


def test_a_run_that_waits_in_vain_says_what_to_do_and_equal_plates_are_one(
    photographs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_vain(**options: Any) -> None:
        assert options["timeout"] == 5400
        raise FlowPauseTimeout

    monkeypatch.setattr(waiting, "pause_flow_run", in_vain)
    twins = ["telea", {"kind": "telea", "name": "twin"}, "mild"]
    with pytest.raises(UserError, match=r"nobody has finished in 1.5 hours; 3 of 3 pictures .* mild review .*/out"):
        select_plates(**parameters(tmp_path, photographs, methods=twins, wait_hours=1.5))
    review = Review.read(tmp_path / "out.work")
    assert all([proposal.method for proposal in item.proposals] == ["telea"] for item in review.items)
    assert not list(tmp_path.glob("*/waiting.json"))


def test_where_no_method_can_run_each_says_why(photographs: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no method can be run: mild: no adapters are named"):
        select_plates(**parameters(tmp_path, photographs, methods=["mild"]))


def test_the_recipe_of_the_package_is_valid() -> None:
    assert [method.name for method in ReviewSettings.load(recipe_path("review", "sample")).methods] == [
        *("smooth-fill", "telea", "navier-stokes", "base", "mild")
    ]


def test_a_dataset_without_such_pictures_is_told_at_once(drawn_dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds none of real/train, .*: composite/train"):
        select_plates(**parameters(tmp_path, drawn_dataset))
    assert not (tmp_path / "out.work").exists()
