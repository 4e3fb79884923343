"""Before the first picture: does every worker of a cluster have what the tasks of a build need?

Else a worker that lacks a package, another version of this one, or a disk of its own where all should share one, would
be met in the middle of a build, or never: as shards that only it can see.
"""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prefect.task_runners import TaskRunner
from pydantic import BaseModel

from dataset_tools.errors import UserError, one_line, what_to_mend
from dataset_tools.sources.sample import SampleSettings
from dataset_tools.sources.video import VideoSettings
from dataset_tools.sources.weblist import WeblistSettings
from dataset_tools.storage import check_writable, is_url, open_root, write_bytes
from flows.dataset_steps import PICTURES
from flows.settings import BuildSettings

PATIENCE = 60
"""Seconds in which the first worker of a cluster has to come."""
DEATHS = 5
"""Times that workers may die, each on average, while they are looked at."""


class Needs(BaseModel):
    """What a worker is asked for."""

    settings: BuildSettings
    root: str
    """Where the dataset will lie."""
    token: str
    """Path of a file in the work folder, whose content is its own name."""
    software: dict[str, str]
    """Packages and their versions, where the flow runs."""
    fingerprints: dict[str, str]
    """Of the networks, by what they are for."""


def check_workers(runner: TaskRunner[Any], settings: BuildSettings, root: str, fingerprints: dict[str, str]) -> int:
    """See that each worker of a cluster can do its part; gives how many there are.

    A file is written into the work folder and removed again; workers write others beside it, and remove them. Workers
    that join later are not looked at.

    Args:
        runner: that of the running flow.
        fingerprints: of the networks, by what they are for.

    Raises:
        UserError: one cannot, or there is none; all that is wrong is told at once.
    """
    filesystem, work = open_root(f"{root}.work")
    token = f"preflight-{uuid.uuid4().hex}"
    write_bytes(filesystem, f"{work}/{token}", token.encode())
    needs = Needs(settings=settings, root=root, token=token, software=_software(), fingerprints=fingerprints)
    try:
        ask = _ask_dask if settings.runner.kind == "dask" else _ask_ray
        answers = ask(runner, settings, needs)
    finally:
        filesystem.rm_file(f"{work}/{token}")
    if not answers:
        raise UserError(f"runner: the cluster at {settings.runner.address} has no worker: start some")
    if complaint := _complaint(answers):
        raise UserError(complaint)
    return len(answers)


def lacks_of(needs: Needs) -> list[str]:
    """What is wrong with the worker on which this runs, a line each; empty where it can do its part."""
    lacks = [
        f"{name} is {own}, not {needs.software[name]} as where the flow runs"
        for name, own in _software().items()
        if own != needs.software[name]
    ]
    lacks += _tried(_share_disk, needs)
    lacks += _tried(_read_source, needs)
    for name, network in needs.settings.networks().items():
        lacks += _tried(_find_weights, name, network, needs.fingerprints[name])
    return lacks


def _tried(check: Callable[..., None], *arguments: Any) -> list[str]:
    try:
        check(*arguments)
    except PackageNotFoundError as error:
        return [f"the package {error.name} is missing"]
    except Exception as error:  # whatever a store or library says
        return [what_to_mend(error) or one_line(error)]
    return []


def _share_disk(needs: Needs) -> None:
    filesystem, work = open_root(f"{needs.root}.work")
    try:
        shared = filesystem.cat_file(f"{work}/{needs.token}") == needs.token.encode()
    except FileNotFoundError:
        shared = False
    if not shared:
        cure = "" if is_url(needs.root) else "; name an output that all machines reach, such as an s3:// URL"
        raise UserError(f"it does not see what the flow wrote into {needs.root}.work{cure}")
    own = f"{work}/{needs.token}-{uuid.uuid4().hex}"
    filesystem.pipe_file(own, b"own")
    if filesystem.cat_file(own) != b"own":
        raise UserError(f"it reads from {needs.root}.work something else than it wrote there")
    filesystem.rm_file(own)
    check_writable(needs.root)


def _read_source(needs: Needs) -> None:
    source = needs.settings.source
    # What is made first lies in the work folder then; clips are listed by whoever looks at the settings.
    if not isinstance(source, SampleSettings | VideoSettings | WeblistSettings):
        source.open().check()


def _find_weights(name: str, network: Any, fingerprint: str) -> None:
    if network.open().fingerprint() != fingerprint:
        raise UserError(f"{name}: its weights, or the packages that run them, are others than where the flow runs")


@cache
def _software() -> dict[str, str]:
    """Versions of the packages that decide about bytes, and the digest of this one's code, which changes without."""
    code = hashlib.sha256()
    for package in ("dataset_tools", "mild", "flows"):
        folder = Path(__file__).parents[1] / package
        for path in sorted(folder.rglob("*.py")):
            code.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    versions = {}
    for name in PICTURES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return {"mild": f"{version('mild')} (code {code.hexdigest()[:12]})", **versions}


def _ask_dask(runner: Any, settings: BuildSettings, needs: Needs) -> dict[str, Any]:
    from distributed import wait

    client, least = runner.client, settings.runner.workers if settings.runner.address is None else 1
    asked: dict[str, Any] = {}
    while True:
        try:
            client.wait_for_workers(least, timeout=PATIENCE)
        except TimeoutError:
            return {}
        # A task for a worker that has died waits for it without end; the one in its place has another address.
        present = set(client.scheduler_info(n_workers=-1)["workers"])
        if not present:
            continue
        if len(asked.keys() - present) > DEATHS * len(present):
            raise UserError(
                f"runner: the workers at {client.scheduler.address} die as they are looked at: see their logs"
            )
        for address in present - asked.keys():
            # What `Client.run` calls is in the worker's event loop, where Prefect's blocks cannot be read.
            asked[address] = client.submit(lacks_of, needs, workers=[address], pure=False)
        unanswered = [asked[address] for address in present if not asked[address].done()]
        if not unanswered:
            return {address: _answer(asked[address].result) for address in present}
        with client.as_current(), contextlib.suppress(TimeoutError):
            wait(unanswered, timeout=1, return_when="FIRST_COMPLETED")


def _ask_ray(runner: Any, settings: BuildSettings, needs: Needs) -> dict[str, Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # One a machine: its processes are alike.
    machines = {
        node["NodeManagerAddress"]: NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU")
    }
    asked = {
        address: ray.remote(lacks_of).options(num_cpus=0, scheduling_strategy=there).remote(needs)
        for address, there in machines.items()
    }
    return {address: _answer(partial(ray.get, answer)) for address, answer in asked.items()}


def _answer(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except Exception as error:  # also of a worker that cannot even unpack the question
        return error


def _complaint(answers: dict[str, Any]) -> str:
    """One message about all workers; empty where nothing is wrong."""
    lines = {
        worker: [one_line(answer)] if isinstance(answer, Exception) else answer for worker, answer in answers.items()
    }
    told = Counter(lack for lacks in lines.values() for lack in lacks)
    if not told:
        return ""
    parts = [f"{lack} ({_who(worker for worker, lacks in lines.items() if lack in lacks)})" for lack in told]
    count = sum(1 for lacks in lines.values() if lacks)
    return f"runner: {count} of {len(lines)} workers cannot be used: {'; '.join(parts)}"


def _who(workers: Iterable[str]) -> str:
    named = sorted(workers)
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
