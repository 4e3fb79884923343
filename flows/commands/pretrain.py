"""``mild pretrain``."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.prefect_server import prepare_prefect
from flows.commands.terminal import Changes, Verbose, parsed, say


def pretrain(
    settings: Annotated[str, typer.Argument(help="YAML file of a pretraining recipe.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the base.")] = "build/base",
    set_: Changes = None,
    verbose: Verbose = False,
) -> None:
    """Train a very small base from nothing on the drawn world; an hour or more on a laptop."""
    prepare_prefect(verbose)
    from flows.pretrain_base import check_pretrain, pretrain_base

    changes = parsed(set_)
    check_pretrain(settings, output, changes)
    result = pretrain_base(settings, output, changes)
    cached = f" (cached: {', '.join(result['cached'])})" if result["cached"] else ""
    say(f"base in {result['base']}{cached}")
