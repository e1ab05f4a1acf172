"""The sequence seam: the operations of a block that look beyond its own tokens, as one process does them.

A block reaches other tokens only through the object it was given. `parallel/sequence.py` supplies the distributed one;
the model does not know which it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from titans_pretrain.config import ModelConfig
from titans_pretrain.memory import memory_scan
from titans_pretrain.model.attention_scores import causal_attention, window_attention
from titans_pretrain.model.documents import Documents, extend_pieces, find_documents


class LocalSequence:
    """All tokens of the sequence are here."""

    def whole(self) -> AbstractContextManager[None]:
        """Inside it every call is about tokens that are all here: evaluation, decoding, the persistent tokens."""
        return nullcontext()

    def positions(self, start: int, length: int, device: torch.device) -> Tensor:
        """Positions, int64 [length], of the tokens at hand, the first of the whole sequence being `start`."""
        return torch.arange(start, start + length, device=device)

    def documents(self, starts: Tensor, config: ModelConfig, dtype: torch.dtype) -> Documents:
        """See documents.find_documents."""
        return find_documents(starts, config, dtype)

    def extend(self, x: Tensor, earlier: Tensor | None, length: int) -> Tensor:
        """x [b, t, ...] -> [b, length + t, ...]: the `length` tokens before x, `earlier` or zeros, in front of it."""
        if length == 0:
            return x
        if earlier is None:
            earlier = x.new_zeros(x.shape[0], length, *x.shape[2:])
        return torch.cat((earlier, x), dim=1)

    def extend_pieces(self, x: Tensor, earlier: Tensor | None, length: int, documents: Documents) -> Tensor:
        """See documents.extend_pieces."""
        return extend_pieces(x, earlier, length, documents)

    def window_attention(self, *args: Any, **kwargs: Any) -> Tensor:
        """See attention_scores.window_attention."""
        return window_attention(*args, **kwargs)

    def causal_attention(self, *args: Any, **kwargs: Any) -> Tensor:
        """See attention_scores.causal_attention."""
        return causal_attention(*args, **kwargs)

    def memory_scan(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """See titans_pretrain.memory.memory_scan."""
        return memory_scan(*args, **kwargs)

    def recurrence(
        self,
        scan: Callable[..., tuple[Tensor, Tensor]],
        per_token: Sequence[Tensor],
        state: Tensor,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`scan(*per_token, state, starts)` -> what it reads, [b, t, h, d], and the state after the last token here.

        per_token: tensors [b, t, h, ...] with what each head takes of each token; a head does not see the others.
        state: [b, h, ...] before the sequence.
        starts: bool [b, t], the tokens that begin a document.
        """
        return scan(*per_token, state, starts)

    def memory_before(self, start: Any) -> Any:
        """A MAC block's neural_memory.MemoryLayerState before its first segment here; `start` where the sequence begins."""
        return start

    def hand_on_memory(self, output: Tensor, state: Any) -> Tensor:
        """`output`, once the next segments know of the block's `state` after its last segment here."""
        return output

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For torch.utils.checkpoint's `context_fn`: what its first run of a block goes in, and what its second."""
        return nullcontext(), nullcontext()
