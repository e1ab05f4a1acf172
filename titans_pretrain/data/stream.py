"""Which tokens does step s of rank r train on?

Sequences are numbered 0, 1, 2, ... without end; the number is the whole state of the stream. Sequence j belongs to epoch
j // num_sequences, and an epoch visits every sequence of the split once, in an order of its own that is a pure function
of (seed, epoch, shards, seq_len): the shards are permuted, and the sequences of each window of WINDOW_SHARDS shards in
that order are permuted among themselves, so that only so many shards are read at a time. Ranks and batch sizes do not
enter: they only say who takes which numbers.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from titans_pretrain.data.packed import Row, check_row_length, read_row
from titans_pretrain.data.permutation import permutation_key, permute
from titans_pretrain.data.shards import ShardSet
from titans_pretrain.errors import UserError

WINDOW_SHARDS = 16
"""Shards whose sequences are mixed: 2 billion tokens, 4 GiB, at the default shard size."""


class TokenStream:
    """The sequences of one split, by number.

    Args:
        shards: an opened dataset.
        split: "train" or "valid".
        seq_len: tokens a sequence predicts; of a packed dataset the length of its rows.
        seed: names the order.
        shuffle: False: the order on disk, in every epoch.

    Raises:
        UserError: the split is empty, or too short for one sequence, or packed in rows of another length.
    """

    def __init__(self, shards: ShardSet, split: str, seq_len: int, seed: int, shuffle: bool = True):
        self.shards = shards
        self.split = split
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle = shuffle
        self.packing = shards.manifest.packing
        """The layout of a packed dataset's rows, which are then the sequences; None: sequences are cut anywhere."""
        tokens = [shard.tokens for shard in shards.split(split).shards]
        if self.packing:
            check_row_length(shards, self.packing, split, seq_len)
        # Sequences do not cross shards. Neighbours share one token, the last label of one and first input of the next,
        # but for packed rows, which share none.
        self._sequences = [(count if self.packing else count - 1) // seq_len for count in tokens]
        self.num_sequences = sum(self._sequences)
        """Sequences per epoch."""
        if not self.num_sequences:
            where = f"its longest of {len(tokens)} shards" if len(tokens) > 1 else "it"
            way_out = "lower data.seq_len"
            if split == "valid":
                way_out += " or eval.length_multiples, or build the dataset with a larger --val-fraction"
            raise UserError(
                f"the {split} split of {shards.path} is too short for one sequence of data.seq_len {seq_len}: {where} has "
                f"{max(tokens)} tokens and {seq_len + 1} are needed; {way_out}"
            )
        self._order: _EpochOrder | None = None

    def sample(self, index: int, part: int = 0, parts: int = 1) -> np.ndarray:
        """Tokens of sequence `index` (>= 0, any epoch) of a dataset that is not packed, int64 [seq_len + 1]: inputs are all
        but the last, labels all but the first. With `parts` above 1 (a divisor of seq_len) only the part-th of so many
        equal slices is read, int64 [seq_len / parts + 1].

        Raises:
            UserError: the shard is damaged there.
        """
        assert not self.packing, "rows of a packed dataset have labels of their own: use row()"
        shard, sequence = self.locate(index)
        length = self.seq_len // parts
        first = sequence * self.seq_len + part * length
        return self.shards.read(self.split, shard, first, length + 1).astype(np.int64)

    def row(self, index: int, part: int = 0, parts: int = 1) -> Row:
        """Sequence `index` (>= 0, any epoch), or the part-th of `parts` equal slices of it, as inputs and labels.

        Raises:
            UserError: the shard is damaged there.
        """
        if self.packing:
            row = read_row(self.shards, self.packing, self.split, *self.locate(index))
            return row.part(part, parts)
        tokens = self.sample(index, part=part, parts=parts)
        return Row(tokens[:-1], tokens[1:], None)

    def locate(self, index: int) -> tuple[int, int]:
        """(shard number, sequence number inside it) of sequence `index`."""
        if index < 0:
            raise ValueError(f"sequences are numbered from 0, not {index}")
        epoch, position = divmod(index, self.num_sequences)
        if not self.shuffle:
            epoch = 0
        order = self._order
        if order is None or order.epoch != epoch:
            order = self._order = _EpochOrder(self._sequences, self.seed, epoch, self.shuffle)
        return order.locate(position)


class _EpochOrder:
    """The order of one epoch. `sequences`: how many each shard holds."""

    def __init__(self, sequences: list[int], seed: int, epoch: int, shuffle: bool):
        self.epoch = epoch
        self._seed, self._shuffle = seed, shuffle
        count = len(sequences)
        key = permutation_key(seed, epoch, "shards")
        self._shards = [permute(i, count, key) for i in range(count)] if shuffle else list(range(count))
        ends = list(itertools.accumulate(sequences[shard] for shard in self._shards))
        self._starts = [0, *ends[:-1]]
        self._windows = [*self._starts[::WINDOW_SHARDS], ends[-1]]
        self._window_key = functools.lru_cache(maxsize=4)(self._key)

    def _key(self, window: int) -> tuple[int, ...]:
        return permutation_key(self._seed, self.epoch, "sequences", window)

    def locate(self, position: int) -> tuple[int, int]:
        if self._shuffle:
            window = bisect.bisect_right(self._windows, position) - 1
            first, end = self._windows[window], self._windows[window + 1]
            position = first + permute(position - first, end - first, self._window_key(window))
        place = bisect.bisect_right(self._starts, position) - 1
        return self._shards[place], position - self._starts[place]


class MicroBatch(NamedTuple):
    """int64 [rows, seq_len], or this rank's slice of the columns, each.

    labels[:, t] is the token after tokens[:, t], or -100 where none is predicted."""

    tokens: torch.Tensor
    labels: torch.Tensor
    document_starts: torch.Tensor | None = None
    """bool, where a document begins that knows nothing of those before it (data.reset_at_documents); None: nowhere."""


class BatchLoader:
    """This rank's share of every optimizer step, read ahead by one thread. Iterates without end; close it when done.

    Args:
        stream: where sequences come from.
        batch_size: sequences per step over all ranks.
        micro_batch: sequences per MicroBatch; 0: the rank's share at once.
        data_rank, data_size: this rank among the data-parallel ones; it takes the sequences
            position + data_rank * batch_size / data_size + m for m in 0..batch_size / data_size - 1.
        sequence_rank, sequence_size: this rank among those that share a row; it reads the sequence_rank-th of
            sequence_size equal slices of each sequence.
        start: number of the first sequence of the first step.
        prefetch: steps read ahead.
        document_starts: whether micro-batches say where documents start; for packed datasets.

    Raises:
        UserError: the batch does not divide. While iterating: whatever the stream raised, in this thread.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        batch_size: int,
        micro_batch: int,
        data_rank: int,
        data_size: int,
        start: int,
        prefetch: int,
        sequence_rank: int = 0,
        sequence_size: int = 1,
        document_starts: bool = False,
    ):
        if batch_size % data_size or (micro_batch and batch_size // data_size % micro_batch):
            raise UserError(
                f"a batch of {batch_size} sequences does not divide over {data_size} data-parallel ranks and micro-batches of "
                f"{micro_batch}: change data.batch_tokens or data.micro_batch"
            )
        assert 0 <= data_rank < data_size
        assert 0 <= sequence_rank < sequence_size
        assert stream.seq_len % sequence_size == 0
        assert stream.packing or not document_starts
        slice_of_row = functools.partial(stream.row, part=sequence_rank, parts=sequence_size)
        self.position = start
        """Number of the first sequence of the step that comes next."""
        self._batch_size = batch_size
        share = batch_size // data_size
        self._queue: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=_read_ahead,
            args=(
                slice_of_row,
                start + data_rank * share,
                share,
                micro_batch or share,
                batch_size,
                document_starts,
                self._queue,
                self._stop,
            ),
            name="batch-loader",
            daemon=True,
        )
        self._thread.start()

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._stop.is_set():
            raise ValueError("the loader is closed")
        if self._error is None:
            item = self._queue.get()
            if not isinstance(item, BaseException):
                self.position += self._batch_size
                return item
            self._error = item
        raise self._error

    def close(self) -> None:
        """End the thread; may be called again."""
        self._stop.set()
        while self._thread.is_alive():
            # The thread may be waiting for room; after one more put it sees the flag.
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(timeout=0.05)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _read_ahead(
    row: Callable[[int], Row],
    first: int,
    share: int,
    micro_batch: int,
    stride: int,
    document_starts: bool,
    steps: queue.Queue[list[MicroBatch] | BaseException],
    stop: threading.Event,
) -> None:
    try:
        while not stop.is_set():
            rows = [row(first + m) for m in range(share)]
            fields = tuple(zip(*rows, strict=True))[: 3 if document_starts else 2]
            parts = (torch.from_numpy(np.stack(field)).split(micro_batch) for field in fields)
            steps.put([MicroBatch(*part) for part in zip(*parts, strict=True)])
            first += stride
    except BaseException as error:  # whatever it is, the consumer must not wait for ever
        steps.put(error)
