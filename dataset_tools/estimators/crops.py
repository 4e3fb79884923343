"""Parsing a crop a person, and what is found in the crops brought together by the people's masks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_tools.errors import Rejected
from dataset_tools.estimators import PeopleInPicture
from dataset_tools.estimators.network import NetworkEstimator
from dataset_tools.masks import bounds

if TYPE_CHECKING:
    import torch

ENLARGED = 1.2
"""How much higher and wider than its person a crop is, as SCHP's ``make_crop_and_mask_w_mask_nms.py`` has it."""


class CropParsing(NetworkEstimator):
    """A parsing estimator whose network labels one person, who fills its input."""

    @property
    @abstractmethod
    def label_set(self) -> str:
        """See `dataset_tools.estimators.ParsingEstimator.label_set`; the weights say it, so that they are loaded."""
        ...

    @abstractmethod
    def logits(self, model: Any, crops: Sequence[np.ndarray]) -> Iterable[torch.Tensor]:
        """What the network says of a batch.

        Args:
            model: as `load` made it.
            crops: (h, w, 3) uint8 RGB each, of any sizes.

        Returns:
            (labels, h, w) float32 a crop; labels in the order of the label set.
        """
        ...

    def estimate_parsing(self, pictures: Sequence[PeopleInPicture]) -> list[np.ndarray | Rejected]:
        """See `dataset_tools.estimators.ParsingEstimator.estimate_parsing`; batches are of people of all pictures."""
        people = [(index, crop_around(mask)) for index, picture in enumerate(pictures) for mask in picture.masks]
        labels: list[list[np.ndarray]] = [[] for _ in pictures]
        failed: dict[int, Rejected] = {}
        for start in range(0, len(people), self.batch_size):
            batch = people[start : start + self.batch_size]
            with self.model() as model:
                # Copies, since torch takes no arrays that may not be written to.
                crops = [pictures[index].image[crop].copy() for index, crop in batch]
                for (index, _), logits in zip(batch, self.logits(model, crops), strict=True):
                    if not logits.isfinite().all():  # too large for half precision
                        failed[index] = Rejected("not-parsed", f"{self.name}: the network's answer is not finite")
                    labels[index].append(logits.argmax(0).byte().cpu().numpy())
        return [failed.get(index) or merge(picture, labels[index]) for index, picture in enumerate(pictures)]


def crop_around(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the crop of a person: its box, `ENLARGED` about its middle, within the picture.

    Args:
        mask: (H, W) bool, not empty.
    """
    top, bottom, left, right = bounds(mask)
    return _enlarged(top, bottom, mask.shape[0]), _enlarged(left, right, mask.shape[1])


def merge(picture: PeopleInPicture, labels: Sequence[np.ndarray]) -> np.ndarray:
    """One label map of a picture. Each person's labels go where its mask is, and nowhere else.

    Where masks overlap, who is in front has the pixel: whose mask reaches lower in the picture, as people who stand
    on one ground do; of two that reach equally low, the later one.

    Args:
        picture: with N masks.
        labels: N maps, uint8, of the sizes of the masks' crops (`crop_around`).

    Returns:
        (H, W) uint8; 0 outside all masks.
    """
    merged = np.zeros(picture.image.shape[:2], np.uint8)
    for mask, of_crop in sorted(zip(picture.masks, labels, strict=True), key=lambda person: bounds(person[0])[1]):
        crop = crop_around(mask)
        merged[crop][mask[crop]] = of_crop[mask[crop]]
    return merged


def _enlarged(start: int, stop: int, size: int) -> slice:
    more = round((stop - start) * (ENLARGED - 1) / 2)
    return slice(max(0, start - more), min(size, stop + more))
