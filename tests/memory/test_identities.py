"""Known update rules that the memory must become when parts of it are switched off (method.md section 1)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.memory.problem import error, make_problem, make_state
from titans_pretrain.memory import MemoryOptions, memory_scan

PATHS = ["closed_form", "reference"]


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_linear_memory_at_chunk_1_is_the_delta_rule(path: str) -> None:
    problem = make_problem(30, 1, norm=False, momentum=False, forgetting=False)
    out, state = memory_scan(*problem, options=MemoryOptions(1), path=path)
    for head in range(2):
        q, k, v = (x[0, :, head] for x in problem[:3])
        beta = problem.theta[0, :, head, 0]
        w = problem.initial_weights[0][head]
        for t in range(30):
            old = k[t] @ w
            new = beta[t] * v[t] + (1 - beta[t]) * old
            w = w - torch.outer(k[t], old) + torch.outer(k[t], new)
            assert error(out[0, t, head], q[t] @ w) < 1e-12
        assert error(state.weights[0][0, head], w) < 1e-12


@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_gated_delta_net_differs_by_the_decay_of_what_is_read_back(path: str) -> None:
    """Gated DeltaNet takes the gradient at gamma * W, Titans at W: they differ by theta (1 - gamma) k' (k W), no more."""
    problem = make_problem(1, 1, norm=False, momentum=False)
    before = make_state(problem, 0)
    before = before._replace(anchor=before.weights)
    _, after = memory_scan(*problem, before, MemoryOptions(1, forget_toward="zero"), path=path)
    assert problem.log_gamma is not None
    for head in range(2):
        k, v, w = problem.k[0, 0, head], problem.v[0, 0, head], before.weights[0][0, head]
        gamma, theta = problem.log_gamma[0, 0, head, 0].exp(), problem.theta[0, 0, head, 0]
        gated_delta = gamma * (w - theta * torch.outer(k, k @ w)) + theta * torch.outer(k, v)
        difference = -theta * (1 - gamma) * torch.outer(k, k @ w)
        assert difference.abs().max() > 1e-4
        assert error(after.weights[0][0, head] - gated_delta, difference) < 1e-11


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_without_momentum_and_forgetting_it_is_ttt(chunk: int, depth: int, norm: bool, path: str) -> None:
    """TTT: mini-batch gradient descent on the reconstruction loss; token t is read after the steps of its mini-batch so
    far. One gradient of the summed, theta-weighted losses per token, the same theta for both layers of TTT-MLP."""
    length = 21
    problem = make_problem(length, depth, norm=norm, momentum=False, forgetting=False, shared_gates=True)
    with torch.no_grad():
        out, state = memory_scan(*problem, options=MemoryOptions(chunk), path=path)

    for head in range(2):

        def model(x: Tensor, weights: list[Tensor], head: int = head) -> Tensor:
            y = x @ weights[0]
            for w in weights[1:]:
                y = torch.nn.functional.gelu(y) @ w
            if problem.norm_weight is None or problem.norm_bias is None:
                return y
            return x + torch.nn.functional.layer_norm(
                y, y.shape[-1:], problem.norm_weight[head], problem.norm_bias[head]
            )

        q, k, v, theta = problem.q[0, :, head], problem.k[0, :, head], problem.v[0, :, head], problem.theta[0, :, head]
        stepped = [w[head] for w in problem.initial_weights]
        for t in range(length):
            start = t - t % chunk
            if t == start:
                base = [w.detach().requires_grad_() for w in stepped]
            losses = 0.5 * (model(k[start : t + 1], base) - v[start : t + 1]).square().sum(-1)
            gradients = torch.autograd.grad((theta[start : t + 1, 0] * losses).sum(), base)
            stepped = [(w - g).detach() for w, g in zip(base, gradients, strict=True)]
            assert error(out[0, t, head], model(q[t], stepped)) < 1e-11
        for w, expected in zip(state.weights, stepped, strict=True):
            assert error(w[0, head], expected) < 1e-11
