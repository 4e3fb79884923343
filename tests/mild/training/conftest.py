"""What the tests of training share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dataset_tools.compositing import CompositorSettings
from dataset_tools.donors import DonorSettings
from dataset_tools.picture_light import LightSettings
from dataset_tools.schema import KEYPOINTS, EncodingSettings, Makers, Origin, Sample
from dataset_tools.shards import Manifest, write_shard
from mild.model.backbone import Branch
from mild.training.latents import Latents
from mild.training.loop import BranchLoss, Examples, training_data

HIPS = [KEYPOINTS.index(f"{side}_hip") for side in ("left", "right")]


@pytest.fixture(autouse=True)
def _losses_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a chart takes as long as all steps of a quick run: here it is the numbers that would be drawn."""

    def chart(losses: Sequence[Mapping[str, float]], names: Sequence[str]) -> str:
        return "".join(f"{name} {row[name]!r}\n" for row in losses for name in names)

    monkeypatch.setattr("mild.charts.loss_chart", chart)


@pytest.fixture
def examples_of(in_memory: Callable[..., Any]) -> Callable[..., list[Examples]]:
    """Examples of branches, as a run has them of samples in a step."""

    def made(
        loss: BranchLoss,
        branches: Sequence[Branch],
        samples: list[Sample],
        step: int = 0,
        latents: Latents | None = None,
    ) -> list[Examples]:
        data = training_data(loss.pipeline, loss.layered, loss.settings, in_memory(samples), latents)
        return loss.examples(branches, data.drawn(step, branches, samples), step)

    return made


@pytest.fixture(scope="session")
def dataset_with_donors(make_sample: Callable[..., Sample], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six composites without effects, and photographs whose people can be cut out, in ``train``; others in
    ``validation``."""
    root = str(tmp_path_factory.mktemp("donors") / "dataset")

    def composite(number: int) -> Sample:
        return replace(make_sample(number), origins=[_origin("background", number)])

    def photograph(number: int) -> Sample:
        sample = make_sample(number)
        alone = {"complete_mask": None, "augmented_mask": None, "layer": None, "order": None, "occlusion": None}
        people = [replace(person, **alone) for person in sample.people]
        for person in people:
            person.keypoints[HIPS] = 0  # of joints anywhere, those of somebody who sits
        changes: dict[str, Any] = {"configuration": "real", "background": None, "made_by": Makers()}
        return replace(sample, people=people, origins=[_origin("image", number)], **changes)

    held = {
        "composite/train": map(composite, range(6)),
        "real/train": map(photograph, range(10, 16)),
        "real/validation": map(photograph, range(20, 26)),
    }
    shards: dict[str, dict[str, Any]] = {}
    for name, samples in held.items():
        configuration, split = name.split("/")
        shard = write_shard(samples, root, f"{name}-000000.tar", EncodingSettings(image_format="png"), [])
        shards.setdefault(configuration, {})[split] = [shard]
    built = CompositorSettings(size=(64, 48), donors=DonorSettings(min_height=8), light=LightSettings(shadows=0))
    settings = {"composite": built.model_dump(mode="json")}
    manifest = Manifest(name="donors", shards=shards, files={}, source="", settings=settings, software={})
    Path(root, "manifest.json").write_text(manifest.model_dump_json())
    return root


def _origin(role: Any, number: int) -> Origin:
    return Origin(role, "test", f"photo-{number}", "CC BY 4.0", "Ann", "", "", "", "", "0" * 64, "")
