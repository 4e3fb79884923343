from __future__ import annotations

import base64
import filecmp
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from dataset_tools.errors import UserError
from mild.bases import NANO
from mild.model.backbone import BRANCHES, Branch, adapter_layers, adapter_parameters, load_base
from mild.model.cues import CHANNELS, Cue
from mild.model.layered import LayeredUNet, push_to_hub
from mild.model.saved import read_config
from mild.settings import HmgSettings, LoraSettings, MildSettings, OffsetSettings, PrefixSettings

SMALL = HmgSettings(grid=2, width=8, map_side=16)
ALL = MildSettings(
    lora=LoraSettings(rank=2, alpha=3),
    hmg=SMALL,
    offsets=OffsetSettings(spatial_offset=True, boundary_smoothing=True, width=4),
    prefix=PrefixSettings(tokens=2),
)
ADAPTERS_ONLY = MildSettings(lora=LoraSettings(rank=2, alpha=3), sma=False, hmg=None, extents=None)
WEIGHTS = "pytorch_lora_weights.safetensors"
FILES = [WEIGHTS, f"fg/{WEIGHTS}", *(f"{part}.safetensors" for part in ("sma", "hmg", "offsets", "prefix", "extents"))]


def _draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _arguments(unet: UNet2DConditionModel, rows: int = 2, copies: int = 1) -> dict[str, Any]:
    """Of ``rows`` rows, each ``copies`` times over; texts differ between the copies."""
    count, config = rows * copies, unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": _draw(rows, 9, 8, 12).repeat(copies, 1, 1, 1).to(unet.dtype),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": _draw(count, 5, config.cross_attention_dim).to(unet.dtype),
        "added_cond_kwargs": {
            "text_embeds": _draw(count, pooled, seed=2).to(unet.dtype),
            "time_ids": _draw(count, 6, seed=3).to(unet.dtype),
        },
    }


def _masks(rows: int = 2) -> torch.Tensor:
    masks = torch.zeros(rows, 1, 16, 24)
    for row in range(rows):
        masks[row, :, 3 + row : 11, 4 + 6 * row : 12 + 6 * row] = 1
    return masks


def _cues(rows: int = 2) -> dict[str, Cue]:
    generator = torch.Generator().manual_seed(0)
    present = torch.ones(rows, dtype=torch.bool)
    names = {"pose": "pose", "parsing": "parsing", "masks": "others"}
    return {
        names[cue]: Cue(torch.rand(rows, channels, 12, 16, generator=generator), present)
        for cue, channels in CHANNELS.items()
    }


def _given(branch: Branch, rows: int = 2) -> dict[str, Any]:
    """Everything that a branch can be given."""
    cues: dict[str, Any] = _cues(rows)
    if branch == "bg":
        del cues["others"]
    return {"masks": _masks(rows), **cues}


def _randomize(layered: LayeredUNet) -> None:
    """Give every parameter a value that matters; fresh ones are zero at some place in each part."""
    generator = torch.Generator().manual_seed(7)
    trained = [p for branch in BRANCHES for p in adapter_parameters(layered.unet, branch).values()]
    trained += [p for part in layered.parts().values() for p in part.parameters()]
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        if layered.sma is not None:
            for alpha in layered.sma.parameters():
                alpha.copy_(torch.tensor([[1.0, -2.0], [-1.5, 0.5]]))


def _layered(unet: UNet2DConditionModel, settings: MildSettings = ALL) -> LayeredUNet:
    layered = LayeredUNet.create(unet, settings, seed=0)
    for part in layered.parts().values():
        part.to(unet.dtype)
    _randomize(layered)
    return layered


def _run(layered: LayeredUNet, branch: Branch, *, guidance: bool = False, **changes: Any) -> torch.Tensor:
    given = _given(branch) | changes
    arguments = _arguments(layered.unet, rows=len(given["masks"]), copies=1 + guidance)
    text = arguments["encoder_hidden_states"]
    negative, positive = text[: len(text) - len(given["masks"])], text[-len(given["masks"]) :]
    with layered.branch(branch, guidance=guidance, **given):
        arguments["encoder_hidden_states"] = torch.cat([negative, layered.text(positive)])
        output: torch.Tensor = layered.unet(**arguments).sample
    return output


# Running


def test_layers_are_looked_for_once_and_again_when_another_set_of_adapters_has_come(
    tiny_unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A style on layers of its own, which were switched off with all others."""
    found: list[int] = []

    def counted(unet: UNet2DConditionModel) -> list[Any]:
        layers = adapter_layers(unet)
        found.append(len(layers))
        return layers

    monkeypatch.setattr("mild.model.layered.adapter_layers", counted)
    layered = LayeredUNet.create(tiny_unet, ADAPTERS_ONLY, seed=0)
    for branch in (*BRANCHES, *BRANCHES):
        with layered.branch(branch, _masks(1)):
            assert {layer.active_adapter[0] for layer in adapter_layers(tiny_unet)} == {branch}
    tiny_unet.add_adapter(LoraConfig(r=1, target_modules=["to_v", "to_out.0"]), adapter_name="style")
    tiny_unet.set_adapters(["bg", "style"])
    tiny_unet.disable_adapters()
    with layered.branch("fg", _masks(1)):
        layers = adapter_layers(tiny_unet)
        assert {tuple(layer.active_adapters) for layer in layers} == {("fg", "style")}
        assert not any(layer.disable_adapters for layer in layers)
    assert len(found) == 2 and found[0] < found[1] == len(layers)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("settings", [ALL, MildSettings(hmg=SMALL), ADAPTERS_ONLY])
def test_fresh_parts_change_nothing(tiny_unet: UNet2DConditionModel, settings: MildSettings, branch: Branch) -> None:
    before = tiny_unet(**_arguments(tiny_unet)).sample
    layered = LayeredUNet.create(tiny_unet, settings, seed=3)
    cues = {} if settings.hmg is not None else dict.fromkeys(("pose", "parsing", "others"))
    torch.testing.assert_close(_run(layered, branch, **cues), before, rtol=0, atol=1e-6)
    guided = _run(layered, branch, guidance=True, **cues)
    layered.remove()
    torch.testing.assert_close(guided, tiny_unet(**_arguments(tiny_unet, copies=2)).sample, rtol=0, atol=1e-6)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("part", ["adapter", "sma", "hmg", "offsets", "prefix"])
@torch.no_grad()
def test_every_part_has_an_effect(tiny_unet: UNet2DConditionModel, part: str, branch: Branch) -> None:
    layered = _layered(tiny_unet)
    trained = _run(layered, branch)
    parameters = (
        adapter_parameters(tiny_unet, branch).values() if part == "adapter" else layered.parts()[part].parameters()
    )
    for parameter in parameters:
        parameter.zero_()
    assert (_run(layered, branch) - trained).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("branch", "given"),
    [
        *((branch, given) for branch in BRANCHES for given in ("masks", "pose", "parsing")),
        ("fg", "others"),
    ],
)
@torch.no_grad()
def test_all_that_a_branch_is_given_matters(tiny_unet: UNet2DConditionModel, branch: Branch, given: str) -> None:
    layered = _layered(tiny_unet)
    other = {"masks": _masks().flip(-1)}.get(given)
    assert (_run(layered, branch) - _run(layered, branch, **{given: other})).abs().max() > 1e-3


@torch.no_grad()
def test_the_branches_differ_by_their_adapters(tiny_unet: UNet2DConditionModel) -> None:
    layered = _layered(tiny_unet, ADAPTERS_ONLY)
    none = dict.fromkeys(("pose", "parsing", "others"))
    before, background = _run(layered, "fg", **none), _run(layered, "bg", **none)
    assert (before - background).abs().max() > 1e-3
    assert torch.equal(_run(layered, "fg", **none), before)


@torch.no_grad()
def test_a_branch_computes_with_its_adapter_where_adapters_were_switched_off(tiny_unet: UNet2DConditionModel) -> None:
    layered = _layered(tiny_unet)
    expected = _run(layered, "bg")
    tiny_unet.disable_adapters()
    assert torch.equal(_run(layered, "bg"), expected)


@pytest.mark.parametrize(
    ("replace", "by"),
    [
        (lambda unet: unet.set_attention_slice("max"), "SlicedAttnProcessor"),
        (lambda unet: unet.fuse_qkv_projections(), "FusedAttnProcessor2_0"),
    ],
)
@torch.no_grad()
def test_attention_that_is_replaced_under_mild_is_refused_and_never_silence(
    tiny_unet: UNet2DConditionModel, replace: Callable[[Any], None], by: str
) -> None:
    layered = _layered(tiny_unet)
    replace(tiny_unet)
    with pytest.raises(UserError, match=f"replaced by {by}"):
        _run(layered, "bg")


@pytest.mark.parametrize("branch", BRANCHES)
@torch.no_grad()
def test_guidance_runs_negative_rows_without_cues_and_prompts_with_them(
    tiny_unet: UNet2DConditionModel, branch: Branch
) -> None:
    """The reference runs the two halves one after the other."""
    layered = _layered(tiny_unet.double())
    given = _given(branch)
    arguments = _arguments(tiny_unet, copies=2)
    halves = []
    for half, cues in ((slice(0, 2), dict.fromkeys(("pose", "parsing", "others"))), (slice(2, 4), {})):
        rows = {"sample": arguments["sample"][half], "timestep": arguments["timestep"]}
        rows["encoder_hidden_states"] = arguments["encoder_hidden_states"][half]
        rows["added_cond_kwargs"] = {name: value[half] for name, value in arguments["added_cond_kwargs"].items()}
        with layered.branch(branch, **(given | cues)):
            halves.append(tiny_unet(**rows).sample)
    with layered.branch(branch, guidance=True, **given):
        found = tiny_unet(**arguments).sample
    torch.testing.assert_close(found, torch.cat(halves), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_people_of_different_pictures_run_as_one_batch_as_they_do_alone(tiny_unet: UNet2DConditionModel) -> None:
    layered = _layered(tiny_unet.double())
    given, arguments = _given("fg"), _arguments(tiny_unet)
    with layered.branch("fg", **given):
        together = tiny_unet(**arguments).sample
    for row in range(2):
        one = slice(row, row + 1)
        alone = {
            name: Cue(value.maps[one], value.present[one]) if isinstance(value, Cue) else value[one]
            for name, value in given.items()
        }
        with layered.branch("fg", **alone):
            found = tiny_unet(
                arguments["sample"][one],
                arguments["timestep"],
                arguments["encoder_hidden_states"][one],
                added_cond_kwargs={name: value[one] for name, value in arguments["added_cond_kwargs"].items()},
            ).sample
        torch.testing.assert_close(found, together[one], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_unet_in_half_precision_takes_parts_in_float32(tiny_unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    layered = LayeredUNet.create(tiny_unet, ALL, seed=0)
    _randomize(layered)
    expected = _run(layered, "fg")
    tiny_unet.to(dtype)
    found = _run(layered, "fg")
    assert found.dtype == dtype
    assert {p.dtype for part in layered.parts().values() for p in part.parameters()} == {torch.float32}
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("part", ["sma", "hmg"])
@torch.no_grad()
def test_a_part_that_is_left_out_is_as_if_it_had_never_been_there(
    tiny_unet: UNet2DConditionModel, make_unet: Callable[[], UNet2DConditionModel], part: Any, branch: Branch
) -> None:
    """The reference is a model without the part that has all other weights of this one."""
    layered = _layered(tiny_unet)
    without = {"sma": {"sma": False}, "hmg": {"hmg": None}}[part]
    reference = LayeredUNet.create(make_unet(), ALL.model_copy(update=without), seed=0)
    for name, tensors in reference._tensors().items():
        for key, tensor in tensors.items():
            tensor.copy_(layered._tensors()[name][key])
    cues = dict.fromkeys(("pose", "parsing", "others")) if part == "hmg" else {}
    before = _run(layered, branch)
    layered.leave_out(part)
    found = _run(layered, branch, **cues)
    assert torch.equal(found, _run(reference, branch, **cues))
    assert not torch.equal(found, before)
    assert part not in layered.parts()
    layered.leave_out(part)
    assert torch.equal(_run(layered, branch, **cues), found), "once more is nothing"


@torch.no_grad()
def test_a_unet_can_be_given_back_after_parts_were_left_out(tiny_unet: UNet2DConditionModel) -> None:
    output, processors = tiny_unet(**_arguments(tiny_unet)).sample, dict(tiny_unet.attn_processors)
    layered = _layered(tiny_unet)
    layered.leave_out("hmg")
    layered.leave_out("sma")
    layered.remove()
    assert torch.equal(tiny_unet(**_arguments(tiny_unet)).sample, output)
    assert all(tiny_unet.attn_processors[name] is processor for name, processor in processors.items())


# Training


@pytest.mark.parametrize("branch", BRANCHES)
def test_gradients_reach_every_part_and_checkpointing_does_not_change_them(
    tiny_unet: UNet2DConditionModel, branch: Branch
) -> None:
    """The backward pass comes after the context."""
    layered = _layered(tiny_unet.double())
    tiny_unet.train()
    named = dict(adapter_parameters(tiny_unet, branch))
    # The extents say something beside the output.
    parts = {part: module for part, module in layered.parts().items() if part != "extents"}
    named |= {f"{part}.{n}": p for part, module in parts.items() for n, p in module.named_parameters()}
    found = []
    for _ in range(2):
        loss = _run(layered, branch).square().mean()
        found.append(torch.autograd.grad(loss, list(named.values()), allow_unused=True))
        tiny_unet.enable_gradient_checkpointing()
    unused = {name for name, gradient in zip(named, found[0], strict=True) if gradient is None}
    assert unused == ({name for name in named if ".masks" in name} if branch == "bg" else set())
    for name, plain, checkpointed in zip(named, *found, strict=True):
        if plain is not None:
            torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-14, msg=name)
    largest = dict.fromkeys(("adapter", *parts), 0.0)
    for name, gradient in zip(named, found[0], strict=True):
        if gradient is not None:
            owner = name.partition(".")[0] if name.partition(".")[0] in largest else "adapter"
            largest[owner] = max(largest[owner], gradient.abs().max().item())
    assert min(largest.values()) > 1e-6, largest


@pytest.mark.parametrize(("branch", "other"), [("bg", "fg"), ("fg", "bg")])
def test_the_loss_of_one_branch_gives_the_others_adapter_no_gradient(
    tiny_unet: UNet2DConditionModel, branch: Branch, other: Branch
) -> None:
    layered = _layered(tiny_unet)
    _run(layered, branch).square().mean().backward()
    assert all(p.grad is None for p in adapter_parameters(tiny_unet, other).values())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter_parameters(tiny_unet, branch).values())


def test_what_is_trained_is_the_adapters_and_the_parts_alone(tiny_unet: UNet2DConditionModel) -> None:
    layered = _layered(tiny_unet)
    for branch in BRANCHES:
        _run(layered, branch).square().mean().backward()
    touched = {name for name, parameter in tiny_unet.named_parameters() if parameter.grad is not None}
    assert touched == {name for branch in BRANCHES for name in adapter_parameters(tiny_unet, branch)}


def test_projection_enforces_the_constraints_of_sma(tiny_unet: UNet2DConditionModel) -> None:
    layered = LayeredUNet.create(tiny_unet, ALL, seed=0)
    assert layered.sma is not None
    with torch.no_grad():
        for alpha in layered.sma.parameters():
            alpha.copy_(torch.tensor([[-1.0, -2.0], [3.0, 4.0]]))
    layered.project_()
    for alpha in layered.sma.parameters():
        assert alpha.tolist() == [[0, -2], [0, 4]]
    LayeredUNet.create(UNet2DConditionModel.from_config(tiny_unet.config), ADAPTERS_ONLY, seed=0).project_()


def test_sma_without_its_constraints_stays_where_they_forbid_also_when_loaded_and_projected(
    tiny_unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    forbidden = torch.tensor([[-1.0, 2.0], [3.0, -4.0]])
    free = ADAPTERS_ONLY.model_copy(update={"sma": True, "sma_constraints": False})
    layered = LayeredUNet.create(tiny_unet, free, seed=0)
    assert layered.sma is not None
    with torch.no_grad():
        for alpha in layered.sma.parameters():
            alpha.copy_(forbidden)
    layered.save(tmp_path, base="some/base", resolution=96, inference_steps=4, record={})
    assert "not held to the signs" in (tmp_path / "README.md").read_text()
    layered.remove()
    loaded = LayeredUNet.load(tiny_unet, tmp_path)
    loaded.project_()
    assert loaded.sma is not None and all(torch.equal(alpha, forbidden) for alpha in loaded.sma.parameters())


# Installing


def test_removing_leaves_the_unet_as_it_was_and_it_can_be_layered_again(tiny_unet: UNet2DConditionModel) -> None:
    output = tiny_unet(**_arguments(tiny_unet)).sample
    weights = {name: tensor.clone() for name, tensor in tiny_unet.state_dict().items()}
    processors = dict(tiny_unet.attn_processors)
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in tiny_unet.modules())
    tiny_unet.conv_in.requires_grad_(False)
    layered = _layered(tiny_unet)
    with pytest.raises(ValueError, match="already"):
        LayeredUNet.create(tiny_unet, ADAPTERS_ONLY, seed=0)
    layered.remove()
    assert torch.equal(tiny_unet(**_arguments(tiny_unet)).sample, output)
    assert tiny_unet.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tiny_unet.state_dict().items())
    assert all(tiny_unet.attn_processors[name] is processor for name, processor in processors.items())
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in tiny_unet.modules()) == hooks
    frozen = {name for name, parameter in tiny_unet.named_parameters() if not parameter.requires_grad}
    assert frozen == {"conv_in.weight", "conv_in.bias"}
    assert not torch.equal(_run(_layered(tiny_unet), "bg"), output)


@pytest.mark.parametrize("taken", [["fg", "bg"], ["bg"], ["fg"]])
def test_branches_that_were_taken_off_are_missed(
    tiny_unet: UNet2DConditionModel, taken: list[str], tmp_path: Path
) -> None:
    """As diffusers' ``unload_lora_weights`` takes off all adapters, and not a style's alone."""
    layered = _layered(tiny_unet)
    tiny_unet.delete_adapters(taken)
    masks = torch.ones(1, 1, 64, 64)
    with pytest.raises(UserError, match="adapters were taken off"), layered.branch("bg", masks):
        pass
    with pytest.raises(UserError, match="adapters were taken off"):
        layered.save(tmp_path, base="base", resolution=64, inference_steps=1, record={})


@pytest.mark.filterwarnings("ignore:Adapter bg was active")
def test_another_adapter_of_the_unet_survives_removal(tiny_unet: UNet2DConditionModel) -> None:
    tiny_unet.add_adapter(LoraConfig(r=1, target_modules=["to_q"]), adapter_name="style")
    _layered(tiny_unet).remove()
    assert list(tiny_unet.peft_config) == ["style"]


def test_a_setting_that_does_not_fit_leaves_the_unet_as_it_was(tiny_unet: UNet2DConditionModel) -> None:
    names = list(tiny_unet.state_dict())
    with pytest.raises(UserError, match=r"target_modules"):
        LayeredUNet.create(tiny_unet, MildSettings(lora=LoraSettings(target_modules=("nothing",))), seed=0)
    assert list(tiny_unet.state_dict()) == names
    assert all(parameter.requires_grad for parameter in tiny_unet.parameters())
    LayeredUNet.create(tiny_unet, ALL, seed=0)


def test_the_seed_decides_the_initial_weights(tiny_unet: UNet2DConditionModel) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        layered = LayeredUNet.create(tiny_unet, ALL, seed=seed)
        found = {n: p.clone() for branch in BRANCHES for n, p in adapter_parameters(tiny_unet, branch).items()}
        found |= {f"{name}.{n}": p for name, part in layered.parts().items() for n, p in part.state_dict().items()}
        layered.remove()
        return found

    first, same, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], other[name])}
    assert {"hmg", "offsets", "down_blocks"} <= changed


def test_cues_for_a_model_without_hmg_are_refused(tiny_unet: UNet2DConditionModel) -> None:
    layered = LayeredUNet.create(tiny_unet, ADAPTERS_ONLY, seed=0)
    with pytest.raises(ValueError, match="no HMG"), layered.branch("bg", _masks(), pose=_cues()["pose"]):
        pass


# Saving and loading


def _save(layered: LayeredUNet, folder: Path, **record: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    layered.save(folder, base="some/base", resolution=96, inference_steps=4, record=record, about="- Data: drawn\n")
    return folder


@pytest.fixture(scope="module")
def saved(make_unet: Callable[[], UNet2DConditionModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every part; not to be changed."""
    return _save(_layered(make_unet()), tmp_path_factory.mktemp("saved") / "model")


def test_a_loaded_model_computes_what_the_saved_one_did(
    tiny_unet: UNet2DConditionModel, make_unet: Callable[[], UNet2DConditionModel], tmp_path: Path
) -> None:
    layered = _layered(tiny_unet)
    _save(layered, tmp_path, dataset="0123", settings={"steps": 3})
    loaded = LayeredUNet.load(make_unet(), tmp_path)
    for branch in BRANCHES:
        assert torch.equal(_run(loaded, branch), _run(layered, branch))
    assert (loaded.settings, loaded.resolution, loaded.inference_steps) == (ALL, 96, 4)
    config = json.loads((tmp_path / "mild.json").read_text())
    assert (config["format"], config["base"]) == (3, "some/base")
    assert (config["dataset"], config["settings"]) == ("0123", {"steps": 3})
    names = [*FILES, "mild.json", "README.md"]
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(names)
    _save(loaded, tmp_path / "again", dataset="0123", settings={"steps": 3})
    assert filecmp.cmpfiles(tmp_path, tmp_path / "again", names, shallow=False)[0] == names, "equal bytes"


@pytest.mark.parametrize("cue", ["pose", "parsing"])
@torch.no_grad()
def test_a_model_of_one_cue_is_loaded_and_computes_without_the_other(
    tiny_unet: UNet2DConditionModel, make_unet: Callable[[], UNet2DConditionModel], tmp_path: Path, cue: Any
) -> None:
    settings = ALL.model_copy(update={"hmg": SMALL.model_copy(update={"cues": (cue,)})})
    _save(_layered(tiny_unet, settings), tmp_path)
    loaded = LayeredUNet.load(make_unet(), tmp_path)
    assert loaded.settings == settings
    other = "parsing" if cue == "pose" else "pose"
    names = {name.split(".")[1] for name in load_file(tmp_path / "hmg.safetensors") if name.startswith("stems.")}
    assert names == {cue, "masks"}
    for branch in BRANCHES:
        found = _run(loaded, branch)
        assert torch.equal(_run(loaded, branch, **{other: None}), found)
        assert (_run(loaded, branch, **{cue: None}) - found).abs().max() > 1e-3


def test_parts_that_are_left_out_have_no_file(
    tiny_unet: UNet2DConditionModel, make_unet: Callable[[], UNet2DConditionModel], tmp_path: Path
) -> None:
    _save(_layered(tiny_unet, ADAPTERS_ONLY), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, "fg", "mild.json", "README.md"}
    assert LayeredUNet.load(make_unet(), tmp_path).parts() == {}


@pytest.mark.slow
@torch.no_grad()
def test_a_stock_pipeline_loads_the_background_adapter_and_computes_what_the_adapter_alone_does(
    nano_base: str, tmp_path: Path
) -> None:
    """The folder is a full one; our reference is the same adapter with every other part made neutral."""
    ours = load_base(nano_base)
    layered = _layered(ours.unet, ALL.model_copy(update={"lora": LoraSettings(rank=4, alpha=10)}))
    _save(layered, tmp_path)
    for part in layered.parts().values():
        for parameter in part.parameters():
            parameter.zero_()
    stock = StableDiffusionXLInpaintPipeline.from_pretrained(nano_base)
    without = stock.unet(**_arguments(stock.unet)).sample
    stock.load_lora_weights(str(tmp_path))
    found = stock.unet(**_arguments(stock.unet)).sample
    torch.testing.assert_close(found, _run(layered, "bg"), rtol=1e-5, atol=1e-5)
    assert (found - without).abs().max() > 1e-3


def test_the_card_names_the_parts_that_are_there_and_links_a_base_of_the_hub(
    tiny_unet: UNet2DConditionModel, tmp_path: Path
) -> None:
    layered = _layered(tiny_unet, MildSettings(lora=LoraSettings(rank=2, alpha=3), hmg=None))
    card = (_save(layered, tmp_path) / "README.md").read_text()
    assert "base_model: some/base\n" in card
    assert "- Data: drawn\n" in card
    assert 'MILDPipeline.from_pretrained("this folder")  # on the base that it names, some/base' in card
    for name in (WEIGHTS, f"fg/{WEIGHTS}", "sma.safetensors"):
        assert f"| `{name}` |" in card
    assert "hmg" not in card and "offsets" not in card and "prefix" not in card
    layered.save(tmp_path, base="/somewhere/base", resolution=96, inference_steps=4, record={})
    assert "base_model" not in (tmp_path / "README.md").read_text(), "hubs refuse a card whose base is no id"


@pytest.mark.slow
def test_the_code_in_a_card_runs_as_it_stands(tmp_path: Path) -> None:
    """With the bundled base, whose name diffusers alone does not know."""
    layered = _layered(load_base(NANO).unet, MildSettings(lora=LoraSettings(rank=2), hmg=None))
    layered.save(tmp_path, base=NANO, resolution=64, inference_steps=4, record={})
    snippets = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        found: dict[str, Any] = {}
        exec(snippet.replace("this folder", str(tmp_path)), found)
        assert found["pipeline"].unet.peft_config


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _with(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return spoil


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


def _set(**values: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values)) and None


_drop = _with(lambda tensors: tensors.pop(_first(tensors)))
_add = _with(lambda tensors: tensors.update(stranger=torch.zeros(1)))
_reshape = _with(lambda tensors: tensors.update({_first(tensors): torch.zeros(1, 7)}))
_as_integers = _with(lambda tensors: tensors.update({_first(tensors): tensors[_first(tensors)].int()}))


@pytest.mark.parametrize(
    ("name", "spoil", "named"),
    [
        *((name, Path.unlink, "is missing, but mild.json speaks of it") for name in FILES),
        *((name, _cut, "is broken") for name in FILES[:3]),
        *((name, _drop, "does not fit this base: tensor .* is missing") for name in FILES[1:4]),
        *((name, _add, "does not fit this base: tensor stranger is not known") for name in FILES[2:5]),
        *((name, _reshape, r"shape \(1, 7\), expected \(\d+.*use the base .* some/base") for name in FILES[::3]),
        ("sma.safetensors", _as_integers, r"is torch\.int32"),
        ("mild.json", Path.unlink, "is no MILD directory: mild.json is missing"),
        ("mild.json", _cut, "cannot be read: JSONDecodeError"),
        ("mild.json", lambda path: path.write_bytes(b"\xff"), "cannot be read: UnicodeDecodeError"),
        ("mild.json", lambda path: path.write_text("[]"), "is of format None"),
        ("mild.json", _set(format=1), "is of format 1, and this version of mild reads format 3"),
        ("mild.json", _set(base=3), "base: Input should be a valid string"),
        ("mild.json", _set(resolution=0), "resolution: Input should be greater"),
        ("mild.json", _set(mild={"sna": True}), "unknown setting 'mild.sna', did you mean 'sma'"),
    ],
)
def test_a_broken_directory_is_one_clear_line_and_leaves_the_unet_as_it_was(
    tiny_unet: UNet2DConditionModel, saved: Path, tmp_path: Path, name: str, spoil: Callable[[Path], None], named: str
) -> None:
    names = list(tiny_unet.state_dict())
    shutil.copytree(saved, tmp_path / "model")
    spoil(tmp_path / "model" / name)
    with pytest.raises(UserError, match=named) as caught:
        LayeredUNet.load(tiny_unet, tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert Path(name).name in str(caught.value)
    assert list(tiny_unet.state_dict()) == names
    assert all(parameter.requires_grad for parameter in tiny_unet.parameters())


def test_a_model_of_another_base_is_refused(saved: Path, nano_base: str) -> None:
    with pytest.raises(UserError, match=r"does not fit this base.*some/base"):
        LayeredUNet.load(load_base(nano_base).unet, saved)


def test_what_is_no_folder_and_no_id_is_one_clear_line(
    tiny_unet: UNet2DConditionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist; give a folder"):
        LayeredUNet.load(tiny_unet, tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is a file"):
        LayeredUNet.load(tiny_unet, tmp_path / "file")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"example/no-such-model is no folder here and cannot be fetched") as caught:
        LayeredUNet.load(tiny_unet, "example/no-such-model")
    assert "\n" not in str(caught.value)


# The hub


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as it takes to create a repository, commit small files and fetch them."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.url}/someone/model"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path == "/api/models/someone/model/preupload/main":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path == "/api/models/someone/model/commit/main":
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"{self.server.url}/someone/model/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self._answer({"error": "unknown"}, 404)

    def do_GET(self) -> None:
        files = self.server.files
        if self.path.startswith("/api/models/someone/model/revision/main"):
            names = [{"rfilename": name} for name in files]
            self._answer({"id": "someone/model", "sha": "1" * 40, "siblings": names})
        elif self.path.startswith("/api/models/someone/model/tree/"):
            self._answer(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            )
        else:
            data = files.get(self.path.partition(f"/resolve/{'1' * 40}/")[2])
            if data is None:
                self._answer({"error": "unknown"}, 404)
            else:
                self._send(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "1" * 40})

    do_HEAD = do_GET

    def _answer(self, document: Any, status: int = 200) -> None:
        self._send(json.dumps(document).encode(), {"Content-Type": "application/json"}, status)

    def _send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files, server.created, server.tokens = {}, [], set()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_pushed_to_the_hub_is_loaded_from_there(
    tiny_unet: UNet2DConditionModel, saved: Path, tmp_path: Path, hub: Any
) -> None:
    assert push_to_hub(saved, "someone/model", token="hf_secret", private=True).endswith("/commit/" + "1" * 40)
    assert hub.created[0]["name"] == "model" and "private" in json.dumps(hub.created[0])
    assert hub.tokens == {"Bearer hf_secret"}
    assert hub.files == {str(path.relative_to(saved)): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    loaded = LayeredUNet.load(tiny_unet, "someone/model")
    again = _save(loaded, tmp_path / "again")
    assert filecmp.cmpfiles(saved, again, FILES, shallow=False)[0] == FILES


def test_a_hub_that_refuses_and_a_folder_that_is_no_model_are_one_clear_line(
    saved: Path, tmp_path: Path, hub: Any
) -> None:
    with pytest.raises(UserError, match=r"is no MILD directory"):
        push_to_hub(tmp_path, "someone/model", token="hf_secret")
    with pytest.raises(UserError, match=r"cannot be uploaded to someone/else: .*404") as caught:
        push_to_hub(saved, "someone/else", token="hf_secret")
    assert "\n" not in str(caught.value)


def test_the_config_is_read_without_a_unet(saved: Path) -> None:
    config = read_config(saved)
    assert (config.base, config.resolution, config.mild) == ("some/base", 96, ALL)
