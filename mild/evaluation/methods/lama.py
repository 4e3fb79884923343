"""Erasing with LaMa: one pass of a network with Fourier convolutions, no diffusion and no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image
from pydantic import Field

from dataset_tools.errors import UserError
from dataset_tools.settings import digest_of
from dataset_tools.weights import Weights, find_weights
from mild.evaluation.methods import Case, MethodSettings, Setup
from mild.evaluation.methods.sdxl import brought_back, scaled_case

FILE = "big-lama.pt"
STEP = 8
"""Sides are padded to multiples of it: the network halves them three times."""


class LaMaMethod(MethodSettings):
    """LaMa (Suvorov et al. 2022, "Resolution-robust Large Mask Inpainting with Fourier Convolutions").

    Run is the TorchScript ``big-lama.pt`` of github.com/Sanster/models, as IOPaint runs it (``iopaint/model/lama.py``):
    it takes a picture (1, 3, H, W) in 0..1 and a mask (1, 1, H, W) of 0 and 1, and gives a picture as it took one.
    """

    kind: Literal["lama"] = "lama"
    network: str = "lama"
    """Name of `dataset_tools.networks`, or ``big-lama.pt``, or the folder that holds it."""
    sha256: str | None = Field(None, pattern="[0-9a-f]{64}")
    """Digest (hex) that a file of one's own must have: TorchScript holds a program."""
    dilation: int = Field(5, ge=0)
    """Pixels of the picture by which the network's mask is wider than the hole: on the edge of a mask that is drawn
    tightly the person's last pixels are smeared into it. What is painted beside the hole is not used."""
    longest_side: int | None = Field(None, ge=STEP)
    """Larger pictures are reduced to it, in pixels; null: none is."""

    @property
    def title(self) -> str:
        """See `MethodSettings.title`."""
        return "LaMa" + (f" ({self.name})" if self.name != self.kind else "")

    def found(self) -> Weights:
        """Its file, checked. Raises `UserError` as `find_weights`; nothing is fetched."""
        return find_weights(self.network, files=(FILE,), sha256=self.sha256, download=False)

    def missing(self, setup: Setup) -> str | None:
        """See `MethodSettings.missing`."""
        try:
            self.found()
        except UserError as error:
            return str(error)
        return None

    def weights(self, setup: Setup) -> dict[str, str]:
        """See `MethodSettings.weights`."""
        return {"lama": self.found().sha256}

    def fingerprint(self, setup: Setup) -> str:
        """See `MethodSettings.fingerprint`."""
        settings = self.model_dump(mode="json", include={"dilation", "longest_side"})
        return digest_of([1, self.kind, settings, self.weights(setup), version("torch")])

    def open(self, setup: Setup) -> LaMaEraser:
        """See `MethodSettings.open`."""
        (path,) = self.found().files.values()
        return LaMaEraser(self, path)


class LaMaEraser:
    """The network, in memory."""

    def __init__(self, settings: LaMaMethod, path: Path) -> None:
        import torch

        self._settings = settings
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._network: Any = torch.jit.load(path, map_location="cpu").to(self._device).eval()
        except RuntimeError as error:
            why = " ".join(str(error).split())[:300]
            raise UserError(f"{settings.network} cannot be used as LaMa: it is no TorchScript: {why}") from None

    def erase(self, cases: Sequence[Case], seeds: Sequence[int]) -> list[np.ndarray]:
        """One by one: a traced network is known to hold for the one picture that it was traced with, of any size.

        Nothing is random, so ``seeds`` do nothing. See `mild.evaluation.methods.Eraser.erase`.
        """
        return [self._erased(case) for case in cases]

    def _erased(self, case: Case) -> np.ndarray:
        import torch

        size, limit = case.hole.shape, self._settings.longest_side
        if limit is not None and max(size) > limit:
            size = tuple(max(1, round(side * limit / max(size))) for side in size)
        shown = replace(case, masks=dilated(case.hole, self._settings.dilation)[None])
        picture, hole = (_padded(np.asarray(one)) for one in scaled_case(shown, (size[0], size[1])))
        with torch.inference_mode():
            image = torch.from_numpy(picture).permute(2, 0, 1)[None].to(self._device).float() / 255
            mask = (torch.from_numpy(hole)[None, None].to(self._device) > 0).float()
            painted = self._network(image, mask)[0].permute(1, 2, 0).float().cpu().numpy()
        values = np.rint(painted.clip(0, 1) * 255).astype(np.uint8)[: size[0], : size[1]]
        return brought_back(Image.fromarray(values), case)


def dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """(H, W) bool: all that is at most ``radius`` pixels from the mask, in rows and in columns."""
    square = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
    return cv2.dilate(mask.astype(np.uint8), square).astype(bool)


def _padded(picture: np.ndarray) -> np.ndarray:
    """Mirrored at the bottom and at the right, up to multiples of `STEP`."""
    height, width = picture.shape[:2]
    beyond = [(0, -height % STEP), (0, -width % STEP), (0, 0)]
    return np.pad(picture, beyond[: picture.ndim], mode="symmetric")
