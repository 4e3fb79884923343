from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mild.evaluation.cases import CaseRow
from mild.evaluation.settings import EvaluateSettings
from mild.evaluation.summarize import (
    How,
    Values,
    compare_with,
    estimate,
    groups_of,
    headline_of,
    rows_of,
    with_times,
    worth_showing,
)
from mild.evaluation.summary import Cell, MethodRow, MetricRow, told_apart

PSNR = MetricRow(
    name="psnr_hole",
    title="PSNR hole, dB",
    larger_is_better=True,
    digits=2,
    region="hole",
    network="",
    reference="clean background",
)
DISTANCE = PSNR.model_copy(update={"name": "distance", "title": "Distance", "larger_is_better": False, "digits": 3})


def _values(
    scores: dict[str, list[float]],
    masks: tuple[str, ...] = ("exact",),
    metric: str = "psnr_hole",
    pictures: Sequence[str] = (),
) -> Values:
    """Values of methods, picture by picture, each once a kind of masks; every other picture with people who overlap."""
    count = len(next(iter(scores.values())))
    values = Values("composite")
    values.add_cases(
        [
            CaseRow(f"s{picture}", masks[index % len(masks)], 8, 8, 2, bool(picture % 2), 0.1, True, False, shows)
            for index in range(count)
            for picture in [index // len(masks)]
            for shows in [pictures[picture] if pictures else ""]
        ]
    )
    for method, found in scores.items():
        rows: list[dict[str, Any]] = [
            {"key": case.key, "masks": case.masks, "seconds": 0.5, "peak_bytes": None, "device": "a machine"}
            for case in values.cases
        ]
        values.add_results(method, rows)
        values.add_scores(
            method,
            metric,
            [
                {**row, "value": None if np.isnan(value) else value, "not_computed": "why" if np.isnan(value) else ""}
                for row, value in zip(rows, found, strict=True)
            ],
        )
    return values


def _how(
    methods: list[str], metrics: tuple[MetricRow, ...] = (PSNR,), seeds: Mapping[str, int] | None = None, **changes: Any
) -> How:
    """``base`` and ``mild`` are what they are called; ``name@arm`` is a method of an arm."""
    rows = [
        MethodRow(
            name=name.split("@")[0],
            title=name.split("@")[0].upper(),
            kind="mild" if name.startswith("mild") else name,
            arm="".join(name.split("@")[1:]),
            seed=(seeds or {}).get(name.split("@")[0]),
        )
        for name in methods
    ]
    recipe = EvaluateSettings(methods=["base", "mild"], resamples=300, **changes)
    return How.of(rows, metrics, recipe)


def test_the_interval_is_the_one_that_theory_gives_for_many_values() -> None:
    """For 400 normal values the bootstrap interval of the mean is close to 1.96 standard errors on each side."""
    values = np.random.default_rng(0).normal(20, 3, 400)
    found = estimate([str(index) for index in range(400)], values, seed=0, resamples=4000)
    half = 1.96 * values.std(ddof=1) / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_masks_of_another_kind_do_not_make_a_picture_two() -> None:
    """Twice the same values of each picture leave the interval as wide as it was."""
    values = np.random.default_rng(0).normal(20, 3, 50)
    keys = [str(index) for index in range(50)]
    assert estimate(keys + keys, np.tile(values, 2), 0, 500) == estimate(keys, values, 0, 500)


def test_one_picture_has_no_interval_and_none_has_no_mean() -> None:
    one = estimate(["a", "a"], np.array([1.0, 2.0]), 0, 100)
    assert (one.mean, one.low, one.high) == (1.5, None, None)
    assert estimate(["a"], np.array([np.nan]), 0, 100).mean is None


def test_the_interval_is_around_the_mean_that_is_told_where_pictures_have_unequal_numbers_of_values() -> None:
    """A thousand pictures with one value near 0, a thousand with three near 1: the mean of all values is 0.75."""
    keys = [f"a{n}" for n in range(1000)] + [f"b{n}" for n in range(1000) for _ in range(3)]
    values = np.r_[np.zeros(1000), np.ones(3000)] + np.random.default_rng(0).normal(0, 0.1, 4000)
    found = estimate(keys, values, 0, 300)
    assert found.mean is not None and found.low is not None and found.high is not None
    assert found.mean == pytest.approx(0.75, abs=0.01)
    # The ratio's standard error, by the delta method: of (1, 3) values and sums (0, 3), mean count 2.
    error = np.std([1 * (0 - 0.75), 3 * (1 - 0.75)]) / 2 / 2000**0.5
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert found.low < found.mean < found.high


def test_who_fails_at_the_hard_pictures_does_not_lead_and_who_is_perfect_does() -> None:
    base = [30.0, 30.0, 10.0, 10.0]
    how = _how(["base", "mild", "oracle", "fails"])
    scores = {"base": base, "mild": [29.0, 29.0, 12.0, 12.0], "fails": [29.0, 29.0, np.nan, np.nan]}
    groups = groups_of(_values(scores), how)
    ranked = {method: cells["psnr_hole"].ranked for method, cells in groups[0].cells.items()}
    assert ranked == {"base": 20.0, "mild": 20.5, "fails": None}
    found = headline_of(groups, how)
    assert found is not None and found.leader == "mild"
    for perfect in ([np.inf] * 4, [np.inf, np.inf, np.inf, 29.0]):
        groups = groups_of(_values({**scores, "oracle": perfect}), how)
        found = headline_of(groups, how)
        assert found is not None and found.leader == "oracle"


def test_who_leads_by_nothing_but_identical_pictures_is_told_so() -> None:
    how = _how(["base", "oracle"])
    found = headline_of(groups_of(_values({"base": [20.0, 21.0], "oracle": [np.inf, np.inf]}), how), how)
    assert found is not None and "ORACLE leads by PSNR hole, dB: identical to the truth" in found.sentence


def test_infinite_and_missing_values_are_counted_and_not_in_the_mean() -> None:
    (group, *_) = groups_of(_values({"mild": [20, np.inf, np.nan, 22], "base": [1, 2, 3, 4]}), _how(["mild", "base"]))
    cell = group.cells["mild"]["psnr_hole"]
    assert (cell.mean, cell.count, cell.identical, cell.not_computed) == (21, 2, 1, {"why": 1})


def test_differences_are_taken_case_by_case_to_the_baseline() -> None:
    """A lead of 1 dB on every picture is certain, however much the pictures differ; what is missing is left out."""
    base = np.random.default_rng(0).normal(20, 5, 30)
    base[0] = np.nan
    (group, *_) = groups_of(
        _values({"base": base.tolist(), "mild": (np.nan_to_num(base, nan=50) + 1).tolist()}), _how(["base", "mild"])
    )
    assert set(group.differences) == {"mild"}
    found = group.differences["mild"]["psnr_hole"]
    assert [found.mean, found.low, found.high] == pytest.approx([1, 1, 1])
    assert found.told_apart


def test_groups_are_kinds_of_masks_and_whether_people_overlap() -> None:
    values = _values({"base": list(range(8)), "mild": list(range(8))}, masks=("exact", "augmented"))
    groups = groups_of(values, _how(["base", "mild"]))
    assert {group.name: group.cases for group in groups} == {
        "": 8,
        **{f"{masks} masks": 4 for masks in ("exact", "augmented")},
        **{f"people {how}, {masks} masks": 2 for how in ("apart", "overlap") for masks in ("exact", "augmented")},
    }
    means = {group.name: group.cells["base"]["psnr_hole"].mean for group in groups}
    assert means["exact masks"] == np.mean([0, 2, 4, 6])
    assert means["people overlap, augmented masks"] == np.mean([3, 7])


def test_where_all_people_overlap_this_makes_no_group() -> None:
    values = _values({"base": [1, 2, 3], "mild": [1, 2, 3]})
    values.cases = [replace(case, overlap=True) for case in values.cases]
    assert [group.name for group in groups_of(values, _how(["base", "mild"]))] == [""]


def test_the_interval_of_an_arm_is_that_of_seeds_and_pictures_together() -> None:
    """For many of both close to 1.96 standard errors of the mean of two independent effects."""
    draw = np.random.default_rng(0)
    seeds, pictures = draw.normal(0, 1, 60), draw.normal(0, 2, 200)
    found = estimate([str(index) for index in range(200)], 20 + seeds[:, None] + pictures, seed=0, resamples=4000)
    half = 1.96 * np.sqrt(seeds.var() / 60 + pictures.var() / 200)
    assert found.mean == pytest.approx(20 + seeds.mean() + pictures.mean())
    assert found.low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.1 * half)


def test_arms_are_compared_seed_by_seed_and_each_with_the_rung_below() -> None:
    """A lead of the same size with every seed is certain, however much these differ; what is below may be one."""
    base = np.random.default_rng(0).normal(20, 5, 30)
    scores = {"base": base, "mild-0": base + 1, "mild-1": base + 3, "mild-2": base + 1.5, "mild-3": base + 3.5}
    values = _values({name: found.tolist() for name, found in scores.items()})
    how = _how(["base", "mild-0@hmg", "mild-1@hmg", "mild-2@full", "mild-3@full"])
    (group, *_) = groups_of(values, replace(how, below={"full": "hmg", "hmg": "base", "mild-2": "hmg"}))
    full, hmg = (group.to_below[arm]["psnr_hole"] for arm in ("full", "hmg"))
    assert [full.mean, full.low, full.high] == pytest.approx([0.5, 0.5, 0.5])
    assert [hmg.mean, hmg.low, hmg.high] == pytest.approx([2, 1, 3])
    assert group.to_below["mild-2"]["psnr_hole"].mean == pytest.approx(-0.5), "to the mean of all seeds"


def test_seeds_of_arms_are_told_by_their_trainings_and_not_by_the_order_of_a_recipe() -> None:
    """One below leads by the same with each seed; arms of other seeds are compared by their means."""
    base = np.random.default_rng(0).normal(20, 5, 30)
    scores = {"a0": base, "a1": base + 9, "b1": base + 10, "b0": base + 1}
    values = _values({name: found.tolist() for name, found in scores.items()})
    names = ["a0@a", "a1@a", "b1@b", "b0@b"]
    for seeds, certain in (({"a0": 0, "a1": 1, "b0": 0, "b1": 1}, True), ({"a0": 0, "a1": 1, "b0": 2, "b1": 3}, False)):
        (group, *_) = groups_of(values, replace(_how(names, seeds=seeds), below={"b": "a"}))
        assert list(group.cells)[-2:] == ["a", "b"], "in the order of the recipe"
        found = group.to_below["b"]["psnr_hole"]
        assert found.mean == pytest.approx(1)
        assert found.told_apart == certain


def test_what_is_lacking_of_a_picture_counts_once_in_an_arm() -> None:
    values = _values({"a0": [20.0, np.nan], "a1": [21.0, np.nan]})
    (group, *_) = groups_of(values, _how(["a0@a", "a1@a"]))
    assert group.cells["a"]["psnr_hole"].not_computed == {"why": 1}


def test_where_the_baseline_was_not_run_somebody_leads_all_the_same() -> None:
    how = _how(["mild", "telea"])
    headline = headline_of(groups_of(_values({"mild": [20.0, 21.0], "telea": [25.0, 26.0]}), how), how)
    assert headline is not None and headline.sentence == "TELEA leads by PSNR hole, dB: 25.50."


def test_the_full_model_has_every_part_that_any_has_and_an_arm_speaks_for_its_methods() -> None:
    def row(name: str, arm: str, below: str, *parts: str) -> MethodRow:
        works = {part: part in parts for part in ("hmg", "sma", "extents")}
        return MethodRow(name=name, title=name, kind="mild", arm=arm, below=below, parts=works)

    rows = [row("a-0", "a", "base", "hmg"), *(row(f"b-{seed}", "b", "a", "hmg", "sma") for seed in range(2))]
    how = How.of(rows, (PSNR,), EvaluateSettings())
    assert how.full == "b" and how.below == {"a-0": "base", "b": "a"}


def test_the_headline_is_the_difference_to_the_base_and_says_whether_it_is_told_apart() -> None:
    base = np.random.default_rng(0).normal(20, 5, 30)
    ahead = _values({"base": base.tolist(), "mild": (base + 1).tolist()})
    how = _how(["base", "mild"])
    found = headline_of(groups_of(ahead, how), how)
    assert found is not None and (found.leader, found.method, found.baseline) == ("mild", "mild", "base")
    assert found.sentence == (
        f"MILD leads by PSNR hole, dB: {base.mean() + 1:.2f}; +1.00 (+1.00 to +1.00) against BASE."
    )
    unsure = np.random.default_rng(1).normal(0.1, 3, 30)
    level = headline_of(groups_of(_values({"base": base.tolist(), "mild": (base + unsure).tolist()}), how), how)
    assert level is not None and "not told apart from BASE" in level.sentence


def test_the_headline_does_not_hide_that_another_method_leads() -> None:
    base = np.random.default_rng(0).normal(20, 5, 30)
    how = _how(["base", "mild", "telea"])
    values = _values({"base": base.tolist(), "mild": (base - 1).tolist(), "telea": (base + 2).tolist()})
    found = headline_of(groups_of(values, how), how)
    assert found is not None and (found.leader, found.method) == ("telea", "mild")
    assert found.sentence.startswith("TELEA leads") and "MILD: -1.00 (-1.00 to -1.00) against BASE" in found.sentence


def test_methods_that_are_called_alike_are_told_apart_by_their_names() -> None:
    rows = [MethodRow(name=name, title=title, kind="mild") for name, title in (("a", "M"), ("b", "M"), ("c", "N"))]
    assert [row.title for row in told_apart(rows)] == ["M (a)", "M (b)", "N"]


def test_where_less_is_better_the_least_leads() -> None:
    how = _how(["base", "mild"], metrics=(DISTANCE,))
    values = _values({"base": [2.0, 3.0], "mild": [1.0, 2.0]}, metric="distance")
    found = headline_of(groups_of(values, how), how)
    assert found is not None and found.leader == "mild"


def test_a_distribution_metric_stands_beside_the_others_over_all_cases() -> None:
    values = _values({"base": [1.0, 2.0], "mild": [1.0, 2.0]})
    values.whole["mild"] = {"fid": Cell(mean=3.0, count=2)}
    groups = groups_of(values, _how(["base", "mild"]))
    assert groups[0].cells["mild"]["fid"].mean == 3.0
    assert all("fid" not in group.cells["mild"] for group in groups[1:])


def test_a_row_a_case_and_method_holds_all_values() -> None:
    values = _values({"base": [1.0, np.nan], "mild": [np.inf, 2.0]})
    rows = rows_of(values).to_pylist()
    assert [(row["key"], row["method"], row["psnr_hole"]) for row in rows] == [
        ("s0", "base", 1.0),
        ("s0", "mild", np.inf),
        ("s1", "base", None),
        ("s1", "mild", 2.0),
    ]
    assert rows[2]["not_computed"] == ["psnr_hole: why"]
    assert rows[0]["seconds"] == 0.5


def test_times_are_means_over_all_that_was_done() -> None:
    row = MethodRow(name="mild", title="MILD", kind="mild")
    timed = with_times(row, [_values({"mild": [1.0, 2.0]})])
    assert (timed.seconds, timed.peak_megabytes, timed.device) == (0.5, None, "a machine")


def test_what_got_better_or_worse_is_told_from_chance_picture_by_picture() -> None:
    draw = np.random.default_rng(0)
    before = draw.normal(20, 5, 60)
    how = _how(["worse", "better", "chance"])
    old = _values(dict.fromkeys(["worse", "better", "chance", "gone"], before.tolist()))
    new = _values(
        {
            "worse": (before - 0.5).tolist(),
            "better": (before + 0.5).tolist(),
            "chance": (before + draw.normal(0, 1, 60)).tolist(),
            "new": before.tolist(),
        }
    )
    found = compare_with("there", rows_of(old), rows_of(new), how)
    assert {change.method: change.verdict for change in found.changes} == {
        "worse": "worse",
        "better": "better",
        "chance": "same",
    }
    (worse,) = (change for change in found.changes if change.verdict == "worse")
    assert worse.now - worse.before == pytest.approx(-0.5)
    assert found.regressions == ["worse on composite: psnr_hole"]
    assert found.left_out == [
        "gone on composite: that run has results of it, this one has none",
        "new on composite: that run has none of these cases",
    ]


def test_other_pictures_of_the_same_names_are_not_compared_and_those_that_are_gone_are_told_of() -> None:
    """A dataset that is built anew numbers its composites as before."""
    old = rows_of(_values({"mild": [20.0, 20.0, 30.0, 30.0]}, pictures=["a", "b", "c", "d"]))
    new = rows_of(_values({"mild": [20.0, 20.0, 10.0]}, pictures=["a", "b", "other"]))
    found = compare_with("there", old, new, _how(["mild"]))
    assert [(change.before, change.now, change.verdict) for change in found.changes] == [(20.0, 20.0, "same")]
    assert found.left_out == [
        "composite: 1 cases show other pictures than that run's of the same name",
        "composite: 1 cases of that run are not among these",
    ]
    assert not found.regressions
    anew = rows_of(_values({"mild": [20.0, 20.0]}, pictures=["e", "f"]))
    found = compare_with("there", old, anew, _how(["mild"]))
    assert not found.changes
    assert found.regressions == [
        "composite: 2 cases show other pictures than that run's of the same name",
        "composite: 2 cases of that run are not among these",
    ]


def test_values_that_a_method_of_the_recipe_no_longer_reaches_are_lost() -> None:
    how = _how(["broken", "absent"])
    old = _values({"broken": [20.0, 21.0, 22.0], "absent": [20.0, 21.0, 22.0]})
    new = _values({"broken": [20.0, np.nan, np.nan]})
    found = compare_with("there", rows_of(old), rows_of(new), how)
    assert len(found.lost) == 2
    assert found.lost[0].startswith("absent on composite")
    assert "of 2 pictures" in found.lost[1]
    assert found.regressions == found.lost


def test_a_metric_that_is_no_longer_computed_and_pictures_that_are_no_longer_identical_are_lost() -> None:
    how = _how(["mild"], metrics=(PSNR, DISTANCE))
    old = _values({"mild": [np.inf, 21.0, 22.0]})
    old.add_scores("mild", "distance", [{"key": "s0", "masks": "exact", "value": 1.0, "not_computed": ""}])
    new = _values({"mild": [12.0, 21.0, 22.0]})
    found = compare_with("there", rows_of(old), rows_of(new), how)
    assert found.lost == [
        "mild on composite: PSNR hole, dB of 1 pictures was that of identical ones in that run, and is not in this",
        "mild on composite: Distance of 1 pictures was computed in that run, not in this",
    ]
    assert set(found.lost) <= set(found.regressions)


def test_what_is_never_compared_is_told() -> None:
    how = _how(["mild"], metrics=(PSNR, PSNR.model_copy(update={"name": "fid", "title": "FID"})))
    old, new = (rows_of(_values({"mild": [20.0, 21.0]})) for _ in range(2))
    assert compare_with("there", old, new, how).left_out == ["FID: it is of all pictures together, and is not compared"]


def test_more_of_what_should_be_less_is_worse() -> None:
    how = _how(["mild"], metrics=(DISTANCE,))
    old, new = (_values({"mild": [1.0 + more, 2.0 + more]}, metric="distance") for more in (0, 0.5))
    (change,) = compare_with("there", rows_of(old), rows_of(new), how).changes
    assert change.verdict == "worse"


def test_the_gallery_shows_our_worst_cases_and_others() -> None:
    values = _values({"base": [9.0] * 6, "mild": [5.0, 1.0, 4.0, 2.0, np.nan, 3.0]})
    shown = worth_showing([values], _how(["base", "mild"]), 4)
    assert [index for _, index in shown] == [1, 3, 0, 2]
    assert len(worth_showing([values], _how(["base", "mild"]), 100)) == 6


def test_of_arms_the_gallery_shows_the_worst_cases_of_the_first_training() -> None:
    values = _values({"base": [9.0] * 4, "mild-0": [5.0, 1.0, 4.0, 2.0], "mild-1": [1.0, 5.0, 4.0, 2.0]})
    how = _how(["base", "mild-0@full", "mild-1@full"])
    assert how.own == "full" and [index for _, index in worth_showing([values], how, 2)] == [1, 0]


def test_the_headline_is_about_the_method_with_every_part() -> None:
    rows = [
        MethodRow(name=name, title=name, kind="mild", parts={"sma": True, "hmg": whole})
        for name, whole in (("backbone", False), ("full", True))
    ]
    assert How.of(rows, (PSNR,), EvaluateSettings(methods=["base", "mild"])).own == "full"
