"""What all networks have in common: where their weights lie, where they run, and that a process loads each once."""

from __future__ import annotations

import contextlib
import pickle
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from dataset_tools.errors import UserError
from dataset_tools.schema import MadeBy
from dataset_tools.settings import Settings, digest_of
from dataset_tools.weights import Weights, find_weights

if TYPE_CHECKING:
    import torch


class NetworkSettings(Settings):
    """Which weights, and how many pictures at once."""

    kind: str
    weights: str
    """Name of `dataset_tools.networks`, hub id, folder or file."""
    sha256: str | None = Field(None, pattern="[0-9a-f]{64}")
    """Digest (hex) that weights of one's own must have; pickles (.pth, .bin) that are not in the table need it."""
    batch_size: int = Field(8, ge=1, le=1024)
    """Pictures, or people, that the network sees at once."""


@dataclass
class _Loaded:
    lock: threading.Lock = field(default_factory=threading.Lock)
    model: Any = None


_WITHOUT_EFFECT = re.compile(r"\.swin\.layernorm\.(weight|bias)$|\.relative_position_index$")
"""Weights that published checkpoints on a Swin backbone lack, and nothing that is computed uses
(``SwinBackbone._keys_to_ignore_on_load_missing``); and a table that they hold, and that is computed now."""
_LOADED: dict[str, _Loaded] = {}
_LOADING = threading.Lock()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars, warnings and tables of keys: what matters of them is raised."""
    from transformers.utils import logging

    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


class NetworkEstimator(ABC):
    """An estimator that runs a network: the parts of `dataset_tools.estimators.Estimator` that all of them share.

    Nothing is looked for before it is needed, and nothing heavier than the weights' digest before `model`.
    """

    package: ClassVar[str]
    """The package that runs the network."""
    version: ClassVar[int] = 1
    """Raised when our own part of the work gives other answers."""
    files: ClassVar[tuple[str, ...]] = ()
    """Which files of a folder matter, as `find_weights` takes them."""

    def __init__(self, settings: NetworkSettings) -> None:
        self.settings = settings
        self.name = settings.kind
        self.batch_size = settings.batch_size

    @property
    def places(self) -> tuple[str, ...]:
        """Where the weights lie."""
        return (self.settings.weights,)

    @cached_property
    def weights(self) -> Weights:
        """The files on this machine. Raises `UserError` where there are none, or not those that are asked for."""
        return find_weights(self.settings.weights, files=self.files, sha256=self.settings.sha256)

    @cached_property
    def made_by(self) -> MadeBy:
        """See `dataset_tools.estimators.Estimator.made_by`; a folder or file is told by its name alone."""
        row, own = self.weights.network, self.settings.weights
        network = (row.hub or row.name) if row else Path(own).name if Path(own).exists() else own
        return MadeBy(self.name, network, f"{self.package} {version(self.package)}", self.weights.sha256)

    def fingerprint(self) -> str:
        """See `dataset_tools.estimators.Estimator.fingerprint`."""
        settings = self.settings.model_dump(mode="json", exclude={"weights", "sha256"})
        software = {name: version(name) for name in {"torch", self.package}}
        return digest_of([self.version, settings, self.weights.sha256, dict(sorted(software.items()))])

    def check(self) -> None:
        """See `dataset_tools.estimators.Estimator.check`: the network is loaded, and stays so."""
        with self.model():
            pass

    @contextlib.contextmanager
    def model(self) -> Iterator[Any]:
        """The network, for one thread at a time; loaded once a process, whoever asks.

        Raises:
            UserError: the weights are not there, or not this network's.
        """
        key = digest_of([type(self).__name__, self.name, self.weights.sha256])
        with _LOADING:
            loaded = _LOADED.setdefault(key, _Loaded())
        with loaded.lock:
            import torch

            if loaded.model is None:
                try:
                    loaded.model = self.load()
                except UserError:
                    raise
                except pickle.UnpicklingError:  # torch's own message recommends to run whatever the pickle says
                    raise UserError(f"{self.settings.weights} is damaged, or holds more than tensors") from None
                except Exception as error:  # whatever a library says to files that are not its own
                    why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    raise UserError(f"{self.settings.weights} cannot be used as {self.name}: {why}") from None
            with torch.inference_mode():
                yield loaded.model

    @abstractmethod
    def load(self) -> Any:
        """Build the network from `weights`, in evaluation mode, on `device`, of type `dtype`."""
        ...

    @property
    def device(self) -> torch.device:
        """A GPU where there is one."""
        import torch

        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Half precision on a GPU."""
        import torch

        return torch.float16 if self.device.type == "cuda" else torch.float32


def unload_networks() -> None:
    """Forget the networks of this process, so that what comes after them has their memory."""
    with _LOADING:
        _LOADED.clear()


def alike(kinds: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal kinds together, in order of their first ones."""
    groups: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(index)
    return list(groups.values())


@quietly()
def load_pretrained(estimator: NetworkEstimator, architecture: Any, **options: Any) -> Any:
    """A transformers model of the estimator's folder, with every weight that its architecture has, and no other.

    ``from_pretrained`` itself initialises at random what a file lacks, and only logs it.

    Args:
        estimator: whose weights.
        architecture: class of the model, or one of transformers' ``Auto`` classes.
        options: of the architecture's constructor.

    Raises:
        UserError: the files are another network's.
    """
    model, told = architecture.from_pretrained(
        estimator.weights.folder,
        dtype=estimator.dtype,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are told below
        output_loading_info=True,
        **options,
    )
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(str(key) for key in told[kind] if not _WITHOUT_EFFECT.search(str(key)))
        if keys:
            raise UserError(
                f"{estimator.settings.weights}: its weights are not those of {type(model).__name__}: "
                f"{len(keys)} {kind.replace('_', ' ')}, such as {keys[0]}"
            )
    return model.eval().to(estimator.device)
