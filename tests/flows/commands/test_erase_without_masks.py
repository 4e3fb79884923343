"""``mild erase`` of photographs that nobody marked: who is found, who of them vanishes, what the model is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_tools.drawn_world import draw_scene
from dataset_tools.networks import SUGGESTED
from dataset_tools.weights import missing_message
from flows.commands import erase_photos
from mild.bases import NANO_ADAPTERS
from mild.erasing.regions import editable
from mild.model.saved import FORMAT, SavedConfig
from mild.settings import HmgSettings, MildSettings

HEIGHT, WIDTH = 64, 96
ANN, BOB, EVE = np.zeros((3, HEIGHT, WIDTH), bool)
ANN[20:50, 10:22] = True
BOB[8:40, 40:55] = True
EVE[30:60, 70:84] = True
EVERYBODY = [ANN, BOB, EVE]

Command = Callable[..., tuple[int, str, str]]


def photo(people: Sequence[np.ndarray] = EVERYBODY) -> np.ndarray:
    """(H, W, 3) uint8 of dark noise and bright people."""
    image = np.random.default_rng(0).integers(20, 90, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for person in people:
        image[person] = 204
    return image


def save(array: np.ndarray, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def index(people: Sequence[np.ndarray] = EVERYBODY) -> np.ndarray:
    numbers = [person * np.uint8(number) for number, person in enumerate(people, start=1)]
    return np.max(numbers, axis=0)


class Recorder:
    """Instead of a pipeline: what it was given, and a result that is black where people vanish."""

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []

    def set_progress_bar_config(self, **_: object) -> None:
        pass

    def __call__(
        self,
        image: np.ndarray,
        people: list[np.ndarray],
        chosen: list[int],
        *,
        generator: torch.Generator,
        **options: Any,
    ) -> Any:
        self.calls.append(SimpleNamespace(people=people, chosen=chosen, **options))
        gone = np.logical_or.reduce([people[k] for k in chosen])
        return SimpleNamespace(image=np.where(gone[..., None], np.uint8(0), image))


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(erase_photos, "_load", lambda _: recorder)
    return recorder


@pytest.fixture
def erase(mild_anew: Command, networks: Any, pipeline: Recorder) -> Command:
    """``mild erase`` by a base alone, with a network that takes bright spots for people."""
    return lambda *arguments: mild_anew("erase", *arguments, "--base", "some-base")


@pytest.fixture
def guided(tmp_path: Path) -> Path:
    """The ``mild.json`` of adapters that were trained with HMG."""
    return write_config(tmp_path / "guided", HmgSettings())


def write_config(folder: Path, hmg: HmgSettings | None) -> Path:
    saved = SavedConfig(
        base="some-base", resolution=64, inference_resolution=64, inference_steps=4, mild=MildSettings(hmg=hmg)
    )
    folder.mkdir()
    (folder / "mild.json").write_text(json.dumps({"format": FORMAT, **saved.model_dump(mode="json")}))
    return folder


@pytest.mark.parametrize(
    ("options", "vanish"),
    [
        ([], EVERYBODY),
        (["--remove", "1,3"], [ANN, EVE]),
        (["--remove", 2], [BOB]),
        (["--click", "45,20"], [BOB]),
        (["--click", "83,59", "--click", "10, 20", "--click", "11,21"], [ANN, EVE]),
        (["--largest"], [BOB]),
        (["--keep-largest"], [ANN, EVE]),
    ],
)
@pytest.mark.parametrize("found", [True, False], ids=["found", "masks"])
def test_those_vanish_who_were_chosen(
    tmp_path: Path, erase: Command, options: list[object], vanish: list[np.ndarray], found: bool
) -> None:
    file = save(photo(), tmp_path / "one.png")
    masks = [] if found else ["--mask", save(index(), tmp_path / "masks.png")]
    code, out, err = erase(file, *masks, *options)
    by = ", found by drawn/spots" if found else ""
    assert (code, err) == (0, "")
    assert out == f"{tmp_path}/one-erased.png: {len(vanish)} of 3 people erased{by}\n"
    with Image.open(tmp_path / "one-erased.png") as result:
        black = ~np.asarray(result).any(axis=2)
    assert np.array_equal(black, np.logical_or.reduce(vanish))


def test_a_click_where_two_overlap_means_the_one_in_front(tmp_path: Path, erase: Command, pipeline: Recorder) -> None:
    masks = [save(mask, tmp_path / f"{k}.png") for k, mask in enumerate((ANN | BOB, BOB))]
    file = save(photo(), tmp_path / "one.png")
    assert erase(file, "--mask", masks[0], "--mask", masks[1], "--click", "45,20")[0] == 0
    assert pipeline.calls[0].chosen == [1]


@pytest.mark.slow
def test_the_masks_of_mild_mask_erase_the_same_people(
    tmp_path: Path, mild_anew: Command, networks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bytes, of a photograph on its side, with the pipeline itself; all else stays as it was."""
    monkeypatch.setattr(erase_photos, "_load", cache(erase_photos._load))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = save(photo(), tmp_path / "one.png", exif=exif)
    assert mild_anew("mask", file)[0] == 0
    assert mild_anew("mask", file, "--coco", tmp_path / "people.json", "-o", tmp_path / "look.jpg")[0] == 0
    masks = {"png": ["--mask", tmp_path / "one-mask.png"], "json": ["--mask", tmp_path / "people.json"], "none": []}
    for name, given in masks.items():
        options = ["--steps", 1, "--extents", "off", "--remove", "1,3", "-o", tmp_path / f"{name}.png"]
        code, _, err = mild_anew("erase", file, *given, *options)
        assert (code, len(err.splitlines())) == (0, 1) and "drawn pictures only" in err
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in masks}) == 1
    with Image.open(tmp_path / "none.png") as result:
        differs = (np.asarray(result) != np.rot90(photo(), -1)).any(axis=2)
    left_to_right = sorted((np.rot90(person, -1) for person in EVERYBODY), key=lambda p: np.nonzero(p)[1].mean())
    people = np.stack(left_to_right)[[0, 2]]
    assert not (differs & ~editable(people, [0, 1])).any() and all(differs[person].any() for person in people)


def test_a_photograph_without_people_is_set_aside(tmp_path: Path, erase: Command) -> None:
    """An only one is an error."""
    save(photo(), tmp_path / "photos/good.png")
    empty = save(photo([]), tmp_path / "photos/empty.png")
    says = f"{empty}: drawn/spots finds nobody in it; say where people are with --mask\n"
    assert erase(empty)[::2] == (2, f"error: {says}")
    code, out, err = erase(tmp_path / "photos")
    assert (code, err) == (1, f"{says}1 of 2 photographs were set aside\n")
    assert out.startswith(f"{tmp_path}/photos/good-erased.png: 3 of 3 people erased")


def test_the_model_is_shown_pose_and_parsing_if_it_learned_with_them(
    tmp_path: Path, mild_anew: Command, networks: Any, pipeline: Recorder, guided: Path
) -> None:
    """In the photograph's own size, with masks too; networks are shown a smaller one."""
    networks.add_cues()
    people = [np.repeat(np.repeat(person, 22, 0), 22, 1) for person in EVERYBODY]
    large = np.repeat(np.repeat(photo(), 22, 0), 22, 1)
    file, masks = save(large, tmp_path / "one.png"), save(index(people), tmp_path / "masks.png")
    for options in ([], ["--mask", masks]):
        assert mild_anew("erase", file, *options, "--mild", guided, "--force")[::2] == (0, "")
        call = pipeline.calls.pop()
        joints = np.arange(18) != 1
        for found, person in zip(call.pose, people, strict=True):
            middle = np.argwhere(person).mean(axis=0)[::-1]
            assert np.abs(found[joints, :2] - middle).max() < 2 and (found[joints, 2] == 0.5).all()
            assert not found[1].any()
        assert np.array_equal(call.parsing, np.logical_or.reduce(call.people) * np.uint8(2))
        assert call.label_set == "pascal"
    assert {image.shape for image in networks.pose.seen + networks.parsing.seen} == {(1365, 2048, 3)}
    assert mild_anew("erase", file, "--base", "some-base", "--force")[0] == 0
    assert (pipeline.calls[0].pose, pipeline.calls[0].parsing) == (None, None), "a base learned nothing"


def test_a_cue_that_cannot_be_had_is_named_and_the_photograph_erased_without(
    tmp_path: Path,
    mild_anew: Command,
    networks: Any,
    pipeline: Recorder,
    guided: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = save(photo(), tmp_path / "one.png")
    code, out, err = mild_anew("erase", file, "--mild", guided)
    assert (code, "3 of 3 people erased" in out) == (0, True)
    assert err.splitlines() == [
        f"without {cue}, which {guided} was trained with: weights are missing: mild weights pull {cue}"
        for cue in ("pose", "parsing")
    ]
    networks.add_cues()
    networks.pose.broken = "centres.pth ends early"
    dark = photo()
    dark[0, 0] = 0
    code, _, err = mild_anew("erase", file, "--mild", guided, "--force")
    assert (code, err) == (0, f"without pose, which {guided} was trained with: centres.pth ends early\n")
    networks.pose.broken = ""
    save(dark, file)
    code, _, err = mild_anew("erase", file, "--mild", guided, "--force")
    assert (code, err) == (0, f"{file}: no pose: it is too dark\n")

    def fail(_: object) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(networks.parsing, "estimate_parsing", fail)
    code, _, err = mild_anew("erase", save(photo(), file), "--mild", guided, "--force")
    assert (code, err) == (0, f"{file}: no parsing: drawn/torsos failed on it: CUDA error\n")
    given = [(call.pose is not None, call.parsing is not None) for call in pipeline.calls]
    assert given == [(False, False), (False, True), (False, True), (True, False)]


def test_adapters_that_know_drawings_only_ask_for_nothing(
    tmp_path: Path, mild_anew: Command, networks: Any, pipeline: Recorder
) -> None:
    """They take the cues that can be had."""
    file = save(photo(), tmp_path / "one.png")
    code, _, err = mild_anew("erase", file)
    assert (code, len(err.splitlines())) == (0, 1) and "drawn pictures only" in err
    networks.add_cues()
    assert mild_anew("erase", file, "--mild", NANO_ADAPTERS, "--force")[::2] == (0, "")
    assert [call.pose is not None for call in pipeline.calls] == [False, True]


def test_networks_are_taken_by_their_names(
    tmp_path: Path, mild_anew: Command, networks: Any, pipeline: Recorder, guided: Path
) -> None:
    networks.add_cues()
    named = ["--instances", "rf-detr-seg-nano", "--pose", "models/pose", "--parsing", "schp-lip"]
    assert mild_anew("erase", save(photo(), tmp_path / "one.png"), "--mild", guided, *named)[0] == 0
    assert networks.asked == {"instances": "rf-detr-seg-nano", "pose": "models/pose", "parsing": "schp-lip"}


def test_what_the_user_must_mend_is_one_line(
    tmp_path: Path, mild_anew: Command, networks: Any, pipeline: Recorder, guided: Path
) -> None:
    """Of networks before a photograph is read."""
    file, gone = save(photo(), tmp_path / "one.png"), tmp_path / "gone.png"
    alone = save(photo([BOB]), tmp_path / "alone.png")
    plain = write_config(tmp_path / "plain", None)
    masks = ["--mask", save(index(), tmp_path / "masks.png")]
    base = ["--base", "some-base"]
    for arguments, message in (
        ([file, *base, "--click", "30,30"], "--click 30,30: nobody is there; the nearest is person 1, 9 pixels away"),
        ([file, *masks, *base, "--click", "60,20"], "the nearest is person 2, 6 pixels away"),
        ([file, *base, "--click", "96,0"], "--click 96,0: the photograph is 96x64 pixels"),
        ([file, *base, "--click", "12"], "--click '12': give a pixel of the photograph"),
        ([file, *base, "--click=-1,5"], "--click '-1,5': give a pixel of the photograph"),
        ([file, *base, "--remove", "4"], "--remove 4: there are 3 people, counted from 1"),
        ([alone, *base, "--keep-largest"], "--keep-largest: there is 1 person, who would stay"),
        ([file, *base, "--remove", "1", "--largest"], "--remove and --largest: each says who vanishes; give one"),
        ([file, *base, "--click", "1,1", "--keep-largest"], "--click and --keep-largest: each says"),
        ([file, *base, *masks, "--instances", "x"], "--instances says what finds the people, --mask where they are"),
        ([gone, *base, "--pose", "p"], "--pose p: some-base was trained without such cues"),
        ([gone, *masks, "--mild", plain, "--parsing", "p"], "--parsing p: .*plain was trained without such cues"),
        ([gone, *masks, "--mild", guided, "--pose", "p"], "--pose: weights are missing: mild weights pull pose"),
        ([gone, *masks, "--base", guided, "--pose", "p"], "--pose: weights are missing: mild weights pull pose"),
        ([gone, *base, "--click", f"{'9' * 5000},1"], "give a pixel of the photograph"),
        ([gone, *masks, "--mild", tmp_path], "is no MILD directory"),
    ):
        code, out, err = mild_anew("erase", *arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert re.search(message, err), err
    networks.instances.broken = "spots.pth ends early"
    assert mild_anew("erase", gone, *base)[::2] == (2, "error: spots.pth ends early\n")
    networks.instances = None
    names = [SUGGESTED[cue] for cue in ("instances", "pose", "parsing")]
    # Adapters that were trained with cues will want networks for them next.
    for model, missing in ((base, names[:1]), (["--mild", guided], names)):
        code, out, err = mild_anew("erase", gone, *model)
        said = f"error: without --mask, a network has to find the people: {missing_message(missing)}\n"
        assert (code, out, err) == (2, "", said)
    assert not pipeline.calls


@pytest.mark.slow
def test_drawn_people_are_found_by_a_network_and_erased_with_their_shadows(tmp_path: Path, mild_anew: Command) -> None:
    """From a picture alone, with the networks of the package and no stand-in, of a scene that they never saw."""
    scene = draw_scene("holiday/4", 2026, (320, 240), 2)
    file = save(scene.image, tmp_path / "one.png")
    finder = ["--instances", "drawn-people"]
    assert mild_anew("mask", file, *finder)[0] == 0
    code, out, _ = mild_anew("erase", file, *finder, "--steps", 1)
    assert (code, out) == (0, f"{tmp_path}/one-erased.png: 2 of 2 people erased, found by drawn-people\n")
    with Image.open(tmp_path / "one-mask.png") as mask, Image.open(tmp_path / "one-erased.png") as result:
        found = np.asarray(mask)
        differs = (np.asarray(result) != scene.image).any(axis=2)
    people = sorted((person.mask for person in scene.people), key=lambda mask: np.nonzero(mask)[1].mean())
    for number, person in enumerate(people, start=1):
        assert (person & (found == number)).sum() > 0.6 * (person | (found == number)).sum()
    assert differs[found > 0].mean() > 0.9
    dark = np.abs(scene.image.astype(int) - scene.background).max(axis=2) > 12
    shadows = dark & ~editable(np.stack([*people, found > 0]), range(3))
    assert differs[shadows].mean() > 0.6
