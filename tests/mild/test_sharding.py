"""Training on a UNet whose frozen weights lie spread over two processes, on processors.

The first test starts this file itself as a training script, by ``accelerate launch``.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from accelerate.utils.launch import prepare_multi_gpu_env
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

import mild.training
from dataset_tools.errors import UserError
from dataset_tools.shards import ShardDataset
from mild.nano import NAME
from mild.settings import OffsetSettings, PrefixSettings, TrainSettings
from mild.sharding import shard_frozen, sharding_asked_for
from mild.training import train

PROCESSES = 2


def _configuration(folder: Path, **fsdp: Any) -> str:
    """A configuration file of accelerate's that asks for FSDP."""
    config = {f"fsdp_{name}": value for name, value in {"version": 2, **fsdp}.items()}
    file = folder / "fsdp.yaml"
    file.write_text(yaml.safe_dump({"distributed_type": "FSDP", "num_processes": PROCESSES, "fsdp_config": config}))
    return str(file)


def _environment(folder: Path, **fsdp: Any) -> dict[str, str]:
    """What accelerate's launcher tells its processes of it."""
    arguments = launch_command_parser().parse_args(["--config_file", _configuration(folder, **fsdp), __file__])
    told = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    return {name: value for name, value in told.items() if "FSDP" in name}


def _train(dataset: str, output: str, settings: TrainSettings) -> None:
    samples = ShardDataset(dataset, "composite", "train")
    train(settings, samples, NAME, output, lambda step, values: None, validation=samples)


class _AsOnGpus(Accelerator):
    """accelerate calls itself FSDP on GPUs only, though nothing that is used of it then needs one."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        assert self.num_processes == PROCESSES
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        self.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        assert self.is_fsdp2


def _counted(unet: nn.Module) -> dict[str, int]:
    """Numbers of weights that this process keeps."""
    counts = {"frozen": 0, "trained": 0}
    for parameter in unet.parameters():
        kept = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        counts["trained" if parameter.requires_grad else "frozen"] += kept.numel()
    return counts


def main(dataset: str, output: str, settings: str) -> None:
    """One of the processes."""

    def watched(unet: nn.Module, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
        before = _counted(unet)
        shard_frozen(unet, accelerator, plugin)
        counts = json.dumps({"before": before, "after": _counted(unet)})
        Path(f"{output}-{accelerator.process_index}.json").write_text(counts)

    mild.training.Accelerator, mild.training.shard_frozen = _AsOnGpus, watched  # type: ignore[misc, assignment]
    _train(dataset, output, TrainSettings.model_validate_json(settings))


def test_on_a_sharded_unet_training_computes_what_it_does_on_a_whole_one(
    drawn_dataset: str, quick: TrainSettings, tmp_path: Path
) -> None:
    """Weights, losses and sample pictures, to rounding, with everything that is trained or draws on the UNet."""
    parts = {
        "offsets": OffsetSettings(spatial_offset=True, boundary_smoothing=True, width=4),
        "prefix": PrefixSettings(tokens=2),
    }
    changes: dict[str, Any] = {"samples_every": 2, "sample_pictures": 1, "gradient_checkpointing": True}
    changes |= {"ema_decay": 0.5, "mild": quick.mild.model_copy(update=parts)}
    settings = quick.model_copy(update=changes)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", _configuration(tmp_path)]
    script = [__file__, drawn_dataset, str(tmp_path / "sharded"), settings.model_dump_json()]
    subprocess.run([*launcher, *script], env=os.environ | {"ACCELERATE_USE_CPU": "true"}, check=True, timeout=300)
    _train(drawn_dataset, str(tmp_path / "whole"), settings.model_copy(update={"gradient_accumulation": PROCESSES}))

    counts = [json.loads((tmp_path / f"sharded-{rank}.json").read_text()) for rank in range(PROCESSES)]
    before = counts[0]["before"]
    assert sum(count["after"]["frozen"] for count in counts) == before["frozen"]
    for count in counts:
        assert count["after"]["frozen"] == pytest.approx(before["frozen"] / PROCESSES, rel=0.02)
        assert count["after"]["trained"] == before["trained"] > 0

    with (tmp_path / "sharded/loss.csv").open() as one, (tmp_path / "whole/loss.csv").open() as other:
        for found, expected in zip(list(csv.reader(one))[1:], list(csv.reader(other))[1:], strict=True):
            assert [float(value) for value in found] == pytest.approx([float(value) for value in expected], rel=1e-3)
    files = sorted((tmp_path / "whole").rglob("*.safetensors"))
    assert len(files) == 6, "two adapters and four parts"
    for path in files:
        weights = load_file(tmp_path / "sharded" / path.relative_to(tmp_path / "whole"))
        for name, tensor in load_file(path).items():
            assert (weights[name] - tensor).norm() < 0.01 * tensor.norm() + 1e-6, name
    for drawn in ("samples.png", "../{}.work/samples/step-000002.png"):
        sheets = [np.asarray(Image.open(tmp_path / name / drawn.format(name)), float) for name in ("sharded", "whole")]
        assert np.abs(sheets[0] - sheets[1]).mean() < 0.1


@pytest.mark.parametrize(
    ("fsdp", "changes", "named"),
    [
        ({"version": 1}, {}, "fsdp_version"),
        ({"offload_params": True}, {}, "fsdp_offload_params"),
        ({"activation_checkpointing": True}, {}, "fsdp_activation_checkpointing .* train.gradient_checkpointing"),
        ({}, {"compile": True}, "compile"),
    ],
)
def test_what_cannot_be_heeded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsdp: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    for name, value in _environment(tmp_path, **fsdp).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named):
        sharding_asked_for(SimpleNamespace(num_processes=PROCESSES), TrainSettings(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("reshard", [True, False])
def test_whether_a_block_is_given_up_after_its_forward_pass_is_heeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reshard: bool
) -> None:
    for name, value in _environment(tmp_path, reshard_after_forward=reshard).items():
        monkeypatch.setenv(name, value)
    plugin = sharding_asked_for(SimpleNamespace(num_processes=PROCESSES), TrainSettings())  # type: ignore[arg-type]
    assert plugin is not None and plugin.reshard_after_forward is reshard


def test_all_processes_load_the_text_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks the environment whether only the first should; accelerate's launcher says yes."""
    for name, value in _environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    assert parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")
    sharding_asked_for(SimpleNamespace(num_processes=PROCESSES), TrainSettings())  # type: ignore[arg-type]
    assert not parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")


def test_one_process_alone_has_nobody_to_share_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    assert sharding_asked_for(SimpleNamespace(num_processes=1), TrainSettings()) is None  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
