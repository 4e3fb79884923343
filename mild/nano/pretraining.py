"""Training of the nano base from nothing: first the VAE, then UNet and text encoders, as SDXL-inpaint is trained.

The UNet sees noisy latents, the hole, and the latents of the picture without what is in the hole; it predicts the
picture's latents (``prediction_type="sample"``). Pictures show people and holes lie anywhere (`mild.nano.pictures`),
so the base paints people too where they are likely.

SDXL's noise schedule never reaches pure noise: a network that only ever saw noised pictures takes what is left of the
smooth fill, from which erasing starts, for what is in the hole. ``starts`` of `UnetSettings` trains on that fill.

Everything random in step s follows from (seed, s): a run that was interrupted goes on from its checkpoint as if
nothing had happened; on a CPU, with as many threads and the same machine, to the same bytes.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLInpaintPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from dataset_tools.errors import UserError
from dataset_tools.folders import folder_written_whole
from mild.bases import digest_of_place
from mild.charts import loss_chart
from mild.nano.architecture import build_nano_pipeline, load_nano_pipeline, save_nano_pipeline
from mild.nano.pictures import Pictures, filled_holes
from mild.nano.settings import LoopSettings, PretrainSettings
from mild.seeds import derived_seed
from mild.training.checkpoints import Checkpoints

ENCODED_AT_ONCE = 64

Log = Callable[[str, int, float], None]
"""Called with the stage (``vae``, ``latents``, ``unet``), how many of its steps are done, and the loss."""


def train_vae(settings: PretrainSettings, pictures: str | Path, folder: str | Path, log: Log) -> None:
    """Train the VAE on crops of the pictures and write it with its loss curve; the folder appears whole.

    Its latents are scaled to mean 0 and variance 1 a channel by its own last and first 1x1 convolutions, so that
    ``scaling_factor`` is 1. An unfinished run leaves a checkpoint beside ``folder`` and is taken up again.

    Args:
        pictures: folder that `draw_pictures` wrote.

    Raises:
        UserError: loss or gradients are no longer finite, the checkpoint is of another run, or the folder cannot be
            written.
    """
    data = Pictures.open(pictures)
    vae = _first_pipeline(settings.seed).vae
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(settings.seed, "first weights of the VAE"))
        _keep_variance(vae)
    vae.to(_device())
    crop, options = min(settings.vae.crop, data.pictures.shape[1]), settings.vae

    grid = crop // 2 ** (len(vae.config.block_out_channels) - 1)
    latents = (options.batch_size, vae.config.latent_channels, grid, grid)

    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(derived_seed(settings.seed, "vae", step))
        seen = torch.from_numpy(_crops(rng, data.pictures, options.batch_size, crop)).to(_device())
        return _as_floats(seen), torch.from_numpy(rng.standard_normal(latents, np.float32)).to(_device())

    def loss_of(target: Tensor, noise: Tensor) -> Tensor:
        with _autocast(settings):
            mean, spread = vae._encode(target).float().chunk(2, dim=1)
        spread = spread.clamp(-30, 20)
        with _autocast(settings):
            result = vae._decode(mean + noise * (0.5 * spread).exp(), return_dict=False)[0].float()
        divergence = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
        return (result - target).square().mean() + options.divergence * divergence

    began = {"pictures": digest_of_place(str(pictures))}
    kept = _checkpoints_beside(folder, settings.determines("vae") | began)
    losses = _optimise({"vae": vae}, batch_of, loss_of, options, kept, "vae", log)
    _standardise(vae, data.pictures, settings)
    with folder_written_whole(folder, "config.json") as place:
        vae.to("cpu").save_pretrained(place)
        write_curve(losses, place, "loss-vae")
    kept.remove()


def take_vae(base: str, folder: str | Path) -> None:
    """Write the VAE of a nano base, float32, in the place of one that `train_vae` trains; the folder appears whole.

    Args:
        base: folder, hub id, or `mild.bases.NANO`.

    Raises:
        UserError: the base cannot be loaded or is of another architecture, or the folder cannot be written.
    """
    with folder_written_whole(folder, "config.json") as place:
        load_nano_pipeline(base).vae.save_pretrained(place)


def encode_examples(
    settings: PretrainSettings, pictures: str | Path, vae: str | Path, folder: str | Path, log: Log, workers: int = 1
) -> None:
    """Encode every picture whole, and without and with a smooth fill of each of its holes; the folder appears whole.

    Arrays: ``latents`` (P, C, h, w), ``seen`` and ``starts`` (P, holes, C, h, w), float16; ``holes``
    (P, holes, S, S / 8) uint8, packed to bits.

    Args:
        pictures: folder that `draw_pictures` wrote.
        vae: folder that `train_vae` or `take_vae` wrote.
        workers: processes that draw holes and fill them; any number gives the same.
    """
    data = Pictures.open(pictures)
    model = AutoencoderKL.from_pretrained(vae).to(_device()).eval()
    count, side, holes = len(data.pictures), data.pictures.shape[1], settings.unet.holes
    grid = side // 2 ** (len(model.config.block_out_channels) - 1)
    shape = (model.config.latent_channels, grid, grid)

    def encoded(batch: Tensor) -> np.ndarray:
        with torch.no_grad(), _autocast(settings):
            latents = model._encode(batch)[:, : shape[0]]
        kept: np.ndarray = latents.to(torch.float16).cpu().numpy()
        return kept

    with folder_written_whole(folder, "latents.npy") as place:
        latents = _new_array(place / "latents.npy", np.float16, (count, *shape))
        seen = _new_array(place / "seen.npy", np.float16, (count, holes, *shape))
        starts = _new_array(place / "starts.npy", np.float16, (count, holes, *shape))
        packed = _new_array(place / "holes.npy", np.uint8, (count, holes, side, side // 8))
        drawn = filled_holes(settings.seed, pictures, holes, workers)
        for start in range(0, count, ENCODED_AT_ONCE):
            window = slice(start, min(count, start + ENCODED_AT_ONCE))
            batch = _as_floats(torch.from_numpy(np.array(data.pictures[window])).to(_device()))
            latents[window] = encoded(batch)
            found = list(itertools.islice(drawn, window.stop - window.start))
            for number in range(holes):
                hole = np.stack([of_picture[number][0] for of_picture in found])
                packed[window, number] = np.packbits(hole, axis=-1)
                seen[window, number] = encoded(batch * torch.from_numpy(~hole)[:, None].to(batch))
                filled = np.stack([of_picture[number][1] for of_picture in found])
                starts[window, number] = encoded(_as_floats(torch.from_numpy(filled).to(_device())))
            log("latents", window.stop, 0.0)
        for array in (latents, seen, starts, packed):
            array.flush()


def train_unet(
    settings: PretrainSettings,
    pictures: str | Path,
    vae: str | Path,
    examples: str | Path,
    folder: str | Path,
    log: Log,
    base: str | None = None,
) -> None:
    """Train UNet and text encoders, and write the whole pipeline in float32; the folder appears whole.

    An unfinished run leaves a checkpoint beside ``folder`` and is taken up again.

    Args:
        pictures: folder that `draw_pictures` wrote.
        vae: folder that `train_vae` or `take_vae` wrote.
        examples: folder that `encode_examples` wrote.
        base: nano base (folder, hub id, or `mild.bases.NANO`) whose VAE ``vae`` is, and from whose weights the training
            goes on; by default from random ones.

    Raises:
        UserError: loss or gradients are no longer finite, the checkpoint is of another run, the base cannot be loaded
            or is of another architecture, or the folder cannot be written.
    """
    captions = Pictures.open(pictures).captions
    latents, seen, starts, holes = (np.load(Path(examples) / f"{name}.npy", mmap_mode="r") for name in STORED)
    pipeline = _first_pipeline(settings.seed) if base is None else load_nano_pipeline(base)
    pipeline.register_modules(vae=AutoencoderKL.from_pretrained(vae))
    pipeline.to(_device())
    trained = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    # On a CPU, the fused kernel's backward pass is several times slower than plain matrix products.
    pipeline.unet.set_attn_processor(AttnProcessor() if _device().type == "cpu" else AttnProcessor2_0())
    unet = torch.compile(pipeline.unet, dynamic=False) if settings.unet.compile else pipeline.unet
    options, side = settings.unet, holes.shape[2]
    alphas = pipeline.scheduler.alphas_cumprod.to(_device())
    # transformers collects hidden states in a way that mixes up those of threads.
    text_encoders = Lock()

    def batch_of(step: int) -> tuple[Any, ...]:
        rng = np.random.default_rng(derived_seed(settings.seed, "unet", step))
        chosen = rng.integers(len(latents), size=options.batch_size)
        numbers = rng.integers(holes.shape[1], size=options.batch_size)
        target = torch.from_numpy(latents[chosen].astype(np.float32)).to(_device())
        shown = torch.from_numpy(seen[chosen, numbers].astype(np.float32)).to(_device())
        unpacked = np.unpackbits(holes[chosen, numbers], axis=-1)[:, None]
        hole = torch.from_numpy(unpacked.astype(np.float32)).to(_device())
        # What goes into a hole is decided where there is most noise; where there is little the answer is nearly given.
        drawn = np.sqrt(rng.random(options.batch_size)) * len(alphas)
        timesteps = torch.from_numpy(drawn.astype(np.int64)).to(_device())
        noise = torch.from_numpy(rng.standard_normal(tuple(target.shape), np.float32)).to(_device())
        at_start = torch.from_numpy(rng.random(options.batch_size) < options.starts).to(_device())
        start = torch.from_numpy(starts[chosen, numbers].astype(np.float32)).to(_device())
        timesteps = torch.where(at_start, len(alphas) - 1, timesteps)
        share = alphas[timesteps, None, None, None]
        noised = torch.where(at_start[:, None, None, None], start, target)
        noisy = share.sqrt() * noised + (1 - share).sqrt() * noise
        fate = rng.random(options.batch_size)
        texts = ["" if f < options.empty_prompt else captions[i] for f, i in zip(fate, chosen, strict=True)]
        blank = torch.from_numpy(fate >= 1 - options.no_text).to(_device())
        # Sizes as SDXL is told them, drawn at random: none that a picture may have is new to the network.
        sizes = torch.from_numpy(rng.uniform(side / 2, 2 * side, (options.batch_size, 2)).astype(np.float32))
        sizes = torch.cat([sizes, torch.zeros_like(sizes), sizes], 1).to(_device())
        # As pipelines do it: the mask channel is taken at the nearest pixel.
        seen_by_unet = torch.cat([noisy, F.interpolate(hole, size=target.shape[-2:]), shown], 1)
        weight = options.outside + (1 - options.outside) * F.adaptive_max_pool2d(hole, target.shape[-2:])
        return seen_by_unet, timesteps, texts, blank, sizes, target, weight / weight.mean()

    def loss_of(
        given: Tensor, timesteps: Tensor, texts: list[str], blank: Tensor, sizes: Tensor, target: Tensor, weight: Tensor
    ) -> Tensor:
        with _autocast(settings):
            with text_encoders:
                text, _, pooled, _ = pipeline.encode_prompt(texts, device=_device(), do_classifier_free_guidance=False)
            prediction = unet(
                given,
                timesteps,
                encoder_hidden_states=torch.where(blank[:, None, None], 0, text),
                added_cond_kwargs={"text_embeds": torch.where(blank[:, None], 0, pooled), "time_ids": sizes},
                return_dict=False,
            )[0]
        return (weight * (prediction.float() - target).square()).mean()

    began = {
        "base": None if base is None else digest_of_place(base),
        "pictures": digest_of_place(str(pictures)),
        "vae of the latents": digest_of_place(str(vae)),
    }
    kept = _checkpoints_beside(folder, settings.determines("unet", own_vae=base is None) | began)
    losses = _optimise(trained, batch_of, loss_of, options, kept, "unet", log)
    pipeline.unet.set_attn_processor(AttnProcessor2_0())
    with folder_written_whole(folder, "model_index.json") as place:
        save_nano_pipeline(pipeline.to("cpu"), place)
        write_curve(losses, place, "loss-unet")
    kept.remove()


STORED = ("latents", "seen", "starts", "holes")


def write_curve(losses: list[float], folder: Path, name: str) -> None:
    """The loss of every step as ``name.csv``, and as ``name.svg`` on a logarithmic scale."""
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("step", "loss"))
        rows.writerows((step, f"{loss:.6g}") for step, loss in enumerate(losses, start=1))
    chart = loss_chart([{"loss": loss} for loss in losses], ["loss"], logarithmic=True)
    (folder / f"{name}.svg").write_text(chart, encoding="utf-8")


def _optimise(
    networks: Mapping[str, nn.Module],
    batch_of: Callable[[int], tuple[Any, ...]],
    loss_of: Callable[..., Tensor],
    settings: LoopSettings,
    kept: Checkpoints,
    stage: str,
    log: Log,
) -> list[float]:
    """Train with AdamW from the checkpoint, where there is one, to the end; the networks then hold the average.

    While a step is computed, the examples of the next are drawn.

    On a CPU the batch is cut into as many parts as torch has threads, each computed by a thread of its own: small
    layers gain little from several threads, and lose much where the cores have other work too.

    Args:
        batch_of: the examples of a step, counted from 0: tensors and lists, each as long as the batch.
        loss_of: the mean loss of examples.

    Returns:
        The loss of every step.
    """
    named = {f"{name}.{key}": p for name, network in networks.items() for key, p in network.named_parameters()}
    weights = list(named.values())
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)
    for p in weights:
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    average = [p.detach().clone() for p in weights]
    states = {
        "weights": [p.detach() for p in weights],
        "average": average,
        **{name: [optimizer.state[p][name] for p in weights] for name in ("exp_avg", "exp_avg_sq")},
    }
    held = {f"{kind}.{name}": t for kind, values in states.items() for name, t in zip(named, values, strict=True)}
    count = 1 if _device().type != "cpu" else min(torch.get_num_threads(), settings.batch_size)
    bounds = [settings.batch_size * number // count for number in range(count + 1)]
    cuts = [slice(*pair) for pair in itertools.pairwise(bounds)]

    def part_of(part: list[Any]) -> tuple[float, tuple[Tensor | None, ...]]:
        loss = loss_of(*part) * len(part[0]) / settings.batch_size
        return loss.item(), torch.autograd.grad(loss, weights, allow_unused=True)

    threads = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    with kept.held(), threads as pool, ThreadPoolExecutor(1) as drawing:
        saved = kept.latest()
        losses: list[float] = [] if saved is None else saved.tensors["losses"].tolist()
        if saved is not None:
            for name, tensor in held.items():
                tensor.copy_(saved.tensors[name])
        for p in weights:
            optimizer.state[p]["step"].fill_(len(losses))
        coming = drawing.submit(batch_of, len(losses))
        for step in range(len(losses), settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step)
            batch = coming.result()
            if step + 1 < settings.steps:
                coming = drawing.submit(batch_of, step + 1)
            found = list(pool.map(part_of, [[values[cut] for values in batch] for cut in cuts]))
            losses.append(sum(loss for loss, _ in found))
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"the loss of the {stage} is {losses[-1]} at step {step + 1}: lower {stage}.learning_rate"
                )
            for p, *shares in zip(weights, *(gradients for _, gradients in found), strict=True):
                p.grad = None if shares[0] is None else torch.stack(shares).sum(0)
            norm = float(nn.utils.clip_grad_norm_(weights, 1.0))
            if not math.isfinite(norm):
                raise UserError(
                    f"the norm of the gradients of the {stage} is {norm} at step {step + 1}: lower "
                    f"{stage}.learning_rate"
                )
            optimizer.step()
            forgotten = 1 - min(settings.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, states["weights"], forgotten)
            log(stage, step + 1, losses[-1])
            if (step + 1) % settings.checkpoint_every == 0:
                kept.save(step + 1, held | {"losses": torch.tensor(losses, dtype=torch.float64)}, {})
    with torch.no_grad():
        for p, mean in zip(weights, average, strict=True):
            p.copy_(mean)
    return losses


def _checkpoints_beside(folder: str | Path, identity: dict[str, Any]) -> Checkpoints:
    place = Path(folder).absolute()
    return Checkpoints(place.with_name(f"{place.name}.checkpoints"), identity, keep=1)


def _first_pipeline(seed: int) -> StableDiffusionXLInpaintPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "first weights"))
        pipeline = build_nano_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _keep_variance(vae: AutoencoderKL) -> None:
    """First weights with which signals keep their size from layer to layer, and residual branches start at zero.

    With torch's own, each layer shrinks the picture's part of the signal and not the biases' part, and the VAE needs
    twice as long to learn the first colours.
    """
    for name, layer in vae.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
            if name.endswith("conv2"):
                nn.init.zeros_(layer.weight)
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")


def _standardise(vae: AutoencoderKL, pictures: np.ndarray, settings: PretrainSettings, count: int = 256) -> None:
    """Fold mean and deviation of each channel of the latents into the 1x1 convolutions around them."""
    rng = np.random.default_rng(derived_seed(settings.seed, "statistics"))
    chosen = rng.choice(len(pictures), min(count, len(pictures)), replace=False)
    channels = vae.config.latent_channels
    with torch.no_grad():
        means = [
            vae._encode(_as_floats(torch.from_numpy(np.array(pictures[index : index + 1])).to(_device()))).float()[
                0, :channels
            ]
            for index in chosen
        ]
        flat = torch.stack(means).transpose(0, 1).flatten(1)
        mean, deviation = flat.mean(1), flat.std(1)
        before, after = vae.quant_conv, vae.post_quant_conv
        before.weight[:channels] /= deviation[:, None, None, None]
        before.bias[:channels] = (before.bias[:channels] - mean) / deviation
        before.bias[channels:] -= 2 * deviation.log()
        after.bias += after.weight[:, :, 0, 0] @ mean
        after.weight *= deviation[None, :, None, None]


def _crops(rng: np.random.Generator, pictures: np.ndarray, count: int, side: int) -> np.ndarray:
    """Squares (count, side, side, 3) uint8 of random pictures, half of them mirrored."""
    chosen = rng.integers(len(pictures), size=count)
    corners = rng.integers(0, pictures.shape[1] - side + 1, (count, 2))
    mirrored = rng.random(count) < 0.5
    return np.stack(
        [
            pictures[index, top : top + side, left : left + side][:, :: -1 if mirror else 1]
            for index, (top, left), mirror in zip(chosen, corners, mirrored, strict=True)
        ]
    )


def _as_floats(pictures: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 as (B, 3, H, W) float32 in -1..1."""
    # Not channels last: on a CPU, the group norms' backward pass is many times slower in that order.
    return pictures.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def _new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _autocast(settings: PretrainSettings) -> torch.autocast:
    # Its cache of rounded weights belongs to all threads, and the first that is done would empty it.
    enabled = settings.mixed_precision == "bf16"
    return torch.autocast(_device().type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
