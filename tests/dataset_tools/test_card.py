"""The card, Croissant metadata, attribution and the table of what was set aside."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from dataset_tools.card import hub_licence, write_card
from dataset_tools.records import Rejection, cell_to_text, rejections_to_table
from dataset_tools.schema import EncodingSettings, Sample
from dataset_tools.shards import Manifest, read_manifest, write_shard

NOTHING = rejections_to_table([])


def front_matter(root: Path) -> dict[str, Any]:
    _, front, _ = (root / "README.md").read_text().split("---\n", 2)
    data: dict[str, Any] = yaml.safe_load(front)
    return data


def attribution(root: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((root / "attribution.csv").read_bytes().decode(), newline="")))


def test_the_returned_digests_are_those_of_the_files_and_no_file_is_left_out(built_dataset: Path) -> None:
    files = read_manifest(str(built_dataset)).files
    assert set(files) == {
        "README.md",
        "croissant.json",
        "attribution.csv",
        "rejected.parquet",
        "card/real-train.png",
        "card/paired-validation.png",
        "card/composite-train.png",
        "card/composite-test.png",
    }
    for name, sha256 in files.items():
        assert hashlib.sha256((built_dataset / name).read_bytes()).hexdigest() == sha256


def test_the_same_data_gives_the_same_bytes_at_another_place(
    built_dataset: Path, build_dataset: Callable[[str], Manifest], tmp_path: Path
) -> None:
    again = build_dataset(str(tmp_path / "elsewhere"))
    assert again.files == read_manifest(str(built_dataset)).files
    assert again.digest() == read_manifest(str(built_dataset)).digest()


def test_the_front_matter_is_what_the_hub_reads(built_dataset: Path) -> None:
    front = front_matter(built_dataset)
    assert front["license"] == ["cc-by-2.0"]
    assert front["size_categories"] == ["n<1K"]
    assert front["pretty_name"] == "Drawn people"
    assert "shadow-removal" in front["tags"] and "reflection-removal" not in front["tags"]
    patterns = {
        (config["config_name"], item["split"]): item["path"]
        for config in front["configs"]
        for item in config["data_files"]
    }
    for (configuration, split), pattern in patterns.items():
        found = sorted(path.name for path in built_dataset.glob(pattern))
        listed = read_manifest(str(built_dataset)).shards[configuration][split]
        assert found == [shard.path.split("/")[1] for shard in listed if shard.samples]
        assert found
    assert ("real", "test") not in patterns, "a split without a tar would break load_dataset"
    assert len(patterns) == 4


def test_the_card_shows_pictures_that_exist_counts_and_reasons(built_dataset: Path) -> None:
    text = (built_dataset / "README.md").read_text()
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(links) == 4
    for link in links:
        picture = np.asarray(Image.open(built_dataset / link))
        assert picture.shape[1] > 500
        assert picture.std() > 10
    assert "| composite | train | 5 | 9 | 2 |" in text
    assert "| composite | train | 2 | 2 | 1 | 0 | 0 | 0 | 22% | 40% |" in text
    assert "| composite | train | composited 5 | photograph 5 | 100% | 100% | 0% | 100% | 100% | 100% |" in text
    assert "| paired | validation | none 2 | video 2 | 0% | - | - | - | 97% | 100% |" in text
    assert "| `KEY.effects.png` | real, paired, composite | " in text and "| `KEY.known.png` | paired | " in text
    assert "| decode | truncated-image | image-rejected | 2 |" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == {
        "seed": 7,
        "shards": {"samples": 3},
        "encoding": {"image_format": "png"},
    }


def test_every_markdown_table_has_rows_as_wide_as_its_head(built_dataset: Path) -> None:
    block: list[int] = []
    for line in [*(built_dataset / "README.md").read_text().splitlines(), ""]:
        if line.startswith("|"):
            block.append(len(re.findall(r"(?<!\\)\|", line)))
        elif block:
            assert len(block) > 2
            assert len(set(block)) == 1
            block = []


def test_every_source_picture_is_credited_once(built_dataset: Path, make_sample: Callable[..., Sample]) -> None:
    plan = [("real", "train", 5), ("paired", "validation", 2), ("composite", "train", 5), ("composite", "test", 2)]
    truth: dict[tuple[str, str], dict[str, str]] = {}
    for configuration, split, count in plan:
        for i in range(count):
            for origin in make_sample(configuration, f"{split}-{i:03d}", split, people=1 + i % 3).origins:
                row = truth.setdefault((origin.source, origin.id), {**asdict(origin), "split": split, "roles": ""})
                row["roles"] = ";".join(sorted({*filter(None, row["roles"].split(";")), row.pop("role", origin.role)}))
                row.pop("transform", None)
    rows = attribution(built_dataset)
    assert [(row["source"], row["id"]) for row in rows] == sorted(truth)
    assert rows == [truth[place] for place in sorted(truth)]


def test_names_with_commas_quotes_and_line_ends_survive_in_the_attribution(
    make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    sample = make_sample("real")
    title, author = 'One, "two"\nthree; | four', "Ærøskøbing\r日本"
    sample = replace(sample, origins=[replace(sample.origins[0], title=title, author=author, licence="a | b\nc")])
    shard = write_shard([sample], str(tmp_path), "real/train-000000.tar", EncodingSettings(), [])
    write_card(str(tmp_path), "A: name", "Text.", {"real": {"train": [shard]}}, {}, NOTHING)
    (row,) = attribution(tmp_path)
    assert (row["title"], row["author"]) == (title, author)
    assert r"| a \| b c | 1 |" in (tmp_path / "README.md").read_text()
    assert front_matter(tmp_path)["license"] == ["other"]
    assert front_matter(tmp_path)["pretty_name"] == "A: name"
    assert "image.jpg" in (tmp_path / "README.md").read_text()


def test_rejected_rows_come_back_and_their_bytes_do_not_depend_on_their_order(tmp_path: Path) -> None:
    rows = [
        Rejection("train", f"i{i}", "", "fetch", "image-rejected", "http-404", f"m{i}", i % 2 > 0) for i in range(50)
    ]
    shuffled = rows.copy()
    random.Random(1).shuffle(shuffled)
    table = rejections_to_table(rows)
    pieces = pyarrow.Table.from_pylist([asdict(row) for row in shuffled], schema=table.schema)
    pieces = pyarrow.concat_tables([pieces.slice(30), pieces.slice(0, 30)])
    digests = {
        write_card(str(tmp_path / name), "x", "x", {}, {}, given)["rejected.parquet"]
        for name, given in [("a", table), ("b", pieces)]
    }
    assert len(digests) == 1
    back = pyarrow.parquet.read_table(tmp_path / "a" / "rejected.parquet").to_pylist()
    assert {Rejection(**row) for row in back} == set(rows)


def test_a_dataset_without_a_sample_has_a_card_too(tmp_path: Path) -> None:
    shard = write_shard([], str(tmp_path), "real/train-000000.tar", EncodingSettings(), [])
    files = write_card(str(tmp_path), "Nothing", "Nothing came through.", {"real": {"train": [shard]}}, {}, NOTHING)
    assert set(files) == {"README.md", "croissant.json", "attribution.csv", "rejected.parquet"}
    assert front_matter(tmp_path)["configs"] == []


@pytest.mark.parametrize(
    ("licence", "known_as"),
    [
        ("https://creativecommons.org/licenses/by/2.0/", "cc-by-2.0"),
        ("http://creativecommons.org/licenses/by-nc-sa/3.0/deed.en", "cc-by-nc-sa-3.0"),
        ("https://creativecommons.org/licenses/by-sa/2.0/", "other"),  # the hub has no id for it
        ("https://creativecommons.org/publicdomain/zero/1.0/", "cc0-1.0"),
        ("CC BY 4.0", "cc-by-4.0"),
        ("CC0-1.0", "cc0-1.0"),
        ("Apache-2.0", "apache-2.0"),
        ("all rights reserved", "other"),
        ("", "other"),
    ],
)
def test_licences_get_the_ids_of_the_hub(licence: str, known_as: str) -> None:
    assert hub_licence(licence) == known_as


READ_CROISSANT = """
import hashlib, json, sys
import mlcroissant

dataset = mlcroissant.Dataset("croissant.json")
assert not dataset.metadata.ctx.issues.errors, dataset.metadata.ctx.issues.report()
found = {"conformsTo": str(dataset.metadata.ctx.conforms_to.value), "records": {}}
for record_set in dataset.metadata.record_sets:
    records = found["records"][record_set.name] = {}
    for record in dataset.records(record_set.id):
        key, value = (record[field.id] for field in record_set.fields)
        if hasattr(value, "tobytes"):
            value = hashlib.sha256(value.tobytes()).hexdigest()
        else:
            value = json.loads(value)["key"]
        records[key.decode()] = value
json.dump(found, sys.stdout)
"""


@pytest.mark.process
def test_mlcroissant_validates_the_metadata_and_reads_the_records_back(
    built_dataset: Path, make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    # mlcroissant keeps what it extracted by relative path, so a cache of its own keeps other datasets out
    environment = {**os.environ, "CROISSANT_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", READ_CROISSANT]
    done = subprocess.run(command, cwd=built_dataset, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    plan = {"real": [("train", 5)], "paired": [("validation", 2)], "composite": [("train", 5), ("test", 2)]}
    records: dict[str, dict[str, str]] = {}
    for configuration, splits in plan.items():
        for split, count in splits:
            for i in range(count):
                sample = make_sample(configuration, f"{split}-{i:03d}", split, people=1 + i % 3)
                parts = {"": sample.image, "_parsing": sample.parsing, "_background": sample.background}
                parts["_effects"] = np.full_like(sample.parsing, 255) if sample.effects is None else sample.effects
                parts["_known"] = None if sample.known is None else sample.known * np.uint8(255)
                if configuration == "composite":
                    parts["_layers"] = np.concatenate([p.layer for p in sample.people if p.layer is not None])
                for part, array in parts.items():
                    if array is not None:
                        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
                        records.setdefault(configuration + part, {})[sample.key] = digest
                records.setdefault(f"{configuration}_annotations", {})[sample.key] = sample.key
    assert found["records"] == records


def test_the_metadata_lists_every_tar_and_table_with_its_digest(built_dataset: Path) -> None:
    document = json.loads((built_dataset / "croissant.json").read_text())
    files = {item["@id"]: item["sha256"] for item in document["distribution"] if item["@type"] == "cr:FileObject"}
    on_disk = [*built_dataset.glob("*/*.tar"), built_dataset / "attribution.csv", built_dataset / "rejected.parquet"]
    assert files == {
        str(path.relative_to(built_dataset)): hashlib.sha256(path.read_bytes()).hexdigest() for path in on_disk
    }
    assert document["license"] == ["https://creativecommons.org/licenses/by/2.0/"]


def test_titles_that_spreadsheets_would_run_are_text(make_sample: Callable[..., Sample], tmp_path: Path) -> None:
    """And our own reader of such a file has the title again."""
    title, author = '=HYPERLINK("http://evil.example","x")', "@SUM(1+1)"
    sample = make_sample("real")
    sample.origins = [replace(sample.origins[0], title=title, author=author, url="-1", landing_url="'=1")]
    shard = write_shard([sample], str(tmp_path), "real/train-000000.tar", EncodingSettings(), [])
    write_card(str(tmp_path), "x", "", {"real": {"train": [shard]}}, {}, NOTHING)
    (row,) = attribution(tmp_path)
    assert (row["title"], row["author"], row["url"], row["landing_url"]) == (f"'{title}", f"'{author}", "'-1", "''=1")
    assert [cell_to_text(row[name]) for name in ("title", "author", "url", "landing_url")] == [
        title, author, "-1", "'=1"
    ]  # fmt: skip
