"""Networks in a build: photographs alone become samples, each network is loaded when it is needed, and seen through."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import skimage.data
import yaml
from PIL import Image

from dataset_tools.drawn_world import Scene, draw_scene
from dataset_tools.errors import UserError
from dataset_tools.estimators import FoundPeople
from dataset_tools.estimators.network import NetworkEstimator
from dataset_tools.estimators.segmentation import Segmentation
from dataset_tools.schema import PARSING_LABELS, Sample
from dataset_tools.shards import ShardDataset, read_manifest, verify
from dataset_tools.sources.folder import FolderSource
from dataset_tools.sources.sample import SampleSettings, write_mirror
from dataset_tools.weights import missing_message
from flows import cli
from flows.build_dataset import build_dataset

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.slow]

SCENES = 6
Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def scenes() -> dict[str, Scene]:
    """Of a drawn world that the bundled network has not seen."""
    return {f"scene{number}": draw_scene(f"network-build-{number}", 9, (256, 256), 2) for number in range(SCENES)}


@pytest.fixture(scope="module")
def photos(scenes: dict[str, Scene], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes as JPEG files, one of nobody, a real photograph, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("photos")
    pictures = {name: scene.image for name, scene in scenes.items()}
    pictures |= {"empty": scenes["scene0"].background, "astronaut": skimage.data.astronaut()}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.jpg", quality=95)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Settings of the bundled network for drawn people, and of random ones, in their true layout, for the cues."""
    import torch
    from transformers import (
        SegformerConfig,
        SegformerForSemanticSegmentation,
        SegformerImageProcessor,
        VitPoseBackboneConfig,
        VitPoseConfig,
        VitPoseForPoseEstimation,
        VitPoseImageProcessor,
    )

    folder = tmp_path_factory.mktemp("networks")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = VitPoseBackboneConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, out_indices=[2])
        pose = VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=17))
        names = dict(enumerate(PARSING_LABELS["atr"]))
        small = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 16}
        config = SegformerConfig(**small, id2label=names, label2id={name: number for number, name in names.items()})
        parsing = SegformerForSemanticSegmentation(config)
    for name, network, processor in (
        ("pose", pose, VitPoseImageProcessor()),
        ("parsing", parsing, SegformerImageProcessor(size={"height": 64, "width": 64})),
    ):
        network.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return {
        "instances": {"kind": "transformers", "weights": "drawn-people", "batch_size": 4},
        "pose": {"kind": "vitpose", "weights": str(folder / "pose"), "min_score": 1e-6},
        "parsing": {"kind": "segformer", "weights": str(folder / "parsing")},
    }


@pytest.fixture(scope="module")
def recipe(photos: Path, networks: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "build.yaml"
    source = {"kind": "folder", "photos": str(photos), "splits": {"train": 1.0}}
    runner = {"workers": 1}
    settings = {"name": "mine", "source": source, **networks, "samples_per_shard": 3, "runner": runner}
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Path:
    output = tmp_path_factory.mktemp("built") / "dataset"
    build_dataset(str(recipe), str(output))
    return output


@pytest.fixture
def dataset(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of it with its work folder, as if just built."""
    for name in ("dataset", "dataset.work"):
        shutil.copytree(undisturbed.with_name(name), tmp_path / name, copy_function=shutil.copy2)
    return tmp_path / "dataset"


def samples_of(output: Path) -> dict[str, Sample]:
    held = [s for split in read_manifest(str(output)).shards["real"] for s in ShardDataset(str(output), "real", split)]
    return {sample.origins[0].id.rsplit("-", 1)[0]: sample for sample in held}


def rejected_of(output: Path) -> dict[str, str]:
    rows = pq.read_table(output / "rejected.parquet").to_pylist()
    return {row["image_id"].split("-")[0]: row["reason"] for row in rows if row["outcome"] == "image-rejected"}


def digests(output: Path) -> dict[str, str]:
    return {shard.path: shard.sha256 for shard in read_manifest(str(output)).shards["real"]["train"]}


def test_photographs_alone_go_all_the_way_from_the_command_line(
    photos: Path,
    scenes: dict[str, Scene],
    networks: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found, posed, parsed, written, verified; whoever is drawn there has a mask much like their own."""
    output = tmp_path / "dataset"
    command = ["mild", "build", "--source", "folder", "--photos", str(photos), "-o", str(output)]
    for cue, settings in networks.items():
        command += [word for name, value in settings.items() for word in ("--set", f"{cue}.{name}={value}")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0 and list(verify(str(output))) == []
    samples = samples_of(output)
    rejected = rejected_of(output)
    # What a network that knows drawn people sees in the photograph is its own affair; it is seen, and nothing is lost.
    samples.pop("astronaut", None) or rejected.pop("astronaut")
    assert samples.keys() == scenes.keys()
    assert rejected == {"empty": "nobody-found", "broken": "truncated-image"}
    overlaps = []
    for name, scene in scenes.items():
        found = samples[name].people
        overlaps += [
            max(np.count_nonzero(p.mask & one.mask) / np.count_nonzero(p.mask | one.mask) for p in found)
            for one in scene.people
        ]
        assert {(person.mask_by, 0.5 <= person.mask_score <= 1) for person in found} == {("transformers", True)}
        assert all(person.keypoints[:, 2].any() for person in found)
        parsing = samples[name].parsing
        assert samples[name].label_set == "atr" and parsing.max() < 18
        assert not parsing[~np.logical_or.reduce([person.mask for person in found])].any()
    assert np.mean(overlaps) > 0.6
    made_by = samples["scene0"].made_by
    assert (made_by.masks.network, made_by.pose.network) == ("drawn-people", "pose")
    assert made_by.masks.version.startswith("transformers ")
    card = (output / "README.md").read_text()
    for maker in (made_by.masks, made_by.pose, made_by.parsing):
        assert len(maker.weights) == 64 and maker.weights[:16] in card
    for file in ("README.md", "manifest.json"):
        assert str(Path(networks["pose"]["weights"]).parent) not in (output / file).read_text()


def test_no_network_is_loaded_where_everything_is_cached(
    recipe: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NetworkEstimator, "model", lambda self: pytest.fail("a network is loaded"))
    summary = build_dataset(str(recipe), str(dataset))
    assert summary["cached"] == summary["shards"] == 3


def test_networks_are_loaded_once_and_only_for_what_is_missing(
    recipe: Path, dataset: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards are gone: one of each network, and pictures in batches; afterwards their memory is free."""
    from dataset_tools.estimators import network

    loaded, seen, load, find = [], [], Segmentation.load, Segmentation.find
    monkeypatch.setattr(Segmentation, "load", lambda self: loaded.append(self.name) or load(self))

    def counted(self: Segmentation, images: Sequence[np.ndarray]) -> list[FoundPeople]:
        seen.append(len(images))
        return find(self, images)

    monkeypatch.setattr(Segmentation, "find", counted)
    for shard in ("train-000000.tar", "train-000001.tar"):
        (dataset / "real" / shard).unlink()
    assert build_dataset(str(recipe), str(dataset))["cached"] == 1
    assert loaded == ["transformers"] and len(seen) == 2 and max(seen) == 3
    assert digests(dataset) == digests(undisturbed)
    assert network._LOADED == {}


def test_other_weights_make_other_shards_and_the_same_elsewhere_do_not(
    recipe: Path, dataset: Path, networks: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Keys hold what the weights are, not where they lie."""
    moved = shutil.copytree(networks["pose"]["weights"], tmp_path / "elsewhere")
    summary = build_dataset(str(recipe), str(dataset), {"pose.weights": str(moved)})
    assert summary["cached"] == 3
    change_one_weight(moved)
    summary = build_dataset(str(recipe), str(dataset), {"pose.weights": str(moved)})
    assert summary["cached"] == 0


def change_one_weight(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def of_something_else(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["backbone_config"]["hidden_size"] = 32
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "sha256", "said"),
    [
        (shutil.rmtree, None, "weights"),
        (cut_off, None, "header"),
        (of_something_else, None, "mismatched"),
        (change_one_weight, "0" * 64, "sha256"),
    ],
)
def test_weights_that_cannot_be_used_are_one_line_before_the_first_picture_is_fetched(
    recipe: Path,
    networks: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Edit,
    sha256: str | None,
    said: str,
) -> None:
    folder = shutil.copytree(networks["pose"]["weights"], tmp_path / "pose")
    damage(folder)
    monkeypatch.setattr(FolderSource, "read_image", lambda *_: pytest.fail("a picture is fetched"))
    changes = {"pose.weights": str(folder), "pose.sha256": sha256}
    with pytest.raises(UserError) as caught:
        build_dataset(str(recipe), str(tmp_path / "dataset"), changes)
    message = str(caught.value)
    assert str(folder) in message and said in message and "\n" not in message


def test_all_weights_that_have_to_be_pulled_are_named_at_once(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("MILD_WEIGHTS", raising=False)
    changes = {"instances.weights": "rf-detr-seg-medium", "parsing.weights": "segformer-clothes"}
    with pytest.raises(UserError) as caught:
        build_dataset(str(recipe), str(tmp_path / "dataset"), changes)
    assert str(caught.value) == missing_message(["rf-detr-seg-medium", "segformer-clothes"])


def test_a_network_of_another_kind_is_named(recipe: Path, networks: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="segformer, which does not segment instances"):
        build_dataset(str(recipe), str(tmp_path / "dataset"), {"instances.weights": networks["parsing"]["weights"]})


def test_photographs_without_masks_and_without_a_network_are_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source\.masks is not set, and neither is instances"):
        build_dataset(str(recipe), str(tmp_path / "dataset"), {"instances": None})


def test_pictures_in_which_a_network_finds_people_are_no_backgrounds(
    recipe: Path, scenes: dict[str, Scene], tmp_path: Path
) -> None:
    """Of two, the composites are on the one that shows nobody."""
    backgrounds = tmp_path / "backgrounds"
    backgrounds.mkdir()
    Image.fromarray(scenes["scene0"].background).save(backgrounds / "empty.png")
    Image.fromarray(scenes["scene1"].image).save(backgrounds / "peopled.png")
    output = tmp_path / "dataset"
    changes = {
        "source.backgrounds": str(backgrounds),
        "composite.samples": {"train": 4},
        "composite.size": [128, 128],
        "composite.donors": {"min_height": 32, "whole_body": False, "max_border_width": 1, "min_score": 0.5},
    }
    build_dataset(str(recipe), str(output), changes)
    composites = list(ShardDataset(str(output), "composite", "train"))
    assert composites and {sample.origins[0].title for sample in composites} == {"empty"}
    assert {person.mask_by for sample in composites for person in sample.people} == {"transformers"}
    assert rejected_of(output)["peopled"] == "person-in-background"


def test_people_of_openimages_with_a_box_alone_get_a_mask_of_the_network_or_their_picture_is_set_aside(
    networks: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Without a network, every such picture is set aside; with one, those in which somebody still has no mask."""
    mirror = tmp_path / "mirror"
    world = SampleSettings(train=12, validation=1, test=1, smallest=224, largest=256, broken=False)
    write_mirror(world, str(mirror))
    curation = {"max_unmasked_people": 9, "backgrounds": 0}
    source = {"kind": "openimages", "root": str(mirror), "images": f"{mirror}/images", "splits": ["train"]}
    recipe = tmp_path / "build.yaml"
    recipe.write_text(yaml.safe_dump({"name": "boxes", "source": {**source, "curation": curation}}))
    build_dataset(str(recipe), str(tmp_path / "without"))
    changes = {"instances": {**networks["instances"], "min_score": 0.3}}
    build_dataset(str(recipe), str(tmp_path / "with"), changes)
    without, found = samples_of(tmp_path / "without"), samples_of(tmp_path / "with")
    unmasked = {image for image, reason in rejected_of(tmp_path / "without").items() if reason == "person-without-mask"}
    assert unmasked and not unmasked & without.keys()
    still = {image for image, reason in rejected_of(tmp_path / "with").items() if reason == "person-without-mask"}
    assert still < unmasked and unmasked - still <= found.keys()
    people = [person for image in unmasked - still for person in found[image].people]
    assert {"annotated", "transformers"} == {person.mask_by for person in people}
    boxed = [person for person in people if person.id.startswith("box-")]
    assert boxed and all(person.mask_by == "transformers" and person.mask_score < 1 for person in boxed)
    assert all(person.mask_by == "annotated" for sample in without.values() for person in sample.people)


@pytest.mark.process
def test_a_build_with_networks_that_was_killed_ends_with_the_same_bytes(
    recipe: Path, undisturbed: Path, tmp_path: Path, run_killed: Callable[..., None]
) -> None:
    """SIGKILL when its second shard is looked at."""
    output = tmp_path / "dataset"
    looked_at = "dataset_tools.estimators.segmentation.Segmentation.find"
    run_killed(looked_at, 2, build_dataset, str(recipe), str(output))
    assert not (output / "manifest.json").exists()
    assert build_dataset(str(recipe), str(output))["cached"] == 1
    assert digests(output) == digests(undisturbed)
