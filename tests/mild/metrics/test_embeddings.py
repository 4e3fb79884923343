"""DINO and CLIP similarity against a plain transcription, on tiny random networks laid out as the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from skimage import data
from torchvision.transforms.v2 import functional as tv
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from dataset_tools.errors import UserError
from mild.metrics.embeddings import CLIP, DINO, SimilarityMetric
from mild.metrics.metric import Judged

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
OPENAI = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
PROCESSORS: dict[str, dict[str, Any]] = {
    "dino": {
        "do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": IMAGENET[0], "image_std": IMAGENET[1], "resample": 2, "size": 224,
    },
    "clip": {
        "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": OPENAI[0], "image_std": OPENAI[1],
        "resample": 3, "size": 224,
    },
}  # fmt: skip
"""``preprocessor_config.json`` of facebook/dino-vits16 and of openai/clip-vit-base-patch32."""
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def save(folder: Path, kind: str) -> Path:
    """A network with the names of tensors that the published file has."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any
        if kind == "dino":
            model = ViTModel(ViTConfig(patch_size=32, layer_norm_eps=1e-12, **TINY), add_pooling_layer=False)
        else:
            text = {"vocab_size": 8, "max_position_embeddings": 4, "bos_token_id": 0, "eos_token_id": 1, **TINY}
            model = CLIPModel(CLIPConfig(text_config=text, vision_config={"patch_size": 32, **TINY}, projection_dim=8))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    if kind == "dino":
        assert "encoder.layer.1.attention.attention.query.weight" in state
    else:  # the published file holds these as well
        state["vision_model.embeddings.position_ids"] = torch.arange(50)[None]
        state["text_model.embeddings.position_ids"] = torch.arange(4)[None]
        assert "vision_model.encoder.layers.1.self_attn.q_proj.weight" in state
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[kind]))
    return folder


@pytest.fixture(scope="module", params=["dino", "clip"])
def metric(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimilarityMetric:
    folder = save(tmp_path_factory.mktemp("networks") / f"Tiny_{request.param}", request.param)
    return DINO(weights=str(folder)) if request.param == "dino" else CLIP(weights=str(folder))


def judged(result: np.ndarray, truth: np.ndarray) -> Judged:
    nowhere = np.zeros(truth.shape[:2], bool)
    return Judged("a", truth, result, truth, ~nowhere, nowhere, ~nowhere, nowhere, None)


def pairs() -> list[Judged]:
    cat, coffee = data.chelsea(), data.coffee()
    return [judged(np.roll(cat, 90, 1), cat), judged(np.roll(coffee, 90, 0), coffee), judged(255 - cat, cat)]


def vector(metric: SimilarityMetric, picture: np.ndarray) -> np.ndarray:
    """Forward pass written out with functions alone: float64, from the names of the file's tensors."""
    state = {name: tensor.double() for name, tensor in load_file(Path(metric.weights, "model.safetensors")).items()}
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    if metric.kind == "dino":
        pixels, colours = tv.resize(pixels, [224, 224], tv.InterpolationMode.BILINEAR), IMAGENET
        first, last, eps, gelu = "embeddings.", "layernorm.", 1e-12, torch.nn.functional.gelu
        layer, attention, out = "encoder.layer.{}.", "attention.attention.{}.", "attention.output.dense."
        heads, norms = ("query", "key", "value"), ("layernorm_before.", "layernorm_after.")
        mlp = ("intermediate.dense.", "output.dense.")
        patches, position = f"{first}patch_embeddings.projection.", f"{first}position_embeddings"
        token = f"{first}cls_token"
    else:
        pixels, colours = tv.resize(pixels, [224], tv.InterpolationMode.BICUBIC), OPENAI
        first, last, eps, gelu = "vision_model.embeddings.", "vision_model.post_layernorm.", 1e-5, quick_gelu
        layer, attention, out = "vision_model.encoder.layers.{}.", "self_attn.{}.", "self_attn.out_proj."
        heads, norms, mlp = ("q_proj", "k_proj", "v_proj"), ("layer_norm1.", "layer_norm2."), ("mlp.fc1.", "mlp.fc2.")
        patches, position = f"{first}patch_embedding.", f"{first}position_embedding.weight"
        token = f"{first}class_embedding"
    pixels = tv.center_crop(pixels, [224, 224])
    mean, deviation = (torch.tensor(values).double().view(3, 1, 1) for values in colours)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, state[f"{name}weight"], state.get(f"{name}bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}weight"], state[f"{name}bias"], eps)

    x = torch.nn.functional.conv2d(
        ((pixels.double() / 255 - mean) / deviation)[None], state[f"{patches}weight"], state.get(f"{patches}bias"), 32
    )
    x = torch.cat([state[token].view(1, -1), x[0].flatten(1).T]) + state[position].view(50, -1)
    if metric.kind == "clip":
        x = norm(x, "vision_model.pre_layrnorm.")
    for index in range(2):
        name = layer.format(index)
        inside = norm(x, name + norms[0])
        q, k, v = (linear(inside, name + attention.format(head)).view(50, 2, 8).transpose(0, 1) for head in heads)
        mixed = ((q @ k.transpose(1, 2)) / 8**0.5).softmax(-1) @ v
        x = x + linear(mixed.transpose(0, 1).reshape(50, 16), name + out)
        x = x + linear(gelu(linear(norm(x, name + norms[1]), name + mlp[0])), name + mlp[1])
    x = norm(x, last)[0]
    return (x if metric.kind == "dino" else linear(x, "visual_projection.")).numpy()


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def test_it_is_the_cosine_of_the_vectors_of_a_plain_transcription(metric: SimilarityMetric) -> None:
    expected = []
    for one in pairs():
        assert one.truth is not None
        a, b = vector(metric, one.result), vector(metric, one.truth)
        expected.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert max(expected) < 0.999
    assert metric.score(pairs()) == pytest.approx(expected, abs=1e-4)


def test_equal_pictures_are_alike_and_several_at_once_give_what_each_gives_alone(metric: SimilarityMetric) -> None:
    first = pairs()[0]
    assert metric.score([judged(first.result, first.result)]) == pytest.approx([1])
    assert metric.score(pairs()) == pytest.approx([metric.score([one])[0] for one in pairs()], abs=1e-5)


@pytest.mark.parametrize("kind", ["dino", "clip"])
def test_a_file_that_lacks_a_tensor_or_has_one_too_many_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path, kind) / "model.safetensors"
    whole = load_file(path)
    lacking = {name: tensor for name, tensor in whole.items() if "layer.1." not in name and "layers.1." not in name}
    for state, said in ((lacking, "missing keys"), (whole | {"head.weight": torch.zeros(2)}, "unexpected keys")):
        save_file(state, path, {"format": "pt"})
        with pytest.raises(UserError, match=said) as refused:
            (DINO if kind == "dino" else CLIP)(weights=str(tmp_path)).score(pairs()[:1])
        assert "\n" not in str(refused.value)


def test_the_name_tells_checkpoints_apart_and_tables_name_checkpoint_and_preprocessing(
    metric: SimilarityMetric,
) -> None:
    assert (DINO().name, CLIP().name, metric.name) == ("dino", "clip", f"{metric.kind}-tiny-{metric.kind}")
    assert DINO().network == "facebook/dino-vits16, squeezed to 224×224, bilinear"
    assert CLIP().network.startswith("openai/clip-vit-base-patch32, shorter side to 224")
    assert metric.network == f"Tiny_{metric.kind}, preprocessed as its folder says"
    assert metric.missing() is None


def test_what_decides_about_values_is_in_the_fingerprint(metric: SimilarityMetric, tmp_path: Path) -> None:
    again = metric.model_copy(update={"batch_size": 3, "weights": str(save(tmp_path, metric.kind))})
    assert again.fingerprint() == metric.fingerprint()
    processor = tmp_path / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace("224", "256"))
    assert again.fingerprint() != metric.fingerprint()


@pytest.mark.parametrize("metric", [DINO(), CLIP()])
def test_without_weights_it_says_what_to_pull(
    metric: SimilarityMetric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILD_WEIGHTS", str(tmp_path))
    missing = metric.missing()
    assert missing is not None and f"mild weights pull {metric.usual_weights}" in missing
    with pytest.raises(UserError, match="mild weights pull"):
        metric.score(pairs()[:1])
