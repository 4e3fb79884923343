"""Table 8 of the paper: what models and people think of each method, and how far they agree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict

from dataset_tools.storage import write_bytes
from mild.evaluation.judge import judged
from mild.evaluation.page import make_opinions_folder
from mild.evaluation.pairs import DrawnPairs, Opinion, Pair, PairsSettings
from mild.evaluation.rate import rated
from mild.evaluation.report.tables import in_latex, in_markdown
from mild.evaluation.summarize import estimate
from mild.evaluation.summary import Estimate
from mild.seeds import derived_seed

TABLE = "table"
"""Files ``table.json``, ``table.md`` and ``table.tex`` in `mild.evaluation.pairs.folder_beside`."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Agreement(_Part):
    """Krippendorff's alpha: 1 where all are of one opinion, 0 where it is as by chance, negative where worse."""

    score: float | None = None
    """Of scores, as interval data."""
    success: float | None = None
    """Of success, as nominal data."""
    score_not_computed: str = ""
    """Why; empty where it was."""
    success_not_computed: str = ""
    """Why; empty where it was."""
    pairs: int = 0
    """With two opinions at least."""
    mean_difference: float | None = None
    """Of a model: mean absolute difference between its scores of a pair in both orders."""


class Judges(_Part):
    """A model, or the people."""

    name: str
    people: bool
    opinions: list[str]
    """Names of raters; of a model the orders in which it saw each pair."""
    agreement: Agreement


class Marks(_Part):
    """What a method got of a model, or of the people."""

    overall: Estimate
    """1 to 10: mean over pictures of the mean of all opinions on a picture."""
    success: Estimate
    """0 to 1: mean over pictures of the share of opinions that call it a success."""
    pairs: int


class Row(_Part):
    """A method."""

    name: str
    title: str
    marks: list[Marks | None]
    """Of each of the judges; None of those that said nothing of it."""


class RatingsTable(_Part):
    """Table 8."""

    dataset: str
    pairs: int
    """Drawn of each method."""
    seed: int
    judges: list[Judges]
    """Models, then people."""
    rows: list[Row]


def ratings_table(drawn: DrawnPairs, settings: PairsSettings, folder: Path) -> RatingsTable:
    """Put together what was said of these pairs; opinions on other pairs, or other pictures, do not count.

    Intervals are 95 % percentile bootstrap over pictures, each with all of its pairs of a method.

    Args:
        folder: `mild.evaluation.pairs.folder_beside`, with what
            `mild.evaluation.judge` and `mild.evaluation.rate` left.
    """
    digests = {pair.digest for pair in drawn.pairs}
    models = {name: [one for one in said if one.digest in digests] for name, said in judged(folder).items()}
    groups = [(name, False, said) for name, said in models.items() if said]
    if people := [one for one in rated(folder) if one.digest in digests]:
        groups.append(("people", True, people))
    return RatingsTable(
        dataset=drawn.dataset,
        pairs=len(drawn.pairs) // len(drawn.methods),
        seed=settings.seed,
        judges=[
            Judges(
                name=name,
                people=are_people,
                opinions=list(dict.fromkeys(one.by for one in said)),
                agreement=agreement(said, "rater" if are_people else "order", differences=not are_people),
            )
            for name, are_people, said in groups
        ],
        rows=[
            Row(
                name=method.name,
                title=method.title,
                marks=[
                    _marks([pair for pair in drawn.pairs if pair.method == method.name], said, settings)
                    for _, _, said in groups
                ],
            )
            for method in drawn.methods
        ],
    )


def agreement(opinions: Sequence[Opinion], whose: str, *, differences: bool = False) -> Agreement:
    """How far those who judged the same pairs agree.

    Args:
        whose: what ``by`` names, for reasons.
        differences: also give ``mean_difference``.
    """
    of_pair: dict[str, dict[str, Opinion]] = defaultdict(dict)
    for one in opinions:
        of_pair[one.digest][one.by] = one
    shared = [said for said in of_pair.values() if len(said) > 1]
    who = list(dict.fromkeys(one.by for one in opinions))
    if len(who) < 2 or not shared:
        why = f"fewer than two {whose}s" if len(who) < 2 else f"no pair was judged by two {whose}s"
        return Agreement(score_not_computed=why, success_not_computed=why)
    scores = np.array([[said[by].score if by in said else np.nan for said in shared] for by in who])
    successes = np.array([[float(said[by].success) if by in said else np.nan for said in shared] for by in who])
    score, score_why = krippendorff_alpha(scores, "interval")
    success, success_why = krippendorff_alpha(successes, "nominal")
    return Agreement(
        score=score,
        success=success,
        score_not_computed=score_why,
        success_not_computed=success_why,
        pairs=len(shared),
        mean_difference=float(np.mean(np.nanmax(scores, 0) - np.nanmin(scores, 0))) if differences else None,
    )


def krippendorff_alpha(values: np.ndarray, level: Literal["interval", "nominal"]) -> tuple[float | None, str]:
    """Krippendorff's alpha of (raters, pairs), nan where there is no opinion; or None and why."""
    if len(np.unique(values[~np.isnan(values)])) < 2:
        return None, "all opinions are equal"
    import krippendorff

    return float(krippendorff.alpha(values, level_of_measurement=level)), ""


def _marks(pairs: Sequence[Pair], opinions: Sequence[Opinion], settings: PairsSettings) -> Marks | None:
    of_pair: dict[str, list[Opinion]] = defaultdict(list)
    for one in opinions:
        of_pair[one.digest].append(one)
    judged_pairs = [pair for pair in pairs if pair.digest in of_pair]
    if not judged_pairs:
        return None
    keys = [pair.key for pair in judged_pairs]
    scores, successes = (
        np.array([np.mean([getattr(one, what) for one in of_pair[pair.digest]]) for pair in judged_pairs])
        for what in ("score", "success")
    )
    seed = derived_seed(settings.seed, "ratings")
    return Marks(
        overall=estimate(keys, scores, seed, settings.resamples),
        success=estimate(keys, successes, seed, settings.resamples),
        pairs=len(judged_pairs),
    )


def heads(table: RatingsTable) -> list[str]:
    """Heads of columns: method, overall of each judge, success of each judge."""
    titles = ["human" if judges.people else f"AI ({judges.name})" for judges in table.judges]
    return ["method", *(f"{title} overall" for title in titles), *(f"{title} success" for title in titles)]


def cells(table: RatingsTable) -> list[list[str]]:
    """Rows as text under `heads`: a mean, its interval, and of how many where not all pairs were judged; empty where
    nobody said anything."""

    def few(marks: Marks) -> str:
        return f", n {marks.pairs}" if marks.pairs < table.pairs else ""

    rows = []
    for row in table.rows:
        overall = [_text(marks.overall, 1, 1) + few(marks) if marks else "" for marks in row.marks]
        success = [_text(marks.success, 100, 0, " %") + few(marks) if marks else "" for marks in row.marks]
        rows.append([row.title, *overall, *success])
    return rows


def notes(table: RatingsTable) -> list[str]:
    """Below the table: who judged how many pairs, and how far they agree."""
    lines = [
        f"{table.pairs} pairs of each method, of dataset {table.dataset}, drawn with seed {table.seed}; mean and 95 % "
        "bootstrap interval over pictures."
    ]
    for place, judges in enumerate(table.judges):
        count, agreed = len(judges.opinions), judges.agreement
        who = (
            f"People: {count} {'rater' if count == 1 else 'raters'}"
            if judges.people
            else f"{judges.name}: each pair judged in both orders"
        )
        told = "; ".join(
            f"of {what} {value:.2f}" if value is not None else f"of {what} not computed: {why}"
            for what, value, why in (
                ("scores", agreed.score, agreed.score_not_computed),
                ("success", agreed.success, agreed.success_not_computed),
            )
        )
        judged = sum(marks.pairs for row in table.rows if (marks := row.marks[place]))
        if judged < (every := table.pairs * len(table.rows)):
            who += f", {judged} of {every} pairs so far"
        apart = "" if agreed.mean_difference is None else f"; scores differ by {agreed.mean_difference:.2f} on average"
        lines.append(f"{who}; Krippendorff's alpha {told}{apart}.")
    if not table.judges:
        lines.append("Nobody has judged these pairs yet.")
    return lines


def as_markdown(table: RatingsTable) -> str:
    """The table and its notes."""
    best = _best(table)
    titles = [in_markdown(head) for head in heads(table)]
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    for index, row in enumerate(cells(table)):
        texts = [in_markdown(text) for text in row]
        lines.append([f"**{text}**" if (index, column) in best else text for column, text in enumerate(texts)])
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*rows, "", *(f"- {in_markdown(note)}" for note in notes(table))]) + "\n"


def as_latex(table: RatingsTable) -> str:
    """The table, for the package ``booktabs``, and its notes as caption."""
    best = _best(table)
    lines = [" & ".join(map(in_latex, heads(table))) + r" \\", r"\midrule"]
    for index, row in enumerate(cells(table)):
        texts = [
            rf"\textbf{{{in_latex(text)}}}" if (index, column) in best else in_latex(text)
            for column, text in enumerate(row)
        ]
        lines.append(" & ".join(texts) + r" \\")
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{in_latex(' '.join(notes(table)))}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(heads(table)) - 1)}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def write_table(table: RatingsTable, folder: Path) -> list[Path]:
    """Write it as JSON, Markdown and LaTeX; gives the files. Raises `UserError` as `make_opinions_folder`."""
    make_opinions_folder(folder)
    texts = {"json": table.model_dump_json(indent=2) + "\n", "md": as_markdown(table), "tex": as_latex(table)}
    for suffix, text in texts.items():
        write_bytes(LocalFileSystem(), str((folder / f"{TABLE}.{suffix}").absolute()), text.encode())
    return [folder / f"{TABLE}.{suffix}" for suffix in texts]


def _text(estimate: Estimate, factor: float, digits: int, unit: str = "") -> str:
    if estimate.mean is None:
        return ""
    mean = f"{factor * estimate.mean:.{digits}f}{unit}"
    if estimate.low is None or estimate.high is None:
        return mean
    return f"{mean} ({factor * estimate.low:.{digits}f} to {factor * estimate.high:.{digits}f})"


def _best(table: RatingsTable) -> set[tuple[int, int]]:
    """Row and column of the largest mean of each column that has several of all pairs: others are of other pictures."""
    found = set()
    for place in range(len(table.judges)):
        marks = [one if (one := row.marks[place]) and one.pairs == table.pairs else None for row in table.rows]
        for column, means in (
            (1 + place, [one.overall.mean if one else None for one in marks]),
            (1 + len(table.judges) + place, [one.success.mean if one else None for one in marks]),
        ):
            known = [mean for mean in means if mean is not None]
            if len(known) > 1:
                found |= {(index, column) for index, mean in enumerate(means) if mean == max(known)}
    return found
