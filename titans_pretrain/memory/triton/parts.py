"""Pieces shared by the kernels: products, the nonlinearity, layer norm, gate matrices, and where things lie in memory.

A tile is TILE consecutive tokens of one (batch, head) pair; inside a kernel its matrices are [TILE, channels] in fp32, rounded
to the operand type (bf16 on a GPU) only where they enter a product. The hidden layer is worked off in slices of SLICE channels.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

COUNTS = [
    *("T", "H", "first_tile", "last_tile", "begin_tile", "end_tile", "anchor_tile"),
    *("tiles", "all_tiles", "chunks", "rounds", "slices", "once"),
]
"""Arguments that the compiler must not know more of than that they are integers. Else it would compile all kernels anew for a
sequence of one tile, or of a multiple of 16 of them, and gain nothing: what is a multiple of what comes from the constants.
And of trip counts that are 1 (`slices`, `once`) it would make no loops, but loops keep values that are needed at different
times from being alive at one time, and see `dot`."""

MIN_LOG_GATE = tl.constexpr(-100.0)
"""As in memory/gates.py."""


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # the interpreter cuts the low bits off
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(DTYPE)


@triton.jit
def halves(x, DTYPE: tl.constexpr):
    """x as a sum of two numbers in DTYPE: 16 bits of mantissa where bf16 has 8."""
    high = narrow(x, DTYPE)
    return high, narrow(x - high.to(tl.float32), DTYPE)


@triton.jit
def dot(a, b, once):
    """a @ b with fp32 sums; both must already be of the operand type.

    `once` is 1, but an argument the compiler does not know: a loop around the product hides from it that one product feeds the
    next. In a chain it would lay all warps along the rows, and eight warps would hold and compute a 64-row tile twice over.
    """
    out = tl.zeros([a.shape[0], b.shape[1]], tl.float32)
    for _ in range(once):
        if INTERPRETED:  # the interpreter would multiply the bit patterns of bf16
            out += tl.dot(a.to(tl.float32), b.to(tl.float32))
        else:
            out = tl.dot(a, b, out, input_precision="ieee")
    return out


@triton.jit
def activate(x, GELU: tl.constexpr):
    """act(x)"""
    if GELU:
        return x * (0.5 * tl.erf(x * 0.7071067811865476) + 0.5)
    else:
        return x * tl.sigmoid(x)


@triton.jit
def activate_with_slope(x, GELU: tl.constexpr):
    """act(x), act'(x)"""
    if GELU:
        cumulative = 0.5 * tl.erf(x * 0.7071067811865476) + 0.5
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        return x * cumulative, cumulative + x * density
    else:
        sigmoid = tl.sigmoid(x)
        return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def activate_with_curvature(x, GELU: tl.constexpr):
    """act(x), act'(x), act''(x)"""
    if GELU:
        cumulative = 0.5 * tl.erf(x * 0.7071067811865476) + 0.5
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        return x * cumulative, cumulative + x * density, density * (2.0 - x * x)
    else:
        sigmoid = tl.sigmoid(x)
        falling = sigmoid * (1.0 - sigmoid)
        return x * sigmoid, sigmoid + x * falling, falling * (2.0 + x * (1.0 - 2.0 * sigmoid))


@triton.jit
def channels(D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[1, D]: which channels exist. A head narrower than a power of two is padded with zeros."""
    return (tl.arange(0, D) < HEAD_DIM)[None, :]


@triton.jit
def normalize(x, eps, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows of x with mean 0 and variance 1, and 1 / their standard deviations [TILE, 1]."""
    centred = tl.where(channels(D, HEAD_DIM), x - (tl.sum(x, 1) / HEAD_DIM)[:, None], 0.0)
    inverse_std = tl.rsqrt(tl.sum(centred * centred, 1) / HEAD_DIM + eps)[:, None]
    return centred * inverse_std, inverse_std


@triton.jit
def through_norm(grad, normalized, inverse_std, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The gradient with respect to x of `normalize(x)`, from that of its first result. The map is its own transpose."""
    mean = (tl.sum(grad, 1) / HEAD_DIM)[:, None]
    along = (tl.sum(grad * normalized, 1) / HEAD_DIM)[:, None]
    return tl.where(channels(D, HEAD_DIM), inverse_std * (grad - mean - normalized * along), 0.0)


@triton.jit
def gate_products(log_gate, TILE: tl.constexpr):
    """[t, i] = prod_{i<r<=t} gate_r for i <= t, else 0. The mask comes before exp: above the diagonal exp overflows."""
    i = tl.arange(0, TILE)
    sums = tl.cumsum(log_gate, 0)
    return tl.exp(tl.where(i[:, None] >= i[None, :], sums[:, None] - sums[None, :], float("-inf")))


@triton.jit
def load_log_gate(gate, PRESENT: tl.constexpr, absent, offsets, valid):
    """One log gate of a tile's tokens; `absent` where the gate is switched off; 0 past the end of the sequence."""
    if PRESENT:
        return tl.maximum(tl.load(gate + offsets, mask=valid, other=0.0), MIN_LOG_GATE)
    else:
        return tl.where(valid, absent, 0.0)


@triton.jit
def load_gates(log_gamma, log_eta, theta, offsets, valid, FORGET: tl.constexpr, MOMENTUM: tl.constexpr):
    """log gamma, log eta, theta of a tile's tokens [TILE]. Without momentum eta is 0; past the end theta is."""
    return (
        load_log_gate(log_gamma, FORGET, 0.0, offsets, valid),
        load_log_gate(log_eta, MOMENTUM, MIN_LOG_GATE, offsets, valid),
        tl.load(theta + offsets, mask=valid, other=0.0),
    )


@triton.jit
def reach(log_gamma, log_eta, theta, once, TILE: tl.constexpr, OPERAND: tl.constexpr):
    """P = G E diag(theta) [TILE, TILE] of a tile (memory/gates.py)."""
    g = narrow(gate_products(log_gamma, TILE), OPERAND)
    e = narrow(gate_products(log_eta, TILE), OPERAND)
    return dot(g, e, once) * theta[None, :]


@triton.jit
def gate_offsets(n, tile, layer: tl.constexpr, T, H, TILE: tl.constexpr):
    """Where the gates [b, t, h, 2] of a tile's tokens lie, and which of the tokens exist."""
    t = tile * TILE + tl.arange(0, TILE)
    return (((n // H) * T + t) * H + n % H) * 2 + layer, t < T


@triton.jit
def token_offsets(n, tile, T, H, D: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr):
    """Where a tile of [b, t, h, d] lies, and which of its elements exist, both [TILE, D]."""
    t = tile * TILE + tl.arange(0, TILE)
    rows = ((n // H).to(tl.int64) * T + t) * H + n % H
    return rows[:, None] * HEAD_DIM + tl.arange(0, D)[None, :], (t < T)[:, None] & channels(D, HEAD_DIM)


@triton.jit
def first_layer(D: tl.constexpr, SLICE: tl.constexpr):
    """Offsets of a slice [D, SLICE] of the first layer's matrix."""
    return tl.arange(0, D)[:, None] * SLICE + tl.arange(0, SLICE)[None, :]


@triton.jit
def second_layer(D: tl.constexpr, SLICE: tl.constexpr):
    """Offsets of a slice [SLICE, D] of the second layer's matrix."""
    return tl.arange(0, SLICE)[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def at_slice(n, tile, slice_index, tiles, SLICES: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """Start of a slice in an array [n, tiles, SLICES, PARTS, SIZE]."""
    return ((n.to(tl.int64) * tiles + tile) * SLICES + slice_index) * (PARTS * SIZE)
