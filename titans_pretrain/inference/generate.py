"""How does a model continue a sequence of tokens, one at a time, from its recurrent state and nothing else?

The prefix is never run again. For the Titans variants and the sliding-window baseline the state has a fixed upper size: the
memory's weights and momentum, the convolutions' last inputs, and at most a window (mag, mal, sliding_window) or a segment
(mac) of keys and values. Only the full-attention baseline (transformer) keeps keys and values of every token: its state, and
the time of a token, grow with the length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from titans_pretrain.errors import UserError
from titans_pretrain.inference.sampling import SamplingOptions, sample
from titans_pretrain.model.titans import ModelState, Titans


class Generation:
    """One sequence being written: an iterator of token ids that holds the model's state and nothing of the past.

    Args:
        model: on any device, in any dtype.
        prompt: token ids, at least one (the beginning-of-sequence id).
        max_new_tokens: stop after so many.
        options: how a token is drawn.
        seed: of the draws; the same seed on the same machine gives the same tokens.
        eos_id: stop when this is drawn; it is not yielded. -1: never.
        num_tokens: ids below this may be drawn: the tokenizer's size where the embedding has rows to spare. 0: all.
        piece: tokens of the prompt that run at once, which bounds memory. 0: all.

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
    ) -> None:
        if max_new_tokens < 0:
            raise UserError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
        if not prompt:
            raise UserError("a prompt needs at least one token: start with the beginning-of-sequence id")
        self.model = model
        self.options = options or SamplingOptions()
        self.remaining = max_new_tokens
        self.eos_id = eos_id
        self.num_tokens = num_tokens
        self.generator = torch.Generator().manual_seed(seed)
        self._logits, self.state = prefill(model, prompt, piece)
        self._pending: int | None = None

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.remaining == 0:
            raise StopIteration
        if self._pending is not None:  # it enters the state only now: after the very last token nothing needs it
            self._logits, self.state = advance(self.model, [self._pending], self.state)
        logits = self._logits[: self.num_tokens or None]
        token = sample(logits, self.options, self.generator)
        if token == self.eos_id:
            self.remaining = 0
            raise StopIteration
        self._pending = token
        self.remaining -= 1
        return token


def prefill(model: Titans, prompt: Sequence[int], piece: int = 0) -> tuple[Tensor, ModelState]:
    """Run `prompt` through the model `piece` tokens at a time (0: all at once) -> logits [v] after it, and the state."""
    piece = piece or len(prompt)
    state: ModelState | None = None
    for start in range(0, len(prompt), piece):
        logits, state = advance(model, prompt[start : start + piece], state)
    assert state is not None
    return logits, state


@torch.inference_mode()
def advance(model: Titans, tokens: Sequence[int], state: ModelState | None) -> tuple[Tensor, ModelState]:
    """Give the model the next `tokens` -> fp32 logits [v] after the last of them, and the state."""
    batch = torch.tensor([list(tokens)], dtype=torch.int64, device=model.embedding.weight.device)
    hidden, state = model.hidden(batch, state)
    return model.logits(hidden[:, -1:])[0, 0], state


def state_bytes(state: Any) -> int:
    """Bytes of memory that the tensors of a state keep alive: each storage once and whole, so a small view of a large
    tensor counts as the large one."""
    storages: dict[int, int] = {}

    def visit(part: Any) -> None:
        if isinstance(part, Tensor):
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(part, (tuple, list)):
            for item in part:
                visit(item)

    visit(state)
    return sum(storages.values())
