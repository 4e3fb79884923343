"""A picture taken apart into background and people, and put together again (eq. 2, with z-order)."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field

from dataset_tools.errors import UserError
from dataset_tools.folders import folder_written_whole
from dataset_tools.metadata import Metadata, read_metadata
from dataset_tools.settings import Settings
from mild.erasing.regions import MARGIN, editable

INDEX = "layers.json"


class LayersIndex(Settings):
    """What ``layers.json`` of a saved picture says."""

    version: Literal[1] = 1
    """Of this folder's format."""
    height: int = Field(ge=1)
    """Of all its pictures, in pixels."""
    width: int = Field(ge=1)
    """Of all its pictures, in pixels."""
    order: tuple[str, ...]
    """File names of the layers, from back to front; ``layer-01.png`` is the first person."""
    margin: float = Field(ge=0)
    """How far beyond people's masks they were painted out: see `mild.erasing.regions.editable`."""


def visible(masks: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """The part of each person that nobody in front covers.

    Args:
        masks: (N, H, W) bool.
        order: the N indices from back to front.

    Returns:
        (N, H, W) bool, pairwise disjoint; together they cover what the masks cover.

    Raises:
        ValueError: ``order`` does not name everyone once.
    """
    if sorted(order) != list(range(len(masks))):
        raise ValueError(f"order is {tuple(order)}, expected each of 0 to {len(masks) - 1} once")
    seen = np.zeros_like(masks)
    covered = np.zeros(masks.shape[1:], bool)
    for index in reversed(order):
        seen[index] = masks[index] & ~covered
        covered |= masks[index]
    return seen


@dataclass(eq=False)
class LayeredPicture:
    """A photo, the same without people, and each person for themselves.

    Raises:
        ValueError: sizes, types or order do not fit together.
    """

    original: np.ndarray
    """(H, W, 3) uint8 RGB."""
    background: np.ndarray
    """(H, W, 3) uint8 RGB: people painted out within ``painted``, elsewhere as ``original``."""
    painted: np.ndarray
    """(H, W) bool."""
    layers: np.ndarray
    """(N, H, W, 4) uint8 RGBA, not premultiplied. Alpha from 128 on is the person's mask, also where it is known to go
    on behind somebody else; colours are the original's where visible, generated where hidden. What is completed must
    lie behind those in front: elsewhere it would count as seen in the original."""
    order: tuple[int, ...]
    """Indices of the people from back to front."""
    margin: float = MARGIN
    """Of `mild.erasing.regions.editable`, as people were painted out with."""
    icc_profile: bytes | None = None
    """What the RGB values of all pictures mean, where it is not sRGB or the photograph says that it is."""
    metadata: Metadata = field(default_factory=Metadata)
    """Of the original."""

    def __post_init__(self) -> None:
        height, width = self.original.shape[:2]
        shapes = {
            "original": (height, width, 3),
            "background": (height, width, 3),
            "painted": (height, width),
            "layers": (len(self.layers), height, width, 4),
        }
        for name, shape in shapes.items():
            array, dtype = getattr(self, name), np.bool_ if name == "painted" else np.uint8
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name} is {array.dtype} of {array.shape}, expected {np.dtype(dtype)} of {shape}")
        if sorted(self.order) != list(range(len(self.layers))):
            raise ValueError(f"order is {self.order}, expected each of 0 to {len(self.layers) - 1} once")

    def recompose(self, keep: Sequence[int]) -> np.ndarray:
        """The picture with some of its people: eq. 2, where masks overlap decided by the order.

        Where `changed` is False, the original; elsewhere the background, overlaid by the people kept from back to
        front.

        Args:
            keep: indices of the people who stay, in any order; all of them give the original.

        Returns:
            (H, W, 3) uint8.

        Raises:
            UserError: as `changed`.
        """
        changed = self.changed(keep)
        result = self.original.copy()
        colours = self.background[changed].astype(np.float32)
        for index in self.order:
            if index in keep:
                layer = self.layers[index][changed].astype(np.float32)
                colours += layer[:, 3:] / 255 * (layer[:, :3] - colours)
        result[changed] = np.rint(colours)
        return result

    def changed(self, keep: Sequence[int]) -> np.ndarray:
        """Which pixels may differ from the original when only ``keep`` stay.

        The editable area (`mild.erasing.regions.editable`) of what is seen of those who go, less what is seen of those
        who stay.

        Returns:
            (H, W) bool.

        Raises:
            UserError: an index is out of range or given twice, or somebody who goes was not painted out in
                ``background``.
        """
        people = len(self.layers)
        for place, index in enumerate(keep):
            if not 0 <= index < people:
                raise UserError(f"there is no person {index + 1} (index {index}) to keep: the picture has {people}")
            if index in keep[:place]:
                raise UserError(f"person {index + 1} (index {index}) is to be kept twice: name each once")
        seen = visible(self.layers[..., 3] >= 128, self.order)
        fixed = seen[list(keep)].any(0)
        area = np.zeros_like(fixed)
        for index in range(people):
            if index not in keep:
                freed = editable(seen, [index], self.margin) & ~fixed
                if (freed & ~self.painted).any():
                    raise UserError(f"person {index + 1} (index {index}) was not painted out: erase with layers=True")
                area |= freed
        return area

    def save(self, folder: str | Path) -> None:
        """Write a folder of lossless PNG files that image editors open, replacing what was there as a whole.

        ``original.png``, ``background.png``, ``painted.png`` (white where painted), ``layer-01.png`` and so on (RGBA,
        full size) and ``layers.json`` (`LayersIndex`). Pictures in colour have the original's ICC profile and
        resolution; its other metadata are in ``original.png``. Where ``folder`` is a link, what it leads to is
        replaced.

        Raises:
            UserError: ``folder`` is a file, or cannot be written, as where the disk is full.
        """
        height, width = self.painted.shape
        names = _layer_names(len(self.layers))
        index = LayersIndex(height=height, width=width, order=tuple(names[k] for k in self.order), margin=self.margin)
        pictures = {"original.png": self.original, "background.png": self.background, "painted.png": self.painted}
        pictures |= dict(zip(names, self.layers, strict=True))
        resolution = Metadata(dpi=self.metadata.dpi)
        with folder_written_whole(folder, INDEX) as place:
            try:
                for name, picture in pictures.items():
                    metadata = self.metadata if picture is self.original else resolution
                    # A mask has no colours; PNG allows no RGB profile beside grey.
                    profile = None if picture is self.painted else self.icc_profile
                    (place / name).write_bytes(_encoded(picture, icc_profile=profile, **metadata.save_options("PNG")))
                text = json.dumps(index.model_dump(mode="json"), indent=2) + "\n"
                (place / INDEX).write_text(text, encoding="utf-8")
            except OSError as error:
                raise UserError(f"{folder} cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote, also after its pictures went through an image editor.

        Raises:
            UserError: a file is missing, broken, of another size, or a layer has lost its transparency.
        """
        place = Path(folder)
        index = _read_index(place / INDEX)
        names = _layer_names(len(index.order))
        size = index.width, index.height
        layers = np.empty((len(names), index.height, index.width, 4), np.uint8)
        for layer, name in zip(layers, names, strict=True):
            layer[:] = _read_picture(place / name, "RGBA", size)
        icc_profile, metadata = _read_colours_and_metadata(place / "original.png")
        return cls(
            original=_read_picture(place / "original.png", "RGB", size),
            background=_read_picture(place / "background.png", "RGB", size),
            painted=_read_picture(place / "painted.png", "L", size) >= 128,
            layers=layers,
            order=tuple(names.index(name) for name in index.order),
            margin=index.margin,
            icc_profile=icc_profile,
            metadata=metadata,
        )


def _layer_names(people: int) -> list[str]:
    return [f"layer-{number:02d}.png" for number in range(1, people + 1)]


def _encoded(picture: np.ndarray, **options: Any) -> bytes:
    """A PNG. In memory: Pillow's own writing into a file does not say that the disk is full."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", **options)
    return buffer.getvalue()


def _read_index(path: Path) -> LayersIndex:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a folder of layers") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    index = LayersIndex.check(values, origin=str(path))
    names = _layer_names(len(index.order))
    if sorted(index.order) != sorted(names):
        raise UserError(f"{path}: order must name each of layer-01.png to {names[-1]} once")
    return index


def _read_picture(path: Path, mode: str, size: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if picture.size != size:
                raise UserError(f"{path} is {picture.width} x {picture.height}, but {INDEX} says {size[0]} x {size[1]}")
            if mode == "RGBA" and "A" not in picture.getbands() and "transparency" not in picture.info:
                raise UserError(f"{path} has no transparency: export it with an alpha channel")
            return np.array(picture.convert(mode))
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _read_colours_and_metadata(path: Path) -> tuple[bytes | None, Metadata]:
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.info.get("icc_profile"), read_metadata(picture, orientation=1, same_colours=True)[0]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
