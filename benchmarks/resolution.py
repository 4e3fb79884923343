"""At what resolution adapters erase best: what `inference_resolution` of their training is chosen by.

    python benchmarks/resolution.py DATASET [--adapters FOLDER] [--pictures 24]

Everybody is erased from composites of the split ``validation``, by exact and by faulty masks, and from drawn scenes of
640 x 640 and of 1280 x 960 pixels, with windows worked on at multiples of what the base is made for. PSNR in dB in the
hole (of composites, hole and effects) and perceptual distance (`mild.metrics.perceptual`), each minus those at the
base's own resolution, by picture, with 95 % bootstrap intervals. Writes ``benchmarks/results/resolution.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import track

from dataset_tools.drawn_world import draw_scene
from dataset_tools.shards import ShardDataset
from mild.erasing.pipeline import MILDPipeline
from mild.evaluation.summarize import estimate
from mild.metrics.perceptual import perceptual_hole
from mild.metrics.psnr import psnr_hole
from mild.seeds import derived_seed
from mild.versions import software_versions

TIMES = (1.0, 1.5, 2.0, 3.0)
SCENES = ((640, 640), (1280, 960))
SEED = 11
LEAST = 0.01
"""Share of a drawn scene that people cover."""
RESULT = Path(__file__).parent / "results/resolution.json"


class Picture(NamedTuple):
    """A picture to erase everybody from."""

    key: str
    image: np.ndarray
    masks: list[np.ndarray]
    plate: np.ndarray
    hole: np.ndarray


def composites(dataset: str, faulty: bool) -> Iterator[Picture]:
    """Of the split ``validation``."""
    for sample in ShardDataset(dataset, "composite", "validation"):
        masks = [person.augmented_mask if faulty else person.mask for person in sample.people]
        hole = np.logical_or.reduce([person.mask for person in sample.people])
        if sample.effects is not None:
            hole = hole | (sample.effects > 0)
        known = [mask for mask in masks if mask is not None and mask.any()]
        if len(known) == len(masks) and sample.background is not None:
            yield Picture(sample.key, sample.image, known, sample.background, hole)


def scenes(size: tuple[int, int]) -> Iterator[Picture]:
    """Drawn without end."""
    for number in count():
        key = f"resolution-{number}"
        scene = draw_scene(key, SEED, size, 1)
        masks = [person.mask for person in scene.people]
        if masks and np.mean(hole := np.logical_or.reduce(masks)) >= LEAST:
            yield Picture(key, scene.image, masks, scene.background, hole)


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--adapters", default="mild-nano-adapters")
    parser.add_argument("--pictures", type=int, default=24, help="of each kind")
    chosen = parser.parse_args()
    pipeline = MILDPipeline.from_pretrained(chosen.adapters)
    pipeline.set_progress_bar_config(disable=True)
    own = int(pipeline.unet.config.sample_size * pipeline.vae_scale_factor)
    sides = [round(own * times) for times in TIMES]
    kinds = {
        "composites, exact masks": composites(chosen.dataset, False),
        "composites, faulty masks": composites(chosen.dataset, True),
        **{f"scenes of {width} x {height}": scenes((width, height)) for width, height in SCENES},
    }
    table = {}
    for kind, pictures in kinds.items():
        keys: list[str] = []
        values: list[list[tuple[float, float]]] = []
        for picture in track(islice(pictures, chosen.pictures), kind, total=chosen.pictures):
            reached = []
            for side in sides:
                generator = torch.Generator().manual_seed(derived_seed(0, picture.key))
                done = pipeline(
                    picture.image, picture.masks, resolution=side, generator=generator, output_type="np"
                ).image
                distance = perceptual_hole(done, picture.plate, picture.hole)
                reached.append((psnr_hole(done, picture.plate, picture.hole), distance))
            keys.append(picture.key)
            values.append(reached)
        found = np.array(values)  # (pictures, sides, measures)
        table[kind] = {
            str(side): {
                "psnr": float(found[:, column, 0].mean()),
                "perceptual": float(found[:, column, 1].mean()),
                **{
                    f"{name}_minus_{own}": estimate(
                        keys, found[:, column, measure] - found[:, 0, measure], 0, 2000
                    ).model_dump()
                    for measure, name in enumerate(("psnr", "perceptual"))
                },
            }
            for column, side in enumerate(sides)
        }
        for pixels, row in table[kind].items():
            print(f"{kind}, {pixels:>4s}: {row['psnr']:.2f} dB, {row['perceptual']:.3f}")
    result = {
        "command": f"python benchmarks/resolution.py DATASET --pictures {chosen.pictures}",
        "adapters": os.path.basename(os.path.normpath(chosen.adapters)),
        "pictures": chosen.pictures,
        "by_kind_and_side": table,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "software": software_versions(),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
