"""What a training step of MILD costs beside the LoRA training that diffusers has for SDXL.

    python benchmarks/training.py                 # full-size SDXL architecture, random weights, bfloat16: a GPU
    python benchmarks/training.py --resolution 256 --rounds 3   # the same on a CPU with 24 GB, smaller pictures
    python benchmarks/training.py --size nano     # anywhere

In one run, in turn, four samples of two people each: one optimizer step of MILD (``mild``), as `mild.training.loop`
takes it from samples in memory to the moved weights; the same with latents that were computed before (``mild, cached``,
the setting ``cached_views``); and three steps (``plain``) of the recipe of diffusers'
examples/dreambooth/train_dreambooth_lora_sdxl.py, as for an inpainting UNet: one adapter of the same rank on to_q,
to_k, to_v and to_out.0, frozen weights in the precision of the computation and trained ones in float32, pictures and
masked pictures encoded in every step ("The VAE is always in float32 to avoid NaN losses", says the recipe), noise, mean
squared error, gradient clipping, AdamW. All have UNets of equal weights and the same precision, VAE, samples and batch.

Why three: what MILD learns of a sample with N people, the clean background and each of them, are N + 1 examples to a
recipe that knows pictures and masks only. MILD takes two forward and backward passes for them whatever N is: the
background's, and that of one person drawn at random, who counts N-fold and stands for the sum over all N of eq. 5
(those whom others touch or hide are drawn more often). So its step stands for what three plain ones see, and two thirds
are what it would cost if SMA, HMG, cues and larger optimizer states cost nothing; latents that are kept save more.

Medians, lowest and highest of the rounds' ratios, and peak memory of a step, weights and optimizer included (each in a
process of its own: of the CUDA allocator, or what the process grew by, on Linux), go to
``benchmarks/results/training-SIZE-DEVICE.json``. Target: 0.6x in time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionXLInpaintPipeline
from diffusers.training_utils import cast_training_params
from inference import SEED, measured, row_of_people, sdxl_pipeline, write_result
from peft import LoraConfig
from sma import resident
from torch.nn import functional as F

from dataset_tools.schema import Person, Sample
from mild.model.backbone import encode_pictures
from mild.model.layered import LayeredUNet
from mild.nano.architecture import build_nano_pipeline
from mild.settings import TrainSettings, WarmUpSettings
from mild.training.batches import draw_fixed_view
from mild.training.latents import Latents, encode_view
from mild.training.loop import _Run
from mild.training.objective import prediction_target

PEOPLE, BATCH = 2, 4


class Samples:
    """A batch of composite samples in memory, of one size: noise with people who stand before one another."""

    def __init__(self, side: int) -> None:
        self.samples = [self._sample(number, side) for number in range(BATCH)]
        self.keys = [sample.key for sample in self.samples]

    def __len__(self) -> int:
        return BATCH

    def __getitem__(self, index: int, /) -> Sample:
        return self.samples[index]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.arange(BATCH)

    @staticmethod
    def _sample(number: int, side: int) -> Sample:
        random = np.random.default_rng([SEED, number])
        masks = row_of_people(side)[:PEOPLE]
        joints = np.concatenate([random.uniform(0, side, (PEOPLE, 18, 2)), np.ones((PEOPLE, 18, 1))], -1)
        people = [
            Person(str(k), masks[k], keypoints=joints[k].astype(np.float32), augmented_mask=masks[k], order=k)
            for k in range(PEOPLE)
        ]
        image, background = random.integers(0, 256, (2, side, side, 3), np.uint8)
        parsing = np.any(masks, axis=0).astype(np.uint8)
        return Sample(str(number), "train", "composite", image, people, parsing, "lip", [], background=background)


class Kept(Latents):
    """Latents of one view of each sample, in memory; from a disk they come as one small read a sample."""

    def __init__(self, pipeline: StableDiffusionXLInpaintPipeline, samples: Samples, settings: TrainSettings) -> None:
        views = {sample.key: draw_fixed_view(sample, 0, settings) for sample in samples.samples}
        self._of = {key: encode_view(pipeline.vae, view, settings) for key, view in views.items()}

    def read(self, sample: Sample, number: int) -> dict[str, torch.Tensor]:
        return self._of[sample.key]


def mild_steps(
    names: Sequence[str],
    pipeline: StableDiffusionXLInpaintPipeline,
    samples: Samples,
    settings: TrainSettings,
    accelerator: Accelerator,
) -> dict[str, Callable[[], None]]:
    """An optimizer step of `mild.training.loop`, with the VAE or with kept latents: on one UNet, for want of memory."""
    layered = LayeredUNet.create(pipeline.unet, settings.mild, settings.seed)

    def step_of(name: str) -> Callable[[], None]:
        chosen, latents = settings, None
        if name == "mild, cached":
            chosen = settings.model_copy(update={"cached_views": 1})
            latents = Kept(pipeline, samples, chosen)
        # One of its own around the same networks: a run takes out of it what it is done with.
        own = StableDiffusionXLInpaintPipeline(**pipeline.components, add_watermarker=False)
        run = _Run(chosen, samples, own, layered, accelerator, latents, fresh=None, sharding=None)
        feed = run.feed()

        def step() -> None:
            run.step(len(run.losses), False, feed)

        return step

    return {name: step_of(name) for name in names}


def plain_steps(
    pipeline: StableDiffusionXLInpaintPipeline, samples: Samples, settings: TrainSettings, accelerator: Accelerator
) -> Callable[[], None]:
    """N + 1 optimizer steps of diffusers' recipe: on the clean backgrounds, then on each person in turn."""
    device = accelerator.device
    precision = {"no": torch.float32, "bf16": torch.bfloat16}[settings.mixed_precision]
    pipeline.to(device)
    with torch.no_grad():
        text, _, pooled_text, _ = pipeline.encode_prompt(settings.prompt, do_classifier_free_guidance=False)
    text, pooled_text = text.repeat(BATCH, 1, 1), pooled_text.repeat(BATCH, 1)
    # The text encoders are done with.
    unet, vae = pipeline.unet, pipeline.vae.requires_grad_(False)
    pipeline.text_encoder, pipeline.text_encoder_2 = None, None
    unet.requires_grad_(False).to(dtype=precision).train()
    rank = settings.mild.lora.rank
    layers = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=layers))
    cast_training_params(unet, torch.float32)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = accelerator.prepare(torch.optim.AdamW(trained, lr=settings.learning_rate))
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    side = settings.resolution
    times = torch.tensor([[side, side, 0, 0, side, side]], dtype=text.dtype, device=device).expand(BATCH, -1)

    def step(layer: int) -> None:
        pictures, holes = (given.to(device) for given in example(samples, layer))
        latents, seen = (encode_pictures(vae, shown).to(precision) for shown in (pictures, pictures * (1 - holes)))
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (BATCH,), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with accelerator.autocast():
            prediction = unet(
                torch.cat([noisy, F.interpolate(holes, size=latents.shape[-2:]), seen], dim=1),
                timesteps,
                encoder_hidden_states=text,
                added_cond_kwargs={"text_embeds": pooled_text, "time_ids": times},
            ).sample
        loss = F.mse_loss(prediction.float(), prediction_target(scheduler, latents, noise, timesteps).float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # for the progress bar

    def steps() -> None:
        for layer in range(PEOPLE + 1):
            step(layer)

    return steps


def example(samples: Samples, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, 3, H, W) in -1..1 and holes (B, 1, H, W), 0 or 1, of the background (0) or of a person (1 to N)."""
    pictures: list[Any] = [sample.image if layer else sample.background for sample in samples.samples]
    people = [sample.people[layer - 1 : layer] if layer else sample.people for sample in samples.samples]
    holes = [np.any([person.mask for person in chosen], axis=0) for chosen in people]
    return (
        torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1,
        torch.from_numpy(np.stack(holes))[:, None].float(),
    )


MILD = ("mild", "mild, cached")
CONTENDERS = (*MILD, "plain")


def contenders(names: Sequence[str], size: str, side: int, device: str) -> dict[str, Callable[[], None]]:
    """What one round of each runs, all weights drawn from `SEED`."""
    settings = TrainSettings(
        batch_size=BATCH,
        resolution=side,
        mixed_precision=precision_of(size, device),
        warm_up=WarmUpSettings(start=0, end=0),
        seed=SEED,
    )
    samples, accelerator = Samples(side), Accelerator(mixed_precision=settings.mixed_precision)

    def pipeline() -> StableDiffusionXLInpaintPipeline:
        torch.manual_seed(SEED)
        return sdxl_pipeline() if size == "sdxl" else build_nano_pipeline()

    ours = [name for name in MILD if name in names]
    found = mild_steps(ours, pipeline(), samples, settings, accelerator) if ours else {}
    if "plain" in names:
        found["plain"] = plain_steps(pipeline(), samples, settings, accelerator)
    return found


def precision_of(size: str, device: str) -> Literal["no", "bf16"]:
    """bfloat16 on a GPU, and for the full size, which hardly fits a memory in float32."""
    return "bf16" if size == "sdxl" or device == "cuda" else "no"


def peak(name: str, size: str, side: int, device: str) -> int:
    """Peak bytes during one round of a contender, the second."""
    held = resident("VmRSS")
    run = contenders([name], size, side, device)[name]
    run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run()
    return resident("VmHWM") - held


def main() -> None:
    """Time both, measure memory (a process each), print the ratios, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("sdxl", "nano"), default="sdxl")
    parser.add_argument("--resolution", type=int, help="side of the pictures in pixels; 512, or 128 for nano")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", choices=CONTENDERS, help="print the peak bytes of one contender and stop")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = given.resolution or (512 if given.size == "sdxl" else 128)
    if given.peak:
        print(peak(given.peak, given.size, side, device))
        return
    memory = {}
    for name in CONTENDERS:
        command = [sys.executable, __file__, "--size", given.size, "--resolution", str(side), "--peak", name]
        # Freed memory goes back to the system at once, or a later peak would hide in it.
        allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | allocator)
        memory[name] = json.loads(done.stdout.splitlines()[-1])
    load = os.getloadavg()[0]
    runs = measured(contenders(CONTENDERS, given.size, side, device), given.rounds, device)
    for name, found in runs.items():
        found["peak_bytes"] = memory[name]
    ratios: dict[str, float] = {}
    for name in MILD:
        times = [own / plain for own, plain in zip(runs[name]["seconds"], runs["plain"]["seconds"], strict=True)]
        against = f"{name} / {PEOPLE + 1} plain, time"
        ratios |= {
            f"{against}, {kind}": of(times) for kind, of in (("median", median), ("lowest", min), ("highest", max))
        }
        ratios[f"{name} / plain, memory"] = memory[name] / memory["plain"]
    write_result(
        "training",
        given.size,
        f"--resolution {side} --rounds {given.rounds}",
        {
            "settings": {
                "people": PEOPLE,
                "batch": BATCH,
                "side": side,
                "mixed_precision": precision_of(given.size, device),
                "seed": SEED,
                "weights": "random",
                "threads": torch.get_num_threads(),
                "load_average_at_start": load,
            },
            "runs": runs,
            "ratios": ratios,
        },
    )


if __name__ == "__main__":
    main()
