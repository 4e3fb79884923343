"""Human Morphology Guidance (HMG, section 3.3, Algorithm 1): pose, parsing and masks as tokens beside the text.

Each cue is drawn as maps (`draw_pose`, `draw_parsing`, `draw_masks`), encoded by a convolution stack that all cues
share, pooled to a small grid of cells relative to the picture (so any aspect ratio will do) and projected linearly
to one token a cell in the text's space. The conditions of Algorithm 1 are

    C_k  = [text; pose; parse; mask_k]    for the foreground branch of person k
    C_bg = [text; pose; parse]            for the background

Tokens that are merely appended draw attention mass, even when they are zero: the softmax gives them a share, and a
base that was never trained with them changes. A learned offset on their logits cures that only at about -20, where
the gradients of offset and encoders are of the order of the mass, 1e-9, and AdamW's epsilon swallows them. So the
two parts of C keep a softmax each, and a gate g, one number a head and block, starts at 0:

    attention(Q, C) = softmax(Q K_text^T / sqrt(d)) V_text + g * softmax(Q K_cues^T / sqrt(d)) V_cues

An untrained HMG changes nothing, exactly; g has its full gradient at the first step and the encoders from the second
on. Keys and values come from the layer's own ``to_k`` and ``to_v``, with the adapter of the branch; both attentions
are plain scaled dot products without a mask, so fused kernels stay in use. g moves by about the learning rate a step:
train it with one like 1e-3, not with the adapters' 1e-6.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from dataset_tools.errors import UserError
from dataset_tools.masks import BONES
from dataset_tools.schema import KEYPOINTS, NO_PARSING, PARSING_LABELS
from mild.model.backbone import Branch
from mild.settings import HmgSettings

COMMON_LABELS = (
    "background", "hat", "hair", "face", "head", "upper_body", "lower_body", "whole_body", "accessory",
    "left_arm", "right_arm", "arm", "left_leg", "right_leg", "leg", "left_shoe", "right_shoe",
)  # fmt: skip
"""What the label sets are mapped to. ``head``, ``arm`` and ``leg`` are Pascal's, which tells neither faces from hair
nor left from right."""

TO_COMMON: dict[str, tuple[str, ...]] = {
    "lip": (
        "background", "hat", "hair", "accessory", "face", "upper_body", "whole_body", "upper_body", "lower_body",
        "lower_body", "whole_body", "accessory", "lower_body", "face", "left_arm", "right_arm", "left_leg",
        "right_leg", "left_shoe", "right_shoe",
    ),
    "atr": (
        "background", "hat", "hair", "face", "upper_body", "lower_body", "lower_body", "whole_body", "accessory",
        "left_shoe", "right_shoe", "face", "left_leg", "right_leg", "left_arm", "right_arm", "accessory", "accessory",
    ),
    "pascal": ("background", "head", "upper_body", "arm", "arm", "leg", "leg"),
}  # fmt: skip
"""The common label of each label of `PARSING_LABELS`. Clothes go by the part of the body that they cover; sunglasses
are part of the face; gloves, scarves, belts and bags are accessories."""

CHANNELS = {"pose": len(KEYPOINTS) + len(BONES), "parsing": len(COMMON_LABELS), "masks": 2}
"""Maps a cue."""

_JOINT = {name: index for index, name in enumerate(KEYPOINTS)}
_REACH = 6.0
"""A profile is drawn as far as this many standard deviations, where it is below 2e-8."""
_STOCK_PROCESSORS = (AttnProcessor2_0, AttnProcessor)


@dataclass(frozen=True)
class Cue:
    """One cue of a batch."""

    maps: torch.Tensor
    """(B, C, h, w) float, with the C of `CHANNELS`; what they hold where ``present`` is False has no influence."""
    present: torch.Tensor
    """(B,) bool: which samples have this cue; the others get the learned "absent" tokens."""


def map_size(size: tuple[int, int], settings: HmgSettings) -> tuple[int, int]:
    """Height and width of the maps of a picture of ``size`` (height, width)."""
    longer = max(size)
    height, width = (max(1, round(side * settings.map_side / longer)) for side in size)
    return height, width


def draw_pose(keypoints: np.ndarray, size: tuple[int, int], settings: HmgSettings) -> torch.Tensor:
    """Heat maps of the 18 joints and maps of the 17 limbs of everybody in a picture, (35, h, w) float32 in 0..1.

    A map is the largest over all people of ``score * exp(-distance^2 / (2 sigma^2))``, the distance being that to
    the joint or to the limb's segment, whose score is the smaller of its ends'. Joints with score 0 are not found
    and not drawn, nor are their limbs.

    Args:
        keypoints: (P, 18, 3): x and y in pixels of the picture (whole numbers are centres of pixels) and score
            0..1, in the order of `KEYPOINTS`; P may be 0.
        size: the picture's (height, width).

    Raises:
        ValueError: the keypoints have another shape.
    """
    if keypoints.ndim != 3 or keypoints.shape[1:] != (len(KEYPOINTS), 3):
        raise ValueError(f"keypoints are {keypoints.shape}, not (people, {len(KEYPOINTS)}, 3)")
    height, width = map_size(size, settings)
    scale = np.array([width / size[1], height / size[0]])
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns, rows], axis=-1).astype(np.float64)
    sigma = settings.joint_width * settings.map_side
    maps = np.zeros((CHANNELS["pose"], height, width), np.float32)
    starts = [_JOINT[start] for start, _ in BONES]
    ends = [_JOINT[end] for _, end in BONES]
    for person in np.asarray(keypoints, np.float64):
        points, score = (person[:, :2] + 0.5) * scale - 0.5, person[:, 2].clip(0, 1)
        from_, to = np.concatenate([points, points[starts]]), np.concatenate([points, points[ends]])
        scores = np.concatenate([score, np.minimum(score[starts], score[ends])])
        first = np.minimum(from_, to) - _REACH * sigma
        last = np.maximum(from_, to) + _REACH * sigma
        starts_at, ends_at = (
            np.clip(corner, 0, [width, height]).astype(int) for corner in (np.floor(first), np.ceil(last) + 1)
        )
        for channel in np.flatnonzero(scores > 0):
            (left, top), (right, bottom) = starts_at[channel], ends_at[channel]
            near = maps[channel, top:bottom, left:right]
            distance = _squared_distance(pixels[top:bottom, left:right], from_[channel], to[channel])
            profile = scores[channel] * np.exp(-distance / (2 * sigma**2))
            np.maximum(near, profile, out=near, casting="same_kind")
    return torch.from_numpy(maps)


def _squared_distance(pixels: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Of each pixel, (h, w, 2) as x and y, to the segment between two points, which may coincide."""
    along = end - start
    length = float(along @ along)
    share = ((pixels - start) @ along / length).clip(0, 1) if length > 0 else np.zeros(pixels.shape[:2])
    return np.square(pixels - start - share[..., None] * along).sum(-1)


def draw_parsing(labels: np.ndarray, label_set: str, settings: HmgSettings) -> torch.Tensor:
    """One map a common label, (17, h, w) float32: the share of each map pixel that has the label.

    Args:
        labels: (H, W) uint8 of the set ``lip``, ``atr`` or ``pascal``; `NO_PARSING` counts for no label.

    Raises:
        ValueError: the label set is unknown, or has no such label.
    """
    if label_set not in TO_COMMON:
        raise ValueError(f"unknown label set {label_set!r}: use one of {', '.join(TO_COMMON)}")
    # One entry more, for pixels without a label: it becomes a map that is not returned.
    unlabelled = len(COMMON_LABELS)
    table = np.full(256, unlabelled + 1, np.uint8)
    table[: len(TO_COMMON[label_set])] = [COMMON_LABELS.index(name) for name in TO_COMMON[label_set]]
    table[NO_PARSING] = unlabelled
    common = table[labels]
    if (common > unlabelled).any():
        raise ValueError(
            f"the label map holds {labels[common > unlabelled].max()}; "
            f"{label_set!r} has labels 0 to {len(PARSING_LABELS[label_set]) - 1}"
        )
    size = map_size((labels.shape[0], labels.shape[1]), settings)
    return torch.cat([_averaged(common == label, size) for label in range(len(COMMON_LABELS))])


def draw_masks(masks: np.ndarray, target: int, settings: HmgSettings) -> torch.Tensor:
    """M_k and M_others = clamp(sum of the others, 0, 1) of person k = ``target``, (2, h, w) float32 in 0..1.

    Args:
        masks: (N, H, W), bool or in 0..1.

    Raises:
        ValueError: the array has another shape.
        IndexError: there is no such person.
    """
    if masks.ndim != 3:
        raise ValueError(f"masks are {masks.shape}, not (people, height, width)")
    if not 0 <= target < len(masks):
        raise IndexError(f"there are {len(masks)} masks, and none has the index {target}")
    others = np.delete(masks, target, axis=0).sum(axis=0, dtype=np.float32).clip(0, 1)
    size = map_size((masks.shape[1], masks.shape[2]), settings)
    return torch.cat([_averaged(masks[target], size), _averaged(others, size)])


def _averaged(plane: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Area averages of (H, W) on a grid of ``size``, (1, h, w)."""
    return F.adaptive_avg_pool2d(torch.from_numpy(plane.astype(np.float32))[None], size)


def stack_cue(maps: Sequence[torch.Tensor | None]) -> Cue | None:
    """One cue of a batch from that of each sample, None where a sample lacks it; None where all do.

    Raises:
        ValueError: the maps differ in size.
    """
    sizes = {tuple(one.shape) for one in maps if one is not None}
    if not sizes:
        return None
    if len(sizes) > 1:
        raise ValueError(f"the maps of a batch must have one size, not {sorted(sizes)}")
    empty = torch.zeros(sizes.pop())
    present = torch.tensor([one is not None for one in maps])
    return Cue(torch.stack([empty if one is None else one for one in maps]), present)


class HumanMorphologyGuidance(nn.Module):
    """Encoders of the cues, their "absent" tokens, and the gates of every cross-attention of one UNet.

    It keeps no reference to the UNet; `install_morphology` connects both. The state dict holds plain tensors that
    safetensors can write, and with the settings rebuilds the module.

    "Absent" tokens start at zero. Layers without bias, such as SDXL's, then give them zero values: without any cue,
    a UNet computes what its base does until they are trained.

    Args:
        unet: an SDXL UNet, for the width of its text space and the number of heads of its layers ``attn2``.
        seed: decides the initial weights.
    """

    def __init__(self, unet: UNet2DConditionModel, settings: HmgSettings, seed: int) -> None:
        super().__init__()
        self.settings = settings
        text_width = int(unet.config.cross_attention_dim)
        tokens = settings.grid**2
        channels = {cue: count for cue, count in CHANNELS.items() if cue == "masks" or cue in settings.cues}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stems = nn.ModuleDict(
                {cue: nn.Conv2d(count, settings.width, 3, stride=2, padding=1) for cue, count in channels.items()}
            )
            self.shared = nn.Sequential(*(layer for _ in range(2) for layer in _convolution(settings.width)))
            self.projections = nn.ModuleDict({cue: nn.Linear(settings.width, text_width) for cue in channels})
            self.positions = nn.ParameterDict(
                {cue: nn.Parameter(0.02 * torch.randn(tokens, text_width)) for cue in channels}
            )
        self.norms = nn.ModuleDict({cue: nn.LayerNorm(text_width) for cue in channels})
        self.absent = nn.ParameterDict({cue: nn.Parameter(torch.zeros(tokens, text_width)) for cue in channels})
        self.gates = nn.ParameterDict(
            {_key(name): nn.Parameter(torch.zeros(layer.heads)) for name, layer in _cross_attentions(unet).items()}
        )
        self.given: torch.Tensor | None = None
        self.door: RemovableHandle | None = None

    def forward(
        self,
        branch: Branch,
        batch: int,
        *,
        pose: Cue | None = None,
        parsing: Cue | None = None,
        masks: Cue | None = None,
    ) -> torch.Tensor:
        """The tokens beside the text: [pose; parse; mask_k] for ``fg``, [pose; parse] for ``bg`` (Algorithm 1).

        Without the cues that the settings leave out.

        A cue that is None, or whose ``present`` is False for a sample, gives its "absent" tokens there. Without any
        cue, these are the tokens for the negative prompt of classifier-free guidance.

        Args:
            branch: the background has no ``masks``.
            batch: B, the number of samples.

        Returns:
            (B, T, D) with D the width of the text space and T = ``grid`` squared times the number of cues.

        Raises:
            ValueError: a cue has another number of samples or maps, or masks are given for the background.
        """
        if branch == "bg" and masks is not None:
            raise ValueError("the background branch has no mask tokens (Algorithm 1, line 9)")
        cues = {"pose": pose, "parsing": parsing} | ({"masks": masks} if branch == "fg" else {})
        cues = {name: cue for name, cue in cues.items() if name in self.projections}
        return torch.cat([self._tokens(name, cue, batch) for name, cue in cues.items()], dim=1)

    @contextlib.contextmanager
    def condition(self, tokens: torch.Tensor) -> Iterator[None]:
        """Give the tokens for the forward passes of the UNet inside the context; outside it is the base.

        The backward pass may come later: the tokens travel beside the text as an argument of every layer, so that
        gradient checkpointing computes again with those of the forward pass.

        Args:
            tokens: (B, T, D) as `forward` returns them, one row a row of the text; for classifier-free guidance
                those of the negative prompts, without cues, come first.
        """
        before, self.given = self.given, tokens
        try:
            yield
        finally:
            self.given = before

    def _bring_tokens(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pair the text with the tokens: the UNet hands ``encoder_hidden_states`` to its layers as it is.

        A keyword of ``cross_attention_kwargs`` would be dropped, with one log line, wherever a processor does not
        name it; a pair is used, or fails.
        """
        if self.given is None:
            return None
        text = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
        if self.given.shape[0] != text.shape[0] or self.given.shape[2] != text.shape[2]:
            raise ValueError(
                f"morphology tokens {tuple(self.given.shape)} do not go with a text of {tuple(text.shape)} "
                "(batch, length, width)"
            )
        pair = (text, self.given.to(text))
        if len(args) > 2:
            return (*args[:2], pair, *args[3:]), kwargs
        return args, {**kwargs, "encoder_hidden_states": pair}

    def _tokens(self, name: str, cue: Cue | None, batch: int) -> torch.Tensor:
        absent = self.absent[name].expand(batch, -1, -1)
        if cue is None:
            return absent
        if tuple(cue.maps.shape[:2]) != (batch, CHANNELS[name]) or tuple(cue.present.shape) != (batch,):
            raise ValueError(
                f"{name}: {tuple(cue.maps.shape)} maps and {tuple(cue.present.shape)} flags; "
                f"expected ({batch}, {CHANNELS[name]}, height, width) and ({batch},)"
            )
        projection = self.projections[name]
        features = self.shared(self.stems[name](cue.maps.to(absent)))
        cells = F.adaptive_avg_pool2d(features, self.settings.grid).flatten(2).transpose(1, 2)
        tokens = self.norms[name](projection(cells) + self.positions[name])
        return torch.where(cue.present.to(tokens.device)[:, None, None], tokens, absent.to(tokens))


def _convolution(width: int) -> list[nn.Module]:
    return [nn.SiLU(), nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GroupNorm(8, width)]


def install_morphology(unet: UNet2DConditionModel, guidance: HumanMorphologyGuidance) -> None:
    """Let the UNet's cross-attentions attend to the tokens that `HumanMorphologyGuidance.condition` gives.

    No weight is touched, and none added to the UNet. Install before ``torch.compile``; `remove_morphology` undoes it.

    Raises:
        UserError: the guidance was made for another UNet, or something else handles a cross-attention already.
    """
    layers = _cross_attentions(unet)
    heads = {_key(name): (layer.heads,) for name, layer in layers.items()}
    if heads != {key: tuple(gate.shape) for key, gate in guidance.gates.items()} or (
        guidance.absent["masks"].shape[1] != unet.config.cross_attention_dim
    ):
        raise UserError("this morphology guidance was made for another base: its cross-attentions are not the UNet's")
    for name, layer in layers.items():
        if type(layer.processor) not in _STOCK_PROCESSORS:
            raise UserError(
                f"{name} is handled by {type(layer.processor).__name__}: remove that before installing "
                "morphology guidance"
            )
    for name, layer in layers.items():
        layer.set_processor(GatedCrossAttention(layer.processor, guidance.gates, _key(name)))
    guidance.door = unet.register_forward_pre_hook(guidance._bring_tokens, with_kwargs=True)


def remove_morphology(unet: UNet2DConditionModel, guidance: HumanMorphologyGuidance) -> None:
    """Give every cross-attention the very processor back that it had before `install_morphology`.

    Raises:
        ValueError: the guidance is not installed.
    """
    if guidance.door is None:
        raise ValueError("this morphology guidance is not installed")
    guidance.door.remove()
    guidance.door = None
    for layer in _cross_attentions(unet).values():
        if isinstance(layer.processor, GatedCrossAttention):
            layer.set_processor(layer.processor.replaced)


class GatedCrossAttention:
    """Processor of ``attn2``: attention to the text, plus the gate times attention to the cues' tokens.

    Without tokens it leaves the work to the processor that it replaced. It is no `nn.Module`, or the UNet would own
    the gates, and diffusers would look for its arguments in the wrong signature.
    """

    def __init__(self, replaced: Any, gates: nn.ParameterDict, key: str) -> None:
        self.replaced = replaced
        self.gates = gates
        self.key = key

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, N, C) from hidden states of that shape and the text, or the pair of text and tokens."""
        if not isinstance(encoder_hidden_states, tuple):
            found: torch.Tensor = self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return found
        text, tokens = encoder_hidden_states
        query = _heads(attn, attn.to_q(hidden_states))
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, text.shape[1], text.shape[0])
            attention_mask = attention_mask.view(text.shape[0], attn.heads, -1, text.shape[1])
        gate = self.gates[self.key].to(query.dtype)[:, None, None]
        attended = _attend(attn, query, text, attention_mask) + gate * _attend(attn, query, tokens)
        attended = attended.transpose(1, 2).flatten(2)
        # As in the stock processor: the output projection, then its dropout.
        projected: torch.Tensor = attn.to_out[1](attn.to_out[0](attended)) / attn.rescale_output_factor
        return projected


def _attend(
    attn: Attention, query: torch.Tensor, context: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    key, value = _heads(attn, attn.to_k(context)), _heads(attn, attn.to_v(context))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def _heads(attn: Attention, hidden: torch.Tensor) -> torch.Tensor:
    """(B, N, heads * d) to (B, heads, N, d)."""
    return hidden.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def _cross_attentions(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """Every layer ``attn2`` by name, in the UNet's order."""
    return {name: layer for name, layer in unet.named_modules() if name.endswith(".attn2")}


def _key(name: str) -> str:
    """A layer's name as torch allows it for a parameter."""
    return name.replace(".", "/")
