"""The ``mild`` command line. Imports what a command needs when it runs, so that ``mild --help`` is quick."""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from dataset_tools.errors import UserError, what_to_mend
from dataset_tools.storage import is_url, local_path, normal_place

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Base of what is wrong with a command line; typer has its own, and not under a public name."""
UNBROKEN = 100_000
"""Columns of a file or pipe, where a line ends only where it ends."""
SERVER_SECONDS = 10
"""How long a Prefect server may take to say that it is there."""
MISSING = "the module {} is not installed; in the folder of this project run: pip install '.[flows]'"


class _Commands(TyperGroup):
    def main(self, *arguments: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """As everywhere in this program, what is wrong with a command line is one `UserError`."""
        if not standalone_mode:
            return super().main(*arguments, standalone_mode=False, **options)  # type: ignore[misc]
        if not arguments and not sys.argv[1:]:
            arguments = (["--help"],)
        try:
            code = super().main(*arguments, standalone_mode=False, **options)  # type: ignore[misc]
        except UsageError as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "mild"
            what = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
            raise UserError(f"{what}; see {command} --help") from None
        except typer.Abort:
            sys.exit(128 + signal.SIGINT)
        sys.exit(code or 0)


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=UNBROKEN)


app = typer.Typer(
    cls=_Commands, pretty_exceptions_enable=False, help="Erase people from pictures: build datasets, train, evaluate."
)
console = _console()

Changes = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one setting, such as composite.seed=3. Repeatable."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log.")]


def main() -> None:
    """Entry point. What the user must mend becomes one line. Exit codes:

    ==== ===========================================================================================
    0    all is done
    1    something was set aside, `verify` found something, or this program has a defect (a traceback)
    2    there is something that the user must mend
    129  ended by SIGHUP
    130  ended by SIGINT (Ctrl-C)
    143  ended by SIGTERM
    ==== ===========================================================================================
    """
    for stream in (sys.stdout, sys.stderr):
        # File names can be anything; printing them must not fail.
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with _signals_as_exits():
            app()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("flows", "mild", "dataset_tools", ""):
            raise
        _complain(MISSING.format(error.name))
    except SystemExit as error:
        if isinstance(error.code, int) and error.code > 128:
            _end(error.code)
        raise
    except KeyboardInterrupt:
        _end(128 + signal.SIGINT)
    except Exception as error:
        complaint = what_to_mend(error)
        if complaint is None:
            raise
        _complain(complaint)


def _complain(what: str) -> NoReturn:
    line = Text.assemble(("error:", "bold red"), " ", " ".join(what.split("\n")))
    _console(stderr=True).print(line, soft_wrap=True)
    sys.exit(2)


@contextlib.contextmanager
def _signals_as_exits() -> Iterator[None]:
    """Inside, a signal that would kill at once ends the program in order: blocks are left, child processes ended."""

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    # What nohup ignores stays ignored. SIGINT is Python's own KeyboardInterrupt.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(code: int) -> NoReturn:
    """End after a signal; where threads still work in vain, at once."""
    settings = sys.modules.get("flows.settings")
    if settings is not None and settings.Threads.abandoned:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for child in multiprocessing.active_children():
            child.terminate()
        # Prefect's temporary server is ended by one of these. Python itself would wait for the threads first.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _say(line: str) -> None:
    """One line of output, as it is: names of files are no markup."""
    console.print(Text(line), soft_wrap=True)


@app.command()
def build(
    settings: Annotated[str | None, typer.Argument(help="YAML file of build settings.")] = None,
    source: Annotated[
        str | None, typer.Option(help="sample, openimages or folder; instead of a settings file.")
    ] = None,
    photos: Annotated[str | None, typer.Option(help="--source folder: folder of photographs.")] = None,
    masks: Annotated[str | None, typer.Option(help="--source folder: folder of masks, or a COCO json.")] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder or URL of the dataset.")] = "build/dataset",
    set_: Changes = None,
    verbose: Verbose = False,
) -> None:
    """Build a dataset, or bring one up to date."""
    _prepare_prefect(verbose)
    from flows.build_dataset import build_dataset
    from flows.pipeline import recipe_path

    changes = _parsed(set_)
    if (settings is None) == (source is None):
        raise UserError("give either a settings file or --source")
    if source is not None:
        settings = recipe_path("build", source)
        changes |= {f"source.{key}": value for key, value in [("photos", photos), ("masks", masks)] if value}
    _show_build(build_dataset(str(settings), output, changes))


@app.command()
def train(
    settings: Annotated[str, typer.Argument(help="YAML file of a training recipe.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Folder or URL of a built dataset.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the adapters.")] = "build/adapters",
    set_: Changes = None,
    verbose: Verbose = False,
) -> None:
    """Train adapters on a dataset."""
    _prepare_prefect(verbose)
    from flows.train import check_train
    from flows.train import train as train_flow

    changes = _parsed(set_)
    check_train(settings, dataset, output, changes)
    result = train_flow(settings, dataset, output, changes)
    if result["set_aside"]:
        _say(result["set_aside"])
    _say(f"adapters in {result['adapters']}{' (cached)' if result['cached'] else ''}, base {result['base']}")


@app.command()
def evaluate(
    settings: Annotated[str, typer.Argument(help="YAML file of an evaluation recipe.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Folder or URL of a built dataset.")],
    adapters: Annotated[str, typer.Option("--adapters", "-a", help="Folder that training wrote.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the report.")] = "build/evaluation",
    set_: Changes = None,
    verbose: Verbose = False,
) -> None:
    """Compare adapters with other methods; writes tables, pictures and report.html."""
    _prepare_prefect(verbose)
    from flows.evaluate import check_evaluate
    from flows.evaluate import evaluate as evaluate_flow

    changes = _parsed(set_)
    check_evaluate(settings, dataset, adapters, output, changes)
    result = evaluate_flow(settings, dataset, adapters, output, changes)
    _show_evaluation(result["summary"])
    _say(f"report in {result['report']}{' (cached)' if result['cached'] else ''}")


@app.command()
def pretrain(
    settings: Annotated[str, typer.Argument(help="YAML file of a pretraining recipe.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the base.")] = "build/base",
    set_: Changes = None,
    verbose: Verbose = False,
) -> None:
    """Train a very small base from nothing on the drawn world; an hour or more on a laptop."""
    _prepare_prefect(verbose)
    from flows.pretrain_base import check_pretrain, pretrain_base

    changes = _parsed(set_)
    check_pretrain(settings, output, changes)
    result = pretrain_base(settings, output, changes)
    cached = f" (cached: {', '.join(result['cached'])})" if result["cached"] else ""
    _say(f"base in {result['base']}{cached}")


@app.command()
def quickstart(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for everything.")] = "quickstart",
    verbose: Verbose = False,
) -> None:
    """The whole road on the embedded sample: build-dataset, train, evaluate."""
    _prepare_prefect(verbose)
    from flows.pipeline import check_pipeline, pipeline

    check_pipeline("sample", output)
    result = pipeline("sample", output)
    build = result["build"]
    cached = [f"{build['cached']} of {build['shards']} shards"]
    cached += [name for name in ("train", "evaluate") if result[name]["cached"]]
    _show_build(build)
    _show_evaluation(result["evaluate"]["summary"])
    _say(f"cached    {', '.join(cached)}")
    _say(f"shards    {build['dataset']}")
    _say(f"pictures  {build['dataset']}/card, {Path(result['evaluate']['report']).parent}/pictures")
    _say(f"report    {result['evaluate']['report']}")


@app.command()
def erase(
    photos: Annotated[list[str], typer.Argument(metavar="PHOTO", help="Photographs: files, folders or globs.")],
    mask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Masks of the people: for one photograph an index PNG, or a PNG a person (repeat the option); for "
            "any number a folder of PNGs with the photographs' names (NAME.png, or NAME_0.png, NAME_1.png, ...), or "
            "a COCO json. Where people overlap, later masks are in front.",
        ),
    ] = None,
    remove: Annotated[
        str | None,
        typer.Option(metavar="1,3", help="Who vanishes, counted from 1 in the order of the masks; default: everybody."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="File for one photograph, folder for several; default: NAME-erased.png beside the photograph. PNG, "
            "TIFF and WEBP keep all other pixels exactly.",
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Also save background and people, for mild recompose.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    base: Annotated[
        str | None,
        typer.Option(help="SDXL inpainting pipeline, folder or hub id; default: the one that --mild was trained on."),
    ] = None,
    mild: Annotated[
        str | None,
        typer.Option(
            help="Folder that training wrote, or hub id; default: the base of --base alone or, without that, the "
            "adapters that come with this package, which know drawn pictures only."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps, 1 to 1000.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the noise, below 2**64; the same seed gives the same picture.")] = 0,
    prompt: Annotated[str, typer.Option(help="What is to be seen where people were.")] = "",
    margin: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How far beyond a mask pixels may change, as a share of the square root of its area: more for rough "
            "masks, 0 for exactly the masks; default: 0.015.",
        ),
    ] = None,
) -> None:
    """Erase people from photographs; all other pixels stay exactly as they are.

    Of several photographs, those whose results are there are passed over, so that a run that was stopped can go on.
    """
    if not mask:
        raise UserError("say where the people are: --mask MASK.png, a folder of masks, or a COCO json")
    photos = [local_path(photo, "photographs") for photo in photos]
    # Masks are read from anywhere.
    mask = [place if is_url(place := normal_place(path)) else local_path(path, "masks") for path in mask]
    output = None if output is None else local_path(output, "results")
    layers = None if layers is None else local_path(layers, "layers")
    with _stopped_in_one_line():
        from flows.erase import EraseOptions
        from flows.erase import erase as erase_people
        from mild.regions import MARGIN

        options = EraseOptions(base, mild, steps, seed, prompt, MARGIN if margin is None else margin)
        if erase_people(
            photos,
            mask,
            options,
            remove=remove,
            output=output,
            layers=layers,
            force=force,
            console=console,
            complaints=_console(stderr=True),
        ):
            raise typer.Exit(1)


@app.command()
def recompose(
    layers: Annotated[str, typer.Argument(metavar="FOLDER", help="What mild erase --layers saved.")],
    keep: Annotated[str, typer.Option(metavar="1,3", help="Who stays, counted from 1; none for nobody.")],
    output: Annotated[str, typer.Option("--output", "-o", help="File of the picture.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Put a picture together again with some of its people."""
    with _stopped_in_one_line():
        from flows.erase import recompose as recompose_picture

        note = recompose_picture(local_path(layers, "layers"), keep, local_path(output, "results"), force=force)
    if note is not None:
        _console(stderr=True).print(Text(f"{output}: {note}"), soft_wrap=True)
    _say(output)


@app.command()
def inspect(
    dataset: Annotated[str, typer.Argument(help="Folder or URL of a dataset.")],
    picture: Annotated[str, typer.Option(help="Where to write the contact sheet (PNG).")] = "contact-sheet.png",
    each: Annotated[int, typer.Option(min=1, help="Samples of each configuration and split on it.")] = 4,
) -> None:
    """Show counts, sizes, people a picture, overlap and licences; draw a contact sheet."""
    from dataset_tools.contact_sheet import contact_sheet
    from dataset_tools.inspection import as_tables
    from dataset_tools.inspection import inspect as inspect_dataset
    from dataset_tools.schema import encode_png
    from dataset_tools.shards import ShardDataset, read_manifest
    from dataset_tools.storage import open_root, write_bytes

    for table in as_tables(inspect_dataset(dataset)):
        console.print(table)
    parts = [
        ShardDataset(dataset, configuration, split)
        for configuration, splits in read_manifest(dataset).shards.items()
        for split in splits
    ]
    samples = [part[index] for part in parts for index in range(min(each, len(part)))]
    write_bytes(*open_root(picture), encode_png(contact_sheet(samples, columns=4, tile=240)))
    _say(f"contact sheet in {picture}")


@app.command()
def verify(dataset: Annotated[str, typer.Argument(help="Folder or URL of a dataset.")]) -> None:
    """Check digests, schema, masks, keypoints and splits; exit code 1 where something is wrong."""
    from dataset_tools.shards import read_manifest
    from dataset_tools.shards import verify as verify_dataset

    manifest = read_manifest(dataset)
    problems = 0
    for problem in verify_dataset(dataset, workers=os.cpu_count() or 1):
        problems += 1
        console.print(Text.assemble((problem.where, "red"), f": {problem.what}"), soft_wrap=True)
    if problems:
        _say(f"{problems} problems; building again redoes what is altered")
        raise typer.Exit(1)
    shards = [shard for splits in manifest.shards.values() for held in splits.values() for shard in held]
    _say(f"sound: {sum(s.samples for s in shards)} samples in {len(shards)} shards, digest {manifest.digest()[:16]}")


@contextlib.contextmanager
def _stopped_in_one_line() -> Iterator[None]:
    """Ctrl-C ends with a line and the exit code that shells expect of it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        _console(stderr=True).print(Text(str(stop) or "stopped: nothing was written"), soft_wrap=True)
        raise typer.Exit(130) from None


def _show_build(summary: dict[str, Any]) -> None:
    _say(f"dataset {summary['dataset']}")
    table = Table()
    table.add_column("what")
    table.add_column("count", justify="right")
    for name in ("samples", "shards", "cached"):
        table.add_row(name, str(summary[name]))
    for reason, count in summary["rejected"].items():
        table.add_row(Text(f"set aside or mended: {reason}"), str(count))
    console.print(table)


def _show_evaluation(summary: dict[str, Any]) -> None:
    """Means in the hole: PSNR, more is better, and perceptual distance, less is better."""
    table = Table(title="in the hole: PSNR in dB / perceptual distance")
    table.add_column("method")
    for group in summary["groups"]:
        table.add_column(Text(f"{group['name']} ({group['cases']})"), justify="right")
    for method in summary["settings"]["methods"]:
        reached = [group["methods"][method] for group in summary["groups"]]
        means = [(values["psnr_hole"]["mean"], values["perceptual_hole"]["mean"]) for values in reached]
        table.add_row(
            Text(method), *("not computed" if None in pair else "{:.2f} / {:.3f}".format(*pair) for pair in means)
        )
    console.print(table)


def _parsed(changes: list[str] | None) -> dict[str, Any]:
    parsed = {}
    for change in changes or []:
        key, equals, value = change.partition("=")
        if not equals:
            raise UserError(f"--set {change}: write it as key=value")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {change}: the value is not valid YAML: {' '.join(str(error).split())}") from None
    return parsed


def _prepare_prefect(verbose: bool) -> None:
    """Prefect's settings, and whether it can work at all. Must run before Prefect is imported: it reads them then.

    Raises:
        UserError: its settings are wrong, its server does not answer, or there is no place for its database.
    """
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO" if verbose else "CRITICAL")
    # On a busy machine the temporary server needs more than the 20 seconds that Prefect gives it.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    if not verbose:
        # They say that they need longer than expected to empty their queues.
        for name in ("EventsWorker", "APILogWorker"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    from pydantic import ValidationError

    try:
        # What Prefect prints and warns of here, is looked at here.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            from prefect.settings import PREFECT_API_URL, PREFECT_HOME

            home, url = PREFECT_HOME.value(), PREFECT_API_URL.value()
    except ValidationError as error:
        what = "; ".join(f"{error.title}.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(f"Prefect's settings (PREFECT_... in the environment, or its profile): {what}") from None
    except RuntimeError as error:  # of pathlib
        raise UserError(f"Prefect keeps its database in a home folder: set HOME or PREFECT_HOME ({error})") from None
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(
            f"Prefect keeps its database in {home}, where nothing can be written ({error.strerror}): set PREFECT_HOME "
            "to a folder where that can be done"
        ) from None
    if url:
        _check_server(url)


def _check_server(url: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    cure = "start that server, set PREFECT_API_URL to another (it ends in /api), or unset it for a temporary one"
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        try:
            client = get_client(httpx_settings={"timeout": SERVER_SECONDS}, sync_client=True)
            fault = client.api_healthcheck()
            if fault is None:
                client.raise_for_api_version_mismatch()
        except Exception as error:  # of the network, of what answers there instead, of the URL itself
            fault = error
    if fault is not None:
        what = " ".join(str(fault).split()) or type(fault).__name__
        raise UserError(f"there is no Prefect server at {url} (PREFECT_API_URL): {what}; {cure}")


if __name__ == "__main__":
    main()
