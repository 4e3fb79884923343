"""A real Prefect server and a real process worker on loopback run the deployments of prefect.yaml."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
import yaml
from safetensors.torch import load_file, save_file

from flows.names import artifact_key
from mild.bases import NANO
from mild.settings import TrainSettings
from mild.training.launch import TrainRequest, train_here

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
PREFECT = str(Path(sys.executable).with_name("prefect"))
MARK = 1234.5
"""A loss that no training gives."""
SHORT = {
    "train": {
        **{"steps": 10, "batch_size": 2, "resolution": 32, "checkpoint_every": 1, "warm_up": {"start": 1, "end": 2}},
        "mild": {"hmg": {"width": 8, "map_side": 16}},
    }
}
"""A training recipe for the deployment ``train/sample``."""
QUICK = {
    "datasets": {"drawn": {"configuration": "composite", "split": "train", "samples": 2}},
    "methods": ["telea"],
    "metrics": ["psnr_hole"],
    "resamples": 100,
}
"""An evaluation recipe for the deployment ``evaluate/sample``."""
SMALL = {
    "source": {"kind": "sample", "smallest": 192, "largest": 224}
    | {"train": 6, "validation": 1, "test": 1}
    | {"train_backgrounds": 4, "validation_backgrounds": 1, "test_backgrounds": 1},
    "composite": {"samples": {"train": 4, "validation": 0, "test": 0}, "size": [96, 96], "donors": {"min_height": 24}},
    # The same pictures are broken in every world.
    "max_rejected_share": 1.0,
}
"""Changes of the building recipe for the deployment ``build-dataset/sample``."""
DEPLOY_TWICE = """
from flows.cli import main

for _ in range(2):
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""
"""In one process, as two would import most of Prefect twice."""
HEARTBEAT = "prefect.flow-run.heartbeat"
DEAD_AFTER = "mild: a run without heartbeats has crashed"


@dataclass
class Server:
    """A running server, its workers, and a folder that holds what they write."""

    client: httpx.Client
    """Of its REST API."""
    folder: Path
    environment: dict[str, str]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start something that goes on running, in a folder of its own; what it says goes to a file of that name."""
        own = self.folder / name
        own.mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                command, cwd=own, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self.running.append(process)
        return process

    def wait_until(self, happened: Callable[[], bool], pause: float) -> None:
        """Wait for something that the worker, the last that was started and not killed, brings about."""
        deadline = time.monotonic() + 600
        while not happened():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.running[-1].wait(timeout=pause)
            assert self.running[-1].poll() is None and time.monotonic() < deadline, self.worker_log()

    def worker_log(self) -> str:
        """The end of what the workers said."""
        return (self.folder / "worker.log").read_text()[-5000:]

    def start_worker(self) -> subprocess.Popen[bytes]:
        """Start a worker for the work pool of processors."""
        return self.start("worker", PREFECT, "worker", "start", "--pool", "mild-cpu", "--name", "test")

    def kill_worker(self) -> None:
        """End the worker and all that it started at once, as a machine that loses its power does."""
        family = [parent := psutil.Process(self.running.pop().pid), *parent.children(recursive=True)]
        assert any("mild.training.launch" in member.cmdline() for member in family)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family)

    def deploy_twice(self, repository: Path) -> None:
        """Run ``mild deploy`` in this repository, for workers that clone another."""
        options = ["--data", str(self.folder / "data"), "--repository", repository.as_uri()]
        command = [sys.executable, "-c", DEPLOY_TWICE, "deploy", *options]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def ask(self, path: str, **question: Any) -> Any:
        """POST to the REST API."""
        return self.client.post(path, json=question).raise_for_status().json()

    def build(self) -> None:
        """Run the deployment ``build-dataset/sample`` to its end."""
        deployment = self.client.get("/deployments/name/build-dataset/sample").raise_for_status().json()
        self.ask(f"/deployments/{deployment['id']}/create_flow_run", parameters={"changes": SMALL})
        self.wait_until(lambda: self.has_ended("build-dataset"), pause=0.5)
        assert all(run["state"]["type"] == "COMPLETED" for run in self.runs_of("build-dataset")), self.worker_log()

    def events(self, name: str, flow_run: str) -> list[dict[str, Any]]:
        """Events of a name that are of a flow run, or about one."""
        resource = f"prefect.flow-run.{flow_run}"
        asked = {"event": {"name": [name]}, "any_resource": {"id": [resource]}}
        events: list[dict[str, Any]] = self.ask("/events/filter", filter=asked)["events"]
        return events

    def beat_once_more(self, flow_run: str) -> None:
        """Send what the flow run itself has sent once, as if it was sent now."""
        self.wait_until(lambda: bool(self.events(HEARTBEAT, flow_run)), pause=0.5)
        beat = self.events(HEARTBEAT, flow_run)[0]
        sent = {"event": HEARTBEAT, "resource": beat["resource"], "related": beat["related"]}
        now = datetime.now(UTC).isoformat()
        self.client.post("/events", json=[sent | {"id": str(uuid4()), "occurred": now}]).raise_for_status()

    def set_patience(self, seconds: float) -> float:
        """How long heartbeats may be missing from now on; gives how long it was before."""
        (found,) = [each for each in self.ask("/automations/filter") if each["name"] == DEAD_AFTER]
        before = found["trigger"]["within"]
        found["trigger"]["within"] = seconds
        fields = ("name", "description", "enabled", "trigger", "actions")
        changed = {field: found[field] for field in fields}
        self.client.put(f"/automations/{found['id']}", json=changed).raise_for_status()
        return float(before)

    def runs_of(self, flow: str) -> list[dict[str, Any]]:
        """Flow runs of one flow, oldest first."""
        runs: list[dict[str, Any]] = self.ask(
            "/flow_runs/filter", flows={"name": {"any_": [flow]}}, sort="START_TIME_ASC"
        )
        return runs

    def has_ended(self, flow: str) -> bool:
        """Whether all runs of a flow have ended."""
        return all(run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED") for run in self.runs_of(flow))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> Iterator[Server]:
    """Server, deployments, worker; runs clone another copy of the flows, whose sample trains shortly."""
    folder = tmp_path_factory.mktemp("machine")
    home = tmp_path_factory.mktemp("prefect-home")
    shutil.copy(prefect_database, home)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT")},
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S",
        # The worker looks for work every second.
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "DO_NOT_TRACK": "1",
    }
    # httpx tries again with growing pauses while nobody listens yet.
    client = httpx.Client(base_url=environment["PREFECT_API_URL"], transport=httpx.HTTPTransport(retries=9), timeout=60)
    server = Server(client, folder, environment)
    try:
        server.start("server", PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port))
        repository = commit_flows(tmp_path_factory.mktemp("repository"))
        client.get("/health").raise_for_status()
        server.deploy_twice(repository)
        server.start_worker()
        yield server
    finally:
        # They would wait for each other, and nothing of theirs is kept.
        for process in reversed(server.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        client.close()


def commit_flows(folder: Path) -> Path:
    """A git repository with a copy of the flows, and recipes that take less time."""
    shutil.copytree(ROOT / "flows", folder / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "flows/recipes/train-sample.yaml").write_text(yaml.safe_dump(SHORT))
    (folder / "flows/recipes/evaluate-sample.yaml").write_text(yaml.safe_dump(QUICK))
    own = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for words in (("init", "--quiet"), ("add", "."), (*own, "commit", "--quiet", "--message", "flows")):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def test_every_deployment_is_there_and_training_is_scheduled_but_paused(server: Server) -> None:
    """``mild deploy`` makes the eight, with schedules, pools and automations; a second time nothing is there twice."""
    deployments = server.ask("/deployments/filter")
    flows = {flow["id"]: flow["name"] for flow in server.ask("/flows/filter")}
    names = {f"{flows[deployment['flow_id']]}/{deployment['name']}": deployment for deployment in deployments}
    assert set(names) == {
        "build-dataset/sample",
        "build-dataset/openimages",
        "train/sample",
        "train/sdxl",
        "pretrain-base/nano",
        "evaluate/sample",
        "select-plates/sample",
        "pipeline/sample",
    }
    for name in ("train/sample", "train/sdxl"):
        (schedule,) = names[name]["schedules"]
        assert not schedule["active"]
    pools = {deployment: names[deployment]["work_pool_name"] for deployment in names}
    assert {name for name, pool in pools.items() if pool == "mild-gpu"} == {"train/sdxl", "pretrain-base/nano"}
    assert (
        {pool["name"] for pool in server.ask("/work_pools/filter")} == {"mild-cpu", "mild-gpu"} == set(pools.values())
    )
    assert sorted(automation["name"] for automation in server.ask("/automations/filter")) == [
        "evaluate/sample when the sample adapters are ready",
        "mild: a crashed run is started again",
        DEAD_AFTER,
        "train/sample when the sample dataset is ready",
    ]


@dataclass(frozen=True)
class Story:
    """A dataset is built, which starts training; its worker is killed, and a new one takes it up again."""

    dataset: Path
    adapters: Path
    finished_when_killed: bool
    """Whether the adapters were there already."""
    state_when_killed: str
    """What the server knew of the training run then."""


@pytest.fixture(scope="module")
def story(server: Server) -> Story:
    """The second worker ends the training and, meanwhile, builds the dataset once more."""
    dataset, adapters = server.folder / "data/sample", server.folder / "data/sample-adapters"
    server.build()

    checkpoints = Path(f"{adapters}.work/checkpoints")
    server.wait_until(lambda: any(checkpoints.glob("step-*")), pause=0.05)
    server.kill_worker()
    finished = adapters.exists()
    mark(max(checkpoints.glob("step-*")))
    (trained,), (built,) = server.runs_of("train"), server.runs_of("build-dataset")
    # While nothing runs, the least that Prefect allows.
    patience = server.set_patience(10)
    for run in (trained, built):
        server.beat_once_more(run["id"])
    server.wait_until(lambda: server.runs_of("train")[0]["state"]["type"] == "SCHEDULED", pause=0.5)
    server.wait_until(lambda: bool(server.events("prefect.automation.action.failed", built["id"])), pause=0.5)
    server.set_patience(patience)
    server.start_worker()
    server.build()
    server.wait_until(lambda: server.has_ended("train"), pause=0.5)
    server.wait_until(lambda: bool(server.runs_of("evaluate")) and server.has_ended("evaluate"), pause=0.5)
    return Story(dataset, adapters, finished, trained["state"]["type"])


def test_the_deployment_builds_then_is_cached_and_starts_training(server: Server, story: Story) -> None:
    """Run twice to completion by the worker; the second time every shard is cached. The new dataset starts training."""
    key = artifact_key("dataset-shards", str(story.dataset))
    artifacts = server.ask("/artifacts/filter", artifacts={"key": {"any_": [key]}}, sort="ID_DESC")
    told = sorted(artifact["description"].split(": ")[1] for artifact in artifacts)
    shards = sorted(str(path.relative_to(story.dataset)) for path in story.dataset.glob("*/*.index.json"))
    assert told == [f"0 of {len(shards)} shards were cached", f"{len(shards)} of {len(shards)} shards were cached"]
    keys = {artifact["key"] for artifact in server.ask("/artifacts/filter")}
    shown = ("build-progress", "dataset-shards", "dataset-rejected", "dataset-contact-sheet")
    assert keys >= {artifact_key(what, str(story.dataset)) for what in shown}

    (run,) = server.runs_of("train")
    assert run["state"]["type"] == "COMPLETED", server.worker_log()
    assert run["parameters"]["dataset"] == str(story.dataset)
    assert (story.adapters / "pytorch_lora_weights.safetensors").stat().st_size > 0


def test_runs_are_called_by_what_they_do_and_say_a_line_a_shard(server: Server, story: Story) -> None:
    assert {run["name"] for run in server.runs_of("build-dataset")} == {"build-dataset data/sample"}
    assert [run["name"] for run in server.runs_of("train")] == ["train data/sample -> data/sample-adapters"]
    tasks = {run["id"]: run["name"] for run in server.ask("/task_runs/filter")}
    lines = server.ask("/logs/filter", logs={"task_run_id": {"any_": list(tasks)}})
    told = [tasks[line["task_run_id"]] for line in lines if line["message"].startswith("samples: ")]
    shards = [path.relative_to(story.dataset).with_suffix("").with_suffix("") for path in story.dataset.glob("*/*.tar")]
    assert len(shards) > 1
    assert sorted(name.rpartition(" ")[2] for name in told) == sorted(map(str, shards))
    assert "data/sample build-composite-shard composite/train-000000" in told


def test_workers_leave_nothing_in_their_own_folder(server: Server, story: Story) -> None:
    """Code is cloned and removed again, and what is made goes where the deployments say."""
    assert list((server.folder / "worker").iterdir()) == []


def test_adapters_that_are_ready_start_their_evaluation(server: Server, story: Story) -> None:
    """Once: the retried training made them once."""
    (run,) = server.runs_of("evaluate")
    assert run["state"]["type"] == "COMPLETED", server.worker_log()
    assert run["parameters"]["adapters"] == str(story.adapters)
    assert run["parameters"]["dataset"] == str(story.dataset)
    assert (server.folder / "data/sample-evaluation/report.html").is_file()


def test_training_goes_on_after_its_worker_was_killed(server: Server, story: Story, tmp_path: Path) -> None:
    """SIGKILL to the worker and all below it, and a new worker: weights to the bit as if nothing had happened.

    Nobody is left to tell the server, for which the run stays Running until heartbeats are missing.
    """
    assert not story.finished_when_killed
    assert story.state_when_killed == "RUNNING"
    (run,) = server.runs_of("train")
    assert (run["state"]["type"], run["run_count"]) == ("COMPLETED", 2), server.worker_log()

    undisturbed = tmp_path / "undisturbed"
    train_here(
        TrainRequest(
            settings=TrainSettings.model_validate(SHORT["train"]),
            dataset=str(story.dataset),
            configurations={"composite": 1.0},
            split="train",
            dataset_digest="d",
            base=NANO,
            base_digest="b",
            output=str(undisturbed),
        ),
        lambda step, values: None,
    )
    assert weights_in(story.adapters) == weights_in(undisturbed)
    with (story.adapters / "loss.csv").open() as file:
        assert float(next(csv.DictReader(file))["loss"]) == MARK, "it went on from the checkpoint"


def test_a_heartbeat_after_the_end_neither_crashes_a_run_nor_starts_it_again(server: Server, story: Story) -> None:
    """The first build had completed when one arrived, and no other followed; the server refused to change its state."""
    first = server.runs_of("build-dataset")[0]
    assert (first["state"]["type"], first["run_count"]) == ("COMPLETED", 1)
    assert not server.events("prefect.flow-run.Crashed", first["id"])
    (refused,) = server.events("prefect.automation.action.failed", first["id"])
    assert "already in terminal state COMPLETED" in refused["payload"]["reason"]


def mark(checkpoint: Path) -> None:
    """Let a checkpoint remember `MARK` as the loss of its first step."""
    tensors = load_file(checkpoint / "tensors.safetensors")
    tensors["losses"][0] = MARK
    save_file(tensors, checkpoint / "tensors.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())
    state["sha256"] = hashlib.sha256((checkpoint / "tensors.safetensors").read_bytes()).hexdigest()
    (checkpoint / "state.json").write_text(json.dumps(state))


def weights_in(folder: Path) -> dict[str, bytes]:
    """Files of weights by name."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert len(files) == 5
    return files
