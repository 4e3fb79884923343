"""``mild erase``; `flows.commands.erase_photos` does the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from dataset_tools.errors import UserError
from dataset_tools.storage import is_url, local_path, normal_place
from flows.commands.terminal import Instances, console, new_console, stopped_in_one_line

if TYPE_CHECKING:
    from mild.erasing.isolation import Protect


def erase(
    photos: Annotated[list[str], typer.Argument(metavar="PHOTO", help="Photographs: files, folders or globs.")],
    mask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Masks of the people: for one photograph an index PNG, or a PNG a person (repeat the option); for "
            "any number a folder of PNGs with the photographs' names (NAME.png or NAME-mask.png, or NAME_0.png, "
            "NAME_1.png, ...), or a COCO json. Where people overlap, later masks are in front. Without, a "
            "network finds the people.",
        ),
    ] = None,
    remove: Annotated[
        str | None,
        typer.Option(
            metavar="1,3",
            help="Who vanishes, counted from 1 in the order of the masks, or from left to right as mild mask shows "
            "them; default: everybody.",
        ),
    ] = None,
    click: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y",
            help="Who vanishes: the person at this pixel of the photograph as it is seen, from its top left. "
            "Repeatable.",
        ),
    ] = None,
    largest: Annotated[bool, typer.Option("--largest", help="The largest person vanishes.")] = False,
    keep_largest: Annotated[
        bool, typer.Option("--keep-largest", help="Everybody but the largest person vanishes.")
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="File for one photograph, folder for several; default: NAME-erased.png beside the photograph. PNG, "
            "TIFF and WEBP keep all other pixels exactly.",
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Also save background and people, for mild recompose.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    base: Annotated[
        str | None,
        typer.Option(help="SDXL inpainting pipeline, folder or hub id; default: the one that --mild was trained on."),
    ] = None,
    mild: Annotated[
        str | None,
        typer.Option(
            help="Folder that training wrote, or hub id; default: the base of --base alone or, without that, the "
            "adapters that come with this package, which know drawn pictures only."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Denoising steps, 1 to 1000; default: as many as --mild is meant for, 25 for a base alone."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise, below 2**64; the same seed gives the same picture.")] = 0,
    prompt: Annotated[
        str | None,
        typer.Option(help="What is to be seen where people were; default: as --mild was trained, mostly nothing."),
    ] = None,
    instances: Instances = None,
    pose: Annotated[
        str | None,
        typer.Option(
            metavar="NETWORK",
            help="What finds joints, where the adapters were trained with them: as --instances.",
        ),
    ] = None,
    parsing: Annotated[
        str | None,
        typer.Option(metavar="NETWORK", help="What labels body parts and clothes, likewise: as --instances."),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How far beyond a mask pixels may change, as a share of the square root of its area: more for rough "
            "masks, 0 for exactly the masks; default: 0.015.",
        ),
    ] = None,
    protect: Annotated[
        str | None,
        typer.Option(
            metavar="faces|people",
            help="What of those who stay is never painted over, where masks overlap: their faces, found by --pose or "
            "--parsing, or all of them.",
        ),
    ] = None,
    extents: Annotated[
        str | None,
        typer.Option(
            metavar="off|REACH",
            help="How far from a mask the model may go on where it sees what the mask misses (limbs, shadow, "
            "reflection), or more of somebody behind who goes, as a share of the square root of the mask's area; off: "
            "masks alone say what is painted; default: 2.",
        ),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            help="Pixels of the side of the square that people's surroundings are worked on at: more keeps details of "
            "large people, and takes longer; default: what --mild is meant for."
        ),
    ] = None,
) -> None:
    """Erase people from photographs; all other pixels stay exactly as they are.

    Of several photographs, those whose results are there are passed over, so that a run that was stopped can go on.
    """
    if mask and instances is not None:
        raise UserError("--instances says what finds the people, --mask where they are: give one of them")
    photos = [local_path(photo, "photographs") for photo in photos]
    # Masks are read from anywhere.
    mask = [place if is_url(place := normal_place(path)) else local_path(path, "masks") for path in mask or []]
    output = None if output is None else local_path(output, "results")
    layers = None if layers is None else local_path(layers, "layers")
    with stopped_in_one_line():
        from flows.commands.chosen_people import Chosen, parse_clicks, parse_numbers
        from flows.commands.erase_photos import EraseOptions
        from flows.commands.erase_photos import erase as erase_people
        from mild.erasing.regions import MARGIN

        numbers = None if remove is None else parse_numbers(remove, "--remove")
        if erase_people(
            photos,
            mask,
            EraseOptions(
                base,
                mild,
                steps,
                seed,
                prompt,
                MARGIN if margin is None else margin,
                instances,
                pose,
                parsing,
                cast("Protect | None", protect),  # checked there
                extents,
                resolution,
            ),
            Chosen(numbers, parse_clicks(click or []), largest, keep_largest),
            output=output,
            layers=layers,
            force=force,
            console=console,
            complaints=new_console(stderr=True),
        ):
            raise typer.Exit(1)
