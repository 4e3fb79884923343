"""What HMG and SMA do in trained adapters, and what more or less of either would do (sections 3.3 and 3.4).

    python benchmarks/guidance.py DATASET [--adapters FOLDER] [--split test] [--samples 60]

On composites, which know the truth, in two tasks:

- ``background``: everybody goes, by exact masks, which are all that is painted. PSNR in dB in the hole.
- ``completion``: of one person that others hide in part, those go; the part that comes free is painted by the
  foreground branch (`benchmarks/completion.py`). PSNR in dB there, and IoU of where the person is completed.

Each is done with HMG's gates times 0, 4 and 16, without pose and parsing, with SMA's alphas times 0, 4 and 16, and with
its hard gating (Theorem 2), each minus the adapters as they are, in the same windows with the same noise: means over
pictures with 95 % bootstrap intervals. It also says how much there is of both as they are: of HMG how long what it adds
in each cross-attention is against attention to the text; of SMA how much of the attention that leaves the hole's tokens
for the rest of the picture it changes. Writes ``benchmarks/results/guidance.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from completion import erased, hidden_people, opened, overlap, shown, true_colours
from rich.progress import track

from dataset_tools.schema import Sample
from mild.erasing.extents import REACH
from mild.erasing.pipeline import MILDPipeline
from mild.evaluation.summarize import estimate
from mild.metrics.psnr import psnr_hole
from mild.model import attention, morphology
from mild.versions import software_versions

SCALES = (0.0, 4.0, 16.0)
RESULT = Path(__file__).parent / "results/guidance.json"


@contextlib.contextmanager
def scaled(part: torch.nn.Module, scale: float) -> Iterator[None]:
    """With every gate, or alpha, times ``scale``."""
    tensors = part.gates.values() if isinstance(part, morphology.HumanMorphologyGuidance) else part.parameters()
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    with torch.no_grad():
        for tensor, _ in before:
            tensor.mul_(scale)
    try:
        yield
    finally:
        restore(before)


@contextlib.contextmanager
def gated(sma: attention.SpatialModulation) -> Iterator[None]:
    """With hard gating."""
    before = [(alpha, alpha.detach().clone()) for alpha in sma.parameters()]
    sma.gate_()
    try:
        yield
    finally:
        restore(before)


@torch.no_grad()
def restore(before: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give tensors their values back."""
    for tensor, values in before:
        tensor.copy_(values)


@contextlib.contextmanager
def watched(told: dict[str, list[float]]) -> Iterator[None]:
    """Note what HMG adds, and what SMA moves, in every attention that is computed meanwhile."""
    attended: list[torch.Tensor] = []
    attend, call, modulate = morphology._attend, morphology.GatedCrossAttention.__call__, attention.modulated_attention

    def note_attended(*args: Any) -> torch.Tensor:
        attended.append(attend(*args))
        return attended[-1]

    def note_call(self: morphology.GatedCrossAttention, *args: Any, **kwargs: Any) -> torch.Tensor:
        attended.clear()
        result = call(self, *args, **kwargs)
        if len(attended) == 2:
            text, cues = (torch.linalg.vector_norm(each, dim=-1) for each in attended)
            added = self.gates[self.key].abs()[:, None] * cues
            told["hmg"].append(float(added.mean() / text.mean()))
        return result

    def note_modulated(query: Any, key: Any, value: Any, mask: Any, alpha: Any, *, gated: bool = False) -> Any:
        logits = torch.einsum("bihd,bjhd->bhij", query, key) / query.shape[-1] ** 0.5
        region = torch.stack([1 - mask, mask])
        bias = torch.einsum("st,sbi,tbj->bij", alpha.to(mask), region, region)[:, None]
        hole, outside = (mask >= 0.5)[:, None, :, None], (mask < 0.5)[:, None, None]
        for name, weights in (("sma_without", logits.softmax(-1)), ("sma_with", (logits + bias).softmax(-1))):
            leaving = (weights * outside).sum(-1, keepdim=True)
            told[name].append(float(leaving[hole.expand_as(leaving)].mean()))
        return modulate(query, key, value, mask, alpha, gated=gated)

    with (
        torch.no_grad(),
        mock.patch.object(morphology, "_attend", note_attended),
        mock.patch.object(morphology.GatedCrossAttention, "__call__", note_call),
        mock.patch.object(attention, "modulated_attention", note_modulated),
    ):
        yield


def arms(pipeline: MILDPipeline) -> dict[str, Any]:
    """Name to a context in which the adapters are so."""
    layered = pipeline.layered
    assert layered is not None and layered.hmg is not None and layered.sma is not None, "adapters with HMG and SMA"
    hmg, sma = layered.hmg, layered.sma
    return {
        "as they are": contextlib.nullcontext,
        **{f"HMG's gates x {scale:g}": lambda scale=scale: scaled(hmg, scale) for scale in SCALES},
        "no pose, no parsing": contextlib.nullcontext,
        **{f"SMA's alphas x {scale:g}": lambda scale=scale: scaled(sma, scale) for scale in SCALES},
        "SMA's hard gating": lambda: gated(sma),
    }


def measured(pipeline: MILDPipeline, sample: Sample, cues: bool) -> dict[str, list[float]]:
    """The figures of one picture, by name."""
    assert sample.background is not None
    everybody = list(range(len(sample.people)))
    hole = np.logical_or.reduce([person.mask for person in sample.people])
    found: dict[str, list[float]] = defaultdict(list)
    image = erased(pipeline, sample, everybody, None, cues).image
    found["background"].append(psnr_hole(image, sample.background, hole))
    for index, front, part in hidden_people(sample):
        full = erased(pipeline, sample, front, REACH, cues)
        found["completion"].append(psnr_hole(full.image, true_colours(sample, index), part))
        found["completion_iou"].append(overlap(full, sample, index, front, part))
    return found


def main() -> None:
    """Measure, print, and write the JSON."""
    chosen, pipeline, samples = opened(__doc__)
    changes = arms(pipeline)
    rows: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in changes}
    keys: dict[str, list[str]] = defaultdict(list)
    seen: dict[str, list[float]] = defaultdict(list)
    for number in track(range(min(chosen.samples, len(samples))), description="pictures"):
        sample = samples[number]
        with watched(seen):
            erased(pipeline, sample, list(range(len(sample.people))), None, True)
        for name, change in changes.items():
            with change():
                for figure, values in measured(pipeline, sample, name != "no pose, no parsing").items():
                    rows[name][figure] += values
                    if name == "as they are":
                        keys[figure] += [sample.key] * len(values)
    same = {figure: np.array(values) for figure, values in rows["as they are"].items()}
    table = {
        name: {
            figure: estimate(keys[figure], np.array(values) - same[figure], 0, 2000).model_dump()
            for figure, values in row.items()
        }
        for name, row in rows.items()
        if name != "as they are"
    }
    layered = pipeline.layered
    assert layered is not None and layered.hmg is not None and layered.sma is not None
    gates = torch.cat([gate.detach() for gate in layered.hmg.gates.values()])
    alphas = torch.stack([alpha.detach() for alpha in layered.sma.parameters()])
    result = {
        "command": f"python benchmarks/guidance.py DATASET --split {chosen.split} --samples {chosen.samples}",
        "adapters": os.path.basename(os.path.normpath(chosen.adapters)),
        "pictures": len(keys["background"]),
        "people_completed": len(keys["completion"]),
        "as_they_are": {figure: float(values.mean()) for figure, values in same.items()},
        "minus_as_they_are": table,
        "hmg": {
            "largest_gate": float(gates.abs().max()),
            "mean_gate": float(gates.abs().mean()),
            "added_against_text": float(np.mean(seen["hmg"])),
            "most_added_against_text": float(np.max(seen["hmg"])),
        },
        "sma": {
            "largest_alpha": float(alphas.abs().max()),
            "alphas": alphas.mean(0).tolist(),
            # At the UNet's coarsest level a small hole has no token.
            "attention_out_of_the_hole": float(np.nanmean(seen["sma_with"])),
            "without_it": float(np.nanmean(seen["sma_without"])),
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "software": software_versions(),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, row in table.items():
        print(f"{name:22s} {'  '.join(f'{figure} {shown(value)}' for figure, value in row.items())}")
    print(json.dumps({name: result[name] for name in ("as_they_are", "hmg", "sma")}, indent=2))


if __name__ == "__main__":
    main()
