"""Records of images on disk, of which few are in memory, however many a source chooses."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from operator import eq
from typing import Any, overload

import pyarrow as pa

from dataset_tools.records import IMAGE_SCHEMA, ImageRecord, record_from_row, records_to_table

BATCH = 1024
"""Records in memory at once."""


class RecordFile(Sequence[ImageRecord]):
    """Records in their order, in a file without a name (Arrow IPC), which is gone when this is."""

    def __init__(self, records: Iterable[ImageRecord]) -> None:
        self._file = tempfile.TemporaryFile(prefix="records-")  # noqa: SIM115 - open as long as this is
        self._count, remaining = 0, iter(records)
        with pa.ipc.new_file(self._file, IMAGE_SCHEMA) as writer:
            while some := list(islice(remaining, BATCH)):
                writer.write_table(records_to_table(some), BATCH)
                self._count += len(some)
        self._reader = pa.ipc.open_file(self._file)
        self._held: tuple[int, list[ImageRecord]] = -1, []
        """The batch that was asked for last, and its number."""

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(self._count)[index]]
        number, place = divmod(range(self._count)[index], BATCH)
        if self._held[0] != number:
            self._held = number, [record_from_row(row) for row in self._reader.get_batch(number).to_pylist()]
        return self._held[1][place]

    def __eq__(self, other: object) -> bool:
        """As lists are equal."""
        return isinstance(other, RecordFile | list) and len(self) == len(other) and all(map(eq, self, other))

    def tables(self) -> Iterator[pa.Table]:
        """All of them as tables of `dataset_tools.records.IMAGE_SCHEMA`, a batch each."""
        for number in range(self._reader.num_record_batches):
            yield pa.Table.from_batches([self._reader.get_batch(number)])
