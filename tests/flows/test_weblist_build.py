"""A web list becomes a dataset: what fails is named, what fails for a while is tried again alone."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from prefect import flow

from dataset_tools.drawn_world import draw_scene
from dataset_tools.errors import UserError
from dataset_tools.shards import ShardDataset, read_manifest, verify
from dataset_tools.sources.weblist import DownloadedSettings, WeblistSettings
from flows.build_dataset import build_dataset, check_build
from flows.caching import Job, result_storage, run_steps
from flows.settings import BuildSettings
from flows.weblist_steps import by_host, fetch_weblist

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.slow]


REJECTED = {
    ("copy", "duplicate-image"),
    ("alike", "near-duplicate"),
    ("page", "not-an-image"),
    ("noai", "header-disallowed"),
    ("gone", "not-found"),
    ("two", "robots-disallowed"),
    ("unlicensed", "no-licence"),
}


def jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture
def recipe(tmp_path: Path, strangers: Any) -> Path:
    """A list of good pictures and of all that may be wrong with one, and settings that read it."""
    one, two, three = (draw_scene(f"weblist-{number}", 9, (256, 256), 2).image for number in range(3))
    strangers.answers |= {
        "/one": (302, {"Location": strangers.url("/one.jpg", "cdn.example")}, b""),
        "/one.jpg": jpeg(one),
        "/two": jpeg(two),
        "/three": jpeg(three),
        "/copy": jpeg(two),
        "/alike": jpeg(two, 60),
        "/page": (200, {"Content-Type": "image/jpeg"}, b"<html>"),
        "/noai": (200, {"X-Robots-Tag": "noai"}, jpeg(one)),
    }
    strangers.robots["closed.example"] = b"User-agent: *\nDisallow: /"
    names = ["one", "two", "three", "copy", "alike", "page", "noai", "gone"]
    urls = [strangers.url(f"/{name}", f"{'ab'[number % 2]}.example") for number, name in enumerate(names)]
    urls.append(strangers.url("/two", "closed.example"))
    with (tmp_path / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["url", "licence", "author", "title", "split"])
        for number, url in enumerate(urls):
            rows.writerow([url, "CC BY 4.0", f"Ada {number}", url.rpartition("/")[2], "train"])
        rows.writerow([strangers.url("/unlicensed"), "", "", "", ""])
    web = {"allow_private_addresses": True, "attempts": 1}
    settings = {
        "name": "listed",
        "source": {"kind": "weblist", "urls": str(tmp_path / "list.csv"), "web": web},
        "instances": {"kind": "transformers", "weights": "drawn-people", "batch_size": 4},
        "max_rejected_share": 0.5,
    }
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "build.yaml"


@flow(persist_result=False)
def fetch(settings: BuildSettings, work: str) -> DownloadedSettings:
    """The part of `build_dataset` that fetches."""

    def run(step: Any, jobs: Sequence[Job]) -> list[Any]:
        return [outcome.result for outcome in run_steps(step, jobs, result_storage(work))]

    assert isinstance(settings.source, WeblistSettings)
    return fetch_weblist(settings.source, {"root": "", "work": work}, run)


def test_what_failed_for_a_while_is_tried_again_alone_and_all_is_as_without_failures(
    recipe: Path, strangers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.weblist_steps.URLS_PER_STEP", 3)
    settings = BuildSettings.load(recipe)
    good, strangers.answers["/three"] = strangers.answers["/three"], 503
    found = fetch(settings, str(tmp_path / "work")).open().curate()
    assert [record.title for record in found.records] == ["one", "two"]
    assert {(row.image_id.rpartition("/")[2], row.reason) for row in found.rejected} == REJECTED | {
        ("three", "http-error")
    }
    assert len(strangers.asked) == len(set(strangers.asked)) == 9
    assert not any("closed" in asked or "unlicensed" in asked for asked in strangers.asked)

    strangers.asked.clear()
    strangers.answers["/three"] = good
    again = fetch(settings, str(tmp_path / "work"))
    assert strangers.asked == ["a.example/three"]
    records = again.open().curate().records
    assert [(record.title, record.author) for record in records] == [
        ("one", "Ada 0"),
        ("two", "Ada 1"),
        ("three", "Ada 2"),
    ]

    strangers.asked.clear()
    assert fetch(settings, str(tmp_path / "work")) == again
    assert strangers.asked == []
    undisturbed = fetch(settings, str(tmp_path / "undisturbed"))
    assert undisturbed.downloads == again.downloads
    assert len(strangers.asked) == 9


def test_all_of_one_host_are_in_one_step_whatever_else_is_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.weblist_steps.URLS_PER_STEP", 5)
    urls = [f"http{'s' * (n % 2)}://h{n % 7}.example/{n}" for n in range(70)]
    shares = by_host(urls)
    assert sorted(url for share in shares for url in share) == sorted(urls)
    hosts = [{url.partition("://")[2].partition("/")[0] for url in share} for share in shares]
    assert 2 < len(shares) <= 7 and sum(map(len, hosts)) == len(set().union(*hosts)) == 7


def test_a_web_list_becomes_a_dataset(recipe: Path, strangers: Any, tmp_path: Path) -> None:
    """A network finds the people; licence, author and URL of each row are with its picture."""
    output = tmp_path / "dataset"
    build_dataset(str(recipe), str(output))
    held = ShardDataset(str(output), "real", "train")
    origins = [sample.origins[0] for sample in held]
    assert [(origin.title, origin.author, origin.licence) for origin in origins] == [
        (name, f"Ada {number}", "CC BY 4.0") for number, name in enumerate(("one", "two", "three"))
    ]
    assert {origin.sha256 for origin in origins} == {
        hashlib.sha256(strangers.answers[f"/{name}"]).hexdigest() for name in ("one.jpg", "two", "three")
    }
    assert all(sample.people for sample in held)
    rows = pq.read_table(output / "rejected.parquet").to_pylist()
    assert {(row["image_id"].rpartition("/")[2], row["reason"]) for row in rows} >= REJECTED
    assert list(verify(str(output))) == []
    recorded = read_manifest(str(output)).settings["source"]
    assert recorded["web"]["robots"] and "urls" not in recorded and "attempts" not in recorded["web"]
    asked = len(strangers.asked)
    summary = build_dataset(str(recipe), str(output))
    assert (len(strangers.asked), summary["cached"]) == (asked, summary["shards"])


def test_a_web_list_without_a_network_that_finds_people_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a web list has no masks"):
        check_build(str(recipe), str(tmp_path / "dataset"), {"instances": None})
    with pytest.raises(UserError, match="does not exist"):
        check_build(str(recipe), str(tmp_path / "dataset"), {"source.urls": str(tmp_path / "none.csv")})
