"""A folder of what URLs gave: pictures under the digests of their bytes, and a note for each URL.

A note is written as soon as its URL is settled, so that whatever ends a run nothing is asked for twice; of what may do
another time there is none. ``pictures/ab/ab12...`` (sha256 of the bytes) and ``urls/cd/cd34....json`` (of the URL).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from dataset_tools.errors import Rejected
from dataset_tools.fetch import map_in_order
from dataset_tools.images import DecodeSettings, decode_image
from dataset_tools.perceptual_hash import perceptual_hash
from dataset_tools.storage import open_root, write_bytes
from dataset_tools.storage_options import scrub
from dataset_tools.web import Visit, WebSettings, visit_all

_SMALL = DecodeSettings(min_side=1, max_side=256)
"""Enough for a perceptual hash."""
_LOOKS = 16
"""At once, into the folder."""


class Download(BaseModel):
    """What one URL gave."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    status: Literal["fetched", "moved", "failed"]
    """``moved``: to ``final_url`` on another host, which has a download of its own."""
    reason: str = ""
    """Of what failed: those of `dataset_tools.web.visit_all` and `dataset_tools.images.decode_image`."""
    message: str = ""
    transient: bool = False
    """Another run may fetch it."""
    http: int
    """Status of the last answer; 0 where there was none."""
    requests: int
    final_url: str
    sha256: str = ""
    size: int = 0
    """Bytes."""
    perceptual_hash: str = ""
    """16 hexadecimal digits: `dataset_tools.perceptual_hash.perceptual_hash` of the picture upright."""


_TYPES = {"http": pa.int64(), "requests": pa.int64(), "size": pa.int64(), "transient": pa.bool_()}
DOWNLOAD_SCHEMA = pa.schema([(name, _TYPES.get(name, pa.string())) for name in Download.model_fields])


class _Note(BaseModel):
    """A download, and the rules under which it came about."""

    download: Download
    rules: dict[str, Any]

    def holds(self, settings: WebSettings) -> bool:
        """Whether the URL would give the same under these settings."""
        then, now = self.rules, settings.rules()
        if self.download.status != "fetched":
            return then == now
        return (
            self.download.size <= settings.max_bytes
            and (then["robots"] or not settings.robots)
            and set(settings.disallowed_directives) <= set(then["disallowed_directives"])
            and (settings.allow_private_addresses or not then["allow_private_addresses"])
        )


def download(urls: Sequence[str], folder: str, settings: WebSettings) -> list[Download]:
    """Fetch pictures into a folder, but for those that lie there; gives what each URL gave, in their order.

    Args:
        urls: of which no two are equal; each has a host (`dataset_tools.web.host_of`).
        folder: any place (`dataset_tools.storage`).

    Raises:
        OSError: the folder cannot be written.
    """
    filesystem, base = open_root(folder)

    def known(url: str) -> Download | None:
        try:
            note = _Note.model_validate_json(filesystem.cat_file(f"{base}/{_note_path(url)}"))
        except (FileNotFoundError, ValidationError):
            return None
        lies = not note.download.sha256 or filesystem.exists(f"{base}/{picture_path(note.download.sha256)}")
        return note.download if lies and note.holds(settings) else None

    def keep(visit: Visit) -> None:
        found = _judged(visit)
        if found.sha256:
            write_bytes(filesystem, f"{base}/{picture_path(found.sha256)}", visit.data)
        if not found.transient:
            note = _Note(download=found, rules=settings.rules()).model_dump_json()
            write_bytes(filesystem, f"{base}/{_note_path(visit.url)}", note.encode())
        given[visit.url] = found

    given = {found.url: found for found in map_in_order(known, urls, _LOOKS, 4 * _LOOKS) if isinstance(found, Download)}
    visit_all([Visit(url) for url in urls if url not in given], settings, keep)
    return [given[url] for url in urls]


def are_there(downloads: Iterable[Download], folder: str) -> bool:
    """Whether the pictures of all that was fetched lie in a folder."""
    filesystem, base = open_root(folder)
    paths = [f"{base}/{picture_path(each.sha256)}" for each in downloads if each.sha256]
    return all(map_in_order(filesystem.exists, paths, _LOOKS, 4 * _LOOKS))


def picture_path(sha256: str) -> str:
    """Where a picture lies below the folder."""
    return f"pictures/{sha256[:2]}/{sha256}"


def _note_path(url: str) -> str:
    digest = hashlib.sha256(url.encode()).hexdigest()
    return f"urls/{digest[:2]}/{digest}.json"


def _judged(visit: Visit) -> Download:
    """What a visit gave; whatever a server calls it, a picture is what can be decoded."""
    told: dict[str, Any] = {
        **{"url": visit.url, "http": visit.http, "requests": visit.requests, "final_url": visit.final_url}
    }
    try:
        if visit.error is not None:
            raise visit.error
        if visit.moved:
            return Download(**told, status="moved")
        value = perceptual_hash(decode_image(visit.data, _SMALL).image)
    except Rejected as error:
        # It may repeat anything that a server said.
        message = scrub(error.message[:300]).encode("utf-8", "replace").decode()
        return Download(**told, status="failed", reason=error.reason, message=message, transient=error.transient)
    digest = hashlib.sha256(visit.data).hexdigest()
    return Download(**told, status="fetched", sha256=digest, size=len(visit.data), perceptual_hash=f"{value:016x}")
