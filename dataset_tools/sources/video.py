"""Source ``video``: clips of cameras that stand still become true pairs, as a folder that the source ``pairs`` reads.

Each clip gets a folder of its own with its pictures, plates, maps of what is known, masks and ``clip.json``;
`write_list` makes them one list of pairs.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from fsspec.implementations.local import LocalFileSystem
from pydantic import Field, field_validator

from dataset_tools.clips.pairs import ClipPairs, ClipSettings, pairs_of_clip
from dataset_tools.clips.reading import CLIP_SUFFIXES
from dataset_tools.errors import Rejected, UserError
from dataset_tools.estimators import InstanceEstimator
from dataset_tools.fetch import OUR_MACHINE, FetchSettings, copy_file, open_filesystem, with_retries
from dataset_tools.file_names import infos_below, printable
from dataset_tools.folders import folder_written_whole
from dataset_tools.pair_list import PAIR_LIST, SET_ASIDE, PairRow, pair_list, set_aside_list
from dataset_tools.ranges import is_http
from dataset_tools.records import Rejection
from dataset_tools.sources.pairs import PairsSettings
from dataset_tools.splits import SplitShares
from dataset_tools.storage import is_url, open_root, version_of, write_bytes
from dataset_tools.storage_options import Location, StorageOptions

CLIP_REPORT = "clip.json"
"""What became of a clip, in its folder."""


class VideoSettings(ClipSettings):
    """Clips of cameras that stand still."""

    kind: Literal["video"] = "video"
    clips: tuple[Location, ...] = Field(min_length=1)
    """Folder of clips, searched with its subfolders, or a list of folders and files: paths or fsspec URLs."""
    clips_options: StorageOptions = Field({})
    """fsspec storage options of the clips; secrets are named, as ``{env: NAME}`` or ``{block: secret/NAME}``."""
    splits: SplitShares = Field({"train": 0.8, "validation": 0.1, "test": 0.1})
    """Share of each split. A clip's split follows from its bytes: all its pictures, and copies, come into one."""
    licence: str = ""
    """Licence of all clips."""
    author: str = ""
    """Author of all clips."""
    fetch: FetchSettings = FetchSettings()

    @field_validator("clips", mode="before")
    @classmethod
    def _several(cls, clips: Any) -> Any:
        return (clips,) if isinstance(clips, str) else clips

    def how(self) -> ClipSettings:
        """The part that decides about what becomes of a clip."""
        return ClipSettings(**self.model_dump(include=set(ClipSettings.model_fields)))

    def pairs(self, root: str) -> PairsSettings:
        """The source that reads what was made of the clips below ``root``."""
        return PairsSettings(root=root, splits=self.splits, licence=self.licence, author=self.author)


@dataclass(frozen=True)
class ClipFile:
    """A clip that is there."""

    place: str
    """Path or URL."""
    name: str
    """Below the folder that the settings name."""
    state: tuple[str, ...]
    """Size, and what changes with the content, as the store tells."""

    @property
    def folder(self) -> str:
        """Name of the folder of its pairs: letters, digits and ``-``."""
        plain = unicodedata.normalize("NFKD", PurePosixPath(self.name).stem).encode("ascii", "ignore").decode()
        slug = re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")[:48] or "clip"
        return f"{slug}-{hashlib.sha256(self.name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def list_clips(settings: VideoSettings) -> tuple[list[ClipFile], list[Rejection]]:
    """The clips, by name, and the files beside them that are none by their suffix.

    Raises:
        UserError: a place does not exist, cannot be listed or holds no clip; or two clips have one name.
    """
    clips: dict[str, ClipFile] = {}
    rejected: list[Rejection] = []
    for place in settings.clips:
        found = _files(place, settings)
        for name, state in sorted(found.items()):
            if not name.lower().endswith(CLIP_SUFFIXES):
                message = f"{printable(name)} is not one of {', '.join(CLIP_SUFFIXES)}"
                rejected.append(Rejection("", printable(name), "", "curate", "row-rejected", "unknown-suffix", message))
                continue
            clip = ClipFile(place if _is_clip(place) else f"{place}/{name}", name, state)
            if clip.folder in clips:
                raise UserError(f"clips: {clips[clip.folder].place} and {clip.place} have one name; rename one")
            clips[clip.folder] = clip
        if not any(_is_clip(name) for name in found):
            raise UserError(f"clips: {place} holds no clips ({', '.join(CLIP_SUFFIXES)})")
    return sorted(clips.values(), key=lambda clip: clip.name), rejected


def write_pairs(
    clip: ClipFile, settings: ClipSettings, instances: InstanceEstimator | None, root: str, access: VideoSettings
) -> bool:
    """Write the folder of a clip below ``root``, whole; the same clip and settings give the same bytes.

    Args:
        clip: one of `list_clips`.
        settings: how pairs are made.
        instances: see `dataset_tools.clips.pairs.pairs_of_clip`.
        root: fsspec URL or local path.
        access: says how the clip is come by.

    Returns:
        Whether the clip could be fetched; else another try may do.

    Raises:
        OSError: the fault is this machine's: a full disk, too many open files.
    """
    files: dict[str, bytes] = {}
    fetched = True
    with tempfile.TemporaryDirectory(prefix="mild-clip-") as temporary:
        try:
            path = Path(clip.place)
            if is_url(clip.place):
                path = Path(temporary, f"clip{PurePosixPath(clip.name).suffix}")
                copy_file(clip.place, str(path), None, access.fetch, access.clips_options)
            pairs = pairs_of_clip(path, clip.folder, settings, instances, files.__setitem__)
        except OSError as error:
            if error.errno in OUR_MACHINE:
                raise
            pairs = ClipPairs("", refused=[Rejected("read-failed", str(error.strerror), transient=True)])
        except Rejected as error:
            pairs = ClipPairs("", refused=[error])
    fetched = not any(why.transient for why in pairs.refused)
    files[CLIP_REPORT] = _report(clip, pairs)
    filesystem, base = open_root(f"{root}/{clip.folder}")
    if not isinstance(filesystem, LocalFileSystem):
        for name, data in files.items():
            filesystem.pipe_file(f"{base}/{name}", data)
        return fetched
    with folder_written_whole(base, CLIP_REPORT) as partial:
        for name, data in files.items():
            (partial / name).write_bytes(data)
    return fetched


def write_list(folders: Iterable[str], rejected: Iterable[Rejection], root: str) -> tuple[str, str]:
    """Write the list of the pairs of several clips, and what was set aside; gives the names of both files.

    Args:
        folders: of the clips, below ``root``, as `write_pairs` wrote them.
        rejected: what was set aside before.
        root: fsspec URL or local path.
    """
    filesystem, base = open_root(root)
    rows: list[PairRow] = []
    set_aside = list(rejected)
    first: dict[str, str] = {}
    for folder in folders:
        report = json.loads(filesystem.cat_file(f"{base}/{folder}/{CLIP_REPORT}"))
        group, name = report["group"], report["name"]
        same = first.setdefault(group, name) if group else name
        if same != name:
            message = f"{name} has the same bytes as {same}"
            set_aside.append(Rejection("", folder, "", "curate", "image-rejected", "duplicate-clip", message))
            continue
        rows += [PairRow.model_validate(row) for row in report["rows"]]
        set_aside += [Rejection(**row) for row in report["rejected"]]
    write_bytes(filesystem, f"{base}/{PAIR_LIST}", pair_list(rows))
    write_bytes(filesystem, f"{base}/{SET_ASIDE}", set_aside_list(set_aside))
    return PAIR_LIST, SET_ASIDE


def _report(clip: ClipFile, pairs: ClipPairs) -> bytes:
    name = printable(clip.name)
    # A clip of which something can be used is not set aside, only what else is in it.
    outcome: Literal["row-rejected", "image-rejected"] = "row-rejected" if pairs.rows else "image-rejected"
    rejected = [
        Rejection("", clip.folder, "", "curate", outcome, why.reason, f"{name}: {why.message}", why.transient)
        for why in pairs.refused
    ] + [
        Rejection("", clip.folder, "", "curate", "mended", reason, f"{name}: {message}")
        for reason, message in pairs.mended
    ]
    document = {
        "name": name,
        "group": pairs.group,
        "views": pairs.views,
        "rejected": [asdict(row) for row in rejected],
        "rows": [row.model_dump(mode="json", exclude_defaults=True) for row in pairs.rows],
    }
    return f"{json.dumps(document, indent=1)}\n".encode()


def _is_clip(name: str) -> bool:
    return name.lower().endswith(CLIP_SUFFIXES)


def _files(place: str, settings: VideoSettings) -> dict[str, tuple[str, ...]]:
    """Names below a folder, or the name of a file, each with its size and version. Raises `UserError`."""

    def find() -> dict[str, Any]:
        filesystem, path = open_filesystem(place, settings.fetch, settings.clips_options)
        if _is_clip(place) and not (is_http(filesystem) or filesystem.isdir(path)):
            return {PurePosixPath(path).name: filesystem.info(path)}
        if is_http(filesystem):
            if not _is_clip(place):
                raise UserError(f"clips: {place} cannot be listed over HTTP; name each clip")
            return {PurePosixPath(path).name: filesystem.info(path)}
        if not filesystem.isdir(path):
            raise UserError(f"clips: {place} does not exist")
        return infos_below(filesystem, path)

    try:
        found = with_retries(find, place, settings.fetch)
    except Rejected as error:
        raise UserError(f"clips: {error.message}") from None
    return {name: tuple(version_of(info)) for name, info in found.items()}
