"""The gated delta rule over a sequence (Gated DeltaNet, arXiv 2412.06464, equation 10): by chunks, by tokens, or by a library.

Of each head, with unit keys, S [k, v] the state, a = exp(log_decay) and B = beta:

    S_t = a_t S_{t-1} + k_t u_t^T        u_t = B_t (v_t - a_t S_{t-1}^T k_t)        o_t = S_t^T q_t / sqrt(k)

Shapes: b batch, t time, h heads, k and v channels of keys and values, n chunks of c tokens.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from titans_pretrain.model.chunks import CHUNK, cut_tokens, decays, join_tokens

FEW = 8
"""Up to so many tokens go one by one: what a chunk shares among its tokens then costs more than it saves."""
WIDEST = 256
"""Channels of a head that the library's kernels take."""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the state is read as after each token's own update, and the state after the last.

    Args:
        q, k: [b, t, h, k], unit vectors.
        v: [b, t, h, v].
        log_decay: [b, t, h], at most 0; fp32 or wider, as beta, in (0, 1).
        state: [b, h, k, v] before the first token, fp32 or wider.
        starts: bool [b, t], true where the token begins a document: it finds a state of zeros.

    Returns:
        [b, t, h, v] in v's dtype; [b, h, k, v] in the state's.
    """
    if q.shape[1] <= FEW:
        return token_by_token(q, k, v, log_decay, beta, state, starts)
    if why_not_library(v.device, v.dtype, max(k.shape[-1], v.shape[-1]), starts is not None) is not None:
        return chunk_by_chunk(q, k, v, log_decay, beta, state, starts)
    operator = _library()
    assert not isinstance(operator, str)
    return operator(q, k, v, log_decay, beta, initial_state=state, output_final_state=True)


def why_not_library(device: torch.device, dtype: torch.dtype, channels: int, documents: bool) -> str | None:
    """Why flash-linear-attention's kernels do not compute this, as the rest of a sentence; None: they do."""
    if device.type != "cuda":
        return f"flash-linear-attention's kernels are for GPUs, not {device.type}"
    if torch.compiler.is_compiling():
        return "flash-linear-attention's kernels do not go into a compiled block (model.compile)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-linear-attention's kernels are for engine.precision=bf16, not {dtype}"
    if documents:
        return "flash-linear-attention's kernels are not used for rows of several documents (data.reset_at_documents)"
    if channels > WIDEST:
        return f"flash-linear-attention's kernels take heads of up to {WIDEST} channels, not {channels} (model.memory_heads)"
    found = _library()
    return found if isinstance(found, str) else _wrong_triton(device)


def describe_path(device: torch.device, dtype: torch.dtype, channels: int, documents: bool, compiled: bool) -> str:
    """By which implementation a model trains, in words."""
    reason = why_not_library(device, dtype, channels, documents)
    if reason is None and compiled:
        reason = "flash-linear-attention's kernels do not go into a compiled block (model.compile)"
    return "flash-linear-attention" if reason is None else f"torch, chunks of {CHUNK} tokens: {reason}"


@functools.cache
def _library() -> Callable[..., Any] | str:
    """flash-linear-attention's operator, or why it is not there."""
    try:
        return importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except ImportError as error:
        return f"flash-linear-attention is not installed ({error}); pip install fla-core"
    except Exception as error:  # it refuses some Triton versions and platforms while it is imported
        return f"flash-linear-attention cannot be loaded ({type(error).__name__}: {error})"


def _wrong_triton(device: torch.device) -> str | None:
    """The library raises in the backward pass where its kernel is known to be miscompiled."""
    version = tuple(int(x) for x in importlib.import_module("triton").__version__.split("+")[0].split(".")[:3])
    if torch.cuda.get_device_capability(device)[0] == 9 and (3, 4) <= version < (3, 7, 1):
        return f"flash-linear-attention's kernels are wrong with Triton {'.'.join(map(str, version))} on this GPU; use 3.7.1"
    return None


def token_by_token(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` as it is written, for decoding and as the reference."""
    read, key, value = (x.to(state.dtype) for x in (q * q.shape[-1] ** -0.5, k, v))
    decay = log_decay.exp()
    outputs = []
    for i in range(q.shape[1]):
        if starts is not None:
            state = torch.where(starts[:, i, None, None, None], 0.0, state)
        state = decay[:, i, :, None, None] * state
        error = value[:, i] - (key[:, i, :, None] @ state)[:, :, 0]
        update = beta[:, i, :, None] * error
        state = state + key[:, i, :, :, None] * update[:, :, None]
        outputs.append((read[:, i, :, None] @ state)[:, :, 0])
    return torch.stack(outputs, dim=1).to(v.dtype), state


def chunk_by_chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` in matrix products (arXiv 2406.06484 section 3, with the decays of 2412.06464 section 3.3).

    In a chunk the updates u solve a unit triangular system: u_i + B_i sum_{j<i} D_ij (k_i k_j) u_j = B_i (v_i - d_i S^T k_i), S
    being the state before the chunk, D_ij the decay from token j to i and d_i from before the chunk to i. It is linear in
    S, so all chunks' systems are solved at once, and only products with S follow one another.
    """
    length = q.shape[1]
    size = min(CHUNK, length)
    read, key, value, gates, writes = (
        cut_tokens(x.to(state.dtype), size) for x in (q * q.shape[-1] ** -0.5, k, v, log_decay, beta)
    )
    decay = decays(gates, starts, size)
    writes = writes[..., None]
    system = writes * (key @ key.mT) * decay.within.tril(-1)
    known = torch.cat((writes * value, writes * decay.into * key), dim=-1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    own, through_state = solved.split((value.shape[-1], key.shape[-1]), dim=-1)
    scores = (read @ key.mT) * decay.within
    # unbind: the gradient of an index would be a whole tensor of zeros for each chunk
    per_chunk = (own, through_state, scores, read * decay.into, (key * decay.out_of).mT, decay.over)
    outputs = []
    for u, w, seen, reads, keys, kept in zip(*(x.unbind(2) for x in per_chunk), strict=True):
        update = u - w @ state
        outputs.append(reads @ state + seen @ update)
        state = kept * state + keys @ update
    return join_tokens(torch.stack(outputs, dim=2), length).to(v.dtype), state
