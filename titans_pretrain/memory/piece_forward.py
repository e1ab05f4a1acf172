"""One piece of a sequence through the memory, forward: method.md section 1, "the chunk in closed form".

Within a piece all gradients are taken at the anchor (the weights at the start of the chunk), so every layer's
pre-activation at every token is a few matrix products away from the state (W, S) at the start of the piece. Per memory
layer, with X the layer's inputs for the keys and R for the queries, D the loss gradient at the layer's output for the keys
and P, p, r, beta, f, m of gates.py:

    R W_t  =  R home + beta * (R W) + f * (R S) - (P * (R X')) D
    W <- beta_T W + f_T S - (p * X)' D          S <- m_T S - (r * X)' D

W is carried here as its difference from `home`: the initial weights where forgetting is toward them, so that what decays is
all there is; otherwise zero, and W itself.

Shapes: n = batch * heads, T tokens of a piece, d head_dim; weights [n, in, out], tokens [n, T, channels].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pretrain.memory.gates import PieceGates
from titans_pretrain.memory.network import (
    Loss,
    Norm,
    activate,
    activate_with_bend,
    activate_with_slope,
    inner_loss,
)
from titans_pretrain.memory.path import ScanInputs
from titans_pretrain.memory.pieces import Piece
from titans_pretrain.memory.state import MemoryOptions


class Rule(NamedTuple):
    """What all pieces of a call share."""

    home: tuple[Tensor, ...] | None
    """Per layer what forgetting decays the weights to; None: zero."""
    fresh_weights: tuple[Tensor, ...] | None
    """Per layer W at the start of a document, without home; None where home is that, or no document starts in the call."""
    fresh_momentum: tuple[Tensor, ...] | None
    """Per layer S there; None: zero."""
    starts: Tensor | None
    """[n, chunks, 1, 1] bool: the chunk begins a document."""
    norm: Norm | None
    activation: str


class Carried(NamedTuple):
    """What passes from piece to piece, a tensor for each layer."""

    weights: list[Tensor]
    """Without home."""
    momentum: list[Tensor]
    anchor: list[Tensor]
    """With home."""


class KeySide(NamedTuple):
    """The loss gradients of a piece's keys at the anchor; a tensor for each layer, or for each but the last."""

    inputs: list[Tensor]
    """X."""
    slopes: list[Tensor]
    """D."""
    act_slopes: list[Tensor]
    """act' between a layer and the next."""
    turns: list[Tensor]
    """act'' times the loss gradient at the activation's output. Empty unless asked for."""
    loss: Loss


class QuerySide(NamedTuple):
    """A piece's reads, a tensor for each layer."""

    inputs: list[Tensor]
    """R."""
    act_slopes: list[Tensor]
    """act' between a layer and the next. Empty unless asked for."""
    scores: list[Tensor]
    """R X'."""
    kept: list[Tensor | None]
    """R W, where that is narrower than R."""
    carried: list[Tensor | None]
    """R S, likewise."""


def make_rule(inputs: ScanInputs, options: MemoryOptions) -> Rule:
    batch = inputs.q.shape[0]

    def per_row(x: Tensor) -> Tensor:  # [h, ...] -> [n, ...]
        return x.expand(batch, *x.shape).flatten(0, 1)

    starts = inputs.document_starts
    if starts is not None:
        heads = inputs.q.shape[2]
        starts = starts.unsqueeze(1).expand(-1, heads, -1).flatten(0, 1)[..., None, None]
    initial = tuple(per_row(w) for w in inputs.initial_weights)
    home = initial if inputs.log_gamma is not None and options.forget_toward == "init" else None
    norm = None
    if inputs.norm_weight is not None and inputs.norm_bias is not None:
        gain, bias = (per_row(x).unsqueeze(1) for x in (inputs.norm_weight, inputs.norm_bias))
        norm = Norm(gain, bias, options.norm_eps)
    fresh_weights = fresh_momentum = None
    if inputs.fresh_weights:
        fresh_weights = tuple(per_row(w) for w in inputs.fresh_weights)
        if home is not None:
            fresh_weights = tuple(w - w0 for w, w0 in zip(fresh_weights, home, strict=True))
        fresh_momentum = tuple(per_row(s) for s in inputs.fresh_momentum)
    elif starts is not None and home is None:
        fresh_weights = initial
    return Rule(home, fresh_weights, fresh_momentum, starts, norm, options.activation)


def first_carried(inputs: ScanInputs, rule: Rule) -> Carried:
    """The state before the first token. Its tensors may be views of the inputs: nothing here is changed in place."""
    given = [w.flatten(0, 1) for w in inputs.weights]
    weights = given if rule.home is None else [w - w0 for w, w0 in zip(given, rule.home, strict=True)]
    anchor = [w.flatten(0, 1) for w in inputs.anchor] if inputs.anchor else given
    return Carried(weights, [s.flatten(0, 1) for s in inputs.momentum], anchor)


def with_home(weights: Sequence[Tensor], rule: Rule, into: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The whole weights from carried ones; without home these themselves."""
    if rule.home is None:
        return list(weights)
    rooms = [None] * len(weights) if into is None else into
    return [torch.add(w, w0, out=room) for w, w0, room in zip(weights, rule.home, rooms, strict=True)]


def begin_piece(carried: Carried, piece: Piece, rule: Rule, into: Carried | None = None) -> Carried:
    """Where the piece begins a chunk: a document's start, and the anchor, written to `into`'s where that is given."""
    if piece.chunk is None:
        return carried
    weights, momentum = carried.weights, carried.momentum
    if rule.starts is not None:
        start = rule.starts[:, piece.chunk]
        weights = _begin_documents(weights, rule.fresh_weights, start)
        momentum = _begin_documents(momentum, rule.fresh_momentum, start)
    return Carried(weights, momentum, with_home(weights, rule, None if into is None else into.anchor))


def _begin_documents(carried: Sequence[Tensor], fresh: Sequence[Tensor] | None, start: Tensor) -> list[Tensor]:
    if fresh is None:
        return [x.masked_fill(start, 0.0) for x in carried]
    return [torch.where(start, x0, x) for x, x0 in zip(carried, fresh, strict=True)]


def key_side(key: Tensor, value: Tensor, anchor: Sequence[Tensor], rule: Rule, turns: bool) -> KeySide:
    """What a piece's keys [n, T, d] and values do to the weights."""
    inputs, act_slopes, bends, net = [key], [], [], key @ anchor[0]
    for w in anchor[1:]:
        if turns:
            x, slope, bend = activate_with_bend(net, rule.activation)
            bends.append(bend)
        else:
            x, slope = activate_with_slope(net, rule.activation)
        inputs.append(x)
        act_slopes.append(slope)
        net = x @ w
    loss = inner_loss(key, value, net, rule.norm)
    slopes = [loss.slope]
    for layer in range(len(anchor) - 2, -1, -1):
        back = slopes[-1] @ anchor[layer + 1].mT
        slopes.append(back * act_slopes[layer])
        if turns:
            bends[layer] *= back
    return KeySide(inputs, slopes[::-1], act_slopes, bends, loss)


def write(keys: KeySide, carried: Carried, gates: Sequence[PieceGates], into: Carried | None = None) -> Carried:
    """The state after a piece; written to `into`, which may be `carried` itself, where that is given: memory that has been
    in use is several times faster to write to than memory that the system has yet to hand out."""
    weights, momentum = [], []
    for layer, gate in enumerate(gates):
        x, slope, w, s = keys.inputs[layer], keys.slopes[layer], carried.weights[layer], carried.momentum[layer]
        w_room, s_room = (None, None) if into is None else (into.weights[layer], into.momentum[layer])
        if gate.keep is not None:
            kept = torch.mul(gate.keep[:, -1:], w, out=w_room)
        else:
            kept = w.clone() if w_room is None else w_room.copy_(w)
        if gate.carry is not None:
            kept.addcmul_(gate.carry[:, -1:], s)
        if gate.momentum_keep is not None and gate.momentum_update is not None:
            s = _add_outer(torch.mul(gate.momentum_keep, s, out=s_room), x, slope, gate.momentum_update)
        weights.append(_add_outer(kept, x, slope, gate.update))
        momentum.append(s)
    return Carried(weights, momentum, carried.anchor)


def read(
    query: Tensor, keys: KeySide, carried: Carried, gates: Sequence[PieceGates], rule: Rule, act_slopes: bool
) -> tuple[Tensor, QuerySide]:
    """net(q_t) [n, T, d] with the weights after token t, for each token of a piece; `carried` as before the piece."""
    side = QuerySide([], [], [], [], [])
    y = query
    for layer, gate in enumerate(gates):
        if layer > 0:
            if act_slopes:
                y, slope = activate_with_slope(y, rule.activation)
                side.act_slopes.append(slope)
            else:
                y = activate(y, rule.activation)
        score = y @ keys.inputs[layer].mT
        out = (gate.reach * score) @ keys.slopes[layer]
        if rule.home is not None:
            out.baddbmm_(y, rule.home[layer])
        kept = _add_scaled(out, gate.keep, y, carried.weights[layer])
        taken = None if gate.carry is None else _add_scaled(out, gate.carry, y, carried.momentum[layer])
        side.inputs.append(y)
        side.scores.append(score)
        side.kept.append(kept)
        side.carried.append(taken)
        y = out
    return y, side


def read_after(query: Tensor, carried: Carried, rule: Rule) -> Tensor:
    """`read` for a piece of one token, whose weights are those after the piece."""
    y = query
    for layer, w in enumerate(carried.weights):
        if layer > 0:
            y = activate(y, rule.activation)
        out = y @ w
        y = out if rule.home is None else out.baddbmm_(y, rule.home[layer])
    return y


def _add_scaled(total: Tensor, scale: Tensor | None, y: Tensor, w: Tensor) -> Tensor | None:
    """total += scale * (y @ w), scaling y or y @ w, whichever is narrower; y @ w if that is what was scaled."""
    if scale is None:
        total.baddbmm_(y, w)
        return None
    if y.shape[-1] <= w.shape[-1]:
        total.baddbmm_(scale * y, w)
        return None
    product = y @ w
    total.addcmul_(scale, product)
    return product


def _add_outer(total: Tensor, x: Tensor, slope: Tensor, scale: Tensor) -> Tensor:
    """total + x' diag(scale) slope in place, scaling the narrower of the two."""
    if x.shape[-1] <= slope.shape[-1]:
        return total.baddbmm_((scale * x).mT, slope)
    return total.baddbmm_(x.mT, scale * slope)
