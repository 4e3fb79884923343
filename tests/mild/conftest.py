"""What the tests of `mild` share: datasets in memory, the nano base, and adapters of a very short training run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from dataset_tools.schema import Sample
from mild.bases import NANO, place_of
from mild.model.backbone import load_base
from mild.settings import HmgSettings, LoraSettings, MildSettings, TrainSettings, WarmUpSettings
from mild.training.loop import train

SVG = "{http://www.w3.org/2000/svg}"


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


@pytest.fixture(scope="session")
def in_memory() -> Callable[[list[Sample]], MemorySamples]:
    """A dataset of the samples given."""
    return MemorySamples


@pytest.fixture(scope="session")
def heights() -> Callable[[str, str], list[float]]:
    """Where the points of a line of a chart (`mild.charts`) lie, from the top, by the line's name."""

    def found(svg: str, name: str) -> list[float]:
        (line,) = (group for group in ElementTree.fromstring(svg).iter(f"{SVG}g") if group.get("id") == name)
        path = line.find(f"{SVG}path")
        assert path is not None
        return [float(word) for word in path.attrib["d"].replace("M", " ").replace("L", " ").split()][1::2]

    return found


@pytest.fixture
def samples(make_sample: Callable[..., Sample]) -> MemorySamples:
    samples = [make_sample(index, people=1 + index % 3) for index in range(6)]
    for sample in samples:
        # A strip along the bottom; that it is known at all is what counts.
        sample.effects = np.zeros(sample.image.shape[:2], np.uint8)
        sample.effects[-3:] = 1
    return MemorySamples(samples)


@pytest.fixture(scope="session")
def nano_base() -> str:
    """The folder of the base that comes with the package."""
    return place_of(NANO)


@pytest.fixture(scope="session")
def tiny_base(nano_base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The nano base with a fresh UNet of two levels and one transformer, which is run and traced in a moment."""
    pipeline = load_base(nano_base)
    config = dict(pipeline.unet.config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline.unet = UNet2DConditionModel.from_config(
            config
            | {
                "block_out_channels": (16, 32),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("UpBlock2D", "UpBlock2D"),
                "mid_block_type": None,
                "attention_head_dim": 2,
                "norm_num_groups": 8,
            }
        )
    folder = tmp_path_factory.mktemp("tiny") / "base"
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def quick() -> TrainSettings:
    """A training run of a second."""
    return TrainSettings(
        steps=4,
        batch_size=2,
        learning_rate=1e-3,
        resolution=32,
        inference_steps=2,
        mild=MildSettings(
            lora=LoraSettings(rank=4, alpha=8), hmg=HmgSettings(grid=2, width=8, map_side=16, dropout=0.25)
        ),
        warm_up=WarmUpSettings(start=1, end=3),
        log_every=2,
    )


@pytest.fixture(scope="session")
def adapters(
    nano_base: str, quick: TrainSettings, make_sample: Callable[..., Sample], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "adapters"
    data = MemorySamples([make_sample(index) for index in range(4)])
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
