"""The Gated DeltaNet mixer (arXiv 2412.06464): a matrix per head that decays and is corrected, key by key.

As the public model, with values as wide as keys: a second width for values would be one more setting, and what it buys in state
`memory_heads` buys too. A head is memory_head_dim wide; 128 is the paper's choice of speed against quality.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.config import ModelConfig
from titans_pretrain.model.delta_rule import gated_delta_rule
from titans_pretrain.model.documents import Documents
from titans_pretrain.model.layers import RMSNorm, unit
from titans_pretrain.model.recurrence import Recurrence, RecurrenceState
from titans_pretrain.model.sequence import LocalSequence


class GatedDeltaNet(Recurrence):
    """log decay = -exp(log_rate) * softplus(linear(x)), where -softplus(x) is logsigmoid(-x); beta = sigmoid(linear(x)). The
    read leaves by a norm, a gate and a projection, as the neural memory's does."""

    def __init__(self, config: ModelConfig, sequence: LocalSequence) -> None:
        super().__init__(config, sequence)
        dim, heads = config.dim, config.resolved_memory_heads
        self.decay_gate = nn.Linear(dim, heads)
        self.log_rate = nn.Parameter(torch.empty(heads))
        self.write_gate = nn.Linear(dim, heads, bias=False)
        self.read_norm = RMSNorm(heads, self.head_dim, eps=config.norm_eps)
        self.read_gate = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, state: RecurrenceState | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, RecurrenceState]:
        """See Recurrence.forward."""
        convolved, tails = self.convolved(x, state, documents)
        q, k, v = (F.silu(y) for y in convolved)
        wide = torch.promote_types(x.dtype, torch.float32)
        log_decay = self.log_rate.to(wide).exp() * F.logsigmoid(-self.decay_gate(x).to(wide))
        beta = torch.sigmoid(self.write_gate(x).to(wide))
        shape = (len(q), q.shape[2], q.shape[3], v.shape[3])
        before = q.new_zeros(shape, dtype=wide) if state is None else state.state
        starts = None if documents is None else documents.starts
        read, after = self.sequence.recurrence(gated_delta_rule, (unit(q), unit(k), v, log_decay, beta), before, starts)
        y = self.output(self.read_norm(read).flatten(-2) * F.silu(self.read_gate(x)))
        return y, RecurrenceState(tails, after)
