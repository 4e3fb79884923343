from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st

from mild.model.attention import install_sma, modulated_attention, remove_sma
from mild.model.leakage import gamma_chart, leakage, measure_leakage, residual_spectrum, spectrum_chart

SLACK = 1e-9


@st.composite
def rows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one query (d,), from flat to all but one-hot, and a foreground (d,) that is neither none nor all."""
    size = draw(st.integers(2, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = draw(st.sampled_from([0.0, 0.3, 2.0, 12.0])) * torch.randn(size, generator=generator, dtype=torch.float64)
    foreground = torch.rand(size, generator=generator) < draw(st.floats(0.05, 0.95))
    first = draw(st.integers(0, size - 2))
    foreground[first], foreground[first + 1] = True, False
    return logits, foreground


@st.composite
def attentions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K (B, N, heads, d) and a foreground (B, N) with tokens of both kinds."""
    batch, count, heads, dimension = draw(st.tuples(*(st.integers(*r) for r in ((1, 2), (2, 17), (1, 3), (1, 6)))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    strength = draw(st.sampled_from([0.1, 1.0, 4.0]))
    q, k = (
        strength * torch.randn(batch, count, heads, dimension, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    foreground = torch.rand(batch, count, generator=generator) < 0.4
    foreground[:, 0], foreground[:, -1] = True, False
    return q, k, foreground


def jacobian(p: torch.Tensor) -> torch.Tensor:
    """Of softmax: Diag(p) - p p^T."""
    return p.diag() - p[:, None] * p[None]


def norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


# --- what the paper proves


@given(rows())
def test_lemma_1_the_softmax_jacobian_has_norm_at_most_one_half(row: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert norm(jacobian(row[0].softmax(0))) <= 0.5 + SLACK


def test_lemma_1_is_tight() -> None:
    assert norm(jacobian(torch.tensor([0.5, 0.5], dtype=torch.float64))) == pytest.approx(0.5, abs=1e-12)


@given(rows())
def test_lemma_2_the_restricted_jacobian_is_bounded_by_twice_the_mass(row: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, foreground = row
    p = logits.softmax(0)
    mass = float(p[foreground].sum())
    assert norm(jacobian(p) * foreground) <= min(0.5, 2 * mass) + SLACK


@given(attentions())
def test_equation_33_holds_and_is_an_equality_at_the_worst_query(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Masses from a dense softmax, gamma from the streaming measurement."""
    q, k, foreground = case
    p = (torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    mass = (p * foreground[:, None, None]).sum(-1)
    gamma = leakage(q, k, foreground).gamma
    for b, h in np.ndindex(*gamma.shape):
        worst = mass[b, h][~foreground[b]].max()
        bound = math.exp(-gamma[b, h]) / (1 + math.exp(-gamma[b, h]))
        assert worst == pytest.approx(bound, rel=1e-9)
        assert bound <= math.exp(-gamma[b, h])


@given(rows(), st.floats(0, 20))
def test_equations_6_and_68_corrected_odds_shrink_by_exactly_the_factor(
    row: tuple[torch.Tensor, torch.Tensor], beta: float
) -> None:
    """As printed, p' <= exp(-beta) p, they are false, for every row whose foreground has any mass.

    Lowering the foreground's logits shrinks the normaliser too, so the mass falls by less: the odds shrink by
    exactly exp(-beta), and exp(-beta) p <= p' <= min(p, exp(-beta) p / (1 - p)).
    """
    logits, foreground = row
    before, after = ((logits - shift * foreground.double()).softmax(0)[foreground].sum() for shift in (0.0, beta))
    factor = math.exp(-beta)
    other = [(logits - shift * foreground.double()).softmax(0)[~foreground].sum() for shift in (0.0, beta)]
    assert after * other[0] == pytest.approx(float(factor * before * other[1]), rel=1e-9)
    assert after == pytest.approx(float(factor * before / (1 - (1 - factor) * before)), rel=1e-6)
    assert factor * before <= after * (1 + SLACK)
    assert after <= min(before, factor * before / other[0]) * (1 + SLACK)


def test_equations_6_and_68_are_false_as_printed() -> None:
    """Two keys with equal logits and beta = log 2: the mass falls from 1/2 to 1/3, not to 1/4."""
    after = torch.tensor([0.0, -math.log(2)], dtype=torch.float64).softmax(0)[1]
    assert after == pytest.approx(1 / 3)
    assert after > math.exp(-math.log(2)) * 0.5


@given(rows(), st.floats(0, 5))
def test_equation_70_bounds_the_change_of_the_weights(row: tuple[torch.Tensor, torch.Tensor], beta: float) -> None:
    logits, foreground = row
    change = (logits - beta * foreground.double()).softmax(0) - logits.softmax(0)
    assert change.norm() <= 0.5 * beta * math.sqrt(int(foreground.sum())) + SLACK


@given(attentions(), st.lists(st.floats(-5, 5), min_size=4, max_size=4))
def test_sma_with_hard_masks_shifts_gamma_by_alpha_00_minus_alpha_01(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scalars: list[float]
) -> None:
    q, k, foreground = case
    alpha = torch.tensor(scalars, dtype=torch.float64).reshape(2, 2)
    before = leakage(q, k, foreground)
    after = leakage(q, k, foreground, mask=foreground.double(), alpha=alpha)
    torch.testing.assert_close(after.gamma, before.gamma + alpha[0, 0] - alpha[0, 1], rtol=0, atol=1e-9)


# --- the measurement


@pytest.mark.slow
@given(attentions(), st.integers(1, 20), st.booleans())
def test_streaming_gives_what_dense_attention_gives(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], tile: int, biased: bool
) -> None:
    """Equation 1 and the masses written out; soft masks in the bias, whatever the tile."""
    q, k, foreground = case
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    mask = torch.rand(foreground.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha = torch.tensor([[0.5, -2.0], [-1.0, 3.0]], dtype=torch.float64)
    if biased:
        weights = [1 - mask, mask]
        cases = [alpha[s, t] * weights[s][:, :, None] * weights[t][:, None] for s in (0, 1) for t in (0, 1)]
        logits = logits + torch.stack(cases).sum(0)[:, None]
    found = leakage(q, k, foreground, mask=mask if biased else None, alpha=alpha if biased else None, tile=tile)
    p = logits.softmax(-1)
    for b, h in np.ndindex(*found.gamma.shape):
        inside = foreground[b]
        e = logits[b, h][~inside].exp()
        gamma = (e[:, ~inside].sum(1).log() - e[:, inside].sum(1).log()).min()
        mass = p[b, h][~inside][:, inside].sum(1)
        assert found.gamma[b, h] == pytest.approx(float(gamma), abs=1e-9)
        assert found.cross_mass[b, h] == pytest.approx(float(mass.mean()), abs=1e-12)
        assert found.peak_mass[b, h] == pytest.approx(float(mass.max()), abs=1e-12)


def test_logits_too_large_for_exp_are_measured() -> None:
    """exp(2000) is infinite; running log-sum-exps are not."""
    q = torch.full((1, 3, 1, 1), 40.0)
    k = torch.tensor([40.0, 50.0, 45.0]).reshape(1, 3, 1, 1)
    found = leakage(q, k, torch.tensor([[True, False, False]]), tile=1)
    assert found.gamma.item() == pytest.approx(400)


def test_pictures_without_one_of_the_regions_leak_nothing() -> None:
    q, k = torch.ones(2, 4, 1, 2), torch.ones(2, 4, 1, 2)
    found = leakage(q, k, torch.tensor([[False] * 4, [True] * 4]))
    assert found.gamma.tolist() == [[math.inf], [math.inf]]
    assert found.cross_mass.tolist() == found.peak_mass.tolist() == [[0], [0]]


def test_hard_gating_leaves_an_infinite_gap() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 9, 2, 4, generator=generator) for _ in range(2))
    foreground = torch.arange(9)[None] < 4
    alpha = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    found = leakage(q, k, foreground, mask=foreground.float(), alpha=alpha)
    assert found.gamma.tolist() == [[math.inf] * 2]
    assert found.peak_mass.tolist() == [[0.0] * 2]


def test_the_mass_is_what_the_modulated_attention_really_gives() -> None:
    """With 1 as the value of foreground keys and 0 else, attention's output is the cross-domain mass."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 30, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(1, 30, generator=generator, dtype=torch.float64)
    foreground = mask >= 0.5
    alpha = torch.tensor([[0.5, -1.0], [-2.0, 0.25]], dtype=torch.float64)
    v = foreground.double()[:, :, None, None].expand_as(q)
    output = modulated_attention(q, k, v, mask, alpha)[..., 0][:, ~foreground[0]]
    found = leakage(q, k, foreground, mask=mask, alpha=alpha)
    torch.testing.assert_close(found.cross_mass, output.mean(1))
    torch.testing.assert_close(found.peak_mass, output.amax(1))


# --- in a UNet


def forward(unet: UNet2DConditionModel, timestep: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(timestep)
    return unet(
        torch.randn(batch, 9, 6, 10, generator=generator),
        timestep,
        encoder_hidden_states=torch.ones(batch, 5, 8),
        added_cond_kwargs={"text_embeds": torch.ones(batch, 8), "time_ids": torch.ones(batch, 6)},
    ).sample


def person(batch: int = 1) -> torch.Tensor:
    mask = torch.zeros(batch, 1, 48, 80)
    mask[:, :, 16:, 16:48] = 1
    return mask


def test_every_block_of_every_step_is_recorded_and_the_output_stays(tiny_unet: UNet2DConditionModel) -> None:
    names = [name for name, _ in tiny_unet.named_modules() if name.endswith("attn1")]
    before = forward(tiny_unet, 700)
    with measure_leakage(tiny_unet, person()) as records:
        assert torch.equal(forward(tiny_unet, 700), before)
        forward(tiny_unet, 300)
    forward(tiny_unet, 100)
    assert sorted((r.step, r.timestep, r.block) for r in records) == sorted(
        (step, timestep, name) for step, timestep in enumerate([700.0, 300.0]) for name in names
    )
    for record in records:
        assert record.vanilla.gamma.shape == (2, 2) and record.vanilla.gamma.isfinite().all()
        assert record.modulated is record.vanilla or torch.equal(record.modulated.gamma, record.vanilla.gamma)
        assert torch.equal(record.contraction, torch.ones(2, 2))


def test_records_are_those_of_the_blocks_own_queries_and_keys(tiny_unet: UNet2DConditionModel) -> None:
    """The first block alone, its token masks written by hand: 3 x 5 tokens of 16 x 16 pixels."""
    block = tiny_unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    seen = []
    hook = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with measure_leakage(tiny_unet, person()) as records:
        forward(tiny_unet, 500)
    hook.remove()
    foreground = torch.zeros(3, 5, dtype=torch.bool)
    foreground[1:, 1:3] = True
    q, k = (layer(seen[0]).unflatten(2, (block.heads, -1)) for layer in (block.to_q, block.to_k))
    expected = leakage(q, k, foreground.flatten().repeat(2, 1))
    torch.testing.assert_close(records[0].vanilla.gamma, expected.gamma)
    torch.testing.assert_close(records[0].vanilla.cross_mass, expected.cross_mass)


def test_contraction_under_sma_is_measured_beside_the_vanilla_logits(tiny_unet: UNet2DConditionModel) -> None:
    """With hard masks gamma moves by alpha_00 - alpha_01 in each block, and the mass contracts by less than that."""
    modulation = install_sma(tiny_unet)
    beta = 1.5
    with torch.no_grad():
        for alpha in modulation.parameters():
            alpha.copy_(torch.tensor([[0.5, -1.0], [-3.0, 0.0]]))
    with modulation.masks(person(), hard=True), measure_leakage(tiny_unet, person()) as records:
        forward(tiny_unet, 500)
    assert len(records) == 4
    for record in records:
        torch.testing.assert_close(record.modulated.gamma, record.vanilla.gamma + beta)
        assert ((record.contraction > math.exp(-beta)) & (record.contraction < 1)).all()
    modulation.gate_()
    with modulation.masks(person()), measure_leakage(tiny_unet, person()) as records:
        forward(tiny_unet, 500)
    assert all((record.contraction == 0).all() and record.modulated.gamma.isinf().all() for record in records)
    remove_sma(tiny_unet)


def test_masks_that_cannot_be_meant_are_refused(tiny_unet: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match="do not fit"), measure_leakage(tiny_unet, person(3)):
        forward(tiny_unet, 500)
    with pytest.raises(ValueError, match=r"0\.\.1"), measure_leakage(tiny_unet, 255 * person()):
        pass


# --- the spectrum of the residual


def hole(height: int = 96, width: int = 160) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[16:80, 32:128] = True
    return mask


def test_noise_has_a_flat_spectrum_at_its_standard_deviation() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 255, (96, 160))
    _, amplitude = residual_spectrum(truth + rng.normal(0, 20, truth.shape), truth, hole(), rings=12)
    np.testing.assert_allclose(amplitude, math.log(21), atol=0.25)


@pytest.mark.parametrize("direction", [(1, 0), (0, 1), (0.6, 0.8)])
def test_a_wave_left_in_the_hole_is_a_peak_at_its_frequency_in_any_direction(direction: tuple[float, float]) -> None:
    """Also in a picture that is not square: frequencies are cycles a pixel, not indices."""
    frequency = 0.17
    rows_, columns = np.mgrid[:96, :160]
    wave = 30 * np.sin(2 * math.pi * frequency * (direction[0] * rows_ + direction[1] * columns))
    truth = np.full((96, 160, 3), 100.0)
    frequencies, amplitude = residual_spectrum(truth + wave[..., None], truth, hole())
    assert abs(frequencies[amplitude.argmax()] - frequency) <= 1 / 64
    assert amplitude.max() > 2 * np.median(amplitude)


def test_energy_is_kept_and_nothing_outside_the_hole_counts() -> None:
    """Parseval: the mean square of the amplitudes over all frequencies is that of the residual in the hole."""
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 256, (96, 160, 3), dtype=np.uint8)
    result = rng.integers(0, 256, (96, 160, 3), dtype=np.uint8)
    mask = hole()
    frequencies, amplitude = residual_spectrum(result, truth, mask, rings=1)
    residual = (result.astype(float) - truth).mean(2)
    radius = np.hypot(np.fft.fftfreq(96)[:, None], np.fft.fftfreq(160)[None])
    power = np.abs(np.fft.fft2(np.where(mask, residual, 0))) ** 2
    assert power.sum() / power.size == pytest.approx((residual[mask] ** 2).sum())
    assert np.expm1(amplitude[0]) ** 2 == pytest.approx(power[radius < 0.5].mean() / mask.sum())
    assert frequencies.tolist() == [0.25]
    spoiled = np.where(mask[..., None], result, 255 - result)
    np.testing.assert_array_equal(residual_spectrum(spoiled, truth, mask)[1], residual_spectrum(result, truth, mask)[1])


def test_a_perfect_result_has_no_spectrum_and_misfits_are_named() -> None:
    picture = np.full((96, 160, 3), 7, np.uint8)
    assert residual_spectrum(picture, picture, hole())[1].max() == 0
    with pytest.raises(ValueError, match="empty mask"):
        residual_spectrum(picture, picture, np.zeros((96, 160), bool))
    with pytest.raises(ValueError, match="sizes differ"):
        residual_spectrum(picture, picture, hole(96, 161))


# --- charts


def test_the_gamma_chart_draws_each_stage_with_and_without_sma(
    tiny_unet: UNet2DConditionModel, heights: Callable[[str, str], list[float]]
) -> None:
    modulation = install_sma(tiny_unet)
    with torch.no_grad():
        for alpha in modulation.parameters():
            alpha[0, 1] = -1
    with modulation.masks(person(), hard=True), measure_leakage(tiny_unet, person()) as records:
        for timestep in (900, 500, 100):
            forward(tiny_unet, timestep)
    chart = gamma_chart(records)
    stages = ("down_blocks.1", "mid_block", "up_blocks.0")
    assert all(f">{stage}</text>" in chart for stage in stages)
    shifts = []
    for stage in stages:
        modulated, vanilla = heights(chart, stage), heights(chart, f"{stage} without SMA")
        assert len(modulated) == len(vanilla) == 3
        shifts += [b - a for a, b in zip(modulated, vanilla, strict=True)]
    assert min(shifts) > 0 and max(shifts) - min(shifts) < 0.5  # up by one nat everywhere


def test_the_spectrum_chart_leaves_out_rings_without_frequencies_and_escapes_names(
    heights: Callable[[str, str], list[float]],
) -> None:
    curve = (np.array([0.1, 0.2, 0.3]), np.array([1.0, np.nan, 2.0]))
    chart = spectrum_chart({"<A & B>": curve})
    assert len(heights(chart, "<A & B>")) == 2
    assert ">&lt;A &amp; B&gt;</text>" in chart
