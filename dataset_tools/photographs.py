"""One photograph with the people in it, upright and of one size, as whatever works on single photographs wants it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from dataset_tools.errors import Rejected
from dataset_tools.images import MOST_PIXELS, PHOTO_FORMATS, Decoded, DecodeSettings, decode_image, opened, orient
from dataset_tools.metadata import Metadata, read_metadata
from dataset_tools.photo_masks import FoundMask, PhotoMasks, upright_turn

TOLD = (
    "converted-16-bit",
    "converted-alpha",
    "converted-cmyk",
    "converted-colours",
    "first-frame",
    "unmanaged-colours",
    "unusable-profile",
)
"""What `decode_image` mends and what the owner of a photograph should hear of: the result cannot hold it."""


@dataclass(eq=False)
class Photograph:
    """A decoded photograph."""

    image: np.ndarray
    """(H, W, 3) uint8 RGB, upright."""
    people: list[np.ndarray]
    """(H, W) bool each, one at least, none of them empty."""
    numbers: list[int]
    """Of the people, from 1, each: those who cannot be used have a number as well."""
    unusable: dict[int, str]
    """Why the others cannot be used, by their numbers."""
    icc_profile: bytes | None
    """What the RGB values mean, where it is not sRGB or the file says that it is."""
    metadata: Metadata
    """What the result may say on beside its pixels."""
    notes: list[str]
    """What its owner should know about how photograph and masks were read."""
    doubt: str = ""
    """Why the numbers may be others, where a row of a json may be one of its people."""


def read_photograph(path: Path, name: str, masks: PhotoMasks) -> Photograph:
    """Read a photograph and the masks of its people.

    RGB pixels are those of the file, to be understood by its profile; CMYK, grey and L*a*b* ones with a profile become
    sRGB. The photograph may be as large as `MOST_PIXELS`, if Pillow lets it: see `without_pillows_limit`.

    Args:
        path: the file.
        name: by which ``masks`` know it.
        masks: must have the photograph's size, upright or as its file stores it.

    Raises:
        Rejected: as `read_file`; as `decode_image`, for photograph or mask; ``no-mask``, ``not-a-mask``,
            ``ambiguous-masks``, ``empty-mask``, ``mask-size``. The message names the mask that is meant.
    """
    data = read_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged EXIF
        decoded = decode_image(data, DecodeSettings(min_side=1, max_pixels=MOST_PIXELS), keep_profile=True)
        same_colours = all(reason != "converted-colours" for reason, _ in decoded.mended)
        with opened(data, PHOTO_FORMATS, MOST_PIXELS) as picture:
            metadata, left_out = read_metadata(picture, orientation=decoded.orientation, same_colours=same_colours)
    of_it = list(masks.of(name))
    found = [one for one in of_it if not one.doubtful]
    doubts = [one.mask.message for one in of_it if one.doubtful and isinstance(one.mask, Rejected)]
    if not found:
        stem = PurePosixPath(name).with_suffix("")
        raise Rejected(
            "no-mask",
            f"no mask marks a person in it; looked for {stem}.png, {stem}_0.png ... and {stem}/*.png, or for the "
            f"file_name {name} in a COCO json",
        )
    # A broken row of a json costs one person; a broken file may hold anybody.
    unusable = {
        number: one.mask.message
        for number, one in enumerate(found, start=1)
        if one.kind == "rle" and isinstance(one.mask, Rejected)
    }
    numbers = [number for number in range(1, len(found) + 1) if number not in unusable]
    if not numbers:
        raise Rejected("no-mask", f"none of its people can be used: {unusable[1]}")
    people = [_upright_mask(found[number - 1], decoded) for number in numbers]
    notes = [message for reason, message in decoded.mended if reason in TOLD]
    if left_out:
        notes.append(f"not taken over from its metadata: {', '.join(left_out)}")
    notes += [f"{one.where}: {one.note}" for one in found if one.note]
    doubt = doubts[0] if doubts else ""
    return Photograph(decoded.image, people, numbers, unusable, decoded.profile, metadata, notes, doubt)


def read_file(path: Path) -> bytes:
    """A file's bytes. Raises `Rejected` with ``not-found`` or ``read-failed``."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Rejected("not-found", "there is no such file") from None
    except OSError as error:
        raise Rejected("read-failed", f"it cannot be read: {error.strerror}") from None


def _upright_mask(found: FoundMask, decoded: Decoded) -> np.ndarray:
    """(H, W) bool of the upright photograph's size."""
    where = f"mask {found.where}" if found.kind == "png" else f"the mask of annotation {found.id}"
    mask = found.mask
    if isinstance(mask, Rejected):
        raise Rejected(mask.reason, f"{where}: {mask.message}")
    if not mask.any():
        raise Rejected("empty-mask", f"{where} is empty: no pixel belongs to a person")
    upright = orient(mask, upright_turn(mask.shape, found.orientation, decoded.stored_size, decoded.orientation))
    height, width = decoded.image.shape[:2]
    if upright.shape != (height, width):
        raise Rejected(
            "mask-size",
            f"{where} is {mask.shape[1]}x{mask.shape[0]} pixels, the photo {width}x{height}; they must agree",
        )
    return np.ascontiguousarray(upright)
