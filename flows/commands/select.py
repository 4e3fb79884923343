"""``mild select``."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.prefect_server import prepare_prefect
from flows.commands.terminal import Changes, Verbose, parsed, say


def select(
    settings: Annotated[str, typer.Argument(help="YAML file of a review recipe.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Folder or URL of a built dataset.")],
    adapters: Annotated[str, typer.Option("--adapters", "-a", help="Folder that training wrote, or hub id.")] = "",
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the list of pairs.")] = "build/chosen",
    set_: Changes = None,
    verbose: Verbose = False,
) -> None:
    """Let methods propose clean plates, wait until people have chosen (mild review), and list the chosen pairs."""
    prepare_prefect(verbose)
    from flows.select_plates import check_select_plates, select_plates

    changes = parsed(set_)
    check_select_plates(settings, dataset, adapters, output, changes)
    result = select_plates(settings, dataset, adapters, output, changes)
    for line in result["told"]:
        say(line)
    for method, count in result["methods"].items():
        say(f"{method}: {count}")
    for method, reason in result["not_run"].items():
        say(f"not run: {method}: {reason}")
    if result["without_proposal"]:
        say(f"{result['without_proposal']} pictures without any proposal")
    say(f"cached    {result['cached']} of {result['steps']} steps")
    say(f"pairs in {result['pairs']}")
