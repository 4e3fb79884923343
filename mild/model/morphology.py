"""Human Morphology Guidance (HMG, section 3.3, Algorithm 1): pose, parsing and masks as tokens beside the text.

Each cue is drawn as maps (`mild.model.cues`), encoded by a convolution stack that all cues share, pooled to a small
grid of cells relative to the picture (so any aspect ratio will do) and projected linearly to one token a cell in the
text's space. The conditions of Algorithm 1 are

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
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from dataset_tools.errors import UserError
from mild.model.backbone import Branch
from mild.model.cues import CHANNELS, Cue
from mild.settings import HmgSettings

_STOCK_PROCESSORS = (AttnProcessor2_0, AttnProcessor)


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
