from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest

from mild.charts import Line, line_chart, loss_chart


def test_a_line_goes_through_its_points_linearly_or_by_powers(heights: Callable[[str, str], list[float]]) -> None:
    def chart(logarithmic: bool) -> list[float]:
        line = Line(np.arange(3), np.array([1.0, 10.0, 100.0]), "red")
        return heights(line_chart({"loss": line}, "step", "loss", logarithmic=logarithmic), "loss")

    first, second, third = chart(logarithmic=True)
    assert first - second == pytest.approx(second - third, abs=0.01)
    first, second, third = chart(logarithmic=False)
    assert second - third == pytest.approx(10 * (first - second), rel=0.01)


def test_no_tick_stands_at_half_a_step() -> None:
    chart = line_chart({"loss": Line(np.arange(1, 5), np.ones(4), "red")}, "step", "loss")
    assert re.findall(r'<g id="xtick_\d+">.*?>([\d.]+)</text>', chart, re.DOTALL) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("name", [r"Ours ($\lambda_$)", "Ours ($5 and $6)", "_hidden", "a & <b>"])
def test_a_name_is_shown_as_it_is(name: str) -> None:
    chart = line_chart({name: Line(np.arange(2), np.ones(2), "red")}, "step", "loss")
    texts = {"".join(element.itertext()) for element in ElementTree.fromstring(chart).iter() if element.text}
    assert name in texts


def test_the_same_lines_give_the_same_text_that_asks_for_nothing_else() -> None:
    rows = [{"a": 1.0, "b": 2.0}, {"a": 0.5, "b": float("nan")}]
    text = loss_chart(rows, ("a", "b"))
    assert text == loss_chart(rows, ("a", "b"))
    assert text.startswith("<svg ") and "<script" not in text
    assert "<?xml" not in text and "<!DOCTYPE" not in text


def test_the_strong_line_is_the_mean_of_the_steps_around_and_a_loss_that_was_not_computed_is_not_drawn(
    heights: Callable[[str, str], list[float]],
) -> None:
    """A window reaches a twentieth of the run to both sides: here 2 of 40 steps."""
    values = np.random.default_rng(0).uniform(1, 2, 40)
    values[7] = np.nan
    rows = [{"loss": value, "none": float("nan")} for value in values]
    chart = loss_chart(rows, ("loss", "none"))
    assert 'id="none"' not in chart
    means = [np.nanmean(values[max(0, i - 2) : i + 3]) for i in range(40) if i != 7]
    assert np.corrcoef(means, heights(chart, "loss"))[0, 1] < -0.999
    assert np.corrcoef(values[np.isfinite(values)], heights(chart, "loss, each step"))[0, 1] < -0.999
