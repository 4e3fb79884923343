"""A summary that holds all that a report can show, and pictures for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mild.evaluation.gallery import ShownCase, ShownLayers
from mild.evaluation.summary import (
    Cell,
    Change,
    Comparison,
    DatasetRow,
    Estimate,
    Group,
    Headline,
    Leakage,
    MethodRow,
    MetricRow,
    Spectrum,
    Summary,
)

WARNING = "60 pictures: FID under 2,048 says little"
NO_TRUTH = "no clean background is known"
FULL = {"hmg": True, "pose": True, "parsing": True, "sma": True}
PSNR = {"telea": 16.21, "sdxl-inpaint": 17.4, "base": 19.62, "mild-0": 19.6, "mild-1": 19.74, "mild-arm": 19.67}
FID = {"telea": 88.1, "sdxl-inpaint": 60.2, "base": 41.3, "mild-0": 40.1, "mild-1": 40.5, "mild-arm": 40.3}


def _metric(name: str, title: str, larger: bool, digits: int, **more: str) -> MetricRow:
    known = {"region": "hole", "network": "", "reference": "clean background", **more}
    return MetricRow(name=name, title=title, larger_is_better=larger, digits=digits, **known)


METRICS = [
    _metric("psnr_hole", "PSNR hole, dB", True, 2),
    _metric("fid", "FID", False, 1, region="picture", network="Inception-v3 of torch-fidelity, 299"),
    _metric("residual", "Residual person, %", False, 1, network="Mask R-CNN, COCO", reference="none"),
    _metric("lpips", "LPIPS", False, 3, network="AlexNet", not_run="run mild weights pull lpips"),
]


def _method(name: str, title: str, kind: str, **more: Any) -> MethodRow:
    return MethodRow(name=name, title=title, kind=kind, device="NVIDIA H100", settings={"kind": kind}, **more)


METHODS = [
    _method("telea", "OpenCV Telea", "telea", seconds=0.04),
    _method("sdxl-inpaint", "SDXL Inpaint", "sdxl-inpaint", seconds=2.1, peak_megabytes=9100.0),
    _method(
        "base", "Base in the same pipeline", "base", seconds=1.2, peak_megabytes=8200.0, weights={"base": "a" * 64}
    ),
    _method("mild-0", "MILD (mild-0)", "mild", arm="mild-arm", parts=FULL, seconds=1.9, peak_megabytes=8800.0),
    _method("mild-1", "MILD (mild-1)", "mild", arm="mild-arm", parts=FULL, seconds=1.9, peak_megabytes=8800.0),
    _method("mild-no-pose", "MILD without pose", "mild", parts={**FULL, "pose": False}, seconds=1.9),
    _method("mild-no-sma", "MILD without SMA", "mild", parts={**FULL, "sma": False}, seconds=1.7),
    _method("mild-backbone", "MILD without SMA, HMG", "mild", parts=dict.fromkeys(FULL, False), seconds=1.5),
    MethodRow(name="lama", title="LaMa", kind="lama", not_run="big-lama.pt is not here: run mild weights pull lama"),
]
RUNGS = {"mild-no-pose": -0.11, "mild-no-sma": -0.2, "mild-backbone": -0.31}


def _cells(truth: bool, shift: float) -> dict[str, dict[str, Cell]]:
    cells = {}
    for name, psnr in {**PSNR, **{rung: PSNR["mild-arm"] + delta for rung, delta in RUNGS.items()}}.items():
        value = psnr + shift
        known = Cell(mean=value, low=value - 0.8, high=value + 0.8, count=59, identical=1, ranked=value)
        distance = FID.get(name, 42.0) - shift
        fid = Cell(mean=distance, count=60, warning=WARNING, ranked=distance)
        unknown = Cell(not_computed={NO_TRUTH: 60})
        residual = Cell(mean=0.0, low=0.0, high=0.0, count=58, not_computed={"the hole is too small": 2}, ranked=0.0)
        cells[name] = {"psnr_hole": known if truth else unknown, "fid": fid, "residual": residual}
    return cells


def _differences() -> dict[str, dict[str, Estimate]]:
    apart = {"telea": (-3.41, -3.9, -2.9), "sdxl-inpaint": (-2.22, -2.7, -1.7), "mild-arm": (0.05, -0.02, 0.12)}
    apart |= {"mild-0": (-0.02, -0.1, 0.06), "mild-1": (0.12, 0.03, 0.21)}
    return {name: {"psnr_hole": Estimate(mean=mean, low=low, high=high)} for name, (mean, low, high) in apart.items()}


def _dataset(name: str, configuration: str) -> DatasetRow:
    return DatasetRow(
        name=name,
        place=f"datasets/{name}",
        digest="d" * 64,
        configuration=configuration,
        split="test",
        masks=["exact"],
        samples=60,
        available=412,
    )


def _group(name: str, dataset: str, cases: int, truth: bool = True, shift: float = 0) -> Group:
    differences = _differences() if truth else {}
    return Group(name=name, dataset=dataset, cases=cases, cells=_cells(truth, shift), differences=differences)


def draw_summary(**changes: Any) -> Summary:
    """Two datasets, one of them without clean backgrounds; the values are made up."""
    blocks = [f"down_blocks.1.attentions.{k}.transformer_blocks.0.attn1" for k in range(2)]
    gamma = [[0.8, 0.9, 1.0, 1.2], [1.4, 1.5, 1.5, None]]
    mass = [[0.21, 0.18, 0.16, 0.12], [0.11, 0.1, 0.1, 0.08]]
    frequencies = list(np.linspace(0.01, 0.49, 24))
    values: dict[str, Any] = {
        "headline": Headline(
            leader="mild-arm",
            method="mild-arm",
            baseline="base",
            metric="psnr_hole",
            dataset="composite",
            difference=Estimate(mean=0.05, low=-0.02, high=0.12),
            sentence="MILD leads by 0.05 dB (−0.02 to +0.12) in PSNR hole over the base in the same pipeline: "
            "not told apart.",
        ),
        "baseline": "base",
        "datasets": [_dataset("composite", "composite"), _dataset("real", "real")],
        "methods": METHODS,
        "metrics": METRICS,
        "groups": [
            _group("", "composite", 60),
            _group("people apart, exact masks", "composite", 38, shift=0.4),
            _group("people overlap, exact masks", "composite", 22, shift=-0.6),
            _group("", "real", 60, truth=False),
        ],
        "leakage": [
            Leakage(
                method="mild-0",
                pictures=8,
                blocks=blocks,
                steps=[981, 731, 481, 231],
                gamma=[[value and value + 0.7 for value in row] for row in gamma],
                gamma_vanilla=gamma,
                cross_mass=[[value / 2 for value in row] for row in mass],
                cross_mass_vanilla=mass,
            )
        ],
        "spectra": [
            Spectrum(
                method=name,
                pictures=60,
                frequencies=frequencies,
                amplitude=[float(np.log1p(scale / f)) for f in frequencies],
            )
            for name, scale in (("base", 1.6), ("mild-0", 1.3))
        ],
        "against": Comparison(
            place="runs/before/summary.json",
            changes=[
                Change(
                    dataset="composite",
                    method="base",
                    metric="psnr_hole",
                    before=19.6,
                    now=19.62,
                    difference=Estimate(mean=0.02, low=-0.04, high=0.08),
                    verdict="same",
                ),
                Change(
                    dataset="composite",
                    method="mild-0",
                    metric="psnr_hole",
                    before=19.31,
                    now=19.6,
                    difference=Estimate(mean=0.29, low=0.1, high=0.47),
                    verdict="better",
                ),
                Change(
                    dataset="composite",
                    method="telea",
                    metric="fid",
                    before=80.0,
                    now=88.1,
                    difference=Estimate(mean=8.1, low=2.0, high=14.0),
                    verdict="worse",
                ),
            ],
            left_out=["lama: it was not run before"],
        ),
        "base": "mild-nano",
        "base_card": "mild-nano",
        "adapters": "runs/train/adapters",
        "settings": {"seed": 7, "resamples": 2000},
        "software": {"mild": "0.1.0", "torch": "2.11"},
        **changes,
    }
    return Summary(**values)


@pytest.fixture(scope="session")
def make_summary() -> Callable[..., Summary]:
    """See `draw_summary`."""
    return draw_summary


@pytest.fixture(scope="session")
def save() -> Callable[[Path, np.ndarray], Path]:
    """Writes a PNG, and says where."""

    def write(path: Path, picture: np.ndarray) -> Path:
        Image.fromarray(picture).save(path)
        return path

    return write


@pytest.fixture(scope="session")
def shown_cases(tmp_path_factory: pytest.TempPathFactory, save: Callable[[Path, np.ndarray], Path]) -> list[ShownCase]:
    """Three cases, grey but for the hole; telea is worst on the second, and has no result on the third."""
    folder = tmp_path_factory.mktemp("cases")
    cases = []
    for index, (dataset, telea) in enumerate([("composite", 17.0), ("composite", 12.5), ("real", None)]):
        before = np.full((60, 80, 3), 90 + index, np.uint8)
        truth = before.copy()
        before[20:40, 30:50] = (200, 40, 40)
        mask = np.zeros((60, 80), np.uint8)
        mask[20:40, 30:50] = 255
        results = {"base": truth.copy(), "telea": truth.copy()}
        results["base"][20:40, 30:50] += 4
        results["telea"][20:40, 30:50, 1] += 20
        if telea is None:
            del results["telea"]
        name = f"case-{index}"
        cases.append(
            ShownCase(
                dataset=dataset,
                key=name,
                masks="exact",
                people=1 + index,
                overlap=index == 1,
                hole_share=float((mask > 0).mean()),
                before=save(folder / f"{name}-before.png", before),
                mask=save(folder / f"{name}-mask.png", mask),
                truth=save(folder / f"{name}-truth.png", truth) if dataset == "composite" else None,
                results={method: save(folder / f"{name}-{method}.png", result) for method, result in results.items()},
                values={
                    "base": {"psnr_hole": float("inf") if index == 0 else 19.0 + index},
                    "telea": {"psnr_hole": telea},
                },
                not_computed={} if telea is not None else {"telea": ["no result: <it> failed"]},
            )
        )
    return cases


@pytest.fixture(scope="session")
def shown_layers(tmp_path_factory: pytest.TempPathFactory, save: Callable[[Path, np.ndarray], Path]) -> ShownLayers:
    """Two people of soft edges who overlap, the second behind the first."""
    folder = tmp_path_factory.mktemp("layers")
    rng = np.random.default_rng(0)
    background = rng.integers(0, 256, (48, 64, 3), np.uint8)
    layers = rng.integers(0, 256, (2, 48, 64, 4), np.uint8)
    layers[0, :, 40:, 3] = layers[1, :, :20, 3] = 0
    return ShownLayers(
        dataset="composite",
        key="crowd",
        method="mild-0",
        before=save(folder / "before.png", background),
        background=save(folder / "background.png", background),
        layers=[save(folder / f"layer-{index}.png", layer) for index, layer in enumerate(layers)],
        order=[1, 0],
    )
