"""The arguments of one memory scan, as the strategies of sequence parallelism pass them around."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from titans_pretrain.memory import MemoryOptions, MemoryState, initial_state, scan_dtype


class ScanCall(NamedTuple):
    """The positional arguments of `memory.memory_scan`, which has their shapes, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_gamma: Tensor | None
    log_eta: Tensor | None
    theta: Tensor
    initial_weights: tuple[Tensor, ...]
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    state: MemoryState | None
    options: MemoryOptions

    def start(self) -> MemoryState:
        """The state to go on from, in the dtype of the scan."""
        dtype = scan_dtype(self.q, self.k, self.v, self.initial_weights)
        if self.state is None:
            return initial_state(tuple(w.to(dtype) for w in self.initial_weights), self.q.shape[0])
        weights, momentum, anchor = (tuple(x.to(dtype) for x in field) for field in self.state[:3])
        return MemoryState(weights, momentum, anchor, self.state.offset)


ScanReturn = tuple[Any, ...]
"""What `memory_scan` returns: outputs, state, and the signals if asked for."""
