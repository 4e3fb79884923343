"""Own photographs: a folder of real pictures with masks goes through `mild build --source folder`."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import skimage.data
import yaml
from PIL import Image, ImageDraw

from dataset_tools.shards import ShardDataset, read_manifest, verify
from flows import cli
from flows.build_dataset import build_dataset

pytestmark = pytest.mark.usefixtures("prefect_server")

# Where people are in scikit-image's own photographs: an ellipse (left, top, right, bottom) each.
PEOPLE = {"astronaut": [(90, 0, 420, 511)], "camera": [(60, 60, 330, 500)], "cat": [], "coffee": []}


@pytest.fixture
def photographs(tmp_path: Path) -> tuple[Path, Path]:
    """Real photographs as JPEG, with one PNG mask a person."""
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    photos.mkdir()
    masks.mkdir()
    for name, ellipses in PEOPLE.items():
        picture = Image.fromarray(getattr(skimage.data, name)())
        picture.save(photos / f"{name}.jpg", quality=95)
        for number, ellipse in enumerate(ellipses):
            mask = Image.new("L", picture.size)
            ImageDraw.Draw(mask).ellipse(ellipse, fill=255)
            mask.save(masks / f"{name}_{number}.png")
    return photos, masks


def test_a_folder_of_real_photographs_becomes_shards(
    photographs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures with masks become samples with just those masks; pictures without are set aside with their reason."""
    photos, masks = photographs
    output = tmp_path / "dataset"
    command = ["mild", "build", "--source", "folder", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*command, "--photos", str(photos), "--masks", str(masks)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    assert list(verify(str(output))) == []
    splits = read_manifest(str(output)).shards["real"]
    samples = [sample for split in splits for sample in ShardDataset(str(output), "real", split)]
    assert len(samples) == 2
    for sample in samples:
        name = sample.origins[0].id.rsplit("-", 1)[0]
        with Image.open(masks / f"{name}_0.png") as drawn:
            assert np.array_equal(sample.people[0].mask, np.asarray(drawn) > 0)
        with Image.open(photos / f"{name}.jpg") as photo:
            error = sample.image.astype(int) - np.asarray(photo.convert("RGB"), int)
        assert np.abs(error).mean() < 3
    rejected = pq.read_table(output / "rejected.parquet").to_pylist()
    assert sorted(row["reason"] for row in rejected if row["outcome"] == "image-rejected") == ["no-mask", "no-mask"]


def test_folders_named_beside_a_settings_file_go_before_its_own(
    photographs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, masks = photographs
    recipe = tmp_path / "build.yaml"
    source = {"kind": "folder", "photos": str(tmp_path / "absent"), "masks": str(tmp_path / "absent")}
    recipe.write_text(yaml.safe_dump({"name": "mine", "source": {**source, "splits": {"train": 1.0}}}))
    command = ["mild", "build", str(recipe), "--output", str(tmp_path / "dataset")]
    monkeypatch.setattr(sys, "argv", [*command, "--photos", str(photos), "--masks", str(masks)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    assert read_manifest(str(tmp_path / "dataset")).shards["real"]["train"][0].samples == 2


def test_a_mask_that_changed_under_its_name_is_noticed(photographs: tuple[Path, Path], tmp_path: Path) -> None:
    """Neither name, size nor box differ, yet the next run rebuilds the shard of that photograph, and no other."""
    photos, masks = photographs
    recipe = tmp_path / "build.yaml"
    source = {"kind": "folder", "photos": str(photos), "masks": str(masks), "splits": {"train": 1.0}}
    recipe.write_text(yaml.safe_dump({"name": "mine", "source": source, "samples_per_shard": 1}))
    build_dataset(str(recipe), str(tmp_path / "dataset"))
    with Image.open(masks / "astronaut_0.png") as old:
        mask = np.array(old)
    mask[200:300, 200:300] = 0
    Image.fromarray(mask).save(masks / "astronaut_0.png")
    summary = build_dataset(str(recipe), str(tmp_path / "dataset"))
    assert (summary["shards"], summary["cached"]) == (2, 1)
    held = ShardDataset(str(tmp_path / "dataset"), "real", "train")
    changed = [sample for sample in held if sample.origins[0].id.startswith("astronaut")]
    assert np.array_equal(changed[0].people[0].mask, mask > 0)


def test_what_would_poison_the_dataset_is_not_in_it(photographs: tuple[Path, Path], tmp_path: Path) -> None:
    """An inverted mask, a person whose mask turns out unusable beside one whose mask is good, a picture that JPEG
    cannot hold; a soft mask is used."""
    photos, masks = photographs
    with Image.open(masks / "camera_0.png") as drawn:
        camera = np.asarray(drawn)
    Image.fromarray(255 - camera).save(masks / "camera_0.png")
    for name in ("cat", "coffee"):
        width, height = Image.open(photos / f"{name}.jpg").size
        soft = np.zeros((height, width), np.uint8)
        soft[40:200, 50:150] = 255
        soft = cv2.GaussianBlur(soft, (0, 0), 3)
        Image.fromarray(soft).save(masks / f"{name}_0.png")
    speck = np.zeros((height, width), bool)
    speck[:2, :2] = True
    Image.fromarray(speck).save(masks / "coffee_1.png")
    strip = np.zeros((96, 66_000), np.uint8)
    Image.fromarray(strip).convert("RGB").save(photos / "long.png")
    strip[10:90, 30_000:33_000] = 255
    Image.fromarray(strip).save(masks / "long_0.png")
    recipe = tmp_path / "build.yaml"
    source = {"kind": "folder", "photos": str(photos), "masks": str(masks), "splits": {"train": 1.0}}
    recipe.write_text(yaml.safe_dump({"name": "mine", "source": source}))
    build_dataset(str(recipe), str(tmp_path / "dataset"))
    samples = {s.origins[0].id.rsplit("-", 1)[0]: s for s in ShardDataset(str(tmp_path / "dataset"), "real", "train")}
    assert sorted(samples) == ["astronaut", "cat"]
    assert len(samples["cat"].people) == 1 and samples["cat"].people[0].mask[50:190, 60:140].all()
    rows = pq.read_table(tmp_path / "dataset/rejected.parquet").to_pylist()
    found = {(row["image_id"].rsplit("-", 1)[0], row["outcome"], row["reason"]) for row in rows}
    assert {row for row in found if row[1] != "mended"} == {
        ("camera", "person-rejected", "mask-covers-everything"),
        ("camera", "image-rejected", "no-usable-mask"),
        ("coffee", "person-rejected", "mask-too-small"),
        ("coffee", "image-rejected", "person-without-mask"),
        ("long", "image-rejected", "too-long-for-jpeg"),
    }
    assert any("is the mask inverted?" in row["message"] for row in rows)


def test_one_bad_background_of_few_costs_no_composite(tmp_path: Path) -> None:
    """Each shard has one of its own; the shard whose own is cut short takes another."""
    rng = np.random.default_rng(0)
    for folder in ("photos", "masks", "backgrounds"):
        (tmp_path / folder).mkdir()
    person = np.zeros((300, 300), bool)
    person[60:240, 100:180] = True
    for name in "ab":
        Image.fromarray(np.where(person[..., None], rng.integers(0, 255, 3), 120).astype(np.uint8)).save(
            tmp_path / f"photos/{name}.png"
        )
        Image.fromarray(person).save(tmp_path / f"masks/{name}.png")
    for name in "abc":
        Image.fromarray(rng.integers(60, 200, (256, 256, 3), np.uint8)).save(tmp_path / f"backgrounds/{name}.png")
    bad = tmp_path / "backgrounds/b.png"
    bad.write_bytes(bad.read_bytes()[:3000])
    source = {"kind": "folder", **{name: str(tmp_path / name) for name in ("photos", "masks", "backgrounds")}}
    composite = {"size": [128, 128], "samples": {"train": 12}, "donors": {"min_height": 32}}
    settings = {"name": "few", "samples_per_shard": 4, "source": source | {"splits": {"train": 1}}}
    recipe = tmp_path / "build.yaml"
    recipe.write_text(yaml.safe_dump(settings | {"composite": composite}))
    build_dataset(str(recipe), str(tmp_path / "dataset"))
    assert len(ShardDataset(str(tmp_path / "dataset"), "composite", "train")) == 12
    rows = pq.read_table(tmp_path / "dataset/rejected.parquet").to_pylist()
    assert {(row["image_id"].rsplit("-", 1)[0], row["reason"]) for row in rows} == {("b", "truncated-image")}
