"""One photograph with the people in it, upright and of one size, as whatever works on single photographs wants it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from dataset_tools.errors import Rejected
from dataset_tools.images import Decoded, DecodeSettings, decode_image
from dataset_tools.photo_masks import FoundMask, PhotoMasks, is_upright

LOSSY = ("converted-16-bit", "converted-alpha", "converted-cmyk", "first-frame")
"""What `decode_image` mends and what the owner of a photograph should hear of: 8-bit RGB cannot hold it."""


@dataclass(eq=False)
class Photograph:
    """A decoded photograph."""

    image: np.ndarray
    """(H, W, 3) uint8 RGB, upright."""
    people: list[np.ndarray]
    """(H, W) bool each, one at least, none of them empty."""
    icc_profile: bytes | None
    """What the RGB values mean, where the file says it."""
    notes: list[str]
    """What its owner should know about how photograph and masks were read."""


def read_photograph(path: Path, name: str, masks: PhotoMasks) -> Photograph:
    """Read a photograph and the masks of its people.

    Args:
        path: the file.
        name: by which ``masks`` know it.
        masks: must have the photograph's size, upright or as its file stores it.

    Raises:
        Rejected: ``not-found`` or ``read-failed``; as `decode_image`, for photograph or mask; ``no-mask``,
            ``empty-mask``, ``mask-size``. The message names the mask that is meant.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Rejected("not-found", "there is no such file") from None
    except OSError as error:
        raise Rejected("read-failed", f"it cannot be read: {error.strerror}") from None
    decoded = decode_image(data, DecodeSettings(min_side=1))
    found = list(masks.of(name))
    if not found:
        stem = PurePosixPath(name).with_suffix("")
        raise Rejected(
            "no-mask",
            f"no mask marks a person in it; looked for {stem}.png, {stem}_0.png ... and {stem}/*.png, or for the "
            f"file_name {name} in a COCO json",
        )
    people = [_upright_mask(one, decoded) for one in found]
    notes = [message for reason, message in decoded.mended if reason in LOSSY]
    values = [one.number for one in found if one.number]
    if values not in ([], list(range(1, len(values) + 1)), [255]):
        notes.append(f"{found[0].where}: people 1 to {len(values)} are its values {', '.join(map(str, values))}")
    return Photograph(decoded.image, people, _rgb_profile(data), notes)


def _upright_mask(found: FoundMask, decoded: Decoded) -> np.ndarray:
    """(H, W) bool of the upright photograph's size."""
    where = f"mask {found.where}" if found.kind == "png" else f"the mask of annotation {found.id}"
    mask = found.mask
    if isinstance(mask, Rejected):
        raise Rejected(mask.reason, f"{where}: {mask.message}")
    if not mask.any():
        raise Rejected("empty-mask", f"{where} is empty: no pixel belongs to a person")
    upright = mask
    if not is_upright(mask, decoded.stored_size, decoded.orientation):
        upright = decoded.apply_orientation(mask)
    height, width = decoded.image.shape[:2]
    if upright.shape != (height, width):
        raise Rejected(
            "mask-size",
            f"{where} is {mask.shape[1]}x{mask.shape[0]} pixels, the photo {width}x{height}; they must agree",
        )
    return np.ascontiguousarray(upright)


def _rgb_profile(data: bytes) -> bytes | None:
    """The file's ICC profile if it is one of RGB (bytes 16 to 19 of the profile's header, ICC.1:2022 table 17)."""
    with Image.open(io.BytesIO(data)) as picture:
        profile = picture.info.get("icc_profile")
    return profile if isinstance(profile, bytes) and profile[16:20] == b"RGB " else None
