from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torchvision.transforms.functional import gaussian_blur

from dataset_tools.errors import UserError
from mild.evaluation.methods import Case, Setup
from mild.evaluation.methods.attentive_eraser import (
    AttentiveEraserMethod,
    RedirectedAttention,
    Redirection,
    redirect,
    widened,
)
from mild.model.backbone import load_sdxl


@pytest.fixture(scope="module")
def setup(nano_base: str) -> Setup:
    return Setup(base=nano_base, adapters="", inference_steps=2, prompt="a cat")


@pytest.fixture(scope="module")
def text_to_image(nano_base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text-to-image base in the layout of SDXL's: its UNet takes latents alone."""
    parts = load_sdxl(nano_base).components
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, in_channels=4)
    del parts["image_encoder"], parts["feature_extractor"]
    folder = tmp_path_factory.mktemp("base") / "text-to-image"
    StableDiffusionXLPipeline(**parts).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def case() -> Case:
    mask = np.zeros((1, 45, 64), bool)
    mask[0, 10:20, 12:30] = True
    return Case(np.random.default_rng(0).integers(0, 256, (45, 64, 3), np.uint8), mask)


def small(**settings: Any) -> AttentiveEraserMethod:
    return AttentiveEraserMethod(**{"resolution": 32, "inference_steps": 2, "strength": 1} | settings)


def densely(attn: Attention, x: torch.Tensor, mask: torch.Tensor, step: int, steps: int, scale: float) -> torch.Tensor:
    """``AAS_XL.forward`` of the published pipeline for one picture, x (2, N, C), mask (N,), written out."""
    heads, lowest = attn.heads, torch.finfo(x.dtype).min
    outputs = []
    for index, tokens in enumerate(x):
        q, k, v = (
            layer(tokens).reshape(len(tokens), heads, -1).transpose(0, 1) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        sim = q @ k.transpose(1, 2) * attn.scale
        if index == 0:
            out = sim.softmax(-1) @ v
        elif step <= steps:
            bias = mask.masked_fill(mask == 1, lowest)
            background, object_ = (sim + bias).softmax(-1) @ v, (scale * sim + bias).softmax(-1) @ v
            out = object_ * mask[:, None] + background * (1 - mask[:, None])
        else:
            out = (sim + mask.masked_fill(mask == 1, lowest)).softmax(-1) @ v
        outputs.append(attn.to_out[0](out.transpose(0, 1).flatten(1)))
    return torch.stack(outputs)


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("level", [0, 1])
def test_attention_is_redirected_by_the_published_formula(step: int, level: int) -> None:
    """Two pictures at once, in which a hole touches some cells of a coarser level in part; suppression ends at 1."""
    torch.manual_seed(0)
    attn = Attention(query_dim=16, heads=2, dim_head=8).double()
    masks = torch.zeros(2, 1, 5, 8, dtype=torch.bool)
    masks[0, 0, 1:4, 3:6] = masks[1, 0, 4:, :] = True
    redirection = Redirection(steps=1, scale=0.3)
    redirection.begin(masks, levels=2)
    for done in range(step):
        redirection.count(None, done, None, {})
    padded = F.pad(masks.double(), (0, 0, 0, 1))
    tokens = (F.max_pool2d(padded, 2) if level else masks.double()).flatten(1)
    assert 0 < tokens.mean() < 1
    x = 3 * torch.randn(4, tokens.shape[1], 16, dtype=torch.double)
    with torch.no_grad():
        found = RedirectedAttention(redirection)(attn, x)
        for index in range(2):
            expected = densely(attn, x[index::2], tokens[index], step, 1, 0.3)
            assert torch.allclose(found[index::2], expected, atol=1e-9)
        stock = AttnProcessor2_0()(attn, x)
    assert torch.allclose(found[:2], stock[:2], atol=1e-9) and not torch.allclose(found[2:], stock[2:], atol=1e-3)


def test_a_level_that_is_all_hole_attends_evenly_to_everything() -> None:
    """As published, and no NaN."""
    torch.manual_seed(0)
    attn = Attention(query_dim=8, heads=1, dim_head=8)
    redirection = Redirection(steps=9, scale=0.3)
    redirection.begin(torch.ones(1, 1, 2, 2, dtype=torch.bool), levels=1)
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        found = RedirectedAttention(redirection)(attn, x)[1]
        assert torch.allclose(found, attn.to_out[0](attn.to_v(x[1]).mean(0)).expand(4, -1), atol=1e-6)


def test_the_layers_of_sdxl_that_are_redirected_are_34_to_69_of_70() -> None:
    """A UNet of SDXL's blocks, narrow; layers in the order in which they are run."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            in_channels=4,
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[1, 2, 2],
            cross_attention_dim=8,
            norm_num_groups=4,
            use_linear_projection=True,
        )
    redirect(unet, Redirection(9, 0.3))
    layers = [
        module
        for part in (unet.down_blocks, unet.mid_block, unet.up_blocks)
        for name, module in part.named_modules()
        if name.endswith("attn1")
    ]
    redirected = [index for index, layer in enumerate(layers) if isinstance(layer.processor, RedirectedAttention)]
    assert len(layers) == 70 and redirected == list(range(34, 70))
    assert not any(
        isinstance(unet.attn_processors[name], RedirectedAttention) for name in unet.attn_processors if "attn2" in name
    )


def test_what_is_predicted_is_taken_away_from_what_is_predicted_without(setup: Setup, case: Case) -> None:
    """SARG on the inpainting base: without + 9 (redirected - without), of one and the same input, step by step."""
    eraser = small(suppression_steps=0, inference_steps=3).open(setup)
    calls: list[Any] = []
    pipeline, scales = eraser.pipeline, []
    unet, step = pipeline.unet.forward, pipeline.scheduler.step

    def seen(sample: torch.Tensor, *given: Any, **named: Any) -> Any:
        predicted = unet(sample, *given, **named)
        calls.append((sample, named, predicted[0]))
        scales.append(eraser.redirection.scale)
        return predicted

    def taken(predicted: torch.Tensor, *given: Any, **named: Any) -> Any:
        calls[-1] += (predicted,)
        return step(predicted, *given, **named)

    pipeline.unet.forward, pipeline.scheduler.step = seen, taken
    eraser.erase([case], [0])
    assert scales == [0.3, 1, 1]
    for sample, named, predicted, used in calls:
        first, second = sample.chunk(2)
        assert torch.equal(first, second) and sample.shape[1] == 9
        for given in (named["encoder_hidden_states"], *named["added_cond_kwargs"].values()):
            assert torch.equal(*given.chunk(2)) and given.abs().sum() > 0
        without, redirected = predicted.chunk(2)
        assert (redirected - without).abs().max() > 1e-4
        assert torch.allclose(used, without + 9 * (redirected - without), atol=1e-4)


def test_without_redirection_nothing_is_guided(setup: Setup, case: Case) -> None:
    """All that the method adds are its processors: with the stock ones its guidance scale does nothing."""
    weak, strong = (small(guidance_scale=scale).open(setup) for scale in (2, 9))
    assert not np.array_equal(weak.erase([case], [0])[0], strong.erase([case], [0])[0])
    for eraser in (weak, strong):
        eraser.pipeline.unet.set_attn_processor(AttnProcessor2_0())
    difference = weak.erase([case], [0])[0].astype(int) - strong.erase([case], [0])[0]
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("kind", ["inpainting", "text-to-image"])
def test_it_runs_on_both_kinds_of_base_and_says_on_which(
    kind: str, setup: Setup, text_to_image: str, case: Case
) -> None:
    method = small(base=text_to_image if kind == "text-to-image" else "", strength=0.8)
    assert list(method.weights(setup)) == [f"{kind} base"] and method.missing(setup) is None
    eraser = method.open(setup)
    wide = Case(np.tile(case.image, (1, 2, 1)), np.pad(case.masks, ((0, 0), (0, 0), (0, 64))))
    together = eraser.erase([case, wide, case], [1, 2, 3])
    for one, result in zip([case, wide, case], together, strict=True):
        assert np.array_equal(result[~one.hole], one.image[~one.hole])
        assert (result[one.hole] != one.image[one.hole]).any(1).mean() > 0.9
    (alone,) = eraser.erase([case], [3])
    assert np.abs(alone.astype(int) - together[2]).max() <= 1
    assert not np.array_equal(together[0], together[2])


def test_the_schedule_is_the_published_one(setup: Setup) -> None:
    """40 of 50 DDIM steps, from 780 down to 0."""
    pipeline = AttentiveEraserMethod().open(setup).pipeline
    pipeline.scheduler.set_timesteps(50)
    timesteps, count = pipeline.get_timesteps(50, 0.8, "cpu")
    assert timesteps.tolist() == list(range(780, -1, -20)) and count == 40
    assert not pipeline.scheduler.config.clip_sample and not pipeline.scheduler.config.set_alpha_to_one


def test_the_mask_is_widened_as_published() -> None:
    """By torchvision's blur, of 77 pixels at 1024; and then every cell of the latent that it touches."""
    hole = np.zeros((128, 160), bool)
    hole[50:71, 33:90] = True
    blurred = gaussian_blur(torch.from_numpy(hole)[None, None].float(), [9, 9])
    cells = F.max_pool2d((blurred >= 0.1).float(), 8)[0, 0].numpy() > 0
    assert np.array_equal(widened(hole, 8), cells.repeat(8, 0).repeat(8, 1))
    x = np.arange(-38, 39)
    kernel = np.exp(-0.5 * (x / (0.3 * ((77 - 1) * 0.5 - 1) + 0.8)) ** 2)
    reach = np.count_nonzero(np.cumsum(kernel / kernel.sum())[:38] >= 0.1)
    half = np.zeros((1024, 1024), bool)
    half[:, :500] = True
    assert widened(half, 1)[0].sum() == 500 + reach


def test_bases_that_cannot_be_used_are_refused(setup: Setup, nano_base: str, tmp_path: Path) -> None:
    assert "mild weights pull sdxl-base" in str(
        AttentiveEraserMethod(base="stabilityai/stable-diffusion-xl-base-1.0").missing(setup)
    )
    assert "no base is named" in str(AttentiveEraserMethod().missing(Setup("", "", 2, "")))
    shutil.copytree(nano_base, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "unet")
    UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(nano_base, subfolder="unet") | {"in_channels": 5}
    ).save_pretrained(tmp_path / "base" / "unet")
    with pytest.raises(UserError, match="takes 5 channels"):
        small(base=str(tmp_path / "base")).open(setup)
    with pytest.raises(UserError, match="no diffusers pipeline folder"):
        small(base=str(tmp_path)).weights(setup)


def test_the_fingerprint_knows_base_and_settings(setup: Setup, text_to_image: str) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"base": text_to_image},
        {"suppression_scale": 0.5},
        {"suppression_steps": 3},
        {"guidance_scale": 7},
        {"prompt": "a"},
    ]
    assert len({small(**one).fingerprint(setup) for one in settings}) == len(settings)
    assert small(name="another").fingerprint(setup) == small().fingerprint(setup)
