"""Decoding pictures from untrusted bytes: refuse what is broken, mend what is merely unusual.

Nothing here changes Pillow's global state, `without_pillows_limit` excepted, so that all else may run in any number of
threads.
"""

from __future__ import annotations

import io
import struct
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from pydantic import Field

from dataset_tools.colours import Profile, lab_to_srgb, unmanaged
from dataset_tools.errors import Rejected
from dataset_tools.settings import Settings

Image.init()  # load all plugins now: Pillow would otherwise do so inside the first threads that open a picture

PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")

MOST_PIXELS = 500_000_000
"""Of a file that its user names: a picture of 500 megapixels takes 1.5 GB, and erasing holds several of that size."""

_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"BM": "BMP",
}
_ORIENTATION_OF_ROTATION = {0: 1, 90: 8, 180: 3, 270: 6}
"""Degrees counter-clockwise to the EXIF orientation with the same effect."""


class DecodeSettings(Settings):
    """Which pictures are usable, and how large they are kept."""

    max_pixels: int = Field(100_000_000, ge=1, le=MOST_PIXELS)
    """Pictures with more pixels than this are refused before they are decoded (decompression bombs). Pillow by itself
    refuses anything above 178,956,970: see `without_pillows_limit`."""
    min_side: int = Field(64, ge=1)
    """Pixels; pictures whose shorter side is smaller are rejected."""
    max_side: int | None = Field(None, ge=16)
    """Pixels; pictures whose longer side is longer are shrunk to it. null keeps every size."""


@dataclass(eq=False)
class Decoded:
    """A photograph ready for use, and what was done to it."""

    image: np.ndarray
    """(H, W, 3) uint8 RGB, upright: sRGB, or as ``profile`` says."""
    stored_size: tuple[int, int]
    """Width and height in pixels as stored in the file, before orientation and resizing."""
    orientation: int
    """EXIF orientation code (1 to 8) of what was applied; a rotation given by the source is expressed as one."""
    transform: str
    """What was done to the pixels, in order, such as ``icc-to-srgb; exif-transpose 6; resize 512x384``."""
    mended: list[tuple[str, str]] = field(default_factory=list)
    """(reason, message) of each unusual thing that was put right."""
    profile: bytes | None = None
    """ICC profile of the pixels, where they were asked for as they are stored and the file has a usable one."""

    def apply_orientation(self, mask: np.ndarray) -> np.ndarray:
        """Bring a mask (h, w) that was stored in the orientation of the file upright. Any size; not resized."""
        return orient(mask, self.orientation)


def decode_image(
    data: bytes, settings: DecodeSettings, *, rotation: int | None = None, keep_profile: bool = False
) -> Decoded:
    """Decode a photograph.

    Colours become sRGB, through the file's ICC profile where it has one (ICC.1:2022); without, or with one that is
    damaged or of other pixels, RGB and grey are taken to be sRGB, and CMYK is converted by rule of thumb.

    Args:
        data: the file's bytes: JPEG, PNG, WEBP, TIFF, BMP or GIF (of animations the first frame).
        settings: limits of size.
        rotation: degrees counter-clockwise (0, 90, 180, 270) that bring the stored pixels upright; EXIF is
            then ignored, as OpenImages' Rotation column demands. None: the EXIF orientation is applied.
        keep_profile: leave RGB pixels with an RGB profile exactly as they are stored, and give the profile.

    Raises:
        Rejected: ``empty-file``, ``not-an-image``, ``truncated-image``, ``decompression-bomb``, ``too-small``
            or ``undecodable-image``.
    """
    with opened(data, PHOTO_FORMATS, settings.max_pixels) as picture:
        in_file = exif_orientation(picture)
        # Pillow turns TIFF pictures upright by itself while it loads them.
        turned = in_file if picture.format == "TIFF" else 1
        stored = _turned_size(picture.size, turned)
        if min(stored) < settings.min_side:
            raise Rejected(
                "too-small", f"{stored[0]}x{stored[1]} pixels; the shorter side must be {settings.min_side} at least"
            )
        target = _target_size(stored, settings.max_side)
        if target != stored:
            picture.draft(None, target)  # JPEG: decode at 1/2, 1/4 or 1/8 where that is still large enough
        mended: list[tuple[str, str]] = []
        opaque = _opaque(picture, data, mended)
        managed, profile = _managed(opaque, picture, data, keep_profile, mended)
        pixels = np.asarray(managed)
        target = _turned_size(target, turned)
        if (pixels.shape[1], pixels.shape[0]) != target:
            pixels = cv2.resize(pixels, target, interpolation=cv2.INTER_AREA)

        steps = ["icc-to-srgb"] if any(reason == "converted-colours" for reason, _ in mended) else []
        if rotation is None:
            orientation = in_file
            if orientation != 1:
                steps.append(f"exif-transpose {orientation}")
                mended.append(("exif-rotation", f"EXIF orientation {orientation} was applied to the pixels"))
        else:
            orientation = _ORIENTATION_OF_ROTATION[rotation]
            if rotation:
                steps.append(f"rotate {rotation}")
        image = np.ascontiguousarray(orient(undo_orientation(pixels, turned), orientation))
        if image.shape[0] * image.shape[1] != stored[0] * stored[1]:
            steps.append(f"resize {image.shape[1]}x{image.shape[0]}")
    return Decoded(image, stored, orientation, "; ".join(steps), mended, profile)


def at_size(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture (H, W, 3) uint8 at another size: area averages where a side shrinks, linear where both grow."""
    shrinks = picture.shape[0] > height or picture.shape[1] > width
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def read_orientation(data: bytes, max_pixels: int) -> tuple[tuple[int, int], int]:
    """Stored size (width, height) and EXIF orientation (1 to 8) of a photograph, without decoding its pixels.

    Raises:
        Rejected: as `decode_image`.
    """
    with opened(data, PHOTO_FORMATS, max_pixels) as picture:
        orientation = exif_orientation(picture)
        return _turned_size(picture.size, orientation if picture.format == "TIFF" else 1), orientation


def orient(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels (h, w, ...) upright as EXIF orientation 1 to 8 says; a view, not a copy.

    Table 5 of the EXIF 2.32 specification, tag 274 (Orientation).
    """
    match orientation:
        case 2:
            return array[:, ::-1]
        case 3:
            return array[::-1, ::-1]
        case 4:
            return array[::-1]
        case 5:
            return array.swapaxes(0, 1)
        case 6:
            return array.swapaxes(0, 1)[:, ::-1]
        case 7:
            return array.swapaxes(0, 1)[::-1, ::-1]
        case 8:
            return array.swapaxes(0, 1)[::-1]
        case _:
            return array


def orient_points(points: np.ndarray, orientation: int) -> np.ndarray:
    """Points (n, 2), x and y in 0..1 of a picture as stored, in 0..1 of the picture that `orient` turns upright."""
    x, y = points[:, 0], points[:, 1]
    if orientation >= 5:
        x, y = y, x
    if orientation in (2, 3, 6, 7):
        x = 1 - x
    if orientation in (3, 4, 7, 8):
        y = 1 - y
    return np.stack([x, y], axis=1)


def undo_orientation(array: np.ndarray, orientation: int) -> np.ndarray:
    """The inverse of `orient`: upright pixels (h, w, ...) as a file with that EXIF orientation stores them."""
    return orient(array, {6: 8, 8: 6}.get(orientation, orientation))


@contextmanager
def without_pillows_limit() -> Iterator[None]:
    """Let Pillow read pictures of any size: ours is the only limit. Holds for the whole process, not for one thread."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def opened(data: bytes, formats: tuple[str, ...], max_pixels: int) -> Iterator[Image.Image]:
    """Open a picture whose header is sound and whose size is allowed; name whatever goes wrong inside the block."""
    if not data:
        raise Rejected("empty-file", "the file has 0 bytes")
    kind = _kind(data)
    if kind not in formats:
        found = kind or f"its first bytes are {data[:8]!r}"
        raise Rejected("not-an-image", f"not a {', '.join(formats[:-1])} or {formats[-1]} file ({found})")
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as picture:
            if picture.width * picture.height > max_pixels:
                raise Rejected(
                    "decompression-bomb",
                    f"{picture.width}x{picture.height} pixels; at most {max_pixels} are decoded",
                )
            yield picture
    except (Rejected, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejected("decompression-bomb", str(error)) from None
    except Exception as error:  # Pillow's parsers raise whatever they stumble over: struct.error, KeyError, zlib.error
        if isinstance(error, MemoryError) or not _is_of_pillow(error):
            raise
        if "truncated" in str(error).lower() or _is_cut(data, kind):
            why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
            raise Rejected("truncated-image", f"the {kind} file ends early, after {len(data)} bytes{why}") from None
        if isinstance(error, UnidentifiedImageError):  # whose text names an address in memory
            raise Rejected(
                "undecodable-image",
                f"the {kind} file's header is damaged, or of a kind that is not read, such as numbers of 32 bits: "
                "save it anew, with 8 or 16 bits a channel",
            ) from None
        raise Rejected("undecodable-image", f"the {kind} file is damaged: {error or type(error).__name__}") from None


def _is_of_pillow(error: Exception) -> bool:
    """Whether an exception came out of Pillow: one of our own code's is no fault of the picture."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name == "PIL" or name.startswith("PIL.") for name in names)


def _kind(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for signature, name in _SIGNATURES.items() if data.startswith(signature)), "")


def _is_cut(data: bytes, kind: str) -> bool:
    """Whether a file that could not be read lacks its end."""
    match kind:
        case "JPEG":
            return b"\xff\xd9" not in data[-64:]
        case "PNG":
            return b"IEND" not in data[-64:]
        case "GIF":
            return not data.endswith(b";")
        case "WEBP":
            return len(data) < 12 or len(data) < 8 + struct.unpack("<I", data[4:8])[0]
        case "BMP":
            return len(data) < 6 or len(data) < struct.unpack("<I", data[2:6])[0]
    return False


def exif_orientation(picture: Image.Image) -> int:
    """EXIF orientation (1 to 8) of an open picture; 1 where there is none or it is damaged."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF beside sound pixels: Pillow raises anything from SyntaxError to struct.error
        return 1
    # It may be stored as a fraction, which equals a whole number and is none.
    return next((number for number in range(1, 9) if orientation == number), 1)


def _turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if orientation >= 5 else size


def _target_size(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    if max_side is None or max(size) <= max_side:
        return size
    scale = max_side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _opaque(picture: Image.Image, data: bytes, mended: list[tuple[str, str]]) -> Image.Image:
    """Load the pixels and bring them to 8 bits, no transparency, and mode RGB, L, CMYK or LAB; notes what was done."""
    kind, mode = picture.format, picture.mode
    if kind in ("GIF", "PNG", "WEBP", "TIFF") and getattr(picture, "is_animated", False):
        mended.append(("first-frame", f"the {kind} file holds several frames; the first is used"))
    picture.load()
    if mode in ("I", "F"):
        raise Rejected("undecodable-image", f"32-bit {kind} pictures have no known range of brightness")
    if (bits := _bits(picture, data)) > 8:
        mended.append(("converted-16-bit", f"{bits} bits a channel were reduced to 8 (mode {mode})"))
    if mode in ("P", "PA"):
        mended.append(("converted-palette", "palette colours were expanded to RGB"))
    grey = mode in ("1", "L", "LA", "La") or mode.startswith("I;16")
    if grey:
        mended.append(("converted-gray", f"a single channel was repeated for red, green and blue (mode {mode})"))
    if mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(picture), picture, bits))
    if picture.has_transparency_data:
        mended.append(("converted-alpha", "transparency was composited on white"))
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture.convert("RGBA"))
        picture = white
    if mode in ("CMYK", "LAB"):
        return picture
    return picture.convert("L" if grey else "RGB")


def _eight_bits(values: np.ndarray, picture: Image.Image, bits: int) -> np.ndarray:
    """Grey levels of more than 8 bits as (h, w) uint8. TIFF may have 12 bits, and white for 0, which Pillow leaves so
    (PhotometricInterpretation: https://www.loc.gov/preservation/digital/formats/content/tiff_tags.shtml)."""
    white = 2 ** (bits if picture.format == "TIFF" else 16) - 1
    levels = ((values.astype(np.uint32) * 255 + white // 2) // white).clip(max=255).astype(np.uint8)
    inverted = picture.format == "TIFF" and picture.tag_v2.get(262) == 0  # type: ignore[attr-defined]
    return 255 - levels if inverted else levels


def _managed(
    opaque: Image.Image, picture: Image.Image, data: bytes, keep_profile: bool, mended: list[tuple[str, str]]
) -> tuple[Image.Image, bytes | None]:
    """The pixels of a picture as RGB, and their profile where it is not sRGB; notes what was done.

    Args:
        opaque: what `_opaque` made of ``picture``.
    """
    if opaque.mode == "LAB":
        mended.append(("converted-colours", "its colours were converted from L*a*b* to sRGB"))
        return lab_to_srgb(opaque), None
    profile, given = None, picture.info.get("icc_profile")
    if given:
        try:
            profile = Profile(given, opaque.mode)
        except ValueError as error:
            mended.append(("unusable-profile", f"its ICC profile is left out and cannot be followed: {error}"))
    elif where := unmanaged(picture, data):
        mended.append(("unmanaged-colours", f"{where} says that its colours are not sRGB; they were taken for sRGB"))
    if opaque.mode == "CMYK":
        how = "without a profile, so that colours are not exact" if profile is None else "through its profile"
        mended.append(("converted-cmyk", f"CMYK was converted to RGB {how}"))
    if profile is None:
        return opaque.convert("RGB"), None
    if keep_profile and opaque.mode == "RGB":
        return opaque, profile.data
    if profile.is_srgb:
        return opaque, None
    mended.append(("converted-colours", f"its colours were converted to sRGB from {profile.name}"))
    return profile.to_srgb(opaque), None


def _bits(picture: Image.Image, data: bytes) -> int:
    """Bits of a channel as the file stores it; Pillow reads most files of 16 as if they had 8."""
    if picture.format == "PNG":
        return data[24]  # of its first chunk, IHDR
    if picture.format == "TIFF":
        return max(picture.tag_v2.get(258, (8,)))  # type: ignore[attr-defined]  # BitsPerSample
    return 16 if picture.mode.startswith("I;16") else 8
