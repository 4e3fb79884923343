"""Photographs worked on one by one: those that are done are passed over, those that cannot be used set aside."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from dataset_tools.errors import Rejected, UserError
from dataset_tools.images import without_pillows_limit
from flows.commands.results import check_free, exists

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_MEMORY = "the computer's memory does not suffice for it"


class Job(Protocol):
    """One photograph and where its results go."""

    @property
    def photo(self) -> Path:
        """The photograph's file."""
        ...

    @property
    def results(self) -> Sequence[Path]:
        """The files that are there when it is done; all of them are whole as soon as they are there."""
        ...


J = TypeVar("J", bound=Job)
T = TypeVar("T")


class Batch(Generic[J]):
    """The photographs of one command.

    Args:
        jobs: all of them, also those that are done.
        several: whether a photograph that cannot be used is set aside, and one that is done passed over.
        force: overwrite what is there.
        verb: what is done to the photographs; shown beside the progress.
        console: is told where the results are.
        complaints: is told what was set aside or passed over, and shows the progress.
        in_one: the file that all results go into, where there is one: it is written when all is done.

    Raises:
        UserError: the result of the only photograph, or something of ``in_one``, is there already.
    """

    def __init__(
        self,
        jobs: Sequence[J],
        *,
        several: bool,
        force: bool,
        verb: str,
        console: Console,
        complaints: Console,
        in_one: Path | None = None,
    ) -> None:
        self.jobs, self.several, self.force, self.verb, self.in_one = jobs, several, force, verb, in_one
        self.console, self.complaints = console, complaints
        self.aside = 0
        """How many photographs were set aside."""
        if in_one is not None:
            check_free([in_one, *(result for job in jobs for result in job.results)], force)
        elif not several:
            check_free(jobs[0].results, force)
        self.waiting = [job for job in jobs if not (several and not force and all(map(exists, job.results)))]
        """Those that are still to be worked on."""
        self.done = len(jobs) - len(self.waiting)
        if self.done:
            complaints.print(
                f"{self.done} of {len(jobs)} photographs have their results already; --force makes them anew",
                soft_wrap=True,
                highlight=False,
            )

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Iterable[J]]:
        """Gives those that are waiting, and shows how far it is; in the end says how many were set aside.

        Raises:
            KeyboardInterrupt: the user stopped it; the message says how far it came.
        """
        # While the bar is shown, rich sends stdout to the bar's stream; a pipe must not lose it.
        # Of a single photograph, nothing is shown here.
        bar = Progress(
            console=self.complaints,
            redirect_stdout=self.console.is_terminal,
            disable=not (self.complaints.is_terminal and self.several),
        )
        try:
            with bar, without_pillows_limit():
                yield bar.track(self.waiting, description=self.verb)
        except KeyboardInterrupt:
            how_far = self._how_far() if self.several else "nothing was written"
            raise KeyboardInterrupt(f"stopped: {how_far}") from None
        if self.aside:
            self.complaints.print(
                f"{self.aside} of {len(self.jobs)} photographs were set aside", soft_wrap=True, highlight=False
            )

    def attempt(self, job: J, work: Callable[[], T]) -> T | None:
        """Do something with a photograph; None where it cannot be used and was set aside.

        Raises:
            UserError: it is the only one, or there is no room for its results, nor for any others.
        """
        try:
            for result in job.results:
                _check_name(result)
            check_free(job.results, self.force)
            return work()
        except MemoryError:
            what, cause = NO_MEMORY, None
        except (Rejected, UserError) as error:
            what, cause = error.message if isinstance(error, Rejected) else str(error), error.__cause__
        if not self.several:
            raise UserError(f"{job.photo}: {what}") from None
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            raise UserError(f"{job.photo}: {what}: {self._how_far()}") from None
        self.complain(job.photo, what)
        self.aside += 1
        return None

    def finish(self, what: str) -> None:
        """One photograph is done: say so."""
        self.done += 1
        self.tell(what)

    def tell(self, what: str) -> None:
        """Tell of a result."""
        self.console.print(Text(what), soft_wrap=True)

    def complain(self, where: object, what: str) -> None:
        """Tell what is unusual about a file."""
        self.complaints.print(Text(f"{where}: {what}"), soft_wrap=True)

    def _how_far(self) -> str:
        if self.in_one is not None:
            return f"{self.in_one} is not there yet; the same command with --force begins again"
        same = "the same command without --force" if self.force else "the same command"
        return f"{self.done} of {len(self.jobs)} photographs are done; {same} goes on with the others"


def _check_name(place: Path) -> None:
    try:
        os.lstat(place)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{place}: the file system does not hold names that long; give a shorter one") from None
