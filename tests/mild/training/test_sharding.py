"""Training on a UNet whose frozen weights lie spread over two processes, on processors.

The first test starts this file itself as a training script, by ``accelerate launch``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
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
from torch import nn
from torch.distributed.tensor import DTensor

import mild.training.loop
from dataset_tools.errors import UserError
from dataset_tools.shards import ShardDataset
from mild.settings import OffsetSettings, PrefixSettings, TrainSettings
from mild.training.loop import train
from mild.training.sharding import shard_frozen, sharding_asked_for

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


def _train(dataset: str, base: str, output: str, settings: TrainSettings) -> None:
    samples = ShardDataset(dataset, "composite", "train")
    train(settings, samples, base, output, lambda step, values: None, validation=samples)


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


def main(dataset: str, base: str, output: str, settings: str) -> None:
    """One of the processes."""

    def watched(unet: nn.Module, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
        before = _counted(unet)
        shard_frozen(unet, accelerator, plugin)
        counts = json.dumps({"before": before, "after": _counted(unet)})
        Path(f"{output}-{accelerator.process_index}.json").write_text(counts)

    mild.training.loop.Accelerator, mild.training.loop.shard_frozen = _AsOnGpus, watched  # type: ignore[misc, assignment]
    _train(dataset, base, output, TrainSettings.model_validate_json(settings))


@pytest.mark.process
def test_on_a_sharded_unet_training_computes_what_it_does_on_a_whole_one(
    drawn_dataset: str,
    tiny_base: str,
    quick: TrainSettings,
    assert_trained_alike: Callable[[Path, Path], None],
    tmp_path: Path,
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
    script = [__file__, drawn_dataset, tiny_base, str(tmp_path / "sharded"), settings.model_dump_json()]
    subprocess.run([*launcher, *script], env=os.environ | {"ACCELERATE_USE_CPU": "true"}, check=True, timeout=300)
    alone = settings.model_copy(update={"gradient_accumulation": PROCESSES})
    _train(drawn_dataset, tiny_base, str(tmp_path / "whole"), alone)

    counts = [json.loads((tmp_path / f"sharded-{rank}.json").read_text()) for rank in range(PROCESSES)]
    before = counts[0]["before"]
    assert sum(count["after"]["frozen"] for count in counts) == before["frozen"]
    for count in counts:
        assert count["after"]["frozen"] == pytest.approx(before["frozen"] / PROCESSES, rel=0.02)
        assert count["after"]["trained"] == before["trained"] > 0

    assert len(list((tmp_path / "whole").rglob("*.safetensors"))) == 7, "two adapters and five parts"
    assert_trained_alike(tmp_path / "sharded", tmp_path / "whole")
    for drawn in ("samples.png", "../{}.work/samples/step-000002.png"):
        sheets = [np.asarray(Image.open(tmp_path / name / drawn.format(name)), float) for name in ("sharded", "whole")]
        assert np.abs(sheets[0] - sheets[1]).mean() < 0.1


@pytest.fixture
def asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FullyShardedDataParallelPlugin | None]:
    """What `sharding_asked_for` makes of a configuration file, as accelerate's launcher hands it on."""

    def asked(processes: int = PROCESSES, settings: TrainSettings | None = None, **fsdp: Any) -> Any:
        for name, value in _environment(tmp_path, **fsdp).items():
            monkeypatch.setenv(name, value)
        accelerator = SimpleNamespace(num_processes=processes)
        return sharding_asked_for(accelerator, settings or TrainSettings())  # type: ignore[arg-type]

    return asked


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
    asked_for: Callable[..., Any], fsdp: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        asked_for(settings=TrainSettings(**changes), **fsdp)


@pytest.mark.parametrize("reshard", [True, False])
def test_whether_a_block_is_given_up_after_its_forward_pass_is_heeded(
    asked_for: Callable[..., Any], reshard: bool
) -> None:
    plugin = asked_for(reshard_after_forward=reshard)
    assert plugin is not None and plugin.reshard_after_forward is reshard


def test_all_processes_load_the_text_encoders(tmp_path: Path, asked_for: Callable[..., Any]) -> None:
    """transformers asks the environment whether only the first should; accelerate's launcher says yes."""
    assert _environment(tmp_path)["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    asked_for()
    assert not parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")


def test_one_process_alone_has_nobody_to_share_with(asked_for: Callable[..., Any]) -> None:
    assert asked_for(processes=1) is None


if __name__ == "__main__":
    main(*sys.argv[1:])
