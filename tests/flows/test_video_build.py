"""Clips of cameras that stand still go through the flow as `paired`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from dataset_tools.drawn_world.clips import ClipFaults, DrawnClip, write_clip
from dataset_tools.shards import ShardDataset, verify
from flows.build_dataset import build_dataset

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_clips_become_pairs_with_what_is_known_and_only_a_changed_clip_is_read_again(tmp_path: Path) -> None:
    """A clip that cannot be used stands among what was set aside; the same clips give the same bytes."""
    clip = DrawnClip("d", 0, (96, 72), 2, 30, ClipFaults(stands=0.2))
    clips = tmp_path / "clips"
    clips.mkdir()
    write_clip(clips / "park.mp4", [clip[n][0] for n in range(len(clip))], options={"crf": "4"})
    write_clip(clips / "empty.mp4", [clip.background] * 16)
    source = {"kind": "video", "clips": str(clips), "frames_per_clip": 3, "splits": {"train": 1.0}}
    recipe = {"name": "clips", "source": source, "curated": {"configuration": "paired"}}
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(recipe))
    output = tmp_path / "dataset"
    first = build_dataset(str(tmp_path / "build.yaml"), str(output))
    assert list(verify(str(output))) == []
    samples = list(ShardDataset(str(output), "paired", "train"))
    assert 1 <= len(samples) <= 3
    for sample in samples:
        assert sample.background is not None and sample.known is not None
        assert 0.9 < sample.known.mean() <= 1
        assert np.abs(sample.background.astype(int) - clip.background)[sample.known].mean() < 6  # as JPEG
        assert sample.made_by.plate.name == "video"
        assert {person.mask_by for person in sample.people} == {"difference"}
    rejected = pq.read_table(output / "rejected.parquet").to_pylist()
    aside = [row["reason"] for row in rejected if row["outcome"] == "image-rejected"]
    # As many pictures as are missing may have been set aside beside the clip.
    assert aside.count("nobody-moves") == 1 and len(aside) == 1 + 3 - len(samples)

    folders = {path.name.split("-")[0]: path for path in (tmp_path / "dataset.work/clips").iterdir() if path.is_dir()}
    kept, lost = folders["empty"] / "clip.json", folders["park"] / "plate-0.png"
    before = kept.stat().st_mtime_ns
    lost.unlink()
    assert build_dataset(str(tmp_path / "build.yaml"), str(output))["digest"] == first["digest"]
    assert lost.exists() and kept.stat().st_mtime_ns == before
