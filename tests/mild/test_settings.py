from __future__ import annotations

from typing import Any

import pytest

from dataset_tools.errors import UserError
from mild.settings import TrainSettings


def test_defaults_are_the_papers() -> None:
    """Section G.1: rank 16, scale 16, AdamW at 1e-6, batch 4, 20,000 steps, ramp after 8,000, at 512 pixels."""
    train = TrainSettings()
    assert (train.mild.lora.rank, train.mild.lora.alpha, train.learning_rate, train.batch_size) == (16, 16, 1e-6, 4)
    assert (train.steps, train.warm_up.start, train.resolution) == (20000, 8000, 512)


def test_a_warm_up_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(UserError, match=r"end \(3\) must not lie before start \(5\)"):
        TrainSettings.check({"warm_up": {"start": 5, "end": 3}}, origin="test")


def test_a_seed_that_torch_cannot_take_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match="seed"):
        TrainSettings.check({"seed": 2**64}, origin="test")
    assert TrainSettings.check({"seed": 2**64 - 1}, origin="test").seed == 2**64 - 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"batch_size": 4, "gradient_accumulation": 3},
            r"batch_size \(4\) must be a multiple of gradient_accumulation",
        ),
        (
            {"start_from": "mild-nano-adapters", "mild": {"prefix": {}, "sma": False}},
            "all of mild but a new prefix comes from that directory",
        ),
        ({"cached_views": 2, "fresh_composites": {}}, "cached_views keeps what fresh_composites makes anew each time"),
        (
            {"protect_background": 100, "warm_up": {"start": 0, "end": 0, "weight": 0}},
            r"protect_background \(100\) leaves no adapter to train before step 100: set warm_up.weight",
        ),
        ({"lr_warmup_steps": 10}, "would do nothing with lr_scheduler constant: use constant_with_warmup"),
    ],
)
def test_settings_of_training_that_contradict_each_other_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        TrainSettings.check(changes, origin="test")
