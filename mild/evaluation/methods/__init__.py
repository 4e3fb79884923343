"""Methods that erase: one protocol, so that all are run and measured alike; one file a method, its settings beside it.

Nothing heavier than pydantic is imported before a method is opened, so that flows read settings at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
from pydantic import Field

from dataset_tools.errors import UserError
from dataset_tools.settings import Settings


@dataclass(frozen=True, eq=False)
class Case:
    """A picture, the people (or things) to vanish from it, and what is known of them.

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
    key: str = ""
    """Of the sample; empty where there is none."""
    kind: str = "exact"
    """Of masks, see `mild.evaluation.settings.Masks`."""
    categories: tuple[str, ...] = ()
    """What is to vanish, one name a mask, such as ``Person`` or ``Dog``; empty where unknown."""

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


class PassingFault(UserError):
    """A method could not do a case, and may be able to another time: a program that failed, or took too long."""


class Eraser(Protocol):
    """A method that fills holes, with its networks in memory."""

    def erase(self, cases: Sequence[Case], seeds: Sequence[int]) -> list[np.ndarray]:
        """Fill the hole of each case.

        Args:
            cases: of any sizes; no hole is empty, and none covers its picture.
            seeds: of each case; decides all of its randomness. The same arguments give the same results, and other
                cases beside it change a case's result by rounding at most.

        Returns:
            For each case (H, W, 3) uint8 RGB of its size; pixels outside the hole are bit-identical to the image.

        Raises:
            UserError: a case cannot be done; the caller tries each alone then.
        """
        ...


@dataclass(frozen=True)
class Setup:
    """What is common to the methods of one evaluation."""

    base: str
    """Folder, hub id or bundled name of the SDXL inpainting base; empty where nobody named one."""
    adapters: str
    """Folder, hub id or bundled name of a MILD directory; empty where nobody named one."""
    inference_steps: int
    """Denoising steps of methods that do not set their own."""
    prompt: str
    """What the holes show, for methods that take text and do not set their own."""
    own_bases: bool = True
    """Whether adapters run on the bases that they were trained on; else all on ``base``."""


class MethodSettings(Settings, ABC):
    """One method. Subclasses add ``kind``, a literal, and whatever can be set."""

    kind: str
    warms_up: ClassVar[bool] = True
    """Whether its first call takes longer than others, as networks' do."""
    name: str = Field("", pattern=r"^([a-z0-9][a-z0-9.-]{0,62})?$")
    """In tables and file names; empty: its kind."""
    arm: str = ""
    """Methods that differ in nothing but the seed of their training name one arm: tables show its mean as well."""
    below: str = ""
    """Method, or arm, that differs from it in one part alone, the rung below: tables show the difference to it too."""
    batch_size: int = Field(8, ge=1, le=1024)
    """Pictures that it is given at once where there is a GPU; one by one elsewhere."""

    def model_post_init(self, _: object) -> None:
        """The name is the kind unless there is another."""
        if not self.name:
            object.__setattr__(self, "name", self.kind)

    @property
    @abstractmethod
    def title(self) -> str:
        """For tables and figures, with what is set otherwise than usual."""
        ...

    def missing(self, setup: Setup) -> str | None:
        """Why the method cannot run on this machine, and what to pull or install; None where it can. Loads nothing."""
        return None

    def check_cases(self, setup: Setup, cases: Sequence[tuple[str, str, tuple[int, int]]]) -> None:
        """Look, before anything runs long, at what can be seen to be wrong.

        Args:
            cases: key, kind of masks, and size (height, width) of all cases of all datasets.

        Raises:
            UserError: the method would fail; names all that is wrong.
        """

    @abstractmethod
    def weights(self, setup: Setup) -> dict[str, str]:
        """sha256 (hex) of each of its weights, by what they are: for the report, and for `fingerprint`.

        Raises:
            UserError: they are not here, or damaged.
        """
        ...

    @abstractmethod
    def fingerprint(self, setup: Setup) -> str:
        """Digest of everything that decides about its results: settings, weights, and versions of the packages."""
        ...

    def decisive(self, *others: str) -> dict[str, Any]:
        """The settings that decide about results; not names, nor how many pictures it is given at once.

        Args:
            others: further settings that decide nothing, such as where weights lie.
        """
        return self.model_dump(mode="json", exclude={"name", "arm", "below", "batch_size", *others})

    @abstractmethod
    def open(self, setup: Setup) -> Eraser:
        """The method, its networks loaded onto a GPU where there is one.

        Raises:
            UserError: they cannot be used.
        """
        ...


def keep_outside(result: np.ndarray, case: Case) -> np.ndarray:
    """``result`` in the hole, the image outside, bit-identical."""
    return np.where(case.hole[..., None], result, case.image)
