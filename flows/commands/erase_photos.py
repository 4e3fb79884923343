"""``mild erase`` and ``mild recompose``: who is in the photographs and who of them vanishes; then the pipeline on each.

No Prefect here: a person with a photograph should not wait for a server.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

import cv2
import numpy as np
from rich.console import Console
from rich.text import Text

from dataset_tools.errors import Rejected, UserError
from dataset_tools.estimators import Estimator
from dataset_tools.estimators.choose import Cue, choose, not_at_hand
from dataset_tools.estimators.photographs import CueNetworks, Cues, NetworkMasks
from dataset_tools.folders import why_foreign
from dataset_tools.images import without_pillows_limit
from dataset_tools.masks import why_inverted, why_much
from dataset_tools.photo_masks import NamedMasks, PhotoMasks, Place, open_masks
from dataset_tools.photographs import Photograph, read_photograph
from dataset_tools.records import Rejection
from dataset_tools.storage import check_writable
from dataset_tools.weights import missing_message
from flows.commands.batch import Batch
from flows.commands.chosen_people import Chosen, check_numbers, parse_numbers
from flows.commands.photo_files import ERASED, find_photos, result_paths
from flows.commands.results import check_free, check_size, encoded, exists, result_file, result_written, write_result
from mild.bases import NANO_ADAPTERS
from mild.erasing.extents import REACH
from mild.erasing.isolation import Protect
from mild.erasing.layers import INDEX as LAYERS_INDEX
from mild.erasing.layers import OWN as OF_LAYERS
from mild.erasing.regions import LARGEST_RESOLUTION, editable
from mild.model.saved import fetched, is_mild, read_config

if TYPE_CHECKING:
    from mild.erasing.pipeline import MILDPipeline

E = TypeVar("E", bound=Estimator)

MOST_STEPS = 1000
"""All that there are in the noise schedule of SDXL."""

DRAWN_ONLY = f"erasing with {NANO_ADAPTERS}, which know drawn pictures only: for photographs name others with --mild"
"""Said where neither base nor adapters are named."""


@dataclass(frozen=True)
class EraseOptions:
    """How the pipeline is run, and which networks look at the photographs before.

    Raises:
        UserError: steps or seed are out of range.
    """

    base: str | None
    """Folder or hub id; None: the base that the parts of ``mild`` were trained on."""
    mild: str | None
    """Folder or hub id; None: the base alone or, where none is named, the adapters that come with the package."""
    steps: int | None
    """Denoising steps; None: as many as the parts of ``mild`` are meant for."""
    seed: int
    """Of the noise of every photograph: a photograph's result does not depend on those beside it."""
    prompt: str | None
    """What is to be seen where people were; None: what the parts of ``mild`` were trained on."""
    margin: float
    """How far beyond masks pixels may change: see `mild.erasing.regions.editable`."""
    instances: str | None = None
    """The network that finds people where there are no masks; see `dataset_tools.estimators.choose`, as for the others:
    None for what is at hand."""
    pose: str | None = None
    """The network that finds joints, for parts of ``mild`` that were trained with them."""
    parsing: str | None = None
    """The network that labels body parts, likewise."""
    protect: Protect | None = None
    """What of those who stay is never painted over: see `mild.erasing.isolation`."""
    extents: str | None = None
    """How far the model is followed beyond masks: ``reach`` of `mild.erasing.pipeline`, or ``off``; None: as usual."""
    resolution: int | None = None
    """Pixels of the side of the square that windows are worked on at; None: what the model is meant for."""

    @property
    def reach(self) -> float | None:
        """What ``extents`` says, as a number; None: masks alone say what is painted."""
        return None if self.extents == "off" else REACH if self.extents is None else float(self.extents)

    def __post_init__(self) -> None:
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"--steps {self.steps}: give 1 to {MOST_STEPS}")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"--seed {self.seed}: give 0 to {2**64 - 1}")
        if self.protect not in (None, *get_args(Protect)):
            raise UserError(f"--protect {self.protect}: give faces or people")
        try:
            given = self.reach
        except ValueError:
            given = -1
        if given is not None and not 0 <= given < math.inf:
            raise UserError(f"--extents {self.extents}: give off, or a share such as 2")
        if self.resolution is not None and not 1 <= self.resolution <= LARGEST_RESOLUTION:
            raise UserError(f"--resolution {self.resolution}: give pixels, 1 to {LARGEST_RESOLUTION}")


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
    chosen: Chosen,
    *,
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
        masks: files of one photograph's people, or one folder of masks or COCO json for all photographs; none: a
            network finds the people.
        options: of the pipeline and the networks.
        chosen: who vanishes.
        output: file for a single photograph, else a folder; None for beside the photographs.
        layers: folder for the layers; with several photographs, each gets a subfolder of it.
        force: overwrite what is there.
        console: is told where the results are.
        complaints: is told what was set aside or passed over, and shows the progress.

    Returns:
        How many of several photographs were set aside.

    Raises:
        UserError: there is nothing to work on, a result has no place or no room, the only photograph cannot be used, or
            a network cannot.
        KeyboardInterrupt: the user stopped it; the message says how far it came.
    """
    if options.mild is None and options.base is not None and is_mild(options.base):
        options = replace(options, base=None, mild=options.base)
    drawn_only = options.base is None and options.mild is None
    if drawn_only:
        options = replace(options, mild=NANO_ADAPTERS)
    jobs, several = _plan(photos, masks, output, layers, complaints)
    rejected: list[Rejection] = []
    finder = _open_masks(masks, jobs, rejected) if masks else _find_masks(options, jobs)
    _check_layers(jobs)
    for folder in sorted({place.parent for job in jobs for place in (job.output, job.layers) if place is not None}):
        check_writable(folder)
    batch = Batch(jobs, several=several, force=force, verb="erase", console=console, complaints=complaints)
    for row in rejected:
        if row.reason != "missing-image":  # a json or folder may well hold masks of more photographs than these
            batch.complain(masks[0], row.message)
    if not batch.waiting:
        return 0
    by = ""
    if isinstance(finder, NetworkMasks):
        finder.network.check()
        by = f", found by {finder.network.made_by.network}"
    networks = _cue_networks(options, complaints)
    pipeline: MILDPipeline | None = None
    with batch.at_work() as waiting:
        for job in waiting:
            ready = batch.attempt(job, partial(_ready, job, finder, networks, chosen, options, batch.complain))
            if ready is None:
                continue
            if pipeline is None:  # once there is something to erase
                if drawn_only:
                    complaints.print(DRAWN_ONLY, soft_wrap=True, highlight=False)
                pipeline = _load(options)
                pipeline.set_progress_bar_config(desc="erase", disable=several or not complaints.is_terminal)
            lost = batch.attempt(job, partial(_erase_one, pipeline, job, ready, options))
            if lost is None:
                continue
            for what in lost:
                batch.complain(job.output, what)
            erased = f"{len(ready.chosen)} of {len(ready.photograph.people)} people erased"
            batch.finish(f"{job.output}: {erased}{by}")
    return batch.aside


def _plan(
    photos: Sequence[str], masks: Sequence[str], output: str | None, layers: str | None, complaints: Console
) -> tuple[list[Job], bool]:
    """The photographs, and whether they are to be treated as several."""
    others = [text for text in (*masks, output, layers) if text is not None]
    found, several = find_photos(photos, others, complaints)
    results = result_paths(found, several, ERASED, output)
    jobs = []
    for name, photo in found.items():
        apart = Path(name).with_suffix("") if several else ""
        jobs.append(Job(name, photo, results[name], None if layers is None else Path(layers, apart)))
    return jobs, several


def _find_masks(options: EraseOptions, jobs: Sequence[Job]) -> NetworkMasks:
    why = "without --mask, a network has to find the people"
    if options.instances is None and not_at_hand(["instances"]):
        # Whoever fetches one network will want those that are missed next.
        cues: list[Cue] = ["pose", "parsing"] if _wants_cues(options) and options.mild != NANO_ADAPTERS else []
        raise UserError(f"{why}: {missing_message(not_at_hand(['instances', *cues]))}")
    try:
        network = choose("instances", options.instances).open()
    except UserError as error:
        raise UserError(f"{why}: {error}") from None
    return NetworkMasks(network, {job.name: job.photo for job in jobs})


def _wants_cues(options: EraseOptions) -> bool:
    """Whether the adapters were trained with pose and parsing."""
    return options.mild is not None and read_config(fetched(options.mild)).mild.hmg is not None


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


def check_outside_layers(output: Path, layers: Iterable[Path]) -> None:
    """Raise `UserError` where a result would lie in a folder of layers, among which it would be one or be replaced."""
    place = Path(os.path.realpath(output))
    for folder in layers:
        if Path(os.path.realpath(folder)) in place.parents:
            raise UserError(f"{output} would lie in the folder of layers {folder}; name another file")


def _check_layers(jobs: Sequence[Job]) -> None:
    layers = dict[Path, Path]()
    for job in jobs:
        if job.layers is not None and (other := layers.setdefault(job.layers, job.photo)) != job.photo:
            raise UserError(
                f"{other} and {job.photo} would both have their layers in {job.layers}; erase them one by one"
            )
    for job in jobs:
        check_outside_layers(job.output, layers)
    for folder, photo in layers.items():
        if outer := next((above for above in folder.parents if above in layers), None):
            raise UserError(
                f"the layers of {photo} would lie in those of {layers[outer]}, {outer}; erase them one by one"
            )
        if exists(folder) and not folder.is_dir():
            raise UserError(f"--layers {folder} is a file; name a folder")
        if foreign := why_foreign(folder, LAYERS_INDEX, OF_LAYERS):
            # Saving replaces the whole folder.
            raise UserError(f"--layers {folder} holds something else than layers, {foreign}; name a new folder")


def _cue_networks(options: EraseOptions, complaints: Console) -> CueNetworks:
    """The networks that show the model what it was shown in training; says which of them are not here.

    Raises:
        UserError: one that was named cannot be used.
    """
    if not _wants_cues(options) and options.protect != "faces":
        for cue, name in (("pose", options.pose), ("parsing", options.parsing)):
            if name is not None:
                model = options.mild or options.base
                raise UserError(f"--{cue} {name}: {model} was trained without such cues (HMG); leave it out")
        return CueNetworks()

    def usable(cue: str, name: str | None, opened: Callable[[], E]) -> E | None:
        try:
            network = opened()
            network.check()
        except UserError as error:
            if name is not None:
                raise UserError(f"--{cue}: {error}") from None
            if options.mild != NANO_ADAPTERS and _wants_cues(options):
                complaints.print(Text(f"without {cue}, which {options.mild} was trained with: {error}"), soft_wrap=True)
            return None
        return network

    networks = CueNetworks(
        usable("pose", options.pose, lambda: choose("pose", options.pose).open()),
        usable("parsing", options.parsing, lambda: choose("parsing", options.parsing).open()),
    )
    if options.protect == "faces" and networks == CueNetworks():
        raise UserError(
            "--protect faces: a network has to find them, and none is here: name one with --pose or --parsing, or mild "
            "weights pull one that mild weights list names for either"
        )
    return networks


@dataclass(eq=False)
class _Ready:
    """A photograph that can be given to the pipeline."""

    photograph: Photograph
    chosen: list[int]
    cues: Cues


def _ready(
    job: Job,
    finder: PhotoMasks,
    networks: CueNetworks,
    chosen: Chosen,
    options: EraseOptions,
    complain: Callable[[object, str], None],
) -> _Ready:
    """Read a photograph, and look who is in it. Raises `Rejected` or `UserError`."""
    try:
        photograph = read_photograph(job.photo, job.name, finder)
    except Rejected as error:
        if error.reason == "nobody-found":
            raise Rejected(error.reason, f"{error.message}; say where people are with --mask") from None
        raise
    for note in photograph.notes:
        complain(job.photo, note)
    check_size(photograph.image, job.output)
    wanted = chosen.among(photograph)
    _check_people(wanted, photograph, job.layers is not None, options.margin)
    if much := why_much([photograph.people[k] for k in wanted]):
        complain(job.photo, much)
    cues = networks.look(photograph)
    for note in cues.notes:
        complain(job.photo, note)
    return _Ready(photograph, wanted, cues)


def _check_people(chosen: Sequence[int], photograph: Photograph, layers: bool, margin: float) -> None:
    """Raise `Rejected` where the people who are to be painted out cannot be."""
    if layers and photograph.unusable:
        number, why = next(iter(photograph.unusable.items()))
        raise Rejected("unusable-person", f"--layers needs everybody: person {number} cannot be used: {why}")
    painted = range(len(photograph.people)) if layers else chosen
    if editable(np.stack(photograph.people), painted, margin).all():
        raise Rejected("nothing-left", "the masks cover the whole picture; leave some background to go by")
    for k in painted:
        if inverted := why_inverted(photograph.people[k]):
            raise Rejected("mask-covers-everything", f"the mask of person {photograph.numbers[k]}: {inverted}")


def _load(options: EraseOptions) -> MILDPipeline:
    with _collector_at_rest():
        import torch

        from mild.erasing.pipeline import MILDPipeline

        cuda = torch.cuda.is_available()
        precision = torch.float16 if cuda else torch.float32
        if options.base is None:
            assert options.mild is not None
            pipeline = MILDPipeline.from_pretrained(options.mild, dtype=precision)
        else:
            pipeline = MILDPipeline.from_pretrained(options.base, mild=options.mild, dtype=precision)
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


def _erase_one(pipeline: MILDPipeline, job: Job, ready: _Ready, options: EraseOptions) -> list[str]:
    """Write the results of one photograph; gives what its owner should know about how they were saved."""
    import torch

    from mild.erasing.photo import MuchGoes, OfPerson

    photograph, cues = ready.photograph, ready.cues
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MuchGoes)  # it was told when the masks were read
            result = pipeline(
                photograph.image,
                photograph.people,
                ready.chosen,
                prompt=options.prompt,
                pose=cues.pose,
                parsing=cues.parsing,
                label_set=cues.label_set,
                layers=job.layers is not None,
                protect=options.protect,
                margin=options.margin,
                reach=options.reach,
                resolution=options.resolution,
                num_inference_steps=options.steps,
                generator=torch.Generator("cpu").manual_seed(options.seed),
                output_type="np",
            )
    except OfPerson as error:
        raise Rejected("not-a-mask", f"person {photograph.numbers[error.person]}{error.what}") from None
    except torch.OutOfMemoryError:
        raise Rejected("out-of-memory", "the GPU's memory does not suffice for it") from None
    except (RuntimeError, cv2.error) as error:
        # Neither has a kind of its own.
        if "DefaultCPUAllocator" in str(error) or getattr(error, "code", 0) == cv2.Error.StsNoMem:
            raise MemoryError from None
        raise
    data, note = encoded(result.image, job.output, photograph.icc_profile, photograph.metadata)
    with result_written(data, job.output):  # where it is, everything is
        if job.layers is not None:
            result.parts.icc_profile, result.parts.metadata = photograph.icc_profile, photograph.metadata
            result.parts.save(job.layers)
    return [] if note is None else [note]


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
    numbers = () if keep == "none" else parse_numbers(keep, "--keep")
    target = result_file(output)
    check_outside_layers(target, [Path(folder)])
    check_free([target], force)
    check_writable(target.parent)
    from mild.erasing.layers import LayeredPicture

    with without_pillows_limit():
        picture = LayeredPicture.load(folder)
    check_numbers(numbers, len(picture.layers), "--keep")
    image = picture.recompose([number - 1 for number in numbers])
    data, note = encoded(image, target, picture.icc_profile, picture.metadata)
    write_result(data, target)
    return note
