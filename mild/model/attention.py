"""Spatially-Modulated Attention (SMA, eq. 3): a learned bias between regions in every self-attention of a UNet.

Equation 3 adds ``alpha_st`` to the logit of query i and key j, where s and t say whether i and j are foreground
(1) or background (0). Soft masks m in 0..1 weigh the four cases: the bias is
``sum_st alpha_st w_s(m_i) w_t(m_j)`` with ``w_1(m) = m`` and ``w_0(m) = 1 - m``, which is eq. 3 where masks are hard.

The N x N bias is never built. Softmax ignores what is constant along a row, so only ``beta_0 = alpha_01 - alpha_00``
(for background queries) and ``beta_1 = alpha_11 - alpha_10`` (for foreground queries) matter, and up to a constant a
row the bias is ``(1 - m_i) beta_0 m_j - m_i beta_1 (1 - m_j)``: a scalar product of two numbers of the query with two
of the key. They ride as extra channels on Q and K at the original scale, and the fused kernel runs as usual. Both
terms vanish inside a region, so strong biases cost no precision there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import Transformer2DModel, UNet2DConditionModel
from torch import nn

CHANNELS = 2
"""Extra channels on Q and K."""
MULTIPLE = 8
"""Fused kernels want a head dimension that is a multiple of this."""
UNDERFLOW = 800.0
"""exp(-UNDERFLOW) is exactly 0 in every floating-point type that torch computes attention in."""


class SpatialModulation(nn.Module):
    """The four scalars of eq. 3 for each self-attention block, and the masks that they apply to.

    Parameters are float32, (2, 2), ``alpha[s, t]``, named after the block, as in
    ``down_blocks.1.attentions.0.transformer_blocks.0.attn1.alpha``; so ``state_dict()`` can go into a safetensors
    file as it is. They start at zero (section 3.4) and are no part of the UNet: its own parameters, its state dict
    and what peft freezes do not know them. An optimizer gets ``parameters()``; call `project_` after its steps.
    """

    def __init__(self, blocks: list[str]) -> None:
        super().__init__()
        for block in blocks:
            module: nn.Module = self
            for part in block.split("."):
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.alpha = nn.Parameter(torch.zeros(2, 2))
        self._given: tuple[torch.Tensor, bool] | None = None
        self._processors: dict[str, SpatialAttention] = {}
        self._previous: dict[str, Any] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def blocks(self) -> dict[str, nn.Parameter]:
        """``alpha`` (2, 2) by the name of the block, in the UNet's order."""
        return {name.removesuffix(".alpha"): parameter for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def project_(self) -> None:
        """Enforce the hard constraints alpha_10, alpha_01 <= 0 and alpha_11, alpha_00 >= 0 (section 3.4)."""
        alphas = list(self.parameters())
        sign = alphas[0].new_tensor([[1.0, -1.0], [-1.0, 1.0]])  # once: a copy to a GPU waits for it
        for alpha in alphas:
            alpha.copy_((alpha * sign).relu() * sign)

    @torch.no_grad()
    def gate_(self) -> None:
        """Hard gating: alpha_10 = alpha_01 = -inf in every block (Theorem 2). See `SpatialAttention`."""
        for alpha in self.parameters():
            alpha[0, 1] = alpha[1, 0] = -math.inf

    @contextlib.contextmanager
    def masks(self, mask: torch.Tensor, *, hard: bool = False) -> Iterator[None]:
        """Give the masks for the UNet's forward passes inside the context.

        The backward pass may come later: with gradient checkpointing too it uses the masks of its forward pass.
        Whether a block is gated (an infinite alpha) is looked up when the context is entered.

        Args:
            mask: (B, 1, H, W), 1 where the foreground is, soft values allowed, at any resolution (of the picture or
                of the latent). The UNet's batch must be a multiple of B; a larger one holds the B pictures several
                times over in the same order, as classifier-free guidance does.
            hard: make each token foreground or background, whichever covers at least half of it.

        Raises:
            ValueError: the mask's shape or values are not as said.
        """
        alphas = torch.stack([alpha.detach() for alpha in self.parameters()])
        # To where the UNet computes, once, not in each of its layers.
        mask = checked_masks(mask).to(alphas.device)
        # One look at all blocks: a look a block and forward pass would make a GPU wait each time.
        infinite = alphas.isinf().flatten(1).any(1).tolist()
        for processor, gated in zip(self._processors.values(), infinite, strict=True):
            processor.gated = gated
        before, self._given = self._given, (mask, hard)
        try:
            yield
        finally:
            self._given = before

    def _hand_over(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Before a transformer of the UNet: pass the masks of its token grid on as its ``attention_mask``.

        diffusers hands a three-dimensional ``attention_mask`` unchanged to every ``attn1`` and to nothing else, also
        when checkpointing computes a block again; other keyword arguments it drops in silence.
        """
        if self._given is None:
            raise RuntimeError(
                "SMA is installed but has no masks: run the UNet inside `with modulation.masks(mask)`, or `remove_sma`"
            )
        if kwargs.get("attention_mask") is not None:
            raise ValueError("a UNet with SMA takes no attention_mask: SMA's masks travel in its place")
        mask, hard = self._given
        tokens = batch_masks(mask, args[0] if args else kwargs["hidden_states"], hard=hard)
        return args, kwargs | {"attention_mask": tokens}


class SpatialAttention:
    """The processor of one ``attn1``: what `diffusers` computes there, with the bias of eq. 3.

    **Hard gating** (an infinite alpha) is exact: the logits of gated pairs are lowered by more than twice the largest
    logit that the given Q and K can have, so that their weights underflow to exactly 0 in the kernel, wherever its
    blocks begin; nothing infinite is computed with, hence no NaN, and no token is left without a key, since it has
    itself. For this a block with a gate uses hard masks. A background token's output then does not depend on any
    foreground token in a single bit. That holds for attention; convolutions and group norms of a UNet mix regions
    all the same, so eq. 16 does not hold for a UNet with group norms at any distance.
    """

    def __init__(self, modulation: SpatialModulation, alpha: nn.Parameter) -> None:
        self.modulation = modulation
        self.alpha = alpha
        self.gated = False

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within ``hidden_states`` (B, N, C); ``attention_mask`` holds the token masks (B, 1, N)."""
        if attention_mask is None or encoder_hidden_states is not None or hidden_states.ndim != 3:
            raise RuntimeError("SMA needs the masks of its tokens and works on self-attention of (B, N, C) alone")
        query, key, value = (
            layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        output = modulated_attention(query, key, value, attention_mask.squeeze(1), self.alpha, gated=self.gated)
        return attn.to_out[1](attn.to_out[0](output.flatten(2)))


def install_sma(unet: UNet2DConditionModel) -> SpatialModulation:
    """Put SMA into every self-attention (``attn1``) of a UNet; with alphas at zero its output stays as it was.

    No weight is touched and none added to the UNet: keep the `SpatialModulation`. Install before ``torch.compile``.
    Without masks the UNet then refuses to run. `remove_sma` undoes it.

    Raises:
        ValueError: the UNet has SMA already, or no self-attention.
    """
    attentions = _self_attentions(unet)
    if not attentions:
        raise ValueError("this UNet has no self-attention block (attn1)")
    if _installed(unet) is not None:
        raise ValueError("this UNet has SMA already")
    modulation = SpatialModulation(list(attentions)).to(unet.device)
    for (name, attention), alpha in zip(attentions.items(), modulation.parameters(), strict=True):
        modulation._previous[name] = attention.processor
        modulation._processors[name] = SpatialAttention(modulation, alpha)
        attention.set_processor(modulation._processors[name])
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            modulation._hooks.append(module.register_forward_pre_hook(modulation._hand_over, with_kwargs=True))
    return modulation


def remove_sma(unet: UNet2DConditionModel) -> None:
    """Give every self-attention the very processor back that it had before `install_sma`.

    Raises:
        ValueError: the UNet has no SMA.
    """
    modulation = _installed(unet)
    if modulation is None:
        raise ValueError("this UNet has no SMA")
    for name, attention in _self_attentions(unet).items():
        attention.set_processor(modulation._previous[name])
    for hook in modulation._hooks:
        hook.remove()


def _self_attentions(unet: UNet2DConditionModel) -> dict[str, Any]:
    return {name: module for name, module in unet.named_modules() if name.rpartition(".")[2] == "attn1"}


def _installed(unet: UNet2DConditionModel) -> SpatialModulation | None:
    processors = (attention.processor for attention in _self_attentions(unet).values())
    return next((p.modulation for p in processors if isinstance(p, SpatialAttention)), None)


def modulated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    alpha: torch.Tensor,
    *,
    gated: bool = False,
) -> torch.Tensor:
    """Softmax attention with the bias of eq. 3, by a fused kernel.

    Args:
        query, key, value: (B, N, heads, d).
        mask: (B, N) in 0..1, of the tokens.
        alpha: (2, 2), ``alpha[s, t]``; gradients flow to it.
        gated: alpha has infinite entries; the mask is made hard.

    Returns:
        (B, N, heads, d).
    """
    dimension = query.shape[-1]
    padded = math.ceil((dimension + CHANNELS) / MULTIPLE) * MULTIPLE
    precise = torch.promote_types(query.dtype, torch.float32)
    mask = mask.to(precise)
    alpha = alpha.to(query.device, precise)
    # What a background query adds for foreground keys, and a foreground query for background keys.
    bias = torch.stack([alpha[0, 1] - alpha[0, 0], alpha[1, 0] - alpha[1, 1]]) * math.sqrt(dimension)
    share = torch.ones_like(bias)
    if gated:
        mask = (mask >= 0.5).to(precise)
        closed = bias.isinf()
        bias = torch.where(closed, _gate(query.detach(), key.detach(), precise) * math.sqrt(dimension), bias)
        # Its square root goes to either side: as a whole it is beyond float16 where |q| and |k| are about 170.
        share = torch.where(closed, bias.abs().sqrt(), share)
    foreground, background = mask[..., None], 1 - mask[..., None]
    of_query = torch.cat([background, foreground], -1) * (bias / share)
    of_key = torch.cat([foreground, background], -1) * share
    # V is widened too: kernels are fused only where all three have one head dimension.
    output = F.scaled_dot_product_attention(
        _widen(query, of_query, padded),
        _widen(key, of_key, padded),
        _widen(value, torch.zeros_like(of_key), padded),
        scale=dimension**-0.5,
    )
    return output[..., :dimension].transpose(1, 2)


def _widen(heads: torch.Tensor, channels: torch.Tensor, dimension: int) -> torch.Tensor:
    """(B, N, heads, d) and channels (B, N, c) that all heads share, as (B, heads, N, dimension), zeros at the end.

    This copies, so each head's tokens are laid out in one piece, which kernels on a CPU read faster.
    """
    spare = dimension - heads.shape[-1] - channels.shape[-1]
    shared = F.pad(channels.to(heads.dtype), (0, spare))[:, None].expand(-1, heads.shape[2], -1, -1)
    return torch.cat([heads.transpose(1, 2), shared], -1)


def _gate(query: torch.Tensor, key: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bias after which no logit can count beside another: minus twice the bound of all logits, and some more."""
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=dtype).amax() for x in (query, key)]
    return -(2.02 * norms[0] * norms[1] / math.sqrt(query.shape[-1]) + UNDERFLOW)


def checked_masks(mask: torch.Tensor) -> torch.Tensor:
    """Masks (B, 1, H, W) of any type, as float32 or more precise; raises ValueError unless they lie in 0..1."""
    if mask.ndim != 4 or mask.shape[1] != 1 or 0 in mask.shape:
        raise ValueError(f"masks must be (B, 1, H, W), not {tuple(mask.shape)}")
    mask = mask if mask.is_floating_point() and mask.itemsize >= 4 else mask.float()
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("masks must lie in 0..1")
    return mask


def batch_masks(mask: torch.Tensor, hidden_states: torch.Tensor, *, hard: bool = False) -> torch.Tensor:
    """Masks (B, 1, H, W) for the tokens of feature maps (k B, C, h, w): (k B, 1, h w); see `token_masks`.

    Both lie on one device.

    Raises:
        ValueError: the batch is no multiple of B.
    """
    batch, _, height, width = hidden_states.shape
    if batch % len(mask):
        raise ValueError(f"masks for {len(mask)} pictures do not fit a batch of {batch}")
    tokens = token_masks(mask, height, width, hard=hard)
    return tokens.repeat(batch // len(mask), 1, 1)


def token_masks(mask: torch.Tensor, height: int, width: int, *, hard: bool = False) -> torch.Tensor:
    """Bring masks to a token grid: each token gets the mean of its area, also where sizes do not divide.

    The mean over all tokens is that of the mask. Thresholds or pooling by maximum lose or add people (a sixth and
    more at 16 x 16 tokens).

    Args:
        mask: (B, 1, H, W) in 0..1.
        height, width: of the grid; tokens are numbered row by row.
        hard: round to 0 or 1, a half to 1.

    Returns:
        (B, 1, height * width), of the mask's dtype.
    """
    if mask.shape[-2] % height == 0 and mask.shape[-1] % width == 0:
        tokens = F.adaptive_avg_pool2d(mask, (height, width))
    else:
        rows, columns = _shares(mask.shape[-2], height, mask), _shares(mask.shape[-1], width, mask)
        tokens = rows @ mask @ columns.mT
    if hard:
        tokens = (tokens >= 0.5).to(tokens.dtype)
    return tokens.flatten(2)


def _shares(pixels: int, tokens: int, like: torch.Tensor) -> torch.Tensor:
    """(tokens, pixels): how much of a token's length each pixel covers; rows sum to 1."""
    edges = torch.arange(tokens + 1, device=like.device, dtype=like.dtype) * (pixels / tokens)
    starts = torch.arange(pixels, device=like.device, dtype=like.dtype)
    overlap = torch.minimum(edges[1:, None], starts + 1) - torch.maximum(edges[:-1, None], starts)
    return overlap.clamp(min=0) * (tokens / pixels)
