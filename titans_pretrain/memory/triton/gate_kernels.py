"""Kernels of the gates: what a tile's gates weigh at its end, and the gradient of the log gates and step sizes."""

from __future__ import annotations

import triton
import triton.language as tl

from titans_pretrain.memory.triton.parts import (
    COUNTS,
    MIN_LOG_GATE,
    dot,
    gate_offsets,
    gate_products,
    halves,
    load_gates,
    narrow,
    reach,
)


@triton.jit(do_not_specialize=COUNTS)
def gate_rows(
    log_gamma, log_eta, theta, rows, ends,
    T, H, tiles,
    TILE: tl.constexpr, FORGET: tl.constexpr, MOMENTUM: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Per tile and layer, into rows [n, tiles, 2, 4, TILE]: beta, f, p, r; into ends [n, tiles, 2, 4]: beta, f, m after the
    last token. Grid (tiles, n, 2)."""
    tile, n, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, TILE)
    offsets, valid = gate_offsets(n, tile, 0, T, H, TILE)
    lg, le, th = load_gates(log_gamma, log_eta, theta, offsets + layer, valid, FORGET, MOMENTUM)
    beta, m = tl.exp(tl.cumsum(lg, 0)), tl.exp(tl.cumsum(le, 0))
    f = tl.sum(gate_products(lg, TILE) * m[None, :], 1)
    last = i == tl.minimum(TILE, T - tile * TILE) - 1
    p = tl.sum(tl.where(last[:, None], reach(lg, le, th, 1, TILE, OPERAND), 0.0), 0)
    r = tl.sum(tl.where(last[:, None], gate_products(le, TILE), 0.0), 0) * th
    at = (n.to(tl.int64) * tiles + tile) * 2 + layer
    row = rows + at * (4 * TILE) + i
    tl.store(row, beta)
    tl.store(row + TILE, f)
    tl.store(row + 2 * TILE, p)
    tl.store(row + 3 * TILE, r)
    tl.store(ends + at * 4, tl.sum(tl.where(last, beta, 0.0), 0))
    tl.store(ends + at * 4 + 1, tl.sum(tl.where(last, f, 0.0), 0))
    tl.store(ends + at * 4 + 2, tl.sum(tl.where(last, m, 0.0), 0))


@triton.jit(do_not_specialize=COUNTS)
def gates_backward(
    log_gamma, log_eta, theta, reach_grad, rows_grad, ends_grad,
    log_gamma_grad, log_eta_grad, theta_grad,
    T, H, first_tile, tiles,
    TILE: tl.constexpr, FORGET: tl.constexpr, MOMENTUM: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """From the gradients of P [n, tiles, 2, TILE, TILE], of (beta, f, p, r) [n, tiles, 2, 4, TILE] and of their ends
    [n, tiles, 2, 4], those of the gates [b, t, h, 2]. Grid (tiles, n, 2); tile `first_tile + i` is entry i."""
    local, n, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile = first_tile + local
    i = tl.arange(0, TILE)
    causal = i[:, None] >= i[None, :]
    offsets, valid = gate_offsets(n, tile, 0, T, H, TILE)
    lg, le, th = load_gates(log_gamma, log_eta, theta, offsets + layer, valid, FORGET, MOMENTUM)
    beta, m = tl.exp(tl.cumsum(lg, 0)), tl.exp(tl.cumsum(le, 0))
    G, E = gate_products(lg, TILE), gate_products(le, TILE)
    last = i == tl.minimum(TILE, T - tile * TILE) - 1

    at = (n.to(tl.int64) * tiles + local) * 2 + layer
    row, end = rows_grad + at * (4 * TILE) + i, ends_grad + at * 4
    d_beta = tl.load(row) + tl.where(last, tl.load(end), 0.0)
    d_f = tl.load(row + TILE) + tl.where(last, tl.load(end + 1), 0.0)
    d_p, d_r = tl.load(row + 2 * TILE), tl.load(row + 3 * TILE)
    d_P = tl.load(reach_grad + at * (TILE * TILE) + i[:, None] * TILE + i[None, :]).to(tl.float32)
    d_P += tl.where(last[:, None], d_p[None, :], 0.0)

    c = dot(narrow(G, OPERAND), narrow(E, OPERAND), 1)
    d_c, d_c_low = halves(d_P * th[None, :], OPERAND)
    d_theta = tl.sum(d_P * c, 0) + d_r * tl.sum(tl.where(last[:, None], E, 0.0), 0)
    tl.store(theta_grad + offsets + layer, d_theta, mask=valid)
    if FORGET:
        e_t = narrow(tl.trans(E), OPERAND)
        flow = dot(d_c, e_t, 1) + dot(d_c_low, e_t, 1) + d_f[:, None] * m[None, :]
        flow = tl.where(causal, flow, 0.0) * G
        each = tl.sum(flow, 1) - tl.sum(flow, 0) + d_beta * beta
        d_lg = tl.sum(tl.where(causal, each[:, None], 0.0), 0)
        clamped = tl.load(log_gamma + offsets + layer, mask=valid, other=0.0) < MIN_LOG_GATE
        tl.store(log_gamma_grad + offsets + layer, tl.where(clamped, 0.0, d_lg), mask=valid)
    if MOMENTUM:
        d_E = dot(narrow(tl.trans(G), OPERAND), d_c, 1) + tl.where(last[:, None], (d_r * th)[None, :], 0.0)
        d_m = tl.sum(G * d_f[:, None], 0) + tl.where(last, tl.load(end + 2), 0.0)
        flow = tl.where(causal, d_E, 0.0) * E
        each = tl.sum(flow, 1) - tl.sum(flow, 0) + d_m * m
        d_le = tl.sum(tl.where(causal, each[:, None], 0.0), 0)
        clamped = tl.load(log_eta + offsets + layer, mask=valid, other=0.0) < MIN_LOG_GATE
        tl.store(log_eta_grad + offsets + layer, tl.where(clamped, 0.0, d_le), mask=valid)
