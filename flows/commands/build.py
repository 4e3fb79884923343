"""``mild build``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from dataset_tools.errors import UserError
from flows.commands.prefect_server import prepare_prefect
from flows.commands.terminal import Changes, Verbose, console, parsed, say


def build(
    settings: Annotated[str | None, typer.Argument(help="YAML file of build settings.")] = None,
    source: Annotated[
        str | None, typer.Option(help="sample, openimages, coco, ade20k or folder; instead of a settings file.")
    ] = None,
    photos: Annotated[str | None, typer.Option(help="--source folder: folder of photographs.")] = None,
    masks: Annotated[
        str | None,
        typer.Option(
            help="--source folder: folder of masks, or a COCO json; without, networks find the people, their pose and "
            "body parts (mild weights list)."
        ),
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder or URL of the dataset.")] = "build/dataset",
    set_: Changes = None,
    verbose: Verbose = False,
) -> None:
    """Build a dataset, or bring one up to date."""
    prepare_prefect(verbose)
    from flows.build_dataset import build_dataset

    changes = parsed(set_)
    if (settings is None) == (source is None):
        raise UserError("give either a settings file or --source")
    if source is not None:
        # Imports all other flows, too.
        from flows.pipeline import recipe_path

        alone = source == "folder" and masks is None and "source.masks" not in changes
        settings = recipe_path("build", "photographs" if alone else source)
    changes |= {f"source.{key}": value for key, value in [("photos", photos), ("masks", masks)] if value}
    show_build(build_dataset(str(settings), output, changes))


def show_build(summary: dict[str, Any]) -> None:
    say(f"dataset {summary['dataset']}")
    table = Table()
    table.add_column("what")
    table.add_column("count", justify="right")
    for name in ("samples", "shards", "cached"):
        table.add_row(name, str(summary[name]))
    for reason, count in summary["rejected"].items():
        table.add_row(Text(f"set aside or mended: {reason}"), str(count))
    console.print(table)
