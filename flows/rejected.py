"""Whether so much of what was chosen had to be set aside that the run is at fault, and not the pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow.parquet as pq

from dataset_tools.errors import UserError
from dataset_tools.shards import Shard
from dataset_tools.storage import open_root, written_whole
from flows.caching import forget
from flows.dataset_steps import ShardJob, all_rejected
from flows.settings import BuildSettings

What = Literal["pictures", "composites"]


def check_rejected(
    settings: BuildSettings,
    root: str,
    jobs: Sequence[ShardJob],
    shards: Sequence[Shard],
    curated_rejected: str,
    what: What,
) -> None:
    """Raise `UserError` where more was set aside than ``max_rejected_share`` allows; what is at fault is forgotten.

    Args:
        root: of the dataset.
        jobs: of all shards of a configuration; there may be none.
        shards: what they made, in the same order.
        curated_rejected: name below the work folder of the table of what curation set aside.
        what: they hold.
    """
    work = f"{root}.work"
    rejected = all_rejected(root, work, curated_rejected, shards)
    rows = [row for row in rejected.to_pylist() if _counts(row, what)]
    lost, made = len(rows), sum(shard.samples for shard in shards)
    allowed = settings.max_rejected_share
    # One bad picture never ends a run, be it one of two.
    if made and lost <= (max(1, allowed * (made + lost)) if allowed else 0):
        return
    forget(job for job, shard in zip(jobs, shards, strict=True) if shard.rejected)
    kind = settings.source.kind
    if not lost and not len(rejected):
        raise UserError(f"{kind}: curation chose no picture: there is none, or the settings below source allow none")
    filesystem, base = open_root(work)
    with written_whole(filesystem, f"{base}/rejected.parquet") as partial:
        pq.write_table(rejected, partial)
    counts = Counter(rejected["reason"].to_pylist() if not lost else (row["reason"] for row in rows))
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common(3))
    problem = (
        f"{lost} of {made + lost} {what} ({lost / (made + lost):.0%}) were set aside, more than max_rejected_share "
        f"({allowed:g}) allows"
        if made
        else f"none of the {what} could be used"
    )
    raise UserError(
        f"{kind}: {problem}: {reasons}; {work}/rejected.parquet has every one with its reason. Mend the cause "
        "and build again" + (", or raise max_rejected_share" if made else "")
    )


def _counts(row: dict[str, Any], what: What) -> bool:
    """Whether a row of ``rejected.parquet`` counts for ``max_rejected_share``.

    A picture or composite that was chosen and is not there. Not so what curation did not choose, nor what somebody
    wants left out, nor whose quality or masks do not do, which is as good as not chosen; of these that counts which
    could not be read.
    """
    chosen = row["transient"] or row["stage"] not in ("curate", "opt-out", "quality", "mask")
    return row["outcome"] == "image-rejected" and chosen and (what == "pictures" or row["stage"] != "curate")
