"""The command line: what it prints, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dataset_tools.errors import UserError
from flows import cli
from flows.evaluate import EvaluateRecipe
from flows.pipeline import recipe_path
from flows.settings import BuildSettings
from flows.train import TrainRecipe
from mild.nano import ADAPTERS, place_of


def mild(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run([sys.executable, "-m", "flows.cli", *arguments], capture_output=True, text=True)


def test_help_names_every_command_without_loading_prefect_or_torch() -> None:
    """Asking for help is quick, because nothing heavy is imported for it."""
    program = (
        "import sys; from flows.cli import app; app(['--help'], standalone_mode=False); print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    text, _, modules = done.stdout.rpartition("\n['")
    for command in ("build", "train", "evaluate", "pretrain", "quickstart", "erase", "recompose", "inspect", "verify"):
        assert f" {command} " in text
    loaded = set(modules.split("', '"))
    assert not loaded & {"prefect", "torch", "cv2", "duckdb"}


def test_a_folder_that_holds_no_dataset_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """verify and inspect say what is missing."""
    for command in ("verify", "inspect"):
        done = mild(command, str(tmp_path))
        assert done.returncode == 2
        assert "manifest.json" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


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
    with pytest.raises(UserError, match="folder, openimages, sample"):
        recipe_path("build", "smaple")


@pytest.mark.parametrize("name", ["sample", "openimages", "folder"])
def test_recipes_of_the_package_are_valid(name: str) -> None:
    """Each loads through the same check as a user's."""
    assert BuildSettings.load(recipe_path("build", name)).source.kind == name


def test_the_papers_recipe_has_the_papers_numbers() -> None:
    """Rank 16, alpha 16, rate 1e-6, 4 samples a step, 20,000 steps at 512 px, the foreground from step 8,000 on."""
    recipe = TrainRecipe.load(recipe_path("train", "paper"))
    train, lora = recipe.train, recipe.train.mild.lora
    assert (lora.rank, lora.alpha, train.learning_rate, train.batch_size) == (16, 16, 1e-6, 4)
    assert (train.steps, train.resolution, train.warm_up.start) == (20_000, 512, 8_000)
    assert recipe.configurations == {"real": 1, "composite": 1}


def test_the_adapters_of_the_package_are_those_of_their_recipe() -> None:
    recipe = TrainRecipe.load(recipe_path("train", "nano"))
    saved = json.loads((Path(place_of(ADAPTERS)) / "mild.json").read_text())
    assert (saved["base"], saved["settings"]) == (recipe.base, recipe.train.model_dump(mode="json"))


def test_the_sample_trains_for_minutes_not_an_hour() -> None:
    """The quickstart's recipe is short."""
    assert TrainRecipe.load(recipe_path("train", "sample")).train.steps <= 150
    assert EvaluateRecipe.load(recipe_path("evaluate", "sample")).evaluate.samples <= 12
