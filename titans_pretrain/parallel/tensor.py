"""Tensor parallelism: how a built model becomes one tensor rank's share of it, by the split table.

The model stays as it was written. Its parameters are cut, and the layers whose parameters were cut are swapped for ones
that talk to the other ranks: a pair of a column-split and a row-split layer costs one all-reduce forward and one backward.
What lies between the two, per head or per channel, runs on this rank's share without knowing it.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from titans_pretrain.model.layers import LanguageModelHead
from titans_pretrain.model.titans import Titans
from titans_pretrain.parallel.collectives import copy_to, sum_over
from titans_pretrain.parallel.grid import Axis
from titans_pretrain.parallel.split_table import part_of, split_dim
from titans_pretrain.parallel.vocabulary import VocabularyEmbedding, VocabularyHead, VocabularyShare


class SharedCopies:
    """One `copy_to` for all column-split layers that read the same tensor, so that the backward pass sums its gradient over
    ranks once and not for each of them.

    A copy lives as long as its tensor does, found by identity. Where layers are given different tensors of the same value
    (ZeRO-3 wraps a module's inputs), there are more copies, and the gradient is still right.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self._copies = WeakTensorKeyDictionary()

    def __call__(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        if x.is_leaf:  # a parameter outlives the step; its copy must not
            return copy_to(x, self.axis)
        copy = self._copies.get(x)
        if copy is None:
            copy = self._copies[x] = copy_to(x, self.axis)
        return cast(Tensor, copy)


class ColumnLinear(nn.Module):
    """nn.Linear with this rank's outputs."""

    def __init__(self, layer: nn.Linear, copies: SharedCopies) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, layer.weight)
        self.bias = layer.bias
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs], the same on every rank -> this rank's share [..., outputs / ranks]."""
        return F.linear(self.copies(x), self.weight, self.bias)


class RowLinear(nn.Module):
    """nn.Linear without bias with this rank's inputs."""

    def __init__(self, layer: nn.Linear, axis: Axis) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, layer.weight)
        self.axis = axis
        assert layer.bias is None, "a bias would be added once per rank"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs / ranks], this rank's share -> [..., outputs], the same on every rank."""
        return sum_over(F.linear(x, self.weight), self.axis)


def split_model(model: Titans, axis: Axis) -> None:
    """Keep this rank's share of every split parameter of `model`, in place, and swap the layers that must talk.

    Names, and so the keys of the state dict, stay; shapes shrink. Split parameters carry `tensor_model_parallel = True`, by
    which DeepSpeed counts their norm over all tensor ranks; the others get whole, equal gradients on every rank.

    Args:
        model: on any device, filled with the same values on every rank; its heads and feed-forward divide by axis.size
            (titans_pretrain.layout checks it).
    """
    if axis.size == 1:
        return
    _cut_parameters(model, axis)
    copies = SharedCopies(axis)
    share = VocabularyShare(axis, model.config.vocab_size)
    for name, module in list(model.named_modules()):
        swapped = _swapped(name, module, copies, share)
        if swapped is not None:
            swapped.train(module.training)
            parent, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(parent), own_name, swapped)


def is_split(parameter: nn.Parameter) -> bool:
    """Whether other tensor ranks hold other parts of `parameter`."""
    return getattr(parameter, "tensor_model_parallel", False)


def _cut_parameters(model: Titans, axis: Axis) -> None:
    parts: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
    for prefix, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{own_name}" if prefix else own_name
            if split_dim(name) is None:
                continue
            if parameter not in parts:
                part = part_of(name, parameter.detach(), axis.rank, axis.size)
                parts[parameter] = nn.Parameter(part, requires_grad=parameter.requires_grad)
                parts[parameter].tensor_model_parallel = True  # type: ignore[attr-defined]
            module.register_parameter(own_name, parts[parameter])


def _swapped(name: str, module: nn.Module, copies: SharedCopies, share: VocabularyShare) -> nn.Module | None:
    """The layer that takes the place of `module`; None: it works on a share as it is."""
    if isinstance(module, nn.Embedding):
        return VocabularyEmbedding(cast(nn.Parameter, module.weight), share)
    if isinstance(module, LanguageModelHead):
        return VocabularyHead(module.weight, share, module.loss_chunk)
    if isinstance(module, nn.Linear):
        dim = split_dim(f"{name}.weight")
        if dim == 0:
            return ColumnLinear(module, copies)
        if dim == 1:
            return RowLinear(module, copies.axis)
    return None
