"""Which donors a composite may draw from: those in a few pictures, which pass by, so that each is loaded about once.

Composites are built shard by shard. Each of these shards has a neighbourhood: some shards of photographs, drawn with
the seed (`neighbourhoods`). The pictures in them that hold donors are put in an order, which the seed and the shard's
path give, and composite ``n`` of the shard draws from the pictures ``n`` to ``n + WINDOW - 1`` of it (`DonorWindows`).
So each composite brings one new picture, people meet others each time, and what is kept in memory does not grow with
the number of donors. All of it follows from the seed and the dataset: any worker comes to the same, from any composite
on.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from dataset_tools.compositing import CompositorSettings, is_tall_enough
from dataset_tools.donors import DONOR_COLUMNS, Cutout, CutoutRow, DonorSettings, cut_out, cutout_rows
from dataset_tools.errors import Rejected
from dataset_tools.schema import Sample
from dataset_tools.shards import Shard, table_path

WINDOW = 32
"""Pictures that a composite may draw donors from. Most have one or two; five people at most are wanted by default."""


def donors_of(root: str, shards: Sequence[Shard], settings: CompositorSettings) -> Iterator[list[list[CutoutRow]]]:
    """Of each shard of photographs, of each sample who may be pasted; often nobody.

    Args:
        root: of the dataset. The shards' tables are read, and nothing else; samples count on from shard to shard.
    """
    from dataset_tools.shard_table import read_shard_tables  # those who train need no pyarrow

    index = itertools.count()
    for table in read_shard_tables(root, [table_path(shard.path) for shard in shards], DONOR_COLUMNS):
        yield [
            [row for row in cutout_rows(next(index), told, settings.donors) if is_tall_enough(row, settings)]
            for told in table.to_pylist()
        ]


def neighbourhoods(pictures: Sequence[int], sizes: Sequence[int], seed: str) -> list[list[int]]:
    """Numbers of the shards of photographs whose people each shard of composites may show, ascending.

    The shards with donors stand in a ring, in an order that the seed gives. Each shard of composites begins at its own
    place of it, evenly spread, and takes as many as its composites need pictures.

    Args:
        pictures: how many pictures with donors each shard of photographs has.
        sizes: how many composites each shard of composites is to have.
    """
    held = [number for number, count in enumerate(pictures) if count]
    ring = [held[place] for place in _generator(seed).permutation(len(held))]
    chosen = []
    for number, size in enumerate(sizes):
        first, found, enough = number * len(ring) // len(sizes), list[int](), 0
        while enough < size + WINDOW - 1 and len(found) < len(ring):
            found.append(ring[(first + len(found)) % len(ring)])
            enough += pictures[found[-1]]
        chosen.append(sorted(found))
    return chosen


class DonorWindows:
    """The donors of one shard of composites, to be asked for from its first composite to its last.

    Args:
        donors: of each picture of the neighbourhood, who may be pasted.
        read: gives a picture by its index (`CutoutRow.sample`).
        settings: what is demanded of donors.
        seed: of the order in which pictures pass by.
    """

    def __init__(
        self,
        donors: Iterable[Sequence[CutoutRow]],
        read: Callable[[int], Sample],
        settings: DonorSettings,
        seed: str,
    ) -> None:
        held = [rows for rows in donors if rows]
        self._pictures = [held[place] for place in _generator(seed).permutation(len(held))]
        self._people = {rows[0].sample: rows for rows in held}
        self._read, self._settings = read, settings
        self._kept: dict[int, dict[int, Cutout | Rejected]] = {}
        """Of pictures of the window that were read, everybody who may be pasted, by index in the sample's people."""

    def rows(self, number: int) -> list[CutoutRow]:
        """Who may be in composite ``number`` of the shard, from 0 on. All others' pixels are forgotten."""
        count = len(self._pictures)
        window = [self._pictures[(number + ahead) % count] for ahead in range(min(WINDOW, count))]
        inside = {rows[0].sample for rows in window}
        self._kept = {sample: cutouts for sample, cutouts in self._kept.items() if sample in inside}
        return [row for rows in window for row in rows]

    def load(self, row: CutoutRow) -> Cutout:
        """Cut somebody of the window out. Raises `Rejected` as `dataset_tools.donors.cut_out`."""
        if row.sample not in self._kept:
            # All at once, so that the picture need not be kept: crops are far smaller.
            sample = self._read(row.sample)
            self._kept[row.sample] = {each.person: self._cut_out(sample, each) for each in self._people[row.sample]}
        cutout = self._kept[row.sample][row.person]
        if isinstance(cutout, Rejected):
            raise cutout
        return cutout

    def _cut_out(self, sample: Sample, row: CutoutRow) -> Cutout | Rejected:
        try:
            return cut_out(sample, row.person, self._settings)
        except Rejected as rejected:
            return rejected


def _generator(seed: str) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(seed.encode()).digest()))
