"""The page, as a browser shows it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from mild.evaluation.gallery import ShownCase, ShownLayers
from mild.evaluation.report import render_report
from mild.evaluation.summary import MethodRow, Summary

pytestmark = pytest.mark.process
CURVE = '<svg role="img" aria-label="loss"><g id="region loss"></g></svg>'
HOSTILE = "<img src=x onerror=alert(1)>\"'</script><script>alert(2)</script>"
MakeSummary = Callable[..., Summary]
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser(chromium: Callable[[], AbstractContextManager[Browser]]) -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(
    tmp_path_factory: pytest.TempPathFactory,
    make_summary: MakeSummary,
    shown_cases: list[ShownCase],
    shown_layers: ShownLayers,
) -> Path:
    """A report of everything that there can be."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render_report(make_summary(), shown_cases, [shown_layers], CURVE), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def window(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    yield page
    page.close()


@pytest.fixture
def page(window: Page, report: Path) -> Page:
    """The report, as it is when it was just opened."""
    window.goto(report.as_uri())
    return window


def _case(page: Page, key: str) -> Locator:
    """A case, with its pictures."""
    case = page.locator(f".case:has(h3:text-is('{key}'))")
    case.scroll_into_view_if_needed()
    expect(case.locator(".right")).to_have_attribute("src", re.compile("^data:"))
    return case


def _layers(page: Page) -> None:
    """Brings the picture in layers to where it is seen, and waits until it is drawn."""
    page.locator(".layered").scroll_into_view_if_needed()
    expect(page.locator(".layered canvas")).to_have_attribute("aria-label", re.compile("crowd"))


def _order(page: Page) -> list[str]:
    return page.locator(".case:visible h3").all_inner_texts()


def _decoded(uri: str, mode: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))) as picture:
        return np.asarray(picture.convert(mode)).astype(float)


def test_the_page_asks_for_nothing_and_complains_of_nothing(browser: Browser, report: Path) -> None:
    asked: list[str] = []
    complaints: list[str] = []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(report.as_uri())
    _layers(page)
    page.close()
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert complaints == []
    loaded = re.findall(
        r"(?:src|href|data-\w+)=[\"']?(?!#|data:|[\w-]+[\"'>])([^\s>]*://[^\s>]*)", report.read_text("utf-8")
    )
    assert loaded == []


def test_the_headline_stands_first_and_its_table_next(page: Page, make_summary: MakeSummary) -> None:
    headline = make_summary().headline
    assert headline is not None and page.locator("h1").inner_text() == headline.sentence
    table = page.locator("table").first
    assert table.locator("caption").inner_text() == "composite, all cases: 60"
    head = table.locator("thead th").nth(2).inner_text().split("\n")
    assert [line for line in head if line] == [
        "FID ↓",
        "picture; Inception-v3 of torch-fidelity, 299; reference: clean background",
        "60 pictures: FID under 2,048 says little",
    ]


def test_a_cell_has_mean_interval_count_and_difference(page: Page) -> None:
    cell = page.locator("table").first.locator("tr:has(th:text('mild-arm')) td").first
    assert cell.get_attribute("class") == "best"
    lines = [line for line in cell.inner_text().split("\n") if line.strip()]
    assert lines == ["19.67", "best", "18.87 to 20.47 · n 59", "≈ +0.05 (−0.02 to +0.12)"]
    assert cell.locator(".difference.same").count() == 1


def test_what_was_not_run_or_not_computed_has_a_reason_and_no_number(page: Page) -> None:
    lama = page.locator("table").first.locator("tr:has(th:text('LaMa')) td")
    assert lama.all_inner_texts() == ["not run: big-lama.pt is not here: run mild weights pull lama"]
    notes = page.locator("#results .plain").first.inner_text()
    assert notes == "LPIPS not computed: run mild weights pull lpips"


def test_groups_are_folded_away_and_each_dataset_has_a_table(page: Page) -> None:
    folded = page.locator("#results details")
    assert folded.locator("summary").all_inner_texts() == [
        "people apart, exact masks 38 of 60",
        "people overlap, exact masks 22 of 60",
    ]
    assert not folded.locator("table").first.is_visible()
    assert page.locator("#results caption:visible").all_inner_texts() == [
        "composite, all cases: 60",
        "real, all cases: 60",
    ]


def test_the_slider_is_moved_by_keys_and_by_touching_the_picture(page: Page) -> None:
    case = _case(page, "case-0")
    slider, picture = case.locator("input[type=range]"), case.locator(".picture")
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert slider.input_value() == "52"
    shown = "e => e.style.getPropertyValue('--at')"
    assert picture.evaluate(shown) == "52%"
    box = picture.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 5)
    page.mouse.up()
    page.mouse.move(box["x"], box["y"])
    assert slider.input_value() == "25" and picture.evaluate(shown) == "25%"


def test_a_tile_puts_its_picture_on_the_right(page: Page) -> None:
    case = _case(page, "case-0")
    tile = case.get_by_role("button", name="OpenCV Telea")
    tile.press("Enter")
    assert case.locator(".right").get_attribute("src") == tile.locator("img").get_attribute("data-source")
    assert case.locator(".right").get_attribute("alt") == "case-0 erased by OpenCV Telea"
    assert tile.get_attribute("aria-pressed") == "true"


def test_the_worst_cases_come_first_when_asked_for_and_those_without_a_value_last(page: Page) -> None:
    assert _order(page) == ["case-0", "case-1", "case-2"]
    page.select_option("select[name=method]", "method:telea")
    page.select_option("select[name=order]", "worst")
    assert _order(page) == ["case-1", "case-0", "case-2"]
    page.select_option("select[name=method]", "method:base")
    # Identical pictures are infinitely good.
    assert _order(page) == ["case-1", "case-2", "case-0"]
    page.select_option("select[name=order]", "best")
    assert _order(page) == ["case-0", "case-2", "case-1"]


def test_the_gallery_is_narrowed_to_a_dataset_and_to_methods(page: Page) -> None:
    page.select_option("select[name=dataset]", "real")
    assert _order(page) == ["case-2"]
    assert page.locator("#tools output").inner_text() == "1 of 3 shown"
    page.select_option("select[name=dataset]", "")
    case = _case(page, "case-0")
    page.uncheck("#tools input[value='method:telea']")
    assert case.locator(".tile:visible span").all_inner_texts() == [
        "Before",
        "Mask",
        "Clean background",
        "Base in the same pipeline",
    ]


def test_a_case_without_a_result_says_why(page: Page) -> None:
    case = _case(page, "case-2")
    case.locator("summary").click()
    assert "not computed: no result: <it> failed" in case.locator(".values").inner_text()
    assert case.locator(".tile:has-text('OpenCV Telea')").inner_text().startswith("no result")


@pytest.mark.parametrize(("key", "reference"), [("case-0", "truth"), ("case-2", "before")])
def test_a_difference_is_the_results_to_the_clean_background_or_else_to_the_picture_before(
    page: Page, shown_cases: list[ShownCase], key: str, reference: str
) -> None:
    case = _case(page, key)
    page.select_option("select[name=view]", "difference")
    case.locator(".right-choice").select_option("method:base")
    shown = shown_cases[int(key[-1])]
    paths = shown.results["base"], getattr(shown, reference)
    result, to = (np.asarray(Image.open(path).convert("RGB")).astype(float) for path in paths)
    embedded = _decoded(case.locator(".right").get_attribute("src") or "", "L")
    # They are compressed.
    assert np.abs(embedded - np.abs(result - to).max(axis=2)).max() <= 8
    assert np.abs(embedded - np.abs(result - to).max(axis=2)).mean() < 0.5
    assert "filter" not in (case.locator(".right").get_attribute("style") or "")
    page.select_option("select[name=view]", "enhanced")
    assert case.locator(".right").evaluate("e => getComputedStyle(e).filter") == "brightness(8)"
    assert case.locator(".left").evaluate("e => getComputedStyle(e).filter") == "none"


def test_no_picture_is_decoded_before_it_comes_near(
    window: Page, tmp_path: Path, make_summary: MakeSummary, shown_cases: list[ShownCase]
) -> None:
    page = tmp_path / "report.html"
    page.write_text(
        render_report(make_summary(leakage=[], spectra=[]), shown_cases[:1] * 12, [], None), encoding="utf-8"
    )
    window.goto(page.as_uri())
    window.locator(".case").first.scroll_into_view_if_needed()
    expect(window.locator(".case .right").first).to_have_attribute("src", re.compile("^data:"))
    states = window.locator(".case").evaluate_all("all => all.map(e => Boolean(e.querySelector('.right').src))")
    assert states[0] and not states[-1]


def test_people_are_put_together_by_eq_2_from_back_to_front(page: Page, shown_layers: ShownLayers) -> None:
    _layers(page)
    canvas = page.locator(".layered canvas")
    background, *layers = (
        np.asarray(Image.open(path)).astype(float) for path in (shown_layers.background, *shown_layers.layers)
    )
    for present in ((), (0,), (1,), (0, 1)):
        for index in range(2):
            page.locator("[data-layer]").nth(index).set_checked(index in present)
        expected = background
        for index in shown_layers.order:
            alpha = layers[index][..., 3:] / 255 * (index in present)
            expected = alpha * layers[index][..., :3] + (1 - alpha) * expected
        shown = _decoded(canvas.evaluate("e => e.toDataURL('image/png')"), "RGB")
        assert shown.shape == expected.shape
        # Rounded once, and each layer's colours before that: browsers multiply them by alpha, and divide them again.
        assert np.abs(shown - expected).max() <= 0.51 + 1.25 * len(present)
        who = f"with person {', '.join(str(index + 1) for index in present)}" if present else "without anybody"
        assert canvas.get_attribute("aria-label") == f"crowd: background {who}"


def test_everybody_leaves_and_comes_back_at_once(page: Page) -> None:
    _layers(page)
    canvas = page.locator(".layered canvas")
    page.get_by_role("button", name="crowd: nobody").click()
    assert canvas.get_attribute("aria-label") == "crowd: background without anybody"
    page.get_by_role("button", name="crowd: everybody").click()
    assert canvas.get_attribute("aria-label") == "crowd: background with person 1, 2"


def test_leakage_is_drawn_with_and_without_sma_and_listed_a_block_and_step(page: Page) -> None:
    part = page.locator("#leakage")
    assert part.locator("[id='MILD (mild-0), without SMA']").count() == 2
    part.locator("summary").click()
    maps = part.locator("table")
    assert maps.locator("caption").all_inner_texts() == [
        "Gamma (eq. 1), nats, with SMA",
        "Gamma (eq. 1), nats, without SMA",
        "Cross-domain mass (eq. 6), with SMA",
        "Cross-domain mass (eq. 6), without SMA",
    ]
    row = maps.nth(1).locator("tbody tr").nth(1)
    assert row.inner_text().split() == ["down.1.1.0", "1.40", "1.50", "1.50", "–"]
    assert "1.89 with SMA, 1.19 without SMA" in part.inner_text()


def test_the_run_before_time_and_the_loss_are_there(page: Page) -> None:
    assert page.locator("#against tr:visible").nth(1).inner_text().split("\t") == [
        "OpenCV Telea",
        "composite",
        "FID ↓",
        "80.0",
        "88.1",
        "▼ +8.1 (+2.0 to +14.0)\nworse",
    ]
    assert page.locator("#times tr:has-text('SDXL')").locator("td.number").all_inner_texts() == ["2.1", "9.10"]
    assert page.locator("#training svg #region\\ loss").count() == 1


def test_the_foot_names_digests_seed_and_versions(page: Page) -> None:
    page.locator("#made details").first.evaluate("e => e.open = true")
    text = page.locator("#made").inner_text()
    assert all(part in text for part in ("d" * 64, "a" * 64, "Seed\n7", "torch 2.11", "runs/train/adapters"))


def test_a_phone_scrolls_the_tables_and_not_the_page(browser: Browser, report: Path) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 700}, color_scheme="dark")
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator(".scroll").first.evaluate("e => e.scrollWidth > e.clientWidth")
    page.close()


def test_the_page_is_dark_where_people_want_it_so(page: Page) -> None:
    def levels(property: str) -> list[int]:
        colour = page.locator("body").evaluate(f"e => getComputedStyle(e).{property}")
        return [int(level) for level in re.findall(r"\d+", colour)]

    assert min(levels("backgroundColor")) > 200 and max(levels("color")) < 100
    page.emulate_media(color_scheme="dark")
    assert max(levels("backgroundColor")) < 60 and min(levels("color")) > 200
    page.emulate_media(color_scheme="light")


def test_every_picture_and_every_control_has_a_name(page: Page) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('.tile img, canvas, details img, svg')]
            .filter((e) => !e.alt && !e.getAttribute('aria-label') && e.tagName !== 'CANVAS').length"""
    )
    assert unnamed == 0
    controls = page.locator("input, select, button").evaluate_all(
        "all => all.filter((e) => !e.labels?.length && !e.getAttribute('aria-label') && !e.textContent.trim()).length"
    )
    assert controls == 0


def test_names_and_reasons_are_shown_and_never_run(
    window: Page, tmp_path: Path, make_summary: MakeSummary, shown_cases: list[ShownCase]
) -> None:
    hostile = MethodRow(name="telea", title=HOSTILE, kind="telea", settings={"name": HOSTILE})
    absent = MethodRow(name="lama", title="LaMa", kind="lama", not_run=HOSTILE)
    methods = [hostile, *make_summary().methods[1:-1], absent]
    summary = make_summary(methods=methods, settings={"note": HOSTILE}, adapters=HOSTILE, leakage=[], spectra=[])
    page = tmp_path / "report.html"
    page.write_text(render_report(summary, shown_cases[:1], [], None), encoding="utf-8")
    dialogs: list[str] = []

    def dismiss(dialog: object) -> None:
        dialogs.append(str(dialog))
        dialog.dismiss()  # type: ignore[attr-defined]

    window.on("dialog", dismiss)
    window.goto(page.as_uri())
    assert window.locator("table").first.locator("th").filter(has_text=HOSTILE).count() == 1
    assert window.locator("#made dd").nth(3).inner_text() == HOSTILE
    assert window.locator("script").count() == 1 and dialogs == []
    window.remove_listener("dialog", dismiss)


def test_a_report_of_nothing_but_a_method_that_was_not_run_is_a_page_all_the_same(
    window: Page, tmp_path: Path, make_summary: MakeSummary
) -> None:
    nothing = {"headline": None, "leakage": [], "spectra": [], "against": None, "groups": []}
    page = tmp_path / "report.html"
    page.write_text(render_report(make_summary(**nothing), [], [], None), encoding="utf-8")
    window.goto(page.as_uri())
    assert window.locator("h1").inner_text() == "Nothing could be compared."
    assert window.locator("section").evaluate_all("all => all.map(e => e.id)") == ["results", "times", "made"]
    assert window.locator("nav a").evaluate_all("all => all.every(e => document.querySelector(e.hash))")
