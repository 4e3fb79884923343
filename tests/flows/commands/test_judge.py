from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., tuple[int, str, str]]
MakeEvaluation = Callable[..., Path]


def test_a_model_judges_an_evaluation_and_the_table_is_printed_and_written(
    mild_anew: Command, make_evaluation: MakeEvaluation, endpoint: Any
) -> None:
    evaluation = make_evaluation(keys=2)
    code, out, err = mild_anew("judge", evaluation, "--model", "fake", "--url", endpoint.url, "--pairs", "1")
    assert (code, err) == (0, "")
    assert "4 of 4 requests done, 4 sent now" in out
    place = endpoint.url.partition("://")[2]
    assert "TELEA" in out and "7.0" in out
    assert f"fake at {place}: each pair judged in both orders; Krippendorff's alpha" in out
    beside = evaluation.with_name("evaluation-judged")
    assert {file.name for file in beside.iterdir()} - {"judge.lock"} == {
        "answers.sqlite",
        "table.json",
        "table.md",
        "table.tex",
    }


def test_what_was_set_aside_and_a_cap_that_stopped_it_are_told_and_exit_with_1(
    mild_anew: Command, make_evaluation: MakeEvaluation, endpoint: Any
) -> None:
    evaluation = make_evaluation(keys=1)
    endpoint.first = [(400, {}, {"error": {"message": "not [this] one"}})]
    started = ("judge", evaluation, "--model", "fake", "--url", endpoint.url, "--set", "concurrency=1")
    capped = ("--max-cost", "0.03", "--set", "input_price=10", "--set", "output_price=100")
    code, out, err = mild_anew(*started, *capped)
    assert code == 1
    assert "set aside composite/sample-0/exact/telea, original first: " in err and "not [this] one" in err
    assert "beyond --max-cost 0.03" in err and "2 of 4 requests done, 1 sent now; 0.0200 USD so far" in out
    code, out, err = mild_anew(*started)
    assert (code, err) == (0, "") and "4 of 4 requests done, 3 sent now" in out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--set", "key=sk-1"), "unknown setting 'key'"),
        (("--max-cost", "1"), "max_cost needs the model's prices"),
        (("--dataset", "coco"), "dataset 'coco' is none of"),
        (("--url", "ftp://here"), "url: "),
    ],
)
def test_what_must_be_mended_is_one_line(
    mild_anew: Command, make_evaluation: MakeEvaluation, endpoint: Any, options: tuple[str, ...], complaint: str
) -> None:
    code, _, err = mild_anew("judge", make_evaluation(), "--model", "fake", "--url", endpoint.url, *options)
    assert code == 2 and complaint in err and len(err.splitlines()) == 1
    assert "sk-1" not in err
