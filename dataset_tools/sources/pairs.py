"""Source ``pairs``: pictures with their clean plates, from a list of pairs (`dataset_tools.pair_list`) or as published.

Pictures of one scene never come into two splits: those of one group, and those whose plates are the same file or have
the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Literal

import cv2
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from pydantic import Field, model_validator

from dataset_tools.errors import Rejected, UserError
from dataset_tools.estimators import CleanPlate
from dataset_tools.fetch import FetchSettings, look_up, map_in_order, open_filesystem, read_bytes, with_retries
from dataset_tools.file_names import infos_below, printable
from dataset_tools.images import (
    PHOTO_FORMATS,
    DecodeSettings,
    at_size,
    decode_image,
    exif_orientation,
    opened,
    orient,
    read_orientation,
    undo_orientation,
)
from dataset_tools.mask_files import MaskFile, decode_mask_file, people_of
from dataset_tools.masks import bounds, stratum
from dataset_tools.pair_layouts import LayoutSettings, Rows, cell_of, rows_of_files, rows_of_tables
from dataset_tools.pair_list import PAIR_LIST, SET_ASIDE, PairRow, read_pair_list, read_set_aside_list
from dataset_tools.photo_masks import MAX_PIXELS, upright_turn
from dataset_tools.picture_tables import PictureTable
from dataset_tools.ranges import is_http
from dataset_tools.records import SPLITS, Curation, ImageRecord, InstanceRecord, Rejection, Split
from dataset_tools.schema import KEY_PATTERN, SEVERAL, MadeBy
from dataset_tools.settings import Settings, digest_of
from dataset_tools.splits import SplitShares, split_of
from dataset_tools.storage import version_of
from dataset_tools.storage_options import Location, StorageOptions

_READERS = 8
_ASPECT = 0.02
"""By how much, relatively, the aspect ratio of a plate or map may differ from that of its picture."""
_PLATE_SCALE = 0.8
"""Least size of a plate, relative to its picture: what is enlarged more is not what stood there."""


class PairsSettings(Settings):
    """Pairs of a picture and its clean plate."""

    kind: Literal["pairs"] = "pairs"
    root: Location
    """Folder of the pictures: a path or fsspec URL."""
    root_options: StorageOptions = Field({})
    """fsspec storage options of the root; secrets in them are named, as ``{env: NAME}`` or ``{block: secret/NAME}``."""
    layout: LayoutSettings | None = None
    """How a published set lies below the root; null: in ``pairs.jsonl`` (`dataset_tools.pair_list.PairRow`)."""
    splits: SplitShares = Field({"train": 0.8, "validation": 0.1, "test": 0.1})
    """Share of each split among the scenes whose split nobody names; it follows from the scene's name."""
    licence: str = ""
    """Licence of all pictures whose row names none; a published set needs one."""
    author: str = ""
    """Author of all pictures whose row names none."""
    category: str = "Person"
    """What the masks are of: published sets are often of any object."""
    fetch: FetchSettings = FetchSettings()

    @model_validator(mode="after")
    def _licensed(self) -> PairsSettings:
        if self.layout is not None and not self.licence:
            raise ValueError("licence: name the licence of the set, such as 'CC BY 4.0'; its publisher says which")
        return self

    def open(self, tables: dict[str, list[str]] | None = None) -> PairsSource:
        """The source that these settings describe; it has no ``tables``."""
        return PairsSource(self)


class PairsSource:
    """Implements `dataset_tools.sources.Source` and `dataset_tools.estimators.PlateProvider`."""

    name = "pairs"
    applies_exif = True

    def __init__(self, settings: PairsSettings) -> None:
        self.settings = settings

    @property
    def places(self) -> tuple[str, ...]:
        """The root."""
        return (self.settings.root,)

    def check(self) -> None:
        """See `dataset_tools.sources.Source.check`."""
        self.fingerprint()

    def tables(self) -> dict[str, list[str]]:
        """None: files are listed by `curate`."""
        return {}

    def fingerprint(self) -> str:
        """Digest of the settings and of name, size and time (or ETag) of each file; over HTTP, of the list alone.

        Raises:
            UserError: the root cannot be read, or holds no pairs.
        """
        settings, files = self.settings, self._files
        if files is None:
            self._listed()  # where a layout needs it
            try:
                found = look_up(f"{settings.root}/{PAIR_LIST}", settings.fetch, settings.root_options)
            except Rejected as rejected:
                raise UserError(rejected.message) from None
            files = {PAIR_LIST: version_of(found)}
        if settings.layout is None and PAIR_LIST not in files:
            raise UserError(f"{settings.root} has no {PAIR_LIST}")
        chosen = settings.model_dump(mode="json", exclude={"fetch"})
        chosen["max_bytes"] = settings.fetch.max_bytes  # what is larger is set aside for good
        return digest_of({"settings": chosen, "files": files})

    def curate(self) -> Curation:
        """All pictures whose files can be used, in the order of the list, and what the list's maker set aside.

        Every file is read once: what is the same in two rows is told by its bytes.

        Raises:
            UserError: there is no pair, its list or table cannot be read, or what its maker set aside cannot.
        """
        rejected = self._set_aside()
        pairs = list(self._pairs(rejected))
        sound: list[tuple[_Pair, _Read]] = []
        first: dict[str, str] = {}
        for pair, read in zip(pairs, map_in_order(self._read, pairs, _READERS, 2 * _READERS), strict=True):
            if not isinstance(read, Rejected) and (same := first.setdefault(read.image, pair.row.id)) != pair.row.id:
                read = Rejected("duplicate-image", f"its picture has the same bytes as that of {same}")
            if isinstance(read, Rejected):
                rejected.append(pair.set_aside(read))
            else:
                sound.append((pair, read))
        splits = _splits([(pair.row, [read.image, read.background]) for pair, read in sound], self.settings.splits)
        records = []
        for (pair, read), split in zip(sound, splits, strict=True):
            if isinstance(split, Rejected):
                rejected.append(pair.set_aside(split))
                continue
            records.append(self._record(pair.row, read, split))
            for stage, reason, message in read.mended:
                rejected.append(Rejection(split, pair.row.id, "", stage, "mended", reason, message))
        return Curation(records, rejected)

    def state(self, record: ImageRecord) -> list[str]:
        """Nothing: a record holds a digest of all its files."""
        return []

    def read_image(self, record: ImageRecord) -> bytes:
        """The encoded image file. Raises `Rejected` as `dataset_tools.fetch.read_bytes`."""
        return self._bytes(record.image.removeprefix(f"{self.settings.root}/"))

    def read_mask(self, record: ImageRecord, index: int) -> np.ndarray:
        """Mask of one person, (h, w) bool in the orientation of the picture's stored pixels.

        Raises:
            Rejected: as `read_image` and `dataset_tools.mask_files.decode_mask_file`.
        """
        turn, orientation, value, name = record.instances[index].mask.split(":", 3)
        file = self._mask_file(name, self._bytes(name))
        with _named(name):
            mask = file.person(int(value) if value else None)
        return undo_orientation(orient(mask, int(turn)), int(orientation))

    def clean_plate(self, image: np.ndarray, record: ImageRecord) -> CleanPlate:
        """The scene without people. See `dataset_tools.estimators.PlateProvider.clean_plate`."""
        if not record.plate:
            raise Rejected("no-plate", f"{record.id} has no clean plate")
        files = _PlateFiles.parse(record.plate)
        height, width = size = image.shape[:2]
        # Shrunk in the way in which the picture was, what both show stays the same.
        limits = DecodeSettings(min_side=1, max_side=max(16, *size))
        data = self._bytes(files.background)
        plate = decode_image(data, limits).image
        if plate.shape[:2] != size:
            plate = at_size(plate, height, width)
        known = np.ones(size, bool)
        if files.known:
            there = files.upright(*_map(self._bytes(files.known), bits=False)) >= 128
            # Where pixels were merged, all of them must be known.
            shares = cv2.resize(there.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
            known = shares > 0.999
        effects = None
        if files.effects and not files.bits:
            mask = self._mask_file(files.effects, self._bytes(files.effects))
            somebodys = files.upright(mask.whole().view(np.uint8), mask.orientation)
            somebodys = cv2.resize(somebodys, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
            effects = {"": somebodys > 0}
        elif files.effects:
            bits = files.upright(*_map(self._bytes(files.effects), bits=True))
            bits = cv2.resize(bits, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
            effects = {
                instance.id: np.bitwise_and(bits, 1 << min(index, SEVERAL)) > 0
                for index, instance in enumerate(record.instances)
            }
        digest = hashlib.sha256(data).hexdigest()
        return CleanPlate(plate, known, files.made_by, effects, tells_effects=files.tells_effects, sha256=digest)

    @cached_property
    def _files(self) -> dict[str, list[str]] | None:
        """Names below the root, sorted, each with its size and version; None where nothing can be listed."""
        settings = self.settings

        def find() -> dict[str, list[str]] | None:
            filesystem, path = open_filesystem(settings.root, settings.fetch, settings.root_options)
            if is_http(filesystem):
                return None
            if isinstance(filesystem, LocalFileSystem):
                if not filesystem.isdir(path):
                    raise UserError(f"folder {settings.root} does not exist")
                return {name: version_of(info) for name, info in infos_below(filesystem, path).items()}
            filesystem.invalidate_cache()
            found = filesystem.find(path, detail=True)
            return {name.removeprefix(path).lstrip("/"): version_of(found[name]) for name in sorted(found)}

        try:
            return with_retries(find, settings.root, settings.fetch)
        except Rejected as rejected:
            raise UserError(rejected.message) from None

    def _listed(self) -> list[str]:
        if self.settings.layout is not None and self._files is None:
            root = self.settings.root
            raise UserError(
                f"{root}: files cannot be listed over HTTP, as a layout needs: name a store or a local copy"
            )
        return list(self._files or {})

    def _bytes(self, name: str) -> bytes:
        settings = self.settings
        if settings.layout is not None and settings.layout.table:
            file, row, column = cell_of(name)
            return self._table(file).picture(row, column)
        return read_bytes(f"{settings.root}/{name}", settings.fetch, settings.root_options)

    def _table(self, name: str) -> PictureTable:
        settings = self.settings
        return PictureTable(f"{settings.root}/{name}", settings.fetch, settings.root_options)

    def _set_aside(self) -> list[Rejection]:
        if self._files is not None and SET_ASIDE not in self._files:
            return []
        try:
            return read_set_aside_list(self._bytes(SET_ASIDE))
        except Rejected as error:
            if error.reason == "not-found":
                return []
            raise UserError(error.message) from None
        except ValueError as error:
            raise UserError(
                f"{self.settings.root}/{SET_ASIDE} cannot be read: {' '.join(str(error).split())}"
            ) from None

    def _mask_file(self, name: str, data: bytes) -> MaskFile:
        with _named(name):
            return decode_mask_file(data, MAX_PIXELS)

    def _pairs(self, rejected: list[Rejection]) -> Iterator[_Pair]:
        """Rows with an id of their own and files below the root; the others go to ``rejected``."""
        seen: dict[str, str] = {}
        for where, called, row in self._rows():
            if isinstance(row, Rejected):
                message, called = printable(f"{where}: {row.message}"), printable(called)
                rejected.append(Rejection("", called, "", "curate", "row-rejected", row.reason, message))
                continue
            pair, fault = _Pair(where, row), _fault_of(row)
            if fault is None and row.id in seen:
                fault = Rejected("repeated-id", f"{row.id} is the id of {seen[row.id]} too")
            if fault is not None:
                rejected.append(pair.set_aside(fault, "row-rejected"))
                continue
            seen[row.id] = where
            yield pair

    def _rows(self) -> Rows:
        layout = self.settings.layout
        if layout is not None:
            names = self._listed()
            yield from rows_of_tables(layout, names, self._table) if layout.table else rows_of_files(layout, names)
            return
        try:
            data = self._bytes(PAIR_LIST)
        except Rejected as error:
            raise UserError(error.message) from None
        for number, row in read_pair_list(data):
            fault = Rejected("malformed-row", str(row)) if isinstance(row, ValueError) else row
            yield f"line {number} of {PAIR_LIST}", "", fault

    def _read(self, pair: _Pair) -> _Read:
        """Read all files of a row. Raises `Rejected` where one cannot be used."""
        row = pair.row
        data = {name: self._bytes(name) for name in dict.fromkeys(_files_of(row))}
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}
        stored_size, orientation = _header(row.image, data)
        size = _upright_size(stored_size, orientation)
        read = _Read(digests[row.image], digests.get(row.background, ""), digest_of(list(digests.values())))
        if read.image == read.background:
            raise Rejected("plate-is-picture", f"{row.background} has the same bytes as the picture: nobody is gone")
        if row.background:
            plate = _upright_size(*_header(row.background, data))
            _check_size(row.background, plate, size, _PLATE_SCALE)
            if plate != size:
                message = f"the plate is {plate[0]}x{plate[1]} pixels, its picture {size[0]}x{size[1]}"
                read.mended.append(("plate", "plate-resized", message))
            files = _PlateFiles(
                row.background,
                row.known,
                row.effects,
                self.settings.layout is None,
                stored_size,
                orientation,
                row.plate_by,
                row.tells_effects,
            )
            for name, bits in ((row.known, False), (row.effects, files.bits)):
                if not name:
                    continue
                with _named(name):
                    upright = files.upright(*_map(data[name], bits))
                _check_size(name, upright.shape[::-1], size)
            read.plate = files.text()
        masks: list[np.ndarray] = []
        for person in people_of([self._mask_file(name, data[name]) for name in row.masks]):
            name, mask = row.masks[person.file], person.mask
            assert isinstance(mask, np.ndarray)
            turn = upright_turn(mask.shape, person.orientation, stored_size, orientation)
            upright = orient(mask, turn)
            _check_size(name, upright.shape[::-1], size)
            if not upright.any():
                raise Rejected("empty-mask", f"{name}: no pixel belongs to the person")
            if person.note:
                read.mended.append(("mask", "several-values", f"{name}: {person.note}"))
            stored = undo_orientation(upright, orientation)
            read.instances.append(
                InstanceRecord(
                    id=str(len(masks) + 1),
                    category=self.settings.category,
                    box=_box_of(stored),
                    mask=f"{turn}:{orientation}:{'' if person.value is None else person.value}:{name}",
                    digest=hashlib.sha256(np.packbits(stored).tobytes()).hexdigest(),
                    mask_by=row.masks_by,
                    mask_score=row.mask_scores[person.file] if row.mask_scores else 1.0,
                )
            )
            masks.append(cv2.resize(upright.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT) > 0)
        read.stratum = stratum(masks) if masks else ""
        return read

    def _record(self, row: PairRow, read: _Read, split: Split) -> ImageRecord:
        return ImageRecord(
            id=row.id,
            source=self.name,
            split=split,
            role="people",
            stratum=read.stratum,
            image=f"{self.settings.root}/{row.image}",
            licence=row.licence or self.settings.licence,
            author=row.author or self.settings.author,
            author_url=row.author_url,
            title=row.title or PurePosixPath(row.image).stem,
            url=row.url,
            landing_url=row.landing_url,
            caption=row.caption,
            plate=read.plate,
            digest=read.digest,
            instances=tuple(read.instances),
        )


@dataclass(frozen=True)
class _Pair:
    """A row, and where it stands."""

    where: str
    row: PairRow

    def set_aside(
        self, why: Rejected, outcome: Literal["row-rejected", "image-rejected"] = "image-rejected"
    ) -> Rejection:
        message = printable(f"{self.where}: {why.message}")
        image, split = printable(self.row.id)[:80], self.row.split or ""
        return Rejection(split, image, "", "curate", outcome, why.reason, message, why.transient)


@dataclass
class _Read:
    """What was found out about the files of one row."""

    image: str
    """sha256 of the picture's bytes."""
    background: str
    """sha256 of the plate's bytes; empty where there is none."""
    digest: str
    """Of all files."""
    plate: str = ""
    """For `ImageRecord.plate`."""
    stratum: str = ""
    instances: list[InstanceRecord] = field(default_factory=list)
    mended: list[tuple[str, str, str]] = field(default_factory=list)
    """Stage, reason, message."""


@dataclass(frozen=True)
class _PlateFiles:
    """What `ImageRecord.plate` says, as JSON: where the plate and its maps lie, and how they are turned."""

    background: str
    known: str
    effects: str
    bits: bool
    """Whether ``effects`` has a bit for each person; a published set tells of somebody's."""
    stored_size: tuple[int, int]
    """Width and height of the picture as stored."""
    orientation: int
    """EXIF orientation of the picture."""
    made_by: MadeBy
    tells_effects: bool

    def text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> _PlateFiles:
        told = json.loads(text)
        told["stored_size"] = (told["stored_size"][0], told["stored_size"][1])
        return cls(**{**told, "made_by": MadeBy(**told["made_by"])})

    def upright(self, pixels: np.ndarray, own: int) -> np.ndarray:
        """Pixels (h, w) of a map whose file names the orientation ``own``, as the picture is seen."""
        turned = orient(pixels, upright_turn(pixels.shape, own, self.stored_size, self.orientation))
        return np.ascontiguousarray(turned)


def _fault_of(row: PairRow) -> Rejected | None:
    if not KEY_PATTERN.fullmatch(row.id):
        return Rejected("bad-id", f"id {row.id!r} is not 1 to 80 letters, digits, '-' and '_'")
    for name in _files_of(row):
        parts = name.split("/")
        if not name or name.startswith("/") or "\0" in name or "://" in name or "::" in name or ".." in parts:
            return Rejected("bad-path", f"{name!r} is no path below the folder of the list")
        if any(part.startswith(".") and part != "." for part in parts):
            return Rejected("bad-path", f"{name!r} is hidden, and nobody would notice when it changes: rename it")
    if row.mask_scores and len(row.mask_scores) != len(row.masks):
        return Rejected("malformed-row", f"{len(row.mask_scores)} mask_scores for {len(row.masks)} masks")
    return None


def _files_of(row: PairRow) -> list[str]:
    maps = [name for name in (row.background, row.known, row.effects) if name]
    return [row.image, *maps, *row.masks]


def _splits(rows: Sequence[tuple[PairRow, list[str]]], shares: dict[Split, float]) -> list[Split | Rejected]:
    """The split of each row, given with the digests of its picture and plate: one a scene.

    What is a picture of one row may be the plate of another, from which fewer people have vanished. Of a scene
    whose rows name several splits the held-out one keeps its rows, and the others are refused.
    """
    parent: dict[str, str] = {}

    def scene(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for row, pictures in rows:
        for picture in filter(None, pictures):
            one, other = sorted([scene(f"group {row.group}"), scene(f"plate {picture}")])
            parent[other] = one
    scenes = [scene(f"group {row.group}") for row, _ in rows]
    named: dict[str, Split] = {}
    for (row, _), name in zip(rows, scenes, strict=True):
        if row.split is not None:
            named[name] = max(named.get(name, row.split), row.split, key=SPLITS.index)

    def split(row: PairRow, name: str) -> Split | Rejected:
        held = named.get(name) or split_of(hashlib.sha256(name.encode()).hexdigest(), shares)
        if row.split not in (None, held):
            return Rejected("scene-in-two-splits", f"it is of {row.split}, and others of its scene are of {held}")
        return held

    return [split(row, name) for (row, _), name in zip(rows, scenes, strict=True)]


def _header(name: str, data: dict[str, bytes]) -> tuple[tuple[int, int], int]:
    with _named(name):
        return read_orientation(data[name], MAX_PIXELS)


def _upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if orientation >= 5 else size


def _check_size(name: str, found: tuple[int, ...], wanted: tuple[int, int], least: float = 0.0) -> None:
    """Raise `Rejected` where a picture (width, height) is of another aspect than ``wanted``, or much smaller."""
    across, down = found[0] / wanted[0], found[1] / wanted[1]
    rounded = abs(found[0] - wanted[0]) <= 1 and abs(found[1] - wanted[1]) <= 1
    if (abs(across / down - 1) > _ASPECT and not rounded) or min(across, down) < least:
        message = f"{name} is {found[0]}x{found[1]} pixels, its picture {wanted[0]}x{wanted[1]}"
        raise Rejected("other-size", message)


def _map(data: bytes, bits: bool) -> tuple[np.ndarray, int]:
    """Values (h, w) uint8 of a map as stored, and its EXIF orientation.

    Raises:
        Rejected: ``not-a-map``, or as `dataset_tools.images.opened`.
    """
    with opened(data, PHOTO_FORMATS, MAX_PIXELS) as picture:
        picture.load()
        return _values(picture, bits), exif_orientation(picture)


def _values(picture: Image.Image, bits: bool) -> np.ndarray:
    if bits and picture.mode == "1":
        return np.asarray(picture).astype(np.uint8)
    if picture.mode.startswith("I;16") and not bits:
        return (np.asarray(picture) >> 8).astype(np.uint8)
    if picture.mode.startswith(("I", "F")):
        raise Rejected("not-a-map", "it has numbers of more than 8 bits: save it as a grey picture, 0 to 255")
    rgba = np.asarray(picture.convert("RGBA"))
    coloured = bits and (rgba[..., :3] != rgba[..., :1]).any()
    if coloured and picture.mode == "P":  # colours to look at: the bits are the indices
        return np.asarray(picture)
    if rgba[..., 3].min() < 255:
        raise Rejected("not-a-map", "it is transparent in part: save it as a grey picture")
    if coloured:
        raise Rejected("not-a-map", "it has colours, and bits are grey values: save it as a grey picture")
    return np.asarray(picture.convert("L"))


def _box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    (top, bottom, left, right), (height, width) = bounds(mask), mask.shape
    return left / width, top / height, right / width, bottom / height


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say of which file a `Rejected` speaks."""
    try:
        yield
    except Rejected as error:
        raise Rejected(error.reason, f"{name}: {error.message}", transient=error.transient) from None
