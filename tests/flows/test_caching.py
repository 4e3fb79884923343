"""Prefect's caching, and what is added so that a remembered result is never believed blindly."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar, Literal

import fsspec
import pytest
from prefect import flow

from dataset_tools.errors import UserError
from dataset_tools.storage import open_root, write_bytes
from flows.caching import Files, Job, Outcome, cached_step, result_storage, run_steps
from flows.settings import RunnerSettings, Threads

pytestmark = pytest.mark.usefixtures("prefect_server")


class WriteJob(Job):
    """Write one file."""

    step: ClassVar[str] = "write"
    version: ClassVar[int] = 1
    name: str
    content: str


@cached_step
def write(job: WriteJob) -> Files:
    """Append to a log of calls, and write the file."""
    with Path(job.work, "calls").open("a") as calls:
        calls.write(f"{job.name}\n")
    filesystem, base = open_root(job.root)
    write_bytes(filesystem, f"{base}/{job.name}", job.content.encode())
    return Files.of(job, "root", [job.name])


@cached_step
def complain(job: WriteJob) -> Files:
    """Always find fault with what the user gave."""
    with Path(job.work, "calls").open("a") as calls:
        calls.write("complain\n")
    raise UserError("boxes.csv has no column XMin")


@cached_step
def stumble(job: WriteJob) -> Files:
    """Fail the first time, as a machine does."""
    with Path(job.work, "calls").open("a") as calls:
        calls.write("stumble\n")
    if len(calls_of(job.work)) == 1:
        raise OSError("connection reset")
    return write.fn(job)


@cached_step
def dawdle(job: WriteJob) -> Files:
    """Wait without end, in Python, the first time."""
    with Path(job.work, "calls").open("a") as calls:
        calls.write("dawdle\n")
    while len(calls_of(job.work)) == 1:
        threading.Event().wait(0.01)
    return write.fn(job)


@cached_step
def die(job: WriteJob) -> Files:
    """Take the worker along as often as the name says."""
    with Path(job.work, "calls").open("a") as calls:
        calls.write(f"{job.name}\n")
    if calls_of(job.work).count(job.name) <= int(job.name):
        os.kill(os.getpid(), signal.SIGKILL)
    return write.fn(job)


AWAITED = threading.Event()


@cached_step
def hang(job: WriteJob) -> Files:
    """Wait in C."""
    AWAITED.wait()
    return write.fn(job)


def calls_of(work: str) -> list[str]:
    path = Path(work, "calls")
    return path.read_text().split() if path.exists() else []


@pytest.fixture
def place(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "work").mkdir()
    return {"root": str(tmp_path / "root"), "work": str(tmp_path / "work")}


def run(
    place: dict[str, str],
    contents: dict[str, str],
    step: Any = write,
    time_limit: float | None = None,
    kind: Literal["threads", "dask"] = "threads",
    in_this_thread: bool = False,
) -> dict[str, Outcome[Files]]:
    """Run one job a name in a flow of its own, as a process that was started again would."""
    jobs = [WriteJob(**place, name=name, content=content) for name, content in contents.items()]

    @flow(name="test-caching", task_runner=RunnerSettings(kind=kind).open())
    def steps() -> list[Outcome[Files]]:
        storage = result_storage(place["work"])
        return run_steps(step, jobs, storage, in_this_thread=in_this_thread, time_limit=time_limit)

    return dict(zip(contents, steps(), strict=True))


def test_a_second_run_calls_nothing(place: dict[str, str]) -> None:
    """Prefect finds the results of the first run by key, although they belong to another flow run."""
    first = run(place, {"a": "1", "b": "2"})
    second = run(place, {"a": "1", "b": "2"})
    assert [outcome.cached for outcome in (*first.values(), *second.values())] == [False, False, True, True]
    assert sorted(calls_of(place["work"])) == ["a", "b"]
    assert first["a"].result == second["a"].result


def test_no_more_jobs_are_handed_out_at_once_than_the_limit_says(
    place: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one they end in their order, though there are two threads."""
    monkeypatch.setattr("flows.caching.SUBMITTED", 1)
    assert list(run(place, dict.fromkeys("edcba", "1"))) == [*"edcba"]
    assert calls_of(place["work"]) == [*"edcba"]


def test_results_come_back_as_models(place: dict[str, str]) -> None:
    """A result read from storage has its type, not a dictionary's."""
    run(place, {"a": "1"})
    assert isinstance(run(place, {"a": "1"})["a"].result, Files)


def test_a_deleted_and_an_altered_file_are_redone_alone(place: dict[str, str]) -> None:
    """Prefect itself would return the remembered result without looking at the files."""
    contents = {"a": "1", "b": "2", "c": "3", "d": "4"}
    run(place, contents)
    Path(place["root"], "b").unlink()
    Path(place["root"], "d").write_text("5")
    again = run(place, contents)
    assert {name: outcome.cached for name, outcome in again.items()} == {"a": True, "b": False, "c": True, "d": False}
    assert sorted(calls_of(place["work"])[4:]) == ["b", "d"]
    assert {name: Path(place["root"], name).read_text() for name in contents} == contents
    assert all(outcome.cached for outcome in run(place, contents).values())


def test_a_changed_input_runs_again_and_the_others_do_not(place: dict[str, str]) -> None:
    """The key is the digest of what determines the output."""
    run(place, {"a": "1", "b": "2"})
    again = run(place, {"a": "1", "b": "other"})
    assert [outcome.cached for outcome in again.values()] == [True, False]


def test_a_new_version_of_the_step_runs_again(place: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raising the version is how a changed implementation is told."""
    run(place, {"a": "1"})
    monkeypatch.setattr(WriteJob, "version", 2)
    assert not run(place, {"a": "1"})["a"].cached


def test_a_result_cut_short_counts_as_absent(place: dict[str, str]) -> None:
    """A kill while Prefect writes a result leaves half a file; the step runs again and mends it."""
    run(place, {"a": "1"})
    (stored,) = Path(place["work"], "results").iterdir()
    stored.write_bytes(stored.read_bytes()[:20])
    assert not run(place, {"a": "1"})["a"].cached
    assert run(place, {"a": "1"})["a"].cached


def test_keys_do_not_know_where_things_lie(place: dict[str, str], tmp_path: Path) -> None:
    """Dataset and results can be moved together and stay cached."""
    run(place, {"a": "1"})
    (tmp_path / "moved").mkdir()
    moved = {"root": str(tmp_path / "moved/root"), "work": str(tmp_path / "moved/work")}
    Path(place["root"]).rename(moved["root"])
    Path(place["work"]).rename(moved["work"])
    assert run(moved, {"a": "1"})["a"].cached


def test_what_is_asked_for_twice_is_done_once(place: dict[str, str]) -> None:
    jobs = [WriteJob(**place, name=name, content="1") for name in "aba"]

    @flow(name="test-caching", task_runner=RunnerSettings().open())
    def steps() -> list[Outcome[Files]]:
        return run_steps(write, jobs, result_storage(place["work"]))

    first, other, again = steps()
    assert sorted(calls_of(place["work"])) == ["a", "b"] and first == again != other


def test_what_the_user_must_mend_is_not_retried(place: dict[str, str]) -> None:
    """Trying again does not add a missing column."""
    with pytest.raises(UserError, match="no column XMin"):
        run(place, {"a": "1"}, complain)
    assert calls_of(place["work"]) == ["complain"]


def test_a_fault_of_the_machine_is_retried(place: dict[str, str]) -> None:
    """Prefect tries the task again, and its result counts."""
    run(place, {"a": "1"}, stumble)
    assert calls_of(place["work"]) == ["stumble", "stumble", "a"]


@pytest.mark.parametrize("in_this_thread", [False, True])
def test_what_takes_too_long_is_ended_and_tried_again(place: dict[str, str], in_this_thread: bool) -> None:
    run(place, {"a": "1"}, dawdle, time_limit=0.5, in_this_thread=in_this_thread)
    assert calls_of(place["work"]) == ["dawdle", "dawdle", "a"]


def test_what_always_takes_too_long_ends_the_run_with_its_name(place: dict[str, str]) -> None:
    for_ever = dawdle.with_options(retries=0)
    with pytest.raises(UserError, match=r"root write took longer than the time limit of 0\.1 s"):
        run(place, {"a": "1"}, for_ever, time_limit=0.1)


def test_what_cannot_be_ended_is_left_to_itself_and_the_run_says_so(
    place: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread ends with the process; here it is let go."""
    monkeypatch.setattr(Threads, "_abandoned", [])
    monkeypatch.setattr("flows.caching.LENIENCE", 0.2)
    with pytest.raises(UserError, match=r"none of 1 jobs has ended for .* such as .*root write; what"):
        run(place, {"a": "1"}, hang.with_options(retries=0), time_limit=0.1)
    assert Threads.are_left_working()
    AWAITED.set()
    for thread in Threads._abandoned:
        thread.join()


@pytest.mark.process
def test_a_job_whose_workers_die_is_handed_out_again_and_one_whose_workers_always_do_ends_the_run(
    place: dict[str, str], forked_workers: None
) -> None:
    """Dask gives it up: here at once, else when four of its workers have died, of whatever."""
    import dask

    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        outcomes = run(place, {"0": "a", "2": "b"}, die, kind="dask")
        assert [outcome.result.told() for outcome in outcomes.values()] == ["files: 1", "files: 1"]
        assert Counter(calls_of(place["work"]))["2"] == 4
        with pytest.raises(UserError, match=r"root write was handed to the cluster 3 times, .* died") as told:
            run(place, {"9": "c"}, die, kind="dask")
    assert "KilledWorker" in str(told.value)
    assert Counter(calls_of(place["work"]))["9"] == 3


@pytest.mark.process
def test_of_jobs_that_have_ended_a_cluster_keeps_few(place: dict[str, str], forked_workers: None) -> None:
    """By itself Dask would keep the last thousand of each connection, and the flow grow with the dataset."""

    def held() -> int:
        gc.collect()
        return sum(type(each) is WriteJob for each in gc.get_objects())

    @flow(name="test-memory", task_runner=RunnerSettings(kind="dask").open())
    def copies() -> int:
        before = held()  # of other tests
        jobs = [WriteJob(**place, name=f"{number}", content="") for number in range(30)]
        run_steps(write, jobs, result_storage(place["work"]))
        return held() - before - len(jobs)

    assert copies() < 15


def test_a_step_says_what_it_came_to_in_the_log_of_its_run(
    place: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        run(place, {"a": "1", "b": "2"})
    told = [record.getMessage() for record in caplog.records if record.name.startswith("prefect.")]
    assert sum(line.startswith("files: 1; ") for line in told) == 2
    assert [line for line in told if "remembered" in line] == [
        "write: 2 done, 0 remembered",
        "write: 0 done, 2 remembered",
    ]


def test_results_on_another_filesystem(place: dict[str, str]) -> None:
    """With an fsspec URL as work folder, Prefect's results lie there too."""
    jobs = [WriteJob(**place, name="a", content="1")]

    @flow(name="test-remote-results")
    def steps() -> list[Outcome[Files]]:
        return run_steps(write, jobs, result_storage("memory://mild-results/steps"))

    assert [steps()[0].cached, steps()[0].cached] == [False, True]
    assert fsspec.filesystem("memory").exists(f"/mild-results/steps/results/{jobs[0].key()}")


def test_on_a_store_a_remembered_result_costs_a_request_and_its_files_a_listing_together(
    place: dict[str, str], bucket: str, object_store: Any
) -> None:
    """Also where listings lag: then each file is asked for by itself, and nothing is redone."""
    jobs = [WriteJob(root=f"{bucket}/root", work=place["work"], name=name, content=name) for name in "abcdef"]

    @flow(name="test-store", task_runner=Threads(max_workers=2))
    def steps() -> list[Outcome[Files]]:
        storage = result_storage(f"{bucket}/root.work")
        object_store.asked.clear()
        return run_steps(write, jobs, storage)

    steps()
    assert all(outcome.cached for outcome in steps())
    asked = Counter("results" if "/results/" in each else each.split()[0] for each in object_store.asked)
    assert asked == {"results": len(jobs), "GET": 1}
    object_store.lists_nothing = True
    assert all(outcome.cached for outcome in steps())
    assert Counter(each.split()[0] for each in object_store.asked)["HEAD"] == len(jobs)
    filesystem, root = open_root(jobs[0].root)
    filesystem.pipe_file(f"{root}/a", b"x")
    assert [outcome.cached for outcome in steps()] == [False, True, True, True, True, True]
