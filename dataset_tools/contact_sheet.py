"""A picture of samples at a glance: people tinted and outlined, skeletons, effects, clean plates, captions."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from PIL.PngImagePlugin import PngInfo

from dataset_tools.masks import BONES
from dataset_tools.schema import KEYPOINTS, SEVERAL, Person, Sample

PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
"""Colours that stay apart for colour-blind eyes (Okabe and Ito, 2008), one a person, in turn."""
TINT = 0.38
PAPER, MOUNT, INK, FAINT = (255, 255, 255), (240, 240, 240), (32, 32, 32), (112, 112, 112)
HATCHES = 20
"""Lines along a tile's longer side."""
_SAID = ("Description", "contact sheet of mild")
"""What `as_sheet` writes into its file."""
OVERSAMPLING = 2
"""Tiles are drawn this much larger and reduced, which smooths outlines and limbs."""


def contact_sheet(samples: Iterable[Sample], columns: int, tile: int) -> np.ndarray:
    """Draw a tile a sample: its people in distinct colours, the clean plate beside it where there is one.

    Shadows and reflections are hatched in the colour of whose they are, what is not known of a plate in grey.

    Args:
        samples: at least one.
        columns: tiles in a row, at most.
        tile: longer side of each picture in pixels, 64 or more.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    drawn = [(sample.key, len(sample.people), _pictures(sample, tile)) for sample in samples]
    if not drawn:
        raise ValueError("a contact sheet needs at least one sample")
    slot_width, slot_height = (max(p.size[axis] for _, _, pictures in drawn for p in pictures) for axis in (0, 1))
    gap, margin = max(tile // 64, 2), tile // 12
    size = max(tile / 18, 11)
    font = ImageFont.load_default(size=size)
    width = max(len(pictures) for _, _, pictures in drawn) * (slot_width + gap) - gap
    height = slot_height + int(size * 1.8)
    columns = min(columns, len(drawn))
    rows = -(-len(drawn) // columns)
    sheet = Image.new("RGB", (margin + columns * (width + margin), margin + rows * (height + margin)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (key, people, pictures) in enumerate(drawn):
        row, column = divmod(index, columns)
        left, top = margin + column * (width + margin), margin + row * (height + margin)
        for number, picture in enumerate(pictures):
            x = left + number * (slot_width + gap)
            draw.rectangle((x, top, x + slot_width - 1, top + slot_height - 1), MOUNT)
            sheet.paste(picture, (x + (slot_width - picture.width) // 2, top + (slot_height - picture.height) // 2))
        baseline = top + slot_height + int(size * 1.3)
        right = left + len(pictures) * (slot_width + gap) - gap
        count = f"{people} {'person' if people == 1 else 'people'}"
        draw.text((right, baseline), count, FAINT, font, anchor="rs")
        room = right - left - draw.textlength(f"  {count}", font)
        while key and draw.textlength(key, font) > room:
            key = key.removesuffix("…")[:-1] + "…" if len(key) > 1 else ""
        draw.text((left, baseline), key, INK, font, anchor="ls")
    return np.asarray(sheet)


def _pictures(sample: Sample, tile: int) -> list[Image.Image]:
    """The image with its people marked, and the clean plate where there is one."""
    pictures = [_annotated(sample, tile)]
    if sample.background is not None:
        plate = _fitted(Image.fromarray(sample.background), tile)
        if sample.known is not None:
            _hatch(plate, ~sample.known, MOUNT)
        pictures.append(plate)
    return pictures


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture with a longer side of ``side`` pixels."""
    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _fitted_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """The mask, bool, as `_fitted` scales pictures."""
    return np.asarray(_fitted(Image.fromarray(mask.astype(np.uint8) * 255), side)) > 127


def _hatch(picture: Image.Image, mask: np.ndarray, colour: tuple[int, int, int], number: int = 0) -> None:
    """Rule a picture, as `_fitted` made it, with oblique lines where the mask, at its own size, is set.

    Lines of consecutive numbers lie beside each other: both are seen where two people's effects fall on one place.
    """
    side = max(picture.size)
    rows, columns = np.indices((picture.height, picture.width), np.int32)
    phase = ((rows + columns) * HATCHES + number * side // 3) % side
    place = _fitted_mask(mask, side)
    for share, paint in ((0.32, INK), (0.18, colour)):  # a dark rim: one of both is seen before any background
        lines = place & (np.abs(phase - side / 2) < share / 2 * side)
        picture.paste(Image.new("RGB", picture.size, paint), mask=Image.fromarray(lines.astype(np.uint8) * 200))


def _annotated(sample: Sample, tile: int) -> Image.Image:
    """The image with a longer side of ``tile`` pixels, people tinted, outlined and with their skeletons."""
    side = tile * OVERSAMPLING
    picture = _fitted(Image.fromarray(sample.image), side)
    stroke = max(side // 128, 2)
    for index in range(min(len(sample.people), SEVERAL + 1)):
        shown = sample.effects_of([index])
        if shown is not None and shown.any():
            _hatch(picture, shown, PALETTE[index % len(PALETTE)], index)
    for index, person in enumerate(sample.people):
        colour = Image.new("RGB", picture.size, PALETTE[index % len(PALETTE)])
        mask = _fitted_mask(person.mask, side)
        filled = Image.fromarray(mask.astype(np.uint8) * 255)
        inner = np.asarray(filled.filter(ImageFilter.BoxBlur(stroke))) == 255  # eroded by a square
        picture.paste(colour, mask=Image.fromarray(np.where(mask & ~inner, 255, mask * TINT * 255).astype(np.uint8)))
    for index, person in enumerate(sample.people):
        scale = picture.width / sample.image.shape[1]
        tall = int(person.mask.any(1).sum()) * scale
        thin = max(min(stroke, round(tall / 60)), 1)
        _draw_skeleton(picture, person, scale, PALETTE[index % len(PALETTE)], thin)
    return picture.reduce(OVERSAMPLING)


def _draw_skeleton(
    picture: Image.Image, person: Person, scale: float, colour: tuple[int, int, int], stroke: int
) -> None:
    """Limbs as white lines with a dark rim, joints as dots in the person's colour."""
    draw = ImageDraw.Draw(picture)
    places = [(float((x + 0.5) * scale), float((y + 0.5) * scale)) for x, y, _ in person.keypoints]
    found = person.keypoints[:, 2] > 0
    bones = [(KEYPOINTS.index(start), KEYPOINTS.index(end)) for start, end in BONES]
    limbs = [(places[a], places[b]) for a, b in bones if found[a] and found[b]]
    for width, paint in ((stroke * 2, INK), (stroke, PAPER)):
        for limb in limbs:
            draw.line(limb, paint, width)
    for place, seen in zip(places, found, strict=True):
        if seen:
            draw.circle(place, stroke * 1.6, colour, INK, max(stroke // 2, 1))


def as_sheet(picture: np.ndarray) -> bytes:
    """A contact sheet, (height, width, 3) uint8 RGB, as a PNG that says what it is."""
    buffer, said = io.BytesIO(), PngInfo()
    said.add_text(*_SAID)
    Image.fromarray(picture).save(buffer, "PNG", pnginfo=said)
    return buffer.getvalue()


def is_sheet(data: bytes) -> bool:
    """Whether a file's bytes are what `as_sheet` gives."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            return bool(picture.info.get(_SAID[0]) == _SAID[1])
    except (OSError, ValueError, SyntaxError):
        return False
