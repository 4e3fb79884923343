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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
import yaml
from safetensors.torch import load_file, save_file

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
COMMANDS = """
import json, sys
from prefect.cli import app

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["prefect", "--no-prompt", *arguments]
    try:
        app()
    except SystemExit as end:
        if end.code:
            raise
"""
"""Runs several ``prefect`` commands: each by itself would import most of Prefect."""


@dataclass
class Server:
    """A running server, and a folder from which its deployments are made."""

    client: httpx.Client
    """Of its REST API."""
    project: Path
    environment: dict[str, str]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start something that goes on running; what it says goes to a file of that name."""
        with (self.project / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                command, cwd=self.project, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self.running.append(process)
        return process

    def wait_until(self, happened: Callable[[], bool], pause: float) -> None:
        """Wait for something that the worker, the last that was started, brings about."""
        deadline = time.monotonic() + 300
        while not happened():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.running[-1].wait(timeout=pause)
            assert self.running[-1].poll() is None and time.monotonic() < deadline, self.worker_log()

    def worker_log(self) -> str:
        """The end of what the workers said."""
        return (self.project / "worker.log").read_text()[-5000:]

    def start_worker(self) -> subprocess.Popen[bytes]:
        """Start a worker for the work pool."""
        return self.start("worker", PREFECT, "worker", "start", "--pool", "mild", "--name", "test")

    def prefect(self, *commands: Sequence[str]) -> None:
        """Run commands of the ``prefect`` command line against this server."""
        command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
        done = subprocess.run(command, cwd=self.project, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def ask(self, path: str, **question: Any) -> Any:
        """POST to the REST API."""
        return self.client.post(path, json=question).raise_for_status().json()

    def build(self, output: Path) -> None:
        """Run the deployment ``build-dataset/sample`` to its end."""
        deployment = self.client.get("/deployments/name/build-dataset/sample").raise_for_status().json()
        parameters = {"output": str(output), "changes": SMALL}
        self.ask(f"/deployments/{deployment['id']}/create_flow_run", parameters=parameters)
        self.wait_until(lambda: self.has_ended("build-dataset"), pause=0.5)
        assert all(run["state"]["type"] == "COMPLETED" for run in self.runs_of("build-dataset")), self.worker_log()

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
    """Server, work pool, worker; the project's files lie in a folder of their own, where the sample trains shortly."""
    project = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "flows", project / "flows")
    shutil.copy(ROOT / "prefect.yaml", project)
    (project / "flows/recipes/train-sample.yaml").write_text(yaml.safe_dump(SHORT))
    (project / "flows/recipes/evaluate-sample.yaml").write_text(yaml.safe_dump(QUICK))
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
        # The worker looks for work every second.
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "DO_NOT_TRACK": "1",
    }
    # httpx tries again with growing pauses while nobody listens yet.
    client = httpx.Client(base_url=environment["PREFECT_API_URL"], transport=httpx.HTTPTransport(retries=9), timeout=60)
    server = Server(client, project, environment)
    try:
        server.start("server", PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port))
        client.get("/health").raise_for_status()
        server.prefect(
            ["work-pool", "create", "mild", "--type", "process"],
            ["global-concurrency-limit", "create", "mild-downloads", "--limit", "2"],
            ["deploy", "--all"],
        )
        server.start_worker()
        yield server
    finally:
        # They would wait for each other, and nothing of theirs is kept.
        for process in reversed(server.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        client.close()


def test_every_deployment_is_there_and_training_is_scheduled_but_paused(server: Server) -> None:
    """``prefect deploy --all`` makes the eight, with schedules and automation."""
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
    automations = server.ask("/automations/filter")
    expected = sorted(automation["trigger"]["expect"] for automation in automations)
    assert expected == [["mild.adapters.ready"], ["mild.dataset.ready"]]


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
    dataset, adapters = server.project / "dataset", server.project / "build/sample-adapters"
    server.build(dataset)

    checkpoints = Path(f"{adapters}.work/checkpoints")
    server.wait_until(lambda: any(checkpoints.glob("step-*")), pause=0.05)
    kill(server.running[-1])
    finished = adapters.exists()
    mark(max(checkpoints.glob("step-*")))
    (run,) = server.runs_of("train")
    server.ask(f"/flow_runs/{run['id']}/set_state", state={"type": "CRASHED", "name": "Crashed"}, force=True)
    server.start_worker()
    # As `prefect flow-run retry` does.
    server.ask(f"/flow_runs/{run['id']}/set_state", state={"type": "SCHEDULED"}, force=True)
    server.build(dataset)
    server.wait_until(lambda: server.has_ended("train"), pause=0.5)
    server.wait_until(lambda: bool(server.runs_of("evaluate")) and server.has_ended("evaluate"), pause=0.5)
    return Story(dataset, adapters, finished, run["state"]["type"])


def test_the_deployment_builds_then_is_cached_and_starts_training(server: Server, story: Story) -> None:
    """Run twice to completion by the worker; the second time every shard is cached. The new dataset starts training."""
    artifacts = server.ask("/artifacts/filter", artifacts={"key": {"any_": ["dataset-shards"]}}, sort="ID_DESC")
    told = sorted(artifact["description"].split(": ")[1] for artifact in artifacts)
    shards = len(list(story.dataset.glob("*/*.index.json")))
    assert told == [f"0 of {shards} shards were cached", f"{shards} of {shards} shards were cached"]
    keys = {artifact["key"] for artifact in server.ask("/artifacts/filter")}
    assert keys >= {"build-progress", "dataset-shards", "dataset-rejected", "dataset-contact-sheet"}

    (run,) = server.runs_of("train")
    assert run["state"]["type"] == "COMPLETED", server.worker_log()
    assert run["parameters"]["dataset"] == str(story.dataset)
    assert (story.adapters / "pytorch_lora_weights.safetensors").stat().st_size > 0


def test_adapters_that_are_ready_start_their_evaluation(server: Server, story: Story) -> None:
    """Once: the retried training made them once."""
    (run,) = server.runs_of("evaluate")
    assert run["state"]["type"] == "COMPLETED", server.worker_log()
    assert run["parameters"]["adapters"] == str(story.adapters)
    assert run["parameters"]["dataset"] == str(story.dataset)
    assert (server.project / "build/sample-evaluation/report.html").is_file()


def test_training_goes_on_after_its_worker_was_killed(server: Server, story: Story, tmp_path: Path) -> None:
    """SIGKILL to the worker and all below it, a new worker, a retry: weights to the bit as if nothing had happened.

    Nobody is left to tell the server, for which the run stays Running. It is marked as Crashed as its page's "Change
    state" does, and an automation on missing heartbeats.
    """
    assert not story.finished_when_killed
    assert story.state_when_killed == "RUNNING"
    (run,) = server.runs_of("train")
    assert run["state"]["type"] == "COMPLETED", server.worker_log()

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


def mark(checkpoint: Path) -> None:
    """Let a checkpoint remember `MARK` as the loss of its first step."""
    tensors = load_file(checkpoint / "tensors.safetensors")
    tensors["losses"][0] = MARK
    save_file(tensors, checkpoint / "tensors.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())
    state["sha256"] = hashlib.sha256((checkpoint / "tensors.safetensors").read_bytes()).hexdigest()
    (checkpoint / "state.json").write_text(json.dumps(state))


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started at once, as a machine that loses its power does."""
    family = [parent := psutil.Process(process.pid), *parent.children(recursive=True)]
    assert any("mild.training.launch" in member.cmdline() for member in family)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family)


def weights_in(folder: Path) -> dict[str, bytes]:
    """Files of weights by name."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert len(files) == 5
    return files
