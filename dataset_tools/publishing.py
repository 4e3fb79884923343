"""A dataset on the Hugging Face hub: uploaded so that it can be broken off anywhere, and checked afterwards.

The contents of large files go up first, each once; what the hub has already, be it of an earlier try or an earlier
version, does not go up again. Then a commit puts them in place, and removes shards that are no more. Where there are
more files than one commit takes, the manifest goes with the first and comes with the last: without it a dataset is not
complete, as on a disk.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.implementations.local import LocalFileSystem

from dataset_tools.card import SHEETS, hub_licence
from dataset_tools.errors import UserError, what_to_mend
from dataset_tools.opt_out import OptOut
from dataset_tools.perceptual_hash import perceptual_hash
from dataset_tools.records import ImageRecord, cell_to_text
from dataset_tools.schema import CONFIGURATIONS, SPLITS
from dataset_tools.shards import Manifest, ShardDataset, digests_of, read_manifest, verify
from dataset_tools.storage import open_root
from dataset_tools.weights import HUB_ID

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

MANIFEST = "manifest.json"
SHARDS = re.compile(rf"(?:{'|'.join(CONFIGURATIONS)})/(?:{'|'.join(SPLITS)})-\d{{6}}\.(?:tar|index\.json|parquet)")
"""Files on the hub that, beside contact sheets, an earlier version of a dataset may have put there. All others stay as
they are."""
COMMIT_FILES = 500
"""In one commit: the hub takes longer for each, and ends what takes too long."""
GROUP_BYTES = 1 << 30
"""Of files that go up together, unless one alone has more."""
SMALL = 10_000_000
"""Bytes: the hub takes any file that is larger apart from the commit."""

_NO_DERIVATIVES = re.compile(r"(?<![a-z])nd(?![a-z])|noderiv", re.IGNORECASE)
"""Of Creative Commons, any version: in an address, an SPDX id, or the long names, such as Attribution-NoDerivs."""

Progress = Callable[[int, int], None]
"""Is told how many bytes are on the hub, and how many there are."""


@dataclass(frozen=True)
class Published:
    """What was done."""

    commit: str
    """Hex id of the commit that has the dataset."""
    uploaded: list[str]
    """Files that were not on the hub."""
    removed: list[str]
    """Files of an earlier version that the dataset does not have any more."""
    replaced: bool
    """Whether earlier commits hold files that are not in the dataset any more."""


@dataclass(frozen=True)
class _File:
    """A file of the dataset."""

    path: str
    sha256: str
    size: int
    place: str
    """On the dataset's own file system."""


def check_publishable(root: str, opt_out: OptOut | None = None, workers: int = 2) -> list[str]:
    """See that a dataset may go out; gives what whoever publishes it should know, a line each.

    Args:
        opt_out: a list that it must not hold a picture of; by ids, addresses and sha256 of all source pictures, by
            perceptual hash of the pictures and backgrounds as they are in the shards.
        workers: shards that are read at once.

    Raises:
        UserError: it is not sound, or holds a picture that the list names.
    """
    manifest = read_manifest(root)
    problems = list(verify(root, workers))
    if problems:
        first = f"{problems[0].where}: {problems[0].what}"
        raise UserError(
            f"{root} is not sound and is not published: {first} ({len(problems)} problems in all; see mild verify "
            "and build again)"
        )
    if "attribution.csv" not in manifest.files:
        raise UserError(f"{root} has no attribution.csv, by which licences are known, and is not published")
    filesystem, base = open_root(root)
    text = io.StringIO(filesystem.cat_file(f"{base}/attribution.csv").decode(), newline="")
    try:
        credits = [{name: cell_to_text(cell) for name, cell in row.items()} for row in csv.DictReader(text)]
    except csv.Error as error:
        raise UserError(f"{root}/attribution.csv cannot be read ({error}), and is not published") from None
    if opt_out is not None:
        found = sum(_is_named(credit, opt_out) for credit in credits) or _count_alike(root, manifest, opt_out)
        if found:
            raise UserError(
                f"{root} holds {found} pictures that the opt-out list names and is not published: build it again with "
                "that list as opt_out"
            )
    return _licence_warnings(credits)


def _is_named(credit: dict[str, str], opt_out: OptOut) -> bool:
    record = ImageRecord(
        *(credit["id"], credit["source"], "train", "people", "", ""),
        url=credit["url"],
        landing_url=credit["landing_url"],
    )
    return bool(opt_out.named(record) or opt_out.holds(credit["sha256"], ""))


def _count_alike(root: str, manifest: Manifest, opt_out: OptOut) -> int:
    if not opt_out.phash:
        return 0
    found = 0
    for configuration, splits in manifest.shards.items():
        for shards in splits.values():
            for sample in ShardDataset.of_shards(root, shards).stream():
                shown = [sample.background] if configuration == "composite" else [sample.image, sample.background]
                hashes = [f"{perceptual_hash(picture):016x}" for picture in shown if picture is not None]
                found += any(opt_out.holds("", value) for value in hashes)
    return found


def _licence_warnings(credits: Sequence[dict[str, str]]) -> list[str]:
    """Of source pictures whose licence may not allow what publishing does: passing them on, cut out and pasted."""
    licences = Counter(credit["licence"] for credit in credits)
    unchanged = {name: count for name, count in licences.items() if _NO_DERIVATIVES.search(name)}
    unclear = {
        name or "not stated": count
        for name, count in licences.items()
        if hub_licence(name) == "other" and name not in unchanged
    }
    return [
        *(f"{count} source pictures have the licence {name!r}: see whether it allows to pass them on"
          for name, count in sorted(unclear.items())),
        *(f"{count} source pictures have the licence {name!r}, which forbids to pass on altered pictures"
          for name, count in sorted(unchanged.items())),
    ]  # fmt: skip


def publish(
    root: str, repo: str, *, revision: str = "main", public: bool = False, squash: bool = False, progress: Progress
) -> Published:
    """Upload the dataset at ``root``, which `check_publishable` found sound; what the hub has is not sent again.

    The token is the hub's own library's: of the environment variable ``HF_TOKEN``, or of its log-in.

    Args:
        repo: ``owner/name`` of a dataset on the hub; made, and private, where there is none.
        revision: branch; made where there is none.
        public: a new one is public; needed for one that is public already.
        squash: forget the branch's earlier commits, and what they alone hold.

    Raises:
        UserError: it cannot be uploaded; what went up stays there, and the next try goes on. Or what the hub then has
            is something else.
    """
    if HUB_ID.fullmatch(repo) is None:
        raise UserError(f"{repo} is no dataset of the hub: write owner/name")
    from huggingface_hub import HfApi
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return _Publication(HfApi(), root, repo, revision).run(public, squash, progress)
    except UserError:
        raise
    except Exception as error:  # the hub's and its HTTP library's errors have no common base class
        if what_to_mend(error):
            raise
        why = " ".join(str(error).split()) or type(error).__name__
        cure = "log in (hf auth login) or set HF_TOKEN" if re.search(r"\b(401|403)\b", why) else "start again to go on"
        raise UserError(f"{repo} could not be published: {why}; what went up is kept, {cure}") from None
    finally:
        if shown:
            enable_progress_bars()


class _Publication:
    def __init__(self, api: HfApi, root: str, repo: str, revision: str) -> None:
        self.api, self.repo, self.revision = api, repo, revision
        self.manifest = read_manifest(root)
        self.filesystem, self.base = open_root(root)
        self.on_hub: dict[str, Any] = {}
        """What the hub tells of each file of the branch."""

    def run(self, public: bool, squash: bool, progress: Progress) -> Published:
        self._prepare(public)
        files = list(self._files())
        self.on_hub = self._listed(self.revision)
        new = [file for file in files if not self._is_there(file, self.on_hub)]
        ours = {path for path in self.on_hub if path in SHEETS or SHARDS.fullmatch(path)}
        removed = sorted(ours - {file.path for file in files})
        replaced = bool(removed) or any(file.path in self.on_hub for file in new)
        total = sum(file.size for file in files)
        done = total - sum(file.size for file in new)
        progress(done, total)
        additions: list[CommitOperationAdd] = []
        for group in _groups(new):
            with tempfile.TemporaryDirectory(prefix="publish-") as folder:
                some = [self._addition(file, Path(folder, str(number))) for number, file in enumerate(group)]
                self.api.preupload_lfs_files(self.repo, some, repo_type="dataset", revision=self.revision)
            additions += some
            done += sum(file.size for file in group)
            progress(done, total)
        commit = self._commit(additions, removed)
        self._check(files, commit)
        if squash:
            self.api.super_squash_history(self.repo, branch=self.revision, repo_type="dataset")
            commit = self._check(files, self.revision)
        return Published(commit, [file.path for file in new], removed, replaced and not squash)

    def _prepare(self, public: bool) -> None:
        self.api.create_repo(self.repo, repo_type="dataset", private=not public, exist_ok=True)
        private = self.api.repo_info(self.repo, repo_type="dataset").private
        if not public and not private:
            raise UserError(f"{self.repo} is public: add --public where everybody is to see the dataset")
        if public and private:
            raise UserError(
                f"{self.repo} is private: make it public in its settings on the hub where everybody is to see it, or "
                "leave --public out"
            )
        if self.revision != "main":
            self.api.create_branch(self.repo, branch=self.revision, repo_type="dataset", exist_ok=True)

    def _files(self) -> Iterator[_File]:
        """All files of the dataset; the manifest, by which it is complete, last."""
        listed = [s for splits in self.manifest.shards.values() for shards in splits.values() for s in shards]
        digests = dict(self.manifest.files)
        for shard in listed:
            digests |= digests_of(shard)  # of those without a sample too: the index tells why
        for path in (*digests, MANIFEST):
            place = f"{self.base}/{path}"
            sha256 = digests.get(path) or hashlib.sha256(self.filesystem.cat_file(place)).hexdigest()
            yield _File(path, sha256, self.filesystem.size(place), place)

    def _listed(self, revision: str) -> dict[str, Any]:
        from huggingface_hub import RepoFile

        entries = self.api.list_repo_tree(self.repo, recursive=True, revision=revision, repo_type="dataset")
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _is_there(self, file: _File, on_hub: dict[str, Any]) -> bool:
        """Whether the hub has a file as it is here; of small ones it tells git's own digest alone."""
        entry = on_hub.get(file.path)
        if entry is None or entry.size != file.size:
            return False
        if entry.lfs is not None:
            return bool(entry.lfs.sha256 == file.sha256)
        data = self.filesystem.cat_file(file.place)
        return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())

    def _addition(self, file: _File, copy: Path) -> CommitOperationAdd:
        from huggingface_hub import CommitOperationAdd

        if isinstance(self.filesystem, LocalFileSystem):
            return CommitOperationAdd(file.path, file.place)
        if file.size < SMALL:
            return CommitOperationAdd(file.path, self.filesystem.cat_file(file.place))
        self.filesystem.get_file(file.place, str(copy))
        return CommitOperationAdd(file.path, copy)

    def _commit(self, additions: Sequence[CommitOperationAdd], removed: Sequence[str]) -> str:
        """Put everything in place; gives the id of the last commit, or of what is there where nothing changes."""
        from huggingface_hub import CommitOperationDelete

        operations: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(path) for path in removed]
        operations += additions
        commits = [operations[start : start + COMMIT_FILES] for start in range(0, len(operations), COMMIT_FILES)]
        stale = MANIFEST in self.on_hub and any(addition.path_in_repo == MANIFEST for addition in additions)
        head = str(self.api.repo_info(self.repo, repo_type="dataset", revision=self.revision).sha)
        for number, some in enumerate(commits):
            first = number == 0 and len(commits) > 1 and stale
            head = self.api.create_commit(
                self.repo,
                [*some, *([CommitOperationDelete(MANIFEST)] if first else [])],
                commit_message=f"{self.manifest.name}, digest {self.manifest.digest()[:16]}",
                repo_type="dataset",
                revision=self.revision,
                parent_commit=head,
            ).oid
        return head

    def _check(self, files: Sequence[_File], revision: str) -> str:
        """The commit of a revision. Raises `UserError` where a file there is not as it is here."""
        on_hub = self._listed(revision)
        for file in files:
            if not self._is_there(file, on_hub):
                raise UserError(
                    f"{self.repo}: {file.path} is not on the hub as it is here, with the sha256 {file.sha256}: did "
                    "something else change it? Publish again"
                )
        return str(self.api.repo_info(self.repo, repo_type="dataset", revision=revision).sha)


def _groups(files: Sequence[_File]) -> Iterator[list[_File]]:
    """Files that go up together: 100 of them and `GROUP_BYTES` at most, or one."""
    group: list[_File] = []
    for file in files:
        if group and (len(group) == 100 or sum(each.size for each in group) + file.size > GROUP_BYTES):
            yield group
            group = []
        group.append(file)
    if group:
        yield group
