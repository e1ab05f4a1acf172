"""Linear attention (arXiv 2006.16236): attention whose weights are phi(q) phi(k), phi = elu + 1, as a sum carried along.

The published operator with its normaliser, so that a read is a mean of values as in softmax attention; no norm or gate after
it. One thing is added: the convolutions that every recurrent model here has (`conv_kernel`), since without them, or
positions, a causal sum knows nothing of order.

Shapes: b batch, t time, h heads, d head_dim, n chunks of c tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.model.chunks import CHUNK, cut_tokens, decays, join_tokens
from titans_pretrain.model.documents import Documents
from titans_pretrain.model.recurrence import Recurrence, RecurrenceState

EPS = 1e-6
"""Added to the normaliser, as in the authors' code."""


def feature(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1. Not by F.elu, of whose gradient torch.compile (2.13) expects other strides than it has."""
    return x.clamp(max=0.0).exp() + x.relu()


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sum_{j<=i} phi(q_i) phi(k_j) v_j / sum_{j<=i} phi(q_i) phi(k_j), over the tokens so far.

    Args:
        q, k, v: [b, t, h, d]; phi is applied here.
        state: [b, h, d, d + 1] before the first token, fp32 or wider: sums of phi(k) v^T, and of phi(k) in the last column.
        starts: bool [b, t], true where the token begins a document: it finds a state of zeros.

    Returns:
        [b, t, h, d] in v's dtype; the state after the last token.
    """
    length = q.shape[1]
    size = min(CHUNK, length)
    padded = F.pad(v.to(state.dtype), (0, 1), value=1.0)
    read, key, value = (cut_tokens(x, size) for x in (feature(q.to(state.dtype)), feature(k.to(state.dtype)), padded))
    kept = decays(torch.zeros_like(read[..., 0]), starts, size)
    inside = (read @ key.mT * kept.within) @ value
    added = (key * kept.out_of).mT @ value
    outputs = []
    for reads, own, new, over in zip(*(x.unbind(2) for x in (read * kept.into, inside, added, kept.over)), strict=True):
        outputs.append(reads @ state + own)
        state = over * state + new
    sums = join_tokens(torch.stack(outputs, dim=2), length)
    return (sums[..., :-1] / (sums[..., -1:] + EPS)).to(v.dtype), state


class LinearAttention(Recurrence):
    """As many parameters as attention has, and the convolutions'."""

    def forward(
        self, x: Tensor, state: RecurrenceState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, RecurrenceState]:
        """See Recurrence.forward."""
        (q, k, v), tails = self.convolved(x, state, documents)
        wide = torch.promote_types(x.dtype, torch.float32)
        shape = (len(q), q.shape[2], q.shape[3], v.shape[3] + 1)
        before = q.new_zeros(shape, dtype=wide) if state is None else state.state
        starts = None if documents is None else documents.starts
        read, after = self.sequence.recurrence(linear_attention, (q, k, v), before, starts)
        return self.output(read.flatten(-2)), RecurrenceState(tails, after)
