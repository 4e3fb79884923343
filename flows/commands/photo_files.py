"""``mild erase`` and ``mild recompose``: which photographs, which masks, where results go; then the pipeline on each.

No Prefect here: a person with a photograph should not wait for a server.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from dataset_tools.errors import Rejected, UserError
from dataset_tools.images import without_pillows_limit
from dataset_tools.masks import why_inverted, why_much
from dataset_tools.photo_masks import PHOTO_SUFFIXES, NamedMasks, PhotoMasks, Place, files_below, open_masks
from dataset_tools.photographs import Photograph, read_photograph
from dataset_tools.records import Rejection
from dataset_tools.storage import check_writable
from flows.commands.results import check_free, check_size, encoded, exists, result_file, write_result
from mild.bases import NANO_ADAPTERS, SUGGESTED_BASE, place_of
from mild.erasing.layers import INDEX as LAYERS_INDEX
from mild.erasing.regions import editable
from mild.model.saved import read_config

if TYPE_CHECKING:
    from mild.erasing.pipeline import MILDPipeline

MOST_STEPS = 1000
"""All that there are in the noise schedule of SDXL."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_MEMORY = "the computer's memory does not suffice for it"

DRAWN_ONLY = f"erasing with {NANO_ADAPTERS}, which know drawn pictures only: for photographs name others with --mild"
"""Said where neither base nor adapters are named."""


@dataclass(frozen=True)
class EraseOptions:
    """How the pipeline is run.

    Raises:
        UserError: steps or seed are out of range.
    """

    base: str | None
    """Folder or hub id; None: the base that the parts of ``mild`` were trained on."""
    mild: str | None
    """Folder or hub id; None: the base alone or, where none is named, the adapters that come with the package."""
    steps: int
    seed: int
    """Of the noise of every photograph: a photograph's result does not depend on those beside it."""
    prompt: str
    margin: float
    """How far beyond masks pixels may change: see `mild.erasing.regions.editable`."""

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"--steps {self.steps}: give 1 to {MOST_STEPS}")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"--seed {self.seed}: give 0 to {2**64 - 1}")


@dataclass(frozen=True)
class Job:
    """One photograph and where its results go."""

    name: str
    """By which masks know the photograph."""
    photo: Path
    output: Path
    layers: Path | None

    @property
    def results(self) -> list[Path]:
        """The files that are there when it is done."""
        return [self.output] if self.layers is None else [self.output, self.layers / LAYERS_INDEX]


def erase(
    photos: Sequence[str],
    masks: Sequence[str],
    options: EraseOptions,
    *,
    remove: str | None,
    output: str | None,
    layers: str | None,
    force: bool,
    console: Console,
    complaints: Console,
) -> int:
    """Erase people from photographs and save the results.

    A photograph's result is written whole and after its layers: where it is there, the photograph is done. Several
    photographs can thus be continued: those that are done are passed over.

    Args:
        photos: files, folders and globs.
        masks: files of one photograph's people, or one folder of masks or COCO json for all photographs.
        options: of the pipeline.
        remove: people by number, such as ``1,3``; None for everybody.
        output: file for a single photograph, else a folder; None for beside the photographs.
        layers: folder for the layers; with several photographs, each gets a subfolder of it.
        force: overwrite what is there.
        console: is told where the results are.
        complaints: is told what was set aside or passed over, and shows the progress.

    Returns:
        How many of several photographs were set aside.

    Raises:
        UserError: there is nothing to work on, a result has no place or no room, or the only photograph cannot be used.
        KeyboardInterrupt: the user stopped it; the message says how far it came.
    """
    numbers = None if remove is None else _numbers(remove, "--remove")
    jobs, several = _plan(photos, masks, output, layers)
    rejected: list[Rejection] = []
    finder = _open_masks(masks, jobs, rejected)
    _check_layers(jobs)
    if not several:
        check_free(jobs[0].results, force)
    for folder in sorted({place.parent for job in jobs for place in (job.output, job.layers) if place is not None}):
        check_writable(folder)

    aside = done = 0

    def complain(where: object, what: str) -> None:
        complaints.print(Text(f"{where}: {what}"), soft_wrap=True)

    def how_far() -> str:
        same = "the same command without --force" if force else "the same command"
        return f"{done} of {len(jobs)} photographs are done; {same} goes on with the others"

    def set_aside(job: Job, error: Rejected | UserError) -> None:
        nonlocal aside
        what = error.message if isinstance(error, Rejected) else str(error)
        if not several:
            raise UserError(f"{job.photo}: {what}") from None
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in NO_ROOM:
            raise UserError(f"{job.photo}: {what}: {how_far()}") from None
        complain(job.photo, what)
        aside += 1

    for row in rejected:
        if row.reason != "missing-image":  # a json or folder may well hold masks of more photographs than these
            complain(masks[0], row.message)
    there = {job for job in jobs if several and not force and all(map(exists, job.results))}
    if there:
        done = len(there)
        complaints.print(
            f"{done} of {len(jobs)} photographs have their results already; --force makes them anew",
            soft_wrap=True,
            highlight=False,
        )
    pipeline: MILDPipeline | None = None
    # While the bar is shown, rich sends stdout to the bar's stream; a pipe must not lose it.
    # A single photograph shows the pipeline's own bar, of steps.
    shown = complaints.is_terminal
    bar = Progress(console=complaints, redirect_stdout=console.is_terminal, disable=not (shown and several))
    waiting = [job for job in jobs if job not in there]
    try:
        with bar, without_pillows_limit():
            for job in bar.track(waiting, description="erase"):
                try:
                    _check_names(job)
                    check_free(job.results, force)
                    photograph = read_photograph(job.photo, job.name, finder)
                    for note in photograph.notes:
                        complain(job.photo, note)
                    check_size(photograph.image, job.output)
                    chosen = _chosen(numbers, photograph, job.layers is not None, options.margin)
                    if much := why_much([photograph.people[k] for k in chosen]):
                        complain(job.photo, much)
                except MemoryError:
                    set_aside(job, Rejected("out-of-memory", NO_MEMORY))
                    continue
                except (Rejected, UserError) as error:
                    set_aside(job, error)
                    continue
                if pipeline is None:  # once there is something to erase
                    if options.base is None and options.mild is None:
                        complaints.print(DRAWN_ONLY, soft_wrap=True, highlight=False)
                        options = replace(options, mild=NANO_ADAPTERS)
                    pipeline = _load(options)
                    pipeline.set_progress_bar_config(desc="erase", disable=several or not shown)
                try:
                    lost = _erase_one(pipeline, job, photograph, chosen, options)
                except (Rejected, UserError) as error:
                    set_aside(job, error)
                    continue
                if lost is not None:
                    complain(job.output, lost)
                done += 1
                people = f"{len(chosen)} of {len(photograph.people)} people erased"
                console.print(Text(f"{job.output}: {people}"), soft_wrap=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped: {how_far()}" if several else "stopped: nothing was written") from None
    if aside:
        complaints.print(f"{aside} of {len(jobs)} photographs were set aside", highlight=False)
    return aside


def _numbers(text: str, option: str) -> list[int]:
    """People by number, from 1, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        none = ", or none" if option == "--keep" else ""
        raise UserError(f"{option} {text!r}: give people by number, counted from 1, such as 1,3{none}")
    return list(dict.fromkeys(int(part) for part in parts))


def _check_numbers(numbers: Sequence[int], people: int, option: str) -> None:
    for number in numbers:
        if not 1 <= number <= people:
            there = "there is 1 person" if people == 1 else f"there are {people} people"
            raise UserError(f"{option} {number}: {there}, counted from 1")


def _plan(
    photos: Sequence[str], masks: Sequence[str], output: str | None, layers: str | None
) -> tuple[list[Job], bool]:
    """The photographs, and whether they are to be treated as several: as any folder or glob is."""
    found, several = _find_photos(photos, [Path(text) for text in (*masks, output, layers) if text is not None])
    if several and output is not None and not Path(output).is_dir() and Path(output).suffix.lower() in PHOTO_SUFFIXES:
        raise UserError(f"--output {output} is a file; several photographs need a folder")
    jobs = []
    for name, photo in found.items():
        result = photo.with_name(f"{photo.stem}-erased.png")
        if output is not None and several:
            result = Path(output, name).with_name(result.name)
        elif output is not None:
            result = Path(output, result.name) if Path(output).is_dir() else result_file(output)
        apart = Path(name).with_suffix("") if several else ""
        jobs.append(Job(name, photo, result, None if layers is None else Path(layers, apart)))
    first: dict[Path, Path] = {}
    for job in jobs:
        other = first.setdefault(job.output, job.photo)
        if other != job.photo:
            raise UserError(f"{other} and {job.photo} would both be saved as {job.output}; run them one by one")
    return jobs, several


def _find_photos(given: Sequence[str], others: Sequence[Path]) -> tuple[dict[str, Path], bool]:
    """Photographs by their names: below the folder given, the fixed part of a glob, or the files' common folder.

    Args:
        given: files, folders and globs.
        others: folders of masks and results; where one lies in a folder of photographs, what it holds is none.
    """
    files = [Path(text) for text in given if not Path(text).is_dir() and not _is_glob(text)]
    found = [(_common_folder(files), file) for file in files]
    for text in given:
        if Path(text).is_dir():
            photos = [Path(text, name) for name in files_below(Path(text)) if name.lower().endswith(PHOTO_SUFFIXES)]
            if not photos:
                raise UserError(f"folder {text} holds no photographs ({', '.join(PHOTO_SUFFIXES)})")
            found += [(Path(text), photo) for photo in photos]
        elif _is_glob(text):
            root = Path(*takewhile(lambda part: not _has_magic(part), Path(text).parts))
            matches = [Path(match) for match in _matches(text, root)]
            photos = [path for path in matches if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file()]
            if not photos:
                raise UserError(f"{text} matches no photographs ({', '.join(PHOTO_SUFFIXES)})")
            found += [(root, photo) for photo in photos]
    # What an earlier run left beside its photographs is no photograph to work on.
    results = {photo.with_name(f"{photo.stem}-erased.png") for _, photo in found}
    names: dict[str, Path] = {}
    for root, photo in found:
        if photo in results or any(_is_below(other, root) and _is_below(photo, other) for other in others):
            continue
        name = Path(os.path.relpath(photo, root)).as_posix()
        other = names.setdefault(name, photo)
        if os.path.abspath(other) != os.path.abspath(photo):
            raise UserError(f"{other} and {photo} are both called {name}; give the folder that they have in common")
    return names, len(given) > 1 or len(files) == 0


def _is_below(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(folder)) in Path(os.path.abspath(path)).parents


def _common_folder(files: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([os.path.abspath(file.parent) for file in files])) if files else Path()


def _has_magic(text: str) -> bool:
    return glob.escape(text) != text


def _matches(pattern: str, root: Path) -> list[str]:
    """Paths that match a glob, sorted; ``**`` goes into linked folders, but never round in circles."""
    parts = Path(pattern).parts[len(root.parts) :]
    if "**" not in parts:
        return sorted(glob.glob(pattern))

    def fits(names: Sequence[str], wanted: Sequence[str]) -> bool:
        if not wanted or not names:
            return not names and all(part == "**" for part in wanted)
        if wanted[0] == "**":
            return fits(names, wanted[1:]) or fits(names[1:], wanted)
        return fnmatchcase(names[0], wanted[0]) and fits(names[1:], wanted[1:])

    return [str(root / name) for name in files_below(root) if fits(name.split("/"), parts)]


def _is_glob(text: str) -> bool:
    return _has_magic(text) and not Path(text).exists()


def _open_masks(masks: Sequence[str], jobs: Sequence[Job], rejected: list[Rejection]) -> PhotoMasks:
    place = Place(masks[0])
    if not place.filesystem.exists(place.path):
        raise UserError(f"--mask {masks[0]} does not exist")
    if len(masks) == 1 and place.is_file:
        return open_masks(place, [job.name for job in jobs], rejected)
    if len(masks) == 1 and place.filesystem.isdir(place.path):
        inside = [job.photo for job in jobs if os.path.abspath(job.photo.parent) == os.path.abspath(place.path)]
        if inside:
            raise UserError(f"--mask {masks[0]} is the folder of {inside[0].name}; masks need a folder of their own")
        return open_masks(place, [job.name for job in jobs], rejected)
    if len(jobs) > 1:
        raise UserError(
            f"{len(jobs)} photographs with --mask {masks[0]}: several need one folder of masks, or one COCO json; for "
            "one photograph repeat --mask before each file"
        )
    return NamedMasks(masks)


def _check_layers(jobs: Sequence[Job]) -> None:
    layers = {job.layers: job.photo for job in jobs if job.layers is not None}
    for folder, photo in layers.items():
        if outer := next((above for above in folder.parents if above in layers), None):
            raise UserError(
                f"the layers of {photo} would lie in those of {layers[outer]}, {outer}; erase them one by one"
            )
        if exists(folder) and not folder.is_dir():
            raise UserError(f"--layers {folder} is a file; name a folder")
        if exists(folder) and any(folder.iterdir()) and not (folder / LAYERS_INDEX).is_file():
            # Saving replaces the whole folder.
            raise UserError(f"--layers {folder} holds something else than layers; name a new folder")


def _check_names(job: Job) -> None:
    for place in job.results:
        try:
            os.lstat(place)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise UserError(f"{place}: the file system does not hold names that long; give a shorter one") from None


def _chosen(numbers: Sequence[int] | None, photograph: Photograph, layers: bool, margin: float) -> list[int]:
    """Indices of the people who are to vanish."""
    everybody = list(range(len(photograph.people)))
    try:
        _check_numbers(numbers or [], len(everybody) + len(photograph.unusable), "--remove")
    except UserError as error:
        raise Rejected("no-such-person", str(error)) from None
    for number, why in photograph.unusable.items():
        if layers or number in (numbers or []):
            option = "--layers needs everybody" if layers else f"--remove {number}"
            raise Rejected("unusable-person", f"{option}: person {number} cannot be used: {why}")
    chosen = everybody if numbers is None else [photograph.numbers.index(number) for number in numbers]
    painted = everybody if layers else chosen
    if editable(np.stack(photograph.people), painted, margin).all():
        raise Rejected("nothing-left", "the masks cover the whole picture; leave some background to go by")
    for k in painted:
        if inverted := why_inverted(photograph.people[k]):
            raise Rejected("mask-covers-everything", f"the mask of person {photograph.numbers[k]}: {inverted}")
    return chosen


def _load(options: EraseOptions) -> MILDPipeline:
    with _collector_at_rest():
        import torch

        from mild.erasing.pipeline import MILDPipeline

        base = options.base
        if base is None:
            own = Path(place_of(str(options.mild)))
            base = read_config(own).base if own.is_dir() else SUGGESTED_BASE
        cuda = torch.cuda.is_available()
        pipeline = MILDPipeline.from_pretrained(base, mild=options.mild, dtype=torch.float16 if cuda else torch.float32)
        return pipeline.to("cuda" if cuda else "cpu")


@contextlib.contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Python looks for garbage among all that imports and loading make, again and again, for a fifth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor later: it stays
        gc.enable()


def _erase_one(
    pipeline: MILDPipeline, job: Job, photograph: Photograph, chosen: list[int], options: EraseOptions
) -> str | None:
    """Write the results of one photograph; gives what its owner should know about how they were saved."""
    import torch

    try:
        result = pipeline(
            photograph.image,
            photograph.people,
            chosen,
            prompt=options.prompt,
            layers=job.layers is not None,
            margin=options.margin,
            num_inference_steps=options.steps,
            generator=torch.Generator("cpu").manual_seed(options.seed),
            output_type="np",
        )
    except torch.OutOfMemoryError:
        raise Rejected("out-of-memory", "the GPU's memory does not suffice for it") from None
    except MemoryError:
        raise Rejected("out-of-memory", NO_MEMORY) from None
    data, note = encoded(result.image, job.output, photograph.icc_profile, photograph.metadata)
    if job.layers is not None:
        result.parts.icc_profile, result.parts.metadata = photograph.icc_profile, photograph.metadata
        result.parts.save(job.layers)
    write_result(data, job.output)  # last: where it is, everything is
    return note


def recompose(folder: str, keep: str, output: str, *, force: bool) -> str | None:
    """Put a picture together again from its layers.

    Args:
        folder: of layers.
        keep: people who stay, such as ``1,3``, or ``none``.
        output: file.
        force: overwrite what is there.

    Returns:
        What its owner should know about how it was saved, if anything.

    Raises:
        UserError: the folder holds no layers, there is no such person, or the result has no place.
    """
    numbers = [] if keep == "none" else _numbers(keep, "--keep")
    target = result_file(output)
    check_free([target], force)
    check_writable(target.parent)
    from mild.erasing.layers import LayeredPicture

    with without_pillows_limit():
        picture = LayeredPicture.load(folder)
    _check_numbers(numbers, len(picture.layers), "--keep")
    image = picture.recompose([number - 1 for number in numbers])
    data, note = encoded(image, target, picture.icc_profile, picture.metadata)
    write_result(data, target)
    return note
