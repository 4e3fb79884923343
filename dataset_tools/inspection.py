"""What a dataset holds: counts, sizes, people, overlap, effects, plates, licences, sources, and what was set aside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from dataset_tools.anonymise import regions_blurred
from dataset_tools.errors import UserError
from dataset_tools.masks import touching
from dataset_tools.schema import EffectKind, decode_rle
from dataset_tools.shards import Shard, ShardDataset, read_manifest
from dataset_tools.storage import open_root

QUANTILES = (0.25, 0.5, 0.75, 0.9, 1.0)
WORKERS = 16
"""Range requests at once: they wait for the store far more than they compute."""
EFFECT_COLUMNS = (*get_args(EffectKind), "any")
BATCH = 512
"""Annotations in memory at once."""


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


@dataclass
class Credit:
    """A source picture, to be credited: one row of ``attribution.csv``."""

    source: str
    id: str
    split: str
    licence: str
    author: str
    author_url: str
    title: str
    url: str
    landing_url: str
    sha256: str
    roles: set[str] = field(default_factory=set)


def inspect(root: str) -> Inspection:
    """Count what the dataset at ``root`` holds, from its manifest and annotations; no picture is fetched.

    Raises:
        UserError: there is no dataset, or a file that its manifest lists is missing.
    """
    manifest = read_manifest(root)
    parts, _ = survey(root, manifest.shards)
    rejected: list[RejectedCount] = []
    if "rejected.parquet" in manifest.files:
        filesystem, base = open_root(root)
        try:
            with filesystem.open(f"{base}/rejected.parquet", "rb") as file:
                rejected = count_rejected(pa.parquet.read_table(file))
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            raise UserError(f"{base}/rejected.parquet cannot be read, build the dataset again: {error}") from None
    return Inspection(name=manifest.name, parts=parts, rejected=rejected)


def survey(root: str, shards: Mapping[str, Mapping[str, list[Shard]]]) -> tuple[list[Part], list[Credit]]:
    """Read every sample's annotations once: what each part holds, and whom to credit, sorted by source and id.

    Args:
        shards: configuration to split to shards, as in a manifest.
    """
    credits: dict[tuple[str, str], Credit] = {}
    parts = []
    for configuration, splits in shards.items():
        for split, listed in splits.items():
            dataset = ShardDataset.of_shards(root, listed)
            parts.append(_part(configuration, split, listed, _documents(dataset), credits))
    return parts, [credits[key] for key in sorted(credits)]


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


def _documents(dataset: ShardDataset) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(WORKERS) as pool:
        for start in range(0, len(dataset), BATCH):
            yield from pool.map(dataset.annotations, range(start, min(start + BATCH, len(dataset))))


def _part(
    configuration: str,
    split: str,
    listed: list[Shard],
    documents: Iterator[dict[str, Any]],
    credits: dict[tuple[str, str], Credit],
) -> Part:
    blurred = samples = people = occluded = truncated = near_by = overlapping = captions = 0
    plates: list[float] = []
    widths, heights, occlusions = [], [], []
    counts: dict[str, Counter[Any]] = {
        name: Counter()
        for name in (
            "people", "strata", "label_sets", "masks_by", "pose_by", "plates_by", "effects_by", "effects", "networks",
            "licences", "sources",
        )
    }  # fmt: skip
    seen: set[tuple[str, str]] = set()
    for document in documents:
        persons = document["annotations"]
        samples += 1
        people += len(persons)
        widths.append(document["width"])
        heights.append(document["height"])
        counts["people"][len(persons)] += 1
        counts["strata"][document["stratum"]] += 1
        counts["label_sets"][document["label_set"]] += 1
        counts["masks_by"].update(person["mask_by"] for person in persons)
        made_by = document["made_by"]
        counts["pose_by"][made_by["pose"]["name"]] += 1
        counts["effects_by"][made_by["effects"]["name"]] += 1
        plate = made_by["plate"]
        counts["plates_by"][f"{plate['name']} ({plate['network']})" if plate["network"] else plate["name"]] += 1
        counts["effects"].update(kind for kind in get_args(EffectKind) if any(person[kind] for person in persons))
        counts["effects"]["any"] += document["effects_share"] > 0
        if configuration != "real":
            plates.append(document["known_share"])
        captions += bool(document["caption"])
        for cue, maker in made_by.items():
            if maker["weights"]:
                told = (cue, maker["name"], maker["network"], maker["version"], f"sha256 {maker['weights'][:16]}")
                counts["networks"][", ".join(told)] += 1
        occlusions += [person["occlusion"] for person in persons if person.get("occlusion", 0) > 0]
        occluded += sum(person["occlusion"] > 0 if "occlusion" in person else person["occluded"] for person in persons)
        truncated += sum(person["truncated"] for person in persons)
        near = [pair for pair in combinations(persons, 2) if _share(*pair, grown=1)]
        overlapping += any(_share(*pair, grown=0) for pair in near)
        near_by += any(touching(*(decode_rle(person["segmentation"]) for person in pair)) for pair in near)
        for origin in document["origins"]:
            place = (origin["source"], origin["id"])
            if place not in seen:
                seen.add(place)
                counts["licences"][origin["licence"]] += 1
                counts["sources"][origin["source"]] += 1
                # Who was cut out of a picture has at most one of its faces.
                blurred += 0 if origin["role"] == "person" else regions_blurred(origin["transform"])
            credit = credits.setdefault(
                place,
                Credit(
                    split=split,
                    **{name: value for name, value in origin.items() if name not in ("role", "transform")},
                ),
            )
            credit.roles.add(origin["role"])
    with_effects = samples - counts["effects_by"]["none"]
    return Part(
        configuration=configuration,
        split=split,
        shards=sum(shard.samples > 0 for shard in listed),
        samples=samples,
        people=people,
        bytes=sum(shard.size for shard in listed),
        width=_range(widths),
        height=_range(heights),
        people_per_picture=dict(sorted(counts["people"].items())),
        strata=_ranked(counts["strata"]),
        occluded=occluded / max(people, 1),
        truncated=truncated / max(people, 1),
        occlusion_quantiles=(
            {q: float(v) for q, v in zip(QUANTILES, np.quantile(occlusions, QUANTILES), strict=True)}
            if occlusions
            else None
        ),
        touching=near_by / max(samples, 1),
        overlapping_boxes=overlapping / max(samples, 1),
        label_sets=_ranked(counts["label_sets"]),
        masks_by=_ranked(counts["masks_by"]),
        pose_by=_ranked(counts["pose_by"]),
        effects_known=with_effects / max(samples, 1),
        effects={kind: counts["effects"][kind] / with_effects for kind in EFFECT_COLUMNS} if with_effects else {},
        effects_by=_ranked(counts["effects_by"]),
        plate_known=float(np.mean(plates)) if plates else None,
        plates_by=_ranked(counts["plates_by"]),
        captions=captions / max(samples, 1),
        networks=_ranked(counts["networks"]),
        licences=_ranked(counts["licences"]),
        sources=_ranked(counts["sources"]),
        blurred=blurred,
    )


def _share(one: dict[str, Any], other: dict[str, Any], grown: int) -> bool:
    """Whether the boxes of two people have pixels in common when each is ``grown`` by that many pixels."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = one["bbox"], other["bbox"]
    wide = min(ax + aw, bx + bw) - max(ax, bx) + 2 * grown
    high = min(ay + ah, by + bh) - max(ay, by) + 2 * grown
    return bool(wide > 0 and high > 0)


def _range(values: list[int]) -> Range | None:
    return Range(minimum=min(values), median=float(np.median(values)), maximum=max(values)) if values else None


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
