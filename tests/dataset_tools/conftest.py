"""Small synthetic samples, and a small complete dataset on disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from dataset_tools.card import write_card
from dataset_tools.records import Rejection, rejections_to_table
from dataset_tools.schema import (
    NO_PARSING,
    Configuration,
    EncodingSettings,
    MadeBy,
    Makers,
    Origin,
    Person,
    Sample,
    annotations_of,
    effect_bits,
)
from dataset_tools.shard_table import row_of, table_bytes
from dataset_tools.shards import Manifest, Shard, write_shard
from dataset_tools.storage import write_bytes

PNG = EncodingSettings(image_format="png")
BY_2 = "https://creativecommons.org/licenses/by/2.0/"
SETTINGS = {"seed": 7, "shards": {"samples": 3}, "encoding": {"image_format": "png"}}

# x in widths of the figure, y in its heights, in the order of KEYPOINTS.
FIGURE = (
    (0.5, 0.09), (0.5, 0.2),
    (0.32, 0.22), (0.22, 0.36), (0.18, 0.5), (0.68, 0.22), (0.78, 0.36), (0.82, 0.5),
    (0.4, 0.52), (0.38, 0.73), (0.36, 0.93), (0.6, 0.52), (0.62, 0.73), (0.64, 0.93),
    (0.46, 0.07), (0.54, 0.07), (0.42, 0.08), (0.58, 0.08),
)  # fmt: skip


def _background(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    low, high = rng.integers(90, 150, 3), rng.integers(170, 240, 3)
    ramp = np.linspace(0, 1, height)[:, None, None]
    noise = rng.integers(-6, 7, (height, width, 3))
    return np.clip(low * ramp + high * (1 - ramp) + noise, 0, 255).astype(np.uint8)


def _figure(height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """RGBA layer, complete mask and keypoints of one drawn person."""
    tall = float(rng.uniform(0.6, 0.85)) * height
    wide = tall * 0.45
    left = float(rng.uniform(0, width - wide))
    top = float(rng.uniform(0.1, 0.15)) * height
    joints = np.array(FIGURE) * (wide, tall) + (left, top)
    picture = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(picture)
    stroke = max(int(tall / 14), 2)
    for limb in ((2, 3, 4), (5, 6, 7), (8, 9, 10), (11, 12, 13)):
        draw.line([tuple(joints[i]) for i in limb], 255, stroke, joint="curve")
    draw.polygon([tuple(joints[i]) for i in (2, 5, 11, 8)], 255)
    draw.circle(tuple(joints[0]), tall * 0.085, 255)
    draw.line([tuple(joints[0]), tuple(joints[1])], 255, stroke)
    mask = np.asarray(picture) > 0
    layer = np.zeros((height, width, 4), np.uint8)
    layer[mask, :3] = rng.integers(20, 235, 3)
    layer[mask, 3] = 255
    keypoints = np.zeros((18, 3), np.float32)
    keypoints[:, :2] = np.round(joints * 4) / 4  # quarters of a pixel are exact in float32 and in the json
    keypoints[:, 2] = 0.75
    inside = (keypoints[:, :2] >= 0).all(1) & (keypoints[:, 0] < width) & (keypoints[:, 1] < height)
    keypoints[~inside] = 0
    return layer, mask, keypoints


def _origin(role: Any, name: str) -> Origin:
    return Origin(
        role=role,
        source="drawn",
        id=name,
        licence=BY_2,
        author=f"Painter of {name}",
        author_url="https://example.org/painter",
        title=f"Scene, “{name}”",
        url=f"https://example.org/{name}.jpg",
        landing_url=f"https://example.org/{name}",
        sha256=hashlib.sha256(name.encode()).hexdigest(),
        transform="resize",
    )


def _make_sample(
    configuration: Configuration = "composite",
    key: str = "sample-0",
    split: str = "train",
    people: int = 2,
    size: tuple[int, int] = (48, 64),
    label_set: str = "pascal",
) -> Sample:
    height, width = size
    rng = np.random.default_rng(list(hashlib.sha256(f"{configuration}{key}".encode()).digest()))
    plate = _background(height, width, rng)
    figures = [_figure(height, width, rng) for _ in range(people)]
    image = plate.copy()
    parsing = np.zeros((height, width), np.uint8)
    for order, (layer, mask, _) in enumerate(figures):
        image[mask] = layer[mask, :3]
        parsing[mask] = 1 + order % 6
    composite = configuration == "composite"
    persons = []
    for order, (layer, complete, keypoints) in enumerate(figures):
        hidden = np.zeros_like(complete)
        for _, front, _ in figures[order + 1 :]:
            hidden |= front
        visible = complete & ~hidden
        assert visible.any()
        persons.append(
            Person(
                id=f"{key}-p{order}",
                mask=visible,
                category="Woman" if order % 2 else "Person",
                occluded=bool((complete & hidden).any()),
                keypoints=keypoints,
                complete_mask=complete if composite else None,
                augmented_mask=np.roll(visible, 1, 1) if composite else None,
                layer=layer if composite else None,
                order=order if composite else None,
                occlusion=round(float((complete & hidden).sum() / complete.sum()), 6) if composite else None,
                effects=("shadow",) if composite and order == 0 else (),
            )
        )
    if composite:
        origins = [_origin("background", f"{split}-plate-{key}")]
        origins += [_origin("person", f"{split}-donor-{order}") for order in range(people)]
    else:
        origins = [_origin("image", f"{split}-photo-{key}")]
    return Sample(
        key=key,
        split=split,
        configuration=configuration,
        image=image,
        people=persons,
        parsing=parsing if label_set != "none" else np.full_like(parsing, NO_PARSING),
        label_set=label_set,
        origins=origins,
        stratum="one" if people == 1 else "two_or_three",
        background=None if configuration == "real" else plate,
        known=np.arange(width)[None] + np.zeros((height, 1)) > 1 if configuration == "paired" else None,
        effects=effect_bits([np.roll(p.mask, 1, 0) for p in persons]) if composite else None,
        caption=f"a picture of {people}",
        made_by=Makers(
            pose=MadeBy("drawn"),
            plate=MadeBy({"real": "none", "paired": "video", "composite": "photograph"}[configuration]),
            effects=MadeBy("composited" if composite else "none"),
        ),
    )


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    """Draw one sample: ``make_sample(configuration, key, split, people, size, label_set)``."""
    return _make_sample


REJECTED = [
    Rejection("train", "img-1", "", "decode", "image-rejected", "truncated-image", "file ends early"),
    Rejection("train", "img-2", "", "decode", "image-rejected", "truncated-image", "file ends early"),
    Rejection("train", "img-3", "b1", "mask", "person-rejected", "empty-mask", "mask is empty"),
    Rejection("test", "img-4", "", "decode", "mended", "cmyk", "converted to RGB"),
]


def _build(root: str) -> Manifest:
    """real/train (two shards), real/test (nobody came through), paired/validation, composite/train and test."""
    plan: list[tuple[Configuration, str, list[int]]] = [
        ("real", "train", [3, 2]),
        ("real", "test", [0]),
        ("paired", "validation", [2]),
        ("composite", "train", [3, 0, 2]),
        ("composite", "test", [2]),
    ]
    shards: dict[str, dict[str, list[Shard]]] = {}
    for configuration, split, counts in plan:
        serial = 0
        for number, count in enumerate(counts):
            samples = []
            for _ in range(count):
                samples.append(_make_sample(configuration, f"{split}-{serial:03d}", split, people=1 + serial % 3))
                serial += 1
            path = f"{configuration}/{split}-{number:06d}.tar"
            shard = write_shard(samples, root, path, PNG, [])
            shards.setdefault(configuration, {}).setdefault(split, []).append(shard)
    description = "Drawn people, for tests."
    files = write_card(root, "Drawn people", description, shards, SETTINGS, rejections_to_table(REJECTED))
    manifest = Manifest(
        name="Drawn people", shards=shards, files=files, source="", settings=SETTINGS, software={"pillow": "1"}
    )
    save_manifest(root, manifest)
    return manifest


def save_manifest(root: str, manifest: Manifest) -> None:
    filesystem, base = fsspec.core.url_to_fs(root)
    write_bytes(filesystem, f"{base}/manifest.json", manifest.model_dump_json(indent=1).encode())


@pytest.fixture(scope="session")
def built_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete dataset on disk, not to be changed."""
    root = tmp_path_factory.mktemp("built") / "dataset"
    _build(str(root))
    return root


@pytest.fixture
def dataset(built_dataset: Path, tmp_path: Path) -> Path:
    """A copy of the complete dataset, to be tampered with."""
    return Path(shutil.copytree(built_dataset, tmp_path / "dataset"))


@pytest.fixture(scope="session")
def build_dataset() -> Callable[[str], Manifest]:
    """Build the same dataset at any fsspec root."""
    return _build


Members = list[tuple[str, bytes]]


def read_members(tar: Path) -> Members:
    """Names and bytes of a tar's members, in order, by the standard library."""
    with tarfile.open(tar) as archive:
        return [(member.name, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]


def index_by_tarfile(tar: Path) -> list[dict[str, Any]]:
    """Where each sample and part stands, as the standard library's random-access reader says."""
    entries: list[dict[str, Any]] = []
    with tarfile.open(tar) as archive:
        for member in archive.getmembers():
            key, suffix = member.name.split(".", 1)
            if not entries or entries[-1]["key"] != key:
                entries.append({"key": key, "offset": member.offset, "size": 0, "parts": {}})
            entries[-1]["parts"][suffix] = [member.offset_data, member.size]
            entries[-1]["size"] = member.offset_data + (member.size + 511) // 512 * 512 - entries[-1]["offset"]
    return entries


def _forge(root: Path, path: str, edit: Callable[[Members], Members]) -> None:
    """Write a shard with other members, and table, index and manifest to match: all digests are right again.

    Of a sample that cannot be decoded the table says what it said before.
    """
    tar = root / path
    members = edit(read_members(tar))
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    index = tar.with_suffix(".index.json")
    document = json.loads(index.read_text())
    document["samples"] = index_by_tarfile(tar)
    index.write_text(json.dumps(document))
    table = tar.with_suffix(".parquet")
    rows = {row["key"]: row for row in pq.read_table(table).to_pylist()}
    samples: dict[str, dict[str, bytes]] = {}
    for name, data in members:
        key, suffix = name.split(".", 1)
        samples.setdefault(key, {})[suffix] = data
    for key, parts in samples.items():
        with contextlib.suppress(ValueError, KeyError):
            masks = [person.mask for person in Sample.from_parts(key, parts).people]
            rows[key] = row_of(annotations_of(key, parts), masks)
    table.write_bytes(table_bytes([rows[key] for key in samples]))
    manifest = Manifest.model_validate_json((root / "manifest.json").read_text())
    for shards in manifest.shards[path.split("/")[0]].values():
        for shard in shards:
            if shard.path == path:
                shard.sha256 = hashlib.sha256(tar.read_bytes()).hexdigest()
                shard.index_sha256 = hashlib.sha256(index.read_bytes()).hexdigest()
                shard.table_sha256 = hashlib.sha256(table.read_bytes()).hexdigest()
                shard.samples = len(document["samples"])
    save_manifest(str(root), manifest)


@pytest.fixture(scope="session")
def forge() -> Callable[[Path, str, Callable[[Members], Members]], None]:
    """Change the members of a shard and make index and manifest agree with the change."""
    return _forge


@pytest.fixture(scope="session")
def tar_index() -> Callable[[Path], list[dict[str, Any]]]:
    """The index of a shard as the standard library's tarfile sees it."""
    return index_by_tarfile


@pytest.fixture(scope="session")
def tar_members() -> Callable[[Path], Members]:
    """Names and bytes of a shard's members as the standard library's tarfile sees them."""
    return read_members
