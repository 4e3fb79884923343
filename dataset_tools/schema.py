"""What one sample is, and how it becomes the parts of a WebDataset shard and back.

Three configurations, each with one fixed set of parts in every sample (readers such as Hugging Face
``datasets`` take the schema from the first samples):

================  ====================================================================================
configuration     parts of sample ``KEY``
================  ====================================================================================
``real``          ``image.jpg|png``, ``annotations.json``, ``parsing.png``, ``effects.png``
``paired``        the same, ``background.jpg|png``: the clean plate, and ``known.png``: where it is known
``composite``     those of ``real``, ``background.jpg|png``, and ``layers.png``: one RGBA strip, people
                  stacked from top to bottom in annotation order, each complete also where others hide them
================  ====================================================================================

``effects.png`` says whose shadow or reflection a pixel shows: bit ``i`` is that of person ``i``, bit 7 that of anybody
from the eighth on. All of it is `EFFECTS_UNKNOWN` where that is not known.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from pydantic import Field

from dataset_tools.errors import Rejected
from dataset_tools.settings import Settings

SCHEMA_VERSION = "2.0"
Configuration = Literal["real", "paired", "composite"]
CONFIGURATIONS: tuple[Configuration, ...] = ("real", "paired", "composite")
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
ImageFormat = Literal["jpg", "png"]
EffectKind = Literal["shadow", "reflection"]

LONGEST_KEY = 80
KEY_PATTERN = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_KEY}}}")
"""What a sample key may be: WebDataset splits file names at the first dot, keys become file names, and a plain tar
holds names of 100 characters."""

KEYPOINTS = (
    "nose", "neck",
    "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
    "right_eye", "left_eye", "right_ear", "left_ear",
)  # fmt: skip
"""The 18 joints of OpenPose (COCO model), in its order."""

PARSING_LABELS: dict[str, tuple[str, ...]] = {
    "lip": (
        "Background", "Hat", "Hair", "Glove", "Sunglasses", "Upper-clothes", "Dress", "Coat", "Socks", "Pants",
        "Jumpsuits", "Scarf", "Skirt", "Face", "Left-arm", "Right-arm", "Left-leg", "Right-leg", "Left-shoe",
        "Right-shoe",
    ),
    "atr": (
        "Background", "Hat", "Hair", "Sunglasses", "Upper-clothes", "Skirt", "Pants", "Dress", "Belt", "Left-shoe",
        "Right-shoe", "Face", "Left-leg", "Right-leg", "Left-arm", "Right-arm", "Bag", "Scarf",
    ),
    "pascal": ("Background", "Head", "Torso", "Upper arms", "Lower arms", "Upper legs", "Lower legs"),
    "none": (),
}  # fmt: skip
"""Label sets of SCHP's three checkpoints. ``none``: no parsing was computed."""
NO_PARSING = 255
"""Value that fills ``parsing.png`` where no parsing was computed (label set ``none``)."""
EFFECTS_UNKNOWN = 255
"""Value that fills ``effects.png`` where nobody knows the effects (``made_by.effects`` is ``none``)."""
SEVERAL = 7
"""Bit of ``effects.png`` that the eighth person shares with all after them."""


class EncodingSettings(Settings):
    """How pictures are encoded in shards."""

    image_format: ImageFormat = "jpg"
    """``jpg`` for photographs; ``png`` keeps composites exact, at about four times the size."""
    jpeg_quality: int = Field(95, ge=1, le=95)
    """Pillow's JPEG quality, 1 to 95; chroma is not subsampled at 90 and above."""


@dataclass(frozen=True)
class MadeBy:
    """Who made a cue of a sample; all empty but ``name`` where it was no network."""

    name: str = "none"
    """Kind of the estimator, such as ``openpose``; ``annotated`` where the source ships the cue, ``none`` where it was
    not computed."""
    network: str = ""
    """Hub id, or name, of the network."""
    version: str = ""
    """Package that ran it, with its version, such as ``transformers 5.23.0``."""
    weights: str = ""
    """sha256 (hex) of the weights."""


@dataclass(frozen=True)
class Makers:
    """Who made the cues of a sample."""

    masks: MadeBy = MadeBy()
    """Who looked for people whom the source has no mask of; `Person.mask_by` says whose masks are theirs."""
    pose: MadeBy = MadeBy()
    parsing: MadeBy = MadeBy()
    plate: MadeBy = MadeBy()
    """What the clean plate is: ``annotated`` (the source ships it), ``video`` (estimated from a clip), ``chosen`` (a
    reviewer's choice; ``network`` names the method that painted it), ``photograph`` (in ``composite``)."""
    effects: MadeBy = MadeBy()
    """``annotated``, ``difference`` (of image and clean plate), ``composited``; ``none``: nobody knows them."""


@dataclass(eq=False)
class Person:
    """One person of a sample. Masks are (H, W) bool at the size of the sample's image."""

    id: str
    """Id of the person in its source."""
    mask: np.ndarray
    """Visible mask."""
    mask_by: str = "annotated"
    """``annotated``: the source has the mask; else the kind of the network that found the person."""
    mask_score: float = 1.0
    """The network's score of the person, 0..1; 1 for masks that the source has."""
    category: str = "Person"
    occluded: bool = False
    """The source says that something hides part of this person."""
    truncated: bool = False
    """The source says that this person goes beyond the picture."""
    keypoints: np.ndarray = field(default_factory=lambda: np.zeros((18, 3), np.float32))
    """(18, 3) float32: x, y in pixels, score 0..1, in the order of `KEYPOINTS`; 0, 0, 0 where not found."""
    complete_mask: np.ndarray | None = None
    """The person's mask as if nobody stood in front; known in ``composite``."""
    augmented_mask: np.ndarray | None = None
    """The visible mask with the faults that annotators and networks make (too wide, too narrow, shifted, limbs
    missing): what a model should be given in training; in ``composite``."""
    layer: np.ndarray | None = None
    """(H, W, 4) uint8 RGBA, the complete person; in ``composite``. RGB is 0 where alpha is 0."""
    effects: tuple[EffectKind, ...] = ()
    """Kinds of what `Sample.effects` shows of this person; empty where there is nothing, or its kind is not known."""
    order: int | None = None
    """0 for the rearmost person; in ``composite``."""
    occlusion: float | None = None
    """Share of the complete mask that others hide, 0..1; in ``composite``."""


@dataclass(frozen=True)
class Origin:
    """Where a picture that went into the sample comes from; attribution travels with every sample."""

    role: Literal["image", "background", "person"]
    """``image``: the photograph itself; in composites ``background`` and one ``person`` a person pasted."""
    source: str
    id: str
    licence: str
    author: str
    author_url: str
    title: str
    url: str
    landing_url: str
    sha256: str
    """Digest of the source file's bytes as read."""
    transform: str
    """What was done to the pixels, in order, such as ``rotate 90; resize 512x384``."""


@dataclass(eq=False)
class Sample:
    """One sample of a shard. Images are (H, W, 3) uint8 RGB."""

    key: str
    split: str
    configuration: Configuration
    image: np.ndarray
    people: list[Person]
    parsing: np.ndarray
    """(H, W) uint8 label map of ``label_set``; all `NO_PARSING` where ``label_set`` is ``none``."""
    label_set: str
    origins: list[Origin]
    stratum: str = ""
    background: np.ndarray | None = None
    """The clean plate; in ``paired`` and ``composite``."""
    known: np.ndarray | None = None
    """(H, W) bool: where the clean plate is known; in ``paired``. Elsewhere in it are plausible colours."""
    effects: np.ndarray | None = None
    """(H, W) uint8, bits as in ``effects.png``; people themselves may be in it, behind whom an effect falls. None: not
    known."""
    caption: str = ""
    """What the source says of the picture; empty where it says nothing."""
    made_by: Makers = Makers()

    @property
    def known_share(self) -> float:
        """Share of the picture where the clean plate is known, 0..1, to six decimals; 0 without one."""
        if self.known is not None:
            return round(float(self.known.mean()), 6)
        return 0.0 if self.background is None else 1.0

    @property
    def effects_share(self) -> float:
        """Share of the picture that shows anybody's shadow or reflection, 0..1, to six decimals; 0 if not known."""
        return 0.0 if self.effects is None else round(float((self.effects > 0).mean()), 6)

    def effects_of(self, people: Iterable[int]) -> np.ndarray | None:
        """(H, W) bool: where the picture shows effects of these people (indices); None where effects are not known."""
        if self.effects is None:
            return None
        bits = sum({1 << min(index, SEVERAL) for index in people})
        shown: np.ndarray = (self.effects & np.uint8(bits)) > 0
        return shown

    def to_parts(self, encoding: EncodingSettings) -> dict[str, bytes]:
        """Encode as shard parts (suffix to bytes), in the order in which they stand in the shard.

        Raises:
            ValueError: the sample breaks the schema; the message names the key and the field.
        """
        self.check()
        kind = encoding.image_format
        parts = {
            f"image.{kind}": encode_image(self.image, encoding),
            "annotations.json": self._annotations(),
        }
        if self.background is not None:
            parts[f"background.{kind}"] = encode_image(self.background, encoding)
        parts["parsing.png"] = encode_png(self.parsing)
        unknown = np.full(self.image.shape[:2], EFFECTS_UNKNOWN, np.uint8)
        parts["effects.png"] = encode_png(unknown if self.effects is None else self.effects)
        if self.known is not None:
            parts["known.png"] = encode_png(self.known.astype(np.uint8) * 255)
        if self.configuration == "composite":
            parts["layers.png"] = encode_png(np.concatenate([p.layer for p in self.people if p.layer is not None]))
        return parts

    @classmethod
    def from_parts(cls, key: str, parts: dict[str, bytes]) -> Sample:
        """Decode the parts of one sample. Raises `ValueError` naming the key and part that is missing or broken."""
        document = annotations_of(key, parts)
        try:
            return cls._from_document(key, parts, document)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"sample {key!r}: annotations.json breaks the schema: {error!r}") from None

    @classmethod
    def _from_document(cls, key: str, parts: dict[str, bytes], document: dict[str, Any]) -> Sample:
        image = _picture(key, parts, "image")
        people = []
        layers = _decode(key, parts, "layers.png", "RGBA") if "layers.png" in parts else None
        height, width = image.shape[:2]
        if layers is not None and layers.shape[:2] != (height * len(document["annotations"]), width):
            raise ValueError(f"sample {key!r}: layers.png is not one picture of the image's size a person")

        def decode(name: str, field: str, rle: dict[str, Any]) -> np.ndarray:
            try:
                if rle["size"] != [height, width]:
                    raise ValueError(f"is {rle['size']}, the image is {[height, width]} (height, width)")
                return decode_rle(rle)
            except ValueError as error:
                raise ValueError(f"sample {key!r}, person {name!r}: {field}: {error}") from None

        for index, entry in enumerate(document["annotations"]):
            name = entry["source_id"]
            masks = {
                field: decode(name, field, entry[field])
                for field in ("segmentation", "complete_segmentation", "augmented_segmentation")
                if field in entry
            }
            keypoints = np.array(entry["keypoints"], np.float32)
            if keypoints.shape != (54,):
                raise ValueError(f"sample {key!r}, person {name!r}: keypoints are not 18 times x, y, score")
            people.append(
                Person(
                    id=name,
                    mask=masks["segmentation"],
                    mask_by=entry["mask_by"],
                    mask_score=entry["mask_score"],
                    category=entry["category"],
                    occluded=entry["occluded"],
                    truncated=entry["truncated"],
                    keypoints=keypoints.reshape(18, 3),
                    complete_mask=masks.get("complete_segmentation"),
                    augmented_mask=masks.get("augmented_segmentation"),
                    effects=tuple(kind for kind in get_args(EffectKind) if entry[kind]),
                    layer=None if layers is None else layers[index * height : (index + 1) * height],
                    order=entry.get("order"),
                    occlusion=entry.get("occlusion"),
                )
            )
        background = any(name.startswith("background.") for name in parts)
        made_by = Makers(**{cue.name: MadeBy(**document["made_by"][cue.name]) for cue in fields(Makers)})
        effects = _decode(key, parts, "effects.png", "L")
        known = made_by.effects.name != "none"
        if not known and (effects.shape != (height, width) or (effects != EFFECTS_UNKNOWN).any()):
            raise ValueError(f"sample {key!r}: effects.png is not {EFFECTS_UNKNOWN} everywhere, but nobody knows them")
        return cls(
            key=key,
            split=document["split"],
            configuration=document["configuration"],
            image=image,
            people=people,
            parsing=_decode(key, parts, "parsing.png", "L"),
            label_set=document["label_set"],
            origins=[Origin(**origin) for origin in document["origins"]],
            stratum=document["stratum"],
            background=_picture(key, parts, "background") if background else None,
            known=_decode(key, parts, "known.png", "L") >= 128 if "known.png" in parts else None,
            effects=effects if known else None,
            caption=document["caption"],
            made_by=made_by,
        )

    def check(self) -> None:
        """Raise `ValueError` naming the key and field where the sample breaks the schema."""
        height, width = self.image.shape[:2]
        composite = self.configuration == "composite"

        def need(true: bool, what: str) -> None:
            if not true:
                raise ValueError(f"sample {self.key!r}: {what}")

        need(
            KEY_PATTERN.fullmatch(self.key) is not None,
            "keys hold letters, digits, '-' and '_' only",
        )
        need(len(self.people) > 0, "has no person")
        need(self.label_set in PARSING_LABELS, f"unknown label set {self.label_set!r}")
        need(
            (self.background is None) == (self.configuration == "real"),
            "a clean plate goes with paired and composite",
        )
        need(
            (self.known is None) == (self.configuration != "paired"),
            "where the clean plate is known goes with paired",
        )
        need(
            (self.effects is None) == (self.made_by.effects.name == "none"),
            "effects go with the name of who made them",
        )
        for name, array in [
            ("background", self.background),
            ("parsing", self.parsing),
            ("known", self.known),
            ("effects", self.effects),
        ]:
            need(
                array is None or array.shape[:2] == (height, width),
                f"{name} differs in size from the image",
            )
        need(self.parsing.dtype == np.uint8 and self.parsing.ndim == 2, "parsing is not a (H, W) uint8 label map")
        need(
            self.effects is None or (self.effects.dtype == np.uint8 and self.effects.ndim == 2),
            "effects are not a (H, W) uint8 map of bits",
        )
        need(self.known is None or self.known.dtype == bool, "known is not bool")
        for person in self.people:
            for name, array, channels in [
                ("mask", person.mask, ()),
                ("complete mask", person.complete_mask, ()),
                ("augmented mask", person.augmented_mask, ()),
                ("layer", person.layer, (4,)),
            ]:
                need(
                    array is None or array.shape == (height, width, *channels),
                    f"{name} of person {person.id!r} differs in size from the image",
                )
            need(
                person.keypoints.shape == (18, 3) and bool(np.isfinite(person.keypoints).all()),
                f"keypoints of person {person.id!r} are not (18, 3) finite numbers",
            )
            known = [
                person.complete_mask,
                person.augmented_mask,
                person.layer,
                person.order,
                person.occlusion,
            ]
            need(
                all(value is not None for value in known) if composite else all(value is None for value in known),
                f"person {person.id!r}: complete and augmented mask, layer, order and occlusion go with composite",
            )

    def _annotations(self) -> bytes:
        height, width = self.image.shape[:2]
        entries: list[dict[str, Any]] = []
        for index, person in enumerate(self.people):
            rle = encode_rle(person.mask)
            entry: dict[str, Any] = {
                "id": index,
                "source_id": person.id,
                "category": person.category,
                "category_id": 1,
                "mask_by": person.mask_by,
                "mask_score": round(float(person.mask_score), 4),
                "iscrowd": 0,
                "segmentation": rle,
                "bbox": [float(v) for v in coco_mask.toBbox(rle)],
                "area": int(coco_mask.area(rle)),
                "keypoints": [round(float(v), 3) for v in person.keypoints.reshape(-1)],
                "num_keypoints": int((person.keypoints[:, 2] > 0).sum()),
                "occluded": person.occluded,
                "truncated": person.truncated,
                # Flags, not a list: Hugging Face `datasets` makes "always null" of lists that are empty at first.
                **{kind: kind in person.effects for kind in get_args(EffectKind)},
            }
            if self.configuration == "composite":
                assert person.complete_mask is not None and person.augmented_mask is not None
                assert person.occlusion is not None
                entry["complete_segmentation"] = encode_rle(person.complete_mask)
                entry["augmented_segmentation"] = encode_rle(person.augmented_mask)
                entry["order"] = person.order
                entry["occlusion"] = round(float(person.occlusion), 6)
            entries.append(entry)
        document = {
            "schema_version": SCHEMA_VERSION,
            "key": self.key,
            "split": self.split,
            "configuration": self.configuration,
            "stratum": self.stratum,
            "caption": self.caption,
            "width": width,
            "height": height,
            "label_set": self.label_set,
            "known_share": self.known_share,
            "effects_share": self.effects_share,
            "made_by": asdict(self.made_by),
            "annotations": entries,
            "origins": [asdict(origin) for origin in self.origins],
        }
        return json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


ORIGIN_FIELDS = tuple(f.name for f in fields(Origin))


def annotations_of(key: str, parts: dict[str, bytes]) -> dict[str, Any]:
    """The parsed ``annotations.json`` of a sample. Raises `ValueError` naming the key."""
    try:
        document: dict[str, Any] = json.loads(parts["annotations.json"])
    except KeyError:
        raise ValueError(f"sample {key!r} has no part annotations.json") from None
    except ValueError as error:
        raise ValueError(f"sample {key!r}: annotations.json is not JSON: {error}") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"sample {key!r} has schema version {version!r}; this reader knows {SCHEMA_VERSION!r}: "
            "build the dataset again"
        )
    return document


def effect_bits(effects: Sequence[np.ndarray]) -> np.ndarray:
    """What ``effects.png`` holds, (H, W) uint8, of each person's effects, (H, W) bool, in the order of the people."""
    bits = np.zeros(effects[0].shape, np.uint8)
    for index, mask in enumerate(effects):
        bits[mask] |= np.uint8(1 << min(index, SEVERAL))
    return bits


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO compressed RLE of an (H, W) bool mask: ``{"size": [H, W], "counts": str}``, as pycocotools reads it."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "size": [int(v) for v in rle["size"]],
        "counts": rle["counts"].decode("ascii"),
    }


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """(H, W) bool mask of a COCO compressed RLE. Raises `ValueError` as `check_rle`."""
    check_rle(rle)  # pycocotools leaves what short runs do not reach uninitialised
    return coco_mask.decode(rle).astype(bool)


def check_rle(rle: dict[str, Any]) -> None:
    """Raise `ValueError` where the runs of a COCO compressed RLE are no lengths, or do not fill its size exactly."""
    height, width = rle["size"]
    runs = _runs(rle["counts"])
    if (runs < 0).any():
        raise ValueError(f"it has a run of {runs.min()} pixels")
    if (covered := int(runs.sum())) != height * width:
        raise ValueError(f"its runs cover {covered} pixels, its size is {height}x{width}")


_LONGEST_NUMBER = 6
"""Characters; those of longer ones pycocotools shifts too far. Runs of 2**29 pixels have 6."""


def _runs(counts: str | bytes) -> np.ndarray:
    """Run lengths of a compressed RLE, (n,) int64; none where it ends within a number.

    Raises `ValueError` for a number that no run needs.

    A number is 5 bits a character, low bits first, 32 marking that more follow; the highest bit is its sign. From
    the fourth number on, each is the difference to the one before last (``rleFrString`` of pycocotools).
    """
    code = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((code & 32) == 0)
    if ends.size == 0 or ends[-1] != code.size - 1:
        return np.zeros(0, np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST_NUMBER:
        raise ValueError(f"it has a number of {lengths.max()} characters")
    shifts = 5 * (np.arange(code.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((code & 31) << shifts, starts)
    runs -= ((code[ends] & 16) > 0) * (1 << 5 * lengths)
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs


MOST_PIXELS_READ = 178_956_970
"""Of a part's picture: Pillow's own limit, by which all who read with it refuse larger ones."""
LONGEST_JPEG = 65_500
"""Pixels of a side: libjpeg's limit."""


def check_encodable(image: np.ndarray, encoding: EncodingSettings) -> None:
    """Raise `Rejected` where the format has no such long sides as (H, W, 3) has."""
    if encoding.image_format == "jpg" and max(image.shape) > LONGEST_JPEG:
        what = f"{image.shape[1]}x{image.shape[0]} pixels, and JPEG has sides of {LONGEST_JPEG} at most"
        raise Rejected("too-long-for-jpeg", f"{what}: set max_side, or another image_format")


def encode_image(image: np.ndarray, encoding: EncodingSettings) -> bytes:
    """Encode (H, W, 3) uint8 RGB as the settings say; the same pixels give the same bytes."""
    if encoding.image_format == "png":
        return encode_png(image)
    buffer = io.BytesIO()
    subsampling = 0 if encoding.jpeg_quality >= 90 else 2
    Image.fromarray(image).save(buffer, "JPEG", quality=encoding.jpeg_quality, subsampling=subsampling)
    return buffer.getvalue()


def encode_png(image: np.ndarray) -> bytes:
    """Encode a uint8 array of shape (H, W), (H, W, 3) or (H, W, 4) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def _picture(key: str, parts: dict[str, bytes], stem: str) -> np.ndarray:
    for kind in ("jpg", "png"):
        if f"{stem}.{kind}" in parts:
            return _decode(key, parts, f"{stem}.{kind}", "RGB")
    raise ValueError(f"sample {key!r} has no part {stem}.jpg or {stem}.png")


def _decode(key: str, parts: dict[str, bytes], name: str, mode: str) -> np.ndarray:
    if name not in parts:
        raise ValueError(f"sample {key!r} has no part {name}")
    try:
        with Image.open(io.BytesIO(parts[name])) as picture:
            return np.asarray(picture.convert(mode))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"sample {key!r}: {name} cannot be decoded: {error}") from None
