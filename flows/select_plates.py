"""The flow ``select-plates``: methods propose clean plates, people choose, and what they chose becomes a list of pairs.

``build-dataset`` makes ``paired`` of that list (source ``pairs``).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from prefect import flow
from prefect.exceptions import FlowPauseTimeout
from pydantic import BaseModel, ConfigDict
from rich.console import Console

from dataset_tools.errors import UserError
from dataset_tools.estimators.network import unload_networks
from dataset_tools.folders import check_replaceable, folder_written_whole
from dataset_tools.pair_list import PAIR_LIST, PairRow, pair_list
from dataset_tools.schema import MadeBy, Sample, encode_png
from dataset_tools.settings import digest_of
from dataset_tools.shards import ShardDataset, read_manifest
from dataset_tools.storage import check_writable, local_place, write_bytes
from dataset_tools.storage_options import public_place
from flows.caching import Files, Job, Outcome, cached_step, result_storage, run_steps
from flows.evaluation_steps import (
    CasesJob,
    EraseJob,
    PlannedJob,
    cases_jobs,
    erase,
    forget_methods,
    prepare_cases,
    setup_of,
)
from flows.names import artifact_key, flow_run_name
from flows.output_lock import sole_run
from flows.progress import Progress
from flows.settings import Threads
from flows.waiting import is_suspended_while_waiting, wait_for_people
from mild.bases import normal_name
from mild.evaluation.cases import goes, read_rows
from mild.evaluation.pairs import folder_beside
from mild.evaluation.review import REVIEW, Decisions, Item, Proposal, Review, ReviewSettings
from mild.evaluation.settings import DatasetSettings
from mild.model.saved import fetched, read_config

OWN = r"pairs\.jsonl|pictures"
"""What is in the output."""
WORKERS = 2
"""Shards that are prepared at once; methods run one after another."""


@flow(name="select-plates", flow_run_name=flow_run_name, persist_result=False, task_runner=Threads(max_workers=WORKERS))  # type: ignore[arg-type]
def select_plates(
    settings: ReviewSettings | str, dataset: str, adapters: str, output: str, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Propose clean plates, wait until people have chosen (``mild review``), write the chosen ones as a list of pairs.

    A run of the command line pauses; one of a deployment is suspended, which frees its worker, and begins anew when it
    is resumed; what was proposed is not proposed again. Resumed by hand on Prefect's page it goes on with what is
    decided by then.

    Args:
        settings: `ReviewSettings`, or the place of a YAML file of them.
        dataset: folder or URL of a built dataset.
        adapters: folder that the flow ``train`` wrote, or hub id; empty: none.
        output: local folder of ``pairs.jsonl`` and its pictures; decisions lie beside it.
        changes: settings to change, dotted name to value.

    Returns:
        ``pairs`` (path), ``chosen``, ``none``, ``undecided`` and ``without_proposal`` (numbers of pictures),
        ``methods`` (how many plates of each were chosen), ``not_run`` (method to reason), ``told`` (sentences on the
        outcome), ``steps`` and ``cached``.

    Raises:
        UserError: settings, dataset, adapters or output cannot be used, no method can be run, nobody decided in time,
            or no plate was chosen.
    """
    recipe = check_select_plates(settings, dataset, adapters, output, changes)
    root = local_place(output, "pairs")
    run = _Selection(recipe, public_place(dataset, "dataset"), normal_name(adapters) if adapters else "", root)
    with sole_run(root):
        try:
            run.propose()
        finally:
            forget_methods()
            unload_networks()
    # The output is nobody's while people decide.
    run.wait()
    with sole_run(root):
        return run.write()


def check_select_plates(
    settings: ReviewSettings | str, dataset: str, adapters: str, output: str, changes: dict[str, Any] | None = None
) -> ReviewSettings:
    """The settings, where they, dataset, adapters and output can be used; leaves nothing behind.

    Raises:
        UserError: they cannot.
    """
    recipe = ReviewSettings.load(settings, changes)
    held = read_manifest(public_place(dataset, "dataset")).shards
    asked = [f"{recipe.configuration}/{split}" for split in recipe.samples]
    there = [f"{configuration}/{split}" for configuration, splits in held.items() for split in splits]
    if not set(asked) & set(there):
        raise UserError(f"{dataset} holds none of {', '.join(asked)}; set configuration or samples: {', '.join(there)}")
    if adapters:
        read_config(fetched(adapters))
    root = local_place(output, "pairs")
    check_writable(root)
    check_replaceable(root, PAIR_LIST, OWN)
    return recipe


class _Plan(BaseModel):
    """What the last step writes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cases: tuple[CasesJob, ...]
    items: tuple[Item, ...]
    """Those that a plate was chosen of."""
    plates: dict[str, Proposal]
    """By the item's id."""
    makers: dict[str, MadeBy]
    """By method."""


class PairsJob(PlannedJob):
    """The chosen plates as a list of pairs: everything that stands at the output, on a `_Plan`."""

    step: ClassVar[str] = "write-pairs"
    version: ClassVar[int] = 1
    packages: ClassVar[tuple[str, ...]] = ("numpy", "pillow")


@cached_step
def write_pairs(job: PairsJob) -> Files:
    """Write the list and its pictures, whole."""
    plan = _Plan.model_validate_json(Path(job.work, job.plan).read_bytes())
    items = {(item.split, item.key): item for item in plan.items}
    rows = []
    with folder_written_whole(job.root, PAIR_LIST, OWN) as folder:
        for cases in plan.cases:
            held = ShardDataset.of_shards(cases.place, [cases.shard])
            for index in cases.indices:
                item = items.get((cases.settings.split, held.keys[index]))
                if item is None:
                    continue
                sample, plate = held[index], plan.plates[item.id]
                place = folder / "pictures" / item.key
                place.mkdir(parents=True)
                for name, shown in (("image.png", item), ("plate.png", plate)):
                    (place / name).write_bytes(_unaltered(Path(job.work, shown.file), shown.sha256))
                rows.append(_row(sample, cases.settings, plan.makers[plate.method], place))
        (folder / PAIR_LIST).write_bytes(pair_list(rows))
    return Files.of(job, "root", [""], len(rows))


def _unaltered(path: Path, sha256: str) -> bytes:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} is not what was decided about any more: run it again")
    return data


def _row(sample: Sample, settings: DatasetSettings, maker: MadeBy, place: Path) -> PairRow:
    """Its row in the list; writes the masks of those who vanish."""
    people = [person for person in sample.people if goes(person, settings) and person.mask.any()]
    below = f"pictures/{place.name}"
    for number, person in enumerate(people):
        (place / f"person-{number}.png").write_bytes(encode_png(person.mask.astype(np.uint8) * 255))
    origin = next((origin for origin in sample.origins if origin.role == "image"), None)
    credit = ("licence", "author", "author_url", "title", "url", "landing_url")
    return PairRow(
        id=sample.key,
        group=sample.key,
        image=f"{below}/image.png",
        background=f"{below}/plate.png",
        masks=[f"{below}/person-{number}.png" for number in range(len(people))],
        mask_scores=[person.mask_score for person in people],
        masks_by="+".join(sorted({person.mask_by for person in people})),
        plate_by=maker,
        tells_effects=False,  # methods paint into the picture
        split=settings.split,
        caption=sample.caption,
        **({name: getattr(origin, name) for name in credit} if origin else {}),
    )


class _Selection:
    """One run: what is proposed, and what came of it."""

    def __init__(self, recipe: ReviewSettings, dataset: str, adapters: str, root: str) -> None:
        self.recipe, self.dataset, self.root = recipe, dataset, root
        self.setup = setup_of(recipe, adapters)
        self.place = {"root": root, "work": f"{root}.work"}
        self.storage = result_storage(self.place["work"])
        self.steps = self.cached = self.without_proposal = 0
        self.not_run: dict[str, str] = {}
        self.decisions = Decisions(folder_beside(Path(root)))

    def propose(self) -> None:
        """Let all methods work on all pictures, and note what there is to decide."""
        self.cases = self._choose()
        prepared = self._do(prepare_cases, self.cases)
        rows = [read_rows(job.kept_at) for job in self.cases]
        if not any(rows):
            raise UserError("there is nothing to erase in the chosen pictures: name others, or other categories")
        fingerprints = self._fingerprints(
            [(row.key, row.masks, (row.height, row.width)) for own in rows for row in own]
        )
        erased: dict[str, list[Files]] = {}
        for method in self.recipe.methods:
            if method.name in fingerprints:
                jobs = [
                    EraseJob(
                        **self.place,
                        method=method,
                        fingerprint=fingerprints[method.name],
                        setup=self.setup,
                        cases=job,
                        seed=self.recipe.seed,
                    )
                    for job in self.cases
                ]
                erased[method.name] = self._do_here(erase, jobs)
        forget_methods()
        items = []
        for number, job in enumerate(self.cases):
            pictures = _listed(prepared[number])
            results = {name: _listed(files[number]) for name, files in erased.items()}
            for row in rows[number]:
                proposals = _proposals(f"{row.key}/{row.masks}.png", results)
                file, sha256 = pictures[f"{row.key}/before.png"]
                items.append(Item(key=row.key, split=job.settings.split, file=file, sha256=sha256, proposals=proposals))
        self.without_proposal = sum(not item.proposals for item in items)
        recipe = self.recipe
        self.review = Review(
            seed=recipe.seed,
            reviewers=recipe.reviewers,
            agreement=recipe.agreement,
            items=tuple(item for item in items if item.proposals),
        )
        place = Path(self.place["work"], REVIEW)
        write_bytes(LocalFileSystem(), str(place), self.review.model_dump_json(indent=1).encode())

    def wait(self) -> None:
        """Until people have decided. Raises `UserError` where they have not."""
        undecided = self.decisions.outcome(self.review).undecided
        if not undecided:
            return
        each = "a reviewer" if self.recipe.reviewers == 1 else f"{self.recipe.reviewers} reviewers each"
        todo = f"{undecided} of {len(self.review.items)} pictures wait for {each}: mild review {self.root}"
        hours = self.recipe.wait_hours
        if not (hours or is_suspended_while_waiting()):
            raise UserError(f"{todo}; then give this command again")
        Console(stderr=True).print(todo, soft_wrap=True, highlight=False, markup=False)
        try:
            wait_for_people(self.place["work"], hours)
        except FlowPauseTimeout:
            raise UserError(f"nobody has finished in {hours:g} hours; {todo}; then give this command again") from None

    def write(self) -> dict[str, Any]:
        """Write what was chosen; gives the flow's result."""
        outcome = self.decisions.outcome(self.review)
        if not outcome.plates:
            raise UserError(f"no plate was chosen ({'; '.join(outcome.sentences())}): mild review {self.root}")
        makers = {method.name: self._maker(method) for method in self.recipe.methods if method.name not in self.not_run}
        plan = _Plan(
            cases=tuple(self.cases),
            items=tuple(item for item in self.review.items if item.id in outcome.plates),
            plates=outcome.plates,
            makers={name: makers[name] for name in sorted({plate.method for plate in outcome.plates.values()})},
        )
        said = [
            [job.determines() for job in plan.cases],
            [[item.split, item.key, item.sha256] for item in plan.items],
            {id: [plate.method, plate.sha256] for id, plate in plan.plates.items()},
            {name: asdict(maker) for name, maker in plan.makers.items()},
        ]
        self._do(write_pairs, [PairsJob.of(self.place, plan, said)])
        return {
            "pairs": f"{self.root}/{PAIR_LIST}",
            "chosen": len(outcome.plates),
            "none": outcome.none,
            "undecided": outcome.undecided,
            "without_proposal": self.without_proposal,
            "methods": dict(Counter(plate.method for plate in outcome.plates.values()).most_common()),
            "not_run": self.not_run,
            "told": outcome.sentences(),
            "steps": self.steps,
            "cached": self.cached,
        }

    def _choose(self) -> list[CasesJob]:
        """The pictures that are drawn, shard by shard."""
        recipe, jobs = self.recipe, list[CasesJob]()
        there = read_manifest(self.dataset).shards[recipe.configuration]
        for split, samples in recipe.samples.items():
            if split in there:
                held = ShardDataset(self.dataset, recipe.configuration, split)
                settings = DatasetSettings(
                    configuration=recipe.configuration, split=split, categories=recipe.categories
                )
                drawn = np.sort(held.order(recipe.seed, 0)[:samples])
                jobs += cases_jobs(self.place, split, settings, held, drawn)
        return jobs

    def _fingerprints(self, cases: Sequence[tuple[str, str, tuple[int, int]]]) -> dict[str, str]:
        """Of the methods that can be run. Raises `UserError` where none can, or one can be seen to fail."""
        found = {}
        for method in self.recipe.methods:
            if reason := method.missing(self.setup):
                self.not_run[method.name] = reason
            else:
                method.check_cases(self.setup, cases)
                found[method.name] = method.fingerprint(self.setup)
        if not found:
            raise UserError(
                "no method can be run: " + "; ".join(f"{name}: {why}" for name, why in self.not_run.items())
            )
        return found

    def _maker(self, method: Any) -> MadeBy:
        weights = method.weights(self.setup)
        (sha256,) = weights.values() if len(weights) == 1 else [digest_of(weights) if weights else ""]
        return MadeBy("chosen", network=method.name, version=f"mild {version('mild')}", weights=sha256)

    def _do(self, step: Any, jobs: Sequence[Job]) -> list[Files]:
        """Run jobs of one step side by side; those that were done before are not done again."""
        with Progress(artifact_key("select-progress", self.root)) as progress:
            progress.stage(jobs[0].step)
            done = run_steps(step, jobs, self.storage, progress, time_limit=self.recipe.time_limit)
        return self._done(done)

    def _do_here(self, step: Any, jobs: Sequence[Job]) -> list[Files]:
        """The same one after another in this thread, as what fills a GPU must be; machines may set a limit on it."""
        tagged, limit = step.with_options(tags=["gpu"]), self.recipe.time_limit
        return self._done(run_steps(tagged, jobs, self.storage, in_this_thread=True, time_limit=limit))

    def _done(self, outcomes: Sequence[Outcome[Any]]) -> list[Files]:
        self.steps += len(outcomes)
        self.cached += sum(outcome.cached for outcome in outcomes)
        return [outcome.result for outcome in outcomes]


def _proposals(name: str, results: dict[str, dict[str, tuple[str, str]]]) -> tuple[Proposal, ...]:
    """What methods made of a picture, each picture once; those that failed propose nothing."""
    found: dict[str, Proposal] = {}
    for method, files in results.items():
        if name in files:
            file, sha256 = files[name]
            found.setdefault(sha256, Proposal(method=method, file=file, sha256=sha256))
    return tuple(found.values())


def _listed(files: Files) -> dict[str, tuple[str, str]]:
    """Path below the work folder, and sha256, of each file in a step's folder, by its path in that folder."""
    return {path.partition("/")[2]: (path, file.sha256) for path, file in files.files.items()}
