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
    cached += ["train"] if result["train"]["cached"] else []
    evaluated = result["evaluate"]
    cached += [f"{evaluated['cached']} of {evaluated['steps']} steps of evaluate"]
    show_build(build)
    show_evaluation(evaluated["summary"])
    say(f"cached    {', '.join(cached)}")
    say(f"shards    {build['dataset']}")
    say(f"pictures  {build['dataset']}/card, {Path(evaluated['report']).parent}/pictures")
    say(f"report    {evaluated['report']}")
