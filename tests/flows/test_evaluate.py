"""The flow ``evaluate``: what is computed once is kept; what is missing, altered or set otherwise is redone alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from scipy.linalg import sqrtm

from dataset_tools.errors import UserError
from dataset_tools.shards import ShardDataset
from dataset_tools.storage import open_root
from flows import cli
from flows.evaluate import _Evaluation, check_evaluate, evaluate
from flows.evaluation_report import _card_title, _loss_chart
from flows.evaluation_steps import EraseJob, InsightJob, cases_jobs, erase
from mild.bases import NANO, NANO_ADAPTERS
from mild.evaluation.cases import case_of, prepare_cases
from mild.evaluation.leakage import leakage_of
from mild.evaluation.methods import Setup
from mild.evaluation.methods.mild import MILDMethod
from mild.evaluation.settings import DatasetSettings, EvaluateSettings
from mild.evaluation.summary import Summary
from mild.metrics.inception import FID

pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.slow]

METHODS: list[Any] = ["telea", "mean-fill"]
METRICS: list[Any] = ["psnr_hole", "ssim"]


def recipe(folder: Path, **changes: Any) -> str:
    """Two quick methods and metrics on six samples in two shards."""
    values = {
        "datasets": {"drawn": {"configuration": "composite", "split": "train"}},
        "methods": METHODS,
        "metrics": METRICS,
        "resamples": 100,
        "shown": 2,
        "leakage": 1,
        "layers": 1,
        **changes,
    }
    path = folder / "evaluate.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def run(folder: Path, dataset: str, adapters: str = "", against: str = "", **changes: Any) -> dict[str, Any]:
    """Evaluate into ``folder/out``."""
    return evaluate(recipe(folder, **changes), dataset, adapters, str(folder / "out"), None, against)


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary as far as it is the same on every machine."""
    for method in summary["methods"]:
        del method["seconds"]
    return summary


@pytest.fixture(scope="module")
def finished(drawn_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, run(folder, drawn_dataset)


@pytest.fixture
def again(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the finished evaluation, in whose place another may be made."""
    for name in ("out", "out.work"):
        shutil.copytree(finished[0] / name, tmp_path / name, copy_function=shutil.copy)
    return tmp_path


def test_the_output_holds_tables_report_and_pictures(finished: tuple[Path, dict[str, Any]], drawn_dataset: str) -> None:
    folder, result = finished
    out = folder / "out"
    summary = Summary.model_validate_json((out / "summary.json").read_text())
    assert (summary.baseline, [row.samples for row in summary.datasets]) == ("telea", [6])
    assert [row.name for row in summary.methods] == METHODS and result["cached"] == 0
    assert all(row.seconds is not None and row.seconds > 0 for row in summary.methods)
    rows = pq.read_table(out / "samples.parquet").to_pylist()
    assert len(rows) == 6 * 2
    assert {"report.html", "tables.md", "tables.tex"} <= {path.name for path in out.iterdir()}
    sample = ShardDataset(drawn_dataset, "composite", "train")[4]
    place = out / "pictures" / "drawn" / sample.key
    assert np.array_equal(np.asarray(Image.open(place / "before.png")), sample.image)
    assert {path.name for path in (place / "exact").iterdir()} == {"mask.png", "telea.png", "mean-fill.png"}
    assert len(summary.spectra) == 2 and all(one.pictures == 3 for one in summary.spectra)


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        # Two shards erased, two metrics on each, a spectrum, the report.
        ({"methods": [*METHODS, "smooth-fill"]}, 2 + 2 * 2 + 1 + 1),
        # Two methods on two shards, the report.
        ({"metrics": [*METRICS, "psnr"]}, 4 + 1),
        ({"methods": ["telea"]}, 1),
        ({"methods": [{"kind": "telea", "name": "other"}, "mean-fill"]}, 1 + 1),
    ],
    ids=["a method", "a metric", "one method less", "another name"],
)
def test_what_is_added_is_computed_alone(again: Path, drawn_dataset: str, changes: dict[str, Any], new: int) -> None:
    """By another name a method's spectrum, which holds its name, is taken again, and nothing is erased again."""
    result = run(again, drawn_dataset, **changes)
    assert result["steps"] - result["cached"] == new


def test_another_dataset_leaves_the_first_alone_and_has_a_table_of_its_own(
    again: Path, drawn_dataset: str, bucket: str
) -> None:
    """The same one with faulty masks: two shards prepared, erased by two methods, by two metrics.

    The dataset was copied to a store meanwhile, and what was computed from it on a disk stays.
    """
    filesystem, place = open_root(f"{bucket}/dataset")
    filesystem.put(f"{drawn_dataset}/", f"{place}/", recursive=True)
    datasets = {
        "drawn": {"configuration": "composite", "split": "train"},
        "faulty": {"configuration": "composite", "split": "train", "masks": ["augmented"]},
    }
    result = run(again, f"{bucket}/dataset", datasets=datasets)
    assert result["steps"] - result["cached"] == 2 + 4 + 8 + 1
    means = {group["dataset"]: group["cells"]["telea"]["psnr_hole"]["mean"] for group in result["summary"]["groups"]}
    assert means["faulty"] < means["drawn"] - 3


def test_a_run_that_changes_nothing_does_nothing(again: Path, drawn_dataset: str) -> None:
    before = (again / "out/report.html").stat().st_ino
    result = run(again, drawn_dataset)
    assert result["cached"] == result["steps"]
    assert (again / "out/report.html").stat().st_ino == before


def test_a_picture_that_was_altered_is_made_again(
    again: Path, finished: tuple[Path, dict[str, Any]], drawn_dataset: str
) -> None:
    """At the output, where it may be a link to what the work folder keeps: both are as they were."""
    chosen = sorted((again / "out.work").glob("erase-*/*/exact.png"))[0]
    original = chosen.read_bytes()
    chosen.write_bytes(b"no picture")
    shown = next((again / "out/pictures").glob("*/*/exact/telea.png"))
    shown.unlink()
    result = run(again, drawn_dataset)
    assert result["steps"] - result["cached"] == 2, "the method on the shard, and the report"
    assert chosen.read_bytes() == original and shown.is_file()
    assert without_times(result["summary"])["groups"] == finished[1]["summary"]["groups"]


def test_an_evaluation_that_was_killed_goes_on_and_ends_with_the_same_summary(
    finished: tuple[Path, dict[str, Any]], drawn_dataset: str, tmp_path: Path, run_killed: Callable[..., None]
) -> None:
    """SIGKILL while the second method works on its first shard: what the first did is kept."""
    given = (recipe(tmp_path), drawn_dataset, "", str(tmp_path / "out"))
    run_killed("mild.evaluation.compare.Bench.erase_cases", 3, evaluate, *given)
    assert not (tmp_path / "out").exists()
    result = run(tmp_path, drawn_dataset)
    assert result["cached"] == 2 + 2, "the cases, and the first method on both shards"
    assert without_times(result["summary"])["groups"] == finished[1]["summary"]["groups"]


def test_what_cannot_be_run_is_told_and_all_else_runs(tmp_path: Path, drawn_dataset: str) -> None:
    result = run(tmp_path, drawn_dataset, methods=["telea", "base", "mild"])
    told = {method["name"]: method["not_run"] for method in result["summary"]["methods"]}
    assert told["telea"] == ""
    assert "no base is named" in told["base"] and "no adapters are named" in told["mild"]
    assert set(result["summary"]["groups"][0]["cells"]) == {"telea"}
    with pytest.raises(UserError, match="no method can be run: mild: no adapters are named"):
        run(tmp_path, drawn_dataset, methods=["mild"])


def test_results_of_others_that_are_missing_are_named_before_anything_is_erased(
    tmp_path: Path, drawn_dataset: str
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/sample-0.png").write_bytes(b"no picture")
    (tmp_path / "theirs/sample-99.png").write_bytes(b"of nothing")
    with pytest.raises(
        UserError, match=r"1 unreadable \(sample-0.png.*5 missing \(sample-1.png; .*1 extra.*sample-99.png"
    ):
        run(tmp_path, drawn_dataset, methods=["telea", {"kind": "folder", "folder": str(tmp_path / "theirs")}])
    assert not list((tmp_path / "out.work").glob("erase-*"))


def test_sets_of_pictures_are_compared_over_all_shards(
    tmp_path: Path, drawn_dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FID on mean colours instead of Inception's features: the closed form of two normal distributions.

    The clean backgrounds are of the very places that are judged; pictures that show nobody are those of the split.
    """

    def features(self: FID, pictures: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([picture.mean((0, 1)) for picture in pictures]).astype(np.float32)

    monkeypatch.setattr(FID, "features", features)
    monkeypatch.setattr(FID, "features_fingerprint", lambda self: "mean colours")
    monkeypatch.setattr(FID, "missing", lambda self: None)
    free = {"kind": "fid", "reference_pictures": "person-free"}
    datasets = {"drawn": {"configuration": "composite", "split": "train", "samples": 5}}
    person_free = {"configuration": "composite", "split": "train"}
    result = run(tmp_path, drawn_dataset, metrics=["psnr", "fid", free], datasets=datasets, person_free=person_free)
    cells = result["summary"]["groups"][0]["cells"]["telea"]
    pictures = tmp_path / "out/pictures/drawn"
    results, truths = (
        np.array([np.asarray(Image.open(path)).mean((0, 1)) for path in sorted(pictures.glob(pattern))], np.float32)
        for pattern in ("*/exact/telea.png", "*/truth.png")
    )
    held = ShardDataset(drawn_dataset, "composite", "train")
    plates = np.array(
        [plate.mean((0, 1)) for plate in (sample.background for sample in held) if plate is not None], np.float32
    )
    assert len(results) == len(truths) == 5 and len(plates) == 6
    for name, reference in (("fid", truths), ("fid-person-free", plates)):
        expected = _frechet(results.astype(np.float64), reference.astype(np.float64))
        assert cells[name]["mean"] == pytest.approx(expected, rel=1e-4)
        assert cells[name]["count"] == 5 and "below 2048" in cells[name]["warning"]
    more = run(
        tmp_path,
        drawn_dataset,
        metrics=["psnr", "fid", free],
        datasets=datasets,
        person_free=person_free,
        methods=[*METHODS, "smooth-fill"],
    )
    # Erased, scored, its features twice (all results; those with a truth), on two shards; a spectrum; the report.
    assert more["steps"] - more["cached"] == 2 * (1 + 1 + 2) + 1 + 1


def test_a_set_that_lacks_results_is_compared_with_the_same_places_and_has_no_rank(
    tmp_path: Path, drawn_dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truth itself, but for one picture: its distance is none, and it must not lead by that."""

    def features(self: FID, pictures: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([picture.mean((0, 1)) for picture in pictures]).astype(np.float32)

    held = {sample.key: sample for sample in ShardDataset(drawn_dataset, "composite", "train")}

    def tried(eraser: Any, cases: Sequence[Any], seeds: Sequence[int]) -> list[Any]:
        return [UserError("too hard") if case.key == "sample-1" else held[case.key].background for case in cases]

    monkeypatch.setattr(FID, "features", features)
    monkeypatch.setattr(FID, "features_fingerprint", lambda self: "mean colours")
    monkeypatch.setattr(FID, "missing", lambda self: None)
    monkeypatch.setattr("mild.evaluation.compare._tried", tried)
    cell = run(tmp_path, drawn_dataset, metrics=["fid"], methods=["telea"])["summary"]["groups"][0]["cells"]["telea"]
    assert cell["fid"]["count"] == 5 and cell["fid"]["mean"] == pytest.approx(0, abs=1e-3)


def _frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. 2017, eq. 6, by SciPy's matrix root."""
    first, second = np.cov(a.T), np.cov(b.T)
    root = sqrtm(first @ second)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * np.real(root)))


def test_mild_is_shown_in_layers_and_with_what_leaks(tmp_path: Path, drawn_dataset: str) -> None:
    """And beside the base in the same pipeline, which is what its difference is taken to."""
    methods = ["base", "mild", {"kind": "mild", "name": "without-sma", "sma": False}]
    datasets = {"drawn": {"configuration": "composite", "split": "train", "samples": 1}}
    result = run(tmp_path, drawn_dataset, NANO_ADAPTERS, methods=methods, inference_steps=2, datasets=datasets)
    summary = Summary.model_validate(result["summary"])
    assert summary.headline is not None
    assert (summary.headline.method, summary.headline.baseline) == ("mild", "base")
    assert summary.methods[1].parts == {"hmg": True, "pose": True, "parsing": True, "sma": True, "extents": True}
    assert set(summary.methods[1].weights) == {"base", "adapters"}
    assert [leakage.method for leakage in summary.leakage] == ["mild", "without-sma"]
    own, without = summary.leakage
    assert own.gamma != own.gamma_vanilla and without.gamma == without.gamma_vanilla
    assert len(own.gamma) == len(own.blocks) and len(own.gamma[0]) == len(own.steps) == 2
    (key,) = {row["key"] for row in pq.read_table(tmp_path / "out/samples.parquet").to_pylist()}
    layers = tmp_path / "out/layers/drawn" / key
    assert {path.name for path in layers.iterdir()} == {
        "before.png",
        "background.png",
        "layer-0.png",
        "layer-1.png",
    }


def test_what_is_kept_of_leakage_goes_with_the_name_that_it_holds(tmp_path: Path, drawn_dataset: str) -> None:
    place = {"root": str(tmp_path / "out"), "work": str(tmp_path)}
    held = ShardDataset(drawn_dataset, "composite", "train")
    (cases, *_) = cases_jobs(place, "drawn", DatasetSettings(split="train"), held, np.arange(len(held)))

    def key(name: str, what: Any) -> str:
        method = {"method": MILDMethod(name=name), "fingerprint": "same", "setup": Setup("", "", 1, ""), "seed": 0}
        return InsightJob(**place, erased=EraseJob(**place, **method, cases=cases), what=what).key()

    assert key("mild", "leakage") != key("ours", "leakage") and key("mild", "layers") == key("ours", "layers")


def test_measuring_leakage_gives_the_pipeline_back(drawn_dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What watches it knows it: unless it is taken off, neither is ever freed."""
    sample = ShardDataset(drawn_dataset, "composite", "train")[0]
    case, opened, open_method = case_of(sample, DatasetSettings(), "exact"), [], MILDMethod.open

    def noting(self: MILDMethod, setup: Setup) -> Any:
        opened.append(open_method(self, setup))
        return opened[-1]

    monkeypatch.setattr(MILDMethod, "open", noting)
    leakage_of(MILDMethod(), Setup(NANO, NANO_ADAPTERS, 1, ""), [case], 0)
    assert opened[0].pipeline.watch is None


def test_each_method_that_fails_is_told_its_own_reason(tmp_path: Path, drawn_dataset: str) -> None:
    """No result of one is no result of the other."""
    methods = ["telea"] + [
        {"kind": "command", "name": name, "command": ["sh", "-c", f"echo {name} is out >&2; exit 1"]}
        for name in ("tea", "coffee")
    ]
    datasets = {"drawn": {"configuration": "composite", "split": "train", "samples": 1}}
    result = run(tmp_path, drawn_dataset, methods=methods, datasets=datasets)
    cells = result["summary"]["groups"][0]["cells"]
    for name in ("tea", "coffee"):
        (reason,) = cells[name]["psnr_hole"]["not_computed"]
        assert f"{name} is out" in reason


def test_a_program_that_failed_is_tried_again_by_the_next_run(tmp_path: Path, drawn_dataset: str) -> None:
    """As where a library of it was missing; what it could do is kept from then on."""
    there = tmp_path / "library"
    methods = [
        {"kind": "command", "name": "program", "command": ["sh", "-c", f"test -e {there} && cp image.png result.png"]}
    ]
    datasets = {"drawn": {"configuration": "composite", "split": "train", "samples": 2}}
    told = []
    for _ in range(3):
        result = run(tmp_path, drawn_dataset, methods=["telea", *methods], datasets=datasets)
        rows = pq.read_table(tmp_path / "out/samples.parquet").to_pylist()
        own = [row for row in rows if row["method"] == "program"]
        told.append(([row["psnr_hole"] is None for row in own], [row["seconds"] is None for row in own]))
        there.touch()
    assert told == [([True] * 2, [True] * 2)] + [([False] * 2, [False] * 2)] * 2
    assert result["cached"] == result["steps"]


def test_who_fills_the_whole_picture_is_not_looked_into(
    tmp_path: Path, drawn_dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can be erased there; the next picture is looked into."""
    asked: list[Any] = []
    monkeypatch.setattr(_Evaluation, "_do_here", lambda self, step, jobs: asked.extend(jobs) or [])
    evaluation = _Evaluation(EvaluateSettings.load(recipe(tmp_path)), drawn_dataset, NANO_ADAPTERS, str(tmp_path))
    held = ShardDataset(drawn_dataset, "composite", "train")
    (cases, *_) = cases_jobs(evaluation.place, "drawn", DatasetSettings(split="train"), held, np.arange(len(held)))
    first, *others = prepare_cases(cases.samples(), cases.settings, cases.kept_at)
    for what in ("layers", "leakage"):
        evaluation._insights(what, [MILDMethod()], {"mild": ""}, cases, [replace(first, hole_share=1.0), *others])
    assert [job.erased.cases.indices for job in asked] == [(1,), (1,)]


def test_a_table_of_the_run_before_that_cannot_be_read_is_told_of_at_the_door(
    again: Path, drawn_dataset: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = str(tmp_path_factory.mktemp("new") / "out")
    for broken in (b"no table", b""):
        (again / "out/samples.parquet").write_bytes(broken)
        for output, against in ((str(again / "out"), "before"), (elsewhere, str(again / "out"))):
            with pytest.raises(UserError, match=r"samples.parquet cannot be read"):
                check_evaluate(recipe(again), drawn_dataset, "", output, None, against)
    pq.write_table(pa.table({"other": [1]}), again / "out/samples.parquet")
    with pytest.raises(UserError, match="lacks the columns"):
        check_evaluate(recipe(again), drawn_dataset, "", elsewhere, None, str(again / "out"))


def test_the_loss_curve_is_drawn_anew_and_nothing_of_it_is_markup(tmp_path: Path) -> None:
    (tmp_path / "loss.csv").write_text("step,loss,background,foreground,extents,lambda\n1,2,1,1,0,1\n2,1,0.5,0.5,0,1\n")
    chart = _loss_chart(tmp_path / "loss.csv")
    assert chart is not None and chart.startswith("<svg ") and 'id="foreground"' in chart
    for broken in ('<meta http-equiv="refresh">', "step\n<b>\n", "background,lambda\n1,x\n"):
        (tmp_path / "loss.csv").write_text(broken)
        assert "<meta" not in (_loss_chart(tmp_path / "loss.csv") or "")


def test_cues_are_shuffled_over_all_shards(tmp_path: Path, drawn_dataset: str) -> None:
    place = {"root": str(tmp_path / "out"), "work": str(tmp_path)}
    held = ShardDataset(drawn_dataset, "composite", "train")
    jobs = cases_jobs(place, "drawn", DatasetSettings(split="train"), held, np.arange(len(held)))
    for job in jobs:
        prepare_cases(job.samples(), job.settings, job.kept_at)
    named: dict[str, Any] = {"method": MILDMethod(), "fingerprint": "", "setup": Setup("", "", 1, ""), "seed": 0}
    erasing = [EraseJob(**place, **named, cases=job, donors=tuple(jobs)) for job in jobs]
    given = [sample.key for job in erasing for sample in job.others()]
    assert sorted(given) == sorted(held.keys) and not any(map(str.__eq__, given, held.keys))
    alone = EraseJob(**place, **named, cases=jobs[0])
    assert not [*alone.others()] and alone.key() != erasing[0].key()


def test_what_got_worse_since_the_run_before_is_told_and_may_fail_the_command(
    finished: tuple[Path, dict[str, Any]],
    drawn_dataset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is called telea now fills with the mean colour, far worse on these slopes."""
    monkeypatch.setattr("flows.commands.evaluate.prepare_prefect", lambda verbose: None)
    settings = recipe(tmp_path, methods=[{"kind": "mean-fill", "name": "telea"}])
    given = ["-d", drawn_dataset, "-o", str(tmp_path / "out"), "--against", str(finished[0] / "out")]
    monkeypatch.setattr("sys.argv", ["mild", "evaluate", settings, *given, "--fail-on-regression"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3
    assert "worse: telea on drawn, PSNR hole, dB: -" in " ".join(capsys.readouterr().out.split())
    comparison = json.loads((tmp_path / "out/summary.json").read_text())["against"]
    assert {(change["metric"], change["verdict"]) for change in comparison["changes"]} == {
        ("psnr_hole", "worse"),
        ("ssim", "worse"),
    }


def test_where_nothing_stood_before_nothing_got_worse(
    drawn_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.commands.evaluate.prepare_prefect", lambda verbose: None)
    settings = recipe(tmp_path, methods=["mean-fill"])
    given = ["-d", drawn_dataset, "-o", str(tmp_path / "out"), "--against", "before", "--fail-on-regression"]
    monkeypatch.setattr("sys.argv", ["mild", "evaluate", settings, *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


def test_compared_with_what_stood_there_before_until_something_changes_again(again: Path, drawn_dataset: str) -> None:
    """Twice the same changes nothing in what is told."""
    methods = [{"kind": "mean-fill", "name": "telea"}, "mean-fill"]
    told = [run(again, drawn_dataset, against="before", methods=methods) for _ in range(2)]
    verdicts = [
        {(change["method"], change["metric"]): change["verdict"] for change in one["summary"]["against"]["changes"]}
        for one in told
    ]
    assert verdicts[0] == verdicts[1]
    assert verdicts[0]["telea", "psnr_hole"] == "worse" and verdicts[0]["mean-fill", "psnr_hole"] == "same"
    assert told[1]["cached"] == told[1]["steps"]


def test_another_evaluation_in_between_is_what_stood_there_before(again: Path, drawn_dataset: str) -> None:
    run(again, drawn_dataset, against="before", methods=[{"kind": "mean-fill", "name": "telea"}])
    better = [{"kind": "telea", "name": "telea"}]
    run(again, drawn_dataset, methods=better)
    told = run(again, drawn_dataset, against="before", methods=better)["summary"]["against"]
    assert told is None, "nothing was replaced: it is not held against what stood there two runs ago"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"person_free": {"configuration": "composite", "split": "nowhere"}}, "person_free"),
        ({"person_free": {"place": "absent", "configuration": "composite", "split": "train"}}, "absent"),
    ],
)
def test_pictures_to_compare_with_that_are_not_there_are_told_of_at_the_door(
    drawn_dataset: str, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        check_evaluate(recipe(tmp_path, **changes), drawn_dataset, "", str(tmp_path / "out"))


def test_a_base_whose_card_is_in_another_encoding_is_named_as_far_as_it_can_be(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes("# Modèle\n".encode("latin-1"))
    assert _card_title(str(tmp_path)) == "Mod\ufffdle"


def test_an_output_that_holds_something_else_is_refused_at_the_door(drawn_dataset: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        check_evaluate(recipe(tmp_path), drawn_dataset, "", str(tmp_path / "mine"))


def test_the_event_says_of_which_dataset_the_evaluation_is(
    again: Path, drawn_dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not again for a run that changed nothing."""
    sent: list[tuple[str, dict[str, str]]] = []
    monkeypatch.setattr("flows.events.emit_event", lambda name, resource, payload: sent.append((name, resource)))
    for metrics in (METRICS, ["psnr", *METRICS], ["psnr", *METRICS]):
        run(again, drawn_dataset, metrics=metrics)
    uri = (again / "out").as_uri()
    resource = {"prefect.resource.id": f"mild.evaluation.{uri}", "prefect.resource.name": "drawn"}
    assert sent == [("mild.evaluation.ready", resource)]


def test_what_is_wrong_is_told_at_the_door_and_leaves_nothing(tmp_path: Path, drawn_dataset: str) -> None:
    for changes, given, named in [
        ({}, {"dataset": ""}, "datasets.drawn names no place"),
        ({}, {"against": str(tmp_path)}, "is no evaluation: summary.json is missing"),
        ({}, {"adapters": str(tmp_path)}, "is no MILD directory"),
        ({"datasets": {"a": {"split": "test"}}}, {}, "has no composite/test"),
        ({"methods": ["telea", "telea"]}, {}, "telea is named twice"),
        ({"baseline": "lama"}, {}, "baseline 'lama' is none of the methods"),
        ({"methods": [{"kind": "mild", "smaa": False}]}, {}, "did you mean 'sma'"),
    ]:
        where = {"dataset": drawn_dataset, "adapters": "", "against": "", **given}
        with pytest.raises(UserError, match=named):
            evaluate(
                recipe(tmp_path, **changes),
                where["dataset"],
                where["adapters"],
                str(tmp_path / "out"),
                None,
                where["against"],
            )
    assert not (tmp_path / "out").exists()


def test_a_method_that_takes_longer_than_the_time_limit_ends_the_run(
    drawn_dataset: str, again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.evaluate.erase", erase.with_options(retries=0))
    sleep = {"kind": "command", "name": "sleeper", "command": ["sleep", "600"]}
    with pytest.raises(UserError, match=r"erase .*took longer than the time limit of 1 s"):
        run(again, drawn_dataset, methods=["telea", sleep], time_limit=1)
