"""The source ``coco``, on small folders in the layout of COCO 2017."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from dataset_tools.curated import CuratedSettings, Estimators, curated_samples
from dataset_tools.errors import UserError
from dataset_tools.estimators import FoundPeople
from dataset_tools.records import Curation, Rejection, records_to_table
from dataset_tools.schema import KEYPOINTS, MadeBy
from dataset_tools.sources import Source
from dataset_tools.sources.coco import COCO_KEYPOINTS, CocoSettings, CocoSource
from flows.record_table import digest_of_records

WIDTH, HEIGHT = 80, 60
BY, BY_NC = "http://creativecommons.org/licenses/by/2.0/", "http://creativecommons.org/licenses/by-nc/2.0/"
PERSON, DOG = 1, 18
Document = dict[str, list[Any]]


def picture(number: int, part: str = "train2017", **changes: Any) -> dict[str, Any]:
    return {
        "license": 4,
        "file_name": f"{number:012d}.jpg",
        "coco_url": f"http://images.cocodataset.org/{part}/{number:012d}.jpg",
        "height": HEIGHT,
        "width": WIDTH,
        "date_captured": "2013-11-14 17:02:52",
        "flickr_url": f"http://farm7.staticflickr.com/6116/{number}_z.jpg",
        "id": number,
        **changes,
    }


def person(number: int, image: int, left: float = 20, **changes: Any) -> dict[str, Any]:
    polygon = [left, 10.5, left + 15, 12.0, left + 18.5, 50.0, left + 2, 48.0]
    return {
        "segmentation": [polygon],
        "area": 600.0,
        "iscrowd": 0,
        "image_id": image,
        "bbox": [left, 10.5, 18.5, 39.5],
        "category_id": PERSON,
        "id": number,
        **changes,
    }


def crowd(number: int, image: int) -> dict[str, Any]:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[5:30, 50:78] = True
    runs = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False, append=False))
    counts = np.diff([0, *runs, mask.size]).tolist()
    segmentation = {"counts": counts, "size": [HEIGHT, WIDTH]}
    return person(number, image, iscrowd=1, segmentation=segmentation, bbox=[50, 5, 28, 25])


def documents() -> dict[str, Document]:
    """Train: one person of two polygons, two with RLE, a crowd beside a person, a dog, nobody. Test: one person."""
    rle = coco_mask.merge(coco_mask.frPyObjects([[30, 20, 45, 22, 44, 52, 31, 50]], HEIGHT, WIDTH))
    compressed = {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}
    two_parts = [[10, 10, 20, 10, 20, 50, 10, 50], [25, 30, 30, 30, 30, 50, 25, 50]]
    shared = {
        "licenses": [{"url": BY_NC, "id": 2, "name": "NC"}, {"url": BY, "id": 4, "name": "BY"}],
        "categories": [
            {"supercategory": "person", "id": PERSON, "name": "person"},
            {"supercategory": "animal", "id": DOG, "name": "dog"},
        ],
    }
    train = {
        "images": [picture(n) for n in (1, 2, 3, 4)] + [picture(5, license=2)],
        "annotations": [
            person(11, 1, segmentation=two_parts, bbox=[10, 10, 20, 40]),
            person(21, 2, left=5),
            person(22, 2, segmentation=compressed, bbox=[30, 20, 15, 32]),
            person(31, 3, left=5),
            crowd(900100000032, 3),
            person(41, 4, category_id=DOG),
        ],
    }
    test = {"images": [picture(100, "val2017")], "annotations": [person(1001, 100)]}
    # As published: the categories come last.
    return {
        f"instances_{part}": {"info": {}, "licenses": shared["licenses"], **rows, "categories": shared["categories"]}  # type: ignore[dict-item]
        for part, rows in (("train2017", train), ("val2017", test))
    }


def test_text_that_no_table_holds_is_escaped(coco: Callable[..., CocoSource]) -> None:
    """Half of a surrogate pair is JSON and no text."""
    files = documents()
    files["instances_train2017"]["images"][0]["flickr_url"] = "https://example.org/\ud800"
    caption = {"id": 1, "image_id": 1, "caption": "A man \ud800."}
    files |= {f"captions_{part}": {"images": [], "annotations": []} for part in ("train2017", "val2017")}
    files["captions_train2017"]["annotations"].append(caption)
    records = {row["id"]: row for row in records_to_table(coco(files, captions=True).curate().records).to_pylist()}
    assert records[f"{1:012d}"]["caption"] == "A man \\ud800."
    assert records[f"{1:012d}"]["landing_url"] == "https://example.org/\\ud800"


def pose(number: int, image: int, **known: tuple[int, int, int]) -> dict[str, Any]:
    keypoints = [v for name in COCO_KEYPOINTS for v in known.get(name, (0, 0, 0))]
    return person(number, image, keypoints=keypoints, num_keypoints=len(known))


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., CocoSource]:
    """Write COCO to a folder: ``coco(documents, **settings)``."""

    def build(files: dict[str, Document], **settings: Any) -> CocoSource:
        root = tmp_path / "coco"
        shutil.rmtree(root, ignore_errors=True)
        (root / "annotations").mkdir(parents=True)
        for name, document in files.items():
            (root / "annotations" / f"{name}.json").write_text(json.dumps(document))
            for row in document["images"] if name.startswith("instances") else ():
                if isinstance(row, dict) and "/" not in str(row.get("file_name", "/")):
                    (root / name.partition("_")[2]).mkdir(exist_ok=True)
                    colours = np.random.default_rng(1).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
                    Image.fromarray(colours).save(root / name.partition("_")[2] / row["file_name"], quality=95)
        values = {"root": str(root), "validation_share": 0.0, "choice": {"min_box_area": 0}, **settings}
        return CocoSettings.check(values, origin="test").open()

    return build


def named(curation: Curation) -> set[tuple[str, str, str, str]]:
    return {(row.outcome, row.image_id.lstrip("0"), row.instance_id, row.reason) for row in curation.rejected}


def test_it_is_a_source(coco: Callable[..., CocoSource]) -> None:
    assert isinstance(coco(documents()), Source)


def test_people_are_masked_as_cocos_own_library_masks_them(coco: Callable[..., CocoSource], tmp_path: Path) -> None:
    """Polygons, several polygons, RLE and compressed RLE; and the library reads what the test wrote."""
    source = coco(documents(), crowds="mask")
    seen = 0
    for part in ("train2017", "val2017"):
        library = COCO(str(tmp_path / f"coco/annotations/instances_{part}.json"))
        for record in source.curate().records:
            if (record.split == "test") != (part == "val2017"):
                continue
            assert [int(each.id) for each in record.instances] == library.getAnnIds(int(record.id), [PERSON])
            for index, instance in enumerate(record.instances):
                annotation = library.loadAnns(int(instance.id))[0]
                mask = source.read_mask(record, index)
                assert np.array_equal(mask, library.annToMask(annotation))
                assert instance.crowd == bool(annotation["iscrowd"])
                rows, columns = np.nonzero(mask)
                box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                assert np.allclose(np.array(instance.box) * [WIDTH, HEIGHT, WIDTH, HEIGHT], box)
                seen += 1
    assert seen == 6


def test_splits_licences_and_backgrounds_are_those_of_the_json(coco: Callable[..., CocoSource]) -> None:
    curation = coco(documents()).curate()
    found = {record.id.lstrip("0"): record for record in curation.records}
    assert {name: (r.split, r.role) for name, r in found.items()} == {
        "1": ("train", "people"),
        "2": ("train", "people"),
        "4": ("train", "background"),
        "5": ("train", "background"),
        "100": ("test", "people"),
    }
    assert found["1"].licence == BY and found["5"].licence == BY_NC
    assert found["1"].url == "http://images.cocodataset.org/train2017/000000000001.jpg"
    assert found["1"].landing_url == "http://farm7.staticflickr.com/6116/1_z.jpg"
    assert named(curation) == {("image-rejected", "3", "", "crowd")}
    only_by = coco(documents(), licences=[BY]).curate()
    assert {r.id.lstrip("0") for r in only_by.records} == {"1", "2", "4", "100"}


def test_a_share_of_the_training_pictures_is_for_validation(coco: Callable[..., CocoSource]) -> None:
    files = documents()
    files["instances_train2017"]["images"] = [picture(n) for n in range(1, 61)]
    splits = [record.split for record in coco(files, validation_share=0.3).curate().records]
    assert 8 <= splits.count("validation") <= 28 and splits.count("test") == 1
    source = coco(files, validation_share=0.3, splits=["validation"])
    assert {record.split for record in source.curate().records} == {"validation"}
    assert not any("val2017" in name for name in source.tables())


def test_other_classes_take_the_place_of_people(coco: Callable[..., CocoSource]) -> None:
    """Their pictures may show people; backgrounds show neither."""
    curation = coco(documents(), categories=["Dog"]).curate()
    assert [(r.id.lstrip("0"), r.role) for r in curation.records] == [("4", "people"), ("5", "background")]
    assert curation.records[0].instances[0].category == "Dog"
    with pytest.raises(UserError, match="no category 'dogs', did you mean 'dog'"):
        coco(documents(), categories=["dogs"]).curate()


def test_who_is_divided_or_touches_the_edge_is_told(coco: Callable[..., CocoSource]) -> None:
    files = documents()
    at_the_edge = person(51, 4, segmentation=[[0, 10, 20, 10, 20, 50, 0, 50]], bbox=[0, 10, 20, 40])
    files["instances_train2017"]["annotations"].append(at_the_edge)
    people = {each.id: each for record in coco(files).curate().records for each in record.instances}
    assert {name: (each.occluded, each.truncated) for name, each in people.items()} == {
        "11": (True, False),
        "21": (False, False),
        "22": (False, False),
        "51": (False, True),
        "1001": (False, False),
    }


def test_the_caption_of_the_lowest_id_is_taken(coco: Callable[..., CocoSource]) -> None:
    files = documents()
    rows = [(9, 1, "Later."), (3, 1, " A man\n walks. "), (4, 2, 7), (5, 2, " "), (6, 77, "Nobody."), (7, 4, "A dog.")]
    for part in ("train2017", "val2017"):
        captions = [{"id": n, "image_id": image, "caption": text} for n, image, text in rows if part != "val2017"]
        files[f"captions_{part}"] = {"images": [], "annotations": captions}
    curation = coco(files, captions=True).curate()
    captions_of = {record.id.lstrip("0"): record.caption for record in curation.records}
    assert captions_of == {"1": "A man walks.", "2": "", "4": "A dog.", "5": "", "100": ""}
    assert named(curation) >= {
        ("row-rejected", "2", "4", "malformed-row"),
        ("row-rejected", "2", "5", "malformed-row"),
        ("row-rejected", "77", "6", "missing-image"),
    }


def test_poses_become_those_of_openpose(coco: Callable[..., CocoSource]) -> None:
    """By name; the neck is between both shoulders, and what is hidden counts half."""
    files = documents()
    known = {name: (12 + n % 5, 11 + 2 * n, 1 + n % 2) for n, name in enumerate(COCO_KEYPOINTS) if name != "left_ear"}
    one_shoulder = {"left_shoulder": (10, 20, 2), "nose": (12, 12, 2)}
    poses = [pose(11, 1, **known), pose(21, 2, **one_shoulder), pose(22, 2)]
    files["person_keypoints_train2017"] = {"images": [], "annotations": poses}
    source = coco(files)
    records = {record.id.lstrip("0"): record for record in source.curate().records}
    found = np.array(records["1"].instances[0].keypoints).reshape(18, 3)
    for name, (x, y, score) in zip(KEYPOINTS, found.tolist(), strict=True):
        if name == "neck":
            left, right = known["left_shoulder"], known["right_shoulder"]
            wanted = ((left[0] + right[0]) / 2, (left[1] + right[1]) / 2, min(left[2], right[2]))
        else:
            wanted = known.get(name, (0, 0, 0))
        assert (x * WIDTH, y * HEIGHT, score) == pytest.approx((wanted[0], wanted[1], wanted[2] / 2))
    second, third = records["2"].instances
    assert np.array(second.keypoints).reshape(18, 3)[KEYPOINTS.index("neck")].tolist() == [0, 0, 0]
    assert np.count_nonzero(np.array(second.keypoints)[2::3]) == 2
    assert third.keypoints == ()


def test_poses_are_in_the_sample_in_pixels_of_its_picture(coco: Callable[..., CocoSource]) -> None:
    """Halved with the picture; what lies far from the person is left out, as of estimated poses."""
    files = documents()
    poses = [pose(11, 1, nose=(16, 12, 2), left_ankle=(18, 48, 1), right_wrist=(78, 58, 2))]
    files["person_keypoints_train2017"] = {"images": [], "annotations": poses}
    source = coco(files, choice={"min_box_area": 0, "backgrounds": 0})
    records = [record for record in source.curate().records if record.id.endswith("1")]
    rejected: list[Rejection] = []
    settings = CuratedSettings.check({"decode": {"max_side": 40, "min_side": 8}}, origin="test")
    (sample,) = curated_samples(records, source, settings, Estimators(), rejected)
    keypoints = dict(zip(KEYPOINTS, sample.people[0].keypoints.tolist(), strict=True))
    assert keypoints.pop("nose") == [8, 6, 1]
    assert keypoints.pop("left_ankle") == [9, 24, 0.5]
    assert all(each == [0, 0, 0] for each in keypoints.values())
    assert sample.made_by.pose == MadeBy("annotated")


class Everywhere:
    """A network that finds somebody in the crowd of picture 3, and somebody else."""

    name, places, batch_size, made_by = "everywhere", (), 1, MadeBy("everywhere")

    def fingerprint(self) -> str:
        return ""

    def check(self) -> None: ...

    def find(self, images: Any) -> list[FoundPeople]:
        masks = [np.zeros((HEIGHT, WIDTH), bool) for _ in range(2)]
        masks[0][8:28, 55:70] = True
        masks[1][35:55, 60:75] = True
        return [FoundPeople(masks, [0.9, 0.8]) for _ in images]


@pytest.mark.parametrize("network", [False, True])
def test_a_masked_crowd_stays_scene(coco: Callable[..., CocoSource], network: bool) -> None:
    """It is nobody of the sample, and neither is whom a network finds in it."""
    source = coco(documents(), crowds="mask", splits=["train"])
    records = [record for record in source.curate().records if record.id.endswith("3")]
    instances: Any = Everywhere() if network else None
    settings = CuratedSettings.check({"decode": {"min_side": 8}}, origin="test")
    (sample,) = curated_samples(records, source, settings, Estimators(instances=instances), [])
    assert [each.id for each in sample.people] == (["31", "found-1"] if network else ["31"])
    assert not any(each.mask[5:30, 50:78].any() for each in sample.people)


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no image": (person(50, 4711), "missing-image"),
    "a category that is not there": (person(50, 1, category_id=99), "unknown-category"),
    "an odd number of numbers": (person(50, 1, segmentation=[[1, 2, 30, 4, 5, 60, 7]]), "bad-segmentation"),
    "two points": (person(50, 1, segmentation=[[1, 2, 30, 40]]), "bad-segmentation"),
    "no polygon": (person(50, 1, segmentation=[]), "bad-segmentation"),
    "no area": (person(50, 1, segmentation=[[1, 1, 9, 9, 17, 17]]), "bad-segmentation"),
    "text for numbers": (person(50, 1, segmentation=[["a"] * 6]), "bad-segmentation"),
    "RLE of another size": (person(50, 1, segmentation={"size": [9, 9], "counts": [81]}), "bad-segmentation"),
    "RLE too short": (person(50, 1, segmentation={"size": [HEIGHT, WIDTH], "counts": [5, 5]}), "bad-segmentation"),
    "RLE that is broken": (person(50, 1, segmentation={"size": [HEIGHT, WIDTH], "counts": "é~"}), "bad-segmentation"),
    "RLE of a run below 0": (
        person(50, 1, segmentation={"size": [HEIGHT, WIDTH], "counts": "Xo0d?lLdj2"}),
        "bad-segmentation",
    ),
    "RLE of nothing": (person(50, 1, segmentation={"size": [HEIGHT, WIDTH], "counts": [4800]}), "empty-mask"),
    "no segmentation": (person(50, 1, segmentation=None), "bad-segmentation"),
    "a box beyond the picture": (person(50, 1, bbox=[20, 10, 70, 40]), "bad-box"),
    "a box of no area": (person(50, 1, bbox=[20, 10, 0, 40]), "bad-box"),
    "a box of three numbers": (person(50, 1, bbox=[20, 10, 40]), "bad-box"),
    "an id of another": (person(21, 1), "repeated-row"),
    "an image that is no number": (person(50, 1, image_id="x"), "malformed-row"),
    "a crowd of two kinds": (person(50, 1, iscrowd=2), "malformed-row"),
    "no object": ([1, 2], "malformed-row"),
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_row_that_cannot_be_used_is_named(coco: Callable[..., CocoSource], row: str) -> None:
    """And its picture, where it is known, is set aside: somebody in it would have no mask."""
    bad, reason = BAD_ROWS[row]
    files = documents()
    files["instances_train2017"]["annotations"].append(bad)
    curation = coco(files).curate()
    (told,) = [each for each in curation.rejected if each.outcome == "row-rejected"]
    assert told.reason == reason
    assert told.message.startswith("annotations/instances_train2017.json: annotations[6]: ")
    lost = isinstance(bad, dict) and bad["image_id"] == 1
    assert (("image-rejected", "1", "", "person-without-mask") in named(curation)) == lost
    assert {r.id.lstrip("0") for r in curation.records} == {"2", "4", "5", "100"} | (set() if lost else {"1"})


def test_pictures_that_cannot_be_used_are_named(coco: Callable[..., CocoSource]) -> None:
    files = documents()
    files["instances_train2017"]["images"] += [
        picture(1),  # again
        picture(5, file_name="other.jpg"),  # an id of two files
        picture(6, file_name="000000000002.jpg"),  # a file of two ids
        picture(100),  # of val2017
        picture(7, file_name="../../secret.jpg"),
        picture(8, license=77),
        picture(9, width=0),
        {"id": 10},
        "eleven",
    ]
    curation = coco(files).curate()
    assert {r.id.lstrip("0") for r in curation.records} == {"1", "4", "100"}
    assert named(curation) == {
        ("row-rejected", "1", "", "repeated-row"),
        ("image-rejected", "5", "", "repeated-row"),
        ("image-rejected", "2", "", "repeated-row"),
        ("image-rejected", "6", "", "repeated-row"),
        ("row-rejected", "100", "", "repeated-photo"),
        ("row-rejected", "7", "", "bad-file-name"),
        ("image-rejected", "8", "", "unknown-licence"),
        ("row-rejected", "9", "", "malformed-row"),
        ("row-rejected", "10", "", "malformed-row"),
        ("row-rejected", "", "", "malformed-row"),
        ("image-rejected", "3", "", "crowd"),
    }


@pytest.mark.parametrize("keypoints", [[1, 2, 2], [0] * 54, "none", None, [0] * 50 + [3], [90, 10, 2] + [0] * 48])
def test_a_pose_that_cannot_be_used_is_named(coco: Callable[..., CocoSource], keypoints: Any) -> None:
    """The person stays, without a pose."""
    files = documents()
    bad = person(11, 1, keypoints=keypoints)
    files["person_keypoints_train2017"] = {"images": [], "annotations": [bad]}
    curation = coco(files).curate()
    assert ("row-rejected", "1", "11", "bad-keypoints") in named(curation)
    assert [r.instances[0].keypoints for r in curation.records if r.id.endswith("1")] == [()]


def test_a_picture_that_is_not_there_is_set_aside_when_it_is_read(coco: Callable[..., CocoSource]) -> None:
    source = coco(documents())
    records = [record for record in source.curate().records if record.role == "people"]
    Path(records[0].image).unlink()
    rejected: list[Rejection] = []
    settings = CuratedSettings.check({"decode": {"min_side": 8}}, origin="test")
    samples = list(curated_samples(records, source, settings, Estimators(), rejected))
    assert len(samples) == len(records) - 1
    assert [(row.image_id, row.stage, row.reason) for row in rejected] == [(records[0].id, "fetch", "not-found")]


def test_what_is_missing_or_no_json_is_told_with_its_name(coco: Callable[..., CocoSource], tmp_path: Path) -> None:
    source = coco(documents())
    file = tmp_path / "coco/annotations/instances_train2017.json"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"^annotations/instances_train2017\.json is not the JSON"):
        source.curate()
    file.write_text('{"images": [], "annotations": []}')
    with pytest.raises(UserError, match=r"^annotations/instances_train2017\.json has no categories and no licenses"):
        source.curate()
    file.unlink()
    with pytest.raises(UserError, match=r"annotations/instances_train2017\.json does not exist"):
        source.check()
    with pytest.raises(UserError, match=r"captions_val2017\.json does not exist"):
        coco(documents(), captions=True).check()


def test_a_remote_folder_is_read_like_a_local_one(coco: Callable[..., CocoSource], tmp_path: Path) -> None:
    local = coco(documents())
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "coco"), "/coco", recursive=True)
    try:
        remote = CocoSource(local.settings.model_copy(update={"root": "memory://coco"}))
        ours, theirs = local.curate(), remote.curate()
        assert [r.instances for r in theirs.records] == [r.instances for r in ours.records]
        assert theirs.rejected == ours.rejected
        assert remote.read_image(theirs.records[0]) == local.read_image(ours.records[0])
    finally:
        memory.rm("/coco", recursive=True)


def test_what_is_read_is_in_the_fingerprint(coco: Callable[..., CocoSource], tmp_path: Path) -> None:
    source = coco(documents())
    before = source.fingerprint()
    assert coco(documents(), crowds="mask").fingerprint() != before
    file = tmp_path / "coco/annotations/instances_val2017.json"
    file.write_text(file.read_text() + " ")
    assert source.fingerprint() != before


def test_a_mask_that_changes_within_its_box_changes_what_the_record_says(coco: Callable[..., CocoSource]) -> None:
    """Its digest decides whether a shard is built anew."""

    def digests(polygon: list[float]) -> list[str]:
        files = documents()
        for name, document in files.items():
            document["annotations"] = [person(1, 1, segmentation=[polygon])] if name == "instances_train2017" else []
        (record,) = (each for each in coco(files).curate().records if each.role == "people")
        return [digest_of_records([asdict(record)]), digest_of_records([asdict(replace(record, id="other"))])]

    square = [20.0, 10.0, 40.0, 10.0, 40.0, 50.0, 20.0, 50.0]
    notched = [20.0, 10.0, 40.0, 10.0, 40.0, 50.0, 30.0, 30.0, 20.0, 50.0]
    assert digests(square) == digests(square) and not set(digests(square)) & set(digests(notched))
