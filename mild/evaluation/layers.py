"""A picture in layers (figures 8 and 14), as the report puts them together again."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mild.evaluation.cases import write_picture
from mild.evaluation.methods import Case, Setup
from mild.evaluation.methods.mild import MILDMethod
from mild.seeds import derived_seed


def paint_layers(method: MILDMethod, setup: Setup, cases: list[Case], seed: int, folder: Path) -> None:
    """Complete everybody of each case, and paint out all; writes ``KEY/background.png`` and ``KEY/layer-N.png`` (RGBA).

    Layers are in the order of the masks, and so from back to front.
    """
    import torch
    from PIL import Image

    eraser = method.open(setup)
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        erased = eraser.pipeline(
            case.image,
            list(case.masks),
            prompt=method.prompt(setup),
            pose=case.pose if method.pose else None,
            parsing=case.parsing if method.parsing else None,
            label_set=case.label_set,
            layers=True,
            margin=0,
            reach=method.reach,
            match_colours=method.match_colours,
            num_inference_steps=method.inference_steps or setup.inference_steps,
            generator=torch.Generator("cpu").manual_seed(derived_seed(seed, case.key)),
            output_type="np",
        )
        place = folder / case.key
        place.mkdir(exist_ok=True)
        write_picture(place / "before.png", case.image)
        write_picture(place / "background.png", np.asarray(erased.background))
        for number, layer in enumerate(erased.layers):
            Image.fromarray(layer).save(place / f"layer-{number}.png")
