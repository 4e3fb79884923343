"""Training in processes of its own: how it is started, told to end, and heard.

`launch` runs ``python -m mild.training.launch`` (or several of it, by ``torchrun`` or ``accelerate launch``), which
does what `train_here` does. What it has to say comes as lines of JSON on its standard output; its log is standard
error. It is asked to end by SIGTERM or SIGINT, or when its standard input is closed, which happens by itself when
whoever started it is gone: it then finishes its step, saves a checkpoint and ends. Nobody has to listen for that:
`launch` reads all that it says, also where those who are told fail or take long, and it does not mind where nobody
reads at all. Its exit codes are

===== ================================================================================================
code  meaning
===== ================================================================================================
0     the run is complete
2     something that the user must mend
75    `PREEMPTED`: asked to end, a checkpoint was saved; start again to go on
other it crashed or was killed; starting again goes on from the last checkpoint
===== ================================================================================================

This module imports no torch until it trains.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from typing import IO, Any

import psutil
from fsspec.implementations.local import LocalFileSystem

from dataset_tools.errors import UserError, what_to_mend
from dataset_tools.settings import Settings
from dataset_tools.shards import Samples, ShardDataset, read_manifest
from dataset_tools.storage import open_root, sha256_of_file
from mild.settings import TrainSettings

PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h."""
GRACE = 5.0
"""Seconds in which the last lines of a process that has ended are read; what it left running may hold the pipe open."""


class TrainRequest(Settings):
    """The arguments of `mild.training.loop.train`, by name."""

    settings: TrainSettings
    dataset: str
    """Folder or URL of a built dataset."""
    configurations: dict[str, float]
    """Those of the dataset that are mixed, and their weights."""
    split: str
    dataset_digest: str
    base: str
    base_digest: str
    output: str
    latents: str | None = None
    """Folder of the latents of fixed views (`mild.training.latents`), where they were encoded before."""


class Interrupted(RuntimeError):
    """Training ended before its time, by a fault of the machine; starting it again goes on from its checkpoint."""


def launch(
    request: TrainRequest,
    log: Callable[[int, dict[str, float]], None],
    launcher: Sequence[str] = (),
    time_limit: float | None = None,
) -> None:
    """Train in one process, or in several, and wait for the end.

    Where this is interrupted (by any exception, of ``log`` or of a signal), training saves a checkpoint and ends first;
    interrupted once more while it waits for that, it kills what trains. ``log`` may take its time: training goes on.

    Args:
        log: see `mild.training.loop.train`.
        launcher: what starts several processes, a module and its arguments, such as ``("torch.distributed.run",
            "--nproc_per_node", "4")`` or ``("accelerate.commands.launch", "--multi_gpu", "--num_processes", "4")``;
            empty: one process. On processors alone, with ``ACCELERATE_USE_CPU=true`` in the environment, the first.
        time_limit: seconds without a line of training's after which it hangs, and is killed; None: it never does.

    Raises:
        UserError: what training found wrong, or there is no such launcher, or it refuses its arguments.
        Interrupted: it was asked to end, crashed, was killed or hangs.
    """
    _check_launcher(launcher)
    several = ["-m", *launcher] if launcher else []
    process = subprocess.Popen(
        [sys.executable, *several, "-m", "mild.training.launch", request.model_dump_json(exclude_unset=True)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        # Libraries print what they like.
        errors="replace",
        # Ctrl-C is for this process, which asks: torchrun would give those that it started half a minute, and kill.
        process_group=0,
    )
    assert process.stdin is not None and process.stdout is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read_all, args=(process.stdout, lines), daemon=True)
    reader.start()
    ended = threading.Thread(target=_await_end, args=(process, reader, lines), daemon=True)
    ended.start()
    told: dict[str, Any] = {}
    try:
        while (line := lines.get(timeout=time_limit)) is not None:
            news = _parsed(line)
            if "step" in news:
                log(news["step"], news["values"])
            told |= news
    except queue.Empty:
        _kill(process)
        raise Interrupted(
            f"training has not said a word for {time_limit:g} s and was killed; it goes on from its last checkpoint"
        ) from None
    finally:
        try:
            process.stdin.close()
            ended.join()
        except BaseException:
            _kill(process)
            raise
    if "error" in told:
        raise UserError(told["error"])
    if "preempted" in told:
        raise Interrupted(f"training was asked to end; it goes on after step {told['preempted']}")
    if process.returncode == 2 and launcher:
        raise UserError(
            f"launcher: {' '.join(launcher)} ended with code 2: mend its arguments, its own words are above"
        )
    if process.returncode:
        raise Interrupted(
            f"training ended with code {process.returncode}, see its log; it goes on from its last checkpoint"
        )


def _check_launcher(launcher: Sequence[str]) -> None:
    """Raise `UserError` unless ``python -m`` would find the module; nothing is imported (most bring torch)."""
    if not launcher:
        return
    name, *rest = launcher[0].split(".")
    # As python -m does, here too.
    spec = (importlib.util.find_spec(name) or PathFinder.find_spec(name, [os.getcwd()])) if name else None
    for part in rest:
        if spec is not None:
            name = f"{name}.{part}"
            spec = PathFinder.find_spec(name, spec.submodule_search_locations or [])
    if spec is not None and spec.submodule_search_locations is not None:
        spec = PathFinder.find_spec(f"{name}.__main__", spec.submodule_search_locations)
    if spec is None:
        raise UserError(
            f"launcher: python -m {launcher[0]} finds no module: give one that is installed, such as "
            "torch.distributed.run, and then its arguments, each for itself"
        )


def _read_all(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)


def _await_end(process: subprocess.Popen[str], reader: threading.Thread, lines: queue.SimpleQueue[str | None]) -> None:
    """Put None behind the last line."""
    process.wait()
    reader.join(GRACE)
    lines.put(None)


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it started, some of it in sessions of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for member in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def main() -> None:
    """What `launch` runs, with a `TrainRequest` as JSON for its only argument."""
    asked_to_end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked_to_end.set())
    threading.Thread(target=_await_end_of_input, args=(asked_to_end,), daemon=True).start()
    request = TrainRequest.check(json.loads(sys.argv[1]), origin="request")
    # Python would look for garbage among all that is imported, again and again, for a fifth of the time that it takes,
    # and once more at the end. All of it stays.
    gc.disable()
    from mild.training.loop import Preempted

    gc.freeze()
    gc.enable()
    try:
        train_here(request, lambda step, values: _tell(step=step, values=values), asked_to_end.is_set)
    except Preempted as error:
        _tell(preempted=error.step)
        sys.exit(PREEMPTED)
    except Exception as error:
        complaint = what_to_mend(error)
        if complaint is None:
            raise
        _tell(error=complaint)
        sys.exit(2)


def train_here(
    request: TrainRequest, log: Callable[[int, dict[str, float]], None], stop: Callable[[], bool] = lambda: False
) -> None:
    """Train in this process, with what `mild.training.loop.train` takes: what each process of `launch` does.

    Raises:
        UserError: settings, dataset or base cannot be used, and what `mild.training.loop.train` raises it for.
        mild.training.loop.Preempted: ``stop`` said so.
    """
    from mild.training.fresh import FreshComposites, donors_configuration
    from mild.training.latents import Latents
    from mild.training.loop import check_machine, train
    from mild.training.mixture import Mixture

    settings, donors = request.settings, None
    check_machine(settings)
    datasets = {name: ShardDataset(request.dataset, name, request.split) for name in request.configurations}
    read = dict(datasets)
    if settings.fresh_composites is not None:
        name = donors_configuration(request.dataset, request.split)
        donors = read[name] = datasets.get(name) or ShardDataset(request.dataset, name, request.split)
    share = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for dataset in read.values():
        # Not all by the first process: torch gives up where the others wait for it for more than ten minutes.
        check_shards(dataset, share)
    validation = None if settings.samples_every is None else validation_of(request)
    train(
        settings,
        Mixture(datasets, request.configurations),
        request.base,
        request.output,
        log,
        dataset_digest=request.dataset_digest,
        base_digest=request.base_digest,
        latents=None if request.latents is None else Latents(request.latents, settings),
        fresh=None if donors is None else FreshComposites(donors, settings),
        validation=validation,
        stop=stop,
    )


def validation_of(request: TrainRequest) -> Samples | None:
    """The split ``validation`` of the configurations that are trained on; None where the dataset has none.

    Raises:
        UserError: a shard of it is missing, or differs from the manifest.
    """
    from mild.training.mixture import Mixture

    held = read_manifest(request.dataset).shards
    names = [
        name for name in request.configurations if any(shard.samples for shard in held[name].get("validation", []))
    ]
    datasets = {name: ShardDataset(request.dataset, name, "validation") for name in names}
    for dataset in datasets.values():
        check_shards(dataset)
    return Mixture(datasets, {name: request.configurations[name] for name in names}) if names else None


def check_shards(samples: ShardDataset, share: tuple[int, int] = (0, 1)) -> None:
    """Look at every shard before the first step, not when its turn comes.

    Local shards are read and compared with the manifest's digest; of those elsewhere only the size is asked for.

    Args:
        share: number of this process, from 0, and how many look at the shards together, each at its own.

    Raises:
        UserError: a shard is missing, or differs from the manifest.
    """
    filesystem, base = open_root(samples.root)
    first, processes = share
    for shard in samples.shards[first::processes]:
        path = f"{base}/{shard.path}"
        try:
            sound = filesystem.size(path) == shard.size
            if sound and isinstance(filesystem, LocalFileSystem):
                sound = sha256_of_file(filesystem, path) == shard.sha256
        except FileNotFoundError:
            raise UserError(f"{samples.root}/{shard.path} is missing: build the dataset again") from None
        if not sound:
            raise UserError(
                f"{samples.root}/{shard.path} is not what the manifest says: building the dataset again mends it"
            )


def _await_end_of_input(ended: threading.Event) -> None:
    # Not sys.stdin, whose lock a thread that waits for input would hold while the interpreter ends.
    while os.read(0, 4096):
        pass
    ended.set()


def _tell(**news: Any) -> None:
    try:
        print(json.dumps(news), flush=True)
    except BrokenPipeError:
        # Nobody is there any more, which is known from standard input too: save and end, as then. What is printed from
        # now on, the rest of this line first, goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _parsed(line: str) -> dict[str, Any]:
    """News, or nothing if some library printed the line."""
    try:
        news = json.loads(line)
    except ValueError:
        news = None
    if isinstance(news, dict):
        return news
    with contextlib.suppress(OSError):
        print(line, end="", file=sys.stderr)
    return {}


if __name__ == "__main__":
    main()
