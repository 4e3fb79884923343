"""The two kinds of bad news: what the user must mend, and what a run sets aside and goes on without."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user gave cannot be used: a settings file, a path, a table.

    The message is one line that names the file, row or field and says what to do. The command line
    prints it and exits with code 2.
    """


class Rejected(Exception):
    """One image or one person cannot be used; the run goes on without it.

    Args:
        reason: short stable code in kebab-case, such as ``truncated-image``; users filter
            ``rejected.parquet`` by it.
        message: what was found, for a person to read.
        transient: True where trying again later may succeed (time-out, HTTP 429 and 5xx).
    """

    def __init__(self, reason: str, message: str, *, transient: bool = False) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.transient = transient
