"""Which images curation chooses, and which rows it cannot use: against a second implementation in plain Python."""

from __future__ import annotations

import csv
import hashlib
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dataset_tools import tables as tables_module
from dataset_tools.curation import CurationSettings, SplitTables, curate
from dataset_tools.errors import UserError
from dataset_tools.records import Curation, ImageRecord, Split
from dataset_tools.tables import Table

MIDS = {
    "Person": "/m/01g317",
    "Man": "/m/04yx4",
    "Woman": "/m/03bt1vf",
    "Boy": "/m/01bl7v",
    "Girl": "/m/05r655",
    "Human face": "/m/0dzct",
    "Dog": "/m/0bt9lr",
}
PEOPLE = ("Person", "Man", "Woman", "Boy", "Girl")
BY_2 = "https://creativecommons.org/licenses/by/2.0/"
BY_NC = "https://creativecommons.org/licenses/by-nc/2.0/"
COLUMNS = {
    "boxes": "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside",
    "masks": "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks",
    "labels": "ImageID,Source,LabelName,Confidence",
    "metadata": "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,"
    "OriginalMD5,Thumbnail300KURL,Rotation",
}
ANY_SIZE = CurationSettings(min_box_area=0, max_box_area=1)
Coordinates = tuple[float, float, float, float]
LEFT, RIGHT = (0.1, 0.1, 0.3, 0.9), (0.6, 0.1, 0.8, 0.9)


@dataclass(frozen=True)
class Somebody:
    """One box of an image, with a mask where ``mask`` is a BoxID."""

    name: str = "Person"
    box: Coordinates = LEFT
    mask: str | None = None
    iou: float | None = None
    occluded: int = 0
    truncated: int = 0
    group_of: int = 0
    depiction: int = 0


@dataclass(frozen=True)
class Picture:
    """One image and its rows in all tables."""

    id: str
    people: tuple[Somebody, ...] = ()
    labels: tuple[tuple[str, int], ...] = ()
    licence: str = BY_2
    md5: str = ""
    rotation: str = ""
    listed: bool = True


@dataclass
class Rows:
    """The tables of one split, as lists of rows of text."""

    boxes: list[list[str]] = field(default_factory=list)
    masks: list[list[str]] = field(default_factory=list)
    labels: list[list[str]] = field(default_factory=list)
    metadata: list[list[str]] = field(default_factory=list)

    @classmethod
    def of(cls, pictures: Sequence[Picture]) -> Rows:
        rows = cls()
        for p in pictures:
            for s in p.people:
                x0, y0, x1, y1 = map(str, s.box)
                flags = [str(v) for v in (s.occluded, s.truncated, s.group_of, s.depiction, 0)]
                rows.boxes.append([p.id, "xclick", MIDS[s.name], "1", x0, x1, y0, y1, *flags])
                if s.mask is not None:
                    member = f"{p.id}_{MIDS[s.name].replace('/', '')}_{s.mask}.png"
                    iou = "" if s.iou is None else str(s.iou)
                    rows.masks.append([member, p.id, MIDS[s.name], s.mask, x0, x1, y0, y1, iou, "0.1 0.2 0"])
            rows.labels += [[p.id, "verification", MIDS[name], str(value)] for name, value in p.labels]
            if p.listed:
                link, page = f"https://example.org/{p.id}.jpg", f"https://example.org/{p.id}"
                author = ["https://example.org/people/ann", "Ann, the author", 'A "quoted", title']
                rows.metadata.append([p.id, "train", link, page, p.licence, *author, "1", p.md5, "", p.rotation])
        return rows


def image(number: int) -> str:
    return f"{number:016x}"


def write(folder: Path, splits: dict[Split, Rows]) -> tuple[Table, dict[Split, SplitTables]]:
    """Write CSV files as OpenImages has them."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = folder / "classes.csv"
    classes.write_text("".join(f"{mid},{name}\n" for name, mid in MIDS.items()))
    tables: dict[Split, SplitTables] = {}
    for split, rows in splits.items():
        paths = {}
        for kind, header in COLUMNS.items():
            text = io.StringIO()
            text.write(header + "\n")
            csv.writer(text, lineterminator="\n").writerows(getattr(rows, kind))
            path = folder / f"{split}-{kind}.csv"
            path.write_text(text.getvalue(), encoding="utf-8")
            paths[kind] = Table(str(path), path.name)
        tables[split] = SplitTables(**paths)
    return Table(str(classes), classes.name), tables


def run(
    folder: Path, splits: Mapping[Split, Sequence[Picture] | Rows], wanted: CurationSettings, threads: int = 1
) -> Curation:
    """With one thread: the tables are small, and more would look for something to do."""
    rows = {split: value if isinstance(value, Rows) else Rows.of(value) for split, value in splits.items()}
    return curate(*write(folder, rows), wanted, lambda split, name: f"{split}/{name}.jpg", threads=threads)


def chosen(curation: Curation) -> list[tuple[str, str]]:
    return [(record.id, record.stratum or record.role) for record in curation.records]


# --- The second implementation ---------------------------------------------------------------------------------


def overlap(a: Coordinates, b: Coordinates) -> float:
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / (area(a) + area(b) - shared)


def area(box: Coordinates) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def touching(a: Coordinates, b: Coordinates) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def people_of(picture: Picture, wanted: CurationSettings) -> tuple[list[Somebody], list[Somebody]] | None:
    """People with a mask, and those without; None where something rules the picture out."""
    boxes = {s for s in picture.people if s.name in wanted.people_classes}
    if not any(s.mask for s in boxes):
        return None
    if any(s.group_of == 1 for s in boxes) or any(s.depiction == 1 for s in boxes):
        return None

    def trust(s: Somebody) -> tuple[Any, ...]:
        unrated = (s.iou is None, -(s.iou or 0))
        return (s.mask is None, *unrated, s.name == "Person", s.mask or "", MIDS[s.name], *s.box)

    usable = [s for s in boxes if s.mask and (s.iou is None or s.iou >= wanted.min_predicted_iou)]
    everyone = sorted([*usable, *(replace(s, mask=None, iou=None) for s in boxes)], key=trust)
    kept: list[Somebody] = []
    for place, s in enumerate(everyone):
        if any(overlap(s.box, better.box) >= wanted.same_person_iou for better in everyone[:place]):
            continue
        merged = [o for o in everyone if o.mask is None and overlap(s.box, o.box) >= wanted.same_person_iou]
        flags = {flag: max([0, *(getattr(o, flag) for o in merged)]) for flag in ("occluded", "truncated")}
        kept.append(replace(s, **flags))
    return [s for s in kept if s.mask], [s for s in kept if not s.mask]


def reference(splits: Mapping[Split, Sequence[Picture]], wanted: CurationSettings) -> list[tuple[Any, ...]]:
    """(split, id, role, stratum, (BoxID or number, occluded, truncated) of each person) of the chosen images."""
    candidates: list[tuple[Split, str, str, Picture, list[Somebody]]] = []
    for split, pictures in splits.items():
        for p in pictures:
            if not p.listed or not p.licence.startswith(wanted.licences):
                continue
            found = people_of(p, wanted)
            if found is not None:
                masked, unmasked = found
                if masked and wanted.min_people <= len(masked) <= (wanted.max_people or 10**9):
                    fits = all(wanted.min_box_area <= area(s.box) <= wanted.max_box_area for s in masked)
                    fits &= wanted.allow_occluded or not any(s.occluded for s in masked)
                    fits &= wanted.allow_truncated or not any(s.truncated for s in masked)
                    pairs = [(a, b) for i, a in enumerate(masked) for b in masked[:i]]
                    stratum = "one" if len(masked) == 1 else "two_or_three" if len(masked) < 4 else "four_or_more"
                    if any(touching(a.box, b.box) for a, b in pairs):
                        stratum = "overlapping"
                    if fits and len(unmasked) <= wanted.max_unmasked_people:
                        candidates.append((split, "people", stratum, p, [*masked, *unmasked]))
            hints = {s.name for s in p.people} | {name for name, value in p.labels if value}
            if ("Person", 0) in p.labels and not any(name in PEOPLE or name == "Human face" for name in hints):
                candidates.append((split, "background", "", p, []))
    kept: dict[str, Any] = {}
    ranks: list[Split] = ["test", "validation", "train"]
    for c in sorted(candidates, key=lambda c: (ranks.index(c[0]), c[1] != "people", c[3].id)):
        kept.setdefault(c[3].md5 or c[3].id, c)

    def place(c: tuple[Any, ...]) -> str:
        return hashlib.md5(f"{wanted.seed}{c[3].id}".encode()).hexdigest()

    result: list[tuple[Any, ...]] = []
    counts: dict[tuple[str, str, str], int] = {}
    for split in reversed(ranks):
        for role, most in [("people", wanted.images_per_stratum), ("background", wanted.backgrounds)]:
            for c in sorted((c for c in kept.values() if c[:2] == (split, role)), key=place):
                counts[c[:3]] = counts.get(c[:3], 0) + 1
                if most is None or counts[c[:3]] <= most:
                    people = sorted(c[4], key=lambda s: (s.mask is None, s.mask or "", s.box, MIDS[s.name]))
                    named = enumerate(people, start=1)
                    told = [(s.mask or f"box-{k}", s.occluded > 0, s.truncated > 0) for k, s in named]
                    result.append((split, c[3].id, role, c[2], told))
    return result


sides = [(a, b) for a in (0.0, 0.25, 0.5, 0.75) for b in (0.25, 0.5, 0.75, 1.0) if a < b]
boxes = st.sampled_from([(x0, y0, x1, y1) for x0, x1 in sides for y0, y1 in sides])
flag = st.sampled_from([0, 0, 0, 1, -1])
rare = st.sampled_from([0] * 12 + [1, -1])
somebody = st.builds(
    Somebody,
    name=st.sampled_from([*PEOPLE, *PEOPLE, "Dog", "Human face"]),
    box=boxes,
    mask=st.none() | st.uuids().map(lambda u: u.hex[:8]),
    iou=st.sampled_from([None, 0.4, 0.6, 0.8]),
    occluded=flag,
    truncated=flag,
    group_of=rare,
    depiction=rare,
)
labels = st.lists(
    st.tuples(st.sampled_from(["Person", "Person", "Woman", "Human face", "Dog"]), st.sampled_from([0, 0, 1])),
    max_size=3,
    unique=True,
)


# Rows that repeat one another have tests of their own.
crowds = st.lists(somebody, max_size=5, unique_by=(lambda s: (s.name, s.box), lambda s: s.mask or id(s)))
pictures = st.builds(
    Picture,
    id=st.integers(0, 2**64 - 1).map(image),
    people=crowds.map(tuple),
    labels=labels.map(tuple),
    licence=st.sampled_from([BY_2, BY_2, BY_2, BY_NC]),
    md5=st.sampled_from(["", "", "", "a", "b"]),
    rotation=st.sampled_from(["", "0", "90.0", "nan"]),
    listed=st.sampled_from([True, True, True, True, False]),
)
mirrors = st.lists(pictures, min_size=8, max_size=40, unique_by=lambda p: p.id).map(
    lambda drawn: {"train": drawn[: len(drawn) // 2], "test": drawn[len(drawn) // 2 :]}
)
wishes = st.builds(
    CurationSettings,
    people_classes=st.sampled_from([PEOPLE, PEOPLE, ("Person", "Woman")]),
    min_people=st.sampled_from([1, 1, 2]),
    max_people=st.sampled_from([None, 3]),
    min_box_area=st.sampled_from([0.0, 0.1]),
    max_box_area=st.sampled_from([1.0, 0.8]),
    allow_occluded=st.booleans(),
    allow_truncated=st.booleans(),
    max_unmasked_people=st.sampled_from([0, 1, 9]),
    min_predicted_iou=st.sampled_from([0.0, 0.5]),
    same_person_iou=st.sampled_from([0.6, 0.85]),
    images_per_stratum=st.sampled_from([None, None, 2]),
    backgrounds=st.sampled_from([None, 1]),
    seed=st.integers(0, 3),
)
# Shrinking would take minutes at a quarter of a second an example.
no_shrinking = [Phase.explicit, Phase.reuse, Phase.generate]
varied = settings(
    max_examples=8, phases=no_shrinking, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.mark.slow
@varied
@given(mirror=mirrors, wanted=wishes)
def test_the_choice_is_that_of_a_plain_implementation(
    tmp_path_factory: pytest.TempPathFactory, mirror: dict[Split, list[Picture]], wanted: CurationSettings
) -> None:
    """Same images, strata, order, people and flags as `reference` on random tables."""
    curation = run(tmp_path_factory.mktemp("tables"), mirror, wanted)
    found = [
        (r.split, r.id, r.role, r.stratum, [(i.id, i.occluded, i.truncated) for i in r.instances])
        for r in curation.records
    ]
    assert found == reference(mirror, wanted)
    for record in curation.records:
        assert all((i.mask == "") == i.id.startswith("box-") for i in record.instances)


@pytest.mark.slow
@settings(varied, max_examples=3)
@given(mirror=mirrors, seed=st.integers(0, 2**32))
def test_neither_row_order_nor_thread_count_changes_the_choice(
    tmp_path_factory: pytest.TempPathFactory, mirror: dict[Split, list[Picture]], seed: int
) -> None:
    """Shuffled tables (with some rows twice, some at odds with others of their image) give equal records."""
    wanted = CurationSettings(min_box_area=0, max_unmasked_people=2, images_per_stratum=2, backgrounds=3)
    rows = {split: Rows.of(drawn) for split, drawn in mirror.items()}
    for table in rows.values():
        table.boxes += [[*row[:8], "1", *row[9:]] for row in table.boxes[:2]]
        table.masks += [[*row[:8], "0.9", row[9]] for row in table.masks[:2]]
        table.metadata += [[*row[:6], "Somebody else", *row[7:]] for row in table.metadata[:4]]
    one = run(tmp_path_factory.mktemp("a"), rows, wanted, threads=1)
    rng = random.Random(seed)
    for table in rows.values():
        for kind in COLUMNS:
            rng.shuffle(getattr(table, kind))
    four = run(tmp_path_factory.mktemp("b"), rows, wanted, threads=4)
    assert four.records == one.records
    assert len(four.rejected) == len(one.rejected)


# --- People ----------------------------------------------------------------------------------------------------


def test_boxes_of_the_same_person_become_one_with_the_best_mask(tmp_path: Path) -> None:
    """A Person box and two Man boxes a pixel apart are one person; the better mask stays, and all flags."""
    near = (0.101, 0.1, 0.3, 0.9)
    people = (
        Somebody("Person", LEFT, occluded=1),
        Somebody("Man", near, mask="aaaaaaaa", iou=0.7, truncated=1),
        Somebody("Man", LEFT, mask="bbbbbbbb", iou=0.8),
    )
    (record,) = run(tmp_path, {"train": [Picture(image(1), people)]}, CurationSettings()).records
    (person,) = record.instances
    assert (person.id, person.category, person.box) == ("bbbbbbbb", "Man", LEFT)
    assert person.mask == f"{image(1)}_m04yx4_bbbbbbbb.png"
    assert person.occluded and person.truncated
    assert record.stratum == "one"


def test_of_two_equal_masks_the_more_specific_class_stays(tmp_path: Path) -> None:
    """Person gives way to Woman where both have masks of the same quality, whichever id comes first."""
    people = (Somebody("Person", mask="aaaaaaaa", iou=0.8), Somebody("Woman", mask="bbbbbbbb", iou=0.8))
    (record,) = run(tmp_path, {"train": [Picture(image(1), people)]}, CurationSettings()).records
    assert [person.category for person in record.instances] == ["Woman"]


def test_a_rated_mask_goes_before_an_unrated_one(tmp_path: Path) -> None:
    """Of two masks of one person, the one of known quality stays."""
    people = (Somebody("Man", mask="aaaaaaaa"), Somebody("Boy", mask="bbbbbbbb", iou=0.1))
    (record,) = run(tmp_path, {"train": [Picture(image(1), people)]}, CurationSettings()).records
    assert [person.id for person in record.instances] == ["bbbbbbbb"]


@pytest.mark.parametrize(("bound", "count"), [(0.5, 1), (0.51, 2)])
def test_the_bound_of_being_the_same_person_is_included(tmp_path: Path, bound: float, count: int) -> None:
    """The second box is the upper half of the first: their intersection over union is 0.5 exactly."""
    people = (Somebody(box=(0.25, 0, 0.75, 1), mask="aaaaaaaa"), Somebody(box=(0.25, 0, 0.75, 0.5), mask="bbbbbbbb"))
    wanted = CurationSettings(same_person_iou=bound)
    (record,) = run(tmp_path, {"train": [Picture(image(1), people)]}, wanted).records
    assert len(record.instances) == count


def test_strata_follow_the_number_of_people(tmp_path: Path) -> None:
    """One; two or three; four and more, where no boxes touch."""
    strata = ["one", "two_or_three", "two_or_three", "four_or_more", "four_or_more"]
    slots = [Somebody(box=(i / 5, 0, i / 5 + 0.1, 1), mask=f"{i:08x}") for i in range(5)]
    mirror = [Picture(image(count), tuple(slots[:count])) for count in range(1, 6)]
    curation = run(tmp_path, {"train": mirror}, CurationSettings())
    assert sorted(chosen(curation)) == [(image(i), stratum) for i, stratum in enumerate(strata, 1)]


@pytest.mark.parametrize("iou", ["", "nan"])
def test_a_mask_without_predicted_iou_is_usable(tmp_path: Path, iou: str) -> None:
    """Validation and test masks have none; a least value must not drop them."""
    rows = Rows.of([Picture(image(1), (Somebody(mask="aaaaaaaa"),))])
    rows.masks[0][8] = iou
    assert chosen(run(tmp_path, {"test": rows}, CurationSettings(min_predicted_iou=0.9))) == [(image(1), "one")]


@pytest.mark.parametrize(
    ("second", "stratum"),
    [
        ((0.3, 0.1, 0.5, 0.9), "overlapping"),
        ((0.25, 0.1, 0.5, 0.9), "overlapping"),
        ((0.300001, 0.1, 0.5, 0.9), "two_or_three"),
    ],
)
def test_people_whose_boxes_touch_are_overlapping(tmp_path: Path, second: Coordinates, stratum: str) -> None:
    """A shared edge suffices; a gap of a millionth of the picture does not."""
    people = (Somebody(mask="aaaaaaaa"), Somebody(box=second, mask="bbbbbbbb"))
    assert chosen(run(tmp_path, {"train": [Picture(image(1), people)]}, CurationSettings())) == [(image(1), stratum)]


@pytest.mark.parametrize(
    ("stranger", "wanted"),
    [
        (Somebody(box=RIGHT), {"max_unmasked_people": 1}),
        (Somebody(box=RIGHT, mask="bbbbbbbb", occluded=1), {"allow_occluded": True}),
        (Somebody(box=RIGHT, mask="bbbbbbbb", truncated=1), {"allow_truncated": True}),
        (Somebody(box=(0.6, 0.1, 0.61, 0.2), mask="bbbbbbbb"), {"min_box_area": 0}),
        (Somebody(box=(0.4, 0.0, 1.0, 1.0), mask="bbbbbbbb"), {"max_box_area": 1}),
        (Somebody(box=RIGHT, mask="bbbbbbbb", group_of=1), {"allow_group_of": True}),
        (Somebody(box=RIGHT, mask="bbbbbbbb", depiction=1), {"allow_depictions": True}),
    ],
)
def test_one_person_that_does_not_fit_rules_the_picture_out(
    tmp_path: Path, stranger: Somebody, wanted: dict[str, Any]
) -> None:
    """Unmasked, occluded, truncated, small, large, group and depiction: each until its own setting allows it."""
    strict = CurationSettings(allow_occluded=False, allow_truncated=False, min_box_area=0.01, max_box_area=0.5)
    mirror: dict[Split, Sequence[Picture]] = {"train": [Picture(image(1), (Somebody(mask="aaaaaaaa"), stranger))]}
    assert chosen(run(tmp_path / "strict", mirror, strict)) == []
    assert len(chosen(run(tmp_path / "open", mirror, strict.model_copy(update=wanted)))) == 1


# --- Pictures --------------------------------------------------------------------------------------------------


def test_rotation_licence_and_author_travel_with_the_record(tmp_path: Path) -> None:
    """Everything that attribution needs is in the record, commas and quotes included."""
    picture = Picture(image(1), (Somebody(mask="aaaaaaaa"),), rotation="270.0")
    (record,) = run(tmp_path, {"validation": [picture]}, CurationSettings()).records
    expected = ImageRecord(
        id=image(1),
        source="openimages",
        split="validation",
        role="people",
        stratum="one",
        image=f"validation/{image(1)}.jpg",
        rotation=270,
        licence=BY_2,
        author="Ann, the author",
        author_url="https://example.org/people/ann",
        title='A "quoted", title',
        url=f"https://example.org/{image(1)}.jpg",
        landing_url=f"https://example.org/{image(1)}",
        instances=record.instances,
    )
    assert record == expected


def test_only_allowed_licences_are_chosen(tmp_path: Path) -> None:
    """CC BY 2.0 alone by default; prefixes widen it; an empty licence is never allowed."""
    person = (Somebody(mask="aaaaaaaa"),)
    mirror: dict[Split, Sequence[Picture]] = {
        "train": [Picture(image(i), person, licence=url) for i, url in enumerate([BY_2, BY_NC, ""])]
    }
    assert chosen(run(tmp_path / "a", mirror, CurationSettings())) == [(image(0), "one")]
    wide = CurationSettings(licences=("https://creativecommons.org/licenses/",))
    assert {name for name, _ in chosen(run(tmp_path / "b", mirror, wide))} == {image(0), image(1)}


def test_a_photograph_in_two_splits_stays_in_one(tmp_path: Path) -> None:
    """Test goes before validation before train; the others are reported."""
    person = (Somebody(mask="aaaaaaaa"),)
    curation = run(
        tmp_path,
        {
            "train": [Picture(image(1), person, md5="x"), Picture(image(2), person, md5="y")],
            "validation": [Picture(image(3), person, md5="x"), Picture(image(4), person, md5="y")],
            "test": [Picture(image(5), person, md5="x"), Picture(image(1), person, md5="z")],
        },
        CurationSettings(),
    )
    assert {(r.split, r.id) for r in curation.records} == {
        ("validation", image(4)),
        ("test", image(5)),
        ("test", image(1)),
    }
    assert {(r.split, r.image_id, r.reason, r.outcome) for r in curation.rejected} == {
        ("train", image(1), "repeated-photo", "image-rejected"),
        ("train", image(2), "repeated-photo", "image-rejected"),
        ("validation", image(3), "repeated-photo", "image-rejected"),
    }


def test_of_a_photograph_twice_in_a_split_the_one_with_people_stays(tmp_path: Path) -> None:
    """A copy without annotations of people would pass for a background with people in it."""
    copy = Picture(image(1), labels=(("Person", 0),), md5="x")
    mirror = [copy, Picture(image(2), (Somebody(mask="aaaaaaaa"),), md5="x")]
    assert chosen(run(tmp_path, {"train": mirror}, CurationSettings())) == [(image(2), "one")]


def test_people_without_metadata_are_rejected(tmp_path: Path) -> None:
    """No row, no licence: the image is named; a background without a row was never among the boxed images."""
    curation = run(
        tmp_path,
        {
            "train": [
                Picture(image(1), (Somebody(mask="aaaaaaaa"),), listed=False),
                Picture(image(2), labels=(("Person", 0),), listed=False),
            ]
        },
        CurationSettings(),
    )
    assert curation.records == []
    assert [(r.image_id, r.reason) for r in curation.rejected] == [(image(1), "missing-metadata")]


def test_backgrounds_are_verified_to_hold_nobody(tmp_path: Path) -> None:
    """Somebody looked for people and found none, and no label or box of a person or body part says otherwise."""
    cases: list[tuple[tuple[tuple[str, int], ...], tuple[Somebody, ...], bool]] = [
        ((("Person", 0),), (), True),
        ((("Person", 0), ("Dog", 1)), (Somebody("Dog"),), True),
        ((("Person", 0), ("Woman", 0)), (), True),
        ((("Woman", 0),), (), False),
        ((), (), False),
        ((("Person", 1),), (), False),
        ((("Person", 0), ("Person", 1)), (), False),
        ((("Person", 0), ("Woman", 1)), (), False),
        ((("Person", 0), ("Human face", 1)), (), False),
        ((("Person", 0),), (Somebody("Human face"),), False),
        ((("Person", 0),), (Somebody("Girl"),), False),
    ]
    mirror = [Picture(image(i), people, labels) for i, (labels, people, _) in enumerate(cases)]
    curation = run(tmp_path, {"train": mirror}, CurationSettings())
    assert {record.role for record in curation.records} == {"background"}
    assert {record.id for record in curation.records} == {image(i) for i, case in enumerate(cases) if case[2]}


def test_mask_of_a_person_without_any_box_keeps_a_picture_from_being_background(tmp_path: Path) -> None:
    """The mask alone shows that somebody is there."""
    rows = Rows.of([Picture(image(1), (Somebody(mask="aaaaaaaa"),), (("Person", 0),))])
    rows.boxes.clear()
    assert chosen(run(tmp_path, {"train": rows}, CurationSettings())) == [(image(1), "one")]


def test_the_images_with_the_least_digest_are_chosen_and_more_of_them_are_a_superset(tmp_path: Path) -> None:
    """md5(seed || id) decides in each stratum and split, and orders the result."""
    mirror: dict[Split, Sequence[Picture]] = {
        "train": [Picture(image(i), (Somebody(mask="aaaaaaaa"),)) for i in range(20)]
    }
    digests = sorted((hashlib.md5(f"5{image(i)}".encode()).hexdigest(), image(i)) for i in range(20))
    for count in (3, 7):
        wanted = CurationSettings(images_per_stratum=count, seed=5, backgrounds=0)
        curation = run(tmp_path / str(count), mirror, wanted)
        assert [record.id for record in curation.records] == [name for _, name in digests[:count]]


# --- Bad rows --------------------------------------------------------------------------------------------------

GOOD = Picture(image(1), (Somebody(mask="aaaaaaaa"),), labels=(("Dog", 1),))
OTHER = Picture(image(2), (Somebody("Dog"), Somebody(mask="bbbbbbbb")), labels=(("Person", 1),))


@pytest.mark.parametrize(
    ("kind", "column", "value", "reason"),
    [
        ("boxes", 4, "zero", "bad-number"),
        ("boxes", 4, "1.5", "bad-box"),
        ("boxes", 4, "nan", "bad-box"),
        ("boxes", 5, "0.05", "bad-box"),
        ("boxes", 6, "", "missing-value"),
        ("boxes", 10, "7", "bad-flag"),
        ("boxes", 2, "", "missing-value"),
        ("boxes", 0, "../../etc/passwd0", "bad-image-id"),
        ("boxes", 0, "000000000000000G", "bad-image-id"),
        ("boxes", 0, "00000000_0000002", "bad-image-id"),
        ("boxes", 0, "", "missing-value"),
        ("masks", 1, "../0000000000000", "bad-image-id"),
        ("masks", 0, "../../../etc/passwd", "bad-mask-path"),
        ("masks", 3, "bbbb/../", "bad-mask-path"),
        ("masks", 7, "1e3", "bad-box"),
        ("labels", 0, "00000000000000002", "bad-image-id"),
        ("labels", 3, "2", "bad-confidence"),
        ("metadata", 0, "../000000000000/", "bad-image-id"),
        ("metadata", 11, "45", "bad-rotation"),
        ("metadata", 11, "north", "bad-number"),
    ],
)
def test_a_bad_value_sets_one_row_aside_and_names_its_line(
    tmp_path: Path, kind: str, column: int, value: str, reason: str
) -> None:
    """The row, its table and line are reported; the other image is chosen as ever."""
    rows = Rows.of([GOOD, OTHER])
    table = getattr(rows, kind)
    table[-1][column] = value
    curation = run(tmp_path, {"train": rows}, ANY_SIZE)
    (bad,) = [r for r in curation.rejected if r.outcome == "row-rejected"]
    assert (bad.reason, bad.stage, bad.split) == (reason, "curate", "train")
    assert bad.message.startswith(f"train-{kind}.csv, line {len(table) + 1}: ")
    assert bad.image_id == table[-1][1 if kind == "masks" else 0]
    assert (image(1), "one") in chosen(curation)


def assert_left_out(curation: Curation, reason: str) -> None:
    """The first picture, for the reason, and not the other."""
    assert [record.id for record in curation.records] == [OTHER.id]
    assert [(row.image_id, row.reason) for row in curation.rejected if row.outcome == "image-rejected"] == [
        (image(1), reason)
    ]


@pytest.mark.parametrize("role", ["people", "background"])
@pytest.mark.parametrize(("column", "value"), [(5, "1.02"), (10, "x")])
def test_a_picture_with_a_box_that_cannot_be_used_is_left_out(
    tmp_path: Path, role: str, column: int, value: str
) -> None:
    """The second person of it has no mask, which would leave it out if the box could be read."""
    masked = (Somebody(mask="aaaa"),) if role == "people" else ()
    rows = Rows.of([Picture(image(1), (*masked, Somebody(box=RIGHT)), (("Person", 0),)), OTHER])
    rows.boxes[len(masked)][column] = value
    assert_left_out(run(tmp_path, {"train": rows}, ANY_SIZE), "unusable-box")


@pytest.mark.parametrize("role", ["people", "background"])
def test_a_picture_with_a_mask_that_cannot_be_used_is_left_out(tmp_path: Path, role: str) -> None:
    """Of the person nothing else is known: no box is there."""
    masked = (Somebody(mask="aaaa"),) if role == "people" else ()
    rows = Rows.of([Picture(image(1), (*masked, Somebody(box=RIGHT, mask="bbbb")), (("Person", 0),)), OTHER])
    del rows.boxes[len(masked)]
    rows.masks[len(masked)][5] = "1.02"
    assert_left_out(run(tmp_path, {"train": rows}, ANY_SIZE), "unusable-mask")


@pytest.mark.parametrize("value", ["2", "yes"])
def test_a_background_with_a_label_that_cannot_be_used_is_left_out(tmp_path: Path, value: str) -> None:
    """It said that a woman is there, and that no person was seen says another row."""
    rows = Rows.of([Picture(image(1), (), (("Person", 0), ("Woman", 1))), OTHER])
    rows.labels[1][3] = value
    assert_left_out(run(tmp_path, {"train": rows}, ANY_SIZE), "unusable-label")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{id},xclick,/m/01g317", "missing-column"),
        ("{id},xclick,/m/01g317,1,.1,.2,.1,.2,0,0,0,0,0,0,0", "too-many-columns"),
        ('{id},xclick,"/m/01g317,1,.1,.2,.1,.2,0,0,0,0,0', "unclosed-quote"),
        ("{id},xclick,/m/01g317,1,.1,.2,.1,.2,0,0,no,0,0", "bad-number"),
    ],
)
def test_a_line_that_cannot_be_parsed_is_named(tmp_path: Path, line: str, reason: str) -> None:
    """Also where a bad row that could be parsed follows: neither shifts the other's line number."""
    rows = Rows.of([GOOD])
    classes, tables = write(tmp_path, {"train": rows})
    path = Path(tables["train"].boxes.path)
    broken = line.format(id=image(3))
    text = path.read_text() + f"../../../../../..,xclick,/m/01g317,1,.1,.2,.1,.2,0,0,0,0,0\n{broken}\n"
    path.write_text(text.replace("\n", "\r\n"))
    curation = curate(classes, tables, ANY_SIZE, lambda split, name: name)
    found = {(r.reason, r.image_id, r.message.split(":")[0]) for r in curation.rejected}
    assert found == {
        ("bad-image-id", "../../../../../..", "train-boxes.csv, line 3"),
        (reason, image(3), "train-boxes.csv, line 4"),
    }
    assert chosen(curation) == [(image(1), "one")]


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    """One author in Latin-1 costs one row."""
    classes, tables = write(tmp_path, {"train": Rows.of([GOOD, OTHER])})
    path = Path(tables["train"].metadata.path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b"Ann", b"Ren\xe9")]))
    curation = curate(classes, tables, ANY_SIZE, lambda split, name: name)
    assert {(r.reason, r.image_id) for r in curation.rejected} == {
        ("not-utf8", image(2)),
        ("missing-metadata", image(2)),
    }
    assert chosen(curation) == [(image(1), "one")]


def test_lines_are_numbered_in_tables_of_many_blocks(tmp_path: Path) -> None:
    """DuckDB reads large files in parallel and out of order; the numbers stay right."""
    rows = Rows.of([GOOD])
    classes, tables = write(tmp_path, {"train": rows})
    path = Path(tables["train"].boxes.path)
    filler = "00000000000000aa,xclick,/m/0bt9lr,1,.1,.2,.1,.2,0,0,0,0,0\n"
    bad = "../4567890abcdef,xclick,/m/01g317,1,.1,.2,.1,.2,0,0,0,0,0\n"
    path.write_text(path.read_text() + 150_000 * filler + bad + 150_000 * filler + "short\n" + filler + bad)
    curation = curate(classes, tables, ANY_SIZE, lambda split, name: name, threads=4)
    lines = [int(r.message.split("line ")[1].split(":")[0]) for r in curation.rejected]
    assert sorted(lines) == [150_003, 300_004, 300_006]


def test_line_breaks_in_values_do_not_lose_a_bad_row(tmp_path: Path) -> None:
    """A title over two lines, in the bad row itself: it is still reported, by its row."""
    rows = Rows.of([GOOD, OTHER])
    rows.metadata[1][0], rows.metadata[1][7] = "../0000000000000", "one\ntwo"
    curation = run(tmp_path, {"train": rows}, ANY_SIZE)
    (bad,) = [r for r in curation.rejected if r.outcome == "row-rejected"]
    assert (bad.reason, bad.image_id) == ("bad-image-id", "../0000000000000")
    assert bad.message.startswith("train-metadata.csv, line 3: ")


@pytest.mark.parametrize(("kind", "agreed"), [("boxes", "LabelName"), ("masks", "BoxID"), ("metadata", "ImageID")])
def test_a_row_that_is_there_twice_counts_once(tmp_path: Path, kind: str, agreed: str) -> None:
    """The second is reported with the line of the first."""
    rows = Rows.of([GOOD])
    getattr(rows, kind).append(getattr(rows, kind)[0])
    curation = run(tmp_path, {"train": rows}, ANY_SIZE)
    assert chosen(curation) == [(image(1), "one")]
    (bad,) = curation.rejected
    assert (bad.reason, bad.image_id, bad.outcome) == ("repeated-row", image(1), "row-rejected")
    assert bad.message.startswith(f"train-{kind}.csv, line 3: has the ")
    assert agreed in bad.message and bad.message.endswith("of line 2")


# --- Tables that cannot be used --------------------------------------------------------------------------------


def test_a_missing_column_is_named_before_anything_is_read(tmp_path: Path) -> None:
    """The message names file and column."""
    classes, tables = write(tmp_path, {"train": Rows.of([GOOD])})
    path = Path(tables["train"].masks.path)
    path.write_text(path.read_text().replace("BoxYMax", "BoxYMaximum", 1))
    with pytest.raises(UserError, match=r"^train-masks\.csv: column BoxYMax is missing; the header has MaskPath,"):
        curate(classes, tables, ANY_SIZE, lambda split, name: name)


@pytest.mark.parametrize("kind", ["boxes", "masks", "labels", "metadata"])
def test_a_missing_or_empty_table_is_named(tmp_path: Path, kind: str) -> None:
    classes, tables = write(tmp_path, {"train": Rows.of([GOOD])})
    path = Path(getattr(tables["train"], kind).path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"train-{kind}\.csv: column .* is missing"):
        curate(classes, tables, ANY_SIZE, lambda split, name: name)
    path.unlink()
    with pytest.raises(UserError, match=rf"train-{kind}\.csv does not exist"):
        curate(classes, tables, ANY_SIZE, lambda split, name: name)


def test_an_unknown_class_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no class 'Womann', did you mean 'Woman'"):
        run(tmp_path, {"train": [GOOD]}, CurationSettings(people_classes=("Person", "Womann")))


@pytest.mark.parametrize("line", ["x\n", "../4567890abcdef,xclick,/m/01g317,1,.1,.2,.1,.2,0,0,0,0,0\n"])
def test_a_table_of_nothing_but_faults_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Rejections are kept in memory, so that their number is bounded."""
    monkeypatch.setattr(tables_module, "MAX_FAULTS", 50)
    classes, tables = write(tmp_path, {"train": Rows.of([GOOD])})
    path = Path(tables["train"].boxes.path)
    path.write_text(path.read_text() + 100 * line)
    with pytest.raises(UserError, match=r"train-boxes\.csv has more than 50 faults"):
        curate(classes, tables, ANY_SIZE, lambda split, name: name)


def test_ranges_that_are_empty_are_refused() -> None:
    with pytest.raises(UserError, match="max_people is less than min_people"):
        CurationSettings.check({"min_people": 3, "max_people": 2}, origin="settings")
    with pytest.raises(UserError, match="max_box_area is less than min_box_area"):
        CurationSettings.check({"min_box_area": 0.5, "max_box_area": 0.1}, origin="settings")


# --- Parquet ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("types", ["inferred", "text"])
def test_a_parquet_mirror_gives_what_the_csv_files_give(tmp_path: Path, types: str) -> None:
    """Whether its columns have types or are all text; bad rows are named by row."""
    rows = Rows.of([GOOD, OTHER, Picture(image(3), labels=(("Person", 0),))])
    rows.masks[1][8] = "0.5"
    rows.masks.append(["../x.png", "../x", *rows.masks[0][2:]])
    classes, tables = write(tmp_path, {"train": rows})
    expected = curate(classes, tables, ANY_SIZE, lambda split, name: name)
    converted = {}
    for kind in COLUMNS:
        path = Path(getattr(tables["train"], kind).path)
        target = path.with_suffix(".parquet")
        with duckdb.connect() as connection:
            options = "all_varchar = true" if types == "text" else "types = {'ImageID': 'VARCHAR'}"
            connection.execute(f"COPY (FROM read_csv('{path}', {options})) TO '{target}' (FORMAT parquet)")
        path.unlink()
        converted[kind] = Table(str(target), target.name)
    found = curate(classes, {"train": SplitTables(**converted)}, ANY_SIZE, lambda split, name: name)
    assert found.records == expected.records
    assert len(found.records) == 3
    assert [(r.reason, r.image_id) for r in found.rejected] == [(r.reason, r.image_id) for r in expected.rejected]
    assert [r.message for r in found.rejected] == [
        "train-masks.parquet, row 3: the image id is not 16 hexadecimal digits"
    ]


def test_photographs_without_a_digest_are_no_copies_of_one_another(tmp_path: Path) -> None:
    """As Parquet has it where a column of text is empty, and not missing."""
    classes, tables = write(tmp_path, {"train": Rows.of([GOOD, OTHER])})
    path = Path(tables["train"].metadata.path)
    target = path.with_suffix(".parquet")
    with duckdb.connect() as connection:
        read = f"read_csv('{path}', all_varchar = true)"
        connection.execute(f"COPY (SELECT * REPLACE ('' AS OriginalMD5) FROM {read}) TO '{target}' (FORMAT parquet)")
    tables["train"] = replace(tables["train"], metadata=Table(str(target), target.name))
    assert len(curate(classes, tables, ANY_SIZE, lambda split, name: name).records) == 2


def test_a_number_that_cannot_be_read_is_named_in_parquet_too(tmp_path: Path) -> None:
    """Text columns may hold anything."""
    rows = Rows.of([GOOD, OTHER])
    rows.boxes[0][4] = "left"
    classes, tables = write(tmp_path, {"train": rows})
    path = Path(tables["train"].boxes.path)
    target = path.with_suffix(".parquet")
    with duckdb.connect() as connection:
        connection.execute(f"COPY (FROM read_csv('{path}', all_varchar = true)) TO '{target}' (FORMAT parquet)")
    changed = replace(tables["train"], boxes=Table(str(target), target.name))
    curation = curate(classes, {"train": changed}, ANY_SIZE, lambda split, name: name)
    told = [r.message for r in curation.rejected if r.outcome == "row-rejected"]
    assert told == ["train-boxes.parquet, row 1: a number cannot be read"]
