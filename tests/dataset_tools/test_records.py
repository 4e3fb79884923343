"""Rows between curation and building."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_tools.records import (
    ImageRecord,
    InstanceRecord,
    Rejection,
    cell_to_text,
    record_from_row,
    records_to_table,
    rejections_to_table,
    text_to_cell,
)

TEXT = st.text(max_size=6)
UNIT = st.floats(0, 1)
INSTANCES = st.builds(InstanceRecord, TEXT, TEXT, st.tuples(UNIT, UNIT, UNIT, UNIT), TEXT, st.booleans(), st.booleans())
RECORDS = st.builds(
    ImageRecord,
    id=TEXT,
    source=TEXT,
    split=st.sampled_from(["train", "validation", "test"]),
    role=st.sampled_from(["people", "background"]),
    stratum=TEXT,
    image=TEXT,
    rotation=st.sampled_from([0, 90, 180, 270]),
    author=TEXT,
    instances=st.lists(INSTANCES, max_size=3).map(tuple),
)
REJECTIONS = st.builds(Rejection, TEXT, TEXT, TEXT, TEXT, st.sampled_from(["mended", "row-rejected"]), TEXT, TEXT)


@settings(max_examples=30)
@given(st.lists(RECORDS, max_size=4))
def test_records_survive_arrow(records: list[ImageRecord]) -> None:
    assert [record_from_row(row) for row in records_to_table(records).to_pylist()] == records


@settings(max_examples=50)
@given(st.lists(REJECTIONS, max_size=8), st.randoms())
def test_rejections_give_one_table_whatever_their_order_and_repeats(rows: list[Rejection], rng: random.Random) -> None:
    again = [*rows, *rows]
    rng.shuffle(again)
    table = rejections_to_table(rows)
    assert rejections_to_table(again).equals(table)
    assert {Rejection(**row) for row in table.to_pylist()} == set(rows)
    assert table.num_rows == len(set(rows))


@given(st.text(alphabet="'=+-@\t\r\nab ＝", max_size=6))
def test_a_cell_runs_nowhere_and_gives_its_text_back(text: str) -> None:
    """No cell begins as a formula does, and every text comes back as it was."""
    cell = text_to_cell(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝"))
    assert cell_to_text(cell) == text
    assert cell in (text, "'" + text)
