from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torchvision.transforms.functional import to_tensor

from dataset_tools.errors import UserError
from mild.evaluation.methods import Case, Setup
from mild.evaluation.methods.osor import OSOREraser, OSORMethod, install
from mild.evaluation.methods.sdxl import scaled_case
from mild.model.backbone import load_base

MODULES = "to_k, to_q, to_v, to_out.0, conv, conv1, conv2, conv_shortcut, proj_in, proj_out, ff.net.2, ff.net.0.proj"
CHECKPOINTS = [1, 2]


@pytest.fixture(scope="module")
def setup(nano_base: str) -> Setup:
    return Setup(base=nano_base, adapters="", inference_steps=2, prompt="a cat")


def checkpoint_of(unet: UNet2DConditionModel, phase: int) -> dict[str, torch.Tensor]:
    """A checkpoint as ``save_model_hook`` of OSOR's training writes it: what is trained, by its name."""
    generator = torch.nn.Module()
    generator.unet = unet
    with torch.random.fork_rng():
        torch.manual_seed(phase)
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=MODULES.split(", ")))
        if phase == 2:
            old, unet.conv_out = unet.conv_out, torch.nn.Conv2d(unet.conv_out.in_channels, 5, 3, padding=1)
            unet.conv_out.weight.data[:4], unet.conv_out.bias.data[:4] = old.weight, old.bias
        unet.conv_out.requires_grad_(True)
        for name, parameter in unet.named_parameters():
            if ".lora_B." in name or name.startswith("conv_out"):
                parameter.data += 0.05 * torch.randn(parameter.shape)
    return {name: p.detach().clone() for name, p in generator.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def tensors(nano_base: str) -> dict[int, dict[str, torch.Tensor]]:
    """Of both phases, for the nano base."""
    nano = partial(UNet2DConditionModel.from_pretrained, nano_base, subfolder="unet")
    return {phase: checkpoint_of(nano(), phase) for phase in CHECKPOINTS}


@pytest.fixture(scope="module")
def files(tensors: dict[int, dict[str, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("osor")
    for phase in CHECKPOINTS:
        torch.save(tensors[phase], folder / f"sdxlinpainting_phase{phase}.pth")
    return {phase: folder / f"sdxlinpainting_phase{phase}.pth" for phase in CHECKPOINTS}


@pytest.fixture(scope="module")
def erasers(setup: Setup, files: dict[int, Path]) -> dict[int, OSOREraser]:
    return {phase: method(files[phase]).open(setup) for phase in CHECKPOINTS}


@pytest.fixture
def case() -> Case:
    mask = np.zeros((1, 48, 64), bool)
    mask[0, 10:30, 12:38] = True
    return Case(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8), mask)


def method(file: Path, **settings: Any) -> OSORMethod:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return OSORMethod(**{"checkpoint": str(file), "sha256": digest, "resolution": 32} | settings)


@torch.no_grad()
def plainly(base: str, tensors: dict[str, torch.Tensor], case: Case, seed: int, model_t: int) -> np.ndarray:
    """``infer`` of ``inference_enhance.py`` and ``inference.py``, its LoRA merged by hand: W + B A."""
    pipeline = load_base(base)
    unet, vae = pipeline.unet, pipeline.vae
    weights = unet.state_dict()
    for key in tensors:
        if ".lora_A." in key:
            layer = key.removeprefix("unet.").replace(".lora_A.default", "")
            down, up = tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")]
            weights[layer] += (up.flatten(1) @ down.flatten(1)).reshape(weights[layer].shape)
    last = tensors["unet.conv_out.weight"], tensors["unet.conv_out.bias"]
    unet.conv_out = torch.nn.Identity()
    unet.load_state_dict({key: w for key, w in weights.items() if not key.startswith("conv_out")})

    image, hole = scaled_case(case, (32, 48))
    lq, mask = to_tensor(image)[None] * 2 - 1, to_tensor(hole)[None]
    generator = torch.Generator().manual_seed(seed)
    posterior = vae.encode(lq).latent_dist
    z_lq = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    z_lq = z_lq * vae.config.scaling_factor
    mask_latent = F.max_pool2d(mask, pipeline.vae_scale_factor)
    noise = torch.randn(z_lq.shape, generator=generator)
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    timesteps = torch.full((1,), model_t)
    z = scheduler.add_noise(z_lq, noise, timesteps)
    prompt_embeds, _, pooled, _ = pipeline.encode_prompt(
        "Remove the instance of object", do_classifier_free_guidance=False
    )
    time_ids = torch.tensor([[32.0, 48, 0, 0, 32, 48]])
    features = unet(
        torch.cat([z, mask_latent, z_lq], 1),
        timesteps,
        encoder_hidden_states=prompt_embeds,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
    ).sample
    output = F.conv2d(features, *last, padding=1)
    alpha = torch.sigmoid(output[:, 4:]) if output.shape[1] == 5 else mask_latent
    z_out = scheduler.step(output[:, :4], timesteps, z).pred_original_sample
    z_out = z_out * alpha + z_lq * (1 - alpha)
    x = (vae.decode(z_out / vae.config.scaling_factor).sample + 1) / 2
    return (x.clamp(0, 1)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


@pytest.mark.parametrize(("phase", "timestep"), [(1, 600), (2, 400)])
def test_one_step_is_that_of_the_published_code(
    phase: int,
    timestep: int,
    setup: Setup,
    tensors: dict[int, dict[str, torch.Tensor]],
    erasers: dict[int, OSOREraser],
    case: Case,
) -> None:
    image, hole = scaled_case(case, (32, 48))
    (found,) = erasers[phase].paint([image], [hole], [torch.Generator().manual_seed(5)])
    expected = plainly(setup.base, tensors[phase], case, 5, timestep)
    assert np.abs(np.asarray(found).astype(int) - expected).max() <= 1
    if phase == 2:  # and the LoRA alone makes a difference
        without = {key: torch.zeros_like(t) if ".lora_B." in key else t for key, t in tensors[2].items()}
        assert np.abs(plainly(setup.base, without, case, 5, timestep).astype(int) - expected).max() > 1


def test_pixels_outside_are_untouched_and_cases_do_not_depend_on_each_other(
    erasers: dict[int, OSOREraser], case: Case
) -> None:
    eraser = erasers[2]
    smaller = Case(case.image[:40], case.masks[:, :40])
    together = eraser.erase([case, smaller, case], [1, 2, 3])
    for one, result in zip([case, smaller, case], together, strict=True):
        assert np.array_equal(result[~one.hole], one.image[~one.hole])
        assert (result[one.hole] != one.image[one.hole]).any(1).mean() > 0.9
    (alone,) = eraser.erase([case], [3])
    assert np.abs(alone.astype(int) - together[2]).max() <= 1
    assert not np.array_equal(together[0], together[2])


def test_names_of_a_wrapped_generator_mean_the_same(make_unet: Callable[[], UNet2DConditionModel]) -> None:
    tensors, first, second = checkpoint_of(make_unet(), 2), make_unet(), make_unet()
    install(first, tensors, "checkpoint")
    install(second, {f"module._orig_mod.{key}": tensor for key, tensor in tensors.items()}, "checkpoint")
    weights, others = first.state_dict(), second.state_dict()
    assert weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)


def test_a_file_that_does_not_fit_the_base_is_refused_by_its_first_key(
    make_unet: Callable[[], UNet2DConditionModel],
) -> None:
    whole = checkpoint_of(make_unet(), 2)
    key = next(key for key in whole if ".lora_B." in key)
    for wrong, said in [
        ({k: t for k, t in whole.items() if k != key}, f"has no {key}"),
        (whole | {"unet.more.lora_A.default.weight": whole[key]}, "UNet has no unet.more.lora_A"),
        (whole | {key: whole[key][:-1]}, f"{key} is of shape"),
        (whole | {"unet.conv_out.weight": torch.zeros(7, 8, 3, 3)}, r"unet\.conv_out\.weight is of shape"),
        ({"weight": whole[key]}, "none of OSOR's"),
    ]:
        with pytest.raises(UserError, match=said):
            install(make_unet(), wrong, "checkpoint")


def test_a_pickle_is_read_as_tensors_alone_and_only_with_its_digest(
    setup: Setup, files: dict[int, Path], tmp_path: Path
) -> None:
    untrusted = OSORMethod(checkpoint=str(files[2]))
    assert "set sha256 to" in str(untrusted.missing(setup))
    with pytest.raises(UserError, match="set sha256 to"):
        untrusted.open(setup)
    (tmp_path / "program.pth").write_bytes(pickle.dumps({"unet.conv_out.weight": Path("/tmp")}, protocol=2))
    with pytest.raises(UserError, match="damaged, or holds more than tensors"):
        method(tmp_path / "program.pth").open(setup)


def test_what_is_not_here_is_said_with_what_to_do(setup: Setup, files: dict[int, Path], tmp_path: Path) -> None:
    assert "mild weights pull osor-sdxl-phase2" in str(OSORMethod().missing(setup))
    assert "no base is named" in str(method(files[2]).missing(Setup("", "", 2, "")))
    published = "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"
    assert "mild weights pull sdxl-inpainting" in str(method(files[2], base=published).missing(setup))
    assert method(files[2]).missing(setup) is None


def test_the_fingerprint_knows_the_weights_and_not_where_they_lie(
    setup: Setup, files: dict[int, Path], tmp_path: Path
) -> None:
    (tmp_path / "copy.pth").write_bytes(files[2].read_bytes())
    own = method(files[2]).fingerprint(setup)
    assert method(tmp_path / "copy.pth", name="another").fingerprint(setup) == own
    others = [method(files[1]), method(files[2], timestep=300), method(files[2], resolution=64)]
    assert len({own, *(other.fingerprint(setup) for other in others)}) == 4
    assert set(method(files[2]).weights(setup)) == {"base", "checkpoint"}
