"""One temporary Prefect server for all tests of flows, whichever process runs them."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import shutil
import signal
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from filelock import FileLock
from prefect import Flow
from prefect.context import _temporary_global_settings_context, get_settings_context
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_TLS_INSECURE_SKIP_VERIFY,
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_SERVER_DATABASE_CONNECTION_URL,
    PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED,
    PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED,
    temporary_settings,
)


@pytest.fixture(scope="session")
def prefect_server(shared_folder: Path, prefect_database: Path) -> Iterator[None]:
    """A real server with a database of its own, for flows called in this process.

    Whoever needs it first starts it, and whoever needs it last ends it.
    """
    state, lock = shared_folder / "prefect-server.json", FileLock(shared_folder / "prefect-server.lock")
    with lock:
        known = json.loads(state.read_text()) if state.exists() else _started(shared_folder, prefect_database)
        state.write_text(json.dumps({**known, "users": known["users"] + 1}))
    with (
        temporary_settings(
            {
                PREFECT_API_URL: known["url"],
                # Each flow would wait a second for its heartbeat to end.
                PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
                # Each client would read all certificates of this machine, and this server has none.
                PREFECT_API_TLS_INSECURE_SKIP_VERIFY: True,
            }
        ),
        _temporary_global_settings_context(get_settings_context()),
    ):
        yield
        APILogWorker.instance().drain()
        EventsWorker.drain_all()
    with lock:
        known = json.loads(state.read_text())
        known["users"] -= 1
        if known["users"]:
            state.write_text(json.dumps(known))
        else:
            state.unlink()
            # Not waited for: it ends for good with the process that started it, which may be another.
            psutil.Process(known["process"]).terminate()


def _started(folder: Path, database: Path) -> dict[str, str | int]:
    # Here, as it imports the whole server, which only the process that starts it has to.
    from prefect.server.api.server import SubprocessASGIServer

    copy = shutil.copy(database, folder / "prefect-server.db")
    settings = {
        PREFECT_SERVER_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{copy}",
        # Nobody asks this server for task runs, which it would copy from the events that it keeps anyway, for a third
        # of its time; nor has it automations.
        PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED: False,
        PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED: False,
    }
    with temporary_settings(settings):
        server = SubprocessASGIServer()
        server.start(timeout=120)
    atexit.unregister(server.stop)
    assert server.server_process is not None
    return {"url": server.api_url, "process": server.server_process.pid, "users": 0}


@pytest.fixture
def server_environment(prefect_server: None) -> dict[str, str]:
    """Environment for child processes that should use the same server."""
    return {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value() or "", "PREFECT_LOGGING_LEVEL": "CRITICAL"}


@pytest.fixture(scope="session")
def forks(prefect_server: None) -> ForkServerContext:
    """Starts processes that need not import a flow first, and use the same server."""
    context = multiprocessing.get_context("forkserver")
    late = ["av", "fastapi", "graphviz", "scipy.fftpack"]  # what the first flow of a process and its steps import
    context.set_forkserver_preload(["flows.build_dataset", "flows.commands.build", "prefect_dask", "pandas", *late])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", PREFECT_API_URL.value() or "")
        patch.setenv("PREFECT_LOGGING_LEVEL", "CRITICAL")
        forkserver.ensure_running()
    return context


@pytest.fixture
def run_killed(forks: ForkServerContext) -> Callable[..., None]:
    """Runs a flow in a process that kills itself (SIGKILL) where a function is called for the n-th time.

    Arguments: the function's full name, n, the flow, and its parameters.
    """

    def run(function: str, call: int, flow: Flow[..., Any], *arguments: Any, **named: Any) -> None:
        # By name, as a flow cannot be pickled.
        whole = f"{flow.fn.__module__}:{flow.fn.__qualname__}"
        process = forks.Process(target=_run_until, args=(dict(os.environ), function, call, whole, arguments, named))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"ended before call {call} of {function}"

    return run


def _run_until(
    environment: dict[str, str],
    function: str,
    call: int,
    flow: str,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
) -> None:
    os.environ.update({name: environment[name] for name in environment if name.startswith("AWS_")})
    run = pkgutil.resolve_name(flow)
    owner, _, name = function.rpartition(".")
    place, calls = pkgutil.resolve_name(owner), itertools.count(1)
    whole = getattr(place, name)

    def counted(*given: Any, **options: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*given, **options)

    setattr(place, name, counted)
    run(*arguments, **named)


@pytest.fixture
def forked_workers(forks: ForkServerContext) -> Iterator[None]:
    """Dask's local workers are started so, too."""
    # Here, as it takes a second, and before anything is set, which would else take away its defaults when it ends.
    import dask
    import distributed  # noqa: F401

    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        yield


@pytest.fixture
def no_download_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures over HTTP are fetched without asking for a slot: the server lets each shard wait for seconds."""
    monkeypatch.setattr("flows.dataset_steps.concurrency", lambda name, occupy: contextlib.nullcontext())
