"""``mild mask``; `flows.commands.mask_photos` does the work."""

from __future__ import annotations

from typing import Annotated

import typer

from dataset_tools.storage import local_path
from flows.commands.terminal import Instances, console, new_console, stopped_in_one_line


def mask(
    photos: Annotated[list[str], typer.Argument(metavar="PHOTO", help="Photographs: files, folders or globs.")],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="File of the mask for one photograph, folder for several; default: NAME-mask.png beside the "
            "photograph.",
        ),
    ] = None,
    coco: Annotated[
        str | None,
        typer.Option(metavar="FILE.json", help="Write one COCO json for all photographs instead of a PNG each."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    instances: Instances = None,
) -> None:
    """Find the people in photographs: masks for mild erase --mask, and NAME-people.jpg, which shows their numbers.

    People are numbered from left to right: value 1 of NAME-mask.png is person 1.

    Of several photographs, those whose results are there are passed over, so that a run that was stopped can go on.
    """
    photos = [local_path(photo, "photographs") for photo in photos]
    output = None if output is None else local_path(output, "results")
    coco = None if coco is None else local_path(coco, "results")
    with stopped_in_one_line():
        from flows.commands.mask_photos import mask as mask_people

        if mask_people(
            photos,
            instances=instances,
            coco=coco,
            output=output,
            force=force,
            console=console,
            complaints=new_console(stderr=True),
        ):
            raise typer.Exit(1)
