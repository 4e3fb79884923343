from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from dataset_tools.errors import UserError
from mild.evaluation.methods import Case, Setup
from mild.evaluation.methods.clipaway import CLIPAwayMethod, alpha_clip_of, projection_of, without
from mild.evaluation.methods.sdxl import brought_back, scaled_case
from mild.evaluation.settings import EvaluateSettings

WIDTH, PATCH, GRID, SEEN, KNOWN, TOKENS = 128, 4, 3, 24, 20, 32
"""Of Alpha-CLIP (two heads), its patches, their number in a row, its embeddings, the adapter's, the UNet's text."""
CROSSING = (1, 3, 5, 7)
"""Which of the UNet's attention layers look at text: down, up twice, and middle, as diffusers counts them."""
ADAPTER: dict[str, dict[str, tuple[int, ...]]] = {
    "image_proj": {"proj.weight": (4 * TOKENS, KNOWN), "proj.bias": (4 * TOKENS,)}
    | {"norm.weight": (TOKENS,), "norm.bias": (TOKENS,)},
    "ip_adapter": {
        f"{number}.to_{which}_ip.weight": (wide, TOKENS)
        for number, wide in zip(CROSSING, (16, 16, 16, 32), strict=True)
        for which in "kv"
    },
}


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """Random weights that keep lengths about as they are; those of norms are about 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        norm = len(shape) == 1 and name.endswith("weight")
        weights[name] = torch.randn(shape, generator=generator) * scale / (4 if len(shape) == 1 else shape[-1] ** 0.5)
        weights[name] += float(norm)
    return weights


def alpha_clip_weights(seed: int = 0) -> dict[str, Tensor]:
    """In the names of ``model.visual`` of Alpha-CLIP."""
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (WIDTH,),
        "positional_embedding": (GRID**2 + 1, WIDTH),
        "proj": (WIDTH, SEEN),
        "conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "conv1_alpha.weight": (WIDTH, 1, PATCH, PATCH),
    }
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    for layer in range(2):
        for name, (out, into) in {
            "attn.in_proj": (3 * WIDTH, WIDTH),
            "attn.out_proj": (WIDTH, WIDTH),
            "mlp.c_fc": (4 * WIDTH, WIDTH),
            "mlp.c_proj": (WIDTH, 4 * WIDTH),
        }.items():
            key = f"transformer.resblocks.{layer}.{name}"
            shapes |= {f"{key}.weight": (out, into), f"{key}.bias": (out,)}
        for name in ("ln_1", "ln_2"):
            key = f"transformer.resblocks.{layer}.{name}"
            shapes |= {f"{key}.weight": (WIDTH,), f"{key}.bias": (WIDTH,)}
    weights = drawn(shapes, seed)
    # So that where it looks makes a difference.
    weights["conv1_alpha.weight"] *= 8
    return weights


def openai(weights: dict[str, Tensor], image: Tensor, alpha: Tensor) -> Tensor:
    """What Alpha-CLIP's encoder computes (``VisionTransformer.forward``), written down plainly."""

    def normed(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    patches = functional.conv2d(image, weights["conv1.weight"], stride=PATCH)
    patches = patches + functional.conv2d(alpha, weights["conv1_alpha.weight"], stride=PATCH)
    x = torch.cat([weights["class_embedding"].expand(len(image), 1, -1), patches.flatten(2).mT], dim=1)
    x = normed(x + weights["positional_embedding"], "ln_pre")
    for layer in range(2):
        block = f"transformer.resblocks.{layer}"
        q, k, v = (
            part.unflatten(2, (-1, 64)).transpose(1, 2)
            for part in linear(normed(x, f"{block}.ln_1"), f"{block}.attn.in_proj").chunk(3, dim=2)
        )
        heads = (q @ k.mT / 8).softmax(-1) @ v
        x = x + linear(heads.transpose(1, 2).flatten(2), f"{block}.attn.out_proj")
        hidden = linear(normed(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}.mlp.c_proj")
    return normed(x[:, 0], "ln_post") @ weights["proj"]


def projection_weights(seed: int = 0, out: int = KNOWN) -> dict[str, Tensor]:
    """Six times Linear, LayerNorm, GELU, and Linear; the fourth widens, as published."""
    widths = [SEEN] * 4 + [out] * 3
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (into, to) in enumerate(zip(widths, [*widths[1:], out], strict=True)):
        shapes |= {f"{3 * layer}.weight": (to, into), f"{3 * layer}.bias": (to,)}
        if layer < 6:
            shapes |= {f"{3 * layer + 1}.weight": (to,), f"{3 * layer + 1}.bias": (to,)}
    return drawn(shapes, seed)


def projected(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """What these layers compute, written down plainly."""
    for layer in range(7):
        x = functional.linear(x, weights[f"{3 * layer}.weight"], weights[f"{3 * layer}.bias"])
        if layer < 6:
            norm = f"{3 * layer + 1}"
            x = functional.layer_norm(x, x.shape[-1:], weights[f"{norm}.weight"], weights[f"{norm}.bias"])
            x = functional.gelu(x)
    return x


def adapter_weights(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """As drawn, loud enough to be heard beside the text."""
    return {part: drawn(shapes, seed, scale=4) for part, shapes in ADAPTER.items()}


@pytest.fixture(scope="module")
def base(sd15: Callable[..., Path]) -> Path:
    return sd15()


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], tuple[str, str]]:
    """Writes a file of weights; gives its name and digest."""

    def written(name: str, held: Any) -> tuple[str, str]:
        path = tmp_path_factory.mktemp("parts") / name
        if path.suffix == ".safetensors":
            save_file(held, path)
        else:
            torch.save(held, path)
        return str(path), hashlib.sha256(path.read_bytes()).hexdigest()

    return written


@pytest.fixture(scope="module")
def method(base: Path, write: Callable[[str, Any], tuple[str, str]]) -> CLIPAwayMethod:
    """The layout of what is published: two pickles, and a file of safetensors."""
    adapter, adapter_sha256 = write("ip-adapter_sd15.bin", adapter_weights())
    alpha_clip, alpha_clip_sha256 = write("clip_l14.pth", alpha_clip_weights())
    return CLIPAwayMethod(
        base=str(base),
        ip_adapter=adapter,
        ip_adapter_sha256=adapter_sha256,
        alpha_clip=alpha_clip,
        alpha_clip_sha256=alpha_clip_sha256,
        projection=write("model.safetensors", projection_weights())[0],
        inference_steps=2,
        resolution=32,
        dilation=2,
    )


class Crossing(nn.Module):
    """Attention of text and four tokens of a picture beside it: IP-Adapter's, as CLIPAway has it, written plainly."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key, self.value = key, value

    def forward(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object) -> Tensor:
        text, picture = encoder_hidden_states[:, :-4], encoder_hidden_states[:, -4:]
        asked = attn.head_to_batch_dim(attn.to_q(hidden_states))

        def answer(keys: Tensor, values: Tensor) -> Tensor:
            shares = attn.get_attention_scores(asked, attn.head_to_batch_dim(keys), None)
            found: Tensor = attn.batch_to_head_dim(shares @ attn.head_to_batch_dim(values))
            return found

        told = answer(attn.to_k(text), attn.to_v(text)) + answer(picture @ self.key.T, picture @ self.value.T)
        given: Tensor = attn.to_out[0](told)
        return given


def test_a_result_is_that_of_the_published_algorithm(
    base: Path, method: CLIPAwayMethod, noise_case: Callable[..., Case], setup: Setup
) -> None:
    """Each step of ``CLIPAway.generate`` plainly, on the stock pipeline, whose own IP-Adapter is not used."""
    case = noise_case()
    wide = cv2.dilate(case.masks[0].astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    image, hole = scaled_case(replace(case, masks=wide[None]), (32, 40))
    side = GRID * PATCH
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) / 255
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    mask = np.asarray(hole.resize((side, side), Image.Resampling.BILINEAR)) / 255
    inside, outside = (
        projected(
            projection_weights(),
            openai(alpha_clip_weights(), picture, torch.from_numpy((alpha - 0.5) / 0.26)[None, None].float()),
        )
        for alpha in (mask, 1 - mask)
    )
    direction = inside[0] / inside[0].norm()
    away = outside - outside[0].dot(direction) * direction
    nothing = projected(projection_weights(), torch.zeros(1, SEEN))

    adapter = adapter_weights()
    head, layers = adapter["image_proj"], adapter["ip_adapter"]
    four = functional.linear(torch.cat([away, nothing]), head["proj.weight"], head["proj.bias"])
    tokens = functional.layer_norm(four.view(2, 4, TOKENS), (TOKENS,), head["norm.weight"], head["norm.bias"])
    stock = StableDiffusionInpaintPipeline.from_pretrained(base, safety_checker=None, feature_extractor=None)
    processors = dict(stock.unet.attn_processors)
    crossing = [name for name in processors if "attn2" in name]
    for number, name in zip(CROSSING, crossing, strict=True):
        processors[name] = Crossing(layers[f"{number}.to_k_ip.weight"], layers[f"{number}.to_v_ip.weight"])
    stock.unet.set_attn_processor(processors)
    asked, avoided = stock.encode_prompt(
        "", "cpu", 1, True, "monochrome, lowres, bad anatomy, worst quality, low quality"
    )
    painted = stock(
        prompt_embeds=torch.cat([asked, tokens[:1]], dim=1),
        negative_prompt_embeds=torch.cat([avoided, tokens[1:]], dim=1),
        image=image,
        mask_image=hole,
        height=32,
        width=40,
        num_inference_steps=2,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    (found,) = method.open(setup).erase([case], [5])
    assert np.abs(found.astype(int) - brought_back(painted, case)).max() <= 1
    assert np.array_equal(found[~case.hole], case.image[~case.hole])


@pytest.mark.slow
def test_every_part_is_heard_in_the_result(
    method: CLIPAwayMethod, write: Callable[[str, Any], tuple[str, str]], noise_case: Callable[..., Case], setup: Setup
) -> None:
    case = noise_case()
    results, fingerprints = [method.open(setup).erase([case], [5])[0]], {method.fingerprint(setup)}
    adapter, adapter_sha256 = write("other.bin", adapter_weights(1))
    alpha_clip, alpha_clip_sha256 = write("other.pth", alpha_clip_weights(1))
    for changed in (
        {"ip_adapter": adapter, "ip_adapter_sha256": adapter_sha256},
        {"alpha_clip": alpha_clip, "alpha_clip_sha256": alpha_clip_sha256},
        {"projection": write("other.safetensors", projection_weights(1))[0]},
    ):
        other = method.model_copy(update=changed)
        results.append(other.open(setup).erase([case], [5])[0])
        fingerprints.add(other.fingerprint(setup))
    assert len({result.tobytes() for result in results}) == len(fingerprints) == 4


def test_a_case_comes_out_alike_alone_and_beside_others(
    method: CLIPAwayMethod, noise_case: Callable[..., Case], setup: Setup
) -> None:
    eraser = method.open(setup)
    cases = [noise_case(1), noise_case(2, 50, 40), noise_case(3)]
    for case, seed, result in zip(cases, [7, 8, 9], eraser.erase(cases, [7, 8, 9]), strict=True):
        assert np.abs(eraser.erase([case], [seed])[0].astype(int) - result).max() <= 1


def test_an_adapter_with_prefixes_is_the_same_as_one_of_two_dictionaries(
    method: CLIPAwayMethod, write: Callable[[str, Any], tuple[str, str]], noise_case: Callable[..., Case], setup: Setup
) -> None:
    flat = {f"{part}.{name}": tensor for part, held in adapter_weights().items() for name, tensor in held.items()}
    other = method.model_copy(
        update={"ip_adapter": write("ip-adapter_sd15.safetensors", flat)[0], "ip_adapter_sha256": None}
    )
    first, second = (one.open(setup).erase([noise_case()], [5])[0] for one in (method, other))
    assert np.array_equal(first, second)


def test_what_is_shared_with_the_hole_is_taken_away() -> None:
    generator = torch.Generator().manual_seed(0)
    background, foreground = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    left = without(background, foreground)
    assert (left * foreground).sum(1).abs().max() < 1e-12
    # What was taken away lies along the foreground: the cross products of all pairs of coordinates vanish.
    taken = background - left
    assert (taken[:, :, None] * foreground[:, None] - foreground[:, :, None] * taken[:, None]).abs().max() < 1e-12
    closed = without(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [5.0, 5.0]]))
    assert closed.tolist() == [[3, 0], [0, 0]]


def test_alpha_clip_computes_what_openai_s_layout_says() -> None:
    weights = alpha_clip_weights()
    shown = torch.randn(3, 4, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = alpha_clip_of(weights, "it").eval()(pixel_values=shown).image_embeds
        unseen = alpha_clip_of(weights, "it").eval()(pixel_values=shown * torch.tensor([1, 1, 1, 0])[:, None, None])
    assert torch.allclose(found, openai(weights, shown[:, :3], shown[:, 3:]), rtol=1e-4, atol=1e-5)
    assert (found - unseen.image_embeds).abs().max() > 0.1


@pytest.mark.parametrize("change", ["conv1_alpha.weight", "transformer.resblocks.1.ln_2.bias", "text_projection"])
def test_another_clip_is_refused(change: str) -> None:
    """One that lacks a weight, alpha's among them; and one that has more."""
    weights = alpha_clip_weights()
    if weights.pop(change, None) is None:
        weights[change] = torch.zeros(3)
    with pytest.raises(UserError, match="it is not Alpha-CLIP's encoder of pictures"):
        alpha_clip_of(weights, "it")


def test_the_projection_computes_what_its_layers_say() -> None:
    x = torch.randn(3, SEEN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = projection_of(projection_weights(), "it")(x)
    assert torch.allclose(found, projected(projection_weights(), x), rtol=1e-4, atol=1e-5)


def test_files_of_other_networks_are_refused(
    method: CLIPAwayMethod, write: Callable[[str, Any], tuple[str, str]], setup: Setup
) -> None:
    more = adapter_weights()
    more["ip_adapter"]["9.to_k_ip.weight"] = torch.zeros(16, TOKENS)
    wide = adapter_weights()
    wide["ip_adapter"]["1.to_k_ip.weight"] = torch.zeros(24, TOKENS)
    narrow = projection_weights(out=KNOWN - 1)
    for part, held, said in (
        ("ip_adapter", more, "is no IP-Adapter of 4 layers"),
        ("ip_adapter", {"image_proj": more["image_proj"]}, "is no IP-Adapter of 4 layers"),
        ("ip_adapter", wide, "another UNet's IP-Adapter"),
        ("projection", {"0.weight": torch.zeros(3, 3)}, "is no projection of CLIPAway"),
        ("projection", narrow, f"takes {SEEN} numbers to {KNOWN - 1}"),
    ):
        name, sha256 = write("other.safetensors" if part == "projection" else "other.bin", held)
        changed = {part: name} if part == "projection" else {part: name, f"{part}_sha256": sha256}
        with pytest.raises(UserError, match=said):
            method.model_copy(update=changed).open(setup)


def test_pickles_need_their_digest_and_hold_nothing_but_tensors(
    method: CLIPAwayMethod, write: Callable[[str, Any], tuple[str, str]], setup: Setup
) -> None:
    doubtful = method.model_copy(update={"alpha_clip_sha256": None})
    assert f"set sha256 to {method.alpha_clip_sha256}" in str(doubtful.missing(setup))
    name, sha256 = write("program.pth", {"conv1.weight": Path("anything but tensors")})
    with pytest.raises(UserError, match="holds more than tensors"):
        method.model_copy(update={"alpha_clip": name, "alpha_clip_sha256": sha256}).open(setup)


def test_all_that_is_absent_is_told_at_once(
    method: CLIPAwayMethod, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILD_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    (usual,) = EvaluateSettings(methods=["clipaway"]).methods
    told = str(usual.missing(setup))
    assert "mild weights pull sd15-inpainting ip-adapter-sd15 alpha-clip-l14; projection is not set" in told
    assert method.missing(setup) is None
    assert set(method.weights(setup)) == {"base", "ip-adapter", "alpha-clip", "projection"}
    gone = method.model_copy(update={"projection": str(tmp_path / "model.safetensors")})
    assert "projection" in str(gone.missing(setup)) and "name the file" in str(gone.missing(setup))
