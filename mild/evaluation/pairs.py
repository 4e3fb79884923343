"""What is judged by models and by people: pairs of a picture before and what a method made of it (section G.6)."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import Field, ValidationError

from dataset_tools.errors import UserError, one_line
from dataset_tools.settings import Settings
from mild.evaluation.summary import MethodRow, Summary
from mild.seeds import derived_seed

SUMMARY = "summary.json"


class PairsSettings(Settings):
    """Which pairs of an evaluation are judged: the same pictures of every method."""

    dataset: str = ""
    """Of the evaluation's datasets; empty: its first."""
    pairs: int = Field(100, ge=1)
    """Pairs of each method, drawn at random; all where there are fewer. A larger number keeps those of a smaller."""
    seed: int = Field(0, ge=0)
    """Decides which are drawn, and the bootstrap."""
    resamples: int = Field(2000, ge=100)
    """Bootstrap resamples behind each 95 % interval."""


@dataclass(frozen=True)
class Pair:
    """A picture and what a method made of it."""

    dataset: str
    key: str
    masks: str
    """Kind of masks that the method was given."""
    method: str
    before: Path
    result: Path

    @property
    def name(self) -> str:
        """As messages name it."""
        return f"{self.dataset}/{self.key}/{self.masks}/{self.method}"

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of both files: opinions belong to pictures, not to names that another run gives to others."""
        return _digest(self.before.read_bytes(), self.result.read_bytes())


@dataclass(frozen=True)
class Opinion:
    """What one of those who judge thinks of a pair."""

    digest: str
    """Of the pair."""
    by: str
    """Name of a rater, or order in which a model saw the pair."""
    score: float
    """1 to 10."""
    success: bool


@dataclass(frozen=True)
class DrawnPairs:
    """Pairs of one dataset: of each method those of the same pictures and masks."""

    dataset: str
    methods: list[MethodRow]
    """Those that have results, in the order of tables."""
    pairs: list[Pair]
    """Picture by picture, each with all methods."""


def draw_pairs(evaluation: Path, settings: PairsSettings) -> DrawnPairs:
    """Draw from an evaluation's folder, as the flow ``evaluate`` writes it.

    Raises:
        UserError: it is none, it has no such dataset, or there is no picture that every method has a result for.
    """
    try:
        summary = Summary.model_validate_json((evaluation / SUMMARY).read_bytes())
    except OSError:
        raise UserError(f"{evaluation} holds no {SUMMARY}: name a folder that mild evaluate wrote") from None
    except ValidationError as error:
        what = error.errors(include_url=False)[0]
        where = ".".join(map(str, what["loc"])) or "it"
        raise UserError(f"{evaluation / SUMMARY}: {where}: {what['msg']}; evaluate again") from None
    names = [dataset.name for dataset in summary.datasets]
    dataset = settings.dataset or names[0]
    if dataset not in names:
        raise UserError(f"dataset {dataset!r} is none of {evaluation}: {', '.join(names)}")
    found = list_pairs(evaluation, dataset, [method.name for method in summary.methods])
    present = {pair.method for pair in found}
    drawn = draw(found, settings.pairs, settings.seed)
    if not drawn:
        raise UserError(f"{evaluation}: dataset {dataset} has no picture that all of its methods have a result for")
    return DrawnPairs(dataset, [method for method in summary.methods if method.name in present], drawn)


def list_pairs(evaluation: Path, dataset: str, methods: Sequence[str]) -> list[Pair]:
    """The pairs of one dataset in ``pictures/DATASET/KEY/before.png`` and ``.../KEY/MASKS/METHOD.png``."""
    return [
        Pair(dataset, before.parent.name, masks.name, method, before, result)
        for before in sorted((evaluation / "pictures" / dataset).glob("*/before.png"))
        for masks in sorted(place for place in before.parent.iterdir() if place.is_dir())
        for method in methods
        if (result := masks / f"{method}.png").is_file()
    ]


def draw(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """``count`` pictures, each with one kind of masks, with the pairs of all methods; those that a method lacks are
    never drawn. What is drawn first does not depend on ``count``."""
    cases: dict[tuple[str, str, str], list[Pair]] = {}
    for pair in pairs:
        cases.setdefault((pair.dataset, pair.key, pair.masks), []).append(pair)
    methods = {pair.method for pair in pairs}
    whole = [case for case, held in cases.items() if len(held) == len(methods)]
    chosen = sorted(whole, key=lambda case: derived_seed(seed, "pairs", *case))[:count]
    return [pair for case in chosen for pair in cases[case]]


def read_pair(pair: Pair) -> tuple[bytes, bytes]:
    """The files of both pictures, before and result.

    Raises:
        UserError: they are not there any more, or others than the pair's digest says.
    """
    try:
        before, result = pair.before.read_bytes(), pair.result.read_bytes()
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; start again when the evaluation is complete") from None
    if _digest(before, result) != pair.digest:
        raise UserError(f"the pictures of {pair.name} have changed; start again")
    return before, result


def blind_png(data: bytes, longest_side: int | None = None) -> bytes:
    """A picture file as PNG that holds RGB pixels alone: what else a file says could give its method away.

    Args:
        longest_side: in pixels; larger pictures are shrunk to it.

    Raises:
        UserError: it is no picture, or damaged.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            picture = Image.fromarray(np.asarray(opened.convert("RGB")))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"a picture of the evaluation cannot be decoded ({one_line(error)}): evaluate anew") from None
    if longest_side is not None:
        picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def folder_beside(evaluation: Path) -> Path:
    """Where opinions and their table lie: beside the evaluation's folder, which its next run replaces as a whole."""
    place = Path(os.path.abspath(evaluation))
    return place.with_name(f"{place.name}-judged")


def _digest(before: bytes, result: bytes) -> str:
    return hashlib.sha256(hashlib.sha256(before).digest() + hashlib.sha256(result).digest()).hexdigest()
