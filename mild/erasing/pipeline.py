"""Erasing people with MILD: a diffusers pipeline over any SDXL inpainting base (sections 3.2 to 3.5, Algorithm 3).

A photograph of any size is worked on in windows around the people, at the resolution that the model was trained at
(`mild.erasing.regions`). Only the branches that the result needs are run:

- the background branch, once a window, sees the picture with *all* people hidden and paints what is behind them;
- a foreground branch runs for a person whom the result shows and who touches somebody who goes, or whose mask lies
  partly behind one: it sees the picture with those who go hidden, and what it paints there is kept where it, or the
  mask, says that the person is. What the photograph shows is taken from it.

Masks miss things, and the background branch says what else people left behind: limbs, shadows, reflections
(`mild.erasing.extents`; no part of the paper). That is painted out with them.

All foreground branches of one size run as one batch. Eq. 2 then puts layers and background together
(`mild.erasing.layers`), and pixels outside the editable area come back bit-identical.

Diffusion starts from a noised version of the picture with its holes filled smoothly: SDXL's noise schedule never
reaches pure noise, so the first step carries about 7 % of a picture. Stock pipelines take that from the photograph,
the person included; pure noise would make every fill drift to mid-grey.
"""

from __future__ import annotations

import contextlib
import math
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
from mild.erasing.extents import REACH, enlarged, followed
from mild.erasing.isolation import Protect
from mild.erasing.layers import Layer, LayeredPicture
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
from mild.model.backbone import Branch, encode_pictures, load_base, precise_vae
from mild.model.layered import LayeredUNet, push_to_hub
from mild.model.morphology import Cue, draw_masks, draw_parsing, draw_pose, stack_cue
from mild.model.saved import CONFIG

SIZES = ("original_size", "target_size", "negative_original_size", "negative_target_size")
STEPS = 25
"""DDIM steps where neither the caller nor the model says how many: the paper's."""
AESTHETIC_SCORES = {"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}
"""The stock pipeline's, for the few bases that ask for them."""

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(eq=False)
class Erased:
    """A photograph without some of its people. Pictures are PIL images, or arrays with ``output_type="np"``."""

    image: Any
    """RGB, without the people who were to vanish."""
    background: Any
    """RGB, with everybody painted out who was to vanish, or all people with ``layers=True``, and nobody put back."""
    removed: Any
    """The pixels that may differ from the photograph; all others are bit-identical to it. 8-bit grey or bool."""
    parts: LayeredPicture = field(repr=False)
    """The same as arrays, to be recombined and saved."""

    @property
    def layers(self) -> list[Any]:
        """RGBA of the picture's size, one a person in the order of the masks. What somebody in front hides of a person
        is painted where the image shows it or ``layers=True`` asked for it, and transparent otherwise."""
        whole = [layer.whole(*self.parts.painted.shape) for layer in self.parts.layers]
        return whole if isinstance(self.image, np.ndarray) else [Image.fromarray(layer) for layer in whole]


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


@dataclass(eq=False)
class _Painted:
    """What a branch made of a job."""

    job: _Job
    picture: np.ndarray
    """(h, w, 3) uint8."""
    likely: np.ndarray | None
    """(h, w) float32: where the model sees the person, or what people left behind; None: it does not say."""


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
            pipeline.scheduler = as_ddim(pipeline.scheduler)
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
        shared = pipeline.components | {"scheduler": as_ddim(pipeline.scheduler)}
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
            steps = layered.inference_steps or STEPS
            layered.save(place, base=self.base, resolution=self.resolution, inference_steps=steps, record={})

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
        reach: float | None = REACH,
        match_colours: bool = True,
        resolution: int | None = None,
        num_inference_steps: int | None = None,
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
            reach: how far from a mask the model is followed where it sees more of the person (behind others who go) or
                something that they left behind (missed limbs, shadows, reflections), as a share of the square root of
                the mask's area; None: masks alone say what is painted, as in the paper.
            match_colours: bring the colours of the painted background nearer to those around the hole (see
                `mild.erasing.regions.colours_matched`); False: as the networks paint it, which is the paper's method
                alone.
            resolution: pixels of the side of the square that windows are worked on at; None: what the model was trained
                at. More keeps details of large windows, at the price of time, as far as the base knows how.
            num_inference_steps: at most as many as the scheduler was trained on; None: those that the model is meant
                for (the paper uses 25).
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
        if reach is not None and not 0 <= reach < math.inf:
            raise UserError(f"reach is {reach}: give a share such as {REACH}, or None for masks alone")
        if resolution is not None and resolution < (least := self._multiple()):
            raise UserError(f"resolution is {resolution}: give {least} or more")
        if num_inference_steps is None:
            num_inference_steps = (self.layered and self.layered.inference_steps) or STEPS
        most = int(self.scheduler.config.num_train_timesteps)
        if not 1 <= num_inference_steps <= most:
            raise UserError(f"num_inference_steps is {num_inference_steps}: give 1 to {most}, which the scheduler has")
        if batch_size < 1:
            raise UserError("batch_size must be 1 or more")
        side, follow = resolution or self.resolution, reach is not None
        jobs = [job for number, photo in enumerate(photos) for job in self._plan(number, photo, layers, side, follow)]
        painted: dict[int, _Painted] = {}
        device = self._execution_device  # once: looking for it goes through all modules
        text = self._encode_text(prompt, negative_prompt, guidance_scale, device) if jobs else None
        batches = _batches(jobs, batch_size)
        with self.progress_bar(total=len(batches) * num_inference_steps) as bar:
            for batch in batches:
                results = self._paint(batch, text, num_inference_steps, guidance_scale, device, bar)
                painted.update((id(one.job), one) for one in results)
        self.maybe_free_model_hooks()
        erased = []
        for number, photo in enumerate(photos):
            parts = [painted[id(job)] for job in jobs if job.photo == number]
            # Networks see in cells of the latent: strips of half a cell on each side.
            width = self.vae_scale_factor / 2 if match_colours else None
            erased.append(_assembled(photo, parts, layers, reach, width, output_type))
        return erased[0] if single else erased

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

    def _multiple(self) -> int:
        """What sides of working sizes are divisible by, so that no level of the UNet has to be padded."""
        return int(self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1))

    def _plan(self, number: int, photo: Photo, layers: bool, side: int, follow: bool) -> Iterator[_Job]:
        """The windows and branches that a picture needs; ``follow``: people are followed behind others."""
        everybody = range(len(photo.masks))
        targets = list(everybody) if layers else photo.remove
        regions = plan_regions((photo.editable([k]) for k in targets), side, self._multiple())
        follow = follow and self.layered is not None and self.layered.extents is not None
        all_people = editable(photo.masks, everybody, photo.margin)
        for region in regions:
            yield self._job(number, photo, region, "bg", None, all_people)
        for k in everybody:
            if k in photo.remove and not layers:
                continue
            freed, touched = photo.freed(k, layers), photo.hidden(k, layers)
            if follow:
                touched |= freed & editable([photo.shows(k)], [0])
            for region in regions:
                if touched[region.rows, region.columns].any():
                    yield self._job(number, photo, region, "fg", k, freed)

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
    ) -> list[_Painted]:
        """What one branch paints in windows of one size."""
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
        time_ids, negative_time_ids = self._get_add_time_ids(
            **dict.fromkeys(SIZES, jobs[0].region.size),
            **dict.fromkeys(("crops_coords_top_left", "negative_crops_coords_top_left"), (0, 0)),
            **AESTHETIC_SCORES,
            dtype=prompt_embeds.dtype,
            text_encoder_projection_dim=int(pooled.shape[-1]),
        )
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
            likely = self._likely(jobs)
        pictures = self._decode(latents)
        return [_Painted(*one) for one in zip(jobs, pictures, likely, strict=True)]

    def _likely(self, jobs: list[_Job]) -> list[np.ndarray] | list[None]:
        """What the extents said in the last step, by job."""
        if self.layered is None or self.layered.extents is None:
            return [None] * len(jobs)
        # With guidance, those with the prompt come last.
        logits = self.layered.extents.logits(jobs[0].branch, jobs[0].region.size)[-len(jobs) :]
        return list(logits[:, 0].sigmoid().cpu().numpy())

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
        with precise_vae(self.vae):
            pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False)[
                0
            ]
        scaled = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return list(scaled.permute(0, 2, 3, 1).cpu().numpy())


def as_ddim(scheduler: Any) -> DDIMScheduler:
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


def _assembled(
    photo: Photo, painted: list[_Painted], layers: bool, reach: float | None, width: float | None, output_type: str
) -> Erased:
    """Put what was painted into the photograph, and take it apart into layers.

    Args:
        reach: see `MILDPipeline.__call__`.
        width: of the strips whose colours are compared, in pixels; None: colours stay as painted.
    """
    targets = list(range(len(photo.masks))) if layers else photo.remove
    goes = np.zeros(len(photo.masks) + 1, bool)
    goes[[k + 1 for k in targets]] = True
    core, area = goes[photo.seen], photo.editable(targets)
    background, beyond = photo.image, np.zeros_like(photo.seen)
    for one in painted:
        if one.job.branch == "bg":
            region = one.job.region
            window = region.rows, region.columns
            left = _left_behind(photo, one, reach, goes)
            beyond[window] = np.where(area[window] | (photo.seen[window] > 0), 0, left)
            picture = one.picture
            if width is not None:
                hole = one.job.hole | cut_mask(beyond > 0, region)
                picture = colours_matched(picture, one.job.picture, hole, width)
            background = paste(background, picture, region, core | (beyond > 0), area | (beyond > 0))
    area |= beyond > 0
    people = [
        _layer(photo, k, [one for one in painted if one.job.person == k], layers, reach)
        for k in range(len(photo.masks))
    ]
    parts = LayeredPicture(photo.image, background, area, photo.seen, beyond, people, photo.order, photo.margin)
    keep = [k for k in range(len(photo.masks)) if k not in photo.remove]
    image, removed = parts.recompose(keep), parts.changed(keep)
    if output_type == "np":
        return Erased(image, background, removed, parts)
    return Erased(
        Image.fromarray(image), Image.fromarray(background), Image.fromarray(removed.astype(np.uint8) * 255), parts
    )


def _left_behind(photo: Photo, painted: _Painted, reach: float | None, goes: np.ndarray) -> np.ndarray:
    """Whose a pixel of the window is, beyond all masks, of those who go; (h, w) uint16, numbers as in `Photo.seen`."""
    region = painted.job.region
    seen = photo.seen[region.rows, region.columns]
    if painted.likely is None or reach is None:
        return np.zeros_like(seen)
    size = painted.likely.shape
    people = cv2.resize(seen, size[::-1], interpolation=cv2.INTER_NEAREST)
    limits = _limits(photo, region, reach)
    owners = np.where(painted.job.hole, 0, followed(painted.likely, people, painted.job.hole, limits))
    # What people left behind is soft: a little more of it.
    owners = np.where(owners > 0, owners, cv2.dilate(owners, np.ones((3, 3), np.uint8)))
    owners = enlarged(np.where(painted.job.hole, 0, owners), seen.shape)
    return np.where(goes[owners], owners, 0).astype(np.uint16)


def _limits(photo: Photo, region: Region, reach: float) -> list[float]:
    """How far each person is followed in a window, in pixels of its working size."""
    scale = region.size[0] / (region.rows.stop - region.rows.start)
    return [reach * math.sqrt(np.count_nonzero(photo.shows(k))) * scale for k in range(len(photo.masks))]


def _layer(photo: Photo, person: int, painted: list[_Painted], layers: bool, reach: float | None) -> Layer:
    """A person as the photograph shows them, and as they were painted where others hid them."""
    shown = photo.shows(person)
    if not painted:
        return Layer.cut(photo.image, shown.astype(np.uint8) * 255)
    colours, alpha = photo.image, np.where(photo.freed(person, layers), 255, 0).astype(np.uint8)
    for one in painted:
        window = one.job.region.rows, one.job.region.columns
        colours = paste(colours, one.picture, one.job.region, ~shown, ~shown)
        alpha[window] = np.minimum(alpha[window], _completed(photo, person, one, reach))
    alpha[shown | photo.hidden(person, layers)] = 255
    return Layer.cut(colours, alpha)


def _completed(photo: Photo, person: int, painted: _Painted, reach: float | None) -> np.ndarray:
    """How much of each pixel of the window the model takes for the person, where they were hidden; (h, w) uint8."""
    region = painted.job.region
    shown = photo.shows(person)[region.rows, region.columns]
    if painted.likely is None or reach is None:
        return np.zeros(shown.shape, np.uint8)
    likely = np.where(painted.job.hole, painted.likely, 0)
    seen = cv2.resize(shown.astype(np.uint16), likely.shape[::-1], interpolation=cv2.INTER_NEAREST)
    owners = followed(likely, seen, np.zeros_like(painted.job.hole), [_limits(photo, region, reach)[person]])
    # An edge is soft: half a probability more or less beside 1/2.
    soft = np.clip(2 * likely - 0.5, 0, 1) * (cv2.dilate(owners, np.ones((3, 3), np.uint8)) > 0)
    return np.rint(255 * cv2.resize(soft, shown.shape[::-1], interpolation=cv2.INTER_LINEAR)).astype(np.uint8)
