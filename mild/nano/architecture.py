"""A very small base: a `StableDiffusionXLInpaintPipeline` folder with SDXL's architecture and its own vocabulary.

A trained one comes with the package, and adapters for it: wherever a base or a MILD directory is named, `mild.bases`
has their names.

Torch and diffusers are imported when they are needed: the processes that draw pictures do without.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_tools.errors import UserError
from mild.bases import NANO

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLInpaintPipeline
    from transformers import CLIPTokenizer

TEXT_WIDTH = 32
PROJECTION = 32
TIME_EMBEDDING = 16
"""Width of the embedding of each of SDXL's six size and crop numbers."""
LONGEST_PROMPT = 77
START, END = "<|startoftext|>", "<|endoftext|>"

MERGES = Path(__file__).parent / "merges.json"
"""Byte-pair merges learned from a few sentences about people and scenes; other words fall back to smaller pieces."""


def save_nano_pipeline(pipeline: StableDiffusionXLInpaintPipeline, folder: Path) -> None:
    """Write a pipeline in the precision that it has, as safetensors, with both readings of its vocabulary."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2"):
        _write_vocabulary(getattr(pipeline, name), folder / name)
    # diffusers notes the folder that each part was loaded from, which nobody else has.
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        values.pop("_name_or_path", None)
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_nano_pipeline(name_or_folder: str) -> StableDiffusionXLInpaintPipeline:
    """A trained nano pipeline in float32.

    Args:
        name_or_folder: see `mild.model.backbone.load_base`.

    Raises:
        UserError: it cannot be loaded, or one of its parts is not made as `build_nano_pipeline` makes it.
    """
    import torch

    from mild.model.backbone import load_base

    pipeline = load_base(name_or_folder)
    with torch.random.fork_rng(devices=[]):
        found, expected = _make_of(pipeline), _make_of(build_nano_pipeline())
    if other := [part for part in expected if found[part] != expected[part]]:
        raise UserError(
            f"base {name_or_folder} is not of the nano base's architecture (its {' and '.join(other)}): give {NANO} or "
            "what mild pretrain wrote"
        )
    return pipeline


def _make_of(pipeline: StableDiffusionXLInpaintPipeline) -> dict[str, Any]:
    """What training takes for granted about each part: shapes of weights, vocabulary, noise schedule."""
    networks = ("unet", "vae", "text_encoder", "text_encoder_2")
    make: dict[str, Any] = {
        name: {key: tuple(weight.shape) for key, weight in getattr(pipeline, name).state_dict().items()}
        for name in networks
    }
    make |= {name: getattr(pipeline, name).get_vocab() for name in ("tokenizer", "tokenizer_2")}
    schedule = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    return make | {"scheduler": schedule, "scaling factor": pipeline.vae.config.scaling_factor}


def count_parameters(pipeline: StableDiffusionXLInpaintPipeline) -> int:
    """Of all the networks together."""
    import torch

    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


def build_nano_pipeline() -> StableDiffusionXLInpaintPipeline:
    """The nano pipeline in memory, with weights drawn from torch's global generator.

    Sizes are chosen so that it can be trained well on a CPU: VAE of 48 channels with a factor of 4, UNet (48, 96, 128)
    with attention on its two lower levels, two-layer text encoders of width 32.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    vocabulary, merges = _vocabulary()
    text: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": LONGEST_PROMPT,
        "projection_dim": PROJECTION,
        "bos_token_id": vocabulary[START],
        "eos_token_id": vocabulary[END],
    }
    tokens: dict[str, Any] = {"vocab": vocabulary, "merges": merges, "model_max_length": LONGEST_PROMPT}
    return StableDiffusionXLInpaintPipeline(
        unet=UNet2DConditionModel(
            sample_size=32,
            in_channels=9,
            out_channels=4,
            block_out_channels=(48, 96, 128),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 3, 4),
            transformer_layers_per_block=1,
            use_linear_projection=True,
            cross_attention_dim=2 * TEXT_WIDTH,
            norm_num_groups=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_EMBEDDING,
            projection_class_embeddings_input_dim=6 * TIME_EMBEDDING + PROJECTION,
        ),
        # Few layers, and convolutions alone: quickly trained, and on small crops, for pictures of any size.
        vae=AutoencoderKL(
            block_out_channels=(48, 48, 48),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=0,
            latent_channels=4,
            norm_num_groups=1,
            mid_block_add_attention=False,
            sample_size=128,
            scaling_factor=1.0,
            force_upcast=False,
        ),
        # As in SDXL: first the text encoder of Stable Diffusion 1, then OpenCLIP's, projected and padded with "!".
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, hidden_act="quick_gelu", pad_token_id=vocabulary[END])),
        text_encoder_2=CLIPTextModelWithProjection(
            CLIPTextConfig(**text, hidden_act="gelu", pad_token_id=vocabulary["!"])
        ),
        tokenizer=CLIPTokenizer(**tokens),
        tokenizer_2=CLIPTokenizer(**tokens, pad_token="!"),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            # With few steps, "leading" never asks for the noisiest step, where holes are filled.
            timestep_spacing="trailing",
            prediction_type="sample",
        ),
        add_watermarker=False,
    )


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Entries in CLIP's order: 256 byte symbols, the same at word ends, one a merge, start, end; and the merges."""
    from tokenizers import pre_tokenizers

    merges = [(left, right) for left, right in (line.split(" ") for line in json.loads(MERGES.read_text("utf-8")))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *("".join(pair) for pair in merges), START, END]
    return {entry: index for index, entry in enumerate(dict.fromkeys(entries))}, merges


def _write_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """``vocab.json`` and ``merges.txt``, which older readers of CLIP tokenizers want beside ``tokenizer.json``."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
