from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset_tools.errors import UserError
from mild.erasing.layers import Layer, LayeredPicture, seen_people
from mild.erasing.regions import editable

SHAPE = (24, 30)


def _made(
    original: np.ndarray, background: np.ndarray, painted: np.ndarray, whole: np.ndarray, order: tuple[int, ...]
) -> LayeredPicture:
    """Of layers (N, H, W, 4), whose alpha from 128 on is the person's mask."""
    seen = np.zeros(painted.shape, np.uint16) if not order else seen_people(whole[..., 3] >= 128, order)
    layers = [Layer.cut(layer[..., :3], layer[..., 3]) for layer in whole]
    return LayeredPicture(original, background, painted, seen, np.zeros_like(seen), layers, order)


def _whole(picture: LayeredPicture) -> np.ndarray:
    return np.array([layer.whole(*picture.painted.shape) for layer in picture.layers])


def _painter(background: np.ndarray, layers: np.ndarray, order: Sequence[int], keep: Sequence[int]) -> np.ndarray:
    """The picture as a painter makes it: one person after the other over the background."""
    canvas = background.copy()
    for index in order:
        if index in keep:
            mask = layers[index, ..., 3] == 255
            canvas[mask] = layers[index, ..., :3][mask]
    return canvas


def _scene(seed: int, people: int = 3) -> LayeredPicture:
    """Rectangles of noise that overlap each other and the border, over noise; everything known exactly."""
    rng = np.random.default_rng(seed)
    background = rng.integers(0, 256, (*SHAPE, 3), np.uint8)
    layers = rng.integers(0, 256, (people, *SHAPE, 4), np.uint8)
    layers[..., 3] = 0
    for layer in layers:
        top, left = rng.integers(-4, SHAPE[0] - 4), rng.integers(-4, SHAPE[1] - 4)
        layer[max(0, top) : top + rng.integers(5, 14), max(0, left) : left + rng.integers(5, 14), 3] = 255
    order = tuple(int(k) for k in rng.permutation(people))
    original = _painter(background, layers, order, range(people))
    painted = np.zeros(SHAPE, bool) if not people else editable(layers[..., 3] > 0, range(people))
    background = np.where(painted[..., None], background, original)
    return _made(original, background, painted, layers, order)


def _assert_equal(one: LayeredPicture, other: LayeredPicture) -> None:
    for name in ("original", "background", "painted", "seen", "beyond"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert np.array_equal(_whole(one), _whole(other))
    assert (one.order, one.margin) == (other.order, other.margin)


def _subsets(people: int) -> list[tuple[int, ...]]:
    return [keep for count in range(people + 1) for keep in itertools.combinations(range(people), count)]


# Who is seen where.


@given(st.integers(0, 10**6), st.integers(1, 5))
@settings(max_examples=60)
def test_the_last_in_order_is_seen_where_masks_overlap(seed: int, people: int) -> None:
    rng = np.random.default_rng(seed)
    masks, order = rng.random((people, 6, 7)) < 0.5, [int(k) for k in rng.permutation(people)]
    present = order[: people - 1]
    for named, seen in ((order, seen_people(masks, order)), (present, seen_people(masks, present))):
        for y, x in np.ndindex(6, 7):
            assert seen[y, x] == next((k + 1 for k in reversed(named) if masks[k, y, x]), 0)


# Equation 2.


@given(st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=60)
def test_recomposing_is_painting_those_kept_over_the_background(seed: int, people: int) -> None:
    """Layers and background are the true ones here, so that any subset has one right answer, in any order."""
    picture = _scene(seed, people)
    for keep in _subsets(people):
        expected = _painter(picture.background, _whole(picture), picture.order, keep)
        assert np.array_equal(picture.recompose(keep), expected)
        assert np.array_equal(picture.recompose(keep[::-1]), expected)


@given(st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=60)
def test_only_what_belongs_to_those_who_go_may_change(seed: int, people: int) -> None:
    """Whatever was generated, however wrong: a pixel of somebody who stays, or far from who goes, is the original."""
    picture = _scene(seed, people)
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, picture.background.shape, np.uint8)
    picture.background = np.where(picture.painted[..., None], noise, picture.original)
    for layer in picture.layers:
        layer.pixels[..., :3] = rng.integers(0, 256, (*layer.pixels.shape[:2], 3), np.uint8)
    seen = np.stack([picture.seen == k + 1 for k in range(people)])
    for keep in _subsets(people):
        gone = [k for k in range(people) if k not in keep]
        fixed = seen[list(keep)].any(0) | ~editable(seen, gone)
        assert np.array_equal(picture.changed(keep), ~fixed)
        result = picture.recompose(keep)
        assert np.array_equal(result[fixed], picture.original[fixed])
    assert np.array_equal(picture.recompose(range(people)), picture.original)


def test_without_anybody_the_result_is_the_background() -> None:
    masks = np.zeros((2, *SHAPE), bool)
    masks[0, 3:20, 4:12], masks[1, 0:9, 20:30] = True, True
    rng = np.random.default_rng(0)
    original, noise = rng.integers(0, 256, (2, *SHAPE, 3), np.uint8)
    painted = editable(masks, [0, 1])
    background = np.where(painted[..., None], noise, original)
    layers = np.concatenate([np.stack([original] * 2), masks[..., None] * np.uint8(255)], axis=-1)
    picture = _made(original, background, painted, layers, (0, 1))
    assert np.array_equal(picture.recompose([]), background)
    assert np.array_equal(picture.changed([]), painted)


def test_soft_edges_are_blended_over_the_background() -> None:
    """Where who goes hid them, a kept person's layer counts by its alpha, also below the 128 of a mask."""
    original, background = np.full((5, 6, 3), 10, np.uint8), np.full((5, 6, 3), 100, np.uint8)
    layers = np.zeros((2, 5, 6, 4), np.uint8)
    layers[0] = (200, 50, 100, 0)
    layers[0, 2, 1:5, 3] = (255, 204, 127, 51)
    layers[1, 1:4, :, 3] = 255
    picture = _made(original, background, np.ones((5, 6), bool), layers, (0, 1))
    row = picture.recompose([0])[2]
    assert row.tolist() == [
        [100, 100, 100],
        [200, 50, 100],
        [180, 60, 100],
        [150, 75, 100],
        [120, 90, 100],
        [100, 100, 100],
    ]


def test_a_person_who_is_entirely_hidden_changes_nothing_by_going_and_appears_when_the_other_goes() -> None:
    background = _scene(0, 2).background
    layers = np.random.default_rng(0).integers(0, 256, (2, *SHAPE, 4), np.uint8)
    layers[..., 3] = 0
    layers[0, 6:12, 6:12, 3] = layers[1, 2:20, 2:20, 3] = 255
    original = _painter(background, layers, (0, 1), (0, 1))
    picture = _made(original, background, np.ones(SHAPE, bool), layers, (0, 1))
    assert not picture.changed([1]).any() and np.array_equal(picture.recompose([1]), picture.original)
    result = picture.recompose([0])
    assert np.array_equal(result[6:12, 6:12], layers[0, 6:12, 6:12, :3])
    assert np.array_equal(result[2:6, 2:20], picture.background[2:6, 2:20])


def test_a_person_who_was_not_painted_out_cannot_go() -> None:
    masks = np.zeros((2, *SHAPE), bool)
    masks[0, 3:10, 3:8], masks[1, 12:20, 18:26] = True, True
    scene = _scene(1, 2)
    whole = np.dstack([np.zeros((*SHAPE, 3), np.uint8), np.full(SHAPE, 255, np.uint8)]) * masks[..., None]
    picture = _made(scene.original, scene.background, editable(masks, [0]), whole, (0, 1))
    assert np.array_equal(picture.recompose([1])[~picture.painted], picture.original[~picture.painted])
    for keep in ([0], []):
        with pytest.raises(UserError, match=r"^person 2 \(index 1\) was not painted out: erase with layers=True$"):
            picture.recompose(keep)
    picture.painted = editable(masks, [0, 1])
    picture.painted[12, 18] = False
    with pytest.raises(UserError, match="person 2"):
        picture.changed([0])


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([3], r"no person 4 \(index 3\) to keep: the picture has 3"),
        ([0, -1], r"no person 0 \(index -1\)"),
        ([1, 2, 1], r"person 2 \(index 1\) is to be kept twice"),
    ],
)
def test_wrong_indices_are_refused(keep: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _scene(2).recompose(keep)


def test_a_picture_of_one_pixel_works() -> None:
    red, blue = np.array([[[200, 0, 0]]], np.uint8), np.array([[[0, 0, 200]]], np.uint8)
    layer = np.array([[[[200, 0, 0, 255]]]], np.uint8)
    picture = _made(red, blue, np.ones((1, 1), bool), layer, (0,))
    assert np.array_equal(picture.recompose([]), blue) and np.array_equal(picture.recompose([0]), red)


def test_what_does_not_fit_together_is_refused() -> None:
    good = vars(_scene(3))
    for change, message in [
        ({"background": good["background"][1:]}, r"background is uint8 of \(23, 30, 3\), expected uint8 of \(24, 30"),
        ({"painted": good["painted"].astype(np.uint8)}, "painted is uint8"),
        ({"seen": good["seen"].astype(np.uint8)}, "seen is uint8"),
        ({"beyond": good["beyond"] + np.uint16(4)}, "beyond names person 4, but there are 3 layers"),
        ({"original": good["original"].astype(np.float32)}, "original is float32"),
        ({"order": (0, 1)}, r"order is \(0, 1\), expected each of 0 to 2 once"),
    ]:
        with pytest.raises(ValueError, match=message):
            LayeredPicture(**{**good, **change})


# Folders.


def test_what_may_change_is_as_wide_as_people_were_painted_out() -> None:
    picture = _scene(5, 2)
    people = picture.seen > 0
    picture.painted, picture.margin = people, 0
    assert np.array_equal(picture.changed([]), people)
    picture.margin = 0.1
    with pytest.raises(UserError, match="was not painted out"):
        picture.changed([])


@pytest.mark.parametrize("people", [0, 1, 3, 11])
def test_a_saved_picture_comes_back_as_it_was(people: int, tmp_path: Path) -> None:
    picture = _scene(people, people)
    picture.margin = 0.25
    picture.beyond[20:, :9] = people
    for layer in picture.layers:
        layer.pixels[..., 3] = layer.pixels[..., 3] // 3 + 1  # soft
    picture.save(tmp_path / "new" / "folder")
    _assert_equal(LayeredPicture.load(tmp_path / "new" / "folder"), picture)


def test_the_folder_holds_what_image_editors_open(tmp_path: Path) -> None:
    picture = _scene(4, 2)
    picture.order = (1, 0)
    picture.save(tmp_path / "out")
    with Image.open(tmp_path / "out" / "seen.png") as seen:
        assert np.array_equal(np.asarray(seen), picture.seen)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "background.png",
        "beyond.png",
        "layer-01.png",
        "layer-02.png",
        "layers.json",
        "original.png",
        "painted.png",
        "seen.png",
    ]
    with Image.open(tmp_path / "out" / "layer-02.png") as layer:
        assert layer.mode == "RGBA" and layer.size == SHAPE[::-1]
        assert np.array_equal(np.asarray(layer), _whole(picture)[1])
    assert json.loads((tmp_path / "out" / "layers.json").read_text()) == {
        "version": 2,
        "height": 24,
        "width": 30,
        "order": ["layer-02.png", "layer-01.png"],
        "margin": 0.015,
    }


def test_saving_replaces_an_older_folder_as_a_whole(tmp_path: Path) -> None:
    _scene(5, 3).save(tmp_path / "out")
    later = _scene(6, 1)
    later.save(tmp_path / "out")
    assert not (tmp_path / "out" / "layer-02.png").exists()
    _assert_equal(LayeredPicture.load(tmp_path / "out"), later)


def test_a_layer_that_an_editor_saved_with_a_palette_is_read(tmp_path: Path) -> None:
    picture = _scene(7, 1)
    picture.layers[0].pixels[..., :3] = (250, 10, 20)
    picture.save(tmp_path)
    indexed = Image.fromarray(_whole(picture)[0, ..., 3]).point(lambda alpha: int(alpha == 255)).convert("P")
    indexed.putpalette([0, 0, 0, 250, 10, 20])
    indexed.save(tmp_path / "layer-01.png", transparency=0)
    loaded = LayeredPicture.load(tmp_path)
    assert np.array_equal(_whole(loaded)[..., 3], _whole(picture)[..., 3])
    assert np.array_equal(loaded.recompose([0]), picture.original)


def test_a_layer_in_other_colours_than_the_original_is_refused(tmp_path: Path) -> None:
    """Its numbers would be shown as colours that nobody chose."""
    picture = _scene(8, 2)
    picture.icc_profile = b"a wide profile"
    picture.save(tmp_path / "out")
    assert LayeredPicture.load(tmp_path / "out").icc_profile == b"a wide profile"
    Image.open(tmp_path / "out/background.png").save(tmp_path / "out/background.png", icc_profile=b"another")
    with pytest.raises(UserError, match=r"background\.png has another colour profile than original\.png"):
        LayeredPicture.load(tmp_path / "out")


def test_a_damaged_folder_is_refused_in_one_line_that_names_the_file(tmp_path: Path) -> None:
    picture = _scene(8, 2)

    def refused(name: str, content: bytes | None, message: str) -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        picture.save(tmp_path / "out")
        path = tmp_path / "out" / name
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            LayeredPicture.load(tmp_path / "out")
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    def png(array: np.ndarray) -> bytes:
        Image.fromarray(array).save(tmp_path / "picture.png")
        return (tmp_path / "picture.png").read_bytes()

    def index(**changes: object) -> bytes:
        good = {"version": 2, "height": 24, "width": 30, "order": ["layer-01.png", "layer-02.png"], "margin": 0}
        return json.dumps({**good, **changes}).encode()

    for name in ("original.png", "background.png", "painted.png", "seen.png", "layer-02.png", "layers.json"):
        refused(name, None, "No such file")
    for name in ("original.png", "painted.png", "layer-01.png"):
        refused(name, b"\x89PNG\r\n\x1a\n", "cannot be read")
        refused(name, png(np.zeros((30, 24, 4), np.uint8)), r"is 24 x 30, but layers\.json says 30 x 24")
    refused("background.png", png(picture.background)[:-60], "cannot be read")
    refused("layer-01.png", png(picture.original), "no transparency")
    refused("beyond.png", png(np.full(SHAPE, 3, np.uint16)), r"names person 3, but layers\.json names 2")
    for channels in (3, 4):
        deep = np.full((*SHAPE, channels), 1, np.uint16)
        refused("seen.png", cv2.imencode(".png", deep)[1].tobytes(), "export it as grey of 16 bits")
    refused("layers.json", b"{", "not valid JSON")
    refused("layers.json", b"\xff", "not valid JSON")
    refused("layers.json", b"[]", "dictionary")
    refused("layers.json", index(version=3), "version")
    refused("layers.json", index(height=0), "height")
    refused("layers.json", index(margin=-1), "margin")
    refused("layers.json", index(order=["layer-01.png", "layer-01.png"]), "once")
    refused("layers.json", index(order=["layer-01.png", "layer-03.png"]), "once")
