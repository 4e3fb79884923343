"""What making a composite costs, beside encoding it: with donors cut out already, and with their pictures read for it.

    python benchmarks/composite.py DATASET [--composites 100]

From a dataset's photographs of the split ``train``, as its builds do (`dataset_tools.donor_windows`), by the settings
in its manifest. Of each composite it takes the CPU seconds of this process, on one thread, of

- ``compose``: choosing places, pasting, colours, shadows and masks, without reading donors;
- ``donors``: reading pictures that hold donors and cutting people out, once each;
- ``png``, ``jpeg``: encoding the finished sample (`dataset_tools.schema.Sample.to_parts`), its pictures as either.

Prints medians and the ratio of the whole, with and without donors, to encoding alone; target: at most 1.5 with donors
loaded. Writes ``benchmarks/results/composite.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from itertools import chain, islice
from pathlib import Path
from statistics import median

import cv2
from rich.progress import track

from dataset_tools.compositing import Background, CompositorSettings, compose
from dataset_tools.donor_windows import DonorWindows, donors_of
from dataset_tools.donors import Cutout, CutoutRow
from dataset_tools.errors import Rejected
from dataset_tools.schema import EncodingSettings
from dataset_tools.shards import ShardDataset, read_manifest
from mild.versions import software_versions

RESULT = Path(__file__).parent / "results/composite.json"
SHARDS = 2
"""Of photographs: the neighbourhood."""


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--composites", type=int, default=100)
    given = parser.parse_args()
    cv2.setNumThreads(1)
    manifest = read_manifest(given.dataset)
    settings = CompositorSettings.check(manifest.settings["composite"], origin=given.dataset)
    configuration = manifest.settings["curated"]["configuration"]
    shards = manifest.shards[configuration]["train"][:SHARDS]
    photographs = ShardDataset.of_shards(given.dataset, shards)
    donors = chain.from_iterable(donors_of(given.dataset, shards, settings))
    windows = DonorWindows(donors, photographs.__getitem__, settings.donors, "composite")
    plates = [
        Background(sample.background, sample.origins[0])
        for sample in islice(photographs, given.composites)
        if sample.background is not None
    ]
    encodings = {"png": EncodingSettings(image_format="png"), "jpeg": EncodingSettings()}
    loading = 0.0

    def load(row: CutoutRow) -> Cutout:
        nonlocal loading
        began = time.process_time()
        try:
            return windows.load(row)
        finally:
            loading += time.process_time() - began

    rows: list[dict[str, float]] = []
    rejected = 0
    for number in track(range(given.composites), "composites"):
        loading, began = 0.0, time.process_time()
        try:
            sample = compose(f"{number}", "train", plates[number % len(plates)], windows.rows(number), load, settings)
        except Rejected:
            rejected += 1
            continue
        row = {"compose": time.process_time() - began - loading, "donors": loading, "people": len(sample.people)}
        for kind, encoding in encodings.items():
            began = time.process_time()
            sample.to_parts(encoding)
            row[kind] = time.process_time() - began
        rows.append(row)
    seconds = {name: median(row[name] for row in rows) for name in ("compose", "donors", *encodings)}
    ratios = {
        kind: {
            "donors_loaded": median((row["compose"] + row[kind]) / row[kind] for row in rows),
            "donors_read": median((row["compose"] + row["donors"] + row[kind]) / row[kind] for row in rows),
        }
        for kind in encodings
    }
    result = {
        "command": f"python benchmarks/composite.py DATASET --composites {given.composites}",
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "software": software_versions(),
        "dataset": {"name": manifest.name, "size": settings.size},
        "composites": len(rows),
        "rejected": rejected,
        "people": sum(row["people"] for row in rows) / len(rows),
        "seconds": seconds,
        "against_encoding": ratios,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("seconds", "against_encoding")}, indent=2))


if __name__ == "__main__":
    main()
