"""Web lists: their rows, and which of the pictures that these gave are kept."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_tools.downloads import DOWNLOAD_SCHEMA, Download
from dataset_tools.errors import Rejected, UserError
from dataset_tools.records import Curation, Rejection, rejections_to_table
from dataset_tools.sources import Source
from dataset_tools.sources.weblist import (
    DownloadedSettings,
    DownloadedSource,
    WeblistSettings,
    WebRow,
    rows_to_table,
)

LIST = """\ufeffurl,licence,author,author_url,title,landing_url,split,role,notes
https://a.example/1.jpg,CC BY 4.0,Ada,https://a.example/ada,"One, two",https://a.example/1,,,x
 https://b.example/2.jpg ,CC0,,,'=SUM(A1),,test,background,

https://b.example/3.jpg,,Bo,,,,train,,
,CC0,,,,,,,
ftp://a.example/4.jpg,CC0,,,,,,,
https://a.example/5.jpg,CC0,,,,,later,,
https://a.example/6.jpg,CC0,,,,,,extra,
https://a.example/7.jpg,CC0
"""
ADA = ("CC BY 4.0", "Ada", "https://a.example/ada", "One, two", "https://a.example/1")
USABLE = [
    WebRow(1, "https://a.example/1.jpg", *ADA, "", "people"),
    WebRow(2, "https://b.example/2.jpg", "CC0", "", "", "=SUM(A1)", "", "test", "background"),
]


def listed(path: Path, text: str = LIST, **settings: Any) -> WeblistSettings:
    path.write_text(text, encoding="utf-8")
    return WeblistSettings(urls=str(path), **settings)


def reasons(settings: WeblistSettings) -> list[tuple[str, str]]:
    rows = [row for row in settings.open().rows() if isinstance(row, Rejection)]
    assert all((row.stage, row.outcome, row.transient) == ("curate", "row-rejected", False) for row in rows)
    return [(row.message.partition(":")[0], row.reason) for row in rows]


def test_rows_are_read_and_each_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    settings = listed(tmp_path / "list.csv")
    assert [row for row in settings.open().rows() if isinstance(row, WebRow)] == USABLE
    names = ["no-licence", "no-url", "bad-scheme", "bad-split", "bad-role", "bad-row"]
    assert reasons(settings) == [(f"row {number} of list.csv", name) for number, name in enumerate(names, start=3)]


@pytest.mark.parametrize(
    "url", ["https://bob:hunter2@a.example/1.jpg", "https://a.example/1.jpg?X-Amz-Signature=hunter2"]
)
def test_a_url_with_a_secret_is_left_out_and_not_repeated(tmp_path: Path, url: str) -> None:
    (row,) = listed(tmp_path / "list.csv", f"url,licence\n{url},CC0\n").open().rows()
    assert isinstance(row, Rejection) and row.reason in ("bad-url", "secret-in-url")
    assert "a.example" in row.image_id and "hunter2" not in f"{row}"


@pytest.mark.parametrize("column", ["landing_url", "author_url"])
def test_a_page_whose_url_has_a_secret_is_left_out_and_not_repeated(tmp_path: Path, column: str) -> None:
    """All of them are columns of what is published."""
    table = f"url,licence,{column}\nhttps://a.example/1.jpg,CC0,https://b.example/?token=hunter2secret\n"
    (row,) = listed(tmp_path / "list.csv", table).open().rows()
    assert isinstance(row, Rejection) and row.reason == "secret-in-url"
    assert column in row.message and "hunter2" not in f"{row}"


def test_a_parquet_file_says_the_same_in_columns_of_any_name(tmp_path: Path) -> None:
    table = pa.table(
        {
            "URL": [row.url for row in USABLE],
            "LICENSE": [row.licence for row in USABLE],
            "by": pa.array(["Ada", None]),
            "title": pa.array([7, None]),
            "split": [row.split for row in USABLE],
        }
    )
    pq.write_table(table, tmp_path / "list.parquet")
    columns = {"url": "URL", "licence": "LICENSE", "author": "by"}
    settings = WeblistSettings(urls=str(tmp_path / "list.parquet"), columns=columns)
    first, second = settings.open().rows()
    assert first == WebRow(1, USABLE[0].url, "CC BY 4.0", "Ada", "", "7", "", "", "people")
    assert second == WebRow(2, USABLE[1].url, "CC0", "", "", "", "", "test", "people")


def test_one_licence_and_author_may_hold_for_all_that_name_none(tmp_path: Path) -> None:
    settings = listed(tmp_path / "list.csv", "url,author\nhttp://a.example/1,\nhttp://a.example/2,Bo\n", licence="CC0")
    rows = list(settings.model_copy(update={"author": "us"}).open().rows())
    assert [(row.licence, row.author) for row in rows if isinstance(row, WebRow)] == [("CC0", "us"), ("CC0", "Bo")]


@pytest.mark.parametrize(
    ("name", "text", "settings", "said"),
    [
        ("list.csv", "link,licence\n", {}, "has no column 'url'; name the right one as source.columns.url"),
        ("list.csv", "url\n", {}, "no column 'licence'.*or one licence for all as source.licence"),
        ("list.csv", "url,licence\n", {"columns": {"author": "by"}}, "no column 'by'.*source.columns.author"),
        ("list.csv", "", {}, "has no column"),
        ("list.csv", "url,licence,licence\nhttp://a/x,CC0,none\n", {}, "two columns 'licence': leave one of them out"),
        ("list.csv", 'url,licence\n\n"http://a/x,CC0\nc,d\n', {}, "cannot be read: from line 3 on: unexpected end"),
        ("list.parquet", "url\n", {}, "cannot be read"),
        ("list.txt", "url\n", {}, "neither a .csv nor a .parquet file"),
    ],
)
def test_a_list_that_cannot_be_read_is_the_users_to_mend(
    tmp_path: Path, name: str, text: str, settings: dict[str, Any], said: str
) -> None:
    weblist = listed(tmp_path / name, text, **settings).open()
    with pytest.raises(UserError, match=said):
        weblist.check()


def test_a_list_that_is_not_there_or_not_text_is_the_users_to_mend(tmp_path: Path) -> None:
    weblist = WeblistSettings(urls=str(tmp_path / "list.csv")).open()
    for ask in (weblist.check, weblist.fingerprint):
        with pytest.raises(UserError, match="does not exist"):
            ask()
    (tmp_path / "list.csv").write_bytes(b"url,licence\nhttp://a.example/\xff,CC0\n")
    with pytest.raises(UserError, match="cannot be read"):
        weblist.check()


def test_the_fingerprint_follows_the_content_and_what_rows_are_read_by(tmp_path: Path) -> None:
    settings = listed(tmp_path / "list.csv")
    copy = listed(tmp_path / "copy.csv", alike_bits=0)
    first = settings.open().fingerprint()
    assert copy.open().fingerprint() == first
    assert settings.model_copy(update={"licence": "CC0"}).open().fingerprint() != first
    assert listed(tmp_path / "list.csv", LIST.replace("Ada", "Eve")).open().fingerprint() != first


def gave(url: str, sha256: str, value: int) -> Download:
    told: dict[str, Any] = {"status": "fetched", "http": 200, "requests": 1, "final_url": url, "size": 1}
    return Download(url=url, sha256=sha256, perceptual_hash=f"{value:016x}", **told)


def failed(url: str, reason: str, transient: bool = False) -> Download:
    told: dict[str, Any] = {"status": "failed", "http": 0, "requests": 1, "final_url": url}
    return Download(url=url, reason=reason, transient=transient, message=reason, **told)


def moved(url: str, target: str) -> Download:
    return Download(url=url, status="moved", http=302, requests=1, final_url=target)


def curated(folder: Path, rows: list[WebRow], downloads: list[Download], **settings: Any) -> Curation:
    pq.write_table(rows_to_table(rows), folder / "rows")
    pq.write_table(rejections_to_table([]), folder / "rejected")
    halves = (downloads[::2], downloads[1::2])
    for name, half in zip(("first", "second"), halves, strict=True):
        pq.write_table(
            pa.Table.from_pylist([each.model_dump() for each in half], schema=DOWNLOAD_SCHEMA), folder / name
        )
    source = DownloadedSettings(
        weblist=WeblistSettings(urls="list.csv", **settings),
        folder=str(folder),
        rows="rows",
        rejected="rejected",
        downloads=("first", "second"),
        pictures="downloads",
    ).open()
    assert isinstance(source, Source)
    return source.curate()


def row(number: int, url: str, split: str = "", role: str = "people") -> WebRow:
    return WebRow(number, url, "CC0", "Ada", "", "", "", split, role)


def test_of_pictures_that_are_alike_the_first_of_the_list_is_kept_in_whichever_split(tmp_path: Path) -> None:
    """c and d have equal bytes; e is 4 bits from c, which is kept, and f 4 bits from e, which is not, and 8 from c."""
    rng = np.random.default_rng(0)
    digests = {name: rng.bytes(32).hex() for name in "abcef"}
    hashes = {"a": 0, "b": (1 << 64) - 1, "c": 0xFF00FF00, "e": 0xFF00FF0F, "f": 0xFF00FFFF}
    downloads = [gave(name, digests[name], hashes[name]) for name in "abcef"]
    downloads += [gave("d", digests["c"], hashes["c"])]
    rows = [
        row(1, "a", "train"),
        row(2, "c", "test"),
        row(3, "d", "train"),
        row(4, "e", "validation"),
        row(5, "b", "train"),
        row(7, "f", "train"),
    ]
    found = curated(tmp_path, rows, downloads)
    assert [(record.url, record.split) for record in found.records] == [
        ("a", "train"),
        ("c", "test"),
        ("b", "train"),
        ("f", "train"),
    ]
    assert [record.id for record in found.records] == [digests[name][:32] for name in "acbf"]
    kept = f"row 2, which is kept as {digests['c'][:32]}"
    assert [(each.image_id, each.reason, kept in each.message) for each in found.rejected] == [
        ("d", "duplicate-image", True),
        ("e", "near-duplicate", True),
    ]
    assert curated(tmp_path, rows, downloads[::-1]) == found
    exact = curated(tmp_path, rows, downloads, alike_bits=0)
    assert [record.url for record in exact.records] == ["a", "c", "e", "b", "f"]


def test_failures_keep_their_reason_and_those_that_pass_count_as_pictures_set_aside(tmp_path: Path) -> None:
    downloads = [failed("a", "not-found"), failed("b", "time-out", True), gave("c", "c" * 64, 5)]
    found = curated(tmp_path, [row(number, url) for number, url in enumerate("abc")], downloads)
    assert [record.url for record in found.records] == ["c"]
    assert [(each.image_id, each.stage, each.outcome, each.reason, each.transient) for each in found.rejected] == [
        ("a", "fetch", "row-rejected", "not-found", False),
        ("b", "fetch", "image-rejected", "time-out", True),
    ]


def test_redirects_from_host_to_host_are_followed_as_far_as_is_allowed(tmp_path: Path) -> None:
    chain = [moved(f"h{number}", f"h{number + 1}") for number in range(6)] + [gave("h6", "6" * 64, 6)]
    chain += [moved("x", "y"), moved("y", "x")]
    rows = [row(1, "h0"), row(2, "h1"), row(3, "x")]
    found = curated(tmp_path, rows, chain)
    assert [(record.url, record.id) for record in found.records] == [("h1", "6" * 32)]
    assert [(each.image_id, each.reason) for each in found.rejected] == [
        ("h0", "too-many-redirects"),
        ("x", "too-many-redirects"),
    ]


def test_splits_follow_from_the_bytes_where_the_list_names_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    values = [int(value) for value in rng.integers(0, 1 << 64, 400, np.uint64)]
    downloads = [gave(f"u{number}", rng.bytes(32).hex(), value) for number, value in enumerate(values)]
    rows = [row(number, each.url, role="background" if number % 2 else "") for number, each in enumerate(downloads)]
    found = curated(tmp_path, rows, downloads, splits={"train": 0.5, "test": 0.5})
    reversed_order = curated(tmp_path, rows[::-1], downloads, splits={"train": 0.5, "test": 0.5})
    splits = {record.id: record.split for record in found.records}
    assert splits == {record.id: record.split for record in reversed_order.records}
    assert 150 < list(splits.values()).count("train") < 250 and set(splits.values()) == {"train", "test"}
    assert [record.role for record in found.records[:2]] == ["people", "background"]


def test_a_picture_that_was_altered_or_is_gone_is_not_taken(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rows": "r", "rejected": "r", "downloads": (), "pictures": "downloads"}
    weblist = WeblistSettings(urls="list.csv")
    source = DownloadedSource(DownloadedSettings(weblist=weblist, folder=str(tmp_path), **settings))
    (record,) = curated(tmp_path, [row(1, "a")], [gave("a", "a" * 64, 1)]).records
    with pytest.raises(Rejected, match="not-found"):
        source.read_image(record)
    (tmp_path / record.image).parent.mkdir(parents=True)
    (tmp_path / record.image).write_bytes(b"other")
    with pytest.raises(Rejected, match="altered-file") as caught:
        source.read_image(record)
    assert caught.value.transient


def test_a_picture_is_read_where_the_folder_lies_now(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rows": "r", "rejected": "r", "downloads": (), "pictures": "downloads"}
    digest = hashlib.sha256(b"a picture").hexdigest()
    (record,) = curated(tmp_path, [row(1, "a")], [gave("a", digest, 1)]).records
    (tmp_path / "moved" / record.image).parent.mkdir(parents=True)
    (tmp_path / "moved" / record.image).write_bytes(b"a picture")
    weblist = WeblistSettings(urls="list.csv")
    moved = DownloadedSettings(weblist=weblist, folder=str(tmp_path / "moved"), **settings)
    assert moved.open().read_image(record) == b"a picture"
