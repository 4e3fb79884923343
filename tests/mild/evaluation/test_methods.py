from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline
from PIL import Image

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from mild.erasing.pipeline import MILDPipeline
from mild.erasing.regions import editable
from mild.evaluation.methods import Case, Eraser
from mild.evaluation.methods.mild import MILDEraser
from mild.evaluation.methods.opencv import OpenCVEraser
from mild.evaluation.methods.sdxl import SDXLEraser
from mild.model.backbone import load_base

METHODS = ("telea", "navier-stokes", "sdxl-inpaint", "mild")


@pytest.fixture(scope="module")
def erasers(nano_base: str, adapters: Path) -> dict[str, Eraser]:
    layered = MILDPipeline.from_pretrained(nano_base, mild=adapters)
    layered.set_progress_bar_config(disable=True)
    assert layered.layered is not None and layered.layered.hmg is not None
    for gate in layered.layered.hmg.gates.values():
        # Open: after so few steps of training the cues would hardly be seen.
        gate.data.fill_(1)
    return {
        "telea": OpenCVEraser("telea"),
        "navier-stokes": OpenCVEraser("navier-stokes"),
        "sdxl-inpaint": SDXLEraser(load_base(nano_base), steps=3, guidance_scale=2.0, strength=0.8, resolution=32),
        "mild": MILDEraser(layered, steps=3),
    }


@pytest.fixture
def case(make_sample: Callable[..., Sample]) -> Case:
    """An image of an odd size, and its people."""
    return case_of(make_sample(1, height=45, width=51))


def case_of(sample: Sample) -> Case:
    return Case(
        sample.image,
        np.stack([person.mask for person in sample.people]),
        np.stack([person.keypoints for person in sample.people]),
        sample.parsing,
        sample.label_set,
    )


def test_mild_is_judged_with_matched_colours_or_without(erasers: dict[str, Eraser], case: Case) -> None:
    mild = erasers["mild"]
    assert isinstance(mild, MILDEraser)
    pipeline = mild.pipeline
    plain = MILDEraser(pipeline, steps=3, match_colours=False).erase(case, 0)
    given = {"pose": case.pose, "parsing": case.parsing, "label_set": case.label_set, "num_inference_steps": 3}
    expected = pipeline(
        case.image,
        list(case.masks),
        **given,
        margin=0,
        match_colours=False,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).image
    assert np.array_equal(plain[case.hole], expected[case.hole])
    assert not np.array_equal(plain, mild.erase(case, 0))


@pytest.mark.parametrize("method", METHODS)
def test_pixels_outside_the_mask_are_untouched_and_inside_are_filled(
    erasers: dict[str, Eraser], case: Case, method: str
) -> None:
    hole, before = case.hole, case.image.copy()
    result = erasers[method].erase(case, seed=0)
    assert (result.shape, result.dtype) == (before.shape, np.uint8)
    assert np.array_equal(result[~hole], before[~hole])
    assert (result[hole] != before[hole]).any(axis=1).mean() > 0.9
    assert np.array_equal(case.image, before)
    assert erasers[method].name == method


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_result(erasers: dict[str, Eraser], case: Case, method: str) -> None:
    first = erasers[method].erase(case, seed=5)
    erasers["mild"].erase(case, seed=6)
    assert np.array_equal(erasers[method].erase(case, seed=5), first)


@pytest.mark.parametrize("method", ["sdxl-inpaint", "mild"])
def test_another_seed_gives_another_result(erasers: dict[str, Eraser], case: Case, method: str) -> None:
    assert not np.array_equal(erasers[method].erase(case, seed=5), erasers[method].erase(case, seed=6))


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_mask_changes_nothing(erasers: dict[str, Eraser], case: Case, method: str) -> None:
    nobody = replace(case, masks=np.zeros_like(case.masks))
    assert np.array_equal(erasers[method].erase(nobody, seed=0), case.image)


@pytest.mark.parametrize("method", METHODS)
def test_masks_that_leave_no_background_are_refused(erasers: dict[str, Eraser], case: Case, method: str) -> None:
    with pytest.raises(UserError, match="masks cover the whole picture"):
        erasers[method].erase(replace(case, masks=np.ones_like(case.masks)), seed=0)


def test_unusable_input_is_named(case: Case) -> None:
    image, masks = case.image, case.masks
    for bad_image, bad_masks, named in [
        (image, masks[:, :-1], "masks are bool of shape"),
        (image, masks[0], "masks are bool of shape"),
        (image, masks.astype(np.uint8), "masks are uint8"),
        (image[..., 0], masks, "image is uint8 of shape"),
        (image / 255.0, masks, "image is float64"),
    ]:
        with pytest.raises(UserError, match=named):
            Case(bad_image, bad_masks)


@pytest.mark.parametrize("cue", ["pose", "parsing"])
def test_cues_reach_mild(erasers: dict[str, Eraser], case: Case, cue: str) -> None:
    without = replace(case, **{cue: None})
    assert not np.array_equal(erasers["mild"].erase(case, seed=0), erasers["mild"].erase(without, seed=0))


@pytest.mark.parametrize("method", ["telea", "navier-stokes"])
def test_classical_inpainting_continues_a_plain_colour(erasers: dict[str, Eraser], method: str) -> None:
    truth = np.full((30, 30, 3), (10, 120, 230), np.uint8)
    image, mask = truth.copy(), np.zeros((30, 30), bool)
    mask[10:20, 12:18] = True
    image[mask] = 255
    # Telea rounds.
    assert np.abs(erasers[method].erase(Case(image, mask[None]), seed=0).astype(int) - truth).max() <= 2


def test_what_is_under_the_mask_cannot_be_seen_by_mild(
    erasers: dict[str, Eraser], make_sample: Callable[..., Sample]
) -> None:
    """Two images that differ under the mask alone give one result."""
    sample = make_sample(2, height=64, width=64, people=1)
    mask, other = sample.people[0].mask, sample.image.copy()
    other[mask] = 255 - other[mask]
    first, second = (
        erasers["mild"].erase(replace(case_of(sample), image=image), seed=0) for image in (sample.image, other)
    )
    assert np.array_equal(first, second)


def test_mild_sees_everything_but_what_is_under_the_mask(erasers: dict[str, Eraser], case: Case) -> None:
    """No margin: a picture that differs in pixels beside the mask alone is filled differently."""
    beside = editable(case.masks, range(len(case.masks)), 0.001) & ~case.hole
    other = np.where(beside[..., None], 255 - case.image, case.image)
    first, second = (erasers["mild"].erase(replace(case, image=image), seed=0) for image in (case.image, other))
    assert not np.array_equal(first[case.hole], second[case.hole])


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
        strength=0.8,
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(9),
    ).images[0]
    expected = np.where(mask[..., None], np.asarray(picture), sample.image)
    found = erasers["sdxl-inpaint"].erase(Case(sample.image, mask[None]), seed=9)
    assert np.abs(found.astype(int) - expected).max() <= 1
