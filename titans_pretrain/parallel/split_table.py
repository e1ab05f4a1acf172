"""Which dimension of which parameter is split over tensor ranks: the one table, and the two functions that follow it.

Knows names and sizes only, no ranks and no processes. Everything that must know how a parameter is split asks here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# By the end of the parameter's name, numbers left out. 0 is the outputs of a linear layer and the heads of what each head
# has of its own; 1 is the inputs of a linear layer; None is the same on every rank.
TABLE: dict[str, int | None] = {
    "embedding.weight": 0,
    "head.weight": 0,
    "attention.query.weight": 0,
    "attention.key.weight": 0,
    "attention.value.weight": 0,
    "attention.output.weight": 1,
    "memory.query.weight": 0,
    "memory.key.weight": 0,
    "memory.value.weight": 0,
    "memory.query_conv.weight": 0,
    "memory.key_conv.weight": 0,
    "memory.value_conv.weight": 0,
    # Rows are (head, layer of the memory network), head first, so a rank's heads are consecutive rows.
    "memory.theta_gate.weight": 0,
    "memory.theta_gate.bias": 0,
    "memory.eta_gate.weight": 0,
    "memory.eta_gate.bias": 0,
    "memory.alpha_gate.weight": 0,
    "memory.alpha_gate.bias": 0,
    "memory.initial_weights": 0,
    "memory.inner_norm_weight": 0,
    "memory.inner_norm_bias": 0,
    "memory.read_norm.weight": 0,
    "memory.read_gate.weight": 0,
    "memory.output.weight": 1,
    "recurrence.query.weight": 0,
    "recurrence.key.weight": 0,
    "recurrence.value.weight": 0,
    "recurrence.query_conv.weight": 0,
    "recurrence.key_conv.weight": 0,
    "recurrence.value_conv.weight": 0,
    "recurrence.decay_gate.weight": 0,
    "recurrence.decay_gate.bias": 0,
    "recurrence.log_rate": 0,
    "recurrence.write_gate.weight": 0,
    "recurrence.read_norm.weight": 0,
    "recurrence.read_gate.weight": 0,
    "recurrence.output.weight": 1,
    "feed_forward.gate.weight": 0,
    "feed_forward.up.weight": 0,
    "feed_forward.down.weight": 1,
    "persistent": None,
    "memory_tokens.weight": None,
    "mixer_norm.weight": None,
    "attention_norm.weight": None,
    "memory_norm.weight": None,
    "feed_forward_norm.weight": None,
    "norm.weight": None,
}

# Their rows are padded with zeros to a multiple of the ranks.
VOCABULARY = ("embedding.weight", "head.weight")


def split_dim(name: str) -> int | None:
    """The dimension along which the parameter `name` (of `Titans.named_parameters`) is split; None: replicated.

    Raises:
        KeyError: the table does not know the name.
    """
    return TABLE[_entry(name)]


def part_of(name: str, full: Tensor, rank: int, size: int) -> Tensor:
    """What rank `rank` of `size` holds of the parameter `name`, or of anything shaped like it (a moment, a gradient).

    Returns:
        a contiguous copy that does not keep `full` in memory; `full` itself where the parameter is replicated. Of the
        vocabulary, ceil(v / size) rows, zeros behind the last.

    Raises:
        KeyError: the table does not know the name.
        ValueError: the dimension does not divide, and is not the vocabulary.
    """
    entry = _entry(name)
    dim = TABLE[entry]
    if dim is None:
        return full
    length = full.shape[dim]
    if entry in VOCABULARY:
        rows = rows_per_rank(length, size)
        part = full[rank * rows : (rank + 1) * rows]
        return F.pad(part, (0, 0, 0, rows - part.shape[0])) if part.shape[0] < rows else part.clone()
    if length % size:
        raise ValueError(f"dimension {dim} of {name} ({length}) does not divide over {size} tensor ranks")
    part = full.narrow(dim, rank * (length // size), length // size)
    return part.clone(memory_format=torch.contiguous_format)


def whole_of(name: str, parts: Sequence[Tensor], vocab_size: int) -> Tensor:
    """Inverse of `part_of`: the tensor ranks' parts, in their order, joined and the vocabulary's padding dropped.

    Raises:
        KeyError: the table does not know the name.
    """
    entry = _entry(name)
    dim = TABLE[entry]
    if dim is None:
        return parts[0]
    whole = torch.cat(list(parts), dim=dim)
    return whole[:vocab_size] if entry in VOCABULARY else whole


def rows_per_rank(vocab_size: int, size: int) -> int:
    """Rows of the vocabulary on each of `size` tensor ranks, padding included."""
    return -(-vocab_size // size)


def _entry(name: str) -> str:
    """The table's key for a parameter."""
    plain = re.sub(r"\.\d+(?=\.|$)", "", name)
    for ending in TABLE:
        if plain == ending or plain.endswith("." + ending):
            return ending
    raise KeyError(f"parallel/split_table.py does not say how parameter {name} is split")
