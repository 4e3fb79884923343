from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mild.evaluation.pairs import Pair, PairsSettings, draw_pairs
from mild.evaluation.rate import RateSettings, rated, rating_page

METHODS = ("secret-fill", "hidden-net")


@pytest.fixture
def pairs(make_evaluation: Callable[..., Path]) -> list[Pair]:
    """Two methods on two pictures."""
    return draw_pairs(make_evaluation(METHODS, keys=2), PairsSettings()).pairs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "judged"


@pytest.fixture
def open_page(pairs: list[Pair], folder: Path) -> Callable[..., Any]:
    """The application, served to a client in this process."""
    from starlette.testclient import TestClient

    def opened(**settings: Any) -> Any:
        return TestClient(rating_page(pairs, RateSettings(**settings), folder), base_url="http://127.0.0.1")

    return opened


def rate(client: Any, rater: str, score: int = 5, success: bool = True) -> dict[str, Any]:
    """Rate what comes next; gives the standing after it."""
    item = client.get("/standing", params={"rater": rater}).json()["waiting"][0]
    answer = client.put("/rating", json={"rater": rater, "item": item, "score": score, "success": success})
    assert answer.status_code == 200
    standing: dict[str, Any] = answer.json()
    return standing


def test_a_rater_gets_every_pair_once_and_is_told_how_far_it_is(
    open_page: Callable[..., Any], pairs: list[Pair], folder: Path
) -> None:
    client, standings = open_page(), []
    for score in (1, 4, 7, 10):
        standings.append(rate(client, "Ada", score, score > 5))
    assert [standing["done"] for standing in standings] == [1, 2, 3, 4]
    assert standings[-1] == {"done": 4, "total": 4, "waiting": []}
    kept = rated(folder)
    assert {one.digest for one in kept} == {pair.digest for pair in pairs}
    assert [(one.score, one.success) for one in kept] == [(1, False), (4, False), (7, True), (10, True)]


def test_each_rater_has_an_order_of_their_own_which_stays(open_page: Callable[..., Any], pairs: list[Pair]) -> None:
    def order(client: Any, rater: str) -> list[str]:
        first = client.get("/standing", params={"rater": rater}).json()
        return [standing["waiting"][0] for standing in (first, *(rate(client, rater) for _ in range(3)))]

    client = open_page()
    orders = {rater: order(client, rater) for rater in ("Ada", "Bo", "Cy", "Di", "Ed", "Flo")}
    assert all(sorted(found) == sorted(pair.digest for pair in pairs) for found in orders.values())
    assert len({tuple(found) for found in orders.values()}) > 1


def test_after_a_restart_every_rater_goes_on_where_they_were(open_page: Callable[..., Any], folder: Path) -> None:
    client = open_page()
    rate(client, "Ada")
    last = [rate(client, "Ada"), rate(client, "Bo")]
    again = open_page()
    assert [again.get("/standing", params={"rater": name}).json() for name in ("Ada", "Bo")] == last
    assert [one.by for one in rated(folder)] == ["Ada", "Ada", "Bo"]


def test_undo_takes_back_the_raters_own_last_rating_and_shows_that_pair_again(
    open_page: Callable[..., Any], folder: Path
) -> None:
    client = open_page()
    first = client.get("/standing", params={"rater": "Ada"}).json()["waiting"][0]
    rate(client, "Ada", 3)
    second = client.get("/standing", params={"rater": "Ada"}).json()["waiting"][0]
    rate(client, "Ada", 4)
    rate(client, "Bo", 9)
    assert client.post("/undo", json={"rater": "Ada"}).json()["waiting"][0] == second
    back = client.post("/undo", json={"rater": "Ada"}).json()
    assert (back["done"], back["waiting"][0]) == (0, first)
    assert client.post("/undo", json={"rater": "Ada"}).json()["done"] == 0
    assert [(one.by, one.score) for one in rated(folder)] == [("Bo", 9)]


def test_the_same_pair_rated_again_is_one_rating(open_page: Callable[..., Any], folder: Path) -> None:
    client = open_page()
    item = client.get("/standing", params={"rater": "Ada"}).json()["waiting"][0]
    for score in (2, 8):
        client.put("/rating", json={"rater": "Ada", "item": item, "score": score, "success": True})
    assert [one.score for one in rated(folder)] == [8]


@pytest.mark.parametrize(
    "wrong", [{"score": 0}, {"score": 11}, {"score": "5"}, {"success": None}, {"rater": "  "}, {"rater": "x" * 61}]
)
def test_what_is_no_rating_is_refused(open_page: Callable[..., Any], folder: Path, wrong: dict[str, Any]) -> None:
    client = open_page()
    item = client.get("/standing", params={"rater": "Ada"}).json()["waiting"][0]
    whole = {"rater": "Ada", "item": item, "score": 5, "success": True}
    assert client.put("/rating", json={**whole, **wrong}).status_code == 422
    assert client.put("/rating", json={**whole, "item": "0" * 64}).status_code == 404
    assert rated(folder) == []


def test_where_raters_are_named_nobody_else_may_rate(open_page: Callable[..., Any], folder: Path) -> None:
    client = open_page(raters=("Ada", "Bo"))
    assert client.get("/raters").json() == ["Ada", "Bo"]
    assert client.get("/standing", params={"rater": "Cy"}).status_code == 403
    assert client.post("/undo", json={"rater": "Cy"}).status_code == 403
    item = client.get("/standing", params={"rater": "Bo"}).json()["waiting"][0]
    assert client.put("/rating", json={"rater": "Cy", "item": item, "score": 5, "success": True}).status_code == 403
    assert rated(folder) == []


def test_nothing_that_is_served_names_a_method_or_a_picture(open_page: Callable[..., Any], tmp_path: Path) -> None:
    """Neither bodies nor headers, whatever the files say of themselves."""
    client = open_page()
    standing = client.get("/standing", params={"rater": "Ada"})
    answers = [client.get("/"), client.get("/raters"), standing]
    for item in standing.json()["waiting"]:
        pictures = [client.get(f"/pictures/{item}/{which}.png") for which in ("before", "edited")]
        assert all(picture.content.startswith(b"\x89PNG") for picture in pictures)
        assert pictures[0].content != pictures[1].content
        answers += pictures
    answers += [client.get("/pictures/none/before.png"), client.get("/openapi.json"), client.post("/undo", json={})]
    for answer in answers:
        said = answer.content + str(answer.headers).encode()
        for name in (*METHODS, "sample-", str(tmp_path)):
            assert name.encode() not in said


def test_the_page_asks_nothing_of_other_servers(open_page: Callable[..., Any]) -> None:
    page = open_page().get("/")
    assert not re.search(r"https?://|//[a-z]+\.", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_pictures_of_an_evaluation_that_has_changed_are_not_shown_for_the_old_ones(
    open_page: Callable[..., Any], pairs: list[Pair]
) -> None:
    client = open_page()
    pairs[0].result.write_bytes(pairs[1].result.read_bytes())
    assert client.get(f"/pictures/{pairs[0].digest}/edited.png").status_code == 410


def test_pairs_of_equal_pictures_are_rated_once(open_page: Callable[..., Any], pairs: list[Pair]) -> None:
    pairs[1].result.write_bytes(pairs[0].result.read_bytes())
    assert open_page().get("/standing", params={"rater": "Ada"}).json()["total"] == 3


@pytest.mark.process
@pytest.mark.slow
def test_two_people_rate_in_a_browser_by_keyboard_and_by_touch(
    pairs: list[Pair], folder: Path, browser: Any, served: Callable[..., Any]
) -> None:
    """Also across a restart of the server; what the browser receives names no method, and the phone scrolls one way."""
    from playwright.sync_api import expect

    received: list[Any] = []
    with served(rating_page(pairs, RateSettings(), folder)) as address:
        ada = browser.new_page(color_scheme="dark")
        ada.on("response", lambda answer: received.append(answer))
        ada.goto(address)
        ada.fill("#name", "Ada")
        ada.press("#name", "Enter")
        expect(ada.locator("#count")).to_have_text("0 of 4")
        ada.keyboard.press("0")
        expect(ada.locator("#save")).to_be_disabled()
        ada.keyboard.press("s")
        ada.keyboard.press("Enter")
        expect(ada.locator("#count")).to_have_text("1 of 4")
        expect(ada.locator("[aria-pressed=true]")).to_have_count(0)
        ada.keyboard.press("3")
        ada.keyboard.press("s")
        ada.keyboard.press("s")
        expect(ada.locator("[aria-pressed=true]")).to_have_text(["3", "No success"])
        ada.keyboard.press("Enter")
        expect(ada.locator("#count")).to_have_text("2 of 4")
        ada.keyboard.press("u")
        expect(ada.locator("#count")).to_have_text("1 of 4")

        phone = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
        bo = phone.new_page()
        bo.goto(address)
        bo.fill("#name", "Bo")
        bo.tap("button.main:visible")
        expect(bo.locator("#edited")).to_have_js_property("complete", True)
        assert bo.evaluate("document.documentElement.scrollWidth") == 360
        for score in ("1", "2", "3", "4"):
            bo.tap(f".scores button >> text='{score}'")
            bo.tap("[data-success=yes]")
            bo.tap("#save")
            expect(bo.locator("#count")).to_have_text(f"{score} of 4")
        expect(bo.locator("#end")).to_be_visible()
        bodies = [
            (answer.text() if "png" not in answer.url else answer.body().decode("latin-1")) for answer in received
        ]
        dark = ada.evaluate("getComputedStyle(document.body).backgroundColor")
        light = bo.evaluate("getComputedStyle(document.body).backgroundColor")
    with served(rating_page(pairs, RateSettings(), folder)) as address:
        ada.goto(address)
        ada.fill("#name", "Ada")
        ada.press("#name", "Enter")
        expect(ada.locator("#count")).to_have_text("1 of 4")
    assert len(bodies) > 6 and not any(name in body for body in bodies for name in METHODS)
    assert dark != light
    kept = {(one.by, one.score, one.success) for one in rated(folder)}
    assert kept == {("Ada", 10, True), *(("Bo", score, True) for score in range(1, 5))}
