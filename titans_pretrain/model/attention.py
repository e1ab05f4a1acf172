"""Causal self-attention with rotary positions: full, or over a window with always-visible persistent tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.config import ModelConfig
from titans_pretrain.model.documents import Documents
from titans_pretrain.model.layers import rotate
from titans_pretrain.model.sequence import LocalSequence


class AttentionState(NamedTuple):
    """Rotated keys and values [b, s, h, d] that later tokens may still see."""

    keys: Tensor
    values: Tensor
    row_lengths: Tensor | None = None
    """int64 [b] where rows hold different numbers of tokens: each row's are its last ones, what is before them is not seen,
    and the rows go on one token at a time."""

    def visible(self) -> Tensor:
        """bool [b, 1, 1, s + 1]: what the next token of each row sees of the keys, its own being the last."""
        assert self.row_lengths is not None
        distance = torch.arange(self.keys.shape[1], -1, -1, device=self.keys.device)
        return (distance <= self.row_lengths[:, None])[:, None, None]


class Attention(nn.Module):
    """Multi-head attention. `window` None: full causal attention, whose state grows with every token.

    Persistent tokens enter as keys and values through the same projections and carry no rotary position: they are as far
    from the first query as from the millionth.
    """

    def __init__(self, config: ModelConfig, window: int | None, sequence: LocalSequence) -> None:
        super().__init__()
        dim = config.dim
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.head_dim = config.head_dim
        self.window = window
        self.sequence = sequence

    def heads(self, x: Tensor) -> Tensor:
        """[..., c] -> [..., h, d]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., t, c] -> unrotated keys and values [..., t, h, d]."""
        return self.heads(self.key(x)), self.heads(self.value(x))

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        persistent: Tensor | None = None,
        state: AttentionState | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """x [b, t, c], persistent [p, c] -> [b, t, c] and the state after the last token; with `documents` it is of no use."""
        masks = None if documents is None else documents.masks
        queries = rotate(self.heads(self.query(x)), rotary)
        keys, values = self.keys_and_values(x)
        keys = rotate(keys, rotary)
        row_lengths = None
        if state is not None:
            if state.row_lengths is not None:
                assert x.shape[1] == 1, "rows of different lengths go on one token at a time"
                seen = state.visible()
                masks = (seen if persistent is None else F.pad(seen, (persistent.shape[0], 0), value=True),)
                row_lengths = state.row_lengths + 1
                if self.window is not None:
                    row_lengths = row_lengths.clamp(max=self.window - 1)
            keys = self.sequence.extend(keys, state.keys, state.keys.shape[1])
            values = self.sequence.extend(values, state.values, state.values.shape[1])
        if self.window is None:
            y = self.sequence.causal_attention(queries, keys, values, masks=masks)
            kept = 0
        else:
            prefix = None if persistent is None else self.keys_and_values(persistent)
            y = self.sequence.window_attention(queries, keys, values, self.window, prefix, masks=masks)
            kept = max(0, keys.shape[1] - (self.window - 1))
        return self.output(y.flatten(-2)), AttentionState(keys[:, kept:], values[:, kept:], row_lengths)
