from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataset_tools.errors import UserError
from mild.erasing.regions import (
    JUMP,
    Region,
    colours_matched,
    cut_mask,
    cut_picture,
    cut_soft,
    editable,
    paste,
    plan_regions,
    prefilled,
)

seeds = st.integers(0, 10**6)


def _rectangle(shape: tuple[int, int], top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[top : top + height, left : left + width] = True
    assert mask.any()
    return mask


def _brute_force_widened(mask: np.ndarray, margin: float) -> np.ndarray:
    rows, columns = np.indices(mask.shape)
    squared = [(rows - y) ** 2 + (columns - x) ** 2 for y, x in np.argwhere(mask)]
    return np.min(squared, axis=0) <= margin**2


def _random_case(seed: int) -> tuple[np.random.Generator, np.ndarray, Region]:
    """A noisy picture and a window of it whose working size grows or shrinks, on each axis by itself."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 40, 2)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    top, left = rng.integers(0, height), rng.integers(0, width)
    rows, columns = slice(top, int(rng.integers(top, height)) + 1), slice(left, int(rng.integers(left, width)) + 1)
    return rng, image, Region(rows, columns, (int(rng.integers(1, 60)), int(rng.integers(1, 60))))


# Editable area.


def test_each_mask_is_widened_by_a_disc_that_grows_with_the_person() -> None:
    masks = np.stack([_rectangle((150, 170), 60, 70, 3, 2), _rectangle((150, 170), 4, 5, 140, 139)])
    small = editable(masks, [0])
    assert np.array_equal(small, _brute_force_widened(masks[0], 2))
    large = editable(masks, [1])
    # 1.5 % of sqrt(140 * 139) is 2.09 pixels, so 3: along the edges, and at the corners a quarter of a disc.
    grown = np.zeros_like(large)
    grown[4 : 4 + 140, 5 - 3 : 5 + 139 + 3] = grown[4 - 3 : 4 + 140 + 3, 5 : 5 + 139] = True
    corners = np.zeros_like(large)
    corners[[4, 4, 143, 143], [5, 143, 5, 143]] = True
    assert np.array_equal(large, grown | _brute_force_widened(corners, 3))
    assert np.array_equal(editable(masks, [1, 0]), small | large)


@pytest.mark.parametrize("place", [(0, 0), (0, 9), (11, 0), (11, 9), (5, 4)])
def test_the_editable_area_ends_at_the_border_of_the_picture(place: tuple[int, int]) -> None:
    mask = _rectangle((12, 10), *place, 1, 1)
    assert np.array_equal(editable(mask[None], [0]), _brute_force_widened(mask, 2))


def test_a_margin_is_a_share_of_the_square_root_of_the_area_and_none_takes_masks_as_they_are() -> None:
    masks = np.stack([_rectangle((40, 50), 10, 12, 4, 16), _rectangle((40, 50), 20, 30, 5, 5)])
    assert np.array_equal(editable(masks, [0], 0.45), _brute_force_widened(masks[0], 4))  # of sqrt(4 * 16): 3.6
    assert np.array_equal(editable(masks, [0, 1], 0), masks.any(0))


@pytest.mark.parametrize("margin", [-0.1, math.inf, math.nan])
def test_a_margin_that_is_no_share_is_refused(margin: float) -> None:
    with pytest.raises(UserError, match=f"margin is {margin}: give 0, or a share such as 0.015"):
        editable(np.ones((1, 3, 3), bool), [0], margin)


def test_nobody_and_empty_masks_leave_nothing_editable() -> None:
    masks = np.zeros((2, 5, 6), bool)
    assert editable(masks, [0, 1]).shape == (5, 6) and not editable(masks, [0, 1]).any()
    masks[:] = True
    assert not editable(masks, []).any()
    assert editable(np.ones((1, 1, 1), bool), [0]).all()


# Windows.


@st.composite
def _plans(draw: st.DrawFn) -> tuple[list[np.ndarray], int, int]:
    shape = draw(st.tuples(st.integers(1, 90), st.integers(1, 90)) | st.sampled_from([(1, 1500), (1500, 2), (30, 900)]))
    holes = []
    for _ in range(draw(st.integers(1, 5))):
        top, left = (draw(st.integers(0, side - 1)) for side in shape)
        height, width = (draw(st.integers(1, max(1, side // 3))) for side in shape)
        holes.append(_rectangle(shape, top, left, height, width))
    multiple = draw(st.sampled_from([1, 2, 8]))
    return holes, draw(st.integers(multiple, 40)), multiple


def _inside(hole: np.ndarray, region: Region) -> bool:
    return int(hole[region.rows, region.columns].sum()) == int(hole.sum())


@given(_plans())
@settings(max_examples=200)
@example(([np.ones((1, 1), bool)], 8, 8))
def test_every_hole_lies_in_one_of_disjoint_windows_inside_the_picture(plan: tuple[list[np.ndarray], int, int]) -> None:
    holes, resolution, multiple = plan
    regions = plan_regions(holes, resolution, multiple)
    height, width = holes[0].shape
    hits = np.zeros((height, width), int)
    for region in regions:
        for window, limit in ((region.rows, height), (region.columns, width)):
            assert 0 <= window.start < window.stop <= limit
            assert window.stop - window.start >= min(limit, resolution), "no needless enlarging"
        hits[region.rows, region.columns] += 1
        assert any(_inside(hole, region) for hole in holes), "no window without need"
    assert hits.max() == 1
    for hole in holes:
        assert sum(_inside(hole, region) for region in regions) == 1
    corners = [(region.rows.start, region.columns.start) for region in regions]
    assert corners == sorted(corners)


@given(_plans())
@settings(max_examples=200)
def test_working_sizes_are_multiples_of_the_wanted_area_and_of_the_windows_shape(
    plan: tuple[list[np.ndarray], int, int],
) -> None:
    holes, resolution, multiple = plan
    for region in plan_regions(holes, resolution, multiple):
        height, width = region.size
        assert height % multiple == width % multiple == 0 and min(height, width) >= multiple
        # Each side is rounded by half a multiple at most: by a third where one or two multiples are all it has.
        assert 4 / 9 <= height * width / resolution**2 <= 16 / 9
        if min(height, width) >= 8 * multiple:
            assert height * width == pytest.approx(resolution**2, rel=0.14)
            window = (region.rows.stop - region.rows.start) / (region.columns.stop - region.columns.start)
            assert height / width == pytest.approx(window, rel=0.15)


@pytest.mark.slow
@given(_plans())
@settings(max_examples=200)
def test_holes_fill_at_most_a_twenty_fifth_of_a_window_and_windows_are_two_to_one_where_the_picture_allows(
    plan: tuple[list[np.ndarray], int, int],
) -> None:
    holes, resolution, multiple = plan
    height, width = holes[0].shape
    union = np.any(holes, axis=0)
    for region in plan_regions(holes, resolution, multiple):
        size = region.rows.stop - region.rows.start, region.columns.stop - region.columns.start
        assert union[region.rows, region.columns].sum() <= size[0] * size[1] / 25 or size == (height, width)
        assert size[0] <= 2 * size[1] or size[1] == width
        assert size[1] <= 2 * size[0] or size[0] == height


def test_a_person_gets_surroundings_on_all_sides() -> None:
    hole = _rectangle((5000, 6000), 2000, 3000, 900, 300)
    (region,) = plan_regions([hole], 512, 8)
    least = 2 * math.sqrt(900 * 300) - 1
    for window, start, stop in ((region.rows, 2000, 2900), (region.columns, 3000, 3300)):
        assert window.start <= start - least and window.stop >= stop + least
        assert abs((start - window.start) - (window.stop - stop)) <= 1, "centred"
    assert region.rows.stop - region.rows.start < 3000, "and no more than needed"


def test_at_the_border_the_window_is_shifted_not_cut() -> None:
    middle = _rectangle((900, 1200), 400, 500, 200, 100)
    (wanted,) = plan_regions([middle], 64, 8)
    size = wanted.rows.stop - wanted.rows.start, wanted.columns.stop - wanted.columns.start
    for top, left in ((0, 0), (700, 1100), (0, 1100), (700, 0)):
        (region,) = plan_regions([_rectangle((900, 1200), top, left, 200, 100)], 64, 8)
        assert (region.rows.stop - region.rows.start, region.columns.stop - region.columns.start) == size
        assert region.size == wanted.size


def test_people_far_apart_get_a_window_each_and_neighbours_one_together() -> None:
    shape = (600, 3000)
    left, near, far = (_rectangle(shape, 250, x, 120, 40) for x in (300, 420, 2500))
    regions = plan_regions([far, near, left], 128, 8)
    assert [_inside(left | near, region) for region in regions] == [True, False]
    assert [_inside(far, region) for region in regions] == [False, True]


def test_merging_goes_on_until_no_windows_overlap() -> None:
    # The windows of the two large holes overlap; one window for both then reaches over the small hole's.
    shape = (1000, 2000)
    holes = [
        _rectangle(shape, 400, 600, 200, 60),
        _rectangle(shape, 400, 800, 200, 60),
        _rectangle(shape, 150, 728, 4, 4),
    ]
    assert len(plan_regions(holes[::2], 8, 8)) == len(plan_regions(holes[1:], 8, 8)) == 2
    (region,) = plan_regions(holes, 8, 8)
    assert all(_inside(hole, region) for hole in holes)


def test_empty_holes_need_no_window() -> None:
    empty, hole = np.zeros((30, 40), bool), _rectangle((30, 40), 3, 3, 2, 2)
    assert plan_regions([], 16, 8) == plan_regions([empty], 16, 8) == []
    assert plan_regions([empty, hole], 16, 8) == plan_regions([hole], 16, 8)


def test_a_whole_square_picture_is_worked_on_at_the_resolution() -> None:
    assert plan_regions([np.ones((300, 300), bool)], 512, 8) == [Region(slice(0, 300), slice(0, 300), (512, 512))]


# Cutting.


@given(seeds)
@settings(max_examples=200)
def test_nothing_inside_a_mask_reaches_a_pixel_outside_the_cut_mask(seed: int) -> None:
    rng, image, region = _random_case(seed)
    mask = rng.random(image.shape[:2]) < 0.1
    other = np.where(mask[..., None], rng.integers(0, 256, image.shape, np.uint8), image)
    outside = ~cut_mask(mask, region)
    before, after = cut_picture(image, region), cut_picture(other, region)
    assert before.shape == (*region.size, 3) and before.dtype == np.uint8
    assert outside.shape == region.size
    assert np.array_equal(before[outside], after[outside])


def test_a_cut_mask_is_no_larger_than_it_must_be() -> None:
    mask = _rectangle((40, 60), 12, 20, 9, 11)
    for factor, expected in ((4, (slice(3, 6), slice(5, 8))), (1, (slice(12, 21), slice(20, 31)))):
        cut = cut_mask(mask, Region(slice(0, 40), slice(0, 60), (40 // factor, 60 // factor)))
        assert cut[expected].all() and cut.sum() == cut[expected].size
    grown = cut_mask(mask, Region(slice(0, 40), slice(0, 60), (120, 180)))
    assert grown[36:63, 60:93].all() and not grown[np.r_[:33, 66:120]].any()


@given(seeds)
@settings(max_examples=100)
def test_soft_masks_and_pictures_are_area_averages_where_they_shrink(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width, down, across = (int(n) for n in rng.integers(1, 9, 4))
    mask = rng.random((height * down + 1, width * across + 2)) < 0.5
    image = rng.integers(0, 256, (*mask.shape, 3), np.uint8)
    region = Region(slice(1, None), slice(2, None), (height, width))
    blocks = mask[1:, 2:].reshape(height, down, width, across)
    soft = cut_soft(mask, region)
    assert soft.dtype == np.float32
    assert np.allclose(soft, blocks.mean((1, 3)), atol=1e-6)
    means = image[1:, 2:].reshape(height, down, width, across, 3).mean((1, 3))
    assert np.abs(cut_picture(image, region) - means).max() <= 0.51


def test_growing_overshoots_nowhere() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4], image[:, 4:] = 60, 190
    grown = cut_picture(image, Region(slice(0, 8), slice(0, 8), (40, 24)))
    assert grown.min() == 60 and grown.max() == 190
    assert (np.diff(grown[0, :, 0].astype(int)) >= 0).all()


# Filling before diffusion.


@given(seeds)
@settings(max_examples=100)
def test_a_fill_depends_on_nothing_inside_the_hole_and_stays_within_the_colours_around_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 50, 2))
    hole = rng.random(shape) < rng.choice([0.1, 0.5, 0.97])
    picture = rng.integers(60, 180, (*shape, 3), np.uint8)
    before, kept = picture.copy(), hole.copy()
    filled = prefilled(picture, hole)
    assert filled.dtype == np.uint8 and np.array_equal(picture, before) and np.array_equal(hole, kept)
    assert np.array_equal(filled[~hole], picture[~hole])
    other = np.where(hole[..., None], rng.integers(0, 256, picture.shape, np.uint8), picture)
    assert np.array_equal(prefilled(other, hole), filled)
    if hole.all():
        assert (filled == 128).all()
    else:
        assert (filled >= picture[~hole].min(0)).all() and (filled <= picture[~hole].max(0)).all()


def test_a_hole_in_a_slope_is_filled_by_nearly_that_slope() -> None:
    rows, columns = np.mgrid[:160, :120]
    slope = np.dstack([40 + rows, 220 - columns, 60 + (rows + columns) // 2]).astype(np.uint8)
    hole = _rectangle((160, 120), 50, 40, 60, 30)
    filled = prefilled(slope, hole).astype(int)
    assert np.abs(filled - slope)[hole].max() < 20, "the hole spans 30 to 60 grey levels"
    assert np.abs(np.diff(filled, axis=0)).max() < 12 and np.abs(np.diff(filled, axis=1)).max() < 12, "smooth"


# Colours at the border.


@given(seeds)
@settings(max_examples=100)
def test_matching_colours_changes_nothing_outside_the_hole_and_looks_at_nothing_inside_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 50, 2))
    hole = rng.random(shape) < rng.choice([0.1, 0.5, 1])
    painted, picture = rng.integers(0, 256, (2, *shape, 3), np.uint8)
    given = painted.copy(), picture.copy(), hole.copy()
    matched = colours_matched(painted, picture, hole, 2)
    assert matched.dtype == np.uint8
    assert all(np.array_equal(one, other) for one, other in zip(given, (painted, picture, hole), strict=True))
    assert np.array_equal(matched[~hole], painted[~hole])
    other = np.where(hole[..., None], rng.integers(0, 256, picture.shape, np.uint8), picture)
    assert np.array_equal(colours_matched(painted, other, hole, 2), matched)


@pytest.mark.parametrize("difference", [0, 10, -40, 80, 160])
def test_a_fill_that_is_off_by_one_colour_is_moved_by_a_share_that_falls_with_the_difference(difference: int) -> None:
    """Two flat colours: the mean on each side is known, and what is spread is the same all over the hole."""
    hole = _rectangle((60, 50), 20, 10, 25, 20)
    picture = np.full((60, 50, 3), 90, np.uint8)
    painted = np.where(hole[..., None], np.uint8(90 + difference), picture)
    expected = 90 + difference * (1 - math.exp(-((difference / JUMP) ** 2)))
    assert (colours_matched(painted, picture, hole, 2)[hole] == round(expected)).all()


def test_a_difference_at_one_end_of_a_hole_is_taken_away_there_and_hardly_at_the_other() -> None:
    hole = _rectangle((40, 120), 15, 10, 10, 100)
    picture = np.full((40, 120, 3), 100, np.uint8)
    picture[:, 60:] = 120
    painted = np.where(hole[..., None], np.uint8(100), picture)
    matched = colours_matched(painted, picture, hole, 2)
    left, right = (matched[hole & where].astype(int) - 100 for where in (np.arange(120) < 40, np.arange(120) >= 80))
    assert left.min() >= 0 and left.max() < 6 and right.min() >= 13, "of 19 that is taken away where all is alike"


# Pasting.


@given(seeds)
@settings(max_examples=200)
def test_outside_the_editable_area_and_the_window_pasting_changes_nothing(seed: int) -> None:
    rng, canvas, region = _random_case(seed)
    core, area = rng.random((2, *canvas.shape[:2])) < 0.6
    painted = rng.integers(0, 256, (*region.size, 3), np.uint8)
    before = canvas.copy()
    result = paste(canvas, painted, region, core, area)
    assert np.array_equal(canvas, before) and result is not canvas
    window = np.zeros_like(area)
    window[region.rows, region.columns] = True
    assert np.array_equal(result[~(area & window)], canvas[~(area & window)])


@given(seeds)
@settings(max_examples=100)
def test_at_scale_one_a_core_is_replaced_and_what_was_there_already_stays(seed: int) -> None:
    rng, canvas, region = _random_case(seed)
    core = rng.random(canvas.shape[:2]) < 0.3
    area = core | (rng.random(core.shape) < 0.4)
    old = canvas[region.rows, region.columns]
    region = Region(region.rows, region.columns, old.shape[:2])
    assert np.array_equal(paste(canvas, old, region, core, area), canvas)
    painted = rng.integers(0, 256, old.shape, np.uint8)
    result, inside = paste(canvas, painted, region, core, area), core[region.rows, region.columns]
    assert np.array_equal(result[region.rows, region.columns][inside], painted[inside])


@pytest.mark.parametrize("side", [20, 200, 500])
def test_the_change_ends_without_a_seam(side: int) -> None:
    """A fill that is too bright everywhere: the step between neighbours stays a fraction of the difference."""
    shape = (side + 60, side + 80)
    core = _rectangle(shape, 30, 40, side, side)
    area = editable(core[None], [0])
    margin = max(2, math.ceil(0.015 * side))
    canvas = np.full((*shape, 3), 90, np.uint8)
    region = Region(slice(3, shape[0] - 2), slice(5, shape[1] - 6), (shape[0] - 5, shape[1] - 11))
    painted = np.full((*region.size, 3), 190, np.uint8)
    change = paste(canvas, painted, region, core, area)[..., 0].astype(int) - 90
    assert (change[core] == 100).all() and (change[~area] == 0).all()
    # A smoothstep over margin + 1 pixels is 1.5 / (margin + 1) steep, and around corners of a grid a little more.
    for axis in (0, 1):
        assert np.abs(np.diff(change, axis=axis)).max() <= 175 / (margin + 1) + 1
    profile = change[30 + side // 2, 40 + side : 40 + side + margin + 1]
    assert (np.diff(profile) < 0).all() and profile[-1] == 0
    assert profile[0] > 50 > profile[-2], "falls from the core to the border"


def test_at_the_border_of_the_picture_the_change_does_not_fade() -> None:
    core = _rectangle((30, 40), 0, 15, 30, 8)
    canvas, painted = np.zeros((30, 40, 3), np.uint8), np.full((30, 40, 3), 200, np.uint8)
    result = paste(canvas, painted, Region(slice(0, 30), slice(0, 40), (30, 40)), core, editable(core[None], [0]))
    assert (result == result[:1]).all() and 0 < result[0, 14, 0] < 200
    everything = np.ones((30, 40), bool)
    filled = paste(canvas, painted, Region(slice(0, 30), slice(0, 40), (30, 40)), core, everything)
    assert (filled == 200).all()


def test_without_a_core_nothing_is_pasted() -> None:
    canvas, everything = np.zeros((6, 7, 3), np.uint8), np.ones((6, 7), bool)
    region = Region(slice(0, 6), slice(0, 7), (6, 7))
    assert np.array_equal(paste(canvas, canvas + 9, region, ~everything, everything), canvas)


@pytest.mark.parametrize("size", [(40, 56), (160, 224), (40, 224)])
def test_a_smooth_picture_comes_back_from_any_working_size(size: tuple[int, int]) -> None:
    rows, columns = np.mgrid[:90, :120] / 20
    picture = (128 + 60 * np.dstack([np.sin(rows), np.cos(columns), np.sin(rows + columns)])).astype(np.uint8)
    region = Region(slice(5, 85), slice(4, 116), size)
    everything = np.ones((90, 120), bool)
    back = paste(np.zeros_like(picture), cut_picture(picture, region), region, everything, everything)
    inside = np.abs(back[5:85, 4:116].astype(int) - picture[5:85, 4:116])[4:-4, 4:-4]
    assert inside.max() <= 4, "no shift by a fraction of a pixel: half a pixel would make a difference of 3 at 2 x"
