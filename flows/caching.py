"""Cached steps: Prefect remembers results by key, and what it remembers is checked before it is believed.

A key is the digest of what determines a step's output: its name and version, its settings and the digests of
its inputs, and the versions of the packages that decide about its bytes. (Prefect's own TASK_SOURCE policy sees only
the text of the task function, so a change in a module that it calls would go unnoticed; raise ``version`` when the
output of a step changes.) Paths are not part of a key: results lie beside the dataset that they speak of, so that both
can be moved together.

A step must read nothing but what its key covers. Files that one step writes for another are named by their digest
(`write_named`), and the next step's job holds that name: another run cannot put other bytes under it.

Prefect does not look whether the files that a remembered result names are still there. `run_steps` does, and
redoes those whose files are gone or altered, alone. It looks before anything is handed to a task runner: a task run
that finds its result costs a fifth of a second of Prefect's time, and a dataset has thousands of shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial, wraps
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

from prefect import Task, task
from prefect.client.schemas.objects import TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.filesystems import LocalFileSystem, RemoteFileSystem
from prefect.futures import PrefectFuture
from prefect.results import ResultStore
from prefect.states import State
from prefect.task_engine import TaskRunTimeoutError
from prefect.utilities.asyncutils import run_sync_in_worker_thread
from pydantic import BaseModel, ConfigDict

from dataset_tools.errors import Rejected, UserError, one_line, what_to_mend
from dataset_tools.fetch import map_in_order
from dataset_tools.ranges import read_whole
from dataset_tools.settings import digest_of
from dataset_tools.storage import (
    Listings,
    is_unaltered,
    is_url,
    open_root,
    sha256_of_file,
    tag_of,
    write_bytes,
    written_whole,
)
from flows.names import short_name
from flows.progress import Progress, run_logger
from flows.settings import Threads

LENIENCE = 60.0
"""Seconds for waits between tries, and for what takes its time to end."""

LOOKERS = 16
"""Remembered results that are looked at at once."""

SUBMITTED = 128
"""Jobs that a task runner holds at once, and so the most workers that it keeps busy: each takes some 0.2 MB in the
flow's process until it has ended, as Prefect gives it the flow's context."""

SUBMISSIONS = 3
"""Times that a job is handed to a cluster, as often as a step is tried: Dask gives up a job whose worker has died four
times (``distributed.scheduler.allowed-failures``), whatever it died of, Ray one whose worker has died as often
(``max_retries``)."""


class Job(BaseModel):
    """One unit of work of a step: the task's only parameter."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    step: ClassVar[str]
    version: ClassVar[int]
    packages: ClassVar[tuple[str, ...]] = ()
    """Those whose versions decide about the step's bytes."""

    root: str
    """Where the dataset lies."""
    work: str
    """Where intermediate files and results lie."""

    def determines(self) -> Any:
        """What determines the output, JSON-compatible; never a path of ``root`` or ``work``."""
        return self.model_dump(mode="json", exclude={"root", "work"})

    def key(self) -> str:
        """The cache key."""
        software = {package: _version(package) for package in self.packages}
        return f"{self.step}-{digest_of([self.step, self.version, software, self.determines()])[:40]}"

    def decided_by(self) -> str:
        """What decides about the bytes of its files: the key, and what else a remembered result is held against."""
        return self.key()

    def label(self) -> str:
        """What it works on, such as a shard; empty where the step says all."""
        return ""

    def run_name(self) -> str:
        """Name of the task run in Prefect's pages: the output, the step, and what it works on."""
        return " ".join(filter(None, (short_name(self.root), self.step, self.label())))


class File(BaseModel):
    """A file that a step wrote."""

    sha256: str
    tag: str | None
    """`dataset_tools.storage.tag_of` it right after it was written."""


class Files(BaseModel):
    """Result of a step that writes plain files."""

    below: Literal["root", "work"]
    """Which of the job's two places the paths are relative to."""
    files: dict[str, File]
    """By path; one at least."""
    digest: str
    """Digest of the files' names and bytes; enters the keys of the steps that read them."""
    rows: int = 0
    """How many things the files hold, where that matters."""

    @classmethod
    def of(cls, job: Job, below: Literal["root", "work"], paths: Iterable[str], rows: int = 0) -> Files:
        """What was just written; a folder stands for all files in it.

        Raises:
            RuntimeError: there is nothing.
        """
        filesystem, base = open_root(job.root if below == "root" else job.work)
        files = {
            file.removeprefix(base).lstrip("/"): File(
                sha256=sha256_of_file(filesystem, file), tag=tag_of(filesystem, file)
            )
            for path in paths
            for file in sorted(filesystem.find(f"{base}/{path}".rstrip("/")))
        }
        if not files:
            raise RuntimeError(f"{job.step} wrote no file below {base}")
        digest = digest_of({path: file.sha256 for path, file in files.items()})
        return cls(below=below, files=files, digest=digest, rows=rows)

    def is_sound(self, job: Job, listings: Listings) -> bool:
        """Whether all files are as they were written."""
        return bool(self.files) and are_unaltered(job.root if self.below == "root" else job.work, self.files, listings)

    def told(self) -> str:
        """How many there are."""
        return f"files: {len(self.files)}" + (f", of {self.rows}" if self.rows else "")


def are_unaltered(place: str, files: Mapping[str, File], listings: Listings) -> bool:
    """Whether files, by their paths below ``place``, are as they were written."""
    filesystem, base = open_root(place)
    return all(
        is_unaltered(filesystem, f"{base}/{path}", file.sha256, file.tag, listings) for path, file in files.items()
    )


def write_named(job: Job, name: str, data: bytes) -> str:
    """Write ``data`` below ``work`` under a name that holds its digest; gives that name, such as ``a-0123abcd.json``.

    Args:
        name: without the digest, such as ``a.json``.
    """
    named = _named(name, hashlib.sha256(data).hexdigest())
    filesystem, base = open_root(job.work)
    write_bytes(filesystem, f"{base}/{named}", data)
    return named


def keep_named(job: Job, file: Path) -> str:
    """Move a local file below ``work``, as `write_named` would write its bytes."""
    named = _named(file.name, sha256_of_file(*open_root(file)))
    filesystem, base = open_root(job.work)
    with written_whole(filesystem, f"{base}/{named}") as partial:
        shutil.move(file, partial)
    return named


def _named(name: str, sha256: str) -> str:
    stem, dot, suffix = name.partition(".")
    return f"{stem}-{sha256[:16]}{dot}{suffix}"


class Result(Protocol):
    """What a step returns: a small manifest of the files it wrote."""

    def is_sound(self, job: Any, listings: Listings, /) -> bool:
        """Whether its files are as they were written, and nothing in it is worth another try.

        ``listings``: what is known of files, of all results that are looked at together.
        """
        ...

    def told(self) -> str:
        """What it came to, for one line of the run's log."""
        ...


JobT = TypeVar("JobT", bound=Job)
ResultT = TypeVar("ResultT", bound=Result)


@dataclass(frozen=True)
class Outcome(Generic[ResultT]):
    """Result of one job, and whether it was remembered."""

    result: ResultT
    cached: bool


def cached_step(function: Callable[[JobT], ResultT]) -> Task[[JobT], ResultT]:
    """Make a function of one `Job` a Prefect task: cached by the job's key, retried on errors of the machine.

    What it came to, and how long that took, is a line of the run's log.
    """

    @wraps(function)
    def logged(job: JobT) -> ResultT:
        began = time.monotonic()
        result = function(job)
        run_logger().info("%s; %.1f s", result.told(), time.monotonic() - began)
        return result

    decorate = task(
        cache_key_fn=_key_of_job,
        persist_result=True,
        result_serializer="json",
        task_run_name=_name_of_run,
        retries=2,
        retry_delay_seconds=[1, 10],
        retry_condition_fn=_is_worth_retrying,
    )
    return decorate(logged)


def run_steps(
    step: Task[[JobT], ResultT],
    jobs: Sequence[JobT],
    storage: Path | RemoteFileSystem,
    progress: Progress | None = None,
    *,
    in_this_thread: bool = False,
    time_limit: float | None = None,
    begin: Callable[[Sequence[JobT]], None] = lambda jobs: None,
) -> list[Outcome[ResultT]]:
    """Run jobs through Prefect's task runner; results in the order of the jobs.

    ``in_this_thread``: one after another without a task runner, for steps that must hear of signals: only a
    process's main thread does.

    ``time_limit``: seconds for each try of a job, which is then ended and tried again like one that met a fault of the
    machine. In the threads of task runners that ends what runs in Python, waits of fsspec's file systems among it, but
    no call in C that does not come back: where no job has ended for so long that one must hang in such a call, the flow
    is ended and the job left to itself.

    ``begin`` is called with the jobs that are about to be done, before the first is.

    Jobs whose results are remembered make no task run. Remembered results whose files are gone or altered, or which
    tell of passing faults (time-outs), are redone. ``progress`` counts jobs; None where the step shows its own. Must be
    called from a flow: results of tasks called inside a task are kept only when that ends.

    Raises:
        UserError: a job was ended as often as it was tried, or cannot be ended.
    """
    block = LocalFileSystem(basepath=str(storage)) if isinstance(storage, Path) else storage
    store, listings = ResultStore(result_storage=block, cache_result_in_memory=False), Listings()
    unsound = []

    def look(asked: tuple[str, JobT]) -> ResultT | None:
        key, job = asked
        result: ResultT | None = _remembered(store, key)
        if result is None or result.is_sound(job, listings):
            return result
        forget([job])
        unsound.append(job)
        return None

    # What is asked for twice is done once: two at the same files would spoil them.
    keys, different = [job.key() for job in jobs], dict[str, JobT]()
    for key, job in zip(keys, jobs, strict=True):
        different.setdefault(key, job)
    jobs = list(different.values())
    if progress is not None:
        progress.expect(len(jobs))
    found: list[ResultT | None] = []
    for result in map_in_order(look, different.items(), LOOKERS, 4 * LOOKERS):
        assert not isinstance(result, Rejected)
        found.append(result)
        if progress is not None and result is not None:
            progress.advance()
    missing = [job for job, result in zip(jobs, found, strict=True) if result is None]
    begin(missing)
    stored = step.with_options(result_storage=storage, timeout_seconds=time_limit)
    done = iter(_run_here(stored, missing) if in_this_thread else _run(stored, missing, progress))
    altered = f", {len(unsound)} of them as what was remembered is not sound" if unsound else ""
    for name in {job.step for job in jobs}:
        run_logger().info("%s: %d done%s, %d remembered", name, len(missing), altered, len(jobs) - len(missing))
    outcomes = [Outcome(next(done), False) if result is None else Outcome(result, True) for result in found]
    of_key = dict(zip(different, outcomes, strict=True))
    return [of_key[key] for key in keys]


def _remembered(store: ResultStore, key: str) -> Any:
    """What Prefect's engine would find for a job's key; None where that is nothing, or was cut short by a kill.

    Raises:
        UserError, OSError: as the store does that cannot be asked.
    """
    try:
        return store.read(key).result
    except UserError:
        raise
    except (FileNotFoundError, ValueError):
        return None


class ResultFolder(RemoteFileSystem):
    """Prefect's results in a store, each written and read with one request: Prefect's own block takes up to four."""

    _block_type_name = "MILD results"

    def read_path(self, path: str, _sync: bool | None = None) -> bytes:  # type: ignore[override]
        """A result. Raises `FileNotFoundError`."""
        filesystem, place = open_root(self._resolve_path(path))
        return read_whole(filesystem, place)

    async def aread_path(self, path: str) -> bytes:
        """`read_path`, for Prefect's asynchronous code."""
        return await run_sync_in_worker_thread(self.read_path, path)

    def write_path(self, path: str, content: bytes, _sync: bool | None = None) -> str:  # type: ignore[override]
        """Write a result; stores show it when it is complete."""
        filesystem, place = open_root(self._resolve_path(path))
        filesystem.pipe_file(place, content)
        return path

    async def awrite_path(self, path: str, content: bytes) -> str:
        """`write_path`, for Prefect's asynchronous code."""
        return await run_sync_in_worker_thread(self.write_path, path, content)


def result_storage(work: str) -> Path | RemoteFileSystem:
    """Where Prefect keeps results: below ``work``, on the same filesystem.

    Locally Prefect writes results in place; one cut short by a kill does not parse, and counts as absent.
    """
    if not is_url(work):
        return Path(work, "results")
    block = ResultFolder(basepath=f"{work}/results")
    block.save(f"mild-results-{hashlib.sha256(work.encode()).hexdigest()[:12]}", overwrite=True)
    return block


def forget(jobs: Iterable[Job]) -> None:
    """Delete what Prefect remembers of jobs, so that they are done anew."""
    for job in jobs:
        filesystem, base = open_root(f"{job.work}/results")
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm_file(f"{base}/{job.key()}")


def _run(step: Task[[JobT], ResultT], jobs: Sequence[JobT], progress: Progress | None) -> list[ResultT]:
    waiting = deque((number, 1) for number in range(len(jobs)))
    held: dict[int, tuple[PrefectFuture[ResultT], int]] = {}
    ended = queue.SimpleQueue[int]()
    states: dict[int, State[ResultT]] = {}
    limit = step.timeout_seconds
    longest = None if limit is None else (1 + step.retries) * limit + LENIENCE

    def tell(number: int, _: PrefectFuture[ResultT]) -> None:
        ended.put(number)

    while len(states) < len(jobs):
        while waiting and len(held) < SUBMITTED:
            number, submission = waiting.popleft()
            held[number] = step.submit(jobs[number]), submission
            held[number][0].add_done_callback(partial(tell, number))
        try:
            number = ended.get(timeout=longest)
        except queue.Empty:
            left = [jobs[number].run_name() for number, (future, _) in held.items() if not future.state.is_final()]
            context = FlowRunContext.get()
            if context is not None and isinstance(context.task_runner, Threads):
                context.task_runner.cancel_all()
            raise UserError(
                f"none of {len(jobs) - len(states)} jobs has ended for {longest:g} s at a time limit of {limit:g} s, "
                f"such as {' or '.join(left[:2])}; what is finished is kept"
            ) from None
        # Forgotten as it ends: as long as anybody holds a future, a cluster keeps its job.
        future, submission = held.pop(number)
        try:
            future.result(raise_on_failure=False)
        except Exception as error:  # what a step raises is a result: workers died, and each kind of cluster has its own
            name = jobs[number].run_name()
            if submission == SUBMISSIONS:
                raise UserError(
                    f"{name} was handed to the cluster {submission} times, and each time its workers died, most often "
                    f"for want of memory: see their logs; what is finished is kept ({one_line(error)})"
                ) from None
            run_logger().warning("%s lost its workers and is handed out again: %s", name, one_line(error))
            waiting.appendleft((number, submission + 1))
            continue
        states[number] = future.state
        if progress is not None:
            progress.advance()
    return _results(step, jobs, [states[number] for number in range(len(jobs))])


def _run_here(step: Task[[JobT], ResultT], jobs: Sequence[JobT]) -> list[ResultT]:
    states = [step(job, return_state=True) for job in jobs]
    return _results(step, jobs, states)


def _results(step: Task[[JobT], ResultT], jobs: Sequence[JobT], ended: Sequence[State[ResultT]]) -> list[ResultT]:
    results = []
    for job, state in zip(jobs, ended, strict=True):
        try:
            results.append(state.result())
        except TaskRunTimeoutError:
            raise UserError(
                f"{job.run_name()} took longer than the time limit of {step.timeout_seconds:g} s, as often as it was "
                "tried; what is finished is kept"
            ) from None
    return results


@cache
def _version(package: str) -> str:
    return metadata.version(package)


def _key_of_job(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    job: Job = parameters["job"]
    return job.key()


def _name_of_run() -> str:
    from prefect.runtime import task_run

    job: Job = task_run.parameters["job"]
    return job.run_name()


def _is_worth_retrying(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    error = state.result(raise_on_failure=False)
    ours = isinstance(error, ValueError | TypeError | LookupError | AssertionError)
    return not ours and not (isinstance(error, BaseException) and what_to_mend(error))
