"""Pictures on which people are numbered: everybody can be told from everybody else, and nothing else is changed."""

from __future__ import annotations

import cv2
import numpy as np

from dataset_tools.contact_sheet import INK, PAPER
from dataset_tools.people_sheet import colours, mark_people


def ellipses(size: tuple[int, int], centres: list[tuple[int, int]], radii: tuple[int, int]) -> list[np.ndarray]:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return [((columns - x) / radii[0]) ** 2 + ((rows - y) / radii[1]) ** 2 < 1 for x, y in centres]


def outer_outlines(picture: np.ndarray) -> list[np.ndarray]:
    """Of white things; what lies inside of others is not counted."""
    white = (picture > 200).all(axis=2).view(np.uint8)
    return list(cv2.findContours(white, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0])


def test_colours_differ_from_each_other_and_from_nobodys() -> None:
    assert len({*colours(255), (0, 0, 0)}) == 256
    assert colours(20)[:9] == colours(9)


def test_people_are_tinted_and_outlined_in_their_colours_and_the_rest_is_left_alone() -> None:
    image = np.random.default_rng(0).integers(90, 110, (300, 800, 3), dtype=np.uint8)
    masks = ellipses((300, 800), [(200, 150), (600, 150)], (90, 140))
    before = image.copy()
    marked = mark_people(image, masks)
    assert np.array_equal(image, before)
    near = cv2.dilate(np.logical_or.reduce(masks).view(np.uint8), np.ones((9, 9))).view(bool)
    assert np.array_equal(marked[~near], image[~near])
    for mask, colour, other in zip(masks, colours(2), colours(2)[::-1], strict=True):
        outline = cv2.dilate(mask.view(np.uint8), np.ones((3, 3))).view(bool) & ~cv2.erode(
            mask.view(np.uint8), np.ones((3, 3))
        ).view(bool)
        own = (marked == colour).all(axis=2)
        assert own[outline].mean() > 0.9 and not (marked[mask] == other).all(axis=1).any()
        toward = (marked[mask].astype(float) - image[mask]).mean(axis=0)
        assert (np.sign(toward) == np.sign(np.array(colour) - 100)).all()


def test_numbers_stand_on_people_in_their_order() -> None:
    """Told by the holes of their figures: 4, 6 and 9 have one, 8 has two."""
    masks = ellipses((300, 1800), [(100 + 200 * k, 150) for k in range(9)], (80, 140))
    marked = mark_people(np.zeros((300, 1800, 3), np.uint8), masks)
    badges = sorted(outer_outlines(marked), key=lambda outline: outline[:, 0, 0].mean())
    holes = []
    for badge, mask in zip(badges, masks, strict=True):
        left, top, width, height = cv2.boundingRect(badge)
        assert mask[top : top + height, left : left + width].mean() > 0.9
        inset = width // 5
        figure = marked[top + inset : top + height - inset, left + inset : left + width - inset]
        _, tree = cv2.findContours((figure > 128).all(axis=2).view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        holes.append(int((tree[0, :, 3] >= 0).sum()))
    assert holes == [0, 0, 0, 1, 0, 1, 0, 2, 1]


def test_in_a_crowd_badges_lie_beside_people_and_not_on_each_other() -> None:
    centres = [(60 + 90 * k, 100 + 130 * (k % 2)) for k in range(20)]
    masks = ellipses((400, 1900), centres, (12, 30))
    marked = mark_people(np.zeros((400, 1900, 3), np.uint8), masks)
    assert len(outer_outlines(marked)) == 20
    everybody = np.logical_or.reduce(masks)
    assert ((marked == INK).all(axis=2) & everybody).sum() < 0.1 * everybody.sum()
    assert (marked == PAPER).all(axis=2).any()
