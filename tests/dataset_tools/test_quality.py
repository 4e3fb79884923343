"""Quality: each filter on a picture that is made to fail it, and on one without faults."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from dataset_tools.errors import Rejected
from dataset_tools.quality import HashedPicture, QualitySettings, check_faces, check_picture, near_duplicates
from dataset_tools.schema import KEYPOINTS, Person

STRICT = QualitySettings(min_sharpness=50, max_black=0.5, max_white=0.5, min_face=24)


def scene(width: int = 400) -> np.ndarray:
    """Blocks of many greys, sharp."""
    blocks = np.random.default_rng(0).integers(20, 236, (12, 16, 3), dtype=np.uint8)
    return cv2.resize(blocks, (width, width * 3 // 4), interpolation=cv2.INTER_NEAREST)


def faults(image: np.ndarray, settings: QualitySettings) -> str:
    try:
        check_picture(image, settings)
    except Rejected as error:
        return error.reason
    return ""


def test_a_picture_without_faults_passes_at_any_size() -> None:
    assert [faults(scene(width), STRICT) for width in (200, 512, 2000)] == [""] * 3


def test_a_blurred_picture_is_told_from_a_sharp_one_at_any_size() -> None:
    for width in (400, 2000):
        soft = cv2.GaussianBlur(scene(width), (0, 0), width / 50)
        assert faults(soft, STRICT) == "blurred"


def test_a_picture_that_is_largely_black_or_white_is_told() -> None:
    dark, bright = scene(), scene()
    dark[:170], bright[:170] = 1, 255
    assert (faults(dark, STRICT), faults(bright, STRICT)) == ("underexposed", "overexposed")
    dark[130:], bright[130:] = scene()[130:], scene()[130:]
    assert (faults(dark, STRICT), faults(bright, STRICT)) == ("", "")


def test_the_defaults_refuse_nothing() -> None:
    for image in (np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)):
        assert faults(image, QualitySettings()) == ""


@pytest.mark.parametrize(("distance", "small"), [(4.0, True), (20.0, False), (0.0, False)])
def test_a_face_that_is_too_small_is_told_and_one_that_is_not_seen_is_not_asked_for(
    distance: float, small: bool
) -> None:
    """Eyes 6.3 cm apart: at 4 pixels, a head of 23 cm has some 15."""
    keypoints = np.zeros((18, 3), np.float32)
    if distance:
        keypoints[KEYPOINTS.index("right_eye")] = (40, 40, 1)
        keypoints[KEYPOINTS.index("left_eye")] = (40 + distance, 40, 1)
    somebody = Person("ann", np.ones((120, 120), bool), keypoints=keypoints)
    parsing = np.full((120, 120), 255, np.uint8)
    if small:
        with pytest.raises(Rejected, match=r"small-face: the face of person ann is 1\d pixels high, 24"):
            check_faces([somebody], parsing, "none", STRICT)
    else:
        check_faces([somebody], parsing, "none", STRICT)
    check_faces([somebody], parsing, "none", QualitySettings())


def test_of_pictures_that_are_alike_test_keeps_its_own_and_then_the_first_stays() -> None:
    a, b, c = 0x0F0F0F0F0F0F0F0F, 0xFFFF0000FFFF0000, 0x00000000FFFFFFFF
    pictures = [
        HashedPicture("train-a", "train", "people", f"{a ^ 0b111:016x}"),
        HashedPicture("train-b", "train", "people", f"{b:016x}"),
        HashedPicture("train-b-again", "train", "people", f"{b ^ 0b1:016x}"),
        HashedPicture("train-c", "train", "people", f"{c ^ 0b11111:016x}"),
        HashedPicture("validation-a", "validation", "background", f"{a ^ 0b1:016x}"),
        HashedPicture("test-a", "test", "people", f"{a:016x}"),
        HashedPicture("test-c", "test", "people", f"{c:016x}"),
    ]
    assert {picture.id: like for picture, like in near_duplicates(pictures, 4)} == {
        "train-a": "test picture test-a",
        "train-b-again": "train picture train-b",
        "validation-a": "test picture test-a",
    }


def test_a_scene_that_is_there_with_people_and_without_is_a_duplicate_only_in_another_split() -> None:
    def found(split: str) -> list[str]:
        pictures = [
            HashedPicture("full", "train", "people", "00ff00ff00ff00ff"),
            HashedPicture("empty", split, "background", "00ff00ff00ff00ff"),  # type: ignore[arg-type]
        ]
        return [picture.id for picture, _ in near_duplicates(pictures, 0)]

    assert found("train") == [] and found("test") == ["full"]
