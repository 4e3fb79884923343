"""The shape of the code: which module may import which, and that what texts name is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
PACKAGES = ("dataset_tools", "mild", "flows")
REFERENCE = re.compile(rf"`((?:{'|'.join(PACKAGES)})(?:\.\w+)+)`")
"""As docstrings, comments and pages name modules and what is in them."""
NO_CODE = {"mild.json", "mild.dataset.ready"}
"""A file and an event."""


def test_arrows_point_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages, the rooms of `mild`, no circles; only flows know Prefect; dataset_tools needs no torch."""
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_commits_are_checked_by_what_make_lint_runs() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlint:")[1].split("\n\n")[0]
    made = [line.removeprefix("\t$(BIN)/").removesuffix(" .") for line in recipe.splitlines()[1:]]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["entry"].removeprefix(".venv/bin/") for hook in hooks] == made


def _texts() -> Iterator[Path]:
    for folder in (*PACKAGES, "tests", "benchmarks"):
        yield from sorted((ROOT / folder).rglob("*.py"))
    yield from sorted(ROOT.glob("*.md"))
    yield ROOT / "pyproject.toml"


def test_every_reference_leads_somewhere() -> None:
    """One test for all files: there are hundreds."""
    names = {
        path.relative_to(ROOT).as_posix(): set(REFERENCE.findall(path.read_text(encoding="utf-8"))) for path in _texts()
    }
    assert sum(map(len, names.values())) > 100
    lost = {
        path: sorted(name for name in found - NO_CODE if not _leads_somewhere(name)) for path, found in names.items()
    }
    assert {path: found for path, found in lost.items() if found} == {}


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("mild.erasing", True),
        ("mild.erasing.regions", True),
        ("mild.erasing.regions.editable", True),
        ("mild.erasing.regions.MARGIN", True),
        ("mild.training.batches.Batch.image", True),
        ("mild.MILDPipeline", True),
        ("dataset_tools.storage.PlaceSetting", True),
        ("mild.regions", False),
        ("mild.erasing.regions.edible", False),
        ("mild.training.batches.Batch.hidden", False),
        ("mild.training.batches.Batch.image.more", False),
    ],
)
def test_a_reference_to_what_is_not_there_is_noticed(name: str, there: bool) -> None:
    assert _leads_somewhere(name) is there


def _leads_somewhere(name: str) -> bool:
    """Whether a dotted name is a module, or something that a module or a class in it defines or imports."""
    place, parts = ROOT, name.split(".")
    while parts and ((place / parts[0]).is_dir() or (place / f"{parts[0]}.py").is_file()):
        place /= parts.pop(0)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    body = _module(file).body
    for part in parts:
        found = [statement for statement in _all(body) if part in _defined(statement)]
        if not found:
            return False
        body = found[-1].body if isinstance(found[-1], ast.ClassDef) else []
    return True


@cache
def _module(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _all(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, those under ``if`` too (``if TYPE_CHECKING``), and a class's ``self.x = ...``."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            yield from _all(statement.body)
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            yield from _all(statement.body)


def _defined(statement: ast.stmt) -> set[str]:
    """Names that a statement gives to something."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    nodes = [node for target in targets if target is not None for node in ast.walk(target)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
