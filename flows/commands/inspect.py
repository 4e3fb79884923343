"""``mild inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.terminal import console, say


def inspect(
    dataset: Annotated[str, typer.Argument(help="Folder or URL of a dataset.")],
    picture: Annotated[
        str, typer.Option(help="Where to write the contact sheet (PNG); an earlier one there is replaced.")
    ] = "contact-sheet.png",
    each: Annotated[int, typer.Option(min=1, help="Samples of each configuration and split on it.")] = 4,
) -> None:
    """Show counts, sizes, people a picture, overlap and licences; draw a contact sheet."""
    from dataset_tools.contact_sheet import as_sheet, contact_sheet, is_sheet
    from dataset_tools.errors import UserError, one_line
    from dataset_tools.inspection import as_tables
    from dataset_tools.inspection import inspect as inspect_dataset
    from dataset_tools.shards import ShardDataset, read_manifest
    from dataset_tools.storage import open_root, write_bytes

    filesystem, path = open_root(picture)
    if filesystem.exists(path) and not is_sheet(filesystem.cat_file(path)):
        raise UserError(f"--picture {picture} is there already and no contact sheet: name another")
    for table in as_tables(inspect_dataset(dataset)):
        console.print(table)
    parts = [
        ShardDataset(dataset, configuration, split)
        for configuration, splits in read_manifest(dataset).shards.items()
        for split in splits
    ]
    try:
        samples = [part[index] for part in parts for index in range(min(each, len(part)))]
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{dataset} is damaged, and mild verify tells where: {one_line(error)}") from None
    write_bytes(filesystem, path, as_sheet(contact_sheet(samples, columns=4, tile=240)))
    say(f"contact sheet in {picture}")
