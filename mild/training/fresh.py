"""Fresh composites: where training draws a composite of the dataset, another one is made in its place.

People of the dataset's photographs are cut out and pasted anew, as building a dataset does it, on the clean plate of
the composite that was drawn (Dwibedi et al., Cut, Paste and Learn, 2017). So no two steps see the same people at the
same places. Plates and photographs are of the split that is trained on; nothing but the dataset is read. All of it
follows from the seed of training, the step and the sample's key.
"""

from __future__ import annotations

from dataclasses import replace

from dataset_tools.compositing import Background, CompositorSettings, compose
from dataset_tools.donor_windows import donors_of
from dataset_tools.donors import Cutout, CutoutRow, cut_out
from dataset_tools.errors import Rejected, UserError
from dataset_tools.schema import Sample
from dataset_tools.shards import ShardDataset, read_manifest
from mild.seeds import derived_seed
from mild.settings import TrainSettings

KEPT = 64 << 20
"""Bytes of cut-outs that a process keeps: cutting one out takes as long as the rest of a small composite."""


def donors_configuration(root: str, split: str) -> str:
    """The configuration of a dataset that holds the photographs whose people are pasted.

    Raises:
        UserError: there is no dataset, or it has composites alone.
    """
    held = read_manifest(root).shards
    for name, splits in held.items():
        if name != "composite" and any(shard.samples for shard in splits.get(split, [])):
            return name
    raise UserError(f"fresh_composites: {root} has no photographs in {split} to cut people out of: build it with some")


class FreshComposites:
    """Makes composites; may be pickled for other processes.

    Args:
        donors: the photographs whose people are pasted.
        settings: of training; its ``fresh_composites`` go before what the dataset was built with.

    Raises:
        UserError: nobody can be cut out, the settings do not go with those of the dataset, or a table is missing.
    """

    def __init__(self, donors: ShardDataset, settings: TrainSettings) -> None:
        assert settings.fresh_composites is not None
        built = donors.manifest.settings.get("composite") or {}
        # A plate is a crop already.
        values = built | settings.fresh_composites.model_dump(exclude_none=True) | {"crop": (1.0, 1.0)}
        self.settings = CompositorSettings.check(values, origin=f"fresh_composites, as {donors.root} was built")
        self.donors, self._seed = donors, settings.seed
        held = donors_of(donors.root, donors.shards, self.settings)
        self.rows = [row for samples in held for rows in samples for row in rows]
        """Who may be pasted."""
        if not self.rows:
            raise UserError(
                f"fresh_composites: {donors.root} has nobody in {donors.configuration}/{donors.split} who can be cut "
                "out: leave it out, or build the dataset with more photographs"
            )
        self._kept: dict[tuple[int, int], Cutout] = {}
        self._size = 0

    def instead_of(self, sample: Sample, step: int) -> Sample:
        """The composite that a step sees in the place of one of the dataset.

        It has that one's clean plate, perhaps mirrored, and its size. Nothing in it mirrors people, since shards do not
        say where the ground could. Where nobody finds a place, it is the composite of the dataset itself.

        Args:
            sample: of the configuration ``composite``.
            step: counted from 0.
        """
        assert sample.background is not None
        height, width = sample.background.shape[:2]
        key = f"fresh-{derived_seed(self._seed, 'fresh', step, sample.key)}"
        background = Background(sample.background, replace(sample.origins[0], role="background"))
        settings = self.settings.model_copy(update={"size": (width, height)})
        try:
            return compose(key, sample.split, background, self.rows, self._cut_out, settings)
        except Rejected:
            return sample

    def _cut_out(self, row: CutoutRow) -> Cutout:
        place = row.sample, row.person
        if place not in self._kept:
            cutout = cut_out(self.donors[row.sample], row.person, self.settings.donors)
            self._kept[place] = cutout
            self._size += _size_of(cutout)
            while self._size > KEPT and len(self._kept) > 1:
                self._size -= _size_of(self._kept.pop(next(iter(self._kept))))
        return self._kept[place]


def _size_of(cutout: Cutout) -> int:
    return cutout.rgba.nbytes + cutout.parsing.nbytes
