"""What inspection counts is what was put in."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich.console import Console
from scipy.ndimage import binary_dilation

from dataset_tools.credits import Credits
from dataset_tools.errors import UserError
from dataset_tools.inspection import Inspection, Part, as_tables, inspect, people_columns, survey
from dataset_tools.masks import stratum
from dataset_tools.schema import EncodingSettings, MadeBy, Person, Sample
from dataset_tools.shards import Shard, read_manifest, write_shard

PNG = EncodingSettings(image_format="png")


@pytest.fixture(scope="module")
def inspection(built_dataset: Path) -> Inspection:
    return inspect(str(built_dataset))


def test_counts_and_sizes_are_those_of_the_files(inspection: Inspection, built_dataset: Path) -> None:
    facts = {(p.configuration, p.split): (p.shards, p.samples, p.people) for p in inspection.parts}
    assert facts == {
        ("real", "train"): (2, 5, 9),
        ("real", "test"): (0, 0, 0),
        ("paired", "validation"): (1, 2, 3),
        ("composite", "train"): (2, 5, 9),
        ("composite", "test"): (1, 2, 3),
    }
    for part in inspection.parts:
        files = built_dataset.glob(f"{part.configuration}/{part.split}-*.tar")
        assert part.bytes == sum(file.stat().st_size for file in files)


def test_people_occlusion_licences_and_sources_are_those_of_the_samples(
    inspection: Inspection, make_sample: Callable[..., Sample]
) -> None:
    (part,) = (p for p in inspection.parts if (p.configuration, p.split) == ("composite", "train"))
    samples = [make_sample("composite", f"train-{i:03d}", "train", people=1 + i % 3) for i in range(5)]
    assert part.people_per_picture == Counter(len(sample.people) for sample in samples) == {1: 2, 2: 2, 3: 1}
    assert people_columns(part) == [2, 2, 1, 0, 0, 0]
    hidden = [float(person.occlusion or 0) for sample in samples for person in sample.people]
    assert part.occluded == pytest.approx(np.mean([value > 0 for value in hidden]))
    assert part.occlusion_quantiles is not None
    assert part.occlusion_quantiles[0.5] == pytest.approx(np.median([value for value in hidden if value > 0]))
    assert part.occlusion_quantiles[1.0] == max(hidden)
    pictures = {origin.id for sample in samples for origin in sample.origins}
    assert part.sources == {"drawn": len(pictures)}
    assert part.licences == {"https://creativecommons.org/licenses/by/2.0/": len(pictures)}
    assert (part.label_sets, part.pose_by) == ({"pascal": 5}, {"drawn": 5})
    assert part.strata == Counter(sample.stratum for sample in samples)


def test_in_photographs_occlusion_is_what_the_source_flags(
    inspection: Inspection, make_sample: Callable[..., Sample]
) -> None:
    (part,) = (p for p in inspection.parts if (p.configuration, p.split) == ("real", "train"))
    samples = [make_sample("real", f"train-{i:03d}", "train", people=1 + i % 3) for i in range(5)]
    assert part.occlusion_quantiles is None
    assert part.occluded == pytest.approx(np.mean([p.occluded for s in samples for p in s.people]))


def test_effects_plates_and_captions_are_those_of_the_samples(make_sample: Callable[..., Sample]) -> None:
    """Of four pictures: one whose effects nobody knows, one with none, two with one kind or an unknown one."""
    nobody, none, reflected, unnamed = (make_sample("paired", f"k{index}") for index in range(4))
    bits = np.eye(48, 64, dtype=np.uint8)
    for sample, kinds, effects in [(none, (), bits * 0), (reflected, ("reflection",), bits), (unnamed, (), bits)]:
        sample.effects, sample.people[0].effects = effects, kinds
        sample.made_by = replace(sample.made_by, effects=MadeBy("difference"))
    none.made_by = replace(none.made_by, plate=MadeBy("chosen", "lama"))
    nobody.known, nobody.caption = np.zeros((48, 64), bool), ""
    shard = write_shard([nobody, none, reflected, unnamed], "memory://effects", "paired/train-000000.tar", PNG, [])
    part = part_of("memory://effects", shard)
    assert part.effects_known == 0.75 and part.effects_by == {"difference": 3, "none": 1}
    assert part.effects == pytest.approx({"shadow": 0, "reflection": 1 / 3, "any": 2 / 3})
    assert part.plate_known == pytest.approx(0.75 * 62 / 64) and part.plates_by == {"video": 3, "chosen (lama)": 1}
    assert part.captions == 0.75


def test_where_nothing_is_known_of_effects_and_plates_there_is_no_share(inspection: Inspection) -> None:
    (part,) = (p for p in inspection.parts if (p.configuration, p.split) == ("real", "train"))
    assert (part.effects_known, part.effects, part.plate_known, part.plates_by) == (0, {}, None, {"none": 5})


def test_rejections_are_counted_by_reason_and_outcome(inspection: Inspection) -> None:
    assert [(row.stage, row.reason, row.outcome, row.count) for row in inspection.rejected] == [
        ("decode", "truncated-image", "image-rejected", 2),
        ("decode", "cmyk", "mended", 1),
        ("mask", "empty-mask", "person-rejected", 1),
    ]


def part_of(root: str, shard: Shard) -> Part:
    """What inspection says of one shard of a dataset in memory."""
    configuration, split = shard.path.split("-")[0].split("/")
    with Credits() as credits:
        (part,) = survey(root, {configuration: {split: [shard]}}, credits)
    return part


def _picture_of(masks: list[np.ndarray]) -> Sample:
    height, width = masks[0].shape
    people = [Person(id=str(i), mask=mask) for i, mask in enumerate(masks)]
    return Sample(
        "k", "train", "real", np.zeros((height, width, 3), np.uint8), people, np.zeros((height, width), np.uint8),
        "lip", [],
    )  # fmt: skip


@given(st.lists(hnp.arrays(bool, (6, 7), elements=st.booleans(), fill=st.just(False)), min_size=1, max_size=3))
@settings(max_examples=30)
def test_masks_touch_where_growing_one_by_a_pixel_meets_another(masks: list[np.ndarray]) -> None:
    masks = [mask if mask.any() else ~mask for mask in masks]
    shard = write_shard([_picture_of(masks)], "memory://touch", "real/train-000000.tar", PNG, [])
    part = part_of("memory://touch", shard)
    pairs = [(one, other) for i, one in enumerate(masks) for other in masks[i + 1 :]]
    around = np.ones((3, 3), bool)
    assert part.touching == any((binary_dilation(one, around) & other).any() for one, other in pairs)
    boxed = [np.outer(m.any(1), m.any(0)) for m in masks]
    hulls = [np.maximum.accumulate(b) & np.maximum.accumulate(b[::-1])[::-1] for b in boxed]
    hulls = [np.maximum.accumulate(h, 1) & np.maximum.accumulate(h[:, ::-1], 1)[:, ::-1] for h in hulls]
    meet = any((one & other).any() for i, one in enumerate(hulls) for other in hulls[i + 1 :])
    assert part.overlapping_boxes == meet


@pytest.mark.parametrize("dx", range(-2, 3))
@pytest.mark.parametrize("dy", range(-2, 3))
def test_two_pixels_touch_when_equal_or_neighbours(dx: int, dy: int) -> None:
    one, other = np.zeros((2, 6, 7), bool)
    one[3, 3] = other[3 + dy, 3 + dx] = True
    shard = write_shard([_picture_of([one, other])], "memory://touch", "real/train-000000.tar", PNG, [])
    part = part_of("memory://touch", shard)
    assert part.touching == (max(abs(dx), abs(dy)) <= 1)
    assert part.touching == (stratum([one, other]) == "overlapping")


def test_sizes_are_smallest_middle_and_largest(make_sample: Callable[..., Sample]) -> None:
    sizes = [(40, 70), (90, 50), (60, 64), (41, 66)]
    samples = (make_sample("real", f"k{i}", size=size) for i, size in enumerate(sizes))
    shard = write_shard(samples, "memory://sizes", "real/train-000000.tar", PNG, [])
    part = part_of("memory://sizes", shard)
    assert part.width is not None and part.height is not None
    assert (part.width.minimum, part.width.median, part.width.maximum) == (50, 65, 70)
    assert (part.height.minimum, part.height.median, part.height.maximum) == (40, 50.5, 90)


def test_a_source_picture_used_twice_is_credited_once_with_all_its_roles(make_sample: Callable[..., Sample]) -> None:
    one, two = make_sample("composite", "a", people=1), make_sample("composite", "b", people=2)
    shared = replace(one.origins[0], role="person")
    two = replace(two, origins=[*two.origins, shared])
    shard = write_shard([one, two], "memory://credit", "composite/train-000000.tar", PNG, [])
    with Credits() as gathered:
        survey("memory://credit", {"composite": {"train": [shard]}}, gathered)
        credits = list(gathered)
    places = [(credit.source, credit.id) for credit in credits]
    assert places == sorted({(origin.source, origin.id) for origin in [*one.origins, *two.origins]})
    (credit,) = (credit for credit in credits if credit.id == shared.id)
    assert credit.roles == ["background", "person"]
    assert (credit.author, credit.url, credit.split) == (shared.author, shared.url, "train")


def test_no_sample_is_read(built_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request a shard: its table."""
    read: Counter[str] = Counter()
    cat_file = LocalFileSystem.cat_file

    def counted(self: LocalFileSystem, path: str, *args: Any, **options: Any) -> bytes:
        read[Path(path).suffix] += 1
        return cat_file(self, path, *args, **options)

    splits = read_manifest(str(built_dataset)).shards.values()
    monkeypatch.setattr(LocalFileSystem, "cat_file", counted)
    inspect(str(built_dataset))
    assert read == {".json": 1, ".parquet": sum(len(shards) for held in splits for shards in held.values())}


def test_it_becomes_plain_data_and_tables(inspection: Inspection) -> None:
    data = json.loads(json.dumps(inspection.model_dump(mode="json")))
    assert Inspection.model_validate(data) == inspection
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(*as_tables(inspection))
    text = console.export_text()
    for fact in (
        "composite/train",
        "paired/validation",
        "truncated-image",
        "64-64-64",
        "licenses/by/2.0/",
        "pascal 5",
        "composited 5",
        "photograph 5",
        "97%",
    ):
        assert fact in text
    assert len(as_tables(inspection.model_copy(update={"rejected": []}))) == len(as_tables(inspection)) - 1


def test_what_cannot_be_inspected_is_said_in_one_line(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no dataset"):
        inspect(str(tmp_path / "nothing"))
    whole = (dataset / "rejected.parquet").read_bytes()
    manifest = json.loads((dataset / "manifest.json").read_text())
    # Tables of shards would be read each time.
    (dataset / "manifest.json").write_text(json.dumps(manifest | {"shards": {}}))
    for number in range(0, len(whole), 7):  # whatever the library makes of it, it is one line
        (dataset / "rejected.parquet").write_bytes(whole[:number] + bytes([whole[number] ^ 4]) + whole[number + 1 :])
        with contextlib.suppress(UserError):
            inspect(str(dataset))
    (dataset / "rejected.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"rejected\.parquet cannot be read") as caught:
        inspect(str(dataset))
    assert "\n" not in str(caught.value)
    (dataset / "rejected.parquet").unlink()
    with pytest.raises(UserError, match=r"rejected\.parquet cannot be read"):
        inspect(str(dataset))


@pytest.fixture(autouse=True, scope="module")
def _clear_memory() -> Any:
    yield
    for root in ("/touch", "/sizes", "/credit", "/effects"):
        if fsspec.filesystem("memory").exists(root):
            fsspec.filesystem("memory").rm(root, recursive=True)
