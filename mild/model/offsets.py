"""Spatial offset and boundary smoothing (Algorithms 2 and 3), both optional and neutral at first.

The paper names these two and leaves their form open. Here, with M on the grid of z as soft area averages (right
for any aspect ratio):

- Spatial offset (Algorithm 3, line 1): z_t + E_trans(M), E_trans being three convolutions on the latent grid.
  Algorithm 2, line 2, adds the same to z_0 before the noise instead, so that it would shrink with the noise level
  and not exist at inference, where there is no z_0; both at once would count twice. Algorithm 3's place serves
  training and inference alike.
- Boundary smoothing (line 14): z + g * band(M) * (blur(z) - z): a 3 x 3 mean, in the band of one token around M's
  boundary (dilation minus erosion), with one learned g a channel.

"Each attention layer" is taken as each spatial transformer of the UNet: only there features have a height and width.

Layer exchange (line 12), by which the layers of one picture would see each other, is left out: a training step shows
one person of each picture, so that nothing would train it.
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
        self.last = zeroed(nn.Conv2d(width, latent_channels, 3, padding=1))

    def forward(self, mask: torch.Tensor, grid: tuple[int, int] | torch.Size) -> torch.Tensor:
        """What to add to a latent (B, C, h, w), where ``grid`` is (h, w), for a mask (B, 1, H, W) in 0..1."""
        hidden = F.silu(self.first(on_grid(mask.to(self.first.weight), grid)))
        offset: torch.Tensor = self.last(F.silu(self.second(hidden)))
        return offset


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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.offset = SpatialOffset(unet.config.out_channels, settings.width) if settings.spatial_offset else None
        self.smoothings = nn.ModuleDict(
            {_key(name): BoundarySmoothing(layer.in_channels) for name, layer in _transformers(unet).items()}
            if settings.boundary_smoothing
            else {}
        )
        self.given: torch.Tensor | None = None
        self.hooks: list[RemovableHandle] = []

    @contextlib.contextmanager
    def masks(self, mask: torch.Tensor) -> Iterator[None]:
        """Give the mask that the parts need for the UNet's forward passes inside the context.

        The UNet's batch must be a multiple of B; a larger one holds the same rows several times over in the same
        order, as classifier-free guidance does.

        Args:
            mask: M, (B, 1, H, W) in 0..1 at any size of the picture's aspect: a person's mask for the foreground,
                the union for the background.

        Raises:
            ValueError: it has another shape.
        """
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise ValueError(f"the mask must be (B, 1, H, W), not {tuple(mask.shape)}")
        # To where the UNet computes, once, not in each of its layers.
        before, self.given = self.given, mask.to(next(self.parameters()).device)
        try:
            yield
        finally:
            self.given = before

    def _mask(self, batch: int) -> torch.Tensor:
        if self.given is None or batch % len(self.given):
            raise ValueError(f"a UNet with offsets needs masks for its batch of {batch}: run it inside `masks`")
        return self.given.repeat(batch // len(self.given), 1, 1, 1)

    def _before_unet(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self.offset is not None
        sample = args[0] if args else kwargs["sample"]
        offset = self.offset(self._mask(len(sample)), sample.shape[-2:]).to(sample.dtype)
        # An inpainting UNet takes [noisy latent; mask; masked latent].
        channels = offset.shape[1]
        sample = torch.cat([sample[:, :channels] + offset, sample[:, channels:]], dim=1)
        return ((sample, *args[1:]), kwargs) if args else (args, {**kwargs, "sample": sample})

    def _after_transformer(
        self, key: str, layer: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        z, *rest = output
        return (z + self.smoothings[key](z, self._mask(len(z))), *rest)


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
    if offsets.smoothings:
        for name, layer in _transformers(unet).items():
            hook = functools.partial(offsets._after_transformer, _key(name))
            offsets.hooks.append(layer.register_forward_hook(hook))


def remove_offsets(offsets: Offsets) -> None:
    """Take every hook of the offsets out of their UNet."""
    for hook in offsets.hooks:
        hook.remove()
    offsets.hooks.clear()


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer, which gives zeros until trained."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _transformers(unet: UNet2DConditionModel) -> dict[str, Transformer2DModel]:
    """Every spatial transformer by name, in the UNet's order."""
    return {name: layer for name, layer in unet.named_modules() if isinstance(layer, Transformer2DModel)}


def _key(name: str) -> str:
    """A layer's name as torch allows it for a module."""
    return name.replace(".", "/")
