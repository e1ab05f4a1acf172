"""How do sequences of different lengths share a batch? Rows of states are selected, joined, and read into together.

A batch whose rows have consumed different numbers of tokens has a `ModelState` that says for each row where it stands
(`row_positions` and its like in the parts; None where rows agree). `Titans.hidden` takes such a state and one token for each
row: that is decoding. More tokens at a time are for rows that agree, so `read_rows` reads prompts of different lengths in
groups: all rows as far as the shortest goes, the others on to the next shortest, and so on. Every row's result is that of
the row alone.
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
from titans_pretrain.model.titans import ModelState, Titans

# ---------------------------------------------------------------------------------------------------- rows of a state


def count_rows(state: ModelState) -> int:
    """The batch size of a state."""
    part: Any = state.blocks[0]
    while not isinstance(part, Tensor):
        part = part[0]
    return part.shape[0]


def row_positions(state: ModelState) -> list[int]:
    """Tokens consumed by each row."""
    if state.row_positions is None:
        return [state.position] * count_rows(state)
    return state.row_positions.tolist()


def select_rows(state: ModelState, indices: Sequence[int] | Tensor, config: ModelConfig) -> ModelState:
    """The rows `indices` of `state`, in that order, as a copy; a row may come several times (beams) or not at all."""
    device = _device(state)
    rows = torch.as_tensor(indices, dtype=torch.int64, device=device)
    if rows.dim() != 1 or not len(rows):
        raise ValueError(f"indices must name at least one row, not {list(rows.shape)}")
    blocks = tuple(_select(block, rows, config) for block in state.blocks)
    if state.row_positions is None:
        return ModelState(state.position, blocks)
    return _with_positions(state.row_positions[rows].tolist(), blocks, device)


def join_states(states: Sequence[ModelState], config: ModelConfig) -> ModelState:
    """One state with the rows of all `states`, in order. They may stand at different positions."""
    if len(states) == 1:
        return states[0]
    blocks = tuple(_join(parts, config) for parts in zip(*(s.blocks for s in states), strict=True))
    return _with_positions([p for s in states for p in row_positions(s)], blocks, _device(states[0]))


def _with_positions(positions: list[int], blocks: tuple[Any, ...], device: torch.device) -> ModelState:
    differ = len(set(positions)) > 1
    return ModelState(max(positions), blocks, torch.tensor(positions, device=device) if differ else None)


def _device(state: ModelState) -> torch.device:
    part: Any = state.blocks[0]
    while not isinstance(part, Tensor):
        part = part[0]
    return part.device


def _select(part: Any, rows: Tensor, config: ModelConfig) -> Any:
    if isinstance(part, HybridState):
        return HybridState(_select(part.memory, rows, config), _select(part.attention, rows, config))
    if isinstance(part, MemoryLayerState):
        return _select_layer(part, rows, rows_agree=True)
    if isinstance(part, AttentionState):
        lengths = None if part.row_lengths is None else part.row_lengths[rows]
        return _settle_attention(AttentionState(part.keys[rows], part.values[rows], lengths))
    if isinstance(part, RecurrenceState):
        q, k, v = (x[rows] for x in part.tails)
        return RecurrenceState((q, k, v), part.state[rows])
    if isinstance(part, RecurrentHybridState):
        return RecurrentHybridState(_select(part.recurrence, rows, config), _select(part.attention, rows, config))
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


def _join(parts: Sequence[Any], config: ModelConfig) -> Any:
    first = parts[0]
    if isinstance(first, HybridState):
        return HybridState(_join([p.memory for p in parts], config), _join([p.attention for p in parts], config))
    if isinstance(first, MemoryLayerState):
        return _join_layers(parts, rows_agree=True)
    if isinstance(first, AttentionState):
        return _join_attention(parts)
    if isinstance(first, RecurrenceState):
        q, k, v = (torch.cat([p.tails[i] for p in parts]) for i in range(3))
        return RecurrenceState((q, k, v), torch.cat([p.state for p in parts]))
    if isinstance(first, RecurrentHybridState):
        recurrence = _join([p.recurrence for p in parts], config)
        return RecurrentHybridState(recurrence, _join_attention([p.attention for p in parts]))
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
            keys, values = (F.pad(x, (0, 0, 0, 0, 0, length - x.shape[1])) for x in state.context[i][:2])
            rooms.append(AttentionState(keys, values))
    return rooms[0], rooms[1]


def _per_row(same: int, differing: Tensor | None, rows: int, device: torch.device) -> Tensor:
    return torch.full((rows,), same, dtype=torch.int64, device=device) if differing is None else differing


# ------------------------------------------------------------------------------------------------- reading into rows


def read_rows(
    model: Titans,
    rows: Sequence[Sequence[int] | Tensor],
    state: ModelState | None = None,
    *,
    piece: int = 0,
    every_token: bool = False,
) -> tuple[list[Tensor], ModelState]:
    """Give each row of a batch its next tokens, of any number each.

    Args:
        rows: the token ids of each row; at least one, or none where there is a `state`.
        state: of as many rows, or None at the beginning.
        piece: tokens of a row that run at once, which bounds memory. 0: all.
        every_token: hidden states of every token instead of the last one's.

    Returns:
        for each row its hidden states [tokens, c], or [1, c] of the last token ([0, c] for a row that was given none), and
        the state after them, rows in the order given.

    Raises:
        ValueError: rows and state do not fit each other, or there is nothing to read.
    """
    device = model.embedding.weight.device
    given = [torch.as_tensor(row, dtype=torch.int64, device=device) for row in rows]
    lengths = [len(row) for row in given]
    if not given or (state is not None and count_rows(state) != len(given)) or (state is None and min(lengths) == 0):
        raise ValueError(
            f"rows of {lengths} tokens for a state of {'none' if state is None else count_rows(state)}: every row of the state "
            "needs its tokens, and at the beginning at least one"
        )
    if max(lengths) == 0:
        raise ValueError("no row has a token to read")
    config = model.config
    parts: list[list[Tensor]] = [[] for _ in given]
    ended: list[tuple[list[int], ModelState]] = []
    groups = [(list(range(len(given))), state)]
    if state is not None and state.row_positions is not None and max(lengths) > 1:
        places: dict[int, list[int]] = {}
        for row, place in enumerate(row_positions(state)):
            places.setdefault(place, []).append(row)
        groups = [(found, select_rows(state, found, config)) for found in places.values()]
    for members, group in groups:
        alive, done = members, 0
        for length in sorted({lengths[row] for row in members}):
            while done < length:
                stop = min(length, done + piece) if piece else length
                hidden, group = model.hidden(torch.stack([given[row][done:stop] for row in alive]), group)
                for row, x in zip(alive, hidden if every_token else hidden[:, -1:], strict=True):
                    parts[row] = [*parts[row], x] if every_token else [x]
                done = stop
            assert group is not None
            finished = [i for i, row in enumerate(alive) if lengths[row] == length]
            going_on = [i for i, row in enumerate(alive) if lengths[row] > length]
            if not going_on:
                ended.append((alive, group))
            else:
                ended.append(([alive[i] for i in finished], select_rows(group, finished, config)))
                group, alive = select_rows(group, going_on, config), [alive[i] for i in going_on]
    after = join_states([s for _, s in ended], config)
    order = [row for members, _ in ended for row in members]
    if order != sorted(order):
        after = select_rows(after, sorted(range(len(order)), key=order.__getitem__), config)
    nothing = model.embedding.weight.new_empty(0, config.dim)
    return [torch.cat(x) if len(x) > 1 else x[0] if x else nothing for x in parts], after


def read_padded(
    model: Titans, input_ids: Tensor, attention_mask: Tensor | None, state: ModelState | None = None, *, piece: int = 0
) -> tuple[Tensor, ModelState]:
    """`Titans.hidden` for rows with padding in front, as transformers hands them over.

    Args:
        input_ids: int64 [b, t], the next tokens; what stands where the mask is 0 does not matter.
        attention_mask: [b, t] or, with columns of earlier calls in front, [b, earlier + t]: 1 for tokens, 0 for the padding
            before them. None: no padding.
        state: after the earlier calls.
        piece: as in `read_rows`.

    Returns:
        hidden states [b, t, c], zeros at the padding, and the state, which knows nothing of the padding.

    Raises:
        ValueError: padding behind or between a row's tokens, or a row of nothing but padding at the beginning.
    """
    length = input_ids.shape[1]
    ragged = state is not None and state.row_positions is not None
    if length == 1 and state is not None and (attention_mask is None or bool(attention_mask[:, -1].all())):
        return model.hidden(input_ids, state)
    counts = [length] * len(input_ids)
    if attention_mask is not None:
        if attention_mask.shape[0] != len(input_ids) or attention_mask.shape[1] < length:
            raise ValueError(
                f"attention_mask {list(attention_mask.shape)} must be [b, t] or longer, for input_ids {list(input_ids.shape)}"
            )
        mask = attention_mask[:, attention_mask.shape[1] - length :].bool()
        if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise ValueError("attention_mask has padding behind a row's tokens; pad on the left (padding_side='left')")
        counts = mask.sum(dim=1).tolist()
    if not ragged and min(counts) == length and not piece:
        return model.hidden(input_ids, state)
    rows = [row[length - count :] for row, count in zip(input_ids, counts, strict=True)]
    found, state = read_rows(model, rows, state, piece=piece, every_token=True)
    return torch.stack([F.pad(x, (0, 0, length - len(x), 0)) for x in found]), state
