"""How surprised is the memory by each token? A scan that also says so, token by token (method.md section 1).

For looking at a model, not for training: no gradients, and a call of the scan for every piece.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pretrain.memory.network import Norm
from titans_pretrain.memory.piece_forward import Rule, key_side
from titans_pretrain.memory.pieces import cut_pieces, per_head, per_token
from titans_pretrain.memory.scan import memory_scan, scan_dtype
from titans_pretrain.memory.state import MemoryOptions, MemoryState, initial_state


class TokenSurprise(NamedTuple):
    """What every token [b, t] is to every head's memory before anything of its chunk has been written; fp32 or float64."""

    inner_loss: Tensor
    """[b, t, h]: 0.5 * ||M(k) - v||^2 at the weights of the start of the token's chunk."""
    gradient_norm: Tensor
    """[b, t, h, l]: the Frobenius norm of that loss's gradient with respect to each of the l weight matrices."""


@torch.no_grad()
def scan_with_surprise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor | None,
    log_eta: Tensor | None,
    theta: Tensor,
    initial_weights: tuple[Tensor, ...],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    state: MemoryState | None,
    options: MemoryOptions,
) -> tuple[Tensor, MemoryState, TokenSurprise]:
    """`memory_scan`, and what it takes its gradients of. Memory grows by the results only.

    All rows must stand at one place of their chunks (`state.row_offsets` None).
    """
    dtype = scan_dtype(q, k, v, initial_weights)
    if state is None:
        state = initial_state(tuple(w.to(dtype) for w in initial_weights), q.shape[0])
    assert state.row_offsets is None, "rows of different ages are not looked at together"
    outputs, found = [], []
    for piece in cut_pieces(q.shape[1], state.offset, options.chunk_size):
        tokens = slice(piece.start, piece.stop)
        # At the start of a chunk the anchor is the weights as they then are; inside one, those it began with.
        anchor = state.anchor if state.offset else state.weights
        keys, values = (x[:, tokens].to(dtype) for x in (k, v))
        found.append(token_surprise(keys, values, anchor, norm_weight, norm_bias, options))
        out, state = memory_scan(
            q[:, tokens],
            k[:, tokens],
            v[:, tokens],
            None if log_gamma is None else log_gamma[:, tokens],
            None if log_eta is None else log_eta[:, tokens],
            theta[:, tokens],
            initial_weights,
            norm_weight,
            norm_bias,
            state,
            options,
        )
        outputs.append(out)
    surprise = TokenSurprise(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))
    return torch.cat(outputs, dim=1), state, surprise


@torch.no_grad()
def token_surprise(
    k: Tensor,
    v: Tensor,
    weights: tuple[Tensor, ...],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    options: MemoryOptions,
) -> TokenSurprise:
    """The inner loss and its gradient's norms at fixed weights, for tokens that share them.

    Args:
        k, v: [b, t, h, d], fp32 or float64, which is computed in.
        weights: per memory layer [b, h, in, out].
        norm_weight, norm_bias: [h, d], or None for the plain network.
    """
    batch, length, heads, _ = k.shape
    norm = None
    if norm_weight is not None and norm_bias is not None:
        gain, bias = (x.to(k.dtype).expand(batch, *x.shape).flatten(0, 1)[:, None] for x in (norm_weight, norm_bias))
        norm = Norm(gain, bias, options.norm_eps)
    rule = Rule(None, None, None, None, norm, options.activation)
    anchor = [w.to(k.dtype).flatten(0, 1) for w in weights]
    side = key_side(per_head(k, 0, length), per_head(v, 0, length), anchor, rule, turns=False)
    # A token's gradient of a matrix is the outer product of the matrix's input and the loss's slope at its output.
    norms = [x.norm(dim=-1) * slope.norm(dim=-1) for x, slope in zip(side.inputs, side.slopes, strict=True)]
    return TokenSurprise(
        per_token(0.5 * side.loss.error.square().sum(-1, keepdim=True), heads)[..., 0],
        per_token(torch.stack(norms, dim=-1), heads),
    )
