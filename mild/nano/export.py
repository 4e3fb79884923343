"""The trained nano base as a folder for others: float16, measured, with a card that says what it can and cannot do."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLInpaintPipeline
from PIL import Image

from dataset_tools.drawn_world import Scene, draw_scene, generator
from dataset_tools.folders import folder_written_whole
from dataset_tools.schema import encode_png
from mild.erasing.pipeline import MILDPipeline
from mild.erasing.regions import editable
from mild.evaluation.methods import Case
from mild.evaluation.methods.opencv import OpenCVMethod
from mild.metrics.perceptual import perceptual_hole
from mild.metrics.psnr import psnr, psnr_hole
from mild.nano.architecture import count_parameters, save_nano_pipeline
from mild.nano.pictures import LEAST_SHARE, Pictures, random_hole
from mild.nano.settings import MARK, OWN, PretrainSettings

PEOPLE = (1, 2, 3, 4, 2, 1, 3, 5)
"""People in the pictures of the sample world's test split, one after the other."""
SHEET_ROWS = 6

CARD = """\
---
library_name: diffusers
pipeline_tag: image-to-image
license: apache-2.0
tags: [inpainting, stable-diffusion-xl]
---
# Nano base: SDXL inpainting, very small, for drawn pictures

A `StableDiffusionXLInpaintPipeline` with SDXL's architecture and {parameters:,} parameters, trained from nothing on a
drawn world of streets, parks and rooms. It exists so that erasing can be trained, seen and tested on any computer.
It knows nothing of photographs.

Like SDXL inpainting it fills a hole with whatever is likely there, **people included**: it was trained on pictures
with people and on holes that have nothing to do with them. Not doing so is what MILD's adapters teach it.

## What it can do

Measured on {count} scenes of the sample world's test split, none of which it was trained on, with the empty prompt and
{steps} DDIM steps. In the hole, mean over pictures; the perceptual distance is that of `mild.metrics`, not LPIPS:

| | this base | OpenCV's Telea |
|---|---|---|
| holes in pictures without people: PSNR, dB | {background:.1f} | {background_telea:.1f} |
| the same: perceptual distance | {background_distance:.2f} | {background_telea_distance:.2f} |
| people erased by the base alone (true masks): PSNR, dB | {people:.1f} | {people_telea:.1f} |
| the same: perceptual distance | {people_distance:.2f} | {people_telea_distance:.2f} |

VAE, encoding and decoding whole held-out pictures at {side} px: {vae:.1f} dB.

![fills](fills.png)

`fills.png`, from left to right: picture, hole, fill by this base, fill by Telea, truth; above holes in pictures without
people, below people.

{judgement}

## How it was made

- Command: `{command}`
- Seed {seed}; pictures: {pictures} of {side} px from {scenes} drawn scenes, digest `{digest}`; {leaves:.0%} of the
  scenes dead leaves (shapes over one another), {recolour:.0%} of the pictures in other colours
{before}
- UNet and text encoders: {unet_steps} steps of {unet_batch}; sample prediction; loss {unet_first:.4g} in the first
  tenth, {unet_last:.4g} in the last (`loss-unet.csv`, `loss-unet.svg`); {starts:.0%} of the examples the noised smooth
  fill that erasing starts from
- Captions such as "a street with two people"; {empty:.0%} of the examples had the empty prompt instead

{curve}![loss of the UNet](loss-unet.svg)

## Use

```python
from diffusers import StableDiffusionXLInpaintPipeline

pipeline = StableDiffusionXLInpaintPipeline.from_pretrained("this folder")
```
"""


VAE_TRAINED = """\
- VAE (divides each side by {factor}): {vae_steps} steps of {vae_batch} crops of {crop} px; loss {vae_first:.4g} in the
  first tenth, {vae_last:.4g} in the last (`loss-vae.csv`, `loss-vae.svg`)"""

TRAINED_FURTHER = """\
- Started from `{name}`, digest `{digest}`: its weights, trained further, and its VAE (divides each side by {factor}) as
  it is"""


def export_base(
    settings: PretrainSettings,
    pictures: str | Path,
    vae: str | Path,
    trained: str | Path,
    folder: str | Path,
    *,
    data_digest: str,
    command: str,
    base: tuple[str, str] | None = None,
    judgement: str = "",
    scenes: int = 24,
    steps: int = 25,
) -> dict[str, float]:
    """Write the trained pipeline in float16 with card, loss curves and a sheet of fills; the folder appears whole.

    Args:
        pictures: folder that `draw_pictures` wrote.
        vae: folder that `train_vae` wrote; not looked at where there is ``base``.
        trained: folder that `train_unet` wrote.
        data_digest: of the pictures.
        command: how all this was run, for the card.
        base: name and digest of the base from which it was trained further.
        judgement: what a person says who has looked at the pictures.
        scenes: of the sample world's test split, on which it is measured.
        steps: DDIM steps of each fill.

    Returns:
        What the card says, see `judge`.

    Raises:
        UserError: the folder cannot be written.
    """
    data, trained, vae = Pictures.open(pictures), Path(trained), Path(vae)
    with folder_written_whole(folder, MARK, OWN) as place:
        pipeline = StableDiffusionXLInpaintPipeline.from_pretrained(trained, add_watermarker=False)
        save_nano_pipeline(pipeline.to(dtype=torch.float16), place)
        for name in ("text_encoder", "text_encoder_2"):
            _load_in_float32(place / name / "config.json")
        curves: dict[str, float] = {}
        for name, source in (("unet", trained), *([] if base else [("vae", vae)])):
            for kind in ("csv", "svg"):
                (place / f"loss-{name}.{kind}").write_bytes((source / f"loss-{name}.{kind}").read_bytes())
            losses = np.loadtxt(place / f"loss-{name}.csv", delimiter=",", skiprows=1, ndmin=2)[:, 1]
            tenth = max(1, len(losses) // 10)
            curves |= {f"{name}_first": float(losses[:tenth].mean()), f"{name}_last": float(losses[-tenth:].mean())}
        # Measured is what was written, rounded to float16.
        numbers, sheet = judge(MILDPipeline.from_pretrained(str(place)), data.held_out, scenes, steps=steps)
        (place / "fills.png").write_bytes(encode_png(sheet))
        factor = pipeline.vae_scale_factor
        if base:
            before = TRAINED_FURTHER.format(name=base[0], digest=base[1], factor=factor)
        else:
            steps_of_vae = {"vae_steps": settings.vae.steps, "vae_batch": settings.vae.batch_size}
            before = VAE_TRAINED.format(factor=factor, crop=settings.vae.crop, **steps_of_vae, **curves)
        card = CARD.format(
            parameters=count_parameters(pipeline),
            count=scenes,
            steps=steps,
            side=settings.drawing.side,
            judgement=judgement,
            command=command,
            seed=settings.seed,
            pictures=len(data.pictures),
            scenes=settings.drawing.scenes,
            digest=data_digest,
            leaves=settings.drawing.leaves,
            recolour=settings.drawing.recolour,
            before=before,
            curve="" if base else "![loss of the VAE](loss-vae.svg)\n",
            starts=settings.unet.starts,
            unet_steps=settings.unet.steps,
            unet_batch=settings.unet.batch_size,
            empty=settings.unet.empty_prompt,
            **curves,
            **numbers,
        )
        (place / "README.md").write_text(card, encoding="utf-8")
    return numbers


def judge(
    pipeline: MILDPipeline, held_out: np.ndarray, scenes: int, *, prompt: str = "", steps: int = 25
) -> tuple[dict[str, float], np.ndarray]:
    """Measure a base on scenes of the sample world's test split, drawn at twice its resolution.

    Args:
        held_out: (H, S, S, 3) uint8, for the VAE.

    Returns:
        Mean PSNR in dB: ``vae`` over whole pictures; in the hole, for holes in pictures without people and for people,
        ``background`` and ``people``, the same by Telea with ``_telea``; each of the four also as mean perceptual
        distance, with ``_distance``. And a sheet of pictures, (H, W, 3) uint8.
    """
    pipeline.set_progress_bar_config(disable=True)
    side = 2 * pipeline.resolutions[0]
    numbers = {"vae": float(np.mean([psnr(_through_vae(pipeline, picture), picture) for picture in held_out]))}
    drawn = [_test_scene(index, side) for index in range(scenes)]
    outlines = [person.mask for scene in drawn for person in scene.people]
    holes = [[random_hole(generator(0, f"hole/{index}"), side, outlines)] for index in range(scenes)]
    people = [_masks(scene) for scene in drawn]
    rows = []
    for name, images, masks in (
        ("background", [scene.background for scene in drawn], holes),
        ("people", [scene.image for scene in drawn], people),
    ):
        seeds = [torch.Generator().manual_seed(index) for index in range(scenes)]
        filled = pipeline(
            images,
            masks,
            prompt=prompt,
            # The base itself is measured.
            match_colours=False,
            num_inference_steps=steps,
            generator=seeds,
            output_type="np",
        )
        found: dict[str, list[float]] = defaultdict(list)
        for number, (image, own, result, scene) in enumerate(zip(images, masks, filled, drawn, strict=True)):
            area = editable(np.stack(own), range(len(own)))
            (telea,) = OpenCVMethod(kind="telea").erase([Case(image, area[None])], [0])
            for way, picture in ((name, result.image), (f"{name}_telea", telea)):
                found[way].append(psnr_hole(picture, scene.background, area))
                found[f"{way}_distance"].append(perceptual_hole(picture, scene.background, area))
            if number < SHEET_ROWS:
                marked = np.where(area[..., None], np.uint8(128), image)
                rows.append(np.concatenate([image, marked, result.image, telea, scene.background], axis=1))
        numbers |= {way: float(np.mean(values)) for way, values in found.items()}
    sheet = Image.fromarray(np.concatenate(rows))
    return numbers, np.asarray(sheet.resize((sheet.width * 3 // 4, sheet.height * 3 // 4), Image.Resampling.LANCZOS))


def _load_in_float32(config: Path) -> None:
    """Unless told otherwise, diffusers' networks load in float32; transformers' as their configuration says."""
    values = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps({**values, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def _test_scene(index: int, side: int) -> Scene:
    """A scene of the sample world's test split, in a square."""
    return draw_scene(f"test/people/{index}", 0, (side, side), PEOPLE[index % len(PEOPLE)])


def _masks(scene: Scene) -> list[np.ndarray]:
    return [person.mask for person in scene.people if person.mask.mean() >= LEAST_SHARE / 4]


def _through_vae(pipeline: MILDPipeline, picture: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return pipeline._decode(pipeline._encode(picture[None], pipeline.device))[0]
