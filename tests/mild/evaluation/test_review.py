from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mild.evaluation.review import NONE, Decisions, Item, Proposal, Review, ReviewSettings
from mild.evaluation.review_page import ReviewPageSettings, review_page

METHODS = ("secret-fill", "hidden-net", "quiet-paint")


def picture(work: Path, name: str, level: int) -> dict[str, str]:
    """A file whose text tells whose it is, as image editors write it."""
    text = PngInfo()
    text.add_text("Software", name)
    image = np.full((24, 32, 3), level, np.uint8)
    image[6:18, 10:20] = 255 - level
    Image.fromarray(image).save(work / f"{name}.png", pnginfo=text)
    return {"file": f"{name}.png", "sha256": hashlib.sha256((work / f"{name}.png").read_bytes()).hexdigest()}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "out.work").mkdir()
    return tmp_path / "out.work"


@pytest.fixture
def make_review(work: Path) -> Callable[..., Review]:
    """Three methods' proposals for some pictures."""

    def make(count: int = 4, **settings: Any) -> Review:
        items = tuple(
            Item(
                key=f"sample-{index}",
                split="train",
                proposals=tuple(
                    Proposal(method=method, **picture(work, f"{method}-{index}", 40 * number + index))
                    for number, method in enumerate(METHODS, start=1)
                ),
                **picture(work, f"sample-{index}", 200 + index),
            )
            for index in range(count)
        )
        return Review(**{"seed": 0, "reviewers": 1, "agreement": 0.5, "items": items, **settings})

    return make


@pytest.fixture
def decisions(tmp_path: Path) -> Decisions:
    return Decisions(tmp_path / "out-judged")


@pytest.fixture
def finished() -> list[str]:
    """Grows by one whenever the page lets things go on."""
    return []


@pytest.fixture
def open_page(work: Path, decisions: Decisions, finished: list[str]) -> Callable[..., Any]:
    """The application, and a client of it in this process."""
    from starlette.testclient import TestClient

    def finish() -> str:
        finished.append("")
        return "The run goes on."

    def opened(review: Review, *reviewers: str, host: str = "127.0.0.1") -> Any:
        page = review_page(review, decisions, work, ReviewPageSettings(reviewers=reviewers, host=host), finish)
        return TestClient(page, base_url="http://127.0.0.1:8765")

    return opened


def standing(client: Any, reviewer: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/standing", params={"reviewer": reviewer}).raise_for_status().json()
    return found


def put(client: Any, reviewer: str, item: str, choice: str) -> Any:
    return client.put("/decision", json={"reviewer": reviewer, "item": item, "choice": choice})


@pytest.mark.parametrize(
    ("picks", "agreement", "chosen"),
    [
        ([0], 0.5, 0),
        ([None], 0.5, None),
        ([0, 0, 1], 0.5, 0),
        ([0, 1], 0.5, None),
        ([0, 0, 1, 1], 0.5, None),
        ([0, 1, 2], 0.5, None),
        ([0, None, None], 0.5, None),
        ([2, 2, 1], 0.7, None),
        ([2, 2, 2], 0.99, 2),
    ],
)
def test_a_plate_is_chosen_where_more_than_the_share_picked_it(
    make_review: Callable[..., Review],
    decisions: Decisions,
    picks: list[int | None],
    agreement: float,
    chosen: int | None,
) -> None:
    review = make_review(1, reviewers=len(picks), agreement=agreement)
    (item,) = review.items
    for number, pick in enumerate(picks):
        assert decisions.outcome(review).undecided == 1
        decisions.decide(f"r{number}", item.id, NONE if pick is None else item.proposals[pick].sha256)
    outcome = decisions.outcome(review)
    assert outcome.undecided == 0 and outcome.none == (chosen is None)
    assert [plate.method for plate in outcome.plates.values()] == ([] if chosen is None else [METHODS[chosen]])


def test_decisions_do_not_count_for_another_choice_of_proposals(
    make_review: Callable[..., Review], decisions: Decisions
) -> None:
    """One method more or less is another question; the order of methods is not."""
    review = make_review(1)
    (item,) = review.items
    decisions.decide("Ada", item.id, item.proposals[0].sha256)
    turned = Review.model_validate(
        {**review.model_dump(), "items": [{**item.model_dump(), "proposals": item.proposals[::-1]}]}
    )
    fewer = Review.model_validate(
        {**review.model_dump(), "items": [{**item.model_dump(), "proposals": item.proposals[:2]}]}
    )
    assert (decisions.outcome(fewer).undecided, decisions.outcome(turned).undecided) == (1, 0)


def test_agreement_is_that_of_the_formula(make_review: Callable[..., Review], decisions: Decisions) -> None:
    """Krippendorff's nominal alpha by its coincidence matrix (Krippendorff 2011, section C), written out here."""
    picks: list[list[int | None]] = [[0, 0, 1], [2, 2, None], [1, 1, 1], [None, 0, None]]
    review = make_review(4, reviewers=2)
    values = []
    for item, own in zip(review.items, picks, strict=True):
        values.append([-1 if pick is None else pick for pick in own])
        for number, pick in enumerate(own):
            decisions.decide(f"r{number}", item.id, NONE if pick is None else item.proposals[pick].sha256)
    together: Counter[tuple[int, int]] = Counter()
    for own in values:
        for one, other in itertools.permutations(own, 2):
            together[one, other] += 1 / (len(own) - 1)  # type: ignore[assignment]
    count = {value: sum(n for (one, _), n in together.items() if one == value) for value in (-1, 0, 1, 2)}
    total = sum(count.values())
    observed = sum(n for (one, other), n in together.items() if one != other) / total
    expected = sum(count[one] * count[other] for one, other in itertools.permutations(count, 2))
    outcome = decisions.outcome(review)
    assert outcome.alpha == pytest.approx(1 - observed / (expected / (total * (total - 1))))
    assert outcome.same == pytest.approx((1 / 3 + 1 / 3 + 1 + 1 / 3) / 4)
    assert (outcome.shared, outcome.reviewers) == (4, 3)
    assert "alpha 0." in outcome.sentences()[1]


def test_pictures_and_proposals_come_in_an_order_of_each_reviewers_own_which_stays(
    make_review: Callable[..., Review], open_page: Callable[..., Any]
) -> None:
    review = make_review()
    client, names = open_page(review), ["Ada", "Bo", "Cy", "Di", "Ed", "Flo"]
    orders = {name: standing(client, name)["items"] for name in names}
    assert orders == {name: standing(open_page(review), name)["items"] for name in names}
    whole = {item.id: {proposal.sha256 for proposal in item.proposals} for item in review.items}
    assert all({item["id"]: set(item["proposals"]) for item in own} == whole for own in orders.values())
    assert len({tuple(item["id"] for item in own) for own in orders.values()}) > 1
    places = {
        name: [[p.sha256 for p in item.proposals] for item in review.items]
        == [next(one["proposals"] for one in own if one["id"] == item.id) for item in review.items]
        for name, own in orders.items()
    }
    assert not any(places.values()), "nobody sees the recipe's order of methods"
    assert (
        len({tuple(next(i["proposals"] for i in own if i["id"] == review.items[0].id)) for own in orders.values()}) > 1
    )


def test_a_reviewer_sees_their_own_decisions_alone_and_takes_back_their_own_last(
    make_review: Callable[..., Review], open_page: Callable[..., Any]
) -> None:
    client = open_page(make_review(2))
    first, second = standing(client, "Ada")["items"]
    assert put(client, "Ada", first["id"], first["proposals"][1]).json() == {"done": 1, "total": 2}
    assert put(client, "Ada", second["id"], NONE).json() == {"done": 2, "total": 2}
    assert put(client, "Bo", first["id"], NONE).json() == {"done": 1, "total": 2}
    assert [item["choice"] for item in standing(client, "Ada")["items"]] == [first["proposals"][1], NONE]
    assert {item["id"]: item["choice"] for item in standing(client, "Bo")["items"]} == {
        first["id"]: NONE,
        second["id"]: None,
    }
    back = [client.post("/undo", json={"reviewer": "Ada"}).json() for _ in range(3)]
    assert [one["item"] for one in back] == [second["id"], first["id"], None]
    assert standing(client, "Bo")["done"] == 1


def test_what_is_no_decision_is_refused(
    make_review: Callable[..., Review], open_page: Callable[..., Any], decisions: Decisions
) -> None:
    review = make_review(2)
    client, (one, other) = open_page(review, "Ada"), review.items
    assert put(client, "Ada", "0" * 64, NONE).status_code == 404
    assert put(client, "Ada", one.id, other.proposals[0].sha256).status_code == 404
    assert put(client, "Bo", one.id, NONE).status_code == 403
    assert client.get("/standing", params={"reviewer": "Bo"}).status_code == 403
    assert client.post("/undo", json={"reviewer": "Bo"}).status_code == 403
    assert client.post("/finish", json={"reviewer": "Bo"}).status_code == 403
    assert put(client, "  ", one.id, NONE).status_code == 422
    assert decisions.outcome(review).undecided == 2


def test_it_goes_on_only_when_all_that_is_needed_is_decided(
    make_review: Callable[..., Review], open_page: Callable[..., Any], finished: list[str]
) -> None:
    client = open_page(make_review(1, reviewers=2))
    (item,) = standing(client, "Ada")["items"]
    put(client, "Ada", item["id"], item["proposals"][0])
    assert client.get("/outcome").json()["complete"] is False
    assert (client.post("/finish", json={"reviewer": "Ada"}).status_code, finished) == (409, [])
    put(client, "Bo", item["id"], item["proposals"][0])
    assert client.get("/outcome").json()["complete"] is True
    assert client.post("/finish", json={"reviewer": "Ada"}).json() == {"said": "The run goes on."}
    assert len(finished) == 1


def test_nothing_that_is_served_names_a_method_a_picture_or_another_reviewer(
    make_review: Callable[..., Review], open_page: Callable[..., Any], tmp_path: Path
) -> None:
    client = open_page(make_review(1))
    item = standing(client, "Bo")["items"][0]
    put(client, "Bo", item["id"], item["proposals"][0])
    answers = [client.get(path) for path in ("/", "/page.css", "/page.js", "/reviewers", "/outcome", "/openapi.json")]
    answers += [client.get("/standing", params={"reviewer": "Ada"}), client.post("/undo", json={})]
    pictures = [client.get(f"/pictures/{item['id']}/{name}.png") for name in (item["picture"], *item["proposals"])]
    assert len({picture.content for picture in pictures}) == 4
    assert all(picture.content.startswith(b"\x89PNG") for picture in pictures)
    for answer in (*answers, *pictures):
        said = answer.content + str(answer.headers).encode()
        for name in (*METHODS, "sample-", str(tmp_path), '"Bo"'):
            assert name.encode() not in said


@pytest.mark.parametrize(("name", "status"), [("localhost:8765", 200), ("[::1]:8765", 200), ("evil.example", 400)])
def test_a_page_for_this_machine_alone_answers_by_no_other_name(
    make_review: Callable[..., Review], open_page: Callable[..., Any], name: str, status: int
) -> None:
    """Whose server says that its name is 127.0.0.1 would be the same origin to a browser."""
    assert open_page(make_review(1)).get("/outcome", headers={"Host": name}).status_code == status
    everybodys = open_page(make_review(1), host="0.0.0.0")
    assert everybodys.get("/outcome", headers={"Host": name}).status_code == 200


def test_a_picture_that_has_changed_is_not_shown(
    make_review: Callable[..., Review], open_page: Callable[..., Any], work: Path
) -> None:
    review = make_review(1)
    (item,) = review.items
    (work / item.proposals[0].file).write_bytes((work / item.proposals[1].file).read_bytes())
    client = open_page(review)
    assert client.get(f"/pictures/{item.id}/{item.proposals[0].sha256}.png").status_code == 410


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"methods": ["telea", "telea"]}, "telea is named twice"),
        ({"methods": [{"kind": "telea", "name": f"m{number}"} for number in range(10)]}, "methods"),
        ({"agreement": 0.4}, "agreement"),
        ({"samples": {"trian": 3}}, "samples"),
        ({"configuration": "composite"}, "'real' or 'paired'"),
    ],
)
def test_what_a_recipe_cannot_mean_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ReviewSettings.model_validate(wrong)


@pytest.mark.process
@pytest.mark.slow
def test_two_people_review_in_a_browser_by_keyboard_alone_and_by_touch(
    make_review: Callable[..., Review],
    open_page: Callable[..., Any],
    decisions: Decisions,
    finished: list[str],
    browser: Any,
    served: Callable[..., Any],
) -> None:
    """Nothing is asked of another server, the phone scrolls one way, and every button is large enough for a finger."""
    from playwright.sync_api import expect

    review = make_review(3, reviewers=2)
    asked: list[str] = []
    with served(open_page(review).app) as address:
        phone = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
        bo = phone.new_page()
        bo.goto(address)
        bo.fill("#name", "Bo")
        bo.tap("button.main:visible")
        expect(bo.locator("#count")).to_have_text("0 of 3")
        assert bo.evaluate("document.documentElement.scrollWidth") == 360
        sizes = bo.evaluate(
            "[...document.querySelectorAll('button')].filter(b => b.offsetParent).map(b => b.offsetHeight)"
        )
        assert len(sizes) >= 8 and min(sizes) >= 44
        for done in (1, 2, 3):
            bo.tap("#none")
            expect(bo.locator("#count")).to_have_text(f"{done} of 3")
        expect(bo.locator("#more")).to_be_visible()
        expect(bo.locator("#finish")).to_be_hidden()

        ada = browser.new_page(color_scheme="dark")
        ada.on("request", lambda request: asked.append(request.url))
        ada.goto(address)
        expect(ada.locator("#name")).to_be_focused()
        for key in (*"Ada", "Enter"):
            ada.keyboard.press(key)
        expect(ada.locator("#count")).to_have_text("0 of 3")
        ada.keyboard.press("1")
        expect(ada.locator("#count")).to_have_text("1 of 3")
        ada.keyboard.press("0")
        expect(ada.locator("#count")).to_have_text("2 of 3")
        ada.keyboard.press("u")
        expect(ada.locator("#count")).to_have_text("1 of 3")
        ada.keyboard.press("ArrowLeft")
        expect(ada.locator("[aria-pressed=true]")).to_have_text("1")
        proposal = ada.locator("#pictures img").nth(1)
        own = proposal.get_attribute("src")
        ada.keyboard.down("Space")
        expect(proposal).to_have_attribute("src", ada.locator("#pictures img").nth(0).get_attribute("src"))
        ada.keyboard.up("Space")
        expect(proposal).to_have_attribute("src", own)
        ada.keyboard.press("3")
        expect(ada.locator("#none")).to_have_attribute("aria-pressed", "false")
        expect(ada.locator("[aria-pressed=true]")).to_have_count(0)
        ada.keyboard.press("2")
        expect(ada.locator("#count")).to_have_text("2 of 3")
        ada.keyboard.press("9")
        ada.keyboard.press("0")
        expect(ada.locator("#end")).to_be_visible()
        expect(ada.locator("#told")).to_contain_text("Plates chosen: 0, pictures without: 3, undecided: 0.")
        expect(ada.locator("#finish")).to_be_focused()
        ada.keyboard.press("Enter")
        expect(ada.locator("#said")).to_have_text("The run goes on.")
        order = ada.evaluate("items.map(item => [item.id, item.proposals])")
    assert len(finished) == 1 and all(url.startswith((address, "data:")) for url in asked)
    (first, its), (second, others), (third, _) = order
    assert decisions.of("Ada") == {first: its[2], second: others[1], third: NONE}
    assert set(decisions.of("Bo").values()) == {NONE}
