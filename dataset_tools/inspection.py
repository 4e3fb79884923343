"""What a dataset holds: counts, sizes, people, overlap, effects, plates, licences, sources, and what was set aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from dataset_tools.credits import Credits
from dataset_tools.errors import UserError
from dataset_tools.schema import EffectKind, Makers
from dataset_tools.shard_table import read_shard_tables
from dataset_tools.shards import Shard, read_manifest, table_path
from dataset_tools.storage import open_root

QUANTILES = (0.25, 0.5, 0.75, 0.9, 1.0)
EFFECT_COLUMNS = (*get_args(EffectKind), "any")


class Range(BaseModel):
    """Smallest, middle and largest of some lengths, in pixels."""

    minimum: int
    median: float
    maximum: int


class Part(BaseModel):
    """What one configuration and split holds. Counters map a value to how often it occurs."""

    configuration: str
    split: str
    shards: int
    samples: int
    people: int
    bytes: int
    width: Range | None
    """None where there is no sample; likewise ``height``."""
    height: Range | None
    people_per_picture: dict[int, int]
    strata: dict[str, int]
    occluded: float
    """Share of people with occlusion > 0 (``composite``) or that the source flags as occluded (others), 0..1."""
    truncated: float
    """Share of people that the source says go beyond the picture, 0..1."""
    occlusion_quantiles: dict[float, float] | None
    """Quantile to occlusion, over the people with occlusion > 0; None where occlusion is unknown or always 0."""
    touching: float
    """Share of pictures in which two visible masks are `dataset_tools.masks.touching`, 0..1."""
    overlapping_boxes: float
    """Share of pictures in which the boxes of two people overlap, 0..1."""
    label_sets: dict[str, int]
    masks_by: dict[str, int]
    """Of people; what follows, of samples."""
    pose_by: dict[str, int]
    effects_known: float
    """Share of samples of which effects (shadows, reflections) are known, 0..1."""
    effects: dict[str, float]
    """Each kind, and ``any``, to the share of those samples that show one, 0..1; empty where there is no such sample.
    A sample that shows none of the kinds, but any, has effects whose kind nobody knows."""
    effects_by: dict[str, int]
    plate_known: float | None
    """Mean share of the clean plate that is known, 0..1; None without plates."""
    plates_by: dict[str, int]
    """What the plates are, with the method where one painted them, such as ``chosen (lama)``."""
    captions: float
    """Share of samples with a caption, 0..1."""
    networks: dict[str, int]
    """Cue, kind, network, package and digest of weights, to how many samples have it of them."""
    licences: dict[str, int]
    """Licence to how many different source pictures carry it; likewise ``sources``."""
    sources: dict[str, int]
    blurred: int
    """Faces, licence plates and the like that were blurred in pictures and backgrounds, each once."""


class RejectedCount(BaseModel):
    """How many rows of ``rejected.parquet`` share a stage, reason and outcome."""

    stage: str
    reason: str
    outcome: str
    count: int


class Inspection(BaseModel):
    """What a dataset holds; ``model_dump(mode="json")`` gives it as plain data."""

    name: str
    parts: list[Part]
    rejected: list[RejectedCount]


def inspect(root: str) -> Inspection:
    """Count what the dataset at ``root`` holds, from its manifest and its shards' tables; no sample is read.

    Raises:
        UserError: there is no dataset, or a file that its manifest lists is missing.
    """
    manifest = read_manifest(root)
    with Credits() as credits:
        parts = survey(root, manifest.shards, credits)
    rejected: list[RejectedCount] = []
    if "rejected.parquet" in manifest.files:
        filesystem, base = open_root(root)
        try:
            with filesystem.open(f"{base}/rejected.parquet", "rb") as file:
                rejected = count_rejected(pa.parquet.read_table(file))
        except (OSError, pa.ArrowException, KeyError, UnicodeDecodeError) as error:
            raise UserError(f"{base}/rejected.parquet cannot be read, build the dataset again: {error}") from None
    return Inspection(name=manifest.name, parts=parts, rejected=rejected)


def survey(root: str, shards: Mapping[str, Mapping[str, list[Shard]]], credits: Credits) -> list[Part]:
    """Read every shard's table once: what each part holds.

    Args:
        shards: configuration to split to shards, as in a manifest.
        credits: where the source pictures of all of them are added.
    """
    parts = []
    for configuration, splits in shards.items():
        for split, listed in splits.items():
            count = _Count(configuration)
            tables = read_shard_tables(root, (table_path(shard.path) for shard in listed))
            for shard, table in zip(listed, tables, strict=True):
                count.add(table)
                credits.add(configuration, split, shard.path, table)
            parts.append(count.part(split, listed, credits))
    return parts


def count_rejected(rejected: pa.Table) -> list[RejectedCount]:
    """Rows of a table of `dataset_tools.records.REJECTION_SCHEMA`, counted; the most frequent first."""
    columns = (rejected.column(name).to_pylist() for name in ("stage", "reason", "outcome"))
    counts = Counter(zip(*columns, strict=True))
    return [
        RejectedCount(stage=stage, reason=reason, outcome=outcome, count=count)
        for (stage, reason, outcome), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def as_tables(inspection: Inspection) -> list[Table]:
    """The inspection as tables for a terminal."""
    shards = _table(f"{inspection.name}: shards", "part")
    people = _table("People a picture", "part")
    overlap = _table("Overlap", "part")
    cues = _table("Cues", "part", "masks by", "pose by", "label set", "strata")
    origins = _table("Source pictures", "part", "source", "licence")
    effects = _table("Shadows, reflections, clean plates", "part", "effects by", "plate")
    for table, headings in [
        (shards, ("shards", "samples", "people", "size", "width", "height")),
        (people, ("1", "2", "3", "4", "5", "6+")),
        (overlap, ("occluded", "median", "90 %", "most", "truncated", "masks touch", "boxes overlap")),
        (effects, ("known", *EFFECT_COLUMNS, "plate known", "captions")),
    ]:
        for heading in headings:
            table.add_column(heading, justify="right")
    overlap.caption = "median, 90 %, most: share of a hidden person that is hidden"
    shards.caption = "width and height: smallest-median-largest, pixels"
    effects.caption = "shadow, reflection, any: of the pictures whose effects are known"
    for part in inspection.parts:
        name = f"{part.configuration}/{part.split}"
        counts = (f"{count:,}" for count in (part.shards, part.samples, part.people))
        shards.add_row(name, *counts, _size(part.bytes), _extent(part.width), _extent(part.height))
        people.add_row(name, *(f"{count:,}" for count in people_columns(part)))
        quantiles = part.occlusion_quantiles
        hidden = [f"{quantiles[q]:.0%}" if quantiles else "-" for q in (0.5, 0.9, 1.0)]
        shares = (f"{share:.0%}" for share in (part.truncated, part.touching, part.overlapping_boxes))
        overlap.add_row(name, f"{part.occluded:.0%}", *hidden, *shares)
        cues.add_row(
            name, *(Text(counted(counts)) for counts in (part.masks_by, part.pose_by, part.label_sets, part.strata))
        )
        origins.add_row(name, Text(counted(part.sources)), Text(counted(part.licences)))
        made_by = (Text(counted(counts)) for counts in (part.effects_by, part.plates_by))
        effects.add_row(name, *made_by, *effects_row(part))
    rejected = _table("Set aside or mended", "stage", "reason", "outcome")
    rejected.add_column("count", justify="right")
    for row in inspection.rejected:
        rejected.add_row(*map(Text, (row.stage, row.reason, row.outcome, f"{row.count:,}")))
    return [shards, people, overlap, cues, effects, origins, *([rejected] if inspection.rejected else [])]


def counted(counts: dict[str, int]) -> str:
    """``name number, name number``; a name that is empty is ``none``."""
    return ", ".join(f"{name or 'none'} {count:,}" for name, count in counts.items())


def people_columns(part: Part) -> list[int]:
    """How many pictures of the part show 1, 2, 3, 4, 5, and 6 or more people."""
    few = [part.people_per_picture.get(count, 0) for count in range(1, 6)]
    return [*few, part.samples - sum(few)]


def effects_row(part: Part) -> list[str]:
    """Effects known, each of `EFFECT_COLUMNS`, plate known and captions as percentages; ``-`` where there is none."""
    shown = [part.effects.get(kind) for kind in EFFECT_COLUMNS]
    shares = [part.effects_known, *shown, part.plate_known, part.captions]
    return ["-" if share is None else f"{share:.0%}" for share in shares]


class _Count:
    """Counts shards' tables, one at a time."""

    def __init__(self, configuration: str) -> None:
        self.configuration = configuration
        self.counts: dict[str, Counter[Any]] = {
            name: Counter()
            for name in (
                "width", "height", "people", "stratum", "label_set", "masks_by", "pose_by", "plates_by", "effects_by",
                "networks",
            )
        }  # fmt: skip
        self.sums: Counter[str] = Counter()
        self.occlusions: list[np.ndarray] = []

    def add(self, table: pa.Table) -> None:
        """Count the samples of a shard."""
        people = pc.list_flatten(table["people"])
        for name in ("width", "height", "stratum", "label_set"):
            self.counts[name].update(_values(table[name]))
        self.counts["people"].update(_values(pc.list_value_length(table["people"])))
        self.counts["masks_by"].update(_values(pc.struct_field(people, "mask_by")))
        for row in _groups(table["made_by"]):
            self._count_makers(row, row.pop("count"))
        touching = pc.list_parent_indices(table["people"]).filter(pc.struct_field(people, "touches"))
        occlusion = pc.struct_field(people, "occlusion")
        occluded = pc.coalesce(pc.greater(occlusion, 0), pc.struct_field(people, "occluded"))
        self.occlusions += [
            pc.drop_null(chunk).to_numpy() for chunk in occlusion.filter(pc.greater(occlusion, 0)).chunks
        ]
        self.sums.update(
            {
                "samples": len(table),
                "people": len(people),
                "known": _sum(table["known_share"]),
                "any": _sum(pc.greater(table["effects_share"], 0)),
                "occluded": _sum(occluded),
                "truncated": _sum(pc.struct_field(people, "truncated")),
                "touching": pc.count_distinct(touching).as_py(),
                **{name: _sum(table[name]) for name in (*get_args(EffectKind), "captioned", "boxes_overlap")},
            }
        )

    def _count_makers(self, made_by: dict[str, dict[str, str]], samples: int) -> None:
        self.counts["pose_by"][made_by["pose"]["name"]] += samples
        self.counts["effects_by"][made_by["effects"]["name"]] += samples
        plate = made_by["plate"]
        named = f"{plate['name']} ({plate['network']})" if plate["network"] else plate["name"]
        self.counts["plates_by"][named] += samples
        for cue, maker in made_by.items():
            if maker["weights"]:
                told = (cue, maker["name"], maker["network"], maker["version"], f"sha256 {maker['weights'][:16]}")
                self.counts["networks"][", ".join(told)] += samples

    def part(self, split: str, listed: list[Shard], credits: Credits) -> Part:
        """What was counted."""
        counts, sums = self.counts, self.sums
        samples, people = int(sums["samples"]), int(sums["people"])
        occlusions = np.concatenate([np.empty(0), *self.occlusions])
        pictures = credits.counted(self.configuration, split)
        with_effects = samples - counts["effects_by"]["none"]
        return Part(
            configuration=self.configuration,
            split=split,
            shards=sum(shard.samples > 0 for shard in listed),
            samples=samples,
            people=people,
            bytes=sum(shard.size for shard in listed),
            width=_range(counts["width"]),
            height=_range(counts["height"]),
            people_per_picture=dict(sorted(counts["people"].items())),
            strata=_ranked(counts["stratum"]),
            occluded=sums["occluded"] / max(people, 1),
            truncated=sums["truncated"] / max(people, 1),
            occlusion_quantiles=(
                {q: float(v) for q, v in zip(QUANTILES, np.quantile(occlusions, QUANTILES), strict=True)}
                if len(occlusions)
                else None
            ),
            touching=sums["touching"] / max(samples, 1),
            overlapping_boxes=sums["boxes_overlap"] / max(samples, 1),
            label_sets=_ranked(counts["label_set"]),
            masks_by=_ranked(counts["masks_by"]),
            pose_by=_ranked(counts["pose_by"]),
            effects_known=with_effects / max(samples, 1),
            effects={kind: sums[kind] / with_effects for kind in EFFECT_COLUMNS} if with_effects else {},
            effects_by=_ranked(counts["effects_by"]),
            plate_known=sums["known"] / samples if samples and self.configuration != "real" else None,
            plates_by=_ranked(counts["plates_by"]),
            captions=sums["captioned"] / max(samples, 1),
            networks=_ranked(counts["networks"]),
            licences=pictures.licences,
            sources=pictures.sources,
            blurred=pictures.blurred,
        )


def _values(column: pa.ChunkedArray) -> dict[Any, int]:
    """Each value of a column to how often it occurs."""
    return {row["values"]: row["counts"] for row in pc.value_counts(column).to_pylist()}


def _sum(column: pa.ChunkedArray) -> float:
    return pc.sum(column).as_py() or 0


def _groups(made_by: pa.ChunkedArray) -> Iterable[dict[str, Any]]:
    """Each different value of the column ``made_by``, with its ``count``; most shards have one."""
    parts = {
        f"{cue}.{name}": pc.struct_field(made_by, [cue, name])
        for cue in Makers.__dataclass_fields__
        for name in ("name", "network", "version", "weights")
    }
    for row in pa.table(parts).group_by(list(parts)).aggregate([([], "count_all")]).to_pylist():
        found: dict[str, Any] = {"count": row.pop("count_all")}
        for name, value in row.items():
            cue, _, what = name.partition(".")
            found.setdefault(cue, {})[what] = value
        yield found


def _range(lengths: Counter[int]) -> Range | None:
    if not lengths:
        return None
    values, counts = np.array(sorted(lengths.items())).T
    ends, half = np.cumsum(counts), (counts.sum() - 1) / 2
    middle = [values[np.searchsorted(ends, place, side="right")] for place in (np.floor(half), np.ceil(half))]
    return Range(minimum=int(values[0]), median=float(np.mean(middle)), maximum=int(values[-1]))


def _ranked(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _table(title: str, *headings: str) -> Table:
    table = Table(title=Text(title), title_justify="left", caption_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _extent(extent: Range | None) -> str:
    return f"{extent.minimum}-{extent.median:g}-{extent.maximum}" if extent else "-"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
