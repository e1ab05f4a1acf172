"""The memory's network M(k): its layers, its loss gradient with respect to their outputs, and a read at fixed weights.

Shapes here: weights [n, in, out], tokens [n, t, d], gain and bias of the layer norm [n, 1, d], with n = batch * heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_pretrain.memory.state import MemoryOptions


class Norm(NamedTuple):
    """The layer norm around the memory's network: M(k) = k + gain * normalized(net(k)) + bias."""

    gain: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=self.eps), self.gain)


def activate(x: Tensor, activation: str) -> Tensor:
    """act(x)."""
    return F.gelu(x) if activation == "gelu" else F.silu(x)


def activate_with_slope(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(x) and act'(x), once differentiable."""
    value, slope, _ = (_GELU if activation == "gelu" else _SiLU).apply(x)
    return value, slope


class _GELU(torch.autograd.Function):
    """x * Phi(x) with the normal distribution's Phi. By hand, because value, slope and curvature share one erf and one
    exp, which autograd would compute anew for each and follow with a dozen elementwise passes."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cumulative = torch.erf(x * math.sqrt(0.5)).add_(1.0).mul_(0.5)
        square = x * x
        density = torch.exp(square * -0.5).mul_(1.0 / math.sqrt(2.0 * math.pi))
        return x * cumulative, torch.addcmul(cumulative, x, density), density.mul_(2.0 - square)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, slope, curvature = output
        ctx.mark_non_differentiable(curvature)
        ctx.save_for_backward(slope, curvature)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, value_grad: Tensor, slope_grad: Tensor, _: Tensor) -> Tensor:
        slope, curvature = ctx.saved_tensors
        return torch.addcmul(value_grad * slope, slope_grad, curvature)


class _SiLU(_GELU):
    """x * sigmoid(x)."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sigmoid = torch.sigmoid(x)
        falling = sigmoid * (1.0 - sigmoid)
        slope = torch.addcmul(sigmoid, x, falling)
        return x * sigmoid, slope, falling * (2.0 + x * (1.0 - 2.0 * sigmoid))


def loss_slope(k: Tensor, v: Tensor, net: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """Of the loss 0.5 * ||M(k) - v||^2: the error M(k) - v, and the gradient with respect to net(k), both [n, t, d]."""
    if norm is None:
        error = net - v
        return error, error
    centred = net - net.mean(-1, keepdim=True)
    inverse_std = torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
    normalized = centred * inverse_std
    error = torch.addcmul(norm.bias + (k - v), normalized, norm.gain)
    slope = error * norm.gain
    along = (slope * normalized).mean(-1, keepdim=True)
    return error, inverse_std * (slope - slope.mean(-1, keepdim=True) - normalized * along)


def memory_read(
    q: Tensor,
    weights: Sequence[Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    options: MemoryOptions,
) -> Tensor:
    """M_W(q) at fixed weights, without an update (MAC's first read).

    Args:
        q: [b, t, h, d], any float dtype.
        weights: per memory layer [b, h, in, out].
        norm_weight, norm_bias: [h, d], or None for the plain network without residual and layer norm.
    Returns: [b, t, h, d] in q's dtype; computed in fp32, or float64 where q or the weights are.
    """
    dtype = torch.float64 if torch.float64 in (q.dtype, *(w.dtype for w in weights)) else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        wide = q.to(dtype).transpose(1, 2)
        x = wide
        for layer, w in enumerate(weights):
            x = torch.matmul(x if layer == 0 else activate(x, options.activation), w.to(dtype))
        if norm_weight is not None and norm_bias is not None:
            norm = Norm(norm_weight.to(dtype)[:, None], norm_bias.to(dtype)[:, None], options.norm_eps)
            x = wide + norm(x)
        return x.transpose(1, 2).to(q.dtype)
