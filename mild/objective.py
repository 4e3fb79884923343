"""The training objective: eq. 4 a branch, eq. 5 over both, for whatever a base's UNet predicts."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler

from mild.settings import WarmUpSettings

# Axes of a latent (batch, channels, height, width) that a loss is averaged over.
_LATENT_AXES = (1, 2, 3)


def prediction_target(
    scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the UNet should output, by the scheduler's ``prediction_type``.

    The paper's eq. 4 is written for ``epsilon``; bases trained otherwise are given their own target:
    ``epsilon`` the noise, ``sample`` the clean latent x_0, ``v_prediction`` sqrt(a_t) eps - sqrt(1 - a_t) x_0.

    Args:
        latents: clean latents x_0, (B, C, h, w).
        noise: eps, the same shape.
        timesteps: t, (B,) int64.

    Raises:
        ValueError: the scheduler has another prediction type.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return latents
    if kind == "v_prediction":
        velocity: torch.Tensor = scheduler.get_velocity(latents, noise, timesteps)
        return velocity
    raise ValueError(f"unknown prediction type {kind!r} of the base's scheduler")


def background_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_bg of eq. 4, a value a sample: (B,) from two (B, C, h, w).

    Squared errors are averaged over the C h w elements rather than summed, in both branches alike, so that
    lambda and the learning rate keep their meaning at any resolution.
    """
    return (prediction.float() - target.float()).square().mean(_LATENT_AXES)


def foreground_loss(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """L_k of eq. 4, a value a sample: (B,) from two (B, C, h, w) and the person's mask M_k, (B, 1, h, w) in 0..1.

    Averaged over all C h w elements, as in `background_loss`: a person weighs as much as the area that they fill.
    """
    return (mask * (prediction.float() - target.float())).square().mean(_LATENT_AXES)


def foreground_weight(settings: WarmUpSettings, step: int) -> float:
    """lambda_s of eq. 5 at training step ``step``, counted from 0."""
    if step < settings.start:
        return 0.0
    if step >= settings.end:
        return settings.weight
    return settings.weight * (step - settings.start) / (settings.end - settings.start)
