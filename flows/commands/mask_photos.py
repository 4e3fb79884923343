"""``mild mask``: a network finds the people in photographs; masks are written, and pictures with people's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from dataset_tools.errors import UserError
from dataset_tools.estimators.choose import choose
from dataset_tools.estimators.photographs import NetworkMasks
from dataset_tools.metadata import Metadata
from dataset_tools.people_sheet import mark_people
from dataset_tools.storage import check_writable
from dataset_tools.written_masks import CocoDocument, encode_index
from flows.commands.batch import Batch
from flows.commands.photo_files import MASK, PEOPLE, find_photos, result_paths
from flows.commands.results import encoded, result_written, write_result


@dataclass(frozen=True)
class Job:
    """One photograph and where its results go."""

    name: str
    """By which a COCO json knows the photograph."""
    photo: Path
    mask: Path | None
    """An index PNG; None where all masks go into one json."""
    people: Path
    """The photograph with its people numbered."""

    @property
    def results(self) -> list[Path]:
        """The files that are there when it is done."""
        return [self.people] if self.mask is None else [self.people, self.mask]


def mask(
    photos: Sequence[str],
    *,
    instances: str | None,
    coco: str | None,
    output: str | None,
    force: bool,
    console: Console,
    complaints: Console,
) -> int:
    """Find the people in photographs and save their masks.

    Args:
        photos: files, folders and globs.
        instances: the network, as `dataset_tools.estimators.choose` takes it; None for what is at hand.
        coco: json for the masks of all photographs, written when all were looked at; None for an index PNG each.
        output: file for a single photograph, else a folder; None for beside the photographs.
        force: overwrite what is there.
        console: is told how many people were found.
        complaints: is told what was set aside or passed over, and shows the progress.

    Returns:
        How many of several photographs were set aside.

    Raises:
        UserError: there is nothing to work on, a result has no place or no room, the only photograph cannot be used, or
            the network cannot.
        KeyboardInterrupt: the user stopped it; the message says how far it came.
    """
    document = None if coco is None else Path(coco)
    if document is not None and document.suffix.lower() != ".json":
        raise UserError(f"--coco {coco}: name a file that ends in .json")
    jobs, several = _plan(photos, document, output, complaints)
    finder = NetworkMasks(choose("instances", instances).open(), {job.name: job.photo for job in jobs})
    for folder in sorted({result.parent for job in jobs for result in job.results}):
        check_writable(folder)
    if document is not None:
        check_writable(document.parent)
    batch = Batch(
        jobs, several=several, force=force, verb="mask", console=console, complaints=complaints, in_one=document
    )
    if not batch.waiting:
        return 0
    finder.network.check()
    by = f"found by {finder.network.made_by.network}"
    people = CocoDocument(f"people {by}")
    with batch.at_work() as waiting:
        for job in waiting:
            scores = batch.attempt(job, partial(_mask_one, job, finder, people))
            if scores is None:
                continue
            who = "1 person, score" if len(scores) == 1 else f"{len(scores)} people, scores"
            batch.finish(f"{job.mask or job.photo}: {who} {', '.join(f'{score:.2f}' for score in scores)}, {by}")
        if document is not None and batch.done:
            write_result(people.encode(), document)
            photographs = "1 photograph" if batch.done == 1 else f"{batch.done} photographs"
            batch.tell(f"{document}: the people of {photographs}")
    return batch.aside


def _plan(
    photos: Sequence[str], document: Path | None, output: str | None, complaints: Console
) -> tuple[list[Job], bool]:
    """The photographs, and whether they are to be treated as several."""
    others = [] if output is None else [output]
    found, several = find_photos(photos, others, complaints)
    if document is not None:
        people = result_paths(found, several, PEOPLE, output)
        return [Job(name, photo, None, people[name]) for name, photo in found.items()], several
    jobs = []
    for name, mask in result_paths(found, several, MASK, output).items():
        if mask.suffix.lower() != ".png":
            raise UserError(f"--output {mask}: masks are saved as PNG; name a file that ends in .png")
        jobs.append(Job(name, found[name], mask, mask.with_name(found[name].stem + PEOPLE)))
    return jobs, several


def _mask_one(job: Job, finder: NetworkMasks, people: CocoDocument) -> list[float]:
    """Write the results of one photograph; gives the scores of its people. Raises `Rejected` or `UserError`."""
    found = finder.look(job.name)
    marked, _ = encoded(mark_people(found.picture, found.people.masks), job.people, None, Metadata())
    if job.mask is None:
        write_result(marked, job.people)
        people.add(job.name, found.masks(), found.size, found.people.scores)
    else:
        index = encode_index(found.masks(), found.size)
        with result_written(index, job.mask):  # where it is, everything is
            write_result(marked, job.people)
    return found.people.scores
