"""From samples to training examples: crops, holes, targets and cues of one branch."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch

from dataset_tools.errors import UserError
from dataset_tools.schema import Person, Sample
from mild.backbone import Branch
from mild.morphology import Cue, draw_masks, draw_parsing, draw_pose, stack_cue
from mild.settings import HmgSettings


@dataclass(frozen=True)
class Batch:
    """Examples of one branch. Pictures are (B, 3, H, W) float32 in -1..1, masks (B, 1, H, W) float32, 0 or 1."""

    picture: torch.Tensor
    """What the branch learns to paint, x_0: the clean background, or the image with the person."""
    image: torch.Tensor
    """The image that the branch is shown, apart from the hole."""
    hole: torch.Tensor
    """1 where the branch is shown nothing."""
    given_mask: torch.Tensor
    """What SMA and offsets are given: the person's faulty mask, as it would be at inference; for the background all
    people's, which is the hole."""
    target_mask: torch.Tensor
    """M_k, where a foreground branch is judged; 1 everywhere for the background."""
    weight: torch.Tensor
    """(B,): how often each example counts in the sum of eq. 5."""


def make_batch(branch: Branch, samples: list[Sample], chosen: list[int], resolution: int) -> Batch:
    """Examples for one branch; each sample is cropped to the largest square around the chosen person.

    Args:
        chosen: index of one person a sample.
        resolution: side in pixels to which the crop is scaled down.

    Raises:
        UserError: a sample has no clean background or no augmented masks, or is smaller than ``resolution``.
    """
    rows = []
    for sample, index in zip(samples, chosen, strict=True):
        _check_sample(sample, resolution)
        people, person = sample.people, sample.people[index]
        window = _square_around(person.mask)
        if branch == "bg":
            picture, shown, target = sample.background, _augmented(people), np.ones_like(person.mask)
            given = shown
        else:
            others = [other for other in people if other is not person]
            picture, shown, target = sample.image, _augmented(others, person.mask.shape), person.mask
            given = _augmented([person])
        assert picture is not None
        rows.append(
            (
                _scaled_picture(picture[window], resolution),
                _scaled_picture(sample.image[window], resolution),
                _scaled_mask(shown[window], resolution),
                _scaled_mask(given[window], resolution),
                _scaled_mask(target[window], resolution),
                1.0 if branch == "bg" else float(len(people)),
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
    branch: Branch, samples: list[Sample], chosen: list[int], withheld: list[np.ndarray], settings: HmgSettings
) -> dict[str, Cue | None]:
    """The cues of HMG for one branch, of the crops of `make_batch`: arguments of `LayeredUNet.branch`.

    Everybody's keypoints, the label map and, for the foreground, the faulty masks of the person and of the others;
    None where no sample has the cue, or all are withheld.

    Args:
        chosen: index of one person a sample.
        withheld: (3,) bool a sample: whether pose, parsing and masks are kept from the model.
    """
    pose: list[torch.Tensor | None] = []
    parsing: list[torch.Tensor | None] = []
    others: list[torch.Tensor | None] = []
    for sample, index, (no_pose, no_parsing, no_masks) in zip(samples, chosen, withheld, strict=True):
        people = sample.people
        window = rows, columns = _square_around(people[index].mask)
        keypoints = np.stack([person.keypoints for person in people]) - np.array(
            [columns.start, rows.start, 0], np.float32
        )
        side = rows.stop - rows.start
        missing = no_pose or not keypoints[..., 2].any()
        pose.append(None if missing else draw_pose(keypoints, (side, side), settings))
        missing = no_parsing or sample.label_set == "none"
        parsing.append(None if missing else draw_parsing(sample.parsing[window], sample.label_set, settings))
        if branch == "fg":
            masks = np.stack([_augmented([person])[window] for person in people])
            others.append(None if no_masks else draw_masks(masks, index, settings))
    return {"pose": stack_cue(pose), "parsing": stack_cue(parsing), "others": stack_cue(others)}


def _augmented(people: list[Person], shape: tuple[int, int] = (0, 0)) -> np.ndarray:
    masks = [person.augmented_mask for person in people if person.augmented_mask is not None]
    return np.logical_or.reduce(masks) if masks else np.zeros(shape, bool)


def _square_around(mask: np.ndarray) -> tuple[slice, slice]:
    """The largest square of the picture, moved so that the centre of the mask's box is as central as it can be."""
    height, width = mask.shape
    side = min(height, width)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top = int(np.clip((rows[0] + rows[-1] + 1 - side) // 2, 0, height - side)) if rows.size else 0
    left = int(np.clip((columns[0] + columns[-1] + 1 - side) // 2, 0, width - side)) if columns.size else 0
    return slice(top, top + side), slice(left, left + side)


def _scaled_picture(picture: np.ndarray, side: int) -> torch.Tensor:
    scaled = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(scaled.astype(np.float32) / 127.5 - 1.0).permute(2, 0, 1)


def _scaled_mask(mask: np.ndarray, side: int) -> torch.Tensor:
    """Every pixel that the mask touches: what belongs to a hole must not shine through."""
    covered = cv2.resize(mask.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA) > 0
    return torch.from_numpy(covered[None].astype(np.float32))


def _check_sample(sample: Sample, resolution: int) -> None:
    name = f"sample {sample.key}"
    if sample.background is None or any(person.augmented_mask is None for person in sample.people):
        raise UserError(
            f"{name} is {sample.configuration!r}: training needs composite samples (clean plate, faulty masks)"
        )
    if not sample.people:
        raise UserError(f"{name} has no person")
    height, width = sample.image.shape[:2]
    if min(height, width) < resolution:
        raise UserError(f"{name} is {width}x{height}, smaller than resolution ({resolution}): lower resolution")
    shapes = {sample.background.shape[:2], *(person.mask.shape for person in sample.people)}
    if shapes != {(height, width)}:
        raise UserError(f"{name}: background or masks differ in size from the image ({width}x{height})")
