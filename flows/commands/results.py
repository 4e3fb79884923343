"""Where the results of erasing go, and how they are saved: a file of any of the usual formats, whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from dataset_tools.colours import Profile
from dataset_tools.errors import UserError
from dataset_tools.metadata import Metadata
from dataset_tools.photo_masks import PHOTO_SUFFIXES
from dataset_tools.storage import written_whole

SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"lossless": True},
}
"""What Pillow is told for a suffix."""

LONGEST_SIDE = {"WEBP": 16_383, "JPEG": 65_500, "GIF": 65_535}
"""Pixels; longer pictures cannot be saved in these formats (RFC 9649; libjpeg's and GIF's own limits)."""


def result_file(output: str) -> Path:
    """The file of one result. Raises `UserError` where it names a folder or no picture."""
    path = Path(output)
    if path.is_dir():
        raise UserError(f"--output {output} is a folder; name a file in it")
    if path.suffix.lower() not in PHOTO_SUFFIXES:
        raise UserError(f"--output {output}: name a file that ends in one of {', '.join(PHOTO_SUFFIXES)}")
    return path


def check_size(image: np.ndarray, target: Path) -> None:
    """Raise `UserError` where the format of ``target`` holds no picture, (H, W, 3), that large."""
    kind = _format_of(target)
    if max(image.shape) > (longest := LONGEST_SIDE.get(kind, max(image.shape))):
        raise UserError(f"{target}: {kind} holds {longest} pixels a side; name a PNG or TIFF")


def check_free(results: Sequence[Path], force: bool) -> None:
    """Raise `UserError` where a result is there already, unless it may be overwritten."""
    there = [result for result in results if exists(result)]
    if there and not force:
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise UserError(f"{there[0]} exists already{more}; --force overwrites it")


def exists(path: Path) -> bool:
    """Whether something is there; raises nothing for names that are too long, unlike `Path.exists`."""
    return os.path.exists(path)


def _format_of(target: Path) -> str:
    return Image.registered_extensions()[target.suffix.lower()]


def encoded(image: np.ndarray, target: Path, icc_profile: bytes | None, metadata: Metadata) -> tuple[bytes, str | None]:
    """A picture (H, W, 3) uint8 as a file; the suffix decides the format. Gives its bytes, and what was lost.

    Raises:
        UserError: the format cannot hold it.
    """
    kind, buffer, note = _format_of(target), io.BytesIO(), None
    picture = Image.fromarray(image)
    if kind in ("BMP", "GIF") and icc_profile is not None:
        try:
            profile = Profile(icc_profile, "RGB")
        except ValueError as error:  # of layers that went through an image editor
            raise UserError(
                f"{target}: the colours cannot be converted for {kind}, their ICC profile: {error}"
            ) from None
        if not profile.is_srgb:
            picture = profile.to_srgb(picture)
            note = f"{kind} holds no ICC profile; all colours were converted to sRGB from {profile.name}"
        icc_profile = None
    options = {"icc_profile": icc_profile, **SAVE_OPTIONS.get(target.suffix.lower(), {}), **metadata.save_options(kind)}
    try:
        picture.save(buffer, kind, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{target} cannot be written: {error}") from None
    return buffer.getvalue(), note


def write_result(data: bytes, target: Path) -> None:
    """Write a file whole. Raises `UserError` where it cannot be written."""
    with result_written(data, target):
        pass


@contextlib.contextmanager
def result_written(data: bytes, target: Path) -> Iterator[None]:
    """Write a file that appears, whole, when the block has ended well: its room is taken before.

    Raises:
        UserError: it cannot be written.
    """
    elsewhere = False
    try:
        with written_whole(LocalFileSystem(), str(target.absolute())) as partial:
            partial.write_bytes(data)
            elsewhere = True
            yield
            elsewhere = False
    except OSError as error:
        if elsewhere:
            raise
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from error
