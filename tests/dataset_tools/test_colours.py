"""Colours mean what a photograph's file says they mean, in every format, mode and profile."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from dataset_tools.curated import CuratedSettings, Estimators, curated_samples
from dataset_tools.images import Decoded, DecodeSettings, decode_image
from dataset_tools.records import Rejection
from dataset_tools.sources.folder import FolderSettings, FolderSource

SMALL = DecodeSettings(min_side=8)
LATTICE = np.stack(np.meshgrid(*[np.linspace(40, 215, 6)] * 3), -1).reshape(12, 18, 3).round().astype(np.uint8)
"""Colours that sRGB holds, whichever of these spaces they are read in."""
TO_XYZ = {
    "srgb": [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]],
    "adobe": [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]],
    "p3": [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]],
}
GAMMA = {"adobe": 563 / 256, "p3": 2.2, "linear": 1, "grey": 1}


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}) | options)
    return buffer.getvalue()


def as_srgb(pixels: np.ndarray, name: str) -> np.ndarray:
    """Closed form: light of the space, XYZ (D50), light of sRGB, IEC 61966-2-1's curve."""
    to_xyz = np.array(TO_XYZ.get(name, TO_XYZ["srgb"]))
    light = (pixels / 255) ** GAMMA[name] @ to_xyz.T @ np.linalg.inv(np.array(TO_XYZ["srgb"])).T
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def reasons(decoded: Decoded) -> set[str]:
    return {reason for reason, _ in decoded.mended}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("name", ["p3", "adobe", "linear"])
def test_colours_of_rgb_profiles_become_srgb(icc_profiles: dict[str, bytes], name: str, kind: str) -> None:
    """By closed form, to rounding; what was done is named."""
    decoded = decode_image(encoded(Image.fromarray(LATTICE), kind, icc_profile=icc_profiles[name]), SMALL)
    assert np.abs(decoded.image - as_srgb(LATTICE, name)).max() <= 2.5
    assert np.abs(decoded.image.astype(int) - LATTICE).max() > 4, "the profile says another thing than sRGB"
    assert (decoded.transform, reasons(decoded), decoded.profile) == ("icc-to-srgb", {"converted-colours"}, None)


def test_where_pixels_are_to_stay_an_rgb_profile_is_given_with_them(icc_profiles: dict[str, bytes]) -> None:
    for name in ("p3", "adobe", "linear", "srgb"):
        data = encoded(Image.fromarray(LATTICE), "PNG", icc_profile=icc_profiles[name])
        decoded = decode_image(data, SMALL, keep_profile=True)
        assert np.array_equal(decoded.image, LATTICE) and decoded.profile == icc_profiles[name]
        assert (decoded.transform, decoded.mended) == ("", [])


def test_a_profile_that_says_srgb_changes_and_notes_nothing(icc_profiles: dict[str, bytes]) -> None:
    decoded = decode_image(encoded(Image.fromarray(LATTICE), "PNG", icc_profile=icc_profiles["srgb"]), SMALL)
    assert np.array_equal(decoded.image, LATTICE)
    assert (decoded.transform, decoded.mended) == ("", [])


@pytest.mark.parametrize("keep_profile", [True, False])
def test_palettes_transparency_and_grey_are_followed_too(icc_profiles: dict[str, bytes], keep_profile: bool) -> None:
    palette = Image.fromarray(LATTICE).quantize(32)
    data = encoded(palette, "PNG", icc_profile=icc_profiles["linear"])
    decoded = decode_image(data, SMALL, keep_profile=keep_profile)
    stored = np.asarray(palette.convert("RGB"))
    shown = stored if keep_profile else as_srgb(stored, "linear")
    assert np.abs(decoded.image - shown).max() <= 2.5
    assert decoded.profile == (icc_profiles["linear"] if keep_profile else None)

    grey = LATTICE[..., 0]
    truth = as_srgb(np.dstack([grey] * 3), "grey")
    alpha = Image.fromarray(np.dstack([grey, np.full_like(grey, 255)]), "LA")
    for picture in (Image.fromarray(grey), alpha, Image.fromarray(grey.astype(np.uint16) * 257)):
        for kind in ("PNG", "TIFF"):
            data = encoded(picture, kind, icc_profile=icc_profiles["grey"])
            decoded = decode_image(data, SMALL, keep_profile=keep_profile)
            assert np.abs(decoded.image - truth).max() <= 2.5, (picture.mode, kind)
            assert decoded.profile is None and {"converted-colours", "converted-gray"} <= reasons(decoded)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_have_the_colours_that_their_profile_gives_them(icc_profiles: dict[str, bytes], kind: str) -> None:
    """Full cyan of these inks lets 30 % of red through; without the profile it is taken to let nothing through."""
    cyan = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    for keep_profile in (True, False):
        data = encoded(cyan, kind, icc_profile=icc_profiles["cmyk"])
        decoded = decode_image(data, SMALL, keep_profile=keep_profile)
        assert np.abs(decoded.image.astype(int) - (0.3 * 255, 255, 255)).max() <= 8
        assert reasons(decoded) == {"converted-cmyk", "converted-colours"} and decoded.profile is None
    bare = decode_image(encoded(cyan, kind), SMALL)
    assert bare.image[16, 16, 0] < 8 and dict(bare.mended)["converted-cmyk"].endswith("colours are not exact")


def test_lab_is_converted_to_the_colours_that_it_measures() -> None:
    """L*a*b* needs no profile. Values of CIE's formulas for D50; the file is not by Pillow."""
    import tifffile

    for colour, rgb in (((255, 0, 0), (255, 255, 255)), ((0, 0, 0), (0, 0, 0)), ((138, 81, 70), (255, 0, 0))):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, np.full((16, 16, 3), colour, np.uint8), photometric="cielab")
        decoded = decode_image(buffer.getvalue(), SMALL)
        assert np.abs(decoded.image.astype(int) - rgb).max() <= 12, colour
        assert "converted-colours" in reasons(decoded)


@pytest.mark.parametrize("keep_profile", [True, False])
def test_a_profile_that_cannot_be_used_is_told_and_the_pixels_are_taken_for_srgb(
    icc_profiles: dict[str, bytes], keep_profile: bool
) -> None:
    adobe = icc_profiles["adobe"]
    for broken in (b"no profile", adobe[:200], adobe[:16] + b"GRAY" + adobe[20:], icc_profiles["grey"], b"\0" * 4000):
        decoded = decode_image(
            encoded(Image.fromarray(LATTICE), "PNG", icc_profile=broken), SMALL, keep_profile=keep_profile
        )
        assert np.array_equal(decoded.image, LATTICE)
        assert (reasons(decoded), decoded.profile) == ({"unusable-profile"}, None)


@pytest.mark.parametrize(("kind", "value"), [(3, 5), (4, 5), (12, 0.5)])
def test_a_tiff_whose_profile_is_a_number_is_used_and_that_is_told(kind: int, value: float) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[34675] = value
    tags.tagtype[34675] = kind
    decoded = decode_image(encoded(Image.fromarray(LATTICE), "TIFF", tiffinfo=tags), SMALL)
    assert np.array_equal(decoded.image, LATTICE) and reasons(decoded) == {"unusable-profile"}


def test_colours_that_png_chunks_or_exif_name_are_not_followed_and_that_is_told() -> None:
    def with_chunk(name: bytes, body: bytes) -> bytes:
        png = encoded(Image.fromarray(LATTICE), "PNG")
        chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        return png[:33] + chunk + png[33:]  # behind IHDR

    wide = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
    adobe = Image.Exif()
    adobe.get_ifd(0x8769)[0xA001] = 2
    exif = encoded(Image.fromarray(LATTICE), "WEBP", exif=adobe)
    for data in (
        with_chunk(b"gAMA", struct.pack(">I", 100000)),
        with_chunk(b"cHRM", wide),
        with_chunk(b"cICP", bytes([12, 13, 0, 1])),
        exif,
    ):
        decoded = decode_image(data, SMALL)
        assert np.array_equal(decoded.image, LATTICE) and reasons(decoded) == {"unmanaged-colours"}
    for same in ((b"gAMA", struct.pack(">I", 45455)), (b"cICP", bytes([1, 13, 0, 1])), (b"sRGB", b"\0")):
        assert decode_image(with_chunk(*same), SMALL).mended == []


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_sixteen_bits_of_a_tiff_are_told_whatever_mode_pillow_reads_it_in(mode: str, bits: int) -> None:
    """Written by OpenCV: Pillow shows most of these as 8-bit pictures."""
    import cv2

    shape = {"RGB": (16, 20, 3), "RGBA": (16, 20, 4), "L": (16, 20)}[mode]
    values = np.random.default_rng(0).integers(0, 2**bits, shape).astype(np.uint16 if bits == 16 else np.uint8)
    for suffix in (".tif", ".png"):
        told = dict(decode_image(cv2.imencode(suffix, values)[1].tobytes(), SMALL).mended)
        assert ("converted-16-bit" in told) == (bits == 16)
        assert bits == 8 or "16 bits" in told["converted-16-bit"]


def test_a_dataset_holds_srgb_and_says_what_was_converted(tmp_path: Path, icc_profiles: dict[str, bytes]) -> None:
    for folder in ("photos", "masks"):
        (tmp_path / folder).mkdir()
    wide = np.random.default_rng(0).integers(60, 190, (60, 90, 3)).astype(np.uint8)
    Image.fromarray(wide).save(tmp_path / "photos/one.png", icc_profile=icc_profiles["adobe"])
    mask = np.zeros((60, 90), bool)
    mask[10:50, 20:40] = True
    Image.fromarray(mask).save(tmp_path / "masks/one_0.png")
    source = FolderSource(FolderSettings(photos=str(tmp_path / "photos"), masks=str(tmp_path / "masks")))
    rejected: list[Rejection] = []
    settings = CuratedSettings(decode=SMALL)
    (sample,) = curated_samples(source.curate().records, source, settings, Estimators(), rejected)
    assert np.abs(sample.image - as_srgb(wide, "adobe")).max() <= 2.5
    assert sample.origins[0].transform == "icc-to-srgb"
    assert [(row.outcome, row.reason, row.message) for row in rejected] == [
        ("mended", "converted-colours", "its colours were converted to sRGB from Adobe RGB by hand")
    ]


def test_littlecms_agrees(icc_profiles: dict[str, bytes]) -> None:
    """The profiles made by hand are ones."""
    for name in ("p3", "adobe", "linear"):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profiles[name]))
        shown = ImageCms.profileToProfile(
            Image.fromarray(LATTICE), profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
        assert np.abs(np.asarray(shown) - as_srgb(LATTICE, name)).max() <= 2.5
