"""Two models between which every real one lies: one that looks the answer up in the text it was given, one that guesses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from titans_pretrain.evaluation.haystack import Words


class Oracle:
    """Remembers what it read; behind `prompt_length` tokens it writes what `answer_of` their text says, then the end.

    It knows no samples: what it answers stands in the text or follows from it.
    """

    def __init__(self, words: Words, prompt_length: int, answer_of: Callable[[str], str]) -> None:
        self.words = words
        self.prompt_length = prompt_length
        self.answer_of = answer_of
        self._answers: dict[tuple[int, ...], tuple[int, ...]] = {}

    def hidden(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        size = self.words.tokenizer.vocab_size
        before: Sequence[tuple[int, ...]] = state or [()] * len(tokens)
        seen = [(*old, *new) for old, new in zip(before, tokens.tolist(), strict=True)]
        wanted = torch.zeros(*tokens.shape, size)
        for row, (old, all_of_it) in enumerate(zip(before, seen, strict=True)):
            for place in range(len(old) + 1, len(all_of_it) + 1):
                if place >= self.prompt_length:
                    wanted[row, place - len(old) - 1, self._next(all_of_it, place - self.prompt_length)] = 1.0
        return wanted, seen

    def _next(self, seen: tuple[int, ...], number: int) -> int:
        prompt = seen[: self.prompt_length]
        if prompt not in self._answers:
            answer = self.answer_of(self.words.tokenizer.decode(list(prompt)))
            self._answers[prompt] = (*self.words.ids(answer), self.words.tokenizer.eos_id)
        answer_ids = self._answers[prompt]
        return answer_ids[min(number, len(answer_ids) - 1)]

    def logits(self, hidden: Tensor) -> Tensor:
        return 40.0 * hidden


class Guesser:
    """Every token is as likely as any other, but for what a draw decides."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self.generator = torch.Generator().manual_seed(seed)

    def hidden(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return torch.randn(*tokens.shape, self.vocab_size, generator=self.generator), state

    def logits(self, hidden: Tensor) -> Tensor:
        return 1e-3 * hidden
