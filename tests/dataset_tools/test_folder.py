"""Own photographs: every way of storing masks gives the same people, and what cannot be used is named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from pydantic import ValidationError

from dataset_tools.errors import Rejected, UserError
from dataset_tools.images import DecodeSettings, decode_image
from dataset_tools.record_file import RecordFile
from dataset_tools.records import Curation, ImageRecord, rejections_to_table
from dataset_tools.schema import KEY_PATTERN, encode_rle
from dataset_tools.sources import Source
from dataset_tools.sources.folder import FolderSettings, FolderSource

HEIGHT, WIDTH = 60, 90
LEFT, RIGHT = np.zeros((2, HEIGHT, WIDTH), bool)
LEFT[10:50, 10:30] = True
RIGHT[20:55, 50:80] = True


def photo(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def save(array: np.ndarray, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def source_of(root: Path, **changes: object) -> FolderSource:
    values = {"photos": f"{root}/photos", "masks": f"{root}/masks"} | changes
    return FolderSettings.check(values, origin="test").open()


def masks_of(source: FolderSource, record: ImageRecord) -> list[np.ndarray]:
    return [source.read_mask(record, index) for index in range(len(record.instances))]


def why(curation: Curation) -> set[tuple[str, str]]:
    return {(rejection.outcome, rejection.reason) for rejection in curation.rejected}


def write_people_pngs(root: Path) -> None:
    save(LEFT, root / "masks/one_0.png")
    save(RIGHT.astype(np.uint8) * 255, root / "masks/one_1.png")


def write_folder_of_pngs(root: Path) -> None:
    save(LEFT, root / "masks/one/ann.png")
    save(RIGHT, root / "masks/one/bob.png")


def write_index_png(root: Path) -> None:
    save((LEFT * 3 + RIGHT * 7).astype(np.uint8), root / "masks/one.png")


def write_palette_png_with_void(root: Path) -> None:
    index = (LEFT * 1 + RIGHT * 2).astype(np.uint8)
    index[0, :5] = 255
    picture = Image.fromarray(index)
    palette = np.random.default_rng(0).integers(0, 256, (256, 3))
    palette[0], palette[255] = 0, (224, 224, 192)  # Pascal VOC's border, of this colour alone
    picture.putpalette(palette.ravel().tolist())
    (root / "masks").mkdir()
    picture.save(root / "masks/one.png")


def coco(segmentations: list[object], **changes: object) -> dict[str, object]:
    return {
        "images": [{"id": 5, "file_name": "one.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            {"id": 10 + k, "image_id": 5, "category_id": 1, "segmentation": s} for k, s in enumerate(segmentations)
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}],
    } | changes


def write_coco(root: Path, document: dict[str, object]) -> None:
    (root / "masks").mkdir(exist_ok=True)
    (root / "masks/people.json").write_text(json.dumps(document))


def write_coco_polygons(root: Path) -> None:
    write_coco(root, coco([[[10, 10, 30, 10, 30, 50, 10, 50]], [[50, 20, 80, 20, 80, 55, 50, 55]]]))


def uncompressed(mask: np.ndarray) -> dict[str, object]:
    flat = mask.T.ravel().astype(np.int8)
    edges = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])
    return {"size": [HEIGHT, WIDTH], "counts": ([0] if flat[0] else []) + np.diff(edges).tolist()}


def write_coco_rle(root: Path) -> None:
    write_coco(root, coco([encode_rle(LEFT), uncompressed(RIGHT)]))


@pytest.mark.parametrize(
    "write",
    [write_people_pngs, write_folder_of_pngs, write_index_png, write_palette_png_with_void, write_coco_polygons,
     write_coco_rle],
)  # fmt: skip
def test_every_way_of_storing_masks_gives_the_same_two_people(tmp_path: Path, write: object) -> None:
    file = save(photo(1), tmp_path / "photos/one.jpg")
    write(tmp_path)  # type: ignore[operator]
    json_file = tmp_path / "masks/people.json"
    source = source_of(tmp_path, masks=str(json_file if json_file.exists() else json_file.parent))
    assert isinstance(source, Source) and source.applies_exif
    curation = source.curate()
    assert curation.rejected == []
    (record,) = curation.records
    assert [np.array_equal(m, t) for m, t in zip(masks_of(source, record), (LEFT, RIGHT), strict=True)] == [True, True]
    assert record.instances[0].box == pytest.approx((10 / 90, 10 / 60, 30 / 90, 50 / 60))
    assert record.instances[1].category == "Person" and len({i.id for i in record.instances}) == 2
    assert (record.role, record.stratum, record.rotation) == ("people", "two_or_three", 0)
    assert source.read_image(record) == file.read_bytes()
    assert masks_of(pickle.loads(pickle.dumps(source)), record)[0].any()


def test_a_person_of_palette_index_zero_has_their_own_mask_and_no_others(tmp_path: Path) -> None:
    save(photo(0), tmp_path / "photos/one.png")
    index = Image.fromarray((2 - 2 * LEFT - RIGHT).astype(np.uint8), mode="P")
    index.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 0])
    (tmp_path / "masks").mkdir()
    index.save(tmp_path / "masks/one.png")
    source = source_of(tmp_path)
    (record,) = source.curate().records
    assert [instance.id for instance in record.instances] == ["0", "1"]
    found = masks_of(source, record)
    assert np.array_equal(found[0], LEFT) and np.array_equal(found[1], RIGHT)


def test_photographs_in_subfolders_find_their_own_masks(tmp_path: Path) -> None:
    for number, folder in enumerate(("a", "b")):
        save(photo(number), tmp_path / f"photos/{folder}/same.jpg")
    save(LEFT, tmp_path / "masks/a/same_0.png")
    save(RIGHT, tmp_path / "masks/b/same_0.png")
    source = source_of(tmp_path)
    records = source.curate().records
    assert [np.array_equal(masks_of(source, r)[0], t) for r, t in zip(records, (LEFT, RIGHT), strict=True)] == [
        True
    ] * 2
    assert len({record.id for record in records}) == 2


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        (["a_0", "a_1"], {}),
        (["a_0"], {}),
        (["a", "a_0"], {"a": 1, "a_0": 1}),
        (["a_0", "a_1", "a_0_0"], {"a": 2, "a_0": 1}),
        (["a_0", "a_1", "a_0/x"], {"a": 2, "a_0": 1}),
        (["a/x", "a/y", "a_0"], {"a": 2, "a_0": 1}),
    ],
)
def test_a_mask_that_two_photographs_claim_is_never_given_to_one_by_guessing(
    tmp_path: Path, masks: list[str], expected: dict[str, int]
) -> None:
    """``a_0.png`` is all of a_0.jpg or one person of a.jpg: what else there is tells, or both are set aside."""
    for number, name in enumerate(("a", "a_0")):
        save(photo(number), tmp_path / f"photos/{name}.jpg")
    for name in masks:
        save(LEFT, tmp_path / f"masks/{name}.png")
    curation = source_of(tmp_path).curate()
    assert {Path(record.image).stem: len(record.instances) for record in curation.records} == expected
    assert [row.reason for row in curation.rejected] == ([] if expected else ["ambiguous-masks"] * 2)


@pytest.mark.parametrize(
    ("photos", "masks"),
    [
        (["dup.jpg", "dup.png"], ["dup.png"]),
        (["one.jpg"], ["one.png", "one.tif"]),
        (["one.jpg"], ["one.png", "one_0.png"]),
        (["one.jpg"], ["one_0.png", "one_0.tif"]),
    ],
)
def test_masks_that_may_be_anothers_or_are_there_twice_are_not_used(
    tmp_path: Path, photos: list[str], masks: list[str]
) -> None:
    for number, name in enumerate(photos):
        save(photo(number), tmp_path / "photos" / name)
    for name in masks:
        save(LEFT, tmp_path / "masks" / name)
    curation = source_of(tmp_path).curate()
    assert curation.records == []
    assert [row.reason for row in curation.rejected] == ["ambiguous-masks"] * len(photos)


def test_every_file_that_is_passed_over_has_a_row(tmp_path: Path) -> None:
    """Unreadable suffixes, links to nothing, masks of no photograph; folders behind links are read, and none for
    ever."""
    save(photo(1), tmp_path / "elsewhere/far.jpg")
    save(photo(2), tmp_path / "photos/one.jpg")
    (tmp_path / "photos/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/round").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "photos/phone.heic").write_bytes(b"x")
    for name in ("one", "linked/far", "nobody", "nobody_3", "nobody/x"):
        save(LEFT, tmp_path / f"masks/{name}.png")
    (tmp_path / "masks/one_1.npy").write_bytes(b"x")
    curation = source_of(tmp_path).curate()
    assert [Path(record.image).name for record in curation.records] == ["far.jpg", "one.jpg"]
    assert sorted((row.image_id, row.reason) for row in curation.rejected) == [
        ("lost.jpg", "not-found"),
        ("nobody.png", "missing-image"),
        ("nobody/x.png", "missing-image"),
        ("nobody_3.png", "missing-image"),
        ("one_1.npy", "unknown-suffix"),
        ("phone.heic", "unknown-suffix"),
    ]


def test_nobody_waits_for_a_named_pipe_among_photographs_and_masks(tmp_path: Path) -> None:
    save(photo(1), tmp_path / "photos/one.jpg")
    save(LEFT, tmp_path / "masks/one.png")
    os.mkfifo(tmp_path / "photos/two.jpg")
    os.mkfifo(tmp_path / "masks/one_1.png")
    source = source_of(tmp_path)
    curation = source.curate()
    (record,) = curation.records
    (mask,) = masks_of(source, record)
    assert Path(record.image).name == "one.jpg" and np.array_equal(mask, LEFT) and curation.rejected == []


def test_names_that_are_no_text_are_set_aside_in_text_that_can_be_stored(tmp_path: Path) -> None:
    """Linux allows any bytes; the others, of any language, are used."""
    save(photo(1), tmp_path / "photos/été 北京.jpg")
    save(LEFT, tmp_path / "masks/été 北京_0.png")
    save(photo(2), tmp_path / "photos/two.jpg")
    save(LEFT, tmp_path / "masks/two/a.png")
    for folder, name in (("photos", b"caf\xe9.jpg"), ("masks", b"caf\xe9_0.png"), ("masks/two", b"\xff.png")):
        shutil.copy(tmp_path / "masks/two/a.png", os.path.join(os.fsencode(tmp_path / folder), name))
    curation = source_of(tmp_path).curate()
    assert [record.title for record in curation.records] == ["été 北京"]
    table = rejections_to_table(curation.rejected).to_pylist()
    assert {(row["image_id"], row["reason"]) for row in table} >= {
        ("caf\\udce9.jpg", "name-not-unicode"),
        ("caf\\udce9_0.png", "missing-image"),
    }
    assert sorted(row["reason"] for row in table if row["image_id"].startswith("two")) == [
        "name-not-unicode",
        "person-without-mask",
    ]


@pytest.mark.parametrize("code", range(1, 9))
@pytest.mark.parametrize("stored_like_the_photo", [True, False])
def test_masks_meet_their_photograph_in_either_orientation(
    tmp_path: Path, code: int, stored_like_the_photo: bool
) -> None:
    exif = Image.Exif()
    exif[0x0112] = code
    save(photo(1), tmp_path / "photos/one.png", exif=exif)
    buffer = io.BytesIO()
    Image.fromarray(LEFT).save(buffer, "PNG", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(buffer)))
    # Where both orientations have the same shape, a mask can only be taken as upright.
    save(LEFT if stored_like_the_photo and code >= 5 else upright, tmp_path / "masks/one_0.png")
    source = source_of(tmp_path)
    (record,) = source.curate().records
    decoded = decode_image(source.read_image(record), DecodeSettings(min_side=8), rotation=None)
    assert np.array_equal(decoded.apply_orientation(source.read_mask(record, 0)), upright)
    assert decoded.image.shape[:2] == upright.shape
    assert record.instances[0].box == pytest.approx((10 / 90, 10 / 60, 30 / 90, 50 / 60))


def test_what_cannot_be_used_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    for number, name in enumerate(("good", "bare", "broken", "nobody", "soft")):
        save(photo(number), tmp_path / f"photos/{name}.jpg")
    (tmp_path / "photos/not-a-photo.jpg").write_text("<html>")
    (tmp_path / "photos/.hidden.jpg").write_bytes(b"")
    (tmp_path / "photos/notes.txt").write_text("x")
    for name in ("good_0", "good_1", "not-a-photo_0"):
        save(LEFT, tmp_path / f"masks/{name}.png")
    (tmp_path / "masks/broken_0.png").write_bytes((tmp_path / "masks/good_0.png").read_bytes()[:50])
    save(np.zeros_like(LEFT), tmp_path / "masks/nobody_0.png")
    save(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8), tmp_path / "masks/soft.png")
    curation = source_of(tmp_path).curate()
    assert [Path(record.image).name for record in curation.records] == ["good.jpg", "not-a-photo.jpg"]
    assert curation.records[0].stratum == "overlapping"
    assert why(curation) == {
        ("image-rejected", "no-mask"),
        ("person-rejected", "truncated-image"),
        ("person-rejected", "empty-mask"),
        ("person-rejected", "not-a-mask"),
        ("row-rejected", "unknown-suffix"),
    }
    assert len([r for r in curation.rejected if r.reason == "no-mask"]) == 4


def test_bad_rows_of_a_coco_json_are_set_aside_one_by_one(tmp_path: Path) -> None:
    save(photo(1), tmp_path / "photos/one.jpg")
    square = [[10, 10, 30, 10, 30, 50, 10, 50]]
    document = coco(
        [
            square,
            [[1, 2, 3]],
            [],
            [[0, 0, 1e12, 0, 5, 5]],
            {"size": [HEIGHT, WIDTH], "counts": [5, 6]},
            {"size": [7, 7], "counts": "abc"},
            {"size": [HEIGHT, WIDTH], "counts": "~~~~"},
            None,
        ]
    )
    rows: list[object] = document["annotations"]  # type: ignore[assignment]
    rows.append({"id": 30, "image_id": 5, "category_id": 2, "segmentation": square})  # a dog
    rows.append({"id": 31, "image_id": 99, "category_id": 1, "segmentation": square})
    rows.append({"id": 32, "category_id": 1, "segmentation": square})
    rows.append({"id": 33, "image_id": 5, "category_id": 1, "iscrowd": 1, "segmentation": encode_rle(LEFT)})
    rows.append("nonsense")
    images: list[object] = document["images"]  # type: ignore[assignment]
    images.append({"id": 6, "file_name": "../../etc/passwd", "height": 5, "width": 5})
    images.append({"file_name": "one.jpg"})
    write_coco(tmp_path, document)
    curation = source_of(tmp_path, masks=f"{tmp_path}/masks/people.json").curate()
    assert Counter(rejection.reason for rejection in curation.rejected) == {
        "malformed-row": 11,
        "missing-image": 1,
        "crowd": 1,
        "person-without-mask": 1,
    }
    assert curation.records == [], "somebody in it has no mask"
    document["annotations"] = [row for row in rows if isinstance(row, dict) and row["id"] in (10, 30, 31, 32)]
    write_coco(tmp_path, document)
    source = source_of(tmp_path, masks=f"{tmp_path}/masks/people.json")
    (record,) = source.curate().records
    assert [instance.id for instance in record.instances] == ["10"]
    truth = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(square, HEIGHT, WIDTH))).astype(bool)
    assert np.array_equal(source.read_mask(record, 0), truth)


@pytest.mark.parametrize("lost", [{"iscrowd": 1}, {"iscrowd": "1"}, {"segmentation": [[1, 2]]}, {"category_id": 7}])
def test_a_picture_in_which_a_crowd_or_somebody_without_a_mask_stands_is_not_kept(
    tmp_path: Path, lost: dict[str, object]
) -> None:
    save(photo(1), tmp_path / "photos/one.jpg")
    document = coco([encode_rle(LEFT), encode_rle(RIGHT)])
    document["annotations"][1].update(lost)  # type: ignore[index]
    write_coco(tmp_path, document)
    curation = source_of(tmp_path, masks=f"{tmp_path}/masks/people.json").curate()
    assert curation.records == []
    (row,) = (row for row in curation.rejected if row.outcome == "image-rejected")
    assert row.reason == ("crowd" if "iscrowd" in lost else "person-without-mask") and "11" in row.message


def test_a_picture_of_which_one_mask_file_is_broken_is_not_kept(tmp_path: Path) -> None:
    save(photo(1), tmp_path / "photos/one.jpg")
    write_people_pngs(tmp_path)
    (tmp_path / "masks/one_1.png").write_bytes(b"junk")
    curation = source_of(tmp_path).curate()
    assert curation.records == []
    assert why(curation) == {("person-rejected", "not-an-image"), ("image-rejected", "person-without-mask")}


def test_ids_of_a_coco_json_may_be_text_or_left_out(tmp_path: Path) -> None:
    save(photo(1), tmp_path / "photos/one.jpg")
    document = coco([encode_rle(LEFT), encode_rle(RIGHT), encode_rle(LEFT | RIGHT)])
    first, second, third = document["annotations"]  # type: ignore[misc]
    first.update(image_id="0005", category_id="1", id="x")  # type: ignore[attr-defined]
    second.update(image_id="5", category_id=1.0)  # type: ignore[attr-defined]
    del second["id"], third["id"]  # type: ignore[attr-defined]
    write_coco(tmp_path, document)
    source = source_of(tmp_path, masks=f"{tmp_path}/masks/people.json")
    curation = source.curate()
    (record,) = curation.records
    assert curation.rejected == [] and [instance.id for instance in record.instances] == ["x", "row-1", "row-2"]
    assert [np.array_equal(m, t) for m, t in zip(masks_of(source, record), (LEFT, RIGHT, LEFT | RIGHT), strict=True)]


@pytest.mark.parametrize(
    ("photos", "names", "expected", "reasons"),
    [
        (["a/b.jpg"], ["./a/b.jpg"], ["a/b.jpg"], []),
        (["a/b.jpg"], ["a//b.jpg"], ["a/b.jpg"], []),
        (["a/b.jpg"], ["a\\b.jpg"], ["a/b.jpg"], []),
        (["a/b.jpg"], ["b.jpg"], ["a/b.jpg"], []),
        (["b.jpg"], ["/home/me/a/b.jpg"], ["b.jpg"], []),
        (["a/b.jpg"], ["c/b.jpg"], ["a/b.jpg"], ["matched-by-name"]),
        (["a/b.jpg", "c/b.jpg"], ["a/b.jpg"], ["a/b.jpg"], ["no-mask"]),
        (["a/b.jpg", "c/b.jpg"], ["a/b.jpg", "b.jpg"], ["a/b.jpg", "c/b.jpg"], []),
        (["a/b.jpg", "c/b.jpg"], ["b.jpg"], [], ["ambiguous-image", "no-mask", "no-mask"]),
        (["b.jpg"], ["a/b.jpg", "c/b.jpg"], [], ["ambiguous-image", "ambiguous-image", "no-mask"]),
    ],
)
def test_a_file_name_finds_its_photograph_by_path_and_else_by_a_name_that_is_there_once(
    tmp_path: Path, photos: list[str], names: list[str], expected: list[str], reasons: list[str]
) -> None:
    for number, name in enumerate(photos):
        save(photo(number), tmp_path / "photos" / name)
    document = coco([])
    document["images"] = [{"id": k, "file_name": n, "height": HEIGHT, "width": WIDTH} for k, n in enumerate(names)]
    document["annotations"] = [
        {"id": k, "image_id": k, "category_id": 1, "segmentation": encode_rle(LEFT)} for k in range(len(names))
    ]
    write_coco(tmp_path, document)
    curation = source_of(tmp_path, masks=f"{tmp_path}/masks/people.json").curate()
    assert [record.image for record in curation.records] == [f"{tmp_path}/photos/{name}" for name in expected]
    assert sorted(row.reason for row in curation.rejected) == reasons


def test_slivers_beside_a_polygon_cost_nothing(tmp_path: Path) -> None:
    save(photo(1), tmp_path / "photos/one.jpg")
    square = [10, 10, 30, 10, 30, 50, 10, 50]
    write_coco(tmp_path, coco([[[50, 50, 51, 51], [3, 3, 3, 3, 3, 3], square, [1, 2], [5, 5, 9, 9, 7, 7]]]))
    source = source_of(tmp_path, masks=f"{tmp_path}/masks/people.json")
    curation = source.curate()
    assert curation.rejected == []
    truth = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([square], HEIGHT, WIDTH))).astype(bool)
    assert np.array_equal(source.read_mask(curation.records[0], 0), truth)


def test_a_polygon_that_crosses_itself_is_filled_as_pycocotools_does(tmp_path: Path) -> None:
    """Of two triangles that meet in a point, the signed areas of which are together 0."""
    save(photo(1), tmp_path / "photos/one.jpg")
    square, crossing = [10, 10, 30, 10, 30, 50, 10, 50], [40, 10, 80, 50, 80, 10, 40, 50]
    write_coco(tmp_path, coco([[square, crossing]]))
    source = source_of(tmp_path, masks=f"{tmp_path}/masks/people.json")
    (record,) = source.curate().records
    both = coco_mask.merge(coco_mask.frPyObjects([square, crossing], HEIGHT, WIDTH))
    assert np.array_equal(source.read_mask(record, 0), coco_mask.decode(both).astype(bool))


@pytest.mark.parametrize("twice", ["annotations", "images"])
def test_who_is_twice_in_a_coco_json_is_one_person(tmp_path: Path, twice: str) -> None:
    """As in files that were merged: the same row again, or the same photograph and its people under another id."""
    save(photo(1), tmp_path / "photos/one.jpg")
    document: dict[str, Any] = coco([encode_rle(LEFT), encode_rle(RIGHT)])
    again = [dict(row) for row in document["annotations"]]
    if twice == "images":
        document["images"].append({**document["images"][0], "id": 6})
        again = [{**row, "id": row["id"] + 10, "image_id": 6} for row in again]
    document["annotations"] += again
    write_coco(tmp_path, document)
    curation = source_of(tmp_path, masks=f"{tmp_path}/masks/people.json").curate()
    assert [instance.id for instance in curation.records[0].instances] == ["10", "11"]
    assert why(curation) == {("mended", "repeated-row")}


def test_people_may_be_called_otherwise_beside_a_person(tmp_path: Path) -> None:
    save(photo(1), tmp_path / "photos/one.jpg")
    document: dict[str, Any] = coco([encode_rle(LEFT), encode_rle(RIGHT)])
    document["categories"].append({"id": 3, "name": "Pedestrian"})
    document["annotations"][1]["category_id"] = 3
    write_coco(tmp_path, document)
    (record,) = source_of(tmp_path, masks=f"{tmp_path}/masks/people.json").curate().records
    assert [instance.category for instance in record.instances] == ["Person", "Person"]


def test_without_categories_everything_in_a_coco_json_is_a_person(tmp_path: Path) -> None:
    save(photo(1), tmp_path / "photos/one.jpg")
    document = coco([encode_rle(LEFT)])
    del document["categories"]
    write_coco(tmp_path, document)
    (record,) = source_of(tmp_path, masks=f"{tmp_path}/masks/people.json").curate().records
    assert record.instances[0].category == "Person"


def test_splits_follow_from_the_bytes_and_copies_are_set_aside(tmp_path: Path) -> None:
    for number in range(60):
        file = save(photo(number), tmp_path / f"photos/p{number:02d}.png")
        save(LEFT, tmp_path / f"masks/p{number:02d}_0.png")
    (tmp_path / "photos/copy.png").write_bytes(file.read_bytes())
    save(LEFT, tmp_path / "masks/copy_0.png")
    (tmp_path / "empty").mkdir()
    save(photo(100), tmp_path / "empty/street.png")
    (tmp_path / "empty/people.png").write_bytes((tmp_path / "photos/p00.png").read_bytes())
    shares = {"train": 0.5, "test": 0.5}
    curation = source_of(tmp_path, splits=shares, backgrounds=f"{tmp_path}/empty").curate()
    assert [(r.outcome, r.reason) for r in curation.rejected] == [("image-rejected", "duplicate-image")] * 2
    assert Counter(record.role for record in curation.records) == {"people": 60, "background": 1}
    splits = Counter(record.split for record in curation.records)
    assert set(splits) == {"train", "test"} and 18 <= splits["train"] <= 43
    other = tmp_path / "other"
    for record in curation.records[:10]:
        data = Path(record.image).read_bytes()
        (other / "photos").mkdir(parents=True, exist_ok=True)
        (other / "photos" / f"renamed-{hashlib.md5(data).hexdigest()}.png").write_bytes(data)
        save(RIGHT, other / f"masks/renamed-{hashlib.md5(data).hexdigest()}_0.png")
    again = {record.id[-8:]: record.split for record in source_of(other, splits=shares).curate().records}
    assert again == {record.id[-8:]: record.split for record in curation.records[:10]}


def test_ids_are_safe_and_distinct_whatever_files_are_called(tmp_path: Path) -> None:
    names = [
        "été à Paris.jpg",
        "北京.jpg",
        "上海.jpg",
        "a.b.c.jpg",
        "a b.jpg",
        "a_b.jpg",
        "a-b.JPG",
        "x" * 200 + ".png",
        "#%:.jpg",
    ]
    for number, name in enumerate(names):
        save(photo(number), tmp_path / "photos" / name, format="PNG")
        save(LEFT, tmp_path / "masks" / f"{name.rpartition('.')[0]}_0.png")
    source = source_of(tmp_path)
    curation = source.curate()
    assert len({record.id for record in curation.records}) == len(names)
    assert all(KEY_PATTERN.fullmatch(f"folder-{record.id}") for record in curation.records)
    for record in curation.records:
        assert np.array_equal(source.read_mask(record, 0), LEFT)
        assert hashlib.sha256(source.read_image(record)).hexdigest().startswith(record.id[-8:])


def test_attribution_comes_from_the_table_and_else_from_the_settings(tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        save(photo(number), tmp_path / f"photos/{name}.jpg")
        save(LEFT, tmp_path / f"masks/{name}_0.png")
    table = '\ufefffile,licence,author,title,url\ntwo.jpg,CC0,Ann,"Sea, sun",https://example.org/2\ngone.jpg,CC0,,,\n'
    (tmp_path / "photos/attribution.csv").write_text(table, encoding="utf-8")
    curation = source_of(tmp_path, licence="CC BY 4.0", author="Me").curate()
    one, two = curation.records
    assert (one.licence, one.author, one.title, one.url) == ("CC BY 4.0", "Me", "one", "")
    assert (two.licence, two.author, two.title, two.url) == ("CC0", "Ann", "Sea, sun", "https://example.org/2")
    assert why(curation) == {("row-rejected", "missing-image")}


@pytest.mark.parametrize("written", ["./two/one.jpg", "two//one.jpg", r"two\one.jpg"])
def test_a_credit_counts_however_its_slashes_are_written(tmp_path: Path, written: str) -> None:
    save(photo(1), tmp_path / "photos/two/one.jpg")
    save(LEFT, tmp_path / "masks/two/one_0.png")
    (tmp_path / "photos/attribution.csv").write_text(f"file,licence\n{written},CC0\n")
    curation = source_of(tmp_path).curate()
    assert [record.licence for record in curation.records] == ["CC0"] and not curation.rejected


@pytest.mark.parametrize(
    ("name", "cell"), [("=one.jpg", "'=one.jpg"), ("-one.jpg", "'-one.jpg"), ("one.jpg", " one.jpg ")]
)
def test_a_credit_counts_with_blanks_and_with_what_keeps_a_cell_from_being_a_formula(
    tmp_path: Path, name: str, cell: str
) -> None:
    save(photo(1), tmp_path / "photos" / name)
    save(LEFT, tmp_path / f"masks/{Path(name).stem}_0.png")
    (tmp_path / "photos/attribution.csv").write_text(f"file,licence\n{cell},CC BY-NC 4.0\n")
    curation = source_of(tmp_path, licence="CC0").curate()
    assert [record.licence for record in curation.records] == ["CC BY-NC 4.0"] and not curation.rejected


@pytest.mark.parametrize("header", ["name,licence", "file,license"])
def test_a_table_with_wrong_columns_is_an_error_that_names_them(tmp_path: Path, header: str) -> None:
    save(photo(1), tmp_path / "photos/one.jpg")
    save(LEFT, tmp_path / "masks/one_0.png")
    (tmp_path / "photos/attribution.csv").write_text(f"{header}\none.jpg,CC0\n")
    with pytest.raises(UserError, match="the columns are file, licence"):
        source_of(tmp_path).curate()


@pytest.mark.parametrize(
    ("first", "second"), [("ann", "Bob"), ("1", "ann"), ("\u00c9mile", "Zoe"), ("2", "10"), ("p2", "p10")]
)
def test_people_of_a_folder_are_in_the_order_of_file_managers(tmp_path: Path, first: str, second: str) -> None:
    save(photo(1), tmp_path / "photos/one.jpg")
    save(LEFT, tmp_path / f"masks/one/{first}.png")
    save(RIGHT, tmp_path / f"masks/one/{second}.png")
    source = source_of(tmp_path)
    (record,) = source.curate().records
    assert [mask[LEFT].all() for mask in masks_of(source, record)] == [True, False]


def test_an_id_that_is_no_text_is_replaced_by_the_rows_number(tmp_path: Path) -> None:
    save(photo(1), tmp_path / "photos/one.jpg")
    row = {"id": "p\ud83d", "image_id": 1, "segmentation": [[10, 10, 40, 10, 40, 60, 10, 60]]}
    images = [{"id": 1, "file_name": "one.jpg", "width": LEFT.shape[1], "height": LEFT.shape[0]}]
    (tmp_path / "masks.json").write_text(json.dumps({"images": images, "annotations": [row]}))
    source = FolderSettings(photos=str(tmp_path / "photos"), masks=str(tmp_path / "masks.json")).open()
    (record,) = source.curate().records
    assert [instance.id for instance in record.instances] == ["row-0"]
    RecordFile([record])


def test_a_table_of_credits_that_cannot_be_read_or_has_a_column_twice_is_refused(tmp_path: Path) -> None:
    save(photo(1), tmp_path / "photos/one.jpg")
    save(LEFT, tmp_path / "masks/one_0.png")
    table = tmp_path / "photos/attribution.csv"
    table.write_text("file,licence,author,licence\none.jpg,CC0,Ann,all rights reserved\n")
    with pytest.raises(UserError, match="has two columns 'licence'"):
        source_of(tmp_path).curate()
    table.unlink()
    table.symlink_to(tmp_path / "gone.csv")
    with pytest.raises(UserError, match=r"attribution.csv cannot be read"):
        source_of(tmp_path).curate()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("one.jpg,CC0,Doe, Ann\n", "line 2 of .*attribution.csv has more cells than there are columns"),
        ("one.jpg,CC0,Ann\ntwo.jpg,CC BY 4.0,Ben\none.jpg,CC BY 4.0,Ann\n", "line 4 of .* is the second of one"),
        ('one.jpg,CC0,"Ann\nLee"\n\ntwo.jpg,CC0,Doe, Ben\n', "line 5 of .*attribution.csv has more cells"),
        ("ONE.jpg,CC0,Ann\n", r"line 2 of .* is of 'ONE\.jpg', and the photograph is 'one\.jpg'"),
        ('one.jpg,CC0,Ann\ntwo.jpg,"CC0,Ben\nx,y,z\n', "attribution.csv is not a CSV file in UTF-8: from line 3 on: "),
    ],
)
def test_a_table_from_which_a_photograph_may_get_the_licence_of_another_is_refused(
    tmp_path: Path, rows: str, message: str
) -> None:
    for number, name in enumerate(("one", "two")):
        save(photo(number), tmp_path / f"photos/{name}.jpg")
        save(LEFT, tmp_path / f"masks/{name}_0.png")
    (tmp_path / "photos/attribution.csv").write_text(f"file,licence,author\n{rows}")
    with pytest.raises(UserError, match=message):
        source_of(tmp_path).curate()


def test_what_the_user_must_mend_is_said_in_one_line(tmp_path: Path) -> None:
    save(photo(1), tmp_path / "photos/one.jpg")
    (tmp_path / "masks").mkdir()
    for changes, message in [
        ({"photos": f"{tmp_path}/nowhere"}, "folder .*nowhere does not exist"),
        ({"masks": f"{tmp_path}/nowhere"}, "folder .*nowhere does not exist"),
        ({"masks": f"{tmp_path}/nowhere.json"}, "file .*nowhere.json does not exist"),
        ({"photos": f"{tmp_path}/masks"}, "holds no photographs"),
        ({"masks": f"{tmp_path}/photos"}, "masks need their own"),
        ({"backgrounds": f"{tmp_path}/nowhere"}, "folder .*nowhere does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            source_of(tmp_path, **changes).curate()
    for document, message in [
        ({"images": []}, "not a COCO json"),
        (coco([], categories=[{"id": 1, "name": "dog"}]), "no category 'person'; it has dog"),
    ]:
        write_coco(tmp_path, document)
        with pytest.raises(UserError, match=message):
            source_of(tmp_path, masks=f"{tmp_path}/masks/people.json").curate()
    with pytest.raises(UserError, match="nowhere"):
        source_of(tmp_path, photos=f"{tmp_path}/nowhere").fingerprint()
    with pytest.raises(ValidationError, match="sum to 1"):
        FolderSettings(photos="a", masks="b", splits={"train": 0.5})


def test_the_fingerprint_changes_with_files_and_settings_alone(tmp_path: Path) -> None:
    file = save(photo(1), tmp_path / "photos/one.jpg")
    save(LEFT, tmp_path / "masks/one_0.png")
    first = source_of(tmp_path).fingerprint()
    assert source_of(tmp_path).fingerprint() == first
    assert source_of(tmp_path, licence="CC0").fingerprint() != first
    os.utime(file, (1, 1))
    touched = source_of(tmp_path).fingerprint()
    assert touched != first
    save(RIGHT, tmp_path / "masks/one_1.png")
    assert source_of(tmp_path).fingerprint() != touched


def test_any_fsspec_root_will_do() -> None:
    memory = fsspec.filesystem("memory")
    for path, array in (("/own/photos/one.png", photo(1)), ("/own/masks/one_0.png", LEFT)):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        memory.pipe_file(path, buffer.getvalue())
    source = FolderSettings(photos="memory://own/photos", masks="memory://own/masks/").open()
    (record,) = source.curate().records
    assert record.image == "memory://own/photos/one.png"
    assert np.array_equal(source.read_mask(record, 0), LEFT)
    assert source.read_image(record) == memory.cat_file("/own/photos/one.png")
    assert source.fingerprint() == source.fingerprint()
    memory.rm("/own", recursive=True)
    with pytest.raises(Rejected, match="not-found"):
        source.read_image(record)
