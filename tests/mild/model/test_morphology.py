from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

from dataset_tools import masks as mask_tools
from dataset_tools.errors import UserError
from dataset_tools.schema import KEYPOINTS, NO_PARSING, PARSING_LABELS
from mild.model.backbone import BRANCHES, activate, adapter_layers, adapter_parameters, add_layered_lora
from mild.model.cues import (
    CHANNELS,
    COMMON_LABELS,
    TO_COMMON,
    Cue,
    draw_masks,
    draw_parsing,
    draw_pose,
    map_size,
    stack_cue,
)
from mild.model.morphology import (
    GatedCrossAttention,
    HumanMorphologyGuidance,
    install_morphology,
    remove_morphology,
)
from mild.settings import HmgSettings, LoraSettings

SMALL = HmgSettings(grid=2, width=8, map_side=16)
MAPS = HmgSettings(map_side=32, joint_width=0.05)
SWAPPED = [
    KEYPOINTS.index(name.replace("left_", "?").replace("right_", "left_").replace("?", "right_")) for name in KEYPOINTS
]


def _mirrored(label: str) -> str:
    return label.replace("Left", "?").replace("Right", "Left").replace("?", "Right")


def _people(seed: int, count: int, size: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    people = rng.random((count, 18, 3)).astype(np.float32) * np.array([size[1] - 1, size[0] - 1, 1], np.float32)
    people[rng.random((count, 18)) < 0.3] = 0
    return people


def _arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "sample": draw(2, 9, 8, 12),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": draw(2, 5, 8),
        "added_cond_kwargs": {"text_embeds": draw(2, 8), "time_ids": draw(2, 6)},
    }


def _cues(batch: int = 2, seed: int = 0) -> dict[str, Cue]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Cue(torch.rand(batch, channels, 12, 16, generator=generator), torch.ones(batch, dtype=torch.bool))
        for name, channels in CHANNELS.items()
    }


def _guidance(unet: UNet2DConditionModel, *, trained: bool = True, seed: int = 0) -> HumanMorphologyGuidance:
    """Guidance that matters: with gates and absent tokens away from zero."""
    guidance = HumanMorphologyGuidance(unet, SMALL, seed=seed).to(unet.dtype)
    if trained:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in [*guidance.gates.values(), *guidance.absent.values()]:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return guidance


# Drawing


def test_a_joint_is_a_gaussian_times_its_score() -> None:
    people = np.zeros((1, 18, 3), np.float32)
    people[0, KEYPOINTS.index("left_wrist")] = (10, 7, 0.5)
    maps = draw_pose(people, (24, 32), MAPS)
    rows, columns = np.mgrid[:24, :32]
    expected = 0.5 * np.exp(-((columns - 10) ** 2 + (rows - 7) ** 2) / (2 * (0.05 * 32) ** 2))
    np.testing.assert_allclose(maps[KEYPOINTS.index("left_wrist")], expected, atol=1e-6)
    assert maps.sum() == pytest.approx(expected.sum(), rel=1e-5), "nothing else is drawn, limbs need both ends"


def test_a_limb_is_the_profile_of_the_distance_to_its_segment() -> None:
    """The reference takes the nearest of many points of the segment."""
    people = np.zeros((1, 18, 3), np.float32)
    start, end = np.array([4.0, 20.0]), np.array([25.0, 3.0])
    people[0, KEYPOINTS.index("left_hip")] = (*start, 0.9)
    people[0, KEYPOINTS.index("left_knee")] = (*end, 0.4)
    maps = draw_pose(people, (24, 32), MAPS)
    rows, columns = np.mgrid[:24, :32]
    points = start + np.linspace(0, 1, 2001)[:, None] * (end - start)
    distance = np.hypot(columns[..., None] - points[:, 0], rows[..., None] - points[:, 1]).min(-1)
    expected = 0.4 * np.exp(-(distance**2) / (2 * (0.05 * 32) ** 2))
    limb = 18 + mask_tools.BONES.index(("left_hip", "left_knee"))
    np.testing.assert_allclose(maps[limb], expected, atol=1e-5)
    assert np.flatnonzero(maps[18:].flatten(1).sum(1)).tolist() == [limb - 18]


@given(st.integers(0, 5), st.randoms(use_true_random=False))
@settings(max_examples=10)
def test_the_order_of_people_does_not_matter(count: int, random: Any) -> None:
    people = _people(count, count, (60, 90))
    order = random.sample(range(count), count)
    assert torch.equal(draw_pose(people, (60, 90), MAPS), draw_pose(people[order], (60, 90), MAPS))


@pytest.mark.parametrize("size", [(64, 48), (37, 91), (24, 32)])
def test_a_mirrored_picture_with_sides_swapped_gives_mirrored_pose_maps(size: tuple[int, int]) -> None:
    people = _people(3, 2, size)
    mirrored = people[:, SWAPPED]
    mirrored[..., 0] = np.where(mirrored[..., 2] > 0, size[1] - 1 - mirrored[..., 0], 0)
    found, before = draw_pose(mirrored, size, MAPS), draw_pose(people, size, MAPS)
    names = [frozenset(bone) for bone in mask_tools.BONES]
    bones = [names.index(frozenset(KEYPOINTS[SWAPPED[KEYPOINTS.index(joint)]] for joint in bone)) for bone in names]
    channels = [*SWAPPED, *(18 + bone for bone in bones)]
    assert found.max() > 0.1
    torch.testing.assert_close(found, before[channels].flip(-1), rtol=0, atol=1e-5)


def test_maps_keep_the_pictures_aspect() -> None:
    assert map_size((1080, 1920), HmgSettings()) == (72, 128)
    assert map_size((1920, 1080), HmgSettings()) == (128, 72)
    assert map_size((5000, 1), HmgSettings()) == (128, 1)
    assert draw_pose(np.zeros((0, 18, 3)), (60, 90), MAPS).shape == (CHANNELS["pose"], 21, 32)


def test_keypoints_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="people, 18, 3"):
        draw_pose(np.zeros((18, 3)), (8, 8), MAPS)


@pytest.mark.parametrize("label_set", ["lip", "atr", "pascal"])
def test_every_label_has_a_common_one_of_the_same_side(label_set: str) -> None:
    labels, common = PARSING_LABELS[label_set], TO_COMMON[label_set]
    assert len(labels) == len(common) and set(common) <= set(COMMON_LABELS)
    for label, name in zip(labels, common, strict=True):
        for side in ("left", "right"):
            assert label.lower().startswith(side) == name.startswith(side), label
        assert (label == "Background") == (name == "background")


def test_lip_and_atr_agree_where_they_use_one_word() -> None:
    lip, atr = (dict(zip(PARSING_LABELS[name], TO_COMMON[name], strict=True)) for name in ("lip", "atr"))
    assert len(lip.keys() & atr.keys()) == 16
    assert all(lip[word] == atr[word] for word in lip.keys() & atr.keys())
    assert set(TO_COMMON["lip"]) | set(TO_COMMON["atr"]) | set(TO_COMMON["pascal"]) == set(COMMON_LABELS)


@pytest.mark.parametrize("label_set", ["lip", "atr", "pascal"])
def test_parsing_maps_are_shares_of_the_pixels_of_each_label(label_set: str) -> None:
    rng = np.random.default_rng(0)
    names = PARSING_LABELS[label_set]
    labels = rng.integers(0, len(names), (96, 63)).astype(np.uint8)
    labels[:6] = NO_PARSING
    maps = draw_parsing(labels, label_set, MAPS).numpy()
    expected = np.zeros_like(maps)
    for row in range(96):
        for column in range(63):
            if labels[row, column] != NO_PARSING:
                expected[COMMON_LABELS.index(TO_COMMON[label_set][labels[row, column]]), row // 3, column // 3] += 1 / 9
    np.testing.assert_allclose(maps, expected, atol=1e-6)
    np.testing.assert_allclose(maps.sum(0)[2:], 1, atol=1e-6)


@pytest.mark.parametrize("label_set", ["lip", "atr", "pascal"])
def test_a_mirrored_label_map_with_sides_swapped_gives_mirrored_maps(label_set: str) -> None:
    names = PARSING_LABELS[label_set]
    labels = np.random.default_rng(1).integers(0, len(names), (50, 70)).astype(np.uint8)
    mirror = np.array([names.index(_mirrored(name)) for name in names], np.uint8)
    found = draw_parsing(mirror[labels[:, ::-1]], label_set, MAPS).flip(-1)
    before = draw_parsing(labels, label_set, MAPS)
    for index, name in enumerate(COMMON_LABELS):
        other = name.replace("left_", "?").replace("right_", "left_").replace("?", "right_")
        torch.testing.assert_close(found[index], before[COMMON_LABELS.index(other)], rtol=0, atol=1e-6)


def test_a_label_that_the_set_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="holds 9; 'pascal' has labels 0 to 6"):
        draw_parsing(np.full((4, 4), 9, np.uint8), "pascal", MAPS)
    with pytest.raises(ValueError, match="unknown label set 'none'"):
        draw_parsing(np.zeros((4, 4), np.uint8), "none", MAPS)


def test_the_others_are_the_clamped_sum_of_all_but_the_target() -> None:
    masks = np.random.default_rng(2).random((4, 16, 32)) < 0.4
    for target in range(4):
        drawn = draw_masks(masks, target, MAPS)
        assert torch.equal(drawn[0], torch.from_numpy(masks[target].astype(np.float32)))
        assert torch.equal(drawn[1], torch.from_numpy(mask_tools.others(list(masks), target).astype(np.float32)))
    soft = np.stack([np.full((16, 32), value, np.float32) for value in (0.25, 0.5, 0.75)])
    assert draw_masks(soft, 2, MAPS)[1].unique().tolist() == [0.75]
    assert draw_masks(soft, 0, MAPS)[1].unique().tolist() == [1.0]
    assert draw_masks(masks[:1], 0, MAPS)[1].max() == 0
    with pytest.raises(IndexError, match="none has the index 4"):
        draw_masks(masks, 4, MAPS)


def test_a_batch_is_stacked_with_flags_of_what_is_there() -> None:
    assert stack_cue([None, None]) is None
    cue = stack_cue([None, torch.ones(2, 3, 4)])
    assert cue is not None and cue.present.tolist() == [False, True]
    assert cue.maps.flatten(1).sum(1).tolist() == [0, 24]
    with pytest.raises(ValueError, match="one size"):
        stack_cue([torch.ones(2, 3, 4), torch.ones(2, 4, 3)])


# Tokens


def test_tokens_stand_in_the_order_of_algorithm_1(tiny_unet: UNet2DConditionModel) -> None:
    guidance, cues = _guidance(tiny_unet), _cues()
    alone = {
        "pose": guidance("bg", 2, pose=cues["pose"])[:, :4],
        "parsing": guidance("bg", 2, parsing=cues["parsing"])[:, 4:],
        "masks": guidance("fg", 2, masks=cues["masks"])[:, 8:],
    }
    assert guidance("fg", 2, **cues).shape == (2, 12, 8)
    torch.testing.assert_close(guidance("fg", 2, **cues), torch.cat(list(alone.values()), dim=1))
    without = {name: cue for name, cue in cues.items() if name != "masks"}
    torch.testing.assert_close(guidance("bg", 2, **without), torch.cat([alone["pose"], alone["parsing"]], dim=1))
    with pytest.raises(ValueError, match="no mask tokens"):
        guidance("bg", 2, **cues)


@pytest.mark.parametrize("cue", ["pose", "parsing"])
def test_guidance_by_one_cue_has_its_tokens_alone(tiny_unet: UNet2DConditionModel, cue: Any) -> None:
    guidance, cues = HumanMorphologyGuidance(tiny_unet, SMALL.model_copy(update={"cues": (cue,)}), seed=0), _cues()
    other = "parsing" if cue == "pose" else "pose"
    assert guidance("bg", 2, **{cue: cues[cue]}).shape == (2, 4, 8)
    both = guidance("fg", 2, **cues)
    alone = guidance("bg", 2, **{cue: cues[cue]}), guidance("fg", 2, masks=cues["masks"])[:, 4:]
    torch.testing.assert_close(both, torch.cat(alone, dim=1))
    assert torch.equal(guidance("fg", 2, **{name: one for name, one in cues.items() if name != other}), both)
    assert not any(other in name.split(".") for name, _ in guidance.named_parameters())


def test_an_absent_cue_is_its_learned_tokens_whatever_its_maps_hold(tiny_unet: UNet2DConditionModel) -> None:
    guidance, cues = _guidance(tiny_unet), _cues()
    nothing = guidance("fg", 2)
    expected = torch.cat([guidance.absent[name] for name in ("pose", "parsing", "masks")])
    assert torch.equal(nothing, expected.expand(2, -1, -1))
    hidden = {name: Cue(cue.maps, torch.zeros(2, dtype=torch.bool)) for name, cue in cues.items()}
    assert torch.equal(guidance("fg", 2, **hidden), nothing)
    assert (guidance("fg", 2, **cues) - nothing).abs().amin(dim=2).min() > 0


def test_a_batch_of_present_and_absent_cues_equals_separate_calls(tiny_unet: UNet2DConditionModel) -> None:
    guidance, cues = _guidance(tiny_unet.double()), _cues(4)
    flags = {"pose": [1, 0, 1, 0], "parsing": [1, 1, 0, 0], "masks": [0, 1, 1, 0]}
    mixed = {name: Cue(cue.maps, torch.tensor(flags[name], dtype=torch.bool)) for name, cue in cues.items()}
    found = guidance("fg", 4, **mixed)
    for row in range(4):
        present = {name: cue.maps[row : row + 1] for name, cue in cues.items() if flags[name][row]}
        single = {name: Cue(maps, torch.ones(1, dtype=torch.bool)) for name, maps in present.items()}
        torch.testing.assert_close(found[row : row + 1], guidance("fg", 1, **single), rtol=1e-12, atol=1e-12)


def test_any_aspect_ratio_gives_as_many_tokens(tiny_unet: UNet2DConditionModel) -> None:
    guidance = _guidance(tiny_unet)
    for size in [(16, 1), (1, 16), (16, 16), (5, 16)]:
        maps = Cue(torch.rand(1, CHANNELS["pose"], *size), torch.ones(1, dtype=torch.bool))
        assert guidance("fg", 1, pose=maps).shape == (1, 12, 8)


def test_tokens_tell_where_something_is(tiny_unet: UNet2DConditionModel) -> None:
    """A person in the left cells changes the tokens of those cells the most."""
    guidance = _guidance(tiny_unet)
    maps = torch.zeros(2, CHANNELS["masks"], 16, 16)
    maps[1, :, :8, :4] = 1
    tokens = guidance("fg", 2, masks=Cue(maps, torch.ones(2, dtype=torch.bool)))[:, 8:]
    assert not torch.allclose(tokens[0], tokens[1])
    assert (tokens[0, 0] - tokens[0, 3]).abs().max() > 1e-3, "cells that look alike differ by their position"


def test_wrong_cues_are_named(tiny_unet: UNet2DConditionModel) -> None:
    guidance, cues = _guidance(tiny_unet), _cues()
    with pytest.raises(ValueError, match=r"pose: \(2, 35, 12, 16\) maps.*expected \(3, 35"):
        guidance("bg", 3, pose=cues["pose"])
    with pytest.raises(ValueError, match="parsing"):
        guidance("bg", 2, parsing=cues["pose"])


def test_initial_weights_come_from_the_seed_alone(tiny_unet: UNet2DConditionModel) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (HumanMorphologyGuidance(tiny_unet, SMALL, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.stems["pose"].weight, other.stems["pose"].weight)


# In the UNet


@pytest.mark.parametrize("branch", BRANCHES)
def test_untrained_guidance_changes_nothing_at_all(tiny_unet: UNet2DConditionModel, branch: Any) -> None:
    before = tiny_unet(**_arguments()).sample
    guidance, cues = _guidance(tiny_unet, trained=False), _cues()
    if branch == "bg":
        del cues["masks"]
    install_morphology(tiny_unet, guidance)
    with guidance.condition(guidance(branch, 2, **cues)):
        assert torch.equal(tiny_unet(**_arguments()).sample, before)


def test_without_any_cue_trained_gates_still_give_the_base(tiny_unet: UNet2DConditionModel) -> None:
    """Absent tokens start at zero, and the layers have no bias: their values are zero."""
    guidance = _guidance(tiny_unet, trained=False)
    with torch.no_grad():
        for gate in guidance.gates.values():
            gate.fill_(1.5)
    before = tiny_unet(**_arguments()).sample
    install_morphology(tiny_unet, guidance)
    with guidance.condition(guidance("fg", 2)):
        assert torch.equal(tiny_unet(**_arguments()).sample, before)
    with guidance.condition(guidance("fg", 2, **_cues())):
        assert not torch.allclose(tiny_unet(**_arguments()).sample, before)


@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_computes_the_two_softmaxes_of_the_docstring(tiny_unet: UNet2DConditionModel, masked: bool) -> None:
    tiny_unet.double()
    guidance = _guidance(tiny_unet)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    layer = tiny_unet.get_submodule(name)
    install_morphology(tiny_unet, guidance)
    generator = torch.Generator().manual_seed(3)
    hidden, text, tokens = (
        torch.randn(2, length, width, generator=generator, dtype=torch.float64)
        for length, width in ((6, 16), (5, 8), (12, 8))
    )
    bias = torch.tensor([[[0.0, 0, -1, 0, -10000]]], dtype=torch.float64).expand(2, 1, 5) if masked else None
    found = layer(hidden, encoder_hidden_states=(text, tokens), attention_mask=bias)

    heads, depth = layer.heads, 16 // layer.heads
    total = torch.zeros(2, 6, 16, dtype=torch.float64)
    for head in range(heads):
        part = slice(head * depth, (head + 1) * depth)
        query = hidden @ layer.to_q.weight[part].T
        for context, gate in ((text, 1.0), (tokens, guidance.gates[name.replace(".", "/")][head])):
            logits = query @ (context @ layer.to_k.weight[part].T).transpose(1, 2) / depth**0.5
            if masked and context is text:
                logits = logits + bias
            total[..., part] += gate * torch.softmax(logits, -1) @ (context @ layer.to_v.weight[part].T)
    expected = total @ layer.to_out[0].weight.T + layer.to_out[0].bias
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_tokens_reach_every_cross_attention(tiny_unet: UNet2DConditionModel, caplog: pytest.LogCaptureFixture) -> None:
    """Arguments that a processor does not name are dropped by diffusers without an error: each block is asked alone."""
    guidance, cues = _guidance(tiny_unet, trained=False), _cues()
    before = tiny_unet(**_arguments()).sample
    install_morphology(tiny_unet, guidance)
    assert len(guidance.gates) == sum(name.endswith(".attn2") for name, _ in tiny_unet.named_modules()) >= 3
    for name, gate in guidance.gates.items():
        for head in range(len(gate)):
            with torch.no_grad():
                gate[head] = 1
            with guidance.condition(guidance("fg", 2, **cues)):
                assert (tiny_unet(**_arguments()).sample - before).abs().max() > 1e-5, (name, head)
            with torch.no_grad():
                gate.zero_()
    assert "ignored" not in caplog.text


def test_at_first_only_gates_learn_and_from_the_second_step_on_everything(tiny_unet: UNet2DConditionModel) -> None:
    tiny_unet.requires_grad_(False)
    guidance, cues = _guidance(tiny_unet, trained=False), _cues()
    install_morphology(tiny_unet, guidance)

    def gradients(**given: Cue) -> dict[str, float]:
        guidance.zero_grad()
        with guidance.condition(guidance("fg", 2, **given)):
            tiny_unet(**_arguments()).sample.square().mean().backward()
        return {n: 0.0 if p.grad is None else p.grad.abs().max().item() for n, p in guidance.named_parameters()}

    first = gradients(**cues)
    learning = {name for name, size in first.items() if size > 0}
    assert learning == {name for name in first if name.startswith("gates.")}
    assert min(first[name] for name in learning) > 1e-6
    torch.optim.AdamW(guidance.parameters(), lr=1e-3).step()
    second = gradients(**cues)
    assert {name for name, size in second.items() if size == 0} == {f"absent.{name}" for name in CHANNELS}
    some = gradients(pose=cues["pose"])
    assert {name for name, size in some.items() if size == 0} == {
        "absent.pose",
        *(name for name in some if name.split(".")[0] in ("stems", "projections", "norms", "positions")
          and name.split(".")[1] != "pose"),
    }  # fmt: skip
    assert all(p.grad is None for p in tiny_unet.parameters())


@pytest.mark.parametrize("branch", BRANCHES)
def test_adapters_work_on_the_tokens_too(tiny_unet: UNet2DConditionModel, branch: Any) -> None:
    """The reference has the adapter's weights added to its own and knows no peft."""
    tiny_unet.double()
    plain = UNet2DConditionModel.from_config(tiny_unet.config).double()
    plain.load_state_dict(tiny_unet.state_dict())
    guidance, other = _guidance(tiny_unet), _guidance(plain)
    install_morphology(tiny_unet, guidance)
    add_layered_lora(tiny_unet, LoraSettings(rank=2, alpha=3), seed=0)
    weights = dict(plain.named_parameters())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for side in BRANCHES:
            for parameter in adapter_parameters(tiny_unet, side).values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, down in adapter_parameters(tiny_unet, branch).items():
            if ".lora_A." in name:
                up = tiny_unet.get_parameter(name.replace(".lora_A.", ".lora_B."))
                weights[name.split(".lora_A.")[0] + ".weight"] += 1.5 * up @ down
    activate(adapter_layers(tiny_unet), branch)
    install_morphology(plain, other)
    arguments = _arguments(torch.float64)
    tokens = guidance(branch, 2, pose=_cues()["pose"])
    with guidance.condition(tokens), other.condition(tokens):
        found, expected = tiny_unet(**arguments).sample, plain(**arguments).sample
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    found.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter_parameters(tiny_unet, branch).values())


def test_checkpointing_computes_again_with_the_tokens_of_its_forward_pass(tiny_unet: UNet2DConditionModel) -> None:
    """Two branches, forward one after the other, one backward pass outside of both contexts."""
    tiny_unet.double().train()
    guidance = _guidance(tiny_unet)
    install_morphology(tiny_unet, guidance)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny_unet.enable_gradient_checkpointing()
        guidance.zero_grad()
        losses = []
        for branch in BRANCHES:
            with guidance.condition(guidance(branch, 2, pose=_cues()["pose"])):
                losses.append(tiny_unet(**_arguments(torch.float64)).sample.square().mean())
        (losses[0] + 0.5 * losses[1]).backward()
        gradients.append([p.grad for p in guidance.parameters()])
    assert max(gradient.abs().max() for gradient in gradients[0] if gradient is not None) > 1e-4
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_compute_the_same_in_one_graph_for_all_tokens(tiny_unet: UNet2DConditionModel) -> None:
    """The middle block, with residual blocks around its attention."""
    guidance = _guidance(tiny_unet)
    install_morphology(tiny_unet, guidance)
    inputs, text = (torch.ones(2, 16, 3, 5), torch.ones(2, 32)), _arguments()["encoder_hidden_states"]
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(tiny_unet.mid_block, fullgraph=True, backend=graphs)
    found = []
    for tokens in (guidance("fg", 2), guidance("fg", 2, **_cues())):
        found.append(compiled(*inputs, encoder_hidden_states=(text, tokens)))
        torch.testing.assert_close(found[-1], tiny_unet.mid_block(*inputs, encoder_hidden_states=(text, tokens)))
    assert not torch.allclose(*found)
    assert graphs.frame_count == 1


def test_the_fused_kernel_stays_in_use(tiny_unet: UNet2DConditionModel) -> None:
    """With the other kernels forbidden, attention that the fused one cannot take would raise."""
    guidance = _guidance(tiny_unet)
    install_morphology(tiny_unet, guidance)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), guidance.condition(guidance("fg", 2, **_cues())):
        tiny_unet(**_arguments()).sample.square().mean().backward()


def test_half_precision_works_with_guidance_in_float32(tiny_unet: UNet2DConditionModel) -> None:
    guidance = _guidance(tiny_unet)
    install_morphology(tiny_unet, guidance)
    tokens = guidance("fg", 2, **_cues())
    with guidance.condition(tokens):
        exact = tiny_unet(**_arguments()).sample
        tiny_unet.to(torch.bfloat16)
        found = tiny_unet(**_arguments(torch.bfloat16)).sample
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_removing_restores_every_processor_and_leaves_the_unet_as_it_was(tiny_unet: UNet2DConditionModel) -> None:
    before, names = dict(tiny_unet.attn_processors), list(tiny_unet.state_dict())
    output = tiny_unet(**_arguments()).sample
    guidance = _guidance(tiny_unet)
    install_morphology(tiny_unet, guidance)
    assert list(tiny_unet.state_dict()) == names, "no weight of the guidance is the UNet's"
    installed = tiny_unet.attn_processors
    assert {n for n in before if installed[n] is not before[n]} == {n for n in before if ".attn2." in n}
    assert all(isinstance(p, GatedCrossAttention) for n, p in installed.items() if ".attn2." in n)
    assert torch.equal(tiny_unet(**_arguments()).sample, output), "a call without tokens is the base's"
    remove_morphology(tiny_unet, guidance)
    assert all(tiny_unet.attn_processors[name] is processor for name, processor in before.items())
    with guidance.condition(guidance("bg", 2)):
        assert torch.equal(tiny_unet(**_arguments()).sample, output)
    with pytest.raises(ValueError, match="not installed"):
        remove_morphology(tiny_unet, guidance)


def test_outside_the_context_is_the_base_and_an_inner_context_ends_with_itself(tiny_unet: UNet2DConditionModel) -> None:
    guidance = _guidance(tiny_unet)
    install_morphology(tiny_unet, guidance)
    tokens = guidance("fg", 2, **_cues())
    base = tiny_unet(**_arguments()).sample
    with guidance.condition(tokens):
        guided = tiny_unet(**_arguments()).sample
        with contextlib.suppress(KeyError), guidance.condition(2 * tokens):
            assert not torch.equal(tiny_unet(**_arguments()).sample, guided)
            raise KeyError
        assert torch.equal(tiny_unet(**_arguments()).sample, guided)
    assert torch.equal(tiny_unet(**_arguments()).sample, base)
    assert not torch.equal(guided, base)


def test_what_does_not_fit_is_refused_before_anything_changes(tiny_unet: UNet2DConditionModel) -> None:
    guidance = _guidance(tiny_unet)
    config = {**tiny_unet.config, "attention_head_dim": 4}
    other = UNet2DConditionModel.from_config(config)
    with pytest.raises(UserError, match="made for another base"):
        install_morphology(other, guidance)
    install_morphology(tiny_unet, guidance)
    processors = dict(tiny_unet.attn_processors)
    with pytest.raises(UserError, match="handled by GatedCrossAttention"):
        install_morphology(tiny_unet, _guidance(tiny_unet))
    assert all(tiny_unet.attn_processors[name] is processor for name, processor in processors.items())
    with guidance.condition(guidance("fg", 3)), pytest.raises(ValueError, match=r"tokens \(3, 12, 8\) do not go with"):
        tiny_unet(**_arguments())


def test_a_stock_pipeline_guides_with_absent_tokens_on_its_negative_side(nano_base: str) -> None:
    """Classifier-free guidance asks the UNet for [negative; positive]: the pipeline's picture is what the noise
    predictions of separate calls, each with its own tokens, add up to."""
    pipeline = StableDiffusionXLInpaintPipeline.from_pretrained(nano_base)
    pipeline.set_progress_bar_config(disable=True)
    guidance = HumanMorphologyGuidance(pipeline.unet, SMALL, seed=0)
    with torch.no_grad():
        for gate in guidance.gates.values():
            gate.fill_(5.0)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    hole = Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), ((8, 8), (16, 16))))

    def run(scale: float) -> np.ndarray:
        done = pipeline(
            "a person", image=picture, mask_image=hole, height=32, width=48, num_inference_steps=1,
            guidance_scale=scale, strength=1.0, generator=torch.Generator().manual_seed(0), output_type="latent",
        )  # fmt: skip
        return done.images.detach().numpy()

    unguided = run(1.0)
    install_morphology(pipeline.unet, guidance)
    nothing, something = guidance("bg", 1), guidance("bg", 1, pose=_cues(1)["pose"])
    with guidance.condition(something):
        positive = run(1.0)
    assert np.abs(positive - unguided).max() > 1e-4
    with guidance.condition(torch.cat([nothing, something])):
        both = run(3.0)
    with guidance.condition(torch.cat([something, something])):
        assert np.abs(run(3.0) - both).max() > 1e-4, "it matters what the negative side is given"
    with guidance.condition(torch.cat([nothing, nothing])):
        without = run(3.0)
    remove_morphology(pipeline.unet, guidance)
    np.testing.assert_allclose(without, run(3.0), atol=1e-5)
    # One step of a sampler is affine in the prediction, and guidance is n + 3 (p - n).
    np.testing.assert_allclose(both - without, 3 * (positive - unguided), atol=1e-4)


def test_settings_and_state_dict_rebuild_the_guidance(tiny_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    guidance = _guidance(tiny_unet)
    save_file(guidance.state_dict(), tmp_path / "morphology.safetensors")
    text = guidance.settings.model_dump_json()
    loaded = HumanMorphologyGuidance(tiny_unet, HmgSettings.model_validate_json(text), seed=9)
    loaded.load_state_dict(load_file(tmp_path / "morphology.safetensors"))
    assert torch.equal(loaded("fg", 2, **_cues()), guidance("fg", 2, **_cues()))
    assert all(torch.equal(loaded.gates[key], guidance.gates[key]) for key in guidance.gates)
