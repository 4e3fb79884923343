"""Decoding: what is broken is refused by name, what is unusual is mended to the right pixels."""

from __future__ import annotations

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, TiffImagePlugin

from dataset_tools.errors import Rejected
from dataset_tools.images import (
    DecodeSettings,
    _eight_bits,
    decode_image,
    exif_orientation,
    orient,
    orient_points,
    read_orientation,
    undo_orientation,
)
from dataset_tools.mask_files import decode_mask_file

SMALL = DecodeSettings(min_side=8)
NOISE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def smooth(height: int = 40, width: int = 56) -> np.ndarray:
    """A picture that JPEG keeps well."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(code: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = code
    return exif


def reason_of(data: bytes, settings: DecodeSettings = SMALL) -> str:
    with pytest.raises(Rejected) as caught:
        decode_image(data, settings, rotation=None)
    return caught.value.reason


@pytest.mark.parametrize(("stored", "code"), [(TiffImagePlugin.IFDRational(6, 1), 6), (6.0, 6), (6.5, 1), (9.0, 1)])
def test_an_orientation_that_is_stored_as_a_fraction_is_a_whole_number(stored: Any, code: int) -> None:
    picture: Any = SimpleNamespace(getexif=lambda: {0x0112: stored})
    found = exif_orientation(picture)
    assert (found, type(found)) == (code, int)


def outcome_of(data: bytes) -> np.ndarray | Rejected:
    try:
        return decode_image(data, SMALL, rotation=None).image
    except Rejected as rejected:
        return rejected


def reasons(data: bytes) -> set[str]:
    return {reason for reason, _ in decode_image(data, SMALL, rotation=None).mended}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP"])
def test_lossless_files_keep_every_pixel_and_need_no_mending(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode_image(encoded(NOISE, kind, **options), SMALL, rotation=None)
    assert np.array_equal(decoded.image, NOISE)
    assert (decoded.mended, decoded.transform, decoded.stored_size, decoded.orientation) == ([], "", (56, 40), 1)


@pytest.mark.parametrize("code", range(1, 9))
def test_points_are_turned_as_pixels_are(code: int) -> None:
    """The middle of a pixel lies where the pixel comes to lie."""
    stored = np.zeros((5, 7), bool)
    stored[1, 4] = True
    upright = orient(stored, code)
    ((y, x),) = np.argwhere(upright)
    ((found_x, found_y),) = orient_points(np.array([[4.5 / 7, 1.5 / 5]]), code)
    assert found_x * upright.shape[1] == pytest.approx(x + 0.5) and found_y * upright.shape[0] == pytest.approx(y + 0.5)


@pytest.mark.parametrize("code", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_as_pillows_exif_transpose_does(code: int, kind: str) -> None:
    data = encoded(NOISE, kind, exif=with_orientation(code), **({"lossless": True} if kind == "WEBP" else {}))
    truth = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    decoded = decode_image(data, SMALL, rotation=None)
    assert np.array_equal(decoded.image, truth)
    assert decoded.stored_size == (56, 40) == read_orientation(data, 10**6)[0]
    assert decoded.orientation == code == read_orientation(data, 10**6)[1]
    assert decoded.transform == ("" if code == 1 else f"exif-transpose {code}")
    assert [reason for reason, _ in decoded.mended] == ([] if code == 1 else ["exif-rotation"])
    assert np.array_equal(decoded.apply_orientation(NOISE[..., 0]), truth[..., 0])


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_rotation_from_the_source_is_counter_clockwise_and_overrules_exif(rotation: int, kind: str) -> None:
    decoded = decode_image(encoded(NOISE, kind, exif=with_orientation(7)), SMALL, rotation=rotation)
    assert np.array_equal(decoded.image, np.rot90(NOISE, rotation // 90))
    assert np.array_equal(decoded.apply_orientation(NOISE[..., 0] > 99), np.rot90(NOISE[..., 0] > 99, rotation // 90))
    assert decoded.transform == (f"rotate {rotation}" if rotation else "")
    assert decoded.mended == []


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 6))
def test_orient_never_loses_a_pixel_and_can_be_undone(code: int, height: int, width: int) -> None:
    array = np.arange(height * width).reshape(height, width)
    assert sorted(orient(array, code).ravel()) == list(range(height * width))
    assert np.array_equal(undo_orientation(orient(array, code), code), array)


def test_long_pictures_are_shrunk_to_max_side_before_they_are_turned() -> None:
    pixels = smooth(600, 1200)
    data = encoded(pixels, "JPEG", quality=95, exif=with_orientation(6))
    decoded = decode_image(data, DecodeSettings(max_side=128), rotation=None)
    assert decoded.image.shape == (128, 64, 3)
    assert decoded.stored_size == (1200, 600)
    assert decoded.transform == "exif-transpose 6; resize 64x128"
    truth = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).resize((64, 128), Image.Resampling.BOX)
    assert np.abs(decoded.image.astype(int) - np.asarray(truth)).max() <= 4


def test_pictures_within_max_side_are_not_resampled() -> None:
    assert np.array_equal(decode_image(encoded(NOISE, "PNG"), DecodeSettings(min_side=8, max_side=56)).image, NOISE)


def test_cmyk_jpeg_as_adobe_writes_it_comes_out_in_its_true_colours() -> None:
    cmyk = np.zeros((32, 32, 4), np.uint8)
    cmyk[:, :16] = (0, 255, 255, 0)  # red
    cmyk[:, 16:] = (255, 0, 0, 0)  # cyan
    data = encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data[:64]
    image = decode_image(data, SMALL).image.astype(int)
    assert np.abs(image[:, 4:12] - (255, 0, 0)).max() < 12
    assert np.abs(image[:, 20:28] - (0, 255, 255)).max() < 12
    assert reasons(data) == {"converted-cmyk"}


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        data = encoded(values, kind)
        image = decode_image(data, SMALL).image
        assert np.array_equal(image[..., 0], np.round(values / 257).astype(np.uint8))
        assert np.array_equal(image[..., 0], image[..., 2])
        assert reasons(data) == {"converted-16-bit", "converted-gray"}


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_grey_tiffs_of_any_depth_are_read_from_black_to_white(bits: int, white_is_zero: bool) -> None:
    values = np.linspace(0, 2**bits - 1, 32 * 32).reshape(32, 32).astype(np.uint16)
    file = io.BytesIO()
    stored = 2**bits - 1 - values if white_is_zero else values
    # Written as 16 bits, and called what they are: Pillow writes no others.
    Image.fromarray(stored).save(file, "TIFF", tiffinfo={262: 0 if white_is_zero else 1})
    with Image.open(io.BytesIO(file.getvalue())) as picture:
        picture.load()
        levels = _eight_bits(np.asarray(picture), picture, bits)
    assert np.abs(levels - values * (255 / (2**bits - 1))).max() <= 1


def sixteen_bit_rgb_png(values: np.ndarray) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour_is_reduced_to_its_high_bytes() -> None:
    values = np.random.default_rng(1).integers(0, 65536, (16, 20, 3)).astype(np.uint16)
    data = sixteen_bit_rgb_png(values)
    assert np.array_equal(decode_image(data, SMALL).image, (values >> 8).astype(np.uint8))
    assert reasons(data) == {"converted-16-bit"}


def test_palette_pictures_show_their_colours() -> None:
    picture = Image.fromarray(smooth()).quantize(64)
    for kind in ("PNG", "GIF"):
        data = encoded(picture, kind)
        assert np.array_equal(decode_image(data, SMALL).image, np.asarray(picture.convert("RGB")))
        assert reasons(data) == {"converted-palette"}


def test_transparency_is_composited_on_white() -> None:
    rgba = np.dstack([NOISE, np.linspace(0, 255, NOISE[..., 0].size).reshape(40, 56).astype(np.uint8)])
    alpha = rgba[..., 3:].astype(float) / 255
    truth = NOISE * alpha + 255 * (1 - alpha)
    data = encoded(rgba, "PNG")
    assert np.abs(decode_image(data, SMALL).image - truth).max() <= 1
    assert reasons(data) == {"converted-alpha"}
    palette = encoded(Image.fromarray(smooth()).quantize(16), "PNG", transparency=3)
    assert reasons(palette) == {"converted-alpha", "converted-palette"}


def test_grey_pictures_become_three_equal_channels() -> None:
    for picture in (Image.fromarray(NOISE[..., 0]), Image.fromarray(NOISE[..., 0] > 128)):
        data = encoded(picture, "PNG")
        assert np.array_equal(decode_image(data, SMALL).image, np.asarray(picture.convert("RGB")))
        assert reasons(data) == {"converted-gray"}


def test_the_first_frame_of_an_animation_is_used() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(data, SMALL).image == (255, 0, 0)).all()
    assert "first-frame" in reasons(data)


def test_what_is_not_a_picture_is_named() -> None:
    assert reason_of(b"") == "empty-file"
    assert reason_of(b"<html>404</html>") == "not-an-image"
    assert reason_of(b"%PDF-1.7 ...") == "not-an-image"
    assert reason_of(encoded(NOISE, "PPM")) == "not-an-image"
    assert reason_of(encoded(np.zeros((4, 30, 3), np.uint8), "PNG")) == "too-small"


def test_bombs_are_refused_before_a_pixel_is_decoded() -> None:
    bomb = encoded(Image.new("1", (5000, 4000)), "PNG")
    assert len(bomb) < 5000
    assert reason_of(bomb, DecodeSettings(max_pixels=10**7)) == "decompression-bomb"
    huge = bytearray(bomb)
    huge[16:24] = struct.pack(">II", 60000, 60000)
    huge[29:33] = struct.pack(">I", zlib.crc32(bytes(huge[12:29])))
    assert reason_of(bytes(huge)) == "decompression-bomb"
    with pytest.raises(Rejected, match="decompression-bomb"):
        decode_mask_file(bomb, 10**7)


WHOLE = {kind: encoded(NOISE, kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")} | {
    "progressive": encoded(NOISE, "JPEG", progressive=True)
}


@given(st.sampled_from(sorted(WHOLE)), st.floats(0.0, 1.0, exclude_max=True))
def test_a_file_cut_anywhere_is_rejected_or_whole_never_padded(name: str, share: float) -> None:
    whole = WHOLE[name]
    outcome = outcome_of(whole[: int(len(whole) * share)])
    if isinstance(outcome, Rejected):
        assert outcome.reason in {"empty-file", "not-an-image", "truncated-image", "undecodable-image"}
    else:
        assert np.array_equal(outcome, decode_image(whole, SMALL).image)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "BMP", "progressive"])
def test_half_a_file_is_called_truncated(name: str) -> None:
    assert reason_of(WHOLE[name][: len(WHOLE[name]) // 2]) == "truncated-image"


@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 10**6), st.binary(min_size=1, max_size=40))
def test_damage_anywhere_raises_nothing_but_rejected(name: str, place: int, junk: bytes) -> None:
    data = bytearray(WHOLE[name])
    start = place % len(data)
    data[start : start + len(junk)] = junk
    outcome = outcome_of(bytes(data))
    assert (outcome.reason and outcome.message) if isinstance(outcome, Rejected) else outcome.ndim == 3


def test_a_damaged_header_is_undecodable_rather_than_truncated() -> None:
    data = bytearray(WHOLE["PNG"])
    data[20] ^= 0xFF
    assert reason_of(bytes(data)) == "undecodable-image"


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encoded(smooth(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01\x02")
    assert decode_image(data, SMALL).orientation == 1


def test_many_threads_decode_as_one_does() -> None:
    files = [WHOLE[name] for name in sorted(WHOLE)] * 8
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda data: decode_image(data, SMALL).image, files))
    assert all(np.array_equal(a, decode_image(data, SMALL).image) for a, data in zip(parallel, files, strict=True))


@pytest.mark.parametrize(
    "fault", [MemoryError(), TypeError("ours"), KeyError("ours"), AssertionError("ours")], ids=repr
)
def test_a_fault_of_our_own_is_no_fault_of_the_picture(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr("dataset_tools.images.cv2.resize", fail)
    with pytest.raises(type(fault)):
        decode_image(encoded(smooth(), "PNG"), DecodeSettings(min_side=8, max_side=16))


def test_no_memory_left_is_no_fault_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Pillow is the first to want some."""

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load_prepare", fail)
    with pytest.raises(MemoryError):
        decode_image(encoded(smooth(), "PNG"), SMALL)


def test_whatever_pillow_stumbles_over_is_the_pictures_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("unknown chunk")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load_prepare", fail)
    with pytest.raises(Rejected, match="undecodable-image"):
        decode_image(encoded(smooth(), "PNG"), SMALL)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_what_pillow_cannot_read_is_told_without_addresses_in_memory(kind: str) -> None:
    buffer = io.BytesIO()
    if kind == "TIFF":
        tifffile.imwrite(buffer, np.zeros((8, 8, 3), np.float32))
    else:
        buffer.write(b"\xff\xd8\xff" + bytes(range(1, 200)) + b"\xff\xd9")
    with pytest.raises(Rejected) as caught:
        decode_image(buffer.getvalue(), DecodeSettings(min_side=1))
    assert caught.value.reason == "undecodable-image"
    assert "0x" not in caught.value.message and "save it anew" in caught.value.message
