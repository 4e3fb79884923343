"""Pictures that look alike: a hash of 64 bits a picture, and a search among many by how many bits differ."""

from __future__ import annotations

from array import array

import imagehash
import numpy as np
from PIL import Image

BITS = 64


def perceptual_hash(image: np.ndarray) -> int:
    """ImageHash's ``phash`` (signs of low frequencies against their median) of an (h, w, 3) uint8 picture, 0..2^64-1.

    Written as ``f"{value:016x}"`` it is what ImageHash itself prints. Pictures without any pattern are all alike.
    """
    return int(str(imagehash.phash(Image.fromarray(image))), 16)


class AlikeHashes:
    """Hashes with a name each, found again by any hash that differs in ``distance`` bits (0..63) at most.

    The bits are dealt to ``distance + 1`` bands. Two such hashes are equal in one band at least, so that only hashes
    with an equal band need to be compared.
    """

    def __init__(self, distance: int) -> None:
        self._distance = distance
        self._bands = [sum(1 << bit for bit in range(first, BITS, distance + 1)) for first in range(distance + 1)]
        self._buckets: list[dict[int, array[int]]] = [{} for _ in self._bands]
        self._names: dict[int, str] = {}

    def add(self, value: int, name: str) -> None:
        """Hold a hash, 0..2^64-1, under a name; of equal hashes the first keeps its name."""
        if value in self._names:
            return
        self._names[value] = name
        for band, buckets in zip(self._bands, self._buckets, strict=True):
            buckets.setdefault(value & band, array("Q")).append(value)

    def find(self, value: int) -> str | None:
        """Name of the hash that differs least from ``value``, of several the one added first; None where none does."""
        if value in self._names:
            return self._names[value]
        pairs = zip(self._bands, self._buckets, strict=True)
        held = np.frombuffer(b"".join(buckets.get(value & band, b"") for band, buckets in pairs), np.uint64)
        bits = np.bitwise_count(held ^ np.uint64(value))
        least = bits.min(initial=BITS)
        if least > self._distance:
            return None
        nearest = set(held[bits == least].tolist())
        if len(nearest) == 1:
            return self._names[nearest.pop()]
        return next(name for candidate, name in self._names.items() if candidate in nearest)
