"""Lines over one pair of axes as an SVG that needs nothing else, drawn by matplotlib, legible on light and dark."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WIDTH, HEIGHT = 7.5, 3.0
"""In inches of 72 points."""
GREY = "#7a7a7a"
COLOURS = ("#2a78b8", "#d9622b", "#3a9a5b", "#a04fb0", "#b8962a", GREY)
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "mild", "font.size": 9, "text.parse_math": False}
"""Letters stay letters, a dollar is one, and the same lines give the same bytes."""
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@dataclass(frozen=True, eq=False)
class Line:
    """One line; points whose y is not finite are left out."""

    x: np.ndarray
    y: np.ndarray
    colour: str
    dotted: bool = False
    faint: bool = False
    """Thin and pale, as single steps are behind their mean."""
    named: bool = True
    """Whether it is in the legend."""


def line_chart(lines: Mapping[str, Line], x_label: str, y_label: str, *, logarithmic: bool = False) -> str:
    """An ``<svg>`` element of lines by their names; each is a group whose ``id`` is its name.

    Args:
        logarithmic: the vertical axis. Otherwise it begins at 0, or below where values do.
    """
    # Here, since it takes long to import, and many who import this draw nothing.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        shown = {}
        for name, line in lines.items():
            known = np.isfinite(line.y)
            shown[name] = axes.plot(
                line.x[known],
                line.y[known],
                gid=name,
                color=line.colour,
                linestyle=":" if line.dotted else "-",
                linewidth=0.8 if line.faint else 1.8,
                alpha=0.35 if line.faint else 1,
                clip_on=False,
            )[0]
        # Nobody takes half a step.
        if all(np.equal(line.x, np.rint(line.x)).all() for line in lines.values()):
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if logarithmic:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=min([0.0, *(float(np.nanmin(line.y)) for line in lines.values() if line.y.size)]))
        axes.set_xlabel(x_label, color=GREY)
        axes.set_ylabel(y_label, color=GREY)
        axes.tick_params(which="both", color=GREY, labelcolor=GREY)
        axes.grid(color=GREY, alpha=0.3, linewidth=0.6, clip_on=False)
        axes.spines[:].set_visible(False)
        if named := [name for name, line in lines.items() if line.named]:
            handles = [shown[name] for name in named]
            figure.legend(handles, named, loc="outside right upper", frameon=False, labelcolor=GREY)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
    # What stands before the element would be out of place within a page.
    drawn = buffer.getvalue()
    label = html.escape(f"{y_label} over {x_label}: {', '.join(named)}")
    return drawn[drawn.index("<svg ") :].replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def loss_chart(losses: Sequence[Mapping[str, float]], names: Sequence[str], *, logarithmic: bool = False) -> str:
    """SVG of the losses of a run: pale lines a step, strong ones the mean of the steps around.

    Args:
        losses: one row a step; a value that is nan was not computed.
        names: what is drawn of a row.
    """
    steps = np.arange(1, len(losses) + 1)
    lines: dict[str, Line] = {}
    for name, colour in zip(names, COLOURS, strict=False):
        values = np.array([row[name] for row in losses], float)
        if np.isfinite(values).any():
            lines[f"{name}, each step"] = Line(steps, values, colour, faint=True, named=False)
            lines[name] = Line(steps, _running_mean(values), colour)
    return line_chart(lines, "step", "loss", logarithmic=logarithmic)


def branch_loss_chart(losses: Sequence[Mapping[str, float]]) -> str:
    """SVG of both branches' losses: rows of ``loss.csv``. Before the warm-up the foreground's is not computed."""
    shown = [dict(row) if row["lambda"] > 0 else {**row, "foreground": np.nan} for row in losses]
    return loss_chart(shown, ("background", "foreground"))


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a tenth of the curve around each step; unknown values are left out."""
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known, values, 0), known))
    half, index = max(1, len(values) // 20), np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        means: np.ndarray = (sums[last] - sums[first]) / (counts[last] - counts[first])
    return np.where(known, means, np.nan)
