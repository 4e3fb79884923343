"""Cues that a source ships beside its pictures: keypoints, parsing, clean plates and effects read from side-car files.

``{root}/sidecar/{split}/{id}.json`` holds ``{"people": [{"box_id": str, "keypoints": 18 x [x, y, score]}]}`` with
x and y in 0..1 of the upright picture; ``.parsing.png`` a map of LIP labels and ``.plate.png`` the scene without
people, both upright. Where there is an ``.effects.png`` too, a map of bits, bit ``effects_bit`` of a person is set
where the picture shows their shadow or reflection, and their ``effects`` names which of the two; other bits are people
without a box. Both maps are grey, or have a palette, whose indices count then and not its colours: SCHP writes such.
"""

from __future__ import annotations

import hashlib
import io
import typing
from collections.abc import Callable, Sequence
from typing import Literal

import cv2
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dataset_tools.errors import Rejected, UserError
from dataset_tools.estimators import CleanPlate, PeopleInPicture
from dataset_tools.fetch import FetchSettings, open_filesystem, read_bytes, with_retries
from dataset_tools.file_names import infos_below
from dataset_tools.images import at_size
from dataset_tools.records import ImageRecord
from dataset_tools.schema import PARSING_LABELS, EffectKind, MadeBy
from dataset_tools.settings import Settings, digest_of
from dataset_tools.storage import version_of
from dataset_tools.storage_options import Location, StorageOptions


class AnnotatedSettings(Settings):
    """Where the side-cars lie."""

    kind: Literal["annotated"] = "annotated"
    root: Location | Literal[""] = ""
    """Folder (fsspec URL or path) that holds ``sidecar/{split}/``; empty: the root of the source itself, which is
    where the sample world has them, with the source's own options."""
    root_options: StorageOptions = Field({})
    """fsspec storage options of the root; secrets in them are named, as ``{env: NAME}`` or ``{block: secret/NAME}``."""
    fetch: FetchSettings = FetchSettings()

    def open(self) -> Annotated:
        """The reader of these side-cars."""
        return Annotated(self)


_Share = typing.Annotated[float, Field(ge=0, le=1)]


class _SideCarPerson(BaseModel):
    # Python's json writes and reads NaN.
    model_config = ConfigDict(allow_inf_nan=False)

    box_id: str
    keypoints: list[tuple[float, float, _Share]] = Field(min_length=18, max_length=18)
    effects_bit: int | None = Field(None, ge=0, le=7)
    effects: tuple[EffectKind, ...] = ()


class _SideCar(BaseModel):
    people: list[_SideCarPerson]


class Annotated:
    """Reads pose, parsing, clean plates and effects of an image from its side-cars, scaled to the size of the image.

    A side-car that is missing, broken or out of reach gives `Rejected`; a person whom the side-car does not know has
    no keypoints.
    """

    name = "annotated"
    label_set = "lip"
    batch_size = 1
    made_by = MadeBy("annotated")

    def __init__(self, settings: AnnotatedSettings) -> None:
        self.places: tuple[str, ...] = (settings.root,)
        self._settings = settings
        self._folder = f"{settings.root}/sidecar"

    def fingerprint(self) -> str:
        """Digest of names, sizes and times (or ETags) of all side-cars, without reading them.

        Raises:
            UserError: the root cannot be read.
        """
        settings = self._settings

        def find() -> list[list[str]]:
            filesystem, folder = open_filesystem(self._folder, settings.fetch, settings.root_options)
            if isinstance(filesystem, LocalFileSystem):
                below = infos_below(filesystem, folder) if filesystem.isdir(folder) else {}
                return [[f"/{name}", *version_of(info)] for name, info in below.items()]
            filesystem.invalidate_cache()
            found = filesystem.find(folder, detail=True)
            return [[name.removeprefix(folder), *version_of(info)] for name, info in found.items()]

        try:
            return digest_of(sorted(with_retries(find, self._folder, settings.fetch)))
        except Rejected as rejected:
            raise UserError(f"side-cars: {rejected.message}") from None

    def check(self) -> None:
        """Nothing: `fingerprint` has looked."""

    def estimate_pose(self, pictures: Sequence[PeopleInPicture]) -> list[np.ndarray | Rejected]:
        """Keypoints of the people called ``ids``. See `PoseEstimator.estimate_pose`."""
        return [_or_why(self._pose, picture) for picture in pictures]

    def estimate_parsing(self, pictures: Sequence[PeopleInPicture]) -> list[np.ndarray | Rejected]:
        """LIP labels within ``masks``. See `ParsingEstimator.estimate_parsing`."""
        return [_or_why(self._parsing, picture) for picture in pictures]

    def _pose(self, picture: PeopleInPicture) -> np.ndarray:
        record = _record_of(picture)
        known = {person.box_id: np.array(person.keypoints, np.float32) for person in self._people(record)}
        height, width = picture.image.shape[:2]
        found = np.zeros((len(picture.ids), 18, 3), np.float32)
        for index, person_id in enumerate(picture.ids):
            if person_id in known:
                found[index] = known[person_id] * np.array([width, height, 1], np.float32)
        found[found[..., 2] <= 0] = 0
        return found

    def _parsing(self, picture: PeopleInPicture) -> np.ndarray:
        height, width = picture.image.shape[:2]
        record = _record_of(picture)
        labels = _map(record, "parsing.png", self._read(record, "parsing.png"))
        labels = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        people = np.logical_or.reduce(picture.masks) if picture.masks else np.zeros((height, width), bool)
        labels = np.where(people, labels, 0).astype(np.uint8)
        if (highest := int(labels.max())) > (last := len(PARSING_LABELS[self.label_set]) - 1):
            what = f"{highest} in parsing.png is no label of {self.label_set}, whose last is {last}"
            raise Rejected("broken-annotation", f"side-car of {record.id}: {what}")
        return labels

    def clean_plate(self, image: np.ndarray, record: ImageRecord) -> CleanPlate:
        """The scene without people. See `PlateProvider.clean_plate`."""
        height, width = image.shape[:2]
        data = self._read(record, "plate.png")
        plate = _decoded(record, "plate.png", data, lambda picture: picture.convert("RGB"))
        plate = at_size(plate, height, width)
        effects, kinds = self._effects(record, (height, width))
        sha256 = hashlib.sha256(data).hexdigest()
        return CleanPlate(plate, np.ones((height, width), bool), self.made_by, effects, kinds, sha256=sha256)

    def _effects(
        self, record: ImageRecord, size: tuple[int, int]
    ) -> tuple[dict[str, np.ndarray] | None, dict[str, tuple[EffectKind, ...]]]:
        """Where the picture shows whose effects, and of what kinds; None where the side-cars do not say."""
        try:
            bits = _map(record, "effects.png", self._read(record, "effects.png"))
        except Rejected as rejected:
            if rejected.reason == "no-annotation" and not rejected.transient:
                return None, {}
            raise
        bits = cv2.resize(bits, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT).astype(np.uint8)
        people = self._people(record)
        bit = {person.box_id: np.uint8(1 << person.effects_bit) for person in people if person.effects_bit is not None}
        effects = {box_id: bits & own > 0 for box_id, own in bit.items()}
        effects[""] = bits & ~np.bitwise_or.reduce([np.uint8(0), *bit.values()]) > 0
        return effects, {person.box_id: person.effects for person in people}

    def _people(self, record: ImageRecord) -> list[_SideCarPerson]:
        try:
            return _SideCar.model_validate_json(self._read(record, "json")).people
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise Rejected("broken-annotation", f"side-car of {record.id}: not the expected JSON ({what})") from None

    def _read(self, record: ImageRecord, suffix: str) -> bytes:
        path = f"{self._folder}/{record.split}/{record.id}.{suffix}"
        try:
            return read_bytes(path, self._settings.fetch, self._settings.root_options)
        except Rejected as rejected:
            if rejected.reason in ("not-found", "no-such-folder"):
                message = f"there is no side-car {path}"
                raise Rejected("no-annotation", message, transient=rejected.transient) from None
            raise


def _map(record: ImageRecord, suffix: str, data: bytes) -> np.ndarray:
    """Labels or bits, (h, w) uint8: what a palette has for them is colours to look at."""
    return _decoded(record, suffix, data, lambda picture: picture if picture.mode == "P" else picture.convert("L"))


def _decoded(record: ImageRecord, suffix: str, data: bytes, read: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return np.asarray(read(picture))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Rejected("broken-annotation", f"side-car of {record.id}: {suffix} cannot be decoded: {error}") from None


def _record_of(picture: PeopleInPicture) -> ImageRecord:
    if picture.record is None:
        raise Rejected("no-annotation", "side-cars belong to the pictures of a source")
    return picture.record


def _or_why(estimate: Callable[[PeopleInPicture], np.ndarray], picture: PeopleInPicture) -> np.ndarray | Rejected:
    try:
        return estimate(picture)
    except Rejected as why:
        return why
