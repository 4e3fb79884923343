"""``mild judge``, and the table that it and ``mild rate`` show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from dataset_tools.storage import local_path
from flows.commands.terminal import Changes, console, new_console, parsed, say, stopped_in_one_line

if TYPE_CHECKING:
    from mild.evaluation.judge import Standing
    from mild.evaluation.pairs import DrawnPairs, PairsSettings

KEPT = "stopped: what was answered is kept, and the same command goes on from there"

Evaluation = Annotated[str, typer.Argument(help="Folder that mild evaluate wrote.")]
Pairs = Annotated[int, typer.Option(min=1, help="Pairs of each method, drawn at random: the same of all.")]
Dataset = Annotated[str | None, typer.Option(help="Of the evaluation's datasets; default: its first.")]


def judge(
    evaluation: Evaluation,
    model: Annotated[str, typer.Option(help="By the endpoint's name for it, such as gpt-4o.")],
    url: Annotated[
        str | None, typer.Option(help="Endpoint that speaks OpenAI's chat completions; default: OpenAI's own.")
    ] = None,
    pairs: Pairs = 100,
    dataset: Dataset = None,
    max_cost: Annotated[
        float | None,
        typer.Option(metavar="USD", help="What all answers may cost; needs --set input_price=... output_price=..."),
    ] = None,
    set_: Changes = None,
) -> None:
    """Let a model that sees pictures judge pairs of before and after; prints table 8.

    A key is taken from the environment variable OPENAI_API_KEY; local endpoints need none. Settings: temperature,
    concurrency, timeout, retries, attempts, input_price and output_price (US dollars per million tokens), seed,
    resamples. Exit code 1 where a pair was set aside or the cost would have gone beyond --max-cost.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mild.evaluation.judge import JudgeSettings
    from mild.evaluation.judge import judge as judge_pairs
    from mild.evaluation.pairs import draw_pairs, folder_beside

    given: dict[str, Any] = {"model": model, "url": url, "pairs": pairs, "dataset": dataset, "max_cost": max_cost}
    given = {name: value for name, value in given.items() if value is not None}
    settings = JudgeSettings.check({**given, **parsed(set_)}, origin="mild judge")
    place = Path(local_path(evaluation, "an evaluation"))
    drawn = draw_pairs(place, settings)
    complaints = new_console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with stopped_in_one_line(), Progress(*columns, console=complaints, disable=not complaints.is_terminal) as bars:
        bar = bars.add_task(settings.judge, total=None)

        def show(standing: Standing) -> None:
            cost = f", {standing.cost:.2f} USD" if standing.cost else ""
            bars.update(bar, completed=standing.done, total=standing.total, description=f"{settings.judge}{cost}")

        try:
            ended = judge_pairs(drawn.pairs, settings, folder_beside(place), show)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(KEPT) from None
    for name in ended.set_aside:
        complaints.print(Text.assemble(("set aside", "yellow"), f" {name}"), soft_wrap=True)
    say(f"{ended.done} of {ended.total} requests done, {ended.sent} sent now; {ended.cost:.4f} USD so far")
    if ended.at_cap:
        complaints.print(
            f"stopped at {ended.cost:.4f} USD: the next request might go beyond --max-cost {settings.max_cost:g}; "
            "with a higher one the same command goes on from there",
            soft_wrap=True,
            highlight=False,
        )
    show_ratings(drawn, settings, place)
    if ended.set_aside or ended.at_cap:
        raise typer.Exit(1)


def show_ratings(drawn: DrawnPairs, settings: PairsSettings, evaluation: Path) -> None:
    """Print table 8 of what models and people said so far, and write it beside the evaluation."""
    from mild.evaluation.pairs import folder_beside
    from mild.evaluation.ratings import cells, heads, notes, ratings_table, write_table

    made = ratings_table(drawn, settings, folder_beside(evaluation))
    table = Table(box=SIMPLE, pad_edge=False)
    for index, head in enumerate(heads(made)):
        table.add_column(Text(head), justify="right" if index else "left", overflow="fold")
    for row in cells(made):
        table.add_row(*map(Text, row))
    console.print(table)
    for note in notes(made):
        say(note)
    say(f"table in {', '.join(map(str, write_table(made, folder_beside(evaluation))))}")
