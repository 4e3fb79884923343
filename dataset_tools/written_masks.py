"""Masks of the people in photographs as files, of which `dataset_tools.photo_masks` reads the same people."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from dataset_tools.errors import Rejected
from dataset_tools.mask_files import MOST_PEOPLE
from dataset_tools.people_sheet import colours
from dataset_tools.schema import encode_rle


def encode_index(masks: Iterable[np.ndarray], size: tuple[int, int]) -> bytes:
    """An index PNG: 8-bit palette, value k is the k-th person in the colour of `mark_people`, 0 is nobody, black.

    Args:
        masks: (H, W) bool, one a person, none empty; taken one by one. Where they overlap, later ones are in front.
        size: H and W.

    Raises:
        Rejected: ``too-many-people``: more than `MOST_PEOPLE`, as an index is read.
    """
    index = np.zeros(size, np.uint8)
    for number, mask in enumerate(masks, start=1):
        if number > MOST_PEOPLE:
            raise Rejected(
                "too-many-people", f"an index PNG holds {MOST_PEOPLE} people, and there are more; a COCO json holds any"
            )
        index[mask] = number
    picture = Image.fromarray(index)
    # Of 8 bits only if the palette is full; so people can also be added with an editor of pictures.
    picture.putpalette(np.array([(0, 0, 0), *colours(255)], np.uint8).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


class CocoDocument:
    """One COCO json (https://cocodataset.org/#format-data) with the people of any number of photographs.

    Args:
        about: who found them.
    """

    def __init__(self, about: str) -> None:
        self._about = about
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, name: str, masks: Iterable[np.ndarray], size: tuple[int, int], scores: Sequence[float]) -> None:
        """Add the people of a photograph.

        Args:
            name: of the photograph below the folder of photographs.
            masks: (H, W) bool, one a person, none empty, upright; taken one by one.
            size: H and W.
            scores: of each person, 0..1.
        """
        height, width = size
        image = len(self._images) + 1
        self._images.append({"id": image, "file_name": name, "height": height, "width": width})
        for mask, score in zip(masks, scores, strict=True):
            rle = encode_rle(mask)
            self._annotations.append(
                {
                    "id": len(self._annotations) + 1,
                    "image_id": image,
                    "category_id": 1,
                    "segmentation": rle,
                    "bbox": [float(value) for value in coco_mask.toBbox(rle)],
                    "area": int(coco_mask.area(rle)),
                    "iscrowd": 0,
                    "score": round(score, 4),
                }
            )

    def encode(self) -> bytes:
        """The json's bytes, ASCII."""
        document = {
            "info": {"description": self._about},
            "categories": [{"id": 1, "name": "person"}],
            "images": self._images,
            "annotations": self._annotations,
        }
        return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")
