"""What a mask file says: one person or several, and which pixels. The one rule for every road on which masks come.

1. Transparency decides alone where part of the picture is transparent: the opaque part is one person.
2. Otherwise brightness decides or, where solid areas have colours, colour; black is the background. A palette is read
   by its colours too. People are numbered by brightness, by palette index, or by colour: by their places in the
   palette of the indices that we write, where all are of it, else by #rrggbb as a number.
3. A file is *several people* if each of its values covers a solid area of its own. Every value counts, 255 as well;
   only Pascal VOC's border (palette index 255 of colour 224, 224, 192) is left out.
4. A file is *one person* if it has one value beside the background, or if the values in between lie on edges: soft,
   blurred or JPEG's. What is half as bright as its brightest value, or more, is the person.
   What a lossy file (JPEG, WEBP) leaves beside solid areas are specks, and no people.
5. Whatever is neither is refused as ``not-a-mask``: solid areas of several values with soft edges between them, or a
   picture.

A photograph's only file may hold several people; of several files each is one person, whatever values it has
(`people_of`). What cannot be a person for its size is refused where masks meet their picture
(`dataset_tools.masks.why_inverted`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from dataset_tools.errors import Rejected
from dataset_tools.images import PHOTO_FORMATS, exif_orientation, opened
from dataset_tools.masks import border_share
from dataset_tools.people_sheet import colours as palette_of

MOST_PEOPLE = 100
"""A file of more values than this is no index."""
LOSSY = ("JPEG", "MPO", "WEBP")
VOID = (224, 224, 192)
"""Colour of index 255 in Pascal VOC's palette: the border between things."""

_SQUARE = np.ones((3, 3), np.uint8)
_PLATEAU = np.ones((9, 9), np.uint8)
_WHITE = 65535


@dataclass(eq=False)
class MaskFile:
    """One mask file."""

    people: dict[int, np.ndarray]
    """(h, w) bool of each person, as stored, by the person's value: brightness, palette index or colour. The only
    person of a file has the value 0."""
    colours: bool = False
    """Whether the values are colours, 0xrrggbb."""
    orientation: int = 1
    """EXIF orientation (1 to 8) that the file names of itself."""

    def whole(self) -> np.ndarray:
        """(h, w) bool: everybody."""
        return np.logical_or.reduce(list(self.people.values()))

    def person(self, value: int | None) -> np.ndarray:
        """(h, w) bool: the person of a value; None: everybody. Raises `Rejected` with ``missing-mask``."""
        if value is not None and value not in self.people:
            raise Rejected("missing-mask", f"it has no person of value {self.value(value)} now")
        return self.whole() if value is None else self.people[value]

    def value(self, number: int) -> str:
        """A person's value as its owner knows it."""
        return f"#{number:06x}" if self.colours else str(number)


@dataclass(frozen=True)
class FilePerson:
    """A person in one of several mask files."""

    file: int
    """Index of the file."""
    value: int | None
    """The person's value in it; None where the whole file is one person."""
    mask: np.ndarray | Rejected
    """(h, w) bool, as stored, or why it cannot be used."""
    orientation: int = 1
    """EXIF orientation (1 to 8) that the file names of itself."""
    note: str = ""
    """What its owner should know about how the file was read."""


def people_of(files: Sequence[MaskFile | Rejected]) -> list[FilePerson]:
    """The people in all mask files of one photograph, in order: several in an only file, else one a file."""
    found = []
    for number, file in enumerate(files):
        if isinstance(file, Rejected):
            found.append(FilePerson(number, None, file))
        elif len(files) == 1 and len(file.people) > 1:
            values = list(file.people)
            note = ""
            if values != list(range(1, len(values) + 1)):
                kind = "colours" if file.colours else "values"
                note = f"people 1 to {len(values)} are its {kind} {', '.join(map(file.value, values))}"
            for value, mask in file.people.items():
                found.append(FilePerson(number, value, mask, file.orientation, note))
                note = ""
        else:
            note = ""
            if len(file.people) > 1:
                note = f"its {len(file.people)} values are taken together: of several files each is one person"
            found.append(FilePerson(number, None, file.whole(), file.orientation, note))
    return found


def decode_mask_file(data: bytes, max_pixels: int) -> MaskFile:
    """Read a mask file: PNG, BMP, TIFF, GIF, WEBP or JPEG, of any mode.

    Raises:
        Rejected: ``not-a-mask``, or as `dataset_tools.images.decode_image`.
    """
    with opened(data, PHOTO_FORMATS, max_pixels) as picture:
        return read_mask_picture(picture)


def decode_mask(data: bytes, max_pixels: int) -> np.ndarray:
    """(h, w) bool of a file that is known to be one person. Raises `Rejected` as `decode_mask_file`."""
    return decode_mask_file(data, max_pixels).whole()


def read_mask_picture(picture: Image.Image) -> MaskFile:
    """Read an open mask file or a PIL image. Raises `Rejected` with ``not-a-mask``."""
    if getattr(picture, "is_animated", False):
        raise Rejected("not-a-mask", "it holds several pages or frames: save one file a person")
    picture.load()
    orientation = exif_orientation(picture)  # asked now: Pillow turns TIFF files upright while it loads them
    people, colours = _people(picture, picture.format in LOSSY)
    return MaskFile(people, colours, orientation)


def read_mask_array(array: np.ndarray) -> MaskFile:
    """Read a mask array.

    Args:
        array: (h, w) bool, whole numbers from 0, or floating-point numbers (0..1 or from 0); or a picture,
            (h, w, 1 to 4) uint8.

    Raises:
        Rejected: ``not-a-mask``.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.shape[2] in (2, 3, 4) and array.dtype == np.uint8:
        mode = {2: "LA", 3: "RGB", 4: "RGBA"}[array.shape[2]]
        return read_mask_picture(Image.frombytes(mode, array.shape[1::-1], np.ascontiguousarray(array).tobytes()))
    if array.ndim != 2 or array.dtype.kind not in "buif":
        raise Rejected("not-a-mask", f"{array.dtype} of shape {array.shape}: a mask is (H, W), bool or numbers")
    return MaskFile({0: array} if array.dtype == np.bool_ else _by_brightness(array))


def _people(picture: Image.Image, lossy: bool) -> tuple[dict[int, np.ndarray], bool]:
    """The people of a loaded picture by value, and whether the values are colours.

    Args:
        lossy: whether its file may hold other values than were saved.
    """
    mode = picture.mode
    if picture.has_transparency_data and not mode.startswith("I"):
        alpha = np.asarray(picture.convert("RGBA"))[..., 3]
        if 2 * int(alpha.min()) < int(alpha.max()) or alpha.max() == 0:
            return {0: _upper_half(alpha)}, False
    if mode == "1":
        return {0: np.asarray(picture)}, False
    if mode in ("P", "PA"):
        return _by_palette(picture)
    if mode in ("L", "I", "F") or mode.startswith("I;16"):
        return _by_brightness(np.asarray(picture), lossy), False
    if mode in ("LA", "La"):
        return _by_brightness(np.asarray(picture.convert("L")), lossy), False
    return _by_colour(np.asarray(picture.convert("RGB")), lossy)


def _by_palette(picture: Image.Image) -> tuple[dict[int, np.ndarray], bool]:
    index = np.asarray(picture.getchannel("P") if picture.mode == "PA" else picture)
    palette = np.zeros((256, 3), np.uint8)
    given = np.array(picture.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    palette[: len(given)] = given
    used = np.flatnonzero(np.bincount(index.ravel(), minlength=256))
    colours = palette[used]
    told_apart = len(np.unique(colours, axis=0)) == len(used)
    if told_apart and (colours == colours[:, :1]).all():
        return _by_brightness(palette[index, 0]), False
    black = [int(i) for i in used if not palette[i].any()]
    # Colours that repeat tell less than their indices do: nobody may vanish behind a palette that is not filled in.
    background = black if told_apart else black[:1]
    if not black and _holds_border(index == used[0]) and used[0] == 0:
        background = [0]
    if not background and not told_apart:
        return _by_brightness(index), False
    plane = index.astype(np.uint16) + 1
    for value in background:
        plane[index == value] = 0
    if tuple(palette[255]) == VOID:
        plane[index == 255] = 0
    values = _present(plane)
    if len(values) < 2 or _are_areas(plane, values):
        return _separate(plane, values, -1), False
    people, colours_tell = _by_colour(palette[index])
    if colours_tell and told_apart:
        # Read by colour, and numbered as an index is.
        of_colour = {_number(palette[value]): int(value) for value in used}
        return dict(sorted((of_colour[colour], mask) for colour, mask in people.items())), False
    return people, colours_tell


def _number(colour: Sequence[int] | np.ndarray) -> int:
    """An RGB colour as 0xrrggbb."""
    return int(colour[0]) << 16 | int(colour[1]) << 8 | int(colour[2])


def _by_colour(pixels: np.ndarray, lossy: bool = False) -> tuple[dict[int, np.ndarray], bool]:
    """The people in an RGB picture (h, w, 3) uint8."""
    brightness = pixels.max(axis=2)
    if (pixels.min(axis=2) == brightness).all():
        return _by_brightness(brightness, lossy), False
    numbers = pixels[..., 0].astype(np.uint32)
    for channel in (1, 2):
        numbers <<= 8
        numbers |= pixels[..., channel]
    found = np.unique(numbers[:: 1 + len(numbers) // 512])  # a picture of many colours need not be sorted whole
    if len(found) <= MOST_PEOPLE + 1:
        found = np.unique(numbers)
    colours = [int(colour) for colour in found if colour]
    if len(colours) <= MOST_PEOPLE:
        plane = np.searchsorted(found, numbers).astype(np.uint16) + np.uint16(found[0] != 0)
        if len(colours) == 1:
            return {0: plane > 0}, False
        rgb = np.array([[colour >> 16, colour >> 8 & 255, colour & 255] for colour in colours])
        if _is_one_hue(rgb, 0.02) and len(set(rgb.max(axis=1).tolist())) == len(rgb):
            people = _by_brightness(brightness, lossy)
            if len(people) == 1:
                return people, False
        if _are_areas(plane, _present(plane), lossy):
            planes = {colour: plane == k for k, colour in enumerate(colours, start=1)}
            # An index of ours whose palette an editor has dropped: its people keep their numbers.
            own = {_number(colour): place for place, colour in enumerate(palette_of(MOST_PEOPLE), start=1)}
            if planes.keys() <= own.keys():
                return dict(sorted((own[colour], mask) for colour, mask in planes.items())), False
            return planes, True
    highest = int(brightness.max())
    bright = brightness >= max(1, highest / 2)
    low, high = _around(pixels)
    flat = (high - low < 32).all(axis=2)  # lossy files change colours beside edges
    sample = pixels[bright & flat if (bright & flat).any() else bright]
    sample = sample[:: 1 + len(sample) // 100_000]
    hue = np.median(sample, axis=0)
    # Who is small or dark beside somebody else is a solid area of another hue, too.
    others = flat & (brightness > highest / 8) & ~_is_of_hue(pixels, hue)
    side = max(5, min(brightness.shape) // 128)  # what JPEG lets run over edges may have been enlarged
    block = np.ones((side, side), np.uint8)
    if not _is_one_hue(sample, 0.2) or cv2.erode(others.view(np.uint8), block, borderValue=0).any():
        raise Rejected(
            "not-a-mask", "it has several colours without hard edges: a picture, or people whose edges were smoothed"
        )
    # Of the channels that tell the person from black, the darkest: JPEG lets colours run over edges one by one.
    told = [pixels[..., c] * np.float32(1 / hue[c]) for c in range(3) if hue[c] >= hue.max() / 4]
    return _by_brightness(np.minimum.reduce(told).clip(0, 1), lossy), False


def _is_one_hue(colours: np.ndarray, tolerance: float) -> bool:
    """Whether RGB colours (n, 3), none of them black, lie on one line from black, but for one in a hundred."""
    hues = colours / colours.max(axis=1, keepdims=True).astype(np.float32)
    return bool((np.abs(hues - np.median(hues, axis=0)).max(axis=1) > tolerance).mean() <= 0.01)


def _is_of_hue(pixels: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """(h, w) bool: whether RGB pixels, (h, w, 3) uint8, are as a hue is at their brightness, or near it."""
    brightness = pixels.max(axis=2).astype(np.float32)
    distance = np.abs(pixels - brightness[..., None] * np.float32(hue / hue.max())).max(axis=2)
    near: np.ndarray = distance <= np.maximum(0.2 * brightness, 24)
    return near


def _around(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest value of each pixel's 3x3 neighbourhood, of each channel."""
    low, high = (operation(plane, _SQUARE, borderType=cv2.BORDER_REPLICATE) for operation in (cv2.erode, cv2.dilate))
    return low, high


def _by_brightness(values: np.ndarray, lossy: bool = False) -> dict[int, np.ndarray]:
    """The people by value in a mask (h, w) of numbers; 0 for one person."""
    if values.size == 0 or not np.isfinite(values).all() or values.min() < 0:
        raise Rejected("not-a-mask", "a mask holds numbers from 0")
    plane, names = _sixteen_bit(values)
    present = _present(plane)
    if len(present) and plane.min() and present[0] <= present[-1] // 8 and _holds_border(plane == present[0]):
        plane = np.where(plane == present[0], np.uint16(0), plane)  # a lossy file may have no pixel that is quite black
        present = present[1:]
    if len(present) < 2:
        return {0: plane > 0}
    areas = _are_areas(plane, present, lossy)
    if areas and (present == list(range(1, len(present) + 1)) or not _is_soft_edge(plane, present)):
        return {int(names[value]) if names is not None else value: plane == value for value in present}
    if not areas:
        if names is not None:
            plane = _scaled(values)
        _check_soft(plane)
    return {0: _upper_half(plane)}


def _sixteen_bit(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Numbers from 0 as uint16, and what each stands for where that is another number."""
    highest = values.max()
    if values.dtype.kind == "f":
        if highest <= 1 or (values != np.rint(values)).any():
            return _scaled(values, max(highest, 1)), None
        values = values.astype(np.int64)
    if highest <= _WHITE:
        return values.astype(np.uint16), None
    names, plane = np.unique(values, return_inverse=True)
    if len(names) > MOST_PEOPLE + 1:
        return _scaled(values), None
    first = 0 if names[0] == 0 else 1
    return (plane.reshape(values.shape) + first).astype(np.uint16), np.concatenate(
        [np.zeros(first, names.dtype), names]
    )


def _scaled(values: np.ndarray, white: float | None = None) -> np.ndarray:
    values = values.astype(np.float64)  # half precision ends at 65504
    return np.rint(values * (_WHITE / float(values.max() if white is None else white))).astype(np.uint16)


def _present(plane: np.ndarray) -> list[int]:
    """Values other than 0, in order."""
    return [int(value) for value in np.flatnonzero(np.bincount(plane.ravel())) if value]


def _separate(plane: np.ndarray, values: list[int], offset: int) -> dict[int, np.ndarray]:
    if len(values) < 2:
        return {0: plane > 0}
    return {value + offset: plane == value for value in values}


def _upper_half(plane: np.ndarray) -> np.ndarray:
    """Half as bright as the brightest, or more; where nothing is bright, nothing."""
    return (plane > 0) & (plane >= int(plane.max()) / 2)


def _are_areas(plane: np.ndarray, values: list[int], lossy: bool = False) -> bool:
    """Whether the values cover areas rather than edges.

    A value covers an area if most of its pixels lie in squares of 3x3 pixels of just this value. It lies on an edge
    if most of its pixels have both a lower and a higher value beside them; specks that are nearly black or white count
    as edges. Slivers of people who are hidden by others lie so too: they are forgiven while most values are areas, or
    the values are 1, 2, 3 ... as no edge has them; but not in lossy files, whose specks look the same.
    """
    if len(values) > MOST_PEOPLE:
        return False
    low, high = _around(plane)
    solid = cv2.dilate((low == high).view(np.uint8), _SQUARE, borderType=cv2.BORDER_REPLICATE).view(bool)
    between = (low < plane) & (plane < high)
    count, of_solid, of_between = (
        np.bincount(chosen, minlength=values[-1] + 1)[values]
        for chosen in (plane.ravel(), plane[solid], plane[between & ~solid])
    )
    areas = 2 * of_solid >= count
    if lossy:
        return bool(areas.all())
    near = np.minimum(values, values[-1] - np.array(values)) <= values[-1] / 16  # what JPEG makes of black and white
    edges = ~areas & ((2 * of_between >= count) | (near & (np.array(values) < values[-1])))
    if values == list(range(1, len(values) + 1)) and 2 * edges.sum() <= len(values):
        return True
    return bool(not edges.any() or edges.sum() < areas.sum())


def _is_soft_edge(plane: np.ndarray, values: list[int]) -> bool:
    """Whether all values but the highest are rims around it: an edge of few steps or large pixels, a trimap."""
    highest = plane == values[-1]
    return _is_rim((plane > 0) & ~highest, highest, 0.0) or all(
        _is_rim(plane == value, plane > value, 0.9) for value in values[:-1]
    )


def _is_rim(rim: np.ndarray, core: np.ndarray, least_contact: float) -> bool:
    """Whether an area is an even rim around another one, its width at most a quarter of the other's size.

    Args:
        rim: (h, w) bool.
        core: (h, w) bool; what the rim is around.
        least_contact: share of the core's outline that the rim must cover.
    """
    outside = cv2.dilate(core.view(np.uint8), _SQUARE).view(bool) & ~core
    outline = int(np.count_nonzero(outside))
    if np.count_nonzero(outside & rim) < least_contact * outline:
        return False
    distance = cv2.distanceTransform((~core).view(np.uint8), cv2.DIST_L2, 3)[rim]
    width = len(distance) / max(1, outline)
    return bool(width <= 0.25 * np.sqrt(np.count_nonzero(core)) and distance.max() <= 1.5 * width + 1)


def _check_soft(plane: np.ndarray) -> None:
    """Refuse what has values in between that are no edges of one person."""
    low, high = _around(plane)
    spread = high - low
    level = plane[spread <= int(plane.max()) / 32]
    # Of an area: lossy files overshoot beside edges. Who is small may have none that is bright.
    highest = int(level.max(initial=0))
    highest = highest if 2 * highest >= plane.max() else int(plane.max())
    middle = (plane > highest / 8) & (plane < 7 * highest / 8)
    count = np.count_nonzero(middle)
    if 2 * count > plane.size:
        raise Rejected(
            "not-a-mask", f"{count / plane.size:.0%} of it is neither dark nor bright: a picture, not a mask"
        )
    flat = middle & (spread <= highest / 32)
    levels = np.bincount(plane[flat].astype(np.int64) * 64 // highest, minlength=65)
    # Edges pass through all 48 levels; an area stays at one, or at two where its brightness lies between them.
    most = int(np.sort(levels)[-8:].sum())
    if (5 * most > count and most >= 9) or _is_beside(plane, middle, highest):
        raise Rejected(
            "not-a-mask",
            "it has solid areas of several values with soft edges: save several people with hard edges, or as one file "
            "each",
        )


def _is_beside(plane: np.ndarray, middle: np.ndarray, highest: int) -> bool:
    """Whether a solid area of a value in between (``middle``) lies apart from all that is bright: of few pixels beside
    the edges of somebody large, but of somebody else."""
    low, high = (operation(plane, _PLATEAU, borderType=cv2.BORDER_REPLICATE) for operation in (cv2.erode, cv2.dilate))
    solid = middle & (high - low <= highest / 48)
    if not solid.any():
        return False
    _, labels = cv2.connectedComponents((plane > highest / 8).view(np.uint8))
    whole, flat = (np.bincount(found.ravel(), minlength=labels.max() + 1) for found in (labels, labels[solid]))
    # The summit of a foot that was blurred apart is flat, too, but small.
    apart = np.setdiff1d(np.flatnonzero(flat >= whole / 12), labels[plane >= 7 * highest / 8])
    return apart.size > 0


def _holds_border(mask: np.ndarray) -> bool:
    """Whether most of the picture's border is in a mask."""
    return border_share(mask) > 0.5
