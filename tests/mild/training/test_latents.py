"""Latents of fixed views: encoded once, read back by anybody, and trained on as if the VAE had run."""

from __future__ import annotations

import filecmp
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from safetensors.torch import load

from dataset_tools.errors import UserError
from dataset_tools.schema import EncodingSettings, Sample
from dataset_tools.shards import Manifest, ShardDataset, write_shard
from mild.model.backbone import BRANCHES, load_base
from mild.model.layered import LayeredUNet
from mild.settings import LATENTS_FORMAT, CropSettings, TrainSettings, WarmUpSettings
from mild.training.batches import draw_fixed_view
from mild.training.latents import Latents, encode_latents, encode_view
from mild.training.loop import BranchLoss, train
from mild.training.mixture import Mixture

pytestmark = pytest.mark.slow

SHARDS = ["composite/train-000000.tar", "composite/train-000001.tar", "real/train-000000.tar"]


def as_photograph(sample: Sample) -> Sample:
    """The sample as a photograph, of which nobody knows more than the people's masks."""
    people = [
        replace(person, augmented_mask=None, complete_mask=None, layer=None, order=None, occlusion=None)
        for person in sample.people
    ]
    return replace(sample, configuration="real", people=people, background=None)


@pytest.fixture(scope="module")
def datasets(make_sample: Callable[..., Sample], tmp_path_factory: pytest.TempPathFactory) -> list[ShardDataset]:
    """Three composites in two shards, and a photograph that has the key of one of them."""
    root = str(tmp_path_factory.mktemp("data"))
    drawn = [make_sample(index, height=32, width=40) for index in range(3)]
    contents = [drawn[:2], drawn[2:], [as_photograph(make_sample(0, height=32, width=40, people=3))]]
    shards = [
        write_shard(samples, root, path, EncodingSettings(image_format="png"), [])
        for path, samples in zip(SHARDS, contents, strict=True)
    ]
    held = {"composite": {"train": shards[:2]}, "real": {"train": shards[2:]}}
    manifest = Manifest(name="drawn", shards=held, files={}, source="", settings={}, software={})
    Path(root, "manifest.json").write_text(manifest.model_dump_json())
    return [ShardDataset(root, name, "train") for name in held]


@pytest.fixture(scope="module")
def fixed(quick: TrainSettings) -> TrainSettings:
    """Two views of each sample, which differ in everything that views can differ in."""
    changes = {"crop": CropSettings(smallest=0.8), "flip": 0.5, "resolution": 16, "cached_views": 2, "steps": 6}
    return quick.model_copy(update=changes)


@pytest.fixture(scope="module")
def encoded(
    datasets: list[ShardDataset], fixed: TrainSettings, tiny_base: str, tmp_path_factory: pytest.TempPathFactory
) -> str:
    folder = str(tmp_path_factory.mktemp("work") / "latents")
    encode_latents(fixed, datasets, tiny_base, "v", folder)
    return folder


def files(folder: str | Path) -> dict[str, bytes]:
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this should not be needed")


def test_training_on_stored_latents_gives_the_bytes_of_training_without_and_never_asks_the_vae(
    datasets: list[ShardDataset],
    fixed: TrainSettings,
    encoded: str,
    tiny_base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mixture = Mixture(dict(zip(("composite", "real"), datasets, strict=True)), {"composite": 3, "real": 1})
    one, other = tmp_path / "one", tmp_path / "other"
    train(fixed, mixture, tiny_base, str(one), lambda *_: None)
    monkeypatch.setattr("diffusers.AutoencoderKL.encode", never)
    train(fixed, mixture, tiny_base, str(other), lambda *_: None, latents=Latents(encoded, fixed))
    names = [name for name in files(one) if name.endswith((".safetensors", ".csv"))]
    assert len(names) == 6
    assert filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def test_plain_webdataset_reads_the_shards_and_finds_the_vaes_latents(
    datasets: list[ShardDataset], quick: TrainSettings, tiny_base: str, tmp_path: Path
) -> None:
    """Without crops and flips every picture is a square of the sample's: here one of nine."""
    settings = quick.model_copy(update={"cached_views": 3})
    encode_latents(settings, datasets[:1], tiny_base, "v", str(tmp_path))
    vae = load_base(tiny_base).vae
    found = list(webdataset.WebDataset([str(tmp_path / path) for path in SHARDS[:2]], shardshuffle=False))
    assert [row["__key__"] for row in found] == datasets[0].keys
    for row, sample in zip(found, datasets[0], strict=True):
        parts = sorted(name for name in row if not name.startswith("__"))
        assert parts == ["0.safetensors", "1.safetensors", "2.safetensors"]
        for part in parts:
            latents = load(row[part])
            assert {(tuple(latent.shape), latent.dtype) for latent in latents.values()} == {((4, 8, 8), torch.float32)}
            assert sample.background is not None
            plate = torch.from_numpy(sample.background / 127.5 - 1).permute(2, 0, 1).float()
            windows = torch.stack([plate[..., left : left + 32] for left in range(40 - 32 + 1)])
            with torch.no_grad():
                expected = vae.encode(windows).latent_dist.mean * vae.config.scaling_factor
            distances = (expected - latents["bg.picture"]).abs().amax((1, 2, 3))
            assert distances.min() < 1e-5


def test_a_step_sees_one_of_the_fixed_views_and_in_time_all_of_them(
    datasets: list[ShardDataset],
    fixed: TrainSettings,
    encoded: str,
    tiny_base: str,
    examples_of: Callable[..., Any],
) -> None:
    pipeline = load_base(tiny_base)
    layered = LayeredUNet.create(pipeline.unet, fixed.mild, seed=0)
    latents = pickle.loads(pickle.dumps(Latents(encoded, fixed)))  # as workers are given them
    loss = BranchLoss(pipeline, layered, fixed)
    for dataset in datasets:
        sample = dataset[0]
        views = [latents.read(sample, number) for number in range(2)]
        seen = set()
        for step in range(12):
            for examples in examples_of(loss, BRANCHES, [sample], step, latents):
                shown = [torch.equal(examples.shown[0, 1:], view[f"{examples.branch}.shown"]) for view in views]
                seen.add((examples.branch, shown.index(True)))
        assert len(seen) == 4
    layered.remove()


def test_no_more_pixels_are_encoded_at_once_than_is_said(
    datasets: list[ShardDataset], fixed: TrainSettings, encoded: str, tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four pictures of 16 x 16, three at a time."""
    vae, sizes = load_base(tiny_base).vae, []
    vae.encoder.register_forward_hook(lambda module, given, made: sizes.append(len(given[0])))
    monkeypatch.setattr("mild.training.latents.AT_ONCE", 16 * 16 * 3 + 1)
    found = encode_view(vae, draw_fixed_view(datasets[0][0], 1, fixed), fixed)
    assert sizes == [3, 1]
    torch.testing.assert_close(found, Latents(encoded, fixed).read(datasets[0][0], 1))


@pytest.mark.parametrize("harm", ["flip", "cut", "no tar", "no index"])
def test_a_damaged_shard_is_written_again_alone(
    datasets: list[ShardDataset],
    fixed: TrainSettings,
    encoded: str,
    tiny_base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: str,
) -> None:
    folder = str(tmp_path / "latents")
    sound = files(encoded)
    for name, data in sound.items():
        path = tmp_path / "latents" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with monkeypatch.context() as patch:
        patch.setattr("mild.training.latents.load_base", never)
        encode_latents(fixed, datasets, tiny_base, "v", folder)
    before = {name: os.stat(f"{folder}/{name}").st_mtime_ns for name in sound}
    tar, index = (Path(folder, f"composite/train-000001.{end}") for end in ("tar", "index.json"))
    data = tar.read_bytes()
    if harm == "flip":
        tar.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    elif harm == "cut":
        tar.write_bytes(data[:-512])
    else:
        (tar if harm == "no tar" else index).unlink()
    Path(folder, "composite/train-000002.tar").write_bytes(b"of a dataset that was larger")
    counts: list[int] = []
    encode_latents(fixed, datasets, tiny_base, "v", folder, counts.append)
    assert files(folder) == sound and counts == [2, 1, 1]
    after = {name: os.stat(f"{folder}/{name}").st_mtime_ns for name in sound}
    assert {name.split(".")[0] for name in sound if after[name] != before[name]} == {"composite/train-000001"}


def test_what_was_encoded_before_an_end_is_kept(
    datasets: list[ShardDataset],
    fixed: TrainSettings,
    encoded: str,
    tiny_base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_latents(fixed, datasets, tiny_base, "v", str(tmp_path), end)
    assert sorted(files(tmp_path)) == ["composite/train-000000.index.json", "composite/train-000000.tar"]
    before = os.stat(tmp_path / SHARDS[0]).st_mtime_ns
    encode_latents(fixed, datasets, tiny_base, "v", str(tmp_path))
    assert files(tmp_path) == files(encoded)
    assert os.stat(tmp_path / SHARDS[0]).st_mtime_ns == before


def test_another_vae_other_views_or_other_data_have_other_latents(
    datasets: list[ShardDataset], fixed: TrainSettings, encoded: str, tmp_path: Path, tiny_base: str
) -> None:
    other_base = str(tmp_path / "base")
    pipeline = load_base(tiny_base)
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.weight.mul_(1.1)
    pipeline.save_pretrained(other_base)
    folder = str(tmp_path / "latents")
    told = files(encoded)
    for settings, base, digest in [
        (fixed, other_base, "other"),
        (fixed.model_copy(update={"seed": 1}), tiny_base, "v"),
    ]:
        encode_latents(settings, datasets, base, digest, folder)
        found = files(folder)
        assert found.keys() == told.keys()
        assert all(found[name] != told[name] for name in told)
    how = fixed.model_copy(update={"steps": 9, "learning_rate": 1e-2, "warm_up": WarmUpSettings(start=0, end=0)})
    encode_latents(how, datasets, tiny_base, "v", folder)
    assert files(folder) == told, "how views are trained on does not matter, and what was there before is replaced"


def test_latents_of_other_views_or_samples_are_refused(
    datasets: list[ShardDataset], fixed: TrainSettings, encoded: str, tiny_base: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="latents of other views"):
        Latents(encoded, fixed.model_copy(update={"seed": 1}))
    latents = Latents(encoded, fixed)
    with pytest.raises(UserError, match="holds no latents of sample another"):
        latents.check(["sample-1", "another"])
    with pytest.raises(UserError, match="holds no latents of sample sample-0"):
        train(fixed, datasets[0], tiny_base, str(tmp_path / "out"), never, latents=Latents(str(tmp_path), fixed))


def test_latents_of_another_format_are_refused(
    fixed: TrainSettings, encoded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mild.training.latents.LATENTS_FORMAT", LATENTS_FORMAT + 1)
    with pytest.raises(UserError, match=r"index\.json speaks of latents of another format: encode them again"):
        Latents(encoded, fixed)


def test_latents_that_are_cut_while_training_are_named(
    datasets: list[ShardDataset], fixed: TrainSettings, tiny_base: str, tmp_path: Path
) -> None:
    encode_latents(fixed, datasets[:1], tiny_base, "v", str(tmp_path))
    latents = Latents(str(tmp_path), fixed)
    tar = tmp_path / SHARDS[1]
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(UserError, match=r"train-000001.tar: the latents of sample sample-2 cannot be read"):
        latents.read(datasets[0][2], 0)


def test_pictures_that_cannot_be_encoded_are_named(
    datasets: list[ShardDataset], fixed: TrainSettings, nano_base: str, tmp_path: Path
) -> None:
    for resolution, named in [(24, "resolution: 24 must be a multiple of 16"), (48, "sample-0 is 40x32, smaller than")]:
        with pytest.raises(UserError, match=named):
            encode_latents(
                fixed.model_copy(update={"resolution": resolution}), datasets, nano_base, "v", str(tmp_path / "latents")
            )
    assert files(tmp_path) == {}
