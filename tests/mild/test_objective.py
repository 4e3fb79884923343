from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from mild.objective import background_loss, foreground_loss, foreground_weight, prediction_target
from mild.settings import WarmUpSettings


def _draw(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).standard_normal(shape))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_unet_that_hits_the_target_lets_the_sampler_find_the_clean_latent(kind: str) -> None:
    """Whatever the base predicts: DDIM's own formula turns the training target back into x_0."""
    scheduler = DDPMScheduler(prediction_type=kind, clip_sample=False)
    sampler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    sampler.set_timesteps(1000)
    latents, noise = _draw(1, 4, 5, 6), _draw(1, 4, 6, 5).reshape(1, 4, 5, 6)
    for step in (0, 400, 900):
        timesteps = torch.tensor([step])
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = prediction_target(scheduler, latents, noise, timesteps)
        found = sampler.step(target, step, noisy).pred_original_sample
        torch.testing.assert_close(found, latents, rtol=1e-3, atol=1e-3)


def test_epsilon_is_the_papers_eq_4() -> None:
    scheduler = DDPMScheduler(prediction_type="epsilon")
    latents, noise = _draw(2, 4, 3, 3), _draw(2, 4, 3, 3) + 1
    assert torch.equal(prediction_target(scheduler, latents, noise, torch.tensor([1, 2])), noise)


def test_an_unknown_prediction_type_is_refused() -> None:
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="flow"):
        prediction_target(scheduler, _draw(1), _draw(1), torch.tensor([0]))


def test_losses_are_mean_squares_in_closed_form() -> None:
    """A difference of 3 everywhere: 9 for the background; with a person on a quarter of the grid, 9 / 4."""
    prediction, target = torch.full((2, 4, 4, 4), 5.0), torch.full((2, 4, 4, 4), 2.0)
    mask = torch.zeros(2, 1, 4, 4)
    mask[1, :, :2, :2] = 1
    assert background_loss(prediction, target).tolist() == [9, 9]
    assert foreground_loss(prediction, target, mask).tolist() == [0, 9 / 4]


def test_a_soft_mask_weighs_the_error_before_it_is_squared() -> None:
    """Eq. 4 has the mask inside the norm: half covered, a quarter of the loss."""
    prediction, target = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    assert foreground_loss(prediction, target, torch.full((1, 1, 2, 2), 0.5)).item() == 0.25


def test_what_lies_outside_the_mask_gets_no_gradient() -> None:
    prediction = _draw(1, 4, 6, 6).requires_grad_()
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    mask[..., :3] = 1
    foreground_loss(prediction, torch.zeros_like(prediction), mask).sum().backward()
    assert prediction.grad is not None
    assert prediction.grad[..., 3:].abs().max() == 0
    assert prediction.grad[..., :3].abs().min() > 0


def test_the_warm_up_is_eq_5() -> None:
    settings = WarmUpSettings(start=8000, end=12000, weight=0.5)
    steps = [0, 7999, 8000, 9000, 10000, 12000, 12001, 20000]
    assert [foreground_weight(settings, s) for s in steps] == [0, 0, 0, 0.125, 0.25, 0.5, 0.5, 0.5]


@given(st.integers(0, 50), st.integers(0, 50), st.floats(0, 10), st.integers(0, 120))
def test_the_weight_never_falls_and_stays_within_its_bounds(start: int, length: int, weight: float, step: int) -> None:
    settings = WarmUpSettings(start=start, end=start + length, weight=weight)
    before, after = foreground_weight(settings, step), foreground_weight(settings, step + 1)
    assert 0 <= before <= after <= weight
