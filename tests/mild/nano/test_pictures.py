"""Pictures and holes that the nano base is trained on."""

from __future__ import annotations

import filecmp
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest

from dataset_tools.drawn_world import draw_scene
from dataset_tools.errors import UserError
from dataset_tools.records import SPLITS
from dataset_tools.sources import sample
from mild.nano import pictures
from mild.nano.dead_leaves import draw_leaves
from mild.nano.pictures import KEY, DrawingSettings, Pictures, caption, draw_pictures, filled_holes, random_hole

SMALL = DrawingSettings(scenes=4, held_out=2, crops=2, drawn=64, side=32)
FILES = ["pictures.npy", "outlines.npy", "captions.json", "held_out.npy"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("drawn") / "pictures"
    draw_pictures(SMALL, place, workers=1)
    return place


def test_scenes_that_are_smaller_than_pictures_of_them_are_refused() -> None:
    with pytest.raises(UserError, match=r"drawn \(64\) must be at least side \(128\)"):
        DrawingSettings.check({"drawn": 64, "side": 128}, origin="test")


def test_each_scene_gives_the_whole_picture_and_a_random_crop(folder: Path) -> None:
    drawn = Pictures.open(folder)
    assert drawn.pictures.shape == (8, 32, 32, 3)
    assert drawn.held_out.shape == (2, 32, 32, 3)
    assert len(drawn.captions) == 8
    scene = draw_scene(KEY.format(part="train", index=1), SMALL.seed, (64, 64), 1)
    # OpenCV's area averages of two by two pixels are plain means.
    mean = scene.image.reshape(32, 2, 32, 2, 3).astype(float).mean((1, 3))
    assert np.abs(drawn.pictures[2] - mean).max() <= 1
    assert not np.array_equal(drawn.pictures[2], drawn.pictures[3])
    assert drawn.captions[2] == caption(scene.kind, 1)
    # Among what is drawn are the shadows.
    shadow = scene.people[0].effects
    assert (scene.image[shadow].astype(int).sum(-1) < scene.background[shadow].astype(int).sum(-1)).mean() > 0.9


def test_outlines_are_those_of_the_people_in_the_pictures(folder: Path) -> None:
    drawn = Pictures.open(folder)
    scene = draw_scene(KEY.format(part="train", index=1), SMALL.seed, (64, 64), 1)
    share = scene.people[0].mask.reshape(32, 2, 32, 2).mean((1, 3))
    assert any(np.array_equal(outline, share > 0.5) for outline in drawn.outlines)


def test_leaves_and_other_colours_are_drawn_in_the_shares_asked_for_and_never_held_out(
    folder: Path, tmp_path: Path
) -> None:
    drawn: dict[str, Pictures] = {}
    for name in ("leaves", "recolour"):
        draw_pictures(SMALL.model_copy(update={name: 1.0}), tmp_path / name, workers=1)
        drawn[name] = Pictures.open(tmp_path / name)
        assert np.array_equal(drawn[name].held_out, Pictures.open(folder).held_out)
    assert drawn["leaves"].captions == ["a pattern with no people"] * 8
    assert not len(drawn["leaves"].outlines)
    # The same scenes, in colours of their own.
    assert drawn["recolour"].captions[2] == Pictures.open(folder).captions[2]
    assert not np.array_equal(drawn["recolour"].pictures[2], Pictures.open(folder).pictures[2])
    some = SMALL.model_copy(update={"leaves": 0.5, "scenes": 30, "crops": 1, "drawn": 32, "held_out": 1})
    draw_pictures(some, tmp_path / "some", workers=1)
    captions = Pictures.open(tmp_path / "some").captions
    assert 8 <= sum("pattern" in text for text in captions) <= 22


def test_dead_leaves_have_the_spectra_of_photographs() -> None:
    """Power falls about as frequency^-2: between -2 and -3 in natural images (Torralba and Oliva 2003, section 3)."""
    side, slopes = 128, []
    window = np.outer(np.hanning(side), np.hanning(side))
    radius = np.hypot(*(np.indices((side, side)) - side // 2)).astype(int).ravel()
    for seed in range(6):
        grey = draw_leaves(np.random.default_rng(seed), side).mean(-1)
        power = np.abs(np.fft.fftshift(np.fft.fft2((grey - grey.mean()) * window))) ** 2
        mean = np.bincount(radius, power.ravel()) / np.bincount(radius)
        slopes.append(np.polyfit(np.log(np.arange(3, 33)), np.log(mean[3:33]), 1)[0])
    assert -3.2 < np.mean(slopes) < -1.8


@pytest.mark.process
def test_any_number_of_processes_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    draw_pictures(SMALL, tmp_path / "again", workers=2)
    assert filecmp.cmpfiles(folder, tmp_path / "again", FILES, shallow=False) == (FILES, [], [])


@pytest.mark.process
def test_any_number_of_processes_draws_the_same_holes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "DRAWN_AT_ONCE", 2)  # more than one round
    alone, together = (list(filled_holes(5, folder, 2, workers)) for workers in (1, 2))
    assert len(alone) == len(together) == 8
    for one, other in zip(itertools.chain(*alone), itertools.chain(*together), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_another_seed_draws_other_pictures(folder: Path, tmp_path: Path) -> None:
    draw_pictures(SMALL.model_copy(update={"seed": 1}), tmp_path / "other", workers=1)
    assert not np.array_equal(Pictures.open(folder).pictures, Pictures.open(tmp_path / "other").pictures)


def test_no_scene_of_the_sample_world_is_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Scenes follow from (seed, key): the keys that both worlds ask for, seen at their common source, are disjoint."""
    asked: dict[str, set[str]] = {"sample": set(), "nano": set()}

    def watch(name: str) -> None:
        def drawn(key: str, seed: int, size: tuple[int, int], people: int) -> object:
            asked[name].add(key)
            return draw_scene(key, seed, size, people)

        monkeypatch.setattr({"sample": sample, "nano": pictures}[name], "draw_scene", drawn)

    from mild.nano import pictures

    watch("sample")
    watch("nano")
    few = {name: 1 for split in SPLITS for name in (split, f"{split}_backgrounds")}
    settings = sample.SampleSettings(**few, smallest=128, largest=128, broken=False)
    sample.write_mirror(settings, str(tmp_path / "mirror"))
    draw_pictures(SMALL, tmp_path / "pictures", workers=1)
    assert len(asked["nano"]) == 6
    assert {key.split("/")[0] for key in asked["sample"]} == set(SPLITS)
    assert {key.split("/")[0] for key in asked["nano"]}.isdisjoint(SPLITS)


def test_pictures_held_out_are_not_among_those_to_train_on(folder: Path) -> None:
    drawn = Pictures.open(folder)
    digests = {hashlib.sha256(picture.tobytes()).digest() for picture in drawn.pictures}
    assert digests.isdisjoint(hashlib.sha256(picture.tobytes()).digest() for picture in drawn.held_out)


@pytest.mark.parametrize("with_outlines", [True, False])
def test_holes_leave_at_least_half_of_the_picture_and_lie_everywhere(with_outlines: bool) -> None:
    outlines = np.zeros((1, 64, 64), bool)
    outlines[0, 20:50, 28:38] = True
    holes = np.stack(
        [random_hole(np.random.default_rng(seed), 64, list(outlines[: int(with_outlines)])) for seed in range(300)]
    )
    shares = holes.mean((1, 2))
    assert shares.min() >= 0.03
    assert shares.max() <= 0.5
    often = holes.mean(0)
    # Nothing ties a hole to where the outline was.
    assert often.min() > 0.02
    assert often.max() < 0.5


def test_a_hole_follows_from_its_generator_alone() -> None:
    holes = [random_hole(np.random.default_rng(seed), 64, []) for seed in (1, 1, 2)]
    assert np.array_equal(holes[0], holes[1])
    assert not np.array_equal(holes[0], holes[2])
