"""What the tests of `mild` share: a nano base, a few drawn samples, and adapters of a very short training run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from dataset_tools.schema import Person, Sample
from mild.nano import write_nano_base
from mild.settings import HmgSettings, LoraSettings, MildSettings, TrainSettings, WarmUpSettings
from mild.training import train


class MemorySamples:
    """A dataset in memory with the interface of `dataset_tools.shards.ShardDataset`."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples
        self.keys = [sample.key for sample in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(self))


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
def in_memory() -> Callable[[list[Sample]], MemorySamples]:
    """A dataset of the samples given."""
    return MemorySamples


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models here are too small for more, and other tests may run beside."""
    torch.set_num_threads(1)


@pytest.fixture
def samples() -> MemorySamples:
    return MemorySamples([draw_sample(index, people=1 + index % 3) for index in range(6)])


@pytest.fixture(scope="session")
def nano_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("nano") / "base"
    write_nano_base(str(folder), seed=0)
    return str(folder)


@pytest.fixture(scope="session")
def quick() -> TrainSettings:
    """A training run of a second or two."""
    return TrainSettings(
        steps=4,
        batch_size=2,
        learning_rate=1e-3,
        resolution=32,
        mild=MildSettings(
            lora=LoraSettings(rank=4, alpha=8), hmg=HmgSettings(grid=2, width=8, map_side=16, dropout=0.25)
        ),
        warm_up=WarmUpSettings(start=1, end=3),
        log_every=2,
    )


@pytest.fixture(scope="session")
def adapters(nano_base: str, quick: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "adapters"
    data = MemorySamples([draw_sample(index) for index in range(4)])
    train(quick, data, nano_base, str(folder), lambda step, values: None, dataset_digest="0123abcd")
    return folder


@pytest.fixture(scope="session")
def make_unet() -> Callable[[], UNet2DConditionModel]:
    """Makes the UNet `tiny_unet`, each time with the same weights."""
    return draw_unet


@pytest.fixture
def tiny_unet() -> UNet2DConditionModel:
    return draw_unet()


def draw_unet() -> UNet2DConditionModel:
    """A UNet with SDXL's kinds of blocks, small enough for float64 gradients in a moment."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=9,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            use_linear_projection=True,
            cross_attention_dim=8,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 8,
        )
