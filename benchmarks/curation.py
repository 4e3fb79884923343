"""Curation at the size of OpenImages, against pandas on the same tables in the same run.

    python benchmarks/curation.py --tables FOLDER

makes tables of the true size, names and columns with random content (once; a folder that already holds them is
used as it is), runs `dataset_tools.curation.curate` over them in one process and the same joins written in pandas
in another, and writes wall time and peak memory of both to ``benchmarks/results/curation.json``.
"""

from __future__ import annotations

import argparse
import base64
import json
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
import pyarrow as pa

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
    _write(root / "v5/class-descriptions-boxable.csv", iter([{"mid": mids, "name": np.array(names)}]), header=False)
    rest = np.full(len(others), (1 - sum(SHARES)) / len(others))
    shares = np.array([*SHARES, *rest])
    for split, part in {"train": 1.0, "validation": 0.025, "test": 0.025}.items():
        rows = {name: max(int(count * scale * part), 50) for name, count in ROWS.items()}
        _make_split(root, split, rows, mids, shares, rng)


def _make_split(
    root: Path, split: str, rows: dict[str, int], mids: np.ndarray, shares: np.ndarray, rng: np.random.Generator
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
        for name, share in {"IsOccluded": 0.6, "IsTruncated": 0.25, "IsGroupOf": 0.02, "IsDepiction": 0.02, "IsInside": 0.01}.items()
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

    name = "v6/oidv6-train-annotations-bbox.csv" if train else f"v5/{split}-annotations-bbox.csv"
    _write(root / name, (boxes(slice(at, at + CHUNK)) for at in range(0, n, CHUNK)))

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
        root / f"v5/{split}-annotations-object-segmentation.csv",
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

    short = {"train": "train", "validation": "val", "test": "test"}[split]
    counts = [min(CHUNK, rows["labels"] - at) for at in range(0, rows["labels"], CHUNK)]
    _write(root / f"v7/oidv7-{short}-annotations-human-imagelabels.csv", (labels(count) for count in counts))

    licences = np.array(["https://creativecommons.org/licenses/by/2.0/", "https://creativecommons.org/licenses/by-nc/2.0/"])

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

    middle = "train/train-images-boxable" if train else f"{split}/{split}-images"
    _write(
        root / f"2018_04/{middle}-with-rotation.csv",
        (metadata(slice(at, at + CHUNK)) for at in range(0, len(ids), CHUNK)),
    )


def _hex(values: np.ndarray, digits: int = 16) -> np.ndarray:
    """The last hex digits of uint64 values, as fixed-width strings."""
    shifts = np.arange(4 * (digits - 1), -4, -4, dtype=np.uint64)
    nibbles = (values[:, None] >> shifts) & np.uint64(15)
    return np.frombuffer(b"0123456789abcdef", np.uint8)[nibbles].view(f"S{digits}")[:, 0].astype(f"U{digits}")


def _write(path: Path, chunks: Iterable[dict[str, np.ndarray]], header: bool = True) -> None:
    """Write chunks of columns as one CSV file that quotes only what needs it, as OpenImages' files do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = (pa.table({name: pa.array(values, from_pandas=True) for name, values in chunk.items()}) for chunk in chunks)
    first = next(tables)
    batches = (batch for table in chain([first], tables) for batch in table.to_batches())
    reader = pa.RecordBatchReader.from_batches(first.schema, batches)  # noqa: F841 (the query below names it)
    with duckdb.connect() as connection:
        connection.execute(f"COPY (FROM reader) TO '{path}' (FORMAT csv, HEADER {header})")
