from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset_tools.errors import UserError
from mild.evaluation.methods import Case, Setup
from mild.evaluation.methods.lama import LaMaMethod
from mild.evaluation.settings import EvaluateSettings


class Grey(torch.nn.Module):
    """Paints what its one weight says; shows its input only where there is no hole."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return image * (1 - mask) + mask * self.value


class Mirror(torch.nn.Module):
    """Gives the picture that it was given, left and right and top and bottom exchanged."""

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.flip(image, [2, 3])


class Sizes(torch.nn.Module):
    """Paints in red how many pixels its mask has, in green its input's height and in blue its width."""

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        red, green, blue = float(mask.sum()), float(image.shape[2]), float(image.shape[3])
        return torch.tensor([red, green, blue])[None, :, None, None].expand(image.shape) / 255


@pytest.fixture
def method(tmp_path: Path) -> Callable[..., LaMaMethod]:
    """A method whose file holds a module, its digest set."""

    def made(module: torch.nn.Module, **settings: object) -> LaMaMethod:
        path = tmp_path / "big-lama.pt"
        torch.jit.save(torch.jit.script(module), path)
        return LaMaMethod(network=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest(), **settings)

    return made


def test_the_network_of_the_file_paints_the_hole_alone(
    method: Callable[..., LaMaMethod], noise_case: Callable[..., Case], setup: Setup
) -> None:
    case, other = noise_case(), noise_case(1, 40, 48)
    for value, expected in ((0.2, 51), (0.6, 153), (1.7, 255)):
        for one, result in zip(
            (case, other), method(Grey(value)).open(setup).erase([case, other], [0, 0]), strict=True
        ):
            assert result.dtype == np.uint8 and (result[one.hole] == expected).all()
            assert np.array_equal(result[~one.hole], one.image[~one.hole])


def test_pictures_are_mirrored_at_the_bottom_and_right_up_to_eight_pixels(
    method: Callable[..., LaMaMethod], noise_case: Callable[..., Case], setup: Setup
) -> None:
    case = noise_case()
    padded = np.pad(case.image, ((0, 40 - 34), (0, 48 - 45), (0, 0)), mode="symmetric")
    (result,) = method(Mirror()).open(setup).erase([case], [0])
    assert np.array_equal(result[case.hole], padded[::-1, ::-1][:34, :45][case.hole])


@pytest.mark.parametrize(("dilation", "pixels"), [(0, 12 * 13), (1, 14 * 15)])
def test_the_network_s_mask_is_wider_than_the_hole(
    method: Callable[..., LaMaMethod], noise_case: Callable[..., Case], setup: Setup, dilation: int, pixels: int
) -> None:
    case = noise_case()
    (result,) = method(Sizes(), dilation=dilation).open(setup).erase([case], [0])
    assert (result[case.hole] == (pixels, 40, 48)).all()
    assert np.array_equal(result[~case.hole], case.image[~case.hole])


def test_large_pictures_are_reduced_where_that_is_asked_for(
    method: Callable[..., LaMaMethod], noise_case: Callable[..., Case], setup: Setup
) -> None:
    case = noise_case(height=60, width=120)
    for longest, expected in ((None, (64, 120)), (120, (64, 120)), (60, (32, 64))):
        (result,) = method(Sizes(), longest_side=longest).open(setup).erase([case], [0])
        assert (result[case.hole][:, 1:] == expected).all()
        assert np.array_equal(result[~case.hole], case.image[~case.hole])


def test_a_program_that_nobody_vouches_for_is_not_loaded(
    method: Callable[..., LaMaMethod], setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted = method(Grey(0.5))
    monkeypatch.setattr(torch.jit, "load", None)
    for sha256, said in ((None, f"set sha256 to {trusted.sha256}"), ("0" * 64, "and not 000")):
        doubtful = LaMaMethod(network=trusted.network, sha256=sha256)
        assert said in str(doubtful.missing(setup))
        with pytest.raises(UserError, match=said):
            doubtful.open(setup)
    assert trusted.missing(setup) is None
    assert trusted.weights(setup) == {"lama": trusted.sha256}


def test_what_is_no_torchscript_is_refused(tmp_path: Path, setup: Setup) -> None:
    path = tmp_path / "big-lama.pt"
    path.write_bytes(b"anything else")
    method = LaMaMethod(network=str(path), sha256=hashlib.sha256(b"anything else").hexdigest())
    with pytest.raises(UserError, match="it is no TorchScript"):
        method.open(setup)


def test_absent_weights_are_told_with_the_cure(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("MILD_WEIGHTS", raising=False)
    (method,) = EvaluateSettings(methods=["lama"]).methods
    assert "mild weights pull lama" in str(method.missing(setup))
    assert "no network of the table" in str(LaMaMethod(network=str(tmp_path / "absent.pt")).missing(setup))


def test_the_fingerprint_tells_what_decides_and_nothing_else(method: Callable[..., LaMaMethod], setup: Setup) -> None:
    first = method(Grey(0.5))
    same = first.fingerprint(setup)
    assert first.model_copy(update={"name": "other", "batch_size": 3}).fingerprint(setup) == same
    assert first.model_copy(update={"dilation": 6}).fingerprint(setup) != same
    assert first.model_copy(update={"longest_side": 512}).fingerprint(setup) != same
    assert method(Grey(0.25)).fingerprint(setup) != same
