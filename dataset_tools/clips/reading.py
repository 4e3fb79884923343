"""Samples of a clip, spread evenly over its time, on disk: a clip of any length is read in bounded memory.

PyAV decodes (https://pyav.org) and is imported when a clip is read. One frame after another is seen once, and those
that are kept are turned upright by the display matrix. Times are those of the frames, so that a variable frame rate
does not matter.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np

from dataset_tools.errors import Rejected

CLIP_SUFFIXES = (
    ".mp4", ".mov", ".m4v", ".3gp", ".mkv", ".webm", ".avi", ".mts", ".m2ts", ".ts", ".mpg", ".mpeg", ".wmv", ".flv",
)  # fmt: skip
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,asf,flv"
"""Containers of FFmpeg that hold what they show. Others (playlists, image sequences) open files that they name."""
MOST_PIXELS = 8192 * 8192
"""Frames with more pixels are refused before one is decoded."""
_EXACT = ("BICUBIC", "ACCURATE_RND", "FULL_CHR_H_INT", "BITEXACT")
"""How FFmpeg converts to RGB: its quick way is darker by a grey level, and is not the same on all machines."""
_LONGEST_GAP = 1.0
"""Seconds that one frame may stand for; a hole in the time stamps counts as that."""
_MOST_NARROW = 16
"""How many times as long as the other the longer side of a frame may be; nothing would be left of narrower ones where
views are compared."""
_HDR = {16: "PQ", 18: "HLG"}
"""Transfer characteristics (ITU-T H.273) that FFmpeg takes for those of sRGB: pictures would be pale."""
_READ_SHARE = 0.95
"""A clip of which less than this share of its stated length can be read is told as truncated."""


class FrameStore:
    """Frames of one size in a temporary file; memory holds one frame, or one band of rows of all frames, at a time."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self.shape = (0, 0, 3)
        """(H, W, 3) of each frame."""
        self._slots: list[int] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._slots)

    def close(self) -> None:
        """Give the disk's room back."""
        self._file.close()

    def append(self, frame: np.ndarray) -> None:
        """Add a frame, (H, W, 3) uint8; the first decides about the size of all."""
        if not self._slots:
            self.shape = frame.shape
        self._slots.append(self._free.pop() if self._free else len(self._slots))
        self[len(self._slots) - 1] = frame

    def keep(self, numbers: list[int]) -> None:
        """Drop all frames but these, in this order."""
        kept = [self._slots[number] for number in numbers]
        self._free += sorted(set(self._slots) - set(kept), reverse=True)
        self._slots = kept

    def __setitem__(self, number: int, frame: np.ndarray) -> None:
        if frame.shape != self.shape:
            raise ValueError(f"a frame of {frame.shape} among frames of {self.shape}")
        self._file.seek(self._slots[number] * frame.nbytes)
        self._file.write(np.ascontiguousarray(frame).data)

    def __getitem__(self, number: int) -> np.ndarray:
        return self._rows(number, 0, self.shape[0])

    def band(self, numbers: list[int], top: int, bottom: int) -> np.ndarray:
        """Rows ``top`` to ``bottom`` of several frames, (n, rows, W, 3) uint8."""
        return np.stack([self._rows(number, top, bottom) for number in numbers])

    def _rows(self, number: int, top: int, bottom: int) -> np.ndarray:
        height, width, channels = self.shape
        row = width * channels
        self._file.seek((self._slots[number] * height + top) * row)
        data = self._file.read((bottom - top) * row)
        return np.frombuffer(data, np.uint8).reshape(bottom - top, width, channels).copy()


@dataclass
class Samples:
    """What was kept of a clip."""

    frames: FrameStore
    """RGB, upright."""
    times: list[float]
    """Seconds from the first frame, one a sample; ascending, no two of one millisecond."""
    mended: list[tuple[str, str]] = field(default_factory=list)
    """Reason and message for each thing that was unusual about the file and could be put right."""


@contextlib.contextmanager
def read_samples(path: Path, most: int, max_side: int) -> Iterator[Samples]:
    """Take up to ``most`` samples of a clip, more than half of that where it has so many frames.

    Args:
        path: a local file.
        most: largest number of samples, 4 or more.
        max_side: frames whose longer side is longer, in pixels, are shrunk to it.

    Raises:
        Rejected: ``not-a-clip``: no video can be read from the file; ``too-many-pixels``; ``too-narrow``; ``hdr``.
    """
    store = FrameStore()
    try:
        samples = Samples(store, [])
        _read(path, samples, most, max_side)
        if not samples.times:
            raise Rejected("not-a-clip", f"{path.name} has no frame that can be decoded")
        yield samples
    finally:
        store.close()


def _read(path: Path, samples: Samples, most: int, max_side: int) -> None:
    import av

    clock = step = 0.0
    before: float | None = None
    size: tuple[int, int] | None = None
    other_sizes = 0
    av.logging.set_level(av.logging.PANIC)  # what is wrong with a file is told with its name
    try:
        container = av.open(str(path), options={"format_whitelist": _FORMATS})
    except (av.FFmpegError, OSError) as error:
        raise Rejected("not-a-clip", f"{path.name} cannot be read as a clip: {error.strerror or error}") from None
    with container:
        stream: Any = container.streams.best("video")
        if stream is None:
            raise Rejected("not-a-clip", f"{path.name} has no video in it")
        if stream.width * stream.height > MOST_PIXELS:
            raise Rejected("too-many-pixels", f"{path.name} has frames of {stream.width}x{stream.height} pixels")
        # One thread: with several, what comes of a damaged file depends on their number. Clips are read side by side.
        stream.thread_count = 1
        faults: list[str] = []
        aspect = float(stream.sample_aspect_ratio or 1)
        for frame in _decoded(container, stream, faults):
            size = size or (frame.width, frame.height)
            shown = round(size[0] * aspect), size[1]
            if max(shown) > _MOST_NARROW * min(shown):
                raise Rejected("too-narrow", f"{path.name} has frames of {shown[0]}x{shown[1]} pixels")
            if (curve := _HDR.get(int(frame.color_trc))) is not None:
                message = f"{path.name} is HDR ({curve}), and its colours would be wrong: convert it to SDR (BT.709)"
                raise Rejected("hdr", message)
            if (frame.width, frame.height) != size:
                other_sizes += 1
                continue
            time = frame.time if frame.time is not None else (before or 0.0) + 1 / float(stream.average_rate or 25)
            if before is not None:
                clock += min(max(time - before, 0.0), _LONGEST_GAP)
            before = time
            if samples.times and (
                _same_millisecond(clock, samples.times[-1]) or _slot(clock, step) <= _slot(samples.times[-1], step)
            ):
                continue
            if len(samples.times) == most:
                step = max(2 * step, 2 * clock / most)
                _thin(samples, step)
                if _slot(clock, step) <= _slot(samples.times[-1], step):
                    continue
            samples.frames.append(_upright(frame, aspect, max_side))
            samples.times.append(clock)
        stated = float(container.duration / av.time_base) if container.duration else 0.0
    if size is not None and shown != size:
        message = f"frames of {size[0]}x{size[1]} pixels are shown, and taken, as {shown[0]}x{shown[1]}"
        samples.mended.append(("pixels-not-square", message))
    if faults:
        samples.mended.append(("damaged-clip", f"{len(faults)} packets cannot be decoded: {faults[0]}"))
    if clock < _READ_SHARE * stated - _LONGEST_GAP / 5:
        samples.mended.append(("truncated-clip", f"{clock:.1f} of {stated:.1f} seconds can be read"))
    if other_sizes:
        samples.mended.append(("other-size", f"{other_sizes} frames have another size than the first and are left out"))


def _decoded(container: Any, stream: Any, faults: list[str]) -> Iterator[Any]:
    """Frames that are whole; what is wrong with others goes to ``faults``."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, OSError) as error:
            faults.append(str(error.strerror or error))
            return
        if packet is None:
            return
        try:
            yield from (frame for frame in packet.decode() if not frame.is_corrupt)
        except av.FFmpegError as error:
            faults.append(str(error.strerror or error))


def _same_millisecond(time: float, other: float) -> bool:
    """Whether two times in seconds have one name: pictures are called by the millisecond."""
    return round(1000 * time) == round(1000 * other)


def _slot(time: float, step: float) -> float:
    return time // step if step else time


def _thin(samples: Samples, step: float) -> None:
    """Keep the first sample of each ``step`` seconds."""
    kept: list[int] = []
    for number, time in enumerate(samples.times):
        if not kept or _slot(time, step) > _slot(samples.times[kept[-1]], step):
            kept.append(number)
    samples.frames.keep(kept)
    samples.times = [samples.times[number] for number in kept]


def _upright(frame: Any, aspect: float, max_side: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB, of square pixels; ``aspect``: width of the frame's by their height."""
    from av.video.reformatter import Interpolation

    wide = frame.width * aspect
    scale = min(1.0, max_side / max(wide, frame.height))
    width, height = max(1, round(wide * scale)), max(1, round(frame.height * scale))
    exact = reduce(or_, (Interpolation[name] for name in _EXACT))
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=exact)
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
