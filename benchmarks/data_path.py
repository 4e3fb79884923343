"""How quickly training is fed: examples of MILD, beside plain decoding of the same shards by webdataset.

    python benchmarks/data_path.py

In one run, of composite samples with two people, 512 px, in shards on the local disk, with 0, 1 and 2 workers:

- ``examples``: samples a second of `mild.training.data`, read, decoded and made into what both branches learn from
  (`states: visited`, crops like windows, cues), batches of 4, with nobody who computes;
- ``decoding``: samples a second of webdataset in torch's ``DataLoader`` with the same workers, all parts of a sample
  decoded and nothing made of them: what any training on these shards pays;
- ``waiting``: the share of a step in which the training thread waits for its examples, where the device takes as long
  for the rest as an H200 does (the median of ``results/training-sdxl-nvidia-h200.json``; the thread sleeps).

Workers start before the clock does. Results go to ``benchmarks/results/data-path.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import webdataset
from inference import SEED, row_of_people
from torch.utils.data import DataLoader

from dataset_tools.schema import EncodingSettings, Person, Sample
from dataset_tools.shards import Manifest, ShardDataset, write_shard
from mild.settings import TrainSettings
from mild.training.data import TrainingData, Work, fed
from mild.versions import software_versions

SIDE, PEOPLE, BATCH = 512, 2, 4
WORKERS = (0, 1, 2)
RESULTS = Path(__file__).parent / "results"
STEP = median(json.loads((RESULTS / "training-sdxl-nvidia-h200.json").read_text())["runs"]["mild"]["seconds"])
"""Seconds of a step of 4 on an H200."""


def sample_of(number: int) -> Sample:
    """A composite whose people hide one another, as smooth and as rough as a photograph."""
    random = np.random.default_rng([SEED, number])
    masks = row_of_people(SIDE)[:PEOPLE]
    coarse = random.integers(0, 256, (2, SIDE // 8, SIDE // 8, 3), np.uint8)
    background, clothes = (cv2.resize(one, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for one in coarse)
    image, parsing = background.copy(), np.zeros((SIDE, SIDE), np.uint8)
    people = []
    for k, mask in enumerate(masks):
        image[mask], parsing[mask] = clothes[mask], 5
        seen = mask & ~masks[k + 1 :].any(0)
        joints = np.column_stack([random.permutation(np.argwhere(mask))[:18, ::-1], np.ones(18)]).astype(np.float32)
        layer = np.dstack([clothes * mask[..., None], mask * np.uint8(255)])
        hidden = float(1 - seen.sum() / mask.sum())
        person = Person(str(k), seen, keypoints=joints, complete_mask=mask, layer=layer, order=k, occlusion=hidden)
        person.augmented_mask = np.roll(seen, 4, axis=0)
        people.append(person)
    return Sample(f"sample-{number}", "train", "composite", image, people, parsing, "lip", [], background=background)


def write_dataset(root: str, samples: int) -> ShardDataset:
    """Samples in two shards."""
    halves = [range(samples // 2), range(samples // 2, samples)]
    shards = [
        write_shard(map(sample_of, half), root, f"composite/train-{number:06d}.tar", EncodingSettings(), [])
        for number, half in enumerate(halves)
    ]
    held = {"composite": {"train": shards}}
    manifest = Manifest(name="drawn", shards=held, files={}, source="", settings={}, software={})
    Path(root, "manifest.json").write_text(manifest.model_dump_json())
    return ShardDataset(root, "composite", "train")


@contextlib.contextmanager
def examples(samples: ShardDataset, workers: int) -> Iterator[Iterator[Any]]:
    """Batches without end."""
    settings = TrainSettings(
        workers=workers, batch_size=BATCH, resolution=SIDE, states="visited", crop="window", flip=0.5, seed=SEED
    )
    data = TrainingData(samples, settings, settings.mild.hmg, (4, SIDE // 8, SIDE // 8), 1000, None)
    indices = itertools.cycle(range(len(samples)))
    works = (Work(step, ("bg", "fg"), tuple(itertools.islice(indices, BATCH))) for step in itertools.count())
    with contextlib.closing(fed(data, works)) as feed:
        yield feed


@contextlib.contextmanager
def decoding(samples: ShardDataset, workers: int) -> Iterator[Iterator[Any]]:
    """Samples without end."""
    paths = [f"{samples.root}/{shard.path}" for shard in samples.shards]
    dataset = webdataset.WebDataset(paths, shardshuffle=False, resampled=True, seed=SEED).decode("rgb8")
    yield iter(DataLoader(dataset, batch_size=None, num_workers=workers))


def speed(feed: Iterator[Any], each: int, samples: int) -> float:
    """Samples a second of a feed that gives ``each`` at a time, after the first of every worker."""
    for _ in range(max(WORKERS)):
        next(feed)
    started = time.perf_counter()
    for _ in range(samples // each):
        next(feed)
    return samples / (time.perf_counter() - started)


def waiting(feed: Iterator[Any], steps: int) -> float:
    """Share of the time of some steps in which their examples are waited for."""
    for _ in range(max(WORKERS)):
        next(feed)
    waited = 0.0
    for _ in range(steps):
        time.sleep(STEP)
        started = time.perf_counter()
        next(feed)
        waited += time.perf_counter() - started
    return waited / (waited + steps * STEP)


def main() -> None:
    """Measure all in turn, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=48, help="to be timed, of as many in the shards")
    parser.add_argument("--steps", type=int, default=8, help="in which waiting is measured")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    runs: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        samples = write_dataset(folder, given.samples)
        for workers in WORKERS:
            with examples(samples, workers) as feed:
                made = speed(feed, BATCH, given.samples)
            with decoding(samples, workers) as feed:
                decoded = speed(feed, 1, given.samples)
            with examples(samples, workers) as feed:
                share = waiting(feed, given.steps)
            runs[f"{workers} workers"] = {"examples": made, "decoding": decoded, "waiting": share}
            print(
                f"{workers} workers: {made:.1f} samples/s, decoding alone {decoded:.1f}, waiting {share:.0%}",
                flush=True,
            )
    first = runs["0 workers"]
    result = {
        "command": f"python benchmarks/data_path.py --samples {given.samples} --steps {given.steps}",
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "software": software_versions(),
        "settings": {
            "side": SIDE,
            "people": PEOPLE,
            "batch": BATCH,
            "seconds_of_a_step": STEP,
            "seed": SEED,
            "load_average_at_start": load,
        },
        "runs": runs,
        "ratios": {
            **{f"examples / decoding, {name}": run["examples"] / run["decoding"] for name, run in runs.items()},
            **{f"examples, {name} / 0 workers": run["examples"] / first["examples"] for name, run in runs.items()},
        },
    }
    RESULTS.joinpath("data-path.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
