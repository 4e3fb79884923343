"""Places, and writing files whole or not at all, on any fsspec filesystem.

A place is what a user names a folder or file by: a local path (absolute, relative, or below ``~`` or ``~user``), a
``file:`` URL, or a URL of another filesystem that fsspec knows, such as ``s3://bucket/folder``. `normal_place` says
what each means, and everything that opens a place goes through it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Annotated, Any
from urllib.parse import unquote

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import available_protocols, registry
from pydantic import AfterValidator

from dataset_tools.errors import UserError, what_to_mend

PARTIAL_SUFFIX = ".mild-partial"
"""Ending of files and folders under construction; a killed run may leave some, `remove_partials` clears them."""


_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)((?:::[A-Za-z][A-Za-z0-9+.-]*)*)://(.*)", re.DOTALL)
"""Protocol, protocols that it is chained to, and the rest."""
_FILE_URL = re.compile(r"(?:file|local):(?://(?:localhost)?(/.*)|(/(?!/).*))", re.DOTALL | re.IGNORECASE)
"""``file:///path``, with or without a host that is this machine, and ``file:/path`` (RFC 8089)."""


def normal_place(text: str | os.PathLike[str]) -> str:
    """The one way in which a place is written: an absolute local path, or a URL; without slashes at its end.

    ``~`` and ``~user`` at the start are home folders, a ``file:`` URL is the path that it names (``%20`` is a space
    there), and a relative path begins at the working directory. All other characters of a local path stand for
    themselves, and URLs of other filesystems stay as they are. A local name that looks like one of these is written
    with ``./`` before it. The result is a place that means the same.

    Raises:
        UserError: the text is empty, holds a NUL, or names a user, a filesystem or a host that is not known.
    """
    text = os.fspath(text)
    if not text or "\0" in text:
        raise UserError(f"{text!r} is no place: name a folder, a file or a URL")
    if found := _FILE_URL.fullmatch(text):
        return _local(unquote(found[1] or found[2], errors="surrogateescape"))
    protocol, colon, rest = text.partition(":")
    if colon and (protocol.lower() in ("file", "local") or re.match("/(?!/)", rest)) and _is_known(protocol):
        raise UserError(f"{text} is not complete: write {protocol}:///folder for a URL, ./{text} for a local path")
    if found := _URL.fullmatch(text):
        first, chained, rest = found[1].lower(), found[2].lower(), found[3].rstrip("/")
        for protocol in [first, *chained.split("::")[1:]]:
            if not _is_known(protocol):
                raise UserError(
                    f"{text}: Protocol not known: {protocol}; a local path of that name is written ./{text}"
                )
        if not rest and first != "memory":
            raise UserError(f"{text} names no folder or file")
        return f"{first}{chained}://{rest}"
    if text.startswith("~"):
        home = os.path.expanduser(text)
        if home.startswith("~"):
            user = text.split("/")[0]
            cure = "set HOME" if user == "~" else f"a path of that name is written ./{text}"
            raise UserError(f"{text}: there is no home folder {user}; {cure}")
        return _local(home)
    return _local(text)


def _is_known(protocol: str) -> bool:
    return protocol.lower() in {*available_protocols(), *registry}


def _local(path: str) -> str:
    if not path.startswith("/"):
        path = f"{os.getcwd()}/{path}"
    # What stands before ".." may be a link: only the disk knows where that leads.
    return re.sub("^/+", "/", os.path.realpath(path) if ".." in path.split("/") else os.path.normpath(path))


def is_url(place: str) -> bool:
    """Whether a place that `normal_place` gave is elsewhere than on a local disk."""
    return not place.startswith("/")


def local_place(text: str | os.PathLike[str], what: str) -> str:
    """`normal_place` of ``what`` can only be on a local disk, such as ``adapters``; raises `UserError` for a URL."""
    place = normal_place(text)
    if is_url(place):
        raise UserError(f"{place}: {what} can only be on a local disk; name a folder there, and copy it afterwards")
    return place


def local_path(text: str, what: str) -> str:
    """`local_place` as it was typed, so that it is told in the same words, where the system understands that."""
    place = local_place(text, what)
    return text if os.path.abspath(text) == place else place


PlaceSetting = Annotated[str, AfterValidator(normal_place)]
"""A field of settings that holds a place."""


def open_root(root: str | os.PathLike[str]) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem and path of a place. Raises `UserError` as `normal_place`, or where its library is missing."""
    place = normal_place(root)
    if not is_url(place):
        # Not through fsspec, which would take "::" in a name for a chain.
        return LocalFileSystem(), place
    # What other processes write and delete is to be seen: fsspec would answer from its last listing of a folder.
    options = {} if "::" in place else {"use_listings_cache": False}
    try:
        filesystem, path = fsspec.core.url_to_fs(place, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"{root}: {error}") from None
    return filesystem, path


def files_in(filesystem: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    """Names of the files that lie in a folder itself, sorted; none where there is no such folder.

    To be filtered by the caller: in a glob, brackets and stars of the folder's own name would mean something else.
    """
    try:
        found = filesystem.ls(folder, detail=True, refresh=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(info["name"].rsplit("/", 1)[-1] for info in found if info["type"] == "file")


_VERSIONS = (
    "ETag", "etag", "md5Hash", "Content-MD5", "mtime", "LastModified", "Last-Modified", "updated", "created",
)  # fmt: skip
"""What stores call it, the most telling first."""


def version_of(info: dict[str, Any]) -> list[str]:
    """Size, and what changes with the content, as a store tells of a file; empty where it does not."""
    found = next((str(info[tag]) for tag in _VERSIONS if info.get(tag)), "")
    return ["" if info.get("size") is None else str(info["size"]), found]


def state_on_disk(file: str) -> str:
    """Size and time of a file, ``absent``, or nothing where it does not lie on a local disk."""
    filesystem, path = open_root(file)
    if not isinstance(filesystem, LocalFileSystem):
        return ""
    try:
        found = os.stat(path)
    except OSError:
        return "absent"
    return f"{found.st_size} {found.st_mtime_ns}"


def changed_on_disk(filesystem: fsspec.AbstractFileSystem, path: str) -> int:
    """When a file on this machine was last changed, in nanoseconds; 0 for others: asking a store costs a request.

    For what a process keeps of a file that may be written anew while it lives.
    """
    return os.stat(path).st_mtime_ns if isinstance(filesystem, LocalFileSystem) and os.path.exists(path) else 0


def check_writable(place: str | Path) -> None:
    """Raise `UserError` unless files can be written at a path, or a place that `normal_place` gave; leaves nothing."""
    if isinstance(place, Path) or not is_url(place):
        local = place.absolute() if isinstance(place, Path) else Path(open_root(place)[1])
        standing = next(folder for folder in (local, *local.parents) if os.path.lexists(folder))
        if not standing.is_dir():
            raise UserError(f"output {place} cannot be written: {standing} is a file")
        try:
            # Asking for permissions would not tell a full or read-only disk.
            with tempfile.TemporaryFile(dir=standing) as file:
                file.write(b"x")
        except OSError as error:
            raise UserError(f"output {place} cannot be written: {standing}: {error.strerror}") from None
        return
    filesystem, path = open_root(place)
    probe = f"{path}/.writable-{uuid.uuid4().hex}"
    try:
        filesystem.pipe_file(probe, b"")
        filesystem.rm_file(probe)
    except Exception as error:  # every store has its own kinds of refusal
        why = what_to_mend(error) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"output {place} cannot be written: {why}") from None


@contextlib.contextmanager
def written_whole(filesystem: fsspec.AbstractFileSystem, path: str) -> Iterator[Path]:
    """Give a local file to write; when the block ends well, it appears at ``path``, whole.

    Local: the file is built beside ``path``, flushed to the disk and renamed; where ``path`` is a link, all of that
    happens where the link leads, on whatever disk that is, and the link stays. Elsewhere: it is built in a
    temporary folder and uploaded in one piece (object stores show an upload only when it is complete).
    A block that deletes the file it was given makes nothing appear.
    """
    if not isinstance(filesystem, LocalFileSystem):
        descriptor, temporary = tempfile.mkstemp(suffix=PARTIAL_SUFFIX)
        os.close(descriptor)
        partial = Path(temporary)
        try:
            yield partial
            if partial.exists():
                if not _FLAT & _protocols(filesystem):
                    filesystem.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
                filesystem.put_file(str(partial), path)
        finally:
            partial.unlink(missing_ok=True)
        return
    path = os.path.realpath(path)
    filesystem.makedirs(os.path.dirname(path), exist_ok=True)
    partial = partial_of(Path(path))
    try:
        partial.touch()
        with held(partial):
            yield partial
            if partial.exists():
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


_FLAT = {"s3", "gs", "abfs"}
"""Stores without folders: asked for one, their libraries look for the bucket, which not everybody who may write may
do, and make it where they see none."""


def _protocols(filesystem: fsspec.AbstractFileSystem) -> set[str]:
    named = filesystem.protocol
    return {named} if isinstance(named, str) else set(named)


def abort_uploads(root: str) -> None:
    """Give up what killed processes had begun to upload below a place on S3: it is seen nowhere, and kept and paid for.

    For whoever writes there alone. Stores and credentials that do not allow it keep what they have.
    """
    filesystem, base = open_root(root)
    if "s3" not in _protocols(filesystem):
        return
    bucket, _, folder = base.partition("/")
    with contextlib.suppress(OSError):
        begun = filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{folder}/")
        for upload in begun.get("Uploads", []):
            what = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            filesystem.call_s3("abort_multipart_upload", **what)


def partial_of(target: Path) -> Path:
    """A name beside ``target`` that nobody has, under which it may be built; hold it (`held`) while building.

    File systems hold names of 255 bytes: of a longer one only the start is in it.
    """
    start = os.fsdecode(os.fsencode(target.name)[:200])
    return target.with_name(f".{start}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")


@contextlib.contextmanager
def held(partial: Path) -> Iterator[None]:
    """Hold a file or folder that is being built, so that `remove_partials` of another process leaves it alone.

    The hold ends with this process, however that ends.
    """
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def remove_partials(folder: str | Path, names: str = "*") -> None:
    """Delete what killed processes left under construction in a local folder: files and folders of `partial_of`.

    Nothing else: not what has another name, not what a living process holds, nothing in folders below. Where a
    folder's earlier content had just been put aside (``.old``) for its new one, it is put back.

    Args:
        names: of the targets, as a pattern of `fnmatch`; those of other targets stay.
    """
    wanted = re.compile(rf"\.(?P<target>.+)\.[0-9a-f]{{8}}(?P<old>\.old)?{re.escape(PARTIAL_SUFFIX)}", re.DOTALL)
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if not entry.is_symlink())
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in found:
        match = wanted.fullmatch(name)
        if match is None or not fnmatchcase(match["target"], names):
            continue
        leftover, target = Path(folder, name), Path(folder, match["target"])
        try:
            descriptor = os.open(leftover, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            _lock(descriptor, fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # somebody is at work on it
        finally:
            os.close(descriptor)
        if match["old"] and not target.exists():
            os.replace(leftover, target)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _lock(descriptor: int, how: int = 0) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | how)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # some network disks know no locks
            raise


def write_bytes(filesystem: fsspec.AbstractFileSystem, path: str, data: bytes) -> str:
    """Write ``data`` whole at ``path``; gives its sha256 (hex)."""
    with written_whole(filesystem, path) as partial:
        partial.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(filesystem: fsspec.AbstractFileSystem, path: str) -> str:
    """sha256 (hex) of a file, read in blocks. Raises `FileNotFoundError`."""
    with filesystem.open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tag_of(filesystem: fsspec.AbstractFileSystem, path: str) -> str | None:
    """What tells a file's content without its being read: size, and time on a disk, ETag in a store; None: nothing."""
    if isinstance(filesystem, LocalFileSystem):
        try:
            found = os.stat(path)
        except OSError:
            return None
        return f"{found.st_size}:{found.st_mtime_ns}"
    filesystem.invalidate_cache(str(PurePosixPath(path).parent))
    try:
        return _tag(filesystem.info(path))
    except FileNotFoundError:
        return None


def _tag(info: dict[str, Any]) -> str | None:
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    return f"{info['size']}:{tag}" if tag else None


class Listings:
    """What stores tell of files, asked for a folder at a time: a request for a thousand files, and not for each.

    For one look at files that nobody writes meanwhile. May be used by several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folders: dict[tuple[int, str], dict[str, str | None]] = {}

    def tag_of(self, filesystem: fsspec.AbstractFileSystem, path: str) -> str | None:
        """`tag_of` a file; None also where the listing of its folder does not know it, or not yet."""
        if isinstance(filesystem, LocalFileSystem):
            return tag_of(filesystem, path)
        folder, _, name = path.rpartition("/")
        with self._lock:
            if (key := (id(filesystem), folder)) not in self._folders:
                self._folders[key] = _tags_in(filesystem, folder)
            return self._folders[key].get(name)


def _tags_in(filesystem: fsspec.AbstractFileSystem, folder: str) -> dict[str, str | None]:
    try:
        found = filesystem.ls(folder, detail=True, refresh=True)
    except FileNotFoundError:
        return {}
    return {info["name"].rpartition("/")[2]: _tag(info) for info in found if info["type"] == "file"}


def is_unaltered(
    filesystem: fsspec.AbstractFileSystem, path: str, sha256: str, tag: str | None, listings: Listings | None = None
) -> bool:
    """Whether a file is there and has the content it had: by its tag where it still has that one, else by reading it.

    A copy of a file has another tag.

    Args:
        tag: of `tag_of`, right after the file was written.
        listings: asked first; None: where many files of a folder are not asked for.
    """
    if tag is not None:
        if listings is not None and listings.tag_of(filesystem, path) == tag:
            return True
        now = tag_of(filesystem, path)
        if now == tag:
            return True
        if now is not None and now.split(":")[0] != tag.split(":")[0]:
            return False  # not even as long
    try:
        return sha256_of_file(filesystem, path) == sha256
    except FileNotFoundError:
        return False
