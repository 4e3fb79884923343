"""The heads that say how far people reach."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from dataset_tools.errors import UserError
from mild.model.extents import Extents, install_extents, remove_extents
from mild.model.layered import LayeredUNet
from mild.settings import ExtentsSettings, MildSettings


def _run(unet: UNet2DConditionModel, rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn((rows, 3, unet.config.cross_attention_dim), generator=generator)
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    added = {"text_embeds": torch.zeros(rows, width), "time_ids": torch.zeros(rows, 6)}
    given = torch.randn((rows, unet.config.in_channels, 8, 12), generator=generator)
    output: torch.Tensor = unet(given, 9, encoder_hidden_states=text, added_cond_kwargs=added).sample
    return output


@torch.no_grad()
def test_fresh_heads_say_one_half_everywhere_and_leave_the_unet_alone(
    make_unet: Callable[[], UNet2DConditionModel],
) -> None:
    unet = make_unet()
    before = _run(unet)
    extents = Extents(unet, ExtentsSettings(width=8), seed=0)
    install_extents(unet, extents)
    assert torch.equal(_run(unet), before)
    assert torch.equal(extents.logits("bg", (32, 48)), torch.zeros(2, 1, 32, 48))
    remove_extents(extents)
    assert torch.equal(_run(unet), before)
    with pytest.raises(ValueError, match="after a forward pass"):
        extents.logits("bg", (32, 48))


@torch.no_grad()
def test_a_head_is_two_convolutions_of_what_the_last_layer_reads(
    make_unet: Callable[[], UNet2DConditionModel],
) -> None:
    """Worked out from the input of ``conv_out``: answer (y, x) of a cell is channel ``detail * y + x``."""
    unet = make_unet()
    extents = Extents(unet, ExtentsSettings(width=8, detail=2), seed=3)
    for parameter in extents.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    install_extents(unet, extents)
    read = []
    unet.conv_out.register_forward_pre_hook(lambda layer, given: read.append(given[0]))
    for branch in ("fg", "bg"):
        _run(unet)
        first, _, second = extents.heads[branch]  # type: ignore[misc]
        hidden = F.conv2d(read[-1], first.weight, first.bias, padding=1)
        found = F.conv2d(hidden * hidden.sigmoid(), second.weight, second.bias, padding=1)
        expected = torch.zeros(2, 1, 16, 24)
        for y in range(2):
            for x in range(2):
                expected[:, 0, y::2, x::2] = found[:, 2 * y + x]
        logits = extents.logits(branch, (16, 24))  # type: ignore[arg-type]
        torch.testing.assert_close(logits, expected)


def test_heads_of_another_unet_are_refused(make_unet: Callable[[], UNet2DConditionModel]) -> None:
    unet = make_unet()
    extents = Extents(unet, ExtentsSettings(width=8), seed=0)
    unet.conv_out = torch.nn.Conv2d(unet.conv_out.in_channels + 1, 4, 3)
    with pytest.raises(UserError, match="another base"):
        install_extents(unet, extents)


def test_each_branch_trains_its_own_head_and_its_adapter(make_unet: Callable[[], UNet2DConditionModel]) -> None:
    layered = LayeredUNet.create(make_unet(), MildSettings(sma=False, hmg=None), seed=0)
    assert layered.extents is not None
    with torch.no_grad():
        for parameter in layered.extents.parameters():
            parameter += 0.1
    with layered.branch("fg", torch.ones(2, 1, 32, 48)):
        _run(layered.unet)
        layered.extents.logits("fg", (32, 48)).sum().backward()
    reached = {name.split(".")[1] for name, p in layered.extents.named_parameters() if p.grad is not None}
    assert reached == {"fg"}
    adapters = {name for name, p in layered.unet.named_parameters() if p.grad is not None and p.grad.any()}
    assert adapters and all(".fg." in name for name in adapters)
