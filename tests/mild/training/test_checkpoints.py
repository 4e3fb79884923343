"""Checkpoints, and runs that go on from them as if nothing had been."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dataset_tools.errors import UserError
from dataset_tools.shards import ShardDataset
from mild.settings import TrainSettings, WarmUpSettings
from mild.training.checkpoints import Checkpoints
from mild.training.loop import Preempted, train

pytestmark = pytest.mark.slow

KILLS = 3
RUN = {"settings": {"seed": 1, "steps": 9}, "dataset": "abc"}
NUMBERS = {"scale": 0.1 + 0.2}


def tensors(count: int = 3) -> dict[str, torch.Tensor]:
    return {"weights/a": torch.arange(count) / 3, "step": torch.tensor(7.0), "losses": torch.rand(2, 4).double()}


def silent(step: int, values: dict[str, float]) -> None:
    pass


def changed(settings: TrainSettings, **changes: Any) -> TrainSettings:
    return TrainSettings.model_validate(settings.model_dump() | changes)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_same(folder: Path, other: Path) -> None:
    """Two folders hold the same files with the same bytes."""
    assert files(folder) == files(other)
    assert filecmp.cmpfiles(folder, other, files(folder), shallow=False)[0] == files(folder)


def after(steps: int) -> Callable[[], bool]:
    """Asks a run to end after so many steps of its own."""
    answers = iter([False] * (steps - 1) + [True])
    return lambda: next(answers)


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    saved = tensors()
    Checkpoints(tmp_path / "c", RUN, keep=2).save(7, saved, NUMBERS)
    found = Checkpoints(tmp_path / "c", RUN, keep=2).latest()
    assert found is not None
    assert (found.step, found.numbers) == (7, NUMBERS)
    assert found.tensors.keys() == saved.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in saved.items())


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, RUN, keep=2)
    for step in (5, 10, 15, 100):
        kept.save(step, tensors(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015", "step-00000100"]
    newest = kept.latest()
    assert newest is not None and newest.step == 100


@pytest.mark.parametrize("harm", ["flip", "cut", "no tensors", "no state", "half a state"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, harm: str) -> None:
    kept = Checkpoints(tmp_path, RUN, keep=2)
    kept.save(10, tensors(), {})
    data, state = tmp_path / "step-00000010/tensors.safetensors", tmp_path / "step-00000010/state.json"
    if harm == "flip":
        data.write_bytes(data.read_bytes()[:-1] + bytes([data.read_bytes()[-1] ^ 1]))
    elif harm == "cut":
        data.write_bytes(data.read_bytes()[:-8])
    elif harm == "no tensors":
        data.unlink()
    elif harm == "no state":
        state.unlink()
    else:
        state.write_bytes(state.read_bytes()[:40])
    with pytest.raises(UserError, match=r"no checkpoint in .* is sound: delete"):
        kept.latest()
    kept.save(5, tensors(), {})
    found = kept.latest()
    assert found is not None and found.step == 5


def test_a_run_that_goes_on_before_a_damaged_checkpoint_saves_that_step_again(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, RUN, keep=2)
    for step in (5, 10):
        kept.save(step, tensors(), {})
    (tmp_path / "step-00000010/state.json").unlink()
    kept.latest()
    kept.save(10, tensors(), NUMBERS)
    found = kept.latest()
    assert found is not None and (found.step, found.numbers) == (10, NUMBERS)


def test_a_damaged_checkpoint_is_not_kept_in_the_place_of_a_sound_one(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, RUN, keep=1)
    kept.save(500, tensors(), {})
    shutil.copytree(tmp_path / "step-00000500", tmp_path / "step-00001000")
    (tmp_path / "step-00001000/tensors.safetensors").write_bytes(b"")
    kept.latest()
    kept.save(600, tensors(), {})
    assert os.listdir(tmp_path) == ["step-00000600"]


def test_a_checkpoint_of_another_run_is_refused_and_what_differs_is_named(tmp_path: Path) -> None:
    Checkpoints(tmp_path, RUN, keep=2).save(7, tensors(), {})
    other = {"settings": {"seed": 2, "steps": 9}, "dataset": "abd"}
    with pytest.raises(UserError) as told:
        Checkpoints(tmp_path, other, keep=2).latest()
    message = str(told.value)
    assert 'dataset: "abc" there, "abd" now; settings.seed: 1 there, 2 now' in message
    assert "steps" not in message and f"delete {tmp_path}" in message


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file of this process can grow beyond ``size`` bytes, as on a disk with little room left."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_where_there_is_no_room_the_older_checkpoint_stays_intact(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, RUN, keep=1)
    kept.save(5, tensors(), NUMBERS)
    before = {path: (tmp_path / path).read_bytes() for path in files(tmp_path)}
    with files_limited_to(100_000), pytest.raises(UserError, match=r"checkpoint of step 10 .*step-00000005 stays"):
        kept.save(10, tensors(50_000), NUMBERS)
    assert {path: (tmp_path / path).read_bytes() for path in files(tmp_path)} == before
    assert os.listdir(tmp_path) == ["step-00000005"]
    kept.save(10, tensors(50_000), NUMBERS)
    assert os.listdir(tmp_path) == ["step-00000010"]


def test_two_runs_cannot_hold_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mild.training.checkpoints.PATIENCE", 0.1)
    one, other = (Checkpoints(tmp_path / "work/checkpoints", RUN, keep=1) for _ in range(2))
    with one.held(), pytest.raises(UserError, match="another run is at work"), other.held():
        pass
    with other.held():
        pass
    assert list(tmp_path.iterdir()) == [], "a folder without checkpoints does not stay"


def test_what_else_lies_in_the_folder_stays(tmp_path: Path) -> None:
    kept, mine = Checkpoints(tmp_path / "c", RUN, keep=1), ["notes.txt", "step-by-step/notes.txt"]
    for name in mine:
        (tmp_path / "c" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "c" / name).touch()
    with pytest.raises(UserError, match="no base"), kept.held():
        raise UserError("no base")
    assert files(tmp_path / "c") == mine
    with kept.held():
        kept.save(5, tensors(), {})
    kept.remove()
    assert files(tmp_path / "c") == mine


@pytest.fixture(scope="module")
def eventful(quick: TrainSettings) -> TrainSettings:
    """A run in which everything that a checkpoint must hold matters."""
    return changed(
        quick,
        steps=8,
        warm_up=WarmUpSettings(start=3, end=6),
        lr_scheduler="cosine",
        lr_warmup_steps=3,
        ema_decay=0.9,
        max_grad_norm=0.1,
        checkpoint_every=2,
        checkpoints_kept=1,
    )


@pytest.fixture(scope="module")
def forgetful_base(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base whose UNet has dropout, and so draws from torch's generators."""
    folder = tmp_path_factory.mktemp("forgetful") / "base"
    shutil.copytree(tiny_base, folder)
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dropout": 0.2}))
    return str(folder)


def test_a_run_that_is_asked_to_end_again_and_again_leaves_the_bytes_of_one_that_was_not(
    samples: Any, forgetful_base: str, eventful: TrainSettings, tmp_path: Path
) -> None:
    """Before and in the warm-up, beside and on a checkpoint, and with other numbers drawn in between."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    undisturbed = train(eventful, samples, forgetful_base, str(whole), silent)
    assert undisturbed.resumed_at == 0
    for steps, done in [(1, 1), (3, 4), (1, 5)]:
        torch.rand(3)
        with pytest.raises(Preempted, match=f"after step {done}:"):
            train(eventful, samples, forgetful_base, str(pieces), silent, stop=after(steps))
        assert not pieces.exists()
        assert os.listdir(tmp_path / "pieces.work/checkpoints") in (
            [f"step-{done:08d}", ".lock"],
            [".lock", f"step-{done:08d}"],
        )
    result = train(eventful, samples, forgetful_base, str(pieces), silent)
    assert (result.resumed_at, result.steps) == (5, 8)
    assert (result.first_loss, result.last_loss) == (undisturbed.first_loss, undisturbed.last_loss)
    assert_same(whole, pieces)
    assert sorted(os.listdir(tmp_path)) == ["pieces", "pieces.work", "whole", "whole.work"]
    assert os.listdir(tmp_path / "pieces.work") == ["logs"], "checkpoints of a complete run are removed"


def test_how_a_run_works_may_change_and_what_it_does_may_not(
    samples: Any, tiny_base: str, eventful: TrainSettings, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    start: dict[str, Any] = {"samples": samples, "base": tiny_base, "output": str(output), "log": silent}
    with pytest.raises(Preempted):
        train(eventful, **start, dataset_digest="d1", base_digest="b1", stop=after(1))
    kept = files(tmp_path)
    others: list[tuple[dict[str, Any], str]] = [
        ({"settings": changed(eventful, learning_rate=0.5)}, r"settings.learning_rate: 0.001 there, 0.5 now"),
        ({"dataset_digest": "d2"}, r'dataset: "d1" there, "d2" now'),
        ({"base_digest": "b2"}, r'base: "b1" there, "b2" now'),
        ({"samples": type(samples)(samples.samples[:5])}, "keys of samples"),
    ]
    for changes, named in others:
        arguments = {"settings": eventful, "dataset_digest": "d1", "base_digest": "b1", **start, **changes}
        with pytest.raises(UserError, match=named):
            train(**arguments)
        assert files(tmp_path) == kept
    work = changed(eventful, gradient_accumulation=2, gradient_checkpointing=True, checkpoint_every=3, log_every=1)
    assert train(work, **start, dataset_digest="d1", base_digest="b1").resumed_at == 1


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(
    samples: Any, tiny_base: str, eventful: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mild.training.loop import BranchLoss, Examples

    make = BranchLoss.examples

    def spoilt(self: BranchLoss, branches: Any, drawn: Any, step: int) -> list[Examples]:
        factor = float("nan") if step == 4 else 1.0
        return [replace(of_branch, weight=factor * of_branch.weight) for of_branch in make(self, branches, drawn, step)]

    monkeypatch.setattr(BranchLoss, "examples", spoilt)
    with pytest.raises(UserError, match=r"the loss is nan at step 5 \(samples sample-\d, sample-\d\)"):
        train(eventful, samples, tiny_base, str(tmp_path / "out"), silent)
    found = tmp_path / "out.work/checkpoints/step-00000004/tensors.safetensors"
    assert all(tensor.isfinite().all() for tensor in load_file(found).values())
    assert os.listdir(tmp_path) == ["out.work"]


def test_gradients_that_are_not_finite_never_reach_the_weights(
    samples: Any, tiny_base: str, eventful: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A square root at zero: a finite value with an infinite slope."""
    monkeypatch.setattr(
        "mild.training.loop.background_loss", lambda prediction, *_: (prediction * 0).square().sum((1, 2, 3)).sqrt()
    )
    with pytest.raises(UserError, match=r"the norm of the gradients is nan at step 1 \(samples"):
        train(eventful, samples, tiny_base, str(tmp_path / "out"), silent)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from dataset_tools.shards import ShardDataset
from mild.settings import TrainSettings
from mild.training.loop import train

dataset, base, output, settings, kills = sys.argv[1:]
samples = ShardDataset(dataset, "composite", "train")
checkpoints = Path(output + ".work/checkpoints")
chance, left = random.Random(20261122), int(kills)

def told(pipe):
    # Asked before each step: says when the first is behind, and waits for its end when the second is.
    yield False
    os.write(pipe, b".")
    yield False
    signal.pause()

while True:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        steps = told(writing)
        stop = (lambda: next(steps)) if left else (lambda: False)
        train(TrainSettings.model_validate_json(settings), samples, base, output, lambda step, values: None, stop=stop)
        os._exit(0)
    os.close(writing)
    if left:
        os.read(reading, 1)
        time.sleep(chance.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        left -= 1
    _, status = os.waitpid(child, 0)
    os.close(reading)
    print(len(list(checkpoints.glob("step-*"))), flush=True)
    if status == 0:
        break
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
"""


@pytest.mark.process
def test_a_run_that_is_killed_again_and_again_leaves_the_bytes_of_one_that_was_not(
    drawn_dataset: str, tiny_base: str, eventful: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at random moments, while a step is taken and while its checkpoint is written."""
    monkeypatch.undo()  # In another process charts are charts.
    settings = changed(eventful, checkpoint_every=1, checkpoints_kept=2)
    samples = ShardDataset(drawn_dataset, "composite", "train")
    train(settings, samples, tiny_base, str(tmp_path / "whole"), silent)
    arguments = [drawn_dataset, tiny_base, str(tmp_path / "killed"), settings.model_dump_json(), str(KILLS)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left = [int(line) for line in done.stdout.split()]
    assert len(left) == KILLS + 1 and min(left[:-1]) >= 1, "every kill came after a checkpoint and before the end"
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert sorted(os.listdir(tmp_path)) == ["killed", "killed.work", "whole", "whole.work"]
    assert os.listdir(tmp_path / "killed.work") == ["logs"], "nothing half-written is left"
