"""Kernels of the backward pass, in the order they run on a range of tiles: the states are rebuilt from a checkpoint, the reads
are differentiated (parallel over tiles), then the state pass is walked in reverse.

Names are those of the forward: W, S the state before a tile, P, beta, f, p, r its gates, D1, D2 the loss gradients at the
layers' outputs, Z the hidden layer for the keys and Zbar for the queries; `d_x` is the outer loss's gradient of x.
docs/memory-kernel.md has the algebra.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_pretrain.memory.triton.forward_kernels import load_anchor, read_tile
from titans_pretrain.memory.triton.parts import (
    activate_with_curvature,
    activate_with_slope,
    at_slice,
    dot,
    first_layer,
    gate_offsets,
    load_gates,
    normalize,
    reach,
    second_layer,
    through_norm,
    token_offsets,
)


@triton.jit
def state_rebuild(
    k, rows, ends, base, starts, slope, checkpoints, initial, states,
    T, H, first_tile, tiles, all_tiles, chunks,
    D: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr, TILES_PER_CHUNK: tl.constexpr,
    CHECKPOINT_EVERY: tl.constexpr, BASE: tl.constexpr, GELU: tl.constexpr, STARTS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Fill `states` of the range again. With D2 known (`slope`) the hidden slices do not need each other, so all of them and
    all stretches between checkpoints run at once. Grid (n, slices, stretches)."""
    n, j, stretch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = n % H
    SIZE: tl.constexpr = D * SLICE
    o1, o2 = first_layer(D, SLICE), second_layer(D, SLICE)
    i = tl.arange(0, TILE)
    begin = first_tile + stretch * CHECKPOINT_EVERY
    end_tile = tl.minimum(begin + CHECKPOINT_EVERY, first_tile + tiles)
    if begin == 0:
        source = initial + at_slice(n, 0, j, 1, SLICES, 4, SIZE)
    else:
        count = (all_tiles - 1) // CHECKPOINT_EVERY
        source = checkpoints + at_slice(n, begin // CHECKPOINT_EVERY - 1, j, count, SLICES, 4, SIZE)
    w1, w2 = tl.load(source + o1), tl.load(source + SIZE + o2)
    s1, s2 = tl.load(source + 2 * SIZE + o1), tl.load(source + 3 * SIZE + o2)
    b1, b2 = tl.zeros([D, SLICE], tl.float32), tl.zeros([SLICE, D], tl.float32)
    if BASE:
        b = base + (h * SLICES + j) * (2 * SIZE)
        b1, b2 = tl.load(b + o1).to(tl.float32), tl.load(b + SIZE + o2).to(tl.float32)
    a1, a2 = w1.to(OPERAND), w2.to(OPERAND)
    for tile in range(begin, end_tile):
        out = states + at_slice(n, tile - first_tile, j, tiles, SLICES, 4, SIZE)
        w1b, w2b = w1.to(OPERAND), w2.to(OPERAND)
        tl.store(out + o1, w1b)
        tl.store(out + SIZE + o2, w2b)
        tl.store(out + 2 * SIZE + o1, s1.to(OPERAND))
        tl.store(out + 3 * SIZE + o2, s2.to(OPERAND))
        if tile % TILES_PER_CHUNK == 0:
            a1, a2 = w1b, w2b
            if BASE:
                a1 = (w1b.to(tl.float32) + b1).to(OPERAND)
                a2 = (w2b.to(tl.float32) + b2).to(OPERAND)
        at, valid = token_offsets(n, tile, T, H, D, TILE)
        keys = tl.load(k + at, mask=valid, other=0.0).to(OPERAND)
        d2b = tl.load(slope + at, mask=valid, other=0.0)
        row = rows + (n.to(tl.int64) * all_tiles + tile) * (8 * TILE) + i
        end = ends + (n.to(tl.int64) * all_tiles + tile) * 8
        p1, r1 = tl.load(row + 2 * TILE)[:, None], tl.load(row + 3 * TILE)[:, None]
        p2, r2 = tl.load(row + 6 * TILE)[:, None], tl.load(row + 7 * TILE)[:, None]
        beta1, f1, m1 = tl.load(end), tl.load(end + 1), tl.load(end + 2)
        beta2, f2, m2 = tl.load(end + 4), tl.load(end + 5), tl.load(end + 6)
        keep = 1.0
        if STARTS:
            if (tile + 1) % TILES_PER_CHUNK == 0:
                if tile + 1 < all_tiles:
                    keep = 1.0 - tl.load(starts + (n // H) * chunks + (tile + 1) // TILES_PER_CHUNK)
        x, bend = activate_with_slope(dot(keys, a1), GELU)
        d1 = dot(d2b, tl.trans(a2)) * bend
        d2 = d2b.to(tl.float32)
        keys_t, x_t = tl.trans(keys), tl.trans(x.to(OPERAND))
        w1 = keep * (beta1 * w1 + f1 * s1 - dot(keys_t, (p1 * d1).to(OPERAND)))
        s1 = keep * (m1 * s1 - dot(keys_t, (r1 * d1).to(OPERAND)))
        w2 = keep * (beta2 * w2 + f2 * s2 - dot(x_t, (p2 * d2).to(OPERAND)))
        s2 = keep * (m2 * s2 - dot(x_t, (r2 * d2).to(OPERAND)))


@triton.jit
def output_backward(
    q, k, log_gamma, log_eta, theta, rows, base, gain, states, slope, out_grad,
    q_grad, k_part, slope_part, hidden_part, slope1_part, query_hidden, query_hidden_grad, output_grad,
    update, reach_grad, rows_grad, norm_grad,
    T, H, eps, first_tile, tiles, all_tiles,
    D: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr, TILES_PER_CHUNK: tl.constexpr,
    NORM: tl.constexpr, BASE: tl.constexpr, GELU: tl.constexpr, FORGET: tl.constexpr, MOMENTUM: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Everything the reads of a tile say: d_q; what they add to d_K, d_D2 (k_part, slope_part [n, tiles, TILE, D]), to d_Z, d_D1
    (hidden_part, slope1_part [n, tiles, SLICES, TILE, SLICE]) and to d_W, d_S (update, like `states`); the gradients of P and
    of beta, f. For the gradient of the base also Zbar, d_Abar (query_hidden*, like hidden_part) and d_O (output_grad, like
    k_part). Grid (tiles of the range, n)."""
    local, n = tl.program_id(0), tl.program_id(1)
    tile = first_tile + local
    h = n % H
    SIZE: tl.constexpr = D * SLICE
    o1, o2 = first_layer(D, SLICE), second_layer(D, SLICE)
    i, d = tl.arange(0, TILE), tl.arange(0, D)
    entry = n.to(tl.int64) * tiles + local
    square = i[:, None] * TILE + i[None, :]
    per_token = entry * (TILE * D) + i[:, None] * D + d[None, :]
    chunk_start = (tile // TILES_PER_CHUNK) * TILES_PER_CHUNK - first_tile

    at, valid = token_offsets(n, tile, T, H, D, TILE)
    queries = tl.load(q + at, mask=valid, other=0.0).to(OPERAND)
    keys = tl.load(k + at, mask=valid, other=0.0).to(OPERAND)
    d2b = tl.load(slope + at, mask=valid, other=0.0)
    d_o = tl.load(out_grad + at, mask=valid, other=0.0).to(tl.float32)
    go, gv = gate_offsets(n, tile, 0, T, H, TILE)
    lg, le, th = load_gates(log_gamma, log_eta, theta, go, gv, FORGET, MOMENTUM)
    reach1 = reach(lg, le, th, TILE, OPERAND)
    lg, le, th = load_gates(log_gamma, log_eta, theta, go + 1, gv, FORGET, MOMENTUM)
    reach2 = reach(lg, le, th, TILE, OPERAND)
    row = rows + (n.to(tl.int64) * all_tiles + tile) * (8 * TILE) + i
    beta1, f1 = tl.load(row)[:, None], tl.load(row + TILE)[:, None]
    beta2, f2 = tl.load(row + 4 * TILE)[:, None], tl.load(row + 5 * TILE)[:, None]
    scores = dot(queries, tl.trans(keys))
    y, overlap = read_tile(
        queries, keys, d2b, states, base, n, h, local, chunk_start, tiles, beta1, f1, beta2, f2,
        reach1, scores, D, SLICE, SLICES, TILE, BASE, GELU, OPERAND,
    )  # fmt: skip
    overlap *= reach2  # now P2 * (Zbar Z')

    d_q = tl.zeros([TILE, D], tl.float32)
    if NORM:
        y -= dot(overlap.to(OPERAND), d2b)
        normalized, inverse_std = normalize(y, eps, D)
        tl.store(norm_grad + entry * (2 * D) + d, tl.sum(d_o * normalized, 0))
        tl.store(norm_grad + entry * (2 * D) + D + d, tl.sum(d_o, 0))
        d_q += d_o
        d_o = through_norm(d_o * tl.load(gain + h * D + d)[None, :], normalized, inverse_std, D)
    d_ob = d_o.to(OPERAND)
    if BASE:
        tl.store(output_grad + per_token, d_ob)
    tl.store(slope_part + per_token, -dot(tl.trans(overlap.to(OPERAND)), d_ob))
    through = dot(d_ob, tl.trans(d2b)) * reach2  # P2 * (d_O D2')
    through_b = through.to(OPERAND)
    # d_P2 = -(d_O D2') * (Zbar Z'): both factors above carry P2 already, so it is put together in the loop below.
    d_beta1, d_f1 = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    d_beta2, d_f2 = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    onto_keys = tl.zeros([TILE, TILE], tl.float32)  # d_Abar D1'
    plain_overlap = tl.zeros([TILE, TILE], tl.float32)
    within = (reach1 * scores).to(OPERAND)
    for j in range(SLICES):
        a1, a2 = load_anchor(states, base, n, h, chunk_start, j, tiles, D, SLICE, SLICES, BASE, OPERAND)
        x, bend = activate_with_slope(dot(keys, a1), GELU)
        xb = x.to(OPERAND)
        d1 = (dot(d2b, tl.trans(a2)) * bend).to(OPERAND)
        weights = states + at_slice(n, local, j, tiles, SLICES, 4, SIZE)
        w1, s1 = tl.load(weights + o1), tl.load(weights + 2 * SIZE + o1)
        w2, s2 = tl.load(weights + SIZE + o2), tl.load(weights + 3 * SIZE + o2)
        z = beta1 * dot(queries, w1) + f1 * dot(queries, s1) - dot(within, d1)
        b = base + (h * SLICES + j) * (2 * SIZE)
        if BASE:
            z += dot(queries, tl.load(b + o1))
        zbar, zbar_bend = activate_with_slope(z, GELU)
        zbar_b = zbar.to(OPERAND)
        plain_overlap += dot(zbar_b, tl.trans(xb))

        by_w, by_s = dot(d_ob, tl.trans(w2)), dot(d_ob, tl.trans(s2))
        d_beta2 += tl.sum(zbar * by_w, 1)
        d_f2 += tl.sum(zbar * by_s, 1)
        d_zbar = beta2 * by_w + f2 * by_s - dot(through_b, xb)
        if BASE:
            d_zbar += dot(d_ob, tl.trans(tl.load(b + SIZE + o2)))
        d_z = d_zbar * zbar_bend
        d_zb = d_z.to(OPERAND)
        hidden = (entry * SLICES + j) * (TILE * SLICE) + i[:, None] * SLICE + tl.arange(0, SLICE)[None, :]
        tl.store(hidden_part + hidden, (-dot(tl.trans(through_b), zbar_b)).to(OPERAND))
        tl.store(slope1_part + hidden, (-dot(tl.trans(within), d_zb)).to(OPERAND))
        if BASE:
            tl.store(query_hidden + hidden, zbar_b)
            tl.store(query_hidden_grad + hidden, d_zb)
        onto_keys += dot(d_zb, tl.trans(d1))

        by_w, by_s = dot(d_zb, tl.trans(w1)), dot(d_zb, tl.trans(s1))
        wide_queries = queries.to(tl.float32)
        d_beta1 += tl.sum(wide_queries * by_w, 1)
        d_f1 += tl.sum(wide_queries * by_s, 1)
        d_q += beta1 * by_w + f1 * by_s
        if BASE:
            d_q += dot(d_zb, tl.trans(tl.load(b + o1)))

        change = update + at_slice(n, local, j, tiles, SLICES, 4, SIZE)
        queries_t, zbar_t = tl.trans(queries), tl.trans(zbar_b)
        tl.store(change + o1, dot(queries_t, (beta1 * d_z).to(OPERAND)).to(OPERAND))
        tl.store(change + SIZE + o2, dot(zbar_t, (beta2 * d_o).to(OPERAND)).to(OPERAND))
        tl.store(change + 2 * SIZE + o1, dot(queries_t, (f1 * d_z).to(OPERAND)).to(OPERAND))
        tl.store(change + 3 * SIZE + o2, dot(zbar_t, (f2 * d_o).to(OPERAND)).to(OPERAND))

    grads = reach_grad + entry * (2 * TILE * TILE) + square
    tl.store(grads, (-onto_keys * scores).to(OPERAND))
    tl.store(grads + TILE * TILE, (-dot(d_ob, tl.trans(d2b)) * plain_overlap).to(OPERAND))
    onto_keys_b = (reach1 * onto_keys).to(OPERAND)
    d_q -= dot(onto_keys_b, keys)
    tl.store(k_part + per_token, -dot(tl.trans(onto_keys_b), queries))
    tl.store(q_grad + at, d_q.to(q_grad.dtype.element_ty), mask=valid)
    row = rows_grad + entry * (8 * TILE) + i
    tl.store(row, d_beta1)
    tl.store(row + TILE, d_f1)
    tl.store(row + 4 * TILE, d_beta2)
    tl.store(row + 5 * TILE, d_f2)


@triton.jit
def inner_gradient_backward(y, k, v, gain, bias, eps, d2, d_d2, D: tl.constexpr, NORM: tl.constexpr):
    """Backward of `inner_gradient`'s second result d2: the gradients of y and of the error (that of k, and minus that of v), and
    per token of gain."""
    if NORM:
        normalized, inverse_std = normalize(y, eps, D)
        error = k + gain * normalized + bias - v
        slope = error * gain
        d_slope = through_norm(d_d2, normalized, inverse_std, D)
        d_error = d_slope * gain
        along = (tl.sum(slope * normalized, 1) / D)[:, None]
        d_along = (tl.sum(d_d2 * normalized, 1) / D)[:, None]
        d_normalized = d_error * gain - inverse_std * (along * d_d2 + d_along * slope)
        by_scale = (tl.sum(d_d2 * d2, 1) / D)[:, None]
        d_y = through_norm(d_normalized, normalized, inverse_std, D) - inverse_std * normalized * by_scale
        return d_y, d_error, d_slope * error + d_error * normalized
    else:
        return d_d2, d_d2, tl.zeros_like(d_d2)


@triton.jit
def state_backward(
    k, v, rows, ends, base, gain, bias, starts, states, slope, anchor_grad,
    update, k_part, slope_part, hidden_part, slope1_part,
    k_grad, v_grad, running, chunk_grad, base_grad, rows_grad, ends_grad, norm_grad,
    T, H, eps, first_tile, last_tile, all_tiles, chunks, anchor_tile,
    D: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr, TILES_PER_CHUNK: tl.constexpr,
    NORM: tl.constexpr, BASE: tl.constexpr, GELU: tl.constexpr, STARTS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Walk tiles last_tile > i >= first_tile. `running` [n, 1, SLICES, 4, D * SLICE] holds d_W, d_S after the range and leaves
    with those before it; base_grad [n, 1, SLICES, 2, ...] gathers what the anchors say about the base, chunk_grad (alike) what
    the tiles of an unfinished chunk say about its anchor. Grid (n,)."""
    n = tl.program_id(0)
    h = n % H
    SIZE: tl.constexpr = D * SLICE
    o1, o2 = first_layer(D, SLICE), second_layer(D, SLICE)
    i, d = tl.arange(0, TILE), tl.arange(0, D)
    tiles = last_tile - first_tile
    g, b = 0.0, 0.0
    if NORM:
        g, b = tl.load(gain + h * D + d)[None, :], tl.load(bias + h * D + d)[None, :]
    d_gain, d_bias = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)

    for step in range(tiles):
        tile = last_tile - 1 - step
        local = tile - first_tile
        chunk_start = (tile // TILES_PER_CHUNK) * TILES_PER_CHUNK - first_tile
        entry = n.to(tl.int64) * tiles + local
        at, valid = token_offsets(n, tile, T, H, D, TILE)
        keys = tl.load(k + at, mask=valid, other=0.0).to(OPERAND)
        d2b = tl.load(slope + at, mask=valid, other=0.0)
        d2 = d2b.to(tl.float32)
        row = rows + (n.to(tl.int64) * all_tiles + tile) * (8 * TILE) + i
        end = ends + (n.to(tl.int64) * all_tiles + tile) * 8
        p1, r1 = tl.load(row + 2 * TILE)[:, None], tl.load(row + 3 * TILE)[:, None]
        p2, r2 = tl.load(row + 6 * TILE)[:, None], tl.load(row + 7 * TILE)[:, None]
        beta1, f1, m1 = tl.load(end), tl.load(end + 1), tl.load(end + 2)
        beta2, f2, m2 = tl.load(end + 4), tl.load(end + 5), tl.load(end + 6)
        per_token = entry * (TILE * D) + i[:, None] * D + d[None, :]
        d_d2 = tl.load(slope_part + per_token)
        y = tl.zeros([TILE, D], tl.float32)
        d_p1, d_r1 = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        d_p2, d_r2 = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)

        for j in range(SLICES):
            a1, a2 = load_anchor(states, base, n, h, chunk_start, j, tiles, D, SLICE, SLICES, BASE, OPERAND)
            x, bend = activate_with_slope(dot(keys, a1), GELU)
            xb = x.to(OPERAND)
            if NORM:
                y += dot(xb, a2)
            run = running + at_slice(n, 0, j, 1, SLICES, 4, SIZE)
            by_w, by_s = dot(keys, tl.load(run + o1).to(OPERAND)), dot(keys, tl.load(run + 2 * SIZE + o1).to(OPERAND))
            d1 = dot(d2b, tl.trans(a2)) * bend
            d_p1 -= tl.sum(by_w * d1, 1)
            d_r1 -= tl.sum(by_s * d1, 1)
            hidden = (entry * SLICES + j) * (TILE * SLICE) + i[:, None] * SLICE + tl.arange(0, SLICE)[None, :]
            d_d1 = tl.load(slope1_part + hidden).to(tl.float32) - p1 * by_w - r1 * by_s
            tl.store(slope1_part + hidden, d_d1.to(OPERAND))
            by_w, by_s = dot(xb, tl.load(run + SIZE + o2).to(OPERAND)), dot(xb, tl.load(run + 3 * SIZE + o2).to(OPERAND))
            d_p2 -= tl.sum(by_w * d2, 1)
            d_r2 -= tl.sum(by_s * d2, 1)
            d_d2 += dot((d_d1 * bend).to(OPERAND), a2) - p2 * by_w - r2 * by_s
        tl.debug_barrier()

        values = tl.load(v + at, mask=valid, other=0.0).to(tl.float32)
        d_d2 = tl.where(valid, d_d2, 0.0)
        d_y, d_error, d_gains = inner_gradient_backward(y, keys.to(tl.float32), values, g, b, eps, d2, d_d2, D, NORM)
        tl.store(v_grad + at, (-d_error).to(v_grad.dtype.element_ty), mask=valid)
        d_k = tl.load(k_part + per_token)
        if NORM:
            d_gain += tl.sum(tl.where(valid, d_gains, 0.0), 0)
            d_bias += tl.sum(d_error, 0)
            d_k += d_error
        d_yb = d_y.to(OPERAND)
        pd2, rd2 = (p2 * d2).to(OPERAND), (r2 * d2).to(OPERAND)
        keys_t = tl.trans(keys)
        d_beta1, d_f1, d_m1 = 0.0, 0.0, 0.0
        d_beta2, d_f2, d_m2 = 0.0, 0.0, 0.0
        keep = 1.0
        if STARTS:
            if tile % TILES_PER_CHUNK == 0:
                keep = 1.0 - tl.load(starts + (n // H) * chunks + tile // TILES_PER_CHUNK)
        for j in range(SLICES):
            a1, a2 = load_anchor(states, base, n, h, chunk_start, j, tiles, D, SLICE, SLICES, BASE, OPERAND)
            run = running + at_slice(n, 0, j, 1, SLICES, 4, SIZE)
            d_w1, d_s1 = tl.load(run + o1), tl.load(run + 2 * SIZE + o1)
            d_w2, d_s2 = tl.load(run + SIZE + o2), tl.load(run + 3 * SIZE + o2)
            x, bend, curvature = activate_with_curvature(dot(keys, a1), GELU)
            back = dot(d2b, tl.trans(a2))
            d1 = back * bend
            hidden = (entry * SLICES + j) * (TILE * SLICE) + i[:, None] * SLICE + tl.arange(0, SLICE)[None, :]
            d_d1 = tl.load(slope1_part + hidden).to(tl.float32)
            d_x = tl.load(hidden_part + hidden).to(tl.float32) + dot(d_yb, tl.trans(a2))
            d_x -= dot(pd2, tl.trans(d_w2.to(OPERAND))) + dot(rd2, tl.trans(d_s2.to(OPERAND)))
            d_a = (d_d1 * back * curvature + d_x * bend).to(OPERAND)
            d_k += dot(d_a, tl.trans(a1))
            d_k -= dot((p1 * d1).to(OPERAND), tl.trans(d_w1.to(OPERAND)))
            d_k -= dot((r1 * d1).to(OPERAND), tl.trans(d_s1.to(OPERAND)))
            d_a1 = dot(keys_t, d_a)
            d_a2 = dot(tl.trans((d_d1 * bend).to(OPERAND)), d2b) + dot(tl.trans(x.to(OPERAND)), d_yb)
            if BASE:
                total = base_grad + at_slice(n, 0, j, 1, SLICES, 2, SIZE)
                tl.store(total + o1, tl.load(total + o1) + d_a1)
                tl.store(total + SIZE + o2, tl.load(total + SIZE + o2) + d_a2)
            if TILES_PER_CHUNK > 1:
                gathered = chunk_grad + at_slice(n, 0, j, 1, SLICES, 2, SIZE)
                d_a1 += tl.load(gathered + o1)
                d_a2 += tl.load(gathered + SIZE + o2)
                begins = tile % TILES_PER_CHUNK == 0
                tl.store(gathered + o1, tl.where(begins, 0.0, d_a1))
                tl.store(gathered + SIZE + o2, tl.where(begins, 0.0, d_a2))
                d_a1, d_a2 = tl.where(begins, d_a1, 0.0), tl.where(begins, d_a2, 0.0)
            if tile == anchor_tile:
                extra = anchor_grad + at_slice(n, 0, j, 1, SLICES, 2, SIZE)
                d_a1 += tl.load(extra + o1)
                d_a2 += tl.load(extra + SIZE + o2)

            before = states + at_slice(n, local, j, tiles, SLICES, 4, SIZE)
            change = update + at_slice(n, local, j, tiles, SLICES, 4, SIZE)
            w, s = tl.load(before + o1).to(tl.float32), tl.load(before + 2 * SIZE + o1).to(tl.float32)
            d_beta1 += tl.sum(d_w1 * w)
            d_f1 += tl.sum(d_w1 * s)
            d_m1 += tl.sum(d_s1 * s)
            new_w = beta1 * d_w1 + tl.load(change + o1).to(tl.float32) + d_a1
            new_s = f1 * d_w1 + m1 * d_s1 + tl.load(change + 2 * SIZE + o1).to(tl.float32)
            tl.store(run + o1, keep * new_w)
            tl.store(run + 2 * SIZE + o1, keep * new_s)
            w, s = tl.load(before + SIZE + o2).to(tl.float32), tl.load(before + 3 * SIZE + o2).to(tl.float32)
            d_beta2 += tl.sum(d_w2 * w)
            d_f2 += tl.sum(d_w2 * s)
            d_m2 += tl.sum(d_s2 * s)
            new_w = beta2 * d_w2 + tl.load(change + SIZE + o2).to(tl.float32) + d_a2
            new_s = f2 * d_w2 + m2 * d_s2 + tl.load(change + 3 * SIZE + o2).to(tl.float32)
            tl.store(run + SIZE + o2, keep * new_w)
            tl.store(run + 3 * SIZE + o2, keep * new_s)
        tl.debug_barrier()

        tl.store(k_grad + at, d_k.to(k_grad.dtype.element_ty), mask=valid)
        row = rows_grad + entry * (8 * TILE) + i
        tl.store(row + 2 * TILE, d_p1)
        tl.store(row + 3 * TILE, d_r1)
        tl.store(row + 6 * TILE, d_p2)
        tl.store(row + 7 * TILE, d_r2)
        end = ends_grad + entry * 8
        tl.store(end, d_beta1)
        tl.store(end + 1, d_f1)
        tl.store(end + 2, d_m1)
        tl.store(end + 4, d_beta2)
        tl.store(end + 5, d_f2)
        tl.store(end + 6, d_m2)
    if NORM:
        sums = norm_grad + n * (2 * D) + d
        tl.store(sums, tl.load(sums) + d_gain)
        tl.store(sums + D, tl.load(sums + D) + d_bias)
