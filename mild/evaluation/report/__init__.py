"""The report of an evaluation: one HTML page that holds everything it shows and asks nothing of any server."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

METRICS = ()

LONGEST_SIDE = 384
"""Pictures are embedded at most so large, in pixels; the exact ones lie beside the report."""
WEBP_QUALITY = 90
OVERLAY_COLOUR = (228, 60, 60)
OVERLAY_STRENGTH = 0.55

TITLES = {
    "telea": "OpenCV Telea",
    "navier-stokes": "OpenCV Navier-Stokes",
    "sdxl-inpaint": "SDXL Inpaint (base)",
    "mild": "MILD",
}


@dataclass(frozen=True)
class SampleFigures:
    """One sample as the report shows it."""

    key: str
    folder: Path
    """Of one kind of masks: ``before.png``, ``mask.png``, ``METHOD.png`` and, where it is known, ``truth.png``."""
    rows: list[dict[str, Any]]
    """A row of ``samples.parquet`` for each method."""


def render_report(summary: dict[str, Any], samples: Sequence[SampleFigures], chart: str | None) -> str:
    """The page as HTML.

    Args:
        summary: content of ``summary.json``, see `mild.evaluation.compare.evaluate`.
        samples: what is shown below the tables; their pictures are read and embedded.
        chart: the adapters' loss curve, an ``<svg>`` element; None where there is none.
    """
    environment = Environment(
        loader=PackageLoader("mild.evaluation.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        summary=summary,
        metrics=METRICS,
        titles=TITLES,
        tables=[(group, _table(group)) for group in summary["groups"]],
        chart=Markup(chart) if chart else None,
        samples=[_figures_of(sample) for sample in samples],
        settings=json.dumps(summary["settings"], indent=2),
    )


def _table(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a group's table: a method, its cells (one a metric) and its seconds."""
    methods, differences = group["methods"], group["mild_minus"]
    best: dict[str, str] = {}
    for metric in METRICS:
        means = [(methods[m][metric.name]["mean"], m) for m in methods if methods[m][metric.name]["mean"] is not None]
        if len(means) > 1:
            best[metric.name] = (max if metric.larger_is_better else min)(means)[1]
    rows = []
    for method, values in methods.items():
        cells = [
            {
                **values[metric.name],
                **{key: _shown(values[metric.name][key], metric.digits) for key in ("mean", "low", "high")},
                "best": best.get(metric.name) == method,
                "difference": _difference(differences[method][metric.name], metric.digits)
                if method in differences
                else "",
            }
            for metric in METRICS
        ]
        rows.append({"method": method, "cells": cells, "seconds": values["seconds"]})
    return rows


def _shown(value: float | None, digits: int) -> str:
    """A value as text; empty where there is none, ``identical`` for the infinite PSNR of equal pictures."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if math.isfinite(value) else "identical"


def _difference(estimate: dict[str, float | None], digits: int) -> str:
    """A signed mean with its interval as text; empty where there is none."""
    mean, low, high = (estimate[key] for key in ("mean", "low", "high"))
    if mean is None:
        return ""
    between = f" ({low:+.{digits}f} to {high:+.{digits}f})" if low is not None and high is not None else ""
    return f"{mean:+.{digits}f}{between}"


def _figures_of(sample: SampleFigures) -> dict[str, Any]:
    before = _open(sample.folder / "before.png")
    mask = np.asarray(Image.open(sample.folder / "mask.png").convert("L")) > 0
    first = sample.rows[0]
    crowd = f"{first['people']} {'person' if first['people'] == 1 else 'people'}, {first['masks']} masks"
    figures: list[dict[str, Any]] = [
        {"title": "Before", "alt": f"{sample.key} before: {crowd}", "src": _embed(before), "scores": []},
        {
            "title": "Mask",
            "alt": f"{sample.key}: what is to be erased, in red",
            "src": _embed(_overlay(before, mask)),
            "scores": [],
        },
    ]
    for row in sample.rows:
        path, title = sample.folder / f"{row['method']}.png", TITLES[row["method"]]
        figures.append(
            {
                "title": title,
                "alt": f"{sample.key} erased by {title}",
                "src": _embed(_open(path)) if path.is_file() else None,
                "scores": [f"{m.title}: {_shown(row[m.name], m.digits)}" for m in METRICS if row[m.name] is not None]
                or [f"not computed: {reason}" for reason in row["not_computed"][:1]],
            }
        )
    if (sample.folder / "truth.png").is_file():
        truth = _open(sample.folder / "truth.png")
        figures.append(
            {"title": "Truth", "alt": f"{sample.key}: the clean background", "src": _embed(truth), "scores": []}
        )
    return {"key": sample.key, "crowd": crowd, "hole_share": first["hole_share"], "figures": figures}


def _open(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with the mask in red and its outline in white, which shows on red things, too."""
    tinted = (1 - OVERLAY_STRENGTH) * image + OVERLAY_STRENGTH * np.array(OVERLAY_COLOUR)
    width = max(1, min(mask.shape) // 150)
    outline = cv2.dilate(mask.astype(np.uint8), np.ones((2 * width + 1, 2 * width + 1), np.uint8)).astype(bool) & ~mask
    shown = np.where(mask[..., None], tinted, image)
    shown[outline] = 255
    return shown.astype(np.uint8)


def _embed(picture: np.ndarray) -> str:
    """The picture as a data URI."""
    image = Image.fromarray(picture)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
