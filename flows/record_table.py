"""The table of chosen images, of which planning and tasks read the rows that they need, and no more."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_tools.record_file import RecordFile
from dataset_tools.records import IMAGE_SCHEMA, SPLITS, ImageRecord, record_from_row
from dataset_tools.settings import digest_of
from dataset_tools.storage import open_root

ROW_GROUP = 1024
"""Rows that are read from storage at once."""
BATCH = 256
"""Rows in Python at once."""


def write_record_table(records: RecordFile, path: Path) -> dict[str, int]:
    """Write a Parquet file of `dataset_tools.records.IMAGE_SCHEMA`; equal records give equal bytes.

    By split and role, so that the images of one shard are neighbours; within, in the order of ``records``.

    Returns:
        How many there are of each split and role, such as ``train/people``, in the order of the file.
    """
    counts: Counter[str] = Counter()
    waiting = IMAGE_SCHEMA.empty_table()
    with pq.ParquetWriter(path, IMAGE_SCHEMA) as writer:
        for split, role in product(SPLITS, ("background", "people")):
            for table in records.tables():
                found = table.filter((pc.field("split") == split) & (pc.field("role") == role))
                counts[f"{split}/{role}"] += len(found)
                waiting = pa.concat_tables([waiting, found])
                while len(waiting) >= ROW_GROUP:
                    writer.write_table(waiting.slice(0, ROW_GROUP), row_group_size=ROW_GROUP)
                    waiting = waiting.slice(ROW_GROUP)
        if len(waiting):
            writer.write_table(waiting, row_group_size=ROW_GROUP)
    return dict(+counts)


class RecordTable:
    """A table of `write_record_table` below a work folder, open as long as a block."""

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
        self.count: int = self._parquet.metadata.num_rows
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


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file; equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
