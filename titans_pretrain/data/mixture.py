"""Which sequences does a run over several datasets see? Weighted sources as one stream.

Sequences are numbered 0, 1, 2, ... as those of one source are, and the number is the whole state here too: blend.py says
which source it belongs to and how many of that source came before it, and that source's TokenStream says the rest, its
epochs included. A mixture of one source is that source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titans_pretrain.config import DataConfig, source_names
from titans_pretrain.data.blend import PERIOD, Blend
from titans_pretrain.data.packed import Row
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.data.stream import TokenStream
from titans_pretrain.errors import UserError


@dataclass(frozen=True)
class Source:
    """One dataset of a run."""

    name: str
    shards: ShardSet
    weight: float
    max_epochs: float
    """0: no limit."""


class Sources:
    """The datasets of a run, by one tokenizer.

    Raises:
        UserError: they were made with different tokenizers.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        first = sources[0]
        for other in sources[1:]:
            if other.shards.tokenizer_sha256 != first.shards.tokenizer_sha256:
                raise UserError(
                    f"data.sources {first.name} ({first.shards.path}) and {other.name} ({other.shards.path}) were made with "
                    f"different tokenizers (SHA-256 {first.shards.tokenizer_sha256[:12]} and "
                    f"{other.shards.tokenizer_sha256[:12]}): build both with one, or take one of them out"
                )

    @classmethod
    def of(cls, data: DataConfig, opened: Sequence[ShardSet]) -> Sources:
        """The opened datasets of `paths(data)`."""
        if not data.sources:
            (shards,) = opened
            return cls([Source("data", shards, 1.0, 0.0)])
        named = zip(source_names(data), data.sources, opened, strict=True)
        return cls([Source(name, shards, source.weight, source.max_epochs) for name, source, shards in named])

    @property
    def several(self) -> bool:
        return len(self.sources) > 1

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    @property
    def weights(self) -> list[float]:
        """Those of the start, summing to 1."""
        total = sum(source.weight for source in self.sources)
        return [source.weight / total for source in self.sources]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all datasets; of one, its own."""
        digests = [source.shards.fingerprint for source in self.sources]
        return hashlib.sha256("".join(digests).encode()).hexdigest() if self.several else digests[0]

    @property
    def vocab_size(self) -> int:
        return self.sources[0].shards.vocab_size

    @property
    def tokenizer_sha256(self) -> str:
        return self.sources[0].shards.tokenizer_sha256

    @property
    def tokenizer_path(self) -> Path:
        return self.sources[0].shards.tokenizer_path

    @property
    def unigram_entropy(self) -> float:
        """Of the train splits, nats per token, weighted as at the start: what a model scores that knows how often each
        token occurs in each source."""
        return sum(w * s.shards.unigram_entropy for w, s in zip(self.weights, self.sources, strict=True))

    def num_tokens(self, split: str) -> int:
        """Tokens in that split of all sources."""
        return sum(source.shards.num_tokens(split) for source in self.sources)


def paths(data: DataConfig) -> list[str]:
    """The folders a config names.

    Raises:
        UserError: none.
    """
    if not data.path and not data.sources:
        raise UserError(
            "data.path is empty: set it to a folder written by tokenizer/build_shards.py, or set data.sources"
        )
    return [source.path for source in data.sources] or [data.path]


class Mixture:
    """The training sequences of `sources`, by number; everything a TokenStream is to a BatchLoader.

    Args:
        phases: (first sequence, weight of each source) of each phase, by first sequence, the first at 0.

    Raises:
        UserError: a source is too short for one sequence, or a weight too small.
    """

    def __init__(
        self, sources: Sources, seq_len: int, seed: int, phases: Sequence[tuple[int, Sequence[float]]]
    ) -> None:
        self.sources = sources
        self.seq_len = seq_len
        self.seed = seed
        self.streams = [TokenStream(source.shards, "train", seq_len, seed) for source in sources.sources]
        self.blend = Blend(phases)
        dtypes = {stream.raw_dtype for stream in self.streams}
        self.raw_dtype: np.dtype[Any] | None = dtypes.pop() if len(dtypes) == 1 else None

    def place(self, index: int) -> tuple[int, int]:
        """(source, number in the source's own stream) of sequence `index`."""
        return self.blend.place(index)

    def places(self, indices: np.ndarray) -> np.ndarray:
        """`locate` of many at once: int64 [n] -> int64 [n, 3]."""
        sources, numbers = self.blend.places(indices)
        places = np.empty((len(indices), 3), dtype=np.int64)
        places[:, 0] = sources
        for source, stream in enumerate(self.streams):
            mine = sources == source
            places[mine, 1:] = stream.places(numbers[mine])
        return places

    def read_places(
        self, places: np.ndarray, rows: Sequence[np.ndarray] | np.ndarray, part: int = 0, parts: int = 1
    ) -> None:
        """As TokenStream.read_places; source by source."""
        for source, stream in enumerate(self.streams):
            mine = np.flatnonzero(places[:, 0] == source)
            stream.read_places(places[mine, 1:], [rows[row] for row in mine.tolist()], part, parts)

    def locate(self, index: int) -> tuple[int, int, int]:
        """(source, shard number, sequence number inside it) of sequence `index`."""
        source, number = self.place(index)
        return source, *self.streams[source].locate(number)

    def sample(self, index: int, part: int = 0, parts: int = 1) -> np.ndarray:
        """As TokenStream.sample."""
        source, number = self.place(index)
        return self.streams[source].sample(number, part, parts)

    def read_into(self, index: int, tokens: np.ndarray, part: int = 0, parts: int = 1) -> None:
        """As TokenStream.read_into."""
        source, number = self.place(index)
        self.streams[source].read_into(number, tokens, part, parts)

    def announce(self, index: int) -> None:
        """As TokenStream.announce, to every source."""
        if any(stream.shards.is_remote for stream in self.streams):
            for stream, number in zip(self.streams, self.blend.counts(index).tolist(), strict=True):
                stream.announce(number)

    def row(self, index: int, part: int = 0, parts: int = 1) -> Row:
        """As TokenStream.row."""
        source, number = self.place(index)
        return self.streams[source].row(number, part, parts)

    def served(self, index: int) -> dict[str, float]:
        """For the metrics: tokens and epochs of each source in the sequences before `index`; empty for one source."""
        if not self.sources.several:
            return {}
        told: dict[str, float] = {}
        counts = self.blend.counts(index).tolist()
        for name, stream, count in zip(self.sources.names, self.streams, counts, strict=True):
            told[f"tokens/{name}"] = count * self.seq_len
            told[f"epochs/{name}"] = count / stream.num_sequences
        return told

    def check_epochs(self, end: int) -> None:
        """Refuse a run of `end` sequences that would see a source more often than it may be.

        Raises:
            UserError: naming the source, the numbers and the keys.
        """
        for number, count in enumerate(self.blend.counts(end).tolist()):
            source, stream = self.sources.sources[number], self.streams[number]
            if source.max_epochs and count > source.max_epochs * stream.num_sequences:
                raise UserError(
                    f"the schedule takes {count:,} sequences of source {source.name}, which is "
                    f"{count / stream.num_sequences:.2f} epochs of its {stream.num_sequences:,} sequences of {self.seq_len} "
                    f"tokens, above data.sources[{number}].max_epochs ({source.max_epochs:g}): raise that, lower its weight in "
                    "data.sources or data.phases, or lower schedule.tokens"
                )

    def identity(self, index: int) -> dict[str, Any]:
        """All that the sequences before `index` are a function of, and what a later run needs to find `index`: plain data."""
        phases = zip(self.blend.starts, self.blend.quotas, strict=True)
        return {
            "seq_len": self.seq_len,
            "seed": self.seed,
            "period": PERIOD,
            "sources": [
                {"name": source.name, **stream.fingerprint}
                for source, stream in zip(self.sources.sources, self.streams, strict=True)
            ],
            "phases": [{"start": start, "quotas": list(counts)} for start, counts in phases if start < max(index, 1)],
        }


def phase_starts(data: DataConfig, sources: Sources, origin: int) -> list[tuple[int, Sequence[float]]]:
    """The phases of a stream whose sequence 0 came after `origin` tokens of training, as `Blend` takes them."""
    phases: list[tuple[int, Sequence[float]]] = [(0, sources.weights)]
    for phase in data.phases:
        start = max(0, -(-(phase.tokens - origin) // data.seq_len))
        if start == phases[-1][0]:
            phases.pop()
        phases.append((start, phase.weights))
    return phases
