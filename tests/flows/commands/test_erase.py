"""``mild erase`` and ``mild recompose``: a person with photographs gets pictures, or one clear line."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from diffusers import StableDiffusionXLInpaintPipeline
from PIL import Image, ImageCms

from dataset_tools.folders import folder_written_whole
from dataset_tools.schema import encode_rle
from flows.commands import erase_photos
from mild.bases import NANO, NANO_ADAPTERS, place_of
from mild.erasing.layers import Layer, LayeredPicture
from mild.erasing.pipeline import MILDPipeline
from mild.erasing.regions import editable
from mild.model.layered import LayeredUNet
from mild.settings import LoraSettings, MildSettings

pytestmark = pytest.mark.slow

HEIGHT, WIDTH = 64, 96
LEFT, RIGHT = np.zeros((2, HEIGHT, WIDTH), bool)
LEFT[20:50, 14:30] = True
RIGHT[24:54, 60:76] = True
BOTH = np.stack([LEFT, RIGHT])

Command = Callable[..., tuple[int, str, str]]


def photo(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def save(array: np.ndarray, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.fixture(scope="module")
def base() -> str:
    return place_of(NANO)


@pytest.fixture(scope="module")
def parts(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A MILD folder as training leaves it: it names the base that it belongs to."""
    unet = StableDiffusionXLInpaintPipeline.from_pretrained(base).unet
    folder = tmp_path_factory.mktemp("mild") / "parts"
    # Without HMG, so that nobody looks for networks that find its cues.
    layered = LayeredUNet.create(unet, MildSettings(lora=LoraSettings(rank=2, alpha=2), hmg=None), seed=0)
    with folder_written_whole(folder, "mild.json") as place:
        layered.save(place, base=base, resolution=64, inference_steps=4, record={})
    return str(folder)


@pytest.fixture(scope="module")
def load_once() -> Callable[[erase_photos.EraseOptions], object]:
    """Loads a base and adapters where they are first asked for; the same pipeline is then given again."""
    load, loaded = erase_photos._load, {}

    def known(options: erase_photos.EraseOptions) -> object:
        names = options.base, options.mild
        if names not in loaded:
            loaded[names] = load(options)
        return loaded[names]

    return known


@pytest.fixture
def mild(mild_anew: Command, load_once: Callable[[erase_photos.EraseOptions], object]) -> Command:
    """The command in a world where the second loading takes no time."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(erase_photos, "_load", load_once)
            return mild_anew(*arguments)

    return run


@pytest.fixture
def erase(mild: Command, parts: str) -> Command:
    """``mild erase`` with few steps."""

    def run(*arguments: object) -> tuple[int, str, str]:
        return mild("erase", *arguments, "--mild", parts, "--steps", 1)

    return run


def assert_erased(result: Path, image: np.ndarray, people: np.ndarray) -> None:
    """Only what the masks allow has changed, and that has."""
    allowed = editable(people, range(len(people)))
    differs = (read(result) != image).any(axis=2)
    assert not (differs & ~allowed).any()
    assert all(differs[mask].any() for mask in people)


def write_people(folder: Path) -> list[object]:
    files = [save(mask, folder / f"{name}.png") for name, mask in (("ann", LEFT), ("bob", RIGHT))]
    return ["--mask", files[0], "--mask", files[1]]


def write_index(folder: Path) -> list[object]:
    return ["--mask", save((LEFT * 1 + RIGHT * 2).astype(np.uint8), folder / "people.png")]


def write_mirror(folder: Path) -> list[object]:
    save(LEFT, folder / "one_0.png")
    save(RIGHT, folder / "one_1.png")
    return ["--mask", folder]


def write_coco(folder: Path) -> list[object]:
    document = {
        "images": [
            {"id": 1, "file_name": "one.png", "height": HEIGHT, "width": WIDTH},
            {"id": 2, "file_name": "elsewhere.png", "height": 5, "width": 5},
        ],
        "annotations": [{"id": k, "image_id": 1, "segmentation": encode_rle(mask)} for k, mask in enumerate(BOTH)],
    }
    folder.mkdir()
    (folder / "people.json").write_text(json.dumps(document))
    return ["--mask", folder / "people.json"]


@pytest.mark.parametrize("write", [write_people, write_index, write_mirror, write_coco])
def test_every_way_of_giving_masks_erases_the_same_people(
    tmp_path: Path, erase: Command, write: Callable[[Path], list[object]]
) -> None:
    image = photo()
    file = save(image, tmp_path / "one.png")
    code, out, err = erase(file, *write(tmp_path / "masks"))
    result = tmp_path / "one-erased.png"
    assert (code, out.strip(), err) == (0, f"{result}: 2 of 2 people erased", "")
    assert_erased(result, image, BOTH)


def test_with_nothing_named_the_adapters_of_the_package_erase_and_say_what_they_know(
    tmp_path: Path, mild_anew: Command
) -> None:
    photograph = save(photo(), tmp_path / "one.png")
    common = ["erase", photograph, *write_people(tmp_path / "masks"), "--steps", 1, "-o"]
    code, _, err = mild_anew(*common, tmp_path / "default.png")
    assert (code, NANO_ADAPTERS in err, "drawn pictures only" in err) == (0, True, True)
    assert mild_anew(*common, tmp_path / "named.png", "--mild", NANO_ADAPTERS)[::2] == (0, "")
    assert mild_anew(*common, tmp_path / "base.png", "--base", NANO)[::2] == (0, "")
    assert np.array_equal(read(tmp_path / "default.png"), read(tmp_path / "named.png"))
    assert not np.array_equal(read(tmp_path / "default.png"), read(tmp_path / "base.png"))


def test_a_pipeline_that_has_erased_before_erases_like_one_just_loaded(
    tmp_path: Path, mild_anew: Command, erase: Command, parts: str
) -> None:
    """So that other tests may load once what they have in common."""
    common = [save(photo(), tmp_path / "one.png"), *write_people(tmp_path / "masks"), "-o"]
    for name in ("first", "again"):
        assert erase(*common, tmp_path / f"{name}.png")[::2] == (0, "")
    assert mild_anew("erase", *common, tmp_path / "anew.png", "--mild", parts, "--steps", 1)[::2] == (0, "")
    results = {(tmp_path / f"{name}.png").read_bytes() for name in ("first", "again", "anew")}
    assert len(results) == 1


def test_without_margin_nothing_beside_the_masks_changes_neither_when_put_together_again(
    tmp_path: Path, erase: Command, mild: Command
) -> None:
    image = photo()
    file, layers = save(image, tmp_path / "one.png"), tmp_path / "layers"
    assert erase(file, *write_people(tmp_path / "masks"), "--margin", 0, "--layers", layers)[0] == 0
    assert mild("recompose", layers, "--keep", "none", "-o", tmp_path / "none.png")[0] == 0
    for result in ("one-erased.png", "none.png"):
        differs = (read(tmp_path / result) != image).any(axis=2)
        assert differs[BOTH.any(0)].any() and not differs[~BOTH.any(0)].any()


def test_people_are_counted_from_1_and_the_others_stay(tmp_path: Path, erase: Command) -> None:
    image = photo()
    file = save(image, tmp_path / "one.png")
    code, out, _ = erase(file, *write_people(tmp_path / "masks"), "--remove", "2", "-o", tmp_path / "out/result.tif")
    assert (code, "1 of 2 people erased" in out) == (0, True)
    assert_erased(tmp_path / "out/result.tif", image, RIGHT[None])


def test_the_same_seed_gives_the_same_bytes_alone_or_among_others(tmp_path: Path, erase: Command) -> None:
    for number, name in enumerate(("one", "two")):
        save(photo(number), tmp_path / f"photos/{name}.png")
        save(LEFT, tmp_path / f"masks/{name}.png")
    masks = ["--mask", tmp_path / "masks"]
    assert erase(tmp_path / "photos", *masks, "-o", tmp_path / "all", "--seed", 7)[0] == 0
    assert erase(tmp_path / "photos/two.png", *masks, "-o", tmp_path / "seven.png", "--seed", 7)[0] == 0
    assert erase(tmp_path / "photos/two.png", *masks, "-o", tmp_path / "eight.png", "--seed", 8)[0] == 0
    among = (tmp_path / "all/two-erased.png").read_bytes()
    assert among == (tmp_path / "seven.png").read_bytes() != (tmp_path / "eight.png").read_bytes()


def test_layers_can_be_put_together_again_with_anybody(tmp_path: Path, erase: Command, mild: Command) -> None:
    image = photo()
    file, layers = save(image, tmp_path / "one.png"), tmp_path / "layers"
    assert erase(file, *write_people(tmp_path / "masks"), "--layers", layers, "--remove", "1")[0] == 0
    assert_erased(tmp_path / "one-erased.png", image, LEFT[None])
    for keep, people in (("1", RIGHT[None]), ("none", BOTH)):
        code, out, _ = mild("recompose", layers, "--keep", keep, "-o", tmp_path / f"{keep}.png")
        assert (code, out.strip()) == (0, str(tmp_path / f"{keep}.png"))
        assert_erased(tmp_path / f"{keep}.png", image, people)
    assert mild("recompose", layers, "--keep", "2, 1", "-o", tmp_path / "all.png")[0] == 0
    assert np.array_equal(read(tmp_path / "all.png"), image)
    assert np.array_equal(read(tmp_path / "none.png"), LayeredPicture.load(layers).recompose([]))


def test_no_result_may_lie_among_layers(tmp_path: Path, erase: Command, mild: Command) -> None:
    file, layers = save(photo(), tmp_path / "one.png"), tmp_path / "layers"
    masks = write_people(tmp_path / "masks")
    for name in ("original.png", "mine.png"):
        code, _, err = erase(file, *masks, "-o", layers / name, "--layers", layers)
        assert code == 2 and "would lie in the folder of layers" in err
    assert erase(file, *masks, "--layers", layers)[0] == 0
    code, _, err = mild("recompose", layers, "--keep", "none", "-o", layers / "original.png", "--force")
    assert code == 2 and "would lie in the folder of layers" in err
    assert np.array_equal(read(layers / "original.png"), photo())


def test_a_folder_keeps_its_subfolders_and_each_photo_has_its_layers(tmp_path: Path, erase: Command) -> None:
    for number, name in enumerate(("a/one", "b/one")):
        save(photo(number), tmp_path / f"photos/{name}.png")
        save(BOTH[number], tmp_path / f"masks/{name}.png")
    code, _, err = erase(
        tmp_path / "photos", "--mask", tmp_path / "masks", "-o", tmp_path / "out", "--layers", tmp_path / "layers"
    )
    assert (code, err) == (0, "")
    for number, name in enumerate(("a/one", "b/one")):
        assert_erased(tmp_path / f"out/{name}-erased.png", photo(number), BOTH[number][None])
        assert np.array_equal(LayeredPicture.load(tmp_path / "layers" / name).original, photo(number))


def test_a_glob_that_no_shell_expanded_finds_photos_and_their_masks(
    tmp_path: Path, erase: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a/one.png", "b/two.png", "b/[x].png")):
        save(photo(number), tmp_path / "photos" / name)
        save(LEFT, tmp_path / "masks" / name)
    (tmp_path / "photos/notes.txt").write_text("no photo")
    assert erase("photos/**/*o*", "--mask", "masks", "-o", "out")[0] == 0
    assert [path.relative_to("out").as_posix() for path in sorted(Path("out").rglob("*.png"))] == [
        "a/one-erased.png",
        "b/two-erased.png",
    ]
    save(LEFT, tmp_path / "masks/[x].png")
    assert erase("photos/b/[x].png", "--mask", "masks")[0] == 0, "a file that exists is no pattern"
    assert_erased(Path("photos/b/[x]-erased.png"), photo(2), LEFT[None])


def test_rows_of_a_coco_json_that_cannot_be_used_are_named(tmp_path: Path, erase: Command) -> None:
    """Other photographs that the json speaks of are not."""
    file, (_, masks) = save(photo(), tmp_path / "one.png"), write_coco(tmp_path / "masks")
    document = json.loads(Path(str(masks)).read_text())
    document["annotations"].insert(0, {"id": 9, "image_id": 1, "segmentation": [[1, 2, 3]]})
    Path(str(masks)).write_text(json.dumps(document))
    code, out, err = erase(file, "--mask", masks)
    assert (code, "2 of 2 people" in out) == (0, True)
    assert err.startswith(f"{masks}: annotations[0]: ") and len(err.splitlines()) == 1


def test_one_bad_photo_or_mask_is_set_aside_and_the_others_are_done(tmp_path: Path, erase: Command) -> None:
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    for number, name in enumerate(("good", "bare", "small", "void", "cut", "better")):
        save(photo(number), photos / f"{name}.png")
        save(LEFT, masks / f"{name}_0.png")
    (masks / "bare_0.png").unlink()
    save(LEFT[:40], masks / "small_0.png")
    save(LEFT & False, masks / "void_0.png")
    (masks / "cut_0.png").write_bytes((masks / "good_0.png").read_bytes()[:60])
    (photos / "text.jpg").write_text("<html>")
    code, out, err = erase(photos, tmp_path / "gone.png", "--mask", masks, "-o", tmp_path / "out")
    assert code == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["better-erased.png", "good-erased.png"]
    assert out.count("1 of 1 people erased") == 2
    lines = err.strip().splitlines()
    assert lines.pop() == "6 of 8 photographs were set aside"
    for name, reason in {
        "gone.png": "there is no such file",
        "bare.png": "looked for bare.png, bare_0.png",
        "cut.png": "mask cut_0.png: the PNG file ends early",
        "small.png": "mask small_0.png is 96x40 pixels, the photo 96x64",
        "text.jpg": "not a JPEG",
        "void.png": "mask void_0.png is empty",
    }.items():
        (line,) = (line for line in lines if f"/{name}: " in line)
        assert reason in line


def test_what_an_earlier_run_left_is_no_photo(tmp_path: Path, erase: Command) -> None:
    """A second run over a folder works on the same photographs, wherever masks and results lie below it."""
    save(photo(), tmp_path / "one.png")
    save(LEFT, tmp_path / "masks/one.png")
    options = ["--mask", tmp_path / "masks", "--layers", tmp_path / "layers"]
    to = ["-o", tmp_path / "results"]
    for number, output in enumerate(([], [], to, to)):
        code, _, err = erase(tmp_path, *options, *output, "--force")
        assert (code, "1 passed over as results of an earlier run: " in err) == (0, number > 0)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*-erased*"))
    assert names == ["one-erased.png", "results/one-erased.png"]


def test_layers_beside_photographs_are_no_photographs_when_the_command_goes_on(tmp_path: Path, erase: Command) -> None:
    save(photo(), tmp_path / "p/one.png")
    save(LEFT, tmp_path / "masks/one.png")
    for number in range(2):
        code, out, err = erase(tmp_path / "p", "--mask", tmp_path / "masks", "--layers", tmp_path / "p", "--force")
        assert (code, out.count("people erased")) == (0, 1), (number, err)


def test_two_photographs_whose_layers_would_lie_in_one_place_are_refused(tmp_path: Path, erase: Command) -> None:
    for name in ("x/a.jpg", "y/a.png"):
        save(photo(), tmp_path / name)
    (tmp_path / "masks.json").write_text(
        json.dumps(
            {
                "images": [
                    {"id": k, "file_name": name, "height": HEIGHT, "width": WIDTH}
                    for k, name in enumerate(("a.jpg", "a.png"))
                ],
                "annotations": [
                    {"id": k, "image_id": k, "segmentation": [[5, 5, 30, 5, 30, 40, 5, 40]]} for k in range(2)
                ],
            }
        )
    )
    to = ["--layers", tmp_path / "layers", "--force"]
    code, _, err = erase(tmp_path / "x/a.jpg", tmp_path / "y", "--mask", tmp_path / "masks.json", *to)
    assert code == 2 and "would both have their layers in" in err


@pytest.mark.parametrize("resolution", ["100000", "1000000000000"])
def test_a_resolution_that_no_network_goes_through_is_refused(tmp_path: Path, erase: Command, resolution: str) -> None:
    save(photo(), tmp_path / "one.png")
    save(LEFT, tmp_path / "mask.png")
    code, _, err = erase(tmp_path / "one.png", "--mask", tmp_path / "mask.png", "--resolution", resolution)
    assert code == 2 and f"--resolution {resolution}" in err and not (tmp_path / "one-erased.png").exists()


def test_photographs_that_are_named_are_worked_on_whatever_they_are_called(tmp_path: Path, erase: Command) -> None:
    for name in ("party.png", "party-people.png", "party-people.jpg"):
        save(photo(), tmp_path / name)
        save(LEFT, tmp_path / f"masks/{Path(name).stem}.png")
    files = [tmp_path / "party.png", tmp_path / "party-people.jpg"]
    code, out, err = erase(*files, "--mask", tmp_path / "masks", "-o", tmp_path / "out")
    assert (code, err, out.count("people erased")) == (0, "", 2)


def test_photographs_of_kinds_that_are_not_read_are_told_of(tmp_path: Path, erase: Command) -> None:
    save(photo(), tmp_path / "photos/one.png")
    (tmp_path / "photos/IMG_7.HEIC").write_bytes(b"x")
    save(LEFT, tmp_path / "masks/one.png")
    code, _, err = erase(tmp_path / "photos", "--mask", tmp_path / "masks")
    assert code == 0 and "1 passed over as of kinds that are not read" in err and "IMG_7.HEIC" in err


def test_masks_and_results_alone_are_nothing_to_work_on(tmp_path: Path, erase: Command) -> None:
    save(LEFT, tmp_path / "photos/masks/one.png")
    code, _, err = erase(f"{tmp_path}/photos/**/*.png", "--mask", tmp_path / "photos/masks", "-o", tmp_path / "out")
    assert code == 2 and "there are only masks and results, and no photograph" in err


def test_a_mask_of_several_pages_is_refused_rather_than_read_in_part(tmp_path: Path, erase: Command) -> None:
    first, second = (Image.fromarray(mask) for mask in (LEFT, RIGHT))
    first.save(tmp_path / "mask.tif", save_all=True, append_images=[second])
    code, _, err = erase(save(photo(), tmp_path / "one.png"), "--mask", tmp_path / "mask.tif")
    assert code == 2 and "holds several pages or frames: save one file a person" in err


def test_masks_in_a_folder_are_counted_as_file_managers_list_them(tmp_path: Path, erase: Command) -> None:
    save(photo(), tmp_path / "one.png")
    for name, mask in (("anna", LEFT), ("bo", RIGHT)):
        save(mask, tmp_path / f"masks/one/{name}.png")
    assert erase(tmp_path / "one.png", "--mask", tmp_path / "masks", "--remove", "1")[0] == 0
    assert_erased(tmp_path / "one-erased.png", photo(), LEFT[None])


def test_no_memory_left_sets_a_photograph_aside(
    tmp_path: Path, erase: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch has no kind of error of its own for the memory of a CPU."""
    for name in ("one", "two"):
        save(photo(), tmp_path / f"{name}.png")
        save(LEFT, tmp_path / f"masks/{name}.png")

    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(MILDPipeline, "__call__", full)
    code, _, err = erase(tmp_path / "one.png", tmp_path / "two.png", "--mask", tmp_path / "masks")
    assert code == 1 and err.count("memory does not suffice") == 2 and "2 of 2 photographs were set aside" in err


def test_nothing_is_overwritten_without_force(tmp_path: Path, erase: Command, mild: Command) -> None:
    """That is found out before a model is loaded: this base does not exist."""
    file, masks = save(photo(), tmp_path / "one.png"), write_people(tmp_path / "masks")
    result = tmp_path / "one-erased.png"
    result.write_bytes(b"precious")
    code, _, err = mild("erase", file, *masks, "--base", tmp_path / "nowhere")
    assert (code, err) == (2, f"error: {result} exists already; --force overwrites it\n")
    assert result.read_bytes() == b"precious"
    assert erase(file, *masks, "--force", "--layers", tmp_path / "layers")[0] == 0
    assert_erased(result, photo(), BOTH)
    result.unlink()
    code, _, err = mild("erase", file, *masks, "--layers", tmp_path / "layers")
    assert code == 2 and "layers.json exists already; --force overwrites it" in err
    before = file.read_bytes()
    code, _, err = mild("recompose", tmp_path / "layers", "--keep", "1", "-o", file)
    assert code == 2 and f"{file} exists already" in err and file.read_bytes() == before


def test_force_does_not_replace_a_folder_that_holds_no_layers(tmp_path: Path, mild: Command) -> None:
    file, masks = save(photo(), tmp_path / "one.png"), write_people(tmp_path / "masks")
    code, _, err = mild("erase", file, *masks, "--layers", tmp_path / "masks", "--force")
    assert code == 2 and "masks holds something else than layers" in err
    assert len(list((tmp_path / "masks").iterdir())) == 2


def test_force_replaces_no_layers_among_which_somebody_keeps_a_file(tmp_path: Path, erase: Command) -> None:
    file, masks = save(photo(), tmp_path / "one.png"), write_people(tmp_path / "masks")
    layers = ["--layers", tmp_path / "layers", "--force"]
    assert [erase(file, *masks, *layers)[0] for _ in range(2)] == [0, 0]
    (tmp_path / "layers/notes.txt").write_text("mine")
    code, _, err = erase(file, *masks, *layers)
    assert code == 2 and "layers holds something else than layers, notes.txt" in err
    assert (tmp_path / "layers/notes.txt").read_text() == "mine"
    # Nor pictures that are only called like those of layers: said before anything is painted.
    save(photo(), tmp_path / "own/background.png")
    code, _, err = erase(file, *masks, "--layers", tmp_path / "own", "--force")
    assert code == 2 and "--layers" in err and "holds something else than layers, layers.json is missing" in err


@pytest.mark.parametrize("stored_like_the_photo", [True, False])
def test_a_turned_photo_is_saved_upright(tmp_path: Path, erase: Command, stored_like_the_photo: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 90 degrees clockwise bring it upright
    stored, mask = photo(), LEFT
    file = save(stored, tmp_path / "one.png", exif=exif)
    mask = save(mask if stored_like_the_photo else np.rot90(mask, -1), tmp_path / "mask.png")
    assert erase(file, "--mask", mask)[0] == 0
    assert_erased(tmp_path / "one-erased.png", np.ascontiguousarray(np.rot90(stored, -1)), np.rot90(LEFT, -1)[None])


def test_the_colour_profile_stays_with_the_colours(tmp_path: Path, erase: Command) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    file = save(photo(), tmp_path / "one.png", icc_profile=profile)
    grey = save(photo()[..., 0], tmp_path / "grey.png", icc_profile=profile[:16] + b"GRAY" + profile[20:])
    mask = save(LEFT, tmp_path / "mask.png")
    for photograph, expected in ((file, profile), (grey, None)):
        for suffix in ("png", "jpg"):
            result = tmp_path / f"{photograph.stem}-result.{suffix}"
            assert erase(photograph, "--mask", mask, "-o", result)[0] == 0
            with Image.open(result) as picture:
                assert picture.info.get("icc_profile") == expected
                assert picture.mode == "RGB"


@pytest.mark.parametrize("name", ["p3", "adobe"])
def test_a_wide_colour_space_is_kept_in_whatever_is_saved(
    tmp_path: Path, erase: Command, mild: Command, icc_profiles: dict[str, bytes], name: str
) -> None:
    """Pixels outside the hole are the stored ones, and still mean the same: in results, layers and recomposed."""
    image, profile = photo(), icc_profiles[name]
    file, layers = save(image, tmp_path / "one.png", icc_profile=profile), tmp_path / "layers"
    for result in ("out.tif", "out.webp", "out.png"):
        code, _, err = erase(file, *write_index(tmp_path), "-o", tmp_path / result, "--layers", layers, "--force")
        assert (code, err) == (0, "")
        assert_erased(tmp_path / result, image, BOTH)
    assert mild("recompose", layers, "--keep", "none", "-o", tmp_path / "none.tif")[::2] == (0, "")
    assert_erased(tmp_path / "none.tif", image, BOTH)
    colours = [layers / f"{part}.png" for part in ("original", "background", "layer-01", "layer-02")]
    for path in [*(tmp_path / f"out.{suffix}" for suffix in ("png", "tif", "webp")), tmp_path / "none.tif", *colours]:
        with Image.open(path) as picture:
            assert picture.info["icc_profile"] == profile, path
    with Image.open(layers / "painted.png") as picture:
        assert "icc_profile" not in picture.info, "a mask has no colours"


def test_formats_without_profiles_get_srgb_and_that_is_told(
    tmp_path: Path, erase: Command, mild: Command, icc_profiles: dict[str, bytes]
) -> None:
    file = save(photo(), tmp_path / "one.png", icc_profile=icc_profiles["adobe"])
    mask, layers = ["--mask", save(LEFT, tmp_path / "mask.png")], tmp_path / "layers"
    code, _, err = erase(file, *mask, "-o", tmp_path / "one.bmp", "--layers", layers)
    assert code == 0 and "one.bmp: BMP holds no ICC profile; all colours were converted to sRGB from Adobe RGB" in err
    code, _, err = mild("recompose", layers, "--keep", "1", "-o", tmp_path / "all.bmp")
    assert code == 0 and "all.bmp: BMP holds no ICC profile" in err
    shown = ImageCms.profileToProfile(
        Image.open(file), io.BytesIO(icc_profiles["adobe"]), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert np.array_equal(read(tmp_path / "all.bmp"), np.asarray(shown))


@pytest.mark.parametrize(
    ("mode", "profile", "suffix"), [("CMYK", "cmyk", "tif"), ("CMYK", "cmyk", "jpg"), ("L", "grey", "png")]
)
def test_inks_and_grey_look_as_in_a_viewer_that_knows_their_profile(
    tmp_path: Path, erase: Command, mild: Command, icc_profiles: dict[str, bytes], mode: str, profile: str, suffix: str
) -> None:
    stored = Image.fromarray(photo()).convert(mode)
    stored.save(tmp_path / f"one.{suffix}", icc_profile=icc_profiles[profile])
    with Image.open(tmp_path / f"one.{suffix}") as picture:
        truth = np.asarray(
            ImageCms.profileToProfile(
                picture, io.BytesIO(icc_profiles[profile]), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        )
    code, _, err = erase(
        tmp_path / f"one.{suffix}", *write_index(tmp_path), "-o", tmp_path / "out.png", "--layers", tmp_path / "layers"
    )
    assert code == 0 and "its colours were converted to sRGB from" in err
    assert_erased(tmp_path / "out.png", truth, BOTH)
    assert mild("recompose", tmp_path / "layers", "--keep", "1,2", "-o", tmp_path / "all.png")[0] == 0
    assert np.array_equal(read(tmp_path / "all.png"), truth)
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.info.get("icc_profile") is None


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_who_took_a_photo_and_its_resolution_are_kept_and_where_it_was_is_not(
    tmp_path: Path, erase: Command, mild: Command, suffix: str
) -> None:
    """The photograph stands on its side: its result is upright, and says so."""
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: "Cam", 0x8298: "Zoë © 2020".encode(), 0x010E: "At the sea"})
    exif.get_ifd(0x8769).update({0x9003: "2020:01:02 03:04:05", 0x829D: 2.8, 0x927C: b"maker" * 9, 0xA431: "SN-1"})
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 8.0, 14.0)})
    file = save(photo(), tmp_path / "one.jpg", exif=exif, dpi=(300, 200), comment=b"from home")
    mask = save(np.rot90(LEFT, -1), tmp_path / "mask.png")
    result, again = tmp_path / f"out.{suffix}", tmp_path / f"again.{suffix}"
    code, _, err = erase(file, "--mask", mask, "-o", result, "--layers", tmp_path / "layers")
    said = "not taken over from its metadata: comments, the position (GPS), serial numbers, maker notes"
    assert (code, err) == (0, f"{file}: {said}\n")
    assert mild("recompose", tmp_path / "layers", "--keep", "none", "-o", again)[::2] == (0, "")
    for path in (result, again):
        assert b"SN-1" not in path.read_bytes() and b"makermaker" not in path.read_bytes()
        with Image.open(path) as picture:
            tags = picture.getexif()
            taken = dict(tags.get_ifd(0x8769))
            assert picture.size == (HEIGHT, WIDTH)
            assert (tags[0x010F], tags[0x010E], tags[0x0112]) == ("Cam", "At the sea", 1)
            assert tags[0x8298].encode("latin-1").decode() == "Zoë © 2020"
            assert (taken[0x9003], float(taken[0x829D])) == ("2020:01:02 03:04:05", 2.8)
            assert not tags.get_ifd(0x8825) and not {0x927C, 0xA431} & set(taken)
            dpi = (tags[0x011A], tags[0x011B]) if suffix == "webp" else picture.info["dpi"]
            assert [round(float(value)) for value in dpi] == [200, 300]
    with Image.open(tmp_path / "layers/layer-01.png") as picture:
        assert [round(value) for value in picture.info["dpi"]] == [200, 300]


def test_an_owner_of_16_bits_hears_that_8_are_left(tmp_path: Path, erase: Command) -> None:
    """Pillow reads colour of 16 bits as if it had 8, without a word."""
    import cv2

    mask = save(LEFT, tmp_path / "mask.png")
    for name in ("deep.tif", "deep.png"):
        cv2.imwrite(str(tmp_path / name), photo().astype(np.uint16) * 257)
        code, _, err = erase(tmp_path / name, "--mask", mask, "-o", tmp_path / "out.tif", "--force")
        assert code == 0 and f"{name}: 16 bits a channel were reduced to 8" in err


def test_names_may_be_any_that_the_disk_holds(tmp_path: Path, erase: Command) -> None:
    """With bytes that are no text, with colons, as long as its result's name may be; a longer one is one line."""
    odd = [os.fsdecode(b"caf\xe9.png"), "a:b::c.png", "[x] #1 %41.png", "x" * 240 + ".png"]
    mask = save(LEFT, tmp_path / "mask.png")
    for name in odd:
        code, out, err = erase(save(photo(), tmp_path / name), "--mask", mask)
        assert (code, "1 of 1 people erased" in out, err) == (0, True, ""), name
        assert_erased(tmp_path / f"{Path(name).stem}-erased.png", photo(), LEFT[None])
    long = save(photo(), tmp_path / ("y" * 246 + ".png"))
    code, out, err = erase(long, "--mask", mask)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and "does not hold names that long" in err
    assert erase(long, "--mask", mask, "-o", tmp_path / "short.png")[0] == 0


def test_among_several_a_name_too_long_is_set_aside_and_layers_may_be_long(tmp_path: Path, erase: Command) -> None:
    for name in ("short", "x" * 244, "y" * 246):
        save(photo(), tmp_path / f"photos/{name}.png")
        save(LEFT, tmp_path / f"masks/{name}.png")
    options = ["--mask", tmp_path / "masks", "-o", tmp_path / "out", "--layers", tmp_path / "layers"]
    code, out, err = erase(tmp_path / "photos", *options)
    assert (code, out.count("1 of 1 people erased"), err.count("does not hold names that long")) == (1, 2, 1)
    assert np.array_equal(LayeredPicture.load(tmp_path / "layers" / ("x" * 244)).original, photo())


def test_links_stay_links_and_what_they_lead_to_is_filled(tmp_path: Path, erase: Command) -> None:
    """As results lie on another disk: also of what is overwritten."""
    disk = tmp_path / "disk"
    (disk / "layers").mkdir(parents=True)
    (tmp_path / "layers").symlink_to(disk / "layers")
    (tmp_path / "out.png").symlink_to(disk / "result.png")
    file, mask = save(photo(), tmp_path / "one.png"), save(LEFT, tmp_path / "mask.png")
    for force in ([], ["--force"]):
        options = ["-o", tmp_path / "out.png", "--layers", tmp_path / "layers", *force]
        assert erase(file, "--mask", mask, *options)[::2] == (0, "")
        assert (tmp_path / "layers").is_symlink() and (tmp_path / "out.png").is_symlink()
        assert_erased(disk / "result.png", photo(), LEFT[None])
        assert np.array_equal(LayeredPicture.load(disk / "layers").original, photo())
        assert sorted(path.name for path in disk.iterdir()) == ["layers", "result.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "layers", "mask.png", "one.png", "out.png"]


def test_linked_folders_are_gone_into_by_folder_and_glob_alike_and_not_in_circles(
    tmp_path: Path, erase: Command
) -> None:
    for number, name in enumerate(("photos/one", "elsewhere/two")):
        save(photo(number), tmp_path / f"{name}.png")
    (tmp_path / "photos/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/self").symlink_to(tmp_path / "photos")
    for name in ("one", "more/two"):
        save(LEFT, tmp_path / f"masks/{name}.png")
    for number, given in enumerate((tmp_path / "photos", tmp_path / "photos/**/*.png")):
        code, out, err = erase(given, "--mask", tmp_path / "masks", "-o", tmp_path / f"out{number}")
        assert (code, err, out.count("erased")) == (0, "", 2 * 2)
        assert_erased(tmp_path / f"out{number}/more/two-erased.png", photo(1), LEFT[None])


def test_no_room_for_layers_is_one_line_and_leaves_nothing(tmp_path: Path, erase: Command) -> None:
    """The result (of few colours) has room, its layers do not; what stood there stays."""
    file, mask = save(photo(), tmp_path / "one.png"), save(LEFT, tmp_path / "mask.png")
    options = [file, "--mask", mask, "-o", tmp_path / "out.gif", "--layers", tmp_path / "layers"]
    assert erase(*options)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
    try:
        code, out, err = erase(*options, "--force", "--seed", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"{tmp_path}/layers cannot be written: File too large" in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.fixture
def batch(tmp_path: Path) -> list[object]:
    """Three photographs, their masks and where results go."""
    for number, name in enumerate(("a", "b", "c")):
        save(photo(number), tmp_path / f"photos/{name}.png")
        save(LEFT, tmp_path / f"masks/{name}.png")
    return [tmp_path / "photos", "--mask", tmp_path / "masks", "-o", tmp_path / "out"]


def at_second_file(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Something happens while the second result stands under its temporary name."""
    flushed, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(descriptor)
        if len(flushed) == 2:
            happens()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_stopped_batch_says_how_far_it_came_and_goes_on_where_it_was(
    tmp_path: Path, erase: Command, batch: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a result is written: it is not there, not even in part."""
    with monkeypatch.context() as patch:
        at_second_file(patch, lambda: signal.raise_signal(signal.SIGINT))
        code, out, err = erase(*batch)
    assert (code, out.count("erased\n")) == (130, 1)
    assert err == "stopped: 1 of 3 photographs are done; the same command goes on with the others\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a-erased.png"]
    first = (tmp_path / "out/a-erased.png").stat()
    code, out, err = erase(*batch)
    assert (code, out.count("erased\n")) == (0, 2)
    assert err == "1 of 3 photographs have their results already; --force makes them anew\n"
    assert (tmp_path / "out/a-erased.png").stat() == first
    for number, name in enumerate(("a", "b", "c")):
        assert_erased(tmp_path / f"out/{name}-erased.png", photo(number), LEFT[None])
    assert erase(*batch)[::2] == (0, "3 of 3 photographs have their results already; --force makes them anew\n")


def test_a_photo_with_a_part_of_its_results_is_set_aside(tmp_path: Path, erase: Command, batch: list[object]) -> None:
    """Layers that somebody may have worked on are not overwritten."""
    assert erase(*batch, "--layers", tmp_path / "layers")[0] == 0
    (tmp_path / "out/b-erased.png").unlink()
    code, out, err = erase(*batch, "--layers", tmp_path / "layers")
    assert (code, out) == (1, "")
    assert f"b.png: {tmp_path}/layers/b/layers.json exists already; --force overwrites it\n" in err


def test_a_full_disk_ends_a_batch_in_one_line(
    tmp_path: Path, erase: Command, batch: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_second_file(monkeypatch, full)
    code, out, err = erase(*batch)
    assert (code, out.count("erased\n"), len(err.splitlines())) == (2, 1, 1)
    assert "b-erased.png cannot be written: No space left on device: 1 of 3 photographs are done" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a-erased.png"]


def test_a_batch_that_broke_off_before_a_result_had_its_room_goes_on(
    tmp_path: Path, erase: Command, batch: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers are not there either: what is there alone would be somebody's."""
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name.startswith(".b-erased"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, data)

    given = [*batch, "--layers", tmp_path / "layers"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert erase(*given)[0] == 2
    assert [path.name for path in (tmp_path / "layers").iterdir()] == ["a"]
    code, out, _ = erase(*given)
    assert (code, out.count("erased\n")) == (0, 2)


def test_layers_of_one_photo_never_lie_in_those_of_another(tmp_path: Path, mild: Command) -> None:
    """Saving replaces a folder of layers as a whole."""
    for name in ("a", "a/one"):
        save(photo(), tmp_path / f"photos/{name}.png")
        save(LEFT, tmp_path / f"masks/{name}.png")
    options = ["--mask", tmp_path / "masks", "-o", tmp_path / "out", "--layers", tmp_path / "layers"]
    code, _, err = mild("erase", tmp_path / "photos", *options)
    assert code == 2 and "would lie in those of" in err


def test_pillows_own_limit_of_size_does_not_hold_for_photos_and_layers(
    tmp_path: Path, erase: Command, mild: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is set low here; as it stands, it refuses a photograph of 200 megapixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 3)
    mask = save(LEFT, tmp_path / "mask.png")
    for suffix in ("png", "tif", "webp"):
        file = save(photo(), tmp_path / f"one.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
        code, _, err = erase(file, "--mask", mask, "--layers", tmp_path / "layers", "--force")
        assert (code, err) == (0, "")
    assert mild("recompose", tmp_path / "layers", "--keep", "none", "-o", tmp_path / "none.png")[::2] == (0, "")


def test_a_result_longer_than_its_format_holds_is_refused_before_it_is_painted(tmp_path: Path, mild: Command) -> None:
    mask = np.zeros((2, 17000), bool)
    mask[0, 50:90] = True
    file = save(np.zeros((2, 17000, 3), np.uint8), tmp_path / "one.png")
    options = ["--mask", save(mask, tmp_path / "mask.png"), "-o", tmp_path / "out.webp", "--base", tmp_path / "nowhere"]
    code, _, err = mild("erase", file, *options)
    assert code == 2 and "WEBP holds 16383 pixels a side" in err


def test_those_who_stay_can_be_protected_whole_or_their_faces_alone(tmp_path: Path, erase: Command) -> None:
    """The one who goes stands in front: what the masks share stays, or nobody can tell where faces are."""
    front = LEFT | np.roll(LEFT, 8, axis=1)
    file, mask = save(photo(), tmp_path / "one.png"), save(LEFT, tmp_path / "behind.png")
    options = [file, "--mask", mask, "--mask", save(front, tmp_path / "front.png"), "--remove", 2]
    assert erase(*options, "--protect", "people")[0] == 0
    result = read(tmp_path / "one-erased.png")
    assert np.array_equal(result[LEFT], photo()[LEFT]) and (result[front & ~LEFT] != photo()[front & ~LEFT]).any()
    code, _, err = erase(*options, "--protect", "faces", "--force")
    assert code == 2 and "--protect faces: a network has to find them" in err
    code, _, err = erase(*options, "--protect", "bodies", "--force")
    assert code == 2 and "--protect bodies: give faces or people" in err


def test_the_garbage_collector_rests_while_all_is_imported_and_loaded(
    tmp_path: Path, mild_anew: Command, parts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go through all modules and weights a hundred times, and find nothing."""
    from mild.erasing.pipeline import MILDPipeline

    worked, real = [], MILDPipeline.from_pretrained

    def load(*arguments: object, **options: object) -> MILDPipeline:
        worked.append(gc.isenabled())
        return real(*arguments, **options)

    monkeypatch.setattr(MILDPipeline, "from_pretrained", load)
    file, mask = save(photo(), tmp_path / "one.png"), save(LEFT, tmp_path / "mask.png")
    assert mild_anew("erase", file, "--mask", mask, "--mild", parts, "--steps", 1)[0] == 0
    assert (worked, gc.isenabled()) == ([False], True)


def test_unusual_photos_are_used_and_their_owner_is_told(tmp_path: Path, erase: Command) -> None:
    mask = save(LEFT, tmp_path / "mask.png")
    rgba = np.dstack([photo(), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    rgba[:8, :8, 3] = 0
    save(rgba, tmp_path / "alpha.png")
    code, _, err = erase(tmp_path / "alpha.png", "--mask", mask)
    assert code == 0 and err == f"{tmp_path}/alpha.png: transparency was composited on white\n"
    white = photo()
    white[:8, :8] = 255
    assert_erased(tmp_path / "alpha-erased.png", white, LEFT[None])
    Image.fromarray(photo()).convert("CMYK").save(tmp_path / "print.jpg")
    code, _, err = erase(tmp_path / "print.jpg", "--mask", mask)
    assert code == 0 and "CMYK was converted to RGB" in err


def test_a_mask_with_soft_edges_is_one_person(tmp_path: Path, erase: Command) -> None:
    soft = LEFT * np.uint8(255)
    soft[19, 14:30], soft[50, 14:30] = 64, 128
    file, mask = save(photo(), tmp_path / "one.png"), save(soft, tmp_path / "mask.png")
    code, out, _ = erase(file, "--mask", mask)
    assert code == 0 and "1 of 1 people erased" in out
    assert_erased(tmp_path / "one-erased.png", photo(), (soft > 0)[None])


SOFT = cv2.GaussianBlur(LEFT * np.uint8(255), (0, 0), 1)
BODY = cv2.erode(LEFT.view(np.uint8), np.ones((3, 3))).view(bool)


@pytest.mark.parametrize("road", ["file", "folder", "numbered"])
@pytest.mark.parametrize(
    ("pixels", "suffix"),
    [
        (SOFT, "png"),
        (SOFT, "jpg"),
        (np.dstack([SOFT] * 3), "png"),
        (np.dstack([photo(), SOFT]), "png"),
        (SOFT.astype(np.uint16) * 257, "png"),
        (Image.fromarray(LEFT).convert("RGB").quantize(2), "png"),
    ],
    ids=["blurred", "JPEG", "RGB", "alpha", "16 bit", "palette"],
)
def test_a_mask_of_one_person_is_one_person_on_every_road(
    tmp_path: Path, erase: Command, road: str, pixels: np.ndarray | Image.Image, suffix: str
) -> None:
    """The whole body changes, and nothing beyond what the hard mask allows."""
    file = save(photo(), tmp_path / "one.png")
    mask = tmp_path / f"masks/one{'_0' if road == 'numbered' else ''}.{suffix}"
    mask.parent.mkdir()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(mask)
    code, out, err = erase(file, "--mask", mask if road == "file" else mask.parent)
    assert (code, err) == (0, "") and "1 of 1 people erased" in out
    differs = (read(tmp_path / "one-erased.png") != photo()).any(axis=2)
    assert differs[BODY].mean() > 0.99 and not differs[RIGHT].any()


@pytest.mark.parametrize("road", ["file", "folder", "numbered"])
@pytest.mark.parametrize(("left", "right"), [(85, 255), (1, 255), (128, 64), ((255, 0, 0), (0, 0, 255))])
def test_people_are_numbered_alike_on_every_road(
    tmp_path: Path, erase: Command, road: str, left: object, right: object
) -> None:
    """By brightness, or by colour as a number; 255 is somebody like any other value."""
    file = save(photo(), tmp_path / "one.png")
    pixels = np.zeros((HEIGHT, WIDTH, 3) if isinstance(left, tuple) else (HEIGHT, WIDTH), np.uint8)
    pixels[LEFT], pixels[RIGHT] = left, right
    mask = save(pixels, tmp_path / f"masks/one{'_0' if road == 'numbered' else ''}.png")
    code, out, _ = erase(file, "--mask", mask if road == "file" else mask.parent, "--remove", 1)
    assert code == 0 and "1 of 2 people erased" in out
    assert_erased(tmp_path / "one-erased.png", photo(), (LEFT if left < right else RIGHT)[None])  # type: ignore[operator]


def test_several_values_in_one_of_several_files_are_one_person_and_that_is_said(tmp_path: Path, erase: Command) -> None:
    file = save(photo(), tmp_path / "one.png")
    both = save((LEFT * 85 + RIGHT * 255).astype(np.uint8), tmp_path / "both.png")
    other = save(np.roll(LEFT, 30, 1), tmp_path / "other.png")
    code, _, err = erase(file, "--mask", both, "--mask", other, "--remove", 1)
    assert code == 0 and "both.png: its 2 values are taken together" in err
    assert_erased(tmp_path / "one-erased.png", photo(), BOTH)


def test_people_of_a_json_keep_their_numbers_when_one_cannot_be_used(tmp_path: Path, erase: Command) -> None:
    file, (_, masks) = save(photo(), tmp_path / "one.png"), write_coco(tmp_path / "masks")
    document = json.loads(Path(str(masks)).read_text())
    for broken in ({"segmentation": [[50, 50, 51, 51]]}, {"segmentation": encode_rle(LEFT), "iscrowd": 1}):
        people = [{"id": 9, "image_id": 1, **broken}, *document["annotations"]]
        Path(str(masks)).write_text(json.dumps(document | {"annotations": people}))
        for options, message in (
            (["--remove", 1], "--remove 1: person 1 cannot be used: annotations[0]: "),
            (["--layers", tmp_path / "layers"], "--layers needs everybody: person 1 cannot be used"),
            (["--remove", 4], "there are 3 people"),
        ):
            code, _, err = erase(file, "--mask", masks, "-o", tmp_path / "no.png", *options)
            assert code == 2 and message in err and not (tmp_path / "no.png").exists()
        assert erase(file, "--mask", masks, "--remove", 3, "--force")[0] == 0
        assert_erased(tmp_path / "one-erased.png", photo(), RIGHT[None])


@pytest.mark.parametrize("options", [[], ["--protect", "people"]])
def test_who_cannot_vanish_is_named_by_their_number(tmp_path: Path, erase: Command, options: list[str]) -> None:
    """Not by their place among those who can: the first row cannot be used."""
    file, (_, masks) = save(photo(), tmp_path / "one.png"), write_coco(tmp_path / "masks")
    document = json.loads(Path(str(masks)).read_text())
    behind, front = LEFT.copy(), LEFT
    behind[:30] = False
    rows = [{"segmentation": [[50, 50, 51, 51]]}, *({"segmentation": encode_rle(mask)} for mask in (behind, front))]
    people = [{"id": k, "image_id": 1, **row} for k, row in enumerate(rows)]
    Path(str(masks)).write_text(json.dumps(document | {"annotations": people}))
    code, _, err = erase(file, "--mask", masks, "--remove", 2, *options)
    assert code == 2 and ": person 2 " in err and "index" not in err


def test_masks_lie_wherever_fsspec_reads(tmp_path: Path, erase: Command, serve_files: Callable[..., Any]) -> None:
    file = save(photo(), tmp_path / "one.png")
    save(LEFT, tmp_path / "masks/mask.png")
    url = serve_files(tmp_path / "masks").url
    assert erase(file, "--mask", f"{url}/mask.png") == (0, f"{tmp_path}/one-erased.png: 1 of 1 people erased\n", "")
    code, _, err = erase(file, "--mask", f"{url}/gone.png", "--force")
    assert code == 2 and f"--mask {url}/gone.png does not exist" in err


def test_one_photograph_that_is_reached_twice_is_erased_once(tmp_path: Path, erase: Command) -> None:
    for name in ("a", "sub/b"):
        save(photo(), tmp_path / f"photos/{name}.png")
        save(LEFT, tmp_path / f"masks/{name}.png")
    code, out, err = erase(tmp_path / "photos", tmp_path / "photos/sub", "--mask", tmp_path / "masks")
    assert (code, out.count("erased\n"), err) == (0, 2, "")


def test_of_how_much_will_go_the_owner_is_told_once(tmp_path: Path, erase: Command) -> None:
    file, rows = save(photo(), tmp_path / "one.png"), np.arange(HEIGHT)[:, None]
    mask = save(np.where(rows < 30, 1, np.where(rows < 58, 2, 0)).astype(np.uint8) * np.ones(WIDTH, np.uint8),
                tmp_path / "mask.png")  # fmt: skip
    code, _, err = erase(file, "--mask", mask, "--margin", 0)
    assert (code, err) == (0, f"{file}: 91% of the picture will go\n")


def test_adapters_are_given_the_prompt_that_they_were_trained_on_or_another(
    tmp_path: Path, mild_anew: Command, parts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(parts, folder := tmp_path / "trained")
    config = json.loads((folder / "mild.json").read_text())
    (folder / "mild.json").write_text(json.dumps(config | {"prompt": "a lawn"}))
    given, encode = list[Any](), MILDPipeline.encode_prompt

    def encode_prompt(pipeline: MILDPipeline, prompt: Any, **others: Any) -> Any:
        given.append(prompt)
        return encode(pipeline, prompt, **others)

    monkeypatch.setattr(MILDPipeline, "encode_prompt", encode_prompt)
    file, mask = save(photo(), tmp_path / "one.png"), save(LEFT, tmp_path / "mask.png")
    for options in ([], ["--prompt", ""], ["--prompt", "sand"]):
        command = ["erase", file, "--mask", mask, "--mild", folder, "--steps", 1, "--force", *options]
        assert mild_anew(*command)[0] == 0
    assert given == ["a lawn", "", "sand"]


def test_an_index_with_gaps_is_counted_and_its_owner_is_told_how(tmp_path: Path, erase: Command) -> None:
    file = save(photo(), tmp_path / "one.png")
    mask = save((LEFT * 2 + RIGHT * 5).astype(np.uint8), tmp_path / "mask.png")
    code, _, err = erase(file, "--mask", mask, "--remove", "2")
    assert code == 0 and err == f"{file}: {mask}: people 1 to 2 are its values 2, 5\n"
    assert_erased(tmp_path / "one-erased.png", photo(), RIGHT[None])


def test_what_the_user_must_mend_is_one_line_before_any_model_is_loaded(tmp_path: Path, mild: Command) -> None:
    """The base does not exist: whoever looked for it would say so."""
    file, mask = save(photo(), tmp_path / "one.png"), save(LEFT, tmp_path / "mask.png")
    save(photo(), tmp_path / "two/one.png")
    save(photo(), tmp_path / "two/one.jpg")
    save(LEFT, tmp_path / "masks/one.png")
    empty, small = save(LEFT & False, tmp_path / "empty.png"), save(LEFT[:, :50], tmp_path / "small.png")
    inverted = save(~LEFT, tmp_path / "inverted.png")
    full, cut = save(LEFT | True, tmp_path / "full.png"), tmp_path / "cut.jpg"
    whole = save(photo(), tmp_path / "whole.jpg")
    cut.write_bytes(whole.read_bytes()[:600])
    (tmp_path / "text.jpg").write_text("not a picture at all")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "blocked").write_text("a file")
    (tmp_path / "nothing").mkdir()
    masks = ["--mask", mask]
    for arguments, message in [
        ([file, "--mask", tmp_path / "gone.png"], "--mask .*gone.png does not exist"),
        ([file, *masks, "--mask", tmp_path / "gone.png"], "mask .*gone.png does not exist"),
        ([file, "--mask", tmp_path / "nothing"], r"one.png: no mask marks a person in it; looked for one.png"),
        ([file, "--mask", empty], "one.png: mask .*empty.png is empty"),
        ([file, "--mask", small], "mask .*small.png is 50x64 pixels, the photo 96x64"),
        ([file, "--mask", cut], "mask .*cut.jpg: the JPEG file ends early"),
        ([file, "--mask", whole], "mask .*whole.jpg: it has several colours without hard edges"),
        ([file, "--mask", inverted], "the mask of person 1: 92% of the picture would go; is the mask inverted?"),
        ([file, "--mask", full], "the masks cover the whole picture"),
        ([file, "--mask", tmp_path], "is the folder of one.png; masks need a folder of their own"),
        ([file, *masks, "--remove", "2"], "--remove 2: there is 1 person, counted from 1"),
        ([file, *masks, "--remove", "0"], "--remove 0: there is 1 person"),
        ([file, *masks, "--remove", "1,x"], "--remove '1,x': give people by number"),
        ([file, *masks, "--remove", "-1"], "--remove '-1': give people by number"),
        ([file, *masks, "--remove", ""], "--remove '': give people by number"),
        ([file, *masks, "--margin", "inf"], "margin is inf: give 0, or a share"),
        ([file, *masks, "--seed", 2**64], "--seed 18446744073709551616: give 0 to 18446744073709551615"),
        ([file, *masks, "--seed", "-1"], "--seed -1: give 0"),
        ([file, *masks, "--steps", "1001"], "--steps 1001: give 1 to 1000"),
        ([file, *masks, "--steps", "0"], "--steps 0: give 1 to 1000"),
        ([tmp_path / "gone.jpg", *masks], "gone.jpg: there is no such file"),
        ([tmp_path / "text.jpg", *masks], "text.jpg: not a JPEG"),
        ([tmp_path / "empty.jpg", *masks], "empty.jpg: the file has 0 bytes"),
        ([cut, *masks], "cut.jpg: the JPEG file ends early"),
        ([tmp_path / "nothing", *masks], "nothing holds no photographs"),
        ([tmp_path / "nothing/*.jpg", *masks], r"nothing/\*.jpg matches no photographs"),
        ([file, *masks, "-o", tmp_path / "result"], "name a file that ends in one of .jpg"),
        (
            [file, *masks, "-o", tmp_path / "blocked/result.png"],
            "output .*blocked cannot be written: .*blocked is a file",
        ),
        ([file, *masks, "-o", "/proc/result.png"], "output /proc cannot be written: "),
        ([file, *masks, "--layers", tmp_path / "blocked"], "blocked is a file; name a folder"),
        ([file, *masks, "--layers", "/proc/layers"], "output /proc cannot be written: "),
        ([file, whole, *masks], "2 photographs with --mask .*mask.png: several need one folder of masks"),
        ([file, whole, "--mask", tmp_path / "masks", "-o", tmp_path / "a.png"], "a.png is a file; several photographs"),
        ([tmp_path / "two", "--mask", tmp_path / "masks"], "would both be saved as .*two/one-erased.png"),
        (
            [tmp_path / "two", tmp_path / "*.png", "--mask", tmp_path / "masks"],
            "are both called one.png; give the folder",
        ),
        ([file, *masks, "--base", tmp_path / "no/base/here"], "base .*no/base/here does not exist"),
        ([file, *masks, "--base", tmp_path / "masks"], "masks is not a diffusers pipeline folder"),
        ([file, *masks, "--mild", tmp_path / "masks"], "masks is no MILD directory"),
    ]:
        nowhere = [] if {"--base", "--mild"} & set(arguments) else ["--base", tmp_path / "no/such/base"]
        code, out, err = mild("erase", *arguments, *nowhere)
        assert (code, out) == (2, ""), (arguments, err)
        assert err.startswith("error: ") and len(err.splitlines()) == 1
        assert re.search(message, err), err
    assert not list(tmp_path.rglob("*-erased.png"))


def test_a_folder_without_layers_or_a_person_who_is_not_there_is_one_line(tmp_path: Path, mild: Command) -> None:
    seen = LEFT.astype(np.uint16)
    layer = Layer.cut(photo(), LEFT * np.uint8(255))
    LayeredPicture(photo(), photo(), LEFT, seen, 0 * seen, [layer], (0,)).save(tmp_path / "layers")
    for folder, keep, output, message in [
        ("nowhere", "1", "out.png", "name a folder of layers"),
        ("layers", "2", "out.png", "--keep 2: there is 1 person, counted from 1"),
        ("layers", "all", "out.png", "--keep 'all': give people by number, counted from 1, such as 1,3, or none"),
        ("layers", "1" * 5000, "out.png", "give people by number"),
        ("layers", "1", "out.xyz", "name a file that ends in one of"),
        ("layers", "1", "layers", "layers is a folder; name a file in it"),
    ]:
        code, out, err = mild("recompose", tmp_path / folder, "--keep", keep, "-o", tmp_path / output)
        assert (code, out) == (2, "")
        assert message in err and len(err.splitlines()) == 1


@pytest.mark.process
def test_neither_help_nor_erasing_imports_prefect(tmp_path: Path, parts: str) -> None:
    """In a process of its own; help loads nothing heavy at all."""
    file, mask = save(photo(), tmp_path / "one.png"), save(LEFT, tmp_path / "mask.png")
    program = (
        "import sys; from flows.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "print('loaded', *sorted({'prefect', 'torch', 'cv2', 'pyarrow'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, "erase"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "PHOTO" in done.stdout and done.stdout.splitlines()[-1] == "loaded"
    options = [str(file), "--mask", str(mask), "--mild", parts, "--steps", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded cv2 pyarrow torch"
    assert_erased(tmp_path / "one-erased.png", photo(), LEFT[None])
