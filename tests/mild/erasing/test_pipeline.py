"""MILDPipeline on a tiny base of the true architecture: what is painted, what is left alone, and what is refused."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLInpaintPipeline,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

from dataset_tools.errors import UserError
from dataset_tools.folders import folder_written_whole
from dataset_tools.images import DecodeSettings, decode_image
from mild.erasing.photo import checked_photo
from mild.erasing.pipeline import Erased, MILDPipeline, as_ddim, most_steps, recompose
from mild.erasing.regions import MARGIN, cut_soft, editable
from mild.model.backbone import BRANCHES, adapter_parameters, load_base, precise_vae
from mild.model.cues import map_size
from mild.model.layered import LayeredUNet
from mild.model.leakage import measure_leakage
from mild.settings import HmgSettings, LoraSettings, MildSettings, OffsetSettings, PrefixSettings

STEPS = 2
EVERYTHING = MildSettings(
    lora=LoraSettings(rank=2, alpha=2),
    hmg=HmgSettings(grid=2, width=8, map_side=32),
    offsets=OffsetSettings(spatial_offset=True, boundary_smoothing=True),
    prefix=PrefixSettings(tokens=2),
)


def with_every_part(pipeline: MILDPipeline) -> LayeredUNet:
    """Adds every part to the pipeline's UNet, none of them neutral."""
    layered = LayeredUNet.create(pipeline.unet, EVERYTHING, seed=0)
    generator = torch.Generator().manual_seed(1)
    trained = [p for branch in BRANCHES for p in adapter_parameters(pipeline.unet, branch).values()]
    trained += [p for part in layered.parts().values() for p in part.parameters()]
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    layered.project_()
    return layered


@pytest.fixture(scope="module")
def mild_folder(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MILD directory with every part, none of them neutral."""
    layered = with_every_part(MILDPipeline.from_pretrained(tiny_base))
    folder = tmp_path_factory.mktemp("mild") / "folder"
    with folder_written_whole(folder, "mild.json") as place:
        layered.save(place, base=tiny_base, resolution=64, inference_steps=4, record={})
    return folder


@pytest.fixture(scope="module")
def pipe(tiny_base: str, mild_folder: Path) -> MILDPipeline:
    pipeline = MILDPipeline.from_pretrained(tiny_base, mild=mild_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def base_alone(tiny_base: str) -> MILDPipeline:
    pipeline = MILDPipeline.from_pretrained(tiny_base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def photo(height: int = 90, width: int = 120, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def box(height: int, width: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def people(height: int = 90, width: int = 120) -> list[np.ndarray]:
    """Two who overlap, and one apart."""
    rows = height // 4, 3 * height // 4
    places = [(0.1, 0.3), (0.2, 0.4), (0.7, 0.85)]
    return [box(height, width, *rows, int(a * width), int(b * width)) for a, b in places]


def erase(pipe: MILDPipeline, image: Any, masks: Any, *, seed: int = 0, **options: Any) -> Any:
    """By masks alone, unless told otherwise: the heads of these models say anything."""
    options = {"reach": None} | options
    options = {"num_inference_steps": STEPS, "output_type": "np", "generator": torch.manual_seed(seed)} | options
    return pipe(image, masks, **options)


def branches_run(pipe: MILDPipeline, *given: Any, **options: Any) -> list[tuple[str, int]]:
    """Branch and rows of every batch that a call runs."""
    assert pipe.layered is not None
    with mock.patch.object(pipe.layered, "branch", wraps=pipe.layered.branch) as branch:
        erase(pipe, *given, **options)
    return [(call.args[0], len(call.args[1])) for call in branch.call_args_list]


@pytest.mark.slow
@settings(max_examples=12)
@given(
    height=st.integers(3, 150),
    width=st.integers(3, 150),
    remove=st.sets(st.integers(0, 1)),
    layers=st.booleans(),
    margin=st.sampled_from([0, MARGIN, 0.3]),
    data=st.data(),
)
def test_pixels_outside_the_refined_mask_come_back_bit_identical(
    base_alone: MILDPipeline,
    height: int,
    width: int,
    remove: set[int],
    layers: bool,
    margin: float,
    data: st.DataObject,
) -> None:
    image, masks = photo(height, width), []
    for _ in range(2):
        top, left = data.draw(st.integers(0, height // 2)), data.draw(st.integers(0, width // 2))
        masks.append(box(height, width, top, top + 1 + height // 4, left, left + 1 + width // 4))
    wide = editable(np.stack(masks), sorted(remove), margin)
    assume(not wide.all())
    options = {"remove": sorted(remove), "layers": layers, "margin": margin}
    result = erase(base_alone, image, masks, **options, num_inference_steps=1)
    assert result.image.shape == image.shape
    assert np.array_equal(result.image[~result.removed], image[~result.removed])
    assert np.array_equal(result.background[~result.parts.painted], image[~result.parts.painted])
    gone = np.logical_or.reduce([masks[k] for k in remove]) if remove else np.zeros((height, width), bool)
    kept = np.logical_or.reduce([masks[k] for k in (0, 1) if k not in remove] or [np.zeros_like(gone)])
    assert result.removed[gone & ~kept].all() and not (result.removed & ~wide).any()


def test_what_the_network_paints_is_what_stands_in_the_hole(base_alone: MILDPipeline) -> None:
    """A UNet that always answers with the latent of one known picture (x_0): the hole shows what that decodes to."""
    truth, mask = photo(128, 128, seed=1), box(128, 128, 40, 80, 50, 70)
    assert base_alone.scheduler.config.prediction_type == "sample"
    latent = base_alone._encode(truth[None], base_alone.device)
    to_the_end = DDIMScheduler.from_config(base_alone.scheduler.config, set_alpha_to_one=True)
    with (
        mock.patch.object(base_alone, "scheduler", to_the_end),
        mock.patch.object(base_alone.unet, "forward", return_value=(latent,)),
    ):
        result = erase(base_alone, photo(128, 128), [mask], match_colours=False)
    with torch.no_grad():
        decoded = base_alone.vae.decode(latent / base_alone.vae.config.scaling_factor).sample[0]
    expected = base_alone.image_processor.pt_to_numpy(decoded[None] / 2 + 0.5)[0].clip(0, 1) * 255
    assert np.abs(result.image - expected)[mask].max() <= 1


@pytest.mark.parametrize("wanted", [True, False])
def test_colours_are_matched_in_the_background_alone_and_only_if_wanted(pipe: MILDPipeline, wanted: bool) -> None:
    with mock.patch("mild.erasing.pipeline.colours_matched", side_effect=lambda painted, *_: np.zeros_like(painted)):
        result = erase(pipe, photo(), people(), layers=True, match_colours=wanted)
    everybody = np.logical_or.reduce(people())
    assert (result.background[everybody] == 0).all() == wanted
    hidden = people()[0] & people()[1]
    assert result.layers[0][hidden, :3].any(), "painted by the foreground branch"


def test_the_unet_is_asked_as_a_stock_pipeline_asks_it(tiny_base: str, base_alone: MILDPipeline) -> None:
    """Text, pooled text, size and crop, mask and first time step: equal to those of the stock inpainting pipeline."""
    image = photo(128, 128)
    mask = box(128, 128, 32, 96, 40, 88)
    hole = editable(mask[None], [0])
    asked: list[tuple[Any, Any]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        asked.append((args, kwargs))

    stock = StableDiffusionXLInpaintPipeline.from_pretrained(tiny_base, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    hooks = [unet.register_forward_pre_hook(note, with_kwargs=True) for unet in (stock.unet, base_alone.unet)]
    try:
        erase(base_alone, image, [mask], prompt="a street", negative_prompt="a person", guidance_scale=3.0)
        stock(
            prompt="a street", negative_prompt="a person", image=Image.fromarray(image),
            mask_image=Image.fromarray(hole.astype(np.uint8) * 255), height=128, width=128, strength=1.0,
            num_inference_steps=STEPS, guidance_scale=3.0,
        )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    (our_args, ours), (stock_args, theirs) = asked[0], asked[STEPS]
    channels = base_alone.vae.config.latent_channels
    assert int(our_args[1]) == int(stock_args[1])
    assert our_args[0].shape == stock_args[0].shape
    assert torch.equal(our_args[0][:, channels], stock_args[0][:, channels])
    assert torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    for name in ("text_embeds", "time_ids"):
        assert torch.equal(ours["added_cond_kwargs"][name], theirs["added_cond_kwargs"][name])


@pytest.mark.parametrize("margin", [0, MARGIN])
def test_nothing_of_a_person_reaches_the_background_branch(pipe: MILDPipeline, margin: float) -> None:
    """Two photographs that differ in the people alone give one background."""
    image, masks = photo(), people()
    other = image.copy()
    other[np.logical_or.reduce(masks)] = 255 - other[np.logical_or.reduce(masks)]
    first, second = (erase(pipe, picture, masks, margin=margin) for picture in (image, other))
    core = np.logical_or.reduce(masks)
    assert np.array_equal(first.background[core], second.background[core])


@pytest.mark.slow
def test_nothing_of_those_who_go_reaches_a_foreground_branch(base_alone: MILDPipeline) -> None:
    """What is painted of person 0, whom two others hide, does not depend on the pixels of those who go."""
    image, masks = photo(), [*people(), box(90, 120, 30, 50, 20, 60)]
    for gone, options in ((masks[1] | masks[3], {"layers": True}), (masks[1] & ~masks[3], {"remove": [1]})):
        other = image.copy()
        other[gone] = 255 - other[gone]
        first, second = (erase(base_alone, picture, masks, **options).layers[0] for picture in (image, other))
        assert np.array_equal(first, second) and (first[masks[0] & masks[1] & ~masks[3]][:, 3] == 255).all()


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(pipe: MILDPipeline) -> None:
    first, again, other = (erase(pipe, photo(), people(), seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)


def test_erasing_everybody_runs_the_background_branch_alone(pipe: MILDPipeline) -> None:
    assert {name for name, _ in branches_run(pipe, photo(), people())} == {"bg"}


def test_a_foreground_branch_runs_for_somebody_whom_the_erased_one_hid(pipe: MILDPipeline) -> None:
    """Person 1 stands in front of person 0: when 1 goes, what it hid of 0 has to be painted; not the other way."""
    assert branches_run(pipe, photo(), people(), remove=[1]) == [("bg", 1), ("fg", 1)]
    assert branches_run(pipe, photo(), people(), remove=[0]) == [("bg", 1)]
    assert branches_run(pipe, photo(), people(), remove=[0], order=[1, 0, 2]) == [("bg", 1), ("fg", 1)]


def test_backgrounds_are_painted_at_the_resolution_of_erasing_and_people_at_that_of_training(
    pipe: MILDPipeline,
) -> None:
    """A smaller one that is asked for holds for both."""
    layered = pipe.layered
    assert layered is not None

    def sides(**options: Any) -> dict[str, tuple[int, int]]:
        with mock.patch.object(layered, "branch", wraps=layered.branch) as branch:
            erase(pipe, photo(192, 192), people(192, 192), remove=[1], **options)
        return {call.args[0]: tuple(call.args[1].shape[-2:]) for call in branch.call_args_list}

    with mock.patch.object(layered, "inference_resolution", 128):
        assert sides() == {"bg": (96, 96), "fg": (64, 64)}, "a window of 192 pixels is halved"
    with mock.patch.object(layered, "inference_resolution", 80):
        assert sides() == {"bg": (80, 80), "fg": (64, 64)}, "as far as is allowed"
    assert sides(resolution=32) == {"bg": (32, 32), "fg": (32, 32)}


@contextlib.contextmanager
def believing(pipe: MILDPipeline, **where: np.ndarray) -> Iterator[None]:
    """Let the heads of a branch say what the mask says, in windows that are the whole picture."""

    def likely(jobs: list[Any]) -> list[np.ndarray]:
        return [
            cut_soft(where[job.branch], job.region) if job.branch in where else np.zeros(job.region.size, np.float32)
            for job in jobs
        ]

    with mock.patch.object(pipe, "_likely", likely):
        yield


def test_whoever_touches_somebody_who_goes_is_completed_where_the_model_sees_them(pipe: MILDPipeline) -> None:
    """Masks that do not overlap: person 0 goes on behind person 1, half as far as 1 hides."""
    image, masks = photo(), [box(90, 120, 20, 70, 20, 40), box(90, 120, 20, 70, 40, 70)]
    behind, far = box(90, 120, 30, 60, 40, 55), box(90, 120, 75, 85, 20, 40)
    with believing(pipe, fg=behind | far):
        result = erase(pipe, image, masks, remove=[1], reach=2, margin=0)
    alpha = result.layers[0][..., 3]
    assert (alpha[masks[0]] == 255).all() and not alpha[far].any(), "beyond those who go nobody is completed"
    inside, outside = box(90, 120, 32, 58, 40, 53), box(90, 120, 20, 70, 57, 70)
    assert (alpha[inside] > 200).all() and not alpha[outside].any()
    assert np.array_equal(result.image[outside], result.background[outside])
    assert np.abs(result.image[inside].astype(int) - result.layers[0][inside][:, :3]).max() <= 55
    assert np.array_equal(result.image[~masks[1]], image[~masks[1]])
    apart = [masks[0], box(90, 120, 20, 70, 60, 70)]
    assert branches_run(pipe, image, apart, remove=[1], reach=2) == [("bg", 1)]
    assert branches_run(pipe, image, masks, remove=[1]) == [("bg", 1)], "masks alone know of nothing hidden"


def test_what_somebody_left_behind_goes_with_them_and_with_nobody_else(pipe: MILDPipeline) -> None:
    """Two people with a shadow each, and a stain that hangs together with nobody."""
    image, masks = photo(), [box(90, 120, 20, 50, 20, 40), box(90, 120, 20, 50, 80, 100)]
    shadows, stain = [box(90, 120, 50, 58, 20, 60), box(90, 120, 50, 58, 80, 118)], box(90, 120, 75, 85, 40, 60)
    with believing(pipe, bg=shadows[0] | shadows[1] | stain):
        one = erase(pipe, image, masks, remove=[0], reach=3)
        both = erase(pipe, image, masks, layers=True, reach=3)
        near = erase(pipe, image, masks, remove=[0], reach=0.2)
    assert one.removed[shadows[0]].mean() > 0.9 and not one.removed[stain | shadows[1] | masks[1]].any()
    assert np.array_equal(one.image[~one.removed], image[~one.removed])
    assert both.removed[shadows[0] | shadows[1]].mean() > 0.9
    kept = recompose(both, keep=[1])
    assert np.array_equal(kept[shadows[1]], image[shadows[1]]), "who stays keeps their shadow"
    assert np.array_equal(kept[shadows[0]], both.background[shadows[0]])
    columns = np.flatnonzero(near.removed.any(0))
    assert columns.max() < 55, "a fifth of the square root of 600 pixels, from column 40 on"


def test_nobody_is_completed_where_those_who_go_are_far_from_them(pipe: MILDPipeline) -> None:
    """Person 0 touches person 1, who goes; person 2 goes too, in another window."""
    image = photo(80, 600)
    masks = [box(80, 600, 20, 60, left, left + 20) for left in (30, 50, 540)]
    with believing(pipe):
        result = erase(pipe, image, masks, remove=[1, 2], reach=2)
    assert not result.layers[0][:, 300:, 3].any()
    assert np.array_equal(result.image[masks[2]], result.background[masks[2]])


def test_masks_alone_are_followed_where_nobody_asks_the_model(pipe: MILDPipeline) -> None:
    image, masks = photo(), people()
    with believing(pipe, bg=np.ones((90, 120), bool), fg=np.ones((90, 120), bool)):
        result = erase(pipe, image, masks, remove=[1], reach=None)
    assert np.array_equal(result.removed, editable([masks[1]], [0]) & ~(masks[0] & ~masks[1]))


def test_all_foreground_branches_of_a_picture_run_as_one_batch(pipe: MILDPipeline) -> None:
    stack = [box(90, 120, 20, 70, 20 + 12 * k, 44 + 12 * k) for k in range(4)]
    assert branches_run(pipe, photo(), stack, layers=True) == [("bg", 1), ("fg", 3)]


def test_nothing_runs_when_nobody_is_to_vanish(pipe: MILDPipeline) -> None:
    result = erase(pipe, photo(), people(), remove=[])
    assert branches_run(pipe, photo(), people(), remove=[]) == []
    assert np.array_equal(result.image, photo()) and not result.removed.any()


def test_what_was_hidden_is_painted_and_what_was_seen_is_the_photograph(pipe: MILDPipeline) -> None:
    image, masks = photo(), people()
    result = erase(pipe, image, masks, layers=True)
    hidden = masks[0] & masks[1]
    assert np.array_equal(result.layers[0][..., 3] > 0, masks[0])
    assert np.array_equal(result.layers[0][masks[0] & ~hidden][:, :3], image[masks[0] & ~hidden])
    assert (result.layers[0][hidden][:, :3] != image[hidden]).any(-1).mean() > 0.9
    kept = erase(pipe, image, masks, remove=[1])
    assert np.array_equal(kept.image[hidden], kept.layers[0][hidden][:, :3])


def test_any_combination_can_be_made_from_complete_layers(pipe: MILDPipeline) -> None:
    """Eq. 2: keeping all gives the photograph, keeping nobody the background, and PIL comes back as PIL."""
    image, masks = photo(), people()
    result: Erased = erase(pipe, Image.fromarray(image), masks, layers=True, remove=[1], output_type="pil")
    assert np.array_equal(np.asarray(recompose(result, keep=[0, 1, 2])), image)
    assert np.array_equal(np.asarray(recompose(result, keep=[])), np.asarray(result.background))
    assert np.array_equal(np.asarray(recompose(result, keep=[0, 2])), np.asarray(result.image))
    partial = erase(pipe, image, masks, remove=[1])
    with pytest.raises(UserError, match="layers=True"):
        recompose(partial, keep=[1])


def test_people_far_apart_get_a_window_each_in_one_batch(pipe: MILDPipeline) -> None:
    height, width = 80, 600
    masks = [box(height, width, 30, 50, left, left + 12) for left in (40, 540)]
    image = photo(height, width)
    assert branches_run(pipe, image, masks) == [("bg", 2)]
    together, apart = (erase(pipe, image, masks, batch_size=size) for size in (8, 1))
    assert np.abs(together.image.astype(int) - apart.image.astype(int)).max() <= 1
    alone = erase(pipe, image, masks, remove=[0])
    assert np.array_equal(alone.image[:, 300:], image[:, 300:])
    # The first window's noise comes first, so it is what it was.
    assert np.abs(alone.image[:, :300].astype(int) - together.image[:, :300].astype(int)).max() <= 1


@pytest.mark.parametrize("scheduler", [DDPMScheduler, LCMScheduler])
def test_with_a_scheduler_that_adds_noise_too_a_window_is_the_same_whatever_is_beside_it(
    pipe: MILDPipeline, monkeypatch: pytest.MonkeyPatch, scheduler: Any
) -> None:
    height, width = 80, 600
    masks = [box(height, width, 30, 50, left, left + 12) for left in (40, 540)]
    monkeypatch.setattr(pipe, "scheduler", scheduler.from_config(pipe.scheduler.config))
    erased = [erase(pipe, photo(height, width), masks, batch_size=size).image.astype(int) for size in (8, 1)]
    other = erase(pipe, photo(height, width), masks, seed=1).image.astype(int)
    assert np.abs(erased[0] - erased[1]).max() <= 1 < np.abs(erased[0] - other).max()


def test_a_batch_of_pictures_of_any_sizes_gives_what_each_gives_alone(pipe: MILDPipeline) -> None:
    sizes = [(90, 120), (64, 64), (120, 90)]
    images, masks = [photo(*size) for size in sizes], [people(*size) for size in sizes]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    batch = erase(pipe, images, masks, generator=generators, remove=[[0], None, [1, 2]])
    for seed, (image, mask, remove, result) in enumerate(zip(images, masks, [[0], None, [1, 2]], batch, strict=True)):
        alone = erase(pipe, image, mask, seed=seed, remove=remove)
        assert np.array_equal(alone.removed, result.removed)
        assert np.abs(alone.image.astype(int) - result.image.astype(int)).max() <= 1


def test_guidance_and_prompt_have_an_effect(pipe: MILDPipeline) -> None:
    results = [
        erase(pipe, photo(), people(), **options).image
        for options in (
            {},
            {"prompt": "grass"},
            {"guidance_scale": 4.0},
            {"guidance_scale": 4.0, "negative_prompt": "a"},
        )
    ]
    assert len({result.tobytes() for result in results}) == 4


def test_adapters_erase_with_the_prompt_that_they_were_trained_on_unless_another_is_given(
    tiny_base: str, mild_folder: Path, pipe: MILDPipeline, tmp_path: Path
) -> None:
    shutil.copytree(mild_folder, folder := tmp_path / "trained")
    config = json.loads((folder / "mild.json").read_text())
    (folder / "mild.json").write_text(json.dumps(config | {"prompt": "grass"}))
    trained = MILDPipeline.from_pretrained(tiny_base, mild=folder)
    trained.set_progress_bar_config(disable=True)
    trained.save_pretrained(tmp_path / "saved")
    assert 'prompt "grass"' in (tmp_path / "saved/README.md").read_text()
    again = MILDPipeline.from_pretrained(tiny_base, mild=tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    grass, nothing = (erase(pipe, photo(), people(), prompt=prompt).image for prompt in ("grass", ""))
    assert not np.array_equal(grass, nothing)
    for one in (trained, again):
        assert np.array_equal(erase(one, photo(), people()).image, grass)
    assert np.array_equal(erase(trained, photo(), people(), prompt="").image, nothing)
    assert np.array_equal(erase(pipe, photo(), people()).image, nothing)


def test_each_cue_has_an_effect(pipe: MILDPipeline) -> None:
    pose = np.concatenate([np.random.default_rng(0).uniform(20, 80, (3, 18, 2)), np.ones((3, 18, 1))], -1)
    parsing = (np.logical_or.reduce(people()) * 5).astype(np.uint8)
    results = [
        erase(pipe, photo(), people(), **cues).image
        for cues in ({}, {"pose": pose}, {"parsing": parsing}, {"parsing": parsing, "label_set": "atr"})
    ]
    assert len({result.tobytes() for result in results}) == 4


def test_cues_are_drawn_where_the_window_shows_them(pipe: MILDPipeline) -> None:
    """A nose in the middle of a person who stands in the middle of a window: its map peaks in the middle."""
    assert pipe.layered is not None
    height, width = 80, 600
    masks = [box(height, width, 35, 45, 543, 549)]
    pose = np.zeros((1, 18, 3))
    pose[0, 0] = [545.5, 39.5, 1]
    with mock.patch.object(pipe.layered, "branch", wraps=pipe.layered.branch) as branch:
        erase(pipe, photo(height, width), masks, pose=pose)
    nose = branch.call_args.kwargs["pose"].maps[0, 0].numpy()
    row, column = np.unravel_index(nose.argmax(), nose.shape)
    rows, columns = map_size((64, 64), pipe.layered.hmg.settings)
    assert nose.shape == (rows, columns)
    assert abs(row - rows / 2) <= 1.5 and abs(column - columns / 2) <= 1.5


def test_protected_people_and_faces_stay_as_they_are(pipe: MILDPipeline) -> None:
    """Person 1 goes and reaches over person 0, who stays: without protection the overlap is painted anew."""
    image, masks = photo(), people()
    overlap = masks[0] & masks[1]
    assert erase(pipe, image, masks, remove=[1]).removed[overlap].all()
    safe = erase(pipe, image, masks, remove=[1], protect="people")
    assert np.array_equal(safe.image[masks[0]], image[masks[0]])
    parsing = np.zeros((90, 120), np.uint8)
    face = overlap & (np.arange(90)[:, None] < 35)
    parsing[face] = 13
    safe = erase(pipe, image, masks, remove=[1], protect="faces", parsing=parsing)
    assert np.array_equal(safe.image[face], image[face]) and safe.removed[overlap & ~face].any()


def test_the_schedule_becomes_ddim_that_does_not_clip_latents(tiny_base: str, tmp_path: Path) -> None:
    """SDXL bases come with Euler; DDIM made from that must keep its noise levels and must not clip x_0."""
    stock = StableDiffusionXLInpaintPipeline.from_pretrained(tiny_base, add_watermarker=False)
    euler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    stock.scheduler = euler
    stock.save_pretrained(tmp_path / "base")
    scheduler = MILDPipeline.from_pretrained(str(tmp_path / "base")).scheduler
    assert isinstance(scheduler, DDIMScheduler) and not scheduler.config.clip_sample
    assert torch.equal(scheduler.alphas_cumprod, euler.alphas_cumprod)
    given = MILDPipeline.from_pretrained(str(tmp_path / "base"), scheduler=euler).scheduler
    assert isinstance(given, EulerDiscreteScheduler)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_run_and_are_deterministic(base_alone: MILDPipeline, kind: Any) -> None:
    scheduler = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    with mock.patch.object(base_alone, "scheduler", scheduler):
        first, again = (erase(base_alone, photo(), people(), num_inference_steps=3) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert np.isfinite(first.image).all() and first.removed.any()


def test_a_saved_pipeline_loads_again_with_the_same_result(pipe: MILDPipeline, tiny_base: str, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "copy")
    again = MILDPipeline.from_pretrained(tiny_base, mild=tmp_path / "copy")
    assert again.resolutions == (64, 64)
    assert np.array_equal(erase(again, photo(), people()).image, erase(pipe, photo(), people()).image)


@pytest.mark.slow
def test_half_precision_runs_and_the_vae_is_lifted_where_it_overflows(tiny_base: str, mild_folder: Path) -> None:
    pipeline = MILDPipeline.from_pretrained(tiny_base, mild=mild_folder, dtype=torch.bfloat16)
    assert pipeline.unet.dtype == torch.bfloat16
    assert erase(pipeline, photo(), people()).removed.any()
    pipeline.to(dtype=torch.float16)
    pipeline.vae.register_to_config(force_upcast=True)
    with precise_vae(pipeline.vae):
        assert pipeline.vae.dtype == torch.float32
    assert pipeline.vae.dtype == torch.float16


@pytest.mark.slow
def test_a_compiled_unet_and_vae_tiling_pass_through(tiny_base: str, mild_folder: Path, pipe: MILDPipeline) -> None:
    pipeline = MILDPipeline.from_pretrained(tiny_base, mild=mild_folder)
    pipeline.vae.enable_tiling()
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    # One window, as each of another shape is traced anew.
    compiled, plain = (erase(p, photo(), people()[:1]).image for p in (pipeline, pipe))
    assert np.abs(compiled.astype(int) - plain.astype(int)).max() <= 1


def test_parts_that_are_offloaded_come_back_for_their_turn(
    tiny_base: str, mild_folder: Path, pipe: MILDPipeline
) -> None:
    """accelerate's hooks move each model for its forward pass; here from and to the one device that there is."""
    pipeline = MILDPipeline.from_pretrained(tiny_base, mild=mild_folder)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(erase(pipeline, photo(), people()).image, erase(pipe, photo(), people()).image)


@pytest.mark.slow
def test_leakage_is_measured_in_every_block_and_step_of_a_run(nano_base: str) -> None:
    pipe = MILDPipeline.from_pretrained(nano_base)
    pipe.layered = with_every_part(pipe)
    assert pipe.layered is not None and pipe.layered.sma is not None
    mask = torch.from_numpy(people()[0])[None, None].float()
    with measure_leakage(pipe.unet, mask) as records:
        erase(pipe, photo(), people()[:1])
    blocks = pipe.layered.sma.blocks()
    assert len(blocks) > 1
    assert {(record.step, record.block) for record in records} == {(s, b) for s in range(STEPS) for b in blocks}
    assert len(records) == STEPS * len(blocks)
    # SMA was in use, and pushed attention out of the foreground.
    assert min(float(record.contraction.min()) for record in records) < 0.99


def test_a_model_is_uploaded_to_the_hub_as_it_is_saved(pipe: MILDPipeline) -> None:
    def uploaded(folder: str, repo_id: str, **_: Any) -> str:
        files = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}
        assert files >= {"mild.json", "README.md", "sma.safetensors", "fg/pytorch_lora_weights.safetensors"}
        return f"https://hub/{repo_id}"

    with mock.patch("mild.erasing.pipeline.push_to_hub", uploaded):
        assert pipe.push_to_hub("me/mild") == "https://hub/me/mild"


def test_what_is_asked_of_an_upload_is_done_or_refused(pipe: MILDPipeline, tmp_path: Path) -> None:
    with mock.patch("mild.model.layered.HfApi") as hub:
        pipe.push_to_hub("me/mild", create_pr=True, commit_message="Try this")
    asked = hub.return_value.upload_folder.call_args.kwargs
    assert (asked["create_pr"], asked["commit_message"]) == (True, "Try this")
    with pytest.raises(UserError, match="push_to_hub does not know branch"):
        pipe.push_to_hub("me/mild", branch="dev")
    for option in ({"push_to_hub": True}, {"variant": "fp16"}, {"safe_serialization": False}):
        with pytest.raises(UserError, match="save_pretrained does not know"):
            pipe.save_pretrained(tmp_path / "saved", **option)


def test_somebody_wholly_behind_people_who_stay_cannot_be_erased(pipe: MILDPipeline) -> None:
    """But together with whoever is in front."""
    behind, front, *_ = box(90, 120, 30, 50, 30, 45), box(90, 120, 25, 60, 25, 50)
    with pytest.raises(UserError, match=r"person 1 .* is wholly behind people who stay"):
        erase(pipe, photo(), [behind, front], remove=[0])
    assert erase(pipe, photo(), [behind, front], remove=[0], order=[1, 0]).removed.any()
    assert erase(pipe, photo(), [behind, front], remove=[0, 1]).removed.any()


@pytest.mark.parametrize("margin", [1e308, 1e30])
def test_a_margin_beyond_all_bounds_reaches_over_the_picture(pipe: MILDPipeline, margin: float) -> None:
    with pytest.raises(UserError, match="cover the whole picture"):
        erase(pipe, photo(), people(), margin=margin)
    assert np.isfinite(erase(pipe, photo(), people(), reach=margin).image.astype(float)).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_unusual_pictures_give_a_sensible_result(base_alone: MILDPipeline, mode: str) -> None:
    """Gray, alpha, palette, CMYK, black and white: the result is RGB, equal to the picture outside the hole."""
    image = Image.fromarray(photo()).convert(mode)
    result = erase(base_alone, image, people(), output_type="pil")
    assert result.image.mode == "RGB" and result.image.size == image.size
    if mode != "RGBA":
        outside = ~np.asarray(result.removed, bool)
        assert np.array_equal(np.asarray(result.image)[outside], np.asarray(image.convert("RGB"))[outside])


def test_masks_may_be_pictures_bytes_or_shares(pipe: MILDPipeline) -> None:
    mask = people()[0]
    forms = [mask, mask * np.uint8(255), mask.astype(np.uint8), mask.astype(np.float32), Image.fromarray(mask)]
    results = {erase(pipe, photo(), [form]).image.tobytes() for form in forms}
    assert len(results) == 1


def turned(array: np.ndarray, code: int, kind: str = "PNG") -> Image.Image:
    """A file with an EXIF orientation, opened: its pixels are those of the array, what viewers show is turned."""
    exif = Image.Exif()
    exif[0x0112] = code
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, exif=exif)
    return Image.open(buffer)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("code", range(1, 9))
def test_a_turned_picture_and_its_masks_meet_upright(pipe: MILDPipeline, code: int, kind: str) -> None:
    """Masks may be upright, have an orientation of their own or, where their shape tells, be stored as the picture."""
    stored, mask = photo(), people()[0]
    image = np.asarray(ImageOps.exif_transpose(turned(stored, code)))
    upright = np.asarray(ImageOps.exif_transpose(turned(mask * np.uint8(255), code))) > 0
    expected = erase(pipe, image, [upright], num_inference_steps=1)
    forms: list[Any] = [upright, Image.fromarray(upright), turned(mask * np.uint8(255), code, kind)]
    for form in [*forms, mask] if code >= 5 else forms:
        result = erase(pipe, turned(stored, code, kind), [form], num_inference_steps=1)
        assert np.array_equal(result.image, expected.image)


def test_masks_are_read_as_the_command_reads_files(pipe: MILDPipeline) -> None:
    """An only mask may hold several people; of several masks each is one person, and that is said."""
    first, _, third = people()
    index = first * np.uint8(3) + third * np.uint8(200)
    colour, alpha = np.zeros((90, 120, 3), np.uint8), np.zeros((90, 120, 4), np.uint8)
    colour[first], alpha[first, 3] = (0, 0, 255), 255
    for masks, remove, expected in (
        ([index], [1], third),
        ([Image.fromarray(index)], [0], first),
        ([Image.fromarray(colour)], None, first),
        ([alpha], None, first),
    ):
        with warnings.catch_warnings(record=True):
            result = erase(pipe, photo(), masks, remove=remove, margin=0, num_inference_steps=1)
        assert np.array_equal(result.removed, expected)
    with pytest.warns(UserWarning, match="mask 0: its 2 values are taken together"):
        result = erase(pipe, photo(), [index, box(90, 120, 2, 12, 2, 12)], remove=[0], margin=0, num_inference_steps=1)
    assert np.array_equal(result.removed, first | third)


FULL, EMPTY = np.ones((90, 120), bool), np.zeros((90, 120), bool)


def test_a_photographs_profile_and_resolution_go_with_its_pixels(pipe: MILDPipeline, tmp_path: Path) -> None:
    """Without the profile that its numbers are of, all of a picture would be shown in other colours."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(photo()).save(tmp_path / "photo.png", icc_profile=profile, dpi=(300, 150))
    with Image.open(tmp_path / "photo.png") as image:
        result = erase(pipe, image, people(), layers=True, output_type="pil", num_inference_steps=1)
    result.image.save(tmp_path / "result.png")
    result.parts.save(tmp_path / "layers")
    recompose(result, [0]).save(tmp_path / "again.png")
    for name in ("result.png", "again.png", "layers/original.png", "layers/background.png", "layers/layer-01.png"):
        with Image.open(tmp_path / name) as saved:
            assert saved.info["icc_profile"] == profile, name
    assert all(layer.info["icc_profile"] == profile for layer in result.layers)
    assert result.image.info["dpi"] == pytest.approx((300, 150), abs=0.1)


def test_a_profile_of_other_pixels_is_followed_or_left_out_and_never_kept(icc_profiles: dict[str, bytes]) -> None:
    """Pillow keeps a picture's profile when it converts its pixels."""
    asked = dict.fromkeys(("remove", "order", "pose", "parsing", "generator", "protect"))
    read = functools.partial(checked_photo, masks=people(), label_set="none", layers=False, margin=MARGIN, **asked)
    grey = Image.fromarray(photo()).convert("L")
    grey.info["icc_profile"] = icc_profiles["grey"]
    found = read(grey)
    buffer = io.BytesIO()
    grey.save(buffer, "PNG", icc_profile=icc_profiles["grey"])
    assert np.array_equal(found.image, decode_image(buffer.getvalue(), DecodeSettings(min_side=1)).image)
    assert found.icc_profile is None
    for mode, name, why in (("RGB", "grey", "one of GRAY colours"), ("L", "srgb", "one of RGB colours")):
        other = Image.fromarray(photo()).convert(mode)
        other.info["icc_profile"] = icc_profiles[name]
        with pytest.warns(UserWarning, match=why):
            assert read(other).icc_profile is None


def test_a_generator_for_the_only_picture_may_stand_in_a_list(pipe: MILDPipeline) -> None:
    one, listed = torch.Generator().manual_seed(3), [torch.Generator().manual_seed(3)]
    results = [erase(pipe, photo(), people(), generator=each, num_inference_steps=1).image for each in (one, listed)]
    assert np.array_equal(*results)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"masks": []}, "no mask is given"),
        ({"masks": [people()[0], EMPTY]}, "mask 1 is empty"),
        ({"masks": [np.ones((9, 9), bool)]}, r"mask 0 is of shape \(9, 9\), the picture \(90, 120\)"),
        ({"masks": [FULL]}, "cover the whole picture"),
        ({"masks": [~people()[2]], "margin": 0}, r"person 1 \(index 0\): 92% of the picture would go; is the mask"),
        ({"masks": people()[0]}, "masks is a single mask: give a list"),
        ({"masks": np.dstack([people()[0]] * 3)}, "masks is a single mask: give a list"),
        ({"masks": Image.fromarray(people()[0])}, "masks is a single mask: give a list"),
        ({"masks": ["mask.png"]}, "mask 0: a str: give a PIL image or an array"),
        ({"masks": [photo()]}, "mask 0: it has several colours without hard edges"),
        ({"remove": [3]}, "remove names person 3, but there are masks 0 to 2 only"),
        ({"remove": [-1]}, "remove names person -1"),
        ({"remove": [1, 1]}, "remove names one person twice"),
        ({"remove": [True, False, False]}, r"remove is \[True, False, False\]: give indices of people"),
        ({"remove": np.array([False, True, False])}, "remove is .*: give indices of people"),
        ({"remove": [0.9]}, r"remove is \[0.9\]: give indices"),
        ({"remove": 1}, "remove is 1: give indices"),
        ({"order": [0, 1, True]}, "order is .*: give indices"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "generator has 2 entries for one picture"),
        ({"order": [0, 0, 1]}, "name each of 0 to 2 once"),
        ({"pose": np.zeros((2, 18, 3))}, r"pose is of shape \(2, 18, 3\); give \(3, 18, 3\)"),
        ({"pose": np.where(np.arange(3) == 0, np.inf, np.ones((3, 18, 3)))}, "pose holds joints that are no numbers"),
        ({"pose": np.where(np.arange(3) == 0, 1e200, np.ones((3, 18, 3)))}, "or far away from the picture"),
        ({"pose": np.full((3, 18, 3), "left")}, "pose holds something else than numbers"),
        ({"parsing": np.zeros((3, 3), np.uint8)}, "parsing is uint8 of shape"),
        ({"parsing": np.full((90, 120), 30, np.uint8)}, "holds label 30"),
        ({"parsing": np.zeros((90, 120), np.uint8), "label_set": "coco"}, "label_set 'coco' is not known"),
        ({"image": np.zeros((90, 120, 3), np.float32)}, "give .H, W, 3. uint8"),
        ({"image": "photo.jpg"}, "the picture is a str"),
        ({"image": Image.fromarray(np.zeros((90, 120), np.uint16))}, "more than 8 bits"),
        ({"image": photo(1, 1), "masks": [np.ones((1, 1), bool)]}, "cover the whole picture"),
        ({"image": [photo(), photo()], "masks": [people()]}, "masks has 1 entries for 2 pictures"),
        ({"image": [photo(), photo()], "masks": [people(), [EMPTY]]}, "picture 1: mask 0 is empty"),
        ({"image": [], "masks": []}, "no picture is given"),
        ({"margin": -1.0}, "margin is -1.0"),
        ({"protect": "bodies"}, "protect is 'bodies': give faces or people"),
        ({"protect": "faces", "remove": [1]}, "faces are found by pose or parsing"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001: give 1 to 1000"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(pipe: MILDPipeline, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        erase(pipe, **{"image": photo(), "masks": people(), **change})


def test_the_mask_of_an_only_person_is_taken_by_diffusers_name(pipe: MILDPipeline) -> None:
    mask = Image.fromarray(people()[0])
    expected = erase(pipe, photo(), [mask]).image
    assert np.array_equal(erase(pipe, photo(), None, mask_image=mask).image, expected)
    assert np.array_equal(erase(pipe, [photo()], None, mask_image=[mask], generator=[torch.manual_seed(0)]).images[0],
                          expected)  # fmt: skip
    with pytest.raises(UserError, match="give one of them"):
        erase(pipe, photo(), [mask], mask_image=mask)


def test_results_have_images_as_those_of_stock_pipelines(pipe: MILDPipeline) -> None:
    one = erase(pipe, photo(), people(), num_inference_steps=1)
    assert one.images[0] is one.image is one[0][0] is one["images"][0]
    two = erase(pipe, [photo(), photo(64, 64)], [people(), people(64, 64)], num_inference_steps=1)
    assert [image.shape for image in two.images] == [(90, 120, 3), (64, 64, 3)]


def test_tensors_are_the_picture_in_shares(pipe: MILDPipeline) -> None:
    arrays, tensors = (erase(pipe, photo(), people(), remove=[1], output_type=kind) for kind in ("np", "pt"))
    assert tensors.image.dtype == torch.float32 and torch.equal(tensors.removed, torch.from_numpy(arrays.removed))
    assert np.array_equal((tensors.image.permute(1, 2, 0) * 255).round().numpy(), arrays.image)
    assert np.array_equal((tensors.layers[0].permute(1, 2, 0) * 255).round().numpy(), arrays.layers[0])
    assert torch.equal(recompose(tensors, keep=[0, 2]), tensors.image)


def test_embeddings_stand_in_for_the_prompts_that_they_are_of(pipe: MILDPipeline) -> None:
    words = {"prompt": "grass", "negative_prompt": "a person"}
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = dict(zip(names, pipe.encode_prompt(**words), strict=True))
    by_words, by_embeds = (erase(pipe, photo(), people(), guidance_scale=3.0, **text) for text in (words, embeds))
    assert np.array_equal(by_words.image, by_embeds.image)


def test_embeddings_are_taken_to_the_device(base_alone: MILDPipeline) -> None:
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = dict(zip(names, base_alone.encode_prompt("grass"), strict=True))
    for guidance in (1.0, 3.0):
        text = base_alone._encode_text(None, "", dict(embeds), guidance, torch.device("meta"))
        assert [given.device.type for given in text] == ["meta", "meta"]


def test_a_callback_can_change_and_end_guidance(pipe: MILDPipeline) -> None:
    """By the attribute that diffusers' own examples set; of each window alone."""
    seen = list[float]()

    def end(of: Any, number: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        seen.append(of.guidance_scale)
        of._guidance_scale = 1.0

    def second(scale: float, callback: Any) -> np.ndarray:
        noise = [torch.Generator().manual_seed(number) for number in range(2)]
        options = {"guidance_scale": scale, "callback_on_step_end": callback, "batch_size": 1, "generator": noise}
        image: np.ndarray = erase(pipe, [photo()] * 2, [people()[:1]] * 2, **options).images[1]
        return image

    ended, whole, none = second(4.0, end), second(4.0, None), second(1.0, None)
    assert seen == [4.0, 1.0] * 2
    assert not np.array_equal(ended, whole) and not np.array_equal(ended, none)


def test_all_steps_of_a_schedule_that_begins_at_one_are_one_less(base_alone: MILDPipeline) -> None:
    """SDXL's own: the first of a thousand would be beyond the last that it was trained on."""
    euler = EulerDiscreteScheduler.from_config(base_alone.scheduler.config, timestep_spacing="leading", steps_offset=1)
    ddim = as_ddim(euler)
    ddim.set_timesteps(most_steps(ddim))
    assert int(ddim.timesteps.max()) < ddim.config.num_train_timesteps
    pipeline = MILDPipeline.from_pipe(base_alone, scheduler=ddim)
    with pytest.raises(UserError, match="num_inference_steps is 1000: give 1 to 999"):
        erase(pipeline, photo(), people(), num_inference_steps=1000)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"mask_image": people()[0]}, "mask_image: give a list of 2 masks"),
        ({"mask_image": Image.fromarray(people()[0])}, "mask_image: give a list of 2 masks"),
        ({"mask_image": [people()[0]]}, "mask_image: give a list of 2 masks"),
        ({"masks": Image.fromarray(people()[0])}, "masks is a Image: give a list, of one a picture"),
        ({"masks": people()[0]}, "masks has 90 entries for 2 pictures: give one a picture"),
        ({"remove": 0, "masks": [people()] * 2}, "remove is a int: give a list, of one a picture"),
        ({"pose": [[[1, 2], [3]], None], "masks": [people()] * 2}, "pose holds something else than numbers"),
    ],
)
def test_what_belongs_to_several_pictures_is_a_list(pipe: MILDPipeline, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        erase(pipe, [photo(), photo(seed=1)], change.pop("masks", None), generator=None, **change)


def test_what_belongs_to_several_pictures_may_be_stacked(pipe: MILDPipeline) -> None:
    images, masks = [photo(), photo(seed=1)], np.stack([people()[:1]] * 2)
    given = {"generator": None, "num_inference_steps": 1}
    for options in ({"masks": masks, "remove": np.zeros((2, 1), int)}, {"mask_image": torch.from_numpy(masks[:, 0])}):
        torch.manual_seed(0)
        erased = erase(pipe, images, options.pop("masks", None), **options, **given)
        assert all(one.removed.any() for one in erased)


def test_a_stock_argument_that_has_its_default_changes_nothing(pipe: MILDPipeline) -> None:
    given = {"crops_coords_top_left": (0, 0), "eta": 0.0}
    assert np.array_equal(erase(pipe, photo(), people(), **given).image, erase(pipe, photo(), people()).image)


def test_a_callback_sees_every_step_and_may_change_the_latents(pipe: MILDPipeline) -> None:
    seen: list[tuple[int, int, tuple[int, ...]]] = []

    def look(of: Any, number: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert of is pipe and set(tensors) == {"latents"}
        seen.append((number, int(t), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    result = erase(pipe, photo(), people()[:1], callback_on_step_end=look, match_colours=False)
    assert [number for number, _, _ in seen] == [0, 1] and seen[0][1] > seen[1][1]
    with torch.no_grad():
        blank = pipe.vae.decode(torch.zeros(seen[0][2])).sample[0]
    colour = (blank[:, 8:-8, 8:-8].mean((1, 2)) / 2 + 0.5).clamp(0, 1) * 255
    assert np.abs(result.image[people()[0]].mean(0) - colour.numpy()).max() < 4


def test_a_callback_can_end_the_denoising(pipe: MILDPipeline) -> None:
    def stop(of: MILDPipeline, number: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        of._interrupt = True

    with mock.patch.object(pipe.unet, "forward", wraps=pipe.unet.forward) as forward:
        erase(pipe, photo(), people(), num_inference_steps=9, callback_on_step_end=stop)
        assert forward.call_count == 1
        erase(pipe, photo(), people())
        assert forward.call_count == 1 + STEPS


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"height": 1024, "width": 1024}, "height: windows are as large as resolution says"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt: call again with another generator"),
        ({"strength": 0.5}, "strength: holes are always painted anew"),
        ({"ip_adapter_image": photo()}, "ip_adapter_image: MILD has no use for it"),
        ({"output_type": "latent"}, "output_type is 'latent': give pil, np or pt"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "names prompt_embeds: only latents can be had"),
        ({"prompt": ["grass"]}, "prompt is a list: give one text"),
        ({"prompt_embeds": torch.zeros(1, 77, 64)}, "go together"),
        (
            {"prompt": "grass", "prompt_embeds": torch.zeros(1, 77, 64), "pooled_prompt_embeds": torch.zeros(1, 32)},
            "say the same",
        ),
        (
            {"prompt_embeds": torch.zeros(2, 77, 64), "pooled_prompt_embeds": torch.zeros(2, 32)},
            r"prompt_embeds are \(2, 77, 64\)",
        ),
    ],
)
def test_what_stock_pipelines_take_and_this_does_not_is_refused_with_the_reason(
    pipe: MILDPipeline, change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        erase(pipe, photo(), people(), **change)
    assert isinstance(caught.value, UserError)


def test_defaults_of_stock_arguments_pass_and_names_that_nobody_knows_do_not(pipe: MILDPipeline) -> None:
    erase(pipe, photo(), people(), remove=[], height=None, num_images_per_prompt=1, return_dict=True, eta=0.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'hight'"):
        erase(pipe, photo(), people(), hight=3)


def test_attention_is_neither_sliced_nor_fused_but_the_vae_may_be(tiny_base: str, mild_folder: Path) -> None:
    pipeline = MILDPipeline.from_pretrained(mild_folder)
    before = erase(pipeline, photo(), people()).image
    with pytest.raises(UserError, match="enable_attention_slicing"):
        pipeline.enable_attention_slicing()
    with pytest.raises(UserError, match="unet=False"):
        pipeline.fuse_qkv_projections()
    pipeline.disable_attention_slicing()
    pipeline.fuse_qkv_projections(unet=False)
    after = erase(pipeline, photo(), people()).image
    assert np.abs(after.astype(int) - before.astype(int)).max() <= 1


def test_a_style_that_was_loaded_beside_the_branches_changes_what_they_paint(
    tiny_base: str, mild_folder: Path, tmp_path: Path
) -> None:
    """By its weight: at 0 nothing, and at once as much as with that weight in the file."""
    stock = StableDiffusionXLInpaintPipeline.from_pretrained(tiny_base, add_watermarker=False)
    stock.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_out.0", "to_q"]))
    for name, parameter in stock.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.manual_seed(0))
    for folder, factor in (("whole", 1.0), ("half", 0.5)):
        state = {k: v * (factor if "lora_B" in k else 1) for k, v in get_peft_model_state_dict(stock.unet).items()}
        stock.save_lora_weights(tmp_path / folder, unet_lora_layers=state)
    results = {}
    for folder, weight in (("whole", 0.0), ("whole", 0.5), ("half", 1.0)):
        pipeline = MILDPipeline.from_pretrained(mild_folder)
        pipeline.load_lora_weights(str(tmp_path / folder), adapter_name="style")
        pipeline.set_adapters(["bg", "style"], [1.0, weight])
        results[folder, weight] = erase(pipeline, photo(), people(), remove=[1]).image.astype(int)
    plain = erase(MILDPipeline.from_pretrained(mild_folder), photo(), people(), remove=[1]).image.astype(int)
    assert np.abs(results["whole", 0.0] - plain).max() <= 1
    assert np.abs(results["whole", 0.5] - results["half", 1.0]).max() <= 1
    assert np.abs(results["whole", 0.5] - plain).max() > 5


def test_a_mild_directory_is_loaded_with_the_base_that_it_names(mild_folder: Path, pipe: MILDPipeline) -> None:
    pipeline = MILDPipeline.from_pretrained(mild_folder)
    assert pipeline.base == pipe.base
    assert np.array_equal(erase(pipeline, photo(), people()).image, erase(pipe, photo(), people()).image)
    with pytest.raises(UserError, match="is a MILD directory and no base"):
        MILDPipeline.from_pretrained(mild_folder, mild=mild_folder)


def test_a_base_that_a_mild_directory_names_and_that_is_elsewhere_is_said(mild_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(mild_folder, tmp_path / "mild")
    config = tmp_path / "mild" / "mild.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base": "/no/such/base"}))
    with pytest.raises(UserError, match=r"/no/such/base does not exist.*from_pretrained\(base, mild=\.\.\.\)"):
        MILDPipeline.from_pretrained(tmp_path / "mild")


def test_parts_that_were_trained_on_another_base_are_loaded_with_a_warning(
    tiny_base: str, mild_folder: Path, tmp_path: Path
) -> None:
    """The base itself is known again wherever it lies and in half precision."""
    pipeline = load_base(tiny_base)
    pipeline.save_pretrained(tmp_path / "copy", variant="fp16")
    torch.nn.init.normal_(pipeline.unet.conv_in.weight, generator=torch.manual_seed(0))
    for parameter in pipeline.unet.parameters():
        parameter.data *= 1.05
    pipeline.save_pretrained(tmp_path / "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            MILDPipeline.from_pretrained(tmp_path / "copy", mild=mild_folder, variant="fp16", dtype=dtype)
    with pytest.warns(UserWarning, match=f"trained on another base than this one, {tiny_base}"):
        MILDPipeline.from_pretrained(tmp_path / "other", mild=mild_folder)


def test_a_variant_is_loaded_as_stock_pipelines_load_it(tiny_base: str, mild_folder: Path, tmp_path: Path) -> None:
    load_base(tiny_base, dtype=torch.float16).save_pretrained(tmp_path / "base", variant="fp16")
    pipeline = MILDPipeline.from_pretrained(tmp_path / "base", mild=mild_folder, variant="fp16", dtype=torch.float16)
    expected = load_base(tiny_base).unet.conv_in.weight.half()
    assert torch.equal(pipeline.unet.conv_in.weight, expected)
    with pytest.raises(UserError, match="cannot be loaded"):
        MILDPipeline.from_pretrained(tmp_path / "base", mild=mild_folder)


def test_a_pipeline_that_is_loaded_becomes_one_that_erases(
    tiny_base: str, mild_folder: Path, pipe: MILDPipeline
) -> None:
    stock = StableDiffusionXLInpaintPipeline.from_pretrained(tiny_base, dtype=torch.bfloat16, add_watermarker=False)
    stock.vae.float()
    pipeline = MILDPipeline.from_pipe(stock, mild=mild_folder)
    assert pipeline.unet is stock.unet and pipeline.unet.dtype == torch.bfloat16 and pipeline.vae.dtype == torch.float32
    assert isinstance(pipeline.scheduler, DDIMScheduler) and pipeline.base == tiny_base
    exact = MILDPipeline.from_pipe(
        StableDiffusionXLInpaintPipeline.from_pretrained(tiny_base, add_watermarker=False), mild=mild_folder
    )
    assert np.array_equal(erase(exact, photo(), people()).image, erase(pipe, photo(), people()).image)
    with pytest.raises(UserError, match="has MILD's parts already"):
        MILDPipeline.from_pipe(exact, mild=mild_folder)
    assert MILDPipeline.from_pipe(exact).layered is exact.layered


def test_a_pipeline_over_another_knows_its_base_and_working_size(pipe: MILDPipeline, tmp_path: Path) -> None:
    begun = MILDPipeline.from_pipe(pipe)
    begun.working_resolutions = (32, 64)
    again = MILDPipeline.from_pipe(begun)
    assert (again.base, again.working_resolutions) == (pipe.base, (32, 64)) and pipe.base
    with pytest.raises(UserError, match=r"does not know torch_dtype: weights are shared"):
        MILDPipeline.from_pipe(pipe, torch_dtype=torch.bfloat16)
    again.base = ""
    with pytest.raises(UserError, match="without its base"):
        again.save_pretrained(tmp_path / "saved")


def test_a_stock_pipeline_is_given_milds_parts_once(tiny_base: str, mild_folder: Path) -> None:
    stock = load_base(tiny_base)
    MILDPipeline.from_pipe(stock, mild=mild_folder)
    with pytest.raises(UserError, match="has MILD's parts already"):
        MILDPipeline.from_pipe(stock, mild=mild_folder)


def test_a_resolution_that_is_none_is_left_out(base_alone: MILDPipeline, tmp_path: Path) -> None:
    image = Image.fromarray(photo())
    image.info["dpi"] = (TiffImagePlugin.IFDRational(0, 0), TiffImagePlugin.IFDRational(0, 0))
    result = erase(base_alone, image, people(), output_type="pil", layers=True)
    assert "dpi" not in result.image.info
    result.parts.save(tmp_path / "layers")


def test_what_is_saved_replaces_what_was_and_nothing_of_somebody_else(pipe: MILDPipeline, tmp_path: Path) -> None:
    """Such as the clone of a repository on the hub."""
    for _ in range(2):
        pipe.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/.git").mkdir()
    with pytest.raises(UserError, match=r"\.git"):
        pipe.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/.git").exists()


def test_a_base_alone_has_nothing_to_save(base_alone: MILDPipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="base alone"):
        base_alone.save_pretrained(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_interrupted_before_a_batch_its_holes_stay_unfinished_and_nobody_is_followed(pipe: MILDPipeline) -> None:
    """The second window's batch takes no step, of which the heads could say something."""
    image, masks = photo(80, 600), [box(80, 600, 30, 50, left, left + 12) for left in (40, 540)]

    def stop(of: MILDPipeline, *_: Any) -> dict[str, Any]:
        of._interrupt = True
        return {}

    result = erase(pipe, image, masks, reach=2, batch_size=1, callback_on_step_end=stop)
    assert np.array_equal(result.removed, editable(np.stack(masks), [0, 1]))
