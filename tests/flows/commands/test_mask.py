"""``mild mask``: what it writes, ``mild erase --mask`` and others read as the same people."""

from __future__ import annotations

import io
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools.coco import COCO

from dataset_tools.errors import Rejected
from dataset_tools.estimators import FoundPeople
from dataset_tools.photo_masks import NamedMasks, Place, open_masks
from dataset_tools.photographs import read_photograph

HEIGHT, WIDTH = 64, 96
ANN, BOB, EVE = np.zeros((3, HEIGHT, WIDTH), bool)
ANN[20:50, 10:22] = True
BOB[8:40, 40:55] = True
EVE[30:60, 70:84] = True
EVERYBODY = [ANN, BOB, EVE]

Command = Callable[..., tuple[int, str, str]]


def photo(people: Sequence[np.ndarray] = EVERYBODY, brightness: int = 204) -> np.ndarray:
    """(H, W, 3) uint8 of dark noise and bright people."""
    shape = people[0].shape if people else (HEIGHT, WIDTH)
    image = np.random.default_rng(0).integers(20, 90, (*shape, 3), dtype=np.uint8)
    for person in people:
        image[person] = brightness
    return image


def save(array: np.ndarray, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """By Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", exif=turned(orientation))
    return np.asarray(ImageOps.exif_transpose(Image.open(buffer)))


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def mask(mild_anew: Command, networks: Any) -> Command:
    """``mild mask`` with a network that takes bright spots for people."""
    return lambda *arguments: mild_anew("mask", *arguments)


def test_a_mask_is_an_index_of_people_from_left_to_right(tmp_path: Path, mask: Command) -> None:
    file = save(photo(), tmp_path / "one.png")
    code, out, err = mask(file)
    result = tmp_path / "one-mask.png"
    assert (code, out, err) == (0, f"{result}: 3 people, scores 0.80, 0.80, 0.80, found by drawn/spots\n", "")
    assert result.read_bytes()[24:26] == b"\x08\x03", "8 bits, palette (W3C PNG, IHDR)"
    with Image.open(result) as picture:
        assert np.array_equal(np.asarray(picture), ANN * 1 + BOB * 2 + EVE * 3)
        colours = np.array(picture.getpalette()).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) == len(colours) == 256 and not colours[0].any()


@pytest.mark.parametrize("people", [EVERYBODY, [BOB]], ids=["three", "one"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("coco", [False, True])
def test_the_people_who_were_found_are_those_that_are_read(
    tmp_path: Path, mask: Command, orientation: int, people: list[np.ndarray], coco: bool
) -> None:
    """Whatever way up the photograph was stored."""
    file = save(photo(people), tmp_path / "one.png", exif=turned(orientation))
    options = ["--coco", tmp_path / "people.json"] if coco else []
    assert mask(file, *options)[::2] == (0, "")
    json_masks = open_masks(Place(str(tmp_path / "people.json")), ["one.png"], []) if coco else None
    found = read_photograph(file, "one.png", json_masks or NamedMasks([str(tmp_path / "one-mask.png")]))
    truth = [upright(person, orientation) for person in people]
    truth.sort(key=lambda person: np.nonzero(person)[1].mean())
    assert len(found.people) == len(people) and not found.notes
    for read, person in zip(found.people, truth, strict=True):
        assert np.array_equal(read, person)


def test_one_json_holds_the_people_of_all_photographs(tmp_path: Path, mask: Command) -> None:
    """As pycocotools reads it; results lie in a folder of their own, which holds no photographs later."""
    save(photo(), tmp_path / "photos/a/one.png")
    save(photo([BOB], 255), tmp_path / "photos/two.png")
    document, look = tmp_path / "people.json", tmp_path / "photos/look"
    for force in ([], ["--force"]):
        code, out, err = mask(tmp_path / "photos", "--coco", document, "-o", look, *force)
        assert (code, err, len(out.splitlines())) == (0, "", 3)
        assert out.splitlines()[-1] == f"{document}: the people of 2 photographs"
    assert files(look) == ["a/one-people.jpg", "two-people.jpg"]
    coco = COCO(document)
    assert {image["file_name"] for image in coco.imgs.values()} == {"a/one.png", "two.png"}
    for image in coco.imgs.values():
        found = coco.loadAnns(coco.getAnnIds(image["id"], catIds=coco.getCatIds("person"), iscrowd=False))
        truth = EVERYBODY if image["file_name"] == "a/one.png" else [BOB]
        for row, person in zip(found, truth, strict=True):
            rows, columns = np.nonzero(person)
            assert np.array_equal(coco.annToMask(row), person) and row["area"] == person.sum()
            assert row["bbox"] == [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert row["score"] == (0.8 if truth is EVERYBODY else 1.0)


def test_masks_in_a_folder_belong_to_the_photographs_of_their_names(tmp_path: Path, mask: Command) -> None:
    for name, people in (("a/one", EVERYBODY), ("two", [EVE])):
        save(photo(people), tmp_path / f"photos/{name}.png")
    assert mask(tmp_path / "photos", "-o", tmp_path / "masks")[0] == 0
    assert files(tmp_path / "masks") == ["a/one-mask.png", "a/one-people.jpg", "two-mask.png", "two-people.jpg"]
    found = open_masks(Place(str(tmp_path / "masks")), ["a/one.png", "two.png"], [])
    assert [len(list(found.of(name))) for name in ("a/one.png", "two.png")] == [3, 1]


def test_a_network_sees_large_photographs_reduced_and_masks_are_as_large_as_they(
    tmp_path: Path, mask: Command, networks: Any
) -> None:
    rows, columns = np.mgrid[:400, :3000]
    people = [(rows - 200) ** 2 / 180**2 + (columns - x) ** 2 / 150**2 < 1 for x in (300, 602, 2000)]
    image = np.dstack([np.logical_or.reduce(people) * np.uint8(255)] * 3)
    assert mask(save(image, tmp_path / "one.png"))[0] == 0
    assert [image.shape for image in networks.instances.seen] == [(273, 2048, 3)]
    with Image.open(tmp_path / "one-people.jpg") as picture:
        assert picture.size == (2048, 273)
    found = read_photograph(tmp_path / "one.png", "one.png", NamedMasks([str(tmp_path / "one-mask.png")])).people
    for read, person in zip(found, people, strict=True):
        assert (read & person).sum() > 0.995 * (read | person).sum()


def test_a_network_sees_colours_as_they_are_meant(
    tmp_path: Path, mask: Command, networks: Any, icc_profiles: dict[str, bytes]
) -> None:
    """Values of a linear profile look brighter in sRGB."""
    save(photo([BOB], 110) * BOB[..., None], tmp_path / "one.png", icc_profile=icc_profiles["linear"])
    assert mask(tmp_path / "one.png")[0] == 0
    bright = 255 * (1.055 * (110 / 255) ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    assert np.abs(networks.instances.seen[0][BOB] - bright).max() < 2


@pytest.mark.parametrize("coco", [False, True])
def test_a_stopped_batch_says_how_far_it_came(
    tmp_path: Path, mask: Command, networks: Any, monkeypatch: pytest.MonkeyPatch, coco: bool
) -> None:
    """Ctrl-C while the network looks at the second photograph."""
    for name in "abc":
        save(photo(), tmp_path / f"photos/{name}.png")
    look = networks.instances.find

    def stopped(images: Sequence[np.ndarray]) -> list[FoundPeople]:
        if networks.instances.seen:
            signal.raise_signal(signal.SIGINT)
        found: list[FoundPeople] = look(images)
        return found

    monkeypatch.setattr(networks.instances, "find", stopped)
    options = ["--coco", tmp_path / "all.json"] if coco else []
    code, out, err = mask(tmp_path / "photos", "-o", tmp_path / "out", *options)
    assert (code, len(out.splitlines())) == (130, 1)
    if coco:
        assert err == f"stopped: {tmp_path}/all.json is not there yet; the same command with --force begins again\n"
        assert files(tmp_path / "out") == ["a-people.jpg"] and not (tmp_path / "all.json").exists()
    else:
        assert err == "stopped: 1 of 3 photographs are done; the same command goes on with the others\n"
        assert files(tmp_path / "out") == ["a-mask.png", "a-people.jpg"]


def test_a_finished_photograph_is_passed_over(tmp_path: Path, mask: Command, networks: Any) -> None:
    for name in "ab":
        save(photo(), tmp_path / f"photos/{name}.png")
    assert mask(tmp_path / "photos", "-o", tmp_path / "out")[0] == 0
    (tmp_path / "out/b-mask.png").unlink()
    (tmp_path / "out/b-people.jpg").unlink()
    before = (tmp_path / "out/a-mask.png").stat()
    code, out, err = mask(tmp_path / "photos", "-o", tmp_path / "out")
    assert (code, len(networks.instances.seen), len(out.splitlines())) == (0, 3, 1)
    assert err == "1 of 2 photographs have their results already; --force makes them anew\n"
    assert (tmp_path / "out/a-mask.png").stat() == before


def test_photographs_that_cannot_be_used_are_set_aside_and_the_others_done(
    tmp_path: Path, mask: Command, networks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a json nothing else is missing."""
    save(photo(), tmp_path / "photos/good.png")
    save(photo([]), tmp_path / "photos/empty.png")
    save(photo([BOB], 255), tmp_path / "photos/hard.png")
    look = networks.instances.find

    def failing(images: Sequence[np.ndarray]) -> list[FoundPeople]:
        if images[0].max() == 255:
            raise RuntimeError("CUDA error:\nsomething")
        found: list[FoundPeople] = look(images)
        return found

    monkeypatch.setattr(networks.instances, "find", failing)
    (tmp_path / "photos/text.jpg").write_text("<html>")
    for options, results in (
        ([], ["good-mask.png", "good-people.jpg"]),
        (["--coco", tmp_path / "all.json"], ["good-people.jpg"]),
    ):
        out = tmp_path / f"out{len(results)}"
        code, _, err = mask(tmp_path / "photos", tmp_path / "gone.png", "-o", out, *options)
        assert (code, files(out)) == (1, results)
        assert "photos/empty.png: drawn/spots finds nobody in it\n" in err
        assert "photos/hard.png: drawn/spots failed on it: CUDA error: something\n" in err
        assert "photos/text.jpg: not a JPEG" in err and "gone.png: there is no such file" in err
        assert err.splitlines()[-1] == "4 of 5 photographs were set aside"
    assert [image["file_name"] for image in COCO(tmp_path / "all.json").imgs.values()] == ["good.png"]


def test_nothing_is_overwritten_without_force(tmp_path: Path, mask: Command) -> None:
    file, document = save(photo(), tmp_path / "one.png"), tmp_path / "all.json"
    for there, options in (
        (tmp_path / "one-mask.png", []),
        (tmp_path / "one-people.jpg", []),
        (tmp_path / "one-people.jpg", ["--coco", document]),
        (document, ["--coco", document]),
    ):
        there.write_bytes(b"precious")
        code, out, err = mask(file, *options)
        assert (code, out, err) == (2, "", f"error: {there} exists already; --force overwrites it\n")
        assert there.read_bytes() == b"precious"
        assert mask(file, *options, "--force")[0] == 0 and there.read_bytes() != b"precious"
        for result in (*tmp_path.glob("one-*"), *tmp_path.glob("*.json")):
            result.unlink()


def test_what_an_earlier_run_left_is_no_photograph(tmp_path: Path, mask: Command) -> None:
    save(photo(), tmp_path / "one.png")
    for _ in range(2):
        code, out, err = mask(tmp_path, "--force")
        assert (code, len(out.splitlines())) == (0, 1)
    assert files(tmp_path) == ["one-mask.png", "one-people.jpg", "one.png"]
    assert err.startswith("2 passed over as results of an earlier run: ")


def test_what_the_user_must_mend_is_one_line(tmp_path: Path, mask: Command, networks: Any) -> None:
    file, nobody = save(photo(), tmp_path / "one.png"), save(photo([]), tmp_path / "nobody.png")
    crowd = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    crowd[1:-1:6, 1:-1:6] = 255
    many = save(crowd, tmp_path / "many.png")
    save(photo(), tmp_path / "two/one.png")
    save(photo(), tmp_path / "two/one.jpg")
    for arguments, message in (
        ([nobody], "nobody.png: drawn/spots finds nobody in it"),
        ([many], "many.png: an index PNG holds 100 people, and there are more; a COCO json holds any"),
        ([tmp_path / "gone.png"], "gone.png: there is no such file"),
        ([file, "-o", tmp_path / "mask.jpg"], "mask.jpg: masks are saved as PNG"),
        ([file, "-o", tmp_path / "mask"], "name a file that ends in one of .jpg"),
        ([file, "-o", "/proc/mask.png"], "output /proc cannot be written"),
        ([file, "--coco", tmp_path / "people.txt"], "people.txt: name a file that ends in .json"),
        ([file, "--coco", "/proc/people.json"], "output /proc cannot be written"),
        ([tmp_path / "two"], "would both be saved as .*two/one-mask.png"),
        ([tmp_path / "two", "-o", tmp_path / "a.png"], "a.png is a file; several photographs need a folder"),
    ):
        code, out, err = mask(*arguments)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert re.search(message, err), err
    networks.instances.broken = "spots.pth ends early"
    assert mask(tmp_path / "gone.png")[::2] == (2, "error: spots.pth ends early\n"), "before a photograph is read"
    networks.instances = None
    assert mask(tmp_path / "gone.png")[::2] == (2, "error: weights are missing: mild weights pull instances\n")
    assert not list(tmp_path.rglob("*-mask*")) + list(tmp_path.rglob("*-people*"))


def test_a_json_holds_more_people_than_an_index(tmp_path: Path, mask: Command) -> None:
    crowd = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    crowd[1:-1:5, 1:-1:5] = 255
    code, out, _ = mask(save(crowd, tmp_path / "one.png"), "--coco", tmp_path / "all.json")
    assert (code, f"{13 * 19} people" in out) == (0, True)
    assert len(COCO(tmp_path / "all.json").anns) == 13 * 19


def test_a_mask_that_may_be_another_photographs_is_not_taken(tmp_path: Path, mask: Command) -> None:
    """``a-mask`` may be what a photograph is called."""
    for name in ("a", "a-mask"):
        save(photo(), tmp_path / f"photos/{name}.jpg")
    save(ANN, tmp_path / "masks/a-mask.png")
    found = open_masks(Place(str(tmp_path / "masks")), ["a.jpg", "a-mask.jpg"], [])
    for name in ("a.jpg", "a-mask.jpg"):
        with pytest.raises(Rejected, match=r"mask a-mask\.png may belong to"):
            list(found.of(name))
