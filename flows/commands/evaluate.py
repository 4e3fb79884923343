"""``mild evaluate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from flows.commands.prefect_server import prepare_prefect
from flows.commands.terminal import Changes, Verbose, console, parsed, say


def evaluate(
    settings: Annotated[str, typer.Argument(help="YAML file of an evaluation recipe.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Folder or URL of a built dataset.")],
    adapters: Annotated[str, typer.Option("--adapters", "-a", help="Folder that training wrote.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the report.")] = "build/evaluation",
    set_: Changes = None,
    verbose: Verbose = False,
) -> None:
    """Compare adapters with other methods; writes tables, pictures and report.html."""
    prepare_prefect(verbose)
    from flows.evaluate import check_evaluate
    from flows.evaluate import evaluate as evaluate_flow

    changes = parsed(set_)
    check_evaluate(settings, dataset, adapters, output, changes)
    result = evaluate_flow(settings, dataset, adapters, output, changes)
    show_evaluation(result["summary"])
    say(f"report in {result['report']}{' (cached)' if result['cached'] else ''}")


def show_evaluation(summary: dict[str, Any]) -> None:
    """Means in the hole: PSNR, more is better, and perceptual distance, less is better."""
    table = Table(title="in the hole: PSNR in dB / perceptual distance")
    table.add_column("method")
    for group in summary["groups"]:
        table.add_column(Text(f"{group['name']} ({group['cases']})"), justify="right")
    for method in summary["settings"]["methods"]:
        reached = [group["methods"][method] for group in summary["groups"]]
        means = [(values["psnr_hole"]["mean"], values["perceptual_hole"]["mean"]) for values in reached]
        table.add_row(
            Text(method), *("not computed" if None in pair else "{:.2f} / {:.3f}".format(*pair) for pair in means)
        )
    console.print(table)
