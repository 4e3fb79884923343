"""From samples to training examples: views (faulty masks, crops, flips, colours), holes, targets, cues of a branch.

What a branch is shown is made as `mild.erasing.pipeline` makes it at inference, with the same functions: holes are
masks widened by `mild.erasing.regions.editable`, of everybody for the background, of those who go for the foreground; a
person's own visible pixels are never hidden from their foreground branch, and M_k is soft. The masks are faulty ones,
as users' and networks' are.

=============  ==========================================  ====================================================
configuration  background branch                           foreground branch
=============  ==========================================  ====================================================
composite      learns the clean plate, judged everywhere   learns the image with the whole person in front of
                                                           everybody, judged inside their complete mask
paired         the same, judged where the plate is known   learns the image, judged inside the visible mask
real           learns the image, judged outside of all     the same as paired
               people only, where it is its own plate
=============  ==========================================  ====================================================

At inference the foreground branch completes people where others hide them, and composites alone know what is there.
What people leave behind beside their masks, shadows and reflections, is shown to the background branch, and the clean
plate, which has none of it, is what the branch learns to paint there.

What `mild.model.extents` learns: with the background branch, outside its hole, the true masks of all people and what
shows their shadows and reflections, where that is known; with the foreground branch, inside its hole, the person's
complete mask, of which composites alone know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
import torch

from dataset_tools.errors import UserError
from dataset_tools.masks import AugmentSettings, augment_mask
from dataset_tools.schema import KEYPOINTS, PARSING_LABELS, Person, Sample
from dataset_tools.shards import Outline
from mild.erasing.layers import seen_people
from mild.erasing.regions import Region, box_of, cut_mask, cut_picture, cut_soft, editable, prefilled, square_side
from mild.model.cues import Cue, draw_masks, draw_parsing, draw_pose, stack_cue
from mild.seeds import derived_seed
from mild.settings import CropSettings, HmgSettings, TrainSettings
from mild.training.colours import other_colours
from mild.training.mixture import misfit

if TYPE_CHECKING:  # diffusers would come along, which takes long to import, into every process that draws examples
    from mild.model.backbone import Branch

WINDOWS = (0.8, 1.25)
"""Smallest and largest side of a crop like a window, as a share of that of inference."""
MOST = 1 / 9
"""Largest share of a random crop that the person fills. Inference shows more around people; crops that did so would
hardly vary."""

PictureKind = Literal["picture", "shown", "start"]


HIDDEN = 0.02
"""Share of a person that must be hidden for that to count; the soft edges of those who merely touch hide less."""


@dataclass(frozen=True, eq=False)
class View:
    """A sample as one training step sees it."""

    sample: Sample
    """With a faulty mask for everybody, cropped and perhaps mirrored."""
    person: int
    """Index of the person whom the foreground branch paints."""
    staying: frozenset[int] = frozenset()
    """Indices of others who stay: they are not hidden from the foreground branch."""

    @property
    def region(self) -> tuple[slice, slice]:
        """Rows and columns of what is seen: the largest square around the person."""
        return _square_around(self.sample.people[self.person].mask)


@dataclass(frozen=True)
class Batch:
    """Examples of one branch. Pictures are (B, 3, H, W) uint8 RGB, masks (B, 1, H, W), those that are not soft bool:
    they come from another process, and go to another device."""

    picture: torch.Tensor
    """What the branch learns to paint, x_0. Foreground: the image, with the person's complete layer on top where it is
    known. Background: the clean plate, or without one the image with all people filled by smooth colours, as inference
    fills its holes to start from."""
    image: torch.Tensor
    """The image that the branch is shown, apart from the hole."""
    start: torch.Tensor | None
    """The image with the hole filled smoothly, from which erasing starts; None where that is not asked for."""
    hole: torch.Tensor
    """Bool: where the branch is shown nothing."""
    given_mask: torch.Tensor
    """Float32 in 0..1: what SMA and offsets are given, the person's faulty mask, as it would be at inference; for the
    background all people's, which is the hole."""
    target_mask: torch.Tensor
    """Bool: where the branch is judged. Foreground: M_k, the person's true mask, complete where that is known, else
    what is visible of them. Background: wherever the clean plate is known, where the sample has one; otherwise outside
    the true masks of all people, each widened by `mild.erasing.regions.editable` for their soft edges: inside, nobody
    knows the background."""
    extent: torch.Tensor
    """Float32 in 0..1: what the extents should say."""
    extent_judged: torch.Tensor
    """Bool: where they are judged, outside the hole or, for the foreground, inside, as far as the truth is known."""
    weight: torch.Tensor
    """(B,) float32: how often each example counts: of the foreground as often as the sum of eq. 5 has terms."""

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return self._with_each(lambda part: part.to(device))

    def row(self, number: int) -> Batch:
        """One of the examples."""
        return self._with_each(lambda part: part[number : number + 1])

    def _with_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        changed: dict[str, Any] = {name: None if part is None else change(part) for name, part in parts.items()}
        return Batch(**changed)

    def encoded(self, what: PictureKind) -> torch.Tensor:
        """A picture as the VAE is given it, (B, 3, H, W) float32 in -1..1; ``shown`` is the image with its hole in
        middle grey."""
        if what == "shown":
            return _scaled(self.image) * (1 - self.hole.float())
        picture = self.picture if what == "picture" else self.start
        assert picture is not None
        return _scaled(picture)


def draw_person(sample: Sample, draw: np.random.Generator) -> int:
    """Index of the person whom a view is about: one of those who touch another, or of all where nobody does.

    Erasing runs the foreground branch for those who touch somebody alone; drawn from all, six of ten would be of people
    of whom nothing can be hidden, and the branch would learn that nothing ever is. So that it sees enough of what is
    hidden, half of the draws are from those alone of whom something is.
    """
    hidden = [index for index, person in enumerate(sample.people) if (person.occlusion or 0) > HIDDEN]
    if hidden and draw.random() < 0.5:
        return int(draw.choice(hidden))
    widened = [cv2.dilate(person.mask.astype(np.uint8), np.ones((3, 3), np.uint8)) for person in sample.people]
    crowded = np.sum(widened, axis=0, dtype=np.int64) > 1
    touching = [index for index, mask in enumerate(widened) if (crowded & (mask > 0)).any()]
    return int(draw.choice(touching or len(sample.people)))


def draw_view(sample: Sample, index: int, settings: TrainSettings, draw: np.random.Generator) -> View:
    """A sample as one training step sees it: with faulty masks, cropped, perhaps mirrored and recoloured.

    Drawn in this order: faulty masks, person by person, where the sample has none; side, top and left of the crop,
    where ``settings.crop`` asks for one; whether to mirror; who stays: in half of the views nobody but the person, in
    the others each one or not, but never everybody; whether to recolour, and how. Both branches of a step use one view.

    Args:
        index: the chosen person, whom the crop keeps.
        draw: source of all randomness, seeded with the sample's key.

    Raises:
        UserError: the sample has no person or only empty masks, is smaller than ``settings.resolution``, or its
            parts differ in size.
    """
    _check_sample(sample, settings.resolution)
    view = with_faulty_masks(sample, draw)
    if settings.crop is not None:
        view = cropped(view, *_random_square(view.people[index], settings.resolution, settings.crop, draw))
    view = mirrored(view) if draw.random() < settings.flip else view
    others = [k for k in range(len(view.people)) if k != index]
    staying = frozenset(k for k in others if draw.random() < 0.5) if draw.random() < 0.5 else frozenset()
    if settings.recolour and draw.random() < settings.recolour:
        view = recoloured(view, draw)
    return View(view, index, frozenset() if len(staying) == len(others) else staying)


def draw_fixed_view(sample: Sample, number: int, settings: TrainSettings) -> View:
    """One of the ``settings.cached_views`` views of a sample, the same whenever it is asked for.

    Views with consecutive numbers show its people in turn, from one that is drawn. Raises `UserError` as `draw_view`.
    """
    count = max(len(sample.people), 1)
    first = np.random.default_rng(derived_seed(settings.seed, "views", sample.key)).integers(count)
    index = (int(first) + number) % count
    draw = np.random.default_rng(derived_seed(settings.seed, "views", sample.key, number))
    return draw_view(sample, index, settings, draw)


def with_faulty_masks(sample: Sample, draw: np.random.Generator) -> Sample:
    """The sample with an augmented mask for everybody: those that it has, or else faulty versions of the true masks.

    Only ``composite`` samples bring their own.
    """
    people = [
        person
        if person.augmented_mask is not None
        else replace(person, augmented_mask=augment_mask(person.mask, person.keypoints, draw, AugmentSettings()))
        for person in sample.people
    ]
    return replace(sample, people=people)


def cropped(sample: Sample, rows: slice, columns: slice) -> Sample:
    """The window of a sample: pictures, masks and label map cut, keypoints moved.

    Everybody stays in the list, also who lies outside (then with empty masks), and keypoints may lie outside.
    """
    origin = np.array([columns.start, rows.start, 0], np.float32)
    return _transformed(sample, lambda array: array[rows, columns], lambda keypoints: keypoints - origin)


def mirrored(sample: Sample) -> Sample:
    """A sample mirrored left to right.

    Joints and labels of a left and a right side change places: the image of a left arm is a right arm.
    """
    last = sample.image.shape[1] - 1

    def mirrored_keypoints(keypoints: np.ndarray) -> np.ndarray:
        return np.array([last, 0, 0], np.float32) + keypoints * np.array([-1, 1, 1], np.float32)

    view = _transformed(sample, lambda array: np.ascontiguousarray(array[:, ::-1]), mirrored_keypoints)
    labels = np.arange(256, dtype=np.uint8)
    names = PARSING_LABELS[sample.label_set]
    labels[: len(names)] = _other_side(names)
    for person in view.people:
        person.keypoints = person.keypoints[_other_side(KEYPOINTS)]
    return replace(view, parsing=labels[view.parsing])


def recoloured(sample: Sample, draw: np.random.Generator) -> Sample:
    """A sample in `other_colours`: image, background and layers alike."""
    changed = other_colours(draw)

    def on_layer(layer: np.ndarray | None) -> np.ndarray | None:
        return None if layer is None else np.concatenate([changed(layer[..., :3]), layer[..., 3:]], -1)

    return replace(
        sample,
        image=changed(sample.image),
        background=None if sample.background is None else changed(sample.background),
        people=[replace(person, layer=on_layer(person.layer)) for person in sample.people],
    )


def make_batch(branch: Branch, views: Sequence[View], resolution: int, *, start: bool = False) -> Batch:
    """Examples for one branch; each view is cropped to the largest square around its person.

    Args:
        views: a view that is a square already is taken whole.
        resolution: side in pixels to which the crop is scaled down.
        start: fill the holes of `Batch.start`.

    Raises:
        ValueError: a person has no augmented mask.
    """
    rows = [_example(branch, view, resolution, start) for view in views]
    parts = {name: [part for row in rows if (part := row[name]) is not None] for name in rows[0]}
    stacked: dict[str, Any] = {name: torch.stack(values) if values else None for name, values in parts.items()}
    return Batch(**stacked)


def _example(branch: Branch, view: View, resolution: int, start: bool) -> dict[str, torch.Tensor | None]:
    """The fields of `Batch` of one view."""
    sample, region = view.sample, Region(*view.region, (resolution, resolution))
    faulty = _faulty_masks(sample)
    everybody = range(len(faulty))
    if branch == "bg":
        hole = cut_mask(editable(faulty, everybody), region)
        given = hole
        picture, judged = _background(sample, region)
        extent, extent_judged = _left_behind(sample, region, hole)
    else:
        going = editable(faulty, [k for k in everybody if k != view.person and k not in view.staying])
        hole = cut_mask(going & (seen_people(faulty, _order(sample)) != view.person + 1), region)
        given = cut_soft(faulty[view.person], region)
        picture, judged = _person(view, region)
        complete = sample.people[view.person].complete_mask
        extent, extent_judged = (judged, hole) if complete is not None else (judged, np.zeros_like(hole))
    image = cut_picture(sample.image, region)
    return {
        "picture": _picture_tensor(picture),
        "image": _picture_tensor(image),
        "start": _picture_tensor(prefilled(image, hole)) if start else None,
        "hole": torch.tensor(hole[None]),
        "given_mask": torch.from_numpy(given[None].astype(np.float32)),
        "target_mask": torch.tensor(judged[None]),
        "extent": torch.from_numpy(extent[None].astype(np.float32)),
        "extent_judged": torch.tensor(extent_judged[None]),
        "weight": torch.tensor(1.0 if branch == "bg" else float(len(faulty))),
    }


def make_cues(views: Sequence[View], withheld: Sequence[np.ndarray], settings: HmgSettings) -> dict[str, Cue | None]:
    """The cues of HMG, of the crops of `make_batch`: arguments of `LayeredUNet.branch`.

    ``pose`` and ``parsing``, everybody's keypoints and the label map, are for both branches; ``others``, the faulty
    masks of the person and of the others, is for the foreground alone. None where no sample has the cue, or all are
    withheld.

    Args:
        views: as for `make_batch`.
        withheld: (3,) bool a sample: whether pose, parsing and masks are kept from the model.
    """
    pose: list[torch.Tensor | None] = []
    parsing: list[torch.Tensor | None] = []
    others: list[torch.Tensor | None] = []
    for view, (no_pose, no_parsing, no_masks) in zip(views, withheld, strict=True):
        seen = cropped(view.sample, *view.region)
        keypoints = np.stack([person.keypoints for person in seen.people])
        missing = no_pose or not keypoints[..., 2].any()
        pose.append(None if missing else draw_pose(keypoints, seen.parsing.shape, settings))
        missing = no_parsing or seen.label_set == "none"
        parsing.append(None if missing else draw_parsing(seen.parsing, seen.label_set, settings))
        others.append(None if no_masks else draw_masks(_faulty_masks(seen), view.person, settings))
    return {"pose": stack_cue(pose), "parsing": stack_cue(parsing), "others": stack_cue(others)}


def _background(sample: Sample, region: Region) -> tuple[np.ndarray, np.ndarray]:
    """What the background branch learns to paint in a window, (h, w, 3) uint8, and where it is known, (h, w) bool."""
    if sample.background is not None:
        unknown = np.zeros(sample.image.shape[:2], bool) if sample.known is None else ~sample.known
        return cut_picture(sample.background, region), ~cut_mask(unknown, region)
    masks = np.stack([person.mask for person in sample.people])
    people = cut_mask(editable(masks, range(len(masks))), region)
    return prefilled(cut_picture(sample.image, region), people), ~people


def _left_behind(sample: Sample, region: Region, hole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What of people a window shows outside the hole, (h, w) float32, and where that is known, (h, w) bool."""
    masks = np.stack([person.mask for person in sample.people])
    left = editable(masks, range(len(masks)))
    if sample.effects is None:
        return cut_soft(left, region), np.zeros_like(hole)
    known = ~hole if sample.known is None else ~hole & ~cut_mask(~sample.known, region)
    return cut_soft(left | (sample.effects > 0), region), known


def _person(view: View, region: Region) -> tuple[np.ndarray, np.ndarray]:
    """What the foreground branch learns to paint in a window, (h, w, 3) uint8, and where it is judged, (h, w) bool."""
    sample, person = view.sample, view.sample.people[view.person]
    if person.layer is None or person.complete_mask is None:
        return cut_picture(sample.image, region), cut_mask(person.mask, region)
    # What is seen of the person lies there already; twice, soft edges would be harder.
    missing = (person.layer[..., 3] > 0) & ~person.mask
    whole = sample.image.copy()
    under, over = whole[missing].astype(np.float32), person.layer[missing].astype(np.float32)
    whole[missing] = np.rint(under + over[:, 3:] / 255 * (over[:, :3] - under)).astype(np.uint8)
    # Those who stay hide the person still.
    hidden = np.zeros_like(person.mask)
    for k in view.staying:
        hidden |= sample.people[k].mask
    return cut_picture(whole, region), cut_mask(person.complete_mask & (person.mask | ~hidden), region)


def _faulty_masks(sample: Sample) -> np.ndarray:
    """(N, H, W) bool."""
    masks = [person.augmented_mask for person in sample.people if person.augmented_mask is not None]
    if len(masks) < len(sample.people):
        raise ValueError(f"sample {sample.key} has people without an augmented mask: make a view of it first")
    return np.stack(masks)


def _order(sample: Sample) -> list[int]:
    """Indices of the people from back to front; as they are listed where nobody knows, as at inference."""
    ranks = [index if person.order is None else person.order for index, person in enumerate(sample.people)]
    return [int(index) for index in np.argsort(ranks, kind="stable")]


def _square_around(mask: np.ndarray) -> tuple[slice, slice]:
    """The largest square of the picture, moved so that the centre of the mask's box is as central as it can be."""
    height, width = mask.shape
    side = min(height, width)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top = int(np.clip((rows[0] + rows[-1] + 1 - side) // 2, 0, height - side)) if rows.size else 0
    left = int(np.clip((columns[0] + columns[-1] + 1 - side) // 2, 0, width - side)) if columns.size else 0
    return slice(top, top + side), slice(left, left + side)


def _random_square(
    person: Person, resolution: int, settings: CropSettings | Literal["window"], draw: np.random.Generator
) -> tuple[slice, slice]:
    """A random square of the picture with as much of the mask's box in it as fits.

    Of ``CropSettings`` the person fills at most `MOST` of it, where the picture is large enough for that. Of windows,
    the side is that of inference, times 0.8 to 1.25.
    """
    mask, largest = person.mask, min(person.mask.shape)
    if settings == "window":
        assert person.augmented_mask is not None
        side = square_side(editable(person.augmented_mask[None], [0]), resolution)
        least, most = (min(max(resolution, round(side * factor)), largest) for factor in WINDOWS)
        return _square_of(mask, int(draw.integers(least, most, endpoint=True)), draw)
    smallest = max(
        resolution,
        math.ceil(settings.smallest * largest),
        math.ceil(math.sqrt(np.count_nonzero(mask) / MOST)),
        *(end - start for start, end in box_of(mask) or ()),
    )
    return _square_of(mask, int(draw.integers(min(smallest, largest), largest, endpoint=True)), draw)


def _square_of(mask: np.ndarray, side: int, draw: np.random.Generator) -> tuple[slice, slice]:
    """A square of a side, anywhere in the picture as long as the mask's box is in it."""
    firsts = []
    for (start, end), length in zip(box_of(mask) or ((0, 0), (0, 0)), mask.shape, strict=True):
        # A box that is longer than the side is cut anywhere; one that is shorter is held.
        low, high = (min(max(first, 0), length - side) for first in sorted((start, end - side)))
        firsts.append(int(draw.integers(low, high, endpoint=True)))
    top, left = firsts
    return slice(top, top + side), slice(left, left + side)


def _transformed(
    sample: Sample,
    array: Callable[[np.ndarray], np.ndarray],
    keypoints: Callable[[np.ndarray], np.ndarray],
) -> Sample:
    """The sample with ``array`` applied to everything that is a picture, and ``keypoints`` to joints that are found."""

    def optional(picture: np.ndarray | None) -> np.ndarray | None:
        return None if picture is None else array(picture)

    people = [
        replace(
            person,
            mask=array(person.mask),
            keypoints=np.where(person.keypoints[:, 2:] > 0, keypoints(person.keypoints), person.keypoints),
            complete_mask=optional(person.complete_mask),
            augmented_mask=optional(person.augmented_mask),
            layer=optional(person.layer),
        )
        for person in sample.people
    ]
    return replace(
        sample,
        image=array(sample.image),
        people=people,
        parsing=array(sample.parsing),
        background=optional(sample.background),
        known=optional(sample.known),
        effects=optional(sample.effects),
    )


def _other_side(names: Sequence[str]) -> list[int]:
    """Index of each name with left and right exchanged."""
    exchange = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
    mirrored_names = [re.sub("^(left|right|Left|Right)", lambda side: exchange[side[0]], name) for name in names]
    return [names.index(name) for name in mirrored_names]


def _picture_tensor(picture: np.ndarray) -> torch.Tensor:
    """(3, h, w) of (h, w, 3)."""
    return torch.tensor(picture).permute(2, 0, 1)


def _scaled(picture: torch.Tensor) -> torch.Tensor:
    """Float32 in -1..1 of uint8."""
    return picture.float() / 127.5 - 1.0


def _check_sample(sample: Sample, resolution: int) -> None:
    name = f"sample {sample.key}"
    if (why := misfit(Outline.of(sample), resolution)) is not None:
        raise UserError(f"{name} {why[1]}")
    height, width = sample.image.shape[:2]
    parts = [sample.parsing, sample.background, sample.known, sample.effects]
    parts += [person.mask for person in sample.people]
    parts += [part for person in sample.people for part in (person.augmented_mask, person.complete_mask, person.layer)]
    if {part.shape[:2] for part in parts if part is not None} != {(height, width)}:
        raise UserError(
            f"{name}: background, known, effects, masks, layers or parsing differ in size from the image "
            f"({width}x{height})"
        )
