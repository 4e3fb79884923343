"""``mild verify``."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.text import Text

from flows.commands.terminal import console, say


def verify(dataset: Annotated[str, typer.Argument(help="Folder or URL of a dataset.")]) -> None:
    """Check digests, schema, masks, keypoints and splits; exit code 1 where something is wrong."""
    from dataset_tools.shards import read_manifest
    from dataset_tools.shards import verify as verify_dataset

    manifest = read_manifest(dataset)
    problems = 0
    for problem in verify_dataset(dataset, workers=os.cpu_count() or 1):
        problems += 1
        console.print(Text.assemble((problem.where, "red"), f": {problem.what}"), soft_wrap=True)
    if problems:
        say(f"{problems} problems; building again redoes what is altered")
        raise typer.Exit(1)
    shards = [shard for splits in manifest.shards.values() for held in splits.values() for shard in held]
    say(f"sound: {sum(s.samples for s in shards)} samples in {len(shards)} shards, digest {manifest.digest()[:16]}")
