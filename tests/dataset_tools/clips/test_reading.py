"""Samples of clips as cameras write them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_tools.clips import reading
from dataset_tools.clips.reading import FrameStore, Samples, read_samples
from dataset_tools.drawn_world.clips import write_clip
from dataset_tools.errors import Rejected

QUALITY = {"crf": "1"}
FASTSTART = {"movflags": "faststart"}


def numbered(number: int, size: tuple[int, int] = (48, 32)) -> np.ndarray:
    """A frame (H, W, 3) whose lower quarters tell its number in tens and ones; the upper left one is red."""
    frame = np.full((size[1], size[0], 3), 128, np.uint8)
    y, x = size[1] // 2, size[0] // 2
    frame[:y, :x] = 200, 0, 0
    frame[y:, :x] = 40 + 18 * (number // 10)
    frame[y:, x:] = 40 + 18 * (number % 10)
    return frame


def number_of(frame: np.ndarray) -> int:
    """The inverse of `numbered`."""
    y, x = frame.shape[0] // 2 + 4, frame.shape[1] // 2
    tens, ones = ((float(part.mean()) - 40) / 18 for part in (frame[y:, : x - 4], frame[y:, x + 4 :]))
    return 10 * round(tens) + round(ones)


@contextlib.contextmanager
def samples_of(path: Path, most: int = 96, max_side: int = 1280) -> Iterator[Samples]:
    with read_samples(path, most, max_side) as samples:
        yield samples


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "size"),
    [
        ("clip.mp4", "libx264", "yuv420p", (48, 32)),
        ("clip.mov", "libx264", "yuv444p", (48, 32)),
        ("clip.avi", "mjpeg", "yuvj420p", (47, 33)),
        ("clip.mkv", "libx264", "yuv444p", (47, 33)),
        ("clip.avi", "mpeg4", "yuv420p", (47, 33)),
    ],
)
def test_every_frame_of_a_short_clip_is_a_sample(
    tmp_path: Path, name: str, codec: str, pixels: str, size: tuple[int, int]
) -> None:
    options = QUALITY if codec == "libx264" else {}
    write_clip(tmp_path / name, [numbered(n, size) for n in range(20)], codec, pixels, options=options)
    with samples_of(tmp_path / name) as samples:
        assert samples.frames.shape == (size[1], size[0], 3)
        assert [number_of(samples.frames[n]) for n in range(20)] == list(range(20))
        assert np.allclose(samples.times, 0.04 * np.arange(20), atol=0.002)
        assert samples.mended == []


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (-90, -1), (180, 2)])
def test_frames_are_turned_upright(tmp_path: Path, rotation: int, turns: int) -> None:
    upright = numbered(5)
    stored = np.rot90(upright, -turns)
    write_clip(tmp_path / "clip.mp4", [stored] * 3, rotation=rotation, options=QUALITY)
    with samples_of(tmp_path / "clip.mp4") as samples:
        assert samples.frames.shape == upright.shape
        assert np.abs(samples.frames[0].astype(int) - upright).mean() < 2


def test_frames_whose_pixels_are_not_square_are_stretched(tmp_path: Path) -> None:
    sar = {"x264-params": "sar=4/3"}
    write_clip(tmp_path / "clip.mp4", [numbered(5)] * 3, options=QUALITY | sar)
    with samples_of(tmp_path / "clip.mp4") as samples:
        assert samples.frames.shape == (32, 64, 3) and number_of(samples.frames[0]) == 5
        assert [reason for reason, _ in samples.mended] == ["pixels-not-square"]
    with samples_of(tmp_path / "clip.mp4", max_side=32) as samples:
        assert samples.frames.shape == (16, 32, 3)


@pytest.mark.parametrize(("transfer", "curve"), [("arib-std-b67", "HLG"), ("smpte2084", "PQ")])
def test_hdr_is_refused_with_what_to_do(tmp_path: Path, transfer: str, curve: str) -> None:
    write_clip(tmp_path / "clip.mp4", [numbered(5)] * 3, options={"x264-params": f"transfer={transfer}"})
    with pytest.raises(Rejected, match=rf"hdr: .*\({curve}\).*convert it to SDR"), samples_of(tmp_path / "clip.mp4"):
        pass


def test_colours_are_not_shifted(tmp_path: Path) -> None:
    """FFmpeg's quick conversion of 4:2:0 is darker by a grey level in the mean."""
    frame = np.zeros((32, 48, 3), np.uint8) + np.array([180, 140, 90], np.uint8)
    write_clip(tmp_path / "clip.mp4", [frame] * 3, pixels="yuv420p", options=QUALITY)
    with samples_of(tmp_path / "clip.mp4") as samples:
        assert np.abs(samples.frames[1].astype(int) - frame).max() <= 1


def test_samples_are_spread_over_the_time_not_over_the_frames(tmp_path: Path) -> None:
    """Of a variable frame rate: 60 frames in the first two seconds, 20 in the eight that follow."""
    times = [*range(0, 2000, 34), *range(2000, 10_000, 400)]
    write_clip(tmp_path / "clip.mp4", [numbered(n) for n in range(len(times))], milliseconds=times, options=QUALITY)
    with samples_of(tmp_path / "clip.mp4", most=16) as samples:
        assert 8 <= len(samples.times) <= 16
        assert sum(time < 2 for time in samples.times) <= 4
        for number, time in enumerate(samples.times):
            assert times[number_of(samples.frames[number])] == pytest.approx(1000 * time, abs=2)


def test_no_more_frames_are_kept_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for a while: the room on the disk is bounded, too."""
    held: list[int] = []
    append = FrameStore.append
    monkeypatch.setattr(FrameStore, "append", lambda store, frame: held.append(len(store)) or append(store, frame))
    write_clip(tmp_path / "clip.mp4", [numbered(n) for n in range(100)], options=QUALITY)
    with samples_of(tmp_path / "clip.mp4", most=8) as samples:
        assert max(held) < 8
        assert 4 <= len(samples.times) <= 8
        assert np.ptp(np.diff(samples.times)) < 0.1


def test_large_frames_are_shrunk(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", [numbered(n, (96, 64)) for n in range(3)], options=QUALITY)
    with samples_of(tmp_path / "clip.mp4", max_side=48) as samples:
        assert samples.frames.shape == (32, 48, 3)
        assert number_of(samples.frames[2]) == 2


def test_what_can_be_read_of_a_truncated_clip_is_used(tmp_path: Path) -> None:
    frames = [np.random.default_rng(n).integers(0, 255, (32, 48, 3), np.uint8) for n in range(40)]
    write_clip(tmp_path / "whole.mp4", frames, container=FASTSTART)
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(data[: len(data) // 2])
    with samples_of(tmp_path / "whole.mp4") as whole, samples_of(tmp_path / "clip.mp4") as samples:
        count = len(samples.times)
        assert 10 < count < 30
        assert all(np.array_equal(samples.frames[n], whole.frames[n]) for n in range(count))
        assert "truncated-clip" in [reason for reason, _ in samples.mended]


def test_a_truncated_clip_whose_index_stood_at_its_end_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", [numbered(n) for n in range(20)])
    data = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(Rejected, match="not-a-clip"), samples_of(tmp_path / "clip.mp4"):
        pass


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello\n" * 100,
        b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile other.mp4\n",
    ],
    ids=["empty", "text", "playlist", "concat"],
)
def test_what_is_no_clip_is_refused(tmp_path: Path, content: bytes) -> None:
    """A playlist would make FFmpeg open what it names."""
    write_clip(tmp_path / "other.mp4", [numbered(0)])
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(Rejected, match=r"not-a-clip: clip\.mp4"), samples_of(tmp_path / "clip.mp4"):
        pass


def test_frames_that_are_too_narrow_are_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mkv", [numbered(n, (480, 4)) for n in range(2)])
    with (
        pytest.raises(Rejected, match=r"too-narrow: clip\.mkv has frames of 480x4 pixels"),
        samples_of(tmp_path / "clip.mkv"),
    ):
        pass


def test_samples_have_a_millisecond_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clip whose time stamps are wrong one frame is left, and no picture takes another's name."""
    write_clip(tmp_path / "clip.mkv", [numbered(n) for n in range(4)], options=QUALITY)
    decoded = reading._decoded

    def hasty(*arguments: Any) -> Iterator[Any]:
        for frame in decoded(*arguments):
            frame.time_base /= 1000
            yield frame

    monkeypatch.setattr(reading, "_decoded", hasty)
    with samples_of(tmp_path / "clip.mkv") as samples:
        assert samples.times == [0.0]


def test_frames_that_are_too_large_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "clip.mp4", [numbered(0)] * 2)
    monkeypatch.setattr(reading, "MOST_PIXELS", 1000)
    monkeypatch.setattr(reading, "_decoded", lambda *_: pytest.fail("a frame was decoded"))
    with pytest.raises(Rejected, match="too-many-pixels"), samples_of(tmp_path / "clip.mp4"):
        pass
