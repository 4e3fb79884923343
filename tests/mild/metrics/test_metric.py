"""What holds for every metric that an evaluation can be given."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import TypeAdapter

from dataset_tools.errors import UserError
from mild.evaluation.settings import AnyMetric
from mild.metrics.metric import Judged, PictureMetric, Region

CLASSES = get_args(get_args(AnyMetric)[0])
METRICS: list[Any] = [
    TypeAdapter(AnyMetric).validate_python({"kind": kind})
    for one in CLASSES
    for kind in get_args(one.model_fields["kind"].annotation)
]
"""One of each kind, as it is by default."""


def test_names_are_unique_and_can_name_files() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names) >= len(CLASSES)
    assert all(re.fullmatch("[a-z0-9_.-]+", name) for name in names)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_each_states_what_the_heads_of_tables_say(metric: Any) -> None:
    assert metric.title and metric.reference and metric.region in get_args(Region)
    assert isinstance(metric.larger_is_better, bool) and 0 <= metric.digits <= 6
    assert "\n" not in metric.title + metric.network + metric.reference


def test_titles_tell_metrics_apart() -> None:
    assert len({metric.title for metric in METRICS}) == len(METRICS)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_fingerprint_is_stable_and_no_matter_of_batches_and_none_is_there_without_weights(metric: Any) -> None:
    if metric.missing() is None:
        assert metric.fingerprint() == metric.model_copy().fingerprint()
        assert metric.fingerprint() == metric.model_copy(update={"batch_size": metric.batch_size + 1}).fingerprint()
    else:
        with pytest.raises(UserError):
            metric.fingerprint()


def test_no_two_metrics_share_a_fingerprint() -> None:
    prints = [metric.fingerprint() for metric in METRICS if metric.missing() is None]
    assert len(set(prints)) == len(prints) >= 4


def test_what_says_that_it_needs_no_reference_needs_none(make_judged: Callable[..., Judged]) -> None:
    """Of those that run here; each has its own test."""
    hole = np.zeros((40, 40), bool)
    hole[10:30, 10:30] = True
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for metric in METRICS:
        if isinstance(metric, PictureMetric) and metric.reference == "none" and metric.missing() is None:
            (value,) = metric.score([make_judged(picture, hole, truth=None)])
            assert isinstance(value, float)
