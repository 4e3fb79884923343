"""The data path: workers that change nothing, whatever happens to them."""

from __future__ import annotations

import filecmp
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from dataset_tools.shards import ShardDataset
from mild.settings import FreshCompositeSettings, TrainSettings
from mild.training.data import TrainingData, Work, fed
from mild.training.fresh import FreshComposites
from mild.training.loop import Preempted, train


def silent(step: int, values: dict[str, float]) -> None:
    pass


def assert_none_is_left() -> None:
    """They have been told to end, and do so when they get to it."""
    for worker in multiprocessing.active_children():
        worker.join(60)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.process
def test_workers_that_are_signalled_and_fail_leave_the_bytes_of_a_run_without_any(
    dataset_with_donors: str,
    serve_files: Callable[..., Any],
    tiny_base: str,
    quick: TrainSettings,
    tmp_path: Path,
) -> None:
    """Two read over a network, make other composites of what they read, and are told to end before the third step, as
    a scheduler tells all of a job: the step is taken and saved. Then one meets a server that will not do, which it says
    as the training process would. Then there is none."""
    server = serve_files(Path(dataset_with_donors))
    samples = ShardDataset(server.url, "composite", "train")
    changes = {"gradient_accumulation": 2, "fresh_composites": FreshCompositeSettings(overlap=1)}
    settings, pieces = quick.model_copy(update=changes), str(tmp_path / "pieces")
    fresh = FreshComposites(ShardDataset(server.url, "real", "train"), settings)
    train(settings, samples, tiny_base, str(tmp_path / "whole"), silent, fresh=fresh)
    asked: list[int] = []

    def signalled() -> bool:
        asked.append(len(multiprocessing.active_children()))
        if len(asked) < 3:
            return False
        for worker in multiprocessing.active_children():
            worker.terminate()
        return True

    with pytest.raises(Preempted, match="after step 3"):
        train(
            settings.model_copy(update={"workers": 2}), samples, tiny_base, pieces, silent, fresh=fresh, stop=signalled
        )
    assert asked == [0, 2, 2]
    assert_none_is_left()
    server.ranges = False
    with pytest.raises(UserError) as alone:
        train(settings, samples, tiny_base, pieces, silent, fresh=fresh)
    with pytest.raises(UserError) as told:
        train(settings.model_copy(update={"workers": 1}), samples, tiny_base, pieces, silent, fresh=fresh)
    assert str(told.value) == str(alone.value) and "ignores range requests" in str(told.value)
    assert_none_is_left()
    server.ranges = True
    assert train(settings, samples, tiny_base, pieces, silent, fresh=fresh).resumed_at == 3
    names = [str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*.safetensors")]
    names.append("loss.csv")
    assert len(names) == 6
    assert filecmp.cmpfiles(tmp_path / "whole", pieces, names, shallow=False)[0] == names


def test_a_sample_that_cannot_be_used_is_told_when_its_turn_has_come(
    quick: TrainSettings, make_sample: Callable[..., Sample], in_memory: Callable[..., Any]
) -> None:
    """Also after a way through another process, which loses all of an error but its words."""
    samples = [make_sample(index) for index in range(3)]
    samples[1].parsing = samples[1].parsing[1:]
    data = TrainingData(in_memory(samples), quick, quick.mild.hmg, (4, 8, 8), 1000, None)
    works = [Work(step, ("bg",), (step,)) for step in range(3)]
    found = pickle.loads(pickle.dumps(data[works[1]]))
    assert isinstance(found, UserError)
    passes = fed(data, works)
    assert next(passes).noise.shape == (1, 4, 8, 8)
    with pytest.raises(UserError, match=r"^sample sample-1: .* differ in size from the image \(64x48\)$") as told:
        next(passes)
    assert str(told.value) == str(found)


@pytest.mark.process
def test_a_worker_imports_no_networks() -> None:
    program = (
        "import sys, mild.training.data;"
        "print(sorted({'diffusers', 'transformers', 'peft', 'prefect'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
