"""The hash is ImageHash's, and the search finds what comparing with every hash finds."""

from __future__ import annotations

import io

import imagehash
import numpy as np
import pytest
from PIL import Image

from dataset_tools.drawn_world import draw_scene
from dataset_tools.perceptual_hash import AlikeHashes, perceptual_hash


def test_a_hash_reads_as_imagehash_prints_it() -> None:
    image = draw_scene("one", 0, (96, 64), False).image
    assert f"{perceptual_hash(image):016x}" == str(imagehash.phash(Image.fromarray(image)))


def test_a_smaller_and_compressed_copy_differs_in_few_bits_and_another_picture_in_many() -> None:
    image, other = (draw_scene(key, 0, (192, 128), False).image for key in ("one", "two"))
    buffer = io.BytesIO()
    Image.fromarray(image).resize((120, 80)).save(buffer, "JPEG", quality=60)
    copy = np.asarray(Image.open(buffer))
    assert (perceptual_hash(image) ^ perceptual_hash(copy)).bit_count() <= 4
    assert (perceptual_hash(image) ^ perceptual_hash(other)).bit_count() > 12


@pytest.mark.parametrize("distance", [0, 1, 4, 10, 63])
def test_the_search_finds_what_comparing_with_every_hash_finds(distance: int) -> None:
    rng = np.random.default_rng(distance)
    held = [int(value) for value in rng.integers(0, 1 << 64, 200, np.uint64)]
    alike = AlikeHashes(distance)
    for number, value in enumerate(held):
        alike.add(value, str(number))
    asked = [value ^ sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 14), False)) for value in held]
    told = []
    for value in asked:
        differ = [(value ^ other).bit_count() for other in held]
        told.append(str(differ.index(min(differ))) if min(differ) <= distance else None)
    assert [alike.find(value) for value in asked] == told
    assert len({name is None for name in told}) == (1 if distance == 63 else 2)


def test_of_equal_and_of_equally_near_hashes_the_first_is_named() -> None:
    alike = AlikeHashes(2)
    for value, name in ((0b0011, "late bits"), (0b0011, "again"), (0b1100, "other")):
        alike.add(value, name)
    assert alike.find(0b0011) == "late bits"
    assert alike.find(0b1111) == "late bits"
    assert alike.find(0b1101) == "other"
    assert alike.find(0xFF00) is None
