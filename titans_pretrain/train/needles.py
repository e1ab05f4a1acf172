"""How well does the model find a needle, while it is trained? The answer's tokens after prompts of evaluation/needle.py.

Nothing is generated: the answer is given token by token, which is one pass over the text and works under every layout. The
haystack's prose is the validation split's text; samples are made once and are the same at every evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pretrain.config import Config
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.tokenizer import Tokenizer
from titans_pretrain.errors import UserError
from titans_pretrain.evaluation.haystack import Haystack, Words, split_sentences
from titans_pretrain.evaluation.needle import TASKS, Needles
from titans_pretrain.evaluation.scoring import token_losses
from titans_pretrain.layout import micro_batch_rows
from titans_pretrain.model import Titans
from titans_pretrain.model.titans import ModelState
from titans_pretrain.parallel.grid import Grid
from titans_pretrain.train.engine import Engine

PROSE_TOKENS = 65_536
"""Of the validation split, whose sentences the haystack is made of; longer ones repeat it."""


class NeedleEvaluation:
    """The needles of `eval.needle_lengths`, `needle_task` and `needle_samples`.

    Args:
        shards: of the validation text, and of the tokenizer.

    Raises:
        UserError: a length is too short for the needle, or tokenizer and text cannot be read.
    """

    def __init__(self, config: Config, shards: ShardSet, grid: Grid) -> None:
        self.grid = grid
        self.piece = config.data.seq_len
        self.num_tokens = shards.vocab_size
        self.rows = micro_batch_rows(config, grid.data.size)
        words = Words(Tokenizer(shards.tokenizer_path))
        task = TASKS[config.eval.needle_task]
        prose = Haystack(words, _sentences(shards, words), f"the valid split of {shards.path}")
        needles = Needles(task, words, prose if task.haystack == "prose" else None, seed=0)
        self.room = needles.room
        count = config.eval.needle_samples
        self.batches: dict[int, list[tuple[Tensor, Tensor]]] = {
            length: self._batches(needles, length, count) for length in dict.fromkeys(config.eval.needle_lengths)
        }
        """Of this rank, by length: tokens and labels int64 [rows, length], equally many and equally shaped on every rank."""

    def _batches(self, needles: Needles, length: int, count: int) -> list[tuple[Tensor, Tensor]]:
        ranks = self.grid.replica.size
        mine = range(self.grid.replica.rank, count, ranks)
        most = -(-count // ranks)
        rows = min(self.rows, most)
        batches = []
        for start in range(0, most, rows):
            tokens = torch.zeros(rows, length, dtype=torch.int64)
            labels = torch.full((rows, length), -100)
            for row, index in enumerate(mine[start : start + rows]):
                sample = needles.sample(length, (index + 0.5) / count, index)
                end, answer = len(sample.prompt), torch.tensor(sample.answer_ids)
                tokens[row, :end] = torch.tensor(sample.prompt)
                tokens[row, end : end + len(answer)] = answer
                labels[row, end - 1 : end - 1 + len(answer)] = answer
            batches.append((tokens, labels))
        return batches

    def run(self, engine: Engine) -> dict[str, float]:
        """{"needle_accuracy/LENGTH": share of the answers' tokens that are the likeliest, "needle_nll/LENGTH": their mean
        loss in nats}. Collective."""
        told: dict[str, float] = {}
        for length, batches in self.batches.items():
            first = length - self.room - 1  # the place that predicts an answer's first token, in every row
            totals = torch.zeros(3, dtype=torch.float64)
            for tokens, labels in batches:
                state = None
                for start in range(0, length, self.piece):
                    piece = slice(start, start + self.piece)
                    given, wanted = (x[:, piece].to(self.grid.device) for x in (tokens, labels))
                    skip = min(max(first - start, 0), given.shape[1])
                    sums, state = engine.evaluate(_answers, given, wanted, state, skip, self.num_tokens)
                    totals += sums.double().cpu()
            nll, correct, count = self.grid.distinct(self.grid.gather_numbers(totals.tolist())).sum(0).tolist()
            told |= {f"needle_accuracy/{length}": correct / count, f"needle_nll/{length}": nll / count}
        return told


def _answers(
    model: Titans, tokens: Tensor, labels: Tensor, state: ModelState | None, skip: int, num_tokens: int
) -> tuple[Tensor, ModelState]:
    """-> loss in nats, likeliest tokens and tokens, each summed over the labels from place `skip` on, [3]; and the state."""
    hidden, state = model.hidden(tokens, state)
    sums = hidden.new_zeros(3, dtype=torch.float32)
    if skip < tokens.shape[1]:
        wanted = labels[:, skip:]
        losses, correct = token_losses(model, hidden[:, skip:], wanted, num_tokens)
        sums = torch.stack((losses.sum(), correct.sum(), (wanted != -100).sum()))
    return sums, state


def _sentences(shards: ShardSet, words: Words) -> list[str]:
    tokens = [shard.tokens for shard in shards.split("valid").shards]
    shard = tokens.index(max(tokens))
    text = words.tokenizer.decode(shards.read("valid", shard, 0, min(PROSE_TOKENS, tokens[shard])).tolist())
    sentences = split_sentences(text)
    if not sentences:
        raise UserError(f"the valid split of {shards.path} has no text for eval.needle_lengths; set it to []")
    return sentences
