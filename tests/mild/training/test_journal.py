"""What a training run shows of itself: read back from TensorBoard's own files, and never felt by the weights."""

from __future__ import annotations

import filecmp
import importlib.machinery
import io
import itertools
import logging
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import torch
from accelerate.utils import LoggerType
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dataset_tools.errors import UserError
from dataset_tools.schema import EncodingSettings, Sample
from dataset_tools.shards import Manifest, write_shard
from mild.erasing.pipeline import MILDPipeline
from mild.metrics.psnr import psnr_hole
from mild.model.backbone import load_base
from mild.model.layered import LayeredUNet
from mild.settings import RegionLossSettings, TrainSettings, WarmUpSettings
from mild.training.journal import GAP, HOLE, TILE, SamplePictures, numbers_of, peak_memory, spreads_of
from mild.training.launch import TrainRequest, validation_of
from mild.training.loop import Preempted, train

pytestmark = pytest.mark.slow

Entries = list[tuple[int, dict[str, float]]]


def _events(output: Path) -> EventAccumulator:
    """All that TensorBoard would show of the run."""
    accumulator = EventAccumulator(f"{output}.work/logs/mild", size_guidance={"scalars": 0, "images": 0})
    return accumulator.Reload()


def _scalars(output: Path) -> Entries:
    """Step to values by name, in the order of the files."""
    events, found = _events(output), {}  # type: ignore[var-annotated]
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in found.setdefault(event.step, {}), "a step is there once"
            found[event.step][name] = event.value
    return list(found.items())


def _assert_same(found: Entries, expected: Entries) -> None:
    """TensorBoard keeps numbers in float32."""
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (_, values), (_, told) in zip(found, expected, strict=True):
        assert values == pytest.approx(told, rel=1e-6)


@pytest.fixture
def entries() -> Entries:
    """What the callback was told."""
    return []


@pytest.fixture
def log(entries: Entries) -> Callable[[int, dict[str, float]], None]:
    return lambda step, values: entries.append((step, values))


@pytest.fixture
def validation(make_sample: Callable[..., Sample], in_memory: Callable[..., Any]) -> Any:
    """Four samples out of order: the first by key shows nobody, the second has no truth."""
    samples = [make_sample(index) for index in (33, 31, 30, 32)]
    for person in samples[2].people:
        person.mask[:] = False
    samples[1].background = None
    return in_memory(samples)


def test_tensorboard_and_the_callback_are_told_the_same_while_the_run_goes_on(
    samples: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path, entries: Entries
) -> None:
    seen: list[Entries] = []

    def log(step: int, values: dict[str, float]) -> None:
        entries.append((step, values))
        seen.append(_scalars(tmp_path / "out"))

    settings = quick.model_copy(update={"region_loss": RegionLossSettings(), "steps": 5})
    train(settings, samples, tiny_base, str(tmp_path / "out"), log)
    assert [step for step, _ in entries] == [2, 4, 5]
    for count, found in enumerate(seen, start=1):
        _assert_same(found, entries[:count])
    first, middle, _ = (values for _, values in entries)
    assert first.keys() == middle.keys() == {
        *("loss/total", "loss/background", "loss/foreground", "loss/core", "loss/boundary", "loss/gradient"),
        *("loss/extents",),
        *("lambda", "gradient_norm", "learning_rate/adapters", "learning_rate/sma", "learning_rate/guidance"),
        *("sma/alpha_00", "sma/alpha_01", "sma/alpha_10", "sma/alpha_11", "hmg/gate"),
        *("samples_per_second", "waiting_for_data", "memory/peak_gib"),
    }  # fmt: skip
    rates = [quick.learning_rate, quick.sma_learning_rate, quick.guidance_learning_rate]
    assert [first[f"learning_rate/{name}"] for name in ("adapters", "sma", "guidance")] == rates
    assert min(first["samples_per_second"], first["memory/peak_gib"], first["gradient_norm"]) > 0


def test_the_terms_of_the_region_loss_add_up_to_the_foreground_whatever_the_passes(
    samples: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path, log: Any, entries: Entries
) -> None:
    changes = {"region_loss": RegionLossSettings(), "steps": 1, "warm_up": WarmUpSettings(start=0, end=0)}
    for passes in (1, 2):
        settings = quick.model_copy(update=changes | {"gradient_accumulation": passes})
        train(settings, samples, tiny_base, str(tmp_path / str(passes)), log)
    (_, one), (_, several) = entries
    assert one["loss/foreground"] == pytest.approx(sum(one[f"loss/{t}"] for t in ("core", "boundary", "gradient")))
    assert one["loss/foreground"] > one["loss/boundary"] > 0
    for term in ("core", "boundary", "gradient"):
        assert several[f"loss/{term}"] == pytest.approx(one[f"loss/{term}"], rel=1e-4)


def test_alphas_and_gates_are_those_that_the_run_leaves(
    samples: Any, nano_base: str, quick: TrainSettings, tmp_path: Path, log: Any, entries: Entries
) -> None:
    train(quick, samples, nano_base, str(tmp_path / "out"), log)
    alphas = np.stack([alpha.numpy() for alpha in load_file(tmp_path / "out/sma.safetensors").values()])
    assert np.ptp(alphas, axis=0).any(), "blocks differ, so that a mean tells"
    for s in (0, 1):
        for t in (0, 1):
            assert entries[-1][1][f"sma/alpha_{s}{t}"] == pytest.approx(alphas[:, s, t].mean(), rel=1e-5)
    weights = load_file(tmp_path / "out/hmg.safetensors")
    gates = np.concatenate([tensor.numpy() for name, tensor in weights.items() if name.startswith("gates.")])
    assert entries[-1][1]["hmg/gate"] == pytest.approx(np.abs(gates).mean(), rel=1e-5)
    events = _events(tmp_path / "out")
    for name, values in [
        ("sma/beta_0_by_block", alphas[:, 0, 1] - alphas[:, 0, 0]),
        ("sma/beta_1_by_block", alphas[:, 1, 1] - alphas[:, 1, 0]),
        ("hmg/gate_by_head", gates),
    ]:
        *_, last = events.Histograms(name)
        found = last.histogram_value
        assert (last.step, found.num) == (4, values.size)
        assert (found.min, found.max, found.sum) == pytest.approx((values.min(), values.max(), values.sum()), rel=1e-5)


def test_parts_that_are_switched_off_have_no_numbers(tiny_base: str, quick: TrainSettings) -> None:
    unet = load_base(tiny_base).unet
    bare = LayeredUNet.create(unet, quick.mild.model_copy(update={"sma": False, "hmg": None}), seed=0)
    assert numbers_of(bare) == {} and spreads_of(bare) == {}


def test_an_interrupted_run_goes_on_with_its_logs_and_shows_every_step_once(
    samples: Any, validation: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path, log: Any, entries: Entries
) -> None:
    """Killed at step 4, after a checkpoint of step 2: TensorBoard has seen steps that will be taken again."""
    settings = quick.model_copy(
        update={"steps": 6, "log_every": 1, "checkpoint_every": 2, "samples_every": 1, "sample_pictures": 1}
    )

    def killed(step: int, values: dict[str, float]) -> None:
        if step == 4:
            raise KeyboardInterrupt

    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(settings, samples, tiny_base, str(output), killed, validation=validation)
    assert [step for step, _ in _scalars(output)] == [1, 2, 3, 4]
    train(settings, samples, tiny_base, str(output), log, validation=validation)
    assert [step for step, _ in entries] == [3, 4, 5, 6]
    found = _scalars(output)
    assert [step for step, _ in found] == [1, 2, 3, 4, 5, 6]
    _assert_same(found[2:], entries)
    assert [event.step for event in _events(output).Images("samples")] == [1, 2, 3, 4, 5, 6]


def test_a_new_run_in_the_same_place_starts_its_logs_anew(
    samples: Any, validation: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path, log: Any, entries: Entries
) -> None:
    output = str(tmp_path / "out")
    train(
        quick.model_copy(update={"samples_every": 4, "sample_pictures": 1}),
        samples,
        tiny_base,
        output,
        lambda *_: None,
        validation=validation,
    )
    train(quick.model_copy(update={"steps": 2, "seed": 1}), samples, tiny_base, output, log)
    _assert_same(_scalars(tmp_path / "out"), entries)
    assert not (tmp_path / "out.work/samples").exists()


def test_pictures_and_logs_do_not_change_a_bit_of_the_weights_also_after_resuming(
    samples: Any, validation: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path
) -> None:
    """With the moving average, which stands in for the weights while pictures are drawn."""
    shown = {"samples_every": 1, "sample_pictures": 1, "log_every": 1}
    hidden = {"samples_every": None, "trackers": (), "log_every": 4}
    settings = quick.model_copy(update={"ema_decay": 0.5, "gradient_checkpointing": True})
    train(settings.model_copy(update=hidden), samples, tiny_base, str(tmp_path / "plain"), lambda *_: None)
    assert not list((tmp_path / "plain.work").rglob("*.*"))
    looked_at = settings.model_copy(update=shown)
    answers = iter([False, True])
    with pytest.raises(Preempted):
        train(
            looked_at,
            samples,
            tiny_base,
            str(tmp_path / "shown"),
            lambda *_: None,
            validation=validation,
            stop=lambda: next(answers),
        )
    train(looked_at, samples, tiny_base, str(tmp_path / "shown"), lambda *_: None, validation=validation)
    weights = [str(path.relative_to(tmp_path / "plain")) for path in (tmp_path / "plain").rglob("*.safetensors")]
    names = [*weights, "loss.csv"]
    assert len(names) == 6
    assert filecmp.cmpfiles(tmp_path / "plain", tmp_path / "shown", names, shallow=False)[0] == names


def test_the_sheet_shows_picture_hole_result_and_truth_of_the_first_by_key_as_the_adapters_erase_them(
    samples: Any, validation: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path
) -> None:
    """The last sheet against the finished directory, loaded again: with the moving average, as it is saved."""
    output = tmp_path / "out"
    settings = quick.model_copy(update={"samples_every": 3, "sample_pictures": 2, "ema_decay": 0.5})
    train(settings, samples, tiny_base, str(output), lambda *_: None, validation=validation)
    names = sorted(path.name for path in Path(f"{output}.work/samples").iterdir())
    assert names == ["step-000003.png", "step-000004.png"]
    sheet = np.asarray(Image.open(output / "samples.png"))
    assert (output / "samples.png").read_bytes() == Path(f"{output}.work/samples/step-000004.png").read_bytes()
    assert "![Sample pictures](samples.png)" in (output / "README.md").read_text()
    height, width = 48, 64
    assert sheet.shape == (2 * height + GAP, 4 * width + 3 * GAP, 3)
    tiles = {
        (row, column): sheet[row * (height + GAP) :][:height, column * (width + GAP) :][:, :width]
        for row in range(2)
        for column in range(4)
    }
    # Sample 30 shows nobody; of sample 31 no truth is known.
    _, without_truth, _, known = validation.samples
    for row, sample in enumerate([without_truth, known]):
        assert np.array_equal(tiles[row, 0], sample.image)
        people = np.logical_or.reduce([person.mask for person in sample.people])
        assert (tiles[row, 1][people] == HOLE).all()
        beside = (tiles[row, 1] != HOLE).any(-1)
        assert np.array_equal(tiles[row, 2][beside], sample.image[beside]) and beside.mean() > 0.3
        assert (tiles[row, 2][people] != sample.image[people]).any()
    assert (tiles[0, 3] == 255).all() and np.array_equal(tiles[1, 3], known.background)
    assert (sheet[height : height + GAP] == 255).all()

    loaded = MILDPipeline.from_pretrained(tiny_base, mild=output)
    assert loaded.layered is not None
    again = SamplePictures(loaded, loaded.layered, _text_of(loaded), validation, settings)
    drawn = again.draw()
    assert np.array_equal(drawn.picture, sheet)
    removed = (tiles[1, 1] == HOLE).all(-1)
    assert drawn.psnr == pytest.approx(psnr_hole(tiles[1, 2], known.background, removed), abs=0.1)
    known.known = np.cumsum(removed).reshape(removed.shape) < removed.sum() / 2
    assert again.draw().psnr == pytest.approx(psnr_hole(tiles[1, 2], known.background, removed & known.known), abs=0.1)
    known.known[:] = False
    assert again.draw().psnr is None
    logged = _events(output).Scalars("validation/psnr")
    assert [value.step for value in logged] == [3, 4] and logged[-1].value == pytest.approx(drawn.psnr, rel=1e-5)
    images = _events(output).Images("samples")
    assert [image.step for image in images] == [3, 4]
    for image, name in zip(images, names, strict=True):
        decoded = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        assert np.array_equal(decoded, np.asarray(Image.open(Path(f"{output}.work/samples") / name)))


def _text_of(pipeline: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the empty prompt."""
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt("", do_classifier_free_guidance=False)
    return text, pooled


def test_sheets_hold_reduced_pictures(
    tiny_base: str, quick: TrainSettings, make_sample: Callable[..., Sample], in_memory: Callable[..., Any]
) -> None:
    """Small enough to be logged many times, whatever the dataset's photographs are."""
    pipeline = load_base(tiny_base)
    layered = LayeredUNet.create(pipeline.unet, quick.mild, seed=0)
    layered.resolution = layered.inference_resolution = 32
    data = in_memory([make_sample(0, height=3 * TILE, width=2 * TILE), make_sample(1)])
    sheet = SamplePictures(pipeline, layered, _text_of(pipeline), data, quick).draw().picture
    width = round(TILE * 2 / 3)
    assert sheet.shape == (TILE + GAP + 48, 4 * width + 3 * GAP, 3)


def test_text_encoders_are_gone_once_the_prompt_is_encoded_also_where_pictures_are_drawn(
    samples: Any,
    validation: Any,
    tiny_base: str,
    quick: TrainSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoders: list[weakref.ref[torch.nn.Module]] = []

    def watched(base: str) -> Any:
        pipeline = load_base(base)
        encoders.extend(weakref.ref(encoder) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2))
        return pipeline

    monkeypatch.setattr("mild.training.loop.load_base", watched)
    settings = quick.model_copy(update={"steps": 1, "samples_every": 1, "sample_pictures": 1})
    held: list[Any] = []
    train(
        settings,
        samples,
        tiny_base,
        str(tmp_path / "out"),
        lambda *_: held.extend(encoder() for encoder in encoders),
        validation=validation,
    )
    assert held == [None, None]
    assert (tmp_path / "out/samples.png").is_file()


def test_without_people_to_erase_in_a_validation_split_no_pictures_are_drawn_and_one_line_says_so(
    samples: Any,
    tiny_base: str,
    quick: TrainSettings,
    tmp_path: Path,
    make_sample: Callable[..., Sample],
    in_memory: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    covered = make_sample(0)
    covered.people[0].mask[:] = True
    settings = quick.model_copy(update={"samples_every": 1, "steps": 2})
    for name, validation in [("none", None), ("covered", in_memory([covered]))]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="mild"):
            train(settings, samples, tiny_base, str(tmp_path / name), lambda *_: None, validation=validation)
        assert sum("no pictures are drawn" in record.message for record in caplog.records) == 1
        assert not (tmp_path / f"{name}.work/samples").exists() and not (tmp_path / name / "samples.png").exists()
        assert "samples.png" not in (tmp_path / name / "README.md").read_text()


@pytest.fixture
def request_of(make_sample: Callable[..., Sample], quick: TrainSettings, tmp_path: Path) -> Callable[..., TrainRequest]:
    """A request for a dataset with shards of the splits given, a sample each."""

    def make(**splits: list[str]) -> TrainRequest:
        root, shards = str(tmp_path / "dataset"), {}  # type: ignore[var-annotated]
        number = 0
        for configuration, names in splits.items():
            for split in names:
                sample = make_sample(number := number + 1)
                sample.split, sample.configuration = split, configuration  # type: ignore[assignment]
                if configuration == "paired":
                    sample.known = np.ones(sample.image.shape[:2], bool)
                    for person in sample.people:
                        person.complete_mask = person.augmented_mask = person.layer = None
                        person.order = person.occlusion = None
                path = f"{configuration}/{split}-000000.tar"
                shard = write_shard([sample], root, path, EncodingSettings(), [])
                shards.setdefault(configuration, {})[split] = [shard]
        manifest = Manifest(name="drawn", shards=shards, files={}, source="", settings={}, software={})
        Path(root, "manifest.json").write_text(manifest.model_dump_json())
        return TrainRequest(
            settings=quick,
            dataset=root,
            configurations=dict.fromkeys(splits, 1.0),
            split="train",
            dataset_digest="",
            base="",
            base_digest="",
            output="",
        )

    return make


def test_pictures_show_the_validation_split_of_whichever_configurations_have_one(
    request_of: Callable[..., TrainRequest],
) -> None:
    samples = validation_of(request_of(composite=["train", "validation"], paired=["train"]))
    assert samples is not None and samples.keys == ["sample-2"]
    assert samples[0].split == "validation"
    assert validation_of(request_of(composite=["train"], paired=["train"])) is None


def test_a_validation_shard_that_is_gone_is_named(request_of: Callable[..., TrainRequest]) -> None:
    request = request_of(composite=["train", "validation"])
    Path(request.dataset, "composite/validation-000000.tar").unlink()
    with pytest.raises(UserError, match=r"composite/validation-000000\.tar is missing"):
        validation_of(request)


def test_the_speed_is_that_of_all_steps_since_the_last_entry_without_what_lies_between_them(
    samples: Any,
    tiny_base: str,
    quick: TrainSettings,
    tmp_path: Path,
    log: Any,
    entries: Entries,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps of 1, 3, 1 and 1 seconds, with 100 between them; two samples each, for which they wait in the middle."""
    steps = [(0, 0, 1), (1, 1, 1), (0, 1, 0), (0.5, 0, 0.5)]
    clock = itertools.accumulate([0, *(seconds for step in steps for seconds in (100, *step)), 0])
    monkeypatch.setattr("mild.training.loop.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    train(quick, samples, tiny_base, str(tmp_path / "out"), log)
    assert [values["samples_per_second"] for _, values in entries] == [1.0, 2.0]
    assert [values["waiting_for_data"] for _, values in entries] == [0.25, 0.5]


def test_peak_memory_is_at_least_what_the_process_holds_now() -> None:
    block = np.ones(2**26, np.uint8)
    held = psutil.Process().memory_info().rss / 2**30
    assert held < peak_memory(torch.device("cpu")) * 1.01 < psutil.virtual_memory().total / 2**30
    assert block.all()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_done(
    samples: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda asked: None)
    with pytest.raises(UserError, match=f"trackers: {name} is not installed: pip install {name}"):
        train(
            quick.model_copy(update={"trackers": (name,)}), samples, tiny_base, str(tmp_path / "out"), lambda *_: None
        )
    assert list(tmp_path.iterdir()) == []


class _WandbRun:
    """What `wandb.init` gives, as far as accelerate uses it."""

    def __init__(self, **options: Any) -> None:
        self.options, self.entries, self.ended = options, [], False  # type: ignore[var-annotated]

    def log(self, values: dict[str, Any], step: int) -> None:
        self.entries.append((step, values))

    def finish(self) -> None:
        self.ended = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[_WandbRun]:
    """A stand-in for the package; gives the runs that it was asked for."""
    runs: list[_WandbRun] = []
    module: Any = types.ModuleType("wandb")
    module.init = lambda **options: runs.append(_WandbRun(**options)) or runs[-1]
    module.Image = lambda picture: ("image", picture)
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])
    return runs


def test_weights_and_biases_gets_the_same_and_a_run_that_goes_on_is_the_same_run(
    samples: Any,
    validation: Any,
    tiny_base: str,
    quick: TrainSettings,
    tmp_path: Path,
    log: Any,
    entries: Entries,
    wandb: list[_WandbRun],
) -> None:
    settings = quick.model_copy(
        update={"trackers": ("tensorboard", "wandb"), "log_every": 1, "samples_every": 2, "sample_pictures": 1}
    )
    output, answers = str(tmp_path / "out"), iter([False, True])
    with pytest.raises(Preempted):
        train(settings, samples, tiny_base, output, log, validation=validation, stop=lambda: next(answers))
    train(settings, samples, tiny_base, output, log, validation=validation)
    first, second = wandb
    assert first.options["id"] == second.options["id"] and second.options["resume"] == "allow"
    assert first.options["dir"] == f"{output}.work/logs" and first.options["project"] == "mild"
    assert TrainSettings.check(first.options["config"], origin="wandb") == settings
    told = [*first.entries, *second.entries]
    assert [(step, values) for step, values in told if "samples" not in values] == entries
    pictures = [(step, values["samples"]) for step, values in told if "samples" in values]
    assert [step for step, _ in pictures] == [2, 4]
    (((kind, sheet),),) = [shown for step, shown in pictures if step == 4]
    assert kind == "image" and np.array_equal(sheet, np.asarray(Image.open(tmp_path / "out/samples.png")))
    assert first.ended and second.ended
    train(settings, samples, tiny_base, output, log, validation=validation)
    assert wandb[2].options["id"] != first.options["id"], "a run that starts anew is another one"


def test_a_tracker_that_cannot_start_says_why_in_one_line(
    samples: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty).\n  Call wandb.login(key=[your_api_key])")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    settings = quick.model_copy(update={"trackers": ("wandb",)})
    with pytest.raises(UserError, match=r"trackers: api_key not configured \(no-tty\). Call wandb.login"):
        train(settings, samples, tiny_base, str(tmp_path / "out"), lambda *_: None)
    assert not (tmp_path / "out").exists()
