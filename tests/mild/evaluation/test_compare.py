from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from mild.evaluation.compare import _differences, _mean, evaluate
from mild.metrics import METRICS, psnr_hole
from mild.settings import EvaluateSettings

pytestmark = pytest.mark.slow

NO_BASE = "no/base"


def _silent(done: int) -> None:
    pass


class Page(HTMLParser):
    """What a page refers to, and its pictures and headers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.headers: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "img":
            self.images.append(values)
        if tag == "th":
            self.headers.append(values)


@pytest.fixture(scope="module")
def finished(
    nano_base: str,
    adapters: Path,
    tmp_path_factory: pytest.TempPathFactory,
    make_sample: Callable[..., Sample],
    in_memory: Callable[..., Any],
) -> Path:
    """All methods on three samples."""
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    settings = EvaluateSettings(samples=3, inference_steps=2, resolution=32, resamples=200)
    data = in_memory([make_sample(index) for index in range(5)])
    evaluate(
        settings, data, nano_base, str(adapters), str(folder), _silent, dataset_digest="feed", command="mild <evaluate>"
    )
    return folder


def test_there_is_a_row_a_sample_and_method_with_the_metrics_of_the_pictures(finished: Path) -> None:
    rows = pq.read_table(finished / "samples.parquet").to_pylist()
    keys = sorted({row["key"] for row in rows})
    assert [(row["key"], row["method"]) for row in rows] == [
        (key, m) for key in keys for m in EvaluateSettings().methods
    ]
    assert len(keys) == 3
    for row in rows:
        folder = finished / "pictures" / row["key"] / "exact"
        result, truth, mask = (np.asarray(Image.open(folder / f"{n}.png")) for n in (row["method"], "truth", "mask"))
        assert row["psnr_hole"] == psnr_hole(result, truth, mask > 0)
        assert row["hole_share"] == pytest.approx((mask > 0).mean())
        assert row["seconds"] > 0
        assert row["not_computed"] == []
        assert (folder / "before.png").is_file()


def test_the_summary_holds_the_means_and_intervals_around_them(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    rows = pq.read_table(finished / "samples.parquet").to_pylist()
    assert (summary["samples"], summary["available_samples"], summary["dataset"]) == (3, 5, "feed")
    for method, values in summary["groups"][0]["methods"].items():
        for metric in METRICS:
            expected = [row[metric.name] for row in rows if row["method"] == method]
            assert values[metric.name]["mean"] == pytest.approx(np.mean(expected))
            ordered = [min(expected), *(values[metric.name][name] for name in ("low", "mean", "high")), max(expected)]
            assert np.diff(ordered).min() >= -1e-9
    own = summary["groups"][0]["methods"]["mild"]
    for method, differences in summary["groups"][0]["mild_minus"].items():
        for name, found in differences.items():
            expected = own[name]["mean"] - summary["groups"][0]["methods"][method][name]["mean"]
            assert found["mean"] == pytest.approx(expected)
            assert found["low"] <= found["mean"] <= found["high"]
    assert set(summary["groups"][0]["mild_minus"]) == set(summary["groups"][0]["methods"]) - {"mild"}


def test_the_report_needs_nothing_but_itself_and_can_be_read_aloud(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    page = Page(text)
    assert page.references and all(reference.startswith("data:image/") for reference in page.references)
    assert not {"script", "link", "iframe", "object"} & page.tags
    assert "url(" not in text and "@import" not in text
    assert len(page.images) == 3 * (3 + 4) and all(image["alt"] for image in page.images)
    assert page.headers and all(header["scope"] in ("row", "col") for header in page.headers)
    assert "svg" in page.tags, "the loss curve of the adapters"


def test_the_report_names_where_it_comes_from_and_escapes_it(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    for fact in ("feed", "mild &lt;evaluate&gt;", "Nano base: SDXL inpainting", "MILD", "OpenCV Telea", "torch"):
        assert fact in text
    assert "<evaluate>" not in text


def _classical(**changes: Any) -> EvaluateSettings:
    return EvaluateSettings(**{"methods": ("telea",), "resamples": 200, **changes})


def test_classical_methods_need_no_base_and_no_adapters(
    tmp_path: Path, make_sample: Callable[..., Sample], in_memory: Callable[..., Any]
) -> None:
    done: list[int] = []
    result = evaluate(_classical(), in_memory([make_sample(0)]), NO_BASE, None, str(tmp_path / "out"), done.append)
    assert done == [1]
    assert Path(result.report).is_file()
    value = result.summary["groups"][0]["methods"]["telea"]["psnr"]
    assert (value["count"], value["low"]) == (1, None), "one value has no interval"


def test_an_equal_run_gives_equal_values_pictures_and_intervals(
    tmp_path: Path, make_sample: Callable[..., Sample], in_memory: Callable[..., Any]
) -> None:
    data = in_memory([make_sample(index) for index in range(4)])
    settings = _classical(methods=("telea", "navier-stokes"), samples=2)
    first, second = (evaluate(settings, data, NO_BASE, None, str(tmp_path / n), _silent).summary for n in "ab")
    for method in settings.methods:
        for group in first["groups"] + second["groups"]:
            group["methods"][method].pop("seconds")
    assert first == second


def test_with_faulty_masks_a_method_is_judged_on_what_they_miss(
    tmp_path: Path, make_sample: Callable[..., Sample], in_memory: Callable[..., Any]
) -> None:
    """The augmented masks lie 2 pixels too low: what they leave is in the metric's hole, not in the method's."""
    sample = make_sample(0, people=1)
    evaluate(
        _classical(masks=("exact", "augmented")), in_memory([sample]), NO_BASE, None, str(tmp_path / "out"), _silent
    )
    exact, faulty = pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    assert (exact["masks"], faulty["masks"]) == ("exact", "augmented")
    person = sample.people[0]
    assert person.augmented_mask is not None
    assert faulty["hole_share"] == pytest.approx((person.mask | person.augmented_mask).mean())
    assert faulty["psnr_hole"] < exact["psnr_hole"] - 3


def test_groups_are_kinds_of_masks_and_whether_people_overlap(
    tmp_path: Path, make_sample: Callable[..., Sample], in_memory: Callable[..., Any]
) -> None:
    """A person alone overlaps nobody; two whose visible masks share an edge do, two pixels apart they do not."""
    alone, touching, near = make_sample(0, people=1), make_sample(1, people=2), make_sample(2, people=2)
    for sample, gap in ((touching, 0), (near, 2)):
        for number, person in enumerate(sample.people):
            person.mask = np.zeros_like(person.mask)
            person.mask[8:24, slice(4, 12) if number == 0 else slice(12 + gap, 24)] = True
    data = in_memory([alone, touching, near])
    settings = _classical(methods=("telea", "navier-stokes"), masks=("exact", "augmented"))
    summary = evaluate(settings, data, NO_BASE, None, str(tmp_path / "out"), _silent).summary
    rows = pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    assert {row["key"] for row in rows if row["overlap"]} == {touching.key}
    assert {group["name"]: group["cases"] for group in summary["groups"]} == {
        "all": 6,
        "people apart, exact masks": 2,
        "people overlap, exact masks": 1,
        "people apart, augmented masks": 2,
        "people overlap, augmented masks": 1,
    }
    value = summary["groups"][3]["methods"]["telea"]["psnr_hole"]["mean"]
    expected = [
        row["psnr_hole"]
        for row in rows
        if row["method"] == "telea" and row["masks"] == "augmented" and row["key"] != touching.key
    ]
    assert value == pytest.approx(np.mean(expected))
    text = (tmp_path / "out" / "report.html").read_text()
    assert "people overlap, augmented masks (1)" in text


def test_a_perfect_result_is_reported_as_identical_and_left_out_of_the_mean(
    tmp_path: Path, make_sample: Callable[..., Sample], in_memory: Callable[..., Any]
) -> None:
    """A plain background, which Navier-Stokes continues exactly, and one that it cannot."""
    plain = make_sample(0, people=1)
    plain.background = np.full_like(plain.image, 80)
    plain.image = plain.background.copy()
    plain.image[plain.people[0].mask] = 255
    other = make_sample(1, people=1)
    result = evaluate(
        _classical(methods=("navier-stokes",)), in_memory([plain, other]), NO_BASE, None, str(tmp_path / "out"), _silent
    )
    value = result.summary["groups"][0]["methods"]["navier-stokes"]["psnr_hole"]
    assert (value["count"], value["identical"]) == (1, 1)
    assert np.isfinite(value["mean"])
    text = (tmp_path / "out" / "report.html").read_text()
    assert "1 identical to the truth (infinite), not in the mean" in text
    assert "PSNR hole, dB: identical" in text


def test_without_a_clean_background_metrics_are_not_computed_and_say_why(
    tmp_path: Path, make_sample: Callable[..., Sample], in_memory: Callable[..., Any]
) -> None:
    sample = make_sample(0)
    sample.background, sample.configuration = None, "real"
    result = evaluate(_classical(), in_memory([sample]), NO_BASE, None, str(tmp_path / "out"), _silent)
    row = pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()[0]
    assert [row[metric.name] for metric in METRICS] == [None] * len(METRICS)
    assert "psnr_hole: no clean background is known" in row["not_computed"]
    assert result.summary["groups"][0]["methods"]["telea"]["ssim"]["mean"] is None
    assert "not computed: no clean background is known" in (tmp_path / "out" / "report.html").read_text()


def test_a_sample_that_a_method_cannot_use_is_not_computed_and_the_others_are(
    tmp_path: Path, make_sample: Callable[..., Sample], in_memory: Callable[..., Any]
) -> None:
    full = make_sample(0, people=1)
    full.people[0].mask = np.ones_like(full.people[0].mask)
    result = evaluate(_classical(), in_memory([full, make_sample(1)]), NO_BASE, None, str(tmp_path / "out"), _silent)
    value = result.summary["groups"][0]["methods"]["telea"]["psnr"]
    assert value["count"] == 1
    assert "the masks cover the whole picture" in next(iter(value["not_computed"]))


def test_the_interval_is_the_one_that_theory_gives_for_many_values() -> None:
    """For 400 normal values the bootstrap interval of the mean is close to 1.96 standard errors on each side."""
    values = np.random.default_rng(0).normal(20, 3, 400)
    rows = [
        {"key": str(index), "method": "telea", "psnr": float(value), "not_computed": []}
        for index, value in enumerate(values)
    ]
    found = _mean(rows, "psnr", EvaluateSettings(resamples=4000))
    half = 1.96 * values.std(ddof=1) / 20
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_masks_of_another_kind_do_not_make_a_picture_two() -> None:
    """Twice the same values of each picture leave the interval as wide as it was."""
    values = np.random.default_rng(0).normal(20, 3, 50).tolist()
    once = [
        {"key": str(index), "method": "telea", "psnr": value, "not_computed": []} for index, value in enumerate(values)
    ]
    settings = EvaluateSettings(resamples=500)
    assert _mean(once + once, "psnr", settings) == _mean(once, "psnr", settings) | {"count": 100}


def test_what_mild_differs_by_is_taken_case_by_case() -> None:
    """A lead of 1 dB on every picture is certain, however much the pictures differ; what is missing is left out."""
    draw = np.random.default_rng(0)
    rows = []
    for index, value in enumerate(draw.normal(20, 5, 30)):
        known = {"key": str(index), "masks": "exact", "perceptual_hole": None, "psnr": None, "ssim": float(value)}
        rows += [known | {"method": "telea", "psnr_hole": value}, known | {"method": "mild", "psnr_hole": value + 1}]
    rows[0]["psnr_hole"] = np.inf
    found = _differences(rows[::-1], EvaluateSettings(methods=("telea", "mild"), resamples=200))
    assert set(found) == {"telea"}
    assert list(found["telea"]["psnr_hole"].values()) == pytest.approx([1, 1, 1])
    assert found["telea"]["ssim"] == {"mean": 0, "low": 0, "high": 0}
    assert found["telea"]["psnr"] == {"mean": None, "low": None, "high": None}


def test_what_cannot_be_evaluated_is_named_and_leaves_nothing(
    nano_base: str, tmp_path: Path, make_sample: Callable[..., Sample], in_memory: Callable[..., Any]
) -> None:
    evil = make_sample(0)
    evil.key = "../escape"
    faultless = make_sample(0)
    faultless.people[0].augmented_mask = None
    for settings, data, named in [
        (_classical(), [], "holds no sample"),
        (_classical(), [evil], "cannot be a file name"),
        (_classical(masks=("augmented",)), [faultless], "no augmented masks"),
        (EvaluateSettings(), [make_sample(0)], "needs a directory of adapters"),
    ]:
        with pytest.raises(UserError, match=named):
            evaluate(settings, in_memory(data), nano_base, None, str(tmp_path / "out"), _silent)
    assert list(tmp_path.iterdir()) == []
