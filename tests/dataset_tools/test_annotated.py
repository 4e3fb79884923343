"""The annotated estimators read side-cars and scale them to the picture they are given."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset_tools.errors import Rejected
from dataset_tools.estimators import PeopleInPicture
from dataset_tools.estimators.annotated import Annotated, AnnotatedSettings
from dataset_tools.fetch import FetchSettings
from dataset_tools.records import ImageRecord

RECORD = ImageRecord(id="abc", source="openimages", split="test", role="people", stratum="one", image="abc.jpg")
KEYPOINTS = [[0.5, 0.25, 1.0], [0.1, 0.9, 0.6], *([[0.0, 0.0, 0.0]] * 16)]


@pytest.fixture
def annotated(tmp_path: Path) -> Annotated:
    folder = tmp_path / "sidecar" / "test"
    folder.mkdir(parents=True)
    (folder / "abc.json").write_text(json.dumps({"people": [{"box_id": "p1", "keypoints": KEYPOINTS}]}))
    labels = np.zeros((4, 6), np.uint8)
    labels[:, 3:] = 13
    Image.fromarray(labels).save(folder / "abc.parsing.png")
    plate = np.zeros((4, 6, 3), np.uint8)
    plate[:, 3:] = 200
    Image.fromarray(plate).save(folder / "abc.plate.png")
    return AnnotatedSettings(root=str(tmp_path)).open()


def image(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def picture(
    height: int, width: int, masks: list[np.ndarray], ids: list[str], record: ImageRecord = RECORD
) -> list[PeopleInPicture]:
    return [PeopleInPicture(image(height, width), masks, ids, record)]


def test_keypoints_are_scaled_to_the_image_and_matched_by_id(annotated: Annotated) -> None:
    masks = [np.ones((40, 80), bool)] * 2
    (found,) = annotated.estimate_pose(picture(40, 80, masks, ["stranger", "p1"]))
    assert isinstance(found, np.ndarray)
    assert found.shape == (2, 18, 3) and found.dtype == np.float32
    assert not found[0].any()
    np.testing.assert_allclose(found[1, :2], [[40, 10, 1], [8, 36, 0.6]], rtol=1e-6)
    assert not found[1, 2:].any()


@pytest.mark.parametrize("scale", [1, 2, 5])
def test_parsing_keeps_labels_when_scaled_and_is_zero_outside_the_masks(annotated: Annotated, scale: int) -> None:
    mask = np.zeros((4 * scale, 6 * scale), bool)
    mask[: 2 * scale] = True
    (labels,) = annotated.estimate_parsing(picture(4 * scale, 6 * scale, [mask], ["p1"]))
    assert isinstance(labels, np.ndarray)
    expected = np.zeros_like(labels)
    expected[: 2 * scale, 3 * scale :] = 13
    assert labels.dtype == np.uint8 and np.array_equal(labels, expected)


def test_parsing_invents_no_label_at_odd_sizes(annotated: Annotated) -> None:
    (labels,) = annotated.estimate_parsing(picture(7, 5, [np.ones((7, 5), bool)], ["p1"]))
    assert isinstance(labels, np.ndarray)
    assert set(np.unique(labels)) == {0, 13}


def test_of_a_map_with_a_palette_the_indices_count(annotated: Annotated, tmp_path: Path) -> None:
    folder = tmp_path / "sidecar" / "test"
    for name in ("parsing", "effects"):
        coloured = Image.fromarray(np.full((4, 6), 5, np.uint8), "P")
        coloured.putpalette([(37 * value) % 256 for value in range(768)])
        coloured.save(folder / f"abc.{name}.png")
    (labels,) = annotated.estimate_parsing(picture(4, 6, [np.ones((4, 6), bool)], ["p1"]))
    assert isinstance(labels, np.ndarray) and (labels == 5).all()
    people = [{"box_id": f"p{bit}", "keypoints": KEYPOINTS, "effects_bit": bit} for bit in range(8)]
    (folder / "abc.json").write_text(json.dumps({"people": people}))
    effects = annotated.clean_plate(image(4, 6), RECORD).effects
    assert effects is not None and [name for name, mask in effects.items() if mask.all()] == ["p0", "p2"]


def test_a_label_that_is_none_of_the_set_rejects_the_image_unless_nobody_has_it(
    annotated: Annotated, tmp_path: Path
) -> None:
    labels = np.zeros((4, 6), np.uint8)
    labels[:, 0] = 255
    labels[:, 5] = 20
    Image.fromarray(labels).save(tmp_path / "sidecar" / "test" / "abc.parsing.png")
    mask = np.ones((4, 6), bool)
    mask[:, 0] = False
    (why,) = annotated.estimate_parsing(picture(4, 6, [mask], ["p1"]))
    assert isinstance(why, Rejected) and why.reason == "broken-annotation" and "20 in parsing.png" in why.message
    mask[:, 5] = False
    (kept,) = annotated.estimate_parsing(picture(4, 6, [mask], ["p1"]))
    assert isinstance(kept, np.ndarray) and not kept.any()


def test_plates_are_averaged_when_they_shrink(annotated: Annotated) -> None:
    assert annotated.clean_plate(image(4, 6), RECORD).background[0, 3:].min() == 200
    small = annotated.clean_plate(image(2, 3), RECORD).background
    assert small.shape == (2, 3, 3)
    assert small[0, :, 0].tolist() == [0, 100, 200]  # the middle pixel covers one dark and one light column


def test_effects_go_by_the_ids_of_people_and_the_rest_is_somebodys(annotated: Annotated, tmp_path: Path) -> None:
    assert annotated.clean_plate(image(4, 6), RECORD).effects is None  # there is no side-car of them
    folder = tmp_path / "sidecar" / "test"
    people = [
        {"box_id": f"p{bit}", "keypoints": KEYPOINTS, "effects_bit": bit, "effects": ["shadow"]} for bit in (0, 2)
    ]
    (folder / "abc.json").write_text(json.dumps({"people": people}))
    bits = np.zeros((4, 6), np.uint8)
    bits[0] = 0b001
    bits[1] = 0b101
    bits[2] = 0b010
    Image.fromarray(bits).save(folder / "abc.effects.png")
    plate = annotated.clean_plate(image(8, 12), RECORD)
    assert plate.effects is not None and plate.kinds == {"p0": ("shadow",), "p2": ("shadow",)}
    rows = {name: np.flatnonzero(mask.all(1)).tolist() for name, mask in plate.effects.items()}
    assert rows == {"p0": [0, 1, 2, 3], "p2": [2, 3], "": [4, 5]}


def test_a_plate_has_the_digest_of_its_file(annotated: Annotated, tmp_path: Path) -> None:
    data = (tmp_path / "sidecar" / "test" / "abc.plate.png").read_bytes()
    assert annotated.clean_plate(image(4, 6), RECORD).sha256 == hashlib.sha256(data).hexdigest()


def test_a_missing_side_car_rejects_the_image(annotated: Annotated) -> None:
    other = ImageRecord(id="nobody", source="openimages", split="test", role="people", stratum="one", image="x")
    (why,) = annotated.estimate_pose(picture(4, 6, [], [], other))
    assert isinstance(why, Rejected) and why.reason == "no-annotation"
    with pytest.raises(Rejected):
        annotated.clean_plate(image(4, 6), other)


def test_a_broken_side_car_rejects_the_image(annotated: Annotated, tmp_path: Path) -> None:
    (tmp_path / "sidecar" / "test" / "abc.json").write_text('{"people": [{}]}')
    (tmp_path / "sidecar" / "test" / "abc.plate.png").write_bytes(b"no picture")
    (why,) = annotated.estimate_pose(picture(4, 6, [], []))
    assert isinstance(why, Rejected) and why.reason == "broken-annotation"
    with pytest.raises(Rejected, match="broken-annotation"):
        annotated.clean_plate(image(4, 6), RECORD)


@pytest.mark.parametrize("wrong", [[float("nan"), 0.5, 1.0], [0.5, float("inf"), 1.0], [0.5, 0.5, 7.0]])
def test_keypoints_that_are_no_numbers_or_scores_beyond_one_reject_the_image(
    annotated: Annotated, tmp_path: Path, wrong: list[float]
) -> None:
    people = {"people": [{"box_id": "p1", "keypoints": [wrong, *KEYPOINTS[1:]]}]}
    (tmp_path / "sidecar" / "test" / "abc.json").write_text(json.dumps(people))
    (why,) = annotated.estimate_pose(picture(4, 6, [np.ones((4, 6), bool)], ["p1"]))
    assert isinstance(why, Rejected) and why.reason == "broken-annotation"


def test_side_cars_are_read_with_the_options_of_their_root(
    annotated: Annotated, tmp_path: Path, serve_files: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over HTTP too; a slash at the end of the root changes nothing."""
    monkeypatch.setenv("SIDE_CAR_TOKEN", "open-sesame")
    server = serve_files(tmp_path, demands={"Authorization": "open-sesame"})
    fetch = FetchSettings(attempts=1, allow_private_addresses=True)
    options = {"client_kwargs": {"headers": {"Authorization": {"env": "SIDE_CAR_TOKEN"}}}}
    remote = AnnotatedSettings(root=f"{server.url}/", root_options=options, fetch=fetch).open()
    near, far = (reader.clean_plate(image(4, 6), RECORD).background for reader in (annotated, remote))
    assert np.array_equal(near, far)
    with pytest.raises(Rejected) as caught:
        AnnotatedSettings(root=server.url, fetch=fetch).open().clean_plate(image(4, 6), RECORD)
    assert (caught.value.reason, caught.value.transient) == ("forbidden", True)


def test_a_side_car_that_is_missing_alone_is_settled_and_a_folder_of_them_is_not(
    annotated: Annotated, tmp_path: Path
) -> None:
    for root, transient in [(tmp_path, False), (tmp_path / "typo", True)]:
        side_cars = AnnotatedSettings(root=str(root)).open()
        with pytest.raises(Rejected) as caught:
            side_cars.clean_plate(image(4, 6), replace(RECORD, id="nobody"))
        assert (caught.value.reason, caught.value.transient) == ("no-annotation", transient)


def test_side_cars_that_moved_keep_their_fingerprint_and_those_that_changed_do_not(
    annotated: Annotated, tmp_path: Path
) -> None:
    """Cache keys hold no paths: a mirror that is copied elsewhere, times and all, rebuilds nothing."""
    shutil.copytree(tmp_path / "sidecar", tmp_path / "elsewhere/sidecar", copy_function=shutil.copy2)
    moved = AnnotatedSettings(root=str(tmp_path / "elsewhere")).open()
    assert moved.fingerprint() == annotated.fingerprint()
    (tmp_path / "elsewhere/sidecar/test/abc.json").write_text("{}")
    changed = AnnotatedSettings(root=str(tmp_path / "elsewhere")).open()
    assert changed.fingerprint() != annotated.fingerprint()


def test_side_cars_in_a_linked_folder_count_like_others(annotated: Annotated, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    shutil.copytree(tmp_path / "sidecar", tmp_path / "store/sidecar", copy_function=shutil.copy2)
    (tmp_path / "linked/sidecar").mkdir()
    (tmp_path / "linked/sidecar/test").symlink_to(tmp_path / "store/sidecar/test")
    before = AnnotatedSettings(root=str(tmp_path / "linked")).open().fingerprint()
    (tmp_path / "store/sidecar/test/abc.json").write_text("{}")
    assert AnnotatedSettings(root=str(tmp_path / "linked")).open().fingerprint() != before
