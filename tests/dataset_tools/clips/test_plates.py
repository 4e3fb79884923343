"""Plates and people of drawn clips, against the drawing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from dataset_tools.clips.alignment import View, align, find_views, seen_area
from dataset_tools.clips.people import foreground
from dataset_tools.clips.plate import Plate, estimate_plate
from dataset_tools.clips.reading import FrameStore
from dataset_tools.drawn_world.clips import ClipFaults, DrawnClip

SIZE, COUNT = (112, 84), 40


@dataclass(eq=False)
class Seen:
    """What was made of a drawn clip."""

    clip: DrawnClip
    masks: np.ndarray
    """(n, H, W) bool: people, as drawn."""
    store: FrameStore
    views: list[View]
    plates: list[Plate | None]
    """Of each view with 12 samples."""

    def error(self, view: int = 0, moved: tuple[int, int] = (0, 0)) -> float:
        """Mean absolute error of the plate where it is known; ``moved``: the drawing to the right and down."""
        plate = self.plates[view]
        assert plate is not None
        truth = np.roll(self.clip.background, moved, (1, 0)).astype(int)
        inside = np.s_[12:-12, 26:-26] if any(moved) else np.s_[:, :]
        return float(np.abs(truth - plate.background)[inside][plate.known[inside]].mean())

    def overlap(self, samples: list[int]) -> float:
        """Mean IoU of the people of unmoved samples of the first view."""
        plate = self.plates[0]
        assert plate is not None
        ious = []
        for sample in samples:
            found = foreground(self.store[sample], plate, 0.001)
            truth = self.masks[sample] & plate.known
            ious.append((found & truth).sum() / (found | truth).sum())
        return float(np.mean(ious))


@pytest.fixture(scope="module")
def seen() -> Iterator[Callable[[str, ClipFaults], Seen]]:
    """Draw a clip and find its plates; each once."""
    stores: list[FrameStore] = []

    @cache
    def see(key: str, faults: ClipFaults) -> Seen:
        clip = DrawnClip(key, 0, SIZE, 3, COUNT, faults)
        store = FrameStore()
        stores.append(store)
        masks = np.empty((COUNT, SIZE[1], SIZE[0]), bool)
        for number in range(COUNT):
            frame, people = clip[number]
            store.append(frame)
            masks[number] = people.any(0)
        views = find_views(store, 0.03)
        plates: list[Plate | None] = []
        for view in views:
            align(store, view)
            plates.append(estimate_plate(store, view) if len(view.samples) >= 12 else None)
        return Seen(clip, masks, store, views, plates)

    yield see
    for store in stores:
        store.close()


@pytest.mark.parametrize("key", ["c", "d"])
def test_the_plate_is_the_scene_without_its_people(seen: Callable[..., Seen], key: str) -> None:
    """One stands for a third of the time, the light flickers, and there is noise."""
    result = seen(key, ClipFaults())
    assert [len(view.samples) for view in result.views] == [COUNT]
    plate = result.plates[0]
    assert plate is not None
    assert result.error() < 1.5
    assert plate.known[result.masks.any(0)].mean() > 0.9


def test_who_stands_is_in_a_mean_and_not_in_the_plate(seen: Callable[..., Seen]) -> None:
    result = seen("c", ClipFaults())
    plate = result.plates[0]
    assert plate is not None
    stood = (result.masks.mean(0) > 0.3) & plate.known
    assert np.count_nonzero(stood) > 100
    mean = np.mean([result.store[n] for n in range(COUNT)], axis=0)
    truth = result.clip.background[stood].astype(float)
    assert np.abs(mean[stood] - truth).mean() > 15
    assert np.abs(plate.background[stood] - truth).mean() < 2


def test_who_stands_for_longer_than_the_background_is_seen_is_in_no_known_plate(seen: Callable[..., Seen]) -> None:
    result = seen("c", ClipFaults(stands=0.55))
    plate = result.plates[0]
    assert plate is not None
    long = (result.masks.mean(0) > 0.5) & plate.known
    assert result.error() < 1.5
    assert np.abs(plate.background[long].astype(int) - result.clip.background[long]).mean() < 8


def test_light_that_changes_is_compensated(seen: Callable[..., Seen]) -> None:
    """Gains bring every sample to the light of the clip's middle, in each channel."""
    result = seen("c", ClipFaults(flicker=0.1))
    still = ~result.masks.any(0) & (result.clip.background.max(2) < 200)  # what is lighter is cut off at white
    light = [result.store[n][still].mean(0) for n in range(0, COUNT, 6)]
    assert np.ptp(light, axis=0).max() < 2.5
    assert result.views[0].gains.max() > 1.08
    assert result.error() < 1.5


def test_masks_are_of_people_and_not_of_their_shadows(seen: Callable[..., Seen]) -> None:
    for key in ("c", "d"):
        assert seen(key, ClipFaults()).overlap(list(range(0, COUNT, 4))) > 0.8


def test_a_small_jump_is_aligned(seen: Callable[..., Seen]) -> None:
    result = seen("c", ClipFaults(jump=(20, 2.3, -1.6)))
    view = result.views[0]
    assert [len(view.samples) for view in result.views] == [COUNT]
    assert [warp is None for warp in view.warps] == [True] * 20 + [False] * 20
    middle = np.array([56.0, 42.0, 1.0])
    places = [warp @ middle for warp in view.warps[20:] if warp is not None]
    moved = np.array([place[:2] / place[2] - middle[:2] for place in places])
    assert np.abs(moved - (2.3, -1.6)).max() < 0.35
    assert result.error() < 1.5


def test_a_large_jump_makes_two_views(seen: Callable[..., Seen]) -> None:
    result = seen("d", ClipFaults(jump=(20, 25, 10), stands=0))
    assert [view.samples for view in result.views] == [list(range(20)), list(range(20, COUNT))]
    assert result.error() < 1.5
    assert result.error(1, moved=(25, 10)) < 3


def test_a_shaking_part_is_aligned_or_refused(seen: Callable[..., Seen]) -> None:
    small = seen("c", ClipFaults(shaking=(14, 26, 1.8)))
    assert [len(view.samples) for view in small.views] == [COUNT]
    assert small.error() < 1.5
    large = seen("c", ClipFaults(shaking=(14, 26, 12)))
    assert set(large.views[0].samples) >= {*range(14), *range(26, COUNT)}
    assert len(large.views[0].samples) <= 32
    assert large.error() < 1.5


def test_swaying_leaves_are_not_known(seen: Callable[..., Seen]) -> None:
    result = seen("c", ClipFaults(leaves=(4, 36, 4, 40)))
    plate = result.plates[0]
    assert plate is not None
    leaves = np.zeros_like(plate.known)
    leaves[4:36, 4:40] = True
    assert plate.known[leaves].mean() < 0.02
    assert plate.known[44:].mean() > 0.9
    assert result.error() < 1.5


def test_what_moves_locally_does_not_cut_the_view(seen: Callable[..., Seen]) -> None:
    """Leaves that sway together, and people, have more of the points that are followed than what keeps still."""
    views = seen("d", ClipFaults(leaves=(4, 36, 4, 40))).views
    assert [len(view.samples) for view in views] == [COUNT]
    assert all(warp is None for warp in views[0].warps)


def test_who_stands_until_the_end_is_in_no_known_plate() -> None:
    """Others walk by before, so that the background is seen time and again, and for a short while only."""
    rng = np.random.default_rng(0)
    background, stands = rng.integers(60, 120, (24, 32, 3)), rng.integers(160, 220, (24, 32, 3))
    store = FrameStore()
    for number in range(40):
        frame = background.copy()
        if number >= 18:
            frame[:, :16] = stands[:, :16]
        elif number % 6 < 4:
            frame[:, :16] = rng.integers(0, 256, (24, 16, 3))
        store.append(frame.astype(np.uint8))
    plate = estimate_plate(store, View(list(range(40)), [None] * 40, np.ones((40, 3))))
    store.close()
    assert not plate.known[:, :14].any()
    assert plate.known[:, 20:].all()


def test_another_scene_is_another_view() -> None:
    store = FrameStore()
    clips = [DrawnClip(key, 0, SIZE, 2, 8, ClipFaults(stands=0)) for key in ("c", "d")]
    for number in (0, 1, 2, 3):
        for clip in clips:
            store.append(clip[number][0])
    assert [view.samples for view in find_views(store, 0.03)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    store.close()


def test_a_shaken_sample_does_not_show_what_is_beyond_its_edge() -> None:
    """Nor the two pixels before it, into which that is interpolated."""
    warp = np.array([[1, 0, 5.0], [0, 1, 0], [0, 0, 1]])
    expected = np.ones((8, 20), bool)
    expected[:, 13:] = False
    assert np.array_equal(seen_area(warp, (8, 20)), expected)
