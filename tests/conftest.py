"""What tests of several packages share: samples that are quickly drawn."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from dataset_tools.schema import EncodingSettings, Person, Sample
from dataset_tools.shards import Manifest, write_shard

# For torch, here and in child processes: the models are too small for more threads, rounding depends on their number,
# and other tests run beside.
os.environ["OMP_NUM_THREADS"] = "1"
# A busy machine is no defect.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def draw_sample(index: int, height: int = 48, width: int = 64, people: int = 2) -> Sample:
    """A smooth background with rectangles for people, left to right; augmented masks are shifted down by 2.

    Joints lie anywhere in their rectangle; label 2 of Pascal is the rectangle.
    """
    rng = np.random.default_rng(index)
    rows, columns = np.mgrid[:height, :width]
    slope = rng.integers(20, 100, 3)
    background = (60 + rows[..., None] / height * slope + columns[..., None] / width * slope[::-1]).astype(np.uint8)
    image, persons = background.copy(), []
    parsing = np.zeros((height, width), np.uint8)
    for k in range(people):
        mask = np.zeros((height, width), bool)
        left = 4 + k * (width - 8) // people
        mask[height // 4 : height // 4 + height // 2, left : left + width // 8] = True
        image[mask] = rng.integers(0, 256, 3)
        augmented = np.roll(mask, 2, axis=0)
        parsing[mask] = 2
        inside = np.argwhere(mask)[rng.integers(mask.sum(), size=18)]
        keypoints = np.column_stack([inside[:, ::-1], np.ones(18)]).astype(np.float32)
        layer = np.dstack([image * mask[..., None], mask * np.uint8(255)])
        persons.append(
            Person(
                id=str(k),
                mask=mask,
                keypoints=keypoints,
                complete_mask=mask,
                augmented_mask=augmented,
                layer=layer,
                order=k,
                occlusion=0.0,
            )
        )
    return Sample(
        key=f"sample-{index}",
        split="train",
        configuration="composite",
        image=image,
        people=persons,
        parsing=parsing,
        label_set="pascal",
        origins=[],
        pose_by="drawn",
        background=background,
    )


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    """See `draw_sample`."""
    return draw_sample


@pytest.fixture(scope="session")
def drawn_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of two shards of three composite samples."""
    root: Path = tmp_path_factory.mktemp("data") / "dataset"
    shards = [
        write_shard(
            [draw_sample(3 * number + index) for index in range(3)],
            str(root),
            f"composite/train-{number:06d}.tar",
            EncodingSettings(),
            [],
        )
        for number in range(2)
    ]
    manifest = Manifest(
        name="drawn", shards={"composite": {"train": shards}}, files={}, source="", settings={}, software={}
    )
    (root / "manifest.json").write_text(manifest.model_dump_json())
    return str(root)


@pytest.fixture(scope="session")
def assert_trained_alike() -> Callable[[Path, Path], None]:
    """Fails unless two folders of adapters have the same losses and weights, to rounding."""

    def check(folder: Path, expected: Path) -> None:
        # Here, as tests of the dataset's tools do without torch.
        from safetensors.torch import load_file

        with (folder / "loss.csv").open() as one, (expected / "loss.csv").open() as other:
            for found, row in zip(list(csv.reader(one))[1:], list(csv.reader(other))[1:], strict=True):
                assert [float(value) for value in found] == pytest.approx([float(value) for value in row], rel=1e-3)
        for path in expected.rglob("*.safetensors"):
            weights = load_file(folder / path.relative_to(expected))
            for name, tensor in load_file(path).items():
                assert (weights[name] - tensor).norm() < 0.01 * tensor.norm() + 1e-6, name

    return check
