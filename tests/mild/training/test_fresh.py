"""Fresh composites: as true as those of a dataset, of its training split alone, and the same wherever they are made."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_tools.errors import UserError
from dataset_tools.schema import EncodingSettings, Sample
from dataset_tools.shards import Manifest, ShardDataset, verify, write_shard
from mild.settings import FreshCompositeSettings, TrainSettings
from mild.training.data import TrainingData
from mild.training.fresh import FreshComposites, donors_configuration
from mild.training.mixture import Mixture

PNG = EncodingSettings(image_format="png")


@pytest.fixture(scope="module")
def made_of(dataset_with_donors: str, quick: TrainSettings) -> Callable[..., FreshComposites]:
    """What makes composites of the training split, with these settings of theirs."""

    def made(seed: int = 0, **changes: Any) -> FreshComposites:
        settings = quick.model_dump() | {"seed": seed, "fresh_composites": changes}
        donors = ShardDataset(dataset_with_donors, "real", "train")
        return FreshComposites(donors, TrainSettings.check(settings, origin="test"))

    return made


@pytest.fixture(scope="module")
def drawn(dataset_with_donors: str) -> Sample:
    return ShardDataset(dataset_with_donors, "composite", "train")[2]


def test_a_draw_makes_the_same_composite_in_any_process_and_order_and_another_draw_another(
    made_of: Callable[..., FreshComposites], drawn: Sample, dataset_with_donors: str
) -> None:
    fresh = made_of()
    untouched = pickle.loads(pickle.dumps(fresh))
    parts = [fresh.instead_of(drawn, step).to_parts(PNG) for step in range(4)]
    assert [untouched.instead_of(drawn, step).to_parts(PNG) for step in reversed(range(4))] == parts[::-1]
    others = [
        made_of(seed=1).instead_of(drawn, 0),
        fresh.instead_of(ShardDataset(dataset_with_donors, "composite", "train")[3], 0),
    ]
    pictures = {part["image.png"] for part in [*parts, *(other.to_parts(PNG) for other in others)]}
    assert len(pictures) == 6 and drawn.to_parts(PNG)["image.png"] not in pictures


def test_somebody_larger_than_what_is_kept_is_used_all_the_same(
    made_of: Callable[..., FreshComposites], drawn: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = made_of().instead_of(drawn, 0).to_parts(PNG)
    monkeypatch.setattr("mild.training.fresh.KEPT", 1)
    assert made_of().instead_of(drawn, 0).to_parts(PNG) == expected


def test_what_is_made_could_stand_in_a_shard_and_is_its_layers_over_the_plate_that_was_drawn(
    made_of: Callable[..., FreshComposites], drawn: Sample, tmp_path: Path
) -> None:
    fresh = made_of(people={3: 1})
    samples = [fresh.instead_of(drawn, step) for step in range(6)]
    shard = write_shard(samples, str(tmp_path), "composite/train-000000.tar", PNG, [])
    held = {"composite": {"train": [shard]}}
    manifest = Manifest(name="fresh", shards=held, files={}, source="", settings={}, software={})
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json())
    assert list(verify(str(tmp_path))) == []
    for sample in samples:
        assert sample.background is not None and drawn.background is not None
        assert any(np.array_equal(sample.background, plate) for plate in (drawn.background, drawn.background[:, ::-1]))
        picture = sample.background.astype(np.float64)
        for person in sample.people:
            assert person.layer is not None
            picture += person.layer[..., 3:] / 255 * (person.layer[..., :3] - picture)
        assert abs(picture - sample.image).max() < 2


def test_nobody_of_another_split_is_in_it(
    made_of: Callable[..., FreshComposites], drawn: Sample, dataset_with_donors: str
) -> None:
    fresh, held = made_of(), ShardDataset(dataset_with_donors, "real", "train").keys
    samples = [fresh.instead_of(drawn, step) for step in range(12)]
    assert {sample.split for sample in samples} == {"train"}
    shown = {person.id.split("/")[0] for sample in samples for person in sample.people}
    assert len(shown) > 2 and shown <= set(held)
    origins = {origin.id for sample in samples for origin in sample.origins if origin.role == "person"}
    assert origins <= {f"photo-{number}" for number in range(10, 16)}


@pytest.mark.parametrize(("overlap", "hidden"), [(1, True), (0, False)])
def test_how_many_hide_each_other_is_a_setting(
    made_of: Callable[..., FreshComposites], drawn: Sample, overlap: float, hidden: bool
) -> None:
    fresh = made_of(people={2: 1}, overlap=overlap, max_occlusion=0.9)
    for step in range(6):
        people = fresh.instead_of(drawn, step).people
        assert len(people) == 2
        assert any((person.occlusion or 0) > 0 for person in people) == hidden


def test_composites_alone_are_replaced_each_step_anew(
    made_of: Callable[..., FreshComposites], dataset_with_donors: str, quick: TrainSettings
) -> None:
    held = {name: ShardDataset(dataset_with_donors, name, "train") for name in ("real", "composite")}
    data = TrainingData(Mixture(held, {"real": 1, "composite": 1}), quick, None, (4, 4, 4), 1000, None, made_of())
    composite = len(held["real"])
    real, one, other = (data._sample(step, index) for step, index in ((1, 0), (1, composite), (2, composite)))
    assert np.array_equal(real.image, held["real"][0].image)
    assert one.configuration == "composite" and not np.array_equal(one.image, other.image)


def test_where_nobody_finds_a_place_the_composite_stays(made_of: Callable[..., FreshComposites], drawn: Sample) -> None:
    fresh = made_of()
    fresh.rows = []
    assert fresh.instead_of(drawn, 0) is drawn


def test_a_dataset_whose_people_cannot_be_pasted_is_told(
    drawn_dataset: str, dataset_with_donors: str, quick: TrainSettings
) -> None:
    with pytest.raises(UserError, match=r"^fresh_composites: .* has no photographs in train"):
        donors_configuration(drawn_dataset, "train")
    assert donors_configuration(dataset_with_donors, "train") == "real"
    donors = ShardDataset(dataset_with_donors, "real", "train")
    nobody = FreshCompositeSettings(people={1: 0})
    with pytest.raises(UserError, match=r"^fresh_composites, as .*: people: .*not all 0"):
        FreshComposites(donors, quick.model_copy(update={"fresh_composites": nobody}))
    donors.manifest.settings["composite"]["donors"]["min_height"] = 99
    with pytest.raises(UserError, match=r"has nobody in real/train who can be cut out"):
        FreshComposites(donors, quick.model_copy(update={"fresh_composites": FreshCompositeSettings()}))
