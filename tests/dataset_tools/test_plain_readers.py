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

from dataset_tools.schema import EncodingSettings, Sample
from dataset_tools.shards import write_shard

pytestmark = pytest.mark.process

READERS = """
import contextlib, glob, hashlib, io, json, os, sys
import datasets, PIL.Image, webdataset
import numpy as np
from pycocotools import mask

root, plan, snippets = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
found = {"webdataset": {}, "datasets": {}, "card": []}
datasets.disable_progress_bars()


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def facts(sample):
    annotations = sample["annotations.json"]
    parts = {name: digest(np.asarray(value)) for name, value in sample.items() if name.endswith(".png")}
    people = [
        {
            "mask": digest(mask.decode(person["segmentation"])),
            "area": person["area"],
            "shadow": person["shadow"],
            "keypoints": person["keypoints"],
            "occlusion": person.get("occlusion"),
            "complete": digest(mask.decode(person["complete_segmentation"])) if "order" in person else None,
        }
        for person in annotations["annotations"]
    ]
    titles = [origin["title"] for origin in annotations["origins"]]
    told = {name: annotations[name] for name in ("split", "caption", "known_share", "effects_share")}
    return {"key": sample["__key__"], "told": told, "parts": parts, "people": people, "titles": titles}


for configuration, split in plan:
    shards = sorted(glob.glob(os.path.join(root, configuration, split + "-*.tar")))
    found["webdataset"][configuration + "/" + split] = [
        facts({n: PIL.Image.open(io.BytesIO(part)) if n.endswith(".png") else part for n, part in sample.items()})
        for sample in webdataset.WebDataset(shards, shardshuffle=False).decode()
    ]
    by_card = datasets.load_dataset(root, configuration, split=split)
    by_files = datasets.load_dataset("webdataset", data_files={split: shards}, split=split)
    streamed = datasets.load_dataset(root, configuration, split=split, streaming=True)
    by_card, by_files, streamed = ([facts(sample) for sample in rows] for rows in (by_card, by_files, streamed))
    assert by_card == by_files == streamed
    found["datasets"][configuration + "/" + split] = by_card
late = datasets.load_dataset("webdataset", data_files={"train": [sys.argv[4]]}, split="train")
found["late"] = [sample["annotations.json"]["annotations"][0]["shadow"] for sample in late]
os.chdir(root)
for snippet in snippets:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(snippet, {"__name__": "__main__"})
    found["card"].append(said.getvalue())
ours = {"dataset_tools", "mild", "flows"}
assert not [name for name in sys.modules if name.split(".")[0] in ours]
json.dump(found, sys.stdout)
"""

PLAN = [("real", "train", 5), ("paired", "validation", 2), ("composite", "train", 5), ("composite", "test", 2)]


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
            parts["effects.png"] = np.full_like(sample.parsing, 255) if sample.effects is None else sample.effects
            if sample.background is not None:
                parts["background.png"] = sample.background
            if sample.known is not None:
                parts["known.png"] = sample.known * np.uint8(255)
            if configuration == "composite":
                parts["layers.png"] = np.concatenate([p.layer for p in sample.people if p.layer is not None])
            people = [
                {
                    "mask": digest(person.mask.astype(np.uint8, order="C")),
                    "area": int(person.mask.sum()),
                    "shadow": person.effects == ("shadow",),
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
                    "told": {
                        "split": split,
                        "caption": sample.caption,
                        "known_share": {"real": 0, "composite": 1, "paired": 62 / 64}[configuration],
                        "effects_share": 0
                        if sample.effects is None
                        else pytest.approx(np.count_nonzero(sample.effects) / sample.effects.size, abs=1e-6),
                    },
                    "parts": {name: digest(array) for name, array in parts.items()},
                    "people": people,
                    "titles": [origin.title for origin in sample.origins],
                }
            )
    return expected


@pytest.fixture(scope="module")
def snippets(built_dataset: Path) -> list[str]:
    """The lines of Python in the card."""
    return re.findall(r"```python\n(.*?)```", (built_dataset / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def seen(
    built_dataset: Path,
    snippets: list[str],
    make_sample: Callable[..., Sample],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What an isolated interpreter sees that knows neither this folder nor the network: one, as it starts slowly."""
    place = tmp_path_factory.mktemp("readers")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    samples = [make_sample("composite", f"k{index}", size=(24, 32)) for index in range(7)]
    for sample in samples[:6]:
        sample.people[0].effects = ()
    late = write_shard(samples, str(place), "composite/train-000000.tar", EncodingSettings(image_format="png"), [])
    plan = json.dumps([(configuration, split) for configuration, split, _ in PLAN])
    command = [sys.executable, "-I", "-c", READERS, str(built_dataset), plan, json.dumps(snippets)]
    command.append(str(place / late.path))
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("reader", ["webdataset", "datasets"])
def test_plain_readers_see_what_was_written(
    reader: str, seen: dict[str, Any], truth: dict[str, list[dict[str, Any]]]
) -> None:
    for name, expected in truth.items():
        assert seen[reader][name] == expected, name


def test_a_shadow_that_the_first_samples_do_not_have_is_read_all_the_same(seen: dict[str, Any]) -> None:
    """Hugging Face `datasets` takes the schema of all samples from the first five."""
    assert seen["late"] == [False] * 6 + [True]


def test_tar_lists_the_parts_of_every_sample_side_by_side(built_dataset: Path) -> None:
    done = subprocess.run(
        ["tar", "tf", str(built_dataset / "composite/train-000000.tar")], capture_output=True, text=True, check=True
    )
    parts = ["annotations.json", "background.png", "effects.png", "image.png", "layers.png", "parsing.png"]
    assert done.stdout.splitlines() == [f"train-{i:03d}.{part}" for i in range(3) for part in parts]


def test_the_lines_in_the_card_run_as_they_stand(snippets: list[str], seen: dict[str, Any]) -> None:
    assert len(snippets) == 2
    for snippet in snippets:
        assert len([line for line in snippet.splitlines() if line]) <= 6
    first, second = seen["card"]
    assert first == second
    assert [line.split()[0] for line in first.splitlines()] == ["test-000", "test-001"]
