from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend

from mild.model.attention import SpatialModulation, install_sma, modulated_attention, remove_sma, token_masks
from mild.model.backbone import activate, adapter_layers, adapter_parameters, add_layered_lora
from mild.nano.architecture import build_nano_pipeline
from mild.settings import LoraSettings

SIZES = [(8, 8), (6, 10), (7, 5), (13, 9)]
"""Latents (height, width): square, wide, and with odd sides, where strided convolutions round up."""


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_masks(*shape: int, soft: bool, seed: int = 2) -> torch.Tensor:
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mask if soft else (mask > 0.6).double()


def dense_bias(mask: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Eq. 3 written out: (B, N) masks to (B, 1, N, N)."""
    weights = [1 - mask, mask]
    cases = [alpha[s, t] * weights[s][:, :, None] * weights[t][:, None, :] for s in (0, 1) for t in (0, 1)]
    return torch.stack(cases).sum(0)[:, None]


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Softmax attention written out, (B, N, heads, d) to the same."""
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1]) + bias
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)


class DenseProcessor:
    """The reference inside a UNet: knows the tokens' masks by their number, materialises everything."""

    def __init__(self, masks: dict[int, torch.Tensor], alpha: torch.Tensor) -> None:
        self.masks, self.alpha = masks, alpha

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> torch.Tensor:
        layers = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in layers)
        bias = dense_bias(self.masks[hidden_states.shape[1]], self.alpha)
        return attn.to_out[0](dense_attention(q, k, v, bias).flatten(2))


def arguments(size: tuple[int, int], batch: int = 2, width: int = 8, dtype: torch.dtype = torch.float64) -> Any:
    return {
        "sample": draw(batch, 9, *size, seed=3, dtype=dtype),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": draw(batch, 5, width, seed=4, dtype=dtype),
        "added_cond_kwargs": {
            "text_embeds": draw(batch, {8: 8, 64: 32}[width], seed=5, dtype=dtype),
            "time_ids": draw(batch, 6, seed=6, dtype=dtype),
        },
    }


def randomize(modulation: SpatialModulation, strength: float = 2.0) -> None:
    """Different alphas for each block, within the constraints."""
    with torch.no_grad():
        for index, alpha in enumerate(modulation.parameters()):
            alpha.copy_(strength * draw(2, 2, seed=100 + index))
    modulation.project_()


def attn1(unet: UNet2DConditionModel) -> dict[str, Any]:
    return {name: module for name, module in unet.named_modules() if name.endswith(".attn1")}


def run(unet: UNet2DConditionModel, modulation: SpatialModulation, mask: torch.Tensor, given: Any) -> torch.Tensor:
    with modulation.masks(mask):
        return unet(**given).sample


# --- the attention itself


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dimension", [4, 6, 16, 23])
def test_values_and_gradients_are_those_of_the_dense_bias_in_float64(dimension: int, soft: bool) -> None:
    inputs = [draw(2, 35, 3, dimension, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    alpha = torch.tensor([[0.7, -2.1], [-3.2, 1.4]], dtype=torch.float64, requires_grad=True)
    mask = draw_masks(2, 35, soft=soft)
    probe = draw(2, 35, 3, dimension, seed=9)
    ours = modulated_attention(*inputs, mask, alpha)
    truth = dense_attention(*inputs, dense_bias(mask, alpha))
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-10)
    for found, expected in zip(
        torch.autograd.grad((ours * probe).sum(), [*inputs, alpha]),
        torch.autograd.grad((truth * probe).sum(), [*inputs, alpha]),
        strict=True,
    ):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("strength", [1.0, 30.0])
def test_lower_precision_stays_close_to_the_dense_bias(dtype: torch.dtype, tolerance: float, strength: float) -> None:
    """Also where biases are strong: inside a region the extra channels add exact zeros."""
    q, k, v = (draw(2, 64, 2, 16, seed=seed).to(dtype) for seed in (1, 2, 3))
    alpha = strength * torch.tensor([[0.5, -1.0], [-1.0, 0.5]])
    mask = draw_masks(2, 64, soft=False)
    ours = modulated_attention(q, k, v, mask, alpha)
    truth = dense_attention(q.double(), k.double(), v.double(), dense_bias(mask, alpha.double()))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=tolerance)


def test_only_two_combinations_of_the_four_scalars_count() -> None:
    """Softmax ignores row constants: the gradients of alpha_s0 and alpha_s1 are opposite."""
    q, k, v = (draw(1, 20, 2, 8, seed=seed) for seed in (1, 2, 3))
    alpha = draw(2, 2, seed=4).requires_grad_()
    output = modulated_attention(q, k, v, draw_masks(1, 20, soft=True), alpha)
    (gradient,) = torch.autograd.grad((output * draw(1, 20, 2, 8, seed=5)).sum(), alpha)
    torch.testing.assert_close(gradient[:, 0], -gradient[:, 1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_hard_gating_makes_background_outputs_independent_of_the_foreground_bit_by_bit(
    dtype: torch.dtype, spread: float
) -> None:
    """Foreground tokens come first, so that a kernel's running maximum starts among gated keys."""
    tokens, foreground = 700, 300
    mask = (torch.arange(tokens) < foreground).double()[None]
    alpha = torch.tensor([[0.3, -math.inf], [-math.inf, 0.2]])
    inputs = [(spread * draw(1, tokens, 2, 16, seed=seed)).to(dtype) for seed in (1, 2, 3)]
    changed = [x.clone() for x in inputs]
    for seed, x in enumerate(changed):
        x[:, :foreground] = (spread * draw(1, foreground, 2, 16, seed=20 + seed)).to(dtype)
    before, after = (modulated_attention(*x, mask, alpha, gated=True) for x in (inputs, changed))
    assert torch.equal(before[:, foreground:], after[:, foreground:])
    assert not torch.equal(before[:, :foreground], after[:, :foreground])
    if spread == 1:  # larger logits lose precision in every kernel
        alone = dense_attention(*(x[:, foreground:].double() for x in inputs), torch.zeros(1, dtype=torch.float64))
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        torch.testing.assert_close(before[:, foreground:].double(), alone, rtol=0, atol=tolerance)


def test_hard_gating_gives_the_foreground_no_gradient_and_nothing_a_nan() -> None:
    inputs = [draw(2, 40, 2, 8, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    mask = draw_masks(2, 40, soft=True)
    mask[1] = 0  # a picture without a foreground
    alpha = torch.tensor([[0.0, -math.inf], [-1.0, 0.5]], requires_grad=True)
    output = modulated_attention(*inputs, mask, alpha, gated=True)
    is_foreground = mask >= 0.5
    gradients = torch.autograd.grad(output[~is_foreground].square().sum(), [*inputs, alpha])
    for gradient in gradients[:3]:
        assert torch.equal(gradient[is_foreground], torch.zeros_like(gradient[is_foreground]))
        assert gradient[~is_foreground].abs().min() > 0
    assert torch.equal(gradients[3], torch.zeros(2, 2))
    assert output.isfinite().all()


@pytest.mark.parametrize("length", [20.0, 400.0])
def test_hard_gating_of_long_queries_in_half_precision_is_that_of_double_precision(length: float) -> None:
    """The reference attends within each region alone; float16 ends at 65504, and the gate must exceed 2 |q| |k|."""
    q, k, v = (draw(1, 20, 2, 14, seed=seed, dtype=torch.float16) for seed in (1, 2, 3))
    q, k = (length * F.normalize(x.double(), dim=-1) for x in (q, k))
    mask = draw_masks(1, 20, soft=False)
    alpha = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    found = modulated_attention(q.half(), k.half(), v, mask.half(), alpha, gated=True)
    logits = torch.einsum("bihd,bjhd->bhij", q.half().double(), k.half().double()) / math.sqrt(14)
    apart = mask[:, None, :, None] != mask[:, None, None, :]
    expected = torch.einsum("bhij,bjhd->bihd", logits.masked_fill(apart, -math.inf).softmax(-1), v.double())
    # A logit of 10,000 is known to 4 in float16, where kernels round it: compare where one key wins clearly.
    first, second = logits.masked_fill(apart, -math.inf).topk(2).values.unbind(-1)
    clear = (first - second > 32).transpose(1, 2) if length > 100 else torch.ones(1, 20, 2, dtype=torch.bool)
    assert clear.float().mean() > 0.5 and found.isfinite().all()
    torch.testing.assert_close(found[clear].double(), expected[clear], rtol=0, atol=0.02)


def test_one_sided_gating_keeps_the_other_bias_exact() -> None:
    q, k, v = (draw(2, 40, 2, 8, seed=seed) for seed in (1, 2, 3))
    alpha = torch.tensor([[0.25, -math.inf], [-1.5, 0.5]], dtype=torch.float64)
    mask = draw_masks(2, 40, soft=False)
    finite = alpha.clamp(min=-5000)
    torch.testing.assert_close(
        modulated_attention(q, k, v, mask, alpha, gated=True),
        dense_attention(q, k, v, dense_bias(mask, finite)),
        rtol=0,
        atol=1e-10,
    )


# --- masks on the token grid


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.integers(0, 99),
)
@settings(max_examples=60)
def test_tokens_are_exact_area_averages(size: tuple[int, int], grid: tuple[int, int], seed: int) -> None:
    """Against an integer refinement: repeat every pixel until sizes divide, then average plain blocks."""
    mask = draw_masks(1, 1, *size, soft=True, seed=seed)
    fine = mask.repeat_interleave(grid[0], 2).repeat_interleave(grid[1], 3)[0, 0]
    truth = fine.reshape(grid[0], size[0], grid[1], size[1]).mean((1, 3))
    found = token_masks(mask, *grid)
    assert found.shape == (1, 1, grid[0] * grid[1])
    torch.testing.assert_close(found.reshape(grid), truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.mean(), mask.mean())


def test_hard_masks_give_a_token_to_whoever_covers_half_of_it() -> None:
    mask = torch.zeros(1, 1, 4, 8)
    mask[..., :2, 0] = 1  # a quarter of the first 4 x 2 token
    mask[..., 2] = 1  # half of the second
    mask[..., 4:7] = 1  # the whole third, half of the fourth
    assert token_masks(mask, 1, 4, hard=True).tolist() == [[[0, 1, 1, 1]]]
    assert token_masks(mask, 1, 4).tolist() == [[[0.25, 0.5, 1, 0.5]]]


# --- in a UNet


@pytest.mark.parametrize("size", SIZES)
def test_alphas_of_zero_change_nothing(tiny_unet: UNet2DConditionModel, size: tuple[int, int]) -> None:
    given_inputs = arguments(size, dtype=torch.float32)
    before = tiny_unet(**given_inputs).sample
    after = run(tiny_unet, install_sma(tiny_unet), draw_masks(2, 1, 64, 48, soft=True), given_inputs)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_a_nano_unet_computes_what_one_with_the_dense_bias_computes(size: tuple[int, int]) -> None:
    """Outputs and gradients of inputs and alphas, float64; masks at eight times the latent's resolution."""
    torch.manual_seed(0)
    unet = build_nano_pipeline().unet.double()
    given_inputs = arguments(size, width=64)
    given_inputs["sample"].requires_grad_()
    mask = draw_masks(2, 1, 8 * size[0], 8 * size[1], soft=True)
    modulation = install_sma(unet).double()
    randomize(modulation)
    ours = run(unet, modulation, mask, given_inputs)
    wanted = [given_inputs["sample"], *modulation.parameters()]
    found = torch.autograd.grad(ours.square().mean(), wanted)
    alphas = modulation.blocks()
    remove_sma(unet)
    without = unet(**given_inputs).sample

    # Each level halves the sides and rounds up; a token covers its share of the mask.
    masks = {}
    for level in (1, 2):
        grid = [-(-side // 2**level) for side in size]
        fine = mask.repeat_interleave(grid[0], 2).repeat_interleave(grid[1], 3)
        blocks = fine.reshape(2, grid[0], 8 * size[0], grid[1], 8 * size[1])
        masks[grid[0] * grid[1]] = blocks.mean((2, 4)).flatten(1)
    for name, module in attn1(unet).items():
        module.set_processor(DenseProcessor(masks, alphas[name]))
    dense = unet(**given_inputs).sample
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-10)
    assert (ours - without).abs().max() > 1e-3
    expected = torch.autograd.grad(dense.square().mean(), wanted)
    for ours_gradient, gradient in zip(found, expected, strict=True):
        assert gradient.abs().max() > 1e-8
        torch.testing.assert_close(ours_gradient, gradient, rtol=1e-7, atol=1e-12)


def test_removing_restores_the_very_processors_and_weights_were_never_touched(
    tiny_unet: UNet2DConditionModel,
) -> None:
    for module in attn1(tiny_unet).values():
        module.set_processor(AttnProcessor2_0())
    processors = dict(tiny_unet.attn_processors)
    weights = {name: value.clone() for name, value in tiny_unet.state_dict().items()}
    given_inputs = arguments((8, 8), dtype=torch.float32)
    before = tiny_unet(**given_inputs).sample
    modulation = install_sma(tiny_unet)
    randomize(modulation)
    changed = {name for name, processor in tiny_unet.attn_processors.items() if processor is not processors[name]}
    assert changed == {f"{name}.processor" for name in attn1(tiny_unet)}
    assert tiny_unet.state_dict().keys() == weights.keys()
    assert (run(tiny_unet, modulation, torch.ones(1, 1, 8, 4), given_inputs) - before).abs().max() < 1e-5
    assert (run(tiny_unet, modulation, torch.eye(8)[None, None], given_inputs) - before).abs().max() > 1e-4
    remove_sma(tiny_unet)
    assert all(tiny_unet.attn_processors[name] is processor for name, processor in processors.items())
    assert torch.equal(tiny_unet(**given_inputs).sample, before)
    assert all(torch.equal(value, weights[name]) for name, value in tiny_unet.state_dict().items())
    with pytest.raises(ValueError, match="has no SMA"):
        remove_sma(tiny_unet)


def test_sma_can_be_installed_once_and_only_where_there_is_self_attention(tiny_unet: UNet2DConditionModel) -> None:
    install_sma(tiny_unet)
    with pytest.raises(ValueError, match="already"):
        install_sma(tiny_unet)
    remove_sma(tiny_unet)
    install_sma(tiny_unet)
    with pytest.raises(ValueError, match="no self-attention"):
        install_sma(tiny_unet.down_blocks[0])


def test_a_lost_mask_is_an_error_never_silence(tiny_unet: UNet2DConditionModel) -> None:
    modulation = install_sma(tiny_unet)
    given_inputs = arguments((8, 8), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="has no masks"):
        tiny_unet(**given_inputs)
    with pytest.raises(RuntimeError, match="needs the masks"):
        next(iter(attn1(tiny_unet).values()))(draw(2, 16, 16, dtype=torch.float32))
    for hook in modulation._hooks:
        hook.remove()
    with pytest.raises(RuntimeError, match="needs the masks"):
        run(tiny_unet, modulation, torch.ones(1, 1, 8, 8), given_inputs)


def test_every_block_feels_its_mask_and_cross_attention_is_told_nothing(
    tiny_unet: UNet2DConditionModel, caplog: pytest.LogCaptureFixture
) -> None:
    """diffusers drops keyword arguments that a processor does not name, with a log line at most."""
    modulation = install_sma(tiny_unet)
    given_inputs = arguments((8, 8), dtype=torch.float32)
    mask = torch.eye(8)[None, None]
    base = run(tiny_unet, modulation, mask, given_inputs)
    for alpha in modulation.parameters():
        with torch.no_grad():
            alpha[0, 1] = -4
        assert (run(tiny_unet, modulation, mask, given_inputs) - base).abs().max() > 1e-6
        with torch.no_grad():
            alpha.zero_()
    assert not caplog.records


def test_masks_of_a_batch_follow_classifier_free_guidance(tiny_unet: UNet2DConditionModel) -> None:
    """A batch of 2 B holds the B pictures twice, in order; one mask serves every picture."""
    modulation = install_sma(tiny_unet)
    randomize(modulation)
    mask = draw_masks(2, 1, 8, 8, soft=False).float()
    given_inputs = arguments((8, 8), batch=4, dtype=torch.float32)
    whole = run(tiny_unet, modulation, mask, given_inputs)
    for index in range(4):
        one = {
            "sample": given_inputs["sample"][index : index + 1],
            "timestep": given_inputs["timestep"],
            "encoder_hidden_states": given_inputs["encoder_hidden_states"][index : index + 1],
            "added_cond_kwargs": {k: v[index : index + 1] for k, v in given_inputs["added_cond_kwargs"].items()},
        }
        alone = run(tiny_unet, modulation, mask[index % 2][None], one)
        torch.testing.assert_close(whole[index : index + 1], alone, rtol=0, atol=1e-5)
    same = run(tiny_unet, modulation, mask[:1].repeat(4, 1, 1, 1), given_inputs)
    torch.testing.assert_close(run(tiny_unet, modulation, mask[:1], given_inputs), same)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(8, 8), r"must be \(B, 1, H, W\)"),
        (torch.ones(1, 3, 8, 8), r"must be \(B, 1, H, W\)"),
        (torch.full((1, 1, 8, 8), 255.0), r"0\.\.1"),
        (torch.full((1, 1, 8, 8), math.nan), r"0\.\.1"),
        (torch.ones(3, 1, 8, 8), "do not fit a batch of 2"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(tiny_unet: UNet2DConditionModel, mask: torch.Tensor, said: str) -> None:
    modulation = install_sma(tiny_unet)
    with pytest.raises(ValueError, match=said):
        run(tiny_unet, modulation, mask, arguments((8, 8), dtype=torch.float32))


def test_a_unets_own_attention_mask_is_refused_beside_sma(tiny_unet: UNet2DConditionModel) -> None:
    modulation = install_sma(tiny_unet)
    with pytest.raises(ValueError, match="takes no attention_mask"), modulation.masks(torch.ones(1, 1, 8, 8)):
        tiny_unet(**arguments((8, 8), dtype=torch.float32), attention_mask=torch.ones(2, 16))


def test_masks_of_booleans_and_of_half_precision_are_taken(tiny_unet: UNet2DConditionModel) -> None:
    modulation = install_sma(tiny_unet)
    randomize(modulation)
    given_inputs = arguments((8, 8), dtype=torch.float32)
    mask = torch.eye(8)[None, None]
    expected = run(tiny_unet, modulation, mask, given_inputs)
    for dtype in (torch.bool, torch.uint8, torch.float16):
        assert torch.equal(run(tiny_unet, modulation, mask.to(dtype), given_inputs), expected)


def test_hard_masks_and_gates_work_through_the_unet(tiny_unet: UNet2DConditionModel) -> None:
    """Gating one block equals a very strong bias with hard masks; what is gated is looked up on entry."""
    modulation = install_sma(tiny_unet.double()).double()
    given_inputs = arguments((8, 8))
    mask = draw_masks(2, 1, 8, 8, soft=True)
    soft = run(tiny_unet, modulation, mask, given_inputs)
    with torch.no_grad():
        for alpha in modulation.parameters():
            alpha[0, 1] = alpha[1, 0] = -2000
    with modulation.masks(mask, hard=True):
        strong = tiny_unet(**given_inputs).sample
    modulation.gate_()
    gated = run(tiny_unet, modulation, mask, given_inputs)
    torch.testing.assert_close(gated, strong, rtol=0, atol=1e-10)
    assert (gated - soft).abs().max() > 1e-4
    with torch.no_grad():
        for alpha in modulation.parameters():
            alpha.zero_()
    torch.testing.assert_close(run(tiny_unet, modulation, mask, given_inputs), soft, rtol=0, atol=1e-12)


def test_fused_kernels_see_no_mask_and_a_head_dimension_of_eights(
    tiny_unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense bias would show as ``attn_mask``; unequal head dimensions lose the fused kernel."""
    seen = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((q.shape[-1], k.shape[-1], v.shape[-1], options))
        return kernel(q, k, v, **options)

    monkeypatch.setattr("mild.model.attention.F.scaled_dot_product_attention", spy)
    modulated_attention(*(draw(1, 9, 2, 64) for _ in range(3)), draw_masks(1, 9, soft=True), draw(2, 2))
    assert seen == [(72, 72, 72, {"scale": 0.125})]


# --- training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_layers_under_sma_train_as_with_the_dense_bias(
    tiny_unet: UNet2DConditionModel, checkpointing: bool
) -> None:
    """The masks are those of the forward pass, also when checkpointing computes it again after others were given."""
    tiny_unet.double()
    add_layered_lora(tiny_unet, LoraSettings(rank=2, alpha=3), seed=0)
    for index, parameter in enumerate(adapter_parameters(tiny_unet, "bg").values()):
        with torch.no_grad():
            parameter.copy_(0.3 * draw(*parameter.shape, seed=200 + index))
    activate(adapter_layers(tiny_unet), "bg")
    given_inputs = arguments((6, 10))
    mask = draw_masks(2, 1, 6, 10, soft=True)
    modulation = install_sma(tiny_unet).double()
    randomize(modulation)
    if checkpointing:
        tiny_unet.enable_gradient_checkpointing()
    tiny_unet.train()
    lora = [*adapter_parameters(tiny_unet, "bg").values()]
    output = run(tiny_unet, modulation, mask, given_inputs)
    with modulation.masks(1 - mask):  # other masks, before the backward pass
        found = torch.autograd.grad(output.square().mean(), [*lora, *modulation.parameters()])

    alphas = modulation.blocks()
    remove_sma(tiny_unet)
    tiny_unet.disable_gradient_checkpointing()
    tokens = {15: torch.nn.functional.avg_pool2d(mask, 2).flatten(1)}
    for name, module in attn1(tiny_unet).items():
        module.set_processor(DenseProcessor(tokens, alphas[name]))
    dense = tiny_unet(**given_inputs).sample
    torch.testing.assert_close(output, dense, rtol=0, atol=1e-10)
    expected = torch.autograd.grad(dense.square().mean(), [*lora, *modulation.parameters()])
    for ours, gradient in zip(found, expected, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours, gradient, rtol=1e-7, atol=1e-13)


def test_adapters_added_after_sma_do_not_freeze_its_alphas(tiny_unet: UNet2DConditionModel) -> None:
    """`add_adapter` freezes everything that belongs to the UNet."""
    modulation = install_sma(tiny_unet)
    add_layered_lora(tiny_unet, LoraSettings(rank=2, alpha=2), seed=0)
    assert all(alpha.requires_grad for alpha in modulation.parameters())
    run(
        tiny_unet, modulation, torch.eye(8)[None, None], arguments((8, 8), dtype=torch.float32)
    ).square().mean().backward()
    assert all(alpha.grad is not None and alpha.grad.abs().max() > 0 for alpha in modulation.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # inside diffusers
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_compute_the_same_without_a_graph_break(
    tiny_unet: UNet2DConditionModel, checkpointing: bool
) -> None:
    """The middle block, with residual blocks around its attention; other masks need no other graph."""
    modulation = install_sma(tiny_unet)
    randomize(modulation)
    if checkpointing:
        tiny_unet.enable_gradient_checkpointing()
    block = tiny_unet.mid_block.train()
    inputs = [draw(2, *shape, seed=8, dtype=torch.float32) for shape in ((16, 3, 5), (32,), (5, 8))]
    alpha = modulation.blocks()["mid_block.attentions.0.transformer_blocks.0.attn1"]
    torch._dynamo.reset()
    results = []
    graphs = CompileCounterWithBackend("aot_eager")
    for model in (block, torch.compile(block, backend=graphs, fullgraph=True)):
        for seed in (1, 2):
            with modulation.masks(draw_masks(2, 1, 6, 10, soft=True, seed=seed)):
                output = model(inputs[0], inputs[1], encoder_hidden_states=inputs[2])
            results.append((output.detach(), *torch.autograd.grad(output.square().mean(), alpha)))
    torch.testing.assert_close(results[2:], results[:2], rtol=1e-4, atol=1e-6)
    assert (results[0][0] - results[1][0]).abs().max() > 1e-4
    assert graphs.frame_count == 1


@given(st.integers(0, 2**31), st.floats(1e-3, 10), st.integers(1, 12))
@settings(max_examples=30)
def test_constraints_hold_after_every_projection_whatever_the_optimizer_does(
    seed: int, rate: float, steps: int
) -> None:
    modulation = SpatialModulation(["a.attn1", "a.b.attn1", "c.attn1"])
    optimizer = torch.optim.SGD(modulation.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for alpha in modulation.parameters():
            alpha.grad = torch.randn(2, 2, generator=generator)
        optimizer.step()
        free = [alpha.detach().clone() for alpha in modulation.parameters()]
        modulation.project_()
        for before, alpha in zip(free, modulation.parameters(), strict=True):
            assert alpha[0, 0] == max(before[0, 0], 0) and alpha[1, 1] == max(before[1, 1], 0)
            assert alpha[0, 1] == min(before[0, 1], 0) and alpha[1, 0] == min(before[1, 0], 0)


def test_projection_keeps_gates() -> None:
    modulation = SpatialModulation(["a.attn1"])
    modulation.gate_()
    modulation.project_()
    assert modulation.blocks()["a.attn1"].tolist() == [[0, -math.inf], [-math.inf, 0]]


def test_alphas_start_at_zero_and_survive_a_safetensors_file(tiny_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    modulation = install_sma(tiny_unet)
    assert all(torch.equal(alpha, torch.zeros(2, 2)) for alpha in modulation.parameters())
    assert list(modulation.blocks()) == list(attn1(tiny_unet))
    randomize(modulation)
    save_file(modulation.state_dict(), tmp_path / "sma.safetensors")
    saved = load_file(tmp_path / "sma.safetensors")
    assert saved.keys() == {f"{name}.alpha" for name in attn1(tiny_unet)}
    given_inputs, mask = arguments((8, 8), dtype=torch.float32), torch.eye(8)[None, None]
    before = run(tiny_unet, modulation, mask, given_inputs)
    remove_sma(tiny_unet)
    other = install_sma(tiny_unet)
    other.load_state_dict(saved)
    assert torch.equal(run(tiny_unet, other, mask, given_inputs), before)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})
