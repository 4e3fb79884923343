"""What is trained on: of one dataset or of several, drawn from by weight, the samples that are of use."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from dataset_tools.shards import Outline, Samples, ShardDataset


class Mixture:
    """Datasets of several configurations, in each epoch as many samples of each as its weight says.

    An epoch is as long as it can be without showing a sample twice: ``floor(w_i * min_j n_j / w_j)`` samples of
    dataset i, which has n_i, at least one. The next epoch goes on with the samples that follow, round and round,
    so that each sample of a dataset is seen as often as any other of it, give or take once.

    It has the interface of one dataset, `Samples`. ``len`` is that of an epoch, which is less than the
    samples there are (``len(keys)``, each of which has an index) unless the weights are as the sizes.

    Args:
        datasets: by name, such as the configuration's.
        weights: how often a sample comes from each, relative to the others; of the same names.

    Raises:
        UserError: a dataset has no weight or a weight no dataset, a weight is not positive, or a dataset is empty.
    """

    def __init__(self, datasets: Mapping[str, Samples], weights: Mapping[str, float]) -> None:
        if not datasets or datasets.keys() != weights.keys():
            raise UserError(f"weights are for {_listed(weights)}, but the datasets are {_listed(datasets)}: name each")
        for name, dataset in datasets.items():
            if not 0 < weights[name] < float("inf"):
                raise UserError(f"the weight of {name} is {weights[name]}: give a number above 0, or leave {name} out")
            if len(dataset) == 0:
                raise UserError(f"{name} holds no sample: leave it out of the mixture, or build it")
        self.datasets, self.weights = dict(datasets), dict(weights)
        self.keys = [key for dataset in datasets.values() for key in dataset.keys]
        """Key of every sample, dataset by dataset."""
        sizes = [len(dataset) for dataset in datasets.values()]
        self._starts = [0, *itertools.accumulate(sizes)]
        epoch = min(size / weights[name] for name, size in zip(datasets, sizes, strict=True))
        # What is a whole number may end just below it.
        self.shares = {name: max(1, int(weights[name] * epoch + 1e-6)) for name in datasets}
        """Samples of each dataset in an epoch."""

    def __len__(self) -> int:
        return sum(self.shares.values())

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.keys):
            raise IndexError(f"there are {len(self.keys)} samples, and none has the index {index}")
        place = bisect.bisect_right(self._starts, index) - 1
        return list(self.datasets.values())[place][index - self._starts[place]]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of one epoch, none twice, shuffled; the same for a seed and epoch on every machine."""
        parts = []
        for start, dataset, share in zip(self._starts, self.datasets.values(), self.shares.values(), strict=False):
            # One round for all epochs: consecutive shares of it hold every sample equally often.
            around = start + np.asarray(dataset.order(seed, 0))
            parts.append(around.take(np.arange(epoch * share, (epoch + 1) * share), mode="wrap"))
        return np.random.default_rng([seed, epoch, len(parts)]).permutation(np.concatenate(parts))


class Selection:
    """Some samples of a dataset, in the order in which it gives all of them; they are numbered anew.

    Args:
        indices: of the samples that are left, ascending.
    """

    def __init__(self, samples: Samples, indices: Sequence[int]) -> None:
        self._samples, self._indices = samples, list(indices)
        self._numbers = np.full(len(samples.keys), -1)
        self._numbers[self._indices] = np.arange(len(self._indices))
        self.keys = [samples.keys[index] for index in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[self._indices[index]]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of all indices, as `Mixture.order`."""
        numbers = self._numbers[self._samples.order(seed, epoch)]
        return numbers[numbers >= 0]


def usable(samples: Samples, resolution: int, at_least: int = 1) -> tuple[Samples, str]:
    """The samples that can be trained on, and a line on how many were set aside, and why; empty where none was.

    Of a `ShardDataset` its index tells; others are looked at one by one. Every process comes to the same.

    Args:
        resolution: see `mild.settings.TrainSettings`.
        at_least: how many an epoch has to hold.

    Raises:
        UserError: fewer are left, or none of one dataset of a mixture.
    """
    left, reasons = _selected(samples, resolution)
    line = _line(reasons, len(samples.keys)) if reasons else ""
    if len(left) < at_least:
        held = f"{len(left)} samples, fewer than batch_size ({at_least})" if len(left) else "no sample"
        raise UserError(f"the training split holds {held}: {line or 'build the dataset with more'}")
    return left, line


def misfit(outline: Outline, resolution: int) -> tuple[str, str] | None:
    """Why a sample cannot be trained on, in short, and what that is of this one; None where it can."""
    if outline.people == 0:
        remedy = "leave it out, or build the dataset again"
        return "without a person who is seen", f"has no person, or empty masks only: {remedy}"
    if min(outline.width, outline.height) < resolution:
        size = f"{outline.width}x{outline.height}"
        return (
            f"smaller than resolution {resolution}",
            f"is {size}, smaller than resolution ({resolution}): lower resolution",
        )
    return None


def _selected(samples: Samples, resolution: int) -> tuple[Samples, Counter[str]]:
    """Those that can be trained on, and how many of the others there are, by reason."""
    reasons: Counter[str] = Counter()
    if isinstance(samples, Mixture):
        parts: dict[str, Samples] = {}
        for name, dataset in samples.datasets.items():
            try:
                parts[name], of_part = _selected(dataset, resolution)
            except UserError as error:
                raise UserError(f"{name}: {error}, or leave {name} out") from None
            reasons += of_part
        return (Mixture(parts, samples.weights) if reasons else samples), reasons
    if isinstance(samples, ShardDataset):
        outlines = samples.outlines
    else:
        outlines = [Outline.of(samples[index]) for index in range(len(samples.keys))]
    against = [misfit(outline, resolution) for outline in outlines]
    reasons.update(why[0] for why in against if why is not None)
    if not reasons:
        return samples, reasons
    left = [index for index, why in enumerate(against) if why is None]
    if not left:
        (_, what), key = next(why for why in against if why is not None), samples.keys[0]
        raise UserError(f"{_line(reasons, len(against))}; sample {key} {what}")
    return Selection(samples, left), reasons


def _line(reasons: Mapping[str, int], count: int) -> str:
    """On what was set aside of ``count`` samples."""
    named = [reason if len(reasons) == 1 else f"{number} {reason}" for reason, number in sorted(reasons.items())]
    return f"{sum(reasons.values())} of {count} samples set aside: {', '.join(named)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
