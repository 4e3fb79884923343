"""Synthetic samples: people cut out by their masks, pasted onto person-free pictures, with everything known.

People stand on a ground plane seen by one camera a picture: whoever stands lower in the picture is nearer, larger
and in front. Layers are straight (not premultiplied) RGBA; pasting them in ``order`` over the background gives
the image, except where people change the light: their shadows on the ground and on people behind, and their
reflections, belong to the image alone, neither to a layer nor to the background (`dataset_tools.lighting`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import cv2
import numpy as np
from pydantic import Field, field_validator, model_validator

from dataset_tools.donors import Cutout, CutoutRow, DonorSettings
from dataset_tools.errors import Rejected
from dataset_tools.lighting import Effects, Figure, Ground, blend, cast
from dataset_tools.masks import AugmentSettings, augment_mask, bounds, occlusion, stratum
from dataset_tools.picture_light import LightSettings, draw_gloss, draw_light
from dataset_tools.records import SPLITS, Split
from dataset_tools.schema import (
    KEYPOINTS,
    MOST_PIXELS_READ,
    NO_PARSING,
    PARSING_LABELS,
    MadeBy,
    Makers,
    Origin,
    Person,
    Sample,
    effect_bits,
)
from dataset_tools.settings import Settings
from dataset_tools.shards import keypoints_in_box

CHILDREN = frozenset({"Boy", "Girl"})
CHILD_HEIGHT = 0.72
"""Height of a child relative to an adult at the same distance."""
_MIRRORED_JOINTS = [
    KEYPOINTS.index(name.replace("right_", "left_") if "right_" in name else name.replace("left_", "right_"))
    for name in KEYPOINTS
]
_ROOM = (1.0, 0.5, 0.2, 0.0)
"""Where not all people found a place, all are placed anew from a smaller range of heights: these shares of it."""
_ATTEMPTS = 4
"""Sizes tried for one person; each is smaller than the one before, on average."""
_PROPOSALS = 12
"""Columns tried for each size."""
_GAP = 2
"""Pixels at least between people who are to stand apart."""
_MAX_COLOUR_SHIFT = np.array([20, 10, 10], np.float32)
"""Bound of the colour match in L, a, b."""
_FOCAL = 1.0
"""Focal length of the camera as a share of the picture's longer side: 53 degrees."""
Contact = Literal["apart", "allowed", "wanted"]


LOWEST_FEET = 0.98
"""Share of the height at which feet are at the lowest."""


class CompositorSettings(Settings):
    """How synthetic samples are composed. Heights and widths are shares of the picture unless said otherwise."""

    samples: dict[Split, int] = Field({"train": 1000, "validation": 100, "test": 100})
    """How many composites each split gets; a split that is not named gets none."""
    seed: int = 0
    """Another seed, other composites."""
    size: tuple[int, int] = (512, 512)
    """Width and height of composites in pixels."""

    people: dict[int, float] = Field({1: 0.2, 2: 0.35, 3: 0.25, 4: 0.15, 5: 0.05})
    """Target distribution: number of people in a picture to its relative weight."""
    overlap: float = Field(0.5, ge=0, le=1)
    """Target share, among pictures of two people and more, of those in which people overlap."""
    max_occlusion: float = Field(0.6, gt=0, lt=1)
    """Largest share of a person that others may hide. Where people are to overlap, the share that is aimed at is
    uniform in 0 to this."""

    crop: tuple[float, float] = (0.7, 1.0)
    """Range of the background's crop, as a share of the largest crop of the right aspect."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability that the background, and independently each person, is mirrored."""
    height: tuple[float, float] = (0.35, 0.85)
    """Range of a standing adult's height."""
    horizon: tuple[float, float] = (0.2, 0.45)
    """Range of the horizon's row; feet stand below it. 0 is the top of the picture."""
    stature: tuple[float, float] = (0.95, 1.25)
    """Range of an adult's height relative to the camera's above the ground: at 1, heads are level with the horizon."""
    max_upscaling: float = Field(1.3, ge=1)
    """People and backgrounds are enlarged by no more than this; whom it keeps below ``height`` is not pasted."""

    donors: DonorSettings = DonorSettings()
    """Who is pasted."""

    edge_width: float = Field(1.2, ge=0, le=20)
    """Pixels; width of the soft edge around people."""
    colour_match: float = Field(0.3, ge=0, le=1)
    """How far the mean and spread of a person's colours in Lab move to those of the place where they are pasted
    (Reinhard et al., Color transfer between images, 2001); 0 is off. The move is bounded: skin stays skin."""
    light: LightSettings = LightSettings()
    """Shadows and reflections."""
    augment: AugmentSettings = AugmentSettings()
    """Faults of the masks that a model is given in training."""

    @field_validator("samples")
    @classmethod
    def _every_split(cls, samples: dict[Split, int]) -> dict[Split, int]:
        if any(count < 0 for count in samples.values()):
            raise ValueError("counts must be 0 or more")
        if not any(samples.values()):
            raise ValueError("asks for no composite: set composite to null, or give one split a number")
        return {split: samples.get(split, 0) for split in SPLITS}

    @field_validator("size")
    @classmethod
    def _usable_size(cls, size: tuple[int, int]) -> tuple[int, int]:
        if not all(32 <= side <= 8192 for side in size):
            raise ValueError("width and height must be 32 to 8192 pixels")
        return size

    @field_validator("people")
    @classmethod
    def _distribution(cls, people: dict[int, float]) -> dict[int, float]:
        if not people or min(people) < 1 or min(people.values()) < 0 or sum(people.values()) <= 0:
            raise ValueError("maps numbers of people (1 or more) to weights (0 or more, not all 0)")
        return dict(sorted(people.items()))

    @field_validator("horizon")
    @classmethod
    def _ground_below(cls, horizon: tuple[float, float]) -> tuple[float, float]:
        if horizon[1] >= LOWEST_FEET:
            raise ValueError(f"must end below {LOWEST_FEET}, so that there is ground to stand on")
        return horizon

    @model_validator(mode="after")
    def _readable(self) -> Self:
        # `dataset_tools.schema` has the layers of all people in one picture, one below another.
        if (pixels := self.size[0] * self.size[1] * max(self.people)) > MOST_PIXELS_READ:
            raise ValueError(
                f"size and people: the layers of {max(self.people)} people have {pixels} pixels, and readers take "
                f"{MOST_PIXELS_READ} at most: give a smaller size, or fewer people"
            )
        return self

    @field_validator("crop", "height", "horizon", "stature")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 2:
            raise ValueError("must be a range low, high with 0 < low <= high")
        return value

    @field_validator("crop", "height", "horizon")
    @classmethod
    def _share(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] > 1:
            raise ValueError("is a share: 1 at most")
        return value


def is_tall_enough(row: CutoutRow, settings: CompositorSettings) -> bool:
    """Whether ``max_upscaling`` lets a donor reach the least ``height``."""
    lowest, highest = _heights(row.height, row.category, row.truncated, settings)
    return lowest <= highest


def _heights(donor_height: int, category: str, truncated: bool, settings: CompositorSettings) -> tuple[float, float]:
    """Smallest and largest share of the picture's height for a donor of so many pixels; contradictory if too small.

    Whom the picture cuts off is near: the upper half of the range.
    """
    growth = CHILD_HEIGHT if category in CHILDREN else 1.0
    lowest, highest = settings.height
    if truncated:
        lowest = (lowest + highest) / 2
    return growth * lowest, min(growth * highest, settings.max_upscaling * donor_height / settings.size[1])


@dataclass(frozen=True, eq=False)
class Background:
    """A picture that people are pasted on."""

    image: np.ndarray
    """(H, W, 3) uint8 RGB without people."""
    origin: Origin
    """Where it comes from."""
    glossy: np.ndarray | None = None
    """(H, W) bool: where it shows ground that can mirror. None: nobody marked any."""


def compose(
    key: str,
    split: str,
    background: Background,
    rows: Sequence[CutoutRow],
    load: Callable[[CutoutRow], Cutout],
    settings: CompositorSettings,
) -> Sample:
    """Compose one sample of the configuration ``composite``.

    Everything random follows from (``settings.seed``, ``key``): the same arguments give the same pixels.

    Args:
        key: of the sample.
        split: of the sample; all donors and the background must be of it.
        background: where they stand.
        rows: who may be pasted; each at most once.
        load: cuts one of them out; may raise `Rejected`, and another one is taken.
        settings: the targets.

    Returns:
        People from the rearmost to the nearest. A keypoint that others hide is 0, 0, 0.

    Raises:
        Rejected: ``background-too-small``, or ``no-placement`` where not one person can be placed.
        ValueError: the donors differ in label set or estimators.
    """
    rng = _generator(f"{settings.seed}/{key}")
    plate, glossy, crop = _plate(background, settings, rng)
    horizon, placed = _placed_people(plate.shape[:2], rows, load, settings, rng)
    if not placed:
        raise Rejected("no-placement", f"none of {len(rows)} people could be placed on {background.origin.id}")
    if len(label_sets := {person.cutout.label_set for person in placed}) > 1:
        raise ValueError(f"composite {key!r}: donors of different label sets cannot be mixed: {sorted(label_sets)}")
    made_by = _makers(key, [person.cutout.made_by for person in placed])

    layers = [_layer(person, plate, settings.colour_match) for person in placed]
    figures = [Figure(layer, person.standing_place()) for person, layer in zip(placed, layers, strict=True)]
    # With its own generator: other settings of the light change neither people nor masks.
    effects = _effects(plate, glossy, figures, horizon, settings.light, _generator(f"{settings.seed}/{key}/light"))

    label_set = placed[0].cutout.label_set
    parsing = np.full(plate.shape[:2], NO_PARSING if label_set == "none" else 0, np.uint8)
    people = []
    for order, (person, layer) in enumerate(zip(placed, layers, strict=True)):
        if label_set != "none":
            np.copyto(parsing, person.parsing(plate.shape[:2]), where=person.visible)
        keypoints = person.keypoints()
        people.append(
            Person(
                id=person.cutout.id,
                mask=person.visible,
                mask_by=person.cutout.mask_by,
                mask_score=person.cutout.mask_score,
                category=person.cutout.category,
                occluded=bool((person.visible != person.complete).any()),
                truncated=person.cutout.truncated,
                keypoints=keypoints,
                effects=effects.kinds[order],
                complete_mask=person.complete,
                augmented_mask=augment_mask(person.visible, keypoints, rng, settings.augment),
                layer=layer,
                order=order,
                occlusion=occlusion(person.visible, person.complete),
            )
        )
    return Sample(
        key=key,
        split=split,
        configuration="composite",
        image=blend(plate, figures, effects),
        background=plate,
        people=people,
        parsing=parsing,
        label_set=label_set,
        effects=effect_bits(effects.masks),
        made_by=replace(made_by, plate=MadeBy("photograph"), effects=MadeBy("composited")),
        stratum=stratum([person.mask for person in people]),
        origins=[
            replace(background.origin, role="background", transform=_joined(background.origin.transform, crop)),
            *(
                replace(p.cutout.origin, transform=_joined(p.cutout.origin.transform, p.steps(settings.colour_match)))
                for p in placed
            ),
        ],
    )


def _makers(key: str, donors: Sequence[Makers]) -> Makers:
    """Who made the cues of donors. Where some have none of a cue, as annotators gave a pose to some people only, it is
    who made that of the others. Raises `ValueError` where two made it."""
    made_by = {}
    for cue in fields(Makers):
        makers = {getattr(donor, cue.name) for donor in donors} - {MadeBy()}
        if len(makers) > 1:
            names = sorted(map(str, makers))
            raise ValueError(f"composite {key!r}: donors of different estimators cannot be mixed: {names}")
        made_by[cue.name] = makers.pop() if makers else MadeBy()
    return Makers(**made_by)


def _generator(key: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big"))


def _effects(
    plate: np.ndarray,
    glossy: np.ndarray | None,
    figures: Sequence[Figure],
    horizon: float,
    settings: LightSettings,
    rng: np.random.Generator,
) -> Effects:
    """What people do to the light on the ground plane; ``horizon`` is its share of the picture's height."""
    height, width = plate.shape[:2]
    light, gloss = draw_light(plate, horizon * height, settings, rng), draw_gloss(glossy, settings, rng)
    ground = Ground(horizon * height, width / 2, _FOCAL * max(height, width), gloss=gloss)
    return cast(plate, figures, ground, light)


class _Placed:
    """A cut-out at its place. ``patch_`` arrays have the size of the resized cut-out, others that of the picture."""

    def __init__(self, cutout: Cutout, flipped: bool, scale: float, edge_width: float) -> None:
        """Resized and mirrored, but not yet anywhere."""
        height, width = cutout.rgba.shape[:2]
        self.cutout, self.flipped, self.scale = cutout, flipped, scale
        self.inner_size = max(1, round(width * scale)), max(1, round(height * scale))
        self.pad = int(np.ceil(2 * edge_width)) + _GAP + 1
        self.patch_alpha = self.resized(cutout.rgba[..., 3])
        if cutout.truncated:
            self.patch_alpha[-self.pad :] = self.patch_alpha[-self.pad - 1]
        if edge_width > 0:
            sigma = edge_width / 2.56  # then alpha goes from 10 % to 90 % within edge_width pixels
            self.patch_alpha = cv2.GaussianBlur(self.patch_alpha, (0, 0), sigma)
        self.patch_complete = self.patch_alpha >= 128
        gap = np.ones((2 * _GAP + 1, 2 * _GAP + 1), np.uint8)
        self.patch_grown = cv2.dilate(self.patch_complete.view(np.uint8), gap).view(bool)

    def resized(self, array: np.ndarray) -> np.ndarray:
        """Colours or alpha (h, w, ...) of the cut-out at the size of the patch; colours go on at the edge."""
        array = array[:, ::-1] if self.flipped else array
        interpolation = cv2.INTER_AREA if self.scale < 1 else cv2.INTER_LINEAR
        array = cv2.resize(np.ascontiguousarray(array), self.inner_size, interpolation=interpolation)
        border = cv2.BORDER_REPLICATE if array.ndim == 3 else cv2.BORDER_CONSTANT
        return cv2.copyMakeBorder(array, self.pad, self.pad, self.pad, self.pad, border)

    def put(self, size: tuple[int, int], x: int, y: int, foot: float) -> None:
        """Stand in a picture of ``size`` (H, W): corner of the patch at column ``x``, row ``y``.

        ``foot`` is the row of the foot line as a share of the picture; more than 1 below its lower edge. It is
        the order of depth.
        """
        self.x, self.y, self.foot = x, y, foot
        self.window, self.inside = _overlap(self.patch_alpha.shape, x, y, size)
        self.complete = np.zeros(size, bool)
        self.complete[self.window] = self.patch_complete[self.inside]
        self.hidden, self.visible = np.zeros(size, bool), self.complete

    def standing_place(self) -> tuple[float, float]:
        """Column and row of the foot line's middle; the row lies below the picture for whom its edge cuts off."""
        top, bottom, _, _ = bounds(self.complete)
        left, right = bounds(self.complete[bottom - max(1, round(0.06 * (bottom - top))) : bottom])[2:]
        return (left + right) / 2, self.foot * self.complete.shape[0] if self.cutout.truncated else float(bottom)

    def is_hidden(self) -> bool:
        """Whether someone nearer hides a part of this person."""
        return bool((self.hidden & self.complete).any())

    def parsing(self, size: tuple[int, int]) -> np.ndarray:
        """(H, W) uint8 labels of the whole person."""
        labels = self.cutout.parsing[:, ::-1] if self.flipped else self.cutout.parsing
        labels = cv2.resize(np.ascontiguousarray(labels), self.inner_size, interpolation=cv2.INTER_NEAREST_EXACT)
        if self.flipped:
            labels = _mirrored_labels(self.cutout.label_set)[labels]
        canvas = np.zeros(size, np.uint8)
        window, inside = _overlap(labels.shape, self.x + self.pad, self.y + self.pad, size)
        canvas[window] = labels[inside]
        return canvas

    def keypoints(self) -> np.ndarray:
        """(18, 3) float32 in pixels of the picture; 0, 0, 0 where outside of it, or hidden by someone nearer."""
        height, width = self.cutout.rgba.shape[:2]
        result = self.cutout.keypoints.copy()
        if self.flipped:
            result = result[_MIRRORED_JOINTS]
            result[:, 0] = width - 1 - result[:, 0]
        stretch = np.array(self.inner_size) / (width, height)
        result[:, :2] = (result[:, :2] + 0.5) * stretch - 0.5 + self.pad + (self.x, self.y)
        columns, rows = np.rint(result[:, :2]).astype(int).T
        inside = (columns >= 0) & (rows >= 0) & (columns < self.complete.shape[1]) & (rows < self.complete.shape[0])
        at = rows.clip(0, self.complete.shape[0] - 1), columns.clip(0, self.complete.shape[1] - 1)
        hidden = self.hidden[at]
        result[(result[:, 2] <= 0) | ~inside | hidden | ~keypoints_in_box(result, self.complete)] = 0
        return result

    def steps(self, colour_match: float) -> str:
        """What was done to the cut-out, for its provenance."""
        steps = ["flip"] if self.flipped else []
        steps.append(f"resize {self.inner_size[0]}x{self.inner_size[1]}")
        steps.append(f"colour-match {colour_match:g}")
        steps.append(f"paste {self.x + self.pad:+d}{self.y + self.pad:+d}")
        return "; ".join(steps)


def _plate(
    background: Background, settings: CompositorSettings, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Crop, flip and resize a background; the text tells how. Crops keep to the lower part, where the ground is.

    Also how much of each pixel is glossy ground, (H, W) float32 in 0..1, where that is marked.
    """
    height, width = background.image.shape[:2]
    target_width, target_height = settings.size
    largest = min(width / target_width, height / target_height)
    if largest * settings.max_upscaling < 1:
        raise Rejected(
            "background-too-small",
            f"{width}x{height} pixels would have to grow by {1 / largest:.2f} to fill {target_width}x{target_height}; "
            f"{settings.max_upscaling} is allowed",
        )
    factor = max(largest * rng.uniform(*settings.crop), 1 / settings.max_upscaling)
    crop_width = min(width, max(1, round(target_width * factor)))
    crop_height = min(height, max(1, round(target_height * factor)))
    x = int(rng.integers(0, width - crop_width + 1))
    y = round((height - crop_height) * rng.uniform(0.6, 1))
    window, steps = np.s_[y : y + crop_height, x : x + crop_width], f"crop {crop_width}x{crop_height}+{x}+{y}"
    flipped = rng.random() < settings.flip
    steps = f"{steps}; flip" if flipped else steps

    def fitted(pixels: np.ndarray, enlarge: int) -> np.ndarray:
        pixels = np.ascontiguousarray(pixels[window][:, ::-1] if flipped else pixels[window])
        return cv2.resize(pixels, settings.size, interpolation=cv2.INTER_AREA if factor >= 1 else enlarge)

    plate, glossy = fitted(background.image, cv2.INTER_CUBIC), None
    if background.glossy is not None:
        # The share of each pixel, so that the edge of a floor is no staircase; cubic curves would leave 0..1.
        glossy = fitted(background.glossy.view(np.uint8) * np.uint8(255), cv2.INTER_LINEAR) / np.float32(255)
    return plate, glossy, f"{steps}; resize {target_width}x{target_height}"


def _placed_people(
    size: tuple[int, int],
    rows: Sequence[CutoutRow],
    load: Callable[[CutoutRow], Cutout],
    settings: CompositorSettings,
    rng: np.random.Generator,
) -> tuple[float, list[_Placed]]:
    """The horizon as a share of the height, and donors placed in a picture of ``size`` (H, W), rearmost first."""
    numbers, weights = np.array(list(settings.people)), np.array(list(settings.people.values()))
    wanted = min(int(rng.choice(numbers, p=weights / weights.sum())), len(rows))
    overlapping = wanted > 1 and rng.random() < settings.overlap
    camera = rng.uniform(*settings.horizon), rng.uniform(*settings.stature)
    cutouts: list[Cutout] = []
    donors = iter(rng.permutation(len(rows))[: 4 * wanted + 8])
    most: list[_Placed] = []
    for room in _ROOM:
        placed: list[_Placed] = []
        for cutout in _loaded(cutouts, donors, rows, load):
            contact: Contact = "allowed" if overlapping else "apart"
            if overlapping and placed and not any(person.is_hidden() for person in placed):
                contact = "wanted"
            person = _place(cutout, size, placed, contact, camera, room, settings, rng)
            if person is not None:
                placed = sorted([*placed, person], key=lambda p: p.foot)
                _hide(placed)
            if len(placed) == wanted:
                return camera[0], placed
        most = max(most, placed, key=len)
    return camera[0], most


def _loaded(
    cutouts: list[Cutout], donors: Iterator[int], rows: Sequence[CutoutRow], load: Callable[[CutoutRow], Cutout]
) -> Iterator[Cutout]:
    """The cut-outs that were loaded before, then further ones, which are added to them."""
    yield from tuple(cutouts)
    for donor in donors:
        try:
            cutouts.append(load(rows[donor]))
        except Rejected:
            continue
        yield cutouts[-1]


def _hide(placed: list[_Placed]) -> None:
    """Work out who hides what of whom; ``placed`` goes from the rearmost to the nearest."""
    hidden = np.zeros_like(placed[0].complete)
    for person in reversed(placed):
        person.hidden, person.visible = hidden, person.complete & ~hidden
        hidden = hidden | person.complete


def _place(
    cutout: Cutout,
    size: tuple[int, int],
    placed: list[_Placed],
    contact: Contact,
    camera: tuple[float, float],
    room: float,
    settings: CompositorSettings,
    rng: np.random.Generator,
) -> _Placed | None:
    """Find a place for one more person by rejection sampling; None where there is none."""
    height, width = size
    horizon, stature = camera
    body = np.flatnonzero((cutout.rgba[..., 3] >= 128).any(axis=1))
    if body.size == 0:
        return None
    body_height = body[-1] + 1 - body[0]
    stature *= rng.uniform(0.95, 1.05) * (CHILD_HEIGHT if cutout.category in CHILDREN else 1)
    lowest, highest = _heights(int(body_height), cutout.category, cutout.truncated, settings)
    if not cutout.truncated:
        highest = min(highest, stature * (LOWEST_FEET - horizon))  # feet stay in the picture
    if highest < lowest:
        return None
    highest = lowest + (highest - lowest) * room
    flipped = bool(rng.random() < settings.flip)
    aim = rng.uniform(0, settings.max_occlusion)
    for attempt in range(_ATTEMPTS):
        tall = lowest + (highest - lowest) * rng.uniform(0, 1 - attempt / _ATTEMPTS)
        foot = 1 + rng.uniform(0, 1) if cutout.truncated else horizon + tall / stature
        person = _Placed(cutout, flipped, tall * height / body_height, settings.edge_width)
        if not person.patch_complete.any():
            return None
        top, bottom, left, right = bounds(person.patch_complete)
        y = height - person.patch_alpha.shape[0] + person.pad if cutout.truncated else round(foot * height) - bottom
        if top + y < 0 or right - left > width:
            continue
        found: list[tuple[float, int]] = []
        for _ in range(_PROPOSALS):
            x = int(rng.integers(-left, width - right + 1))
            if contact == "wanted":
                partner = placed[rng.integers(len(placed))]
                from_x, to_x = bounds(partner.complete)[2:]
                x = int(np.clip(rng.integers(from_x - right, to_x - left + 1), -left, width - right))
            share = _worst_occlusion(person, x, y, foot, placed, contact)
            if share is not None and share <= settings.max_occlusion:
                found.append((abs(share - aim), x))
                if contact != "wanted":
                    break
        if found:
            person.put(size, min(found)[1], y, foot)
            return person
    return None


def _worst_occlusion(
    person: _Placed, x: int, y: int, foot: float, placed: list[_Placed], contact: Contact
) -> float | None:
    """The largest share of anyone that would be hidden with the new person at (x, y); None where contact forbids."""
    if not placed:
        return 0.0
    window, inside = _overlap(person.patch_alpha.shape, x, y, placed[0].complete.shape)
    if contact == "apart":
        grown = person.patch_grown[inside]
        return None if any((grown & other.complete[window]).any() for other in placed) else 0.0
    new = person.patch_complete[inside]
    visible, worst = new, 0.0
    for other in placed:
        if other.foot > foot:
            visible = visible & ~other.complete[window]
        else:
            covered = np.count_nonzero(other.visible[window] & new)
            left = np.count_nonzero(other.visible) - covered
            worst = max(worst, 1 - left / np.count_nonzero(other.complete))
    worst = max(worst, 1 - np.count_nonzero(visible) / np.count_nonzero(new))
    return None if contact == "wanted" and worst == 0 else worst


def _overlap(
    shape: tuple[int, ...], x: int, y: int, size: tuple[int, ...]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a patch of ``shape`` with its corner at (x, y) meets a picture: slices of the picture and of the patch."""
    top, bottom = max(0, y), max(0, min(size[0], y + shape[0]))
    left, right = max(0, x), max(0, min(size[1], x + shape[1]))
    return np.s_[top:bottom, left:right], np.s_[top - y : bottom - y, left - x : right - x]


def _layer(person: _Placed, plate: np.ndarray, colour_match: float) -> np.ndarray:
    """(H, W, 4) uint8 straight RGBA of the complete person."""
    rgb = person.resized(person.cutout.rgba[..., :3])
    if colour_match > 0:
        rgb = _colour_matched(rgb, person.patch_complete, _surroundings(plate, person.window), colour_match)
    layer = np.zeros((*plate.shape[:2], 4), np.uint8)
    patch = np.dstack([rgb, person.patch_alpha])
    patch[person.patch_alpha == 0] = 0
    layer[person.window] = patch[person.inside]
    return layer


def _surroundings(plate: np.ndarray, window: tuple[slice, slice]) -> np.ndarray:
    """The background behind and beside a person, as few large pixels: its light, not its texture."""
    rows, columns = window
    margin = (columns.stop - columns.start) // 2
    region = plate[rows, max(0, columns.start - margin) : columns.stop + margin]
    return cv2.resize(region, (16, 16), interpolation=cv2.INTER_AREA)


def _colour_matched(rgb: np.ndarray, mask: np.ndarray, surroundings: np.ndarray, strength: float) -> np.ndarray:
    """Move mean and spread in Lab toward those of the surroundings, as far as ``strength`` and the bounds say."""
    lab = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    place = cv2.cvtColor(surroundings.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).reshape(-1, 3)
    mean, spread = (np.float32(value[:, 0]) for value in cv2.meanStdDev(lab, mask=mask.view(np.uint8)))
    gain = 1 + strength * (np.clip(place.std(axis=0) / np.maximum(spread, 1), 0.7, 1.3) - 1)
    shift = np.clip(strength * (place.mean(axis=0) - mean), -_MAX_COLOUR_SHIFT, _MAX_COLOUR_SHIFT)
    lab *= gain
    lab += mean + shift - gain * mean
    matched = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)
    matched *= 255
    return np.rint(matched, out=matched).clip(0, 255, out=matched).astype(np.uint8)


def _mirrored_labels(label_set: str) -> np.ndarray:
    """(256,) uint8: label to the label that it becomes in a mirror."""
    table = np.arange(256, dtype=np.uint8)
    names = PARSING_LABELS[label_set]
    for label, name in enumerate(names):
        for side, other in (("Left", "Right"), ("Right", "Left")):
            if name.startswith(f"{side}-"):
                table[label] = names.index(name.replace(side, other))
    return table


def _joined(*steps: str) -> str:
    return "; ".join(step for step in steps if step)
