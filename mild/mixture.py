"""Several datasets as one, drawn from by weight: what composites teach beside what photographs do."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping

import numpy as np

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from mild.training import Samples


class Mixture:
    """Datasets of several configurations, in each epoch as many samples of each as its weight says.

    An epoch is as long as it can be without showing a sample twice: ``floor(w_i * min_j n_j / w_j)`` samples of
    dataset i, which has n_i, at least one. The next epoch goes on with the samples that follow, round and round,
    so that each sample of a dataset is seen as often as any other of it, give or take once.

    It has the interface of one dataset, `mild.training.Samples`. ``len`` is that of an epoch, which is less than the
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
        self.datasets = list(datasets.values())
        self.keys = [key for dataset in self.datasets for key in dataset.keys]
        """Key of every sample, dataset by dataset."""
        sizes = [len(dataset) for dataset in self.datasets]
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
        return self.datasets[place][index - self._starts[place]]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of one epoch, none twice, shuffled; the same for a seed and epoch on every machine."""
        parts = []
        for start, dataset, share in zip(self._starts, self.datasets, self.shares.values(), strict=False):
            # One round for all epochs: consecutive shares of it hold every sample equally often.
            around = start + np.asarray(dataset.order(seed, 0))
            parts.append(around.take(np.arange(epoch * share, (epoch + 1) * share), mode="wrap"))
        return np.random.default_rng([seed, epoch, len(parts)]).permutation(np.concatenate(parts))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
