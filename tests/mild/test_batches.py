"""Training examples of each branch: crops, holes, targets and cues."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dataset_tools.schema import KEYPOINTS, Sample
from mild.backbone import BRANCHES
from mild.batches import make_batch, make_cues
from mild.morphology import COMMON_LABELS
from mild.settings import HmgSettings


def test_a_background_example_hides_all_people_by_their_faulty_masks_and_wants_the_clean_plate(
    make_sample: Callable[..., Sample],
) -> None:
    sample = make_sample(0, height=32, width=32)
    batch = make_batch("bg", [sample], [0], resolution=32)
    faulty = np.logical_or(*(person.augmented_mask for person in sample.people))
    assert np.array_equal(batch.hole[0, 0].numpy(), faulty)
    assert sample.background is not None
    for tensor, picture in [(batch.picture, sample.background), (batch.image, sample.image)]:
        assert np.allclose((tensor[0].permute(1, 2, 0).numpy() + 1) * 127.5, picture, atol=1e-3)
    assert batch.target_mask.min() == 1
    assert batch.weight.tolist() == [1]


def test_a_foreground_example_hides_the_others_and_wants_the_person(make_sample: Callable[..., Sample]) -> None:
    sample = make_sample(0, height=32, width=32, people=3)
    batch = make_batch("fg", [sample], [1], resolution=32)
    others = np.logical_or(sample.people[0].augmented_mask, sample.people[2].augmented_mask)
    assert np.array_equal(batch.hole[0, 0].numpy(), others)
    assert np.array_equal(batch.target_mask[0, 0].numpy(), sample.people[1].mask)
    assert torch.equal(batch.picture, batch.image)
    assert batch.weight.tolist() == [3], "one person stands for the sum over all three"


def test_a_person_alone_leaves_nothing_hidden_in_the_foreground(make_sample: Callable[..., Sample]) -> None:
    batch = make_batch("fg", [make_sample(0, people=1)], [0], resolution=32)
    assert batch.hole.max() == 0


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_crop_is_a_full_square_that_holds_the_chosen_person(index: int, make_sample: Callable[..., Sample]) -> None:
    sample = make_sample(0, height=48, width=160, people=3)
    batch = make_batch("fg", [sample], [index], resolution=48)
    assert batch.picture.shape == (1, 3, 48, 48)
    assert batch.target_mask.sum() == sample.people[index].mask.sum()


@pytest.mark.parametrize("index", [0, 2])
def test_the_parts_are_given_the_faulty_mask_of_the_person_or_of_all(
    index: int, make_sample: Callable[..., Sample]
) -> None:
    sample = make_sample(0, height=32, width=32, people=3)
    foreground, background = (make_batch(branch, [sample], [index], resolution=32) for branch in BRANCHES)
    assert np.array_equal(foreground.given_mask[0, 0].numpy(), sample.people[index].augmented_mask)
    assert torch.equal(background.given_mask, background.hole)


def test_cues_lie_where_the_picture_shows_them(make_sample: Callable[..., Sample]) -> None:
    """A joint in a white pixel, which is a label and a mask of its own: all peak at one place of the crop."""
    sample = make_sample(0, height=48, width=96, people=2)
    sample.image[:], sample.parsing[:] = 0, 0
    for person in sample.people:
        person.keypoints[:] = 0
        person.augmented_mask = np.zeros_like(person.mask)
    row, column = (int(axis.mean()) // 3 * 3 for axis in np.nonzero(sample.people[1].mask))
    spot = np.s_[row : row + 3, column : column + 3]
    sample.image[spot], sample.parsing[spot] = 255, 1
    for person, joint in zip(sample.people, ("nose", "neck"), strict=True):
        person.keypoints[KEYPOINTS.index(joint)] = (column + 1, row + 1, 1)
    sample.people[1].augmented_mask[spot] = True  # type: ignore[index]
    batch = make_batch("fg", [sample], [1], resolution=16)
    settings = HmgSettings(map_side=16, joint_width=0.05)
    cues = make_cues("fg", [sample], [1], [np.zeros(3, bool)], settings)
    place = int(batch.picture[0].mean(0).argmax())
    assert cues["pose"] is not None and cues["parsing"] is not None and cues["others"] is not None
    for maps, channel in [
        (cues["pose"].maps, KEYPOINTS.index("nose")),
        (cues["pose"].maps, KEYPOINTS.index("neck")),
        (cues["parsing"].maps, COMMON_LABELS.index("head")),
        (cues["others"].maps, 0),
        (batch.given_mask, 0),
    ]:
        assert int(maps[0, channel].argmax()) == place
        assert maps[0, channel].max() == 1
    assert cues["others"].maps[0, 1].max() == 0, "nobody else"


def test_cues_that_are_withheld_or_unknown_are_marked_as_absent(make_sample: Callable[..., Sample]) -> None:
    samples = [make_sample(index, height=32, width=32) for index in range(4)]
    samples[3].label_set = "none"
    for person in samples[3].people:
        person.keypoints[:] = 0
    withheld = [np.eye(3, dtype=bool)[index] for index in range(3)] + [np.zeros(3, bool)]
    cues = make_cues("fg", samples, [0] * 4, withheld, HmgSettings())
    present = {name: cue.present.tolist() for name, cue in cues.items() if cue is not None}
    assert present == {
        "pose": [False, True, True, False],
        "parsing": [True, False, True, False],
        "others": [True, True, False, True],
    }
    assert make_cues("bg", samples, [0] * 4, withheld, HmgSettings())["others"] is None
