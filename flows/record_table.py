"""The table of chosen images, of which planning and tasks read the rows that they need, and no more."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataset_tools.records import IMAGE_SCHEMA, ImageRecord, record_from_row, records_to_table
from dataset_tools.settings import digest_of
from dataset_tools.storage import open_root

ROW_GROUP = 1024
"""Rows that are read from storage at once."""
BATCH = 256
"""Rows in Python at once."""


def record_table(records: Sequence[ImageRecord]) -> bytes:
    """Records as a Parquet file of `dataset_tools.records.IMAGE_SCHEMA`; equal records give equal bytes."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, IMAGE_SCHEMA) as writer:
        for start in range(0, len(records), ROW_GROUP):
            writer.write_table(records_to_table(records[start : start + ROW_GROUP]), row_group_size=ROW_GROUP)
    return sink.getvalue()


class RecordTable:
    """A table of `record_table` below a work folder, open as long as a block."""

    def __init__(self, work: str, name: str) -> None:
        self.name = name
        """Below the work folder."""
        self._work = work
        self._group: tuple[int, pa.Table] | None = None
        """The row group that was read last, and its number: slices are asked for in turn."""

    def __enter__(self) -> RecordTable:
        filesystem, base = open_root(self._work)
        self._file = filesystem.open(f"{base}/{self.name}", "rb")
        self._parquet = pq.ParquetFile(self._file)
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def rows(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Rows ``start`` to ``stop`` (exclusive), as Python objects a few at a time."""
        while start < stop:
            number, first = divmod(start, ROW_GROUP)
            count = min(stop - start, ROW_GROUP - first, BATCH)
            yield from self._read(number).slice(first, count).to_pylist()
            start += count

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """`rows` as records."""
        return map(record_from_row, self.rows(start, stop))

    def _read(self, number: int) -> pa.Table:
        if self._group is None or self._group[0] != number:
            self._group = number, self._parquet.read_row_group(number, use_threads=False)
        return self._group[1]


def digest_of_records(rows: Iterable[dict[str, Any]]) -> str:
    """Digest of what records say but where files lie: ids name pictures and masks, paths may move."""
    digest = hashlib.sha256()
    for row in rows:
        people = [{name: value for name, value in each.items() if name != "mask"} for each in row["instances"]]
        digest.update(digest_of({**row, "image": "", "instances": people}).encode())
    return digest.hexdigest()
