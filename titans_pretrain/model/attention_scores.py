"""Attention over earlier tokens as functions on tensors: full, windowed, and the mask of a MAC segment.

Shapes: b batch, t queries, s keys, p prefix (persistent) tokens, h heads, d head_dim. Every function takes queries of
the last t of s tokens, so decoding one token and training on thousands are the same call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention. q [b, t, h, d], k and v [b, s, h, d], mask bool [t, s] (True: visible) -> [b, t, h, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full causal attention of the last t of s tokens. q [b, t, h, d], k and v [b, s, h, d] -> [b, t, h, d]."""
    t, s = q.shape[1], k.shape[1]
    if t == s:
        return attend(q, k, v, None, causal=True)
    return attend(q, k, v, None if t == 1 else _band(t, s, s, q.device))


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, prefix: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Each token sees itself, the window - 1 tokens before it, and the whole prefix.

    Queries go in blocks of `window`, each against only the keys it can see, so cost is t * window and no mask grows with t.

    Args:
        q: [b, t, h, d], the last t of the s tokens. k, v: [b, s, h, d].
        prefix: keys and values [p, h, d] that every query sees.

    Returns:
        [b, t, h, d].
    """
    t, s = q.shape[1], k.shape[1]
    earlier = s - t
    outputs = []
    for start in range(0, t, window):
        stop = min(start + window, t)
        first = max(0, earlier + start - window + 1)
        keys, values = k[:, first : earlier + stop], v[:, first : earlier + stop]
        mask = _band(stop - start, keys.shape[1], window, q.device)
        if prefix is not None:
            keys, values = with_prefix(prefix[0], keys), with_prefix(prefix[1], values)
            mask = F.pad(mask, (prefix[0].shape[0], 0), value=True)
        outputs.append(attend(q[:, start:stop], keys, values, mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


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


def _band(t: int, s: int, window: int, device: torch.device) -> Tensor:
    """bool [t, s]: query i, the (s - t + i)-th token, sees itself and the window - 1 before it."""
    distance = torch.arange(s - t, s, device=device)[:, None] - torch.arange(s, device=device)
    return (distance >= 0) & (distance < window)
