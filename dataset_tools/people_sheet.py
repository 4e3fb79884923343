"""A photograph with its people marked: each tinted and outlined in a colour of their own, with their number."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataset_tools.contact_sheet import INK, PALETTE, PAPER, TINT
from dataset_tools.masks import bounds

GOLDEN = (5**0.5 - 1) / 2
"""Steps of this share of a circle stay apart, however many there are."""


def colours(count: int) -> list[tuple[int, int, int]]:
    """RGB colours, 0..255, that differ from each other and from black: first those of `PALETTE`."""
    more = range(max(count - len(PALETTE), 0))
    hues = [colorsys.hsv_to_rgb(k * GOLDEN % 1, (0.9, 0.55, 0.75)[k % 3], (0.9, 1.0, 0.7)[k % 3]) for k in more]
    return [*PALETTE, *((round(r * 255), round(g * 255), round(b * 255)) for r, g, b in hues)][:count]


def mark_people(image: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Mark people, numbered from 1.

    Args:
        image: (H, W, 3) uint8 RGB.
        masks: (H, W) bool, one a person, none of them empty.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    marked = image.copy()
    for mask, colour in zip(masks, colours(len(masks)), strict=True):
        stroke = max(round(min(max(image.shape) / 400, np.count_nonzero(mask) ** 0.5 / 25)), 1)
        marked[mask] = ((1 - TINT) * image[mask] + TINT * np.array(colour)).astype(np.uint8)
        outlines, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        # Dark around light: one of them is seen before any background.
        for width, paint in ((3 * stroke, INK), (2 * stroke, colour)):
            cv2.drawContours(marked, outlines, -1, paint, width, cv2.LINE_AA)
    picture = Image.fromarray(marked)
    _draw_numbers(picture, masks)
    return np.asarray(picture)


def _draw_numbers(picture: Image.Image, masks: Sequence[np.ndarray]) -> None:
    """A badge a person: on the person where that is large enough, else beside it, where there is no other badge."""
    draw = ImageDraw.Draw(picture)
    longest = max(picture.size)
    taken: list[tuple[float, float, float]] = []
    for number, (mask, colour) in enumerate(zip(masks, colours(len(masks)), strict=True), start=1):
        top, bottom, left, right = bounds(mask)
        body = np.pad(mask[top:bottom, left:right], 1).view(np.uint8)
        distance = cv2.distanceTransform(body, cv2.DIST_L2, 5)[1:-1, 1:-1]
        room = float(distance.max())
        radius = min(max(0.7 * room, longest / 55), longest / 28)
        y, x = (float(place[0]) for place in np.nonzero(distance == room))
        x, y = left + x, top + y
        middle = (left + right) / 2
        places = [(x, y), (middle, top - radius), (right + radius, y), (left - radius, y), (middle, bottom + radius)]
        if radius > room:  # it would hide whom it names
            places.append(places.pop(0))
        inside = [
            (min(max(a, radius), picture.width - radius), min(max(b, radius), picture.height - radius))
            for a, b in places
        ]
        free = [
            place
            for place in inside
            if all(np.hypot(place[0] - a, place[1] - b) > radius + other for a, b, other in taken)
        ]
        centre = (free or inside)[0]
        taken.append((*centre, radius))
        draw.circle(centre, radius, INK, PAPER, max(round(radius / 12), 1))
        draw.circle(centre, radius * 0.88, None, colour, max(round(radius / 6), 2))
        font = ImageFont.load_default(size=radius * (1.3, 1.05, 0.75)[len(str(number)) - 1])
        draw.text(centre, str(number), PAPER, font, anchor="mm", stroke_width=radius / 40)
