"""Settings of training, in a module that imports no torch, so that flows read them at once."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from dataset_tools.settings import Settings


class LoraSettings(Settings):
    """The two low-rank adapters ``fg`` and ``bg`` on the UNet's attention (section 3.2)."""

    rank: int = Field(16, ge=1, le=1024)
    """Rank of both adapters."""
    alpha: int = Field(16, ge=1)
    """Scaling numerator: an adapter adds ``alpha / rank * B A`` to a weight."""
    target_modules: tuple[str, ...] = Field(("to_q", "to_k", "to_v"), min_length=1)
    """Linear layers of self- and cross-attention (``attn1``, ``attn2``) that get an adapter."""


class HmgSettings(Settings):
    """Human Morphology Guidance (section 3.3): how cues are drawn, encoded and dropped."""

    grid: int = Field(4, ge=1, le=16)
    """Each cue becomes ``grid`` x ``grid`` tokens, one a cell of the picture."""
    width: int = Field(64, ge=8, le=1024, multiple_of=8)
    """Channels of the convolution stack that the cues share."""
    map_side: int = Field(128, ge=16, le=1024)
    """Longer side of the maps that cues are drawn on, in pixels; the shorter one keeps the picture's aspect."""
    joint_width: float = Field(0.015, gt=0, le=0.5)
    """Standard deviation of a joint's or limb's Gaussian profile, as a share of ``map_side``."""
    cues: tuple[Literal["pose", "parsing"], ...] = Field(("pose", "parsing"), min_length=1)
    """What it is given of the people; without one of them the model is a rung of table 6."""
    dropout: float = Field(0.1, ge=0, le=1)
    """Probability that a cue of a sample is withheld in training, each by itself, so that every one stays optional."""


class OffsetSettings(Settings):
    """The optional parts of Algorithm 3; all are off by default."""

    spatial_offset: bool = False
    """E_trans(M) is added to the noisy latent (line 1)."""
    boundary_smoothing: bool = False
    """Features are smoothed along the mask's boundary after every spatial transformer (line 14)."""
    width: int = Field(32, ge=1, le=1024)
    """Channels inside E_trans."""

    @property
    def any(self) -> bool:
        """Whether a part is switched on."""
        return self.spatial_offset or self.boundary_smoothing


class PrefixSettings(Settings):
    """The learnable prompt prefix (section G.8)."""

    tokens: int = Field(8, ge=1, le=64)
    """n: learned tokens."""


class ExtentsSettings(Settings):
    """The head that says how far people reach beyond their masks: see `mild.model.extents`."""

    width: int = Field(32, ge=1, le=1024)
    """Channels between its two convolutions."""
    detail: int = Field(4, ge=1, le=16)
    """Answers a side of each cell of the latent; 8 are one a pixel of SDXL's."""


class MildSettings(Settings):
    """What MILD adds to the UNet of a base."""

    lora: LoraSettings = LoraSettings()
    """The adapters of the two branches."""
    sma: bool = True
    """Spatially-Modulated Attention in every self-attention (section 3.4)."""
    sma_constraints: bool = True
    """Whether its scalars (alpha_st of eq. 3) are held to alpha_10, alpha_01 <= 0 and alpha_11, alpha_00 >= 0 after
    every step (section 3.4). Without, regions may be drawn to one another as well, which tells what these bring."""
    hmg: HmgSettings | None = HmgSettings()
    """Human Morphology Guidance in every cross-attention (section 3.3); null leaves it out."""
    offsets: OffsetSettings = OffsetSettings()
    """Spatial offset and boundary smoothing (Algorithm 3)."""
    prefix: PrefixSettings | None = None
    """The learnable prompt prefix; null leaves it out."""
    extents: ExtentsSettings | None = ExtentsSettings()
    """What masks miss of those who go, and where those who stay go on behind them; null leaves it out, as the paper
    does: then masks alone say so."""


class WarmUpSettings(Settings):
    """The schedule lambda_s of the foreground losses (eq. 5), over the training step s counted from 0."""

    start: int = Field(8000, ge=0)
    """s_0: before this step the foreground weighs nothing and its adapter is not trained."""
    end: int = Field(12000, ge=0)
    """s_1: from this step on the weight is ``weight``; the paper leaves it open."""
    weight: float = Field(1.0, ge=0)
    """lambda: final weight of the foreground losses."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.end < self.start:
            raise ValueError(f"end ({self.end}) must not lie before start ({self.start})")
        return self


class RegionLossSettings(Settings):
    """Weights of the region-aware loss of the foreground (appendix D), which names its three terms without numbers."""

    core: float = Field(1.0, ge=0)
    """Squared error of the cells that lie inside the person."""
    boundary: float = Field(2.0, ge=0)
    """Squared error in the band along the person's outline, on its inner side. With 1 for both and no gradient term
    the loss is that of eq. 4."""
    gradient: float = Field(0.1, ge=0)
    """Squared difference of the errors of neighbouring cells."""
    width: int = Field(1, ge=1, le=16)
    """Width of the band, in cells of the latent."""


class CropSettings(Settings):
    """Random square crops (section G.1). Each keeps the chosen person, or as much as fits, and as much around them as
    the picture allows, up to nine times their area, and is no smaller than ``resolution``."""

    smallest: float = Field(0.5, gt=0, le=1)
    """Smallest side, as a share of the picture's shorter side, which is the largest."""


class FreshCompositeSettings(Settings):
    """What is asked of composites that are made anew; what is null is as the dataset was built, as is all else of
    `dataset_tools.compositing.CompositorSettings`."""

    people: dict[PositiveInt, NonNegativeFloat] | None = Field(None, min_length=1)
    """Target distribution: number of people in a picture to its relative weight."""
    overlap: float | None = Field(None, ge=0, le=1)
    """Target share, among pictures of two people and more, of those in which people overlap."""
    max_occlusion: float | None = Field(None, gt=0, lt=1)
    """Largest share of a person that others may hide; where people are to overlap, what is aimed at is uniform in 0 to
    this."""


HOW_NOT_WHAT = {
    "workers",
    "gradient_accumulation",
    "gradient_checkpointing",
    "compile",
    "log_every",
    "checkpoint_every",
    "checkpoints_kept",
    "trackers",
    "samples_every",
    "sample_pictures",
}
"""Settings of training that change its result by rounding at most."""


LATENTS_FORMAT = 3
"""Version of what `mild.training.latents` encodes and how it is kept."""


class TrainSettings(Settings):
    """How layered LoRA is trained."""

    steps: int = Field(20000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(4, ge=1)
    """Samples a step, on all processes together; each gives one background and, once lambda_s > 0, one foreground
    example. Processes and ``gradient_accumulation`` share them out, and change the result by rounding only."""
    workers: int = Field(0, ge=0, le=256)
    """Processes, beside each one that trains, that read samples and make examples of them while the GPU computes; they
    change no bit of the result. Each imports torch (0.5 GB) and has up to two steps' examples ready, in shared memory
    (``/dev/shm``): 10 MB a sample at 512 pixels. 0: the training process does it between steps. The log's
    ``waiting_for_data`` says whether there are enough."""
    gradient_accumulation: int = Field(1, ge=1)
    """Passes in which a process takes its share of a step's samples, for less memory; ``batch_size`` must be a
    multiple of processes times this."""
    gradient_checkpointing: bool = False
    """Activations of the UNet's blocks are computed again in the backward pass instead of kept: about a third more
    time, a fraction of the memory."""
    compile: bool = False
    """The UNet is compiled (``torch.compile``, once a branch): the first steps then take minutes, all others less."""
    max_grad_norm: float | None = Field(None, gt=0)
    """Gradients of everything that is trained are scaled down together to this norm where theirs is larger; null
    leaves them as they are."""
    learning_rate: float = Field(1e-6, gt=0)
    """AdamW's for both adapters, at its highest (see ``lr_scheduler``)."""
    guidance_learning_rate: float = Field(1e-3, gt=0)
    """AdamW's for HMG, offsets and prompt prefix. These start as small encoders behind gates of zero: an AdamW step
    moves a gate by about the rate, so that at the adapters' 1e-6 none would open within 20,000 steps."""
    sma_learning_rate: float = Field(1e-2, gt=0)
    """AdamW's for the scalars of SMA. They are biases on logits, which count from about 1 on; 20,000 steps of 1e-6
    would move them by 0.02 at most."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """What the three learning rates are multiplied by over the steps, by diffusers' names."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rates rise from zero; ``constant`` has none."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Exponential moving average of all that is trained, which is then what the run leaves; null leaves the last
    step's. Early on the average forgets faster: (1 + step) / (10 + step)."""
    seed: int = Field(0, ge=0, le=2**64 - 1)
    """Decides the initial adapters, the order of samples, and noise, time step and person of each example."""
    resolution: int = Field(512, ge=8)
    """Side of the square crop that is trained on, in pixels."""
    prompt: str = ""
    """Text for both branches, with which ``mild erase`` erases, too. Where adapters are trained further
    (``start_from``), this and the next two are theirs unless they are set here."""
    inference_steps: int = Field(25, ge=1, le=1000)
    """DDIM steps in which the model is meant to erase; ``mild erase`` takes as many."""
    inference_resolution: int | None = Field(None, ge=8)
    """Side in pixels of the square that people's surroundings are worked on at when the background is painted, at
    most; null: ``resolution``. Windows more than twice as large as ``resolution`` are only halved, as far as this
    allows: more of them is kept. People who are hidden in part are completed at ``resolution``."""
    states: Literal["noised", "visited"] = "noised"
    """What noisy latents the branches learn from. ``noised``: noised truth, at a time step drawn from all (the paper).
    ``visited``: those that erasing in ``inference_steps`` comes by, from its start (the noised picture with its holes
    filled smoothly) on over the model's own answers, each step of them equally often; the answers are computed
    without gradient, (``inference_steps`` - 1) / 2 more passes of the UNet on average."""
    outside: float = Field(1.0, gt=0, le=1)
    """How much errors count where nothing is to be repainted, against 1 in the hole and, for the background branch,
    where the picture shows shadows, reflections and what the mask misses; 1 is eq. 4."""
    extents_loss: float = Field(0.1, ge=0)
    """How much the loss of `mild.model.extents` counts beside that of its branch."""
    mild: MildSettings = MildSettings()
    start_from: str | None = Field(None, min_length=1)
    """A MILD directory, folder or hub id, whose adapters and other parts are trained further; all of ``mild`` comes
    from there. Where ``mild`` names a ``prefix``, only a new one of that size is trained, on the rest as it is
    (section G.8). Null: all is trained from the start."""
    warm_up: WarmUpSettings = WarmUpSettings()
    protect_background: int = Field(0, ge=0)
    """Before this step the background's adapter is frozen, as Algorithm 2 does while the foreground is trained; 0:
    never. ``warm_up`` then has to start before it."""
    region_loss: RegionLossSettings | None = None
    """The region-aware loss for the foreground; null: that of eq. 4."""
    crop: CropSettings | Literal["window"] | None = None
    """Random crops; ``window``: squares like the windows in which a photograph is worked on, about as large and with
    the chosen person anywhere in them; null: always the largest square, with the chosen person in its middle."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability that an example is mirrored left to right."""
    recolour: float = Field(0.0, ge=0, le=1)
    """Probability that the colours of an example are changed (`mild.training.colours`): a base that knows
    few pictures fills the holes of others in the colours of those."""
    fresh_composites: FreshCompositeSettings | None = None
    """Each time that a ``composite`` sample is drawn, another composite is made in its place, of people of the
    dataset's photographs on the same clean plate (`mild.training.fresh`): no two steps see the same. An empty group
    (``{}``) makes them as the dataset's were, but without reflections. Null: those of the dataset, again and again."""
    cached_views: int | None = Field(None, ge=1)
    """Each sample is seen in this many fixed views (faulty masks, crop, flip, colours, person), whose latents the flow
    ``train`` computes once, before training, and keeps; null: in another view each time. At 512 pixels a view takes
    256 KiB. Fixed views show everybody in turn; others more often those who touch somebody or are hidden in part."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the forward pass and of the UNet's frozen weights; all that is trained, the optimizer and the VAE
    stay in float32."""
    log_every: int = Field(10, ge=1)
    """Steps between two entries of the log; the loss of every step is in ``loss.csv`` anyway."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """What the log is written to, beside the progress bar: event files for TensorBoard in the work folder, or Weights
    & Biases, whose package has to be installed."""
    samples_every: int | None = Field(None, ge=1)
    """Steps between two sheets of sample pictures, people of the split ``validation`` erased with the weights so far;
    a last one goes with the adapters. Null draws none."""
    sample_pictures: int = Field(4, ge=1, le=64)
    """Pictures on a sheet; each is erased in ``inference_steps``."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between two checkpoints, from which a run that was cut short goes on."""
    checkpoints_kept: int = Field(2, ge=1)
    """How many of the newest checkpoints are kept until the run is complete."""

    def determines(self) -> dict[str, Any]:
        """The settings that decide about the result; the others, how it is come by, may change within a run.

        Not where the directory of ``start_from`` lies; whoever remembers results adds its digest.
        """
        return self.model_dump(mode="json", exclude=HOW_NOT_WHAT | {"start_from"})

    def determines_views(self) -> dict[str, Any]:
        """The settings that decide about the fixed views (``cached_views``) of a sample."""
        decisive = {"seed", "resolution", "crop", "flip", "recolour", "cached_views", "states"}
        return self.model_dump(mode="json", include=decisive)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of gradient_accumulation "
                f"({self.gradient_accumulation})"
            )
        if self.fresh_composites is not None and self.cached_views is not None:
            raise ValueError("cached_views keeps what fresh_composites makes anew each time: leave one of them out")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("lr_warmup_steps would do nothing with lr_scheduler constant: use constant_with_warmup")
        return self

    @model_validator(mode="after")
    def _parts_come_from_one_place(self) -> Self:
        if self.start_from is not None and self.mild != MildSettings(prefix=self.mild.prefix):
            raise ValueError("start_from: all of mild but a new prefix comes from that directory: leave the rest out")
        return self

    @model_validator(mode="after")
    def _something_to_train(self) -> Self:
        start, weight, protected = self.warm_up.start, self.warm_up.weight, self.protect_background
        if protected and (start >= protected or not weight):
            cure = f"warm_up.start ({start}) to 0" if start >= protected else f"warm_up.weight ({weight:g}) higher"
            raise ValueError(
                f"protect_background ({protected}) leaves no adapter to train before step {protected}: set {cure}"
            )
        return self
