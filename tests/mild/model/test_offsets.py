from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch._dynamo.testing import CompileCounterWithBackend

from dataset_tools.errors import UserError
from mild.model.offsets import (
    BoundarySmoothing,
    Offsets,
    SpatialOffset,
    install_offsets,
    on_grid,
    remove_offsets,
)
from mild.settings import OffsetSettings

ALL = OffsetSettings(spatial_offset=True, boundary_smoothing=True, width=4)


def _arguments(dtype: torch.dtype = torch.float32, batch: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "sample": draw(batch, 9, 8, 12),
        "timestep": torch.tensor(300),
        "encoder_hidden_states": draw(batch, 5, 8),
        "added_cond_kwargs": {"text_embeds": draw(batch, 8), "time_ids": draw(batch, 6)},
    }


def _masks(batch: int = 3) -> torch.Tensor:
    masks = torch.zeros(batch, 1, 64, 96)
    for row in range(batch):
        masks[row, :, 16 : 40 + 8 * row, 24:64] = 1
    return masks


def _offsets(unet: UNet2DConditionModel, settings: OffsetSettings = ALL, *, trained: bool = True) -> Offsets:
    offsets = Offsets(unet, settings, seed=0).to(unet.dtype)
    if trained:
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in offsets.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return offsets


def test_masks_come_to_any_grid_as_averages_of_areas() -> None:
    mask = torch.rand(2, 1, 24, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = mask.numpy().reshape(2, 1, 6, 4, 4, 9).mean((3, 5))
    np.testing.assert_allclose(on_grid(mask, (6, 4)), expected, rtol=1e-12)


def test_everything_is_off_by_default(tiny_unet: UNet2DConditionModel) -> None:
    offsets = Offsets(tiny_unet, OffsetSettings(), seed=0)
    before = tiny_unet(**_arguments()).sample
    install_offsets(tiny_unet, offsets)
    assert list(offsets.parameters()) == [] and offsets.hooks == []
    assert torch.equal(tiny_unet(**_arguments()).sample, before)


@pytest.mark.parametrize("part", ["spatial_offset", "boundary_smoothing", None])
def test_untrained_parts_change_nothing_at_all(tiny_unet: UNet2DConditionModel, part: str | None) -> None:
    offsets = Offsets(tiny_unet, ALL if part is None else OffsetSettings(**{part: True}), seed=0)
    before = tiny_unet(**_arguments()).sample
    install_offsets(tiny_unet, offsets)
    with offsets.masks(_masks()):
        assert torch.equal(tiny_unet(**_arguments()).sample, before)


@pytest.mark.parametrize("part", ["spatial_offset", "boundary_smoothing"])
def test_trained_parts_change_the_output_and_removing_them_restores_it(
    tiny_unet: UNet2DConditionModel, part: str
) -> None:
    before, names = tiny_unet(**_arguments()).sample, list(tiny_unet.state_dict())
    offsets = _offsets(tiny_unet, OffsetSettings(**{part: True}))
    install_offsets(tiny_unet, offsets)
    with offsets.masks(_masks()):
        assert (tiny_unet(**_arguments()).sample - before).abs().max() > 1e-4
    assert list(tiny_unet.state_dict()) == names
    remove_offsets(offsets)
    assert torch.equal(tiny_unet(**_arguments()).sample, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_unet.modules())


def test_what_learns_at_first_are_the_zeros_and_then_everything(tiny_unet: UNet2DConditionModel) -> None:
    tiny_unet.requires_grad_(False)
    offsets = _offsets(tiny_unet, trained=False)
    install_offsets(tiny_unet, offsets)

    def learning() -> set[str]:
        offsets.zero_grad()
        with offsets.masks(_masks()):
            tiny_unet(**_arguments()).sample.square().mean().backward()
        return {n for n, p in offsets.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    assert learning() == {name for name, p in offsets.named_parameters() if p.count_nonzero() == 0}
    torch.optim.SGD(offsets.parameters(), lr=1e-2).step()
    assert learning() == {name for name, _ in offsets.named_parameters()}
    assert all(p.grad is None for p in tiny_unet.parameters())


def test_the_spatial_offset_is_added_to_the_noisy_latent_alone(tiny_unet: UNet2DConditionModel) -> None:
    """What the UNet's first layer receives; the offset itself is three convolutions by scipy."""
    tiny_unet.double()
    offsets = _offsets(tiny_unet, OffsetSettings(spatial_offset=True, width=4))
    received = []
    tiny_unet.conv_in.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    install_offsets(tiny_unet, offsets)
    arguments, masks = _arguments(torch.float64), _masks().double()
    with offsets.masks(masks):
        tiny_unet(**arguments)
        tiny_unet(arguments.pop("sample"), **arguments)
    difference = received[0] - _arguments(torch.float64)["sample"]
    assert torch.equal(received[0], received[1]), "the latent may be given by position"
    assert torch.equal(difference[:, 4:], torch.zeros(3, 5, 8, 12, dtype=torch.float64))

    assert isinstance(offsets.offset, SpatialOffset)
    for row in range(3):
        planes = masks[row].numpy().reshape(1, 8, 8, 12, 8).mean((2, 4))
        for layer in (offsets.offset.first, offsets.offset.second, offsets.offset.last):
            weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
            filtered = [
                [ndimage.correlate(*pair, mode="constant") for pair in zip(planes, out, strict=True)] for out in weight
            ]
            planes = np.sum(filtered, axis=1) + bias[:, None, None]
            if layer is not offsets.offset.last:
                planes = planes / (1 + np.exp(-planes))
        np.testing.assert_allclose(difference[row, :4].detach(), planes, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(9, 14), (16, 5)])
def test_smoothing_is_a_mean_in_the_band_around_the_boundary(size: tuple[int, int]) -> None:
    """Against scipy's morphology and its uniform filter."""
    rng = np.random.default_rng(0)
    z, mask = rng.normal(size=(1, 3, *size)), np.zeros((1, 1, *size))
    mask[..., 2:7, 1:4] = 1
    mask[..., 4, 2] = 0.5
    smoothing = BoundarySmoothing(3).double()
    smoothing.gate.data = torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64)
    found = smoothing(torch.from_numpy(z), torch.from_numpy(mask)).detach().numpy()
    plane = mask[0, 0]
    band = ndimage.grey_dilation(plane, (3, 3), mode="nearest") - ndimage.grey_erosion(plane, (3, 3), mode="nearest")
    count = ndimage.uniform_filter(np.ones(size), 3, mode="constant")
    for channel, gate in enumerate((1.0, -0.5, 0.0)):
        blur = ndimage.uniform_filter(z[0, channel], 3, mode="constant") / count
        np.testing.assert_allclose(found[0, channel], gate * band * (blur - z[0, channel]), atol=1e-12)
    assert np.abs(found).max() > 0.1
    assert np.abs(found[..., 9:, :]).max(initial=0) == 0 and np.abs(found[..., 6:]).max(initial=0) == 0


def test_smoothing_leaves_flat_features_and_pictures_without_boundary_alone() -> None:
    smoothing = BoundarySmoothing(2)
    torch.nn.init.ones_(smoothing.gate)
    flat = torch.full((1, 2, 6, 7), 3.0)
    mask = torch.zeros(1, 1, 6, 7)
    mask[..., 2:4, 2:5] = 1
    torch.testing.assert_close(smoothing(flat, mask), torch.zeros_like(flat), rtol=0, atol=1e-6)
    for everywhere in (0.0, 0.5, 1.0):
        assert smoothing(torch.rand(1, 2, 6, 7), torch.full((1, 1, 6, 7), everywhere)).abs().max() == 0


def test_each_spatial_transformer_gets_its_own_parts(tiny_unet: UNet2DConditionModel) -> None:
    offsets = _offsets(tiny_unet, trained=False)
    names = [name for name, module in tiny_unet.named_modules() if type(module).__name__ == "Transformer2DModel"]
    assert [key.replace("/", ".") for key in offsets.smoothings] == names and len(names) >= 3
    before = tiny_unet(**_arguments()).sample
    install_offsets(tiny_unet, offsets)
    zeros = [p for p in offsets.parameters() if p.count_nonzero() == 0 and p.ndim in (1, 4) and p.shape[0] == 16]
    assert len(zeros) == len(names)
    for parameter in zeros:
        with torch.no_grad():
            parameter.fill_(1)
        with offsets.masks(_masks()):
            assert (tiny_unet(**_arguments()).sample - before).abs().max() > 1e-6
        with torch.no_grad():
            parameter.zero_()


def test_a_batch_that_holds_the_rows_twice_is_two_calls(tiny_unet: UNet2DConditionModel) -> None:
    """As classifier-free guidance does."""
    offsets = _offsets(tiny_unet.double())
    install_offsets(tiny_unet, offsets)
    twice = _arguments(torch.float64, batch=6)
    halves = [
        {key: value[part] for key, value in twice.items() if key in ("sample", "encoder_hidden_states")}
        | {"timestep": twice["timestep"]}
        | {"added_cond_kwargs": {key: value[part] for key, value in twice["added_cond_kwargs"].items()}}
        for part in (slice(3), slice(3, 6))
    ]
    with offsets.masks(_masks()):
        found = tiny_unet(**twice).sample
        expected = torch.cat([tiny_unet(**half).sample for half in halves])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_gradients_with_checkpointing_are_those_without(tiny_unet: UNet2DConditionModel) -> None:
    """One backward pass, outside of the contexts of two forward passes with different masks."""
    tiny_unet.double().train()
    offsets = _offsets(tiny_unet)
    install_offsets(tiny_unet, offsets)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny_unet.enable_gradient_checkpointing()
        loss = torch.zeros((), dtype=torch.float64)
        for mask in (_masks(), 1 - _masks().flip(-1)):
            with offsets.masks(mask):
                loss = loss + tiny_unet(**_arguments(torch.float64)).sample.square().mean()
        gradients.append(torch.autograd.grad(loss, list(offsets.parameters())))
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_compute_the_same_in_one_graph_for_all_masks(tiny_unet: UNet2DConditionModel) -> None:
    """The middle block, with residual blocks around its spatial transformer."""
    offsets = _offsets(tiny_unet)
    install_offsets(tiny_unet, offsets)
    inputs = _arguments()["sample"].repeat(1, 2, 1, 1)[:, :16], torch.ones(3, 32)
    text = _arguments()["encoder_hidden_states"]
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(tiny_unet.mid_block, fullgraph=True, backend=graphs)
    found = []
    for mask in (_masks(), _masks().flip(-1)):
        with offsets.masks(mask):
            found.append(compiled(*inputs, encoder_hidden_states=text))
            torch.testing.assert_close(found[-1], tiny_unet.mid_block(*inputs, encoder_hidden_states=text))
    assert not torch.allclose(*found)
    assert graphs.frame_count == 1


def test_half_precision_works_with_offsets_in_float32(tiny_unet: UNet2DConditionModel) -> None:
    offsets = _offsets(tiny_unet)
    with torch.no_grad():
        for parameter in offsets.parameters():
            parameter.mul_(0.2)
    install_offsets(tiny_unet, offsets)
    with offsets.masks(_masks()):
        exact = tiny_unet(**_arguments()).sample
        tiny_unet.to(torch.bfloat16)
        found = tiny_unet(**_arguments(torch.bfloat16)).sample
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_a_call_without_what_is_needed_is_refused(tiny_unet: UNet2DConditionModel) -> None:
    offsets = _offsets(tiny_unet)
    install_offsets(tiny_unet, offsets)
    with pytest.raises(ValueError, match="needs masks for its batch of 3"):
        tiny_unet(**_arguments())
    with pytest.raises(ValueError, match="needs masks"), offsets.masks(_masks(2)):
        tiny_unet(**_arguments())
    with pytest.raises(ValueError, match="mask must be"), offsets.masks(_masks()[:, 0]):
        pass


def test_an_inner_context_ends_with_itself(tiny_unet: UNet2DConditionModel) -> None:
    offsets = _offsets(tiny_unet)
    install_offsets(tiny_unet, offsets)
    with offsets.masks(_masks()):
        outer = tiny_unet(**_arguments()).sample
        with contextlib.suppress(KeyError), offsets.masks(1 - _masks()):
            assert not torch.equal(tiny_unet(**_arguments()).sample, outer)
            raise KeyError
        assert torch.equal(tiny_unet(**_arguments()).sample, outer)
    with pytest.raises(ValueError, match="needs masks"):
        tiny_unet(**_arguments())


def test_what_does_not_fit_is_refused(tiny_unet: UNet2DConditionModel) -> None:
    offsets = _offsets(tiny_unet)
    wider = UNet2DConditionModel.from_config({**tiny_unet.config, "block_out_channels": (8, 32)})
    with pytest.raises(UserError, match="made for another base"):
        install_offsets(wider, offsets)
    install_offsets(tiny_unet, offsets)
    with pytest.raises(ValueError, match="installed already"):
        install_offsets(tiny_unet, offsets)


def test_settings_and_state_dict_rebuild_the_offsets(tiny_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    offsets = _offsets(tiny_unet)
    save_file(offsets.state_dict(), tmp_path / "offsets.safetensors")
    settings = OffsetSettings.model_validate_json(offsets.settings.model_dump_json())
    loaded = Offsets(tiny_unet, settings, seed=8)
    loaded.load_state_dict(load_file(tmp_path / "offsets.safetensors"))
    outputs = []
    for one in (offsets, loaded):
        install_offsets(tiny_unet, one)
        with one.masks(_masks()):
            outputs.append(tiny_unet(**_arguments()).sample)
        remove_offsets(one)
    assert torch.equal(*outputs)
