"""Who counts as left in the hole, by a network that sees whoever is drawn; and by that of the package."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_tools.drawn_world import draw_scene
from dataset_tools.errors import UserError
from dataset_tools.estimators import FoundPeople
from mild.metrics.metric import Judged
from mild.metrics.residual_person import ResidualPerson

SIZE = (20, 30)
HOLE = np.zeros(SIZE, bool)
HOLE[5:15, 10:20] = True
Box = tuple[int, int, int, int]
"""Top, bottom, left, right."""


class Seer:
    """Finds a person for every grey level of a picture that is not 0."""

    batch_size = 0

    def find(self, images: Sequence[np.ndarray]) -> list[FoundPeople]:
        found = [[image[..., 0] == level for level in np.unique(image) if level] for image in images]
        return [FoundPeople(masks, [1.0] * len(masks)) for masks in found]


@pytest.fixture
def seer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ResidualPerson, "estimator", lambda self: Seer())


def drawn(*boxes: Box) -> np.ndarray:
    """A picture with a person in each box."""
    picture = np.zeros((*SIZE, 3), np.uint8)
    for level, (top, bottom, left, right) in enumerate(boxes, 1):
        picture[top:bottom, left:right] = level
    return picture


def left_over(one: Judged, **settings: Any) -> Any:
    (value,) = ResidualPerson(**settings).score([one])
    return value


@pytest.mark.usefixtures("seer")
def test_somebody_in_the_hole_counts_and_somebody_elsewhere_does_not(make_judged: Callable[..., Judged]) -> None:
    results = [drawn(), drawn((6, 14, 12, 18)), drawn((6, 14, 22, 28)), drawn((6, 9, 12, 14), (6, 14, 22, 28))]
    assert ResidualPerson().score([make_judged(result, HOLE, image=drawn()) for result in results]) == [0, 1, 0, 1]


@pytest.mark.usefixtures("seer")
def test_a_share_of_the_mask_must_lie_in_the_hole(make_judged: Callable[..., Judged]) -> None:
    """Two columns of five."""
    one = make_judged(drawn((5, 15, 18, 23)), HOLE, image=drawn())
    assert (left_over(one), left_over(one, min_share=0.4), left_over(one, min_share=0.41)) == (0, 1, 0)


@pytest.mark.usefixtures("seer")
def test_who_is_marked_as_staying_may_be_in_the_hole(make_judged: Callable[..., Judged]) -> None:
    result = drawn((5, 15, 14, 20))
    assert left_over(make_judged(result, HOLE, image=drawn(), staying=result[..., 0] > 0)) == 0
    assert left_over(make_judged(result, HOLE, image=drawn(), staying=drawn((5, 6, 14, 20))[..., 0] > 0)) == 1


@pytest.mark.usefixtures("seer")
def test_who_was_seen_before_outside_the_hole_may_be_completed_in_it(make_judged: Callable[..., Judged]) -> None:
    """Of somebody now mostly in the hole, what stood out of it was there before; somebody else counts beside them."""
    completed, who_went = (5, 15, 14, 24), (5, 15, 10, 20)
    before = drawn(completed, who_went)
    assert left_over(make_judged(drawn(completed), HOLE, image=before)) == 0
    assert left_over(make_judged(drawn(completed), HOLE, image=drawn(who_went))) == 1
    assert left_over(make_judged(drawn(completed, (6, 9, 10, 13)), HOLE, image=before)) == 1
    assert left_over(make_judged(before, HOLE, image=before)) == 1


def test_the_network_of_the_package_finds_who_was_not_erased_from_a_drawn_scene(
    make_judged: Callable[..., Judged],
) -> None:
    scene = draw_scene("unseen/0", 4711, (192, 256), 1)
    (person,) = scene.people
    judged = [make_judged(result, person.mask, image=scene.image) for result in (scene.image, scene.background)]
    metric = ResidualPerson(instances="drawn-people")
    assert metric.missing() is None
    assert metric.score(judged) == [1, 0]


def test_the_fingerprint_hangs_on_share_and_network_and_not_on_the_batch(tmp_path: Path) -> None:
    prints = [
        ResidualPerson(instances="drawn-people", **changed).fingerprint()
        for changed in ({}, {"batch_size": 3}, {"min_share": 0.7})
    ]
    assert prints[0] == prints[1] != prints[2]


def test_settings_that_make_it_another_metric_are_in_its_name() -> None:
    changes: list[dict[str, Any]] = [{}, {"min_share": 0.25}, {"instances": "drawn-people"}, {"batch_size": 2}]
    changes += [{"instances": "Some/Net_v2"}, {"instances": "drawn-people", "min_share": 0.25}]
    names = [ResidualPerson(**changed).name for changed in changes]
    assert names[0] == names[3] == "residual_person"
    assert len(set(names)) == 5
    assert all(re.fullmatch("[a-z0-9_.-]+", name) for name in names)


def test_without_its_network_it_says_what_to_pull_or_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILD_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "mild weights pull rf-detr-seg-medium" in str(ResidualPerson().missing())
    assert "vitpose-base is a network for pose" in str(ResidualPerson(instances="vitpose-base").missing())
    with pytest.raises(UserError, match="mild weights pull rf-detr-seg-medium"):
        ResidualPerson().fingerprint()
