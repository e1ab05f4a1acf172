"""One piece of a sequence through the memory, backward, by hand: what piece_forward.py does, in reverse.

The outer loss's gradients come in at the piece's reads and at the state (W, S) after it, and go out at the state before it,
at the anchor, and at the piece's queries, keys, values and gates. Two things are differentiated: the reads and writes,
which are bilinear in (R, W, S) and (X, D), and then the inner loss's gradients D themselves, whose second derivatives are
act'' and the layer norm's. `a_grad` is the gradient of a; ' is transpose. Shapes as in piece_forward.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pretrain.memory.gates import PieceGates
from titans_pretrain.memory.network import inner_loss_backward
from titans_pretrain.memory.piece_forward import Carried, KeySide, QuerySide, Rule
from titans_pretrain.memory.pieces import Piece


class PieceRecord(NamedTuple):
    """What a piece's backward needs of its forward."""

    piece: Piece
    before: Carried
    """The state before the piece, with the anchor that it uses."""
    keys: KeySide
    queries: QuerySide
    gates: list[PieceGates]
    gate_grads: list[PieceGates]
    """Where the gates' gradients go, per layer."""


class CarriedGradients(NamedTuple):
    """Gradients that walk backward with the pieces, all changed in place; a tensor [n, in, out] for each layer."""

    weights: list[Tensor]
    momentum: list[Tensor]
    anchor: list[Tensor]
    """Of the chunk at hand."""
    home: list[Tensor] | None
    """Summed over everything, as the next ones. None where there is no home."""
    fresh_weights: list[Tensor] | None
    fresh_momentum: list[Tensor] | None
    norm: tuple[Tensor, Tensor] | None
    """Of the layer norm's gain and bias [n, 1, d]."""
    room: list[Tensor]
    """No gradient: for products that are summed at once."""


def piece_backward(
    read_grad: Tensor, record: PieceRecord, rule: Rule, grads: CarriedGradients
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of net(q) [n, T, d] to those of q (without M's residual), k and v; `grads` steps over the piece."""
    keys = record.keys
    depth = len(keys.inputs)
    inputs_grad: list[Tensor] = [read_grad] * depth
    slopes_grad: list[Tensor] = [read_grad] * depth
    y_grad = read_grad
    for layer in range(depth - 1, -1, -1):
        if layer < depth - 1:
            y_grad = y_grad.mul_(record.queries.act_slopes[layer])
        y_grad, inputs_grad[layer], slopes_grad[layer] = _layer_backward(y_grad, layer, record, rule, grads)
    k_grad, v_grad = _key_side_backward(inputs_grad, slopes_grad, record, rule, grads)
    _begin_backward(record.piece, rule, grads)
    return y_grad, k_grad, v_grad


def _layer_backward(
    y_grad: Tensor, layer: int, record: PieceRecord, rule: Rule, grads: CarriedGradients
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's read and write: from the gradient of its read to those of R, X and D."""
    gate, gate_grad = record.gates[layer], record.gate_grads[layer]
    x, slope = record.keys.inputs[layer], record.keys.slopes[layer]
    r, score = record.queries.inputs[layer], record.queries.scores[layer]
    w, s = record.before.weights[layer], record.before.momentum[layer]
    w_grad, s_grad, room = grads.weights[layer], grads.momentum[layer], grads.room[layer]

    # The read: y = (reach * score) D + R home + keep * (R W) + carry * (R S) with score = R X'.
    reached_grad = y_grad @ slope.mT
    torch.mul(reached_grad, score, out=gate_grad.reach)
    score_grad = reached_grad.mul_(gate.reach)
    slope_grad = (gate.reach * score).mT @ y_grad
    x_grad = score_grad.mT @ r
    r_grad = score_grad @ x
    if rule.home is not None and grads.home is not None:
        r_grad.baddbmm_(y_grad, rule.home[layer].mT)
        grads.home[layer].baddbmm_(r.mT, y_grad)

    # The write, at the gradients of the state after the piece.
    _outer_backward(w_grad, x, slope, gate.update, gate_grad.update, x_grad, slope_grad)
    if gate.momentum_update is not None and gate_grad.momentum_update is not None:
        _outer_backward(s_grad, x, slope, gate.momentum_update, gate_grad.momentum_update, x_grad, slope_grad)

    # The state: from its gradients after the piece to those before it, the writes' shares before the reads'.
    last_keep_grad = None if gate.keep is None else _dot(w_grad, w, room)
    last_carry_grad = None
    if gate.carry is not None and gate.momentum_keep is not None and gate_grad.momentum_keep is not None:
        gate_grad.momentum_keep.copy_(_dot(s_grad, s, room))
        last_carry_grad = _dot(w_grad, s, room)
        s_grad.mul_(gate.momentum_keep).addcmul_(gate.carry[:, -1:], w_grad)
        assert gate_grad.carry is not None
        gate_grad.carry.copy_(_scaled_backward(y_grad, gate.carry, r, s, record.queries.carried[layer], r_grad, s_grad))
        gate_grad.carry[:, -1:] += last_carry_grad
    if gate.keep is None or gate_grad.keep is None or last_keep_grad is None:
        r_grad.baddbmm_(y_grad, w.mT)
        w_grad.baddbmm_(r.mT, y_grad)
    else:
        w_grad.mul_(gate.keep[:, -1:])
        gate_grad.keep.copy_(_scaled_backward(y_grad, gate.keep, r, w, record.queries.kept[layer], r_grad, w_grad))
        gate_grad.keep[:, -1:] += last_keep_grad
    return r_grad, x_grad, slope_grad


def _scaled_backward(
    grad: Tensor, scale: Tensor, y: Tensor, w: Tensor, product: Tensor | None, y_grad: Tensor, w_grad: Tensor
) -> Tensor:
    """Of scale * (y @ w), with the product where it is narrower than y: adds to y's and w's gradient, returns scale's."""
    if product is not None:
        scaled = scale * grad
        y_grad.baddbmm_(scaled, w.mT)
        w_grad.baddbmm_(y.mT, scaled)
        return (product * grad).sum(-1, keepdim=True)
    back = grad @ w.mT
    y_grad.addcmul_(scale, back)
    w_grad.baddbmm_((scale * y).mT, grad)
    return back.mul_(y).sum(-1, keepdim=True)


def _outer_backward(
    grad: Tensor, x: Tensor, slope: Tensor, scale: Tensor, scale_grad: Tensor, x_grad: Tensor, slope_grad: Tensor
) -> None:
    """Of x' diag(scale) slope: adds to x's and slope's gradients and sets scale's."""
    if x.shape[-1] <= slope.shape[-1]:
        back = slope @ grad.mT
        x_grad.addcmul_(scale, back)
        slope_grad.baddbmm_(scale * x, grad)
        torch.sum(back.mul_(x), -1, keepdim=True, out=scale_grad)
    else:
        back = x @ grad
        slope_grad.addcmul_(scale, back)
        x_grad.baddbmm_(scale * slope, grad.mT)
        torch.sum(back.mul_(slope), -1, keepdim=True, out=scale_grad)


def _key_side_backward(
    inputs_grad: list[Tensor], slopes_grad: list[Tensor], record: PieceRecord, rule: Rule, grads: CarriedGradients
) -> tuple[Tensor, Tensor]:
    """From the gradients of X and D to those of keys and values; the anchor's are added to. Changes its arguments."""
    keys, anchor = record.keys, record.before.anchor
    depth = len(anchor)
    through_bends = []
    for layer in range(depth - 1):  # D_l = act' * (D_{l+1} A_{l+1}')
        through_bends.append(slopes_grad[layer] * keys.turns[layer])
        back_grad = slopes_grad[layer].mul_(keys.act_slopes[layer])
        slopes_grad[layer + 1].baddbmm_(back_grad, anchor[layer + 1])
        grads.anchor[layer + 1].baddbmm_(back_grad.mT, keys.slopes[layer + 1])
    net_grad, error_grad, norm_grad = inner_loss_backward(slopes_grad[-1], keys.loss, rule.norm)
    if norm_grad is not None and grads.norm is not None:
        grads.norm[0].add_(norm_grad.gain.sum(1, keepdim=True))
        grads.norm[1].add_(norm_grad.bias.sum(1, keepdim=True))
    for layer in range(depth - 1, -1, -1):  # the way back of the network on the keys
        if layer < depth - 1:
            net_grad = through_bends[layer].addcmul_(inputs_grad[layer + 1], keys.act_slopes[layer])
        inputs_grad[layer].baddbmm_(net_grad, anchor[layer].mT)
        grads.anchor[layer].baddbmm_(keys.inputs[layer].mT, net_grad)
    k_grad = inputs_grad[0] if rule.norm is None else inputs_grad[0].add_(error_grad)
    return k_grad, -error_grad


def _begin_backward(piece: Piece, rule: Rule, grads: CarriedGradients) -> None:
    """`begin_piece`: the anchor joins the weights it was taken from, and what a document's start erased gets nothing."""
    if piece.chunk is None:
        return
    for layer, (w_grad, anchor_grad) in enumerate(zip(grads.weights, grads.anchor, strict=True)):
        w_grad += anchor_grad
        if grads.home is not None:
            grads.home[layer] += anchor_grad
        anchor_grad.zero_()
        if rule.starts is not None:
            start = rule.starts[:, piece.chunk]
            s_grad = grads.momentum[layer]
            if grads.fresh_weights is not None:
                grads.fresh_weights[layer] += w_grad * start
            if grads.fresh_momentum is not None:
                grads.fresh_momentum[layer] += s_grad * start
            w_grad.masked_fill_(start, 0.0)
            s_grad.masked_fill_(start, 0.0)


def _dot(a: Tensor, b: Tensor, room: Tensor) -> Tensor:
    """[n, i, o] with [n, i, o] -> [n, 1, 1]"""
    return torch.mul(a, b, out=room).sum((-2, -1), keepdim=True)
