"""``mild pretrain``."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.prefect_server import prepare_prefect
from flows.commands.terminal import Changes, Verbose, parsed, say


def pretrain(
    settings: Annotated[str, typer.Argument(help="YAML file of a pretraining recipe.")],
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="BASE",
            help="Nano base to train further: a folder, a hub id, or mild-nano. Default: the recipe's, or none.",
        ),
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the base.")] = "build/base",
    set_: Changes = None,
    verbose: Verbose = False,
) -> None:
    """Train a very small base on the drawn world, from nothing or from another on; an hour or more on a laptop."""
    prepare_prefect(verbose)
    from flows.pretrain_base import check_pretrain, pretrain_base

    changes = parsed(set_) | ({} if from_ is None else {"base": from_})
    check_pretrain(settings, output, changes)
    result = pretrain_base(settings, output, changes)
    cached = f" (cached: {', '.join(result['cached'])})" if result["cached"] else ""
    say(f"base in {result['base']}{cached}")
