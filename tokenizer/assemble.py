"""How do encoded units become the shards of a dataset? In their order, by one process, so that nothing depends on who
encoded what and when."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from titans_pretrain.data.manifest import SPLITS, Packing, SplitEntry
from titans_pretrain.data.packing import PackedWriter
from titans_pretrain.data.structure import length_histogram
from titans_pretrain.data.writer import ShardWriter, unigram_entropy
from tokenizer.documents import Tally
from tokenizer.duplicates import SeenHashes
from tokenizer.encode import EncodedBatch


@dataclass(frozen=True)
class AssembleOptions:
    """What decides the shards once the units are given."""

    shard_tokens: int
    block_tokens: int
    dedup: bool
    """Leave out documents whose text was there before."""
    packing: Packing | None


class Assembly:
    """Writes the shards of all splits into `directory`. A context manager; its results are complete after it."""

    def __init__(self, directory: Path, vocab_size: int, options: AssembleOptions):
        self.tally = Tally()
        self.docs = dict.fromkeys(SPLITS, 0)
        self.lengths: dict[str, np.ndarray] = {split: np.zeros(0, dtype=np.int64) for split in SPLITS}
        """[k] the number of documents with 2^k <= tokens < 2^(k + 1)."""
        self._packing = options.packing
        self._seen = SeenHashes() if options.dedup else None
        self._text_bytes = dict.fromkeys(SPLITS, 0)
        shard_tokens = options.shard_tokens
        if options.packing:
            shard_tokens -= shard_tokens % options.packing.seq_len
        self._shards = {
            split: ShardWriter(
                directory, split, vocab_size, shard_tokens=shard_tokens, block_tokens=options.block_tokens
            )
            for split in SPLITS
        }
        self._writers: dict[str, ShardWriter | PackedWriter] = {
            split: PackedWriter(writer, options.packing) if options.packing else writer
            for split, writer in self._shards.items()
        }
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Assembly:
        with contextlib.ExitStack() as stack:
            for split, writer in self._writers.items():
                if writer is not self._shards[split]:
                    stack.enter_context(self._shards[split])
                stack.enter_context(writer)
            self._opened = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, traceback)

    def add(self, batch: EncodedBatch) -> int:
        """Append a unit; returns the tokens kept of it."""
        self.tally.add(batch.tally)
        kept = 0
        for split, encoded in batch.splits.items():
            tokens, lengths, text_bytes = encoded.tokens, encoded.lengths, encoded.text_bytes
            if self._seen is not None:
                new = self._seen.add(encoded.hashes)
                self.tally.duplicates += len(new) - int(new.sum())
                tokens, lengths, text_bytes = tokens[np.repeat(new, lengths)], lengths[new], text_bytes[new]
            self._writers[split].write(tokens, lengths)
            self.docs[split] += len(lengths)
            self.lengths[split] = _added(self.lengths[split], length_histogram(lengths))
            self._text_bytes[split] += int(text_bytes.sum())
            kept += len(tokens)
        return kept

    @property
    def padding(self) -> dict[str, int]:
        """Tokens of padding by split."""
        return {split: w.padding if isinstance(w, PackedWriter) else 0 for split, w in self._writers.items()}

    @property
    def cut_documents(self) -> int:
        """Documents that were longer than a row."""
        return sum(w.cut_documents for w in self._writers.values() if isinstance(w, PackedWriter))

    def split_entry(self, split: str) -> SplitEntry:
        writer = self._shards[split]
        return SplitEntry(writer.num_tokens, self.docs[split], self._text_bytes[split], tuple(writer.shards))

    def unigram_entropy(self) -> float:
        return unigram_entropy(self._writers["train"].token_counts)


def _added(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    total = np.zeros(max(len(first), len(second)), dtype=np.int64)
    total[: len(first)] += first
    total[: len(second)] += second
    return total
