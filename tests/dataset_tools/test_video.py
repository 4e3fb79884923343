"""Clips as a source: each becomes a folder of pairs, and all together a list that the source ``pairs`` reads."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import pytest
from PIL import Image

from dataset_tools.drawn_world.clips import ClipFaults, DrawnClip, write_clip
from dataset_tools.errors import UserError
from dataset_tools.estimators import FoundPeople
from dataset_tools.pair_list import PAIR_LIST, SET_ASIDE
from dataset_tools.sources.video import CLIP_REPORT, VideoSettings, list_clips, write_list, write_pairs

CLIP = DrawnClip("d", 0, (96, 72), 2, 30, ClipFaults(stands=0.2))
HOW = {"samples": 32, "frames_per_clip": 4, "min_person": 0.005}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip file."""
    path = tmp_path_factory.mktemp("drawn") / "In the park.mp4"
    write_clip(path, [CLIP[n][0] for n in range(len(CLIP))], options={"crf": "4"})
    return path


@pytest.fixture(scope="module")
def made(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pairs of that clip; not to be changed."""
    root = tmp_path_factory.mktemp("made")
    make(drawn, root)
    return root


def make(clips: Path, root: Path, instances: Any = None, **changes: Any) -> list[dict[str, Any]]:
    """Write the pairs of all clips; gives the reports."""
    settings = VideoSettings(clips=(str(clips),), **{**HOW, **changes})
    found, rejected = list_clips(settings)
    for clip in found:
        write_pairs(clip, settings.how(), instances, str(root), settings)
    write_list([clip.folder for clip in found], rejected, str(root))
    return [json.loads((root / clip.folder / CLIP_REPORT).read_text()) for clip in found]


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def reasons(root: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (root / SET_ASIDE).read_text().splitlines()]
    return [(row["outcome"], row["reason"]) for row in rows]


def test_a_clip_becomes_pairs_of_one_scene(made: Path) -> None:
    settings = VideoSettings(clips=("clips",), licence="CC0", author="Ada")
    curation = settings.pairs(str(made)).open().curate()
    assert 2 <= len(curation.records) <= 4
    assert {(record.licence, record.author) for record in curation.records} == {("CC0", "Ada")}
    assert len({record.split for record in curation.records}) == 1
    assert {instance.mask_by for record in curation.records for instance in record.instances} == {"difference"}


def test_pictures_plate_and_masks_are_those_of_the_clip(made: Path) -> None:
    """Of the frame at the time that a picture's name says."""
    rows = [json.loads(line) for line in (made / PAIR_LIST).read_text().splitlines()]
    plate, known = (np.asarray(Image.open(made / rows[0][name])) for name in ("background", "known"))
    assert np.abs(plate.astype(int) - CLIP.background)[known > 0].mean() < 1.5
    assert rows[0]["plate_by"]["name"] == "video"
    for row in rows:
        frame, people = CLIP[round(int(row["id"].rsplit("-", 1)[1]) / 40)]
        assert np.abs(np.asarray(Image.open(made / row["image"])).astype(int) - frame).mean() < 12  # it flickers
        masks = np.array([np.asarray(Image.open(made / name)) > 0 for name in row["masks"]])
        truth = people.any(0) & (known > 0)
        assert (masks.any(0) & truth).sum() / (masks.any(0) | truth).sum() > 0.75


def test_a_hand_that_shakes_puts_nobody_at_the_edge_of_the_picture(tmp_path: Path) -> None:
    """One walks by, and every third frame is displaced."""
    rng = np.random.default_rng(1)
    street = cv2.resize(rng.integers(30, 220, (32, 50, 3), np.uint8), (300, 192), interpolation=cv2.INTER_CUBIC)
    frames = []
    for number in range(16):
        right, down = rng.integers(-7, 8, 2) if number % 3 == 1 else (0, 0)
        frame = street[20 + down : 164 + down, 20 + right : 276 + right].copy()
        frame[50 - down : 120 - down, 30 + 12 * number - right : 50 + 12 * number - right] = 200, 40, 40
        frames.append(frame)
    write_clip(tmp_path / "shaken.mp4", frames, options={"crf": "4"})
    (report,) = make(tmp_path / "shaken.mp4", tmp_path / "made", frames_per_clip=8)
    assert report["views"][0]["shaken"] > 0
    rows = [json.loads(line) for line in (tmp_path / "made" / PAIR_LIST).read_text().splitlines()]
    assert [len(row["masks"]) for row in rows] == [1] * len(rows) and rows


def test_the_provider_of_plates_knows_where_they_are_known(made: Path) -> None:
    source = VideoSettings(clips=("clips",)).pairs(str(made)).open()
    record = source.curate().records[0]
    plate = source.clean_plate(np.zeros((72, 96, 3), np.uint8), record)
    assert plate.made_by.name == "video"
    assert 0.9 < plate.known.mean() <= 1


def test_a_run_that_was_killed_leaves_nothing_and_the_next_gives_the_same_bytes(
    drawn: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = Path.write_bytes

    def killed(path: Path, data: bytes) -> int:
        if path.name.startswith("known"):
            raise KeyboardInterrupt
        return write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            make(drawn, tmp_path)
    assert pictures(tmp_path) == {}
    make(drawn, tmp_path)
    assert pictures(tmp_path) == pictures(made)


def test_a_store_that_is_no_disk_gets_the_same_files(drawn: Path, made: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/video/clips/In the park.mp4", drawn.read_bytes())
    settings = VideoSettings(clips=("memory://video/clips",), **HOW)
    clips, _ = list_clips(settings)
    try:
        assert [write_pairs(clip, settings.how(), None, "memory://video/made", settings) for clip in clips] == [True]
        found = {name.removeprefix("/video/made/"): memory.cat_file(name) for name in memory.find("/video/made")}
    finally:
        memory.rm("/video", recursive=True)
    assert found == {name: data for name, data in pictures(made).items() if "/" in name}


def test_what_cannot_be_used_is_told_with_its_reason(tmp_path: Path, drawn: Path) -> None:
    """No clip, a clip of one frame, a pan, nobody in it, a copy, and a file of another kind."""
    clips, still = tmp_path / "clips", CLIP.background
    clips.mkdir()
    shutil.copy(drawn, clips / "a.mp4")
    shutil.copy(drawn, clips / "copy.mp4")
    (clips / "broken.mp4").write_bytes(b"no clip")
    (clips / "notes.txt").write_text("where they were taken")
    write_clip(clips / "one.mkv", [still])
    write_clip(clips / "empty.avi", [still] * 16, "mjpeg", "yuvj420p")
    write_clip(clips / "pan.mp4", [np.roll(still, 7 * n, 1) for n in range(16)], options={"crf": "8"})
    reports = {report["name"]: report for report in make(clips, tmp_path / "made")}
    told = {name: [row["reason"] for row in report["rejected"]] for name, report in reports.items()}
    assert told == {
        "a.mp4": [],
        "broken.mp4": ["not-a-clip"],
        "copy.mp4": [],
        "empty.avi": ["nobody-moves"],
        "one.mkv": ["too-short"],
        "pan.mp4": ["camera-moves"],
    }
    assert ("image-rejected", "duplicate-clip") in reasons(tmp_path / "made")
    assert ("row-rejected", "unknown-suffix") in reasons(tmp_path / "made")
    curation = VideoSettings(clips=("clips",)).pairs(str(tmp_path / "made")).open().curate()
    assert {record.id.rsplit("-", 2)[0] for record in curation.records} == {"a"}
    assert len([row for row in curation.rejected if row.outcome == "image-rejected"]) == 5


def test_a_full_disk_ends_the_run_and_is_no_fault_of_the_clip(
    tmp_path: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dataset_tools.clips.reading.FrameStore.append", full)
    with pytest.raises(OSError, match="No space left"):
        make(drawn, tmp_path)


class Finder:
    """A network that finds what it is told to: the people of the clip, and somebody at the left edge of everything."""

    name = "finder"

    def find(self, images: list[np.ndarray]) -> list[FoundPeople]:
        sitter = np.zeros((72, 96), bool)
        sitter[30:60, 2:10] = True
        found = []
        for image in images:
            differences = [
                (np.abs(image.astype(int) - CLIP[n][0]).mean(), n) for n in range(len(CLIP)) if CLIP[n][1].any()
            ]
            away, number = min(differences)
            masks = [mask & ~sitter for mask in CLIP[number][1]] if away < 8 else []
            masks = [mask for mask in masks if mask.sum() > 30]
            found.append(FoundPeople([sitter, *masks], [0.9] * (1 + len(masks))))
        return found


def test_with_a_network_who_is_in_the_plate_makes_it_unknown_there(drawn: Path, tmp_path: Path) -> None:
    (report,) = make(drawn, tmp_path, Finder())
    assert report["rows"]
    for row in report["rows"]:
        known = np.asarray(Image.open(tmp_path / row["known"])) > 0
        assert not known[30:60, 2:10].any()
        assert row["masks_by"] == "finder"
        assert row["mask_scores"] == [0.9] * len(row["masks"])


def test_places_that_hold_no_clips_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        list_clips(VideoSettings(clips=(str(tmp_path / "absent"),)))
    with pytest.raises(UserError, match="holds no clips"):
        list_clips(VideoSettings(clips=(str(tmp_path),)))


def test_two_clips_of_one_name_are_told(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "clip.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="have one name"):
        list_clips(VideoSettings(clips=(str(tmp_path / "a"), str(tmp_path / "b"))))


def test_a_single_place_may_be_given_without_a_list(tmp_path: Path) -> None:
    (tmp_path / "one.mp4").write_bytes(b"")
    settings = VideoSettings.model_validate({"kind": "video", "clips": str(tmp_path / "one.mp4")})
    assert [clip.name for clip in list_clips(settings)[0]] == ["one.mp4"]


def test_clips_in_linked_folders_count_like_others(tmp_path: Path) -> None:
    for folder in ("clips", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "elsewhere/b.mp4").write_bytes(b"")
    (tmp_path / "clips/more").symlink_to(tmp_path / "elsewhere")
    clips, rejected = list_clips(VideoSettings(clips=(str(tmp_path / "clips"),)))
    assert ([clip.name for clip in clips], rejected) == (["more/b.mp4"], [])
