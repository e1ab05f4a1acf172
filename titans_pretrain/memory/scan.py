"""The door to the memory: check the arguments, choose the implementation, run the sequence through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from titans_pretrain.errors import UserError
from titans_pretrain.memory import operator, triton
from titans_pretrain.memory.path import ScanInputs, ScanResult
from titans_pretrain.memory.reference import scan_reference
from titans_pretrain.memory.state import MemoryOptions, MemoryState, initial_state

PATHS = (*operator.PATHS, "reference")
SHORTEST = 16
"""Fewest tokens for which "auto" takes triton: its smallest tile."""
DEFAULT_OPTIONS = MemoryOptions()


def choose_path(path: str, inputs: ScanInputs, offset: int, options: MemoryOptions) -> str:
    """The implementation that "auto" stands for, or `path` itself where it can run.

    "auto" is triton for half-precision q, k, v on CUDA where the kernels take the shapes and options and there are at least
    SHORTEST tokens (decoding is not worth ten launches), else closed_form.
    Triton is asked about offset 0 always: `_scan_from_mid_chunk` brings it to the start of a chunk.

    Raises:
        UserError: there is no such path, or it cannot run these arguments.
    """
    if path == "auto":
        half = inputs.q.device.type == "cuda" and inputs.q.dtype in (torch.bfloat16, torch.float16)
        fit = half and inputs.q.shape[1] >= SHORTEST and operator.PATHS["triton"].why_not(inputs, 0, options) is None
        return "triton" if fit else "closed_form"
    if path not in PATHS:
        raise UserError(f"memory path {path!r} does not exist; choose one of auto, {', '.join(PATHS)}")
    if path == "reference":
        return path
    reason = operator.PATHS[path].why_not(inputs, 0 if path == "triton" else offset, options)
    if reason is not None:
        raise UserError(f"memory path {path!r} {reason}; choose auto, which takes closed_form where triton cannot run")
    return path


def expected_path(
    device: torch.device,
    dtype: torch.dtype,
    depth: int,
    head_dim: int,
    hidden: int,
    options: MemoryOptions,
    resets: tuple[bool, bool] | None = None,
) -> str:
    """What "auto" will choose for a model of these shapes in training, in words: with the reason where a GPU is there and
    its kernels cannot be used. `resets`: documents begin inside rows; (with a fresh state, with forgetting)."""
    reason = triton.why_not_model(device, dtype, depth, head_dim, hidden, options)
    if reason is None and resets is not None:
        reason = triton.why_not_resets(*resets, options)
    if device.type != "cuda":
        return "closed_form"
    return "triton" if reason is None else f"closed_form, many times slower, because triton {reason}"


@overload
def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor | None,
    log_eta: Tensor | None,
    theta: Tensor,
    initial_weights: Sequence[Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    state: MemoryState | None = None,
    options: MemoryOptions = DEFAULT_OPTIONS,
    *,
    document_starts: Tensor | None = None,
    fresh: MemoryState | None = None,
    path: str = "auto",
    return_signals: Literal[False] = False,
) -> tuple[Tensor, MemoryState]: ...


@overload
def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor | None,
    log_eta: Tensor | None,
    theta: Tensor,
    initial_weights: Sequence[Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    state: MemoryState | None = None,
    options: MemoryOptions = DEFAULT_OPTIONS,
    *,
    document_starts: Tensor | None = None,
    fresh: MemoryState | None = None,
    path: str = "auto",
    return_signals: Literal[True],
) -> tuple[Tensor, MemoryState, dict[str, Tensor]]: ...


def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor | None,
    log_eta: Tensor | None,
    theta: Tensor,
    initial_weights: Sequence[Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    state: MemoryState | None = None,
    options: MemoryOptions = DEFAULT_OPTIONS,
    *,
    document_starts: Tensor | None = None,
    fresh: MemoryState | None = None,
    path: str = "auto",
    return_signals: bool = False,
) -> tuple[Tensor, MemoryState] | tuple[Tensor, MemoryState, dict[str, Tensor]]:
    """Write keys and values into the memory token by token and read it at every token's query, its own update included.

    S_t = eta_t S_{t-1} - theta_t grad_t,  W_t = gamma_t W_{t-1} + S_t  (+ (1 - gamma_t) W_init where forgetting is toward
    init), grad_t that of 0.5 * ||M(k_t) - v_t||^2 at the weights of the start of t's chunk; per head and memory layer.
    Source: arXiv 2501.00663, section 3.1 and 3.2. Two calls with the state carried equal one call, wherever the cut is.

    Args:
        q, k, v: [b, t, h, d], t >= 1, any float dtype.
        log_gamma: log(1 - alpha) <= 0, [b, t, h, l] for l memory layers; None: no forgetting.
        log_eta: <= 0, [b, t, h, l]; None: no momentum.
        theta: the step size >= 0, [b, t, h, l].
        initial_weights: l tensors [h, in, out], in of the first and out of the last being d.
        norm_weight, norm_bias: [h, d]: M(k) = k + LN(net(k)); both None: M(k) = net(k).
        state: where to go on; None: W = initial_weights, S = 0, at the start of a chunk. Rows that stand at different
            offsets (state.row_offsets) go on by one token, t = 1.
        options: the variant of the rule.
        document_starts: bool [b, chunks], for each chunk that begins inside the call: before its first token the memory is
            in that row what it is before a document; None: nowhere.
        fresh: the memory before a document, of one row at the start of a chunk: b = 1, offset 0; None: W =
            initial_weights, S = 0. Without document_starts it has no effect.
        path: "auto", or to force one: "triton" (CUDA kernels), "closed_form", "reference" (slow: one autograd call a token).
        return_signals: also return detached fp32 scalars: "surprise", the mean over tokens and heads of the loss;
            "state_norm" and "momentum_norm", how far W has moved from the initial weights at the end, and the size of S there,
            as means over rows and heads.
    Returns: M_{W_t}(q_t) [b, t, h, d] in q's dtype; the state after the last token; the signals if asked for. All is
        computed in fp32, in float64 where q, k, v or the initial weights are; differentiable in every tensor.

    Raises:
        UserError: there is no such path, or it cannot run these arguments.
        ValueError: shapes that do not fit together.
    """
    _check_shapes(q, k, v, log_gamma, log_eta, theta, initial_weights, norm_weight, norm_bias, state, options)
    offset = 0 if state is None else state.offset
    row_offsets = None if state is None else state.row_offsets
    if row_offsets is not None:
        _check_row_offsets(row_offsets, q, document_starts)
        # Somewhere inside a chunk: every row has its anchor, and chunks are closed below.
        offset = min(1, options.chunk_size - 1)
    _check_document_starts(document_starts, q, offset, options)
    _check_fresh(fresh, initial_weights)
    dtype = scan_dtype(q, k, v, initial_weights)

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    start = tuple(w.to(dtype) for w in initial_weights)
    if state is None:
        state = initial_state(start, q.shape[0])
    weights, momentum, anchor = (tuple(x.to(dtype) for x in field) for field in state[:3])
    anew = fresh[:2] if fresh is not None and document_starts is not None else ((), ())
    fresh_weights, fresh_momentum = (tuple(x[0].to(dtype) for x in field) for field in anew)
    inputs = ScanInputs(
        q, k, v, wide(log_gamma), wide(log_eta), theta.to(dtype), start, wide(norm_weight), wide(norm_bias),
        weights, momentum, anchor if offset else (), fresh_weights, fresh_momentum, document_starts,
    )  # fmt: skip
    path = choose_path(path, inputs, offset, options)
    if path == "triton" and offset:
        result = _scan_from_mid_chunk(path, inputs, offset, options, return_signals)
    else:
        result = _run(path, inputs, offset, options, return_signals)
    offset = (offset + q.shape[1]) % options.chunk_size
    after = MemoryState(
        result.weights, result.momentum, result.anchor or (anchor if offset else result.weights), offset
    )
    if row_offsets is not None:
        after = _close_chunks(after, anchor, (row_offsets + 1) % options.chunk_size)
    if return_signals:
        surprise = (result.surprise / q[..., 0].numel()).float()
        return result.out, after, {"surprise": surprise, **_norms(after, start)}
    return result.out, after


def scan_dtype(q: Tensor, k: Tensor, v: Tensor, initial_weights: Sequence[Tensor]) -> torch.dtype:
    """What a scan of these computes in, and its state is in."""
    return torch.float64 if torch.float64 in (x.dtype for x in (q, k, v, *initial_weights)) else torch.float32


@torch.no_grad()
def _norms(state: MemoryState, initial_weights: Sequence[Tensor]) -> dict[str, Tensor]:
    moved = [w - w0 for w, w0 in zip(state.weights, initial_weights, strict=True)]
    norms = {}
    for name, tensors in (("state_norm", moved), ("momentum_norm", state.momentum)):
        squares = torch.stack([x.square().sum((-2, -1)) for x in tensors])
        norms[name] = squares.sum(0).sqrt().mean().float()
    return norms


def _run(path: str, inputs: ScanInputs, offset: int, options: MemoryOptions, want_surprise: bool) -> ScanResult:
    if path != "reference":
        return operator.scan(path, inputs, offset, options, want_surprise)
    with torch.autocast(inputs.q.device.type, enabled=False):
        return scan_reference(inputs, offset, options)


def _scan_from_mid_chunk(
    path: str, inputs: ScanInputs, offset: int, options: MemoryOptions, want_surprise: bool
) -> ScanResult:
    """`path` knows only scans from the start of a chunk: the closed form ends the open one first."""
    first = options.chunk_size - offset
    begun = _tokens(inputs, 0, first)._replace(fresh_weights=(), fresh_momentum=(), document_starts=None)
    opening = _run("closed_form", begun, offset, options, want_surprise)
    if inputs.q.shape[1] <= first:
        return opening
    rest = _tokens(inputs, first, None)
    rest = rest._replace(weights=opening.weights, momentum=opening.momentum, anchor=())
    result = _run(path, rest, 0, options, want_surprise)
    return result._replace(out=torch.cat((opening.out, result.out), dim=1), surprise=opening.surprise + result.surprise)


def _tokens(inputs: ScanInputs, start: int, stop: int | None) -> ScanInputs:
    return ScanInputs._make((*(None if x is None else x[:, start:stop] for x in inputs[:6]), *inputs[6:]))


def _close_chunks(after: MemoryState, anchor: tuple[Tensor, ...], row_offsets: Tensor) -> MemoryState:
    """The state after one token of rows at `row_offsets`: those at 0 have closed their chunk, the others keep `anchor`."""
    closed = (row_offsets == 0)[:, None, None, None]
    kept = tuple(torch.where(closed, w, a) for w, a in zip(after.weights, anchor, strict=True))
    return MemoryState(after.weights, after.momentum, kept, 0, row_offsets)


def _check_row_offsets(row_offsets: Tensor, q: Tensor, document_starts: Tensor | None) -> None:
    if row_offsets.shape != q.shape[:1] or row_offsets.dtype != torch.int64:
        raise ValueError(
            f"state.row_offsets must be int64 [b] = [{q.shape[0]}], not {row_offsets.dtype} {_shape(row_offsets)}"
        )
    if q.shape[1] != 1 or document_starts is not None:
        raise ValueError(
            f"rows at different offsets go on by one token and without document_starts, not by {q.shape[1]}"
        )


def _check_document_starts(starts: Tensor | None, q: Tensor, offset: int, options: MemoryOptions) -> None:
    if starts is None:
        return
    chunk = options.chunk_size
    begun = -(-max(0, q.shape[1] - (chunk - offset) % chunk) // chunk)
    if starts.dtype != torch.bool or starts.shape != (q.shape[0], begun):
        raise ValueError(
            f"document_starts must be bool [b, chunks] = {[q.shape[0], begun]}, for {begun} chunks of {chunk} begin inside "
            f"{q.shape[1]} tokens that start {offset} into one, not {starts.dtype} {_shape(starts)}"
        )


def _check_fresh(fresh: MemoryState | None, initial_weights: Sequence[Tensor]) -> None:
    if fresh is None:
        return
    expected = [(1, *w.shape) for w in initial_weights]
    for name in ("weights", "momentum"):
        found = [tuple(x.shape) for x in getattr(fresh, name)]
        if found != expected:
            raise ValueError(f"fresh.{name} must be {expected}, one row for the initial weights, not {found}")
    if fresh.offset:
        raise ValueError(f"fresh must stand at the start of a chunk, not {fresh.offset} tokens into one")


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor | None,
    log_eta: Tensor | None,
    theta: Tensor,
    initial_weights: Sequence[Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    state: MemoryState | None,
    options: MemoryOptions,
) -> None:
    if q.dim() != 4 or q.shape[1] < 1 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"q, k, v must be of one shape [b, t, h, d] with t >= 1, not {_shape(q)}, {_shape(k)}, {_shape(v)}"
        )
    batch, length, heads, width = q.shape
    depth = len(initial_weights)
    for name, gate in (("log_gamma", log_gamma), ("log_eta", log_eta), ("theta", theta)):
        if gate is not None and gate.shape != (batch, length, heads, depth):
            raise ValueError(
                f"{name} must be [b, t, h, l] = {[batch, length, heads, depth]} for q {_shape(q)} and {depth} memory "
                f"layers, not {_shape(gate)}"
            )
    shapes = [tuple(w.shape) for w in initial_weights]
    joined = [width, *(s[-1] for s in shapes)]
    if not shapes or joined[-1] != width or any(s != (heads, joined[i], joined[i + 1]) for i, s in enumerate(shapes)):
        raise ValueError(f"initial_weights must chain [h, in, out] from d to d for q {_shape(q)}, not {shapes}")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias must be given together, or both be None")
    for name, x in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if x is not None and x.shape != (heads, width):
            raise ValueError(f"{name} must be [h, d] = {[heads, width]} for q {_shape(q)}, not {_shape(x)}")
    if state is None:
        return
    if not 0 <= state.offset < options.chunk_size:
        raise ValueError(f"state.offset {state.offset} is not inside a chunk of {options.chunk_size} tokens")
    expected = [(batch, *s) for s in shapes]
    for name in ("weights", "momentum", "anchor"):
        found = [tuple(x.shape) for x in getattr(state, name)]
        if found != expected:
            raise ValueError(f"state.{name} must be {expected} for q {_shape(q)} and the initial weights, not {found}")


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
