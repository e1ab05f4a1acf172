"""Kernels of the backward pass, in the order they run on a range of tiles: the states are rebuilt from a checkpoint, the reads
are differentiated (parallel over tiles), then the state pass is walked in reverse.

Names are those of the forward: W, S the state before a tile, P, beta, f, p, r its gates, D1, D2 the loss gradients at the
layers' outputs, Z the hidden layer for the keys and Zbar for the queries; `d_x` is the outer loss's gradient of x.
docs/memory-kernel.md has the algebra.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_pretrain.memory.triton.forward_kernels import (
    kept_share,
    load_anchor,
    load_anchor_1,
    load_anchor_2,
    store_state,
)
from titans_pretrain.memory.triton.parts import (
    COUNTS,
    activate_with_curvature,
    activate_with_slope,
    at_slice,
    dot,
    first_layer,
    gate_offsets,
    halves,
    load_gates,
    narrow,
    normalize,
    reach,
    second_layer,
    through_norm,
    token_offsets,
)


@triton.jit(do_not_specialize=COUNTS)
def state_rebuild(
    k, rows, ends, base, starts, slope, checkpoints, initial, states,
    T, H, first_tile, tiles, all_tiles, chunks, once,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr,
    TILES_PER_CHUNK: tl.constexpr,
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
    a1, a2 = narrow(w1, OPERAND), narrow(w2, OPERAND)
    for tile in range(begin, end_tile):
        out = states + at_slice(n, tile - first_tile, j, tiles, SLICES, 4, SIZE)
        w1b, w2b = narrow(w1, OPERAND), narrow(w2, OPERAND)
        store_state(out, w1b, w2b, s1, s2, D, SLICE, OPERAND)
        if tile % TILES_PER_CHUNK == 0:
            a1, a2 = w1b, w2b
            if BASE:
                a1 = narrow(w1b.to(tl.float32) + b1, OPERAND)
                a2 = narrow(w2b.to(tl.float32) + b2, OPERAND)
        at, valid = token_offsets(n, tile, T, H, D, HEAD_DIM, TILE)
        keys = narrow(tl.load(k + at, mask=valid, other=0.0), OPERAND)
        d2b = tl.load(slope + at, mask=valid, other=0.0)
        row = rows + (n.to(tl.int64) * all_tiles + tile) * (8 * TILE) + i
        end = ends + (n.to(tl.int64) * all_tiles + tile) * 8
        p1, r1 = tl.load(row + 2 * TILE)[:, None], tl.load(row + 3 * TILE)[:, None]
        p2, r2 = tl.load(row + 6 * TILE)[:, None], tl.load(row + 7 * TILE)[:, None]
        beta1, f1, m1 = tl.load(end), tl.load(end + 1), tl.load(end + 2)
        beta2, f2, m2 = tl.load(end + 4), tl.load(end + 5), tl.load(end + 6)
        keep = kept_share(starts, n, tile + 1, H, all_tiles, chunks, TILES_PER_CHUNK, STARTS)
        x, bend = activate_with_slope(dot(keys, a1, once), GELU)
        d1 = dot(d2b, tl.trans(a2), once) * bend
        d2 = d2b.to(tl.float32)
        keys_t, x_t = tl.trans(keys), tl.trans(narrow(x, OPERAND))
        w1 = keep * (beta1 * w1 + f1 * s1 - dot(keys_t, narrow(p1 * d1, OPERAND), once))
        s1 = keep * (m1 * s1 - dot(keys_t, narrow(r1 * d1, OPERAND), once))
        w2 = keep * (beta2 * w2 + f2 * s2 - dot(x_t, narrow(p2 * d2, OPERAND), once))
        s2 = keep * (m2 * s2 - dot(x_t, narrow(r2 * d2, OPERAND), once))


@triton.jit
def hidden_offsets(entry, j, SLICES: tl.constexpr, TILE: tl.constexpr, SLICE: tl.constexpr):
    """Where a slice of a tile lies in an array [n, tiles, SLICES, TILE, SLICE]; entry = n * tiles + tile."""
    return (entry * SLICES + j) * (TILE * SLICE) + tl.arange(0, TILE)[:, None] * SLICE + tl.arange(0, SLICE)[None, :]


@triton.jit(do_not_specialize=COUNTS)
def read_backward_2(
    q, k, v, log_gamma, log_eta, theta, rows, base, gain, bias, states, slope, out_grad,
    anchor_normalized, pull, norm_rows, key_hidden, key_bend, key_curve, slope1, query_hidden, query_hidden_grad,
    output_grad, slope_part, hidden_part, update, reach_grad, rows_grad, norm_grad,
    T, H, eps, first_tile, tiles, all_tiles, slices, once,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr,
    TILES_PER_CHUNK: tl.constexpr,
    NORM: tl.constexpr, BASE: tl.constexpr, GELU: tl.constexpr, FORGET: tl.constexpr, MOMENTUM: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """The read's last layer. Its tile's share of d_W2, d_S2 (parts 1 and 3 of `update`, like `states`), of d_D2 (slope_part
    [n, tiles, TILE, D]) and d_Z (hidden_part [n, tiles, SLICES, TILE, SLICE]); the gradients of P2, beta2, f2 and of Abar
    (query_hidden_grad, like hidden_part); d_O (output_grad, like slope_part). On the way, for the kernels that follow, what the
    state pass had at the anchor: Z, act', D2 W2' * act'' and D1, and of the layer norm there its normalized output, error +
    gain * normalized (pull) and per token 1 / std and mean(gain * error * normalized); and Zbar. Grid (tiles, n)."""
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
    row = rows + (n.to(tl.int64) * all_tiles + tile) * (8 * TILE) + i
    at, valid = token_offsets(n, tile, T, H, D, HEAD_DIM, TILE)
    gates_at, exists = gate_offsets(n, tile, 0, T, H, TILE)

    queries = narrow(tl.load(q + at, mask=valid, other=0.0), OPERAND)
    keys = narrow(tl.load(k + at, mask=valid, other=0.0), OPERAND)
    d2b = tl.load(slope + at, mask=valid, other=0.0)
    lg, le, th = load_gates(log_gamma, log_eta, theta, gates_at, exists, FORGET, MOMENTUM)
    within = narrow(reach(lg, le, th, once, TILE, OPERAND) * dot(queries, tl.trans(keys), once), OPERAND)
    beta1, f1 = tl.load(row)[:, None], tl.load(row + TILE)[:, None]
    beta2, f2 = tl.load(row + 4 * TILE)[:, None], tl.load(row + 5 * TILE)[:, None]
    anchor_y, y = tl.zeros([TILE, D], tl.float32), tl.zeros([TILE, D], tl.float32)
    overlap = tl.zeros([TILE, TILE], tl.float32)  # Zbar Z'
    for j in range(slices):
        a1, a2 = load_anchor(states, base, n, h, chunk_start, j, tiles, D, SLICE, SLICES, BASE, OPERAND)
        hidden = hidden_offsets(entry, j, SLICES, TILE, SLICE)
        x, bend, curve = activate_with_curvature(dot(keys, a1, once), GELU)
        xb = narrow(x, OPERAND)
        back = dot(d2b, tl.trans(a2), once)
        d1 = narrow(back * bend, OPERAND)
        tl.store(key_hidden + hidden, xb)
        tl.store(key_bend + hidden, narrow(bend, OPERAND))
        tl.store(key_curve + hidden, narrow(back * curve, OPERAND))
        tl.store(slope1 + hidden, d1)
        if NORM:
            anchor_y += dot(xb, a2, once)
        weights = states + at_slice(n, local, j, tiles, SLICES, 4, SIZE)
        b = base + (h * SLICES + j) * (2 * SIZE)
        z = beta1 * dot(queries, tl.load(weights + o1), once) + f1 * dot(
            queries, tl.load(weights + 2 * SIZE + o1), once
        )
        z -= dot(within, d1, once)
        if BASE:
            z += dot(queries, tl.load(b + o1), once)
        z, bend = activate_with_slope(z, GELU)
        zb = narrow(z, OPERAND)
        tl.store(query_hidden + hidden, zb)
        tl.store(query_hidden_grad + hidden, narrow(bend, OPERAND))  # the gradient itself comes below
        overlap += dot(zb, tl.trans(xb), once)
        if NORM:
            y += beta2 * dot(zb, tl.load(weights + SIZE + o2), once) + f2 * dot(
                zb, tl.load(weights + 3 * SIZE + o2), once
            )
            if BASE:
                y += dot(zb, tl.load(b + SIZE + o2), once)
    tl.debug_barrier()

    lg, le, th = load_gates(log_gamma, log_eta, theta, gates_at + 1, exists, FORGET, MOMENTUM)
    reach2 = reach(lg, le, th, once, TILE, OPERAND)
    d_o = tl.load(out_grad + at, mask=valid, other=0.0).to(tl.float32)
    reached = narrow(reach2 * overlap, OPERAND)
    if NORM:
        g, b = tl.load(gain + h * D + d)[None, :], tl.load(bias + h * D + d)[None, :]
        values = tl.load(v + at, mask=valid, other=0.0).to(tl.float32)
        normalized, inverse_std = normalize(anchor_y, eps, D, HEAD_DIM)
        error = keys.to(tl.float32) + g * normalized + b - values
        tl.store(anchor_normalized + per_token, narrow(normalized, OPERAND))
        tl.store(pull + per_token, narrow(error + g * normalized, OPERAND))
        tl.store(norm_rows + entry * (2 * TILE) + i, tl.sum(inverse_std, 1))
        tl.store(norm_rows + entry * (2 * TILE) + TILE + i, tl.sum(error * g * normalized, 1) / HEAD_DIM)
        normalized, inverse_std = normalize(y - dot(reached, d2b, once), eps, D, HEAD_DIM)
        tl.store(norm_grad + entry * (2 * D) + d, tl.sum(d_o * normalized, 0))
        tl.store(norm_grad + entry * (2 * D) + D + d, tl.sum(d_o, 0))
        d_o = through_norm(d_o * g, normalized, inverse_std, D, HEAD_DIM)
    d_ob, d_o_low = halves(d_o, OPERAND)
    tl.store(output_grad + per_token, d_ob)
    tl.store(slope_part + per_token, -dot(tl.trans(reached), d_ob, once))
    through = dot(d_ob, tl.trans(d2b), once) + dot(d_o_low, tl.trans(d2b), once)
    tl.store(reach_grad + entry * (2 * TILE * TILE) + TILE * TILE + square, -through * overlap)
    through_b = narrow(reach2 * through, OPERAND)
    d_beta, d_f = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for j in range(slices):
        hidden = hidden_offsets(entry, j, SLICES, TILE, SLICE)
        zb = tl.load(query_hidden + hidden)
        tl.store(hidden_part + hidden, narrow(-dot(tl.trans(through_b), zb, once), OPERAND))
        weights = states + at_slice(n, local, j, tiles, SLICES, 4, SIZE)
        by_w = dot(d_ob, tl.trans(tl.load(weights + SIZE + o2)), once)
        d_beta += tl.sum(zb.to(tl.float32) * by_w, 1)
        d_z = beta2 * by_w
        by_s = dot(d_ob, tl.trans(tl.load(weights + 3 * SIZE + o2)), once)
        d_f += tl.sum(zb.to(tl.float32) * by_s, 1)
        d_z += f2 * by_s - dot(through_b, tl.load(key_hidden + hidden), once)
        if BASE:
            d_z += dot(d_ob, tl.trans(tl.load(base + (h * SLICES + j) * (2 * SIZE) + SIZE + o2)), once)
        bend = tl.load(query_hidden_grad + hidden).to(tl.float32)
        tl.store(query_hidden_grad + hidden, narrow(d_z * bend, OPERAND))
        change = update + at_slice(n, local, j, tiles, SLICES, 4, SIZE)
        zb_t = tl.trans(zb)
        high, low = halves(beta2 * d_o, OPERAND)
        tl.store(change + SIZE + o2, narrow(dot(zb_t, high, once) + dot(zb_t, low, once), OPERAND))
        tl.store(change + 3 * SIZE + o2, narrow(dot(zb_t, narrow(f2 * d_o, OPERAND), once), OPERAND))
    row = rows_grad + entry * (8 * TILE) + i
    tl.store(row + 4 * TILE, d_beta)
    tl.store(row + 5 * TILE, d_f)


@triton.jit(do_not_specialize=COUNTS)
def read_backward_1(
    q, k, log_gamma, log_eta, theta, rows, base, states, out_grad, slope1, query_hidden_grad,
    q_grad, k_part, slope1_part, update, reach_grad, rows_grad,
    T, H, first_tile, tiles, all_tiles, slices, once,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr,
    NORM: tl.constexpr, BASE: tl.constexpr, FORGET: tl.constexpr, MOMENTUM: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """The read's first layer: d_q; the tile's share of d_K (k_part [n, tiles, TILE, D]), of d_D1 (slope1_part [n, tiles,
    SLICES, TILE, SLICE]) and of d_W1, d_S1 (parts 0 and 2 of `update`); the gradients of P1, beta1, f1. Grid (tiles, n)."""
    local, n = tl.program_id(0), tl.program_id(1)
    tile = first_tile + local
    h = n % H
    SIZE: tl.constexpr = D * SLICE
    o1 = first_layer(D, SLICE)
    i, d = tl.arange(0, TILE), tl.arange(0, D)
    entry = n.to(tl.int64) * tiles + local
    row = rows + (n.to(tl.int64) * all_tiles + tile) * (8 * TILE) + i
    at, valid = token_offsets(n, tile, T, H, D, HEAD_DIM, TILE)
    gates_at, exists = gate_offsets(n, tile, 0, T, H, TILE)

    queries = narrow(tl.load(q + at, mask=valid, other=0.0), OPERAND)
    keys = narrow(tl.load(k + at, mask=valid, other=0.0), OPERAND)
    lg, le, th = load_gates(log_gamma, log_eta, theta, gates_at, exists, FORGET, MOMENTUM)
    reach1 = reach(lg, le, th, once, TILE, OPERAND)
    scores = dot(queries, tl.trans(keys), once)
    within = narrow(reach1 * scores, OPERAND)
    beta1, f1 = tl.load(row)[:, None], tl.load(row + TILE)[:, None]
    d_q = tl.zeros([TILE, D], tl.float32)
    onto_keys = tl.zeros([TILE, TILE], tl.float32)  # d_Abar D1'
    d_beta, d_f = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for j in range(slices):
        hidden = hidden_offsets(entry, j, SLICES, TILE, SLICE)
        d_z = tl.load(query_hidden_grad + hidden)
        onto_keys += dot(d_z, tl.trans(tl.load(slope1 + hidden)), once)
        tl.store(slope1_part + hidden, narrow(-dot(tl.trans(within), d_z, once), OPERAND))
        weights = states + at_slice(n, local, j, tiles, SLICES, 4, SIZE)
        by_w = dot(d_z, tl.trans(tl.load(weights + o1)), once)
        d_beta += tl.sum(queries.to(tl.float32) * by_w, 1)
        d_q += beta1 * by_w
        by_s = dot(d_z, tl.trans(tl.load(weights + 2 * SIZE + o1)), once)
        d_f += tl.sum(queries.to(tl.float32) * by_s, 1)
        d_q += f1 * by_s
        if BASE:
            d_q += dot(d_z, tl.trans(tl.load(base + (h * SLICES + j) * (2 * SIZE) + o1)), once)
        change = update + at_slice(n, local, j, tiles, SLICES, 4, SIZE)
        wide, queries_t = d_z.to(tl.float32), tl.trans(queries)
        tl.store(change + o1, narrow(dot(queries_t, narrow(beta1 * wide, OPERAND), once), OPERAND))
        tl.store(change + 2 * SIZE + o1, narrow(dot(queries_t, narrow(f1 * wide, OPERAND), once), OPERAND))

    square = i[:, None] * TILE + i[None, :]
    tl.store(reach_grad + entry * (2 * TILE * TILE) + square, -onto_keys * scores)
    onto_keys = narrow(reach1 * onto_keys, OPERAND)
    d_q -= dot(onto_keys, keys, once)
    if NORM:
        d_q += tl.load(out_grad + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(q_grad + at, narrow(d_q, q_grad.dtype.element_ty), mask=valid)
    tl.store(k_part + entry * (TILE * D) + i[:, None] * D + d[None, :], -dot(tl.trans(onto_keys), queries, once))
    row = rows_grad + entry * (8 * TILE) + i
    tl.store(row, d_beta)
    tl.store(row + TILE, d_f)


@triton.jit(do_not_specialize=COUNTS)
def state_backward(
    k, rows, ends, base, gain, starts, states, slope, anchor_grad, anchor_normalized, pull, norm_rows,
    key_hidden, key_bend, key_curve, slope1, update, k_part, slope_part, hidden_part, slope1_part,
    k_grad, v_grad, output_slope, running, chunk_grad, rows_grad, ends_grad, norm_grad,
    T, H, first_tile, tiles, end_tile, rounds, all_tiles, chunks, anchor_tile, slices, once,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr,
    TILES_PER_CHUNK: tl.constexpr,
    NORM: tl.constexpr, BASE: tl.constexpr, STARTS: tl.constexpr, PARALLEL: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """From d_W, d_S after a tile to all that the tile's inner gradients say: d_K and d_V; the gradients of p, r, of the gates'
    ends and per tile of gain and bias; for the base, d_A in place of hidden_part, d_D1 * act' in place of slope1_part and the
    gradient of the network's output in output_slope (like slope_part).

    Grid (n, 1) with `rounds` tiles: walk them in reverse from end_tile - 1. `running` [n, 1, SLICES, 4, D * SLICE] holds d_W,
    d_S after them and leaves with those before; chunk_grad [n, 1, SLICES, 2, ...] gathers what the tiles of an unfinished chunk
    say about its anchor. PARALLEL, grid (n, rounds): the tiles of a chunk at once; `update` holds d_W, d_S after each
    (`chunk_backward`), and each leaves its word about the anchor in chunk_grad [n, TILES_PER_CHUNK, SLICES, 2, ...]."""
    n = tl.program_id(0)
    h = n % H
    SIZE: tl.constexpr = D * SLICE
    o1, o2 = first_layer(D, SLICE), second_layer(D, SLICE)
    i, d = tl.arange(0, TILE), tl.arange(0, D)
    for step in range(rounds if not PARALLEL else 1):
        tile = end_tile - 1 - tl.program_id(1) - step
        local = tile - first_tile
        chunk_start = (tile // TILES_PER_CHUNK) * TILES_PER_CHUNK - first_tile
        entry = n.to(tl.int64) * tiles + local
        per_token = entry * (TILE * D) + i[:, None] * D + d[None, :]
        at, valid = token_offsets(n, tile, T, H, D, HEAD_DIM, TILE)
        keys = narrow(tl.load(k + at, mask=valid, other=0.0), OPERAND)
        d2b = tl.load(slope + at, mask=valid, other=0.0)
        row = rows + (n.to(tl.int64) * all_tiles + tile) * (8 * TILE) + i
        end = ends + (n.to(tl.int64) * all_tiles + tile) * 8
        p1, r1 = tl.load(row + 2 * TILE)[:, None], tl.load(row + 3 * TILE)[:, None]
        p2, r2 = tl.load(row + 6 * TILE)[:, None], tl.load(row + 7 * TILE)[:, None]

        # What the state after the tile says about the gradients it took in.
        d_d2 = tl.load(slope_part + per_token)
        d_p1, d_r1 = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        d_p2, d_r2 = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        for j in range(slices):
            hidden = hidden_offsets(entry, j, SLICES, TILE, SLICE)
            if PARALLEL:
                after = update + at_slice(n, local, j, tiles, SLICES, 4, SIZE)
            else:
                after = running + at_slice(n, 0, j, 1, SLICES, 4, SIZE)
            d1 = tl.load(slope1 + hidden).to(tl.float32)
            d_d1 = tl.load(slope1_part + hidden).to(tl.float32)
            onto = dot(keys, narrow(tl.load(after + o1), OPERAND), once)
            d_p1 -= tl.sum(onto * d1, 1)
            d_d1 -= p1 * onto
            onto = dot(keys, narrow(tl.load(after + 2 * SIZE + o1), OPERAND), once)
            d_r1 -= tl.sum(onto * d1, 1)
            d_d1 -= r1 * onto
            tl.store(slope1_part + hidden, narrow(d_d1, OPERAND))
            a2 = load_anchor_2(states, base, n, h, chunk_start, j, tiles, D, SLICE, SLICES, BASE, OPERAND)
            d_d2 += dot(narrow(d_d1 * tl.load(key_bend + hidden).to(tl.float32), OPERAND), a2, once)
            xb, d2 = tl.load(key_hidden + hidden), d2b.to(tl.float32)
            onto = dot(xb, narrow(tl.load(after + SIZE + o2), OPERAND), once)
            d_p2 -= tl.sum(onto * d2, 1)
            d_d2 -= p2 * onto
            onto = dot(xb, narrow(tl.load(after + 3 * SIZE + o2), OPERAND), once)
            d_r2 -= tl.sum(onto * d2, 1)
            d_d2 -= r2 * onto
        tl.debug_barrier()
        row = rows_grad + entry * (8 * TILE) + i
        tl.store(row + 2 * TILE, d_p1)
        tl.store(row + 3 * TILE, d_r1)
        tl.store(row + 6 * TILE, d_p2)
        tl.store(row + 7 * TILE, d_r2)

        # Back through the inner loss: v, the keys' share of the error, the network's output.
        d_y = tl.where(valid, d_d2, 0.0)
        d_error = d_y
        if NORM:
            normalized = tl.load(anchor_normalized + per_token).to(tl.float32)
            inverse_std = tl.load(norm_rows + entry * (2 * TILE) + i)[:, None]
            along = tl.load(norm_rows + entry * (2 * TILE) + TILE + i)[:, None]
            g, d2 = tl.load(gain + h * D + d)[None, :], d2b.to(tl.float32)
            by_direction = (tl.sum(d_y * normalized, 1) / HEAD_DIM)[:, None]
            by_scale = (tl.sum(d_y * d2, 1) / HEAD_DIM)[:, None]
            d_slope = through_norm(d_y, normalized, inverse_std, D, HEAD_DIM)
            sums = norm_grad + entry * (2 * D) + d
            tl.store(sums, tl.sum(d_slope * tl.load(pull + per_token).to(tl.float32), 0))
            d_error = d_slope * g
            tl.store(sums + D, tl.sum(d_error, 0))
            # Normalizing is a projection times 1 / std, which takes the inner loss's slope to D2: no second error is needed.
            d_y = through_norm(d_error * g, normalized, inverse_std, D, HEAD_DIM)
            d_y -= inverse_std * (along * d_slope + by_direction * d2 + by_scale * normalized)
        tl.store(v_grad + at, narrow(-d_error, v_grad.dtype.element_ty), mask=valid)
        d_yb = narrow(d_y, OPERAND)
        if BASE:
            tl.store(output_slope + per_token, d_yb)

        # Back through the network at the anchor, and the state before the tile.
        beta1, f1, m1 = tl.load(end), tl.load(end + 1), tl.load(end + 2)
        beta2, f2, m2 = tl.load(end + 4), tl.load(end + 5), tl.load(end + 6)
        keep = kept_share(starts, n, tile, H, all_tiles, chunks, TILES_PER_CHUNK, STARTS)
        d_beta1, d_f1, d_m1 = 0.0, 0.0, 0.0
        d_beta2, d_f2, d_m2 = 0.0, 0.0, 0.0
        for j in range(slices):
            hidden = hidden_offsets(entry, j, SLICES, TILE, SLICE)
            before = states + at_slice(n, local, j, tiles, SLICES, 4, SIZE)
            change = update + at_slice(n, local, j, tiles, SLICES, 4, SIZE)
            extra = anchor_grad + at_slice(n, 0, j, 1, SLICES, 2, SIZE)
            if PARALLEL:
                after = change
                gathered = chunk_grad + at_slice(n, tile % TILES_PER_CHUNK, j, TILES_PER_CHUNK, SLICES, 2, SIZE)
            else:
                after = running + at_slice(n, 0, j, 1, SLICES, 4, SIZE)
                gathered = chunk_grad + at_slice(n, 0, j, 1, SLICES, 2, SIZE)
            d_w2, d_s2 = tl.load(after + SIZE + o2).to(tl.float32), tl.load(after + 3 * SIZE + o2).to(tl.float32)
            d2 = d2b.to(tl.float32)
            d_x = tl.load(hidden_part + hidden).to(tl.float32)
            d_x -= dot(narrow(p2 * d2, OPERAND), tl.trans(narrow(d_w2, OPERAND)), once)
            d_x -= dot(narrow(r2 * d2, OPERAND), tl.trans(narrow(d_s2, OPERAND)), once)
            a2 = load_anchor_2(states, base, n, h, chunk_start, j, tiles, D, SLICE, SLICES, BASE, OPERAND)
            d_x += dot(d_yb, tl.trans(a2), once)
            bend = tl.load(key_bend + hidden).to(tl.float32)
            d_d1 = tl.load(slope1_part + hidden).to(tl.float32)
            d_back = narrow(d_d1 * bend, OPERAND)
            d_a = narrow(d_d1 * tl.load(key_curve + hidden).to(tl.float32) + d_x * bend, OPERAND)
            tl.store(hidden_part + hidden, d_a)
            if BASE:
                tl.store(slope1_part + hidden, d_back)
            d_anchor = dot(tl.trans(d_back), d2b, once) + dot(tl.trans(tl.load(key_hidden + hidden)), d_yb, once)
            s = tl.load(before + 3 * SIZE + o2).to(tl.float32)
            d_beta2 += tl.sum(d_w2 * tl.load(before + SIZE + o2).to(tl.float32))
            d_f2 += tl.sum(d_w2 * s)
            d_m2 += tl.sum(d_s2 * s)
            if PARALLEL:
                tl.store(gathered + SIZE + o2, d_anchor)
            else:
                if TILES_PER_CHUNK > 1:
                    d_anchor += tl.load(gathered + SIZE + o2)
                    begins = tile % TILES_PER_CHUNK == 0
                    tl.store(gathered + SIZE + o2, tl.where(begins, 0.0, d_anchor))
                    d_anchor = tl.where(begins, d_anchor, 0.0)
                if tile == anchor_tile:
                    d_anchor += tl.load(extra + SIZE + o2)
                d_s2 = keep * (f2 * d_w2 + m2 * d_s2 + tl.load(change + 3 * SIZE + o2).to(tl.float32))
                d_w2 = keep * (beta2 * d_w2 + tl.load(change + SIZE + o2).to(tl.float32) + d_anchor)
                tl.store(after + SIZE + o2, d_w2)
                tl.store(after + 3 * SIZE + o2, d_s2)
        tl.debug_barrier()
        d_k = tl.load(k_part + per_token)
        if NORM:
            d_k -= tl.load(v_grad + at, mask=valid, other=0.0).to(tl.float32)
        for j in range(slices):  # the first layer, apart so that fewer values are alive at a time
            hidden = hidden_offsets(entry, j, SLICES, TILE, SLICE)
            before = states + at_slice(n, local, j, tiles, SLICES, 4, SIZE)
            change = update + at_slice(n, local, j, tiles, SLICES, 4, SIZE)
            extra = anchor_grad + at_slice(n, 0, j, 1, SLICES, 2, SIZE)
            if PARALLEL:
                after = change
                gathered = chunk_grad + at_slice(n, tile % TILES_PER_CHUNK, j, TILES_PER_CHUNK, SLICES, 2, SIZE)
            else:
                after = running + at_slice(n, 0, j, 1, SLICES, 4, SIZE)
                gathered = chunk_grad + at_slice(n, 0, j, 1, SLICES, 2, SIZE)
            d_a = tl.load(hidden_part + hidden)
            d_w1, d_s1 = tl.load(after + o1).to(tl.float32), tl.load(after + 2 * SIZE + o1).to(tl.float32)
            d1 = tl.load(slope1 + hidden).to(tl.float32)
            d_k -= dot(narrow(p1 * d1, OPERAND), tl.trans(narrow(d_w1, OPERAND)), once)
            d_k -= dot(narrow(r1 * d1, OPERAND), tl.trans(narrow(d_s1, OPERAND)), once)
            a1 = load_anchor_1(states, base, n, h, chunk_start, j, tiles, D, SLICE, SLICES, BASE, OPERAND)
            d_k += dot(d_a, tl.trans(a1), once)
            d_anchor = dot(tl.trans(keys), d_a, once)
            s = tl.load(before + 2 * SIZE + o1).to(tl.float32)
            d_beta1 += tl.sum(d_w1 * tl.load(before + o1).to(tl.float32))
            d_f1 += tl.sum(d_w1 * s)
            d_m1 += tl.sum(d_s1 * s)
            if PARALLEL:
                tl.store(gathered + o1, d_anchor)
            else:
                if TILES_PER_CHUNK > 1:
                    d_anchor += tl.load(gathered + o1)
                    begins = tile % TILES_PER_CHUNK == 0
                    tl.store(gathered + o1, tl.where(begins, 0.0, d_anchor))
                    d_anchor = tl.where(begins, d_anchor, 0.0)
                if tile == anchor_tile:
                    d_anchor += tl.load(extra + o1)
                d_s1 = keep * (f1 * d_w1 + m1 * d_s1 + tl.load(change + 2 * SIZE + o1).to(tl.float32))
                d_w1 = keep * (beta1 * d_w1 + tl.load(change + o1).to(tl.float32) + d_anchor)
                tl.store(after + o1, d_w1)
                tl.store(after + 2 * SIZE + o1, d_s1)
        tl.debug_barrier()

        tl.store(k_grad + at, narrow(d_k, k_grad.dtype.element_ty), mask=valid)
        end = ends_grad + entry * 8
        tl.store(end, d_beta1)
        tl.store(end + 1, d_f1)
        tl.store(end + 2, d_m1)
        tl.store(end + 4, d_beta2)
        tl.store(end + 5, d_f2)
        tl.store(end + 6, d_m2)


@triton.jit(do_not_specialize=COUNTS)
def chunk_backward(
    ends, running, update, H, first_tile, tiles, end_tile, rounds, all_tiles,
    SIZE: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """d_W, d_S after every tile of a chunk, in place of what the tile's reads say about them (`update`): inside a chunk the
    state's way back does not depend on the inner gradients, whose word comes in at the anchor. `running` steps from after the
    chunk to before it, that word not yet in. Grid (n, SLICES * SIZE / BLOCK, 2), element by element."""
    n, layer = tl.program_id(0), tl.program_id(2)
    blocks: tl.constexpr = SIZE // BLOCK
    j = tl.program_id(1) // blocks
    e = layer * SIZE + (tl.program_id(1) % blocks) * BLOCK + tl.arange(0, BLOCK)
    run = running + at_slice(n, 0, j, 1, SLICES, 4, SIZE) + e
    d_w, d_s = tl.load(run), tl.load(run + 2 * SIZE)
    for step in range(rounds):
        tile = end_tile - 1 - step
        at = update + at_slice(n, tile - first_tile, j, tiles, SLICES, 4, SIZE) + e
        by_w, by_s = tl.load(at).to(tl.float32), tl.load(at + 2 * SIZE).to(tl.float32)
        tl.store(at, narrow(d_w, OPERAND))
        tl.store(at + 2 * SIZE, narrow(d_s, OPERAND))
        end = ends + ((n.to(tl.int64) * all_tiles + tile) * 2 + layer) * 4
        d_s = tl.load(end + 1) * d_w + tl.load(end + 2) * d_s + by_s
        d_w = tl.load(end) * d_w + by_w
    tl.store(run, d_w)
    tl.store(run + 2 * SIZE, d_s)
