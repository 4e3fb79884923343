"""Methods that erase: one protocol, so that all are run and measured alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from dataset_tools.errors import UserError


@dataclass(frozen=True, eq=False)
class Case:
    """A picture, the people to vanish from it, and what is known of them.

    Raises:
        UserError: image or masks have another shape or type.
    """

    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    masks: np.ndarray
    """(N, H, W) bool, one a person."""
    pose: np.ndarray | None = None
    """(N, 18, 3) float32 keypoints as in `dataset_tools.schema.Person`; None where unknown."""
    parsing: np.ndarray | None = None
    """(H, W) uint8 label map of ``label_set``; None where unknown."""
    label_set: str = "lip"

    def __post_init__(self) -> None:
        image, masks = self.image, self.masks
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise UserError(f"image is {image.dtype} of shape {image.shape}; give (H, W, 3) uint8 RGB")
        if masks.ndim != 3 or masks.shape[1:] != image.shape[:2] or masks.dtype != np.bool_:
            raise UserError(f"masks are {masks.dtype} of shape {masks.shape}; give (N, *{image.shape[:2]}) bool")

    @cached_property
    def hole(self) -> np.ndarray:
        """(H, W) bool: where anybody is to vanish."""
        union: np.ndarray = np.logical_or.reduce(self.masks)
        return union


class Eraser(Protocol):
    """A method that fills a hole."""

    name: str

    def erase(self, case: Case, seed: int) -> np.ndarray:
        """Fill the hole.

        Args:
            seed: decides all randomness; the same arguments give the same result.

        Returns:
            (H, W, 3) uint8 RGB; pixels outside the hole are bit-identical to the image.

        Raises:
            UserError: the masks leave nothing to go by.
        """
        ...


def check_background(case: Case) -> None:
    """Raise `UserError` where the masks leave nothing to go by."""
    if case.hole.all():
        raise UserError("the masks cover the whole picture: leave some background to go by")


def keep_outside(result: np.ndarray, case: Case) -> np.ndarray:
    """``result`` in the hole, the image outside, bit-identical."""
    return np.where(case.hole[..., None], result, case.image)
