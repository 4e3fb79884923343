"""How far people reach: a head on the UNet's last features (ours, no part of the paper).

Masks, of networks and of people, are those of what is seen, and faulty. Each branch therefore says, where its hole or
masks leave it open, what it takes for the person:

- the background branch, outside its hole: what is to be repainted though no mask shows it, such as missed limbs,
  shadows and reflections (`mild.training.batches` has the targets);
- a foreground branch, inside its hole: where the person goes on behind those who were there.

Two convolutions read what the UNet's last one reads, and give a few answers for each cell of the latent. The second
starts at zero, so that every probability is 1/2 until trained.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from dataset_tools.errors import UserError
from mild.model.backbone import BRANCHES, Branch
from mild.model.offsets import zeroed
from mild.settings import ExtentsSettings


class Extents(nn.Module):
    """The heads of both branches, for one UNet; `install_extents` connects them.

    The state dict holds plain tensors that safetensors can write, and with the settings rebuilds the module.

    Args:
        seed: decides the initial weights.
    """

    def __init__(self, unet: UNet2DConditionModel, settings: ExtentsSettings, seed: int) -> None:
        super().__init__()
        self.settings = settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleDict({branch: _head(unet.conv_out.in_channels, settings) for branch in BRANCHES})
        self.channels = int(unet.conv_out.in_channels)
        self.seen: torch.Tensor | None = None
        self.hook: RemovableHandle | None = None

    def logits(self, branch: Branch, size: tuple[int, int] | torch.Size) -> torch.Tensor:
        """Of the UNet's latest forward pass, (B, 1, H, W) float32, where ``size`` is (H, W).

        Raises:
            ValueError: there was none since the heads were installed or last asked.
        """
        if self.seen is None:
            raise ValueError("the extents are known after a forward pass of the UNet, and only once")
        seen, self.seen = self.seen, None
        head = self.heads[branch]
        found = F.pixel_shuffle(head(seen.to(next(head.parameters()))), self.settings.detail)
        if found.shape[-2:] == tuple(size):
            return found
        return F.interpolate(found, size=(size[0], size[1]), mode="bilinear", antialias=True)

    def _before_last(self, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.seen = args[0]


def install_extents(unet: UNet2DConditionModel, extents: Extents) -> None:
    """Let the heads see the features of a UNet, whose output stays as it is; `remove_extents` undoes it.

    Raises:
        UserError: they were made for another UNet.
        ValueError: they are installed already.
    """
    if extents.hook is not None:
        raise ValueError("these extents are installed already")
    if extents.channels != unet.conv_out.in_channels:
        raise UserError("these extents were made for another base: its UNet's last features differ")
    extents.hook = unet.conv_out.register_forward_pre_hook(extents._before_last)


def remove_extents(extents: Extents) -> None:
    """Take the hook out of the UNet."""
    if extents.hook is not None:
        extents.hook.remove()
        extents.hook = None


def _head(channels: int, settings: ExtentsSettings) -> nn.Sequential:
    last = zeroed(nn.Conv2d(settings.width, settings.detail**2, 3, padding=1))
    return nn.Sequential(nn.Conv2d(channels, settings.width, 3, padding=1), nn.SiLU(), last)
