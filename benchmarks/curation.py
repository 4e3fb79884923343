"""Curation at the size of OpenImages, against pandas on the same tables in the same run.

    python benchmarks/curation.py --tables FOLDER

makes tables of the true size, names and columns with random content (once; a folder that already holds them is
used as it is), runs `dataset_tools.curation.curate` over them in one process and the same joins written in pandas
in another, and writes wall time and peak memory of both to ``benchmarks/results/curation.json``.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))

from dataset_tools.curation import CurationSettings, SplitTables, curate
from dataset_tools.records import Split
from dataset_tools.sources.openimages import CLASSES, TABLES
from dataset_tools.tables import BOXES, LABELS, MASKS, METADATA, Kind, Table

SEED = 0
ROWS = {"images": 1_743_042, "boxes": 14_610_229, "masks": 2_686_666, "labels": 30_000_000}
"""Rows of the train split; validation and test get a fortieth. The true label table is larger still."""
PEOPLE = {"Person": "/m/01g317", "Man": "/m/04yx4", "Woman": "/m/03bt1vf", "Boy": "/m/01bl7v", "Girl": "/m/05r655"}
PARTS = {"Human face": "/m/0dzct", "Human arm": "/m/0dzf4", "Human hair": "/m/03q69"}
SHARES = [0.07, 0.097, 0.053, 0.01, 0.015, 0.07, 0.03, 0.03]
"""Share of all boxes that each of these classes has, about as in OpenImages."""
CHUNK = 1_000_000


def make_tables(root: Path, scale: float) -> None:
    """Write the tables of all three splits below ``root``."""
    rng = np.random.default_rng(SEED)
    others = [f"/m/0x{index:04d}" for index in range(601 - len(PEOPLE) - len(PARTS))]
    mids = np.array([*PEOPLE.values(), *PARTS.values(), *others])
    names = [*PEOPLE, *PARTS, *(f"Thing {index}" for index in range(len(others)))]
    _write(root / CLASSES, iter([{"mid": mids, "name": np.array(names)}]), header=False)
    rest = np.full(len(others), (1 - sum(SHARES)) / len(others))
    shares = np.array([*SHARES, *rest])
    parts: dict[Split, float] = {"train": 1.0, "validation": 0.025, "test": 0.025}
    for split, part in parts.items():
        rows = {name: max(int(count * scale * part), 50) for name, count in ROWS.items()}
        _make_split(root, split, rows, mids, shares, rng)
        for name in TABLES[split].values():
            _spoil(root / name)


def _make_split(
    root: Path, split: Split, rows: dict[str, int], mids: np.ndarray, shares: np.ndarray, rng: np.random.Generator
) -> None:
    ids = _hex(np.sort(rng.integers(0, 2**64, rows["images"], dtype=np.uint64)))
    train = split == "train"
    n = rows["boxes"]
    image = np.sort(rng.integers(0, len(ids), n))
    label = rng.choice(len(mids), n, p=shares)
    corner = rng.random((2, n), dtype=np.float32) * 0.7
    size = 0.02 + rng.random((2, n), dtype=np.float32) ** 2 * 0.28
    low, high = np.round(corner, 6), np.round(corner + size, 6)
    flags = {
        name: (rng.random(n, dtype=np.float32) < share).astype(np.int8)
        for name, share in {
            "IsOccluded": 0.6,
            "IsTruncated": 0.25,
            "IsGroupOf": 0.02,
            "IsDepiction": 0.02,
            "IsInside": 0.01,
        }.items()
    }

    def boxes(at: slice) -> dict[str, np.ndarray]:
        columns = {
            "ImageID": ids[image[at]],
            "Source": np.where(image[at] % 10 > 0, "xclick", "activemil"),
            "LabelName": mids[label[at]],
            "Confidence": np.ones(len(image[at]), np.int8),
            "XMin": low[0, at], "XMax": high[0, at], "YMin": low[1, at], "YMax": high[1, at],
            **{name: values[at] for name, values in flags.items()},
        }  # fmt: skip
        if train:
            for index in range(8):
                columns[f"XClick{index // 2 + 1}{'XY'[index % 2]}"] = (low, high)[index // 4][index % 2, at]
        return columns

    _write(root / TABLES[split]["boxes"], (boxes(slice(at, at + CHUNK)) for at in range(0, n, CHUNK)))

    # Masks cluster: an image either has them for its people or for none, as in OpenImages.
    likely = np.where(image % 3 == 0, 1.0, 0.05) * np.where(label < len(PEOPLE), 4.0, 1.0)
    chosen = np.sort(rng.choice(n, min(rows["masks"], n // 2), replace=False, p=likely / likely.sum()))
    box_ids = _hex(rng.integers(0, 2**64, len(chosen), dtype=np.uint64), digits=8)
    quality = np.round(0.6 + 0.4 * rng.random(len(chosen)), 5) if train else np.full(len(chosen), np.nan)

    def masks(at: slice) -> dict[str, np.ndarray]:
        box = chosen[at]
        stem = np.char.add(np.char.add(ids[image[box]], "_"), np.char.replace(mids[label[box]], "/", ""))
        return {
            "MaskPath": np.char.add(np.char.add(np.char.add(stem, "_"), box_ids[at]), ".png"),
            "ImageID": ids[image[box]],
            "LabelName": mids[label[box]],
            "BoxID": box_ids[at],
            "BoxXMin": low[0, box], "BoxXMax": high[0, box], "BoxYMin": low[1, box], "BoxYMax": high[1, box],
            "PredictedIoU": quality[at],
            "Clicks": np.full(len(box), "0.08789 0.54688 0;0.23828 0.51562 1"),
        }  # fmt: skip

    _write(
        root / TABLES[split]["masks"],
        (masks(slice(at, at + CHUNK)) for at in range(0, len(chosen), CHUNK)),
    )

    # The label table covers many images that have no boxes, as in OpenImages.
    every = np.concatenate([ids, _hex(rng.integers(0, 2**64, 3 * len(ids), dtype=np.uint64))])

    def labels(count: int) -> dict[str, np.ndarray]:
        return {
            "ImageID": every[np.sort(rng.integers(0, len(every), count))],
            "Source": np.where(rng.random(count) < 0.9, "verification", "crowdsource-verification"),
            "LabelName": mids[rng.choice(len(mids), count, p=shares)],
            "Confidence": (rng.random(count) < 0.5).astype(np.int8),
        }

    counts = [min(CHUNK, rows["labels"] - at) for at in range(0, rows["labels"], CHUNK)]
    _write(root / TABLES[split]["labels"], (labels(count) for count in counts))

    licences = np.array(
        ["https://creativecommons.org/licenses/by/2.0/", "https://creativecommons.org/licenses/by-nc/2.0/"]
    )

    def metadata(at: slice) -> dict[str, np.ndarray]:
        count = len(ids[at])
        number = np.char.mod("%d", rng.integers(0, 2**40, count))
        digest = rng.integers(0, 256, (count, 16), dtype=np.uint8)
        return {
            "ImageID": ids[at],
            "Subset": np.full(count, split),
            "OriginalURL": np.char.add(np.char.add("https://c1.staticflickr.com/5/", number), "_o.jpg"),
            "OriginalLandingURL": np.char.add("https://www.flickr.com/photos/someone/", number),
            "License": licences[(rng.random(count) < 0.05).astype(int)],
            "AuthorProfileURL": np.char.add("https://www.flickr.com/people/", number),
            "Author": np.char.add("Author, the ", number),
            "Title": np.char.add('A "title" ', number),
            "OriginalSize": rng.integers(1, 2**24, count),
            "OriginalMD5": np.array([base64.b64encode(row.tobytes()).decode() for row in digest]),
            "Thumbnail300KURL": np.char.add(np.char.add("https://c1.staticflickr.com/5/", number), "_z.jpg"),
            "Rotation": np.where(rng.random(count) < 0.9, rng.choice([0.0, 0.0, 0.0, 90.0, 270.0], count), np.nan),
        }

    _write(
        root / TABLES[split]["metadata"],
        (metadata(slice(at, at + CHUNK)) for at in range(0, len(ids), CHUNK)),
    )


def tables_in(root: Path) -> tuple[Table, dict[Split, SplitTables]]:
    """The tables below ``root``, as the openimages source finds them."""
    tables = {
        split: SplitTables(**{kind: Table(str(root / name), name) for kind, name in names.items()})
        for split, names in TABLES.items()
    }
    return Table(str(root / CLASSES), CLASSES), tables


def run_curation(root: Path) -> list[tuple[str, str, str]]:
    """Split, stratum and id of the images that this project's curation chooses."""
    curation = curate(*tables_in(root), CurationSettings(), lambda split, image: f"{split}/{image}.jpg")
    print(f"{len(curation.rejected)} rows or images rejected", file=sys.stderr)
    return [(record.split, record.stratum, record.id) for record in curation.records]


def run_pandas(root: Path) -> list[tuple[str, str, str]]:
    """The same, written in pandas for whole tables in memory; bad rows are dropped, not reported."""
    settings = CurationSettings()
    people, parts = list(PEOPLE.values()), list(PARTS.values())
    candidates = []
    for split, names in TABLES.items():
        masks = _read(root / names["masks"], MASKS)
        masks = masks[masks["LabelName"].isin(people)].drop_duplicates(["ImageID", "BoxID"])
        boxes = _read(root / names["boxes"], BOXES)
        boxes = boxes[boxes["LabelName"].isin(people + parts)]
        persons = boxes[boxes["LabelName"].isin(people) & boxes["ImageID"].isin(masks["ImageID"])]
        found = _pictures_of_people(masks, persons.drop_duplicates(), settings)

        labels = _read(root / names["labels"], LABELS)
        labels = labels[labels["LabelName"].isin(people + parts)]
        absent = labels[(labels["LabelName"] == PEOPLE["Person"]) & (labels["Confidence"] == 0)]["ImageID"]
        present = pd.concat([labels[labels["Confidence"] > 0]["ImageID"], boxes["ImageID"], masks["ImageID"]])
        empty = pd.DataFrame({"ImageID": absent[~absent.isin(present)].unique(), "stratum": ""})

        metadata = _read(root / names["metadata"], METADATA).drop_duplicates("ImageID")
        listed = pd.concat([found, empty]).merge(metadata, on="ImageID")
        candidates.append(listed[listed["License"].str.startswith(settings.licences)].assign(split=split))
    every = pd.concat(candidates)
    every["rank"] = every["split"].map({"test": 0, "validation": 1, "train": 2})
    every = every.sort_values(["rank", "ImageID"]).drop_duplicates("ImageID")
    every = every[every["OriginalMD5"].isna() | ~every.duplicated("OriginalMD5")]
    every["place"] = [hashlib.md5(f"{settings.seed}{image}".encode()).hexdigest() for image in every["ImageID"]]
    every = every.sort_values("place")
    limits = [math.inf if limit is None else limit for limit in (settings.backgrounds, settings.images_per_stratum)]
    most = np.where(every["stratum"] == "", *limits)
    every = every[every.groupby(["split", "stratum"]).cumcount() < most]
    return list(zip(every["split"], every["stratum"], every["ImageID"], strict=True))


def _read(path: Path, kind: Kind) -> pd.DataFrame:
    frame = pd.read_csv(path, usecols=list(kind.columns), on_bad_lines="skip")
    return frame[
        frame["ImageID"].str.fullmatch("[0-9a-f]{16}").eq(True) & frame[list(kind.required)].notna().all(axis=1)
    ]


def _pictures_of_people(masks: pd.DataFrame, boxes: pd.DataFrame, settings: CurationSettings) -> pd.DataFrame:
    sides = ["XMin", "XMax", "YMin", "YMax"]
    masks = masks.rename(columns={f"Box{side}": side for side in sides})
    everyone = pd.concat([masks[["ImageID", "LabelName", "BoxID", "PredictedIoU", *sides]], boxes])
    everyone["no_mask"] = everyone["BoxID"].isna()
    everyone["general"] = everyone["LabelName"] == PEOPLE["Person"]
    order = ["ImageID", "no_mask", "PredictedIoU", "general", "BoxID", "LabelName", "XMin", "YMin", "XMax", "YMax"]
    everyone = everyone.sort_values(order, ascending=[name != "PredictedIoU" for name in order], ignore_index=True)
    everyone["person"] = everyone.index
    everyone["area"] = (everyone["XMax"] - everyone["XMin"]) * (everyone["YMax"] - everyone["YMin"])

    pairs = _pairs(everyone)
    width = np.minimum(pairs["XMax"], pairs["XMax_b"]) - np.maximum(pairs["XMin"], pairs["XMin_b"])
    height = np.minimum(pairs["YMax"], pairs["YMax_b"]) - np.maximum(pairs["YMin"], pairs["YMin_b"])
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    same = pairs[shared >= settings.same_person_iou * (pairs["area"] + pairs["area_b"] - shared)]
    persons = everyone[~everyone["person"].isin(same["person_b"])]
    masked = persons[~persons["no_mask"]]
    pairs = _pairs(masked)
    meeting = (pairs["XMin"] <= pairs["XMax_b"]) & (pairs["XMin_b"] <= pairs["XMax"])
    meeting &= (pairs["YMin"] <= pairs["YMax_b"]) & (pairs["YMin_b"] <= pairs["YMax"])

    crowd = masked.groupby("ImageID").agg(masked=("person", "size"), least=("area", "min"), greatest=("area", "max"))
    crowd["unmasked"] = persons[persons["no_mask"]].groupby("ImageID").size()
    unwanted = boxes[(boxes["IsGroupOf"] == 1) | (boxes["IsDepiction"] == 1)]["ImageID"]
    crowd = crowd[
        (crowd["masked"] >= settings.min_people)
        & (crowd["unmasked"].fillna(0) <= settings.max_unmasked_people)
        & (crowd["least"] >= settings.min_box_area)
        & (crowd["greatest"] <= settings.max_box_area)
        & ~crowd.index.isin(unwanted)
    ]
    stratum = np.select([crowd["masked"] == 1, crowd["masked"] <= 3], ["one", "two_or_three"], "four_or_more")
    stratum = np.where(crowd.index.isin(pairs[meeting]["ImageID"]), "overlapping", stratum)
    return pd.DataFrame({"ImageID": crowd.index, "stratum": stratum})


def _pairs(people: pd.DataFrame) -> pd.DataFrame:
    columns = people[["ImageID", "person", "XMin", "XMax", "YMin", "YMax", "area"]]
    pairs = columns.merge(columns, on="ImageID", suffixes=("", "_b"))
    return pairs[pairs["person"] < pairs["person_b"]]


def measure(name: str, root: Path) -> dict[str, Any]:
    """Run one implementation in a process of its own."""
    return dict(json.loads(_start(name, root, 0)))


def _start(task: str, root: Path, scale: float) -> bytes:
    # This process stays small: on Linux a child's ru_maxrss is never less than what its parent had when it started it.
    command = [sys.executable, __file__, "--only", task, "--tables", str(root), "--scale", str(scale)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout


def run_here(name: str, root: Path) -> None:
    """Run one implementation and print what it took; imports are not counted."""
    start, cpu = time.perf_counter(), time.process_time()
    chosen = {"curation": run_curation, "pandas": run_pandas}[name](root)
    result = {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "images": len(chosen),
        "digest": hashlib.sha256(json.dumps(sorted(chosen)).encode()).hexdigest(),
    }
    print(json.dumps(result))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in ("duckdb", "pandas", "pyarrow")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time curation at the size of OpenImages against pandas.")
    parser.add_argument("--tables", type=Path, help="folder for the tables (5 GB); made there once; default: temporary")
    parser.add_argument("--scale", type=float, default=1.0, help="1 is the true size")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/curation.json")
    parser.add_argument("--only", choices=["tables", "curation", "pandas"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only == "tables":
        make_tables(arguments.tables, arguments.scale)
        return
    if arguments.only:
        run_here(arguments.only, arguments.tables)
        return
    with tempfile.TemporaryDirectory(prefix="curation-benchmark-") as temporary:
        root = arguments.tables or Path(temporary)
        if not (root / CLASSES).exists():
            _start("tables", root, arguments.scale)
        size = sum(path.stat().st_size for path in root.rglob("*.csv"))
        results = {name: measure(name, root) for name in ("curation", "pandas")}
    report = {
        "command": f"python benchmarks/curation.py --scale {arguments.scale:g}",
        "seed": SEED,
        "rows_of_train": {name: int(count * arguments.scale) for name, count in ROWS.items()},
        "tables_gb": round(size / 1e9, 2),
        "machine": machine(),
        **results,
        "pandas_takes_times_as_long": round(results["pandas"]["seconds"] / results["curation"]["seconds"], 1),
        "pandas_takes_times_the_memory": round(
            results["pandas"]["peak_memory_gb"] / results["curation"]["peak_memory_gb"], 1
        ),
        "both_choose_the_same_images": results["curation"]["digest"] == results["pandas"]["digest"],
    }
    print(json.dumps(report, indent=2))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def _spoil(path: Path) -> None:
    """Add a row that is cut short, one with an id that leaves the folder, and one that is there already."""
    with path.open("r+", encoding="utf-8") as file:
        header, good = file.readline().rstrip().split(","), file.readline()
        image = good.split(",")[header.index("ImageID")]
        file.seek(0, os.SEEK_END)
        file.write(f"{good[:20]}\n{good.replace(image, '../' + image[3:])}{good}")


def _hex(values: np.ndarray, digits: int = 16) -> np.ndarray:
    """The last hex digits of uint64 values, as fixed-width strings."""
    shifts = np.arange(4 * (digits - 1), -4, -4, dtype=np.uint64)
    nibbles = (values[:, None] >> shifts) & np.uint64(15)
    return np.frombuffer(b"0123456789abcdef", np.uint8)[nibbles].view(f"S{digits}")[:, 0].astype(f"U{digits}")


def _write(path: Path, chunks: Iterable[dict[str, np.ndarray]], header: bool = True) -> None:
    """Write chunks of columns as one CSV file that quotes only what needs it, as OpenImages' files do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = (
        pa.table({name: pa.array(values, from_pandas=True) for name, values in chunk.items()}) for chunk in chunks
    )
    first = next(tables)
    batches = (batch for table in chain([first], tables) for batch in table.to_batches())
    reader = pa.RecordBatchReader.from_batches(first.schema, batches)  # noqa: F841 (the query below names it)
    with duckdb.connect() as connection:
        connection.execute(f"COPY (FROM reader) TO '{path}' (FORMAT csv, HEADER {header})")


if __name__ == "__main__":
    main()
