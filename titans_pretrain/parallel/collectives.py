"""Differentiable collectives along one axis of the grid; in a tensor's own dtype, on any backend.

Where tensor ranks split a layer, activations are of two kinds: whole, the same on every rank, or a rank's share. Each
function leads from one kind to the other, and its gradient leads back. On an axis of one rank all return x unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titans_pretrain.parallel.grid import Axis


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """x, the same on every rank, as the input of what each rank does its share of. The gradient is the sum over ranks."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's x, on every rank. The gradient, the same on every rank, goes to each x as it is."""
    return x if axis.size == 1 else _Sum.apply(x, axis)


def gather_last(x: Tensor, axis: Axis) -> Tensor:
    """Every rank's x [..., n], joined by rank along the last dimension. The gradient, the same on every rank, is cut."""
    return x if axis.size == 1 else _GatherLast.apply(x, axis)


def all_reduced(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """A new tensor, x reduced over the axis. No gradient."""
    x = x.clone(memory_format=torch.contiguous_format)
    if axis.size > 1:
        dist.all_reduce(x, op, group=axis.group)
    return x


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        # Shares x's memory. As a view of x it would keep x itself alive, and with it what tensor.SharedCopies holds.
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return all_reduced(grad_outputs[0], ctx.axis), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduced(x, axis)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
        dist.all_gather(parts, x.contiguous(), group=axis.group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0].chunk(ctx.axis.size, dim=-1)[ctx.axis.rank], None
