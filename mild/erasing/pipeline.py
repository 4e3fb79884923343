"""Erasing people with MILD: a diffusers pipeline over any SDXL inpainting base (sections 3.2 to 3.5, Algorithm 3).

A photograph of any size is worked on in windows around the people, at the resolution that the model is meant for
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
import hashlib
import inspect
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

import cv2
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionXLInpaintPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from dataset_tools.errors import UserError
from dataset_tools.folders import folder_written_whole
from dataset_tools.metadata import Metadata
from mild.bases import SUGGESTED_BASE
from mild.erasing.extents import HIDDEN, LEFT_BEHIND, REACH, enlarged, followed
from mild.erasing.isolation import Protect
from mild.erasing.layers import Layer, LayeredPicture
from mild.erasing.photo import Photo, checked_photo, checked_photos
from mild.erasing.regions import (
    LARGEST_RESOLUTION,
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
    resized,
)
from mild.model.backbone import (
    BRANCHES,
    Branch,
    check_channels,
    decode_pictures,
    encode_pictures,
    load_base,
    time_ids_of,
)
from mild.model.cues import Cue, draw_masks, draw_parsing, draw_pose, stack_cue
from mild.model.layered import LayeredUNet, push_to_hub
from mild.model.saved import CONFIG, OWN, fetched, is_mild, read_config
from mild.seeds import derived_seed

STEPS = 25
"""DDIM steps where neither the caller nor the model says how many: the paper's."""

Generators = torch.Generator | Sequence[torch.Generator] | None
OutputType = Literal["pil", "np", "pt"]
STOCK = inspect.signature(StableDiffusionXLInpaintPipeline.__call__).parameters
NOT_HERE = {
    **dict.fromkeys(("height", "width"), "windows are as large as resolution says, and results as the picture is"),
    "num_images_per_prompt": "call again with another generator for another result",
    "strength": "holes are always painted anew",
    "padding_mask_crop": "windows are cut around the people anyway",
    "return_dict": "results are of the class Erased",
}
"""Why arguments of stock pipelines are not taken."""


@dataclass(eq=False)
class Erased(BaseOutput):
    """A photograph without some of its people. Pictures are as ``output_type`` says."""

    images: list[Any]
    """The result alone, ``image``, as stock pipelines give theirs."""
    background: Any
    """RGB, with everybody painted out who was to vanish, or all people with ``layers=True``, and nobody put back."""
    removed: Any
    """The pixels that may differ from the photograph; all others are bit-identical to it. 8-bit grey or bool."""
    parts: LayeredPicture = field(repr=False)
    """The same as arrays, to be recombined and saved."""

    @property
    def image(self) -> Any:
        """RGB, without the people who were to vanish."""
        return self.images[0]

    @property
    def layers(self) -> list[Any]:
        """RGBA of the picture's size, one a person in the order of the masks. What somebody in front hides of a person
        is painted where the image shows it or ``layers=True`` asked for it, and transparent otherwise."""
        whole = [layer.whole(*self.parts.painted.shape) for layer in self.parts.layers]
        return [_in_form(layer, _form_of(self.image), self.parts) for layer in whole]


class ErasedPictures(list[Erased]):
    """What was made of several photographs, in their order."""

    @property
    def images(self) -> list[Any]:
        """The ``image`` of each."""
        return [result.image for result in self]


def recompose(result: Erased, keep: Sequence[int]) -> Any:
    """Eq. 2 with z-order: background and the layers of the people in ``keep``, as ``result.image`` is.

    Raises:
        UserError: there is no such person, or somebody would have to vanish who was not painted out.
    """
    return _in_form(result.parts.recompose(keep), _form_of(result.image), result.parts)


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


def _check_options(called: str, options: dict[str, Any]) -> None:
    """Raise `UserError` where one of diffusers' options is asked for that this does not know."""
    if asked := [name for name, value in options.items() if value not in (None, False)]:
        raise UserError(f"{called} does not know {asked[0]}: leave it out")


class MILDPipeline(StableDiffusionXLInpaintPipeline):
    """Erases people. ``MILDPipeline.from_pretrained(folder_or_hub_id)``, then call it.

    What stock pipelines offer works: ``to``, ``enable_model_cpu_offload``, ``vae.enable_tiling``, ``torch.compile`` of
    the UNet, any scheduler of diffusers, LoRA sets beside the branches' own (``load_lora_weights`` with an
    ``adapter_name``, ``set_adapters``). Attention slicing and ``fuse_qkv_projections`` of the UNet are refused:
    attention is computed in fused kernels already, with adapters that change from branch to branch.
    """

    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 - as in the class above

    layered: LayeredUNet | None = None
    """What MILD adds to the UNet; None: the base alone."""
    base: str = ""
    """Folder or hub id that the base was loaded from; empty where that is not known."""
    working_resolutions: tuple[int, int] | None = None
    """`resolutions` of the base alone, where they are not its own."""
    watch: Callable[[torch.Tensor], contextlib.AbstractContextManager[Any]] | None = None
    """Gives a context for the UNet's forward passes on one batch of windows, of their masks (B, 1, h, w) in 0..1."""

    @classmethod
    def from_pretrained(cls, base: str | Path, *, mild: str | Path | None = None, **options: Any) -> Self:
        """Load a base, and on it what a MILD directory holds; the scheduler becomes DDIM unless one is given.

        Args:
            base: folder or hub id of an SDXL inpainting pipeline (a UNet of 9 channels); or of a MILD directory, and
                the base that it names is loaded below it.
            mild: folder that training wrote, or hub id, to be put on ``base``; None for the base alone.
            options: as `DiffusionPipeline.from_pretrained` takes them, such as ``dtype``, ``variant``, ``vae``.

        Raises:
            UserError: the base or the MILD directory cannot be used.
        """
        base, named = str(base), ""
        if is_mild(base):
            if mild is not None:
                raise UserError(f"{base} is a MILD directory and no base: name a base, or leave mild={mild} out")
            mild, base = base, read_config(fetched(base)).base
            named = f"; {mild} names it as its base: where that lies elsewhere, from_pretrained(base, mild=...)"
        try:
            pipeline: Self = load_base(base, super().from_pretrained, **options)
        except UserError as error:
            raise UserError(f"{error}{named}") from error.__cause__
        if "scheduler" not in options:
            pipeline.scheduler = as_ddim(pipeline.scheduler)
        return pipeline._completed(base, mild)

    @classmethod
    def from_pipe(cls, pipeline: Any, *, mild: str | Path | None = None, **components: Any) -> Self:
        """Over a pipeline that is loaded, whose weights are shared as they are; the scheduler as in `from_pretrained`.

        With ``mild``, the pipeline's UNet gets SMA and HMG and then computes for this one alone, not for ``pipeline``,
        until `LayeredUNet.remove` of ``layered`` gives it back.

        Args:
            pipeline: of the SDXL family, with a UNet for inpainting.
            mild: as in `from_pretrained`; None: what a MILD pipeline has on its UNet, or the base alone.
            components: to be taken instead of the pipeline's, such as ``vae`` and ``scheduler``.

        Raises:
            UserError: the pipeline is another kind, its UNet has adapters of MILD already, or ``mild`` cannot be used.
        """
        parts = {name: part for name, part in pipeline.components.items() if name in cls._get_signature_types()}
        if unknown := [name for name in components if name not in pipeline.components]:
            raise UserError(f"from_pipe does not know {unknown[0]}: weights are shared as they are; leave it out")
        parts |= components
        name = str(pipeline.name_or_path or type(pipeline).__name__)
        if "text_encoder_2" not in parts or parts.get("unet") is None:
            raise UserError(f"{name} is not of the SDXL family; use one such as {SUGGESTED_BASE}")
        check_channels(parts["unet"].config.in_channels, parts["vae"].config.latent_channels, name)
        layered = getattr(pipeline, "layered", None)
        taken = set(BRANCHES) & set(getattr(parts["unet"], "peft_config", None) or {})
        if (layered is not None or taken) and mild is not None:
            raise UserError(
                f"{name} has MILD's parts already: leave mild={mild} out, or call its layered.remove() before"
            )
        made = cls._over(parts, pipeline.config, keep_scheduler="scheduler" in components)
        made.layered = layered
        made.working_resolutions = getattr(pipeline, "working_resolutions", None)
        return made._completed(getattr(pipeline, "base", "") or str(pipeline.name_or_path or ""), mild)

    def _completed(self, base: str, mild: str | Path | None) -> Self:
        self.set_progress_bar_config()
        if mild is not None:
            self.layered = LayeredUNet.load(self.unet, mild)
        self.base = base
        return self

    @classmethod
    def _over(cls, components: dict[str, Any], config: Any, *, keep_scheduler: bool = False) -> Self:
        names = ("requires_aesthetics_score", "force_zeros_for_empty_prompt")
        scheduler = components["scheduler"] if keep_scheduler else as_ddim(components["scheduler"])
        options = {name: config[name] for name in names if name in config}
        return cls(**components | {"scheduler": scheduler}, **options, add_watermarker=False)

    @classmethod
    def around(cls, pipeline: StableDiffusionXLInpaintPipeline, layered: LayeredUNet) -> Self:
        """Over a base that is loaded and what is on its UNet, as while it is trained; all weights are shared.

        ``layered.resolution`` and ``layered.inference_resolution`` say what the model works at.
        """
        made = cls._over(pipeline.components, pipeline.config)
        made.set_progress_bar_config(disable=True)
        made.layered = layered
        return made

    def save_pretrained(self, folder: str | Path, *, safe_serialization: bool = True, **others: Any) -> None:
        """Write what MILD adds, as `LayeredUNet.save` does; never the base. `from_pretrained` takes the folder.

        Raises:
            UserError: there is nothing but the base, or nobody knows where it is from, the folder holds something else
                or cannot be written, or another of diffusers' options is given.
        """
        _check_options("save_pretrained", others | {"safe_serialization=False": not safe_serialization})
        layered = self._layered()
        if not self.base:
            raise UserError("nobody could load this without its base, whose name is not known: set pipeline.base to it")
        with folder_written_whole(str(folder), CONFIG, OWN) as place:
            steps = layered.inference_steps or STEPS
            layered.save(
                place,
                base=self.base,
                resolution=self.resolutions[0],
                inference_resolution=self.resolutions[1],
                inference_steps=steps,
                prompt=layered.prompt,
                record={},
            )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        **others: Any,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub; gives the commit's URL. Raises `UserError`."""
        _check_options("push_to_hub", others)
        told = {} if commit_message is None else {"commit_message": commit_message}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(f"{folder}/mild")
            return push_to_hub(
                f"{folder}/mild", repo_id, token=token, private=bool(private), create_pr=create_pr, **told
            )

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        masks: Sequence[Any] | None = None,
        remove: Sequence[Any] | None = None,
        *,
        mask_image: Any = None,
        prompt: str | None = None,
        negative_prompt: str | None = "",
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
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
        output_type: OutputType = "pil",
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **stock: Any,
    ) -> Any:
        """Erase people from a photograph; gives an `Erased`, or `ErasedPictures` where ``image`` is a list.

        Args:
            image: PIL image (any 8-bit mode; its EXIF orientation is applied, transparency is laid on white) or
                (H, W, 3) uint8 RGB; or several, of any sizes: then what is said below to belong to a picture is a list
                as well. Results are upright.
            masks: of each picture, a list: one a person, or an only one that holds several people. PIL image or (H, W)
                array, bool, 0..1 or whole numbers, read by the rule of `dataset_tools.mask_files`, as the command
                reads files; upright, or stored as the picture is.
            mask_image: in place of ``masks``, the mask of an only person, of each picture.
            remove: indices of the people to erase, of each picture; None: everybody.
            prompt: what the holes show; None: what the model was trained on, which is the empty prompt unless its
                training says otherwise.
            negative_prompt: with ``guidance_scale`` above 1.
            prompt_embeds, pooled_prompt_embeds: (1, L, D) and (1, D') of `encode_prompt`, in place of ``prompt``; the
                learned prefix is still added to them.
            negative_prompt_embeds, negative_pooled_prompt_embeds: likewise, in place of ``negative_prompt``.
            pose: (N, 18, 3) keypoints, x and y in pixels and score 0..1, of each picture; None where unknown.
            parsing: (H, W) uint8 label map of ``label_set`` (lip, atr or pascal), of each picture; None where unknown.
            order: indices of the people from back to front, of each picture; None: that of the masks.
            layers: paint out everybody and complete everybody who is partly hidden, so that any combination can be
                made from the result, at the price of one foreground branch a hidden person.
            protect: ``faces``, found by pose or parsing, or all of the ``people`` who stay are taken out of the masks
                of those who go (section G.8).
            margin: how far beyond each mask pixels may change, as a share of the square root of its area (see
                `mild.erasing.regions.editable`): more for rough masks, 0 for the masks as they are.
            reach: how far from a mask the model is followed where it sees more of the person (behind others who go) or
                something that they left behind (missed limbs, shadows, reflections), as a share of the square root of
                the mask's area; None: masks alone say what is painted, as in the paper.
            match_colours: bring the colours of the painted background nearer to those around the hole (see
                `mild.erasing.regions.colours_matched`); False: as the networks paint it, which is the paper's method
                alone.
            resolution: pixels of the side of the square that windows are worked on at; None: what the model is meant
                for. Hidden parts of people are painted at no more than the model was trained at. More keeps details of
                large windows, at the price of time, as far as the base knows how.
            num_inference_steps: at most as many as the scheduler was trained on; None: those that the model is meant
                for (the paper uses 25).
            guidance_scale: classifier-free guidance, off up to 1, which is right for the model's own prompt: the
                branches are trained without, never on a withheld prompt. Above 1 each step takes twice the work, and
                what the prompt, the prefix and the cues of HMG change against the negative prompt, without prefix and
                cues but with the branch's adapter and SMA, is exaggerated: of use with a prompt, where the base follows
                it.
            generator: one for all pictures, or one a picture. The same seed gives the same result.
            batch_size: how many windows or layers the UNet sees at once.
            output_type: ``pil``; ``np`` for (H, W, C) uint8, and (H, W) bool for ``removed``; ``pt`` for (C, H, W)
                float32 in 0..1, and (H, W) bool.
            callback_on_step_end: called after every step with the pipeline, the step's number, its time step and a dict
                of the tensors that ``callback_on_step_end_tensor_inputs`` names, ``latents`` (B, C, h, w) float32 of
                the windows that the UNet sees at once; what it gives back in such a dict takes their place. There may
                be several such batches, each of all steps. With ``pipeline._interrupt = True`` no further step
                is taken, and the holes stay unfinished.
            stock: other arguments of stock pipelines are refused, unless they have their default.

        Raises:
            UserError: a picture, mask, cue or argument cannot be used; the message says which.
        """
        _check_stock(stock)
        if mask_image is not None:
            if masks is not None:
                raise UserError("mask_image is the mask of an only person, masks are those of all: give one of them")
            if isinstance(image, list | tuple):
                if not isinstance(mask_image, Collection | np.ndarray | torch.Tensor) or len(mask_image) != len(image):
                    raise UserError(f"mask_image: give a list of {len(image)} masks, one a picture")
                masks = [[mask] for mask in mask_image]
            else:
                masks = [mask_image]
        if output_type not in get_args(OutputType):
            raise UserError(f"output_type is {output_type!r}: give pil, np or pt; latents of windows are no picture")
        wanted = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        if foreign := [name for name in wanted if name not in self._callback_tensor_inputs]:
            raise UserError(f"callback_on_step_end_tensor_inputs names {foreign[0]}: only latents can be had")
        own: dict[str, Any] = {"masks": masks, "remove": remove, "order": order, "pose": pose, "parsing": parsing}
        common: dict[str, Any] = {"label_set": label_set, "layers": layers, "protect": protect, "margin": margin}
        single = not isinstance(image, list | tuple)
        if single:
            if generator is not None and not isinstance(generator, torch.Generator):
                if len(generator) != 1:
                    raise UserError(f"generator has {len(generator)} entries for one picture: give one")
                (generator,) = generator
            photos = [checked_photo(image, generator=generator, **own, **common)]
        else:
            each = [generator] * len(image) if isinstance(generator, torch.Generator) else generator
            photos = checked_photos(image, common, generator=each, **own)
        if reach is not None and not 0 <= reach < math.inf:
            raise UserError(f"reach is {reach}: give a share such as {REACH}, or None for masks alone")
        if resolution is not None and resolution < (least := self._multiple()):
            raise UserError(f"resolution is {resolution}: give {least} or more")
        if resolution is not None and resolution > LARGEST_RESOLUTION:
            raise UserError(f"resolution is {resolution}: give {LARGEST_RESOLUTION} at most")
        if num_inference_steps is None:
            num_inference_steps = (self.layered and self.layered.inference_steps) or STEPS
        most = most_steps(self.scheduler)
        if not 1 <= num_inference_steps <= most:
            raise UserError(f"num_inference_steps is {num_inference_steps}: give 1 to {most}, which the scheduler has")
        if batch_size < 1:
            raise UserError("batch_size must be 1 or more")
        follow = reach is not None and self.layered is not None and self.layered.extents is not None
        sides = (resolution, resolution) if resolution else self.resolutions
        jobs = [job for number, photo in enumerate(photos) for job in self._plan(number, photo, sides, follow)]
        painted: dict[int, _Painted] = {}
        device = self._execution_device  # once: looking for it goes through all modules
        embeds = {
            "prompt_embeds": prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
        }
        text = self._encode_text(prompt, negative_prompt, embeds, guidance_scale, device) if jobs else None
        batches = _batches(jobs, batch_size)
        self._num_timesteps, self._interrupt = num_inference_steps, False
        self._cross_attention_kwargs = self._denoising_end = None  # as in the class above, for callbacks
        with self.progress_bar(total=len(batches) * num_inference_steps) as bar:

            def after_step(number: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return latents
                given = dict.fromkeys(wanted, latents)
                changed: dict[str, torch.Tensor] = callback_on_step_end(self, number, t, given) or {}
                return changed.get("latents", latents)

            for batch in batches:
                self._guidance_scale = guidance_scale  # which a callback may have changed for the batch before
                results = self._paint(batch, text, num_inference_steps, follow, device, after_step)
                painted.update((id(one.job), one) for one in results)
        self.maybe_free_model_hooks()
        erased = []
        for number, photo in enumerate(photos):
            parts = [painted[id(job)] for job in jobs if job.photo == number]
            # Networks see in cells of the latent: strips of half a cell on each side.
            width = self.vae_scale_factor / 2 if match_colours else None
            erased.append(_assembled(photo, parts, reach or 0, width, output_type))
        return erased[0] if single else ErasedPictures(erased)

    def set_attention_slice(self, slice_size: Any) -> None:
        """Raise `UserError`, but to switch slices off (None): MILD's attention is computed in fused kernels already."""
        if self.layered is not None and slice_size is not None:
            raise UserError(
                "enable_attention_slicing would put MILD's attention out of its place, which is computed in fused "
                "kernels and needs no slices: leave it out (enable_model_cpu_offload, vae.enable_tiling save memory)"
            )
        if self.layered is None:
            super().set_attention_slice(slice_size)

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """As stock pipelines fuse a VAE; raises `UserError` for a UNet with MILD, which has adapters on q, k and v."""
        if unet and self.layered is not None:
            raise UserError(
                "fuse_qkv_projections would leave out the adapters that MILD has on the UNet's q, k and v: give "
                "unet=False to fuse the VAE's alone"
            )
        super().fuse_qkv_projections(unet, vae)

    @property
    def resolutions(self) -> tuple[int, int]:
        """Pixels of the side of the square that windows are worked on at: those that are shrunk by less than half, and
        the largest. What MILD's parts are meant for, or the base is."""
        layered = self.layered
        if layered is not None and layered.resolution is not None:
            return layered.resolution, layered.inference_resolution or layered.resolution
        own = int(self.unet.config.sample_size * self.vae_scale_factor)
        return self.working_resolutions or (own, own)

    def _layered(self) -> LayeredUNet:
        if self.layered is None:
            raise UserError("this pipeline is the base alone: load it with from_pretrained(base, mild=...)")
        return self.layered

    def _multiple(self) -> int:
        """What sides of working sizes are divisible by, so that no level of the UNet has to be padded."""
        return int(self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1))

    def _plan(self, number: int, photo: Photo, sides: tuple[int, int], follow: bool) -> Iterator[_Job]:
        """The windows and branches that a picture needs; ``follow``: people are followed behind others."""
        everybody = range(len(photo.masks))
        regions = plan_regions((photo.editable([k]) for k in photo.painted_out), sides[0], self._multiple(), sides[1])
        all_people = editable(photo.masks, everybody, photo.margin)
        # Textures go on at any size; a body is completed as a whole, which was learned at one.
        whole = min(sides[0], self.resolutions[0])
        for region in regions:
            yield self._job(number, photo, region, "bg", None, all_people)
        for k in everybody:
            if k in photo.remove and not photo.layers:
                continue
            freed, touched = photo.freed(k), photo.hidden(k)
            if follow:
                touched |= freed & editable([photo.shows(k)], [0])
            for region in regions:
                if touched[region.rows, region.columns].any():
                    yield self._job(number, photo, resized(region, whole, self._multiple()), "fg", k, freed)

    def _job(self, number: int, photo: Photo, region: Region, branch: Branch, k: int | None, hole: np.ndarray) -> _Job:
        height, width = region.size
        cut_hole = cut_mask(hole, region)
        mask = cut_hole.astype(np.float32) if k is None else cut_soft(photo.masks[k], region)
        shape = (self.vae.config.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        device = torch.device("cpu") if photo.generator is None else photo.generator.device
        noise = randn_tensor((1, *shape), generator=photo.generator, device=device)[0]
        picture, cues = cut_picture(photo.image, region), self._cues(photo, region, k)
        return _Job(number, region, branch, k, picture, cut_hole, mask, noise, self._of_steps(photo, noise), cues)

    @staticmethod
    def _of_steps(photo: Photo, noise: torch.Tensor) -> torch.Generator | None:
        """What schedulers that add noise draw from, for one window: whatever else the UNet sees beside it."""
        if photo.generator is None:
            return None
        seed = derived_seed("steps", hashlib.sha256(noise.cpu().numpy().tobytes()).hexdigest())
        return torch.Generator(photo.generator.device).manual_seed(seed)

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
        self,
        prompt: str | None,
        negative_prompt: str | None,
        embeds: dict[str, torch.Tensor | None],
        guidance_scale: float,
        device: torch.device,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text (1 or 2, L, D) and pooled text (1 or 2, D'); with guidance the negative prompt's come first."""
        for name, words in {"prompt": prompt, "negative_prompt": negative_prompt}.items():
            if words is not None and not isinstance(words, str):
                raise UserError(f"{name} is a {type(words).__name__}: give one text, which is for all holes")
            whole, pooled = embeds[f"{name}_embeds"], embeds[f"{name.removesuffix('prompt')}pooled_prompt_embeds"]
            if (whole is None) != (pooled is None):
                raise UserError(f"{name}_embeds and their pooled_prompt_embeds go together: give both, or none")
            if whole is None or pooled is None:
                continue
            if words:
                raise UserError(f"{name} and {name}_embeds say the same: give one of them")
            if whole.ndim != 3 or len(whole) != 1 or pooled.ndim != 2 or len(pooled) != 1:
                raise UserError(
                    f"{name}_embeds are {tuple(whole.shape)}, pooled {tuple(pooled.shape)}: give (1, length, width) "
                    "and (1, width), which are for all holes"
                )
        embeds = {name: given if given is None else given.to(device) for name, given in embeds.items()}
        own = prompt if prompt is not None else self.layered.prompt if self.layered else ""
        guided = guidance_scale > 1
        text, negative, pooled, negative_pooled = self.encode_prompt(
            own if embeds["prompt_embeds"] is None else None,
            device=device,
            do_classifier_free_guidance=guided,
            negative_prompt=negative_prompt or None,
            **embeds,
        )
        if self.layered is not None:
            text = self.layered.to(text.device).text(text)
        return (torch.cat([negative, text]), torch.cat([negative_pooled, pooled])) if guided else (text, pooled)

    def _paint(
        self,
        jobs: list[_Job],
        text: Any,
        steps: int,
        follow: bool,
        device: torch.device,
        after_step: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> list[_Painted]:
        """What one branch paints in windows of one size, and where it sees people, if they are to be followed."""
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
            for number, t in enumerate(timesteps):
                if self.interrupt:
                    break
                given = self.scheduler.scale_model_input(latents.repeat(copies, 1, 1, 1), t)
                prediction = self.unet(
                    torch.cat([given, fixed], 1).to(dtype),
                    t,
                    encoder_hidden_states=prompt_embeds.to(dtype),
                    added_cond_kwargs=added,
                    return_dict=False,
                )[0].float()
                if copies == 2:
                    without, prediction = prediction.chunk(2)
                    if self.guidance_scale > 1:  # a callback may have ended it
                        prediction = without + self.guidance_scale * (prediction - without)
                latents = self.scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
                latents = after_step(number, t, latents)
            # Holes that stay unfinished say nothing of people.
            likely = self._likely(jobs) if follow and not self.interrupt else [None] * count
        pictures = self._decode(latents)
        return [_Painted(*one) for one in zip(jobs, pictures, likely, strict=True)]

    def _likely(self, jobs: list[_Job]) -> Sequence[np.ndarray | None]:
        """What the extents said in the last step, by job."""
        assert self.layered is not None and self.layered.extents is not None
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
        scaled = ((decode_pictures(self.vae, latents) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return list(scaled.permute(0, 2, 3, 1).cpu().numpy())


def most_steps(scheduler: Any) -> int:
    """In how many steps a scheduler of diffusers denoises at most: those that begin beyond 0 lack the last one."""
    offset = scheduler.config.get("steps_offset", 0) if scheduler.config.get("timestep_spacing") == "leading" else 0
    return int(scheduler.config.num_train_timesteps) - int(offset)


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
    photo: Photo,
    painted: list[_Painted],
    reach: float,
    width: float | None,
    output_type: OutputType,
) -> Erased:
    """Put what was painted into the photograph, and take it apart into layers.

    Args:
        reach: see `MILDPipeline.__call__`.
        width: of the strips whose colours are compared, in pixels; None: colours stay as painted.
    """
    goes = np.zeros(len(photo.masks) + 1, bool)
    goes[[k + 1 for k in photo.painted_out]] = True
    core, area = goes[photo.seen], photo.editable(photo.painted_out)
    background, beyond = photo.image, np.zeros_like(photo.seen)
    for one in painted:
        if one.job.branch == "bg":
            region = one.job.region
            window = region.rows, region.columns
            surely, about = _left_behind(photo, one, reach, goes)
            beyond[window] = np.where(area[window] | (photo.seen[window] > 0), 0, about)
            core[window] |= (surely > 0) & (beyond[window] > 0)
            picture = one.picture
            if width is not None:
                hole = one.job.hole | cut_mask(beyond > 0, region)
                picture = colours_matched(picture, one.job.picture, hole, width)
            background = paste(background, picture, region, core, area | (beyond > 0))
    area |= beyond > 0
    people = [_layer(photo, k, [one for one in painted if one.job.person == k], reach) for k in range(len(photo.masks))]
    parts = LayeredPicture(photo.image, background, area, photo.seen, beyond, people, photo.order, photo.margin)
    parts.icc_profile, parts.metadata = photo.icc_profile, Metadata(dpi=photo.dpi)
    keep = [k for k in range(len(photo.masks)) if k not in photo.remove]
    image, removed = parts.recompose(keep), parts.changed(keep)
    return Erased(
        images=[_in_form(image, output_type, parts)],
        background=_in_form(background, output_type, parts),
        removed=_in_form(removed, output_type),
        parts=parts,
    )


def _left_behind(photo: Photo, painted: _Painted, reach: float, goes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whose a pixel of the window is, beyond all masks, of those who go: surely, and with a border around that.

    Returns:
        Twice (h, w) uint16, numbers as in `Photo.seen`.
    """
    region = painted.job.region
    seen = photo.seen[region.rows, region.columns]
    if painted.likely is None:
        return np.zeros_like(seen), np.zeros_like(seen)
    size = painted.likely.shape
    people = cv2.resize(seen, size[::-1], interpolation=cv2.INTER_NEAREST)
    limits = _limits(photo, region, reach)
    owners = np.where(painted.job.hole, 0, followed(painted.likely, LEFT_BEHIND, people, painted.job.hole, limits))
    near = np.where(owners > 0, owners, cv2.dilate(owners, np.ones((3, 3), np.uint8)))
    found = (enlarged(np.where(painted.job.hole, 0, one), seen.shape) for one in (owners, near))
    surely, about = (np.where(goes[one], one, 0).astype(np.uint16) for one in found)
    return surely, about


def _limits(photo: Photo, region: Region, reach: float) -> list[float]:
    """How far each person is followed in a window, in pixels of its working size."""
    scale = region.size[0] / (region.rows.stop - region.rows.start)
    return [reach * math.sqrt(area) * scale for area in photo.areas]


def _layer(photo: Photo, person: int, painted: list[_Painted], reach: float) -> Layer:
    """A person as the photograph shows them, and as they were painted where others hid them."""
    shown = photo.shows(person)
    if not painted:
        return Layer.cut(photo.image, shown.astype(np.uint8) * 255)
    freed = photo.freed(person)
    colours, alpha = photo.image, np.zeros(shown.shape, np.uint8)
    for one in painted:
        window = one.job.region.rows, one.job.region.columns
        colours = paste(colours, one.picture, one.job.region, ~shown, ~shown)
        alpha[window] = np.where(freed[window], _alpha_behind(photo, person, one, reach), 0)
    alpha[shown | photo.hidden(person)] = 255
    return Layer.cut(colours, alpha)


def _alpha_behind(photo: Photo, person: int, painted: _Painted, reach: float) -> np.ndarray:
    """How much of each pixel of the window the model takes for the person, where they were hidden; (h, w) uint8."""
    region = painted.job.region
    shown = photo.shows(person)[region.rows, region.columns]
    if painted.likely is None:
        return np.zeros(shown.shape, np.uint8)
    likely = np.where(painted.job.hole, painted.likely, 0)
    seen = cv2.resize(shown.astype(np.uint16), likely.shape[::-1], interpolation=cv2.INTER_NEAREST)
    owners = followed(likely, HIDDEN, seen, np.zeros_like(painted.job.hole), [_limits(photo, region, reach)[person]])
    # An edge is soft: half a probability more or less beside 1/2.
    soft = np.clip(2 * likely - 0.5, 0, 1) * (cv2.dilate(owners, np.ones((3, 3), np.uint8)) > 0)
    return np.rint(255 * cv2.resize(soft, shown.shape[::-1], interpolation=cv2.INTER_LINEAR)).astype(np.uint8)


def _form_of(picture: Any) -> OutputType:
    """What ``output_type`` a result was asked for with."""
    forms: dict[type, OutputType] = {np.ndarray: "np", torch.Tensor: "pt"}
    return forms.get(type(picture), "pil")


def _in_form(array: np.ndarray, output_type: OutputType, parts: LayeredPicture | None = None) -> Any:
    """A picture (H, W, C) uint8, or a mask (H, W) bool, as ``output_type`` says; a PIL image has the profile and
    resolution of ``parts`` in its ``info``, from where Pillow's writers take the profile."""
    if output_type == "np":
        return array
    if output_type == "pt":
        tensor = torch.from_numpy(array)
        return tensor if array.dtype == np.bool_ else tensor.permute(2, 0, 1).float() / 255
    picture = Image.fromarray(array.astype(np.uint8) * 255 if array.dtype == np.bool_ else array)
    if parts is not None:
        known = {"icc_profile": parts.icc_profile, "dpi": parts.metadata.dpi}
        picture.info |= {name: value for name, value in known.items() if value is not None}
    return picture


def _check_stock(given: dict[str, Any]) -> None:
    """Raise `UserError` for a stock pipeline's argument that is not taken, and `TypeError` for what is none."""
    for name, value in given.items():
        if name not in STOCK:
            raise TypeError(f"MILDPipeline.__call__() got an unexpected keyword argument {name!r}")
        default = STOCK[name].default
        if value is not None and not (isinstance(value, int | float | tuple) and value == default):
            raise UserError(f"{name}: {NOT_HERE.get(name, 'MILD has no use for it')}; leave it out")
