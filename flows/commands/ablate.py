"""``mild ablate``."""

from __future__ import annotations

from typing import Annotated

import typer

from dataset_tools.errors import UserError
from flows.commands.evaluate import show_evaluation
from flows.commands.prefect_server import prepare_prefect
from flows.commands.terminal import Changes, Verbose, parsed, say


def ablate(
    train_settings: Annotated[str, typer.Argument(help="YAML file of a training recipe, of the full model.")],
    evaluate_settings: Annotated[str, typer.Argument(help="YAML file of an evaluation recipe.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Folder or URL of the dataset to train on.")],
    judged_on: Annotated[
        str, typer.Option("--judged-on", help="Folder or URL of the dataset to judge on, where it is another.")
    ] = "",
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of all adapters and the report.")] = (
        "build/ablation"
    ),
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds of training, with commas between.")] = "0,1,2",
    set_: Changes = None,
    verbose: Verbose = False,
) -> None:
    """Train MILD without each of its parts (tables 2 and 6), and compare; --set changes the training of all."""
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds {seeds}: give whole numbers with commas between, such as 0,1,2") from None
    prepare_prefect(verbose)
    from flows.ablate import ablate as ablate_flow
    from flows.ablate import check_ablate

    changes = parsed(set_)
    check_ablate(train_settings, evaluate_settings, dataset, output, numbers, judged_on, changes)
    result = ablate_flow(train_settings, evaluate_settings, dataset, output, numbers, judged_on, changes)
    show_evaluation(result["summary"])
    say(f"report in {result['report']}")
