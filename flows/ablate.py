"""The flow ``ablate``: each rung of tables 2 and 6 is trained, with several seeds, and all are judged on one page."""

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

RUNGS: dict[str, dict[str, Any]] = {
    "backbone": {"train.mild.hmg": None, "train.mild.sma": False},
    "hmg-without-parsing": {"train.mild.hmg.cues": ["pose"], "train.mild.sma": False},
    "hmg-without-pose": {"train.mild.hmg.cues": ["parsing"], "train.mild.sma": False},
    "hmg": {"train.mild.sma": False},
    "sma": {"train.mild.hmg": None},
    "full": {},
}
"""Rows of table 6 after the first: what is set otherwise than the training recipe says. Each is trained without the
parts that it lacks."""


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
        What the flow ``evaluate`` returns. In its tables each rung is an arm: the mean over its seeds.

    Raises:
        UserError: as the flows ``train`` and ``evaluate``; or a seed is named twice.
    """
    root = check_ablate(train_settings, evaluate_settings, dataset, output, seeds, judged_on, changes)
    methods: list[dict[str, Any]] = [
        method.model_dump(mode="json")
        for method in EvaluateSettings.load(evaluate_settings).methods
        if method.kind != "mild"
    ]
    for rung, without in RUNGS.items():
        for seed in seeds:
            adapters = f"{root}/{rung}-{seed}"
            train(train_settings, dataset, adapters, {**(changes or {}), **without, "train.seed": seed})
            methods.append({"kind": "mild", "name": f"{rung}-{seed}", "arm": rung, "adapters": adapters})
    chosen = {"methods": methods}
    return evaluate(
        evaluate_settings, judged_on or dataset, methods[-1]["adapters"], f"{root}/evaluation", chosen, BEFORE
    )


def check_ablate(
    train_settings: TrainRecipe | str,
    evaluate_settings: EvaluateSettings | str,
    dataset: str,
    output: str,
    seeds: Sequence[int],
    judged_on: str = "",
    changes: dict[str, Any] | None = None,
) -> str:
    """The output, where it and all else that `ablate` is given can be used; leaves nothing behind.

    Raises:
        UserError: they cannot.
    """
    root = local_place(output, "adapters")
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"seeds are {', '.join(map(str, seeds)) or 'none'}: name one or more, each once")
    for rung, without in RUNGS.items():
        check_train(train_settings, dataset, f"{root}/{rung}-{seeds[0]}", {**(changes or {}), **without})
    check_evaluate(evaluate_settings, judged_on or dataset, "", f"{root}/evaluation")
    return root
