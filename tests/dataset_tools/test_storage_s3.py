"""Storage on S3: a server on loopback that fails as stores do."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fsspec.asyn import get_loop
from PIL import Image
from s3fs import S3FileSystem

from dataset_tools.curated import CuratedSettings, photographs
from dataset_tools.errors import UserError, what_to_mend
from dataset_tools.fetch import FetchSettings, read_bytes
from dataset_tools.photo_masks import Place
from dataset_tools.records import ImageRecord, Rejection
from dataset_tools.schema import EncodingSettings, Sample
from dataset_tools.shards import ShardDataset, is_intact, read_manifest, verify, write_shard
from dataset_tools.storage import (
    abort_uploads,
    check_writable,
    is_unaltered,
    open_root,
    sha256_of_file,
    tag_of,
    write_bytes,
    written_whole,
)

PART = 1 << 10
"""Bytes."""


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are uploaded in small parts, which S3 itself would not take."""
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: PART)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", PART)


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that botocore and s3fs wanted to wait before they asked again; they do not."""
    seconds: list[float] = []
    sleep = asyncio.sleep

    async def at_once(delay: float, result: Any = None) -> Any:
        if asyncio.get_running_loop() is not get_loop():  # of something else
            return await sleep(delay, result)
        seconds.append(delay)
        return await sleep(0, result)

    monkeypatch.setattr(asyncio, "sleep", at_once)
    return seconds


@pytest.fixture
def other(object_store: Any) -> S3FileSystem:
    """The store as another process sees it: an instance of its own, as no other has this option."""
    return S3FileSystem(use_listings_cache=False, max_concurrency=9)


def begun_uploads(other: S3FileSystem, bucket: str) -> list[str]:
    found = other.call_s3("list_multipart_uploads", Bucket=bucket.removeprefix("s3://"))
    return [upload["Key"] for upload in found.get("Uploads", [])]


# What is written ----------------------------------------------------------------------------------------------------


def test_a_shard_is_found_intact_read_and_found_altered(
    bucket: str, make_sample: Callable[..., Sample], other: S3FileSystem
) -> None:
    sample = make_sample()
    shard = write_shard([sample], f"{bucket}/data", "composite/train-000000.tar", EncodingSettings(), [])
    assert is_intact(f"{bucket}/data", shard)
    read = ShardDataset.of_shards(f"{bucket}/data", [shard])
    assert read.keys == [sample.key] and np.array_equal(read[0].people[1].mask, sample.people[1].mask)
    other.pipe_file(f"{bucket}/data/{shard.path}", b"broken")
    assert not is_intact(f"{bucket}/data", shard)


def test_a_dataset_that_was_copied_there_is_read_and_verified_though_listings_know_nothing_of_it_yet(
    bucket: str, object_store: Any, other: S3FileSystem, drawn_dataset: str
) -> None:
    """Readers go by the manifest, and what was built on a disk is intact where it was copied to."""
    other.put(f"{drawn_dataset}/", f"{bucket}/data/", recursive=True)
    object_store.lists_nothing = True
    manifest = read_manifest(f"{bucket}/data")
    assert manifest == read_manifest(drawn_dataset)
    assert list(verify(f"{bucket}/data")) == []
    listed = [shard for splits in manifest.shards.values() for shards in splits.values() for shard in shards]
    assert len(listed) == 2 and all(is_intact(f"{bucket}/data", shard) for shard in listed)


def test_what_other_processes_write_and_delete_is_seen(bucket: str, other: S3FileSystem) -> None:
    """fsspec would answer from its last listing."""
    filesystem, base = open_root(f"{bucket}/data")
    other.pipe_file(f"{base}/a", b"a")
    assert filesystem.find(base) == [f"{base}/a"] and len(filesystem.ls(base)) == 1
    other.pipe_file(f"{base}/b", b"b")
    other.rm_file(f"{base}/a")
    assert filesystem.exists(f"{base}/b") and not filesystem.exists(f"{base}/a")
    assert filesystem.find(base) == filesystem.ls(base, detail=False) == [f"{base}/b"]


def test_whoever_may_write_objects_and_nothing_else_writes_them(bucket: str, object_store: Any) -> None:
    """Asked for folders, libraries of stores look for the bucket, and make it."""
    allowed = ("PUT /", "DELETE /")
    object_store.refuse = lambda asked: (
        None if asked.startswith(allowed) and "/data/" in asked else (403, "AccessDenied")
    )
    check_writable(f"{bucket}/data")
    filesystem, base = open_root(f"{bucket}/data")
    write_bytes(filesystem, f"{base}/folder/file", b"whole")
    object_store.refuse = lambda asked: None
    assert filesystem.cat_file(f"{base}/folder/file") == b"whole"


def test_a_file_in_parts_stands_whole_or_not_at_all(
    bucket: str, object_store: Any, other: S3FileSystem, parts: None
) -> None:
    """And nothing of it is kept by the store, unseen and paid for."""
    filesystem, path = open_root(f"{bucket}/data/file")
    with written_whole(filesystem, path) as partial:
        partial.write_bytes(bytes(2 * PART))
        assert not other.exists(path)
    assert other.info(path)["size"] == 2 * PART
    object_store.refuse = lambda asked: (400, "InvalidRequest") if "partNumber=2" in asked else None
    with pytest.raises(OSError, match="Told to say InvalidRequest"), written_whole(filesystem, path) as partial:
        partial.write_bytes(bytes(3 * PART))
    assert other.info(path)["size"] == 2 * PART
    assert begun_uploads(other, bucket) == []


def test_uploads_that_killed_processes_had_begun_are_given_up_and_no_others(bucket: str, other: S3FileSystem) -> None:
    for key in ("data/file", "data/folder/file", "data.work/file", "others/file"):
        other.call_s3("create_multipart_upload", Bucket=bucket.removeprefix("s3://"), Key=key)
    abort_uploads(f"{bucket}/data")
    assert sorted(begun_uploads(other, bucket)) == ["data.work/file", "others/file"]
    abort_uploads(f"{bucket}/nothing")


@pytest.mark.parametrize("kind", ["in parts", "encrypted"])
def test_a_tag_that_is_no_digest_tells_what_is_unaltered_without_reading_it(
    bucket: str, object_store: Any, other: S3FileSystem, parts: None, kind: str
) -> None:
    """Of uploads in parts it is another kind of digest, with encryption by own keys none at all."""
    if kind == "encrypted":
        object_store.tag_of = lambda tag: f'"{tag[1:-1][::-1]}"'
    filesystem, path = open_root(f"{bucket}/data/file")
    size = 2 * PART if kind == "in parts" else 10
    sha256 = write_bytes(filesystem, path, bytes(size))
    tag = tag_of(filesystem, path)
    assert tag is not None and ("-" in tag) == (kind == "in parts")
    object_store.asked.clear()
    assert is_unaltered(filesystem, path, sha256, tag)
    assert [asked.split()[0] for asked in object_store.asked] == ["HEAD"]
    assert is_unaltered(filesystem, path, sha256, f"{size}:of another store")
    assert sha256_of_file(filesystem, path) == sha256
    other.pipe_file(path, b"x" * size)
    assert not is_unaltered(filesystem, path, sha256, tag)


# What goes wrong ----------------------------------------------------------------------------------------------------


def test_a_store_that_asks_to_slow_down_is_waited_for(bucket: str, object_store: Any, waited: list[float]) -> None:
    """In whatever is asked of it; an answer to HEAD has no body that says so."""
    filesystem, path = open_root(f"{bucket}/data/file")
    count = itertools.count(1)
    object_store.refuse = lambda asked: (503, "SlowDown") if next(count) % 5 else None
    write_bytes(filesystem, path, b"whole")
    assert filesystem.exists(path) and filesystem.cat_file(path) == b"whole" and filesystem.find(path) == [path]
    assert {asked.split()[0] for asked in object_store.asked} == {"PUT", "HEAD", "GET"}
    assert next(count) > 20 and sum(waited) > 1


EXPIRED = (400, "ExpiredToken")
"""What S3 answers; to HEAD without the code, as that has no body."""


def test_credentials_that_expire_between_two_pictures_end_the_run_and_reject_none(
    bucket: str, object_store: Any, other: S3FileSystem, tmp_path: Path
) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    records = []
    for number in range(3):
        other.put_file(str(tmp_path / "x.png"), f"{bucket}/{number}.png")
        records.append(ImageRecord(str(number), "s", "train", "people", "one", f"{bucket}/{number}.png"))
    source: Any = SimpleNamespace(
        read_image=lambda record: read_bytes(record.image, FetchSettings(backoff_seconds=0)),
        applies_exif=True,
        places=(),
    )
    rejected: list[Rejection] = []
    read = photographs(records, source, CuratedSettings(fetch_workers=1), rejected)
    object_store.refuse = lambda asked: None if asked.endswith("/0.png") else EXPIRED
    assert next(read).record.id == "0"
    with pytest.raises(UserError, match=r"1\.png: .*ExpiredToken.* renew the credentials and start again") as told:
        next(read)
    assert rejected == [] and "\n" not in str(told.value)


@pytest.mark.parametrize("read", [lambda place: Place(place).read("mask.png"), read_manifest], ids=["mask", "manifest"])
def test_credentials_that_have_expired_are_told_by_whatever_reads(
    bucket: str, object_store: Any, read: Callable[[str], Any]
) -> None:
    object_store.refuse = lambda asked: EXPIRED
    with pytest.raises(UserError, match="credentials have expired: renew the credentials and start again") as told:
        read(f"{bucket}/data")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("answer", "cure"),
    [
        (EXPIRED, "renew the credentials"),
        ((403, "InvalidAccessKeyId"), "AWS_ACCESS_KEY_ID"),
        ((403, "SignatureDoesNotMatch"), "AWS_SECRET_ACCESS_KEY"),
        ((403, "AccessDenied"), "PutObject.*give these credentials the permission"),
        ((404, "NoSuchBucket"), "make the bucket first, or correct its name"),
        ((400, "AuthorizationHeaderMalformed"), "AWS_DEFAULT_REGION"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_what_the_user_must_mend_at_the_store_is_one_line_that_says_how(
    bucket: str, object_store: Any, answer: tuple[int, str], cure: str
) -> None:
    object_store.refuse = lambda asked: answer
    with pytest.raises(UserError, match=f"output {bucket}/data cannot be written: .*{cure}") as told:
        check_writable(f"{bucket}/data")
    assert "\n" not in str(told.value)
    with pytest.raises(OSError, match="Told to say") as caught:  # a step that writes, later
        write_bytes(*open_root(f"{bucket}/data/file"), b"x")
    assert (what_to_mend(caught.value) or "").endswith(str(told.value).partition("written: ")[2])


def test_a_bucket_that_is_not_there_is_not_made_and_not_taken_for_an_unfinished_dataset(
    object_store: Any, other: S3FileSystem
) -> None:
    for use in (check_writable, read_manifest):
        with pytest.raises(UserError, match=r"does not exist.*make the bucket first, or correct its name"):
            use("s3://never-made/data")
    with pytest.raises(FileNotFoundError):
        write_bytes(*open_root("s3://never-made/data/file"), b"x")
    assert "never-made" not in other.ls("")


def test_credentials_that_were_not_given_are_asked_for(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    S3FileSystem.clear_instance_cache()
    for use in (check_writable, read_manifest, lambda place: read_bytes(place, FetchSettings())):
        with pytest.raises(UserError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"):
            use(f"{bucket}/data")
    S3FileSystem.clear_instance_cache()
