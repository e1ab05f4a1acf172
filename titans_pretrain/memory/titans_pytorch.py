"""Where does the state of titans-pytorch's NeuralMemory (0.5) go in ours? For those who have one, and as an independent check.

Its update with `chunk_size=1` and `batch_size=C` is ours with chunk_size C, one set of gates for all matrices and forgetting
toward zero: gates per token, gradients at the weights of the last multiple of C tokens. Its loss is a mean over channels, ours
half a sum, so theta = 2 / head_dim * its step. What lies around the update differs (docs/importing.md).

Only tensors and attribute names of its state are used here; the package need not be installed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from titans_pretrain.errors import UserError
from titans_pretrain.memory.state import MemoryState


def import_state(state: Any, heads: int, chunk_size: int) -> MemoryState:
    """The memory where its forward left off, for `memory_scan(..., options=MemoryOptions(chunk_size, forget_toward="zero"))`.

    Args:
        state: its NeuralMemState: `weights` (the point of the gradients) and `states` (last weights, momentum), each a mapping
            from weights.0, weights.1, ... to [b * heads, in, out], of the momentum [1, b * heads, in, out]; `seq_index`;
            `cache_store_segment`.
        heads: its `heads`.
        chunk_size: its `batch_size`, the tokens between two points at which gradients are taken.

    Raises:
        UserError: the memory is of another kind: its network is no plain MLP, it has momentum of a higher order, or tokens
            wait for their chunk to fill.
    """
    if state.cache_store_segment is not None and state.cache_store_segment.shape[-2]:
        raise UserError(
            f"{state.cache_store_segment.shape[-2]} tokens wait in the state for their chunk to fill, which is a rule the "
            "memory here does not have; only the state of a NeuralMemory with chunk_size=1 can be imported"
        )
    weights, momentum = state.states
    names = list(weights.keys())
    expected = [f"weights.{i}" for i in range(len(names))]
    if sorted(names) != expected:
        raise UserError(
            f"the state's network has the parameters {', '.join(names)}, not weights.0, weights.1, ...: only that of a "
            "MemoryMLP with mem_model_norm_add_residual=False can be imported; its norm changes at test time, ours does not"
        )
    orders = {len(momentum[name]) for name in names}
    if orders != {1}:
        raise UserError(
            f"the state has momentum of order {max(orders)}; only that of a NeuralMemory with momentum_order=1 fits"
        )
    rows = len(weights[names[0]])
    if rows % heads:
        raise UserError(
            f"the state has {rows} memories, which {heads} heads do not divide; name the heads it was made with"
        )

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, heads))

    return MemoryState(
        tuple(by_head(weights[name]) for name in expected),
        tuple(by_head(momentum[name][0]) for name in expected),
        tuple(by_head(state.weights[name]) for name in expected),
        state.seq_index % chunk_size,
    )
