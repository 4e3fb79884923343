"""What erasing with MILD costs beside the stock inpainting pipeline, at the same steps, size and precision.

    python benchmarks/inference.py                 # full-size SDXL architecture, random weights, bfloat16: a GPU
    python benchmarks/inference.py --size nano     # anywhere

In one run, in turn, on one picture of four people who stand before one another: the stock
`StableDiffusionXLInpaintPipeline` with one mask; MILD erasing everybody, with SMA and HMG (pose, parsing); MILD
taking the picture apart into background and layers (three people are partly hidden: three foreground branches and
the background). Medians of the rounds and of the rounds' ratios, and peak GPU memory, go to
``benchmarks/results/inference-SIZE-DEVICE.json``. The paper has 1.91 s against 1.79 s (1.07x) and 9.36 against 7.64 GB
(1.23x). Targets: erasing everybody within 1.02x in time and 1.05x in memory, everything within 3.2x of one branch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mild.erasing.pipeline import MILDPipeline
from mild.erasing.regions import editable
from mild.model.layered import LayeredUNet
from mild.nano.architecture import build_nano_pipeline
from mild.settings import MildSettings
from mild.versions import software_versions

SEED = 0
STEPS = 25


def sdxl_pipeline() -> StableDiffusionXLInpaintPipeline:
    """SDXL inpainting's architecture (the configuration files of stable-diffusion-xl-1.0-inpainting-0.1), random
    weights; tokenizers are the nano base's, which changes no cost. The VAE in float32, all else in bfloat16. Built on
    the GPU where there is one: drawing so many weights takes a CPU a minute."""
    small = build_nano_pipeline()
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return _full_size(small)


def _full_size(small: StableDiffusionXLInpaintPipeline) -> StableDiffusionXLInpaintPipeline:
    words = {"bos_token_id": small.tokenizer.bos_token_id, "eos_token_id": small.tokenizer.eos_token_id}
    first = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
        hidden_act="quick_gelu", **words,
    )  # fmt: skip
    second = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
        hidden_act="gelu", **words,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)  # float32 would take 14 GB before it is rounded
    unet = UNet2DConditionModel(
        sample_size=128,
        in_channels=9,
        out_channels=4,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    text_encoders = {"text_encoder": CLIPTextModel(first), "text_encoder_2": CLIPTextModelWithProjection(second)}
    torch.set_default_dtype(torch.float32)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=1024,
        scaling_factor=0.13025,
        force_upcast=True,
    )
    parts = {"unet": unet, "vae": vae, **text_encoders}
    return StableDiffusionXLInpaintPipeline(**small.components | parts, add_watermarker=False)


def randomised(layered: LayeredUNet) -> LayeredUNet:
    """Nothing at zero: neutral parts could be skipped."""
    with torch.no_grad():
        for part in layered.parts().values():
            for parameter in part.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    layered.project_()
    return layered


def row_of_people(side: int) -> np.ndarray:
    """(4, side, side) bool: each hides a third of the one behind."""
    masks = np.zeros((4, side, side), bool)
    for k, mask in enumerate(masks):
        left = side // 5 + k * side // 10
        mask[side // 4 : 3 * side // 4, left : left + 3 * side // 20] = True
    return masks


def measured(runs: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, dict[str, Any]]:
    """Seconds of each round and peak memory of each run, in turn, after one round that is not counted."""
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "peak_bytes": None} for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
                found[name]["peak_bytes"] = torch.cuda.max_memory_allocated()
            if number:
                found[name]["seconds"].append(time.perf_counter() - started)
                print(f"{name:12} {found[name]['seconds'][-1]:8.3f} s", flush=True)
    return found


def main() -> None:
    """Build both pipelines, measure, print the ratios, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("sdxl", "nano"), default="sdxl")
    parser.add_argument("--resolution", type=int, help="side of the picture in pixels; 512, or 128 for nano")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.size == "sdxl" and device == "cpu":
        parser.error("full size needs a GPU; use --size nano here")
    side = given.resolution or (512 if given.size == "sdxl" else 128)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    torch.manual_seed(SEED)
    # The UNet is MILD's own, as SMA changes it; all else is shared.
    stock = (sdxl_pipeline() if given.size == "sdxl" else build_nano_pipeline()).to(device, dtype)
    stock.set_progress_bar_config(disable=True)
    image = np.random.default_rng(SEED).integers(0, 256, (side, side, 3), np.uint8)
    masks = row_of_people(side)
    hole = Image.fromarray(editable(masks, range(4)).astype(np.uint8) * 255)
    pose = np.concatenate([np.random.default_rng(SEED).uniform(0, side, (4, 18, 2)), np.ones((4, 18, 1))], -1)
    parsing = masks.any(0).astype(np.uint8)

    def inpaint() -> None:
        stock("", image=Image.fromarray(image), mask_image=hole, height=side, width=side, strength=1.0,
              num_inference_steps=STEPS, guidance_scale=1.0)  # fmt: skip

    inpainted = measured({"stock": inpaint}, given.rounds, device)
    unet = stock.unet
    mild = MILDPipeline(**stock.components, add_watermarker=False)
    mild.set_progress_bar_config(disable=True)
    mild.layered = randomised(LayeredUNet.create(unet, MildSettings(), seed=SEED))
    mild.layered.resolution = mild.layered.inference_resolution = side

    def erase(layers: bool) -> None:
        mild(image, list(masks), pose=pose, parsing=parsing, layers=layers, num_inference_steps=STEPS)

    runs = {"erase": lambda: erase(False), "layers": lambda: erase(True)}
    found = inpainted | measured(runs, given.rounds, device)
    seconds = {name: median(row["seconds"]) for name, row in found.items()}
    memory = {name: row["peak_bytes"] for name, row in found.items()}
    on_gpu = device == "cuda"
    write_result(
        "inference",
        given.size,
        f"--resolution {side} --rounds {given.rounds}",
        {
            "settings": {"steps": STEPS, "side": side, "dtype": str(dtype), "seed": SEED, "weights": "random"},
            "runs": found,
            "ratios": {
                "erase / stock, time": seconds["erase"] / seconds["stock"],
                "layers / erase, time": seconds["layers"] / seconds["erase"],
                "erase / stock, memory": memory["erase"] / memory["stock"] if on_gpu else "not computed: no GPU",
                "layers / erase, memory": memory["layers"] / memory["erase"] if on_gpu else "not computed: no GPU",
            },
        },
    )


def write_result(name: str, size: str, options: str, result: dict[str, Any]) -> None:
    """Write ``results/NAME-SIZE-DEVICE.json``, with what it was measured with and on; print its ratios."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    measured_on = {
        "command": f"python benchmarks/{name}.py --size {size} {options}",
        "device": gpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "software": software_versions(),
    }
    place = re.sub(r"[^a-z0-9]+", "-", gpu.lower()) if gpu else "cpu"
    target = Path(__file__).parent / f"results/{name}-{size}-{place}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(measured_on | result, indent=2) + "\n")
    for label, ratio in result["ratios"].items():
        print(f"{label}: {ratio if isinstance(ratio, str) else f'{ratio:.2f}'}")


if __name__ == "__main__":
    main()
