"""The opt-out list: what it may say, what it names, and that no line of it is ever passed over in silence."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataset_tools.curated import CuratedSettings, photographs
from dataset_tools.curation import CurationSettings
from dataset_tools.errors import UserError
from dataset_tools.images import DecodeSettings, decode_image
from dataset_tools.opt_out import SOURCES, OptedOut, OptOut, OptOutCheck, _plain_url, read_opt_out
from dataset_tools.perceptual_hash import perceptual_hash
from dataset_tools.records import SPLITS, ImageRecord, Rejection, rejections_to_table
from dataset_tools.sources.ade20k import Ade20kSource
from dataset_tools.sources.coco import CocoSource
from dataset_tools.sources.folder import FolderSettings, FolderSource
from dataset_tools.sources.openimages import OpenImagesSettings, OpenImagesSource
from dataset_tools.sources.pairs import PairsSource
from dataset_tools.sources.sample import SampleSettings, write_mirror
from dataset_tools.sources.weblist import DownloadedSource

RECORD = ImageRecord(
    *("0a1b", "place", "train", "people", "one", "/photos/0a1b.jpg"),
    url="https://www.example.org/a%20b/0a1b.jpg?size=l",
    landing_url="http://example.org/photo/7/",
)
SHA = "0123456789abcdef" * 4


def read(folder: Path, text: str | bytes) -> OptOut:
    path = folder / "list.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_opt_out(str(path))


def test_csv_and_plain_text_say_the_same(tmp_path: Path) -> None:
    plain = f"# since May\n\nid 0a1b\nurl  https://example.org/x,y\nSHA256\t{SHA.upper()}\nphash 00ff00ff00ff00ff\n"
    table = f'\ufeffkind,value\r\nphash,00FF00FF00FF00FF\r\nurl,"https://example.org/x,y"\r\nsha256,{SHA}\r\nid,0a1b'
    one, other = read(tmp_path, plain), read(tmp_path, table)
    assert one == other
    assert one == OptOut(id=("0a1b",), url=("http://example.org/x,y",), sha256=(SHA,), phash=("00ff00ff00ff00ff",))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0a1b", "has 1 cells and not 2"),
        ("url,https://example.org/x,y", "3 cells.*quotes"),
        ("id,0a1b,since May", "3 cells"),
        ("id 0a1b since May", "cells and not 2"),
        ("name,Ann", "'name' is none of the kinds id, url, sha256, phash"),
        ("id,", "the id is empty"),
        ("id,composite-train-00000003", "is a composite.*name those of its origins"),
        ("url,example.org/x.jpg", "no address"),
        (f"sha256,{SHA[:-1]}", "64 hex digits"),
        (f"sha256,{SHA[:-1]}g", "64 hex digits"),
        ("phash,00ff", "16 hex digits"),
        ('url,"https://example.org', "is not CSV"),
    ],
)
def test_a_line_that_is_not_understood_is_named(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"^line 3 of the opt-out list .*list\.csv: .*{said}"):
        read(tmp_path, f"# a\nid,ok\n{line}\n")


def test_a_list_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_opt_out(str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match="not in UTF-8"):
        read(tmp_path, b"id,\xff\n")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("id,0a1b", "id"),
        ("id,place/0a1b", "id"),
        ("id,place-0a1b", "id"),
        ("id,other/0a1b", None),
        ("id,0a1", None),
        ("url,http://example.org/a%20c/0a1b.jpg?size=l#top", None),
        ('url,"http://EXAMPLE.org/a b/0a1b.jpg?size=l#top"', "url"),
        ("url,https://example.org/photo/7", "url"),
        ("url,https://example.org/photo/77", None),
        ("url,https://example.org/a%20b/0a1b.jpg?size=s", None),
    ],
)
def test_a_picture_is_named_by_its_id_or_an_address_however_that_is_written(
    tmp_path: Path, line: str, kind: str | None
) -> None:
    assert read(tmp_path, line).named(RECORD) == kind


@pytest.mark.parametrize("address", ["see https://example.org/1", "http://[1", "file:///photos/1.jpg", "://", ""])
def test_what_a_source_gives_for_an_address_and_is_none_stops_nothing(address: str) -> None:
    listed, strange = OptOut(url=("http://example.org/1",)), replace(RECORD, landing_url=address)
    assert listed.named(strange) is None
    assert listed.named(replace(strange, image="https://example.org/1")) == "url"


def test_a_picture_that_a_sample_became_in_a_list_of_pairs_is_still_named() -> None:
    """As `mild select` writes it: the sample's key is the picture's id there."""
    chosen = replace(RECORD, source="pairs", id="place-0a1b")
    assert OptOut(id=("place/0a1b",)).named(chosen) == "id"
    assert OptOut(id=("place/0a1",)).named(chosen) is None


def test_a_perceptual_hash_names_copies_that_were_reduced_and_re_encoded_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    pictures = [cv2.resize(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8), (480, 360)) for _ in range(30)]
    listed = OptOut(phash=(f"{perceptual_hash(pictures[0]):016x}",))
    small = cv2.resize(pictures[0], (200, 150), interpolation=cv2.INTER_AREA)
    copy = cv2.imdecode(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)
    assert listed.holds("", f"{perceptual_hash(copy):016x}") == "phash"
    assert [listed.holds("", f"{perceptual_hash(picture):016x}") for picture in pictures[1:]] == [None] * 29


@pytest.fixture(scope="module")
def openimages(tmp_path_factory: pytest.TempPathFactory) -> OpenImagesSettings:
    """The drawn world, as it is read: a mirror of OpenImages."""
    root = str(tmp_path_factory.mktemp("world") / "mirror")
    few = dict.fromkeys(["train", "validation", "test", *(f"{s}_backgrounds" for s in SPLITS)], 1)
    write_mirror(SampleSettings(**few, smallest=128, largest=144, broken=False), root)
    everything = CurationSettings(images_per_stratum=None, backgrounds=None)
    return OpenImagesSettings(root=root, images=f"{root}/images", curation=everything)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> FolderSettings:
    """Own photographs, with addresses."""
    root = tmp_path_factory.mktemp("folder")
    for place, seed in (("photos/a", 1), ("photos/b", 2), ("empty/c", 3)):
        (root / place).parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        cv2.imwrite(str(root / f"{place}.png"), cv2.resize(noise, (120, 90)))
    for names, place in ((("a", "b"), "photos"), (("c",), "empty")):
        rows = "".join(f"{name}.png,https://example.org/{name}\n" for name in names)
        (root / place / "attribution.csv").write_text(f"file,url\n{rows}")
    return FolderSettings(photos=str(root / "photos"), backgrounds=str(root / "empty"))


@pytest.mark.parametrize("kind", ["id", "url", "sha256", "phash"])
@pytest.mark.parametrize("name", ["openimages", "folder"])
def test_the_list_is_honoured_whatever_the_source_for_people_and_backgrounds(
    request: pytest.FixtureRequest, name: str, kind: str
) -> None:
    source = request.getfixturevalue(name).open()
    records = source.curate().records
    assert {record.role for record in records} == {"people", "background"}
    for wanted in (next(record for record in records if record.role == role) for role in ("people", "background")):
        data = source.read_image(wanted)
        rotation = None if source.applies_exif else wanted.rotation
        picture = decode_image(data, DecodeSettings(min_side=1), rotation=rotation).image
        value = {
            "id": wanted.id,
            "url": _plain_url(wanted.url),
            "sha256": hashlib.sha256(data).hexdigest(),
            "phash": f"{perceptual_hash(picture):016x}",
        }[kind]
        rejected: list[Rejection] = []
        check = OptOutCheck(OptOut(**{kind: (value,)}))
        settings = CuratedSettings(decode=DecodeSettings(min_side=1))
        kept = [photograph.record for photograph in photographs(records, source, settings, rejected, check)]
        assert wanted not in kept and [row.image_id for row in rejected if row.reason == "opted-out"] == [""]
        assert len(kept) == len(records) - 1


def test_what_was_seen_tells_whether_another_list_names_other_pictures() -> None:
    check, other = OptOutCheck(OptOut(sha256=(SHA,))), replace(RECORD, id="other")
    check.before_reading(RECORD)
    with pytest.raises(OptedOut) as caught:
        check.of_file(RECORD, SHA)
    check.of_file(other, "f" * 64)
    check.of_picture(other, "f" * 64, "00ff00ff00ff00ff")
    assert check.seen == [(RECORD.id, SHA, "", "sha256"), ("other", "f" * 64, "00ff00ff00ff00ff", "")]
    row = caught.value.row("train")
    assert (row.image_id, row.reason, row.stage) == ("", "opted-out", "opt-out")
    assert not {SHA, "0a1b"} & set(row.message.split())


@pytest.mark.parametrize("listed", ["0a1b", "place/0a1b"])
def test_rows_that_name_a_picture_of_the_list_for_another_reason_do_not_stay(listed: str) -> None:
    def row(name: str, message: str) -> Rejection:
        return Rejection("train", name, "", "curate", "image-rejected", "repeated-photo", message)

    table = rejections_to_table(
        [row("0a1b", "too small"), row("2c", "the same photograph is test image 0a1b"), row("3d", "unlike 0a1b-9")]
    )
    kept = OptOut(id=(listed,)).without_named(table)
    assert kept.schema == table.schema
    assert [(each["image_id"], each["message"]) for each in kept.to_pylist()] == [("", ""), ("3d", "unlike 0a1b-9")]
    told = rejections_to_table([OptedOut("id").row("train")])
    assert OptOut(id=(listed,)).without_named(told) == told


def test_rows_that_name_a_picture_by_its_file_its_key_or_its_address_do_not_stay() -> None:
    def row(name: str, message: str = "") -> Rejection:
        return Rejection("train", name, "", "curate", "image-rejected", "duplicate-image", message)

    record = replace(RECORD, id="anna-1", image="photos/2024/anna copy.png")
    table = rejections_to_table(
        [
            row("anna-1"),
            row("anna-2", "2024/anna.png has the same bytes as 2024/anna copy.png"),
            row("ben-1", "2024/ben.png has the same bytes as 2024/joanna copy.png"),
            row("zoe-1"),
            row("https://www.pictures.example/zoe.jpg#page"),
        ]
    )
    listed = OptOut(id=("folder-zoe-1",), url=("http://pictures.example/zoe.jpg",), sha256=(SHA,))
    kept = listed.without_named(table, [record]).to_pylist()
    assert [(each["image_id"], each["message"]) for each in kept] == [
        ("", ""),
        ("ben-1", "2024/ben.png has the same bytes as 2024/joanna copy.png"),
    ]


def test_rows_of_others_stay_where_the_end_of_a_listed_id_is_a_word_of_theirs() -> None:
    def row(name: str, message: str) -> Rejection:
        return Rejection("train", name, "", "curate", "row-rejected", "bad-row", message)

    table = rejections_to_table([row("12", "too small"), row("x", "x.png is 12 pixels wide")])
    assert OptOut(id=("scene-12",)).without_named(table) == table
    sources = (Ade20kSource, CocoSource, DownloadedSource, FolderSource, OpenImagesSource, PairsSource)
    assert {source.name for source in sources} == set(SOURCES)
    for name in SOURCES:
        kept = OptOut(id=(f"{name}-12",)).without_named(table).to_pylist()
        assert [(row["image_id"], row["message"]) for row in kept] == [("", "")]


def test_a_key_that_was_too_long_for_a_sample_names_its_picture_nevertheless() -> None:
    record = replace(RECORD, id="x" * 80)
    assert len(record.key()) == 80 and OptOut(id=(record.key(),)).named(record) == "id"
