"""In which row does a document go, so that rows are full and documents whole?

Best fit decreasing: the documents of a buffer of about a thousand rows are taken longest first, and each goes into the row
where it leaves the least room. A document that is longer than a row is cut into rows, and its rest is packed like a
document. The reader's side of it is packed.py.
"""

from __future__ import annotations

import bisect
from types import TracebackType

import numpy as np

from titans_pretrain.data.manifest import DTYPES, Packing, dtype_for
from titans_pretrain.data.writer import ShardWriter
from titans_pretrain.errors import UserError

_BUFFER_ROWS = 1024
_BUFFER_TOKENS = 32 << 20
"""More rows fit no better; fewer are taken where rows are so long that memory would grow."""
_BUFFER_ROWS_LEAST = 16


class PackedWriter:
    """Packs documents into rows and writes the rows. A context manager, to be entered after its `writer`.

    Args:
        writer: whose `shard_tokens` is a multiple of the row length, so that shards end with a row.
        packing: the layout of rows.
    """

    def __init__(self, writer: ShardWriter, packing: Packing):
        self.padding = 0
        """Tokens of padding written."""
        self.cut_documents = 0
        """Documents longer than a row."""
        self._writer = writer
        self._packing = packing
        self._dtype = DTYPES[dtype_for(len(writer.token_counts))]
        rows = max(_BUFFER_ROWS_LEAST, min(_BUFFER_ROWS, _BUFFER_TOKENS // packing.seq_len))
        self._buffer_tokens = rows * packing.seq_len
        self._pieces: list[np.ndarray] = []
        self._held = 0

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()

    @property
    def token_counts(self) -> np.ndarray:
        """int64 [vocab_size] how often each token was written, padding left out."""
        counts = self._writer.token_counts.copy()
        counts[self._packing.pad] -= self.padding
        return counts

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Take documents, as `ShardWriter.write`.

        Raises:
            UserError: a document starts with the padding token.
        """
        end = 0
        for length in lengths.tolist():
            begin, end = end, end + length
            self._take(tokens[begin:end])
            if self._held >= self._buffer_tokens:
                self._flush()

    def _take(self, document: np.ndarray) -> None:
        packing = self._packing
        if document[0] == packing.pad:
            raise UserError(
                f"a document begins with token {packing.pad}, with which rows are padded: use a tokenizer with an "
                "end-of-document token, or --packing concat"
            )
        self._held += len(document)
        self.cut_documents += len(document) > packing.seq_len
        while len(document) > packing.seq_len:
            cut = packing.seq_len
            while document[cut] == packing.pad:  # the rest would look like padding
                cut -= 1
            self._pieces.append(document[:cut])
            document = document[cut:]
        self._pieces.append(document)

    def _flush(self) -> None:
        if not self._pieces:
            return
        seq_len, align = self._packing.seq_len, self._packing.align
        lengths = np.array([len(piece) for piece in self._pieces], dtype=np.int64)
        steps = -(-lengths // align)
        rows = best_fit(steps, seq_len // align)
        order = np.argsort(rows, kind="stable")
        rows, lengths, steps = rows[order], lengths[order], steps[order]
        before = np.cumsum(steps) - steps
        firsts = np.searchsorted(rows, np.arange(rows[-1] + 1))
        starts = rows * seq_len + (before - before[firsts][rows]) * align
        content = np.full((int(rows[-1]) + 1) * seq_len, self._packing.pad, dtype=self._dtype)
        for piece, start in zip(order.tolist(), starts.tolist(), strict=True):
            content[start : start + len(self._pieces[piece])] = self._pieces[piece]
        next_starts = np.append(starts[1:], len(content))  # the first of a row starts where the row before ends
        gaps = next_starts - starts - lengths
        entries = np.stack([lengths, gaps], axis=1).ravel()
        self._writer.write(content, entries[entries > 0])
        self.padding += int(gaps.sum())
        self._pieces, self._held = [], 0


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Rows for pieces: best fit decreasing. Rows are numbered by the first piece in them, so that their order is about
    that of the text and not that of lengths.

    Args:
        sizes: int64 [pieces], each from 1 to `capacity`.
        capacity: what a row holds.

    Returns:
        int64 [pieces], the row of each.
    """
    rows = np.empty(len(sizes), dtype=np.int64)
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, sorted
    count = 0
    order = np.argsort(-sizes, kind="stable")
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect.bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        else:
            room, row, count = capacity, count, count + 1
        rows[piece] = row
        if room > size:
            if room - size not in by_room:
                by_room[room - size] = []
                bisect.insort(rooms, room - size)
            by_room[room - size].append(row)
    _, firsts, inverse = np.unique(rows, return_index=True, return_inverse=True)
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(firsts)] = np.arange(count)
    return rank[inverse]
