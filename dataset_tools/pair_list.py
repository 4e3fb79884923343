"""A list of pairs in a folder: one JSON object a line in ``pairs.jsonl``, beside the pictures that it names.

The steps that make pairs (clips, reviewers) write it, the source ``pairs`` reads it, and anybody may write one.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dataset_tools.records import Rejection, Split
from dataset_tools.schema import MadeBy

PAIR_LIST = "pairs.jsonl"
SET_ASIDE = "set-aside.jsonl"
"""Beside it, where its maker set something aside or mended it: one `dataset_tools.records.Rejection` a line."""


class PairRow(BaseModel):
    """One picture with its clean plate. Files are named relative to the list's folder, and are all of one size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    """1 to 80 letters, digits, ``-`` and ``_``; no other row has it."""
    group: str
    """Scene, such as the clip: all pictures of one group come into one split."""
    image: str
    """The picture, RGB."""
    background: str
    """The clean plate, RGB; several rows may share one."""
    known: str = ""
    """Grey picture: 128 and more where the clean plate is known. Empty: it is known everywhere."""
    masks: list[str] = []
    """A file a person, or one file of several people; `dataset_tools.mask_files` says how they are read. Empty: nobody
    has made masks."""
    mask_scores: list[Annotated[float, Field(ge=0, le=1)]] = []
    """0..1, one a file of masks; empty: all 1."""
    masks_by: str = "annotated"
    """For `dataset_tools.schema.Person.mask_by`."""
    effects: str = ""
    """Grey picture of bits as in ``effects.png``, in the order of the people. Empty: effects are not known."""
    plate_by: MadeBy = MadeBy("annotated")
    """For `dataset_tools.schema.Makers.plate`."""
    tells_effects: bool = True
    """For `dataset_tools.estimators.CleanPlate.tells_effects`."""
    split: Split | None = None
    """None: it follows from ``group``."""
    licence: str = ""
    author: str = ""
    author_url: str = ""
    title: str = ""
    url: str = ""
    landing_url: str = ""
    caption: str = ""


def pair_list(rows: Iterable[PairRow]) -> bytes:
    """The content of ``pairs.jsonl``; equal rows give equal bytes."""
    return "".join(f"{row.model_dump_json(exclude_defaults=True)}\n" for row in rows).encode()


def read_pair_list(data: bytes) -> Iterator[tuple[int, PairRow | ValueError]]:
    """Each line of ``pairs.jsonl`` that is not empty: its number, from 1, and its row or what is wrong with it."""
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, PairRow.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "row"
            yield number, ValueError(f"{where}: {first['msg']}")


def set_aside_list(rejected: Iterable[Rejection]) -> bytes:
    """The content of ``set-aside.jsonl``."""
    return "".join(f"{json.dumps(asdict(row))}\n" for row in rejected).encode()


def read_set_aside_list(data: bytes) -> list[Rejection]:
    """The inverse of `set_aside_list`. Raises `ValueError` where a line is no such row."""
    row = TypeAdapter(Rejection)
    return [row.validate_json(line) for line in data.split(b"\n") if line.strip()]
