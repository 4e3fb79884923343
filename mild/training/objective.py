"""The training objective: eq. 4 a branch, eq. 5 over both, for whatever a base's UNet predicts.

Which adapter a step trains follows eq. 5 (sections 3.5 and G.1: the background first, then both) or, with
``protect_background``, Algorithm 2 (the foreground first, the background frozen): see `stage_at`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch.nn import functional as F

from mild.model.backbone import Branch
from mild.settings import RegionLossSettings, TrainSettings, WarmUpSettings

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


def implied_noise(
    scheduler: DDPMScheduler, latents: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The noise that takes clean latents x_0 (B, C, h, w) to ``noisy`` ones at time steps (B,).

    Of latents that were noised it is that noise; of states that sampling comes by, what is still to be taken away.
    """
    share = scheduler.alphas_cumprod.to(noisy)[timesteps][:, None, None, None]
    return (noisy - share.sqrt() * latents) / (1 - share).sqrt()


def background_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    known: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_bg of eq. 4, a value a sample: (B,) from two (B, C, h, w).

    Squared errors are averaged over the C h w elements rather than summed, in both branches alike, so that
    lambda and the learning rate keep their meaning at any resolution.

    Args:
        known: (B, 1, h, w), 1 where the background is known and so judged, else 0; None: everywhere, as in eq. 4.
        weights: of the squared errors, (B, 1, h, w) with a mean of 1 a sample; None: all count the same.
    """
    error = prediction.float() - target.float()
    squares = (error if known is None else known * error).square()
    return (squares if weights is None else weights * squares).mean(_LATENT_AXES)


def foreground_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    region: RegionLossSettings | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_k of eq. 4 or the region-aware loss, a value a sample: (B,) from two (B, C, h, w).

    Averaged over all C h w elements, as in `background_loss`: a person weighs as much as the area that they fill.

    Args:
        mask: the person's mask M_k, (B, 1, h, w) in 0..1.
        region: weights of `region_loss`; None: eq. 4.
        weights: as for `background_loss`; under the region-aware loss they scale the errors from which it starts.
    """
    if weights is not None:
        prediction, target = weights.sqrt() * prediction.float(), weights.sqrt() * target.float()
    if region is not None:
        return region_loss(prediction, target, mask, region)
    return (mask * (prediction.float() - target.float())).square().mean(_LATENT_AXES)


def cell_weights(repainted: torch.Tensor, outside: float) -> torch.Tensor:
    """Weights of squared errors, of ``repainted``'s shape (B, 1, h, w), with a mean of 1 a sample.

    Args:
        repainted: 1 in cells that are to be painted anew, else 0.
        outside: how much errors elsewhere count against those there, 0..1.
    """
    weights = outside + (1 - outside) * repainted.float()
    return weights / weights.mean(_LATENT_AXES, keepdim=True)


def known_cells(known: torch.Tensor, grid: tuple[int, int] | torch.Size) -> torch.Tensor:
    """Where the background is known on a latent's ``grid`` (h, w): cells all of whose pixels are.

    Args:
        known: (B, 1, H, W), 1 where it is known, else 0.

    Returns:
        (B, 1, h, w), 0 or 1.
    """
    return 1 - F.adaptive_max_pool2d(1 - known, (grid[0], grid[1]))


def extents_loss(logits: torch.Tensor, target: torch.Tensor, judged: torch.Tensor) -> torch.Tensor:
    """Cross-entropy plus Dice loss of `mild.model.extents`, a value a sample: (B,) from three (B, 1, H, W).

    Dice as Milletari et al. 2016 ("V-Net", section 3), of samples in which there is something to find; in the others
    every pixel found would cost as much as all that is missed in a hundred of these, and the head would never answer
    yes. Of a sample that is judged nowhere the loss is 0.

    Args:
        target: 0..1.
        judged: 0..1.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    found = judged * logits.sigmoid()
    both, there = (found * target).sum(_LATENT_AXES), (judged * target).sum(_LATENT_AXES)
    dice = 1 - (2 * both + 1) / (found.sum(_LATENT_AXES) + there + 1)
    return (judged * entropy).sum(_LATENT_AXES) / judged.sum(_LATENT_AXES).clamp(min=1) + dice * (there > 0)


def region_loss(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, settings: RegionLossSettings
) -> torch.Tensor:
    """The region-aware loss of a foreground branch (appendix D, Algorithm 2, line 14), a value a sample: (B,).

    The paper has it "emphasize both the core masked region and its boundaries via residual and gradient-based
    penalties" and gives no formula. Here, with the error e = prediction - target and I = 1 where M_k, cut at 1/2,
    stays after an erosion by a square of ``width`` cells on each side (what lies outside the picture does not erode),

        L = core     * || M I e ||^2
          + boundary * || M (1 - I) e ||^2
          + gradient * sum over pairs of neighbouring cells i, j of || M_i M_j (e_j - e_i) ||^2

    all divided by C h w. The band lies inside the mask, as everything in eq. 4 does: beyond it the target shows
    somebody else. So core = boundary = 1 and gradient = 0 is eq. 4, whatever the mask. The last term compares the
    slopes of prediction and target, horizontally and vertically, as the gradient difference loss of Mathieu et al.
    2016 ("Deep multi-scale video prediction beyond mean square error", section 3.3) does. Algorithm 2 hands it z_0;
    an error of the noise is one of z_0 but for a factor of the time step, so it is taken in what the base predicts.

    Args:
        prediction, target: (B, C, h, w).
        mask: M_k, (B, 1, h, w) in 0..1.
    """
    return torch.stack(list(region_terms(prediction, target, mask, settings).values())).sum(0)


def region_terms(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, settings: RegionLossSettings
) -> dict[str, torch.Tensor]:
    """The three terms that add up to `region_loss`, weighted: ``core``, ``boundary`` and ``gradient``, (B,) each."""
    mask = mask.float()
    error = prediction.float() - target.float()
    side = 2 * settings.width + 1
    outside = (mask < 0.5).float()
    inside = 1 - F.max_pool2d(outside, side, stride=1, padding=settings.width)
    squares = (mask * error).square()
    slopes = torch.zeros_like(squares[:, 0, 0, 0])
    for axis in (2, 3):
        both = mask.narrow(axis, 1, mask.shape[axis] - 1) * mask.narrow(axis, 0, mask.shape[axis] - 1)
        slopes = slopes + (both * error.diff(dim=axis)).square().sum(_LATENT_AXES)
    return {
        "core": settings.core * (inside * squares).mean(_LATENT_AXES),
        "boundary": settings.boundary * ((1 - inside) * squares).mean(_LATENT_AXES),
        "gradient": settings.gradient * slopes / error[0].numel(),
    }


@dataclass(frozen=True)
class Stage:
    """What a training step optimizes (``GetTrainingStage`` of Algorithm 2).

    L_bg is computed in every stage, the foreground's losses where ``weight`` is above 0. Whatever the branches share
    (SMA, HMG, offsets, prompt prefix) is trained by each loss that is computed.
    """

    weight: float
    """lambda_s."""
    adapters: tuple[Branch, ...]
    """The adapters that are trained."""

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches whose losses are computed."""
        return ("bg", "fg") if self.weight > 0 else ("bg",)


def stage_at(settings: TrainSettings, step: int) -> Stage:
    """The stage of training step ``step``, counted from 0.

    By eq. 5, the default, ``bg`` is trained throughout and ``fg`` as soon as lambda_s > 0. With
    ``protect_background`` (Algorithm 2, lines 19 to 21), ``bg`` is not trained before that step.
    """
    weight = foreground_weight(settings.warm_up, step)
    background: tuple[Branch, ...] = ("bg",) if step >= settings.protect_background else ()
    foreground: tuple[Branch, ...] = ("fg",) if weight > 0 else ()
    return Stage(weight, background + foreground)


def freeze(adapters: Mapping[Branch, Iterable[torch.nn.Parameter]], stage: Stage) -> None:
    """``FreezeLoRA`` of Algorithm 2, line 20: drop the gradients of the adapters that the stage does not train.

    To be called after ``backward`` and before the optimizer's step, which leaves parameters without a gradient as
    they are, weight decay included.

    Args:
        adapters: the parameters of each.
    """
    for branch, parameters in adapters.items():
        if branch not in stage.adapters:
            for parameter in parameters:
                parameter.grad = None


def foreground_weight(settings: WarmUpSettings, step: int) -> float:
    """lambda_s of eq. 5 at training step ``step``, counted from 0."""
    if step < settings.start:
        return 0.0
    if step >= settings.end:
        return settings.weight
    return settings.weight * (step - settings.start) / (settings.end - settings.start)
