"""Kernels of the forward pass: the sequential state pass, and the reads, which are parallel over tiles.

The state is carried as M = W - base with base = W_init where forgetting is toward it, else 0: the recurrence is then the same
for both ways of forgetting, and `base` shows only where weights are read. A range of tiles is worked off at a time, so that
the scratch arrays stay small; `states` [n, tiles, SLICES, 4, D * SLICE] holds (M1, M2, S1, S2) before each tile of the range
in the operand type, `running` [n, 1, SLICES, 4, D * SLICE] the state between two ranges in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_pretrain.memory.triton.parts import (
    COUNTS,
    activate,
    activate_with_slope,
    at_slice,
    dot,
    first_layer,
    gate_offsets,
    load_gates,
    narrow,
    normalize,
    reach,
    second_layer,
    through_norm,
    token_offsets,
)


@triton.jit
def load_anchor_1(
    states, base, n, h, local, j, tiles,
    D: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, BASE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """A slice of the first layer's weights before tile `local` of the range: the point at which gradients are taken."""
    a = narrow(tl.load(states + at_slice(n, local, j, tiles, SLICES, 4, D * SLICE) + first_layer(D, SLICE)), OPERAND)
    if BASE:
        b = tl.load(base + (h * SLICES + j) * (2 * D * SLICE) + first_layer(D, SLICE))
        a = narrow(a.to(tl.float32) + b.to(tl.float32), OPERAND)
    return a


@triton.jit
def load_anchor_2(
    states, base, n, h, local, j, tiles,
    D: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, BASE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """The second layer's."""
    a = states + at_slice(n, local, j, tiles, SLICES, 4, D * SLICE) + D * SLICE
    a = narrow(tl.load(a + second_layer(D, SLICE)), OPERAND)
    if BASE:
        b = tl.load(base + (h * SLICES + j) * (2 * D * SLICE) + D * SLICE + second_layer(D, SLICE))
        a = narrow(a.to(tl.float32) + b.to(tl.float32), OPERAND)
    return a


@triton.jit
def load_anchor(
    states, base, n, h, local, j, tiles,
    D: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, BASE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Both layers'."""
    return (
        load_anchor_1(states, base, n, h, local, j, tiles, D, SLICE, SLICES, BASE, OPERAND),
        load_anchor_2(states, base, n, h, local, j, tiles, D, SLICE, SLICES, BASE, OPERAND),
    )


@triton.jit
def inner_gradient(y, k, v, gain, bias, eps, D: tl.constexpr, HEAD_DIM: tl.constexpr, NORM: tl.constexpr):
    """The error M(k) - v and the gradient of 0.5 * error^2 with respect to the network's output y."""
    if NORM:
        normalized, inverse_std = normalize(y, eps, D, HEAD_DIM)
        error = k + gain * normalized + bias - v
        return error, through_norm(error * gain, normalized, inverse_std, D, HEAD_DIM)
    else:
        return y - v, y - v


@triton.jit
def store_state(to, w1, w2, s1, s2, D: tl.constexpr, SLICE: tl.constexpr, DTYPE: tl.constexpr):
    """A slice of (W1, W2, S1, S2)."""
    SIZE: tl.constexpr = D * SLICE
    o1, o2 = first_layer(D, SLICE), second_layer(D, SLICE)
    tl.store(to + o1, narrow(w1, DTYPE))
    tl.store(to + SIZE + o2, narrow(w2, DTYPE))
    tl.store(to + 2 * SIZE + o1, narrow(s1, DTYPE))
    tl.store(to + 3 * SIZE + o2, narrow(s2, DTYPE))


@triton.jit
def keep_state(
    states, checkpoints, anchor, w1, w2, s1, s2, n, j, tile, first_tile, last_tile, all_tiles, anchor_tile,
    D: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, CHECKPOINT_EVERY: tl.constexpr, SAVE: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Write a slice of the state before `tile` to all who want it: the reads of the range, the backward, the next call."""
    SIZE: tl.constexpr = D * SLICE
    if tile < last_tile:
        to = states + at_slice(n, tile - first_tile, j, last_tile - first_tile, SLICES, 4, SIZE)
        store_state(to, w1, w2, s1, s2, D, SLICE, OPERAND)
    if tile == anchor_tile:
        to = anchor + at_slice(n, 0, j, 1, SLICES, 2, SIZE)
        tl.store(to + first_layer(D, SLICE), w1)
        tl.store(to + SIZE + second_layer(D, SLICE), w2)
    if SAVE:
        if tile % CHECKPOINT_EVERY == 0:
            if tile < all_tiles:
                count = (all_tiles - 1) // CHECKPOINT_EVERY
                to = checkpoints + at_slice(n, tile // CHECKPOINT_EVERY - 1, j, count, SLICES, 4, SIZE)
                store_state(to, w1, w2, s1, s2, D, SLICE, tl.float32)


@triton.jit
def kept_share(
    starts, n, tile, H, all_tiles, chunks, TILES_PER_CHUNK: tl.constexpr, STARTS: tl.constexpr
):  # fmt: skip
    """0 where a document starts with `tile`, else 1: what the state before the tile is multiplied by."""
    keep = 1.0
    if STARTS:
        if tile % TILES_PER_CHUNK == 0:
            if tile < all_tiles:
                keep = 1.0 - tl.load(starts + (n // H) * chunks + tile // TILES_PER_CHUNK)
    return keep


@triton.jit(do_not_specialize=COUNTS)
def state_forward(
    k, v, rows, ends, base, gain, bias, starts,
    running, states, slope, checkpoints, anchor, surprise,
    T, H, eps, first_tile, last_tile, all_tiles, chunks, anchor_tile, slices, once,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr,
    TILES_PER_CHUNK: tl.constexpr,
    CHECKPOINT_EVERY: tl.constexpr, NORM: tl.constexpr, BASE: tl.constexpr, GELU: tl.constexpr, STARTS: tl.constexpr,
    SAVE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Walk tiles first_tile <= i < last_tile in order. Reads and leaves `running`; writes `states`, the loss gradient at the
    network's output `slope` [b, t, h, d], every CHECKPOINT_EVERY-th tile's state in fp32 and the anchor of `anchor_tile`.
    Grid (n,): one program a (batch, head) pair; the hidden slices follow each other and the state lives in L2."""
    n = tl.program_id(0)
    h = n % H
    SIZE: tl.constexpr = D * SLICE
    o1, o2 = first_layer(D, SLICE), second_layer(D, SLICE)
    d = tl.arange(0, D)
    i = tl.arange(0, TILE)
    tiles = last_tile - first_tile
    g, b = 0.0, 0.0
    if NORM:
        g, b = tl.load(gain + h * D + d)[None, :], tl.load(bias + h * D + d)[None, :]

    for j in range(slices):
        run = running + at_slice(n, 0, j, 1, SLICES, 4, SIZE)
        to = states + at_slice(n, 0, j, tiles, SLICES, 4, SIZE)
        w1, w2 = tl.load(run + o1), tl.load(run + SIZE + o2)
        store_state(to, w1, w2, tl.load(run + 2 * SIZE + o1), tl.load(run + 3 * SIZE + o2), D, SLICE, OPERAND)
    tl.debug_barrier()

    for tile in range(first_tile, last_tile):
        chunk_start = (tile // TILES_PER_CHUNK) * TILES_PER_CHUNK - first_tile
        at, valid = token_offsets(n, tile, T, H, D, HEAD_DIM, TILE)
        keys = narrow(tl.load(k + at, mask=valid, other=0.0), OPERAND)
        y = tl.zeros([TILE, D], tl.float32)
        for j in range(slices):
            a1, a2 = load_anchor(states, base, n, h, chunk_start, j, tiles, D, SLICE, SLICES, BASE, OPERAND)
            y += dot(narrow(activate(dot(keys, a1, once), GELU), OPERAND), a2, once)
        values = tl.load(v + at, mask=valid, other=0.0).to(tl.float32)
        error, d2 = inner_gradient(y, keys.to(tl.float32), values, g, b, eps, D, HEAD_DIM, NORM)
        tl.store(surprise + n.to(tl.int64) * all_tiles + tile, 0.5 * tl.sum(tl.where(valid, error * error, 0.0)))
        d2b = narrow(d2, OPERAND)
        tl.store(slope + at, d2b, mask=valid)

        row = rows + (n.to(tl.int64) * all_tiles + tile) * (8 * TILE) + i
        end = ends + (n.to(tl.int64) * all_tiles + tile) * 8
        p1, r1 = tl.load(row + 2 * TILE)[:, None], tl.load(row + 3 * TILE)[:, None]
        p2, r2 = tl.load(row + 6 * TILE)[:, None], tl.load(row + 7 * TILE)[:, None]
        beta1, f1, m1 = tl.load(end), tl.load(end + 1), tl.load(end + 2)
        beta2, f2, m2 = tl.load(end + 4), tl.load(end + 5), tl.load(end + 6)
        keep = kept_share(starts, n, tile + 1, H, all_tiles, chunks, TILES_PER_CHUNK, STARTS)
        pd2, rd2 = narrow(p2 * d2, OPERAND), narrow(r2 * d2, OPERAND)
        keys_t = tl.trans(keys)
        for j in range(slices):
            a1, a2 = load_anchor(states, base, n, h, chunk_start, j, tiles, D, SLICE, SLICES, BASE, OPERAND)
            x, bend = activate_with_slope(dot(keys, a1, once), GELU)
            d1 = dot(d2b, tl.trans(a2), once) * bend
            x_t = tl.trans(narrow(x, OPERAND))
            run = running + at_slice(n, 0, j, 1, SLICES, 4, SIZE)
            w, s = tl.load(run + o1), tl.load(run + 2 * SIZE + o1)
            w1 = keep * (beta1 * w + f1 * s - dot(keys_t, narrow(p1 * d1, OPERAND), once))
            s1 = keep * (m1 * s - dot(keys_t, narrow(r1 * d1, OPERAND), once))
            w, s = tl.load(run + SIZE + o2), tl.load(run + 3 * SIZE + o2)
            w2 = keep * (beta2 * w + f2 * s - dot(x_t, pd2, once))
            s2 = keep * (m2 * s - dot(x_t, rd2, once))
            store_state(run, w1, w2, s1, s2, D, SLICE, tl.float32)
            keep_state(
                states, checkpoints, anchor, w1, w2, s1, s2, n, j, tile + 1, first_tile, last_tile, all_tiles, anchor_tile,
                D, SLICE, SLICES, CHECKPOINT_EVERY, SAVE, OPERAND,
            )  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=COUNTS)
def state_forward_resident(
    k, v, rows, ends, base, gain, bias, starts,
    running, states, slope, checkpoints, anchor, surprise,
    T, H, eps, first_tile, last_tile, all_tiles, chunks, anchor_tile, slices, once,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr,
    TILES_PER_CHUNK: tl.constexpr,
    CHECKPOINT_EVERY: tl.constexpr, NORM: tl.constexpr, BASE: tl.constexpr, GELU: tl.constexpr, STARTS: tl.constexpr,
    SAVE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """`state_forward` for a hidden layer of one slice: the state stays in registers from tile to tile."""
    n = tl.program_id(0)
    h = n % H
    o1, o2 = first_layer(D, SLICE), second_layer(D, SLICE)
    SIZE: tl.constexpr = D * SLICE
    d = tl.arange(0, D)
    i = tl.arange(0, TILE)
    g, b = 0.0, 0.0
    if NORM:
        g, b = tl.load(gain + h * D + d)[None, :], tl.load(bias + h * D + d)[None, :]
    run = running + at_slice(n, 0, 0, 1, SLICES, 4, SIZE)
    w1, w2 = tl.load(run + o1), tl.load(run + SIZE + o2)
    s1, s2 = tl.load(run + 2 * SIZE + o1), tl.load(run + 3 * SIZE + o2)
    store_state(states + at_slice(n, 0, 0, last_tile - first_tile, SLICES, 4, SIZE), w1, w2, s1, s2, D, SLICE, OPERAND)
    a1, a2 = narrow(w1, OPERAND), narrow(w2, OPERAND)
    for tile in range(first_tile, last_tile):
        if tile % TILES_PER_CHUNK == 0:
            a1, a2 = narrow(w1, OPERAND), narrow(w2, OPERAND)
            if BASE:
                to = base + h * (2 * SIZE)
                a1 = narrow(a1.to(tl.float32) + tl.load(to + o1).to(tl.float32), OPERAND)
                a2 = narrow(a2.to(tl.float32) + tl.load(to + SIZE + o2).to(tl.float32), OPERAND)
        at, valid = token_offsets(n, tile, T, H, D, HEAD_DIM, TILE)
        keys = narrow(tl.load(k + at, mask=valid, other=0.0), OPERAND)
        x, bend = activate_with_slope(dot(keys, a1, once), GELU)
        xb = narrow(x, OPERAND)
        values = tl.load(v + at, mask=valid, other=0.0).to(tl.float32)
        error, d2 = inner_gradient(dot(xb, a2, once), keys.to(tl.float32), values, g, b, eps, D, HEAD_DIM, NORM)
        tl.store(surprise + n.to(tl.int64) * all_tiles + tile, 0.5 * tl.sum(tl.where(valid, error * error, 0.0)))
        d2b = narrow(d2, OPERAND)
        tl.store(slope + at, d2b, mask=valid)
        d1 = dot(d2b, tl.trans(a2), once) * bend

        row = rows + (n.to(tl.int64) * all_tiles + tile) * (8 * TILE) + i
        end = ends + (n.to(tl.int64) * all_tiles + tile) * 8
        keep = kept_share(starts, n, tile + 1, H, all_tiles, chunks, TILES_PER_CHUNK, STARTS)
        p, r = tl.load(row + 2 * TILE)[:, None], tl.load(row + 3 * TILE)[:, None]
        beta, f, m = tl.load(end), tl.load(end + 1), tl.load(end + 2)
        keys_t = tl.trans(keys)
        w1 = keep * (beta * w1 + f * s1 - dot(keys_t, narrow(p * d1, OPERAND), once))
        s1 = keep * (m * s1 - dot(keys_t, narrow(r * d1, OPERAND), once))
        p, r = tl.load(row + 6 * TILE)[:, None], tl.load(row + 7 * TILE)[:, None]
        beta, f, m = tl.load(end + 4), tl.load(end + 5), tl.load(end + 6)
        x_t = tl.trans(xb)
        w2 = keep * (beta * w2 + f * s2 - dot(x_t, narrow(p * d2, OPERAND), once))
        s2 = keep * (m * s2 - dot(x_t, narrow(r * d2, OPERAND), once))
        keep_state(
            states, checkpoints, anchor, w1, w2, s1, s2, n, 0, tile + 1, first_tile, last_tile, all_tiles, anchor_tile,
            D, SLICE, SLICES, CHECKPOINT_EVERY, SAVE, OPERAND,
        )  # fmt: skip
    store_state(run, w1, w2, s1, s2, D, SLICE, tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def delta_forward(
    k, v, rows, base, gain, bias, running, states, slope, surprise,
    T, H, eps, first_tile, tiles, begin_tile, all_tiles, slices, once,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr,
    NORM: tl.constexpr, BASE: tl.constexpr, GELU: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """What each tile of a chunk adds to the state, all tiles at once, for they share the chunk's anchor (`running`): into
    `states`, in place of the state before the tile, X' (p * D) for W1, W2 and X' (r * D) for S1, S2. Grid (tiles of the chunk,
    n); begin_tile is the chunk's first."""
    n = tl.program_id(1)
    tile = begin_tile + tl.program_id(0)
    h = n % H
    SIZE: tl.constexpr = D * SLICE
    o1, o2 = first_layer(D, SLICE), second_layer(D, SLICE)
    d = tl.arange(0, D)
    g, b = 0.0, 0.0
    if NORM:
        g, b = tl.load(gain + h * D + d)[None, :], tl.load(bias + h * D + d)[None, :]
    at, valid = token_offsets(n, tile, T, H, D, HEAD_DIM, TILE)
    keys = narrow(tl.load(k + at, mask=valid, other=0.0), OPERAND)
    y = tl.zeros([TILE, D], tl.float32)
    for j in range(slices):
        a1, a2 = load_anchor(running, base, n, h, 0, j, 1, D, SLICE, SLICES, BASE, OPERAND)
        y += dot(narrow(activate(dot(keys, a1, once), GELU), OPERAND), a2, once)
    values = tl.load(v + at, mask=valid, other=0.0).to(tl.float32)
    error, d2 = inner_gradient(y, keys.to(tl.float32), values, g, b, eps, D, HEAD_DIM, NORM)
    tl.store(surprise + n.to(tl.int64) * all_tiles + tile, 0.5 * tl.sum(tl.where(valid, error * error, 0.0)))
    d2b = narrow(d2, OPERAND)
    tl.store(slope + at, d2b, mask=valid)
    row = rows + (n.to(tl.int64) * all_tiles + tile) * (8 * TILE) + tl.arange(0, TILE)
    p1, r1 = tl.load(row + 2 * TILE)[:, None], tl.load(row + 3 * TILE)[:, None]
    p2, r2 = tl.load(row + 6 * TILE)[:, None], tl.load(row + 7 * TILE)[:, None]
    keys_t = tl.trans(keys)
    for j in range(slices):
        a1, a2 = load_anchor(running, base, n, h, 0, j, 1, D, SLICE, SLICES, BASE, OPERAND)
        x, bend = activate_with_slope(dot(keys, a1, once), GELU)
        d1 = dot(d2b, tl.trans(a2), once) * bend
        x_t = tl.trans(narrow(x, OPERAND))
        to = states + at_slice(n, tile - first_tile, j, tiles, SLICES, 4, SIZE)
        tl.store(to + o1, narrow(dot(keys_t, narrow(p1 * d1, OPERAND), once), OPERAND))
        tl.store(to + SIZE + o2, narrow(dot(x_t, narrow(p2 * d2, OPERAND), once), OPERAND))
        tl.store(to + 2 * SIZE + o1, narrow(dot(keys_t, narrow(r1 * d1, OPERAND), once), OPERAND))
        tl.store(to + 3 * SIZE + o2, narrow(dot(x_t, narrow(r2 * d2, OPERAND), once), OPERAND))


@triton.jit(do_not_specialize=COUNTS)
def chunk_forward(
    ends, starts, running, states, checkpoints, anchor,
    H, first_tile, tiles, begin_tile, rounds, all_tiles, chunks, anchor_tile,
    SIZE: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr, TILES_PER_CHUNK: tl.constexpr,
    CHECKPOINT_EVERY: tl.constexpr, STARTS: tl.constexpr, SAVE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """The scan over a chunk's tiles: `running` takes in what `delta_forward` left in `states`, and the state before each tile
    takes its place. Grid (n, SLICES * SIZE / BLOCK, 2), element by element."""
    n, layer = tl.program_id(0), tl.program_id(2)
    blocks: tl.constexpr = SIZE // BLOCK
    j = tl.program_id(1) // blocks
    e = layer * SIZE + (tl.program_id(1) % blocks) * BLOCK + tl.arange(0, BLOCK)
    run = running + at_slice(n, 0, j, 1, SLICES, 4, SIZE) + e
    w, s = tl.load(run), tl.load(run + 2 * SIZE)
    for tile in range(begin_tile, begin_tile + rounds):
        at = states + at_slice(n, tile - first_tile, j, tiles, SLICES, 4, SIZE) + e
        by_w, by_s = tl.load(at).to(tl.float32), tl.load(at + 2 * SIZE).to(tl.float32)
        tl.store(at, narrow(w, OPERAND))
        tl.store(at + 2 * SIZE, narrow(s, OPERAND))
        end = ends + ((n.to(tl.int64) * all_tiles + tile) * 2 + layer) * 4
        keep = kept_share(starts, n, tile + 1, H, all_tiles, chunks, TILES_PER_CHUNK, STARTS)
        w = keep * (tl.load(end) * w + tl.load(end + 1) * s - by_w)
        s = keep * (tl.load(end + 2) * s - by_s)
        if tile + 1 == anchor_tile:
            tl.store(anchor + at_slice(n, 0, j, 1, SLICES, 2, SIZE) + e, w)
        if SAVE:
            if (tile + 1) % CHECKPOINT_EVERY == 0:
                if tile + 1 < all_tiles:
                    count = (all_tiles - 1) // CHECKPOINT_EVERY
                    to = checkpoints + at_slice(n, tile // CHECKPOINT_EVERY, j, count, SLICES, 4, SIZE) + e
                    tl.store(to, w)
                    tl.store(to + 2 * SIZE, s)
    tl.store(run, w)
    tl.store(run + 2 * SIZE, s)


@triton.jit(do_not_specialize=COUNTS)
def output_forward(
    q, k, log_gamma, log_eta, theta, rows, base, gain, bias, states, slope, out,
    T, H, eps, first_tile, tiles, all_tiles, slices, once,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr,
    TILES_PER_CHUNK: tl.constexpr,
    NORM: tl.constexpr, BASE: tl.constexpr, GELU: tl.constexpr, FORGET: tl.constexpr, MOMENTUM: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """out [b, t, h, d]: every token's read, its own update included. Grid (tiles of the range, n)."""
    local, n = tl.program_id(0), tl.program_id(1)
    tile = first_tile + local
    h = n % H
    SIZE: tl.constexpr = D * SLICE
    o1, o2 = first_layer(D, SLICE), second_layer(D, SLICE)
    chunk_start = (tile // TILES_PER_CHUNK) * TILES_PER_CHUNK - first_tile
    at, valid = token_offsets(n, tile, T, H, D, HEAD_DIM, TILE)
    queries = narrow(tl.load(q + at, mask=valid, other=0.0), OPERAND)
    keys = narrow(tl.load(k + at, mask=valid, other=0.0), OPERAND)
    d2b = tl.load(slope + at, mask=valid, other=0.0)
    go, gv = gate_offsets(n, tile, 0, T, H, TILE)
    lg, le, th = load_gates(log_gamma, log_eta, theta, go, gv, FORGET, MOMENTUM)
    within = narrow(reach(lg, le, th, once, TILE, OPERAND) * dot(queries, tl.trans(keys), once), OPERAND)
    row = rows + (n.to(tl.int64) * all_tiles + tile) * (8 * TILE) + tl.arange(0, TILE)
    beta1, f1 = tl.load(row)[:, None], tl.load(row + TILE)[:, None]
    beta2, f2 = tl.load(row + 4 * TILE)[:, None], tl.load(row + 5 * TILE)[:, None]
    y = tl.zeros([TILE, D], tl.float32)
    overlap = tl.zeros([TILE, TILE], tl.float32)  # Zbar Z'
    for j in range(slices):
        a1, a2 = load_anchor(states, base, n, h, chunk_start, j, tiles, D, SLICE, SLICES, BASE, OPERAND)
        x, bend = activate_with_slope(dot(keys, a1, once), GELU)
        d1 = narrow(dot(d2b, tl.trans(a2), once) * bend, OPERAND)
        weights = states + at_slice(n, local, j, tiles, SLICES, 4, SIZE)
        b = base + (h * SLICES + j) * (2 * SIZE)
        z = beta1 * dot(queries, tl.load(weights + o1), once) - dot(within, d1, once)
        z += f1 * dot(queries, tl.load(weights + 2 * SIZE + o1), once)
        if BASE:
            z += dot(queries, tl.load(b + o1), once)
        zb = narrow(activate(z, GELU), OPERAND)
        overlap += dot(zb, tl.trans(narrow(x, OPERAND)), once)
        y += beta2 * dot(zb, tl.load(weights + SIZE + o2), once)
        y += f2 * dot(zb, tl.load(weights + 3 * SIZE + o2), once)
        if BASE:
            y += dot(zb, tl.load(b + SIZE + o2), once)
    lg, le, th = load_gates(log_gamma, log_eta, theta, go + 1, gv, FORGET, MOMENTUM)
    y -= dot(narrow(reach(lg, le, th, once, TILE, OPERAND) * overlap, OPERAND), d2b, once)
    if NORM:
        d = tl.arange(0, D)
        normalized, _ = normalize(y, eps, D, HEAD_DIM)
        y = (
            queries.to(tl.float32)
            + normalized * tl.load(gain + h * D + d)[None, :]
            + tl.load(bias + h * D + d)[None, :]
        )
    tl.store(out + at, narrow(y, out.dtype.element_ty), mask=valid)
