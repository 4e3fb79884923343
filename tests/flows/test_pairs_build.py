"""A list of pairs becomes `paired` shards, and the same ones where the run was interrupted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dataset_tools.drawn_world import draw_scene
from dataset_tools.errors import UserError
from dataset_tools.estimators import CleanPlate
from dataset_tools.pair_list import PairRow, pair_list
from dataset_tools.records import ImageRecord
from dataset_tools.shards import ShardDataset, verify
from dataset_tools.sources.pairs import PairsSource
from flows.build_dataset import build_dataset
from flows.settings import BuildSettings


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Three drawn pairs with masks."""
    rows = []
    (tmp_path / "pairs").mkdir()
    for number in range(3):
        drawn = draw_scene(f"pair-{number}", 11, (160, 120), 1 + number)
        files = {"image": drawn.image, "background": drawn.background}
        files |= {f"mask{k}": person.mask for k, person in enumerate(drawn.people)}
        for name, array in files.items():
            Image.fromarray(array).save(tmp_path / f"pairs/{name}-{number}.png")
        masks = [f"mask{k}-{number}.png" for k in range(len(drawn.people))]
        names = {"image": f"image-{number}.png", "background": f"background-{number}.png", "masks": masks}
        rows.append(PairRow.model_validate({"id": f"p{number}", "group": "one", **names}))
    (tmp_path / "pairs/pairs.jsonl").write_bytes(pair_list(rows))
    return tmp_path / "pairs"


def recipe(folder: Path, pairs: Path) -> str:
    source = {"kind": "pairs", "root": str(pairs), "splits": {"train": 1.0}}
    settings = {"name": "pairs", "source": source, "curated": {"configuration": "paired"}, "samples_per_shard": 1}
    (folder / "build.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "build.yaml")


@pytest.mark.usefixtures("prefect_server")
def test_an_interrupted_build_of_pairs_ends_with_the_same_bytes(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(tmp_path, pairs)
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    build_dataset(settings, str(whole))
    assert list(verify(str(whole))) == []
    for sample in ShardDataset(str(whole), "paired", "train"):
        number = sample.origins[0].id[1:]
        with Image.open(pairs / f"background-{number}.png") as drawn:
            assert sample.background is not None
            assert np.abs(sample.background.astype(int) - np.asarray(drawn, int)).mean() < 3
        assert sample.known is not None and sample.known.all()
        assert sample.made_by.effects.name == "difference"

    plate = PairsSource.clean_plate

    def failing(self: PairsSource, image: np.ndarray, record: ImageRecord) -> CleanPlate:
        if record.id == "p1":
            raise ValueError("the power is cut")  # of a kind that is not tried again
        return plate(self, image, record)

    with monkeypatch.context() as patch:
        patch.setattr(PairsSource, "clean_plate", failing)
        with pytest.raises(Exception, match="the power is cut"):
            build_dataset(settings, str(interrupted))
    assert build_dataset(settings, str(interrupted))["cached"] >= 1
    names = sorted(path.relative_to(whole) for path in whole.rglob("*.tar"))
    assert len(names) == 3
    assert [(whole / name).read_bytes() for name in names] == [(interrupted / name).read_bytes() for name in names]


@pytest.mark.parametrize(
    ("layout", "configuration", "message"),
    [
        ({"image": "a/{id}.*", "masks": "m/{id}.*"}, "paired", "set curated.configuration to real"),
        ({"image": "a/{id}.*", "background": "b/{id}.*"}, "real", "set instances"),
    ],
)
def test_what_a_layout_does_not_have_is_said_before_anything_runs(
    layout: dict[str, str], configuration: str, message: str
) -> None:
    source = {"kind": "pairs", "root": "/nowhere", "licence": "CC0", "layout": layout}
    values = {"name": "pairs", "source": source, "curated": {"configuration": configuration}}
    with pytest.raises(UserError, match=message):
        BuildSettings.check(values, origin="test")
