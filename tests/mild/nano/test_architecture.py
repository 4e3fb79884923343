from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionXLInpaintPipeline
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from mild.bases import NANO, NANO_ADAPTERS, place_of
from mild.model.saved import read_config


@pytest.fixture(scope="module")
def stock(nano_base: str) -> StableDiffusionXLInpaintPipeline:
    pipeline = StableDiffusionXLInpaintPipeline.from_pretrained(nano_base, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_has_the_architecture_of_sdxl_inpainting(stock: StableDiffusionXLInpaintPipeline) -> None:
    assert type(stock.text_encoder).__name__ == "CLIPTextModel"
    assert type(stock.text_encoder_2).__name__ == "CLIPTextModelWithProjection"
    assert stock.unet.config.in_channels == 9
    assert stock.unet.config.addition_embed_type == "text_time"
    assert stock.scheduler.config.prediction_type == "sample"
    assert stock.vae_scale_factor == 4


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_stock_pipeline_runs_on_it(stock: StableDiffusionXLInpaintPipeline, guidance_scale: float) -> None:
    image = Image.new("RGB", (48, 32), (90, 120, 30))
    mask = Image.new("L", (48, 32), 255)
    result = stock(
        "a park",
        image=image,
        mask_image=mask,
        height=32,
        width=48,
        num_inference_steps=2,
        guidance_scale=guidance_scale,
    ).images[0]
    assert result.size == (48, 32)
    assert np.asarray(result).std() > 0


def test_it_is_small_holds_safetensors_only_and_its_card_says_how_it_was_made(nano_base: str) -> None:
    files = [path for path in Path(nano_base).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".txt", ".md", ".csv", ".svg", ".png"}
    assert sum(path.stat().st_size for path in files) < 25e6
    assert not any(b"_name_or_path" in path.read_bytes() for path in files if path.suffix == ".json")
    card = (Path(nano_base) / "README.md").read_text()
    for fact in ("mild pretrain pretrain-further.yaml", "Seed 2", "digest `", "loss-unet.svg"):
        assert fact in card


def test_its_adapters_are_small_and_belong_to_it() -> None:
    folder = Path(place_of(NANO_ADAPTERS))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 5e6
    assert read_config(folder).base == NANO


@pytest.mark.parametrize("text", ["A photo of an empty street", "zwölf Boxkämpfer, 12:30?", "人 and 🌳"])
def test_any_text_survives_the_tokenizer(stock: StableDiffusionXLInpaintPipeline, text: str) -> None:
    for tokenizer in (stock.tokenizer, stock.tokenizer_2):
        decoded = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.lower().replace(" ", "")


def test_vocabulary_and_merges_files_give_the_tokens_of_the_tokenizer(
    stock: StableDiffusionXLInpaintPipeline, nano_base: str
) -> None:
    """Older readers build CLIP's tokenizer from the two files; done here by hand, with the same result."""
    folder = Path(nano_base) / "tokenizer"
    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), end_of_word_suffix="</w>")
    plain = Tokenizer(model)
    plain.normalizer = normalizers.Lowercase()
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    text = "two people overlapping in front of a xylophone, beside the river"
    vocabulary = json.loads((folder / "vocab.json").read_text())
    expected = [vocabulary["<|startoftext|>"], *plain.encode(text).ids, vocabulary["<|endoftext|>"]]
    assert stock.tokenizer(text)["input_ids"] == expected
    assert "overlapping</w>" in plain.encode(text).tokens


def test_the_second_tokenizer_pads_with_an_exclamation_mark_as_sdxls_does(
    stock: StableDiffusionXLInpaintPipeline,
) -> None:
    ids = stock.tokenizer_2("a man", padding="max_length")["input_ids"]
    assert len(ids) == 77
    assert set(ids[5:]) == {stock.tokenizer_2.convert_tokens_to_ids("!")}
