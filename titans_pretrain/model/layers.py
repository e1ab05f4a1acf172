"""The parts every block shares: norms, rotary positions, causal convolution, feed-forward, embedding and output head.

Shapes: b batch, t time, c channels, h heads, d head_dim, k kernel, v vocabulary. Modules never say how many heads they
hold (`-1`), so a tensor-parallel rank can run them on its share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED_LABEL = -100


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in fp32 (float64 stays float64). weight: [c] or [h, d]."""

    def __init__(self, *shape: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (F.rms_norm(wide, wide.shape[-1:], eps=self.eps) * self.weight).to(x.dtype)


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles (RoFormer, arXiv 2104.09864), halves convention of Llama.

    Args:
        positions: int64 [t], or [b, t] where rows differ.

    Returns:
        two fp32 [t, 1, d / 2] or [b, t, 1, d / 2]. Angles are formed in float64: at position 1e6 fp32 would be off by 0.06
        radians.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions.to(torch.float64)[..., None] * theta**-exponents
    return angles.cos().float()[..., None, :], angles.sin().float()[..., None, :]


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions to x [b, t, h, d]; computed in fp32 or wider, returned in x's dtype."""
    cos, sin = table
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def unit(x: Tensor) -> Tensor:
    """x over its length in the last dimension; computed in fp32 or wider, returned in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(wide, dim=-1, eps=1e-6).to(x.dtype)


class CausalConv(nn.Module):
    """Causal depthwise convolution over time. weight: [c, k], the last tap on the current token."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))

    @property
    def halo(self) -> int:
        """Earlier tokens an output needs."""
        return self.weight.shape[1] - 1

    def forward(self, extended: Tensor) -> Tensor:
        """extended [b, halo + t, c], earlier tokens first -> [b, t, c]."""
        return F.conv1d(extended.transpose(1, 2), self.weight[:, None, :], groups=extended.shape[-1]).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LanguageModelHead(nn.Module):
    """Output projection and its cross entropy. weight: [v, c].

    The loss is formed from chunks of `loss_chunk` tokens, so the full logits tensor never exists.
    """

    def __init__(self, dim: int, vocab_size: int, loss_chunk: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.loss_chunk = loss_chunk

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden [b, t, c] -> fp32 logits [b, t, v]; with labels int64 [b, t] -> the fp32 sum of the token losses in nats."""
        if labels is None:
            return F.linear(hidden, self.weight).to(torch.promote_types(hidden.dtype, torch.float32))
        return chunked_loss(hidden, self.weight, labels, self.loss_chunk)


def cross_entropy(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """logits [n, v], targets int64 [n] -> losses [n] in nats. With `gradient`, logits become their gradient in place."""
    log_normaliser = logits.logsumexp(dim=-1, keepdim=True)
    losses = (log_normaliser - logits.gather(1, targets[:, None]))[:, 0]
    if gradient:
        # softmax - onehot; the one-hot's share is subtracted in place at the target's column
        grad = logits.sub_(log_normaliser).exp_()
        grad.scatter_add_(1, targets[:, None], grad.new_full((), -1.0).expand(len(targets), 1))
    return losses


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    loss: Callable[[Tensor, Tensor, bool], Tensor] = cross_entropy,
) -> Tensor:
    """The sum of `loss` over the logits of `chunk` tokens at a time; labels of IGNORED_LABEL do not count.

    hidden [b, t, c], weight [v, c], labels int64 [b, t] -> fp32 scalar. `loss` is called as `cross_entropy` is, and may
    overwrite the logits it is given.
    """
    if not torch.is_grad_enabled():
        weight = weight.detach()  # a Function is told that a parameter needs a gradient even here, and would form it
    return _ChunkedLoss.apply(hidden.flatten(0, 1), weight, labels.flatten(), chunk, loss)


class _ChunkedLoss(torch.autograd.Function):
    """Both gradients are formed chunk by chunk in the forward pass, where the logits are at hand: recomputing the logits in
    the backward pass would cost a third more in this layer."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        loss: Callable[[Tensor, Tensor, bool], Tensor],
    ) -> Tensor:
        wants_gradient = any(ctx.needs_input_grad[:2])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if wants_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_gradient else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], weight).to(wide)
            valid = labels[rows] != IGNORED_LABEL
            losses = loss(logits, labels[rows].where(valid, 0), wants_gradient)
            total += losses.where(valid, 0.0).sum()
            if grad_hidden is not None and grad_weight is not None:
                grad = logits.masked_fill_(~valid[:, None], 0.0).to(hidden.dtype)
                grad_hidden[rows] = grad @ weight
                grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        return (grad_hidden * scale).to(grad_hidden.dtype), (grad_weight * scale).to(ctx.weight_dtype), None, None, None
