"""The flow ``ablate``, with the flows that it calls put out of the way: what is trained, and what is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dataset_tools.errors import UserError
from flows.ablate import ablate, check_ablate
from flows.pipeline import recipe_path
from flows.train import TrainRecipe
from mild.evaluation.methods.mild import MILDMethod
from mild.evaluation.settings import EvaluateSettings
from mild.settings import MildSettings

RECIPES = recipe_path("train", "rungs"), recipe_path("evaluate", "rungs")
PARTS = {
    "backbone": (False, (), False, False),
    "hmg-pose": (False, ("pose",), False, False),
    "hmg-parsing": (False, ("parsing",), False, False),
    "hmg": (False, ("pose", "parsing"), False, False),
    "sma": (True, (), True, False),
    "full": (True, ("pose", "parsing"), True, False),
    "sma-unconstrained": (True, ("pose", "parsing"), False, False),
    "extents": (True, ("pose", "parsing"), True, True),
}
"""SMA, cues of HMG, constraints of SMA, and extents."""
BELOW = {
    **{"backbone": "base", "hmg-pose": "backbone", "hmg-parsing": "backbone", "hmg": "backbone", "sma": "backbone"},
    **{"full": "hmg", "sma-unconstrained": "full", "extents": "full", "full-shuffled-cues": "full"},
}


def parts(mild: MildSettings) -> tuple[bool, tuple[str, ...], bool, bool]:
    constrained = mild.sma and mild.sma_constraints
    return mild.sma, () if mild.hmg is None else mild.hmg.cues, constrained, mild.extents is not None


def test_every_rung_is_trained_with_every_seed_and_held_against_the_one_below(
    drawn_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, TrainRecipe] = {}
    judged: list[Any] = []

    def train(settings: str, dataset: str, output: str, changes: dict[str, Any]) -> None:
        trained[Path(output).name] = TrainRecipe.load(settings, changes)

    monkeypatch.setattr("flows.ablate.train", train)
    monkeypatch.setattr("flows.ablate.evaluate", lambda *given: judged.append(given) or {})
    ablate.fn(*RECIPES, drawn_dataset, str(tmp_path / "out"), (3, 5), changes={"train.steps": 7})
    assert {name: (parts(one.train.mild), one.train.seed, one.train.steps) for name, one in trained.items()} == {
        f"{rung}-{seed}": (own, seed, 7) for rung, own in PARTS.items() for seed in (3, 5)
    }
    ((settings, dataset, adapters, _, chosen, _),) = judged
    assert (dataset, Path(adapters).name) == (drawn_dataset, "full-3")
    recipe = EvaluateSettings.load(settings, chosen)
    ours = [method for method in recipe.methods if isinstance(method, MILDMethod)]
    assert {method.arm: method.below for method in ours} == BELOW
    assert len(ours) == 2 * len(BELOW) and recipe.compared_with() == "base"
    for method in ours:
        shuffled = method.arm == "full-shuffled-cues"
        assert method.shuffled_cues == shuffled
        assert Path(method.adapters).name == method.name.replace("-shuffled-cues", "") in trained


def test_a_recipe_that_is_not_of_the_full_model_is_told_of(drawn_dataset: str, tmp_path: Path) -> None:
    given = (*RECIPES, drawn_dataset, str(tmp_path / "out"), (0,), "")
    _, rungs = check_ablate(*given, {"train.mild.extents": None})
    assert rungs == [rung for rung in PARTS if rung != "extents"]
    with pytest.raises(UserError, match="full model: sma, full would be trained like other rungs"):
        check_ablate(*given, {"train.mild.sma": False})


@pytest.mark.parametrize(
    "values", [{"baseline": "mild"}, {"methods": ["base", {"kind": "telea", "name": "full-0"}, "mild"]}]
)
def test_a_recipe_that_the_rungs_do_not_fit_is_told_of_before_they_are_trained(
    values: dict[str, Any], drawn_dataset: str, tmp_path: Path
) -> None:
    recipe = EvaluateSettings.load(RECIPES[1]).model_dump() | values
    with pytest.raises(UserError, match=r"baseline|twice"):
        check_ablate(RECIPES[0], EvaluateSettings.check(recipe, origin="t"), drawn_dataset, str(tmp_path / "o"), (0,))


def test_a_seed_that_cannot_be_trained_with_is_told_of_before_others_are(drawn_dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.seed"):
        check_ablate(*RECIPES, drawn_dataset, str(tmp_path / "out"), (0, -1))


def test_somebodys_folder_in_the_place_of_a_later_training_is_told_of_before_the_first(
    drawn_dataset: str, tmp_path: Path
) -> None:
    (tmp_path / "out/backbone-1").mkdir(parents=True)
    (tmp_path / "out/backbone-1/notes.txt").touch()
    with pytest.raises(UserError, match="backbone-1 holds something else"):
        check_ablate(*RECIPES, drawn_dataset, str(tmp_path / "out"), (0, 1))


def test_a_seed_among_the_changes_would_do_nothing_and_is_refused(drawn_dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.seed"):
        check_ablate(*RECIPES, drawn_dataset, str(tmp_path / "out"), (0,), "", {"train.seed": 7})
