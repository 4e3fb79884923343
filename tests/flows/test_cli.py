"""The command line: what it prints, and its exit codes."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_tools.errors import UserError
from dataset_tools.shards import ShardDataset
from flows import cli
from flows.commands.build import show_build
from flows.commands.terminal import new_console
from flows.pipeline import recipe_path
from flows.settings import BuildSettings, Threads
from flows.train import TrainRecipe
from mild.bases import NANO_ADAPTERS, place_of
from mild.evaluation.settings import EvaluateSettings
from mild.settings import MildSettings, TrainSettings


def here(*arguments: str, width: int = 80) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, standard output and standard error, both of them files."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["mild", *arguments])
        patch.setenv("COLUMNS", str(width))
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return int(stop.value.code or 0), out.getvalue(), err.getvalue()


@pytest.mark.process
def test_help_names_every_command_without_loading_prefect_or_torch() -> None:
    """Asking for help is quick, because nothing heavy is imported for it."""
    program = (
        "import sys; from flows.cli import app; app(['--help'], standalone_mode=False); print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    text, _, modules = done.stdout.rpartition("\n['")
    commands = (
        "build",
        "train",
        "evaluate",
        "ablate",
        "judge",
        "rate",
        "pretrain",
        "quickstart",
        "deploy",
        "mask",
        "erase",
        "recompose",
        "inspect",
        "verify",
    )
    for command in commands:
        assert f" {command} " in text
    loaded = set(modules.split("', '"))
    assert not loaded & {"prefect", "torch", "cv2", "duckdb"}


def test_a_folder_that_holds_no_dataset_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """verify and inspect say what is missing."""
    for command in ("verify", "inspect"):
        code, _, err = here(command, str(tmp_path))
        assert code == 2
        assert "manifest.json" in err
        assert len(err.strip().splitlines()) == 1


def test_brackets_in_a_complaint_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """A path is not markup."""

    def complain() -> None:
        raise UserError("no file [bold]here[/bold].csv")

    before = cli.app
    try:
        cli.app = complain  # type: ignore[assignment]
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        cli.app = before
    assert stop.value.code == 2
    assert "no file [bold]here[/bold].csv" in capsys.readouterr().err


def test_an_unknown_recipe_names_those_that_there_are() -> None:
    """The names come from the package's own folder."""
    with pytest.raises(UserError, match=r"known are ade20k, coco, folder, .*, sample, video, weblist$"):
        recipe_path("build", "smaple")


@pytest.mark.parametrize("name", ["sample", "openimages", "folder", "photographs", "weblist"])
def test_recipes_of_the_package_are_valid(name: str) -> None:
    """Each loads through the same check as a user's."""
    kind = {"photographs": "folder"}.get(name, name)
    assert BuildSettings.load(recipe_path("build", name)).source.kind == kind


def test_the_papers_recipe_has_the_papers_numbers() -> None:
    """Rank 16, alpha 16, rate 1e-6, 4 samples a step, 20,000 steps at 512 px, the foreground from step 8,000 on."""
    recipe = TrainRecipe.load(recipe_path("train", "paper"))
    train, lora = recipe.train, recipe.train.mild.lora
    assert (lora.rank, lora.alpha, train.learning_rate, train.batch_size) == (16, 16, 1e-6, 4)
    assert (train.steps, train.resolution, train.warm_up.start) == (20_000, 512, 8_000)
    assert recipe.configurations == {"real": 1, "composite": 1}


def test_the_adapters_of_the_package_are_those_of_their_recipe() -> None:
    recipe = TrainRecipe.load(recipe_path("train", "nano-further"))
    saved = json.loads((Path(place_of(NANO_ADAPTERS)) / "mild.json").read_text())
    assert saved["base"] == recipe.base
    assert TrainSettings.check(saved["settings"], origin="mild.json").determines() == recipe.train.determines()
    first = TrainRecipe.load(recipe_path("train", "nano")).train
    assert MildSettings.check(saved["mild"], origin="mild.json") == first.mild


def test_the_sample_trains_for_minutes_not_an_hour() -> None:
    """The quickstart's recipe is short."""
    assert TrainRecipe.load(recipe_path("train", "sample")).train.steps <= 150
    judged = EvaluateSettings.load(recipe_path("evaluate", "sample")).datasets.values()
    assert sum(dataset.samples or 1000 for dataset in judged) <= 12


def test_fresh_composites_without_composites_are_refused() -> None:
    with pytest.raises(UserError, match=r"stand in the place of composites: name composite in configurations$"):
        TrainRecipe.check({"configurations": {"paired": 1}, "train": {"fresh_composites": {}}}, origin="test")


FOLDERS = st.text(st.sampled_from("ab #%[]~+:*?é雪(/)"), min_size=1, max_size=12).filter(
    lambda name: not name.startswith("/") and "." not in name
)
"""Relative folders of the characters that mean something to a shell, a URL, a pattern or a printer."""


@pytest.mark.slow
@settings(max_examples=8)
@given(FOLDERS)
def test_a_dataset_in_any_folder_is_found_whole_and_its_path_printed_as_it_is(drawn_dataset: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above, name, "[red]d[/]")
        shutil.copytree(drawn_dataset, folder)
        for root in (str(folder), f"{folder}/", folder.as_uri(), os.path.relpath(folder)):
            assert len(ShardDataset(root, "composite", "train")) == 6
        assert here("verify", folder.as_uri())[0] == 0
        code, out, _ = here("inspect", str(folder), "--picture", f"{folder}/sheet.png", "--each", "1")
        assert (code, out.splitlines()[-1]) == (0, f"contact sheet in {folder}/sheet.png")
        (folder / "mine.png").write_bytes((folder / "sheet.png").read_bytes()[:-100])
        (folder / "mine.jpg").write_bytes(b"my only photograph")
        code, _, err = here("inspect", str(folder), "--picture", f"{folder}/mine.jpg")
        assert (code, (folder / "mine.jpg").read_bytes()) == (2, b"my only photograph")
        assert "mine.jpg is there already and no contact sheet" in err
        shard = (folder / "composite/train-000000.tar").read_bytes()
        for damaged in (shard[:1000], b"\0" * len(shard), None):
            (folder / "composite/train-000000.tar").unlink()
            if damaged is not None:
                (folder / "composite/train-000000.tar").write_bytes(damaged)
            code, _, err = here("inspect", str(folder), "--picture", f"{folder}/sheet.png")
            assert code == 2 and "is damaged, and mild verify tells where" in err
        (folder / "composite/train-000000.tar").write_bytes(shard)
        shutil.copy(folder / "composite/train-000000.tar", folder / "composite/train-000007.tar")
        code, out, _ = here("verify", str(folder))
        assert code == 1 and "composite/train-000007.tar: is not in the manifest" in out.splitlines()
        (folder / "manifest.json").unlink()
        code, _, err = here("verify", str(folder))
        assert code == 2 and err.startswith(f"error: {folder} holds no dataset: ")


def a_recipe(folder: Path, **values: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("command", ["train", "evaluate", "pretrain", "quickstart"])
@pytest.mark.parametrize("output", ["s3://bucket/x", "memory://x", "nowhere://x", "file:x", "/proc/x", ""])
def test_an_output_that_cannot_be_used_is_one_line_before_anything_runs(
    drawn_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, output: str
) -> None:
    """No flow is called, so that no server is started for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prefect.Flow.__call__", lambda *_, **__: pytest.fail("the flow ran"))
    recipe = a_recipe(tmp_path)
    arguments = {
        "train": [recipe, "-d", drawn_dataset],
        "evaluate": [recipe, "-d", drawn_dataset, "-a", NANO_ADAPTERS],
        "pretrain": [recipe],
        "quickstart": [],
    }[command]
    code, _, err = here(command, *arguments, "-o", output)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("output", ["s3://bucket/x.png", "memory://x.png", "nowhere://x.png"])
def test_results_of_erasing_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert here("erase", "p.jpg", "--mask", "m.png", "-o", output)[0] == 2
    assert here("recompose", "layers", "--keep", "1", "-o", output)[0] == 2
    assert not list(tmp_path.iterdir())


def test_a_file_url_and_a_tilde_are_folders_for_training_and_the_base(
    drawn_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flow itself is a stand-in that tells what it was asked for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my base").mkdir()
    recipe = a_recipe(tmp_path, base="~/my base")
    assert TrainRecipe.load(recipe).base == str(tmp_path / "my base")
    assert TrainRecipe.load(recipe, {"base": "owner/name"}).base == "owner/name"
    assert TrainRecipe.load(recipe, {"base": (tmp_path / "my base").as_uri()}).base == str(tmp_path / "my base")
    code, _, err = here("train", "~/recipe.yaml", "-d", f"file://{drawn_dataset}", "-o", "~/recipe.yaml")
    assert (code, err) == (2, f"error: output {tmp_path}/recipe.yaml cannot be written: {recipe} is a file\n")


USERS = {
    "no such command": (["trian"], {}),
    "no such option": (["build", "--sauce", "x"], {}),
    "a number that is none": (["inspect", "--each", "many", "."], {}),
    "no settings": (["pretrain", "gone.yaml"], {}),
    "settings that are a folder": (["pretrain", "."], {}),
    "settings that are no YAML": (["pretrain", "broken.yaml"], {}),
    "settings that are no text": (["pretrain", "binary.yaml"], {}),
    "a change that is no YAML": (["pretrain", "good.yaml", "--set", "scenes=[1"], {}),
    "a change of another type": (["pretrain", "good.yaml", "--set", "scenes=many"], {}),
    "a change that is no number": (["pretrain", "good.yaml", "--set", "pretrain.unet.learning_rate=.nan"], {}),
    "a server that is gone": (["pretrain", "good.yaml"], {"PREFECT_API_URL": "http://127.0.0.1:9/api"}),
    "a server that is none": (["pretrain", "good.yaml"], {"PREFECT_API_URL": "nonsense"}),
    "a home that cannot be": (["pretrain", "good.yaml"], {"HOME": "/proc/none", "PREFECT_HOME": None}),
    "a wrong setting of Prefect": (["pretrain", "good.yaml"], {"PREFECT_API_ENABLE_HTTP2": "perhaps"}),
}


@pytest.mark.parametrize(
    "fault",
    [pytest.param(name, marks=[pytest.mark.process] if changed else []) for name, (_, changed) in USERS.items()],
)
def test_what_the_user_must_mend_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    (tmp_path / "good.yaml").write_text("scenes: 3\n")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: {")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    monkeypatch.chdir(tmp_path)
    arguments, changed = USERS[fault]
    if changed:  # Prefect reads its settings once in a process
        environment = {name: value for name, value in os.environ.items() if name not in changed}
        environment |= {name: value for name, value in changed.items() if value is not None}
        environment["PYTHONPATH"] = f"{Path(cli.__file__).parents[1]}{os.pathsep}{environment['PYTHONPATH']}"
        command = [sys.executable, "-m", "flows.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code, out, err = here(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/a [b]"), "/a [b]: Disk quota exceeded: make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: Read-only file system"),
        (PermissionError("Access Denied"), "Access Denied"),
        (ValueError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (ModuleNotFoundError("no", name="webdataset"), "the module webdataset is not installed; in the folder of"),
    ],
)
def test_refusals_of_the_system_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, line: str) -> None:
    def refuse() -> None:
        raise error

    monkeypatch.setattr(cli, "app", refuse)
    code, _, err = here()
    assert code == 2 and err.startswith(f"error: {line}") and err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.ECONNRESET, "reset"), KeyError("x"), ModuleNotFoundError(name="mild.x")]
)
def test_a_defect_of_this_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(type(error)):
        cli.main()


def test_threads_that_were_left_count_while_they_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """While they do, an interrupted program ends at once, and so would what else runs in its process."""
    monkeypatch.setattr(Threads, "_abandoned", [])
    end = threading.Event()
    with Threads(max_workers=1) as runner:
        assert runner._executor is not None
        runner._executor.submit(end.wait)
        runner.cancel_all()
    assert Threads.are_left_working()
    end.set()
    for thread in Threads._abandoned:
        thread.join()
    assert not Threads.are_left_working()


@pytest.mark.process
def test_a_process_ends_with_its_main_thread_whatever_threads_it_has_left() -> None:
    """As that of a deployment's run does, which no command of ours ends."""
    program = (
        "import threading; from flows.settings import Threads; begun = threading.Event()\n"
        "with Threads(max_workers=1) as runner:\n"
        "    runner._executor.submit(lambda: (begun.set(), threading.Event().wait()))\n"
        "    begun.wait()\n"
        "    runner.cancel_all()\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 1


def test_lines_of_what_is_no_terminal_are_not_broken(tmp_path: Path) -> None:
    summary = {"dataset": str(tmp_path / ("long " * 60)), "samples": 1, "shards": 1, "cached": 0}
    summary["rejected"] = {f"reason-{'x' * 150}": 3, "[red]": 1}
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        for module in ("terminal", "build"):
            patch.setattr(f"flows.commands.{module}.console", new_console())
        show_build(summary)
    lines = out.getvalue().splitlines()
    assert lines[0] == f"dataset {summary['dataset']}"
    for reason in summary["rejected"]:
        assert any(f"set aside or mended: {reason} " in line for line in lines)


@pytest.fixture
def prefect_home(prefect_database: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a command that starts a server of its own, with a database of its own."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    home = tmp_path_factory.mktemp("prefect")
    shutil.copy(prefect_database, home / "prefect.db")
    return {**outer, "PREFECT_HOME": str(home)}


@pytest.mark.process
def test_sigterm_ends_a_build_and_all_that_it_started(tmp_path: Path, prefect_home: dict[str, str]) -> None:
    """The temporary server and the threads that draw: nobody waits for them, and nobody is left."""
    command = [sys.executable, "-m", "flows.cli", "build", "--source", "sample", "-o", str(tmp_path / "dataset")]
    process = subprocess.Popen(
        command, env=prefect_home, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    drawing = tmp_path / "dataset.work"
    try:
        while process.poll() is None and not list(drawing.rglob("*.jpg")):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.05)
        servers = [child for child in psutil.Process(process.pid).children() if "uvicorn" in child.cmdline()]
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert (len(servers), process.returncode) == (1, 143), errors.decode()
        assert b"Traceback" not in errors
        assert not [child for child in servers if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        assert not any(is_of_session(other.pid, process.pid) for other in psutil.process_iter())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def is_of_session(number: int, leader: int) -> bool:
    """Whether a process that lives belongs to the session of another."""
    try:
        return os.getsid(number) == leader and psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


@pytest.mark.usefixtures("prefect_server")
def test_a_full_disk_in_a_step_of_a_flow_is_told_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fill(settings: object, folder: str, workers: int) -> None:
        calls.append(folder)
        raise OSError(errno.ENOSPC, "No space left on device", f"{folder}/000.png")

    monkeypatch.setattr("flows.pretrain_base.draw_pictures", fill)
    code, _, err = here("pretrain", a_recipe(tmp_path), "-o", str(tmp_path / "base"))
    assert (code, calls) == (2, [f"{tmp_path}/base.work/pictures"])
    assert err.splitlines()[-1].startswith(f"error: {calls[0]}/000.png: No space left on device: make room")
