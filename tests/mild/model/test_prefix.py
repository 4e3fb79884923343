from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from mild.model.prefix import PromptPrefix
from mild.settings import PrefixSettings

FOUR = PrefixSettings(tokens=4)


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _arguments(text: torch.Tensor) -> dict[str, Any]:
    return {
        "sample": _draw(2, 9, 8, 8).to(text.dtype),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": text,
        "added_cond_kwargs": {"text_embeds": _draw(2, 8).to(text.dtype), "time_ids": _draw(2, 6).to(text.dtype)},
    }


def _trained(width: int) -> PromptPrefix:
    prefix = PromptPrefix(width, FOUR)
    with torch.no_grad():
        prefix.delta.copy_(_draw(4, width, seed=3))
    return prefix


def test_an_untrained_prefix_changes_nothing_at_all() -> None:
    text = _draw(2, 9, 8)
    assert torch.equal(PromptPrefix(8, FOUR)(text), text)


def test_a_trained_prefix_changes_the_last_places_alone() -> None:
    text, prefix = _draw(2, 9, 8), _trained(8)
    found = prefix(text)
    assert torch.equal(found[:, :5], text[:, :5])
    for row in range(2):
        for place in range(4):
            assert torch.equal(found[row, 5 + place], text[row, 5 + place] + prefix.delta[place])


def test_cross_attention_does_not_know_where_the_prefix_stands(tiny_unet: UNet2DConditionModel) -> None:
    """The reason why the prefix may take the last places: in front, the UNet would compute the same."""
    text = _trained(8)(_draw(2, 9, 8)).double().detach()
    tiny_unet.double()
    behind = tiny_unet(**_arguments(text)).sample
    before = tiny_unet(**_arguments(torch.cat([text[:, 5:], text[:, :5]], dim=1))).sample
    torch.testing.assert_close(before, behind, rtol=1e-10, atol=1e-10)


def test_gradients_reach_the_prefix_and_nothing_else(tiny_unet: UNet2DConditionModel) -> None:
    tiny_unet.requires_grad_(False)
    prefix, text = PromptPrefix(8, FOUR), _draw(2, 9, 8)
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = (tiny_unet(**_arguments(prefix(text))).sample - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert prefix.delta.grad is not None and prefix.delta.grad.abs().amin(dim=1).min() > 0, "every token learns"
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in tiny_unet.parameters()) and text.grad is None
    assert [name for name, _ in prefix.named_parameters()] == ["delta"]


@pytest.mark.slow
def test_a_stock_pipeline_takes_a_prefix_beside_a_negative_prompt_without(nano_base: str) -> None:
    pipeline = StableDiffusionXLInpaintPipeline.from_pretrained(nano_base)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        text, negative, pooled, negative_pooled = pipeline.encode_prompt("a person", negative_prompt="blurred")

    def run(prompt_embeds: torch.Tensor) -> np.ndarray:
        done = pipeline(
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative, pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=negative_pooled, image=Image.new("RGB", (32, 32)), guidance_scale=4.0,
            mask_image=Image.new("L", (32, 32), 255), height=32, width=32, num_inference_steps=2, output_type="latent",
            generator=torch.Generator().manual_seed(0), strength=1.0,
        )  # fmt: skip
        return done.images.detach().numpy()

    with torch.no_grad():
        plain = run(text)
        assert np.array_equal(run(PromptPrefix(text.shape[2], FOUR)(text)), plain)
        assert np.abs(run(_trained(text.shape[2])(text)) - plain).max() > 1e-5


def test_half_precision_text_stays_half_precision() -> None:
    assert _trained(8)(_draw(2, 9, 8).bfloat16()).dtype == torch.bfloat16


def test_text_that_does_not_fit_is_refused() -> None:
    for shape in [(2, 3, 8), (2, 9, 7)]:
        with pytest.raises(ValueError, match="4 tokens of width 8 does not fit"):
            PromptPrefix(8, FOUR)(_draw(*shape))


def test_settings_and_state_dict_rebuild_the_prefix(tmp_path: Path) -> None:
    prefix = _trained(8)
    save_file(prefix.state_dict(), tmp_path / "prefix.safetensors")
    loaded = PromptPrefix(8, PrefixSettings.model_validate_json(prefix.settings.model_dump_json()))
    loaded.load_state_dict(load_file(tmp_path / "prefix.safetensors"))
    assert torch.equal(loaded(_draw(2, 9, 8)), prefix(_draw(2, 9, 8)))
