"""From samples to cases, and the files that methods and metrics share: pictures as PNG, a table a shard.

A folder of cases, written once a shard, holds::

    cases.parquet                      a row a case, see `CASES`
    KEY/before.png  KEY/truth.png      the picture, and its clean background where one is known
    KEY/known.png                      where it is known, unless that is everywhere
    KEY/effects.png                    shadows and reflections of those who go, where these are known
    KEY/MASKS/mask.png                 what methods are given, 0 or 255
    KEY/MASKS/hole.png                 that, and all that those who go really cover
    KEY/MASKS/staying.png              people and things that stay

and a folder of results ``KEY/MASKS.png`` and ``results.parquet``, see `RESULTS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_tools.errors import UserError
from dataset_tools.schema import KEY_PATTERN, Person, Sample
from mild.evaluation.methods import Case
from mild.evaluation.settings import DatasetSettings, Masks
from mild.metrics.metric import Judged
from mild.seeds import derived_seed

CASES = pa.schema(
    [
        ("key", pa.string()),
        ("masks", pa.string()),
        ("height", pa.int64()),
        ("width", pa.int64()),
        ("people", pa.int64()),
        ("overlap", pa.bool_()),
        ("hole_share", pa.float64()),
        ("truth", pa.bool_()),
        ("effects", pa.bool_()),
        ("pictures", pa.string()),
    ]
)
"""``people``: how many vanish; ``overlap``: whether any two of them touch; ``truth``: whether a clean background is
known, anywhere; ``effects``: whether shadows and reflections of those who vanish are known; ``pictures``: digest of
picture, mask and clean background, by which other runs know whether a key means the same."""
RESULTS = pa.schema(
    [
        ("key", pa.string()),
        ("masks", pa.string()),
        ("seconds", pa.float64()),
        ("peak_bytes", pa.int64()),
        ("device", pa.string()),
        ("failure", pa.string()),
    ]
)
"""``seconds``: of this picture, warm-up left out; ``peak_bytes``: of GPU memory, null without one; ``failure``: why
there is no result, else empty."""
FAST = [cv2.IMWRITE_PNG_COMPRESSION, 1]
"""Read many times, and written once."""
ALIKE = 8
"""Samples, or more, among which cues are shuffled."""


@dataclass(frozen=True)
class CaseRow:
    """A row of ``cases.parquet``."""

    key: str
    masks: str
    height: int
    width: int
    people: int
    overlap: bool
    hole_share: float
    truth: bool
    effects: bool
    pictures: str


def prepare_cases(samples: Iterable[Sample], settings: DatasetSettings, folder: Path) -> list[CaseRow]:
    """Write a folder of cases, see above; gives its rows.

    A sample of which the masks show nothing that is to vanish is no case.

    Raises:
        UserError: a sample has no masks of a kind, or a key that cannot be a file name.
    """
    rows = []
    for sample in samples:
        if KEY_PATTERN.fullmatch(sample.key) is None:
            raise UserError(
                f"sample key {sample.key!r} cannot be a file name: keys hold letters, digits, '-' and '_' only"
            )
        going = [person for person in sample.people if goes(person, settings)]
        effects = sample.effects_of(index for index, person in enumerate(sample.people) if goes(person, settings))
        known = sample.background is not None and (sample.known is None or bool(sample.known.any()))
        covered = _union([person.mask for person in going], sample.image)
        staying = _union([person.mask for person in sample.people if not goes(person, settings)], sample.image)
        for kind in settings.masks:
            case = case_of(sample, settings, kind)
            if not case.hole.any():
                continue
            place = folder / sample.key / kind
            place.mkdir(parents=True, exist_ok=True)
            write_picture(place.parent / "before.png", sample.image)
            if known and sample.background is not None:
                write_picture(place.parent / "truth.png", sample.background)
                if sample.known is not None and not sample.known.all():
                    write_mask(place.parent / "known.png", sample.known)
            if effects is not None:
                write_mask(place.parent / "effects.png", effects)
            hole = case.hole | covered
            for name, mask in (("mask", case.hole), ("hole", hole), ("staying", staying)):
                write_mask(place / f"{name}.png", mask)
            rows.append(
                CaseRow(
                    key=sample.key,
                    masks=kind,
                    height=hole.shape[0],
                    width=hole.shape[1],
                    people=len(going),
                    overlap=_overlap([person.mask for person in going]),
                    hole_share=float(hole.mean()),
                    truth=known,
                    effects=effects is not None,
                    pictures=_digest(sample.image, case.hole, sample.background, sample.known),
                )
            )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([vars(row) for row in rows], schema=CASES), folder / "cases.parquet")
    return rows


def _digest(*arrays: np.ndarray | None) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr(array is None or array.shape).encode())
        digest.update(b"" if array is None else np.ascontiguousarray(array))
    return digest.hexdigest()


def read_rows(folder: Path) -> list[CaseRow]:
    """The rows that `prepare_cases` wrote."""
    return [CaseRow(**row) for row in pq.read_table(folder / "cases.parquet").to_pylist()]


def case_of(sample: Sample, settings: DatasetSettings, kind: Masks) -> Case:
    """What methods are given: all of those who go of whom the masks of this kind show anything, and what is known.

    Raises:
        UserError: the sample has no masks of this kind.
    """
    people, masks = [], []
    for person in sample.people:
        mask = person.mask if kind == "exact" else person.augmented_mask
        if mask is None:
            raise UserError(f"sample {sample.key} has no augmented masks: set masks to exact, or use composite samples")
        if goes(person, settings) and mask.any():
            people.append(person)
            masks.append(mask)
    keypoints = np.array([person.keypoints for person in people])
    return Case(
        image=sample.image,
        masks=np.array(masks, bool).reshape(-1, *sample.image.shape[:2]),
        pose=keypoints if keypoints.size and keypoints[..., 2].any() else None,
        parsing=None if sample.label_set == "none" else sample.parsing,
        label_set=sample.label_set,
        key=sample.key,
        kind=kind,
        categories=tuple(person.category for person in people),
    )


def others_of(rows: Iterable[CaseRow], seed: int) -> dict[str, str]:
    """Key of each sample to that of another, whose cues it is given in its place; everybody's are given once.

    Samples are shuffled among those in which as many people vanish, or nearly, and as large ones.

    Args:
        rows: of all cases of a dataset.
        seed: decides who is given whose.

    Raises:
        UserError: there is one sample alone.
    """
    sizes: dict[str, tuple[int, float, str]] = {}
    for row in rows:
        sizes.setdefault(row.key, (row.people, row.hole_share, row.key))
    ordered = sorted(sizes, key=sizes.__getitem__)
    if len(ordered) == 1:
        raise UserError(f"sample {ordered[0]} is alone: cues are shuffled among two samples or more of a dataset")
    others: dict[str, str] = {}
    for number, alike in enumerate(np.array_split(ordered, max(1, len(ordered) // ALIKE))):
        shuffled = np.random.default_rng(derived_seed(seed, "cues", number)).permutation(alike).tolist()
        others |= dict(zip(shuffled, [*shuffled[1:], *shuffled[:1]], strict=True))
    return others


def with_cues_of(case: Case, other: Case) -> Case:
    """The case with pose and parsing of another picture, stretched to its size; what is unknown of one of both is so.

    Of more people than vanish here, the first are taken; of fewer, the rest have no joint that is found.
    """
    (height, width), (other_height, other_width) = case.image.shape[:2], other.image.shape[:2]
    pose = parsing = None
    if case.pose is not None and other.pose is not None:
        pose = np.zeros_like(case.pose)
        given = other.pose[: len(pose)]
        pose[: len(given), :, :2] = (given[..., :2] + 0.5) * [width / other_width, height / other_height] - 0.5
        pose[: len(given), :, 2] = given[..., 2]
    if case.parsing is not None and other.parsing is not None:
        parsing = cv2.resize(other.parsing, (width, height), interpolation=cv2.INTER_NEAREST)
    return replace(case, pose=pose, parsing=parsing, label_set=other.label_set)


def goes(person: Person, settings: DatasetSettings) -> bool:
    """Whether somebody, or something, is to vanish."""
    return not settings.categories or person.category in settings.categories


def read_judged(cases: Path, results: Path, rows: Sequence[CaseRow]) -> Iterator[Judged | None]:
    """Each case with its result as metrics see it, one at a time; None where there is no result."""
    for row in rows:
        result = results / row.key / f"{row.masks}.png"
        if not result.is_file():
            yield None
            continue
        own, after = cases / row.key, read_picture(result)
        truth, known = read_truth(own) if row.truth else (None, np.zeros(after.shape[:2], bool))
        yield Judged(
            key=row.key,
            image=read_picture(own / "before.png"),
            result=after,
            truth=None if truth is None else np.where(known[..., None], truth, after),
            known=known,
            given=read_mask(own / row.masks / "mask.png"),
            hole=read_mask(own / row.masks / "hole.png"),
            staying=read_mask(own / row.masks / "staying.png"),
            effects=read_mask(own / "effects.png") if row.effects else None,
        )


def read_truth(own: Path) -> tuple[np.ndarray, np.ndarray]:
    """The clean background (H, W, 3) uint8 of a case's folder ``KEY``, and (H, W) bool, where it is known."""
    truth = read_picture(own / "truth.png")
    known = read_mask(own / "known.png") if (own / "known.png").is_file() else np.ones(truth.shape[:2], bool)
    return truth, known


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB, or (H, W) uint8, as PNG."""
    flipped = picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".png", flipped, FAST)
    assert done
    path.write_bytes(data.tobytes())


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write (H, W) bool as PNG, 0 and 255."""
    write_picture(path, mask.astype(np.uint8) * 255)


def read_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a file that `write_picture` wrote."""
    found = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    assert found is not None, path
    return found


def read_mask(path: Path) -> np.ndarray:
    """(H, W) bool of a file that `write_mask` wrote."""
    found = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    assert found is not None, path
    return found > 0


def _union(masks: list[np.ndarray], image: np.ndarray) -> np.ndarray:
    """(H, W) bool, also of no mask at all."""
    union: np.ndarray = np.logical_or.reduce([np.zeros(image.shape[:2], bool), *masks])
    return union


def _overlap(masks: list[np.ndarray]) -> bool:
    """Whether any two of the visible masks, (H, W) bool, share a pixel after each was widened by one."""
    widened = [cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) for mask in masks]
    return bool(np.sum(widened, axis=0).max() > 1)
