"""Which tokens of a packed row are predicted, and where do documents start in it? The writer's side is packing.py."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from titans_pretrain.data.damage import IGNORED
from titans_pretrain.data.manifest import Packing
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.errors import UserError


class Row(NamedTuple):
    """One sequence, [seq_len] each, or a slice of it.

    tokens, labels: int64; labels[t] is the token after tokens[t], or IGNORED.
    document_starts: bool, true where a document (or a piece of one that is longer than a row) starts, padding is none;
        None in a dataset that is not packed.
    """

    tokens: np.ndarray
    labels: np.ndarray
    document_starts: np.ndarray | None

    def part(self, number: int, count: int) -> Row:
        """The number-th of `count` equal slices."""
        length = len(self.tokens) // count
        mine = slice(number * length, (number + 1) * length)
        starts = None if self.document_starts is None else self.document_starts[mine]
        return Row(self.tokens[mine], self.labels[mine], starts)


def check_row_length(shards: ShardSet, packing: Packing, split: str, seq_len: int) -> None:
    """Refuse sequences that are not the rows of a packed dataset.

    Raises:
        UserError: naming both lengths.
    """
    if seq_len != packing.seq_len:
        change = "take 1 alone in eval.length_multiples, set " if split == "valid" else "set "
        raise UserError(
            f"{shards.path} is packed in rows of {packing.seq_len} tokens, but data.seq_len asks the {split} split for "
            f"sequences of {seq_len}: {change}data.seq_len to {packing.seq_len}, or build the dataset again with "
            f"--seq-len {seq_len}"
        )


def read_row(shards: ShardSet, packing: Packing, split: str, shard: int, row: int) -> Row:
    """Row number `row` of a shard.

    Raises:
        UserError: the shard is damaged there.
    """
    length = packing.seq_len
    tokens = shards.read(split, shard, row * length, length).astype(np.int64)
    ends = shards.document_ends(split, shard, row * length, length)
    begins = np.zeros_like(ends)
    begins[1:] = ends[:-1]
    padding = tokens[begins] == packing.pad
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    labels[ends - 1] = IGNORED  # the row's end is among them
    for begin, end in zip(begins[padding].tolist(), ends[padding].tolist(), strict=True):
        labels[begin:end] = IGNORED
    starts = np.zeros(length, dtype=bool)
    starts[begins[~padding]] = True
    return Row(tokens, labels, starts)
