"""A real Prefect server and a real process worker on loopback run the deployments of prefect.yaml."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
PREFECT = str(Path(sys.executable).with_name("prefect"))


@dataclass
class Server:
    """A running server, and a folder from which its deployments are made."""

    api: str
    project: Path
    environment: dict[str, str]

    def prefect(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the ``prefect`` command line against this server."""
        return subprocess.run(
            [PREFECT, "--no-prompt", *arguments],
            cwd=self.project,
            env=self.environment,
            check=check,
            capture_output=True,
            text=True,
        )

    def ask(self, path: str, **question: Any) -> Any:
        """POST to the REST API."""
        answer = httpx.post(f"{self.api}{path}", json=question, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def runs_of(self, flow: str) -> list[dict[str, Any]]:
        """Flow runs of one flow, oldest first."""
        runs: list[dict[str, Any]] = self.ask(
            "/flow_runs/filter", flows={"name": {"any_": [flow]}}, sort="START_TIME_ASC"
        )
        return runs


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Server, work pool, worker; the project's files are linked into a folder of their own."""
    project = tmp_path_factory.mktemp("project")
    for name in ("flows", "prefect.yaml"):
        (project / name).symlink_to(ROOT / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT")},
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect-home")),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    running = []
    try:
        with (project / "server.log").open("w") as log:
            command = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        # httpx tries again with growing pauses while nobody listens yet.
        with httpx.Client(transport=httpx.HTTPTransport(retries=9)) as client:
            client.get(f"{environment['PREFECT_API_URL']}/health", timeout=60).raise_for_status()
        server = Server(environment["PREFECT_API_URL"], project, environment)
        server.prefect("work-pool", "create", "mild", "--type", "process")
        server.prefect("global-concurrency-limit", "create", "mild-downloads", "--limit", "2")
        server.prefect("deploy", "--all")
        with (project / "worker.log").open("w") as log:
            command = [PREFECT, "worker", "start", "--pool", "mild", "--name", "test"]
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        yield server
    finally:
        for process in reversed(running):
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_every_deployment_is_there_and_training_is_scheduled_but_paused(server: Server) -> None:
    """``prefect deploy --all`` makes the six, with schedule and automation."""
    deployments = server.ask("/deployments/filter")
    flows = {flow["id"]: flow["name"] for flow in server.ask("/flows/filter")}
    names = {f"{flows[deployment['flow_id']]}/{deployment['name']}": deployment for deployment in deployments}
    assert set(names) == {
        "build-dataset/sample",
        "build-dataset/openimages",
        "train/sample",
        "train/sdxl",
        "evaluate/sample",
        "pipeline/sample",
    }
    for name in ("train/sample", "train/sdxl"):
        (schedule,) = names[name]["schedules"]
        assert not schedule["active"]
    automations = server.ask("/automations/filter")
    assert [automation["trigger"]["expect"] for automation in automations] == [["mild.dataset.ready"]]


def test_the_deployment_builds_then_is_cached_and_starts_training(server: Server) -> None:
    """Run twice to completion by the worker; the second time every shard is cached. Each event starts training."""
    changes = {"source.train": 24, "composite.samples": {"train": 4, "validation": 0, "test": 0}}
    output = server.project / "dataset"
    for _ in range(2):
        done = server.prefect(
            "deployment", "run", "build-dataset/sample", "--watch",
            "--param", f"output={json.dumps(str(output))}", "--param", f"changes={json.dumps(changes)}",
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr + (server.project / "worker.log").read_text()[-5000:]
    artifacts = server.ask("/artifacts/filter", artifacts={"key": {"any_": ["dataset-shards"]}}, sort="ID_DESC")
    told = sorted(artifact["description"].split(": ")[1] for artifact in artifacts)
    shards = len(list(output.glob("*/*.index.json")))
    assert told == [f"0 of {shards} shards were cached", f"{shards} of {shards} shards were cached"]
    keys = {artifact["key"] for artifact in server.ask("/artifacts/filter")}
    assert keys >= {"build-progress", "dataset-shards", "dataset-rejected", "dataset-contact-sheet"}

    for run in wait_for(server, "train", count=2):
        assert run["state"]["type"] == "COMPLETED", (server.project / "worker.log").read_text()[-5000:]
        assert run["parameters"]["dataset"] == str(output)
    adapters = server.project / "build/sample-adapters"
    assert (adapters / "pytorch_lora_weights.safetensors").stat().st_size > 0


def wait_for(server: Server, flow: str, count: int) -> list[dict[str, Any]]:
    """That many runs of a flow, ended; `prefect flow-run watch` does the waiting once the server has made them."""
    deadline = time.monotonic() + 120
    while len(runs := server.runs_of(flow)) < count:
        assert time.monotonic() < deadline, f"{len(runs)} of {count} runs of {flow} were made"
    for run in runs:
        server.prefect("flow-run", "watch", run["id"], check=False)
    return server.runs_of(flow)
