"""What is compared, on which pictures, and by which metrics: the recipe of an evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dataset_tools.schema import Configuration, Split
from dataset_tools.settings import Settings
from dataset_tools.storage_options import Location
from mild.evaluation.methods.attentive_eraser import AttentiveEraserMethod
from mild.evaluation.methods.clipaway import CLIPAwayMethod
from mild.evaluation.methods.command import CommandMethod
from mild.evaluation.methods.fills import FillMethod
from mild.evaluation.methods.folder import FolderMethod
from mild.evaluation.methods.lama import LaMaMethod
from mild.evaluation.methods.mild import BaseMethod, MILDMethod
from mild.evaluation.methods.opencv import OpenCVMethod
from mild.evaluation.methods.osor import OSORMethod
from mild.evaluation.methods.powerpaint import PowerPaintMethod
from mild.evaluation.methods.rorem import RORemMethod
from mild.evaluation.methods.sdxl import SDXLMethod
from mild.metrics.embeddings import CLIP, DINO
from mild.metrics.inception import FID, KID
from mild.metrics.lpips import LPIPS
from mild.metrics.outside import ChangeOutside
from mild.metrics.perceptual import PerceptualDistance
from mild.metrics.psnr import PSNR
from mild.metrics.rcs import RCS
from mild.metrics.remove import Remove
from mild.metrics.residual_person import ResidualPerson
from mild.metrics.seam import Seam
from mild.metrics.ssim import SSIM

Masks = Literal["exact", "augmented"]
"""Kinds of masks that methods are given. ``augmented``: faulty ones (too narrow, shifted, limbs missing), as annotators
and networks make them."""
AnyMethod = Annotated[
    OpenCVMethod
    | FillMethod
    | BaseMethod
    | MILDMethod
    | SDXLMethod
    | RORemMethod
    | OSORMethod
    | AttentiveEraserMethod
    | LaMaMethod
    | PowerPaintMethod
    | CLIPAwayMethod
    | CommandMethod
    | FolderMethod,
    Field(discriminator="kind"),
]
AnyMetric = Annotated[
    PSNR
    | SSIM
    | PerceptualDistance
    | LPIPS
    | DINO
    | CLIP
    | FID
    | KID
    | ResidualPerson
    | ChangeOutside
    | Seam
    | Remove
    | RCS,
    Field(discriminator="kind"),
]


class PicturesSettings(Settings):
    """Pictures of a dataset."""

    place: Location | None = None
    """Folder or URL of the dataset; null: that of the command."""
    configuration: Configuration = "composite"
    """Of the dataset. Pictures of ``real`` have no clean background: metrics that need one are not computed on them."""
    split: Split = "test"
    """Of the dataset."""


class DatasetSettings(PicturesSettings):
    """Pictures to judge on."""

    samples: int | None = Field(None, ge=1)
    """How many are drawn; all where there are fewer, or with null."""
    masks: tuple[Masks, ...] = Field(("exact",), min_length=1)
    """Kinds of masks that the methods are given, each picture with each; ``augmented`` needs composites."""
    categories: tuple[str, ...] = ()
    """What is to vanish, such as ``Dog``, as the source calls it; all else stays. Empty: everybody and everything that
    has a mask."""


class EvaluateSettings(Settings):
    """Everything that the flow ``evaluate`` needs to know but where its output and the adapters lie."""

    datasets: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")], DatasetSettings] = Field(
        default_factory=lambda: {"composite": DatasetSettings()}, min_length=1
    )
    """Pictures to judge on, by the name that tables give them."""
    methods: tuple[AnyMethod, ...] = Field(
        default_factory=lambda: named_kinds(["telea", "sdxl-inpaint", "base", "mild"]),
        min_length=1,
        validate_default=True,
    )
    """What is compared, in the order of tables. A kind alone, such as ``telea``, is that method as it is by default."""
    metrics: tuple[AnyMetric, ...] = Field(
        default_factory=lambda: named_kinds(["psnr_hole", "perceptual_hole", "psnr", "ssim"]),
        min_length=1,
        validate_default=True,
    )
    """By what it is judged, the most important first; a kind alone as with methods."""
    baseline: str = ""
    """Method, or arm, that differences are taken to; empty: ``base`` where it is among the methods, else the first."""
    inference_steps: int = Field(25, ge=1, le=1000)
    """Denoising steps of diffusion methods that do not set their own."""
    prompt: str = ""
    """What the holes show, for methods that take text; empty: MILD's and its base's is that of its training."""
    base: str = ""
    """Folder, hub id or bundled name of the SDXL inpainting base; empty: that of the adapters."""
    person_free: PicturesSettings | None = None
    """Pictures whose clean backgrounds, which show nobody, are the reference of FID* and KID*."""
    seed: int = Field(0, ge=0)
    """Decides which pictures are drawn, the noise of each, and the bootstrap."""
    resamples: int = Field(2000, ge=100)
    """Bootstrap resamples behind each 95 % interval."""
    shown: int = Field(24, ge=0)
    """Cases in the report's gallery, at most."""
    layers: int = Field(4, ge=0)
    """Pictures that the report shows in layers, to switch people on and off, at most."""
    leakage: int = Field(4, ge=0)
    """Pictures on which semantic leakage is measured, at most."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds that a step may take, such as erasing everybody in the pictures of one shard by one method. One that
    takes longer is ended and tried again, twice; then the run fails. Null: any time."""

    @field_validator("methods", "metrics", mode="before")
    @classmethod
    def _kinds(cls, value: Any) -> Any:
        return named_kinds(value)

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        for what, names in (
            ("methods", [method.name for method in self.methods]),
            ("metrics", [metric.name for metric in self.metrics]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{what}: {twice[0]} is named twice; give one of them another name")
        taken = {"mask"} & {method.name for method in self.methods}
        if taken:
            raise ValueError(f"methods: {', '.join(taken)} is what the masks' own files are called; give another name")
        for name, dataset in self.datasets.items():
            if len(set(dataset.masks)) != len(dataset.masks):
                raise ValueError(f"datasets.{name}.masks names one of them twice")
        for method in self.methods:
            if method.arm in {other.name for other in self.methods if other is not method}:
                raise ValueError(f"methods: {method.arm} is the name of a method and of an arm: rename one of them")
        free = [metric.name for metric in self.metrics if getattr(metric, "reference_pictures", "") == "person-free"]
        if free and self.person_free is None:
            raise ValueError(f"{free[0]} needs person_free: name pictures that show nobody")
        known = {method.name for method in self.methods} | {method.arm for method in self.methods}
        if self.baseline and self.baseline not in known:
            raise ValueError(f"baseline {self.baseline!r} is none of the methods: {', '.join(sorted(known - {''}))}")
        for method in self.methods:
            if method.below and method.below not in known - {method.name, method.arm}:
                others = ", ".join(sorted(known - {"", method.name, method.arm}))
                raise ValueError(f"methods: below {method.below!r} of {method.name} is none of the others: {others}")
        return self

    def compared_with(self) -> str:
        """The method, or arm, that differences are taken to."""
        names = [method.name for method in self.methods]
        return self.baseline or ("base" if "base" in names else names[0])


def named_kinds(value: Any) -> Any:
    """Kinds alone as settings: ``telea`` for ``{kind: telea}``."""
    return (
        [{"kind": one} if isinstance(one, str) else one for one in value] if isinstance(value, list | tuple) else value
    )
