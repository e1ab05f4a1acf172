"""The sequence seam over several ranks: each holds a slice of every sequence, t = T / P tokens, in rank order.

What a block asks of other tokens is answered by messages: the ends of the ranks before (convolutions, attention over a
window), an exchange of tokens for heads (full attention, `head_exchange`), the memory's state (`hand_off`, `chunk_scan`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from titans_pretrain.config import ModelConfig
from titans_pretrain.errors import UserError
from titans_pretrain.memory import MemoryOptions, MemoryState
from titans_pretrain.model.documents import Documents
from titans_pretrain.model.neural_memory import MemoryLayerState
from titans_pretrain.model.sequence import LocalSequence
from titans_pretrain.parallel.chunk_scan import scan_chunks_together
from titans_pretrain.parallel.exchange import causal_attention_by_heads, recurrence_by_heads, scan_by_heads
from titans_pretrain.parallel.grid import Axis
from titans_pretrain.parallel.neighbours import (
    Neighbours,
    Recording,
    Replaying,
    halo,
    receive_layer_state,
    recurrence_handed_on,
    scan_and_hand_on,
    send_layer_state_along,
)
from titans_pretrain.parallel.scan_call import ScanCall, ScanReturn

STRATEGIES: dict[str, Callable[[Neighbours, ScanCall, bool], ScanReturn]] = {
    "head_exchange": lambda neighbours, call, return_signals: scan_by_heads(neighbours.axis, call, return_signals),
    "hand_off": scan_and_hand_on,
    "chunk_scan": scan_chunks_together,
}


class ShardedSequence(LocalSequence):
    """This rank has tokens rank * t .. (rank + 1) * t - 1 of every sequence; t is the same on all ranks of `axis`.

    Args:
        strategy: how the memory is scanned, of STRATEGIES; layout.py says which a config allows.
    """

    def __init__(self, axis: Axis, strategy: str) -> None:
        self._axis = axis
        self._scan = STRATEGIES[strategy]
        self._strategy = strategy
        self._neighbours = Neighbours(axis)
        self._all_here = axis.size == 1

    @contextmanager
    def whole(self) -> Iterator[None]:
        before, self._all_here = self._all_here, True
        try:
            yield
        finally:
            self._all_here = before

    def positions(self, start: int, length: int, device: torch.device) -> Tensor:
        """See LocalSequence, as for all of these."""
        return super().positions(start + (0 if self._all_here else self._axis.rank * length), length, device)

    def documents(self, starts: Tensor, config: ModelConfig, dtype: torch.dtype) -> Documents:
        if not self._all_here:
            raise UserError("documents that begin inside a row need the whole row on one rank: set parallel.sequence=1")
        return super().documents(starts, config, dtype)

    def extend(self, x: Tensor, earlier: Tensor | None, length: int) -> Tensor:
        if self._all_here or length == 0:
            return super().extend(x, earlier, length)
        (before,) = halo(self._neighbours, [x], length)
        missing = length - before.shape[1]
        if earlier is None:
            earlier = x.new_zeros(x.shape[0], missing, *x.shape[2:])
        # Where nothing is missing `earlier` still takes part, with none of its tokens, and has a gradient.
        return torch.cat((earlier[:, earlier.shape[1] - missing :], before, x), dim=1)

    def window_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int,
        prefix: tuple[Tensor, Tensor] | None = None,
        *,
        masks: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        if not self._all_here and window > 1:
            k, v = (
                torch.cat((before, x), dim=1)
                for before, x in zip(halo(self._neighbours, (k, v), window - 1), (k, v), strict=True)
            )
        return super().window_attention(q, k, v, window, prefix, masks=masks)

    def causal_attention(self, q: Tensor, k: Tensor, v: Tensor, *, masks: tuple[Tensor, ...] | None = None) -> Tensor:
        if self._all_here:
            return super().causal_attention(q, k, v, masks=masks)
        return causal_attention_by_heads(self._axis, q, k, v)

    def memory_scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_gamma: Tensor | None,
        log_eta: Tensor | None,
        theta: Tensor,
        initial_weights: tuple[Tensor, ...],
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        state: MemoryState | None,
        options: MemoryOptions,
        *,
        document_starts: Tensor | None = None,
        fresh: MemoryState | None = None,
        return_signals: bool = False,
    ) -> tuple[Any, ...]:
        """The state and the signals returned are this rank's part, whatever the strategy makes that: after its tokens, or
        after all of them for its heads."""
        call = ScanCall(
            q, k, v, log_gamma, log_eta, theta, initial_weights, norm_weight, norm_bias, state, options
        )  # fmt: skip
        if self._all_here:
            return super().memory_scan(
                *call, document_starts=document_starts, fresh=fresh, return_signals=return_signals
            )
        return self._scan(self._neighbours, call, return_signals)

    def recurrence(
        self,
        scan: Callable[..., tuple[Tensor, Tensor]],
        per_token: Sequence[Tensor],
        state: Tensor,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if self._all_here:
            return super().recurrence(scan, per_token, state, starts)
        assert starts is None, "documents need the whole row on one rank"
        if self._strategy == "hand_off":
            return recurrence_handed_on(self._neighbours, scan, per_token, state)
        assert self._strategy == "head_exchange", "layout.py refuses others"
        return recurrence_by_heads(self._axis, scan, per_token, state)

    def memory_before(self, start: MemoryLayerState) -> MemoryLayerState:
        return start if self._all_here else receive_layer_state(self._neighbours, start)

    def hand_on_memory(self, output: Tensor, state: MemoryLayerState) -> Tensor:
        return output if self._all_here else send_layer_state_along(self._neighbours, state, output)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The second run takes what the first received: the ranks before this one are then waiting for its gradients."""
        messages: list[list[Tensor]] = []
        return Recording(self._neighbours, messages), Replaying(self._neighbours, messages)
