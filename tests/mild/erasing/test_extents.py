"""Following what the model sees outwards from people."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from mild.erasing.extents import enlarged, followed


def test_only_what_hangs_together_with_people_is_followed() -> None:
    """With limits beyond the picture it is a labelling of connected regions."""
    rng = np.random.default_rng(0)
    likely = ndimage.gaussian_filter(rng.random((60, 80)).astype(np.float32), 2)
    likely = (likely - likely.min()) / (likely.max() - likely.min())
    people = np.zeros((60, 80), np.uint16)
    people[10:14, 10:14] = 1
    owners = followed(likely, 0.7, people, np.zeros((60, 80), bool), [1000])
    regions, _ = ndimage.label((likely > 0.7) | (people > 0), np.ones((3, 3)))
    assert np.array_equal(owners > 0, regions == regions[11, 11])
    assert 0 < (owners > 0).mean() < 1


@pytest.mark.parametrize("limit", [0, 3, 7.5])
def test_nobody_is_followed_further_than_their_limit(limit: float) -> None:
    people = np.zeros((9, 40), np.uint16)
    people[4, 5] = 1
    owners = followed(np.ones((9, 40), np.float32), 0.7, people, np.zeros((9, 40), bool), [limit])
    assert np.flatnonzero((owners == 1).any(0)).max() == 5 + int(limit)


def test_a_pixel_between_two_belongs_to_the_nearer() -> None:
    people = np.zeros((3, 21), np.uint16)
    people[:, 0], people[:, 20] = 1, 2
    owners = followed(np.ones((3, 21), np.float32), 0.7, people, np.zeros((3, 21), bool), [99, 99])
    assert (owners[1, :10] == 1).all() and (owners[1, 11:] == 2).all()


def test_a_hole_is_passed_whatever_the_model_says_there() -> None:
    people, likely, hole = np.zeros((3, 12), np.uint16), np.zeros((3, 12), np.float32), np.zeros((3, 12), bool)
    people[:, 0], hole[:, 1:5], likely[:, 5:8] = 3, True, 1
    owners = followed(likely, 0.7, people, hole, [0, 0, 99])
    assert (owners[:, :8] == 3).all() and not owners[:, 8:].any()


def test_enlarging_keeps_owners_and_areas() -> None:
    owners = np.zeros((20, 30), np.uint16)
    owners[4:12, 3:11], owners[4:12, 18:28] = 1, 700
    large = enlarged(owners, (80, 120))
    assert set(np.unique(large)) == {0, 1, 700}
    for person in (1, 700):
        assert (large == person).sum() == pytest.approx(16 * (owners == person).sum(), rel=0.1)
    assert np.array_equal(enlarged(owners, owners.shape), owners)
