"""Building shards against img2dataset on the same local images, and what orchestration costs.

    python benchmarks/build.py

In one run: makes photographs with the drawn world's content; lets img2dataset (in a virtual environment of its
own, because its pins differ) and ours fetch, resize and shard them, in turn; then builds the sample dataset
through Prefect, and by calling the same steps without it. Writes ``benchmarks/results/build.json``. Targets: images
a second and core not lower than img2dataset's, orchestration under 5 % of the time of a build.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from prefect import Task

PEER = "img2dataset==1.47.0"
SIDE = 512
QUALITY = 85
"""Below 90 both write 4:2:0 chroma, so both do the same work."""
WORKERS = 2
DIFFERENT = 40

OURS = """
import json, sys, time
from pathlib import Path
import webdataset
from dataset_tools.curated import CuratedSettings, photographs
from dataset_tools.images import DecodeSettings
from dataset_tools.records import ImageRecord
from dataset_tools.schema import EncodingSettings, encode_image

class Local:
    name, applies_exif = "local", True
    def read_image(self, record):
        return Path(record.image).read_bytes()

folder, target, side, quality, workers = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
settings = CuratedSettings(decode=DecodeSettings(max_side=side), fetch_workers=workers)
encoding = EncodingSettings(jpeg_quality=quality)
records = [ImageRecord(p.stem, "local", "train", "people", "", str(p)) for p in sorted(Path(folder).glob("*.jpg"))]
target.mkdir()
started = time.monotonic()
with webdataset.TarWriter(str(target / "00000.tar"), mtime=0) as writer:
    for photograph in photographs(records, Local(), settings, []):
        jpg = encode_image(photograph.decoded.image, encoding)
        about = {"sha256": photograph.sha256, "transform": photograph.decoded.transform}
        writer.write({"__key__": photograph.record.id, "jpg": jpg, "json": about})
print(time.monotonic() - started)
"""

THEIRS = """
import glob, json, sys
from img2dataset import download

if __name__ == "__main__":
    urls, target, side, quality, workers = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    download(url_list=urls, output_folder=target, input_format="txt", output_format="webdataset", image_size=side,
             resize_mode="keep_ratio_largest", resize_only_if_bigger=True, encode_quality=quality, processes_count=1,
             thread_count=workers, number_sample_per_shard=10**6, compute_hash="sha256")
    # Its own clock, which starts when its worker process does: starting that takes it several seconds more.
    stats = [json.load(open(path)) for path in glob.glob(f"{target}/*_stats.json")]
    print(sum(stat["end_time"] - stat["start_time"] for stat in stats))
"""


def make_photographs(folder: Path, count: int) -> None:
    """JPEG files of 1280x960 with the drawn world's content and a camera's noise; every `DIFFERENT` repeat."""
    from dataset_tools.drawn_world import draw_scene

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:05d}.jpg"
        if number >= DIFFERENT:
            path.write_bytes((folder / f"{number % DIFFERENT:05d}.jpg").read_bytes())
            continue
        scene = Image.fromarray(draw_scene(f"benchmark-{number}", 0, (640, 480), 3).image)
        large = np.asarray(scene.resize((1280, 960), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(large + rng.normal(0, 4, large.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(path, quality=92)


def peer_python(folder: Path) -> str:
    """A Python that has img2dataset; installs it the first time."""
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PEER], check=True)
    return str(python)


def against_img2dataset(photos: Path, scratch: Path, python: str, rounds: int) -> dict[str, Any]:
    """Images a second and core of both, in turn; each clocks itself, after its imports."""
    paths = sorted(photos.glob("*.jpg"))
    urls = scratch / "urls.txt"
    urls.write_text("".join(f"file://{path}\n" for path in paths))
    scripts = {"ours": (sys.executable, OURS, photos), "img2dataset": (python, THEIRS, urls)}
    rates: dict[str, list[float]] = {name: [] for name in scripts}
    for number in range(rounds):
        for name, (interpreter, script, given) in scripts.items():
            file = scratch / f"run-{name}.py"  # not NAME.py: it would hide the package of that name
            file.write_text(script)
            target = scratch / f"{name}-{number}"
            command: list[Any] = [interpreter, file, given, target, str(SIDE), str(QUALITY), str(WORKERS)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rates[name].append(len(paths) / float(done.stdout.split()[-1]) / WORKERS)
            held = sum(path.stat().st_size for path in target.glob("*.tar"))
            print(f"{name:12} {rates[name][-1]:7.1f} images/s and core, {held / 1e6:.1f} MB", flush=True)
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    return {"images": len(paths), "peer": PEER, "images_per_second_and_core": rates, "ratio": median(ratios)}


def orchestration(samples: int, scratch: Path, rounds: int) -> dict[str, Any]:
    """Share of a build during which no step runs: one worker, server started, imports done by a first small build.

    The same steps are also called without Prefect, in turn with it, to see whether its server slows them down.
    """
    from prefect.testing.utilities import prefect_test_harness

    from flows import build_dataset as module
    from flows.caching import Job, Outcome
    from flows.pipeline import recipe_path

    def build(name: str, samples: int) -> float:
        changes = {
            "source.train": samples,
            "composite.samples": {"train": samples, "validation": 8, "test": 8},
            "samples_per_shard": 64,
            "runner.workers": 1,
        }
        started = time.monotonic()
        module.build_dataset(recipe_path("build", "sample"), str(scratch / name), changes)
        return time.monotonic() - started

    inside: list[float] = []

    def timed(function: Any) -> Any:
        @functools.wraps(function)
        def call(job: Job) -> Any:
            started = time.monotonic()
            try:
                return function(job)
            finally:
                inside[-1] += time.monotonic() - started

        return call

    def directly(step: Any, jobs: Sequence[Job], *_: Any, **options: Any) -> list[Outcome[Any]]:
        return [Outcome(step.fn(job), cached=False) for job in jobs]

    steps = [step for step in vars(module).values() if isinstance(step, Task)]
    whole, through, alone = [], [], []
    with prefect_test_harness(server_startup_timeout=120), contextlib.ExitStack() as patches:
        for step in steps:
            patches.enter_context(mock.patch.object(step, "fn", timed(step.fn)))
        inside.append(0.0)
        build("warm-up", 16)
        for number in range(rounds):
            inside.append(0.0)
            whole.append(build(f"flow-{number}", samples))
            through.append(inside[-1])
            inside.append(0.0)
            with mock.patch.object(module, "run_steps", directly):
                build(f"direct-{number}", samples)
            alone.append(inside[-1])
            print(
                f"build {whole[-1]:.1f} s, {through[-1]:.1f} s of it in steps; "
                f"the steps without Prefect {alone[-1]:.1f} s",
                flush=True,
            )
    share = median(1 - steps / wall for steps, wall in zip(through, whole, strict=True))
    return {
        "samples": 2 * (samples + 16),
        "seconds": whole,
        "seconds_in_steps": through,
        "seconds_of_the_steps_without_prefect": alone,
        "share": share,
    }


def main() -> None:
    """Run both comparisons, print the ratios, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, default=Path("build/img2dataset-venv"), help="its virtual environment")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_photographs(scratch / "photos", given.images)
        result: dict[str, Any] = {
            "command": f"python benchmarks/build.py --images {given.images} --samples {given.samples} "
            f"--rounds {given.rounds}",
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "software": {name: version(name) for name in ("pillow", "numpy", "prefect", "webdataset")},
            "settings": {"side": SIDE, "jpeg_quality": QUALITY, "threads": WORKERS, "seed": 0},
            "fetch_resize_shard": against_img2dataset(
                scratch / "photos", scratch, peer_python(given.peer.absolute()), given.rounds
            ),
            "orchestration": orchestration(given.samples, scratch, given.rounds),
        }
    target = Path(__file__).parent / "results/build.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(f"ours / img2dataset: {result['fetch_resize_shard']['ratio']:.2f}")
    print(f"orchestration: {100 * result['orchestration']['share']:.1f} % of a build")


if __name__ == "__main__":
    main()
