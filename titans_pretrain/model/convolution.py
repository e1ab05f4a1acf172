"""How does a causal convolution meet what came before its tokens: a carried tail, other ranks, a document's beginning?"""

from __future__ import annotations

from torch import Tensor

from titans_pretrain.model.documents import Documents
from titans_pretrain.model.layers import CausalConv
from titans_pretrain.model.sequence import LocalSequence


def convolve(
    x: Tensor, conv: CausalConv, tail: Tensor | None, sequence: LocalSequence, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """x [b, t, c] after the inputs `tail` [b, halo, c] (None: zeros) -> [b, t, c] and the new tail.

    With `documents` the rows of `tail` are alike, and every document begins with it.
    """
    if documents is None:
        extended = sequence.extend(x, tail, conv.halo)
        y = conv(extended)
    else:
        pieces = sequence.extend_pieces(x, None if tail is None else tail[0], conv.halo, documents)
        y = conv(pieces.flatten(0, 1)).unflatten(0, pieces.shape[:2]).flatten(1, 2)[:, : x.shape[1]]
        extended = pieces[:, -1, : conv.halo + (x.shape[1] - 1) % documents.grid + 1]
    return y, extended[:, extended.shape[1] - conv.halo :]
