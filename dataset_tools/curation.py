"""Which images: queries over OpenImages' annotation tables, whatever their size.

DuckDB reads the CSV or Parquet files in parallel, keeps the rows of people only, and spills to disk beyond
`MEMORY`; Python sees the chosen images alone, a few at a time. Nothing depends on the order of rows or on the number of
threads: images are chosen, and listed, in the order of ``md5(seed || image id)``.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import duckdb
from pydantic import Field

from dataset_tools.choice import MOST, ChoiceSettings, Fraction
from dataset_tools.errors import UserError
from dataset_tools.record_file import RecordFile
from dataset_tools.records import PEOPLE, SPLITS, Curation, ImageRecord, InstanceRecord, Rejection, Role, Split
from dataset_tools.tables import BOXES, LABELS, MASKS, METADATA, Table, TableReader, check_header, quoted, read_classes

STRATA = ("one", "two_or_three", "four_or_more", "overlapping")
PART_PREFIX = "Human "
"""OpenImages' classes for parts of people start so: Human face, Human hand and so on."""

MEMORY = "1GB"
"""What DuckDB may use before it spills to disk; the process as a whole stays below twice that."""


class CurationSettings(ChoiceSettings):
    """Which images and people are chosen."""

    people_classes: tuple[str, ...] = Field(PEOPLE, min_length=1)
    """Display names of the classes whose boxes and masks are people."""
    allow_occluded: bool = True
    """Choose pictures in which something hides part of a person."""
    allow_truncated: bool = True
    """Choose pictures in which a person goes beyond the edge."""
    allow_group_of: bool = False
    """Choose pictures with a box that stands for a crowd."""
    allow_depictions: bool = False
    """Choose pictures with a drawn, printed or sculpted person."""
    max_unmasked_people: int = Field(0, ge=0, le=MOST)
    """Most people in a picture who have a box but no usable mask. An instance network gives them masks; a picture in
    which somebody then still has none is set aside."""
    min_predicted_iou: Fraction = 0.0
    """Least PredictedIoU of a usable mask. Masks without that value are usable."""
    same_person_iou: float = Field(0.9, gt=0, le=1)
    """Boxes that overlap by at least this intersection over union are one person, whatever their classes."""
    licences: tuple[str, ...] = Field(("https://creativecommons.org/licenses/by/2.0",), min_length=1)
    """Prefixes of the licence URLs that are allowed."""


@dataclass(frozen=True)
class SplitTables:
    """The tables of one split."""

    boxes: Table
    masks: Table
    metadata: Table
    labels: Table | None = None
    """Image-level labels verified by people; needed for backgrounds only."""


def curate(
    classes: Table,
    tables: Mapping[Split, SplitTables],
    settings: CurationSettings,
    image_path: Callable[[Split, str], str],
    *,
    source: str = "openimages",
    threads: int | None = None,
) -> Curation:
    """Choose images with people, and backgrounds without.

    Args:
        classes: ``class-descriptions-boxable.csv``.
        tables: the tables of each split to use.
        settings: which images are wanted.
        image_path: split and image id to ``ImageRecord.image``.
        source: ``ImageRecord.source``.
        threads: of DuckDB; all cores where None.

    Returns:
        The images in the order of split, role, md5(seed || id); and a `Rejection` for every row that could not be
        used, every image whose metadata are missing and every photograph that is there twice. Images that the
        settings do not ask for are no rejections.

    Raises:
        UserError: a table or column is missing, a class is unknown, or a table is mostly unusable.
    """
    names = read_classes(classes)
    people, (person,) = _mids(names, settings.people_classes, classes), _mids(names, PEOPLE[:1], classes)
    for split, files in tables.items():
        if files.labels is None and settings.backgrounds != 0:
            raise UserError(f"backgrounds of the {split} split need the table of labels that people verified")
        for table, kind in [(files.masks, MASKS), (files.boxes, BOXES), (files.metadata, METADATA)]:
            check_header(table, kind)
        if files.labels is not None and settings.backgrounds != 0:
            check_header(files.labels, LABELS)
    with tempfile.TemporaryDirectory(prefix="curation-") as folder, duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")
        connection.execute(f"SET memory_limit = '{MEMORY}'")
        connection.execute(f"SET temp_directory = {quoted(folder)}")
        if threads is not None:
            connection.execute(f"SET threads = {threads}")
        job = _Job(TableReader(connection, Path(folder)), settings, names, people, person)
        for split in SPLITS:
            if split in tables:
                job.add_split(split, tables[split])
        job.drop_repeated_photos()
        records = RecordFile(job.choose(image_path, source))
    return Curation(records, job.reader.rejected + job.rejected)


class _Job:
    """One curation: candidates are gathered split by split, then chosen."""

    def __init__(
        self,
        reader: TableReader,
        settings: CurationSettings,
        names: dict[str, str],
        people: list[str],
        person: str,
    ) -> None:
        self.reader, self.connection = reader, reader.connection
        self.settings = settings
        self.rejected: list[Rejection] = []
        self.names = names
        self.people, self.person = _list(people), quoted(person)
        somebody = {mid for name, mid in names.items() if name in PEOPLE or name.startswith(PART_PREFIX)}
        self.somebody = _list(sorted(somebody | set(people)))
        self.connection.execute(
            """
            CREATE TEMP TABLE candidate (split VARCHAR, role VARCHAR, stratum VARCHAR, id UBIGINT, license VARCHAR,
                author VARCHAR, author_url VARCHAR, title VARCHAR, url VARCHAR, landing_url VARCHAR, md5 VARCHAR,
                rotation SMALLINT);
            CREATE TEMP TABLE instance (split VARCHAR, id UBIGINT, box_id VARCHAR, label VARCHAR,
                x0 DOUBLE, y0 DOUBLE, x1 DOUBLE, y1 DOUBLE, occluded BOOLEAN, truncated BOOLEAN);
            """
        )

    def add_split(self, split: Split, tables: SplitTables) -> None:
        """Read the tables of one split and add its candidates."""
        masks = self.reader.load("masks", split, tables.masks, MASKS, f"LabelName IN {self.people}")
        boxes = self.reader.load("boxes", split, tables.boxes, BOXES, f"LabelName IN {self.somebody}")
        self._find_people()
        labels = self._find_backgrounds(split, tables)
        self._leave_out(split, boxes, "unusable-box", "boxes")
        self._leave_out(split, masks, "unusable-mask", "masks")
        self._leave_out(split, labels, "unusable-label", "labels")
        self.reader.load("metadata", split, tables.metadata, METADATA, "id IN (SELECT id FROM picture)")
        self._add_metadata(split)

    def _find_people(self) -> None:
        """Merge the boxes of each person and make ``person`` (with masks) and ``picture`` (that meet the settings)."""
        s = self.settings
        self.connection.execute(
            f"""
            CREATE OR REPLACE TEMP TABLE person_box AS
            SELECT id, LabelName AS label, XMin AS x0, YMin AS y0, XMax AS x1, YMax AS y1,
                bool_or(IsOccluded = 1) AS occluded, bool_or(IsTruncated = 1) AS truncated,
                bool_or(IsGroupOf = 1) AS group_of, bool_or(IsDepiction = 1) AS depiction
            FROM boxes WHERE LabelName IN {self.people} AND id IN (SELECT id FROM masks)
            GROUP BY ALL;

            -- Every mask and every box is somebody; rank 1 of a picture is the description to be trusted most.
            CREATE OR REPLACE TEMP TABLE description AS
            SELECT *, row_number() OVER (PARTITION BY id ORDER BY box_id IS NULL, iou DESC NULLS LAST,
                label = {self.person}, box_id, label, x0, y0, x1, y1) AS rank
            FROM (
                SELECT id, label, x0, y0, x1, y1, occluded, truncated, NULL AS box_id, NULL AS iou
                FROM person_box
                UNION ALL
                SELECT id, LabelName, BoxXMin, BoxYMin, BoxXMax, BoxYMax, false, false, BoxID,
                    CASE WHEN NOT isnan(PredictedIoU) THEN PredictedIoU END
                FROM (SELECT * FROM masks m QUALIFY row_number() OVER (PARTITION BY id, BoxID ORDER BY m) = 1)
                WHERE PredictedIoU IS NULL OR isnan(PredictedIoU) OR PredictedIoU >= {s.min_predicted_iou}
            );

            CREATE OR REPLACE TEMP TABLE same AS
            SELECT id, a.rank AS rank, b.rank AS other, b.occluded, b.truncated
            FROM description a JOIN description b USING (id),
                LATERAL (SELECT greatest(0, least(a.x1, b.x1) - greatest(a.x0, b.x0))
                    * greatest(0, least(a.y1, b.y1) - greatest(a.y0, b.y0)) AS shared) i
            WHERE a.rank < b.rank AND shared >= {s.same_person_iou} *
                ((a.x1 - a.x0) * (a.y1 - a.y0) + (b.x1 - b.x0) * (b.y1 - b.y0) - shared);

            -- A flag on any description of a person holds for the person.
            CREATE OR REPLACE TEMP TABLE person AS
            SELECT d.* REPLACE (d.occluded OR coalesce(f.occluded, false) AS occluded,
                d.truncated OR coalesce(f.truncated, false) AS truncated)
            FROM description d ANTI JOIN same ON d.id = same.id AND d.rank = same.other
            LEFT JOIN (SELECT id, rank, bool_or(occluded) AS occluded, bool_or(truncated) AS truncated
                FROM same GROUP BY id, rank) f ON d.id = f.id AND d.rank = f.rank;

            CREATE OR REPLACE TEMP TABLE picture AS
            WITH crowd AS (
                SELECT id, count(box_id) AS masked, count(*) - count(box_id) AS unmasked,
                    coalesce(bool_or(occluded) FILTER (box_id IS NOT NULL), false) AS occluded,
                    coalesce(bool_or(truncated) FILTER (box_id IS NOT NULL), false) AS truncated,
                    min((x1 - x0) * (y1 - y0)) FILTER (box_id IS NOT NULL) AS least,
                    max((x1 - x0) * (y1 - y0)) FILTER (box_id IS NOT NULL) AS greatest
                FROM person GROUP BY id
            ),
            unwanted AS (
                SELECT DISTINCT id FROM person_box
                WHERE (group_of AND NOT {s.allow_group_of}) OR (depiction AND NOT {s.allow_depictions})
            ),
            overlapping AS (
                SELECT DISTINCT id FROM person a JOIN person b USING (id)
                WHERE a.rank < b.rank AND a.box_id IS NOT NULL AND b.box_id IS NOT NULL
                    AND a.x0 <= b.x1 AND b.x0 <= a.x1 AND a.y0 <= b.y1 AND b.y0 <= a.y1
            )
            SELECT id, 'people' AS role,
                CASE WHEN overlapping.id IS NOT NULL THEN 'overlapping' WHEN masked = 1 THEN 'one'
                    WHEN masked <= 3 THEN 'two_or_three' ELSE 'four_or_more' END AS stratum
            FROM crowd ANTI JOIN unwanted USING (id) LEFT JOIN overlapping USING (id)
            WHERE masked BETWEEN {s.min_people} AND {s.max_people or MOST} AND unmasked <= {s.max_unmasked_people}
                AND least >= {s.min_box_area} AND greatest <= {s.max_box_area}
                AND (NOT occluded OR {s.allow_occluded}) AND (NOT truncated OR {s.allow_truncated});
            """
        )

    def _find_backgrounds(self, split: Split, tables: SplitTables) -> list[str]:
        """Add to ``picture`` the images of which people said that nobody is there, and nothing says otherwise; gives
        the ids of those of which a label cannot be used."""
        if self.settings.backgrounds == 0:
            return []
        assert tables.labels is not None
        told = f"LabelName IN {self.somebody} AND (Confidence IS DISTINCT FROM 0 OR LabelName = {self.person})"
        unread = self.reader.load("labels", split, tables.labels, LABELS, told)
        self.connection.execute(
            """
            INSERT INTO picture
            SELECT id, 'background', '' FROM labels
            WHERE id NOT IN (SELECT id FROM boxes) AND id NOT IN (SELECT id FROM masks)
            GROUP BY id HAVING max(Confidence) = 0
            """
        )
        return unread

    def _leave_out(self, split: Split, unread: list[str], reason: str, table: str) -> None:
        """Take pictures out of ``picture`` with a box, mask or label that cannot be used: somebody may be there whom
        nobody knows."""
        if not unread:
            return
        images = f"printf('%016x', id) IN {_list(unread)}"
        found = self.connection.execute(f"SELECT printf('%016x', id) FROM picture WHERE {images} ORDER BY id")
        for (image,) in found.fetchall():
            self._reject_image(split, image, reason, f"one of its rows in the table of {table} cannot be used")
        self.connection.execute(f"DELETE FROM picture WHERE {images}")

    def _add_metadata(self, split: Split) -> None:
        """Join the pictures with their metadata; those with an allowed licence become candidates."""
        # The label table also covers images outside the set with boxes, whose metadata are in no table that is read:
        # for backgrounds a missing row is the rule and not reported.
        missing = self.connection.execute(
            "SELECT printf('%016x', id) FROM picture ANTI JOIN metadata USING (id) WHERE role = 'people' ORDER BY id"
        )
        for (image,) in missing.fetchall():
            self._reject_image(
                split, image, "missing-metadata", f"the metadata of the {split} split have no usable row"
            )
        allowed = " OR ".join(f"starts_with(License, {quoted(prefix)})" for prefix in self.settings.licences)
        self.connection.execute(
            f"""
            INSERT INTO candidate
            SELECT '{split}', role, stratum, id, License, Author, AuthorProfileURL, Title, OriginalURL,
                OriginalLandingURL, OriginalMD5, CASE WHEN isnan(Rotation) THEN 0 ELSE coalesce(Rotation, 0) END
            FROM picture JOIN
                (SELECT * FROM metadata m QUALIFY row_number() OVER (PARTITION BY id ORDER BY m) = 1) USING (id)
            WHERE {allowed};
            INSERT INTO instance
            SELECT '{split}', id, box_id, label, x0, y0, x1, y1, occluded, truncated
            FROM person WHERE id IN (SELECT id FROM candidate WHERE split = '{split}' AND role = 'people');
            """
        )

    def drop_repeated_photos(self) -> None:
        """Keep one candidate of each photograph: that of test before validation before train."""
        for same in ("id", "md5"):
            self.connection.execute(
                f"""
                CREATE OR REPLACE TEMP TABLE repeated AS
                SELECT split, id, first_value(split) OVER w AS kept_split, first_value(id) OVER w AS kept
                FROM candidate WHERE {same} IS NOT NULL AND {same}::VARCHAR <> ''
                WINDOW w AS (PARTITION BY {same} ORDER BY
                    list_position(['test', 'validation', 'train'], split), role <> 'people', id)
                QUALIFY row_number() OVER w > 1;
                DELETE FROM candidate WHERE (split, id) IN (SELECT split, id FROM repeated);
                """
            )
            rows = self.connection.execute(
                "SELECT split, printf('%016x', id), kept_split, printf('%016x', kept) FROM repeated ORDER BY ALL"
            )
            for split, image, kept_split, kept in rows.fetchall():
                self._reject_image(split, image, "repeated-photo", f"the same photograph is {kept_split} image {kept}")

    def choose(self, image_path: Callable[[Split, str], str], source: str) -> Iterator[ImageRecord]:
        """Choose within each stratum and build the records."""
        s = self.settings
        seed = f"'{s.seed}'"
        per_stratum = MOST if s.images_per_stratum is None else s.images_per_stratum
        backgrounds = MOST if s.backgrounds is None else s.backgrounds
        self.connection.execute(
            f"""
            CREATE TEMP TABLE chosen AS
            SELECT *, printf('%016x', id) AS image, md5({seed} || printf('%016x', id)) AS place FROM candidate
            QUALIFY row_number() OVER (PARTITION BY split, role, stratum ORDER BY place)
                <= CASE role WHEN 'people' THEN {per_stratum} ELSE {backgrounds} END
            """
        )
        rows = self.connection.execute(
            f"""
            SELECT image, split, role, stratum, rotation, coalesce(license, ''), coalesce(author, ''),
                coalesce(author_url, ''), coalesce(title, ''), coalesce(url, ''), coalesce(landing_url, ''), people
            FROM chosen LEFT JOIN
                (SELECT split, id, list((box_id, label, x0, y0, x1, y1, occluded, truncated)
                    ORDER BY box_id NULLS LAST, x0, y0, x1, y1, label)
                    AS people FROM instance GROUP BY split, id) USING (split, id)
            ORDER BY list_position({list(SPLITS)}, split), role DESC, place
            """
        )
        category = {mid: name for name, mid in self.names.items()}
        while batch := rows.fetchmany(1024):
            for (
                image,
                split,
                role,
                stratum,
                rotation,
                licence,
                author,
                author_url,
                title,
                url,
                landing,
                people,
            ) in batch:
                instances = tuple(
                    InstanceRecord(
                        id=box_id or f"box-{number}",
                        category=category[label],
                        box=(x0, y0, x1, y1),
                        mask=f"{image}_{label.replace('/', '')}_{box_id}.png" if box_id else "",
                        occluded=occluded,
                        truncated=truncated,
                    )
                    for number, (box_id, label, x0, y0, x1, y1, occluded, truncated) in enumerate(people or (), 1)
                )
                yield ImageRecord(
                    id=image,
                    source=source,
                    split=split,
                    role=cast(Role, role),
                    stratum=stratum,
                    image=image_path(split, image),
                    rotation=rotation,
                    licence=licence,
                    author=author,
                    author_url=author_url,
                    title=title,
                    url=url,
                    landing_url=landing,
                    instances=instances,
                )

    def _reject_image(self, split: Split, image: str, reason: str, message: str) -> None:
        self.rejected.append(Rejection(split, image, "", "curate", "image-rejected", reason, message))


def _mids(names: dict[str, str], wanted: Iterable[str], classes: Table) -> list[str]:
    unknown = [name for name in wanted if name not in names]
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0.0)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UserError(f"people_classes: {classes.name} has no class {unknown[0]!r}{hint}")
    return [names[name] for name in wanted]


def _list(values: Iterable[str]) -> str:
    return "(" + ", ".join(quoted(value) for value in values) + ")"
