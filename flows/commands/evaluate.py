"""``mild evaluate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from dataset_tools.errors import UserError
from flows.commands.prefect_server import prepare_prefect
from flows.commands.terminal import Changes, Verbose, console, parsed, say

REGRESSED = 3
"""Exit code where something got worse than in the run before."""


def evaluate(
    settings: Annotated[str, typer.Argument(help="YAML file of an evaluation recipe.")],
    dataset: Annotated[
        str, typer.Option("--dataset", "-d", help="Folder or URL of a built dataset, where the recipe names none.")
    ] = "",
    adapters: Annotated[str, typer.Option("--adapters", "-a", help="Folder that training wrote, or hub id.")] = "",
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the report.")] = "build/evaluation",
    against: Annotated[
        str,
        typer.Option("--against", help="Evaluation to compare with; `before`: that which stands at --output."),
    ] = "",
    fail_on_regression: Annotated[
        bool,
        typer.Option("--fail-on-regression", help="Exit code 3 where something is worse than in --against, or lost."),
    ] = False,
    set_: Changes = None,
    verbose: Verbose = False,
) -> None:
    """Compare methods of erasing; writes tables, pictures and report.html."""
    if fail_on_regression and not against:
        raise UserError("--fail-on-regression needs --against: name the evaluation to compare with")
    prepare_prefect(verbose)
    from flows.evaluate import check_evaluate
    from flows.evaluate import evaluate as evaluate_flow
    from mild.evaluation.summary import Comparison

    changes = parsed(set_)
    check_evaluate(settings, dataset, adapters, output, changes, against)
    result = evaluate_flow(settings, dataset, adapters, output, changes, against)
    show_evaluation(result["summary"])
    say(f"cached    {result['cached']} of {result['steps']} steps")
    say(f"report in {result['report']}")
    compared = result["summary"]["against"]  # none where this is the first evaluation at its place
    if fail_on_regression and compared and Comparison.model_validate(compared).regressions:
        raise typer.Exit(REGRESSED)


def show_evaluation(summary: dict[str, Any]) -> None:
    """The first two metrics of every method and group, the headline, and what changed since another run."""
    metrics = [metric for metric in summary["metrics"] if not metric["not_run"]][:2]
    table = Table(title=" / ".join(metric["title"] for metric in metrics))
    table.add_column("method")
    for group in summary["groups"]:
        name = group["name"] or "all"
        dataset = f"{group['dataset']}: " if len(summary["datasets"]) > 1 else ""
        table.add_column(Text(f"{dataset}{name} ({group['cases']})"), justify="right")
    for method in dict.fromkeys(method for group in summary["groups"] for method in group["cells"]):
        cells = [group["cells"].get(method, {}) for group in summary["groups"]]
        table.add_row(Text(method), *(" / ".join(_shown(cell, metric) for metric in metrics) for cell in cells))
    console.print(table)
    for method in summary["methods"]:
        if method["not_run"]:
            say(f"not run: {method['name']}: {method['not_run']}")
    for metric in summary["metrics"]:
        if metric["not_run"]:
            say(f"not computed: {metric['name']}: {metric['not_run']}")
    if summary["headline"]:
        say(summary["headline"]["sentence"])
    if summary["against"]:
        _show_changes(summary["against"], {metric["name"]: metric for metric in summary["metrics"]})


def _show_changes(comparison: dict[str, Any], metrics: dict[str, Any]) -> None:
    changed = [change for change in comparison["changes"] if change["verdict"] != "same"]
    for change in changed:
        digits = metrics[change["metric"]]["digits"]
        difference = change["difference"]
        numbers = [f"{difference[name]:+.{digits}f}" for name in ("mean", "low", "high")]
        say(
            f"{change['verdict']}: {change['method']} on {change['dataset']}, {metrics[change['metric']]['title']}: "
            f"{numbers[0]} ({numbers[1]} to {numbers[2]})"
        )
    say(f"against {comparison['place']}: {len(comparison['changes']) - len(changed)} values are not told apart")
    for what in comparison["lost"]:
        say(f"lost: {what}")
    for reason in comparison["left_out"]:
        say(f"not compared: {reason}")


def _shown(cells: dict[str, Any], metric: dict[str, Any]) -> str:
    cell = cells.get(metric["name"], {})
    if cell.get("mean") is None:
        return "identical" if cell.get("identical") else "not computed"
    return f"{cell['mean']:.{metric['digits']}f}"
