"""``mild train``."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.prefect_server import prepare_prefect
from flows.commands.terminal import Changes, Verbose, parsed, say


def train(
    settings: Annotated[str, typer.Argument(help="YAML file of a training recipe.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Folder or URL of a built dataset.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the adapters.")] = "build/adapters",
    set_: Changes = None,
    verbose: Verbose = False,
) -> None:
    """Train adapters on a dataset."""
    prepare_prefect(verbose)
    from flows.train import check_train
    from flows.train import train as train_flow

    changes = parsed(set_)
    check_train(settings, dataset, output, changes)
    result = train_flow(settings, dataset, output, changes)
    if result["set_aside"]:
        say(result["set_aside"])
    say(f"adapters in {result['adapters']}{' (cached)' if result['cached'] else ''}, base {result['base']}")
