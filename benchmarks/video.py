"""How true plates and masks of clips are, how long they take, and in how much memory.

    python benchmarks/video.py

Draws clips of the drawn world, whose plate and people are known, and makes pairs of them as a build does:

- ``quality``: 320 x 240, three people of whom one stands for a third of the time, light that flickers, noise; and the
  same with a jump, a shaking part and swaying leaves. Encoded as H.264 and MJPEG. Against the median of all frames.
- ``size``: two minutes of 1280 x 720 at 25 frames a second, in a process of its own: seconds, and peak memory.
- ``median``: the same clip at 320 x 180, against numpy's median of all its frames.

Writes ``benchmarks/results/video.json``. Targets: plates within 1.5 grey levels where they say that they are known,
90 % known where people moved, mean IoU of masks above 0.8, less than 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from dataset_tools.clips.alignment import align, find_views
from dataset_tools.clips.pairs import ClipSettings, pairs_of_clip
from dataset_tools.clips.people import foreground
from dataset_tools.clips.plate import estimate_plate
from dataset_tools.clips.reading import read_samples
from dataset_tools.drawn_world.clips import ClipFaults, DrawnClip, write_clip

SEED = 17
SIZE, COUNT, PEOPLE = (320, 240), 90, 3
KEYS = ("bench-a", "bench-b", "bench-c", "bench-d")
FAULTS = {
    "walking and standing": ClipFaults(),
    "small jump": ClipFaults(jump=(45, 4.4, -2.7)),
    "large jump": ClipFaults(jump=(45, 60, 24)),
    "shaking part": ClipFaults(shaking=(30, 60, 3.0)),
    "swaying leaves": ClipFaults(leaves=(10, 90, 10, 100)),
}
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "lossless.mkv": ("libx264rgb", "rgb24", {"crf": "0"}),
    "h264.mp4": ("libx264", "yuv420p", {"crf": "18"}),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {"qmin": "2", "qmax": "2"}),
}
SECONDS, RATE = 120, 25


def quality(folder: Path) -> list[dict[str, Any]]:
    """Errors of plates and masks, one row a fault and codec, means over the scenes."""
    rows = []
    for fault, faults in FAULTS.items():
        for name in CODECS if fault == "walking and standing" else ("lossless.mkv",):
            found = [_measured(folder / name, DrawnClip(key, SEED, SIZE, PEOPLE, COUNT, faults)) for key in KEYS]
            row = {key: round(float(np.nanmean([one[key] for one in found])), 3) for key in found[0]}
            rows.append({"clip": fault, "codec": name, **row})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _measured(path: Path, clip: DrawnClip) -> dict[str, float]:
    codec, pixels, options = CODECS[path.name]
    frames, masks = zip(*(clip[number] for number in range(len(clip))), strict=True)
    write_clip(path, frames, codec, pixels, options=options)
    # What the pixel format makes of colours is not the plate's fault. Without loss: a still of the codec's quality is
    # farther from the drawing than a plate of many frames.
    shown = path.with_name("plate.mkv")
    lossless = "libx264rgb" if pixels == "rgb24" else "libx264"
    write_clip(shown, [clip.background] * 2, lossless, pixels, options={"crf": "0"})
    with read_samples(shown, 16, 1280) as still:
        truth = still.frames[1].astype(float)
    settings = ClipSettings()
    with read_samples(path, settings.samples, settings.max_side) as samples:
        store = samples.frames
        median = np.median(store.band(list(range(len(store))), 0, store.shape[0]), axis=0)
        views = [view for view in find_views(store, settings.max_shake) if len(view.samples) >= settings.min_samples]
        view = views[0]
        align(store, view)
        plate = estimate_plate(store, view)
        seen = np.array([masks[number].any(0) for number in view.samples])
        moved = seen.any(0)
        overlaps = []
        for place, number in list(enumerate(view.samples))[::6]:
            people = seen[place]
            if (warp := view.warps[place]) is not None:
                flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
                people = cv2.warpPerspective(people.view(np.uint8), warp, people.shape[::-1], flags=flags).view(bool)
            people = people & plate.known
            if people.sum() > settings.min_person * people.size:
                found = foreground(store[number], plate, settings.min_person)
                overlaps.append((found & people).sum() / (found | people).sum())
        leaves = clip.faults.leaves
        inside = np.zeros_like(moved)
        if leaves is not None:
            inside[leaves[0] : leaves[1], leaves[2] : leaves[3]] = True
        error, of_median = np.abs(plate.background - truth).mean(2), np.abs(median - truth).mean(2)
        of_drawing = np.abs(plate.background - clip.background.astype(float)).mean(2)
        stood = (seen.mean(0) > 0.3) & plate.known
        return {
            "error_where_known": float(error[plate.known].mean()),
            "error_against_the_drawing": float(of_drawing[plate.known].mean()),
            "error_of_the_median_there": float(of_median[plate.known].mean()),
            "error_where_people_stood": float(error[stood].mean()) if stood.any() else np.nan,
            "median_where_people_stood": float(of_median[stood].mean()) if stood.any() else np.nan,
            "known": float(plate.known[~inside].mean()),
            "known_where_people_moved": float(plate.known[moved & ~inside].mean()),
            "known_in_leaves": float(plate.known[inside].mean()) if inside.any() else 0.0,
            "mask_iou": float(np.mean(overlaps)),
            "samples_used": len(view.samples) / len(samples.times),
            "views": len(views),
        }


def draw(path: Path, size: tuple[int, int]) -> None:
    """Two minutes of somebody coming and going: 90 drawn frames, forwards and backwards."""
    clip = DrawnClip("bench-a", SEED, size, PEOPLE, 90, ClipFaults())
    drawn = [clip[number][0] for number in range(len(clip))]

    def frames() -> Iterator[np.ndarray]:
        for number in range(SECONDS * RATE):
            turn, place = divmod(number, len(drawn))
            yield drawn[place if turn % 2 == 0 else len(drawn) - 1 - place]

    write_clip(path, frames(), "libx264", "yuv420p", options={"preset": "ultrafast", "crf": "20"})


def make_pairs(path: Path) -> dict[str, Any]:
    """Make pairs of a clip, and say what it took."""
    start, cpu = time.perf_counter(), time.process_time()
    written: dict[str, int] = {}
    pairs = pairs_of_clip(path, "clip", ClipSettings(), None, lambda name, data: written.update({name: len(data)}))
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "cpu_seconds_a_minute": round((time.process_time() - cpu) / (SECONDS / 60), 1),
        "peak_memory_mb": _peak(),
        "pictures": len(pairs.rows),
        "views": pairs.views,
        "refused": [str(why) for why in pairs.refused],
    }


def numpy_median(path: Path) -> dict[str, Any]:
    """The plain way: all frames in memory, and their median."""
    start, cpu = time.perf_counter(), time.process_time()
    with av.open(str(path)) as container:
        frames: np.ndarray = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    np.median(frames, axis=0).astype(np.uint8)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_memory_mb": _peak(),
    }


def _peak() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def _start(task: str, path: Path, size: tuple[int, int] = (0, 0)) -> Any:
    """In a process of its own: on Linux a child's peak is never less than what its parent had when it started it."""
    command = [sys.executable, __file__, "--only", task, str(path), *map(str, size)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout or "null")


def run_here(task: str, path: Path, size: tuple[int, int]) -> None:
    """Do one of the tasks, and print its result."""
    if task == "draw":
        draw(path, size)
    else:
        print(json.dumps({"pairs": make_pairs, "median": numpy_median}[task](path)))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in ("av", "numpy", "opencv-python-headless")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure plates and masks of clips of the drawn world.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/video.json")
    parser.add_argument("--only", nargs=4, metavar=("TASK", "PATH", "WIDTH", "HEIGHT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        task, path, width, height = arguments.only
        run_here(task, Path(path), (int(width), int(height)))
        return
    with tempfile.TemporaryDirectory(prefix="video-benchmark-") as temporary:
        large, small = Path(temporary, "large.mp4"), Path(temporary, "small.mp4")
        _start("draw", large, (1280, 720))
        size = _start("pairs", large)
        print(json.dumps(size), flush=True)
        large.unlink()
        _start("draw", small, (320, 180))
        ours, plain = _start("pairs", small), _start("median", small)
        print(json.dumps([ours, plain]), flush=True)
        rows = quality(Path(temporary))
    report = {
        "command": "python benchmarks/video.py",
        "seed": SEED,
        "machine": machine(),
        "quality": rows,
        "size": {"clip": "120 s, 1280x720, 25 a second, H.264", **size},
        "median": {
            "clip": "120 s, 320x180, 25 a second, H.264",
            "pairs": ours,
            "numpy": plain,
            "numpy_takes_times_the_cpu": round(plain["cpu_seconds"] / ours["cpu_seconds"], 2),
            "numpy_takes_times_the_memory": round(plain["peak_memory_mb"] / ours["peak_memory_mb"], 2),
        },
    }
    print(json.dumps(report, indent=2))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
