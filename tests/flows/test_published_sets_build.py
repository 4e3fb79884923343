"""Published sets in their own layouts go through `mild build`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools.coco import COCO

from dataset_tools.schema import KEYPOINTS
from dataset_tools.shards import ShardDataset, verify
from flows.build_dataset import build_dataset
from flows.pipeline import recipe_path

pytestmark = pytest.mark.usefixtures("prefect_server")
SMALL = {
    "composite.samples": {"train": 1},
    "composite.size": [64, 64],
    "composite.donors": {"min_height": 32},
    "curated.decode": {"min_side": 16},
}


def photograph(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, 96 * 128 * 3).reshape(96, 128, 3)
    Image.fromarray(ramp.astype(np.uint8)).save(path, quality=95)


def test_coco_becomes_shards(tmp_path: Path) -> None:
    """Two people's masks are those of COCO's own library, pose and caption travel, a composite is made."""
    root = tmp_path / "coco"
    for number in (1, 2):
        photograph(root / f"train2017/{number:012d}.jpg")
    annotations = [
        {"segmentation": [[20, 10, 50, 10, 45, 85, 25, 85]], "bbox": [20, 10, 30, 75], "id": 11},
        {"segmentation": [[70, 20, 110, 20, 100, 90, 75, 90]], "bbox": [70, 20, 40, 70], "id": 12},
    ]
    rows = [{"iscrowd": 0, "image_id": 1, "category_id": 1, "area": 2000.0, **row} for row in annotations]
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 128, "height": 96, "license": 4} for n in (1, 2)]
    shared = {"licenses": [{"id": 4, "url": "http://creativecommons.org/licenses/by/2.0/"}], "images": images}
    shared |= {"categories": [{"id": 1, "name": "person"}]}
    keypoints = [35, 15, 2, *[0] * 48]
    texts = [{"id": 1, "image_id": 1, "caption": "Two people."}]
    files = {
        "instances_train2017": {**shared, "annotations": [*rows, {"id": 13, "image_id": 77}]},
        "person_keypoints_train2017": {**shared, "annotations": [{**rows[0], "keypoints": keypoints}]},
        "captions_train2017": {**shared, "annotations": texts},
    }
    (root / "annotations").mkdir()
    for name, document in files.items():
        (root / f"annotations/{name}.json").write_text(json.dumps(document))
    changes = {**SMALL, "source.root": str(root), "source.splits": ["train"], "source.validation_share": 0}
    summary = build_dataset(recipe_path("build", "coco"), str(tmp_path / "dataset"), changes)
    assert (summary["samples"], summary["rejected"]) == (2, {"missing-image": 1})
    assert list(verify(str(tmp_path / "dataset"))) == []
    (sample,) = ShardDataset(str(tmp_path / "dataset"), "real", "train")
    (root / "annotations/instances_train2017.json").write_text(json.dumps({**shared, "annotations": rows}))
    library = COCO(str(root / "annotations/instances_train2017.json"))
    for person in sample.people:
        assert np.array_equal(person.mask, library.annToMask(library.loadAnns(int(person.id))[0]))
    assert sample.people[0].keypoints[KEYPOINTS.index("nose")].tolist() == [35, 15, 1]
    assert (sample.made_by.pose.name, sample.caption) == ("annotated", "Two people.")
    (composite,) = ShardDataset(str(tmp_path / "dataset"), "composite", "train")
    assert {origin.id for origin in composite.origins} == {"000000000001", "000000000002"}


def test_ade20k_becomes_shards(tmp_path: Path) -> None:
    root = tmp_path / "ade"
    pixels = np.zeros((96, 128, 3), np.uint8)
    pixels[10:85, 20:50] = (4, 1, 0)
    pixels[20:90, 70:110] = (4, 2, 0)
    for number, mask in (("1", pixels), ("2", np.zeros_like(pixels)), ("3", pixels[:40])):
        photograph(root / f"images/training/ADE_train_0000000{number}.jpg")
        path = root / f"annotations_instance/training/ADE_train_0000000{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    floor = np.zeros((96, 128), np.uint8)
    floor[30:, 40:] = 4
    path = root / "annotations/training/ADE_train_00000002.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(floor).save(path)
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n4\t0.1\t1\t1\tfloor, flooring\n")
    changes = {**SMALL, "source.root": str(root), "source.splits": ["train"], "source.validation_share": 0}
    # Backgrounds as they are, and nothing but their floors between them and their composites.
    changes |= {"composite.size": [128, 96], "composite.crop": [1, 1], "composite.flip": 0}
    changes |= {"composite.samples": {"train": 3}, "composite.light": {"shadows": 0, "reflections": 1, "gloss": [1, 1]}}
    summary = build_dataset(recipe_path("build", "ade20k"), str(tmp_path / "dataset"), changes)
    assert summary["samples"] == 4 and list(verify(str(tmp_path / "dataset"))) == []
    mirrored = [made.effects > 0 for made in ShardDataset(str(tmp_path / "dataset"), "composite", "train")]
    assert len(mirrored) == 3 and np.any(mirrored) and not (np.any(mirrored, axis=0) & (floor == 0)).any()
    (sample,) = ShardDataset(str(tmp_path / "dataset"), "real", "train")
    for person in sample.people:
        assert np.array_equal(person.mask, pixels[..., 1] == int(person.id))
    rejected = pq.read_table(tmp_path / "dataset/rejected.parquet").to_pylist()
    assert ("ADE_train_00000003", "mask-size-mismatch") in {(row["image_id"], row["reason"]) for row in rejected}
