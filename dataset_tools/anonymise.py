"""Faces and licence plates made unrecognisable in what is published.

A region is reduced to `CELLS` cells along its longer side, each the mean of its pixels, and enlarged again: some dozen
colours are left of a face, and of a licence plate fewer than it has letters. Nothing finer than a cell has any
influence on the result, so nothing finer can be brought back from it. (Fine mosaics and blurs can be undone, of letters
as of faces: Hill et al., On the (In)effectiveness of Mosaicing and Blurring, 2016; McPherson et al., Defeating Image
Obfuscation with Deep Learning, 2016.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from pydantic import model_validator

from dataset_tools.estimators import FoundRegion
from dataset_tools.estimators.detection import DetectionSettings
from dataset_tools.faces import face_of
from dataset_tools.masks import bounds
from dataset_tools.schema import MadeBy, Person
from dataset_tools.settings import Settings

CELLS = 4
"""Along the longer side of a region."""
BORDER = 0.1
"""Width of the soft border around a region, as a share of its shorter side; 2 pixels at least."""
GROWN = 0.1
"""By what share of its size a network's box is widened on each side: they are tight, or a little less."""
SAME = 0.5
"""Least correlation of the brightness in a region of a picture and of its clean plate that show the same there."""


class AnonymiseSettings(Settings):
    """What is blurred in pictures, clean plates and backgrounds. What is not found stays as it is."""

    faces: bool = True
    """Blur the faces of the people of a picture, as pose and parsing tell where they are."""
    network: DetectionSettings | None = None
    """Network that finds faces of bystanders, licence plates and the like, which are blurred as well; null: none."""

    @model_validator(mode="after")
    def _something(self) -> AnonymiseSettings:
        if not self.faces and self.network is None:
            raise ValueError("nothing is to be blurred: set faces or a network, or leave anonymise out")
        return self


@dataclass(eq=False)
class Region:
    """A part of a picture that is to be blurred."""

    what: str
    """For `transform_of`: its label, and who found it."""
    mask: np.ndarray
    """(H, W) bool, not empty."""


def face_regions(people: Iterable[Person], parsing: np.ndarray, label_set: str) -> list[Region]:
    """The faces of a picture's people, where they are known: see `dataset_tools.faces.face_of`."""
    faces = (face_of(person, parsing, label_set) for person in people)
    return [Region("face", face) for face in faces if face is not None]


def found_regions(found: Iterable[FoundRegion], size: tuple[int, int], made_by: MadeBy) -> list[Region]:
    """What a network found in a picture of a size (height, width); what lies outside of it is left out."""
    regions = []
    for one in found:
        x0, y0, x1, y1 = one.box
        wide, high = GROWN * (x1 - x0), GROWN * (y1 - y0)
        left, top = max(0, int(x0 - wide)), max(0, int(y0 - high))
        mask = np.zeros(size, bool)
        mask[top : max(0, int(np.ceil(y1 + high))), left : max(0, int(np.ceil(x1 + wide)))] = True
        if mask.any():
            regions.append(Region(f"{one.label} ({made_by.network}, sha256 {made_by.weights[:16]})", mask))
    return regions


def blurred(image: np.ndarray, regions: Sequence[Region], people: np.ndarray) -> np.ndarray:
    """A picture with all regions blurred, or itself where there are none.

    Away from the regions and their soft borders it is the same to the bit.

    People and what is around them do not run into each other: who is cut out has no rim of their old surroundings.

    Args:
        image: (H, W, 3) uint8 RGB.
        people: (H, W) bool: where people are.
    """
    result = image.copy() if regions else image
    for region in regions:
        top, bottom, left, right = bounds(region.mask)
        border = max(2, round(BORDER * min(bottom - top, right - left)))
        window = np.s_[max(0, top - border) : bottom + border, max(0, left - border) : right + border]
        rgb, mask, inside = result[window].astype(np.float32), region.mask[window], people[window]
        cell = max(2.0, max(bottom - top, right - left) / CELLS)
        cells = tuple(max(1, round(length / cell)) for length in mask.shape)
        smooth = np.where(inside[..., None], _smear(rgb, inside, cells), _smear(rgb, ~inside, cells))
        distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5)
        weight = np.clip(1 - distance / (border + 1), 0, 1)[..., None]
        result[window] = np.rint(rgb + weight * (smooth - rgb)).astype(np.uint8)
    return result


def _smear(rgb: np.ndarray, mask: np.ndarray, cells: tuple[int, ...]) -> np.ndarray:
    """Means of the pixels of a mask (h, w) in cells (rows, columns) of an (h, w, 3) float32 picture, interpolated."""
    weight = mask.astype(np.float32)

    def spread(values: np.ndarray) -> np.ndarray:
        small = cv2.resize(values, cells[::-1], interpolation=cv2.INTER_AREA)
        return cv2.resize(small, mask.shape[::-1], interpolation=cv2.INTER_LINEAR)

    return spread(rgb * weight[..., None]) / np.maximum(spread(weight), 1e-6)[..., None]


def of_pair(
    found: Sequence[Region], behind: Sequence[Region], image: np.ndarray, plate: np.ndarray
) -> tuple[list[Region], list[Region]]:
    """What is blurred in a picture and what in its clean plate, (H, W, 3) uint8 RGB; what is in both is one region.

    Args:
        found: in the picture; blurred in the plate too where that shows the same.
        behind: in the plate, which also shows what people hide; blurred in the picture too where that shows the same.
    """
    both = of_plate(found, image, plate)
    alone = []
    for region in behind:
        same = next((other for other in both if other.what == region.what and _is_one(other.mask, region.mask)), None)
        if same is None:
            alone.append(region)
        else:
            same.mask = same.mask | region.mask
    return [*found, *of_plate(alone, image, plate)], [*both, *alone]


def _is_one(mask: np.ndarray, other: np.ndarray) -> bool:
    """Whether two masks have more in common than not."""
    return bool(2 * np.count_nonzero(mask & other) > np.count_nonzero(mask | other))


def of_plate(regions: Iterable[Region], image: np.ndarray, plate: np.ndarray) -> list[Region]:
    """Those regions in which a clean plate shows what the picture shows, and must be blurred as well.

    In the others it shows what is behind a face: blurred, it would teach to paint blurred places there.
    """
    grey, plain = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float64) for picture in (image, plate))
    return [region for region in regions if _correlation(grey[region.mask], plain[region.mask]) >= SAME]


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's, of values (n,); 1 where both are constant, 0 where one is."""
    one, other = one - one.mean(), other - other.mean()
    size = np.linalg.norm(one), np.linalg.norm(other)
    if min(size) == 0:
        return float(max(size) == 0)
    return float(one @ other / (size[0] * size[1]))


def transform_of(transform: str, regions: Iterable[Region]) -> str:
    """A picture's `dataset_tools.schema.Origin.transform` with what was blurred, such as ``blur 2x face``."""
    steps = [f"blur {count}x {what}" for what, count in sorted(Counter(region.what for region in regions).items())]
    return "; ".join(filter(None, (transform, *steps)))


def regions_blurred(transform: str) -> int:
    """How many regions `transform_of` says were blurred."""
    return sum(int(count) for count in re.findall(r"(?:^|; )blur (\d+)x ", transform))
