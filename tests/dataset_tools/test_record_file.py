"""Records on disk behave as a list of them does."""

from __future__ import annotations

import pytest

from dataset_tools.record_file import BATCH, RecordFile
from dataset_tools.records import ImageRecord, InstanceRecord, records_to_table


def records(count: int) -> list[ImageRecord]:
    person = InstanceRecord("1", "Person", (0.25, 0.0, 0.75, 1.0), "mask", keypoints=(0.5,) * 54)
    return [
        ImageRecord(f"{k}", "test", "train", "people", "one", f"{k}.jpg", instances=(person,) * (k % 3))
        for k in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, BATCH, 2 * BATCH + 1])
def test_a_file_of_records_is_the_list_of_them(count: int) -> None:
    expected = records(count)
    held = RecordFile(iter(expected))
    assert list(held) == expected == held[:] and len(held) == count and held == expected
    assert [row for table in held.tables() for row in table.to_pylist()] == records_to_table(expected).to_pylist()
    with pytest.raises(IndexError):
        held[count]


def test_places_are_counted_from_both_ends_and_in_steps() -> None:
    expected = records(BATCH + 5)
    held = RecordFile(expected)
    assert held[-1] == expected[-1] and held[BATCH - 2 :: 3] == expected[BATCH - 2 :: 3]
    assert held != expected[:-1] and held != RecordFile(reversed(expected))
