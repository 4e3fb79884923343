"""Which photographs a command is given, as files, folders and globs, and where its results go."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dataset_tools.errors import UserError
from dataset_tools.file_names import files_below
from dataset_tools.photo_masks import PHOTO_SUFFIXES
from flows.commands.results import result_file
from mild.erasing.layers import INDEX as LAYERS_INDEX
from mild.erasing.layers import is_of_layers

ERASED, MASK, PEOPLE = "-erased.png", "-mask.png", "-people.jpg"
"""What the names of results end in: the photograph's stem comes before it."""


NOT_READ = (".heic", ".heif", ".avif", ".jfif", ".jpe", ".jp2", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf")
"""Kinds of photographs that are passed over with a word, not in silence."""


def find_photos(given: Sequence[str], others: Sequence[str], complaints: Console) -> tuple[dict[str, Path], bool]:
    """Photographs by their names: below the folder given, the fixed part of a glob, or the files' common folder.

    Args:
        given: files, folders and globs.
        others: folders of masks and results; where one lies in a folder of photographs, what it holds is none.
        complaints: is told in a line what was passed over.

    Returns:
        The photographs, and whether they are to be treated as several: as any folder or glob is.

    Raises:
        UserError: a folder or glob holds none, or nothing but masks and results, or two are called the same.
    """
    files = [Path(text) for text in given if not Path(text).is_dir() and not _is_glob(text)]
    found, searched, not_read = [], list[tuple[Path, Path]](), list[Path]()
    for text in given:
        if Path(text).is_dir():
            inside = [Path(text, name) for name in files_below(Path(text))]
            photos = [path for path in inside if path.name.lower().endswith(PHOTO_SUFFIXES)]
            not_read += [path for path in inside if path.suffix.lower() in NOT_READ]
            if not photos:
                raise UserError(f"folder {text} holds no photographs ({', '.join(PHOTO_SUFFIXES)})")
            searched += [(Path(text), photo) for photo in photos]
        elif _is_glob(text):
            root = Path(*takewhile(lambda part: not _has_magic(part), Path(text).parts))
            matches = [Path(match) for match in _matches(text, root)]
            photos = [path for path in matches if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file()]
            not_read += [path for path in matches if path.suffix.lower() in NOT_READ]
            if not photos:
                raise UserError(f"{text} matches no photographs ({', '.join(PHOTO_SUFFIXES)})")
            searched += [(root, photo) for photo in photos]
    # What an earlier run left beside its photographs is no photograph to work on, unless it is named.
    results = {photo.with_name(photo.stem + ending) for _, photo in searched for ending in (ERASED, MASK, PEOPLE)}
    passed_over = []
    for root, photo in searched:
        if photo in results:
            passed_over.append(photo)
        elif any(_is_below(Path(other), root) and _is_below(photo, Path(other)) for other in others):
            continue
        elif is_of_layers(photo.name) and photo.with_name(LAYERS_INDEX).is_file():
            passed_over.append(photo)
        else:
            found.append((root, photo))
    for files_left, why in ((passed_over, "as results of an earlier run"), (not_read, "as of kinds that are not read")):
        if files_left:
            more = " and so on" if len(files_left) > 1 else ""
            line = f"{len(files_left)} passed over {why}: {files_left[0]}{more}"
            complaints.print(Text(line), soft_wrap=True)
    found += [(_common_folder(files), file) for file in files]
    if not found:
        raise UserError(f"{', '.join(given)}: there are only masks and results, and no photograph")
    names: dict[str, Path] = {}
    known = set[str]()
    for root, photo in found:
        if (place := os.path.abspath(photo)) in known:
            continue  # once, by the first of its names
        known.add(place)
        name = Path(os.path.relpath(photo, root)).as_posix()
        other = names.setdefault(name, photo)
        if other is not photo:
            raise UserError(f"{other} and {photo} are both called {name}; give the folder that they have in common")
    return names, len(given) > 1 or len(files) == 0


def result_paths(photos: dict[str, Path], several: bool, ending: str, output: str | None) -> dict[str, Path]:
    """The file of each photograph's result, by the photograph's name.

    Args:
        photos: of `find_photos`, as is ``several``.
        ending: `ERASED`, `MASK` or `PEOPLE`.
        output: file for a single photograph, else a folder; None for beside the photographs.

    Raises:
        UserError: there is no such place, or two results would be saved there.
    """
    if several and output is not None and not Path(output).is_dir() and Path(output).suffix.lower() in PHOTO_SUFFIXES:
        raise UserError(f"--output {output} is a file; several photographs need a folder")
    results, first = {}, dict[Path, Path]()
    for name, photo in photos.items():
        result = photo.with_name(photo.stem + ending)
        if output is not None and several:
            result = Path(output, name).with_name(result.name)
        elif output is not None:
            result = Path(output, result.name) if Path(output).is_dir() else result_file(output)
        other = first.setdefault(result, photo)
        if other != photo:
            raise UserError(f"{other} and {photo} would both be saved as {result}; run them one by one")
        results[name] = result
    return results


def _is_below(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(folder)) in Path(os.path.abspath(path)).parents


def _common_folder(files: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([os.path.abspath(file.parent) for file in files])) if files else Path()


def _has_magic(text: str) -> bool:
    return glob.escape(text) != text


def _matches(pattern: str, root: Path) -> list[str]:
    """Paths that match a glob, sorted; ``**`` goes into linked folders, but never round in circles."""
    parts = Path(pattern).parts[len(root.parts) :]
    if "**" not in parts:
        return sorted(glob.glob(pattern))

    def fits(names: Sequence[str], wanted: Sequence[str]) -> bool:
        if not wanted or not names:
            return not names and all(part == "**" for part in wanted)
        if wanted[0] == "**":
            return fits(names, wanted[1:]) or fits(names[1:], wanted)
        return fnmatchcase(names[0], wanted[0]) and fits(names[1:], wanted[1:])

    return [str(root / name) for name in files_below(root) if fits(name.split("/"), parts)]


def _is_glob(text: str) -> bool:
    return _has_magic(text) and not Path(text).exists()
