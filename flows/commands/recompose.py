"""``mild recompose``; `flows.commands.erase_photos` does the work."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from dataset_tools.storage import local_path
from flows.commands.terminal import new_console, say, stopped_in_one_line


def recompose(
    layers: Annotated[str, typer.Argument(metavar="FOLDER", help="What mild erase --layers saved.")],
    keep: Annotated[str, typer.Option(metavar="1,3", help="Who stays, counted from 1; none for nobody.")],
    output: Annotated[str, typer.Option("--output", "-o", help="File of the picture.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Put a picture together again with some of its people."""
    with stopped_in_one_line():
        from flows.commands.erase_photos import recompose as recompose_picture

        note = recompose_picture(local_path(layers, "layers"), keep, local_path(output, "results"), force=force)
    if note is not None:
        new_console(stderr=True).print(Text(f"{output}: {note}"), soft_wrap=True)
    say(output)
