"""Evaluation: every method on the same samples, per-sample values, intervals, pictures and a report."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.stats import bootstrap

from dataset_tools.errors import UserError
from dataset_tools.folders import folder_written_whole
from dataset_tools.schema import KEY_PATTERN, Sample, encode_png
from dataset_tools.shards import Samples
from mild.bases import place_of
from mild.erasing.pipeline import MILDPipeline
from mild.evaluation.methods import Case, Eraser
from mild.evaluation.methods.mild import MILDEraser
from mild.evaluation.methods.opencv import OpenCVEraser
from mild.evaluation.methods.sdxl import SDXLEraser
from mild.evaluation.report import SampleFigures, render_report
from mild.metrics import METRICS, NotComputed
from mild.model.backbone import load_base
from mild.seeds import derived_seed
from mild.settings import EvaluateSettings, Masks, Method
from mild.versions import software_versions

CONFIDENCE = 0.95
SUMMARY = "summary.json"
REPORT_SAMPLES = 24
"""At most so many samples are shown in the report; the pictures of all lie in ``pictures/``."""

SHARED = ("vae", "text_encoder", "text_encoder_2")
"""What the diffusion methods hold once in memory; the UNet is MILD's own, which changes it."""

_ROW_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("masks", pa.string()),
        ("method", pa.string()),
        ("people", pa.int64()),
        ("overlap", pa.bool_()),
        ("hole_share", pa.float64()),
        *((metric.name, pa.float64()) for metric in METRICS),
        ("seconds", pa.float64()),
        ("not_computed", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class EvaluateResult:
    """What an evaluation left behind."""

    output: str
    """The folder with ``samples.parquet``, ``summary.json``, ``report.html`` and ``pictures/``."""
    report: str
    """Path of the report."""
    summary: dict[str, Any]
    """The content of ``summary.json``."""
    seconds: float


def evaluate(
    settings: EvaluateSettings,
    samples: Samples,
    base: str,
    adapters: str | None,
    output: str,
    log: Callable[[int], None],
    *,
    dataset_digest: str = "unknown",
    command: str = "",
) -> EvaluateResult:
    """Run every method on the same samples, measure against the clean background, write a folder of results.

    The folder, which appears whole or not at all, holds ``samples.parquet`` (a row a sample, kind of masks and method:
    their names, number of people and whether any overlap, share of the picture in the hole, metric values, seconds,
    and what was not computed and why), ``summary.json`` (means, and how far MILD's differ from each method's on the
    same samples, with 95 % percentile bootstrap intervals over samples; over all and over groups),
    ``pictures/KEY/MASKS/`` (before, mask, truth and each method's result as PNG) and ``report.html``.

    Groups are kinds of masks, and pictures in which people overlap or stand apart, where there are both. People overlap
    where their visible masks touch.

    The hole in which metrics are taken is what the method was given and all that people really cover: with
    faulty masks a method is judged on what it missed, too.

    Args:
        samples: any configuration; where no clean background is known, metrics are reported as not computed.
        base: folder or hub id; loaded only where a method needs it.
        adapters: directory that `mild.training.loop.train` wrote; needed by the method ``mild``.
        log: called after each sample with the number of samples done.
        dataset_digest: named in the report.
        command: the command line that asked for this, named in the report.

    Raises:
        UserError: there is no sample, or the base or adapters cannot be used.
    """
    if len(samples) == 0:
        raise UserError("the split to evaluate holds no sample: build the dataset with samples of this split")
    started = time.monotonic()
    erasers = _make_erasers(settings, base, adapters)
    chosen = sorted(int(index) for index in samples.order(settings.seed, 0)[: settings.samples])
    rows: list[dict[str, Any]] = []
    figures: list[SampleFigures] = []
    with folder_written_whole(output, SUMMARY) as folder:
        for done, index in enumerate(chosen, start=1):
            sample = samples[index]
            for masks in settings.masks:
                found, shown = _evaluate_sample(sample, masks, erasers, settings.seed, folder / "pictures")
                rows += found
                if len(figures) < REPORT_SAMPLES:
                    figures.append(shown)
            log(done)
        pq.write_table(pa.Table.from_pylist(rows, schema=_ROW_SCHEMA), folder / "samples.parquet")
        summary: dict[str, Any] = {
            "samples": len(chosen),
            "available_samples": len(samples),
            "reference": "the clean background of each sample",
            "dataset": dataset_digest,
            "base": base,
            "base_card": _card_title(base),
            "adapters": adapters,
            "command": command,
            "settings": settings.model_dump(mode="json"),
            "software": software_versions(),
            "groups": [
                {
                    "name": name,
                    "cases": len(members) // len(settings.methods),
                    "methods": {
                        method: _summarize([row for row in members if row["method"] == method], settings)
                        for method in settings.methods
                    },
                    "mild_minus": _differences(members, settings) if "mild" in settings.methods else {},
                }
                for name, members in _groups(rows, settings.masks).items()
            ],
        }
        (folder / SUMMARY).write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        curve = None if adapters is None else Path(place_of(adapters)) / "loss.svg"
        chart = curve.read_text(encoding="utf-8") if curve is not None and curve.is_file() else None
        (folder / "report.html").write_text(render_report(summary, figures, chart), encoding="utf-8")
    return EvaluateResult(output, str(Path(output) / "report.html"), summary, time.monotonic() - started)


def _make_erasers(settings: EvaluateSettings, base: str, adapters: str | None) -> list[Eraser]:
    """The methods in their order."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shared: dict[str, Any] = {}

    def make(method: Method) -> Eraser:
        if method == "sdxl-inpaint":
            pipeline = load_base(base, **shared).to(device)
            shared.update({name: part for name, part in pipeline.components.items() if name in SHARED})
            return SDXLEraser(
                pipeline,
                steps=settings.inference_steps,
                guidance_scale=settings.guidance_scale,
                strength=settings.strength,
                prompt=settings.prompt,
                resolution=settings.resolution,
            )
        if method == "mild":
            if adapters is None:
                raise UserError(
                    "methods names 'mild', which needs a directory of adapters: train first, or leave it out"
                )
            layered = MILDPipeline.from_pretrained(base, mild=adapters, **shared).to(device)
            layered.set_progress_bar_config(disable=True)
            shared.update({name: part for name, part in layered.components.items() if name in SHARED})
            return MILDEraser(
                layered,
                steps=settings.inference_steps,
                prompt=settings.prompt,
                match_colours=settings.match_colours,
            )
        return OpenCVEraser(method)

    return [make(method) for method in settings.methods]


def _evaluate_sample(
    sample: Sample, masks: Masks, erasers: list[Eraser], seed: int, pictures: Path
) -> tuple[list[dict[str, Any]], SampleFigures]:
    if KEY_PATTERN.fullmatch(sample.key) is None:
        raise UserError(f"sample key {sample.key!r} cannot be a file name: keys hold letters, digits, '-' and '_' only")
    case = _case(sample, masks)
    hole = case.hole | np.logical_or.reduce([person.mask for person in sample.people])
    place = pictures / sample.key / masks
    place.mkdir(parents=True)
    _save(place / "before.png", sample.image)
    _save(place / "mask.png", case.hole.astype(np.uint8) * 255)
    if sample.background is not None:
        _save(place / "truth.png", sample.background)
    known = {
        "key": sample.key,
        "masks": masks,
        "people": len(sample.people),
        "overlap": _overlap([person.mask for person in sample.people]),
        "hole_share": float(hole.mean()),
    }
    rows = []
    for eraser in erasers:
        row: dict[str, Any] = {**known, "method": eraser.name, "not_computed": []}
        started = time.perf_counter()
        result, failure = None, ""
        try:
            result = eraser.erase(case, derived_seed(seed, sample.key))
            _save(place / f"{eraser.name}.png", result)
        except UserError as error:
            failure = str(error)
        row["seconds"] = time.perf_counter() - started
        for metric in METRICS:
            try:
                if result is None:
                    raise NotComputed(f"no result: {failure}")
                if sample.background is None:
                    raise NotComputed("no clean background is known")
                row[metric.name] = metric.score(result, sample.background, hole)
            except NotComputed as reason:
                row[metric.name] = None
                row["not_computed"].append(f"{metric.name}: {reason}")
        rows.append(row)
    return rows, SampleFigures(key=sample.key, folder=place, rows=rows)


def _case(sample: Sample, kind: Masks) -> Case:
    """What methods are given: everybody of whom the masks of this kind show anything, with the cues that are known."""
    people, masks = [], []
    for person in sample.people:
        mask = person.mask if kind == "exact" else person.augmented_mask
        if mask is None:
            raise UserError(f"sample {sample.key} has no augmented masks: set masks to exact, or use composite samples")
        if mask.any():
            people.append(person)
            masks.append(mask)
    keypoints = np.array([person.keypoints for person in people])
    return Case(
        image=sample.image,
        masks=np.array(masks, bool).reshape(-1, *sample.image.shape[:2]),
        pose=keypoints if keypoints.size and keypoints[..., 2].any() else None,
        parsing=None if sample.label_set == "none" else sample.parsing,
        label_set=sample.label_set,
    )


def _overlap(masks: list[np.ndarray]) -> bool:
    """Whether any two of the visible masks, (H, W) bool, share a pixel after each was widened by one."""
    widened = [cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) for mask in masks]
    return bool(np.sum(widened, axis=0).max() > 1)


def _groups(rows: list[dict[str, Any]], masks: Sequence[Masks]) -> dict[str, list[dict[str, Any]]]:
    """Rows by the name of their group: all of them, and where there is more than one, each kind of case."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for kind in masks:
        for overlap, how in ((False, "people apart"), (True, "people overlap")):
            members = [row for row in rows if (row["masks"], row["overlap"]) == (kind, overlap)]
            if members:
                parts[f"{how}, {kind} masks"] = members
    return {"all": rows, **(parts if len(parts) > 1 else {})}


def _summarize(rows: list[dict[str, Any]], settings: EvaluateSettings) -> dict[str, Any]:
    """What a method reached: `_mean` of each metric, and the mean time in seconds."""
    means: dict[str, Any] = {metric.name: _mean(rows, metric.name, settings) for metric in METRICS}
    return means | {"seconds": float(np.mean([row["seconds"] for row in rows]))}


def _mean(rows: list[dict[str, Any]], metric: str, settings: EvaluateSettings) -> dict[str, Any]:
    """Mean and bootstrap interval of the finite values; infinite and missing ones are counted beside it."""
    values = [(row["key"], row[metric]) for row in rows if row[metric] is not None]
    reasons = Counter(
        reason.removeprefix(f"{metric}: ")
        for row in rows
        for reason in row["not_computed"]
        if reason.startswith(f"{metric}: ")
    )
    return {
        **_estimate(values, settings, derived_seed(settings.seed, rows[0]["method"], metric)),
        "count": sum(bool(np.isfinite(value)) for _, value in values),
        "identical": sum(value == np.inf for _, value in values),
        "not_computed": dict(reasons),
    }


def _differences(rows: list[dict[str, Any]], settings: EvaluateSettings) -> dict[str, dict[str, Any]]:
    """Each other method's name to, a metric, the mean of MILD's value minus its, and the interval of that mean.

    Values are compared case by case, which tells far more of a lead than two intervals beside one another: most of what
    values vary by is how hard the pictures are.
    """
    cases = {(row["key"], row["masks"], row["method"]): row for row in rows}

    def estimate(method: str, metric: str) -> dict[str, float | None]:
        pairs = [(own, cases[key, masks, method]) for (key, masks, of), own in cases.items() if of == "mild"]
        values = [
            (own["key"], own[metric] - other[metric])
            for own, other in pairs
            if own[metric] is not None and other[metric] is not None
        ]
        return _estimate(values, settings, derived_seed(settings.seed, "mild minus", method, metric))

    others = [method for method in settings.methods if method != "mild"]
    return {method: {metric.name: estimate(method, metric.name) for metric in METRICS} for method in others}


def _estimate(values: list[tuple[str, float]], settings: EvaluateSettings, seed: int) -> dict[str, float | None]:
    """``mean`` of (key of the sample, value), and ``low`` and ``high`` of its bootstrap interval; None where unknown.

    Values that are not finite are left out. Samples are drawn, each with all of its values: those of one picture with
    other masks are no news of their own.
    """
    finite = [(key, value) for key, value in values if np.isfinite(value)]
    of_sample = defaultdict(list)
    for key, value in finite:
        of_sample[key].append(value)
    means = [float(np.mean(found)) for found in of_sample.values()]
    low = high = None
    if len(means) > 1:
        interval = bootstrap(
            (means,),
            np.mean,
            n_resamples=settings.resamples,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {"mean": float(np.mean([value for _, value in finite])) if finite else None, "low": low, "high": high}


def _save(path: Path, picture: np.ndarray) -> None:
    path.write_bytes(encode_png(picture))


def _card_title(base: str) -> str:
    """The first heading of the base's model card, where the base is a folder that has one."""
    card = Path(place_of(base)) / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), "")
