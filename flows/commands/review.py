"""``mild review``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dataset_tools.errors import UserError
from dataset_tools.storage import local_path
from flows.commands.prefect_server import prepare_prefect
from flows.commands.serving import Host, Port, serve
from flows.commands.terminal import say


def review(
    output: Annotated[str, typer.Argument(help="The --output of mild select.")],
    port: Port = 8765,
    host: Host = "127.0.0.1",
    reviewers: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Who may review. Repeatable; default: everybody enters a name of their own."),
    ] = None,
) -> None:
    """Serve a page on which people choose clean plates without knowing the methods.

    Keys 1 to 9 pick, 0 is none, U takes back, arrows go back and forth. Decisions are kept beside OUTPUT as they come.
    When all is decided, the page lets the waiting flow run go on. Ctrl-C ends it.
    """
    from mild.evaluation.pairs import folder_beside
    from mild.evaluation.review import Decisions, Review
    from mild.evaluation.review_page import ReviewPageSettings, review_page

    settings = ReviewPageSettings.check(
        {"port": port, "host": host, "reviewers": reviewers or ()}, origin="mild review"
    )
    place = Path(local_path(output, "pairs"))
    work = place.with_name(f"{place.name}.work")
    known, decisions = Review.read(work), Decisions(folder_beside(place))

    def finish() -> str:
        said = _resume(work)
        say(said)
        return said

    serve(review_page(known, decisions, work, settings, finish), settings, "review")
    for line in decisions.outcome(known).sentences():
        say(line)


def _resume(work: Path) -> str:
    """Let the flow run that waits go on; gives what came of it."""
    try:
        prepare_prefect(verbose=False)
    except UserError as error:
        return f"The flow run that waits could not be resumed: {error}."
    from flows.waiting import resume_waiting

    return resume_waiting(str(work))
