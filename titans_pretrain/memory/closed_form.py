"""The memory over a whole sequence by the chunk algebra of method.md section 1: no weights of single tokens, ever.

A path as path.py describes it, on any device. Here is the walk over the sequence; the algebra of one piece is in
piece_forward.py, how the sequence is cut in pieces.py, and the way back in closed_form_backward.py. Pieces follow each other
in order: a deep memory is a true recurrence from chunk to chunk. For the way back only the states (W, S) at the starts of
segments are kept.

Shapes: n = batch * heads, l memory layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pretrain.memory.closed_form_backward import backward
from titans_pretrain.memory.path import ScanInputs, ScanResult
from titans_pretrain.memory.piece_forward import (
    begin_piece,
    first_carried,
    key_side,
    make_rule,
    read,
    read_after,
    with_home,
    write,
)
from titans_pretrain.memory.pieces import cut_segments, gate_runs, per_head, per_token
from titans_pretrain.memory.state import MemoryOptions

__all__ = ["backward", "forward", "saved_like", "why_not"]


def why_not(inputs: ScanInputs, offset: int, options: MemoryOptions) -> str | None:
    """The closed form takes everything."""
    return None


@torch.no_grad()
def forward(inputs: ScanInputs, offset: int, options: MemoryOptions, want_surprise: bool, save: bool) -> ScanResult:
    """The scan; see path.py."""
    heads, depth, dtype = inputs.q.shape[2], len(inputs.initial_weights), inputs.theta.dtype
    rule = make_rule(inputs, options)
    carried = first_carried(inputs, rule)
    segments = cut_segments(inputs, offset, options.chunk_size)
    saved = saved_like(inputs, offset, options) if save else ()
    out = inputs.q.new_empty(inputs.q.shape)
    surprise = inputs.theta.new_zeros(())
    for index, segment in enumerate(segments):
        if index > 0:
            for kept, x in zip(saved, (*carried.weights, *carried.momentum), strict=False):
                kept[index - 1] = x
        start, stop = segment[0].start, segment[-1].stop
        q, k, v = (per_head(x, start, stop).to(dtype) for x in inputs[:3])
        gates = [gate for run in gate_runs(inputs, segment) for gate in run.gates.unbind()]
        reads = []
        for i, piece in enumerate(segment):
            # With a home nothing else holds the weights, and from the second chunk on the anchor, that are carried here.
            own = rule.home is not None and piece.start > 0
            carried = begin_piece(carried, piece, rule, carried if own and piece.chunk else None)
            query, key, value = (x[:, piece.start - start : piece.stop - start] for x in (q, k, v))
            gate = gates[i * depth : (i + 1) * depth]
            keys = key_side(key, value, carried.anchor, rule, turns=False)
            if want_surprise:
                surprise += 0.5 * keys.loss.error.square().sum()
            if piece.size > 1:
                reads.append(read(query, keys, carried, gate, rule, act_slopes=False)[0])
            carried = write(keys, carried, gate, carried if own else None)
            if piece.size == 1:
                reads.append(read_after(query, carried, rule))
        y = torch.cat(reads, dim=1)
        out[:, start:stop] = per_token(y if rule.norm is None else rule.norm(y).add_(q), heads)

    closing = (offset + inputs.q.shape[1]) % options.chunk_size
    opened = 0 < closing <= inputs.q.shape[1]  # a chunk is open that began in the call
    weights = with_home(carried.weights, rule)
    # Without momentum S is still the input, and the anchor may be.
    momentum = carried.momentum if inputs.log_eta is not None else [s.clone() for s in carried.momentum]
    anchor = [w.clone() for w in carried.anchor] if opened else []
    weights, momentum, anchor = ([x.unflatten(0, (-1, heads)) for x in xs] for xs in (weights, momentum, anchor))
    return ScanResult(out, tuple(weights), tuple(momentum), tuple(anchor), surprise, saved)


def saved_like(inputs: ScanInputs, offset: int, options: MemoryOptions) -> tuple[Tensor, ...]:
    """The states at the starts of all segments but the first: [segments - 1, n, in, out] for W of each layer, then for S
    of each unless there is no momentum. (W as it is carried: see piece_forward.py.)"""
    count = len(cut_segments(inputs, offset, options.chunk_size)) - 1
    batch = inputs.q.shape[0]
    states = inputs.initial_weights * (1 if inputs.log_eta is None else 2)
    return tuple(
        inputs.q.new_empty((count, batch * w.shape[0], *w.shape[1:]), dtype=inputs.theta.dtype) for w in states
    )
