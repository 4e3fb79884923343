"""The ``openimages`` source over folders, memory and other file systems."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import duckdb
import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from dataset_tools.curation import CurationSettings
from dataset_tools.errors import Rejected, UserError
from dataset_tools.fetch import FetchSettings
from dataset_tools.records import ImageRecord, InstanceRecord, Split
from dataset_tools.sources import Source
from dataset_tools.sources.openimages import CLASSES, TABLES, OpenImagesSettings, OpenImagesSource

BY_2 = "https://creativecommons.org/licenses/by/2.0/"
IDS: dict[Split, str] = {"train": "0" * 15 + "1", "validation": "a" * 16, "test": "f" * 16}
BOX = ["0.1", "0.5", "0.2", "0.9"]
MASK = np.zeros((30, 40), bool)
MASK[5:20, 10:30] = True
QUICK = FetchSettings(attempts=1, backoff_seconds=0)


def png(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def mirror_files() -> dict[str, bytes]:
    """One picture with one person, and one background, in each split."""
    files = {CLASSES: b"/m/01g317,Person\n/m/04yx4,Man\n/m/03bt1vf,Woman\n/m/01bl7v,Boy\n/m/05r655,Girl\n"}
    for split, image in IDS.items():
        empty = image[:-1] + "0"
        member = f"{image}_m04yx4_0a0b0c0d.png"
        rows = {
            "boxes": [
                "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
                "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside",
                ",".join([image, "xclick", "/m/04yx4", "1", *BOX, "1", "0", "0", "0", "0"]),
            ],
            "masks": [
                "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks",
                ",".join([member, image, "/m/04yx4", "0a0b0c0d", *BOX, "", ""]),
            ],
            "labels": ["ImageID,Source,LabelName,Confidence", f"{empty},verification,/m/01g317,0"],
            "metadata": [
                "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,"
                "OriginalMD5,Thumbnail300KURL,Rotation",
                *(f"{name},{split},u,l,{BY_2},p,Ann,A title,1,,t,0.0" for name in (image, empty)),
            ],
        }
        for kind, lines in rows.items():
            files[TABLES[split][kind]] = "".join(f"{line}\n" for line in lines).encode()
        files[f"images/{split}/{image}.jpg"] = b"picture " + image.encode()
        files[f"v5/{split}-masks/{split}-masks-{image[0]}.zip"] = archive({member: png(MASK), "other.png": b"?"})
    return files


def write(root: str, files: dict[str, bytes]) -> None:
    filesystem, path = fsspec.url_to_fs(root)
    for name, data in files.items():
        filesystem.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(f"{path}/{name}", data)


def source_of(root: str, **changes: Any) -> OpenImagesSource:
    return OpenImagesSettings(root=root, images=f"{root}/images", **{"fetch": QUICK, **changes}).open()


@pytest.fixture
def mirror(tmp_path: Path) -> str:
    root = str(tmp_path / "mirror")
    write(root, mirror_files())
    return root


def record_of(root: str) -> ImageRecord:
    """The record of the train split's picture, as far as reading needs it."""
    image = IDS["train"]
    person = InstanceRecord("0a0b0c0d", "Man", (0.1, 0.2, 0.5, 0.9), f"{image}_m04yx4_0a0b0c0d.png")
    path = f"{root}/images/train/{image}.jpg"
    return ImageRecord(image, "openimages", "train", "people", "one", path, instances=(person,))


def test_a_folder_and_memory_give_the_same(mirror: str) -> None:
    """Records (but for where the pictures lie), pictures and masks do not depend on the file system."""
    write("memory://openimages-same", mirror_files())
    local, memory = source_of(mirror), source_of("memory://openimages-same")
    assert isinstance(local, Source)
    curation = local.curate()
    records = curation.records
    assert curation.rejected == []
    assert [(r.split, r.role, r.id) for r in records] == [
        (split, role, IDS[split] if role == "people" else IDS[split][:-1] + "0")
        for split in ("train", "validation", "test")
        for role in ("people", "background")
    ]
    in_memory = memory.curate().records
    assert [replace(r, image="") for r in in_memory] == [replace(r, image="") for r in records]
    for source, found in ((local, records), (memory, in_memory)):
        for record in (r for r in found if r.role == "people"):
            assert source.read_image(record) == b"picture " + record.id.encode()
            assert np.array_equal(source.read_mask(record, 0), MASK)


def test_only_the_wanted_splits_and_tables_are_read(mirror: str) -> None:
    """Without backgrounds the label tables need not exist."""
    files = {name: data for name, data in mirror_files().items() if "train" not in name and "v7" not in name}
    write("memory://openimages-part", files)
    wanted = CurationSettings(backgrounds=0)
    source = source_of("memory://openimages-part", splits=("validation", "test"), curation=wanted)
    assert {record.split for record in source.curate().records} == {"validation", "test"}


@pytest.mark.parametrize("name", [CLASSES, *TABLES["validation"].values()])
def test_a_missing_table_is_named_with_its_root(mirror: str, name: str) -> None:
    Path(mirror, name).unlink()
    for action in (source_of(mirror).fingerprint, source_of(mirror).curate):
        with pytest.raises(UserError) as caught:
            action()
        assert f"{mirror}/{name}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_table_without_a_column_is_named_with_its_root(mirror: str) -> None:
    path = Path(mirror, TABLES["test"]["boxes"])
    path.write_text(path.read_text().replace("YMin", "Ymin"))
    with pytest.raises(UserError) as caught:
        source_of(mirror).curate()
    assert str(caught.value).startswith(f"{mirror}: {TABLES['test']['boxes']}: column YMin is missing")


def test_an_unreachable_root_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^settings: root: nosuch://root: Protocol not known") as caught:
        OpenImagesSettings.check({"root": "nosuch://root"}, origin="settings")
    assert "\n" not in str(caught.value)


def test_parquet_stands_in_for_csv(mirror: str) -> None:
    """In its place or beside it; then the Parquet file is the one that is read."""
    source = source_of(mirror, splits=("train",))
    expected = source.curate()
    assert len(expected.records) == 2
    for kind in ("boxes", "masks"):
        path = Path(mirror, TABLES["train"][kind])
        with duckdb.connect() as connection:
            connection.execute(
                f"COPY (FROM read_csv('{path}', types = {{'ImageID': 'VARCHAR'}})) "
                f"TO '{path.with_suffix('.parquet')}' (FORMAT parquet)"
            )
        path.write_text("not a table any more\n")
    assert source.curate() == expected
    path.unlink()
    assert source.curate() == expected


def test_the_fingerprint_follows_tables_and_choice_only(mirror: str) -> None:
    """Equal for equal input; another table, split or curation setting changes it; fetching faster does not."""
    first = source_of(mirror).fingerprint()
    assert source_of(mirror, fetch=FetchSettings(attempts=9)).fingerprint() == first
    changed = [
        source_of(mirror, splits=("train",)).fingerprint(),
        source_of(mirror, curation=CurationSettings(seed=1)).fingerprint(),
        source_of(mirror, curation=CurationSettings(backgrounds=0)).fingerprint(),
    ]
    path = Path(mirror, TABLES["train"]["labels"])
    path.write_bytes(path.read_bytes() + b"\n")
    changed.append(source_of(mirror).fingerprint())
    assert len({first, *changed}) == 5


class Counted(MemoryFileSystem):
    """Counts what is read."""

    protocol = "counted"
    copied: ClassVar[list[str]] = []
    ranges: ClassVar[list[tuple[str, int]]] = []

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        self.copied.append(rpath)
        super().get_file(rpath, lpath, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        data: bytes = super().cat_file(path, start=start, end=end, **kwargs)
        self.ranges.append((path, len(data)))
        return data


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    fsspec.register_implementation("counted", Counted, clobber=True)
    for name in ("copied", "ranges"):
        monkeypatch.setattr(Counted, name, [])
    return Counted


def test_a_mask_is_one_small_read(counted: type[Counted]) -> None:
    """Whatever the size of the archive: here 5 MB of other masks."""
    files = mirror_files()
    name = f"v5/train-masks/train-masks-{IDS['train'][0]}.zip"
    member = f"{IDS['train']}_m04yx4_0a0b0c0d.png"
    filler = np.random.default_rng(0).bytes(100_000)
    files[name] = archive({**{f"{i}.png": filler for i in range(50)}, member: png(MASK)})
    write("counted://small-reads", files)
    source = source_of("counted://small-reads")
    record = record_of("counted://small-reads")
    counted.ranges.clear()
    for _ in range(3):
        assert np.array_equal(source.read_mask(record, 0), MASK)
    assert len(counted.ranges) == 3
    assert all(size < 2000 for _, size in counted.ranges)


def test_a_cache_folder_spares_remote_tables(counted: type[Counted], tmp_path: Path) -> None:
    """Each table is copied once, again only when it changed; without the folder nothing stays."""
    write("counted://kept", mirror_files())
    cached = source_of("counted://kept", cache=str(tmp_path / "cache"), splits=("train",))
    first = cached.curate()
    assert len(counted.copied) == 5
    assert cached.curate() == first
    assert len(counted.copied) == 5
    write("counted://kept", {CLASSES: mirror_files()[CLASSES] + b"/m/0bt9lr,Dog\n"})
    assert cached.curate() == first
    assert len(counted.copied) == 6
    before = sorted(path.name for path in tmp_path.iterdir())
    assert source_of("counted://kept", splits=("train",)).curate() == first
    assert len(counted.copied) == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "mask",
    [
        "../../../etc/passwd",
        f"{IDS['test']}_m04yx4_0a0b0c0d.png",
        f"{IDS['train']}_m04yx4_0a0b0c0d.png/../x.png",
        "other.png",
    ],
)
def test_only_masks_of_the_image_itself_are_read(mirror: str, mask: str) -> None:
    """A name that is no mask name of this image is refused before any file is touched."""
    source = source_of(mirror)
    record = record_of(mirror)
    forged = replace(record, instances=(replace(record.instances[0], mask=mask),))
    with pytest.raises(Rejected, match=r"^unreadable-mask: .* is not the name of a mask"):
        source.read_mask(forged, 0)


def test_missing_masks_and_archives_are_missing_masks(mirror: str) -> None:
    source = source_of(mirror)
    record = record_of(mirror)
    gone = InstanceRecord("00000000", "Man", (0, 0, 1, 1), f"{record.id}_m04yx4_00000000.png")
    for case in (replace(record, instances=(gone,)), replace(record, split="test")):
        with pytest.raises(Rejected) as caught:
            source.read_mask(case, 0)
        assert caught.value.reason == "missing-mask"


def damaged(data: bytes, how: str) -> bytes:
    if how == "cut":
        return data[: len(data) // 2]
    if how == "content":
        at = data.index(b"IHDR")
        return data[:at] + b"XXXX" + data[at + 4 :]
    if how == "offset":
        at = data.index(b"PK\1\2")
        return data[: at + 42] + (7).to_bytes(4, "little") + data[at + 46 :]
    return b"no archive at all"


@pytest.mark.parametrize("how", ["cut", "content", "offset", "text"])
def test_a_damaged_archive_is_an_unreadable_mask(mirror: str, how: str) -> None:
    source = source_of(mirror)
    record = record_of(mirror)
    path = Path(mirror, f"v5/train-masks/train-masks-{record.id[0]}.zip")
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(Rejected) as caught:
        source.read_mask(record, 0)
    assert caught.value.reason == "unreadable-mask"


def test_compressed_archives_are_read(mirror: str) -> None:
    source = source_of(mirror)
    record = record_of(mirror)
    path = Path(mirror, f"v5/train-masks/train-masks-{record.id[0]}.zip")
    path.write_bytes(archive({record.instances[0].mask: png(MASK)}, zipfile.ZIP_DEFLATED))
    assert np.array_equal(source.read_mask(record, 0), MASK)


def test_a_missing_picture_is_rejected(mirror: str) -> None:
    source = source_of(mirror)
    record = record_of(mirror)
    Path(record.image).unlink()
    with pytest.raises(Rejected, match=r"^not-found"):
        source.read_image(record)


def read(pickled: bytes) -> bool:
    source, record = pickle.loads(pickled)
    return np.array_equal(source.read_mask(record, 0), MASK)


@pytest.mark.process
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_masks_are_read_in_other_processes(mirror: str, method: str) -> None:
    """After the parent has opened the archive, too, and from several threads of each."""
    source = source_of(mirror)
    record = record_of(mirror)
    with ThreadPoolExecutor(4) as threads:
        assert all(np.array_equal(mask, MASK) for mask in threads.map(source.read_mask, [record] * 8, [0] * 8))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as processes:
        assert all(processes.map(read, [pickle.dumps((source, record))] * 4))


def test_pictures_on_s3_are_read_anonymously_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public bucket asks for no credentials; options that are given replace that."""
    seen: list[dict[str, Any]] = []

    def spy(url: str, settings: FetchSettings, options: dict[str, Any]) -> bytes:
        seen.append(options)
        return url.encode()

    monkeypatch.setattr("dataset_tools.sources.openimages.read_bytes", spy)
    record = ImageRecord(IDS["test"], "openimages", "test", "people", "one", "s3://open-images-dataset/x.jpg")
    assert OpenImagesSettings().open().read_image(record) == record.image.encode()
    OpenImagesSettings(images_options={"profile": "me"}).open().read_image(record)
    OpenImagesSettings(images="/mirror").open().read_image(record)
    assert seen == [{"anon": True}, {"profile": "me"}, {}]


@pytest.mark.slow
def test_tables_are_found_with_one_request_each_and_asked_for_once(
    mirror: str, tmp_path: Path, serve_files: Callable[..., Any]
) -> None:
    """13 tables over HTTP: what was found goes with the settings to whoever curates, and each is then fetched once."""
    server = serve_files(Path(mirror))
    settings = OpenImagesSettings(root=f"{server.url}/", images=server.url, fetch=QUICK)
    source = settings.open()
    found = source.tables()
    assert len(found) == 13
    assert Counter(server.asked) == {("HEAD", f"/{name}"): 1 for name in found}
    again = pickle.loads(pickle.dumps(settings)).open(json.loads(json.dumps(found)))
    assert again.fingerprint() == source.fingerprint()
    server.asked.clear()
    records = again.curate().records
    assert [replace(r, image="") for r in records] == [replace(r, image="") for r in source_of(mirror).curate().records]
    assert Counter(server.asked) == {("GET", f"/{name}"): 1 for name in found}


def test_a_store_that_lists_is_asked_for_each_folder_once(monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []

    class Listing(MemoryFileSystem):
        protocol = "listing"

        def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
            listed.append(path)
            return super().ls(path, detail=detail, **kwargs)

    fsspec.register_implementation("listing", Listing, clobber=True)
    write("listing://listed", mirror_files())
    listed.clear()
    monkeypatch.setattr(Listing, "info", None)
    assert len(source_of("listing://listed").tables()) == 13
    assert len(listed) == len(set(listed)) == 6


@pytest.mark.parametrize("place", ["disk", "store"])
def test_what_a_record_names_is_noticed_when_it_is_replaced(mirror: str, place: str) -> None:
    """Pictures and archives of masks on a disk by size and time; in a store that lists its folders archives alone."""
    root = mirror
    if place == "store":
        root = "memory://replaced"
        write(root, mirror_files())
    record = record_of(root)
    before = source_of(root).state(record)
    assert before == source_of(root).state(record) != ["", ""]
    archive = f"v5/train-masks/train-masks-{record.id[0]}.zip"
    write(root, {archive: mirror_files()[archive] + b" "})
    replaced = source_of(root).state(record)
    assert replaced[0] == before[0] and replaced[1] != before[1]
    write(root, {f"images/train/{record.id}.jpg": b"another"})
    assert (source_of(root).state(record)[0] != before[0]) is (place == "disk")


def test_parquet_alone_is_found_where_nothing_can_be_listed(mirror: str, serve_files: Callable[..., Any]) -> None:
    path = Path(mirror, TABLES["train"]["boxes"])
    path.rename(path.with_suffix(".parquet"))
    server = serve_files(Path(mirror))
    source = OpenImagesSettings(root=server.url, splits=("train",), fetch=QUICK).open()
    assert TABLES["train"]["boxes"].replace(".csv", ".parquet") in source.tables()
    assert len(server.asked) == 6


@pytest.mark.slow
def test_a_table_that_its_server_cut_is_not_used_and_not_kept(
    mirror: str, tmp_path: Path, serve_files: Callable[..., Any]
) -> None:
    """Later, whole again, it is; and a copy that was kept short by others is fetched anew."""
    server = serve_files(Path(mirror))
    cache = tmp_path / "cache"
    settings = OpenImagesSettings(root=server.url, images=server.url, cache=str(cache), splits=("train",), fetch=QUICK)
    source = settings.open()
    server.cut = 3
    with pytest.raises(UserError, match=r"bytes came, of \d+"):
        source.curate()
    assert list(cache.iterdir()) == []
    server.cut = 0
    records = source.curate().records
    assert len(records) == 2
    for copy in cache.iterdir():
        copy.write_bytes(copy.read_bytes()[:-3])
    assert source.curate().records == records


def test_a_cache_that_cannot_be_written_is_named(mirror: str, tmp_path: Path, serve_files: Callable[..., Any]) -> None:
    (tmp_path / "file").write_text("")
    server = serve_files(Path(mirror))
    source = OpenImagesSettings(root=server.url, cache=f"{tmp_path}/file/cache", fetch=QUICK).open()
    with pytest.raises(UserError, match=f"^{tmp_path}/file/cache cannot take the table"):
        source.curate()


@pytest.mark.slow
def test_lines_may_end_in_crlf_here_and_there(mirror: str) -> None:
    """In one row, in every one, or in the header alone: the same records, and nothing set aside."""
    source = source_of(mirror, splits=("train",))
    expected = source.curate()
    tables = [Path(mirror, name) for name in TABLES["train"].values()]
    lines = {table: table.read_bytes().splitlines() for table in tables}
    for crlf in ("first", "one", "last", "all", "header"):
        for table in tables:
            count = len(lines[table])
            marked = {"first": {1}, "one": {count // 2}, "last": {count - 1}, "header": {0}}
            chosen = marked.get(crlf, set(range(count)))
            table.write_bytes(
                b"".join(line + (b"\r\n" if k in chosen else b"\n") for k, line in enumerate(lines[table]))
            )
        assert source.curate() == expected, crlf


def test_rows_with_faults_are_named_where_lines_end_in_two_ways(mirror: str) -> None:
    """The row of the fault has the number that an editor shows."""
    path = Path(mirror, TABLES["train"]["boxes"])
    good = path.read_bytes().splitlines()[1]
    bad = good.replace(b"0.1,0.5", b"0.7,0.5")
    path.write_bytes(path.read_bytes() + good.replace(b"0.9", b"0.8") + b"\r\n" + bad + b"\r\n" + bad[:30] + b"\r\n")
    rejected = source_of(mirror).curate().rejected
    assert {(r.reason, r.message.split(":")[0]) for r in rejected} == {
        ("bad-box", f"{TABLES['train']['boxes']}, line 4"),
        ("missing-column", f"{TABLES['train']['boxes']}, line 5"),
    }


ODD = [
    b"caf\xc3\xa9.png",
    b"caf\xe9.png",
    b"\xff\xfe.png",
    b"\xe5\x9b\xbe/\xe7\x89\x87.png",
    b"a" * 300 + b".png",
    b"dir/",
]


@pytest.mark.parametrize("utf8", [False, True])
def test_members_with_odd_names_do_not_cost_the_others(mirror: str, utf8: bool) -> None:
    """Whatever they are, and whether or not the archive says that they are UTF-8."""
    source, record = source_of(mirror), record_of(mirror)
    stand_ins = ["UVWXYZ"[number] * len(name) for number, name in enumerate(ODD)]
    data = archive({**dict.fromkeys(stand_ins, b"?"), record.instances[0].mask: png(MASK)})
    for stand_in, name in zip(stand_ins, ODD, strict=True):
        if utf8:
            at = data.index(stand_in.encode(), data.index(b"PK\1\2")) - 46
            data = data[: at + 8] + (0x800).to_bytes(2, "little") + data[at + 10 :]
        data = data.replace(stand_in.encode(), name)
    Path(mirror, f"v5/train-masks/train-masks-{record.id[0]}.zip").write_bytes(data)
    assert np.array_equal(source.read_mask(record, 0), MASK)


def test_archives_of_every_make_are_read(mirror: str) -> None:
    """With a comment, with something before them, and with the fields of ZIP64."""
    source, record = source_of(mirror), record_of(mirror)
    path = Path(mirror, f"v5/train-masks/train-masks-{record.id[0]}.zip")
    member = record.instances[0].mask
    with zipfile.ZipFile(path, "w") as file:
        file.comment = b"PK\5\6 is how an end begins"[2:] * 20
        file.writestr(member, png(MASK))
    assert np.array_equal(source.read_mask(record, 0), MASK)
    path.write_bytes(b"#!/bin/sh\n" * 50 + archive({member: png(MASK)}))
    assert np.array_equal(source.read_mask(record, 0), MASK)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ZIP64_LIMIT", "ZIP_FILECOUNT_LIMIT"):
            patch.setattr(zipfile, name, 1)
        path.write_bytes(archive({"other.png": b"?" * 99, member: png(MASK)}, zipfile.ZIP_DEFLATED))
    assert b"PK\6\6" in path.read_bytes()
    assert np.array_equal(source.read_mask(record, 0), MASK)


def test_masks_come_over_http_by_parts_of_their_archive(mirror: str, serve_files: Callable[..., Any]) -> None:
    server = serve_files(Path(mirror))
    filler = np.random.default_rng(0).bytes(100_000)
    record = record_of(mirror)
    path = Path(mirror, f"v5/train-masks/train-masks-{record.id[0]}.zip")
    path.write_bytes(archive({**{f"{i}.png": filler for i in range(50)}, record.instances[0].mask: png(MASK)}))
    fetch = QUICK.model_copy(update={"allow_private_addresses": True})
    source = OpenImagesSettings(root=f"{server.url}//", fetch=fetch).open()
    for _ in range(3):
        assert np.array_equal(source.read_mask(record, 0), MASK)
    assert server.sent < 100_000


def test_masks_over_a_server_without_ranges_are_refused_with_the_reason(
    mirror: str, serve_files: Callable[..., Any]
) -> None:
    """Not a whole archive for every mask; and the archive may be served otherwise later."""
    server = serve_files(Path(mirror), ranges=False)
    fetch = FetchSettings(attempts=3, backoff_seconds=0, allow_private_addresses=True)
    source = OpenImagesSettings(root=server.url, fetch=fetch).open()
    with pytest.raises(Rejected, match="ignores range requests") as caught:
        source.read_mask(record_of(mirror), 0)
    assert (caught.value.reason, caught.value.transient) == ("no-ranges", True)
    assert [method for method, _ in server.asked].count("GET") == 1


@pytest.mark.parametrize("how", ["cut", "text", "gone"])
def test_an_archive_that_cannot_be_read_settles_none_of_its_masks(mirror: str, how: str) -> None:
    """A mask that the archive lacks, or whose own bytes are wrong, is settled; many at once are not."""
    source, record = source_of(mirror), record_of(mirror)
    path = Path(mirror, f"v5/train-masks/train-masks-{record.id[0]}.zip")
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(Rejected) as caught:
        source.read_mask(record, 0)
    assert caught.value.transient


@pytest.mark.slow
@pytest.mark.parametrize("slashes", ["/", "//"])
def test_slashes_at_the_end_of_a_root_change_nothing(
    mirror: str, serve_files: Callable[..., Any], slashes: str
) -> None:
    server = serve_files(Path(mirror))
    fetch = QUICK.model_copy(update={"allow_private_addresses": True})
    plain, slashed = (
        OpenImagesSettings(
            root=f"{server.url}{end}", images=f"{server.url}/images{end}", splits=("train",), fetch=fetch
        ).open()
        for end in ("", slashes)
    )
    assert slashed.fingerprint() == plain.fingerprint()
    curation = slashed.curate()
    assert curation == plain.curate()
    assert slashed.read_image(curation.records[0]) == b"picture " + curation.records[0].id.encode()
