"""Reading JSON files of any size row by row: COCO's are one object of 450 MB, with arrays of a million rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from typing import Any, TextIO

from dataset_tools.errors import UserError

CHUNK = 1 << 20
"""Characters that are read at once; more are held only where one row is longer."""
MAX_ROW = 1 << 26
"""Characters of the longest row."""


def read_rows(path: str, name: str, wanted: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """Each element of arrays of the one object (RFC 8259) that a file holds, in the order of the file.

    Args:
        path: local file, UTF-8 with or without a byte order mark.
        name: what messages call it.
        wanted: names of arrays; all else is passed over.

    Yields:
        Name of the array, index in it, and element. The file was read whole, and found to be sound, when all are given.

    Raises:
        UserError: it is no such file, or has no such array.
    """
    missing = set(wanted)
    try:
        with open(path, encoding="utf-8-sig") as file:
            reader = _Reader(file)
            for key in reader.names():
                if key in wanted and reader.peek() != "[":
                    raise ValueError(f"{key} is no array")
                if reader.peek() != "[":
                    reader.value()
                    continue
                for index, element in enumerate(reader.elements()):
                    if key in wanted:
                        yield key, index, element
                missing.discard(key)
            if reader.peek():
                raise ValueError("something stands behind its end")
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not the JSON that is expected: {error}; fetch it again") from None
    if missing:
        raise UserError(f"{name} has no {' and no '.join(sorted(missing))}: is this the right file?")


class _Reader:
    """A JSON text of which only a window is in memory. Raises `ValueError` for what is no JSON."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.window, self.at = file, "", 0
        self.decode: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().raw_decode

    def names(self) -> Iterator[str]:
        """Names in an object; the caller reads the value of each."""
        self.take("{")
        while self.peek() != "}":
            key = self.value()
            if not isinstance(key, str):
                raise ValueError(f"a name is expected, not {key!r:.80}")
            self.take(":")
            yield key
            self.separator("}")
        self.take("}")

    def elements(self) -> Iterator[Any]:
        """Elements of an array."""
        self.take("[")
        while self.peek() != "]":
            yield self.value()
            self.separator("]")
        self.take("]")

    def value(self) -> Any:
        """The value that stands next."""
        self.peek()
        while True:
            try:
                value, end = self.decode(self.window, self.at)
            except json.JSONDecodeError as error:
                if len(self.window) - self.at > MAX_ROW or not self.more():
                    raise ValueError(error.msg) from None  # it counts lines from where the window begins
                continue
            length = end - self.at
            if end + 3 <= len(self.window) or not self.more():  # 1 may go on as 1e-7
                self.at += length
                return value

    def peek(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            while self.at < len(self.window):
                if self.window[self.at] not in " \t\r\n":
                    return self.window[self.at]
                self.at += 1
            if not self.more():
                return ""

    def take(self, expected: str) -> None:
        found = self.peek()
        if found != expected:
            raise ValueError(f"{expected} is expected, not {found!r}" if found else "it ends early")
        self.at += 1

    def separator(self, end: str) -> None:
        if self.peek() != end:
            self.take(",")
            if self.peek() == end:
                raise ValueError(f"{end} follows a comma")

    def more(self) -> bool:
        """Move the window on; twice as far each time that one value needs, so that long ones are not read too often."""
        rest = self.window[self.at :]
        chunk = self.file.read(max(CHUNK, len(rest)))
        self.window, self.at = rest + chunk, 0
        return bool(chunk)
