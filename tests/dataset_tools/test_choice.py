"""Which pictures are taken of those that could be."""

from __future__ import annotations

from dataset_tools.choice import ChoiceSettings, choose, published_split, stratum_of_boxes
from dataset_tools.records import ImageRecord, InstanceRecord


def record(name: str, *boxes: tuple[float, float, float, float], crowds: int = 0) -> ImageRecord:
    people = [InstanceRecord(f"{n}", "Person", box, "m") for n, box in enumerate(boxes)]
    people += [InstanceRecord(f"c{n}", "Person", (0, 0, 1, 1), "m", crowd=True) for n in range(crowds)]
    role = "people" if boxes else "background"
    return ImageRecord(name, "test", "train", role, "one" if boxes else "", "", instances=tuple(people))  # type: ignore[arg-type]


BIG, SMALL = (0.0, 0.0, 0.5, 0.5), (0.6, 0.6, 0.65, 0.65)


def test_a_picture_of_which_one_person_is_too_small_is_not_taken() -> None:
    records = [record("big", BIG), record("both", BIG, SMALL), record("crowd", BIG, crowds=2), record("none")]
    chosen = choose(records, ChoiceSettings(min_box_area=0.01))
    assert {each.id for each in chosen} == {"big", "crowd", "none"}
    assert chosen[-1].role == "background"
    assert {each.id for each in choose(records, ChoiceSettings(min_people=2, min_box_area=0))} == {"both", "none"}


def test_what_is_taken_does_not_hang_on_the_order_of_rows() -> None:
    records = [record(f"{n}", BIG) for n in range(50)] + [record(f"b{n}") for n in range(50)]
    settings = ChoiceSettings(images_per_stratum=7, backgrounds=3)
    chosen = choose(records, settings)
    assert len(chosen) == 10
    assert choose(records[::-1], settings) == chosen
    assert choose(records, settings.model_copy(update={"seed": 1})) != chosen


def test_strata_follow_from_boxes() -> None:
    apart = [(0.1 * n, 0.0, 0.1 * n + 0.05, 1.0) for n in range(4)]
    names = [stratum_of_boxes(apart[: n + 1]) for n in range(4)]
    assert names == ["one", "two_or_three", "two_or_three", "four_or_more"]
    assert stratum_of_boxes([BIG, (0.4, 0.4, 0.7, 0.7)]) == "overlapping"


def test_a_share_of_the_training_pictures_is_for_validation() -> None:
    splits = [published_split(f"{n}", True, 0.1) for n in range(2000)]
    assert 150 < splits.count("validation") < 250
    assert splits.count("train") + splits.count("validation") == 2000
    assert published_split("1", False, 0.1) == "test"
