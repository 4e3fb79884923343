from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors import safe_open
from torch.func import functional_call

from dataset_tools.errors import UserError
from dataset_tools.networks import NETWORKS
from dataset_tools.weights import FOLDER_VARIABLE
from mild.model.backbone import (
    BRANCHES,
    activate,
    adapter_layers,
    adapter_parameters,
    add_layered_lora,
    check_channels,
    decode_pictures,
    encode_pictures,
    load_base,
    save_adapters,
)
from mild.settings import LoraSettings

LORA = LoraSettings(rank=2, alpha=3)


def _arguments(dtype: torch.dtype = torch.float32, width: int = 8, pooled: int = 8, side: int = 8) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "sample": draw(2, 9, side, side),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": draw(2, 5, width),
        "added_cond_kwargs": {"text_embeds": draw(2, pooled), "time_ids": draw(2, 6)},
    }


def _nano_arguments() -> dict[str, Any]:
    return _arguments(width=64, pooled=32)


def _randomize(unet: UNet2DConditionModel) -> None:
    """Give both adapters weights that matter: fresh ones have B = 0."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for branch in BRANCHES:
            for parameter in adapter_parameters(unet, branch).values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_adapters_sit_on_queries_keys_and_values_of_every_attention(tiny_unet: UNet2DConditionModel) -> None:
    wanted = {
        name for name, _ in tiny_unet.named_modules() if name.endswith((".to_q", ".to_k", ".to_v")) and ".attn" in name
    }
    add_layered_lora(tiny_unet, LORA, seed=0)
    for branch in BRANCHES:
        parameters = adapter_parameters(tiny_unet, branch)
        assert {name.split(".lora_")[0] for name in parameters} == wanted
        assert {p.shape[0] for name, p in parameters.items() if ".lora_A." in name} == {LORA.rank}
    trained = {name for name, p in tiny_unet.named_parameters() if p.requires_grad}
    assert trained == {*adapter_parameters(tiny_unet, "fg"), *adapter_parameters(tiny_unet, "bg")}


def test_fresh_adapters_change_nothing_and_come_from_the_seed(tiny_unet: UNet2DConditionModel) -> None:
    before = tiny_unet(**_arguments()).sample
    state = torch.random.get_rng_state()
    add_layered_lora(tiny_unet, LORA, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    for branch in BRANCHES:
        activate(adapter_layers(tiny_unet), branch)
        torch.testing.assert_close(tiny_unet(**_arguments()).sample, before, rtol=0, atol=1e-6)
    first = next(iter(adapter_parameters(tiny_unet, "fg").values()))
    other = next(iter(adapter_parameters(tiny_unet, "bg").values()))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_both_branches_are_those_of_two_plain_models(
    tiny_unet: UNet2DConditionModel, checkpointing: bool
) -> None:
    """The reference knows no peft: its attention weights are W + alpha / rank B A, written out, a model a branch."""
    plain = UNet2DConditionModel.from_config(tiny_unet.config)
    plain.load_state_dict(tiny_unet.state_dict())
    plain.double()
    add_layered_lora(tiny_unet.double(), LORA, seed=0)
    _randomize(tiny_unet)
    if checkpointing:
        tiny_unet.enable_gradient_checkpointing()
    tiny_unet.train()
    arguments = _arguments(torch.float64)
    weight = {"bg": 1.0, "fg": 0.25}
    for branch in BRANCHES:
        activate(adapter_layers(tiny_unet), branch)
        (weight[branch] * tiny_unet(**arguments).sample.square().mean()).backward()

    for branch in BRANCHES:
        ours = adapter_parameters(tiny_unet, branch)
        leaves = {name: p.detach().clone().requires_grad_() for name, p in ours.items()}
        weights = dict(plain.named_parameters())
        for name, down in leaves.items():
            if ".lora_A." in name:
                up = leaves[name.replace(".lora_A.", ".lora_B.")]
                layer = name.split(".lora_A.")[0] + ".weight"
                weights[layer] = weights[layer].detach() + LORA.alpha / LORA.rank * up @ down
        output = functional_call(plain, weights, args=(), kwargs=arguments).sample
        expected = torch.autograd.grad(weight[branch] * output.square().mean(), list(leaves.values()))
        assert max(gradient.abs().max().item() for gradient in expected) > 1e-4
        for (name, parameter), gradient in zip(ours.items(), expected, strict=True):
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_one_backward_for_both_branches_loses_no_gradient(tiny_unet: UNet2DConditionModel) -> None:
    """peft's own switch freezes the other adapter, and its gradients would be missing without an error."""
    add_layered_lora(tiny_unet, LORA, seed=0)
    _randomize(tiny_unet)
    losses, expected = [], {}
    for branch in BRANCHES:
        activate(adapter_layers(tiny_unet), branch)
        losses.append(tiny_unet(**_arguments()).sample.square().mean())
        parameters = adapter_parameters(tiny_unet, branch)
        found = torch.autograd.grad(losses[-1], list(parameters.values()), retain_graph=True)
        expected |= dict(zip(parameters, found, strict=True))
    sum(losses).backward()  # type: ignore[union-attr]
    for name, parameter in tiny_unet.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize(("branch", "other"), [("bg", "fg"), ("fg", "bg")])
def test_one_branch_gives_the_other_no_gradient(tiny_unet: UNet2DConditionModel, branch: Any, other: Any) -> None:
    add_layered_lora(tiny_unet, LORA, seed=0)
    _randomize(tiny_unet)
    activate(adapter_layers(tiny_unet), branch)
    tiny_unet(**_arguments()).sample.square().mean().backward()
    assert all(p.grad is None for p in adapter_parameters(tiny_unet, other).values())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter_parameters(tiny_unet, branch).values())


def _add_style(unet: UNet2DConditionModel) -> None:
    """Another LoRA set beside the branches', on layers that they have and on some that they do not."""
    targets = ["to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets), adapter_name="style")
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".style." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("branch", BRANCHES)
@torch.no_grad()
def test_a_style_beside_the_branches_counts_with_its_weight(tiny_unet: UNet2DConditionModel, branch: Any) -> None:
    """The reference is one plain model: each weight is W + alpha / r B A of the branch + 0.5 B A of the style."""
    plain = UNet2DConditionModel.from_config(tiny_unet.config)
    plain.load_state_dict(tiny_unet.state_dict())
    add_layered_lora(tiny_unet, LORA, seed=0)
    _randomize(tiny_unet)
    _add_style(tiny_unet)
    tiny_unet.set_adapters(["bg", "style"], [1.0, 0.5])
    factors, lora = {branch: LORA.alpha / LORA.rank, "style": 0.5}, dict(tiny_unet.named_parameters())
    for name, down in lora.items():
        layer, _, adapter = name.removesuffix(".weight").partition(".lora_A.")
        if adapter in factors:
            plain.get_submodule(layer).weight += factors[adapter] * lora[name.replace("lora_A", "lora_B")] @ down
    for _ in range(2):  # from the other branch, too
        activate(adapter_layers(tiny_unet), "fg" if branch == "bg" else "bg")
        activate(adapter_layers(tiny_unet), branch)
        torch.testing.assert_close(tiny_unet(**_arguments()).sample, plain(**_arguments()).sample)


def test_switching_leaves_trainable_what_was(tiny_unet: UNet2DConditionModel) -> None:
    add_layered_lora(tiny_unet, LORA, seed=0)
    _add_style(tiny_unet)
    for name, parameter in tiny_unet.named_parameters():
        parameter.requires_grad_(".fg." in name)
    for branch in ("fg", "bg", "fg"):
        activate(adapter_layers(tiny_unet), branch)  # type: ignore[arg-type]
        trained = {name for name, parameter in tiny_unet.named_parameters() if parameter.requires_grad}
        assert trained == set(adapter_parameters(tiny_unet, "fg"))


def test_adapters_that_are_fused_into_the_weights_are_refused(tiny_unet: UNet2DConditionModel) -> None:
    add_layered_lora(tiny_unet, LORA, seed=0)
    tiny_unet.fuse_lora()
    with pytest.raises(UserError, match="unfuse_lora"):
        activate(adapter_layers(tiny_unet), "fg")
    tiny_unet.unfuse_lora()
    activate(adapter_layers(tiny_unet), "fg")


def test_latents_are_scaled_by_the_mean_and_deviation_that_a_vae_names(tiny_base: str) -> None:
    """As diffusers' SDXL pipelines for pictures write it: (z - mean) * scaling_factor / std, and back."""
    vae = load_base(tiny_base).vae
    channels = vae.config.latent_channels
    mean, std = [0.1 * number - 0.2 for number in range(channels)], [1.0 + number for number in range(channels)]
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mode()
        decoded = vae.decode(latents).sample
    vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    expected = torch.stack([(latents[:, c] - mean[c]) * 0.5 / std[c] for c in range(channels)], 1)
    torch.testing.assert_close(encode_pictures(vae, pictures), expected)
    torch.testing.assert_close(decode_pictures(vae, expected), decoded)


@pytest.mark.slow
def test_a_stock_pipeline_loads_what_was_saved_and_computes_the_same(nano_base: str, tmp_path: Path) -> None:
    """With alpha other than the rank: a file that does not carry alpha would load with the wrong scale."""
    ours = load_base(nano_base)
    add_layered_lora(ours.unet, LoraSettings(rank=4, alpha=10), seed=0)
    _randomize(ours.unet)
    save_adapters(ours.unet, tmp_path)
    for branch, folder in (("bg", tmp_path), ("fg", tmp_path / "fg")):
        stock = StableDiffusionXLInpaintPipeline.from_pretrained(nano_base)
        without = stock.unet(**_nano_arguments()).sample
        stock.load_lora_weights(str(folder))
        found = stock.unet(**_nano_arguments()).sample
        activate(adapter_layers(ours.unet), branch)  # type: ignore[arg-type]
        torch.testing.assert_close(found, ours.unet(**_nano_arguments()).sample)
        assert (found - without).abs().max() > 1e-3


def test_the_metadata_has_no_order_of_hashes(adapters: Path) -> None:
    """Sets of names, written as they come, would differ from process to process."""
    with safe_open(adapters / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.target_modules"] == ["to_k", "to_q", "to_v"]
    assert metadata["unet.lora_alpha"] == 8


def test_a_missing_base_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_base(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no model_index\.json"):
        load_base(str(tmp_path))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _forget_second_encoder(path: Path) -> None:
    index = json.loads(path.read_text())
    path.write_text(json.dumps({name: part for name, part in index.items() if name != "text_encoder_2"}))


@pytest.mark.parametrize(
    ("name", "spoil", "named"),
    [
        ("unet/diffusion_pytorch_model.safetensors", _truncate, "cannot be loaded"),
        ("text_encoder/model.safetensors", _truncate, "cannot be loaded"),
        ("vae/diffusion_pytorch_model.safetensors", Path.unlink, "cannot be loaded"),
        ("unet/config.json", _truncate, "cannot be loaded"),
        ("model_index.json", _forget_second_encoder, "not of the SDXL family"),
    ],
)
def test_a_broken_base_is_one_clear_line(
    nano_base: str, tmp_path: Path, name: str, spoil: Callable[[Path], None], named: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(nano_base, folder)
    spoil(folder / name)
    with pytest.raises(UserError, match=named) as caught:
        load_base(str(folder))
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"example/no-such-base cannot be loaded.*hub") as caught:
        load_base("example/no-such-base")
    assert "\n" not in str(caught.value)


def test_a_base_that_was_pulled_is_loaded_from_where_it_is(
    tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are those of half precision; the hub is not asked."""
    row = NETWORKS["sdxl-inpainting"]
    folder = tmp_path / row.name
    pulled = load_base(tiny_base, torch_dtype=torch.float16)
    pulled.save_pretrained(folder, variant="fp16")
    for file in row.files:  # what newer tokenizers leave out
        if not (folder / file.path).exists():
            (folder / file.path).write_text("{}")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    weights = [pipeline.unet.conv_in.weight for pipeline in (pulled, load_base(row.hub))]
    assert weights[1].dtype == torch.float32 and torch.equal(weights[0].float(), weights[1])


def test_a_unet_of_a_text_to_image_model_is_refused_with_what_to_use(nano_base: str) -> None:
    with pytest.raises(UserError, match=r"takes 4 channels, erasing needs 9.*stable-diffusion-xl-1\.0-inpainting"):
        check_channels(4, 4, "some/base")
    check_channels(33, 16, "a base with 16 latent channels")


def test_unknown_target_modules_are_named(tiny_unet: UNet2DConditionModel) -> None:
    """One alone, among others that are there."""
    with pytest.raises(UserError, match=r"target_modules.*to_kk; the nearest is to_k"):
        add_layered_lora(tiny_unet, LoraSettings(target_modules=("to_q", "to_kk")), seed=0)
