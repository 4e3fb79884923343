"""From samples to training examples: views (faulty masks, crops, flips), holes, targets and cues of one branch.

What a branch is shown is made as `mild.erasing.pipeline` makes it at inference, with the same functions: holes are
masks widened by `mild.erasing.regions.editable`, a person's own visible pixels are never hidden from their foreground
branch, and M_k is soft. The masks are faulty ones, as users' and networks' are.

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
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dataset_tools.errors import UserError
from dataset_tools.masks import AugmentSettings, augment_mask
from dataset_tools.schema import KEYPOINTS, PARSING_LABELS, Sample
from dataset_tools.shards import Outline
from mild.erasing.layers import visible
from mild.erasing.regions import Region, cut_mask, cut_picture, cut_soft, editable, prefilled
from mild.model.backbone import Branch
from mild.model.morphology import Cue, draw_masks, draw_parsing, draw_pose, stack_cue
from mild.seeds import derived_seed
from mild.settings import CropSettings, HmgSettings, TrainSettings
from mild.training.mixture import misfit

MOST = 1 / 9
"""Largest share of a random crop that the person fills. Inference shows more around people; crops that did so would
hardly vary."""


@dataclass(frozen=True)
class Batch:
    """Examples of one branch. Pictures are (B, 3, H, W) float32 in -1..1, masks (B, 1, H, W) float32 in 0..1."""

    picture: torch.Tensor
    """What the branch learns to paint, x_0. Foreground: the image, with the person's complete layer on top where it is
    known. Background: the clean plate, or without one the image with all people filled by smooth colours, as inference
    fills its holes to start from."""
    image: torch.Tensor
    """The image that the branch is shown, apart from the hole."""
    hole: torch.Tensor
    """1 where the branch is shown nothing."""
    given_mask: torch.Tensor
    """What SMA and offsets are given: the person's faulty mask, as it would be at inference; for the background all
    people's, which is the hole."""
    target_mask: torch.Tensor
    """Where the branch is judged. Foreground: M_k, the person's true mask, complete where that is known, else what is
    visible of them. Background: 1 wherever the clean plate is known, where the sample has one; otherwise 1 outside the
    true masks of all people, each widened by `mild.erasing.regions.editable` for their soft edges, and 0 inside: there
    nobody knows the background."""
    weight: torch.Tensor
    """(B,): how often each example counts in the sum of eq. 5."""

    @property
    def shown(self) -> torch.Tensor:
        """The image with its hole in middle grey."""
        return self.image * (1 - self.hole)


def draw_view(sample: Sample, index: int, settings: TrainSettings, draw: np.random.Generator) -> Sample:
    """A sample as one training step sees it: with faulty masks, cropped and perhaps mirrored.

    Drawn in this order: faulty masks, person by person, where the sample has none; side, top and left of the crop,
    where ``settings.crop`` asks for one; whether to mirror. Both branches of a step use one view.

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
        view = cropped(view, *_random_square(view.people[index].mask, settings.resolution, settings.crop, draw))
    return mirrored(view) if draw.random() < settings.flip else view


def draw_fixed_view(sample: Sample, number: int, settings: TrainSettings) -> tuple[Sample, int]:
    """One of the ``settings.cached_views`` views of a sample, the same whenever it is asked for, and its person.

    Views with consecutive numbers show its people in turn, from one that is drawn. Raises `UserError` as `draw_view`.
    """
    count = max(len(sample.people), 1)
    first = np.random.default_rng(derived_seed(settings.seed, "views", sample.key)).integers(count)
    index = (int(first) + number) % count
    draw = np.random.default_rng(derived_seed(settings.seed, "views", sample.key, number))
    return draw_view(sample, index, settings, draw), index


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


def make_batch(branch: Branch, samples: list[Sample], chosen: list[int], resolution: int) -> Batch:
    """Examples for one branch; each sample is cropped to the largest square around the chosen person.

    Args:
        samples: views (`draw_view`). A view that is a square already is taken whole.
        chosen: index of one person a sample.
        resolution: side in pixels to which the crop is scaled down.

    Raises:
        ValueError: a person has no augmented mask.
    """
    rows = []
    for sample, index in zip(samples, chosen, strict=True):
        region = Region(*_square_around(sample.people[index].mask), (resolution, resolution))
        faulty = _faulty_masks(sample)
        everybody = range(len(faulty))
        if branch == "bg":
            hole = cut_mask(editable(faulty, everybody), region)
            given = hole
            picture, judged = _background(sample, region)
        else:
            others = editable(faulty, [k for k in everybody if k != index])
            hole = cut_mask(others & ~visible(faulty, _order(sample))[index], region)
            given = cut_soft(faulty[index], region)
            picture, judged = _person(sample, index, region)
        rows.append(
            (
                _picture_tensor(picture),
                _picture_tensor(cut_picture(sample.image, region)),
                _mask_tensor(hole),
                _mask_tensor(given),
                _mask_tensor(judged),
                1.0 if branch == "bg" else float(len(faulty)),
            )
        )
    pictures, images, holes, given_masks, targets, weights = zip(*rows, strict=True)
    return Batch(
        torch.stack(pictures),
        torch.stack(images),
        torch.stack(holes),
        torch.stack(given_masks),
        torch.stack(targets),
        torch.tensor(weights),
    )


def make_cues(
    samples: list[Sample], chosen: list[int], withheld: list[np.ndarray], settings: HmgSettings
) -> dict[str, Cue | None]:
    """The cues of HMG, of the crops of `make_batch`: arguments of `LayeredUNet.branch`.

    ``pose`` and ``parsing``, everybody's keypoints and the label map, are for both branches; ``others``, the faulty
    masks of the person and of the others, is for the foreground alone. None where no sample has the cue, or all are
    withheld.

    Args:
        samples, chosen: as for `make_batch`.
        withheld: (3,) bool a sample: whether pose, parsing and masks are kept from the model.
    """
    pose: list[torch.Tensor | None] = []
    parsing: list[torch.Tensor | None] = []
    others: list[torch.Tensor | None] = []
    for sample, index, (no_pose, no_parsing, no_masks) in zip(samples, chosen, withheld, strict=True):
        view = cropped(sample, *_square_around(sample.people[index].mask))
        keypoints = np.stack([person.keypoints for person in view.people])
        missing = no_pose or not keypoints[..., 2].any()
        pose.append(None if missing else draw_pose(keypoints, view.parsing.shape, settings))
        missing = no_parsing or view.label_set == "none"
        parsing.append(None if missing else draw_parsing(view.parsing, view.label_set, settings))
        others.append(None if no_masks else draw_masks(_faulty_masks(view), index, settings))
    return {"pose": stack_cue(pose), "parsing": stack_cue(parsing), "others": stack_cue(others)}


def _background(sample: Sample, region: Region) -> tuple[np.ndarray, np.ndarray]:
    """What the background branch learns to paint in a window, (h, w, 3) uint8, and where it is known, (h, w) bool."""
    if sample.background is not None:
        unknown = np.zeros(sample.image.shape[:2], bool) if sample.known is None else ~sample.known
        return cut_picture(sample.background, region), ~cut_mask(unknown, region)
    masks = np.stack([person.mask for person in sample.people])
    people = cut_mask(editable(masks, range(len(masks))), region)
    return prefilled(cut_picture(sample.image, region), people), ~people


def _person(sample: Sample, index: int, region: Region) -> tuple[np.ndarray, np.ndarray]:
    """What the foreground branch learns to paint in a window, (h, w, 3) uint8, and where it is judged, (h, w) bool."""
    person = sample.people[index]
    if person.layer is None or person.complete_mask is None:
        return cut_picture(sample.image, region), cut_mask(person.mask, region)
    # What is seen of the person lies there already; twice, soft edges would be harder.
    missing = (person.layer[..., 3] > 0) & ~person.mask
    whole = sample.image.copy()
    under, over = whole[missing].astype(np.float32), person.layer[missing].astype(np.float32)
    whole[missing] = np.rint(under + over[:, 3:] / 255 * (over[:, :3] - under)).astype(np.uint8)
    return cut_picture(whole, region), cut_mask(person.complete_mask, region)


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
    mask: np.ndarray, resolution: int, settings: CropSettings, draw: np.random.Generator
) -> tuple[slice, slice]:
    """A random square of the picture with as much of the mask's box in it as fits.

    The person fills at most `MOST` of it, where the picture is large enough for that.
    """
    largest = min(mask.shape)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    boxes = [(int(at[0]), int(at[-1]) + 1) if at.size else (0, 0) for at in (rows, columns)]
    smallest = max(
        resolution,
        math.ceil(settings.smallest * largest),
        math.ceil(math.sqrt(np.count_nonzero(mask) / MOST)),
        *(end - start for start, end in boxes),
    )
    side = int(draw.integers(min(smallest, largest), largest, endpoint=True))
    firsts = []
    for (start, end), length in zip(boxes, mask.shape, strict=True):
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
    """(3, h, w) float32 in -1..1 of (h, w, 3) uint8."""
    return torch.from_numpy(picture.astype(np.float32) / 127.5 - 1.0).permute(2, 0, 1)


def _mask_tensor(mask: np.ndarray) -> torch.Tensor:
    """(1, h, w) float32 of (h, w)."""
    return torch.from_numpy(mask[None].astype(np.float32))


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
