"""Reading OpenImages' annotation tables with DuckDB: usable rows into tables of a connection, the others reported."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from dataset_tools.errors import UserError
from dataset_tools.records import Rejection, Split

IMAGE_ID = re.compile(r"[0-9a-f]{16}")
MASK_PATH = re.compile(r"[0-9a-f]{16}_[a-z][0-9a-z_]*_[0-9a-f]+\.png")
CLASSES = "v5/class-descriptions-boxable.csv"
TABLES: dict[Split, dict[str, str]] = {
    "train": {
        "boxes": "v6/oidv6-train-annotations-bbox.csv",
        "masks": "v5/train-annotations-object-segmentation.csv",
        "metadata": "2018_04/train/train-images-boxable-with-rotation.csv",
        "labels": "v7/oidv7-train-annotations-human-imagelabels.csv",
    },
    "validation": {
        "boxes": "v5/validation-annotations-bbox.csv",
        "masks": "v5/validation-annotations-object-segmentation.csv",
        "metadata": "2018_04/validation/validation-images-with-rotation.csv",
        "labels": "v7/oidv7-val-annotations-human-imagelabels.csv",
    },
    "test": {
        "boxes": "v5/test-annotations-bbox.csv",
        "masks": "v5/test-annotations-object-segmentation.csv",
        "metadata": "2018_04/test/test-images-with-rotation.csv",
        "labels": "v7/oidv7-test-annotations-human-imagelabels.csv",
    },
}
"""Where each table of a split lies below the root, as in the public bucket; a mirror may have a ``.parquet`` file of
the same name instead."""
MAX_FAULTS = 100_000
"""A table with more faults than that is not the table it is taken for."""


@dataclass(frozen=True)
class Table:
    """An annotation table."""

    path: str
    """Local path; ``.parquet``, or CSV."""
    name: str
    """What messages call it."""

    @property
    def is_csv(self) -> bool:
        return Path(self.path).suffix != ".parquet"


@dataclass(frozen=True)
class Kind:
    """What is read of one kind of table, and when a row of it can be used."""

    columns: dict[str, str]
    """Name and SQL type of the columns that are read."""
    required: tuple[str, ...]
    """Columns that may not be empty."""
    checks: dict[str, str]
    """Reason of a rejection to the SQL condition that a good row meets."""
    key: tuple[str, ...] = ()
    """Rows that agree in these are duplicates; none: repetition means nothing."""


def _box_check(prefix: str) -> str:
    ranges = [f"{prefix}{a}Min >= 0 AND {prefix}{a}Max <= 1 AND {prefix}{a}Min < {prefix}{a}Max" for a in "XY"]
    return " AND ".join(ranges)


_MASK_NAME = "ImageID || '_' || replace(LabelName, '/', '') || '_' || BoxID || '.png'"
_FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction")
_COORDINATES = ("XMin", "XMax", "YMin", "YMax")
BOXES = Kind(
    columns={
        "ImageID": "VARCHAR",
        "LabelName": "VARCHAR",
        **dict.fromkeys(_COORDINATES, "DOUBLE"),
        **dict.fromkeys(_FLAGS, "TINYINT"),
    },
    required=("ImageID", "LabelName", *_COORDINATES, *_FLAGS),
    # -1 stands for "unknown" and counts as no.
    checks={"bad-box": _box_check(""), "bad-flag": " AND ".join(f"{flag} BETWEEN -1 AND 1" for flag in _FLAGS)},
    key=("ImageID", "LabelName", *_COORDINATES),
)
MASKS = Kind(
    columns={
        "MaskPath": "VARCHAR",
        "ImageID": "VARCHAR",
        "LabelName": "VARCHAR",
        "BoxID": "VARCHAR",
        **{f"Box{name}": "DOUBLE" for name in _COORDINATES},
        "PredictedIoU": "DOUBLE",
    },
    required=("MaskPath", "ImageID", "LabelName", "BoxID", *(f"Box{name}" for name in _COORDINATES)),
    checks={
        "bad-box": _box_check("Box"),
        # Full match and equality: what passes is safe as a file name and can be put together again from its parts.
        "bad-mask-path": f"regexp_full_match(MaskPath, '{MASK_PATH.pattern}') AND MaskPath = {_MASK_NAME}",
    },
    key=("ImageID", "BoxID"),
)
LABELS = Kind(
    columns={"ImageID": "VARCHAR", "LabelName": "VARCHAR", "Confidence": "DOUBLE"},
    required=("ImageID", "LabelName", "Confidence"),
    checks={"bad-confidence": "Confidence BETWEEN 0 AND 1"},
)
_TEXTS = ("OriginalURL", "OriginalLandingURL", "License", "AuthorProfileURL", "Author", "Title", "OriginalMD5")
METADATA = Kind(
    columns={"ImageID": "VARCHAR", **dict.fromkeys(_TEXTS, "VARCHAR"), "Rotation": "DOUBLE"},
    required=("ImageID",),
    # Rotation is empty or NaN where it is not known.
    checks={"bad-rotation": "coalesce(isnan(Rotation) OR Rotation IN (0, 90, 180, 270), true)"},
    key=("ImageID",),
)

_REASONS = {
    "CAST": "bad-number",
    "MISSING COLUMNS": "missing-column",
    "TOO MANY COLUMNS": "too-many-columns",
    "UNQUOTED VALUE": "unclosed-quote",
    "INVALID ENCODING": "not-utf8",
    "LINE SIZE OVER MAXIMUM": "line-too-long",
}
_MESSAGES = {
    "missing-value": "a required value is empty",
    "bad-number": "a number cannot be read",
    "bad-image-id": "the image id is not 16 hexadecimal digits",
    "bad-box": "the box is not within 0..1, or has no area",
    "bad-flag": "a flag is not -1, 0 or 1",
    "bad-mask-path": "MaskPath is not made of ImageID, class and BoxID",
    "bad-confidence": "the confidence is not within 0..1",
    "bad-rotation": "the rotation is not 0, 90, 180 or 270",
}


class TableReader:
    """Reads tables into a DuckDB connection and collects a `Rejection` for each row that cannot be used."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, folder: Path) -> None:
        self.connection = connection
        self.folder = folder
        self.rejected: list[Rejection] = []
        self.scans = 0
        self.mended: dict[str, str] = {}
        """Paths of tables whose lines end in two ways, to copies in which they end in one."""

    def load(self, name: str, split: Split, table: Table, kind: Kind, wanted: str) -> list[str]:
        """Read the wanted rows of a table into the temporary table ``name``; report those that cannot be used.

        Of rows that are not wanted only what the parser finds wrong with them is reported.

        Returns:
            Ids of the images, 16 hexadecimal digits, of which a row cannot be used, and says what nobody knows now.
        """
        reported = len(self.rejected)
        rows = _usable_rows(kind, wanted)
        columns = ", ".join(column for column in kind.columns if column not in ("ImageID", "MaskPath"))
        self.connection.execute("SET preserve_insertion_order = false")
        _, rejects = self._read(
            table,
            kind,
            lambda scan: (
                f"CREATE OR REPLACE TEMP TABLE {name} AS SELECT id, {columns}, problem, "
                f"CASE WHEN problem IS NOT NULL THEN ImageID END AS bad_id FROM {rows(scan)}"
            ),
        )
        self._report_unparsed(split, table, rejects)
        key = ", ".join("id" if column == "ImageID" else column for column in kind.key) or "NULL"
        self.connection.execute(
            f"CREATE OR REPLACE TEMP TABLE repeated AS SELECT hash({key}) AS h, any_value(id) AS id, count(*) AS n "
            f"FROM {name} WHERE problem IS NULL AND {bool(kind.key)} GROUP BY {key} HAVING count(*) > 1"
        )
        faults = self._refuse_many(
            table,
            f"SELECT (SELECT count(*) FROM {name} WHERE problem IS NOT NULL) + coalesce(sum(n), 0) FROM repeated",
        )
        if faults > 0:
            self._report_unusable(name, split, table, kind, rows, key, faults)
            self.connection.execute(f"DELETE FROM {name} WHERE problem IS NOT NULL")
        lost = (row.image_id for row in self.rejected[reported:] if row.reason != "repeated-row")
        return sorted({image for image in lost if IMAGE_ID.fullmatch(image)})

    def _report_unparsed(self, split: Split, table: Table, rejects: str | None) -> None:
        """Report the lines that the CSV parser set aside."""
        if rejects is None:
            return
        self._refuse_many(table, f"SELECT count(*) FROM {rejects}")
        rows = self.connection.execute(
            f"SELECT line, arg_min(error_type, column_idx), arg_min(error_message, column_idx), any_value(csv_line) "
            f"FROM {rejects} GROUP BY line ORDER BY line"
        ).fetchall()
        place = _header(table).index("ImageID")
        for line, error, message, text in rows:
            values = text.strip("\r\n").split(",")
            image = values[place].strip('"')[:80] if place < len(values) else ""
            reason = _REASONS.get(error, "unreadable-row")
            self._reject_row(split, image, reason, f"{table.name}, line {line}: {' '.join(message.split())}")

    def _report_unusable(
        self, name: str, split: Split, table: Table, kind: Kind, rows: Callable[[str], str], key: str, expected: int
    ) -> None:
        """Report rows that could be parsed and cannot be used, and rows that are there twice.

        DuckDB's CSV reader does not number rows, so that a second pass must find them. Copying the lines of the
        images in question to a small table and numbering that is three times as fast as numbering all rows in
        DuckDB; values that contain line breaks defeat it, which the number of rows found tells.
        """
        unit = "line" if table.is_csv else "row"
        found: list[tuple[int, str | None, str | None, int]] = []
        if table.is_csv:
            ids = self.connection.execute(
                f"SELECT coalesce(bad_id, '') FROM {name} WHERE problem IS NOT NULL "
                "UNION SELECT printf('%016x', id) FROM repeated"
            ).fetchall()
            excerpt = Table(str(self.folder / "excerpt.csv"), table.name)
            lines = _copy_lines(table, {image.encode() for (image,) in ids}, excerpt.path)
            found = [(lines[row[0] - 1], *row[1:]) for row in self._number_rows(excerpt, kind, rows, key)]
        if len(found) != expected:
            found = self._number_rows(table, kind, rows, key)
        first: dict[int, int] = {}
        for number, image, problem, h in found:
            where = f"{table.name}, {unit} {number}"
            if problem is not None:
                self._reject_row(split, image or "", problem, f"{where}: {_MESSAGES[problem]}")
            elif first.setdefault(h, number) != number:
                agreed = ", ".join(kind.key)
                self._reject_row(split, image or "", "repeated-row", f"{where}: has the {agreed} of {unit} {first[h]}")

    def _number_rows(
        self, table: Table, kind: Kind, rows: Callable[[str], str], key: str
    ) -> list[tuple[int, str | None, str | None, int]]:
        """Line (CSV) or row (Parquet), image id, problem and hash of the key of all unusable and repeated rows."""
        self.connection.execute("SET preserve_insertion_order = true")
        found, rejects = self._read(
            table,
            kind,
            lambda scan: (
                f"SELECT number, left(ImageID, 80), problem, h FROM (SELECT *, hash({key}) AS h "
                f"FROM {rows(f'(SELECT row_number() OVER () AS number, * FROM {scan})')}) "
                "WHERE problem IS NOT NULL OR h IN (SELECT h FROM repeated) ORDER BY number"
            ),
        )
        if rejects is None:
            return found
        # Only rows that could be parsed were counted: the header and the other lines come on top.
        lines = self.connection.execute(f"SELECT DISTINCT line FROM {rejects} ORDER BY line")
        skipped = [line for (line,) in lines.fetchall()]
        numbered, before = [], 1
        for number, image, problem, h in found:
            while before <= len(skipped) and skipped[before - 1] <= number + before:
                before += 1
            numbered.append((number + before, image, problem, h))
        return numbered

    def _scan(self, table: Table, kind: Kind) -> tuple[str, str | None]:
        """SQL for the columns of a table, and for ``unreadable``: a value that does not fit its column's type.

        Also the name of the table that takes the lines of a CSV file that cannot be parsed.
        """
        if not table.is_csv:
            typed = {column: f'TRY_CAST("{column}" AS {sql_type})' for column, sql_type in kind.columns.items()}
            values = ", ".join(f"{value} AS {column}" for column, value in typed.items())
            lost = " OR ".join(f'("{column}" IS NOT NULL AND {value} IS NULL)' for column, value in typed.items())
            return f"(SELECT {values}, ({lost}) AS unreadable FROM read_parquet({quoted(table.path)}))", None
        self.scans += 1
        path = self.mended.get(table.path, table.path)
        rejects = f"rejects_{self.scans}"
        types = ", ".join(f"{quoted(column)}: '{kind.columns.get(column, 'VARCHAR')}'" for column in _header(table))
        return (
            f"(SELECT {', '.join(kind.columns)}, false AS unreadable FROM read_csv({quoted(path)}, "
            f"columns = {{{types}}}, auto_detect = false, header = true, delim = ',', quote = '\"', escape = '\"', "
            f"store_rejects = true, rejects_table = '{rejects}', rejects_scan = '{rejects}_scan', "
            f"rejects_limit = {MAX_FAULTS + 1}))"
        ), rejects

    def _read(self, table: Table, kind: Kind, query: Callable[[str], str]) -> tuple[list[Any], str | None]:
        """Result of a query over the scan of a table, and the name of the table of lines that could not be parsed.

        DuckDB takes lines that end in LF or in CRLF, and refuses files that have both, which editing a few rows
        elsewhere makes. (With ``strict_mode`` off it takes them, miscounts lines, and takes what is no CSV.)
        """
        scan, rejects = self._scan(table, kind)
        try:
            return self.connection.execute(query(scan)).fetchall(), rejects
        except duckdb.Error as error:
            if table.is_csv and table.path not in self.mended and _mixes_line_ends(table.path):
                self.mended[table.path] = str(self.folder / f"mended-{len(self.mended)}.csv")
                with open(table.path, "rb") as lines, open(self.mended[table.path], "wb") as copy:
                    copy.writelines(map(_with_plain_end, lines))
                return self._read(table, kind, query)
            raise UserError(f"{table.name} cannot be read: {' '.join(str(error).split())[:300]}") from None

    def _refuse_many(self, table: Table, count: str) -> int:
        ((faults,),) = self.connection.execute(count).fetchall()
        if faults > MAX_FAULTS:
            raise UserError(f"{table.name} has more than {MAX_FAULTS} faults: is this the right table?")
        return int(faults)

    def _reject_row(self, split: Split, image: str, reason: str, message: str) -> None:
        self.rejected.append(Rejection(split, image, "", "curate", "row-rejected", reason, message))


def _usable_rows(kind: Kind, wanted: str) -> Callable[[str], str]:
    """SQL from a scan to its wanted rows with their ``id`` and their ``problem``, which is NULL in usable rows."""
    valid_id = f"coalesce(regexp_full_match(ImageID, '{IMAGE_ID.pattern}'), false)"
    empty = " OR ".join(f"{column} IS NULL" for column in kind.required)
    problem = (
        f"CASE WHEN unreadable THEN 'bad-number' WHEN {empty} THEN 'missing-value' "
        f"WHEN NOT {valid_id} THEN 'bad-image-id' "
        + " ".join(f"WHEN NOT ({check}) THEN '{reason}'" for reason, check in kind.checks.items())
        + " END"
    )
    # Ids of rows of other classes are not looked at: that alone would take a third of the time.
    looked_at = "LabelName IS NULL" if "LabelName" in kind.columns else f"NOT {valid_id}"
    return lambda scan: (
        f"(SELECT *, TRY_CAST('0x' || ImageID AS UBIGINT) AS id, {problem} AS problem "
        f"FROM {scan} WHERE {wanted} OR unreadable OR {looked_at})"
    )


def _copy_lines(table: Table, ids: set[bytes], target: str) -> list[int]:
    """Copy the header and the lines of some images; return their numbers."""
    place = _header(table).index("ImageID")
    ids = ids | {b'"%s"' % image for image in ids}
    numbers = [1]
    with open(table.path, "rb") as lines, open(target, "wb") as copy:
        copy.write(_with_plain_end(next(lines)))
        for number, line in enumerate(lines, 2):
            line = _with_plain_end(line)
            values = line.rstrip(b"\n").split(b",", place + 1)
            if len(values) > place and values[place] in ids:
                copy.write(line)
                numbers.append(number)
    return numbers


def _with_plain_end(line: bytes) -> bytes:
    return line[:-2] + b"\n" if line.endswith(b"\r\n") else line


def _mixes_line_ends(path: str) -> bool:
    """Whether some lines of a file end in CRLF and others in LF."""
    with open(path, "rb") as lines:
        ends = {line.endswith(b"\r\n") for line in lines if line.endswith(b"\n")}
    return len(ends) == 2


def check_header(table: Table, kind: Kind) -> None:
    """Raise a `UserError` that names the columns of ``kind`` that the table lacks."""
    header = _header(table)
    missing = [column for column in kind.columns if column not in header]
    if missing:
        raise UserError(
            f"{table.name}: column {', '.join(missing)} is missing; the header has {', '.join(header)[:300]}"
        )


def _header(table: Table) -> list[str]:
    """Column names of a table."""
    if not table.is_csv:
        with duckdb.connect() as connection:
            try:
                rows = connection.execute(f"DESCRIBE FROM read_parquet({quoted(table.path)})").fetchall()
            except duckdb.Error as error:
                raise UserError(f"{table.name} cannot be read: {' '.join(str(error).split())[:300]}") from None
        return [row[0] for row in rows]
    try:
        with open(table.path, "rb") as file:
            return next(csv.reader([file.readline(65536).decode("utf-8-sig")]), [])
    except FileNotFoundError:
        raise UserError(f"{table.name} does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table.name} cannot be read: {error}") from None


def read_classes(table: Table) -> dict[str, str]:
    """Display name to MID. The file has no header."""
    try:
        with open(table.path, encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except FileNotFoundError:
        raise UserError(f"{table.name} does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table.name} cannot be read: {error}") from None
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise UserError(f"{table.name}, line {number}: expected a class id and a name, found {len(row)} values")
    return {name: mid for mid, name in rows}


def quoted(text: str) -> str:
    """A string literal of SQL."""
    return "'" + text.replace("'", "''") + "'"
