from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline
from PIL import Image

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from mild.backbone import load_base
from mild.erasers import Eraser
from mild.erasers.layered import MILDEraser
from mild.erasers.opencv import OpenCVEraser
from mild.erasers.sdxl import STRENGTH, SDXLEraser
from mild.pipeline import MILDPipeline

METHODS = ("telea", "navier-stokes", "sdxl-inpaint", "mild")


@pytest.fixture(scope="module")
def erasers(nano_base: str, adapters: Path) -> dict[str, Eraser]:
    layered = MILDPipeline.from_pretrained(nano_base, mild=adapters)
    layered.set_progress_bar_config(disable=True)
    return {
        "telea": OpenCVEraser("telea"),
        "navier-stokes": OpenCVEraser("navier-stokes"),
        "sdxl-inpaint": SDXLEraser(load_base(nano_base), steps=3, guidance_scale=2.0, resolution=32),
        "mild": MILDEraser(layered, steps=3),
    }


@pytest.fixture
def picture(make_sample: Callable[..., Sample]) -> tuple[np.ndarray, np.ndarray]:
    """An image of an odd size, and its people."""
    sample = make_sample(1, height=45, width=51)
    return sample.image, sample.people[0].mask | sample.people[1].mask


@pytest.mark.parametrize("method", METHODS)
def test_pixels_outside_the_mask_are_untouched_and_inside_are_filled(
    erasers: dict[str, Eraser], picture: tuple[np.ndarray, np.ndarray], method: str
) -> None:
    image, mask = picture
    before = image.copy()
    result = erasers[method].erase(image, mask, seed=0)
    assert (result.shape, result.dtype) == (image.shape, np.uint8)
    assert np.array_equal(result[~mask], before[~mask])
    assert (result[mask] != before[mask]).any(axis=1).mean() > 0.9
    assert np.array_equal(image, before)
    assert erasers[method].name == method


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_result(
    erasers: dict[str, Eraser], picture: tuple[np.ndarray, np.ndarray], method: str
) -> None:
    first = erasers[method].erase(*picture, seed=5)
    erasers["mild"].erase(*picture, seed=6)
    assert np.array_equal(erasers[method].erase(*picture, seed=5), first)


@pytest.mark.parametrize("method", ["sdxl-inpaint", "mild"])
def test_another_seed_gives_another_result(
    erasers: dict[str, Eraser], picture: tuple[np.ndarray, np.ndarray], method: str
) -> None:
    assert not np.array_equal(erasers[method].erase(*picture, seed=5), erasers[method].erase(*picture, seed=6))


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_mask_changes_nothing(
    erasers: dict[str, Eraser], picture: tuple[np.ndarray, np.ndarray], method: str
) -> None:
    image, mask = picture
    assert np.array_equal(erasers[method].erase(image, np.zeros_like(mask), seed=0), image)


@pytest.mark.parametrize("method", METHODS)
def test_unusable_input_is_named(
    erasers: dict[str, Eraser], picture: tuple[np.ndarray, np.ndarray], method: str
) -> None:
    image, mask = picture
    for bad_image, bad_mask, named in [
        (image, np.ones_like(mask), "mask covers the whole picture"),
        (image, mask[:-1], "mask is bool of shape"),
        (image, mask.astype(np.uint8), "mask is uint8"),
        (image[..., 0], mask, "image is uint8 of shape"),
        (image / 255.0, mask, "image is float64"),
    ]:
        with pytest.raises(UserError, match=named):
            erasers[method].erase(bad_image, bad_mask, seed=0)


@pytest.mark.parametrize("method", ["telea", "navier-stokes"])
def test_classical_inpainting_continues_a_plain_colour(erasers: dict[str, Eraser], method: str) -> None:
    truth = np.full((30, 30, 3), (10, 120, 230), np.uint8)
    image, mask = truth.copy(), np.zeros((30, 30), bool)
    mask[10:20, 12:18] = True
    image[mask] = 255
    # Telea rounds.
    assert np.abs(erasers[method].erase(image, mask, seed=0).astype(int) - truth).max() <= 2


def test_what_is_under_the_mask_cannot_be_seen_by_mild(
    erasers: dict[str, Eraser], make_sample: Callable[..., Sample]
) -> None:
    """Two images that differ under the mask alone give one result."""
    sample = make_sample(2, height=64, width=64, people=1)
    mask, other = sample.people[0].mask, sample.image.copy()
    other[mask] = 255 - other[mask]
    first, second = (erasers["mild"].erase(image, mask, seed=0) for image in (sample.image, other))
    assert np.array_equal(first, second)


def test_the_base_is_run_as_the_stock_pipeline_runs_it(
    erasers: dict[str, Eraser], nano_base: str, make_sample: Callable[..., Sample]
) -> None:
    sample = make_sample(3, height=32, width=48)
    mask = sample.people[0].mask
    stock = StableDiffusionXLInpaintPipeline.from_pretrained(nano_base)
    picture = stock(
        "",
        image=Image.fromarray(sample.image),
        mask_image=Image.fromarray(mask.astype(np.uint8) * 255),
        height=32,
        width=48,
        strength=STRENGTH,
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(9),
    ).images[0]
    expected = np.where(mask[..., None], np.asarray(picture), sample.image)
    found = erasers["sdxl-inpaint"].erase(sample.image, mask, seed=9)
    assert np.abs(found.astype(int) - expected).max() <= 1
