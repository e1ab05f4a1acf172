"""The memory over a whole sequence by the chunk algebra of method.md section 1: no weights of single tokens, ever.

The sequence is cut into pieces: the tokens of one chunk, or, in a chunk longer than 64, of one tile of it. Within a piece
all gradients are taken at the anchor (the weights at the start of the chunk), so every layer's pre-activation at every
token is a few matrix products away from the state (W, S) at the start of the piece. Per memory layer, with X the layer's
inputs for the keys and Y for the queries, D the loss gradient at the layer's output for the keys, P, beta, f of gates.py:

    Y W_t  =  beta * (Y W) + f * (Y S) - (P * (Y X')) D          W <- beta_T W + f_T S - (p * X)' D

and, forgetting toward W_init, `beta W + (1 - beta) W_init` wherever `beta W` stands. Pieces follow each other in order: a
deep memory is a true recurrence from chunk to chunk. Whatever does not depend on the state is computed before the loop.

Shapes: n = batch * heads, T tokens of a piece, d head_dim; tensors in the loop are [n, T, channels].
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from titans_pretrain.memory.gates import PieceGates, piece_gates
from titans_pretrain.memory.network import Norm, activate, activate_with_slope, loss_slope
from titans_pretrain.memory.state import MemoryOptions, MemoryState

TILE = 64
"""Longest piece in tokens: no gate matrix is larger than TILE x TILE."""


def tile_length(chunk_size: int) -> int:
    """Tokens of a full piece: a chunk, or TILE tokens of a longer chunk."""
    return min(chunk_size, TILE)


def scan_closed_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor | None,
    log_eta: Tensor | None,
    theta: Tensor,
    initial_weights: Sequence[Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    state: MemoryState,
    options: MemoryOptions,
    want_surprise: bool,
) -> tuple[Tensor, MemoryState, Tensor | None]:
    """`memory_scan` on checked arguments of one dtype, with the state given. The last result is the sum of 0.5 * error^2
    over everything, detached, or None."""
    batch, length, heads, _ = q.shape
    depth = len(initial_weights)
    norm = None
    if norm_weight is not None and norm_bias is not None:
        gain, bias = (x.expand(batch, *x.shape).reshape(batch * heads, 1, -1) for x in (norm_weight, norm_bias))
        norm = Norm(gain, bias, options.norm_eps)
    toward: list[Tensor] | None = None
    if log_gamma is not None and options.forget_toward == "init":
        toward = [w.expand(batch, *w.shape).flatten(0, 1) for w in initial_weights]

    weights = [w.flatten(0, 1) for w in state.weights]
    momentum = [s.flatten(0, 1) for s in state.momentum]
    offset = state.offset
    anchor = list(weights) if offset == 0 else [w.flatten(0, 1) for w in state.anchor]

    surprise = torch.zeros((), dtype=q.dtype, device=q.device) if want_surprise else None
    reads: list[Tensor] = []
    for start, size, count in piece_runs(length, offset, options.chunk_size):
        span = slice(start, start + size * count)
        queries, keys, values = (_pieces(x[:, span], count) for x in (q, k, v))
        gates = piece_gates(
            None if log_gamma is None else _gate_pieces(log_gamma[:, span], count),
            None if log_eta is None else _gate_pieces(log_eta[:, span], count),
            _gate_pieces(theta[:, span], count),
        )
        scores = (queries @ keys.transpose(-1, -2)).unbind(0) if size > 1 else ()
        for i, (query, key, value) in enumerate(zip(queries.unbind(0), keys.unbind(0), values.unbind(0), strict=True)):
            inputs, slopes, error = _gradients(key, value, anchor, norm, options.activation)
            if surprise is not None:
                surprise += 0.5 * error.detach().square().sum()
            read, before = query, list(zip(weights, momentum, strict=True))
            for layer, (w, s) in enumerate(before):
                if layer > 0:
                    read = activate(read, options.activation)
                gate, w0 = gates[i * depth + layer], None if toward is None else toward[layer]
                weights[layer], momentum[layer] = _write(inputs[layer], slopes[layer], w, s, w0, gate)
                if size == 1:  # the weights after the piece are those of its only token
                    read = read @ weights[layer]
                    continue
                score = scores[i] if layer == 0 else read @ inputs[layer].transpose(-1, -2)
                read = _read(read, score, slopes[layer], w, s, w0, gate)
            reads.append(read)
            offset += size
            if offset == options.chunk_size:
                anchor, offset = list(weights), 0

    out = torch.cat(reads, dim=1).unflatten(0, (batch, heads)).transpose(1, 2)
    if norm_weight is not None and norm_bias is not None:
        out = q + Norm(norm_weight, norm_bias, options.norm_eps)(out)
    after = [tuple(x.unflatten(0, (batch, heads)) for x in xs) for xs in (weights, momentum, anchor)]
    if offset == 0:
        after[2] = after[0]
    return out, MemoryState(after[0], after[1], after[2], offset), surprise


def piece_runs(length: int, offset: int, chunk_size: int) -> Iterator[tuple[int, int, int]]:
    """Cut `length` tokens that begin `offset` tokens into a chunk: (start, size, count) of each run of equal pieces."""
    sizes, left = [], length
    while left > 0:
        sizes.append(min(left, chunk_size - offset, TILE))
        left -= sizes[-1]
        offset = (offset + sizes[-1]) % chunk_size
    start = 0
    for size, run in itertools.groupby(sizes):
        count = len(list(run))
        yield start, size, count
        start += size * count


def _gradients(
    key: Tensor, value_of_key: Tensor, anchor: Sequence[Tensor], norm: Norm | None, activation: str
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Per memory layer its input X and the loss gradient D at its output, both at the anchor, and the error M(k) - v."""
    inputs, bends, output = [key], [], key @ anchor[0]
    for w in anchor[1:]:
        value, bend = activate_with_slope(output, activation)
        inputs.append(value)
        bends.append(bend)
        output = value @ w
    error, slope = loss_slope(key, value_of_key, output, norm)
    slopes = [slope]
    for w, bend in zip(reversed(anchor[1:]), reversed(bends), strict=True):
        slopes.append((slopes[-1] @ w.transpose(-1, -2)) * bend)
    return inputs, slopes[::-1], error


def _read(y: Tensor, score: Tensor, slope: Tensor, w: Tensor, s: Tensor, w0: Tensor | None, gate: PieceGates) -> Tensor:
    """y_t W_t for every token t of the piece: each is read with its own update in."""
    within = (gate.reach * score) @ slope
    if gate.keep is None:
        out = torch.baddbmm(within, y, w)
    elif w0 is None:
        out = _add_scaled(within, gate.keep, y, w)
    else:
        out = _add_scaled(torch.baddbmm(within, y, w0), gate.keep, y, w - w0)
    return out if gate.carry is None else _add_scaled(out, gate.carry, y, s)


def _add_scaled(total: Tensor, scale: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """total + scale * (y @ w), scaling y or y @ w, whichever is narrower."""
    if y.shape[-1] <= w.shape[-1]:
        return torch.baddbmm(total, scale * y, w)
    return torch.addcmul(total, scale, y @ w)


def _write(
    x: Tensor, slope: Tensor, w: Tensor, s: Tensor, w0: Tensor | None, gate: PieceGates
) -> tuple[Tensor, Tensor]:
    """W and S after the piece."""
    kept = w if gate.keep is None else gate.keep[:, -1:] * w
    if w0 is not None and gate.lost is not None:
        kept = torch.addcmul(kept, gate.lost, w0)
    if gate.carry is not None and gate.momentum_keep is not None and gate.momentum_update is not None:
        kept = torch.addcmul(kept, gate.carry[:, -1:], s)
        s = _add_outer(gate.momentum_keep * s, x, slope, gate.momentum_update)
    return _add_outer(kept, x, slope, gate.update), s


def _add_outer(total: Tensor, x: Tensor, slope: Tensor, scale: Tensor) -> Tensor:
    """total + x' diag(scale) slope, scaling the narrower of the two."""
    if x.shape[-1] <= slope.shape[-1]:
        return torch.baddbmm(total, (scale * x).transpose(-1, -2), slope)
    return torch.baddbmm(total, x.transpose(-1, -2), scale * slope)


def _pieces(x: Tensor, count: int) -> Tensor:
    """[b, t, h, d] -> [count, b * h, t / count, d]"""
    return x.unflatten(1, (count, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)


def _gate_pieces(x: Tensor, count: int) -> Tensor:
    """[b, t, h, l] -> [count * l, b * h, t / count]: a piece's layers side by side."""
    return x.unflatten(1, (count, -1)).permute(1, 4, 0, 3, 2).flatten(2, 3).flatten(0, 1)
