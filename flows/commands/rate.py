"""``mild rate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dataset_tools.storage import local_path
from flows.commands.judge import Dataset, Evaluation, Pairs, show_ratings
from flows.commands.serving import Host, Port, serve
from flows.commands.terminal import Changes, parsed


def rate(
    evaluation: Evaluation,
    port: Port = 8765,
    host: Host = "127.0.0.1",
    raters: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Who may rate. Repeatable; default: everybody enters a name of their own."),
    ] = None,
    pairs: Pairs = 100,
    dataset: Dataset = None,
    table: Annotated[
        bool, typer.Option("--table", help="Print the table of what there is, and serve no page.")
    ] = False,
    set_: Changes = None,
) -> None:
    """Serve a page on which people rate pairs of before and after without knowing the methods; prints table 8.

    Ratings are kept beside the evaluation as they come; a rater goes on where they were. Ctrl-C ends it. Settings:
    seed, resamples.
    """
    from mild.evaluation.pairs import draw_pairs, folder_beside
    from mild.evaluation.rate import RateSettings, rating_page

    given: dict[str, Any] = {"port": port, "host": host, "raters": raters or (), "pairs": pairs, "dataset": dataset}
    given = {name: value for name, value in given.items() if value is not None}
    settings = RateSettings.check({**given, **parsed(set_)}, origin="mild rate")
    place = Path(local_path(evaluation, "an evaluation"))
    drawn = draw_pairs(place, settings)
    if not table:
        serve(rating_page(drawn.pairs, settings, folder_beside(place)), settings, "rate")
    show_ratings(drawn, settings, place)
