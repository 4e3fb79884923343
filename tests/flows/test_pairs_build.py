"""A list of pairs becomes `paired` shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dataset_tools.drawn_world import draw_scene
from dataset_tools.errors import UserError
from dataset_tools.pair_list import PairRow, pair_list
from dataset_tools.shards import ShardDataset, verify
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
def test_a_list_of_pairs_becomes_shards(pairs: Path, tmp_path: Path) -> None:
    """With the plates as they are listed, known everywhere, and effects told by the difference."""
    dataset = str(tmp_path / "dataset")
    assert build_dataset(recipe(tmp_path, pairs), dataset)["shards"] == 3
    assert list(verify(dataset)) == []
    samples = list(ShardDataset(dataset, "paired", "train"))
    assert len(samples) == 3
    for sample in samples:
        number = sample.origins[0].id[1:]
        with Image.open(pairs / f"background-{number}.png") as drawn:
            assert sample.background is not None
            assert np.abs(sample.background.astype(int) - np.asarray(drawn, int)).mean() < 3
        assert sample.known is not None and sample.known.all()
        assert sample.made_by.effects.name == "difference"


@pytest.mark.parametrize("name", ["../mine", "mine\n", "\u00fcber"])
def test_a_name_is_of_plain_letters_from_end_to_end(name: str) -> None:
    with pytest.raises(UserError, match="name"):
        BuildSettings.check({"name": name, "source": {"kind": "sample"}}, origin="test")


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
