"""Other projects read the shards without our code: webdataset, Hugging Face datasets, tar and pycocotools."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_tools.schema import Sample

FACTS = """
import glob, hashlib, json, os, sys
import numpy as np
from pycocotools import mask

root = sys.argv[1]
found = {}


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def facts(sample):
    annotations = sample["annotations.json"]
    parts = {name: digest(np.asarray(value)) for name, value in sample.items() if name.endswith(".png")}
    people = [
        {
            "mask": digest(mask.decode(person["segmentation"])),
            "area": person["area"],
            "keypoints": person["keypoints"],
            "occlusion": person.get("occlusion"),
            "complete": digest(mask.decode(person["complete_segmentation"])) if "order" in person else None,
        }
        for person in annotations["annotations"]
    ]
    titles = [origin["title"] for origin in annotations["origins"]]
    return {"key": sample["__key__"], "split": annotations["split"], "parts": parts, "people": people, "titles": titles}


def finish():
    ours = {"dataset_tools", "mild", "flows"}
    assert not [name for name in sys.modules if name.split(".")[0] in ours]
    json.dump(found, sys.stdout)
"""

WEBDATASET = (
    FACTS
    + """
import io, PIL.Image, webdataset

for configuration, split in json.loads(sys.argv[2]):
    shards = sorted(glob.glob(os.path.join(root, configuration, split + "-*.tar")))
    found[configuration + "/" + split] = [
        facts({n: PIL.Image.open(io.BytesIO(part)) if n.endswith(".png") else part for n, part in sample.items()})
        for sample in webdataset.WebDataset(shards, shardshuffle=False).decode()
    ]
finish()
"""
)

DATASETS = (
    FACTS
    + """
import datasets

datasets.disable_progress_bars()
for configuration, split in json.loads(sys.argv[2]):
    by_card = datasets.load_dataset(root, configuration, split=split)
    tars = sorted(glob.glob(os.path.join(root, configuration, split + "-*.tar")))
    by_files = datasets.load_dataset("webdataset", data_files={split: tars}, split=split)
    streamed = datasets.load_dataset(root, configuration, split=split, streaming=True)
    by_card, by_files, streamed = ([facts(sample) for sample in rows] for rows in (by_card, by_files, streamed))
    assert by_card == by_files == streamed
    found[configuration + "/" + split] = by_card
finish()
"""
)

PLAN = [("real", "train", 5), ("paired", "validation", 2), ("composite", "train", 5), ("composite", "test", 2)]


def run(script: str, *arguments: str, cwd: Path) -> str:
    """Run a script in an isolated interpreter that knows neither this folder nor the network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-I", "-c", script, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def truth(make_sample: Callable[..., Sample]) -> dict[str, list[dict[str, Any]]]:
    """What was written, from the samples themselves."""
    expected: dict[str, list[dict[str, Any]]] = {}
    for configuration, split, count in PLAN:
        for i in range(count):
            sample = make_sample(configuration, f"{split}-{i:03d}", split, people=1 + i % 3)
            parts = {"image.png": sample.image, "parsing.png": sample.parsing}
            if sample.background is not None:
                parts["background.png"] = sample.background
            if configuration == "composite":
                parts["layers.png"] = np.concatenate([p.layer for p in sample.people if p.layer is not None])
            people = [
                {
                    "mask": digest(person.mask.astype(np.uint8, order="C")),
                    "area": int(person.mask.sum()),
                    "keypoints": [float(value) for value in person.keypoints.reshape(-1)],
                    "occlusion": person.occlusion,
                    "complete": None
                    if person.complete_mask is None
                    else digest(person.complete_mask.astype(np.uint8, order="C")),
                }
                for person in sample.people
            ]
            expected.setdefault(f"{configuration}/{split}", []).append(
                {
                    "key": sample.key,
                    "split": split,
                    "parts": {name: digest(array) for name, array in parts.items()},
                    "people": people,
                    "titles": [origin.title for origin in sample.origins],
                }
            )
    return expected


@pytest.mark.parametrize("script", [WEBDATASET, DATASETS], ids=["webdataset", "datasets"])
def test_plain_readers_see_what_was_written(
    script: str, built_dataset: Path, truth: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    names = json.dumps([(configuration, split) for configuration, split, _ in PLAN])
    found = json.loads(run(script, str(built_dataset), names, cwd=tmp_path))
    for name, expected in truth.items():
        assert found[name] == expected, name


def test_tar_lists_the_parts_of_every_sample_side_by_side(built_dataset: Path) -> None:
    done = subprocess.run(
        ["tar", "tf", str(built_dataset / "composite/train-000000.tar")], capture_output=True, text=True, check=True
    )
    parts = ["annotations.json", "background.png", "image.png", "layers.png", "parsing.png"]
    assert done.stdout.splitlines() == [f"train-{i:03d}.{part}" for i in range(3) for part in parts]


def test_the_lines_in_the_card_run_as_they_stand(built_dataset: Path, tmp_path: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (built_dataset / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        assert len([line for line in snippet.splitlines() if line]) <= 6
    script = f"import os; os.chdir({str(built_dataset)!r})\n" + "\nprint('--')\n".join(snippets)
    first, second = run(script, cwd=tmp_path).split("--\n")
    assert first == second
    assert [line.split()[0] for line in first.splitlines()] == ["test-000", "test-001"]
