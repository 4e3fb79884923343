"""The two kinds of bad news: what the user must mend, and what a run sets aside and goes on without."""

from __future__ import annotations

import errno
import os
import re


class UserError(ValueError):
    """Something that the user gave cannot be used: a settings file, a path, a table, an argument.

    The message is one line that names the file, row or field and says what to do. The command line
    prints it and exits with code 2.
    """


class Rejected(Exception):
    """One image or one person cannot be used; the run goes on without it.

    Args:
        reason: short stable code in kebab-case, such as ``truncated-image``; users filter
            ``rejected.parquet`` by it.
        message: what was found, for a person to read.
        transient: True where the fault may be the run's and not the image's (time-out, no permission, a folder that
            is missing as a whole): a later run tries again. False settles it: it is not there, or cannot be decoded.
    """

    def __init__(self, reason: str, message: str, *, transient: bool = False) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.transient = transient


MENDABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),  # no permission
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # no room
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),  # no such place can be
)
"""Numbers of `OSError` that are the same however often one tries, until the user has done something."""
_RUST = re.compile(r"\(os error (\d+)\)")
"""How libraries that are written in Rust, such as safetensors, name the system's error in their own."""


def what_to_mend(error: BaseException) -> str | None:
    """One line on what the user must mend, where the error is of that kind; None for all others.

    Of that kind are `UserError`, and the system's refusals: no room, no permission, a place that cannot be.
    """
    if isinstance(error, UserError):
        return str(error)
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (found := _RUST.search(str(error))):
        code = int(found[1])
    if code is None and isinstance(error, PermissionError):  # as stores raise it
        code = errno.EACCES
    if code not in MENDABLE:
        return None
    names = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    said = os.strerror(code) if names or not isinstance(error, PermissionError) else " ".join(str(error).split())
    room = ": make room and start again, what is finished is kept" if code in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{' -> '.join(names)}: {said}{room}" if names else f"{said}{room}"
