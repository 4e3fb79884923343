"""What the numbers of a picture mean: ICC profiles checked and followed, by littlecms through Pillow."""

from __future__ import annotations

import io
import struct
from functools import cached_property

import numpy as np
from PIL import ExifTags, Image, ImageCms

SPACES = {"RGB": b"RGB ", "L": b"GRAY", "CMYK": b"CMYK", "LAB": b"Lab "}
"""Pillow's modes, and what a profile's header calls them (bytes 16 to 19; ICC.1:2022, table 19)."""
SAME = 1
"""Of 255: a profile that moves no colour further than this from sRGB says sRGB."""


class Profile:
    """An ICC profile that fits the pixels that it came with.

    Args:
        data: the profile's bytes, or what Pillow found in their place.
        mode: Pillow's mode of the pixels: RGB, L or CMYK.

    Raises:
        ValueError: the profile is none, is damaged, or one of other pixels.
    """

    def __init__(self, data: object, mode: str) -> None:
        if not isinstance(data, bytes):  # Pillow takes whatever type a TIFF says that it has
            raise ValueError("it is no profile")
        space = data[16:20]
        if space != SPACES[mode]:
            called = space.decode("latin-1").strip() if space in SPACES.values() else "unknown"
            raise ValueError(f"it is one of {called} colours, the picture is {mode}")
        self.data = data
        self.mode = mode
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
            self._to_srgb = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
            name = ImageCms.getProfileDescription(profile)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
            raise ValueError(f"it is damaged ({error})") from None
        printable = "".join(letter if letter.isprintable() else " " for letter in name)
        self.name = " ".join(printable.split())[:60] or "an unnamed profile"
        """As the profile calls itself."""

    @cached_property
    def is_srgb(self) -> bool:
        """Whether its colours are sRGB's: to `SAME`, on a lattice of 9 x 9 x 9 colours."""
        if self.mode != "RGB":
            return False
        levels = np.linspace(0, 255, 9).round().astype(np.uint8)
        lattice = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        shown = np.asarray(self.to_srgb(Image.fromarray(lattice)))
        return bool(np.abs(shown.astype(int) - lattice).max() <= SAME)

    def to_srgb(self, picture: Image.Image) -> Image.Image:
        """A picture of the profile's mode as sRGB (mode RGB), by the perceptual intent, as browsers show it."""
        converted = ImageCms.applyTransform(picture, self._to_srgb)
        assert converted is not None
        return converted


def lab_to_srgb(picture: Image.Image) -> Image.Image:
    """A picture of mode LAB (CIE L*a*b*, D50) as sRGB."""
    transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    converted = ImageCms.applyTransform(picture, transform)
    assert converted is not None
    return converted


def unmanaged(picture: Image.Image, data: bytes) -> str | None:
    """Where a picture (open, and its file's bytes) without ICC profile names colours that are not sRGB; None: nowhere.

    PNG's chunks cICP, gAMA and cHRM (W3C PNG, third edition, section 11.3.2; sRGB overrules the last two), and the
    marks of Adobe RGB in a camera's EXIF (DCF 2.0: ColorSpace is not 1 and InteroperabilityIndex is R03).
    """
    if picture.format == "PNG":
        if coded := _png_chunk(data, b"cICP"):
            # Primaries and transfer of sRGB: 1 and 13 (ITU-T H.273).
            return None if coded[:2] == b"\x01\x0d" else "the PNG chunk cICP"
        if "srgb" in picture.info:
            return None
        gamma, primaries = picture.info.get("gamma"), picture.info.get("chromaticity")
        if gamma is not None and abs(gamma - 0.45455) > 0.01:
            return "the PNG chunk gAMA"
        srgb = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
        if primaries is not None and max(abs(a - b) for a, b in zip(primaries, srgb, strict=True)) > 0.01:
            return "the PNG chunk cHRM"
        return None
    try:
        exif = picture.getexif()
        interoperability = exif.get_ifd(ExifTags.IFD.Interop).get(1)
        space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
    except Exception:  # damaged EXIF: Pillow raises anything from SyntaxError to struct.error
        return None
    return "EXIF (Adobe RGB)" if space == 2 or (space != 1 and interoperability == "R03") else None


def _png_chunk(data: bytes, wanted: bytes) -> bytes | None:
    """The content of one of the chunks before the pixels (W3C PNG, section 5.3); Pillow does not give all of them."""
    place = 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        name = data[place + 4 : place + 8]
        if name == wanted:
            return data[place + 8 : place + 8 + length]
        if name == b"IDAT":
            break
        place += 12 + length
    return None
