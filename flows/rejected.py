"""Whether so much of what was chosen had to be set aside that the run is at fault, and not the pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset_tools.errors import UserError
from dataset_tools.storage import open_root, written_whole
from flows.caching import forget
from flows.dataset_steps import BuiltShard, ShardJob, all_rejected, lost_rows, read_table
from flows.settings import BuildSettings

What = Literal["pictures", "composites"]


def check_rejected(
    settings: BuildSettings,
    root: str,
    jobs: Sequence[ShardJob],
    built: Sequence[BuiltShard],
    curated_rejected: str,
    what: What,
) -> None:
    """Raise `UserError` where more was set aside than ``max_rejected_share`` allows; what is at fault is forgotten.

    Args:
        root: of the dataset.
        jobs: of all shards of a configuration; there may be none.
        built: what they made, in the same order.
        curated_rejected: name below the work folder of the table of what curation set aside.
        what: they hold.
    """
    work, kind = f"{root}.work", settings.source.kind
    made, missing = sum(each.shard.samples for each in built), sum(each.lost for each in built)
    if what == "pictures":
        missing += lost_rows(read_table(work, curated_rejected)).num_rows
    allowed = settings.max_rejected_share
    # One bad picture never ends a run, be it one of two.
    if made and missing <= (max(1, allowed * (made + missing)) if allowed else 0):
        return
    forget(job for job, each in zip(jobs, built, strict=True) if each.shard.rejected)
    rejected = all_rejected(root, work, curated_rejected, [each.shard for each in built])
    if not missing and not len(rejected):
        raise UserError(f"{kind}: curation chose no picture: there is none, or the settings below source allow none")
    filesystem, base = open_root(work)
    with written_whole(filesystem, f"{base}/rejected.parquet") as partial:
        pq.write_table(rejected, partial)
    rows = rejected
    if missing:
        rows = lost_rows(rejected if what == "pictures" else rejected.filter(pc.field("stage") != "curate"))
    reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(rows["reason"].to_pylist()).most_common(3))
    problem = (
        f"{missing} of {made + missing} {what} ({missing / (made + missing):.0%}) were set aside, more than "
        f"max_rejected_share ({allowed:g}) allows"
        if made
        else f"none of the {what} could be used"
    )
    raise UserError(
        f"{kind}: {problem}: {reasons}; {work}/rejected.parquet has every one with its reason. Mend the cause "
        "and build again" + (", or raise max_rejected_share" if made else "")
    )
