from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from dataset_tools.errors import UserError
from dataset_tools.networks import NETWORKS
from mild.evaluation.methods import Case, Setup
from mild.evaluation.methods.rorem import RORemEraser, RORemMethod

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def setup(nano_base: str) -> Setup:
    return Setup(base=nano_base, adapters="", inference_steps=2, prompt="a cat")


@pytest.fixture(scope="module")
def unet(nano_base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another UNet of the base's architecture, in a folder of its own."""
    folder = tmp_path_factory.mktemp("rorem") / "unet"
    shutil.copytree(Path(nano_base) / "unet", folder)
    generator = torch.Generator().manual_seed(1)
    weights = load_file(folder / WEIGHTS)
    save_file(
        {key: w + 0.05 * torch.randn(w.shape, generator=generator) for key, w in weights.items()}, folder / WEIGHTS
    )
    return folder


@pytest.fixture(scope="module")
def adapted(unet: Path) -> UNet2DConditionModel:
    """It, with random LoRA on some of the layers that RORem's has it on."""
    network = UNet2DConditionModel.from_pretrained(unet)
    layers = ["to_q", "to_out.0", "proj_in", "ff.net.2", "conv1", "downsamplers.0.conv", "time_emb_proj"]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=layers))
        for name, parameter in network.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return network


@pytest.fixture(scope="module")
def lora(adapted: UNet2DConditionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved as RORem's training script does (``save_model_hook`` of ``train_RORem_lcm.py``)."""
    folder = tmp_path_factory.mktemp("rorem") / "lcm"
    tensors = convert_state_dict_to_diffusers(get_peft_model_state_dict(adapted))
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=tensors)
    return folder


@pytest.fixture
def cases() -> list[Case]:
    """Two pictures of different sizes, one of which is worked on smaller than it is."""
    rng = np.random.default_rng(0)
    made = []
    for height, width in ((32, 40), (50, 64)):
        mask = np.zeros((1, height, width), bool)
        mask[0, 10:20, 12:18] = True
        made.append(Case(rng.integers(0, 256, (height, width, 3), np.uint8), mask))
    return made


class Recorder:
    """In the place of a pipeline: remembers how it was called, and gives the pictures back."""

    def __call__(self, **given: Any) -> Any:
        self.given = given
        return type("Output", (), {"images": given["image"]})


def small(**settings: Any) -> RORemMethod:
    return RORemMethod(resolution=32, **({"inference_steps": 2, "dilation": 4} | settings))


def test_pixels_outside_are_untouched_and_cases_do_not_depend_on_each_other(
    setup: Setup, unet: Path, cases: list[Case]
) -> None:
    eraser = small(unet=str(unet)).open(setup)
    together = eraser.erase([*cases, cases[0]], [1, 2, 3])
    for case, result in zip([*cases, cases[0]], together, strict=True):
        assert np.array_equal(result[~case.hole], case.image[~case.hole]) and result.shape == case.image.shape
        assert (result[case.hole] != case.image[case.hole]).any(1).mean() > 0.9
    alone = eraser.erase([cases[0]], [3])[0]
    assert np.abs(alone.astype(int) - together[2]).max() <= 1
    assert not np.array_equal(alone, together[0])


def test_its_own_unet_is_the_one_that_paints(setup: Setup, unet: Path, nano_base: str, cases: list[Case]) -> None:
    """The same as a whole pipeline's folder that holds it; and not what the base paints."""
    alone = small(unet=str(unet)).open(setup).erase(cases, [0, 0])
    base = small(base=nano_base).open(setup).erase(cases, [0, 0])
    whole = unet.parent / "whole"
    shutil.copytree(nano_base, whole)
    shutil.copy(unet / WEIGHTS, whole / "unet" / WEIGHTS)
    within = small(base=str(whole)).open(setup).erase(cases, [0, 0])
    for one, same, other in zip(alone, within, base, strict=True):
        assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_a_unet_that_lacks_a_weight_is_refused(setup: Setup, unet: Path, tmp_path: Path) -> None:
    shutil.copytree(unet, tmp_path / "unet")
    weights = load_file(unet / WEIGHTS)
    del weights["conv_out.bias"]
    save_file(weights, tmp_path / "unet" / WEIGHTS)
    with pytest.raises(UserError, match=r"unet .*conv_out\.bias"):
        small(unet=str(tmp_path / "unet")).open(setup)


def test_a_unet_that_takes_no_mask_is_refused(setup: Setup, unet: Path, tmp_path: Path) -> None:
    config = UNet2DConditionModel.load_config(str(unet))
    UNet2DConditionModel.from_config(config | {"in_channels": 4}).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="takes 4 channels"):
        small(unet=str(tmp_path / "unet")).open(setup)


def merged(unet: Path, lora: Path, scale: float) -> dict[str, torch.Tensor]:
    """The UNet's weights W + scale B A, by hand."""
    weights, tensors = load_file(unet / WEIGHTS), load_file(lora / LORA)
    named = {key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B."): w for key, w in tensors.items()}
    for key in (key for key in named if ".lora_A." in key):
        layer = key.removeprefix("unet.").replace(".lora_A", "")
        product = named[key.replace(".lora_A.", ".lora_B.")].flatten(1) @ named[key].flatten(1)
        weights[layer] += scale * product.reshape(weights[layer].shape)
    return weights


def test_the_lora_of_few_steps_changes_every_layer_that_it_is_for(setup: Setup, unet: Path, lora: Path) -> None:
    """Attention and convolutions, whose names in the file are of two kinds; and its scheduler comes with it."""
    names = list(load_file(lora / LORA))
    assert any(".attn1.to_q.lora.down." in name for name in names)
    assert any(".conv1.lora_A." in name for name in names)
    pipeline = small(unet=str(unet), lcm_lora=str(lora)).open(setup).pipeline
    assert isinstance(pipeline.scheduler, LCMScheduler)
    found, expected = pipeline.unet.state_dict(), merged(unet, lora, 1)
    assert set(found) == set(expected)
    for key, weight in expected.items():
        assert torch.allclose(found[key], weight, atol=1e-5), key


def test_a_lora_counts_as_much_as_its_file_says(
    setup: Setup, unet: Path, adapted: UNet2DConditionModel, tmp_path: Path
) -> None:
    """Alpha over rank, in the metadata of newer files."""
    config = adapted.peft_config["default"].to_dict() | {"lora_alpha": 8}
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(adapted),
        unet_lora_adapter_metadata={key: sorted(v) if isinstance(v, set) else v for key, v in config.items()},
    )
    found = small(unet=str(unet), lcm_lora=str(tmp_path / LORA)).open(setup).pipeline.unet.state_dict()
    for key, weight in merged(unet, tmp_path, 2).items():
        assert torch.allclose(found[key], weight, atol=1e-5), key


def test_a_lora_for_another_network_is_refused(setup: Setup, unet: Path, lora: Path, tmp_path: Path) -> None:
    tensors = load_file(lora / LORA)
    other = {name.replace("down_blocks.1.attentions.0", "down_blocks.1.attentions.7"): w for name, w in tensors.items()}
    assert set(other) != set(tensors)
    save_file(other, tmp_path / LORA)
    with pytest.raises(UserError, match=r"lcm_lora .* weights fit"):
        small(unet=str(unet), lcm_lora=str(tmp_path)).open(setup)


@pytest.mark.parametrize(("settings", "steps"), [({}, 50), ({"lcm_lora": "lora"}, 4), ({"inference_steps": 7}, 7)])
def test_it_is_run_as_its_authors_run_it(settings: dict[str, Any], steps: int, cases: list[Case]) -> None:
    pipeline = Recorder()
    RORemEraser(RORemMethod(**settings), pipeline).erase(cases[:1], [0])
    given = pipeline.given
    assert given["num_inference_steps"] == steps and given["strength"] == 0.99 and given["guidance_scale"] == 1
    assert given["prompt"] == [""] and "negative_prompt" not in given
    assert (given["height"], given["width"]) == (512, 640)


def test_the_network_sees_the_mask_dilated_by_a_square_of_20_pixels(cases: list[Case]) -> None:
    """At the working size of 512: the hole of 10 x 6 pixels of 32 x 40 is 160 x 96 there, before resampling's edge."""
    plain, dilated = Recorder(), Recorder()
    RORemEraser(RORemMethod(dilation=0), plain).erase(cases[:1], [0])
    RORemEraser(RORemMethod(), dilated).erase(cases[:1], [0])
    boxes = [Image.Image.getbbox(recorder.given["mask_image"][0]) for recorder in (plain, dilated)]
    assert boxes[0] is not None and boxes[1] is not None
    grown = [b - a for a, b in zip(*boxes, strict=True)]
    assert grown[2] - grown[0] == 19 and grown[3] - grown[1] == 19
    assert set(np.unique(np.asarray(dilated.given["mask_image"][0]))) == {0, 255}


def test_what_is_not_here_is_said_with_what_to_do(setup: Setup, unet: Path, tmp_path: Path) -> None:
    assert "mild weights pull rorem" in str(RORemMethod().missing(setup))
    assert "no base is named" in str(RORemMethod(unet=str(unet)).missing(Setup("", "", 2, "")))
    assert str(tmp_path / "no") in str(RORemMethod(unet=str(tmp_path / "no")).missing(setup))
    assert "nobody/nothing" in str(RORemMethod(base="nobody/nothing").missing(setup))
    assert str(tmp_path) in str(RORemMethod(unet=str(unet), lcm_lora=str(tmp_path)).missing(setup))
    assert RORemMethod(unet=str(unet)).missing(setup) is None


def test_what_was_pulled_is_used(
    setup: Setup, nano_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: list[Case]
) -> None:
    shutil.copytree(nano_base, tmp_path / "rorem")
    for file in NETWORKS["rorem"].files:
        if not (tmp_path / "rorem" / file.path).exists():
            (tmp_path / "rorem" / file.path).write_text(json.dumps({}))
    monkeypatch.setenv("MILD_WEIGHTS", str(tmp_path))
    assert small().missing(setup) is None
    expected = small(base=nano_base).open(setup).erase(cases, [0, 0])
    assert all(map(np.array_equal, small().open(setup).erase(cases, [0, 0]), expected))


def test_the_fingerprint_knows_weights_and_steps_and_not_where_they_lie(
    setup: Setup, unet: Path, lora: Path, tmp_path: Path
) -> None:
    shutil.copytree(unet, tmp_path / "elsewhere")
    own = small(unet=str(unet)).fingerprint(setup)
    assert small(unet=str(tmp_path / "elsewhere"), name="another").fingerprint(setup) == own
    others: list[dict[str, Any]] = [{"lcm_lora": str(lora)}, {"inference_steps": 3}, {"dilation": 5}, {"prompt": "a"}]
    assert len({own, *(small(unet=str(unet), **other).fingerprint(setup) for other in others)}) == 5
    weights = load_file(unet / WEIGHTS)
    weights["conv_out.bias"] += 1
    save_file(weights, tmp_path / "elsewhere" / WEIGHTS)
    assert small(unet=str(tmp_path / "elsewhere")).fingerprint(setup) != own
    assert set(small(unet=str(unet), lcm_lora=str(lora)).weights(setup)) == {"base", "unet", "lcm_lora"}
