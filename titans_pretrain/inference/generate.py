"""How does a model continue sequences of tokens, one at a time, from its recurrent state and nothing else?

The prefix is never run again. For all variants but one the state has a fixed upper size: the memory's weights and momentum,
the convolutions' last inputs, and at most a window (mag, mal, sliding_window) or a segment (mac, rmt) of keys and values.
Only the full-attention baseline (transformer) keeps keys and values of every token: its state, and the time of a token, grow
with the length.

Several sequences are written together, one forward a token for all of them, wherever each of them stands (`Decoding`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from titans_pretrain.errors import UserError
from titans_pretrain.inference.sampling import SamplingOptions, sample
from titans_pretrain.model.rows import join_states, read_rows, select_rows
from titans_pretrain.model.titans import ModelState, Titans

RECENT = 8
"""Last tokens that a `Reading` remembers: more than the bytes of a character, whose text needs the tokens before it."""


class Reading(NamedTuple):
    """What a model keeps of the texts it has read: all that their continuation depends on."""

    logits: Tensor
    """fp32 [b, v] after the last token of each row."""
    state: ModelState
    recent: tuple[tuple[int, ...], ...]
    """The last tokens of each row, at most RECENT, for turning what follows into text."""


@torch.inference_mode()
def read(model: Titans, rows: Sequence[Sequence[int]], start: Reading | None = None, *, piece: int = 0) -> Reading:
    """Run each row's tokens through the model, after those of `start` where that is given.

    Args:
        rows: token ids, of any number each; at least one where there is no `start`.
        start: of as many rows.
        piece: tokens of a row that run at once, which bounds memory. 0: all.

    Raises:
        UserError: there is no start, and a row has no tokens.
    """
    if start is None and not all(rows):
        raise UserError("a prompt needs at least one token: start with the beginning-of-sequence id")
    if not any(rows):
        assert start is not None
        return start
    hidden, state = read_rows(model, rows, None if start is None else start.state, piece=piece)
    logits = []
    for i, x in enumerate(hidden):
        if len(x):
            logits.append(model.logits(x[None])[0])
        else:
            assert start is not None
            logits.append(start.logits[i : i + 1])
    before = start.recent if start is not None else ((),) * len(rows)
    recent = tuple((*old, *row)[-RECENT:] for old, row in zip(before, rows, strict=True))
    return Reading(torch.cat(logits), state, recent)


@dataclass(eq=False)
class Row:
    """One sequence being written.

    Raises:
        UserError: max_new_tokens below 0.
    """

    max_new_tokens: int
    """Stop after so many."""
    options: SamplingOptions = field(default_factory=SamplingOptions)
    """How a token is drawn."""
    seed: int = 0
    """Of the draws; the same seed on the same machine gives the same tokens."""
    eos_id: int = -1
    """Stop when this is drawn. -1: never."""
    num_tokens: int = 0
    """Ids below this may be drawn: the tokenizer's size where the embedding has rows to spare. 0: all."""
    written: int = 0
    """Tokens drawn so far, without the end of the text."""
    ended: str = ""
    """Why the row is at its end: "length" or "eos"; "" while it is not."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens must be 0 or more, not {self.max_new_tokens}")
        self.generator = torch.Generator().manual_seed(self.seed)
        self.ended = "length" if self.max_new_tokens == 0 else ""

    def draw(self, logits: Tensor) -> int | None:
        """logits [v] -> the next token, None at the end of the text."""
        token = sample(logits[: self.num_tokens or None], self.options, self.generator)
        if token == self.eos_id:
            self.ended = "eos"
            return None
        self.written += 1
        if self.written == self.max_new_tokens:
            self.ended = "length"
        return token


class Decoding:
    """Rows that are written together; rows may come and go between steps.

    A token that was drawn enters the state only when something needs what follows it: after a row's very last token
    nothing does.
    """

    def __init__(self, model: Titans) -> None:
        self.model = model
        self.rows: list[Row] = []
        self._reading: Reading | None = None
        self._pending: list[int | None] = []

    @property
    def state(self) -> ModelState:
        """Of all rows, without the token that was drawn last."""
        assert self._reading is not None, "there are no rows"
        return self._reading.state

    def add(self, rows: Sequence[Row], reading: Reading) -> None:
        """Write `rows` too, which go on from the rows of `reading`."""
        assert len(rows) == len(reading.logits)
        if self._reading is not None:
            self._settle()
            before = self._reading
            state = join_states([before.state, reading.state], self.model.config)
            reading = Reading(torch.cat((before.logits, reading.logits)), state, before.recent + reading.recent)
        self._reading = reading
        self.rows += rows
        self._pending += [None] * len(rows)

    def step(self) -> list[tuple[Row, int | None]]:
        """Draw a token for every row: None where its text ends. Rows that have ended must be taken out before the next."""
        assert not any(row.ended for row in self.rows), "rows that have ended are still here"
        self._settle()
        assert self._reading is not None
        drawn = [row.draw(logits) for row, logits in zip(self.rows, self._reading.logits, strict=True)]
        self._pending = drawn
        return list(zip(self.rows, drawn, strict=True))

    def take_out(self, rows: Sequence[Row]) -> None:
        """Write these no longer."""
        leaving = {id(row) for row in rows}
        stay = [i for i, row in enumerate(self.rows) if id(row) not in leaving]
        if len(stay) == len(self.rows):
            return
        self._pending = [self._pending[i] for i in stay]
        self.rows = [self.rows[i] for i in stay]
        self._reading = self._select(stay) if stay else None

    def reading_of(self, row: Row) -> Reading:
        """All that `row` has read and written, as a copy."""
        self._settle()
        return self._select([self.rows.index(row)])

    @torch.inference_mode()
    def _settle(self) -> None:
        """Give the model the tokens drawn last."""
        old = self._reading
        if old is None or all(token is None for token in self._pending):
            return
        if None in self._pending:  # a row whose text ended: what is there stays
            tokens: list[list[int]] = [[] if token is None else [token] for token in self._pending]
            self._reading = read(self.model, tokens, old)
        else:
            batch = torch.tensor(self._pending, dtype=torch.int64, device=self.model.embedding.weight.device)
            hidden, state = self.model.hidden(batch[:, None], old.state)
            recent = tuple((*r, t)[-RECENT:] for r, t in zip(old.recent, self._pending, strict=True) if t is not None)
            self._reading = Reading(self.model.logits(hidden)[:, 0], state, recent)
        self._pending = [None] * len(self.rows)

    @torch.inference_mode()
    def _select(self, places: list[int]) -> Reading:
        assert self._reading is not None
        old = self._reading
        state = select_rows(old.state, places, self.model.config)
        return Reading(old.logits[places], state, tuple(old.recent[i] for i in places))


class Generation:
    """One sequence being written: an iterator of token ids that holds the model's state and nothing of the past.

    Args:
        model: on any device, in any dtype.
        prompt: token ids; at least one (the beginning-of-sequence id) where there is no `start`.
        max_new_tokens, options, seed, eos_id, num_tokens: see `Row`. The end of the text is not yielded.
        piece: tokens of the prompt that run at once, which bounds memory. 0: all.
        start: what was read before the prompt.

    Raises:
        UserError: max_new_tokens below 0, or an empty prompt.
    """

    def __init__(
        self,
        model: Titans,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        options: SamplingOptions | None = None,
        seed: int = 0,
        eos_id: int = -1,
        num_tokens: int = 0,
        piece: int = 0,
        start: Reading | None = None,
    ) -> None:
        self.row = Row(max_new_tokens, options or SamplingOptions(), seed, eos_id, num_tokens)
        self._decoding = Decoding(model)
        self._decoding.add([self.row], read(model, [prompt], start, piece=piece))

    @property
    def state(self) -> ModelState:
        """After the prompt and all that was yielded but the last token."""
        return self._decoding.state

    @property
    def remaining(self) -> int:
        """Tokens that may still come."""
        return 0 if self.row.ended else self.row.max_new_tokens - self.row.written

    def reading(self) -> Reading:
        """All that was read and written, the last token included."""
        return self._decoding.reading_of(self.row)

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.row.ended:
            raise StopIteration
        [(_, token)] = self._decoding.step()
        if token is None:
            raise StopIteration
        return token


def write_batch(
    model: Titans, prompts: Sequence[Sequence[int]], rows: Sequence[Row], *, batch: int, piece: int = 0
) -> Iterator[tuple[int, int | None]]:
    """Continue many prompts, at most `batch` at a time: where one ends, the next takes its place.

    Yields:
        (index of the prompt, its next token), prompts in turn; None for the token once the prompt's text has ended. A caller
        ends one early by setting its row's `ended`.
    """
    decoding = Decoding(model)
    index = {id(row): i for i, row in enumerate(rows)}
    waiting = list(range(len(rows)))
    while waiting or decoding.rows:
        ended = [row for row in decoding.rows if row.ended]
        decoding.take_out(ended)
        for row in ended:
            yield index[id(row)], None
        coming = waiting[: batch - len(decoding.rows)]
        waiting = waiting[len(coming) :]
        empty = [i for i in coming if rows[i].ended]
        coming = [i for i in coming if not rows[i].ended]
        for i in empty:
            yield i, None
        if coming:
            decoding.add([rows[i] for i in coming], read(model, [prompts[i] for i in coming], piece=piece))
        if decoding.rows:
            for row, token in decoding.step():
                if token is not None:
                    yield index[id(row)], token


def prefill(model: Titans, prompt: Sequence[int], piece: int = 0) -> tuple[Tensor, ModelState]:
    """Run `prompt` through the model `piece` tokens at a time (0: all at once) -> logits [v] after it, and the state."""
    reading = read(model, [prompt], piece=piece)
    return reading.logits[0], reading.state


@torch.inference_mode()
def advance(model: Titans, tokens: Sequence[int], state: ModelState | None) -> tuple[Tensor, ModelState]:
    """Give the model the next `tokens` -> fp32 logits [v] after the last of them, and the state."""
    batch = torch.tensor([list(tokens)], dtype=torch.int64, device=model.embedding.weight.device)
    hidden, state = model.hidden(batch, state)
    return model.logits(hidden[:, -1:])[0, 0], state
