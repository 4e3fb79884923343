from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_f1_score

from dataset_tools.errors import UserError
from mild.model.backbone import BRANCHES, Branch, adapter_parameters
from mild.model.cues import CHANNELS, Cue
from mild.model.layered import LayeredUNet
from mild.settings import (
    HmgSettings,
    LoraSettings,
    MildSettings,
    OffsetSettings,
    PrefixSettings,
    RegionLossSettings,
    TrainSettings,
    WarmUpSettings,
)
from mild.training.objective import (
    Stage,
    background_loss,
    cell_weights,
    extents_loss,
    foreground_loss,
    foreground_weight,
    freeze,
    implied_noise,
    known_cells,
    prediction_target,
    region_loss,
    stage_at,
)


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


def test_the_background_is_judged_where_it_is_known_only() -> None:
    """A difference of 3, known in a quarter of the cells: 9 / 4, and no gradient elsewhere."""
    prediction, target = torch.full((1, 4, 4, 4), 5.0, requires_grad=True), torch.full((1, 4, 4, 4), 2.0)
    known = torch.zeros(1, 1, 4, 4)
    known[..., :2, :2] = 1
    loss = background_loss(prediction, target, known)
    assert loss.item() == 9 / 4
    loss.backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad != 0, known.expand(1, 4, 4, 4) == 1)


def test_a_cell_is_known_when_all_of_its_pixels_are() -> None:
    known = torch.ones(1, 1, 8, 12)
    known[..., 5, 11] = 0
    assert known_cells(known, (2, 3)).tolist() == [[[[1, 1, 1], [1, 1, 0]]]]


def _square(side: int, *, low: int, high: int) -> torch.Tensor:
    mask = torch.zeros(1, 1, side, side, dtype=torch.float64)
    mask[..., low:high, low:high] = 1
    return mask


def test_core_and_band_are_weighed_apart() -> None:
    """A person of 6 x 6 cells in 10 x 10, an error of 2: the core has 4 x 4 cells, the band 36 - 16, with width 1."""
    mask, error = _square(10, low=2, high=8), torch.full((1, 3, 10, 10), 2.0)
    for width, core in [(1, 16), (2, 4), (3, 0)]:
        settings = RegionLossSettings(core=5, boundary=7, gradient=11, width=width)
        loss = region_loss(error, torch.zeros_like(error), mask, settings)
        assert loss.item() == pytest.approx(4 * (5 * core + 7 * (36 - core)) / 100), "a constant error has no slope"


def test_the_frame_of_the_picture_is_no_outline() -> None:
    """A person who fills the left half: the band is the one column at the cut."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    settings = RegionLossSettings(core=0, boundary=1, gradient=0, width=1)
    assert region_loss(torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8), mask, settings).item() == 8 / 64


def test_the_gradient_term_is_the_mean_square_of_slopes_between_judged_neighbours() -> None:
    """An error that grows by 3 a column and 5 a row: in n x n judged cells there are n (n - 1) pairs either way."""
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    error = (3 * columns + 5 * rows).expand(1, 2, 9, 9)
    settings = RegionLossSettings(core=0, boundary=0, gradient=2, width=1)
    for n in (1, 4, 9):
        loss = region_loss(error, torch.zeros_like(error), _square(9, low=0, high=n), settings)
        assert loss.item() == pytest.approx(2 * n * (n - 1) * (9 + 25) / 81)


def test_the_gradient_term_sees_slopes_that_the_target_does_not_have() -> None:
    prediction = _draw(1, 4, 6, 6)
    settings = RegionLossSettings(core=0, boundary=0, gradient=1)
    everywhere = torch.ones(1, 1, 6, 6, dtype=torch.float64)
    assert region_loss(prediction, prediction + 7, everywhere, settings).item() == pytest.approx(0, abs=1e-10)
    assert region_loss(prediction, prediction * 2, everywhere, settings).item() > 0.1


@given(st.integers(0, 2**32), st.integers(1, 3), st.floats(0.1, 10))
def test_with_one_weight_and_no_slopes_the_region_loss_is_eq_4(seed: int, width: int, weight: float) -> None:
    """Also for soft masks, and whatever the width of the band."""
    rng = np.random.default_rng(seed)
    prediction, target = (torch.from_numpy(rng.standard_normal((2, 3, 7, 5))) for _ in range(2))
    mask = torch.from_numpy(rng.random((2, 1, 7, 5)).astype(np.float32)).clamp(0.2, 0.8) * 5 / 3 - 1 / 3
    settings = RegionLossSettings(core=weight, boundary=weight, gradient=0, width=width)
    expected = weight * foreground_loss(prediction, target, mask)
    torch.testing.assert_close(foreground_loss(prediction, target, mask, settings), expected)


def test_the_region_loss_too_is_blind_outside_the_mask() -> None:
    prediction = _draw(1, 4, 6, 6).requires_grad_()
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    mask[..., :3] = 1
    foreground_loss(prediction, torch.zeros_like(prediction), mask, RegionLossSettings()).sum().backward()
    assert prediction.grad is not None
    assert prediction.grad[..., 3:].abs().max() == 0
    assert prediction.grad[..., :3].abs().min() > 0


def _staged(start: int, end: int, protect: int) -> TrainSettings:
    return TrainSettings(warm_up=WarmUpSettings(start=start, end=end, weight=0.5), protect_background=protect)


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        # Sections 3.5 and G.1: the background first, then both.
        (_staged(2, 4, 0), {0: (0, "bg"), 1: (0, "bg"), 2: (0, "bg"), 3: (0.25, "bg fg"), 4: (0.5, "bg fg")}),
        # Algorithm 2: the foreground first, under a ramp, with the background frozen; then both.
        (_staged(0, 2, 3), {0: (0, ""), 1: (0.25, "fg"), 2: (0.5, "fg"), 3: (0.5, "bg fg"), 9: (0.5, "bg fg")}),
        (_staged(0, 0, 1), {0: (0.5, "fg"), 1: (0.5, "bg fg")}),
    ],
)
def test_which_step_trains_what(settings: TrainSettings, stages: dict[int, tuple[float, str]]) -> None:
    assert {step: stage_at(settings, step) for step in stages} == {
        step: Stage(weight, tuple(adapters.split())) for step, (weight, adapters) in stages.items()
    }


def test_a_protected_background_without_a_foreground_to_train_is_refused() -> None:
    with pytest.raises(UserError, match=r"protect_background \(5\).*set warm_up\.start \(8000\) to 0"):
        TrainSettings.check({"protect_background": 5}, origin="settings.yaml")


_PARTS = ("sma", "hmg", "offsets", "prefix")


@pytest.mark.parametrize(
    ("stage", "adapters"),
    [
        (Stage(weight=0, adapters=("bg",)), {"bg"}),
        (Stage(weight=0.5, adapters=("bg", "fg")), {"bg", "fg"}),
        (Stage(weight=0.5, adapters=("fg",)), {"fg"}),
    ],
    ids=["eq. 5 before s_0", "both", "protected"],
)
def test_gradient_reaches_exactly_what_the_stage_trains(
    stage: Stage, adapters: set[str], make_unet: Callable[[], UNet2DConditionModel]
) -> None:
    """Branch x stage x parameter group, judged by autograd itself: of the groups that a stage trains, each gets the
    gradient of the branches' losses, weighed, and of those that it does not, none; the UNet never has any."""
    layered = _trained_a_little(make_unet())
    groups = _groups(layered)
    expected: dict[str, list[torch.Tensor]] = {name: [torch.zeros_like(p) for p in ps] for name, ps in groups.items()}
    branches: list[tuple[Branch, float]] = [("bg", 1.0), ("fg", stage.weight)]
    for branch, weight in branches:
        if weight == 0:
            continue
        reached = set()
        for name, parameters in groups.items():
            loss = weight * _loss(layered, branch)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            if any(gradient is not None and gradient.abs().max() > 0 for gradient in found):
                reached.add(name)
            for total, gradient in zip(expected[name], found, strict=True):
                total += 0 if gradient is None else gradient
        assert reached == {branch, *_PARTS}, "each branch: its own adapter, and what both share"
        (weight * _loss(layered, branch)).backward()
    freeze({branch: groups[branch] for branch in BRANCHES}, stage)
    for name, parameters in groups.items():
        for parameter, gradient in zip(parameters, expected[name], strict=True):
            if name in adapters or name in _PARTS:
                found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7)
            else:
                assert parameter.grad is None, name
    trained = {id(parameter) for parameters in groups.values() for parameter in parameters}
    assert all(p.grad is None for p in layered.unet.parameters() if id(p) not in trained)


def test_a_frozen_adapter_is_not_moved_by_momentum_or_weight_decay(
    make_unet: Callable[[], UNet2DConditionModel],
) -> None:
    layered = _trained_a_little(make_unet())
    groups = _groups(layered)
    optimizer = torch.optim.AdamW(groups["bg"] + groups["fg"], lr=0.1, weight_decay=0.5)
    for stage in (Stage(1, ("bg", "fg")), Stage(1, ("fg",))):
        before = {name: [p.detach().clone() for p in groups[name]] for name in ("bg", "fg")}
        for branch in BRANCHES:
            _loss(layered, branch).backward()
        freeze({branch: groups[branch] for branch in BRANCHES}, stage)
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name in before for a, b in zip(before[name], groups[name], strict=True) if not a.equal(b)}
        assert moved == set(stage.adapters)


def _trained_a_little(unet: UNet2DConditionModel) -> LayeredUNet:
    """All parts, off their neutral start, where gates of zero keep gradients back."""
    settings = MildSettings(
        lora=LoraSettings(rank=2, alpha=2),
        hmg=HmgSettings(grid=2, width=8, map_side=16),
        offsets=OffsetSettings(spatial_offset=True, boundary_smoothing=True, width=4),
        prefix=PrefixSettings(tokens=2),
    )
    layered = LayeredUNet.create(unet, settings, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameters in _groups(layered).values():
            for parameter in parameters:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return layered


def _groups(layered: LayeredUNet) -> dict[str, list[torch.nn.Parameter]]:
    adapters = {branch: list(adapter_parameters(layered.unet, branch).values()) for branch in BRANCHES}
    return adapters | {name: list(part.parameters()) for name, part in layered.parts().items()}


def _loss(layered: LayeredUNet, branch: Branch) -> torch.Tensor:
    """One branch's loss on a fixed example with all cues."""

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))

    masks = (drawn(1, 1, 16, 16) > 0.5).float()
    present = torch.ones(1, dtype=torch.bool)
    cues = {
        name: Cue(drawn(1, CHANNELS[channel], 16, 16), present)
        for name, channel in [("pose", "pose"), ("parsing", "parsing"), ("others", "masks")]
        if not (branch == "bg" and name == "others")
    }
    with layered.branch(branch, masks, **cues):
        prediction = layered.unet(
            drawn(1, 9, 8, 8),
            torch.tensor([500]),
            encoder_hidden_states=layered.text(drawn(1, 3, 8)),
            added_cond_kwargs={"text_embeds": drawn(1, 8), "time_ids": drawn(1, 6)},
        ).sample
    target = drawn(1, 4, 8, 8)
    if branch == "bg":
        return background_loss(prediction, target).sum()
    mask = torch.nn.functional.interpolate(masks, size=(8, 8), mode="area")
    return foreground_loss(prediction, target, mask, RegionLossSettings()).sum()


def test_the_noise_that_takes_clean_latents_to_noisy_ones_is_the_one_that_was_added() -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", num_train_timesteps=1000)
    clean, noise = torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    noisy = scheduler.add_noise(clean, noise, timesteps)
    torch.testing.assert_close(implied_noise(scheduler, clean, noisy, timesteps), noise, atol=1e-4, rtol=1e-4)


def test_what_is_not_repainted_counts_as_little_as_is_said_and_weights_have_a_mean_of_one() -> None:
    prediction, target = torch.zeros(2, 4, 4, 4), torch.ones(2, 4, 4, 4)
    repainted = torch.zeros(2, 1, 4, 4)
    repainted[0, :, :2] = 1
    weights = cell_weights(repainted, 0.25)
    everywhere = torch.ones(2, 1, 4, 4)
    torch.testing.assert_close(background_loss(prediction, target, None, weights), torch.ones(2))
    torch.testing.assert_close(foreground_loss(prediction, target, everywhere, None, weights), torch.ones(2))
    target[:, :, :2] = 0
    expected = torch.tensor([0.5 * 0.25 / 0.625, 0.5])
    torch.testing.assert_close(background_loss(prediction, target, None, weights), expected)
    torch.testing.assert_close(foreground_loss(prediction, target, everywhere, None, weights), expected)


def test_the_loss_of_extents_is_cross_entropy_and_dice_where_they_are_judged() -> None:
    """By torch's own cross-entropy and torchmetrics' Dice (F1), on hard answers; elsewhere nothing counts."""
    generator = torch.Generator().manual_seed(0)
    target = (torch.rand((3, 1, 20, 20), generator=generator) < 0.4).float()
    logits = 60.0 * (torch.rand((3, 1, 20, 20), generator=generator) - 0.5).sign()
    judged = torch.zeros(3, 1, 20, 20)
    judged[0, :, :15], judged[1] = 1, 1
    found = extents_loss(logits, target, judged)
    for row in (0, 1):
        where = judged[row] > 0
        truth, answers = target[row][where], logits[row][where]
        entropy = F.binary_cross_entropy_with_logits(answers, truth)
        dice = binary_f1_score((answers > 0).float(), truth.int())
        assert found[row].item() == pytest.approx(entropy.item() + 1 - dice.item(), abs=5e-3)
    assert found[2] == 0
    found_nothing = extents_loss(logits, 0 * target, judged)[1]
    entropy = F.binary_cross_entropy_with_logits(logits[1], 0 * target[1])
    torch.testing.assert_close(found_nothing, entropy, msg="what is found where nothing is counts once, a pixel each")
    torch.testing.assert_close(extents_loss(torch.where(judged > 0, logits, -logits), target, judged), found)
