"""The flow ``pretrain-base`` at toy size."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataset_tools.errors import UserError
from flows.pipeline import recipe_path
from flows.pretrain_base import PretrainRecipe, check_pretrain, pretrain_base
from mild.bases import NANO, digest_of_place, place_of
from mild.model.backbone import load_base
from mild.nano.settings import MARK

pytestmark = pytest.mark.usefixtures("prefect_server")

TOY: dict[str, Any] = {
    "pretrain": {
        "drawing": {"scenes": 2, "crops": 1, "held_out": 1, "drawn": 64, "side": 32},
        "vae": {"steps": 2, "batch_size": 2, "crop": 32},
        "unet": {"steps": 2, "batch_size": 2, "holes": 1, "compile": False},
        "mixed_precision": "no",
    },
    "scenes": 1,
    "inference_steps": 2,
}
STEPS = ["draw-pictures", "train-vae", "encode-examples", "train-unet", "export-base"]


def test_the_recipe_for_training_further_is_the_one_that_the_shipped_base_was_made_with() -> None:
    recipe = PretrainRecipe.load(recipe_path("pretrain", "further"))
    card = (Path(place_of(NANO)) / "README.md").read_text()
    steps = recipe.pretrain.unet
    assert f"{steps.steps} steps of {steps.batch_size}" in card
    assert f"{recipe.inference_steps} DDIM steps" in card
    assert recipe.judgement in card
    assert recipe.base == NANO


def test_a_base_is_trained_once_and_only_what_changed_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps; run again nothing is done, with other UNet settings the pictures and the VAE stay."""
    monkeypatch.setattr("flows.pretrain_base.os.cpu_count", lambda: 1)
    settings, base = tmp_path / "toy.yaml", str(tmp_path / "base")
    settings.write_text(yaml.safe_dump(TOY))
    assert pretrain_base(str(settings), base) == {"base": base, "cached": []}
    assert load_base(base).unet.config.in_channels == 9
    assert "mild pretrain toy.yaml" in (tmp_path / "base" / "README.md").read_text()
    assert pretrain_base(str(settings), base)["cached"] == STEPS
    changed = pretrain_base(str(settings), base, {"pretrain.unet.steps": 3})
    assert changed["cached"] == STEPS[:3]
    assert "--set pretrain.unet.steps=3" in (tmp_path / "base" / "README.md").read_text()
    (tmp_path / "base" / "README.md").unlink()
    assert pretrain_base(str(settings), base, {"pretrain.unet.steps": 3})["cached"] == STEPS[:4]
    seldom = {f"pretrain.{stage}.checkpoint_every": 7 for stage in ("vae", "unet")}
    assert pretrain_base(str(settings), base, {"pretrain.unet.steps": 3, **seldom})["cached"] == STEPS[:4]


def test_a_base_is_trained_further_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No VAE is trained: it is that of the base, byte by byte. The same base in another place is no other base, and its
    card does not say where that is."""
    monkeypatch.setattr("flows.pretrain_base.os.cpu_count", lambda: 1)
    settings, base = tmp_path / "toy.yaml", str(tmp_path / "base")
    settings.write_text(yaml.safe_dump(TOY))
    assert pretrain_base(str(settings), base, {"base": NANO})["cached"] == []
    card = (tmp_path / "base" / "README.md").read_text()
    assert f"Started from `{NANO}`, digest `{digest_of_place(NANO)}`" in card
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert filecmp.cmp(Path(place_of(NANO), vae), tmp_path / "base" / vae, shallow=False)
    shutil.copytree(place_of(NANO), tmp_path / "moved")
    again = pretrain_base(str(settings), base, {"base": str(tmp_path / "moved")})
    steps = ["take-vae", "draw-pictures", "encode-examples", "train-unet"]
    assert again["cached"] == steps
    card = (tmp_path / "base" / "README.md").read_text()
    assert "Started from `moved`" in card and "--set 'base=\"moved\"'" in card
    assert str(tmp_path) not in card
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved").rename(tmp_path / "elsewhere/moved")
    again = pretrain_base(str(settings), base, {"base": str(tmp_path / "elsewhere/moved")})
    assert again["cached"] == [*steps, "export-base"]


def test_an_unknown_setting_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    settings = tmp_path / "toy.yaml"
    settings.write_text(yaml.safe_dump(TOY))
    with pytest.raises(UserError, match=r"pretrain.vae.step.*'steps'"):
        pretrain_base(str(settings), str(tmp_path / "base"), {"pretrain.vae.step": 3})


@pytest.mark.parametrize("begun", [True, False])
def test_a_folder_that_no_training_of_a_base_wrote_is_refused_before_anything_is_drawn(
    tmp_path: Path, begun: bool
) -> None:
    """Nor is the base replaced from which it starts."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "model_index.json").write_text("{}")
    if begun:
        (mine / MARK).write_text("step,loss")
    with pytest.raises(UserError, match="trained from it" if begun else "something else"):
        check_pretrain(PretrainRecipe(base=str(mine) if begun else None), str(mine))
