"""Tables and pictures in Prefect's pages; to be called by `flows.progress.Display.show`."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image
from prefect.artifacts import create_image_artifact, create_table_artifact

from dataset_tools.shards import Shard
from dataset_tools.storage import open_root
from flows.names import artifact_key

LONGEST_SIDE = 1040
"""Pixels of a picture: Prefect refuses events beyond 1.5 MB."""


def show_picture(data: bytes, *, key: str, description: str) -> None:
    """Show a picture file. Prefect serves no files, so that a JPEG of it is the artifact itself, as its URL.

    Args:
        key: of the artifact, in kebab-case.
    """
    with Image.open(io.BytesIO(data)) as picture:
        small = picture.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=85)
    url = f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
    create_image_artifact(url, key=key, description=description)


def show_dataset(summary: dict[str, Any], shards: dict[str, dict[str, list[Shard]]]) -> None:
    """What a build came to: its shards, what was set aside, and the first samples.

    Args:
        summary: of `flows.build_dataset.build_dataset`.
        shards: configuration to split to shards.
    """
    root = summary["dataset"]
    create_table_artifact(
        [
            {
                "configuration": configuration,
                "split": split,
                "samples": sum(shard.samples for shard in held),
                "people": sum(shard.people for shard in held),
                "shards": len(held),
                "MB": round(sum(shard.size for shard in held) / 1e6, 1),
            }
            for configuration, splits in shards.items()
            for split, held in splits.items()
        ],
        key=artifact_key("dataset-shards", root),
        description=f"{root}: {summary['cached']} of {summary['shards']} shards were cached",
    )
    create_table_artifact(
        [{"reason": reason, "rows": count} for reason, count in summary["rejected"].items()],
        key=artifact_key("dataset-rejected", root),
        description=f"{root}: what was set aside or mended, by reason; rejected.parquet has every row",
    )
    filesystem, base = open_root(root)
    sheets = sorted(filesystem.find(f"{base}/card"))
    if sheets:
        key = artifact_key("dataset-contact-sheet", root)
        show_picture(filesystem.cat_file(sheets[0]), key=key, description=f"{root}: first samples")
