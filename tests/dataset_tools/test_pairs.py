"""Pairs as a list: plates, masks, effects and splits; every row that cannot be used is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset_tools.curated import CuratedSettings, Estimators, curated_samples
from dataset_tools.errors import Rejected, UserError
from dataset_tools.estimators import PlateProvider
from dataset_tools.images import DecodeSettings, decode_image
from dataset_tools.pair_list import PairRow, pair_list
from dataset_tools.records import Curation, Rejection, record_from_row, records_to_table
from dataset_tools.schema import KEY_PATTERN, MadeBy, Sample
from dataset_tools.sources import Source
from dataset_tools.sources.pairs import PairsSettings, PairsSource

HEIGHT, WIDTH = 60, 90
ANN, BOB, SHADOW = np.zeros((3, HEIGHT, WIDTH), bool)
ANN[10:50, 10:30] = True
BOB[20:55, 50:80] = True
SHADOW[50:58, 10:45] = True


def photo(seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def save(array: np.ndarray, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def grey(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8) * 255


def write_pair(root: Path, name: str, seed: int, **changes: Any) -> PairRow:
    """A pair with two people; `changes` are of its row."""
    save(photo(seed), root / f"image/{name}.png")
    save(photo(1000 + seed), root / f"plate/{name}.png")
    save(grey(ANN), root / f"mask/{name}_0.png")
    save(grey(BOB), root / f"mask/{name}_1.png")
    values: dict[str, Any] = {
        "id": name,
        "group": name,
        "image": f"image/{name}.png",
        "background": f"plate/{name}.png",
        "masks": [f"mask/{name}_0.png", f"mask/{name}_1.png"],
        "licence": "CC BY 4.0",
    }
    return PairRow.model_validate(values | changes)


def source_of(root: Path, rows: list[PairRow] | None = None, **changes: object) -> PairsSource:
    if rows is not None:
        (root / "pairs.jsonl").write_bytes(pair_list(rows))
    return PairsSettings.check({"root": str(root), **changes}, origin="test").open()


def samples_of(source: PairsSource, curation: Curation, rejected: list[Rejection], **settings: Any) -> list[Sample]:
    curated = CuratedSettings(configuration="paired", decode=DecodeSettings(min_side=16, **settings), fetch_workers=2)
    # As they come back from the table of curation.
    records = [record_from_row(row) for row in records_to_table(curation.records).to_pylist()]
    return list(curated_samples(records, source, curated, Estimators(plate=source), rejected))


def test_a_row_becomes_a_paired_sample_with_all_that_it_says(tmp_path: Path) -> None:
    known = np.ones((HEIGHT, WIDTH), bool)
    known[:, :5] = False
    save(grey(known), tmp_path / "known.png")
    bits = SHADOW.astype(np.uint8) * 2
    bits[0, 0] = 1
    save(bits, tmp_path / "effects.png")
    by = MadeBy("chosen", network="org/remover")
    more = {"known": "known.png", "effects": "effects.png", "plate_by": by, "caption": "two people", "author": "Cy"}
    more |= {"masks_by": "video", "mask_scores": [0.75, 0.5]}
    source = source_of(tmp_path, [write_pair(tmp_path, "a-1", 1, **more)])
    assert isinstance(source, Source) and isinstance(source, PlateProvider)
    source.check()
    curation = source.curate()
    rejected = curation.rejected
    (sample,) = samples_of(source, curation, rejected)
    assert rejected == []
    sample.check()
    assert KEY_PATTERN.fullmatch(sample.key) and sample.key == "pairs-a-1"
    assert np.array_equal(sample.image, photo(1)) and np.array_equal(sample.background, photo(1001))
    assert np.array_equal(sample.known, known) and np.array_equal(sample.effects, bits)
    assert [np.array_equal(p.mask, m) for p, m in zip(sample.people, (ANN, BOB), strict=True)] == [True, True]
    assert [(p.mask_by, p.mask_score) for p in sample.people] == [("video", 0.75), ("video", 0.5)]
    assert (sample.made_by.plate, sample.made_by.effects.name) == (by, "annotated")
    assert (sample.caption, sample.origins[0].licence, sample.origins[0].author) == ("two people", "CC BY 4.0", "Cy")


@pytest.mark.parametrize("palette", [[0, 0, 0, 220, 20, 60, 0, 128, 0], [2, 2, 2, 1, 1, 1, 0, 0, 0]])
def test_bits_of_effects_are_indices_where_a_palette_has_colours_to_look_at_and_else_its_grey_levels(
    tmp_path: Path, palette: list[int]
) -> None:
    """As quantisers order them."""
    bits = SHADOW.astype(np.uint8) * 2
    picture = Image.fromarray(bits if palette[3] > 2 else 2 - bits)
    picture.putpalette(palette)
    picture.save(tmp_path / "effects.png")
    source = source_of(tmp_path, [write_pair(tmp_path, "a", 1, effects="effects.png")])
    (sample,) = samples_of(source, source.curate(), [])
    assert np.array_equal(sample.effects, bits)


def test_what_is_known_of_a_plate_may_be_said_in_16_bits(tmp_path: Path) -> None:
    known = np.ones((HEIGHT, WIDTH), bool)
    known[:, :5] = False
    save(np.where(known, 40_000, 13_107).astype(np.uint16), tmp_path / "known.png")
    source = source_of(tmp_path, [write_pair(tmp_path, "a", 1, known="known.png")])
    (sample,) = samples_of(source, source.curate(), [])
    assert np.array_equal(sample.known, known)


NUMBERS = np.ones((HEIGHT, WIDTH), np.float32)
TRANSPARENT = np.dstack([np.zeros((HEIGHT, WIDTH, 3), np.uint8), grey(ANN)])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *(("known", values) for values in (NUMBERS, TRANSPARENT)),
        *(("effects", values) for values in (NUMBERS, TRANSPARENT, photo(3), np.full((HEIGHT, WIDTH), 3, np.uint16))),
    ],
)
def test_a_map_that_may_be_misread_is_refused(tmp_path: Path, name: str, values: np.ndarray) -> None:
    save(values, tmp_path / "map.tif")
    source = source_of(tmp_path, [write_pair(tmp_path, "a", 1, **{name: "map.tif"})])
    curation = source.curate()
    assert curation.records == [] and [row.reason for row in curation.rejected] == ["not-a-map"]
    assert "map.tif: it " in curation.rejected[0].message


def test_a_row_without_maps_knows_the_whole_plate_and_no_effects(tmp_path: Path) -> None:
    source = source_of(tmp_path, [write_pair(tmp_path, "a", 1)], licence="CC0", author="Di")
    (sample,) = samples_of(source, source.curate(), [])
    assert sample.known is not None and sample.known.all() and sample.made_by.plate.name == "annotated"
    assert (sample.origins[0].licence, sample.origins[0].author) == ("CC BY 4.0", "Di")


def test_of_a_plate_painted_into_the_picture_effects_stay_unknown(tmp_path: Path) -> None:
    """Both show the same shadow, so that their difference has none; that of a photographed plate says so."""
    for told in (True, False):
        row = write_pair(tmp_path, "a", 1, tells_effects=told)
        people = (ANN | BOB)[..., None]
        save(np.where(people, photo(1001), photo(1)), tmp_path / "plate/a.png")
        source = source_of(tmp_path, [row])
        rejected: list[Rejection] = []
        (sample,) = samples_of(source, source.curate(), rejected)
        assert rejected == [] and sample.made_by.effects.name == ("difference" if told else "none")
        assert sample.effects is None or (told and not sample.effects.any())
        sample.check()


def test_ids_as_long_as_keys_become_keys_that_differ(tmp_path: Path) -> None:
    ids = ["a" * 74, "a" * 75, "a" * 79 + "b", "a" * 79 + "c", "a" * 81]
    source = source_of(tmp_path, [write_pair(tmp_path, name, k) for k, name in enumerate(ids)])
    curation = source.curate()
    assert [(row.reason, "1 to 80 letters" in row.message) for row in curation.rejected] == [("bad-id", True)]
    keys = [sample.key for sample in samples_of(source, curation, [])]
    assert keys[0] == f"pairs-{ids[0]}" and len(set(keys)) == 4
    assert all(KEY_PATTERN.fullmatch(key) and key.startswith("pairs-aaa") for key in keys)


def test_where_the_light_differs_effects_stay_unknown_with_a_row_that_says_why(tmp_path: Path) -> None:
    row = write_pair(tmp_path, "a", 1)
    dark = np.full((HEIGHT, WIDTH, 3), 80, np.uint8)
    save(dark, tmp_path / "image/a.png")
    save(dark * 2, tmp_path / "plate/a.png")
    source, rejected = source_of(tmp_path, [row]), list[Rejection]()
    (sample,) = samples_of(source, source.curate(), rejected)
    assert sample.effects is None and sample.made_by.effects == MadeBy()
    assert [(r.stage, r.outcome, r.reason) for r in rejected] == [("effects", "mended", "exposure-differs")]


def test_a_turned_photograph_and_its_shrunk_plate_and_maps_agree(tmp_path: Path) -> None:
    """The camera's file is turned, plate and masks are upright; all is shrunk to half."""
    row = write_pair(tmp_path, "a", 1, known="known.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    save(np.rot90(photo(1)), tmp_path / "image/a.png", exif=exif)
    known = np.ones((HEIGHT, WIDTH), bool)
    known[3, 7] = False
    save(grey(known), tmp_path / "known.png")
    source = source_of(tmp_path, [row])
    (sample,) = samples_of(source, source.curate(), [], max_side=WIDTH // 2)
    halved = [array.reshape(HEIGHT // 2, 2, WIDTH // 2, 2, -1) for array in (photo(1), photo(1001), known)]
    image, plate = (array.astype(float).mean((1, 3)) for array in halved[:2])
    assert np.abs(sample.image - image).max() <= 1 and np.abs(sample.background - plate).max() <= 1
    assert np.array_equal(sample.known, halved[2].all((1, 3))[..., 0])
    assert np.array_equal(sample.people[0].mask, ANN[::2, ::2])


def test_one_mask_file_of_two_people_is_both_of_them(tmp_path: Path) -> None:
    """By their values, dark as one of them may be, as of a layout."""
    save(100 * ANN.astype(np.uint8) + 200 * BOB.astype(np.uint8), tmp_path / "both.png")
    source = source_of(tmp_path, [write_pair(tmp_path, "a", 1, masks=["both.png"], mask_scores=[0.5])])
    (sample,) = samples_of(source, source.curate(), [])
    assert [np.array_equal(p.mask, m) for p, m in zip(sample.people, (ANN, BOB), strict=True)] == [True, True]
    assert [person.mask_score for person in sample.people] == [0.5, 0.5]


def reasons(curation: Curation) -> dict[str, tuple[str, str]]:
    return {row.image_id: (row.outcome, row.reason) for row in curation.rejected}


def test_each_row_that_cannot_be_used_is_named_and_the_others_are_used(tmp_path: Path) -> None:
    def pair(name: str, **changes: Any) -> PairRow:
        return write_pair(tmp_path, name, sum(map(ord, name)), **changes)

    save(photo(5, (HEIGHT, WIDTH + 20)), tmp_path / "wide.png")
    save(grey(np.pad(ANN, ((0, 0), (0, 20)))), tmp_path / "wide-mask.png")
    save(photo(6, (HEIGHT // 2, WIDTH // 2)), tmp_path / "small.png")
    save(np.zeros((HEIGHT, WIDTH), np.uint8), tmp_path / "nobody.png")
    save(photo(sum(map(ord, "good"))), tmp_path / "same.png")
    (tmp_path / "text.png").write_text("no picture")
    rows = [
        pair("good"),
        pair("good"),
        pair("a b"),
        pair("../up"[3:], id="../up"),
        pair("outside", background="../plate.png"),
        pair("hidden", background=".plates/a.png"),
        pair("url", image="https://example.org/a.png"),
        pair("scores", mask_scores=[1.0]),
        pair("gone", background="plate/gone-too.png"),
        pair("wide", background="wide.png"),
        pair("small", background="small.png"),
        pair("empty", masks=["nobody.png"]),
        pair("wide-mask", masks=["wide-mask.png"]),
        pair("picture", masks=["wide.png"]),
        pair("text", image="text.png"),
        pair("same", image="same.png"),
    ]
    source = source_of(tmp_path, rows)
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write('\n{"id": "cut\n' + json.dumps({"id": "x", "group": "x", "image": "a.png"}) + "\n")
    curation = source.curate()
    assert [record.id for record in curation.records] == ["good"]
    assert reasons(curation) == {
        "good": ("row-rejected", "repeated-id"),
        "a b": ("row-rejected", "bad-id"),
        "../up": ("row-rejected", "bad-id"),
        "outside": ("row-rejected", "bad-path"),
        "hidden": ("row-rejected", "bad-path"),
        "url": ("row-rejected", "bad-path"),
        "scores": ("row-rejected", "malformed-row"),
        "gone": ("image-rejected", "not-found"),
        "wide": ("image-rejected", "other-size"),
        "small": ("image-rejected", "other-size"),
        "empty": ("image-rejected", "empty-mask"),
        "wide-mask": ("image-rejected", "other-size"),
        "picture": ("image-rejected", "not-a-mask"),
        "text": ("image-rejected", "not-an-image"),
        "same": ("image-rejected", "duplicate-image"),
        "": ("row-rejected", "malformed-row"),
    }
    messages = [row.message for row in curation.rejected]
    starts = {message.split(":")[0] for message in messages}
    # The seventeenth line is empty.
    assert starts == {f"line {number} of pairs.jsonl" for number in [*range(2, 17), 18, 19]}
    assert any(message.endswith("background: Field required") for message in messages)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ({"title": "\ud800"}, "row: "),
        ({"image": "\ud800.png"}, "row: "),
        ({"masks": ["a.png"], "mask_scores": [float("nan")]}, "mask_scores.0: "),
        ({"masks": ["a.png"], "mask_scores": [1.5]}, "mask_scores.0: "),
        (b"[" * 100_000, "row: "),
        (b"\xff", "row: "),
    ],
    ids=["title", "name", "nan", "score", "deep", "bytes"],
)
def test_a_line_that_no_row_can_be_is_named_and_the_others_are_used(
    tmp_path: Path, line: dict[str, Any] | bytes, field: str
) -> None:
    """Half of a surrogate pair is JSON and no text: no table could hold it."""
    source = source_of(tmp_path, [write_pair(tmp_path, "good", 1)])
    if isinstance(line, dict):
        line = json.dumps({"id": "b", "group": "b", "image": "a.png", "background": "b.png"} | line).encode()
    with (tmp_path / "pairs.jsonl").open("ab") as file:
        file.write(line)
    curation = source.curate()
    assert [record.id for record in curation.records] == ["good"]
    assert [row.reason for row in curation.rejected] == ["malformed-row"]
    assert curation.rejected[0].message.startswith(f"line 2 of pairs.jsonl: {field}")


def test_a_plate_of_nearly_the_same_size_is_resized_and_noted(tmp_path: Path) -> None:
    row = write_pair(tmp_path, "a", 1)
    save(np.full((HEIGHT + 2, WIDTH + 3, 3), 77, np.uint8), tmp_path / "plate/a.png")
    source = source_of(tmp_path, [row])
    curation = source.curate()
    assert reasons(curation) == {"a": ("mended", "plate-resized")}
    (sample,) = samples_of(source, curation, [])
    assert sample.background is not None and (sample.background == 77).all()


def test_pictures_of_one_scene_come_into_one_split(tmp_path: Path) -> None:
    """Of one group, of one plate, of equal plates, of a picture that is another's plate, and of what these join; others
    are spread."""
    rows = [write_pair(tmp_path, f"p{k}", k) for k in range(30)]
    shared = [rows[0], rows[1].model_copy(update={"group": "p0"})]
    shared.append(rows[2].model_copy(update={"background": rows[1].background}))
    save(photo(1002), tmp_path / "plate/p3.png")  # another file of the bytes of p2's own plate
    shared += [rows[3], rows[4].model_copy(update={"background": "plate/p2.png", "group": "p2"})]
    shared.append(rows[5].model_copy(update={"background": rows[4].image}))
    source = source_of(tmp_path, [*shared, *rows[6:]], splits={"train": 0.5, "test": 0.5})
    curation = source.curate()
    assert curation.rejected == []
    splits = {record.id: record.split for record in curation.records}
    assert len({splits[f"p{k}"] for k in range(6)}) == 1
    assert 6 <= sum(split == "test" for split in splits.values()) <= 24


def test_a_plate_that_is_its_picture_is_set_aside(tmp_path: Path) -> None:
    rows = [write_pair(tmp_path, name, seed) for seed, name in enumerate("ab")]
    rows[0] = rows[0].model_copy(update={"background": rows[0].image})
    curation = source_of(tmp_path, rows).curate()
    assert [record.id for record in curation.records] == ["b"]
    assert reasons(curation) == {"a": ("image-rejected", "plate-is-picture")}


def test_a_row_may_name_its_split_and_nothing_held_out_leaks(tmp_path: Path) -> None:
    rows = [write_pair(tmp_path, f"p{k}", k, split=split) for k, split in enumerate(["train", "test", "train", None])]
    rows[2] = rows[2].model_copy(update={"background": rows[1].background})
    rows[3] = rows[3].model_copy(update={"group": "p0"})
    curation = source_of(tmp_path, rows, splits={"validation": 1.0}).curate()
    assert {record.id: record.split for record in curation.records} == {"p0": "train", "p1": "test", "p3": "train"}
    assert reasons(curation) == {"p2": ("image-rejected", "scene-in-two-splits")}


def test_a_file_that_changes_under_its_name_changes_record_and_fingerprint(tmp_path: Path) -> None:
    row = write_pair(tmp_path, "a", 1)
    before = source_of(tmp_path, [row])
    fingerprint, record = before.fingerprint(), before.curate().records[0]
    save(photo(2), tmp_path / "plate/a.png", compress_level=0)
    after = source_of(tmp_path)
    assert after.fingerprint() != fingerprint
    assert after.curate().records[0].digest != record.digest


def test_a_larger_limit_reads_what_was_too_large(tmp_path: Path) -> None:
    rows = [write_pair(tmp_path, "a", 1)]
    small, large = (source_of(tmp_path, rows, fetch={"max_bytes": size}) for size in (5_000, 50_000))
    assert [row.reason for row in small.curate().rejected] == ["too-large"]
    assert [record.id for record in large.curate().records] == ["a"]
    assert small.fingerprint() != large.fingerprint()


def test_a_folder_without_a_list_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no pairs\.jsonl"):
        source_of(tmp_path).check()
    with pytest.raises(UserError, match="does not exist"):
        source_of(tmp_path / "nowhere").check()


def test_a_picture_without_a_plate_is_set_aside_by_name(tmp_path: Path) -> None:
    source = source_of(tmp_path, [write_pair(tmp_path, "a", 1)])
    record = source.curate().records[0]
    image = decode_image(source.read_image(record), DecodeSettings(min_side=1)).image
    with pytest.raises(Rejected, match="no-plate"):
        source.clean_plate(image, replace(record, plate=""))
