"""Where pictures come from: one module a source, all with the same protocol."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from dataset_tools.records import Curation, ImageRecord


@runtime_checkable
class Source(Protocol):
    """A source of annotated pictures. Built by its settings (``settings.open()``); holds no open files.

    ``settings.open(tables)`` builds one that takes `tables`' word, so that what was looked up is not asked for again.
    """

    name: str
    applies_exif: bool
    """What brings pictures upright: their EXIF orientation (True) or `ImageRecord.rotation` (False)."""

    @property
    def places(self) -> tuple[str, ...]:
        """Folders and URLs that messages of this source may name."""
        ...

    def check(self) -> None:
        """Raise `UserError` where the source cannot be read; costs a few requests at most."""
        ...

    def tables(self) -> dict[str, list[str]]:
        """Annotation tables by name, and what changes when their content does. Raises `UserError`."""
        ...

    def fingerprint(self) -> str:
        """Digest of everything that `curate` reads (table identities, settings); cheap, no full read of remote files.

        Raises:
            UserError: a table or folder that the source needs is missing.
        """
        ...

    def curate(self) -> Curation:
        """Choose images. Raises `UserError` for unusable tables; a bad row becomes a `Rejection`."""
        ...

    def state(self, record: ImageRecord) -> list[str]:
        """Size and time of the files that hold the record's picture and masks; changes when one of them is replaced.

        Empty where the record itself changes then, or where looking would cost a request for each picture.
        """
        ...

    def read_image(self, record: ImageRecord) -> bytes:
        """The encoded image file, as stored. Raises `Rejected` with stage ``fetch`` reasons."""
        ...

    def read_mask(self, record: ImageRecord, index: int) -> np.ndarray:
        """Mask of ``record.instances[index]``: (h, w) bool as stored, at the mask's own size, before rotation.

        Raises:
            Rejected: the mask is missing or unreadable.
        """
        ...


@runtime_checkable
class GroundReader(Protocol):
    """A source that knows which ground of its pictures mirrors what stands on it."""

    def read_glossy_ground(self, record: ImageRecord) -> np.ndarray:
        """The map that ``record.glossy_ground`` names: (h, w) bool as stored, at its own size, before rotation.

        Raises:
            Rejected: the map is missing or unreadable.
        """
        ...
