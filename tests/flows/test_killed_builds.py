"""Builds from files of each kind, killed (SIGKILL) and started again: as if nobody had disturbed them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dataset_tools.drawn_world import Scene, draw_scene
from dataset_tools.drawn_world.clips import ClipFaults, DrawnClip, write_clip
from dataset_tools.pair_list import PAIR_LIST, PairRow, pair_list
from dataset_tools.shards import verify
from dataset_tools.storage import PARTIAL_SUFFIX, open_root
from flows.build_dataset import build_dataset
from flows.output_files import MADE
from flows.output_lock import HOLDER

FRAMES = 30
"""Of each clip."""
ALL = {"train": 1.0}


def scenes() -> list[Scene]:
    """What is in all sources but the clips: four pictures with one or two people."""
    return [draw_scene(f"scene-{number}", 5, (96, 80), 1 + number % 2) for number in range(4)]


def listed_pairs(root: Path) -> dict[str, Any]:
    rows = []
    for number, scene in enumerate(scenes()):
        masks = [f"{number}-{person}.png" for person in range(len(scene.people))]
        files = {f"{number}.png": scene.image, f"{number}-plate.png": scene.background}
        for name, array in [*files.items(), *zip(masks, (person.mask for person in scene.people), strict=True)]:
            Image.fromarray(array).save(root / name)
        image, background = files
        row = {"id": f"p{number}", "group": "one", "image": image, "background": background, "masks": masks}
        rows.append(PairRow.model_validate(row))
    (root / PAIR_LIST).write_bytes(pair_list(rows))
    return {"kind": "pairs", "splits": ALL, "root": str(root)}


def published_pairs(root: Path) -> dict[str, Any]:
    """Without masks: people and their effects are told by the difference."""
    for number, scene in enumerate(scenes()):
        for name, array in {"shot": scene.image, "bg": scene.background}.items():
            (root / name).mkdir(exist_ok=True)
            Image.fromarray(array).save(root / f"{name}/{number}.png")
    layout = {"image": "shot/{id}.png", "background": "bg/{id}.png"}
    return {"kind": "pairs", "splits": ALL, "root": str(root), "layout": layout, "licence": "CC0"}


def clips(root: Path) -> dict[str, Any]:
    for name in ("park", "street"):
        clip = DrawnClip(name, 0, (96, 72), 2, FRAMES, ClipFaults(stands=0.2))
        write_clip(root / f"{name}.mp4", [clip[number][0] for number in range(len(clip))], options={"crf": "4"})
    return {"kind": "video", "splits": ALL, "clips": str(root), "frames_per_clip": 2}


def coco(root: Path) -> dict[str, Any]:
    (root / "train2017").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes(), 1):
        name = f"{number:012d}.jpg"
        Image.fromarray(scene.image).save(root / "train2017" / name)
        images.append({"id": number, "file_name": name, "width": 96, "height": 80, "license": 4})
        for person in scene.people:
            rows, columns = np.nonzero(person.mask)
            left, top, right, bottom = map(int, (columns.min(), rows.min(), columns.max(), rows.max()))
            annotations.append(
                {
                    **{"id": 10 * number + len(annotations), "image_id": number, "category_id": 1, "iscrowd": 0},
                    "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": float((right - left) * (bottom - top)),
                }
            )
    licences = [{"id": 4, "url": "http://creativecommons.org/licenses/by/2.0/"}]
    document = {"licenses": licences, "categories": [{"id": 1, "name": "person"}]}
    (root / "annotations").mkdir()
    (root / "annotations/instances_train2017.json").write_text(
        json.dumps(document | {"images": images, "annotations": annotations})
    )
    return {"kind": "coco", "root": str(root), "splits": ["train"], "validation_share": 0}


def ade20k(root: Path) -> dict[str, Any]:
    for folder in ("images/training", "annotations_instance/training"):
        (root / folder).mkdir(parents=True)
    for number, scene in enumerate(scenes()):
        name, marked = f"training/ADE_train_{number:08d}", np.zeros((80, 96, 3), np.uint8)
        for instance, person in enumerate(scene.people, 1):
            marked[person.mask] = (4, instance, 0)
        Image.fromarray(scene.image).save(root / f"images/{name}.jpg")
        Image.fromarray(marked).save(root / f"annotations_instance/{name}.png")
    return {"kind": "ade20k", "root": str(root), "splits": ["train"], "validation_share": 0}


Moment = tuple[str, int]
"""A function's full name, and which of its calls."""
IN_CURATION: Moment = ("flows.dataset_steps.write_named", 1)
"""What was chosen is written, what was set aside is not."""
AT_A_FRAME: Moment = ("dataset_tools.clips.reading._upright", FRAMES + FRAMES // 2)
"""Half of the second clip is read."""
AT_A_FOLDER: Moment = ("dataset_tools.folders._written", 2)
"""All files of the second clip are written, but do not lie in their place."""
BEFORE_AN_INDEX: Moment = ("dataset_tools.shards.write_index", 1)
"""The first shard stands without its index."""
IN_A_SHARD: Moment = ("dataset_tools.schema.Sample.to_parts", 4)
"""The first shard is finished, the second holds one of its two samples."""


@pytest.mark.process
@pytest.mark.parametrize(
    ("write", "configuration", "moments"),
    [
        (listed_pairs, "paired", [IN_CURATION, BEFORE_AN_INDEX, IN_A_SHARD]),
        (published_pairs, "paired", [IN_CURATION, IN_A_SHARD]),
        (clips, "paired", [AT_A_FRAME, AT_A_FOLDER, IN_A_SHARD]),
        (coco, "real", [IN_CURATION, IN_A_SHARD]),
        (ade20k, "real", [IN_CURATION, IN_A_SHARD]),
    ],
)
def test_a_build_that_was_killed_leaves_nothing_half_written_and_ends_with_the_same_bytes(
    write: Callable[[Path], dict[str, Any]],
    configuration: str,
    moments: list[Moment],
    tmp_path: Path,
    run_killed: Callable[..., None],
) -> None:
    """Each run goes on where the one before was killed; what was finished then is not done again."""
    (tmp_path / "source").mkdir()
    source = write(tmp_path / "source")
    curated = {"configuration": configuration, "decode": {"min_side": 16}}
    settings = {"name": "killed", "source": source, "curated": curated, "samples_per_shard": 2}
    recipe, output = tmp_path / "build.yaml", tmp_path / "output"
    recipe.write_text(yaml.safe_dump({**settings, "runner": {"workers": 1}}))
    parameters = {"settings": str(recipe), "output": str(output / "dataset")}
    assert build_dataset(**parameters)["samples"] == 4
    assert list(verify(parameters["output"])) == []
    # The killed runs take its place, as some files of the work folder name it.
    output.rename(tmp_path / "undisturbed")
    expected = digests(tmp_path / "undisturbed")

    kept: dict[Path, int] = {}
    for function, call in moments:
        run_killed(function, call, build_dataset, **parameters)
        left = {name: digest for name, digest in digests(output).items() if PARTIAL_SUFFIX not in name}
        assert not (output / "dataset/manifest.json").exists()
        assert left.keys() - expected.keys() == {HELD_BY}
        assert {name for name in left.keys() & expected.keys() if left[name] != expected[name]} <= {NOTES}
        kept = {path: path.stat().st_mtime_ns for path in finished(output)} | kept
    assert len(list(output.glob(f"dataset/{configuration}/.*.tar.*{PARTIAL_SUFFIX}"))) == 1
    assert build_dataset(**parameters)["cached"] == 1
    assert digests(output) == expected
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.process
def test_a_build_on_a_store_that_was_killed_ends_with_the_bytes_of_one_on_a_disk(
    tmp_path: Path, bucket: str, run_killed: Callable[..., None]
) -> None:
    """The drawn world lies there, too, and is read with the credentials that it was written with."""
    counts = {"train": 3, "validation": 1, "test": 1}
    backgrounds = {f"{split}_backgrounds": 1 for split in counts}
    source = {"kind": "sample", **counts, **backgrounds, "smallest": 128, "largest": 128, "broken": False}
    recipe, output = tmp_path / "build.yaml", f"{bucket}/folder/dataset"
    settings = {"name": "killed", "source": source, "samples_per_shard": 2, "runner": {"workers": 1}}
    recipe.write_text(yaml.safe_dump(settings))
    assert build_dataset(str(recipe), str(tmp_path / "dataset"))["samples"] == 4
    expected = {name: digest for name, digest in digests(tmp_path).items() if name.startswith("dataset/")}

    run_killed("dataset_tools.schema.Sample.to_parts", 3, build_dataset, str(recipe), output)
    filesystem, base = open_root(output)
    first, finished = (f"{base}/real/train-000000{end}" for end in (".tar", ".index.json"))
    left = [filesystem.info(path)["LastModified"] for path in (first, finished)]
    assert not filesystem.exists(f"{base}/manifest.json")
    assert build_dataset(str(recipe), output)["cached"] == 1
    assert list(verify(output)) == []
    found = {path.removeprefix(f"{bucket[5:]}/folder/"): filesystem.cat_file(path) for path in filesystem.find(base)}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} == expected
    assert [filesystem.info(path)["LastModified"] for path in (first, finished)] == left


HELD_BY, NOTES = f"dataset.work/{HOLDER}", f"dataset.work/{MADE}"


def digests(folder: Path) -> dict[str, str]:
    """sha256 of all files below, but for Prefect's: names of results follow from when clips' files were written."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "results"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def finished(output: Path) -> list[Path]:
    """What is written anew where a step is done again: its result, and what it writes last."""
    patterns = ("dataset.work/results/*", "dataset.work/clips/*/clip.json", "dataset/*/*.index.json")
    return [path for pattern in patterns for path in output.glob(pattern) if not path.parent.name.startswith(".")]
