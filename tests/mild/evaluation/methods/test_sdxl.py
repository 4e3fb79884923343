from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline
from PIL import Image

from mild.evaluation.methods import Case, Eraser, Setup
from mild.evaluation.methods.sdxl import SDXLMethod, scaled_case, working_size

SETTINGS: dict[str, Any] = {"guidance_scale": 2.0, "strength": 0.8, "resolution": 32, "inference_steps": 3}


@pytest.fixture(scope="module")
def setup(nano_base: str) -> Setup:
    return Setup(base=nano_base, adapters="", inference_steps=3, prompt="")


@pytest.fixture(scope="module")
def eraser(setup: Setup) -> Eraser:
    return SDXLMethod(**SETTINGS).open(setup)


def erased(eraser: Eraser, case: Case, seed: int = 0) -> np.ndarray:
    (result,) = eraser.erase([case], [seed])
    return result


def test_pixels_outside_the_mask_are_untouched_and_inside_are_filled(eraser: Eraser, case: Case) -> None:
    hole, before = case.hole, case.image.copy()
    result = erased(eraser, case)
    assert (result.shape, result.dtype) == (before.shape, np.uint8)
    assert np.array_equal(result[~hole], before[~hole])
    assert (result[hole] != before[hole]).any(axis=1).mean() > 0.9
    assert np.array_equal(case.image, before)


def test_the_seed_decides_about_the_result(eraser: Eraser, case: Case) -> None:
    first, other = erased(eraser, case, seed=5), erased(eraser, case, seed=6)
    assert np.array_equal(erased(eraser, case, seed=5), first)
    assert not np.array_equal(first, other)


def test_cases_of_any_sizes_give_together_what_each_gives_alone(eraser: Eraser, make_case: Callable[..., Case]) -> None:
    cases = [make_case(1, height=45, width=51), make_case(2), make_case(3, height=45, width=51)]
    together = eraser.erase(cases, [4, 5, 6])
    for one, case, seed in zip(together, cases, (4, 5, 6), strict=True):
        assert np.abs(one.astype(int) - erased(eraser, case, seed)).max() <= 2


def test_the_base_is_run_as_the_stock_pipeline_runs_it(
    setup: Setup, nano_base: str, make_case: Callable[..., Case]
) -> None:
    case = make_case(3, height=32, width=48)
    stock = StableDiffusionXLInpaintPipeline.from_pretrained(nano_base)
    picture = stock(
        "a lawn",
        image=Image.fromarray(case.image),
        mask_image=Image.fromarray(case.hole.astype(np.uint8) * 255),
        height=32,
        width=48,
        strength=0.8,
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(9),
    ).images[0]
    expected = np.where(case.hole[..., None], np.asarray(picture), case.image)
    found = erased(SDXLMethod(**SETTINGS).open(replace(setup, prompt="a lawn")), case, seed=9)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_the_working_size_has_the_pictures_aspect_and_its_shorter_side_at_the_resolution() -> None:
    assert working_size((1080, 1920), 512) == (512, 912)
    assert working_size((900, 600), 512) == (768, 512)
    assert working_size((100, 100), 64, multiple=64) == (64, 64)


def test_a_hole_at_working_size_holds_every_pixel_that_the_mask_touches() -> None:
    image, mask = np.zeros((64, 64, 3), np.uint8), np.zeros((1, 64, 64), bool)
    mask[0, 5, 62] = True
    shrunk, grown = (scaled_case(Case(image, mask), size) for size in ((16, 16), (128, 128)))
    assert np.argwhere(np.asarray(shrunk[1])).tolist() == [[1, 15]]
    rows, columns = np.nonzero(np.asarray(grown[1]))
    assert {10, 11} <= set(rows.tolist()) and {124, 125} <= set(columns.tolist())
    assert shrunk[0].size == (16, 16) and grown[0].size == (128, 128)


def test_a_base_has_to_be_named(setup: Setup) -> None:
    nothing = replace(setup, base="")
    assert "no base is named" in (SDXLMethod().missing(nothing) or "")
    assert SDXLMethod(base="some/base").missing(nothing) is None
    assert SDXLMethod().missing(setup) is None
    assert "nowhere is no folder here" in (SDXLMethod(base="./nowhere").missing(setup) or "")


def test_a_strength_that_leaves_no_step_is_told_before_anything_runs(setup: Setup) -> None:
    """Stock pipelines take the whole part of steps times strength, and refuse none."""
    one = replace(setup, inference_steps=1)
    assert "leaves none of 1 steps" in (SDXLMethod().missing(one) or "")
    assert SDXLMethod(strength=1).missing(one) is None and SDXLMethod(inference_steps=2).missing(one) is None


def test_the_fingerprint_is_that_of_settings_weights_and_prompt(
    setup: Setup, tiny_base: str, nano_base: str, tmp_path: Path
) -> None:
    def fingerprint(setup: Setup = setup, **values: Any) -> str:
        return SDXLMethod(**values).fingerprint(setup)

    shutil.copytree(nano_base, tmp_path / "copy")
    same = [fingerprint(name="another", arm="arm"), fingerprint(base=str(tmp_path / "copy")), fingerprint()]
    assert len(set(same)) == 1
    others = [
        fingerprint(base=tiny_base),
        fingerprint(guidance_scale=2),
        fingerprint(strength=0.5),
        fingerprint(resolution=64),
        fingerprint(inference_steps=4),
        fingerprint(replace(setup, prompt="a lawn")),
    ]
    assert len({*same, *others}) == 1 + len(others)
    assert fingerprint(replace(setup, inference_steps=4)) == fingerprint(inference_steps=4)
