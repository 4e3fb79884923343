"""What runs and artifacts are called on Prefect's pages: each name says what it is of."""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath

from prefect.runtime import flow_run
from prefect.utilities.slugify import slugify


def short_name(place: str) -> str:
    """The last two parts of a place: ``build/sample`` of ``/data/build/sample``, ``bucket/sample`` of a URL."""
    return "/".join(PurePosixPath(place.lstrip("/")).parts[-2:])


def flow_run_name() -> str:
    """What the current flow run reads and makes, such as ``train build/sample -> build/sample-adapters``."""
    given = flow_run.parameters
    read, made = str(given.get("dataset") or ""), str(given.get("output") or given.get("root"))
    return " ".join([str(flow_run.flow_name), *([short_name(read), "->"] if read else []), short_name(made)])


def artifact_key(what: str, root: str) -> str:
    """Key of an artifact, in kebab-case: two outputs never share one.

    Args:
        what: such as ``dataset-shards``.
        root: the output that it is of, as `dataset_tools.storage.normal_place` writes it.
    """
    return f"{what}-{slugify(short_name(root))}-{hashlib.sha256(root.encode()).hexdigest()[:8]}"
