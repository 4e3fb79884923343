"""What the tests of methods share: cases, and folders of Stable Diffusion 1.5's layout with tiny networks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dataset_tools.schema import Sample
from mild.evaluation.methods import Case, Setup

SPECIAL = ("<|startoftext|>", "<|endoftext|>")


@pytest.fixture(scope="session")
def make_case(make_sample: Callable[..., Sample]) -> Callable[..., Case]:
    """A case of a drawn sample; arguments as of `make_sample`."""

    def make(index: int, **options: int) -> Case:
        sample = make_sample(index, **options)
        return Case(
            sample.image,
            np.stack([person.mask for person in sample.people]),
            np.stack([person.keypoints for person in sample.people]),
            sample.parsing,
            sample.label_set,
            sample.key,
            categories=("Person",) * len(sample.people),
        )

    return make


@pytest.fixture
def case(make_case: Callable[..., Case]) -> Case:
    """Of an odd size."""
    return make_case(1, height=45, width=51)


@pytest.fixture(scope="session")
def setup() -> Setup:
    """Nothing is named."""
    return Setup(base="", adapters="", inference_steps=2, prompt="")


@pytest.fixture(scope="session")
def noise_case() -> Callable[..., Case]:
    """Makes a picture of noise, and a hole in it."""

    def made(seed: int = 0, height: int = 34, width: int = 45) -> Case:
        image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        mask = np.zeros((1, height, width), bool)
        mask[:, 10:22, 12:25] = True
        return Case(image, mask)

    return made


@pytest.fixture(scope="session")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the folder of a pipeline as the hub has them, the checker of pictures named, and not there."""

    def written(words: tuple[str, ...] = (), variant: str | None = None, rows: int | None = None) -> Path:
        folder = tmp_path_factory.mktemp("sd15") / "pipeline"
        vocabulary = [*ByteLevel.alphabet(), *(f"{letter}</w>" for letter in ByteLevel.alphabet()), *SPECIAL]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            text = CLIPTextConfig(
                vocab_size=len(vocabulary) + len(words) if rows is None else rows,
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=2,
                num_attention_heads=4,
                bos_token_id=len(vocabulary) - 2,
                eos_token_id=len(vocabulary) - 1,
                pad_token_id=len(vocabulary) - 1,
            )
            pipeline = StableDiffusionInpaintPipeline(
                vae=AutoencoderKL(
                    down_block_types=("DownEncoderBlock2D",) * 2,
                    up_block_types=("UpDecoderBlock2D",) * 2,
                    block_out_channels=(8, 16),
                    latent_channels=4,
                    norm_num_groups=4,
                ),
                text_encoder=CLIPTextModel(text),
                tokenizer=CLIPTokenizer({token: number for number, token in enumerate(vocabulary)}, []),
                unet=UNet2DConditionModel(
                    sample_size=8,
                    in_channels=9,
                    out_channels=4,
                    block_out_channels=(16, 32),
                    layers_per_block=1,
                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                    attention_head_dim=4,
                    cross_attention_dim=32,
                    norm_num_groups=8,
                ),
                scheduler=PNDMScheduler(
                    beta_start=0.00085,
                    beta_end=0.012,
                    beta_schedule="scaled_linear",
                    skip_prk_steps=True,
                    steps_offset=1,
                ),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            # As drawn, its text encoder hears every prompt alike.
            pipeline.text_encoder.get_input_embeddings().weight.data.mul_(50)
        pipeline.save_pretrained(folder, variant=variant)
        index = json.loads((folder / "model_index.json").read_text())
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        (folder / "model_index.json").write_text(json.dumps(index))
        write_tokenizer(folder / "tokenizer", vocabulary, words)
        return folder

    return written


def write_tokenizer(folder: Path, vocabulary: list[str], words: tuple[str, ...]) -> None:
    """The files of a CLIP tokenizer that has learned words, as transformers 4 wrote them: no ``tokenizer.json``."""
    for path in folder.iterdir():
        path.unlink()
    added = {word: len(vocabulary) + number for number, word in enumerate(words)}
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {vocabulary.index(token): token for token in SPECIAL}
    decoder = {
        str(number): {"content": token, **flags, "special": number in special}
        for number, token in {**special, **{number: word for word, number in added.items()}}.items()
    }
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "bos_token": SPECIAL[0],
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": SPECIAL[1],
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": SPECIAL[1],
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": SPECIAL[1],
    }
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[1], "unk_token": SPECIAL[1]}
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    if words:
        (folder / "added_tokens.json").write_text(json.dumps(added))
