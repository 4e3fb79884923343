"""Shards over a network, read by torch's DataLoader in processes that were forked, and trained on."""

from __future__ import annotations

import filecmp
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from dataset_tools.errors import UserError
from dataset_tools.schema import annotations_of
from dataset_tools.shards import ShardDataset, verify
from dataset_tools.storage import open_root
from mild.settings import FreshCompositeSettings, TrainSettings
from mild.training.launch import TrainRequest, train_here


class Keys(Dataset[str]):
    """Key of each sample, as its own bytes and its annotations say it."""

    def __init__(self, samples: ShardDataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> str:
        key = self.samples.keys[index]
        return f"{annotations_of(key, self.samples.parts(index))['key']} {self.samples.annotations(index)['key']}"


@pytest.fixture
def served(drawn_dataset: str, tmp_path: Path, serve_files: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The drawn dataset on a server that speaks HTTP, and as much of S3 as reading needs."""
    shutil.copytree(drawn_dataset, tmp_path / "bucket/dataset")
    server = serve_files(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anybody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    return server


@pytest.mark.process
def test_workers_read_over_a_network_what_their_parent_has_opened(served: Any, drawn_dataset: str) -> None:
    """The parent has read before, and reads on; neither disturbs the other. In its own process, as training is."""
    roots = f"{served.url}/bucket/dataset", "s3://bucket/dataset"
    done = subprocess.run([sys.executable, __file__, drawn_dataset, *roots], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def main(same: str, http: str, s3: str) -> None:
    """Each in a process that is forked from this one, which opens nothing itself."""
    for root in (http, s3):
        if os.fork() == 0:
            read_in_workers(root, same)
            return
        _, status = os.wait()
        if status:
            sys.exit(f"{root}: {os.waitstatus_to_exitcode(status)}")


def read_in_workers(root: str, same: str) -> None:
    """Read the dataset at ``root``, which is that at ``same``, in workers of a DataLoader."""
    samples = ShardDataset(root, "composite", "train")
    keys = ShardDataset(same, "composite", "train").keys
    dataset = Keys(samples)
    assert dataset[0] == f"{keys[0]} {keys[0]}"
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    read = []
    for row in loader:
        read.append(row)
        assert dataset[1] == f"{keys[1]} {keys[1]}"
    assert read == [f"{key} {key}" for key in keys]
    assert samples[2].key == keys[2]


def test_training_from_a_store_that_is_busy_now_and_then_gives_the_bytes_of_training_from_a_disk(
    dataset_with_donors: str, bucket: str, object_store: Any, tiny_base: str, quick: TrainSettings, tmp_path: Path
) -> None:
    """Composites and photographs of donors, of which other composites are made."""
    open_root(bucket)[0].put(dataset_with_donors, f"{bucket}/dataset", recursive=True)
    asked = itertools.count()
    object_store.refuse = lambda what: (503, "SlowDown") if ".tar" in what and next(asked) % 3 == 1 else None
    for name, dataset in (("disk", dataset_with_donors), ("store", f"{bucket}/dataset")):
        request = TrainRequest(
            settings=quick.model_copy(update={"steps": 2, "fresh_composites": FreshCompositeSettings()}),
            dataset=dataset,
            configurations={"composite": 1.0},
            split="train",
            dataset_digest="d",
            base=tiny_base,
            base_digest="b",
            output=str(tmp_path / name),
        )
        train_here(request, lambda step, values: None)
    assert next(asked) > 3
    files = sorted(str(path.relative_to(tmp_path / "disk")) for path in (tmp_path / "disk").rglob("*.safetensors"))
    assert len(files) == 5
    assert filecmp.cmpfiles(tmp_path / "disk", tmp_path / "store", files, shallow=False)[0] == files


def test_a_server_without_ranges_is_told_as_such(drawn_dataset: str, serve_files: Callable[..., Any]) -> None:
    """Not as a shard that is cut short; reading from front to back needs no ranges."""
    server = serve_files(Path(drawn_dataset), ranges=False)
    samples = ShardDataset(server.url, "composite", "train")
    for read in (samples.parts, samples.annotations, samples.__getitem__):
        with pytest.raises(UserError, match=r"ignores range requests.*copy the files"):
            read(3)
    assert [sample.key for sample in samples.stream()] == samples.keys


@pytest.mark.parametrize("slashes", ["/", "//"])
def test_slashes_at_the_end_of_a_root_change_nothing(
    drawn_dataset: str, serve_files: Callable[..., Any], slashes: str
) -> None:
    server = serve_files(Path(drawn_dataset))
    samples = ShardDataset(f"{server.url}{slashes}", "composite", "train")
    assert samples[0].key == ShardDataset(drawn_dataset, "composite", "train").keys[0]
    assert list(verify(f"{drawn_dataset}{slashes}")) == []


if __name__ == "__main__":
    main(*sys.argv[1:])
