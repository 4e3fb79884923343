"""The ``mild`` command line. Imports what a command needs when it runs, so that ``mild --help`` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dataset_tools.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Erase people from pictures: build datasets, train, evaluate.",
)
console = Console()

Changes = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one setting, such as composite.seed=3. Repeatable."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log.")]


def main() -> None:
    """Entry point: a `UserError`, or a missing extra, becomes one line and exit code 2."""
    try:
        app()
    except UserError as error:
        complaint = str(error)
    except ModuleNotFoundError as error:
        complaint = f"{error.name} is not installed; this command needs the extra: pip install 'mild[flows]'"
    else:
        return
    Console(stderr=True).print("[bold red]error:[/]", Text(complaint), highlight=False, soft_wrap=True)
    sys.exit(2)


@app.command()
def build(
    settings: Annotated[Path | None, typer.Argument(help="YAML file of build settings.")] = None,
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
    from flows.build_dataset import build_dataset, check_build
    from flows.pipeline import recipe_path

    changes = _parsed(set_)
    if (settings is None) == (source is None):
        raise UserError("give either a settings file or --source")
    if source is not None:
        settings = Path(recipe_path("build", source))
        changes |= {f"source.{key}": value for key, value in [("photos", photos), ("masks", masks)] if value}
    check_build(str(settings), output, changes)
    _show_build(build_dataset(str(settings), output, changes))


@app.command()
def train(
    settings: Annotated[Path, typer.Argument(help="YAML file of a training recipe.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Folder or URL of a built dataset.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the adapters.")] = "build/adapters",
    set_: Changes = None,
    verbose: Verbose = False,
) -> None:
    """Train adapters on a dataset."""
    _prepare_prefect(verbose)
    from flows.train import train as train_flow

    result = train_flow(str(settings), dataset, output, _parsed(set_))
    console.print(f"adapters in {result['adapters']}{' (cached)' if result['cached'] else ''}, base {result['base']}")


@app.command()
def evaluate(
    settings: Annotated[Path, typer.Argument(help="YAML file of an evaluation recipe.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Folder or URL of a built dataset.")],
    adapters: Annotated[str, typer.Option("--adapters", "-a", help="Folder that training wrote.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the report.")] = "build/evaluation",
    set_: Changes = None,
    verbose: Verbose = False,
) -> None:
    """Compare adapters with other methods; writes tables, pictures and report.html."""
    _prepare_prefect(verbose)
    from flows.evaluate import evaluate as evaluate_flow

    result = evaluate_flow(str(settings), dataset, adapters, output, _parsed(set_))
    _show_evaluation(result["summary"])
    console.print(f"report in {result['report']}{' (cached)' if result['cached'] else ''}")


@app.command()
def pretrain(
    settings: Annotated[Path, typer.Argument(help="YAML file of a pretraining recipe.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the base.")] = "build/base",
    set_: Changes = None,
    verbose: Verbose = False,
) -> None:
    """Train a very small base from nothing on the drawn world; an hour or more on a laptop."""
    _prepare_prefect(verbose)
    from flows.pretrain_base import pretrain_base

    result = pretrain_base(str(settings), output, _parsed(set_))
    cached = f" (cached: {', '.join(result['cached'])})" if result["cached"] else ""
    console.print(f"base in {result['base']}{cached}")


@app.command()
def quickstart(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for everything.")] = "quickstart",
    verbose: Verbose = False,
) -> None:
    """The whole road on the embedded sample: build-dataset, train, evaluate."""
    _prepare_prefect(verbose)
    from flows.pipeline import pipeline

    result = pipeline("sample", output)
    build = result["build"]
    cached = [f"{build['cached']} of {build['shards']} shards"]
    cached += [name for name in ("train", "evaluate") if result[name]["cached"]]
    _show_build(build)
    _show_evaluation(result["evaluate"]["summary"])
    console.print(f"cached    {', '.join(cached)}")
    console.print(f"shards    {build['dataset']}")
    console.print(f"pictures  {build['dataset']}/card, {Path(result['evaluate']['report']).parent}/pictures")
    console.print(f"report    {result['evaluate']['report']}")


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
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise; the same seed gives the same picture.")] = 0,
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
    """Erase people from photographs; all other pixels stay exactly as they are."""
    from flows.erase import EraseOptions
    from flows.erase import erase as erase_people
    from mild.regions import MARGIN

    if not mask:
        raise UserError("say where the people are: --mask MASK.png, a folder of masks, or a COCO json")
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
        complaints=Console(stderr=True),
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
    from flows.erase import recompose as recompose_picture

    recompose_picture(layers, keep, output, force=force)
    console.print(Text(output), soft_wrap=True)


@app.command()
def inspect(
    dataset: Annotated[str, typer.Argument(help="Folder or URL of a dataset.")],
    picture: Annotated[Path, typer.Option(help="Where to write the contact sheet (PNG).")] = Path("contact-sheet.png"),
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
    write_bytes(*open_root(str(picture)), encode_png(contact_sheet(samples, columns=4, tile=240)))
    console.print(f"contact sheet in {picture}")


@app.command()
def verify(dataset: Annotated[str, typer.Argument(help="Folder or URL of a dataset.")]) -> None:
    """Check digests, schema, masks, keypoints and splits; exit code 1 where something is wrong."""
    from dataset_tools.shards import read_manifest
    from dataset_tools.shards import verify as verify_dataset

    manifest = read_manifest(dataset)
    problems = 0
    for problem in verify_dataset(dataset, workers=os.cpu_count() or 1):
        problems += 1
        console.print(f"[red]{problem.where}[/]: {problem.what}", highlight=False, soft_wrap=True)
    if problems:
        console.print(f"{problems} problems; building again redoes what is altered")
        raise typer.Exit(1)
    shards = [shard for splits in manifest.shards.values() for held in splits.values() for shard in held]
    console.print(
        f"sound: {sum(s.samples for s in shards)} samples in {len(shards)} shards, digest {manifest.digest()[:16]}"
    )


def _show_build(summary: dict[str, Any]) -> None:
    table = Table(title=f"dataset {summary['dataset']}")
    table.add_column("what")
    table.add_column("count", justify="right")
    for name in ("samples", "shards", "cached"):
        table.add_row(name, str(summary[name]))
    for reason, count in summary["rejected"].items():
        table.add_row(f"set aside or mended: {reason}", str(count))
    console.print(table)


def _show_evaluation(summary: dict[str, Any]) -> None:
    """Means in the hole: PSNR, more is better, and perceptual distance, less is better."""
    table = Table(title="in the hole: PSNR in dB / perceptual distance")
    table.add_column("method")
    for group in summary["groups"]:
        table.add_column(f"{group['name']} ({group['cases']})", justify="right")
    for method in summary["settings"]["methods"]:
        reached = [group["methods"][method] for group in summary["groups"]]
        means = [(values["psnr_hole"]["mean"], values["perceptual_hole"]["mean"]) for values in reached]
        table.add_row(method, *("not computed" if None in pair else "{:.2f} / {:.3f}".format(*pair) for pair in means))
    console.print(table)


def _parsed(changes: list[str] | None) -> dict[str, Any]:
    parsed = {}
    for change in changes or []:
        key, equals, value = change.partition("=")
        if not equals:
            raise UserError(f"--set {change}: write it as key=value")
        parsed[key] = yaml.safe_load(value)
    return parsed


def _prepare_prefect(verbose: bool) -> None:
    """Must run before Prefect is imported: it reads its settings then."""
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO" if verbose else "CRITICAL")
    # On a busy machine the temporary server needs more than the 20 seconds that Prefect gives it.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")


if __name__ == "__main__":
    main()
