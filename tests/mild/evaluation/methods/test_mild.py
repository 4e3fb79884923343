"""MILD and the base in the same windows, on a tiny base with parts that matter: open gates, scalars away from zero."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from mild.bases import place_of
from mild.erasing.pipeline import MILDPipeline
from mild.erasing.regions import editable
from mild.evaluation.cases import case_of, read_picture, with_cues_of
from mild.evaluation.compare import Bench
from mild.evaluation.methods import Case, Eraser, Setup
from mild.evaluation.methods.mild import BaseMethod, MILDMethod, WindowsMethod
from mild.evaluation.settings import DatasetSettings
from mild.model.backbone import BRANCHES, adapter_parameters
from mild.model.layered import LayeredUNet
from mild.seeds import derived_seed
from mild.settings import HmgSettings, LoraSettings, MildSettings

RESOLUTION = 32
LORA = LoraSettings(rank=2, alpha=2)
SMALL = HmgSettings(grid=2, width=8, map_side=32)
TRAINED = {
    "full": MildSettings(lora=LORA, hmg=SMALL, extents=None),
    "fresh": MildSettings(lora=LORA, hmg=SMALL, extents=None),
    "backbone": MildSettings(lora=LORA, hmg=None, sma=False, extents=None),
    "sma": MildSettings(lora=LORA, hmg=None, extents=None),
    "hmg": MildSettings(lora=LORA, hmg=SMALL, sma=False, extents=None),
    "hmg-pose": MildSettings(lora=LORA, hmg=SMALL.model_copy(update={"cues": ("pose",)}), sma=False, extents=None),
    "hmg-parsing": MildSettings(
        lora=LORA, hmg=SMALL.model_copy(update={"cues": ("parsing",)}), sma=False, extents=None
    ),
    "extents": MildSettings(lora=LORA, hmg=None, sma=False),
}
"""What adapters were trained with: the rungs of tables 2 and 6; ``fresh`` ones compute what the base does."""


@pytest.fixture(scope="module")
def adapters(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The MILD directory of each of `TRAINED`."""
    root = tmp_path_factory.mktemp("adapters")

    def place(name: str) -> str:
        folder = root / name
        if not folder.exists():
            folder.mkdir()
            unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
            layered = LayeredUNet.create(unet, TRAINED[name], seed=0)
            if name != "fresh":
                make_matter(layered)
            layered.save(folder, base=tiny_base, resolution=RESOLUTION, inference_steps=4, record={})
        return str(folder)

    return place


@torch.no_grad()
def make_matter(layered: LayeredUNet) -> None:
    generator = torch.Generator().manual_seed(1)
    trained = [p for branch in BRANCHES for p in adapter_parameters(layered.unet, branch).values()]
    if layered.hmg is not None:
        trained += [p for name, p in layered.hmg.named_parameters() if not name.startswith("gates.")]
        for gate in layered.hmg.gates.values():
            gate.fill_(2)
    for parameter in trained:
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    if layered.extents is not None:
        layered.extents.heads["bg"][-1].bias.fill_(3)  # type: ignore[index,union-attr]
    if layered.sma is not None:
        for alpha in layered.sma.parameters():
            alpha.copy_(torch.tensor([[1.0, -3.0], [-2.0, 0.5]]))


@pytest.fixture(scope="module")
def setup(tiny_base: str, adapters: Callable[[str], str]) -> Setup:
    return Setup(base=tiny_base, adapters=adapters("full"), inference_steps=2, prompt="")


@pytest.fixture(scope="module")
def mild(setup: Setup) -> Eraser:
    return MILDMethod().open(setup)


@pytest.fixture(scope="module")
def base(setup: Setup) -> Eraser:
    return BaseMethod().open(setup)


def erased(eraser: Eraser, case: Case, seed: int = 0) -> np.ndarray:
    (result,) = eraser.erase([case], [seed])
    return result


# What is erased


@pytest.mark.parametrize("method", ["mild", "base"])
def test_pixels_outside_the_mask_are_untouched_and_inside_are_filled(
    request: pytest.FixtureRequest, case: Case, method: str
) -> None:
    hole, before = case.hole, case.image.copy()
    result = erased(request.getfixturevalue(method), case)
    assert (result.shape, result.dtype) == (before.shape, np.uint8)
    assert np.array_equal(result[~hole], before[~hole])
    assert (result[hole] != before[hole]).any(axis=1).mean() > 0.9
    assert np.array_equal(case.image, before)


@pytest.mark.parametrize("method", ["mild", "base"])
def test_the_seed_decides_about_the_result(request: pytest.FixtureRequest, case: Case, method: str) -> None:
    eraser = request.getfixturevalue(method)
    first, other = erased(eraser, case, seed=5), erased(eraser, case, seed=6)
    assert np.array_equal(erased(eraser, case, seed=5), first)
    assert not np.array_equal(first, other)


def test_cases_of_any_sizes_label_sets_and_cues_give_together_what_each_gives_alone(
    mild: Eraser, make_case: Callable[..., Case]
) -> None:
    case = make_case(1, height=45, width=51)
    cases = [
        case,
        replace(case, pose=None),
        make_case(2, people=3),
        replace(make_case(3, height=45, width=51), label_set="lip"),
        replace(case, parsing=None, label_set="none"),
        replace(case, pose=None, parsing=None),
    ]
    seeds = list(range(len(cases)))
    together = mild.erase(cases, seeds)
    assert len(together) == len(cases)
    for one, case, seed in zip(together, cases, seeds, strict=True):
        assert np.abs(one.astype(int) - erased(mild, case, seed)).max() <= 2


def test_what_is_under_the_mask_cannot_be_seen(mild: Eraser, make_case: Callable[..., Case]) -> None:
    """Two images that differ under the mask alone give one result."""
    case = make_case(2, height=64, width=64, people=1)
    other = np.where(case.hole[..., None], 255 - case.image, case.image)
    assert np.array_equal(erased(mild, case), erased(mild, replace(case, image=other)))


def test_everything_but_what_is_under_the_mask_is_seen(mild: Eraser, case: Case) -> None:
    """No margin: a picture that differs in pixels beside the mask alone is filled differently."""
    beside = editable(case.masks, range(len(case.masks)), 0.001) & ~case.hole
    other = np.where(beside[..., None], 255 - case.image, case.image)
    first, second = (erased(mild, replace(case, image=image)) for image in (case.image, other))
    assert not np.array_equal(first[case.hole], second[case.hole])


@pytest.mark.parametrize("matched", [True, False])
def test_a_method_is_one_call_of_the_pipeline_with_matched_colours_or_without(
    setup: Setup, mild: Eraser, case: Case, matched: bool
) -> None:
    settings = MILDMethod(match_colours=matched, inference_steps=3)
    found = erased(settings.open(replace(setup, prompt="a lawn")), case, seed=4)
    expected = mild.pipeline(  # type: ignore[attr-defined]
        case.image,
        list(case.masks),
        prompt="a lawn",
        pose=case.pose,
        parsing=case.parsing,
        label_set=case.label_set,
        num_inference_steps=3,
        margin=0,
        match_colours=matched,
        generator=torch.Generator().manual_seed(4),
        output_type="np",
    ).image
    assert np.array_equal(found, expected)


def test_matched_colours_are_others(setup: Setup, case: Case, mild: Eraser, base: Eraser) -> None:
    for method, matched in ((MILDMethod, mild), (BaseMethod, base)):
        plain = method(match_colours=False)
        assert not np.array_equal(erased(plain.open(setup), case), erased(matched, case))
        assert plain.title == f"{method().title}, colours as painted"


# Rungs


@pytest.mark.parametrize("switch", ["sma", "hmg", "pose", "parsing"])
def test_each_switch_leaves_out_something_that_mattered(setup: Setup, mild: Eraser, case: Case, switch: str) -> None:
    method = MILDMethod(**{switch: False})  # type: ignore[arg-type]
    assert not np.array_equal(erased(method.open(setup), case), erased(mild, case))
    parts = {"hmg": True, "pose": True, "parsing": True, "sma": True, "extents": False}
    gone = ("hmg", "pose", "parsing") if switch == "hmg" else (switch,)
    assert method.parts(setup) == parts | dict.fromkeys(gone, False)
    named = {"sma": "SMA", "hmg": "HMG"}.get(switch, switch)
    assert method.title == f"MILD without {named}"


@pytest.mark.parametrize("cue", ["pose", "parsing"])
def test_a_cue_that_is_switched_off_is_one_that_is_not_known(setup: Setup, mild: Eraser, case: Case, cue: str) -> None:
    method = MILDMethod(**{cue: False})  # type: ignore[arg-type]
    assert np.array_equal(erased(method.open(setup), case), erased(mild, replace(case, **{cue: None})))


@pytest.mark.parametrize(
    ("trained", "parts"),
    [
        ("full", {"hmg", "pose", "parsing", "sma"}),
        ("backbone", set()),
        ("sma", {"sma"}),
        ("hmg", {"hmg", "pose", "parsing"}),
        ("hmg-pose", {"hmg", "pose"}),
        ("hmg-parsing", {"hmg", "parsing"}),
    ],
)
def test_adapters_that_were_trained_without_a_part_run_without_it(
    setup: Setup, adapters: Callable[[str], str], case: Case, trained: str, parts: set[str]
) -> None:
    """The cues that they have matter, those that they lack do not."""
    method = MILDMethod(adapters=adapters(trained))
    assert {name for name, works in method.parts(setup).items() if works} == parts
    eraser = method.open(setup)
    result = erased(eraser, case)
    for cue in ("pose", "parsing"):
        assert np.array_equal(erased(eraser, replace(case, **{cue: None})), result) == (cue not in parts)


def test_what_mild_sees_beyond_the_hole_may_change_and_with_the_switch_off_stays(
    setup: Setup, adapters: Callable[[str], str], make_case: Callable[..., Case]
) -> None:
    """Heads that see people everywhere, of a mask that is small."""
    case = make_case(1, height=45, width=51, people=1)
    method, outside = MILDMethod(adapters=adapters("extents")), ~case.hole
    before = case.image[outside]
    assert not np.array_equal(erased(method.open(setup), case)[outside], before)
    off = method.model_copy(update={"extents": False})
    assert np.array_equal(erased(off.open(setup), case)[outside], before)


@pytest.mark.parametrize("method", [MILDMethod, BaseMethod])
def test_the_prompt_is_that_of_the_adapters_where_the_evaluation_names_none(
    setup: Setup, case: Case, tmp_path: Path, method: type[WindowsMethod]
) -> None:
    """The base is held against them, and so is given the same."""
    shutil.copytree(setup.adapters, folder := tmp_path / "trained")
    config = json.loads((folder / "mild.json").read_text())
    (folder / "mild.json").write_text(json.dumps(config | {"prompt": "a lawn"}))
    trained = replace(setup, adapters=str(folder))
    named = replace(setup, prompt="a lawn")
    result = erased(method().open(trained), case)
    assert np.array_equal(result, erased(method().open(named), case))
    assert not np.array_equal(result, erased(method().open(setup), case))
    assert method().fingerprint(trained) != method().fingerprint(setup)
    another = replace(trained, prompt="a wall")
    assert np.array_equal(
        erased(method().open(another), case), erased(method().open(replace(setup, prompt="a wall")), case)
    )


def test_switching_off_what_is_not_there_changes_nothing(
    setup: Setup, adapters: Callable[[str], str], case: Case
) -> None:
    method = MILDMethod(adapters=adapters("backbone"))
    switched = method.model_copy(update={"sma": False, "hmg": False, "pose": False, "parsing": False})
    assert np.array_equal(erased(switched.open(setup), case), erased(method.open(setup), case))


def test_with_cues_of_others_each_picture_is_filled_as_if_these_were_its_own(
    setup: Setup, mild: Eraser, make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    method, every = MILDMethod(shuffled_cues=True), DatasetSettings()
    samples = [make_sample(1, height=45, width=51), make_sample(2, people=3)]
    given: Any = (method, method.fingerprint(setup), setup, samples, every, 7, tmp_path, lambda done: None)
    Bench().erase_cases(*given, samples[::-1])
    cases = [case_of(sample, every, "exact") for sample in samples]
    for case, other in zip(cases, cases[::-1], strict=True):
        seed, result = derived_seed(7, case.key), read_picture(tmp_path / case.key / "exact.png")
        assert np.array_equal(result, erased(mild, with_cues_of(case, other), seed))
        assert not np.array_equal(result, erased(mild, case, seed))
    assert method.title == "MILD, cues of others"
    assert method.parts(setup) == MILDMethod(pose=False, parsing=False).parts(setup)


# The honest arm


def test_the_base_arm_is_mild_with_adapters_that_have_learned_nothing(
    setup: Setup, adapters: Callable[[str], str], base: Eraser, case: Case
) -> None:
    fresh = MILDMethod(adapters=adapters("fresh")).open(setup)
    assert np.abs(erased(base, case).astype(int) - erased(fresh, case)).max() <= 1


def test_the_base_arm_is_the_pipeline_without_adapters_at_their_resolution(
    setup: Setup, tiny_base: str, base: Eraser, case: Case
) -> None:
    pipeline = MILDPipeline.from_pretrained(tiny_base)
    pipeline.set_progress_bar_config(disable=True)

    def expected() -> np.ndarray:
        given: dict[str, Any] = {"margin": 0, "num_inference_steps": 2, "output_type": "np"}
        generator = torch.Generator().manual_seed(0)
        image: np.ndarray = pipeline(case.image, list(case.masks), generator=generator, **given).image
        return image

    own = erased(BaseMethod().open(replace(setup, adapters="")), case)
    assert pipeline.resolutions[0] != RESOLUTION
    assert np.array_equal(own, expected())
    pipeline.unet.register_to_config(sample_size=RESOLUTION // pipeline.vae_scale_factor)
    assert np.array_equal(erased(base, case), expected())
    assert not np.array_equal(own, expected())


# Whether it can be run, and what it is


def test_what_is_not_there_is_told(setup: Setup, tmp_path: Path) -> None:
    nothing = replace(setup, base="", adapters="")
    assert MILDMethod().missing(setup) is None
    assert BaseMethod().missing(setup) is None
    assert "--adapters" in (MILDMethod().missing(nothing) or "")
    assert "no base is named" in (BaseMethod().missing(nothing) or "")
    gone = replace(setup, base=str(tmp_path / "gone"))
    assert "gone is no folder here" in (BaseMethod().missing(gone) or "")
    assert "gone is no folder here" in (MILDMethod().missing(replace(gone, own_bases=False)) or "")
    assert "nowhere does not exist" in (MILDMethod(adapters=str(tmp_path / "nowhere")).missing(setup) or "")
    assert "mild.json is missing" in (MILDMethod(adapters=str(tmp_path)).missing(setup) or "")
    with pytest.raises(UserError, match=r"mild\.json is missing"):
        MILDMethod(adapters=str(tmp_path)).open(setup)


def test_a_base_that_the_evaluation_names_is_that_of_the_adapters_too(setup: Setup, tmp_path: Path) -> None:
    shutil.copytree(place_of(setup.base), tmp_path / "base")
    (tmp_path / "base/more.txt").write_text("another base")
    other = replace(setup, base=str(tmp_path / "base"))
    assert MILDMethod().weights(other)["base"] == MILDMethod().weights(setup)["base"]
    all_of_one = replace(other, own_bases=False)
    assert MILDMethod().weights(all_of_one)["base"] == BaseMethod().weights(other)["base"]
    assert MILDMethod().fingerprint(all_of_one) != MILDMethod().fingerprint(other)


@pytest.mark.parametrize("method", [MILDMethod, BaseMethod])
def test_the_fingerprint_is_that_of_settings_and_not_of_names(setup: Setup, method: type[WindowsMethod]) -> None:
    def fingerprint(setup: Setup = setup, **values: Any) -> str:
        return method.model_validate(values).fingerprint(setup)

    assert fingerprint(name="another", arm="arm") == fingerprint()
    assert fingerprint(inference_steps=2) == fingerprint(), "as all methods"
    others = [
        fingerprint(replace(setup, inference_steps=3)),
        fingerprint(replace(setup, prompt="a lawn")),
        fingerprint(match_colours=False),
    ]
    if method is MILDMethod:
        others += [fingerprint(**{switch: False}) for switch in ("sma", "hmg", "pose", "parsing")]
        others.append(fingerprint(shuffled_cues=True))
    assert len({fingerprint(), *others}) == 1 + len(others)
    assert fingerprint(replace(setup, inference_steps=3), inference_steps=2) == fingerprint()


def test_the_fingerprint_is_that_of_the_weights_wherever_they_lie(
    setup: Setup, adapters: Callable[[str], str], tmp_path: Path
) -> None:
    before = MILDMethod().fingerprint(setup)
    shutil.copytree(setup.adapters, tmp_path / "copy")
    moved = replace(setup, adapters=str(tmp_path / "copy"))
    assert MILDMethod().fingerprint(moved) == MILDMethod(adapters=moved.adapters).fingerprint(setup) == before
    assert MILDMethod(adapters=adapters("hmg")).fingerprint(setup) != before
    weights = tmp_path / "copy/sma.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert MILDMethod().fingerprint(moved) != before


def test_the_base_arms_fingerprint_is_that_of_the_base_and_its_resolution(
    setup: Setup, adapters: Callable[[str], str], nano_base: str, tmp_path: Path
) -> None:
    def fingerprint(**changes: str) -> str:
        return BaseMethod().fingerprint(replace(setup, **changes))

    shutil.copytree(setup.base, tmp_path / "copy")
    assert fingerprint(base=str(tmp_path / "copy")) == fingerprint()
    assert fingerprint(base=nano_base) != fingerprint()
    assert fingerprint(adapters=adapters("hmg")) == fingerprint(), "of the same resolution"
    assert fingerprint(adapters="") != fingerprint(), "at its own resolution"


def test_names_of_several_runs_are_in_titles() -> None:
    assert MILDMethod(name="mild-seed-2", arm="mild").title == "MILD (mild-seed-2)"
    assert MILDMethod().title == "MILD"
