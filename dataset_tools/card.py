"""What a published dataset needs beside its shards: card, Croissant metadata, attribution, what was set aside.

Card: https://huggingface.co/docs/hub/datasets-cards. Croissant: https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html.
No file bears a date: the same data gives the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet
import yaml
from fsspec.implementations.local import LocalFileSystem

from dataset_tools.contact_sheet import contact_sheet
from dataset_tools.credits import Credit, Credits
from dataset_tools.inspection import (
    EFFECT_COLUMNS,
    Part,
    count_rejected,
    counted,
    effects_row,
    people_columns,
    survey,
)
from dataset_tools.opt_out import count_opted_out
from dataset_tools.records import text_to_cell
from dataset_tools.schema import CONFIGURATIONS, SPLITS, EffectKind, encode_png
from dataset_tools.shards import DATASET_VERSION, Shard, ShardDataset, read_index
from dataset_tools.storage import open_root, sha256_of_file, write_bytes, written_whole

SHEET_SAMPLES = 8
SHEET_TILE = 256
ATTRIBUTION_COLUMNS = (
    "source", "id", "split", "roles", "licence", "author", "author_url", "title", "url", "landing_url", "sha256",
)  # fmt: skip
HUB_LICENCES = {
    "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "apache-2.0", "mit",
}  # fmt: skip
"""Licence ids that the Hugging Face hub knows, as far as pictures carry them; any other licence is ``other``."""

Shards = Mapping[str, Mapping[str, list[Shard]]]
"""Configuration to split to shards."""
Held = dict[str, list[str]]
"""Configuration to the parts that each of its samples has, such as ``image.jpg``."""


def write_card(
    root: str,
    name: str,
    description: str,
    shards: Shards,
    settings: dict[str, Any],
    rejected: pa.Table,
) -> dict[str, str]:
    """Write ``README.md``, ``croissant.json``, ``attribution.csv``, ``rejected.parquet`` and ``card/*.png``.

    Reads the table of every shard, and the first few samples of each part. Parts without a sample are left out.

    Args:
        name: what the dataset is called.
        description: a sentence or more, Markdown.
        shards: configuration to split to shards, as the manifest will list them.
        settings: what built the dataset, JSON-compatible; shown in the card as it is.
        rejected: rows of `dataset_tools.records.REJECTION_SCHEMA`.

    Returns:
        File name relative to ``root`` to sha256 (hex), for the manifest.
    """
    shards = {
        configuration: kept
        for configuration, splits in shards.items()
        if (kept := {split: full for split, listed in splits.items() if (full := [s for s in listed if s.samples])})
    }
    filesystem, base = open_root(root)
    with Credits() as credits:
        parts = survey(root, shards, credits)
        with written_whole(filesystem, f"{base}/attribution.csv") as partial:
            _write_attribution(partial, credits)
            files = {"attribution.csv": sha256_of_file(LocalFileSystem(), str(partial))}
    files["rejected.parquet"] = write_bytes(filesystem, f"{base}/rejected.parquet", _parquet(rejected))
    held = {
        configuration: list(read_index(root, next(iter(splits.values()))[0].path)["samples"][0]["parts"])
        for configuration, splits in shards.items()
    }
    croissant = _croissant(name, description, shards, parts, held, files)
    pages = {
        **{
            _sheet_path(part.configuration, part.split): _sheet(root, shards[part.configuration][part.split])
            for part in parts
        },
        "croissant.json": (json.dumps(croissant, indent=2, ensure_ascii=False) + "\n").encode(),
        "README.md": _readme(name, description, parts, held, settings, rejected).encode(),
    }
    return files | {file: write_bytes(filesystem, f"{base}/{file}", data) for file, data in pages.items()}


def hub_licence(licence: str) -> str:
    """The Hugging Face hub's id for a licence given as Creative Commons URL, name or SPDX id; else ``other``."""
    text = licence.lower().strip()
    if re.search(r"creativecommons\.org/publicdomain/zero/1\.0", text):
        return "cc0-1.0"
    url = re.search(r"creativecommons\.org/licenses/([a-z-]+)/([0-9.]+[0-9])", text)
    found = f"cc-{url[1]}-{url[2]}" if url else re.sub(r"[\s_]+", "-", text)
    return found if found in HUB_LICENCES else "other"


def _write_attribution(file: Path, credits: Iterable[Credit]) -> None:
    """CSV as RFC 4180 has it but for bare line feeds; roles are joined by semicolons, formulas are made text."""
    with file.open("w", newline="", encoding="utf-8") as text:
        plain, quoted = (
            csv.writer(text, lineterminator="\n", quoting=quoting) for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
        )
        plain.writerow(ATTRIBUTION_COLUMNS)
        for credit in credits:
            row = {**vars(credit), "roles": ";".join(credit.roles)}
            cells = [text_to_cell(row[column]) for column in ATTRIBUTION_COLUMNS]
            # The writer knows of the line ends alone that it writes itself, and readers of all.
            writer = quoted if any("\r" in cell for cell in cells) else plain
            writer.writerow(cells)


def _parquet(table: pa.Table) -> bytes:
    """The table sorted and in one piece, so that equal rows give equal bytes."""
    table = table.sort_by([(name, "ascending") for name in table.column_names]).combine_chunks()
    sink = io.BytesIO()
    pa.parquet.write_table(table.replace_schema_metadata(None), sink, compression="zstd")
    return sink.getvalue()


def _sheet_path(configuration: str, split: str) -> str:
    """Where the contact sheet of a part lies, below the dataset."""
    return f"card/{configuration}-{split}.png"


SHEETS = frozenset(_sheet_path(configuration, split) for configuration in CONFIGURATIONS for split in SPLITS)
"""Contact sheets that a dataset may have."""


def _sheet(root: str, listed: list[Shard]) -> bytes:
    # Of shards that are none of the first few not even the index is read.
    enough = next((n for n in range(1, len(listed)) if sum(s.samples for s in listed[:n]) >= SHEET_SAMPLES), None)
    samples = list(islice(ShardDataset.of_shards(root, listed[:enough]), SHEET_SAMPLES))
    columns = 4 if samples[0].background is None else 2
    return encode_png(contact_sheet(samples, columns, SHEET_TILE))


# Croissant ----------------------------------------------------------------------------------------------------------

_TERMS = (
    "arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field", "fileProperty",
    "fileObject", "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key", "md5",
    "parentField", "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate", "separator",
    "source", "subField", "transform",
)  # fmt: skip
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    **{term: f"cr:{term}" for term in _TERMS},
}
"""The context of Croissant 1.1. Without its ``containedIn`` a document validates, and its file sets are empty."""
_MEDIA_TYPES = {
    "csv": "text/csv",
    "jpg": "image/jpeg",
    "json": "application/json",
    "parquet": "application/x-parquet",
    "png": "image/png",
    "tar": "application/x-tar",
}


def _croissant(
    name: str, description: str, shards: Shards, parts: list[Part], held: Held, tables: dict[str, str]
) -> dict[str, Any]:
    """A record set a configuration and part; records of one sample share their ``key``.

    One record set that holds a sample's picture and annotations would be a join of two file sets, and
    mlcroissant 1.1 reads the bytes of a joined row from the first of them alone.
    """
    distribution = [_file_object(file, sha256) for file, sha256 in tables.items()]
    record_sets = []
    for configuration, splits in shards.items():
        listed = [shard for full in splits.values() for shard in full]
        distribution += [{**_file_object(s.path, s.sha256), "contentSize": f"{s.size} B"} for s in listed]
        for part in held[configuration]:
            stem, kind = part.split(".")
            file_set = f"{configuration}/{part}"
            distribution.append(
                {
                    "@type": "cr:FileSet",
                    "@id": file_set,
                    "name": file_set,
                    "containedIn": [{"@id": shard.path} for shard in listed],
                    "encodingFormat": _MEDIA_TYPES[kind],
                    "includes": f"*.{part}",
                }
            )
            record_sets.append(_record_set(configuration, stem, kind, file_set))
    licences = sorted({licence for part in parts for licence in part.licences if licence})
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": name,
        "description": description,
        **({"license": licences} if licences else {}),
        "rai:personalSensitiveInformation": [SENSITIVE],
        "rai:dataBiases": [BIASES],
        "distribution": distribution,
        "recordSet": record_sets,
    }


def _file_object(path: str, sha256: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": path,
        "name": path,
        "contentUrl": path,
        "encodingFormat": _MEDIA_TYPES[path.rsplit(".", 1)[-1]],
        "sha256": sha256,
    }


def _record_set(configuration: str, stem: str, kind: str, file_set: str) -> dict[str, Any]:
    """Records of one part, such as ``composite`` (the images) and ``composite_annotations``."""
    name = configuration if stem == "image" else f"{configuration}_{stem}"

    def field(field_name: str, data_type: str, extract: dict[str, Any]) -> dict[str, Any]:
        return {
            "@type": "cr:Field",
            "@id": f"{name}/{field_name}",
            "name": field_name,
            "dataType": data_type,
            "source": {"fileSet": {"@id": file_set}, **extract},
        }

    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "field": [
            field(
                "key",
                "sc:Text",
                {"extract": {"fileProperty": "filename"}, "transform": {"regex": r"^([^.]+)\."}},
            ),
            field(
                stem,
                "sc:Text" if kind == "json" else "sc:ImageObject",
                {"extract": {"fileProperty": "content"}},
            ),
        ],
    }


# README.md ----------------------------------------------------------------------------------------------------------

SENSITIVE = (
    "Photographs of people: many can be recognised, and nobody was asked for consent beyond what the licence of each "
    "source picture states. Masks, keypoints and body-part labels describe bodies; no name, age, origin or identity "
    "is annotated; captions, where there are any, are the sources' own words. Do not use the data to identify, track "
    "or rate people."
)
BIASES = (
    "The dataset inherits what its sources favour: who is photographed, where and how, and whom annotators label as "
    "a person. Small, heavily hidden and unlabelled people are missing more often than others. Composites follow "
    "the distributions in the settings, not those of the world; light, shadow and contact with the ground are only "
    "approximate there."
)
PART_MEANINGS = {
    "image": "the picture with its people, RGB",
    "annotations": "one entry a person and the sample's provenance, see below",
    "background": "the clean plate: the same scene without its people, RGB",
    "parsing": "body parts and clothes, one label a pixel; `label_set` in the annotations names the labels",
    "effects": "grey: whose shadow or reflection a pixel shows, see below; 255 everywhere where nobody knows",
    "known": "grey: 255 where the clean plate is known; elsewhere, 0, the plate holds plausible colours",
    "layers": "one RGBA strip: people from top to bottom in annotation order, each complete also where hidden",
}
CONFIGURATION_MEANINGS = {
    "real": "photographs with masks; no clean plate exists",
    "paired": "photographs with masks and a clean plate, and where that is known",
    "composite": "people pasted onto clean backgrounds; everything is known",
}
ANNOTATION_FIELDS = """\
Each pixel of `effects.png` is a number of 8 bits: bit `i` (value `2**i`) is set where the picture shows the shadow or
reflection of person `i` in `annotations`, bit 7 where it shows that of anybody from the eighth person on; 0: nobody's.
The clean plate has none of them. `made_by.effects` is `none` where nobody knows the effects: the part is then 255
everywhere, which is not the same as a picture that shows none.

`annotations.json` follows COCO where COCO has a word for it. A sample has `key`, `split`, `configuration`, `stratum`,
`caption` (the source's words, or empty), `width`, `height`, `label_set`, `known_share` (share of the picture where the
clean plate is known), `effects_share` (share that shows any effect), `made_by` (who looked for people without masks,
and made pose, parsing, clean plate and effects: kind, network, package, sha256 of the weights; `none` where nobody
did), `origins` (source, id, licence, author, URL, sha256 of the source's bytes, what was done to it) and
`annotations`, one a person:

| field | meaning |
|---|---|
| `segmentation` | visible mask, COCO compressed RLE: `pycocotools.mask.decode` reads it |
| `mask_by`, `mask_score` | `annotated` and 1 for masks of the source; else the kind of network, its score 0..1 |
| `bbox`, `area` | box x, y, width, height and area of the visible mask, pixels |
| `keypoints`, `num_keypoints` | 18 OpenPose joints x, y, score; 0, 0, 0 where not found; how many were found, 0 for a \
mask that no skeleton belongs to |
| `occluded`, `truncated` | flags of the source |
| `shadow`, `reflection` | kinds of effect that the picture is known to show of them |
| `complete_segmentation` | composite: the mask as if nobody stood in front |
| `augmented_segmentation` | composite: the visible mask with faults such as networks make |
| `order`, `occlusion` | composite: 0 is the rearmost; share of the complete mask that others hide |
"""


def _readme(
    name: str, description: str, parts: list[Part], held: Held, settings: dict[str, Any], rejected: pa.Table
) -> str:
    """The card: YAML front matter for the hub, then Markdown for people."""
    front = yaml.safe_dump(_front_matter(name, parts), sort_keys=False, allow_unicode=True)
    example = parts[-1] if parts else None
    sections = [
        f"---\n{front}---\n\n# {name}\n\n{description}",
        "## Samples\n\n"
        + "\n\n".join(f"![{p.configuration}, {p.split}]({_sheet_path(p.configuration, p.split)})" for p in parts),
        "## What it holds\n\n" + _contents(parts, held) + "\n" + ANNOTATION_FIELDS,
        *([_reading(example, held[example.configuration])] if example else []),
        "## People a picture\n\n"
        + _table(
            ["configuration", "split", "1", "2", "3", "4", "5", "6+", "people occluded", "pictures where masks touch"],
            [[p.configuration, p.split, *people_columns(p), f"{p.occluded:.0%}", f"{p.touching:.0%}"] for p in parts],
        ),
        "## Shadows, reflections, clean plates\n\n"
        + _table(
            [
                "configuration",
                "split",
                "effects by",
                "clean plates by",
                "effects known",
                *EFFECT_COLUMNS,
                "plate known",
                "captions",
            ],
            [[p.configuration, p.split, counted(p.effects_by), counted(p.plates_by), *effects_row(p)] for p in parts],
        )
        + "\nShares of pictures; of shadow, reflection and any, of those whose effects are known (any: also of a kind "
        "that nobody knows); of the plate, of its area.\n",
        "## How it was made\n\n"
        + _table(
            ["configuration", "split", "source pictures", "masks by", "keypoints by", "body-part labels", "strata"],
            [
                [
                    p.configuration,
                    p.split,
                    *map(counted, (p.sources, p.masks_by, p.pose_by, p.label_sets, p.strata)),
                ]
                for p in parts
            ],
        )
        + _networks(parts)
        + "\nThese settings built the dataset; the same sources and settings give the same bytes:\n\n```yaml\n"
        + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        + "```",
        "## Licences and attribution\n\n"
        + _table(
            ["configuration", "split", "licence of the source picture", "source pictures"],
            [
                [p.configuration, p.split, licence or "not stated", n]
                for p in parts
                for licence, n in p.licences.items()
            ],
        )
        + "\nLicences are as the sources state them; check them before you rely on them. `attribution.csv` credits "
        "every source picture: author, title, URL, licence. Every sample carries the same in its `origins`.\n",
        f"## Sensitive data and biases\n\n{SENSITIVE}\n\n{BIASES}\n\n" + _left_out(parts, rejected),
        "## Set aside\n\n`rejected.parquet` has a row for each image, person or table row that was set aside, or "
        "mended and used.\n\n"
        + _table(
            ["stage", "reason", "outcome", "rows"],
            [[row.stage, row.reason, row.outcome, row.count] for row in count_rejected(rejected)],
        ),
    ]
    return "\n\n".join(section.rstrip("\n") for section in sections) + "\n"


def _left_out(parts: list[Part], rejected: pa.Table) -> str:
    """What was done for people who do not want to be seen, and what they can do."""
    blurred = {f"{p.configuration}, {p.split}": p.blurred for p in parts if p.blurred}
    told = "In no picture was a face or licence plate blurred."
    if blurred:
        told = (
            f"Faces and licence plates that were found are blurred beyond recovery: {counted(blurred)} regions. What "
            "was not found is not blurred. People who were pasted elsewhere are blurred as in their own picture."
        )
    opted_out = count_opted_out(rejected["reason"].to_pylist())
    return (
        f"{told} Pictures left out because somebody asked for it: {opted_out:,}; nothing here tells which.\n\n"
        "If you are in a picture, or took it, and want it removed, tell whoever published this dataset the row of "
        "`attribution.csv` or the key of the sample: the next build leaves out what is on its opt-out list, by id, "
        "address, sha256 or perceptual hash, and the composites with it are made anew without.\n"
    )


def _networks(parts: list[Part]) -> str:
    """Which networks made what; empty where none did."""
    rows = [[p.configuration, p.split, told, samples] for p in parts for told, samples in p.networks.items()]
    return "\n" + _table(["configuration", "split", "network", "samples"], rows) if rows else ""


def _front_matter(name: str, parts: list[Part]) -> dict[str, Any]:
    licences = sorted({hub_licence(licence) for part in parts for licence in part.licences}) or ["other"]
    other = {"license_name": "as-attributed", "license_link": "attribution.csv"} if "other" in licences else {}
    configurations = list(dict.fromkeys(part.configuration for part in parts))
    samples = sum(part.samples for part in parts)
    pairs = [part for part in parts if part.plate_known]
    removed = [f"{kind}-removal" for kind in get_args(EffectKind) if any(part.effects.get(kind) for part in pairs)]
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return {
        "pretty_name": name,
        "license": licences,
        **other,
        "task_categories": ["image-to-image", "image-segmentation"],
        "tags": [
            "webdataset",
            "inpainting",
            "object-removal",
            "human-parsing",
            "pose-estimation",
            "amodal-segmentation",
            *removed,
        ],
        "size_categories": [next((label for bound, label in bounds if samples < bound), "10M<n<100M")],
        "configs": [
            {
                "config_name": configuration,
                "data_files": [
                    {"split": part.split, "path": f"{configuration}/{part.split}-*.tar"}
                    for part in parts
                    if part.configuration == configuration
                ],
            }
            for configuration in configurations
        ],
    }


def _contents(parts: list[Part], held: Held) -> str:
    text = [
        "A WebDataset: plain tars, `{configuration}/{split}-{number}.tar`, each with an `.index.json` that says where "
        "every part lies, and a `.parquet` with a row a sample: sizes, people, sources, what is known of it besides "
        f"pictures. Version {DATASET_VERSION}. Splits are by source picture: none is in two of them.\n",
        _table(
            ["configuration", "split", "samples", "people", "shards", "MB", "what"],
            [
                [
                    p.configuration,
                    p.split,
                    p.samples,
                    p.people,
                    p.shards,
                    p.bytes / 1e6,
                    CONFIGURATION_MEANINGS[p.configuration],
                ]
                for p in parts
            ],
        ),
        "Each sample `KEY` has the parts:\n",
        _table(
            ["part", "in", "what"],
            [
                [
                    f"`KEY.{part}`",
                    ", ".join(configuration for configuration, names in held.items() if part in names),
                    meaning,
                ]
                for stem, meaning in PART_MEANINGS.items()
                for part in sorted({name for names in held.values() for name in names if name.startswith(stem)})
            ],
        ),
    ]
    return "\n".join(text)


def _reading(part: Part, names: list[str]) -> str:
    image = next(name for name in names if name.startswith("image."))
    return f"""\
## How to read it

With plain `webdataset`, in this folder:

```python
import glob, io, PIL.Image, pycocotools.mask, webdataset

shards = sorted(glob.glob("{part.configuration}/{part.split}-*.tar"))
for sample in webdataset.WebDataset(shards, shardshuffle=False).decode():
    image, people = PIL.Image.open(io.BytesIO(sample["{image}"])), sample["annotations.json"]["annotations"]
    print(sample["__key__"], image.size, pycocotools.mask.decode(people[0]["segmentation"]).sum())
```

(`decode("pil")` would make every picture RGB: it drops the alpha of `layers.png`.)

With Hugging Face `datasets`, in this folder (the dataset's id on the hub does as well as its path):

```python
import datasets, os, pycocotools.mask

for sample in datasets.load_dataset(os.getcwd(), "{part.configuration}", split="{part.split}"):
    image, people = sample["{image}"], sample["annotations.json"]["annotations"]
    print(sample["__key__"], image.size, pycocotools.mask.decode(people[0]["segmentation"]).sum())
```

`croissant.json` describes the same for `mlcroissant`: one record set a configuration and part, joined by `key`."""


def _table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; numbers stand on the right."""
    rule = ["--:" if rows and isinstance(rows[0][column], int | float) else "---" for column in range(len(head))]
    lines = [head, rule, *([_cell(value) for value in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
    return " ".join(str(value).split()).replace("|", "\\|")
