"""Donors pass by: each picture is read about once, whoever is asked for, and nothing depends on who asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_tools.donor_windows import WINDOW, DonorWindows, neighbourhoods
from dataset_tools.donors import CutoutRow, DonorSettings
from dataset_tools.errors import Rejected
from dataset_tools.schema import Sample

MakeSample = Callable[..., Sample]
COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)
SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=20)


def donors(pictures: int, people: int = 1) -> list[list[CutoutRow]]:
    return [
        [
            CutoutRow(sample=n, person=k, key=f"k{n}", height=100, width=40, category="Person", truncated=False)
            for k in range(people)
        ]
        for n in range(pictures)
    ]


class Album:
    """Counts how often each picture is read."""

    def __init__(self, sample: Sample) -> None:
        self.sample, self.read = sample, Counter[int]()

    def __call__(self, index: int) -> Sample:
        self.read[index] += 1
        return self.sample


@pytest.fixture
def album(make_sample: MakeSample) -> Album:
    return Album(make_sample("real", people=2, size=(160, 240)))


def test_a_composite_costs_about_one_picture_and_few_are_kept(album: Album) -> None:
    """Five of the window's people, at random, for each of 256 composites."""
    windows, rng = DonorWindows(donors(1000, 2), album, DonorSettings(), "seed"), np.random.default_rng(0)
    for number in range(256):
        rows = windows.rows(number)
        for place in rng.permutation(len(rows))[:5]:
            windows.load(rows[place])
        assert len(rows) == 2 * WINDOW and len(windows._kept) <= WINDOW
    assert set(album.read.values()) == {1} and len(album.read) <= 256 + WINDOW - 1


def test_everybody_passes_by_again_and_again(album: Album) -> None:
    windows = DonorWindows([[], *donors(50)[1:]], album, DonorSettings(), "seed")
    shown = Counter(row.sample for number in range(2 * 49) for row in windows.rows(number))
    assert shown == dict.fromkeys(range(1, 50), 2 * WINDOW)


def test_of_few_donors_all_are_at_hand_and_each_is_read_once(album: Album) -> None:
    windows = DonorWindows(donors(3), album, DonorSettings(), "seed")
    for number in range(20):
        rows = windows.rows(number)
        assert sorted(row.sample for row in rows) == [0, 1, 2]
        for row in rows:
            windows.load(row)
    assert album.read == {0: 1, 1: 1, 2: 1}


def test_a_window_follows_from_seed_and_number_alone(album: Album) -> None:
    """Whether or not the composites before it were asked for."""
    one, other = (DonorWindows(donors(90), album, DonorSettings(), "seed") for _ in range(2))
    for number in range(40):
        one.rows(number)
    assert one.rows(40) == other.rows(40)
    assert one.rows(40) != DonorWindows(donors(90), album, DonorSettings(), "another").rows(40)


def test_somebody_who_cannot_be_cut_out_is_refused_each_time_and_looked_at_once(album: Album) -> None:
    """A network's mask that follows no border in the picture."""
    album.sample.people[0].mask_by = "maskrcnn"
    album.sample.image = np.zeros_like(album.sample.image)
    windows = DonorWindows(donors(1, 2), album, DonorSettings(), "seed")
    rows = windows.rows(0)
    for _ in range(2):
        with pytest.raises(Rejected, match="colours change"):
            windows.load(rows[0])
    assert windows.load(rows[1]).id.endswith(f"/{album.sample.people[1].id}") and album.read == {0: 1}


@given(pictures=COUNTS, sizes=SIZES)
def test_a_neighbourhood_has_enough_pictures_or_all_and_no_shard_in_vain(pictures: list[int], sizes: list[int]) -> None:
    for size, near in zip(sizes, neighbourhoods(pictures, sizes, "seed"), strict=True):
        held, needed = sum(pictures[shard] for shard in near), size + WINDOW - 1
        assert near == sorted(set(near)) and all(pictures[shard] for shard in near)
        assert held >= needed or len(near) == sum(count > 0 for count in pictures)
        assert held - max(pictures[shard] for shard in near) < needed


def test_every_shard_of_photographs_is_used_where_composites_need_as_many_pictures_as_there_are() -> None:
    near = neighbourhoods([256] * 40, [256] * 40, "seed")
    assert set().union(*near) == set(range(40)) and max(map(len, near)) == 2
    assert near != neighbourhoods([256] * 40, [256] * 40, "another")
