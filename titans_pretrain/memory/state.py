"""What a memory carries from one token to the next, and which variant of the update rule it follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class MemoryOptions:
    """The update rule's settings. They are part of the model: a model trained with one set is not right with another.

    Raises:
        ValueError: a value outside the ranges below.
    """

    chunk_size: int = 64
    """Tokens that share one point at which gradients are taken, at least 1."""
    activation: str = "gelu"
    """Nonlinearity between the memory's layers: "gelu" (exact, by erf) or "silu"."""
    forget_toward: str = "init"
    """What forgetting decays the weights to: "init" (the initial weights) or "zero" (the paper's text)."""
    norm_eps: float = 1e-5
    """Added to the variance in the memory's layer norm."""

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {self.chunk_size}")
        if self.activation not in ("gelu", "silu"):
            raise ValueError(f"activation must be 'gelu' or 'silu', not {self.activation!r}")
        if self.forget_toward not in ("init", "zero"):
            raise ValueError(f"forget_toward must be 'init' or 'zero', not {self.forget_toward!r}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, not {self.norm_eps}")


class MemoryState(NamedTuple):
    """The memory after some tokens: one tensor [b, h, in, out] per memory layer in each field, fp32 (or float64)."""

    weights: tuple[Tensor, ...]
    """W after the last token."""
    momentum: tuple[Tensor, ...]
    """S after the last token; zeros at the start, and always when there is no momentum."""
    anchor: tuple[Tensor, ...]
    """W at the start of the open chunk: the point at which the gradients of the chunk's tokens are taken."""
    offset: int
    """Tokens already consumed of the open chunk, 0 <= offset < chunk_size. At 0 the anchor is the weights."""
    row_offsets: Tensor | None = None
    """int64 [b]: the offset of each row where rows differ, which then go on one token at a time; `offset` is 0. The anchor
    of a row whose offset is 0 is its weights, here too."""

    def first_row(self) -> MemoryState:
        """The state of the first sequence, b = 1."""
        weights, momentum, anchor = (tuple(x[:1] for x in field) for field in self[:3])
        return MemoryState(weights, momentum, anchor, self.offset)


def initial_state(initial_weights: Sequence[Tensor], batch: int) -> MemoryState:
    """W = W_init (one [h, in, out] per memory layer) and S = 0 for `batch` sequences. W is a view: nothing is copied."""
    wide = (w if w.dtype == torch.float64 else w.float() for w in initial_weights)
    weights = tuple(w.expand(batch, *w.shape) for w in wide)
    return MemoryState(
        weights, tuple(torch.zeros_like(w, memory_format=torch.contiguous_format) for w in weights), weights, 0
    )


def begin_chunk(state: MemoryState) -> MemoryState:
    """Close the open chunk early: the next token's gradient is taken at the weights as they are now."""
    return state._replace(anchor=state.weights, offset=0)
