"""The loss curve as a plain SVG: no plotting library, no script, right in dark and in light."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 720, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 44
SERIES = (("background", "#2a78b8"), ("foreground", "#d9622b"))
TICKS = 5
"""About how many labels an axis gets."""


def loss_chart(losses: Sequence[dict[str, float]]) -> str:
    """SVG of the losses of a run: thin lines a step, thick lines the mean of the steps around.

    Args:
        losses: one row a step with ``background``, ``foreground`` and ``lambda``; where lambda is 0 the
            foreground was not computed and is not drawn.
    """
    steps = len(losses)
    curves = {name: np.array([row[name] for row in losses]) for name, _ in SERIES}
    curves["foreground"][[row["lambda"] == 0 for row in losses]] = np.nan
    top = _round_up(max((float(np.nanmax(c)) for c in curves.values() if np.isfinite(c).any()), default=1.0))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - 1) / max(1, steps - 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top

    def line(values: np.ndarray, style: str) -> str:
        points = " ".join(f"{x(i + 1):.1f},{y(float(v)):.1f}" for i, v in enumerate(values) if np.isfinite(v))
        return f'<polyline points="{points}" fill="none" {style}/>' if points else ""

    parts = []
    for value in np.linspace(0, top, TICKS):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for step in sorted({round(s) for s in np.linspace(1, steps, min(steps, TICKS))}):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    for index, (name, colour) in enumerate(SERIES):
        if not np.isfinite(curves[name]).any():
            continue
        parts.append(line(curves[name], f'stroke="{colour}" stroke-width="1" opacity="0.35"'))
        parts.append(line(_running_mean(curves[name]), f'stroke="{colour}" stroke-width="2.5"'))
        legend = WIDTH - RIGHT - 250 + 130 * index
        parts.append(f'<rect x="{legend}" y="{TOP + 4}" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{legend + 20}" y="{TOP + 11}">{name}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Training loss over {steps} steps, background and foreground">'
        "<style>text{font:12px system-ui,sans-serif;fill:#555}.grid{stroke:#8884}"
        "@media(prefers-color-scheme:dark){text{fill:#bbb}}</style>" + "".join(parts) + "</svg>\n"
    )


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a tenth of the curve around each step; unknown values are left out."""
    half = max(1, len(values) // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array(
        [w[np.isfinite(w)].mean() if np.isfinite(v) else np.nan for v, w in zip(values, windows, strict=True)]
    )


def _round_up(value: float) -> float:
    """The next 1, 2, 4, 6, 8 or 10 times a power of ten: a top of the axis whose four parts read well."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return power * next(step for step in (1, 2, 4, 6, 8, 10) if step * power >= value * (1 - 1e-9))
