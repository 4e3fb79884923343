"""Spatial offset, layer exchange and boundary smoothing (Algorithms 2 and 3), all optional and neutral at first.

The paper names these three and leaves their form open. Here, with M on the grid of z as soft area averages (right
for any aspect ratio):

- Spatial offset (Algorithm 3, line 1): z_t + E_trans(M), E_trans being three convolutions on the latent grid.
  Algorithm 2, line 2, adds the same to z_0 before the noise instead, so that it would shrink with the noise level
  and not exist at inference, where there is no z_0; both at once would count twice. Algorithm 3's place serves
  training and inference alike.
- Layer exchange (line 12): every layer of a picture sees what the others paint at the same place:
  z_k + up(SiLU(mean over j != k of down(z_j))), 1 x 1 convolutions, over the layers j of the same picture in the batch.
- Boundary smoothing (line 14): z + g * band(M) * (blur(z) - z): a 3 x 3 mean, in the band of one token around M's
  boundary (dilation minus erosion), with one learned g a channel.

"Each attention layer" is taken as each spatial transformer of the UNet: only there features have a height and width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import Transformer2DModel, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from dataset_tools.errors import UserError
from mild.settings import OffsetSettings


def on_grid(mask: torch.Tensor, grid: tuple[int, int] | torch.Size) -> torch.Tensor:
    """Area averages of a mask (B, 1, H, W) on a ``grid`` (h, w): (B, 1, h, w)."""
    return F.adaptive_avg_pool2d(mask, (grid[0], grid[1]))


class SpatialOffset(nn.Module):
    """E_trans of Algorithms 2 and 3; zero until trained (its last convolution starts at zero)."""

    def __init__(self, latent_channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.last = _zero(nn.Conv2d(width, latent_channels, 3, padding=1))

    def forward(self, mask: torch.Tensor, grid: tuple[int, int] | torch.Size) -> torch.Tensor:
        """What to add to a latent (B, C, h, w), where ``grid`` is (h, w), for a mask (B, 1, H, W) in 0..1."""
        hidden = F.silu(self.first(on_grid(mask.to(self.first.weight), grid)))
        offset: torch.Tensor = self.last(F.silu(self.second(hidden)))
        return offset


class LayerExchange(nn.Module):
    """LayerExchange of Algorithm 3; zero until trained, and always zero for a layer that is alone."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        # No bias: nothing exchanged adds nothing.
        self.down = nn.Conv2d(channels, width, 1, bias=False)
        self.up = _zero(nn.Conv2d(width, channels, 1, bias=False))

    def forward(self, z: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        """What to add to features (B, C, h, w); rows with equal ``pictures``, (B,) int, are layers of one picture."""
        hidden = self.down(z.to(self.down.weight.dtype))
        same = (pictures[:, None] == pictures).to(hidden).fill_diagonal_(0)
        share = same / same.sum(1, keepdim=True).clamp(min=1)
        exchanged: torch.Tensor = self.up(F.silu(torch.einsum("kj,jchw->kchw", share, hidden)))
        return exchanged


class BoundarySmoothing(nn.Module):
    """BoundarySmoothing of Algorithm 3; zero until trained, and always zero away from the boundary."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(channels))

    def forward(self, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What to add to features (B, C, h, w) for a mask (B, 1, H, W) in 0..1."""
        m = on_grid(mask.to(z), z.shape[-2:])
        band = F.max_pool2d(m, 3, stride=1, padding=1) + F.max_pool2d(-m, 3, stride=1, padding=1)
        blur = F.avg_pool2d(z, 3, stride=1, padding=1, count_include_pad=False)
        return self.gate.to(z.dtype)[:, None, None] * band * (blur - z)


class Offsets(nn.Module):
    """The parts that the settings switch on, for one UNet; `install_offsets` connects both.

    The state dict holds plain tensors that safetensors can write, and with the settings rebuilds the module.

    Args:
        seed: decides the initial weights.
    """

    def __init__(self, unet: UNet2DConditionModel, settings: OffsetSettings, seed: int) -> None:
        super().__init__()
        self.settings = settings
        layers = _transformers(unet)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.offset = SpatialOffset(unet.config.out_channels, settings.width) if settings.spatial_offset else None
            self.exchanges = nn.ModuleDict(
                {_key(name): LayerExchange(layer.in_channels, settings.width) for name, layer in layers.items()}
                if settings.layer_exchange
                else {}
            )
        self.smoothings = nn.ModuleDict(
            {_key(name): BoundarySmoothing(layer.in_channels) for name, layer in layers.items()}
            if settings.boundary_smoothing
            else {}
        )
        self.given: tuple[torch.Tensor | None, torch.Tensor | None] | None = None
        self.hooks: list[RemovableHandle] = []

    @contextlib.contextmanager
    def masks(self, mask: torch.Tensor | None = None, *, pictures: torch.Tensor | None = None) -> Iterator[None]:
        """Give what the parts need for the UNet's forward passes inside the context.

        The UNet's batch must be a multiple of B; a larger one holds the same rows several times over in the same
        order, as classifier-free guidance does, and copies exchange nothing with each other.

        Args:
            mask: M, (B, 1, H, W) in 0..1 at any size of the picture's aspect: a person's mask for the foreground,
                the union for the background. Needed for spatial offset and boundary smoothing.
            pictures: (B,) int, which picture each row is a layer of. Needed for layer exchange.

        Raises:
            ValueError: something that is needed is missing or has another shape.
        """
        needs_mask = self.settings.spatial_offset or self.settings.boundary_smoothing
        if needs_mask and (mask is None or mask.ndim != 4 or mask.shape[1] != 1):
            raise ValueError(f"the mask must be (B, 1, H, W), not {None if mask is None else tuple(mask.shape)}")
        if self.settings.layer_exchange and (pictures is None or pictures.ndim != 1):
            raise ValueError(f"pictures must be (B,), not {None if pictures is None else tuple(pictures.shape)}")
        before, self.given = self.given, (mask, pictures)
        try:
            yield
        finally:
            self.given = before

    def _mask(self, batch: int) -> torch.Tensor:
        mask = None if self.given is None else self.given[0]
        if mask is None or batch % len(mask):
            raise ValueError(f"a UNet with offsets needs masks for its batch of {batch}: run it inside `masks`")
        return mask.repeat(batch // len(mask), 1, 1, 1)

    def _pictures(self, batch: int) -> torch.Tensor:
        pictures = None if self.given is None else self.given[1]
        if pictures is None or batch % len(pictures):
            raise ValueError(
                f"a UNet with layer exchange needs pictures for its batch of {batch}: run it inside `masks`"
            )
        copies = batch // len(pictures)
        copy = torch.arange(copies, device=pictures.device).repeat_interleave(len(pictures))
        # Numbers of their own for each copy.
        return (pictures - pictures.min()).repeat(copies) + copy * (pictures.max() - pictures.min() + 1)

    def _before_unet(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self.offset is not None
        sample = args[0] if args else kwargs["sample"]
        offset = self.offset(self._mask(len(sample)).to(sample.device), sample.shape[-2:]).to(sample.dtype)
        # An inpainting UNet takes [noisy latent; mask; masked latent].
        channels = offset.shape[1]
        sample = torch.cat([sample[:, :channels] + offset, sample[:, channels:]], dim=1)
        return ((sample, *args[1:]), kwargs) if args else (args, {**kwargs, "sample": sample})

    def _after_transformer(
        self, key: str, layer: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        z, *rest = output
        if self.settings.layer_exchange:
            z = z + self.exchanges[key](z, self._pictures(len(z)).to(z.device)).to(z.dtype)
        if self.settings.boundary_smoothing:
            z = z + self.smoothings[key](z, self._mask(len(z)).to(z.device))
        return (z, *rest)


def install_offsets(unet: UNet2DConditionModel, offsets: Offsets) -> None:
    """Hook the parts that are switched on into a UNet, which then runs inside `Offsets.masks` only.

    No weight is touched, and none added to the UNet. Install before ``torch.compile``; `remove_offsets` undoes it.

    Raises:
        UserError: the offsets were made for another UNet.
        ValueError: they are installed already.
    """
    if offsets.hooks:
        raise ValueError("these offsets are installed already")
    fitting = Offsets(unet, offsets.settings, seed=0)
    if {name: p.shape for name, p in fitting.named_parameters()} != {
        name: p.shape for name, p in offsets.named_parameters()
    }:
        raise UserError("these offsets were made for another base: its spatial transformers or latents differ")
    if offsets.offset is not None:
        offsets.hooks.append(unet.register_forward_pre_hook(offsets._before_unet, with_kwargs=True))
    if offsets.exchanges or offsets.smoothings:
        for name, layer in _transformers(unet).items():
            hook = functools.partial(offsets._after_transformer, _key(name))
            offsets.hooks.append(layer.register_forward_hook(hook))


def remove_offsets(offsets: Offsets) -> None:
    """Take every hook of the offsets out of their UNet."""
    for hook in offsets.hooks:
        hook.remove()
    offsets.hooks.clear()


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _transformers(unet: UNet2DConditionModel) -> dict[str, Transformer2DModel]:
    """Every spatial transformer by name, in the UNet's order."""
    return {name: layer for name, layer in unet.named_modules() if isinstance(layer, Transformer2DModel)}


def _key(name: str) -> str:
    """A layer's name as torch allows it for a module."""
    return name.replace(".", "/")
