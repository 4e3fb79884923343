from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from mild.evaluation.report.tables import (
    Row,
    Table,
    ablation_tables,
    by_verdict,
    difference,
    difference_below,
    latex_tables,
    markdown_tables,
    number,
    signed,
    table_of,
)
from mild.evaluation.summary import Cell, Estimate, Group, MethodRow, Summary

MakeSummary = Callable[..., Summary]


def _first(summary: Summary) -> Table:
    return table_of(summary, summary.groups[0])


def _row(table: Table, name: str) -> Row:
    return next(row for row in table.rows if row.name == name)


def _ranks(table: Table, metric: str) -> dict[str, str]:
    index = [column.metric.name for column in table.columns].index(metric)
    return {row.name: value.rank for row in table.rows for value in row.values[index : index + 1] if value}


def test_the_best_and_the_second_best_are_marked_whichever_way_is_better(make_summary: MakeSummary) -> None:
    table = _first(make_summary())
    for metric in ("psnr_hole", "fid"):
        ranks = {name: rank for name, rank in _ranks(table, metric).items() if rank}
        assert ranks == {"mild-arm": "best", "base": "second"}


def test_trainings_of_an_arm_are_not_ranked_beside_its_mean(make_summary: MakeSummary) -> None:
    """mild-1 alone would be best: one chooses no seed afterwards."""
    table = _first(make_summary())
    names = [row.name for row in table.rows]
    assert names[3:6] == ["mild-arm", "mild-0", "mild-1"] and _row(table, "mild-arm").seeds == 2
    assert _row(table, "mild-1").member and _ranks(table, "psnr_hole")["mild-1"] == ""


def test_where_all_are_equal_nobody_is_best(make_summary: MakeSummary) -> None:
    assert set(_ranks(_first(make_summary()), "residual").values()) == {""}


@pytest.mark.parametrize(
    ("metric", "estimate", "verdict"),
    [
        ("psnr_hole", Estimate(mean=1, low=0.5, high=1.5), "better"),
        ("fid", Estimate(mean=1, low=0.5, high=1.5), "worse"),
        ("psnr_hole", Estimate(mean=1, low=-0.5, high=1.5), "same"),
        ("psnr_hole", Estimate(mean=1), "same"),
        ("psnr_hole", Estimate(), ""),
    ],
)
def test_a_difference_says_better_or_worse_only_where_it_is_told_apart(
    make_summary: MakeSummary, metric: str, estimate: Estimate, verdict: str
) -> None:
    group = make_summary().groups[0].model_copy(update={"differences": {"telea": {metric: estimate}}})
    table = table_of(make_summary(), group)
    index = [column.metric.name for column in table.columns].index(metric)
    value = _row(table, "telea").values[index]
    assert value is not None and value.verdict == verdict


def test_a_metric_without_any_value_is_no_column_but_a_reason(make_summary: MakeSummary) -> None:
    summary = make_summary()
    real = table_of(summary, summary.groups[3])
    assert [column.metric.name for column in real.columns] == ["fid", "residual"]
    assert real.left_out == [
        ("PSNR hole, dB", "no clean background is known"),
        ("LPIPS", "run mild weights pull lpips"),
    ]


def test_results_that_are_all_identical_have_a_word_and_no_number(make_summary: MakeSummary) -> None:
    group = Group(
        name="", dataset="composite", cases=2, cells={"base": {"psnr_hole": Cell(identical=2)}}, differences={}
    )
    value = _row(table_of(make_summary(), group), "base").values[0]
    assert value is not None and value.mean == "identical"


def test_what_would_stand_in_each_cell_stands_in_the_head(make_summary: MakeSummary) -> None:
    table = _first(make_summary())
    assert [column.notes for column in table.columns] == [
        ["1 identical to the reference (infinite), not in the mean"],
        ["60 pictures: FID under 2,048 says little"],
        ["not computed for 2: the hole is too small"],
    ]
    assert all(not value.notes for row in table.rows for value in row.values if value)
    group = make_summary().groups[0]
    cells = {
        **group.cells,
        "telea": {**group.cells["telea"], "fid": Cell(mean=3.0, count=9, warning="only 9", ranked=3.0)},
    }
    table = table_of(make_summary(), group.model_copy(update={"cells": cells}))
    found = {row.name: row.values[1].notes for row in table.rows if row.values[1:] and row.values[1]}
    assert found["telea"] == ["only 9"] and found["base"] == ["60 pictures: FID under 2,048 says little"]


def test_the_ablation_has_a_rung_a_row_and_the_difference_to_the_full_model(make_summary: MakeSummary) -> None:
    parts, cues = ablation_tables(_first(make_summary()))
    assert parts.parts == ["Backbone", "HMG", "SMA"]
    found = [
        (row.name, "".join("x" if check else "-" for check in checks), deltas[0]) for row, checks, deltas in parts.rows
    ]
    assert found == [
        ("sdxl-inpaint", "---", "−2.27"),
        ("base", "---", "−0.05"),
        ("mild-backbone", "x--", "−0.31"),
        ("mild-no-sma", "xx-", "−0.20"),
        ("mild-arm", "xxx", ""),
    ]
    assert cues.parts == ["Pose", "Parsing"]
    found = [
        (row.name, "".join("x" if check else "-" for check in checks), deltas[0]) for row, checks, deltas in cues.rows
    ]
    assert found == [("mild-no-pose", "-x", "−0.11"), ("mild-arm", "xx", "")]


def test_a_rung_is_held_against_the_one_below_beside_the_baseline_unless_both_are_one(
    make_summary: MakeSummary,
) -> None:
    below = {"mild-no-sma": "mild-backbone", "mild-backbone": "base"}
    moved = {"psnr_hole": Estimate(mean=-0.11, low=-0.2, high=-0.02)}
    summary = make_summary()
    methods = [method.model_copy(update={"below": below.get(method.name, "")}) for method in summary.methods]
    group = summary.groups[0].model_copy(
        update={
            "to_below": dict.fromkeys(below, moved),
            "differences": {**summary.groups[0].differences, "mild-backbone": moved},
        }
    )
    found = summary.model_copy(update={"methods": methods, "groups": [group]})
    rows = {row.name: row for row in table_of(found, group).rows}
    told = "▼ −0.11 (−0.20 to −0.02)"
    for name, to_baseline, to_below in (
        ("mild-no-sma", "", f"to mild-backbone: {told}"),
        ("mild-backbone", told, ""),
        ("telea", "▼ −3.41 (−3.90 to −2.90)", ""),
    ):
        value = rows[name].values[0]
        assert value and difference(value) == to_baseline and difference_below(value, rows[name].method) == to_below
    assert f"to mild-backbone: {told}" in markdown_tables(found)


def test_extents_are_a_part_where_any_model_has_them(make_summary: MakeSummary) -> None:
    def with_extents(method: MethodRow) -> MethodRow:
        parts = method.parts and {**method.parts, "extents": method.name == "mild-no-sma"}
        return method.model_copy(update={"parts": parts})

    summary = make_summary(methods=[with_extents(method) for method in make_summary().methods])
    parts, _ = ablation_tables(_first(summary))
    assert parts.parts == ["Backbone", "HMG", "SMA", "Extents"]
    checks = {row.name: "".join("x" if check else "-" for check in found) for row, found, _ in parts.rows}
    assert (checks["mild-no-sma"], checks["mild-arm"]) == ("xx-x", "xxx-")


def test_rungs_are_ranked_among_themselves(make_summary: MakeSummary) -> None:
    """The base is second best of the whole table, and no row of table 6."""
    cues = ablation_tables(_first(make_summary()))[1]
    assert [row.values[0].rank for row, _, _ in cues.rows if row.values[0]] == ["second", "best"]


def test_one_model_alone_is_no_ablation(make_summary: MakeSummary) -> None:
    methods = [method for method in make_summary().methods if method.name in ("telea", "base", "mild-0", "mild-1")]
    assert ablation_tables(_first(make_summary(methods=methods))) == []


def test_what_got_worse_comes_first(make_summary: MakeSummary) -> None:
    against = make_summary().against
    assert against is not None
    assert [change.verdict for change in by_verdict(against.changes)] == ["worse", "better", "same"]


def test_numbers_have_a_true_minus_and_no_negative_zero() -> None:
    assert (number(-1.234, 2), number(-0.001, 2), signed(0.05, 2), signed(-0.05, 1)) == (
        "−1.23",
        "0.00",
        "+0.05",
        "−0.1",
    )


class _Cells(HTMLParser):
    """Tables of a page as rows of the text of cells."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self._open = True
        if tag in ("strong", "ins") and self._open:
            self.tables[-1][-1][-1] += f"{tag}:"

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.tables[-1][-1][-1] += data


def _read(markdown: str) -> list[list[list[str]]]:
    """The tables of a Markdown text as another program reads them."""
    reader = _Cells()
    reader.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))
    return reader.tables


def test_markdown_is_read_by_others_as_the_same_tables(make_summary: MakeSummary) -> None:
    tables = _read(markdown_tables(make_summary()))
    first = {row[0].removesuffix("baseline"): row[1:] for row in tables[0]}
    assert first["Method"] == ["PSNR hole, dB ↑", "FID ↓", "Residual person, % ↓"]
    assert first["mild-arm (mean of 2)"][0] == "strong:19.6718.87 to 20.47; n 59; ≈ +0.05 (−0.02 to +0.12)"
    assert first["Base in the same pipeline"][1] == "ins:41.3n 60"
    assert first["LaMa"] == ["not run"] * 3
    # All cases and the ablation's two, two parts, the other dataset, time, and the run before.
    assert len(tables) == 8 and all(len({len(row) for row in table}) == 1 for table in tables)


def test_whatever_a_name_holds_stays_a_cell_of_markdown(make_summary: MakeSummary) -> None:
    title = "a|b *c* <i>d</i> `e` [f](g) \\"
    methods = [make_summary().methods[0].model_copy(update={"title": title}), *make_summary().methods[1:]]
    tables = _read(markdown_tables(make_summary(methods=methods)))
    assert tables[0][1][0] == title


def test_latex_has_as_many_cells_in_each_row_as_columns_and_marks_the_best(make_summary: MakeSummary) -> None:
    text = latex_tables(make_summary())
    tables = re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n\\toprule\n(.*?)\\bottomrule", text, re.DOTALL)
    assert len(tables) == 8
    for columns, body in tables:
        rows = [line for line in body.splitlines() if line != r"\midrule"]
        assert rows and all(line.endswith(r" \\") for line in rows)
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in rows} == {len(columns)}
    assert r"\textbf{19.67}" in text and r"\underline{19.62}" in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_letters_that_mean_something_to_latex_are_escaped(make_summary: MakeSummary) -> None:
    title = r"50% of a_b & {c} #1 $x \ ~^"
    methods = [make_summary().methods[0].model_copy(update={"title": title}), *make_summary().methods[1:]]
    text = latex_tables(make_summary(methods=methods))
    escaped = r"50\% of a\_b \& \{c\} \#1 \$x \textbackslash{} \textasciitilde{}\textasciicircum{}"
    assert f"\n{escaped} & " in text
