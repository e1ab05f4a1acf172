"""Tensors of any shapes and dtypes as one tensor of bytes and back: a message has one start-up time, whatever is in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """What both ends of a message know beforehand about one of its tensors."""

    shape: torch.Size
    dtype: torch.dtype


def form_of(x: Tensor) -> Form:
    return Form(x.shape, x.dtype)


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [r, ...] with the same r -> uint8 [r, bytes]: the rows of all of them after each other."""
    return torch.cat([_as_rows(x).view(torch.uint8) for x in tensors], dim=1)


def packed_width(forms: Sequence[Form]) -> int:
    """Bytes of a row that holds tensors of these forms."""
    return sum(math.prod(form.shape[1:]) * form.dtype.itemsize for form in forms)


def unpack(packed: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """The inverse of `pack`; every tensor in memory of its own."""
    widths = [packed_width([form]) for form in forms]
    return [
        part.clone(memory_format=torch.contiguous_format).flatten().view(form.dtype).view(form.shape)
        for part, form in zip(packed.split(widths, dim=1), forms, strict=True)
    ]


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], math.prod(x.shape[1:])).contiguous()
