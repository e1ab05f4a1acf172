"""How do recurrences go over a sequence in chunks? Cutting into chunks, and what decays between which tokens of one.

Shapes: b batch, t time, h heads, n chunks of c tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Tokens computed side by side: products of about this size fill matrix units, and c * c scores stay small. Speed only."""


def cut_tokens(x: Tensor, size: int) -> Tensor:
    """x [b, t, h, ...] -> [b, h, n, size, ...], zeros behind the last token."""
    spare = -x.shape[1] % size
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, spare)) if spare else x
    return x.unflatten(1, (-1, size)).movedim(3, 1)


def join_tokens(x: Tensor, length: int) -> Tensor:
    """The inverse of `cut_tokens`."""
    return x.movedim(1, 3).flatten(1, 2)[:, :length]


class Decays(NamedTuple):
    """Products of decays, each at most 1; 0 where a document begins in between."""

    within: Tensor
    """[b, h, n, c, c]: from the column's token to the row's; 0 for later tokens."""
    into: Tensor
    """[b, h, n, c, 1]: from before the chunk to the token, its own included."""
    out_of: Tensor
    """[b, h, n, c, 1]: from the token to the end of the chunk."""
    over: Tensor
    """[b, h, n, 1, 1]: over the whole chunk."""


def decays(log_decay: Tensor, starts: Tensor | None, size: int) -> Decays:
    """log_decay [b, h, n, c], at most 0; starts bool [b, t].

    Every exponent is a sum of what it needs and nothing else: no differences of long sums, which would lose digits and lead
    rounding errors from one document's gradient into another's. What is not seen is masked before the exponential.
    """
    seen = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril()
    between = log_decay[..., :, None].masked_fill(~seen.tril(-1), 0.0).cumsum(-2)
    reached = log_decay.cumsum(-1)
    rest = between[..., -1, :]
    over = reached[..., -1:]
    if starts is not None:
        number = cut_tokens(starts[:, :, None].long(), size).cumsum(-1)  # of the document, from 0 before the chunk
        seen = seen & (number[..., :, None] == number[..., None, :])
        rest = rest.masked_fill(number != number[..., -1:], -torch.inf)
        reached = reached.masked_fill(number != 0, -torch.inf)
        over = over.masked_fill(number[..., -1:] != 0, -torch.inf)
    within = between.masked_fill(~seen, -torch.inf).exp()
    return Decays(within, reached.exp()[..., None], rest.exp()[..., None], over.exp()[..., None])
