"""``mild quickstart``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.build import show_build
from flows.commands.evaluate import show_evaluation
from flows.commands.prefect_server import prepare_prefect
from flows.commands.terminal import Verbose, say


def quickstart(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for everything.")] = "quickstart",
    verbose: Verbose = False,
) -> None:
    """The whole road on the embedded sample: build-dataset, train, evaluate."""
    prepare_prefect(verbose)
    from flows.pipeline import check_pipeline, pipeline

    check_pipeline("sample", output)
    result = pipeline("sample", output)
    build = result["build"]
    cached = [f"{build['cached']} of {build['shards']} shards"]
    cached += [name for name in ("train", "evaluate") if result[name]["cached"]]
    show_build(build)
    show_evaluation(result["evaluate"]["summary"])
    say(f"cached    {', '.join(cached)}")
    say(f"shards    {build['dataset']}")
    say(f"pictures  {build['dataset']}/card, {Path(result['evaluate']['report']).parent}/pictures")
    say(f"report    {result['evaluate']['report']}")
