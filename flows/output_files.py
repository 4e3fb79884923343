"""What runs on one output wrote there: only that is overwritten or removed, and what a manifest describes stands."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence

from dataset_tools.card import SHEETS
from dataset_tools.errors import UserError
from dataset_tools.shards import index_path, read_manifest, table_path
from dataset_tools.storage import abort_uploads, files_in, is_url, open_root, remove_partials, write_bytes
from flows.caching import Job

MADE = "made.json"
"""Below the work folder: what runs on this output may have written, path to what decided about it then."""


class OutputFiles:
    """The files of a dataset and the jobs that write them. For one run at a time (`flows.output_lock`).

    Args:
        root: of the dataset.
        work: its work folder.
    """

    def __init__(self, root: str, work: str) -> None:
        self._root, self._work = root, work
        self._made = self._made_before()

    def check(self, beside_shards: Sequence[str]) -> None:
        """See that nothing of somebody else stands where runs write.

        Args:
            beside_shards: files that runs write beside shards.

        Raises:
            UserError: there are files which no run on this output wrote and this one would overwrite.
        """
        made = {path.partition("/")[0] for path in self._made}
        # All of them are written together, the manifest last.
        self._refuse_to_overwrite([] if made & set(beside_shards) else [*beside_shards, "manifest.json"])

    def remove_unfinished(self, folders: Iterable[str], of_work: Iterable[str]) -> None:
        """Remove what killed processes left under construction, but not what a living one holds.

        Args:
            folders: below the dataset, those that runs write to.
            of_work: folders below the work folder that runs write to.
        """
        if is_url(self._root):
            for place in (self._root, self._work):
                abort_uploads(place)
        else:
            for place, names in ((self._root, folders), (self._work, of_work)):
                base = open_root(place)[1]
                for folder in (base, *(f"{base}/{name}" for name in names)):
                    remove_partials(folder)

    def plan(self, jobs: Mapping[str, Job]) -> None:
        """Note what is about to be written, path to job, and what decides about it. `withdraw` is called before it is.

        Raises:
            UserError: a shard would take the place of one which no run on this output wrote.
        """
        keys = {path: job.decided_by() for path, job in jobs.items()}
        if all(self._made.get(path) == key for path, key in keys.items()):
            return
        new = [path for path in keys if path not in self._made and path.endswith(".tar")]
        self._refuse_to_overwrite([place for path in new for place in (path, table_path(path), index_path(path))])
        self.withdraw()
        self._note(self._made | keys)

    def withdraw(self) -> None:
        """Remove the manifest: what one describes must stand, and a file that it names is about to be written."""
        filesystem, base = open_root(self._root)
        if filesystem.exists(f"{base}/manifest.json"):
            filesystem.rm_file(f"{base}/manifest.json")

    def remove_others(self, shards: Iterable[str], files: Iterable[str]) -> None:
        """Delete shards and contact sheets of an earlier plan of this output, which no manifest names any more.

        Args:
            shards: that the manifest names.
            files: that it names beside shards.
        """
        filesystem, base = open_root(self._root)
        former = {path for path in self._made if path.endswith(".tar")} - set(shards)
        there = {f"card/{name}" for name in files_in(filesystem, f"{base}/card")}
        for sheet in sorted(there & SHEETS - set(files)):
            filesystem.rm_file(f"{base}/{sheet}")
        for path in sorted(former):
            for place in (path, table_path(path), index_path(path)):
                if filesystem.exists(f"{base}/{place}"):
                    filesystem.rm_file(f"{base}/{place}")
        if former:
            self._note({path: key for path, key in self._made.items() if path not in former})

    def _made_before(self) -> dict[str, str]:
        filesystem, work = open_root(self._work)
        place = f"{work}/{MADE}"
        made: dict[str, str] = json.loads(filesystem.cat_file(place)) if filesystem.exists(place) else {}
        with contextlib.suppress(UserError):
            manifest = read_manifest(self._root)
            held = manifest.shards.values()
            listed = {shard.path for splits in held for shards in splits.values() for shard in shards}
            made = dict.fromkeys([*listed, *manifest.files], "") | made
        return made

    def _note(self, made: dict[str, str]) -> None:
        self._made = made
        filesystem, work = open_root(self._work)
        write_bytes(filesystem, f"{work}/{MADE}", json.dumps(made, sort_keys=True).encode())

    def _refuse_to_overwrite(self, paths: Sequence[str]) -> None:
        filesystem, base = open_root(self._root)
        there = {path.removeprefix(base).lstrip("/") for path in filesystem.find(base)} if paths else set()
        for path in paths:
            if any(name == path or name.startswith(f"{path}/") for name in there):
                raise UserError(
                    f"output {self._root} holds {path}, which no build is known to have written there, and which this "
                    "one would overwrite; name another folder, or move it away"
                )
