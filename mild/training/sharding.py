"""The frozen weights of the UNet spread over the processes (FSDP2), where accelerate's configuration asks for FSDP.

What is trained is small, what it is trained on is not: of SDXL's 2.6 billion weights each process then keeps its share
alone, and gathers those of one block while that block computes. Adapters and all other trained weights stay whole in
every process, so that gradients, optimizer, checkpoints and what is saved are those of a run without it.
"""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    disable_fsdp_ram_efficient_loading,
    parse_flag_from_env,
)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from dataset_tools.errors import UserError
from mild.settings import TrainSettings


def sharding_asked_for(accelerator: Accelerator, settings: TrainSettings) -> FullyShardedDataParallelPlugin | None:
    """What accelerate's configuration says of FSDP; None where it does not ask for it, or there is one process only.

    accelerate's launcher hands it on in the environment, which is read here on processors too, where accelerate itself
    does not heed it. Call this before the base is loaded: see below.

    Raises:
        UserError: it asks for what is not done here, or the settings do.
    """
    if accelerator.num_processes == 1 or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION") != "2":
        raise UserError("fsdp_version of the accelerate configuration must be 2")
    plugin = FullyShardedDataParallelPlugin()
    refused = [
        ("fsdp_offload_params", isinstance(plugin.cpu_offload, CPUOffloadPolicy), "give false"),
        ("fsdp_activation_checkpointing", plugin.activation_checkpointing, "set train.gradient_checkpointing instead"),
    ]
    for name, wrong, remedy in refused:
        if wrong:
            raise UserError(f"{name} of the accelerate configuration is not supported as it is: {remedy}")
    if settings.compile:
        raise UserError("compile: a UNet whose blocks are gathered as they are needed (FSDP) cannot be compiled whole")
    # The launcher's default, by which transformers 4 leaves text encoders empty in all processes but the first.
    disable_fsdp_ram_efficient_loading()
    return plugin


def shard_frozen(unet: torch.nn.Module, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Keep of the UNet's frozen weights this process's share alone, on its device; those that are trained stay whole.

    From now on every process must run the UNet as often as all others. Whatever the configuration's wrap policy, one
    transformer or residual block is gathered at a time, and for the time of the whole pass what lies in neither.

    Args:
        plugin: its ``reshard_after_forward`` says whether a block is given up again until its backward pass.
    """
    trained = {parameter for parameter in unet.parameters() if parameter.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock | ResnetBlock2D)]
    for module in [*blocks, unet]:
        fully_shard(module, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward, ignored_params=trained)
