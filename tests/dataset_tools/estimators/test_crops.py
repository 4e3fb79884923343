"""Crops hold their person and its surroundings; labels come back by masks, and who stands in front hides others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataset_tools.errors import Rejected
from dataset_tools.estimators import PeopleInPicture
from dataset_tools.estimators.crops import CropParsing, crop_around
from dataset_tools.estimators.network import NetworkSettings

SIZE = (60, 80)


class ByColour(CropParsing):
    """Stands for a network: the label of a pixel is its red; what has a pixel of full blue gives no number."""

    package = "torch"
    label_set = "lip"

    def load(self) -> list[int]:
        return []

    def logits(self, model: list[int], crops: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        model.append(len(crops))
        for crop in crops:
            strongest = torch.nn.functional.one_hot(torch.from_numpy(crop[..., 0]).long(), 20).permute(2, 0, 1).float()
            yield strongest * (torch.nan if (crop[..., 2] == 255).any() else 1)


def by_colour(folder: Path, batch_size: int = 8) -> ByColour:
    """With weights of its own, or it would share what another test has loaded."""
    file = folder / "stand-in"
    file.write_text(str(folder))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return ByColour(NetworkSettings(kind="by-colour", weights=str(file), sha256=digest, batch_size=batch_size))


def rectangle(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, left:right] = True
    return mask


def picture(labels: Any, *masks: np.ndarray, blue: int = 0) -> PeopleInPicture:
    image = np.zeros((*SIZE, 3), np.uint8)
    image[..., 0] = labels
    image[..., 2] = blue
    return PeopleInPicture(image, list(masks))


@pytest.mark.parametrize(
    ("box", "crop"),
    [
        ((20, 40, 30, 40), (18, 42, 29, 41)),
        ((0, 60, 0, 20), (0, 60, 0, 22)),
        ((50, 60, 70, 80), (49, 60, 69, 80)),
        ((7, 8, 7, 8), (7, 8, 7, 8)),
    ],
)
def test_a_crop_is_the_box_of_its_person_a_fifth_larger_within_the_picture(
    box: tuple[int, int, int, int], crop: tuple[int, int, int, int]
) -> None:
    rows, columns = crop_around(rectangle(*box))
    assert (rows.start, rows.stop, columns.start, columns.stop) == crop


def test_people_are_labelled_within_their_masks_and_all_else_is_0(tmp_path: Path) -> None:
    labels = np.arange(4800).reshape(SIZE) % 20
    one, two = rectangle(5, 30, 5, 20), rectangle(10, 50, 40, 70)
    two[20:30, 50:60] = False
    (found,) = by_colour(tmp_path).estimate_parsing([picture(labels, one, two)])
    assert isinstance(found, np.ndarray) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.where(one | two, labels, 0))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_where_masks_overlap_the_one_who_reaches_lower_has_the_pixels(tmp_path: Path, order: tuple[int, int]) -> None:
    class ByPerson(ByColour):
        """Labels a person 3 or, who is wider than tall, 0 on the left and 7 on the right."""

        def logits(self, model: list[int], crops: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
            for crop in crops:
                drawn = np.full_like(crop, 3)
                if crop.shape[1] > crop.shape[0]:
                    drawn[:, : crop.shape[1] // 2], drawn[:, crop.shape[1] // 2 :] = 0, 7
                yield from super().logits(model, [drawn])

    behind, before = rectangle(0, 40, 30, 50), rectangle(30, 50, 20, 60)
    people = [behind, before]
    estimator = ByPerson(by_colour(tmp_path).settings)
    (found,) = estimator.estimate_parsing([picture(0, *(people[i] for i in order))])
    assert isinstance(found, np.ndarray)
    # The background of who is in front is no window on who is behind.
    expected = np.where(before, np.where(np.arange(SIZE[1]) < 40, 0, 7), np.where(behind, 3, 0))
    np.testing.assert_array_equal(found, expected)


def test_batches_are_of_people_of_all_pictures_and_change_nothing(tmp_path: Path) -> None:
    labels = np.arange(4800).reshape(SIZE) % 20
    masks = [rectangle(5 * i, 20 + 5 * i, 10 * i, 15 + 10 * i) for i in range(5)]
    pictures = [picture(labels, *masks[:2]), picture(0), picture(labels[::-1], *masks[2:])]
    estimator = by_colour(tmp_path, batch_size=3)
    together = estimator.estimate_parsing(pictures)
    with estimator.model() as batches:
        assert batches == [3, 2]
    for found, alone in zip(together, pictures, strict=True):
        np.testing.assert_array_equal(found, estimator.estimate_parsing([alone])[0])


def test_without_people_nothing_is_labelled_and_no_weights_are_looked_for() -> None:
    estimator = ByColour(NetworkSettings(kind="by-colour", weights="nowhere/to/be/found"))
    (found,) = estimator.estimate_parsing([picture(5)])
    assert isinstance(found, np.ndarray) and found.shape == SIZE and not found.any()


def test_a_picture_whose_logits_are_no_numbers_is_set_aside_alone(tmp_path: Path) -> None:
    mask = rectangle(5, 30, 5, 20)
    first, second = by_colour(tmp_path).estimate_parsing([picture(4, mask, blue=255), picture(4, mask)])
    assert isinstance(first, Rejected) and first.reason == "not-parsed"
    np.testing.assert_array_equal(second, np.where(mask, 4, 0))
