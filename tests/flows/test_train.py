"""The flow train: training in a process of its own that can be killed, told to end, and started again."""

from __future__ import annotations

import asyncio
import base64
import csv
import filecmp
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import torch
import yaml
from PIL import Image
from prefect.artifacts import Artifact
from prefect.exceptions import TerminationSignal
from prefect.settings import PREFECT_API_URL

import flows.pages
import flows.train
import mild.training.launch
from dataset_tools.errors import UserError
from dataset_tools.schema import EncodingSettings, Sample
from dataset_tools.shards import Manifest, ShardDataset, write_shard
from dataset_tools.storage import sha256_of_file
from flows.names import artifact_key
from flows.progress import Display
from flows.train import LatentsJob, TrainJob, TrainRecipe, check_train, train
from mild.bases import NANO, NANO_ADAPTERS
from mild.settings import LATENTS_FORMAT
from mild.training.launch import PREEMPTED, TrainRequest, check_shards, launch, main, train_here

STEPS = 10
TWO_PROCESSES = ["torch.distributed.run", "--nproc_per_node", "2"]
STRUCK = 3
"""The step of which a starter is told when it is killed."""
STARTER = f"""
import os, signal
import flows.train
from flows.cli import main

def told(request, log, *how, launch=flows.train.launch):
    launch(request, lambda step, values: os.killpg(0, signal.SIGKILL) if step == {STRUCK} else log(step, values))

flows.train.launch = told
main()
"""
"""The command line, whose process group is killed while it is told of a step."""


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
def undisturbed(
    recipe: str, drawn_dataset: str, tmp_path_factory: pytest.TempPathFactory, prefect_server: None
) -> Path:
    """Adapters of a run that nobody disturbed, in a process of its own."""
    output = tmp_path_factory.mktemp("undisturbed") / "adapters"
    assert not train(recipe, drawn_dataset, str(output))["cached"]
    return output


@pytest.fixture
def in_this_process(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow trains where it runs: importing all that training needs anew takes far longer than training here."""
    monkeypatch.setattr(flows.train, "launch", lambda request, log, *how: train_here(request, log))


@pytest.fixture
def request_of(recipe: str, drawn_dataset: str, tmp_path: Path) -> TrainRequest:
    """What the flow asks for, with the output in a folder of the test's own."""
    settings = TrainRecipe.load(recipe).train
    return TrainRequest(
        settings=settings,
        dataset=drawn_dataset,
        configurations={"composite": 1.0},
        split="train",
        dataset_digest="d",
        base=NANO,
        base_digest="b",
        output=str(tmp_path / "adapters"),
    )


@pytest.fixture
def handlers_restored() -> Iterator[None]:
    """What a process that trains does with signals ends with the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def assert_same_training(folder: Path, other: Path) -> None:
    """Weights and losses are the same to the byte."""
    names = [str(path.relative_to(other)) for path in other.rglob("*") if path.suffix in (".safetensors", ".csv")]
    assert len(names) == 6
    assert filecmp.cmpfiles(folder, other, names, shallow=False)[0] == names


@pytest.mark.process
def test_a_second_run_trains_nothing_and_a_damaged_adapter_is_trained_again(
    recipe: str, drawn_dataset: str, undisturbed: Path, tmp_path: Path, in_this_process: None
) -> None:
    for name in ("adapters", "adapters.work"):
        shutil.copytree(undisturbed.with_name(name), tmp_path / name)
    # Neither how many processes there are nor where things lie decides about the result.
    changes = {"launcher": TWO_PROCESSES}
    assert train(recipe, drawn_dataset, str(tmp_path / "adapters"), changes)["cached"]
    assert not (tmp_path / "adapters.work/checkpoints").exists()
    (tmp_path / "adapters/sma.safetensors").unlink()
    assert not train(recipe, drawn_dataset, str(tmp_path / "adapters"))["cached"]
    assert_same_training(tmp_path / "adapters", undisturbed)


@dataclass(frozen=True)
class Killed:
    """A run whose command line was killed, and that was started again."""

    returncode: int
    """Of the command line."""
    errors: str
    checkpoints: list[int]
    """Steps whose checkpoints lay there then."""
    finished: bool
    """Whether the adapters did."""
    cached: bool
    """What the flow said the second time."""
    steps: list[int]
    """Those that the second run took."""
    output: Path


@pytest.fixture(scope="session")
def killed(recipe: str, drawn_dataset: str, undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """Killed with its process group while it is told of a step; no checkpoint is due before the end."""
    folder = tmp_path_factory.mktemp("killed")
    output, work = folder / "adapters", folder / "adapters.work"
    shutil.copytree(Path(f"{undisturbed}.work"), work, ignore=shutil.ignore_patterns("train-adapters-*"))
    arguments = ["train", recipe, "--dataset", drawn_dataset, "--output", str(output)]
    command = [sys.executable, "-c", STARTER, *arguments, "--set", "train.checkpoint_every=1000"]
    environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value() or "", "PREFECT_LOGGING_LEVEL": "CRITICAL"}
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    _, errors = child.communicate()  # to the end of those who inherited it
    checkpoints = sorted(int(path.name[5:]) for path in work.glob("checkpoints/step-*"))
    finished, steps = output.exists(), []

    def here(request: TrainRequest, log: Any, *how: Any) -> None:
        train_here(request, lambda step, values: (steps.append(step), log(step, values)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flows.train, "launch", here)
        cached = train(recipe, drawn_dataset, str(output))["cached"]
    return Killed(child.returncode, errors.decode(), checkpoints, finished, cached, steps, output)


@pytest.mark.process
def test_killed_with_all_its_processes_the_flow_goes_on_from_the_last_checkpoint(
    killed: Killed, undisturbed: Path
) -> None:
    assert killed.returncode == -signal.SIGKILL, killed.errors
    assert killed.checkpoints and not killed.finished
    assert not killed.cached
    assert killed.steps == list(range(killed.checkpoints[-1] + 1, STEPS + 1))
    assert_same_training(killed.output, undisturbed)
    assert sorted(path.name for path in killed.output.parent.iterdir()) == ["adapters", "adapters.work"]


@pytest.mark.process
def test_a_starter_that_is_killed_while_it_is_told_leaves_a_checkpoint(killed: Killed, undisturbed: Path) -> None:
    """Also of the steps after the last one that was due: nobody reads what training says of them, and no process is
    left that trains by itself."""
    assert killed.returncode == -signal.SIGKILL, killed.errors
    assert len(killed.checkpoints) == 1 and STRUCK <= killed.checkpoints[0] < STEPS
    assert_same_training(killed.output, undisturbed)


def test_narrow_pictures_are_set_aside_with_and_without_stored_latents(
    recipe: str, make_sample: Callable[..., Sample], tmp_path: Path, in_this_process: None
) -> None:
    """Those of the second shard are all narrow."""
    root, sizes = tmp_path / "dataset", [(48, 24, 64, 64), (24, 24)]
    shards = [
        write_shard(
            [make_sample(10 * number + index, height=height) for index, height in enumerate(heights)],
            str(root),
            f"composite/train-{number:06d}.tar",
            EncodingSettings(),
            [],
        )
        for number, heights in enumerate(sizes)
    ]
    manifest = Manifest(
        name="drawn", shards={"composite": {"train": shards}}, files={}, source="", settings={}, software={}
    )
    (root / "manifest.json").write_text(manifest.model_dump_json())
    line = "3 of 6 samples set aside: smaller than resolution 32"
    for number, changes in enumerate(({"train.steps": 2}, {"train.steps": 2, "train.cached_views": 1})):
        output = str(tmp_path / f"adapters-{number}")
        for cached in (False, True):
            result = train(recipe, str(root), output, changes)
            assert (result["set_aside"], result["cached"]) == (line, cached)
    with pytest.raises(UserError, match=r"6 of 6 samples set aside: smaller than resolution 80; .* lower resolution"):
        train(recipe, str(root), str(tmp_path / "none"), {"train.resolution": 80, "train.cached_views": 1})
    assert not list(tmp_path.glob("none.work/latents/*"))


@pytest.mark.usefixtures("prefect_server")
def test_a_server_that_refuses_what_it_is_shown_does_not_end_training(
    recipe: str, drawn_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked once in a while, and one line is logged."""
    output, asked = tmp_path / "adapters", []

    def refuse(*_: Any, **options: Any) -> Any:
        asked.append(options.get("key"))
        raise httpx.ConnectError("All connection attempts failed")

    for module, kind in [("progress", "progress"), ("train", "table"), ("pages", "image"), ("train", "link")]:
        monkeypatch.setattr(f"flows.{module}.create_{kind}_artifact", refuse)
    steps: list[int] = []

    def launch(request: TrainRequest, log: Any, *how: Any) -> None:
        for step in range(1, STEPS + 1):
            log(step, {"loss/total": 1 / step})
            steps.append(step)
        output.mkdir()
        (output / "loss.csv").write_text("step,loss\n1,1.0\n")
        (output / "mild.json").write_text('{"set_aside": ""}')

    monkeypatch.setattr(flows.train, "launch", launch)
    assert not train(recipe, drawn_dataset, str(output))["cached"]
    assert steps == list(range(1, STEPS + 1))
    assert asked == [artifact_key(what, str(output)) for what in ("train-progress", "train-adapters")]
    told = [record.getMessage() for record in caplog.records if "the work goes on" in record.getMessage()]
    assert len(told) == 2 and "All connection attempts failed" in told[0]


@pytest.mark.parametrize("signal", [KeyboardInterrupt(), TerminationSignal(signal.SIGTERM), asyncio.CancelledError()])
def test_signals_and_cancellation_come_through_what_is_shown(signal: BaseException) -> None:
    def interrupted() -> None:
        raise signal

    with pytest.raises(type(signal)):
        Display().show(interrupted)


@pytest.mark.process
def test_sigterm_to_the_training_process_leaves_a_checkpoint_from_which_it_goes_on(
    request_of: TrainRequest,
    undisturbed: Path,
    handlers_restored: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a process that trains does, in this one."""
    tell = mild.training.launch._tell

    def strike(**news: Any) -> None:
        tell(**news)
        if news.get("step") == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sys, "argv", ["launch", request_of.model_dump_json()])
    monkeypatch.setattr("mild.training.launch._await_end_of_input", lambda ended: None)
    monkeypatch.setattr("mild.training.launch._tell", strike)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == PREEMPTED
    *told, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [news["step"] for news in told] == list(range(1, last["preempted"] + 1)) and 5 <= last["preempted"] < STEPS
    checkpoints = Path(f"{request_of.output}.work/checkpoints")
    assert list(checkpoints.glob(f"step-*{last['preempted']}"))
    steps: list[int] = []
    train_here(request_of, lambda step, values: steps.append(step))
    assert steps == list(range(last["preempted"] + 1, STEPS + 1))
    assert_same_training(Path(request_of.output), undisturbed)


@pytest.mark.process
def test_two_processes_interrupted_and_then_one_train_what_one_does(
    request_of: TrainRequest,
    undisturbed: Path,
    assert_trained_alike: Callable[[Path, Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To rounding. The interruption is an exception here, as Prefect raises one when a worker is told to end."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def stop(step: int, values: dict[str, float]) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(request_of, stop, TWO_PROCESSES)
    assert not [
        child for child in psutil.Process().children(recursive=True) if "mild.training.launch" in child.cmdline()
    ]
    done = max(int(path.name[5:]) for path in Path(f"{request_of.output}.work/checkpoints").glob("step-*"))
    assert 6 <= done < STEPS
    settings = request_of.settings.model_copy(update={"gradient_accumulation": 2})
    train_here(request_of.model_copy(update={"settings": settings}), lambda step, values: None)
    assert_trained_alike(Path(request_of.output), undisturbed)
    assert (Path(request_of.output) / "loss.csv").read_bytes() != (undisturbed / "loss.csv").read_bytes(), (
        "sums in another order round otherwise: there were two processes"
    )


def test_latents_are_encoded_once_and_what_is_damaged_of_them_again(
    recipe: str, drawn_dataset: str, tmp_path: Path, in_this_process: None
) -> None:
    output, work = tmp_path / "adapters", tmp_path / "adapters.work"
    changes: dict[str, Any] = {"train.cached_views": 2, "train.steps": 3}
    assert not train(recipe, drawn_dataset, str(output), changes)["cached"]
    latents = {path: path.read_bytes() for path in sorted(work.glob("latents/*/*"))}
    names = [f"train-{number:06d}.{end}" for number in range(2) for end in ("index.json", "tar")]
    assert [path.name for path in latents] == names

    def written() -> list[int]:
        return [path.stat().st_mtime_ns for path in latents]

    before = written()
    damaged = next(path for path in latents if path.name == "train-000001.tar")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert train(recipe, drawn_dataset, str(output), changes)["cached"]
    assert {path: path.read_bytes() for path in latents} == latents
    assert written()[:2] == before[:2]


@pytest.mark.parametrize("harm", ["missing", "altered", "cut"])
def test_a_shard_that_is_not_sound_is_named_before_the_first_step(
    drawn_dataset: str, tmp_path: Path, harm: str
) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(drawn_dataset, copy)
    shard = copy / "composite/train-000001.tar"
    data = shard.read_bytes()
    if harm == "missing":
        shard.unlink()
    else:
        shard.write_bytes(data[:-1] if harm == "cut" else data[:700] + bytes([data[700] ^ 1]) + data[701:])
    with pytest.raises(UserError, match=r"composite/train-000001.tar is (missing|not what the manifest says)"):
        check_shards(ShardDataset(str(copy), "composite", "train"))


def test_processes_that_train_together_read_each_shard_once_to_look_at_it(
    request_of: TrainRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, list[str]] = {"0": [], "1": []}

    def digest(filesystem: Any, path: str) -> str:
        read[os.environ["RANK"]].append(os.path.basename(path))
        return sha256_of_file(filesystem, path)

    monkeypatch.setattr(mild.training.launch, "sha256_of_file", digest)
    monkeypatch.setattr("mild.training.loop.check_machine", lambda settings: None)
    monkeypatch.setattr("mild.training.loop.train", lambda *_, **__: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in read:
        monkeypatch.setenv("RANK", rank)
        train_here(request_of, lambda step, values: None)
    assert read == {"0": ["train-000000.tar"], "1": ["train-000001.tar"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_without_a_gpu_is_one_line_before_the_data_are_read(request_of: TrainRequest) -> None:
    settings = request_of.settings.model_copy(update={"mixed_precision": "fp16"})
    nowhere = request_of.model_copy(update={"settings": settings, "dataset": "nowhere", "base": "no/base"})
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        train_here(nowhere, lambda step, values: None)


def test_what_training_finds_wrong_is_told_in_one_line(
    request_of: TrainRequest,
    handlers_restored: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a process that trains does, in this one."""
    wrong = request_of.model_copy(update={"settings": request_of.settings.model_copy(update={"resolution": 40})})
    monkeypatch.setattr(sys, "argv", ["launch", wrong.model_dump_json()])
    monkeypatch.setattr("mild.training.launch._await_end_of_input", lambda ended: None)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert "resolution: 40 must be a multiple of 16" in json.loads(line)["error"]


def test_another_vae_dataset_format_or_other_views_are_encoded_anew(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"root": "r", "work": "w", "dataset": "d", "base": "b"}

    def key(digest: str = "1", vae: str = "1", **changes: Any) -> str:
        settings = TrainRecipe.load(recipe, {"train.cached_views": 2} | changes)
        return LatentsJob(**places, dataset_digest=digest, vae_digest=vae, recipe=settings).key()

    assert key() == key(**{"train.steps": 9, "train.sma_learning_rate": 1.0, "configurations": {"composite": 2.0}})
    others = [{"train.seed": 1}, {"train.cached_views": 3}, {"train.flip": 0.5}, {"configurations": {"real": 1.0}}]
    keys = [key(), key(digest="2"), key(vae="2"), *(key(**changes) for changes in others)]
    monkeypatch.setattr(flows.train, "LATENTS_FORMAT", LATENTS_FORMAT + 1)
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_another_base_or_dataset_is_trained_anew(recipe: str) -> None:
    settings = TrainRecipe.load(recipe)
    places = {"root": "r", "work": "w", "dataset": "d", "base": "b", "recipe": settings}
    digests = {"dataset_digest": "1", "base_digest": "1", "start_from_digest": "1"}
    key = TrainJob(**places, **digests).key()
    assert key == TrainJob(**{**places, "root": "other"}, **digests).key()
    for name in digests:
        assert key != TrainJob(**places, **(digests | {name: "2"})).key()


@pytest.mark.usefixtures("prefect_server")
def test_the_flow_shows_values_and_sample_pictures_as_artifacts(
    drawn_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training itself is a stand-in that tells of four steps and draws after the second and the last."""
    output, drawn = tmp_path / "adapters", {2: "red", 4: "blue"}
    recipe = tmp_path / "train.yaml"
    recipe.write_text(yaml.safe_dump({"base": "some/base", "train": {"steps": 4, "samples_every": 2, "log_every": 1}}))
    made: list[tuple[str, Any]] = []
    for module, kind in ((flows.pages, "image"), (flows.train, "table")):
        create = getattr(module, f"create_{kind}_artifact")

        def counted(data: Any, create: Any = create, **options: Any) -> Any:
            made.append((options["key"], data))
            return create(data, **options)

        monkeypatch.setattr(module, f"create_{kind}_artifact", counted)

    def launch(request: TrainRequest, log: Any, *how: Any) -> None:
        for step in range(1, 5):
            log(step, {"loss/total": 1 / step, "memory/peak_gib": 2.0})
            if step in drawn:
                place = tmp_path / f"adapters.work/samples/step-{step:06d}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 30), drawn[step]).save(place)
        output.mkdir()
        (output / "loss.csv").write_text("step,loss\n1,1.0\n")
        (output / "mild.json").write_text('{"set_aside": ""}')

    monkeypatch.setattr(flows.train, "launch", launch)
    train(str(recipe), drawn_dataset, str(output))
    values = [data for key, data in made if key == artifact_key("train-values", str(output))]
    assert len(values) == 4
    assert values[-1] == [{"name": "loss/total", "value": "0.25"}, {"name": "memory/peak_gib", "value": "2"}]
    pictures = [data for key, data in made if key == artifact_key("train-samples", str(output))]
    for url, colour in zip(pictures, ["red", "blue"], strict=True):
        kind, _, data = url.partition(";base64,")
        assert kind == "data:image/jpeg"
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
        assert np.abs(shown - np.asarray(Image.new("RGB", (40, 30), colour))).max() < 5
    kept = Artifact.get(artifact_key("train-samples", str(output)))
    assert kept is not None and kept.data == pictures[-1]  # type: ignore[union-attr]


@pytest.mark.process
def test_the_losses_are_all_there(undisturbed: Path) -> None:
    with (undisturbed / "loss.csv").open() as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))


def test_how_adapters_that_are_trained_further_erase_is_known_before_a_result_is_looked_for(
    drawn_dataset: str, tmp_path: Path
) -> None:
    """What is not set is theirs; to set the default is to ask for something else."""
    recipe = str(tmp_path / "recipe.yaml")
    Path(recipe).write_text(f"train: {{start_from: {NANO_ADAPTERS}}}")
    theirs = check_train(recipe, drawn_dataset, str(tmp_path / "out")).train
    assert (theirs.inference_steps, theirs.inference_resolution) == (1, 256)
    given = TrainRecipe.model_validate({"train": {"start_from": NANO_ADAPTERS}})  # as Prefect's form gives it
    assert check_train(given, drawn_dataset, str(tmp_path / "out")).train == theirs
    told = check_train(recipe, drawn_dataset, str(tmp_path / "out"), {"train.inference_steps": 25}).train
    assert told.inference_steps == 25
    assert told.determines() != theirs.determines()
