"""Tokens for heads: an all-to-all after which a rank has every token of its share of the heads, and the way back.

What mixes tokens but not heads then runs as in one process: full attention, and the memory's scan ("head_exchange"),
which is exact for every chunk length.

Shapes: b batch, t tokens of this rank, P ranks, T = P * t, h heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titans_pretrain.memory import MemoryState, memory_scan
from titans_pretrain.model.attention_scores import causal_attention
from titans_pretrain.parallel.grid import Axis
from titans_pretrain.parallel.packing import form_of, pack, unpack
from titans_pretrain.parallel.scan_call import ScanCall, ScanReturn

TOKENS, HEADS = 1, 2  # dimensions


def to_heads(axis: Axis, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors [b, t, h, ...] of any dtypes -> [b, T, h / P, ...], in one exchange. P must divide h."""
    return _Exchange.apply(axis, HEADS, TOKENS, *tensors)


def to_tokens(axis: Axis, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inverse of `to_heads`."""
    return _Exchange.apply(axis, TOKENS, HEADS, *tensors)


def causal_attention_by_heads(axis: Axis, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full causal attention over all ranks' tokens. q, k, v [b, t, h, d] -> [b, t, h, d]."""
    return to_tokens(axis, [causal_attention(*to_heads(axis, (q, k, v)))])[0]


def scan_by_heads(axis: Axis, call: ScanCall, return_signals: bool) -> ScanReturn:
    """The memory's scan over all ranks' tokens. `out` is this rank's tokens of all heads; the state and the signals are
    those of this rank's heads after the whole sequence."""

    def own(x: Tensor, dim: int) -> Tensor:
        return x.chunk(axis.size, dim)[axis.rank]

    swapped = iter(to_heads(axis, [x for x in call[:6] if x is not None]))
    per_token = (None if x is None else next(swapped) for x in call[:6])
    initial_weights = tuple(own(w, 0) for w in call.initial_weights)
    norm = (None if x is None else own(x, 0) for x in (call.norm_weight, call.norm_bias))
    state = call.state
    if state is not None:
        weights, momentum, anchor = (tuple(own(x, 1) for x in field) for field in state[:3])
        state = MemoryState(weights, momentum, anchor, state.offset)
    whole = (*per_token, initial_weights, *norm, state, call.options)
    out, *rest = memory_scan(*whole, return_signals=return_signals)  # type: ignore[call-overload]
    return to_tokens(axis, [out])[0], *rest


def recurrence_by_heads(
    axis: Axis, scan: Callable[..., tuple[Tensor, Tensor]], per_token: Sequence[Tensor], state: Tensor
) -> tuple[Tensor, Tensor]:
    """`scan` over all ranks' tokens; see LocalSequence.recurrence. The state is that of this rank's heads after the whole
    sequence."""
    own = state.chunk(axis.size, HEADS - 1)[axis.rank]
    out, after = scan(*to_heads(axis, per_token), own, None)
    return to_tokens(axis, [out])[0], after


class _Exchange(torch.autograd.Function):
    """Every rank's dimension `split` is cut into P parts, one for each rank; parts received are joined along `join`. The
    gradient goes the opposite way."""

    @staticmethod
    def forward(ctx: Any, axis: Axis, split: int, join: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.way_back = axis, join, split
        return _exchange(axis, split, join, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        axis, split, join = ctx.way_back
        return None, None, None, *_exchange(axis, split, join, grads)


def _exchange(axis: Axis, split: int, join: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    parts = [x.unflatten(split, (axis.size, -1)).movedim(split, 0) for x in tensors]
    sent = pack(parts)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=axis.group)
    arrived = unpack(received, [form_of(x) for x in parts])
    return tuple(x.movedim(0, join).flatten(join, join + 1) for x in arrived)
