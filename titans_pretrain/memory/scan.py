"""The door to the memory: check the arguments, choose the implementation, run the sequence through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from titans_pretrain.errors import UserError
from titans_pretrain.memory import closed_form
from titans_pretrain.memory.path import ResultGradients, ScanInputs
from titans_pretrain.memory.reference import scan_reference
from titans_pretrain.memory.state import MemoryOptions, MemoryState, initial_state


class _ClosedForm(torch.autograd.Function):
    """closed_form.py below autograd."""

    @staticmethod
    def forward(ctx: Any, offset: int, options: MemoryOptions, depth: int, surprise: bool, *flat: Any) -> Any:
        inputs = _unflatten(flat, depth, offset)
        save = any(ctx.needs_input_grad)
        found = closed_form.forward(inputs, offset, options, surprise, save)
        ctx.save_for_backward(*flat, *found.saved)
        ctx.others = (offset, options, depth, len(flat), len(found.anchor))
        ctx.mark_non_differentiable(found.surprise)
        return found.out, *found.weights, *found.momentum, *found.anchor, found.surprise

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        offset, options, depth, count, _ = ctx.others
        tensors = ctx.saved_tensors
        flat, saved = tensors[:count], tensors[count:]
        inputs = _unflatten(flat, depth, offset)
        given = ResultGradients(
            grads[0], grads[1 : depth + 1], grads[depth + 1 : 2 * depth + 1], grads[2 * depth + 1 : -1]
        )
        found = closed_form.backward(inputs, offset, options, saved, given)
        flat_grads = (*found[:6], *found[7:9], *found.initial_weights, *found[9], *found[10], *found[11])
        return None, None, None, None, *flat_grads


def _unflatten(flat: Any, depth: int, offset: int) -> ScanInputs:
    lists = [tuple(flat[8 + i * depth : 8 + (i + 1) * depth]) for i in range(4 if offset else 3)]
    q, k, v, log_gamma, log_eta, theta, gain, bias = flat[:8]
    anchor = lists[3] if offset else ()
    return ScanInputs(q, k, v, log_gamma, log_eta, theta, lists[0], gain, bias, lists[1], lists[2], anchor, None)


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
    depth, offset = len(initial_weights), state.offset
    flat = (q, k, v, log_gamma, log_eta, theta, norm_weight, norm_bias, *initial_weights, *state.weights)
    flat = (*flat, *state.momentum, *(state.anchor if offset else ()))
    out, *rest = _ClosedForm.apply(offset, options, depth, want_surprise, *flat)
    weights, momentum, anchor = tuple(rest[:depth]), tuple(rest[depth : 2 * depth]), tuple(rest[2 * depth : -1])
    after = (offset + q.shape[1]) % options.chunk_size
    if not after:
        anchor = weights
    elif not anchor:
        anchor = state.anchor
    return out, MemoryState(weights, momentum, anchor, after), rest[-1] if want_surprise else None


PATHS = {"closed_form": scan_closed_form, "reference": scan_reference}
DEFAULT_OPTIONS = MemoryOptions()


def choose_path(path: str) -> str:
    """The implementation that "auto" stands for, or `path` itself where it can run.

    Raises:
        UserError: there is no such path.
    """
    if path == "auto":
        return "closed_form"
    if path not in PATHS:
        raise UserError(f"memory path {path!r} does not exist; choose one of auto, {', '.join(PATHS)}")
    return path


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
        state: where to go on; None: W = initial_weights, S = 0, at the start of a chunk.
        options: the variant of the rule.
        path: "auto", "closed_form" or "reference" (slow: one autograd call a token).
        return_signals: also return detached fp32 scalars: "surprise", the mean over tokens and heads of the loss.
    Returns: M_{W_t}(q_t) [b, t, h, d] in q's dtype; the state after the last token; the signals if asked for. All is
        computed in fp32, in float64 where q, k, v or the initial weights are; differentiable in every tensor.

    Raises:
        UserError: there is no such path.
        ValueError: shapes that do not fit together.
    """
    scan = PATHS[choose_path(path)]
    _check_shapes(q, k, v, log_gamma, log_eta, theta, initial_weights, norm_weight, norm_bias, state, options)
    dtype = torch.float64 if torch.float64 in (x.dtype for x in (q, k, v, *initial_weights)) else torch.float32

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    start = tuple(w.to(dtype) for w in initial_weights)
    if state is None:
        state = initial_state(start, q.shape[0])
    else:
        weights, momentum, anchor = (tuple(x.to(dtype) for x in field) for field in state[:3])
        state = MemoryState(weights, momentum, anchor, state.offset)
    with torch.autocast(q.device.type, enabled=False):
        tokens = (q, k, v) if scan is scan_closed_form else (q.to(dtype), k.to(dtype), v.to(dtype))
        out, state, squares = scan(
            *tokens, wide(log_gamma), wide(log_eta), theta.to(dtype),
            start, wide(norm_weight), wide(norm_bias), state, options, return_signals,
        )  # fmt: skip
    if squares is None:
        return out.to(q.dtype), state
    return out.to(q.dtype), state, {"surprise": (squares / q[..., 0].numel()).float()}


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
