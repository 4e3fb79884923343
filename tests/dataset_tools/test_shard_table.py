"""The table beside each shard says what its samples say."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.ndimage import binary_dilation

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from dataset_tools.shard_table import TABLE_SCHEMA, read_shard_table, read_shard_tables, table_bytes
from dataset_tools.shards import Manifest, Problem, ShardDataset, table_path, verify

TRAIN = "composite/train-000000.tar"


def test_it_is_one_row_group_with_a_row_a_sample_in_the_order_of_the_tar(built_dataset: Path) -> None:
    file = pq.ParquetFile(built_dataset / table_path(TRAIN))
    assert file.num_row_groups == 1 and file.schema_arrow == TABLE_SCHEMA
    held = ShardDataset(str(built_dataset), "composite", "train")
    rows = file.read().to_pylist()
    for index, row in enumerate(rows):
        document = held.annotations(index)
        names = ("key", "width", "height", "stratum", "label_set", "known_share", "effects_share", "made_by")
        assert {name: row[name] for name in names} == {name: document[name] for name in names}
        for person, entry in zip(row["people"], document["annotations"], strict=True):
            assert (person["id"], person["box"]) == (entry["source_id"], entry["bbox"])
            same = ("category", "mask_by", "mask_score", "occluded", "truncated", "occlusion")
            assert [person[name] for name in same] == [entry[name] for name in same]
        for origin, entry in zip(row["origins"], document["origins"], strict=True):
            assert origin.pop("blurred") == 0 and origin.items() < entry.items()


def test_who_touches_others_is_what_growing_masks_by_a_pixel_says(
    built_dataset: Path, make_sample: Callable[..., Sample]
) -> None:
    told = [
        row
        for n in (0, 2)
        for row in read_shard_table(str(built_dataset), f"composite/train-{n:06d}.parquet").to_pylist()
    ]
    for row, serial in zip(told, range(5), strict=True):
        masks = [person.mask for person in make_sample("composite", row["key"], people=1 + serial % 3).people]
        touching = set()
        for one, other in combinations(range(len(masks)), 2):
            if (binary_dilation(masks[one], [[1] * 3] * 3) & masks[other]).any():
                touching |= {one, other}
        assert [person["touches"] for person in row["people"]] == [n in touching for n in range(len(masks))]


def test_other_programs_query_it(built_dataset: Path) -> None:
    """DuckDB reads all tables of a configuration by one name with a star."""
    asked = f"""
        SELECT count(*), sum(len(people)), count(DISTINCT key) FROM '{built_dataset}/composite/train-*.parquet'
        WHERE len(list_filter(origins, lambda origin: origin.role = 'background')) = 1
        """
    assert duckdb.sql(asked).fetchall() == [(5, 9, 5)]


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        (lambda rows: rows[1].update(width=65), f"{TRAIN}, sample train-001", "is not what the table says"),
        (lambda rows: rows.pop(), table_path(TRAIN), "has 2 rows, the manifest says 3 samples"),
    ],
    ids=["another width", "a row less"],
)
def test_a_table_that_says_otherwise_is_found(
    dataset: Path, change: Callable[[list[dict[str, Any]]], Any], where: str, what: str
) -> None:
    """Also where its digest is right."""
    rows = read_shard_table(str(dataset), table_path(TRAIN)).to_pylist()
    change(rows)
    data = table_bytes(rows)
    (dataset / table_path(TRAIN)).write_bytes(data)
    assert Problem(table_path(TRAIN), "differs from the manifest's sha256") in verify(str(dataset))
    manifest = Manifest.model_validate_json((dataset / "manifest.json").read_text())
    manifest.shards["composite"]["train"][0].table_sha256 = hashlib.sha256(data).hexdigest()
    (dataset / "manifest.json").write_text(manifest.model_dump_json())
    assert Problem(where, what) in verify(str(dataset))


def test_what_cannot_be_read_is_said_in_one_line(dataset: Path) -> None:
    for damage, told in [(lambda path: path.write_bytes(b"PAR1"), "cannot be read"), (Path.unlink, "is missing")]:
        damage(dataset / table_path(TRAIN))
        with pytest.raises(UserError, match=rf"train-000000\.parquet {told}.*build the dataset again") as caught:
            read_shard_table(str(dataset), table_path(TRAIN))
        assert "\n" not in str(caught.value)


def test_a_table_of_nobody_has_the_same_columns() -> None:
    assert pq.read_table(pa.BufferReader(table_bytes([]))).schema == TABLE_SCHEMA


def test_tables_are_parsed_by_one_thread_however_many_fetch_them(
    built_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each thread that parses keeps memory of its own: with sixteen of them, 400 shards took 90 MB more than 4.
    threads = []
    read = pq.read_table

    def noting(*args: Any, **options: Any) -> pa.Table:
        threads.append(threading.get_ident())
        return read(*args, **options)

    paths = [f"composite/train-{number:06d}.parquet" for number in range(3)]
    monkeypatch.setattr(pq, "read_table", noting)
    tables = list(read_shard_tables(str(built_dataset), paths))
    assert [len(table) for table in tables] == [len(read(built_dataset / path)) for path in paths]
    assert threads == [threading.get_ident()] * 3
