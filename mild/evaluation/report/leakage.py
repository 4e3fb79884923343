"""Leakage and spectra of an evaluation as the report shows them: charts, and heat maps of a block and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mild.charts import COLOURS, Line, line_chart
from mild.evaluation.report.tables import number
from mild.evaluation.summary import Leakage, Spectrum

Steps = list[list[float | None]]
"""[block][step]."""
Shade = tuple[str, float | None]


@dataclass(frozen=True)
class HeatMap:
    """A quantity by block and step."""

    title: str
    rows: list[tuple[str, str, list[Shade]]]
    """A block's short and full name, and a step the value as text and where it lies between least and most, 0..1; None
    where there is no value."""


@dataclass(frozen=True)
class LeakagePart:
    """What the report shows of one method."""

    leakage: Leakage
    sentence: str
    maps: list[HeatMap]


def leakage_part(one: Leakage) -> LeakagePart:
    """Means over blocks and steps, and all values behind them."""
    quantities = [
        ("Gamma (eq. 1), nats", one.gamma, one.gamma_vanilla, 2),
        ("Cross-domain mass (eq. 6)", one.cross_mass, one.cross_mass_vanilla, 3),
    ]
    maps, sentences = [], []
    for title, values, vanilla, digits in quantities:
        # Without SMA, both are the same.
        variants = {"with SMA": values} | ({"without SMA": vanilla} if vanilla != values else {})
        if len(variants) == 1:
            variants = {"": values}
        known = np.array(list(variants.values()), float)
        known = known[np.isfinite(known)]
        if not known.size:
            continue
        least, most = known.min(), known.max()

        def cell(value: float | None, digits: int = digits, least: float = least, most: float = most) -> Shade:
            return ("–", None) if value is None else (number(value, digits), (value - least) / (most - least or 1))

        for name, table in variants.items():
            rows = [(_short(block), block, [*map(cell, of)]) for block, of in zip(one.blocks, table, strict=True)]
            maps.append(HeatMap(f"{title}, {name}" if name else title, rows))
        means = ", ".join(
            f"{number(float(np.nanmean(np.array(table, float))), digits)} {name}" for name, table in variants.items()
        )
        sentences.append(f"{title}: {means.strip()}")
    return LeakagePart(one, f"Mean over blocks and steps. {'. '.join(sentences)}.", maps)


def gamma_chart(leakages: Sequence[Leakage], titles: Mapping[str, str]) -> str:
    """SVG of gamma a step, mean over blocks."""
    return _step_chart({titles[one.method]: (one.gamma, one.gamma_vanilla) for one in leakages}, "gamma, nats")


def mass_chart(leakages: Sequence[Leakage], titles: Mapping[str, str]) -> str:
    """SVG of the cross-domain mass a step, mean over blocks."""
    of_methods = {titles[one.method]: (one.cross_mass, one.cross_mass_vanilla) for one in leakages}
    return _step_chart(of_methods, "cross-domain mass")


def spectrum_chart(spectra: Sequence[Spectrum], titles: Mapping[str, str]) -> str:
    """SVG of the residual's spectra (figure 2)."""
    lines = {
        titles[one.method]: Line(np.array(one.frequencies), np.array(one.amplitude), _colour(index))
        for index, one in enumerate(spectra)
    }
    return line_chart(lines, "cycles a pixel", "log(1 + amplitude)")


def _step_chart(of_methods: Mapping[str, tuple[Steps, Steps]], label: str) -> str:
    lines = {}
    for index, (title, (values, vanilla)) in enumerate(of_methods.items()):
        for name, table, dotted in ((title, values, False), (f"{title}, without SMA", vanilla, True)):
            known = np.ma.masked_invalid(np.array(table, float))
            mean = known.mean(axis=0).filled(np.nan)
            if not dotted or vanilla != values:
                lines[name] = Line(np.arange(1, len(mean) + 1), mean, _colour(index), dotted=dotted)
    return line_chart(lines, "denoising step", label)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _short(block: str) -> str:
    """``down.1.0.0`` for ``down_blocks.1.attentions.0.transformer_blocks.0.attn1``."""
    for part in ("_blocks", "_block", ".attentions", ".transformer", ".attn1"):
        block = block.replace(part, "")
    return block
