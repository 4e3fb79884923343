"""Latents of fixed views: what the frozen VAE makes of every example, computed once and then read by training.

With ``cached_views`` a sample is seen in a few fixed views. Their pictures always have the same latents, so that these
can be kept in shards beside the run, one for each shard of the dataset and of its name: WebDataset tars with an index,
as `dataset_tools.shards` describes them. A sample has a part ``{number}.safetensors`` a view with these latents
(C, h, w), in float32, so that training with them is training without them, to the bit:

=================  =============================================================================
name               latent of
=================  =============================================================================
``bg.picture``     what the background branch learns to paint (`mild.training.batches.Batch.picture`)
``bg.shown``       what it is shown, `mild.training.batches.Batch.image` with its hole in middle grey
``bg.start``       what erasing starts from (`mild.training.batches.Batch.start`), with ``states: visited`` only
``fg.picture``     the same of the foreground branch
``fg.shown``
``fg.start``
=================  =============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.torch import load, save

from dataset_tools.errors import UserError
from dataset_tools.schema import Sample
from dataset_tools.shards import Outline, Shard, ShardDataset, index_path, read_index, write_index, write_tar
from dataset_tools.storage import open_root, remove_partials, sha256_of_file
from mild.model.backbone import Branch, check_resolution, encode_pictures, load_base
from mild.settings import LATENTS_FORMAT, TrainSettings
from mild.training.batches import Batch, PictureKind, View, draw_fixed_view, make_batch
from mild.training.mixture import misfit, usable

ORDER: tuple[Branch, ...] = ("bg", "fg")


AT_ONCE = 1 << 20
"""Pixels that the VAE encodes in one call, at least one picture: four of 512 x 512. SDXL's takes half a gigabyte for
each of several layers then; more pictures at once are not quicker."""


def pictures_of(settings: TrainSettings) -> tuple[PictureKind, ...]:
    """Which pictures of a `mild.training.batches.Batch` the VAE encodes."""
    return ("picture", "shown", "start") if settings.states == "visited" else ("picture", "shown")


def encode_batches(
    vae: AutoencoderKL, batches: dict[Branch, Batch], settings: TrainSettings
) -> dict[str, torch.Tensor]:
    """The latents of examples, by the names in the module's table, (B, C, h, w) float32.

    In float32 whatever the precision of training: SDXL's VAE overflows in float16. What is encoded in one call may
    differ in the last bits from what is encoded in others.
    """
    kinds = pictures_of(settings)
    named = {f"{branch}.{what}": batch.encoded(what) for branch, batch in batches.items() for what in kinds}
    pictures = torch.cat(list(named.values()))
    slices = pictures.split(max(1, AT_ONCE // pictures[0, 0].numel()))
    latents = torch.cat([encode_pictures(vae, some.to(vae.device)) for some in slices])
    return dict(zip(named, latents.chunk(len(named)), strict=True))


def encode_fixed(vae: AutoencoderKL, batches: dict[Branch, Batch], settings: TrainSettings) -> dict[str, torch.Tensor]:
    """`encode_batches` of fixed views, of both branches: a view has the same latents, to the bit, in every batch."""
    rows = [
        encode_batches(vae, {branch: batches[branch].row(number) for branch in ORDER}, settings)
        for number in range(len(batches["bg"].weight))
    ]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def encode_view(vae: AutoencoderKL, view: View, settings: TrainSettings) -> dict[str, torch.Tensor]:
    """The latents of a view, by the names in the module's table, (C, h, w) float32.

    Args:
        view: see `mild.training.batches.draw_fixed_view`.
    """
    start = settings.states == "visited"
    batches = {branch: make_batch(branch, [view], settings.resolution, start=start) for branch in ORDER}
    return {name: latent[0] for name, latent in encode_batches(vae, batches, settings).items()}


def encode_latents(
    settings: TrainSettings,
    datasets: Sequence[ShardDataset],
    base: str,
    vae_digest: str,
    folder: str,
    log: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the latents of all views of datasets; shards that are there and sound are kept, others are removed.

    Samples that cannot be trained on (`mild.training.mixture.usable`) have none.

    Args:
        base: folder or hub id of an SDXL inpainting pipeline, whose VAE encodes.
        vae_digest: what tells this VAE from others.
        folder: of the latents, or a URL.
        log: called with the number of samples whenever the latents of some more are there.

    Raises:
        UserError: base or samples cannot be used, or the folder cannot be written.
    """
    filesystem, place = open_root(folder)
    shards = [(dataset, shard) for dataset in datasets for shard in dataset.shards]
    for dataset in datasets:
        usable(dataset, settings.resolution)
    if isinstance(filesystem, LocalFileSystem):
        for configuration in {shard.path.split("/")[0] for _, shard in shards}:
            remove_partials(f"{place}/{configuration}")
    _remove_others(folder, [shard for _, shard in shards])
    vae: AutoencoderKL | None = None
    for dataset, shard in shards:
        of = {"format": LATENTS_FORMAT, "shard": shard.sha256, "vae": vae_digest, "views": settings.determines_views()}
        if not _is_sound(folder, shard.path, of):
            if vae is None:
                vae = _load_vae(base, settings.resolution)
            samples = ShardDataset.of_shards(dataset.root, [shard]).stream()
            tar = write_tar(folder, shard.path, _encoded(settings, samples, vae))
            write_index(folder, shard.path, tar, {"of": of})
        log(shard.samples)
    # Training, in a process of its own, needs the memory.
    del vae
    torch.cuda.empty_cache()


class Latents:
    """Latents that `encode_latents` wrote, by sample and view.

    Args:
        folder: where they lie, or a URL.
        settings: of the training run.

    Raises:
        UserError: they are of other views or of another format.
    """

    def __init__(self, folder: str, settings: TrainSettings) -> None:
        self._folder = folder
        self._filesystem, base = open_root(folder)
        self._places: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
        indices = (place for place in sorted(self._filesystem.find(base)) if place.endswith(".index.json"))
        for place in indices:
            path = place.removeprefix(base).lstrip("/").removesuffix(".index.json") + ".tar"
            document = read_index(folder, path)
            of = document.get("of", {})
            if of.get("format") != LATENTS_FORMAT:
                raise UserError(f"{place} speaks of latents of another format: encode them again, with this version")
            if of.get("views") != settings.determines_views():
                raise UserError(f"{place} speaks of latents of other views: encode them again, with these settings")
            for entry in document["samples"]:
                self._places[path.split("/")[0], entry["key"]] = f"{base}/{path}", entry["parts"]

    def check(self, keys: Iterable[str]) -> None:
        """Raise `UserError` unless there are latents of all samples."""
        known = {key for _, key in self._places}
        missing = next((key for key in keys if key not in known), None)
        if missing is not None:
            raise UserError(f"{self._folder} holds no latents of sample {missing}: encode them again, for this dataset")

    def read(self, sample: Sample, number: int) -> dict[str, torch.Tensor]:
        """What `encode_view` gave for a view, with one range request. Raises `UserError` where it cannot be read."""
        path, parts = self._places[sample.configuration, sample.key]
        offset, size = parts[f"{number}.safetensors"]
        try:
            return load(self._filesystem.cat_file(path, start=offset, end=offset + size))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: the latents of sample {sample.key} cannot be read: {error}; encode them again, only what is "
                "broken is redone"
            ) from None


def _encoded(
    settings: TrainSettings, samples: Iterable[Sample], vae: AutoencoderKL
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys and parts of the samples of a shard of latents."""
    assert settings.cached_views is not None
    for sample in samples:
        if misfit(Outline.of(sample), settings.resolution) is not None:
            continue
        parts = {}
        for number in range(settings.cached_views):
            latents = encode_view(vae, draw_fixed_view(sample, number, settings), settings)
            parts[f"{number}.safetensors"] = save({name: latent.cpu().contiguous() for name, latent in latents.items()})
        yield sample.key, parts


def _is_sound(folder: str, path: str, of: dict[str, Any]) -> bool:
    """Whether the shard is there with the bytes that were written, and speaks of what is asked for."""
    filesystem, base = open_root(folder)
    try:
        document = read_index(folder, path)
        if document.get("of") != of:
            return False
        if not document["samples"]:
            return not filesystem.exists(f"{base}/{path}")
        return sha256_of_file(filesystem, f"{base}/{path}") == document.get("sha256")
    except (UserError, FileNotFoundError):
        return False


def _remove_others(folder: str, shards: Sequence[Shard]) -> None:
    """Delete what was written for a dataset that had other shards."""
    filesystem, base = open_root(folder)
    wanted = {f"{base}/{path}" for shard in shards for path in (shard.path, index_path(shard.path))}
    for path in filesystem.find(base):
        if path not in wanted:
            filesystem.rm_file(path)


def _load_vae(base: str, resolution: int) -> AutoencoderKL:
    pipeline = load_base(base)
    check_resolution(pipeline, resolution)
    return pipeline.vae.to("cuda" if torch.cuda.is_available() else "cpu")
