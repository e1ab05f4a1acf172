"""Attention over earlier tokens as functions on tensors: full, windowed, and the mask of a MAC segment.

Shapes: b batch, t queries, s keys, p prefix (persistent) tokens, h heads, d head_dim. Every function takes queries of
the last t of s tokens, so decoding one token and training on thousands are the same call.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 1024
"""Queries that full attention over rows of several documents takes at a time: masks cost half of what whole ones would."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention. q [b, t, h, d], k and v [b, s, h, d], mask [t, s] or [b, 1, t, s], bool (True: visible)
    or added to the scores -> [b, t, h, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, masks: tuple[Tensor, ...] | None = None) -> Tensor:
    """Full causal attention of the last t of s tokens. q [b, t, h, d], k and v [b, s, h, d] -> [b, t, h, d]. `masks` of
    `document_masks` keep it within documents (t = s); a mask of its own says what a single query sees (t = 1)."""
    t, s = q.shape[1], k.shape[1]
    if masks is not None:
        return _in_blocks(q, k, v, None, None, masks)
    if t == s:
        return attend(q, k, v, None, causal=True)
    return attend(q, k, v, None if t == 1 else _band(t, s, s, q.device))


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    prefix: tuple[Tensor, Tensor] | None = None,
    *,
    masks: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """Each token sees itself, the window - 1 tokens before it, and the whole prefix.

    Queries go in blocks of `window`, each against only the keys it can see, so cost is t * window and no mask grows with t.

    Args:
        q: [b, t, h, d], the last t of the s tokens. k, v: [b, s, h, d].
        prefix: keys and values [p, h, d] that every query sees.
        masks: of `document_masks`, which keep attention within documents (t = s), or what a single query sees (t = 1).

    Returns:
        [b, t, h, d].
    """
    return _in_blocks(q, k, v, window, prefix, masks)


def document_masks(places: Tensor, window: int | None, prefix: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What queries see where rows hold several documents: the prefix, and of their own document what the window shows.

    Args:
        places: int64 [b, t], the tokens of its document before each token.
        window: None: full attention.
        prefix: persistent tokens.
        dtype: of queries and keys.

    Returns:
        for each block of queries [b, 1, queries, prefix + keys], to be added to the scores: 0 or -inf. Made once for all
        layers, and a number rather than a bool, which every layer would turn into one, and keep.
    """
    t = places.shape[1]
    masks = []
    for start, stop, first in _blocks(t, t, window):
        tokens = torch.arange(first, stop, device=places.device)
        distance = tokens[start - first :, None] - tokens
        reach = places[:, start:stop, None]
        if window is not None:
            reach = reach.clamp(max=window - 1)
        hidden = F.pad((distance < 0) | (distance > reach), (prefix, 0), value=False)
        # Rows of a multiple of 8 numbers in memory: the GPU's kernels would copy others.
        width = hidden.shape[-1]
        mask = hidden.new_zeros((*hidden.shape[:-1], -(-width // 8) * 8), dtype=dtype)[..., :width]
        masks.append(mask.masked_fill_(hidden, -torch.inf)[:, None])
    return tuple(masks)


def segment_mask(first: int, length: int, retrieve_every: int, prefix: int, device: torch.device) -> Tensor:
    """What the queries at places first .. first + length of a MAC segment see: the prefix, then the retrieved h_j and the
    segment's own tokens S_j for j <= i only (method.md section 2).

    Returns:
        bool [length, prefix + (kept h_j so far) + first + length].
    """
    i = torch.arange(first, first + length, device=device)[:, None]
    own = torch.arange(first + length, device=device)
    retrieved = own[retrieve_every - 1 :: retrieve_every]
    always = torch.ones(length, prefix, dtype=torch.bool, device=device)
    return torch.cat((always, retrieved <= i, own <= i), dim=1)


def with_prefix(prefix: Tensor, x: Tensor) -> Tensor:
    """prefix [p, h, d] in front of every row of x [b, s, h, d]."""
    return torch.cat((prefix.expand(x.shape[0], -1, -1, -1), x), dim=1)


def _blocks(t: int, s: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first): queries start .. stop of the last t of s tokens, and the first key that one of them sees."""
    size = QUERY_BLOCK if window is None else window
    for start in range(0, t, size):
        yield start, min(start + size, t), 0 if window is None else max(0, s - t + start - window + 1)


def _in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    prefix: tuple[Tensor, Tensor] | None,
    masks: tuple[Tensor, ...] | None,
) -> Tensor:
    t, s = q.shape[1], k.shape[1]
    outputs = []
    for index, (start, stop, first) in enumerate(_blocks(t, s, window)):
        keys, values = k[:, first : s - t + stop], v[:, first : s - t + stop]
        mask = _band(stop - start, keys.shape[1], window or s, q.device) if masks is None else masks[index]
        if prefix is not None:
            keys, values = with_prefix(prefix[0], keys), with_prefix(prefix[1], values)
            mask = F.pad(mask, (prefix[0].shape[0], 0), value=True) if masks is None else mask
        outputs.append(attend(q[:, start:stop], keys, values, mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _band(t: int, s: int, window: int, device: torch.device) -> Tensor:
    """bool [t, s]: query i, the (s - t + i)-th token, sees itself and the window - 1 before it."""
    distance = torch.arange(s - t, s, device=device)[:, None] - torch.arange(s, device=device)
    return (distance >= 0) & (distance < window)
