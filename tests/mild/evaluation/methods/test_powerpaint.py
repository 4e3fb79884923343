from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from safetensors.torch import load_file, save_file

from dataset_tools.errors import UserError
from mild.bases import NANO, place_of
from mild.evaluation.methods import Case, Setup
from mild.evaluation.methods.powerpaint import PowerPaintMethod
from mild.evaluation.methods.sdxl import brought_back, scaled_case
from mild.evaluation.settings import EvaluateSettings

WORDS = tuple(f"P_{task}_{number}" for task in ("ctxt", "shape", "obj") for number in range(10))


@pytest.fixture(scope="module")
def folder(sd15: Callable[..., Path]) -> Path:
    """As published: the learned words in tokenizer and text encoder, in half precision alone."""
    return sd15(words=WORDS, variant="fp16")


def method_of(folder: Path) -> PowerPaintMethod:
    return PowerPaintMethod(base=str(folder), inference_steps=2, resolution=32)


def test_the_stock_pipeline_is_asked_for_context_and_away_from_objects_in_the_learned_words(
    folder: Path, noise_case: Callable[..., Case], setup: Setup
) -> None:
    """The same comes of embeddings of token ids that are put together here, word by word."""
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    learned = json.loads((folder / "tokenizer" / "added_tokens.json").read_text())
    stock = StableDiffusionInpaintPipeline.from_pretrained(
        folder, variant="fp16", safety_checker=None, feature_extractor=None
    )

    def embedded(text: str, task: str) -> torch.Tensor:
        letters = [letter for word in text.split() for letter in [*word[:-1], f"{word[-1]}</w>"]]
        ids = [vocabulary[letter] for letter in letters] + [learned[f"P_{task}_{number}"] for number in range(10)]
        end = vocabulary["<|endoftext|>"]
        ids = [vocabulary["<|startoftext|>"], *ids, end]
        with torch.no_grad():
            return stock.text_encoder(torch.tensor([ids + [end] * (77 - len(ids))]))[0]

    case = noise_case()
    image, hole = scaled_case(case, (32, 40))
    picture = stock(
        prompt_embeds=embedded("empty scene blur", "ctxt"),
        negative_prompt_embeds=embedded("", "obj"),
        image=image,
        mask_image=hole,
        height=32,
        width=40,
        num_inference_steps=2,
        guidance_scale=12,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    (found,) = method_of(folder).open(setup).erase([case], [5])
    assert np.abs(found.astype(int) - brought_back(picture, case)).max() <= 1
    assert np.array_equal(found[~case.hole], case.image[~case.hole])


def test_what_the_learned_words_mean_is_seen_in_the_result(
    sd15: Callable[..., Path], folder: Path, noise_case: Callable[..., Case], setup: Setup
) -> None:
    other = sd15(words=WORDS, variant="fp16")
    path = other / "text_encoder" / "model.fp16.safetensors"
    weights = load_file(path)
    (name,) = (name for name in weights if name.endswith("token_embedding.weight"))
    weights[name][-30:-20] *= -1  # P_ctxt
    save_file(weights, path, metadata={"format": "pt"})
    case = noise_case()
    results = [method_of(place).open(setup).erase([case], [5])[0] for place in (folder, other)]
    assert not np.array_equal(results[0], results[1])
    assert method_of(folder).fingerprint(setup) != method_of(other).fingerprint(setup)


def test_a_case_comes_out_alike_alone_and_beside_others_and_otherwise_with_another_seed(
    folder: Path, noise_case: Callable[..., Case], setup: Setup
) -> None:
    eraser = method_of(folder).open(setup)
    cases = [noise_case(1), noise_case(2, 50, 40), noise_case(3)]
    together = eraser.erase(cases, [7, 8, 9])
    for case, seed, result in zip(cases, [7, 8, 9], together, strict=True):
        (alone,) = eraser.erase([case], [seed])
        assert np.abs(alone.astype(int) - result).max() <= 1
        (other,) = eraser.erase([case], [seed + 1])
        assert not np.array_equal(other, alone)


@pytest.mark.parametrize(
    ("words", "rows"),
    [((), None), (WORDS[:-1], None), (WORDS, 514), (("P_ctxt", "P_shape", "P_obj"), None)],
    ids=["none", "one-missing", "not-in-the-text-encoder", "not-in-ten-parts"],
)
def test_a_pipeline_that_has_not_learned_the_words_is_refused(
    sd15: Callable[..., Path], setup: Setup, words: tuple[str, ...], rows: int | None
) -> None:
    method = method_of(sd15(words=words, rows=rows))
    with pytest.raises(UserError, match="has not learned the words P_"):
        method.open(setup)


def test_absent_weights_are_told_with_the_cure(
    folder: Path, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILD_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    (method,) = EvaluateSettings(methods=["powerpaint"]).methods
    assert "mild weights pull powerpaint-v1" in str(method.missing(setup))
    assert "no folder of a diffusers pipeline" in str(method_of(tmp_path).missing(setup))
    assert method_of(folder).missing(setup) is None


def test_other_pipelines_are_refused(setup: Setup) -> None:
    with pytest.raises(UserError, match=r"Stable Diffusion 1\.5"):
        PowerPaintMethod(base=place_of(NANO)).open(setup)
