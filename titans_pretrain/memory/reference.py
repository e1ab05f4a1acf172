"""The memory token by token, straight from the paper's equations: the oracle every faster path is held against.

Shares nothing with the other paths but the contract: the network is written out again, and the gradient of the inner loss
is whatever autograd says it is. Itself differentiable by autograd, as often as one likes, so it needs no backward and no
operator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.memory.path import ScanInputs, ScanResult
from titans_pretrain.memory.state import MemoryOptions


def scan_reference(inputs: ScanInputs, offset: int, options: MemoryOptions) -> ScanResult:
    """As `ScanPath.forward`, but tensors of the result may be views of each other and of inputs; one autograd call a
    token. The surprise is always computed."""
    dtype = inputs.theta.dtype
    q, k, v = (x.to(dtype) for x in inputs[:3])
    log_gamma, log_eta, theta, initial_weights = inputs[3:7]
    norm_weight, norm_bias = inputs.norm_weight, inputs.norm_bias

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
    weights, momentum, anchor = inputs.weights, inputs.momentum, inputs.anchor
    outputs = []
    surprise = torch.zeros((), dtype=dtype, device=q.device)
    chunks = 0
    for t in range(q.shape[1]):
        if offset == 0:
            if inputs.document_starts is not None:
                anew = inputs.document_starts[:, chunks, None, None, None]
                fresh_momentum = inputs.fresh_momentum or [torch.zeros_like(w) for w in initial_weights]
                fresh = zip(inputs.fresh_weights or initial_weights, weights, strict=True)
                weights = tuple(w0.where(anew, w) for w0, w in fresh)
                momentum = tuple(s0.where(anew, s) for s0, s in zip(fresh_momentum, momentum, strict=True))
            anchor = weights
            chunks += 1
        with torch.enable_grad():
            at = [w if outer_gradients and w.requires_grad else w.detach().requires_grad_() for w in anchor]
            loss = 0.5 * (network(k[:, t], at) - v[:, t]).square().sum()
            # The sum over batch and heads leaves every gradient alone: each weight matrix belongs to one of them.
            gradients = torch.autograd.grad(loss, at, create_graph=outer_gradients)
        surprise += loss.detach()

        new_weights, new_momentum = [], []
        for layer, gradient in enumerate(gradients):

            def scalar(gate: Tensor, t: int = t, layer: int = layer) -> Tensor:
                return gate[:, t, :, layer, None, None]

            w, s = weights[layer], momentum[layer]
            step = -scalar(theta) * gradient
            update = step if log_eta is None else scalar(log_eta).exp() * s + step
            if log_gamma is not None:
                gamma = scalar(log_gamma).exp()
                w = gamma * w if options.forget_toward == "zero" else gamma * w + (1 - gamma) * initial_weights[layer]
            new_weights.append(w + update)
            new_momentum.append(s if log_eta is None else update)
        weights, momentum = tuple(new_weights), tuple(new_momentum)
        outputs.append(network(q[:, t], weights))
        offset = (offset + 1) % options.chunk_size
    out = torch.stack(outputs, dim=1).to(inputs.q.dtype)
    return ScanResult(out, weights, momentum, anchor if chunks and offset else (), surprise, ())
