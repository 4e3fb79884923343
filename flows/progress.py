"""Progress of a flow, in the terminal (rich) and in Prefect's pages (a progress artifact)."""

from __future__ import annotations

from types import TracebackType
from typing import Self, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Counts what is finished in one stage after another. Use inside a flow run, as a context manager.

    Args:
        key: of the artifact, in kebab-case.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._done = self._total = self._shown = 0

    def __enter__(self) -> Self:
        self._bar.start()
        self._artifact = cast(UUID, create_progress_artifact(0.0, key=self._key))
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
        percent = int(100 * self._done / self._total)
        # An artifact update is a request to the server: at most one a percent.
        if percent > self._shown:
            self._shown = percent
            update_progress_artifact(self._artifact, progress=float(percent))
