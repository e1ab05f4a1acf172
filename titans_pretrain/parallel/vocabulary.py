"""The embedding, the output head and its cross entropy where each tensor rank has its share of the vocabulary's rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.model.layers import chunked_loss
from titans_pretrain.parallel.collectives import all_reduced, copy_to, gather_last, sum_over
from titans_pretrain.parallel.grid import Axis
from titans_pretrain.parallel.split_table import rows_per_rank


class VocabularyShare(NamedTuple):
    """Which tokens' rows this rank holds."""

    axis: Axis
    vocab_size: int

    @property
    def first(self) -> int:
        """The first token held here."""
        return self.axis.rank * rows_per_rank(self.vocab_size, self.axis.size)

    @property
    def held(self) -> int:
        """Rows that stand for a token; those behind them are padding."""
        return min(max(self.vocab_size - self.first, 0), rows_per_rank(self.vocab_size, self.axis.size))

    def find(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens int64 -> their rows here, 0 where another rank has them; and bool, where another rank has them.

        What is no token at all stays out of range, so that the look-up fails as it does in one process.
        """
        rows = tokens - self.first
        elsewhere = ((rows < 0) | (rows >= self.held)) & (tokens >= 0) & (tokens < self.vocab_size)
        return rows.masked_fill(elsewhere, 0), elsewhere


class VocabularyEmbedding(nn.Module):
    """nn.Embedding with this rank's rows: tokens of other ranks give zeros, and the sum over ranks has every row."""

    def __init__(self, weight: nn.Parameter, share: VocabularyShare) -> None:
        super().__init__()
        self.weight = weight
        self.share = share

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [b, t] -> [b, t, c]."""
        rows, elsewhere = self.share.find(tokens)
        return sum_over(F.embedding(rows, self.weight).masked_fill(elsewhere[..., None], 0.0), self.share.axis)


class VocabularyHead(nn.Module):
    """LanguageModelHead with this rank's rows. No rank ever holds all columns of the loss's logits."""

    def __init__(self, weight: nn.Parameter, share: VocabularyShare, loss_chunk: int) -> None:
        super().__init__()
        self.weight = weight
        self.share = share
        self.loss_chunk = loss_chunk

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden [b, t, c] -> fp32 logits [b, t, v]; with labels int64 [b, t] -> the fp32 sum of the token losses in nats.
        Both are the same on every tensor rank."""
        hidden = copy_to(hidden, self.share.axis)
        if labels is None:
            logits = F.linear(hidden, self.weight).to(torch.promote_types(hidden.dtype, torch.float32))
            return gather_last(logits, self.share.axis)[..., : self.share.vocab_size]
        return chunked_loss(hidden, self.weight, labels, self.loss_chunk, self._cross_entropy)

    def _cross_entropy(self, logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
        """See model.layers.cross_entropy; logits are this rank's columns."""
        columns, elsewhere = self.share.find(targets[:, None])
        at_target = logits.gather(1, columns).masked_fill(elsewhere, 0.0)
        logits[:, self.share.held :] = -torch.inf
        maximum = all_reduced(logits.amax(dim=-1, keepdim=True), self.share.axis, dist.ReduceOp.MAX)
        exponentials = logits.sub_(maximum).exp_()
        sums = all_reduced(torch.cat((exponentials.sum(-1, keepdim=True), at_target), dim=1), self.share.axis)
        normaliser, at_target = sums[:, :1], sums[:, 1:]
        if gradient:
            exponentials.div_(normaliser)
            exponentials.scatter_add_(1, columns, elsewhere.to(exponentials.dtype) - 1.0)
        return (maximum + normaliser.log() - at_target)[:, 0]
