"""LPIPS against its formula written out, on random weights in torchvision's layout under the learned heads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
import torchvision
from skimage import data

from dataset_tools.errors import UserError
from mild.metrics.lpips import LPIPS, SMALLEST, Backbone
from mild.metrics.metric import Judged, NotComputed

RECTIFIERS: dict[Backbone, list[int]] = {
    "alex": [1, 4, 7, 9, 11], "vgg": [3, 8, 15, 22, 29], "squeeze": [1, 4, 7, 9, 10, 11, 12],
}  # fmt: skip
"""Layers of torchvision's ``features`` whose output is compared (lpips/pretrained_networks.py of the official code)."""
HEADS = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
MODELS = {
    "alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16, "squeeze": torchvision.models.squeezenet1_1,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Backbone], LPIPS]:
    """Settings with a file of random weights in torchvision's layout; the classifier, unused, is one number."""
    folder = tmp_path_factory.mktemp("backbones")

    def save(backbone: Backbone) -> LPIPS:
        path = folder / f"{backbone}.pth"
        if not path.exists():
            generator = torch.Generator().manual_seed(0)
            with torch.device("meta"):
                shapes = MODELS[backbone](weights=None).state_dict()
            state = {}
            for name, like in shapes.items():
                if name.startswith("classifier"):
                    state[name] = torch.zeros(1).expand(like.shape)
                elif like.ndim == 1:
                    state[name] = torch.zeros(like.shape)
                else:
                    state[name] = torch.randn(like.shape, generator=generator) * (2 / like[0].numel()) ** 0.5
            torch.save(state, path)
        return LPIPS(backbone=backbone, weights=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())

    return save


def judged(result: np.ndarray, truth: np.ndarray) -> Judged:
    nowhere = np.zeros(truth.shape[:2], bool)
    return Judged("a", truth, result, truth, ~nowhere, nowhere, ~nowhere, nowhere, None)


def pairs() -> list[Judged]:
    """Three pairs of two sizes."""
    cat = data.chelsea()
    cuts = [cat[:64, :70], cat[100:200, 100:180], cat[200:264, 200:270]]
    return [judged(np.roll(cut, 3, 1) // 2 + 40, cut) for cut in cuts]


def by_definition(settings: LPIPS, one: Judged) -> float:
    """Eq. 1 of the paper: squared differences of unit vectors, weighed by channel, averaged over cells, summed."""
    with torch.device("meta"):
        network = MODELS[settings.backbone](weights=None).eval()
    network.load_state_dict(torch.load(settings.weights, weights_only=True), assign=True)
    heads = torch.load(HEADS / f"{settings.backbone}.pth", map_location="cpu", weights_only=True)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    assert one.truth is not None
    x = torch.from_numpy(np.stack([one.result, one.truth])).permute(0, 3, 1, 2) / 127.5 - 1
    x, total, level = (x - mean) / deviation, 0.0, 0
    with torch.inference_mode():
        for index, layer in enumerate(network.features[: RECTIFIERS[settings.backbone][-1] + 1]):
            x = layer(x)
            if index in RECTIFIERS[settings.backbone]:
                unit = x / x.norm(dim=1, keepdim=True)
                weight = heads[f"lin{level}.model.1.weight"].view(-1, 1, 1)
                total += float((weight * (unit[0] - unit[1]).square()).sum(0).mean())
                level += 1
    return total


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are built without drawing weights, of which the largest have 138 million, that files then replace."""
    for name in ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("backbone", ["alex", "squeeze", "vgg"])
def test_it_is_the_formula_of_the_paper_for_pictures_of_any_size(
    saved: Callable[[Backbone], LPIPS], backbone: Backbone
) -> None:
    settings = saved(backbone)
    chosen = pairs() if backbone != "vgg" else pairs()[:1]
    found = settings.score(chosen)
    assert found == pytest.approx([by_definition(settings, one) for one in chosen], rel=1e-3)
    assert min(found) > 0.01  # type: ignore[type-var]


def test_equal_pictures_are_at_distance_zero_and_several_at_once_give_what_each_gives_alone(
    saved: Callable[[Backbone], LPIPS],
) -> None:
    settings, (first, *others) = saved("squeeze"), pairs()
    assert settings.score([judged(first.result, first.result)]) == [0]
    together = settings.score([first, *others])
    assert together == pytest.approx([settings.score([one])[0] for one in (first, *others)], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["squeeze", "alex"])
def test_a_picture_too_small_for_the_network_has_no_value_and_the_next_one_has(
    saved: Callable[[Backbone], LPIPS], backbone: Backbone
) -> None:
    settings, cat, side = saved(backbone), data.chelsea(), SMALLEST[backbone]
    small, enough = (judged(cat[:n, : side + 20], cat[50 : 50 + n, : side + 20]) for n in (side - 1, side))
    none, value = settings.score([small, enough])
    assert isinstance(none, NotComputed) and f"smaller than {side} pixels" in str(none)
    assert isinstance(value, float) and value > 0
    with pytest.raises(RuntimeError):  # it is the network's own limit
        settings.open().distances([small.result], [small.result])


def test_nothing_is_said_of_no_pictures(saved: Callable[[Backbone], LPIPS]) -> None:
    assert saved("squeeze").score([]) == []


def test_weights_of_another_backbone_are_refused_in_one_line(saved: Callable[[Backbone], LPIPS]) -> None:
    wrong = saved("squeeze").model_copy(update={"backbone": "alex"})
    saved("squeeze").score(pairs()[:1])  # it is loaded, as what it is
    with pytest.raises(UserError, match=r"squeeze\.pth cannot be used as AlexNet of LPIPS") as refused:
        wrong.score(pairs()[:1])
    assert "\n" not in str(refused.value)


def test_without_weights_it_says_what_to_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILD_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for backbone in ("alex", "vgg", "squeeze"):
        metric = LPIPS(backbone=backbone)
        missing = metric.missing()
        assert missing is not None and f"mild weights pull lpips-{backbone}" in missing
        with pytest.raises(UserError, match="mild weights pull"):
            metric.score(pairs()[:1])


def test_what_decides_about_values_is_in_the_fingerprint_and_in_the_name(saved: Callable[[Backbone], LPIPS]) -> None:
    squeeze = saved("squeeze")
    assert squeeze.missing() is None
    assert squeeze.fingerprint() == squeeze.model_copy(update={"batch_size": 1}).fingerprint()
    assert squeeze.fingerprint() != saved("alex").fingerprint()
    assert [LPIPS().name, LPIPS(backbone="vgg").name, squeeze.name] == [
        "lpips",
        "lpips-vgg",
        "lpips-squeeze-squeeze-pth",
    ]
    assert "alexnet-owt-7be5be79.pth" in LPIPS().network and "squeeze.pth" in squeeze.network
