"""A web list becomes a dataset: what fails is named, what fails for a while is tried again alone."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from dataset_tools.drawn_world import draw_scene
from dataset_tools.errors import UserError
from dataset_tools.shards import ShardDataset, read_manifest, verify
from flows.build_dataset import build_dataset, check_build

pytestmark = [pytest.mark.usefixtures("prefect_server", "no_download_limit"), pytest.mark.slow]


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
        rows.writerow(["url", "licence", "author", "split"])
        rows.writerows([url, "CC BY 4.0", f"Ada {number}", "train"] for number, url in enumerate(urls))
        rows.writerow([strangers.url("/unlicensed"), "", "", ""])
    web = {"allow_private_addresses": True, "attempts": 1}
    settings = {
        "name": "listed",
        "source": {"kind": "weblist", "urls": str(tmp_path / "list.csv"), "web": web},
        "instances": {"kind": "transformers", "weights": "drawn-people", "batch_size": 4},
        "max_rejected_share": 0.5,
    }
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "build.yaml"


def urls_of(output: Path) -> dict[str, str]:
    """Author by the last part of the URL."""
    held = ShardDataset(str(output), "real", "train")
    return {sample.origins[0].url.rpartition("/")[2]: sample.origins[0].author for sample in held}


def test_what_failed_for_a_while_is_tried_again_alone_and_the_bytes_are_those_of_a_run_without_failures(
    recipe: Path, strangers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.weblist_steps.URLS_PER_STEP", 3)
    good, strangers.answers["/three"] = strangers.answers["/three"], 503
    output = tmp_path / "dataset"
    build_dataset(str(recipe), str(output))
    assert urls_of(output) == {"one": "Ada 0", "two": "Ada 1"}
    rows = pq.read_table(output / "rejected.parquet").to_pylist()
    assert {(row["image_id"].rpartition("/")[2], row["reason"]) for row in rows if row["stage"] != "mask"} == {
        ("three", "http-error"),
        ("copy", "duplicate-image"),
        ("alike", "near-duplicate"),
        ("page", "not-an-image"),
        ("noai", "header-disallowed"),
        ("gone", "not-found"),
        ("two", "robots-disallowed"),
        ("unlicensed", "no-licence"),
    }
    assert len(strangers.asked) == len(set(strangers.asked)) == 9
    assert not any("closed" in asked or "unlicensed" in asked for asked in strangers.asked)

    strangers.asked.clear()
    strangers.answers["/three"] = good
    build_dataset(str(recipe), str(output))
    assert strangers.asked == ["a.example/three"]
    assert urls_of(output) == {"one": "Ada 0", "two": "Ada 1", "three": "Ada 2"}
    assert list(verify(str(output))) == []

    strangers.asked.clear()
    summary = build_dataset(str(recipe), str(output))
    assert (strangers.asked, summary["cached"]) == ([], summary["shards"])
    undisturbed = build_dataset(str(recipe), str(tmp_path / "undisturbed"))
    assert undisturbed["digest"] == summary["digest"]
    assert "list.csv" not in str(read_manifest(str(output)).settings)


def test_a_web_list_without_a_network_that_finds_people_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a web list has no masks"):
        check_build(str(recipe), str(tmp_path / "dataset"), {"instances": None})
    with pytest.raises(UserError, match="does not exist"):
        check_build(str(recipe), str(tmp_path / "dataset"), {"source.urls": str(tmp_path / "none.csv")})
