"""A picture taken apart into background and people, and put together again (eq. 2, with z-order)."""

from __future__ import annotations

import io
import itertools
import json
import operator
import re
from collections.abc import Iterable, Sequence
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
from mild.erasing.regions import MARGIN, box_of, editable

INDEX = "layers.json"
OWN = r"layers\.json|(original|background|painted|seen|beyond|layer-\d{2,})\.png"
"""What `LayeredPicture.save` writes."""


class LayersIndex(Settings):
    """What ``layers.json`` of a saved picture says."""

    version: Literal[2] = 2
    """Of this folder's format."""
    height: int = Field(ge=1)
    """Of all its pictures, in pixels."""
    width: int = Field(ge=1)
    """Of all its pictures, in pixels."""
    order: tuple[str, ...]
    """File names of the layers, from back to front; ``layer-01.png`` is the first person."""
    margin: float = Field(ge=0)
    """How far beyond people's masks they were painted out: see `mild.erasing.regions.editable`."""


def seen_people(masks: Sequence[np.ndarray] | np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Whom each pixel shows: the person in front.

    Args:
        masks: N of (H, W) bool.
        order: indices of people from back to front; those whom it does not name are not there.

    Returns:
        (H, W) uint16: 0 nobody, k + 1 the person of index k.
    """
    seen = np.zeros(masks[0].shape, np.uint16)
    for index in order:
        seen[masks[index]] = index + 1
    return seen


def editable_of(seen: np.ndarray, people: Iterable[int], margin: float) -> np.ndarray:
    """(H, W) bool: `mild.erasing.regions.editable` of what ``seen``, as `seen_people` gives it, shows of people."""
    area = np.zeros(seen.shape, bool)
    for index in people:
        area |= editable([seen == index + 1], [0], margin)
    return area


@dataclass(frozen=True, eq=False)
class Layer:
    """A person, cut out of a picture; beyond its window it is transparent."""

    rows: slice
    """Of the picture."""
    columns: slice
    pixels: np.ndarray
    """(h, w, 4) uint8 RGBA, not premultiplied."""

    @classmethod
    def cut(cls, colours: np.ndarray, alpha: np.ndarray) -> Self:
        """What is not transparent of colours (H, W, 3) uint8 with an alpha (H, W) uint8; where it is, black."""
        there = alpha > 0
        rows, columns = (slice(*ends) for ends in box_of(there) or ((0, 0), (0, 0)))
        window = rows, columns
        pixels = np.dstack([np.where(there[window][..., None], colours[window], 0), alpha[window]])
        return cls(rows, columns, pixels)

    def whole(self, height: int, width: int) -> np.ndarray:
        """(H, W, 4) uint8 RGBA of the picture's size."""
        picture = np.zeros((height, width, 4), np.uint8)
        picture[self.rows, self.columns] = self.pixels
        return picture

    def lay_over(self, colours: np.ndarray, top: int, left: int) -> None:
        """Lay the person over colours (h, w, 3) float32 of the picture's window that begins at ``top`` and ``left``."""
        rows = slice(max(self.rows.start, top), min(self.rows.stop, top + colours.shape[0]))
        columns = slice(max(self.columns.start, left), min(self.columns.stop, left + colours.shape[1]))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        under = colours[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        own = np.s_[rows.start - self.rows.start : rows.stop - self.rows.start,
                    columns.start - self.columns.start : columns.stop - self.columns.start]  # fmt: skip
        over = self.pixels[own].astype(np.float32)
        under += over[..., 3:] / 255 * (over[..., :3] - under)


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
    seen: np.ndarray
    """(H, W) uint16: whom each pixel of the original shows, as `seen_people` says."""
    beyond: np.ndarray
    """(H, W) uint16: what of ``painted`` lies beyond all masks because the model took it for something that somebody
    left behind, such as their shadow; numbers as in ``seen``."""
    layers: list[Layer]
    """One a person: the original's colours where they are seen, painted ones where they go on behind others."""
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
        kinds: dict[str, tuple[tuple[int, ...], Any]] = {
            "original": ((height, width, 3), np.uint8),
            "background": ((height, width, 3), np.uint8),
            "painted": ((height, width), np.bool_),
            "seen": ((height, width), np.uint16),
            "beyond": ((height, width), np.uint16),
        }
        for name, (shape, dtype) in kinds.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name} is {array.dtype} of {array.shape}, expected {np.dtype(dtype)} of {shape}")
        for name in ("seen", "beyond"):
            if (most := int(getattr(self, name).max(initial=0))) > len(self.layers):
                raise ValueError(f"{name} names person {most}, but there are {len(self.layers)} layers")
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
        result = np.where(changed[..., None], self.background, self.original)
        if (box := box_of(changed)) is None:
            return result
        window = rows, columns = slice(*box[0]), slice(*box[1])
        # Colours are rounded once, also where several people who stay lie over each other.
        colours = result[window].astype(np.float32)
        for index in self.order:
            if index in keep:
                self.layers[index].lay_over(colours, rows.start, columns.start)
        result[window] = np.where(changed[window][..., None], np.rint(colours).astype(np.uint8), result[window])
        return result

    def changed(self, keep: Sequence[int]) -> np.ndarray:
        """Which pixels may differ from the original when only ``keep`` stay.

        The editable area (`mild.erasing.regions.editable`) of what is seen of those who go, and what else they left
        behind (``beyond``), less what is seen of those who stay.

        Returns:
            (H, W) bool.

        Raises:
            UserError: an index is out of range or given twice, or somebody who goes was not painted out in
                ``background``.
        """
        people, keep = len(self.layers), indices(keep, "keep")
        for place, index in enumerate(keep):
            if not 0 <= index < people:
                raise UserError(f"there is no person {index + 1} (index {index}) to keep: the picture has {people}")
            if index in keep[:place]:
                raise UserError(f"person {index + 1} (index {index}) is to be kept twice: name each once")
        stays = np.zeros(people + 1, bool)
        stays[[index + 1 for index in keep]] = True
        fixed, goes = stays[self.seen], ~stays
        goes[0] = False
        area = goes[self.beyond] & ~fixed
        for index in range(people):
            if index not in keep:
                freed = editable_of(self.seen, [index], self.margin) & ~fixed
                if (freed & ~self.painted).any():
                    raise UserError(f"person {index + 1} (index {index}) was not painted out: erase with layers=True")
                area |= freed
        return area

    def save(self, folder: str | Path) -> None:
        """Write a folder of lossless PNG files that image editors open, replacing what was there as a whole.

        ``original.png``, ``background.png``, ``painted.png`` (white where painted), ``seen.png`` and ``beyond.png``
        (16 bits: numbers of people, counted from 1), ``layer-01.png`` and so on (RGBA, full size) and ``layers.json``
        (`LayersIndex`). Pictures in colour have the original's ICC profile and
        resolution; its other metadata are in ``original.png``. Where ``folder`` is a link, what it leads to is
        replaced.

        Raises:
            UserError: ``folder`` is a file, or cannot be written, as where the disk is full.
        """
        height, width = self.painted.shape
        names = _layer_names(len(self.layers))
        index = LayersIndex(height=height, width=width, order=tuple(names[k] for k in self.order), margin=self.margin)
        maps = {"painted.png": self.painted, "seen.png": self.seen, "beyond.png": self.beyond}
        pictures = {"original.png": self.original, "background.png": self.background, **maps}
        resolution = Metadata(dpi=self.metadata.dpi)
        with folder_written_whole(folder, INDEX, OWN) as place:
            try:
                for name, picture in itertools.chain(
                    pictures.items(),
                    # One by one: at full size they need more memory than all else together.
                    ((name, layer.whole(height, width)) for name, layer in zip(names, self.layers, strict=True)),
                ):
                    metadata = self.metadata if picture is self.original else resolution
                    # A map has no colours; PNG allows no RGB profile beside grey.
                    profile = None if name in maps else self.icc_profile
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
        pictures = (_read_picture(place / name, "RGBA", size) for name in names)
        layers = [Layer.cut(picture[..., :3], picture[..., 3]) for picture in pictures]
        people = {name: _read_people(place / f"{name}.png", size, len(layers)) for name in ("seen", "beyond")}
        icc_profile, metadata = _read_colours_and_metadata(place / "original.png")
        for name in ("background.png", *names):
            if _read_colours_and_metadata(place / name)[0] != icc_profile:
                raise UserError(
                    f"{place / name} has another colour profile than original.png: export it with that one, converted"
                )
        return cls(
            original=_read_picture(place / "original.png", "RGB", size),
            background=_read_picture(place / "background.png", "RGB", size),
            painted=_read_picture(place / "painted.png", "L", size) >= 128,
            **people,
            layers=layers,
            order=tuple(names.index(name) for name in index.order),
            margin=index.margin,
            icc_profile=icc_profile,
            metadata=metadata,
        )


def indices(values: Any, name: str) -> list[int]:
    """Whole numbers that a caller gives.

    Raises:
        UserError: they are no sequence, or one of them is no whole number: a boolean tells of no person.
    """
    try:
        given = list(values)
        if any(isinstance(value, bool | np.bool_) for value in given):
            raise TypeError
        return [operator.index(value) for value in given]
    except TypeError:
        raise UserError(f"{name} is {values!r}: give indices of people, such as [1]") from None


def is_of_layers(name: str) -> bool:
    """Whether `LayeredPicture.save` writes a file of that name."""
    return re.fullmatch(OWN, name) is not None


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


def _read_people(path: Path, size: tuple[int, int], people: int) -> np.ndarray:
    """A map of numbers of people, (H, W) uint16."""
    numbers = _read_picture(path, "I", size)
    with path.open("rb") as file:
        depth, kind = file.read(26)[24:]  # of IHDR, which comes first
    if depth == 16 and kind != 0:  # of which Pillow keeps the upper 8 bits
        raise UserError(f"{path} was saved with 16 bits and colours or transparency: export it as grey of 16 bits")
    if numbers.min() < 0 or numbers.max() > people:
        raise UserError(f"{path} names person {numbers.max()}, but {INDEX} names {people}: restore the file")
    return numbers.astype(np.uint16)


def _read_colours_and_metadata(path: Path) -> tuple[bytes | None, Metadata]:
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.info.get("icc_profile"), read_metadata(picture, orientation=1, same_colours=True)[0]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
