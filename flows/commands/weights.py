"""``mild weights``: networks that others trained, which are fetched once and then found by their names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from dataset_tools.networks import NETWORKS, Network
from dataset_tools.storage import local_place
from dataset_tools.weights import FOLDER_VARIABLE, at_hand, damage, known_network, licence_of, pull, size_of
from flows.commands.terminal import console, new_console, say, stopped_in_one_line

weights = typer.Typer(help="List, fetch and check the networks that find people, their joints and their parts.")


@weights.command("list")
def list_networks() -> None:
    """Every network that can be used: what for, under which licence, how large, and whether it is here."""
    table = Table(box=SIMPLE, pad_edge=False)
    for heading in ("name", "for", "licence", "commercial", "size", "at hand"):
        wraps = heading == "licence"
        table.add_column(heading, justify="right" if heading == "size" else "left", no_wrap=not wraps, overflow="fold")
    for network in NETWORKS.values():
        table.add_row(
            network.name,
            network.purpose,
            Text(licence_of(network)),
            "yes" if network.commercial else "no",
            size_of(network),
            "yes" if at_hand(network) else "no",
        )
    console.print(table)


@weights.command("pull")
def pull_networks(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Networks of mild weights list.")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help=f"Where to put a sub-folder for each, to be found where the environment variable {FOLDER_VARIABLE} "
            "names that folder; default: that one or, without it, the caches of the libraries that run them.",
        ),
    ] = None,
) -> None:
    """Fetch networks, and check that they are what they must be; what is here already is not fetched again.

    A download that was broken off goes on where it was.
    """
    networks = [known_network(name) for name in names]
    with stopped_in_one_line():
        for network in networks:
            _pull(network, Path(local_place(to, "weights")) if to else None)
            say(f"{network.name} is here: {network.about}; licence: {licence_of(network)}")


@weights.command("check")
def check_networks() -> None:
    """Check the files of every network that is here; exit code 1 where one is damaged."""
    here = [(network, folder) for network in NETWORKS.values() if (folder := at_hand(network))]
    damaged = 0
    for network, folder in here:
        if fault := damage(network, folder):
            damaged += 1
            cure = f"fetch it again: mild weights pull {network.name}"
            console.print(Text.assemble((network.name, "red"), f": {fault}; {cure}"), soft_wrap=True)
        else:
            say(f"{network.name}: sound, in {folder}")
    if damaged:
        raise typer.Exit(1)


def _pull(network: Network, to: Path | None) -> None:
    """Fetch a network, with a bar for each file that has to be fetched."""
    # Between the bars, the hub's library would tell of every connection that it lost and took up again.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=new_console(stderr=True)) as bars:
        tasks = {file.path: bars.add_task(f"{network.name} {file.path}", visible=False) for file in network.files}

        def show(file: str, done: int, total: int | None) -> None:
            bars.update(tasks[file], completed=done, total=total, visible=True)

        try:
            pull(network.name, to, show)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped: what came is kept, and the next pull goes on from there") from None
