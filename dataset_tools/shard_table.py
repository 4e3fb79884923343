"""What a shard knows of its samples besides their pictures: a Parquet file of one row group, one row a sample.

``{configuration}/{split}-{000000}.parquet`` lies beside the tar and is written with it. Whoever lists donors, counts,
credits or searches a dataset reads these, and no sample. Rows follow from ``annotations.json`` and the masks in it;
they are in the order of the tar.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataset_tools.anonymise import regions_blurred
from dataset_tools.donors import is_whole, sits
from dataset_tools.errors import Rejected, UserError
from dataset_tools.fetch import map_in_order
from dataset_tools.masks import touching
from dataset_tools.ranges import read_whole
from dataset_tools.schema import EffectKind, Makers
from dataset_tools.storage import open_root

WORKERS = 16
"""Tables that are read at once: that waits for the store far more than it computes."""
_MAKER = pa.struct([(name, pa.string()) for name in ("name", "network", "version", "weights")])
_PERSON = pa.struct(
    [
        ("id", pa.string()),
        ("category", pa.string()),
        ("mask_by", pa.string()),
        ("mask_score", pa.float64()),
        ("box", pa.list_(pa.float64(), 4)),
        ("occluded", pa.bool_()),
        ("truncated", pa.bool_()),
        ("occlusion", pa.float64()),
        ("touches", pa.bool_()),
        ("sits", pa.bool_()),
        ("whole", pa.bool_()),
    ]
)
"""``box``: x, y, width, height in pixels. ``occlusion``: null where nobody knows it. ``touches``: the mask touches or
overlaps somebody else's. ``sits``: a thigh is level. ``whole``: false where a network found the person, and the
skeleton, where one was computed, is not that of a whole body (`dataset_tools.donors.is_whole`)."""
_ORIGIN = pa.struct(
    [
        *(
            (name, pa.string())
            for name in (
                "role", "source", "id", "licence", "author", "author_url", "title", "url", "landing_url", "sha256",
            )
        ),
        ("blurred", pa.int32()),
    ]
)  # fmt: skip
"""``blurred``: regions of it that were blurred; 0 for a person who was cut out, who has at most one of its faces."""
TABLE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("stratum", pa.string()),
        ("label_set", pa.string()),
        ("captioned", pa.bool_()),
        ("known_share", pa.float64()),
        ("effects_share", pa.float64()),
        *((kind, pa.bool_()) for kind in get_args(EffectKind)),
        ("boxes_overlap", pa.bool_()),
        ("made_by", pa.struct([(cue, _MAKER) for cue in Makers.__dataclass_fields__])),
        ("people", pa.list_(_PERSON)),
        ("origins", pa.list_(_ORIGIN)),
    ]
)
"""``shadow``, ``reflection``: anybody has one that the picture is known to show. ``boxes_overlap``: those of any two
people have pixels in common."""


def row_of(document: dict[str, Any], masks: Sequence[np.ndarray]) -> dict[str, Any]:
    """A row of `TABLE_SCHEMA`.

    Args:
        document: the sample's ``annotations.json``, as `dataset_tools.schema.annotations_of` reads it.
        masks: the visible masks in it, (H, W) bool.
    """
    persons = document["annotations"]
    touches, boxes_overlap = [False] * len(persons), False
    for one, other in combinations(range(len(persons)), 2):
        boxes = persons[one]["bbox"], persons[other]["bbox"]
        if _boxes_meet(*boxes, grown=1) and touching(masks[one], masks[other]):
            touches[one] = touches[other] = True
        boxes_overlap |= _boxes_meet(*boxes, grown=0)
    posed = document["made_by"]["pose"]["name"] != "none"
    people = []
    for person, mask, touched in zip(persons, masks, touches, strict=True):
        keypoints = np.array(person["keypoints"]).reshape(18, 3)
        people.append(
            {
                "id": person["source_id"],
                **{name: person[name] for name in ("category", "mask_by", "mask_score", "occluded", "truncated")},
                "box": person["bbox"],
                "occlusion": person.get("occlusion"),
                "touches": touched,
                "sits": sits(keypoints),
                "whole": person["mask_by"] == "annotated" or not posed or is_whole(keypoints, mask),
            }
        )
    told = ("key", "width", "height", "stratum", "label_set", "known_share", "effects_share", "made_by")
    return {
        **{name: document[name] for name in told},
        "captioned": bool(document["caption"]),
        **{kind: any(person[kind] for person in persons) for kind in get_args(EffectKind)},
        "boxes_overlap": boxes_overlap,
        "people": people,
        "origins": [_origin(origin) for origin in document["origins"]],
    }


def _origin(origin: dict[str, Any]) -> dict[str, Any]:
    blurred = 0 if origin["role"] == "person" else regions_blurred(origin["transform"])
    return {**{field.name: origin.get(field.name) for field in _ORIGIN}, "blurred": blurred}


def _boxes_meet(a: Sequence[float], b: Sequence[float], grown: int) -> bool:
    """Whether two boxes x, y, width, height have pixels in common when each is ``grown`` by that many pixels."""
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]) + 2 * grown
    high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]) + 2 * grown
    return bool(wide > 0 and high > 0)


def table_bytes(rows: Sequence[dict[str, Any]]) -> bytes:
    """The file of some rows; with one version of pyarrow, equal rows give equal bytes."""
    sink = io.BytesIO()
    table = pa.Table.from_pylist(list(rows), schema=TABLE_SCHEMA)
    pq.write_table(table, sink, compression="zstd", row_group_size=max(1, len(rows)))
    return sink.getvalue()


def read_shard_table(root: str, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A table, with one request.

    Args:
        path: of the file below ``root``: see `dataset_tools.shards.table_path`.
        columns: those of `TABLE_SCHEMA` that are wanted; None: all.

    Raises:
        UserError: the file is missing or broken.
    """
    return _parsed(*_fetched(root, path), columns)


def read_shard_tables(root: str, paths: Iterable[str], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """`read_shard_table` of each path in turn, several at once, a few ahead. Raises `UserError` as that."""
    # Parsed by one thread: each that does so keeps memory of its own, the more the more tables it has seen.
    for fetched in map_in_order(partial(_fetched, root), paths, WORKERS, 2 * WORKERS):
        assert not isinstance(fetched, Rejected)
        yield _parsed(*fetched, columns)


def _fetched(root: str, path: str) -> tuple[str, bytes]:
    """Where a table lies, and its bytes."""
    filesystem, base = open_root(root)
    place = f"{base.rstrip('/')}/{path}"
    try:
        return place, read_whole(filesystem, place)
    except FileNotFoundError:
        raise UserError(f"{place} is missing: build the dataset again, only what is missing is redone") from None
    except OSError as error:
        raise _unreadable(place, error) from None


def _parsed(place: str, data: bytes, columns: Sequence[str] | None) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(data), columns=None if columns is None else list(columns), use_threads=False)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(place, error) from None


def _unreadable(place: str, error: Exception) -> UserError:
    return UserError(f"{place} cannot be read, build the dataset again: {' '.join(str(error).split())}")
