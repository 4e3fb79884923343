"""The model card of a saved MILD directory."""

from __future__ import annotations

import json

from dataset_tools.weights import HUB_ID
from mild.bases import NANO
from mild.settings import MildSettings

CARD = """\
---
library_name: diffusers
{base_model}pipeline_tag: image-to-image
tags: [lora, inpainting, object-removal, stable-diffusion-xl]
---
# MILD: layered LoRA for erasing people

What MILD adds to the UNet of an SDXL inpainting base: the branch `bg` paints the background where people were, the
branch `fg` paints one person.

- Base: `{base}`, without which this folder does nothing
- Trained at {resolution} px; erases at {inference_resolution} px at most, DDIM steps: {inference_steps}{prompt}
{about}
## What is inside

| File | Part |
|---|---|
{parts}
| `mild.json` | format, base and all settings |

## Use

```python
from mild import MILDPipeline

pipeline = MILDPipeline.from_pretrained("this folder")  # on the base that it names, {base}
```

{stock}

```python
from diffusers import StableDiffusionXLInpaintPipeline
{base_import}
pipeline = StableDiffusionXLInpaintPipeline.from_pretrained({base_folder})
pipeline.load_lora_weights("this folder")
```
"""


def model_card(
    settings: MildSettings,
    *,
    base: str,
    resolution: int,
    inference_resolution: int,
    inference_steps: int,
    prompt: str = "",
    about: str = "",
) -> str:
    """The text of ``README.md`` for the hub: the parts that are there, and how to load them.

    Args:
        base: hub id or folder of the base; hubs link a card to an id only.
        resolution: in pixels, that the parts were trained at.
        inference_resolution: in pixels, at which they are meant to paint the background at most.
        inference_steps: in which they are meant to erase.
        prompt: that they were trained on.
        about: Markdown list items on training and data.
    """
    lora = f"rank {settings.lora.rank}, alpha {settings.lora.alpha}, on {', '.join(settings.lora.target_modules)}"
    rows = [
        ("pytorch_lora_weights.safetensors", f"adapter `bg`: {lora}"),
        ("fg/pytorch_lora_weights.safetensors", f"adapter `fg`: {lora}"),
    ]
    if settings.sma:
        free = "" if settings.sma_constraints else ", not held to the signs of section 3.4"
        rows.append(("sma.safetensors", f"Spatially-Modulated Attention: four scalars a self-attention{free}"))
    if settings.hmg is not None:
        rows.append(("hmg.safetensors", "Human Morphology Guidance: pose, parsing and masks as tokens beside the text"))
    if settings.offsets.any:
        names = {
            "spatial offset": settings.offsets.spatial_offset,
            "boundary smoothing": settings.offsets.boundary_smoothing,
        }
        rows.append(("offsets.safetensors", ", ".join(name for name, there in names.items() if there)))
    if settings.extents is not None:
        rows.append(("extents.safetensors", "heads that say how far people reach beyond their masks"))
    if settings.prefix is not None:
        rows.append(("prefix.safetensors", f"learned prompt prefix of {settings.prefix.tokens} tokens"))
    stock = "A stock pipeline loads the adapter `bg` (`fg` lies in the folder `fg`)"
    stock += ", without the other parts, which it was trained with:" if len(rows) > 2 else ":"
    return CARD.format(
        base_model=f"base_model: {base}\n" if HUB_ID.fullmatch(base) else "",
        base=base,
        # The name of the bundled base says nothing to diffusers.
        base_import="from mild.bases import place_of\n" if base == NANO else "",
        base_folder=f'place_of("{base}")' if base == NANO else f'"{base}"',
        resolution=resolution,
        inference_resolution=inference_resolution,
        inference_steps=inference_steps,
        prompt=prompt and f"\n- Trained on the prompt {json.dumps(prompt)}, which is theirs where none is given",
        about=about and about.rstrip("\n") + "\n",
        parts="\n".join(f"| `{name}` | {part} |" for name, part in rows),
        stock=stock,
    )
