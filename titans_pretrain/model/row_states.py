"""How are the rows of each kind of state selected and joined? The parts behind rows.select_rows and rows.join_states.

Where rows agree on a place (the offset in a chunk, the place in a segment, a length), a part keeps one number for all; where
they differ, a tensor of one for each row, and room in which every row finds its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.config import ModelConfig
from titans_pretrain.memory import MemoryState
from titans_pretrain.model.attention import AttentionState
from titans_pretrain.model.blocks import HybridState, MACState
from titans_pretrain.model.neural_memory import MemoryLayerState
from titans_pretrain.model.recurrence import RecurrenceState, RecurrentHybridState
from titans_pretrain.model.rmt import RMTState


def select_part(part: Any, rows: Tensor, config: ModelConfig) -> Any:
    """The rows `rows` (int64) of a part of a state."""
    if isinstance(part, HybridState):
        return HybridState(select_part(part.memory, rows, config), select_part(part.attention, rows, config))
    if isinstance(part, MemoryLayerState):
        return _select_layer(part, rows, rows_agree=True)
    if isinstance(part, AttentionState):
        lengths = None if part.row_lengths is None else part.row_lengths[rows]
        return _settle_attention(AttentionState(part.keys[rows], part.values[rows], lengths))
    if isinstance(part, RecurrenceState):
        q, k, v = (x[rows] for x in part.tails)
        return RecurrenceState((q, k, v), part.state[rows])
    if isinstance(part, RecurrentHybridState):
        return RecurrentHybridState(
            select_part(part.recurrence, rows, config), select_part(part.attention, rows, config)
        )
    if isinstance(part, RMTState):
        return _select_rmt(part, rows, config)
    assert isinstance(part, MACState), type(part)
    recalled = tuple(w[rows] for w in part.recalled)
    context = None
    if part.context is not None:
        h, own = (AttentionState(x.keys[rows], x.values[rows]) for x in part.context)
        context = (h, own)
    place, row_places = part.place, None
    if part.row_places is not None:
        row_places = part.row_places[rows]
        places = row_places.tolist()
        if len(set(places)) == 1:
            assert context is not None
            place, row_places = places[0], None
            context = _context_until(context, place, config) if place else None
    memory = _select_layer(part.memory, rows, rows_agree=row_places is None)
    return MACState(memory, recalled, part.recall_tail[rows], context, place, row_places)


def _select_rmt(part: RMTState, rows: Tensor, config: ModelConfig) -> RMTState:
    caches = tuple(AttentionState(cache.keys[rows], cache.values[rows]) for cache in part.caches)
    place, row_places = part.place, None
    if part.row_places is not None:
        row_places = part.row_places[rows]
        places = row_places.tolist()
        if len(set(places)) == 1:
            place, row_places = places[0], None
            filled = slice(config.num_memory_tokens + place)
            caches = tuple(
                AttentionState(c.keys[:, filled].contiguous(), c.values[:, filled].contiguous()) for c in caches
            )
    return RMTState(part.memory[rows], caches, place, row_places)


def _join_rmt(parts: Sequence[RMTState], config: ModelConfig) -> RMTState:
    memory = torch.cat([p.memory for p in parts])
    places = torch.cat([_per_row(p.place, p.row_places, len(p.memory), memory.device) for p in parts])
    agree = len(set(places.tolist())) == 1 and all(p.row_places is None for p in parts)
    room = parts[0].place if agree else config.segment_len
    room += config.num_memory_tokens
    caches = []
    for block in zip(*(p.caches for p in parts), strict=True):
        keys, values = (torch.cat([_with_room(cache[i], room) for cache in block]) for i in range(2))
        caches.append(AttentionState(keys, values))
    return RMTState(memory, tuple(caches), parts[0].place if agree else 0, None if agree else places)


def _select_layer(layer: MemoryLayerState, rows: Tensor, rows_agree: bool) -> MemoryLayerState:
    """`rows_agree`: one offset stands for all where it is the same; a MAC block whose rows differ ends chunks by row."""
    q, k, v = (x[rows] for x in layer.tails)
    old = layer.memory
    weights, momentum, anchor = (tuple(x[rows] for x in field) for field in old[:3])
    offset, row_offsets = old.offset, None
    if old.row_offsets is not None:
        row_offsets = old.row_offsets[rows]
        offsets = row_offsets.tolist()
        if rows_agree and len(set(offsets)) == 1:
            offset, row_offsets = offsets[0], None
    return MemoryLayerState((q, k, v), MemoryState(weights, momentum, anchor, offset, row_offsets))


def join_parts(parts: Sequence[Any], config: ModelConfig) -> Any:
    """One part with the rows of all `parts`, in order."""
    first = parts[0]
    if isinstance(first, HybridState):
        return HybridState(
            join_parts([p.memory for p in parts], config), join_parts([p.attention for p in parts], config)
        )
    if isinstance(first, MemoryLayerState):
        return _join_layers(parts, rows_agree=True)
    if isinstance(first, AttentionState):
        return _join_attention(parts)
    if isinstance(first, RecurrenceState):
        q, k, v = (torch.cat([p.tails[i] for p in parts]) for i in range(3))
        return RecurrenceState((q, k, v), torch.cat([p.state for p in parts]))
    if isinstance(first, RecurrentHybridState):
        recurrence = join_parts([p.recurrence for p in parts], config)
        return RecurrentHybridState(recurrence, _join_attention([p.attention for p in parts]))
    if isinstance(first, RMTState):
        return _join_rmt(parts, config)
    assert isinstance(first, MACState), type(first)
    recalled = tuple(torch.cat(xs) for xs in zip(*(p.recalled for p in parts), strict=True))
    tail = torch.cat([p.recall_tail for p in parts])
    places = [_per_row(p.place, p.row_places, len(p.recall_tail), tail.device) for p in parts]
    agree = len({int(x) for p in places for x in p.tolist()}) == 1 and all(p.row_places is None for p in parts)
    memory = _join_layers([p.memory for p in parts], rows_agree=agree)
    if agree:
        joined = None
        if first.context is not None:
            h, own = (_join_attention([p.context[i] for p in parts]) for i in range(2))
            joined = (h, own)
        return MACState(memory, recalled, tail, joined, first.place)
    like = next(p.context[1] for p in parts if p.context is not None)
    rooms = [_context_room(p, like, config) for p in parts]
    h, own = (
        AttentionState(torch.cat([r[i].keys for r in rooms]), torch.cat([r[i].values for r in rooms])) for i in range(2)
    )
    return MACState(memory, recalled, tail, (h, own), 0, torch.cat(places))


def _join_layers(layers: Sequence[MemoryLayerState], rows_agree: bool) -> MemoryLayerState:
    """`rows_agree` as in `_select_layer`."""
    q, k, v = (torch.cat([layer.tails[i] for layer in layers]) for i in range(3))
    memories = [layer.memory for layer in layers]
    weights, momentum, anchor = (
        tuple(torch.cat(xs) for xs in zip(*(m[i] for m in memories), strict=True)) for i in range(3)
    )
    offsets = torch.cat([_per_row(m.offset, m.row_offsets, len(m.weights[0]), q.device) for m in memories])
    values = set(offsets.tolist())
    if rows_agree and len(values) == 1:
        return MemoryLayerState((q, k, v), MemoryState(weights, momentum, anchor, values.pop()))
    return MemoryLayerState((q, k, v), MemoryState(weights, momentum, anchor, 0, offsets))


def _join_attention(parts: Sequence[AttentionState]) -> AttentionState:
    longest = max(p.keys.shape[1] for p in parts)
    lengths = torch.cat([_per_row(p.keys.shape[1], p.row_lengths, len(p.keys), p.keys.device) for p in parts])
    keys, values = (
        torch.cat([F.pad(x, (0, 0, 0, 0, longest - x.shape[1], 0)) for x in xs])
        for xs in ([p.keys for p in parts], [p.values for p in parts])
    )
    return _settle_attention(AttentionState(keys, values, lengths))


def _settle_attention(state: AttentionState) -> AttentionState:
    """Without what no row sees any more; without lengths where rows agree."""
    if state.row_lengths is None:
        return state
    lengths = state.row_lengths.tolist()
    spare = state.keys.shape[1] - max(lengths)
    same = len(set(lengths)) == 1
    keys, values = (x[:, spare:].contiguous() for x in state[:2])
    return AttentionState(keys, values, None if same else state.row_lengths)


def _context_until(
    context: tuple[AttentionState, AttentionState], place: int, config: ModelConfig
) -> tuple[AttentionState, AttentionState]:
    """From room for a whole segment to what is filled at `place`."""
    h, own = context
    kept = place // config.retrieve_every
    return (
        AttentionState(h.keys[:, :kept].contiguous(), h.values[:, :kept].contiguous()),
        AttentionState(own.keys[:, :place].contiguous(), own.values[:, :place].contiguous()),
    )


def _context_room(state: MACState, like: AttentionState, config: ModelConfig) -> tuple[AttentionState, AttentionState]:
    """The context with room for a whole segment; `like` says of what shape and dtype a token of it is."""
    if state.row_places is not None:
        assert state.context is not None
        return state.context
    rooms = []
    for i, length in enumerate((config.segment_len // config.retrieve_every, config.segment_len)):
        if state.context is None:
            empty = like.keys.new_zeros(len(state.recall_tail), length, *like.keys.shape[2:])
            rooms.append(AttentionState(empty, empty))
        else:
            keys, values = (_with_room(x, length) for x in state.context[i][:2])
            rooms.append(AttentionState(keys, values))
    return rooms[0], rooms[1]


def _with_room(x: Tensor, length: int) -> Tensor:
    """x [b, s, h, d] with zeros behind it up to `length`."""
    return F.pad(x, (0, 0, 0, 0, 0, length - x.shape[1]))


def _per_row(same: int, differing: Tensor | None, rows: int, device: torch.device) -> Tensor:
    return torch.full((rows,), same, dtype=torch.int64, device=device) if differing is None else differing
