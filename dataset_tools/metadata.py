"""What a photograph's file says beside its pixels, and what of that a picture made from it may say on.

Kept are the resolution for print and EXIF tags of an allow-list: who took the picture, when, of what, and how. Left out
is what tells where somebody was, what belongs to whom, or what the picture looked like before: position, serial numbers
and owner's name, maker notes, thumbnails, and blocks that can hold any of these (XMP, IPTC, comments).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image

_DESCRIBED = "ImageDescription Make Model Software DateTime Artist Copyright"
_TAKEN = """
    DateTimeOriginal DateTimeDigitized OffsetTime OffsetTimeOriginal OffsetTimeDigitized SubsecTime SubsecTimeOriginal
    SubsecTimeDigitized ExposureTime FNumber ExposureProgram ISOSpeedRatings SensitivityType ShutterSpeedValue
    ApertureValue BrightnessValue ExposureBiasValue MaxApertureValue SubjectDistance MeteringMode LightSource Flash
    FocalLength FocalLengthIn35mmFilm ExposureMode WhiteBalance DigitalZoomRatio SceneCaptureType LensSpecification
    LensMake LensModel ColorSpace
"""
KEPT = frozenset(int(ExifTags.Base[name]) for name in (_DESCRIBED + _TAKEN).split())
"""EXIF tags that are kept (EXIF 2.32, tables 3 and 5 to 8)."""
LONGEST = 2000
"""Letters or bytes of a tag's value: longer ones are left out. All of a JPEG's EXIF must fit into 64 KB."""
_SECRET = {
    "serial numbers": ("BodySerialNumber", "LensSerialNumber", "CameraSerialNumber", "ImageUniqueID"),
    "the owner's name": ("CameraOwnerName",),
    "maker notes": ("MakerNote", "MakerNoteSafety", "DNGPrivateData"),
    "comments": ("UserComment", "XPComment", "XPTitle", "XPAuthor", "XPKeywords", "XPSubject"),
}
_BLOCKS = {"xmp": "XMP", "XML:com.adobe.xmp": "XMP", "photoshop": "IPTC and Photoshop data", "comment": "comments"}
"""Keys of Pillow's ``info``."""
_TIFF_BLOCKS = {700: "XMP", 33723: "IPTC and Photoshop data", 34377: "IPTC and Photoshop data"}


@dataclass(frozen=True)
class Metadata:
    """What a picture made from a photograph says beside its pixels."""

    exif: Image.Exif | None = None
    """Tags of `KEPT`, orientation 1; None where there are none."""
    dpi: tuple[float, float] | None = None
    """Pixels an inch, across and down, of the upright picture."""

    def save_options(self, kind: str) -> dict[str, Any]:
        """What Pillow's ``save`` is to be told for a format, such as PNG; nothing for those that can hold nothing."""
        options: dict[str, Any] = {}
        if self.dpi is not None and kind in ("PNG", "JPEG", "TIFF", "BMP"):
            options["dpi"] = self.dpi
        exif = Image.Exif()
        if self.exif is not None:
            exif.update(self.exif)
            if taken := self.exif.get_ifd(ExifTags.IFD.Exif):
                exif.get_ifd(ExifTags.IFD.Exif).update(taken)
                exif[ExifTags.IFD.Exif] = taken  # without which the writer of TIFF does not look for it
        if self.dpi is not None and kind == "WEBP":  # which has no other place for it
            exif[ExifTags.Base.XResolution], exif[ExifTags.Base.YResolution] = self.dpi
            exif[ExifTags.Base.ResolutionUnit] = 2  # inch
        if exif and kind in ("PNG", "JPEG", "TIFF", "WEBP"):
            options["exif"] = exif if kind == "TIFF" else exif.tobytes()
        return options


def read_metadata(picture: Image.Image, *, orientation: int, same_colours: bool) -> tuple[Metadata, list[str]]:
    """What may be kept of an open photograph's metadata, and the names of what is left out. Raises nothing.

    Args:
        picture: as Pillow opened it; it need not be loaded.
        orientation: EXIF orientation (1 to 8) that was applied to its pixels.
        same_colours: False where its colours were converted, so that what EXIF says of them no longer holds.
    """
    left_out: dict[str, None] = {}
    for key, what in _BLOCKS.items():
        if picture.info.get(key):
            left_out[what] = None
    texts = getattr(picture, "text", None) if picture.format == "PNG" else None
    if texts and any(key != "XML:com.adobe.xmp" for key in texts):
        left_out["comments"] = None
    exif: Image.Exif | None = None
    resolution = None
    try:
        exif, resolution = _read_exif(picture, left_out, same_colours)
    except Exception:  # damaged EXIF: Pillow raises anything from SyntaxError to struct.error
        left_out["EXIF, which is damaged"] = None
    dpi = checked_dpi(picture.info.get("dpi") or resolution)
    if dpi is not None and orientation >= 5:
        dpi = dpi[::-1]
    return Metadata(exif, dpi), list(left_out)


def _read_exif(
    picture: Image.Image, left_out: dict[str, None], same_colours: bool
) -> tuple[Image.Exif | None, tuple[Any, Any] | None]:
    stored = picture.getexif()
    taken = stored.get_ifd(ExifTags.IFD.Exif)
    if stored.get_ifd(ExifTags.IFD.GPSInfo):
        left_out["the position (GPS)"] = None
    if stored.get_ifd(ExifTags.IFD.IFD1):
        left_out["the thumbnail"] = None
    for what, names in _SECRET.items():
        if any(ExifTags.Base[name] in tags for name in names for tags in (stored, taken)):
            left_out[what] = None
    for tag, what in _TIFF_BLOCKS.items():
        if tag in stored:
            left_out[what] = None
    kept = Image.Exif()
    for source, target in ((stored, kept), (taken, kept.get_ifd(ExifTags.IFD.Exif))):
        for tag, value in source.items():
            if tag not in KEPT or (tag == ExifTags.Base.ColorSpace and not same_colours):
                continue
            if isinstance(value, str) and target is kept:  # read as Latin-1; Pillow would write ASCII
                value = value.encode("latin-1", "replace")
            if _can_be_written(tag, value):
                target[tag] = value
            else:
                left_out[f"EXIF {ExifTags.Base(tag).name}"] = None
    if ExifTags.Base.Orientation in stored and _holds_something(kept):
        kept[ExifTags.Base.Orientation] = 1  # pixels are upright
    per_inch = {2: 1.0, 3: 2.54}.get(stored.get(ExifTags.Base.ResolutionUnit, 2))
    across, down = stored.get(ExifTags.Base.XResolution), stored.get(ExifTags.Base.YResolution)
    found = kept if _holds_something(kept) else None
    if per_inch is None or across is None or down is None:
        return found, None
    return found, (float(across) * per_inch, float(down) * per_inch)


def _holds_something(exif: Image.Exif) -> bool:
    return bool(exif) or bool(exif.get_ifd(ExifTags.IFD.Exif))


def _can_be_written(tag: int, value: Any) -> bool:
    """Whether Pillow can write a tag as it read it: cameras write any type of value under any tag."""
    if isinstance(value, bytes | str) and len(value) > LONGEST:
        return False
    trial = Image.Exif()
    try:
        trial.get_ifd(ExifTags.IFD.Exif)[tag] = value
        trial[tag] = value
        return len(trial.tobytes()) < 2 * LONGEST + 1000
    except Exception:  # struct.error, TypeError, OverflowError, ...
        return False


def checked_dpi(dpi: Any) -> tuple[float, float] | None:
    """A resolution that every format can hold; None where it is none."""
    try:
        across, down = float(dpi[0]), float(dpi[1])
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        return None
    sound = all(math.isfinite(value) and 1 <= value < 65536 for value in (across, down))
    return (across, down) if sound else None
