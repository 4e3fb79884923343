"""What tables of an evaluation say, once for all of their forms, and two of these: Markdown and LaTeX.

The best value of a column is bold and the second best underlined, as in the paper's table 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mild.evaluation.summary import Cell, Change, Estimate, Group, MethodRow, MetricRow, Summary, with_every_part

Rank = Literal["", "best", "second"]
Verdict = Literal["", "better", "worse", "same"]
SYMBOLS: dict[Verdict, str] = {"better": "▲", "worse": "▼", "same": "≈"}
LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "−": "$-$",
    "▲": r"$\blacktriangle$",
    "▼": r"$\blacktriangledown$",
    "≈": r"$\approx$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "✓": r"$\checkmark$",
    "Δ": r"$\Delta$",
}


@dataclass(frozen=True)
class Value:
    """What stands where a method's row meets a metric's column."""

    cell: Cell
    digits: int
    rank: Rank
    """Among the methods of the table, by `Cell.ranked`."""
    difference: Estimate
    """To the baseline; empty for the baseline itself and for metrics that are no means over pictures."""
    verdict: Verdict
    """Of the difference; ``same``: not told apart."""
    to_below: Estimate
    """The difference to the rung below; empty where there is none."""
    verdict_below: Verdict
    """Of that."""
    notes: list[str]
    """What must be said of the mean, beside `Column.notes`."""

    @property
    def mean(self) -> str:
        """As text; ``identical`` where all results are."""
        if self.cell.mean is None:
            return "identical" if self.cell.identical else "–"
        return number(self.cell.mean, self.digits)

    @property
    def interval(self) -> str:
        """As text; empty where there is none."""
        return interval(self.cell, number, self.digits)


@dataclass(frozen=True)
class Column:
    """A metric in the head of a table."""

    metric: MetricRow
    notes: list[str]
    """What would have to be said in each of its cells."""

    @property
    def head(self) -> str:
        """Its title, and which way is better."""
        return f"{self.metric.title} {'↑' if self.metric.larger_is_better else '↓'}"

    @property
    def origin(self) -> str:
        """Region, network and reference."""
        reference = "no reference" if self.metric.reference == "none" else f"reference: {self.metric.reference}"
        return "; ".join(part for part in (self.metric.region, self.metric.network, reference) if part)


@dataclass(frozen=True)
class Row:
    """A method, or an arm: the mean of methods that differ in the seed of their training alone."""

    name: str
    title: str
    method: MethodRow
    """Of an arm, its first."""
    seeds: int
    """Of an arm, how many methods it is the mean of; else 0."""
    member: bool
    """Whether it is part of an arm that the table shows; such rows have no rank."""
    baseline: bool
    values: list[Value | None]
    """One a column; none where it was not run."""


@dataclass(frozen=True)
class Table:
    """All methods on one group of cases."""

    dataset: str
    title: str
    cases: int
    columns: list[Column]
    rows: list[Row]
    left_out: list[tuple[str, str]]
    to_full: dict[str, dict[str, Estimate]]
    """See `mild.evaluation.summary.Group.to_full`."""
    """Title of each metric that has no value here, and why."""


@dataclass(frozen=True)
class AblationTable:
    """What the parts of MILD bring, on all cases of the first dataset."""

    title: str
    parts: list[str]
    """Heads of the columns of check marks."""
    columns: list[Column]
    rows: list[tuple[Row, list[bool], list[str]]]
    """Row, check marks, and a column the difference of its mean to the full model's, as text; empty without one."""


def table_of(summary: Summary, group: Group) -> Table:
    """The table of a group. Metrics without any value in it are not columns of it."""
    found = _rows(summary, group)
    columns, left_out, of_metric = [], [], []
    for metric in summary.metrics:
        cells = [group.cells.get(row.name, {}).get(metric.name) for row in found]
        present = [cell for cell in cells if cell is not None]
        if metric.not_run or not any(cell.mean is not None or cell.identical for cell in present):
            reasons = Counter[str]()
            for cell in present:
                reasons.update(cell.not_computed)
            # Of groups of pictures there are no distributions.
            why = "no method was run" if not found or not group.name else "it is of all pictures together"
            left_out.append((metric.title, metric.not_run or "; ".join(reasons) or why))
            continue
        common = [note for note in _notes(present[0]) if all(note in _notes(cell) for cell in present)]
        columns.append(Column(metric, common))
        of_metric.append(_values(metric, found, cells, group, summary.baseline, common))
    rows = [replace(row, values=[values[index] for values in of_metric]) for index, row in enumerate(found)]
    return Table(group.dataset, group.name or "all cases", group.cases, columns, rows, left_out, group.to_full)


def tables_of(summary: Summary) -> dict[str, list[Table]]:
    """Tables by their dataset: all of its cases first, then parts of them."""
    return {
        dataset.name: [table_of(summary, group) for group in summary.groups if group.dataset == dataset.name]
        for dataset in summary.datasets
    }


def ablation_tables(table: Table) -> list[AblationTable]:
    """Tables 2 and 6 of the paper, of a table that `table_of` made; those that there is nothing for are left out."""
    rows = [row for row in table.rows if not row.member and not row.method.not_run]
    rungs = [row for row in rows if row.method.kind == "mild" and row.method.parts is not None]
    whole_ones = with_every_part([row.method for row in rungs])
    full = next((row for row in rungs if row.method in whole_ones), None)
    partial = [row for row in rungs if _has(row, "hmg") and not (_has(row, "pose") and _has(row, "parsing"))]
    others = [row for row in rows if row.method.kind in ("sdxl-inpaint", "base")]
    whole = [row for row in rungs if row not in partial]
    # Beyond the paper.
    extents = ["extents"] if any(_has(row, "extents") for row in whole) else []
    tables = []
    if len(whole) > 1:
        marks = [
            (row, [row in whole, *(_has(row, part) for part in ("hmg", "sma", *extents))]) for row in others + whole
        ]
        heads = ["Backbone", "HMG", "SMA", *(part.capitalize() for part in extents)]
        tables.append(_ablation("Parts of MILD (table 2)", heads, table, marks, full))
    if partial:
        # With the other parts alike.
        alike = [[_has(row, part) for part in ("sma", "extents")] for row in partial]
        partial = [row for row, parts in zip(partial, alike, strict=True) if parts == alike[0]]
        compared = [row for row in whole if [_has(row, part) for part in ("sma", "extents")] == alike[0]]
        marks = [(row, [_has(row, "pose"), _has(row, "parsing")]) for row in compared + partial]
        tables.append(_ablation("Cues of HMG (table 6)", ["Pose", "Parsing"], table, marks, full))
    return tables


def number(value: float, digits: int) -> str:
    """With a true minus sign, and none before zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int) -> str:
    """The same, with its sign."""
    text = number(value, digits)
    return text if text.startswith("−") else f"+{text}"


def interval(estimate: Estimate, shown: Callable[[float, int], str], digits: int) -> str:
    """The interval as text; empty where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{shown(estimate.low, digits)} to {shown(estimate.high, digits)}"


def difference(value: Value) -> str:
    """The difference to the baseline with its interval, after a symbol of what it means; empty where there is none."""
    return _difference(value.difference, value.verdict, value.digits)


def difference_below(value: Value, method: MethodRow) -> str:
    """The same to the rung below, whose name it begins with."""
    told = _difference(value.to_below, value.verdict_below, value.digits)
    return told and f"to {method.below}: {told}"


def _difference(moved: Estimate, verdict: Verdict, digits: int) -> str:
    if moved.mean is None:
        return ""
    between = interval(moved, signed, digits)
    return f"{SYMBOLS[verdict]} {signed(moved.mean, digits)}" + (f" ({between})" if between else "")


def change(one: Change, digits: int) -> tuple[str, str, str]:
    """Before, now, and their difference with its interval, as text."""
    moved = signed(one.now - one.before if one.difference.mean is None else one.difference.mean, digits)
    between = interval(one.difference, signed, digits)
    return number(one.before, digits), number(one.now, digits), moved + (f" ({between})" if between else "")


def by_verdict(changes: Iterable[Change]) -> list[Change]:
    """Worse ones first, then better ones."""
    return sorted(changes, key=lambda one: ("worse", "better", "same").index(one.verdict))


def markdown_tables(summary: Summary) -> str:
    """All tables of the report as Markdown (GitHub's)."""
    lines = [f"**{in_markdown(summary.headline.sentence)}**", ""] if summary.headline else []
    for form in _forms(summary):
        lines += [f"### {in_markdown(form.title)}", "", f"{in_markdown(form.caption)}", ""]
        lines += [_markdown_row([in_markdown(head) for head in form.heads])]
        lines += ["|" + "|".join(" --- " if index < form.texts else " ---: " for index in range(len(form.heads))) + "|"]
        lines += [_markdown_row([_markdown_cell(cell) for cell in row]) for row in form.rows]
        lines += ["", *(f"- {in_markdown(note)}" for note in form.notes), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def latex_tables(summary: Summary) -> str:
    """All tables of the report as LaTeX; what they need is named in their first line."""
    lines = [r"% \usepackage{booktabs,amssymb}"]
    for form in _forms(summary):
        caption = " ".join([f"{form.title}.", form.caption, *(f"{note}." for note in form.notes)])
        lines += [
            "",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{in_latex(caption)}}}",
            rf"\begin{{tabular}}{{{'l' * form.texts}{'r' * (len(form.heads) - form.texts)}}}",
            r"\toprule",
            " & ".join(in_latex(head) for head in form.heads) + r" \\",
            r"\midrule",
            *(" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in form.rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Text:
    """A cell in words."""

    main: str
    rank: Rank = ""
    small: str = ""


@dataclass(frozen=True)
class _Form:
    """A table in words."""

    title: str
    caption: str
    heads: list[str]
    texts: int
    """Columns, from the left, that hold no numbers."""
    rows: list[list[_Text]]
    notes: list[str]


def _rows(summary: Summary, group: Group) -> list[Row]:
    """Rows without values: methods in their order, an arm before its own."""
    rows: list[Row] = []
    run = [method for method in summary.methods if method.name in group.cells]
    arms = {arm: [method for method in run if method.arm == arm] for arm in {method.arm for method in run} - {""}}
    shown = {arm: members for arm, members in arms.items() if arm in group.cells and len(members) > 1}
    for method in summary.methods:
        if method.arm in shown:
            if method is shown[method.arm][0]:
                members = shown[method.arm]
                baseline = summary.baseline == method.arm
                rows.append(Row(method.arm, method.arm, method, len(members), False, baseline, []))
                rows += [Row(one.name, one.title, one, 0, True, summary.baseline == one.name, []) for one in members]
            elif method.not_run:
                rows.append(Row(method.name, method.title, method, 0, True, False, []))
        elif method in run or method.not_run:
            # An arm of one is that one.
            baseline = bool(summary.baseline) and summary.baseline in (method.name, method.arm)
            rows.append(Row(method.name, method.title, method, 0, False, baseline, []))
    return rows


def _notes(cell: Cell) -> list[str]:
    """What must be said of a mean."""
    notes = [cell.warning] if cell.warning else []
    if cell.identical and cell.mean is not None:
        notes.append(f"{cell.identical} identical to the reference (infinite), not in the mean")
    if cell.ranked is None and cell.mean is not None:
        notes.append("without a rank: others have values of more pictures")
    return notes + [f"not computed for {count}: {reason}" for reason, count in cell.not_computed.items()]


def _values(
    metric: MetricRow, rows: list[Row], cells: Sequence[Cell | None], group: Group, baseline: str, common: list[str]
) -> list[Value | None]:
    means = [None if row.member or cell is None else cell.ranked for row, cell in zip(rows, cells, strict=True)]
    values: list[Value | None] = []
    for row, cell, rank in zip(rows, cells, _ranks(means, metric.larger_is_better), strict=True):
        if cell is None:
            values.append(None)
            continue
        moved = Estimate() if row.baseline else group.differences.get(row.name, {}).get(metric.name, Estimate())
        # To a baseline that is the rung below as well, once is enough.
        again = moved.mean is not None and row.method.below == baseline
        below = Estimate() if again else group.to_below.get(row.name, {}).get(metric.name, Estimate())
        notes = [note for note in _notes(cell) if note not in common]
        verdicts = _verdict(moved, metric), _verdict(below, metric)
        values.append(Value(cell, metric.digits, rank, moved, verdicts[0], below, verdicts[1], notes))
    return values


def _verdict(moved: Estimate, metric: MetricRow) -> Verdict:
    if moved.mean is None:
        return ""
    better = (moved.mean > 0) == metric.larger_is_better
    return "same" if not moved.told_apart else "better" if better else "worse"


def _ranks(means: Sequence[float | None], larger_is_better: bool) -> list[Rank]:
    """Of each mean among the others; equal ones share theirs, and where all are equal nobody has one."""
    best, second, *_ = [*sorted({mean for mean in means if mean is not None}, reverse=larger_is_better), None, None]
    if second is None:
        return [""] * len(means)
    return ["best" if mean == best else "second" if mean == second else "" for mean in means]


def _ablation(
    title: str, parts: list[str], table: Table, marks: list[tuple[Row, list[bool]]], full: Row | None
) -> AblationTable:
    """Rows with the fewest parts first, ranked among themselves."""
    marks = sorted(marks, key=lambda mark: sum(mark[1]))
    ranks = [
        _ranks([value and value.cell.ranked for value in values], column.metric.larger_is_better)
        for column, values in zip(table.columns, zip(*(row.values for row, _ in marks), strict=True), strict=True)
    ]
    rows = []
    for index, (row, checks) in enumerate(marks):
        values = [value and replace(value, rank=of[index]) for value, of in zip(row.values, ranks, strict=True)]
        rows.append((replace(row, values=values), checks, _deltas(row, full, table)))
    return AblationTable(title, parts, table.columns, rows)


def _has(row: Row, part: str) -> bool:
    return bool(row.method.parts and row.method.parts.get(part))


def _deltas(row: Row, full: Row | None, table: Table) -> list[str]:
    """A column the difference to the full model, with its interval where it was taken picture by picture."""
    if full is None or row is full:
        return [""] * len(row.values)
    deltas = []
    for column, one, to in zip(table.columns, row.values, full.values, strict=True):
        paired = table.to_full.get(row.name, {}).get(column.metric.name, Estimate())
        if paired.mean is not None:
            between = interval(paired, signed, column.metric.digits)
            deltas.append(signed(paired.mean, column.metric.digits) + (f" ({between})" if between else ""))
        elif one and to and one.cell.mean is not None and to.cell.mean is not None:
            deltas.append(signed(one.cell.mean - to.cell.mean, one.digits))
        else:
            deltas.append("")
    return deltas


def _forms(summary: Summary) -> list[_Form]:
    """Every table in words, in the report's order."""
    forms: list[_Form] = []
    for index, tables in enumerate(tables_of(summary).values()):
        forms += [_form_of(summary, table) for table in tables[:1]]
        if index == 0 and tables:
            forms += [_form_of_ablation(table) for table in ablation_tables(tables[0])]
        forms += [_form_of(summary, table) for table in tables[1:]]
    forms.append(_form_of_times(summary))
    if summary.against and summary.against.changes:
        forms.append(_form_of_changes(summary))
    return forms


def _form_of(summary: Summary, table: Table) -> _Form:
    rows = []
    for row in table.rows:
        title = row.title + (f" (mean of {row.seeds})" if row.seeds else "")
        cells = [_Text("not run") if row.method.not_run else _in_words(value, row.method) for value in row.values]
        rows.append([_Text(title, small="baseline" if row.baseline else ""), *cells])
    notes = [f"{column.metric.title}: {'; '.join([column.origin, *column.notes])}" for column in table.columns]
    notes += [f"{title}: not computed: {reason}" for title, reason in table.left_out]
    notes += [f"{row.title}: not run: {row.method.not_run}" for row in table.rows if row.method.not_run]
    for row in table.rows:
        for column, value in zip(table.columns, row.values, strict=True):
            notes += [f"{row.title}, {column.metric.title}: {note}" for note in value.notes] if value else []
    rungs = any(method.below for method in summary.methods)
    caption = (
        "Mean, 95 % interval and number of pictures; below, the difference to the baseline on the same pictures"
        f"{', and to the rung below' if rungs else ''}: ▲ better, ▼ worse, ≈ not told apart"
        if any(group.differences for group in summary.groups)
        else "Mean, 95 % interval and number of pictures"
    )
    title = f"{table.dataset}, {table.title} ({table.cases})"
    return _Form(title, f"{caption}.", ["Method", *(column.head for column in table.columns)], 1, rows, notes)


def _in_words(value: Value | None, method: MethodRow) -> _Text:
    if value is None:
        return _Text("–")
    differences = difference(value), difference_below(value, method)
    small = "; ".join(part for part in (value.interval, f"n {value.cell.count}", *differences) if part)
    return _Text(value.mean, value.rank, small)


def _form_of_ablation(table: AblationTable) -> _Form:
    rows = [
        [
            _Text(row.title),
            *(_Text("✓" if check else "") for check in checks),
            *(
                _Text(value.mean, value.rank, f"Δ {delta}" if delta else "") if value else _Text("–")
                for value, delta in zip(row.values, deltas, strict=True)
            ),
        ]
        for row, checks, deltas in table.rows
    ]
    heads = ["Method", *table.parts, *(column.head for column in table.columns)]
    return _Form(table.title, "Δ: of the mean, to the full model's.", heads, 1 + len(table.parts), rows, [])


def _form_of_times(summary: Summary) -> _Form:
    rows = [
        [_Text(method.title), _Text(method.device or "–"), *(_Text(text) for text in times(method))]
        for method in summary.methods
        if not method.not_run
    ]
    heads = ["Method", "Device", "Seconds a picture", "Peak GPU memory, GB"]
    return _Form("Time and memory", "Without warm-up.", heads, 2, rows, [])


def times(method: MethodRow) -> tuple[str, str]:
    """Seconds a picture, and gigabytes at most, as text."""
    seconds = "–" if method.seconds is None else f"{method.seconds:.3g}"
    return seconds, "–" if method.peak_megabytes is None else f"{method.peak_megabytes / 1000:.2f}"


def _form_of_changes(summary: Summary) -> _Form:
    assert summary.against is not None
    metrics = {metric.name: metric for metric in summary.metrics}
    titles = {method.name: method.title for method in summary.methods}
    rows = []
    for one in by_verdict(summary.against.changes):
        metric = metrics[one.metric]
        before, now, moved = change(one, metric.digits)
        names = (one.dataset, titles.get(one.method, one.method), metric.title)
        rows.append([*(_Text(name) for name in (*names, one.verdict)), _Text(before), _Text(now), _Text(moved)])
    heads = ["Dataset", "Method", "Metric", "Verdict", "Before", "Now", "Difference"]
    return _Form(
        "Against the run before",
        summary.against.place,
        heads,
        4,
        rows,
        [*summary.against.lost, *summary.against.left_out],
    )


def in_markdown(text: str) -> str:
    """Text as Markdown that shows it, on one line."""
    return re.sub(r"([\\|*_<>\[\]`])", r"\\\1", " ".join(text.split()))


def _markdown_cell(cell: _Text) -> str:
    main = in_markdown(cell.main)
    if cell.rank:
        main = f"**{main}**" if cell.rank == "best" else f"<ins>{main}</ins>"
    return main + (f"<br><sub>{in_markdown(cell.small)}</sub>" if cell.small else "")


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def in_latex(text: str) -> str:
    """Text as LaTeX that shows it, on one line."""
    return "".join(LATEX_SPECIAL.get(letter, letter) for letter in " ".join(text.split()))


def _latex_cell(cell: _Text) -> str:
    main = in_latex(cell.main)
    if cell.rank:
        main = rf"\textbf{{{main}}}" if cell.rank == "best" else rf"\underline{{{main}}}"
    return main + (rf" {{\scriptsize {in_latex(cell.small)}}}" if cell.small else "")
