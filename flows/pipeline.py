"""The flow ``pipeline``: build-dataset, train and evaluate in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from dataset_tools.errors import UserError
from dataset_tools.storage import check_writable, local_place
from flows.build_dataset import build_dataset
from flows.evaluate import evaluate
from flows.train import train

RECIPES = Path(__file__).parent / "recipes"


def recipe_path(step: str, name: str) -> str:
    """Path of a recipe that comes with the package. Raises `UserError` naming those that there are."""
    path = RECIPES / f"{step}-{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem.removeprefix(f"{step}-") for p in RECIPES.glob(f"{step}-*.yaml")))
        raise UserError(f"there is no recipe {name!r} for {step}; known are {known}")
    return str(path)


@flow(name="pipeline", persist_result=False)
def pipeline(recipe: str, output: str) -> dict[str, Any]:
    """Build the dataset, train on it, evaluate; whatever was done before is not done again.

    Args:
        recipe: name of the recipes to follow, such as ``sample``.
        output: local folder for ``dataset``, ``adapters`` and ``evaluation``.

    Returns:
        What the three flows return, by their names.

    Raises:
        UserError: there is no such recipe, or the output cannot be written; or as the three flows.
    """
    check_pipeline(recipe, output)
    root = local_place(output, "adapters")
    dataset, adapters = f"{root}/dataset", f"{root}/adapters"
    built = build_dataset(recipe_path("build", recipe), dataset)
    trained = train(recipe_path("train", recipe), dataset, adapters)
    evaluated = evaluate(recipe_path("evaluate", recipe), dataset, adapters, f"{root}/evaluation")
    return {"build": built, "train": trained, "evaluate": evaluated}


def check_pipeline(recipe: str, output: str) -> None:
    """Raise `UserError` where there are no such recipes, or the output cannot be written; leaves nothing behind."""
    for step in ("build", "train", "evaluate"):
        recipe_path(step, recipe)
    check_writable(local_place(output, "adapters"))
