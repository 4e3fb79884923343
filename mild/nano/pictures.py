"""What the nano base is trained on: drawn pictures with people and their shadows and reflections, and random holes.

As for SDXL-inpaint, holes have nothing to do with what the picture shows: boxes, strokes, and outlines of people put
down anywhere. So the base learns to paint whatever is likely, people included.

A share of the pictures may be dead leaves instead (`mild.nano.dead_leaves`), and a share in other colours, for a base
that is to fill the holes of pictures unlike those of the drawn world.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
from pydantic import Field, model_validator

from dataset_tools.drawn_world import draw_scene, generator
from dataset_tools.folders import folder_written_whole
from dataset_tools.settings import Settings
from mild.erasing.regions import prefilled
from mild.nano.dead_leaves import draw_leaves
from mild.seeds import derived_seed
from mild.training.colours import other_colours

KEY = "pretraining/{part}/{index}"
"""Keys of the scenes. Those of the sample world begin with the name of a split, so that no scene is in both."""
PEOPLE = (2, 1, 3, 0, 2, 4, 1, 0)
"""How many people are in one scene after the other."""
COUNTS = ("no people", "one person", "two people", "three people", "four people")
LEAST_SHARE = 0.004
"""A person who fills less of the picture than this is not mentioned and lends no outline."""
SMALLEST_HOLE, LARGEST_HOLE = 0.03, 0.4
DRAWN_AT_ONCE = 64
"""Pictures whose holes one process draws before it hands them over."""


class DrawingSettings(Settings):
    """How many pictures are drawn, and how they are cut."""

    seed: int = Field(0, ge=0)
    """Another seed, other scenes."""
    scenes: int = Field(4000, ge=1)
    """Scenes to train on."""
    held_out: int = Field(64, ge=1)
    """Scenes on which the VAE is measured; never trained on."""
    crops: int = Field(3, ge=1)
    """Pictures of each scene: the whole, and random squares of it."""
    drawn: int = Field(256, ge=32)
    """Side of a scene in pixels."""
    side: int = Field(128, ge=32, multiple_of=16)
    """Side of a picture in pixels. Crops are at least as large as this, so that none is enlarged."""
    leaves: float = Field(0.0, ge=0, le=1)
    """Share of the scenes to train on that are dead leaves, without people (`mild.nano.dead_leaves`)."""
    recolour: float = Field(0.0, ge=0, le=1)
    """Share of the pictures to train on whose colours are changed (`mild.training.colours`)."""

    @model_validator(mode="after")
    def _scenes_hold_crops(self) -> Self:
        if self.drawn < self.side:
            raise ValueError(f"drawn ({self.drawn}) must be at least side ({self.side}), so that none is enlarged")
        return self


class Unpacked(Sequence[np.ndarray]):
    """Masks (S, S) bool of an array of bits (M, S, S / 8) uint8, unpacked one by one."""

    def __init__(self, packed: np.ndarray) -> None:
        self._packed = packed

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: Any) -> Any:
        return np.unpackbits(self._packed[index], axis=-1).view(bool)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Drawn pictures in files, P of them of side S; see `draw_pictures`."""

    pictures: np.ndarray
    """(P, S, S, 3) uint8 RGB."""
    captions: list[str]
    """What each picture shows: kind of place and how many people."""
    outlines: Sequence[np.ndarray]
    """M of (S, S) bool: visible people, where they are in their pictures."""
    held_out: np.ndarray
    """(H, S, S, 3) uint8 RGB."""

    @classmethod
    def open(cls, folder: str | Path) -> Pictures:
        """Map what `draw_pictures` wrote; pictures and outlines stay on the disk until they are asked for."""
        place = Path(folder)
        pictures = np.load(place / "pictures.npy", mmap_mode="r")
        outlines = Unpacked(np.load(place / "outlines.npy", mmap_mode="r"))
        captions = json.loads((place / "captions.json").read_text("utf-8"))
        return cls(pictures, captions, outlines, np.load(place / "held_out.npy"))


def draw_pictures(settings: DrawingSettings, folder: str | Path, workers: int) -> None:
    """Draw all scenes and write them as arrays; the folder appears whole.

    Each scene depends on (seed, its number) alone: any number of worker processes gives the same bytes.

    Raises:
        UserError: the folder cannot be written.
    """
    plain = settings.model_copy(update={"leaves": 0.0, "recolour": 0.0})
    jobs = [(plain, "held-out", index) for index in range(settings.held_out)]
    jobs += [(settings, "train", index) for index in range(settings.scenes)]
    side, count = settings.side, settings.scenes * settings.crops
    with folder_written_whole(folder, "pictures.npy") as place:
        pictures = np.lib.format.open_memmap(
            place / "pictures.npy", mode="w+", dtype=np.uint8, shape=(count, side, side, 3)
        )
        held_out, captions, outlines = [], [], []
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            drawn = pool.map(_draw, jobs, chunksize=8) if workers > 1 else map(_draw, jobs)
            for (_, part, index), (cuts, texts, shapes) in zip(jobs, drawn, strict=True):
                if part == "held-out":
                    held_out.append(cuts[0])
                    continue
                pictures[index * settings.crops : (index + 1) * settings.crops] = cuts
                captions += texts
                outlines += shapes
        pictures.flush()
        np.save(place / "held_out.npy", np.stack(held_out))
        packed = np.zeros((0, side, side // 8), np.uint8) if not outlines else np.stack(outlines)
        np.save(place / "outlines.npy", packed)
        (place / "captions.json").write_text(json.dumps(captions), encoding="utf-8")


def filled_holes(
    seed: int, folder: str | Path, holes: int, workers: int
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Random holes of each picture, and what erasing them starts from, picture by picture.

    Each hole depends on (seed, number of its picture, its own number) alone.

    Args:
        folder: that `draw_pictures` wrote.
        holes: of each picture.
        workers: processes that draw.

    Yields:
        Of each hole the pixels, (S, S) bool, and the picture filled smoothly there (`mild.erasing.regions.prefilled`),
        (S, S, 3) uint8.
    """
    count = len(Pictures.open(folder).pictures)
    of_picture = partial(_fill_holes, seed, holes)
    if workers == 1:
        _hold(folder)
        yield from map(of_picture, range(count))
        return
    # Not all at once: what is drawn lies in memory until it is taken.
    together = workers * DRAWN_AT_ONCE
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(folder,)) as pool:
        for start in range(0, count, together):
            yield from pool.map(of_picture, range(start, min(start + together, count)), chunksize=DRAWN_AT_ONCE)


_held: list[Pictures] = []
"""What this process draws holes for."""


def _hold(folder: str | Path) -> None:
    _held[:] = [Pictures.open(folder)]


def _begin(folder: str | Path) -> None:
    """In a process that draws, first of all."""
    cv2.setNumThreads(1)  # there are as many processes as are to compute at once
    _hold(folder)


def _fill_holes(seed: int, holes: int, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
    (data,) = _held
    picture, found = np.array(data.pictures[index]), []
    for number in range(holes):
        rng = np.random.default_rng(derived_seed(seed, "hole", index, number))
        hole = random_hole(rng, len(picture), data.outlines)
        found.append((hole, prefilled(picture, hole)))
    return found


def random_hole(rng: np.random.Generator, side: int, outlines: Sequence[np.ndarray]) -> np.ndarray:
    """A hole of 3 % to 40 % of a picture: one to three boxes, strokes or outlines of people, anywhere.

    Args:
        side: of the picture, in pixels.
        outlines: M of (side, side) bool; may be none.

    Returns:
        (side, side) bool.
    """
    while True:
        hole = np.zeros((side, side), bool)
        for _ in range(int(rng.integers(1, 4))):
            kind = rng.choice(3, p=(0.2, 0.2, 0.6) if len(outlines) else (0.5, 0.5, 0))
            if kind == 0:
                height, width = (int(v) for v in rng.uniform(0.1, 0.55, 2) * side)
                top, left = int(rng.integers(0, side - height)), int(rng.integers(0, side - width))
                hole[top : top + height, left : left + width] = True
            elif kind == 1:
                hole |= _stroke(rng, side)
            else:
                hole |= _moved(rng, outlines[int(rng.integers(len(outlines)))])
        if SMALLEST_HOLE <= hole.mean() <= LARGEST_HOLE:
            return hole


def _draw(job: tuple[DrawingSettings, str, int]) -> tuple[np.ndarray, list[str], list[np.ndarray]]:
    """Crops of one scene (C, S, S, 3), their captions, and outlines of the people in them, packed to bits."""
    settings, part, index = job
    cv2.setNumThreads(1)
    key = KEY.format(part=part, index=index)
    if generator(settings.seed, f"{key}/what").random() < settings.leaves:
        kind, image, masks = "pattern", draw_leaves(generator(settings.seed, f"{key}/leaves"), settings.drawn), []
    else:
        scene = draw_scene(key, settings.seed, (settings.drawn, settings.drawn), PEOPLE[index % len(PEOPLE)])
        kind, image, masks = scene.kind, scene.image, [person.mask for person in scene.people]
    rng = generator(settings.seed, f"{key}/crops")
    pictures, captions, outlines = [], [], []
    for number in range(settings.crops):
        side = settings.drawn if number == 0 else int(rng.integers(settings.side, settings.drawn + 1))
        top, left = (int(v) for v in rng.integers(0, settings.drawn - side + 1, 2))
        window = np.s_[top : top + side, left : left + side]
        picture = _shrunk(image[window], settings.side)
        pictures.append(other_colours(rng)(picture) if rng.random() < settings.recolour else picture)
        shapes = [_shrunk(mask[window].astype(np.float32), settings.side) > 0.5 for mask in masks]
        seen = [shape for shape in shapes if shape.mean() >= LEAST_SHARE]
        captions.append(caption(kind, len(seen)))
        outlines += [np.packbits(shape, axis=-1) for shape in seen]
    return np.stack(pictures), captions, outlines


def caption(kind: str, people: int) -> str:
    """The text that goes with a picture, such as ``a street with two people``."""
    return f"a {kind} with {COUNTS[min(people, len(COUNTS) - 1)]}"


def _shrunk(plane: np.ndarray, side: int) -> np.ndarray:
    return cv2.resize(np.ascontiguousarray(plane), (side, side), interpolation=cv2.INTER_AREA)


def _stroke(rng: np.random.Generator, side: int) -> np.ndarray:
    """A thick line with a few bends."""
    hole = np.zeros((side, side), np.uint8)
    points: Sequence[np.ndarray] = [rng.uniform(0, side, 2)]
    for _ in range(int(rng.integers(2, 6))):
        points = [*points, np.clip(points[-1] + rng.normal(0, 0.25 * side, 2), 0, side - 1)]
    line = np.rint(np.stack(points)).astype(np.int32)
    cv2.polylines(hole, [line[:, None]], isClosed=False, color=1, thickness=int(rng.uniform(0.06, 0.2) * side))
    return hole > 0


def _moved(rng: np.random.Generator, outline: np.ndarray) -> np.ndarray:
    """An outline, mirrored or not, larger or smaller, and with its middle anywhere in the picture."""
    rows, columns = np.nonzero(outline)
    side = len(outline)
    scale = rng.uniform(0.7, 1.4)
    mirror = float(rng.choice([-1, 1]))
    target = rng.uniform(0.1, 0.9, 2) * side
    centre = np.array([columns.mean(), rows.mean()])
    matrix = np.array([[mirror * scale, 0, 0], [0, scale, 0]])
    matrix[:, 2] = target - matrix[:, :2] @ centre
    moved = cv2.warpAffine(outline.astype(np.uint8), matrix, (side, side), flags=cv2.INTER_NEAREST)
    grown = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * int(rng.integers(0, 4)) + 1,) * 2)
    return cv2.dilate(moved, grown) > 0
