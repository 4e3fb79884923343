"""Weights of networks on this machine: finding, checking and fetching them.

A network of the table (`dataset_tools.networks`) lies, in this order of preference, in the folder of its name in the
one that the environment variable ``MILD_WEIGHTS`` names, or where the libraries that run it look themselves: in the
Hugging Face hub's cache, and what is not from the hub among torch's checkpoints. One comes with this package.

What pickles hold is run when they are loaded. So none is used whose digest is neither in the table nor given.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from dataset_tools.errors import UserError, one_line, what_to_mend
from dataset_tools.networks import NETWORKS, Network, WeightsFile
from dataset_tools.storage import held, local_place

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""``owner/name`` on the Hugging Face hub."""
FOLDER_VARIABLE = "MILD_WEIGHTS"
"""Environment variable that names a folder with one sub-folder a network of the table."""
BUNDLED = Path(__file__).parent / "estimators"
"""Networks of the table that come with this package lie below it."""
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
USUAL_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
"""What transformers needs of a folder to run a network on pictures."""

Progress = Callable[[str, int, int | None], None]
"""Is told a file's name, how many bytes of it are there, and how many it has, where that is known."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Weights:
    """The files of a network, checked."""

    folder: Path
    """Where they are."""
    files: dict[str, Path]
    """Those that matter for loading: path below `folder`, and the same on this machine."""
    sha256: str
    """Hex digest over names and contents; of a single file its own."""
    network: Network | None
    """Row of the table; None for a hub id, folder or file of one's own."""
    name: str
    """As the user wrote it."""


def find_weights(name: str, *, files: Sequence[str] = (), sha256: str | None = None, download: bool = True) -> Weights:
    """The weights that a user named.

    Args:
        name: a network of the table, a folder, a file, or a hub id.
        files: which files matter, as patterns of `fnmatch`; by default all of a network of the table, and
            `USUAL_FILES` of a folder or hub id. Files in folders below count for networks of the table only.
        sha256: what `Weights.sha256` must be; pickles that are not in the table need it.
        download: fetch a hub id that is not in the hub's cache. Networks of the table are never fetched here, see
            `pull`.

    Raises:
        UserError: they are not here and cannot be fetched, are cut off or otherwise not what they must be, or are
            pickles of which nobody said that they are trusted.
    """
    network = NETWORKS.get(name)
    if network is not None:
        folder, there = _of_the_table(network, files)
    else:
        folder, there = _of_ones_own(name, files or USUAL_FILES, download)
    digests = {file: file_digest(path) for file, path in sorted(there.items())}
    whole = next(iter(digests.values()))
    if len(digests) > 1:
        whole = hashlib.sha256("".join(f"{digests[file]}  {file}\n" for file in digests).encode()).hexdigest()
    if sha256 is not None and sha256 != whole:
        raise UserError(f"weights {name} have the sha256 {whole}, and not {sha256}, as the settings say")
    for file, digest in digests.items():
        if Path(file).suffix in PICKLES and sha256 is None and not _in_the_table(digest):
            raise UserError(
                f"weights {name}: {file} is a pickle, which can hold programs, and none of the table's; if you trust "
                f"where it comes from, say so by its digest: set sha256 to {whole}"
            )
    return Weights(folder, there, whole, network, name)


def known_network(name: str) -> Network:
    """A row of the table. Raises `UserError`, with the nearest name, where there is none of that name."""
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=1, cutoff=0.0)[0]
        raise UserError(f"{name} is not in the table of networks, did you mean {near}? See mild weights list")
    return NETWORKS[name]


def missing_message(names: Sequence[str]) -> str:
    """What to say where networks of the table are not here: what for, how large, under which licence, and the cure."""
    told = [
        f"{name} (for {row.purpose}, {size_of(row)}, {licence_of(row)}; commercial use: "
        f"{'yes' if row.commercial else 'no'})"
        for name in names
        for row in [NETWORKS[name]]
    ]
    return f"weights are missing: {', '.join(told)}; fetch them: mild weights pull {' '.join(names)}"


def check_at_hand(names: Iterable[str]) -> None:
    """Raise one `UserError` that names all networks of the table, of those given, that are not here."""
    missing = [name for name in names if name in NETWORKS and at_hand(NETWORKS[name]) is None]
    if missing:
        raise UserError(missing_message(missing))


def size_of(network: Network) -> str:
    """How large the files of a network are together, for people."""
    return f"{network.megabytes} MB" if network.megabytes < 1000 else f"{network.megabytes / 1000:.1f} GB"


def licence_of(network: Network) -> str:
    """The licences of a network, for people."""
    if network.code_licence == network.weights_licence:
        return network.code_licence
    return f"code {network.code_licence}, weights {network.weights_licence}"


def at_hand(network: Network) -> Path | None:
    """The folder on this machine that has all files of a network of the table, if there is one. Reads none of them."""
    return next((folder for folder in _folders(network) if _has_all(folder, network)), None)


def damage(network: Network, folder: Path) -> str | None:
    """What is wrong with the first bad file of a network in a folder that has all of them; None where all are sound."""
    return next((fault for file in network.files if (fault := _fault(folder / file.path, file))), None)


def pull(name: str, to: Path | None, progress: Progress) -> None:
    """Fetch a network of the table, each file whole or not at all; what is here and sound is not fetched again.

    What came before a download was broken off stays beside the file as ``NAME.part``, and the next one goes on there.

    Args:
        to: a folder that gets a sub-folder of the network's name; None for where `find_weights` looks.

    Raises:
        UserError: the name is not in the table, the network cannot be reached, or sends something else than it should.
    """
    network = known_network(name)
    if not network.hub and not network.url:
        return  # it came with this package
    own = to / name if to else _own_folder(network)
    there = at_hand(network) if to is None else own
    if there and _has_all(there, network) and damage(network, there) is None:
        return
    for file in network.files:
        try:
            _pull_file(network, file, own, progress)
        except UserError:
            raise
        except Exception as error:  # the hub's and its HTTP library's errors have no common base class
            if what_to_mend(error):
                raise
            raise UserError(
                f"{name}: {file.path} could not be fetched whole: {one_line(error)}; what came is kept, start again "
                "to go on from there"
            ) from None


def _of_the_table(network: Network, patterns: Sequence[str]) -> tuple[Path, dict[str, Path]]:
    folder = at_hand(network)
    if folder is None:
        raise UserError(missing_message([network.name]))
    if fault := damage(network, folder):
        raise UserError(f"weights {network.name}: {fault}; fetch it again: mild weights pull {network.name}")
    paths = [file.path for file in network.files if not patterns or _matches(file.path, patterns)]
    return folder, {path: folder / path for path in paths}


def _of_ones_own(name: str, patterns: Sequence[str], download: bool) -> tuple[Path, dict[str, Path]]:
    place = Path(local_place(name, "weights"))
    if place.is_file():
        folder, there = place.parent, {place.name: place}
    else:
        folder = place if place.is_dir() else _from_hub(name, patterns, download)
        there = _chosen(folder, patterns)
        if not _any_weights(there):
            raise UserError(
                f"weights {name}: {folder} holds none of the files {', '.join(patterns)} with weights in it"
            )
    for path in there.values():
        if fault := _fault(path, WeightsFile(path.name)):
            raise UserError(f"weights {name}: {fault}; copy or fetch it again")
    return folder, there


def _any_weights(files: Iterable[str]) -> bool:
    return any(Path(file).suffix in (".safetensors", *PICKLES) for file in files)


def _in_the_table(digest: str) -> bool:
    return any(file.sha256 == digest for network in NETWORKS.values() for file in network.files)


def _own_folder(network: Network) -> Path | None:
    """The network's folder in the one that the user has set."""
    own = os.environ.get(FOLDER_VARIABLE)
    return Path(own, network.name).expanduser() if own else None


def _folders(network: Network) -> Iterator[Path]:
    """Where to look for a network's files, by their paths in the table."""
    if own := _own_folder(network):
        yield own
    if not network.hub:
        yield _torch_checkpoints() if network.url else BUNDLED / network.name
        return
    from huggingface_hub import try_to_load_from_cache

    first = network.files[0].path
    found = try_to_load_from_cache(network.hub, first, revision=network.revision)
    if isinstance(found, str):
        yield Path(found).parents[first.count("/")]


def _has_all(folder: Path, network: Network) -> bool:
    return all((folder / file.path).is_file() for file in network.files)


def _torch_checkpoints() -> Path:
    """Where ``torch.hub`` keeps weights, as its own ``get_dir`` finds it."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", f"{cache}/torch"), "hub", "checkpoints").expanduser()


def _from_hub(name: str, patterns: Sequence[str], download: bool) -> Path:
    """The folder of a hub id in the hub's cache; fetched only where it is not there."""
    if HUB_ID.fullmatch(name) is None:
        near = difflib.get_close_matches(name, NETWORKS, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"weights {name} are no network of the table, no folder, file or hub id{hint}")
    from huggingface_hub import snapshot_download

    try:
        cached = Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=True))
        if not download or _any_weights(_chosen(cached, patterns)):
            return cached
    except Exception:  # whatever the hub says where something is not in its cache
        if not download:
            raise UserError(f"weights {name} are no folder here and not in the hub's cache") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's errors have no common base class
        if what_to_mend(error):
            raise
        raise UserError(
            f"weights {name} are no network of the table and no folder here, and cannot be fetched from the hub: "
            f"{one_line(error)}; check the name and the connection"
        ) from None


def _chosen(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and _matches(path.name, patterns)}


def _matches(file: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(file, pattern) or fnmatchcase(Path(file).name, pattern) for pattern in patterns)


def _fault(path: Path, file: WeightsFile) -> str | None:
    """What is wrong with a file that should be as the table says, or else as the hub said when it came from there."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"{path} has {size} bytes, and not {file.size}"
    if file.path.endswith(".safetensors") and (fault := _safetensors_fault(path, size)):
        return fault
    expected = file.sha256 or _told_by_hub(path)
    if expected is not None and (found := file_digest(path)) != expected:
        return f"{path} has the sha256 {found}, and not {expected}"
    return None


def _safetensors_fault(path: Path, size: int) -> str | None:
    """Whether a file has the length that its header says (https://huggingface.co/docs/safetensors, "Format")."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            tensors = json.loads(file.read(length)) if 0 < length <= size - 8 else {}
            ends = [tensor["data_offsets"][1] for key, tensor in tensors.items() if key != "__metadata__"]
            whole = 8 + length + max(ends)
        except (ValueError, LookupError, TypeError, AttributeError):
            return f"{path} is cut off, or no safetensors file"
    return None if whole == size else f"{path} has {size} bytes, and not {whole}, as its header says"


def _told_by_hub(path: Path) -> str | None:
    """The sha256 under which the hub's cache keeps a large file; None for all others."""
    kept = Path(os.readlink(path)) if path.is_symlink() else Path()
    return kept.name if kept.parent.name == "blobs" and _SHA256.fullmatch(kept.name) else None


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file, computed once a process as long as it is not touched."""
    stat = path.stat()
    return _computed_digest(str(path), stat.st_size, stat.st_mtime_ns)


@cache
def _computed_digest(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pull_file(network: Network, file: WeightsFile, folder: Path | None, progress: Progress) -> None:
    if not network.hub:
        target = (folder or _torch_checkpoints()) / file.path
        _fetch(network.url, target, file, {}, progress)
        return
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(network.hub, file.path, revision=network.revision)
    told = get_hf_file_metadata(url)
    tag = told.etag
    if tag is None:
        raise UserError(f"{url}: the server does not say what it has; is this the hub?")
    if file.sha256 and _SHA256.fullmatch(tag) and tag != file.sha256:
        raise UserError(f"{network.name}: the hub's {file.path} has the sha256 {tag}, and not {file.sha256}: refused")
    digest = file.sha256 or (tag if _SHA256.fullmatch(tag) else None)
    wanted = WeightsFile(file.path, digest, file.size or told.size)
    if folder is not None:
        _fetch(url, folder / file.path, wanted, build_hf_headers(), progress)
        return
    cache = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=network.hub, repo_type="model"))
    _fetch(url, cache / "blobs" / tag, wanted, build_hf_headers(), progress)
    # Finds that the content is there, and enters it into the cache under its name.
    hf_hub_download(network.hub, file.path, revision=network.revision)


def _fetch(url: str, target: Path, file: WeightsFile, headers: dict[str, str], progress: Progress) -> None:
    """Bring a file to ``target``, whole and as it must be; go on where an earlier download was broken off."""
    from huggingface_hub.file_download import http_get

    part = target.with_name(f"{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    with held(part):
        if target.exists() and _fault(target, file) is None:  # it was here, or another process was quicker
            part.unlink(missing_ok=True)
            return
        if file.size is not None and part.stat().st_size > file.size:
            os.truncate(part, 0)
        with part.open("ab") as stream:
            # The hub's own, which tries again where it lost the connection.
            http_get(
                url,
                stream,
                resume_size=stream.tell(),
                headers=headers,
                expected_size=file.size,
                displayed_filename=file.path,
                tqdm_class=_bar(file.path, progress),
            )
            stream.flush()
            os.fsync(stream.fileno())
        if fault := _fault(part, file):
            part.unlink()
            raise UserError(f"{url} sent something else than it should, which was removed: {fault}")
        os.replace(part, target)


def _bar(name: str, progress: Progress) -> Any:
    """What the hub's download takes for a class of progress bars."""

    class Bar:
        def __init__(self, *, total: int | None = None, initial: int = 0, **_: Any) -> None:
            self._done, self._total = initial, total

        def __enter__(self) -> Bar:
            self.update(0)
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, more: int) -> None:
            self._done += more
            progress(name, self._done, self._total)

    return Bar
