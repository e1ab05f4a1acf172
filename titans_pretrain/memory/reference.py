"""The memory token by token, straight from the paper's equations: the oracle every faster path is held against.

Shares nothing with the other paths but the state: the network is written out again, and the gradient of the inner loss is
whatever autograd says it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.memory.state import MemoryOptions, MemoryState, begin_chunk


def scan_reference(
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
    """Same arguments and results as `scan_closed_form`; differentiable in everything, one autograd call a token."""

    def network(x: Tensor, weights: Sequence[Tensor]) -> Tensor:  # [b, h, d] -> [b, h, d]
        y = x
        for layer, w in enumerate(weights):
            if layer > 0:
                y = F.gelu(y) if options.activation == "gelu" else F.silu(y)
            y = torch.einsum("bhi,bhio->bho", y, w)
        if norm_weight is None or norm_bias is None:
            return y
        return x + F.layer_norm(y, (y.shape[-1],), eps=options.norm_eps) * norm_weight + norm_bias

    outer_gradients = torch.is_grad_enabled()
    outputs = []
    surprise = torch.zeros((), dtype=q.dtype, device=q.device)
    for t in range(q.shape[1]):
        with torch.enable_grad():
            anchor = [w if outer_gradients and w.requires_grad else w.detach().requires_grad_() for w in state.anchor]
            loss = 0.5 * (network(k[:, t], anchor) - v[:, t]).square().sum()
            # The sum over batch and heads leaves every gradient alone: each weight matrix belongs to one of them.
            gradients = torch.autograd.grad(loss, anchor, create_graph=outer_gradients)
        surprise += loss.detach()

        weights, momentum = [], []
        for layer, gradient in enumerate(gradients):

            def scalar(gate: Tensor, t: int = t, layer: int = layer) -> Tensor:
                return gate[:, t, :, layer, None, None]

            w, s = state.weights[layer], state.momentum[layer]
            step = -scalar(theta) * gradient
            update = step if log_eta is None else scalar(log_eta).exp() * s + step
            if log_gamma is not None:
                gamma = scalar(log_gamma).exp()
                w = gamma * w if options.forget_toward == "zero" else gamma * w + (1 - gamma) * initial_weights[layer]
            weights.append(w + update)
            momentum.append(s if log_eta is None else update)
        state = MemoryState(tuple(weights), tuple(momentum), state.anchor, state.offset + 1)
        outputs.append(network(q[:, t], state.weights))
        if state.offset == options.chunk_size:
            state = begin_chunk(state)
    return torch.stack(outputs, dim=1), state, surprise if want_surprise else None
