"""Methods that erase: one protocol, so that all are run and measured alike."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dataset_tools.errors import UserError


class Eraser(Protocol):
    """A method that fills a hole."""

    name: str

    def erase(self, image: np.ndarray, mask: np.ndarray, seed: int) -> np.ndarray:
        """Fill the hole.

        Args:
            image: (H, W, 3) uint8 RGB.
            mask: (H, W) bool, True where people are to vanish.
            seed: decides all randomness; the same arguments give the same result.

        Returns:
            (H, W, 3) uint8 RGB; pixels outside the mask are bit-identical to ``image``.

        Raises:
            UserError: image or mask has another shape or type, or the mask leaves nothing to go by.
        """
        ...


def check_input(image: np.ndarray, mask: np.ndarray) -> None:
    """Raise `UserError` unless image and mask are what `Eraser.erase` takes."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(f"image is {image.dtype} of shape {image.shape}; give (H, W, 3) uint8 RGB")
    if mask.shape != image.shape[:2] or mask.dtype != np.bool_:
        raise UserError(f"mask is {mask.dtype} of shape {mask.shape}; give {image.shape[:2]} bool")
    if mask.all():
        raise UserError("mask covers the whole picture: leave some background to go by")


def keep_outside(result: np.ndarray, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``result`` inside the mask, ``image`` outside, bit-identical."""
    return np.where(mask[..., None], result, image)
