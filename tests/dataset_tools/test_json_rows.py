"""JSON of any size is read row by row, as the standard library reads it whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataset_tools import json_rows
from dataset_tools.errors import UserError
from dataset_tools.json_rows import read_rows

DOCUMENT = {
    "info": {"annotations": [1, 2], "text": 'a "]}" in it'},
    "images": [{"id": 12345, "name": "é \U0001f600 \\ \n"}, 1.5e-7, 123456789, None, [], {}, [[1], {"a": [2]}]],
    "nothing": None,
    "empty": [],
    "annotations": [{"segmentation": [[float(n) for n in range(50)]], "id": n} for n in range(20)],
    "number": 12,
}


@pytest.mark.parametrize("chunk", [1, 2, 7, 100_000])
@pytest.mark.parametrize("indent", [None, 2])
def test_rows_are_those_of_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    """Wherever the window that is in memory ends."""
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(DOCUMENT, indent=indent, ensure_ascii=False).encode())
    found: dict[str, list[object]] = {"images": [], "empty": [], "annotations": []}
    for array, row, value in read_rows(str(path), "rows.json", tuple(found)):
        assert row == len(found[array])
        found[array].append(value)
    assert found == {name: DOCUMENT[name] for name in found}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"images": [{"id": 1}', "ends early"),
        ('{"images": [{"id": 1}]', "ends early"),
        ('{"images": [{"id": 1},]}', "follows a comma"),
        ('{"images": [{"id": 1} {"id": 2}]}', ", is expected"),
        ('{"images": [{"id" 1}]}', "delimiter"),
        ('{"images": [1]} more', "behind its end"),
        ('{"images": {"id": 1}}', "no array"),
        ('{"pictures": []}', "has no images"),
        ("[1, 2]", "{ is expected"),
        ("<html>not found</html>", "{ is expected"),
        ("", "ends early"),
        ('{"images": [' + "[" * 100_000, "."),
    ],
)
def test_what_is_no_such_json_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"^rows\.json .*{complaint}"):
        list(read_rows(str(path), "rows.json", ("images",)))


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'{"images": ["\xff"]}')
    with pytest.raises(UserError, match=r"^rows\.json is not"):
        list(read_rows(str(path), "rows.json", ("images",)))
