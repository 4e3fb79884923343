"""How well people are completed whom somebody in front hid in part (figure 8), on composites, which know the truth.

    python benchmarks/completion.py DATASET [--adapters FOLDER] [--split validation] [--samples 60]

From each sample, all who stand in front of one person vanish, by the masks of what is seen of everybody, which is all
that a user or a network has; nobody else changes. In the part of the person that they hid, as far as nobody who stays
hides it too:

- IoU of where the person is completed with where they really are, among the pixels of those who vanished;
- PSNR in dB of the result, against the same picture where the background is painted there instead (the same adapters
  without extents, which take masks at their word), with the paired difference.

Means over people with 95 % bootstrap intervals go to the terminal and, of the split ``test``, to
``benchmarks/results/completion.json``. Targets: an IoU of 0.6, and 2 dB above the background.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from dataset_tools.schema import Sample
from dataset_tools.shards import ShardDataset
from mild.erasing.extents import REACH
from mild.erasing.pipeline import Erased, MILDPipeline
from mild.evaluation.summarize import estimate
from mild.metrics.psnr import psnr_hole
from mild.seeds import derived_seed
from mild.versions import software_versions

LEAST = 150
"""Pixels of somebody that must come free."""


def opened(description: str | None) -> tuple[argparse.Namespace, MILDPipeline, ShardDataset]:
    """What the command line names: itself, the adapters and the composites."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--adapters", default="mild-nano-adapters")
    parser.add_argument("--split", default="test")
    parser.add_argument("--samples", type=int, default=60)
    chosen = parser.parse_args()
    pipeline = MILDPipeline.from_pretrained(chosen.adapters)
    pipeline.set_progress_bar_config(disable=True)
    return chosen, pipeline, ShardDataset(chosen.dataset, "composite", chosen.split)


def freed(sample: Sample, index: int) -> tuple[list[int], np.ndarray]:
    """Who stands in front of a person, and what of that person they alone hide, (H, W) bool."""
    person = sample.people[index]
    assert person.complete_mask is not None and person.order is not None
    front = [k for k, other in enumerate(sample.people) if (other.order or 0) > person.order]
    before = np.logical_or.reduce([np.zeros_like(person.mask), *(sample.people[k].mask for k in front)])
    return front, person.complete_mask & before


def hidden_people(sample: Sample) -> Iterator[tuple[int, list[int], np.ndarray]]:
    """Index of each person of whom enough comes free, and what `freed` says of them."""
    for index, person in enumerate(sample.people):
        front, part = freed(sample, index)
        if np.count_nonzero(part) >= LEAST and person.mask.any():
            yield index, front, part


def overlap(result: Erased, sample: Sample, index: int, front: list[int], part: np.ndarray) -> float:
    """IoU of where a person is completed with the ``part`` that is theirs, among the pixels of those in front."""
    seen = result.layers[index][..., 3] > 127
    before = np.logical_or.reduce([sample.people[k].mask for k in front])
    return np.count_nonzero(seen & part) / np.count_nonzero((seen & before) | part)


def true_colours(sample: Sample, index: int) -> np.ndarray:
    """(H, W, 3) uint8: background and the person's complete layer over it."""
    layer = sample.people[index].layer
    assert layer is not None and sample.background is not None
    under, over = sample.background.astype(np.float32), layer.astype(np.float32)
    return np.rint(under + over[..., 3:] / 255 * (over[..., :3] - under)).astype(np.uint8)


def erased(pipeline: MILDPipeline, sample: Sample, front: list[int], reach: float | None, cues: bool = True) -> Erased:
    """The picture without those in front; HMG sees pose and parsing where ``cues`` says so."""
    known = cues and sample.label_set != "none"
    return pipeline(
        sample.image,
        [person.mask for person in sample.people],
        remove=front,
        pose=np.stack([person.keypoints for person in sample.people]) if cues else None,
        parsing=sample.parsing if known else None,
        label_set=sample.label_set if known else "lip",
        reach=reach,
        margin=0,
        generator=torch.Generator().manual_seed(derived_seed(0, sample.key)),
        output_type="np",
    )


def shown(value: dict[str, Any]) -> str:
    """A mean with its interval, where there are pictures enough for one."""
    if value["mean"] is None:
        return "none"
    interval = "" if value["low"] is None else f" ({value['low']:.3f} to {value['high']:.3f})"
    return f"{value['mean']:.3f}{interval}"


def main() -> None:
    """Measure, print, and write what the test split gave."""
    chosen, pipeline, samples = opened(__doc__)
    rows: list[tuple[str, float, float, float]] = []
    for number in track(range(min(chosen.samples, len(samples))), description="people"):
        sample = samples[number]
        for index, front, part in hidden_people(sample):
            truth = true_colours(sample, index)
            full, flat = (erased(pipeline, sample, front, reach) for reach in (REACH, None))
            share = overlap(full, sample, index, front, part)
            rows.append((sample.key, share, psnr_hole(full.image, truth, part), psnr_hole(flat.image, truth, part)))
    keys = [row[0] for row in rows]
    iou, full_psnr, flat_psnr = (np.array([row[column] for row in rows]) for column in (1, 2, 3))
    figures = {
        "iou": iou,
        "psnr": full_psnr,
        "psnr_background": flat_psnr,
        "psnr_difference": full_psnr - flat_psnr,
    }
    estimates = {name: estimate(keys, values, 0, 2000).model_dump() for name, values in figures.items()}
    for name, value in estimates.items():
        print(f"{name:16s} {shown(value)}")
    print(f"{len(rows)} people in {len(set(keys))} pictures")
    if chosen.split == "test":
        told = {
            "adapters": os.path.basename(os.path.normpath(chosen.adapters)),
            "split": chosen.split,
            "people": len(rows),
            "pictures": len(set(keys)),
            **estimates,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "software": software_versions(),
        }
        place = Path(__file__).parent / "results" / "completion.json"
        place.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
