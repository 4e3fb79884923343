"""A photograph with masks and cues of its people, checked: what the pipeline is given."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

from dataset_tools.colours import Profile
from dataset_tools.errors import Rejected, UserError
from dataset_tools.images import exif_orientation, orient
from dataset_tools.mask_files import MaskFile, people_of, read_mask_array, read_mask_picture
from dataset_tools.masks import why_inverted, why_much
from dataset_tools.metadata import checked_dpi
from dataset_tools.photo_masks import upright_turn
from dataset_tools.schema import KEYPOINTS, NO_PARSING, PARSING_LABELS
from mild.erasing.isolation import Protect, isolate
from mild.erasing.layers import editable_of, indices, seen_people
from mild.erasing.regions import editable

Picture = Image.Image | np.ndarray


FARTHEST = 10
"""Longer sides of a picture, from its corner, at which nobody's joint is any more."""


class OfPerson(UserError):
    """Somebody who was chosen cannot vanish.

    Args:
        name: of the picture, for the message.
        person: their index among the masks.
        what: the rest of the sentence, with what stands before it.
    """

    def __init__(self, name: str, person: int, what: str) -> None:
        super().__init__(f"{name}person {person + 1} (index {person}){what}")
        self.person, self.what = person, what


class MuchGoes(UserWarning):
    """Most of a picture will go."""


@dataclass(eq=False)
class Photo:
    """A photograph and what is known and asked of its people."""

    image: np.ndarray
    """(H, W, 3) uint8 RGB, upright."""
    masks: np.ndarray
    """(N, H, W) bool, one a person."""
    remove: list[int]
    """Indices of those who are to vanish."""
    layers: bool
    """Whether everybody is painted out, and completed, so that any of them can be put back."""
    order: tuple[int, ...]
    """Indices from back to front."""
    pose: np.ndarray | None
    """(N, 18, 3): x and y in pixels, score 0..1."""
    parsing: np.ndarray | None
    """(H, W) uint8 of ``label_set``."""
    label_set: str
    margin: float
    """Of `mild.erasing.regions.editable`."""
    generator: torch.Generator | None
    """Source of the noise; None for torch's global one."""
    icc_profile: bytes | None = None
    """Of the colours; None for sRGB, or where nobody knows."""
    dpi: tuple[float, float] | None = None
    """Pixels an inch, across and down, of the upright picture."""

    @property
    def painted_out(self) -> Sequence[int]:
        """Indices of those who go from the background."""
        return range(len(self.masks)) if self.layers else self.remove

    @cached_property
    def seen(self) -> np.ndarray:
        """(H, W) uint16: whom each pixel shows, see `mild.erasing.layers.seen_people`."""
        return seen_people(self.masks, self.order)

    @cached_property
    def areas(self) -> list[int]:
        """Pixels that are seen of each person."""
        return [int(count) for count in np.bincount(self.seen.ravel(), minlength=len(self.masks) + 1)[1:]]

    @cached_property
    def _seen_after(self) -> np.ndarray:
        """The same when those are gone who are to vanish, as far as masks tell."""
        return seen_people(self.masks, [k for k in self.order if k not in self.remove])

    def shows(self, person: int) -> np.ndarray:
        """(H, W) bool: the part of a person that nobody in front covers."""
        shown: np.ndarray = self.seen == person + 1
        return shown

    def editable(self, people: Iterable[int]) -> np.ndarray:
        """(H, W) bool: `mild.erasing.regions.editable` of what is seen of people."""
        return editable_of(self.seen, people, self.margin)

    @cached_property
    def _going(self) -> np.ndarray:
        """(H, W) uint16: how many of those who are painted out each pixel is of, by their widened masks."""
        count = np.zeros(self.seen.shape, np.uint16)
        for k in self.painted_out:
            count += editable(self.masks, [k], self.margin)
        return count

    def freed(self, person: int) -> np.ndarray:
        """(H, W) bool: where somebody else is painted out behind whom a person may be."""
        others = self._going
        if person in self.painted_out:
            others = others - editable(self.masks, [person], self.margin)
        freed: np.ndarray = (others > 0) & ~self.shows(person)
        return freed

    def hidden(self, person: int) -> np.ndarray:
        """What of a person's mask somebody in front hides and is to be shown, (H, W) bool.

        With ``layers`` all that is hidden, otherwise what comes to light when those go who are to vanish.
        """
        after = self.masks[person] if self.layers else self._seen_after == person + 1
        hidden: np.ndarray = after & ~self.shows(person)
        return hidden


def checked_photo(
    image: Picture,
    *,
    masks: Sequence[Any],
    remove: Sequence[int] | None,
    order: Sequence[int] | None,
    pose: Any,
    parsing: Any,
    generator: Any,
    label_set: str,
    layers: bool,
    protect: Protect | None,
    margin: float,
    name: str = "",
) -> Photo:
    """One picture and what belongs to it; the arguments are those of `mild.erasing.pipeline.MILDPipeline`.

    Raises:
        UserError: something cannot be used; the message begins with ``name``.
    """
    # Pillow turns TIFF pictures upright while it loads them: what it stored is asked before that.
    orientation = exif_orientation(image) if isinstance(image, Image.Image) else 1
    icc_profile, dpi = _colours_and_dpi(image, name)
    picture = _rgb(image, name)
    people = np.stack(_people(masks, picture.shape[:2], orientation, name))
    count = len(people)
    chosen = list(range(count)) if remove is None else indices(remove, f"{name}remove")
    if wrong := [k for k in chosen if not 0 <= k < count]:
        raise UserError(f"{name}remove names person {wrong[0]}, but there are masks 0 to {count - 1} only")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"{name}remove names one person twice")
    layering = tuple(range(count)) if order is None else tuple(indices(order, f"{name}order"))
    if sorted(layering) != list(range(count)):
        raise UserError(f"{name}order is {layering}; name each of 0 to {count - 1} once, from back to front")
    if pose is not None:
        pose = _joints(pose, count, picture.shape[:2], name)
    if parsing is not None:
        parsing = np.asarray(parsing)
        if parsing.shape != picture.shape[:2] or parsing.dtype != np.uint8:
            raise UserError(
                f"{name}parsing is {parsing.dtype} of shape {parsing.shape}; give {picture.shape[:2]} uint8"
            )
        if label_set not in PARSING_LABELS or label_set == "none":
            raise UserError(f"label_set {label_set!r} is not known; use lip, atr or pascal")
        if (worst := parsing[parsing != NO_PARSING].max(initial=0)) >= len(PARSING_LABELS[label_set]):
            raise UserError(f"{name}parsing holds label {worst}, which {label_set} does not have")
    if protect not in (None, *get_args(Protect)):
        raise UserError(f"protect is {protect!r}: give faces or people")
    if protect is not None:
        if protect == "faces" and pose is None and parsing is None:
            raise UserError(f"{name}faces are found by pose or parsing: give one of them, or protect people")
        stay = [k for k in range(count) if k not in chosen]
        cues = {"parsing": parsing, "label_set": label_set if parsing is not None else "none"}
        joints = None if pose is None else pose[stay]
        for k in chosen:
            people[k] = isolate(people[k], people[stay], protect, **cues, keypoints=joints)
            if not people[k].any():
                raise OfPerson(name, k, f" lies wholly on {protect} that are to be protected")
    if chosen and editable(people, chosen, margin).all():
        raise UserError(f"{name}the masks cover the whole picture: leave some background to go by")
    for k in chosen:
        if inverted := why_inverted(people[k]):
            raise OfPerson(name, k, f": {inverted}")
    if much := why_much(list(people[chosen])):
        warnings.warn(f"{name}{much}", MuchGoes, stacklevel=4)
    asked = (chosen, layers, layering, pose, parsing, label_set, margin, generator)
    photo = Photo(picture, people, *asked, icc_profile, dpi)
    for k in chosen:
        # Who is hidden by somebody who goes as well is uncovered first, and may be hidden by others still.
        if not photo.areas[k] and not any((people[k] & people[other]).any() for other in chosen if other != k):
            what = " is wholly behind people who stay, and there is nothing to erase"
            raise OfPerson(name, k, f"{what}: is the order of the masks right, from back to front?")
    return photo


def _joints(pose: Any, count: int, size: tuple[int, ...], name: str) -> np.ndarray:
    """(N, 18, 3) float64, where they can be joints of people in a picture of a size (height, width)."""
    try:
        joints = np.asarray(pose, float)
    except (TypeError, ValueError):
        raise UserError(f"{name}pose holds something else than numbers: give x, y and score of each joint") from None
    if joints.shape != (count, len(KEYPOINTS), 3):
        raise UserError(f"{name}pose is of shape {joints.shape}; give ({count}, {len(KEYPOINTS)}, 3): x, y, score")
    scores = joints[..., 2]
    known = joints[scores > 0][:, :2]
    if not np.isfinite(scores).all() or not (np.abs(known) <= FARTHEST * max(size)).all():
        raise UserError(f"{name}pose holds joints that are no numbers, or far away from the picture: mend them")
    return joints


def checked_photos(images: Sequence[Picture], common: dict[str, Any], **lists: Sequence[Any] | None) -> list[Photo]:
    """The pictures of a batch: of the arguments of `checked_photo`, ``common`` are for all, ``lists`` have one each."""
    if len(images) == 0:
        raise UserError("no picture is given")
    for name, values in lists.items():
        if not isinstance(values, Sized | None):
            raise UserError(f"{name} is a {type(values).__name__}: give a list, of one a picture")
        if values is not None and len(values) != len(images):
            raise UserError(f"{name} has {len(values)} entries for {len(images)} pictures: give one a picture")
    rows: list[dict[str, Any]] = [
        {name: None if values is None else values[number] for name, values in lists.items()}
        for number in range(len(images))
    ]
    return [
        checked_photo(picture, name=f"picture {number}: ", **common, **row)
        for number, (picture, row) in enumerate(zip(images, rows, strict=True))
    ]


def _colours_and_dpi(image: Picture, name: str) -> tuple[bytes | None, tuple[float, float] | None]:
    """What a picture's result is to be saved with; warns where its colours are converted by rule of thumb."""
    if not isinstance(image, Image.Image):
        return None, None
    profile, dpi = image.info.get("icc_profile"), checked_dpi(image.info.get("dpi"))
    if profile and image.mode in ("L", "CMYK") and not image.has_transparency_data:
        profile = None  # `_rgb` follows it
    elif profile:
        try:
            if image.mode not in ("RGB", "RGBA", "P"):
                raise ValueError(f"convert pixels of mode {image.mode} to sRGB")
            Profile(profile, "RGB")
        except ValueError as error:
            warnings.warn(f"{name}its ICC profile is left out: {error}", stacklevel=4)
            profile = None
    if dpi is not None and exif_orientation(image) >= 5:
        dpi = dpi[::-1]
    return profile or None, dpi


def _rgb(image: Picture, name: str) -> np.ndarray:
    """(H, W, 3) uint8, upright as its EXIF orientation says; transparency is laid on white."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise UserError(f"{name}the picture is {image.dtype} of shape {image.shape}; give (H, W, 3) uint8 RGB")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise UserError(f"{name}the picture is a {type(image).__name__}; give a PIL image or a uint8 array")
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{name}the picture has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
    image.load()
    turn = exif_orientation(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode in ("L", "CMYK") and (profile := image.info.get("icc_profile")):
        try:
            image = Profile(profile, image.mode).to_srgb(image)
        except ValueError as error:
            warnings.warn(f"{name}its ICC profile is left out: {error}", stacklevel=4)
    return np.ascontiguousarray(orient(np.array(image.convert("RGB")), turn))


def _people(masks: Any, size: tuple[int, ...], orientation: int, name: str) -> list[np.ndarray]:
    """(H, W) bool of each person, upright.

    Args:
        masks: as `dataset_tools.mask_files` reads them.
        size: height and width of the upright picture.
        orientation: EXIF orientation (1 to 8) of the picture as it is stored.
        name: of the picture, for messages.
    """
    single = isinstance(masks, Image.Image) or (isinstance(masks, np.ndarray) and masks.ndim < 3)
    if single or (isinstance(masks, np.ndarray) and masks.ndim == 3 and masks.shape[:2] == size != masks.shape[1:]):
        raise UserError(f"{name}masks is a single mask: give a list, of one mask a person")
    if masks is None or len(masks) == 0:
        raise UserError(f"{name}no mask is given: give one for each person")
    people = []
    stored = (size[1], size[0]) if orientation < 5 else (size[0], size[1])
    for one in people_of([_read_mask(mask, k, name) for k, mask in enumerate(masks)]):
        if one.note:
            warnings.warn(f"{name}mask {one.file}: {one.note}", stacklevel=4)
        assert isinstance(one.mask, np.ndarray)
        found = one.mask
        turn = upright_turn(found.shape, one.orientation, stored, orientation)
        upright = np.ascontiguousarray(orient(found, turn))
        if upright.shape != size:
            raise UserError(
                f"{name}mask {one.file} is of shape {found.shape}, the picture {tuple(size)}: give them one size"
            )
        if not upright.any():
            raise UserError(f"{name}mask {one.file} is empty: it must be set where the person is")
        people.append(upright)
    return people


def _read_mask(mask: Any, k: int, name: str) -> MaskFile:
    try:
        if isinstance(mask, Image.Image):
            return read_mask_picture(mask)
        array = np.asarray(mask)
        if array.ndim < 2 or 0 in array.shape:
            raise Rejected("not-a-mask", f"a {type(mask).__name__}: give a PIL image or an array (H, W)")
        return read_mask_array(array)
    except Rejected as error:
        raise UserError(f"{name}mask {k}: {error.message}") from None
