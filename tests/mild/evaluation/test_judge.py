from __future__ import annotations

import base64
import io
import json
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from dataset_tools.errors import UserError
from mild.evaluation.judge import ANSWERS, LOCK, OPENAI, JudgeSettings, Standing, _read, judge, judged
from mild.evaluation.pairs import Opinion, Pair, PairsSettings, draw_pairs

PRICES = {"input_price": 10.0, "output_price": 100.0}
USAGE = {"prompt_tokens": 1000, "completion_tokens": 100}
ONE = 0.02
"""US dollars of 1000 and 100 tokens at these prices."""


@pytest.fixture
def pairs(make_evaluation: Callable[..., Path]) -> list[Pair]:
    """Two methods on two pictures: eight requests."""
    return draw_pairs(make_evaluation(keys=2), PairsSettings()).pairs


@pytest.fixture
def ask(endpoint: Any, pairs: list[Pair], tmp_path: Path) -> Callable[..., Standing]:
    """Lets the endpoint judge ``pairs``."""

    def run(**settings: Any) -> Standing:
        asked = JudgeSettings.model_validate({"model": "fake", "url": endpoint.url, **settings})
        return judge(pairs, asked, tmp_path / "judged", lambda standing: None)

    return run


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client would have waited between its tries."""
    waited: list[float] = []
    sleep = anyio.sleep

    async def pass_on(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr("openai._base_client.anyio.sleep", pass_on)
    return waited


def verdict(score: int, **changed: Any) -> str:
    """An answer as it is asked for, but for what is changed."""
    names = ("naturalness", "semantic_consistency", "visual_harmony", "artifact_suppression")
    return json.dumps({**dict.fromkeys(names, score), "success": True, **changed})


def only(opinions: dict[str, list[Opinion]]) -> list[Opinion]:
    """Those of the one judge that there is."""
    (said,) = opinions.values()
    return said


def seen(body: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    """Labels and pictures of a request, in their order."""
    content = body["messages"][1]["content"]
    assert [part["type"] for part in content] == ["text", "image_url"] * 2
    pictures = []
    for label, picture in zip(content[::2], content[1::2], strict=True):
        data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
        pictures.append((label["text"], np.asarray(Image.open(io.BytesIO(data)))))
    return pictures


def test_each_pair_is_shown_in_both_orders_and_the_labels_say_which_is_which(
    ask: Callable[..., Standing], endpoint: Any, pairs: list[Pair]
) -> None:
    assert ask().sent == 8
    found = []
    for body in endpoint.asked:
        shown = seen(body)
        pictures = {"original" if "original" in label else "edited": picture for label, picture in shown}
        (pair,) = (
            pair
            for pair in pairs
            if all(
                np.array_equal(np.asarray(Image.open(path)), pictures[which])
                for path, which in ((pair.before, "original"), (pair.result, "edited"))
            )
        )
        found.append((pair.name, "original" in shown[0][0]))
    assert sorted(found) == sorted((pair.name, first) for pair in pairs for first in (True, False))


def test_the_answer_is_asked_for_by_a_strict_schema(ask: Callable[..., Standing], endpoint: Any) -> None:
    ask()
    asked = endpoint.asked[0]["response_format"]["json_schema"]
    names = {"naturalness", "semantic_consistency", "visual_harmony", "artifact_suppression", "success"}
    assert asked["strict"] is True
    assert set(asked["schema"]["required"]) == set(asked["schema"]["properties"]) == names
    assert asked["schema"]["additionalProperties"] is False
    assert "temperature" not in endpoint.asked[0]


def test_no_request_names_a_method_a_picture_or_a_file(
    ask: Callable[..., Standing], endpoint: Any, pairs: list[Pair], tmp_path: Path
) -> None:
    ask()
    assert all(pair.method.encode() in pair.result.read_bytes() for pair in pairs)
    for body in endpoint.asked:
        parts = body["messages"][1]["content"][1::2]
        files = [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in parts]
        for part in parts:
            part["image_url"]["url"] = ""
        said = json.dumps(body)
        for name in ("telea", "mild", "sample-", str(tmp_path)):
            assert name not in said and not any(name.encode() in file for file in files)


def test_the_overall_score_is_the_mean_of_the_four(ask: Callable[..., Standing], endpoint: Any, tmp_path: Path) -> None:
    endpoint.answer = lambda body: endpoint.completion(endpoint.verdict(4, naturalness=9, success=True))
    ask()
    opinions = only(judged(tmp_path / "judged"))
    assert len(opinions) == 8
    assert {(one.score, one.success) for one in opinions} == {((9 + 4 + 4 + 4) / 4, True)}
    assert {one.by for one in opinions} == {"original first", "edited first"}


def test_a_second_run_sends_nothing(ask: Callable[..., Standing], endpoint: Any) -> None:
    ask()
    endpoint.asked.clear()
    again = ask()
    assert (again.sent, again.done, again.total, endpoint.asked) == (0, 8, 8, [])


def test_another_model_temperature_server_or_picture_is_asked_anew_and_nothing_else(
    ask: Callable[..., Standing], endpoint: Any, pairs: list[Pair], tmp_path: Path
) -> None:
    ask()
    assert ask(model="other").sent == 8
    assert ask(temperature=0.0).sent == 8
    assert endpoint.asked[-1]["temperature"] == 0
    assert ask(url=endpoint.url.replace("127.0.0.1", "localhost")).sent == 8, "servers answer to any model's name"
    Image.new("RGB", (64, 48)).save(pairs[0].result)
    pairs[0] = Pair(**{name: getattr(pairs[0], name) for name in Pair.__dataclass_fields__})
    assert ask().sent == 2
    here, there = (url.partition("://")[2] for url in (endpoint.url, endpoint.url.replace("127.0.0.1", "localhost")))
    assert set(judged(tmp_path / "judged")) == {
        f"fake at {here}",
        f"other at {here}",
        f"fake at {here}, temperature 0",
        f"fake at {there}",
    }


def test_answers_to_another_prompt_do_not_count(
    ask: Callable[..., Standing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask()
    monkeypatch.setattr("mild.evaluation.judge.PROMPT", "of another version")
    assert judged(tmp_path / "judged") == {}
    assert ask().sent == 8


def test_a_busy_endpoint_is_asked_again_after_the_time_that_it_names(
    ask: Callable[..., Standing], endpoint: Any, waits: list[float]
) -> None:
    endpoint.first = [(429, {"Retry-After": "17"}, {"error": {"message": "slow down"}}), (500, {}, {})]
    assert ask(concurrency=1).done == 8
    assert len(endpoint.asked) == 10
    assert waits[0] == 17
    assert len(waits) == 2


def test_an_endpoint_that_stays_busy_ends_it_in_one_line_and_what_came_is_kept(
    ask: Callable[..., Standing], endpoint: Any, waits: list[float]
) -> None:
    def answer(body: dict[str, Any]) -> Any:
        if len(endpoint.asked) == 4:
            endpoint.first = [(429, {}, {"error": {"message": "quota is used up"}})] * 2
        return endpoint.completion(endpoint.verdict(7))

    endpoint.answer = answer
    with pytest.raises(UserError, match=r"quota is used up.*what was answered is kept"):
        ask(concurrency=1, retries=1)
    endpoint.answer = lambda body: endpoint.completion(endpoint.verdict(7))
    assert ask().sent == 8 - 4


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("I would say 8 of 10.", "Invalid JSON"),
        ('{"naturalness": 8}', "semantic_consistency: Field required"),
        (verdict(8, naturalness=11), "naturalness: Input should be less than or equal to 10"),
        (verdict(8, naturalness="8"), "naturalness: Input should be a valid integer"),
        (verdict(8, success=1), "success: Input should be a valid boolean"),
        (verdict(8, reason="nice"), "reason: Extra inputs are not permitted"),
        (None, "Invalid JSON"),
    ],
)
def test_what_is_not_as_asked_for_is_no_verdict(content: str | None, complaint: str) -> None:
    answer = _read(json.dumps({"choices": [{"message": {"content": content}}], "usage": USAGE}).encode())
    assert answer.verdict is None and complaint in answer.complaint
    assert answer.usage is not None and answer.usage.prompt_tokens == 1000


def test_a_malformed_answer_is_asked_for_again_and_then_set_aside_by_name(
    ask: Callable[..., Standing], endpoint: Any, pairs: list[Pair], tmp_path: Path
) -> None:
    good, bad = ((200, {}, endpoint.completion(content)) for content in (endpoint.verdict(8), "eight"))
    # Questions go round: the first one is asked again when all others were.
    endpoint.first = [bad, *[good] * 7, bad, bad]
    ended = ask(concurrency=1, attempts=3)
    assert (ended.done, ended.sent) == (8, 10)
    (name,) = ended.set_aside
    assert name.startswith(f"{pairs[0].name}, original first: the answer is not as asked for: Invalid JSON")
    # Of that pair one order is missing: it does not count until both are there.
    assert len(only(judged(tmp_path / "judged"))) == 6
    assert ask().sent == 1
    assert len(only(judged(tmp_path / "judged"))) == 8


@pytest.mark.parametrize(
    "body", [b"<html>welcome</html>", {}, {"choices": []}, {"choices": [{"message": None}]}, {"error": {"code": 5}}]
)
def test_what_is_no_chat_completion_is_set_aside_and_a_hopeless_endpoint_left(
    ask: Callable[..., Standing], endpoint: Any, body: Any
) -> None:
    endpoint.answer = lambda asked: body
    with pytest.raises(UserError, match="no answer could be used, the last of them: it did not answer with a chat"):
        ask(attempts=1, concurrency=1)
    assert len(endpoint.asked) == 5


def test_a_refusal_is_told_in_the_models_words(ask: Callable[..., Standing], endpoint: Any) -> None:
    bad = (200, {}, endpoint.completion(None, refusal="I can't look\nat people."))
    endpoint.first = [(200, {}, endpoint.completion(endpoint.verdict(8))), bad]
    (name,) = ask(concurrency=1, attempts=1).set_aside
    assert name.endswith("edited first: it refused: I can't look at people.")


def test_a_picture_that_the_endpoint_does_not_take_is_set_aside(ask: Callable[..., Standing], endpoint: Any) -> None:
    endpoint.first = [(400, {}, {"error": {"message": "picture not allowed"}})]
    ended = ask(concurrency=1)
    assert len(ended.set_aside) == 1 and "picture not allowed" in ended.set_aside[0]
    assert ended.done == 8


def test_the_cap_stops_before_the_request_that_would_exceed_it(ask: Callable[..., Standing], endpoint: Any) -> None:
    stopped = ask(max_cost=5.5 * ONE, concurrency=4, **PRICES)
    assert stopped.at_cap
    assert (stopped.sent, stopped.done) == (5, 5)
    assert stopped.cost == pytest.approx(5 * ONE)
    # What was spent before counts: the same cap allows nothing more, and a higher one goes on.
    assert ask(max_cost=5.5 * ONE, **PRICES).sent == 0
    assert len(endpoint.asked) == 5
    ended = ask(max_cost=8.5 * ONE, **PRICES)
    assert (ended.sent, ended.done, ended.at_cap) == (3, 8, False)
    assert ended.cost == pytest.approx(8 * ONE)


def test_useless_answers_count_towards_the_cap(ask: Callable[..., Standing], endpoint: Any) -> None:
    endpoint.first = [(200, {}, endpoint.completion("no"))] * 2
    stopped = ask(max_cost=4.5 * ONE, **PRICES)
    assert (stopped.sent, stopped.done, stopped.at_cap) == (4, 2, True)


def test_until_the_first_answer_a_run_with_a_cap_sends_one_request_alone(
    ask: Callable[..., Standing], endpoint: Any
) -> None:
    assert ask(max_cost=0.1 * ONE, concurrency=8, **PRICES).sent == 1


def test_a_cap_needs_prices_and_an_endpoint_that_counts_tokens(ask: Callable[..., Standing], endpoint: Any) -> None:
    with pytest.raises(UserError, match="set input_price and output_price"):
        ask(max_cost=1.0)
    assert endpoint.asked == []
    endpoint.answer = lambda body: {**endpoint.completion(endpoint.verdict(7)), "usage": None}
    with pytest.raises(UserError, match="the cap cannot be kept"):
        ask(max_cost=1.0, **PRICES)
    assert len(endpoint.asked) == 1
    assert ask().done == 8


def test_the_key_is_the_environments_and_is_kept_nowhere(
    ask: Callable[..., Standing], endpoint: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    ask()
    assert {headers["authorization"] for headers in endpoint.headers} == {"Bearer sk-very-secret"}
    assert b"very-secret" not in (tmp_path / "judged" / ANSWERS).read_bytes()
    endpoint.first = [(401, {}, {"error": {"message": "Incorrect API key: sk-very-secret"}})]
    with pytest.raises(UserError, match="does not accept the key") as refused:
        ask(model="other", concurrency=1)
    assert "secret" not in str(refused.value)


def test_without_a_key_openais_own_endpoint_is_not_asked(
    ask: Callable[..., Standing], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        ask(url=OPENAI)


def test_an_unknown_model_and_an_endpoint_that_is_not_there_are_told_in_one_line(
    ask: Callable[..., Standing], endpoint: Any, waits: list[float]
) -> None:
    endpoint.first = [(404, {}, {"error": {"message": "no such model"}})] * 4
    with pytest.raises(UserError, match=r"knows no model 'fake'.*no such model"):
        ask()
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/v1: it cannot be reached"):
        ask(url="http://127.0.0.1:9/v1", retries=1)


def test_no_more_requests_run_at_once_than_set(ask: Callable[..., Standing], endpoint: Any) -> None:
    running, most, lock, met = 0, 0, threading.Lock(), threading.Barrier(4)

    def answer(body: dict[str, Any]) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        met.wait(60)  # until four are here: fewer at once, and it fails
        with lock:
            running -= 1
        return endpoint.completion(endpoint.verdict(7))

    endpoint.answer = answer
    assert ask(concurrency=4).done == 8
    assert most == 4


def test_pairs_of_equal_pictures_are_asked_for_once(
    make_evaluation: Callable[..., Path], endpoint: Any, tmp_path: Path
) -> None:
    pairs = draw_pairs(make_evaluation(["twin-a", "twin-b"], keys=1, name="twins"), PairsSettings()).pairs
    for pair in pairs:
        pair.result.write_bytes(pair.before.read_bytes())
    settings = JudgeSettings(model="fake", url=endpoint.url)
    assert judge(pairs, settings, tmp_path / "judged", lambda standing: None).sent == 2


def test_answers_that_came_twice_count_once(ask: Callable[..., Standing], tmp_path: Path) -> None:
    ask()
    with closing(sqlite3.connect(tmp_path / "judged" / ANSWERS)) as answers, answers:
        answers.execute("INSERT INTO answers SELECT * FROM answers")
    assert len(only(judged(tmp_path / "judged"))) == 8


def test_while_one_asks_another_is_told_so_and_sends_nothing(
    ask: Callable[..., Standing], endpoint: Any, tmp_path: Path
) -> None:
    ask(max_cost=ONE, **PRICES)
    sent = len(endpoint.asked)
    with FileLock(tmp_path / "judged" / LOCK), pytest.raises(UserError, match="another mild judge is at work"):
        ask()
    assert len(endpoint.asked) == sent


def test_a_damaged_picture_is_told_in_one_line(pairs: list[Pair], endpoint: Any, tmp_path: Path) -> None:
    pairs[0].result.write_bytes(b"no picture")
    damaged = Pair(**{name: getattr(pairs[0], name) for name in Pair.__dataclass_fields__})
    with pytest.raises(UserError, match="cannot be decoded"):
        judge([damaged], JudgeSettings(model="fake", url=endpoint.url), tmp_path / "judged", lambda standing: None)
