"""What do recurrent baselines share? Queries, keys and values of heads by linear layers and convolutions, and their state.

Shapes: b batch, t time, c channels, h heads, d head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from titans_pretrain.config import ModelConfig
from titans_pretrain.model.attention import Attention, AttentionState
from titans_pretrain.model.blocks import Block
from titans_pretrain.model.convolution import convolve
from titans_pretrain.model.documents import Documents
from titans_pretrain.model.layers import CausalConv, RMSNorm
from titans_pretrain.model.sequence import LocalSequence


class RecurrenceState(NamedTuple):
    """What the next token needs; its size does not depend on how many there were."""

    tails: tuple[Tensor, Tensor, Tensor]
    """The convolutions' last inputs [b, kernel - 1, c] for q, k, v."""
    state: Tensor
    """[b, h, d, ...], fp32 or wider."""


class RecurrentHybridState(NamedTuple):
    """State of a recurrence and a window in series."""

    recurrence: RecurrenceState
    attention: AttentionState


class Recurrence(nn.Module):
    """The base of recurrent mixers. Heads are `memory_heads`: their number decides the size of the state, dim * head_dim."""

    def __init__(self, config: ModelConfig, sequence: LocalSequence) -> None:
        super().__init__()
        dim = config.dim
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.query_conv = CausalConv(dim, config.conv_kernel)
        self.key_conv = CausalConv(dim, config.conv_kernel)
        self.value_conv = CausalConv(dim, config.conv_kernel)
        self.output = nn.Linear(dim, dim, bias=False)
        self.head_dim = config.memory_head_dim
        self.sequence = sequence

    def forward(
        self, x: Tensor, state: RecurrenceState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, RecurrenceState]:
        """x [b, t, c] -> [b, t, c] and the state after the last token. With `documents` it is of no use."""
        raise NotImplementedError

    def convolved(
        self, x: Tensor, state: RecurrenceState | None, documents: Documents | None
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
        """x [b, t, c] -> queries, keys and values [b, t, h, d] after their convolutions, and the convolutions' new tails."""
        layers = ((self.query, self.query_conv), (self.key, self.key_conv), (self.value, self.value_conv))
        found, tails = [], []
        for i, (linear, conv) in enumerate(layers):
            y, tail = convolve(linear(x), conv, None if state is None else state.tails[i], self.sequence, documents)
            found.append(y.unflatten(-1, (-1, self.head_dim)))
            tails.append(tail)
        return found, (tails[0], tails[1], tails[2])


class RecurrentBlock(Block):
    """A recurrence as the sequence mixer, then SwiGLU. It knows the order of tokens by itself: no rotary positions."""

    def __init__(self, config: ModelConfig, recurrence: Recurrence) -> None:
        super().__init__(config)
        self.recurrence = recurrence

    def mix(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        state: RecurrenceState | None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, RecurrenceState]:
        y, after = self.recurrence(self.mixer_norm(x), state, documents)
        return x + y, after


class RecurrentHybridBlock(Block):
    """A recurrence, then attention over a window, then SwiGLU: three residual sublayers in series."""

    def __init__(self, config: ModelConfig, recurrence: Recurrence, sequence: LocalSequence) -> None:
        super().__init__(config)
        self.recurrence = recurrence
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, config.window, sequence)

    def mix(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        state: RecurrentHybridState | None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, RecurrentHybridState]:
        y, recurrence = self.recurrence(self.mixer_norm(x), state and state.recurrence, documents)
        x = x + y
        y, attention = self.attention(self.attention_norm(x), rotary, None, state and state.attention, documents)
        return x + y, RecurrentHybridState(recurrence, attention)
