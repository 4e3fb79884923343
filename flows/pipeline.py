"""The flow ``pipeline``: build-dataset, train and evaluate in a row, and what each part of MILD brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow

from dataset_tools.errors import UserError
from dataset_tools.storage import check_writable, local_place
from flows.ablate import ablate
from flows.build_dataset import build_dataset
from flows.evaluate import evaluate
from flows.evaluation_report import BEFORE
from flows.names import flow_run_name
from flows.train import train

RECIPES = Path(__file__).parent / "recipes"


def recipe_path(step: str, name: str) -> str:
    """Path of a recipe that comes with the package. Raises `UserError` naming those that there are."""
    path = RECIPES / f"{step}-{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem.removeprefix(f"{step}-") for p in RECIPES.glob(f"{step}-*.yaml")))
        raise UserError(f"there is no recipe {name!r} for {step}; known are {known}")
    return str(path)


@flow(name="pipeline", flow_run_name=flow_run_name, persist_result=False)
def pipeline(recipe: str, output: str, ablation: Sequence[int] = ()) -> dict[str, Any]:
    """Build the dataset, train on it, evaluate; whatever was done before is not done again.

    The evaluation says what got better or worse since the one that stood there.

    Args:
        recipe: name of the recipes to follow, such as ``sample``.
        output: local folder for ``dataset``, ``adapters``, ``evaluation`` and ``ablation``.
        ablation: seeds; each rung of tables 2 and 6 is trained with each of them and judged as well. Empty: none.

    Returns:
        What the flows return, by their names.

    Raises:
        UserError: there is no such recipe, or the output cannot be written; or as the flows.
    """
    check_pipeline(recipe, output)
    root = local_place(output, "adapters")
    dataset, adapters = f"{root}/dataset", f"{root}/adapters"
    train_settings, judging = recipe_path("train", recipe), recipe_path("evaluate", recipe)
    built = build_dataset(recipe_path("build", recipe), dataset)
    trained = train(train_settings, dataset, adapters)
    evaluated = evaluate(judging, dataset, adapters, f"{root}/evaluation", against=BEFORE)
    done = {"build": built, "train": trained, "evaluate": evaluated}
    if ablation:
        done["ablate"] = ablate(train_settings, judging, dataset, f"{root}/ablation", ablation)
    return done


def check_pipeline(recipe: str, output: str) -> None:
    """Raise `UserError` where there are no such recipes, or the output cannot be written; leaves nothing behind."""
    for step in ("build", "train", "evaluate"):
        recipe_path(step, recipe)
    check_writable(local_place(output, "adapters"))
