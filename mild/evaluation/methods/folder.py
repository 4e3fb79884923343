"""Anyone's results: a folder of pictures by sample key, from a method that need not run, or even stand, here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator

from dataset_tools.errors import Rejected, UserError
from dataset_tools.file_names import files_below
from dataset_tools.images import MOST_PIXELS, DecodeSettings, decode_image
from dataset_tools.photographs import read_file
from dataset_tools.schema import KEY_PATTERN
from dataset_tools.settings import digest_of
from dataset_tools.storage import local_place
from dataset_tools.weights import file_digest
from mild.evaluation.methods import Case, MethodSettings, Setup, keep_outside
from mild.evaluation.methods.placeholders import PLACEHOLDER, checked, filled

TOLD = 3
"""Files that an error names of each kind."""
_MATCHES = {"key": KEY_PATTERN.pattern, "masks": "[a-z]+"}
_DECODING = DecodeSettings(min_side=1, max_pixels=MOST_PIXELS)


def read_result(path: Path, size: tuple[int, ...]) -> np.ndarray:
    """The picture at ``path``, (H, W, 3) uint8 RGB.

    Args:
        path: PNG, JPEG, WEBP, TIFF, BMP or GIF.
        size: height and width that it has to have.

    Raises:
        Rejected: ``another-size``, or as `dataset_tools.images.decode_image` and `read_file`.
    """
    image = decode_image(read_file(path), _DECODING).image
    if image.shape[:2] != size:
        raise Rejected(
            "another-size", f"{image.shape[1]}x{image.shape[0]} pixels, where the picture has {size[1]}x{size[0]}"
        )
    return image


def _checked_pattern(pattern: str) -> str:
    if "{key}" not in checked(pattern, tuple(_MATCHES)):
        raise ValueError(f"{pattern!r} lacks {{key}}, by which results are told apart")
    if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
        raise ValueError(f"{pattern!r} leads out of the folder")
    return str(PurePosixPath(pattern))


class FolderMethod(MethodSettings):
    """Results that were made elsewhere, one picture a sample."""

    kind: Literal["folder"] = "folder"
    warms_up: ClassVar[bool] = False
    folder: Annotated[str, AfterValidator(lambda place: local_place(place, "results"))]
    """Where the pictures lie, on a local disk."""
    pattern: Annotated[str, AfterValidator(_checked_pattern)] = "{key}.png"
    """Where each lies in the folder, such as ``{masks}/{key}_out.jpg``: ``{key}`` is the sample's, ``{masks}`` the kind
    of masks (``exact`` or ``augmented``)."""
    label: str = ""
    """What tables and figures call it; empty: its name."""
    keep_outside: bool = True
    """Whether the pixels outside the hole are put back, as those of all methods are; without, the metrics of what
    changed there judge the results as they came."""
    extra_allowed: bool = False
    """Whether there may be results of pictures that are not evaluated: where ``samples`` draws only some of those that
    the method was run on."""

    @property
    def title(self) -> str:
        """See `MethodSettings.title`."""
        return (self.label or self.name) + ("" if self.keep_outside else ", outside the hole as it came")

    def check_cases(self, setup: Setup, cases: Sequence[tuple[str, str, tuple[int, int]]]) -> None:
        """Read all results once. See `MethodSettings.check_cases`.

        Args:
            cases: all that are evaluated; what matches ``pattern`` and is of none is extra.

        Raises:
            UserError: results are missing, extra, of another size or unreadable: counts, and the first of each kind.
        """
        root, found = Path(self.folder), self._files()
        asked = {self._file(key, kind): size for key, kind, size in cases}
        if len(asked) < len(cases):
            (twice, _), *_ = Counter(self._file(key, kind) for key, kind, _ in cases).most_common(1)
            raise UserError(
                f"{self.name}: {twice} would be the result of several cases: write {{masks}} in pattern for several "
                "kinds of masks, and evaluate pictures that share a key apart"
            )
        wrong: dict[str, list[str]] = {}
        for name, size in asked.items():
            try:
                read_result(root / name, size)
            except Rejected as error:
                kind = {"not-found": "missing", "another-size": "of another size"}.get(error.reason, "unreadable")
                wrong.setdefault(kind, []).append(name if kind == "missing" else f"{name}: {error.message}")
        if extra := [name for name in found if name not in asked and not self.extra_allowed]:
            wrong["extra, of no picture that is evaluated (see extra_allowed)"] = extra
        if wrong:
            told = [
                f"{len(names)} {kind} ({'; '.join(names[:TOLD])}{'; ...' if len(names) > TOLD else ''})"
                for kind, names in wrong.items()
            ]
            raise UserError(f"{self.name}: of {len(asked)} results {self.pattern} in {root}: {', '.join(told)}")

    def weights(self, setup: Setup) -> dict[str, str]:
        """sha256 over the names and contents of all results. See `MethodSettings.weights`."""
        return {"results": digest_of({name: file_digest(Path(self.folder, name)) for name in self._files()})}

    def fingerprint(self, setup: Setup) -> str:
        """See `MethodSettings.fingerprint`."""
        return digest_of([1, self.pattern, self.keep_outside, self.weights(setup)])

    def open(self, setup: Setup) -> FolderMethod:
        """Itself: nothing has to be loaded."""
        return self

    def erase(self, cases: Sequence[Case], seeds: Sequence[int]) -> list[np.ndarray]:
        """Read the results. With ``keep_outside`` off, pixels outside the hole may differ from the image.

        See `mild.evaluation.methods.Eraser.erase`.
        """
        results = []
        for case in cases:
            path = Path(self.folder, self._file(case.key, case.kind))
            try:
                result = read_result(path, case.hole.shape)
            except Rejected as error:
                raise UserError(f"{path}: {error.message}") from None
            results.append(keep_outside(result, case) if self.keep_outside else result)
        return results

    def _file(self, key: str, masks: str) -> str:
        """Of a case, below the folder."""
        return filled(self.pattern, {"key": key, "masks": masks})

    def _files(self) -> list[str]:
        """All that can be results, below the folder; sorted."""
        root = Path(self.folder)
        if not root.is_dir():
            raise UserError(f"{self.name}: folder {root} does not exist: name that of the results")
        # Each of a name's places must hold the same text: a second {key} refers back to the first.
        expression, known = "", set[str]()
        for index, part in enumerate(PLACEHOLDER.split(self.pattern)):
            if index % 2 == 0:
                expression += re.escape(part)
            else:
                expression += f"(?P={part})" if part in known else f"(?P<{part}>{_MATCHES[part]})"
                known.add(part)
        return [name for name in files_below(root) if re.fullmatch(expression, name)]
