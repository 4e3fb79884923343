"""One rule for all mask files: however people were drawn and stored, they come back, or their owner is told why not."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from dataset_tools.errors import Rejected
from dataset_tools.mask_files import MaskFile, decode_mask, decode_mask_file, people_of, read_mask_array
from dataset_tools.written_masks import encode_index

HEIGHT, WIDTH = 96, 128


@st.composite
def figures(draw: st.DrawFn) -> np.ndarray:
    """(H, W) bool: a rectangle or an ellipse as a person is large."""
    width, height = draw(st.integers(16, 50)), draw(st.integers(20, 60))
    left, top = draw(st.integers(0, WIDTH - width)), draw(st.integers(0, HEIGHT - height))
    picture = Image.new("1", (WIDTH, HEIGHT))
    shape = draw(st.sampled_from([ImageDraw.ImageDraw.rectangle, ImageDraw.ImageDraw.ellipse]))
    shape(ImageDraw.Draw(picture), (left, top, left + width - 1, top + height - 1), fill=1)
    return np.asarray(picture)


@st.composite
def crowds(draw: st.DrawFn) -> list[np.ndarray]:
    """People as they are seen: those in front hide parts of the others, but leave enough to see."""
    people: list[np.ndarray] = []
    whole = draw(st.lists(figures(), min_size=2, max_size=5))
    for figure in whole:
        people = [*(person & ~figure for person in people), figure]
    # Somebody of whom but an even rim is left could as well be the front one's soft edge.
    assume(all(2 * person.sum() > figure.sum() for person, figure in zip(people, whole, strict=True)))
    return people


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def read(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> MaskFile:
    return decode_mask_file(encoded(pixels, kind, **options), 10**6)


def assert_people(file: MaskFile, people: list[np.ndarray]) -> None:
    assert len(file.people) == len(people)
    assert all(np.array_equal(a, b) for a, b in zip(file.people.values(), people, strict=True))


def mapped(people: list[np.ndarray], values: np.ndarray) -> np.ndarray:
    """Each person in its value (a number or a colour), all else 0."""
    number = sum(person.astype(int) * k for k, person in enumerate(people, start=1))
    return np.concatenate([np.zeros_like(values[:1]), values])[number]


@settings(max_examples=30)
@given(crowds(), st.data())
def test_several_people_come_back_from_any_values_brightest_last(people: list[np.ndarray], data: st.DataObject) -> None:
    count = len(people)
    for kind, highest in ((np.uint8, 255), (np.uint16, 65535), (np.int64, 2**31)):
        values = st.lists(st.integers(1, highest), min_size=count, max_size=count, unique=True)
        index = mapped(people, np.array(sorted(data.draw(values)), kind))
        assert_people(read_mask_array(index), people)
        if kind != np.int64:
            assert_people(read(index), people)
    assert_people(read_mask_array(mapped(people, np.linspace(0, 1, count + 1)[1:])), people)


@settings(max_examples=25)
@given(crowds(), st.integers(0, 1000))
def test_several_people_come_back_from_any_palette(people: list[np.ndarray], seed: int) -> None:
    """In the order of their indices if the palette has colours, of their brightness if it is grey."""
    rng = np.random.default_rng(seed)
    indices = rng.permutation(256)[: len(people) + 1].astype(np.uint8)
    number = mapped(people, np.arange(1, len(people) + 1))
    grey = np.append(rng.permutation(np.arange(1, 256)), 1).astype(np.uint8)
    for palette in (np.stack([grey, grey, grey], 1), np.stack([grey, grey, 255 - grey], 1)):
        palette[indices[0]] = 0
        picture = Image.fromarray(indices[number])
        picture.putpalette(palette.ravel().tolist())
        is_grey = palette[:, 0].tolist() == palette[:, 2].tolist()
        keys = palette[indices[1:], 0] if is_grey else indices[1:]
        assume(len(set(keys.tolist())) == len(keys) and tuple(palette[255]) != (224, 224, 192))
        assert_people(read(picture), [people[k] for k in np.argsort(keys)])


@settings(max_examples=25)
@given(crowds(), st.data())
def test_several_people_come_back_from_any_colours_in_their_order(
    people: list[np.ndarray], data: st.DataObject
) -> None:
    colours = data.draw(
        st.lists(st.integers(1, 0xFFFFFF), min_size=len(people), max_size=len(people), unique=True).map(sorted)
    )
    rgb = np.array([[c >> 16, c >> 8 & 255, c & 255] for c in colours], np.uint8)
    assume((rgb.max(axis=1) != rgb.min(axis=1)).all())
    assert_people(read(mapped(people, rgb)), people)
    assert_people(read(mapped(people, rgb), "WEBP", lossless=True), people)
    opaque = np.concatenate([mapped(people, rgb), np.full((HEIGHT, WIDTH, 1), 255, np.uint8)], axis=2)
    assert_people(read(opaque), people)


HARD: dict[str, Callable[[np.ndarray], np.ndarray | Image.Image]] = {
    "1 bit": lambda m: Image.fromarray(m),
    "grey 1": lambda m: m.astype(np.uint8),
    "grey 9": lambda m: m * np.uint8(9),
    "16 bit": lambda m: m * np.uint16(300),
    "white": lambda m: m * np.uint8(255),
    "blue": lambda m: m[..., None] * np.uint8([0, 0, 7]),
    "alpha of a photograph": lambda m: np.dstack([np.full((HEIGHT, WIDTH, 3), 90, np.uint8), m * np.uint8(255)]),
    "half transparent": lambda m: np.dstack([m[..., None] * np.uint8([255, 0, 0]), m * np.uint8(100)]),
    "opaque RGBA": lambda m: np.dstack([m[..., None] * np.uint8([90] * 3), np.full(m.shape, 255, np.uint8)]),
    "grey with alpha": lambda m: Image.fromarray(np.dstack([m * np.uint8(0), m * np.uint8(255)]), "LA"),
    "palette, white first": lambda m: Image.fromarray(m[..., None] * np.uint8([255] * 3)).quantize(2),
    "palette, colour": lambda m: Image.fromarray(m[..., None] * np.uint8([200, 10, 10])).quantize(2),
}


@pytest.mark.parametrize("way", HARD)
@settings(max_examples=10)
@given(figure=figures())
def test_one_person_comes_back_exactly_from_every_lossless_way_of_storing(way: str, figure: np.ndarray) -> None:
    assert_people(read(HARD[way](figure)), [figure])


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded(pixels, "JPEG", quality=quality))))


def shrunk(figure: np.ndarray) -> np.ndarray:
    """With smoothed edges: drawn at four times the size, off the grid by a pixel."""
    large = np.pad(np.kron(figure, np.ones((4, 4), np.uint8)) * np.uint8(255), ((1, 0), (2, 0)), "edge")[:-1, :-2]
    return np.asarray(Image.fromarray(large).resize((WIDTH, HEIGHT), Image.Resampling.BOX))


def blurred(figure: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(figure * np.uint8(255), (0, 0), sigma)


RED = np.float32([0.9, 0.1, 0.3])
SOFT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "smoothed edges": shrunk,
    "blur 1": lambda m: blurred(m, 1),
    "blur 3": lambda m: blurred(m, 3),
    "matte of 16 bit": lambda m: blurred(m, 2).astype(np.uint16) * 257,
    "matte of 0..1": lambda m: blurred(m, 2) / np.float32(255),
    "dim": lambda m: blurred(m, 2) // 2,
    "alpha": lambda m: np.dstack([np.zeros((HEIGHT, WIDTH, 3), np.uint8), blurred(m, 1)]),
    "JPEG 30": lambda m: jpeg(m * np.uint8(255), 30),
    "JPEG 75": lambda m: jpeg(m * np.uint8(255), 75),
    "JPEG 98": lambda m: jpeg(m * np.uint8(255), 98),
    "smoothed, JPEG": lambda m: jpeg(shrunk(m), 85),
    "enlarged": lambda m: cv2.resize(cv2.resize(m * np.uint8(255), (64, 48)), (128, 96), interpolation=cv2.INTER_CUBIC),
    "few steps": lambda m: blurred(m, 2) // 64 * np.uint8(85),
    "trimap": lambda m: np.maximum(m * np.uint8(255), cv2.dilate(m * np.uint8(128), np.ones((5, 5)))),
    "grey, JPEG": lambda m: jpeg(m * np.uint8(128), 75),
    "colour, smoothed": lambda m: (shrunk(m)[..., None] * RED).astype(np.uint8),
    "colour, JPEG": lambda m: jpeg((m[..., None] * np.float32([0, 0, 255])).astype(np.uint8), 90),
}


@pytest.mark.parametrize("way", SOFT)
@settings(max_examples=15)
@given(figure=figures())
def test_a_soft_mask_is_one_person_whose_body_is_whole_and_whose_surroundings_are_free(
    way: str, figure: np.ndarray
) -> None:
    """Pixels within 5 of the true outline may fall on either side."""
    pixels = SOFT[way](figure)
    near = np.ones((11, 11), np.uint8)
    body = cv2.erode(figure.view(np.uint8), near, borderValue=1).view(bool)
    around = cv2.dilate(figure.view(np.uint8), near).view(bool)
    files = [read_mask_array(pixels)] if pixels.dtype == np.float32 else [read_mask_array(pixels), read(pixels)]
    for file in files:
        (person,) = file.people.values()
        assert person[body].all() and not person[~around].any()


def test_half_of_the_highest_value_is_where_a_soft_person_ends() -> None:
    ramp = np.zeros((40, 60), np.uint8)
    ramp[10:30, 20:40] = 200
    ramp[10:30, 16:20] = [40, 99, 100, 150]
    (person,) = read(ramp).people.values()
    assert person[20].nonzero()[0].tolist() == list(range(18, 40))


def test_only_the_border_of_pascal_voc_is_nobody() -> None:
    """Index 255 in VOC's colour is void; of any other colour, or in a grey file, it is a person."""
    index = np.zeros((60, 90), np.uint8)
    index[10:50, 10:30], index[10:50, 50:70], index[:, 80:84] = 1, 2, 255
    picture = Image.fromarray(index)
    assert list(read(index).people) == [1, 2, 255]
    for colour, expected in (((224, 224, 192), [1, 2]), ((224, 224, 191), [1, 2, 255])):
        palette = np.zeros((256, 3), np.uint8)
        palette[1], palette[2], palette[255] = (128, 0, 0), (0, 128, 0), colour
        picture.putpalette(palette.ravel().tolist())
        assert list(read(picture).people) == expected


def test_a_palette_that_is_not_filled_in_hides_nobody() -> None:
    """Two people of one colour, or black as the background, are told apart by their indices."""
    index = np.zeros((60, 90), np.uint8)
    index[10:50, 10:30], index[10:50, 50:70] = 1, 2
    for colours in ([0, 0, 0, 255, 255, 255, 255, 255, 255], [0, 0, 0, 255, 0, 0], [0, 0, 0]):
        picture = Image.fromarray(index)
        picture.putpalette(colours + [0] * (768 - len(colours)))
        assert_people(read(picture), [index == 1, index == 2])


def two(left: int, right: int) -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[20:80, 10:50], pixels[20:80, 70:110] = left, right
    return pixels


def beside(large: int, small: int) -> np.ndarray:
    """Somebody of 1,350 pixels beside somebody of nearly 300,000."""
    pixels = np.zeros((700, 900), np.uint8)
    pixels[20:680, 40:480], pixels[300:345, 700:730] = large, small
    return pixels


@pytest.mark.parametrize(
    "pixels",
    [
        cv2.GaussianBlur(two(128, 255), (0, 0), 1),
        jpeg(two(85, 170) + two(85, 0) // 2, 75),
        cv2.GaussianBlur(np.dstack([two(255, 0), two(0, 255), two(0, 0)]), (0, 0), 1),
        cv2.GaussianBlur(np.dstack([two(255, 0), two(0, 0), two(0, 90)]), (0, 0), 1),
        jpeg(np.dstack([two(255, 0), two(0, 0), two(0, 90)]), 90),
        cv2.GaussianBlur(np.dstack([beside(255, 0), beside(0, 255), beside(0, 0)]), (0, 0), 1),
        cv2.GaussianBlur(beside(255, 100), (0, 0), 4),
        cv2.GaussianBlur(beside(255, 160), (0, 0), 4),
        np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), np.uint8),
        np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8),
        np.tile(np.arange(WIDTH, dtype=np.uint8), (HEIGHT, 1)),
    ],
    ids=[
        *("smoothed index", "index as JPEG", "smoothed colours", "one is dark", "one is dark, JPEG", "one is small"),
        *("one is small and dim", "one is small and less bright", "grey noise", "noise", "gradient"),
    ],
)
def test_what_is_neither_one_person_nor_several_is_refused(pixels: np.ndarray) -> None:
    with pytest.raises(Rejected, match="not-a-mask"):
        read(pixels)


@pytest.mark.parametrize(("kind", "quality"), [("JPEG", 100), ("JPEG", 95), ("WEBP", 90), ("WEBP", 98)])
@pytest.mark.parametrize("values", [(85, 170), (128, 255), (1, 2)])
def test_what_a_lossy_file_leaves_of_several_people_is_never_numbered_by_its_specks(
    kind: str, quality: int, values: tuple[int, int]
) -> None:
    """Either they are read as they were, or the file is refused."""
    pixels = two(*values)
    # Not along the blocks of eight pixels by which such files are cut.
    pixels = np.roll(pixels, (3, 5), (0, 1))
    people: list[np.ndarray] = []
    with contextlib.suppress(Rejected):
        people = list(read(pixels, kind, quality=quality).people.values())
    assert len(people) <= 2
    assert all(person.sum() > 1000 for person in people)


def test_of_several_files_each_is_one_person_and_an_only_one_may_be_several() -> None:
    many, one = read(two(3, 9)), read(two(0, 255))
    alone = people_of([many])
    assert [(person.file, person.value) for person in alone] == [(0, 3), (0, 9)]
    assert [person.note for person in alone] == ["people 1 to 2 are its values 3, 9", ""]
    first, second = people_of([many, one])
    assert np.array_equal(first.mask, two(1, 1) > 0) and "2 values are taken together" in first.note
    assert np.array_equal(second.mask, two(0, 1) > 0) and second.note == ""
    assert people_of([read(two(1, 2))])[0].note == ""


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_shares_of_any_precision_are_the_same_mask(kind: type) -> None:
    soft = np.zeros((40, 40), kind)
    for number, share in enumerate((0.25, 0.75, 1)):
        soft[8 + number : 32 - number, 8 + number : 32 - number] = share
    assert np.array_equal(read_mask_array(soft).whole(), soft >= 0.5)


def test_broken_masks_are_rejected_by_name() -> None:
    whole = encoded(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), np.uint8))
    for data, reason in ((whole[:-300], "truncated-image"), (b"", "empty-file"), (b"text", "not-an-image")):
        with pytest.raises(Rejected, match=reason):
            decode_mask(data, 10**6)
    for array in (np.full((5, 5), -1), np.full((5, 5), np.nan), np.zeros(5), np.zeros((5, 5), object)):
        with pytest.raises(Rejected, match="not-a-mask"):
            read_mask_array(array)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_a_file_says_its_own_orientation_once(kind: str) -> None:
    """Pillow turns TIFF files upright by itself: then there is nothing left to turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = read(two(255, 255), kind, exif=exif)
    shape, expected = file.whole().shape, ((WIDTH, HEIGHT), 1) if kind == "TIFF" else ((HEIGHT, WIDTH), 6)
    assert (shape, file.orientation) == expected


@pytest.mark.parametrize("mode", ["P", "RGB"])
def test_people_of_an_index_of_ours_keep_their_numbers(mode: str) -> None:
    """Also where one is a sliver beside another, where one is gone, and where an editor has dropped the palette."""
    one, two, three = (np.zeros((HEIGHT, WIDTH), bool) for _ in range(3))
    one[30:70, 41:42] = two[20:80, 42:70] = three[20:80, 90:120] = True
    picture = Image.open(io.BytesIO(encode_index([one, two, three], (HEIGHT, WIDTH))))
    found = read(picture.convert(mode)).people
    assert list(found) == [1, 2, 3]
    assert all(np.array_equal(a, b) for a, b in zip(found.values(), (one, two, three), strict=True))
    index = np.asarray(picture) * ~two
    mended = Image.fromarray(index)
    mended.putpalette(picture.getpalette() or [])
    assert list(read(mended.convert(mode)).people) == [1, 3]
