"""The flow train: training in a process of its own that can be killed, told to end, and started again."""

from __future__ import annotations

import contextlib
import csv
import filecmp
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml
from safetensors.torch import load_file

from dataset_tools.errors import UserError
from dataset_tools.schema import EncodingSettings
from dataset_tools.shards import Manifest, ShardDataset, write_shard
from flows.train import TrainJob, TrainRecipe, train
from mild.launch import PREEMPTED, Interrupted, TrainRequest, check_shards, launch

STEPS = 10
TWO_PROCESSES = ["torch.distributed.run", "--nproc_per_node", "2"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models here are too small for more, and rounding depends on the number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def drawn() -> ModuleType:
    """What the tests of `mild` draw their samples with."""
    path = Path(__file__).parents[1] / "mild/conftest.py"
    spec = importlib.util.spec_from_file_location("mild_conftest", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def dataset(drawn: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards of three composite samples."""
    root = tmp_path_factory.mktemp("data") / "dataset"
    shards = [
        write_shard(
            [drawn.draw_sample(3 * number + index) for index in range(3)],
            str(root),
            f"composite/train-{number:06d}.tar",
            EncodingSettings(),
            [],
        )
        for number in range(2)
    ]
    manifest = Manifest(
        name="drawn", shards={"composite": {"train": shards}}, files={}, source="", settings={}, software={}
    )
    (root / "manifest.json").write_text(manifest.model_dump_json())
    return str(root)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Short, but long enough to be interrupted."""
    path = tmp_path_factory.mktemp("recipe") / "train.yaml"
    settings = {
        **{"steps": STEPS, "batch_size": 2, "learning_rate": 1e-3, "resolution": 32, "checkpoint_every": 2},
        **{
            "log_every": 1,
            "warm_up": {"start": 2, "end": 4},
            "mild": {"hmg": {"width": 8, "map_side": 16, "dropout": 0.5}},
        },
    }
    path.write_text(yaml.safe_dump({"train": settings}))
    return str(path)


@pytest.fixture(scope="session")
def undisturbed(recipe: str, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of a run that nobody disturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "adapters"
    assert not train(recipe, dataset, str(output))["cached"]
    return output


@pytest.fixture
def request_of(recipe: str, dataset: str, undisturbed: Path, tmp_path: Path) -> TrainRequest:
    """What the flow asks for, with the output in a folder of the test's own."""
    base = f"{undisturbed}.work/base"
    settings = TrainRecipe.load(recipe).train
    return TrainRequest(
        settings=settings,
        dataset=dataset,
        configurations={"composite": 1.0},
        split="train",
        dataset_digest="d",
        base=base,
        base_digest="b",
        output=str(tmp_path / "adapters"),
    )


def assert_same_training(folder: Path, other: Path) -> None:
    """Weights and losses are the same to the byte; what names the base's place is not compared."""
    names = [str(path.relative_to(other)) for path in other.rglob("*") if path.suffix in (".safetensors", ".csv")]
    assert len(names) == 5
    assert filecmp.cmpfiles(folder, other, names, shallow=False)[0] == names


def test_a_second_run_trains_nothing_and_a_damaged_adapter_is_trained_again(
    recipe: str, dataset: str, undisturbed: Path, tmp_path: Path
) -> None:
    for name in ("adapters", "adapters.work"):
        shutil.copytree(undisturbed.with_name(name), tmp_path / name)
    # Neither how many processes there are nor where things lie decides about the result.
    changes = {"launcher": TWO_PROCESSES}
    assert train(recipe, dataset, str(tmp_path / "adapters"), changes)["cached"]
    assert not (tmp_path / "adapters.work/checkpoints").exists()
    (tmp_path / "adapters/sma.safetensors").unlink()
    assert not train(recipe, dataset, str(tmp_path / "adapters"))["cached"]
    assert_same_training(tmp_path / "adapters", undisturbed)


def test_killed_with_all_its_processes_the_flow_goes_on_from_the_last_checkpoint(
    recipe: str, dataset: str, undisturbed: Path, tmp_path: Path, server_environment: dict[str, str]
) -> None:
    output, work = tmp_path / "adapters", tmp_path / "adapters.work"
    shutil.copytree(Path(f"{undisturbed}.work"), work, ignore=shutil.ignore_patterns("train-adapters-*"))
    command = [sys.executable, "-m", "flows.cli", "train", recipe, "--dataset", dataset, "--output", str(output)]
    child = subprocess.Popen(command, env=server_environment, stderr=subprocess.PIPE, start_new_session=True)
    while child.poll() is None and not list(work.glob("checkpoints/step-*")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=0.05)
    os.killpg(child.pid, signal.SIGKILL)
    _, errors = child.communicate()
    assert child.returncode == -signal.SIGKILL, errors.decode()
    assert list(work.glob("checkpoints/step-*")) and not output.exists()
    assert not train(recipe, dataset, str(output))["cached"]
    assert_same_training(output, undisturbed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "adapters.work"]


def test_training_whose_starter_is_gone_saves_and_ends(request_of: TrainRequest, undisturbed: Path) -> None:
    """Whatever happens to a flow, no process is left that trains by itself; the next run goes on."""
    command = [sys.executable, "-m", "mild.launch", request_of.model_dump_json()]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()
    process.stdin.close()
    told = [json.loads(line) for line in process.stdout]
    assert process.wait() == PREEMPTED
    assert told[-1]["preempted"] < STEPS
    assert list(Path(f"{request_of.output}.work/checkpoints").glob(f"step-*{told[-1]['preempted']}"))


def test_signals_to_the_training_process_are_faults_of_the_machine(request_of: TrainRequest, undisturbed: Path) -> None:
    """SIGKILL, then SIGTERM, as Prefect would try again; the third time runs through."""
    steps: list[int] = []
    strikes = [(5, signal.SIGTERM), (3, signal.SIGKILL)]

    def strike(step: int, values: dict[str, float]) -> None:
        steps.append(step)
        if strikes and step == strikes[-1][0]:
            (child,) = [child for child in psutil.Process().children() if "mild.launch" in child.cmdline()]
            child.send_signal(strikes.pop()[1])

    with pytest.raises(Interrupted, match="ended with code -9"):
        launch(request_of, strike)
    with pytest.raises(Interrupted, match=r"asked to end; it goes on after step \d+"):
        launch(request_of, strike)
    launch(request_of, strike)
    assert steps[-1] == STEPS and set(steps) == set(range(1, STEPS + 1))
    assert_same_training(Path(request_of.output), undisturbed)


def test_two_processes_interrupted_and_then_one_train_what_one_does(
    request_of: TrainRequest, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding. The interruption is an exception here, as Prefect raises one when a worker is told to end."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def stop(step: int, values: dict[str, float]) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(request_of, stop, TWO_PROCESSES)
    assert not [child for child in psutil.Process().children(recursive=True) if "mild.launch" in child.cmdline()]
    done = max(int(path.name[5:]) for path in Path(f"{request_of.output}.work/checkpoints").glob("step-*"))
    assert 6 <= done < STEPS
    settings = request_of.settings.model_copy(update={"gradient_accumulation": 2})
    launch(request_of.model_copy(update={"settings": settings}), lambda step, values: None)
    with (undisturbed / "loss.csv").open() as one, (Path(request_of.output) / "loss.csv").open() as other:
        pairs = zip(csv.reader(one), csv.reader(other), strict=True)
        next(pairs)
        for expected, found in pairs:
            assert [float(value) for value in found] == pytest.approx([float(value) for value in expected], rel=1e-3)
        assert (Path(request_of.output) / "loss.csv").read_bytes() != (undisturbed / "loss.csv").read_bytes(), (
            "sums in another order round otherwise: there were two processes"
        )
    for path in undisturbed.rglob("*.safetensors"):
        weights = load_file(Path(request_of.output) / path.relative_to(undisturbed))
        for name, tensor in load_file(path).items():
            assert (weights[name] - tensor).norm() < 0.01 * tensor.norm() + 1e-6, name


@pytest.mark.parametrize("harm", ["missing", "altered", "cut"])
def test_a_shard_that_is_not_sound_is_named_before_the_first_step(dataset: str, tmp_path: Path, harm: str) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(dataset, copy)
    shard = copy / "composite/train-000001.tar"
    data = shard.read_bytes()
    if harm == "missing":
        shard.unlink()
    else:
        shard.write_bytes(data[:-1] if harm == "cut" else data[:700] + bytes([data[700] ^ 1]) + data[701:])
    with pytest.raises(UserError, match=r"composite/train-000001.tar is (missing|not what the manifest says)"):
        check_shards(ShardDataset(str(copy), "composite", "train"))


def test_what_training_finds_wrong_is_the_users_to_mend(request_of: TrainRequest) -> None:
    """The one line comes through from the other process."""
    wrong = request_of.model_copy(update={"settings": request_of.settings.model_copy(update={"resolution": 40})})
    with pytest.raises(UserError, match="resolution: 40 must be a multiple of 16"):
        launch(wrong, lambda step, values: None)


def test_another_base_or_dataset_is_trained_anew(recipe: str) -> None:
    settings = TrainRecipe.load(recipe)
    places = {"root": "r", "work": "w", "dataset": "d", "base": "b", "recipe": settings}
    key = TrainJob(**places, dataset_digest="1", base_digest="1").key()
    assert key == TrainJob(**{**places, "root": "other"}, dataset_digest="1", base_digest="1").key()
    for digests in [{"dataset_digest": "2", "base_digest": "1"}, {"dataset_digest": "1", "base_digest": "2"}]:
        assert key != TrainJob(**places, **digests).key()


def test_the_losses_are_all_there(undisturbed: Path) -> None:
    with (undisturbed / "loss.csv").open() as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
