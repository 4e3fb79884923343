"""Several datasets drawn from by weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from dataset_tools.shards import ShardDataset
from mild.training.mixture import Mixture, usable


class Numbered:
    """A dataset whose samples are their own keys."""

    def __init__(self, name: str, size: int) -> None:
        self.keys = [f"{name}-{index}" for index in range(size)]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Any:
        return self.keys[index]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(self))


def _mixture(sizes: list[int], weights: list[float]) -> Mixture:
    names = "abcd"[: len(sizes)]
    datasets = {name: Numbered(name, size) for name, size in zip(names, sizes, strict=True)}
    return Mixture(datasets, dict(zip(names, weights, strict=True)))


_parts = st.lists(st.tuples(st.integers(1, 12), st.floats(0.05, 20)), min_size=1, max_size=4)


@given(_parts, st.integers(0, 5), st.integers(0, 40))
def test_no_sample_comes_twice_in_an_epoch(parts: list[tuple[int, float]], seed: int, epoch: int) -> None:
    mixture = _mixture(*map(list, zip(*parts, strict=True)))
    order = mixture.order(seed, epoch)
    assert len(set(order.tolist())) == len(order) == len(mixture)
    assert order.min() >= 0 and order.max() < len(mixture.keys)


@given(_parts, st.integers(1, 30))
def test_over_all_epochs_each_sample_of_a_dataset_comes_as_often_as_any_other(
    parts: list[tuple[int, float]], epochs: int
) -> None:
    mixture = _mixture(*map(list, zip(*parts, strict=True)))
    counts = Counter(mixture.keys[index] for epoch in range(epochs) for index in mixture.order(0, epoch))
    for name in "abcd"[: len(parts)]:
        seen = [counts[key] for key in mixture.keys if key.startswith(name)]
        assert max(seen) - min(seen) <= 1


@given(_parts)
def test_an_epoch_has_the_weights_proportions_and_uses_up_one_dataset(parts: list[tuple[int, float]]) -> None:
    mixture = _mixture(*map(list, zip(*parts, strict=True)))
    shares = list(mixture.shares.values())
    assert any(share == size for share, (size, _) in zip(shares, parts, strict=True))
    scale = min(size / weight for size, weight in parts)
    for share, (_, weight) in zip(shares, parts, strict=True):
        assert share == 1 or share == pytest.approx(weight * scale, abs=1)


def test_equal_parts_of_unequal_datasets() -> None:
    """10 photographs and 40 composites, half and half: four epochs show every composite once."""
    mixture = _mixture([10, 40], [1, 1])
    assert mixture.shares == {"a": 10, "b": 10}
    epochs = [mixture.order(7, epoch) for epoch in range(4)]
    assert all(sorted(epoch[epoch < 10]) == list(range(10)) for epoch in epochs)
    assert sorted(np.concatenate([epoch[epoch >= 10] for epoch in epochs])) == list(range(10, 50))


def test_one_dataset_is_seen_whole_in_every_epoch_and_in_another_order() -> None:
    mixture = _mixture([9], [0.3])
    first, second = mixture.order(0, 0), mixture.order(0, 1)
    assert sorted(first) == sorted(second) == list(range(9))
    assert not np.array_equal(first, second)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = [_mixture([10, 40], [1, 1]).order(*at).tolist() for at in [(0, 1), (0, 1), (1, 1), (0, 2)]]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] and orders[0] != orders[3]


def test_datasets_come_shuffled_among_each_other() -> None:
    """Of two equal halves of 100, the first 50 hold between 15 and 35 of either (a chance of 1 in 100,000 not to)."""
    order = _mixture([50, 50], [1, 1]).order(0, 0)
    assert 15 <= (order[:50] < 50).sum() <= 35


def test_an_index_gives_the_sample_of_its_key(
    make_sample: Callable[..., Sample], in_memory: Callable[..., Any]
) -> None:
    mixture = Mixture(
        {"real": in_memory([make_sample(index) for index in (1, 2)]), "paired": in_memory([make_sample(5)])},
        {"real": 1, "paired": 3},
    )
    assert [mixture[index].key for index in range(3)] == mixture.keys == ["sample-1", "sample-2", "sample-5"]
    with pytest.raises(IndexError):
        mixture[3]


@pytest.mark.parametrize(
    ("sizes", "weights", "named"),
    [
        ({"real": 2}, {"real": 1, "paired": 1}, "weights are for real, paired, but the datasets are real"),
        ({"real": 2, "paired": 1}, {"real": 1}, "weights are for real, but the datasets are real, paired"),
        ({}, {}, "datasets are none"),
        ({"real": 2}, {"real": 0}, "the weight of real is 0"),
        ({"real": 2}, {"real": float("nan")}, "the weight of real is nan"),
        ({"real": 2, "paired": 0}, {"real": 1, "paired": 1}, "paired holds no sample"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(sizes: dict[str, int], weights: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Mixture({name: Numbered(name, size) for name, size in sizes.items()}, weights)


@given(st.lists(st.sampled_from([(40, 30, 1), (30, 40, 2), (31, 90, 1), (90, 31, 1), (90, 90, 0)]), min_size=1))
@settings(max_examples=25)
def test_who_is_left_comes_in_the_order_of_all(outlines: list[tuple[int, int, int]]) -> None:
    """A shard's index tells who is left; the shard itself is not read."""
    dataset = _Told(outlines)
    good = [
        key
        for key, (width, height, people) in zip(dataset.keys, outlines, strict=True)
        if people and min(width, height) > 30
    ]
    if not good:
        with pytest.raises(UserError, match=f"{len(outlines)} of {len(outlines)} samples set aside"):
            usable(dataset, 31)
        return
    left, line = usable(dataset, 31)
    assert left.keys == good
    assert line.startswith(f"{len(outlines) - len(good)} of {len(outlines)} samples set aside: ") or len(good) == len(
        outlines
    )
    for seed, epoch in [(0, 0), (0, 1), (5, 0)]:
        everybody = [dataset.keys[index] for index in dataset.order(seed, epoch)]
        assert [left.keys[index] for index in left.order(seed, epoch)] == [key for key in everybody if key in good]


class _Told(ShardDataset):
    """A dataset of which there is an index alone."""

    def __init__(self, outlines: list[tuple[int, int, int]]) -> None:
        self.keys = [f"k{index}" for index in range(len(outlines))]
        self._places = [("nowhere", {})] * len(outlines)
        self.shards = []
        self._outlines = {"a": [list(outline) for outline in outlines]}


def test_of_a_mixture_each_dataset_is_looked_at_and_the_epoch_is_of_what_is_left() -> None:
    wide, narrow = [(64, 64, 1)] * 4, [(20, 64, 1), (64, 64, 1), (64, 64, 0), (64, 64, 1)]
    mixture = Mixture({"real": _Told(narrow), "composite": _Told(wide)}, {"real": 1, "composite": 1})
    left, line = usable(mixture, 32)
    assert line == "2 of 8 samples set aside: 1 smaller than resolution 32, 1 without a person who is seen"
    assert left.keys == ["k1", "k3", "k0", "k1", "k2", "k3"] and len(left) == 4
    assert usable(mixture, 16)[1] == "1 of 8 samples set aside: without a person who is seen"
    with pytest.raises(UserError, match=r"holds 4 samples, fewer than batch_size \(5\): 2 of 8 samples set aside"):
        usable(mixture, 32, 5)
    with pytest.raises(UserError, match=r"real: 2 of 2 samples set aside: .* k0 is 20x64, .*, or leave real out"):
        usable(Mixture({"real": _Told(narrow[:1] * 2), "composite": _Told(wide)}, mixture.weights), 32)


def test_where_all_can_be_used_nothing_changes() -> None:
    dataset = _Told([(64, 64, 1)] * 3)
    assert usable(dataset, 64) == (dataset, "")
