"""Pair sets as they are published: each layout becomes the same samples, and what does not fit is named."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataset_tools import picture_tables
from dataset_tools.curated import CuratedSettings, Estimators, curated_samples
from dataset_tools.errors import UserError
from dataset_tools.fetch import FetchSettings
from dataset_tools.images import DecodeSettings
from dataset_tools.pair_layouts import LayoutSettings, rows_of_files
from dataset_tools.pair_list import PAIR_LIST, PairRow, pair_list
from dataset_tools.records import Rejection
from dataset_tools.schema import Sample
from dataset_tools.sources.pairs import PairsSettings, PairsSource

SIZE = (64, 96)
ANN, BOB, SHADOW = np.zeros((3, *SIZE), bool)
ANN[10:50, 10:26] = True
BOB[20:55, 60:80] = True
SHADOW[46:60, 26:50] = True


def plate(seed: int) -> np.ndarray:
    ramp = np.linspace(90, 200, SIZE[0])[:, None, None] + np.array([0, 12, -9])
    return (ramp + np.random.default_rng(seed).integers(-5, 6, (*SIZE, 3))).astype(np.uint8)


def shot(seed: int) -> np.ndarray:
    image = plate(seed).astype(float)
    image[SHADOW] *= 0.6
    image[ANN] = (30, 60, 130)
    image[BOB] = (230, 40, 30)
    return image.astype(np.uint8)


def grey(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8) * 255


def save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}))


def write_corne(root: Path) -> dict[str, Any]:
    for k in range(2):
        save(shot(k), root / f"shot/{k}.jpg")
        save(plate(k), root / f"bg/{k}.png")
        save(grey(ANN | BOB), root / f"mask_sam/{k}.png")
        save(grey(ANN | BOB | SHADOW), root / f"mask_eff/{k}.png")
    return {
        "image": "shot/{id}.*",
        "background": "bg/{id}.*",
        "masks": "mask_sam/{id}.*",
        "effects": "mask_eff/{id}.*",
    }


def write_rorem(root: Path) -> dict[str, Any]:
    for k in range(2):
        save(shot(k), root / f"source/{k}.png")
        save(plate(k), root / f"GT/{k}.png")
        save((ANN + 2 * BOB).astype(np.uint8), root / f"mask/{k}.png")
    (root / "meta.json").write_text("[]")
    return {"image": "source/{id}.*", "background": "GT/{id}.*", "masks": "mask/{id}.*"}


def write_rord(root: Path) -> dict[str, Any]:
    for k, split in enumerate(("train", "val")):
        save(shot(k), root / f"{split}/img/scene{k}-7.png")
        save(plate(k), root / f"{split}/gt/scene{k}-7.png")
    return {"image": "{split}/img/{group}-{id}.*", "background": "{split}/gt/{group}-{id}.*"}


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_ober(root: Path, rows: int = 2, **changes: list[Any]) -> dict[str, Any]:
    """As Hugging Face `datasets` writes pictures; two rows a row group."""

    def column(pictures: list[np.ndarray]) -> list[dict[str, Any]]:
        return [{"bytes": png(array), "path": None} for array in pictures]

    table = {
        "input": column([shot(k) for k in range(rows)]),
        "gt": column([plate(k) for k in range(rows)]),
        "object_mask": column([grey(ANN | BOB)] * rows),
        "object_effect_mask": column([grey(ANN | BOB | SHADOW)] * rows),
        "subset": ["a"] * rows,
        "split": (["train", "test"] * rows)[:rows],
    } | changes
    (root / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), root / "data/train-00000-of-00001.parquet", row_group_size=2)
    names = {"image": "input", "background": "gt", "masks": "object_mask", "effects": "object_effect_mask"}
    return {"table": "data/*.parquet", "split": "split", **names}


def source_of(root: Path | str, layout: dict[str, Any], **changes: object) -> PairsSource:
    values = {"root": str(root), "layout": layout, "licence": "CC BY 4.0", **changes}
    return PairsSettings.check(values, origin="test").open()


def samples_of(source: PairsSource, configuration: str = "paired") -> tuple[list[Sample], list[Rejection]]:
    settings = CuratedSettings(configuration=configuration, decode=DecodeSettings(min_side=16), fetch_workers=2)
    curation = source.curate()
    plates = source if configuration == "paired" else None
    return list(
        curated_samples(curation.records, source, settings, Estimators(plate=plates), curation.rejected)
    ), curation.rejected


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize(("write", "masks", "effects"), [
    (write_corne, [ANN | BOB], "annotated"),
    (write_rorem, [ANN, BOB], "difference"),
    (write_rord, [ANN, BOB], "difference"),
    (write_ober, [ANN | BOB], "annotated"),
])  # fmt: skip
def test_each_layout_becomes_paired_samples(
    tmp_path: Path, write: Callable[[Path], dict[str, Any]], masks: list[np.ndarray], effects: str
) -> None:
    samples, rejected = samples_of(source_of(tmp_path, write(tmp_path)))
    assert rejected == [] and len(samples) == 2
    for number, sample in enumerate(samples):
        sample.check()
        assert sample.background is not None and np.abs(sample.background.astype(int) - plate(number)).max() == 0
        assert sample.known is not None and sample.known.all()
        assert np.abs(sample.image.astype(int) - shot(number)).mean() < 6
        if write is write_rord:  # people by the difference, too
            assert [iou(p.mask, m) > 0.8 for p, m in zip(sample.people, masks, strict=True)] == [True, True]
            assert {p.mask_by for p in sample.people} == {"difference"}
        else:
            assert [np.array_equal(p.mask, m) for p, m in zip(sample.people, masks, strict=True)] == [True] * len(masks)
        assert sample.made_by.effects.name == effects
        shown = sample.effects_of([0])
        assert shown is not None and iou(shown, SHADOW) > (0.999 if effects == "annotated" else 0.7)
        assert sample.origins[0].licence == "CC BY 4.0"
    if write in (write_rord, write_ober):
        assert [sample.split for sample in samples] == ["train", "validation" if write is write_rord else "test"]


def test_what_an_effect_mask_means_is_said_by_the_record_and_not_by_who_reads_it(tmp_path: Path) -> None:
    """A shard is told by its records: the same file as bits of people must be another record."""
    published = source_of(tmp_path, write_corne(tmp_path))
    record = published.curate().records[0]
    listed = PairsSettings.check({"root": str(tmp_path)}, origin="test").open()
    shown = listed.clean_plate(shot(0), record).effects
    assert shown is not None and list(shown) == [""]
    row = PairRow(id="0", group="0", image="shot/0.jpg", background="bg/0.png", effects="mask_eff/0.png")
    (tmp_path / PAIR_LIST).write_bytes(pair_list([row]))
    assert listed.curate().records[0].plate != record.plate


def test_a_set_without_plates_serves_real_samples(tmp_path: Path) -> None:
    save(shot(0), tmp_path / "images/dor_001.png")
    save(grey(BOB), tmp_path / "masks/dor_001.png")
    (tmp_path / "metadata.jsonl").write_text("{}\n")
    source = source_of(tmp_path, {"image": "images/{id}.*", "masks": "masks/{id}.*"}, category="Object")
    samples, rejected = samples_of(source, "real")
    assert rejected == [] and [sample.key for sample in samples] == ["pairs-dor_001"]
    assert samples[0].background is None and samples[0].people[0].category == "Object"
    assert [row.reason for row in samples_of(source)[1]] == ["no-plate"]


def test_of_several_mask_files_one_may_hold_several_values(tmp_path: Path) -> None:
    save(shot(0), tmp_path / "image/a.png")
    save(plate(0), tmp_path / "plate/a.png")
    save(ANN.astype(np.uint8) + (ANN & (np.arange(SIZE[0])[:, None] < 25)), tmp_path / "mask/a_0.png")
    save(grey(BOB), tmp_path / "mask/a_1.png")
    source = source_of(tmp_path, {"image": "image/{id}.*", "background": "plate/{id}.*", "masks": "mask/{id}_*.*"})
    samples, rejected = samples_of(source)
    assert [row.outcome for row in rejected] == ["mended"]
    assert [np.array_equal(p.mask, m) for p, m in zip(samples[0].people, [ANN, BOB], strict=True)] == [True, True]


def test_files_without_their_others_are_named(tmp_path: Path) -> None:
    layout = write_corne(tmp_path)
    for name in ("twice", "bare", "blind", "unshaded"):
        save(shot(len(name)), tmp_path / f"shot/{name}.png")
        save(plate(len(name)), tmp_path / f"bg/{name}.png")
        save(grey(ANN), tmp_path / f"mask_sam/{name}.png")
    save(shot(1), tmp_path / "shot/twice.jpg")
    (tmp_path / "bg/bare.png").unlink()
    (tmp_path / "mask_sam/blind.png").unlink()
    curation = source_of(tmp_path, layout).curate()
    assert {row.image_id: row.reason for row in curation.rejected} == {
        "twice": "ambiguous-pair",
        "bare": "no-plate",
        "blind": "no-mask",
    }
    assert [record.id for record in curation.records] == ["0", "1", "unshaded"]


def test_pictures_that_cannot_be_read_by_their_name_are_named(tmp_path: Path) -> None:
    layout = write_corne(tmp_path)
    (tmp_path / "shot/2.heic").write_bytes(b"a picture of another kind")
    odd = b"\xff.png".decode("utf-8", "surrogateescape")
    save(shot(3), tmp_path / "shot" / odd)
    curation = source_of(tmp_path, layout).curate()
    assert {row.image_id: row.reason for row in curation.rejected} == {
        "shot/2.heic": "unknown-suffix",
        "shot/\\udcff.png": "name-not-unicode",
    }
    assert [record.id for record in curation.records] == ["0", "1"]


def test_a_pair_with_a_mask_whose_name_is_no_text_is_set_aside(tmp_path: Path) -> None:
    layout = write_corne(tmp_path) | {"masks": "mask_sam/{id}*"}
    save(grey(ANN), tmp_path / "mask_sam" / b"0_\xfc.png".decode("utf-8", "surrogateescape"))
    curation = source_of(tmp_path, layout).curate()
    assert {row.reason for row in curation.rejected} == {"name-not-unicode"}
    assert [record.id for record in curation.records] == ["1"]


def names_of(layout: dict[str, str], names: list[str]) -> dict[str, tuple[str, list[str]]]:
    rows = [row for _, _, row in rows_of_files(LayoutSettings.check(layout, origin="test"), sorted(names))]
    assert all(isinstance(row, PairRow) for row in rows)
    return {row.image: (row.background, row.masks) for row in rows if isinstance(row, PairRow)}


def test_patterns_find_the_files_of_each_picture_and_of_no_other() -> None:
    """Ids that begin alike, subfolders, several masks, stars in folders, characters that mean something elsewhere."""
    layout = {"image": "shot/{id}.*", "background": "bg*/{id}.*", "masks": "mask*/{id}_*.png"}
    names = []
    for name in ("1", "12", "a/1", "b[1]", "c.d"):
        names += [f"shot/{name}.jpg", f"bg_new/{name}.png", f"mask_sam/{name}_0.png", f"mask_sam/{name}_1.png"]
    found = names_of(layout, [*names, "mask_sam/1.txt", "other/1.png"])
    assert found == {
        f"shot/{name}.jpg": (f"bg_new/{name}.png", [f"mask_sam/{name}_0.png", f"mask_sam/{name}_1.png"])
        for name in ("1", "12", "a/1", "b[1]", "c.d")
    }


def test_brackets_of_folders_stand_for_themselves() -> None:
    found = names_of(
        {"image": "set[1]/shot/{id}.png", "background": "set[1]/bg*/{id}.png"},
        ["set[1]/shot/a.png", "set[1]/bg_new/a.png", "set1/bg_new/a.png"],
    )
    assert found == {"set[1]/shot/a.png": ("set[1]/bg_new/a.png", [])}


def test_ids_of_any_names_are_keys_and_differ(tmp_path: Path) -> None:
    names = ["1", "a/1", "a-1", "Ää", "x" * 120]
    for number, name in enumerate(names):
        save(shot(number), tmp_path / f"shot/{name}.png")
        save(plate(number), tmp_path / f"bg/{name}.png")
        save(grey(ANN), tmp_path / f"mask/{name}.png")
    layout = {"image": "shot/{id}.*", "background": "bg/{id}.*", "masks": "mask/{id}.*"}
    samples, rejected = samples_of(source_of(tmp_path, layout))
    assert rejected == [] and len({sample.key for sample in samples}) == len(names)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"image": "shot/*.png"}, "is to have {id}"),
        ({"image": "shot/{id}.*", "background": "bg/{name}.*"}, "no other names"),
        ({"image": "shot/{id}.*", "background": "bg/one.png"}, "is to have {id}"),
        ({"image": "shot/{id}.*", "group": "scene"}, "columns of a table"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_a_users_error(layout: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        source_of("/nowhere", layout)


def test_a_published_set_needs_a_licence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name the licence of the set"):
        source_of(tmp_path, write_rorem(tmp_path), licence="")


def test_a_layout_that_fits_nothing_is_a_users_error(tmp_path: Path) -> None:
    write_corne(tmp_path)
    with pytest.raises(UserError, match=r"no picture matches images/\{id\}"):
        source_of(tmp_path, {"image": "images/{id}.*"}).curate()
    with pytest.raises(UserError, match=r"no file matches data/"):
        source_of(tmp_path, {"table": "data/*.parquet", "image": "input"}).curate()


def test_rows_of_a_table_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    broken = [{"bytes": png(plate(k)), "path": None} for k in range(5)]
    broken[1] = {"bytes": None, "path": "gone.png"}
    broken[2] = {"bytes": b"no picture", "path": None}
    layout = write_ober(tmp_path, 5, gt=broken, split=["train", "train", "test", "holdout", None])
    samples, rejected = samples_of(source_of(tmp_path, layout))
    assert [sample.origins[0].title[-6:] for sample in samples] == ["000001", "000005"]
    file = "data/train-00000-of-00001.parquet"
    found = {(row.message.split(":")[0], row.reason) for row in rejected}
    assert found == {
        (f"row 2 of {file}", "no-picture"),
        (f"row 3 of {file}", "not-an-image"),
        (f"row 4 of {file}", "bad-split"),
    }


def test_a_table_is_read_by_row_group_and_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = write_ober(tmp_path, 7)
    read = []
    group = pq.ParquetFile.read_row_group

    def spy(self: pq.ParquetFile, number: int, columns: list[str], **options: Any) -> pa.Table:
        read.append((number, *columns))
        return group(self, number, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    curation = source_of(tmp_path, layout).curate()
    assert len(curation.records) == 7
    assert len(read) == len(set(read)) == 4 * 5  # four pictures' columns and that of the splits


def test_columns_may_name_pairs_and_scenes_and_leave_some_unnamed(tmp_path: Path) -> None:
    layout = write_ober(
        tmp_path, 4, split=["test", None, None, None], name=["a", "b", None, "a"], scene=[7, 7, 8, None]
    )
    source = source_of(tmp_path, layout | {"id": "name", "group": "scene"}, splits={"train": 1.0})
    curation = source.curate()
    assert [(record.title, record.split) for record in curation.records] == [
        ("a", "test"),
        ("b", "test"),
        ("data/train-00000-of-00001-000003", "train"),
    ]
    assert [row.reason for row in curation.rejected] == ["repeated-id"]


@pytest.mark.parametrize("what", ["column", "broken", "large"])
def test_a_table_that_cannot_be_read_is_a_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    layout = write_ober(tmp_path)
    message = {"column": "no column 'truth'", "broken": "no Parquet file", "large": "row_group_size"}[what]
    if what == "column":
        layout["background"] = "truth"
    elif what == "broken":
        (tmp_path / "data/train-00000-of-00001.parquet").write_bytes(b"PAR1")
    else:
        monkeypatch.setattr(picture_tables, "LARGEST_COLUMN", 100)
    with pytest.raises(UserError, match=message):
        source_of(tmp_path, layout).curate()


def test_a_table_with_text_that_is_none_is_a_users_error(tmp_path: Path) -> None:
    no_text = pa.array([b"\xe0"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"id": no_text}), tmp_path / "a.parquet")
    table = picture_tables.PictureTable(str(tmp_path / "a.parquet"), FetchSettings(), {})
    with pytest.raises(UserError, match=r"a\.parquet holds text that is not UTF-8"):
        list(table.values(["id"]))


@pytest.mark.parametrize("write", [write_corne, write_ober])
def test_a_store_gives_what_a_disk_gives(tmp_path: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    layout = write(tmp_path)
    store = f"memory://{tmp_path.name}-{write.__name__}"
    filesystem, path = fsspec.url_to_fs(store)
    filesystem.put(f"{tmp_path}/", f"{path}/", recursive=True)
    local, _ = samples_of(source_of(tmp_path, layout))
    remote, rejected = samples_of(source_of(store, layout))
    assert rejected == [] and len(local) == len(remote) == 2
    for one, other in zip(local, remote, strict=True):
        assert one.key == other.key and np.array_equal(one.image, other.image)
        assert np.array_equal(one.people[0].mask, other.people[0].mask)
    assert source_of(store, layout).fingerprint() == source_of(store, layout).fingerprint()
