"""``mild rate``."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from dataset_tools.errors import UserError
from dataset_tools.storage import local_path
from flows.commands.judge import Dataset, Evaluation, Pairs, show_ratings
from flows.commands.terminal import Changes, parsed, say


def rate(
    evaluation: Evaluation,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 takes any that is free.")] = 8765,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets everybody in who reaches this machine.")
    ] = "127.0.0.1",
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
        import uvicorn

        app = rating_page(drawn.pairs, settings, folder_beside(place))
        try:
            family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
            listening = socket.create_server((settings.host, settings.port), family=family)
        except OSError as error:
            raise UserError(
                f"{settings.host} port {settings.port} cannot be listened on: {error.strerror or error}; "
                "name another with --port"
            ) from None
        with listening:
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            say(f"rate at http://{host}:{listening.getsockname()[1]}/ (Ctrl-C ends it)")
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
    show_ratings(drawn, settings, place)
