"""One photograph with its people: whatever way both are stored, they agree, upright."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dataset_tools.errors import Rejected, UserError
from dataset_tools.file_names import files_below
from dataset_tools.images import DecodeSettings, decode_image, without_pillows_limit
from dataset_tools.photo_masks import CocoMasks, NamedMasks, Place
from dataset_tools.photographs import read_photograph
from flows.commands.chosen_people import Chosen

HEIGHT, WIDTH = 40, 60
ANN, BOB = np.zeros((2, HEIGHT, WIDTH), bool)
ANN[5:30, 5:20] = True
BOB[10:35, 30:50] = True


def save(array: np.ndarray, path: Path, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def turned(array: np.ndarray, exif: Image.Exif) -> np.ndarray:
    """Upright, by Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", exif=exif)
    return np.asarray(ImageOps.exif_transpose(Image.open(buffer)))


def coco(path: Path, annotations: list[object], names: tuple[str, ...] = ("photo.png",)) -> CocoMasks:
    images = [{"id": k, "file_name": name, "height": HEIGHT, "width": WIDTH} for k, name in enumerate(names, start=1)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return CocoMasks(Place(str(path)), names, [])


def annotation(person: np.ndarray, **changes: object) -> dict[str, object]:
    rows, columns = (np.flatnonzero(person.any(axis)) for axis in (1, 0))
    top, bottom, left, right = (int(v) for v in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    return {"image_id": 1, "segmentation": [[left, top, right, top, right, bottom, left, bottom]], **changes}


@pytest.mark.parametrize("row", [None, "text", {"segmentation": []}, {"image_id": None, "segmentation": []}])
def test_of_an_only_image_a_row_that_does_not_name_it_keeps_its_number(tmp_path: Path, row: object) -> None:
    file = save(noise(), tmp_path / "photo.png")
    found = read_photograph(file, "photo.png", coco(tmp_path / "c.json", [row, annotation(ANN), annotation(BOB)]))
    assert found.numbers == [2, 3] and "annotations[0]" in found.unusable[1] and not found.doubt
    assert np.array_equal(found.people[0], ANN)


def test_a_row_that_may_be_of_any_of_several_images_makes_numbers_doubtful(tmp_path: Path) -> None:
    file = save(noise(), tmp_path / "photo.png")
    masks = coco(tmp_path / "c.json", [annotation(BOB, image_id=None), annotation(ANN)], ("photo.png", "other.png"))
    found = read_photograph(file, "photo.png", masks)
    assert len(found.people) == 1 and "annotations[0]" in found.doubt
    with pytest.raises(Rejected, match=r"annotations\[0\].*use --click"):
        Chosen(remove=(1,)).among(found)
    assert Chosen(clicks=((10, 10),)).among(found) == [0]


def test_numbers_that_no_mask_can_have_cost_one_row(tmp_path: Path) -> None:
    file = save(noise(), tmp_path / "photo.png")
    huge = "1" * 401
    (tmp_path / "c.json").write_text(
        json.dumps(
            {
                "images": [{"id": "7" * 5000, "file_name": "photo.png", "height": HEIGHT, "width": WIDTH}],
                "annotations": [
                    annotation(BOB, image_id="7" * 5000, segmentation=[[0, 0, 9, 0, 9, "HUGE"]]),
                    annotation(ANN, image_id="7" * 5000),
                ],
            }
        ).replace('"HUGE"', huge)
    )
    found = read_photograph(file, "photo.png", CocoMasks(Place(str(tmp_path / "c.json")), ["photo.png"], []))
    assert found.numbers == [2] and list(found.unusable) == [1]


@pytest.mark.parametrize("code", range(1, 9))
@pytest.mark.parametrize("stored_like_the_photo", [True, False])
def test_photo_and_masks_come_upright(tmp_path: Path, code: int, stored_like_the_photo: bool) -> None:
    """Where both orientations of a mask have the photograph's shape, it can only be taken as upright."""
    exif = Image.Exif()
    exif[0x0112] = code
    file = save(noise(), tmp_path / "photo.png", exif=exif)
    mask = save(ANN if stored_like_the_photo and code >= 5 else turned(ANN, exif), tmp_path / "mask.png")
    found = read_photograph(file, "photo.png", NamedMasks([str(mask)]))
    assert np.array_equal(found.image, turned(noise(), exif))
    assert len(found.people) == 1 and np.array_equal(found.people[0], turned(ANN, exif))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([ANN, BOB], [ANN, BOB]),
        ([BOB * np.uint8(255), ANN], [BOB, ANN]),
        ([(ANN * 1 + BOB * 2).astype(np.uint8)], [ANN, BOB]),
        ([(ANN * 1 + BOB * 2).astype(np.uint16)], [ANN, BOB]),
        ([ANN * np.uint8(255)], [ANN]),
        ([np.dstack([ANN * np.uint8(9)] * 3)], [ANN]),
        ([np.dstack([noise(), BOB * np.uint8(255)])], [BOB]),
        ([BOB * np.uint16(65535) + ANN * np.uint16(9)], [ANN, BOB]),
        ([(ANN * 1 + BOB * 2).astype(np.uint8), ANN], [ANN | BOB, ANN]),
    ],
    ids=[
        "two files",
        "grey",
        "index",
        "16-bit index",
        "one person",
        "colour",
        "alpha",
        "16-bit index with white",
        "no index among several",
    ],
)
def test_mask_files_are_an_index_or_one_person_each(
    tmp_path: Path, files: list[np.ndarray], expected: list[np.ndarray]
) -> None:
    masks = NamedMasks([str(save(array, tmp_path / f"{k}.png")) for k, array in enumerate(files)])
    people = read_photograph(save(noise(), tmp_path / "photo.png"), "photo.png", masks).people
    assert [person.tolist() for person in people] == [mask.tolist() for mask in expected]


@pytest.mark.parametrize("turn", [1, 6])
def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path: Path, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    file, mask = save(noise(), tmp_path / "photo.png", exif=exif), save(ANN[:-1], tmp_path / "mask.png")
    with pytest.raises(Rejected, match=rf"mask.png is 60x39 pixels, the photo {'60x40' if turn == 1 else '40x60'}"):
        read_photograph(file, "photo.png", NamedMasks([str(mask)]))


def test_a_one_pixel_photo_is_read(tmp_path: Path) -> None:
    file, mask = save(noise()[:1, :1], tmp_path / "photo.png"), save(ANN[5:6, 5:6], tmp_path / "mask.png")
    found = read_photograph(file, "photo.png", NamedMasks([str(mask)]))
    assert found.image.shape == (1, 1, 3) and found.people[0].shape == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(12032, 9024), (16320, 12240)])
def test_the_108_and_200_megapixels_of_phones_are_none_too_many(tmp_path: Path, size: tuple[int, int]) -> None:
    """Of a file that is cut, not the size is said to be the fault; datasets' pictures this large are refused."""
    file = tmp_path / "photo.png"
    Image.new("1", size).save(file)
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(Rejected, match="truncated-image"), without_pillows_limit():
        read_photograph(file, "photo.png", NamedMasks([]))
    with pytest.raises(Rejected, match="decompression-bomb"):
        decode_image(file.read_bytes(), DecodeSettings())


def test_damaged_exif_costs_neither_the_photo_nor_its_resolution(tmp_path: Path) -> None:
    damaged = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x0f\x01\x02\0\xff\xff\xff\xff\xff\xff"
    file = save(noise(), tmp_path / "photo.jpg", exif=damaged, dpi=(240, 240))
    found = read_photograph(file, "photo.jpg", NamedMasks([str(save(ANN, tmp_path / "mask.png"))]))
    assert found.metadata.dpi == (240, 240)


def test_a_tag_that_no_writer_takes_is_left_out_alone(tmp_path: Path) -> None:
    """Cameras write any type of value under any tag, and of any length."""
    exif = Image.Exif()
    exif.update({0x010F: "Cam", 0x8298: "c" * 5000})
    file = save(noise(), tmp_path / "photo.jpg", exif=exif)
    found = read_photograph(file, "photo.jpg", NamedMasks([str(save(ANN, tmp_path / "mask.png"))]))
    assert found.notes == ["not taken over from its metadata: EXIF Copyright"]
    assert dict(found.metadata.exif or {}) == {0x010F: b"Cam"}


def test_files_below_a_folder_are_the_same_for_photographs_and_masks(tmp_path: Path) -> None:
    """Through links, but not in circles; hidden ones are none, and a folder that cannot be read is named."""
    for name in ("b.png", "a/c.png", "a/.draft.png", ".trash/d.png", "elsewhere/e.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_text(name)
    (tmp_path / "photos/elsewhere").rename(tmp_path / "elsewhere")
    (tmp_path / "photos/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/self").symlink_to(tmp_path / "photos")
    names = ["a/c.png", "b.png", "linked/e.png"]
    assert files_below(tmp_path / "photos") == names
    files = Place(f"{tmp_path}/photos").files
    assert (list(files), [info["size"] for info in files.values()]) == (names, [7, 5, 15])
    with pytest.raises(UserError, match=rf"^folder {tmp_path}/gone cannot be read: No such file or directory$"):
        files_below(tmp_path / "gone")
