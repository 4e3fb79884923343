"""Erasing with CLIPAway: Stable Diffusion 1.5, told by an IP-Adapter what the background is without the person.

What is seen in and around the hole is told by Alpha-CLIP, a CLIP whose patches have a fourth channel: where to look.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from dataset_tools.errors import UserError
from dataset_tools.networks import NETWORKS
from dataset_tools.settings import digest_of
from dataset_tools.weights import at_hand, find_weights, missing_message
from mild.evaluation.methods import Case, MethodSettings, Setup
from mild.evaluation.methods.lama import dilated
from mild.evaluation.methods.sd15 import SD15Eraser, find_pipeline, load_pipeline

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import CLIPVisionModelWithProjection

NEGATIVE = "monochrome, lowres, bad anatomy, worst quality, low quality"
"""What is asked to be far from, as in IP-Adapter's own code."""
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073, 0.5], np.float32)
_DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711, 0.26], np.float32)
"""Of CLIP's red, green and blue, and of Alpha-CLIP's alpha, all in 0..1."""
_HEAD = 64
"""Width of an attention head, in all CLIPs of OpenAI."""
_RENAMED = {
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "class_embedding": "vision_model.embeddings.class_embedding",
    "conv1": "vision_model.embeddings.patch_embedding",
    "ln_pre": "vision_model.pre_layrnorm",
    "ln_post": "vision_model.post_layernorm",
    "transformer.resblocks": "vision_model.encoder.layers",
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Parts of names of weights, as OpenAI has them and as transformers has them."""


class CLIPAwayMethod(MethodSettings):
    """CLIPAway (Ekin et al. 2024, "Harmonizing Focused Embeddings for Removing Objects via Diffusion Models").

    Numbers are those of github.com/YigitEkin/CLIPAway (``config/inference_config.yaml``, ``model/clip_away.py``).
    """

    kind: Literal["clipaway"] = "clipaway"
    base: str = "sd15-inpainting"
    """Name of `dataset_tools.networks`, or folder of a Stable Diffusion 1.5 inpainting pipeline."""
    ip_adapter: str = "ip-adapter-sd15"
    """Name of `dataset_tools.networks`, or ``ip-adapter_sd15.safetensors``, or ``ip-adapter_sd15.bin``."""
    ip_adapter_sha256: str | None = Field(None, pattern="[0-9a-f]{64}")
    """Digest (hex) that a file of one's own must have; a pickle (.bin) needs it."""
    alpha_clip: str = "alpha-clip-l14"
    """Name of `dataset_tools.networks`, or ``clip_l14_grit+mim_fultune_6xe.pth``."""
    alpha_clip_sha256: str | None = Field(None, pattern="[0-9a-f]{64}")
    """Digest (hex) that a file of one's own must have; a pickle (.pth) needs it."""
    projection: str = ""
    """``model.safetensors``, which takes Alpha-CLIP's embeddings to those that the IP-Adapter knows."""
    inference_steps: int = Field(50, ge=1, le=1000)
    """Steps of the pipeline's own scheduler."""
    guidance_scale: float = Field(7.5, gt=1)
    """Classifier-free guidance."""
    resolution: int = Field(512, ge=8)
    """Shorter side at which it works, in pixels; its result is brought back to the picture's size."""
    dilation: int = Field(10, ge=0)
    """Pixels of the picture by which the mask is wider than the hole, as its authors ask for (five times with a square
    of 5). What is painted beside the hole is not used."""

    @property
    def title(self) -> str:
        """See `MethodSettings.title`."""
        return "CLIPAway" + (f" ({self.name})" if self.name != self.kind else "")

    def missing(self, setup: Setup) -> str | None:
        """See `MethodSettings.missing`."""
        parts = [self.base, self.ip_adapter, self.alpha_clip]
        absent = [name for name in parts if name in NETWORKS and at_hand(NETWORKS[name]) is None]
        told = [missing_message(absent)] if absent else []
        if not self.projection:
            told.append(
                "projection is not set: it is model.safetensors (23 MB) of "
                "https://huggingface.co/spaces/yigitekin/CLIPAway; name where it lies"
            )
        if told:
            return "; ".join(told)
        try:
            self.weights(setup)
        except UserError as error:
            return str(error)
        return None

    def files(self) -> dict[str, tuple[Path, str]]:
        """The files beside the base, and sha256 (hex) of each. Raises `UserError` as `find_weights`."""
        wanted = {
            "ip-adapter": (self.ip_adapter, self.ip_adapter_sha256),
            "alpha-clip": (self.alpha_clip, self.alpha_clip_sha256),
            "projection": (self.projection, None),
        }
        files = {}
        for part, (name, sha256) in wanted.items():
            if name not in NETWORKS and not Path(name).is_file():
                field = part.replace("-", "_")
                raise UserError(f"{field}: {name or 'nothing'} is no network of the table and no file; name the file")
            found = find_weights(name, sha256=sha256, download=False)
            (path,) = found.files.values()
            files[part] = path, found.sha256
        return files

    def weights(self, setup: Setup) -> dict[str, str]:
        """See `MethodSettings.weights`."""
        return {"base": find_pipeline(self.base)[1], **{part: sha256 for part, (_, sha256) in self.files().items()}}

    def fingerprint(self, setup: Setup) -> str:
        """See `MethodSettings.fingerprint`."""
        settings = self.model_dump(
            mode="json",
            include={"kind", "inference_steps", "guidance_scale", "resolution", "dilation", "batch_size"},
        )
        software = [version(package) for package in ("torch", "diffusers", "transformers")]
        return digest_of([1, settings, setup.prompt, self.weights(setup), software])

    def open(self, setup: Setup) -> CLIPAwayEraser:
        """See `MethodSettings.open`."""
        paths = {part: path for part, (path, _) in self.files().items()}
        pipeline = load_pipeline(self.base)
        load_ip_adapter(pipeline, paths["ip-adapter"])
        alpha_clip = alpha_clip_of(tensors_of(paths["alpha-clip"]), str(paths["alpha-clip"]))
        projection = projection_of(tensors_of(paths["projection"]), str(paths["projection"]))
        (adapter,) = pipeline.unet.encoder_hid_proj.image_projection_layers
        widths = projection[0].in_features, projection[-1].out_features
        wanted = alpha_clip.config.projection_dim, adapter.image_embeds.in_features
        if widths != wanted:
            raise UserError(
                f"{paths['projection']} takes {widths[0]} numbers to {widths[1]}; Alpha-CLIP and the IP-Adapter want "
                f"{wanted[0]} and {wanted[1]}"
            )
        return CLIPAwayEraser(self, pipeline, alpha_clip, projection, setup.prompt)


class CLIPAwayEraser(SD15Eraser):
    """All of it, in memory."""

    def __init__(
        self,
        settings: CLIPAwayMethod,
        pipeline: Any,
        alpha_clip: CLIPVisionModelWithProjection,
        projection: nn.Sequential,
        prompt: str,
    ) -> None:
        super().__init__(pipeline, settings.resolution, settings.inference_steps, settings.guidance_scale)
        self._alpha_clip: Any = alpha_clip.eval().to(pipeline.device)
        self._projection: Any = projection.eval().to(pipeline.device)
        self._dilation, self._prompt = settings.dilation, prompt
        # Its own repeats what it is given for each picture, as if all of a batch were to look alike, and the UNet then
        # mixes up whose is whose.
        pipeline.prepare_ip_adapter_image_embeds = lambda _, embeddings, device, *__: [
            one.to(device) for one in embeddings
        ]

    def shown(self, case: Case) -> Case:
        """See `SD15Eraser.shown`."""
        return replace(case, masks=dilated(case.hole, self._dilation)[None])

    def conditions(self, pictures: Sequence[Image.Image], holes: Sequence[Image.Image]) -> dict[str, Any]:
        """See `SD15Eraser.conditions`."""
        import torch

        with torch.inference_mode():
            embedding = self.background(pictures, holes)
            nothing = self._projection(torch.zeros(len(pictures), self._projection[0].in_features).to(embedding))
        return {
            "prompt": [self._prompt] * len(pictures),
            "negative_prompt": [NEGATIVE] * len(pictures),
            "ip_adapter_image_embeds": [torch.cat([nothing, embedding])[:, None]],
        }

    def background(self, pictures: Sequence[Image.Image], holes: Sequence[Image.Image]) -> Tensor:
        """(B, E) float32: what is around the holes, without what it shares with what is in them."""
        import torch

        side = self._alpha_clip.config.image_size
        shown = torch.stack([_seen(picture, hole, side) for picture, hole in zip(pictures, holes, strict=True)])
        # Where not to look: the other side of alpha, whose mean is in the middle.
        around = torch.cat([shown[:, :3], -shown[:, 3:]], dim=1)
        both = self._alpha_clip(pixel_values=torch.cat([around, shown]).to(self.pipeline.device)).image_embeds
        background, foreground = self._projection(both).chunk(2)
        return without(background, foreground)


def without(background: Tensor, foreground: Tensor) -> Tensor:
    """``background`` (B, E) minus its projection onto ``foreground`` (B, E): orthogonal to it (section 3.3)."""
    share = (background * foreground).sum(1, keepdim=True) / foreground.square().sum(1, keepdim=True)
    return background - share * foreground


def _seen(picture: Image.Image, hole: Image.Image, side: int) -> Tensor:
    """(4, side, side) float32: a whole picture as CLIP sees it, squeezed into a square, and alpha, high in the hole."""
    import torch

    pixels = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
    alpha = np.asarray(hole.resize((side, side), Image.Resampling.BILINEAR))
    values = np.dstack([pixels, alpha]).astype(np.float32) / 255
    return torch.from_numpy((values - _MEAN) / _DEVIATION).permute(2, 0, 1)


def tensors_of(path: Path) -> dict[str, Any]:
    """What a file of weights holds, on the CPU. Raises `UserError` where it is damaged or holds more than tensors."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        held: dict[str, Any] = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError):
        raise UserError(f"{path} is damaged, or holds more than tensors") from None
    return held


def load_ip_adapter(pipeline: Any, path: Path) -> None:
    """Give a pipeline the IP-Adapter of a file, which has its parts as two dictionaries, or as prefixes of names.

    Raises:
        UserError: it is that of another UNet, of which diffusers would leave out what it does not need.
    """
    from diffusers.utils import logging

    held = tensors_of(path)
    if path.suffix == ".safetensors":
        parts = ("image_proj", "ip_adapter")
        held = {
            part: {name.removeprefix(f"{part}."): held[name] for name in held if name.startswith(f"{part}.")}
            for part in parts
        }
    crossing = [number for number, name in enumerate(pipeline.unet.attn_processors) if "attn2" in name]
    wanted = {
        "image_proj": {"proj.weight", "proj.bias", "norm.weight", "norm.bias"},
        "ip_adapter": {f"{number}.to_{which}_ip.weight" for number in crossing for which in "kv"},
    }
    if {part: set(names) for part, names in held.items()} != wanted:
        raise UserError(f"{path} is no IP-Adapter of {len(crossing)} layers without finer features, as this UNet needs")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that its own encoder of pictures stays away is meant: Alpha-CLIP takes its place
    try:
        pipeline.load_ip_adapter(held, subfolder="", weight_name="", image_encoder_folder=None)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is another UNet's IP-Adapter: {' '.join(str(error).split())[:300]}") from None
    finally:
        logging.set_verbosity(verbosity)


def alpha_clip_of(weights: dict[str, Tensor], name: str) -> CLIPVisionModelWithProjection:
    """Alpha-CLIP's encoder of pictures (Sun et al. 2024) from the names that OpenAI gives weights.

    It adds a convolution of alpha to that of the picture, before the first layer: one convolution of four channels,
    which transformers' CLIP has when it is told so.

    Args:
        weights: of ``model.visual`` in github.com/SunzeY/AlphaCLIP (``alpha_clip/model.py``).
        name: what they are called in errors.

    Returns:
        Takes pictures (B, 4, H, W), the fourth channel being alpha.

    Raises:
        UserError: they are another network's.
    """
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    try:
        width, _, patch, _ = weights["conv1.weight"].shape
        layers = {key.split(".")[2] for key in weights if key.startswith("transformer.resblocks.")}
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            projection_dim=weights["proj"].shape[1],
            num_hidden_layers=len(layers),
            num_attention_heads=width // _HEAD,
            num_channels=4,
            image_size=patch * round((len(weights["positional_embedding"]) - 1) ** 0.5),
            patch_size=patch,
            hidden_act="quick_gelu",
        )
        rest = {key: value.float() for key, value in weights.items()}
        rest["conv1.weight"] = torch.cat([rest["conv1.weight"], rest.pop("conv1_alpha.weight")], dim=1)
        renamed = {"visual_projection.weight": rest.pop("proj").T}
        for key, value in rest.items():
            for old, new in _RENAMED.items():
                key = key.replace(old, new)
            if "attn.in_proj" in key:
                for which, third in zip("qkv", value.chunk(3), strict=True):
                    renamed[key.replace("attn.in_proj", f"self_attn.{which}_proj")] = third
            else:
                renamed[key] = value
        model = CLIPVisionModelWithProjection(config)
        model.load_state_dict(renamed)
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"{name} is not Alpha-CLIP's encoder of pictures: {type(error).__name__}: {why}") from None
    return model


def projection_of(weights: dict[str, Tensor], name: str) -> nn.Sequential:
    """The layers that take Alpha-CLIP's embeddings to the IP-Adapter's: (Linear, LayerNorm, GELU) and so on, Linear.

    Published are six times the three, from 768 numbers to 1024.

    Raises:
        UserError: ``weights``, called ``name``, are no such layers'.
    """
    from torch import nn

    layers: list[nn.Module] = []
    while (weight := weights.get(f"{len(layers)}.weight")) is not None:
        if weight.ndim == 2:
            layers.append(nn.Linear(weight.shape[1], weight.shape[0]))
        else:
            layers += [nn.LayerNorm(weight.shape[0]), nn.GELU()]
    network = nn.Sequential(*layers)
    try:
        network.load_state_dict(weights)
        if not layers or not isinstance(layers[-1], nn.Linear):
            raise RuntimeError("no layer is linear and the last")
    except RuntimeError as error:
        raise UserError(f"{name} is no projection of CLIPAway: {' '.join(str(error).split())[:300]}") from None
    return network
