"""Source pictures of a dataset, gathered from its shards' tables: whom to credit, by which licence, in which split."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa

_ROLES = ("background", "image", "person")
"""Of `dataset_tools.schema.Origin.role`, sorted; each is a bit of what the database holds."""
_TEXTS = ("licence", "author", "author_url", "title", "url", "landing_url", "sha256")


@dataclass(frozen=True)
class Credit:
    """A source picture, to be credited: one row of ``attribution.csv``."""

    source: str
    id: str
    split: str
    roles: list[str]
    """Sorted; of `dataset_tools.schema.Origin.role`."""
    licence: str
    author: str
    author_url: str
    title: str
    url: str
    landing_url: str
    sha256: str


@dataclass(frozen=True)
class Counted:
    """Source pictures of one configuration and split, each counted once."""

    licences: dict[str, int]
    sources: dict[str, int]
    blurred: int
    """Regions that were blurred."""


class Credits:
    """A database on the disk, which lasts as long as a block ``with Credits() as credits``: memory does not grow."""

    def __enter__(self) -> Credits:
        self._folder = tempfile.TemporaryDirectory(prefix="credits-")
        self._database = sqlite3.connect(Path(self._folder.name, "credits.sqlite"), isolation_level=None)
        self._database.executescript(
            f"""
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE pictures (
                source, id, split, roles, {", ".join(_TEXTS)}, PRIMARY KEY (source, id)
            ) WITHOUT ROWID;
            CREATE TABLE uses (
                source, id, configuration, split, licence, blurred, place, number, sha256,
                PRIMARY KEY (source, id, configuration, split)
            ) WITHOUT ROWID;
            CREATE TABLE samples (configuration, key, path);
            BEGIN;
            """
        )
        self._number = 0
        return self

    def __exit__(self, *_: Any) -> None:
        self._database.close()
        self._folder.cleanup()

    def add(self, configuration: str, split: str, path: str, table: pa.Table) -> None:
        """Add what a shard's table says.

        Args:
            path: of the shard, for what `keys_twice` and `in_two_splits` tell.
            table: with the columns ``key`` and ``origins`` of `dataset_tools.shard_table.TABLE_SCHEMA`.
        """
        pictures, uses, samples = [], [], []
        for row in table.select(["key", "origins"]).to_pylist():
            samples.append((configuration, row["key"], path))
            for origin in row["origins"]:
                picture = (origin["source"], origin["id"])
                role = 1 << _ROLES.index(origin["role"])
                pictures.append((*picture, split, role, *(origin[name] for name in _TEXTS)))
                place = f"{path}, sample {row['key']}"
                self._number += 1
                told = origin["licence"], origin["blurred"], place, self._number, origin["sha256"]
                uses.append((*picture, configuration, split, *told))
        marks = ", ".join("?" * (4 + len(_TEXTS)))
        self._database.executemany(
            f"INSERT INTO pictures VALUES ({marks}) ON CONFLICT DO UPDATE SET roles = roles | excluded.roles", pictures
        )
        self._database.executemany("INSERT OR IGNORE INTO uses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", uses)
        self._database.executemany("INSERT INTO samples VALUES (?, ?, ?)", samples)

    def counted(self, configuration: str, split: str) -> Counted:
        """What was added of one configuration and split; counts with the largest first."""
        part = "FROM uses WHERE configuration = ? AND split = ?"

        def counts(name: str) -> dict[str, int]:
            ranked = f"SELECT {name}, count(*) {part} GROUP BY 1 ORDER BY 2 DESC, 1"
            return dict(self._database.execute(ranked, [configuration, split]))

        (blurred,) = self._database.execute(f"SELECT total(blurred) {part}", [configuration, split]).fetchone()
        return Counted(licences=counts("licence"), sources=counts("source"), blurred=int(blurred))

    def __iter__(self) -> Iterator[Credit]:
        """All source pictures, each once, by source and id."""
        for source, id, split, roles, *texts in self._database.execute("SELECT * FROM pictures ORDER BY source, id"):
            named = [role for bit, role in enumerate(_ROLES) if roles >> bit & 1]
            yield Credit(source, id, split, named, *texts)

    def keys_twice(self) -> Iterator[tuple[str, list[str]]]:
        """Keys that several samples of one configuration have, and the shards of these."""
        found = self._database.execute(
            """
            SELECT key, json_group_array(path) FROM samples GROUP BY configuration, key HAVING count(*) > 1 ORDER BY key
            """
        )
        for key, paths in found:
            yield key, sorted(json.loads(paths))

    def in_two_splits(self) -> Iterator[tuple[str, tuple[str, str], tuple[str, str]]]:
        """Source pictures that are in two splits: ``source/id``, and the first place and split of either.

        Also those of which another split has the same bytes under another id, which is then named too.
        """
        found = self._database.execute(
            "SELECT source, id FROM uses GROUP BY source, id HAVING count(DISTINCT split) > 1 ORDER BY source, id"
        )
        for source, id in found:
            places = self._database.execute(
                "SELECT place, split, min(number) FROM uses WHERE source = ? AND id = ? GROUP BY split ORDER BY 3",
                [source, id],
            )
            first, *others = ((place, split) for place, split, _ in places)
            for other in others:
                yield f"{source}/{id}", first, other
        copies = self._database.execute(
            """
            SELECT sha256, source, id, place, split, min(number) FROM uses WHERE sha256 IN (
                SELECT sha256 FROM uses WHERE sha256 != '' GROUP BY sha256 HAVING count(DISTINCT split) > 1
            ) GROUP BY sha256, split ORDER BY sha256, 6
            """
        )
        for _, group in groupby(copies, key=itemgetter(0)):
            first, *others = ((f"{source}/{id}", (place, split)) for _, source, id, place, split, _ in group)
            for name, where in others:
                if name != first[0]:
                    yield f"{name}, which has the same bytes as {first[0]},", first[1], where
