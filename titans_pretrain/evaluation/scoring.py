"""How well does a model answer a prompt? It is read once, in pieces; from the state after it three things are measured.

generation   greedy tokens: do they hold the answer?
teacher      the answer's own tokens are given one after another: how many are the likeliest, at what loss?
choice       where a list of possible answers is known: is the right one the most probable?

All of it needs nothing of a model but `hidden` and `logits` as `model.titans.Titans` has them, so that a test's oracle is
scored by the very same code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_AT_ONCE = 1024
"""Tokens whose logits exist at one time: 131 MB in fp32 at a vocabulary of 32,000."""


class Model(Protocol):
    """What is scored."""

    def hidden(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """tokens int64 [b, t], the next of each row -> [b, t, c] and the state after them; `state` itself stays as it is."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [b, t, c] -> fp32 [b, t, v]."""


class TextTokenizer(Protocol):
    """What turns text into ids: `data.tokenizer.Tokenizer`."""

    vocab_size: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """The ids of a text, `bos_id` in front."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""


@dataclass(frozen=True)
class Sample:
    """One question. Samples that are scored together have prompts of one length."""

    prompt: tuple[int, ...]
    """Token ids, the beginning of the sequence in front."""
    answer: str
    answer_ids: tuple[int, ...]
    """The answer's tokens as they follow the prompt."""
    choices: tuple[tuple[int, ...], ...] = ()
    """Token ids of every possible answer; none: the answer is one of too many."""
    right: int = -1
    """Which of `choices` is the answer."""


class Judged(NamedTuple):
    """What the model made of one sample."""

    written: tuple[int, ...]
    """Its greedy continuation, up to the end of the text."""
    correct_tokens: int
    """Of the answer's tokens, given those before: how many the model holds the likeliest."""
    nll: float
    """Of the answer, summed over its tokens, nats."""
    chosen: int
    """Of the choices, the one of the smallest nll; -1 where there are none."""


@dataclass(frozen=True)
class Scoring:
    """How samples are scored."""

    piece: int
    """Tokens of a prompt that run at once; bounds memory."""
    batch: int = 8
    """Samples that run together."""
    device: str | torch.device = "cpu"
    spare_tokens: int = 8
    """Tokens that a continuation may have beyond the answer's room, for words in front of the answer."""


@torch.no_grad()
def token_losses(model: Model, hidden: Tensor, labels: Tensor, num_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """hidden [b, t, c], labels int64 [b, t] -> fp32 losses [b, t] in nats, and whether each label is the likeliest token.

    Args:
        num_tokens: ids below this can be the likeliest; 0: all.
    """
    losses, correct = [], []
    step = max(1, LOGITS_AT_ONCE // len(labels))
    for start in range(0, labels.shape[1], step):
        logits, wanted = model.logits(hidden[:, start : start + step]), labels[:, start : start + step]
        losses.append(F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none"))
        correct.append(logits[..., : num_tokens or None].argmax(-1) == wanted)
    return torch.cat(losses, 1), torch.cat(correct, 1)


@torch.no_grad()
def read(model: Model, tokens: Tensor, piece: int) -> tuple[Tensor, Any]:
    """tokens int64 [b, t] in pieces -> the last token's hidden state [b, 1, c], and the state after it."""
    state = None
    for start in range(0, tokens.shape[1], piece):
        hidden, state = model.hidden(tokens[:, start : start + piece], state)
    return hidden[:, -1:], state


@torch.no_grad()
def _answer_losses(
    model: Model, last: Tensor, state: Any, answers: Sequence[Sequence[int]], num_tokens: int
) -> tuple[list[float], list[int]]:
    """Each row's answer after its prompt -> its loss in nats and how many of its tokens are the likeliest."""
    longest = max(map(len, answers))
    ids = torch.tensor([[*answer, *[0] * (longest - len(answer))] for answer in answers], device=last.device)
    hidden = last
    if longest > 1:  # what is behind a shorter answer changes nothing before it
        hidden = torch.cat((last, model.hidden(ids[:, :-1], state)[0]), 1)
    losses, correct = token_losses(model, hidden, ids, num_tokens)
    rows = [(losses[i, : len(a)].double().sum(), correct[i, : len(a)].sum()) for i, a in enumerate(answers)]
    return [float(loss) for loss, _ in rows], [int(count) for _, count in rows]


@torch.no_grad()
def _greedy(model: Model, last: Tensor, state: Any, new_tokens: int, num_tokens: int, eos_id: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(len(last))]
    ended = [False] * len(last)
    for number in range(new_tokens):
        tokens = model.logits(last)[:, -1, : num_tokens or None].argmax(-1)
        for i, token in enumerate(tokens.tolist()):
            ended[i] = ended[i] or token == eos_id
            if not ended[i]:
                rows[i].append(token)
        if all(ended) or number == new_tokens - 1:
            break
        last, state = model.hidden(tokens[:, None], state)
    return rows


def judge(
    model: Model, samples: Sequence[Sample], scoring: Scoring, *, new_tokens: int, num_tokens: int, eos_id: int
) -> list[Judged]:
    """Let the model answer every sample.

    Args:
        new_tokens: that it may write.
        num_tokens: of the tokenizer; the embedding may have rows to spare.
        eos_id: where a continuation ends; -1: nowhere.
    """
    judged = []
    for start in range(0, len(samples), scoring.batch):
        batch = samples[start : start + scoring.batch]
        prompts = torch.tensor([sample.prompt for sample in batch], device=scoring.device)
        last, state = read(model, prompts, scoring.piece)
        nll, correct = _answer_losses(model, last, state, [sample.answer_ids for sample in batch], num_tokens)
        by_choice = [
            _answer_losses(model, last, state, choice, num_tokens)[0]
            for choice in zip(*(sample.choices for sample in batch), strict=True)
        ]
        written = _greedy(model, last, state, new_tokens, num_tokens, eos_id)
        for i in range(len(batch)):
            chosen = min(range(len(by_choice)), key=lambda c: by_choice[c][i]) if by_choice else -1
            judged.append(Judged(tuple(written[i]), correct[i], nll[i], chosen))
    return judged


def holds(text: str, answer: str) -> bool:
    """Whether `answer` stands in `text` as a word of its own, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


def summarize(samples: Sequence[Sample], judged: Sequence[Judged], tokenizer: TextTokenizer) -> dict[str, Any]:
    """The scores of a cell: percentages, and the loss in nats per token of the answers (None if it is not finite)."""
    tokens = sum(len(sample.answer_ids) for sample in samples)
    pairs = list(zip(samples, judged, strict=True))
    nll = sum(answer.nll for answer in judged) / tokens
    scores: dict[str, Any] = {
        "samples": len(samples),
        "score": percent(sum(holds(tokenizer.decode(j.written), s.answer) for s, j in pairs), len(samples)),
        "token_accuracy": percent(sum(answer.correct_tokens for answer in judged), tokens),
        "nll": nll if math.isfinite(nll) else None,
    }
    if samples[0].choices:
        scores["choice"] = percent(sum(j.chosen == s.right for s, j in pairs), len(samples))
    return scores


def percent(count: int, of: int) -> float:
    """In hundredths of a percent, so that a table and its JSON say the same."""
    return round(100 * count / of, 2)
