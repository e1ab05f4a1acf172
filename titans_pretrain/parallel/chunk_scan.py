"""The memory's scan where one gradient chunk spans several ranks ("chunk_scan").

All gradients of a chunk are taken at its anchor, the weights at its start. Given those, a rank's tokens change the state
(W, S) by an affine map that does not depend on (W, S):

    W - home  <-  beta (W - home) + f S + dW          S  <-  m S + dS

with beta, m the products of gamma and eta over the tokens, f as in memory/gates.py, and home what forgetting decays to. So
the ranks of a chunk find their maps side by side, the state runs through them like a parcel, and then all scan their tokens
from the state each was handed. One after the other there is one scan a chunk, whatever the number of its ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titans_pretrain.memory import MemoryState, memory_scan
from titans_pretrain.memory.gates import MIN_LOG_GATE
from titans_pretrain.parallel.neighbours import Neighbours, receive, send_along
from titans_pretrain.parallel.scan_call import ScanCall, ScanReturn


def scan_chunks_together(neighbours: Neighbours, call: ScanCall, return_signals: bool) -> ScanReturn:
    """The memory's scan; the chunk is a multiple of this rank's tokens, and the sequence starts with a chunk.

    The state returned is that after this rank's tokens.
    """
    axis, chunk, momentum = neighbours.axis, call.options.chunk_size, call.log_eta is not None
    t, state = call.q.shape[1], call.start()
    assert chunk % t == 0, f"a chunk of {chunk} tokens does not consist of shards of {t}"
    assert state.offset == 0, "the sequence must start with a chunk"
    depth, span = len(state.weights), chunk // t
    place = axis.rank % span
    next_rank = range(axis.rank + 1, min(axis.rank + 2, axis.size))

    anchor = state.weights
    if place > 0 and axis.rank > place:
        anchor = tuple(receive(neighbours, axis.rank - place - 1, state.weights))
    step = _Step(call, anchor, place * t) if place > 0 and next_rank else None
    if axis.rank > 0:
        found = tuple(receive(neighbours, axis.rank - 1, _parcel(state, momentum)))
        state = MemoryState(found[:depth], found[depth:] if momentum else state.momentum, found[:depth], 0)
    if place > 0:
        state = state._replace(anchor=anchor, offset=place * t)
    if step is not None:
        # Sent before the outputs are made, so that the next ranks need not wait for them.
        after = step(state)
        state = _hand_on(neighbours, next_rank, span, after, momentum, state)
    out, end, *signals = memory_scan(*call._replace(state=state), return_signals=return_signals)  # type: ignore[call-overload]
    if step is None:
        (out,) = send_along(neighbours, next_rank, _parcel(end, momentum), [out])
    return out, end, *signals


def _parcel(state: MemoryState, momentum: bool) -> list[Tensor]:
    return [*state.weights, *(state.momentum if momentum else ())]


def _hand_on(
    neighbours: Neighbours, next_rank: Sequence[int], span: int, after: MemoryState, momentum: bool, state: MemoryState
) -> MemoryState:
    """Send `after`: all of it to the next rank, and where it ends a chunk its weights to the others of the next chunk, whose
    anchor they are. `state`, which the loss depends on, comes back for the gradients' sake."""
    axis = neighbours.axis
    depth = len(state.weights)
    through = send_along(neighbours, next_rank, _parcel(after, momentum), [*state.weights, *state.momentum])
    if axis.rank % span == span - 1:
        others = range(axis.rank + 2, min(axis.rank + 1 + span, axis.size))
        through = send_along(neighbours, others, after.weights, through)
    return state._replace(weights=through[:depth], momentum=through[depth:])


class _Step:
    """What the tokens of a call do to any state (W, S), their gradients being taken at `anchor`."""

    def __init__(self, call: ScanCall, anchor: tuple[Tensor, ...], offset: int) -> None:
        toward_init = call.log_gamma is not None and call.options.forget_toward == "init"
        initial = call._replace(state=None).start()
        nothing = tuple(torch.zeros_like(s) for s in initial.momentum)
        self.home = initial.weights if toward_init else nothing
        # From home and no momentum the scan ends at home + dW and dS. The reads are not used.
        start = MemoryState(self.home, nothing, anchor, offset)
        _, self.end = memory_scan(*call._replace(q=call.q.detach(), state=start))
        self.beta, self.f, self.m = _products(call.log_gamma, call.log_eta, initial.weights[0].dtype)

    def __call__(self, state: MemoryState) -> MemoryState:
        weights, momentum = [], []
        for layer, (w, s) in enumerate(zip(state.weights, state.momentum, strict=True)):
            moved = w - self.home[layer]
            moved = self.end.weights[layer] + (moved if self.beta is None else self.beta[layer] * moved)
            if self.f is not None and self.m is not None:
                moved = moved + self.f[layer] * s
                s = self.m[layer] * s + self.end.momentum[layer]
            weights.append(moved)
            momentum.append(s)
        return MemoryState(tuple(weights), tuple(momentum), tuple(weights), 0)


def _products(
    log_gamma: Tensor | None, log_eta: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """beta, f and m after the last token, [l, b, h, 1, 1], from log gates [b, t, h, l]; None where gates.py has None."""
    gamma, eta = (None if x is None else x.to(dtype).clamp(min=MIN_LOG_GATE) for x in (log_gamma, log_eta))

    def per_layer(x: Tensor) -> Tensor:
        return x.movedim(-1, 0)[..., None, None]

    beta = None if gamma is None else per_layer(gamma.sum(1).exp())
    if eta is None:
        return beta, None, None
    reached = eta.cumsum(1)
    if gamma is not None:  # summed from the end, for the difference of two long sums would be inexact
        reached = reached + gamma.flip(1).cumsum(1).flip(1) - gamma
    return beta, per_layer(reached.exp().sum(1)), per_layer(eta.sum(1).exp())
