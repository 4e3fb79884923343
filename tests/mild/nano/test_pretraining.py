"""Training of the nano base at toy size, on plain pictures that are quickly learned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from dataset_tools.errors import UserError
from mild.bases import digest_of_place
from mild.erasing.pipeline import MILDPipeline
from mild.erasing.regions import prefilled
from mild.nano.architecture import build_nano_pipeline
from mild.nano.export import export_base
from mild.nano.pictures import DrawingSettings, Pictures
from mild.nano.pretraining import STORED, _standardise, encode_examples, take_vae, train_unet, train_vae
from mild.nano.settings import LoopSettings, PretrainSettings, UnetSettings, VaeSettings

pytestmark = pytest.mark.slow

TOY = PretrainSettings(
    drawing=DrawingSettings(scenes=3, crops=2, held_out=2, side=32),
    vae=VaeSettings(steps=16, batch_size=2, learning_rate=4e-3, warm_up=2, crop=32, checkpoint_every=8),
    unet=UnetSettings(
        steps=9, batch_size=4, learning_rate=3e-3, warm_up=2, holes=2, checkpoint_every=4, average=0.5, compile=False
    ),
    mixed_precision="no",
)


def quiet(stage: str, step: int, loss: float) -> None:
    pass


class Killed(Exception):
    """Stands for a process that ends at once."""


def kill_at(stage: str, step: int) -> object:
    def log(now: str, done: int, loss: float) -> None:
        if (now, done) == (stage, step):
            raise Killed

    return log


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two-coloured pictures, in the files that drawing writes."""
    folder = tmp_path_factory.mktemp("toy") / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    plain = np.broadcast_to(rng.integers(40, 216, (8, 1, 1, 3), np.uint8), (8, 32, 32, 3)).copy()
    plain[:, 16:] //= 2
    np.save(folder / "pictures.npy", plain[:6])
    np.save(folder / "held_out.npy", plain[6:])
    np.save(folder / "outlines.npy", np.packbits(np.eye(32, dtype=bool)[None], axis=-1))
    (folder / "captions.json").write_text(json.dumps(["a room with one person"] * 6))
    return folder


@pytest.fixture(scope="module")
def work(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is trained, in one folder: vae, examples, trained."""
    place = tmp_path_factory.mktemp("work")
    train_vae(TOY, pictures, place / "vae", quiet)
    encode_examples(TOY, pictures, place / "vae", place / "examples", quiet)
    train_unet(TOY, pictures, place / "vae", place / "examples", place / "trained", quiet)
    return place


@pytest.fixture(scope="module")
def exported(pictures: Path, work: Path) -> Path:
    export_base(
        TOY,
        pictures,
        work / "vae",
        work / "trained",
        work / "base",
        data_digest="0123abcd",
        command="mild pretrain toy.yaml",
        judgement="Its pictures mean nothing.",
        scenes=1,
        steps=2,
    )
    return work / "base"


def losses(folder: Path, name: str) -> np.ndarray:
    return np.loadtxt(folder / f"{name}.csv", delimiter=",", skiprows=1)[:, 1]


@pytest.mark.parametrize(("stage", "name"), [("vae", "loss-vae"), ("trained", "loss-unet")])
def test_the_loss_falls_and_every_step_is_written_down(work: Path, stage: str, name: str) -> None:
    curve = losses(work / stage, name)
    assert len(curve) == {"vae": TOY.vae.steps, "trained": TOY.unet.steps}[stage]
    assert curve[-4:].mean() < 0.8 * curve[:4].mean()
    assert (work / stage / f"{name}.svg").read_text().startswith("<svg")


def test_latents_of_the_trained_vae_are_standardised(work: Path, pictures: Path) -> None:
    vae = AutoencoderKL.from_pretrained(work / "vae")
    data = torch.from_numpy(Pictures.open(pictures).pictures.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        flat = vae.encode(data).latent_dist.mode().transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(4), atol=2e-3, rtol=0)
    torch.testing.assert_close(flat.std(1), torch.ones(4), atol=2e-3, rtol=0)
    assert vae.config.scaling_factor == 1


def test_standardising_latents_does_not_change_what_is_decoded(work: Path, pictures: Path) -> None:
    vae = AutoencoderKL.from_pretrained(work / "vae")
    with torch.no_grad():
        vae.quant_conv.weight *= 3
        vae.quant_conv.bias += 2
    data = torch.from_numpy(Pictures.open(pictures).pictures.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(data).latent_dist.mode()).sample
        _standardise(vae, Pictures.open(pictures).pictures, TOY)
        after = vae.decode(vae.encode(data).latent_dist.mode()).sample
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)


def test_examples_are_the_latents_of_pictures_whole_and_with_their_holes(work: Path, pictures: Path) -> None:
    vae = AutoencoderKL.from_pretrained(work / "vae")
    latents, seen, starts, holes = (np.load(work / "examples" / f"{name}.npy") for name in STORED)
    assert (latents.shape, seen.shape, holes.shape) == ((6, 4, 8, 8), (6, 2, 4, 8, 8), (6, 2, 32, 4))
    image, bare = Pictures.open(pictures).pictures[3], np.unpackbits(holes[3, 1], axis=-1).view(bool)
    picture, fill = (
        torch.from_numpy(one.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1 for one in (image, prefilled(image, bare))
    )
    hole = torch.from_numpy(bare.astype(np.float32))
    with torch.no_grad():
        expected = vae.encode(torch.stack([picture, picture * (1 - hole), fill])).latent_dist.mode()
    torch.testing.assert_close(torch.from_numpy(latents[3]).float(), expected[0], atol=4e-3, rtol=1e-3)
    torch.testing.assert_close(torch.from_numpy(seen[3, 1]).float(), expected[1], atol=4e-3, rtol=1e-3)
    torch.testing.assert_close(torch.from_numpy(starts[3, 1]).float(), expected[2], atol=4e-3, rtol=1e-3)
    assert not np.array_equal(holes[3, 0], holes[3, 1])


@pytest.mark.parametrize(("share", "same"), [(0.0, True), (1.0, False)])
def test_examples_start_where_erasing_does_where_that_is_asked_for(
    work: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, same: bool
) -> None:
    """What the UNet is given at its first step: noised fills, at the time step that DDIM begins with, or neither."""
    given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def seen(self: UNet2DConditionModel, sample: torch.Tensor, timestep: torch.Tensor, *_: Any, **__: Any) -> None:
        given.append((sample.detach(), timestep))
        raise Killed

    shutil.copytree(work / "examples", tmp_path / "examples")
    fills = np.load(tmp_path / "examples" / "starts.npy", mmap_mode="r+")
    monkeypatch.setattr(UNet2DConditionModel, "forward", seen)
    settings = TOY.model_copy(update={"unet": TOY.unet.model_copy(update={"starts": share})})
    for added in (0, 1):
        fills += np.float16(added)
        fills.flush()
        with pytest.raises(Killed):
            train_unet(settings, pictures, work / "vae", tmp_path / "examples", tmp_path / "trained", quiet)
    (first, timesteps), (second, _) = given
    scheduler = build_nano_pipeline().scheduler
    scheduler.set_timesteps(4)
    assert (timesteps == scheduler.timesteps[0]).all() == (not same)
    alpha = scheduler.alphas_cumprod[-1]
    moved = torch.zeros_like(first[:, :4]) if same else alpha.sqrt().expand_as(first[:, :4])
    torch.testing.assert_close(second[:, :4] - first[:, :4], moved, atol=1e-3, rtol=0)


@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    work: Path, pictures: Path, tmp_path: Path, stage: str
) -> None:
    def run(log: object) -> None:
        if stage == "vae":
            train_vae(TOY, pictures, tmp_path / "again", log)  # type: ignore[arg-type]
        else:
            train_unet(TOY, pictures, work / "vae", work / "examples", tmp_path / "again", log)  # type: ignore[arg-type]

    with pytest.raises(Killed):
        run(kill_at(stage, 5 if stage == "unet" else 10))
    assert [path.name for path in tmp_path.iterdir()] == ["again.checkpoints"]
    done: list[int] = []
    run(lambda name, step, loss: done.append(step))
    assert done[0] == (5 if stage == "unet" else 9)  # the step after the checkpoint
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    before = work / ("vae" if stage == "vae" else "trained/unet")
    after = tmp_path / ("again" if stage == "vae" else "again/unet")
    name = "diffusion_pytorch_model.safetensors"
    expected, found = load_file(before / name), load_file(after / name)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_a_step_and_change_its_outcome_by_no_more_than_rounding(
    work: Path, pictures: Path, tmp_path: Path, threads: int
) -> None:
    """Among three of them, a batch of four is not shared equally."""
    found: list[float] = []

    def log(stage: str, step: int, loss: float) -> None:
        found.append(loss)
        if step == 4:
            raise Killed

    torch.set_num_threads(threads)
    try:
        with pytest.raises(Killed):
            train_unet(TOY, pictures, work / "vae", work / "examples", tmp_path / "trained", log)
    finally:
        torch.set_num_threads(1)
    np.testing.assert_allclose(found, losses(work / "trained", "loss-unet")[:4], rtol=2e-3)


def test_training_goes_on_from_a_base_and_its_vae_stays_as_it_is(
    work: Path, pictures: Path, exported: Path, tmp_path: Path
) -> None:
    """With a learning rate of nearly zero nothing moves; the VAE never does."""
    take_vae(str(exported), tmp_path / "vae")
    still = TOY.unet.model_copy(update={"steps": 2, "learning_rate": 1e-12})
    places = (tmp_path / "vae", work / "examples", tmp_path / "trained")
    train_unet(TOY.model_copy(update={"unet": still}), pictures, *places, quiet, str(exported))
    for file in (
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ):
        before, after = load_file(exported / file), load_file(tmp_path / "trained" / file)
        assert all(torch.allclose(before[key].float(), after[key], atol=1e-9, rtol=1e-6) for key in before), file


def test_a_checkpoint_from_another_base_is_refused_and_the_base_named(
    work: Path, pictures: Path, exported: Path, tmp_path: Path
) -> None:
    places = (work / "vae", work / "examples", tmp_path / "trained")
    often = TOY.model_copy(update={"unet": TOY.unet.model_copy(update={"checkpoint_every": 1})})
    with pytest.raises(Killed):
        train_unet(often, pictures, *places, kill_at("unet", 2))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"base: null there, .*{digest_of_place(str(exported))}"):
        train_unet(often, pictures, *places, quiet, str(exported))


def test_a_base_of_another_architecture_is_refused_and_its_part_named(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "other")
    place = tmp_path / "other/scheduler/scheduler_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"prediction_type": "epsilon"}))
    with pytest.raises(UserError, match=r"other is not of the nano .* \(its scheduler\): give mild-nano"):
        take_vae(str(tmp_path / "other"), tmp_path / "vae")
    assert not (tmp_path / "vae").exists()


def test_the_card_of_a_base_that_was_trained_further_names_where_it_started(
    work: Path, pictures: Path, tmp_path: Path
) -> None:
    what = {"data_digest": "0123abcd", "command": "mild pretrain", "base": ("mild-nano", "89abcdef")}
    export_base(TOY, pictures, work / "none", work / "trained", tmp_path / "base", **what, scenes=1, steps=1)  # type: ignore[arg-type]
    card = (tmp_path / "base/README.md").read_text()
    assert "Started from `mild-nano`, digest `89abcdef`" in card
    assert "loss-vae" not in card
    assert not (tmp_path / "base/loss-vae.csv").exists()


def test_a_checkpoint_of_other_settings_is_refused_and_the_setting_named(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train_vae(TOY, pictures, tmp_path / "vae", kill_at("vae", 9))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        train_vae(TOY.model_copy(update={"seed": 1}), pictures, tmp_path / "vae", quiet)


def test_a_checkpoint_of_other_pictures_is_refused_and_they_are_named(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "pictures")
    with pytest.raises(Killed):
        train_vae(TOY, tmp_path / "pictures", tmp_path / "vae", kill_at("vae", 9))  # type: ignore[arg-type]
    np.save(tmp_path / "pictures/pictures.npy", 255 - np.load(pictures / "pictures.npy"))
    with pytest.raises(UserError, match=f"pictures: .* there, .*{digest_of_place(str(tmp_path / 'pictures'))}"):
        train_vae(TOY, tmp_path / "pictures", tmp_path / "vae", quiet)


def test_a_checkpoint_of_another_vaes_latents_is_refused_and_the_vae_named(
    work: Path, pictures: Path, tmp_path: Path
) -> None:
    often = TOY.model_copy(update={"unet": TOY.unet.model_copy(update={"checkpoint_every": 1})})
    places = (work / "examples", tmp_path / "trained")
    with pytest.raises(Killed):
        train_unet(often, pictures, work / "vae", *places, kill_at("unet", 2))  # type: ignore[arg-type]
    take_vae("mild-nano", tmp_path / "vae")
    with pytest.raises(UserError, match=f"vae of the latents: .* there, .*{digest_of_place(str(tmp_path / 'vae'))}"):
        train_unet(often, pictures, tmp_path / "vae", *places, quiet)


def test_the_text_encoders_and_the_unet_are_trained(work: Path) -> None:
    """Of the encoders, what reaches the UNet: the first one's last layer and norm do not."""
    first = StableDiffusionXLInpaintPipeline.from_pretrained(work / "trained")
    from mild.nano.pretraining import _first_pipeline

    untrained = _first_pipeline(TOY.seed)
    for name, unused in (
        ("unet", ()),
        ("text_encoder", (".layers.1.", "final_layer_norm")),
        ("text_encoder_2", ()),
    ):
        before = dict(getattr(untrained, name).named_parameters())
        after = dict(getattr(first, name).named_parameters())
        same = {key for key in before if torch.equal(before[key], after[key])}
        assert all(any(part in key for part in unused) for key in same if before[key].ndim > 1), same


def test_a_loss_that_is_not_finite_stops_the_run_with_what_to_do(pictures: Path, tmp_path: Path) -> None:
    wild = TOY.model_copy(update={"vae": TOY.vae.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(UserError, match=r"vae is (nan|inf) at step \d+: lower vae.learning_rate"):
        train_vae(wild, pictures, tmp_path / "vae", quiet)
    assert not (tmp_path / "vae").exists()


def test_gradients_that_are_not_finite_never_reach_the_weights(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a finite loss that has an infinite slope."""
    monkeypatch.setattr(
        "torch.autograd.grad", lambda loss, weights, **_: tuple(torch.full_like(p, torch.nan) for p in weights)
    )
    with pytest.raises(UserError, match=r"gradients of the vae is nan at step 1: lower vae.learning_rate"):
        train_vae(TOY, pictures, tmp_path / "vae", quiet)
    assert not (tmp_path / "vae").exists()


def test_the_learning_rate_rises_stays_and_falls() -> None:
    settings = LoopSettings(steps=100, learning_rate=2.0, warm_up=10, decay=0.25)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:75] == pytest.approx([2.0] * 66)
    assert rates[99] == pytest.approx(0.08)
    assert np.diff(rates[75:]).max() < 0


def test_the_export_is_small_half_precision_and_has_a_card(exported: Path) -> None:
    files = [path for path in exported.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".txt", ".md", ".csv", ".svg", ".png"}
    assert sum(path.stat().st_size for path in files) <= 25e6
    kinds = {
        tensor.dtype
        for path in files
        if path.suffix == ".safetensors"
        for tensor in load_file(path).values()
        if tensor.is_floating_point()
    }
    assert kinds == {torch.float16}
    card = (exported / "README.md").read_text()
    for part in ("mild pretrain toy.yaml", "Seed 0", "0123abcd", "16 steps", "9 steps", "mean nothing", "dB"):
        assert part in card


def test_the_stock_pipeline_and_mild_run_the_export(exported: Path) -> None:
    image, mask = Image.new("RGB", (64, 64), (90, 120, 30)), np.zeros((64, 64), bool)
    mask[20:40, 20:40] = True
    stock = StableDiffusionXLInpaintPipeline.from_pretrained(exported, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    hole = Image.fromarray(mask.astype(np.uint8) * 255)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.0}
    assert stock("a park", image=image, mask_image=hole, **options).images[0].size == (64, 64)
    mild = MILDPipeline.from_pretrained(str(exported))
    mild.set_progress_bar_config(disable=True)
    result = mild(image, [mask], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    outside = np.asarray(result.removed) == 0
    assert np.array_equal(np.asarray(result.image)[outside], np.asarray(image)[outside])
