"""Pictures in the columns of Parquet files, read by row group from any fsspec file system."""

from __future__ import annotations

import functools
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from dataset_tools.errors import Rejected, UserError
from dataset_tools.fetch import FetchSettings, open_filesystem, with_retries
from dataset_tools.storage import changed_on_disk

R = TypeVar("R")

LARGEST_COLUMN = 1 << 29
"""Bytes of one column in one row group: so much is read for one picture of it."""
_MOST_KEPT = 1 << 30
"""Bytes of columns of row groups that are kept for the pictures that follow."""


class PictureTable:
    """One Parquet file."""

    def __init__(self, url: str, fetch: FetchSettings, options: dict[str, Any]) -> None:
        self.url, self.fetch, self.options = url, fetch, options

    def check(self, columns: Sequence[str]) -> None:
        """Raise `UserError` where the file cannot be read, lacks a column, or has row groups that fill the memory."""

        def look(file: pq.ParquetFile) -> tuple[list[str], int]:
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            parts = [group.column(k) for group in groups for k in range(group.num_columns)]
            sizes = [part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in columns]
            return file.schema_arrow.names, max(sizes, default=0)

        try:
            names, largest = self._with_file(look)
        except Rejected as rejected:
            raise UserError(rejected.message) from None
        if missing := [column for column in columns if column not in names]:
            raise UserError(f"{self.url} has no column {missing[0]!r}; it has {', '.join(names)}")
        if largest > LARGEST_COLUMN:
            raise UserError(
                f"{self.url} has a row group with {largest} bytes in one column, and at most {LARGEST_COLUMN} are read "
                "at once: write it again with smaller ones (pyarrow: row_group_size)"
            )

    def values(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """These columns of each row, a row group at a time. Raises `UserError` where they cannot be read."""
        try:
            counts = self._with_file(
                lambda file: [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            )
            for number, count in enumerate(counts):
                found = {name: self._column(number, name).to_pylist() for name in columns}
                for row in range(count):
                    yield {name: values[row] for name, values in found.items()}
        except Rejected as rejected:
            raise UserError(rejected.message) from None
        except UnicodeDecodeError as error:
            raise UserError(f"{self.url} holds text that is not UTF-8: {error}") from None

    def picture(self, row: int, column: str) -> bytes:
        """The bytes of a picture, of any row from 0. Raises `Rejected`: there is none, or as `with_retries`."""
        starts = self._starts()
        group = max(number for number, start in enumerate(starts) if start <= row)
        value = self._column(group, column)[row - starts[group]].as_py()
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise Rejected("no-picture", f"column {column} holds no bytes of a picture here")
        if len(value) > self.fetch.max_bytes:
            raise Rejected("too-large", f"column {column} holds more than {self.fetch.max_bytes} bytes here")
        return value

    def _with_file(self, use: Callable[[pq.ParquetFile], R]) -> R:
        def run() -> R:
            filesystem, path = open_filesystem(self.url, self.fetch, self.options)
            with filesystem.open(path, "rb") as opened:
                try:
                    return use(pq.ParquetFile(opened))
                except pa.ArrowInvalid as error:
                    message = f"{self.url} is no Parquet file that can be read: {' '.join(str(error).split())}"
                    raise Rejected("unreadable", message) from None

        return with_retries(run, self.url, self.fetch)

    def _starts(self) -> list[int]:
        return _starts(*self._identity())

    def _column(self, group: int, column: str) -> pa.ChunkedArray:
        key = (*self._identity(), group, column)
        with _lock:
            if key not in _kept:
                table = self._with_file(lambda file: file.read_row_group(group, [column], use_threads=False))
                _kept[key] = table[column]
                while len(_kept) > 1 and sum(values.nbytes for values in _kept.values()) > _MOST_KEPT:
                    _kept.popitem(last=False)
            _kept.move_to_end(key)
            return _kept[key]

    def _identity(self) -> tuple[str, str, FetchSettings, int]:
        filesystem, path = open_filesystem(self.url, self.fetch, self.options)
        return self.url, json.dumps(self.options, sort_keys=True), self.fetch, changed_on_disk(filesystem, path)


_kept: OrderedDict[tuple[object, ...], pa.ChunkedArray] = OrderedDict()
"""Those that were last asked for, the last one last."""
_lock = threading.Lock()
"""Threads that need the same row group read it once."""


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


@functools.lru_cache(maxsize=64)
def _starts(url: str, options: str, fetch: FetchSettings, changed: int) -> list[int]:
    """The first row of each row group."""

    def look(file: pq.ParquetFile) -> list[int]:
        starts = [0]
        for number in range(file.num_row_groups):
            starts.append(starts[-1] + file.metadata.row_group(number).num_rows)
        return starts[:-1]

    return PictureTable(url, fetch, json.loads(options))._with_file(look)
