"""Make and measure a small instance network that finds the people of the drawn world.

    python benchmarks/drawn_people.py train --folder WORK    # draws scenes, trains, writes WORK/network
    python benchmarks/drawn_people.py measure                # the one of the package, on scenes that it never saw

The network is a Mask2Former (Cheng et al. 2022, arXiv:2112.01527) over a narrow ResNet, with random first weights, in
the layout that transformers loads by itself; 2.6 MB. ``train`` uses one processor core, keeps drawn scenes and a
checkpoint in ``WORK`` and is taken up again where it was stopped. ``measure`` runs it as a build does and writes
``benchmarks/results/drawn-people.json``. Predicted masks and people are paired one to one so that the sum of IoU is
greatest; a person counts as found from an IoU of 0.5 on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    ResNetConfig,
)

from dataset_tools.drawn_world import Scene, draw_scene, generator
from dataset_tools.estimators.segmentation import SegmentationSettings

Part = Literal["train", "held-out", "test"]
SEEDS: dict[Part, int] = {"train": 0, "held-out": 1, "test": 2}
"""Every part has a world of its own."""
PEOPLE = (1, 2, 3, 4, 2, 1, 3, 5, 0, 0)
"""How many people are in one scene after the other."""
SIDE = 160
"""The network sees every picture as a square of so many pixels."""
FIRST_SIDE, FIRST_SHARE = 128, 0.35
"""For so much of the steps it learns from smaller squares, which take less time."""
STORED = 224
"""Scenes are kept as squares of this side, so that crops of them are hardly enlarged."""
LEAST_SHARE = 0.005
"""People who fill less of a picture than this are not missed, and finding them is no mistake."""
CHECKED_EVERY = 200
"""After so many steps there is a checkpoint, and held-out scenes are looked at."""
FOUND = 0.5
"""Mask IoU from which on a person counts as found."""
FEWEST_PIXELS = 24
"""What is left of a person in a crop is learnt from so many pixels on."""


def scene_of(part: Part, index: int) -> Scene:
    """A scene of a size and shape as the ``sample`` source draws them: 256 to 384 pixels at the longer side."""
    key = f"drawn-people/{part}/{index}"
    rng = generator(SEEDS[part], f"{key}/size")
    long = int(rng.integers(256, 385))
    short = round(long / float(rng.choice([1.0, 1.0, 1.25, 4 / 3, 4 / 3, 1.5, 16 / 9])))
    size = (short, long) if rng.random() < 0.3 else (long, short)
    return draw_scene(key, SEEDS[part], size, PEOPLE[index % len(PEOPLE)])


def squares(scenes: int, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training scenes as squares: (N, S, S, 3) uint8 RGB and (N, S, S) uint8 numbers of the people, 0 elsewhere."""
    if not file.exists():
        images, numbers = (np.zeros((scenes, STORED, STORED, *rest), np.uint8) for rest in ((3,), ()))
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool, _progress() as progress:
            task = progress.add_task("drawing", total=scenes)
            for index, square in enumerate(pool.map(_square, range(scenes), chunksize=16)):
                images[index], numbers[index] = square
                progress.advance(task)
        unfinished = file.with_suffix(".partial.npz")
        np.savez(unfinished, images=images, numbers=numbers)
        unfinished.rename(file)
    with np.load(file) as kept:
        return kept["images"], kept["numbers"]


def _square(index: int) -> tuple[np.ndarray, np.ndarray]:
    cv2.setNumThreads(1)
    scene = scene_of("train", index)
    numbers = np.zeros(scene.image.shape[:2], np.uint8)
    for number, person in enumerate(scene.people, 1):
        numbers[person.mask] = number
    shrunk = cv2.resize(scene.image, (STORED, STORED), interpolation=cv2.INTER_AREA)
    return shrunk, cv2.resize(numbers, (STORED, STORED), interpolation=cv2.INTER_NEAREST_EXACT)


def network() -> Mask2FormerForUniversalSegmentation:
    """A Mask2Former of 1.3 million parameters with random weights."""
    backbone = ResNetConfig(
        embedding_size=24,
        hidden_sizes=[24, 48, 96, 128],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_layers=1,
        encoder_feedforward_dim=128,
        decoder_layers=4,
        dim_feedforward=256,
        num_attention_heads=4,
        num_queries=16,
        no_object_weight=0.3,
        train_num_points=784,
        id2label={0: "person"},
        label2id={"person": 0},
    )
    return Mask2FormerForUniversalSegmentation(config)


def processor() -> Mask2FormerImageProcessor:
    """What prepares pictures for the network."""
    return Mask2FormerImageProcessor(size={"height": SIDE, "width": SIDE})


def example(
    images: np.ndarray, numbers: np.ndarray, side: int, rng: np.random.Generator
) -> tuple[np.ndarray, torch.Tensor]:
    """A random crop, mirrored or not, lighter or darker: (S, S, 3) float32 in 0..1 and (M, S, S) float32 masks."""
    index = int(rng.integers(len(images)))
    height, width = (int(v) for v in np.rint(STORED * rng.uniform(0.7, 1, 2)))
    if rng.random() < 0.3:
        height = width = STORED
    top, left = int(rng.integers(0, STORED - height + 1)), int(rng.integers(0, STORED - width + 1))
    window = np.s_[index, top : top + height, left : left + width]
    image = cv2.resize(images[window], (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    people = cv2.resize(numbers[window], (side, side), interpolation=cv2.INTER_NEAREST_EXACT)
    if rng.random() < 0.5:
        image, people = image[:, ::-1], people[:, ::-1]
    gain = rng.uniform(0.75, 1.25) * rng.uniform(0.93, 1.07, 3)
    image = np.clip((image - 0.5) * rng.uniform(0.8, 1.2) + 0.5, 0, 1) * gain.astype(np.float32)
    masks = [people == number for number in range(1, int(people.max()) + 1)]
    kept = [mask for mask in masks if mask.sum() >= FEWEST_PIXELS]
    stacked = np.stack(kept) if kept else np.zeros((0, side, side), bool)
    return np.clip(image, 0, 1), torch.from_numpy(stacked.astype(np.float32))


class Hints(nn.Module):
    """What pixels are taught beside the masks, so that they soon tell people from things and people from each other.

    A map from the pixel decoder's features to: is this a person, and where from here is the middle of that person.
    It is thrown away when training ends.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(channels, 3, 1)

    def forward(self, features: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
        """The loss on features (B, C, h, w) where image b shows the people masks[b] (M, S, S)."""
        side = features.shape[-1]
        grid = (torch.arange(side) + 0.5) / side
        found = self.head(features)
        people, offsets = torch.zeros_like(found[:, 0]), torch.zeros_like(found[:, 1:])
        for index, those in enumerate(masks):
            for mask in nn.functional.adaptive_avg_pool2d(those, side):
                share = mask / mask.sum()
                inside = mask > 0.5
                people[index] += mask
                offsets[index, 0] += inside * ((share.sum(0) * grid).sum() - grid)[None, :]
                offsets[index, 1] += inside * ((share.sum(1) * grid).sum() - grid)[:, None]
        wrong = nn.functional.binary_cross_entropy_with_logits(found[:, 0], people.clamp(0, 1))
        inside = (people > 0.5)[:, None]
        far = ((found[:, 1:] - offsets).abs() * inside).sum() / inside.sum().clamp(min=1)
        return 5 * wrong + 5 * far


def train(folder: Path, scenes: int, steps: int, batch_size: int, rate: float, seed: int) -> None:
    """Train from nothing, or from the checkpoint in ``folder``, and write ``folder/network``."""
    images, numbers = squares(scenes, folder / f"scenes-{scenes}.npz")
    torch.manual_seed(seed)
    # Channels last is the order in which a CPU's convolutions are fast.
    model = network().train().to(memory_format=torch.channels_last)
    hints = Hints(model.config.mask_feature_size)
    parameters = [*model.parameters(), *hints.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05, fused=True)
    warm = min(200, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    states = {"model": model, "hints": hints, "optimizer": optimizer, "schedule": schedule}
    checkpoint, first = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        first = saved.pop("step")
        for name, state in saved.items():
            states[name].load_state_dict(state)
    prepare = processor()
    mean, deviation = np.array(prepare.image_mean, np.float32), np.array(prepare.image_std, np.float32)
    losses: list[float] = []
    watched = [scene_of("held-out", index) for index in range(40)]
    with _progress() as progress:
        task = progress.add_task("training", total=steps, completed=first)
        for step in range(first, steps):
            rng = np.random.default_rng((seed, step))
            side = FIRST_SIDE if step < FIRST_SHARE * steps else SIDE
            examples = [example(images, numbers, side, rng) for _ in range(batch_size)]
            pixels = torch.from_numpy(np.stack([(image - mean) / deviation for image, _ in examples]))
            masks = [mask for _, mask in examples]
            found = model(
                pixels.permute(0, 3, 1, 2),
                mask_labels=masks,
                class_labels=[torch.zeros(len(mask), dtype=torch.int64) for mask in masks],
            )
            loss = found.loss + hints(found.pixel_decoder_last_hidden_state, masks)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"training, loss {losses[-1]:.2f}")
            if (step + 1) % CHECKED_EVERY == 0 or step + 1 == steps:
                unfinished = checkpoint.with_suffix(".partial")
                reached = {name: state.state_dict() for name, state in states.items()} | {"step": step + 1}
                torch.save(reached, unfinished)
                unfinished.rename(checkpoint)
                mean_loss = np.mean(losses[-CHECKED_EVERY:])
                found = measured(partial(by_the_library, model.eval(), prepare), watched)
                progress.console.print(f"step {step + 1}, loss {mean_loss:.2f}, held out: {found}")
                model.train()
    model.half().save_pretrained(folder / "network")
    # Only the file is in half precision: who loads it computes in single precision.
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder / "network")
    prepare.save_pretrained(folder / "network")


def by_the_library(
    model: Mask2FormerForUniversalSegmentation, prepare: Mask2FormerImageProcessor, image: np.ndarray
) -> list[np.ndarray]:
    """Masks (H, W) bool of the people in an image (H, W, 3) uint8, as the library gives them by default."""
    with torch.inference_mode():
        answer = model(pixel_values=prepare(images=image, return_tensors="pt")["pixel_values"])
    (found,) = prepare.post_process_instance_segmentation(answer, target_sizes=[image.shape[:2]])
    return [found["segmentation"].numpy() == segment["id"] for segment in found["segments_info"]]


def overlaps(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(P, T) IoU of masks (P, H, W) and (T, H, W) bool."""
    common = np.einsum("phw,thw->pt", predicted.astype(np.float32), true.astype(np.float32), optimize=True)
    return common / np.maximum(predicted.sum((1, 2))[:, None] + true.sum((1, 2)) - common, 1)


def measured(find: Callable[[np.ndarray], list[np.ndarray]], scenes: list[Scene]) -> dict[str, Any]:
    """Mean mask IoU, recall, precision and people found in scenes without any, over people of `LEAST_SHARE` or more.

    ``mean_mask_iou`` is over people paired with a mask that overlaps them at all, ``mean_mask_iou_of_found`` over those
    who were found.
    """
    paired: list[np.ndarray] = []
    people, false, seen_in_empty, empty = 0, 0, 0, 0
    for scene in scenes:
        predicted = np.array(find(scene.image)).reshape(-1, *scene.image.shape[:2])
        true = np.array([person.mask for person in scene.people if person.mask.any()])
        if not len(true):
            empty += 1
            seen_in_empty += len(predicted)
            continue
        large = true.mean((1, 2)) >= LEAST_SHARE
        shared = overlaps(predicted, true)
        rows, columns = linear_sum_assignment(-shared)
        iou = shared[rows, columns]
        paired.append(iou[large[columns] & (iou > 0)])
        people += int(large.sum())
        false += len(predicted) - int((iou >= FOUND).sum())
    all_iou = np.concatenate(paired)
    found = all_iou[all_iou >= FOUND]
    return {
        "people": people,
        "mean_mask_iou": round(float(all_iou.mean()), 3) if len(all_iou) else 0.0,
        "mean_mask_iou_of_found": round(float(found.mean()), 3) if len(found) else 0.0,
        "recall": round(len(found) / people, 3),
        "precision": round(len(found) / max(1, len(found) + false), 3),
        "scenes_without_people": empty,
        "people_found_in_them": seen_in_empty,
    }


def measure(name: str, scenes: int) -> None:
    """Measure a network of the table, or one in a folder, and write the JSON."""
    torch.set_num_threads(1)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        drawn = list(pool.map(scene_of, ["test"] * scenes, range(scenes), chunksize=8))
    by_score = {}
    for score in (0.5, 0.7):
        estimator = SegmentationSettings(weights=name, min_score=score).open()
        estimator.check()
        started = time.perf_counter()
        by_score[str(score)] = measured(lambda image: estimator.find([image])[0].masks, drawn)  # noqa: B023
        seconds = (time.perf_counter() - started) / scenes
    report = {
        "command": f"python benchmarks/drawn_people.py measure --network {name} --scenes {scenes}",
        "seed": SEEDS["test"],
        "device": f"CPU, {platform.processor() or platform.machine()}",
        "threads": torch.get_num_threads(),
        "weights": estimator.weights.sha256,
        "pictures": scenes,
        "by_min_score": by_score,
        "seconds_a_picture": round(seconds, 3),
    }
    print(json.dumps(report, indent=2))
    (Path(__file__).parent / "results/drawn-people.json").write_text(json.dumps(report, indent=2) + "\n")


def _progress() -> Progress:
    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}", TimeRemainingColumn())
    return Progress(*columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    training = commands.add_parser("train", help="draw scenes, train, write the network")
    training.add_argument("--folder", type=Path, required=True, help="for drawn scenes, the checkpoint and the network")
    training.add_argument("--scenes", type=int, default=6000)
    training.add_argument("--steps", type=int, default=9000)
    training.add_argument("--batch-size", type=int, default=8)
    training.add_argument("--rate", type=float, default=8e-4, help="AdamW's learning rate, at its height")
    training.add_argument("--seed", type=int, default=0)
    measuring = commands.add_parser("measure", help="measure a network on scenes it never saw")
    measuring.add_argument("--network", default="drawn-people", dest="name", help="name of the table, or folder")
    measuring.add_argument("--scenes", type=int, default=400)
    arguments = vars(parser.parse_args())
    if arguments.pop("command") == "train":
        train(**arguments)
    else:
        measure(**arguments)


if __name__ == "__main__":
    main()
