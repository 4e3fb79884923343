"""Training's processes and who starts them, with a small stand-in for training that behaves as badly as it can."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

import mild.training.launch
from dataset_tools.errors import UserError
from mild.settings import TrainSettings
from mild.training.launch import Interrupted, TrainRequest, launch

STAND_IN = """
import json, os, signal, subprocess, sys

def tell(**news):
    print(json.dumps(news), flush=True)

def much():
    for step in range(2, 2002):  # far more than a pipe holds
        tell(step=step, values={"text": 500 * "x"})

def until_asked():
    while os.read(0, 4096):
        pass

what = sys.argv[1]
tell(step=1, values={})
if what == "talks":
    much()
elif what == "talks on":
    much()
    until_asked()
    much()
    tell(preempted=2001)
    sys.exit(75)
elif what == "leaves somebody":
    tell(step=2, values={"left": subprocess.Popen([sys.executable, "-c", "import os; os.read(0, 1)"]).pid})
elif what == "does not end":
    other = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
    until_asked()
    os.kill(os.getppid(), signal.SIGINT)
    signal.pause()
elif what == "hangs":
    signal.pause()
elif what == "prints bytes":
    os.write(1, b"caf\\xe9\\n")
    tell(step=2, values={})
elif what == "complains":
    tell(error="the one line")
    sys.exit(2)
elif what == "refuses":
    sys.exit(2)
elif what == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "is preempted":
    tell(preempted=1)
    sys.exit(75)
"""

pytestmark = pytest.mark.process

OTHERS: set[psutil.Process] = set()
"""Children of this process before a test, such as servers of other tests."""


def children() -> list[psutil.Process]:
    """Processes that a test has started."""
    return [process for process in psutil.Process().children(recursive=True) if process not in OTHERS]


@pytest.fixture(autouse=True)
def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A launcher that trains nothing; nothing may hang, and nobody may be left."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(mild.training.launch, "GRACE", 0.5)

    def hangs(*_: Any) -> None:
        raise TimeoutError("it hangs")

    OTHERS.clear()
    OTHERS.update(psutil.Process().children(recursive=True))
    before = signal.signal(signal.SIGALRM, hangs)
    # Who starts tests in the background of a script, as CI may, has it ignored, here and in what is started from here.
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 120, 1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    signal.signal(signal.SIGINT, interrupted)
    left = children()
    for process in left:
        process.kill()
    assert not left


@pytest.fixture
def request_of(tmp_path: Path) -> TrainRequest:
    return TrainRequest(
        settings=TrainSettings(),
        dataset="data",
        configurations={"composite": 1.0},
        split="train",
        dataset_digest="d",
        base="base",
        base_digest="b",
        output=str(tmp_path / "adapters"),
    )


def test_what_training_finds_wrong_comes_through_from_the_other_process(request_of: TrainRequest) -> None:
    with pytest.raises(UserError, match=r"^the one line$"):
        launch(request_of, lambda step, values: None, ("stand_in", "complains"))


@pytest.mark.parametrize(
    ("what", "told"), [("is killed", "ended with code -9"), ("is preempted", r"asked to end; it goes on after step 1$")]
)
def test_what_ends_training_from_outside_is_a_fault_of_the_machine(
    request_of: TrainRequest, what: str, told: str
) -> None:
    with pytest.raises(Interrupted, match=told):
        launch(request_of, lambda step, values: None, ("stand_in", what))


def test_whoever_is_told_may_fail_while_training_has_much_to_say(request_of: TrainRequest) -> None:
    """It is asked to end, and all that it says until then is read: a full pipe would hold both for ever."""

    def fail(step: int, values: dict[str, Any]) -> None:
        raise ConnectionError("the server is away")

    with pytest.raises(ConnectionError, match="the server is away"):
        launch(request_of, fail, ("stand_in", "talks on"))


def test_training_does_not_wait_for_those_who_are_told(request_of: TrainRequest) -> None:
    """It ends while they are still busy with its first step; then they hear of all others."""
    steps: list[int] = []

    def slow(step: int, values: dict[str, Any]) -> None:
        if not steps:
            _, alive = psutil.wait_procs(children(), timeout=60)
            assert not alive
        steps.append(step)

    launch(request_of, slow, ("stand_in", "talks"))
    assert steps == list(range(1, 2002))


def test_what_a_launcher_leaves_running_is_not_waited_for_but_asked_to_end(request_of: TrainRequest) -> None:
    left: list[psutil.Process] = []

    def log(step: int, values: dict[str, Any]) -> None:
        left.extend(psutil.Process(pid) for pid in values.values())

    launch(request_of, log, ("stand_in", "leaves somebody"))
    assert len(left) == 1
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive


def test_interrupted_a_second_time_it_kills_all_that_train(request_of: TrainRequest) -> None:
    """Ctrl-C twice, where training does not end for the first; one of its processes has a session of its own."""
    family: list[psutil.Process] = []

    def interrupt(step: int, values: dict[str, Any]) -> None:
        while len(family) < 2:
            family[:] = children()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(request_of, interrupt, ("stand_in", "does not end"))
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


def test_training_that_says_nothing_for_too_long_is_killed(request_of: TrainRequest) -> None:
    """Asked to end it would not."""
    with pytest.raises(Interrupted, match="not said a word for 1 s"):
        launch(request_of, lambda step, values: None, ("stand_in", "hangs"), time_limit=1)
    assert not children()


def test_what_libraries_print_need_not_be_utf_8(request_of: TrainRequest, capfd: pytest.CaptureFixture[str]) -> None:
    steps: list[int] = []
    launch(request_of, lambda step, values: steps.append(step), ("stand_in", "prints bytes"))
    assert steps == [1, 2]
    assert "caf" in capfd.readouterr().err


def test_nobody_has_to_read_what_libraries_print(request_of: TrainRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal that it is passed on to may be gone."""
    reading, writing = os.pipe()
    os.close(reading)
    steps: list[int] = []
    with os.fdopen(writing, "w", buffering=1) as closed:
        monkeypatch.setattr("sys.stderr", closed)
        launch(request_of, lambda step, values: steps.append(step), ("stand_in", "prints bytes"))
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)
    assert steps == [1, 2]


@pytest.mark.parametrize(
    ("launcher", "complaint"),
    [
        (("torch.distributed.runn",), "python -m torch.distributed.runn finds no module"),
        (("accelerate", "launch"), "python -m accelerate finds no module"),
        (("nothing_like_it.launch",), "python -m nothing_like_it.launch finds no module"),
        (("stand_in", "refuses"), "stand_in refuses ended with code 2: mend its arguments"),
    ],
)
def test_a_launcher_that_cannot_be_run_is_the_users_to_mend(
    request_of: TrainRequest, launcher: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(UserError, match=f"launcher: .*{complaint}"):
        launch(request_of, lambda step, values: None, launcher)
