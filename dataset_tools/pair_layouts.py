"""How published pair sets lie: pictures by the pattern of their names, or in the columns of Parquet files."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from pydantic import model_validator

from dataset_tools.errors import Rejected, UserError
from dataset_tools.file_names import is_unicode, printable
from dataset_tools.pair_list import PairRow
from dataset_tools.photo_masks import PHOTO_SUFFIXES
from dataset_tools.picture_tables import PictureTable
from dataset_tools.records import Split
from dataset_tools.settings import Settings

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_PARTS = {"id": ".+", "group": "[^/]+", "split": "[^/]+"}
"""What may stand for each placeholder."""
_SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class LayoutSettings(Settings):
    """Where each pair's pictures are, relative to the root.

    Without ``table``: patterns of file names, such as ``shot/{id}.*``. ``{id}`` is what a pair's files have in common;
    ``{group}`` (scene) and ``{split}`` may stand beside it; ``*`` is anything but a slash. With ``table``: columns.
    """

    table: str = ""
    """Pattern of Parquet files, such as ``data/*.parquet``; all else names their columns then. Pictures in them are
    bytes, or ``{bytes, path}`` as Hugging Face ``datasets`` writes them."""
    image: str
    """The pictures."""
    background: str = ""
    """Their clean plates; empty: the set has none, and can be built as ``real`` only."""
    masks: str = ""
    """Masks, one file a person or several people in one (`dataset_tools.mask_files`); empty: there are none, and a
    network or the difference of picture and plate finds the people."""
    effects: str = ""
    """Masks of shadows and reflections, with the people in them or without; empty: they are not known."""
    id: str = ""
    """Column of what identifies a pair; empty: file and row do."""
    group: str = ""
    """Column of the scene; empty: each pair is one of its own."""
    split: str = ""
    """Column of the split; empty: splits follow from shares."""

    @model_validator(mode="after")
    def _patterns(self) -> LayoutSettings:
        if self.table:
            return self
        if self.id or self.group or self.split:
            raise ValueError("id, group and split name columns of a table; in patterns of files write {id} and so on")
        known = set(_PLACEHOLDER.findall(self.image))
        if "id" not in known or not known <= _PARTS.keys():
            raise ValueError(f"image: {self.image!r} is to have {{id}}, and may have {{group}} and {{split}}")
        for name in ("background", "masks", "effects"):
            pattern = getattr(self, name)
            if pattern and not {"id"} <= set(_PLACEHOLDER.findall(pattern)) <= known:
                raise ValueError(f"{name}: {pattern!r} is to have {{id}}, and no other names in braces than image has")
        return self


Rows = Iterator[tuple[str, str, PairRow | Rejected]]
"""Where each pair stands, what it is called there, and its row or why there is none."""


def rows_of_files(layout: LayoutSettings, names: Sequence[str]) -> Rows:
    """The pairs among files.

    Args:
        layout: patterns.
        names: of all files, sorted.

    Raises:
        UserError: no file is a picture of a pair.
    """
    pictures = [name for name in names if name.lower().endswith(PHOTO_SUFFIXES)]
    pattern = re.compile(_expression(layout.image, {}))
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    unusable: list[tuple[str, Rejected]] = []
    for name in names:
        match = pattern.fullmatch(name)
        if match and not is_unicode(name):
            unusable.append((name, _not_unicode(name)))
        elif match and not name.lower().endswith(PHOTO_SUFFIXES):
            what = f"{name} is not one of {', '.join(PHOTO_SUFFIXES)}"
            unusable.append((name, Rejected("unknown-suffix", what)))
        elif match:
            found.setdefault(tuple(match.groupdict().items()), []).append(name)
    if not found:
        raise UserError(f"layout.image: no picture matches {layout.image}")
    for name, error in unusable:
        yield name, name, error
    folders = sorted({name[: k + 1] for name in pictures for k, letter in enumerate(name) if letter == "/"})

    def files(part: str, values: dict[str, str]) -> list[str]:
        return _matching(part, values, pictures, folders) if part else []

    for values, images in found.items():
        told = dict(values)
        called = "-".join(told.values())
        try:
            rows = {name: files(getattr(layout, name), told) for name in ("background", "masks", "effects")}
            if unreadable := [name for some in rows.values() for name in some if not is_unicode(name)]:
                raise _not_unicode(unreadable[0])
            for name, some in (("image", images), ("background", rows["background"]), ("effects", rows["effects"])):
                if len(some) > 1:
                    raise Rejected("ambiguous-pair", f"{' and '.join(some)} are both its {name}")
            for name, reason in (("background", "no-plate"), ("masks", "no-mask")):
                if getattr(layout, name) and not rows[name]:
                    raise Rejected(reason, f"no file matches {_filled(getattr(layout, name), told)}")
            row = PairRow(
                id=_key(called),
                group=told.get("group", called),
                image=images[0],
                background="".join(rows["background"]),
                masks=rows["masks"],
                effects="".join(rows["effects"]),
                split=_split(told.get("split")),
                title=called,
            )
        except Rejected as error:
            yield images[0], called, error
        else:
            yield images[0], called, row


def _not_unicode(name: str) -> Rejected:
    return Rejected("name-not-unicode", f"{printable(name)} has a name that is not UTF-8: rename it")


def rows_of_tables(layout: LayoutSettings, names: Sequence[str], table_of: Callable[[str], PictureTable]) -> Rows:
    """The pairs in Parquet files. A picture is called ``FILE#ROW#COLUMN`` (`cell_of`).

    Args:
        layout: columns.
        names: of all files, sorted.
        table_of: opens one of them.

    Raises:
        UserError: there is no such file, it cannot be read, or it lacks a column.
    """
    tables = [name for name in names if re.fullmatch(_expression(layout.table, {}), name)]
    if not tables:
        raise UserError(f"layout.table: no file matches {layout.table}")
    told = [column for column in (layout.id, layout.group, layout.split) if column]
    pictures = [column for column in (layout.image, layout.background, layout.masks, layout.effects) if column]
    for name in tables:
        table = table_of(name)
        table.check([*told, *pictures])
        for number, values in enumerate(table.values(told)):
            where = f"row {number + 1} of {name}"
            called = _text(values.get(layout.id)) or f"{name.removesuffix('.parquet')}-{number + 1:06d}"

            def cell(column: str, name: str = name, number: int = number) -> str:
                return f"{name}#{number}#{column}" if column else ""

            try:
                row = PairRow(
                    id=_key(called),
                    group=_text(values.get(layout.group)) or called,
                    image=cell(layout.image),
                    background=cell(layout.background),
                    masks=[cell(layout.masks)] if layout.masks else [],
                    effects=cell(layout.effects),
                    split=_split(values.get(layout.split)),
                    title=called,
                )
            except Rejected as error:
                yield where, called, error
            else:
                yield where, called, row


def cell_of(name: str) -> tuple[str, int, str]:
    """File, row from 0 and column of a picture in a table, as `rows_of_tables` calls it."""
    file, row, column = name.rsplit("#", 2)
    return file, int(row), column


def _filled(pattern: str, values: dict[str, str]) -> str:
    """A pattern with what its placeholders stand for."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], pattern)


def _expression(pattern: str, values: dict[str, str]) -> str:
    """A regular expression for a pattern; placeholders without a value become groups of it."""
    text, at, seen = "", 0, set()
    for match in re.finditer(r"\{(\w+)\}|\*", pattern):
        text += re.escape(pattern[at : match.start()])
        at, name = match.end(), match[1]
        if name is None:
            text += "[^/]*"
        elif name in values:
            text += re.escape(values[name])
        else:
            text += f"(?P={name})" if name in seen else f"(?P<{name}>{_PARTS[name]})"
            seen.add(name)
    return text + re.escape(pattern[at:])


def _matching(pattern: str, values: dict[str, str], names: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Those of the sorted names that match a pattern; only names that begin as it does are looked at."""
    before = pattern[: pattern.index("{")]
    before = before[: before.rfind("/") + 1]
    starts = [before]
    if "*" in before:
        depth = before.count("/")
        fitting = re.compile(_expression(before, {}))
        starts = [folder for folder in folders if folder.count("/") == depth and fitting.fullmatch(folder)]
    found, rest = [], pattern[len(before) :]
    for start in starts:
        expression = re.compile(re.escape(start) + _expression(rest, values))
        literal = start + _filled(rest.split("*")[0], values)
        for at in range(bisect_left(names, literal), len(names)):
            if not names[at].startswith(literal):
                break
            if expression.fullmatch(names[at]):
                found.append(names[at])
    return found


def _key(called: str) -> str:
    """An id that a key of a sample can hold: what a pair is called, where that is one, else with its digest."""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", called):
        return called
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", called).strip("-")[:60]
    return f"{plain}-{hashlib.sha256(called.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _split(name: object) -> Split | None:
    if name is None:
        return None
    if (split := _SPLITS.get(str(name).lower())) is None:
        raise Rejected("bad-split", f"split {name!r} is none of {', '.join(_SPLITS)}")
    return split
