"""Erasing people with MILD: a diffusers pipeline over any SDXL inpainting base (sections 3.2 to 3.5, Algorithm 3).

A photograph of any size is worked on in windows around the people, at the resolution that the model was trained at
(`mild.erasing.regions`). Only the branches that the result needs are run:

- the background branch, once a window, sees the picture with *all* people hidden and paints what is behind them;
- a foreground branch runs for a person who is hidden by somebody in front and whom the result shows: it sees the
  picture with the *others* hidden, and only its hidden part is used. What the photograph shows is taken from it.

All foreground branches of one size run as one batch. Eq. 2 then puts layers and background together
(`mild.erasing.layers`), and pixels outside the editable area come back bit-identical.

Diffusion starts from a noised version of the picture with its holes filled smoothly: SDXL's noise schedule never
reaches pure noise, so the first step carries about 7 % of a picture. Stock pipelines take that from the photograph,
the person included; pure noise would make every fill drift to mid-grey.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import cv2
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionXLInpaintPipeline
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from dataset_tools.errors import UserError
from dataset_tools.folders import folder_written_whole
from mild.erasing.isolation import Protect
from mild.erasing.layers import LayeredPicture
from mild.erasing.photo import Photo, checked_photo, checked_photos
from mild.erasing.regions import (
    MARGIN,
    Region,
    colours_matched,
    cut_mask,
    cut_picture,
    cut_soft,
    editable,
    paste,
    plan_regions,
    prefilled,
)
from mild.model.backbone import Branch, decode_pictures, encode_pictures, load_base, time_ids_of
from mild.model.layered import LayeredUNet, push_to_hub
from mild.model.morphology import Cue, draw_masks, draw_parsing, draw_pose, stack_cue
from mild.model.saved import CONFIG

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(eq=False)
class Erased:
    """A photograph without some of its people. Pictures are PIL images, or arrays with ``output_type="np"``."""

    image: Any
    """RGB, without the people who were to vanish."""
    background: Any
    """RGB, with everybody painted out who was to vanish, or all people with ``layers=True``, and nobody put back."""
    layers: list[Any]
    """RGBA of the picture's size, one a person in the order of the masks. What somebody in front hides of a person
    is painted where the image shows it or ``layers=True`` asked for it, and transparent otherwise."""
    removed: Any
    """The pixels that may differ from the photograph; all others are bit-identical to it. 8-bit grey or bool."""
    parts: LayeredPicture = field(repr=False)
    """The same as arrays, to be recombined and saved."""


def recompose(result: Erased, keep: Sequence[int]) -> Any:
    """Eq. 2 with z-order: background and the layers of the people in ``keep``, as ``result.image`` is.

    Raises:
        UserError: there is no such person, or somebody would have to vanish who was not painted out.
    """
    image = result.parts.recompose(keep)
    return image if isinstance(result.image, np.ndarray) else Image.fromarray(image)


@dataclass(eq=False)
class _Job:
    """One window to be painted by one branch."""

    photo: int
    region: Region
    branch: Branch
    person: int | None
    picture: np.ndarray
    """(h, w, 3) uint8, at working size."""
    hole: np.ndarray
    """(h, w) bool: what the branch is not shown."""
    mask: np.ndarray
    """(h, w) float32: M_k, or the union of all people for the background."""
    noise: torch.Tensor
    """(C, h', w') float32."""
    generator: torch.Generator | None
    cues: dict[str, torch.Tensor]


class MILDPipeline(StableDiffusionXLInpaintPipeline):
    """Erases people. ``MILDPipeline.from_pretrained(base, mild=folder_or_hub_id)``, then call it.

    Everything that a stock pipeline offers works: ``to``, ``enable_model_cpu_offload``, ``enable_vae_tiling``,
    ``torch.compile`` of the UNet, any scheduler of diffusers.
    """

    layered: LayeredUNet | None = None
    """What MILD adds to the UNet; None: the base alone."""
    base: str = ""
    """Folder or hub id that the base was loaded from."""
    working_resolution: int | None = None
    """Pixels of the side of the square that the base alone is to work at, where that is not its own."""
    watch: Callable[[torch.Tensor], contextlib.AbstractContextManager[Any]] | None = None
    """Gives a context for the UNet's forward passes on one batch of windows, of their masks (B, 1, h, w) in 0..1."""

    @classmethod
    def from_pretrained(cls, base: str, *, mild: str | Path | None = None, **options: Any) -> Self:
        """Load a base, and on it what a MILD directory holds; the scheduler becomes DDIM unless one is given.

        Args:
            base: folder or hub id of an SDXL inpainting pipeline (a UNet of 9 channels).
            mild: folder that training wrote, or hub id; None for the base alone.
            options: as `DiffusionPipeline.from_pretrained` takes them, such as ``dtype``, ``variant``, ``vae``.

        Raises:
            UserError: the base or the MILD directory cannot be used.
        """
        pipeline: Self = load_base(base, super().from_pretrained, **options)
        pipeline.set_progress_bar_config()
        if "scheduler" not in options:
            pipeline.scheduler = _as_ddim(pipeline.scheduler)
        if mild is not None:
            pipeline.layered = LayeredUNet.load(pipeline.unet, mild)
        pipeline.base = base
        return pipeline

    @classmethod
    def around(cls, pipeline: StableDiffusionXLInpaintPipeline, layered: LayeredUNet) -> Self:
        """Over a base that is loaded and what is on its UNet, as while it is trained; all weights are shared.

        ``layered.resolution`` says what the model works at.
        """
        names = ("requires_aesthetics_score", "force_zeros_for_empty_prompt")
        shared = pipeline.components | {"scheduler": _as_ddim(pipeline.scheduler)}
        made = cls(**shared, **{name: pipeline.config[name] for name in names})
        made.set_progress_bar_config(disable=True)
        made.layered = layered
        return made

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write what MILD adds, as `LayeredUNet.save` does; never the base. `from_pretrained` takes the folder.

        Raises:
            UserError: there is nothing but the base, or the folder cannot be written.
        """
        layered = self._layered()
        with folder_written_whole(str(folder), CONFIG) as place:
            layered.save(place, base=self.base, resolution=self.resolution, record={})

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool = False, **_: Any) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub; gives the commit's URL. Raises `UserError`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(f"{folder}/mild")
            return push_to_hub(f"{folder}/mild", repo_id, token=token, private=private)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        masks: Sequence[Any],
        remove: Sequence[Any] | None = None,
        *,
        prompt: str = "",
        negative_prompt: str = "",
        pose: Any = None,
        parsing: Any = None,
        label_set: str = "lip",
        order: Any = None,
        layers: bool = False,
        protect: Protect | None = None,
        margin: float = MARGIN,
        match_colours: bool = True,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        batch_size: int = 8,
        output_type: Literal["pil", "np"] = "pil",
    ) -> Any:
        """Erase people from a photograph; gives an `Erased`, or a list of them where ``image`` is a list.

        Args:
            image: PIL image (any 8-bit mode; its EXIF orientation is applied, transparency is laid on white) or
                (H, W, 3) uint8 RGB; or several, of any sizes: then what is said below to belong to a picture is a list
                as well. Results are upright.
            masks: of each picture, a list: one a person, or an only one that holds several people. PIL image or (H, W)
                array, bool, 0..1 or whole numbers, read by the rule of `dataset_tools.mask_files`, as the command
                reads files; upright, or stored as the picture is.
            remove: indices of the people to erase, of each picture; None: everybody.
            prompt: what the holes show; training uses the empty prompt.
            negative_prompt: with ``guidance_scale`` above 1.
            pose: (N, 18, 3) keypoints, x and y in pixels and score 0..1, of each picture; None where unknown.
            parsing: (H, W) uint8 label map of ``label_set`` (lip, atr or pascal), of each picture; None where unknown.
            order: indices of the people from back to front, of each picture; None: that of the masks.
            layers: paint out everybody and complete everybody who is partly hidden, so that any combination can be
                made from the result, at the price of one foreground branch a hidden person.
            protect: faces or whole bodies of those who stay are taken out of the masks of those who go (section G.8).
            margin: how far beyond each mask pixels may change, as a share of the square root of its area (see
                `mild.erasing.regions.editable`): more for rough masks, 0 for the masks as they are.
            match_colours: bring the colours of the painted background nearer to those around the hole (see
                `mild.erasing.regions.colours_matched`); False: as the networks paint it, which is the paper's method
                alone.
            num_inference_steps: the paper uses 25 (DDIM); at most as many as the scheduler was trained on.
            guidance_scale: classifier-free guidance, off at 1: the branches are trained without it.
            generator: one for all pictures, or one a picture. The same seed gives the same result.
            batch_size: how many windows or layers the UNet sees at once.
            output_type: ``pil``, or ``np`` for uint8 (bool for ``removed``).

        Raises:
            UserError: a picture, mask or cue cannot be used; the message says which.
        """
        own: dict[str, Any] = {"masks": masks, "remove": remove, "order": order, "pose": pose, "parsing": parsing}
        common: dict[str, Any] = {"label_set": label_set, "protect": protect, "margin": margin}
        single = not isinstance(image, list | tuple)
        if single:
            photos = [checked_photo(image, generator=generator, **own, **common)]
        else:
            each = [generator] * len(image) if isinstance(generator, torch.Generator) else generator
            photos = checked_photos(image, common, generator=each, **own)
        most = int(self.scheduler.config.num_train_timesteps)
        if not 1 <= num_inference_steps <= most:
            raise UserError(f"num_inference_steps is {num_inference_steps}: give 1 to {most}, which the scheduler has")
        if batch_size < 1:
            raise UserError("batch_size must be 1 or more")
        jobs = [job for number, photo in enumerate(photos) for job in self._plan(number, photo, layers)]
        painted: dict[int, np.ndarray] = {}
        device = self._execution_device  # once: looking for it goes through all modules
        text = self._encode_text(prompt, negative_prompt, guidance_scale, device) if jobs else None
        batches = _batches(jobs, batch_size)
        with self.progress_bar(total=len(batches) * num_inference_steps) as bar:
            for batch in batches:
                pictures = self._paint(batch, text, num_inference_steps, guidance_scale, device, bar)
                if match_colours and batch[0].branch == "bg":
                    # Networks see in cells of the latent: strips of half a cell on each side.
                    width = self.vae_scale_factor / 2
                    pictures = [
                        colours_matched(fill, job.picture, job.hole, width)
                        for job, fill in zip(batch, pictures, strict=True)
                    ]
                painted.update(zip(map(id, batch), pictures, strict=True))
        self.maybe_free_model_hooks()
        results = []
        for number, photo in enumerate(photos):
            parts = [(job, painted[id(job)]) for job in jobs if job.photo == number]
            results.append(_assembled(photo, parts, layers, output_type))
        return results[0] if single else results

    @property
    def resolution(self) -> int:
        """Pixels of the side of the square that the model works at: that of MILD's training, or else the base's."""
        if self.layered is not None and self.layered.resolution is not None:
            return self.layered.resolution
        return self.working_resolution or int(self.unet.config.sample_size * self.vae_scale_factor)

    def _layered(self) -> LayeredUNet:
        if self.layered is None:
            raise UserError("this pipeline is the base alone: load it with from_pretrained(base, mild=...)")
        return self.layered

    def _plan(self, number: int, photo: Photo, layers: bool) -> Iterator[_Job]:
        """The windows and branches that a picture needs."""
        everybody = range(len(photo.masks))
        targets = list(everybody) if layers else photo.remove
        # As all windows are multiples of the UNet's coarsest grid, no level of it has to be padded.
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        regions = plan_regions([editable(photo.seen, [k], photo.margin) for k in targets], self.resolution, multiple)
        hidden = photo.hidden(layers)
        all_people = editable(photo.masks, everybody, photo.margin)
        for region in regions:
            yield self._job(number, photo, region, "bg", None, all_people)
            for k in everybody:
                if hidden[k][region.rows, region.columns].any():
                    others = editable(photo.masks, [j for j in everybody if j != k], photo.margin)
                    yield self._job(number, photo, region, "fg", k, others & ~photo.seen[k])

    def _job(self, number: int, photo: Photo, region: Region, branch: Branch, k: int | None, hole: np.ndarray) -> _Job:
        height, width = region.size
        cut_hole = cut_mask(hole, region)
        mask = cut_hole.astype(np.float32) if k is None else cut_soft(photo.masks[k], region)
        shape = (self.vae.config.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        device = torch.device("cpu") if photo.generator is None else photo.generator.device
        noise = randn_tensor((1, *shape), generator=photo.generator, device=device)[0]
        picture, cues = cut_picture(photo.image, region), self._cues(photo, region, k)
        return _Job(number, region, branch, k, picture, cut_hole, mask, noise, photo.generator, cues)

    def _cues(self, photo: Photo, region: Region, k: int | None) -> dict[str, torch.Tensor]:
        """Maps of the cues of HMG that are known, in the window."""
        if self.layered is None or self.layered.hmg is None:
            return {}
        settings, cues = self.layered.hmg.settings, {}
        if photo.pose is not None:
            window = (region.rows.stop - region.rows.start, region.columns.stop - region.columns.start)
            scale = np.array([region.size[1] / window[1], region.size[0] / window[0]])
            pose = photo.pose.astype(np.float64)
            pose[..., :2] = (pose[..., :2] - [region.columns.start, region.rows.start] + 0.5) * scale - 0.5
            cues["pose"] = draw_pose(pose, region.size, settings)
        if photo.parsing is not None:
            labels = photo.parsing[region.rows, region.columns]
            labels = cv2.resize(labels, region.size[::-1], interpolation=cv2.INTER_NEAREST)
            cues["parsing"] = draw_parsing(labels, photo.label_set, settings)
        if k is not None:
            cues["others"] = draw_masks(np.stack([cut_soft(mask, region) for mask in photo.masks]), k, settings)
        return cues

    def _encode_text(
        self, prompt: str, negative_prompt: str, guidance_scale: float, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text (1 or 2, L, D) and pooled text (1 or 2, D'); with guidance the negative prompt's come first."""
        guided = guidance_scale > 1
        text, negative, pooled, negative_pooled = self.encode_prompt(
            prompt,
            device=device,
            do_classifier_free_guidance=guided,
            negative_prompt=negative_prompt or None,
        )
        if self.layered is not None:
            text = self.layered.to(text.device).text(text)
        return (torch.cat([negative, text]), torch.cat([negative_pooled, pooled])) if guided else (text, pooled)

    def _paint(
        self, jobs: list[_Job], text: Any, steps: int, guidance_scale: float, device: torch.device, bar: Any
    ) -> list[np.ndarray]:
        """What one branch paints in windows of one size: (h, w, 3) uint8 each."""
        dtype, count, copies = self.unet.dtype, len(jobs), len(text[0])
        prompt_embeds, pooled = (given.repeat_interleave(count, 0) for given in text)
        holes = torch.from_numpy(np.stack([job.hole for job in jobs]))[:, None].to(device, torch.float32)
        seen = self._encode(np.stack([job.picture for job in jobs]), device, shown=1 - holes)
        start = self._encode(np.stack([prefilled(job.picture, job.hole) for job in jobs]), device)
        hole_latents = torch.nn.functional.interpolate(holes, size=seen.shape[-2:])
        self.scheduler.set_timesteps(steps, device=device)
        timesteps = self.scheduler.timesteps
        noise = torch.stack([job.noise for job in jobs]).to(device)
        latents = self.scheduler.add_noise(start, noise, timesteps[:1].repeat(count))
        fixed = torch.cat([hole_latents, seen], 1).repeat(copies, 1, 1, 1)
        time_ids, negative_time_ids = time_ids_of(self, jobs[0].region.size, pooled)
        ids = [time_ids] if copies == 1 else [negative_time_ids, time_ids]
        added = {"text_embeds": pooled, "time_ids": torch.cat(ids).repeat_interleave(count, 0).to(device)}
        generators = [job.generator for job in jobs] if all(job.generator for job in jobs) else None
        extra = self.prepare_extra_step_kwargs(generators, eta=0.0)
        with self._branch(jobs, device, guided=copies == 2):
            for t in timesteps:
                given = self.scheduler.scale_model_input(latents.repeat(copies, 1, 1, 1), t)
                prediction = self.unet(
                    torch.cat([given, fixed], 1).to(dtype),
                    t,
                    encoder_hidden_states=prompt_embeds.to(dtype),
                    added_cond_kwargs=added,
                    return_dict=False,
                )[0].float()
                if copies == 2:
                    without, with_prompt = prediction.chunk(2)
                    prediction = without + guidance_scale * (with_prompt - without)
                latents = self.scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
                bar.update()
        return self._decode(latents)

    @contextlib.contextmanager
    def _branch(self, jobs: list[_Job], device: torch.device, guided: bool) -> Iterator[None]:
        """Let the UNet run as the jobs' branch, with their masks and cues; and be watched, if anybody does."""
        masks = torch.from_numpy(np.stack([job.mask for job in jobs]))[:, None].to(device)
        with self.watch(masks) if self.watch is not None else contextlib.nullcontext():
            if self.layered is None:
                yield
                return
            with self._layers_branch(self.layered, jobs, masks, device, guided):
                yield

    def _layers_branch(
        self, layered: LayeredUNet, jobs: list[_Job], masks: torch.Tensor, device: torch.device, guided: bool
    ) -> contextlib.AbstractContextManager[None]:
        cues = {name: stack_cue([job.cues.get(name) for job in jobs]) for name in ("pose", "parsing", "others")}
        known = {
            name: Cue(cue.maps.to(device), cue.present.to(device)) for name, cue in cues.items() if cue is not None
        }
        return layered.branch(jobs[0].branch, masks, **known, guidance=guided)

    def _encode(self, pictures: np.ndarray, device: torch.device, shown: torch.Tensor | None = None) -> torch.Tensor:
        """Latents (B, C, h', w') float32 of pictures (B, h, w, 3) uint8: the mode of the VAE's posterior, scaled."""
        pixels = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        if shown is not None:
            pixels = pixels * shown
        return encode_pictures(self.vae, pixels)

    def _decode(self, latents: torch.Tensor) -> list[np.ndarray]:
        scaled = ((decode_pictures(self.vae, latents) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return list(scaled.permute(0, 2, 3, 1).cpu().numpy())


def _as_ddim(scheduler: Any) -> DDIMScheduler:
    """DDIM with the noise schedule that a base was trained with.

    DDIM's own default clips x_0 to -1..1, which is right for pixels and ruins latents; configurations of other
    schedulers do not say so.
    """
    if isinstance(scheduler, DDIMScheduler):
        return scheduler
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, set_alpha_to_one=False)


def _batches(jobs: list[_Job], batch_size: int) -> list[list[_Job]]:
    """Jobs that one call of the UNet can take: of one branch and working size, ``batch_size`` at most."""
    kinds: dict[Any, list[_Job]] = {}
    for job in jobs:
        kinds.setdefault((job.branch, job.region.size), []).append(job)
    return [same[first : first + batch_size] for same in kinds.values() for first in range(0, len(same), batch_size)]


def _assembled(photo: Photo, painted: list[tuple[_Job, np.ndarray]], layers: bool, output_type: str) -> Erased:
    """Put what was painted into the photograph, and take it apart into layers."""
    targets = list(range(len(photo.masks))) if layers else photo.remove
    core, area = np.asarray(photo.seen[targets].any(0)), editable(photo.seen, targets, photo.margin)
    hidden = photo.hidden(layers)
    background = photo.image
    shown = photo.seen | hidden
    layers_of = np.zeros((*shown.shape, 4), np.uint8)
    for layer, where in zip(layers_of, shown, strict=True):
        layer[where, :3], layer[where, 3] = photo.image[where], 255
    for job, picture in painted:
        if job.person is None:
            background = paste(background, picture, job.region, core, area)
        else:
            part = hidden[job.person]
            filled = paste(layers_of[job.person, ..., :3], picture, job.region, part, part)
            layers_of[job.person, ..., :3] = filled
    parts = LayeredPicture(photo.image, background, area, layers_of, photo.order, photo.margin)
    keep = [k for k in range(len(photo.masks)) if k not in photo.remove]
    image, removed = parts.recompose(keep), parts.changed(keep)
    if output_type == "np":
        return Erased(image, background, list(layers_of), removed, parts)
    return Erased(
        Image.fromarray(image),
        Image.fromarray(background),
        [Image.fromarray(layer) for layer in layers_of],
        Image.fromarray(removed.astype(np.uint8) * 255),
        parts,
    )
