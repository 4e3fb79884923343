"""What deployments travel with: an image, a clone, or what is installed."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.deployments.steps.core import run_steps

from dataset_tools.errors import UserError
from flows.commands.deploy import deploy
from flows.deployment import DEPLOYED, POOLS, cloned_code, installed_code

ROOT = Path(__file__).parents[2]
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
IMAGE = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines()]
"""Words of the lines of the Dockerfile."""


def test_installed_code_holds_the_flows_and_recipes_of_all_deployments() -> None:
    folder = Path(installed_code()["directory"])
    for deployment in DEPLOYMENTS:
        assert (folder / deployment["entrypoint"].partition(":")[0]).is_file()
        assert (folder / deployment["parameters"].get("settings", ".")).exists()
        assert deployment["work_pool"]["name"] in POOLS
        assert deployment["parameters"]["output"].startswith("{{ $MILD_DATA }}/")
    flows = {deployment["entrypoint"].partition(":")[2].replace("_", "-") for deployment in DEPLOYMENTS}
    assert flows == set(DEPLOYED)


@pytest.mark.process
@pytest.mark.usefixtures("prefect_server")
def test_a_run_clones_the_branch_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        own = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        subprocess.run(["git", *own, *words], cwd=tmp_path / "there", check=True)

    (tmp_path / "there").mkdir()
    git("init", "--quiet", "--initial-branch", "main")
    for branch in ("main", "other"):
        git("checkout", "--quiet", "-B", branch)
        (tmp_path / "there/branch").write_text(branch)
        git("add", ".")
        git("commit", "--quiet", "--message", branch)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made = asyncio.run(run_steps(cloned_code((tmp_path / "there").as_uri(), "main")))
    assert Path(made["directory"], "branch").read_text() == "main"


@pytest.mark.process
def test_the_image_copies_all_that_its_command_of_the_makefile_needs(tmp_path: Path) -> None:
    """By make itself, which stops where a prerequisite is missing, and by what the package's metadata name."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    for _, *sources, _ in (words for words in IMAGE if words[:1] == ["COPY"]):
        for source in sources:
            assert source not in ignored
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, tmp_path / source)
    [(_, make, target)] = [words for words in IMAGE if words[:2] == ["RUN", "make"]]
    done = subprocess.run([make, "--dry-run", target], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--constraint constraints.txt --editable" in done.stdout, done.stderr

    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    named = [project["project"]["readme"], *project["project"]["license-files"]]
    named += [name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    assert all((tmp_path / name).exists() for name in named)
    (command,) = [words[1:] for words in IMAGE if words[:1] == ["CMD"]]
    assert yaml.safe_load(" ".join(command))[-1] in POOLS


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"branch": "main"}, "--branch is of a --repository"),
        (
            {"repository": "https://oauth2:ghp_0123456789@host/o/r.git"},
            "--repository https://.*host/o/r.git carries a pass",
        ),
        ({"data": "s3://bucket/data"}, "can only be on a local disk"),
        ({}, r"there is no prefect\.yaml here"),
    ],
)
def test_what_cannot_be_deployed_is_said_before_anything_is_created(
    options: dict[str, str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "data" not in options:
        monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flows.commands.deploy.prepare_prefect", lambda verbose: None)
    monkeypatch.setattr("prefect.settings.PREFECT_API_URL.value", lambda: "http://127.0.0.1:1/api")
    with pytest.raises(UserError, match=complaint):
        deploy(**options)
