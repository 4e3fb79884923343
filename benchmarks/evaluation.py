"""What an evaluation costs beside its methods and metrics, and whether its memory grows with the pictures.

    python benchmarks/evaluation.py

In one run: writes datasets of drawn rectangles; evaluates OpenCV's Telea by PSNR and SSIM through the flow, and calls
OpenCV and scikit-image on the same pictures directly (the named peer: the same work without cases, files, caching and
report); then does so with ten times the pictures, and once more with everything cached. Writes
``benchmarks/results/evaluation.json``. Target: the most memory that the process holds does not grow with the pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dataset_tools.schema import EncodingSettings, Makers, Person, Sample
from dataset_tools.shards import Manifest, ShardDataset, write_shard

SIDE = 128
SHARD = 100

RUN = """
import json, re, sys, time
from pathlib import Path
from prefect.testing.utilities import prefect_test_harness
from flows.evaluate import evaluate

with prefect_test_harness(server_startup_timeout=120):
    started = time.perf_counter()
    result = evaluate(sys.argv[1], sys.argv[2], "", sys.argv[3])
    seconds = time.perf_counter() - started
# Not getrusage: a process begins with the most that its parent held.
kilobytes = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
mean = result["summary"]["groups"][0]["cells"]["telea"]["psnr_hole"]["mean"]
told = {"seconds": seconds, "megabytes": int(kilobytes) / 1024, "steps": result["steps"], "cached": result["cached"]}
print(json.dumps({**told, "psnr_hole": mean}))
"""


def draw(number: int) -> Sample:
    """A smooth background and a rectangle of noise for a person."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    slopes = rng.integers(0, 120, (2, 3))
    background = (rows[..., None] * slopes[0] + columns[..., None] * slopes[1]).astype(np.uint8)
    mask = np.zeros((SIDE, SIDE), bool)
    top, left = rng.integers(8, SIDE // 2, 2)
    mask[top : top + 40, left : left + 20] = True
    image = np.where(mask[..., None], rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8), background)
    person = Person(
        id="0",
        mask=mask,
        complete_mask=mask,
        augmented_mask=mask,
        layer=np.dstack([image * mask[..., None], mask * np.uint8(255)]),
        order=0,
        occlusion=0.0,
    )
    return Sample(
        key=f"drawn-{number:06d}",
        split="test",
        configuration="composite",
        image=image,
        people=[person],
        parsing=np.full((SIDE, SIDE), 255, np.uint8),
        label_set="none",
        origins=[],
        made_by=Makers(),
        background=background,
    )


def write_dataset(root: Path, count: int) -> str:
    """A dataset of so many samples, 100 a shard."""
    shards = [
        write_shard(
            (draw(number) for number in range(start, min(start + SHARD, count))),
            str(root),
            f"composite/test-{start // SHARD:06d}.tar",
            EncodingSettings(image_format="png"),
            [],
        )
        for start in range(0, count, SHARD)
    ]
    manifest = Manifest(
        name="drawn", shards={"composite": {"test": shards}}, files={}, source="", settings={}, software={}
    )
    (root / "manifest.json").write_text(manifest.model_dump_json())
    return str(root)


def through_the_flow(folder: Path, dataset: str, output: str) -> dict[str, Any]:
    """Evaluate in a process of its own: seconds, most megabytes, steps, those that were cached, and the mean PSNR."""
    recipe = folder / "evaluate.yaml"
    values = {"methods": ["telea"], "metrics": ["psnr_hole", "ssim"], "shown": 4}
    recipe.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-c", RUN, str(recipe), dataset, str(folder / output)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def directly(dataset: str) -> dict[str, float]:
    """The same method and metrics on the same samples, called one after another."""
    started, values = time.perf_counter(), []
    for sample in ShardDataset(dataset, "composite", "test"):
        hole, truth = sample.people[0].mask, sample.background
        assert truth is not None
        filled = cv2.inpaint(sample.image, hole.astype(np.uint8) * 255, 3.0, cv2.INPAINT_TELEA)
        result = np.where(hole[..., None], filled, sample.image)
        values.append(peak_signal_noise_ratio(truth[hole], result[hole], data_range=255))
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        structural_similarity(truth, result, data_range=255, channel_axis=2, **window)
    return {"seconds": time.perf_counter() - started, "psnr_hole": float(np.mean(values))}


def main() -> None:
    """Run all, print it, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, nargs=2, default=[100, 1000])
    given = parser.parse_args()
    few, many = given.pictures
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, large = (write_dataset(folder / f"dataset-{count}", count) for count in (few, many))
        runs = {
            str(few): through_the_flow(folder, small, "small"),
            str(many): through_the_flow(folder, large, "large"),
            f"{many}, all cached": through_the_flow(folder, large, "large"),
        }
        peer = directly(large)
    ratio = runs[str(many)]["megabytes"] / runs[str(few)]["megabytes"]
    added = (runs[str(many)]["seconds"] - peer["seconds"]) / many
    result = {
        "command": f"python benchmarks/evaluation.py --pictures {few} {many}",
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "software": {name: version(name) for name in ("prefect", "opencv-python-headless", "scikit-image", "numpy")},
        "settings": {"side": SIDE, "samples_per_shard": SHARD, "method": "telea", "metrics": ["psnr_hole", "ssim"]},
        "runs": runs,
        "directly": peer,
        "memory_ratio": ratio,
        "added_seconds_a_picture": added,
    }
    target = Path(__file__).parent / "results/evaluation.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(runs, indent=2))
    print(f"memory with {many} pictures: {ratio:.2f}x that with {few}; {1000 * added:.0f} ms a picture are added")
    print(f"PSNR through the flow {runs[str(many)]['psnr_hole']:.4f} dB, directly {peer['psnr_hole']:.4f} dB")


if __name__ == "__main__":
    main()
