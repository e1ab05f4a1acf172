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
from titans_pretrain.model.row_states import join_parts, select_part
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
    blocks = tuple(select_part(block, rows, config) for block in state.blocks)
    if state.row_positions is None:
        return ModelState(state.position, blocks)
    return _with_positions(state.row_positions[rows].tolist(), blocks, device)


def join_states(states: Sequence[ModelState], config: ModelConfig) -> ModelState:
    """One state with the rows of all `states`, in order. They may stand at different positions."""
    if len(states) == 1:
        return states[0]
    blocks = tuple(join_parts(parts, config) for parts in zip(*(s.blocks for s in states), strict=True))
    return _with_positions([p for s in states for p in row_positions(s)], blocks, _device(states[0]))


def _with_positions(positions: list[int], blocks: tuple[Any, ...], device: torch.device) -> ModelState:
    differ = len(set(positions)) > 1
    return ModelState(max(positions), blocks, torch.tensor(positions, device=device) if differ else None)


def _device(state: ModelState) -> torch.device:
    part: Any = state.blocks[0]
    while not isinstance(part, Tensor):
        part = part[0]
    return part.device


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
