"""What a build costs as it grows: seconds, requests to the store, memory and Prefect's database, each a sample.

    python benchmarks/scale.py [--builds 1000:2:s3 10000:1:disk 10000:2:disk ...] [--kills 10]

``--builds`` says which: samples, workers and store of each.

A synthetic source stands for the real one: it draws its pictures (64 x 64, one person each) when they are asked for, so
that nothing is fetched. Half of the samples are ``real``, half composites, 256 a shard. Each build runs in a process of
its own, with Prefect's server and a Dask cluster of processes, and then once more, when there is nothing to do. The
store is a folder, or moto's S3 server on loopback, which counts what it is asked; the time that S3 takes to answer is
not in it.

``orchestration`` is the share of the workers' time in which no step runs, from the first shard's start to each
worker's last end; ``waiting`` is that from there to the last end of all, when no shard is left for a worker. A
straight line through the sizes, of the builds with most workers, says what a sample costs on each store;
``docs/scale.md`` says what follows from it. With ``--kills``, the smallest size is also built on a cluster of three
workers, of which one at random is killed (SIGKILL) so many times, and compared with what nobody disturbed. Writes
``benchmarks/results/scale.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import logging
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from dataset_tools.record_file import RecordFile
from dataset_tools.records import Curation, ImageRecord, InstanceRecord
from dataset_tools.sources.openimages import OpenImagesSettings, OpenImagesSource
from mild.versions import software_versions

SIDE = 64
SHARD = 256
BACKGROUNDS = 0.1
"""Of the samples of ``real``."""
BUILDS = ["1000:1:disk", "1000:2:disk", "10000:1:disk", "10000:2:disk", "1000:2:s3", "10000:2:s3", "100000:2:disk"]
RESULT = Path(__file__).parent / "results/scale.json"


class SyntheticSettings(OpenImagesSettings):
    """Settings of a source that draws its pictures."""

    root: str = "/synthetic"
    count: int = 0
    """Pictures with a person."""

    def open(self, tables: Any = None) -> SyntheticSource:
        """The source."""
        return SyntheticSource(self, tables)


class SyntheticSource(OpenImagesSource):
    """Draws a picture by its id. Masks are ellipses."""

    settings: SyntheticSettings

    def check(self) -> None:
        """There is nothing that could be missing."""

    def tables(self) -> dict[str, list[str]]:
        """One, that changes with the count."""
        return {"synthetic": [str(self.settings.count)]}

    def curate(self) -> Curation:
        """All of them."""
        person = InstanceRecord("1", "Person", (0.25, 0.05, 0.75, 0.95), "ellipse")
        licence = "https://creativecommons.org/licenses/by/2.0/"
        people = (
            ImageRecord(f"p{k:07}", self.name, "train", "people", "one", f"p{k}", licence=licence, instances=(person,))
            for k in range(self.settings.count)
        )
        backgrounds = (
            ImageRecord(f"b{k:07}", self.name, "train", "background", "", f"b{k}", licence=licence)
            for k in range(max(1, int(BACKGROUNDS * self.settings.count)))
        )
        return Curation(RecordFile(chain(people, backgrounds)))

    def state(self, record: ImageRecord) -> list[str]:
        """It never changes."""
        return []

    def read_image(self, record: ImageRecord) -> bytes:
        """A JPEG of smooth colours."""
        seed = int.from_bytes(hashlib.sha256(record.id.encode()).digest()[:8], "little")
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
        data = io.BytesIO()
        Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(data, "JPEG", quality=85)
        return data.getvalue()

    def read_mask(self, record: ImageRecord, index: int) -> np.ndarray:
        """An ellipse in the middle."""
        rows, columns = np.mgrid[:SIDE, :SIDE] / (SIDE - 1) - 0.5
        return np.asarray((rows / 0.45) ** 2 + (columns / 0.25) ** 2 < 1)


class Timed:
    """A step's function that notes when it ran in which process, and what memory that had needed by then."""

    def __init__(self, function: Callable[[Any], Any], notes: str) -> None:
        functools.update_wrapper(self, function)
        self.function, self.notes = function, notes

    def __call__(self, job: Any) -> Any:
        started = time.time()
        try:
            return self.function(job)
        finally:
            told = {"step": job.step, "of": job.label(), "worker": os.getpid()}
            row = told | {"start": started, "end": time.time(), "mb": peak_mb()}
            with open(self.notes, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def peak_mb() -> float:
    """Most memory that this process has had, in MB; ``getrusage`` would begin with that of whoever started it."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1000


def build_once(count: int, workers: int | str, output: str, notes: str) -> dict[str, Any]:
    """Build, or build again, in this process; what it took.

    Args:
        workers: of a local cluster, or the address of one.
    """
    from prefect import Task

    from flows import build_dataset as module
    from flows.settings import BuildSettings

    settings = BuildSettings.model_validate(
        {
            "name": "scale",
            "source": SyntheticSettings(count=count // 2),
            "composite": {
                "samples": {"train": count // 2},
                "size": [SIDE, SIDE],
                "donors": {"min_height": 16, "max_border_width": 1},
            },
            "samples_per_shard": SHARD,
            "runner": {"kind": "dask", ("address" if isinstance(workers, str) else "workers"): workers},
        }
    )
    stages: dict[str, float] = {}
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(module, "check_build", return_value=settings))
        for step in [step for step in vars(module).values() if isinstance(step, Task)]:
            patches.enter_context(mock.patch.object(step, "fn", Timed(step.fn, notes)))
        for name in ("curate", "curated_shards", "cutouts", "composite_shards", "description", "publish"):
            patches.enter_context(mock.patch.object(module._Build, name, _clocked(name, module._Build, stages)))
        started = time.time()
        summary = module.build_dataset("synthetic", output)
    return {
        "seconds": time.time() - started,
        "stages": stages,
        "shards": summary["shards"],
        "samples": summary["samples"],
        "cached": summary["cached"],
        "flow_mb": peak_mb(),
    }


def _clocked(name: str, owner: Any, stages: dict[str, float]) -> Callable[..., Any]:
    method = getattr(owner, name)

    @functools.wraps(method)
    def call(*args: Any) -> Any:
        started = time.time()
        try:
            return method(*args)
        finally:
            stages[name] = time.time() - started

    return call


class CountingStore:
    """Moto's S3 server on loopback, and how often it was asked."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server
        from werkzeug.test import Client

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.store, self.count = DomainDispatcherApplication(create_backend_app), 0
        self.server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server.server_port}",
            "AWS_ACCESS_KEY_ID": "scale",
            "AWS_SECRET_ACCESS_KEY": "scale",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        Client(self.store).put("/scale", base_url=self.environment["AWS_ENDPOINT_URL"])
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _answer(self, environ: dict[str, Any], start: Any) -> Any:
        self.count += 1
        return self.store(environ, start)


@contextlib.contextmanager
def prefect_server(scratch: Path) -> Iterator[tuple[dict[str, str], Path]]:
    """Environment that names a server of Prefect with a database of its own, and that database."""
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_SERVER_DATABASE_CONNECTION_URL, temporary_settings

    database = scratch / "prefect.db"
    with temporary_settings({PREFECT_SERVER_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{database}"}):
        server = SubprocessASGIServer()
        server.start(timeout=120)
    try:
        yield {"PREFECT_API_URL": server.api_url, "PREFECT_LOGGING_LEVEL": "ERROR"}, database
    finally:
        server.stop()


def database_bytes(database: Path) -> int:
    """Size of a SQLite database with its journal."""
    return sum(path.stat().st_size for path in database.parent.glob(f"{database.name}*"))


def measure(count: int, workers: int, store: CountingStore | None) -> dict[str, Any]:
    """One size: a build, and the same again."""
    with tempfile.TemporaryDirectory() as folder, prefect_server(Path(folder)) as (server, database):
        output = f"s3://scale/{count}-{workers}" if store else f"{folder}/dataset"
        here = {"PYTHONPATH": str(Path(__file__).parents[1])}
        environment = {**os.environ, **here, **server, **(store.environment if store else {})}
        row: dict[str, Any] = {"asked": count, "workers": workers, "store": "s3" if store else "disk"}
        for run in ("build", "again"):
            notes = Path(folder, f"{run}.jsonl")
            notes.touch()
            asked, held = store.count if store else 0, database_bytes(database)
            command = [sys.executable, __file__, "--one", str(count), str(workers), output, str(notes)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            told = json.loads(done.stdout.splitlines()[-1])
            if store:
                told["requests"] = store.count - asked
                told["requests_a_shard"] = told["requests"] / told["shards"]
            told["database_bytes_a_sample"] = (database_bytes(database) - held) / told["samples"]
            told |= of_steps([json.loads(line) for line in notes.read_text().splitlines()], workers)
            row[run] = told
            print(f"{count} samples, {workers} workers, {run}: {told['seconds']:.1f} s", flush=True)
        if store is None:
            shutil.rmtree(output)
    return row


def killed(count: int, kills: int) -> dict[str, Any]:
    """A build whose workers are killed again and again, against one that nobody disturbs."""
    from distributed import LocalCluster

    chance, done = random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder, prefect_server(Path(folder)) as (server, _):
        environment = {**os.environ, **server, "PYTHONPATH": str(Path(__file__).parents[1])}
        notes = Path(folder, "notes.jsonl")
        command = [sys.executable, __file__, "--one", str(count)]
        subprocess.run([*command, "2", f"{folder}/whole", os.devnull], env=environment, check=True, capture_output=True)
        # Workers inherit both.
        sys.path.insert(0, environment["PYTHONPATH"])
        with (
            mock.patch.dict(os.environ, environment),
            LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None) as cluster,
        ):
            words = [*command, cluster.scheduler_address, f"{folder}/killed", str(notes)]
            build = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
            while build.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    build.wait(chance.uniform(1, 3))
                if done < kills and notes.exists():
                    done += kill_worker(cluster, chance)
        digests = [digest_of_folder(Path(folder, name)) for name in ("whole", "killed")]
        rows = [json.loads(line) for line in notes.read_text().splitlines()]
    shards = [row["of"] for row in rows if row["step"].startswith("build-")]
    return {
        "kills": done,
        "ended_well": build.returncode == 0,
        "files_that_differ": sum(digests[0].get(name) != digests[1].get(name) for name in {*digests[0], *digests[1]}),
        "shards": len(set(shards)),
        "shards_done_more_than_once": len(shards) - len(set(shards)),
    }


def kill_worker(cluster: Any, chance: random.Random) -> int:
    """Kill the process of a worker, which its nanny will start anew; gives how many were killed."""
    processes = [nanny.process.pid for nanny in cluster.workers.values() if nanny.process and nanny.process.pid]
    if not processes:
        return 0
    with contextlib.suppress(ProcessLookupError):
        os.kill(chance.choice(processes), signal.SIGKILL)
        return 1
    return 0


def digest_of_folder(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def of_steps(rows: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    """What the notes of the steps say."""
    shards = [row for row in rows if row["step"].startswith("build-")]
    told: dict[str, Any] = {"steps": len(rows), "worker_mb": max((row["mb"] for row in rows), default=None)}
    if shards:
        idle = waiting = wall = 0.0
        # Curated shards, then composites: between them the flow lists cut-outs, which is planning.
        for step in {row["step"] for row in shards}:
            of_step = [row for row in shards if row["step"] == step]
            began, ended = min(row["start"] for row in of_step), max(row["end"] for row in of_step)
            wall += workers * (ended - began)
            for worker in {row["worker"] for row in of_step}:
                own = [row for row in of_step if row["worker"] == worker]
                last = max(row["end"] for row in own)
                idle += last - began - sum(row["end"] - row["start"] for row in own)
                waiting += ended - last
        told |= {"orchestration": idle / wall, "waiting": waiting / wall, "seconds_in_shards": wall / workers}
    return told


def line_through(sizes: list[int], costs: list[float]) -> dict[str, float]:
    """Least squares: cost = fixed + each * samples."""
    each, fixed = np.polyfit(sizes, costs, 1) if len(sizes) > 1 else (costs[0] / sizes[0], 0.0)
    return {"fixed": float(fixed), "each": float(each)}


def fits(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Straight lines over the samples, of the largest number of workers and one store."""
    most = max(row["workers"] for row in rows)
    chosen = [row for row in rows if row["workers"] == most]
    sizes = [row["build"]["samples"] for row in chosen]
    planning = ("curate", "cutouts", "description", "publish")
    costs = {
        "build_seconds": [row["build"]["seconds"] for row in chosen],
        "shards_worker_seconds": [row["build"]["seconds_in_shards"] * most for row in chosen],
        "planning_seconds": [sum(row["build"]["stages"][name] for name in planning) for row in chosen],
        "again_seconds": [row["again"]["seconds"] for row in chosen],
        "flow_mb": [row["build"]["flow_mb"] for row in chosen],
        "worker_mb": [row["build"]["worker_mb"] for row in chosen],
    }
    return {name: line_through(sizes, values) for name, values in costs.items()}


def main() -> None:
    """Measure each size with each number of workers, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builds", nargs="+", default=BUILDS)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        count, workers, output, notes = given.one
        # By its name, so that workers find the same classes.
        own = importlib.import_module("benchmarks.scale")
        print(json.dumps(own.build_once(int(count), int(workers) if workers.isdigit() else workers, output, notes)))
        return
    builds = [(int(count), int(workers), store) for count, workers, store in (b.split(":") for b in given.builds)]
    s3 = CountingStore() if any(store == "s3" for *_, store in builds) else None
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "command": f"python benchmarks/scale.py --builds {' '.join(given.builds)} --kills {given.kills}",
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "software": software_versions(),
        "settings": {"side": SIDE, "samples_per_shard": SHARD, "backgrounds": BACKGROUNDS},
        "killed": killed(min(count for count, *_ in builds), given.kills) if given.kills else None,
        "rows": rows,
    }
    # What takes hours is kept as it comes.
    for count, workers, store in builds:
        rows.append(measure(count, workers, s3 if store == "s3" else None))
        stores = sorted({row["store"] for row in rows})
        result["lines"] = {store: fits([row for row in rows if row["store"] == store]) for store in stores}
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("lines", "killed")}, indent=2))


if __name__ == "__main__":
    main()
