"""How well does the model predict held-out text: the mean token loss on the validation splits.

Of several sources each has a loss of its own; the loss over all is their mean, weighted as the sources are at the start of
training. Phases of other weights do not move it, so that it can be compared over the whole run.

Long sequences are run in pieces of data.seq_len with the model's state carried along, so memory does not grow with the
length and the state is tested as decoding uses it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans_pretrain.config import Config
from titans_pretrain.data.mixture import Sources
from titans_pretrain.data.stream import MicroBatch, TokenStream
from titans_pretrain.errors import UserError
from titans_pretrain.layout import micro_batch_rows
from titans_pretrain.model import Titans
from titans_pretrain.model.titans import ModelState
from titans_pretrain.parallel.grid import Grid
from titans_pretrain.train.engine import Engine
from titans_pretrain.train.needles import NeedleEvaluation


class ValidationSet(NamedTuple):
    """The first `sequences` sequences of one source's validation split, at one length."""

    name: str
    weight: float
    stream: TokenStream
    sequences: int


PREFIX_TOKENS = 128
"""Longest validation prefix whose logits go into every checkpoint."""


class Evaluation:
    """The validation sets of a run: one per length in `eval.length_multiples` and source.

    Sources without a validation split have no part in it (`without`, their names).

    Raises:
        UserError: a validation split is too short for one sequence of some length, or there is none.
    """

    def __init__(self, config: Config, sources: Sources, grid: Grid) -> None:
        self.grid = grid
        self.seq_len = config.data.seq_len
        self.document_starts = config.data.reset_at_documents
        self.rows = micro_batch_rows(config, grid.data.size)
        weighted = list(zip(sources.sources, sources.weights, strict=True))
        held_out = [(source, weight) for source, weight in weighted if source.shards.has_tokens("valid")]
        if not held_out:
            sources.sources[0].shards.split("valid")  # says so
        self.without = [source.name for source, _ in weighted if not source.shards.has_tokens("valid")]
        total = sum(weight for _, weight in held_out)
        if not total:
            raise UserError(
                f"of data.sources only {', '.join(source.name for source, _ in held_out)} have a validation split, and "
                "their weights are 0, so there is no validation loss over all: give a source with weight one "
                "(build_shards.py --val-fraction)"
            )
        tokens = config.eval.tokens // len(held_out)
        self.sets: dict[int, list[ValidationSet]] = {}
        for multiple in config.eval.length_multiples:
            length = multiple * self.seq_len
            for source, weight in held_out:
                stream = TokenStream(source.shards, "valid", length, seed=0, shuffle=False)
                count = max(1, min(tokens // length, stream.num_sequences))
                self.sets.setdefault(multiple, []).append(ValidationSet(source.name, weight / total, stream, count))
        first = next(iter(self.sets.values()))[0].stream.row(0).tokens
        self.prefix = torch.from_numpy(first[None, : min(PREFIX_TOKENS, self.seq_len)].copy())
        """int64 [1, n]: the validation tokens whose logits checkpoints keep."""
        self._needles = NeedleEvaluation(config, held_out[0][0].shards, grid) if config.eval.needle_lengths else None

    def find_needles(self, engine: Engine) -> dict[str, float]:
        """What `NeedleEvaluation` measures; nothing without eval.needle_lengths. Collective."""
        return self._needles.run(engine) if self._needles else {}

    def run(self, engine: Engine) -> dict[str, float]:
        """Mean token loss in nats: {"valid_loss": ...} at seq_len, {"valid_loss_xN": ...} at N times it; where there are
        several, each source's as {"valid_loss/NAME": ...}. Collective."""
        told: dict[str, float] = {}
        for multiple, sets in self.sets.items():
            key = "valid_loss" if multiple == 1 else f"valid_loss_x{multiple}"
            losses = {part.name: self._mean_loss(engine, multiple, part) for part in sets}
            told[key] = sum(part.weight * losses[part.name] for part in sets)
            if len(sets) > 1 or self.without:
                told |= {f"{key}/{name}": loss for name, loss in losses.items()}
        return told

    def _mean_loss(self, engine: Engine, multiple: int, part: ValidationSet) -> float:
        stream, count = part.stream, part.sequences
        ranks = self.grid.replica.size
        mine = range(self.grid.replica.rank, count, ranks)
        # All ranks run equally many equally shaped batches, or ZeRO-3's gathers would not match up.
        most = -(-count // ranks)
        rows = min(self.rows, most)
        total, valid = torch.zeros((), dtype=torch.float64), 0
        # All that can fail alone comes first. Damage is never masked here: losses over other tokens would not compare.
        with self.grid.agreed():
            batches = [
                _batch(stream, mine[start : start + rows], rows, self.document_starts) for start in range(0, most, rows)
            ]
        for batch in batches:
            valid += int((batch.labels != -100).sum())
            if batch.document_starts is not None:  # whole documents in each row: there is nothing to carry along
                assert multiple == 1
                total += engine.evaluate(_loss, *engine.at_hand(*batch)).double().cpu()
                continue
            state = None
            for piece in range(multiple):
                columns = slice(piece * self.seq_len, (piece + 1) * self.seq_len)
                tokens, labels = (x[:, columns].to(self.grid.device) for x in (batch.tokens, batch.labels))
                loss, state = engine.evaluate(_loss_and_state, tokens, labels, state)
                total += loss.double().cpu()
        summed = self.grid.distinct(self.grid.gather_numbers([float(total), float(valid)])).sum(0)
        return float(summed[0] / summed[1])


def _batch(stream: TokenStream, indices: range, rows: int, document_starts: bool) -> MicroBatch:
    """Sequences `indices` -> rows of them; missing rows are filled with ignored labels."""
    tokens = torch.zeros(rows, stream.seq_len, dtype=torch.int64)
    labels = torch.full((rows, stream.seq_len), -100)
    starts = torch.zeros(rows, stream.seq_len, dtype=torch.bool) if document_starts else None
    for row, index in enumerate(indices):
        sequence = stream.row(index)
        tokens[row], labels[row] = torch.from_numpy(sequence.tokens), torch.from_numpy(sequence.labels)
        if starts is not None:
            assert sequence.document_starts is not None
            starts[row] = torch.from_numpy(sequence.document_starts)
    return MicroBatch(tokens, labels, starts)


def _loss(model: Titans, *batch: Tensor | None) -> Tensor:
    return model(*batch)


def _loss_and_state(
    model: Titans, tokens: Tensor, labels: Tensor, state: ModelState | None
) -> tuple[Tensor, ModelState]:
    hidden, state = model.hidden(tokens, state)
    return model.head(hidden, labels), state
