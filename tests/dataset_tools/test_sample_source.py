"""The drawn mirror has OpenImages' names, columns and oddities, and the same settings give the same bytes."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dataset_tools.errors import UserError
from dataset_tools.sources.sample import BROKEN, SampleSettings, write_mirror

pytestmark = pytest.mark.slow

SMALL = SampleSettings(
    train=16, validation=1, test=1, train_backgrounds=2, validation_backgrounds=1, test_backgrounds=1,
    smallest=160, largest=224,
)  # fmt: skip
TINY = SampleSettings(
    train=1, validation=1, test=1, train_backgrounds=1, validation_backgrounds=1, test_backgrounds=1,
    smallest=128, largest=160, broken=False,
)  # fmt: skip
# Columns and names as the public release has them (storage.googleapis.com/openimages).
MASKS = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
BOXES = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
CLICKS = ",XClick1X,XClick2X,XClick3X,XClick4X,XClick1Y,XClick2Y,XClick3Y,XClick4Y"
LABELS = "ImageID,Source,LabelName,Confidence"
IMAGES = (
    "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,OriginalMD5,"
    "Thumbnail300KURL,Rotation"
)
HEADERS = {
    "v5/train-annotations-object-segmentation.csv": MASKS,
    "v5/validation-annotations-object-segmentation.csv": MASKS,
    "v5/test-annotations-object-segmentation.csv": MASKS,
    "v6/oidv6-train-annotations-bbox.csv": BOXES + CLICKS,
    "v5/validation-annotations-bbox.csv": BOXES,
    "v5/test-annotations-bbox.csv": BOXES,
    "v7/oidv7-train-annotations-human-imagelabels.csv": LABELS,
    "v7/oidv7-val-annotations-human-imagelabels.csv": LABELS,
    "v7/oidv7-test-annotations-human-imagelabels.csv": LABELS,
    "2018_04/train/train-images-boxable-with-rotation.csv": IMAGES,
    "2018_04/validation/validation-images-with-rotation.csv": IMAGES,
    "2018_04/test/test-images-with-rotation.csv": IMAGES,
}
PERSON_MIDS = {"/m/01g317", "/m/04yx4", "/m/03bt1vf", "/m/01bl7v", "/m/05r655"}
BOX = ("XMin", "YMin", "XMax", "YMax")


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sample") / "mirror"
    write_mirror(SMALL, str(root))
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror of a few pictures, not to be changed."""
    root = tmp_path_factory.mktemp("sample") / "tiny"
    write_mirror(TINY, str(root))
    return root


def rows(mirror: Path, name: str) -> list[dict[str, Any]]:
    with (mirror / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def mask_rows(mirror: Path) -> list[dict[str, Any]]:
    """Well-formed rows of the train masks."""
    table = rows(mirror, "v5/train-annotations-object-segmentation.csv")
    return [row for row in table if row["Clicks"] is not None and "/" not in row["ImageID"]]


def read_mask(mirror: Path, row: dict[str, Any]) -> np.ndarray:
    with zipfile.ZipFile(mirror / f"v5/train-masks/train-masks-{row['ImageID'][0]}.zip") as archive:
        picture = Image.open(io.BytesIO(archive.read(row["MaskPath"])))
    assert picture.mode == "1"
    return np.asarray(picture)


def broken_ids(kind: str) -> str:
    return hashlib.sha256(f"{SMALL.seed}/train/broken/{kind}".encode()).hexdigest()[:16]


def digests(root: Path) -> dict[str, str]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_settings_give_the_same_bytes(mirror: Path, tmp_path: Path) -> None:
    write_mirror(SMALL, str(tmp_path / "again"))
    assert digests(tmp_path / "again") == digests(mirror)


def test_another_seed_gives_other_pictures(tiny: Path, tmp_path: Path) -> None:
    write_mirror(TINY.model_copy(update={"seed": 1}), str(tmp_path / "b"))
    first = {value for name, value in digests(tiny).items() if name.startswith("images/")}
    second = {value for name, value in digests(tmp_path / "b").items() if name.startswith("images/")}
    assert len(first) > 5 and not first & second


def test_a_mirror_in_memory_equals_one_on_disk(tiny: Path) -> None:
    write_mirror(TINY, "memory://sample-mirror")
    memory = fsspec.filesystem("memory")
    held = {
        p.removeprefix("/sample-mirror/"): hashlib.sha256(memory.cat_file(p)).hexdigest()
        for p in memory.find("/sample-mirror")
    }
    assert held == digests(tiny)


def test_a_mirror_that_stands_there_is_replaced_and_nothing_is_left_beside_it(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "mirror")
    (tmp_path / "mirror" / "stale.txt").write_text("old")
    write_mirror(TINY, str(tmp_path / "mirror"))
    assert [path.name for path in tmp_path.iterdir()] == ["mirror"]
    assert not (tmp_path / "mirror" / "stale.txt").exists()


def test_an_unwritable_place_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_mirror(TINY, str(tmp_path / "file" / "mirror"))


def test_sizes_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(UserError, match="smallest"):
        SampleSettings.check({"smallest": 300, "largest": 200}, origin="test")


@pytest.mark.parametrize("name", HEADERS)
def test_tables_have_the_columns_of_the_release(mirror: Path, name: str) -> None:
    assert (mirror / name).read_text(encoding="utf-8").split("\n", 1)[0] == HEADERS[name]


def test_class_files_name_people_and_more(mirror: Path) -> None:
    with (mirror / "v5/class-descriptions-boxable.csv").open(newline="") as file:
        names = dict(csv.reader(file))
    assert {names[mid] for mid in PERSON_MIDS} == {"Person", "Man", "Woman", "Boy", "Girl"}
    assert len(names) > 15
    segmented = set((mirror / "v5/classes-segmentation.txt").read_text().split())
    assert PERSON_MIDS < segmented < set(names)


def test_ids_masks_and_zips_are_named_as_in_the_release(mirror: Path) -> None:
    for row in mask_rows(mirror):
        assert re.fullmatch("[0-9a-f]{16}", row["ImageID"]) and re.fullmatch("[0-9a-f]{8}", row["BoxID"])
        assert row["MaskPath"] == f"{row['ImageID']}_{row['LabelName'].replace('/', '')}_{row['BoxID']}.png"
    zips = {path.name for path in (mirror / "v5/test-masks").iterdir()}
    assert zips == {f"test-masks-{digit}.zip" for digit in "0123456789abcdef"}


def test_sound_masks_match_their_boxes_and_most_differ_in_size_from_their_picture(mirror: Path) -> None:
    faulty = {broken_ids(kind) for kind in BROKEN["train"]}
    checked = [row for row in mask_rows(mirror) if row["ImageID"] not in faulty]
    differ = 0
    for row in checked:
        mask = read_mask(mirror, row)
        with Image.open(mirror / "images/train" / f"{row['ImageID']}.jpg") as picture:
            size = np.array(picture.size)
        ys, xs = np.nonzero(mask)
        height, width = mask.shape
        found = np.array([xs.min() / width, ys.min() / height, (xs.max() + 1) / width, (ys.max() + 1) / height])
        told = np.array([float(row[f"Box{column}"]) for column in BOX])
        assert np.abs((found - told) * np.tile(size, 2)).max() <= 2
        differ += mask.shape != (size[1], size[0])
    assert len(checked) > 20 and differ > len(checked) / 2


def test_every_mask_has_its_box_row(mirror: Path) -> None:
    boxes = rows(mirror, "v6/oidv6-train-annotations-bbox.csv")
    held = {(row["ImageID"], row["LabelName"]) for row in boxes}
    assert {(row["ImageID"], row["LabelName"]) for row in mask_rows(mirror)} <= held
    twice = {row["ImageID"] for row in boxes if row["LabelName"] == "/m/01g317"} & {
        row["ImageID"] for row in boxes if row["LabelName"] in PERSON_MIDS - {"/m/01g317"}
    }
    assert twice
    assert any(row["IsGroupOf"] == "1" for row in boxes) and any(row["IsDepiction"] == "1" for row in boxes)


def test_turning_by_rotation_brings_the_stored_picture_upright(mirror: Path) -> None:
    """The plate lies upright: it must resemble the turned picture, and the picture turned otherwise less."""
    turned = [
        row
        for row in rows(mirror, "2018_04/train/train-images-boxable-with-rotation.csv")
        if row["Rotation"] not in ("", "0.0")
    ]
    assert len(turned) >= 3
    for row in turned:
        stored = np.asarray(Image.open(mirror / "images/train" / f"{row['ImageID']}.jpg"))
        plate = np.asarray(Image.open(mirror / "sidecar/train" / f"{row['ImageID']}.plate.png")).astype(float)
        quarter_turns = int(float(row["Rotation"])) // 90
        errors = {
            k: np.abs(np.rot90(stored, k) - plate).mean() for k in range(4) if np.rot90(stored, k).shape == plate.shape
        }
        assert min(errors, key=lambda k: errors[k]) == quarter_turns


def test_effects_of_the_side_car_are_where_picture_and_plate_differ_outside_of_people(mirror: Path) -> None:
    seen = 0
    for row in rows(mirror, "2018_04/validation/validation-images-with-rotation.csv"):
        stem = mirror / "sidecar/validation" / row["ImageID"]
        if not stem.with_suffix(".effects.png").exists() or row["Rotation"] not in ("", "0.0"):
            continue
        try:
            picture = np.asarray(Image.open(mirror / "images/validation" / f"{row['ImageID']}.jpg")).astype(int)
        except OSError:
            continue  # broken on purpose
        plate = np.asarray(Image.open(stem.with_suffix(".plate.png"))).astype(int)
        bits = np.asarray(Image.open(stem.with_suffix(".effects.png")))
        people = json.loads(stem.with_suffix(".json").read_text())["people"]
        known = sum({1 << person["effects_bit"] for person in people if person["effects"]})
        assert known == 0 or bits.max() <= known
        outside = ~ndimage.binary_dilation(np.asarray(Image.open(stem.with_suffix(".parsing.png"))) > 0, iterations=4)
        change = np.abs(picture - plate).max(2)
        shown = (bits > 0) & outside
        if shown.any():
            assert change[shown].mean() > 3 * change[~shown & outside].mean()
        seen += int(shown.sum())
    assert seen > 100


def test_keypoints_of_the_side_car_lie_in_the_upright_box(mirror: Path) -> None:
    rotations = {
        row["ImageID"]: row["Rotation"] for row in rows(mirror, "2018_04/train/train-images-boxable-with-rotation.csv")
    }
    checked = 0
    for row in mask_rows(mirror):
        if row["LabelName"] not in PERSON_MIDS:
            continue
        side_car = json.loads((mirror / "sidecar/train" / f"{row['ImageID']}.json").read_text())
        joints = np.array({p["box_id"]: p["keypoints"] for p in side_car["people"]}[row["BoxID"]])
        x0, y0, x1, y1 = (float(row[f"Box{column}"]) for column in BOX)
        for _ in range(int(float(rotations[row["ImageID"]] or 0)) // 90):  # a quarter turn: (x, y) -> (y, 1 - x)
            x0, y0, x1, y1 = y0, 1 - x1, y1, 1 - x0
        seen = joints[joints[:, 2] > 0]
        assert (seen[:, 0] >= x0 - 1e-3).all() and (seen[:, 0] <= x1 + 1e-3).all()
        assert (seen[:, 1] >= y0 - 1e-3).all() and (seen[:, 1] <= y1 + 1e-3).all()
        checked += len(seen)
    assert checked > 200


def test_verified_labels_tell_backgrounds_from_pictures_with_people(mirror: Path) -> None:
    table = rows(mirror, "v7/oidv7-train-annotations-human-imagelabels.csv")
    absent = {row["ImageID"] for row in table if row["LabelName"] == "/m/01g317" and row["Confidence"] == "0"}
    present = {row["ImageID"] for row in table if row["LabelName"] in PERSON_MIDS and row["Confidence"] == "1"}
    boxed = {
        row["ImageID"] for row in rows(mirror, "v6/oidv6-train-annotations-bbox.csv") if row["LabelName"] in PERSON_MIDS
    }
    assert len(absent) == SMALL.train_backgrounds and not absent & present
    assert len([image for image in present - boxed if "/" not in image]) == 1  # people, but no box
    labelled = {row["ImageID"] for row in table}
    assert labelled - absent - present  # nobody said anything about people


def test_metadata_describes_the_file_and_some_licences_forbid_changes(mirror: Path) -> None:
    table = rows(mirror, "2018_04/train/train-images-boxable-with-rotation.csv")
    row = table[0]
    data = (mirror / "images/train" / f"{row['ImageID']}.jpg").read_bytes()
    assert int(row["OriginalSize"]) == len(data)
    assert base64.b64decode(row["OriginalMD5"]) == hashlib.md5(data).digest()
    licences = {row["License"] for row in table}
    assert "https://creativecommons.org/licenses/by/2.0/" in licences and len(licences) > 1


def test_broken_pictures_are_broken_in_the_way_that_the_docstring_tells(mirror: Path) -> None:
    def data(kind: str) -> bytes:
        return (mirror / "images/train" / f"{broken_ids(kind)}.jpg").read_bytes()

    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(data("truncated"))).load()
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(io.BytesIO(data("text")))
    assert data("empty-file") == b""
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data("bomb")))
    assert not (mirror / "images/train" / f"{broken_ids('absent')}.jpg").exists()
    assert Image.open(io.BytesIO(data("cmyk"))).mode == "CMYK"
    assert Image.open(io.BytesIO(data("sixteen-bit"))).mode.startswith("I;16")
    assert Image.open(io.BytesIO(data("palette"))).mode == "P"
    assert Image.open(io.BytesIO(data("exif"))).getexif()[0x0112] == 6


def test_faulty_masks_and_rows_are_there(mirror: Path) -> None:
    table = mask_rows(mirror)

    def people(kind: str) -> list[dict[str, Any]]:
        return [row for row in table if row["ImageID"] == broken_ids(kind) and row["LabelName"] in PERSON_MIDS]

    assert not read_mask(mirror, people("empty-mask")[0]).any()
    assert read_mask(mirror, people("full-mask")[0]).all()
    with pytest.raises(KeyError):
        read_mask(mirror, people("missing-member")[0])
    height, width = read_mask(mirror, people("other-aspect")[0]).shape
    with Image.open(mirror / "images/train" / f"{broken_ids('other-aspect')}.jpg") as picture:
        assert (width / height) / (picture.width / picture.height) > 3
    lines = [
        len(line) for line in csv.reader((mirror / "v6/oidv6-train-annotations-bbox.csv").read_text().splitlines())
    ]
    assert min(lines) < max(lines) == 21
    assert any(row["ImageID"].startswith("../") for row in rows(mirror, "v5/train-annotations-object-segmentation.csv"))


def test_without_broken_every_listed_picture_is_sound(tiny: Path) -> None:
    for split, table in (("train", "train/train-images-boxable"), ("test", "test/test-images")):
        for row in rows(tiny, f"2018_04/{table}-with-rotation.csv"):
            with Image.open(tiny / "images" / split / f"{row['ImageID']}.jpg") as picture:
                assert picture.format == "JPEG" and picture.mode == "RGB"
                picture.load()
