"""Semantic leakage: how much background tokens attend to the foreground, and what it leaves in the hole.

The Cross-Domain Attention Gap gamma (eq. 1), the cross-domain mass (section 5.1), both with and without the bias of
SMA, and the residual's spectrum (figure 2).

What the paper states about them, for logits A, weights P = softmax(A) and p_i the mass that background query i gives
to foreground keys:

- Eq. 33 holds: p_i <= sigmoid(-gamma) <= exp(-gamma), with equality for the query at which eq. 1 has its minimum.
- SMA with hard masks moves gamma by exactly alpha_00 - alpha_01, for given Q and K.
- Eq. 6 and 68 are false as printed. Lowering foreground logits by beta shrinks the *odds* p / (1 - p) by exactly
  exp(-beta); the mass becomes exp(-beta) p / (1 - (1 - exp(-beta)) p), which is never below exp(-beta) p (the
  proof enlarges the denominator where it should shrink it). What holds is
  ``exp(-beta) p <= p' <= min(p, exp(-beta) p / (1 - p))``: the rate exp(-beta) is reached where little leaks already.
- Eq. 7 and 71 build on eq. 68 and fall with it, and the row-sum norm of a product's cross-domain part is not bounded
  by the product of those of its factors; so nothing here composes blocks or steps: every one is measured.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from torch import nn

from mild.charts import COLOURS, Line, line_chart
from mild.model.attention import SpatialAttention, batch_masks, checked_masks

TILE = 1024
"""Queries and keys whose logits are held at a time."""


@dataclass(frozen=True)
class Leakage:
    """How far background tokens look into the foreground, for each picture and head."""

    gamma: torch.Tensor
    """(B, heads), eq. 1 in nats; inf where a picture has no foreground or no background token."""
    cross_mass: torch.Tensor
    """(B, heads), 0..1: share of a background token's attention that foreground tokens get, mean over the former."""
    peak_mass: torch.Tensor
    """(B, heads), 0..1: the largest such share, the norm of T(P) in eq. 6; equals sigmoid(-gamma)."""


@dataclass(frozen=True)
class BlockLeakage:
    """One self-attention block in one forward pass of a UNet."""

    block: str
    """Its name in the UNet, ending in ``attn1``."""
    step: int
    """The forward pass, counted from 0 since the measurement began."""
    timestep: float
    """The diffusion time that the UNet was given, of the batch's first picture."""
    vanilla: Leakage
    """Of the logits without SMA."""
    modulated: Leakage
    """Of the logits with the bias of SMA; where none is installed, the same as ``vanilla``."""

    @property
    def contraction(self) -> torch.Tensor:
        """(B, heads): cross-domain mass with SMA over that without; 1 where there is none at all."""
        mass = self.vanilla.cross_mass
        return torch.where(mass > 0, self.modulated.cross_mass / mass, 1.0)


@torch.no_grad()
def leakage(
    query: torch.Tensor,
    key: torch.Tensor,
    foreground: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
    tile: int = TILE,
) -> Leakage:
    """Measure eq. 1 and the cross-domain mass of softmax attention, tile by tile with running log-sum-exps.

    Args:
        query, key: (B, N, heads, d); half precision is computed in float32.
        foreground: (B, N) bool, the sets F and B of eq. 1.
        mask, alpha: (B, N) in 0..1 and (2, 2): add the bias of eq. 3 to the logits; infinite alphas (hard gating)
            want a mask of 0 and 1.
        tile: queries and keys held at a time; N x N logits never are.
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    query, key = (x.to(precise).transpose(1, 2) for x in (query, key))
    batch, heads, count, dimension = query.shape
    gaps = []
    for queries in torch.arange(count, device=query.device).split(tile):
        sums = [query.new_full((batch, heads, len(queries)), -math.inf) for _ in range(2)]
        for keys in torch.arange(count, device=query.device).split(tile):
            logits = query[:, :, queries] @ key[:, :, keys].mT / math.sqrt(dimension)
            if mask is not None and alpha is not None:
                logits = logits + _bias(mask[:, queries], mask[:, keys], alpha.to(mask.device)).to(precise)
            for domain in range(2):
                inside = (foreground[:, keys] == bool(domain))[:, None, None]
                partial = logits.masked_fill(~inside, -math.inf).logsumexp(-1)
                sums[domain] = torch.logaddexp(sums[domain], partial)
        gaps.append(sums[0] - sums[1])
    gap = torch.cat(gaps, -1)
    background = ~foreground[:, None].expand_as(gap)
    mass = torch.sigmoid(-gap).masked_fill(~background, 0)
    return Leakage(
        gamma=gap.masked_fill(~background, math.inf).amin(-1),
        cross_mass=mass.sum(-1) / background.sum(-1).clamp(min=1),
        peak_mass=mass.amax(-1),
    )


def _bias(of_queries: torch.Tensor, of_keys: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Eq. 3 for a tile: (B, 1, queries, keys). Cases of weight 0 count nothing, however large their alpha."""
    weights = [(1 - mask, mask) for mask in (of_queries, of_keys)]
    bias = torch.zeros((), device=alpha.device, dtype=alpha.dtype)
    for s in range(2):
        for t in range(2):
            weight = weights[0][s][:, :, None] * weights[1][t][:, None, :]
            bias = bias + torch.where(weight > 0, weight * alpha[s, t], 0)
    return bias[:, None]


@contextlib.contextmanager
def measure_leakage(
    unet: UNet2DConditionModel, mask: torch.Tensor, *, tile: int = TILE
) -> Iterator[list[BlockLeakage]]:
    """Record every self-attention of every forward pass inside the context; the UNet computes as before.

    Works on a UNet with or without SMA. Blocks are measured on their own Q and K, hence with LoRA, on the device
    where they are; the results are on the CPU.

    Args:
        mask: (B, 1, H, W) in 0..1, 1 where the foreground is, at any resolution; see `SpatialModulation.masks`. F
            of eq. 1 is every token of which it covers at least half, so people much smaller than a token of a
            coarse block leave gamma infinite there.
        tile: see `leakage`.

    Yields:
        The list that fills, in the order of computation.
    """
    recorder = _Recorder(checked_masks(mask), tile)
    hooks = [unet.register_forward_pre_hook(recorder.start, with_kwargs=True)]
    for name, module in unet.named_modules():
        if isinstance(module, Transformer2DModel):
            hooks.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
        elif name.rpartition(".")[2] == "attn1":
            recorder.names[module] = name
            hooks.append(module.register_forward_pre_hook(recorder.record, with_kwargs=True))
    try:
        yield recorder.records
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Recorder:
    mask: torch.Tensor
    tile: int
    records: list[BlockLeakage] = field(default_factory=list)
    names: dict[nn.Module, str] = field(default_factory=dict)
    step: int = -1
    timestep: float = math.nan
    foreground: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def start(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.step += 1
        self.timestep = float(torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).flatten()[0])

    def enter(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Bring the mask to the grid of this transformer's tokens."""
        hidden_states = args[0] if args else kwargs["hidden_states"]
        tokens = batch_masks(self.mask.to(hidden_states.device), hidden_states, hard=True)
        self.foreground = tokens.squeeze(1).bool()

    def record(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            hidden_states = args[0] if args else kwargs["hidden_states"]
            query, key = (layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k))
            vanilla = modulated = leakage(query, key, self.foreground, tile=self.tile)
            if isinstance(attn.processor, SpatialAttention):
                mask = kwargs["attention_mask"].squeeze(1)
                mask = (mask >= 0.5).to(mask.dtype) if attn.processor.gated else mask
                alpha = attn.processor.alpha
                modulated = leakage(query, key, self.foreground, mask=mask, alpha=alpha, tile=self.tile)
        self.records.append(
            BlockLeakage(self.names[attn], self.step, self.timestep, _on_cpu(vanilla), _on_cpu(modulated))
        )


def _on_cpu(measured: Leakage) -> Leakage:
    return Leakage(measured.gamma.cpu(), measured.cross_mass.cpu(), measured.peak_mass.cpu())


def residual_spectrum(
    result: np.ndarray, truth: np.ndarray, mask: np.ndarray, rings: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """The spectrum of what a method left in the hole (figure 2): log-amplitude, averaged over directions.

    The residual ``result - truth``, mean of the colours, is set to 0 outside the mask. Its Fourier amplitude (root
    mean square over a ring) is divided by the square root of the mask's area, so that holes of all sizes compare:
    noise of standard deviation s has amplitude s at every frequency.

    Args:
        result, truth: (H, W, 3) or (H, W), uint8 or float in 0..255.
        mask: (H, W) bool, the hole; not empty.
        rings: number of rings of equal width between 0 and 0.5 cycles a pixel.

    Returns:
        Frequencies (rings,) in cycles a pixel, the rings' middles, and ``log(1 + amplitude)`` (rings,), natural,
        with amplitudes in 8-bit levels; nan for a ring that a small picture has no frequency in.

    Raises:
        ValueError: sizes differ or the mask is empty.
    """
    if result.shape != truth.shape or mask.shape != result.shape[:2] or not mask.any():
        raise ValueError(f"sizes differ or empty mask: {result.shape}, {truth.shape}, {mask.shape}")
    difference = result.astype(np.float64) - truth.astype(np.float64)
    residual = (difference.mean(2) if difference.ndim == 3 else difference) * mask
    power = np.abs(np.fft.fft2(residual)) ** 2 / mask.sum()
    height, width = mask.shape
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    ring = (radius * 2 * rings).astype(int)
    inside = ring < rings
    counts = np.bincount(ring[inside], minlength=rings)
    sums = np.bincount(ring[inside], weights=power[inside], minlength=rings)
    mean = np.divide(sums, counts, out=np.full(rings, np.nan), where=counts > 0)
    return (np.arange(rings) + 0.5) / (2 * rings), np.log1p(np.sqrt(mean))


def gamma_chart(records: Sequence[BlockLeakage]) -> str:
    """SVG of gamma over the steps: a stage of the UNet a colour, solid with SMA, dotted without.

    A point is the median over a stage's blocks, heads and pictures.
    """
    values: dict[str, dict[int, list[torch.Tensor]]] = {}
    for record in records:
        stage = record.block.split(".attentions.")[0]
        for name, measured in ((stage, record.modulated), (f"{stage} without SMA", record.vanilla)):
            values.setdefault(name, {}).setdefault(record.step, []).append(measured.gamma.flatten())
    lines: dict[str, Line] = {}
    for number, (name, steps) in enumerate(values.items()):
        heights = np.array([torch.cat(own).median().item() for own in steps.values()])
        # Each stage is followed by itself without SMA.
        colour, dotted = COLOURS[number // 2 % len(COLOURS)], number % 2 == 1
        lines[name] = Line(np.array(list(steps), float), heights, colour, dotted=dotted, named=not dotted)
    return line_chart(lines, "step", "gamma (eq. 1) in nats, dotted: without SMA")


def spectrum_chart(spectra: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """SVG of residual spectra (figure 2), a method a line; values as `residual_spectrum` gives them."""
    lines = {
        name: Line(*spectrum, COLOURS[number % len(COLOURS)]) for number, (name, spectrum) in enumerate(spectra.items())
    }
    return line_chart(lines, "cycles a pixel", "log(1 + amplitude) of the residual")
