"""Human selection of clean plates (appendix A): what is to be decided, what reviewers decided, what follows from it.

Several methods each propose a picture without the people; reviewers pick one of the proposals, or none, without knowing
whose it is. Who decided what is in one database (`DECISIONS`) alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dataset_tools.errors import UserError
from dataset_tools.schema import Split
from dataset_tools.settings import Settings, digest_of
from mild.evaluation.page import opened
from mild.evaluation.ratings import krippendorff_alpha
from mild.evaluation.settings import AnyMethod, named_kinds

DECISIONS = "decisions.sqlite"
"""In `mild.evaluation.pairs.folder_beside` the output."""
TABLE = (
    "decisions (number INTEGER PRIMARY KEY AUTOINCREMENT, reviewer TEXT, item TEXT, choice TEXT, "
    "UNIQUE (reviewer, item))"
)
REVIEW = "review.json"
"""A `Review`, below the work folder."""
NONE = ""
"""The choice of none of the proposals."""
MOST = 9
"""Proposals that keys can name."""


class ReviewSettings(Settings):
    """Which pictures get clean plates, which methods propose them, and when one is chosen."""

    configuration: Literal["real", "paired"] = "real"
    """Of the dataset. The clean plates that ``paired`` has already are not looked at. Not ``composite``: a pair credits
    one picture, and a composite is made of several."""
    samples: dict[Split, Annotated[int, Field(ge=1)] | None] = Field(
        {"train": None, "validation": None, "test": None}, min_length=1
    )
    """How many pictures are drawn of each split; null: all. Pairs stay in their splits."""
    categories: tuple[str, ...] = ()
    """What is to vanish, as `mild.evaluation.settings.DatasetSettings.categories`."""
    methods: tuple[AnyMethod, ...] = Field(
        default_factory=lambda: named_kinds(["smooth-fill", "telea", "navier-stokes", "base", "mild"]),
        min_length=1,
        max_length=MOST,
        validate_default=True,
    )
    """Which propose, as in an evaluation. Where several propose the very same picture, the first of them is named."""
    inference_steps: int = Field(25, ge=1, le=1000)
    """Denoising steps of diffusion methods that do not set their own."""
    prompt: str = ""
    """What the holes show, for methods that take text."""
    base: str = ""
    """Folder, hub id or bundled name of the SDXL inpainting base; empty: that of the adapters."""
    seed: int = Field(0, ge=0)
    """Decides which pictures are drawn, the noise of each, and each reviewer's order."""
    reviewers: int = Field(1, ge=1)
    """How many have to decide about each picture; more may."""
    agreement: float = Field(0.5, ge=0.5, lt=1)
    """A plate is chosen where more than this share of those who decided picked it: 0.5 is the majority, 0.99 everybody;
    a tie chooses none."""
    wait_hours: float = Field(24.0, ge=0)
    """How long a run of the command line waits for decisions; 0: not at all, it ends and says what to do. That of a
    deployment is suspended instead, for as long as it takes."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds that a step may take, such as erasing everybody in the pictures of one shard by one method. One that
    takes longer is ended and tried again, twice; then the run fails. Null: any time."""

    @field_validator("methods", mode="before")
    @classmethod
    def _kinds(cls, value: Any) -> Any:
        return named_kinds(value)

    @model_validator(mode="after")
    def _no_name_twice(self) -> ReviewSettings:
        names = [method.name for method in self.methods]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"methods: {twice[0]} is named twice; give one of them another name")
        return self


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Picture(_Part):
    file: str
    """PNG, below the work folder."""
    sha256: str
    """Of the file."""


class Proposal(_Picture):
    """A clean plate that a method proposes; decisions name it by its sha256."""

    method: str
    """Its name in the recipe."""


class Item(_Picture):
    """A picture to decide about."""

    key: str
    """Of the sample."""
    split: Split
    proposals: tuple[Proposal, ...]
    """In the order of the recipe's methods, each picture once."""

    @cached_property
    def id(self) -> str:
        """Digest of all that is shown: decisions belong to pictures, and to the choice that there was."""
        return digest_of([self.sha256, sorted(proposal.sha256 for proposal in self.proposals)])


class Review(_Part):
    """All that is to be decided. Written by the flow ``select-plates``, read by the page."""

    seed: int
    reviewers: int
    agreement: float
    items: tuple[Item, ...]

    @classmethod
    def read(cls, work: Path) -> Review:
        """Of a work folder. Raises `UserError` where there is none."""
        try:
            return cls.model_validate_json((work / REVIEW).read_bytes())
        except OSError:
            raise UserError(
                f"{work} holds no {REVIEW}: there is nothing to decide yet; name the --output of mild select"
            ) from None
        except ValidationError:
            raise UserError(f"{work / REVIEW} is of another version: run mild select again") from None


class Outcome(_Part):
    """What follows from all decisions so far."""

    plates: dict[str, Proposal]
    """Chosen ones by the item's id."""
    none: int
    """Pictures of which no plate is chosen."""
    undecided: int
    """Pictures about which fewer have decided than are needed."""
    reviewers: int
    """Who have decided about anything."""
    shared: int
    """Pictures about which two at least decided."""
    same: float | None
    """Share of pairs of reviewers of one picture who chose the same, mean over the shared ones; None without any."""
    alpha: float | None
    """Krippendorff's alpha of the methods that were picked, none as well, as nominal data; None where it is not
    defined."""
    alpha_not_computed: str
    """Why; empty where it was."""

    def sentences(self) -> list[str]:
        """For people to read; names nobody and no method."""
        agreed = "alpha not computed: " + self.alpha_not_computed if self.alpha is None else f"alpha {self.alpha:.2f}"
        lines = [f"plates chosen: {len(self.plates)}, pictures without: {self.none}, undecided: {self.undecided}"]
        if self.same is not None:
            lines.append(
                f"agreement of {self.reviewers} reviewers on {self.shared} pictures: the same choice in "
                f"{100 * self.same:.0f} % of pairs, Krippendorff's {agreed}"
            )
        return lines


class Decisions:
    """The database of who decided what.

    Args:
        folder: where it lies; made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._place = folder / DECISIONS
        with opened(self._place, TABLE):
            pass

    def of(self, reviewer: str) -> dict[str, str]:
        """A reviewer's choices by item, the last one last."""
        with opened(self._place, TABLE) as database:
            query = "SELECT item, choice FROM decisions WHERE reviewer = ? ORDER BY number"
            return dict(database.execute(query, (reviewer,)).fetchall())

    def decide(self, reviewer: str, item: str, choice: str) -> None:
        """Keep a choice; it takes the place of an earlier one."""
        with opened(self._place, TABLE) as database, database:
            database.execute(
                "INSERT OR REPLACE INTO decisions (reviewer, item, choice) VALUES (?, ?, ?)", (reviewer, item, choice)
            )

    def take_back(self, reviewer: str, item: str) -> None:
        """Forget a choice."""
        with opened(self._place, TABLE) as database, database:
            database.execute("DELETE FROM decisions WHERE reviewer = ? AND item = ?", (reviewer, item))

    def outcome(self, review: Review) -> Outcome:
        """What follows of them for these items; those about others do not count."""
        with opened(self._place, TABLE) as database:
            rows = database.execute("SELECT item, reviewer, choice FROM decisions ORDER BY item, reviewer").fetchall()
        votes: dict[str, dict[str, str]] = defaultdict(dict)
        for item, reviewer, choice in rows:
            votes[item][reviewer] = choice
        return _outcome(review, {item.id: votes[item.id] for item in review.items if item.id in votes})


def _outcome(review: Review, votes: Mapping[str, Mapping[str, str]]) -> Outcome:
    plates, undecided = {}, 0
    for item in review.items:
        choices = list(votes.get(item.id, {}).values())
        if len(choices) < review.reviewers:
            undecided += 1
            continue
        (picked, count), *_ = Counter(choices).most_common(1)
        if count > review.agreement * len(choices) and picked != NONE:
            (plates[item.id],) = [proposal for proposal in item.proposals if proposal.sha256 == picked]
    shared = [item for item in review.items if len(votes.get(item.id, {})) > 1]
    alpha, why = _alpha(shared, votes)
    return Outcome(
        plates=plates,
        none=len(review.items) - undecided - len(plates),
        undecided=undecided,
        reviewers=len({reviewer for own in votes.values() for reviewer in own}),
        shared=len(shared),
        same=float(np.mean([_same(list(votes[item.id].values())) for item in shared])) if shared else None,
        alpha=alpha,
        alpha_not_computed=why,
    )


def _same(choices: Sequence[str]) -> float:
    """Share of pairs of two that chose the same."""
    count = len(choices)
    pairs = sum(same * (same - 1) for same in Counter(choices).values())
    return pairs / (count * (count - 1))


def _alpha(shared: Sequence[Item], votes: Mapping[str, Mapping[str, str]]) -> tuple[float | None, str]:
    if not shared:
        return None, "no picture was decided by two reviewers"
    methods = sorted({proposal.method for item in shared for proposal in item.proposals})
    who = sorted({reviewer for item in shared for reviewer in votes[item.id]})
    values = np.full((len(who), len(shared)), np.nan)
    for column, item in enumerate(shared):
        number = {proposal.sha256: 1 + methods.index(proposal.method) for proposal in item.proposals} | {NONE: 0}
        for reviewer, choice in votes[item.id].items():
            values[who.index(reviewer), column] = number[choice]
    return krippendorff_alpha(values, "nominal")
