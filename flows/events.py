"""Events that start what comes next: sent when what stands at an output is another than before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from prefect.events import emit_event

from dataset_tools.storage import is_url, open_root, write_bytes

ANNOUNCED = "announced.json"
"""Below the work folder: the digest of what the last event spoke of."""


def announce(
    what: Literal["dataset", "adapters", "evaluation"], root: str, digest: str, *, dataset: str, payload: dict[str, str]
) -> None:
    """Emit the event that dataset, adapters or evaluation are ready, unless it was for these very results before.

    Must be called from the flow that a deployment runs, so that the event names the deployment.

    Args:
        root: where they stand; the event's resource ends in its URL.
        digest: of them.
        dataset: name of the dataset that they are or come of; the resource is called so.
        payload: what the next deployment is to be given; ``digest`` is added.
    """
    filesystem, work = open_root(f"{root}.work")
    told = f"{work}/{ANNOUNCED}"
    if filesystem.exists(told) and json.loads(filesystem.cat_file(told)) == digest:
        return
    uri = root if is_url(root) else Path(root).as_uri()
    emit_event(
        f"mild.{what}.ready",
        resource={"prefect.resource.id": f"mild.{what}.{uri}", "prefect.resource.name": dataset},
        payload={**payload, "digest": digest},
    )
    write_bytes(filesystem, told, json.dumps(digest).encode())
