from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mild.evaluation import ratings as made
from mild.evaluation.pairs import DrawnPairs, Opinion, PairsSettings, draw_pairs
from mild.evaluation.ratings import RatingsTable, agreement, as_latex, as_markdown, ratings_table, write_table

NOBODY = None
LITERATURE = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NOBODY, NOBODY, NOBODY],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NOBODY, 3],
    [NOBODY, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NOBODY],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NOBODY],
]
"""Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: four observers of twelve units."""


def opinions_of(rows: Sequence[Sequence[float | None]], success: bool = False) -> list[Opinion]:
    """A row a rater: scores, or, as 0 and 1, success."""
    return [
        Opinion(str(unit), f"rater {rater}", 5.0 if success else float(value), bool(value) if success else False)
        for rater, row in enumerate(rows)
        for unit, value in enumerate(row)
        if value is not None
    ]


def test_alpha_of_scores_is_that_of_interval_data_in_the_literature() -> None:
    found = agreement(opinions_of(LITERATURE), "rater")
    assert found.score == pytest.approx(0.849, abs=5e-4)
    assert found.pairs == 11


def test_alpha_of_success_is_that_of_binary_data_in_the_literature() -> None:
    """The same paper, section A: 1 - (20 - 1) * 4 / (14 * 6)."""
    meg, owen = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert agreement(opinions_of([meg, owen], success=True), "rater").success == pytest.approx(1 - 19 * 4 / (14 * 6))


def test_alpha_equals_observed_over_expected_disagreement_by_hand() -> None:
    """1 - D_o / D_e over all pairs of values: within units, and of all units."""
    rng = np.random.default_rng(0)
    scores = rng.integers(1, 11, (3, 8)).astype(float)
    within = [(a - b) ** 2 for unit in scores.T for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j]
    everything = scores.ravel()
    among = [(a - b) ** 2 for i, a in enumerate(everything) for j, b in enumerate(everything) if i != j]
    expected = 1 - np.mean(within) / np.mean(among)
    assert agreement(opinions_of(scores.tolist()), "rater").score == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([[3, 4, 5]], "fewer than two raters"),
        ([], "fewer than two raters"),
        ([[3, NOBODY], [NOBODY, 4]], "no pair was judged by two raters"),
        ([[3, 3], [3, 3]], "all opinions are equal"),
    ],
)
def test_agreement_that_cannot_be_computed_says_why(rows: list[list[float | None]], why: str) -> None:
    found = agreement(opinions_of(rows), "rater")
    assert (found.score, found.score_not_computed) == (None, why)
    assert found.success is None and found.success_not_computed


def test_of_two_orders_the_mean_absolute_difference_is_given() -> None:
    found = agreement(opinions_of([[5, 7, 2], [6, 4, 2]]), "order", differences=True)
    assert found.mean_difference == pytest.approx((1 + 3 + 0) / 3)
    assert agreement(opinions_of([[5, 7], [6, 4]]), "rater").mean_difference is None


@pytest.fixture
def drawn(make_evaluation: Callable[..., Path]) -> DrawnPairs:
    """Methods ``a`` and ``b_&`` on three pictures."""
    return draw_pairs(make_evaluation(["a", "b"]), PairsSettings())


@pytest.fixture
def table(drawn: DrawnPairs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RatingsTable:
    """A model that gives ``a`` 4 and 6, and people of whom one rated a picture of ``b`` only."""
    of = {method: [pair.digest for pair in drawn.pairs if pair.method == method] for method in ("a", "b")}
    model = [
        Opinion(digest, order, score, score > 5)
        for digest in of["a"]
        for order, score in (("original first", 4.0), ("edited first", 6.0))
    ]
    elsewhere = Opinion("of another evaluation", "Ada", 1.0, False)
    people = [
        *(Opinion(digest, "Ada", score, True) for digest, score in zip(of["b"], (10.0, 8.0, 9.0), strict=True)),
        Opinion(of["b"][0], "Bo", 6.0, False),
        elsewhere,
    ]
    monkeypatch.setattr(made, "judged", lambda folder: {"gpt-4o": model, "other": [elsewhere]})
    monkeypatch.setattr(made, "rated", lambda folder: people)
    return ratings_table(drawn, PairsSettings(), tmp_path)


def test_means_are_over_pictures_of_the_means_of_opinions(table: RatingsTable) -> None:
    (a_model, a_people), (b_model, b_people) = (row.marks for row in table.rows)
    assert [judges.name for judges in table.judges] == ["gpt-4o", "people"]
    assert a_model is not None and (a_model.overall.mean, a_model.success.mean, a_model.pairs) == (5, 0.5, 3)
    assert a_people is None and b_model is None
    assert b_people is not None
    # (10 + 6) / 2, 8, 9; half of the opinions on the first, all on the others.
    assert b_people.overall.mean == pytest.approx((8 + 8 + 9) / 3)
    assert b_people.success.mean == pytest.approx((0.5 + 1 + 1) / 3)
    assert b_people.overall.low is not None and 8 <= b_people.overall.low < b_people.overall.mean


def test_agreement_of_the_judges_is_in_the_table(table: RatingsTable) -> None:
    model, people = table.judges
    assert (model.agreement.mean_difference, model.agreement.pairs) == (2, 3)
    assert people.opinions == ["Ada", "Bo"] and people.agreement.pairs == 1


def test_the_files_hold_the_table(table: RatingsTable, tmp_path: Path) -> None:
    files = write_table(table, tmp_path / "judged")
    assert [file.name for file in files] == ["table.json", "table.md", "table.tex"]
    assert write_table(table, tmp_path / "judged") == files
    assert RatingsTable.model_validate(json.loads(files[0].read_text())) == table


def test_markdown_has_a_row_a_method_and_marks_what_is_best(table: RatingsTable) -> None:
    lines = as_markdown(table).splitlines()
    assert lines[0] == ("| method | AI (gpt-4o) overall | human overall | AI (gpt-4o) success | human success |")
    assert lines[2] == "| A | 5.0 (5.0 to 5.0) |  | 50 % (50 to 50) |  |"
    assert lines[3].startswith("| B |  | 8.3 (8.0 to ")
    assert "People: 2 raters, 3 of 6 pairs so far; Krippendorff's alpha of scores" in lines[-1]
    assert "scores differ by 2.00 on average" in lines[-2]


def test_whoever_was_not_judged_on_all_pairs_is_not_the_best_and_says_of_how_many(table: RatingsTable) -> None:
    """Each rater begins with other pictures."""
    marks = [row.marks for row in table.rows]
    assert marks[1][1] is not None
    few = marks[1][1].model_copy(update={"pairs": 2})
    rows = [table.rows[0].model_copy(update={"marks": [marks[0][0], few]}), table.rows[1]]
    lines = as_markdown(table.model_copy(update={"rows": rows})).splitlines()
    assert ", n 2 |" in lines[2] and ", n " not in lines[3]
    assert "**" not in lines[2] + lines[3]


def test_latex_escapes_what_it_would_read_as_its_own(table: RatingsTable) -> None:
    row = table.rows[0].model_copy(update={"title": "50%_a & b\\c"})
    text = as_latex(table.model_copy(update={"rows": [row]}))
    assert r"50\%\_a \& b\textbackslash{}c & 5.0 (5.0 to 5.0) &  & 50 \% (50 to 50) & " in text
    assert r"\begin{tabular}{lrrrr}" in text


def test_the_larger_mean_of_a_column_is_bold(table: RatingsTable) -> None:
    marks = [row.marks for row in table.rows]
    both = table.model_copy(
        update={
            "rows": [
                table.rows[0].model_copy(update={"marks": [marks[0][0], marks[1][1]]}),
                table.rows[1].model_copy(update={"marks": [marks[1][1], None]}),
            ]
        }
    )
    lines = as_markdown(both).splitlines()
    assert "| 5.0 (5.0 to 5.0) |" in lines[2] and "**8.3" in lines[3] and lines[3].count("**") == 4
    assert lines[2].count("**") == 0


def test_where_nobody_judged_the_table_says_so(drawn: DrawnPairs, tmp_path: Path) -> None:
    assert "Nobody has judged these pairs yet." in as_markdown(ratings_table(drawn, PairsSettings(), tmp_path / "no"))
    assert not (tmp_path / "no").exists()
