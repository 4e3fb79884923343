"""A SegFormer of the true layout, small and random: its classes by name, its labels as the library gives them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from dataset_tools.errors import UserError
from dataset_tools.estimators import PeopleInPicture
from dataset_tools.estimators.segformer import Segformer, SegformerSettings, labels_by_name
from dataset_tools.schema import PARSING_LABELS

ATR = PARSING_LABELS["atr"]


def save(folder: Path, names: Iterable[str], rows: Iterable[int] = range(18)) -> Path:
    """A network whose classes have these names, and the weights of those rows of one classifier of 18 rows."""
    torch.manual_seed(0)
    names, rows = list(names), list(rows)
    config = SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
        id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)},
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    classifier = model.decode_head.classifier
    classifier.weight.data = torch.randn(18, 16, 1, 1)[rows]
    classifier.bias.data = torch.randn(18)[rows]
    model.save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("clothes"), ATR)


def opened(folder: Path, batch_size: int = 8) -> Segformer:
    return SegformerSettings(weights=str(folder), batch_size=batch_size).open()


@pytest.fixture(scope="module")
def pictures() -> list[PeopleInPicture]:
    """Five people in two pictures of coloured squares."""
    rng = np.random.default_rng(1)
    made = []
    for height, width, people in [(90, 120, 3), (128, 60, 2)]:
        image = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(16, 0).repeat(16, 1)[:height, :width]
        masks = [np.zeros((height, width), bool) for _ in range(people)]
        for index, mask in enumerate(masks):
            mask[10 : 60 + 10 * index, 20 * index : 20 * index + 18] = True
        made.append(PeopleInPicture(image, masks))
    return made


def labels_of(estimator: Segformer, pictures: list[PeopleInPicture]) -> np.ndarray:
    """Labels of all people of all pictures, one after another."""
    people = []
    for picture, found in zip(pictures, estimator.estimate_parsing(pictures), strict=True):
        assert isinstance(found, np.ndarray) and found.dtype == np.uint8
        people += [found[mask] for mask in picture.masks]
    return np.concatenate(people)


def test_who_fills_the_picture_is_labelled_as_the_library_labels_it(
    clothes: Path, pictures: list[PeopleInPicture]
) -> None:
    image = pictures[0].image
    model = SegformerForSemanticSegmentation.from_pretrained(clothes).eval()
    processor = SegformerImageProcessor.from_pretrained(clothes)
    with torch.inference_mode():
        outputs = model(**processor(Image.fromarray(image), return_tensors="pt"))
    (expected,) = processor.post_process_semantic_segmentation(outputs, [image.shape[:2]])
    (found,) = opened(clothes).estimate_parsing([PeopleInPicture(image, [np.ones(image.shape[:2], bool)])])
    assert len(expected.unique()) > 3
    np.testing.assert_array_equal(found, expected)


def test_classes_are_known_by_their_names_in_whatever_order(
    tmp_path: Path, clothes: Path, pictures: list[PeopleInPicture]
) -> None:
    rows = np.random.default_rng(2).permutation(18).tolist()
    shuffled = save(tmp_path, [ATR[row].replace("-", "_").upper() for row in rows], rows)
    assert opened(shuffled).label_set == "atr"
    found = labels_of(opened(shuffled), pictures)
    assert len(np.unique(found)) > 3
    np.testing.assert_array_equal(found, labels_of(opened(clothes), pictures))


def test_several_people_at_once_give_what_each_gives_alone(clothes: Path, pictures: list[PeopleInPicture]) -> None:
    several, alone = (labels_of(opened(clothes, batch_size), pictures) for batch_size in (4, 1))
    assert (several == alone).mean() > 0.999


@pytest.mark.parametrize("label_set", ["lip", "atr", "pascal"])
def test_names_say_which_label_set_it_is(label_set: str) -> None:
    labels = PARSING_LABELS[label_set]
    classes = np.random.default_rng(3).permutation(len(labels)).tolist()
    named = {index: label.lower().replace("-", " ") for index, label in zip(classes, labels, strict=True)}
    assert labels_by_name(named) == (label_set, classes)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["Tie" if name == "Belt" else name for name in ATR], "'Tie', is no label of lip, atr, pascal"),
        (ATR[:-1], "no class of its config.json is called 'Scarf', a label of atr"),
    ],
)
def test_classes_that_are_no_label_set_are_refused_in_one_line(tmp_path: Path, names: list[str], said: str) -> None:
    save(tmp_path, names, range(len(names)))
    with pytest.raises(UserError, match=said) as refused:
        opened(tmp_path).check()
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)
