from __future__ import annotations

from dataset_tools.pair_list import PairRow, pair_list, read_pair_list


def test_a_list_that_an_editor_gave_a_byte_order_mark_loses_no_pair() -> None:
    rows = [PairRow(id=name, group="g", image=f"{name}.png", background="b.png") for name in ("one", "two")]
    assert [row for _, row in read_pair_list(b"\xef\xbb\xbf" + pair_list(rows))] == rows
