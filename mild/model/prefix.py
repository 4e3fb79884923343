"""Learnable prompt prefix (section G.8): a few learned tokens in the text that the UNet is given.

Cross-attention is a softmax average over tokens that carry no position: it does not change when they change places,
so "before the text", "after the start token" and "behind the text" are one and the same to the UNet, and only two
questions are left: how many tokens compete, and where the learned ones start. Tokens that are added compete with the
text and change the base's output whatever they hold. CLIP's prompts, however, are padded to a fixed length, so the
prefix takes the last places of the text, padding unless the prompt fills all of them, and is learned as a difference
from what stands there:

    text'[i] = text[i] + delta[i - L + n]   for the last n of L places; delta = 0 at first

That is neutral exactly, its gradient is that of an added token, and the length stays what it was, so that a negative
prompt without prefix still goes into the same batch, in stock pipelines too. Words of a prompt that does reach the
last places are shifted, not lost. The pooled embedding is left alone.
"""

from __future__ import annotations

import torch
from torch import nn

from mild.settings import PrefixSettings


class PromptPrefix(nn.Module):
    """Adds the prefix to prompt embeddings; neutral until trained.

    Args:
        text_width: D, the width of both encoders' concatenated output (the UNet's ``cross_attention_dim``).
    """

    def __init__(self, text_width: int, settings: PrefixSettings) -> None:
        super().__init__()
        self.settings = settings
        self.delta = nn.Parameter(torch.zeros(settings.tokens, text_width))

    def forward(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """(B, L, D) of both encoders' concatenated output to the same shape, with the prefix.

        Raises:
            ValueError: the text has fewer places than the prefix, or another width.
        """
        length, width = prompt_embeds.shape[1:]
        tokens = self.settings.tokens
        if length < tokens or width != self.delta.shape[1]:
            raise ValueError(
                f"a prefix of {tokens} tokens of width {self.delta.shape[1]} does not fit "
                f"prompt embeddings {tuple(prompt_embeds.shape)} (batch, length, width)"
            )
        last = prompt_embeds[:, length - tokens :] + self.delta.to(prompt_embeds)
        return torch.cat([prompt_embeds[:, : length - tokens], last], dim=1)
