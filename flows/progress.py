"""What a flow shows of its work: progress in the terminal (rich), and artifacts in Prefect's pages.

What cannot be shown never ends the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, Self
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import MissingContextError
from prefect.logging import get_logger, get_run_logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PAUSE = 60.0
"""Seconds without another try after one failed: Prefect's client takes a minute to give up on a server that is away."""

P = ParamSpec("P")


class Display:
    """Shows artifacts, or whatever else tells of a piece of work, as far as that is possible.

    The first failure is logged; what comes in the `PAUSE` after a failure is not shown. Signals and cancellation, which
    are no `Exception`, come through.
    """

    def __init__(self) -> None:
        self._failed: float | None = None

    def show(self, function: Callable[P, Any], *args: P.args, **options: P.kwargs) -> Any:
        """Call a function that shows something; gives what it gives, or None where it failed or was not called."""
        if self._failed is not None and time.monotonic() < self._failed + PAUSE:
            return None
        try:
            return function(*args, **options)
        except Exception as error:
            if self._failed is None:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                what = getattr(function, "__name__", "showing it")
                run_logger().warning("the work goes on, but %s failed: %s", what, reason)
            self._failed = time.monotonic()
            return None


def run_logger() -> Any:
    """The logger of the current run, whose lines its page shows; outside a run a plain one."""
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger(__name__)


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the program."""
        self.quiet = True


class Progress:
    """Counts what is finished in one stage after another. Use inside a flow run, as a context manager.

    Args:
        key: of the artifact, in kebab-case.

    Attributes:
        pages: for other artifacts of the same work.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._console = _Terminal(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._done = self._total = self._shown = 0
        self.pages = Display()
        self._artifact: UUID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        self._artifact = self.pages.show(create_progress_artifact, 0.0, key=self._key)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def stage(self, description: str) -> None:
        """Begin a new line for what follows."""
        self._line = self._bar.add_task(description, total=0)
        self._line_total = 0

    def describe(self, description: str) -> None:
        """Change the text of this stage's line."""
        self._bar.update(self._line, description=description)

    def expect(self, count: int) -> None:
        """There is ``count`` more to do in this stage."""
        self._total += count
        self._line_total += count
        self._bar.update(self._line, total=self._line_total)

    def advance(self, count: int = 1) -> None:
        """``count`` more ended."""
        self._done += count
        self._bar.advance(self._line, count)
        percent = int(100 * self._done / max(self._total, 1))
        # An artifact update is a request to the server: at most one a percent.
        if percent > self._shown:
            self._shown = percent
            if self._artifact is None:
                self._artifact = self.pages.show(create_progress_artifact, float(percent), key=self._key)
            else:
                self.pages.show(update_progress_artifact, self._artifact, progress=float(percent))
