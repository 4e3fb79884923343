"""The shared UNet of any SDXL inpainting base, with the adapters ``fg`` and ``bg`` (section 3.2)."""

from __future__ import annotations

import contextlib
import difflib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from dataset_tools.errors import UserError
from dataset_tools.networks import NETWORKS
from dataset_tools.weights import HUB_ID, at_hand
from mild.bases import NANO, SUGGESTED_BASE, place_of
from mild.settings import LoraSettings

Branch = Literal["fg", "bg"]
BRANCHES: tuple[Branch, ...] = ("fg", "bg")
WEIGHTS = "pytorch_lora_weights.safetensors"
"""File name under which diffusers looks for LoRA weights in a folder."""


def load_base(
    name_or_folder: str,
    load: Callable[..., Any] = StableDiffusionXLInpaintPipeline.from_pretrained,
    **options: Any,
) -> Any:
    """Load an SDXL inpainting base: a folder as diffusers saves it, a hub id, or the one that comes with the package.

    Args:
        name_or_folder: of the base; `mild.bases.NANO` for the package's own.
        load: ``from_pretrained`` of the pipeline class, which is called with ``options``; float32 by default.

    Raises:
        UserError: there is no such folder or hub id, the hub cannot be reached, it is no SDXL inpainting
            pipeline, or its UNet does not take noisy latents, mask and masked latents together.
    """
    pipeline = load_sdxl(name_or_folder, load, **options)
    check_channels(pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels, name_or_folder)
    return pipeline


def load_sdxl(
    name_or_folder: str,
    load: Callable[..., Any] = StableDiffusionXLInpaintPipeline.from_pretrained,
    **options: Any,
) -> Any:
    """`load_base` of any pipeline of the SDXL family, whatever its UNet takes."""
    place, fetched = _fetched(name_or_folder)
    folder = Path(place)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(f"{name_or_folder} is not a diffusers pipeline folder: it has no model_index.json")
    if not folder.exists() and HUB_ID.fullmatch(place) is None:
        raise UserError(
            f"base {name_or_folder} does not exist; give a folder, a hub id such as {SUGGESTED_BASE}, or {NANO}"
        )
    try:
        with _no_progress_bars():
            precision = {} if "torch_dtype" in options else {"dtype": torch.float32}
            given = {**precision, "use_safetensors": True, "add_watermarker": False, **fetched, **options}
            pipeline = load(place, **given)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        hint = "" if folder.exists() else " (no such folder here, and it cannot be fetched from the hub)"
        raise UserError(f"base {name_or_folder} cannot be loaded{hint}: {reason}") from error
    if pipeline.text_encoder_2 is None or pipeline.unet.config.addition_embed_type != "text_time":
        raise UserError(f"base {name_or_folder} is not of the SDXL family; use one such as {SUGGESTED_BASE}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _fetched(name: str) -> tuple[str, dict[str, str]]:
    """Where a base is, and how it is loaded: what ``mild weights pull`` fetched is in half precision alone."""
    place = place_of(name)
    row = next((row for row in NETWORKS.values() if row.purpose == "base" and row.hub == place), None)
    folder = at_hand(row) if row else None
    return (str(folder), {"variant": "fp16"}) if folder else (place, {})


def check_channels(in_channels: int, latent_channels: int, name: str) -> None:
    """Raise `UserError` unless a UNet takes noisy latents, a mask and masked latents: 2 C + 1 channels."""
    if in_channels != 2 * latent_channels + 1:
        raise UserError(
            f"base {name}: its UNet takes {in_channels} channels, erasing needs {2 * latent_channels + 1} (noisy "
            f"latents, mask, masked latents); use an inpainting base such as {SUGGESTED_BASE}"
        )


def check_resolution(pipeline: StableDiffusionXLInpaintPipeline, resolution: int, setting: str = "resolution") -> None:
    """Raise `UserError` unless squares of so many pixels, which ``setting`` says, go through VAE and UNet unpadded."""
    step = pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    if resolution % step:
        raise UserError(f"{setting}: {resolution} must be a multiple of {step} for this base")


SIZES = ("original_size", "target_size", "negative_original_size", "negative_target_size")
CROPS = ("crops_coords_top_left", "negative_crops_coords_top_left")
AESTHETIC_SCORES = {"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}
"""The stock pipeline's, for the few bases that ask for them."""


def time_ids_of(
    pipeline: StableDiffusionXLInpaintPipeline, size: tuple[int, int], pooled_text: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What SDXL is told of pictures of ``size`` (height, width) that are not cropped, beside ``pooled_text`` (B, D).

    Returns:
        ``time_ids``, (1, 6), or (1, 5) where the base asks for aesthetic scores, and those of the negative prompt.

    Raises:
        ValueError: the base's UNet takes another number of them than its ``requires_aesthetics_score`` says.
    """
    ids: tuple[torch.Tensor, torch.Tensor] = pipeline._get_add_time_ids(
        **dict.fromkeys(SIZES, size),
        **dict.fromkeys(CROPS, (0, 0)),
        **AESTHETIC_SCORES,
        dtype=pooled_text.dtype,
        text_encoder_projection_dim=int(pooled_text.shape[-1]),
    )
    return ids


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Both libraries draw bars while they load, over whatever bar the caller shows."""
    libraries = [diffusers_logging, transformers_logging]
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    try:
        for library in shown:
            library.disable_progress_bar()
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) float32 of pictures (B, 3, H, W) in -1..1: the mode of the VAE's posterior, scaled."""
    with precise_vae(vae):
        latents: torch.Tensor = vae.encode(pictures.to(vae.dtype)).latent_dist.mode()
    mean, scale = _latent_scale(vae, latents.device)
    return (latents.float() - mean) / scale


@torch.no_grad()
def decode_pictures(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) float32, about -1..1, of latents (B, C, h, w) float32 as `encode_pictures` gives them."""
    mean, scale = _latent_scale(vae, latents.device)
    with precise_vae(vae):
        pictures: torch.Tensor = vae.decode((latents * scale + mean).to(vae.dtype), return_dict=False)[0]
    return pictures.float()


def _latent_scale(vae: AutoencoderKL, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean, and standard deviation over ``scaling_factor``, (1, C, 1, 1) float32: what a VAE's latents come with.

    Only where its configuration has both ``latents_mean`` and ``latents_std`` they count, as in SDXL's stock pipelines;
    the stock one for inpainting decodes with them but encodes without.
    """
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = [0.0], [1.0]
    shift, scale = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
    return shift, scale / config.scaling_factor


@contextlib.contextmanager
def precise_vae(vae: AutoencoderKL) -> Iterator[None]:
    """SDXL's VAE overflows in float16, and says so in its configuration: inside, it computes in float32."""
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(dtype=torch.float16)


SAMPLED = 32
"""How many weights tell one base from another."""


def sample_of_weights(unet: UNet2DConditionModel) -> dict[str, float]:
    """A few of the UNet's own weights by name, by which a base is known again wherever and however precise it lies.

    The one in the middle of each of 32 matrices and kernels; those that are not in memory, or no floating-point numbers
    (quantised), are left out.
    """
    matrices = [(name, weight) for name, weight in unet.named_parameters() if weight.ndim > 1 and ".lora_" not in name]
    chosen = [matrices[len(matrices) * number // SAMPLED] for number in range(min(SAMPLED, len(matrices)))]
    return {
        name.replace(".base_layer.", "."): float(weight.detach().flatten()[weight.numel() // 2])
        for name, weight in chosen
        if weight.is_floating_point() and not weight.is_meta
    }


def same_weights(known: dict[str, float], found: dict[str, float]) -> bool:
    """Whether two samples are of one base, of whatever precision; also where they have too little in common to tell."""
    names = sorted(set(known) & set(found))
    one, other = (torch.tensor([sample[name] for name in names]) for sample in (known, found))
    # bfloat16 changes weights by 0.2 % at most.
    return bool((one - other).norm() <= 0.01 * one.norm())


def add_layered_lora(unet: UNet2DConditionModel, settings: LoraSettings, seed: int) -> None:
    """Freeze the UNet and add fresh adapters ``fg`` and ``bg``; both are trainable, ``bg`` is active.

    As usual with LoRA, A is random (from ``seed``) and B is zero: the UNet's output does not change yet.

    Raises:
        UserError: the UNet has no layer of a name in ``settings.target_modules``, or none that can have an adapter.
    """
    names = [name for name, _ in unet.named_modules()]
    for target in settings.target_modules:
        # As peft compares them; it complains only where none of all names is there.
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = {*names, *(name.rpartition(".")[2] for name in names)}
            near = difflib.get_close_matches(target, known, n=1, cutoff=0.0)[0]
            raise UserError(f"lora.target_modules: the UNet has no layer {target}; the nearest is {near}")
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), _several_adapters_are_meant():
        torch.manual_seed(seed)
        for branch in BRANCHES:
            try:
                config = LoraConfig(
                    r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.target_modules)
                )
                unet.add_adapter(config, adapter_name=branch)
            except ValueError as error:
                raise UserError(f"lora.target_modules: {' '.join(str(error).split())}") from None
    for branch in BRANCHES:  # each but the last was frozen when the next was added
        for parameter in adapter_parameters(unet, branch).values():
            parameter.requires_grad_(True)
    activate(adapter_layers(unet), "bg")


@contextlib.contextmanager
def _several_adapters_are_meant() -> Iterator[None]:
    """peft warns at the second adapter of a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        yield


def adapter_layers(unet: UNet2DConditionModel) -> list[BaseTunerLayer]:
    """The layers that have adapters, in the UNet's order. Looking for them goes through all of its modules."""
    return [layer for layer in unet.modules() if isinstance(layer, BaseTunerLayer)]


def activate(layers: Iterable[BaseTunerLayer], branch: Branch) -> None:
    """Let a UNet compute with the adapter of ``branch``, beside whatever else but the other branch is active.

    LoRA sets that are no branch's, such as a style's which ``load_lora_weights`` and ``set_adapters`` brought, stay
    active with their weights. Adapters that were switched off (``disable_adapters``) are switched on again.

    What is trainable stays so: peft's own switch turns ``requires_grad`` off for the other adapter, which loses its
    gradients without an error, and looks at every parameter, which takes long at SDXL's size. Call ``backward`` for one
    branch before switching to the other: with gradient checkpointing the backward pass computes the forward pass again,
    with the adapter that is active then.

    Args:
        layers: of `adapter_layers`.

    Raises:
        UserError: adapters were merged into the weights (``fuse_lora``), where no branch can be told from the other.
    """
    # One list for all layers, as peft has it: compiled code looks whether it is the same.
    wanted: dict[tuple[str, ...], list[str]] = {}
    for layer in layers:
        if layer.merged:
            raise UserError(
                "adapters are fused into the UNet's weights, so that its branches cannot be switched: call "
                "unfuse_lora, and leave fuse_lora out"
            )
        names = (branch, *(name for name in layer.active_adapters if name not in BRANCHES))
        layer._disable_adapters = False
        layer._active_adapter = wanted.setdefault(names, list(names))


def adapter_parameters(unet: UNet2DConditionModel, branch: Branch) -> dict[str, torch.nn.Parameter]:
    """The LoRA parameters of one branch by name, in the UNet's order."""
    return {
        name: p for name, p in unet.named_parameters() if f".lora_A.{branch}." in name or f".lora_B.{branch}." in name
    }


def save_adapters(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write ``bg`` into ``folder`` and ``fg`` into ``folder/fg``, each as ``pytorch_lora_weights.safetensors``.

    That is the layout which a stock pipeline's ``load_lora_weights(folder)`` reads; rank and alpha travel in
    the file's metadata. The same weights give the same bytes.
    """
    for branch, place in (("bg", folder), ("fg", folder / "fg")):
        # Sets would be written in the arbitrary order of their hashes.
        config = {k: sorted(v) if isinstance(v, set) else v for k, v in unet.peft_config[branch].to_dict().items()}
        StableDiffusionXLInpaintPipeline.save_lora_weights(
            place,
            unet_lora_layers=get_peft_model_state_dict(unet, adapter_name=branch),
            unet_lora_adapter_metadata=config,
        )
        _sort_header(place / WEIGHTS)


def _sort_header(path: Path) -> None:
    """Bring a safetensors file's header into order: its metadata are written in that of a random hash map."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
