"""The flow ``ablate``: each rung of tables 2 and 6, and of what goes beyond them, is trained with several seeds, and
all are judged on one page, each against the base and against the rung below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import flow

from dataset_tools.errors import UserError
from dataset_tools.storage import local_place
from flows.evaluate import check_evaluate, evaluate
from flows.evaluation_report import BEFORE
from flows.names import flow_run_name
from flows.train import TrainRecipe, check_train, train
from mild.evaluation.settings import EvaluateSettings

NO_HMG, NO_SMA, NO_EXTENTS = {"train.mild.hmg": None}, {"train.mild.sma": False}, {"train.mild.extents": None}
RUNGS: dict[str, tuple[str, dict[str, Any]]] = {
    "backbone": ("base", {**NO_HMG, **NO_SMA, **NO_EXTENTS}),
    "hmg-pose": ("backbone", {"train.mild.hmg.cues": ["pose"], **NO_SMA, **NO_EXTENTS}),
    "hmg-parsing": ("backbone", {"train.mild.hmg.cues": ["parsing"], **NO_SMA, **NO_EXTENTS}),
    "hmg": ("backbone", {**NO_SMA, **NO_EXTENTS}),
    "sma": ("backbone", {**NO_HMG, **NO_EXTENTS}),
    "full": ("hmg", NO_EXTENTS),
    "sma-unconstrained": ("full", {"train.mild.sma_constraints": False, **NO_EXTENTS}),
    "extents": ("full", {}),
}
"""Rows of table 6 after the first, SMA without its constraints, and what goes beyond the paper: of each the rung below,
and what is set otherwise than the training recipe says. Each is trained without the parts that it lacks. The last is
left out where the recipe has no extents."""
SHUFFLED = "full-shuffled-cues"
"""Not trained: the rung ``full``, given the cues of other pictures."""


@flow(name="ablate", flow_run_name=flow_run_name, persist_result=False)
def ablate(
    train_settings: TrainRecipe | str,
    evaluate_settings: EvaluateSettings | str,
    dataset: str,
    output: str,
    seeds: Sequence[int] = (0, 1, 2),
    judged_on: str = "",
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train every rung with every seed, and compare them with the methods of an evaluation recipe but its MILD.

    Args:
        train_settings: recipe of the full model, or the place of a YAML file of it.
        evaluate_settings: `EvaluateSettings`, or the place of a YAML file of them.
        dataset: folder or URL of a built dataset, to train on.
        output: local folder, for ``RUNG-SEED`` (adapters) and ``evaluation``.
        seeds: of training.
        judged_on: folder or URL of the dataset to judge on; empty: that which is trained on.
        changes: training settings to change in all rungs, dotted name to value.

    Returns:
        What the flow ``evaluate`` returns. In its tables each rung is an arm: the mean over its seeds, with an interval
        over seeds and pictures.

    Raises:
        UserError: as the flows ``train`` and ``evaluate``; or a seed is named twice.
    """
    root, rungs = check_ablate(train_settings, evaluate_settings, dataset, output, seeds, judged_on, changes)
    for rung in rungs:
        for seed in seeds:
            train(train_settings, dataset, f"{root}/{rung}-{seed}", _changed(changes, rung, seed))
    chosen, adapters = {"methods": _judged(evaluate_settings, root, rungs, seeds)}, f"{root}/full-{seeds[0]}"
    return evaluate(evaluate_settings, judged_on or dataset, adapters, f"{root}/evaluation", chosen, BEFORE)


def _changed(changes: dict[str, Any] | None, rung: str, seed: int) -> dict[str, Any]:
    """What a rung's training with a seed sets otherwise than the training recipe."""
    return {**(changes or {}), **RUNGS[rung][1], "train.seed": seed}


def _judged(
    evaluate_settings: EvaluateSettings | str, root: str, rungs: Sequence[str], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """The methods of an evaluation recipe but its MILD, every rung with every seed, and the full one with others'
    cues."""
    methods: list[dict[str, Any]] = [
        method.model_dump(mode="json")
        for method in EvaluateSettings.load(evaluate_settings).methods
        if method.kind != "mild"
    ]
    # An evaluation may do without the base.
    known = {*rungs, *(method["name"] for method in methods)}

    def judge(arm: str, seed: int, below: str, **how: Any) -> None:
        named = {"name": f"{arm}-{seed}", "arm": arm, "below": below if below in known else ""}
        methods.append({"kind": "mild", **named, **how})

    for rung in rungs:
        for seed in seeds:
            judge(rung, seed, RUNGS[rung][0], adapters=f"{root}/{rung}-{seed}")
    for seed in seeds:
        judge(SHUFFLED, seed, "full", adapters=f"{root}/full-{seed}", shuffled_cues=True)
    return methods


def check_ablate(
    train_settings: TrainRecipe | str,
    evaluate_settings: EvaluateSettings | str,
    dataset: str,
    output: str,
    seeds: Sequence[int],
    judged_on: str = "",
    changes: dict[str, Any] | None = None,
) -> tuple[str, list[str]]:
    """The output, and which of `RUNGS` there are, where what `ablate` is given can be used; leaves nothing behind.

    Raises:
        UserError: it cannot, or the training recipe lacks a part of the full model.
    """
    root = local_place(output, "adapters")
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"seeds are {', '.join(map(str, seeds)) or 'none'}: name one or more, each once")
    if "train.seed" in (changes or {}):
        raise UserError("train.seed: the seeds of an ablation are those of seeds (--seeds); leave it out")
    different: dict[str, str] = {}

    def checked(rung: str, seed: int) -> TrainRecipe:
        return check_train(train_settings, dataset, f"{root}/{rung}-{seed}", _changed(changes, rung, seed))

    for rung in RUNGS:
        different.setdefault(checked(rung, seeds[0]).digest(), rung)
    rungs = list(different.values())
    if same := [rung for rung in RUNGS if rung not in (*rungs, "extents")]:
        raise UserError(
            f"the training recipe lacks a part of the full model: {', '.join(same)} would be trained like other rungs; "
            "give it hmg with both cues, sma and its constraints"
        )
    for rung in rungs:
        for seed in seeds[1:]:
            checked(rung, seed)
    chosen = {"methods": _judged(evaluate_settings, root, rungs, seeds)}
    check_evaluate(evaluate_settings, judged_on or dataset, "", f"{root}/evaluation", chosen)
    return root, rungs
