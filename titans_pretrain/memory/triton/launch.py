"""The host's side of the kernels: which arrays there are, and which kernel runs when. Beside `Call` it holds no arithmetic but
the gradient of the initial weights, plain matrix products over all tokens that cuBLAS does best."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.memory.path import ResultGradients, ScanGradients, ScanInputs, ScanResult
from titans_pretrain.memory.state import MemoryOptions
from titans_pretrain.memory.triton.backward_kernels import (
    chunk_backward,
    read_backward_1,
    read_backward_2,
    state_backward,
    state_rebuild,
)
from titans_pretrain.memory.triton.call import NUM_WARPS, Call
from titans_pretrain.memory.triton.forward_kernels import (
    chunk_forward,
    delta_forward,
    output_forward,
    state_forward,
    state_forward_resident,
)
from titans_pretrain.memory.triton.gate_kernels import gates_backward


def forward(inputs: ScanInputs, options: MemoryOptions, save: bool) -> ScanResult:
    """The scan from the start of a chunk."""
    with torch.cuda.device_of(inputs.q):
        call = Call(inputs, options)
        s = call.shapes
        out, slope = torch.empty_like(call.q), torch.empty_like(call.q)
        checkpoints = call.floats(s.pairs, s.checkpoints if save else 0, s.slices, 4, s.matrix)
        running = call.initial.clone()
        anchor = (
            call.initial[..., :2, :].contiguous()
            if s.open_chunk == 0
            else call.floats(*running.shape[:-2], 2, running.shape[-1])
        )
        surprise = call.floats(s.pairs, s.tiles)
        for first, tiles in s.ranges(backward=False):
            states = call.q.new_empty(s.pairs, tiles, *running.shape[2:])
            _walk(call, first, tiles, running, states, slope, checkpoints, anchor, surprise, save)
            output_forward[(tiles, s.pairs)](
                call.q, call.k, call.log_gamma, call.log_eta, call.theta, call.rows, call.base, call.gain, call.bias,
                states, slope, out, s.length, s.heads, call.eps, first, tiles, s.tiles, s.slices, 1,
                **call.constants["output_forward"], num_warps=NUM_WARPS,
            )  # fmt: skip

        weights = call.unpack(call.per_head(running[..., :2, :]))
        anchors = () if s.open_chunk is None else call.unpack(call.per_head(anchor))
        if call.toward_init:
            for matrices in (weights, anchors):
                for w, w0 in zip(matrices, inputs.initial_weights, strict=False):
                    w += w0
        if inputs.log_eta is None:
            momentum = call.handed_through(inputs.momentum)
        else:
            momentum = call.unpack(call.per_head(running[..., 2:, :]))
        return ScanResult(out, weights, momentum, anchors, surprise.sum(), (slope, checkpoints) if save else ())


def _walk(
    call: Call, first: int, tiles: int, running: Tensor, states: Tensor, slope: Tensor, checkpoints: Tensor,
    anchor: Tensor, surprise: Tensor, save: bool,
) -> None:  # fmt: skip
    """The state through a range of tiles, one after the other, or in long chunks all tiles of a chunk at once."""
    s = call.shapes
    if not s.parallel:
        kernel = state_forward_resident if s.slices == 1 else state_forward
        kernel[(s.pairs,)](
            call.k, call.v, call.rows, call.ends, call.base, call.gain, call.bias, call.starts,
            running, states, slope, checkpoints, anchor, surprise,
            s.length, s.heads, call.eps, first, first + tiles, s.tiles, s.chunks, call.anchor_tile, s.slices, 1,
            **call.constants["state_forward"], SAVE=save, num_warps=NUM_WARPS,
        )  # fmt: skip
        return
    for begin, count in s.chunks_of(first, tiles):
        delta_forward[(count, s.pairs)](
            call.k, call.v, call.rows, call.base, call.gain, call.bias, running, states, slope, surprise,
            s.length, s.heads, call.eps, first, tiles, begin, s.tiles, s.slices, 1,
            **call.constants["delta_forward"], num_warps=NUM_WARPS,
        )  # fmt: skip
        chunk_forward[(s.pairs, s.slices * s.matrix // s.block, 2)](
            call.ends, call.starts, running, states, checkpoints, anchor,
            s.heads, first, tiles, begin, count, s.tiles, s.chunks, call.anchor_tile,
            **call.constants["chunk_forward"], SAVE=save, num_warps=4,
        )  # fmt: skip


def backward(
    inputs: ScanInputs, options: MemoryOptions, saved: tuple[Tensor, ...], grads: ResultGradients
) -> ScanGradients:
    """The gradient of every input of `forward`."""
    with torch.cuda.device_of(inputs.q):
        call = Call(inputs, options)
        s = call.shapes
        slope, checkpoints = saved
        out_grad = grads.out.contiguous()
        q_grad, k_grad, v_grad = (torch.empty_like(x) for x in (call.q, call.k, call.v))
        theta_grad = torch.empty_like(call.theta)
        log_gamma_grad = theta_grad if inputs.log_gamma is None else torch.empty_like(theta_grad)
        log_eta_grad = theta_grad if inputs.log_eta is None else torch.empty_like(theta_grad)
        size = s.matrix
        running = call.zeros(s.pairs, 1, s.slices, 4, size)
        for part, given in ((0, grads.weights), (2, grads.momentum)):
            if given and (part == 0 or inputs.log_eta is not None):
                running[..., part : part + 2, :] = call.pack(*given).flatten(0, 1).unsqueeze(1)
        anchor_grad = call.pack(*grads.anchor).flatten(0, 1).unsqueeze(1).contiguous() if grads.anchor else running
        chunk_grad = call.zeros(s.pairs, s.tiles_per_chunk if s.parallel else 1, s.slices, 2, size)
        base_grad = call.zeros(s.heads, s.slices, 2, size)
        norm_grad = call.zeros(s.pairs, 2, s.width)

        for first, tiles in reversed(list(s.ranges(backward=True))):
            states = call.q.new_empty(s.pairs, tiles, s.slices, 4, size)
            state_rebuild[(s.pairs, s.slices, -(-tiles // s.checkpoint_every))](
                call.k, call.rows, call.ends, call.base, call.starts, slope, checkpoints, call.initial, states,
                s.length, s.heads, first, tiles, s.tiles, s.chunks, 1,
                **call.constants["state_rebuild"], num_warps=NUM_WARPS,
            )  # fmt: skip
            update = torch.empty_like(states)
            x = _Hidden(*(call.q.new_empty(s.pairs, tiles, s.slices, s.tile, s.slice) for _ in _Hidden._fields))
            k_part, slope_part = (call.floats(s.pairs, tiles, s.tile, s.width) for _ in range(2))
            output_grad, output_slope, normalized, pull = (
                call.q.new_empty(s.pairs, tiles, s.tile, s.width) for _ in range(4)
            )
            norm_rows = call.floats(s.pairs, tiles, 2, s.tile)
            reach_grad = call.floats(s.pairs, tiles, 2, s.tile, s.tile)
            rows_grad, ends_grad = call.floats(s.pairs, tiles, 2, 4, s.tile), call.floats(s.pairs, tiles, 2, 4)
            read_norm_grad, inner_norm_grad = (
                call.floats(s.pairs, tiles if call.norm else 0, 2, s.width) for _ in range(2)
            )
            read_backward_2[(tiles, s.pairs)](
                call.q, call.k, call.v, call.log_gamma, call.log_eta, call.theta, call.rows, call.base, call.gain,
                call.bias, states, slope, out_grad, normalized, pull, norm_rows,
                x.key, x.key_bend, x.key_curve, x.slope1, x.query, x.query_grad,
                output_grad, slope_part, x.key_grad, update, reach_grad, rows_grad, read_norm_grad,
                s.length, s.heads, call.eps, first, tiles, s.tiles, s.slices, 1,
                **call.constants["read_backward_2"], num_warps=NUM_WARPS,
            )  # fmt: skip
            read_backward_1[(tiles, s.pairs)](
                call.q, call.k, call.log_gamma, call.log_eta, call.theta, call.rows, call.base, states, out_grad,
                x.slope1, x.query_grad, q_grad, k_part, x.slope1_grad, update, reach_grad, rows_grad,
                s.length, s.heads, first, tiles, s.tiles, s.slices, 1,
                **call.constants["read_backward_1"], num_warps=NUM_WARPS,
            )  # fmt: skip
            for begin, count in reversed(s.chunks_of(first, tiles)) if s.parallel else [(first, tiles)]:
                if s.parallel:
                    chunk_backward[(s.pairs, s.slices * s.matrix // s.block, 2)](
                        call.ends, running, update, s.heads, first, tiles, begin + count, count, s.tiles,
                        **call.constants["chunk_backward"], num_warps=4,
                    )  # fmt: skip
                state_backward[(s.pairs, count if s.parallel else 1)](
                    call.k, call.rows, call.ends, call.base, call.gain, call.starts, states, slope, anchor_grad,
                    normalized, pull, norm_rows, x.key, x.key_bend, x.key_curve, x.slope1, update, k_part, slope_part,
                    x.key_grad, x.slope1_grad, k_grad, v_grad, output_slope, running, chunk_grad, rows_grad, ends_grad,
                    inner_norm_grad, s.length, s.heads, first, tiles, begin + count, count, s.tiles, s.chunks,
                    call.anchor_tile if grads.anchor else -1, s.slices, 1,
                    **call.constants["state_backward"], num_warps=NUM_WARPS,
                )  # fmt: skip
                if s.parallel:  # the chunk's anchor joins the weights it was taken from, and a document's start erases
                    running[..., :2, :] += chunk_grad[:, :count].sum(1, keepdim=True)
                    if grads.anchor and begin == call.anchor_tile:
                        running[..., :2, :] += anchor_grad
                    if inputs.document_starts is not None:
                        running *= call.kept(begin // s.tiles_per_chunk)
            gates_backward[(tiles, s.pairs, 2)](
                call.log_gamma, call.log_eta, call.theta, reach_grad, rows_grad, ends_grad,
                log_gamma_grad, log_eta_grad, theta_grad, s.length, s.heads, first, tiles,
                **call.constants["gates"], num_warps=NUM_WARPS,
            )  # fmt: skip
            norm_grad += read_norm_grad.sum(1) + inner_norm_grad.sum(1)
            if call.toward_init:
                base_grad += _base_gradient(call, slope, first, tiles, x, output_grad, output_slope)

        d_moved = call.per_head(running[..., :2, :])
        d_momentum: tuple[Tensor, ...] = call.unpack(call.per_head(running[..., 2:, :]))
        if inputs.log_eta is None:
            d_momentum = call.handed_through(grads.momentum or tuple(torch.zeros_like(x) for x in d_momentum))
        initial_grads: tuple[Tensor, ...]
        if call.toward_init:
            initial_grads = call.unpack(base_grad - d_moved.sum(0))
            for given in (grads.weights, grads.anchor):
                for total, grad in zip(initial_grads, given, strict=False):
                    total += grad.sum(0)
        else:
            initial_grads = tuple(torch.zeros_like(w) for w in inputs.initial_weights)
        norms = norm_grad[..., : s.head_dim].unflatten(0, (s.batch, s.heads)).sum(0).unbind(1)
        return ScanGradients(
            q_grad, k_grad, v_grad,
            None if inputs.log_gamma is None else log_gamma_grad, None if inputs.log_eta is None else log_eta_grad,
            theta_grad, initial_grads, norms[0] if call.norm else None, norms[1] if call.norm else None,
            call.unpack(d_moved), d_momentum, (),
        )  # fmt: skip


class _Hidden(NamedTuple):
    """Per token and hidden channel of a range [n, tiles, slices, tile, slice]: what the backward kernels hand on."""

    key: Tensor
    """Z, the hidden layer for the keys at the anchor."""
    key_bend: Tensor
    """act' there."""
    key_curve: Tensor
    """D2 W2' * act''."""
    slope1: Tensor
    """D1."""
    query: Tensor
    """Zbar, the hidden layer for the queries."""
    query_grad: Tensor
    """Of its pre-activation."""
    key_grad: Tensor
    """What the reads say about Z; after the state pass the gradient of the pre-activation."""
    slope1_grad: Tensor
    """What the reads say about D1; after the state pass the gradient of D2 W2'."""


def _base_gradient(
    call: Call, slope: Tensor, first: int, tiles: int, x: _Hidden, output_grad: Tensor, output_slope: Tensor
) -> Tensor:
    """What a range's reads and anchors say about the base, [h, slices, 2, d * slice]."""
    s = call.shapes

    def per_tile(tokens: Tensor) -> Tensor:  # [b, t, h, d] -> [b, h, tiles, tile, d]
        span = s.tile * tiles
        part = tokens[:, first * s.tile : first * s.tile + span]
        part = F.pad(part, (0, s.width - s.head_dim, 0, 0, 0, span - part.shape[1]))
        return part.unflatten(1, (tiles, s.tile)).permute(0, 3, 1, 2, 4)

    def heads(packed: Tensor) -> Tensor:
        return packed.unflatten(0, (s.batch, s.heads))

    def first_layer(tokens: Tensor, grad: Tensor) -> Tensor:
        return torch.einsum("bhcid,bhcjik->hjdk", per_tile(tokens), heads(grad)).flatten(-2).float()

    def second_layer(hidden: Tensor, grad: Tensor) -> Tensor:
        return torch.einsum("bhcjik,bhcid->hjkd", heads(hidden), grad).flatten(-2).float()

    layer1 = first_layer(call.q, x.query_grad) + first_layer(call.k, x.key_grad)
    layer2 = second_layer(x.query, heads(output_grad)) + second_layer(x.key, heads(output_slope))
    layer2 += second_layer(x.slope1_grad, per_tile(slope))
    return torch.stack([layer1, layer2], -2)
