"""The source ``ade20k``, on small folders in the layouts of its two releases."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from dataset_tools.curated import CuratedSettings, photographs
from dataset_tools.errors import UserError
from dataset_tools.images import DecodeSettings
from dataset_tools.records import Curation, ImageRecord, records_to_table
from dataset_tools.sources import GroundReader, Source
from dataset_tools.sources.ade20k import INSTANCE_CLASSES, TERMS, Ade20kSettings, Ade20kSource

SIZE = (60, 80)
SMALL = CuratedSettings(decode=DecodeSettings(min_side=16, max_side=40))
"""Pictures are halved."""
NAMES = {
    1831: "person, individual, someone, somebody, mortal, soul",
    2300: "skier",
    401: "car, auto, automobile, machine, motorcar",
    2978: "wall",
    700: "crowd",
    99: "arm",
    976: "floor, flooring",
    2178: "rug, carpet, carpeting",
    2668: "swimming pool, swimming bath, natatorium",
    3016: "waterfall, falls",
}
HYPERNYMS = {
    2300: ["athlete, jock", NAMES[1831], "entity"],
    99: ["limb", "body part"],
    3016: ["body of water, water", "thing"],
}
Boxes = list[tuple[int, tuple[int, int, int, int]]]
"""Class and box (left, top, right, bottom, all within) of things, the nearest first."""
OBJECT_INFO = (
    "Idx\tRatio\tTrain\tVal\tName\n1\t0.15\t11664\t1172\twall\n"
    "13\t0.01\t5075\t526\tperson, individual, someone, somebody, mortal, soul\n21\t0.01\t1\t1\tcar, auto\n"
    "22 \t0.0074\t709\t75\twater\n4\t0.06\t9\t9\tfloor, flooring\n29\t0.01\t9\t9\trug, carpet, carpeting\n"
    "110\t0.01\t9\t9\tswimming pool, swimming bath, natatorium\n114\t0.01\t9\t9\twaterfall, falls\n"
)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def drawn(boxes: Boxes) -> list[np.ndarray]:
    """What is seen of each thing."""
    masks: list[np.ndarray] = []
    for _, (left, top, right, bottom) in boxes:
        mask = np.zeros(SIZE, bool)
        mask[top : bottom + 1, left : right + 1] = True
        masks.append(mask & ~np.logical_or.reduce([np.zeros(SIZE, bool), *masks]))
    return masks


def entry(number: int, kind: int, box: tuple[int, int, int, int], **changes: Any) -> dict[str, Any]:
    left, top, right, bottom = box
    return {
        "id": number,
        "name": NAMES[kind],
        "name_ndx": kind,
        "hypernym": HYPERNYMS.get(kind, [NAMES[kind], "entity"]),
        "raw_name": "x",
        "attributes": [],
        "depth_ordering_rank": number + 1,
        "occluded": [],
        "crop": "0",
        "parts": {"hasparts": [], "ispartof": [], "part_level": 0},
        "polygon": {"x": [left, right, right, left], "y": [top, top, bottom, bottom], "click_date": []},
        **changes,
    }


def full(name: str, boxes: Boxes, part: str = "training", **changes: Any) -> dict[str, bytes]:
    """Files of one picture of the full release: values of B are spread over 0..255 in another order than ids."""
    seg = np.zeros((*SIZE, 3), np.uint8)
    order = np.random.default_rng(len(name)).permutation(len(boxes)) + 1
    for (kind, _), mask, rank in zip(boxes, drawn(boxes), order, strict=True):
        seg[mask] = (kind // 256 * 10, kind % 256, round(255 * rank / len(boxes)))
    objects = [entry(number, kind, box) for number, (kind, box) in enumerate(boxes)]
    annotation = {
        "filename": f"{name}.jpg",
        "folder": f"ADE20K_2021_17_01/images/ADE/{part}/urban/street",
        "imsize": [*SIZE, 3],
        "source": {"folder": "x", "filename": "x", "origin": "x"},
        "scene": ["outdoor", "urban", "street"],
        "object": objects,
        **changes,
    }
    stem = f"images/ADE/{part}/urban/street/{name}"
    return {
        f"{stem}.jpg": photo(),
        f"{stem}_seg.png": png(seg),
        f"{stem}_parts_1.png": png(np.zeros((*SIZE, 3), np.uint8)),
        f"{stem}.json": json.dumps({"annotation": annotation}).encode(),
        f"{stem}/instance_000_{name}.png": b"never read",
    }


def challenge(name: str, boxes: Boxes, part: str = "training", semantic: Boxes | None = None) -> dict[str, bytes]:
    """Files of one picture of the challenge release: boxes have classes of the 100, ``semantic`` of the 150."""
    instances, labels = np.zeros((*SIZE, 3), np.uint8), np.full(SIZE, 1, np.uint8)
    for number, ((kind, _), mask) in enumerate(zip(boxes, drawn(boxes), strict=True), start=1):
        instances[mask, :2] = (kind, number)
        labels[mask] = {4: 13, 9: 21}.get(kind, 0)
    for (kind, _), mask in zip(semantic or [], drawn(semantic or []), strict=True):
        labels[mask] = kind
    return {
        f"images/{part}/{name}.jpg": photo(),
        f"annotations_instance/{part}/{name}.png": png(instances),
        f"annotations/{part}/{name}.png": png(labels),
    }


def photo() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


TWO: Boxes = [(1831, (10, 10, 30, 50)), (2978, (60, 0, 79, 20)), (1831, (20, 20, 50, 55))]
FULL = {
    **full("ADE_train_00000001", TWO),
    **full("ADE_train_00000002", [(2300, (10, 10, 30, 50)), (401, (40, 10, 70, 50))]),
    **full("ADE_train_00000003", [(401, (40, 10, 70, 50)), (2978, (0, 0, 79, 59))]),
    **full("ADE_val_00000001", [(1831, (10, 10, 30, 50))], "validation"),
    "index_ade20k.pkl": b"never read",
}
CHALLENGE = {
    **challenge("ADE_train_00000001", [(4, (10, 10, 30, 50)), (9, (60, 0, 79, 20)), (4, (20, 20, 50, 55))]),
    **challenge("ADE_train_00000002", [(9, (40, 10, 70, 50))]),
    **challenge("ADE_val_00000001", [(4, (10, 10, 30, 50))], "validation"),
    "objectInfo150.txt": OBJECT_INFO.encode(),
    "sceneCategories.txt": b"ADE_train_00000001 airport_terminal\nADE_train_00000002 street\nADE_val_00000001 alley\n",
}


@pytest.fixture
def ade20k(tmp_path: Path) -> Callable[..., Ade20kSource]:
    """Write a release to a folder: ``ade20k(files, **settings)``."""

    def build(files: dict[str, bytes], **settings: Any) -> Ade20kSource:
        shutil.rmtree(tmp_path / "ade", ignore_errors=True)
        for name, data in files.items():
            (tmp_path / "ade" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "ade" / name).write_bytes(data)
        values = {"root": str(tmp_path / "ade"), "validation_share": 0.0, "choice": {"min_box_area": 0}, **settings}
        return Ade20kSettings.check(values, origin="test").open()

    return build


def by_name(curation: Curation) -> dict[str, ImageRecord]:
    return {record.id: record for record in curation.records}


def named(curation: Curation) -> set[tuple[str, str, str, str]]:
    return {(row.outcome, row.image_id, row.instance_id, row.reason) for row in curation.rejected}


@pytest.mark.parametrize("files", [FULL, CHALLENGE], ids=["full", "challenge"])
def test_everybody_has_what_is_seen_of_them(ade20k: Callable[..., Ade20kSource], files: dict[str, bytes]) -> None:
    source = ade20k(files)
    assert isinstance(source, Source)
    curation = source.curate()
    assert curation.rejected == []
    record = by_name(curation)["ADE_train_00000001"]
    first, _, third = drawn(TWO)
    assert [each.category for each in record.instances] == ["Person", "Person"]
    masks = {each.id: source.read_mask(record, index) for index, each in enumerate(record.instances)}
    ids = ("0", "2") if files is FULL else ("1", "3")
    assert set(masks) == set(ids)
    assert np.array_equal(masks[ids[0]], first) and np.array_equal(masks[ids[1]], third)
    box = next(each.box for each in record.instances if each.id == ids[0])
    assert np.allclose(np.array(box) * [80, 60, 80, 60], [10, 10, 31, 51])
    assert (record.stratum, record.licence) == ("overlapping", TERMS)
    assert record.title == ("street" if files is FULL else "airport terminal")
    assert Image.open(io.BytesIO(source.read_image(record))).size == (80, 60)


def test_splits_and_backgrounds_of_the_full_release(ade20k: Callable[..., Ade20kSource]) -> None:
    """A skier is a person, as WordNet says; parts of people keep a picture from being a background."""
    files = {**FULL, **full("ADE_train_00000004", [(99, (10, 10, 30, 50))])}
    source = ade20k(files)
    assert {name: (r.split, r.role) for name, r in by_name(source.curate()).items()} == {
        "ADE_train_00000001": ("train", "people"),
        "ADE_train_00000002": ("train", "people"),
        "ADE_train_00000003": ("train", "background"),
        "ADE_val_00000001": ("test", "people"),
    }
    assert by_name(source.curate())["ADE_train_00000002"].instances[0].category == "Skier"


def test_other_classes_take_the_place_of_people(ade20k: Callable[..., Ade20kSource]) -> None:
    cars = by_name(ade20k(FULL, categories=["Automobile"]).curate())
    assert {name: r.role for name, r in cars.items()} == dict.fromkeys(
        ["ADE_train_00000002", "ADE_train_00000003"], "people"
    )
    assert cars["ADE_train_00000003"].instances[0].category == "Car"
    assert set(by_name(ade20k(CHALLENGE, categories=["car"]).curate())) == {"ADE_train_00000001", "ADE_train_00000002"}
    with pytest.raises(UserError, match="no class 'cars', did you mean 'car'"):
        ade20k(CHALLENGE, categories=["cars"]).curate()


def test_what_annotators_say_of_a_person_is_kept(ade20k: Callable[..., Ade20kSource]) -> None:
    objects = [entry(0, 1831, (10, 10, 30, 50), occluded="yes", crop="1")]
    files = full("ADE_train_00000001", [(1831, (10, 10, 30, 50))], object=objects)
    (record,) = ade20k(files).curate().records
    assert record.instances[0].occluded and record.instances[0].truncated


GROUND: dict[str, list[int]] = {"full": [2178, 976, 3016, 2668], "challenge": [29, 4, 114, 110]}
"""Rug, floor, waterfall and pool."""
PLACES = [(20, 40, 40, 50), (0, 35, 50, 59), (60, 0, 70, 40), (55, 30, 79, 59)]


@pytest.mark.parametrize("release", ["full", "challenge"])
def test_floors_and_water_of_backgrounds_are_glossy_and_rugs_and_waterfalls_are_not(
    ade20k: Callable[..., Ade20kSource], release: str
) -> None:
    boxes: Boxes = list(zip(GROUND[release], PLACES, strict=True))
    name = "ADE_train_00000009"
    files = full(name, boxes) if release == "full" else challenge(name, [], semantic=boxes)
    source = ade20k({**(FULL if release == "full" else CHALLENGE), **files})
    assert isinstance(source, GroundReader)
    records = by_name(source.curate())
    _, floor, _, pool = drawn(boxes)
    assert records[name].role == "background"
    assert np.array_equal(source.read_glossy_ground(records[name]), floor | pool)
    assert [other for other in records if records[other].glossy_ground] == [name]
    (seen,) = photographs([records[name]], source, SMALL, [])
    assert seen.glossy is not None and np.array_equal(seen.glossy, (floor | pool)[1::2, 1::2])


@pytest.mark.parametrize("release", ["full", "challenge"])
def test_ground_that_is_marked_anew_is_another_record(ade20k: Callable[..., Ade20kSource], release: str) -> None:
    found = []
    for right in (50, 52):
        boxes: Boxes = [(GROUND[release][1], (0, 35, right, 59))]
        name = "ADE_train_00000009"
        files = full(name, boxes) if release == "full" else challenge(name, [], semantic=boxes)
        extra = {} if release == "full" else {"objectInfo150.txt": OBJECT_INFO.encode()}
        found.append(records_to_table(ade20k({**files, **extra}).curate().records).to_pylist()[0])
    assert found[0] != found[1]
    assert {**found[0], "digest": ""} == {**found[1], "digest": ""}


def test_there_are_a_hundred_classes_of_instances() -> None:
    """Numbers as in instanceInfo100_train.txt, which are not those of objectInfo150.txt."""
    assert len(set(INSTANCE_CLASSES)) == 100
    numbers = {name: number for number, name in enumerate(INSTANCE_CLASSES, start=1)}
    assert (numbers["bed"], numbers["person"], numbers["car"], numbers["animal"], numbers["flag"]) == (1, 4, 9, 82, 100)


PERSON_AT = (10, 10, 30, 50)
LOST = ("image-rejected", "ADE_train_00000009", "", "person-without-mask")
STEM = "images/ADE/training/urban/street/ADE_train_00000009"
ONE = full("ADE_train_00000009", [(1831, PERSON_AT)])


def with_objects(*objects: Any) -> dict[str, bytes]:
    return full("ADE_train_00000009", [(1831, PERSON_AT)], object=list(objects))


BAD: dict[str, tuple[dict[str, bytes], set[tuple[str, ...]]]] = {
    "no picture": ({k: v for k, v in ONE.items() if not k.endswith(".jpg")}, {("missing-image",)}),
    "no json": ({k: v for k, v in ONE.items() if not k.endswith(".json")}, {("missing-json",)}),
    "no masks": ({k: v for k, v in ONE.items() if not k.endswith("_seg.png")}, {("missing-mask",)}),
    "no JSON": ({**ONE, f"{STEM}.json": b"{"}, {("malformed-json",)}),
    "another JSON": ({**ONE, f"{STEM}.json": b"[1]"}, {("malformed-json",)}),
    "masks that are no picture": ({**ONE, f"{STEM}_seg.png": b"GIF"}, {("not-an-image",)}),
    "grey masks": ({**ONE, f"{STEM}_seg.png": png(np.zeros(SIZE, np.uint8))}, {("not-a-mask",)}),
    "masks of another size": (
        {**ONE, f"{STEM}_seg.png": png(np.zeros((9, 9, 3), np.uint8))},
        {("mask-size-mismatch",)},
    ),
    "a polygon of two points": (
        with_objects(entry(0, 1831, PERSON_AT, polygon={"x": [1, 2], "y": [1, 2]})),
        {("", "malformed-row"), ("person-without-mask",)},
    ),
    "a polygon of x without y": (
        with_objects(entry(0, 1831, PERSON_AT, polygon={"x": [1, 2, 3], "y": [1, 2]})),
        {("", "malformed-row"), ("person-without-mask",)},
    ),
    "a class that is no number": (
        with_objects(entry(0, 1831, PERSON_AT, name_ndx="x")),
        {("", "malformed-row"), ("person-without-mask",)},
    ),
    "no object": (with_objects(7), {("", "malformed-row"), ("person-without-mask",)}),
    "somebody without pixels": (
        with_objects(entry(0, 1831, PERSON_AT), entry(1, 1831, (60, 30, 70, 50))),
        {("1", "missing-mask"), ("person-without-mask",)},
    ),
    "a map of ground of another size": (
        {
            **full("ADE_train_00000009", [(976, PERSON_AT)]),
            f"{STEM}_seg.png": png(np.zeros((9, 9, 3), np.uint8)),
        },
        {("mask-size-mismatch",)},
    ),
    "a crowd": (full("ADE_train_00000009", [(1831, PERSON_AT), (700, (60, 30, 70, 50))]), {("crowd",)}),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_used_of_the_full_release_is_named(ade20k: Callable[..., Ade20kSource], what: str) -> None:
    files, reasons = BAD[what]
    curation = ade20k({**FULL, **files}).curate()
    wanted = {
        ("image-rejected", "ADE_train_00000009", "", *r) if len(r) == 1 else ("row-rejected", "ADE_train_00000009", *r)
        for r in reasons
    }
    assert named(curation) == wanted
    assert len(curation.records) == 4


def test_a_json_that_is_not_in_utf8_is_read(ade20k: Callable[..., Ade20kSource]) -> None:
    data = ONE[f"{STEM}.json"].replace(b'"raw_name": "x"', b'"raw_name": "caf\xe9"')
    assert b"\xe9" in data
    assert len(ade20k({**ONE, f"{STEM}.json": data}).curate().records) == 1


def test_text_that_no_table_holds_is_escaped(ade20k: Callable[..., Ade20kSource]) -> None:
    """Half of a surrogate pair is JSON and no text."""
    data = ONE[f"{STEM}.json"].replace(b'"street"', b'"\\ud800"')
    (record,) = records_to_table(ade20k({**ONE, f"{STEM}.json": data}).curate().records).to_pylist()
    assert record["title"] == "\\ud800"


def test_a_larger_limit_reads_masks_that_were_too_large(ade20k: Callable[..., Ade20kSource]) -> None:
    small = ade20k(ONE, fetch={"max_bytes": 10})
    assert {row.reason for row in small.curate().rejected} == {"too-large"}
    fetch = small.settings.fetch.model_copy(update={"max_bytes": 10_000})
    large = Ade20kSource(small.settings.model_copy(update={"fetch": fetch}))
    assert len(large.curate().records) == 1 and large.fingerprint() != small.fingerprint()


def test_a_picture_that_stands_in_two_folders_is_taken_once(ade20k: Callable[..., Ade20kSource]) -> None:
    again = {name.replace("/street/", "/alley/"): data for name, data in ONE.items()}
    curation = ade20k({**ONE, **again}).curate()
    assert len(curation.records) == 1
    assert named(curation) == {("image-rejected", "ADE_train_00000009", "", "repeated-photo")}


CHALLENGE_BAD: dict[str, tuple[dict[str, bytes], set[tuple[str, ...]]]] = {
    "no instances": (
        {k: v for k, v in challenge("ADE_train_00000009", [(4, PERSON_AT)]).items() if "instance" not in k},
        {("missing-mask",)},
    ),
    "no picture": (
        {k: v for k, v in challenge("ADE_train_00000009", [(4, PERSON_AT)]).items() if not k.endswith(".jpg")},
        {("missing-image",)},
    ),
    "a class beyond the hundred": (
        challenge("ADE_train_00000009", [(101, PERSON_AT)]),
        {("", "unknown-category"), ("person-without-mask",)},
    ),
    "people without an instance": (
        challenge("ADE_train_00000009", [(4, PERSON_AT)], semantic=[(13, (50, 10, 60, 50))]),
        {("person-without-mask",)},
    ),
    "labels of another size": (
        {
            **challenge("ADE_train_00000009", [(4, PERSON_AT)]),
            "annotations/training/ADE_train_00000009.png": png(np.zeros((9, 9), np.uint8)),
        },
        {("mask-size-mismatch",)},
    ),
    "labels in colour": (
        {
            **challenge("ADE_train_00000009", [(4, PERSON_AT)]),
            "annotations/training/ADE_train_00000009.png": png(np.zeros((*SIZE, 3), np.uint8)),
        },
        {("not-a-mask",)},
    ),
}


@pytest.mark.parametrize("what", CHALLENGE_BAD)
def test_what_cannot_be_used_of_the_challenge_is_named(ade20k: Callable[..., Ade20kSource], what: str) -> None:
    files, reasons = CHALLENGE_BAD[what]
    curation = ade20k({**CHALLENGE, **files}).curate()
    wanted = {
        ("image-rejected", "ADE_train_00000009", "", *r) if len(r) == 1 else ("row-rejected", "ADE_train_00000009", *r)
        for r in reasons
    }
    assert named(curation) == wanted
    assert len(curation.records) == 3


def test_an_instance_of_two_classes_is_named(ade20k: Callable[..., Ade20kSource]) -> None:
    files = challenge("ADE_train_00000009", [(4, PERSON_AT)])
    name = "annotations_instance/training/ADE_train_00000009.png"
    pixels = np.array(Image.open(io.BytesIO(files[name])))
    pixels[20:25, 10:20, 0] = 9
    curation = ade20k({**CHALLENGE, **files, name: png(pixels)}).curate()
    assert named(curation) == {("row-rejected", "ADE_train_00000009", "1", "mixed-instance"), LOST}


def test_backgrounds_of_the_challenge_show_nobody_in_either_annotation(ade20k: Callable[..., Ade20kSource]) -> None:
    """Without ``annotations`` the instances alone tell."""
    hidden = challenge("ADE_train_00000009", [], semantic=[(13, (10, 10, 11, 11))])
    assert set(by_name(ade20k({**CHALLENGE, **hidden}).curate())) == {
        "ADE_train_00000001",
        "ADE_train_00000002",
        "ADE_val_00000001",
    }
    without = {k: v for k, v in {**CHALLENGE, **hidden}.items() if not k.startswith("annotations/")}
    assert "ADE_train_00000009" in by_name(ade20k(without).curate())


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"images/training/a.jpg": b""}, "has no annotations_instance"),
        ({"photos/a.jpg": b""}, "is no ADE20K"),
        ({k: v for k, v in CHALLENGE.items() if k != "objectInfo150.txt"}, "no objectInfo150.txt"),
        ({**CHALLENGE, "objectInfo150.txt": b"Idx\nwall"}, "objectInfo150.txt, line 2"),
    ],
)
def test_a_folder_that_is_neither_release_is_told(
    ade20k: Callable[..., Ade20kSource], files: dict[str, bytes], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        ade20k(files).curate()


@pytest.mark.parametrize("files", [FULL, CHALLENGE], ids=["full", "challenge"])
def test_a_remote_folder_is_read_like_a_local_one(
    ade20k: Callable[..., Ade20kSource], files: dict[str, bytes], tmp_path: Path
) -> None:
    local = ade20k(files)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "ade"), "/ade", recursive=True)
    try:
        remote = Ade20kSource(local.settings.model_copy(update={"root": "memory://ade"}))
        ours, theirs = local.curate(), remote.curate()
        assert [r.instances for r in theirs.records] == [r.instances for r in ours.records]
        assert np.array_equal(remote.read_mask(theirs.records[0], 0), local.read_mask(ours.records[0], 0))
    finally:
        memory.rm("/ade", recursive=True)


def test_what_is_read_is_in_the_fingerprint(ade20k: Callable[..., Ade20kSource], tmp_path: Path) -> None:
    source = ade20k(FULL)
    before = source.fingerprint()
    (tmp_path / "ade/images/ADE/training/urban/street/ADE_train_00000001/instance_001.png").write_bytes(b"more")
    assert source.fingerprint() == before
    (tmp_path / f"ade/{STEM[:-1]}1_seg.png").write_bytes(b"other")
    assert source.fingerprint() != before
