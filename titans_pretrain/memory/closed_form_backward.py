"""The way back of closed_form.py, by hand, from the states at the starts of the segments.

The segments are taken from the last to the first: a part of a segment is rebuilt from its state, with all that its pieces'
way back needs (piece_backward.py), and then walked backward. So memory grows with the sequence by its inputs, its outputs
and those states only.

Shapes: n = batch * heads, l memory layers.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pretrain.memory.gates import PieceGates, gates_backward
from titans_pretrain.memory.network import normalize, normalize_backward
from titans_pretrain.memory.path import ResultGradients, ScanGradients, ScanInputs
from titans_pretrain.memory.piece_backward import CarriedGradients, PieceRecord, piece_backward
from titans_pretrain.memory.piece_forward import (
    Carried,
    Rule,
    begin_piece,
    first_carried,
    key_side,
    make_rule,
    read,
    write,
)
from titans_pretrain.memory.pieces import Piece, cut_segments, gate_runs, gates_per_token, per_head, per_token
from titans_pretrain.memory.state import MemoryOptions

PART = 16
"""Most pieces whose states and activations are held at once: a segment of short chunks has many more, and is rebuilt part by
part."""


class Planned(NamedTuple):
    """A piece to walk back over."""

    piece: Piece
    gates: list[PieceGates]
    gate_grads: list[PieceGates]
    """Where the gates' gradients go, per layer."""


@torch.no_grad()
def backward(
    inputs: ScanInputs, offset: int, options: MemoryOptions, saved: tuple[Tensor, ...], grads: ResultGradients
) -> ScanGradients:
    """The gradient of every input; see path.py."""
    heads, dtype = inputs.q.shape[2], inputs.theta.dtype
    rule = make_rule(inputs, options)
    segments = cut_segments(inputs, offset, options.chunk_size)
    carried = _last_gradients(inputs, rule, grads)
    q, k, v, log_gamma, log_eta, theta = (None if x is None else x.new_empty(x.shape) for x in inputs[:6])
    assert q is not None
    assert k is not None
    assert v is not None
    assert theta is not None
    found = ScanGradients(q, k, v, log_gamma, log_eta, theta, (), None, None, (), (), ())
    longest = min(PART, max(len(segment) for segment in segments))
    rooms = [Carried(_room(inputs), _room(inputs), _room(inputs)) for _ in range(longest)]
    for index in range(len(segments) - 1, -1, -1):
        before = _segment_start(index, segments, saved, inputs, rule)
        _segment_backward(segments[index], before, inputs, grads.out, rule, rooms, carried, found)

    def summed(xs: list[Tensor]) -> tuple[Tensor, ...]:  # [n, ...] -> [h, ...]
        return tuple(x.unflatten(0, (-1, heads)).sum(0) for x in xs)

    if carried.home is not None:  # first_carried took it from the weights, make_rule from the fresh ones
        for taken in (carried.weights, carried.fresh_weights or ()):
            for x, w in zip(carried.home, taken, strict=False):
                x.sub_(w)
        initial = summed(carried.home)
    elif carried.fresh_weights is not None and not inputs.fresh_weights:
        initial = summed(carried.fresh_weights)
    else:
        initial = tuple(w.new_zeros(w.shape, dtype=dtype) for w in inputs.initial_weights)
    gain, bias = (None, None) if carried.norm is None else summed([x.squeeze(1) for x in carried.norm])
    weights, momentum, anchor = (
        tuple(x.unflatten(0, (-1, heads)) for x in xs)
        for xs in (carried.weights, carried.momentum, carried.anchor if inputs.anchor else ())
    )
    return found._replace(
        initial_weights=initial,
        norm_weight=gain,
        norm_bias=bias,
        weights=weights,
        momentum=momentum,
        anchor=anchor,
        fresh_weights=summed(carried.fresh_weights or []) if inputs.fresh_weights else (),
        fresh_momentum=summed(carried.fresh_momentum or []),
    )


def _room(inputs: ScanInputs) -> list[Tensor]:
    """A tensor [n, in, out] for each layer."""
    batch, dtype = inputs.q.shape[0], inputs.theta.dtype
    return [w.new_empty((batch * w.shape[0], *w.shape[1:]), dtype=dtype) for w in inputs.initial_weights]


def _last_gradients(inputs: ScanInputs, rule: Rule, grads: ResultGradients) -> CarriedGradients:
    """The gradients with respect to the state after the last token."""

    def given(xs: tuple[Tensor, ...]) -> list[Tensor]:
        result = [total.zero_() for total in _room(inputs)]
        for total, x in zip(result, xs, strict=False):
            total += x.flatten(0, 1)
        return result

    norm = None if rule.norm is None else (torch.zeros_like(rule.norm.gain), torch.zeros_like(rule.norm.bias))
    return CarriedGradients(
        given(grads.weights),
        given(grads.momentum),
        given(grads.anchor),
        None if rule.home is None else given(grads.weights),
        None if rule.fresh_weights is None else given(()),
        None if rule.fresh_momentum is None else given(()),
        norm,
        _room(inputs),
    )


def _segment_start(
    index: int, segments: list[list[Piece]], saved: tuple[Tensor, ...], inputs: ScanInputs, rule: Rule
) -> Carried:
    """The state before a segment, with the anchor where the segment goes on in a chunk."""
    first = first_carried(inputs, rule)
    if index == 0:
        return first
    depth = len(inputs.initial_weights)
    weights = [x[index - 1] for x in saved[:depth]]
    momentum = first.momentum if inputs.log_eta is None else [x[index - 1] for x in saved[depth:]]
    if segments[index][0].chunk is not None:
        return Carried(weights, momentum, first.anchor)
    opener = index - 1
    while opener > 0 and segments[opener][0].chunk is None:
        opener -= 1
    opening = _segment_start(opener, segments, saved, inputs, rule)
    return Carried(weights, momentum, begin_piece(opening, segments[opener][0], rule).anchor)


def _segment_backward(
    segment: list[Piece],
    before: Carried,
    inputs: ScanInputs,
    out_grad: Tensor,
    rule: Rule,
    rooms: list[Carried],
    carried: CarriedGradients,
    found: ScanGradients,
) -> None:
    """Step back over a segment: `carried` goes from its end to its start, its tokens' gradients are written to `found`."""
    depth = len(inputs.initial_weights)
    runs = gate_runs(inputs, segment)
    run_grads = [run.gates.empty_like() for run in runs]
    gates = [gate for run in runs for gate in run.gates.unbind()]
    gate_grads = [grad for run_grad in run_grads for grad in run_grad.unbind()]
    parts = [
        [
            Planned(piece, gates[i * depth : (i + 1) * depth], gate_grads[i * depth : (i + 1) * depth])
            for i, piece in itertools.islice(enumerate(segment), first, first + PART)
        ]
        for first in range(0, len(segment), PART)
    ]
    starts = [before]
    for part in parts[:-1]:
        starts.append(_roll(part, starts[-1], inputs, rule))
    while parts:
        _part_backward(parts.pop(), starts.pop(), inputs, out_grad, rule, rooms, carried, found)
    for run, run_grad in zip(runs, run_grads, strict=True):
        of_gates = gates_backward(run.log_gamma, run.log_eta, run.theta, run_grad)
        for total, x in zip((found.log_gamma, found.log_eta, found.theta), of_gates, strict=True):
            if total is not None and x is not None:
                total[:, run.start : run.stop] = gates_per_token(x, depth, inputs.q.shape[2])


def _roll(part: list[Planned], carried: Carried, inputs: ScanInputs, rule: Rule) -> Carried:
    """The state after a part, without its reads."""
    start, stop = part[0].piece.start, part[-1].piece.stop
    k, v = (per_head(x, start, stop).to(inputs.theta.dtype) for x in (inputs.k, inputs.v))
    for piece, gates, _ in part:
        carried = begin_piece(carried, piece, rule)
        key, value = (x[:, piece.start - start : piece.stop - start] for x in (k, v))
        carried = write(key_side(key, value, carried.anchor, rule, turns=False), carried, gates)
    return carried


def _part_backward(
    part: list[Planned],
    before: Carried,
    inputs: ScanInputs,
    out_grad: Tensor,
    rule: Rule,
    rooms: list[Carried],
    carried: CarriedGradients,
    found: ScanGradients,
) -> None:
    """The pieces of a part forward once more, now with all that their way back needs, and back. `rooms`: for each piece of
    a part room for the state before it."""
    start, stop = part[0].piece.start, part[-1].piece.stop
    q, k, v, read_grad = (per_head(x, start, stop).to(inputs.theta.dtype) for x in (*inputs[:3], out_grad))
    records, reads = [], []
    for i, (piece, gates, gate_grads) in enumerate(part):
        before = begin_piece(before, piece, rule, rooms[i])
        query, key, value = (x[:, piece.start - start : piece.stop - start] for x in (q, k, v))
        keys = key_side(key, value, before.anchor, rule, turns=True)
        y, queries = read(query, keys, before, gates, rule, act_slopes=True)
        reads.append(y)
        records.append(PieceRecord(piece, before, keys, queries, gates, gate_grads))
        if piece.stop < stop:
            before = write(keys, before, gates, rooms[i + 1])

    net_grad = read_grad
    if rule.norm is not None and carried.norm is not None:
        normalized, inverse_std = normalize(torch.cat(reads, dim=1), rule.norm.eps)
        carried.norm[0].add_((read_grad * normalized).sum(1, keepdim=True))
        carried.norm[1].add_(read_grad.sum(1, keepdim=True))
        net_grad = normalize_backward(read_grad * rule.norm.gain, normalized, inverse_std)
    token_grads = []
    while records:
        piece = records[-1].piece
        grad = net_grad[:, piece.start - start : piece.stop - start]
        token_grads.append(piece_backward(grad, records.pop(), rule, carried))
    q_grad, k_grad, v_grad = (torch.cat(xs[::-1], dim=1) for xs in zip(*token_grads, strict=True))
    if rule.norm is not None:
        q_grad += read_grad
    for total, x in ((found.q, q_grad), (found.k, k_grad), (found.v, v_grad)):
        total[:, start:stop] = per_token(x, inputs.q.shape[2])
