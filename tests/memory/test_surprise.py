"""Is the surprise told of each token that of the definition? Held against torch.autograd and the token-by-token memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.memory.problem import Problem, assert_same, error, make_problem, make_state
from titans_pretrain.memory import MemoryOptions, MemoryState, initial_state, memory_scan
from titans_pretrain.memory.surprise import scan_with_surprise


def defined(problem: Problem, state: MemoryState | None, options: MemoryOptions) -> tuple[Tensor, Tensor]:
    """Inner loss [b, t, h] and gradient norms [b, t, h, l], a token and an autograd call at a time: the reference carries
    the memory, and the network is written out."""
    state = state or initial_state(problem.initial_weights, problem.q.shape[0])
    losses, norms = [], []
    for t in range(problem.q.shape[1]):
        at = [w.clone().requires_grad_() for w in (state.anchor if state.offset else state.weights)]
        y = problem.k[:, t]
        for layer, w in enumerate(at):
            y = torch.einsum(
                "bhi,bhio->bho", (F.gelu if options.activation == "gelu" else F.silu)(y) if layer else y, w
            )
        if problem.norm_weight is not None and problem.norm_bias is not None:
            y = F.layer_norm(y, y.shape[-1:], eps=options.norm_eps) * problem.norm_weight + problem.norm_bias
            y = y + problem.k[:, t]
        loss = 0.5 * (y - problem.v[:, t]).square().sum(-1)
        gradients = torch.autograd.grad(loss.sum(), at)
        losses.append(loss.detach())
        norms.append(torch.stack([g.flatten(2).norm(dim=-1) for g in gradients], dim=-1))
        _, state = memory_scan(*problem.tokens(t, t + 1), state, options, path="reference")
    return torch.stack(losses, dim=1), torch.stack(norms, dim=1)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("chunk", "offset"), [(4, 0), (5, 3), (1, 0), (100, 7)])
def test_equals_autograd_through_the_definition(depth: int, norm: bool, chunk: int, offset: int) -> None:
    problem = make_problem(23, depth, batch=2, norm=norm)
    options = MemoryOptions(chunk_size=chunk, activation="silu" if depth == 3 else "gelu")
    state = make_state(problem, offset) if offset else None
    losses, norms = defined(problem, state, options)
    out, after, found = scan_with_surprise(*problem, state, options)
    assert error(found.inner_loss, losses) < 1e-12
    assert error(found.gradient_norm, norms) < 1e-12
    assert_same((out, after), memory_scan(*problem, state, options, path="reference"))


def test_without_gates_and_toward_zero() -> None:
    problem = make_problem(19, momentum=False, forgetting=False)
    options = MemoryOptions(chunk_size=6)
    assert (
        error(scan_with_surprise(*problem, None, options)[2].gradient_norm, defined(problem, None, options)[1]) < 1e-12
    )
    problem, options = make_problem(19), MemoryOptions(chunk_size=6, forget_toward="zero")
    assert (
        error(scan_with_surprise(*problem, None, options)[2].gradient_norm, defined(problem, None, options)[1]) < 1e-12
    )


def test_a_chunk_longer_than_a_piece() -> None:
    problem, options = make_problem(150), MemoryOptions(chunk_size=140)
    losses, norms = defined(problem, None, options)
    found = scan_with_surprise(*problem, None, options)[2]
    assert error(found.inner_loss, losses) < 1e-12
    assert error(found.gradient_norm, norms) < 1e-12
