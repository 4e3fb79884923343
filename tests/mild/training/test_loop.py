from __future__ import annotations

import csv
import filecmp
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from mild.erasing.pipeline import MILDPipeline, as_ddim
from mild.erasing.regions import editable, prefilled
from mild.model.attention import modulated_attention
from mild.model.backbone import BRANCHES, load_base
from mild.model.layered import LayeredUNet
from mild.model.saved import CONFIG
from mild.settings import HmgSettings, MildSettings, OffsetSettings, PrefixSettings, TrainSettings, WarmUpSettings
from mild.training.loop import BranchLoss, Examples, Preempted, _parameter_groups, _untrained, train
from mild.training.mixture import Mixture, Selection

pytestmark = pytest.mark.slow

WEIGHTS = "pytorch_lora_weights.safetensors"
PARTS = ["sma.safetensors", "hmg.safetensors", "extents.safetensors"]


def _silent(step: int, values: dict[str, float]) -> None:
    pass


def _changed(settings: TrainSettings, **changes: Any) -> TrainSettings:
    return settings.model_copy(update=changes)


def _largest_ups(folder: Path) -> list[float]:
    """Largest magnitude of each up-projection B, which is zero until it is trained."""
    weights = load_file(folder / WEIGHTS)
    return [tensor.abs().max().item() for name, tensor in weights.items() if "lora_B" in name or "lora.up" in name]


def test_a_run_leaves_adapters_settings_losses_and_a_card(adapters: Path, quick: TrainSettings, nano_base: str) -> None:
    names = {str(path.relative_to(adapters)) for path in adapters.rglob("*") if path.is_file()}
    assert names == {WEIGHTS, f"fg/{WEIGHTS}", *PARTS, "mild.json", "loss.csv", "loss.svg", "README.md"}
    config = json.loads((adapters / "mild.json").read_text())
    assert TrainSettings.check(config["settings"], origin="mild.json") == quick
    assert (config["base"], config["dataset"], config["samples"]) == (nano_base, "0123abcd", 4)
    assert "0123abcd" in (adapters / "README.md").read_text()


def test_the_loss_of_every_step_is_kept_and_adds_up_as_eq_5_and_the_extents(
    adapters: Path, quick: TrainSettings
) -> None:
    with (adapters / "loss.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["lambda"] for row in rows] == [0, 0, 0.5, 1]
    for row in rows:
        of_branches = row["background"] + row["lambda"] * row["foreground"]
        assert row["loss"] == pytest.approx(of_branches + row["extents"])
        assert row["background"] > 0


def test_equal_runs_give_equal_bytes_and_another_seed_does_not(
    samples: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path
) -> None:
    for name, settings in [("a", quick), ("b", quick), ("c", _changed(quick, seed=1))]:
        train(settings, samples, tiny_base, str(tmp_path / name), _silent)
    names = [WEIGHTS, f"fg/{WEIGHTS}", *PARTS, "loss.csv", "loss.svg", "mild.json", "README.md"]
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)[0] == names
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", names[:5], shallow=False)[1] == names[:5]


def test_the_loss_goes_down(
    nano_base: str,
    quick: TrainSettings,
    tmp_path: Path,
    make_sample: Callable[..., Sample],
    in_memory: Callable[..., Any],
) -> None:
    settings = _changed(quick, steps=16, learning_rate=8e-3, warm_up=WarmUpSettings(start=30, end=30))
    result = train(settings, in_memory([make_sample(0), make_sample(1)]), nano_base, str(tmp_path / "out"), _silent)
    assert result.steps == 16
    assert result.last_loss < 0.7 * result.first_loss


def test_before_the_warm_up_only_the_background_adapter_is_trained(
    samples: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path
) -> None:
    settings = _changed(quick, warm_up=WarmUpSettings(start=100, end=200))
    train(settings, samples, tiny_base, str(tmp_path), _silent)
    assert min(_largest_ups(tmp_path)) > 0
    assert max(_largest_ups(tmp_path / "fg")) == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"warm_up": WarmUpSettings(start=50, end=60)}, "`fg`"),
        ({"warm_up": WarmUpSettings(start=0, end=0), "protect_background": 100}, "`bg`"),
    ],
)
def test_an_adapter_that_no_step_trains_is_named(changes: dict[str, Any], named: str) -> None:
    assert _untrained(TrainSettings(steps=50, **changes)).startswith(f"Not trained in 50 steps: {named} ")


def test_both_adapters_are_trained_after_it(adapters: Path) -> None:
    assert min(_largest_ups(adapters)) > 0
    assert min(_largest_ups(adapters / "fg")) > 0


def test_sma_and_hmg_are_trained_and_the_constraints_of_sma_hold(adapters: Path) -> None:
    alphas = torch.stack(list(load_file(adapters / "sma.safetensors").values()))
    # Those that are pushed against their hard constraints stay at zero.
    assert alphas.any()
    # Only their differences count, so that two of a row have opposite gradients.
    assert torch.equal(alphas[:, 0, 0], -alphas[:, 0, 1]) and torch.equal(alphas[:, 1, 1], -alphas[:, 1, 0])
    assert alphas[:, 0, 1].max() <= 0 and alphas[:, 1, 0].max() <= 0
    assert alphas[:, 0, 0].min() >= 0 and alphas[:, 1, 1].min() >= 0
    gates = [tensor for name, tensor in load_file(adapters / "hmg.safetensors").items() if name.startswith("gates.")]
    assert min(gate.abs().min() for gate in gates) > 0


def test_every_part_is_trained_at_its_own_rate(
    samples: Any, nano_base: str, quick: TrainSettings, tmp_path: Path
) -> None:
    """AdamW's first step moves every parameter with a gradient by its rate, and a little less where that is no larger
    than AdamW's epsilon; what decays is zero here at first."""
    mild = quick.mild.model_copy(
        update={
            "offsets": OffsetSettings(spatial_offset=True, boundary_smoothing=True, width=4),
            "prefix": PrefixSettings(tokens=2),
        }
    )
    rates = {"learning_rate": 1e-4, "guidance_learning_rate": 1e-2, "sma_learning_rate": 0.5}
    train(_changed(quick, steps=1, mild=mild, **rates), samples, nano_base, str(tmp_path), _silent)

    def moved(file: str, *names: str) -> torch.Tensor:
        tensors = load_file(tmp_path / f"{file}.safetensors").items()
        values = [tensor.abs().flatten() for name, tensor in tensors if any(one in name for one in names)]
        return torch.cat(values)

    for values, rate in [
        (moved("pytorch_lora_weights", "lora_B", "lora.up"), 1e-4),
        (moved("hmg", "gates."), 1e-2),
        (moved("offsets", "offset.last", "gate"), 1e-2),
        (moved("prefix", "delta"), 1e-2),
    ]:
        assert 0.8 * rate < values.median().item() < 1.001 * rate
    alphas = moved("sma", "alpha")
    # What is pushed against the hard constraints is projected back to zero.
    assert alphas.any() and not alphas.all()
    assert alphas[alphas > 0].min() > 0.5 * 0.5 and alphas.max() < 1.001 * 0.5


@torch.no_grad()
def test_what_training_gives_the_parts_is_what_they_compute_with(
    tiny_base: str, quick: TrainSettings, make_sample: Callable[..., Sample], examples_of: Callable[..., Any]
) -> None:
    """Each part alone, made to matter, changes the loss of both branches."""
    pipeline = load_base(tiny_base)
    parts = {
        "hmg": quick.mild.hmg,
        "offsets": OffsetSettings(spatial_offset=True, boundary_smoothing=True, width=4),
        "prefix": PrefixSettings(tokens=2),
    }
    layered = LayeredUNet.create(pipeline.unet, quick.mild.model_copy(update=parts), seed=0)
    loss = BranchLoss(pipeline, layered, quick)
    sample = make_sample(0, height=32, width=32)
    sample.effects = np.zeros(sample.image.shape[:2], np.uint8)
    for branch in BRANCHES:
        (examples,) = examples_of(loss, [branch], [sample])
        neutral = loss(pipeline.unet, examples).item()
        for name, part in layered.parts().items():
            before = {key: tensor.clone() for key, tensor in part.state_dict().items()}
            for parameter in part.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            changed = loss(pipeline.unet, examples).item()
            part.load_state_dict(before)
            assert abs(changed - neutral) > 1e-5 * neutral, (branch, name)


def test_a_base_that_asks_for_aesthetic_scores_is_told_one_as_the_stock_pipeline_tells_it(
    tiny_base: str, quick: TrainSettings
) -> None:
    """SDXL's paper tells bases size, crop and target size; a refiner size, crop and score, 6 by default."""
    plain = MildSettings(sma=False, hmg=None)
    pipeline = load_base(tiny_base)
    loss = BranchLoss(pipeline, LayeredUNet.create(pipeline.unet, plain, seed=0), quick)
    assert loss.time_ids.tolist() == [[32, 32, 0, 0, 32, 32]]
    config = dict(load_base(tiny_base).unet.config)
    config["projection_class_embeddings_input_dim"] -= config["addition_time_embed_dim"]
    pipeline.unet = UNet2DConditionModel.from_config(config)
    pipeline.register_to_config(requires_aesthetics_score=True)
    loss = BranchLoss(pipeline, LayeredUNet.create(pipeline.unet, plain, seed=0), quick)
    assert loss.time_ids.tolist() == [[32, 32, 0, 0, 6.0]]


@pytest.mark.usefixtures("_accelerate_afresh")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prefix_alone_is_trained_on_adapters_that_stay_as_they_are(
    nano_base: str, adapters: Path, quick: TrainSettings, samples: Any, tmp_path: Path, precision: Any
) -> None:
    settings = _changed(
        quick,
        start_from=str(adapters),
        mild=MildSettings(prefix=PrefixSettings(tokens=3)),
        warm_up=WarmUpSettings(start=0, end=0),
        mixed_precision=precision,
        steps=2,
    )
    train(settings, samples, nano_base, str(tmp_path / "prefixed"), _silent)
    for name in (WEIGHTS, f"fg/{WEIGHTS}", *PARTS):
        before, after = load_file(adapters / name), load_file(tmp_path / "prefixed" / name)
        assert all(torch.equal(before[key], after[key]) for key in before) and before.keys() == after.keys()
    assert load_file(tmp_path / "prefixed" / "prefix.safetensors")["delta"].abs().amin(1).min() > 0
    layered = LayeredUNet.load(load_base(nano_base).unet, tmp_path / "prefixed")
    assert layered.settings == quick.mild.model_copy(update={"prefix": PrefixSettings(tokens=3)})


def test_training_further_starts_from_what_is_there(
    nano_base: str, adapters: Path, quick: TrainSettings, samples: Any, tmp_path: Path
) -> None:
    """AdamW's first step moves a parameter by its rate at most, where decay has next to nothing to take."""
    rates = dict.fromkeys(("learning_rate", "sma_learning_rate", "guidance_learning_rate"), 1e-6)
    further = {"start_from": str(adapters), "mild": MildSettings(), "warm_up": WarmUpSettings(start=0, end=0)}
    train(_changed(quick, **rates, **further, steps=1), samples, nano_base, str(tmp_path / "further"), _silent)
    for name in (WEIGHTS, f"fg/{WEIGHTS}", *PARTS):
        before, after = load_file(adapters / name), load_file(tmp_path / "further" / name)
        moved = [(after[key] - before[key]).abs().max().item() for key in before]
        assert 0 < max(moved) < 1.1e-6 and before.keys() == after.keys()


def test_training_further_erases_as_before_unless_told_otherwise(
    nano_base: str, adapters: Path, quick: TrainSettings, samples: Any, tmp_path: Path
) -> None:
    before = json.loads((adapters / CONFIG).read_text())
    changed = {**before, "inference_steps": 3, "inference_resolution": 64, "prompt": "grass"}
    begun = tmp_path / "begun"
    shutil.copytree(adapters, begun)
    (begun / CONFIG).write_text(json.dumps(changed))
    values = quick.model_dump(exclude={"inference_steps", "inference_resolution", "prompt", "mild"})
    further = TrainSettings(**values | {"start_from": str(begun), "warm_up": {"start": 0, "end": 0}, "steps": 1})
    train(further, samples, nano_base, str(tmp_path / "same"), _silent)
    told = _changed(further, inference_steps=2, prompt="")
    train(told, samples, nano_base, str(tmp_path / "told"), _silent)
    saved = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("same", "told")]
    assert [one["inference_steps"] for one in saved] == [3, 2]
    assert [one["inference_resolution"] for one in saved] == [64, 64]
    assert [one["prompt"] for one in saved] == ["grass", ""]


def test_a_run_does_not_go_on_with_other_weights_of_its_configurations(
    nano_base: str, quick: TrainSettings, samples: Any, tmp_path: Path
) -> None:
    output, settings = str(tmp_path / "out"), _changed(quick, checkpoint_every=1, steps=2)
    halves = {"a": Selection(samples, [0, 1]), "b": Selection(samples, [2, 3])}
    with pytest.raises(Preempted):
        train(settings, Mixture(halves, {"a": 1, "b": 1}), nano_base, output, _silent, stop=lambda: True)
    with pytest.raises(UserError, match="weights of configurations"):
        train(settings, Mixture(halves, {"a": 1, "b": 2}), nano_base, output, _silent)


@torch.no_grad()
def test_each_sample_of_a_batch_has_its_own_copy_of_the_text(
    tiny_base: str, quick: TrainSettings, make_sample: Callable[..., Sample], examples_of: Callable[..., Any]
) -> None:
    """One text in memory for all takes a quarter of a step at full size: torch multiplies by copies of all weights."""
    pipeline = load_base(tiny_base)
    plain = MildSettings(sma=False, hmg=None, extents=None)
    loss = BranchLoss(pipeline, LayeredUNet.create(pipeline.unet, plain, seed=0), quick)
    (examples,) = examples_of(loss, ["bg"], [make_sample(index, height=32, width=32) for index in range(2)])
    texts = []

    def unet(given: torch.Tensor, timesteps: torch.Tensor, **rest: Any) -> Any:
        texts.append(rest["encoder_hidden_states"])
        return SimpleNamespace(sample=examples.clean)

    assert loss(unet, examples) == 0, "the base predicts what is clean"
    assert texts[0].shape[0] == 2 and texts[0].is_contiguous()
    assert torch.equal(texts[0][0], texts[0][1])


@pytest.fixture
def _accelerate_afresh() -> Iterator[None]:
    """accelerate fixes the precision for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_accelerate_afresh")
def test_with_mixed_precision_frozen_weights_are_halved_and_trained_ones_are_not(
    samples: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    compute = BranchLoss.__call__

    def looked_at(self: BranchLoss, unet: Any, examples: Examples) -> torch.Tensor:
        for parameter in unet.parameters():
            kinds[parameter.requires_grad].add(parameter.dtype)
        return compute(self, unet, examples)

    monkeypatch.setattr(BranchLoss, "__call__", looked_at)
    settings = _everything(quick, steps=2, mixed_precision="bf16", samples_every=1, sample_pictures=1)
    result = train(settings, samples, tiny_base, str(tmp_path / "out"), _silent, validation=samples)
    assert math.isfinite(result.last_loss)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}
    saved = {tensor.dtype for path in (tmp_path / "out").rglob("*.safetensors") for tensor in load_file(path).values()}
    assert saved == {torch.float32}
    assert (tmp_path / "out/samples.png").is_file()


@pytest.mark.usefixtures("_accelerate_afresh")
def test_processes_that_would_share_what_is_trained_are_refused(
    samples: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path
) -> None:
    PartialState().distributed_type = DistributedType.MEGATRON_LM
    with pytest.raises(UserError, match=r"distributed_type: MEGATRON_LM .* use MULTI_GPU, or FSDP"):
        train(quick, samples, tiny_base, str(tmp_path / "out"), _silent)


def test_progress_is_reported_every_so_often_and_at_the_end(
    samples: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path
) -> None:
    calls: list[tuple[int, dict[str, float]]] = []
    settings = _changed(quick, steps=3, log_every=2)
    train(settings, samples, tiny_base, str(tmp_path), lambda step, values: calls.append((step, values)))
    assert [step for step, _ in calls] == [2, 3]
    assert all(values["gradient_norm"] > 0 for _, values in calls)


def _everything(quick: TrainSettings, **changes: Any) -> TrainSettings:
    """All parts switched on, and both branches trained from the second step on."""
    mild = quick.mild.model_copy(
        update={
            "offsets": OffsetSettings(spatial_offset=True, boundary_smoothing=True, width=4),
            "prefix": PrefixSettings(tokens=2),
        }
    )
    return _changed(quick, mild=mild, batch_size=4, warm_up=WarmUpSettings(start=1, end=1), **changes)


def _after_three_steps(settings: TrainSettings, samples: Any, base: str, folder: Path) -> dict[str, torch.Tensor]:
    """What the checkpoint holds; AdamW's ``exp_avg`` is a weighted sum of the gradients so far.

    The first step of an adapter moves its B alone, since B is zero and hides A.
    """
    answers = iter([False, False, True])
    with pytest.raises(Preempted):
        train(settings, samples, base, str(folder / "out"), _silent, stop=lambda: next(answers))
    return load_file(folder / "out.work/checkpoints/step-00000003/tensors.safetensors")


def _assert_same_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """To rounding, which AdamW's first steps enlarge: they move a weight by its rate however small the gradient."""
    assert one.keys() == other.keys()
    names = [name for name in one if name.endswith("/exp_avg")]
    assert len({name.split("/")[1].split(".")[0] for name in names}) == 6, "adapters and all five parts"
    for name in names:
        size = one[name].norm().item()
        assert size > 0, name
        # Where a bias comes before a normalisation its gradient is nothing but rounding.
        assert (other[name] - one[name]).norm().item() < 2e-3 * size + 1e-10, name


def test_a_batch_in_several_passes_gives_the_gradients_of_one_pass(
    samples: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures hold one to three people, who count as often."""
    sizes: list[int] = []
    compute = BranchLoss.__call__

    def counted(self: BranchLoss, unet: Any, examples: Examples) -> torch.Tensor:
        sizes.append(len(examples.noisy))
        return compute(self, unet, examples)

    monkeypatch.setattr(BranchLoss, "__call__", counted)
    one = _after_three_steps(_everything(quick), samples, tiny_base, tmp_path / "one")
    assert sizes == [4] * 5
    for passes in (2, 4):
        settings = _everything(quick, gradient_accumulation=passes)
        sizes.clear()
        several = _after_three_steps(settings, samples, tiny_base, tmp_path / str(passes))
        assert sizes == [4 // passes] * 5 * passes
        _assert_same_gradients(one, several)
        torch.testing.assert_close(several["losses"], one["losses"], rtol=1e-5, atol=0)


def test_gradient_checkpointing_computes_twice_and_gives_the_same_gradients(
    samples: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both branches and all parts: what is computed again must know masks, cues and the branch."""
    calls = []

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return modulated_attention(*arguments, **options)

    monkeypatch.setattr("mild.model.attention.modulated_attention", counted)
    kept = _after_three_steps(_everything(quick), samples, tiny_base, tmp_path / "kept")
    once = len(calls)
    settings = _everything(quick, gradient_checkpointing=True)
    again = _after_three_steps(settings, samples, tiny_base, tmp_path / "again")
    assert len(calls) - once == 2 * once
    _assert_same_gradients(kept, again)


def test_a_compiled_unet_gives_the_same_gradients_from_one_graph_a_branch_also_where_activations_are_not_kept(
    samples: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the compiler's front end, which is what could lose a branch or a part; both branches run in three steps."""
    settings = _everything(quick, gradient_checkpointing=True)
    plain = _after_three_steps(settings, samples, tiny_base, tmp_path / "plain")
    sizes: list[list[int]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        sizes[-1].append(len(graph.graph.nodes))
        return graph.forward

    compute = BranchLoss.__call__

    def counted(self: BranchLoss, unet: Any, examples: Examples) -> torch.Tensor:
        sizes.append([])
        return compute(self, unet, examples)

    monkeypatch.setattr(BranchLoss, "__call__", counted)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr("mild.training.loop._check_compiler", lambda device: None)
    torch._dynamo.reset()
    compiled = _after_three_steps(_changed(settings, compile=True), samples, tiny_base, tmp_path / "compiled")
    _assert_same_gradients(plain, compiled)
    torch.testing.assert_close(compiled["losses"], plain["losses"], rtol=1e-5, atol=0)
    # Small ones are of what comes before the UNet: spatial offset, tokens.
    assert [sum(size > 100 for size in of_pass) for of_pass in sizes] == [1, 0, 1, 0, 0]
    assert [len(of_pass) for of_pass in sizes][3:] == [0, 0]


def test_gradients_are_clipped_to_a_norm_of_all_together(
    samples: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path
) -> None:
    """AdamW's moment of one step is a tenth of the gradient."""

    def moment(settings: TrainSettings, name: str) -> torch.Tensor:
        with pytest.raises(Preempted):
            train(settings, samples, tiny_base, str(tmp_path / name), _silent, stop=lambda: True)
        tensors = load_file(tmp_path / f"{name}.work/checkpoints/step-00000001/tensors.safetensors")
        return torch.cat([tensor.flatten() for key, tensor in tensors.items() if key.endswith("/exp_avg")])

    free = moment(quick, "free")
    norm = 10 * free.norm().item()
    clipped = moment(_changed(quick, max_grad_norm=norm / 4), "clipped")
    # torch adds 1e-6 to the norm before it divides.
    torch.testing.assert_close(clipped, free / 4 * norm / (norm + 1e-6), rtol=1e-4, atol=1e-9)
    assert torch.equal(moment(_changed(quick, max_grad_norm=2 * norm), "wide"), free)


def test_the_learning_rates_follow_their_schedule(
    samples: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path
) -> None:
    rates: list[float] = []

    def log(step: int, values: dict[str, float]) -> None:
        rates.append(values["learning_rate/adapters"] / quick.learning_rate)

    settings = _changed(quick, steps=6, log_every=1, lr_scheduler="linear", lr_warmup_steps=2)
    train(settings, samples, tiny_base, str(tmp_path / "out"), log)
    assert rates == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])
    with pytest.raises(Preempted):
        train(settings, samples, tiny_base, str(tmp_path / "first"), log, stop=lambda: True)
    tensors = load_file(tmp_path / "first.work/checkpoints/step-00000001/tensors.safetensors")
    still = [tensor for name, tensor in tensors.items() if "weights/" in name and ("lora_B" in name or "alpha" in name)]
    assert len(still) > 10 and not any(tensor.any() for tensor in still), "a rate of zero moves nothing, in any group"


def test_the_moving_average_is_what_a_run_leaves(
    samples: Any, nano_base: str, quick: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mild.training.checkpoints.Checkpoints.remove", lambda self: None)
    settings = _changed(quick, ema_decay=0.15, checkpoint_every=1, checkpoints_kept=4)
    train(settings, samples, nano_base, str(tmp_path / "out"), _silent)
    left = load_file(tmp_path / "out/sma.safetensors")
    states = [load_file(path / "tensors.safetensors") for path in sorted(tmp_path.glob("out.work/checkpoints/step-*"))]
    moved = []
    for name, tensor in left.items():
        first, *others = [state[f"weights/sma.{name}"] for state in states]
        expected = first
        for weights, decay in zip(others, [0.15, 0.15, 0.15], strict=True):
            expected = decay * expected + (1 - decay) * weights
        torch.testing.assert_close(tensor, expected)
        # Scalars that are pushed against their hard constraints stay at zero.
        moved.append(any(not torch.equal(first, other) for other in others))
        assert torch.equal(tensor, others[-1]) != moved[-1], name
    assert any(moved)


def test_how_often_cues_are_withheld_is_a_setting_that_leaves_noise_and_time_as_they_were(
    tiny_base: str,
    quick: TrainSettings,
    make_sample: Callable[..., Sample],
    monkeypatch: pytest.MonkeyPatch,
    examples_of: Callable[..., Any],
) -> None:
    pipeline, seen, withheld = load_base(tiny_base), [], []

    def zeros(sample: torch.Tensor, timestep: torch.Tensor, **_: Any) -> Any:
        seen.append((sample, timestep))
        return type("Output", (), {"sample": torch.zeros_like(sample[:, :4])})

    def no_cues(views: Any, flags: list[np.ndarray], settings: HmgSettings) -> Any:
        withheld.append(np.stack(flags))
        return {}

    monkeypatch.setattr("mild.training.data.make_cues", no_cues)
    samples = [make_sample(index, height=32, width=32) for index in range(20)]
    for dropout in (0.0, 0.5, 1.0):
        parts = {"hmg": HmgSettings(dropout=dropout), "extents": None}
        settings = _changed(quick, mild=quick.mild.model_copy(update=parts))
        layered = LayeredUNet.create(pipeline.unet, settings.mild, seed=0)
        loss = BranchLoss(pipeline, layered, settings)
        for examples in examples_of(loss, BRANCHES, samples):
            loss(zeros, examples)
        layered.remove()
    for (noisy, time), (expected_noisy, expected_time) in zip(seen[2:], [*seen[:2], *seen[:2]], strict=True):
        assert torch.equal(noisy, expected_noisy) and torch.equal(time, expected_time)
    shares = [flags.mean() for flags in withheld]
    assert shares == [0, pytest.approx(0.5, abs=0.2), 1], "one draw for both branches"
    assert (withheld[1].any(1) & ~withheld[1].all(1)).any(), "each cue by itself"


def test_a_branch_is_judged_on_what_it_alone_predicts(
    tiny_base: str, quick: TrainSettings, make_sample: Callable[..., Sample], examples_of: Callable[..., Any]
) -> None:
    """A stand-in UNet that returns zeros: the loss is then the mean square of the clean plate's latent."""
    pipeline = load_base(tiny_base)
    seen = {}

    class Zeros(torch.nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **_: Any) -> Any:
            seen["sample"], seen["timestep"] = sample, timestep
            return type("Output", (), {"sample": torch.zeros_like(sample[:, :4])})

    sample = make_sample(0, height=32, width=32)
    layered = LayeredUNet.create(pipeline.unet, quick.mild.model_copy(update={"extents": None}), seed=0)
    branch_loss = BranchLoss(pipeline, layered, quick)
    loss = branch_loss(Zeros(), *examples_of(branch_loss, ["bg"], [sample]))
    plate = torch.from_numpy(sample.background.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]  # type: ignore[union-attr]
    latent = pipeline.vae.encode(plate).latent_dist.mean * pipeline.vae.config.scaling_factor
    assert loss.item() == pytest.approx(latent.square().mean().item(), rel=1e-4)
    hidden = editable(np.stack([np.asarray(person.augmented_mask) for person in sample.people]), range(2))
    assert np.array_equal(seen["sample"][0, 4].numpy(), hidden[::4, ::4]), (
        "the mask as the pipeline brings it to the grid"
    )
    shown = torch.from_numpy((sample.image.astype(np.float32) / 127.5 - 1) * ~hidden[..., None]).permute(2, 0, 1)[None]
    expected = pipeline.vae.encode(shown).latent_dist.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(seen["sample"][:, 5:], expected)
    kept = math.sqrt(pipeline.scheduler.alphas_cumprod[seen["timestep"][0]])
    noise = (seen["sample"][:, :4] - kept * latent) / math.sqrt(1 - kept**2)
    assert noise.std().item() == pytest.approx(1, abs=0.15)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(
    tiny_base: str,
    quick: TrainSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_sample: Callable[..., Sample],
    in_memory: Callable[..., Any],
) -> None:
    monkeypatch.setattr(
        "mild.training.loop.background_loss", lambda prediction, *_: prediction.mean((1, 2, 3)) * math.nan
    )
    data = in_memory([make_sample(3), make_sample(8)])
    with pytest.raises(UserError, match=r"nan at step 1 \(samples sample-[38], sample-[38]\)"):
        train(quick, data, tiny_base, str(tmp_path / "out"), _silent)
    assert list(tmp_path.iterdir()) == []


def test_samples_that_cannot_be_trained_on_are_set_aside_before_the_first_step_also_when_a_run_goes_on(
    tiny_base: str,
    quick: TrainSettings,
    tmp_path: Path,
    make_sample: Callable[..., Sample],
    in_memory: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One is narrow, one shows nobody; all others are trained on, and the run says so where one looks later."""
    drawn = [make_sample(0), make_sample(1, height=24), _without_masks(make_sample(2)), make_sample(3), make_sample(4)]
    data, line = (
        in_memory(drawn),
        "2 of 5 samples set aside: 1 smaller than resolution 32, 1 without a person who is seen",
    )
    result = train(quick, data, tiny_base, str(tmp_path / "out"), _silent)
    assert (result.steps, result.set_aside) == (4, line)
    assert [record.message for record in caplog.records if "set aside" in record.message] == [line]
    config = json.loads((tmp_path / "out/mild.json").read_text())
    assert (config["set_aside"], config["samples"]) == (line, 3)
    assert line in (tmp_path / "out/README.md").read_text()
    answers = iter([False, True])
    with pytest.raises(Preempted):
        train(quick, data, tiny_base, str(tmp_path / "again"), _silent, stop=lambda: next(answers))
    with pytest.raises(UserError, match="keys of samples"):
        train(quick, in_memory(drawn[:4]), tiny_base, str(tmp_path / "again"), _silent)
    assert train(quick, data, tiny_base, str(tmp_path / "again"), _silent).resumed_at == 2
    names = [WEIGHTS, f"fg/{WEIGHTS}", *PARTS, "loss.csv"]
    assert filecmp.cmpfiles(tmp_path / "out", tmp_path / "again", names, shallow=False)[0] == names


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this is too early")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        pytest.param(
            {"mixed_precision": "fp16"},
            "mixed_precision: fp16 needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        pytest.param(
            {"compile": True},
            "compile: there is no C\\+\\+ compiler",
            marks=[
                pytest.mark.process,
                pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for it"),
            ],
        ),
        ({"prompt": "of another run"}, "differs .settings.prompt"),
        ({"prompt": "in another place"}, "cannot be written"),
    ],
)
def test_what_this_machine_cannot_do_is_said_before_data_and_base_are_loaded(
    samples: Any,
    tiny_base: str,
    quick: TrainSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    complaint: str,
) -> None:
    if changes.get("prompt") == "of another run":
        with pytest.raises(Preempted):
            train(quick, samples, tiny_base, str(tmp_path / "out"), _silent, stop=lambda: True)
    if changes.get("prompt") == "in another place":
        (tmp_path / "out.work").write_text("a file")
    monkeypatch.setattr("mild.training.loop.load_base", _never)
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(UserError, match=complaint):
        train(_changed(quick, **changes), samples, tiny_base, str(tmp_path / "out"), _silent)
    assert not (tmp_path / "out").exists()


def _nothing(sample: Sample) -> Sample:
    return sample


def _without_masks(sample: Sample) -> Sample:
    for person in sample.people:
        person.mask[:] = False
    return sample


@pytest.mark.parametrize(
    ("count", "spoil", "changes", "named"),
    [
        (0, _nothing, {}, "holds no sample"),
        (1, _nothing, {}, r"holds 1 samples, fewer than batch_size \(2\)"),
        (2, _nothing, {"resolution": 40}, "^resolution: 40 must be a multiple of 16"),
        (2, _nothing, {"inference_resolution": 40}, "^inference_resolution: 40 must be a multiple of 16"),
        (2, _nothing, {"resolution": 64}, r"sample sample-\d is 64x48, smaller than resolution"),
        (2, _without_masks, {}, r"sample sample-\d has no person, or empty masks only"),
    ],
)
def test_data_that_cannot_be_trained_on_is_named_and_leaves_nothing(
    nano_base: str,
    quick: TrainSettings,
    tmp_path: Path,
    make_sample: Callable[..., Sample],
    in_memory: Callable[..., Any],
    count: int,
    spoil: Callable[[Sample], Sample],
    changes: dict[str, Any],
    named: str,
) -> None:
    data = in_memory([spoil(make_sample(index)) for index in range(count)])
    with pytest.raises(UserError, match=named):
        train(_changed(quick, **changes), data, nano_base, str(tmp_path / "out"), _silent)
    assert list(tmp_path.iterdir()) == []


def test_adapters_erase_at_the_resolution_in_the_steps_and_with_the_prompt_of_their_training(
    tiny_base: str,
    quick: TrainSettings,
    tmp_path: Path,
    make_sample: Callable[..., Sample],
    in_memory: Callable[..., Any],
) -> None:
    settings = _changed(quick, steps=1, inference_resolution=64, inference_steps=3, prompt="grass")
    train(settings, in_memory([make_sample(0), make_sample(3)]), tiny_base, str(tmp_path / "out"), _silent)
    pipeline = MILDPipeline.from_pretrained(str(tmp_path / "out"))
    assert pipeline.layered is not None
    layered = pipeline.layered
    assert (pipeline.resolutions, layered.inference_steps, layered.prompt) == ((32, 64), 3, "grass")


def test_states_that_are_trained_on_are_those_that_ddim_comes_by_from_the_smooth_fill(
    tiny_base: str, quick: TrainSettings, make_sample: Callable[..., Sample], examples_of: Callable[..., Any]
) -> None:
    """A stand-in UNet answers with a multiple of what it is given; diffusers' own DDIM takes the same steps."""
    pipeline, calls = load_base(tiny_base), list[tuple[torch.Tensor, int]]()

    def unet(sample: torch.Tensor, timestep: torch.Tensor, **_: Any) -> Any:
        calls.append((sample[:, :4].clone(), int(timestep[0])))
        return SimpleNamespace(sample=0.7 * sample[:, :4])

    plain = MildSettings(sma=False, hmg=None, extents=None)
    settings = _changed(quick, mild=plain, states="visited", inference_steps=3)
    loss = BranchLoss(pipeline, LayeredUNet.create(pipeline.unet, plain, seed=0), settings)
    scheduler, sample, reached = as_ddim(pipeline.scheduler), make_sample(0, height=32, width=32), set()
    scheduler.set_timesteps(3)
    for step in range(12):
        (examples,) = examples_of(loss, ["bg"], [sample], step)
        calls.clear()
        found = loss(unet, examples)
        assert [t for _, t in calls] == scheduler.timesteps.tolist()[: len(calls)]
        reached.add(len(calls))
        latents = calls[0][0]
        for now, (seen, t) in enumerate(calls):
            torch.testing.assert_close(seen, latents)
            if now + 1 < len(calls):
                latents = scheduler.step(0.7 * latents, t, latents, return_dict=False)[0]
        assert found.item() == pytest.approx((0.7 * latents - examples.clean).square().mean().item(), rel=1e-4)
        share = scheduler.alphas_cumprod[scheduler.timesteps[0]]
        hidden = editable(np.stack([np.asarray(person.augmented_mask) for person in sample.people]), range(2))
        start = torch.from_numpy(prefilled(sample.image, hidden) / 127.5 - 1).float().permute(2, 0, 1)[None]
        start = pipeline.vae.encode(start).latent_dist.mean * pipeline.vae.config.scaling_factor
        noise = (calls[0][0] - share.sqrt() * start) / (1 - share).sqrt()
        assert noise.std().item() == pytest.approx(1, abs=0.2)
    assert reached == {1, 2, 3}


def test_numbers_that_wait_for_a_gradient_do_not_fade(tiny_base: str, quick: TrainSettings) -> None:
    """AdamW's steps without any gradient: alphas of SMA and gates of HMG stay, matrices shrink by its decay."""
    layered = LayeredUNet.create(load_base(tiny_base).unet, quick.mild, seed=0)
    groups = _parameter_groups(layered, quick)
    trained = {name: p for group in groups for name, p in zip(group["names"], group["params"], strict=True)}
    optimizer = torch.optim.AdamW([{k: g[k] for k in ("params", "lr", "weight_decay")} for g in groups])
    for parameter in trained.values():
        parameter.data.fill_(1)
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        optimizer.step()
    kept = {name for name, p in trained.items() if torch.equal(p, torch.ones_like(p))}
    assert {name for name in trained if "alpha" in name or "gates" in name} <= kept
    assert {name for name, p in trained.items() if p.ndim > 1 and "alpha" not in name} == trained.keys() - kept
