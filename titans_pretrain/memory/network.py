"""The memory's network M(k): its nonlinearity, its layer norm and inner loss with their gradients, a read at fixed weights.

Only `memory_read` and what it uses (`activate`, `Norm`) may stand below autograd; the rest is differentiated by hand.

Shapes here: weights [n, in, out], tokens [n, t, d], gain and bias of the layer norm [n, 1, d], with n = batch * heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """act(x) and act'(x)."""
    value, slope, _ = _gelu(x, bend=False) if activation == "gelu" else _silu(x, bend=False)
    return value, slope


def activate_with_bend(x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """act(x), act'(x) and act''(x)."""
    value, slope, bend = _gelu(x, bend=True) if activation == "gelu" else _silu(x, bend=True)
    assert bend is not None
    return value, slope, bend


def _gelu(x: Tensor, bend: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """x * Phi(x) with the normal distribution's Phi; all three share one erf and one exp."""
    cumulative = torch.erf(x * math.sqrt(0.5)).add_(1.0).mul_(0.5)
    square = x * x
    density = torch.exp(square * -0.5).mul_(1.0 / math.sqrt(2.0 * math.pi))
    value, slope = x * cumulative, cumulative.addcmul_(x, density)
    return value, slope, density.mul_(2.0 - square) if bend else None


def _silu(x: Tensor, bend: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """x * sigmoid(x)."""
    sigmoid = torch.sigmoid(x)
    falling = sigmoid * (1.0 - sigmoid)
    slope = torch.addcmul(sigmoid, x, falling)
    return x * sigmoid, slope, falling * (2.0 + x * (1.0 - 2.0 * sigmoid)) if bend else None


class Loss(NamedTuple):
    """The inner loss 0.5 * ||M(k) - v||^2 at the output of net(k); tokens [n, t, d]."""

    error: Tensor
    """M(k) - v."""
    slope: Tensor
    """The loss's gradient with respect to net(k)."""
    normalized: Tensor | None
    """The layer norm's result before gain and bias, and 1 / standard deviation [n, t, 1]. None without layer norm."""
    inverse_std: Tensor | None


def inner_loss(k: Tensor, v: Tensor, net: Tensor, norm: Norm | None) -> Loss:
    """The loss of keys k whose values are v, where the network's layers give `net`."""
    if norm is None:
        error = net - v
        return Loss(error, error, None, None)
    normalized, inverse_std = normalize(net, norm.eps)
    error = torch.addcmul(norm.bias + (k - v), normalized, norm.gain)
    return Loss(error, normalize_backward(error * norm.gain, normalized, inverse_std), normalized, inverse_std)


def inner_loss_backward(slope_grad: Tensor, loss: Loss, norm: Norm | None) -> tuple[Tensor, Tensor, Norm | None]:
    """From the gradient of `loss.slope`: those of net(k), of k - v, and of the layer norm's gain and bias per token."""
    if norm is None or loss.normalized is None or loss.inverse_std is None:
        return slope_grad, slope_grad, None
    # slope = inverse_std * (s - mean(s) - normalized * mean(s * normalized)), where s = error * gain.
    s = loss.error * norm.gain
    along = (s * loss.normalized).mean(-1, keepdim=True)
    s_grad = normalize_backward(slope_grad, loss.normalized, loss.inverse_std)
    scaled = loss.inverse_std * slope_grad
    normalized_grad = torch.addcmul(scaled * -along, s, (scaled * loss.normalized).mean(-1, keepdim=True), value=-1)
    error_grad = s_grad * norm.gain
    gain_grad = torch.addcmul(s_grad * loss.error, error_grad, loss.normalized)
    normalized_grad.addcmul_(error_grad, norm.gain)
    net_grad = normalize_backward(normalized_grad, loss.normalized, loss.inverse_std)
    # What is left is the way of inverse_std itself, whose gradient with respect to net is -inverse_std^2 * normalized / d.
    through_std = (slope_grad * loss.slope).mean(-1, keepdim=True).mul_(loss.inverse_std)
    net_grad.addcmul_(loss.normalized, through_std, value=-1)
    return net_grad, error_grad, Norm(gain_grad, error_grad, norm.eps)


def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Layer norm over the last dimension without gain and bias, and 1 / standard deviation."""
    normalized, _, inverse_std = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    return normalized, inverse_std


def normalize_backward(grad: Tensor, normalized: Tensor, inverse_std: Tensor) -> Tensor:
    """The gradient of `normalize`'s argument."""
    along = (grad * normalized).mean(-1, keepdim=True)
    centred = grad - grad.mean(-1, keepdim=True)
    return centred.addcmul_(normalized, along, value=-1).mul_(inverse_std)


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
