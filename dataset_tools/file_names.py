"""Files below a folder, and what their names are called where they cannot be text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from dataset_tools.errors import UserError


def files_below(folder: str | Path) -> list[str]:
    """Names of the files below a local folder, with slashes, sorted; hidden files and folders are left out, and what is
    no file, such as a named pipe: reading it would wait for good.

    Linked folders count like others, except for those that lead back to a folder that they lie in.

    Raises:
        UserError: a folder cannot be read.
    """
    names: list[str] = []

    def walk(place: str, before: str, above: frozenset[str]) -> None:
        own = os.path.realpath(place)
        if own in above:
            return
        try:
            inside = [name for name in os.listdir(place) if not name.startswith(".")]
        except OSError as error:
            raise UserError(f"folder {printable(place)} cannot be read: {error.strerror}") from None
        for name in inside:
            if os.path.isdir(f"{place}/{name}"):
                walk(f"{place}/{name}", f"{before}{name}/", above | {own})
            elif os.path.isfile(f"{place}/{name}") or not os.path.exists(f"{place}/{name}"):
                names.append(before + name)

    walk(str(folder), "", frozenset())
    return sorted(names)


def infos_below(filesystem: AbstractFileSystem, folder: str) -> dict[str, dict[str, Any]]:
    """`files_below`, with what the filesystem knows of each; nothing of a link that leads nowhere, which is read later
    or not at all. Of a store all that is not hidden. Raises `UserError` as that."""
    if not isinstance(filesystem, LocalFileSystem):
        found = filesystem.find(folder, detail=True)
        names = {path[len(folder) :].lstrip("/"): info for path, info in found.items()}
        return {name: names[name] for name in sorted(names) if not any(p.startswith(".") for p in name.split("/"))}

    def info(path: str) -> dict[str, Any]:
        try:
            known: dict[str, Any] = filesystem.info(path)
        except FileNotFoundError:
            return {}
        return known

    return {name: info(f"{folder}/{name}") for name in files_below(folder)}


def is_unicode(name: str) -> bool:
    """Whether a file's name is text: Linux allows any bytes, which Python shows as lone surrogates."""
    return printable(name) == name


def printable(name: str) -> str:
    """A file name that can be printed and stored as UTF-8: bytes that are no text appear as ``\\udcff``."""
    return name.encode("utf-8", "backslashreplace").decode()
