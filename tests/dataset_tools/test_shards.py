"""Shards: the same bytes every time, one range request a sample, and no damage that verify overlooks."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from dataset_tools.errors import UserError
from dataset_tools.schema import EncodingSettings, Sample, encode_png
from dataset_tools.shards import (
    Manifest,
    Outline,
    Problem,
    ShardDataset,
    index_path,
    is_intact,
    keypoints_in_box,
    read_index,
    read_manifest,
    table_path,
    verify,
    write_shard,
    write_tar,
)

PNG = EncodingSettings(image_format="png")
Members = list[tuple[str, bytes]]
Forge = Callable[[Path, str, Callable[[Members], Members]], None]
TRAIN = "composite/train-000000.tar"
WIDE_AND_NARROW = [("a", 2, (48, 64)), ("b", 1, (90, 40)), ("c", 3, (40, 90))]
"""Key, people, height and width."""


@pytest.fixture
def memory() -> Iterator[str]:
    """An empty fsspec root in memory."""
    yield "memory://shards-test"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/shards-test"):
        filesystem.rm("/shards-test", recursive=True)


# Writing ------------------------------------------------------------------------------------------------------------


def test_the_same_samples_give_the_same_bytes(make_sample: Callable[..., Sample], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        samples = (make_sample("composite", f"k{i}") for i in range(3))
        write_shard(samples, str(tmp_path / folder), TRAIN, EncodingSettings(), [])
    for name in (TRAIN, index_path(TRAIN)):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_members_carry_no_time_and_no_owner(built_dataset: Path) -> None:
    with tarfile.open(built_dataset / TRAIN) as tar:
        facts = {(m.mtime, m.uid, m.gid, m.mode, m.isfile()) for m in tar.getmembers()}
    assert facts == {(0, 0, 0, 0o644, True)}


def test_the_index_is_what_tarfile_says_and_its_slices_are_the_members(
    built_dataset: Path,
    tar_index: Callable[[Path], list[dict[str, Any]]],
    tar_members: Callable[[Path], Members],
) -> None:
    for tar in sorted(built_dataset.glob("*/*.tar")):
        path = f"{tar.parent.name}/{tar.name}"
        entries = read_index(str(built_dataset), path)["samples"]
        assert entries == tar_index(tar)
        data = tar.read_bytes()
        slices = [
            (f"{entry['key']}.{suffix}", data[offset : offset + size])
            for entry in entries
            for suffix, (offset, size) in entry["parts"].items()
        ]
        assert slices == tar_members(tar)


def test_a_shard_is_described_as_it_lies_there(make_sample: Callable[..., Sample], tmp_path: Path) -> None:
    rows = [{"reason": "http-404", "transient": False}]

    def samples() -> Iterator[Sample]:
        yield make_sample("real", "a", people=1)
        rows.append({"reason": "time-out", "transient": True})
        yield make_sample("real", "b", people=3)

    shard = write_shard(samples(), str(tmp_path), "real/train-000000.tar", PNG, rows)
    tar = tmp_path / "real/train-000000.tar"
    assert (shard.samples, shard.people, shard.rejected, shard.transient) == (2, 4, 2, 1)
    assert shard.size == tar.stat().st_size
    assert shard.sha256 == hashlib.sha256(tar.read_bytes()).hexdigest()
    assert read_index(str(tmp_path), shard.path)["rejected"] == rows
    assert is_intact(str(tmp_path), shard)


def test_a_shard_without_samples_has_no_tar_and_an_index_that_says_why(
    make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    path = "real/train-000000.tar"
    write_shard([make_sample("real")], str(tmp_path), path, PNG, [])
    rows = [{"reason": "empty-mask", "transient": False}]
    shard = write_shard([], str(tmp_path), path, PNG, rows)
    assert sorted(file.name for file in (tmp_path / "real").iterdir()) == [
        "train-000000.index.json",
        "train-000000.parquet",
    ]
    assert (shard.samples, shard.size) == (0, 0)
    assert read_index(str(tmp_path), path)["rejected"] == rows
    assert is_intact(str(tmp_path), shard)
    (tmp_path / path).write_bytes(b"")
    assert not is_intact(str(tmp_path), shard)


def test_a_producer_that_fails_leaves_nothing_behind(make_sample: Callable[..., Sample], tmp_path: Path) -> None:
    def samples() -> Iterator[Sample]:
        yield make_sample("real", "a")
        raise OSError("the disk is on fire")

    with pytest.raises(OSError, match="on fire"):
        write_shard(samples(), str(tmp_path), "real/train-000000.tar", PNG, [])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_two_samples_with_one_key_are_refused(make_sample: Callable[..., Sample], tmp_path: Path) -> None:
    samples = [make_sample("real", key) for key in ("a", "b", "a")]
    with pytest.raises(ValueError, match=r"real/train-000000\.tar: two samples have the key 'a'"):
        write_shard(samples, str(tmp_path), "real/train-000000.tar", PNG, [])
    assert not (tmp_path / "real/train-000000.tar").exists()


def test_the_longest_key_is_written_and_read(make_sample: Callable[..., Sample], tmp_path: Path) -> None:
    key = "k" * 80
    shard = write_shard([make_sample("composite", key)], str(tmp_path), TRAIN, PNG, [])
    assert ShardDataset.of_shards(str(tmp_path), [shard])[0].key == key


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "index", "table"])
def test_a_damaged_shard_is_not_intact(dataset: Path, damage: str) -> None:
    shard = read_manifest(str(dataset)).shards["composite"]["train"][0]
    tar, index = dataset / shard.path, dataset / index_path(shard.path)
    assert is_intact(str(dataset), shard)
    data = tar.read_bytes()
    match damage:
        case "flip":
            tar.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
        case "cut":
            tar.write_bytes(data[:-512])
        case "remove":
            tar.unlink()
        case "index":
            index.write_text(index.read_text() + " ")
        case "table":
            tar.with_suffix(".parquet").unlink()
    assert not is_intact(str(dataset), shard)


# Reading ------------------------------------------------------------------------------------------------------------


def test_samples_come_back_by_index_and_in_order(built_dataset: Path, make_sample: Callable[..., Sample]) -> None:
    dataset = ShardDataset(str(built_dataset), "composite", "train")
    assert len(dataset) == 5
    assert dataset.keys == [f"train-{i:03d}" for i in range(5)]
    for index, streamed in enumerate(dataset.stream()):
        truth = make_sample("composite", f"train-{index:03d}", "train", people=1 + index % 3)
        for sample in (dataset[index], streamed):
            assert sample.key == truth.key
            np.testing.assert_array_equal(sample.image, truth.image)
            assert sample.origins == truth.origins
        assert dataset.annotations(index)["key"] == truth.key
    with pytest.raises(IndexError):
        dataset[5]


def test_any_fsspec_root_holds_the_same_dataset(
    memory: str, build_dataset: Callable[[str], Manifest], built_dataset: Path
) -> None:
    build_dataset(memory)
    assert list(verify(memory)) == []
    filesystem = fsspec.filesystem("memory")
    for path in built_dataset.rglob("*"):
        if path.is_file() and path.name != "manifest.json":  # the manifest holds tokens, which the store decides
            assert filesystem.cat_file(f"/shards-test/{path.relative_to(built_dataset)}") == path.read_bytes()


def test_one_sample_costs_one_range_request_and_never_the_whole_shard(
    memory: str, build_dataset: Callable[[str], Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_dataset(memory)
    dataset = ShardDataset(memory, "composite", "train")
    sizes = {f"/shards-test/{shard.path}": shard.size for shard in dataset.shards}
    requests: list[tuple[str, int, int]] = []
    cat_file = MemoryFileSystem.cat_file

    def counted(self: MemoryFileSystem, path: str, start: int, end: int, **options: Any) -> bytes:
        requests.append((path, start, end))
        with monkeypatch.context() as inner:
            inner.setattr(MemoryFileSystem, "open", open_file)
            return cat_file(self, path, start=start, end=end, **options)

    def refused(self: MemoryFileSystem, path: str, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{path} was opened outside a range request")

    open_file = MemoryFileSystem.open
    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    monkeypatch.setattr(MemoryFileSystem, "open", refused)
    for index in range(len(dataset)):
        requests.clear()
        dataset[index]
        ((path, start, end),) = requests
        assert 0 <= start < end <= sizes[path]
        assert end - start < sizes[path]
        requests.clear()
        dataset.annotations(index)
        ((_, start, end),) = requests
        assert end - start == len(dataset.parts(index)["annotations.json"])


def test_the_index_tells_how_large_samples_are_and_how_many_people_are_seen(
    make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    samples = [make_sample("real", name, people=people, size=size) for name, people, size in WIDE_AND_NARROW]
    samples[1].people[0].mask[:] = False
    shard = write_shard(samples, str(tmp_path), "real/train-000000.tar", EncodingSettings(), [])
    (tmp_path / shard.path).unlink()
    told = ShardDataset.of_shards(str(tmp_path), [shard]).outlines
    assert told == [Outline(64, 48, 2), Outline(40, 90, 0), Outline(90, 40, 3)]


def test_an_index_that_does_not_tell_how_large_samples_are_is_named(dataset: Path) -> None:
    place = dataset / "real/train-000000.index.json"
    document = json.loads(place.read_text())
    del document["outlines"]
    place.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"real/train-000000\.index\.json does not say how large"):
        assert ShardDataset(str(dataset), "real", "train").outlines


def test_a_shard_that_is_cut_short_is_an_error_when_its_lost_sample_is_read(dataset: Path) -> None:
    samples = ShardDataset(str(dataset), "real", "train")
    tar = dataset / "real/train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"train-000000\.tar ends before sample 'train-002'"):
        samples[2]


def test_what_is_not_there_is_said_in_one_line(built_dataset: Path, tmp_path: Path) -> None:
    cases = [
        (lambda: ShardDataset(str(built_dataset), "composite", "validation"), "holds real/train, real/test, paired"),
        (lambda: ShardDataset(str(tmp_path), "real", "train"), "holds no dataset"),
        (lambda: ShardDataset(str(built_dataset / "README.md"), "real", "train"), "holds no dataset"),
        (lambda: read_index(str(tmp_path), "real/train-000000.tar"), r"index\.json is missing"),
    ]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text('{"name": 3}')
    cases.append((lambda: read_manifest(str(tmp_path / "bad")), "is not a manifest"))
    for text in ("{", "[]", '{"samples": 3}'):
        (tmp_path / "bad" / "x.index.json").write_text(text)
        with pytest.raises(UserError, match="is not"):
            read_index(str(tmp_path / "bad"), "x.tar")
    for read, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value)


class Numbers(ShardDataset):
    """A dataset whose samples are their own positions."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        return index


@given(
    count=st.integers(0, 60),
    world_size=st.integers(1, 5),
    workers=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 9),
    start=st.integers(0, 70),
)
@example(count=1, world_size=5, workers=4, seed=0, epoch=0, start=0)
def test_shares_give_every_sample_once_and_interleave_to_the_order(
    count: int, world_size: int, workers: int, seed: int, epoch: int, start: int
) -> None:
    dataset = Numbers(count)
    order = dataset.order(seed, epoch).tolist()
    assert sorted(order) == list(range(count))
    shares = [
        list(dataset.share(seed, epoch, rank=r, world_size=world_size, worker=w, workers=workers, start=start))
        for w in range(workers)
        for r in range(world_size)
    ]
    assert sorted(itertools.chain(*shares)) == sorted(order[start:])
    turns = [share[turn] for turn in range(count) for share in shares if turn < len(share)]
    assert turns == order[start:]


def test_orders_differ_between_seeds_and_epochs_and_are_the_same_on_every_machine() -> None:
    dataset = Numbers(50)
    orders = {tuple(dataset.order(seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert Numbers(8).order(7, 2).tolist() == np.random.Generator(np.random.PCG64([7, 2])).permutation(8).tolist()


# Verifying ----------------------------------------------------------------------------------------------------------


def test_a_tar_is_what_webdatasets_own_writer_makes_of_the_same_parts(tmp_path: Path) -> None:
    samples = [(f"sample-{k}", {"png": bytes([k]) * 700, "annotations.json": b"{}", "b.png": b""}) for k in range(40)]
    write_tar(str(tmp_path), "ours.tar", iter(samples))
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), encoder=False, mtime=0, mode=0o644) as writer:
        for key, parts in samples:
            writer.write({"__key__": key, **parts})
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def problems(root: Path) -> list[str]:
    return [f"{problem.where}: {problem.what}" for problem in verify(str(root))]


def test_a_good_dataset_has_no_problem(built_dataset: Path) -> None:
    assert list(verify(str(built_dataset))) == []


def test_a_tar_cut_at_a_member_boundary_reads_short_without_an_error_elsewhere_and_is_found(
    dataset: Path, tar_index: Callable[[Path], list[dict[str, Any]]]
) -> None:
    tar = dataset / TRAIN
    boundary = tar_index(tar)[2]["offset"]
    tar.write_bytes(tar.read_bytes()[:boundary])
    keys = [sample["__key__"] for sample in webdataset.WebDataset(str(tar), shardshuffle=False)]
    assert keys == ["train-000", "train-001"]
    found = problems(dataset)
    assert f"{TRAIN}: differs from the manifest's sha256" in found
    assert f"{TRAIN}: holds 2 samples, the manifest says 3" in found


@pytest.fixture(scope="module")
def scratch(built_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that each example damages and mends again."""
    return Path(shutil.copytree(built_dataset, tmp_path_factory.mktemp("scratch") / "dataset"))


@given(
    position=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    path=st.sampled_from([TRAIN, index_path(TRAIN), table_path(TRAIN)]),
)
@settings(max_examples=15)
def test_any_flipped_bit_is_found_and_the_shard_named(scratch: Path, position: float, bit: int, path: str) -> None:
    whole = (scratch / path).read_bytes()
    damaged = bytearray(whole)
    damaged[int(position * len(whole))] ^= 1 << bit
    (scratch / path).write_bytes(damaged)
    found = list(verify(str(scratch)))
    (scratch / path).write_bytes(whole)
    assert any(problem.where == path for problem in found)
    assert all(problem.where.startswith("composite/train-000000") for problem in found)


def test_what_is_missing_added_or_changed_beside_the_shards_is_found(dataset: Path) -> None:
    (dataset / "composite/test-000000.tar").unlink()
    (dataset / index_path("real/train-000001.tar")).unlink()
    (dataset / "attribution.csv").unlink()
    (dataset / "README.md").write_text("new")
    shutil.copy(dataset / TRAIN, dataset / "composite/train-000009.tar")
    found = problems(dataset)
    assert "composite/test-000000.tar: is missing" in found
    assert "attribution.csv: is missing" in found
    assert "README.md: differs from the manifest's sha256" in found
    assert "composite/train-000009.tar: is not in the manifest" in found
    assert any(line.startswith("real/train-000001.index.json: ") and "is missing" in line for line in found)
    assert len(found) == 5


def test_a_changed_index_is_found_and_the_sample_named(dataset: Path) -> None:
    index = dataset / index_path(TRAIN)
    document = json.loads(index.read_text())
    document["samples"][1]["parts"]["image.png"][0] += 512
    index.write_text(json.dumps(document))
    found = problems(dataset)
    assert f"{index_path(TRAIN)}: differs from the manifest's sha256" in found
    assert f"{TRAIN}, sample train-001: is not what the index says" in found


def edit_annotations(key: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Members], Members]:
    def edit(members: Members) -> Members:
        edited = []
        for name, data in members:
            if name == f"{key}.annotations.json":
                document = json.loads(data)
                change(document)
                data = json.dumps(document).encode()
            edited.append((name, data))
        return edited

    return edit


def _rle(mask: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def _mask_beyond_the_picture(document: dict[str, Any]) -> None:
    document["annotations"][0]["segmentation"] = _rle(np.ones((60, 90)))


def _one_pixel_less(person: dict[str, Any]) -> dict[str, Any]:
    mask = coco_mask.decode(person["segmentation"])
    rows, columns = np.nonzero(mask)
    mask[rows[len(rows) // 2], columns[len(rows) // 2]] = 0
    return _rle(mask)


def _empty_mask(document: dict[str, Any]) -> None:
    document["annotations"][0].update(segmentation=_rle(np.zeros((48, 64))), area=0, bbox=[0, 0, 0, 0])


def _keypoint_outside(document: dict[str, Any]) -> None:
    x, y, width, height = document["annotations"][1]["bbox"]
    reach = 0.1 * max(width, height) + 2
    document["annotations"][1]["keypoints"][3:6] = [x + width + reach + 1, y, 0.9]


def _keypoint_off_the_picture(document: dict[str, Any]) -> None:
    """Of a person at its edge, whose box reaches beyond it when grown."""
    person = document["annotations"][1]
    mask = coco_mask.decode(person["segmentation"])
    rows, columns = np.nonzero(mask)
    mask[rows[0], : columns[0]] = 1
    for name in ("segmentation", "complete_segmentation"):
        person[name] = _rle(mask | coco_mask.decode(person[name]))
    rle = person["segmentation"]
    person.update(area=int(coco_mask.area(rle)), bbox=[float(v) for v in coco_mask.toBbox(rle)])
    person["keypoints"][3:6] = [-1, int(rows[0]), 0.9]


def _two_in_one_place(document: dict[str, Any]) -> None:
    first, second = document["annotations"]
    names = ("segmentation", "complete_segmentation", "augmented_segmentation", "area", "bbox", "keypoints")
    second.update({name: first[name] for name in names})


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "mask beyond the picture": (_mask_beyond_the_picture, "segmentation: is [60, 90], the image is [48, 64]"),
    "runs that end early": (lambda d: d["annotations"][0]["segmentation"].update(counts="0"), "runs cover 0 pixels"),
    "empty mask": (_empty_mask, "person 0: mask is empty"),
    "keypoint outside the box": (_keypoint_outside, "person 1: 1 keypoints lie outside the picture or the"),
    "keypoint outside the picture": (_keypoint_off_the_picture, "person 1: 1 keypoints lie outside the picture or the"),
    "another area": (lambda d: d["annotations"][0].update(area=3), "person 0: area or bbox is not the mask's"),
    "another box": (lambda d: d["annotations"][0]["bbox"].reverse(), "person 0: area or bbox is not the mask's"),
    "visible beyond complete": (
        lambda d: d["annotations"][0].update(complete_segmentation=_one_pixel_less(d["annotations"][0])),
        "person 0: visible mask goes beyond the complete mask",
    ),
    "another width": (lambda d: d.update(width=65), "annotations.json says 65x48, the image is 64x48"),
    "another split": (lambda d: d.update(split="test"), "says it belongs to composite/test"),
    "another version": (lambda d: d.update(schema_version="9"), "schema version '9'"),
    "an unknown label set": (lambda d: d.update(label_set="own"), "unknown label set 'own'"),
    "no order": (lambda d: d["annotations"][0].pop("order"), "order and occlusion go with composite"),
    "two of one order": (lambda d: d["annotations"][1].update(order=0), "order is not 0 to 1, each once"),
    "two in one place": (_two_in_one_place, "visible masks of two people overlap"),
    "a parsing of nobody": (lambda d: d.update(label_set="none"), "parsing.png is not 255 everywhere"),
    "a clean plate of nobody": (lambda d: d["made_by"]["plate"].update(name="none"), "name of who made it"),
    "effects that nobody knows": (lambda d: d["made_by"]["effects"].update(name="none"), "effects.png is not 255"),
    "another share known": (lambda d: d.update(known_share=0.5), "says known_share 0.5, the parts say 1.0"),
    "another share of effects": (lambda d: d.update(effects_share=0.9), "says effects_share 0.9, the parts say 0."),
    "nobody": (lambda d: d["annotations"].clear(), "layers.png"),
    "no people at all": (lambda d: d.update(annotations=None), "breaks the schema"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_a_sample_says_wrongly_is_found_and_shard_and_key_are_named(
    dataset: Path, forge: Forge, name: str
) -> None:
    change, message = DAMAGE[name]
    forge(dataset, TRAIN, edit_annotations("train-001", change))
    (found,) = problems(dataset)
    assert found.startswith(f"{TRAIN}, sample train-001: ")
    assert message in found


def test_effects_of_more_people_than_there_are_and_shadows_that_show_nowhere_are_found(
    dataset: Path, forge: Forge
) -> None:
    """Of two people, the first with a shadow, whose bits are all set and then one of them alone."""
    shown = {"train-000": 2, "train-001": 2, "train-002": 1}
    bits = {f"{key}.effects.png": encode_png(np.full((48, 64), value, np.uint8)) for key, value in shown.items()}
    forge(dataset, TRAIN, lambda members: [(name, bits.get(name, data)) for name, data in members])
    found = [line.removeprefix(f"{TRAIN}, sample ") for line in problems(dataset) if "effects_share" not in line]
    assert found == [  # one person, two, three
        "train-000: effects.png shows effects of more people than the 1 there are",
        "train-000: person 0: has a shadow, of which effects.png shows nothing",
        "train-001: person 0: has a shadow, of which effects.png shows nothing",
    ]


def test_a_label_that_the_set_has_not_is_found(dataset: Path, forge: Forge) -> None:
    parsing = encode_png(np.full((48, 64), 7, np.uint8))
    forge(
        dataset,
        TRAIN,
        lambda members: [(name, parsing if name == "train-001.parsing.png" else data) for name, data in members],
    )
    assert problems(dataset) == [f"{TRAIN}, sample train-001: parsing.png has the label 7, which pascal has not"]


def test_a_key_that_stands_in_two_shards_is_found(dataset: Path, forge: Forge) -> None:
    def renamed(members: Members) -> Members:
        return [
            (name.replace("train-003", "train-000"), data.replace(b'"key":"train-003"', b'"key":"train-000"'))
            for name, data in members
        ]

    forge(dataset, "real/train-000001.tar", renamed)
    where = "real/train-000001.tar, sample train-000"
    assert problems(dataset) == [f"{where}: another sample has the key, in real/train-000000.tar"]


def test_what_version_1_wrote_is_told_with_what_to_do(dataset: Path, forge: Forge) -> None:
    told = r"1\.0.*reads .?2\.\d.?: build the dataset again$"
    forge(dataset, TRAIN, edit_annotations("train-001", lambda document: document.update(schema_version="1.0")))
    with pytest.raises(ValueError, match=f"sample 'train-001' has schema version '{told}".replace("reads", "knows")):
        ShardDataset(str(dataset), "composite", "train")[1]
    for name in ("composite/train-000000.index.json", "manifest.json"):
        place = dataset / name
        place.write_text(json.dumps(json.loads(place.read_text()) | {"schema_version": "1.0"}))
        with pytest.raises(UserError, match=f"{name} has schema version {told}"):
            ShardDataset(str(dataset), "composite", "train")


def test_a_missing_part_and_a_broken_picture_are_found(dataset: Path, forge: Forge) -> None:
    forge(dataset, TRAIN, lambda members: [m for m in members if m[0] != "train-002.parsing.png"])
    forge(dataset, "real/train-000001.tar", lambda members: [(n, d[: len(d) // 2]) for n, d in members])
    found = "\n".join(problems(dataset))
    assert f"{TRAIN}, sample train-002: parts " in found
    assert f"{TRAIN}, sample train-002: cannot be decoded: sample 'train-002' has no part parsing.png" in found
    assert "real/train-000001.tar, sample train-003: cannot be decoded" in found


def test_a_part_that_all_samples_lack_is_found(dataset: Path, forge: Forge) -> None:
    forge(dataset, TRAIN, lambda members: [m for m in members if not m[0].endswith("layers.png")])
    found = problems(dataset)
    assert len(found) == 3
    assert all("go with composite" in line for line in found)


def test_members_that_are_no_files_or_come_twice_are_found(dataset: Path, forge: Forge) -> None:
    forge(dataset, TRAIN, lambda members: [*members, members[-1]])
    tar = dataset / "real/train-000000.tar"
    with tarfile.open(tar, "w") as archive:
        link = tarfile.TarInfo("train-000.image.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link, io.BytesIO())
    found = "\n".join(problems(dataset))
    assert f"{TRAIN}: cannot be read as a tar: member 'train-002.parsing.png' is there twice" in found
    assert "real/train-000000.tar: cannot be read as a tar: member 'train-000.image.png'" in found


def test_a_source_in_two_splits_is_found_and_both_samples_named(dataset: Path, forge: Forge) -> None:
    def leak(document: dict[str, Any]) -> None:
        document["origins"][1].update(id="train-donor-0", sha256="of another download")

    forge(dataset, "composite/test-000000.tar", edit_annotations("test-001", leak))
    (found,) = verify(str(dataset))
    assert found == Problem(
        "composite/test-000000.tar, sample test-001",
        f"source drawn/train-donor-0 is in split test and, in {TRAIN}, sample train-000, in train",
    )


def test_a_leak_between_configurations_is_found_too(dataset: Path, forge: Forge) -> None:
    def leak(document: dict[str, Any]) -> None:
        document["origins"][0].update(id="validation-photo-validation-000")

    forge(dataset, TRAIN, edit_annotations("train-000", leak))
    (found,) = verify(str(dataset))
    assert "drawn/validation-photo-validation-000" in found.what


def test_one_photograph_under_two_ids_in_two_splits_is_found(dataset: Path, forge: Forge) -> None:
    def copy(document: dict[str, Any]) -> None:
        document["origins"][1].update(id="copy", sha256=hashlib.sha256(b"train-donor-0").hexdigest())

    forge(dataset, "composite/test-000000.tar", edit_annotations("test-001", copy))
    (found,) = verify(str(dataset))
    assert found.where == "composite/test-000000.tar, sample test-001"
    assert "drawn/copy, which has the same bytes as drawn/train-donor-0, is in split test" in found.what


@given(st.integers(0, 2**32))
def test_keypoints_in_a_grown_box_are_those_within_its_sides_and_the_picture(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((40, 50), bool)
    x0, y0 = rng.integers(0, 40), rng.integers(0, 30)
    x1, y1 = rng.integers(x0 + 1, 51), rng.integers(y0 + 1, 41)
    mask[y0:y1, x0:x1] = True
    keypoints = rng.uniform(-20, 70, (18, 3))
    reach = 0.1 * max(x1 - x0, y1 - y0) + 2
    left, right, top, bottom = max(-0.5, x0 - reach), min(50, x1 + reach), max(-0.5, y0 - reach), min(40, y1 + reach)
    truth = [left <= x <= right and top <= y <= bottom for x, y, _ in keypoints]
    assert keypoints_in_box(keypoints, mask).tolist() == truth
    assert not keypoints_in_box(keypoints, np.zeros_like(mask)).any()


@pytest.mark.process
def test_the_reader_loads_nothing_heavy() -> None:
    heavy = {"torch", "prefect", "cv2", "duckdb", "pyarrow", "webdataset", "mlcroissant", "mild", "flows"}
    script = f"import sys, dataset_tools.shards; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
